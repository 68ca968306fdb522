"""The base of all clients of a proxy, whatever its protocol: bytes in, bytes out, and finally a connection.

The subclass has the states: methods that return an event, hand over to the next state, or call `_fail`. HTTP CONNECT
(in transocks) is such a subclass too, so one loop drives them all.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, NoReturn, TypeAlias

from usocksd.errors import UpstreamError
from usocksd.socks.errors import Kind, UpstreamFault
from usocksd.socks.events import NEED_DATA, Established, NeedData, Probed

Event: TypeAlias = Established | Probed | NeedData


class ClientRole:
    """The client's side of a handshake with a proxy, without I/O."""

    __slots__ = ("_buffer", "_eof", "_error", "_out", "_state")

    PEER: ClassVar[str]
    """The name of the other side in errors."""

    def __init__(self, out: bytes, state: Callable[[Any], Event]) -> None:
        """`out` are the first bytes to send, `state` (the plain function) reads the answer."""
        self._out = out
        self._state = state
        self._buffer = bytearray()
        self._eof = False
        self._error: Callable[[], UpstreamError] | None = None

    def data_to_send(self) -> bytes:
        """The bytes to send to the proxy now, maybe none. Returned bytes count as sent."""
        out = self._out
        self._out = b""
        return out

    def receive_data(self, data: bytes) -> None:
        """Add what the proxy sent; b"" says that it has closed its side."""
        if not data:
            self._eof = True
        elif self._error is None:
            self._buffer += data

    def next_event(self) -> Event:
        """Established (of a probe: Probed), or NEED_DATA: send what there is to send, then receive more.

        UpstreamFault: the proxy breaks the protocol. RequestRefused, AuthenticationFailed: it said no. Every further
        call raises the same. RuntimeError: the handshake is over.
        """
        return self._state(self)

    @property
    def trailing_data(self) -> bytes:
        """After Established: bytes that followed the proxy's answer, the first of the destination."""
        return bytes(self._buffer)

    # For the states.

    def _established(self, event: Established) -> Established:
        self._state = ClientRole._over
        return event

    def _need_data(self) -> NeedData:
        if self._eof:
            self._fail(lambda: UpstreamFault(Kind.EOF, f"the {self.PEER} closed within the handshake"))
        return NEED_DATA

    def _fail(self, error: Callable[[], UpstreamError]) -> NoReturn:
        # A function that makes a new error each time: a kept one would hold its traceback, whose frames refer to this
        # object.
        self._error = error
        self._state = ClientRole._failed
        self._buffer.clear()
        self._out = b""
        raise error()

    def _over(self) -> Event:
        raise RuntimeError("the handshake is over")

    def _failed(self) -> Event:
        assert self._error is not None
        raise self._error()
