"""Which connections of the proxies the rules would take."""

from __future__ import annotations

from ipaddress import ip_address, ip_network

import pytest

from transocks.rules.config import Mode
from transocks.rules.loops import Sender, takes
from transocks.rules.redirection import Redirection

PUBLIC = "203.0.113.9"


@pytest.mark.parametrize(
    ("more", "sender", "address", "port", "taken"),
    [
        ({}, {}, PUBLIC, 443, True),
        ({}, {}, "2620:fe::fe", 443, True),
        ({}, {}, "10.1.2.3", 443, False),
        ({"exclude": ()}, {}, "10.1.2.3", 443, True),
        ({"exclude": (ip_network(f"{PUBLIC}/32"),)}, {}, PUBLIC, 443, False),
        ({}, {}, PUBLIC, 53, False),
        ({}, {"marks": frozenset({0x7473})}, PUBLIC, 443, False),
        ({"mark": 5}, {"marks": frozenset({0x7473})}, PUBLIC, 443, True),
        ({"mark": 5}, {"marks": frozenset({5})}, PUBLIC, 443, False),
        ({}, {"marks": frozenset({0x7473, 0})}, PUBLIC, 443, True),
        ({}, {"marks": None}, PUBLIC, 443, False),
        ({"exempt_users": (7,)}, {"uid": 7}, PUBLIC, 443, False),
        ({"exempt_users": (7,)}, {"uid": 8}, PUBLIC, 443, True),
        ({"users": (7,)}, {"uid": 7}, PUBLIC, 443, True),
        ({"users": (7,)}, {"uid": 8}, PUBLIC, 443, False),
        ({"groups": (7,)}, {"uid": 8, "gid": 7}, PUBLIC, 443, True),
        ({"cgroups": ("a/b",)}, {"cgroup": "a/b/c"}, PUBLIC, 443, True),
        ({"cgroups": ("a/b",)}, {"cgroup": "a/bc"}, PUBLIC, 443, False),
        ({"to": (ip_network("198.51.100.0/24"),)}, {}, PUBLIC, 443, False),
        ({"ports": ((80, 90),)}, {}, PUBLIC, 443, False),
        ({"ports": ((80, 90),)}, {}, PUBLIC, 85, True),
    ],
)
def test_what_is_taken(
    more: dict[str, object], sender: dict[str, object], address: str, port: int, taken: bool
) -> None:
    wanted = Redirection(mode=Mode.HOST, port=1081, **more)  # type: ignore[arg-type]
    assert takes(wanted, Sender(**sender), ip_address(address), port) == taken  # type: ignore[arg-type]
