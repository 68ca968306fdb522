"""Shared by all attacks: a daemon in a network namespace, a good client beside the attacker, and the figures.

An attack is a module with a `main` that describes itself to `run`. What it sees is one process tree of the daemon; what
it reports is how a client fares that has nothing to do with the attack, and what the daemon keeps of it afterwards.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import resource
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median

from bench.accounting import memory_bytes, processes

ROOT = Path(__file__).resolve().parents[2]
INSIDE = "BENCH_ATTACK_INSIDE"
READY_WITHIN = 20.0
# Seconds between two good clients, whether or not the earlier ones are done; and until one counts as failed.
EVERY, PATIENCE = 0.2, 10.0
# Until what the attack has left behind is counted: by then the daemon has seen that its clients are gone.
AFTERWARDS = 5.0

# One worker, so that all of an attack meets the good client. It may go to servers on loopback.
USOCKSD = """
workers = 1
control = ""
[incoming]
port = {port}
addresses = ["127.0.0.1"]
metrics_port = 0
[[rule]]
name = "servers of the attack"
action = "allow"
to = ["127.0.0.0/8"]
"""


@dataclass
class Attack:
    """One attack. Functions get the SOCKS (or listening) port of the daemon."""

    name: str
    config: str
    """TOML; `{port}` is where to listen."""
    good: Callable[[int], None]
    """One try of the good client: returns when it has what it wants, raises OSError when it failed."""
    attack: Callable[[int], None]
    """Runs in a process of its own, which is killed in the end."""
    daemon: str = "usocksd"
    descriptors: int = 4096
    """Soft and hard limit of the daemon's open files."""
    setup: Callable[[], contextlib.AbstractContextManager[object]] = contextlib.nullcontext
    """Set up the namespace: servers, addresses."""
    seconds: float = 15.0


@dataclass
class Phase:
    """How the good client fared, and what the daemon used at most (memory: at the end)."""

    name: str
    took: list[float] = field(default_factory=list)
    failed: int = 0
    descriptors: int = 0
    """The most open descriptors of a process."""
    memory: float = 0.0
    """MB, all processes (PSS)."""

    def row(self) -> str:
        """One line of the table."""
        typical, worst = (1000 * of(self.took) for of in (median, max)) if self.took else (0.0, 0.0)
        return (
            f"{self.name:8}{len(self.took) + self.failed:7}{self.failed:8}{typical:11.1f}{worst:11.1f}"
            f"{self.descriptors:13}{self.memory:11.1f}"
        )


HEADER = f"{'':8}{'tries':>7}{'failed':>8}{'median ms':>11}{'worst ms':>11}{'descriptors':>13}{'memory MB':>11}"


def run(attack: Attack) -> int:
    """`python -m bench.attacks.NAME`: before, during and after the attack, as a table or as JSON."""
    parser = argparse.ArgumentParser(prog=f"python -m bench.attacks.{attack.name}")
    parser.add_argument("--seconds", type=float, default=attack.seconds, help="of the attack (%(default)g)")
    parser.add_argument("--tree", type=Path, default=ROOT, help="the sources of the daemon to attack (these)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    options = parser.parse_args()
    if INSIDE not in os.environ:
        return _inside()
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    phases = _measure(attack, options.tree, options.seconds)
    if options.json:
        print(json.dumps([asdict(phase) for phase in phases], indent=1))
    else:
        print(attack.name, HEADER, *(phase.row() for phase in phases), sep="\n")
    return 0


def _inside() -> int:
    """This again, in a network namespace that ends with it."""
    unshare = shutil.which("unshare")
    if unshare is None:
        sys.exit("needs unshare(1)")
    options = ["--net"] if os.geteuid() == 0 else ["--net", "--user", "--map-root-user"]
    module = sys.modules["__main__"].__spec__
    assert module is not None
    command = [unshare, *options, sys.executable, "-m", module.name, *sys.argv[1:]]
    path = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
    return subprocess.run(command, env=os.environ | {INSIDE: "1", "PATH": path}, check=False).returncode


def _measure(attack: Attack, tree: Path, seconds: float) -> list[Phase]:
    with attack.setup(), _daemon(attack, tree) as (session, port):
        phases = [Phase("before"), Phase("during"), Phase("after")]
        _phase(phases[0], attack, port, session, min(seconds, 4.0))
        attacker = multiprocessing.get_context("fork").Process(target=_attack, args=(attack, port))
        attacker.start()
        try:
            _phase(phases[1], attack, port, session, seconds)
        finally:
            subprocess.run(["pkill", "-KILL", "-s", str(attacker.pid)], check=False)
            attacker.join()
        time.sleep(min(seconds, AFTERWARDS))
        _phase(phases[2], attack, port, session, min(seconds, 4.0))
        return phases


def _attack(attack: Attack, port: int) -> None:
    os.setsid()
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    attack.attack(port)


@contextlib.contextmanager
def _daemon(attack: Attack, tree: Path) -> Iterator[tuple[int, int]]:
    """Its session (see bench.accounting) and port."""
    with tempfile.TemporaryDirectory(prefix="attack-") as folder:
        with socket.create_server(("127.0.0.1", 0)) as probe:
            port = probe.getsockname()[1]
        path = Path(folder) / "config.toml"
        path.write_text(attack.config.replace("{port}", str(port)))
        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        limit = (min(attack.descriptors, hard),) * 2
        with (Path(folder) / "log").open("wb") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", attack.daemon, "-f", str(path)],
                cwd=tree,
                env=os.environ | {"PYTHONPATH": str(tree)},
                stderr=log,
                start_new_session=True,
                preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, limit),  # noqa: PLW1509 (no threads yet)
            )
        try:
            deadline = time.monotonic() + READY_WITHIN
            while "listening" not in (Path(folder) / "log").read_text():
                if process.poll() is not None or time.monotonic() > deadline:
                    sys.exit((Path(folder) / "log").read_text())
                time.sleep(0.05)
            yield process.pid, port
        finally:
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(3)
            for pid in processes({process.pid}, zombies=False):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, 9)
            process.wait()


def _phase(phase: Phase, attack: Attack, port: int, session: int, seconds: float) -> None:
    """Good clients come at their own pace: one that waits holds up no other."""
    counted = threading.Lock()

    def once() -> None:
        began = time.monotonic()
        try:
            attack.good(port)
        except OSError:
            with counted:
                phase.failed += 1
        else:
            with counted:
                phase.took.append(time.monotonic() - began)

    threads = []
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        threads.append(threading.Thread(target=once))
        threads[-1].start()
        time.sleep(EVERY)
        phase.descriptors = max(phase.descriptors, _most_open(session))
    for thread in threads:
        thread.join()
    phase.memory = memory_bytes({session}) / 1e6


def _most_open(session: int) -> int:
    counts = [0]
    for pid in processes({session}, zombies=False):
        with contextlib.suppress(OSError):
            counts.append(len(os.listdir(f"/proc/{pid}/fd")))
    return max(counts)


# --- for attackers and good clients ---


def by_address(host: str, port: int) -> bytes:
    """A SOCKS5 CONNECT request for an IPv4 address."""
    return b"\x05\x01\x00\x01" + socket.inet_aton(host) + port.to_bytes(2, "big")


def by_name(name: str, port: int) -> bytes:
    """A SOCKS5 CONNECT request for a name."""
    return b"\x05\x01\x00\x03" + bytes((len(name),)) + name.encode() + port.to_bytes(2, "big")


def begin(proxy: int, request: bytes, source: str = "127.0.0.1") -> socket.socket:
    """A client of the SOCKS server that has sent its request, and reads nothing yet."""
    sock = socket.socket()
    try:
        sock.settimeout(PATIENCE)
        sock.bind((source, 0))
        sock.connect(("127.0.0.1", proxy))
        sock.sendall(b"\x05\x01\x00" + request)
    except BaseException:
        sock.close()
        raise
    return sock


def echoed(proxy: int, request: bytes, source: str = "127.0.0.1") -> None:
    """One connection through the SOCKS server to an echo server. Raises OSError when it fails."""
    deadline = time.monotonic() + PATIENCE
    with begin(proxy, request, source) as sock:
        answer = _receive(sock, 12, deadline)
        if answer[3] != 0:
            raise OSError(f"reply {answer[3]}")
        sock.sendall(b"hello")
        _receive(sock, 5, deadline)


def _receive(sock: socket.socket, size: int, deadline: float) -> bytes:
    data = b""
    while len(data) < size:
        sock.settimeout(max(deadline - time.monotonic(), 0.001))
        more = sock.recv(size - len(data))
        if not more:
            raise OSError("the end")
        data += more
    return data


@contextlib.contextmanager
def echo_server(host: str = "127.0.0.1", port: int = 0) -> Iterator[int]:
    """Gives its port."""

    def echo(sock: socket.socket) -> None:
        with contextlib.suppress(OSError), sock:
            while data := sock.recv(4096):
                sock.sendall(data)

    def serve() -> None:
        with contextlib.suppress(OSError):
            while True:
                threading.Thread(target=echo, args=(listener.accept()[0],), daemon=True).start()

    with socket.create_server((host, port), backlog=1024) as listener:
        threading.Thread(target=serve, daemon=True).start()
        yield listener.getsockname()[1]
        listener.shutdown(socket.SHUT_RDWR)
