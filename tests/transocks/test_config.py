"""transocks.toml: the original's settings, ours, and the sample in deploy/."""

from __future__ import annotations

import contextlib
import re
import socket
import tomllib
import traceback
from ipaddress import IPv6Address, ip_address, ip_network
from pathlib import Path

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from transocks.config import Config, GroupConfig, ProxyScheme, ProxyURL, parse_proxy_url
from transocks.route_settings import RouteConfig
from transocks.routes import Decision
from transocks.rules.config import Mode, RulesConfig, WhenDown
from transocks.rules.redirection import Redirection
from transocks.rules.render import excluded
from usocksd.errors import ConfigError
from usocksd.serve.plan import make_plan
from usocksd.settings.loader import SecretStr, load, parse
from usocksd.settings.types import DnsConfig, LogConfig

SAMPLE = Path(__file__).parents[2] / "deploy" / "transocks.toml"
PROXY = 'proxy_url = "socks5://10.20.30.40:1080"\n'


def faults(toml: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        parse(Config, toml, "transocks.toml")
    return [str(fault) for fault in caught.value.faults]


def listening(value: str) -> list[str]:
    return [str(listen) for listen in parse(Config, f"{PROXY}listen = {value}", "transocks.toml").listen]


def test_the_configuration_of_the_original_readme() -> None:
    config = parse(
        Config,
        """
        listen = "localhost:1081"
        proxy_url = "socks5://10.20.30.40:1080"
        [log]
        filename = "/path/to/file"
        level = "info"
        format = "json"
        """,
        "transocks.toml",
    )
    assert config.proxy_url == (ProxyURL(scheme=ProxyScheme.SOCKS5, host=ip_address("10.20.30.40"), port=1080),)
    assert config.log == LogConfig(filename="/path/to/file", level="info", format="json")
    assert config.listen == parse(Config, PROXY, "transocks.toml").listen


def test_only_the_proxy_is_required() -> None:
    assert faults("") == [
        "proxy_url: missing: expected socks5://USER:PASSWORD@HOST:PORT or http://USER:PASSWORD@HOST:PORT "
        "(user and password optional; also socks5h and socks4a), or a list of them"
    ]
    config = parse(Config, PROXY, "transocks.toml")
    assert config.mark is None
    assert config.timeouts.connect == 30


# listen


@pytest.mark.parametrize(
    ("value", "addresses"),
    [
        ('"localhost:1081"', ["127.0.0.1:1081", "[::1]:1081"]),
        ('"LocalHost:1081"', ["127.0.0.1:1081", "[::1]:1081"]),
        ('":1081"', ["0.0.0.0:1081", "[::]:1081"]),
        ('"*:1081"', ["0.0.0.0:1081", "[::]:1081"]),
        ('"0.0.0.0:1081"', ["0.0.0.0:1081"]),
        ('"[::]:1081"', ["[::]:1081"]),
        ('["127.0.0.1:1081", "[2001:db8::1]:0"]', ["127.0.0.1:1081", "[2001:db8::1]:0"]),
        (
            '["localhost:1081", "localhost:1082"]',
            [f"{a}:{p}" for p in (1081, 1082) for a in ("127.0.0.1", "[::1]")],
        ),
    ],
)
def test_listen(value: str, addresses: list[str]) -> None:
    assert listening(value) == addresses


def test_a_pair_for_both_families_is_optional_and_a_single_address_is_not() -> None:
    config = parse(Config, f'{PROXY}listen = ["localhost:1081", "192.0.2.1:1081"]', "transocks.toml")
    assert [listen.optional for listen in config.listen] == [True, True, False]


def test_listen_tproxy_is_as_listen_is_and_transparent() -> None:
    assert parse(Config, PROXY, "").listen_tproxy == ()
    assert parse(Config, f"{PROXY}listen_tproxy = []", "").listen_tproxy == ()
    config = parse(Config, f'{PROXY}listen_tproxy = [":1084", "192.0.2.1:1085"]', "")
    assert [str(listen) for listen in config.listen_tproxy] == ["0.0.0.0:1084", "[::]:1084", "192.0.2.1:1085"]
    assert [listen.optional for listen in config.listen_tproxy] == [True, True, False]
    assert all(listen.transparent for listen in config.listen_tproxy)
    assert not any(listen.transparent for listen in config.listen)
    listened = config.common().listen
    assert [key for key, _ in listened] == ["listen"] * 2 + ["listen_tproxy"] * 3
    addresses = make_plan(config.common()).listen
    assert [address.transparent for address in addresses] == [False] * 2 + [True] * 3


@pytest.mark.parametrize(
    ("value", "found"),
    [
        ('"localhost"', 'listen_tproxy: "localhost": expected a port'),
        ('[":1084", true]', "listen_tproxy[1]: true: expected "),
        ('[":1084", "[::1]:1084"]', 'listen_tproxy[1]: "[::1]:1084": clashes with ::'),
        ('"192.0.2.1:1081"', 'listen_tproxy: "192.0.2.1:1081": has a port of listen, expected another: '),
    ],
)
def test_faults_of_listen_tproxy(value: str, found: str) -> None:
    (fault,) = faults(f"{PROXY}listen_tproxy = {value}")
    assert fault.startswith(found)


def test_ports_of_the_kernel_s_choice_are_not_the_same() -> None:
    assert parse(Config, f'{PROXY}listen = ":0"\nlisten_tproxy = ":0"', "").listen_tproxy


def test_a_name_to_listen_on_is_looked_up_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def getaddrinfo(host: str, port: object, **_: object) -> list[tuple[object, ...]]:
        if host != "gateway.example":
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return [
            (2, 1, 6, "", ("192.0.2.1", 0)),
            (10, 1, 6, "", ("fe80::1%eth0", 0, 0, 2)),
            (10, 1, 6, "", ("2001:db8::1", 0, 0, 0)),
        ] * 2

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    assert listening('"gateway.example:1081"') == ["192.0.2.1:1081", "[2001:db8::1]:1081"]
    assert faults(f'{PROXY}listen = "nowhere.example:1081"') == [
        'listen: "nowhere.example:1081": expected a name that resolves: Name or service not known'
    ]


@pytest.mark.parametrize(
    ("value", "found"),
    [
        ("1081", ["listen: 1081: expected "]),
        ("[]", ["listen: []: expected "]),
        ('"localhost"', ['listen: "localhost": expected a port']),
        ('"::1:1081"', ['listen: "::1:1081": expected a port']),
        ('"localhost:65536"', ['listen: "localhost:65536": expected a port from 0 to 65535']),
        ('"localhost:http"', ['listen: "localhost:http": expected ']),
        ('"224.0.0.1:1081"', ['listen: "224.0.0.1:1081": is multicast']),
        ('"256.0.0.1:1081"', ['listen: "256.0.0.1:1081": expected ']),
        (
            '["127.0.0.1:1081", "localhost:1081", "a b:1", true]',
            ['listen[1]: "localhost:1081": is there already', 'listen[2]: "a b:1": ', "listen[3]: true: "],
        ),
        ('["127.0.0.1:1081", ":1081"]', ['listen[1]: ":1081": clashes with 127.0.0.1']),
    ],
)
def test_faults_of_listen(value: str, found: list[str]) -> None:
    result = faults(f"{PROXY}listen = {value}")
    assert len(result) == len(found)
    assert all(fault.startswith(start) for fault, start in zip(result, found, strict=True))


# proxy_url


@pytest.mark.parametrize(
    ("url", "proxy"),
    [
        ("socks5://192.0.2.1", ProxyURL(scheme=ProxyScheme.SOCKS5, host=ip_address("192.0.2.1"), port=1080)),
        ("SOCKS5h://Proxy.Example.:1/", ProxyURL(scheme=ProxyScheme.SOCKS5H, host="proxy.example", port=1)),
        (
            "socks5://[2001:db8::1]:1234",
            ProxyURL(scheme=ProxyScheme.SOCKS5, host=ip_address("2001:db8::1"), port=1234),
        ),
        ("socks5://[::1]", ProxyURL(scheme=ProxyScheme.SOCKS5, host=ip_address("::1"), port=1080)),
        ("http://proxy:3128", ProxyURL(scheme=ProxyScheme.HTTP, host="proxy", port=3128)),
        (
            "http://me:s3cret@proxy:3128/",
            ProxyURL(
                scheme=ProxyScheme.HTTP,
                host="proxy",
                port=3128,
                username="me",
                password=SecretStr("s3cret"),
            ),
        ),
        (
            "socks5://m%40e:p%3A%2F%C3%BC@s:w@proxy",
            ProxyURL(
                scheme=ProxyScheme.SOCKS5,
                host="proxy",
                port=1080,
                username="m@e",
                password=SecretStr("p:/ü@s:w"),
            ),
        ),
        ("socks4a://me@proxy", ProxyURL(scheme=ProxyScheme.SOCKS4A, host="proxy", port=1080, username="me")),
        (
            "socks5://me@proxy",
            ProxyURL(scheme=ProxyScheme.SOCKS5, host="proxy", port=1080, username="me", password=SecretStr("")),
        ),
    ],
)
def test_proxy_url(url: str, proxy: ProxyURL) -> None:
    assert parse_proxy_url(url) == proxy


def test_a_proxy_url_prints_without_the_password() -> None:
    proxy = parse_proxy_url("http://me:s3cret@[::1]:3128")
    assert str(proxy) == "http://[::1]:3128"
    assert "s3cret" not in repr(parse(Config, 'proxy_url = "http://me:s3cret@h:1"', ""))


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("", "expected socks5://USER"),
        ("me:s3cret@proxy:1080", "expected socks5://USER"),
        ("https://me:s3cret@proxy:1080", "expected socks5://, socks5h://, socks4a:// or http:// at the start"),
        ("socks5://me:s3cret", "expected HOST:PORT"),
        ("socks5://me:s3cret@", "expected HOST:PORT"),
        ("socks5://me:s3cret@proxy:x", "expected HOST:PORT"),
        ("socks5://me:s3cret@::1", "expected HOST:PORT"),
        ("socks5://me:s3cret@::1:1080", "expected HOST:PORT"),
        ("socks5://me:s3cret@proxy%eth0", "expected HOST:PORT"),
        ("socks5://me:s3cret@[2001:db8::1%eth0]", "expected an IP address without a zone"),
        ("socks5://me:s3cret@[fe80::1%25]", "expected a link-local address with the name of its interface"),
        ("socks5://me:s3cret@[fe80::1%2]", "expected a link-local address with the name of its interface"),
        ("socks5://me:s3cret@[fe80::1%a%b]", "expected a link-local address with the name of its interface"),
        ("socks5://me:s3cret@[::1", "expected HOST:PORT"),
        ("socks5://me:s3cret@pro xy", "expected HOST:PORT"),
        ("socks5://me:s3cret@proxy:65536", "expected HOST:PORT"),
        ("socks5://me:s3cret@proxy:0", "expected a port from 1"),
        ("http://me:s3cret@proxy", "expected a port from 1"),
        ("socks5://me:s3cret@proxy/path", "expected socks5://USER"),
        ("socks5://me:s3cret/@proxy", "expected user and password percent-encoded"),
        ("socks5://me:s3cret%@proxy", "expected user and password percent-encoded"),
        ("socks5://me:s3cret%ff@proxy", "expected user and password in UTF-8"),
        ("socks5://me:s3cret%0d%0a@proxy", "expected user and password without control characters"),
        ("http://me%3Ayou:s3cret@proxy:1", "expected a user without a colon"),
        ("socks4a://me:s3cret@proxy", "expected a user of 1 to 255 bytes and no password"),
        ("socks4a://s3cret:@proxy", "expected a user of 1 to 255 bytes and no password"),
        ("socks5://:s3cret@proxy", "expected a user of 1 to 255 bytes"),
        (f"socks5://me:s3cret{'x' * 255}@proxy", "expected a user of 1 to 255 bytes"),
        ("socks5://me:s3cret@0.0.0.0", "expected the address of one host"),
        ("socks5://me:s3cret@[fe80::1]", "expected a link-local address with the name of its interface"),
    ],
)
def test_faults_of_proxy_url_never_show_it(url: str, expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(Config, f"proxy_url = '{url}'", "transocks.toml")
    (fault,) = caught.value.faults
    assert fault.path == "proxy_url"
    assert fault.expected.startswith(expected)
    assert "s3cret" not in "".join(traceback.format_exception(caught.value))


@pytest.mark.parametrize("zone", ["%Eth0", "%25Eth0", "%25%45th0"])
def test_a_proxy_on_a_link(zone: str) -> None:
    """RFC 6874, and what everybody writes; interfaces have upper and lower case."""
    url = parse_proxy_url(f"socks5://me:pw@[FE80::1{zone}]:1")
    assert url.host == IPv6Address("fe80::1%Eth0")
    assert str(url) == "socks5://[fe80::1%Eth0]:1"
    assert parse_proxy_url(str(url)).host == url.host


@given(st.text(st.sampled_from("socks5htp://@:[].%1aé \n"), max_size=40))
def test_any_text_is_a_proxy_url_or_invalid(text: str) -> None:
    with contextlib.suppress(ValueError):  # of which Invalid is one
        parse_proxy_url(text)


def test_several_proxies_and_groups() -> None:
    config = parse(
        Config,
        """
        proxy_url = ["socks5://192.0.2.1", "http://me:s3cret@192.0.2.2:3128"]
        policy = "round-robin"
        [upstream.far]
        proxy_url = "socks4a://192.0.2.3"
        when_all_down = "direct"
        """,
        "transocks.toml",
    )
    default, far = config.groups().items()
    assert (default[0], list(map(str, default[1].proxy_url))) == (
        "default",
        ["socks5://192.0.2.1:1080", "http://192.0.2.2:3128"],
    )
    assert (default[1].policy, default[1].when_all_down) == ("round-robin", "refuse")
    assert (far[0], far[1].policy, far[1].when_all_down) == ("far", "failover", "direct")
    assert dict(config.common().more) == {
        "listen_tproxy": (),
        "proxy_url": "socks5://192.0.2.1:1080, http://192.0.2.2:3128",
        "upstream.far.proxy_url": "socks4a://192.0.2.3:1080",
    }


def test_faults_of_groups() -> None:
    found = faults("""
        proxy_url = ["socks5://192.0.2.1", 5, "socks6://me:s3cret@192.0.2.1", "socks5://me:s3cret"]
        policy = "random"
        when_all_down = "reject"
        [upstream.direct]
        proxy_url = "socks5://192.0.2.1"
        [upstream.default]
        proxy_url = []
        [upstream."a b"]
        polisy = "sticky"
        [health]
        interval = 0
        timeout = 1
        suspect_timeout = 2
    """)
    assert "s3cret" not in str(found)
    wanted = {
        "proxy_url[1]: expected socks5://USER": 1,
        "proxy_url[2]: expected socks5://, socks5h://": 1,
        "proxy_url[3]: expected HOST:PORT": 1,
        'policy: "random": expected one of "failover", "round-robin", "sticky"': 1,
        'when_all_down: "reject": expected one of "refuse", "direct"': 1,
        'upstream.direct: "direct": is a way without a proxy, expected another name': 1,
        'upstream.default: "default": is the group of proxy_url at the top, expected another name': 1,
        "upstream.default.proxy_url: expected socks5://USER": 1,
        'upstream."a b": "a b": expected a name of at most 64 letters': 1,
        'upstream."a b".proxy_url: missing: expected socks5://USER': 1,
        'upstream."a b".polisy: unknown key, did you mean policy?': 1,
        "health.interval: 0: expected seconds": 1,
    }
    assert {start: sum(fault.startswith(start) for fault in found) for start in wanted} == wanted
    assert len(found) == len(wanted)
    assert faults(f"{PROXY}[health]\ntimeout = 1\nsuspect_timeout = 2") == [
        "health.suspect_timeout: 2: expected at most timeout, which is 1"
    ]


def test_all_faults_at_once() -> None:
    found = faults('proxy_url = 5\nlisten = "x"\nmark = "m"\nproxy = ""\n[timeouts]\nidle = 0\n[dns]\nserver = []')
    assert [fault.partition(": ")[0] for fault in found] == [
        "proxy_url",
        "listen",
        "mark",
        "proxy",
        "timeouts.idle",
        "dns.server",
    ]


# The sample.


def test_the_sample_is_the_default() -> None:
    config = load(Config, SAMPLE)
    assert config == Config(proxy_url=(parse_proxy_url("socks5://127.0.0.1:1080"),))


def test_the_sample_shows_every_setting_and_its_default(tmp_path: Path) -> None:
    shown = re.sub(r"^#(?=\w+ = |\[|    \"|\])", "", SAMPLE.read_text(), flags=re.MULTILINE)
    table = tomllib.loads(shown)
    assert set(table) == {field.name for field in attrs.fields(Config) if field.init}
    (group,) = table.pop("upstream").values()
    assert set(group) == {field.name for field in attrs.fields(GroupConfig)}
    for field in attrs.fields(attrs.resolve_types(Config)):
        if field.name == "rules":  # a table, or none
            assert set(table["rules"]) == {inner.name.rstrip("_") for inner in attrs.fields(RulesConfig)}
        elif isinstance(table.get(field.name), dict):
            assert set(table[field.name]) == {inner.name for inner in attrs.fields(field.type)}
    (route,) = table["route"]
    assert set(route) == {field.name.rstrip("_") for field in attrs.fields(RouteConfig)}
    (tmp_path / "partners.txt").touch()
    config = parse(Config, shown, str(tmp_path / "transocks.toml"))
    assert (config.log.level, config.log.format) == ("info", "plain")
    assert config.upstream["far"].when_all_down == "refuse"
    assert config.listen_tproxy
    unset = {"mark": None, "workers": None, "metrics_port": None, "listen_tproxy": (), "rules": None}
    plain = attrs.evolve(config, **unset, upstream={}, route=(), dns=DnsConfig(), log=LogConfig())
    assert plain == Config(proxy_url=config.proxy_url)
    rules = config.rules
    assert rules is not None
    assert rules.exclude is not None
    # As networks: Python 3.13 writes an IPv4-mapped one in another way.
    assert set(rules.exclude) == set(map(ip_network, excluded(Redirection(mode=Mode.HOST, port=0))))
    assert (rules.reject_quic, rules.when_down, rules.tproxy_mark) == (True, WhenDown.OPEN, 0x7474)


# [names] and [[route]]


def test_names_and_routes() -> None:
    config = parse(
        Config,
        PROXY
        + """
        [names]
        wait = 0
        skip_ports = [22, "6000-6100"]
        client_first_ports = [80, "8000-8099"]
        skip_networks = ["10.0.0.0/8"]
        [upstream.partners]
        proxy_url = "socks5h://192.0.2.1"
        [[route]]
        to = [".partner.example"]
        via = "partners"
        send = "address"
        [[route]]
        name = "no mail"
        from = ["192.168.0.0/16"]
        ports = [25]
        via = "reject"
        """,
        "transocks.toml",
    )
    assert config.names.skip_ports == ((22, 22), (6000, 6100))
    assert config.names.client_first_ports == ((80, 80), (8000, 8099))
    assert config.routes().names == ["route 1", "no mail"]
    client, web = ip_address("192.168.1.1"), ip_address("203.0.113.80")
    assert config.routes().decide(client, web, "a.partner.example", 443) == Decision("route 1", "partners", False)
    assert config.routes().decide(client, web, "a.example", 25) == Decision("no mail", "reject", True)


def test_faults_of_names_and_routes() -> None:
    found = faults(
        PROXY
        + """
        [names]
        sniff = "yes"
        wait = -1
        long_wait = 0
        size = 100
        skip_ports = ["ssh"]
        client_first_ports = [-1]
        skip_networks = ["example.com"]
        send = "both"
        when_unresolved = "direct"
        when_ech = "refuse"
        [[route]]
        name = "a"
        via = "partner"
        [[route]]
        name = "a"
        via = "direct"
        send = "name"
        to = []
        [[route]]
        name = "route 7"
        to = ["file:no-such-file"]
        from = ["here"]
        ports = [70000]
        [[route]]
        name = "default"
        via = "default"
        form = []
        """
    )
    expected = [
        "names.sniff", "names.wait", "names.long_wait", "names.size", "names.skip_ports[0]", "names.client_first_ports[0]", "names.skip_networks[0]", "names.send",
        "names.when_unresolved", "names.when_ech", "route 2: to", "route 2: send", "route 3: name", "route 3: to[0]",
        "route 3: from[0]", "route 3: ports[0]", "route 3: via", "route 4: name", "route 4: form", "route 2: name",
        "route 1: via",
    ]  # fmt: skip
    assert sorted(re.sub(r"^((?:route \d+: )?[^:]*): .*", r"\1", fault) for fault in found) == sorted(expected)
    assert 'route 1: via: "partner": no such group: expected one of "default", "direct", "reject"' in found
    assert 'route 2: name: "a": is the name of route 1 too, expected another' in found
