"""Puts transocks together from its configuration, and collects the warnings about that."""

from __future__ import annotations

from transocks.access_log import AccessLog
from transocks.config import TransocksConfig
from transocks.direct import Direct
from transocks.first_bytes import FirstBytes
from transocks.lint import lint
from transocks.original_dst import LoopGuard
from transocks.routes import DIRECT
from transocks.session import RedirectedSessions
from transocks.udp.association import Means
from transocks.udp.transparent import TransparentUdp
from transocks.upstreams.group import UpstreamGroup
from transocks.upstreams.upstreams import Upstreams
from usocksd.errors import Error
from usocksd.host.addresses import HostAddresses
from usocksd.names.resolver import make_resolver
from usocksd.net.dial import Dialer, check_mark
from usocksd.net.keepalive import KeepAlive
from usocksd.net.limits import most_name_sockets, most_pipes, most_spare
from usocksd.net.pipes import PipePool
from usocksd.serve.daemon import Application, Parts, Remarks


def examine(config: TransocksConfig, source: str | None) -> Remarks:
    """Warnings about the configuration; with `source`, also about that file."""
    return Remarks(lint(config, source))


def build(config: TransocksConfig, parts: Parts) -> Application:
    """Put transocks together. Raises Error when it can't serve."""
    check_mark(config.mark)
    if config.listen_tproxy and not parts.transparent:
        raise Error(
            "listen_tproxy: none of the sockets has IP_TRANSPARENT; sockets of systemd need Transparent=yes in"
            " their unit"
        )
    hosts = HostAddresses(parts.metrics)
    resolver = make_resolver(config.dns, parts.metrics, sockets=most_name_sockets(parts.descriptors), mark=config.mark)
    dialer = Dialer(parts.reactor, spare=most_spare(parts.descriptors))
    direct = Direct(dialer=dialer, resolver=resolver, mark=config.mark, is_local=hosts.is_local)
    upstreams = Upstreams(
        config.groups(),
        config.health,
        dialer=dialer,
        resolver=resolver,
        mark=config.mark,
        fast_open=config.fast_open,
        direct=direct,
        share=parts.share,
        metrics=parts.metrics,
    )
    parts.shared(upstreams.health.take)
    guard = LoopGuard(
        listen_ports=parts.ports,
        hosts=hosts,
        upstreams=lambda: upstreams.addresses,
        # No destination gets more than half: if no other check notices a loop, it ends at half the descriptors.
        most_per_destination=max(parts.connections // 2, 1),
    )
    routes = config.routes()
    keepalive = KeepAlive(config.timeouts.keepalive)
    ways: dict[str, UpstreamGroup | Direct] = {**upstreams.groups, DIRECT: direct}
    access_log = AccessLog(parts.log, parts.metrics, routes.names)
    sessions = RedirectedSessions(
        guard=guard,
        first_bytes=FirstBytes(config.names),
        routes=routes,
        ways=ways,
        names=config.names,
        pipes=PipePool(most_pipes(parts.descriptors)),
        timeouts=config.timeouts,
        keepalive=keepalive,
        access_log=access_log,
    )
    application = Application(
        sessions.serve,
        (hosts.watch, resolver.run, *upstreams.memberships, upstreams.health.run),
        close=guard.close,
        keeping=(upstreams.health.keep,),
        keepalive=keepalive,
        status=lambda: {"upstreams": upstreams.status(), "udp": bool(config.listen_udp)},
    )
    if not config.listen_udp:
        return application
    udp = TransparentUdp(
        config.listen_udp,
        means=Means(
            udp=config.udp,
            timeouts=config.timeouts,
            mark=config.mark,
            counters=parts.associations,
            keepalive=keepalive,
        ),
        reactor=parts.reactor,
        begin=parts.begin,
        guard=LoopGuard(
            listen_ports={listen.port for listen in config.listen_udp},
            hosts=hosts,
            upstreams=lambda: upstreams.addresses,
            most_per_destination=0,
            udp=True,
        ),
        routes=routes,
        ways=ways,
        is_local=hosts.is_local,
        access_log=access_log,
    )

    def close() -> None:
        udp.close()
        guard.close()

    return application._replace(open=udp.open, shut=udp.shut, close=close)
