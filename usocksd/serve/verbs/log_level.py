"""NAME log-level [LEVEL]: which records are written, from now on."""

from __future__ import annotations

import argparse

from usocksd.serve.verbs.client import Client, print_json


def run(client: Client, args: argparse.Namespace) -> None:
    """Ask, and print the level."""
    answer = client.ask("log-level") if args.level is None else client.ask("log-level", level=args.level)
    if args.json:
        print_json(answer)
    else:
        print(answer["level"])
