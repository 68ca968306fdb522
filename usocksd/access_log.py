"""The access records of usocksd, and the counters of its connections."""

from __future__ import annotations

import logging
from typing import Any

from usocksd.clients import ALLOW_FROM, TRUSTED, Client
from usocksd.decision import Candidate, Decision
from usocksd.errors import CommandNotSupported, Denied, Error
from usocksd.log.access import AccessRecords, ConnectionRecords, pair_member
from usocksd.log.log import Log
from usocksd.log.metrics import Metrics
from usocksd.net.address import join_port
from usocksd.net.dial import Target
from usocksd.socks import AddressType, ClientFault, Command, Kind, Method, Reply, Request, Server, Version

_KEYS = (
    "request_id",
    "client_addr",
    "peer_addr",
    "local_addr",
    "protocol",
    "command",
    "dest_host",
    "dest_port",
    "dest_addr",
    "src_addr",
    "user",
    "rule",
    "pool",
)
# The keys that `usocksd diff` reads. Once per connection is enough, so "proxy ends" lacks them.
_AT_START = ("dest_name", "candidates")
# Of an established connection. No text is an address with a zone: the names of interfaces may need escaping.
_TEXTS = ("request_id", "client_addr", "local_addr", "protocol", "command", "src_addr")
_NUMBERS = ("dest_port",)
_FEW = ("user", "rule", "pool")
# Members of an Enum are slow to look up: each connection takes these from here.
_SOCKS5, _NO_AUTHENTICATION = Version.SOCKS5, Method.NO_AUTHENTICATION
_COMMANDS = {command: command.name.lower() for command in Command}
_PROTOCOLS = {Version.SOCKS4: "SOCKS4/4a", Version.SOCKS5: "SOCKS5"}

# Label values. Those of the original (github.com/cybozu-go/usocksd, socks/defs.go) as far as it has them.
_VERSIONS = {None: "unknown", Version.SOCKS4: "SOCKS4_4a", Version.SOCKS5: "SOCKS5"}
_METHODS = {None: "unknown", Method.NO_AUTHENTICATION: "no_auth", Method.USERNAME_PASSWORD: "basic"}
_ADDRESS_TYPES = {
    None: "unknown",
    AddressType.IPV4: "IPv4",
    AddressType.NAME: "Domain_name",
    AddressType.IPV6: "IPv6",
}
_GRANTED = "granted"
_STATUSES = {
    Reply.SUCCEEDED: _GRANTED,
    Reply.GENERAL_FAILURE: "failure",
    Reply.NOT_ALLOWED: "not_allowed",
    Reply.NETWORK_UNREACHABLE: "network_unreachable",
    Reply.HOST_UNREACHABLE: "host_unreachable",
    Reply.CONNECTION_REFUSED: "connection_refused",
    Reply.TTL_EXPIRED: "TTL_expired",
    Reply.COMMAND_NOT_SUPPORTED: "command_not_supported",
    Reply.ADDRESS_TYPE_NOT_SUPPORTED: "address_type_not_supported",
}
_REJECTED = "rejected"  # SOCKS4's only other reply
_NOT_AUTHENTICATED, _NO_ADDRESS = "authentication_failure", "address_read_failure"
_NO_REQUEST, _NO_SOCKS = "invalid_request", "unknown_version"
_CLIENT_DENIED, _TIMED_OUT, _GONE = "client_denied", "timed_out", "client_gone"
_BY_VERSION = {
    None: (_NO_REQUEST, _NO_SOCKS, _CLIENT_DENIED, _TIMED_OUT, _GONE),
    Version.SOCKS4: (_GRANTED, _REJECTED, _NO_ADDRESS, _TIMED_OUT, _GONE),
    Version.SOCKS5: (*_STATUSES.values(), _NOT_AUTHENTICATED, _NO_ADDRESS, _TIMED_OUT, _GONE),
}
# Faults that are answered with a reply; NO_METHOD only by SOCKS4.
_REFUSED = {
    Kind.NO_METHOD: _NOT_AUTHENTICATED,
    Kind.BAD_COMMAND: _STATUSES[Reply.COMMAND_NOT_SUPPORTED],
    Kind.BAD_ADDRESS_TYPE: _STATUSES[Reply.ADDRESS_TYPE_NOT_SUPPORTED],
}
# How many rules are counted by name. The others share one counter; rules that deny first come first.
_MOST_RULES = 200
_SUCCESS, _FAILURE = "ok", "failed"


class AccessLog(AccessRecords):
    """The records of all connections, and their counters."""

    def __init__(self, log: Log, metrics: Metrics) -> None:
        logger = logging.getLogger(__name__)
        super().__init__(log, _KEYS, logger, metrics, at_start=_AT_START, texts=_TEXTS, numbers=_NUMBERS, few=_FEW)
        connections = metrics.counters(
            "connections_total", "Client connections, by how they began", "version", "status"
        )
        self.connections = {
            (version, status): connections.labels(_VERSIONS[version], status)
            for version, statuses in _BY_VERSION.items()
            for status in statuses
        }
        authenticated = metrics.counters(
            "socks5_auth_negotiated_total", "SOCKS5 authentication, by method", "type", "result"
        )
        addresses = metrics.counters(
            "socks5_address_read_total", "SOCKS5 requests, by type of the destination's address", "type", "result"
        )
        results = (_SUCCESS, _FAILURE)
        self.authenticated = {
            (method, result): authenticated.labels(label, result)
            for method, label in _METHODS.items()
            for result in results
        }
        self.unauthenticated = self.authenticated[Method.NO_AUTHENTICATION, _SUCCESS]
        """The most frequent of these."""
        self.address_read = {
            (kind, result): addresses.labels(label, result)
            for kind, label in _ADDRESS_TYPES.items()
            for result in results
        }
        self.probes = metrics.counter("probes_total", "Connections that only asked whether this is a usocksd")
        self.denied = metrics.counters(
            "denied_total", "Connections denied, by the rule that decided", "rule", most=_MOST_RULES
        )
        for rule in (ALLOW_FROM, TRUSTED):
            self.denied.labels(rule)


class SocksRecords(ConnectionRecords):
    """The records of one connection. The session tells it what it learns, and asks it nothing."""

    __slots__ = (
        "_destination",
        "_local",
        "_log",
        "_peer",
        "_pool",
        "_request",
        "_rule",
        "_user",
        "_version",
        "decision",
        "tried_user",
    )

    def __init__(self, records: AccessLog, client: Client, local: tuple[str, int]) -> None:
        """`local` is our address that the client has connected to."""
        super().__init__(records, client.host, client.port)
        self._log = records
        self._local = pair_member(local[0], local[1])
        self._peer: str | None = None
        """The proxy that has named the client; it may have named itself."""
        self._version: Version | None = None
        """The client's version of SOCKS, once it has authenticated or need not."""
        self._request: tuple[str, str, str, int] | tuple[None, None, None, None] = (None, None, None, None)
        self._destination: str | None = None
        self._user: str | None = None
        self.tried_user: str | None = None
        """The user with whom the client failed to log in."""
        self.decision: Decision | None = None
        """The decision on the request, until it is connected: it may have hundreds of candidates."""
        self._rule: str | None = None
        """The rule or setting that has denied it; once it is connected, the rule that allowed it."""
        self._pool: str | None = None
        """The egress pool of a connection."""

    # ---- the client

    def named(self, client: Client) -> None:
        """The peer is a proxy, and has named this client in a PROXY header."""
        self._peer = self._client
        self._client = pair_member(client.host, client.port)

    def peer_denied(self) -> None:
        """The peer is not a proxy that may name clients."""
        self._turned_away("peer is not trusted", TRUSTED)

    def client_denied(self) -> None:
        """The client's address may not use this server."""
        self._turned_away("denied access", ALLOW_FROM)

    def _turned_away(self, message: str, setting: str) -> None:
        self._count(None, _CLIENT_DENIED)
        self._log.denied.labels(setting).value += 1
        self.event(logging.WARNING, message, error=f"not in {setting}")

    # ---- the handshake

    def authenticated(self, client: Client) -> None:
        """This client's user name and password are accepted, perhaps without a check."""
        self._user = client.user
        self._version = Version.SOCKS5
        self._log.authenticated[Method.USERNAME_PASSWORD, _SUCCESS].value += 1

    def requested(self, request: Request, method: Method | None) -> None:
        """The client has said where it wants to go, after SOCKS5 authentication by `method`."""
        version = self._version = request.version
        self._request = (_PROTOCOLS[version], _COMMANDS[request.command], request.host, request.port)
        if version is _SOCKS5:
            records = self._log
            if method is _NO_AUTHENTICATION:
                records.unauthenticated.value += 1
            records.address_read[request.address_type, _SUCCESS].value += 1

    def probed(self) -> None:
        """The client has only asked whether this is a usocksd, which is logged at debug only."""
        self._log.probes.value += 1
        self.event(logging.DEBUG, "probed")

    def misspoke(self, fault: ClientFault, server: Server, *, news: bool = True) -> None:
        """The client did not speak SOCKS, or not correctly. `server` has the state of its handshake. Without `news` it
        is only counted.
        """
        self._count_fault(fault.kind, server.version, server.method)
        if news:
            # A connection closed without a word is a health check.
            level = logging.DEBUG if fault.kind is Kind.EOF else logging.WARNING
            tried = {} if self.tried_user is None else {"tried_user": self.tried_user}
            self.event(level, "handshake failed", error=str(fault), **tried)

    def timed_out(self, server: Server) -> None:
        """The client, or what it asked for, has taken too long."""
        self._gave_up(server, _TIMED_OUT, "timed out")

    def client_gone(self, server: Server, cause: str = "client is gone") -> None:
        """The client no longer waits for its connection, or can't be served."""
        self._gave_up(server, _GONE, cause)

    def _gave_up(self, server: Server, status: str, cause: str) -> None:
        self._count(server.version, status)
        self.event(logging.INFO, "handshake failed", **self._resolved(), error=cause)

    # ---- the request

    def refused(self, error: Error, reply: Reply) -> None:
        """The client is told that it can't have what it asked for."""
        self._count(self._version, _STATUSES[reply] if self._version is Version.SOCKS5 else _REJECTED)
        match error:
            case Denied():
                self._rule = error.rule
                self._log.denied.labels(error.rule).value += 1
                level, message = logging.WARNING, "ruleset mismatch"
            case CommandNotSupported():
                level, message = logging.WARNING, "command not supported"
            case _:
                self._log.not_connected(error)
                level, message = logging.ERROR, "dial to destination failed"
        self.event(level, message, **self._resolved(), error=str(error))

    def associated(self) -> None:
        """The client has a UDP association."""
        self._count(self._version, _GRANTED)

    def count_denied(self, rule: str) -> None:
        """This rule denies a destination of the client's datagrams."""
        self._log.denied.labels(rule).value += 1

    def starts(self, target: Target, bound: tuple[str, int]) -> None:
        """The destination is connected; `bound` is the outgoing socket's address."""
        self._destination = join_port(target.host, target.port)
        self._source = join_port(bound[0], bound[1])
        self._count(self._version, _GRANTED)
        at_start = None
        if (decision := self.decision) is not None:
            if decision.name is not None and decision.candidates is not None:
                at_start = decision.name, candidate_texts(decision.candidates)
            if decision.ruling is not None:
                self._rule, self._pool = decision.ruling.rule, decision.ruling.pool
            self.decision = None
        self._begin(at_start)

    def _resolved(self) -> dict[str, object]:
        """The name that was resolved or denied, and what the rules say to its addresses."""
        decision = self.decision
        if decision is None or decision.name is None:
            return {}
        if decision.candidates is None:
            return {} if self._rule is None else {"dest_name": decision.name}
        return {"dest_name": decision.name, "candidates": candidate_texts(decision.candidates)}

    def _rule_and_pool(self) -> tuple[str | None, str | None]:
        """The rule that decides, and the egress pool of an allowed connection."""
        if self._rule is not None or self.decision is None or self.decision.ruling is None:
            return self._rule, self._pool
        return self.decision.ruling.rule, self.decision.ruling.pool

    # ---- counters and fields

    def _count(self, version: Version | None, status: str) -> None:
        self._log.connections[version, status].value += 1

    def _count_fault(self, kind: Kind, version: Version | None, method: Method | None) -> None:
        records = self._log
        if version is None:
            self._count(None, _NO_REQUEST if kind is Kind.EOF else _NO_SOCKS)
        elif version is Version.SOCKS4:
            self._count(version, _REJECTED if kind in _REFUSED else _NO_ADDRESS)
        elif method is not Method.NO_AUTHENTICATION and self._version is None:
            self._count(version, _NOT_AUTHENTICATED)
            # (A probe tells no credentials but these.)
            tried = Method.USERNAME_PASSWORD if method is Method.PROBE else method
            records.authenticated[tried, _FAILURE].value += 1
        else:
            self._count(version, _REFUSED.get(kind, _NO_ADDRESS))
            if method is Method.NO_AUTHENTICATION:
                records.authenticated[method, _SUCCESS].value += 1
            records.address_read[None, _FAILURE].value += 1

    def values(self) -> tuple[object, ...]:
        protocol, command, host, port = self._request
        rule, pool = (self._rule, self._pool) if self.decision is None else self._rule_and_pool()
        return (
            self._id,
            self._client,
            self._peer,
            self._local,
            protocol,
            command,
            host,
            port,
            self._destination,
            self._source,
            self._user,
            rule,
            pool,
        )

    def _details(self) -> dict[str, Any]:
        rule, pool = self._rule_and_pool()
        return {
            "destination": self._destination,
            "name": self._request[2],
            "user": self._user,
            "rule": rule,
            "pool": pool,
            "egress": self._source,
            "upstream": None,
            "peer": self._peer,
        }


def candidate_texts(candidates: list[Candidate]) -> list[str]:
    """["203.0.113.80 allowed default", "10.0.0.1 denied RULE"], which records.py reads."""
    return [f"{one.host} {'allowed' if one.ruling.allowed else 'denied'} {one.ruling.rule}" for one in candidates]
