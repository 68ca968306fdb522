"""Probes of other proxies, if installed: they do no harm, and tell whether SOCKS servers take greeting and request at
once.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import daemons
import pytest

from bench.contenders import DANTE_CONF
from transocks.upstreams.probes import ping
from transocks.upstreams.proxy_url import parse_proxy_url
from usocksd.socks import Established, Probe, Probed, SocksConnect

PATH = os.environ.get("PATH", "") + ":/usr/sbin"


@pytest.fixture
def port(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[int]:
    """One of them at work, on this port."""
    with started(request.param, tmp_path) as port:
        yield port


@contextlib.contextmanager
def started(name: str, tmp_path: Path) -> Iterator[int]:
    """The port of a running one."""
    port = daemons.free_port()
    if name.startswith("pproxy"):
        if importlib.util.find_spec("pproxy") is None:
            pytest.skip("pproxy is not installed")
        user = "#me:key" if name.endswith("user") else ""
        scheme = "http" if name.endswith("HTTP") else "socks5"
        command = [sys.executable, "-m", "pproxy", "-l", f"{scheme}://127.0.0.1:{port}{user}"]
    else:
        program = shutil.which(name, path=PATH)
        if program is None:
            pytest.skip(f"{name} is not installed")
        (tmp_path / "danted.conf").write_text(DANTE_CONF.format(port=port))
        (tmp_path / "tinyproxy.conf").write_text(
            f"Port {port}\nListen 127.0.0.1\nAllow 127.0.0.0/8\nLogLevel Critical\n"
        )
        arguments = {
            "danted": ["-f", str(tmp_path / "danted.conf")],
            "tinyproxy": ["-d", "-c", str(tmp_path / "tinyproxy.conf")],
        }
        command = [program, *arguments.get(name, ["-i", "127.0.0.1", "-p", str(port)])]
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    ) as server:
        try:
            daemons.wait_until(lambda: answers(port), "it listens")
            yield port
        finally:
            server.terminate()  # dante's takes its children along


def answers(port: int) -> bool:
    with contextlib.suppress(ConnectionRefusedError), socket.create_connection(("127.0.0.1", port)):
        return True
    return False


def learned(port: int, probe: Probe, silence: float) -> list[Probed]:
    """The findings of a probe until the server closes, or is silent for this many seconds."""
    found = []
    with socket.create_connection(("127.0.0.1", port), daemons.PATIENCE) as sock:
        sock.sendall(probe.data_to_send())
        while not found or found[-1].pipelines is None:
            event = probe.next_event()
            if isinstance(event, Probed):
                found.append(event)
                sock.settimeout(silence)
                continue
            sock.sendall(probe.data_to_send())
            try:
                probe.receive_data(sock.recv(4096))
            except TimeoutError:
                break
    return found


@pytest.mark.parametrize(
    ("port", "pipelines"), [("microsocks", None), ("danted", True), ("pproxy", True)], indirect=["port"]
)
def test_what_a_probe_finds_out(port: int, pipelines: bool | None) -> None:
    """microsocks drops what comes with the greeting, and waits for the request."""
    silence = 0.2 if pipelines is None else daemons.PATIENCE
    found = learned(port, Probe(pipelined=True), silence)
    assert found[0] == Probed(ours=False, pipelines=None)
    assert found[-1] == Probed(ours=False, pipelines=pipelines)


@pytest.mark.parametrize("port", ["pproxy with a user"], indirect=True)
def test_what_a_probe_with_credentials_finds_out(port: int) -> None:
    found = learned(port, Probe("me", "key", pipelined=True), daemons.PATIENCE)
    assert found == [Probed(ours=False, pipelines=None), Probed(ours=False, pipelines=True)]


@pytest.mark.parametrize("port", ["danted", "pproxy"], indirect=True)
def test_a_pipelined_client_gets_through_with_its_payload(port: int) -> None:
    with daemons.Served(daemons.loopback(), daemons.echo) as destination:
        client = SocksConnect("127.0.0.1", destination.port, pipelined=True)
        with socket.create_connection(("127.0.0.1", port), daemons.PATIENCE) as sock:
            sock.sendall(client.data_to_send())
            while not isinstance(client.next_event(), Established):
                client.receive_data(sock.recv(4096))
            sock.sendall(b"hello")
            assert daemons.receive_exactly(sock, 5) == b"hello"


@pytest.mark.parametrize(("name", "says"), [("tinyproxy", b"HTTP/1."), ("pproxy with HTTP", b"")])
def test_a_probe_of_an_http_proxy_is_answered_and_does_no_harm(name: str, says: bytes, tmp_path: Path) -> None:
    """pproxy closes, and connected to itself without end when it was sent `OPTIONS *` with itself as Host."""
    with started(name, tmp_path) as port:
        before = connections(port)
        with socket.create_connection(("127.0.0.1", port), daemons.PATIENCE) as sock:
            sock.sendall(ping(parse_proxy_url(f"http://127.0.0.1:{port}")))
            assert sock.recv(4096).startswith(says)
        assert connections(port) <= before + 2  # each may be seen from both ends


def connections(port: int) -> int:
    """How many there are to this port, those that are over and in TIME_WAIT among them."""
    rows = Path("/proc/net/tcp").read_text().splitlines()[1:]
    return sum(f":{port:04X} " in row for row in rows)
