"""transocks exec -- COMMAND: one command's TCP connections through both daemons, or with --via through another proxy,
with --udp also its UDP; afterwards everything is removed.

    rules for a cgroup and a group id of its own -> daemons on free loopback ports -> the command in both -> all removed

The command keeps its user (the one who called sudo), groups and terminal. Rules recognise it, and everything that it
starts, by its cgroup (cgroups.py); if they can match no cgroup here, by its effective group alone, which no other
process has.

This ends when the last process that the command left behind has ended. If it is killed, the kernel kills the command
and the daemons too; the process that holds the rules (holder.py) ends the rest of the cgroup before it removes
them.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import pwd
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from itertools import chain

import attrs

from transocks.commands.exec.cgroups import Cgroup, make, members_of
from transocks.commands.exec.daemons import ExecError, free_port, running
from transocks.commands.exec.holder import TemporaryRules
from transocks.commands.exec.terminal import Signals
from transocks.config import TransocksConfig
from transocks.flags import one_or_list
from transocks.rules.config import Mode, Tool
from transocks.rules.live import choose_tool, routed_versions
from transocks.rules.redirection import Redirection
from transocks.tools import FirewallError, die_with_parent, lacking
from usocksd.errors import ConfigError, Error
from usocksd.serve.verbs.client import visible
from usocksd.settings.loader import parse

FAILED, NOT_EXECUTABLE, NOT_FOUND = 125, 126, 127  # as env(1) and others that run a command
SAY_AFTER, LOOK_EVERY = 1.0, 0.1  # seconds, while processes are left behind
# By convention nobody uses group ids in this range. A process id (at most 22 bits, proc(5), pid_max) makes each unique.
FIRST_GID = 0x74000000


@attrs.frozen
class Caller:
    """The user of the command."""

    uid: int
    groups: tuple[int, ...]
    environment: dict[str, str]


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add this verb to the command line."""
    parser = subparsers.add_parser(
        "exec",
        help="run a command with its TCP connections, and only its, redirected through both daemons",
        description="Run COMMAND with its TCP connections, and no others, redirected through transocks and usocksd,"
        " which are started for it; with --via, through transocks and that proxy. Private networks and DNS are left"
        " alone, and QUIC (UDP 443) is refused. Needs root; under sudo, COMMAND runs as the user who called. Ends when"
        " COMMAND and all processes that it started have ended. Files that COMMAND creates show a group id without a"
        " name. Exit status: that of COMMAND; 128 + N if signal N ended it; 125 if it was not run; 126 if it can't be"
        " executed; 127 if it was not found.",
    )
    parser.add_argument(
        "--udp",
        action="store_true",
        help="take its UDP too, DNS and QUIC included: by TPROXY, with a routing rule and table for the time",
    )
    parser.add_argument(
        "--via",
        metavar="URL",
        action="append",
        help="through this proxy, not through a usocksd of its own; again for one to replace it",
    )
    parser.add_argument("command", nargs=argparse.REMAINDER, metavar="-- COMMAND ...", help="the command line to run")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run the verb; returns the exit status."""
    command = args.command[1:] if args.command[:1] == ["--"] else args.command
    try:
        if not command:
            raise ExecError("no command given: transocks exec -- COMMAND ...")
        return _exec(command, udp=args.udp, via=_checked(args.via or []))
    except FileNotFoundError:
        return _complain(f"{command[0]}: command not found", NOT_FOUND)
    except OSError as error:
        return _complain(f"{command[0]}: {error.strerror}", NOT_EXECUTABLE)
    except Error as error:
        return _complain(str(error), FAILED)


def _complain(text: str, status: int) -> int:
    _say(text)
    return status


def _checked(via: Sequence[str]) -> str:
    """The setting for these proxies; "" for none. Raises ExecError."""
    text = f"proxy_url = {json.dumps(one_or_list(via))}\n" if via else ""
    try:
        if via:
            parse(TransocksConfig, text, "")
    except ConfigError as error:
        raise ExecError("\n".join(f"--via: {fault.value or fault.expected}" for fault in error.faults)) from None
    return text


def _exec(command: Sequence[str], *, udp: bool, via: str) -> int:
    if os.geteuid() != 0 or lacking("CAP_NET_ADMIN"):
        raise ExecError(
            "redirecting needs root, with CAP_NET_ADMIN: sudo transocks exec -- COMMAND ... (in a checkout, ./run shows"
            " it without, in a user namespace)"
        )
    tool = choose_tool()
    if tool is None:
        raise ExecError("neither nft nor iptables is installed")
    user = _calling_user()
    gid = FIRST_GID + os.getpid()
    if not _allowed_gid(gid):
        raise ExecError("this user namespace has not enough group ids to tell the command's connections from others")
    ipv6 = 6 in routed_versions()
    with Signals() as signals, contextlib.ExitStack() as stack:
        usocksd_port, port = free_port(ipv6), free_port(ipv6)
        try:
            folder, cgroup = _redirect(tool, gid, port, stack, udp=udp)
        except FirewallError as error:
            raise ExecError(f"the rules could not be loaded: {error}") from None
        if cgroup is None:
            _say("warning: there is no cgroup here that the rules can match; processes that change their group (su,"
                 " sudo, setpriv) connect directly")  # fmt: skip
        local = ["127.0.0.1", "[::1]"] if ipv6 else ["127.0.0.1"]
        listen = ", ".join(f'"{address}:{port}"' for address in local)
        # Both daemons serve one command, and nobody reads their metrics.
        alone = 'workers = 1\ncontrol = ""\ntimeouts.stop = 0\n'
        proxy = via or f'proxy_url = "socks5://127.0.0.1:{usocksd_port}"\n'
        transocks = f"{alone}metrics_port = 0\n{proxy}listen = [{listen}]\n"
        transocks += f"listen_udp = [{listen}]\n" if udp else ""
        configurations = {"transocks": transocks}
        if not via:
            incoming = f'[incoming]\nport = {usocksd_port}\nmetrics_port = 0\naddresses = ["127.0.0.1"]\n'
            configurations = {"usocksd": alone + incoming, **configurations}
        ports = {"usocksd": usocksd_port, "transocks": port}
        stack.enter_context(running(folder, configurations, ports))
        signals.hold()
        child = subprocess.Popen(
            command,
            env=user.environment,
            preexec_fn=_become(user, gid, cgroup),  # noqa: PLW1509
        )
        with child:
            signals.forward_to(child)
            status = child.wait()
        _wait_for_others(signals, lambda: members_of(gid, cgroup))
    return status if status >= 0 else 128 - status


def _redirect(tool: Tool, gid: int, port: int, stack: contextlib.ExitStack, *, udp: bool) -> tuple[str, Cgroup | None]:
    """Load the rules until the stack is closed; returns a folder that is removed with them, and the cgroup, if a test
    connection has shown that they match it. Raises FirewallError.
    """
    name = f"transocks_exec_{os.getpid()}"
    for cgroup in chain(make(name, gid), [None]):
        folder = tempfile.mkdtemp(prefix="transocks-exec-")
        # closed: connections that connection tracking has forgotten must not go out directly.
        redirection = Redirection(mode=Mode.HOST, name=name, port=port, groups=(gid,), closed=True, reject_quic=not udp)
        redirection = redirection if cgroup is None else cgroup.select(redirection)
        wanted = [redirection]
        if udp:
            # The group id is nobody else's, and so is a mark with its number.
            more = attrs.evolve(
                redirection, udp=True, name=name.replace("exec", "dgram"), ports=((1, 65535),), tproxy_mark=gid
            )
            wanted.append(more)
        rules = TemporaryRules(tool, tuple(wanted), folder, "" if cgroup is None else cgroup.folder)
        with contextlib.ExitStack() as trial:
            try:
                trial.enter_context(rules.hold())
            except FirewallError:
                if cgroup is None:
                    raise
                continue  # this kernel or tool does not know the match
            with socket.create_server(("127.0.0.1", port)):
                if cgroup is None or cgroup.is_redirected_to(port):
                    stack.push(trial.pop_all())
                    return folder, cgroup
    raise AssertionError("the last one is tried without a cgroup")


def _become(user: Caller, gid: int, cgroup: Cgroup | None) -> Callable[[], None]:
    """For preexec_fn: turns the child into the command's user, group and cgroup."""
    arrange = die_with_parent()

    def become() -> None:
        if cgroup is not None:
            cgroup.enter()
        os.setgroups(user.groups)
        os.setregid(gid, gid)
        os.setreuid(user.uid, user.uid)
        arrange()  # the kernel clears this setting when the user changes

    return become


def _wait_for_others(signals: Signals, others: Callable[[], dict[int, str]]) -> None:
    """Wait until all processes that the command left behind have ended, and say so if that takes a while."""
    signals.end(others)
    since, reported = time.monotonic(), False
    while left := others():
        if not reported and time.monotonic() - since > SAY_AFTER:
            names = ", ".join(f"{name} ({pid})" for pid, name in sorted(left.items())[:5])
            _say(f"the command has ended, and left behind: {names}. They are still redirected; this waits until they"
                 " end. Ctrl-C ends them")  # fmt: skip
            reported = True
        time.sleep(LOOK_EVERY)


def _say(text: str) -> None:
    print(f"transocks exec: {visible(text)}", file=sys.stderr, flush=True)


def _calling_user() -> Caller:
    """The user who called sudo, else root itself."""
    name = os.environ.get("SUDO_USER", "root")
    try:
        entry = pwd.getpwnam(name)
    except KeyError:
        raise ExecError(f"SUDO_USER is {name!r}, and there is no such user") from None
    environment = dict(os.environ)
    if "SUDO_USER" in os.environ:  # sudo has put root's there
        environment |= {"HOME": entry.pw_dir, "USER": name, "LOGNAME": name, "SHELL": entry.pw_shell}
    groups = os.getgrouplist(name, entry.pw_gid) if "SUDO_USER" in os.environ else [*os.getgroups(), os.getgid()]
    return Caller(entry.pw_uid, tuple(dict.fromkeys(groups)), environment)


def _allowed_gid(gid: int) -> bool:
    """Whether this (user namespace's) root may take that group."""
    with open("/proc/self/gid_map", encoding="ascii") as file:
        return any(int(first) <= gid < int(first) + int(count) for first, _, count in map(str.split, file))
