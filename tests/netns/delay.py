"""A wire with a delay, for kernels that have no netem: two TUN devices, and a thread that carries packets between them.

    line = DelayLine(here, there, 0.05)     # descriptors of the devices; seconds for each direction
    line.round_trips(b"answer")             # how many it took from the SYN until that arrived here
    line.loses = lambda packet: ...         # IP packets for which this is true are dropped

Packets stay in order, and only `loses` drops any.

Round trips are counted without a clock, since a busy machine would spoil it: a packet's *flight* is one more than the
highest that its sender had received of the connection when it was sent (Lamport's clock, as it were). A SYN is flight
1, its answer 2, what waits for that answer 3. Standard library only.
"""

from __future__ import annotations

import contextlib
import heapq
import itertools
import os
import select
import socket
import threading
import time
from collections.abc import Callable
from io import FileIO
from typing import NamedTuple

ROUND_TRIP = 0.1
"""The tests' round trip in seconds: long compared with the time between two packets that do not wait."""

_LARGEST = 65536
_SYN, _ACK = 2, 16
_FAST_OPEN = 34  # the option's kind (RFC 7413, section 4.1.1)

Flow = tuple[bytes, ...]
"""The ports of a connection, whichever way a packet goes."""


class Carried(NamedTuple):
    """A packet that waits for its time."""

    due: float
    number: int
    fd: int
    """where it goes"""
    packet: bytes
    flow: Flow
    flight: int


class DelayLine:
    """Carries packets until `close`, which also closes the devices. `here` is the client's end."""

    def __init__(self, here: FileIO, there: FileIO, delay: float) -> None:
        self.delay = delay
        self.loses: Callable[[bytes], bool] = lambda packet: False
        self.received: list[tuple[int, bytes]] = []
        """Packets that arrived here, with their flight."""
        self._here = here.fileno()
        self._ends = {here.fileno(): there.fileno(), there.fileno(): here.fileno()}
        self._devices = (here, there)
        # The highest flight of a connection that an end has received.
        self._heard: dict[tuple[Flow, int], int] = {}
        self._stop, self._stopped = os.pipe()
        for fd in self._ends:
            os.set_blocking(fd, False)
        self._thread = threading.Thread(target=self._carry, daemon=True)
        self._thread.start()

    def round_trips(self, data: bytes) -> float:
        """How many it took from a connection's SYN until a packet with these bytes arrived here; ValueError if none."""
        for flight, packet in self.received:
            if data in packet:
                return flight / 2
        raise ValueError("no packet has had it")

    def close(self) -> None:
        os.close(self._stopped)
        self._thread.join()
        os.close(self._stop)
        for device in self._devices:
            device.close()

    def _carry(self) -> None:
        poll = select.poll()
        for fd in (self._stop, *self._ends):
            poll.register(fd, select.POLLIN)
        under_way: list[Carried] = []
        numbers = itertools.count()
        while True:
            until = 1000 * (under_way[0].due - time.monotonic()) if under_way else None
            for fd, _ in poll.poll(None if until is None else max(until, 0)):
                if fd == self._stop:
                    return
                for packet in _packets(fd):
                    if not self.loses(packet):
                        flow, flight = self._flight(packet, fd)
                        due = time.monotonic() + self.delay
                        heapq.heappush(under_way, Carried(due, next(numbers), self._ends[fd], packet, flow, flight))
            now = time.monotonic()
            while under_way and under_way[0].due <= now:
                self._deliver(heapq.heappop(under_way))

    def _flight(self, packet: bytes, sender: int) -> tuple[Flow, int]:
        segment = _segment(packet)
        if segment is None:
            return (), 0
        flow = tuple(sorted((segment[:2], segment[2:4])))
        if segment[13] & (_SYN | _ACK) == _SYN:
            for fd in self._ends:
                self._heard[flow, fd] = 0
        return flow, self._heard.get((flow, sender), 0) + 1

    def _deliver(self, carried: Carried) -> None:
        heard = (carried.flow, carried.fd)
        self._heard[heard] = max(self._heard.get(heard, 0), carried.flight)
        if carried.fd == self._here:
            self.received.append((carried.flight, carried.packet))
        with contextlib.suppress(OSError):  # the host is gone
            os.write(carried.fd, carried.packet)


def _packets(fd: int) -> list[bytes]:
    """Those that wait at a device; none when the host behind it is gone."""
    packets = []
    try:
        while True:
            packets.append(os.read(fd, _LARGEST))
    except OSError:
        return packets


def _segment(packet: bytes) -> bytes | None:
    """The TCP segment in an IPv4 or IPv6 packet, if there is one."""
    if packet[0] >> 4 == 4:
        start, protocol = 4 * (packet[0] & 15), packet[9]
    else:
        start, protocol = 40, packet[6]
    return packet[start:] if protocol == socket.IPPROTO_TCP else None


def opens_fast(packet: bytes) -> bool:
    """Whether it is the SYN of a client that asks for Fast Open, or uses it."""
    segment = _segment(packet)
    if segment is None or segment[13] & (_SYN | _ACK) != _SYN:
        return False
    options = segment[20 : 4 * (segment[12] >> 4)]
    place = 0
    while place < len(options) and options[place]:
        if options[place] == _FAST_OPEN:
            return True
        place += 1 if options[place] == 1 else options[place + 1]
    return False
