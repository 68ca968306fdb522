"""The load generator: one process, one measure, one epoll loop, the same for every proxy.

Run as `python -m bench.load PLAN` with a Plan in JSON. It first waits until the proxy answers (retrying a
whole exchange), warms it up, and prints "ready". A line on standard input starts the measured part; its
result is one line of JSON. Connections stay open until standard input closes, so that the reader of the
proxy's CPU and memory sees them.

It may be slow beside a C program: what is compared is the proxies' CPU per operation, and the generator's own
share is the same for all.
"""

import gc
import json
import select
import socket
import sys
import time
from array import array

from .datagrams import Flows
from .ends import STREAM
from .opening import PAYLOAD, Failed, Opener, Plan

WARM_UP = 1000  # echoes at most


def go() -> None:
    """Say that the measured part may begin, and wait to be told."""
    gc.collect()
    gc.disable()
    print("ready", flush=True)
    if not sys.stdin.readline():
        sys.exit("nobody wants the result")


def measure_connect(opener: Opener) -> dict[str, float]:
    go()
    start = time.perf_counter()
    end = start + opener.plan.seconds
    left = iter(range(opener.plan.count))
    count = opener.turn_over(lambda: time.perf_counter() < end and next(left, None) is not None)
    return {"count": count, "seconds": time.perf_counter() - start}


def measure_idle(opener: Opener) -> dict[str, float]:
    go()
    kept = opener.open(opener.plan.connections)
    opened.extend(kept)
    return {"count": len(kept)}


def measure_echo(opener: Opener) -> dict[str, float]:
    plan = opener.plan
    socks = opener.open(plan.connections)
    opened.extend(socks)
    exchange(socks, plan.seconds / 10, WARM_UP, plan.patience)
    go()
    start = time.perf_counter()
    unsorted = exchange(socks, plan.seconds, plan.count, plan.patience)
    elapsed = time.perf_counter() - start
    latencies = sorted(unsorted)
    return {
        "count": len(latencies),
        "seconds": elapsed,
        "p50": latencies[len(latencies) // 2] / 1e9,
        "p99": latencies[len(latencies) * 99 // 100] / 1e9,
    }


def exchange(socks: list[socket.socket], seconds: float, count: int, patience: float) -> "array[int]":
    """Ping-pong of PAYLOAD on every connection at once, until `seconds` or `count` are over; each round trip in ns."""
    clock = time.perf_counter_ns
    epoll = select.epoll()
    by_fd = {sock.fileno(): (sock.recv_into, sock.send) for sock in socks}
    sent = dict.fromkeys(by_fd, 0)
    missing = dict.fromkeys(by_fd, len(PAYLOAD))
    buffer = bytearray(len(PAYLOAD))
    latencies = array("q")
    end = clock() + int(seconds * 1e9)
    for fd, (_receive, send) in by_fd.items():
        epoll.register(fd, select.EPOLLIN)
        sent[fd] = clock()
        send(PAYLOAD)
    under_way = begun = len(by_fd)
    while under_way:
        ready = epoll.poll(patience)
        if not ready:
            raise Failed(f"{under_way} round trips got no answer for {patience:.0f} s")
        for fd, _events in ready:
            receive, send = by_fd[fd]
            size = receive(buffer)
            if not size:
                raise Failed("a connection was closed during the echo")
            missing[fd] -= size
            if missing[fd]:
                continue
            now = clock()
            latencies.append(now - sent[fd])
            if now < end and begun < count:
                begun += 1
                missing[fd] = len(PAYLOAD)
                sent[fd] = now
                send(PAYLOAD)
            else:
                under_way -= 1
    epoll.close()
    return latencies


def measure_bulk(opener: Opener) -> dict[str, float]:
    socks = opener.open(opener.plan.connections)
    opened.extend(socks)
    epoll = select.epoll()
    by_fd = {sock.fileno(): sock.recv_into for sock in socks}
    buffer = bytearray(1 << 20)
    size, total = len(buffer), 0
    go()
    start = time.perf_counter()
    end = start + opener.plan.seconds
    for sock in socks:
        epoll.register(sock.fileno(), select.EPOLLIN)
        sock.send(STREAM)
    while time.perf_counter() < end:
        for fd, _events in epoll.poll(opener.plan.patience):
            # MSG_TRUNC takes the bytes without copying them (tcp(7)): a reader as light as can be.
            count = by_fd[fd](buffer, size, socket.MSG_TRUNC)
            if not count:
                raise Failed("a stream ended early")
            total += count
    return {"count": total, "seconds": time.perf_counter() - start}


def measure_udp(flows: Flows) -> dict[str, float]:
    go()
    return flows.run()


opened: list[socket.socket] = []  # stay open until the process ends
MEASURES = {"connect": measure_connect, "echo": measure_echo, "bulk": measure_bulk, "idle": measure_idle}


def main() -> None:
    fields = json.loads(sys.argv[1])
    plan = Plan(**fields | {"target": tuple(fields["target"]), "proxy": fields["proxy"] and tuple(fields["proxy"])})
    if plan.measure == "udp":
        main_udp(plan)
        return
    opener = Opener(plan)
    try:
        opener.wait_until_served()
        warm_up = iter(range(200 if plan.measure == "connect" else 20))
        opener.turn_over(lambda: next(warm_up, None) is not None)
        opener.errors = 0
        result = MEASURES[plan.measure](opener)
    except (Failed, OSError) as error:
        print(json.dumps({"failed": str(error)}), flush=True)
        return
    print(json.dumps(result | {"errors": opener.errors}), flush=True)
    sys.stdin.read()


def main_udp(plan: Plan) -> None:
    try:
        flows = Flows(plan)
        flows.wait_until_served()
        result = measure_udp(flows)
    except (Failed, OSError) as error:
        print(json.dumps({"failed": str(error)}), flush=True)
        return
    print(json.dumps(result | {"errors": 0}), flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main()
