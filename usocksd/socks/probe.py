"""The probe of a SOCKS5 server: whether it answers, admits us, is a usocksd, and accepts pipelining. Requests nothing.

_method, _authentication_status (client.py) ──Probed──> _over
                                            ──Probed──> _reply ──Probed──> _over    (pipelined, not ours)
"""

from __future__ import annotations

from usocksd.socks.client import Greeting, authentication
from usocksd.socks.events import Probed
from usocksd.socks.role import Event
from usocksd.socks.wire import AddressType, Command, Method

# CONNECT to 0.0.0.0 port 0, where nobody can listen. It is well-formed: dante and pproxy close at an unassigned
# command, so it would not show whether they had read it.
_NOWHERE = bytes((5, Command.CONNECT, 0, AddressType.IPV4, 0, 0, 0, 0, 0, 0))


class Probe(Greeting):
    """The client's side of a handshake that leads to no connection: `next_event` gives Probed.

    It raises what SocksConnect's does. Credentials are sent to servers that want them and to every usocksd; wrong ones
    raise AuthenticationFailed. (Without any, a usocksd does not say whether it wants some.)

    `pipelined` finds out whether other servers take pipelining: a request that can't be granted goes along with the
    greeting (and the credentials) in one segment. The first Probed, with `pipelines` None, says that the server lets us
    in. Call `next_event` again: if the server accepts such a segment, it answers the request too, and the second Probed
    has True; if it closes instead, False. A server that drops unexpected bytes stays silent, so wait only briefly, and
    treat None as False. Like a pipelined SocksConnect it leaves no choice: a server that wants no credentials may
    refuse them. Without `pipelined`, and with a usocksd, the first Probed is the last.

    ValueError for a user name or password of more than 255 bytes.
    """

    __slots__ = ()

    def __init__(self, username: str | None = None, password: str | None = None, *, pipelined: bool = False) -> None:
        offered = bytes((Method.PROBE,))
        if username is None or not pipelined:
            offered += bytes((Method.NO_AUTHENTICATION,))
        credentials = b""
        if username is not None:
            offered += bytes((Method.USERNAME_PASSWORD,))
            credentials = authentication(username, password or "")
        self._greet(offered, credentials, _NOWHERE, pipelined=pipelined)

    # The states.

    def _authenticated(self) -> Event:
        ours = self.method is Method.PROBE
        self._state = Probe._reply if self._pipelined and not ours else Probe._over
        return Probed(ours, True if ours else None)

    def _reply(self) -> Event:
        # The first byte, VER, is enough: the rest of the reply does not matter.
        if not self._buffer and not self._eof:
            return self._need_data()
        self._state = Probe._over
        return Probed(ours=False, pipelines=self._buffer.startswith(b"\x05"))
