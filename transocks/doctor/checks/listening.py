"""Does transocks accept where the rules bring connections to?"""

from __future__ import annotations

from collections.abc import Iterator

from transocks.doctor.finding import Finding, fault, fine, unchecked
from transocks.doctor.flows import Flow, Flows, Mode, local_ends
from transocks.doctor.seen import Seen
from usocksd.runtime.hostport import join_port


def listeners(seen: Seen, flows: Flows) -> Iterator[Finding]:
    """Every address that connections are redirected to has a listener; TPROXY's is a transparent one."""
    if seen.listeners is None:
        yield unchecked("listeners", "the kernel does not tell which sockets listen (sock_diag)")
        return
    for flow in flows.arriving:
        yield from _of_flow(flow, seen)
    if not flows.arriving:
        for listen in seen.config.listen:
            if seen.listener(listen.address, listen.port) is not None:
                yield fine("listeners", f"somebody accepts on {listen}")
            elif not listen.optional or listen.address.version == 4:
                yield fault("listeners", f"nobody accepts on {listen}", "start transocks")


def _of_flow(flow: Flow, seen: Seen) -> Iterator[Finding]:
    port = flow.target.action.port
    assert port is not None
    name = f"{flow.mode.value}, IPv{flow.version}"
    ends = local_ends(flow, seen)
    missing = [join_port(address, port) for address in ends if seen.listener(address, port) is None]
    if missing:
        anywhere = any(listener.port == port for listener in seen.listeners or ())
        setting = "listen_tproxy" if flow.mode is Mode.TPROXY else "listen"
        wanted = f'"localhost:{port}"' if flow.mode is Mode.HOST else f'":{port}"'
        yield fault(
            "listeners", f"{name}: the rules send connections to {', '.join(missing[:3])}, where nobody accepts",
            f"set {setting} = {wanted}" if anywhere else f"start transocks, with {setting} = {wanted}",
        )  # fmt: skip
        return
    found = [listener for listener in (seen.listener(address, port) for address in ends) if listener is not None]
    if flow.mode is Mode.TPROXY and any(listener.transparent is False for listener in found):
        yield fault(
            "listeners", f"{name}: the socket on port {port} lacks IP_TRANSPARENT, and TPROXY passes it over",
            "name the port in listen_tproxy",
        )  # fmt: skip
    elif found:
        yield fine("listeners", f"{name}: accepted on port {port}")
    else:
        yield unchecked("listeners", f"{name}: which address of {flow.packet.iif} connections are redirected to")
