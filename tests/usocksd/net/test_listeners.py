import errno
import logging
import os
import socket
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock, patch

import pytest
import trio

from usocksd.net import listeners as listeners_module
from usocksd.net.bridge import in_session
from usocksd.net.endpoint import DeadlineExpired, Endpoint, OutOfWatches, PeerReset
from usocksd.net.listeners import Listener, ListenError, listen
from usocksd.net.tcp_info import accept_queue

LOGGER = "usocksd.net.listeners"


class Server:
    """A listener whose accepted connections are kept."""

    def __init__(self, lab: Any, sock: socket.socket, processes: int = 1) -> None:
        self.accepted: list[tuple[Endpoint, str, int]] = []
        self.room = True
        self.address = sock.getsockname()
        self.listener = Listener(
            lab.reactor,
            sock,
            lambda *args: self.accepted.append(args),
            room=lambda: self.room,
            processes=processes,
        )
        self._clients: list[socket.socket] = []
        self._lab = lab

    def connect(self, count: int = 1) -> list[socket.socket]:
        """Clients whose connections wait to be accepted, or are."""
        clients = [socket.create_connection(self.address[:2]) for _ in range(count)]
        self._clients += clients
        return clients

    async def one(self) -> tuple[socket.socket, Endpoint]:
        """A client, and the endpoint of its accepted connection."""
        (client,) = self.connect()
        await self._lab.settle()
        return client, self.accepted[-1][0]

    def close(self) -> None:
        if self.listener._sock.fileno() >= 0:
            self.listener.close()
        for endpoint, _, _ in self.accepted:
            endpoint.close()
        for client in self._clients:
            client.close()


@pytest.fixture
async def serve(lab: Any) -> Any:
    servers = []

    def make(host: str = "127.0.0.1", sock: Any = None, processes: int = 1) -> Server:
        servers.append(server := Server(lab, sock or listen(host, 0), processes))
        return server

    yield make
    for server in servers:
        server.close()


# Opening


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_connections_may_begin_with_data(host: str) -> None:
    with listen(host, 0) as sock:
        assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_FASTOPEN)


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
async def test_accepted_sockets_inherit_their_options(lab: Any, serve: Callable[..., Server], host: str) -> None:
    server = serve(host)
    (client,) = server.connect()
    await lab.settle()
    ((endpoint, peer_host, peer_port),) = server.accepted
    assert (peer_host, peer_port) == client.getsockname()[:2]
    for level, option in (
        (socket.IPPROTO_TCP, socket.TCP_NODELAY),
        (socket.SOL_SOCKET, socket.SO_KEEPALIVE),
        (socket.SOL_SOCKET, socket.SO_OOBINLINE),
    ):
        assert endpoint.sock.getsockopt(level, option)
    with pytest.raises(BlockingIOError):
        endpoint.sock.recv(1)
    assert not os.get_inheritable(endpoint.fd)


def test_both_families_on_one_port() -> None:
    with listen("0.0.0.0", 0) as v4, listen("::", v4.getsockname()[1]) as v6:
        assert v6.getsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY) == 1


def test_several_on_one_port(nothing_leaks: None) -> None:
    """Only if all of them set reuse_port."""
    with listen("127.0.0.1", 0, reuse_port=True) as first:
        address = first.getsockname()
        listen(*address, reuse_port=True).close()
        with pytest.raises(ListenError, match="in use"):
            listen(*address)
    with listen("127.0.0.1", 0) as taken, pytest.raises(ListenError, match="in use"):
        listen(*taken.getsockname(), reuse_port=True)


def test_the_queue(nothing_leaks: None) -> None:
    with listen("127.0.0.1", 0) as sock:
        most = int(Path("/proc/sys/net/core/somaxconn").read_text(encoding="ascii"))
        assert accept_queue(sock) == (0, min(4096, most))
        clients = [socket.create_connection(sock.getsockname()) for _ in range(3)]
        assert accept_queue(sock)[0] == 3
        for client in clients:
            client.close()


@pytest.mark.parametrize(("host", "place"), [("127.0.0.1", "127.0.0.1:{}"), ("::1", "[::1]:{}")])
def test_address_in_use_names_the_place(nothing_leaks: None, host: str, place: str) -> None:
    with listen(host, 0) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ListenError) as caught:
            listen(host, port)
    assert str(caught.value) == f"can't listen on {place.format(port)}: Address already in use"
    assert caught.value.errno == errno.EADDRINUSE


def test_a_port_is_free_again_at_once(nothing_leaks: None) -> None:
    """Connections in TIME_WAIT do not keep a restarted daemon from its port."""
    with listen("127.0.0.1", 0) as first:
        address = first.getsockname()
        client = socket.create_connection(address)
        accepted = first.accept()[0]
        accepted.close()
        client.close()
    listen(*address).close()


# Accepting


async def test_accepts_in_batches(lab: Any, serve: Callable[..., Server], monkeypatch: pytest.MonkeyPatch) -> None:
    sock = listen("127.0.0.1", 0)
    clients = [socket.create_connection(sock.getsockname()) for _ in range(150)]
    assert accept_queue(sock)[0] == 150
    server = serve(sock=sock)
    sizes = []
    for _ in range(5):
        before = len(server.accepted)
        lab.reactor.turn(0)
        sizes.append(len(server.accepted) - before)
    assert sizes == [64, 64, 22, 0, 0]
    server.connect(3)
    await lab.settle()
    assert len(server.accepted) == 153
    for client in clients:
        client.close()


async def test_ipv4_by_a_socket_for_both_families_is_ipv4(lab: Any, serve: Callable[..., Server]) -> None:
    """As systemd opens `ListenStream=PORT`: one client has one address, to limits, rules and the loop guard."""
    sock = socket.create_server(("::", 0), family=socket.AF_INET6, dualstack_ipv6=True)
    sock.setblocking(False)
    server = serve(sock=sock)
    for host in ("127.0.0.1", "::1"):
        with socket.create_connection((host, server.address[1])):
            await lab.settle()
            assert server.accepted[-1][1] == host


async def test_a_client_that_is_gone_before_it_is_accepted(lab: Any, serve: Callable[..., Server]) -> None:
    sock = listen("127.0.0.1", 0)
    client = socket.create_connection(sock.getsockname())
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")
    client.close()
    server = serve(sock=sock)
    server.connect()
    await lab.settle()
    assert len(server.accepted) == 2
    with pytest.raises(ConnectionResetError):
        await in_session(lab.reactor, server.accepted[0][0].receive())


def failing(server: Server, *errors: int) -> None:
    """Let the next accepts fail."""
    waiting = list(errors)
    real = server.listener._accept

    def accept() -> Any:
        if waiting:
            number = waiting.pop(0)
            raise OSError(number, os.strerror(number))
        return real()

    server.listener._accept = accept


@pytest.mark.parametrize("number", sorted(listeners_module._CONNECTION_ERRNOS), ids=errno.errorcode.get)
async def test_an_error_of_one_connection_is_ignored(
    lab: Any, serve: Callable[..., Server], caplog: pytest.LogCaptureFixture, number: int
) -> None:
    server = serve()
    failing(server, number)
    server.connect(2)
    await lab.settle()
    assert len(server.accepted) == 2
    assert caplog.records == []


async def test_eagain_is_no_error(lab: Any, serve: Callable[..., Server]) -> None:
    server = serve()
    failing(server, errno.EAGAIN)
    server.connect()
    await lab.settle()
    assert len(server.accepted) == 1


@pytest.mark.parametrize(
    "number",
    [errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM, errno.ENOSPC, errno.EIO],
    ids=errno.errorcode.get,
)
async def test_without_descriptors_or_memory_accepting_pauses_and_goes_on(
    lab: Any, serve: Callable[..., Server], caplog: pytest.LogCaptureFixture, number: int
) -> None:
    server = serve()
    failing(server, *[number] * 3)
    server.connect(5)
    for _ in range(3):
        await lab.settle()
        assert server.accepted == []
        assert server.listener.paused
        await lab.pass_time(0.2)
    assert len(server.accepted) == 5
    assert not server.listener.paused
    (record,) = caplog.records
    assert record.levelno == logging.ERROR
    assert record.fields == {"error": os.strerror(number), "waiting": 5}


async def test_out_of_descriptors_in_earnest(
    lab: Any, serve: Callable[..., Server], no_more_descriptors: Any, caplog: pytest.LogCaptureFixture
) -> None:
    established = lab.relay()
    server = serve()
    waiting = server.connect(3)
    with no_more_descriptors():
        await lab.settle()
        assert server.accepted == []
        for _ in range(3):
            await lab.pass_time(0.2)
        await established.client.send(b"goes on")
        assert await established.upstream.receive(7) == b"goes on"
    assert server.accepted == []
    assert [record.getMessage() for record in caplog.records] == ["accepting is paused"]
    await lab.pass_time(0.2)
    assert len(server.accepted) == 3
    waiting[0].sendall(b"patient")
    assert await in_session(lab.reactor, server.accepted[0][0].receive()) == b"patient"


async def test_out_of_epoll_watches(lab: Any, serve: Callable[..., Server]) -> None:
    """The connection is accepted already then, and lost; but its descriptor is not."""
    server = serve()
    client, other = server.connect(2)
    await lab.settle()
    (lost, *_), (kept, *_) = server.accepted
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with patch.object(lab.reactor, "register", Mock(side_effect=full)):
        with pytest.raises(OutOfWatches, match="no more sockets can be watched: No space left on device"):
            await in_session(lab.reactor, lost.receive())
    lost.close()
    assert client.recv(1) == b""
    other.sendall(b"x")
    assert await in_session(lab.reactor, kept.receive()) == b"x"


async def test_bytes_that_are_there_need_no_event(lab: Any, serve: Callable[..., Server]) -> None:
    client, endpoint = await serve().one()
    client.sendall(b"first")
    with patch.object(Endpoint, "on_event", Mock(side_effect=AssertionError)):
        assert await in_session(lab.reactor, endpoint.receive()) == b"first"
        await lab.settle()
    client.sendall(b"second")
    assert await in_session(lab.reactor, endpoint.receive()) == b"second"


@pytest.mark.parametrize("speaks", [True, False])
async def test_a_reset_is_noticed_from_the_first_receive_on(
    lab: Any, serve: Callable[..., Server], *, speaks: bool
) -> None:
    client, endpoint = await serve().one()
    if speaks:
        client.sendall(b"x")
        assert await in_session(lab.reactor, endpoint.receive()) == b"x"
    else:
        endpoint.watch()
        endpoint.watch()
    called: list[BaseException] = []
    endpoint.on_interrupt = called.append
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client.close()
    await lab.settle()
    assert [type(reason) for reason in called] == [PeerReset]


async def test_a_deadline_counts_before_the_first_receive(lab: Any, serve: Callable[..., Server]) -> None:
    _, endpoint = await serve().one()
    endpoint.deadline = lab.clock.now + 1
    async with trio.open_nursery() as nursery:
        nursery.start_soon(lab.pass_time, 1.5)
        with pytest.raises(DeadlineExpired):
            await in_session(lab.reactor, endpoint.receive())


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0", "::1", "::"])
async def test_our_end_of_a_connection(lab: Any, serve: Callable[..., Server], host: str) -> None:
    _, endpoint = await serve(host).one()
    assert endpoint.local_address() == endpoint.sock.getsockname()[:2]
    assert (endpoint.bound is None) == (host in ("0.0.0.0", "::"))


async def test_a_pause_is_recorded_again_only_after_a_while(
    lab: Any, serve: Callable[..., Server], caplog: pytest.LogCaptureFixture
) -> None:
    server = serve()
    server.room = False
    server.connect()
    for _ in range(60):
        await lab.pass_time(0.25)
    assert [record.fields["error"] for record in caplog.records] == ["too few file descriptors left"] * 2
    server.room = True
    await lab.pass_time(0.25)
    assert len(server.accepted) == 1


async def test_a_paused_listener_does_not_keep_the_reactor_busy(lab: Any, serve: Callable[..., Server]) -> None:
    server = serve()
    server.room = False
    server.connect()
    # Returns only when no task is runnable.
    await lab.settle()
    turns = lab.count_turns()
    server.connect(3)
    for _ in range(20):
        await trio.lowlevel.checkpoint()
    assert turns() == 0


async def test_close_refuses_new_connections_and_keeps_accepted_ones(lab: Any, serve: Callable[..., Server]) -> None:
    server = serve()
    (client,) = server.connect()
    await lab.settle()
    server.listener.close()
    with pytest.raises(ConnectionRefusedError):
        server.connect()
    client.sendall(b"still here")
    assert await in_session(lab.reactor, server.accepted[0][0].receive()) == b"still here"


async def test_close_accepts_all_waiting_connections(lab: Any) -> None:
    """Also more than one batch: closing the socket resets connections left in its queue."""
    sock = listen("127.0.0.1", 0)
    clients = [socket.create_connection(sock.getsockname()) for _ in range(200)]
    server = Server(lab, sock)
    server.listener.close()
    assert len(server.accepted) == 200
    server.close()
    for client in clients:
        assert client.recv(1) == b""
        client.close()


async def test_a_process_takes_its_share_of_waiting_connections(lab: Any, serve: Callable[..., Server]) -> None:
    """And the rest if no other process does."""
    server = serve(processes=4)
    server.connect(10)
    await lab.settle()
    assert len(server.accepted) == 3
    for _ in range(10):
        await lab.pass_time(0.002)
    assert len(server.accepted) == 10


async def test_a_process_that_has_taken_its_share_is_closed(lab: Any, serve: Callable[..., Server]) -> None:
    """It accepts what waits, and nothing happens when it would have looked again."""
    server = serve(processes=4)
    server.connect(10)
    await lab.settle()
    server.listener.close()
    assert len(server.accepted) == 10
    await lab.pass_time(0.002)


async def test_a_connection_that_woke_another_process(lab: Any, serve: Callable[..., Server]) -> None:
    """That process has ended or hangs: the next sweep finds the connection."""
    server = serve(processes=2)
    lab.reactor._epoll.unregister(server.listener._fd)
    server.connect()
    await lab.settle()
    assert server.accepted == []
    lab.reactor._epoll.register(server.listener._fd, 0)
    await lab.pass_time(0.6)
    assert len(server.accepted) == 1


async def test_out_of_epoll_watches_for_the_listener(lab: Any, serve: Callable[..., Server]) -> None:
    """It goes on when there are watches again."""
    server = serve(processes=2)
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with patch.object(lab.reactor, "register_listener", Mock(side_effect=full)):
        server.connect()
        await lab.settle()
        assert server.listener.paused
    await lab.pass_time(0.2)
    server.connect()
    await lab.settle()
    assert len(server.accepted) == 2
