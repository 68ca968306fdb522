"""Puts usocksd together from its configuration, and collects the warnings and notes about that."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from usocksd.access_log import AccessLog
from usocksd.association import Means
from usocksd.auth import Users
from usocksd.bind import Binder
from usocksd.clients import ClientRules
from usocksd.config import UsocksdConfig
from usocksd.decision import Policy
from usocksd.dnsbl import Listings, Lookups
from usocksd.egress import EgressPools, Pool
from usocksd.errors import ConfigError
from usocksd.explain import Explainer
from usocksd.host.addresses import HostAddresses
from usocksd.lint import lint
from usocksd.log.metrics import Metrics
from usocksd.names.resolver import Resolver, make_resolver
from usocksd.net.address import IPAddress
from usocksd.net.dial import Dialer, check_mark
from usocksd.net.keepalive import KeepAlive
from usocksd.net.limits import most_name_sockets, most_pipes, most_spare
from usocksd.net.pipes import PipePool
from usocksd.notes import notes
from usocksd.proxied import ProxiedListener
from usocksd.serve.daemon import Application, Parts, Remarks
from usocksd.session import SocksSessions
from usocksd.settings.files import read_file
from usocksd.udp import UDPService


def examine(config: UsocksdConfig, source: str | None) -> Remarks:
    """Warnings and notes; with `source`, its file, also about that and about the file of users."""
    users, error = None, None
    try:
        users = make_users(config)
    except ConfigError as raised:
        error = raised

    def policy() -> Policy:
        return make_policy(config, users, HostAddresses().is_local)

    names = None if users is None else users.names
    found = notes(config, None if error else policy)
    return Remarks(lint(config, names), found, None if source is None else error)


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
    resolver = make_resolver(
        config.dns, parts.metrics, sockets=most_name_sockets(parts.descriptors), mark=config.outgoing.mark
    )
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
        udp=make_udp(config, parts, policy, egress, resolver) if config.udp.enabled else None,
        binder=make_binder(config, parts) if config.bind.enabled else None,
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


def make_udp(
    config: UsocksdConfig, parts: Parts, policy: Policy, egress: EgressPools, resolver: Resolver
) -> UDPService:
    """UDP ASSOCIATE as [udp] has it."""
    udp = config.udp
    means = Means(
        policy.rules,
        egress,
        resolver,
        parts.associations,
        config.timeouts.connect,
        udp.idle,
        udp.queue,
        udp.filtering == "any",
    )
    return UDPService(
        means,
        ports=udp.ports,
        public=udp.public,
        per_client=parts.tally(b"udp", udp.per_client),
        reply_within=config.timeouts.handshake,
    )


def make_binder(config: UsocksdConfig, parts: Parts) -> Binder:
    """BIND as [bind] has it."""
    strangers = parts.metrics.counter("bind_strangers_total", "Connections to a BIND from others than its peer, reset")
    return Binder(ports=config.bind.ports, wait=config.bind.wait, strangers=strangers)


def make_users(config: UsocksdConfig, read: Callable[[Path], bytes] = read_file) -> Users | None:
    """The users; None: no authentication. `read` reads the file. Raises ConfigError for a bad one."""
    return Users(config.auth.users_file, read=read) if config.auth.users_file else None


def make_policy(config: UsocksdConfig, users: Users | None, is_local: Callable[[IPAddress], bool]) -> Policy:
    """All that decides about requests. `is_local` tells this host's addresses. A million entries take seconds."""
    in_front = config.incoming.proxy_protocol
    return Policy(
        ClientRules(config.incoming.allow_from or ()),
        config.access_rules(is_local),
        None if users is None else users.names,
        config.auth.required,
        None if in_front is None else ClientRules(in_front.trusted),
    )


def make_egress(config: UsocksdConfig, hosts: HostAddresses, metrics: Metrics) -> tuple[EgressPools, Listings]:
    """The pools, and what can be left from."""
    configured = config.pools()
    pools = {
        name: Pool(tuple(dict.fromkeys(pool.addresses)), pool.iface, pool.mark, pool.sticky, pool.when_all_listed)
        for name, pool in configured.items()
    }
    domains = {name: pool.dnsbl_domains for name, pool in configured.items()}
    listings = Listings(pools, domains, hosts, metrics)
    return EgressPools(pools, listings.usable), listings
