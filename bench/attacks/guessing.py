"""Passwords guessed for ever new users from many addresses, and users who come for the first time.

`python -m bench.attacks.guessing`
"""

import contextlib
import selectors
import socket
import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import count, cycle
from pathlib import Path

import bcrypt

from bench.attacks.harness import PATIENCE, USOCKSD, Attack, by_address, echo_server, run

ECHO = 7000
ADDRESSES = 2000
AT_A_TIME = 300
USERS = Path(tempfile.gettempdir()) / "attack-guessing-users"
_next_user = count()


def log_in(user: str, password: str) -> bytes:
    """The bytes of a client up to its password (RFC 1929)."""
    name, secret = user.encode(), password.encode()
    return b"\x05\x01\x02\x01" + bytes((len(name),)) + name + bytes((len(secret),)) + secret


@contextlib.contextmanager
def users() -> Iterator[None]:
    """An echo server, and 400 users of the same password: each good client is a new one, without a remembered login."""
    hashed = bcrypt.hashpw(b"secret", bcrypt.gensalt(8)).decode()
    USERS.write_text("".join(f"user{number}:{hashed}\n" for number in range(400)))
    with echo_server(port=ECHO):
        yield
    USERS.unlink()


def good(port: int) -> None:
    """One user who knows his password. Raises OSError when it fails."""
    deadline = time.monotonic() + PATIENCE
    with socket.create_connection(("127.0.0.1", port), PATIENCE) as sock:
        sock.sendall(log_in(f"user{next(_next_user)}", "secret") + by_address("127.0.0.1", ECHO) + b"hello")
        answer = b""
        while not answer.endswith(b"hello"):
            sock.settimeout(max(deadline - time.monotonic(), 0.001))
            more = sock.recv(4096)
            if not more:
                raise OSError(f"the end after {answer!r}")
            answer += more


def attack(port: int) -> None:
    """Guess in parallel: each try comes from the next address and names a user that does not exist."""
    addresses, names = cycle(range(ADDRESSES)), count()
    with selectors.DefaultSelector() as selector:
        while True:
            while len(selector.get_map()) < AT_A_TIME:
                number = next(addresses)
                sock = socket.socket()
                sock.bind((f"127.1.{number // 250}.{number % 250 + 1}", 0))
                try:
                    sock.connect(("127.0.0.1", port))
                    sock.sendall(log_in(f"nobody{next(names)}", "guess"))
                except OSError:
                    sock.close()
                    continue
                selector.register(sock, selectors.EVENT_READ)
            for key, _ in selector.select():
                sock = key.fileobj  # type: ignore[assignment]  # all of them are sockets
                with contextlib.suppress(OSError):
                    if sock.recv(100) == b"\x05\x02":
                        continue
                selector.unregister(sock)
                sock.close()


def main() -> int:
    return run(
        Attack(
            name="guessing",
            config=f'{USOCKSD}[auth]\nusers_file = "{USERS}"\n',
            good=good,
            attack=attack,
            setup=users,
        )
    )


if __name__ == "__main__":
    sys.exit(main())
