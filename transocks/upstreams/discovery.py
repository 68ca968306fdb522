"""Upstreams that DNS tells of: the servers of a service (SRV, RFC 2782), or all addresses of a name."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import NamedTuple

import attrs
import trio

from transocks.upstreams.proxy_url import Discovery, ProxyURL
from usocksd.errors import ResolveError
from usocksd.names.match import canonical_host
from usocksd.names.resolver import Resolver

log = logging.getLogger(__name__)

# Seconds. The resolver keeps addresses for as long as their TTL says, so it is asked more often than it asks.
_LOOK_AT_ADDRESSES_EVERY = 5.0
_TRY_AGAIN_AFTER = 5.0
# How long the start of a worker waits for the first answer.
_AT_START = 2.0


class Member(NamedTuple):
    """A proxy, and its place among the others of its group."""

    url: ProxyURL
    priority: int = 0
    """those with a lower one are preferred"""
    weight: int = 1
    """its share of the connections among those of the same priority; 0 is very little"""


class Membership:
    """Follows one name. `changed` gets the members whenever they are others than before.

    If no server answers, the last members stay. If the servers say that there are none, there are none.
    """

    def __init__(self, url: ProxyURL, resolver: Resolver, changed: Callable[[Sequence[Member]], None]) -> None:
        self._url = url
        self._resolver = resolver
        self._changed = changed
        self._members: tuple[Member, ...] | None = None
        self._problem = ""

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Until cancelled. The task has started with the first answer, or if it is late."""
        async with trio.open_nursery() as nursery:
            first = trio.Event()
            nursery.start_soon(self._follow, first)
            with trio.move_on_after(_AT_START):
                await first.wait()
            task_status.started()

    async def _follow(self, first: trio.Event) -> None:
        while True:
            pause = await self._look_up()
            first.set()
            await trio.sleep(pause)

    async def _look_up(self) -> float:
        """Returns the seconds until the next time."""
        try:
            members, pause = await members_of(self._url, self._resolver)
        except ResolveError as error:
            if str(error) != self._problem:
                self._problem = str(error)
                kept = None if error.absent or self._members is None else len(self._members)
                fields = {"upstream": str(self._url), "error": self._problem, "kept": kept}
                log.warning("upstreams can't be looked up", extra={"fields": fields})
            if error.absent:
                self._learn(())
            return _TRY_AGAIN_AFTER
        self._problem = ""
        self._learn(members)
        return pause

    def _learn(self, members: tuple[Member, ...]) -> None:
        if members == self._members:
            return
        before, now = ({str(each.url) for each in some or ()} for some in (self._members, members))
        self._members = members
        fields = {"upstream": str(self._url), "added": sorted(now - before), "removed": sorted(before - now)}
        log.info("upstreams changed", extra={"fields": fields})
        self._changed(members)


async def members_of(url: ProxyURL, resolver: Resolver) -> tuple[tuple[Member, ...], float]:
    """The members now, in a stable order, and for how many seconds they are valid. Raises ResolveError."""
    assert isinstance(url.host, str)
    plain = attrs.evolve(url, discovery=None)
    if url.discovery is Discovery.ADDRESSES:
        addresses = await resolver.search(url.host)
        found = {Member(attrs.evolve(plain, host=address)) for address in addresses}
        return tuple(sorted(found, key=str)), _LOOK_AT_ADDRESSES_EVERY
    records, valid = await resolver.services(url.host)
    found = {
        Member(attrs.evolve(plain, host=canonical_host(each.target), port=each.port), each.priority, each.weight)
        for each in records
    }
    return tuple(sorted(found, key=lambda member: (member.priority, str(member.url)))), valid
