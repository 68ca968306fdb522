"""Files that a configuration names, as they were when it was read."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from usocksd.settings.files import NamedFiles, NotRegular, read_file


def test_kept_files_outlive_changes(tmp_path: Path) -> None:
    names = {"one": b"1" * 100_000, "empty": b"", "two": b"\0\xff"}
    paths = {tmp_path / name: content for name, content in names.items()}
    for path, content in paths.items():
        path.write_bytes(content)
    first = NamedFiles()
    for path, content in [*paths.items(), *paths.items()]:
        assert first.keep(path) == content
    for path in paths:
        path.write_bytes(b"another")
    passed_on = NamedFiles.received({path: list(place) for path, place in first.places.items()}, first.fds)
    for path, content in paths.items():
        assert (first.keep(path), passed_on.read(path)) == (content, content)
    # Files that were not kept are read from disk.
    (tmp_path / "three").write_bytes(b"3")
    assert passed_on.read(tmp_path / "three") == b"3"
    first.close()
    first.close()
    assert (first.fds, first.read(tmp_path / "one")) == ([], b"another")


def test_no_files_no_memory() -> None:
    files = NamedFiles.received({}, [])
    assert (files.fds, files.places) == ([], {})
    files.close()


def test_only_regular_files_are_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path, tmp_path / "fifo", Path("/dev/zero")):
        with pytest.raises(NotRegular):
            read_file(path)
    files = NamedFiles()
    with pytest.raises(FileNotFoundError):
        files.keep(tmp_path / "none")
    assert (files.fds, files.places) == ([], {})
