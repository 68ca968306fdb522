"""usocksd.toml: the original's files, our tables, and the sample in deploy/."""

from __future__ import annotations

from ipaddress import ip_address, ip_network
from pathlib import Path

import pytest
from marked import marked_faults

from usocksd.config import Auth, PoolConfig, UsocksdConfig
from usocksd.errors import ConfigError
from usocksd.settings.loader import Invalid, load, parse

DATA = Path(__file__).parent / "data"


def faults(toml: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        parse(UsocksdConfig, toml, "usocksd.toml")
    return [str(fault) for fault in caught.value.faults]


def test_the_original_test_configuration() -> None:
    config = load(UsocksdConfig, DATA / "original.toml")
    assert config.incoming.port == 1080
    assert config.incoming.addresses == (ip_address("127.0.0.1"),)
    assert config.incoming.allow_from == (ip_network("10.0.0.0/8"), ip_network("192.168.1.1/32"))
    assert config.outgoing.allow_sites == ("www.amazon.com", ".google.com")
    assert config.outgoing.deny_sites == (".2ch.net", "bad.google.com")
    assert config.outgoing.deny_ports == (22, 25)
    assert config.outgoing.addresses == (ip_address("12.34.56.78"),)
    assert config.outgoing.dnsbl_domain == "zen.spamhaus.org"


def test_the_faulty_configurations_of_the_original_are_refused() -> None:
    with pytest.raises(ConfigError) as caught:
        load(UsocksdConfig, DATA / "original-bad-key.toml")
    assert [str(fault) for fault in caught.value.faults] == [
        "hoge: unknown key, expected one of log, dns, timeouts, limits, workers, incoming, outgoing, rule, egress, auth,"
        " udp, bind, control"
    ]
    with pytest.raises(ConfigError) as caught:
        load(UsocksdConfig, DATA / "original-bad-type.toml")
    assert [str(fault) for fault in caught.value.faults] == [
        'incoming.allow_from: "12.34.56.78": expected a list, as in ["12.34.56.78"]'
    ]


def test_allow_from() -> None:
    config = parse(
        UsocksdConfig,
        '[incoming]\nallow_from = ["10.1.2.3/8", "192.0.2.1", "2001:db8::1", "::ffff:10.0.0.0/104"]',
        "usocksd.toml",
    )
    assert config.incoming.allow_from == (
        ip_network("10.0.0.0/8"),  # host bits are cleared, as in the original
        ip_network("192.0.2.1/32"),
        ip_network("2001:db8::1/128"),  # the original: /32
        ip_network("10.0.0.0/8"),
    )


def test_empty_lists_and_strings_are_as_none() -> None:
    config = parse(
        UsocksdConfig,
        """
        [incoming]
        addresses = []
        allow_from = []
        [outgoing]
        allow_sites = []
        addresses = []
        iface = ""
        dnsbl_domain = ""
        """,
        "usocksd.toml",
    )
    assert config == UsocksdConfig()


PROXIED = '[incoming.proxy_protocol]\nport = 1090\ntrusted = ["192.0.2.1"]\n'
OWN = '[incoming]\naddresses = ["127.0.0.1"]\n'


@pytest.mark.parametrize(
    ("toml", "listening"),
    [
        ("[incoming]\nport = 1234", ["port 0.0.0.0:1234", "port [::]:1234"]),
        ('[incoming]\naddresses = ["127.0.0.1", "::1"]', ["addresses[0] 127.0.0.1:1080", "addresses[1] [::1]:1080"]),
        # The listener for proxies is on the addresses of the other one, unless it has its own.
        (
            PROXIED,
            [
                "port 0.0.0.0:1080",
                "port [::]:1080",
                "proxy_protocol.port 0.0.0.0:1090",
                "proxy_protocol.port [::]:1090",
            ],
        ),
        (OWN + PROXIED, ["addresses[0] 127.0.0.1:1080", "addresses[0] 127.0.0.1:1090"]),
        (
            f'{OWN}{PROXIED}addresses = ["::1"]\n',
            ["addresses[0] 127.0.0.1:1080", "proxy_protocol.addresses[0] [::1]:1090"],
        ),
    ],
)
def test_listening(toml: str, listening: list[str]) -> None:
    found = parse(UsocksdConfig, toml, "").listen_keys
    assert [f"{key.removeprefix('incoming.')} {listen}" for key, listen in found] == listening
    # Both families of the wildcard, of which a host may have one only.
    assert all(listen.optional == listen.address.is_unspecified for _, listen in found)


@pytest.mark.parametrize(
    ("table", "found"),
    [
        ("", ["incoming.proxy_protocol.port: missing: ", "incoming.proxy_protocol.trusted: missing: "]),
        (
            'port = 0\ntrusted = "192.0.2.1"',
            [
                "incoming.proxy_protocol.port: 0: expected an integer from 1",
                'incoming.proxy_protocol.trusted: "192.0.2.1": expected a list',
            ],
        ),
        ("port = 1090\ntrusted = []", ["incoming.proxy_protocol.trusted: []: expected the networks of your proxies"]),
        ('port = 1080\ntrusted = ["::1"]', ["incoming.proxy_protocol.port: 1080: is incoming.port too, expected"]),
    ],
)
def test_faults_of_the_listener_for_proxies(table: str, found: list[str]) -> None:
    result = faults(f"[incoming.proxy_protocol]\n{table}")
    assert [fault[: len(start)] for fault, start in zip(result, found, strict=True)] == found


def test_sites_are_kept_as_written() -> None:
    sites = ("WWW.Example.COM.", ".bücher.example", "", "127.1", "192.0.2.0/24", "[2001:db8::1]")
    listed = ", ".join(f'"{site}"' for site in sites)
    assert parse(UsocksdConfig, f"[outgoing]\ndeny_sites = [{listed}]", "").outgoing.deny_sites == sites


def test_every_fault_of_the_tables() -> None:
    found = marked_faults(
        UsocksdConfig,
        f"""
        workers = 65  # 1
        control = "/{"x" * 107}"  # 1
        [incoming]
        proxy_protocl = 1080  # 1
        metrics_address = "all"  # 1
        port = 70000  # 1
        metrics_port = "1082"  # 1
        addresses = ["127.0.0.1", "127.0.0.1", "ff02::1"]  # 2
        allow_from = ["10.0.0.0/33", "here", "10.0.0.0/255.0.0.0", "::1/128"]  # 3
        [outgoing]
        allow_sites = ["*.example.com", "ok.example", "a b", 5]  # 3
        deny_ports = [25, 65536, 80.9]  # 2
        iface = "eth0 "  # 1
        addresses = ["0.0.0.0", "224.0.0.1", "::1%lo", "192.0.2.1"]  # 3
        dnsbl_domain = "192.0.2.1"  # 1
        mark = 4294967296  # 1
        [auth]
        required = "yes"  # 1
        [dns]
        servers = ["localhost"]  # 1
        [timeouts]
        idle = false  # 1
        drain = -1  # 1
        [limits]
        connections = 1e3  # 1
        [log]
        level = "chatty"  # 1
        """,
    )
    assert "incoming.port: 70000: expected an integer from 0 to 65535" in found
    assert "incoming.proxy_protocl: unknown key, did you mean proxy_protocol?" in found


def test_auth(tmp_path: Path) -> None:
    users = tmp_path / "users"
    users.touch()
    assert parse(UsocksdConfig, f'[auth]\nusers_file = "{users}"', "").auth == Auth(users_file=users, required=True)
    optional = parse(UsocksdConfig, f'[auth]\nusers_file = "{users}"\nrequired = false', "").auth
    assert optional == Auth(users_file=users, required=False)
    assert faults("[auth]\nrequired = true") == [
        "auth.required: true: expected users_file to name the users who may authenticate"
    ]
    relative = '[auth]\nusers_file = "users"'
    assert parse(UsocksdConfig, relative, str(users.parent / "usocksd.toml")).auth == Auth(
        users_file=users, required=True
    )
    assert faults('[auth]\nusers_file = "/nonexistent/users"') == [
        'auth.users_file: "/nonexistent/users": expected a file that exists'
    ]
    with pytest.raises(Invalid):
        Auth(required=True)


# [[rule]] and [egress]


def test_a_rule_as_typed_values() -> None:
    config = parse(
        UsocksdConfig,
        """
        [[rule]]
        name = "build hosts: no mail"
        action = "deny"
        from = ["10.1.2.3/16", "2001:db8::/32"]
        user = ["ci"]
        to = ["WWW.example.com", ".example.org", "203.0.113.0/24"]
        ports = [25, "6000-6100"]

        [[rule]]
        action = "allow"
        egress = "partners"

        [egress.partners]
        addresses = ["198.51.100.10", "2001:db8::10"]
        iface = "eth1"
        mark = 16
        sticky = "client"
        dnsbl_domains = ["DNSBL.example.net."]
        when_all_listed = "refuse"
        """,
        "usocksd.toml",
    )
    first, second = config.rules()
    assert (first.name, first.allow, first.users) == ("build hosts: no mail", False, frozenset({"ci"}))
    assert first.clients == (ip_network("10.1.0.0/16"), ip_network("2001:db8::/32"))
    assert first.ports == ((25, 25), (6000, 6100))
    assert first.to is not None
    assert sorted(str(entry) for entry in first.to[0].entries()) == [
        ".example.org",
        "203.0.113.0/24",
        "www.example.com",
    ]
    assert (second.name, second.allow, second.pool) == ("rule 2", True, "partners")
    assert second.clients is second.users is second.to is second.ports is None
    assert config.egress["partners"] == PoolConfig(
        addresses=(ip_address("198.51.100.10"), ip_address("2001:db8::10")),
        iface="eth1",
        mark=16,
        sticky="client",
        dnsbl_domains=("dnsbl.example.net",),
        when_all_listed="refuse",
    )


def test_every_fault_of_rules_and_pools() -> None:
    found = marked_faults(
        UsocksdConfig,
        """
        [[rule]]
        action = "permit"  # 1
        form = ["10.0.0.0/8"]  # 1
        [[rule]]  # 1
        name = "rule 7"  # 1
        [[rule]]
        name = " x"  # 1
        action = "deny"
        from = ["10.0.0.0/33", "ten"]  # 2
        user = ["", "a:b"]  # 2
        to = ["*.example.com", "file:/nonexistent/list.txt", "ok"]  # 2
        ports = [65536, "9-8", "1-65536", "-5", true, "http"]  # 6
        egress = "x y"  # 1
        [[rule]]
        action = "deny"
        from = []  # 1
        to = []  # 1
        egress = "pool"  # 1
        [egress."a b"]  # 1
        adresses = []  # 1
        [egress.pool]
        addresses = ["0.0.0.0"]  # 1
        sticky = "both"  # 1
        when_all_listed = ""  # 1
        dnsbl_domains = ["10.0.0.1"]  # 1
        """,
    )
    assert "rule 1: form: unknown key, did you mean from?" in found
    assert 'rule 2: action: missing: expected one of "allow", "deny"' in found
    assert "rule 4: to: []: expected at least one, or no such key if the rule holds for any destination" in found


def test_faults_between_rules_and_pools() -> None:
    assert faults(
        """
        [outgoing]
        mark = 1
        addresses = ["192.0.2.1"]
        [egress.default]
        [egress.partners]
        [[rule]]
        name = "x"
        action = "allow"
        egress = "partner"
        [[rule]]
        name = "x"
        action = "allow"
        egress = "default"
        """
    ) == [
        "outgoing.mark: expected here or in [egress.default], which is the same pool",
        "outgoing.addresses: expected here or in [egress.default], which is the same pool",
        'rule 1: egress: "partner": no such pool: expected one of "default", "partners"',
        'rule 2: name: "x": is the name of rule 1 too, expected another',
    ]


@pytest.mark.parametrize(
    "name",
    ["default", "other", "rule 12", "allow_from", "incoming.port", "allow_sites", 'deny_sites "x"', "built-in: x"],
)
def test_names_that_mean_something_else_in_records(name: str) -> None:
    assert "built in" in faults(f"[[rule]]\nname = '{name}'\naction = 'deny'")[0]


@pytest.mark.parametrize("name", ["", " ", "a ", "a\\nb", "x" * 101])
def test_names_that_can_not_be_shown(name: str) -> None:
    assert "1 to 100 printable" in faults(f'[[rule]]\nname = "{name}"\naction = "deny"')[0]


def test_the_default_pool_is_the_one_of_outgoing() -> None:
    outgoing = '[outgoing]\naddresses = ["192.0.2.1"]\niface = "eth0"\nmark = 7\ndnsbl_domain = "dnsbl.example"\n'
    assert parse(UsocksdConfig, outgoing, "").pools() == {
        "default": PoolConfig(
            addresses=(ip_address("192.0.2.1"),), iface="eth0", mark=7, dnsbl_domains=("dnsbl.example",)
        )
    }
    assert parse(UsocksdConfig, "", "").pools() == {"default": PoolConfig()}
    own = parse(UsocksdConfig, '[egress.default]\nsticky = "client"\n[egress.other]\n', "").pools()
    assert own == {"default": PoolConfig(sticky="client"), "other": PoolConfig()}


def test_a_network_to_leave_from() -> None:
    toml = '[egress.x]\naddresses = ["192.0.2.16/28", "2001:DB8:9::/64", "192.0.2.1/32"]\n'
    assert list(map(str, parse(UsocksdConfig, toml, "").egress["x"].addresses)) == [
        "192.0.2.16/28",
        "2001:db8:9::/64",
        "192.0.2.1",
    ]
    for text, problem in (
        ("192.0.2.17/28", 'expected "192.0.2.16/28"'),
        ("224.0.0.0/8", "multicast"),
        ("192.0.2.0/33", "an IP address or network"),
    ):
        with pytest.raises(ConfigError, match=problem):
            parse(UsocksdConfig, f'[egress.x]\naddresses = ["{text}"]\n', "")
