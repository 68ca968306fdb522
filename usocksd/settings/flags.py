"""Flags for a first try without a file: they make the text of one, which is then loaded like any other."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence

import attrs

from usocksd.errors import ConfigError, Fault
from usocksd.settings.common import CommonConfig
from usocksd.settings.loader import parse

SOURCE = "the command line"
"""The name of that file"""
Settings = Mapping[str, object]
"""Values by key path, `incoming.allow_from` for example"""


@attrs.frozen(kw_only=True)
class Flag:
    """A flag, and the settings that it stands for."""

    name: str
    metavar: str
    help: str
    settings: Callable[[Sequence[str]], Settings]
    """Of its values, one for each time that it is given. Raises ValueError for those that make no sense."""
    required: bool = False
    """There is no file without it."""

    @property
    def dest(self) -> str:
        """Its name among the parsed arguments, where verbs have flags too."""
        return f"daemon_{self.name.strip('-')}"


def add_flags(parser: argparse.ArgumentParser, flags: Sequence[Flag]) -> None:
    """Add them, and --print-config."""
    group = parser.add_argument_group("for a first try, instead of a configuration file")
    for flag in flags:
        group.add_argument(flag.name, dest=flag.dest, action="append", metavar=flag.metavar, help=flag.help)
    group.add_argument("--print-config", action="store_true", help="print the file that says the same as these flags")


def given(args: argparse.Namespace, flags: Sequence[Flag]) -> list[str]:
    """Their names, as far as they are on the command line."""
    found = [flag.name for flag in flags if getattr(args, flag.dest) is not None]
    return [*found, "--print-config"] if args.print_config else found


def text_of(args: argparse.Namespace, flags: Sequence[Flag], config: type[CommonConfig]) -> str:
    """The text of the file that says the same. Raises ConfigError, whose faults name the flags."""
    settings: dict[str, object] = {}
    flag_of: dict[str, str] = {}
    faults = []
    for flag in flags:
        values = getattr(args, flag.dest)
        if values is None:
            if flag.required:
                faults.append(Fault(flag.name, "", f"missing: expected {flag.name} {flag.metavar}"))
            continue
        try:
            found = flag.settings(values)
        except ValueError as error:
            faults.append(Fault(flag.name, " ".join(values), str(error)))
        else:
            settings |= found
            flag_of |= dict.fromkeys(found, flag.name)
    if faults:
        raise ConfigError("", faults)
    text = _toml(settings)
    try:
        parse(config, text, SOURCE)
    except ConfigError as error:
        raise ConfigError("", [_by_flag(fault, flag_of) for fault in error.faults]) from None
    return text


def _by_flag(fault: Fault, flag_of: Mapping[str, str]) -> Fault:
    name = next((name for key, name in flag_of.items() if fault.path.startswith(key)), fault.path)
    return Fault(name, fault.value, fault.expected)


def _toml(settings: Settings) -> str:
    """As a file, with the keys of each table together."""
    tables: dict[str, list[str]] = {"": []}
    for path, value in settings.items():
        table, _, key = path.rpartition(".")
        tables.setdefault(table, []).append(f"{key} = {json.dumps(value, ensure_ascii=False)}")
    return "\n".join(
        "\n".join([*([f"[{table}]"] if table else []), *lines, ""]) for table, lines in tables.items() if lines
    )
