"""usocksd without a verb: what the daemon is made of."""

from __future__ import annotations

import logging

from usocksd import __version__
from usocksd.access_log import AccessLog
from usocksd.acl import AccessRules, ClientRules
from usocksd.addresses import HostAddresses
from usocksd.auth import Users
from usocksd.config import Config
from usocksd.egress import EgressPool
from usocksd.lint import warnings
from usocksd.resolver import Resolver
from usocksd.runtime.dial import check_mark
from usocksd.runtime.limits import most_pipes
from usocksd.runtime.pipes import PipePool
from usocksd.runtime.processes.plan import Built, Parts, Plan, make_plan
from usocksd.session import Sessions

log = logging.getLogger(__name__)


def plan(config: Config) -> Plan:
    """What the master needs to know."""
    return make_plan(config.common(), version=__version__, warnings=warnings(config))


def build(config: Config, parts: Parts) -> Built:
    """Put usocksd together. Raises Error when it can't serve."""
    outgoing = config.outgoing
    check_mark(outgoing.mark)
    hosts = HostAddresses()
    resolver = Resolver(config.dns.servers, parts.metrics)
    sessions = Sessions(
        clients=ClientRules(config.incoming.allow_from or ()),
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
        pipes=PipePool(most_pipes(parts.descriptors)),
        timeouts=config.timeouts,
        access_log=AccessLog(parts.log, parts.metrics),
    )
    return Built(sessions.serve, (hosts.watch, resolver.run))
