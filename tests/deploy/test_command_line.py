"""Man pages and completions say what the command lines are; deploy/command_line.py writes them."""

from __future__ import annotations

import argparse
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

import transocks.cli
import usocksd.cli
from usocksd import __version__
from usocksd.serve import program

DEPLOY = Path(__file__).parents[2] / "deploy"
PARSERS = {
    "transocks": program.make_parser(transocks.cli.TRANSOCKS, transocks.cli.add_verbs),
    "usocksd": program.make_parser(usocksd.cli.USOCKSD, usocksd.cli.add_verbs),
}
FILES = {
    "transocks": (
        "man/transocks.8",
        "completions/transocks.bash",
        "completions/_transocks",
        "completions/transocks.fish",
    ),
    "usocksd": ("man/usocksd.8", "completions/usocksd.bash", "completions/_usocksd", "completions/usocksd.fish"),
}
REMAKE = "run deploy/command_line.py (it takes the packages shtab and argparse-manpage)"


def words_of(parser: argparse.ArgumentParser) -> Iterator[str]:
    """Every flag and verb."""
    for action in parser._actions:
        yield from action.option_strings
        if isinstance(action, argparse._SubParsersAction):
            for verb, below in action.choices.items():
                yield verb
                yield from words_of(below)


@pytest.mark.parametrize("name", PARSERS)
def test_all_of_the_command_line_is_there(name: str) -> None:
    words = set(words_of(PARSERS[name])) - {"-h", "--help"}  # of which the man pages say nothing
    for file in FILES[name]:
        text = (DEPLOY / file).read_text().replace("\\-", "-")
        # fish has one-letter and long flags without their dashes.
        assert [word for word in words if word not in text and word.lstrip("-") not in text] == [], REMAKE


def test_the_man_page_has_the_version_and_each_help_text() -> None:
    for name, parser in PARSERS.items():
        text = " ".join((DEPLOY / f"man/{name}.8").read_text().replace("\\-", "-").replace("\\", "").split())
        assert __version__ in text, REMAKE
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction):
                for help_of in action._choices_actions:
                    assert " ".join(str(help_of.help).split()) in text, REMAKE


def test_bash_completes() -> None:
    for typed, words in (
        ("usocksd conn", "connections"),
        ("transocks rules ver", "verify"),
        ("transocks --v", "--via"),
    ):
        line = typed.split()
        script = f"""
            source {DEPLOY}/completions/{line[0]}.bash
            COMP_WORDS=({typed}); COMP_CWORD={len(line) - 1}
            _shtab_{line[0]} {line[0]}
            echo "${{COMPREPLY[@]}}"
        """
        done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True)
        assert words in done.stdout.split(), done


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_other_shells_accept_theirs(shell: str) -> None:
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    for name in PARSERS:
        file = DEPLOY / "completions" / (f"_{name}" if shell == "zsh" else f"{name}.fish")
        subprocess.run([shell, "-n", file], check=True)


def test_groff_has_no_complaint() -> None:
    if shutil.which("groff") is None:
        pytest.skip("groff is not installed")
    for name in PARSERS:
        done = subprocess.run(
            ["groff", "-man", "-Tascii", DEPLOY / f"man/{name}.8"], capture_output=True, text=True, check=True
        )
        assert done.stderr == ""
        assert f"{name} connections" in done.stdout
