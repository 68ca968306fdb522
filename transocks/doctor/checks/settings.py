"""Kernel settings that make themselves felt under load, or at the next start."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from ipaddress import ip_address

from transocks.doctor.finding import Finding, fault, fine, unchecked, warning
from transocks.doctor.seen import Seen
from transocks.doctor.tried import Trials
from transocks.doctor.upstreams import proxies
from usocksd.net.address import IPAddress

_TIME_WAIT = "06"  # include/net/tcp_states.h
_CLIENT, _SERVER = 1, 2  # bits of tcp_fastopen
_FEW_PORTS = 10_000


def ports_in_time_wait(seen: Seen, trials: Trials) -> Iterator[Finding]:
    """Local ports towards one upstream are few; one in TIME_WAIT is free again sooner with tcp_tw_reuse=1."""
    low, high = _port_range(seen)
    reuse, ports = seen.number("net.ipv4.tcp_tw_reuse"), high - low + 1
    address, count = _most_waiting(seen)
    text = f"tcp_tw_reuse={reuse}; {count} of {ports} ports wait in TIME_WAIT towards {address or 'an upstream'}"
    reused = reuse == 1 or (reuse == 2 and address is not None and address.is_loopback)
    if count > ports * 0.9 and not reused:
        yield fault("tcp_tw_reuse", text, "sysctl net.ipv4.tcp_tw_reuse=1")
    elif count > ports * 0.5 and not reused:
        yield warning("tcp_tw_reuse", text, "sysctl net.ipv4.tcp_tw_reuse=1")
    else:
        yield fine("tcp_tw_reuse", text)


def _most_waiting(seen: Seen) -> tuple[IPAddress | None, int]:
    """Of the addresses behind ports of upstreams the one with the most sockets in TIME_WAIT."""
    ports = {f"{proxy.port:04X}" for proxy in proxies(seen.config)}
    counts: Counter[str] = Counter()
    for table in ("net/tcp", "net/tcp6"):
        for line in (seen.read(table) or "").splitlines()[1:]:
            _, _, remote, state = line.split()[:4]
            host, _, port = remote.partition(":")
            if state == _TIME_WAIT and port in ports:
                counts[host] += 1
    if not counts:
        return None, 0
    host, count = counts.most_common(1)[0]
    # Words of 32 bits, each in the order of this machine.
    words = [int(host[i : i + 8], 16).to_bytes(4, sys.byteorder) for i in range(0, len(host), 8)]
    return ip_address(b"".join(words)), count


def port_range(seen: Seen, trials: Trials) -> Iterator[Finding]:
    """A connection that leaves by the port of a listener keeps it from being opened."""
    low, high = _port_range(seen)
    reserved = _ranges(seen.sysctl("net.ipv4.ip_local_reserved_ports") or "")
    text = f"ip_local_port_range={low}-{high}"
    taken = sorted({
        listen.port for _, listen in seen.config.common().listen
        if low <= listen.port <= high and not any(first <= listen.port <= last for first, last in reserved)
    })  # fmt: skip
    if taken:
        ports = ",".join(map(str, taken))
        yield warning(
            "port range", f"{text} has the listen port {ports}: an outgoing connection may take it before the start",
            f"sysctl net.ipv4.ip_local_reserved_ports={ports}",
        )  # fmt: skip
    elif high - low < _FEW_PORTS:
        yield warning(
            "port range", f"{text}: so many connections to one upstream, and no more",
            "sysctl net.ipv4.ip_local_port_range='32768 60999'",
        )  # fmt: skip
    else:
        yield fine("port range", text)


def _port_range(seen: Seen) -> tuple[int, int]:
    low, high = (seen.sysctl("net.ipv4.ip_local_port_range") or "32768 60999").split()
    return int(low), int(high)


def _ranges(text: str) -> list[tuple[int, int]]:
    pairs = (part.partition("-") for part in text.split(",") if part)
    return [(int(low), int(high or low)) for low, _, high in pairs]


def fast_open(seen: Seen, trials: Trials) -> Iterator[Finding]:
    """With it the first bytes to an upstream go along with the SYN: a round trip less."""
    bits = seen.number("net.ipv4.tcp_fastopen")
    if bits is None:
        yield unchecked("tcp_fastopen", "this kernel has no TCP Fast Open")
    elif not bits & _CLIENT:
        yield warning(
            "tcp_fastopen", f"tcp_fastopen={bits}: connections to the upstream take a round trip more",
            "sysctl net.ipv4.tcp_fastopen=1 here, and 3 where usocksd runs",
        )  # fmt: skip
    else:
        server = "" if bits & _SERVER else "; usocksd, where it runs, needs 2 as well"
        yield fine("tcp_fastopen", f"tcp_fastopen={bits}{server}")


def nonlocal_bind(seen: Seen, trials: Trials) -> Iterator[Finding]:
    """With it bind(2) succeeds on addresses that this host does not have: mistakes show late, or never."""
    found = [name for name in ("net.ipv4.ip_nonlocal_bind", "net.ipv6.ip_nonlocal_bind") if seen.number(name) == 1]
    if found:
        yield warning(
            "ip_nonlocal_bind",
            f"{', '.join(found)}=1: listening on, or leaving from, an address that is not here seems to work",
            "set it to 0 unless something else needs it (keepalived, say); TPROXY does not",
        )  # fmt: skip
    else:
        yield fine("ip_nonlocal_bind", "0: only addresses of this host can be bound")
