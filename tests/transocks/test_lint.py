"""What transocks warns of, beside what both daemons do."""

from __future__ import annotations

from pathlib import Path

import pytest

from transocks.config import Config, parse_proxy_url
from transocks.lint import lint, warnings
from usocksd.runtime.config import parse

PROXY = 'proxy_url = "socks5://192.0.2.1:1080"\n'


def keys(toml: str) -> list[str]:
    return [fault.path for fault in lint(parse(Config, toml, "transocks.toml"))]


def test_nothing_is_wrong_with_the_defaults() -> None:
    assert warnings(Config(proxy_url=(parse_proxy_url("socks5://127.0.0.1:1080"),))) == []


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
def test_sockets_that_this_user_may_not_open(monkeypatch: pytest.MonkeyPatch, may: bool) -> None:
    monkeypatch.setattr("transocks.lint.may_be_transparent", lambda: may)
    assert keys(f'{PROXY}listen_tproxy = ":1084"') == ["listen_tproxy"] * (not may)
    assert keys(PROXY) == []


def test_a_password_that_everybody_may_read(tmp_path: Path) -> None:
    file = tmp_path / "transocks.toml"
    with_password = Config(proxy_url=(parse_proxy_url("http://me:s3cret@192.0.2.1:3128"),))
    file.touch()
    file.chmod(0o644)
    assert warnings(with_password, str(file)) == [
        f"proxy_url: has a password, and every user may read this file: chmod o-r {file}, and give it to the group"
        " of the service"
    ]
    assert warnings(with_password) == []
    for url in ("http://192.0.2.1:3128", "http://me@192.0.2.1:3128"):
        assert warnings(Config(proxy_url=(parse_proxy_url(url),)), str(file)) == []
    file.chmod(0o640)
    assert warnings(with_password, str(file)) == []


def test_what_both_daemons_have_is_told_by_the_keys_of_this_one() -> None:
    assert keys(f'{PROXY}listen = "192.0.2.77:1081"') == ["listen"]
    assert keys(f'{PROXY}listen = ["localhost:1083"]\nmetrics_port = 1083') == ["metrics_port"]
    assert keys(f'{PROXY}metrics_address = "::1"\nmetrics_port = 0') == ["metrics_address"]
    assert keys(f"{PROXY}[timeouts]\nidle = 1\nhalf_closed = 1") == ["timeouts.handshake"]
