"""What a worker reports about itself: signs of life, its use of resources, and its traffic."""

from __future__ import annotations

import os
import resource
import time

from usocksd.log.log import Log
from usocksd.log.metrics import Metrics
from usocksd.serve.channel import Message
from usocksd.serve.service import Service

LOG_FAILING = "Processes that can't write their log at present"
# Descriptors and bytes are counted with every fourth sign of life: for 10,000 connections that takes milliseconds.
_COUNT_EVERY = 4


class Vitals:
    """The signs of life of one worker, and the figures that rates are made of."""

    def __init__(self, service: Service, metrics: Metrics, sink: Log, limit: int) -> None:
        """`limit` is how many open files the process may have."""
        self._service = service
        self._metrics = metrics
        self._sink = sink
        self._limit = limit
        self._beats = 0
        self._dropped = metrics.counter("log_records_dropped_total", "Log records that were never written")
        self._failing = metrics.gauge("log_failing", LOG_FAILING)
        self._descriptors = metrics.gauge("descriptors_open", "Open files")
        metrics.gauge("descriptors_limit", "Open files that the processes may have").value = limit
        self._headroom = metrics.minimum(
            "descriptors_headroom", "Share of its open files that the worker with the fewest left has left"
        )
        relayed = metrics.counters(
            "relayed_bytes_total", "Bytes relayed to destinations (tx) and from there (rx), as they go", "direction"
        )
        self._relayed = relayed.labels("tx"), relayed.labels("rx")

    def alive(self, *, last: bool = False) -> Message:
        """A sign of life; the `last` one has all figures up to date."""
        service = self._service
        self._dropped.value = self._sink.dropped
        self._failing.value = int(self._sink.failing is not None)
        if last or self._beats % _COUNT_EVERY == 0:
            for counter, value in zip(self._relayed, self._bytes(), strict=True):
                counter.value = value
            try:
                self._descriptors.value = len(os.listdir("/proc/self/fd"))
            except OSError:  # listing them takes one more
                self._descriptors.value = self._limit
            self._headroom.value = 1 - self._descriptors.value / self._limit
        self._beats += 1
        return {
            "live": service.live,
            "most": service.most,
            "paused": service.paused,
            "descriptors": {"open": self._descriptors.value, "limit": self._limit},
            "log_failing": self._sink.failing,
            "cpu": sum(resource.getrusage(resource.RUSAGE_SELF)[:2]),
            "metrics": self._metrics.snapshot(),
        }

    def measure(self) -> dict[str, float]:
        """Connections and bytes each way so far, for rates; "at" is the time, by CLOCK_MONOTONIC."""
        tx_bytes, rx_bytes = self._bytes()
        return {
            "at": time.monotonic(),
            "live": self._service.live,
            "connections": self._service.accepted.value,
            "tx_bytes": tx_bytes,
            "rx_bytes": rx_bytes,
        }

    def _bytes(self) -> tuple[float, float]:
        """Relayed so far, each way, by relays that have ended and those that go on"""
        up, down = self._service.moving()
        return up + self._metrics.observed("proxy_tx_bytes"), down + self._metrics.observed("proxy_rx_bytes")
