"""NAME drain: stop gracefully, as SIGTERM does."""

from __future__ import annotations

import argparse

from usocksd.serve.verbs.client import Client, print_json


def run(client: Client, args: argparse.Namespace) -> None:
    """Ask, and print that it is so."""
    answer = client.ask("drain")
    if args.json:
        print_json(answer)
    else:
        print(f"{client.name} accepts no more connections, and ends when those that there are have ended")
