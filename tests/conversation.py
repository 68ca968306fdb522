"""Talking to the state machines of the handshakes, which do no I/O: shared by their tests."""

from __future__ import annotations

from typing import Protocol, TypeVar

import pytest

from usocksd.errors import UpstreamError
from usocksd.socks import NEED_DATA, ClientRole


class Machine(Protocol):
    def receive_data(self, data: bytes) -> None: ...
    def next_event(self) -> object: ...


M = TypeVar("M", bound=Machine)


def after(machine: M, *received: bytes) -> M:
    """`machine`, which was sent each of `received` and needed more after each but the last."""
    for data in received[:-1]:
        machine.receive_data(data)
        assert machine.next_event() is NEED_DATA
    machine.receive_data(received[-1])
    return machine


def error_of(client: ClientRole) -> UpstreamError:
    """The error that the handshake has ended with; it stays that, whatever comes."""
    with pytest.raises(UpstreamError) as raised:
        client.next_event()
    with pytest.raises(type(raised.value)) as again:
        client.next_event()
    assert str(again.value) == str(raised.value)
    client.receive_data(b"more")
    assert client.trailing_data == b""
    assert client.data_to_send() == b""
    return raised.value
