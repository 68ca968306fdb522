"""From the rule files to the rules for one purpose: text in, text out; nothing is run here.

Rendering is substitution that insists (`_replace`): where a file no longer has what is to be replaced, or has it more
often, there is an error and no rules.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from ipaddress import IPv4Network, IPv6Network, collapse_addresses
from itertools import product
from pathlib import Path

import attrs

from transocks.rules.config import Mode, Tool
from transocks.rules.redirection import Redirection, Selection
from transocks.rules.saved import delete, parse_save
from usocksd.net.address import IPNetwork

_PORTS = {Mode.HOST: 1081, Mode.GATEWAY: 1081, Mode.TPROXY: 1084}
_MOST_MULTIPORT = 15  # ports that one match of iptables takes, a range counts as two
_MOST_NETWORKS = 16  # in a word of iptables-restore, which has at most 1023 characters

# Where traffic enters our chains: in nft the hook lines, in iptables the last line of each chain.
_NFT_TCP = r"^(\t\t)(tcp flags & \(fin \| syn \| rst \| ack\) == syn jump (?:redirect|tproxy)_tcp)$"
_NFT_UNKNOWN = r"^(\t\t)#(tcp flags & \(fin \| syn \| rst \| ack\) != syn ct {} .* jump refuse_unknown)$"
_NFT_UDP = r"^(\t\t)(udp dport 443 jump reject_quic)$"


@attrs.frozen
class Commands:
    """How to load rules, and how to remove them: programs, and what each reads."""

    load: tuple[tuple[str, str], ...]
    unload: tuple[tuple[str, str], ...]


def render(tool: Tool, wanted: Redirection, *, ipv6: bool = True) -> Commands:
    """The rules as a set of commands of its own, for `transocks exec`: load and unload, nothing else.

    ipv6: whether this kernel has IPv6 (ip6tables fails without; an nft table of the inet family does not).
    """
    if tool is Tool.NFT:
        text = render_nft(wanted)
        return Commands((("nft -f -", text),), ((f"nft delete table inet {wanted.table}", ""),))
    load, unload = [], []
    for restore, six in (("iptables-restore", False), ("ip6tables-restore", True))[: 2 if ipv6 else 1]:
        text = render_iptables(wanted, six=six)
        load.append((f"{restore} --noflush", text))
        # A table at a time, so that one that is gone already keeps nothing of the other.
        unload += [(f"{restore} --noflush", delete(table)) for table in parse_save(text)]
    # Removed in the opposite order: what hooked in last goes first.
    return Commands(tuple(load), tuple(unload[::-1]))


def render_all_nft(wanted: Iterable[Redirection], *, seconds: int | None = None) -> str:
    """The rules of several modes as one text, so one transaction; see `render_nft`."""
    first, *others = (render_nft(w, seconds=seconds) for w in wanted)
    return "".join([first, *map(_redefining, others)])


def _redefining(text: str) -> str:
    """nft takes a second definition in one text, or by one socket, for a mistake."""
    return re.sub(r"^define\b", "redefine", text, flags=re.MULTILINE)


def render_nft(wanted: Redirection, *, seconds: int | None = None) -> str:
    """What `nft -f` takes: one table, in the place of what was loaded under its name.

    seconds: how long the rules are in force unless somebody prolongs it; None: for good.
    """
    text = _template(f"{wanted.mode.value}.nft")
    own = _own(wanted).table
    text = _replace(text, r"^(define transocks_port =) \d+$", rf"\1 {wanted.port}", 1)
    text = _replace(text, rf"\binet {own}\b", f"inet {wanted.table}", 4)
    if wanted.mark is not None:
        text = _replace(text, r"^(define transocks_mark =) 0x7473$", rf"\1 {wanted.mark:#x}", 1)
    if seconds is not None:
        elements = f"tcp timeout {seconds}s, udp timeout {seconds}s"
        text = _replace(text, r"^(\t\telements = \{) tcp, udp \}$", rf"\1 {elements} }}", 1)
    if wanted.mode is Mode.HOST and wanted.exempt_users:
        users = _nft_set(map(str, wanted.exempt_users))
        text = _replace(
            text, r'^(\t\t)#meta skuid "transocks" accept\n\t\t#meta skuid "usocksd" accept$',
            rf"\1meta skuid {users} accept", 1,
        )  # fmt: skip
    if wanted.exclude is not None:
        for version in (4, 6):
            networks = _of(wanted.exclude, version)
            elements = f"\\1\t\telements = {_nft_set(map(str, networks))}\n" if networks else r"\1"
            pattern = rf"^(\tset direct{version} \{{\n(?:\t\t(?!elements).*\n)*)\t\telements = \{{[^}}]*\}}\n"
            text = _replace(text, pattern, elements, 1)
    if wanted.mode is Mode.TPROXY:
        text = _render_nft_tproxy(text, wanted)
    selection = wanted.selection_here
    matches = list(_nft_matches(selection, "tcp"))
    text = _multiply(text, _NFT_TCP, matches)
    if wanted.closed:
        for condition in ("state", "label") if wanted.mode is Mode.TPROXY else ("state",):
            text = _multiply(text, _NFT_UNKNOWN.format(condition), matches)
    quic = list(_nft_matches(_without_ports(selection), "udp")) if _quic(wanted) else []
    return _multiply(text, _NFT_UDP, quic)


def render_guard(wanted: Redirection) -> str:
    """For guard.py: a table of its own that refuses what these rules select and is not redirected, for good.

    It filters, behind where the rules redirect; what they or others have redirected or mapped it leaves alone. So it
    does nothing while they are in force, and refuses when they are not. What is connected through transocks goes on
    meanwhile: address translation stays, for TPROXY the mark.
    """
    name = wanted.guard
    text = _redefining(render_nft(attrs.evolve(wanted, name=name, closed=True)))
    # A table that has an owner can't be mentioned without.
    text = _replace(
        text, rf"^table inet {name} .*\n(delete table .*)$", rf"table inet {name} {{ flags owner; }}\n\1", 1
    )
    text = _replace(text, rf"^(table inet {name} \{{)$", r"\1\n\tflags owner", 1)
    if wanted.mode is Mode.TPROXY:
        text = _replace(text, r"^\t\tmeta nfproto ipv[46] meta l4proto tcp tproxy .*\n", "", 2)
        own_chain = "\t}\n\n\tchain forward_tcp {\n\t\ttype filter hook forward priority -10; policy accept;\n\n"
        return _replace(text, r"^\t\t# Which traffic of the new ones: ", rf"{own_chain}\g<0>", 1)
    text = _replace(text, r"^(\tchain exempt \{)$", r"\1\n\t\tct status dnat accept", 1)
    text = _replace(text, r"^(\t\tmeta l4proto tcp) redirect to :\$transocks_port$", r"\1 reject with tcp reset", 1)
    nat, filtering = ("prerouting", "forward") if wanted.mode is Mode.GATEWAY else ("output", "output")
    text = _replace(text, f"type nat hook {nat} priority -90", f"type filter hook {filtering} priority -10", 1)
    translation = "\tchain stays {\n\t\ttype nat hook output priority -90; policy accept;\n\t}\n\n"
    return _replace(text, r"^\tchain exempt \{$", rf"{translation}\g<0>", 1)


def _render_nft_tproxy(text: str, wanted: Redirection) -> str:
    # In the commands at its head, too.
    text = _replace(text, r"\b0x7474\b", f"{wanted.tproxy_mark:#x}", 6)
    text = _replace(text, r"\b29812\b", f"{wanted.tproxy_mark}", 9)
    for address in wanted.addresses:
        family, loopback, shown = (
            ("ip", "127.0.0.1", f"{address}") if address.version == 4 else ("ip6", "[::1]", f"[{address}]")
        )
        text = _replace(text, re.escape(f" tproxy {family} to {loopback}:"), f" tproxy {family} to {shown}:", 1)
    if wanted.closed:
        text = _replace(text, r"^(\t\t)#(meta l4proto tcp reject with tcp reset|ct label set 116)$", r"\1\2", 2)
    return text


def render_iptables(wanted: Redirection, *, six: bool, until: str | None = None) -> str:
    """What iptables-restore takes, or ip6tables-restore if `six`: no comments, otherwise as the files are.

    until: the time when the rules end by themselves, in UTC as in "2026-01-31T23:59:59"; None: never.
    """
    mode, chain = wanted.mode, wanted.chain
    kinds = ("", "-UDP", "-TCP") if wanted.closed else ("", "-UDP")
    text = _iptables_lines(wanted, six, kinds)
    port = _PORTS[mode]
    text = _replace(text, rf"(--to-ports|--on-port) {port}\b", rf"\1 {wanted.port}", 1)
    if wanted.mark is not None:
        text = _replace(text, r"-m mark --mark 0x7473 ", f"-m mark --mark {wanted.mark:#x} ", len(kinds))
    if wanted.exclude is not None:
        networks = list(map(str, _of(wanted.exclude, 6 if six else 4)))
        for name in [f"{chain}{kind}" for kind in kinds]:
            lines = [f"-A {name} -d {','.join(some)} -j RETURN\n" for some in _batches(networks, _MOST_NETWORKS)]
            text = _replace(text, rf"^(?:-A {name} -d \S+ -j RETURN\n)+", "".join(lines), 1)
    if mode is Mode.TPROXY:
        text = _replace(text, r"(--set-mark|--tproxy-mark) 0x7474\b", rf"\1 {wanted.tproxy_mark:#x}", 2)
        for address in wanted.addresses:
            if (address.version == 6) == six:
                text = _replace(text, r" --on-ip \S+ ", f" --on-ip {address} ", 1)
    if until is not None:
        # Behind what belongs to connections that transocks has, before all else.
        first = rf"-A {chain} -p tcp ! --syn -j RETURN" if mode is Mode.TPROXY else rf"-N {chain}"
        others = [(rf"-N {chain}{kind}", f"{chain}{kind}") for kind in kinds[1:]]
        for anchor, name in ((first, chain), *others):
            text = _replace(text, rf"^({anchor}\n)", rf"\1-A {name} -m time --datestart {until} -j RETURN\n", 1)
    selection = wanted.selection_here
    version = 6 if six else 4
    matches = list(_iptables_matches(selection, version))
    text = _multiply(text, rf"^(-A {chain} -p tcp )(-j (?:REDIRECT|TPROXY) .*)$", matches)
    if wanted.closed:
        text = _multiply(text, rf"^(-A {chain}-TCP -p tcp )(-j REJECT .*)$", matches)
        if mode is Mode.TPROXY:
            text = _multiply(text, rf"^(-A {chain} -p tcp )(-m connlabel .*)$", matches)
    quic = list(_iptables_matches(_without_ports(selection), version)) if _quic(wanted) else []
    return _multiply(text, rf"^(-A {chain}-UDP -p udp )(-j REJECT .*)$", quic)


def _iptables_lines(wanted: Redirection, six: bool, kinds: Iterable[str]) -> str:
    """The lines of the file that count, with the names of these rules."""
    text = _template(f"{wanted.mode.value}.v{6 if six else 4}")
    own_chain = _own(wanted).chain
    if wanted.closed:
        text = re.sub(rf"^#(?=#?-[NAI] .*\b{own_chain}-TCP\b|-A .* --set$)", "", text, flags=re.MULTILINE)
    if wanted.mode is Mode.HOST and wanted.exempt_users:
        for name in [f"{own_chain}{kind}" for kind in kinds if kind != "-UDP"]:
            own = rf"^#-A {name} -m owner --uid-owner transocks -j RETURN\n#.*--uid-owner usocksd -j RETURN$"
            lines = [f"-A {name} -m owner --uid-owner {user} -j RETURN" for user in wanted.exempt_users]
            text = _replace(text, own, "\n".join(lines), 1)
    text = re.sub(r"^#.*\n|^\n", "", text, flags=re.MULTILINE)
    return re.sub(rf"\b{own_chain}\b", wanted.chain, text)


def excluded(wanted: Redirection) -> list[str]:
    """The networks that these rules leave alone as destinations."""
    if wanted.exclude is not None:
        return list(map(str, wanted.exclude))
    texts = [_template(f"{wanted.mode.value}.{kind}") for kind in ("v4", "v6")]
    return [network for text in texts for network in re.findall(rf"^-A {_own(wanted).chain} -d (\S+) -j", text, re.M)]


def _own(wanted: Redirection) -> Redirection:
    """The file's own names."""
    return Redirection(mode=wanted.mode, port=0)


def _quic(wanted: Redirection) -> bool:
    """Whether to refuse QUIC: it is where TCP port 443 is taken."""
    ports = wanted.selection.ports
    return wanted.reject_quic and (not ports or any(low <= 443 <= high for low, high in ports))


def _without_ports(selection: Selection) -> Selection:
    return attrs.evolve(selection, ports=())


# ---- selection: alternatives, each of which is a line


def _families(selection: Selection) -> list[tuple[int | None, list[IPNetwork], list[IPNetwork]]]:
    """IP version (None: both), sources and destinations, as far as there is anything in both."""
    if not selection.from_ and not selection.to:
        return [(None, [], [])]
    found: list[tuple[int | None, list[IPNetwork], list[IPNetwork]]] = []
    for version in (4, 6):
        sources, destinations = _of(selection.from_, version), _of(selection.to, version)
        if bool(sources) == bool(selection.from_) and bool(destinations) == bool(selection.to):
            found.append((version, sources, destinations))
    return found


def _nft_matches(selection: Selection, protocol: str) -> Iterable[str]:
    """Matches, with a space behind each. What none of several lines has is "", which stands for everything."""
    who = [f"meta skuid {_nft_set(map(str, selection.users))} "] if selection.users else []
    who += [f"meta skgid {_nft_set(map(str, selection.groups))} "] if selection.groups else []
    who += [
        f'socket cgroupv2 level {path.count("/") + 1} "{os.path.normpath(f"{selection.cgroups_at}/{path}")}" '
        for path in selection.cgroups
    ]
    who += [f"meta cgroup {classid} " for classid in selection.classids]
    names = _nft_set(f'"{name}"' for name in selection.interfaces)
    inside = f"iifname {names} " if selection.interfaces else ""
    ports = _nft_set(_range(pair, "-") for pair in merged(selection.ports))
    where = f"{protocol} dport {ports} " if selection.ports else ""
    for someone, (version, sources, destinations) in product(who or [""], _families(selection)):
        ip = "ip" if version == 4 else "ip6"
        source = f"{ip} saddr {_nft_set(map(str, sources))} " if sources else ""
        destination = f"{ip} daddr {_nft_set(map(str, destinations))} " if destinations else ""
        yield f"{someone}{inside}{source}{destination}{where}"


def _iptables_matches(selection: Selection, version: int) -> Iterable[str]:
    who = [f"-m owner --uid-owner {user} " for user in selection.users]
    who += [f"-m owner --gid-owner {group} " for group in selection.groups]
    who += [f'-m cgroup --path "{path}" ' for path in selection.cgroups]
    who += [f"-m cgroup --cgroup {classid} " for classid in selection.classids]
    inside = [f"-i {name} " for name in selection.interfaces]
    where = [f"-m multiport --dports {ports} " for ports in _multiports(merged(selection.ports))]
    for found, sources, destinations in _families(selection):
        if found in (None, version):
            source = [f"-s {network} " for network in sources]
            destination = [f"-d {network} " for network in destinations]
            for words in product(*(words or [""] for words in (inside, source, destination, who, where))):
                yield "".join(words)


def _batches(words: Sequence[str], most: int) -> Iterable[Sequence[str]]:
    return (words[at : at + most] for at in range(0, len(words), most))


def _multiports(ports: Sequence[tuple[int, int]]) -> Iterable[str]:
    words: list[str] = []
    used = 0
    for pair in ports:
        size = 1 if pair[0] == pair[1] else 2
        if used + size > _MOST_MULTIPORT:
            yield ",".join(words)
            words, used = [], 0
        words.append(_range(pair, ":"))
        used += size
    if words:
        yield ",".join(words)


def merged(ports: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """The same ports as ranges that neither overlap nor touch, in order."""
    found: list[tuple[int, int]] = []
    for low, high in sorted(ports):
        if found and low <= found[-1][1] + 1:
            found[-1] = (found[-1][0], max(high, found[-1][1]))
        else:
            found.append((low, high))
    return found


def _range(pair: tuple[int, int], between: str) -> str:
    return str(pair[0]) if pair[0] == pair[1] else f"{pair[0]}{between}{pair[1]}"


def _of(networks: Iterable[IPNetwork], version: int) -> list[IPNetwork]:
    """Those of one IP version, such that none is in another."""
    if version == 4:
        return list(collapse_addresses(n for n in networks if isinstance(n, IPv4Network)))
    return list(collapse_addresses(n for n in networks if isinstance(n, IPv6Network)))


def _nft_set(elements: Iterable[str]) -> str:
    return f"{{ {', '.join(elements)} }}"


# ---- substitution


def _multiply(text: str, pattern: str, matches: Sequence[str]) -> str:
    """The one line that fits (its start, its end), once for each of the matches, which come in between."""
    found = re.search(pattern, text, re.MULTILINE)
    lines = [f"{found[1]}{match}{found[2]}\n" for match in matches] if found is not None else []
    return _replace(text, pattern.removesuffix("$") + r"\n", "".join(lines).replace("\\", r"\\"), 1)


def _replace(text: str, pattern: str, replacement: str, count: int) -> str:
    """re.sub that insists: rules that were not narrowed as asked must not be loaded."""
    text, found = re.subn(pattern, replacement, text, flags=re.MULTILINE)
    if found != count:
        raise AssertionError(f"the rule files have changed: {pattern} matches {found} times, not {count}")
    return text


def _template(file: str) -> str:
    installed = Path(__file__).parent / "templates"  # in a wheel; a checkout has them where operators look
    folder = installed if installed.is_dir() else Path(__file__).parents[2] / "iptables"
    return (folder / file).read_text(encoding="utf-8")
