"""Do queries reach the name servers: by UDP, as applications ask, and by TCP, as transocks may have to?"""

from __future__ import annotations

import socket
from collections.abc import Iterator
from ipaddress import ip_address
from pathlib import Path

import attrs

from transocks.doctor.finding import Finding, fault, fine, unchecked, warning
from transocks.doctor.host import AS_ROOT, Host
from transocks.rules.loops import Sender
from transocks.tools import FirewallError
from transocks.tracing.reports import UDP
from transocks.tracing.samples import EXAMPLES, Sample
from transocks.tracing.sockets import NOBODY, socket_of
from usocksd.names.resolv_conf import PORT, RESOLV_CONF, parse
from usocksd.net.address import IPAddress, numeric_address, socket_address

# The servers of systemd-resolved, where resolv.conf has only itself.
_RESOLVED = Path("/run/systemd/resolve/resolv.conf")
_QUESTION = bytes.fromhex("7473 0100 0001 0000 0000 0000 00 0002 0001")  # the name servers of the root: RFC 1035
_PATIENCE = 1.5  # seconds


def resolver(host: Host) -> Iterator[Finding]:
    """Long answers come over TCP: if that is redirected, resolving an upstream's name needs the upstream itself."""
    if host.tracer is None:
        yield unchecked("resolver", host.why, AS_ROOT)
    if host.tracer is None or host.client is not None:
        return
    own = [ip_address(server.host) for server in host.config.dns.servers or ()]
    daemon = attrs.evolve(host.daemon, marks=None)  # sockets to name servers do not have the mark
    named = [proxy.host for proxy in host.proxies if isinstance(proxy.host, str) and proxy.host != "localhost"]
    for server, who in _over_tcp(host, own or _listed(RESOLV_CONF), daemon):
        if (rule := host.comes_back(host.open(who, server, PORT))) is not None:
            text = f"queries to {server} over TCP are redirected to transocks: {rule}"
            do = "leave out TCP port 53 in the rules, as the rule files do, or exempt transocks by its user"
            if named:
                yield fault("resolver", f"{text}; it needs them to find {named[0]}", do)
            else:
                yield warning("resolver", f"{text}; names need the proxy then", do)
            return
    for server in dict.fromkeys([*own, *_listed(RESOLV_CONF)]):
        if (rule := host.comes_back(host.open(host.daemon, server, PORT, UDP))) is not None:
            text = f"transocks's own queries to {server} are redirected to it: {rule}"
            yield fault("resolver", text, "exempt them by mark, or transocks by its user")
            return
        for who in (NOBODY, daemon):
            if (why := _stopped(host, server, who)) is not None and not _answers(server, who):
                do = "take that rule out, or let somebody answer there"
                yield fault("resolver", f"queries to {server} over UDP get no answer: {why}", do)
                return
    yield fine("resolver", "nothing on this host keeps queries from name servers")


def _over_tcp(host: Host, servers: list[IPAddress], daemon: Sender) -> Iterator[tuple[IPAddress, Sender]]:
    """Each name server and its client: transocks, or a forwarder on this host, which runs as another user."""
    for server in servers:
        if host.is_local(server):
            yield from ((forwarded, NOBODY) for forwarded in _listed(_RESOLVED) or [EXAMPLES[4][0]])
        else:
            yield server, daemon


def _stopped(host: Host, server: IPAddress, who: Sender) -> str | None:
    """What stops a query to this server, or sends it elsewhere."""
    trace = host.try_out(Sample(destination=server, port=PORT, protocol=UDP, who=who)).trace
    if trace is not None and trace.stop is None and trace.turn is not None and trace.turn.to is not None:
        return f"{host.names.of(trace.turn.cause)} sends it to port {trace.turn.to[1]} of {trace.turn.to[0]}"
    return host.stop(trace)


def _answers(server: IPAddress, who: Sender) -> bool:
    """Whether a real query is answered: it may be redirected on purpose."""
    try:
        with socket_of(who, server.version, socket.SOCK_DGRAM) as sock:
            sock.settimeout(_PATIENCE)
            sock.connect(socket_address(str(server), PORT))
            sock.send(_QUESTION)
            return bool(sock.recv(4096))
    except (OSError, FirewallError):
        return False


def _listed(file: Path) -> list[IPAddress]:
    """The name servers in a resolv.conf."""
    try:
        return [numeric_address(server) for server in parse(file.read_text("utf-8", "replace")).servers]
    except OSError:
        return []
