"""The definition of a daemon: one value from which its command line, master, workers and verbs are made."""

from __future__ import annotations

import os
import pkgutil
from collections.abc import Awaitable, Callable, Collection, Coroutine, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, TypeAlias, TypeVar

import attrs

from usocksd.errors import ConfigError, Fault
from usocksd.net.keepalive import KeepAlive
from usocksd.serve.timing import Timing
from usocksd.settings import loader
from usocksd.settings.common import CommonConfig
from usocksd.settings.files import read_file
from usocksd.settings.flags import Flag

if TYPE_CHECKING:  # verbs do not need trio, which takes a tenth of a second to load
    import argparse

    from usocksd.log.log import Log
    from usocksd.log.metrics import Metrics
    from usocksd.net.endpoint import Endpoint
    from usocksd.net.limits import Tally
    from usocksd.net.reactor import Reactor
    from usocksd.serve.associations import Associations

CHANNEL = "TRANSOCKS_CHANNEL"
"""In the environment of a worker: the descriptor of its end of the channel. The command line is the master's."""

Request: TypeAlias = dict[str, Any]
Subparsers: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"


C = TypeVar("C", bound=CommonConfig)


@attrs.frozen(kw_only=True)
class Daemon(Generic[C]):
    """One of the two daemons. `examine` and `build` are "module:function", so that only their users load them."""

    name: str
    description: str
    config: type[C]
    """The type of its configuration"""
    file: str
    """The configuration file that is read by default"""
    file_required: bool
    control: str
    """The control socket by default"""
    columns: tuple[str, ...] = ()
    """The columns of its connections beside the common ones: see verbs/selection.py"""
    flags: tuple[Flag, ...] = ()
    """The flags for a first try"""
    verbs: tuple[str, ...] = ()
    """The verbs that its workers answer on the control socket; see `Application.verbs`"""
    examine: str
    """(config, file or None) -> Remarks. None: neither the file itself nor other files are examined."""
    build: str
    """(config, parts) -> Application. Raises Error if the daemon can't be put together."""
    timing: Timing = attrs.field(factory=Timing)

    def source(self, path: str | None) -> str | None:
        """The file to read for -f `path`: None if there is none, and the defaults apply."""
        if path is None and not self.file_required and not os.path.exists(self.file):
            return None
        return path or self.file

    def text(self, path: str | None) -> tuple[str, str]:
        """The configuration as text, and the name of its file. Raises ConfigError if it can't be read."""
        source = self.source(path)
        return ("", self.file) if source is None else (loader.read(source), source)

    def call(self, function: str, *arguments: Any) -> Any:
        """Load and call `examine` or `build`."""
        return pkgutil.resolve_name(function)(*arguments)


class Remarks(NamedTuple):
    """Remarks about a valid configuration."""

    warnings: Sequence[Fault]
    notes: Sequence[Fault] = ()
    """Effects on all clients, which may be intended"""
    error: ConfigError | None = None
    """Faults of files that it names"""


class Parts(NamedTuple):
    """The services of a worker for the daemon that it runs."""

    log: Log
    reactor: Reactor
    metrics: Metrics
    ports: frozenset[int]
    """The ports that are listened on"""
    transparent: bool
    """Whether one of the sockets has IP_TRANSPARENT"""
    descriptors: int
    """How many open files the process may have"""
    connections: int
    """How many connections fit into them"""
    associations: Associations
    """Where UDP associations are counted"""
    tally: Callable[[bytes, int], Tally]
    """Counts something of clients over all workers: of which kind, and how many a client may have (0: no limit)"""
    begin: Callable[[Coroutine[Any, Any, None], str, int], bool]
    """Serve a session that no listener has accepted, for the client with this numeric address and port. False if a
    limit or the want of descriptors forbids that; then the session has not begun."""
    count_as: Callable[[Endpoint, str, int], bool]
    """Count a connection on one of the ports `Application.proxied` as one of this client, numeric address and port.
    False if a limit forbids that; then it has been reset."""
    share: Callable[[Any], None]
    """Send a JSON value to all workers, this one and later ones included. Only the latest value counts, and only from
    a task of `Application.keeping`."""
    shared: Callable[[Callable[[Any], None]], None]
    """Have a function called with the shared value: at once if there is one, and whenever there is a new one. It may be
    from another configuration."""
    read: Callable[[Path], bytes] = read_file
    """Read a file that the configuration names, as it was when that was read. For use in `build`, not later."""


class Application(NamedTuple):
    """A daemon, ready to serve."""

    session: Callable[[Endpoint, str, int], Awaitable[None]]
    """Serves one accepted connection: endpoint, the peer's numeric address and port"""
    background: tuple[Callable[..., Awaitable[object]], ...] = ()
    """Tasks started before the first connection is accepted; they say `task_status.started()`."""
    open: Callable[[], None] = lambda: None
    """Opens the daemon's own sockets, from which sessions begin by `Parts.begin`. Raises Error."""
    shut: Callable[[], None] = lambda: None
    """Closes them: the worker drains."""
    close: Callable[[], None] = lambda: None
    """Called at the end, to release resources."""
    keeping: tuple[Callable[[], Awaitable[object]], ...] = ()
    """Tasks that one worker, the keeper, does for all: from when it accepts connections until it drains or dies; then
    they begin in another one. They share results by `Parts.share`."""
    verbs: Mapping[str, Callable[[Request], Awaitable[dict[str, Any]]]] = MappingProxyType({})
    """Answers to `Daemon.verbs`: each gets the whole request and returns the answer, or raises Error. Only one worker
    is asked, so it must be something that all know.
    """
    proxied: Collection[int] = ()
    """Ports whose connections a proxy makes for its clients: they count for no client until `Parts.count_as`."""
    keepalive: KeepAlive = KeepAlive()
    """The keepalive of relays. The worker adapts it when the timers of this host change."""
    status: Callable[[], dict[str, Any]] = dict
    """The value of "daemon" in the answer to `status`: JSON values that are the same in all workers."""


def form() -> str:
    """How the hot path runs: "compiled", or "interpreted" from its sources. See hatch_build.py."""
    hot = find_spec("usocksd.net.reactor")
    return "interpreted" if hot is None or (hot.origin or "").endswith(".py") else "compiled"


def run(daemon: Daemon[Any], add_verbs: Callable[[Subparsers], None], argv: Sequence[str] | None = None) -> int:
    """Run the daemon's worker, its master, or a verb, as this process was started. Returns the exit status."""
    if CHANNEL in os.environ:
        from usocksd.serve import worker  # noqa: PLC0415  (the command line with its verbs takes several MB)

        return worker.main(daemon, int(os.environ.pop(CHANNEL)))
    from usocksd.serve import program  # noqa: PLC0415

    return program.main(daemon, add_verbs, argv)
