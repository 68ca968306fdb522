"""Chromium without a window, where it is installed. It speaks SOCKS5 without authentication and never resolves names."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
from world import DENIED, Clients, Daemon, FarEnd, has_ipv6

COMMANDS = ["chromium-headless-shell", "chromium", "chromium-browser", "google-chrome"]
ipv6 = pytest.mark.skipif(not has_ipv6(), reason="no IPv6 on loopback here")


class Chromium:
    def __init__(self, profile: Path, clients: Clients) -> None:
        path = next(filter(None, map(shutil.which, COMMANDS)), None)
        if path is None:
            pytest.skip("Chromium is not installed (Debian package chromium-headless-shell)")
        # fmt: off
        self._command = [
            path, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
            "--disable-background-networking", "--disable-component-update", "--dump-dom",
            f"--user-data-dir={profile}", "--proxy-bypass-list=<-loopback>",
        ]
        # fmt: on
        self._clients = clients

    def __call__(self, daemon: Daemon, scheme: str, url: str) -> subprocess.CompletedProcess[bytes]:
        """Prints the document at this address, or the page that explains why there is none."""
        return self._clients.run(*self._command, f"--proxy-server={scheme}://{daemon.address}", url)


@pytest.fixture
def chromium(tmp_path: Path, clients: Clients) -> Chromium:
    return Chromium(tmp_path / "profile", clients)


@pytest.mark.parametrize(("scheme", "protocol"), [("socks4", "SOCKS4/4a"), ("socks5", "SOCKS5")])
def test_an_address(chromium: Chromium, far: FarEnd, daemon: Daemon, scheme: str, protocol: str) -> None:
    done = chromium(daemon, scheme, f"http://127.0.0.1:{far.web}/page")
    assert far.page("/page").strip() in done.stdout.decode(), done.stderr.decode()
    daemon.expect("proxy ends", protocol=protocol, dest_host="127.0.0.1", dest_port=far.web, user=None)


@ipv6
def test_an_ipv6_address(chromium: Chromium, far: FarEnd, daemon: Daemon) -> None:
    done = chromium(daemon, "socks5", f"http://[::1]:{far.web}/page")
    assert far.page("/page").strip() in done.stdout.decode(), done.stderr.decode()
    daemon.expect("proxy ends", protocol="SOCKS5", dest_host="::1", dest_addr=f"[::1]:{far.web}")


def test_a_name(chromium: Chromium, far: FarEnd, daemon: Daemon, names: str) -> None:
    done = chromium(daemon, "socks5", f"http://inside.test:{far.web}/page")
    assert far.page("/page").strip() in done.stdout.decode(), done.stderr.decode()
    daemon.expect("proxy ends", protocol="SOCKS5", dest_host="inside.test", dest_addr=f"127.0.0.1:{far.web}")


def test_a_denied_address(chromium: Chromium, far: FarEnd, daemon: Daemon) -> None:
    done = chromium(daemon, "socks5", f"http://{DENIED}:{far.web}/page")
    assert b"ERR_SOCKS_CONNECTION_FAILED" in done.stdout + done.stderr  # versions differ in where they say so
    daemon.expect("ruleset mismatch", protocol="SOCKS5", dest_host=DENIED, rule="allow_sites")
