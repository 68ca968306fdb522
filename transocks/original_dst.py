"""The original destination of a redirected connection, and the guard against loops."""

from __future__ import annotations

import errno
import logging
import pwd
import socket
import struct
import sys
from collections.abc import Callable, Collection, Iterable
from socket import SocketType

from usocksd.errors import Error
from usocksd.host.addresses import HostAddresses
from usocksd.host.sockets import SocketOwners
from usocksd.net.address import HostPort, bound_to, numeric_address, unmapped, with_zone

log = logging.getLogger(__name__)

# linux/netfilter_ipv4.h and linux/netfilter_ipv6/ip6_tables.h: both numbers are 80.
_SO_ORIGINAL_DST = 80
_NO_SCOPE = bytes(4)
_SOCKADDR_IN = struct.Struct("!2xH4s8x")
_SOCKADDR_IN6 = struct.Struct("!2xH4x16s4s")  # (the scope, alone, is in the order of this machine)

# The daemons' own accounts, so connections of these users are the daemons'.
OWN_USERS = ("transocks", "usocksd")


class NotRedirected(Error):
    """The kernel knows no other destination: the connection was made to the listener itself."""


class Loop(Error):
    """Carrying this connection would bring it back to us."""


def original_destination(sock: SocketType) -> HostPort:
    """Where the client was connecting to before REDIRECT or DNAT changed it: SO_ORIGINAL_DST.

    The family of the *connection* decides which option is read: an IPv4 client on a dual-stack socket has an IPv4 entry
    in connection tracking. Raises NotRedirected.
    """
    local = sock.getsockname()
    host = unmapped(local[0])
    try:
        if ":" in host:
            port, raw, scope = _SOCKADDR_IN6.unpack(sock.getsockopt(socket.IPPROTO_IPV6, _SO_ORIGINAL_DST, 28))
            original = HostPort(socket.inet_ntop(socket.AF_INET6, raw), port)
        else:
            port, raw = _SOCKADDR_IN.unpack(sock.getsockopt(socket.IPPROTO_IP, _SO_ORIGINAL_DST, 16))
            original = HostPort(socket.inet_ntoa(raw), port)
    except OSError as error:
        # ENOENT: no entry (the table was flushed or is full); ENOPROTOOPT: no connection tracking at all.
        name = errno.errorcode.get(error.errno or 0, str(error.errno))
        raise NotRedirected(f"no original destination is known for it ({name})") from None
    if original == (host, local[1]):
        raise NotRedirected("it was made to this port itself, no rule redirected it")
    if ":" in host and scope != _NO_SCOPE:
        original = original._replace(host=with_zone(original.host, int.from_bytes(scope, sys.byteorder)))
    return original


def tproxy_destination(sock: SocketType, is_ours: Callable[[HostPort], bool]) -> HostPort:
    """Where the client of a connection from a TPROXY listener was connecting to: our own end of the connection.

    Nothing was translated, so connection tracking has no answer (its entry may be of another connection). `is_ours`
    knows the ports that we listen on: a connection to one of them was not redirected. Raises NotRedirected.
    """
    bound = bound_to(sock)
    destination = HostPort(unmapped(bound.host), bound.port)
    if is_ours(destination):
        raise NotRedirected("it was made to this port itself, no TPROXY rule brought it")
    return destination


class LoopGuard:
    """Refuses connections that would go in a circle: without a rule that exempts the proxies' own traffic, a single
    connection loops until no descriptors are left.
    """

    def __init__(
        self,
        *,
        listen_ports: Collection[int],
        hosts: HostAddresses,
        upstreams: Callable[[], Collection[HostPort]],
        most_per_destination: int,
        own_users: Iterable[str] = OWN_USERS,
        udp: bool = False,
    ) -> None:
        """`upstreams` gives the addresses of the upstream proxies as they are known now, without zones.
        `most_per_destination`: how many connections to one destination may be open, as a last resort. `udp`: it is
        about datagrams, for which there is `check` only.
        """
        self._listen_ports = frozenset(listen_ports)
        self._hosts = hosts
        self._upstreams = upstreams
        self._most = most_per_destination
        self._open: dict[HostPort, int] = {}
        self._own = _uids(own_users)
        self._owners = _socket_owners(udp=udp) if self._own else None

    def is_ours(self, destination: HostPort) -> bool:
        """Whether it is a port that we listen on, at an address of this host."""
        return destination.port in self._listen_ports and self._hosts.is_local(numeric_address(destination.host))

    def enter(self, client: HostPort, original: HostPort) -> None:
        """A connection from `client` to `original` begins, until `leave`. Raises Loop if it would come back here."""
        self.check(client, original)
        count = self._open.get(original, 0)
        if count >= self._most:
            # A loop that no check above recognises, for example because the upstream runs as root on this host.
            raise Loop(
                f"{count} connections to it are open, as in a circle: exempt the proxies from the redirect rules"
            )
        self._open[original] = count + 1

    def leave(self, original: HostPort) -> None:
        """A connection that has entered is over."""
        count = self._open[original] - 1
        if count:
            self._open[original] = count
        else:
            del self._open[original]

    def check(self, client: HostPort, original: HostPort) -> None:
        """Raise Loop if what comes from `client` for `original` would come back here."""
        if self.is_ours(original):
            raise Loop("its destination is this proxy's own port")
        upstreams = self._upstreams()
        zoned = "%" in original.host
        if ((original.host.partition("%")[0], original.port) if zoned else original) in upstreams:
            raise Loop("its destination is the upstream: exempt the upstream from the redirect rules")
        ours = self._hosts.is_local(numeric_address(client.host))
        if not ours and any(client.host == upstream.host for upstream in upstreams):
            raise Loop("the upstream's host made it: exempt that host from the redirect rules")
        if ours and self._owners is not None:
            uid = self._owners.owner_uid(client, original)
            name = self._own.get(uid) if uid is not None else None
            if name is not None:
                raise Loop(f"user {name} made it: exempt this user from the redirect rules")

    def close(self) -> None:
        """Give back the netlink socket."""
        if self._owners is not None:
            self._owners.close()


def _socket_owners(*, udp: bool) -> SocketOwners | None:
    try:
        return SocketOwners(udp=udp)
    except OSError as error:
        # A sandbox that forbids netlink: the other checks remain.
        fields = {"error": str(error)}
        log.warning("can't recognise connections of our own users", extra={"fields": fields})
        return None


def _uids(names: Iterable[str]) -> dict[int, str]:
    uids = {}
    for name in names:
        try:
            uids[pwd.getpwnam(name).pw_uid] = name
        except KeyError:
            continue
    return uids
