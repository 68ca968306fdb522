"""NAME reload: read the configuration again, as SIGHUP does, and wait for what comes of it."""

from __future__ import annotations

import argparse
import sys
from typing import Final

from usocksd.serve.verbs.client import Client, print_json, visible

TIMEOUT: Final = 120.0
"""Seconds: new workers have to start, and others may reload at the same time."""


def run(client: Client, args: argparse.Namespace) -> None:
    """Ask, and print which generation serves now, what its configuration is warned of, and for how long it is."""
    trial = {} if args.confirm is None else {"confirm": args.confirm}
    answer = client.ask("reload", timeout=TIMEOUT, **trial)
    if args.json:
        print_json(answer)
        return
    for warning in answer.get("warnings", ()):
        print(f"{client.name} reload: warning: {visible(warning)}", file=sys.stderr)
    print(f"{client.name} has reloaded: generation {answer['generation']} serves")
    if (left := answer.get("confirm_within")) is not None:
        print(
            f"for {left:.0f} s: then the previous configuration comes back, unless `{client.name} confirm` comes first."
            " Open a new connection now, to see whether it works"
        )
