"""Names that lead to 16 dead addresses each, few descriptors, and a client of an address that is there.

`python -m bench.attacks.dead_addresses`
"""

import contextlib
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import dns.message
import dns.rrset

from bench.attacks.harness import USOCKSD, Attack, begin, by_address, by_name, echo_server, echoed, run

ECHO, DNS = 7000, 5300
CLIENTS = 40
DEAD = [f"192.0.2.{number}" for number in range(1, 17)]
# Packets to it go to an Ethernet address that nobody has.
WIRE = """
link add dead0 type veth peer name dead1
link set dead0 up
link set dead1 up
address add 198.51.100.1/24 dev dead0
neighbour add 198.51.100.2 lladdr 02:00:00:00:00:02 dev dead0 nud permanent
route add 192.0.2.0/24 via 198.51.100.2
"""


@contextlib.contextmanager
def servers() -> Iterator[None]:
    """An echo server, a name server, and a network that never answers."""
    for command in WIRE.strip().splitlines():
        subprocess.run(["ip", *command.split()], check=True)
    with socket.socket(type=socket.SOCK_DGRAM) as server, echo_server(port=ECHO):
        server.bind(("127.0.0.1", DNS))
        threading.Thread(target=answer, args=(server,), daemon=True).start()
        yield


def answer(server: socket.socket) -> None:
    """Every name has all the dead addresses, and no IPv6."""
    while True:
        wire, client = server.recvfrom(4096)
        query = dns.message.from_wire(wire)
        reply = dns.message.make_response(query)
        question = query.question[0]
        if question.rdtype == 1:
            reply.answer.append(dns.rrset.from_text(question.name, 60, "IN", "A", *DEAD))
        server.sendto(reply.to_wire(), client)


def attack(port: int) -> None:
    kept = [begin(port, by_name(f"n{number}.dead.example", 443)) for number in range(CLIENTS)]
    time.sleep(3600)
    del kept


def main() -> int:
    return run(
        Attack(
            name="dead_addresses",
            config=f'{USOCKSD}[dns]\nservers = ["127.0.0.1:{DNS}"]\n',
            good=lambda port: echoed(port, by_address("127.0.0.1", ECHO)),
            attack=attack,
            descriptors=512,
            setup=servers,
        )
    )


if __name__ == "__main__":
    sys.exit(main())
