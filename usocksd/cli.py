"""The command line of usocksd."""

from __future__ import annotations

from collections.abc import Sequence

from usocksd.commands import serve
from usocksd.config import Config
from usocksd.runtime.program import Program


def main(argv: Sequence[str] | None = None) -> int:
    """Run usocksd with these arguments, or the process's; returns the exit status."""
    program = Program(
        "usocksd",
        "A SOCKS server (4, 4a, 5) with access control and a choice of egress address.",
        Config,
        serve.serve,
        default="/etc/usocksd.toml",
        required=False,
    )
    return program.main(argv)
