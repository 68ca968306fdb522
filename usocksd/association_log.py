"""The access records of a UDP association: its start, its end, and each destination once it is over."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from usocksd.access_log import SocksRecords, candidate_texts
from usocksd.decision import Decision
from usocksd.errors import Denied, Error
from usocksd.net.address import HostPort, join_port

if TYPE_CHECKING:
    from usocksd.association import ClientAssociation
    from usocksd.mapping import Destination, Mapping

# Destinations beyond these share one record, so that a scan neither fills the disk nor takes the worker's time.
_MOST_RECORDS = 256


class Sum:
    """Datagrams and bytes of several destinations."""

    def __init__(self, since: float) -> None:
        self.since = since
        self.number = 0
        self.tx_packets = 0
        self.rx_packets = 0
        self.tx_bytes = 0
        self.rx_bytes = 0

    def add(self, destination: Destination) -> None:
        """One more."""
        self.number += 1
        self.tx_packets += destination.tx_packets
        self.rx_packets += destination.rx_packets
        self.tx_bytes += destination.tx_bytes
        self.rx_bytes += destination.rx_bytes


class AssociationRecords:
    """The records of one association. They have the id and the client of its connection."""

    __slots__ = ("_access", "_left", "_others", "_relay", "over")

    def __init__(self, access: SocksRecords, relay: HostPort, now: float) -> None:
        """`relay` is where the client sends its datagrams; `now` is on the reactor's clock."""
        self._access = access
        self._relay = relay
        self._left = _MOST_RECORDS
        self._others = Sum(now)
        self.over = Sum(now)
        """All destinations that are over."""

    def starts(self) -> None:
        """The client has its reply."""
        self._access.event(logging.INFO, "association starts", relay_addr=str(self._relay))

    def flow_ends(self, destination: Destination, mapping: Mapping, now: float) -> None:
        """A destination is over, which was reached by this mapping."""
        self.over.add(destination)
        if not self._left:
            self._others.add(destination)
            return
        self._left -= 1
        decision = destination.decision
        ruling = None if decision is None else decision.ruling
        self._access.event(
            logging.INFO,
            "udp flow",
            **_place(decision),
            dest_addr=join_port(*destination.address),
            src_addr=mapping.source_of(destination),
            rule=None if ruling is None else ruling.rule,
            pool=None if ruling is None else ruling.pool,
            **_counts(destination, now),
        )

    def flow_refused(self, decision: Decision | None, error: Error) -> None:
        """Datagrams to this destination are dropped."""
        denied = isinstance(error, Denied)
        more: dict[str, Any] = {}
        if isinstance(error, Denied):
            self._access.count_denied(error.rule)
            more = {"rule": error.rule}
        if self._left:
            self._left -= 1
            level, message = (logging.WARNING, "ruleset mismatch") if denied else (logging.ERROR, "udp flow failed")
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
        now = association.reactor.now
        if self._others.number:
            self._access.event(
                logging.INFO,
                "udp flow",
                dest_host="other destinations",
                dest_port=0,
                destinations=self._others.number,
                **_counts(self._others, now),
            )
        self._access.event(
            logging.INFO,
            "association ends",
            relay_addr=str(self._relay),
            destinations=self.over.number,
            **_counts(self.over, now),
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


def _counts(of: Destination | Sum, now: float) -> dict[str, Any]:
    return {
        "tx_packets": of.tx_packets,
        "rx_packets": of.rx_packets,
        "tx_bytes": of.tx_bytes,
        "rx_bytes": of.rx_bytes,
        "elapsed": round(now - of.since, 6),
    }
