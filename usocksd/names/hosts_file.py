"""/etc/hosts, see hosts(5)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from itertools import zip_longest
from pathlib import Path

from usocksd.names.match import canonical_host
from usocksd.names.watched_file import WatchedFile
from usocksd.net.address import IPAddress, numeric_address


class HostsFile:
    """The names of the file and their addresses. Nothing is read until `reread`.

    People keep a hundred thousand names there: reading takes 0.2 s for so many, since a name is looked at more
    closely only when it is asked for.
    """

    def __init__(self, path: Path) -> None:
        self._file = WatchedFile(path)
        self._texts: dict[str, list[str]] = {}

    def reread(self) -> bool:
        """Read the file if it has changed; tells whether it had."""
        text = self._file.changed()
        if text is None:
            return False
        self._texts = {}
        for line in text.split("\n"):
            address, *names = line.partition("#")[0].split() or [""]
            for name in names:
                self._texts.setdefault(_key(name), []).append(address)
        return True

    def addresses(self, name: str) -> tuple[IPAddress, ...]:
        """Those of a name as `canonical_host` gives it; none if the file does not have it.

        What is no address is skipped, as the C library does.
        """
        found: list[IPAddress] = []
        for text in self._texts.get(name, ()):
            with contextlib.suppress(ValueError):
                found.append(numeric_address(text))
        return in_turn(found)


def in_turn(addresses: Iterable[IPAddress]) -> tuple[IPAddress, ...]:
    """RFC 8305 section 4: the families in turn, IPv6 first, each in the order given."""
    families: dict[int, list[IPAddress]] = {6: [], 4: []}
    for address in dict.fromkeys(addresses):
        families[address.version].append(address)
    pairs = zip_longest(families[6], families[4])
    return tuple(address for pair in pairs for address in pair if address is not None)


def _key(name: str) -> str:
    """The canonical form of a name, if it has one; nobody asks for what has none."""
    if name.isascii():
        return name.lower().removesuffix(".")
    try:
        return str(canonical_host(name))
    except ValueError:
        return ""
