from __future__ import annotations

import subprocess
import sys
from ipaddress import IPv4Address, ip_address
from socket import AF_INET, AF_INET6

import pytest
from hypothesis import given
from hypothesis import strategies as st

from usocksd.egress import EgressPool, Source
from usocksd.errors import NoEgress
from usocksd.match import IPAddress

TEN = [ip_address(f"198.51.100.{n}") for n in range(10, 20)]
BOTH = [*TEN, ip_address("2001:db8::10"), ip_address("2001:db8::11")]
CLIENT = ip_address("10.0.0.1")


def test_without_addresses_the_kernel_chooses() -> None:
    nothing: frozenset[IPAddress] = frozenset()
    assert EgressPool().pick(CLIENT, "www.example.com", AF_INET, nothing) == Source(None, None, None)
    assert EgressPool(iface="eth1", mark=16).pick(CLIENT, "x", AF_INET6, nothing) == Source(None, "eth1", 16)


def test_interface_and_mark_apply_together_with_the_address() -> None:
    pool = EgressPool(TEN[:1], iface="eth1", mark=16)
    assert pool.pick(CLIENT, "x", AF_INET, frozenset(TEN)) == Source("198.51.100.10", "eth1", 16)


def test_the_address_is_usable_and_of_the_destinations_family() -> None:
    pool = EgressPool(BOTH)
    usable = frozenset(BOTH)
    for n in range(50):
        assert ip_address(str(pool.pick(CLIENT, f"{n}", AF_INET, usable).address)) in TEN
        assert ip_address(str(pool.pick(CLIENT, f"{n}", AF_INET6, usable).address)) in BOTH[10:]
        only = pool.pick(CLIENT, f"{n}", AF_INET, frozenset({TEN[3], ip_address("198.51.100.99")}))
        assert only.address == str(TEN[3])


def test_no_usable_address_of_the_family_is_an_error() -> None:
    pool = EgressPool(TEN, iface="eth1")
    with pytest.raises(NoEgress, match="IPv6"):
        pool.pick(CLIENT, "x", AF_INET6, frozenset(BOTH))
    with pytest.raises(NoEgress, match="IPv4"):
        pool.pick(CLIENT, "x", AF_INET, frozenset())
    assert pool.pick(CLIENT, "x", AF_INET, frozenset(TEN)).address  # and it recovers


def test_removing_one_of_ten_moves_only_its_own_clients() -> None:
    pool = EgressPool(TEN)
    everything, without = frozenset(TEN), frozenset(TEN[:4] + TEN[5:])
    clients = [IPv4Address(0x0A000000 + n) for n in range(10_000)]
    before = [pool.pick(client, "www.example.com", AF_INET, everything).address for client in clients]
    after = [pool.pick(client, "www.example.com", AF_INET, without).address for client in clients]
    moved = [old for old, new in zip(before, after, strict=True) if old != new]
    assert set(moved) == {str(TEN[4])}
    assert len(moved) == before.count(str(TEN[4]))
    assert 800 <= len(moved) <= 1200
    again = [pool.pick(client, "www.example.com", AF_INET, everything).address for client in clients]
    assert again == before


@given(
    st.lists(st.ip_addresses(v=4), min_size=2, max_size=8, unique=True),
    st.ip_addresses(),
    st.text(max_size=20),
    st.data(),
)
def test_an_address_that_goes_moves_nobody_elses_clients(
    addresses: list[IPAddress], client: IPAddress, destination: str, data: st.DataObject
) -> None:
    pool = EgressPool(addresses)
    before = pool.pick(client, destination, AF_INET, frozenset(addresses))
    gone = data.draw(st.sampled_from([a for a in addresses if str(a) != before.address]))
    assert pool.pick(client, destination, AF_INET, frozenset(addresses) - {gone}) == before
    assert EgressPool(reversed(addresses)).pick(client, destination, AF_INET, frozenset(addresses)) == before


def test_the_choice_depends_on_client_and_destination() -> None:
    pool = EgressPool(TEN)
    usable = frozenset(TEN)
    assert len({pool.pick(CLIENT, f"{n}.example", AF_INET, usable) for n in range(200)}) == 10
    assert len({pool.pick(ip_address(f"2001:db8::{n}"), "x", AF_INET, usable) for n in range(200)}) == 10


def test_the_choice_survives_a_restart() -> None:
    program = (
        "from ipaddress import ip_address as a; from socket import AF_INET\n"
        "from usocksd.egress import EgressPool\n"
        "ten = [a(f'198.51.100.{n}') for n in range(10, 20)]; pool = EgressPool(ten)\n"
        "print(*(pool.pick(a('10.0.0.1'), f'{n}', AF_INET, frozenset(ten)).address for n in range(20)))"
    )
    output = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    pool, usable = EgressPool(TEN), frozenset(TEN)
    assert output.split() == [pool.pick(CLIENT, f"{n}", AF_INET, usable).address for n in range(20)]


def test_what_is_remembered_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(EgressPool, "_MOST_REMEMBERED", 10)
    pool, usable = EgressPool(TEN), frozenset(TEN)
    for n in range(100):
        pool.pick(CLIENT, f"{n}", AF_INET, usable)
    assert len(pool._remembered) <= 10
