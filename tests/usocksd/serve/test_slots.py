"""Listening sockets in groups: where the kernel sends new connections while a group changes."""

import contextlib
import errno
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
from usocksd.net.tcp_info import accept_queue
from usocksd.serve import slots as slots_module
from usocksd.serve.slots import Slots, check_inherited
from usocksd.settings.types import LOCALHOST, ListenAddress

V4, V6 = (ListenAddress(address, 0) for address in LOCALHOST)


@pytest.fixture
def slots(nothing_leaks: None) -> Iterator[Slots]:
    made = Slots()
    yield made
    made.close()


def group(slots: Slots, address: ListenAddress, count: int) -> list[socket.socket]:
    """Duplicates of the sockets of an address, as workers have."""
    fds = [fd for slot in range(count) for fd in slots.of(slot, [address])]
    return [socket.socket(fileno=os.dup(fd)) for fd in fds]


def spread(address: tuple[str, int], sockets: list[socket.socket], count: int = 1000) -> list[int]:
    """How many of `count` new connections each socket gets; all of them are accepted."""
    got = [0] * len(sockets)
    for _ in range(count // 50):
        clients = [socket.create_connection(address, 5) for _ in range(50)]
        for index, sock in enumerate(sockets):
            while accept_queue(sock)[0]:
                sock.accept()[0].close()
                got[index] += 1
        for client in clients:
            client.close()
    return got


@contextlib.contextmanager
def all_closed(*lists: list[socket.socket]) -> Iterator[None]:
    try:
        yield
    finally:
        for sockets in lists:
            for sock in sockets:
                sock.close()


@pytest.mark.parametrize("address", [V4, V6], ids=["v4", "v6"])
def test_a_group_that_grows(slots: Slots, address: ListenAddress) -> None:
    """New sockets get no connection before `release`, when there may be no worker to accept it."""
    slots.open([address], 2)
    slots.release([address], 2)
    (place,) = slots.names()
    slots.open([address], 4)
    assert slots.names() == [place]
    sockets = group(slots, address, 4)
    with all_closed(sockets):
        assert all(sock.getsockname()[:2] == place for sock in sockets)
        first, second, third, fourth = spread(place, sockets)
        assert (third, fourth) == (0, 0)
        assert min(first, second) > 300
        assert slots.release([address], 4) == []
        assert min(spread(place, sockets)) > 100


@pytest.mark.parametrize("address", [V4, V6], ids=["v4", "v6"])
def test_a_group_that_shrinks(slots: Slots, address: ListenAddress) -> None:
    """Surplus sockets keep the connections that wait and get no new ones; when they are closed, all is in order."""
    slots.open([address], 4)
    slots.release([address], 4)
    (place,) = slots.names()
    sockets = group(slots, address, 4)
    with all_closed(sockets):
        waiting = [socket.create_connection(place, 5) for _ in range(100)]
        before = [accept_queue(sock)[0] for sock in sockets]
        assert sum(before) == 100
        surplus = slots.release([address], 2)
        assert [sock.fileno() for sock in surplus] != []
        assert [accept_queue(sock)[0] for sock in surplus] == before[:1:-1]
        with all_closed(waiting):
            for sock, count in zip(sockets, before, strict=True):
                for _ in range(count):
                    sock.accept()[0].close()
        first, second, third, fourth = spread(place, sockets)
        assert (third, fourth) == (0, 0)
        assert min(first, second) > 300
    for sock in surplus:
        sock.close()
    slots.settle()
    rest = group(slots, address, 2)
    with all_closed(rest):
        assert min(spread(place, rest)) > 300


def may_refuse() -> bool:
    with socket.socket() as sock:
        return slots_module._refuse(sock)


needs_filters = pytest.mark.skipif(not may_refuse(), reason="this kernel wants CAP_NET_ADMIN for filters on sockets")


@needs_filters
def test_an_address_that_is_dropped(slots: Slots) -> None:
    """Connections that wait there can be accepted; new ones wait, and are refused when it is closed."""
    slots.open([V4, V6], 2)
    slots.release([V4, V6], 2)
    v4, v6 = slots.names()
    waiting = [socket.create_connection(v6, 5) for _ in range(20)]
    surplus = slots.release([V4], 2)
    assert slots.names() == [v4]
    assert sum(accept_queue(sock)[0] for sock in surplus) == 20
    with socket.socket(socket.AF_INET6) as late:
        late.setblocking(False)
        assert late.connect_ex(v6) == errno.EINPROGRESS
        for sock in surplus:
            while accept_queue(sock)[0]:
                accepted, _ = sock.accept()
                accepted.sendall(b"served")
                accepted.close()
        assert [client.recv(10) for client in waiting] == [b"served"] * 20
        assert not select.select([], [late], [], 0)[1]
    for sock in (*surplus, *waiting):
        sock.close()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(v6, 5)
    socket.create_connection(v4, 5).close()


@needs_filters
def test_refusing_keeps_connections_that_wait(slots: Slots) -> None:
    slots.open([V4], 1)
    slots.release([V4], 1)
    (place,) = slots.names()
    (sock,) = group(slots, V4, 1)
    with all_closed([sock]):
        with socket.create_connection(place, 5) as waiting, socket.socket() as late:
            slots.refuse()
            late.setblocking(False)
            late.connect_ex(place)
            accepted, _ = sock.accept()
            accepted.sendall(b"served")
            assert waiting.recv(10) == b"served"
            waiting.sendall(b"thanks")
            assert accepted.recv(10) == b"thanks"
            accepted.close()
            assert accept_queue(sock)[0] == 0


def test_restore(slots: Slots) -> None:
    slots.open([V4], 2)
    slots.release([V4], 2)
    (place,) = slots.names()
    before = slots.filenos()
    slots.open([V4, V6], 4)
    assert len(slots.filenos()) == 8
    slots.restore()
    assert slots.filenos() == before
    assert slots.names() == [place]
    sockets = group(slots, V4, 2)
    with all_closed(sockets):
        assert min(spread(place, sockets, 500)) > 100
    slots.restore()
    assert slots.filenos() == before


def test_a_failure_changes_nothing(slots: Slots) -> None:
    slots.open([V4], 2)
    slots.release([V4], 2)
    (place,) = slots.names()
    before = slots.filenos()
    with listen("::1", 0) as taken:
        other = evolve(V6, port=taken.getsockname()[1])
        with pytest.raises(ListenError, match="in use"):
            slots.open([V4, other], 3)
    assert slots.filenos() == before
    sockets = group(slots, V4, 2)
    with all_closed(sockets):
        assert min(spread(place, sockets, 500)) > 100


def test_another_instance_has_the_port(slots: Slots) -> None:
    """Also if its sockets have SO_REUSEPORT."""
    slots.open([V4], 1)
    (_, port) = slots.names()[0]
    other = Slots()
    with pytest.raises(ListenError, match=f"can't listen on 127.0.0.1:{port}: Address already in use"):
        other.open([evolve(V4, port=port)], 1)
    assert other.filenos() == []
    slots.close()
    other.open([evolve(V4, port=port)], 1)
    other.close()


def test_optional_addresses(slots: Slots) -> None:
    # An address that the host lacks stands for a family that it lacks.
    lacking = ListenAddress(ip_address("2001:db8::1"), 0, optional=True)
    slots.open([V4, lacking], 2)
    (place,) = slots.names()
    assert slots.listening() == [f"127.0.0.1:{place[1]}"]
    assert len(slots.of(1, [V4, lacking])) == 1
    slots.close()
    with pytest.raises(ListenError, match=r"\[2001:db8::1\]:0"):
        slots.open([lacking], 1)
    with pytest.raises(ListenError, match=r"\[2001:db8::1\]:0"):
        slots.open([V4, evolve(lacking, optional=False)], 1)
    assert slots.filenos() == []


def test_an_optional_address_whose_port_is_taken(slots: Slots) -> None:
    with listen("127.0.0.1", 0) as taken, pytest.raises(ListenError, match="in use"):
        slots.open([V6, evolve(V4, port=taken.getsockname()[1], optional=True)], 1)
    assert slots.filenos() == []


def test_the_kernel_chooses_one_port_for_a_group(slots: Slots) -> None:
    other = ListenAddress(ip_address("127.0.0.2"), 0)
    slots.open([V4, other, V6], 3)
    names = slots.names()
    assert len(names) == 3
    assert len(slots.filenos()) == 9
    for index, address in enumerate((V4, other, V6)):
        sockets = group(slots, address, 3)
        with all_closed(sockets):
            assert {sock.getsockname()[:2] for sock in sockets} == {names[index]}


def test_queues_are_summed_up(slots: Slots) -> None:
    slots.open([V4, V6], 2)
    slots.release([V4, V6], 2)
    clients = [socket.create_connection(name, 5) for name in slots.names() for _ in range(3)]
    most = int(Path("/proc/sys/net/core/somaxconn").read_text(encoding="ascii"))
    assert slots.queues() == (6, 4 * min(most, 4096))
    for client in clients:
        client.close()


@pytest.mark.skipif(not may_be_transparent(), reason="sockets with IP_TRANSPARENT need CAP_NET_ADMIN")
@pytest.mark.parametrize("address", [V4, V6], ids=["v4", "v6"])
def test_transparent_sockets(slots: Slots, address: ListenAddress) -> None:
    """All sockets of the group are, their duplicates and what they accept; other groups are not."""
    address = evolve(address, transparent=True)
    plain = ListenAddress(ip_address("127.0.0.2"), 0)
    slots.open([address, plain], 2)
    slots.release([address, plain], 2)
    sockets, others = group(slots, address, 2), group(slots, plain, 2)
    with all_closed(sockets, others):
        assert all(map(is_transparent, sockets))
        assert not any(map(is_transparent, others))
        for members, transparent in ((sockets, True), (others, False)):
            with socket.create_connection(members[0].getsockname()[:2], 5):
                (waiting, *_), _, _ = select.select(members, [], [], 5)
                with waiting.accept()[0] as accepted:
                    assert is_transparent(accepted) == transparent
        with pytest.raises(Error, match="without IP_TRANSPARENT"):
            slots.open([evolve(plain, transparent=True)], 3)
        with pytest.raises(Error, match="with IP_TRANSPARENT"):
            slots.open([plain, evolve(address, transparent=False)], 3)
        assert len(slots.filenos()) == 4


def test_hand_over(slots: Slots) -> None:
    slots.open([V4, V6], 2)
    slots.release([V4, V6], 2)
    state = slots.hand_over()
    state["groups"] = [[host, port, [os.dup(fd) for fd in fds]] for host, port, fds in state["groups"]]
    names = slots.names()
    slots.close()
    heir = Slots.take_over(state)
    assert heir.names() == names
    assert not any(map(os.get_inheritable, heir.filenos()))
    heir.open([V4, V6], 3)
    for sock in heir.release([V6], 3):
        sock.close()
    assert heir.names() == names[1:]
    heir.close()


def test_all_workers_share_inherited_sockets(nothing_leaks: None) -> None:
    """They have no groups, and nothing is done to them that would harm their next user."""
    owner = socket.create_server(("127.0.0.1", 0))
    slots = Slots([owner.dup()])
    check_inherited(slots.inherited)
    for level, option in (
        (socket.IPPROTO_TCP, socket.TCP_FASTOPEN),
        (socket.IPPROTO_TCP, socket.TCP_NODELAY),
        (socket.SOL_SOCKET, socket.SO_KEEPALIVE),
    ):
        assert all(sock.getsockopt(level, option) for sock in slots.inherited)
    slots.open([V4], 4)
    assert slots.of(0, [V4]) == slots.of(3, [V4]) == slots.filenos()
    assert slots.names() == [owner.getsockname()]
    assert slots.release([], 2) == []
    slots.refuse()
    slots.close()
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
