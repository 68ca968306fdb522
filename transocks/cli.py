"""The command line of transocks."""

from __future__ import annotations

from collections.abc import Sequence

from transocks.config import TransocksConfig
from transocks.flags import FLAGS
from usocksd.serve.daemon import Daemon, Subparsers, run

TRANSOCKS = Daemon(
    name="transocks",
    description="A transparent proxy: carries redirected TCP connections to their destinations through a proxy.",
    config=TransocksConfig,
    file="/etc/transocks.toml",
    file_required=True,
    control="/run/transocks/control.sock",
    columns=("route", "upstream"),
    flags=FLAGS,
    examine="transocks.commands.serve:examine",
    build="transocks.commands.serve:build",
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run transocks with these arguments, or the process's; returns the exit status."""
    return run(TRANSOCKS, add_verbs, argv)


def add_verbs(subparsers: Subparsers) -> None:
    """Add all verbs to the command line."""
    from transocks.commands import doctor, rules  # noqa: PLC0415
    from transocks.commands import exec as exec_verb  # noqa: PLC0415
    from usocksd.serve.verbs import check, install, parsers  # noqa: PLC0415

    exec_verb.add_parser(subparsers)
    rules.add_parser(subparsers)
    doctor.add_parser(subparsers)
    check.add_parser(subparsers, TRANSOCKS)
    parsers.add_parsers(subparsers, TRANSOCKS)
    install.add_parsers(subparsers, TRANSOCKS.name)
