"""No password is in any record at any level, nor in anything else of a process that its neighbours may read."""

from __future__ import annotations

import base64
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import bcrypt
import daemons
import lab
import pytest
from daemons import Daemon, Served, lives
from test_redirect import TRANSOCKS, USOCKSD, WEB, connect, is_refused, load

PASSWORD, WRONG = "Tr0ub4dor-and-3", "c0rrect-h0rse"
DEBUG = '\n[log]\nlevel = "debug"\n'


@pytest.fixture
def pair(host_net: lab.Net, tmp_path: Path) -> Iterator[tuple[Daemon, Daemon]]:
    """Both daemons at their most talkative, with a password between them."""
    users = tmp_path / "users"
    users.write_text(f"ci:{bcrypt.hashpw(PASSWORD.encode(), bcrypt.gensalt(4)).decode()}\n")
    url = f"socks5://ci:{PASSWORD}@127.0.0.1:1080"
    server_config = USOCKSD + f'[auth]\nusers_file = "{users}"\n' + DEBUG
    client_config = TRANSOCKS.format(listen='"localhost:1081"', url=url) + DEBUG
    with ExitStack() as stack:
        server, client = (
            stack.enter_context(Daemon(name, config, tmp_path, popen=host_net.proxy.popen))
            for name, config in (("usocksd", server_config), ("transocks", client_config))
        )
        load(host_net, "nft")
        yield client, server


def test_nobody_else_learns_a_password(host_net: lab.Net, tmp_path: Path, pair: tuple[Daemon, Daemon]) -> None:
    client, server = pair

    def carried() -> None:
        with Served(host_net.outside.listen(WEB[4]), daemons.echo) as web, connect(host_net, 4, web.port) as sock:
            assert lives(sock, b"hello")

    carried()
    # Wrong ones: of a client of usocksd, and then of transocks, after a reload that refused a bad URL.
    answer = host_net.client.run(
        "curl",
        "--silent",
        "--socks5",
        "127.0.0.1:1080",
        "--proxy-user",
        f"ci:{WRONG}",
        "http://203.0.113.80/",
        check=False,
    )
    assert answer.returncode != 0
    server.record("handshake failed", tried_user="ci")
    config = tmp_path / "transocks.toml"
    good = config.read_text()
    config.write_text(good.replace("socks5://ci:", "socks4://ci:").replace("connect = 5", "connect = -5"))
    client.signal(signal.SIGHUP)
    client.record("bad configuration")
    config.write_text(good.replace(PASSWORD, WRONG))
    client.signal(signal.SIGHUP)
    client.record("reloaded", generation=2)
    assert is_refused(host_net, 4, 80)
    client.record("failed to connect to proxy server")

    said = "".join(path.read_text() for path in tmp_path.glob("*.log"))
    said += "".join(path.read_text() for path in tmp_path.glob("*.stderr"))
    for daemon in pair:
        for pid in (daemon.pid, *daemon.workers()):
            for file in ("cmdline", "environ"):
                said += Path(f"/proc/{pid}/{file}").read_text()
    said += _checked(tmp_path)
    for secret in (PASSWORD, WRONG, base64.b64encode(f"ci:{PASSWORD}".encode()).decode()):
        assert secret not in said
    assert "ci" in said


def _checked(folder: Path) -> str:
    """The output of `check` for both configurations."""
    said = ""
    for name in ("transocks", "usocksd"):
        command = [sys.executable, "-m", name, "check", str(folder / f"{name}.toml")]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        said += done.stdout + done.stderr
    return said
