"""The command line of usocksd."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from usocksd.config import Config
from usocksd.serve import worker
from usocksd.serve.plan import Daemon
from usocksd.serve.verbs.client import Operated

DAEMON = Daemon("usocksd", Config, plan="usocksd.commands.serve:plan", build="usocksd.commands.serve:build")
OPERATED = Operated(
    "usocksd", "/etc/usocksd.toml", "/run/usocksd/control.sock", columns=("peer", "user", "rule", "egress")
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run usocksd with these arguments, or the process's; returns the exit status."""
    status = worker.run_if_told(DAEMON)
    if status is not None:
        return status
    # Not in workers: the command line and all verbs are several MB.
    from usocksd.commands import check, diff, explain  # noqa: PLC0415
    from usocksd.serve.program import Program  # noqa: PLC0415
    from usocksd.serve.verbs.parsers import add_parsers  # noqa: PLC0415

    program = Program(
        DAEMON,
        "A SOCKS server (4, 4a, 5) with access control and a choice of egress address.",
        default=OPERATED.config,
        required=False,
        verbs=(
            check.add_parser,
            partial(explain.add_parser, daemon=OPERATED),
            diff.add_parser,
            partial(add_parsers, daemon=OPERATED),
        ),
    )
    return program.main(argv)
