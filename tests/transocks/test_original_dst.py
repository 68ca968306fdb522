"""Where a connection that TPROXY brought was going, as its socket tells. (tests/netns has the real rules.)"""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from transocks.original_dst import NotRedirected, tproxy_destination
from usocksd.net.address import HostPort


@contextmanager
def accepted(listens_on: str, connects_to: str) -> Iterator[tuple[socket.socket, int]]:
    """One end of a connection over loopback, and the port that it was made to."""
    family = socket.AF_INET6 if ":" in listens_on else socket.AF_INET
    with socket.socket(family) as listener:
        if family == socket.AF_INET6:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        listener.bind((listens_on, 0))
        listener.listen()
        port = listener.getsockname()[1]
        with socket.create_connection((connects_to, port), 5), listener.accept()[0] as sock:
            yield sock, port


@pytest.mark.parametrize(
    ("listens_on", "connects_to"),
    [("127.0.0.1", "127.0.0.1"), ("::1", "::1"), ("0.0.0.0", "127.0.0.7"), ("::", "127.0.0.7"), ("::", "::1")],
)
def test_our_end_is_the_destination(listens_on: str, connects_to: str) -> None:
    """In its one form: an IPv4 connection of a dual-stack socket is IPv4."""
    with accepted(listens_on, connects_to) as (sock, port):
        destination = HostPort(connects_to, port)
        asked: list[HostPort] = []
        assert tproxy_destination(sock, lambda place: bool(asked.append(place))) == destination
        assert asked == [destination]


def test_our_own_port_is_none() -> None:
    with accepted("127.0.0.1", "127.0.0.1") as (sock, _), pytest.raises(NotRedirected, match="no TPROXY rule"):
        tproxy_destination(sock, lambda _: True)
