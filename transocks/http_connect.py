"""The client's side of an HTTP CONNECT tunnel (RFC 9110 section 9.3.6), without I/O.

It is driven like `usocksd.socks.Client`, reports the same events and raises the same errors, so that one loop
serves upstreams of either kind.

Rules of this file: of the response only the status matters. Its head is bounded, interim responses included,
and nothing behind it is consumed: that is the destination's. (So Content-Length and Transfer-Encoding of a
success are not even read, as RFC 9110 wants.)
"""

from __future__ import annotations

import re
from base64 import b64encode
from collections.abc import Callable
from typing import NoReturn, TypeAlias

from usocksd.errors import UpstreamError
from usocksd.socks import (
    NEED_DATA,
    AuthenticationFailed,
    Established,
    Kind,
    NeedData,
    RequestRefused,
    UpstreamFault,
)
from usocksd.socks.wire import pack_ip

Event: TypeAlias = Established | NeedData

MAX_HEAD = 16 * 1024
"""The most bytes of response head, all interim responses and the final one together."""

PROXY_AUTHENTICATION_REQUIRED = 407

# Bare LF is let through, as RFC 9112 section 2.2 allows.
_HEAD_END = re.compile(rb"\n\r?\n")
_STATUS_LINE = re.compile(rb"HTTP/1\.[0-9] ([1-9][0-9]{2})(?: ([^\r\n]*))?\r?\n")
_STATUS_LINE_START = b"HTTP/1."

# Anything else in a name could end the line, or the authority, that it stands in.
_NAME = re.compile(r"[A-Za-z0-9._-]{1,255}")
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")


class HttpConnect:
    """Asks an HTTP proxy for a tunnel to `host`, port `port`.

    `host` is a numeric address (IPv6 without brackets) or a name in ASCII. `username` and `password` are the
    plain ones (already percent-decoded where they come from a URL), sent by the Basic scheme (RFC 7617).

    ValueError when the host would not fit into a request line, or the credentials not into that scheme.
    """

    __slots__ = ("_buffer", "_consumed", "_eof", "_error", "_out", "_searched", "_state")

    _state: Callable[[HttpConnect], Event]
    _error: Callable[[], UpstreamError] | None

    def __init__(self, host: str, port: int, *, username: str | None = None, password: str | None = None) -> None:
        self._out = _request(host, port, username, password)
        self._buffer = bytearray()
        self._consumed = 0  # bytes of interim responses
        self._searched = 0  # bytes of the buffer that were searched for the end of the head
        self._eof = False
        self._error = None
        self._state = HttpConnect._response

    def data_to_send(self) -> bytes:
        """What is to be sent to the proxy now, maybe nothing. What was returned counts as sent."""
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
        """Established, or NEED_DATA: send what there is to send, then receive more.

        UpstreamFault: it does not speak HTTP/1, or says too much. RequestRefused: it said no, `reply` is the
        status. AuthenticationFailed: it said 407. Every further call raises the same. RuntimeError: the
        handshake is over.
        """
        return self._state(self)

    @property
    def trailing_data(self) -> bytes:
        """After Established: what came behind the response head, the destination's first bytes."""
        return bytes(self._buffer)

    # The states.

    def _response(self) -> Event:
        while (head := self._take_head()) is not None:
            line = _STATUS_LINE.match(head)
            if line is None:
                self._malformed(head)
            status = int(line[1])
            if status >= 300:
                self._refused(status, (line[2] or b"")[:100].decode("latin-1"))
            if status >= 200:
                self._state = HttpConnect._over
                return Established()
        return self._need_data()

    def _over(self) -> Event:
        raise RuntimeError("the handshake is over")

    def _failed(self) -> Event:
        assert self._error is not None
        raise self._error()

    # What they need.

    def _take_head(self) -> bytes | None:
        """The next complete response head, taken out of the buffer."""
        buffer = self._buffer
        if not _STATUS_LINE_START.startswith(bytes(buffer[: len(_STATUS_LINE_START)])):
            self._malformed(bytes(buffer[:40]))
        found = _HEAD_END.search(buffer, max(0, self._searched - 2))
        size = found.end() if found else len(buffer)
        if self._consumed + size > MAX_HEAD:
            self._fail(lambda: UpstreamFault(Kind.TOO_LONG, f"response head of more than {MAX_HEAD} bytes"))
        if found is None:
            self._searched = size
            return None
        head = bytes(buffer[:size])
        del buffer[:size]
        self._consumed += size
        self._searched = 0
        return head

    def _need_data(self) -> NeedData:
        if self._eof:
            self._fail(lambda: UpstreamFault(Kind.EOF, "the proxy closed within the handshake"))
        return NEED_DATA

    def _refused(self, status: int, reason: str) -> NoReturn:
        message = f"the proxy refused: {status} {reason}".rstrip()
        if status == PROXY_AUTHENTICATION_REQUIRED:
            self._fail(lambda: AuthenticationFailed(message))
        self._fail(lambda: RequestRefused(status, message))

    def _malformed(self, head: bytes) -> NoReturn:
        start = head[:40]
        self._fail(lambda: UpstreamFault(Kind.MALFORMED, f"the proxy answers with {start!r}, not HTTP/1"))

    def _fail(self, error: Callable[[], UpstreamError]) -> NoReturn:
        # What is kept makes the error anew: a kept one would hold its traceback, whose frames hold us.
        self._error = error
        self._state = HttpConnect._failed
        self._buffer.clear()
        raise error()


def _request(host: str, port: int, username: str | None, password: str | None) -> bytes:
    ip = pack_ip(host)
    if ip is not None and len(ip) == 16:
        authority = f"[{host}]:{port}"
    elif _NAME.fullmatch(host):
        authority = f"{host}:{port}"
    else:
        raise ValueError(f"{host!r} can't be the host of a CONNECT request")
    lines = [f"CONNECT {authority} HTTP/1.1", f"Host: {authority}"]
    if username is not None:
        lines.append(f"Proxy-Authorization: Basic {_basic(username, password or '')}")
    return "\r\n".join([*lines, "", ""]).encode("ascii")


def _basic(username: str, password: str) -> str:
    # RFC 7617 section 2: the first colon divides the two, and neither may have control characters.
    if ":" in username:
        raise ValueError("colon in the user name")
    if _CONTROL.search(username + password):
        raise ValueError("control character in the user name or password")
    return b64encode(f"{username}:{password}".encode()).decode("ascii")
