"""The process's share of file descriptors, and how many connections fit into it."""

from __future__ import annotations

import os
import resource
from pathlib import Path

# Kept back for what is not a connection: log file, epoll, resolver sockets, name and state files.
_RESERVE = 48
# A connection has two sockets.
_PER_CONNECTION = 2
# One descriptor of so many is for pipes, which bulk streams borrow; one that finds none left does without.
_FOR_PIPES = 16


def raise_descriptor_limit() -> int:
    """Raise the soft limit of open files to the hard one, as getrlimit(2) allows anybody. Returns what it is now.

    The hard limit may be infinite on paper; the kernel's own is fs.nr_open.
    """
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard == resource.RLIM_INFINITY:
        hard = int(Path("/proc/sys/fs/nr_open").read_text())
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return hard


def most_connections(descriptors: int) -> int:
    """How many connections `descriptors` open files allow, at least one.

    What this process had open when it started (sockets that it inherited, say) is gone from them already.
    """
    open_now = len(os.listdir("/proc/self/fd"))
    return max((descriptors - open_now - _RESERVE - 2 * most_pipes(descriptors)) // _PER_CONNECTION, 1)


def most_pipes(descriptors: int) -> int:
    """How many pipes, of two descriptors each, the share of `descriptors` that is theirs allows."""
    return descriptors // _FOR_PIPES // 2
