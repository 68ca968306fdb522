"""transocks.toml: the original's settings, ours, and the sample in deploy/."""

from __future__ import annotations

import contextlib
import socket
import traceback
from ipaddress import IPv6Address, ip_address

import pytest
from hypothesis import given
from hypothesis import strategies as st
from marked import marked_faults

from transocks.config import ProxyScheme, ProxyURL, TransocksConfig, UdpConfig, parse_proxy_url
from transocks.routes import RouteDecision
from transocks.upstreams.proxy_url import SecretStr
from usocksd.errors import ConfigError
from usocksd.serve.plan import make_plan
from usocksd.settings.loader import parse
from usocksd.settings.types import LogConfig

PROXY = 'proxy_url = "socks5://10.20.30.40:1080"\n'


def faults(toml: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        parse(TransocksConfig, toml, "transocks.toml")
    return [str(fault) for fault in caught.value.faults]


def listening(value: str) -> list[str]:
    return [str(listen) for listen in parse(TransocksConfig, f"{PROXY}listen = {value}", "transocks.toml").listen]


def test_the_configuration_of_the_original_readme() -> None:
    config = parse(
        TransocksConfig,
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
    assert config.listen == parse(TransocksConfig, PROXY, "transocks.toml").listen


def test_only_the_proxy_is_required() -> None:
    assert faults("") == [
        "proxy_url: missing: expected socks5://USER:PASSWORD@HOST:PORT or http://USER:PASSWORD@HOST:PORT "
        "(user and password optional; also socks5h and socks4a), or a list of them"
    ]


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


def test_listen_tproxy_is_as_listen_is_and_transparent() -> None:
    assert parse(TransocksConfig, PROXY, "").listen_tproxy == ()
    assert parse(TransocksConfig, f"{PROXY}listen_tproxy = []", "").listen_tproxy == ()
    config = parse(TransocksConfig, f'{PROXY}listen_tproxy = [":1084", "192.0.2.1:1085"]', "")
    assert [str(listen) for listen in config.listen_tproxy] == ["0.0.0.0:1084", "[::]:1084", "192.0.2.1:1085"]
    assert [listen.optional for listen in config.listen_tproxy] == [True, True, False]
    assert all(listen.transparent for listen in config.listen_tproxy)
    assert not any(listen.transparent for listen in config.listen)
    listened = config.listen_keys
    assert [key for key, _ in listened] == ["listen"] * 2 + ["listen_tproxy"] * 3
    addresses = make_plan(config).listen
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


def test_listen_udp_may_have_the_ports_of_tcp_and_is_not_the_master_s() -> None:
    assert parse(TransocksConfig, PROXY, "").listen_udp == ()
    config = parse(TransocksConfig, f'{PROXY}listen_tproxy = ":1084"\nlisten_udp = [":1084", "192.0.2.1:1081"]', "")
    assert [str(listen) for listen in config.listen_udp] == ["0.0.0.0:1084", "[::]:1084", "192.0.2.1:1081"]
    assert all(listen.transparent for listen in config.listen_udp)
    assert [str(listen) for listen in make_plan(config).listen][2:] == ["0.0.0.0:1084", "[::]:1084"]
    (fault,) = faults(f'{PROXY}listen_udp = ["[::1]:1084", "localhost:1084"]')
    assert fault == 'listen_udp[1]: "localhost:1084": is there already, expected every address once'


def test_udp() -> None:
    config = parse(TransocksConfig, f'{PROXY}when_no_udp = "direct"\n[upstream.a]\nproxy_url = "http://h:3128"', "")
    assert [group.when_no_udp for group in config.groups().values()] == ["direct", "refuse"]
    assert config.udp == UdpConfig(idle=300.0, flows=4096, queue=64)
    found = faults(f'{PROXY}when_no_udp = "drop"\n[udp]\nidle = 0\nflows = 0\nqueue = 0')
    assert [fault.partition(": ")[0] for fault in found] == ["when_no_udp", "udp.idle", "udp.flows", "udp.queue"]


def test_ports_of_the_kernel_s_choice_are_not_the_same() -> None:
    assert parse(TransocksConfig, f'{PROXY}listen = ":0"\nlisten_tproxy = ":0"', "").listen_tproxy


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
    ("url", "scheme", "host", "port", "user", "password"),
    [
        ("socks5://192.0.2.1", "socks5", "192.0.2.1", 1080, None, None),
        ("SOCKS5h://Proxy.Example.:1/", "socks5h", "proxy.example", 1, None, None),
        ("socks5://[2001:db8::1]:1234", "socks5", "2001:db8::1", 1234, None, None),
        ("socks5://[::1]", "socks5", "::1", 1080, None, None),
        ("http://me:s3cret@proxy:3128/", "http", "proxy", 3128, "me", "s3cret"),
        ("socks5://m%40e:p%3A%2F%C3%BC@s:w@proxy", "socks5", "proxy", 1080, "m@e", "p:/ü@s:w"),
        ("socks4a://me@proxy", "socks4a", "proxy", 1080, "me", None),
        ("socks5://me@proxy", "socks5", "proxy", 1080, "me", ""),
    ],
)
def test_proxy_url(url: str, scheme: str, host: str, port: int, user: str | None, password: str | None) -> None:
    assert parse_proxy_url(url) == ProxyURL(
        scheme=ProxyScheme(scheme),
        host=host if host.startswith("proxy") else ip_address(host),
        port=port,
        username=user,
        password=None if password is None else SecretStr(password),
    )


def test_a_password_does_not_print() -> None:
    secret = SecretStr("hunter2")
    assert f"{secret} {secret!r} {secret!s:>5}".split() == ["***", "***", "***"]
    assert (secret.reveal(), hash(secret)) == ("hunter2", hash(SecretStr("hunter2")))
    assert secret == SecretStr("hunter2")
    assert secret not in (SecretStr("hunter3"), "hunter2")


def test_a_proxy_url_prints_without_the_password() -> None:
    proxy = parse_proxy_url("http://me:s3cret@[::1]:3128")
    assert str(proxy) == "http://[::1]:3128"
    assert "s3cret" not in repr(parse(TransocksConfig, 'proxy_url = "http://me:s3cret@h:1"', ""))


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
        parse(TransocksConfig, f"proxy_url = '{url}'", "transocks.toml")
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
        TransocksConfig,
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
    assert dict(config.shown) == {
        "listen_tproxy": (),
        "listen_udp": (),
        "proxy_url": "socks5://192.0.2.1:1080, http://192.0.2.2:3128",
        "upstream.far.proxy_url": "socks4a://192.0.2.3:1080",
    }


def test_faults_of_groups() -> None:
    found = marked_faults(
        TransocksConfig,
        """
        proxy_url = ["socks5://192.0.2.1", 5, "socks6://me:s3cret@192.0.2.1", "socks5://me:s3cret"]  # 3
        policy = "random"  # 1
        when_all_down = "reject"  # 1
        [upstream.direct]  # 1
        proxy_url = "socks5://192.0.2.1"
        [upstream.default]  # 1
        proxy_url = []  # 1
        [upstream."a b"]  # 2
        polisy = "sticky"  # 1
        [health]
        interval = 0  # 1
        timeout = 1
        suspect_timeout = 2
        """,
    )
    assert "s3cret" not in str(found)
    assert 'upstream.direct: "direct": is a way without a proxy, expected another name' in found
    assert 'upstream.default: "default": is the group of proxy_url at the top, expected another name' in found
    assert 'upstream."a b".polisy: unknown key, did you mean policy?' in found
    assert faults(f"{PROXY}[health]\ntimeout = 1\nsuspect_timeout = 2") == [
        "health.suspect_timeout: 2: expected at most timeout, which is 1"
    ]


# [names] and [[route]]


def test_names_and_routes() -> None:
    config = parse(
        TransocksConfig,
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
    assert config.routes().decide(client, web, "a.partner.example", 443) == RouteDecision("route 1", "partners", False)
    assert config.routes().decide(client, web, "a.example", 25) == RouteDecision("no mail", "reject", True)


def test_faults_of_names_and_routes() -> None:
    found = marked_faults(
        TransocksConfig,
        PROXY
        + """
        [names]
        sniff = "yes"  # 1
        wait = -1  # 1
        long_wait = 0  # 1
        size = 100  # 1
        skip_ports = ["ssh"]  # 1
        client_first_ports = [-1]  # 1
        skip_networks = ["example.com"]  # 1
        send = "both"  # 1
        when_unresolved = "direct"  # 1
        when_ech = "refuse"  # 1
        [[route]]
        name = "a"
        via = "partner"  # 1
        [[route]]
        name = "a"  # 1
        via = "direct"
        send = "name"  # 1
        to = []  # 1
        [[route]]  # 1
        name = "route 7"  # 1
        to = ["file:no-such-file"]  # 1
        from = ["here"]  # 1
        ports = [70000]  # 1
        protocol = "icmp"  # 1
        [[route]]
        name = "default"  # 1
        via = "default"
        form = []  # 1
        """,
    )
    assert 'route 1: via: "partner": no such group: expected one of "default", "direct", "reject"' in found
    assert 'route 2: name: "a": is the name of route 1 too, expected another' in found
