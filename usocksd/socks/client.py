"""The client role: what to say to a SOCKS server, and what to make of its answers.

Rules of this file: as in server.py, a state is the method that reads the next message, nothing is consumed
before it is complete, and no message is longer than 262 bytes. The messages to send are built apart from the
states that send them.

    _method ──00────────────────────────────> _socks5_reply ──> _over
        └─────02──> _authentication_status ──────┘
    _socks4_reply ─────────────────────────────────────────────> _over
"""

from __future__ import annotations

from socket import AF_INET, AF_INET6, inet_ntoa, inet_ntop
from typing import ClassVar, NoReturn

from usocksd.socks.errors import AuthenticationFailed, Kind, RequestRefused, UpstreamFault
from usocksd.socks.events import Established
from usocksd.socks.role import ClientRole, Event
from usocksd.socks.wire import (
    AUTHENTICATION_SUCCESS,
    AUTHENTICATION_VERSION,
    AddressType,
    Command,
    Method,
    Reply,
    Socks4Reply,
    Version,
    encode_field,
    encode_name,
    pack_ip,
)


class Client(ClientRole):
    """The client's side of one handshake: asks the server to connect to `host`, port `port`.

    A numeric host is sent as an address, any other as a name for the server to resolve (SOCKS4: as 4a).
    `username` and `password` are for SOCKS5; with a username, the server chooses whether it wants them.
    `user_id` is SOCKS4's.

    ValueError when it can't be said in this version: IPv6 or 0.0.0.x over SOCKS4, text of more than 255
    bytes, a name that is empty or has control characters.
    """

    __slots__ = ("_credentials", "_request")

    PEER: ClassVar[str] = "server"

    def __init__(
        self,
        host: str,
        port: int,
        *,
        version: Version = Version.SOCKS5,
        username: str | None = None,
        password: str | None = None,
        user_id: str = "",
    ) -> None:
        self._credentials: bytes | None = None
        if version is Version.SOCKS4:
            self._request = b""
            super().__init__(_socks4_request(host, port, user_id), Client._socks4_reply)
            return
        self._request = _socks5_request(host, port)
        greeting = b"\x05\x01\x00"
        if username is not None:
            self._credentials = _authentication(username, password or "")
            greeting = b"\x05\x02\x00\x02"
        super().__init__(greeting, Client._method)

    # The states.

    def _method(self) -> Event:
        # VER, METHOD (RFC 1928 section 3)
        data = self._buffer
        self._check_version(data, 5)
        if len(data) < 2:
            return self._need_data()
        method = data[1]
        self._buffer = data[2:]
        if method == Method.NO_AUTHENTICATION:
            self._out += self._request
            self._state = Client._socks5_reply
        elif method == Method.USERNAME_PASSWORD and self._credentials is not None:
            self._out += self._credentials
            self._state = Client._authentication_status
        elif method == Method.NO_ACCEPTABLE:
            offer = "no credentials" if self._credentials is None else "a user name and password"
            self._fail(lambda: AuthenticationFailed(f"the server wants other than {offer}"))
        else:
            self._malformed(f"the server chose method {method}, which was not offered")
        return self._state(self)

    def _authentication_status(self) -> Event:
        # VER, STATUS (RFC 1929 section 2). Some servers put SOCKS's version there: only the status counts.
        data = self._buffer
        if len(data) < 2:
            return self._need_data()
        if data[1] != AUTHENTICATION_SUCCESS[1]:
            self._fail(lambda: AuthenticationFailed("the server refused the user name or password"))
        self._buffer = data[2:]
        self._out += self._request
        self._state = Client._socks5_reply
        return self._state(self)

    def _socks5_reply(self) -> Event:
        # VER, REP, RSV, ATYP, BND.ADDR, BND.PORT (RFC 1928 section 6)
        data = self._buffer
        self._check_version(data, 5)
        if len(data) >= 2 and data[1] != Reply.SUCCEEDED:
            self._refused(data[1], Reply)  # at once: a proxy may cut it short, and the rest says nothing
        if len(data) < 5:
            return self._need_data()
        match data[3]:
            case AddressType.IPV4:
                start, end = 4, 10
            case AddressType.IPV6:
                start, end = 4, 22
            case AddressType.NAME:
                start, end = 5, 5 + data[4] + 2
            case other:
                self._malformed(f"reply with unknown address type {other}")
        if len(data) < end:
            return self._need_data()
        raw = data[start : end - 2]
        match data[3]:
            case AddressType.IPV4:
                host = inet_ntop(AF_INET, raw)
            case AddressType.IPV6:
                host = inet_ntop(AF_INET6, raw)
            case _:
                host = raw.decode(errors="replace")  # nothing depends on it
        self._buffer = data[end:]
        return self._established(Established(host, int.from_bytes(data[end - 2 : end])))

    def _socks4_reply(self) -> Event:
        # VN, CD, DSTPORT, DSTIP
        data = self._buffer
        self._check_version(data, 0)
        if len(data) >= 2 and data[1] != Socks4Reply.GRANTED:
            self._refused(data[1], Socks4Reply)
        if len(data) < 8:
            return self._need_data()
        self._buffer = data[8:]
        return self._established(Established(inet_ntoa(data[4:8]), int.from_bytes(data[2:4])))

    # What the states share.

    def _check_version(self, data: bytearray, version: int) -> None:
        if data and data[0] != version:
            self._malformed(f"the server answers with {bytes(data[:8])!r}, which is not SOCKS")

    def _malformed(self, message: str) -> NoReturn:
        self._fail(lambda: UpstreamFault(Kind.MALFORMED, message))

    def _refused(self, code: int, codes: type[Reply] | type[Socks4Reply]) -> NoReturn:
        try:
            reply = codes(code)
        except ValueError:
            self._fail(lambda: RequestRefused(code, f"the server refused: unassigned reply {code}"))
        text = reply.name.lower().replace("_", " ")
        self._fail(lambda: RequestRefused(reply, f"the server refused: {text}"))


def _socks5_request(host: str, port: int) -> bytes:
    ip = pack_ip(host)
    if ip is None:
        name = encode_name(host)
        address = bytes((AddressType.NAME, len(name))) + name
    else:
        address = bytes((AddressType.IPV4 if len(ip) == 4 else AddressType.IPV6,)) + ip
    return bytes((5, Command.CONNECT, 0)) + address + port.to_bytes(2)


def _socks4_request(host: str, port: int, user_id: str) -> bytes:
    ip = pack_ip(host)
    name = b""
    if ip is None:
        ip, name = b"\0\0\0\1", encode_name(host) + b"\0"
    elif len(ip) != 4:
        raise ValueError(f"SOCKS4 has no room for the IPv6 address {host}")
    elif ip.startswith(b"\0\0\0") and ip[3]:
        raise ValueError(f"SOCKS4 can't say {host}: it would announce a name, as 4a")
    user = encode_field(user_id, "user id")
    if b"\0" in user:
        raise ValueError("NUL in the user id")
    return bytes((4, Command.CONNECT)) + port.to_bytes(2) + ip + user + b"\0" + name


def _authentication(username: str, password: str) -> bytes:
    user, secret = encode_field(username, "user name"), encode_field(password, "password")
    return bytes((AUTHENTICATION_VERSION, len(user))) + user + bytes((len(secret),)) + secret
