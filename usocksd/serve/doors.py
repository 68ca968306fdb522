"""The two doors by which operators come in: the metrics endpoint and the control socket."""

from __future__ import annotations

import logging
import socket
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import trio

from usocksd.net.address import join_port
from usocksd.net.listeners import ListenError, listen
from usocksd.serve.channel import restore_socket
from usocksd.serve.control import Control, ControlError, Handlers
from usocksd.serve.exporter import Exporter
from usocksd.serve.plan import MetricsAddress
from usocksd.serve.report import Reporter
from usocksd.serve.timing import Timing

log = logging.getLogger(__name__)


class Doors:
    """Open and closed as the configuration in force says.

    An address or path that another process has, an earlier daemon that still drains for example, is taken over once it
    is free.
    """

    def __init__(self, name: str, nursery: trio.Nursery, report: Reporter, handlers: Handlers, timing: Timing) -> None:
        self._name = name
        self._nursery = nursery
        self._report = report
        self._handlers = handlers
        self._timing = timing
        self._exporter: Exporter | None = None
        self._metering: MetricsAddress | None = None
        self._control: Control | None = None
        self._control_path: str | None = None
        """Where it is, or should be"""
        self._trying = trio.CancelScope()

    def prepare(self, metering: MetricsAddress | None) -> Exporter | None:
        """The metrics endpoint for a configuration to come: the present one if it is at the same place.

        Raises ListenError if the port is required and can't be had.
        """
        if metering is None:
            return None
        if self._exporter is not None and self._metering is not None and metering[:2] == self._metering[:2]:
            return self._exporter
        try:
            return self._open_metrics(metering)
        except ListenError as error:
            if metering.required:
                raise
            log.warning("no metrics endpoint", extra={"fields": {"error": str(error)}})
            return None

    def drop(self, exporter: Exporter | None) -> None:
        """Close what `prepare` has returned, unless it is in use."""
        if exporter is not None and exporter is not self._exporter:
            exporter.close()

    def commit(self, exporter: Exporter | None, metering: MetricsAddress | None, control: str | None) -> None:
        """That configuration is in force; `control` is the path of its control socket."""
        old, self._metering = self._exporter, metering
        if exporter is not old:
            self._serve_metrics(exporter)
            self.drop(old)
        if self._control is not None and self._control.path != control:
            self._control.close()  # whoever has asked for this reload there is answered
            self._control = None
        self._control_path = control
        if self._control is None and control is not None:
            try:
                self._serve_control(Control.open(control, self._name, self._handlers))
            except ControlError as error:
                log.warning("no control socket", extra={"fields": {"error": str(error)}})
        self._try_again()

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
        """What `take_over` needs in the program that this process is about to become; as JSON values."""
        control = self._control
        return {
            "metrics": None if self._exporter is None else self._exporter.filenos(),
            "metering": self._metering,
            "control": None if control is None else [control.path, *control.filenos(), *control.inode],
            "control_path": self._control_path,
        }

    def take_over(self, state: dict[str, Any]) -> None:
        """Go on with the doors of the program that this process was."""
        if state["metrics"] is not None:
            self._serve_metrics(self._export([restore_socket(fd) for fd in state["metrics"]]))
        if state["metering"] is not None:
            hosts, port, required = state["metering"]
            self._metering = MetricsAddress(tuple(hosts), port, required)
        if state["control"] is not None:
            path, fd, *inode = state["control"]
            self._serve_control(Control(path, restore_socket(fd), (inode[0], inode[1]), self._handlers))
        self._control_path = state["control_path"]
        self._try_again()

    def _export(self, sockets: Sequence[socket.socket]) -> Exporter:
        return Exporter(sockets, self._report.collect, lambda: self._report.health)

    def _open_metrics(self, metering: MetricsAddress) -> Exporter:
        if self._exporter is None or self._exporter.addresses[0][1] != metering.port:
            # As in slots.py: with SO_REUSEPORT alone, another instance's port would be shared unnoticed.
            for host in metering.hosts:
                listen(host, metering.port).close()
        sockets: list[socket.socket] = []
        try:
            for host in metering.hosts:
                # If the kernel chooses the port, it does so for the first.
                port = metering.port or (sockets[0].getsockname()[1] if sockets else 0)
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
            self._report.metrics_address = ", ".join(join_port(*address) for address in exporter.addresses)
            self._nursery.start_soon(exporter.serve)

    def _serve_control(self, control: Control) -> None:
        self._control = control
        self._nursery.start_soon(control.serve)

    def _try_again(self) -> None:
        """Until both doors are open, or another configuration is in force."""
        self._trying.cancel()
        scope = self._trying = trio.CancelScope()

        async def keep_trying() -> None:
            with scope:
                while self._missing:
                    await trio.sleep(self._timing.open_again)
                    self._open_missing()

        if self._missing:
            self._nursery.start_soon(keep_trying)

    @property
    def _missing(self) -> bool:
        metrics = self._metering is not None and self._exporter is None
        return metrics or (self._control_path is not None and self._control is None)

    def _open_missing(self) -> None:
        if self._metering is not None and self._exporter is None:
            with suppress(ListenError):
                self._serve_metrics(self._open_metrics(self._metering))
                address = self._report.metrics_address
                log.info("metrics endpoint is there now", extra={"fields": {"address": address}})
        if self._control_path is not None and self._control is None:
            with suppress(ControlError):
                self._serve_control(Control.open(self._control_path, self._name, self._handlers))
                log.info("control socket is there now", extra={"fields": {"path": self._control_path}})
