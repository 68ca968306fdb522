"""Connections that are silent for longer than connection tracking remembers: kept, and never past the proxy.

Its timers are set to seconds here, in the namespaces. A capture on the outer link looks for what the clients say.
TRANSOCKS_SILENT_SECONDS is for how long connections are made and are silent (default: once; 1800 is the long form).
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from socket import socket as Socket

import lab
import pytest
import scene as scenes
from daemons import Daemon, receive_exactly, reset, together, wait_until

SECONDS = float(os.environ.get("TRANSOCKS_SILENT_SECONDS", "0"))
_SHORT = 10 if SECONDS else 4  # seconds; the long form runs beside other things
TIMERS = dict.fromkeys(("established", "fin_wait", "close_wait", "last_ack", "time_wait"), _SHORT)
PATIENCE = 40 if SECONDS else 15
SILENCE = 1.5 * _SHORT  # more than each of them
SECRET, ANSWER, OPEN = b"SECRET of a client", b"answer", b"from before"
WAYS = [("nft", "apply"), ("nft", "hold"), ("iptables-nft", "apply"), ("iptables-legacy", "apply")]
PORT = 7000  # where transocks does not wait for first bytes
FAMILIES = {lab.WEB_V4: socket.AF_INET, lab.WEB_V6: socket.AF_INET6}

TRACK_NFT = """nft 'table inet t { chain f { type filter hook forward priority 0; ct state new; }; }'"""
TRACK_IPTABLES = "for i in iptables ip6tables; do $i -A FORWARD -m conntrack --ctstate NEW; done"
HUSH_NFT = """nft 'table inet hush { chain o { type filter hook output priority -300; tcp flags rst drop; }; }'"""
HUSH_IPTABLES = "for i in iptables ip6tables; do $i -t raw -I OUTPUT -p tcp --tcp-flags RST RST -j DROP; done"

USOCKSD = f"""
[[rule]]
action = "allow"
to = ["{lab.WEB_V4}", "{lab.WEB_V6}"]
[incoming]
port = 1080
addresses = ["{lab.NEXT_V4}"]
allow_from = ["198.51.100.0/24"]
"""
TRANSOCKS = f"""
proxy_url = "socks5://{lab.NEXT_V4}:1080"
mark = 0x7473
listen = "{{listen}}:1081"
listen_tproxy = "localhost:1084"
[health]
interval = 600
[rules]
mode = "{{mode}}"
when_down = "{{when_down}}"
"""


class Wire:
    """All packets on the outer link for the destination itself."""

    def __init__(self, host: lab.Host) -> None:
        self._socket = host.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3))
        self._socket.bind(("eth0", 0))
        self.seen: Counter[str] = Counter()
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        beyond = {socket.inet_pton(family, address) for address, family in FAMILIES.items()}
        with contextlib.suppress(OSError):
            while True:
                packet = self._socket.recv(1 << 17)
                self.seen["packets"] += 1
                if packet[30:34] in beyond or packet[38:54] in beyond:
                    self.seen["beyond"] += 1
                    self.seen["secret"] += SECRET in packet

    def close(self) -> None:
        self._socket.close()


Kind = Callable[[Socket, Socket], Iterator[None]]
"""The actions of both ends: before the silence, and after it."""


def server_ends(client: Socket, server: Socket) -> Iterator[None]:
    server.sendall(ANSWER)
    server.shutdown(socket.SHUT_WR)
    assert receive_exactly(client, 1 << 10) == ANSWER
    yield
    client.sendall(SECRET)
    client.shutdown(socket.SHUT_WR)
    assert receive_exactly(server, 1 << 10) == SECRET


def client_ends(client: Socket, server: Socket) -> Iterator[None]:
    client.sendall(SECRET)
    client.shutdown(socket.SHUT_WR)
    assert receive_exactly(server, 1 << 10) == SECRET
    yield
    server.sendall(ANSWER)
    server.shutdown(socket.SHUT_WR)
    assert receive_exactly(client, 1 << 10) == ANSWER


def both_silent(client: Socket, server: Socket) -> Iterator[None]:
    client.sendall(SECRET)
    assert receive_exactly(server, len(SECRET)) == SECRET
    yield
    client.sendall(SECRET)
    server.sendall(ANSWER)
    assert receive_exactly(server, len(SECRET)) == SECRET
    assert receive_exactly(client, len(ANSWER)) == ANSWER


def client_ends_and_reads_nothing(client: Socket, server: Socket) -> Iterator[None]:
    """Behind a closed window there is no keepalive."""
    client.sendall(SECRET)
    client.shutdown(socket.SHUT_WR)
    assert receive_exactly(server, 1 << 10) == SECRET
    server.setblocking(False)
    sent = 0
    while select.select([], [server], [], 0.2)[1]:
        with contextlib.suppress(BlockingIOError):
            sent += server.send(bytes(1 << 16))
    yield
    assert len(receive_exactly(client, sent)) == sent
    server.shutdown(socket.SHUT_WR)
    assert client.recv(1) == b""


KINDS: tuple[Kind, ...] = (server_ends, client_ends, both_silent, client_ends_and_reads_nothing)


class Played(scenes.Scene):
    """A scene with the daemons themselves, and a capture."""

    def __init__(self, net: lab.Net, mode: str, way: tuple[str, str], when_down: str, folder: Path) -> None:
        backend, self.verb = way
        self.name = f"{mode}, {backend} {self.verb}, {when_down}"
        self.when_down = when_down
        super().__init__(net, mode, backend, folder)
        self.web.insert(0, net.outside.listen("", PORT))
        self.web[0].settimeout(PATIENCE)
        self.wire = Wire(net.outside)
        # The daemons read these when they start. Netlink's part of connection tracking is asked first, and loads it all.
        net.proxy.forget_connections()
        for name, seconds in TIMERS.items():
            net.proxy.sysctl(f"net.netfilter.nf_conntrack_tcp_timeout_{name}", seconds)
        text = TRANSOCKS.format(listen=self._listen, mode=mode, when_down=when_down)
        self.server = Daemon("usocksd", USOCKSD, folder, popen=net.outside.popen)
        self.daemon = Daemon("transocks", text, folder, popen=net.proxy.popen)
        self.before: list[tuple[Socket, Socket]] = []
        self.begun: list[tuple[str, Iterator[None]]] = []
        self.sockets: list[Socket] = []
        self.made = 0

    def load(self) -> None:
        """Load the rules; connections of before are there, which nothing has tracked on a host."""
        if self.mode != "host" and self.when_down == "closed":
            self.sh(TRACK_NFT if self.backend == "nft" else TRACK_IPTABLES)
        self.before = [self.open(address) for address in FAMILIES]
        if self.verb == "apply":
            self.rules("apply")
        else:
            hold = self.net.proxy.popen(*self.argv("hold"), stdout=subprocess.PIPE, text=True)
            assert hold.stdout is not None
            assert hold.stdout.readline() == "in force\n"

    def open(self, address: str) -> tuple[Socket, Socket]:
        """Both ends of a new connection of the client."""
        client = self.net.client.socket(FAMILIES[address])
        client.settimeout(PATIENCE)
        client.connect((address, PORT))
        server, _ = self.web[0].accept()
        server.settimeout(PATIENCE)
        self.sockets += [client, server]
        return client, server

    def pairs(self) -> list[tuple[Socket, Socket]]:
        """New connections that have sent something, one for each family."""
        made = [self.open(address) for address in FAMILIES]
        for client, server in made:
            client.sendall(SECRET)
            assert receive_exactly(server, len(SECRET)) == SECRET
        return made

    def begin(self) -> None:
        for address in FAMILIES:
            for kind in KINDS:
                steps = kind(*self.open(address))
                next(steps)
                self.begun.append((f"{self.name}, {address}, {kind.__name__}", steps))
                self.made += 1

    def finish(self) -> list[str]:
        """The results that differ from what is expected."""
        lost = []
        for name, steps in self.begun:
            try:
                next(steps, None)
            except (OSError, AssertionError) as error:
                lost.append(f"{name}: {error!r}")
        self.begun = []
        kept = {sock for ends in self.before for sock in ends}
        for sock in self.sockets:
            if sock not in kept:
                sock.close()
        self.sockets = list(kept)
        for client, server in self.before:
            try:
                server.sendall(OPEN)  # on a host, that comes in; what goes out first is next
                client.sendall(OPEN)
                assert receive_exactly(server, len(OPEN)) == receive_exactly(client, len(OPEN)) == OPEN
            except (OSError, AssertionError) as error:
                lost.append(f"{self.name}, from before: {error!r}")
        return lost

    def end(self) -> None:
        for sock in self.sockets:
            sock.close()
        self.wire.close()
        self.close()


@contextlib.contextmanager
def played(mode: str, when_down: str, way: tuple[str, str], folder: Path) -> Iterator[Played]:
    folder.mkdir()
    with lab.host_net() if mode == "host" else lab.gateway_net() as net, contextlib.ExitStack() as stack:
        scene = Played(net, mode, way, when_down, folder)
        stack.callback(scene.end)
        stack.enter_context(scene.daemon)
        stack.enter_context(scene.server)
        scene.load()
        yield scene


@pytest.fixture(scope="module", params=["host", "gateway", "tproxy"])
def scenes_of_mode(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Played]]:
    """All ways at once, for both tests: what takes time is silence."""
    if (reason := lab.unavailable()) is not None:
        pytest.skip(f"no network namespaces here: {reason}")
    folder = tmp_path_factory.mktemp(request.param)
    # Only the rules that "open" adds, once for nft and once for iptables.
    cases = [("closed", way) for way in WAYS] + [("open", way) for way in (WAYS if SECONDS else WAYS[::3])]
    stacks = [contextlib.ExitStack() for _ in cases]

    def start(number: int) -> Played:
        return stacks[number].enter_context(played(request.param, *cases[number], folder / str(number)))

    try:
        yield together(start, range(len(cases)))
    finally:
        together(contextlib.ExitStack.close, stacks)


def test_silent_connections(scenes_of_mode: list[Played]) -> None:
    until = time.monotonic() + SECONDS
    while True:
        together(Played.begin, scenes_of_mode)
        time.sleep(SILENCE)  # this is what it is about
        assert [line for lost in together(Played.finish, scenes_of_mode) for line in lost] == []
        assert [scene.name for scene in scenes_of_mode if scene.wire.seen["secret"]] == []
        if time.monotonic() >= until:
            break
    print(sum(s.made for s in scenes_of_mode), sum((s.wire.seen for s in scenes_of_mode), Counter()))


def refused(client: Socket) -> bool:
    """Whether the client is told, when it goes on sending."""
    try:
        client.sendall(SECRET)
        client.recv(1)
    except ConnectionResetError:
        return True
    except TimeoutError:
        return False
    return False


def test_forgotten_connections_stay_off_the_wire(scenes_of_mode: list[Played]) -> None:
    """Under "closed": a flush of the rules, one of connection tracking, and an end of which the client never heard.

    It comes last: afterwards there are no rules.
    """
    together(forget, [scene for scene in scenes_of_mode if scene.when_down == "closed"])


def forget(scene: Played) -> None:
    flushed, forgotten = scene.pairs(), scene.pairs()
    if scene.verb == "hold":
        scene.sh("nft flush ruleset")
        for client, server in flushed:  # the guard keeps them, until the rules are there again
            steps = both_silent(client, server)
            next(steps)
            next(steps, None)
        table = "transocks" if scene.mode == "host" else f"transocks_{scene.mode}"
        wait_until(lambda: f"inet {table}\n" in scene.sh("nft list tables"), "the rules are there again")
    scene.net.proxy.forget_connections()
    for client, server in forgotten:
        if scene.mode == "tproxy":  # by its socket, and not by connection tracking
            client.sendall(SECRET)
            assert receive_exactly(server, len(SECRET)) == SECRET
        else:
            assert refused(client), scene.name
    before = scene.daemon.fds()
    left = scene.pairs()
    scene.sh(HUSH_NFT if scene.backend == "nft" else HUSH_IPTABLES)
    for _, server in left:
        reset(server)
    scene.daemon.wait_for_fds(before)
    scene.sh("nft delete table inet hush" if scene.backend == "nft" else HUSH_IPTABLES.replace(" -I ", " -D "))
    for client, _ in left:
        assert refused(client), scene.name
    if scene.verb == "apply":
        removed = scene.pairs()
        scene.rules("remove")
        for client, _ in removed:
            assert refused(client), scene.name
    assert scene.wire.seen["secret"] == 0, scene.name
