"""The DNS servers to ask: dnspython, set up as resolv.conf(5) or the configuration says.

What this file keeps:

1. A server that is dead costs a time-out now and then, not with every name: it is asked last for a while.
2. Sockets are connected: nobody else is heard, and where no server listens the kernel says so at once.
3. A server that takes no EDNS is asked without.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import random
from collections.abc import Callable, Sequence
from io import StringIO
from math import inf
from pathlib import Path
from typing import Any, TypeAlias

import dns.asyncbackend
import dns.asyncquery
import dns.asyncresolver
import dns.exception
import dns.inet
import dns.message
import dns.name
import dns.nameserver
import dns.rcode
import dns.rdatatype
import dns.resolver
import trio
from attrs import frozen

from usocksd.errors import ResolveError
from usocksd.match import canonical_host
from usocksd.runtime.settings import SocketAddress
from usocksd.watched_file import WatchedFile

_logger = logging.getLogger("usocksd.resolver")

_Backend: TypeAlias = Any  # dnspython's own name for it is private

TIMED_OUT = "timed out"
SERVERS_FAILED = "servers failed"

_PORT = 53
_EDNS_PAYLOAD = 1232  # what passes every path without fragments
_NO_EDNS = frozenset({dns.rcode.FORMERR, dns.rcode.NOTIMP, dns.rcode.BADVERS})  # RFC 6891 section 7
_MOST_NDOTS = 15  # resolv.conf(5)
_SHORTEST_TIMEOUT, _LONGEST_TIMEOUT = 1.0, 30.0  # seconds; resolv.conf(5), and the C library takes 0 for 1
# Seconds. Who has waited so long in vain, while the server answered nobody else either, takes it for dead; and so
# long it is asked last, until one query tries it again.
_SILENT_AFTER, _SILENT_FOR = 0.5, 30.0


@frozen
class Found:
    """What the servers say of a name."""

    addresses: tuple[str, ...]
    exists: bool
    """False: there is no such name, for no kind of record."""
    ttl: float | None
    """Seconds, the shortest of the answer and the CNAMEs that lead to it, or what the SOA says of its absence
    (RFC 2308 section 5); None if nobody says how long an absence lasts."""


class NameServers:
    """Those of the configuration, or of resolv.conf, whose search domains and options hold for either."""

    def __init__(
        self,
        servers: Sequence[SocketAddress] | None,
        resolv_conf: Path,
        *,
        lifetime: float,
        clock: Callable[[], float],
    ) -> None:
        """Servers None: those of `resolv_conf`, to be read by `reread`. `lifetime`: seconds for one answer, all
        servers together.
        """
        self.search: tuple[str, ...] = ()
        """The search domains, canonical."""
        self.ndots = 1
        """With so many dots a name is asked for as it is first."""
        self._given = servers
        self._file = WatchedFile(resolv_conf)
        self._lifetime = lifetime
        self._clock = clock
        self._backend = dns.asyncbackend.get_backend("trio")
        self._configure("")

    def reread(self) -> bool:
        """Read resolv.conf if it has changed; tells whether it had."""
        text = self._file.changed()
        if text is None:
            return False
        self._configure(text)
        return True

    async def ask(self, name: dns.name.Name | str, kind: str) -> Found:
        """The addresses of this name (A or AAAA records), whatever the search domains.

        Raises ResolveError with cause TIMED_OUT or SERVERS_FAILED, from the error that tells more.
        """
        # Each resolution begins with a copy of this list.
        self._dns.nameservers = self._in_order()
        try:
            answer = await self._dns.resolve(
                dns.name.from_text(name) if isinstance(name, str) else name,
                dns.rdatatype.from_text(kind),
                raise_on_no_answer=False,
                search=False,
                lifetime=self._lifetime,
                backend=self._backend,
            )
        except dns.resolver.NXDOMAIN as error:
            (response,) = error.responses().values()  # type: ignore[no-untyped-call]
            return Found((), False, _negative_ttl(response))
        except dns.exception.Timeout as error:
            raise ResolveError(str(name), TIMED_OUT) from error
        except dns.exception.DNSException as error:
            raise ResolveError(str(name), SERVERS_FAILED) from error
        if answer.rrset is None:
            return Found((), True, _negative_ttl(answer.response))
        return Found(tuple(record.address for record in answer.rrset), True, answer.chaining_result.minimum_ttl)

    def _in_order(self) -> list[_Server]:
        now = self._clock()
        servers = random.sample(self._servers, len(self._servers)) if self._rotate else self._servers
        order = sorted(servers, key=lambda server: server.silent_until if server.silent_until > now else -inf)
        if order[0].silent_until > -inf:
            # Its while is over (or no other is better). This query tries it, and the others let it.
            order[0].silent_until = now + _SILENT_FOR
        return order

    def _configure(self, resolv_conf: str) -> None:
        configured = dns.asyncresolver.Resolver(configure=False)
        with contextlib.suppress(dns.resolver.NoResolverConfiguration):
            configured.read_resolv_conf(StringIO("".join(filter(self._is_sound, resolv_conf.splitlines(True)))))
        if self._given is not None:
            servers = [(str(server.address), server.port) for server in self._given]
        else:
            servers = [(str(each), _PORT) for each in configured.nameservers] or [("127.0.0.1", _PORT)]
        self._servers = [_Server(address, port, self._clock) for address, port in servers]
        self._rotate, configured.rotate = configured.rotate, False
        configured.timeout = min(max(configured.timeout, _SHORTEST_TIMEOUT), _LONGEST_TIMEOUT)
        configured.use_edns(0, 0, _EDNS_PAYLOAD)
        self._dns = configured
        self.search = _search_domains(configured)
        ndots = 1 if configured.ndots is None else configured.ndots
        self.ndots = min(max(ndots, 0), _MOST_NDOTS)

    def _is_sound(self, line: str) -> bool:
        """Whether dnspython can make something of a line of resolv.conf: one that it can't would cost the others."""
        alone = dns.asyncresolver.Resolver(configure=False)
        try:
            with contextlib.suppress(dns.resolver.NoResolverConfiguration):
                alone.read_resolv_conf(StringIO(line))
            if all(isinstance(server, str) and dns.inet.is_address(server) for server in alone.nameservers):
                return True
            error = "not an address"
        except (ValueError, dns.exception.DNSException) as failure:
            error = str(failure)
        fields = {"file": str(self._file.path), "line": line.strip(), "error": error}
        _logger.error("resolver configuration ignored", extra={"fields": fields})
        return False


class _Server(dns.nameserver.Do53Nameserver):
    """One of them, and what is known of it."""

    def __init__(self, address: str, port: int, clock: Callable[[], float]) -> None:
        super().__init__(address, port)
        self.silent_until = -inf
        """On the clock: it is asked last until then; -inf for one that answers."""
        self._clock = clock
        self._answered = -inf
        """When it did so last, in trio's time."""
        self._takes_edns = True

    async def async_query(  # noqa: PLR0917 (the signature is dnspython's)
        self,
        request: dns.message.QueryMessage,
        timeout: float,  # noqa: ASYNC109
        source: str | None,
        source_port: int,
        max_size: bool,
        backend: _Backend,
        one_rr_per_rrset: bool = False,
        ignore_trailing: bool = False,
    ) -> dns.message.Message:
        """For dnspython's resolver: one query. `max_size`: over TCP."""
        if self._takes_edns:
            response = await self._query(request, timeout, max_size, backend)
            if response.rcode() not in _NO_EDNS:
                return response
        plain = copy.copy(request)
        plain.use_edns(False)
        response = await self._query(plain, timeout, max_size, backend)
        self._takes_edns = response.rcode() in _NO_EDNS  # then that was not the reason
        return response

    async def _query(
        self, request: dns.message.Message, within: float, tcp: bool, backend: _Backend
    ) -> dns.message.Message:
        began = trio.current_time()
        answered = False
        try:
            if tcp:
                response = await dns.asyncquery.tcp(request, self.address, within, self.port, backend=backend)
            else:
                response = await self._udp(request, within, backend)
            answered = True
        except dns.message.Truncated:
            answered = True
            raise
        finally:
            now = trio.current_time()
            if answered:
                self._answered = now
                self.silent_until = -inf
            elif now - began >= _SILENT_AFTER and self._answered < began:
                self.silent_until = self._clock() + _SILENT_FOR
        return response

    async def _udp(self, request: dns.message.Message, within: float, backend: _Backend) -> dns.message.Message:
        sock = await backend.make_socket(
            dns.inet.af_for_address(self.address), trio.socket.SOCK_DGRAM, destination=(self.address, self.port)
        )
        async with sock:
            return await dns.asyncquery.udp(
                request,
                self.address,
                within,
                self.port,
                sock=sock,
                ignore_unexpected=True,
                raise_on_truncation=True,
                ignore_errors=True,
            )


def _negative_ttl(response: dns.message.Message) -> float | None:
    if not any(rrset.rdtype == dns.rdatatype.SOA for rrset in response.authority):
        return None
    return float(response.resolve_chaining().minimum_ttl)  # type: ignore[attr-defined]


def _search_domains(configured: dns.asyncresolver.Resolver) -> tuple[str, ...]:
    domains: list[str] = []
    for domain in configured.search or [configured.domain]:
        # The root adds nothing to a name; what is no host name can't be part of one.
        with contextlib.suppress(ValueError):
            domains.append(str(canonical_host(domain.to_text(omit_final_dot=True))))
    return tuple(dict.fromkeys(domains))
