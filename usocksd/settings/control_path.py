"""The path of a daemon's control socket, for the daemon and for the verbs that ask it. The default is in /run/NAME,
which systemd makes for a service, and a daemon of root for itself. Other users can't create anything there: their
default is in $XDG_RUNTIME_DIR (systemd's /run/user/UID) or, if that is not set, in /tmp.
"""

from __future__ import annotations

import os
import stat
from contextlib import suppress
from pathlib import Path

from usocksd.errors import Error

_SHARED = Path("/tmp")


class NotPrivate(Error):
    """A folder in /tmp was made by another user, or others may use it."""


def control_path(configured: str, default: str) -> str:
    """The control socket of a daemon of this user whose configuration says `configured`; `default` is the default of
    that setting, /run/NAME/control.sock.
    """
    path = Path(default)
    if configured != default or os.geteuid() == 0 or os.access(path.parent, os.W_OK | os.X_OK, effective_ids=True):
        return configured
    runtime = os.environ.get("XDG_RUNTIME_DIR", "")
    # (After `su` it may be another user's.)
    if os.path.isabs(runtime) and _owner(runtime) == os.geteuid():
        return str(Path(runtime, path.parent.name, path.name))
    return str(_SHARED / f"{path.parent.name}-{os.geteuid()}" / path.name)


def make_folder(path: str) -> None:
    """Make the folder of this control socket, but no parents of it. Raises OSError, NotPrivate."""
    folder = Path(path).parent
    with suppress(FileExistsError):
        folder.mkdir(0o700 if _anybody_could_make(folder) else 0o755)
    check_folder(path)


def check_folder(path: str) -> None:
    """Raises NotPrivate if another user may have made the folder of this control socket, to answer in the daemon's
    place or to read what it is asked.
    """
    folder = Path(path).parent
    if not _anybody_could_make(folder):
        return
    try:
        found = os.lstat(folder)
    except FileNotFoundError:
        return
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o077:
        raise NotPrivate(f"{folder} is not a folder of this user alone: remove it, or have `control` lead elsewhere")


def _anybody_could_make(folder: Path) -> bool:
    return folder.parent == _SHARED and folder.name.endswith(f"-{os.geteuid()}")


def _owner(folder: str) -> int | None:
    try:
        return os.stat(folder).st_uid
    except OSError:
        return None
