"""Commands of the system's own tools, and how they are run."""

from __future__ import annotations

import contextlib
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator

import attrs

from transocks.firewall.config import Tool
from usocksd.errors import Error


class FirewallError(Error):
    """Rules could not be loaded, read or removed; the message has the tool's own words."""


@attrs.frozen
class Step:
    """One command and what it reads on standard input."""

    argv: tuple[str, ...]
    stdin: str = ""


@attrs.frozen
class RuleSet:
    """How to load the rules, and how to remove them; each step is atomic by itself."""

    load: tuple[Step, ...]
    unload: tuple[Step, ...]


def run(step: Step) -> str:
    """Run a command; returns its standard output. Raises FirewallError when it can't be run, or fails."""
    try:
        # A group of its own: Ctrl-C is for us, and we wait for what we have begun.
        done = subprocess.run(step.argv, input=step.stdin, capture_output=True, text=True, check=False, process_group=0)
    except OSError as error:
        raise FirewallError(f"{step.argv[0]}: {error.strerror}") from None
    if done.returncode != 0:
        raise FirewallError(f"{' '.join(step.argv)}: {done.stderr.strip() or f'exit status {done.returncode}'}")
    return done.stdout


def complaint(step: Step) -> str | None:
    """Run a command; returns what it complained of, None if it has succeeded."""
    try:
        run(step)
    except FirewallError as error:
        return str(error)
    return None


@contextlib.contextmanager
def unbroken() -> Iterator[None]:
    """Ctrl-C and its like wait until the block is over: for steps that would leave half of something between them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM, signal.SIGHUP})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def choose_tool(which: Callable[[str], str | None] = shutil.which) -> Tool | None:
    """nft where it is (one transaction for both families), else iptables, else None."""
    if which("nft"):
        return Tool.NFT
    return Tool.IPTABLES if which("iptables-restore") else None
