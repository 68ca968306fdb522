"""The client role: makes the messages to a SOCKS server, and parses its answers.

Rules of this file: as in server.py, a state is the method that reads the next message, nothing is consumed
before it is complete, and no message is longer than 262 bytes. The messages to send are built apart from the
states that send them.

    _method ──00──────────────────────────────> _authenticated ──> _socks5_reply ──> _over
        └─────02──> _authentication_status ─────────┘
    _socks4_reply ─────────────────────────────────────────────────────────────────> _over
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

_VERSION5 = 5


class Greeting(ClientRole):
    """A SOCKS5 client up to its request: offers methods, and sends credentials if they are wanted. The rest is the
    subclass's, whose `__init__` calls `_greet`.
    """

    __slots__ = ("_credentials", "_offered", "_pipelined", "_request", "method")

    PEER: ClassVar[str] = "server"

    method: Method | None
    """the one that the server has chosen"""

    def _greet(self, offered: bytes, credentials: bytes, request: bytes, *, pipelined: bool) -> None:
        """Offer these methods. `credentials` are for a server that wants them, b"" if there are none.

        `pipelined`: send everything at once, the request included; then the offer must leave no doubt whether
        credentials are wanted.
        """
        self.method = None
        self._offered = offered
        self._credentials = credentials
        self._request = request
        self._pipelined = pipelined
        greeting = bytes((_VERSION5, len(offered))) + offered
        super().__init__(greeting + credentials + request if pipelined else greeting, Greeting._method)

    # The states.

    def _method(self) -> Event:
        # VER, METHOD (RFC 1928 section 3)
        data = self._buffer
        self._check_version(data, _VERSION5)
        if len(data) < 2:
            return self._need_data()
        chosen = data[1]
        if chosen == Method.NO_ACCEPTABLE:
            offer = "a user name and password" if self._credentials else "no credentials"
            self._fail(lambda: AuthenticationFailed(f"the server wants other than {offer}"))
        if chosen not in self._offered:
            self._malformed(f"the server chose method {chosen}, which was not offered")
        self._buffer = data[2:]
        self.method = method = Method(chosen)
        if method is Method.NO_AUTHENTICATION or not self._credentials:
            return self._authenticated()
        if not self._pipelined:
            self._out += self._credentials
        self._state = Greeting._authentication_status
        return self._state(self)

    def _authentication_status(self) -> Event:
        # VER, STATUS (RFC 1929 section 2). Some servers put SOCKS's version there: only the status counts.
        data = self._buffer
        if len(data) < 2:
            return self._need_data()
        if data[1] != AUTHENTICATION_SUCCESS[1]:
            self._fail(lambda: AuthenticationFailed("the server refused the user name or password"))
        self._buffer = data[2:]
        return self._authenticated()

    def _authenticated(self) -> Event:
        """The server is ready for the request."""
        raise NotImplementedError

    # Shared by the states.

    def _check_version(self, data: bytearray, version: int) -> None:
        if data and data[0] != version:
            self._malformed(f"the server answers with {bytes(data[:8])!r}, which is not SOCKS")

    def _malformed(self, message: str) -> NoReturn:
        self._fail(lambda: UpstreamFault(Kind.MALFORMED, message))


class SocksConnect(Greeting):
    """The client's side of one handshake: asks the server to connect to `host`, port `port`.

    With the `command` UDP_ASSOCIATE they are where the client's datagrams will come from; 0.0.0.0 (or ::) port 0 if it
    does not know. The address in `Established` is then the one to which it sends them. SOCKS4 has no such command.

    A numeric host is sent as an address, any other as a name for the server to resolve (SOCKS4: as 4a).
    `username` and `password` are for SOCKS5; with a username, the server chooses whether it wants them.
    `user_id` is SOCKS4's.

    `pipelined`: the first `data_to_send` has everything: greeting, credentials and request, and the caller may add
    payload. Only for a server that is known to take that (`Probe` finds out). It leaves the server no choice: it must
    want credentials if there are any, and none otherwise.

    ValueError for requests that this version can't express: IPv6 or 0.0.0.x over SOCKS4, text of more than 255 bytes, a
    name that is empty or has control characters.
    """

    __slots__ = ()

    def __init__(
        self,
        host: str,
        port: int,
        *,
        version: Version = Version.SOCKS5,
        username: str | None = None,
        password: str | None = None,
        user_id: str = "",
        pipelined: bool = False,
        command: Command = Command.CONNECT,
    ) -> None:
        if version is Version.SOCKS4:
            ClientRole.__init__(self, _socks4_request(host, port, user_id), SocksConnect._socks4_reply)
            return
        request = _socks5_request(command, host, port)
        if username is None:
            self._greet(b"\x00", b"", request, pipelined=pipelined)
        else:
            offered = b"\x02" if pipelined else b"\x00\x02"
            self._greet(offered, authentication(username, password or ""), request, pipelined=pipelined)

    # The states.

    def _authenticated(self) -> Event:
        if not self._pipelined:
            self._out += self._request
        self._state = SocksConnect._socks5_reply
        return self._state(self)

    def _socks5_reply(self) -> Event:
        # VER, REP, RSV, ATYP, BND.ADDR, BND.PORT (RFC 1928 section 6)
        data = self._buffer
        self._check_version(data, 5)
        if len(data) >= 2 and data[1] != Reply.SUCCEEDED:
            self._refused(data[1], Reply)  # at once, since a proxy may truncate the rest, which is not needed
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
                host = raw.decode(errors="replace")
        self._buffer = data[end:]
        return self._established(Established(host, int.from_bytes(data[end - 2 : end])))

    def _socks4_reply(self) -> Event:
        # VN, CD, DSTPORT, DSTIP. VN should be 0; some servers put SOCKS's version there.
        data = self._buffer
        self._check_version(data, 4 if data.startswith(b"\x04") else 0)
        if len(data) >= 2 and data[1] != Socks4Reply.GRANTED:
            self._refused(data[1], Socks4Reply)
        if len(data) < 8:
            return self._need_data()
        self._buffer = data[8:]
        return self._established(Established(inet_ntoa(data[4:8]), int.from_bytes(data[2:4])))

    # Shared by the states.

    def _refused(self, code: int, codes: type[Reply] | type[Socks4Reply]) -> NoReturn:
        try:
            reply = codes(code)
        except ValueError:
            self._fail(lambda: RequestRefused(code, f"the server refused: unassigned reply {code}"))
        text = reply.name.lower().replace("_", " ")
        self._fail(lambda: RequestRefused(reply, f"the server refused: {text}"))


def authentication(username: str, password: str) -> bytes:
    """VER, ULEN, UNAME, PLEN, PASSWD (RFC 1929 section 2). ValueError for more than 255 bytes of either."""
    user, secret = encode_field(username, "user name"), encode_field(password, "password")
    return bytes((AUTHENTICATION_VERSION, len(user))) + user + bytes((len(secret),)) + secret


def _socks5_request(command: Command, host: str, port: int) -> bytes:
    ip = pack_ip(host)
    if ip is None:
        name = encode_name(host)
        address = bytes((AddressType.NAME, len(name))) + name
    else:
        address = bytes((AddressType.IPV4 if len(ip) == 4 else AddressType.IPV6,)) + ip
    return bytes((5, command, 0)) + address + port.to_bytes(2)


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
