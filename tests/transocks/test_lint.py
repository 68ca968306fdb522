"""Warnings of transocks, beside those of both daemons."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import attrs
import pytest

from transocks.config import TransocksConfig, parse_proxy_url
from transocks.lint import lint
from usocksd.settings.loader import parse
from usocksd.settings.warnings import HostFacts

PROXY = 'proxy_url = "socks5://192.0.2.1:1080"\n'


def keys(toml: str, **facts: Any) -> list[str]:
    return [fault.path for fault in lint(parse(TransocksConfig, toml, "transocks.toml"), **facts)]


def test_nothing_is_wrong_with_the_defaults() -> None:
    assert lint(TransocksConfig(proxy_url=(parse_proxy_url("socks5://127.0.0.1:1080"),))) == []


@pytest.mark.parametrize(
    ("proxy", "listen", "loop"),
    [
        ("127.0.0.1:1081", "localhost:1081", True),
        ("[::1]:1081", "localhost:1081", True),
        ("localhost:1081", "127.0.0.1:1081", True),
        ("LOCALHOST.:1081", ":1081", True),
        ("127.0.0.9:1081", "0.0.0.0:1081", True),
        ("127.0.0.9:1081", "127.0.0.1:1081", False),
        ("127.0.0.1:1081", "[::]:1081", False),
        ("192.0.2.77:1081", ":1081", False),
        ("localhost:1080", "localhost:1081", False),
        ("proxy.example:1081", ":1081", False),
    ],
)
@pytest.mark.parametrize("scheme", ["socks5", "http"])
def test_a_proxy_that_is_ourselves(scheme: str, proxy: str, listen: str, loop: bool) -> None:
    toml = f'proxy_url = "{scheme}://{proxy}"\nlisten = "{listen}"'
    assert keys(toml) == ["proxy_url"] * loop


def test_a_proxy_that_is_our_tproxy_listener() -> None:
    toml = 'proxy_url = "socks5://127.0.0.1:1084"\nlisten_tproxy = ":1084"'
    assert "proxy_url" in keys(toml)


@pytest.mark.parametrize("may", [True, False])
def test_sockets_that_this_user_may_not_open(may: bool) -> None:
    host = attrs.evolve(HostFacts.here(()), may_be_transparent=may)
    assert keys(f'{PROXY}listen_tproxy = ":1084"', host=host) == ["listen_tproxy"] * (not may)
    assert keys(f'{PROXY}listen_udp = ":1084"', host=host) == ["listen_udp"] * (not may)
    assert keys(PROXY, host=host) == []


def test_an_address_for_datagrams_that_this_host_lacks() -> None:
    assert keys(f'{PROXY}listen_udp = "192.0.2.77:1084"') == ["listen_udp"]


def test_groups_without_udp() -> None:
    http, listen = 'proxy_url = ["http://192.0.2.1:3128", "socks4a://192.0.2.2"]\n', 'listen_udp = "localhost:1084"\n'
    assert keys(http) == []
    assert keys(http + listen) == ["when_no_udp"]
    assert keys(f'{http}{listen}when_no_udp = "direct"\nmark = 1') == []
    assert keys(f"{PROXY}{listen}[upstream.far]\n{http}[[route]]\nvia = 'far'") == ["upstream.far.when_no_udp"]


def test_a_password_that_everybody_may_read(tmp_path: Path) -> None:
    file = tmp_path / "transocks.toml"
    with_password = TransocksConfig(proxy_url=(parse_proxy_url("http://me:s3cret@192.0.2.1:3128"),))
    file.touch()
    file.chmod(0o644)
    assert list(map(str, lint(with_password, str(file)))) == [
        f"proxy_url: has a password, and every user may read this file: chmod o-r {file}, and give it to the group"
        " of the service"
    ]
    assert lint(with_password) == []
    for url in ("http://192.0.2.1:3128", "http://me@192.0.2.1:3128"):
        assert lint(TransocksConfig(proxy_url=(parse_proxy_url(url),)), str(file)) == []
    file.chmod(0o640)
    assert lint(with_password, str(file)) == []


def test_each_proxy_of_each_group_is_looked_at(tmp_path: Path) -> None:
    file = tmp_path / "transocks.toml"
    file.touch()
    file.chmod(0o644)
    toml = """
        proxy_url = ["socks5://127.0.0.1:1080", "socks5://127.0.0.1:1081"]
        [upstream.far]
        proxy_url = ["http://192.0.2.1:3128", "http://me:s3cret@192.0.2.2:3128", "http://192.0.2.1:3128"]
        [upstream.near]
        proxy_url = "http://localhost:1081"
        policy = "sticky"
        [[route]]
        to = ["www.example.com"]
        via = "far"
        [[route]]
        to = ["www.example.org"]
        via = "near"
    """
    found = lint(parse(TransocksConfig, toml, "transocks.toml"), str(file))
    assert [fault.path for fault in found] == [
        "proxy_url[1]",
        "upstream.far.proxy_url[1]",
        "upstream.far.proxy_url[2]",
        "upstream.near.proxy_url",
        "upstream.near.policy",
    ]
    assert "s3cret" not in str(found)
    assert "is there already" in found[2].expected


def test_direct_connections_have_to_be_exempt() -> None:
    direct = f'{PROXY}when_all_down = "direct"\n'
    far = '[upstream.far]\nproxy_url = "socks5://192.0.2.2"\nwhen_all_down = "direct"\n'
    far += '[[route]]\nto = ["www.example.com"]\nvia = "far"'
    route = '[[route]]\nto = ["10.0.0.0/8"]\nvia = "direct"\n'
    for toml, key in (
        (direct, "when_all_down"),
        (PROXY + far, "upstream.far.when_all_down"),
        (direct.replace("all_down", "no_udp"), "when_no_udp"),
        (PROXY + route, "route[0].via"),
    ):
        assert keys(toml, own_users=["nobody-has-this"]) == [key]
        assert keys(toml, own_users=["nobody-has-this", "root"]) == []
    assert "when_all_down" not in keys(f"{direct}mark = 1\n{far}", own_users=["nobody-has-this"])


def test_common_warnings_have_the_keys_of_transocks() -> None:
    assert keys(f'{PROXY}listen = "192.0.2.77:1081"') == ["listen"]
    assert keys(f'{PROXY}listen = ["localhost:1083"]\nmetrics_port = 1083') == ["metrics_port"]
    assert keys(f'{PROXY}metrics_address = "::1"\nmetrics_port = 0') == ["metrics_address"]
    assert keys(f"{PROXY}[timeouts]\nidle = 1\nhalf_closed = 1") == ["timeouts.handshake"]


def test_routes_and_groups_without_effect() -> None:
    routes = """
        [upstream.used]
        proxy_url = "socks5://192.0.2.2"
        [upstream.unused]
        proxy_url = "socks5h://192.0.2.3"
        [[route]]
        name = "all of it"
        to = [".example.com", "203.0.113.0/24"]
        via = "used"
        [[route]]
        to = ["www.example.com", "203.0.113.80"]
        ports = [80]
        via = "reject"
        [[route]]
        to = ["www.example.com", "203.0.114.80"]
        via = "reject"
        [[route]]
        via = "used"
        send = "name"
        [[route]]
        from = ["10.0.0.0/8"]
        via = "default"
    """
    found = list(map(str, lint(parse(TransocksConfig, PROXY + routes, ""))))
    assert [warning.partition(", ")[0] for warning in found] == [
        "route 2: never decides",
        'route 4: send: "name": its proxies take addresses only: expected socks5h in used',
        "route 5: never decides",
        'upstream.unused: no route leads there: expected a route with via = "unused"',
    ]
    assert 'since route 1 "all of it" above' in found[0]
    assert "since route 4 above" in found[2]


def test_networks_that_read_as_one_address() -> None:
    route = '[[route]]\nvia = "reject"\nfrom = ["10.1.2.3/8"]\nto = ["10.0.0"]\n'
    names = '[names]\nskip_networks = ["10.1.2.3/8"]\n'
    rules = '[rules]\nmode = "gateway"\nfrom = ["10.1.2.3/8"]\nto = ["10.0.0.1/8"]\nexclude = ["::1/64"]\n'
    wanted = ["route[0].from[0]", "route[0].to[0]", "names.skip_networks[0]", "rules.from[0]", "rules.to[0]"]
    assert [key for key in keys(PROXY + 'listen = ":1081"\n' + route + names + rules) if key[-1] == "]"] == [
        *wanted,
        "rules.exclude[0]",
    ]


def test_routes_by_name_without_sniffing() -> None:
    route = '[[route]]\nto = ["a.example", ".b.example"]\nvia = "reject"\n'
    assert keys(PROXY + route) == []
    assert keys(f"{PROXY}{route}[names]\nsniff = false\n") == ["route[0].to"]
    assert keys(f'{PROXY}{route}protocol = "tcp"') == []
    assert keys(f'{PROXY}{route}protocol = "udp"') == ["route[0].to"]


def test_a_route_of_one_protocol_does_not_cover_the_other() -> None:
    for above, below, covered in (
        ("tcp", "udp", False),
        ("udp", None, False),
        (None, "udp", True),
        ("tcp", "tcp", True),
    ):
        routes = [
            f'[[route]]\nvia = "reject"\n{f"protocol = {chr(34)}{each}{chr(34)}" if each else ""}\n'
            for each in (above, below)
        ]
        assert keys(PROXY + "".join(routes)) == ["route[1]"] * covered


def test_rules_that_can_not_be_applied_here() -> None:
    proxy = 'proxy_url = "socks5://192.0.2.1"\nmetrics_port = 0\ncontrol = ""\n'
    assert "rules.mode" in keys(f'{proxy}[rules]\nmode = "host"')
    assert "rules.mode" not in keys(f'{proxy}[rules]\nmode = "host"\nexempt_users = ["root"]')
    found = keys(
        f"""{proxy}listen_tproxy = "localhost:1084"
        [rules]
        mode = ["host", "tproxy"]
        tool = "iptables"
        users = ["root", "no-such-user", 4711]
        groups = ["no-such-group"]
        exempt_users = ["no-such-user"]
        interfaces = ["lo", "no-such-if"]
        """
    )
    expected = ["rules.users[1]", "rules.groups[0]", "rules.exempt_users[0]", "rules.interfaces[1]"]
    assert set(expected) | {"rules.tool"} <= set(found)
    assert not {"rules.users[0]", "rules.users[2]", "rules.interfaces[0]"} & set(found)
