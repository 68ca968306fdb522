"""The contenders: how each proxy is started, with which settings, and why it is left out if it can't be.

Settings are those an operator would choose for many connections, and the least logging that a proxy has
(microsocks has no switch for it: a line a connection). Ours have everything that a busy host has: the access log, in
JSON, to a file, metrics, and 50 rules.
"""

import contextlib
import importlib.util
import os
import random
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Self

from .accounting import processes
from .counting import PATIENCE
from .places import REDIRECT_PORT, Loopback, find_program


@dataclass(frozen=True)
class Site:
    """The parameters of a proxy: where to listen, a directory for its files, and the SOCKS port behind it."""

    directory: Path
    port: int
    upstream: int = 0

    def write(self, name: str, text: str) -> str:
        path = self.directory / name
        path.write_text(text)
        return str(path)


@dataclass(frozen=True)
class Part:
    """One program: its command line for a site, and how to see that it is not there."""

    command: Callable[[Site], list[str]]
    missing: Callable[[], str | None]


@dataclass(frozen=True)
class Contender:
    """One row of the tables; `parts` are its programs: the SOCKS server, then a redirector if it has one.

    Of an `alone` redirector, the SOCKS server behind it runs but is not measured.
    """

    name: str
    parts: tuple[Part, ...] = ()
    alone: bool = False

    def missing(self) -> str | None:
        """Why it can't be measured here, or None."""
        return next(filter(None, (part.missing() for part in self.parts)), None)


def _needs_program(name: str, package: str) -> Callable[[], str | None]:
    return lambda: None if find_program(name) else f"{name} is not installed (Debian package {package})"


def _needs_module(module: str, why: str) -> Callable[[], str | None]:
    def missing() -> str | None:
        with contextlib.suppress(ModuleNotFoundError):
            if importlib.util.find_spec(module):
                return None
        return why

    return missing


def _program(name: str) -> str:
    path = find_program(name)
    assert path is not None, name
    return path


# The last one applies to the connections of the bench.
RULES = "".join(
    f"""[[rule]]
action = "{"deny" if number % 2 else "allow"}"
to = ["host{number}.example", ".d{number}.example", "198.18.{number}.0/24"]
{"" if number % 3 else f'from = ["10.{number}.0.0/16"]'}
{"" if number % 4 else f'ports = [{number + 1}, "{1000 + number}-{2000 + number}"]'}
"""
    for number in range(49)
)
USOCKSD_TOML = f"""\
workers = 1
control = ""
[incoming]
port = {{port}}
metrics_port = {{metrics}}
addresses = ["127.0.0.1"]
allow_from = ["127.0.0.0/8"]
{RULES}
[[rule]]
action = "allow"
to = ["127.0.0.0/8"]
"""

TRANSOCKS_TOML = """\
workers = 1
control = ""
metrics_port = {metrics}
listen = "127.0.0.1:{port}"
proxy_url = "socks5://127.0.0.1:{upstream}"
"""

DANTE_CONF = """\
errorlog: stderr
internal: 127.0.0.1 port = {port}
external: 127.0.0.1
clientmethod: none
socksmethod: none
client pass {{ from: 127.0.0.0/8 to: 0.0.0.0/0 }}
socks pass {{ from: 127.0.0.0/8 to: 0.0.0.0/0 }}
"""

REDSOCKS_CONF = """\
base {{
  log_debug = off; log_info = off; log = "stderr"; daemon = off; redirector = iptables;
  rlimit_nofile = {files}; redsocks_conn_max = {connections};
}}
redsocks {{
  local_ip = 127.0.0.1; local_port = {port};
  ip = 127.0.0.1; port = {upstream}; type = socks5;
}}
"""


def _ours(program: str, config: str, site: Site) -> list[str]:
    text = config.format(port=site.port, upstream=site.upstream, metrics=free_port())
    path = site.write(f"{program}.toml", text)
    log = str(site.directory / f"{program}.log")
    return [sys.executable, "-m", program, "-f", path, "-logformat", "json", "-logfile", log]


def _dante(site: Site) -> list[str]:
    return [_program("danted"), "-f", site.write("danted.conf", DANTE_CONF.format(port=site.port))]


def _redsocks(site: Site) -> list[str]:
    conf = REDSOCKS_CONF.format(port=site.port, upstream=site.upstream, files=20000, connections=4000)
    return [_program("redsocks"), "-c", site.write("redsocks.conf", conf)]


def _pproxy(site: Site) -> list[str]:
    return [sys.executable, "-m", "pproxy", "-l", f"socks5://127.0.0.1:{site.port}"]


_NEEDS_USOCKSD = _needs_module("usocksd.__main__", "the usocksd package is not installed")
USOCKSD = Part(lambda site: _ours("usocksd", USOCKSD_TOML, site), _NEEDS_USOCKSD)
USOCKSD_2 = Part(
    lambda site: _ours("usocksd", USOCKSD_TOML.replace("workers = 1", "workers = 2"), site), _NEEDS_USOCKSD
)
TRANSOCKS = Part(
    lambda site: _ours("transocks", TRANSOCKS_TOML, site),
    _needs_module("transocks.__main__", "the transocks package is not installed"),
)
MICROSOCKS = Part(
    lambda site: [_program("microsocks"), "-i", "127.0.0.1", "-p", str(site.port)],
    _needs_program("microsocks", "microsocks"),
)
DANTE = Part(_dante, _needs_program("danted", "dante-server"))
PPROXY = Part(_pproxy, _needs_module("pproxy", "pproxy is not installed (the extra `bench` of this project)"))
REDSOCKS = Part(_redsocks, _needs_program("redsocks", "redsocks"))

STRAIGHT = Contender("straight")
SOCKS = (
    STRAIGHT,
    Contender("usocksd", (USOCKSD,)),
    Contender("usocksd x2", (USOCKSD_2,)),
    Contender("microsocks", (MICROSOCKS,)),
    Contender("dante", (DANTE,)),
    Contender("pproxy", (PPROXY,)),
)
UDP = tuple(each for each in SOCKS if each.name in {"straight", "usocksd", "usocksd x2", "dante"})
"""Those that have UDP ASSOCIATE."""
CHAINS = (
    STRAIGHT,
    Contender("transocks", (USOCKSD, TRANSOCKS), alone=True),
    Contender("transocks+usocksd", (USOCKSD, TRANSOCKS)),
    Contender("redsocks", (MICROSOCKS, REDSOCKS), alone=True),
    Contender("redsocks+microsocks", (MICROSOCKS, REDSOCKS)),
)


def from_command(name: str, command: str) -> Contender:
    """A SOCKS5 server by its command line: {port} is where it must listen, {config} a usocksd.toml that says
    so, {dir} a directory for its files."""

    def line(site: Site) -> list[str]:
        config = site.write(f"{name}.toml", USOCKSD_TOML.format(port=site.port, metrics=free_port()))
        words = shlex.split(command)
        names = {"{port}": str(site.port), "{config}": config, "{dir}": str(site.directory)}
        for key, value in names.items():
            words = [word.replace(key, value) for word in words]
        return words

    program = shlex.split(command)[0]
    return Contender(name, (Part(line, lambda: None if find_program(program) else f"{program} not found"),))


class Running:
    """A contender at work in a place, from `with` to its end; each measure gets a fresh one.

    `prefix` stands before the command lines of what is measured of it.
    """

    def __init__(self, contender: Contender, place: Loopback, directory: Path, prefix: Sequence[str] = ()) -> None:
        self.contender = contender
        self.place = place
        self.site = Site(directory, free_port())
        self._prefix = prefix
        self._programs: list[subprocess.Popen[bytes]] = []

    @property
    def proxy(self) -> tuple[str, int] | None:
        """The SOCKS server to talk to; None when connections go straight, or are redirected."""
        return ("127.0.0.1", self.site.port) if len(self.contender.parts) == 1 else None

    @property
    def redirected(self) -> bool:
        return len(self.contender.parts) > 1

    @property
    def sessions(self) -> list[int]:
        """The sessions (for accounting) of those of its programs that are measured."""
        return [program.pid for program in self._programs[self.contender.alone :]]

    def __enter__(self) -> Self:
        site = self.site
        self._log = self.site.directory / f"{self.contender.name}.out"
        try:
            for number, part in enumerate(self.contender.parts):
                if number:
                    site = replace(site, port=REDIRECT_PORT, upstream=site.port)
                measured = number >= self.contender.alone
                prefix = self._prefix if measured else ()
                command = [*self.place.prefix, "setpriv", "--pdeathsig", "KILL", "--", *prefix, *part.command(site)]
                with self._log.open("ab") as out:
                    self._programs.append(
                        subprocess.Popen(
                            command, stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True
                        )
                    )
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def ended(self) -> bool:
        """Whether one of its programs is gone, which none should be."""
        return any(program.poll() is not None for program in self._programs)

    def last_words(self) -> str:
        """The end of what it wrote, to explain a failure."""
        lines = self._log.read_text(errors="replace").strip().splitlines()
        return lines[-1][:200] if lines else ""

    def stop(self) -> None:
        """End all its processes: the programs are asked to stop, what is left after a moment is killed."""
        for program in self._programs:
            program.terminate()  # a program that forked can so reap its own
        sessions = [program.pid for program in self._programs]
        patience = time.monotonic() + (PATIENCE if self._prefix else 0.5)
        while processes(sessions, zombies=False) and time.monotonic() < patience:
            time.sleep(0.005)
        deadline = time.monotonic() + 5
        # Leaders are reaped last: until then their ids, which name the sessions, can't be given to others.
        while (left := processes(sessions, zombies=False)) and time.monotonic() < deadline:
            for pid in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.005)
        for program in self._programs:
            program.wait()


def free_port() -> int:
    """A port that nobody listens on now, below the range the kernel gives to outgoing connections."""
    while True:
        port = random.randrange(20000, 32000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("127.0.0.1", port))
            return port
