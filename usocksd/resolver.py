"""Names to addresses: /etc/hosts, a cache, and DNS by dnspython on trio.

What this file keeps:

1. `cached` is plain dictionaries; only what it does not know costs a task switch.
2. Askers of one name share one query. It belongs to none of them: it goes on when one gives up, and ends when
   the last one has gone.
3. What can't be answered costs the asker its deadline and nobody else anything: no threads, no queue.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import time
from collections.abc import Callable, Iterable, Sequence
from io import StringIO
from pathlib import Path

import dns.asyncbackend
import dns.asyncresolver
import dns.exception
import dns.nameserver
import dns.rdatatype
import dns.resolver
import trio
from attrs import Factory, define, frozen

from usocksd.errors import ResolveError
from usocksd.match import IPAddress, canonical_host, numeric_address
from usocksd.runtime.endpoint import DeadlineExpired, Endpoint
from usocksd.runtime.metrics import SECONDS, Metrics
from usocksd.runtime.settings import SocketAddress

_logger = logging.getLogger("usocksd.resolver")

# Seconds. A TTL of 0 would mean a query per connection of a page; one of days outlives every change.
_SHORTEST_TTL, _LONGEST_TTL = 5.0, 3600.0
_LONGEST_NEGATIVE_TTL = 300.0
_FAILURE_TTL = 1.0  # RFC 9520 section 3.2: failures are to be cached, for a second at least
_PARTIAL_TTL = 10.0  # one family answered, the other did not
# RFC 8305 section 3: whoever has IPv4 addresses does not wait long for a server that drops AAAA queries.
_RESOLUTION_DELAY = 0.2
_MOST_NAMES = 10_000
_CHECK_FILES_EVERY = 1.0
_EDNS_PAYLOAD = 1232  # what passes every path without fragments

_LOCALHOST = (numeric_address("::1"), numeric_address("127.0.0.1"))

NO_SUCH_NAME = "no such name"
NO_ADDRESS = "no address"
TIMED_OUT = "timed out"
SERVERS_FAILED = "servers failed"


@frozen
class _Entry:
    """What is known about a name: addresses, or why there are none. `ttl` from now, or the time when it ends."""

    addresses: tuple[IPAddress, ...]
    cause: str = ""
    ttl: float = 0.0
    expires: float = 0.0


@define(eq=False)
class _Query:
    since: float
    waiters: int = 0
    scope: trio.CancelScope = Factory(trio.CancelScope)
    done: trio.Event = Factory(trio.Event)
    outcome: _Entry = _Entry((), "resolver stopped")


class Resolver:
    """Resolves names. `run` must be running for `resolve` to answer what `cached` does not know."""

    def __init__(
        self,
        servers: Sequence[SocketAddress] | None,
        metrics: Metrics,
        *,
        resolv_conf: Path = Path("/etc/resolv.conf"),
        hosts: Path = Path("/etc/hosts"),
        lifetime: float = 10.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`servers` replace those of `resolv_conf`, whose search domains and options stay in force.

        `lifetime`: seconds for one name, all its queries and servers together. Both files are read when they
        change, looked at once a second at most; a missing one is an empty one.
        """
        self._servers = servers
        self._lifetime = lifetime
        self._clock = clock
        self._resolv_conf = _WatchedFile(resolv_conf)
        self._hosts_file = _WatchedFile(hosts)
        self._next_check = 0.0
        self._hosts: dict[str, tuple[IPAddress, ...]] = {}
        self._cache: dict[str, _Entry] = {}
        self._queries: dict[str, _Query] = {}
        self._nursery: trio.Nursery | None = None
        self._backend = dns.asyncbackend.get_backend("trio")
        self._hits = metrics.counter("dns_cache_hits_total", "Names that the cache had an answer for")
        seconds = metrics.histograms(
            "dns_seconds", "Time that name servers took to answer, by result", SECONDS, "result"
        )
        self._seconds = {
            cause: seconds.labels(cause.replace(" ", "_") or "ok")
            for cause in ("", NO_SUCH_NAME, NO_ADDRESS, TIMED_OUT, SERVERS_FAILED)
        }
        self._dns = self._configured("")
        self._reread()

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Holds the queries; until cancelled, which ends those under way."""
        async with trio.open_nursery() as self._nursery:
            task_status.started()
            await trio.sleep_forever()

    def cached(self, name: str) -> tuple[IPAddress, ...] | None:
        """The addresses of a name if they are known without asking anybody; None means: call `resolve`.

        In the order in which to try them. Takes names as `canonical_host` gives them fastest, and literals too.
        """
        now = self._clock()
        if now >= self._next_check:
            self._reread()
        entry = self._cache.get(name)
        if entry is not None and entry.expires > now:
            if not entry.addresses:
                return None
            self._hits.value += 1
            return entry.addresses
        try:
            host = canonical_host(name)
        except ValueError:
            return None
        if not isinstance(host, str):
            return (host,)
        if host == "localhost" or host.endswith(".localhost"):
            return _LOCALHOST  # RFC 6761 section 6.3: never asked, and both families whatever /etc/hosts has
        return self._hosts.get(host) if host == name else self.cached(host)

    async def resolve(self, name: str) -> tuple[IPAddress, ...]:
        """The addresses of a name, in the order in which to try them: the families in turn, IPv6 first.

        Give it a deadline with a cancel scope; it has its own too, the `lifetime`. Raises ResolveError with cause
        "no such name", "no address", "timed out", "servers failed", or "not a host name".
        """
        known = self.cached(name)
        if known is not None:
            return known
        try:
            host = str(canonical_host(name))
        except ValueError:
            raise ResolveError(name, "not a host name") from None
        entry = self._cache.get(host)
        if entry is None or entry.expires <= self._clock():
            entry = await self._shared_query(host)
        else:
            self._hits.value += 1
        if not entry.addresses:
            raise ResolveError(name, entry.cause)
        return entry.addresses

    async def resolve_for(self, client: Endpoint, name: str, deadline: float) -> tuple[IPAddress, ...]:
        """`cached` or `resolve` on behalf of a session, until `deadline` (on the reactor's clock).

        Raises ResolveError, also for a time-out, and PeerReset when `client` is gone meanwhile.
        """
        addresses = self.cached(name)
        if addresses is not None:
            return addresses
        try:
            return await client.meanwhile(deadline, self.resolve, name)
        except DeadlineExpired:
            raise ResolveError(name, "timed out") from None

    async def _shared_query(self, host: str) -> _Entry:
        query = self._queries.get(host)
        if query is None:
            if self._nursery is None:
                raise RuntimeError("Resolver.run is not running")
            query = _Query(self._clock())
            self._nursery.start_soon(self._answer, host, query)
            self._queries[host] = query
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
        answers: list[_Entry] = []

        async def ask(kind: dns.rdatatype.RdataType) -> None:
            answer = await self._ask(host, kind)
            answers.append(answer)
            if len(answers) == 2:
                nursery.cancel_scope.cancel()  # the delay below, if it runs
            elif kind is dns.rdatatype.A and answer.addresses:
                await trio.sleep(_RESOLUTION_DELAY)
                # The askers go on with this; AAAA may still come, for the next ones.
                self._settle(host, query, _combine([answer, _Entry((), TIMED_OUT)]))

        try:
            with query.scope:
                # dnspython's own limit goes by wall time, which may jump.
                with trio.move_on_after(self._lifetime):
                    async with trio.open_nursery() as nursery:
                        nursery.start_soon(ask, dns.rdatatype.AAAA)
                        nursery.start_soon(ask, dns.rdatatype.A)
                missing = 2 - len(answers)
                self._settle(host, query, _combine([*answers, *[_Entry((), TIMED_OUT)] * missing]))
        except Exception:  # one name's fault, never that of the others
            _logger.exception("resolver failed", extra={"fields": {"name": host}})
            self._settle(host, query, _Entry((), SERVERS_FAILED, _FAILURE_TTL))
        finally:
            self._forget(host, query)
            query.done.set()

    def _settle(self, host: str, query: _Query, entry: _Entry) -> None:
        known = _Entry(entry.addresses, entry.cause, expires=self._clock() + entry.ttl)
        self._cache.pop(host, None)
        if len(self._cache) >= _MOST_NAMES:
            del self._cache[next(iter(self._cache))]  # the one that has been there longest
        self._cache[host] = known
        if not query.done.is_set():
            self._seconds[entry.cause].observe(self._clock() - query.since)
            query.outcome = known
            self._forget(host, query)
            query.done.set()

    def _forget(self, host: str, query: _Query) -> None:
        if self._queries.get(host) is query:
            del self._queries[host]

    async def _ask(self, host: str, kind: dns.rdatatype.RdataType) -> _Entry:
        try:
            answer = await self._dns.resolve(
                host,
                kind,
                raise_on_no_answer=False,
                search=True,
                lifetime=self._lifetime,
                backend=self._backend,
            )
        except dns.resolver.NXDOMAIN as error:
            ttl = min(response.resolve_chaining().minimum_ttl for response in error.responses().values())  # type: ignore[no-untyped-call]
            return _Entry((), NO_SUCH_NAME, _clamp(ttl, _LONGEST_NEGATIVE_TTL))
        except dns.exception.Timeout:
            return _Entry((), TIMED_OUT)
        except dns.exception.DNSException:
            return _Entry((), SERVERS_FAILED)
        # The shortest TTL of the answer and the CNAMEs that lead to it, or what the SOA says of its absence.
        ttl = answer.chaining_result.minimum_ttl
        if answer.rrset is None:
            return _Entry((), NO_ADDRESS, _clamp(ttl, _LONGEST_NEGATIVE_TTL))
        addresses = [numeric_address(record.address) for record in answer.rrset]
        return _Entry(tuple(addresses), "", _clamp(ttl, _LONGEST_TTL))

    def _reread(self) -> None:
        self._next_check = self._clock() + _CHECK_FILES_EVERY
        text = self._hosts_file.changed()
        if text is not None:
            self._hosts = _parse_hosts(text)
            self._cache.clear()
        text = self._resolv_conf.changed()
        if text is not None:
            try:
                self._dns = self._configured(text)
            except (ValueError, dns.exception.DNSException) as error:
                fields = {"file": str(self._resolv_conf.path), "error": str(error)}
                _logger.error("resolver configuration ignored", extra={"fields": fields})
            self._cache.clear()

    def _configured(self, resolv_conf: str) -> dns.asyncresolver.Resolver:
        resolver = dns.asyncresolver.Resolver(configure=False)
        try:
            resolver.read_resolv_conf(StringIO(resolv_conf))
        except dns.resolver.NoResolverConfiguration:
            resolver.nameservers = ["127.0.0.1"]  # resolv.conf(5)
        if self._servers is not None:
            resolver.nameservers = [
                dns.nameserver.Do53Nameserver(str(server.address), server.port) for server in self._servers
            ]
        resolver.use_edns(0, 0, _EDNS_PAYLOAD)
        return resolver


def _combine(answers: Sequence[_Entry]) -> _Entry:
    """One entry from those of both families; a family that failed makes it short-lived."""
    failures = [answer.cause for answer in answers if answer.cause in {TIMED_OUT, SERVERS_FAILED}]
    ttl = min((answer.ttl for answer in answers if answer.cause not in failures), default=_FAILURE_TTL)
    addresses = _in_turn(address for answer in answers for address in answer.addresses)
    if addresses:
        return _Entry(addresses, "", min(ttl, _PARTIAL_TTL) if failures else ttl)
    if failures:
        return _Entry((), TIMED_OUT if TIMED_OUT in failures else SERVERS_FAILED, _FAILURE_TTL)
    nothing = all(answer.cause == NO_SUCH_NAME for answer in answers)
    return _Entry((), NO_SUCH_NAME if nothing else NO_ADDRESS, ttl)


def _in_turn(addresses: Iterable[IPAddress]) -> tuple[IPAddress, ...]:
    """RFC 8305 section 4: the families in turn, IPv6 first, each in the order given."""
    families: dict[int, list[IPAddress]] = {6: [], 4: []}
    for address in dict.fromkeys(addresses):
        families[address.version].append(address)
    pairs = itertools.zip_longest(families[6], families[4])
    return tuple(address for pair in pairs for address in pair if address is not None)


def _clamp(ttl: float, longest: float) -> float:
    return min(max(ttl, _SHORTEST_TTL), longest)


def _parse_hosts(text: str) -> dict[str, tuple[IPAddress, ...]]:
    """hosts(5): an address and its names on a line. What is neither is skipped, as the C library does."""
    found: dict[str, list[IPAddress]] = {}
    for line in text.splitlines():
        address, *names = line.partition("#")[0].split() or [""]
        for name in names:
            with contextlib.suppress(ValueError):
                found.setdefault(str(canonical_host(name)), []).append(numeric_address(address))
    return {name: _in_turn(addresses) for name, addresses in found.items()}


class _WatchedFile:
    """A small text file that is read again when it has changed."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._seen: tuple[int, int, int] | str | None = "never"

    def changed(self) -> str | None:
        """Its text, "" for a missing or unreadable file, if it is not the one seen last; otherwise None."""
        try:
            status = os.stat(self.path)
            now = (status.st_mtime_ns, status.st_ino, status.st_size)
        except OSError:
            now = None
        if now == self._seen:
            return None
        self._seen = now
        try:
            return self.path.read_text("utf-8", "replace")
        except OSError:
            return ""
