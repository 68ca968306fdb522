"""A small text file that is read again when it has changed."""

from __future__ import annotations

import logging
import os
from pathlib import Path

_logger = logging.getLogger("usocksd.names.resolver")


class WatchedFile:
    """/etc/hosts, say. A missing file is an empty one."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._seen: tuple[int, int, int] | str | None = "never"
        self._unreadable = False

    def changed(self) -> str | None:
        """Its text if it is not the one seen last; otherwise None, also while it can't be read: what was seen stays."""
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
                _logger.error("file can't be read: what was read before stays", extra={"fields": fields})
            self._unreadable = True
            return None
        self._seen = now
        self._unreadable = False
        return text
