"""What transparent UDP makes of a proxy that errs, lies, or dies: a stand-in for one, and a gateway's client."""

from __future__ import annotations

import contextlib
import random
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from socket import socket as Socket

import daemons
import lab
import pytest
from daemons import Daemon
from test_tproxy_udp import ECHO, TRANSOCKS, WEB, Client, dropped, rules, transocks

from usocksd.socks.datagram import header

QUIET = TRANSOCKS.replace("interval = 0.2", "interval = 60")
ICMP = """
        {where} icmp type destination-unreachable fib daddr type != local meta mark set 0x7474
        {where} icmpv6 type destination-unreachable fib daddr type != local meta mark set 0x7474
"""


class StandIn:
    """A SOCKS5 server with UDP ASSOCIATE that does what the test says."""

    def __init__(self, net: lab.Net, port: int = 1080, bound: str = "127.0.0.1") -> None:
        self.relay = net.proxy.socket(kind=socket.SOCK_DGRAM)
        self.relay.bind(("127.0.0.1", 0))
        self.relay.settimeout(daemons.PATIENCE)
        self.controls: list[Socket] = []
        """The connections of the associations so far"""
        self._bound = bound
        self._listener = net.proxy.listen("127.0.0.1", port)
        threading.Thread(target=self._serve, daemon=True).start()

    def __enter__(self) -> StandIn:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        self.relay.close()
        for sock in self.controls:
            sock.close()

    def stop(self) -> None:
        """Accept nothing more; associations live on."""
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def receive(self) -> tuple[bytes, tuple[str, int]]:
        """A datagram, and where from."""
        data, sender = self.relay.recvfrom(65535)
        return data, sender

    def _serve(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                sock, _ = self._listener.accept()
                threading.Thread(target=self._answer, args=(sock,), daemon=True).start()

    def _answer(self, sock: Socket) -> None:
        with contextlib.suppress(OSError):
            while data := sock.recv(1000):
                if data[:2] == b"\x05\x02" and data[2] == 0xF5:
                    sock.sendall(b"\x05\x00")  # a probe
                elif data[:1] == b"\x05" and len(data) < 5:
                    sock.sendall(b"\x05\x00")
                elif data[:2] == b"\x05\x03":
                    self.controls.append(sock)
                    sock.sendall(b"\x05\x00\x00" + daemons.address_bytes(self._bound, self.relay.getsockname()[1]))
                    return
        sock.close()


@contextlib.contextmanager
def asked(
    net: lab.Net, folder: Path, config: str = QUIET, bound: str = "127.0.0.1", version: int = 4, more: str = ""
) -> Iterator[Scene]:
    """A client whose first datagram has come to the proxy; `more` rules."""
    with (
        StandIn(net, bound=bound) as proxy,
        transocks(net, folder, config) as daemon,
        rules(net, more=more),
        Client(net, version) as client,
    ):
        client.sock.sendto(b"first", (WEB[version], ECHO))
        data, sender = proxy.receive()
        assert data == header(WEB[version], ECHO) + b"first"
        yield Scene(net, proxy, daemon, client, sender)


class Scene:
    def __init__(self, net: lab.Net, proxy: StandIn, daemon: Daemon, client: Client, sender: tuple[str, int]) -> None:
        self.net, self.proxy, self.daemon, self.client, self.sender = net, proxy, daemon, client, sender

    def say(self, datagram: bytes) -> None:
        """The proxy sends this."""
        self.proxy.relay.sendto(datagram, self.sender)

    def still_works(self) -> None:
        self.say(header(WEB[4], ECHO) + b"still")
        assert self.client.sock.recvfrom(100) == (b"still", (WEB[4], ECHO))


def test_what_is_no_datagram_of_socks_is_dropped(gateway_net: lab.Net, tmp_path: Path) -> None:
    good = header(WEB[4], ECHO)
    with asked(gateway_net, tmp_path) as scene:
        bad = {
            "short": [*(good[:size] for size in range(10)), header(lab.WEB_V6, ECHO)[:21]],
            "reserved": [b"\1" + good[1:] + b"x", b"\0\1" + good[2:] + b"x"],
            "fragment": [b"\0\0\1" + good[3:] + b"x", b"\0\0\x81" + good[3:] + b"x"],
            "address_type": [
                b"\0\0\0\2" + good[4:] + b"x" * 20,
                header("www.example.test", ECHO) + b"x",
            ],
        }
        for datagram in (each for found in bad.values() for each in found):
            scene.say(datagram)
        for cause, found in bad.items():
            dropped(gateway_net, cause, len(found))
        chance = random.Random(1)
        for _ in range(1000):
            scene.say(b"\xff" + chance.randbytes(chance.randrange(100)))
        scene.still_works()


def test_the_proxy_decides_who_may_answer(gateway_net: lab.Net, tmp_path: Path) -> None:
    with asked(gateway_net, tmp_path) as scene:
        for host, port in ((lab.OTHER_V4, ECHO), (WEB[4], ECHO + 1)):
            scene.say(header(host, port) + b"hello")
            assert scene.client.sock.recvfrom(100) == (b"hello", (host, port))
        # But nobody speaks for this host, or for nobody, and not in another family.
        local = [lab.LAN_GATEWAY_V4, lab.PROXY_V4[0], "127.0.0.1", "0.0.0.0", "224.0.0.1", "255.255.255.255"]
        for host in local:
            scene.say(header(host, 53) + b"hello")
        dropped(gateway_net, "local", len(local))
        scene.say(header(lab.WEB_V6, ECHO) + b"hello")
        dropped(gateway_net, "stranger", 1)
        scene.still_works()


def test_a_proxy_that_does_not_say_where_its_relay_is(gateway_net: lab.Net, tmp_path: Path) -> None:
    with asked(gateway_net, tmp_path, bound="0.0.0.0") as scene:
        scene.still_works()


@pytest.mark.parametrize("how", ["end", "reset"])
def test_an_association_that_the_proxy_ends(gateway_net: lab.Net, tmp_path: Path, how: str) -> None:
    with asked(gateway_net, tmp_path) as scene:
        (control,) = scene.proxy.controls
        if how == "reset":
            daemons.reset(control)
        else:
            control.close()
        scene.daemon.record("association is lost")
        # The client's next datagram has the proxy asked again, and takes the same flow.
        scene.client.sock.sendto(b"second", (WEB[4], ECHO))
        data, scene.sender = scene.proxy.receive()
        assert data == header(WEB[4], ECHO) + b"second"
        assert len(scene.proxy.controls) == 2
        scene.still_works()
        scene.daemon.record("association goes on")


def test_a_proxy_that_is_down_without_a_word(gateway_net: lab.Net, tmp_path: Path) -> None:
    """Its host may be gone: what it has not sent since counts."""
    net = gateway_net
    config = TRANSOCKS.replace('"socks5://127.0.0.1:1080"', '["socks5://127.0.0.1:1080", "socks5://127.0.0.1:1090"]')
    with StandIn(net, 1090) as second, asked(net, tmp_path, config) as scene:
        scene.proxy.stop()
        scene.daemon.record("association is lost")
        scene.client.sock.sendto(b"second", (WEB[4], ECHO))
        assert second.receive()[0] == header(WEB[4], ECHO) + b"second"
        scene.daemon.record("association goes on", upstream="socks5://127.0.0.1:1090")


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("where", ["gateway_net", "host_net"])
def test_a_client_that_has_gone(where: str, version: int, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    """Its host's ICMP is for the destination; rules can have it come here instead of going there in clear."""
    net = request.getfixturevalue(where)
    with asked(net, tmp_path, version=version, more=ICMP) as scene:
        scene.client.sock.close()
        scene.say(header(WEB[version], ECHO) + b"hello")
        ended = scene.daemon.record("association ends")
        assert (ended["reason"], ended["ended_by"]) == ("closed", "client")
