"""usocksd check FILE: every fault and every warning of a configuration. See usocksd/serve/verbs/check.py."""

from __future__ import annotations

import argparse

from usocksd.config import Config
from usocksd.errors import ConfigError
from usocksd.serve.verbs import check


def add_parser(
    subparsers: argparse._SubParsersAction[argparse.ArgumentParser], default: str = "/etc/usocksd.toml"
) -> None:
    """Add this verb to the command line; `default` is the file that need not be there."""
    check.add_parser(subparsers, check.Checked("usocksd", Config, default, False, _examine))


def _examine(config: Config, source: str | None) -> check.Examined:
    # Not for the command lines of other verbs: trio and what it needs take a tenth of a second to load.
    from usocksd.auth import Users  # noqa: PLC0415
    from usocksd.commands.parts import policy_of  # noqa: PLC0415
    from usocksd.everyone import notes  # noqa: PLC0415
    from usocksd.lint import lint  # noqa: PLC0415

    error = None
    if config.auth.users_file is not None:
        try:
            Users(config.auth.users_file)
        except ConfigError as exc:
            error = exc
    return check.Examined(config.common(), lint(config, source), error, notes(config, lambda: policy_of(config)))
