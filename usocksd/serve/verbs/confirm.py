"""NAME confirm: keep a configuration that is on trial."""

from __future__ import annotations

import argparse

from usocksd.serve.verbs.client import Client, print_json


def run(client: Client, args: argparse.Namespace) -> None:
    """Ask, and print whether there was something to confirm."""
    answer = client.ask("confirm")
    if args.json:
        print_json(answer)
    elif answer["confirmed"]:
        print("confirmed: the configuration stays")
    else:
        print("nothing to confirm: no configuration is on trial")
