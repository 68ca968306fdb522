"""The client's side of an HTTP CONNECT tunnel (RFC 9110 section 9.3.6), without I/O.

It is a ClientRole like `usocksd.socks.SocksConnect`, so that one loop serves upstreams of either kind.

Rules of this file: only the status of the response matters. The head is bounded, interim responses included. Bytes
after it are the destination's, and are not consumed. (RFC 9110 wants Content-Length and Transfer-Encoding of a success
ignored.)
"""

from __future__ import annotations

import re
from base64 import b64encode
from typing import ClassVar, NoReturn

from usocksd.socks import AuthenticationFailed, ClientRole, Established, Kind, RequestRefused, UpstreamFault
from usocksd.socks.role import Event
from usocksd.socks.wire import pack_ip

MAX_HEAD = 16 * 1024
"""The most bytes of response head, all interim responses and the final one together."""

PROXY_AUTHENTICATION_REQUIRED = 407

# Bare LF is let through, as RFC 9112 section 2.2 allows.
_HEAD_END = re.compile(rb"\n\r?\n")
_STATUS_LINE = re.compile(rb"HTTP/1\.[0-9] ([1-9][0-9]{2})(?: ([^\r\n]*))?\r?\n")
_STATUS_LINE_START = b"HTTP/1."

# Other characters could end the line, or the authority.
_NAME = re.compile(r"[A-Za-z0-9._-]{1,255}")
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")


class HttpConnect(ClientRole):
    """Asks an HTTP proxy for a tunnel to `host`, port `port`.

    `host` is a numeric address (IPv6 without brackets) or a name in ASCII. `username` and `password` are plain text
    (percent-decoded if they come from a URL), sent by the Basic scheme (RFC 7617).

    ValueError if the host does not fit into a request line, or the credentials into that scheme.
    """

    __slots__ = ("_consumed", "_searched")

    PEER: ClassVar[str] = "proxy"

    def __init__(self, host: str, port: int, *, username: str | None = None, password: str | None = None) -> None:
        super().__init__(_request(host, port, username, password), HttpConnect._response)
        self._consumed = 0  # bytes of interim responses
        self._searched = 0  # bytes of the buffer that were searched for the end of the head

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
                return self._established(Established())
        return self._need_data()

    # Shared by the states.

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

    def _refused(self, status: int, reason: str) -> NoReturn:
        message = f"the proxy refused: {status} {reason}".rstrip()
        if status == PROXY_AUTHENTICATION_REQUIRED:
            self._fail(lambda: AuthenticationFailed(message))
        self._fail(lambda: RequestRefused(status, message))

    def _malformed(self, head: bytes) -> NoReturn:
        start = head[:40]
        self._fail(lambda: UpstreamFault(Kind.MALFORMED, f"the proxy answers with {start!r}, not HTTP/1"))


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
        lines.append(authorization(username, password))
    return "\r\n".join([*lines, "", ""]).encode("ascii")


def authorization(username: str, password: str | None) -> str:
    """The header line with credentials. ValueError for what the Basic scheme can't carry (RFC 7617 section 2)."""
    password = password or ""
    # The first colon divides the two, and neither may have control characters.
    if ":" in username:
        raise ValueError("colon in the user name")
    if _CONTROL.search(username + password):
        raise ValueError("control character in the user name or password")
    return f"Proxy-Authorization: Basic {b64encode(f'{username}:{password}'.encode()).decode('ascii')}"
