"""Real programs whose datagrams are taken, on a gateway and on the host itself: queries, time, a stream, a page, a VPN."""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import lab
import pytest
from daemons import Daemon, wait_until
from test_tproxy_udp import ADDRESS, NAME, WEB, both, dnsmasq

FAR = Path(__file__).parents[1] / "interop"
CHRONY = """
local stratum 3
allow all
bindaddress {address}
bindcmdaddress /
cmdport 0
pidfile {folder}/pid
"""
PAGE = """
import sys
from curl_cffi import requests
url, cert = sys.argv[1:]
print(len(requests.get(url, http_version="v3only", verify=cert or True, timeout=20).content))
"""
SERVE_PAGE = """
import sys
sys.path.insert(0, {there!r})
from pathlib import Path
import test_http3
cert, key = test_http3.certificate(Path({folder!r}), {host!r})
with test_http3.server(cert, key, {host!r}, 443):
    print("ready", flush=True)
    sys.stdin.read()
"""


@pytest.fixture(params=["gateway_net", "host_net"])
def taken(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[lab.Net, Daemon]]:
    """The network, and usocksd, which knows where everything goes."""
    net: lab.Net = request.getfixturevalue(request.param)
    with both(net, tmp_path) as (_, server):
        yield net, server


def need(*programs: str) -> None:
    for program in programs:
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not installed")  # chrony not where systemd runs: it would be started


@contextlib.contextmanager
def beyond(net: lab.Net, *command: str, ready: str = "") -> Iterator[None]:
    """A server outside, once it has printed this."""
    process = net.outside.popen(*command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    try:
        assert process.stdout is not None
        assert not ready or any(ready.encode() in line for line in process.stdout), "it has ended"
        yield
    finally:
        process.kill()
        process.wait()


def test_kdig(taken: tuple[lab.Net, Daemon]) -> None:
    need("kdig")
    net, server = taken
    with dnsmasq(net):
        for version in (4, 6):
            assert net.client.run("kdig", "+short", f"@{WEB[version]}", NAME).stdout.split() == [ADDRESS]
    wait_until(lambda: len(server.records("udp flow", dest_port=53)) == 2, "both are recorded")


def test_chrony(taken: tuple[lab.Net, Daemon], tmp_path: Path) -> None:
    need("chronyd")
    net, server = taken
    conf = tmp_path / "chrony.conf"
    conf.write_text(CHRONY.format(address=WEB[4], folder=tmp_path))
    with beyond(net, "chronyd", "-x", "-d", "-u", "root", "-f", str(conf), ready="starting"):
        words = ("-Q", "-x", "-t", "15", "-u", "root", f"server {WEB[4]} iburst", f"pidfile {tmp_path}/client.pid")
        assert "System clock wrong by" in net.client.run("chronyd", *words, "cmdport 0").stderr
    assert server.record("association starts")


@pytest.mark.parametrize("way", ["", "--reverse"])
def test_iperf3(taken: tuple[lab.Net, Daemon], way: str) -> None:
    need("iperf3")
    net, _ = taken
    with beyond(net, "iperf3", "--server", "--one-off", "--forceflush", "--bind", WEB[4], ready="listening"):
        words = ["--udp", "--json", "--time", "1", "--bitrate", "10M", "--length", "1200", *filter(None, [way])]
        done = json.loads(net.client.run("iperf3", "--client", WEB[4], *words).stdout)
    assert done["end"]["sum"]["packets"] > 500
    assert done["end"]["sum"]["lost_percent"] < 5


def test_http3(taken: tuple[lab.Net, Daemon], tmp_path: Path) -> None:
    pytest.importorskip("curl_cffi", reason="curl-cffi is not installed")
    pytest.importorskip("aioquic", reason="aioquic is not installed")
    net, server = taken
    serve = SERVE_PAGE.format(there=str(FAR), folder=str(tmp_path), host=WEB[4])
    with beyond(net, sys.executable, "-c", serve, ready="ready"):
        page = [sys.executable, "-c", PAGE, f"https://{WEB[4]}/"]
        assert net.client.run(*page, str(tmp_path / "cert.pem")).stdout.strip() == "200000"
        assert net.client.run(*page, "", check=False).returncode == 1, "another authority"
    assert server.record("association starts")
