"""transocks check FILE: what there is to say about a configuration. See usocksd/serve/verbs/check.py."""

from __future__ import annotations

from transocks.config import TransocksConfig
from transocks.lint import lint
from usocksd.serve.daemon import Remarks


def examine(config: TransocksConfig, source: str | None) -> Remarks:
    """Warnings; with `source`, its file, also about that."""
    return Remarks(lint(config, source))
