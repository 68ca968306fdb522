"""The process that holds the rules of `transocks exec`: it removes them when it is told to, or when exec was killed."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
from collections.abc import Iterator

import attrs

from transocks.commands.exec import cgroups
from transocks.rules import live, routing
from transocks.rules.change import remove_chains
from transocks.rules.config import Tool
from transocks.rules.loaded import parse_save
from transocks.rules.redirection import Redirection
from transocks.rules.render import render_iptables, render_nft
from transocks.tools import FirewallError, complaint, run

_LOADED = b"loaded"


@attrs.frozen
class TemporaryRules:
    """Rules for one command, and what is removed together with them."""

    tool: Tool
    redirections: tuple[Redirection, ...]
    """If one takes UDP, its tproxy_mark is used by nothing else."""
    folder: str
    """deleted with the rules"""
    cgroup: str
    """the folder of the cgroup whose processes are killed first; "": none"""

    @contextlib.contextmanager
    def hold(self) -> Iterator[None]:
        """Load the rules until the end of the block, or of this process. Raises FirewallError.

        A child both loads and removes them, so they stay in order even if this process is killed in the middle.
        """
        ours, theirs = socket.socketpair()
        pid = os.fork()
        if pid == 0:
            ours.close()
            try:
                self._hold(theirs)
                os._exit(0)
            finally:
                os._exit(1)
        theirs.close()
        try:
            answer = b"".join(iter(lambda: ours.recv(4096), b""))
            if answer != _LOADED:
                raise FirewallError(answer.decode(errors="replace") or "the process that holds the rules ended")
            yield
        finally:
            ours.close()
            if os.waitpid(pid, 0)[1] != 0:  # the child was killed, so clean up here
                self._end()

    def _hold(self, parent: socket.socket) -> None:
        os.setsid()  # the terminal's signals are for the command
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGPIPE):
            signal.signal(number, signal.SIG_IGN)  # end only when the parent ends, so that nothing is left behind
        null = os.open(os.devnull, os.O_RDWR)
        os.dup2(null, 0)
        os.dup2(null, 1)
        answer = _LOADED
        try:
            self._load()
        except FirewallError as error:
            answer = str(error).encode(errors="surrogateescape")
        with contextlib.suppress(OSError):
            parent.sendall(answer)
            parent.shutdown(socket.SHUT_WR)
            parent.recv(1)
        self._end()

    def _load(self) -> None:
        routing.add(self.redirections)
        for redirection in self.redirections:
            if self.tool is Tool.NFT:
                run("nft", "-f", "-", stdin=render_nft(redirection))
                continue
            for version in live.versions():
                text = render_iptables(redirection, version=version)
                run(f"{live.iptables(version)}-restore", "--noflush", stdin=text)

    def _end(self) -> None:
        if self.cgroup:
            cgroups.end(self.cgroup)  # first, since without the rules these would connect directly
        for redirection in self.redirections:
            if self.tool is Tool.NFT:
                complaint("nft", "delete", "table", "inet", redirection.table)
                continue
            for version in live.versions():
                tables = parse_save(render_iptables(redirection, version=version), redirection.chains)
                remove_chains(live.iptables(version), tables, redirection.chains)
        for each in routing.needed(self.redirections):
            for kind in ("rule", "route"):
                complaint(*each.command(kind, "del"))
        shutil.rmtree(self.folder, ignore_errors=True)
