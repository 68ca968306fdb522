"""The command line of usocksd."""

from __future__ import annotations

from collections.abc import Sequence

from usocksd.config import UsocksdConfig
from usocksd.serve.daemon import Daemon, Subparsers, run

USOCKSD = Daemon(
    name="usocksd",
    description="A SOCKS server (4, 4a, 5) with access control and a choice of egress address.",
    config=UsocksdConfig,
    file="/etc/usocksd.toml",
    file_required=False,
    control="/run/usocksd/control.sock",
    columns=("peer", "user", "rule", "egress"),
    verbs=("explain",),
    examine="usocksd.commands.serve:examine",
    build="usocksd.commands.serve:build",
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run usocksd with these arguments, or the process's; returns the exit status."""
    return run(USOCKSD, _add_verbs, argv)


def _add_verbs(subparsers: Subparsers) -> None:
    from usocksd.commands import diff, explain  # noqa: PLC0415
    from usocksd.serve.verbs import check, install, parsers  # noqa: PLC0415

    check.add_parser(subparsers, USOCKSD)
    explain.add_parser(subparsers, USOCKSD)
    diff.add_parser(subparsers)
    parsers.add_parsers(subparsers, USOCKSD)
    install.add_parsers(subparsers, USOCKSD.name)
