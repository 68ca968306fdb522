"""The SOCKS reply for each cause of a failure (RFC 1928 section 6)."""

from __future__ import annotations

import errno

import pytest

from usocksd.errors import ConfigError, Denied, DialError, Error, NoEgress, ResolveError
from usocksd.replies import reply_for


@pytest.mark.parametrize(
    ("cause", "reply"),
    [
        (errno.ENETUNREACH, 3),
        (errno.ENETDOWN, 3),
        (errno.EHOSTUNREACH, 4),
        (errno.EHOSTDOWN, 4),
        (errno.ECONNREFUSED, 5),
        (errno.ECONNRESET, 5),
        (errno.ETIMEDOUT, 6),  # our own timeout too
        (errno.EADDRNOTAVAIL, 1),
        (errno.EMFILE, 1),
        (errno.EACCES, 1),
        (ResolveError("example.com", "no such name"), 4),
        (Denied("deny_ports 25"), 2),
        (NoEgress("no usable address"), 3),
        (Error("something"), 1),
        (ConfigError("file", []), 1),
        (ValueError("a bug"), 1),
    ],
)
def test_replies(cause: int | BaseException, reply: int) -> None:
    assert reply_for(DialError(cause, "192.0.2.1") if isinstance(cause, int) else cause) == reply
