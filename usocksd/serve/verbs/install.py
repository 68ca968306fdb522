"""NAME install and uninstall: put what a host needs beside the program where it belongs, and take it away again.

One rule decides about each file: it is replaced or removed only if it is as `install` has left it. A list of checksums,
as sha256sum(1) writes it, is there to tell.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import pwd
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Final

import attrs

from usocksd.errors import Error
from usocksd.serve.daemon import Subparsers
from usocksd.serve.verbs.client import add_verb, run_verb

_PREFIX: Final = "/usr/local"
# Patterns of files in deploy/, with {} for the daemon, and the folder for each: below the prefix, or absolute.
_PLACES: Final = (
    ("systemd/{}*.service", "lib/systemd/system"),
    ("systemd/{}*.socket", "lib/systemd/system"),
    ("systemd/{}*.sh", "lib/transocks"),
    ("sysusers.d/{}.conf", "lib/sysusers.d"),
    ("tmpfiles.d/{}.conf", "lib/tmpfiles.d"),
    ("logrotate.d/{}", "/etc/logrotate.d"),
    ("{}.toml", "/etc"),
    *((f"man/{{}}*.{section}", f"share/man/man{section}") for section in (1, 5, 8)),
    ("completions/{}.bash", "share/bash-completion/completions"),
    ("completions/_{}", "share/zsh/site-functions"),
    ("completions/{}.fish", "share/fish/vendor_completions.d"),
)
_MODES: Final = {".toml": 0o640, ".sh": 0o755}  # a configuration can contain passwords
# In the units: the folders of the programs, and of their script.
_BIN, _LIB = b"/opt/transocks/bin/", f"{_PREFIX}/lib/transocks/".encode()
_HOMES: Final = ("/home/", "/root/", "/run/user/")
# Of a unit, as systemctl's is-enabled and is-active print it.
_USED: Final = {"enabled", "enabled-runtime", "active", "activating", "deactivating", "reloading"}

_INSTALL = """\
Put where they belong: systemd units, with the place of this program in them; sysusers.d and tmpfiles.d for the user
and its folders; the log's rotation; a sample configuration in /etc; man pages; completions for shells. Without --root,
then create the user and the folders, and have systemd read the units. Nothing is enabled or started.

A file that somebody has made or edited is kept. Each change is printed. A second time there is nothing to do.

Exit status: 0 if all is in place, 1 if not, 2 for a wrong command line."""
_UNINSTALL = """\
Remove the files that `install` has put there, but none that was edited since. The user, the logs and the program itself
stay. Services must be stopped and disabled before.

Exit status: 0 if it is done, 1 if not, 2 for a wrong command line."""


@attrs.frozen
class _Host:
    """Where the files of one daemon are."""

    daemon: str
    root: str
    prefix: str

    def real(self, target: str) -> Path:
        """The path of a file of the host, from here"""
        return Path(self.root, target.lstrip("/"))

    @property
    def live(self) -> bool:
        """Whether it is this host, and not a folder with the files of another"""
        return os.path.abspath(self.root) == "/"

    @property
    def booted(self) -> bool:
        """Whether systemd runs there: sd_booted(3)"""
        return self.live and os.path.isdir("/run/systemd/system")

    @property
    def list(self) -> str:
        """The file with the checksums"""
        return f"{self.prefix}/lib/transocks/{self.daemon}.sha256"

    def recorded(self) -> dict[str, str]:
        """The checksum of each file as `install` has left it"""
        path = self.real(self.list)
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        return {target: digest for digest, target in (line.split("  ", 1) for line in lines)}

    def files(self, programs: str) -> Iterator[tuple[str, bytes]]:
        """The files that belong there, and what belongs in them"""
        package = Path(__file__).parents[2]
        folder = package / "deploy"  # in a wheel; a checkout has it where operators look
        folder = folder if folder.is_dir() else package.parent / "deploy"
        for pattern, place in _PLACES:
            for path in sorted(folder.glob(pattern.format(self.daemon))):
                content = path.read_bytes()
                if path.suffix == ".service":
                    content = content.replace(_BIN, f"{programs}/".encode())
                    content = content.replace(_LIB, f"{self.prefix}/lib/transocks/".encode())
                yield str(Path(self.prefix, place, path.name)), content

    def write(self, target: str, content: bytes) -> None:
        """Write a file, whole or not at all."""
        path = self.real(target)
        path.parent.mkdir(parents=True, exist_ok=True)
        new = path.with_name(f".{path.name}.new")
        new.write_bytes(content)
        new.chmod(_MODES.get(path.suffix, 0o644))
        new.replace(path)

    def remove(self, target: str, digest: str) -> None:
        """Remove a file, unless it was edited."""
        path = self.real(target)
        match _digest(path):
            case None:
                pass
            case found if found == digest:
                path.unlink()
                print(f"removed {path}")
            case _:
                print(f"kept {path}: it has been edited")


def add_parsers(subparsers: Subparsers, daemon: str) -> None:
    """Add both verbs to a command line."""
    install = add_verb(subparsers, "install", "put units, a user, a sample and man pages on this host", _INSTALL)
    uninstall = add_verb(subparsers, "uninstall", "remove what install has put on this host", _UNINSTALL)
    where = "where the units find the programs (default: where this one is)"
    install.add_argument("--bin", metavar="DIR", type=os.path.abspath, help=where)
    for parser, act in ((install, _install), (uninstall, _uninstall)):
        parser.add_argument(
            "--root", metavar="DIR", default="/", help="the files of another host, an image for example"
        )
        where = f"where the files go (default {_PREFIX})"
        parser.add_argument("--prefix", metavar="DIR", type=os.path.abspath, default=_PREFIX, help=where)
        parser.set_defaults(run=partial(_run, daemon, act))


def _run(daemon: str, act: Callable[[_Host, argparse.Namespace], None], args: argparse.Namespace) -> int:
    def run() -> int:
        try:
            act(_Host(daemon, args.root, args.prefix), args)
        except OSError as error:
            need = ": root may" if isinstance(error, PermissionError) else ""
            raise Error(f"{error.filename}: {error.strerror}{need}") from None
        return 0

    return run_verb(f"{daemon}: ", run)


def _install(host: _Host, args: argparse.Namespace) -> None:
    programs = args.bin or _programs(host)
    program = f"{programs}/{host.daemon}"
    if program.startswith(_HOMES) or (host.live and str(Path(program).resolve()).startswith(_HOMES)):
        raise Error(
            f"{program}: services see no home directories (ProtectHome= in the units): install {host.daemon} elsewhere,"
            " by `pipx install --global` for example, or into a virtual environment in /opt"
        )
    before, after, written = host.recorded(), dict[str, str](), list[str]()
    for target, content in host.files(programs):
        path, digest = host.real(target), hashlib.sha256(content).hexdigest()
        found = _digest(path)
        if found not in {None, digest, before.get(target)}:
            print(f"kept {path}: it has been edited")
            if target in before:
                after[target] = before[target]
            continue
        after[target] = digest
        if found != digest:
            host.write(target, content)
            written.append(target)
            print(f"{'updated' if found else 'installed'} {path}")
    for target in before.keys() - after.keys():  # of an older version
        host.remove(target, before[target])
    if after != before:
        host.write(host.list, "".join(f"{digest}  {target}\n" for target, digest in after.items()).encode())
    if host.live and (written or not _ready(host.daemon)):
        _activate(host, after)
    elif not written:
        print(f"{host.daemon}: nothing to do")


def _ready(daemon: str) -> bool:
    """Whether its user and its log folder are there."""
    try:
        pwd.getpwnam(daemon)
    except KeyError:
        return False
    return os.path.isdir(f"/var/log/{daemon}")


def _activate(host: _Host, targets: Iterable[str]) -> None:
    """Have systemd act on new files."""
    places = {Path(target).parent.name: target for target in targets}
    _do("systemd-sysusers", places["sysusers.d"])
    _do("systemd-tmpfiles", "--create", places["tmpfiles.d"])
    if host.booted:
        _do("systemctl", "daemon-reload")


def _uninstall(host: _Host, args: argparse.Namespace) -> None:
    before = host.recorded()
    if not before:
        print(f"{host.daemon}: nothing to do")
        return
    units = [Path(target).name for target in before if "/systemd/system/" in target]
    if host.booted and (used := _used(units)):
        raise Error(f"first stop what is still enabled or active: systemctl disable --now {' '.join(used)}")
    for target, digest in before.items():
        host.remove(target, digest)
    path = host.real(host.list)
    path.unlink()
    if not any(path.parent.iterdir()):
        path.parent.rmdir()
    if host.booted:
        _do("systemctl", "daemon-reload")


def _used(units: list[str]) -> list[str]:
    """Those that are enabled or active."""
    found = set[str]()
    for verb in ("is-enabled", "is-active"):
        done = subprocess.run(["systemctl", verb, *units], capture_output=True, text=True, check=False)
        found |= {unit for unit, state in zip(units, done.stdout.splitlines(), strict=False) if state in _USED}
    return sorted(found)


def _programs(host: _Host) -> str:
    """The folder of this program, as seen on the host."""
    ran = Path(sys.argv[0]).absolute()  # with a link, the link: it stays when the version changes
    folder = ran.parent if ran.name == host.daemon else Path(sys.executable).absolute().parent
    root = Path(host.root).absolute()
    return str(Path("/", folder.relative_to(root)) if folder.is_relative_to(root) else folder)


def _do(*command: str) -> None:
    """Run a command, and say so. Raises Error."""
    if shutil.which(command[0]) is None:
        print(f"not run, since it is not installed: {shlex.join(command)}")
        return
    print(f"run {shlex.join(command)}", flush=True)
    status = subprocess.run(command, check=False).returncode
    if status:
        raise Error(f"{shlex.join(command)}: exit status {status}")


def _digest(path: Path) -> str | None:
    """The checksum of a file; None if there is none."""
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.exists() else None
