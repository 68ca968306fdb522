"""The truth instead of reading rules: one connection to an address that nobody has, and who accepts it."""

from __future__ import annotations

import errno
import socket
from collections.abc import Iterator
from ipaddress import ip_address

from transocks.doctor.finding import Finding, fault, fine, unchecked, warning
from transocks.doctor.flows import EXAMPLES, Flows, Mode, ports
from transocks.doctor.seen import Seen
from transocks.netfilter.ruleset import Kind, Version
from transocks.sockets import connections
from usocksd.runtime.hostport import join_port

_NAME = "probe"
_PORT = 443
_PATIENCE = 3.0
# transocks may have refused it again before anybody could look.
_TRIES = 3


def probe(seen: Seen, flows: Flows) -> Iterator[Finding]:
    """From this host, as this user; for what is routed through, only a client can tell."""
    if seen.ruleset is not None and flows.targets and not flows.has(Mode.HOST):
        yield unchecked(_NAME, "the rules are for what is routed through: try it on a client", _for_a_client(seen))
        return
    version: Version
    for version in (4, 6):
        if version in seen.uplinks or flows.has(Mode.HOST, version=version):
            yield _try(seen, version)


def _for_a_client(seen: Seen) -> str:
    return f"curl -v --connect-timeout 5 https://{EXAMPLES[4][0]}/ there, and look for it in transocks's log"


def _try(seen: Seen, version: Version) -> Finding:
    address = EXAMPLES[version][0]
    to = join_port(address, _PORT)
    for _ in range(_TRIES):
        with socket.socket(socket.AF_INET if version == 4 else socket.AF_INET6) as sock:
            sock.settimeout(_PATIENCE)
            try:
                sock.connect((str(address), _PORT))
                port = _accepted_at(sock)
            except TimeoutError:
                return fault(_NAME, f"a connection to {to} got no answer: nobody redirected it", "look at `rules`")
            except OSError as error:
                return _failed(to, error)
        if port is None:
            continue
        if port in ports(seen, Kind.REDIRECT):
            return fine(_NAME, f"a connection to {to} was accepted at port {port} of this host")
        return fault(_NAME, f"a connection to {to} was accepted at port {port} of this host", "look at `rules`")
    return warning(_NAME, f"somebody accepts connections to {to}, and nobody has that address", "see transocks's log")


def _failed(to: str, error: OSError) -> Finding:
    if error.errno == errno.ECONNREFUSED:
        return fault(_NAME, f"a connection to {to} was refused", "start transocks, or look at `listeners`")
    there_is_none = error.errno in {errno.ENETUNREACH, errno.EHOSTUNREACH}
    return fault(
        _NAME, f"a connection to {to} was not redirected: {error.strerror}",
        f"look at `{'routes' if there_is_none else 'rules'}`",
    )  # fmt: skip


def _accepted_at(sock: socket.socket) -> int | None:
    """The local port of the other end of this connection, if that is on this host."""
    host, port = sock.getsockname()[:2]
    here = ip_address(host), port
    return next((local for local, peer in connections(sock.family) if peer == here), None)
