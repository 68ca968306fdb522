"""Routes: the first that matches, and what a name may lead to."""

from __future__ import annotations

from collections.abc import Sequence
from ipaddress import ip_address, ip_network

import pytest
from hypothesis import given
from hypothesis import strategies as st

from transocks.routes import Route, RouteDecision, Routes
from usocksd.names.match import judged_addresses, parse_network
from usocksd.names.sites import SiteList, parse_entry
from usocksd.net.address import IPAddress

CLIENT, OTHER_CLIENT = ip_address("192.168.7.2"), ip_address("192.168.8.2")
WEB, WEB_V6 = ip_address("203.0.113.80"), ip_address("2001:db8:80::80")


def route(
    name: str,
    via: str,
    *to: str,
    clients: Sequence[str] = (),
    ports: Sequence[tuple[int, int]] = (),
    send_name: bool = True,
    protocol: str | None = None,
) -> Route:
    return Route(
        name=name,
        via=via,
        protocol=protocol,
        clients=tuple(map(parse_network, clients)) or None,
        to=(SiteList(map(parse_entry, to)),) if to else None,
        ports=tuple(ports) or None,
        send_name=send_name,
    )


def test_without_routes_all_go_to_the_default() -> None:
    for send in (True, False):
        assert Routes([], send_name=send).decide(CLIENT, WEB, "a.example", 80) == RouteDecision(
            "default", "default", send
        )


def test_the_first_that_matches() -> None:
    routes = Routes(
        [
            route("no mail", "reject", ports=[(25, 25), (465, 465)]),
            route("partners", "partners", ".partner.example", "2001:db8:80::/48", send_name=False),
            route("printers", "direct", "203.0.113.0/24", ".print.example", clients=["192.168.7.0/24"]),
            route("by address", "other", ""),
        ],
        send_name=True,
    )
    assert routes.names == ["no mail", "partners", "printers", "by address"]
    for client, address, name, port, found in (
        (CLIENT, WEB, "a.partner.example", 25, RouteDecision("no mail", "reject", True)),
        (CLIENT, WEB, "a.partner.example", 80, RouteDecision("partners", "partners", False)),
        (CLIENT, WEB_V6, None, 80, RouteDecision("partners", "partners", False)),
        (CLIENT, WEB, "partner.example", 80, RouteDecision("printers", "direct", False)),
        (OTHER_CLIENT, WEB, "partner.example", 80, RouteDecision("default", "default", True)),
        (OTHER_CLIENT, WEB, None, 80, RouteDecision("by address", "other", True)),
    ):
        assert routes.decide(client, address, name, port) == found


def test_the_direct_way_dials_what_the_route_matched() -> None:
    """A forged name leads only to addresses of that name, and no name leads around a route for an address."""
    routes = Routes([route("inside", "direct", "203.0.113.0/24", ".inside.example")], send_name=True)
    elsewhere = ip_address("198.51.100.7")
    assert routes.decide(CLIENT, elsewhere, "x.inside.example", 443) == RouteDecision("inside", "direct", True)
    assert routes.decide(CLIENT, WEB, "evil.example", 443) == RouteDecision("inside", "direct", False)
    assert routes.decide(CLIENT, WEB, "x.inside.example", 443) == RouteDecision("inside", "direct", False)
    everything = Routes([route("all", "direct")], send_name=True)
    assert everything.decide(CLIENT, elsewhere, "x.inside.example", 443) == RouteDecision("all", "direct", False)


def test_a_rejected_network_is_rejected_inside_ipv6_too() -> None:
    routes = Routes(
        [route("no", "reject", "203.0.113.0/24"), route("way", "direct", "198.51.100.0/24")], send_name=True
    )
    assert routes.decide(CLIENT, ip_address("64:ff9b::203.0.113.80"), None, 80).route == "no"
    assert routes.decide(CLIENT, ip_address("64:ff9b::198.51.100.1"), None, 80).route == "default"


NAMES = ["a.example", "b.a.example", "example", "c.test"]
ADDRESSES = [*map(ip_address, ["10.1.2.3", "10.1.3.4", "203.0.113.80", "2001:db8::1", "64:ff9b::a01:203"])]
ENTRIES = [*NAMES, ".example", ".a.example", "10.1.0.0/16", "10.1.2.3", "2001:db8::/32", "::/0", "0.0.0.0/0", ""]
CLIENTS = [*map(ip_address, ["192.168.7.2", "192.168.8.2", "fd00::1"])]
RANGES = [(80, 80), (1, 1023), (443, 8080)]


@st.composite
def any_routes(draw: st.DrawFn) -> list[tuple[Route, list[str]]]:
    made = []
    for number in range(draw(st.integers(0, 5))):
        to = draw(st.lists(st.sampled_from(ENTRIES), max_size=3, unique=True))
        made.append(
            (
                route(
                    f"route {number}",
                    draw(st.sampled_from(["default", "other", "direct", "reject"])),
                    *to,
                    clients=draw(st.sampled_from([(), ("192.168.7.0/24",), ("192.168.0.0/16", "fd00::/8")])),
                    ports=draw(st.lists(st.sampled_from(RANGES), max_size=2)),
                    send_name=draw(st.booleans()),
                    protocol=draw(st.sampled_from([None, "tcp", "udp"])),
                ),
                to,
            )
        )
    return made


def naive(
    routes: list[tuple[Route, list[str]]],
    client: IPAddress,
    address: IPAddress,
    name: str | None,
    port: int,
    protocol: str,
) -> RouteDecision:
    for each, to in routes:
        if each.protocol not in (None, protocol):
            continue
        if each.clients and not any(client in network for network in each.clients):
            continue
        if each.ports and not any(first <= port <= last for first, last in each.ports):
            continue
        judged = judged_addresses(address) if each.via == "reject" else (address,)
        by_address, by_name = not to, False
        for entry in to:
            if entry == "":
                by_address |= name is None
            elif "/" in entry or entry[0].isdigit():
                by_address |= any(ip in ip_network(entry) for ip in judged)
            elif name is not None:
                by_name |= name.endswith(entry) if entry.startswith(".") else name == entry
        if by_address or by_name:
            return RouteDecision(each.name, each.via, not by_address if each.via == "direct" else each.send_name)
    return RouteDecision("default", "default", True)


@given(
    any_routes(),
    st.sampled_from(CLIENTS),
    st.sampled_from(ADDRESSES),
    st.sampled_from([*NAMES, None]),
    st.sampled_from([22, 80, 443, 8080, 9000]),
    st.sampled_from(["tcp", "udp"]),
)
def test_as_a_naive_walk_decides(
    made: list[tuple[Route, list[str]]],
    client: IPAddress,
    address: IPAddress,
    name: str | None,
    port: int,
    protocol: str,
) -> None:
    routes = Routes([each for each, _ in made], send_name=True)
    found = naive(made, client, address, name, port, protocol)
    assert routes.decide(client, address, name, port, protocol) == found


@pytest.mark.parametrize("count", [1, 500])
def test_many_routes(count: int) -> None:
    routes = Routes([route(str(at), "other", f"n{at}.example") for at in range(count)], send_name=True)
    assert routes.decide(CLIENT, WEB, f"n{count - 1}.example", 443).route == str(count - 1)
