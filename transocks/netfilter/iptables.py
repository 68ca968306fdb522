"""What `iptables-save` and `ip6tables-save` say, read: iptables-extensions(8)."""

from __future__ import annotations

import grp
import pwd
import re
from collections.abc import Collection, Iterator
from ipaddress import ip_address, ip_network

from transocks.netfilter.ruleset import (
    NEVER,
    TCP_FLAGS,
    Action,
    Chain,
    Hook,
    Kind,
    Match,
    Range,
    Rule,
    Ruleset,
    Version,
    network_range,
    unknown,
)
from usocksd.match import IPAddress

# netfilter_ipv4.h, enum nf_ip_hook_priorities
_PRIORITIES = {"raw": -300, "mangle": -150, "nat": -100, "filter": 0, "security": 50}
_HOOKS: dict[str, Hook] = {
    "PREROUTING": "prerouting", "INPUT": "input", "FORWARD": "forward", "OUTPUT": "output",
    "POSTROUTING": "postrouting",
}  # fmt: skip
_SIMPLE = {
    "ACCEPT": Kind.ACCEPT, "DROP": Kind.DROP, "REJECT": Kind.REJECT, "RETURN": Kind.RETURN, "QUEUE": Kind.QUEUE,
    "NFQUEUE": Kind.QUEUE, "NOTRACK": Kind.NOTRACK, "NETMAP": Kind.DNAT,
}  # fmt: skip
# They do something on the way and let the packet go on.
_PASSING = frozenset({
    "LOG", "NFLOG", "CONNMARK", "CONNSECMARK", "SECMARK", "TCPMSS", "CLASSIFY", "DSCP", "TOS", "TTL", "HL", "SET",
    "TRACE", "CHECKSUM", "AUDIT", "MASQUERADE", "SNAT",
})  # fmt: skip
_PORTS = {
    "--dport": "dport", "--dports": "dport", "--destination-port": "dport", "--destination-ports": "dport",
    "--sport": "sport", "--sports": "sport", "--source-port": "sport", "--source-ports": "sport",
}  # fmt: skip
_WORDS = {
    "--dst-type": "destination_type", "--src-type": "source_type", "--ctstate": "state", "--state": "state",
    "--ctstatus": "state",
}  # fmt: skip
_SILENT = frozenset({"--comment", "--transparent", "--nowildcard", "--restore-skmark"})
_FREE_TEXT = frozenset({"--comment", "--log-prefix", "--nflog-prefix"})
"""Their values may begin with anything."""
_WORD = re.compile(r'"((?:[^"\\]|\\.)*)"|(\S+)')
_ALL = 0xFFFFFFFF


def read_iptables(text: str, version: Version) -> Ruleset:
    """The chains of all tables in the output of iptables-save (4) or ip6tables-save (6)."""
    chains: list[Chain] = []
    table = ""
    policies: dict[str, str] = {}
    rules: dict[str, list[Rule]] = {}
    for line in text.splitlines():
        if line.startswith("*"):
            table, policies, rules = line[1:].strip(), {}, {}
        elif line.startswith(":"):
            name, policy = line[1:].split()[:2]
            policies[name], rules[name] = policy, []
        elif line.startswith("-A "):
            words = _words(line)
            rules[words[1]].append(_rule(words[2:], line, version, rules))
        elif line == "COMMIT":
            chains += (_chain(table, name, version, policies[name], rules[name]) for name in policies)
    return Ruleset(tuple(chains))


def _chain(table: str, name: str, version: Version, policy: str, rules: list[Rule]) -> Chain:
    hook = None if policy == "-" else _HOOKS.get(name)
    source = table == "nat" and hook in {"input", "postrouting"}
    return Chain(
        family="ip" if version == 4 else "ip6", table=table, name=name, tool="iptables", rules=tuple(rules), hook=hook,
        type="nat" if table == "nat" else "filter", priority=100 if source else _PRIORITIES.get(table, 0),
        drops=policy == "DROP",
    )  # fmt: skip


def _rule(words: list[str], line: str, version: Version, chains: Collection[str]) -> Rule:
    matches: list[Match] = []
    actions: list[Action] = []
    module = ""
    options = list(_options(words))
    for index, (option, values, negate) in enumerate(options):
        if option == "-m":
            module = values[0]
            if module == "socket":
                matches.append(NEVER)  # of a connection that is there already
        elif option in {"-j", "-g"}:
            # All behind it belongs to the target.
            extra = {name: more for name, more, _ in options[index + 1 :]}
            actions += _target(option, values[0], extra, chains)
            break
        else:
            matches += _match(option, values, negate, module, version)
    return Rule(tuple(matches), tuple(actions), line)


def _words(line: str) -> list[str]:
    """As iptables-save writes them: double quotes around what needs them, backslashes in there. shlex is slow."""
    return [re.sub(r"\\(.)", r"\1", quoted) if quoted else plain for quoted, plain in _WORD.findall(line)]


def _options(words: list[str]) -> Iterator[tuple[str, list[str], bool]]:
    """Each option with what belongs to it, and whether an exclamation mark stands before it."""
    index = 0
    while index < len(words):
        negate = words[index] == "!"
        index += negate
        option = words[index]
        index += 1
        start = index
        index += option in _FREE_TEXT
        while index < len(words) and not words[index].startswith("-") and words[index] != "!":
            index += 1
        yield option, words[start:index], negate


def _match(option: str, values: list[str], negate: bool, module: str, version: Version) -> list[Match]:
    try:
        return _known_match(option, values, negate, module, version)
    except (ValueError, IndexError, KeyError):
        return [unknown(" ".join(["!"] * negate + [option, *values]))]


def _known_match(option: str, values: list[str], negate: bool, module: str, version: Version) -> list[Match]:
    first = values[0] if values else ""
    if option in _PORTS:
        return [Match(_PORTS[option], tuple(map(_range, first.split(","))), negate)]
    if option in _WORDS:
        return [Match(_WORDS[option], tuple(first.lower().split(",")), negate)]
    if option in _SILENT:
        return []
    match option:
        case "-p":
            return [Match("protocol", (first,), negate)] if first != "all" else []
        case "-s" | "-d":
            networks = tuple(network_range(ip_network(value, strict=False)) for value in first.split(","))
            return [Match("source" if option == "-s" else "destination", networks, negate, version=version)]
        case "-i" | "-o":
            pattern = f"{first[:-1]}*" if first.endswith("+") else first  # "eth+" is any that begins so
            return [Match("iif" if option == "-i" else "oif", (pattern,), negate)]
        case "--mark" if module == "mark":
            value, mask = _mark(first)
            return [Match("mark", (Range(value, value),), negate, mask=None if mask == _ALL else mask)]
        case "--uid-owner" | "--gid-owner":
            group = option == "--gid-owner"
            return [Match("gid" if group else "uid", (_owner(first, group=group),), negate)]
        case "--tcp-flags":
            mask, flags = map(_flags, values)
            return [Match("flags", (Range(flags, flags),), negate, mask=mask)]
        case "--syn":
            return _known_match("--tcp-flags", ["FIN,SYN,RST,ACK", "SYN"], negate, module, version)
    raise KeyError(option)


def _target(option: str, name: str, extra: dict[str, list[str]], chains: Collection[str]) -> Iterator[Action]:
    """What a rule does."""
    if name in chains:
        yield Action(Kind.GOTO if option == "-g" else Kind.JUMP, chain=name)
    elif name in _SIMPLE:
        yield Action(_SIMPLE[name])
    elif name == "REDIRECT":
        yield Action(Kind.REDIRECT, port=_first_port(extra.get("--to-ports")))
    elif name == "DNAT":
        yield _dnat(extra.get("--to-destination", [""])[0])
    elif name == "TPROXY":
        if "--tproxy-mark" in extra:
            yield Action(Kind.MARK, mark=Range(*_mark(extra["--tproxy-mark"][0])))
        address = ip_address(extra["--on-ip"][0]) if "--on-ip" in extra else None
        yield Action(
            Kind.TPROXY, port=_first_port(extra.get("--on-port")),
            address=None if address is None or address.is_unspecified else address,
        )  # fmt: skip
    elif name == "MARK":
        yield from _set_mark(extra)
    elif name == "CT":
        if "--notrack" in extra:
            yield Action(Kind.NOTRACK)
    elif name not in _PASSING:
        yield Action(Kind.UNKNOWN)


def _set_mark(extra: dict[str, list[str]]) -> Iterator[Action]:
    for option in ("--set-mark", "--set-xmark"):
        if option in extra:
            yield Action(Kind.MARK, mark=Range(*_mark(extra[option][0])))
            return
    yield Action(Kind.MARK)


def _dnat(text: str) -> Action:
    """ADDRESS, ADDRESS:PORT, [ADDRESS]:PORT, :PORT, ranges of them; of a range nothing is said."""
    host, _, port = text.rpartition(":") if text.count(":") == 1 or "]:" in text else (text, "", "")
    address: IPAddress | None
    try:
        address = ip_address(host.strip("[]"))
    except ValueError:
        address = None
    return Action(Kind.DNAT, address=address, port=int(port) if port.isdigit() else None)


def _first_port(values: list[str] | None) -> int | None:
    return int(values[0].partition("-")[0]) if values else None


def _range(text: str) -> Range:
    low, colon, high = text.partition(":")
    return Range(int(low or 0), int(high or 65535) if colon else int(low))


def _flags(text: str) -> int:
    """TCP's flags as iptables names them."""
    if text in {"ALL", "NONE"}:
        return 0x3F if text == "ALL" else 0
    return sum(TCP_FLAGS[name.lower()] for name in text.split(","))


def _mark(text: str) -> tuple[int, int]:
    value, slash, mask = text.partition("/")
    return int(value, 0), int(mask, 0) if slash else _ALL


def _owner(text: str, *, group: bool) -> Range:
    low, dash, high = text.partition("-")
    if low.isdigit():
        return Range(int(low), int(high) if dash else int(low))
    number = grp.getgrnam(text).gr_gid if group else pwd.getpwnam(text).pw_uid
    return Range(number, number)
