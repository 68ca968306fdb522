"""Queries DNS servers for one name, until all kinds of records are answered or the caller cancels.

Rules of this file:

1. Each name and server has a socket of its own. The kernel chooses its port; it is connected, so only the server is
   heard, and if no server listens the kernel says so at once. Both kinds of address are asked for through it.
2. While a server is slow, the next one is asked too; the first answer counts.
3. dnspython parses what comes in. What it can't parse is no answer.
"""

from __future__ import annotations

import contextlib
import logging
import secrets
import socket
import struct
from collections.abc import Callable, Sequence
from math import inf
from typing import NamedTuple, TypeAlias

import dns.exception
import dns.flags
import dns.message
import dns.name
import dns.opcode
import dns.rcode
import dns.rdataclass
import dns.rdatatype
import trio
from attrs import frozen

from usocksd.errors import ResolveError
from usocksd.names.resolv_conf import open_socket
from usocksd.net.address import HostPort

_logger = logging.getLogger("usocksd.names.resolver")

TIMED_OUT = "timed out"
SERVERS_FAILED = "servers failed"

Kind: TypeAlias = dns.rdatatype.RdataType

_EDNS_PAYLOAD = 1232  # passes every path without fragments
_NO_EDNS = frozenset({dns.rcode.FORMERR, dns.rcode.NOTIMP, dns.rcode.BADVERS})  # RFC 6891 section 7
# Responses with these codes may lack the question.
_CURT = _NO_EDNS | {dns.rcode.SERVFAIL, dns.rcode.REFUSED}
# RFC 1035 section 4.1.1, and RFC 6891 section 6.1.2
_HEADER, _QUESTION, _OPT = struct.Struct("!6H"), struct.Struct("!2H"), struct.Struct("!B2HIH")
_RECEIVE_SIZE = 65535
# Seconds until the next server is asked too; they double with each round.
_ALONE = 1.0
_TCP_WITHIN = 5.0
# Seconds. A server that has not answered a query within _SILENT_AFTER, nor any other query meanwhile, is asked last for
# _BLAMED_FIRST, then for twice as long each time that another try gets no answer.
_SILENT_AFTER = 0.5
_BLAMED_FIRST, _BLAMED_AT_MOST = 2.0, 30.0


class ServiceRecord(NamedTuple):
    """One server of a service: a record of type SRV (RFC 2782)."""

    priority: int
    """the lowest is asked first"""
    weight: int
    """its share among those of the same priority"""
    port: int
    target: str
    """a name"""


@frozen
class NameAnswer:
    """The servers' answer about a name, for one kind of record."""

    addresses: tuple[str, ...]
    exists: bool
    """False: the name has no records of any kind."""
    ttl: float | None
    """Seconds, the shortest of the answer and the CNAMEs that lead to it, or the SOA's for an absence (RFC 2308
    section 5); None for an absence without a SOA."""
    services: tuple[ServiceRecord, ...] = ()


OnAnswer: TypeAlias = Callable[[Kind, NameAnswer | ResolveError], None]


class NameServer:
    """One name server, and whether it answers."""

    def __init__(self, address: HostPort, clock: Callable[[], float], mark: int | None = None) -> None:
        self.address = address
        self._mark = mark
        self.takes_edns = True
        self.silent_until = -inf
        """it is asked last until this time, on the clock; -inf: it answers"""
        self._clock = clock
        self._complained = False
        self._blamed_for = 0.0
        self._blamed_at = self._answered_at = -inf  # in trio's time

    def connect(self, kind: int) -> socket.socket:
        """A socket of this kind, connecting to it. Raises OSError, and records the first one."""
        try:
            return open_socket(self.address, kind, self._mark)
        except OSError as error:
            if not self._complained:
                self._complained = True
                fields = {"server": self.address.host, "error": error.strerror or str(error)}
                _logger.warning("name server can't be used", extra={"fields": fields})
            raise

    def answered(self) -> None:
        """It has answered."""
        self._answered_at = trio.current_time()
        self._blamed_for, self.silent_until = 0.0, -inf

    def silent(self, since: float) -> None:
        """A query sent at `since` (in trio's time) got no answer."""
        now = trio.current_time()
        if now - since < _SILENT_AFTER or max(self._answered_at, self._blamed_at) > since:
            return
        self._blamed_at = now
        self._blamed_for = min(max(2 * self._blamed_for, _BLAMED_FIRST), _BLAMED_AT_MOST)
        self.silent_until = self._clock() + self._blamed_for

    def try_again(self) -> None:
        """Have one query ask it first, to see whether it is back; other queries ask it last meanwhile."""
        self.silent_until = self._clock() + max(self._blamed_for, _BLAMED_FIRST)


class NameQuery:
    """One name, and what its servers have answered so far."""

    def __init__(
        self, servers: Sequence[NameServer], name: dns.name.Name, kinds: Sequence[Kind], on_answer: OnAnswer
    ) -> None:
        """`on_answer` is called once for each kind, with what was found or the error that all servers failed."""
        self._servers = servers
        self._name = name
        self._pending = set(kinds)
        self._on_answer = on_answer
        self._asked: dict[NameServer, _Conversation] = {}
        self._go_on = trio.Event()

    async def run(self) -> None:
        """Until every kind is answered. Give it a deadline: silent servers are asked again and again."""
        try:
            async with trio.open_nursery() as self._nursery:
                alone = _ALONE
                while self._pending:
                    for server in self._servers:
                        self._go_on = trio.Event()
                        if self._ask(server):
                            with trio.move_on_after(alone):
                                await self._go_on.wait()
                    alone *= 2
        finally:
            for conversation in self._asked.values():
                conversation.close()

    def _ask(self, server: NameServer) -> bool:
        """Ask for all kinds that are pending; False if this server can't be asked for any."""
        conversation = self._asked.get(server)
        if conversation is None:
            conversation = self._asked[server] = _Conversation(server, self._name)
            if conversation.sock is not None:
                self._nursery.start_soon(self._listen, conversation, conversation.sock)
        kinds = self._pending - conversation.failed
        if all(map(conversation.ask, kinds)):
            return bool(kinds)
        self._fail(conversation, *kinds)
        return False

    async def _listen(self, conversation: _Conversation, sock: socket.socket) -> None:
        while True:
            await trio.lowlevel.wait_readable(sock)
            try:
                data = sock.recv(_RECEIVE_SIZE)
            except BlockingIOError:
                continue
            except OSError:  # no server listens there
                self._fail(conversation, *self._pending)
                return
            about = conversation.kinds.get(int.from_bytes(data[:2]))
            message = None if about is None else self._read(data, about)
            if about is None or message is None:
                continue
            conversation.server.answered()
            if about in self._pending:
                self._heard(conversation, about, message)

    def _read(self, data: bytes, kind: Kind, *, over_tcp: bool = False) -> dns.message.Message | None:
        """The message if it is an answer to our question."""
        try:
            message = dns.message.from_wire(data, ignore_trailing=True, raise_on_truncation=not over_tcp)
        except dns.message.Truncated as truncated:  # perhaps in the middle of a record
            message = truncated.kwargs["message"]
        except Exception:  # strangers' bytes may raise anything
            return None
        if not message.flags & dns.flags.QR or message.opcode() != dns.opcode.QUERY:
            return None
        if not message.question:
            return message if message.rcode() in _CURT else None
        ours = [(self._name, kind, dns.rdataclass.IN)]
        return message if [(each.name, each.rdtype, each.rdclass) for each in message.question] == ours else None

    def _heard(
        self, conversation: _Conversation, kind: Kind, message: dns.message.Message, *, over_tcp: bool = False
    ) -> None:
        server, rcode = conversation.server, message.rcode()
        if rcode in _NO_EDNS:
            if kind not in conversation.plain:
                conversation.plain.add(kind)
                if conversation.ask(kind):
                    return
        elif kind in conversation.plain:
            server.takes_edns = False
        if message.flags & dns.flags.TC and not over_tcp:
            # (Only once, since repeated queries get truncated answers too.)
            if kind not in conversation.over_tcp:
                conversation.over_tcp.add(kind)
                self._nursery.start_soon(self._ask_over_tcp, conversation, kind)
            return
        try:
            found = _found(message)
        except dns.exception.DNSException:
            self._fail(conversation, kind)
        else:
            self._settle(kind, found)

    async def _ask_over_tcp(self, conversation: _Conversation, kind: Kind) -> None:
        message = None
        with contextlib.suppress(OSError, trio.BrokenResourceError), trio.move_on_after(_TCP_WITHIN):
            sock = trio.socket.from_stdlib_socket(conversation.server.connect(socket.SOCK_STREAM))
            async with trio.SocketStream(sock) as stream:
                await trio.lowlevel.wait_writable(sock)
                wire = conversation.query(kind)
                await stream.send_all(len(wire).to_bytes(2) + wire)
                data = b""
                while len(data) < 2 or len(data) < 2 + int.from_bytes(data[:2]):
                    more = await stream.receive_some()
                    if not more:
                        break
                    data += more
                message = self._read(data[2:], kind, over_tcp=True) if data[2:4] == wire[:2] else None
        if kind in self._pending:
            if message is None:
                self._fail(conversation, kind)
            else:
                self._heard(conversation, kind, message, over_tcp=True)

    def _fail(self, conversation: _Conversation, *kinds: Kind) -> None:
        """The server has failed for these kinds: the next one is asked at once."""
        conversation.failed.update(kinds)
        self._go_on.set()
        if len(self._asked) == len(self._servers):
            for kind in kinds:
                if all(kind in each.failed for each in self._asked.values()):
                    self._settle(kind, ResolveError(str(self._name), SERVERS_FAILED))

    def _settle(self, kind: Kind, found: NameAnswer | ResolveError) -> None:
        self._pending.discard(kind)
        self._on_answer(kind, found)
        if not self._pending:
            self._nursery.cancel_scope.cancel()


class _Conversation:
    """The queries to one server about one name."""

    def __init__(self, server: NameServer, name: dns.name.Name) -> None:
        self.server = server
        self.kinds: dict[int, Kind] = {}
        """By the id of the query."""
        self.plain: set[Kind] = set()
        """Asked for without EDNS, since the server refused that."""
        self.over_tcp: set[Kind] = set()
        """Asked for over TCP, since the answer did not fit."""
        self.failed: set[Kind] = set()
        self._name = name.to_wire()
        self._since = trio.current_time()
        self.sock: socket.socket | None = None
        with contextlib.suppress(OSError):
            self.sock = server.connect(socket.SOCK_DGRAM)

    def ask(self, kind: Kind) -> bool:
        """Send a query, perhaps once more; False if that is not possible."""
        if self.sock is None:
            return False
        try:
            self.sock.send(self.query(kind))
        except BlockingIOError:  # treated like a lost packet
            pass
        except OSError:
            return False
        return True

    def query(self, kind: Kind) -> bytes:
        """In wire form; a repeated query is the same as the first."""
        assert self._name is not None
        ident = next((ident for ident, known in self.kinds.items() if known == kind), None)
        while ident is None or self.kinds.setdefault(ident, kind) != kind:
            ident = secrets.randbelow(1 << 16)
        edns = self.server.takes_edns and kind not in self.plain
        # Recursion is desired; there is one question, and perhaps an OPT record.
        wire = _HEADER.pack(ident, dns.flags.RD, 1, 0, 0, int(edns)) + self._name
        wire += _QUESTION.pack(kind, dns.rdataclass.IN)
        return wire + _OPT.pack(0, dns.rdatatype.OPT, _EDNS_PAYLOAD, 0, 0) if edns else wire

    def close(self) -> None:
        """Stop waiting for its answers."""
        if self.sock is not None:
            self.sock.close()
            self.server.silent(self._since)


def _found(message: dns.message.Message) -> NameAnswer:
    """Raises DNSException if the server has failed."""
    rcode = message.rcode()
    if rcode not in {dns.rcode.NOERROR, dns.rcode.NXDOMAIN} or not isinstance(message, dns.message.QueryMessage):
        raise dns.exception.FormError  # (any DNSException: it is no answer)
    chain = message.resolve_chaining()
    if chain.answer is not None and chain.answer.rdtype == dns.rdatatype.SRV:
        records = tuple(
            ServiceRecord(each.priority, each.weight, each.port, each.target.to_text(omit_final_dot=True))
            for each in chain.answer
        )
        return NameAnswer((), True, chain.minimum_ttl, records)
    if chain.answer is not None:
        return NameAnswer(tuple(record.address for record in chain.answer), True, chain.minimum_ttl)
    vouched = any(rrset.rdtype == dns.rdatatype.SOA for rrset in message.authority)
    return NameAnswer((), rcode == dns.rcode.NOERROR, float(chain.minimum_ttl) if vouched else None)
