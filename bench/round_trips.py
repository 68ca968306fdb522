"""How often a connection through a proxy waits for the link to it. `python -m bench.round_trips`

The client's host and everybody else's are network namespaces with a delay between them, made of TUN devices: it needs
no netem, but root. What is measured is the time from connect to the answer for a client that speaks first, in round
trips of that link: of the first connection, which may teach the proxy something, and the best of those that follow.
"""

import argparse
import contextlib
import json
import socket
import ssl
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from .places import find_program

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests/netns"))

import lab

SOCKS_PORT, REDIRECT_PORT = 1080, 1081
READY_WITHIN = 20.0
# Until a proxy has had a look at its upstream.
SETTLE = 1.0


def hello() -> bytes:
    """The first bytes of a TLS client, without a name."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    said = ssl.MemoryBIO()
    with contextlib.suppress(ssl.SSLWantReadError):
        context.wrap_bio(ssl.MemoryBIO(), said).do_handshake()
    return said.read()


# A TLS hello fits into a SYN and may be sent twice; a request may not.
FIRST = {"TLS hello": hello(), "HTTP request": f"GET / HTTP/1.1\r\nHost: {lab.WEB_V4}\r\n\r\n".encode()}

REDIRECT = f"""
table ip bench {{
  chain output {{
    type nat hook output priority -100
    ip daddr {lab.WEB_V4} meta l4proto tcp redirect to :{REDIRECT_PORT}
  }}
}}
"""

USOCKSD_TOML = f"""\
workers = 1
control = ""
[incoming]
metrics_port = 0
port = {SOCKS_PORT}
addresses = ["{lab.NEXT_V4}"]
allow_from = ["198.51.100.0/24"]
[outgoing]
allow_sites = ["203.0.113.0/24"]
"""

TRANSOCKS_TOML = f"""\
workers = 1
control = ""
metrics_port = 0
listen = "127.0.0.1:{REDIRECT_PORT}"
proxy_url = "socks5://{lab.NEXT_V4}:{SOCKS_PORT}"
fast_open = %s
"""

REDSOCKS_CONF = f"""\
base {{ log_debug = off; log_info = off; log = "stderr"; daemon = off; redirector = iptables; }}
redsocks {{
  local_ip = 127.0.0.1; local_port = {REDIRECT_PORT};
  ip = {lab.NEXT_V4}; port = {SOCKS_PORT}; type = socks5;
}}
"""


@dataclass(frozen=True)
class Way:
    """How the client gets to the web server: a redirector on its own host, a SOCKS server beyond the link."""

    name: str
    server: str = ""
    redirector: str = ""
    fast_open: bool = False

    def missing(self) -> str | None:
        """Why it can't be measured here, or None."""
        for program in (self.server, self.redirector):
            if program not in {"", "usocksd", "transocks"} and find_program(program) is None:
                return f"{program} is not installed"
        return None


WAYS = (
    Way("straight"),
    Way("redsocks+microsocks", "microsocks", "redsocks"),
    Way("transocks+microsocks", "microsocks", "transocks"),
    Way("transocks+usocksd", "usocksd", "transocks"),
    Way("the same, Fast Open", "usocksd", "transocks", fast_open=True),
)


def command(program: str, folder: Path, *, fast_open: bool) -> list[str]:
    """The command line of one program, its configuration written to `folder`."""
    if program == "microsocks":
        return [str(find_program(program)), "-i", lab.NEXT_V4, "-p", str(SOCKS_PORT)]
    text = {"usocksd": USOCKSD_TOML, "redsocks": REDSOCKS_CONF}.get(program)
    text = text or TRANSOCKS_TOML % str(fast_open).lower()
    path = folder / f"{program}.conf"
    path.write_text(text)
    if program == "redsocks":
        return [str(find_program(program)), "-c", str(path)]
    return [sys.executable, "-m", program, "-f", str(path)]


@contextlib.contextmanager
def running(way: Way, net: lab.Net, folder: Path) -> Iterator[None]:
    """Both programs of a way, ready, and the client's connections redirected."""
    programs = []
    try:
        for host, program, address in (
            (net.outside, way.server, (lab.NEXT_V4, SOCKS_PORT)),
            (net.client, way.redirector, ("127.0.0.1", REDIRECT_PORT)),
        ):
            if not program:
                continue
            with (folder / "log").open("ab") as log:
                argv = command(program, folder, fast_open=way.fast_open)
                programs.append(host.popen(*argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log))
            wait_for(host, address)
        if way.redirector:
            net.client.run("nft", "-f", "-", input=REDIRECT)
        if programs:
            time.sleep(SETTLE)
        yield
    finally:
        if way.redirector:
            net.client.run("nft", "delete", "table", "ip", "bench", check=False)
        for started in programs:
            started.terminate()
        for started in programs:
            started.wait(READY_WITHIN)


def wait_for(host: lab.Host, address: tuple[str, int]) -> None:
    """Return when somebody listens there."""
    deadline = time.monotonic() + READY_WITHIN
    while True:
        with host.socket() as sock:
            if sock.connect_ex(address) == 0:
                return
        if time.monotonic() > deadline:
            raise RuntimeError(f"nobody listens on {address}")
        time.sleep(0.02)


def once(net: lab.Net, port: int, first: bytes) -> float:
    """The seconds of one connection, from connect to the whole answer."""
    with net.client.socket() as sock:
        sock.settimeout(READY_WITHIN)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        began = time.monotonic()
        sock.connect((lab.WEB_V4, port))
        sock.sendall(first)
        answer = b""
        while len(answer) < len(first):
            more = sock.recv(4096)
            if not more:
                raise RuntimeError(f"the connection ended after {len(answer)} bytes")
            answer += more
        return time.monotonic() - began


def measure(way: Way, net: lab.Net, port: int, tries: int, round_trip: float) -> dict[str, list[float]]:
    """For each first message the round trips of a first connection, and the fewest of those behind it."""
    with tempfile.TemporaryDirectory(prefix="bench-") as folder, running(way, net, Path(folder)):
        found = {}
        for name, first in FIRST.items():
            trips = [once(net, port, first) / round_trip for _ in range(1 + tries)]
            found[name] = [trips[0], min(trips[1:])]
        return found


@contextlib.contextmanager
def echoing(net: lab.Net) -> Iterator[int]:
    """An echo server; yields its port."""
    listener = net.outside.listen(lab.WEB_V4)

    def echo(sock: socket.socket) -> None:
        with contextlib.suppress(OSError), sock:
            while data := sock.recv(4096):
                sock.sendall(data)

    def accept() -> None:
        with contextlib.suppress(OSError):
            while True:
                threading.Thread(target=echo, args=(listener.accept()[0],), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    try:
        yield listener.getsockname()[1]
    finally:
        with contextlib.suppress(OSError):
            listener.shutdown(socket.SHUT_RDWR)
        listener.close()


def main(argv: Sequence[str] | None = None, say: Callable[[str], None] = print) -> int:
    """Measure all ways that can be had here, and print them."""
    parser = argparse.ArgumentParser(prog="python -m bench.round_trips", description=(__doc__ or "").split("\n\n")[1])
    parser.add_argument("--ms", type=float, default=100, help="the link's round trip, in milliseconds (100)")
    parser.add_argument("--tries", type=int, default=5, help="connections behind the first (5)")
    parser.add_argument("--only", metavar="NAME", action="append", help="only this way (may be repeated)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    options = parser.parse_args(argv)
    results: dict[str, dict[str, list[float]]] = {}
    try:
        for way in WAYS:
            if options.only and way.name not in options.only:
                continue
            if reason := way.missing():
                print(f"left out: {way.name}: {reason}", file=sys.stderr)
                continue
            # A network of its own for each: the kernel remembers what it learned of an address.
            with lab.delayed_net(options.ms / 1000) as (net, _), echoing(net) as port:
                results[way.name] = measure(way, net, port, options.tries, options.ms / 1000)
    except (lab.LabUnavailable, PermissionError, FileNotFoundError) as error:
        print(f"no link with delay here: {error}", file=sys.stderr)
        return 1
    if options.json:
        say(json.dumps(results, indent=1))
        return 0
    say(
        f"Round trips of {options.ms:g} ms from connect to the answer: first connection, then the best of the others.\n"
    )
    say(f"{'':24}" + "".join(f"{name:>18}" for name in FIRST))
    for name, found in results.items():
        say(f"{name:24}" + "".join(f"{f'{one:.2f}  {later:.2f}':>18}" for one, later in found.values()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
