"""The two ways in for operators, the metrics endpoint and the control socket: opened, moved and closed."""

from __future__ import annotations

import logging
import socket
from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import trio

from usocksd.net.listeners import ListenError, listen
from usocksd.serve.channel import restore_socket
from usocksd.serve.control import Control, ControlError, Handlers
from usocksd.serve.plan import MetricsAddress, Plan
from usocksd.serve.report import Reporter
from usocksd.serve.timing import Timing

if TYPE_CHECKING:
    from usocksd.serve.exporter import Exporter

log = logging.getLogger(__name__)


class Doors:
    """Opens and closes both as the configuration in force says. If another process has the address or path, for example
    an earlier daemon that still drains, it is taken over once it is free.
    """

    def __init__(self, name: str, nursery: trio.Nursery, report: Reporter, handlers: Handlers, timing: Timing) -> None:
        self._name = name
        self._nursery = nursery
        self._report = report
        self._handlers = handlers
        self._timing = timing
        self._plan: Plan | None = None
        """The plan of the configuration in force"""
        self._exporter: Exporter | None = None
        self._control: Control | None = None
        self._trying = trio.CancelScope()

    def prepare(self, address: MetricsAddress | None) -> Exporter | None:
        """The metrics endpoint for a new configuration: the present one if its addresses are the same.

        Raises ListenError if the port is required and can't be had.
        """
        if address is None:
            return None
        present = None if self._plan is None else self._plan.metrics
        if self._exporter is not None and present is not None and address[:2] == present[:2]:
            return self._exporter
        try:
            return self._open_metrics(address)
        except ListenError as error:
            if address.required:
                raise
            log.warning("no metrics endpoint", extra={"fields": {"error": str(error)}})
            return None

    def drop(self, exporter: Exporter | None) -> None:
        """Close what `prepare` has returned, unless it is in use."""
        if exporter is not None and exporter is not self._exporter:
            exporter.close()

    def commit(self, exporter: Exporter | None, plan: Plan) -> None:
        """The configuration with this plan is in force; `prepare` has returned this exporter for it."""
        old, self._plan = self._exporter, plan
        if exporter is not old:
            self._serve_metrics(exporter)
            self.drop(old)
        if self._control is not None and self._control.path != plan.control:
            self._control.close()  # the request for this reload may have come by it, and is still answered
            self._control = None
        if self._control is None and plan.control is not None:
            try:
                self._serve_control(Control.open(plan.control, self._name, self._handlers))
            except ControlError as error:
                log.warning("no control socket", extra={"fields": {"error": str(error)}})
        self._trying.cancel()
        self._nursery.start_soon(self._open_missing)

    def close(self) -> None:
        """The daemon has ended."""
        self._trying.cancel()
        for server in (self._control, self._exporter):
            if server is not None:
                server.close()

    def filenos(self) -> list[int]:
        """Every descriptor"""
        return [fd for server in (self._control, self._exporter) if server is not None for fd in server.filenos()]

    def hand_over(self) -> dict[str, Any]:
        """The state for `take_over` in this process's next program, as JSON values."""
        control = self._control
        return {
            "metrics": None if self._exporter is None else self._exporter.filenos(),
            "control": None if control is None else [*control.filenos(), *control.inode],
        }

    def take_over(self, state: dict[str, Any], plan: Plan) -> None:
        """Continue with the doors of this process's previous program; `plan` is in force."""
        self._plan = plan
        if state["metrics"] is not None:
            self._serve_metrics(self._export([restore_socket(fd) for fd in state["metrics"]]))
        if state["control"] is not None and plan.control is not None:
            fd, device, number = state["control"]
            self._serve_control(Control(plan.control, restore_socket(fd), (device, number), self._handlers))
        self._nursery.start_soon(self._open_missing)

    def _export(self, sockets: Sequence[socket.socket]) -> Exporter:
        from usocksd.serve.exporter import Exporter  # noqa: PLC0415  (a third of a start's CPU, and not everybody's)

        return Exporter(sockets, self._report.collect, lambda: self._report.health)

    def _open_metrics(self, address: MetricsAddress) -> Exporter:
        if self._exporter is None or self._exporter.addresses[0].port != address.port:
            # As in listening.py: with SO_REUSEPORT alone, another instance's port would be shared unnoticed.
            for host in address.hosts:
                listen(host, address.port).close()
        sockets: list[socket.socket] = []
        try:
            for host in address.hosts:
                # If the kernel chooses the port, it does so for the first.
                port = address.port or (sockets[0].getsockname()[1] if sockets else 0)
                sockets.append(listen(host, port, reuse_port=True))
        except ListenError:
            for sock in sockets:
                sock.close()
            raise
        return self._export(sockets)

    def _serve_metrics(self, exporter: Exporter | None) -> None:
        self._exporter = exporter
        self._report.metrics_address = None
        if exporter is not None:
            self._report.metrics_address = ", ".join(map(str, exporter.addresses))
            self._nursery.start_soon(exporter.serve)

    def _serve_control(self, control: Control) -> None:
        self._control = control
        self._nursery.start_soon(control.serve)

    @property
    def _missing(self) -> tuple[MetricsAddress | None, str | None]:
        """The addresses at which the metrics endpoint and the control socket should be and are not."""
        plan = self._plan
        if plan is None:
            return None, None
        return plan.metrics if self._exporter is None else None, plan.control if self._control is None else None

    async def _open_missing(self) -> None:
        """Try again until both are open."""
        with trio.CancelScope() as self._trying:
            while any(self._missing):
                await trio.sleep(self._timing.open_again)
                metrics, control = self._missing
                if metrics is not None:
                    with suppress(ListenError):
                        self._serve_metrics(self._open_metrics(metrics))
                        address = self._report.metrics_address
                        log.info("metrics endpoint is open now", extra={"fields": {"address": address}})
                if control is not None:
                    with suppress(ControlError):
                        self._serve_control(Control.open(control, self._name, self._handlers))
                        log.info("control socket is open now", extra={"fields": {"path": control}})
