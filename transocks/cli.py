"""The command line of transocks."""

from __future__ import annotations

from collections.abc import Sequence

from transocks.commands import exec as exec_verb
from transocks.commands import serve
from transocks.config import Config
from usocksd.runtime.program import Program


def main(argv: Sequence[str] | None = None) -> int:
    """Run transocks with these arguments, or the process's; returns the exit status."""
    program = Program(
        "transocks",
        "A transparent proxy: carries redirected TCP connections to their destinations through a proxy.",
        Config,
        serve.serve,
        default="/etc/transocks.toml",
        required=True,
        verbs=(exec_verb.add_parser,),
    )
    return program.main(argv)
