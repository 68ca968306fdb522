"""Which egress addresses are on DNS block lists (RFC 5782), and which ones are usable.

One worker, the keeper, runs `Lookups` and shares the result. Every worker has `Listings`, which takes the result and
tells which addresses are usable right now.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path
from typing import Any, NamedTuple

import dns.name
import dns.reversename
import trio

from usocksd.egress import Pool, Usable, covers
from usocksd.errors import ResolveError
from usocksd.host.addresses import HostAddresses
from usocksd.log.metrics import Metrics
from usocksd.names.name_servers import NameServers
from usocksd.net.address import HostPort, IPAddress, numeric_address

_logger = logging.getLogger("usocksd.dnsbl")

# An answer in the first network is a listing. With one in the second, a list refuses to answer (after too many queries,
# or queries through an open resolver): https://www.spamhaus.org/faqs/dnsbl-usage/
_LISTED = IPv4Network("127.0.0.0/8")
_ERRORS = IPv4Network("127.255.255.0/24")

# The least seconds between two queries for one address, whatever the TTL.
_SHORTEST, _LONGEST = 5.0, 3600.0
_NEGATIVE_WITHOUT_SOA = 300.0
_AFTER_FAILURE = 30.0
_LIFETIME = 5.0
_AT_ONCE = 16


class Listing(NamedTuple):
    """An address, and the domain of a list that it is on, or may be on."""

    address: IPAddress
    domain: str


def query_name(listing: Listing) -> dns.name.Name:
    """The name to query: the octets or nibbles in reverse, then the domain (RFC 5782 sections 2.1, 2.4)."""
    origin = dns.name.from_text(listing.domain)
    return dns.reversename.from_address(str(listing.address), v4_origin=origin, v6_origin=origin)


def verdict(answers: Iterable[str]) -> bool | None:
    """Whether these addresses, the answer to a query, mean "listed"; None if the list has refused to answer.

    An address outside 127.0.0.0/8 is no listing: it comes from a domain that is no longer a list.
    """
    codes = [code for code in map(IPv4Address, answers) if code in _LISTED]
    if any(code not in _ERRORS for code in codes):
        return True
    return None if codes else False


class Listings:
    """The usable addresses of all pools, and the listed ones, as far as known."""

    def __init__(
        self,
        pools: Mapping[str, Pool],
        domains: Mapping[str, Sequence[str]],
        hosts: HostAddresses,
        metrics: Metrics,
    ) -> None:
        """`domains` are those of the lists to ask, by pool."""
        self._pools = pools
        self._hosts = hosts
        self._of_pool = {
            name: [Listing(address, domain) for address in pool.singles for domain in domains.get(name, ())]
            for name, pool in pools.items()
        }
        self.questions = frozenset(listing for asked in self._of_pool.values() for listing in asked)
        """Every pair of address and list to query."""
        self.current: frozenset[Listing] = frozenset()
        """Every pair that is listed."""
        self._usable = Usable(hosts.current)
        # All workers have the same value, so show the smallest, not the sum.
        family = metrics.minimums("egress_listed", "Whether a DNSBL lists an egress address", "pool", "address")
        self._gauges = {
            (name, each.address): family.labels(name, str(each.address))
            for name, asked in self._of_pool.items()
            for each in asked
        }

    def take(self, found: Any) -> None:
        """Take in what the keeper shares, made by `as_json`; pairs that are not in this configuration are left out."""
        self.current = self.questions & {Listing(numeric_address(address), domain) for address, domain in found}
        listed = {name: frozenset(self._listed(name)) for name in self._pools}
        self._usable = Usable(self._hosts.current, listed)
        for (name, address), gauge in self._gauges.items():
            gauge.value = int(address in listed[name])

    def usable(self) -> Usable:
        """The addresses usable now: the same object while nothing has changed."""
        if self._usable.local is not self._hosts.current:
            self._usable = Usable(self._hosts.current, self._usable.listed)
        return self._usable

    def status(self) -> dict[str, Any]:
        """The pools as JSON values: their addresses, which of them are on this host, and which are listed by which
        list.
        """
        local = self._hosts.current
        return {
            name: {
                "addresses": list(map(str, pool.addresses)),
                "local": [str(address) for address in pool.addresses if covers(local, address)],
                "listed": {str(address): domains for address, domains in self._listed(name).items()},
                "iface": pool.iface,
                "mark": pool.mark,
            }
            for name, pool in self._pools.items()
        }

    def _listed(self, pool: str) -> dict[IPAddress, list[str]]:
        """The listed addresses of a pool, and the lists that they are on."""
        found: dict[IPAddress, list[str]] = {}
        for listing in self._of_pool[pool]:
            if listing in self.current:
                found.setdefault(listing.address, []).append(listing.domain)
        return found


def as_json(listings: Collection[Listing]) -> list[list[str]]:
    """The listings as JSON, for `Listings.take`."""
    return sorted([str(address), domain] for address, domain in listings)


class Lookups:
    """Queries the lists periodically, and shares each change."""

    def __init__(
        self,
        listings: Listings,
        share: Callable[[Any], None],
        servers: Sequence[HostPort] | None,
        metrics: Metrics,
        *,
        resolv_conf: Path = Path("/etc/resolv.conf"),
        port: int = 53,
        shortest: float = _SHORTEST,
        after_failure: float = _AFTER_FAILURE,
        lifetime: float = _LIFETIME,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`servers` None: those of `resolv_conf`, on `port`. `shortest`: seconds between two queries for one address;
        `after_failure`: until the next query if there was no answer; `lifetime`: for an answer.
        """
        self._share = share
        self._listings = listings
        self._servers = NameServers(servers, resolv_conf, port=port, lifetime=lifetime, clock=clock)
        self._shortest = shortest
        self._after_failure = after_failure
        self._clock = clock
        self._due: dict[str, dict[Listing, float]] = {}
        """When to ask next, by domain."""
        for question in listings.questions:
            self._due.setdefault(question.domain, {})[question] = clock()
        self._listed: set[Listing] = set()
        self._unanswered: dict[Listing, str] = {}
        lookups = metrics.counters("dnsbl_lookups_total", "Questions to DNSBLs about egress addresses", "result")
        self._counters = {
            result: lookups.labels(label) for result, label in ((True, "listed"), (False, "clean"), (None, "failed"))
        }

    async def run(self) -> None:
        """Query until cancelled. Listings known at the start stay until an answer says otherwise."""
        self._listed = set(self._listings.current)
        async with trio.open_nursery() as nursery:
            for domain in self._due:
                # Each list has its own schedule, so a dead one does not delay others.
                nursery.start_soon(self._follow, domain)

    async def once(self) -> dict[Listing, str]:
        """Query everything once, and share the result. Returns the queries without an answer, and why."""
        async with trio.open_nursery() as nursery:
            for domain in self._due:
                nursery.start_soon(self._ask_list, domain)
        self._share(as_json(self._listed))
        return dict(self._unanswered)

    async def _follow(self, domain: str) -> None:
        while True:
            before = frozenset(self._listed)
            failed = any(each.domain == domain for each in self._unanswered)
            await self._ask_list(domain)
            self._tell(domain, before, failed=failed)
            await trio.sleep(max(min(self._due[domain].values()) - self._clock(), self._shortest))

    async def _ask_list(self, domain: str) -> None:
        """Ask one list about every address that is due."""
        self._servers.reread()
        now = self._clock()
        limiter = trio.CapacityLimiter(_AT_ONCE)
        async with trio.open_nursery() as nursery:
            for question, due in self._due[domain].items():
                if due <= now:
                    nursery.start_soon(self._ask, question, limiter)

    async def _ask(self, question: Listing, limiter: trio.CapacityLimiter) -> None:
        self._unanswered.pop(question, None)
        async with limiter:
            try:
                found = await self._servers.addresses(query_name(question))
            except ResolveError as error:
                listed, ttl = None, self._after_failure
                self._unanswered[question] = str(error)
            else:
                listed = verdict(found.addresses)
                ttl = _NEGATIVE_WITHOUT_SOA if found.ttl is None else found.ttl
                if listed is None:
                    self._unanswered[question] = f"answers {', '.join(found.addresses)}"
        self._counters[listed].value += 1
        if listed:
            self._listed.add(question)
        elif listed is not None:
            self._listed.discard(question)
        self._due[question.domain][question] = self._clock() + min(max(ttl, self._shortest), _LONGEST)

    def _tell(self, domain: str, before: frozenset[Listing], *, failed: bool) -> None:
        """Share and log what has changed since `before`; `failed`: some query had no answer before."""
        failures = [error for question, error in self._unanswered.items() if question.domain == domain]
        if failures and not failed:
            fields: dict[str, Any] = {"domain": domain, "error": failures[0]}
            _logger.warning("DNSBL does not answer: its last answers stay in force", extra={"fields": fields})
        elif failed and not failures:
            _logger.info("DNSBL answers again", extra={"fields": {"domain": domain}})
        added = [str(each.address) for each in self._listed - before if each.domain == domain]
        removed = [str(each.address) for each in before - self._listed if each.domain == domain]
        if not added and not removed:
            return
        self._share(as_json(self._listed))
        fields = {"domain": domain, "added": sorted(added), "removed": sorted(removed)}
        if added:
            fields["_bad_ips"] = sorted({str(each.address) for each in self._listed})
            _logger.warning("detect black-listed IP", extra={"fields": fields})
        else:
            _logger.info("no longer black-listed", extra={"fields": fields})
