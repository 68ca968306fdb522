"""[rules] of transocks.toml."""

from __future__ import annotations

from ipaddress import ip_network

import pytest

from transocks.config import TransocksConfig
from transocks.rules.config import Mode, Tool
from usocksd.errors import ConfigError
from usocksd.settings.loader import parse

PROXY = 'proxy_url = "socks5://10.20.30.40:1080"\n'


def faults(toml: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        parse(TransocksConfig, toml, "transocks.toml")
    return [str(fault) for fault in caught.value.faults]


def test_rules() -> None:
    config = parse(
        TransocksConfig,
        PROXY
        + """
        listen = ":1081"
        [rules]
        mode = ["host", "gateway"]
        tool = "iptables"
        users = ["backup", 0]
        cgroups = ["/system.slice/a.service/"]
        from = ["192.168.1.7/16"]
        ports = [443, "80", "8000-8100"]
        """,
        "transocks.toml",
    )
    rules = config.rules
    assert rules is not None
    assert (rules.mode, rules.tool) == ((Mode.HOST, Mode.GATEWAY), Tool.IPTABLES)
    assert (rules.users, rules.cgroups) == (("backup", 0), ("system.slice/a.service",))
    assert rules.from_ == (ip_network("192.168.0.0/16"),)
    assert rules.ports == ((443, 443), (80, 80), (8000, 8100))
    assert parse(TransocksConfig, PROXY, "transocks.toml").rules is None


def test_faults_of_rules() -> None:
    assert faults(PROXY + "[rules]")[0].startswith('rules.mode: missing: expected "host", "gateway"')
    found = faults(
        PROXY
        + """
        [rules]
        mode = ["tproxy"]
        tool = "ipchains"
        users = ["a b", -1]
        groups = ["g"]
        cgroups = ["a/../b"]
        interfaces = ["wlan+", ""]
        from = ["here"]
        ports = [0, "9-8"]
        reject_quic = 1
        when_down = "ajar"
        tproxy_mark = 254
        """
    )
    expected = [
        "tool", "users[0]", "users[1]", "cgroups[0]", "interfaces[0]", "interfaces[1]", "from[0]", "ports[0]", "ports[1]",
        "reject_quic", "when_down", "users", "groups", "cgroups", "tproxy_mark",
    ]  # fmt: skip
    assert sorted(fault.partition(":")[0] for fault in found) == sorted(f"rules.{key}" for key in expected)


@pytest.mark.parametrize(
    ("settings", "fault"),
    [
        ('mode = ["gateway", "tproxy"]', 'expected "gateway" or "tproxy"'),
        ('mode = ["host", "host"]', "expected each mode once"),
        ("mode = []", 'expected "host", "gateway", "tproxy", or a list'),
        ('mode = "host"\ninterfaces = ["lan0"]', 'expected mode "gateway" or "tproxy" beside it'),
        ('mode = "tproxy"\ntproxy_mark = 0x7473', "rules.tproxy_mark: 0x7473: expected another"),
        ('mode = "gateway"', 'expected listen = ":1081" beside it'),
        ('mode = "tproxy"', 'expected listen_tproxy = "localhost:1084" beside it'),
    ],
)
def test_settings_of_rules_that_contradict_each_other(settings: str, fault: str) -> None:
    (found,) = faults(f"{PROXY}[rules]\n{settings}")
    assert fault in found


def test_rules_send_nothing_to_a_listener_of_one_link() -> None:
    (found,) = faults(f"""{PROXY}listen_tproxy = "[fe80::1%eth0]:1084"\n[rules]\nmode = "tproxy"\n""")
    assert 'expected listen_tproxy = "localhost:1084" beside it' in found
