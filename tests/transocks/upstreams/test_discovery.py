"""Upstreams that DNS tells of: what becomes of answers, and how connections are spread over them."""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from ipaddress import ip_address

import pytest
import trio
from daemons import NameServer
from trio.testing import MockClock

from transocks.upstreams.discovery import Member, Membership, members_of
from transocks.upstreams.proxy_url import ProxyURL, parse_proxy_url
from usocksd.errors import NO_SUCH_NAME, ResolveError
from usocksd.log.metrics import Metrics
from usocksd.names.match import weighted_rendezvous
from usocksd.names.name_query import ServiceRecord
from usocksd.names.resolver import Resolver
from usocksd.net.address import HostPort
from usocksd.settings.loader import Invalid

SERVICE = parse_proxy_url("socks5h+srv://me:secret@_socks._tcp.egress.test")
NAME = "_socks._tcp.egress.test"


@asynccontextmanager
async def resolver(names: dict[str, Sequence[str] | None]) -> AsyncIterator[Resolver]:
    with NameServer(names) as server:
        host, _, port = server.address.partition(":")
        made = Resolver([HostPort(host, int(port))], Metrics("transocks"), lifetime=1.0)
        async with trio.open_nursery() as nursery:
            await nursery.start(made.run)
            yield made
            nursery.cancel_scope.cancel()


async def test_the_servers_of_a_service() -> None:
    records = ["10 1 1081 b.test.", "0 5 1080 a.test.", "10 3 1080 c.test."]
    async with resolver({NAME: records, "nothing.test": ["0 0 0 ."], "empty.test": ["192.0.2.1"]}) as names:
        members, valid = await members_of(SERVICE, names)
        assert valid == 60
        found = [(str(each.url), each.priority, each.weight) for each in members]
        assert found == [
            ("socks5h://a.test:1080", 0, 5),
            ("socks5h://b.test:1081", 10, 1),
            ("socks5h://c.test:1080", 10, 3),
        ]
        assert {(each.url.username, each.url.secret) for each in members} == {("me", "secret")}
        for name in ("nothing.test", "empty.test", "absent.test"):
            with pytest.raises(ResolveError) as caught:
                await members_of(parse_proxy_url(f"http+srv://{name}"), names)
            assert caught.value.absent


async def test_all_addresses_of_a_name() -> None:
    async with resolver({"egress.test": ["192.0.2.2", "192.0.2.1", "2001:db8::1"]}) as names:
        members, _ = await members_of(parse_proxy_url("socks5+dns://egress.test:1090"), names)
    found = sorted(str(each.url) for each in members)
    assert found == ["socks5://192.0.2.1:1090", "socks5://192.0.2.2:1090", "socks5://[2001:db8::1]:1090"]


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("socks5+srv://egress.test:1080", "no port with"),
        ("socks5+srv://192.0.2.1", "a name to look up"),
        ("socks5+dns://[2001:db8::1]:1080", "a name to look up"),
        ("http+dns://egress.test", "a port from 1"),
        ("socks5+mdns://egress.test", "with [+]srv or [+]dns"),
        ("socks5+://egress.test", "with [+]srv or [+]dns"),
    ],
)
def test_bad_urls(url: str, expected: str) -> None:
    with pytest.raises(Invalid, match=expected):
        parse_proxy_url(url)


def test_a_url_shows_what_it_is() -> None:
    assert str(SERVICE) == f"socks5h+srv://{NAME}"
    assert str(parse_proxy_url("http+dns://h.test:3128")) == "http+dns://h.test:3128"


class Answers(Resolver):
    """A resolver with the next answer in a list: hosts, or an error."""

    def __init__(self, *answers: Sequence[str] | ResolveError) -> None:
        self._list = list(answers)

    async def services(self, name: str) -> tuple[tuple[ServiceRecord, ...], float]:
        found = self._list.pop(0) if len(self._list) > 1 else self._list[0]
        if isinstance(found, ResolveError):
            raise found
        return tuple(ServiceRecord(0, 1, 1080, host) for host in found), 60.0


async def test_what_is_kept_and_what_is_not(autojump_clock: MockClock) -> None:
    """Servers that fail change nothing; an answer that there is nothing is one."""
    seen: list[tuple[float, list[object]]] = []
    answers = Answers(
        ["a", "b"], ["b", "a"], ResolveError(NAME, "timed out"), ["a"], ResolveError(NAME, NO_SUCH_NAME), ["a"]
    )

    def changed(members: Sequence[Member]) -> None:
        seen.append((trio.current_time(), [each.url.host for each in members]))

    async with trio.open_nursery() as nursery:
        await nursery.start(Membership(SERVICE, answers, changed).run)
        assert [hosts for _, hosts in seen] == [["a", "b"]]
        await trio.sleep(300)
        nursery.cancel_scope.cancel()
    assert [hosts for _, hosts in seen] == [["a", "b"], ["a"], [], ["a"]]
    times = [at - seen[0][0] for at, _ in seen]
    assert times == [0, 125, 185, 190]  # 60 + 60 + 5 after a failure; again 5 s after there was nothing


async def test_a_start_waits_for_dns_but_not_long(autojump_clock: MockClock) -> None:
    class Silent(Answers):
        async def services(self, name: str) -> tuple[tuple[ServiceRecord, ...], float]:
            await trio.sleep_forever()
            raise AssertionError

    async with trio.open_nursery() as nursery:
        await nursery.start(Membership(SERVICE, Silent(), lambda _: None).run)
        assert trio.current_time() == 2
        nursery.cancel_scope.cancel()


def shares(candidates: dict[str, float], keys: int = 20_000) -> dict[str, float]:
    first = Counter(order(candidates, key)[0] for key in range(keys))
    return {name: first[name] / keys for name in candidates}


def order(candidates: dict[str, float], key: int) -> list[str]:
    return weighted_rendezvous(key.to_bytes(4), candidates, str.encode, candidates.__getitem__)


def test_shares_follow_weights() -> None:
    found = shares({"a": 1, "b": 2, "c": 7})
    assert found["a"] == pytest.approx(0.1, abs=0.01)
    assert found["b"] == pytest.approx(0.2, abs=0.015)
    assert found["c"] == pytest.approx(0.7, abs=0.015)


def test_only_the_share_of_the_one_that_leaves_moves() -> None:
    """One of 50: 2% of the clients move, and none of them from another."""
    before = {f"proxy{number}": 1.0 for number in range(50)}
    after = {name: weight for name, weight in before.items() if name != "proxy7"}
    keys = 20_000
    moved = [key for key in range(keys) if order(before, key)[0] != order(after, key)[0]]
    assert all(order(before, key)[0] == "proxy7" for key in moved)
    assert len(moved) / keys == pytest.approx(0.02, abs=0.003)


def test_members_are_by_address() -> None:
    url = ProxyURL(scheme=SERVICE.scheme, host=ip_address("192.0.2.1"), port=1080)
    assert Member(url) == Member(url, 0, 1)
