"""The access records of transparent UDP: the start and the end of each association, and each flow when it is over."""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING, Any, Final

from transocks.access_log import AccessLog
from transocks.upstreams.proxy_url import ProxyScheme
from usocksd.errors import Error
from usocksd.log.access import pair_member
from usocksd.net.address import HostPort
from usocksd.net.dial import Target
from usocksd.net.ending import Reason, Side
from usocksd.net.endpoint import Endpoint

if TYPE_CHECKING:
    from transocks.udp.flow import ClientFlow
    from transocks.udp.outlets import Outlet

_log = logging.getLogger(__name__)

DIRECT: Final = "direct"
# Flows of an association beyond these share one record, so that a scan does not fill the disk.
_MOST_RECORDS: Final = 1024


class UdpRecords:
    """The records of one association. It is told what happens, and is asked nothing."""

    __slots__ = (
        "_client",
        "_destination",
        "_group",
        "_id",
        "_log",
        "_others",
        "_proxy",
        "_recorded",
        "_route",
        "_since",
        "_source",
        "_started",
        "_tries",
        "_upstream",
    )

    def __init__(self, access_log: AccessLog, client: HostPort, destination: HostPort, route: str, now: float) -> None:
        """`destination` and `route` are those of its first datagram."""
        self._log = access_log
        self._id = next(access_log.ids)
        self._client = pair_member(client.host, client.port)
        self._destination = str(destination)
        self._route = route
        self._group: str | None = None
        self._upstream: str | None = None
        self._tries = 0
        self._source: str | None = None
        self._proxy: str | None = None
        self._since = now
        self._started = False
        self._recorded = 0
        self._others = [0, 0, 0, 0, 0]
        """Flows that share a record: their number, datagrams each way, bytes each way"""

    # ---- as Progress of upstreams/request.py

    def trying(self, group: str, upstream: str, scheme: ProxyScheme | None) -> None:
        """A try begins, with this upstream of this group."""
        self._group = group
        self._upstream = upstream
        self._tries += 1
        self._source = self._proxy = None

    def connected(self, endpoint: Endpoint, proxy: Target) -> None:
        """There is a connection to the upstream."""

    # ----

    def goes_directly(self) -> None:
        """Its datagrams are sent past the proxies."""
        self._group = self._upstream = DIRECT
        self._tries += 1

    def starts(self, outlet: Outlet) -> None:
        """There is a way for its datagrams, or another one."""
        host, port = outlet.sock.getsockname()[:2]
        self._source = pair_member(host, port)
        self._proxy = outlet.peer()
        self._event("association goes on" if self._started else "association starts", tries=self._tries)
        self._started = True
        self._tries = 0

    def upstream_ended(self) -> None:
        """The proxy has ended it; another one is asked when there is a datagram again."""
        self._event("association is lost")

    def refused(self, error: Error) -> None:
        """There is no way for its datagrams."""
        self._log.not_connected(error)
        self._event("failed to connect to proxy server", logging.ERROR, tries=self._tries or None, error=str(error))
        self._tries = 0

    def flow_ends(self, flow: ClientFlow, now: float) -> None:
        """A flow is over."""
        if not self._started:
            return
        if self._recorded >= _MOST_RECORDS:
            numbers = (1, flow.tx_packets, flow.rx_packets, flow.tx_bytes, flow.rx_bytes)
            self._others = [sum(pair) for pair in zip(self._others, numbers, strict=True)]
            return
        self._recorded += 1
        self._event(
            "udp flow",
            dest_addr=str(flow.place),
            route=flow.route,
            tx_packets=flow.tx_packets,
            rx_packets=flow.rx_packets,
            tx_bytes=flow.tx_bytes,
            rx_bytes=flow.rx_bytes,
            elapsed=round(now - flow.since, 6),
        )

    def ends(self, result: tuple[Reason, Side], tx_bytes: int, rx_bytes: int, now: float) -> None:
        """It is over, after its flows."""
        if not self._started:
            return
        number, *others = self._others
        if number:
            keys = ("tx_packets", "rx_packets", "tx_bytes", "rx_bytes")
            self._event(
                "udp flow", dest_host="other destinations", destinations=number, **dict(zip(keys, others, strict=True))
            )
        reason, by = result
        self._event(
            "association ends",
            destinations=self._recorded + number,
            tx_bytes=tx_bytes,
            rx_bytes=rx_bytes,
            elapsed=round(now - self._since, 6),
            reason=reason.value,
            ended_by=by.value,
        )

    def describe(self) -> dict[str, Any]:
        """Its row of `connections`."""
        return {
            "id": self._id,
            "client": self._client,
            "destination": self._destination,
            "name": None,
            "user": None,
            "rule": None,
            "egress": None,
            "route": self._route,
            "upstream": self._upstream,
            "age": time.monotonic() - self._since,
        }

    def _event(self, message: str, level: int = logging.INFO, **more: object) -> None:
        if not _log.isEnabledFor(level):
            return
        fields = {
            "type": "access",
            "request_id": self._id,
            "client_addr": self._client,
            "group": self._group,
            "upstream": self._upstream,
            "src_addr": self._source,
            "upstream_addr": self._proxy,
            **more,
        }
        _log.log(level, message, extra={"fields": {key: value for key, value in fields.items() if value is not None}})
