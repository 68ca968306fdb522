"""From cause to SOCKS reply. The table is that of the wire notes ("errno map")."""

from __future__ import annotations

import errno

import pytest

from usocksd.errors import ConfigError, Denied, DialError, Error, ResolveError
from usocksd.replies import reply_for


@pytest.mark.parametrize(
    ("code", "reply"),
    [
        (errno.ENETUNREACH, 3),
        (errno.ENETDOWN, 3),
        (errno.EHOSTUNREACH, 4),
        (errno.EHOSTDOWN, 4),
        (errno.ECONNREFUSED, 5),
        (errno.ECONNRESET, 5),
        (errno.ETIMEDOUT, 6),
        (errno.EADDRNOTAVAIL, 1),
        (errno.EMFILE, 1),
        (errno.EACCES, 1),
        (0, 1),
    ],
)
def test_dial_errors(code: int, reply: int) -> None:
    """errno map: 03 net, 04 host, 05 refused or reset, 06 timeout (our connect timeout too); else 01."""
    assert reply_for(DialError(code, "192.0.2.1 port 80")) == reply


@pytest.mark.parametrize(
    ("error", "reply"),
    [
        (ResolveError("example.com", "no such name"), 4),
        (Denied("deny_ports 25"), 2),
        (Error("something"), 1),
        (ConfigError("file", []), 1),
        (ValueError("a bug"), 1),
        (KeyboardInterrupt(), 1),
    ],
)
def test_other_causes(error: BaseException, reply: int) -> None:
    """Name does not resolve 04. Denied: 02. Else 01."""
    assert reply_for(error) == reply
