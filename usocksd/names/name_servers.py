"""The DNS servers of the configuration or of resolv.conf(5), and the order in which they are asked.

A dead server costs a moment now and then, but not with every name: it is asked last for a while.
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
from usocksd.names.hosts_file import WatchedFile
from usocksd.names.name_query import SERVERS_FAILED, TIMED_OUT, Kind, NameAnswer, NameQuery, NameServer, OnAnswer
from usocksd.names.resolv_conf import PORT, ResolvConf, parse
from usocksd.net.address import HostPort

_logger = logging.getLogger("usocksd.names.resolver")

FAMILIES = (dns.rdatatype.AAAA, dns.rdatatype.A)


class NameServers:
    """The servers. Search domains and options of resolv.conf apply to servers of the configuration too."""

    def __init__(
        self,
        servers: Sequence[HostPort] | None,
        resolv_conf: Path,
        *,
        clock: Callable[[], float],
        port: int = PORT,
        hostname: Callable[[], str] = socket.gethostname,
        lifetime: float | None = None,
        mark: int | None = None,
    ) -> None:
        """Servers None: those of `resolv_conf`, on `port`, once `reread` has read it. `lifetime`: seconds for one name,
        all servers together; None: `timeout` times `attempts` of resolv.conf. `mark`: of the sockets.
        """
        self.conf = ResolvConf()
        self._given = servers
        self._port = port
        self._hostname = hostname
        self._file = WatchedFile(resolv_conf)
        self._lifetime = lifetime
        self._clock = clock
        self._mark = mark
        self._servers: list[NameServer] = []
        self._configure("")

    @property
    def lifetime(self) -> float:
        """Seconds after which a name is given up."""
        return self.conf.timeout * self.conf.attempts if self._lifetime is None else self._lifetime

    def status(self) -> dict[str, bool]:
        """Each server, as address and port, and whether it is not known to be silent."""
        now = self._clock()
        return {str(server.address): server.silent_until <= now for server in self._servers}

    def reread(self) -> bool:
        """Read resolv.conf if it has changed; tells whether it had."""
        text = self._file.changed()
        if text is None:
            return False
        self._configure(text)
        return True

    async def ask(self, name: dns.name.Name | str, kinds: Sequence[Kind], on_answer: OnAnswer) -> None:
        """Ask for these kinds of records of this name, whatever the search domains, until all of them are answered.

        `on_answer` is called with each answer. Give it a deadline, for example `lifetime`.
        """
        try:
            text = dns.name.from_text(name) if isinstance(name, str) else name
        except dns.exception.DNSException:
            for kind in kinds:
                on_answer(kind, ResolveError(str(name), SERVERS_FAILED))
        else:
            await NameQuery(self._in_order(), text, kinds, on_answer).run()

    async def addresses(self, name: dns.name.Name) -> NameAnswer:
        """The IPv4 addresses of this name.

        Raises ResolveError with cause TIMED_OUT or SERVERS_FAILED.
        """
        return await self._one(name, dns.rdatatype.A)

    async def services(self, name: str) -> NameAnswer:
        """The servers of the service that has this name (RFC 2782). Raises as `addresses` does."""
        return await self._one(name, dns.rdatatype.SRV)

    async def _one(self, name: dns.name.Name | str, kind: Kind) -> NameAnswer:
        answers: list[NameAnswer | ResolveError] = [ResolveError(str(name), TIMED_OUT)]
        with trio.move_on_after(self.lifetime):
            await self.ask(name, (kind,), lambda _, found: answers.append(found))
        if isinstance(answers[-1], ResolveError):
            raise answers[-1]
        return answers[-1]

    def _in_order(self) -> list[NameServer]:
        now = self._clock()
        servers = random.sample(self._servers, len(self._servers)) if self.conf.rotate else self._servers
        order = sorted(servers, key=lambda server: server.silent_until if server.silent_until > now else -inf)
        if order[0].silent_until > -inf:
            # Try this one again (or no other is better).
            order[0].try_again()
        return order

    def _configure(self, text: str) -> None:
        self.conf = parse(text, hostname=self._hostname())
        for line, error in self.conf.faults:
            fields = {"file": str(self._file.path), "line": line, "error": error}
            _logger.error("resolver configuration ignored", extra={"fields": fields})
        # resolv.conf(5): without any it is the one on this host.
        addresses = self._given or [HostPort(server, self._port) for server in self.conf.servers or ("127.0.0.1",)]
        self._servers = [NameServer(address, self._clock, self._mark) for address in addresses]
