"""First packets of connections, sent by this host or received by it, and what the kernel did with them.

Nobody else sees them: packets that would leave this host are dropped at the last moment, and so is the last segment of
a handshake, so no listener gets a connection.
"""

from __future__ import annotations

import contextlib
import os
import random
import select
import socket
import struct
import time
from collections.abc import Iterator
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network

import attrs

from transocks.rules.config import Mode
from transocks.rules.redirection import Redirection
from transocks.rules.render import excluded
from transocks.rules.routing import lookup
from transocks.tools import FirewallError
from transocks.tracing.events import ACK, RST, SYN, Packet
from transocks.tracing.frames import datagram, frame
from transocks.tracing.inject import inject
from transocks.tracing.links import Links, hardware_address
from transocks.tracing.sockets import NOBODY, Identity, socket_of
from transocks.tracing.table import Tracer
from transocks.tracing.way import Way, way_of
from usocksd.net.address import IPAddress, socket_address

EXAMPLES: dict[int, tuple[IPAddress, ...]] = {
    4: (IPv4Address("203.0.113.1"), IPv4Address("192.0.2.1"), IPv4Address("198.51.100.250")),
    6: (IPv6Address("2001:db8:ffff::1"), IPv6Address("3fff::1")),
}
"""Addresses of the documentation ranges, which rules like ours take for the Internet."""
PORTS = (443, 80)
TCP, UDP = 6, 17
_DNS_PORTS = {53, 853}
_MOST = 4  # examples for each mode and family
_PATIENCE, _STEP = 0.5, 0.01  # seconds until the kernel has done what it does, and how often is looked
_LINGER = struct.pack("ii", 1, 0)
_HIGH_PORTS = (61_000, 65_500)  # seldom in use
_IPPROTO_RAW = 255
_IPV6_HDRINCL = 36


@attrs.frozen(kw_only=True)
class Sample:
    """A connection that rules are for."""

    mode: Mode
    destination: IPAddress
    port: int
    who: Identity = NOBODY
    """who on this host opens it"""
    source: IPAddress | None = None
    iif: str | None = None
    """where it comes in, if it does"""
    device: str | None = None
    """where that is made to come in: of a bridge, a port"""

    @property
    def version(self) -> int:
        return self.destination.version


@attrs.frozen(kw_only=True)
class Outcome:
    """What became of it."""

    sample: Sample
    way: Way | None = None
    """of the first segment; None: it was not sent, or nothing was told of it"""
    back: Way | None = None
    """of the answer"""
    answered: bool = False
    """whoever has got it accepts"""
    problem: OSError | FirewallError | None = None
    """why it was not sent, or what came back"""

    @property
    def why(self) -> str | None:
        """The problem in words."""
        if isinstance(self.problem, OSError) and self.problem.strerror:
            return self.problem.strerror
        return None if self.problem is None else str(self.problem)


def send(tracer: Tracer, sample: Sample, *, keep: bool = True, patience: float = _PATIENCE) -> Outcome:
    """A connection of this host."""
    way = back = None
    problem: OSError | FirewallError | None = None
    answered = False
    try:
        with socket_of(sample.who, _family(sample.destination)) as sock:
            sock.setblocking(False)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER)
            sock.bind((_anywhere(sample.source, sample.version), 0))
            port = sock.getsockname()[1]
            with tracer.watching(TCP, port, keep=keep):
                try:
                    with contextlib.suppress(BlockingIOError):
                        sock.connect(socket_address(str(sample.destination), sample.port))
                    answered = _wait(tracer, sock, port, patience, keep)
                except OSError as error:
                    problem = error
                events = tracer.events(TCP, port)
                way, back = way_of(events, port), way_of(events, port, back=True)
                sock.close()
    except (OSError, FirewallError) as error:
        problem = error
    return Outcome(sample=sample, way=way, back=back, answered=answered, problem=problem)


def _wait(tracer: Tracer, sock: socket.socket, port: int, patience: float, keep: bool) -> bool:
    """Until it is connected, or will not be. Raises OSError."""
    deadline = time.monotonic() + patience
    while time.monotonic() < deadline:
        if select.select([], [sock], [], _STEP)[1]:
            if code := sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
                raise OSError(code, os.strerror(code))
            return True
        way = way_of(tracer.events(TCP, port), port)
        if way is not None and (way.dropped is not None or (way.left and keep)):
            return False
    return False


def send_datagram(
    tracer: Tracer, sample: Sample, payload: bytes = b"\0", *, keep: bool = True, answer: float = 0.0
) -> Outcome:
    """A datagram of UDP; `answer`: how long, in seconds, one is waited for."""
    way = None
    problem: OSError | FirewallError | None = None
    answered = False
    try:
        with socket_of(sample.who, _family(sample.destination), socket.SOCK_DGRAM) as sock:
            sock.bind((_anywhere(None, sample.version), 0))
            port = sock.getsockname()[1]
            with tracer.watching(UDP, port, keep=keep):
                try:
                    sock.connect((str(sample.destination), sample.port))
                    sock.settimeout(answer or _STEP)
                    with contextlib.suppress(PermissionError):  # what is dropped is told to who sends it
                        sock.send(payload)
                    if answer:
                        answered = bool(sock.recv(4096))
                except TimeoutError:
                    answered = False
                except OSError as error:
                    problem = error
                way = way_of(tracer.events(UDP, port), port)
    except (OSError, FirewallError) as error:
        problem = error
    return Outcome(sample=sample, way=way, answered=answered, problem=problem)


def receive(tracer: Tracer, sample: Sample, *, flags: int = SYN, protocol: int = TCP) -> Outcome:
    """A segment of TCP, or an empty datagram of UDP, that comes in from a client, without one.

    Raises OSError where the kernel can't do that.
    """
    assert sample.iif is not None
    assert sample.source is not None
    port = random.randint(*_HIGH_PORTS)
    packet = Packet(protocol, sample.source, port, sample.destination, sample.port, flags if protocol == TCP else 0)
    device, address = sample.device or sample.iif, hardware_address(sample.iif)
    with tracer.watching(protocol, port, keep=True):
        inject(device, frame(packet, address))
        way = back = None
        deadline = time.monotonic() + _PATIENCE
        while time.monotonic() < deadline:
            events = tracer.events(protocol, port)
            way, back = way_of(events, port), way_of(events, port, back=True)
            if way is not None and (back is not None or way.dropped is not None or way.left):
                break
            time.sleep(_STEP)
        answered = back is not None and back.packet.flags & (SYN | ACK | RST) == SYN | ACK
        if answered:  # so that nobody waits for the rest
            inject(device, frame(attrs.evolve(packet, flags=RST), address))
    return Outcome(sample=sample, way=way, back=back, answered=answered)


def send_middle(tracer: Tracer, sample: Sample) -> Outcome:
    """A segment from the middle of a connection of this host of which nobody knows. Raises OSError."""
    family = _family(sample.destination)
    with socket.socket(family, socket.SOCK_DGRAM) as asked:
        asked.connect((str(sample.destination), sample.port))
        source = ip_address(asked.getsockname()[0])
    port = random.randint(*_HIGH_PORTS)
    with socket_of(
        sample.who if os.geteuid() else attrs.evolve(sample.who, uid=None), family, socket.SOCK_RAW, _IPPROTO_RAW
    ) as sock:
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, _IPV6_HDRINCL, 1)
        packet = Packet(TCP, source, port, sample.destination, sample.port, ACK)
        with tracer.watching(TCP, port, keep=True):
            with contextlib.suppress(PermissionError):
                sock.sendto(datagram(packet), (str(sample.destination), 0))
            way = way_of(tracer.events(TCP, port), port)
    return Outcome(sample=sample, way=way)


def try_out(tracer: Tracer, sample: Sample, *, flags: int = SYN, protocol: int = TCP) -> Outcome:
    """Sent or received, whichever it is: the first segment, one from the middle (ACK), or a datagram."""
    try:
        if sample.iif is not None:
            return receive(tracer, sample, flags=flags, protocol=protocol)
        if protocol == UDP:
            return send_datagram(tracer, sample)
        return send(tracer, sample) if flags == SYN else send_middle(tracer, sample)
    except OSError as error:
        return Outcome(sample=sample, problem=error)


def samples(wanted: Redirection, here: Links, versions: tuple[int, ...] = (4, 6)) -> list[Sample]:
    """What the rules of one mode are for: some of it."""
    return [
        sample
        for version in versions
        for sample in (_of_host if wanted.mode is Mode.HOST else _of_clients)(wanted, here, version)
    ]


def _of_host(wanted: Redirection, here: Links, version: int) -> Iterator[Sample]:
    chosen = wanted.selection_here
    people = [
        *(attrs.evolve(NOBODY, uid=user) for user in chosen.users[:_MOST]),
        *(attrs.evolve(NOBODY, gid=group) for group in chosen.groups[:_MOST]),
        *(attrs.evolve(NOBODY, cgroup=cgroup) for cgroup in chosen.cgroups[:_MOST]),
    ] or [NOBODY]
    for who in people:
        for port in _ports(wanted):
            for destination in _destinations(wanted, here, version):
                yield Sample(mode=wanted.mode, destination=destination, port=port, who=who)


def _of_clients(wanted: Redirection, here: Links, version: int) -> Iterator[Sample]:
    for iif, source in _clients(wanted, here, version)[:_MOST]:
        for port in _ports(wanted):
            for destination in _destinations(wanted, here, version):
                yield Sample(
                    mode=wanted.mode, destination=destination, port=port, source=source, iif=iif, device=here.port(iif)
                )


def _clients(wanted: Redirection, here: Links, version: int) -> list[tuple[str, IPAddress]]:
    """Interfaces and addresses behind them, one for each."""
    chosen = wanted.selection_here
    sources = [network for network in chosen.from_ if network.version == version]
    if chosen.from_:
        found = []
        for address in map(_inside, sources):
            link = here.of(address)
            with contextlib.suppress(OSError):
                found.append((link.name if link is not None else lookup(address).device, address))
        return [(iif, address) for iif, address in found if not chosen.interfaces or iif in chosen.interfaces]
    names = chosen.interfaces or tuple(
        link.name for link in here.links if link.name not in here.uplinks.values() or len(here.links) == 1
    )
    return [
        (link.name, _inside(network))
        for link in here.links
        if link.name in names
        for network in [
            n for n in link.networks if n.version == version and not n.is_link_local and n.num_addresses > 2
        ][:1]
    ]


def _inside(network: IPv4Network | IPv6Network) -> IPAddress:
    """An address in it, which is neither the first nor the last few."""
    return network[network.num_addresses * 3 // 4 - (1 if network.num_addresses > 4 else 0)]


def _ports(wanted: Redirection) -> tuple[int, ...]:
    chosen = wanted.selection.ports
    if not chosen:
        return PORTS
    found = (port for low, high in chosen for port in range(low, min(high, low + 3) + 1) if port not in _DNS_PORTS)
    return tuple(found)[:2]


def _destinations(wanted: Redirection, here: Links, version: int) -> tuple[IPAddress, ...]:
    """One that the rules are for, if there is one."""
    without = [ip_network(network) for network in excluded(wanted)]
    candidates = (
        [_inside(n) for n in wanted.selection.to if n.version == version] if wanted.selection.to else EXAMPLES[version]
    )
    return tuple(
        address
        for address in candidates
        if here.of(address) is None and not any(address in network for network in without)
    )[: 2 if wanted.selection.to else 1]


def _family(address: IPAddress) -> int:
    return socket.AF_INET if address.version == 4 else socket.AF_INET6


def _anywhere(source: IPAddress | None, version: int) -> str:
    if source is not None:
        return str(source)
    return "0.0.0.0" if version == 4 else "::"
