"""The verbs that change a running daemon: reload, confirm, drain, log-level. Each asks, and prints the answer."""

from __future__ import annotations

import argparse
import sys
from typing import Final

from usocksd.serve.verbs.client import Answer, ControlClient, print_json, visible

RELOAD_WITHIN: Final = 120.0
"""Seconds: new workers have to start, and a reload may be under way."""


def reload(client: ControlClient, args: argparse.Namespace) -> None:
    trial = {} if args.confirm is None else {"confirm": args.confirm}
    answer = client.ask("reload", timeout=RELOAD_WITHIN, **trial)
    if not args.json:
        for warning in answer["warnings"]:
            print(f"{client.name} reload: warning: {visible(warning)}", file=sys.stderr)
    text = f"{client.name} has reloaded: generation {answer['generation']} serves"
    if (left := answer["confirm_within"]) is not None:
        text += (
            f"\nfor {left:.0f} s: then the previous configuration comes back, unless `{client.name} confirm` comes"
            " first. Open a new connection now, to see whether it works"
        )
    _print(text, answer, args)


def confirm(client: ControlClient, args: argparse.Namespace) -> None:
    answer = client.ask("confirm")
    stays, none = "confirmed: the configuration stays", "nothing to confirm: no configuration is on trial"
    _print(stays if answer["confirmed"] else none, answer, args)


def drain(client: ControlClient, args: argparse.Namespace) -> None:
    answer = client.ask("drain")
    text = f"{client.name} accepts no more connections, and ends when those that there are have ended"
    _print(text, answer, args)


def log_level(client: ControlClient, args: argparse.Namespace) -> None:
    answer = client.ask("log-level", **({} if args.level is None else {"level": args.level}))
    _print(answer["level"], answer, args)


def _print(text: str, answer: Answer, args: argparse.Namespace) -> None:
    if args.json:
        print_json(answer)
    else:
        print(text)
