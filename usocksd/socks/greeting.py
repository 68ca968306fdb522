"""What every SOCKS5 client begins with: it offers methods to authenticate, and tells credentials if they are wanted.

_method ──00──────────────────────────────> _authenticated (of the subclass)
    └─────02──> _authentication_status ──────┘
"""

from __future__ import annotations

from typing import ClassVar, NoReturn

from usocksd.socks.errors import AuthenticationFailed, Kind, UpstreamFault
from usocksd.socks.role import ClientRole, Event
from usocksd.socks.wire import AUTHENTICATION_SUCCESS, AUTHENTICATION_VERSION, Method, encode_field

_VERSION = 5


class Greeting(ClientRole):
    """Up to the request; what comes then is the subclass's. Its own `__init__` calls `_greet`."""

    __slots__ = ("_credentials", "_offered", "_pipelined", "_request", "method")

    PEER: ClassVar[str] = "server"

    method: Method | None
    """What the server has chosen."""

    def _greet(self, offered: bytes, credentials: bytes, request: bytes, *, pipelined: bool) -> None:
        """Offer these methods. `credentials` are for the server that wants them, b"" if there are none.

        `pipelined`: all that is to be said is said at once, the request included; then the offer must leave no doubt
        whether credentials are wanted.
        """
        self.method = None
        self._offered = offered
        self._credentials = credentials
        self._request = request
        self._pipelined = pipelined
        greeting = bytes((_VERSION, len(offered))) + offered
        super().__init__(greeting + credentials + request if pipelined else greeting, Greeting._method)

    # The states.

    def _method(self) -> Event:
        # VER, METHOD (RFC 1928 section 3)
        data = self._buffer
        self._check_version(data, _VERSION)
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

    # What the states share.

    def _check_version(self, data: bytearray, version: int) -> None:
        if data and data[0] != version:
            self._malformed(f"the server answers with {bytes(data[:8])!r}, which is not SOCKS")

    def _malformed(self, message: str) -> NoReturn:
        self._fail(lambda: UpstreamFault(Kind.MALFORMED, message))


def authentication(username: str, password: str) -> bytes:
    """VER, ULEN, UNAME, PLEN, PASSWD (RFC 1929 section 2). ValueError for more than 255 bytes of either."""
    user, secret = encode_field(username, "user name"), encode_field(password, "password")
    return bytes((AUTHENTICATION_VERSION, len(user))) + user + bytes((len(secret),)) + secret
