"""A wire with a delay, for kernels that have no netem: two TUN devices, and a thread that carries packets between them.

    line = DelayLine(here, there, 0.05)     # descriptors of the devices; seconds for each direction
    line.loses = lambda packet: ...         # IP packets for which this is true get lost

Packets stay in order and none is lost for want of room: a delay and nothing else. Standard library only.
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

ROUND_TRIP = 0.1
"""That of the tests, in seconds: long beside what a busy machine takes for its own part."""

_LARGEST = 65536
_SYN, _ACK = 2, 16
_FAST_OPEN = 34  # the option's kind (RFC 7413, section 4.1.1)


class DelayLine:
    """Carries until `close`, which also closes the devices."""

    def __init__(self, one: FileIO, other: FileIO, delay: float) -> None:
        self.delay = delay
        self.loses: Callable[[bytes], bool] = lambda packet: False
        self._ends = {one.fileno(): other.fileno(), other.fileno(): one.fileno()}
        self._devices = (one, other)
        self._stop, self._stopped = os.pipe()
        for fd in self._ends:
            os.set_blocking(fd, False)
        self._thread = threading.Thread(target=self._carry, daemon=True)
        self._thread.start()

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
        under_way: list[tuple[float, int, int, bytes]] = []
        number = itertools.count()
        while True:
            until = 1000 * (under_way[0][0] - time.monotonic()) if under_way else None
            for fd, _ in poll.poll(None if until is None else max(until, 0)):
                if fd == self._stop:
                    return
                for packet in _packets(fd):
                    if not self.loses(packet):
                        due = time.monotonic() + self.delay
                        heapq.heappush(under_way, (due, next(number), self._ends[fd], packet))
            now = time.monotonic()
            while under_way and under_way[0][0] <= now:
                _, _, fd, packet = heapq.heappop(under_way)
                with contextlib.suppress(OSError):  # the host is gone
                    os.write(fd, packet)


def _packets(fd: int) -> list[bytes]:
    """Those that wait at a device; none when the host behind it is gone."""
    packets = []
    try:
        while True:
            packets.append(os.read(fd, _LARGEST))
    except OSError:
        return packets


def opens_fast(packet: bytes) -> bool:
    """Whether an IPv4 or IPv6 packet is the SYN of a client that asks for Fast Open, or uses it."""
    if packet[0] >> 4 == 4:
        start, protocol = 4 * (packet[0] & 15), packet[9]
    else:
        start, protocol = 40, packet[6]
    segment = packet[start:]
    if protocol != socket.IPPROTO_TCP or segment[13] & (_SYN | _ACK) != _SYN:
        return False
    options = segment[20 : 4 * (segment[12] >> 4)]
    place = 0
    while place < len(options) and options[place]:
        if options[place] == _FAST_OPEN:
            return True
        place += 1 if options[place] == 1 else options[place + 1]
    return False
