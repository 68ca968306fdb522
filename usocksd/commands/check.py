"""usocksd check FILE: what there is to say about a configuration. See usocksd/serve/verbs/check.py."""

from __future__ import annotations

from usocksd.auth import Users
from usocksd.commands.parts import policy_of
from usocksd.config import UsocksdConfig
from usocksd.errors import ConfigError
from usocksd.lint import lint
from usocksd.notes import notes
from usocksd.serve.daemon import Remarks


def examine(config: UsocksdConfig, source: str | None) -> Remarks:
    """Warnings and notes; with `source`, its file, also about that and about the file of users."""
    error = None
    if source is not None and config.auth.users_file is not None:
        try:
            Users(config.auth.users_file)
        except ConfigError as raised:
            error = raised
    return Remarks(lint(config), notes(config, lambda: policy_of(config)), error)
