"""Sockets as others on this host would have them: what rules tell a process's connections by."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator

import attrs

from transocks.rules.redirection import CGROUPS
from transocks.tools import FirewallError


@attrs.frozen(kw_only=True)
class Identity:
    """What firewall rules can tell a process's connections by; None: not known, and then as this process has it."""

    uid: int | None = None
    gid: int | None = None
    mark: int = 0
    cgroup: str | None = None
    """below the root of cgroup v2"""


NOBODY = Identity(uid=65534, gid=65534)
"""An application of whom the rules have not heard."""


def socket_of(who: Identity, family: int, kind: int = socket.SOCK_STREAM, protocol: int = 0) -> socket.socket:
    """A socket that the rules see as one of theirs, as far as this user may make it so. Raises OSError, and
    FirewallError when there is no such cgroup.
    """
    if who.cgroup is not None:
        sock = _in_cgroup(who, family, kind)
    else:
        with _as_user(who):
            sock = socket.socket(family, kind, protocol)
    if who.mark:
        with contextlib.suppress(OSError):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, who.mark)
    return sock


@contextlib.contextmanager
def _as_user(who: Identity) -> Iterator[None]:
    """A socket belongs to whoever made it: to this user, if we are root."""
    if os.geteuid() != 0 or not who.uid:
        yield
        return
    group = os.getegid()
    try:
        with contextlib.suppress(OSError):  # in a user namespace there may be no other
            if who.gid is not None:
                os.setegid(who.gid)
            os.seteuid(who.uid)
        yield
    finally:
        os.seteuid(0)
        os.setegid(group)


def _in_cgroup(who: Identity, family: int, kind: int) -> socket.socket:
    """A socket belongs to the cgroup of the process that made it: a child goes there, and hands it over."""
    procs = f"{CGROUPS}/{who.cgroup}/cgroup.procs"
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        child = os.fork()
        if child == 0:
            with contextlib.suppress(BaseException):
                with open(procs, "w", encoding="ascii") as file:
                    file.write("0")
                with _as_user(who):
                    socket.send_fds(theirs, [b"."], [socket.socket(family, kind).detach()])
            os._exit(0)
        os.waitpid(child, 0)
        theirs.close()
        _, found, _, _ = socket.recv_fds(ours, 1, 1)
    if not found:
        raise FirewallError(f"no process can be put into the cgroup {who.cgroup}")
    return socket.socket(fileno=found[0])
