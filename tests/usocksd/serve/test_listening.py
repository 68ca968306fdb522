"""The master's listening sockets: one for each address, opened and closed as configurations come and go."""

import os
import select
import socket
from collections.abc import Iterator
from ipaddress import ip_address
from pathlib import Path

import pytest
from attrs import evolve

from usocksd.errors import Error
from usocksd.net.listeners import ListenError, is_transparent, listen, may_be_transparent
from usocksd.serve.listening import ListeningSockets, check_inherited
from usocksd.settings.types import LOCALHOST, ListenAddress

V4, V6 = (ListenAddress(address, 0) for address in LOCALHOST)


@pytest.fixture
def sockets(nothing_leaks: None) -> Iterator[ListeningSockets]:
    made = ListeningSockets()
    yield made
    made.close()


def test_an_address_that_is_dropped(sockets: ListeningSockets) -> None:
    """Connections that wait there can be accepted from a duplicate; when that is closed, new ones are refused."""
    sockets.open([V4, V6])
    v4, v6 = sockets.names()
    (duplicate,) = [sock.dup() for sock in sockets.at([V6])]
    with socket.create_connection(v6, 5) as waiting:
        for sock in sockets.keep([V4]):
            sock.close()
        assert sockets.names() == [v4]
        with duplicate.accept()[0] as accepted:
            accepted.sendall(b"served")
        assert waiting.recv(10) == b"served"
    duplicate.close()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(v6, 5)
    socket.create_connection(v4, 5).close()


def test_an_address_gets_wider_and_narrower(sockets: ListeningSockets) -> None:
    """At the same port, while connections wait at the one before."""
    sockets.open([V4])
    (place,) = sockets.names()
    narrow = evolve(V4, port=place.port)
    sockets.close()
    wide = evolve(narrow, address=ip_address("0.0.0.0"))
    sockets.open([narrow])
    for before, after in ((narrow, wide), (wide, narrow)):
        with socket.create_connection(place, 5):
            sockets.open([after])
            assert sockets.queues()[0] == 1
        for sock in sockets.keep([after]):
            sock.close()
        assert sockets.at([before]) == []
        assert sockets.names() == [(str(after.address), place.port)]


def test_restore(sockets: ListeningSockets) -> None:
    sockets.open([V4])
    before, names = sockets.filenos(), sockets.names()
    sockets.open([V4, V6])
    assert len(sockets.filenos()) == 2
    assert sockets.names(opened=False) == names
    for _ in range(2):
        sockets.restore()
        assert (sockets.filenos(), sockets.names()) == (before, names)


def test_a_failure_changes_nothing(sockets: ListeningSockets) -> None:
    sockets.open([V4])
    before = sockets.filenos()
    with listen("::1", 0) as taken:
        other = evolve(V6, port=taken.getsockname()[1])
        with pytest.raises(ListenError, match="in use"):
            sockets.open([V4, V6, other])
    assert sockets.filenos() == before


def test_another_instance_has_the_port(sockets: ListeningSockets) -> None:
    """Also if its sockets have SO_REUSEPORT."""
    sockets.open([V4])
    (_, port) = sockets.names()[0]
    other = ListeningSockets()
    with pytest.raises(ListenError, match=f"can't listen on 127.0.0.1:{port}: Address already in use"):
        other.open([evolve(V4, port=port)])
    assert other.filenos() == []
    sockets.close()
    other.open([evolve(V4, port=port)])
    other.close()


def test_optional_addresses(sockets: ListeningSockets) -> None:
    # An address that the host lacks stands for a family that it lacks.
    lacking = ListenAddress(ip_address("2001:db8::1"), 0, optional=True)
    sockets.open([V4, lacking])
    (place,) = sockets.names()
    assert sockets.listening() == [f"127.0.0.1:{place[1]}"]
    assert len(sockets.at([V4, lacking])) == 1
    sockets.close()
    with pytest.raises(ListenError, match=r"\[2001:db8::1\]:0"):
        sockets.open([lacking])
    with pytest.raises(ListenError, match=r"\[2001:db8::1\]:0"):
        sockets.open([V4, evolve(lacking, optional=False)])
    assert sockets.filenos() == []


def test_an_optional_address_whose_port_is_taken(sockets: ListeningSockets) -> None:
    with listen("127.0.0.1", 0) as taken, pytest.raises(ListenError, match="in use"):
        sockets.open([V6, evolve(V4, port=taken.getsockname()[1], optional=True)])
    assert sockets.filenos() == []


def test_queues_are_summed_up(sockets: ListeningSockets) -> None:
    sockets.open([V4, V6])
    clients = [socket.create_connection(name, 5) for name in sockets.names() for _ in range(3)]
    most = int(Path("/proc/sys/net/core/somaxconn").read_text(encoding="ascii"))
    assert sockets.queues() == (6, 2 * min(most, 4096))
    for client in clients:
        client.close()


@pytest.mark.skipif(not may_be_transparent(), reason="sockets with IP_TRANSPARENT need CAP_NET_ADMIN")
@pytest.mark.parametrize("address", [V4, V6], ids=["v4", "v6"])
def test_transparent_sockets(sockets: ListeningSockets, address: ListenAddress) -> None:
    """Such a socket is transparent, and what it accepts; others are not."""
    address = evolve(address, transparent=True)
    plain = ListenAddress(ip_address("127.0.0.2"), 0)
    sockets.open([address, plain])
    for at, transparent in ((address, True), (plain, False)):
        (sock,) = sockets.at([at])
        assert is_transparent(sock) == transparent
        with socket.create_connection(sock.getsockname()[:2], 5):
            assert select.select([sock], [], [], 5)[0]
            with sock.accept()[0] as accepted:
                assert is_transparent(accepted) == transparent
    with pytest.raises(Error, match="without IP_TRANSPARENT"):
        sockets.open([evolve(plain, transparent=True)])
    with pytest.raises(Error, match="with IP_TRANSPARENT"):
        sockets.open([plain, evolve(address, transparent=False)])
    assert len(sockets.filenos()) == 2


def test_hand_over(sockets: ListeningSockets) -> None:
    sockets.open([V4, V6])
    state = sockets.hand_over()
    state["own"] = [[host, port, os.dup(fd)] for host, port, fd in state["own"]]
    names = sockets.names()
    sockets.close()
    heir = ListeningSockets.take_over(state)
    assert heir.names() == names
    assert not any(map(os.get_inheritable, heir.filenos()))
    heir.open([V4, V6])
    for sock in heir.keep([V6]):
        sock.close()
    assert heir.names() == names[1:]
    heir.close()


def test_inherited_sockets(nothing_leaks: None) -> None:
    """They stand for all addresses, and nothing is done to them that would harm their next user."""
    owner = socket.create_server(("127.0.0.1", 0))
    sockets = ListeningSockets([owner.dup()])
    check_inherited(sockets.inherited)
    for level, option in (
        (socket.IPPROTO_TCP, socket.TCP_FASTOPEN),
        (socket.IPPROTO_TCP, socket.TCP_NODELAY),
        (socket.SOL_SOCKET, socket.SO_KEEPALIVE),
    ):
        assert all(sock.getsockopt(level, option) for sock in sockets.inherited)
    sockets.open([V4])
    assert [sock.fileno() for sock in sockets.at([V4])] == sockets.filenos()
    assert sockets.names() == [owner.getsockname()]
    assert sockets.keep([]) == []
    assert sockets.names() == [owner.getsockname()]
    sockets.close()
    with socket.create_connection(owner.getsockname(), 0.5):
        owner.accept()[0].close()
    owner.close()


def test_sockets_that_can_t_be_inherited(nothing_leaks: None) -> None:
    with socket.socket() as mute, socket.socket(type=socket.SOCK_DGRAM) as datagrams:
        with socket.socket(socket.AF_UNIX) as local:
            local.bind("")
            local.listen()
            for sock in (mute, datagrams, local):
                with pytest.raises(Error, match="LISTEN_FDS"):
                    check_inherited([sock])
