"""The access records of a UDP association: its start, its end, and each destination once it is over."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from usocksd.access_log import SocksRecords, candidate_texts
from usocksd.decision import Decision
from usocksd.errors import Denied, Error
from usocksd.net.address import HostPort

if TYPE_CHECKING:
    from usocksd.association import ClientAssociation
    from usocksd.mapping import Destination

MESSAGES = ("association starts", "udp flow", "association ends")


class AssociationRecords:
    """The records of one association. They have the id and the client of its connection."""

    __slots__ = ("_access", "_relay", "_since")

    def __init__(self, access: SocksRecords, relay: HostPort, now: float) -> None:
        """`relay` is where the client sends its datagrams; `now` is on the reactor's clock."""
        self._access = access
        self._relay = relay
        self._since = now

    def starts(self) -> None:
        """The client has its reply."""
        self._access.event(logging.INFO, MESSAGES[0], relay_addr=str(self._relay))

    def flow_ends(self, destination: Destination, source: str | None, now: float) -> None:
        """A destination is over; `source` is the address and port that its datagrams left from."""
        decision = destination.decision
        ruling = None if decision is None else decision.ruling
        self._access.event(
            logging.INFO,
            MESSAGES[1],
            **_place(decision),
            dest_addr=str(HostPort(*destination.address)),
            src_addr=source,
            rule=None if ruling is None else ruling.rule,
            pool=None if ruling is None else ruling.pool,
            **_counts(destination),
            elapsed=round(now - destination.since, 6),
        )

    def other_flows_end(self, together: Destination, number: int, now: float) -> None:
        """These destinations had no record of their own."""
        self._access.event(
            logging.INFO,
            MESSAGES[1],
            dest_host="other destinations",
            dest_port=0,
            destinations=number,
            **_counts(together),
            elapsed=round(now - together.since, 6),
        )

    def flow_refused(self, decision: Decision | None, error: Error) -> None:
        """Datagrams to this destination are dropped."""
        more: dict[str, Any] = {}
        level, message = logging.ERROR, "udp flow failed"
        if isinstance(error, Denied):
            self._access.count_denied(error.rule)
            more, level, message = {"rule": error.rule}, logging.WARNING, "ruleset mismatch"
        self._access.event(level, message, **_place(decision), **more, error=str(error))

    def mapping_moves(self, pool: str, before: str, after: str | None) -> None:
        """The egress address is no longer on this host: from now on the client has another."""
        self._access.event(logging.WARNING, "egress address changes", pool=pool, before=before, after=after)

    def mapping_lost(self, pool: str, before: str, error: Error) -> None:
        """The egress address is no longer on this host, and there is no other."""
        self._access.event(logging.ERROR, "egress address is gone", pool=pool, before=before, error=str(error))

    def ends(self, association: ClientAssociation) -> None:
        """The association is over."""
        assert association.result is not None
        reason, by = association.result
        tx_bytes, rx_bytes = association.moved()
        self._access.event(
            logging.INFO,
            MESSAGES[2],
            relay_addr=str(self._relay),
            destinations=association.number,
            tx_bytes=tx_bytes,
            rx_bytes=rx_bytes,
            elapsed=round(association.reactor.now - self._since, 6),
            reason=reason.value,
            ended_by=by.value,
        )

    def describe(self) -> dict[str, Any]:
        """Its row of `connections`."""
        return self._access.describe()


def _place(decision: Decision | None) -> dict[str, Any]:
    """Where it goes, and for a name its addresses with what the rules say to each: `usocksd diff` reads them."""
    if decision is None:
        return {}
    found: dict[str, Any] = {"dest_host": decision.sent, "dest_port": decision.port}
    if decision.name is not None:
        found["dest_name"] = decision.name
        if decision.candidates is not None:
            found["candidates"] = candidate_texts(decision.candidates)
    return found


def _counts(destination: Destination) -> dict[str, int]:
    return {
        "tx_packets": destination.tx_packets,
        "rx_packets": destination.rx_packets,
        "tx_bytes": destination.tx_bytes,
        "rx_bytes": destination.rx_bytes,
    }
