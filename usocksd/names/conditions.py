"""Settings of rules and routes: their types, and files of destinations."""

from __future__ import annotations

import io
import re
from collections.abc import Collection, Iterator, Mapping
from ipaddress import IPv4Network, IPv6Network
from types import MappingProxyType
from typing import Annotated, Any

import attrs

from usocksd.names.match import parse_network
from usocksd.names.sites import Entry, SiteList, entry_fault, parse_entry
from usocksd.net.address import IPNetwork, numeric_address
from usocksd.settings.loader import Faults, Invalid, Parser, current_load, show
from usocksd.settings.types import read_named, text

_FILE = "file:"
_MOST_FAULTS = 10


def _site(value: str) -> str:
    """An entry of a site list, as the operator wrote it: the log names rules by this text."""
    fault = entry_fault(value)
    if fault is not None:
        raise Invalid(fault)
    return value


def _destination(value: str) -> str | SiteList:
    """An entry as the operator wrote it, or the entries of the file that it names."""
    if not value.startswith(_FILE):
        return _site(value)
    files = current_load().files
    if value not in files:
        path, content = read_named(value.removeprefix(_FILE))
        files[value] = parse_list(content, value, str(path))
    sites: SiteList = files[value]
    return sites


def parse_list(content: bytes, label: str, path: str) -> SiteList:
    """A list of destinations: an entry a line, comments behind "#". `label` is its name in `to`.

    A million entries take two seconds. Raises a group of Invalid, for each line of `path` that is no entry, up to ten.
    """
    faults: list[Invalid] = []
    more = 0

    def entries() -> Iterator[Entry]:
        nonlocal more
        # A byte order mark is no fault, as in the configuration.
        for number, line in enumerate(io.BytesIO(content.removeprefix(b"\xef\xbb\xbf")), 1):
            text = line.partition(b"#")[0].strip().decode("utf-8", "backslashreplace")
            if not text:
                continue
            try:
                yield parse_entry(text)
            except ValueError:
                if len(faults) < _MOST_FAULTS:
                    expected = "expected one entry a line" if len(text.split()) > 1 else entry_fault(text)
                    faults.append(Invalid(f"{path}: line {number}: {show(text)}: {expected}", shown=show(label)))
                else:
                    more += 1

    sites = SiteList(entries(), label)
    if more:
        faults.append(Invalid(f"{path}: {more} more lines like these", shown=show(label)))
    if faults:
        raise ExceptionGroup("a list", faults)
    return sites


class HostBits4(IPv4Network):
    """A network that was `written` with an address of a host in it: "203.0.113.7/24"."""

    written: str


class HostBits6(IPv6Network):
    """The same for IPv6."""

    written: str


def keep_host_bits(network: IPNetwork, value: str) -> IPNetwork:
    """The same network, which remembers its text if that has the address of a host."""
    if numeric_address(value.partition("/")[0]) == numeric_address(str(network.network_address)):
        return network
    written = (HostBits4 if network.version == 4 else HostBits6)(str(network))
    written.written = value
    return written


def parse_keeping_host_bits(value: str) -> IPNetwork:
    """A network or an address. Raises ValueError."""
    return keep_host_bits(parse_network(value), value)


def port_range(lowest: int) -> Parser:
    """First and last port of a range, or one port twice; none is below `lowest`."""

    def parse(value: object) -> tuple[int, int]:
        if type(value) is int:
            first = last = value
        elif type(value) is str and (match := re.fullmatch(r"([0-9]{1,5})(?:-([0-9]{1,5}))?", value)):
            first, last = int(match[1]), int(match[2] or match[1])
        else:
            raise ValueError
        if not lowest <= first <= last <= 65535:
            raise ValueError
        return first, last

    return Parser(parse, f'a port or a range, as in 443 or "6000-6100", from {lowest} to 65535')


Site = Annotated[str, text(_site, 'a host or a domain, as in "www.example.com" or ".example.com"')]
Destination = Annotated[
    str | SiteList,
    text(_destination, 'a host, ".domain", an address, a network, or a file of these as in "file:blocked.txt"'),
]
Network = Annotated[
    IPNetwork, text(parse_keeping_host_bits, 'a network or an IP address, as in "10.0.0.0/8" or "192.0.2.1"')
]
Ports = Annotated[tuple[int, int], port_range(0)]


def rule_name(kind: str, built_in: str) -> Parser:
    """The name of a rule or route (`kind`). Names that match the pattern `built_in` have another meaning in records."""

    def parse(value: str) -> str:
        if not value.isprintable() or not 0 < len(value) <= 100 or value != value.strip():
            raise ValueError
        if re.fullmatch(built_in, value):
            raise Invalid(f"is what log records call a {kind} that is built in, expected another name")
        return value

    return text(parse, "a name of 1 to 100 printable characters")


def table_name(taken: Mapping[str, str] = MappingProxyType({})) -> Parser:
    """The name that an operator gives a table; `taken` has the reserved names and their meanings."""

    def parse(value: str) -> str:
        if re.fullmatch(r"[A-Za-z0-9_-]{1,64}", value) is None:
            raise ValueError
        if value in taken:
            raise Invalid(f"is {taken[value]}, expected another name")
        return value

    return text(parse, 'a name of at most 64 letters, digits, "-" and "_"')


@attrs.frozen(kw_only=True)
class ConditionsConfig:
    """The conditions of a [[rule]] or [[route]]. None matches everything."""

    from_: tuple[Network, ...] | None = None
    to: tuple[Destination, ...] | None = None
    ports: tuple[Ports, ...] | None = None
    """first and last of each range"""

    def faults(self) -> Iterator[Invalid]:
        """Reject conditions that nothing can meet; the subclass adds others."""
        for name, what in (("from_", "client"), ("user", "user or none"), ("to", "destination"), ("ports", "port")):
            if getattr(self, name, None) == ():
                expected = f"expected at least one, or no such key if the rule holds for any {what}"
                yield Invalid(expected, shown="[]", at=name.removesuffix("_"))

    def __attrs_post_init__(self) -> None:
        Faults(self.faults()).check()

    def destinations(self) -> tuple[SiteList, ...] | None:
        """The entries that `to` has itself, and those of each file."""
        if self.to is None:
            return None
        files = dict.fromkeys(entry for entry in self.to if isinstance(entry, SiteList))
        own = [parse_entry(entry) for entry in self.to if isinstance(entry, str)]
        return (*([SiteList(own)] if own else []), *files)


def as_table(value: object) -> dict[str, Any]:
    """A table as TOML has it; an empty one if it is something else, which is a fault of its own."""
    return value if isinstance(value, dict) else {}


def check_references(
    table: Mapping[str, object], kind: str, key: str, what: str, known: Collection[str]
) -> Iterator[Invalid]:
    """The faults of all tables [[kind]] together, as TOML has them: duplicate names, and values of `key` that are not
    in `known`, the names of each `what`.
    """
    rules = table.get(kind)
    first: dict[str, int] = {}
    for index, rule in enumerate(map(as_table, rules) if isinstance(rules, list) else ()):
        name, reference = rule.get("name"), rule.get(key)
        if isinstance(name, str) and first.setdefault(name, index) != index:
            also = f"is the name of {kind} {first[name] + 1} too, expected another"
            yield Invalid(also, shown=show(name), at=f"{kind}[{index}].name")
        if isinstance(reference, str) and reference not in known:
            expected = f"no such {what}: expected one of {', '.join(map(show, known))}"
            yield Invalid(expected, shown=show(reference), at=f"{kind}[{index}].{key}")
