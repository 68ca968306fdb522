"""Upstreams by SRV records: a real host with rules, name server and proxies beyond, and records that change."""

from __future__ import annotations

import contextlib
import json
import socket
from pathlib import Path

import daemons
import lab
from daemons import Daemon, NameServer, wait_until
from forks import Commands

SERVICE = "_socks._tcp.egress.test"
USOCKSD = """
[[rule]]
action = "allow"
to = ["{web}"]
[incoming]
port = {port}
addresses = ["{address}"]
allow_from = ["198.51.100.0/24"]
"""
TRANSOCKS = """
proxy_url = "socks5h+srv://{service}"
mark = 0x7473
control = "{folder}/control.sock"
[dns]
servers = ["{server}:53"]
[rules]
mode = "host"
tool = "nft"
"""
FIRST, SECOND = ["0 1 1080 one.egress.test.", "10 1 1090 two.egress.test."], ["0 1 1090 two.egress.test."]


def test_records_that_change(host_net: lab.Net, tmp_path: Path) -> None:
    net, hosts = host_net, {"one.egress.test": [lab.NEXT_V4], "two.egress.test": [lab.NEXT_V4]}
    with contextlib.ExitStack() as stack:
        names_socket = net.outside.socket(kind=socket.SOCK_DGRAM)
        names_socket.bind((lab.WEB_V4, 53))
        names = stack.enter_context(NameServer({SERVICE: FIRST, **hosts}, names_socket, ttl=5))
        listener = stack.enter_context(net.outside.listen(lab.WEB_V4, 80))
        listener.settimeout(daemons.PATIENCE)
        servers = []
        for port in (1080, 1090):
            (tmp_path / str(port)).mkdir()
            text = USOCKSD.format(web=lab.WEB_V4, port=port, address=lab.NEXT_V4)
            servers.append(stack.enter_context(Daemon("usocksd", text, tmp_path / str(port), popen=net.outside.popen)))
        text = TRANSOCKS.format(service=SERVICE, folder=tmp_path, server=lab.WEB_V4)
        transocks = stack.enter_context(Daemon("transocks", text, tmp_path, popen=net.proxy.popen))
        run = stack.enter_context(contextlib.closing(Commands(net.proxy))).run
        config = str(tmp_path / "transocks.toml")
        assert run("rules", "apply", "--force", "-f", config)[0] == 0
        stack.callback(run, "rules", "remove", "-f", config)

        def connect() -> None:
            """A connection through one of the proxies."""
            with net.client.socket() as sock:
                sock.settimeout(daemons.PATIENCE)
                sock.connect((lab.WEB_V4, 80))
                sock.sendall(b"hello")
                there, _ = listener.accept()
                with there:
                    assert there.recv(5) == b"hello"

        def used() -> list[int]:
            return [len(server.records("proxy starts")) for server in servers]

        connect()
        wait_until(lambda: used() == [1, 0], used)
        group = json.loads(run("status", "--json", "-f", config)[1])["daemon"]["upstreams"]["default"]
        assert [(each["upstream"], each["priority"]) for each in group["upstreams"]] == [
            ("socks5h://one.egress.test:1080", 0),
            ("socks5h://two.egress.test:1090", 10),
        ]
        names.set({SERVICE: SECOND, **hosts})
        changed = {"added": [], "removed": ["socks5h://one.egress.test:1080"]}
        wait_until(lambda: transocks.records("upstreams changed", **changed), "the records are looked at again")
        connect()
        wait_until(lambda: used() == [1, 1], used)
        names.set({})  # there is none
        removed = ["socks5h://two.egress.test:1090"]
        wait_until(lambda: transocks.records("upstreams changed", removed=removed), "that is an answer")
        with net.client.socket() as sock:
            sock.connect((lab.WEB_V4, 80))
            sock.settimeout(daemons.PATIENCE)
            with contextlib.suppress(ConnectionResetError):
                assert sock.recv(1) == b""
        assert "has no upstream" in str(transocks.record("failed to connect to proxy server")["error"])
