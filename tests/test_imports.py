"""Checks the code against docs/design.md, "The house": who may import whom."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import transocks
import usocksd

ROOTS = {name: Path(package.__file__).parent for name, package in (("usocksd", usocksd), ("transocks", transocks))}
DESIGN = Path(__file__).parents[1] / "docs" / "design.md"

SHARED = tuple(f"usocksd.{room}" for room in ("socks", "net", "log", "host", "settings", "names", "serve"))
"""The rooms that both daemons live in. Each may import those before it; net is the exception: it knows no SOCKS."""

COMMON = ("usocksd.errors", "usocksd.__version__")
"""The modules that everybody may import."""

PURE = (
    *(f"usocksd.{name}" for name in ("socks", "errors", "acl", "clients", "egress", "decision", "records", "replay")),
    *(f"usocksd.{name}" for name in ("replies", "net.address", "net.proxy_protocol")),
    *(f"usocksd.names.{name}" for name in ("match", "sites", "site_index")),
    *(f"transocks.{name}" for name in ("sniff", "routes", "http_connect", "tracing.reports", "tracing.trace")),
    *(f"transocks.rules.{name}" for name in ("config", "loaded", "render")),
)
"""Values in, values out: no I/O, no clock, no log."""

SESSIONS = (
    "usocksd.net",
    "usocksd.socks",
    *(f"usocksd.{name}" for name in ("session", "proxied", "decision", "access_log", "egress", "clients", "replies")),
    *(f"usocksd.{name}" for name in ("acl", "association", "association_log", "mapping", "udp", "serve.associations")),
    *(f"transocks.{name}" for name in ("session", "direct", "first_bytes", "http_connect", "original_dst", "sniff")),
    *(f"transocks.{name}" for name in ("routes", "access_log", "udp")),
    *(f"transocks.upstreams.{name}" for name in ("group", "upstream", "addresses", "request")),
)
"""What the reactor drives; see usocksd/net/bridge.py."""


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


def taken(place: str) -> set[tuple[str, str]]:
    """The imports in this place, as (module, imported name)."""
    return {(module, name) for module, names in MODULES.items() if within(module, place) for name in names}


def ours(place: str) -> set[tuple[str, str]]:
    """The same, of these two packages only."""
    return {(module, name) for module, name in taken(place) if within(name, *ROOTS)}


def test_the_rules_see_the_code() -> None:
    assert "usocksd.net.pipes.PipePool" in MODULES["usocksd.session"] | MODULES["usocksd.commands.serve"]
    assert {"usocksd.socks.server", "transocks.session"} <= MODULES.keys()
    assert MODULES.keys() >= {*PURE, *SHARED, "usocksd.errors"}


def test_the_design_names_every_room() -> None:
    house = DESIGN.read_text(encoding="utf-8").partition("## The house")[2].partition("\n### ")[0]
    for package, root in ROOTS.items():
        for room in {path.parent.relative_to(root) for path in root.rglob("*.py")}:
            assert f"{room.name or package}/" in house, f"{package}/{room}"


def test_transocks_takes_from_usocksd_only_what_is_shared() -> None:
    """Rule 1: a shared room is a folder that transocks may import."""
    assert not {each for each in ours("transocks") if not within(each[1], "transocks", *SHARED, *COMMON)}


def test_usocksd_never_imports_transocks() -> None:
    """Rule 1."""
    assert not {each for each in ours("usocksd") if within(each[1], "transocks")}


@pytest.mark.parametrize("room", SHARED)
def test_a_shared_room_imports_only_those_before_it(room: str) -> None:
    """Rule 2."""
    before = [other for other in SHARED[: SHARED.index(room) + 1] if (room, other) != ("usocksd.net", "usocksd.socks")]
    assert not {each for each in ours(room) if not within(each[1], *before, *COMMON)}


@pytest.mark.parametrize("pure", PURE)
def test_pure_modules_do_no_io(pure: str) -> None:
    """Rule 3: bytes and values in, values out."""
    impure = ("trio", "logging", "dns", "netifaces", "asyncio", "threading", "subprocess")
    assert not {each for each in taken(pure) if within(each[1], *impure)}


@pytest.mark.parametrize("driven", SESSIONS)
def test_what_the_reactor_drives_does_not_import_trio(driven: str) -> None:
    """Only usocksd.net.bridge knows both worlds."""
    assert driven in MODULES
    assert not {each for each in taken(driven) if within(each[1], "trio") and each[0] != "usocksd.net.bridge"}


def test_socks_needs_only_the_standard_library() -> None:
    """Rule 3: usable alone."""
    assert not {each for each in taken("usocksd.socks") if within(each[1], "attrs", "attr", "idna")}


@pytest.mark.parametrize(
    ("library", "rooms"),
    [
        ("dns", ("usocksd.names.name_servers", "usocksd.names.name_query", "usocksd.dnsbl")),
        ("netifaces", ("usocksd.host.addresses",)),
        ("pyroute2", ("transocks.rules",)),
    ],
)
def test_libraries_stay_in_their_rooms(library: str, rooms: tuple[str, ...]) -> None:
    """Rule 4."""
    users = {module for place in ROOTS for module, name in taken(place) if within(name, library)}
    assert users
    assert not {module for module in users if not within(module, *rooms)}


def test_tracing_does_not_import_its_users() -> None:
    """Rule 5."""
    asking = ("transocks.doctor", "transocks.rules.verify")
    assert not {each for each in ours("transocks.tracing") if within(each[1], *asking)}
    tracing = {module for module, name in ours("transocks.rules") if within(name, "transocks.tracing")}
    assert tracing == {"transocks.rules.verify"}


@pytest.mark.parametrize("package", ROOTS)
def test_only_the_session_joins_stages(package: str) -> None:
    """Rule 6: `cli` and `commands` wire objects together, and nothing imports them but each other."""
    wiring = (f"{package}.cli", f"{package}.commands", f"{package}.__main__")
    outside = {each for each in ours(package) if not within(each[0], *wiring)}
    assert not {each for each in outside if within(each[1], *wiring, f"{package}.session")}
