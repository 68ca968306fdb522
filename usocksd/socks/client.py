"""The client role: what to say to a SOCKS server, and what to make of its answers.

Rules of this file: as in server.py, a state is the method that reads the next message, nothing is consumed
before it is complete, and no message is longer than 262 bytes. The messages to send are built apart from the
states that send them.

    _method, _authentication_status (greeting.py) ──> _socks5_reply ──> _over
    _socks4_reply ────────────────────────────────────────────────────> _over
"""

from __future__ import annotations

from socket import AF_INET, AF_INET6, inet_ntoa, inet_ntop
from typing import NoReturn

from usocksd.socks.errors import RequestRefused
from usocksd.socks.events import Established
from usocksd.socks.greeting import Greeting, authentication
from usocksd.socks.role import ClientRole, Event
from usocksd.socks.wire import (
    AddressType,
    Command,
    Reply,
    Socks4Reply,
    Version,
    encode_field,
    encode_name,
    pack_ip,
)


class Client(Greeting):
    """The client's side of one handshake: asks the server to connect to `host`, port `port`.

    A numeric host is sent as an address, any other as a name for the server to resolve (SOCKS4: as 4a).
    `username` and `password` are for SOCKS5; with a username, the server chooses whether it wants them.
    `user_id` is SOCKS4's.

    `pipelined`: all there is to say is in the first `data_to_send`, greeting, credentials and request, and the caller
    may put payload behind it. Only for a server that is known to take that (`Probe` finds out). It leaves the server
    no choice: it must want credentials if there are any, and none if there are not.

    ValueError when it can't be said in this version: IPv6 or 0.0.0.x over SOCKS4, text of more than 255
    bytes, a name that is empty or has control characters.
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
    ) -> None:
        if version is Version.SOCKS4:
            ClientRole.__init__(self, _socks4_request(host, port, user_id), Client._socks4_reply)
            return
        request = _socks5_request(host, port)
        if username is None:
            self._greet(b"\x00", b"", request, pipelined=pipelined)
        else:
            offered = b"\x02" if pipelined else b"\x00\x02"
            self._greet(offered, authentication(username, password or ""), request, pipelined=pipelined)

    # The states.

    def _authenticated(self) -> Event:
        if not self._pipelined:
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
        # VN, CD, DSTPORT, DSTIP. VN should be 0; some servers put SOCKS's version there.
        data = self._buffer
        self._check_version(data, 4 if data.startswith(b"\x04") else 0)
        if len(data) >= 2 and data[1] != Socks4Reply.GRANTED:
            self._refused(data[1], Socks4Reply)
        if len(data) < 8:
            return self._need_data()
        self._buffer = data[8:]
        return self._established(Established(inet_ntoa(data[4:8]), int.from_bytes(data[2:4])))

    # What the states share.

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
