"""The two daemons as subprocesses, and small peers for them: what the end-to-end tests stand on.

Nothing here waits for a time to pass: `wait_until` looks for a condition until it holds, and fails after PATIENCE.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from ipaddress import ip_address
from pathlib import Path
from socket import socket as Socket
from typing import Any, Self, TypeVar

import dns.message
import dns.name
import dns.rcode
import dns.rrset
import trio

S = TypeVar("S")
T = TypeVar("T")
Record = dict[str, Any]

PATIENCE = 60.0
"""Seconds after which a test has failed: nothing takes as long, even on a machine that is busy with others."""


def wait_until(condition: Callable[[], T], what: str | Callable[[], object], patience: float = PATIENCE) -> T:
    """The first true value of `condition`; AssertionError with `what` if there is none in `patience` seconds."""
    deadline = time.monotonic() + patience
    while not (found := condition()):
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {patience} s: {what() if callable(what) else what}")
        time.sleep(0.005)
    return found


def together(function: Callable[[S], T], items: Sequence[S]) -> list[T]:
    """The results of `function` for all items, at the same time; raises what one of them raised once all are over."""
    with ThreadPoolExecutor(len(items)) as pool:
        return list(pool.map(function, items))


# ---- the daemons


def _popen(*command: str, **options: Any) -> subprocess.Popen[Any]:
    return subprocess.Popen(command, **options)


class Log:
    """A log file in JSON."""

    def __init__(self, path: Path) -> None:
        self.log = path

    def lines(self) -> list[str]:
        """The complete lines of the log."""
        try:
            return self.log.read_text(encoding="utf-8").split("\n")[:-1]
        except FileNotFoundError:
            return []

    def records(self, message: str | None = None, **fields: object) -> list[Record]:
        """The records so far that have this message and these fields."""
        wanted = fields if message is None else {"message": message, **fields}
        # A long log is looked at again and again: parse only what can be meant.
        sign = "" if message is None else json.dumps(message)
        found = (json.loads(line) for line in self.lines() if sign in line)
        return [r for r in found if all(r.get(k) == v for k, v in wanted.items())]

    def record(self, message: str, **fields: object) -> Record:
        """Wait for a record; the last one like it."""
        return wait_until(
            lambda: self.records(message, **fields),
            lambda: f"the log says {message!r} {fields}, but: " + "\n".join(self.lines()[-20:]),
        )[-1]

    async def until(self, condition: Callable[[], object], what: str) -> None:
        """`wait_until`, in trio: for a daemon in this process."""
        with trio.move_on_after(PATIENCE):
            while not condition():
                await trio.sleep(0.005)
            return
        raise AssertionError(f"never: {what}; " + "\n".join(self.lines()))

    async def recorded(self, message: str, **fields: object) -> Record:
        """`record`, in trio."""
        await self.until(lambda: self.records(message, **fields), f"{message} {fields}")
        return self.record(message, **fields)


def settings(name: str, config: str) -> str:
    """The configuration with defaults for many daemons on one machine: one worker, no metrics port, no control socket.
    Its own settings win.
    """
    for key, value in (("workers", "1"), ("control", '""'), ("metrics_port", "0")):
        if re.search(rf"^{key}\b", config, re.MULTILINE):
            continue
        line = f"{key} = {value}\n"
        if key != "metrics_port" or name == "transocks":
            config = line + config
        elif "[incoming]\n" in config:
            config = config.replace("[incoming]\n", f"[incoming]\n{line}")
        else:
            config = f"{config}\n[incoming]\n{line}"
    return config


class Process(Log):
    """A daemon in the foreground: a master, its workers, and a log in JSON. Use as a context manager.

    Leaving the context ends it, and checks that it ends well and had no trouble of its own making.
    """

    TROUBLE: tuple[str, ...] = ("critical",)
    """Severities of records that an operator must not see when nothing is wrong."""
    STATUS: int | None = 0
    """The exit status of one that a test has ended; None if the test has looked at it."""

    def __init__(
        self,
        name: str,
        log: Path,
        errors: Path,
        *command: str | os.PathLike[str],
        popen: Callable[..., subprocess.Popen[Any]] = _popen,
        **options: Any,
    ) -> None:
        super().__init__(log)
        self.name = name
        self.expected: set[str] = set()
        """Messages of trouble that is the test's doing."""
        self._errors = errors
        with errors.open("wb") as file:
            self.process = popen(*command, **({"stdin": subprocess.DEVNULL, "stderr": file} | options))
        self.pid = self.process.pid
        """Of the master."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is not None:
                print("".join(f"{self.name}: {line}\n" for line in [*self.lines()[-40:], self.stderr()]))
                return
            if self.process.poll() is None:
                self.end()
            elif self.STATUS is not None:
                assert self.process.returncode == self.STATUS, self.stderr()
            trouble = [
                record for record in self.records() if record["severity"] in self.TROUBLE or "traceback" in record
            ]
            assert [record for record in trouble if record["message"] not in self.expected] == []
        finally:
            orphans = [] if self.process.poll() is not None else self.workers()
            self.process.kill()
            self.process.wait()
            for pid in orphans:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            for stream in (self.process.stdout, self.process.stderr):
                if stream is not None:
                    stream.close()

    def ready(self) -> Self:
        """Wait until it listens."""

        def listening() -> bool:
            assert self.process.poll() is None, f"{self.name} ended: {self.lines()} {self.stderr()}"
            return bool(self.records("listening"))

        wait_until(listening, lambda: f"{self.name} listens: {self.lines()} {self.stderr()}")
        return self

    def signal(self, number: signal.Signals) -> None:
        """Signal the master."""
        self.process.send_signal(number)

    def end(self) -> None:
        """End it in good order, at once."""
        self.signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(0.3)
        self.signal(signal.SIGTERM)  # what a test left connected is ended
        status = self.ended()
        assert status == 0, f"{self.name} ended with {status}: {self.stderr()}"

    def ended(self) -> int:
        """Wait for its end; the exit status."""
        return self.process.wait(PATIENCE)

    def stderr(self) -> str:
        """Its output there."""
        return self._errors.read_text(encoding="utf-8")

    def workers(self) -> list[int]:
        """Process ids of the workers there are, those that drain included."""
        children = Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text(encoding="ascii")
        return [int(pid) for pid in children.split()]

    @property
    def worker(self) -> int:
        """The one worker."""
        (pid,) = self.workers()
        return pid

    def descriptors(self, pid: int | None = None) -> list[str]:
        """The open files of the master, or of another process."""
        found = []
        folder = f"/proc/{pid or self.pid}/fd"
        for fd in os.listdir(folder):
            with contextlib.suppress(FileNotFoundError):
                found.append(os.readlink(f"{folder}/{fd}"))
        return found

    @property
    def ports(self) -> list[int]:
        """The addresses that it listens on, or has listened on, in the order of the log."""
        return [int(record["address"].rpartition(":")[2]) for record in self.records("listening")]

    @property
    def port(self) -> int:
        """The first of those."""
        return self.ports[0]


class Daemon(Process):
    """`usocksd` or `transocks`; entering the context waits until its log file says that it listens, if `waits`.

    `popen` starts it elsewhere (lab.Host.popen), `prefix` are words before the command.
    """

    def __init__(
        self,
        name: str,
        config: str,
        folder: Path,
        *arguments: str,
        prefix: Sequence[str] = (),
        logfile: str | None = "",
        python: str = sys.executable,
        waits: bool = True,
        **options: Any,
    ) -> None:
        """`logfile` None logs to stderr (see `options`), "" to a file of the folder."""
        file = folder / f"{name}.toml"
        file.write_text(settings(name, config), encoding="utf-8")
        log = folder / f"{name}.log" if logfile == "" else Path(logfile or "/dev/null")
        words = [*prefix, python, "-m", name, "-f", str(file), "-logformat", "json"]
        words += [] if logfile is None else ["-logfile", str(log)]
        super().__init__(name, log, folder / f"{name}.stderr", *words, *arguments, **options)
        self._waits = waits and logfile is not None

    def __enter__(self) -> Self:
        try:
            return self.ready() if self._waits else self
        except BaseException as error:
            self.__exit__(type(error))
            raise

    def fds(self) -> int:
        """How many file descriptors its worker has open."""
        return len(self.descriptors(self.worker))

    def wait_for_fds(self, at_most: int) -> None:
        """Wait until it has no more file descriptors than that."""
        wait_until(lambda: self.fds() <= at_most, lambda: f"{self.name} has {self.fds()} > {at_most} descriptors")

    def rss(self) -> int:
        """Its worker's memory in bytes."""
        pages = int(Path(f"/proc/{self.worker}/statm").read_text(encoding="ascii").split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")


def running(pid: int) -> bool:
    """Whether this process is there and no zombie."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8")
    except (FileNotFoundError, ProcessLookupError):
        return False
    return stat.rpartition(")")[2].split()[0] != "Z"


# ---- bytes


def receive_exactly(sock: Socket, size: int) -> bytes:
    """`size` bytes, or what there was until the end."""
    data = b""
    while len(data) < size and (piece := sock.recv(size - len(data))):
        data += piece
    return data


def receive_all(sock: Socket) -> bytes:
    """All until the end."""
    return b"".join(iter(lambda: sock.recv(1 << 16), b""))


def reset(sock: Socket) -> None:
    """Close with RST."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


def is_reset(sock: Socket) -> bool:
    """Wait for its end: whether that was a reset, and nothing came before."""
    try:
        sock.recv(1)
        return False
    except ConnectionResetError:
        return True


def is_over(sock: Socket) -> bool:
    """Wait for its end, clean or not."""
    try:
        return sock.recv(1) == b""
    except ConnectionResetError:
        return True


def lives(sock: Socket, text: bytes = b"still served") -> bool:
    """Whether an echo still comes back."""
    try:
        sock.sendall(text)
        return sock.recv(len(text), socket.MSG_WAITALL) == text
    except OSError:
        return False


# ---- SOCKS, by hand: the bytes of a client that has not read our code

GREETING = b"\x05\x01\x00"
GRANTED = 0


def address_bytes(host: str, port: int, *, as_name: bool = False) -> bytes:
    """ATYP, DST.ADDR and DST.PORT."""
    try:
        ip = None if as_name else ip_address(host)
    except ValueError:
        ip = None
    if ip is None:
        raw = host.encode()
        return bytes((3, len(raw))) + raw + port.to_bytes(2)
    return bytes((1 if ip.version == 4 else 4,)) + ip.packed + port.to_bytes(2)


def request(host: str, port: int, *, command: int = 1, as_name: bool = False) -> bytes:
    """A SOCKS5 request."""
    return bytes((5, command, 0)) + address_bytes(host, port, as_name=as_name)


def receive_reply(sock: Socket) -> tuple[int, str, int]:
    """A SOCKS5 reply: REP, BND.ADDR, BND.PORT. Fails unless it is complete and numeric."""
    head = receive_exactly(sock, 4)
    assert len(head) == 4, f"no complete reply: {head!r}"
    assert (head[0], head[2]) == (5, 0), head
    assert head[3] in (1, 4), head
    size = 4 if head[3] == 1 else 16
    rest = receive_exactly(sock, size + 2)
    assert len(rest) == size + 2
    return head[1], str(ip_address(rest[:size])), int.from_bytes(rest[size:])


def socks5(proxy: Socket, host: str, port: int, **options: Any) -> tuple[int, str, int]:
    """A whole SOCKS5 handshake without authentication."""
    proxy.sendall(GREETING)
    assert receive_exactly(proxy, 2) == b"\x05\x00"
    proxy.sendall(request(host, port, **options))
    return receive_reply(proxy)


# ---- peers


def name_of(host: str, port: int) -> str:
    """An address as records have it."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


class Served(contextlib.AbstractContextManager["Served"]):
    """A listener whose every connection is handled by `handle` in a thread of its own, until the context ends."""

    def __init__(self, listener: Socket, handle: Callable[[Socket], None]) -> None:
        self.listener = listener
        self.handle = handle
        self.address: tuple[str, int] = listener.getsockname()[:2]
        self.peers: list[tuple[str, int]] = []
        """The address of the client."""
        self._open: set[Socket] = set()
        self._threads: list[threading.Thread] = []
        self._acceptor = threading.Thread(target=self._accept)
        self._acceptor.start()

    @property
    def port(self) -> int:
        return self.address[1]

    def _accept(self) -> None:
        while True:
            try:
                sock, peer = self.listener.accept()
            except OSError:
                return
            self.peers.append((peer[0].removeprefix("::ffff:"), peer[1]))
            self._open.add(sock)
            thread = threading.Thread(target=self._serve, args=(sock,))
            self._threads.append(thread)
            thread.start()

    def _serve(self, sock: Socket) -> None:
        with contextlib.suppress(OSError), sock:
            self.handle(sock)
        self._open.discard(sock)

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):
            self.listener.shutdown(socket.SHUT_RDWR)
        self._acceptor.join()
        self.listener.close()
        for sock in list(self._open):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join()


def echo(sock: Socket) -> None:
    """Says back what it hears."""
    while data := sock.recv(1 << 16):
        sock.sendall(data)


def loopback(family: int = socket.AF_INET, backlog: int = 128) -> Socket:
    """A listener on loopback, on a port of the kernel's choice."""
    sock = Socket(family)
    sock.bind(("127.0.0.1" if family == socket.AF_INET else "::1", 0))
    sock.listen(backlog)
    return sock


@contextlib.contextmanager
def blackhole() -> Iterator[int]:
    """The port on 127.0.0.1 of a listener whose accept queue is full: what connects there waits for ever."""
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(loopback(backlog=0))
        port = listener.getsockname()[1]
        for _ in range(4):  # the queue takes one more than its backlog; SYNs after that are dropped
            filler = stack.enter_context(Socket())
            filler.setblocking(False)
            filler.connect_ex(("127.0.0.1", port))
        yield port


def free_port() -> int:
    """A port on 127.0.0.1 where nobody listens."""
    with loopback() as sock:
        return int(sock.getsockname()[1])


class NameServer(contextlib.AbstractContextManager["NameServer"]):
    """A DNS server: `names` to addresses or SRV records; None for a name that is never answered; NXDOMAIN for all
    others.
    """

    def __init__(self, names: Mapping[str, Sequence[str] | None], sock: Socket | None = None, ttl: int = 60) -> None:
        self._ttl = ttl
        self.set(names)
        self._socket = sock or Socket(type=socket.SOCK_DGRAM)
        if sock is None:
            self._socket.bind(("127.0.0.1", 0))
        self.address = "{}:{}".format(*self._socket.getsockname()[:2])
        self.asked: list[str] = []
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def set(self, names: Mapping[str, Sequence[str] | None]) -> None:
        """From now on, these are the names."""
        self.names = {dns.name.from_text(name): found for name, found in names.items()}

    def _run(self) -> None:
        while True:
            data, client = self._socket.recvfrom(4096)
            if not data:
                return
            question = dns.message.from_wire(data)
            asked = question.question[0]
            self.asked.append(asked.name.to_text(omit_final_dot=True))
            addresses = self.names.get(asked.name, ())
            if addresses is None:
                continue
            answer = dns.message.make_response(question)
            if asked.name not in self.names:
                answer.set_rcode(dns.rcode.NXDOMAIN)
            kinds = {a: "SRV" if " " in a else "AAAA" if ":" in a else "A" for a in addresses}
            mine = [a for a, kind in kinds.items() if kind == dns.rdatatype.to_text(asked.rdtype)]
            if mine:
                answer.answer.append(dns.rrset.from_text_list(asked.name, self._ttl, "IN", asked.rdtype, mine))
            self._socket.sendto(answer.to_wire(), client)

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):  # ENOTCONN, and yet the receiver wakes up
            self._socket.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._socket.close()
