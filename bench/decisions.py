"""Measures the cost of rules: 50 of them, with a million entries in files. `python -m bench.decisions`

Start of the real daemon until it answers, the memory of its workers, and the CPU time of a decision.
"""

import argparse
import json
import os
import random
import resource
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path

from usocksd.clients import Client
from usocksd.config import UsocksdConfig
from usocksd.net.address import IPAddress
from usocksd.settings.loader import load

RULES = 50
REQUESTS = 20_000
_WORDS = ("mail", "ads", "track", "cdn", "img", "shop", "login", "news", "blog", "static", "pixel", "api")
_TOP = ("com", "net", "org", "example", "co.uk", "de")
_LENGTHS = {IPv4Address: (16, 18, 20, 22, 24, 24, 26, 28, 32, 32), IPv6Address: (32, 40, 44, 48, 48, 56, 64, 128)}


def names(chance: random.Random, count: int) -> Iterator[str]:
    """So many names and domains."""
    for number in range(count):
        dot = "." if number % 3 == 0 else ""
        yield f"{dot}{chance.choice(_WORDS)}{number % 997}.{chance.choice(_WORDS)}-{number:x}.{chance.choice(_TOP)}"


def networks(chance: random.Random, count: int, kind: type[IPAddress]) -> Iterator[str]:
    """So many networks of one IP version."""
    for _ in range(count):
        yield f"{address(chance, kind)}/{chance.choice(_LENGTHS[kind])}"


def address(chance: random.Random, kind: type[IPAddress]) -> IPAddress:
    """One of the addresses that the networks are of."""
    if kind is IPv4Address:
        return IPv4Address(chance.getrandbits(32))
    return IPv6Address(0x2001 << 112 | chance.getrandbits(112))


def write(folder: Path, entries: int, port: int) -> Path:
    """The configuration, and the files it names: seven tenths names, two tenths IPv4, one tenth IPv6 networks."""
    chance = random.Random(4)
    lists = {
        "names": names(chance, entries * 7 // 10),
        "v4": networks(chance, entries * 2 // 10, IPv4Address),
        "v6": networks(chance, entries // 10, IPv6Address),
    }
    rules = []
    for name, lines in lists.items():
        (folder / f"{name}.txt").write_text("\n".join(lines) + "\n")
        rules.append(f'name = "{name}"\naction = "deny"\nfrom = ["10.0.0.0/8"]\nto = ["file:{name}.txt"]')
    for number in range(len(lists), RULES - 1):
        user = f'user = ["user{number}"]\n' if number % 3 == 0 else ""
        rules.append(
            f'action = "{"deny" if number % 2 else "allow"}"\nfrom = ["10.{number}.0.0/16"]\n{user}'
            f'to = ["host{number}.example", ".d{number}.example", "198.18.{number}.0/24"]\n'
            f'ports = [{number}, "{1000 + number}-{2000 + number}"]'
        )
    rules.append('name = "the rest"\naction = "allow"')
    file = folder / "usocksd.toml"
    file.write_text(
        f'workers = 2\ncontrol = "{folder}/control.sock"\n[incoming]\nport = {port}\nmetrics_port = 0\n'
        'addresses = ["127.0.0.1"]\n' + "".join(f"[[rule]]\n{rule}\n" for rule in rules)
    )
    return file


def start(file: Path, port: int) -> tuple[float, float, list[float]]:
    """Until the daemon answers a client: seconds, and seconds of CPU of all its processes; and the most memory that
    each worker has had, in MB.
    """
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    began = time.monotonic()
    daemon = subprocess.Popen([sys.executable, "-m", "usocksd", "-f", str(file)], stderr=subprocess.PIPE)
    try:
        while not _answers(port):
            if daemon.poll() is not None:
                assert daemon.stderr is not None
                raise SystemExit(daemon.stderr.read().decode())
            time.sleep(0.02)
        took = time.monotonic() - began
        children = Path(f"/proc/{daemon.pid}/task/{daemon.pid}/children").read_text().split()
        memory = [_peak(pid) for pid in children]
    finally:
        daemon.terminate()
        daemon.wait()
    now = resource.getrusage(resource.RUSAGE_CHILDREN)
    return took, now.ru_utime + now.ru_stime - used.ru_utime - used.ru_stime, memory


def _answers(port: int) -> bool:
    try:
        with socket.create_connection(("127.0.0.1", port), 60) as client:
            client.sendall(b"\x05\x01\x00")
            return client.recv(2) == b"\x05\x00"
    except OSError:
        return False


def _peak(pid: str) -> float:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024 / 1e6
    raise ValueError(f"{pid} has no VmHWM")


def decide(file: Path) -> dict[str, float]:
    """Microseconds of CPU of a decision on a name, on an address behind a name, and on an address."""
    rules = load(UsocksdConfig, file).access_rules(lambda _: False)
    chance = random.Random(5)
    listed = [line.strip().lstrip(".") for line in (file.parent / "names.txt").read_text().splitlines()[:: RULES + 1]]
    requests = [
        (
            Client.at(
                f"10.{chance.randrange(RULES + 10)}.{chance.randrange(256)}.{chance.randrange(4)}",
                user=chance.choice([None, "user3", "user6"]),
            ),
            chance.choice(listed) if number % 4 == 0 else f"www.site{number}.example.com",
            address(chance, IPv4Address if number % 3 else IPv6Address),
            chance.choice([443, 80, 25, 1500]),
        )
        for number in range(REQUESTS)
    ]
    figures = {}
    for kind in ("name", "address behind it", "address"):
        best = float("inf")
        for _ in range(3):
            began = time.process_time()
            for client, name, ip, port in requests:
                rules.judge(client, None if kind == "address" else name, None if kind == "name" else ip, port)
            best = min(best, time.process_time() - began)
        figures[kind] = best / REQUESTS * 1e6
    return figures


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.decisions", description=__doc__)
    parser.add_argument("--entries", type=int, default=1_000_000, metavar="N", help="in all files (1000000)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        file = write(Path(folder), options.entries, port)
        took, cpu, memory = start(file, port)
        decisions = decide(file)
    if options.json:
        print(json.dumps({"start_s": took, "start_cpu_s": cpu, "workers_mb": memory, "decision_us": decisions}))
        return
    print(f"{RULES} rules, {options.entries} entries; Python {sys.version.split()[0]}, {os.cpu_count()} CPUs")
    print(f"start until a client is answered: {took:.1f} s, {cpu:.1f} s of CPU of all processes")
    print(f"most memory of each worker: {', '.join(f'{each:.0f} MB' for each in memory)}")
    for kind, microseconds in decisions.items():
        print(f"decision on {kind}: {microseconds:.1f} µs of CPU")


if __name__ == "__main__":
    main()
