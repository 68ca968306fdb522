"""NAME reload: read the configuration again, as SIGHUP does, and wait for what comes of it."""

from __future__ import annotations

import argparse
from typing import Final

from usocksd.runtime.verbs.client import Client, print_json

TIMEOUT: Final = 120.0
"""Seconds: new workers have to start, and others may reload at the same time."""


def run(client: Client, args: argparse.Namespace) -> None:
    """Ask, and print which generation serves now."""
    answer = client.ask("reload", timeout=TIMEOUT)
    if args.json:
        print_json(answer)
    else:
        print(f"{client.name} has reloaded: generation {answer['generation']} serves")
