"""The DNS servers to ask, as resolv.conf(5) or the configuration says, and in which order.

A server that is dead costs a moment now and then, not with every name: it is asked last for a while.
"""

from __future__ import annotations

import logging
import random
import socket
from collections.abc import Callable, Sequence
from math import inf
from pathlib import Path

import dns.exception
import dns.name
import dns.rdatatype
import trio

from usocksd.errors import ResolveError
from usocksd.names.name_query import SERVERS_FAILED, TIMED_OUT, Found, Kind, NameQuery, NameServer, Told
from usocksd.names.resolv_conf import PORT, ResolvConf, parse
from usocksd.names.watched_file import WatchedFile
from usocksd.net.address import join_port
from usocksd.settings.types import SocketAddress

_logger = logging.getLogger("usocksd.names.resolver")

FAMILIES = (dns.rdatatype.AAAA, dns.rdatatype.A)


class NameServers:
    """Those of the configuration, or of resolv.conf, whose search domains and options hold for either."""

    def __init__(
        self,
        servers: Sequence[SocketAddress] | None,
        resolv_conf: Path,
        *,
        clock: Callable[[], float],
        lifetime: float | None = None,
    ) -> None:
        """Servers None: those of `resolv_conf`, to be read by `reread`. `lifetime`: seconds for one name, all servers
        together; None: as resolv.conf says, `timeout` times `attempts`.
        """
        self.conf = ResolvConf()
        self._given = servers
        self._file = WatchedFile(resolv_conf)
        self._lifetime = lifetime
        self._clock = clock
        self._servers: list[NameServer] = []
        self._configure("")

    @property
    def lifetime(self) -> float:
        """Seconds until who asks for a name gives it up."""
        return self.conf.timeout * self.conf.attempts if self._lifetime is None else self._lifetime

    def status(self) -> dict[str, bool]:
        """Each server, as address and port, and whether it is not known to be silent."""
        now = self._clock()
        return {join_port(server.host, server.port): server.silent_until <= now for server in self._servers}

    def reread(self) -> bool:
        """Read resolv.conf if it has changed; tells whether it had."""
        text = self._file.changed()
        if text is None:
            return False
        self._configure(text)
        return True

    async def ask(self, name: dns.name.Name | str, kinds: Sequence[Kind], told: Told) -> None:
        """Ask for these kinds of records of this name, whatever the search domains, until all of them are answered.

        `told` is called with each answer. Give it a deadline, `lifetime` say.
        """
        try:
            text = dns.name.from_text(name) if isinstance(name, str) else name
        except dns.exception.DNSException:
            for kind in kinds:
                told(kind, ResolveError(str(name), SERVERS_FAILED))
        else:
            await NameQuery(self._in_order(), text, kinds, told).run()

    async def addresses(self, name: dns.name.Name) -> Found:
        """The IPv4 addresses of this name.

        Raises ResolveError with cause TIMED_OUT or SERVERS_FAILED.
        """
        answers: list[Found | ResolveError] = [ResolveError(str(name), TIMED_OUT)]
        with trio.move_on_after(self.lifetime):
            await self.ask(name, (dns.rdatatype.A,), lambda _, found: answers.append(found))
        if isinstance(answers[-1], ResolveError):
            raise answers[-1]
        return answers[-1]

    def _in_order(self) -> list[NameServer]:
        now = self._clock()
        servers = random.sample(self._servers, len(self._servers)) if self.conf.rotate else self._servers
        order = sorted(servers, key=lambda server: server.silent_until if server.silent_until > now else -inf)
        if order[0].silent_until > -inf:
            # Its while is over (or no other is better).
            order[0].try_again()
        return order

    def _configure(self, text: str) -> None:
        self.conf = parse(text, hostname=socket.gethostname())
        for line, error in self.conf.faults:
            fields = {"file": str(self._file.path), "line": line, "error": error}
            _logger.error("resolver configuration ignored", extra={"fields": fields})
        self._servers = [NameServer(host, port, self._clock) for host, port in _addresses(self.conf, self._given)]


def _addresses(conf: ResolvConf, given: Sequence[SocketAddress] | None) -> list[tuple[str, int]]:
    if given is not None:
        return [(str(server.address), server.port) for server in given]
    # resolv.conf(5): without any it is the one on this host.
    return [(server, PORT) for server in conf.servers] or [("127.0.0.1", PORT)]
