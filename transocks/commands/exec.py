"""transocks exec -- COMMAND: one command's TCP connections through both daemons, on this host, and then no trace.

    daemons on free loopback ports -> rules for a group id of its own -> the command with that group -> all removed

The command keeps its user (the one who called sudo), groups and terminal. What makes the rules see it is its
effective group, which no other process has; children inherit it, so all that the command starts is redirected too.
The rules and daemons are gone when it ends, and also if this process is killed: the rules are held by a process of
their own (firewall/holder.py), the daemons and the command get SIGKILL from the kernel with the death of this one.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import attrs

from transocks.firewall.config import Mode
from transocks.firewall.holder import Held
from transocks.firewall.live import uses_ipv6
from transocks.firewall.render import render
from transocks.firewall.steps import FirewallError, choose_tool
from transocks.firewall.wanted import Selection, Wanted
from transocks.tools import die_with_parent
from usocksd.errors import Error

FAILED, NOT_EXECUTABLE, NOT_FOUND = 125, 126, 127  # as env(1) and others that run a command
READY_WITHIN = 15.0  # seconds for a daemon to listen, which takes a fraction of one
# Group ids up here are nobody's by convention; a process id, at most 22 bits (proc(5), pid_max), makes them unique.
FIRST_GID = 0x74000000


class ExecError(Error):
    """The command could not be run as asked."""


@attrs.frozen
class User:
    """Who the command runs as."""

    uid: int
    groups: tuple[int, ...]
    environment: dict[str, str]


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add this verb to the command line."""
    parser = subparsers.add_parser(
        "exec",
        help="run a command with its TCP connections, and only its, redirected through both daemons",
        description="Run COMMAND with its TCP connections, and only its, redirected through transocks and usocksd,"
        " which are started for it. Private networks and DNS are left alone, and QUIC (UDP 443) is refused. Needs"
        " root; under sudo the command runs as who called. Files that it creates show a group id without a name. Exit"
        " status: the command's; 128 + N if signal N ended it; 125 if it was not run.",
    )
    parser.add_argument("command", nargs=argparse.REMAINDER, metavar="-- COMMAND ...", help="the command line to run")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run the verb; returns the exit status."""
    command = args.command[1:] if args.command[:1] == ["--"] else args.command
    try:
        if not command:
            raise ExecError("no command given: transocks exec -- COMMAND ...")
        return _exec(command)
    except FileNotFoundError:
        return _complain(f"{command[0]}: command not found", NOT_FOUND)
    except OSError as error:
        return _complain(f"{command[0]}: {error.strerror}", NOT_EXECUTABLE)
    except Error as error:
        return _complain(str(error), FAILED)


def _complain(text: str, status: int) -> int:
    print(f"transocks exec: {text}", file=sys.stderr)
    return status


def _exec(command: Sequence[str]) -> int:
    if os.geteuid() != 0:
        raise ExecError(
            "redirecting needs root: sudo transocks exec -- COMMAND ... (in a checkout, ./run shows it without,"
            " in a user namespace)"
        )
    tool = choose_tool()
    if tool is None:
        raise ExecError("neither nft nor iptables is installed")
    user = _calling_user()
    gid = FIRST_GID + os.getpid()
    if not _allowed_gid(gid):
        raise ExecError("this user namespace has not enough group ids to tell the command's connections from others")
    ipv6 = uses_ipv6()
    with _Signals() as signals, contextlib.ExitStack() as stack:
        folder = tempfile.mkdtemp(prefix="transocks-exec-")
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        usocksd_port, port = _free_port(ipv6), _free_port(ipv6)
        name = f"transocks_exec_{os.getpid()}"
        wanted = Wanted(mode=Mode.HOST, name=name, port=port, selection=Selection(groups=(gid,)))
        rules = render(tool, wanted, ipv6=ipv6)
        daemons = stack.enter_context(_ending())
        local = ["127.0.0.1", "[::1]"] if ipv6 else ["127.0.0.1"]
        listen = ", ".join(f'"{address}:{port}"' for address in local)
        # For one command and its time: nobody looks at them from outside.
        alone = 'workers = 1\ncontrol = ""\ntimeouts.stop = 0\n'
        usocksd = f'{alone}[incoming]\nport = {usocksd_port}\nmetrics_port = 0\naddresses = ["127.0.0.1"]\n'
        transocks = f'{alone}metrics_port = 0\nproxy_url = "socks5://127.0.0.1:{usocksd_port}"\nlisten = [{listen}]\n'
        try:
            daemons.append(_start("usocksd", usocksd, folder))
            daemons.append(_start("transocks", transocks, folder))
            _wait_until_ready("usocksd", daemons[0], usocksd_port)
            _wait_until_ready("transocks", daemons[1], port)
            stack.enter_context(Held(rules, folder))
        except FirewallError as error:
            raise ExecError(f"the rules could not be loaded: {error}") from None
        signals.hold()
        child = subprocess.Popen(
            command,
            user=user.uid,
            group=gid,
            extra_groups=user.groups,
            env=user.environment,
            preexec_fn=die_with_parent(),  # noqa: PLW1509
        )
        with child:
            signals.forward_to(child)
            status = child.wait()
    return status if status >= 0 else 128 - status


def _calling_user() -> User:
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
    return User(entry.pw_uid, tuple(dict.fromkeys(groups)), environment)


def _allowed_gid(gid: int) -> bool:
    """Whether this (user namespace's) root may take that group."""
    with open("/proc/self/gid_map", encoding="ascii") as file:
        return any(int(first) <= gid < int(first) + int(count) for first, _, count in map(str.split, file))


def _free_port(ipv6: bool) -> int:
    """A port that is free now on loopback, of both families."""
    while True:
        with socket.create_server(("127.0.0.1", 0)) as four:
            port: int = four.getsockname()[1]
            if not ipv6:
                return port
            try:
                with socket.create_server(("::1", port), family=socket.AF_INET6):
                    return port
            except OSError as error:
                if error.errno != errno.EADDRINUSE:
                    raise ExecError(f"can't listen on ::1: {error.strerror}") from None


def _start(name: str, config: str, folder: str) -> subprocess.Popen[bytes]:
    path = Path(folder, f"{name}.toml")
    path.write_text(config, encoding="utf-8")
    # What goes wrong is said on our stderr. A session of its own: what the terminal sends is for the command.
    return subprocess.Popen(
        [sys.executable, "-m", name, "-f", str(path), "-loglevel", "error"],
        stdin=subprocess.DEVNULL, stdout=2, start_new_session=True, preexec_fn=die_with_parent(),  # noqa: PLW1509
    )  # fmt: skip


def _wait_until_ready(name: str, daemon: subprocess.Popen[bytes], port: int) -> None:
    deadline = time.monotonic() + READY_WITHIN
    while True:
        with contextlib.suppress(OSError), socket.socket() as probe:
            # Bound to the port it connects to, a probe could meet itself; a listener is what we look for.
            probe.connect(("127.0.0.1", port))
            if probe.getsockname() != probe.getpeername():
                return
        if daemon.poll() is not None:
            raise ExecError(f"{name} did not start")
        if time.monotonic() > deadline:
            raise ExecError(f"{name} does not listen")
        time.sleep(0.01)


@contextlib.contextmanager
def _ending() -> Iterator[list[subprocess.Popen[bytes]]]:
    """A list of processes that end with the block."""
    processes: list[subprocess.Popen[bytes]] = []
    try:
        yield processes
    finally:
        for process in processes:
            process.terminate()  # nobody is left to wait for what they carry: stop = 0
        for process in processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(READY_WITHIN)
            process.kill()
            process.wait()


class _Signals:
    """While in use the terminal's signals are the command's, which is in our process group; others are passed on."""

    _terminal = (signal.SIGINT, signal.SIGQUIT)
    _passed_on = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)

    def __init__(self) -> None:
        self._child: subprocess.Popen[bytes] | None = None
        self._held: list[int] | None = None

    def __enter__(self) -> _Signals:
        # Handlers, not SIG_IGN: that the command would inherit.
        handlers = dict.fromkeys(self._terminal, self._on_terminal) | dict.fromkeys(self._passed_on, self._pass)
        self._before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def hold(self) -> None:
        """From now on signals are the command's, which is about to start; before, they end the set-up."""
        self._held = []

    def forward_to(self, child: subprocess.Popen[bytes]) -> None:
        """This is the command; it gets what came while it started."""
        self._child = child
        for number in self._held or ():
            child.send_signal(number)

    def _on_terminal(self, number: int, _: object) -> None:
        if self._held is None:
            raise ExecError(f"interrupted ({signal.Signals(number).name})")

    def _pass(self, number: int, _: object) -> None:
        if self._held is None:
            raise ExecError(f"interrupted ({signal.Signals(number).name})")
        if self._child is None:
            self._held.append(number)
        else:
            self._child.send_signal(number)
