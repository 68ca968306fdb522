"""What several verbs make of a configuration."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from usocksd.auth import Users
from usocksd.clients import ClientRules
from usocksd.config import UsocksdConfig
from usocksd.decision import Policy
from usocksd.dnsbl import Listings
from usocksd.egress import EgressPools, Pool
from usocksd.host.addresses import HostAddresses
from usocksd.log.metrics import Metrics
from usocksd.net.address import IPAddress
from usocksd.settings.files import read_file


def make_users(config: UsocksdConfig, read: Callable[[Path], bytes] = read_file) -> Users | None:
    """Who can authenticate; None: nobody is asked to. `read` reads the file. Raises ConfigError for a bad one."""
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


def policy_of(config: UsocksdConfig) -> Policy:
    """The same for one look, on this host as it is now. Raises ConfigError for a bad file of users."""
    return make_policy(config, make_users(config), HostAddresses().is_local)


def make_egress(config: UsocksdConfig, hosts: HostAddresses, metrics: Metrics) -> tuple[EgressPools, Listings]:
    """The pools, and what can be left from."""
    configured = config.pools()
    pools = {
        name: Pool(pool.addresses, pool.iface, pool.mark, pool.sticky, pool.when_all_listed)
        for name, pool in configured.items()
    }
    domains = {name: pool.dnsbl_domains for name, pool in configured.items()}
    listings = Listings(pools, domains, hosts, metrics)
    return EgressPools(pools, listings.usable), listings
