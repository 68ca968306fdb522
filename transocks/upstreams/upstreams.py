"""All upstreams of a configuration, in their groups: those that it lists, and those that DNS tells of."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from functools import partial
from typing import Any

from transocks.config import GroupConfig, HealthConfig
from transocks.direct import Direct
from transocks.upstreams.discovery import Member, Membership
from transocks.upstreams.group import Place, UpstreamGroup
from transocks.upstreams.health import Health
from transocks.upstreams.proxy_url import ProxyURL
from transocks.upstreams.upstream import Upstream, UpstreamMetrics
from usocksd.log.metrics import Metrics
from usocksd.names.resolver import Resolver
from usocksd.net.address import HostPort
from usocksd.net.dial import Dialer


class Upstreams:
    """All upstreams, each once, in their groups; and their health."""

    def __init__(
        self,
        groups: Mapping[str, GroupConfig],
        health: HealthConfig,
        *,
        dialer: Dialer,
        resolver: Resolver,
        mark: int | None,
        fast_open: bool,
        direct: Direct,
        share: Callable[[Any], None],
        metrics: Metrics,
    ) -> None:
        """`share`: see Health."""
        measured = UpstreamMetrics(metrics)
        self._make = partial(
            Upstream, dialer=dialer, resolver=resolver, mark=mark, fast_open=fast_open, metrics=measured
        )
        # The same proxy with other credentials, or with PROXY headers, counts as another upstream.
        self._all: dict[tuple[ProxyURL, bool], Upstream] = {}
        self.health = Health(health, share, measured, clock=dialer.reactor.clock)
        self.groups: dict[str, UpstreamGroup] = {}
        self.memberships: list[Callable[..., Awaitable[None]]] = []
        """Tasks that follow names whose upstreams DNS tells of. They say `task_status.started()`."""
        for name, group in groups.items():
            listed = [url for url in group.proxy_url if url.discovery is None]
            upstreams = [self._upstream(url, group.proxy_protocol) for url in listed]
            self.groups[name] = made = UpstreamGroup(name, group, upstreams, direct, measured)
            for url in group.proxy_url:
                if url.discovery is not None:
                    changed = partial(self._found, made, group.proxy_protocol)
                    self.memberships.append(Membership(url, resolver, changed).run)
        for upstream in self._all.values():
            self.health.add(upstream)
        self._parts: list[frozenset[HostPort]] = []
        self._addresses: frozenset[HostPort] = frozenset()

    def _upstream(self, url: ProxyURL, proxied: bool) -> Upstream:
        """The upstream with this URL, and with PROXY headers or without; a new one if there is none."""
        there = self._all.get((url, proxied))
        if there is None:
            user = "" if url.username is None else f"{url.username}@"
            key = f"{user}{url}{' PROXY' if proxied else ''}"
            there = self._all[url, proxied] = self._make(
                url,
                name=_new(str(url), {each.name for each in self._all.values()}),
                key=_new(key, {each.key for each in self._all.values()}),
                proxy_protocol=proxied,
            )
        return there

    def _found(self, group: UpstreamGroup, proxied: bool, members: Sequence[Member]) -> None:
        """DNS tells that these are the upstreams of this group. Those that stay keep what is known of them."""
        before, known = group.upstreams, set(self._all.values())
        group.found([Place(self._upstream(each.url, proxied), each.priority, each.weight) for each in members])
        for upstream in group.upstreams:
            if upstream not in known:
                self.health.add(upstream)
        used = {upstream for each in self.groups.values() for upstream in each.upstreams}
        for upstream in before:
            if upstream not in used:
                self.health.remove(upstream)
                self._all = {key: each for key, each in self._all.items() if each is not upstream}

    @property
    def addresses(self) -> frozenset[HostPort]:
        """The addresses of all upstreams, as they are known now."""
        parts = [upstream.addresses for upstream in self._all.values()]
        if parts != self._parts:
            self._parts, self._addresses = parts, frozenset().union(*parts)
        return self._addresses

    def status(self) -> dict[str, object]:
        """All groups as JSON values, for operators."""
        return {name: group.status() for name, group in self.groups.items()}


def _new(text: str, taken: Collection[str]) -> str:
    """`text`, with a number behind it if it is taken."""
    found = text
    number = 1
    while found in taken:
        number += 1
        found = f"{text} ({number})"
    return found
