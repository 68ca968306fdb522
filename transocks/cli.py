"""The command line of transocks."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from transocks.commands import check, doctor, rules
from transocks.commands import exec as exec_verb
from transocks.config import Config
from usocksd.runtime.processes.plan import Daemon
from usocksd.runtime.program import Program
from usocksd.runtime.verbs.client import Operated
from usocksd.runtime.verbs.parsers import add_parsers

DAEMON = Daemon("transocks", Config, plan="transocks.commands.serve:plan", build="transocks.commands.serve:build")
OPERATED = Operated("transocks", "/etc/transocks.toml", "/run/transocks/control.sock", columns=("route", "upstream"))


def main(argv: Sequence[str] | None = None) -> int:
    """Run transocks with these arguments, or the process's; returns the exit status."""
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
