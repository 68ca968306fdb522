"""Resets redirected connections before their rules are removed: without those, their packets would leave in clear.

SOCK_DESTROY of sock_diag(7), as with `ss --kill`: the kernel resets the client while the translation still exists.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from transocks.rules import live
from transocks.rules.live import CHAINS, TABLES
from transocks.rules.saved import select, write
from transocks.tools import FirewallError, complaint, run
from usocksd.host.sockets import end_accepted

_PORT = re.compile(r"redirect to :(\d+)|tproxy ip6? to \S+:(\d+)|--to-ports (\d+)|--on-port (\d+)")


def cut() -> list[str]:
    """Reset all clients whose connections came to transocks by rules that are loaded; returns complaints.

    nft's rules are of no effect after this.
    """
    try:
        end_accepted(set(_ports()))
    except FirewallError as error:
        return [str(error)]
    except OSError as error:
        return [f"what transocks still has for its clients could not be ended ({error.strerror}): stop transocks"]
    return []


def _ports() -> Iterator[int]:
    texts = []
    if live.has("nft"):
        for name in [name for name in TABLES if ("inet", name) in live.tables()]:
            texts.append(run("nft", "list", "table", "inet", name))
            complaint("nft", "flush", "set", "inet", name, "active")  # nobody else comes
    for six in (False, True) if live.has_ipv6() else (False,):
        for variant in live.variants(six):
            texts += [
                write(table.name, list(map(str, table.rules))) for table in select(live.saved(six, variant), CHAINS)
            ]
    for text in texts:
        for found in _PORT.findall(text):
            yield int(next(filter(None, found)))
