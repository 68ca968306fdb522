"""The flags of transocks for a first try, and the settings that they stand for."""

from __future__ import annotations

from collections.abc import Sequence

from transocks.rules.redirection import MARK
from usocksd.settings.flags import Flag, Settings

# By mode of the rules: where they send connections.
_LISTEN = {"host": {}, "gateway": {"listen": ":1081"}, "tproxy": {"listen_tproxy": "localhost:1084"}}


def one_or_list(values: Sequence[str]) -> object:
    """As proxy_url takes it."""
    return values[0] if len(values) == 1 else list(values)


def _mode(values: Sequence[str]) -> Settings:
    if len(values) > 1 or values[0] not in _LISTEN:
        raise ValueError(f"expected one of {', '.join(_LISTEN)}")
    return _LISTEN[values[0]] | {"mark": MARK, "rules.mode": values[0]}


FLAGS = (
    Flag(
        name="--via",
        metavar="URL",
        help="the proxy: socks5h://HOST:PORT, http://HOST:PORT or another (docs/upstreams.md); again for one to"
        " replace it",
        settings=lambda values: {"proxy_url": one_or_list(values)},
        required=True,
    ),
    Flag(
        name="--mode",
        metavar="MODE",
        help="what `transocks rules` would redirect with the file of --print-config: host (this host's connections),"
        " gateway or tproxy (those that are routed through it)",
        settings=_mode,
    ),
)
