"""First packets of connections, and datagrams, sent by this host or received by it, and what the kernel did with them.

Nobody else sees them. Packets that would leave this host are dropped at the last moment. They are raw, so this host's
TCP does not know them and resets a listener's answer: no listener gets a connection.
"""

from __future__ import annotations

import contextlib
import errno
import socket
from collections.abc import Callable, Iterator
from functools import partial
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network

import attrs

from transocks.rules.config import Mode
from transocks.rules.loops import Sender
from transocks.rules.redirection import Redirection
from transocks.rules.render import excluded
from transocks.tools import FirewallError
from transocks.tracing.links import Links, lookup
from transocks.tracing.packets import datagram, inject
from transocks.tracing.reports import ACK, RST, SYN, TCP, UDP, Packet
from transocks.tracing.sockets import FAMILIES, NOBODY, socket_of
from transocks.tracing.trace import Trace
from transocks.tracing.tracer import Tracer
from usocksd.net.address import IPAddress, IPNetwork, socket_address

EXAMPLES: dict[int, tuple[IPAddress, ...]] = {
    4: (IPv4Address("203.0.113.1"), IPv4Address("192.0.2.1"), IPv4Address("198.51.100.250")),
    6: (IPv6Address("2001:db8:ffff::1"), IPv6Address("3fff::1")),
}
"""Addresses of the documentation ranges, which rules like ours take for the Internet."""
_PORTS = (443, 80)
_DNS_PORTS = {53, 853}
_MOST = 4  # how many users, groups, cgroups and clients are tried, each
_NO_ROUTE = {errno.ENETUNREACH, errno.EHOSTUNREACH, errno.EACCES, errno.EINVAL, errno.EADDRNOTAVAIL}
_IPPROTO_RAW, _IPV6_HDRINCL = 255, 36


@attrs.frozen(kw_only=True)
class Sample:
    """A connection that could be opened on this host, or come in; or a datagram of UDP."""

    destination: IPAddress
    port: int
    protocol: int = TCP
    who: Sender = NOBODY
    """who on this host opens it"""
    source: IPAddress | None = None
    iif: str | None = None
    """where it comes in, if it does"""
    device: str | None = None
    """the same, or if that is a bridge, a port of it"""

    @property
    def version(self) -> int:
        """The IP version."""
        return self.destination.version


@attrs.frozen(kw_only=True)
class Result:
    """The result of a sample."""

    sample: Sample
    trace: Trace | None = None
    """None: it was not sent, or not reported"""
    back: Trace | None = None
    """of the answer"""
    problem: OSError | FirewallError | None = None
    """why it was not sent"""

    @property
    def answered(self) -> bool:
        """A listener accepts it, and its answer gets back."""
        back = self.back
        accepts = back is not None and back.packet.flags & (SYN | ACK | RST) == SYN | ACK
        return accepts and back is not None and (back.delivered or back.left)

    @property
    def is_explained(self) -> bool:
        """It is known where the packet ended, and where its answer did if it got to a listener."""
        expected = [self.trace]
        if self.trace is not None and self.trace.delivered and self.trace.packet.protocol == TCP:
            expected.append(self.back)
        return all(trace is not None and trace.ended for trace in expected)

    @property
    def no_route(self) -> bool:
        """It was not sent, since there is no route."""
        return isinstance(self.problem, OSError) and self.problem.errno in _NO_ROUTE

    @property
    def why(self) -> str:
        """The problem in words; "" without."""
        return (isinstance(self.problem, OSError) and self.problem.strerror) or str(self.problem or "")


def try_out(tracer: Tracer, sample: Sample, *, flags: int = SYN) -> Result:
    """Try a first segment, one from the middle of a connection (ACK), or an empty datagram.

    A packet that no rule stopped is sent once more, from another port, and only the second loss counts: connection
    tracking drops one of two packets that want the same entry.
    """
    result = _try_once(tracer, sample, flags)
    return result if result.problem is not None or result.is_explained else _try_once(tracer, sample, flags)


def _try_once(tracer: Tracer, sample: Sample, flags: int) -> Result:
    protocol = sample.protocol
    try:
        with _emitter(sample) as (source, emit), _free_port(sample.version, protocol) as port:
            packet = Packet(protocol, source, port, sample.destination, sample.port, flags if protocol == TCP else 0)
            with tracer.watching(protocol, port, keep=True):
                tracer.emit(lambda: emit(packet))
                back = tracer.trace(protocol, port, back=True)
                result = Result(sample=sample, trace=tracer.trace(protocol, port), back=back)
                if result.answered:  # so that nobody waits for the rest
                    emit(attrs.evolve(packet, flags=RST))
            return result
    except (OSError, FirewallError) as error:
        return Result(sample=sample, problem=error)


@contextlib.contextmanager
def _emitter(sample: Sample) -> Iterator[tuple[IPAddress, Callable[[Packet], None]]]:
    """The source address, and a function that sends a packet."""
    if sample.iif is not None:
        assert sample.source is not None
        device, iif = sample.device or sample.iif, sample.iif
        yield sample.source, lambda packet: inject(device, packet, iif)
        return
    there = socket_address(str(sample.destination), sample.port)
    with socket_of(sample.who, sample.version, socket.SOCK_DGRAM) as sock:
        sock.connect(there)  # sends nothing, and fails without a route
        source = ip_address(sock.getsockname()[0])
    with socket_of(sample.who, sample.version, socket.SOCK_RAW, _IPPROTO_RAW) as raw:
        if sample.version == 6:
            raw.setsockopt(socket.IPPROTO_IPV6, _IPV6_HDRINCL, 1)

        def emit(packet: Packet) -> None:
            with contextlib.suppress(PermissionError):  # a rule dropped it, and the kernel tells the sender
                raw.sendto(datagram(packet), (there[0], 0, *there[2:]))

        yield source, emit


@contextlib.contextmanager
def _free_port(version: int, protocol: int) -> Iterator[int]:
    """A port that no connection of this host has meanwhile."""
    kind = socket.SOCK_STREAM if protocol == TCP else socket.SOCK_DGRAM
    with socket.socket(FAMILIES[version], kind) as sock:
        sock.bind(("", 0))
        yield sock.getsockname()[1]


def samples(redirection: Redirection, here: Links, versions: tuple[int, ...]) -> Iterator[Sample]:
    """Some of the connections, or datagrams, that the rules of one mode are for."""
    protocol = UDP if redirection.udp else TCP
    users = [
        *(attrs.evolve(NOBODY, uid=user) for user in redirection.users[:_MOST]),
        *(attrs.evolve(NOBODY, gid=group) for group in redirection.groups[:_MOST]),
        *(attrs.evolve(NOBODY, cgroup=cgroup) for cgroup in redirection.cgroups[:_MOST]),
    ]
    for version in versions:
        if redirection.mode is Mode.HOST:
            origins = [partial(Sample, who=who) for who in users or [NOBODY]]
        else:
            clients = _clients(redirection, here, version)[:_MOST]
            origins = [partial(Sample, source=source, iif=iif, device=here.port(iif)) for iif, source in clients]
        for origin in origins:
            for port in _ports(redirection):
                for destination in _destinations(redirection, here, version):
                    yield origin(destination=destination, port=port, protocol=protocol)


def _clients(redirection: Redirection, here: Links, version: int) -> list[tuple[str, IPAddress]]:
    """Interfaces and addresses behind them, one for each."""
    if redirection.from_:
        found = []
        for address in (_inside(network) for network in redirection.from_ if network.version == version):
            with contextlib.suppress(FirewallError):
                found.append((here.of(address) or lookup(address)[0], address))
        return [(iif, address) for iif, address in found if not redirection.interfaces or iif in redirection.interfaces]
    inside = [name for name in here.networks if name not in here.uplinks.values() or len(here.networks) == 1]
    networks = {
        name: [network for network in here.networks[name] if network.version == version and network.num_addresses > 2]
        for name in redirection.interfaces or inside
        if name in here.networks
    }
    return [(name, _inside(there[0])) for name, there in networks.items() if there]


def _inside(network: IPNetwork) -> IPAddress:
    """An address in it, which is neither the first nor the last few."""
    return network[network.num_addresses * 3 // 4 - (1 if network.num_addresses > 4 else 0)]


def _ports(redirection: Redirection) -> tuple[int, ...]:
    ranges, without = redirection.ports, () if redirection.udp else _DNS_PORTS
    found = (port for low, high in ranges for port in range(low, min(high, low + 3) + 1) if port not in without)
    return tuple(found)[:2] if ranges else _PORTS


def _destinations(redirection: Redirection, here: Links, version: int) -> list[IPAddress]:
    """One that the rules are for, if there is one."""
    to = redirection.to
    candidates = [_inside(network) for network in to if network.version == version] if to else EXAMPLES[version]
    without = [ip_network(network) for network in excluded(redirection)]
    found = [
        address
        for address in candidates
        if here.of(address) is None and not any(address in network for network in without)
    ]
    return found[: 2 if to else 1]
