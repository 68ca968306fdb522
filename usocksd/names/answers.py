"""Entries of the cache: the answers of servers or of the system, and how long they are valid."""

from __future__ import annotations

import socket
from collections.abc import Iterable, Sequence
from itertools import zip_longest

from attrs import frozen

from usocksd.errors import NO_ADDRESS, NO_SUCH_NAME, ResolveError
from usocksd.names.name_query import SERVERS_FAILED, TIMED_OUT, NameAnswer
from usocksd.net.address import IPAddress, numeric_address

# Seconds. Limits of a TTL: 0 would mean a query for each connection of a page, and days would outlive every change.
_SHORTEST_TTL, _LONGEST_TTL = 5.0, 3600.0
_LONGEST_NEGATIVE_TTL = 300.0
_FAILURE_TTL = 1.0  # RFC 9520 section 3.2: failures are to be cached, for a second at least
_PARTIAL_TTL = 10.0  # one family answered, the other did not
_SYSTEM_TTL = 5.0  # getaddrinfo(3) tells no TTL

# getaddrinfo(3). Any other error, EAI_AGAIN above all, is a time-out or SERVFAIL: it does not tell which.
_GAI_CAUSES = {
    socket.EAI_NONAME: NO_SUCH_NAME,
    socket.EAI_NODATA: NO_ADDRESS,
    socket.EAI_ADDRFAMILY: NO_ADDRESS,
}


@frozen
class Entry:
    """Addresses of a name, or why there are none. `ttl` from now, or the time when it ends.

    A `ttl` of 0: the answer does not say how long it is valid.
    """

    addresses: tuple[IPAddress, ...]
    cause: str = ""
    ttl: float = 0.0
    expires: float = 0.0


UNANSWERED = Entry((), TIMED_OUT)
SILENCE = Entry((), TIMED_OUT, _FAILURE_TTL)
FAILURE = Entry((), SERVERS_FAILED, _FAILURE_TTL)
STOPPED = Entry((), "resolver stopped")
LOCALHOST = (numeric_address("::1"), numeric_address("127.0.0.1"))


def of_family(found: NameAnswer | ResolveError) -> Entry:
    """The servers' answer for one family."""
    if isinstance(found, ResolveError):
        return Entry((), found.cause)
    if found.addresses:
        return Entry(tuple(map(numeric_address, found.addresses)), "", _clamp(found.ttl or 0.0, _LONGEST_TTL))
    ttl = 0.0 if found.ttl is None else _clamp(found.ttl, _LONGEST_NEGATIVE_TTL)
    return Entry((), NO_ADDRESS if found.exists else NO_SUCH_NAME, ttl)


def combine(answers: Sequence[Entry], most: int) -> Entry:
    """One entry from those of both families, with at most this many addresses; a failed family makes it short-lived."""
    failures = [answer.cause for answer in answers if answer.cause in {TIMED_OUT, SERVERS_FAILED}]
    ttl = min((answer.ttl for answer in answers if answer.ttl), default=0.0)
    addresses = in_turn(address for answer in answers for address in answer.addresses)[:most]
    if addresses:
        # The absence of the other family is kept as long as these addresses, even without a SOA.
        longest = _PARTIAL_TTL if failures else _LONGEST_TTL if all(a.ttl for a in answers) else _LONGEST_NEGATIVE_TTL
        return Entry(addresses, "", min(ttl, longest))
    if failures:
        return SILENCE if TIMED_OUT in failures else FAILURE
    nothing = all(answer.cause == NO_SUCH_NAME for answer in answers)
    # Without a SOA an absence must not be cached (RFC 2308 section 5), or only briefly.
    return Entry((), NO_SUCH_NAME if nothing else NO_ADDRESS, ttl or _SHORTEST_TTL)


def of_system(host: str) -> Entry:
    """The answer of getaddrinfo(3). Blocks for as long as the system's configuration allows."""
    try:
        # As bytes: Python would put a str through a codec of its own.
        found = socket.getaddrinfo(host.encode("ascii"), None, type=socket.SOCK_STREAM)
    except socket.gaierror as error:
        cause = _GAI_CAUSES.get(error.errno or 0, SERVERS_FAILED)
        return Entry((), cause, _SYSTEM_TTL if cause in (NO_SUCH_NAME, NO_ADDRESS) else _FAILURE_TTL)
    return Entry(in_turn(numeric_address(str(sockaddr[0])) for *_, sockaddr in found), "", _SYSTEM_TTL)


def in_turn(addresses: Iterable[IPAddress]) -> tuple[IPAddress, ...]:
    """RFC 8305 section 4: the families in turn, IPv6 first, each in the order given."""
    families: dict[int, list[IPAddress]] = {6: [], 4: []}
    for address in dict.fromkeys(addresses):
        families[address.version].append(address)
    pairs = zip_longest(families[6], families[4])
    return tuple(address for pair in pairs for address in pair if address is not None)


def kept_for(found: NameAnswer) -> float:
    """For how many seconds records other than addresses are valid."""
    return _clamp(found.ttl or 0.0, _LONGEST_TTL)


def _clamp(ttl: float, longest: float) -> float:
    return min(max(ttl, _SHORTEST_TTL), longest)
