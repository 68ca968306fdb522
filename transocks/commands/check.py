"""transocks check FILE: every fault and every warning of a configuration. See usocksd/serve/verbs/check.py."""

from __future__ import annotations

import argparse

from transocks.config import Config
from usocksd.serve.verbs import check


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add this verb to the command line."""
    check.add_parser(subparsers, check.Checked("transocks", Config, "/etc/transocks.toml", True, _examine))


def _examine(config: Config, source: str | None) -> check.Examined:
    # Not for the command lines of other verbs: trio and what it needs take a tenth of a second to load.
    from transocks.lint import lint  # noqa: PLC0415

    return check.Examined(config.common(), lint(config, source))
