"""Does transocks accept where its configuration says?"""

from __future__ import annotations

from collections.abc import Iterator

from transocks.doctor.finding import Finding, fault, fine, unchecked
from transocks.doctor.seen import Seen
from transocks.doctor.tried import Trials


def listeners(seen: Seen, trials: Trials) -> Iterator[Finding]:
    """Each listener of the configuration; where connections arrive, `answers` tells better."""
    if seen.listeners is None:
        yield unchecked("listeners", "the kernel does not tell which sockets listen (sock_diag)")
        return
    if trials.arrived:
        return
    for listen in (*seen.config.listen, *seen.config.listen_tproxy):
        if seen.listener(listen.address, listen.port) is not None:
            yield fine("listeners", f"somebody accepts on {listen}")
        elif not listen.optional or listen.address.version == 4:
            yield fault("listeners", f"nobody accepts on {listen}", "start transocks")
