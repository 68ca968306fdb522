from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterable, Sequence
from ipaddress import IPv4Address, ip_address, ip_network
from itertools import islice
from socket import AF_INET, AF_INET6, AddressFamily
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from usocksd import egress
from usocksd.egress import EgressPools, Pool, Source, Usable, sites
from usocksd.errors import NoEgress
from usocksd.host.addresses import Here
from usocksd.net.address import IPAddress, IPNetwork

TEN = [ip_address(f"198.51.100.{n}") for n in range(10, 20)]
BOTH = [*TEN, ip_address("2001:db8::10"), ip_address("2001:db8::11")]
CLIENT = ip_address("10.0.0.1")
NOTHING = Usable(frozenset())


def pools(addresses: Iterable[IPAddress | IPNetwork] = (), **more: Any) -> EgressPools:
    """One pool with these addresses, the default one."""
    return EgressPools({"default": Pool(tuple(addresses), **more)})


def here(*addresses: IPAddress, listed: Sequence[IPAddress] = ()) -> Usable:
    """What is usable on a host with these addresses, some of them listed for the default pool."""
    return Usable(frozenset(addresses), {"default": frozenset(listed)} if listed else {})


def test_without_addresses_the_kernel_chooses() -> None:
    assert EgressPools({}).pick("default", CLIENT, "www.example.com", AF_INET, NOTHING) == Source()
    pool = pools(iface="eth1", mark=16)
    assert pool.pick("default", CLIENT, "x", AF_INET6, NOTHING) == Source(None, "eth1", 16)
    assert pool.ranking("default", CLIENT, "x", AF_INET6, NOTHING) == [Source(None, "eth1", 16)]


def test_interface_and_mark_apply_together_with_the_address() -> None:
    pool = pools(TEN[:1], iface="eth1", mark=16)
    assert pool.pick("default", CLIENT, "x", AF_INET, here(*TEN)) == Source("198.51.100.10", "eth1", 16)


def test_the_pool_is_the_one_that_was_asked_for() -> None:
    two = EgressPools({"default": Pool((TEN[0],)), "partners": Pool((TEN[1],), mark=7)})
    assert two.pick("default", CLIENT, "x", AF_INET, here(*TEN)) == Source(str(TEN[0]))
    assert two.pick("partners", CLIENT, "x", AF_INET, here(*TEN)) == Source(str(TEN[1]), None, 7, "partners")
    listed = Usable(frozenset(TEN), {"partners": frozenset(TEN[:1])})
    assert two.pick("default", CLIENT, "x", AF_INET, listed).address == str(TEN[0]), "listed for another pool"


def test_the_address_is_usable_and_of_the_destinations_family() -> None:
    pool, everything = pools(BOTH), here(*BOTH)
    only = here(TEN[3], ip_address("198.51.100.99"))
    for n in range(50):
        assert ip_address(str(pool.pick("default", CLIENT, f"{n}", AF_INET, everything).address)) in TEN
        assert ip_address(str(pool.pick("default", CLIENT, f"{n}", AF_INET6, everything).address)) in BOTH[10:]
        assert pool.pick("default", CLIENT, f"{n}", AF_INET, only) == Source(str(TEN[3]))


def test_no_usable_address_of_the_family_is_an_error() -> None:
    pool = pools(TEN[:2], iface="eth1")
    with pytest.raises(NoEgress, match=r'for IPv6 in pool "default": it has none$'):
        pool.pick("default", CLIENT, "x", AF_INET6, here(*BOTH))
    with pytest.raises(NoEgress, match=r'for IPv4 in pool "default": 2 not on this host$'):
        pool.pick("default", CLIENT, "x", AF_INET, NOTHING)
    with pytest.raises(NoEgress):
        pool.ranking("default", CLIENT, "x", AF_INET, NOTHING)
    assert pool.pick("default", CLIENT, "x", AF_INET, here(*TEN)).address  # and it recovers


def test_listed_addresses_are_left_out_while_there_are_others() -> None:
    pool = pools(TEN[:3])
    one_clean = here(*TEN, listed=TEN[:2])
    assert {pool.pick("default", CLIENT, f"{n}", AF_INET, one_clean).address for n in range(50)} == {str(TEN[2])}
    all_listed = here(*TEN, listed=TEN[:3])
    assert len({pool.pick("default", CLIENT, f"{n}", AF_INET, all_listed).address for n in range(50)}) == 3
    # The clean one is gone: those that are here count.
    clean_one_gone = here(*TEN[:2], listed=TEN[:2])
    assert pool.pick("default", CLIENT, "x", AF_INET, clean_one_gone).address in {str(TEN[0]), str(TEN[1])}


def test_all_listed_is_an_error_if_the_pool_says_so() -> None:
    pool = pools(BOTH[9:], when_all_listed="refuse")
    usable = here(TEN[9], BOTH[10], listed=[TEN[9]])
    with pytest.raises(NoEgress, match='no usable egress address for IPv4 in pool "default": 1 listed'):
        pool.pick("default", CLIENT, "x", AF_INET, usable)
    assert pool.pick("default", CLIENT, "x", AF_INET6, usable).address == str(BOTH[10]), "families are judged apart"
    pool = pools(TEN[:2], when_all_listed="refuse")
    with pytest.raises(NoEgress, match="1 not on this host, 1 listed"):
        pool.pick("default", CLIENT, "x", AF_INET, here(TEN[0], listed=[TEN[0]]))


def test_removing_one_of_ten_moves_only_its_own_clients() -> None:
    pool = pools(TEN)
    everything, without = here(*TEN), here(*TEN[:4], *TEN[5:])
    clients = [IPv4Address(0x0A000000 + n) for n in range(10_000)]

    def choices(usable: Usable) -> list[str | None]:
        return [pool.pick("default", client, "www.example.com", AF_INET, usable).address for client in clients]

    before, after = choices(everything), choices(without)
    moved = [(old, new) for old, new in zip(before, after, strict=True) if old != new]
    assert {old for old, _ in moved} == {str(TEN[4])}
    assert len(moved) == before.count(str(TEN[4]))
    assert 900 <= len(moved) <= 1100
    # They spread over all that is left, and come back.
    assert {new for _, new in moved} == {str(address) for address in TEN} - {str(TEN[4])}
    assert choices(everything) == before
    # A listing is no other than an absence.
    assert choices(here(*TEN, listed=[TEN[4]])) == after


@given(
    st.lists(st.ip_addresses(v=4), min_size=2, max_size=8, unique=True),
    st.ip_addresses(),
    st.text(max_size=20),
    st.data(),
)
def test_an_address_that_goes_moves_nobody_elses_clients(
    addresses: list[IPAddress], client: IPAddress, destination: str, data: st.DataObject
) -> None:
    pool = pools(addresses)
    before = pool.ranking("default", client, destination, AF_INET, here(*addresses))
    assert pool.pick("default", client, destination, AF_INET, here(*addresses)) == before[0]
    order = [source.address for source in before]
    assert sorted(map(str, order)) == sorted(map(str, addresses))
    for at, source in enumerate(before):
        assert list(source.spare) == order[at + 1 :]
    gone = data.draw(st.sampled_from(addresses))
    after = pool.ranking("default", client, destination, AF_INET, here(*set(addresses) - {gone}))
    assert [source.address for source in after] == [address for address in order if address != str(gone)]
    again = pools(reversed(addresses)).ranking("default", client, destination, AF_INET, here(*addresses))
    assert again == before


def test_the_choice_depends_on_client_and_destination() -> None:
    pool, usable = pools(TEN), here(*TEN)
    assert len({pool.pick("default", CLIENT, f"{n}.example", AF_INET, usable).address for n in range(200)}) == 10
    clients = [ip_address(f"2001:db8::{n}") for n in range(200)]
    assert len({pool.pick("default", client, "x", AF_INET, usable).address for client in clients}) == 10


def test_a_name_and_its_addresses_are_one_site() -> None:
    """FTP asks for the name, and then for the address that the server tells."""
    pool, usable = pools(TEN), here(*TEN)

    def source(client: int, *texts: str) -> str | None:
        where = sites(map(ip_address, texts))
        return pool.pick("default", ip_address(f"10.0.0.{client}"), where[4], AF_INET, usable).address

    for client in range(20):
        of_name = source(client, "203.0.113.80")
        assert source(client, "2001:db8::1", "203.0.113.80") == of_name
        # In whatever order they come, and whether or not the answer has all of them.
        assert source(client, "203.0.113.90", "203.0.113.80") == source(client, "203.0.113.90") == of_name
    far = [source(client, "198.18.0.1") == source(client, "203.0.113.80") for client in range(50)]
    assert sum(far) < 25


def routed(*networks: str) -> Usable:
    local = Here()
    local.networks = tuple(map(ip_network, networks))
    return Usable(local)


@pytest.mark.parametrize(("text", "family"), [("198.51.100.16/28", AF_INET), ("2001:db8:9::/64", AF_INET6)])
def test_a_network_has_an_address_for_everybody(text: str, family: AddressFamily) -> None:
    network, usable = ip_network(text), routed(text)
    pool = pools([network])
    picked = [pool.pick("default", CLIENT, f"{n}", family, usable) for n in range(300)]
    assert picked == [pools([network]).pick("default", CLIENT, f"{n}", family, usable) for n in range(300)]
    used = {ip_address(source.address or "") for source in picked}
    assert len(used) == min(300, network.num_addresses - 2)
    assert used <= set(islice(network.hosts(), 14)) if family == AF_INET else all(each in network for each in used)
    for source in picked:
        assert source.routed
        assert len({source.address, *source.spare}) == 3
    with pytest.raises(NoEgress, match="1 not on this host"):
        pool.pick("default", CLIENT, "x", family, here(network[0]))


def test_a_network_is_chosen_as_one_address_is() -> None:
    usable = routed("192.0.2.0/24", "198.51.100.16/28")
    pool = pools([ip_address("192.0.2.1"), ip_network("198.51.100.16/28")])
    sources = [pool.pick("default", CLIENT, f"{n}", AF_INET, usable) for n in range(200)]
    assert 60 < sum(source.address == "192.0.2.1" for source in sources) < 140
    for source in sources:
        assert len(source.spare) == 3


def test_where_a_destination_is() -> None:
    assert sites(map(ip_address, ("203.0.113.80", "192.0.2.9", "2001:db8:1:2::3"))) == {4: "c00002", 6: "20010db80001"}
    assert sites([]) == {}


def test_or_on_the_client_alone() -> None:
    pool, usable = pools(TEN, sticky="client"), here(*TEN)
    assert len({pool.pick("default", CLIENT, f"{n}.example", AF_INET, usable) for n in range(200)}) == 1
    clients = [ip_address(f"2001:db8::{n}") for n in range(200)]
    assert len({pool.pick("default", client, "x", AF_INET, usable).address for client in clients}) == 10


def test_the_choice_survives_a_restart() -> None:
    program = (
        "import json; from ipaddress import ip_address as a; from socket import AF_INET\n"
        "from usocksd.egress import EgressPools, Pool, Usable\n"
        "ten = [a(f'198.51.100.{n}') for n in range(10, 20)]\n"
        "pools = EgressPools({'default': Pool(ten)}); usable = Usable(frozenset(ten))\n"
        "pick = lambda n: pools.pick('default', a('10.0.0.1'), f'{n}', AF_INET, usable)\n"
        "print(json.dumps([[pick(n).address, *pick(n).spare] for n in range(20)]))"
    )
    output = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    pool, usable = pools(TEN), here(*TEN)
    mine = [pool.pick("default", CLIENT, f"{n}", AF_INET, usable) for n in range(20)]
    assert json.loads(output) == [[source.address, *source.spare] for source in mine]


def test_what_is_remembered_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(egress._Ranked, "_MOST_REMEMBERED", 10)
    pool, usable = pools(TEN), here(*TEN)
    for n in range(100):
        pool.pick("default", CLIENT, f"{n}", AF_INET, usable)
    assert len(pool._pools["default"]._remembered) <= 10
