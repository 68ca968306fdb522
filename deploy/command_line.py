"""Writes deploy/man and deploy/completions from the command lines themselves. Run it after a change of one:

    .venv/bin/python deploy/command_line.py

The result is in the repository, so that a build needs no more than the compiler.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

import shtab
from argparse_manpage.manpage import Manpage

import transocks.cli
import usocksd.cli
from usocksd import __version__
from usocksd.serve import program
from usocksd.serve.daemon import Daemon

HERE = Path(__file__).parent
COMMAND_LINES: tuple[tuple[Daemon[Any], Any], ...] = (
    (transocks.cli.TRANSOCKS, transocks.cli.add_verbs),
    (usocksd.cli.USOCKSD, usocksd.cli.add_verbs),
)
COMPLETIONS = {"bash": "{}.bash", "zsh": "_{}", "fish": "{}.fish"}


def man_page(parser: argparse.ArgumentParser, file: str) -> str:
    """The page of section 8."""
    description = str(parser.description).partition(".")[0]
    data = {
        "description": description[0].lower() + description[1:],
        "manual_section": 8,
        "manual_title": "System Administration",
        "project_name": parser.prog,
        "version": __version__,
        "date": "",
    }
    text = str(Manpage(parser, data, format="pretty"))
    text = re.sub(r"(?m)^\.TH .*$", f'.TH {parser.prog.upper()} 8 "" "{parser.prog} {__version__}"', text, count=1)
    text = re.sub(r"(?s)(\.SH SYNOPSIS\n.*?)\{[^}]*\} \.\.\.", r"\1[VERB ...]", text, count=1)
    return f"{text}.SH FILES\n.TP\n.I {file}\nthe configuration; a sample with every setting is installed there\n"


def main() -> None:
    """Write all of them."""
    for folder in ("man", "completions"):
        (HERE / folder).mkdir(exist_ok=True)
    for daemon, add_verbs in COMMAND_LINES:
        parser = program.make_parser(daemon, add_verbs)
        (HERE / "man" / f"{daemon.name}.8").write_text(man_page(parser, daemon.file))
        for shell, name in COMPLETIONS.items():
            parser = program.make_parser(daemon, add_verbs)
            (HERE / "completions" / name.format(daemon.name)).write_text(shtab.complete(parser, shell=shell))


if __name__ == "__main__":
    main()
