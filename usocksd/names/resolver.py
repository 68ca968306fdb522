"""Names to addresses: /etc/hosts, a cache, and DNS servers, or the system's getaddrinfo.

Rules of this file:

1. Only names that the rules have seen are asked for. `full_names` applies the search domains of resolv.conf; everything
   else here takes names as complete.
2. `cached` only looks into dictionaries; only names that are not there cost a task switch.
3. Askers of one name share one query. It belongs to none of them: it goes on when one gives up, and ends when the last
   one has gone.
4. An unanswered name delays only its asker: a limited number of names is queried at a time, clients with fewer names go
   first, and when too many wait some are refused (turns.py).
"""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import Callable, Sequence
from functools import partial
from math import inf
from pathlib import Path
from typing import NamedTuple

import trio
from attrs import Factory, define

from usocksd.errors import NO_ADDRESS, NO_SUCH_NAME, ResolveError
from usocksd.log.metrics import SECONDS, Metrics
from usocksd.names import answers
from usocksd.names.hosts_file import HostsFile
from usocksd.names.match import canonical_host
from usocksd.names.name_query import SERVERS_FAILED, TIMED_OUT, NameAnswer, ServiceRecord
from usocksd.names.name_servers import FAMILIES, NameServers
from usocksd.names.resolv_conf import MOST_SERVERS, PORT, RESOLV_CONF
from usocksd.names.turns import Ticket, TooManyWaiting, Turns
from usocksd.net.address import HostPort, IPAddress
from usocksd.net.bridge import in_trio
from usocksd.net.endpoint import DeadlineExpired, Interruptible
from usocksd.net.limits import owner
from usocksd.settings.types import DnsConfig

_logger = logging.getLogger("usocksd.names.resolver")

# RFC 8305 section 3: with addresses of one family, a client does not wait long for a server that drops the other query.
_RESOLUTION_DELAY = 0.2
_LONGEST_NAME = 253
_CHECK_FILES_EVERY = 1.0
_MOST_THREADS = 64  # how many threads may wait in getaddrinfo at a time

TOO_MANY = "too many names are asked for"
# The characters that IDNA accepts as a final dot (RFC 3490 section 3.1).
_DOTS = (".", "\u3002", "\uff0e", "\uff61")


class Most(NamedTuple):
    """Upper limits of a resolver."""

    names: int = 10_000
    """in the cache"""
    absent: int = 2000
    """in the cache of names without an address, which anybody can invent"""
    addresses: int = 256
    """addresses of a name. Its owner decides their number, and each is judged and recorded for every connection"""
    at_once: int = 256
    """names queried at a time: most are answered within milliseconds, and unanswered ones must not occupy this process
    """
    waiting: int = 1024
    """names that wait for a turn"""


@define(eq=False)
class _Query:
    since: float
    ticket: Ticket
    waiters: int = 0
    scope: trio.CancelScope = Factory(trio.CancelScope)
    done: trio.Event = Factory(trio.Event)
    known: answers.Entry = answers.SILENCE
    """So far"""
    outcome: answers.Entry = answers.STOPPED


def make_resolver(dns: DnsConfig, metrics: Metrics, *, sockets: int = 1000, mark: int | None = None) -> Resolver:
    """The resolver of this process, as [dns] says; see Resolver.

    For `resolver = "system"` glibc is on_answer, for the whole process, to leave searching to us.
    """
    system = dns.resolver == "system"
    if system:
        # resolv.conf(5): replaces the search list, here by one that adds nothing to a name. A dot at the end of the
        # name would say the same, but to DNS alone: /etc/hosts has no names with a dot at the end.
        os.environ["LOCALDOMAIN"] = "."
    return Resolver(dns.servers, metrics, system=system, sockets=sockets, mark=mark)


class Resolver:
    """Resolves names. `run` must be running for `resolve` to answer what `cached` does not know."""

    def __init__(
        self,
        servers: Sequence[HostPort] | None,
        metrics: Metrics,
        *,
        system: bool = False,
        sockets: int = 1000,
        resolv_conf: Path = RESOLV_CONF,
        hosts: Path = Path("/etc/hosts"),
        port: int = PORT,
        hostname: Callable[[], str] = socket.gethostname,
        lifetime: float | None = None,
        clock: Callable[[], float] = time.monotonic,
        mark: int | None = None,
        most: Most = Most(),  # noqa: B008
    ) -> None:
        """`servers` replace those of `resolv_conf` (which are asked on `port`); its search domains and options stay in
        force. `system`: ask getaddrinfo(3), and with it whatever nsswitch.conf(5) names, instead of name servers.

        `sockets`: how many are open to name servers at a time. Each session has one to spare for its name (see
        net/limits.py); further names wait, see turns.py. `lifetime`: seconds for one name, all its queries and
        servers together; None: as resolv.conf says. `mark`: SO_MARK of the sockets to name servers.

        Both files are looked at once a second at most, and read when they have changed. A missing file is an empty one;
        while one can't be read, what was read before stays.
        """
        self._threads = trio.CapacityLimiter(_MOST_THREADS) if system else None
        self._most = most
        # A name needs a socket for each server, and one for TCP. Its session has one descriptor to spare for the first.
        extra = max(MOST_SERVERS if servers is None else len(servers), 2) - 1
        at_once = _MOST_THREADS if system else min(max(sockets // 2 // extra, 1), most.at_once)
        self._turns = Turns(at_once, waiting=most.waiting)
        self._clock = clock
        self._servers = NameServers(
            servers, resolv_conf, port=port, hostname=hostname, lifetime=lifetime, clock=clock, mark=mark
        )
        self._hosts = HostsFile(hosts)
        self._next_check = 0.0
        self._cache: dict[str, answers.Entry] = {}
        self._failures: dict[str, answers.Entry] = {}
        """The cache of names without an address."""
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
        """Run the queries until cancelled, which ends those under way."""
        async with trio.open_nursery() as self._nursery:
            task_status.started()
            await self._turns.run()

    @property
    def servers(self) -> dict[str, bool]:
        """The name servers, and whether each answers as far as that is known; empty if the system is asked."""
        return {} if self._threads is not None else self._servers.status()

    def full_names(self, text: str) -> tuple[str, ...]:
        """The names that a host name from a client may stand for, canonical, in the order in which to query them.

        Only itself, if it ends in a dot, is in /etc/hosts or is `localhost`. Otherwise the search domains of
        resolv.conf(5) add names: before it if it has fewer dots than `ndots`, else behind it. The client means the
        first that has an address. Raises ValueError as `canonical_host` does.
        """
        host = canonical_host(text)
        name = str(host)
        if self._clock() >= self._next_check:
            self._reread()
        conf = self._servers.conf
        absolute = text.endswith(_DOTS) or not isinstance(host, str) or _is_localhost(name)
        if absolute or not conf.search or self._hosts.addresses(name):
            return (name,)
        others = [f"{name}.{domain}" for domain in conf.search if len(name) + len(domain) < _LONGEST_NAME]
        return (name, *others) if name.count(".") >= conf.ndots else (*others, name)

    def cached(self, name: str) -> tuple[IPAddress, ...] | None:
        """The addresses of a name, in the order in which to try them, if they are known without asking; else None.

        Fastest with names as `canonical_host` gives them; takes literals too. Raises ResolveError if the name is known
        to have no address, or is no host name.
        """
        now = self._clock()
        if now >= self._next_check:
            self._reread()
        entry = self._cache.get(name) or self._failures.get(name)
        if entry is not None and entry.expires > now:
            self._hits.value += 1
            if not entry.addresses:
                raise ResolveError(name, entry.cause)
            return entry.addresses
        try:
            host = canonical_host(name)
        except ValueError:
            raise ResolveError(name, "not a host name") from None
        if not isinstance(host, str):
            return (host,)
        if host != name:
            return self.cached(host)
        if _is_localhost(host):
            return answers.LOCALHOST  # RFC 6761 section 6.3: never queried; always both families
        listed = self._hosts.addresses(host) if self._threads is None else ()
        return answers.in_turn(listed) or None

    async def resolve(self, name: str, client: str | None = None) -> tuple[IPAddress, ...]:
        """The addresses of a name, in the order in which to try them: the families in turn, IPv6 first.

        Asks for this name only, whatever the search domains. Give it a deadline with a cancel scope; the `lifetime`
        bounds it too. `client`: the numeric address of the client that asks. Raises ResolveError with cause "no such
        name", "no address", "timed out", "servers failed", "too many names are asked for" (by this client, more than by
        others), or "not a host name".
        """
        found = self.cached(name)
        if found is None:
            entry = await self._shared_query(str(canonical_host(name)), b"" if client is None else owner(client))
            if not entry.addresses:
                raise ResolveError(name, entry.cause)
            return entry.addresses
        return found

    async def search(
        self, text: str, client: Interruptible | None = None, deadline: float = inf
    ) -> tuple[IPAddress, ...]:
        """The addresses of the first of `full_names` that has any. For names that no rule judges.

        `client`: on behalf of its session, until `deadline`. Raises as `resolve` and `resolve_for` do.
        """
        try:
            names = self.full_names(text)
        except ValueError:
            raise ResolveError(text, "not a host name") from None
        cause = NO_SUCH_NAME
        for name in names:
            try:
                return await (self.resolve_for(client, None, name, deadline) if client else self.resolve(name))
            except ResolveError as error:
                if not error.absent:
                    raise ResolveError(text, error.cause) from None
                if error.cause == NO_ADDRESS:
                    cause = NO_ADDRESS
        raise ResolveError(text, cause)

    async def services(self, name: str) -> tuple[tuple[ServiceRecord, ...], float]:
        """The servers of a service, by its SRV records (RFC 2782), and for how many seconds they are valid. The name
        servers are asked, whatever `system` says, and no search domains are tried.

        Raises ResolveError, which is `absent` if there is no such service, or it says that it is not to be had.
        """
        if self._clock() >= self._next_check:
            self._reread()
        found = await self._servers.services(name)
        usable = tuple(each for each in found.services if each.port and each.target)  # "." is none
        if not usable:
            raise ResolveError(name, NO_ADDRESS if found.exists else NO_SUCH_NAME)
        return usable, answers.kept_for(found)

    async def resolve_for(
        self, client: Interruptible, host: str | None, name: str, deadline: float
    ) -> tuple[IPAddress, ...]:
        """`resolve`, on behalf of the session of `client`, until `deadline` (on the reactor's clock). `host` is the
        client's numeric address, None if the client did not ask for the name.

        Raises ResolveError, also for a time-out, and PeerReset when `client` is gone meanwhile.
        """
        found = self.cached(name)
        if found is not None:
            return found
        try:
            return await in_trio(client, deadline, partial(self.resolve, name, host))
        except DeadlineExpired:
            raise ResolveError(name, TIMED_OUT) from None

    async def _shared_query(self, host: str, asker: bytes) -> answers.Entry:
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
                self._end(host, query)  # the next asker starts a new one
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
                except TooManyWaiting:
                    query.known = answers.Entry((), TOO_MANY)
                self._settle(host, query, query.known)
        except Exception:  # a bug that concerns one name must not harm others
            _logger.exception("resolver failed", extra={"fields": {"name": host}})
            self._settle(host, query, answers.FAILURE)
        finally:
            self._end(host, query)

    async def _ask_servers(self, host: str, query: _Query) -> None:
        heard: list[answers.Entry] = []

        def on_answer(_: object, found: NameAnswer | ResolveError) -> None:
            heard.append(answers.of_family(found))
            both = [*heard, answers.UNANSWERED][:2]
            query.known = answers.combine(both, self._most.addresses)
            if len(heard) == 1 and query.known.addresses:
                nursery.start_soon(settle_with_one)

        async def settle_with_one() -> None:
            await trio.sleep(_RESOLUTION_DELAY)
            # The askers continue with this; the other family may still arrive, for later ones.
            self._settle(host, query, query.known)

        async with trio.open_nursery() as nursery:
            await self._servers.ask(host, FAMILIES, on_answer)
            nursery.cancel_scope.cancel()

    async def _ask_system(self, host: str, query: _Query) -> None:
        # A thread in getaddrinfo can't be stopped: it is abandoned, and counts towards the limit until it returns.
        query.known = await trio.to_thread.run_sync(
            answers.of_system, host, abandon_on_cancel=True, limiter=self._threads
        )

    def _settle(self, host: str, query: _Query, entry: answers.Entry) -> None:
        known = answers.Entry(entry.addresses, entry.cause, expires=self._clock() + entry.ttl)
        self._cache.pop(host, None)
        self._failures.pop(host, None)
        kept, most = (self._cache, self._most.names) if entry.addresses else (self._failures, self._most.absent)
        if entry.ttl:
            if len(kept) >= most:
                del kept[next(iter(kept))]  # the oldest entry
            kept[host] = known
        if not query.done.is_set():
            self._seconds[entry.cause].observe(self._clock() - query.since)
            query.outcome = known
            self._end(host, query)

    def _end(self, host: str, query: _Query) -> None:
        """The askers go on with its outcome, and no others join it."""
        if self._queries.get(host) is query:
            del self._queries[host]
        query.done.set()

    def _reread(self) -> None:
        self._next_check = self._clock() + _CHECK_FILES_EVERY
        changed = [self._hosts.reread(), self._servers.reread()]
        if any(changed):
            self._cache.clear()
            self._failures.clear()


def _is_localhost(name: str) -> bool:
    return name == "localhost" or name.endswith(".localhost")
