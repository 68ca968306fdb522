"""The name inside the first bytes of a connection: TLS SNI, HTTP/1 Host. Pure, no I/O.

A `Sniffer` is fed bytes as they arrive, and tells what they are as soon as that is known. Rules of this file:

- No input raises anything, and no byte is looked at twice, however small the pieces are.
- In doubt there is no name. A name always comes from `canonical_host`, and is never an address.
- The client chooses the name, and may forge it. That is harmless since the *name* is asked for.

Sources: RFC 8446 sections 4.1.2, 4.2 and 5.1 (a hello may be split over records), RFC 6066 section 3 (SNI), RFC 9849
section 5 (ECH), RFC 9112 sections 3 and 5 (request line, Host).
"""

from __future__ import annotations

import enum
import re
from struct import Struct
from struct import error as StructError
from typing import NamedTuple

from usocksd.names.match import canonical_host

MOST = 16 * 1024
"""The most bytes that are looked at: browsers send hellos of 2 KiB, and heads of requests rarely reach 8."""

_HANDSHAKE, _CLIENT_HELLO = 22, 1
_RECORD_HEADER = 5
_LONGEST_RECORD = 16 * 1024
_EXTENSION = Struct("!HH")
_SERVER_NAME_ENTRY = Struct("!HBH")
_SERVER_NAME, _ENCRYPTED_CLIENT_HELLO = 0, 0xFE0D
_HOST_NAME = 0
# The header of the message, legacy_version and random: everything before the first field of variable length.
_FIXED = 4 + 2 + 32

_REQUEST_START = re.compile(rb"[A-Z-]{1,32}(?: .*)?", re.DOTALL)
_LONGEST_METHOD = 32
_REQUEST_LINE = re.compile(rb"([A-Z-]{1,32}) (\S+) HTTP/1\.[0-9]\r?")
_ABSOLUTE = re.compile(rb"(https?)://([^/?#@]*)(?:[/?#].*)?", re.IGNORECASE)
_HOST_LINE = re.compile(rb"host:[ \t]*(.*?)[ \t]*\r?", re.IGNORECASE)
_AUTHORITY = re.compile(rb"([^:\[\]@]+)(?::([0-9]{0,5}))?")
_DEFAULT_PORTS = {b"http": 80, b"https": 443}


class Protocol(enum.Enum):
    """The protocol of a client's first bytes."""

    TLS = "tls"
    HTTP = "http"
    OTHER = "other"
    """anything else, for example HTTP/2 without TLS: no name"""


class Opening(NamedTuple):
    """The result: what the first bytes are. `name` is canonical; None: there is none."""

    protocol: Protocol
    name: str | None = None
    encrypted: bool = False
    """The hello has an encrypted one inside (ECH), or seems to: `name` is the outer one, which proves nothing."""
    repeatable: bool = False
    """The bytes are (the beginning of) a TLS hello and nothing else: a server does nothing when it gets them."""


OTHER = Opening(Protocol.OTHER)


class Sniffer:
    """Finds the name in the first bytes of one client."""

    __slots__ = ("_at", "_data", "_handshake", "_port", "_protocol", "_searched")

    def __init__(self, port: int) -> None:
        """`port` is where the client was connecting to: an HTTP request for another port is meant for a proxy."""
        self._port = port
        self._protocol: Protocol | None = None
        self._data = bytearray()
        self._at = 0
        """TLS: the next record. HTTP: the incomplete line."""
        self._searched = 0
        """HTTP: that line does not end before here."""
        self._handshake = bytearray()
        """TLS: the contents of the records so far."""

    def feed(self, data: bytes) -> Opening | None:
        """The next bytes. Returns what they are once that is known (feed no more then), None if more are needed."""
        self._data += data
        if self._protocol is None:
            if not self._data:
                return None
            first = self._data[0]
            if first == _HANDSHAKE:
                self._protocol = Protocol.TLS
            elif 0x41 <= first <= 0x5A:  # a capital letter, as methods begin with
                self._protocol = Protocol.HTTP
            else:
                return OTHER
        if self._protocol is Protocol.TLS:
            return self._records()
        return self._lines()

    def finish(self) -> Opening:
        """The result if no more bytes come."""
        if self._protocol is Protocol.TLS:
            # A server does not act on an incomplete hello.
            return Opening(Protocol.TLS, repeatable=True)
        return Opening(Protocol.HTTP) if self._at else OTHER

    # TLS

    def _records(self) -> Opening | None:
        data, at = self._data, self._at
        size = len(data)
        # The first bytes of the record and message are enough to see that this is no hello.
        if (size > 1 and data[1] != 3) or (size > 5 and data[5] != _CLIENT_HELLO):
            return OTHER
        while size - at >= _RECORD_HEADER:
            length = data[at + 3] << 8 | data[at + 4]
            if data[at] != _HANDSHAKE or not 0 < length <= _LONGEST_RECORD:
                return OTHER
            end = at + _RECORD_HEADER + length
            if end > size:
                break
            self._handshake += data[at + _RECORD_HEADER : end]
            self._at = at = end
            found = self._message(rest=size - end)
            if found is not None:
                return found
        return None if size < MOST else OTHER

    def _message(self, *, rest: int) -> Opening | None:
        """The hello, once it is complete; `rest` is the number of bytes behind this record."""
        handshake = self._handshake
        if len(handshake) < 4:
            return None
        length = int.from_bytes(handshake[1:4])
        if length > MOST:
            return OTHER
        behind = len(handshake) - 4 - length
        if behind < 0:
            return None
        try:
            name, encrypted = _read_hello(bytes(handshake[: 4 + length]))
        except (IndexError, ValueError, StructError):
            return OTHER
        # Early data (RFC 8446 section 4.2.10) may be behind it, which a server acts on.
        return Opening(Protocol.TLS, name, encrypted, repeatable=not (behind or rest))

    # HTTP/1

    def _lines(self) -> Opening | None:
        data = self._data
        while (end := data.find(b"\n", self._searched)) >= 0:
            line = bytes(data[self._at : end])
            first = self._at == 0
            self._at = self._searched = end + 1
            found = self._request_line(line) if first else self._header(line)
            if found is not None:
                return found
        self._searched = len(data)
        if self._at == 0 and not _REQUEST_START.fullmatch(data[: _LONGEST_METHOD + 1]):
            return OTHER
        return None if len(data) < MOST else OTHER

    def _request_line(self, line: bytes) -> Opening | None:
        match = _REQUEST_LINE.fullmatch(line)
        if match is None or match[1] == b"CONNECT":  # meant for a proxy
            return OTHER
        absolute = _ABSOLUTE.fullmatch(match[2])
        if absolute is None:
            return None
        # It takes precedence over Host (RFC 9112 section 3.2.2). Usually such a request is for a proxy, and the port
        # differs.
        return self._named(absolute[2], _DEFAULT_PORTS[absolute[1].lower()])

    def _header(self, line: bytes) -> Opening | None:
        if line in (b"", b"\r"):  # the end of the head, without a Host
            return Opening(Protocol.HTTP)
        match = _HOST_LINE.fullmatch(line)
        return None if match is None else self._named(match[1], self._port)

    def _named(self, authority: bytes, default_port: int) -> Opening:
        match = _AUTHORITY.fullmatch(authority)
        if match is None or int(match[2] or default_port) != self._port:
            return Opening(Protocol.HTTP)
        return Opening(Protocol.HTTP, _name(match[1]))


def _read_hello(hello: bytes) -> tuple[str | None, bool]:
    """The name in a whole ClientHello, header included, and whether it has the extension of ECH.

    Raises IndexError, ValueError or struct.error if it is malformed.
    """
    at = _FIXED
    at += 1 + hello[at]  # legacy_session_id
    at += 2 + (hello[at] << 8 | hello[at + 1])  # cipher_suites
    at += 1 + hello[at]  # legacy_compression_methods
    name: str | None = None
    encrypted = False
    if at == len(hello):  # no extensions, as before TLS 1.2
        return name, encrypted
    end = at + 2 + (hello[at] << 8 | hello[at + 1])
    if end != len(hello):
        raise ValueError
    at += 2
    seen = False
    unpack = _EXTENSION.unpack_from
    while at < end:
        kind, length = unpack(hello, at)
        at += 4
        if at + length > end:
            raise ValueError
        if kind == _SERVER_NAME:
            if seen:
                raise ValueError
            seen = True
            name = _read_server_name(hello[at : at + length])
        elif kind == _ENCRYPTED_CLIENT_HELLO:
            encrypted = True
        at += length
    return name, encrypted


def _read_server_name(extension: bytes) -> str | None:
    """The one name in the extension, if it is valid. Raises struct.error if it is too short."""
    listed, kind, length = _SERVER_NAME_ENTRY.unpack_from(extension)
    if kind != _HOST_NAME or not listed == length + 3 == len(extension) - 2:
        return None
    return _name(extension[5:])


def _name(raw: bytes) -> str | None:
    """The canonical form, if it is a name."""
    try:
        host = canonical_host(raw.decode("ascii"))
    except ValueError:
        return None
    # "localhost" means the host that resolves it (RFC 6761 section 6.3), not where a redirected connection was going.
    return host if isinstance(host, str) and not f".{host}".endswith(".localhost") else None
