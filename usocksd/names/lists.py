"""Files with long lists of destinations, "file:blocked.txt" in a rule: an entry a line, comments behind "#"."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from pathlib import Path

from usocksd.errors import ConfigError, Fault
from usocksd.names.sites import Entry, SiteList, entry_fault, parse_entry
from usocksd.settings.files import NotRegular, read_file
from usocksd.settings.loader import show

_MOST_FAULTS = 10


def read_list(path: Path, label: str, read: Callable[[Path], bytes] = read_file) -> SiteList:
    """What a file lists. `label` is what its entries are shown with, and `read` reads the file.

    A million entries take two seconds. Raises ConfigError when it can't be read, or with the lines that are no
    entries, the first ten of them.
    """
    faults: list[Fault] = []
    more = 0

    def entries() -> Iterator[Entry]:
        nonlocal more
        # A byte order mark is no fault, as in the configuration.
        for number, line in enumerate(io.BytesIO(content.removeprefix(b"\xef\xbb\xbf")), 1):
            text = line.partition(b"#")[0].strip().decode("utf-8", "backslashreplace")
            if not text:
                continue
            try:
                yield parse_entry(text)
            except ValueError:
                if len(faults) < _MOST_FAULTS:
                    faults.append(Fault(f"line {number}", show(text), _fault(text)))
                else:
                    more += 1

    try:
        content = read(path)
    except NotRegular:
        raise ConfigError(str(path), [Fault("file", "", "expected a regular file")]) from None
    except (OSError, ValueError) as error:  # ValueError: NUL in the path
        problem = getattr(error, "strerror", None) or str(error)
        raise ConfigError(str(path), [Fault("file", "", f"can't be read: {problem}")]) from None
    sites = SiteList(entries(), label)
    if more:
        faults.append(Fault("file", "", f"{more} more lines like these"))
    if faults:
        raise ConfigError(str(path), faults)
    return sites


def _fault(text: str) -> str:
    if len(text.split()) > 1:
        return "expected one entry a line"
    return entry_fault(text) or ""
