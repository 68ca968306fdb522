"""The two doors by which operators come in: the metrics endpoint and the control socket."""

from __future__ import annotations

import errno
import logging
import socket
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import trio

from usocksd.log.metrics import Snapshot
from usocksd.net.address import join_port
from usocksd.net.listeners import ListenError, listen
from usocksd.serve.channel import restore_socket
from usocksd.serve.control import ControlError, ControlSocket, Handlers
from usocksd.serve.exporter import Exporter
from usocksd.serve.plan import Metering
from usocksd.serve.report import Report
from usocksd.serve.timing import Timing

log = logging.getLogger(__name__)


class Doors:
    """Open and closed as the configuration in force says.

    What another process has, an earlier daemon that still drains for example, is taken over once it is free.
    """

    def __init__(self, name: str, nursery: trio.Nursery, report: Report, handlers: Handlers, timing: Timing) -> None:
        self._name = name
        self._timing = timing
        self._nursery = nursery
        self._report = report
        self._handlers = handlers
        self._exporter: Exporter | None = None
        self._metering: Metering | None = None
        self._control: ControlSocket | None = None
        self._control_path: str | None = None
        """Where it is, or should be."""
        self._serving = trio.CancelScope()
        self._trying = trio.CancelScope()

    def prepare(self, metering: Metering | None) -> Exporter | None:
        """The metrics endpoint of a configuration to come: the present one if it is the same.

        Raises ListenError when the port was asked for and can't be had.
        """
        if metering is None:
            return None
        present = self._metering
        if self._exporter is not None and present is not None and metering[:2] == present[:2]:
            return self._exporter
        try:
            return self._open_metrics(metering)
        except ListenError as error:
            if metering.required:
                raise
            log.warning("no metrics endpoint", extra={"fields": {"error": str(error)}})
            return None

    def drop(self, exporter: Exporter | None) -> None:
        """What `prepare` gave is not wanted after all."""
        if exporter is not None and exporter is not self._exporter:
            exporter.close()

    def commit(self, exporter: Exporter | None, metering: Metering | None, control: str | None) -> None:
        """That configuration is in force; `control` is the path of its control socket."""
        old, self._exporter, self._metering = self._exporter, exporter, metering
        self.drop(old)
        self._report.metrics_address = None if exporter is None else _where(exporter)
        if self._control is not None and self._control.path != control:
            self._control.close()  # whoever has asked for this reload there is answered
            self._control = None
        self._control_path = control
        if self._control is None and control is not None:
            try:
                self._serve(ControlSocket.open(control, self._name))
            except ControlError as error:
                log.warning("no control socket", extra={"fields": {"error": str(error)}})
        self._try_again()

    def close(self) -> None:
        """The daemon has ended."""
        self._serving.cancel()
        self._trying.cancel()
        if self._control is not None:
            self._control.close()
        if self._exporter is not None:
            self._exporter.close()

    def filenos(self) -> list[int]:
        """Every descriptor."""
        metrics = [] if self._exporter is None else self._exporter.filenos()
        return metrics if self._control is None else [*metrics, self._control.fileno()]

    def hand_over(self) -> dict[str, Any]:
        """What `take_over` needs in the program that this process is about to become; as JSON values."""
        control = self._control
        return {
            "metrics": None if self._exporter is None else self._exporter.filenos(),
            "metering": self._metering,
            "control": None if control is None else [control.path, control.fileno(), *control.inode],
            "control_path": self._control_path,
        }

    def take_over(self, state: dict[str, Any]) -> None:
        """Go on with the doors of the program that this process was."""
        if state["metrics"] is not None:
            self._exporter = self._export([restore_socket(fd) for fd in state["metrics"]])
            self._report.metrics_address = _where(self._exporter)
        if state["metering"] is not None:
            hosts, port, required = state["metering"]
            self._metering = Metering(tuple(hosts), port, required)
        if state["control"] is not None:
            path, fd, *inode = state["control"]
            self._serve(ControlSocket(path, restore_socket(fd), (inode[0], inode[1])))
        self._control_path = state["control_path"]
        self._try_again()

    def _open_metrics(self, metering: Metering) -> Exporter:
        if self._exporter is None or self._exporter.address[1] != metering.port:
            # As in slots.py: with SO_REUSEPORT alone, another instance's port would be shared unnoticed.
            for host in metering.hosts:
                listen(host, metering.port).close()
        sockets: list[socket.socket] = []
        try:
            for host in metering.hosts:
                # Port 0 is of the kernel's choice, for the first.
                port = metering.port or (sockets[0].getsockname()[1] if sockets else 0)
                sockets.append(listen(host, port, reuse_port=True))
            return self._export(sockets)
        except (ListenError, OSError) as error:
            for sock in sockets:
                sock.close()
            if isinstance(error, OSError):  # no descriptors left, say
                raise ListenError(join_port(metering.hosts[0], metering.port), error.errno or errno.EIO) from None
            raise

    def _try_again(self) -> None:
        """Until every door is open, or another configuration is in force."""
        self._trying.cancel()
        if self._is_open:
            return
        scope = self._trying = trio.CancelScope()

        async def keep_trying() -> None:
            with scope:
                while not self._is_open:
                    await trio.sleep(self._timing.open_again)
                    self._open_missing()

        self._nursery.start_soon(keep_trying)

    @property
    def _is_open(self) -> bool:
        metrics = self._metering is None or self._exporter is not None
        return metrics and (self._control_path is None or self._control is not None)

    def _open_missing(self) -> None:
        if self._metering is not None and self._exporter is None:
            with suppress(ListenError):
                self._exporter = self._open_metrics(self._metering)
                address = self._report.metrics_address = _where(self._exporter)
                log.info("metrics endpoint is there now", extra={"fields": {"address": address}})
        if self._control_path is not None and self._control is None:
            with suppress(ControlError):
                self._serve(ControlSocket.open(self._control_path, self._name))
                log.info("control socket is there now", extra={"fields": {"path": self._control_path}})

    def _export(self, sockets: Sequence[socket.socket]) -> Exporter:
        token = trio.lowlevel.current_trio_token()

        def collect() -> Snapshot:
            return trio.from_thread.run_sync(self._report.collect, trio_token=token)

        first, *others = sockets
        return Exporter(first, collect, lambda: self._report.health, others)

    def _serve(self, control: ControlSocket) -> None:
        self._control = control
        scope = self._serving = trio.CancelScope()

        async def serve() -> None:
            with scope:
                await control.serve(self._handlers)

        self._nursery.start_soon(serve)


def _where(exporter: Exporter) -> str:
    return ", ".join(join_port(*address) for address in exporter.addresses)
