"""The UDP associations of a worker: which there are, the descriptors that they take, and their metrics."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from usocksd.log.metrics import Counter, Metrics
from usocksd.net.datagrams import Association


class Associations:
    """All associations of a worker."""

    DROPPED = (
        "short",
        "reserved",
        "fragment",
        "address_type",
        "name",
        "stranger",
        "denied",
        "unresolved",
        "no_egress",
        "out_of_ports",
        "no_route",
        "too_long",
        "queue_full",
        "send_buffer_full",
        "receive_buffer_full",
        "descriptors",
        "client_gone",
    )
    """The causes by which dropped datagrams are counted."""

    def __init__(self, metrics: Metrics) -> None:
        self.live: set[Association] = set()
        self.extra = 0
        """Their descriptors beside the two of a connection."""
        self.room: Callable[[], bool] = lambda: True
        """Whether there are descriptors left. The worker's service sets it."""
        datagrams = metrics.counters(
            "udp_datagrams_total", "Datagrams relayed to destinations (tx) and from there (rx)", "direction"
        )
        octets = metrics.counters(
            "udp_bytes_total", "Bytes of their payload, to destinations (tx) and from there (rx)", "direction"
        )
        self.tx_packets, self.rx_packets = datagrams.labels("tx"), datagrams.labels("rx")
        self.tx_bytes, self.rx_bytes = octets.labels("tx"), octets.labels("rx")
        self._gauge = metrics.gauge("udp_associations", "UDP associations at present")
        self._by_cause = metrics.counters("udp_dropped_total", "Datagrams that were not relayed, by cause", "cause")
        self._dropped: dict[str, Counter] = {}
        self.declare(self.DROPPED)

    def declare(self, causes: Iterable[str]) -> None:
        """Causes by which this daemon drops datagrams too."""
        for cause in causes:
            self._dropped[cause] = self._by_cause.labels(cause)

    def enter(self, association: Association) -> None:
        """One begins."""
        self.live.add(association)
        self._gauge.value += 1

    def leave(self, association: Association) -> None:
        """One is over."""
        self.live.discard(association)
        self._gauge.value -= 1

    def dropped(self, cause: str, number: int = 1) -> None:
        """Count datagrams that are not relayed."""
        self._dropped[cause].value += number

    def take(self) -> bool:
        """Take a descriptor, if there is one left, until `give_back`."""
        if not self.room():
            return False
        self.extra += 1
        return True

    def give_back(self) -> None:
        """It is closed."""
        self.extra -= 1
