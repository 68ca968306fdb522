"""Who may import whom: the rules of docs/design.md ("The house"), held against the code itself."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import transocks
import usocksd

ROOTS = {name: Path(package.__file__).parent for name, package in (("usocksd", usocksd), ("transocks", transocks))}

PURE = (
    "usocksd.socks",
    "usocksd.errors",
    "usocksd.acl",
    "usocksd.clients",
    "usocksd.match",
    "usocksd.sites",
    "usocksd.site_index",
    "usocksd.egress",
    "usocksd.proxy_protocol",
    "usocksd.records",
    "usocksd.policy",
    "usocksd.replay",
    "usocksd.replies",
    "transocks.http_connect",
    "transocks.firewall.config",
    "transocks.firewall.render",
    "transocks.firewall.saved",
    "transocks.firewall.verify",
    "transocks.firewall.foreign",
    "transocks.routes",
    "transocks.sniff",
)
SHARED = (
    "usocksd.addresses",
    "usocksd.conditions",
    "usocksd.errors",
    "usocksd.match",
    "usocksd.proxy_protocol",
    "usocksd.resolver",
    "usocksd.site_index",
    "usocksd.sites",
    "transocks.firewall.config",
    "transocks.firewall.render",
    "transocks.firewall.saved",
    "transocks.firewall.verify",
    "transocks.firewall.foreign",
)


def modules() -> dict[str, set[str]]:
    """Every module of both packages, and the modules that it imports, at the top or anywhere inside."""
    found = {}
    for package, root in ROOTS.items():
        for path in sorted(root.rglob("*.py")):
            parts = path.relative_to(root).with_suffix("").parts
            name = ".".join((package, *parts)).removesuffix(".__init__")
            inside = name if path.name == "__init__.py" else name.rpartition(".")[0]
            found[name] = set(imports(path, inside))
    return found


def imports(path: Path, inside: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = inside.rsplit(".", node.level - 1)[0] if node.level else ""
            module = ".".join(filter(None, (base, node.module)))
            # `from package import module` imports the module, `from module import name` the module before it.
            yield from (f"{module}.{alias.name}" for alias in node.names)


def within(name: str, *places: str) -> bool:
    return any(name == place or name.startswith(f"{place}.") for place in places)


MODULES = modules()


@pytest.fixture(params=MODULES)
def module(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


def test_the_rules_see_the_code() -> None:
    assert "usocksd.runtime.pipes.PipePool" in MODULES["usocksd.session"] | MODULES["usocksd.commands.serve"]
    assert {"usocksd.socks.server", "transocks.session"} <= MODULES.keys()
    for place in (*PURE, *SHARED):
        assert any(within(name, place) for name in MODULES), f"{place} is named in a rule and does not exist"


def test_pure_modules_do_no_io(module: str) -> None:
    """Rule 1: bytes and values in, values out."""
    if within(module, *PURE):
        impure = ("trio", "logging", "dns", "pyroute2", "netifaces", "asyncio", "threading", "subprocess")
        assert not [name for name in MODULES[module] if within(name, *impure)]


def test_socks_needs_only_the_standard_library(module: str) -> None:
    """Rule 1: usable alone."""
    if within(module, "usocksd.socks"):
        assert not [name for name in MODULES[module] if within(name, "attrs", "attr", "idna", "cattrs")]
        assert not [
            name
            for name in MODULES[module]
            if within(name, "usocksd", "transocks") and not within(name, "usocksd.socks", "usocksd.errors")
        ]


def test_the_runtime_knows_neither_daemon(module: str) -> None:
    """Rule 2."""
    if within(module, "usocksd.runtime"):
        ours = [name for name in MODULES[module] if within(name, "usocksd", "transocks")]
        allowed = ("usocksd.runtime", "usocksd.errors", "usocksd.__version__")
        assert not [name for name in ours if not within(name, *allowed)]


def test_transocks_takes_from_usocksd_only_what_is_shared(module: str) -> None:
    """Rule 3."""
    if within(module, "transocks"):
        taken = [name for name in MODULES[module] if within(name, "usocksd")]
        allowed = ("usocksd.socks", "usocksd.runtime", "usocksd.__version__", *SHARED)
        assert not [name for name in taken if not within(name, *allowed)]


def test_usocksd_never_imports_transocks(module: str) -> None:
    """Rule 3."""
    if within(module, "usocksd"):
        assert not [name for name in MODULES[module] if within(name, "transocks")]


def test_libraries_stay_in_their_rooms(module: str) -> None:
    """Rule 4."""
    if not within(module, "usocksd.name_servers", "usocksd.dnsbl"):
        assert not [name for name in MODULES[module] if within(name, "dns")]
    if not within(module, "usocksd.addresses", "transocks.firewall"):
        assert not [name for name in MODULES[module] if within(name, "pyroute2", "netifaces")]


@pytest.mark.parametrize("package", ["usocksd", "transocks"])
def test_only_the_session_joins_stages(package: str) -> None:
    """Rule 5: `cli` and `commands` wire objects together, and nothing imports them but each other."""
    wiring = (f"{package}.cli", f"{package}.commands", f"{package}.__main__")
    for module in MODULES:
        if within(module, package) and not within(module, *wiring):
            assert not [name for name in MODULES[module] if within(name, *wiring, f"{package}.session")], module
