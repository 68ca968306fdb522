"""Kernel limits and settings that cause faults only under load or after a restart, and the tools that load rules."""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Iterator
from ipaddress import ip_address

from transocks.doctor.finding import Finding, fault, fine, unchecked, warning
from transocks.doctor.host import Host
from transocks.rules import live
from transocks.rules.config import Mode
from transocks.tools import FirewallError, which
from usocksd.net.address import IPAddress
from usocksd.net.keepalive import CONNTRACK_TIMERS, tcp_timers

_TABLE_FULL, _TABLE_FILLING = 0.95, 0.75
_TIMERS = ("established", "fin_wait", "close_wait")
_SHORT = 10  # seconds
_FEW_FILES, _FILES_FULL = 4096, 0.9
_FEW_PORTS = 10_000
_TIME_WAIT = "06"  # include/net/tcp_states.h
_CLIENT, _SERVER = 1, 2  # bits of tcp_fastopen


def conntrack(host: Host) -> Iterator[Finding]:
    """How full the table is, and whether it dropped anything while this looked: REDIRECT needs an entry to know an
    original destination.
    """
    count, most = host.number("net.netfilter.nf_conntrack_count"), host.number("net.netfilter.nf_conntrack_max")
    if count is None or most is None:
        return  # nothing is tracked, and so nothing redirected: see `rules`
    # 0 is no limit.
    share = count / most if most else 0.0
    text = f"{count} of {most} entries ({share:.0%})" if most else f"{count} entries, no limit"
    do = f"sysctl net.netfilter.nf_conntrack_max={max(2 * most, 4 * count)} (of the host: containers can't set it)"
    # Even with an empty table, two packets of one new connection may race for its entry, and the kernel counts a drop.
    if share >= _TABLE_FULL or (share >= _TABLE_FILLING and host.since("drop")):
        yield fault("conntrack", f"{text}: the table is full, new connections are dropped", do)
    elif share >= _TABLE_FILLING or host.since("early_drop"):
        yield warning("conntrack", f"{text}: the table fills up", do)
    else:
        yield fine("conntrack", text)


def conntrack_timers(host: Host) -> Iterator[Finding]:
    """With timers of a few seconds, connection tracking forgets connections in use; keepalive is not that fast."""
    if not any(fate.redirection.mode in {Mode.HOST, Mode.GATEWAY} for fate in host.fates):
        return
    found = tcp_timers(_TIMERS, host.proc / "sys/net/netfilter")
    prefix = "net.netfilter.nf_conntrack_tcp_timeout_"
    short = {name: seconds for name, seconds in found.items() if seconds < _SHORT}
    if short:
        told = ", ".join(f"{prefix}{name}={seconds}" for name, seconds in short.items())
        do = "sysctl " + " ".join(f"{prefix}{name}={CONNTRACK_TIMERS[name]}" for name in short)
        yield fault("conntrack timers", f"redirected connections that are silent for seconds are forgotten: {told}", do)
    elif found:
        yield fine("conntrack timers", ", ".join(f"{name} {seconds} s" for name, seconds in found.items()))


def tools(host: Host) -> Iterator[Finding]:
    """Which tool loads rules here, and whether both kinds of iptables have rules."""
    names = ["nft"] if which("nft") else []
    if path := which("iptables"):
        name = os.path.basename(os.path.realpath(path))
        names.append(f"iptables ({'nft' if 'nft' in name else 'legacy' if 'legacy' in name else path})")
    if not names:
        yield fault("tools", "neither nft nor iptables is installed", "install nftables")
    elif host.tracer is not None and _hides_legacy():
        yield warning(
            "tools", f"{', '.join(names)}; and there are rules of iptables-legacy too, which iptables does not show",
            "look at iptables-legacy-save, and move what is needed from there to one of the two",
        )  # fmt: skip
    else:
        yield fine("tools", ", ".join(names))


def _hides_legacy() -> bool:
    """Whether iptables-legacy has rules while `iptables` is another variant. Its tables stay, empty, until the next
    boot.
    """
    beside = ((version, each) for version in (4, 6) for each in live.variants(version) if each.endswith("-legacy"))
    try:
        return any(table.rules for version, each in beside for table in live.saved(version, each))
    except FirewallError:
        return False


def descriptors(host: Host) -> Iterator[Finding]:
    """How many files the running daemon may have open, two for each connection, and how close its workers are to it."""
    if host.status is None:
        yield unchecked("descriptors", "the daemon does not tell, on its control socket", "run it as root, or its user")
        return
    files = [worker["descriptors"] for generation in host.status["generations"] for worker in generation["workers"]]
    if not files:
        yield unchecked("descriptors", "the daemon has no workers")
        return
    there, limit = max(((one["open"], one["limit"]) for one in files), key=lambda one: one[0] / max(one[1], 1))
    text = f"{limit} files for each process, {there} open: {limit // 2} connections at most"
    if there > _FILES_FULL * limit:
        do = "raise LimitNOFILE= of the unit, or find out what opens the connections (transocks connections)"
        yield fault("descriptors", f"a worker has {there} of {limit} files open", do)
    elif limit < _FEW_FILES:
        yield warning("descriptors", text, "raise LimitNOFILE= of the unit (1048576 in ours)")
    else:
        yield fine("descriptors", text)


def ports_in_time_wait(host: Host) -> Iterator[Finding]:
    """Whether local ports towards an upstream run out; with tcp_tw_reuse=1 those in TIME_WAIT are free sooner."""
    low, high = _port_range(host)
    reuse, ports = host.number("net.ipv4.tcp_tw_reuse"), high - low + 1
    address, count = _most_waiting(host)
    text = f"tcp_tw_reuse={reuse}; {count} of {ports} ports wait in TIME_WAIT towards {address or 'an upstream'}"
    reused = reuse == 1 or (reuse == 2 and address is not None and address.is_loopback)
    if count > ports * 0.5 and not reused:
        say = fault if count > ports * 0.9 else warning
        yield say("tcp_tw_reuse", text, "sysctl net.ipv4.tcp_tw_reuse=1")
    else:
        yield fine("tcp_tw_reuse", text)


def _most_waiting(host: Host) -> tuple[IPAddress | None, int]:
    """The address of an upstream with the most sockets in TIME_WAIT, and their number."""
    ports = {f"{proxy.port:04X}" for proxy in host.proxies}
    counts: Counter[str] = Counter()
    for table in ("net/tcp", "net/tcp6"):
        for line in (host.read(table) or "").splitlines()[1:]:
            _, _, remote, state = line.split()[:4]
            address, _, port = remote.partition(":")
            if state == _TIME_WAIT and port in ports:
                counts[address] += 1
    for text, count in counts.most_common(1):
        # Words of 32 bits, each in the order of this machine.
        words = [int(text[i : i + 8], 16).to_bytes(4, sys.byteorder) for i in range(0, len(text), 8)]
        return ip_address(b"".join(words)), count
    return None, 0


def port_range(host: Host) -> Iterator[Finding]:
    """A listener can't be opened while an outgoing connection has its port."""
    low, high = _port_range(host)
    reserved: set[int] = set()
    for part in (host.sysctl("net.ipv4.ip_local_reserved_ports") or "").split(","):
        first, _, last = part.partition("-")
        reserved.update(range(int(first), int(last or first) + 1) if first else ())
    text = f"ip_local_port_range={low}-{high}"
    taken = sorted({listen.port for _, listen in host.config.listen_keys if low <= listen.port <= high} - reserved)
    if taken:
        ports = ",".join(map(str, taken))
        yield warning(
            "port range", f"{text} has the listen port {ports}: an outgoing connection may take it before the start",
            f"sysctl net.ipv4.ip_local_reserved_ports={ports}",
        )  # fmt: skip
    elif high - low < _FEW_PORTS:
        do = "sysctl net.ipv4.ip_local_port_range='32768 60999'"
        yield warning("port range", f"{text}: no more connections than that to one upstream", do)
    else:
        yield fine("port range", text)


def _port_range(host: Host) -> tuple[int, int]:
    low, high = (host.sysctl("net.ipv4.ip_local_port_range") or "32768 60999").split()
    return int(low), int(high)


def fast_open(host: Host) -> Iterator[Finding]:
    """With TCP Fast Open, the first bytes go to an upstream with the SYN, which saves a round trip."""
    bits = host.number("net.ipv4.tcp_fastopen")
    if bits is None:
        yield unchecked("tcp_fastopen", "this kernel has no TCP Fast Open")
    elif not bits & _CLIENT:
        do = "sysctl net.ipv4.tcp_fastopen=1 here, and 3 where usocksd runs"
        yield warning("tcp_fastopen", f"tcp_fastopen={bits}: connections to the upstream take a round trip more", do)
    else:
        server = "" if bits & _SERVER else "; usocksd, where it runs, needs 2 as well"
        yield fine("tcp_fastopen", f"tcp_fastopen={bits}{server}")


def nonlocal_bind(host: Host) -> Iterator[Finding]:
    """With ip_nonlocal_bind=1, bind(2) succeeds on addresses that this host does not have, which hides mistakes."""
    found = [name for name in ("net.ipv4.ip_nonlocal_bind", "net.ipv6.ip_nonlocal_bind") if host.number(name) == 1]
    if found:
        yield warning(
            "ip_nonlocal_bind",
            f"{', '.join(found)}=1: listening on, or leaving from, an address that is not here seems to work",
            "set it to 0 unless something else needs it (keepalived, say); TPROXY does not",
        )  # fmt: skip
    else:
        yield fine("ip_nonlocal_bind", "0: only addresses of this host can be bound")
