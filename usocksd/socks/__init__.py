"""The SOCKS protocol, both roles, without I/O: bytes in, events and bytes out. Standard library only.

SOCKS4, SOCKS4a (the memos of Ying-Da Lee) and SOCKS5 (RFC 1928) with username/password (RFC 1929).

`Server` is the server's role; `SocksConnect` and `Probe`, which only asks who is there, are the client's. All three are
driven alike; the owner of the socket writes the loop:

    peer.receive_data(received)        # b"" says that the peer has closed
    event = peer.next_event()          # NEED_DATA: send what there is to send, then receive more
    send(peer.data_to_send())
    peer.trailing_data                 # once the handshake is over: payload that came along with it

What the peer does wrong raises `ClientFault` (in the server role) or one of `UpstreamFault`, `RequestRefused`
and `AuthenticationFailed` (in the client role). Calling a machine out of turn is a bug of ours and a
RuntimeError.
"""

from usocksd.socks.client import SocksConnect
from usocksd.socks.errors import AuthenticationFailed, ClientFault, Kind, RequestRefused, UpstreamFault
from usocksd.socks.events import INQUIRY, NEED_DATA, Credentials, Established, Inquiry, NeedData, Probed, Request
from usocksd.socks.probe import Probe
from usocksd.socks.role import ClientRole
from usocksd.socks.server import Server
from usocksd.socks.wire import SOCKS4_PROBE, AddressType, Command, Method, Reply, Socks4Reply, Version

__all__ = [
    "INQUIRY",
    "NEED_DATA",
    "SOCKS4_PROBE",
    "AddressType",
    "AuthenticationFailed",
    "ClientFault",
    "ClientRole",
    "Command",
    "Credentials",
    "Established",
    "Inquiry",
    "Kind",
    "Method",
    "NeedData",
    "Probe",
    "Probed",
    "Reply",
    "Request",
    "RequestRefused",
    "Server",
    "Socks4Reply",
    "SocksConnect",
    "UpstreamFault",
    "Version",
]
