"""20,000 names that no name server answers for, and a client of an address. `python -m bench.attacks.silent_names`"""

import contextlib
import socket
import sys
import time
from collections import deque
from collections.abc import Iterator
from itertools import count

from bench.attacks.harness import USOCKSD, Attack, begin, by_address, by_name, echo_server, echoed, run

ECHO, DNS = 7000, 5300
NAMES = 20_000
# A second, well below what one worker accepts: what is measured is what names cost, not a flood of connections.
RATE = 1000


@contextlib.contextmanager
def servers() -> Iterator[None]:
    """An echo server, and a name server that reads and never answers."""
    with socket.socket(type=socket.SOCK_DGRAM) as silent, echo_server(port=ECHO):
        silent.bind(("127.0.0.1", DNS))
        yield


def attack(port: int) -> None:
    """One client that waits for all of them, and asks for another when one has failed."""
    kept: deque[socket.socket] = deque()
    began = time.monotonic()
    for number in count():
        time.sleep(max(began + number / RATE - time.monotonic(), 0))
        if len(kept) == NAMES:
            kept.popleft().close()
        with contextlib.suppress(OSError):
            kept.append(begin(port, by_name(f"n{number}.dead.example", 443)))


def main() -> int:
    return run(
        Attack(
            name="silent_names",
            descriptors=50_000,
            config=f'{USOCKSD}[dns]\nservers = ["127.0.0.1:{DNS}"]\n',
            good=lambda port: echoed(port, by_address("127.0.0.1", ECHO)),
            attack=attack,
            setup=servers,
        )
    )


if __name__ == "__main__":
    sys.exit(main())
