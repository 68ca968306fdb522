"""usocksd.toml as typed values. deploy/usocksd.toml tells the operator what each setting does.

The tables [log], [incoming] and [outgoing] are those of the original usocksd, with the same meaning.
"""

from __future__ import annotations

from typing import Annotated

import attrs

from usocksd.acl import DEFAULT_CLIENTS, site_fault
from usocksd.match import IPNetwork, canonical_host, parse_network
from usocksd.runtime.common import Common
from usocksd.runtime.config import Distinct, Invalid
from usocksd.runtime.settings import (
    ANY_ADDRESS,
    LOCALHOST,
    DnsConfig,
    HostIP,
    Interface,
    LimitsConfig,
    ListenAddress,
    ListenIP,
    ListenPort,
    LogConfig,
    Mark,
    ReadableFile,
    SocketPath,
    Timeouts,
    Workers,
    check_distinct_address,
    none_if_empty,
    text,
)


def _site(value: str) -> str:
    """An entry of a site list, as the operator wrote it: the log names rules by this text."""
    fault = site_fault(value)
    if fault is not None:
        raise Invalid(fault)
    return value


def _dnsbl_domain(value: str) -> str | None:
    if value == "":  # how the original's configuration says none
        return None
    host = canonical_host(value)
    if not isinstance(host, str):
        raise ValueError
    return host


Site = Annotated[str, text(_site, 'a host or a domain, as in "www.example.com" or ".example.com"')]
Network = Annotated[IPNetwork, text(parse_network, 'a network or an IP address, as in "10.0.0.0/8" or "192.0.2.1"')]


@attrs.frozen(kw_only=True)
class Incoming:
    """[incoming]: where clients connect, and which of them may."""

    port: ListenPort = 1080
    metrics_port: ListenPort | None = None
    """None: 1082 if nobody else has it; 0: no metrics endpoint"""
    metrics_address: ListenIP = LOCALHOST[0]
    addresses: Annotated[tuple[ListenIP, ...], Distinct(check_distinct_address)] | None = attrs.field(
        default=None, converter=none_if_empty
    )
    """None: all interfaces"""
    allow_from: tuple[Network, ...] | None = attrs.field(default=None, converter=none_if_empty)
    """None: loopback and private networks only (the original: everybody). An empty list says the same."""

    @property
    def listen(self) -> tuple[ListenAddress, ...]:
        """The addresses to listen on; for all interfaces the wildcards of both families, each optional."""
        if self.addresses is None:
            return tuple(ListenAddress(address, self.port, optional=True) for address in ANY_ADDRESS)
        return tuple(ListenAddress(address, self.port) for address in self.addresses)


@attrs.frozen(kw_only=True)
class Outgoing:
    """[outgoing]: which destinations are allowed, and from where they are dialled.

    The entries of the site lists are valid, and as they were written: log records name rules by them.
    """

    allow_sites: tuple[Site, ...] = ()
    deny_sites: tuple[Site, ...] = ()
    deny_ports: tuple[ListenPort, ...] = ()
    iface: Interface = None
    addresses: tuple[HostIP, ...] = ()
    dnsbl_domain: Annotated[str | None, text(_dnsbl_domain, 'a domain, as in "dnsbl.example.org"')] = None
    """Accepted so that the original's files load. Nothing reads it until DNSBL lookups are there."""
    mark: Mark | None = None


@attrs.frozen(kw_only=True)
class Auth:
    """[auth]: users. Without `users_file` (htpasswd, bcrypt) there is no authentication.

    `required`: clients that don't offer username and password are refused. Default: true when there are
    users.
    """

    users_file: ReadableFile | None = None
    required: bool = attrs.field(default=attrs.Factory(lambda self: self.users_file is not None, takes_self=True))

    def __attrs_post_init__(self) -> None:
        if self.required and self.users_file is None:
            raise Invalid("expected users_file to name the users who may authenticate", shown="true", at="required")


@attrs.frozen(kw_only=True)
class Config:
    """The whole of usocksd.toml; every table has defaults, so an empty file is a configuration."""

    log: LogConfig = attrs.field(factory=LogConfig)
    incoming: Incoming = attrs.field(factory=Incoming)
    outgoing: Outgoing = attrs.field(factory=Outgoing)
    auth: Auth = attrs.field(factory=Auth)
    dns: DnsConfig = attrs.field(factory=DnsConfig)
    timeouts: Timeouts = attrs.field(factory=Timeouts)
    limits: LimitsConfig = attrs.field(factory=LimitsConfig)
    workers: Workers | None = None
    """None: one for each CPU that this process may use"""
    control: SocketPath = "/run/usocksd/control.sock"
    """None: no control socket"""

    def common(self) -> Common:
        """The settings that transocks has too."""
        incoming = self.incoming
        allow_from = DEFAULT_CLIENTS if incoming.allow_from is None else tuple(map(str, incoming.allow_from))
        return Common(
            listen=tuple(
                ("incoming.port" if incoming.addresses is None else f"incoming.addresses[{index}]", listen)
                for index, listen in enumerate(incoming.listen)
            ),
            metrics_prefix="incoming.",
            metrics_port=incoming.metrics_port,
            metrics_default=1082,
            metrics_address=incoming.metrics_address,
            mark_key="outgoing.mark",
            mark=self.outgoing.mark,
            log=self.log,
            timeouts=self.timeouts,
            limits=self.limits,
            workers=self.workers,
            control=self.control,
            control_default="/run/usocksd/control.sock",
            more={
                "incoming.allow_from": allow_from,
                "outgoing.addresses": tuple(map(str, self.outgoing.addresses)),
                "auth.required": self.auth.required,
            },
        )


__all__ = ["Auth", "Config", "Incoming", "Outgoing"]
