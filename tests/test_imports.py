"""Who may import whom: the rules of docs/design.md ("The house"), held against the code itself."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from itertools import takewhile
from pathlib import Path

import pytest

import transocks
import usocksd

ROOTS = {name: Path(package.__file__).parent for name, package in (("usocksd", usocksd), ("transocks", transocks))}

DESIGN = Path(__file__).parents[1] / "docs" / "design.md"
# Folders whose files are alike, one per verb or subject: the design names the folder.
ALIKE = ("commands", "verbs", "checks")


def house() -> dict[str, str]:
    """Every module, and package with a mark, that the design has, and its line there."""
    text = DESIGN.read_text(encoding="utf-8").partition("## The house")[2]
    found: dict[str, str] = {}
    folders: list[str] = []
    for line in text.partition("```\n")[2].partition("```\n")[0].splitlines():
        del folders[(len(line) - len(line.lstrip())) // 2 :]
        for name in takewhile(lambda word: word.endswith((".py", "/")), line.split()):
            if name.endswith("/"):
                folders.append(name.removesuffix("/"))
            place = ".".join((*folders, name.removesuffix(".py")) if name.endswith(".py") else folders)
            assert place not in found, f"{place} is there twice"
            found[place] = line
    return found


HOUSE = house()
PURE = [name for name, line in HOUSE.items() if "(pure" in line]
SHARED = [name for name, line in HOUSE.items() if "shared)" in line]


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
    assert {"usocksd.socks", "usocksd.acl", "transocks.routes"} <= set(PURE)
    assert {"usocksd.socks", "usocksd.resolver"} <= set(SHARED)


def test_the_design_has_every_module_and_no_other() -> None:
    described = {
        name for name, line in HOUSE.items() if f"{name.rpartition('.')[2]}.py" in line and within(name, *ROOTS)
    }
    there = {name for name in MODULES if not set(ALIKE) & set(name.split(".")) and "__main__" not in name}
    packages = {name.rpartition(".")[0] for name in MODULES}
    assert described == there - packages


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
    if not within(module, "usocksd.name_servers", "usocksd.name_query", "usocksd.dnsbl"):
        assert not [name for name in MODULES[module] if within(name, "dns")]
    if module != "usocksd.addresses":
        assert not [name for name in MODULES[module] if within(name, "netifaces")]
    if not within(module, "transocks.firewall"):
        assert not [name for name in MODULES[module] if within(name, "pyroute2")]


def test_tracing_knows_nobody_who_asks_it() -> None:
    """Rule 5."""
    for module in MODULES:
        if within(module, "transocks.tracing"):
            assert not [
                name for name in MODULES[module] if within(name, "transocks.doctor", "transocks.firewall.examine")
            ]
        if within(module, "transocks.firewall") and module != "transocks.firewall.examine":
            assert not [name for name in MODULES[module] if within(name, "transocks.tracing")]


@pytest.mark.parametrize("package", ["usocksd", "transocks"])
def test_only_the_session_joins_stages(package: str) -> None:
    """Rule 6: `cli` and `commands` wire objects together, and nothing imports them but each other."""
    wiring = (f"{package}.cli", f"{package}.commands", f"{package}.__main__")
    for module in MODULES:
        if within(module, package) and not within(module, *wiring):
            assert not [name for name in MODULES[module] if within(name, *wiring, f"{package}.session")], module
