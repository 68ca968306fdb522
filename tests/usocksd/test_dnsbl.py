"""Block lists as dnsmasq serves them, and ones that misbehave."""

from __future__ import annotations

import contextlib
import logging
import shutil
import signal
import socket
import subprocess
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import dns.exception
import dns.message
import dns.query
import pytest
import trio
from daemons import PATIENCE, NameServer, wait_until

from usocksd.dnsbl import Listing, Listings, Lookups, as_json, query_name, verdict
from usocksd.egress import Pool
from usocksd.host.addresses import HostAddresses
from usocksd.log.metrics import Metrics
from usocksd.net.address import HostPort, IPAddress

ONE, TWO, SIX = map(ip_address, ("198.51.100.10", "198.51.100.11", "2001:db8::10"))
DOMAIN = "bl.example"


class Zone:
    """A block list, served by dnsmasq as authority; its answers, and that there is none, may be kept for 0 seconds."""

    def __init__(self, folder: Path) -> None:
        self._hosts = folder / "hosts"
        self._hosts.touch()
        self.port = 0
        while not self.port:
            with socket.socket(type=socket.SOCK_DGRAM) as sock:
                sock.bind(("127.0.0.1", 0))
                self.port = sock.getsockname()[1]
            self.start()
            if self._process.poll() is not None:  # somebody has this port for TCP
                self.port = 0
        self.address = HostPort("127.0.0.1", self.port)

    def start(self) -> None:
        self._process = subprocess.Popen(
            [
                "dnsmasq", "--no-daemon", "--conf-file=/dev/null", "--pid-file=", "--user=", f"--port={self.port}",
                "--listen-address=127.0.0.1", "--bind-interfaces", "--no-resolv", "--no-hosts",
                f"--addn-hosts={self._hosts}", f"--auth-server=ns.{DOMAIN},127.0.0.1", f"--auth-zone={DOMAIN}",
                "--auth-ttl=0",
            ],
            stderr=subprocess.DEVNULL,
        )  # fmt: skip
        wait_until(lambda: self._process.poll() is not None or self.ask(f"ns.{DOMAIN}"), "dnsmasq answers")

    def stop(self) -> None:
        self._process.terminate()
        self._process.wait()

    def ask(self, name: str) -> dns.message.Message | None:
        query = dns.message.make_query(name, "A")
        with contextlib.suppress(OSError, dns.exception.Timeout):
            return dns.query.udp(query, "127.0.0.1", port=self.port, timeout=0.2)
        return None

    def put(self, listed: Mapping[IPAddress, str]) -> None:
        """The listed addresses from now on, and the answer for them."""
        names = {query_name(Listing(ip, DOMAIN)).to_text(omit_final_dot=True): code for ip, code in listed.items()}
        self._hosts.write_text("".join(f"{code} {name}\n" for name, code in names.items()))
        self._process.send_signal(signal.SIGHUP)


@pytest.fixture
def zone(tmp_path: Path) -> Iterator[Zone]:
    if shutil.which("dnsmasq") is None:
        pytest.skip("not installed: dnsmasq (Debian: dnsmasq-base)")
    zone = Zone(tmp_path)
    yield zone
    zone.stop()


class Keeper:
    """The lookups of one pool, with what they share."""

    def __init__(
        self,
        nursery: trio.Nursery,
        server: HostPort | None,
        *addresses: IPAddress,
        domains: Sequence[str] = (DOMAIN,),
        known: Sequence[Listing] = (),
        **more: Any,
    ) -> None:
        self.metrics = Metrics("usocksd")
        hosts = HostAddresses()
        hosts.current = frozenset(addresses)
        self.listings = Listings({"p": Pool(addresses)}, {"p": domains}, hosts, self.metrics)
        self.listings.take(as_json(known))
        self.shared: list[Any] = []
        times = {"shortest": 0.01, "after_failure": 0.01, "lifetime": 0.5} | more
        lookups = Lookups(self.listings, self._share, [server] if server else None, self.metrics, **times)
        self.scope = trio.CancelScope()

        async def run() -> None:
            with self.scope:
                await lookups.run()

        nursery.start_soon(run)

    def _share(self, value: Any) -> None:
        self.shared.append(value)
        self.listings.take(value)

    @property
    def listed(self) -> set[IPAddress]:
        return {each.address for each in self.listings.current}

    def lookups(self, result: str) -> float:
        values = self.metrics.snapshot()["usocksd_dnsbl_lookups_total"]["values"]
        return float({labels[0]: numbers[0] for labels, numbers in values}[result])

    async def more(self, result: str) -> None:
        """Wait for another two lookups with this result: the second was asked after this was called."""
        before = self.lookups(result)
        await until(lambda: self.lookups(result) >= before + 2)


async def until(condition: Callable[[], object]) -> None:
    with trio.fail_after(PATIENCE):
        while not condition():
            await trio.sleep(0.005)


@pytest.fixture
async def tasks() -> AsyncIterator[trio.Nursery]:
    async with trio.open_nursery() as nursery:
        yield nursery
        nursery.cancel_scope.cancel()


# ---- questions and answers


def test_query_names() -> None:
    """The examples of RFC 5782, sections 2.1 and 2.4."""
    name = query_name(Listing(ip_address("192.0.2.99"), "bad.example.com"))
    assert name.to_text() == "99.2.0.192.bad.example.com."
    name = query_name(Listing(ip_address("2001:db8:1:2:3:4:567:89ab"), "ugly.example.com"))
    assert name.to_text() == ("b.a.9.8.7.6.5.0.4.0.0.0.3.0.0.0.2.0.0.0.1.0.0.0.8.b.d.0.1.0.0.2.ugly.example.com.")


@pytest.mark.parametrize(
    ("answers", "listed"),
    [
        ((), False),
        (("127.0.0.2",), True),
        (("127.0.0.10", "127.0.0.4"), True),
        (("127.254.0.1",), True),
        (("127.255.255.254",), None),  # "asked through an open resolver"
        (("127.255.255.252", "127.255.255.255"), None),
        (("127.255.255.254", "127.0.0.2"), True),
        (("203.0.113.7",), False),  # a parked domain has an address for every name
        (("203.0.113.7", "127.0.0.2"), True),
        (("128.0.0.1",), False),
    ],
)
def test_what_is_a_listing(answers: tuple[str, ...], listed: bool | None) -> None:
    assert verdict(answers) is listed


# ---- what is known


def test_listings_are_of_pools_and_their_lists() -> None:
    hosts = HostAddresses()
    hosts.current = frozenset({ONE, TWO})
    metrics = Metrics("usocksd")
    pools = {"default": Pool((ONE, TWO)), "a": Pool((ONE, SIX), "eth1", 7), "none": Pool()}
    listings = Listings(pools, {"default": ["x.example"], "a": ["x.example", "y.example"]}, hosts, metrics)
    assert listings.questions == {
        Listing(ONE, "x.example"),
        Listing(TWO, "x.example"),
        Listing(SIX, "x.example"),
        Listing(ONE, "y.example"),
        Listing(SIX, "y.example"),
    }
    first = listings.usable()
    assert (first.local, listings.usable()) == ({ONE, TWO}, first)
    # Of another configuration: an address and a list that are not asked about.
    found = [Listing(ONE, "y.example"), Listing(TWO, "y.example"), Listing(TWO, "z.example")]
    listings.take(as_json(found))
    assert listings.current == {Listing(ONE, "y.example")}
    usable = listings.usable()
    assert listings.usable() is usable
    assert {name: listed for name, listed in usable.listed.items() if listed} == {"a": {ONE}}
    hosts.current = frozenset({ONE})
    assert (listings.usable().local, listings.usable().listed) == ({ONE}, usable.listed)
    assert listings.usable() is listings.usable()
    assert listings.status() == {
        "default": {
            "addresses": ["198.51.100.10", "198.51.100.11"],
            "local": ["198.51.100.10"],
            "listed": {},
            "iface": None,
            "mark": None,
        },
        "a": {
            "addresses": ["198.51.100.10", "2001:db8::10"],
            "local": ["198.51.100.10"],
            "listed": {"198.51.100.10": ["y.example"]},
            "iface": "eth1",
            "mark": 7,
        },
        "none": {"addresses": [], "local": [], "listed": {}, "iface": None, "mark": None},
    }
    values = {tuple(labels): numbers for labels, numbers in metrics.snapshot()["usocksd_egress_listed"]["values"]}
    assert values == {
        ("default", "198.51.100.10"): [0],
        ("default", "198.51.100.11"): [0],
        ("a", "198.51.100.10"): [1],
        ("a", "2001:db8::10"): [0],
    }


# ---- a real list


async def test_listing_and_unlisting(zone: Zone, tasks: trio.Nursery, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "usocksd.dnsbl")
    keeper = Keeper(tasks, zone.address, ONE, TWO, SIX)
    await keeper.more("clean")
    assert keeper.shared == []
    zone.put({ONE: "127.0.0.2", SIX: "127.0.0.4"})
    await until(lambda: keeper.listed == {ONE, SIX})
    assert keeper.listings.usable().listed == {"p": {ONE, SIX}}
    zone.put({TWO: "127.0.0.2"})
    await until(lambda: keeper.listed == {TWO})
    zone.put({})
    await until(lambda: keeper.listed == set())
    await keeper.more("clean")
    last = keeper.shared[-1]
    assert last == []
    said = [(record.levelname, record.message, getattr(record, "fields")) for record in caplog.records]  # noqa: B009
    assert {message for _, message, _ in said} == {"detect black-listed IP", "no longer black-listed"}
    bad = [fields for level, message, fields in said if (level, message) == ("WARNING", "detect black-listed IP")]
    assert {"198.51.100.10", "2001:db8::10", "198.51.100.11"} == {ip for fields in bad for ip in fields["added"]}
    assert all(set(fields["added"]) <= set(fields["_bad_ips"]) for fields in bad)
    assert said[-1] == (
        "INFO",
        "no longer black-listed",
        {"domain": DOMAIN, "added": [], "removed": ["198.51.100.11"]},
    )


async def test_listings_stay_while_there_is_no_answer(
    zone: Zone, tasks: trio.Nursery, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "usocksd.dnsbl")
    zone.put({ONE: "127.0.0.2"})
    keeper = Keeper(tasks, zone.address, ONE, TWO)
    await until(lambda: keeper.listed == {ONE})
    zone.stop()
    await keeper.more("failed")
    assert keeper.listed == {ONE}
    # The list refuses to answer, for both.
    zone.start()
    zone.put({ONE: "127.255.255.254", TWO: "127.255.255.254"})
    await keeper.more("failed")
    await keeper.more("failed")
    assert keeper.listed == {ONE}
    zone.put({TWO: "127.0.0.3"})
    await until(lambda: keeper.listed == {TWO})
    messages = [record.message for record in caplog.records]
    assert messages[:2] == ["detect black-listed IP", "DNSBL does not answer: its last answers stay in force"]
    await until(lambda: "DNSBL answers again" in [record.message for record in caplog.records])


async def test_another_keeper_goes_on_with_what_is_known(zone: Zone, tasks: trio.Nursery) -> None:
    zone.stop()
    keeper = Keeper(tasks, zone.address, ONE, TWO, known=[Listing(ONE, DOMAIN)])
    await keeper.more("failed")
    assert (keeper.listed, keeper.shared) == ({ONE}, [])
    keeper.scope.cancel()
    zone.start()
    keeper = Keeper(tasks, zone.address, ONE, TWO, known=[Listing(ONE, DOMAIN)])
    await until(lambda: keeper.shared == [[]])
    assert keeper.listed == set()


async def test_a_dead_list_does_not_delay_others(tasks: trio.Nursery) -> None:
    """However many addresses it is asked about."""
    pool = [ip_address(f"198.51.100.{number}") for number in range(1, 51)]
    listed = query_name(Listing(pool[-1], DOMAIN)).to_text(omit_final_dot=True)
    dead = {query_name(Listing(each, "dead.example")).to_text(omit_final_dot=True): None for each in pool}
    with NameServer({**dead, listed: ["127.0.0.2"]}) as server:
        host, _, port = server.address.rpartition(":")
        where = HostPort(host, int(port))
        keeper = Keeper(tasks, where, *pool, domains=["dead.example", DOMAIN], lifetime=60)
        await until(lambda: keeper.listed == {pool[-1]})
        assert keeper.lookups("failed") == 0
        # An answer is good for its TTL, a minute here, and no question is asked before.
        await trio.sleep(0.1)
        assert server.asked.count(listed) == 1
        keeper.scope.cancel()


async def test_a_bad_resolv_conf_does_not_end_the_lookups(tasks: trio.Nursery, tmp_path: Path) -> None:
    resolv_conf = tmp_path / "resolv.conf"
    resolv_conf.write_text("search a..b\nnameserver bogus\nnameserver 127.0.0.1\n")
    with NameServer({f"10.100.51.198.{DOMAIN}": ["127.0.0.2"]}) as server:
        port = int(server.address.rpartition(":")[2])
        keeper = Keeper(tasks, None, ONE, resolv_conf=resolv_conf, port=port)
        await until(lambda: keeper.listed == {ONE})
        keeper.scope.cancel()
