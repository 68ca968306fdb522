"""Renders the rules of a redirection as text for the tools, from the files in iptables/. Runs nothing.

Rendering is strict substitution (`_replace`): if a file does not have exactly the expected number of places to replace,
there is an error and no rules. A selection becomes alternatives, each of which is a line.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Sequence
from ipaddress import IPv4Network, IPv6Network, collapse_addresses
from itertools import product
from pathlib import Path

import attrs

from transocks.rules.config import Mode
from transocks.rules.redirection import Redirection
from usocksd.net.address import IPNetwork

_PORTS = {"host": 1081, "gateway": 1081, "tproxy": 1084, "dgram": 1084, "tproxy_dgram": 1084}

# Where traffic enters our chains: in nft the hook lines, in iptables the last line of each chain.
_NFT_TCP = r"^(\t\t)(tcp flags & \(fin \| syn \| rst \| ack\) == syn jump (?:redirect|tproxy)_tcp)$"
_NFT_UDP = r"^(\t\t)(udp dport @ports jump (?:mark|tproxy)_udp)$"
_NFT_UNKNOWN = r"^(\t\t)#(tcp flags & \(fin \| syn \| rst \| ack\) != syn ct {} .* jump refuse_unknown)$"
_NFT_QUIC = r"^(\t\t)(udp dport 443 jump reject_quic)$"


def render_all_nft(redirections: Iterable[Redirection], *, seconds: int | None = None) -> str:
    """The rules of several modes as one text, so one transaction; see `render_nft`."""
    first, *others = (render_nft(each, seconds=seconds) for each in redirections)
    return "".join([first, *map(_redefining, others)])


def _redefining(text: str) -> str:
    """For nft, a second definition of a name in one text, or on one socket, is an error."""
    return re.sub(r"^define\b", "redefine", text, flags=re.MULTILINE)


def render_nft(redirection: Redirection, *, seconds: int | None = None) -> str:
    """Text for `nft -f`: one table, which replaces the loaded one of that name.

    seconds: how long the rules are in force unless prolonged; None: for good.
    """
    mode = redirection.mode
    text = _template(f"{redirection.file}.nft")
    text = _replace(text, r"^(define transocks_port =) \d+$", rf"\1 {redirection.port}")
    text = _replace(text, rf"\binet {_file_names(redirection).table}\b", f"inet {redirection.table}", 4)
    if redirection.mark is not None:
        text = _replace(text, r"^(define transocks_mark =) 0x7473$", rf"\1 {redirection.mark:#x}")
    if seconds is not None:
        elements = f"tcp timeout {seconds}s, udp timeout {seconds}s"
        text = _replace(text, r"^(\t\telements = \{) tcp, udp \}$", rf"\1 {elements} }}")
    if mode is Mode.HOST and redirection.exempt_users:
        users = rf"\1meta skuid {_nft_set(redirection.exempt_users)} accept"
        text = _replace(text, r'^(\t\t)#meta skuid "transocks" accept\n\t\t#meta skuid "usocksd" accept$', users)
    if redirection.exclude is not None:
        for version in (4, 6):
            networks = _of(redirection.exclude, version)
            elements = rf"\1\t\telements = {_nft_set(networks)}\n" if networks else r"\1"
            pattern = rf"^(\tset direct{version} \{{\n(?:\t\t(?!elements).*\n)*)\t\telements = \{{[^}}]*\}}\n"
            text = _replace(text, pattern, elements)
    if redirection.udp:
        return _render_nft_udp(text, redirection)
    if mode is Mode.TPROXY:
        text = _render_nft_tproxy(text, redirection)
    matches = list(_nft_matches(redirection, "tcp"))
    text = _multiply(text, _NFT_TCP, matches)
    if redirection.closed:
        for condition in ("state", "label") if mode is Mode.TPROXY else ("state",):
            text = _multiply(text, _NFT_UNKNOWN.format(condition), matches)
    quic = list(_nft_matches(attrs.evolve(redirection, ports=()), "udp")) if _refuses_quic(redirection) else []
    return _multiply(text, _NFT_QUIC, quic)


def _render_nft_udp(text: str, redirection: Redirection) -> str:
    text = _set_tproxy(text, redirection, marks=3, tables=4)
    ports = _nft_set(_range(low, high, "-") for low, high in merge_ranges(redirection.ports))
    text = _replace(text, r"^(\t\telements =) \{ 53 \}$", rf"\1 {ports}")
    if redirection.closed and redirection.mode is not Mode.HOST:
        text = _replace(text, r"^(\t\t)#(meta l4proto udp reject .*)$", r"\1\2")
    selected = list(_nft_matches(attrs.evolve(redirection, ports=()), "udp"))
    return _multiply(text, _NFT_UDP, selected)


def _set_tproxy(text: str, redirection: Redirection, *, marks: int, tables: int) -> str:
    """With this mark, which is there so often, also in the commands at the top; and these addresses."""
    text = _replace(text, r"\b0x7474\b", f"{redirection.tproxy_mark:#x}", marks)
    text = _replace(text, r"\b29812\b", f"{redirection.tproxy_mark}", tables)
    for address in redirection.addresses:
        old, new = ("ip to 127.0.0.1:", f"ip to {address}:")
        if address.version == 6:
            old, new = ("ip6 to [::1]:", f"ip6 to [{address}]:")
        text = _replace(text, re.escape(f" tproxy {old}"), f" tproxy {new}")
    return text


def _render_nft_tproxy(text: str, redirection: Redirection) -> str:
    text = _set_tproxy(text, redirection, marks=6, tables=9)
    if redirection.closed:
        text = _replace(text, r"^(\t\t)#(meta l4proto tcp reject with tcp reset|ct label set 116)$", r"\1\2", 2)
    return text


def render_guard(redirection: Redirection) -> str:
    """Text for guard.py: a permanent table that refuses connections that these rules select and that are not
    redirected.

    It filters after the redirection, and ignores packets that any rules have redirected or mapped. So it refuses
    nothing while the rules are in force. While they are missing, connections through transocks go on, since their
    address translation stays (for TPROXY, their mark).
    """
    name = redirection.guard
    text = _redefining(render_nft(attrs.evolve(redirection, name=name, closed=True)))
    # A table with an owner must be declared with its flags.
    text = _replace(text, rf"^table inet {name} .*\n(delete table .*)$", rf"table inet {name} {{ flags owner; }}\n\1")
    text = _replace(text, rf"^(table inet {name} \{{)$", r"\1\n\tflags owner")
    if redirection.udp:
        return _guard_udp(text, redirection)
    if redirection.mode is Mode.TPROXY:
        text = _replace(text, r"^\t\tmeta nfproto ipv[46] meta l4proto tcp tproxy .*\n", "", 2)
        own_chain = "\t}\n\n\tchain forward_tcp {\n\t\ttype filter hook forward priority -10; policy accept;\n\n"
        return _replace(text, r"^\t\t# Which traffic of the new ones: ", rf"{own_chain}\g<0>")
    text = _replace(text, r"^(\tchain exempt \{)$", r"\1\n\t\tct status dnat accept")
    text = _replace(text, r"^(\t\tmeta l4proto tcp) redirect to :\$transocks_port$", r"\1 reject with tcp reset")
    nat, filtering = ("prerouting", "forward") if redirection.mode is Mode.GATEWAY else ("output", "output")
    text = _replace(text, f"type nat hook {nat} priority -90", f"type filter hook {filtering} priority -10")
    translation = "\tchain stays {\n\t\ttype nat hook output priority -90; policy accept;\n\t}\n\n"
    return _replace(text, r"^\tchain exempt \{$", rf"{translation}\g<0>")


def _guard_udp(text: str, redirection: Redirection) -> str:
    """What is taken is not forwarded, or has been marked when it is filtered."""
    if redirection.mode is not Mode.HOST:
        text = _replace(text, r"^\t\tmeta nfproto ipv[46] meta l4proto udp tproxy .*\n", "", 2)
        return _replace(text, "type filter hook prerouting priority -150", "type filter hook forward priority -10")
    text = _replace(text, r"^(\tchain exempt \{)$", r"\1\n\t\tmeta mark $tproxy_mark accept")
    refused = r"\1meta l4proto udp reject with icmpx port-unreachable"
    text = _replace(text, r"^(\t\t)meta l4proto udp meta mark set \$tproxy_mark$", refused)
    text = _replace(text, "type route hook output priority -150", "type filter hook output priority -10")
    return _replace(text, r"^\tchain prerouting \{\n(?:\t\t.*\n)+\t\}\n", "")


def render_iptables(redirection: Redirection, *, version: int, until: str | None = None) -> str:
    """Text for iptables-restore, or ip6tables-restore for version 6: the files without their comments.

    until: the time when the rules end by themselves, in UTC as in "2026-01-31T23:59:59"; None: never.
    """
    mode, names = redirection.mode, _file_names(redirection)
    chain, chains = names.chain, names.chains if redirection.closed else names.chains[:2]
    chains = chains[:1] if redirection.udp else chains
    text = _template(f"{redirection.file}.v{version}")
    if redirection.closed and not redirection.udp:
        text = re.sub(rf"^#(?=#?-[NAI] .*\b{chain}-TCP\b|-A .* --set$)", "", text, flags=re.MULTILINE)
    if mode is Mode.HOST and redirection.exempt_users:
        for name in (chain, *chains[2:]):
            own = rf"^#-A {name} -m owner --uid-owner transocks -j RETURN\n#.*--uid-owner usocksd -j RETURN\n"
            lines = [f"-A {name} -m owner --uid-owner {user} -j RETURN\n" for user in redirection.exempt_users]
            text = _replace(text, own, "".join(lines))
    text = re.sub(r"^#.*\n|^\n", "", text, flags=re.MULTILINE)
    text = _replace(text, rf"(--to-ports|--on-port) {_PORTS[redirection.file]}\b", rf"\1 {redirection.port}")
    if redirection.mark is not None:
        text = _replace(text, r"-m mark --mark 0x7473 ", f"-m mark --mark {redirection.mark:#x} ", len(chains))
    if redirection.exclude is not None:
        networks = _of(redirection.exclude, version)
        for name in chains:
            lines = [f"-A {name} -d {network} -j RETURN\n" for network in networks]
            text = _replace(text, rf"^(?:-A {name} -d \S+ -j RETURN\n)+", "".join(lines))
    if redirection.by_tproxy:
        count = 3 if mode is Mode.HOST else 1 if redirection.udp else 2
        mark = rf"\1 {redirection.tproxy_mark:#x}"
        text = _replace(text, r"((?:--set-|--tproxy-|--)mark) 0x7474\b", mark, count)
        for address in [address for address in redirection.addresses if address.version == version]:
            text = _replace(text, r" --on-ip \S+ ", f" --on-ip {address} ")
    if until is not None:
        # After the rules for existing connections of transocks, before all others.
        first = f"-A {chain} -p tcp ! --syn -j RETURN" if mode is Mode.TPROXY and not redirection.udp else f"-N {chain}"
        for name, before in zip(chains, (first, *(f"-N {name}" for name in chains[1:])), strict=True):
            text = _replace(text, rf"^({before}\n)", rf"\1-A {name} -m time --datestart {until} -j RETURN\n")
    select = _select_udp if redirection.udp else _select_tcp
    text = select(text, redirection, version, list(_iptables_matches(redirection, version)))
    return re.sub(rf"\b{chain}\b", redirection.chain, text)


def _select_tcp(text: str, redirection: Redirection, version: int, matches: Sequence[str]) -> str:
    """Only packets that match one of these, in a file without comments."""
    chain = _file_names(redirection).chain
    text = _multiply(text, rf"^(-A {chain} -p tcp )(-j (?:REDIRECT|TPROXY) .*)$", matches)
    if redirection.closed:
        text = _multiply(text, rf"^(-A {chain}-TCP -p tcp )(-j REJECT .*)$", matches)
        if redirection.mode is Mode.TPROXY:
            text = _multiply(text, rf"^(-A {chain} -p tcp )(-m connlabel .*)$", matches)
    quic = list(_iptables_matches(attrs.evolve(redirection, ports=()), version)) if _refuses_quic(redirection) else []
    return _multiply(text, rf"^(-A {chain}-UDP -p udp )(-j REJECT .*)$", quic)


def _select_udp(text: str, redirection: Redirection, _version: int, matches: Sequence[str]) -> str:
    """The same for UDP; the ports are among the matches."""
    chain = _file_names(redirection).chain
    return _multiply(text, rf"^(-A {chain} -p udp )-m udp --dport 53 (-j (?:MARK|TPROXY) .*)$", matches)


def excluded(redirection: Redirection) -> list[str]:
    """The networks that these rules leave alone as destinations."""
    if redirection.exclude is not None:
        return list(map(str, redirection.exclude))
    text = "".join(_template(f"{redirection.file}.{kind}") for kind in ("v4", "v6"))
    return re.findall(rf"^-A {_file_names(redirection).chain} -d (\S+) -j", text, re.MULTILINE)


def _file_names(redirection: Redirection) -> Redirection:
    return Redirection(mode=redirection.mode, port=0, udp=redirection.udp)


def _refuses_quic(redirection: Redirection) -> bool:
    """Whether to refuse QUIC, so that browsers use TCP: if asked to, and if TCP port 443 is redirected."""
    ports = redirection.ports
    return redirection.reject_quic and (not ports or any(low <= 443 <= high for low, high in ports))


# ---- selection


def _families(redirection: Redirection) -> Iterator[tuple[int | None, list[IPNetwork], list[IPNetwork]]]:
    """IP version (None: both), sources and destinations, as far as there is anything in both."""
    if not redirection.from_ and not redirection.to:
        yield None, [], []
        return
    for version in (4, 6):
        sources, destinations = _of(redirection.from_, version), _of(redirection.to, version)
        if bool(sources) == bool(redirection.from_) and bool(destinations) == bool(redirection.to):
            yield version, sources, destinations


def _nft_matches(redirection: Redirection, protocol: str) -> Iterator[str]:
    """Matches, with a space after each."""
    who = [f"meta skuid {_nft_set(redirection.users)} "] if redirection.users else []
    who += [f"meta skgid {_nft_set(redirection.groups)} "] if redirection.groups else []
    who += [
        f'socket cgroupv2 level {path.count("/") + 1} "{os.path.normpath(f"{redirection.cgroups_at}/{path}")}" '
        for path in redirection.cgroups
    ]
    who += [f"meta cgroup {classid} " for classid in redirection.classids]
    names = [f'"{name}"' for name in redirection.interfaces]
    ports = [_range(low, high, "-") for low, high in merge_ranges(redirection.ports)]
    for someone, (version, sources, destinations) in product(who or [""], _families(redirection)):
        ip = "ip" if version == 4 else "ip6"
        also: dict[str, Sequence[object]] = {
            "iifname": names,
            f"{ip} saddr": sources,
            f"{ip} daddr": destinations,
            f"{protocol} dport": ports,
        }
        yield someone + "".join(f"{match} {_nft_set(values)} " for match, values in also.items() if values)


def _iptables_matches(redirection: Redirection, version: int) -> Iterator[str]:
    """The same."""
    who = [f"-m owner --uid-owner {user} " for user in redirection.users]
    who += [f"-m owner --gid-owner {group} " for group in redirection.groups]
    who += [f'-m cgroup --path "{path}" ' for path in redirection.cgroups]
    who += [f"-m cgroup --cgroup {classid} " for classid in redirection.classids]
    inside = [f"-i {name} " for name in redirection.interfaces]
    protocol = "udp" if redirection.udp else "tcp"
    where = [f"-m {protocol} --dport {_range(low, high, ':')} " for low, high in merge_ranges(redirection.ports)]
    for found, sources, destinations in _families(redirection):
        if found in (None, version):
            source = [f"-s {network} " for network in sources]
            destination = [f"-d {network} " for network in destinations]
            for words in product(*(words or [""] for words in (inside, source, destination, who, where))):
                yield "".join(words)


def merge_ranges(ports: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """The same ports as ranges that neither overlap nor touch, in order."""
    found: list[tuple[int, int]] = []
    for low, high in sorted(ports):
        if found and low <= found[-1][1] + 1:
            found[-1] = (found[-1][0], max(high, found[-1][1]))
        else:
            found.append((low, high))
    return found


def _range(low: int, high: int, between: str) -> str:
    return str(low) if low == high else f"{low}{between}{high}"


def _of(networks: Iterable[IPNetwork], version: int) -> list[IPNetwork]:
    """The networks of one IP version, without those inside another."""
    if version == 4:
        return list(collapse_addresses(n for n in networks if isinstance(n, IPv4Network)))
    return list(collapse_addresses(n for n in networks if isinstance(n, IPv6Network)))


def _nft_set(elements: Iterable[object]) -> str:
    return f"{{ {', '.join(map(str, elements))} }}"


# ---- substitution


def _multiply(text: str, pattern: str, matches: Sequence[str]) -> str:
    """Repeat the one line with this start and end for each of the matches, which go in between."""
    found = re.search(pattern, text, re.MULTILINE)
    lines = [f"{found[1]}{match}{found[2]}\n" for match in matches] if found is not None else []
    return _replace(text, pattern.removesuffix("$") + r"\n", "".join(lines).replace("\\", r"\\"))


def _replace(text: str, pattern: str, replacement: str, count: int = 1) -> str:
    """Strict re.sub: rules that were not narrowed as asked must not be loaded."""
    text, found = re.subn(pattern, replacement, text, flags=re.MULTILINE)
    if found != count:
        raise AssertionError(f"the rule files have changed: {pattern} matches {found} times, not {count}")
    return text


def _template(file: str) -> str:
    installed = Path(__file__).parent / "templates"  # in a wheel; a checkout has them where operators look
    folder = installed if installed.is_dir() else Path(__file__).parents[2] / "iptables"
    return (folder / file).read_text(encoding="utf-8")
