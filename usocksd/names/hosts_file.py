"""/etc/hosts, see hosts(5); and files that are read again when they change."""

from __future__ import annotations

import contextlib
import logging
import os
from pathlib import Path

from usocksd.names.match import canonical_host
from usocksd.net.address import IPAddress, numeric_address

_logger = logging.getLogger("usocksd.names.resolver")


class WatchedFile:
    """A small text file that is read again when it has changed. A missing file is an empty one."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._seen: tuple[int, int, int] | str | None = "never"
        self._unreadable = False

    def changed(self) -> str | None:
        """Its text, if it has changed since the last call and can be read."""
        try:
            status = os.stat(self.path)
            now = (status.st_mtime_ns, status.st_ino, status.st_size)
            if now == self._seen:
                return None
            text = self.path.read_text("utf-8", "replace")
        except (FileNotFoundError, NotADirectoryError):
            if self._seen is None:
                return None
            text, now = "", None
        except OSError as error:
            if not self._unreadable:
                fields = {"file": str(self.path), "error": str(error)}
                _logger.error("file can't be read: its previous content stays in use", extra={"fields": fields})
            self._unreadable = True
            return None
        self._seen = now
        self._unreadable = False
        return text


class HostsFile:
    """The names of the file and their addresses. Nothing is read until `reread`.

    Some people keep 100,000 names there. Reading those takes 0.2 s, since addresses are parsed only when asked for.
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

    def addresses(self, name: str) -> list[IPAddress]:
        """The addresses of a canonical name. A word that is no address is skipped, as by the C library."""
        found: list[IPAddress] = []
        for text in self._texts.get(name, ()):
            with contextlib.suppress(ValueError):
                found.append(numeric_address(text))
        return found


def _key(name: str) -> str:
    """The canonical form of a name; "" if it has none, and then nobody asks for it."""
    if name.isascii():
        return name.lower().removesuffix(".")
    try:
        return str(canonical_host(name))
    except ValueError:
        return ""
