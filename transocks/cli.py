"""The command line of transocks."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from transocks.config import Config
from usocksd.serve import worker
from usocksd.serve.plan import Daemon
from usocksd.serve.verbs.client import Operated

DAEMON = Daemon("transocks", Config, plan="transocks.commands.serve:plan", build="transocks.commands.serve:build")
OPERATED = Operated("transocks", "/etc/transocks.toml", "/run/transocks/control.sock", columns=("route", "upstream"))


def main(argv: Sequence[str] | None = None) -> int:
    """Run transocks with these arguments, or the process's; returns the exit status."""
    status = worker.run_if_told(DAEMON)
    if status is not None:
        return status
    # Not in workers: the command line and all verbs are several MB.
    from transocks.commands import check, doctor, rules  # noqa: PLC0415
    from transocks.commands import exec as exec_verb  # noqa: PLC0415
    from usocksd.serve.program import Program  # noqa: PLC0415
    from usocksd.serve.verbs.parsers import add_parsers  # noqa: PLC0415

    program = Program(
        DAEMON,
        "A transparent proxy: carries redirected TCP connections to their destinations through a proxy.",
        default=OPERATED.config,
        required=True,
        verbs=(
            exec_verb.add_parser,
            rules.add_parser,
            doctor.add_parser,
            check.add_parser,
            partial(add_parsers, daemon=OPERATED),
        ),
    )
    return program.main(argv)
