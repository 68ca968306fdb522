"""FTP in active mode through usocksd, by BIND: curl under socksify, and a server that connects back."""

from __future__ import annotations

import contextlib
import shutil
import socket
import threading
from pathlib import Path

import daemons
import lab
import pytest
from daemons import Daemon

CONFIG = """
[incoming]
port = 1080
addresses = ["127.0.0.1"]
[outgoing]
addresses = ["{egress}"]
[bind]
enabled = true
ports = "30000-30009"
"""
SOCKS_CONF = """
route {
    from: 0.0.0.0/0 to: 0.0.0.0/0 via: 127.0.0.1 port = 1080
    command: bind connect
    proxyprotocol: socks_v5
    method: none
}
"""


class Server:
    """As much of an FTP server as a listing in active mode needs: PORT, and a connection to there from port 20."""

    def __init__(self, net: lab.Net) -> None:
        self._net = net
        self.clients: list[tuple[str, int]] = []
        """Where it has connected to."""
        self.sock = net.outside.socket()
        self.sock.bind((lab.WEB_V4, 21))
        self.sock.listen()
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):
            self.sock.shutdown(socket.SHUT_RDWR)  # accept(2) returns
        self.sock.close()
        self._thread.join(daemons.PATIENCE)

    def _serve(self) -> None:
        try:
            sock, _ = self.sock.accept()
        except OSError:
            return
        with sock, sock.makefile("rw", newline="") as talk:

            def say(text: str) -> None:
                talk.write(f"{text}\r\n")
                talk.flush()

            say("220 ready")
            for line in talk:
                word, _, rest = line.strip().partition(" ")
                if word == "PORT":
                    *host, high, low = rest.split(",")
                    self.clients.append((".".join(host), int(high) * 256 + int(low)))
                    say("200 well")
                elif word == "PWD":
                    say('257 "/"')
                elif word in ("LIST", "NLST"):
                    say("150 here it comes")
                    with self._net.outside.socket() as data:
                        data.settimeout(daemons.PATIENCE)
                        data.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                        data.bind((lab.WEB_V4, 20))
                        data.connect(self.clients[-1])
                        data.sendall(b"a file\r\n")
                    say("226 done")
                elif word == "QUIT":
                    say("221 bye")
                    return
                else:
                    say("230 well")


def test_active_ftp_under_socksify(host_net: lab.Net, tmp_path: Path) -> None:
    if shutil.which("socksify") is None:
        pytest.skip("socksify is not installed (package dante-client, which Debian 13 lacks)")
    egress = lab.PROXY_V4[1]
    conf = tmp_path / "socks.conf"
    conf.write_text(SOCKS_CONF)
    config = CONFIG.format(egress=egress)
    with Daemon("usocksd", config, tmp_path, popen=host_net.proxy.popen) as usocksd, Server(host_net) as server:
        command = ["socksify", "curl", "-sS", "--max-time", "30", "-P", "-", "--disable-eprt", f"ftp://{lab.WEB_V4}/"]
        out = host_net.proxy.run("env", f"SOCKS_CONF={conf}", *command).stdout
        assert "a file" in out
        assert [host for host, _ in server.clients] == [egress]
        assert 30000 <= server.clients[0][1] <= 30009
        record = usocksd.record("proxy starts", command="bind")
        assert (record["dest_addr"], record["src_addr"].partition(":")[0]) == (f"{lab.WEB_V4}:20", egress)
