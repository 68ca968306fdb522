"""The sockets of a UDP association, and its destinations: what each datagram goes through. See association.py."""

from __future__ import annotations

import errno
from math import inf
from socket import SocketType
from typing import TYPE_CHECKING, Final

from usocksd.decision import Decision
from usocksd.egress import Source
from usocksd.errors import DialError
from usocksd.net.address import join_port
from usocksd.net.datagrams import DatagramSocket, open_socket, source_towards

if TYPE_CHECKING:
    from usocksd.association import ClientAssociation

# A reply is received behind room for the longest header that it may get, that of an IPv6 address.
_ROOM: Final = 22
_PORTS_TAKEN = (errno.EADDRINUSE, errno.EADDRNOTAVAIL)
# How often a mapping checks that its address is still on this host, in seconds. (Over IPv4 a send would fail too.)
LOOK_EVERY: Final = 10.0


class Destination:
    """Where datagrams with a certain header go, and how many there were."""

    __slots__ = (
        "address",
        "again",
        "decision",
        "key",
        "mapping",
        "refused",
        "reply",
        "rx_bytes",
        "rx_packets",
        "since",
        "tx_bytes",
        "tx_packets",
        "waiting",
    )

    def __init__(self, key: bytes, decision: Decision | None, since: float) -> None:
        """`key` is the header; `decision` is None if its host can't be one."""
        self.key = key
        self.decision = decision
        self.since = since
        self.mapping: Mapping | None = None
        self.address: tuple[str, int] = ("", 0)
        self.reply = b""
        """The header of what it sends."""
        self.refused = ""
        """Why nothing is sent to it, as udp_dropped_total has it."""
        self.again = inf
        """When it may be judged again."""
        self.waiting: list[bytes] | None = None
        """Datagrams that wait for its name."""
        self.tx_packets = 0
        self.tx_bytes = 0
        self.rx_packets = 0
        self.rx_bytes = 0

    def add(self, other: Destination) -> None:
        """Count the datagrams of another one as those of this."""
        self.tx_packets += other.tx_packets
        self.tx_bytes += other.tx_bytes
        self.rx_packets += other.rx_packets
        self.rx_bytes += other.rx_bytes


NOBODY: Final = Destination(b"", None, 0.0)
"""Stands for senders that may not send to the client."""


class Mapping(DatagramSocket):
    """The egress socket of a pool and family."""

    __slots__ = (
        "active", "asked", "association", "has_source", "key", "lone", "replies", "source", "usable", "used"
    )  # fmt: skip

    def __init__(
        self, association: ClientAssociation, key: tuple[str, int], source: Source, used: str | None, sock: SocketType
    ) -> None:
        """`used` is the address of `source` to which `sock` is bound; None if the kernel chooses it."""
        super().__init__(association.reactor, sock)
        self.association = association
        self.key = key
        self.source = source
        self.used = used
        self.usable = association.means.egress.usable()
        """What it was when this looked last"""
        self.has_source = True
        """`used` is on this host."""
        self.active = association.reactor.now
        self.lone = True
        """It has only asked name servers."""
        self.asked: dict[str, Destination] = {}
        """The destinations by numeric address, the latest of each."""
        self.replies: dict[tuple[object, ...], Destination] = {}
        """By the sender's address, as recvfrom(2) gives it."""
        self.deadline = self.active + LOOK_EVERY

    def receive(self) -> bool:
        association = self.association
        view = self.reactor.view
        try:
            size, sender = self.sock.recvfrom_into(view[_ROOM:])
        except BlockingIOError:
            return False
        except OSError:  # a report about a datagram that was sent
            return True
        destination = self.replies.get(sender) or association.unknown_sender(self, sender)
        if destination.mapping is None:
            association.drop("stranger")
            return True
        reply = destination.reply
        start = _ROOM - len(reply)
        view[start:_ROOM] = reply
        if association.deliver(view[start : _ROOM + size]):
            destination.rx_packets += 1
            destination.rx_bytes += size
            associations = association.means.associations
            associations.rx_packets.value += 1
            associations.rx_bytes.value += size
            if self.lone:
                association.answered(self)
        return True

    def source_of(self, destination: Destination) -> str | None:
        """The address and port that its datagrams leave from, as far as the kernel tells."""
        host, port = self.sock.getsockname()[:2]
        if self.used is None:
            found = source_towards(*destination.address, iface=self.source.iface, mark=self.source.mark)
            if found is None:
                return None
            host = found
        return join_port(host, port)

    def move(self, source: Source) -> None:
        """Go on from an address of this source. Raises DialError."""
        used, sock = _bind(self.key[1], source)
        old = self.sock
        self.reactor.forget(self.fd)
        self.reactor.call_soon(old.close)  # not within the events of a turn
        self.source, self.used, self.sock, self.fd = source, used, sock, sock.fileno()
        self.reactor.register_datagrams(self.fd, self)

    def failed(self, error: Exception) -> None:
        self.association.failed(error)

    def on_deadline(self, now: float) -> None:
        try:
            self.association.look_at(self, now)
        except Exception as error:
            self.association.failed(error)


def open_mapping(association: ClientAssociation, key: tuple[str, int], source: Source) -> Mapping:
    """A mapping for this pool and IP version. Raises DialError: no descriptor is left, or no address of `source` is on
    this host and has ports left.
    """
    associations = association.means.associations
    if not associations.take():
        raise DialError(errno.EMFILE, source.address or "any address", "socket for")
    try:
        used, sock = _bind(key[1], source)
        try:
            return Mapping(association, key, source, used, sock)
        except OSError as error:  # no more sockets can be watched
            sock.close()
            raise DialError(error.errno or errno.EIO, source.address or "any address", "watch") from None
    except BaseException:
        associations.give_back()
        raise


def _bind(version: int, source: Source) -> tuple[str | None, SocketType]:
    """The first address of `source` that can be used, and a socket there. Raises DialError."""
    failure: DialError | None = None
    for address in (source.address, *source.spare):
        try:
            return address, open_socket(
                v6=version == 6, host=address, iface=source.iface, mark=source.mark, routed=source.routed
            )
        except DialError as error:
            failure = failure or error
            if error.errno not in _PORTS_TAKEN:
                break
    assert failure is not None
    raise failure


class RelaySocket(DatagramSocket):
    """The socket to which the client sends."""

    __slots__ = ("association", "connected", "proven")

    __deletable__ = ("association",)

    def __init__(self, association: ClientAssociation, sock: SocketType) -> None:
        super().__init__(association.reactor, sock)
        self.association = association
        self.connected = False
        """The client's port is known, and the kernel accepts datagrams from there only."""
        self.proven = False
        """What others have sent before that is read."""

    def receive(self) -> bool:
        association = self.association
        try:
            if self.proven:
                size = self.sock.recv_into(self.reactor.buffer)
            else:
                size, sender = self.sock.recvfrom_into(self.reactor.buffer)
                if not association.is_client(sender):
                    association.drop("stranger")
                    return True
        except BlockingIOError:
            self.proven = self.connected
            return False
        except OSError:  # ECONNREFUSED: the client's port is closed
            association.drop("client_gone")
            return True
        association.send(size)
        return True

    def failed(self, error: Exception) -> None:
        self.association.failed(error)

    def close(self) -> None:
        super().close()
        # The association knows its socket. Without this there would be a cycle for the collector in each of them.
        del self.association
