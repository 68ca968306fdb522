"""Name servers that people run: their answers are understood."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import dns.exception
import dns.message
import dns.query
import pytest
import trio
from daemons import wait_until

from usocksd.errors import ResolveError
from usocksd.log.metrics import Metrics
from usocksd.names.resolver import Resolver
from usocksd.net.address import HostPort

PATH = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"
MANY = 300
"""More than a datagram takes, of each family."""

ZONE = """
$ORIGIN test.
$TTL 300
@ SOA ns admin 1 3600 600 86400 30
@ NS ns
ns A 127.0.0.1
www A 192.0.2.1
www AAAA 2001:db8::1
four A 192.0.2.4
six AAAA 2001:db8::6
alias CNAME www
text TXT "hello"
*.wild A 192.0.2.77
sub.hollow A 192.0.2.8
10.100.51.198.bl A 127.0.0.2
""" + "".join(f"many A 192.0.{n >> 8}.{n & 255}\nmany AAAA 2001:db8::{n:x}\n" for n in range(MANY))

KNOT = """
server:
    rundir: "{folder}"
    listen: 127.0.0.1@{port}
database:
    storage: "{folder}"
zone:
  - domain: test
    file: "{folder}/zone"
"""
NSD = """
server:
    ip-address: 127.0.0.1@{port}
    username: ""
    zonesdir: "{folder}"
    pidfile: ""
    database: ""
    xfrdfile: ""
    zonelistfile: "{folder}/zones"
remote-control:
    control-enable: no
zone:
    name: test
    zonefile: zone
"""
UNBOUND = """
server:
    interface: 127.0.0.1@{port}
    username: ""
    chroot: ""
    directory: "{folder}"
    pidfile: ""
    use-syslog: no
    do-daemonize: no
    module-config: iterator
    local-zone: "test." nodefault
auth-zone:
    name: test
    zonefile: "{folder}/zone"
"""
DNSMASQ = """
port={port}
listen-address=127.0.0.1
bind-interfaces
no-resolv
no-hosts
local=/test/
host-record=www.test,192.0.2.1,2001:db8::1,300
host-record=four.test,192.0.2.4
host-record=six.test,2001:db8::6
cname=alias.test,www.test
txt-record=text.test,hello
address=/wild.test/192.0.2.77
host-record=sub.hollow.test,192.0.2.8
host-record=10.100.51.198.bl.test,127.0.0.2
""" + "".join(f"host-record=many.test,192.0.{n >> 8}.{n & 255},2001:db8::{n:x}\n" for n in range(MANY))
SERVERS = {
    "dnsmasq": (DNSMASQ, ["-k", "--pid-file", "-C"], "dnsmasq-base"),
    "knotd": (KNOT, ["-c"], "knot"),
    "nsd": (NSD, ["-d", "-c"], "nsd"),
    "unbound": (UNBOUND, ["-d", "-c"], "unbound"),
}


@pytest.fixture(params=SERVERS)
def server(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[HostPort]:
    config, options, package = SERVERS[request.param]
    program = shutil.which(request.param, path=PATH)
    if program is None:
        pytest.skip(f"not installed: {request.param} (Debian: {package})")
    (tmp_path / "zone").write_text(ZONE)
    for _ in range(5):  # it can't choose a port itself, so another program may be quicker
        with socket.socket(type=socket.SOCK_DGRAM) as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        (tmp_path / "config").write_text(config.format(folder=tmp_path, port=port))
        with subprocess.Popen([program, *options, tmp_path / "config"], stderr=subprocess.DEVNULL) as process:
            try:
                wait_until(lambda: process.poll() is not None or answers(port), f"{request.param} answers")
                if process.poll() is None:
                    yield HostPort("127.0.0.1", port)
                    return
            finally:
                process.kill()
    pytest.fail(f"{request.param} does not start")


def answers(port: int) -> bool:
    with contextlib.suppress(OSError, dns.exception.Timeout):
        reply = dns.query.udp(dns.message.make_query("four.test", "A"), "127.0.0.1", port=port, timeout=0.2)
        return bool(reply.answer)
    return False


FOUND = {
    "www.test": ["2001:db8::1", "192.0.2.1"],
    "four.test": ["192.0.2.4"],
    "six.test": ["2001:db8::6"],
    "alias.test": ["2001:db8::1", "192.0.2.1"],
    "a.b.wild.test": ["192.0.2.77"],
    "10.100.51.198.bl.test": ["127.0.0.2"],
    "nowhere.test": "no such name",
    "text.test": "no address",
    "hollow.test": "no address",
}


async def test_servers_that_people_run(server: HostPort, tmp_path: Path) -> None:
    resolver = Resolver([server], Metrics("test"), hosts=tmp_path / "none", resolv_conf=tmp_path / "none")
    async with trio.open_nursery() as nursery:
        await nursery.start(resolver.run)
        for name, expected in FOUND.items():
            found: list[str] | str
            try:
                found = [str(address) for address in await resolver.resolve(name)]
            except ResolveError as error:
                found = error.cause
            assert found == expected, name
        many = await resolver.resolve("many.test")  # over TCP
        assert {address.version for address in many} == {4, 6}
        nursery.cancel_scope.cancel()
