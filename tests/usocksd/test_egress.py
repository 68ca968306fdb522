"""Which address of a pool a connection leaves from: always the same one, and never one that can't be used."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from ipaddress import ip_address, ip_network
from itertools import islice
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from usocksd.clients import Client
from usocksd.egress import EgressPools, Pool, Source, Usable, sites_of
from usocksd.errors import NoEgress
from usocksd.host.addresses import LocalAddresses
from usocksd.net.address import IPAddress, IPNetwork

TEN = [ip_address(f"198.51.100.{n}") for n in range(10, 20)]
BOTH = [*TEN, ip_address("2001:db8::10"), ip_address("2001:db8::11")]
CLIENT = Client.at("10.0.0.1")
V4, V6 = ip_address("203.0.113.80"), ip_address("2001:db8:80::80")
NOTHING = Usable(frozenset())


class Pools(EgressPools):
    """Pools on a host whose usable addresses a test sets."""

    def __init__(self, pools: Mapping[str, Pool], **more: Any) -> None:
        super().__init__(pools, lambda: self.set, **more)
        self.set = NOTHING


def pools(addresses: Iterable[IPAddress | IPNetwork] = (), **more: Any) -> Pools:
    """One pool with these addresses, the default one."""
    return Pools({"default": Pool(tuple(addresses), **more)})


def here(*addresses: IPAddress, listed: Sequence[IPAddress] = ()) -> Usable:
    """The usable addresses on a host with these, some of them listed for the default pool."""
    return Usable(frozenset(addresses), {"default": frozenset(listed)} if listed else {})


def pick(
    pools: Pools, usable: Usable, site: str = "x", *, to: IPAddress = V4, client: Client = CLIENT, pool: str = "default"
) -> Source:
    pools.set = usable
    return pools.pick(pool, client, site, to)


def address(pools: Pools, usable: Usable, site: str = "x", **more: Any) -> IPAddress:
    return ip_address(pick(pools, usable, site, **more).address or "")


def clients(count: int) -> list[Client]:
    return [Client.at(f"2001:db8::{n:x}") for n in range(count)]


def test_without_addresses_the_kernel_chooses() -> None:
    assert pick(Pools({}), NOTHING) == Source()
    assert pick(pools(iface="eth1", mark=16), NOTHING, to=V6) == Source(None, "eth1", 16)


def test_each_pool_has_its_own_addresses_interface_mark_and_listings() -> None:
    two = Pools({"default": Pool((TEN[0],)), "partners": Pool((TEN[1],), "eth1", 7)})
    assert pick(two, here(*TEN)) == Source(str(TEN[0]))
    assert pick(two, here(*TEN), pool="partners") == Source(str(TEN[1]), "eth1", 7)
    listed = Usable(frozenset(TEN), {"partners": frozenset(TEN[:1])})
    assert pick(two, listed).address == str(TEN[0]), "listed for another pool"


def test_the_address_is_usable_and_of_the_destinations_family() -> None:
    pool, everything = pools(BOTH), here(*BOTH)
    only = here(TEN[3], ip_address("198.51.100.99"))
    for n in range(50):
        assert address(pool, everything, f"{n}") in TEN
        assert address(pool, everything, f"{n}", to=V6) in BOTH[10:]
        assert pick(pool, only, f"{n}") == Source(str(TEN[3]))


def test_no_usable_address_of_the_family_is_an_error() -> None:
    pool = pools(TEN[:2], iface="eth1")
    with pytest.raises(NoEgress, match=r'for IPv6 in pool "default": it has none$'):
        pick(pool, here(*BOTH), to=V6)
    with pytest.raises(NoEgress, match=r'for IPv4 in pool "default": 2 not on this host$'):
        pick(pool, NOTHING)
    assert pick(pool, here(*TEN)).address  # and it recovers


def test_listed_addresses_are_left_out_while_there_are_others() -> None:
    pool = pools(TEN[:3])

    def used(usable: Usable) -> set[IPAddress]:
        return {address(pool, usable, f"{n}") for n in range(50)}

    assert used(here(*TEN, listed=TEN[:2])) == {TEN[2]}
    assert used(here(*TEN, listed=TEN[:3])) == set(TEN[:3])
    # The clean one is gone: those that are here count.
    assert used(here(*TEN[:2], listed=TEN[:2])) == set(TEN[:2])


def test_all_listed_is_an_error_if_the_pool_says_so() -> None:
    pool = pools(BOTH[9:], when_all_listed="refuse")
    usable = here(TEN[9], BOTH[10], listed=[TEN[9]])
    with pytest.raises(NoEgress, match='no usable egress address for IPv4 in pool "default": 1 listed'):
        pick(pool, usable)
    assert address(pool, usable, to=V6) == BOTH[10], "each family by itself"
    with pytest.raises(NoEgress, match="1 not on this host, 1 listed"):
        pick(pools(TEN[:2], when_all_listed="refuse"), here(TEN[0], listed=[TEN[0]]))


def test_removing_one_of_ten_moves_only_its_own_clients() -> None:
    pool = pools(TEN)
    everything, without = here(*TEN), here(*TEN[:4], *TEN[5:])
    asking = [Client.at(f"10.0.{n >> 8}.{n & 255}") for n in range(10_000)]

    def choices(usable: Usable) -> list[IPAddress]:
        return [address(pool, usable, client=client) for client in asking]

    before, after = choices(everything), choices(without)
    moved = [(old, new) for old, new in zip(before, after, strict=True) if old != new]
    assert {old for old, _ in moved} == {TEN[4]}
    assert len(moved) == before.count(TEN[4])
    assert 900 <= len(moved) <= 1100
    # They spread over all that is left, and come back.
    assert {new for _, new in moved} == set(TEN) - {TEN[4]}
    assert choices(everything) == before
    # A listed address is like an absent one.
    assert choices(here(*TEN, listed=[TEN[4]])) == after


@given(st.lists(st.ip_addresses(v=4), min_size=2, max_size=8, unique=True), st.ip_addresses(), st.text(), st.data())
def test_a_lost_address_moves_only_its_own_clients(
    addresses: list[IPAddress], who: IPAddress, site: str, data: st.DataObject
) -> None:
    client = Client.at(str(who))

    def order(pools: Pools, *present: IPAddress) -> list[str]:
        source = pick(pools, here(*present), site, client=client)
        return [source.address or "", *source.spare]

    before = order(pools(addresses), *addresses)
    assert sorted(before) == sorted(map(str, addresses))
    gone = data.draw(st.sampled_from(addresses))
    after = order(pools(addresses), *set(addresses) - {gone})
    assert after == [each for each in before if each != str(gone)]
    assert order(pools(reversed(addresses)), *addresses) == before


@pytest.mark.parametrize(("sticky", "used"), [("client+destination", 10), ("client", 1)])
def test_what_the_choice_depends_on(sticky: str, used: int) -> None:
    pool, usable = pools(TEN, sticky=sticky), here(*TEN)
    assert len({address(pool, usable, f"{n}.example") for n in range(200)}) == used
    assert len({address(pool, usable, client=client) for client in clients(200)}) == 10


def test_a_name_and_its_addresses_are_one_site() -> None:
    """FTP asks for the name, and then for the address that the server sends."""

    def source(client: Client, *texts: str) -> IPAddress:
        return address(pools(TEN), here(*TEN), sites_of(map(ip_address, texts))[4], client=client)

    for client in clients(20):
        of_name = source(client, "203.0.113.80")
        assert source(client, "2001:db8::1", "203.0.113.80") == of_name
        # In any order, and whether or not the answer has all of them.
        assert source(client, "203.0.113.90", "203.0.113.80") == source(client, "203.0.113.90") == of_name
    far = [source(client, "198.18.0.1") == source(client, "203.0.113.80") for client in clients(50)]
    assert sum(far) < 25
    assert sites_of(map(ip_address, ("203.0.113.80", "192.0.2.9", "2001:db8:1:2::3"))) == {
        4: "c00002",
        6: "20010db80001",
    }


def routed(*networks: str) -> Usable:
    local = LocalAddresses()
    local.networks = tuple(map(ip_network, networks))
    return Usable(local)


@pytest.mark.parametrize(("text", "to"), [("198.51.100.16/28", V4), ("2001:db8:9::/64", V6)])
def test_a_network_has_an_address_for_everybody(text: str, to: IPAddress) -> None:
    network, usable = ip_network(text), routed(text)
    picked = [pick(pools([network]), usable, f"{n}", to=to) for n in range(300)]
    assert picked == [pick(pools([network]), usable, f"{n}", to=to) for n in range(300)]
    used = {ip_address(source.address or "") for source in picked}
    assert len(used) == min(300, network.num_addresses - 2)
    assert used <= set(islice(network.hosts(), 14)) if to is V4 else all(each in network for each in used)
    for source in picked:
        assert source.routed
        assert len({source.address, *source.spare}) == 3
    with pytest.raises(NoEgress, match="1 not on this host"):
        pick(pools([network]), here(network[0]), to=to)


def test_a_network_is_chosen_as_one_address_is() -> None:
    usable = routed("192.0.2.0/24", "198.51.100.16/28")
    pool = pools([ip_address("192.0.2.1"), ip_network("198.51.100.16/28")])
    sources = [pick(pool, usable, f"{n}") for n in range(200)]
    assert 60 < sum(source.address == "192.0.2.1" for source in sources) < 140
    for source in sources:
        assert len(source.spare) == 3


def test_the_choice_survives_a_restart() -> None:
    program = (
        "import json; from ipaddress import ip_address as a\n"
        "from usocksd.clients import Client; from usocksd.egress import EgressPools, Pool, Usable\n"
        "ten = [a(f'198.51.100.{n}') for n in range(10, 20)]\n"
        "pools = EgressPools({'default': Pool(tuple(ten))}, lambda usable=Usable(frozenset(ten)): usable)\n"
        "pick = lambda n: pools.pick('default', Client.at('10.0.0.1'), f'{n}', a('203.0.113.80'))\n"
        "print(json.dumps([[pick(n).address, *pick(n).spare] for n in range(20)]))"
    )
    output = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    mine = [pick(pools(TEN), here(*TEN), f"{n}") for n in range(20)]
    assert json.loads(output) == [[source.address, *source.spare] for source in mine]


def test_memory_is_bounded() -> None:
    pool, usable = Pools({"default": Pool(tuple(TEN))}, most_remembered=10), here(*TEN)
    for n in range(100):
        pick(pool, usable, f"{n}")
    assert len(pool._pools["default"]._remembered) <= 10
