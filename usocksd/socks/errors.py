"""The errors of a handshake, by the side at fault.

The server role raises

- ClientFault: the client broke the protocol; it carries the reply that this deserves.

The client role raises, all below UpstreamError,

- UpstreamFault: the proxy broke the protocol;
- RequestRefused: the proxy answered, and the answer is no;
- AuthenticationFailed: the proxy wants other credentials, or another way to give them.
"""

from __future__ import annotations

from enum import Enum

from usocksd.errors import ProtocolError, UpstreamError


class Kind(Enum):
    """How a peer broke the protocol; the value is for log records."""

    EOF = "closed early"
    HTTP = "HTTP"
    TLS = "TLS"
    MALFORMED = "malformed"
    TOO_LONG = "too long"
    NO_METHOD = "no acceptable method"
    BAD_COMMAND = "unknown command"
    BAD_ADDRESS_TYPE = "unknown address type"


class ClientFault(ProtocolError):
    """The client broke the protocol. Send `reply` (complete, maybe empty), then close."""

    def __init__(self, kind: Kind, reply: bytes, message: str) -> None:
        super().__init__(message)
        self.kind = kind
        self.reply = reply


class UpstreamFault(ProtocolError, UpstreamError):
    """The proxy broke the protocol. Send nothing, just close."""

    def __init__(self, kind: Kind, message: str) -> None:
        super().__init__(message)
        self.kind = kind


class RequestRefused(UpstreamError):
    """The proxy answered, and the answer is no. `reply` is its number.

    A Reply, a Socks4Reply, an HTTP status, or a plain int if the code is unassigned.
    """

    def __init__(self, reply: int, message: str) -> None:
        super().__init__(message)
        self.reply = reply


class AuthenticationFailed(UpstreamError):
    """The proxy refused our credentials, or wants a way to authenticate that we were not given."""
