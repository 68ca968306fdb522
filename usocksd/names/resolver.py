"""Names to addresses: /etc/hosts, a cache, and DNS servers, or the system's getaddrinfo.

What this file keeps:

1. Nothing is asked for that the rules have not seen. `full_names` tells the names that a name may stand for by the
   search domains of resolv.conf; everything else here takes a name for just itself.
2. `cached` is plain dictionaries; only what it does not know costs a task switch.
3. Askers of one name share one query. It belongs to none of them: it goes on when one gives up, and ends when
   the last one has gone.
4. What can't be answered costs the asker its deadline and nobody else anything: few are asked for at a time, they give
   way to clients who ask for fewer, and what is past all hope fails at once (turns.py).
"""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

import trio
from attrs import Factory, define, frozen

from usocksd.errors import ResolveError
from usocksd.host.limits import owner
from usocksd.log.metrics import SECONDS, Metrics
from usocksd.names.hosts_file import HostsFile, in_turn
from usocksd.names.match import canonical_host
from usocksd.names.name_query import SERVERS_FAILED, TIMED_OUT, Found
from usocksd.names.name_servers import FAMILIES, NameServers
from usocksd.names.resolv_conf import MOST_SERVERS, RESOLV_CONF
from usocksd.names.turns import Refused, Ticket, Turns
from usocksd.net.address import IPAddress, numeric_address
from usocksd.net.endpoint import DeadlineExpired, Endpoint
from usocksd.settings.types import SocketAddress

_logger = logging.getLogger("usocksd.names.resolver")

# Seconds. A TTL of 0 would mean a query per connection of a page; one of days outlives every change.
_SHORTEST_TTL, _LONGEST_TTL = 5.0, 3600.0
_LONGEST_NEGATIVE_TTL = 300.0
_FAILURE_TTL = 1.0  # RFC 9520 section 3.2: failures are to be cached, for a second at least
_PARTIAL_TTL = 10.0  # one family answered, the other did not
# RFC 8305 section 3: whoever has addresses of one family does not wait long for a server that drops the other query.
_RESOLUTION_DELAY = 0.2
_MOST_NAMES = 10_000
_MOST_FAILURES = 2000  # names that have no address are anybody's to invent
# How many names are asked for at a time, and how many may wait. Name servers answer within milliseconds; names that get
# no answer must not take up this process.
_AT_ONCE, _MOST_WAITING = 256, 1024
# Each address is judged and recorded for every connection, and the owner of the name decides their number.
_MOST_ADDRESSES = 256
_LONGEST_NAME = 253
_CHECK_FILES_EVERY = 1.0
_SYSTEM_TTL = 5.0  # getaddrinfo(3) tells none
_MOST_THREADS = 64  # that may wait in getaddrinfo at a time

NO_SUCH_NAME = "no such name"
NO_ADDRESS = "no address"
TOO_MANY = "too many names are asked for"
ABSENT = frozenset({NO_SUCH_NAME, NO_ADDRESS})
"""The causes that say: this name is none, so ask for the next one that it may stand for."""

# getaddrinfo(3). What is not here, EAI_AGAIN above all, is a time-out or SERVFAIL: it does not tell which.
_GAI_CAUSES = {
    socket.EAI_NONAME: NO_SUCH_NAME,
    socket.EAI_NODATA: NO_ADDRESS,
    socket.EAI_ADDRFAMILY: NO_ADDRESS,
}
# What IDNA takes for the dot at the end (RFC 3490 section 3.1).
_DOTS = (".", "\u3002", "\uff0e", "\uff61")


@frozen
class _Entry:
    """What is known about a name: addresses, or why there are none. `ttl` from now, or the time when it ends.

    A `ttl` of 0: nobody says how long.
    """

    addresses: tuple[IPAddress, ...]
    cause: str = ""
    ttl: float = 0.0
    expires: float = 0.0


_UNANSWERED, _SILENCE = _Entry((), TIMED_OUT), _Entry((), TIMED_OUT, _FAILURE_TTL)
_LOCALHOST = _Entry((numeric_address("::1"), numeric_address("127.0.0.1")))


@define(eq=False)
class _Query:
    since: float
    ticket: Ticket
    waiters: int = 0
    scope: trio.CancelScope = Factory(trio.CancelScope)
    done: trio.Event = Factory(trio.Event)
    known: _Entry = _SILENCE
    """So far"""
    outcome: _Entry = _Entry((), "resolver stopped")


class Resolver:
    """Resolves names. `run` must be running for `resolve` to answer what `cached` does not know."""

    def __init__(
        self,
        servers: Sequence[SocketAddress] | None,
        metrics: Metrics,
        *,
        system: bool = False,
        sockets: int = 1000,
        resolv_conf: Path = RESOLV_CONF,
        hosts: Path = Path("/etc/hosts"),
        lifetime: float | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`servers` replace those of `resolv_conf`, whose search domains and options stay in force.

        `system`: ask getaddrinfo(3), and with it whatever nsswitch.conf(5) names, instead of name servers. glibc is
        told, for the whole process, to leave searching to us.

        `sockets`: so many are open to name servers at a time, of which each session has one to spare for its name (see
        host/limits.py); further names wait, see turns.py. `lifetime`: seconds for one name, all its queries and
        servers together; None: what resolv.conf says. Both files are read when they change, looked at once a second at
        most; a missing one is an empty one, and one that can't be read stays what it was.
        """
        self._threads = trio.CapacityLimiter(_MOST_THREADS) if system else None
        if system:
            # resolv.conf(5): replaces the search list, here by one that adds nothing to a name. A dot at the end of
            # the name would say the same, but to DNS alone: /etc/hosts knows no name with one.
            os.environ["LOCALDOMAIN"] = "."
        # A name has a socket for each server, and one for TCP. The first is the one that its session does not use.
        beside = max(MOST_SERVERS if servers is None else len(servers), 2) - 1
        at_once = _MOST_THREADS if system else min(max(sockets // 2 // beside, 1), _AT_ONCE)
        self._turns = Turns(at_once, waiting=_MOST_WAITING)
        self._clock = clock
        self._servers = NameServers(servers, resolv_conf, lifetime=lifetime, clock=clock)
        self._hosts = HostsFile(hosts)
        self._next_check = 0.0
        self._cache: dict[str, _Entry] = {}
        self._failures: dict[str, _Entry] = {}
        """The same, of names without an address."""
        self._queries: dict[str, _Query] = {}
        self._nursery: trio.Nursery | None = None
        self._hits = metrics.counter("dns_cache_hits_total", "Names that the cache had an answer for")
        seconds = metrics.histograms(
            "dns_seconds", "Time that name servers took to answer, by result", SECONDS, "result"
        )
        self._seconds = {
            cause: seconds.labels(cause.replace(" ", "_") or "ok")
            for cause in ("", NO_SUCH_NAME, NO_ADDRESS, TIMED_OUT, SERVERS_FAILED, TOO_MANY)
        }
        self._reread()

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Holds the queries; until cancelled, which ends those under way."""
        async with trio.open_nursery() as self._nursery:
            task_status.started()
            await self._turns.run()

    @property
    def servers(self) -> dict[str, bool]:
        """The name servers, and whether each answers as far as that is known; none where the system is asked."""
        return {} if self._threads is not None else self._servers.status()

    def full_names(self, text: str) -> tuple[str, ...]:
        """The names that a host name as a client sent it may stand for, canonical, in the order in which to ask.

        One, itself, if it ends in a dot, is in /etc/hosts or is `localhost`; otherwise the search domains of
        resolv.conf(5) give it others: before it when it has fewer dots than `ndots`, and else behind it. The first
        with an address is the one that is meant. Raises ValueError as `canonical_host` does.
        """
        host = canonical_host(text)
        name = str(host)
        if self._clock() >= self._next_check:
            self._reread()
        absolute = text.endswith(_DOTS) or not isinstance(host, str) or _is_localhost(name)
        if absolute or not self._servers.conf.search or self._hosts.addresses(name):
            return (name,)
        others = [f"{name}.{domain}" for domain in self._servers.conf.search if len(name) + len(domain) < _LONGEST_NAME]
        return (name, *others) if name.count(".") >= self._servers.conf.ndots else (*others, name)

    def cached(self, name: str) -> tuple[IPAddress, ...] | None:
        """The addresses of a name if they are known without asking anybody; None means: call `resolve`.

        In the order in which to try them. Takes names as `canonical_host` gives them fastest, and literals too.
        """
        entry = self._known(name)
        if entry is None:
            return None
        return entry.addresses or None

    def _known(self, name: str) -> _Entry | None:
        """What is known of a name without asking anybody, also that it has no address."""
        now = self._clock()
        if now >= self._next_check:
            self._reread()
        entry = self._cache.get(name) or self._failures.get(name)
        if entry is not None and entry.expires > now:
            self._hits.value += 1
            return entry
        try:
            host = canonical_host(name)
        except ValueError:
            return _Entry((), "not a host name")
        if not isinstance(host, str):
            return _Entry((host,))
        if host != name:
            return self._known(host)
        if _is_localhost(host):
            return _LOCALHOST  # RFC 6761 section 6.3: never asked, and both families whatever /etc/hosts has
        listed = self._hosts.addresses(host) if self._threads is None else ()
        return _Entry(listed) if listed else None

    async def resolve(self, name: str, client: str | None = None) -> tuple[IPAddress, ...]:
        """The addresses of a name, in the order in which to try them: the families in turn, IPv6 first.

        Asks for this name and no other, whatever the search domains. Give it a deadline with a cancel scope; it has
        its own too, the `lifetime`. `client`: the numeric address of the one that it is for. Raises ResolveError with
        cause "no such name", "no address", "timed out", "servers failed", "too many names are asked for" (this client,
        of those who wait), or "not a host name".
        """
        entry = self._known(name)
        if entry is None:
            entry = await self._shared_query(str(canonical_host(name)), b"" if client is None else owner(client))
        if not entry.addresses:
            raise ResolveError(name, entry.cause)
        return entry.addresses

    async def search(self, text: str) -> tuple[IPAddress, ...]:
        """The addresses of the first of `full_names` that has any. For names that no rule is to judge.

        Raises ResolveError as `resolve` does.
        """
        return await self._first(text, self.resolve)

    async def search_for(self, client: Endpoint, text: str, deadline: float) -> tuple[IPAddress, ...]:
        """What `search` says, on behalf of a session. Raises as `resolve_for` does."""
        return await self._first(text, lambda name: self.resolve_for(client, None, name, deadline))

    async def _first(self, text: str, ask: Callable[[str], Awaitable[tuple[IPAddress, ...]]]) -> tuple[IPAddress, ...]:
        try:
            names = self.full_names(text)
        except ValueError:
            raise ResolveError(text, "not a host name") from None
        cause = NO_SUCH_NAME
        for name in names:
            try:
                return await ask(name)
            except ResolveError as error:
                if error.cause not in ABSENT:
                    raise ResolveError(text, error.cause) from None
                if error.cause == NO_ADDRESS:
                    cause = NO_ADDRESS
        raise ResolveError(text, cause)

    async def resolve_for(
        self, client: Endpoint, host: str | None, name: str, deadline: float
    ) -> tuple[IPAddress, ...]:
        """What `resolve` says, on behalf of the session of `client`, whose address is `host` (None: the name is not
        the client's), until `deadline` (on the reactor's clock).

        Raises ResolveError, also for a time-out, and PeerReset when `client` is gone meanwhile.
        """
        entry = self._known(name)
        if entry is not None:
            if not entry.addresses:
                raise ResolveError(name, entry.cause)
            return entry.addresses
        try:
            return await client.meanwhile(deadline, lambda name: self.resolve(name, host), name)
        except DeadlineExpired:
            raise ResolveError(name, TIMED_OUT) from None

    async def _shared_query(self, host: str, asker: bytes) -> _Entry:
        query = self._queries.get(host)
        if query is None:
            if self._nursery is None:
                raise RuntimeError("Resolver.run is not running")
            query = _Query(self._clock(), Ticket(asker))
            self._nursery.start_soon(self._answer, host, query)
            self._queries[host] = query
        elif asker != query.ticket.owner:
            self._turns.shared(query.ticket, asker)
        query.waiters += 1
        try:
            await query.done.wait()
        finally:
            query.waiters -= 1
            if not query.waiters and not query.done.is_set():
                self._forget(host, query)  # who comes now starts anew
                query.scope.cancel()
        return query.outcome

    async def _answer(self, host: str, query: _Query) -> None:
        """The task of one query."""
        ask = self._ask_servers if self._threads is None else self._ask_system
        try:
            with query.scope:
                try:
                    with trio.move_on_after(self._servers.lifetime):
                        async with self._turns.turn(query.ticket):
                            await ask(host, query)
                except Refused:
                    query.known = _Entry((), TOO_MANY)
                self._settle(host, query, query.known)
        except Exception:  # one name's fault, never that of the others
            _logger.exception("resolver failed", extra={"fields": {"name": host}})
            self._settle(host, query, _Entry((), SERVERS_FAILED, _FAILURE_TTL))
        finally:
            self._forget(host, query)
            query.done.set()

    async def _ask_servers(self, host: str, query: _Query) -> None:
        answers: list[_Entry] = []

        def told(_: object, found: Found | ResolveError) -> None:
            answers.append(_entry(found))
            query.known = _combine(answers if len(answers) == 2 else [*answers, _UNANSWERED])
            if len(answers) == 1 and query.known.addresses:
                nursery.start_soon(settle_with_one)

        async def settle_with_one() -> None:
            await trio.sleep(_RESOLUTION_DELAY)
            # The askers go on with this; the other family may still come, for the next ones.
            self._settle(host, query, query.known)

        async with trio.open_nursery() as nursery:
            await self._servers.ask(host, FAMILIES, told)
            nursery.cancel_scope.cancel()

    async def _ask_system(self, host: str, query: _Query) -> None:
        # A thread in getaddrinfo can't be stopped: it is abandoned, and keeps its place among the threads until it
        # returns.
        query.known = await trio.to_thread.run_sync(_getaddrinfo, host, abandon_on_cancel=True, limiter=self._threads)

    def _settle(self, host: str, query: _Query, entry: _Entry) -> None:
        known = _Entry(entry.addresses, entry.cause, expires=self._clock() + entry.ttl)
        self._cache.pop(host, None)
        self._failures.pop(host, None)
        kept, most = (self._cache, _MOST_NAMES) if entry.addresses else (self._failures, _MOST_FAILURES)
        if entry.ttl:
            if len(kept) >= most:
                del kept[next(iter(kept))]  # the one that has been there longest
            kept[host] = known
        if not query.done.is_set():
            self._seconds[entry.cause].observe(self._clock() - query.since)
            query.outcome = known
            self._forget(host, query)
            query.done.set()

    def _forget(self, host: str, query: _Query) -> None:
        if self._queries.get(host) is query:
            del self._queries[host]

    def _reread(self) -> None:
        self._next_check = self._clock() + _CHECK_FILES_EVERY
        changed = [self._hosts.reread(), self._servers.reread()]
        if any(changed):
            self._cache.clear()
            self._failures.clear()


def _entry(found: Found | ResolveError) -> _Entry:
    if isinstance(found, ResolveError):
        return _Entry((), found.cause)
    if found.addresses:
        return _Entry(tuple(map(numeric_address, found.addresses)), "", _clamp(found.ttl or 0.0, _LONGEST_TTL))
    ttl = 0.0 if found.ttl is None else _clamp(found.ttl, _LONGEST_NEGATIVE_TTL)
    return _Entry((), NO_ADDRESS if found.exists else NO_SUCH_NAME, ttl)


def _is_localhost(name: str) -> bool:
    return name == "localhost" or name.endswith(".localhost")


def _getaddrinfo(host: str) -> _Entry:
    """In a thread of its own. Blocks for as long as the system's configuration lets it."""
    try:
        # As bytes: Python would put a str through a codec of its own.
        found = socket.getaddrinfo(host.encode("ascii"), None, type=socket.SOCK_STREAM)
    except socket.gaierror as error:
        cause = _GAI_CAUSES.get(error.errno or 0, SERVERS_FAILED)
        return _Entry((), cause, _SYSTEM_TTL if cause in ABSENT else _FAILURE_TTL)
    return _Entry(in_turn(numeric_address(str(sockaddr[0])) for *_, sockaddr in found), "", _SYSTEM_TTL)


def _combine(answers: Sequence[_Entry]) -> _Entry:
    """One entry from those of both families; a family that failed makes it short-lived."""
    failures = [answer.cause for answer in answers if answer.cause in {TIMED_OUT, SERVERS_FAILED}]
    ttl = min((answer.ttl for answer in answers if answer.ttl), default=0.0)
    addresses = in_turn(address for answer in answers for address in answer.addresses)[:_MOST_ADDRESSES]
    if addresses:
        # That there is none of the other family is kept as long as these are, even if nobody vouches for it.
        longest = _PARTIAL_TTL if failures else _LONGEST_TTL if all(a.ttl for a in answers) else _LONGEST_NEGATIVE_TTL
        return _Entry(addresses, "", min(ttl, longest))
    if failures:
        return _Entry((), TIMED_OUT if TIMED_OUT in failures else SERVERS_FAILED, _FAILURE_TTL)
    nothing = all(answer.cause == NO_SUCH_NAME for answer in answers)
    # An absence that nobody vouches for is not to be kept (RFC 2308 section 5), or hardly.
    return _Entry((), NO_SUCH_NAME if nothing else NO_ADDRESS, ttl or _SHORTEST_TTL)


def _clamp(ttl: float, longest: float) -> float:
    return min(max(ttl, _SHORTEST_TTL), longest)
