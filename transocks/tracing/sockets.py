"""Opens sockets as other processes of this host would have them: with their user, group, cgroup and mark."""

from __future__ import annotations

import contextlib
import ctypes
import os
import socket

from transocks.rules.loops import Sender
from transocks.rules.redirection import CGROUPS
from transocks.tools import FirewallError

FAMILIES = {4: socket.AF_INET, 6: socket.AF_INET6}
NOBODY = Sender(uid=65534, gid=65534)
"""An application that no rule names."""


def socket_of(who: Sender, version: int, kind: int = socket.SOCK_STREAM, protocol: int = 0) -> socket.socket:
    """A socket that rules take for the sender's, as far as this user is allowed to imitate it. Unknown properties are
    those of this process. Raises OSError, and FirewallError when there is no such cgroup.
    """
    make = _in_cgroup if who.cgroup is not None else _as_user
    sock = make(who, FAMILIES[version], kind, protocol)
    for mark in who.marks or ():
        with contextlib.suppress(OSError):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, mark)
    return sock


def _as_user(who: Sender, family: int, kind: int, protocol: int) -> socket.socket:
    """Rules and routing policy take a socket for that of the file system uid and gid that made it (setfsuid(2)), which
    leaves us the capability for raw sockets. In a user namespace there may be no such user; then it is ours.
    """
    libc, uid, gid = ctypes.CDLL(None), os.geteuid(), os.getegid()
    try:
        libc.setfsgid(gid if who.gid is None else who.gid)
        libc.setfsuid(uid if who.uid is None else who.uid)
        return socket.socket(family, kind, protocol)
    finally:
        libc.setfsuid(uid)
        libc.setfsgid(gid)


def _in_cgroup(who: Sender, family: int, kind: int, protocol: int) -> socket.socket:
    """A socket belongs to the cgroup of the process that made it: a child goes there, and hands it over."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        child = os.fork()
        if child == 0:
            with contextlib.suppress(BaseException):
                with open(f"{CGROUPS}/{who.cgroup}/cgroup.procs", "w", encoding="ascii") as file:
                    file.write("0")
                socket.send_fds(theirs, [b"."], [_as_user(who, family, kind, protocol).detach()])
            os._exit(0)
        os.waitpid(child, 0)
        theirs.close()
        _, found, _, _ = socket.recv_fds(ours, 1, 1)
    if not found:
        raise FirewallError(f"no process can be put into the cgroup {who.cgroup}")
    return socket.socket(fileno=found[0])
