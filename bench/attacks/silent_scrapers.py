"""Silent connections to the metrics port, and a health check. `python -m bench.attacks.silent_scrapers`"""

import contextlib
import socket
import sys
import time
from collections import deque

from bench.attacks.harness import PATIENCE, USOCKSD, Attack, run

METRICS = 7001
CONNECTIONS = 40


def healthy(_: int) -> None:
    """One health check, as a container's runtime makes it. Raises OSError when it fails."""
    with socket.create_connection(("127.0.0.1", METRICS), PATIENCE) as sock:
        sock.sendall(b"GET /healthz HTTP/1.0\r\n\r\n")
        answer = b"".join(iter(lambda: sock.recv(1024), b""))
        if not answer.endswith(b"ready\n"):
            raise OSError(f"answered {answer!r}")


def attack(_: int) -> None:
    """Keep all connections open, and send nothing."""
    kept: deque[socket.socket] = deque()
    while True:
        for sock in list(kept):
            with contextlib.suppress(BlockingIOError, OSError):
                sock.setblocking(False)
                if sock.recv(1) == b"":
                    kept.remove(sock)
                    sock.close()
        while len(kept) < CONNECTIONS:
            with contextlib.suppress(OSError):
                kept.append(socket.create_connection(("127.0.0.1", METRICS), PATIENCE))
        time.sleep(0.05)


def main() -> int:
    return run(
        Attack(
            name="silent_scrapers",
            config=USOCKSD.replace("metrics_port = 0", f"metrics_port = {METRICS}"),
            good=healthy,
            attack=attack,
        )
    )


if __name__ == "__main__":
    sys.exit(main())
