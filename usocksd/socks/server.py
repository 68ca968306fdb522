"""The server role: one client's handshake.

Rules of this file:

- A state is a method that reads the next message: `_state` holds it (the plain function: a bound method would make a
  reference cycle for every connection). It returns an event, or passes on to the next state.
- No message is consumed before it is complete, and none can be long: see MAX_INCOMPLETE.
- A Server is made for each connection, so the usual handshake takes a short path. No loop over bytes.
- A fault is raised only when the whole message has arrived, if its length can be known: closing a socket with
  unread bytes makes the kernel send RST, which may take the reply with it.

    _version ──05──> _greeting ──00──> (_unasked_credentials, if 02 was offered) ──> _socks5_request ──> _owes_reply
        │                ├───────02──> _credentials ──> _owes_verdict ──accepted──┘                │   │
        │                │                                   └──────────rejected──> _over <──reply─┘   │
        │                └───────F5──> _over (with an offer of 02 too: by way of the verdict)          │
        └──────04──> _socks4_request ──────────────────────────────────────────────────────────────────┘
                         └──F5──> _over

and from everywhere that reads: a ClientFault ──> _faulty, which raises it again each time.
"""

from __future__ import annotations

from collections.abc import Callable
from socket import AF_INET6, inet_ntoa, inet_ntop
from typing import NoReturn, TypeAlias

from usocksd.socks.errors import ClientFault, Kind
from usocksd.socks.events import INQUIRY, NEED_DATA, Credentials, Inquiry, NeedData, Request
from usocksd.socks.wire import (
    AUTHENTICATION_FAILURE,
    AUTHENTICATION_SUCCESS,
    AUTHENTICATION_VERSION,
    HTTP_ERROR,
    MAX_FIELD,
    METHOD_SELECTION,
    AddressType,
    Command,
    Method,
    Reply,
    Version,
    decode_name,
    end_of_credentials,
    failure,
    success,
)

Event: TypeAlias = Credentials | Request | Inquiry | NeedData

# Enum members under global names: looking one up through its class costs as much as comparing bytes.
_SOCKS4, _SOCKS5 = Version.SOCKS4, Version.SOCKS5
_IPV4, _NAME, _IPV6 = AddressType.IPV4, AddressType.NAME, AddressType.IPV6
_NO_AUTHENTICATION = Method.NO_AUTHENTICATION
_PROBE = Method.PROBE

_COMMANDS = {int(command): command for command in Command}
_SOCKS4_COMMANDS = {int(command): command for command in (Command.CONNECT, Command.BIND)}

_AUTHENTICATION_VERSIONS = (AUTHENTICATION_VERSION, _SOCKS5)

_JUST_NO_AUTHENTICATION = b"\x05\x01\x00"  # the greeting of nearly every client
_TLS_HANDSHAKE = 0x16  # the content type that opens a TLS connection (RFC 8446 section 5.1)


class Server:
    """The server's side of one client's handshake.

    Give it what was received, ask for the next event, and send what `data_to_send` returns. It selects the
    authentication method itself. After Credentials call `answer_credentials()`, after a Request `reply()`. After
    Inquiry only send and close.

    `methods` are the authentication methods to choose from, in order of preference: NO_AUTHENTICATION and
    USERNAME_PASSWORD are the ones it can carry out. SOCKS4 can't authenticate and is refused unless
    NO_AUTHENTICATION is among them. A probe (see Method.PROBE) is always answered; if it offers to authenticate too,
    its credentials follow and are to be judged. Either way it ends in Inquiry, and in no Request.

    `version` is None until the first byte is there, `method` until one is selected.
    """

    __slots__ = ("_buffer", "_eof", "_fault", "_methods", "_out", "_state", "method", "version")

    def __init__(self, *, methods: tuple[Method, ...] = (_NO_AUTHENTICATION,)) -> None:
        self.version: Version | None = None
        self.method: Method | None = None
        self._methods = methods
        self._state: Callable[[Server], Event] = Server._version
        self._buffer = b""
        self._out = b""
        self._eof = False
        self._fault: tuple[Kind, bytes, str] | None = None

    def receive_data(self, data: bytes) -> None:
        """Add what the client sent; b"" says that it has closed its side."""
        if not data:
            self._eof = True
        elif self._fault is None:
            self._buffer = self._buffer + data if self._buffer else data

    def next_event(self) -> Event:
        """The client's next message, or NEED_DATA. ClientFault: it broke the protocol; the error has the bytes still to
        be sent, and every further call raises the same. RuntimeError: the client is still waiting for our answer.
        """
        return self._state(self)

    def data_to_send(self) -> bytes:
        """The bytes to send to the client now, maybe none. Returned bytes count as sent."""
        out = self._out
        self._out = b""
        return out

    @property
    def trailing_data(self) -> bytes:
        """After a Request: the bytes after it, payload for the destination."""
        return self._buffer

    def answer_credentials(self, *, accepted: bool) -> None:
        """Tell the client whether its credentials are right. If not, close then, as RFC 1929 section 2 asks."""
        if self._state is not Server._owes_verdict:
            raise RuntimeError("there are no credentials to judge")
        self._out += AUTHENTICATION_SUCCESS if accepted else AUTHENTICATION_FAILURE
        if accepted:
            self._state = Server._probed if self.method is _PROBE else Server._socks5_request
        else:
            self._state = Server._over

    def reply(self, reply: Reply, bound: tuple[str, int] | None = None, *, final: bool = True) -> None:
        """Answer the request, in its version's format. A BIND has two answers if the first is success; only the second
        is `final`.

        `bound` is where the outgoing socket is bound, as getsockname(2) tells; it goes along with success
        only. ValueError when it is not numeric: several clients reject a reply with a name.
        """
        if self._state is not Server._owes_reply:
            raise RuntimeError("there is no request to reply to")
        self._out += failure(self.version, reply) if reply else success(self.version, bound)
        if final:
            self._state = Server._over

    # The states.

    def _version(self) -> Event:
        data = self._buffer
        if data == _JUST_NO_AUTHENTICATION and _NO_AUTHENTICATION in self._methods:
            self.version = _SOCKS5
            self.method = _NO_AUTHENTICATION
            self._out = b"\x05\x00"
            self._buffer = b""
            self._state = Server._socks5_request
            return self._need_data("after its greeting")
        if not data:
            return self._need_data("before it said anything")
        first = data[0]
        if first == 5:
            self.version = _SOCKS5
            self._state = Server._greeting
        elif first == 4:
            self.version = _SOCKS4
            self._state = Server._socks4_request
        elif 0x41 <= first <= 0x5A:  # A to Z: HTTP's methods begin so, and no SOCKS version does
            self._fail(Kind.HTTP, HTTP_ERROR, "spoke HTTP to a SOCKS port")
        elif first == _TLS_HANDSHAKE:
            self._fail(Kind.TLS, b"", "spoke TLS to a SOCKS port")
        else:
            self._fail(Kind.MALFORMED, b"", f"first byte 0x{first:02x} is no version of SOCKS")
        return self._state(self)

    def _greeting(self) -> Event:
        # VER, NMETHODS, METHODS (RFC 1928 section 3)
        data = self._buffer
        if len(data) < 2 or len(data) < (end := 2 + data[1]):
            return self._need_data("inside its greeting")
        offered = data[2:end]
        if offered.startswith(b"\xf5"):  # (first: a client that offers every method is no probe)
            return self._probe(offered, data[end:])
        for method in self._methods:
            if method in offered:
                break
        else:
            message = f"no acceptable authentication method among [{offered.hex(' ')}]"
            self._fail(Kind.NO_METHOD, METHOD_SELECTION[Method.NO_ACCEPTABLE], message)
        self.method = method
        self._buffer = data[end:]
        self._out += METHOD_SELECTION[method]
        if method is not _NO_AUTHENTICATION:
            self._state = Server._credentials
        else:
            unasked = Method.USERNAME_PASSWORD in offered
            self._state = Server._unasked_credentials if unasked else Server._socks5_request
        return self._state(self)

    def _unasked_credentials(self) -> Event:
        # A client that does not wait for the method selection may have sent its credentials, and waits for an answer
        # to them. They are not checked.
        data = self._buffer
        if not data:
            return self._need_data("after its greeting")
        if data[0] == AUTHENTICATION_VERSION:
            end = end_of_credentials(data)
            if end < 0:
                return self._need_data("inside its credentials")
            self._buffer = data[end:]
            self._out += AUTHENTICATION_SUCCESS
        self._state = Server._socks5_request
        return self._state(self)

    def _credentials(self) -> Event:
        # RFC 1929 section 2. It asks for 1 to 255 bytes of each, but clients with an empty user name or password
        # exist, and so do clients that put SOCKS's version in front.
        data = self._buffer
        if data and data[0] not in _AUTHENTICATION_VERSIONS:
            self._fail(Kind.MALFORMED, AUTHENTICATION_FAILURE, f"authentication of version {data[0]}")
        end = end_of_credentials(data)
        if end < 0:
            return self._need_data("inside its credentials")
        middle = 2 + data[1]
        try:
            event = Credentials(data[2:middle].decode(), data[middle + 1 : end].decode())
        except UnicodeDecodeError:
            self._fail(Kind.MALFORMED, AUTHENTICATION_FAILURE, "user name or password is not UTF-8")
        self._buffer = data[end:]
        self._state = Server._owes_verdict
        return event

    def _probe(self, offered: bytes, rest: bytes) -> Event:
        # No later state reads a request: if the probe has sent one, it is for other servers.
        self.method = _PROBE
        self._out += METHOD_SELECTION[_PROBE]
        self._buffer = rest
        self._state = Server._credentials if Method.USERNAME_PASSWORD in offered else Server._probed
        return self._state(self)

    def _probed(self) -> Event:
        self._state = Server._over
        return INQUIRY

    def _socks5_request(self) -> Event:
        # VER, CMD, RSV, ATYP, DST.ADDR, DST.PORT (RFC 1928 section 4). RSV is not looked at.
        data = self._buffer
        size = len(data)
        if size < 5:  # no request is that short, and the fifth byte may be a length
            return self._need_data("inside its request")
        if data[0] != 5:
            self._refuse(Kind.MALFORMED, f"request of version {data[0]} after a SOCKS5 greeting")
        address_type = data[3]
        if address_type == _NAME:
            end = 7 + data[4]
            if size < end:
                return self._need_data("inside its request")
            kind = _NAME
            host = self._name(data[5 : end - 2])
        elif address_type == _IPV4:
            end = 10
            if size < end:
                return self._need_data("inside its request")
            kind = _IPV4
            host = inet_ntoa(data[4:8])
        elif address_type == _IPV6:
            end = 22
            if size < end:
                return self._need_data("inside its request")
            kind = _IPV6
            host = inet_ntop(AF_INET6, data[4:20])
        else:
            message = f"unknown address type {address_type}"
            self._refuse(Kind.BAD_ADDRESS_TYPE, message, Reply.ADDRESS_TYPE_NOT_SUPPORTED)
        command = _COMMANDS.get(data[1])
        if command is None:
            self._refuse(Kind.BAD_COMMAND, f"unknown command {data[1]}", Reply.COMMAND_NOT_SUPPORTED)
        self._buffer = data[end:]
        self._state = Server._owes_reply
        return Request(_SOCKS5, command, kind, host, data[end - 2] << 8 | data[end - 1])

    def _socks4_request(self) -> Event:
        # VN, CD, DSTPORT, DSTIP, USERID, NUL; 4a, marked by DSTIP 0.0.0.x with x not 0, adds: host name, NUL
        data = self._buffer
        if len(data) < 9:
            return self._need_data("inside its request")
        end = self._field_end(8, "USERID")
        if end < 0:
            return self._need_data("inside its USERID")
        if data[1] == _PROBE:
            self.method = _PROBE
            self._out += failure(_SOCKS4, Reply.COMMAND_NOT_SUPPORTED)  # as other servers answer
            return self._probed()
        user_id = data[8:end].decode(errors="replace")
        if data[4:7] == b"\0\0\0" and data[7]:
            start = end + 1
            end = self._field_end(start, "host name")
            if end < 0:
                return self._need_data("inside its host name")
            address_type = _NAME
            host = self._name(data[start:end])
        else:
            address_type = _IPV4
            host = inet_ntoa(data[4:8])
        command = _SOCKS4_COMMANDS.get(data[1])
        if command is None:
            self._refuse(Kind.BAD_COMMAND, f"unknown command {data[1]}", Reply.COMMAND_NOT_SUPPORTED)
        if _NO_AUTHENTICATION not in self._methods:
            self._refuse(Kind.NO_METHOD, "SOCKS4, which can't authenticate")
        self._buffer = data[end + 1 :]
        self._state = Server._owes_reply
        return Request(_SOCKS4, command, address_type, host, data[2] << 8 | data[3], user_id)

    def _owes_verdict(self) -> Event:
        raise RuntimeError("the client waits for answer_credentials()")

    def _owes_reply(self) -> Event:
        raise RuntimeError("the client waits for reply()")

    def _over(self) -> Event:
        raise RuntimeError("the handshake is over")

    def _faulty(self) -> NoReturn:
        # A new exception each time: a kept one would hold its traceback, whose frames refer to this object, a cycle.
        assert self._fault is not None
        raise ClientFault(*self._fault)

    # Shared by the states.

    def _need_data(self, where: str) -> NeedData:
        if self._eof:
            self._fail(Kind.EOF, b"", f"closed {where}")
        return NEED_DATA

    def _fail(self, kind: Kind, reply: bytes, message: str) -> NoReturn:
        # A client that did not wait for the method selection gets that first.
        self._fault = (kind, self._out + reply, message)
        self._state = Server._faulty
        self._buffer = self._out = b""
        self._faulty()

    def _refuse(self, kind: Kind, message: str, reply: Reply = Reply.GENERAL_FAILURE) -> NoReturn:
        self._fail(kind, failure(self.version, reply), message)

    def _name(self, raw: bytes) -> str:
        try:
            return decode_name(raw)
        except ValueError as error:
            self._refuse(Kind.MALFORMED, f"host name {raw!r}: {error}")

    def _field_end(self, start: int, what: str) -> int:
        """Where the NUL is that ends the SOCKS4 field at `start`; -1 when it is still to come."""
        end = self._buffer.find(0, start, start + MAX_FIELD + 1)
        if end < 0 and len(self._buffer) > start + MAX_FIELD:
            self._refuse(Kind.TOO_LONG, f"{what} of more than {MAX_FIELD} bytes")
        return end
