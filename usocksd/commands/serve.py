"""usocksd without a verb: the daemon, in the foreground."""

from __future__ import annotations

import logging

from usocksd.access_log import AccessLog
from usocksd.acl import AccessRules, ClientRules
from usocksd.addresses import HostAddresses
from usocksd.auth import Users
from usocksd.config import Config
from usocksd.egress import EgressPool
from usocksd.resolver import Resolver
from usocksd.runtime.dial import check_mark
from usocksd.runtime.limits import most_connections, most_pipes, raise_descriptor_limit
from usocksd.runtime.listeners import listen_all
from usocksd.runtime.log import Log
from usocksd.runtime.pipes import PipePool
from usocksd.runtime.reactor import Reactor
from usocksd.runtime.service import Service
from usocksd.session import Sessions

log = logging.getLogger(__name__)


async def serve(config: Config, sink: Log) -> None:
    """Run usocksd until it is told to stop. Raises Error when it can't start."""
    outgoing = config.outgoing
    descriptors = raise_descriptor_limit()
    hosts = HostAddresses()
    resolver = Resolver(config.dns.servers)
    clients = ClientRules(config.incoming.allow_from or ())
    sessions = Sessions(
        clients=clients,
        users=Users(config.auth.users_file) if config.auth.users_file else None,
        users_required=config.auth.required,
        rules=AccessRules.from_lists(
            allow_sites=outgoing.allow_sites,
            deny_sites=outgoing.deny_sites,
            deny_ports=outgoing.deny_ports,
            is_local=hosts.is_local,
        ),
        resolver=resolver,
        egress=EgressPool(outgoing.addresses, outgoing.iface, outgoing.mark),
        hosts=hosts,
        pipes=PipePool(most_pipes(descriptors)),
        timeouts=config.timeouts,
        access_log=AccessLog(sink),
    )
    reactor = Reactor()
    service = Service(
        reactor, most=most_connections(descriptors), stop_within=config.timeouts.stop, reopen_log=sink.reopen
    )
    check_mark(outgoing.mark)
    sockets = listen_all(config.incoming.listen)
    if clients.is_default:
        log.info("allow_from is not set: only clients on loopback, private and link-local networks are admitted")
    if outgoing.dnsbl_domain:
        log.warning("dnsbl_domain is set, and not looked at by this version: listed addresses are used")
    for address in outgoing.addresses:
        if not hosts.is_local(address):
            fields = {"address": str(address)}
            log.warning("an egress address is not on this host: not used until it is", extra={"fields": fields})
    await service.run(sockets, sessions.serve, hosts.watch, resolver.run)
