"""The transparent sockets: what the kernel tells of a datagram's destination. (TPROXY itself: tests/netns.)"""

from __future__ import annotations

import errno
import os
import socket
import struct

import pytest

from transocks.udp.sockets import ANCILLARY_SIZE, open_flow, open_listener, original_destination
from usocksd.net.listeners import ListenError

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: IP_TRANSPARENT")


@needs_root
@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_a_listener_learns_the_destination(host: str) -> None:
    v6 = ":" in host
    listener = open_listener(host, 0)
    place = listener.getsockname()
    with socket.socket(socket.AF_INET6 if v6 else socket.AF_INET, socket.SOCK_DGRAM) as client:
        client.sendto(b"hello", place)
        listener.setblocking(True)
        data, ancillary, _, sender = listener.recvmsg(100, ANCILLARY_SIZE)
        assert (data, original_destination(ancillary, v6=v6)) == (b"hello", place)
        assert original_destination(ancillary, v6=not v6) is None
        assert sender[1] == client.getsockname()[1]
    listener.close()


@needs_root
def test_workers_share_an_address_and_others_do_not() -> None:
    one = open_listener("127.0.0.1", 0)
    port = one.getsockname()[1]
    open_listener("127.0.0.1", port).close()
    with socket.socket(type=socket.SOCK_DGRAM) as other:
        with pytest.raises(OSError, match="in use"):
            other.bind(("127.0.0.1", port))
        other.bind(("127.0.0.1", 0))
        with pytest.raises(ListenError, match=r"can't listen on 127\.0\.0\.1:\d+ \(UDP\): Address already in use"):
            open_listener("127.0.0.1", other.getsockname()[1])
    one.close()


@needs_root
def test_several_clients_of_one_destination() -> None:
    destination = ("198.51.100.77", 5353)  # of no interface
    clients = [("127.0.0.1", port) for port in (40001, 40002)]
    flows = [open_flow(destination, client, None) for client in clients]
    assert [flow.getpeername() for flow in flows] == clients
    assert {flow.getsockname() for flow in flows} == {destination}
    for flow in flows:
        flow.close()


def test_a_link_local_destination_has_its_interface() -> None:
    raw = struct.pack("!HHI16s", socket.AF_INET6, 53, 0, socket.inet_pton(socket.AF_INET6, "fe80::1"))
    message = (socket.IPPROTO_IPV6, 74, raw + struct.pack("=I", 7))
    assert original_destination([message], v6=True) == ("fe80::1", 53, 0, 7)


def test_without_permission(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr("transocks.udp.sockets._make_transparent", refuse)
    with pytest.raises(ListenError, match="needs CAP_NET_ADMIN") as raised:
        open_listener("127.0.0.1", 0)
    assert raised.value.errno == errno.EPERM
