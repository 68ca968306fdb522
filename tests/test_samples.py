"""The samples in deploy/ show every setting of both configurations, with its default."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from ipaddress import ip_network
from pathlib import Path
from typing import Any, get_args, get_origin

import attrs
import pytest

from transocks.config import TransocksConfig, parse_proxy_url
from transocks.rules.config import Mode
from transocks.rules.redirection import Redirection
from transocks.rules.render import excluded
from usocksd.clients import DEFAULT_CLIENTS
from usocksd.config import UsocksdConfig
from usocksd.settings.loader import load, parse

DEPLOY = Path(__file__).parents[1] / "deploy"
EXAMPLES = {"egress": "partners", "upstream": "far"}
"""Tables that the operator names, and what they are called in the samples."""


def keys(table: dict[str, Any], prefix: str = "") -> set[str]:
    found: set[str] = set()
    for name, value in table.items():
        inner = value[0] if isinstance(value, list) and value and isinstance(value[0], dict) else value
        found |= keys(inner, f"{prefix}{name}.") if isinstance(inner, dict) else {prefix + name}
    return found


def settings(cls: type[Any], prefix: str = "") -> set[str]:
    found: set[str] = set()
    for field in attrs.fields(attrs.resolve_types(cls)):
        if not field.init:
            continue
        key = prefix + field.name.removesuffix("_")
        args = get_args(field.type)
        if get_origin(field.type) is Mapping:
            found |= settings(args[1], f"{key}.{EXAMPLES[key]}.")
        elif args and attrs.has(args[0]):  # tables in any number, or one that may be missing
            found |= settings(args[0], f"{key}.")
        else:
            found |= settings(field.type, f"{key}.") if attrs.has(field.type) else {key}
    return found


def shown(name: str, folder: Path) -> str:
    """A sample with all its settings in force, and the files there that they name."""
    for file in ("users", "blocked.txt", "partners.txt"):
        (folder / file).touch()
    text = re.sub(r"^#(?=\w+ = |\[|    \"|\])", "", (DEPLOY / f"{name}.toml").read_text(), flags=re.MULTILINE)
    return text.replace("/etc/usocksd.users", str(folder / "users"))


@pytest.mark.parametrize(
    ("name", "default"),
    [
        ("usocksd", UsocksdConfig()),
        ("transocks", TransocksConfig(proxy_url=(parse_proxy_url("socks5://127.0.0.1:1080"),))),
    ],
)
def test_a_sample_is_the_default_and_shows_every_setting(name: str, default: Any, tmp_path: Path) -> None:
    assert load(type(default), DEPLOY / f"{name}.toml") == default
    assert keys(tomllib.loads(shown(name, tmp_path))) == settings(type(default))


def test_the_values_in_the_sample_of_usocksd_are_the_defaults(tmp_path: Path) -> None:
    config, default = parse(UsocksdConfig, shown("usocksd", tmp_path), f"{tmp_path}/usocksd.toml"), UsocksdConfig()
    assert (config.timeouts, config.limits, config.control) == (default.timeouts, default.limits, default.control)
    assert (config.log.level, config.log.format) == ("info", "plain")
    assert set(config.incoming.allow_from or ()) == set(map(ip_network, DEFAULT_CLIENTS))
    unset = {"addresses": None, "allow_from": None, "metrics_port": None, "proxy_protocol": None}
    assert attrs.evolve(config.incoming, **unset) == default.incoming
    unset = {"iface": None, "addresses": (), "dnsbl_domain": None, "mark": None, "nat64_prefixes": ()}
    assert attrs.evolve(config.outgoing, **unset) == default.outgoing


def test_the_values_in_the_sample_of_transocks_are_the_defaults(tmp_path: Path) -> None:
    config = parse(TransocksConfig, shown("transocks", tmp_path), f"{tmp_path}/transocks.toml")
    default, rules = TransocksConfig(proxy_url=config.proxy_url), config.rules
    assert (config.log.level, config.log.format) == ("info", "plain")
    assert config.upstream["far"].when_all_down == "refuse"
    unset = {"mark": None, "workers": None, "metrics_port": None, "listen_tproxy": (), "listen_udp": (), "rules": None}
    assert attrs.evolve(config, **unset, upstream={}, route=(), dns=default.dns, log=default.log) == default
    assert rules is not None
    # As networks: Python 3.13 writes an IPv4-mapped one in another way.
    assert set(rules.exclude or ()) == set(map(ip_network, excluded(Redirection(mode=Mode.HOST, port=0))))
    assert (rules.reject_quic, rules.when_down.value, rules.tproxy_mark) == (True, "open", 0x7474)
