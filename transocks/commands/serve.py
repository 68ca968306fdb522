"""transocks without a verb: the daemon, in the foreground."""

from __future__ import annotations

from contextlib import closing

from transocks.access_log import AccessLog
from transocks.config import Config
from transocks.original_dst import LoopGuard
from transocks.session import Sessions
from transocks.upstream import Upstream
from usocksd.addresses import HostAddresses
from usocksd.resolver import Resolver
from usocksd.runtime.dial import check_mark
from usocksd.runtime.limits import most_connections, most_pipes, raise_descriptor_limit
from usocksd.runtime.listeners import listen_all
from usocksd.runtime.log import Log
from usocksd.runtime.pipes import PipePool
from usocksd.runtime.reactor import Reactor
from usocksd.runtime.service import Service


async def serve(config: Config, sink: Log) -> None:
    """Run transocks until it is told to stop. Raises Error when it can't start."""
    hosts = HostAddresses()
    resolver = Resolver(config.dns.servers)
    upstream = Upstream(config.proxy_url, resolver=resolver, mark=config.mark)
    check_mark(config.mark)
    sockets = listen_all(config.listen)
    descriptors = raise_descriptor_limit()
    most = most_connections(descriptors)
    guard = LoopGuard(
        listen_ports={sock.getsockname()[1] for sock in sockets},
        hosts=hosts,
        upstreams=lambda: upstream.addresses,
        # No destination takes it all: with none of the other checks in force, a loop ends at half the descriptors.
        most_per_destination=max(most // 2, 1),
    )
    sessions = Sessions(
        guard=guard,
        upstream=upstream,
        pipes=PipePool(most_pipes(descriptors)),
        timeouts=config.timeouts,
        access_log=AccessLog(sink),
    )
    reactor = Reactor()
    service = Service(reactor, most=most, stop_within=config.timeouts.stop, reopen_log=sink.reopen)
    with closing(guard):
        await service.run(sockets, sessions.serve, hosts.watch, resolver.run)
