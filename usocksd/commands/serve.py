"""usocksd without a verb: what the daemon is made of."""

from __future__ import annotations

from usocksd.access_log import AccessLog
from usocksd.commands.parts import make_egress, make_policy, make_users
from usocksd.config import UsocksdConfig
from usocksd.dnsbl import Lookups
from usocksd.explain import Explainer
from usocksd.host.addresses import HostAddresses
from usocksd.names.resolver import make_resolver
from usocksd.net.dial import Dialer, check_mark
from usocksd.net.keepalive import KeepAlive
from usocksd.net.limits import most_name_sockets, most_pipes, most_spare
from usocksd.net.pipes import PipePool
from usocksd.proxied import ProxiedListener
from usocksd.serve.daemon import Application, Parts
from usocksd.session import SocksSessions


def build(config: UsocksdConfig, parts: Parts) -> Application:
    """Put usocksd together. Raises Error when it can't serve."""
    for pool in config.pools().values():
        check_mark(pool.mark)
    hosts = HostAddresses(parts.metrics)
    users = make_users(config, parts.read)
    policy = make_policy(config, users, hosts.is_local)
    egress, listings = make_egress(config, hosts, parts.metrics)
    parts.shared(listings.take)
    lookups = Lookups(listings, parts.share, config.dns.servers, parts.metrics)
    resolver = make_resolver(config.dns, parts.metrics, sockets=most_name_sockets(parts.descriptors))
    in_front, proxied = config.incoming.proxy_protocol, None
    if in_front is not None and policy.trusted is not None:
        proxied = ProxiedListener(in_front.port, policy.trusted, policy.clients, parts.count_as)
    keepalive = KeepAlive(config.timeouts.keepalive)
    sessions = SocksSessions(
        policy=policy,
        users=users,
        resolver=resolver,
        egress=egress,
        dialer=Dialer(parts.reactor, spare=most_spare(parts.descriptors)),
        pipes=PipePool(most_pipes(parts.descriptors)),
        timeouts=config.timeouts,
        keepalive=keepalive,
        access_log=AccessLog(parts.log, parts.metrics),
        proxied=proxied,
    )
    explainer = Explainer(policy, resolver, egress, listings, config.timeouts.connect)
    return Application(
        sessions.serve,
        (hosts.watch, resolver.run),
        keeping=(lookups.run,),
        verbs={"explain": explainer.explain},
        proxied=() if proxied is None else (proxied.port,),
        keepalive=keepalive,
        status=lambda: {"pools": listings.status()},
    )
