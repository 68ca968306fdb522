"""The reply that a SOCKS client gets for each cause of a failure: the one table."""

from __future__ import annotations

import errno

from usocksd.errors import CommandNotSupported, Denied, DialError, NoEgress, ResolveError
from usocksd.socks import Reply

_BY_ERRNO = {
    errno.ENETUNREACH: Reply.NETWORK_UNREACHABLE,
    errno.ENETDOWN: Reply.NETWORK_UNREACHABLE,
    errno.EHOSTUNREACH: Reply.HOST_UNREACHABLE,
    errno.EHOSTDOWN: Reply.HOST_UNREACHABLE,
    errno.ECONNREFUSED: Reply.CONNECTION_REFUSED,
    errno.ECONNRESET: Reply.CONNECTION_REFUSED,
    errno.ETIMEDOUT: Reply.TTL_EXPIRED,  # the nearest reply of RFC 1928 section 6; also for our own timeout
}


def reply_for(error: BaseException) -> Reply:
    """The reply to a request that ended with `error`; GENERAL_FAILURE if no other fits."""
    match error:
        case DialError():
            return _BY_ERRNO.get(error.errno, Reply.GENERAL_FAILURE)
        case ResolveError():
            return Reply.HOST_UNREACHABLE
        case Denied():
            return Reply.NOT_ALLOWED
        case CommandNotSupported():
            return Reply.COMMAND_NOT_SUPPORTED
        case NoEgress():
            return Reply.NETWORK_UNREACHABLE
        case _:
            return Reply.GENERAL_FAILURE
