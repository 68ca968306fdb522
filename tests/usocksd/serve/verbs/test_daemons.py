"""The verbs and the real daemons."""

import json
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import daemons
import pytest
from daemons import GRANTED, Daemon, Served, receive_exactly, socks5, wait_until

CONFIG = """
control = "{folder}/control.sock"
workers = {workers}
[incoming]
port = 0
addresses = ["127.0.0.1"]
[outgoing]
allow_sites = ["127.0.0.0/8", "localhost"]
"""


@pytest.fixture
def usocksd(tmp_path: Path) -> Iterator[Daemon]:
    with Daemon("usocksd", CONFIG.format(folder=tmp_path, workers=2), tmp_path) as daemon:
        yield daemon


@pytest.fixture
def destination() -> Iterator[Served]:
    with Served(daemons.loopback(), daemons.echo) as server:
        yield server


def verb(folder: Path, *words: str, name: str = "usocksd", status: int = 0) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", name, "-f", str(folder / f"{name}.toml"), *words]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert result.returncode == status, result.stderr
    return result


def ask(folder: Path, *words: str, name: str = "usocksd") -> Any:
    return json.loads(verb(folder, *words, "--json", name=name).stdout)


def test_status(usocksd: Daemon, tmp_path: Path) -> None:
    answer = ask(tmp_path, "status")
    assert (answer["ok"], answer["name"], answer["pid"], answer["state"]) == (True, "usocksd", usocksd.pid, "ready")
    assert answer["config"]["file"] == str(tmp_path / "usocksd.toml")
    assert answer["listening"] == [f"127.0.0.1:{usocksd.port}"]
    (generation,) = answer["generations"]
    assert sorted(worker["pid"] for worker in generation["workers"]) == sorted(usocksd.workers())
    out = verb(tmp_path, "status").stdout
    assert out.startswith("usocksd         ready, version ")
    rows = [line.split()[:3] for line in out.splitlines() if line.startswith("1 serving")]
    assert sorted(int(pid) for _, _, pid in rows) == sorted(usocksd.workers())


def test_connections(usocksd: Daemon, tmp_path: Path, destination: Served) -> None:
    address = ("127.0.0.1", usocksd.port)
    with socket.create_connection(address) as busy, socket.create_connection(address) as silent:
        assert socks5(busy, "localhost", destination.port, as_name=True)[0] == GRANTED
        busy.sendall(b"hello")
        assert receive_exactly(busy, 5) == b"hello"

        def find(*words: str) -> Any:
            return {each["client"]: each for each in ask(tmp_path, "connections", *words)["connections"]}

        mine = f"127.0.0.1:{busy.getsockname()[1]}"
        other = f"127.0.0.1:{silent.getsockname()[1]}"
        found = wait_until(lambda: (rows := find()).keys() == {mine, other} and rows, find)
        assert found[other]["state"] == "handshake"
        assert found[mine]["worker"] in usocksd.workers()
        start = usocksd.record("proxy starts", client_addr=mine)
        keys = {"id": "request_id", "destination": "dest_addr", "name": "dest_host", "egress": "src_addr"}
        assert {key: found[mine][key] for key in keys} == {key: start[name] for key, name in keys.items()}
        assert (found[mine]["rule"], found[mine]["user"]) == (start["rule"], start["user"])
        assert (found[mine]["tx_bytes"], found[mine]["rx_bytes"], found[mine]["state"]) == (5, 5, "relay")
        assert find("--destination", f"localhost:{destination.port}").keys() == {mine}
        lines = verb(tmp_path, "connections").stdout.splitlines()
        assert sum(mine in line and "localhost" in line for line in lines) == 1


def test_reload(usocksd: Daemon, tmp_path: Path) -> None:
    config = tmp_path / "usocksd.toml"
    good = config.read_text()
    config.write_text(good.replace('"localhost"', '"local host"').replace("port = 0", "port = 70000"))
    result = verb(tmp_path, "reload", status=1)
    assert result.stdout == ""
    assert "incoming.port" in result.stderr
    assert "outgoing.allow_sites[1]" in result.stderr
    assert ask(tmp_path, "status")["config"]["generation"] == 1
    assert "outgoing.allow_sites[1]" in verb(tmp_path, "status").stdout
    config.write_text(good)
    assert verb(tmp_path, "reload").stdout == "usocksd has reloaded: generation 2 serves\n"
    status = ask(tmp_path, "status")
    assert (status["config"]["generation"], status["config"]["last_reload"]["ok"]) == (2, True)


def test_transocks(tmp_path: Path) -> None:
    config = f'proxy_url = "socks5://127.0.0.1:1"\nlisten = "127.0.0.1:0"\ncontrol = "{tmp_path}/control.sock"\n'
    with Daemon("transocks", config, tmp_path) as daemon:
        status = ask(tmp_path, "status", name="transocks")
        assert (status["name"], status["pid"]) == ("transocks", daemon.pid)
        nothing = {"ok": True, "connections": [], "partial": []}
        assert ask(tmp_path, "connections", "--upstream", "socks5", name="transocks") == nothing
        verb(tmp_path, "connections", "--user", "alice", name="transocks", status=2)


LOADED = """
import contextlib, io, sys
import {name}.cli as cli
for words in (["--version"], ["--help"], ["status", "--control", "/"]):
    with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()):
        cli.main(words)
    print(*sys.modules)
"""


@pytest.mark.parametrize("name", ["usocksd", "transocks"])
def test_command_lines_load_little(name: str) -> None:
    """--help is there in 0.2 s. A verb has no use for trio, which takes half of that to load."""
    result = subprocess.run(
        [sys.executable, "-c", LOADED.format(name=name)], capture_output=True, text=True, check=True
    )
    _, for_help, for_status = (set(line.split()) for line in result.stdout.splitlines())
    assert f"{name}.cli" in for_help
    assert not {"trio", "asyncio", "dns", "rich", "pyroute2", "prometheus_client", "bcrypt"} & for_help
    assert len(for_help) < 300, "about 240 are needed"
    assert "trio" not in for_status
