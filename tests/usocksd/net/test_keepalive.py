"""Signs of life: asked for in time, and for nothing where connections are short."""

import socket
from pathlib import Path
from typing import Any

import pytest

from usocksd.net.ending import Limits, Reason
from usocksd.net.endpoint import Endpoint
from usocksd.net.flow import Flow
from usocksd.net.keepalive import KeepAlive, KeepAliveTiming, tcp_timers

_KEEPALIVE = (
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE),
    (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE),
    (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL),
    (socket.IPPROTO_TCP, socket.TCP_KEEPCNT),
)


def _asked(endpoint: Endpoint) -> list[int]:
    return [endpoint.sock.getsockopt(*option) for option in _KEEPALIVE]


@pytest.mark.parametrize("busy", [True, False])
async def test_keepalive_from_the_second_minute_on(lab: Any, *, busy: bool) -> None:
    """Setting it would take eight system calls for every connection."""
    rig = lab.relay(limits=Limits(idle=3600.0))
    await lab.pass_time(59.0)
    if busy:
        await rig.client.send(b"x")
        assert await rig.upstream.receive(1) == b"x"
    assert _asked(rig.far)[0] == 0
    await lab.pass_time(1.0)
    assert _asked(rig.far) == _asked(rig.near) == [1, 180, 10, 6]
    await lab.pass_time(3000.0)
    assert rig.outcome is None


async def test_keepalive_before_connection_tracking_forgets(lab: Any) -> None:
    timers = {"established": 20, "fin_wait": 12, "close_wait": 8}
    keepalive = KeepAlive(timers=lambda _: timers)
    assert keepalive.look()
    assert not keepalive.look()
    rig = lab.relay(limits=Limits(idle=3600.0, keepalive=keepalive))
    await lab.pass_time(5.0)
    assert _asked(rig.far) == _asked(rig.near) == [1, 5, 5, 12]
    timers["established"] = 8
    assert keepalive.look()
    for flow in {id(h): h for h in lab.reactor.handlers.values() if isinstance(h, Flow)}.values():
        flow.pair.keep_alive()
    assert _asked(rig.far) == _asked(rig.near) == [1, 2, 2, 30]


@pytest.mark.parametrize("first", ["client", "upstream"])
async def test_keepalive_of_half_closed_pairs(lab: Any, first: str) -> None:
    """Both sides are probed, if the other direction has not ended at once, as most do."""
    rig = lab.relay(limits=Limits(idle=3600.0, half_closed=300.0))
    one, other = (rig.client, rig.upstream) if first == "client" else (rig.upstream, rig.client)
    one.end()
    assert await other.rest() == (b"", True)
    await lab.pass_time(0.9)
    assert _asked(rig.near)[0] == _asked(rig.far)[0] == 0
    await lab.pass_time(0.1)
    assert _asked(rig.near) == _asked(rig.far) == [1, 15, 10, 6]
    await lab.pass_time(298.0)
    assert rig.outcome is None
    await lab.pass_time(1.0)
    assert (await rig.result()).reason is Reason.HALF_CLOSED


def test_the_keepalive_setting() -> None:
    assert KeepAlive(30).open == KeepAliveTiming(30, 10, 6)
    assert KeepAlive(5).half == KeepAliveTiming(5, 5, 12, longest=30)
    # Hosts behind this one may have the kernel's defaults.
    patient = KeepAlive(timers=lambda _: {"established": 432_000, "fin_wait": 3600, "close_wait": 3600})
    patient.look()
    assert patient.half == KeepAlive().half


def test_timers_of_connection_tracking(tmp_path: Path) -> None:
    assert tcp_timers(folder=tmp_path) == {}
    (tmp_path / "nf_conntrack_tcp_timeout_close_wait").write_text("60\n")
    (tmp_path / "nf_conntrack_tcp_timeout_fin_wait").write_text("")
    assert tcp_timers(folder=tmp_path) == {"close_wait": 60}
