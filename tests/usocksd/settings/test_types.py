"""The types of settings, and the tables that both daemons have."""

from __future__ import annotations

from typing import Any

import attrs
import pytest

from usocksd.errors import ConfigError
from usocksd.net.address import HostPort
from usocksd.settings.loader import parse
from usocksd.settings.types import DnsConfig, Interface, LogConfig, Timeouts


def faults(toml: str, cls: type[Any]) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        parse(cls, toml, "test.toml")
    return [str(fault) for fault in caught.value.faults]


@attrs.frozen
class Interfaces:
    iface: Interface = None


@pytest.mark.parametrize("name", ["a b", "a/b", "..", "a:b", "sixteen-chars-xx", "tab\\t"])
def test_interface_names_that_the_kernel_refuses(name: str) -> None:
    assert len(faults(f'iface = "{name}"', Interfaces)) == 1


def test_log() -> None:
    config = parse(LogConfig, 'filename = "/var/log/x"\nlevel = "crit"\nformat = "logfmt"', "")
    assert config == LogConfig(filename="/var/log/x", level="crit", format="logfmt")
    assert parse(LogConfig, 'filename = ""\nlevel = ""\nformat = ""', "") == LogConfig()
    first, second, third = faults('filename = 1\nlevel = "loud"\nformat = "xml"', LogConfig)
    assert first == "filename: 1: expected the path of a file"
    assert second.startswith('level: "loud": expected one of "critical", ')
    assert third == 'format: "xml": expected one of "plain", "logfmt", "json"'


def test_dns_servers() -> None:
    listed = '["192.0.2.53", "192.0.2.53:5353", "[2001:db8::53]:53", "2001:db8::54", "[::1]"]'
    servers = parse(DnsConfig, f"servers = {listed}", "").servers
    assert servers is not None
    assert servers[0] == HostPort("192.0.2.53", 53)
    assert [str(server) for server in servers[1:]] == [
        "192.0.2.53:5353",
        "[2001:db8::53]:53",
        "[2001:db8::54]:53",
        "[::1]:53",
    ]
    assert parse(DnsConfig, "servers = []", "").servers is None


def test_the_resolver() -> None:
    assert parse(DnsConfig, "", "").resolver == "dns"
    assert parse(DnsConfig, 'resolver = "system"\nservers = []', "").resolver == "system"
    assert faults('resolver = "nss"', DnsConfig) == ['resolver: "nss": expected one of "dns", "system"']
    (fault,) = faults('resolver = "system"\nservers = ["192.0.2.53"]', DnsConfig)
    assert fault.startswith('resolver: "system": expected "dns" beside servers')


@pytest.mark.parametrize(
    "server",
    [
        "",
        "dns.example",
        "192.0.2.53:",
        "192.0.2.53:0",
        "192.0.2.53:65536",
        "[::1",
        "0.0.0.0",
        "::1]:53",
        "[::1]1",
        "[1.2.3.4]:1",
        "[::1]:٣",
    ],
)
def test_faults_of_dns_servers(server: str) -> None:
    (fault,) = faults(f'servers = ["{server}"]', DnsConfig)
    assert fault.startswith(f'servers[0]: "{server}": ')


def test_timeouts() -> None:
    assert parse(Timeouts, "handshake = 0.5\nidle = 60\nstop = 0", "") == Timeouts(handshake=0.5, idle=60.0, stop=0.0)
    assert len(faults("handshake = 0\nconnect = 0\nidle = 0\nhalf_closed = 0\nstop = -1\nkeepalive = 0", Timeouts)) == 6
