"""The lines of keys in a TOML text: tomllib tells lines for syntax errors only. Pure.

A light scan, for texts that tomllib has accepted. It knows tables, arrays of tables, dotted and quoted keys, and flat
lists over many lines; text in a multi-line string that looks like a key misleads it. The line is for an editor.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Iterable
from dataclasses import replace
from functools import cached_property

from usocksd.errors import Fault

_PART = r"""(?:[\w-]+|"[^"\n]*"|'[^'\n]*')"""
_KEYS = rf"{_PART}(?:[ \t]*\.[ \t]*{_PART})*"
_PLACE = re.compile(rf"^[ \t]*(?:(?P<open>\[+)[ \t]*(?P<table>{_KEYS})[ \t]*\]|(?P<key>{_KEYS})[ \t]*=)", re.MULTILINE)
_ITEM = re.compile(r"""#[^\n]*|(?P<item>"(?:\\.|[^"\\\n])*"|'[^'\n]*'|[^\s,\[\]"'#]+)|(?P<end>\])""")
_PATH = re.compile(r"(.*?)(?:\[(\d+)\])?", re.DOTALL)


class Lines:
    """The lines of one text; `source` is the file that it is from."""

    def __init__(self, text: str, source: str = "") -> None:
        self.source = source
        self._text = text
        self._items: dict[str, list[int]] = {}

    @cached_property
    def _newlines(self) -> list[int]:
        return [match.start() for match in re.finditer("\n", self._text)]

    @cached_property
    def _ends(self) -> dict[str, int]:
        """The position of each key's "=" and each table's "]", by key path."""
        ends: dict[str, int] = {}
        # The number of the last table of each array: a key path through an array refers to that one.
        numbers: dict[str, int] = {}
        table = ""
        for place in _PLACE.finditer(self._text):
            if place["table"] is None:
                path = f"{table}.{_plain(place['key'])}" if table else _plain(place["key"])
            else:
                path = _plain(place["table"])
                if place["open"] == "[[":
                    numbers[path] = numbers.get(path, -1) + 1
                path = table = _numbered(path, numbers)
            ends.setdefault(path, place.end())
            while path := _outer(path):  # [table.inner] may be the only place that names `table`
                ends.setdefault(path, place.end())
        return ends

    def line_of(self, path: str) -> int:
        """The line, from 1, of the value with this key path ("outgoing.deny_sites[2]"), as `Fault` has it.

        If the value is not in the text, the line of the innermost table around it that is; else 1.
        """
        path = _plain(path)
        match = _PATH.fullmatch(path)
        assert match is not None  # the pattern matches any text
        key, index = (path, None) if path in self._ends else (match[1], match[2])
        while key and key not in self._ends:
            key, index = _outer(key), None
        at = self._ends.get(key, 0)
        if index is not None and key:
            items = self._items_of(key)
            at = items[int(index)] if int(index) < len(items) else at
        return bisect_left(self._newlines, at) + 1

    def locate(self, faults: Iterable[Fault]) -> list[Fault]:
        """These faults with the lines of their keys. (The paths of syntax errors are lines already.)"""
        return [
            fault if fault.path.startswith("line ") else replace(fault, line=self.line_of(fault.path))
            for fault in faults
        ]

    def _items_of(self, key: str) -> list[int]:
        """The positions of the items of the list with this key."""
        if key not in self._items:
            found = self._items[key] = []
            for token in _ITEM.finditer(self._text, self._ends[key]):
                if token["end"] is not None:
                    break
                if token["item"] is not None:
                    found.append(token.start())
        return self._items[key]


def _numbered(path: str, numbers: dict[str, int]) -> str:
    """The key path with a number for each array of tables that it goes through."""
    place, plain = "", ""
    for key in path.split("."):
        place, plain = f"{place}.{key}".lstrip("."), f"{plain}.{key}".lstrip(".")
        if plain in numbers:
            place += f"[{numbers[plain]}]"
    return place


def _outer(path: str) -> str:
    """The key path around this one: "rule" for "rule[2]", and "rule[2]" for "rule[2].to"."""
    return path.rpartition("[")[0] if path.endswith("]") else path.rpartition(".")[0]


def _plain(keys: str) -> str:
    return re.sub(r"""["'\s]""", "", keys)
