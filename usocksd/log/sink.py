"""Writes log records: appending takes well under a microsecond, and one thread does the writing.

Rules of this file:

- `append` never waits for the output. Records that the output does not take are kept up to a bound; past it
  they are dropped and counted, and a record tells how many as soon as the output works again.
- Lines are not torn, by us or by other processes that write to the same place (each worker does). Linux
  appends one write(2) to a local file as a whole, and to a pipe if it is of at most PIPE_BUF bytes (pipe(7));
  so every write holds whole records. The one exception is a record of more than PIPE_BUF to a pipe or socket,
  which goes in pieces: another process's record may land between two of them, or the reader may go away.
- No O_NONBLOCK on a descriptor that we inherited: it would change stderr for everyone who shares it. poll(2)
  says when a write of PIPE_BUF will not block. Should it block after all, because someone else took the room,
  only the thread waits.
"""

from __future__ import annotations

import errno
import fcntl
import os
import select
import stat
import threading
import time
from collections import deque
from collections.abc import Mapping
from contextlib import suppress
from queue import Empty, SimpleQueue
from typing import Final

from usocksd.log.formats import MAX_RECORD, Formatter, Severity

STDERR: Final = 2

_FLAGS: Final = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOCTTY | os.O_NONBLOCK
_MAX_BACKOFF: Final = 5.0
_PATIENCE: Final = 0.1
"""How many seconds the thread waits for a reader that does not read before it handles other requests."""


class Output:
    """One open file, pipe, socket or device. Opening raises OSError."""

    def __init__(self, target: str | int) -> None:
        self._own = isinstance(target, str)
        if isinstance(target, str):
            # O_NONBLOCK so that a FIFO without a reader is ENXIO and not a hang. The open file is ours alone.
            self.fd = os.open(target, _FLAGS, 0o644)
        else:
            self.fd = _duplicate(target)
        self._regular = stat.S_ISREG(os.fstat(self.fd).st_mode)
        self._limit = MAX_RECORD + 1 if self._regular else select.PIPE_BUF  # 1 for a newline, see _torn
        self._poll = select.poll()
        self._poll.register(self.fd, select.POLLOUT)
        self._torn = False  # the file may end in the middle of a line: begin with a newline

    def write(self, records: deque[bytes], patience: float) -> int | None:
        """One write(2) from the front of `records`, taking off what is written.

        Returns how many bytes that is, or None if nobody read for `patience` seconds. Raises OSError; `records` then
        still begins with the next one to write.
        """
        if not self._regular and not self._poll.poll(patience * 1000):
            return None
        if self._regular and not self._torn and sum(map(len, records)) <= self._limit:
            # Mostly so: no look at the single records.
            written = os.write(self.fd, data := b"".join(records))
            if written == len(data):
                records.clear()
                return written
        else:
            written = os.write(self.fd, self._gather(records))
        if self._torn and written:
            self._torn = False
            written -= 1
        done = 0
        while records and done + len(records[0]) <= written:
            done += len(records.popleft())
        if rest := written - done:
            if not self._regular:
                records[0] = records[0][rest:]
                return written
            self._mend(rest)
        if self._regular and not done:
            # A full disk may take a part of a record each time.
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return done

    def _gather(self, records: deque[bytes]) -> bytes:
        pieces = [b"\n"] if self._torn else []
        size = len(pieces)
        for record in records:
            size += len(record)
            if size > self._limit and record is not records[0]:
                break
            pieces.append(record)
        return b"".join(pieces)[: self._limit]

    def _mend(self, partial: int) -> None:
        # The disk is full, or a limit is reached, in the middle of a record. Another process may write to this
        # file before we do, so the line must not stay open: cut it off, if it is still the end of the file. (If
        # another process appends between these calls, its record is lost; lines stay whole.) If it can't be cut
        # (an append-only file, stderr without O_APPEND), the next write begins with a newline. In both cases the
        # record is written again from its start.
        self._torn = True
        if self._own:
            with suppress(OSError):
                end = os.lseek(self.fd, 0, os.SEEK_CUR)
                if os.fstat(self.fd).st_size == end:
                    os.ftruncate(self.fd, end - partial)
                    self._torn = False

    def close(self) -> None:
        os.close(self.fd)


def _duplicate(fd: int) -> int:
    # A number of our own: should someone close stderr, a connection would get its number, and then the log.
    try:
        return fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 3)
    except OSError:  # closed before we were started
        return os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)


class Sink:
    """Appends records to `target`: a path (opened O_APPEND|O_CREAT, mode 0644), or an inherited descriptor.

    Raises OSError when the path can't be opened. `formatter` makes the sink's own records. `linger` is how
    many seconds the thread waits after the first record for others to share its write, `backoff` how many
    after the first error (doubled up to 5). While the output is broken, records are kept up to `max_bytes`
    and `max_records` (of those since the last write): the first records of a problem tell the most.
    """

    def __init__(
        self,
        target: str | int,
        formatter: Formatter,
        *,
        linger: float = 0.02,
        backoff: float = 0.1,
        max_bytes: int = 8 << 20,
        max_records: int = 1 << 16,
    ) -> None:
        self._target = os.path.abspath(target) if isinstance(target, str) else target
        self._formatter = formatter
        self._linger = linger
        self._backoff = backoff
        self._max_bytes = max_bytes
        self._max_records = max_records
        self._output = Output(self._target)
        # Reentrant: a destructor or signal handler may log in the middle of `append`.
        self._lock = threading.RLock()
        self._backlog: list[bytes] = []
        self._size = 0  # bytes in the backlog and in `_held`
        self._dropped = 0
        self._untold = 0  # dropped, but not yet reported in a record
        self._held: deque[bytes] = deque()  # the thread's: taken from the backlog, not written yet
        self._trouble: OSError | None = None
        self._failing: OSError | None = None
        self._reopening = False
        self._closing = False
        self._deadline = 0.0
        # One token whenever the backlog stops being empty, and one for each request to the thread. Cheaper
        # than a Condition, and put() is reentrant too.
        self._wake: SimpleQueue[None] = SimpleQueue()
        self._writer = threading.Thread(target=self._run, name="log", daemon=True)
        self._writer.start()

    @property
    def dropped(self) -> int:
        """How many records were not written, ever."""
        return self._dropped

    @property
    def failing(self) -> str | None:
        """Why nothing can be written at present; None if all is well. A slow reader is no failure."""
        return None if self._failing is None else self._failing.strerror or str(self._failing)

    def append(self, record: bytes) -> None:
        """Hand over one whole line, newline included. Never waits, never raises; any thread may call it."""
        with self._lock:
            backlog = self._backlog
            size = self._size + len(record)
            if size > self._max_bytes or len(backlog) >= self._max_records or self._closing:
                self._dropped += 1
                self._untold += 1
                return
            self._size = size
            if not backlog:
                self._wake.put(None)
            backlog.append(record)

    def reopen(self) -> None:
        """Have the thread open the path again, for log rotation. If that fails, the old file stays in use, and a
        record says so. Does nothing for an inherited descriptor.
        """
        self._reopening = True
        self._wake.put(None)

    def close(self, timeout: float) -> None:
        """Write for at most `timeout` seconds, and stop. The records that are left, and later ones, are dropped.

        A thread that hangs in write(2) is left behind: it can't hold up the exit.
        """
        self._deadline = time.monotonic() + timeout
        with self._lock:
            self._closing = True
        self._wake.put(None)
        self._writer.join(timeout + _PATIENCE)

    # From here on: the thread.

    def _run(self) -> None:
        delay: float | None = None
        backoff = self._backoff
        while not self._closing:
            self._pause(delay)
            if delay is None and not self._closing:
                self._pause(self._linger)
            if self._reopening:
                self._reopen()
            try:
                drained = self._flush(_PATIENCE)
            except OSError as error:
                self._note(error)
                delay = backoff
                backoff = min(backoff * 2, _MAX_BACKOFF)
                continue
            backoff = self._backoff
            delay = 0.0  # poll did the waiting
            if drained:
                self._note(None)
                delay = self._linger if self._backlog or self._untold else None
        self._finish()

    def _pause(self, seconds: float | None) -> None:
        with suppress(Empty):
            self._wake.get(timeout=seconds)

    def _flush(self, patience: float) -> bool:
        """Write the held records, or the backlog if there are none. False when the reader does not read."""
        if not self._held:
            self._take()
        while self._held:
            done = self._output.write(self._held, patience)
            if done is None:
                return False
            with self._lock:
                self._size -= done
        return True

    def _take(self) -> None:
        with self._lock:
            batch, self._backlog = self._backlog, []
            untold, self._untold = self._untold, 0
        self._held.extend(batch)
        trouble, self._trouble = self._trouble, None
        if untold:
            fields = {"count": untold} | ({} if trouble is None else {"error": trouble})
            self._tell(Severity.WARNING, "log records dropped", fields)

    def _note(self, error: OSError | None) -> None:
        """Note that the output fails, or works. A change is reported on stderr, unless that is the output."""
        self._trouble = error or self._trouble
        before, self._failing = self._failing, error
        if (before is None) is (error is None) or isinstance(self._target, int):
            return
        severity, message = Severity.INFO, "the log is written again"
        fields: dict[str, object] = {"file": self._target}
        if error is not None:
            severity, message = Severity.ERROR, "the log can't be written"
            fields["error"] = error
        with suppress(OSError):
            stderr = Output(STDERR)
            stderr.write(deque([self._formatter.format(time.time(), severity, message, fields)]), patience=0.0)
            stderr.close()

    def _tell(self, severity: Severity, message: str, fields: Mapping[str, object]) -> None:
        record = self._formatter.format(time.time(), severity, message, fields)
        self._held.append(record)
        with self._lock:
            self._size += len(record)

    def _reopen(self) -> None:
        self._reopening = False
        if isinstance(self._target, int):
            return
        try:
            fresh = Output(self._target)
        except OSError as error:
            self._tell(Severity.ERROR, "failed to reopen the log file", {"error": error})
            return
        self._output.close()
        self._output = fresh

    def _finish(self) -> None:
        with suppress(OSError):  # no time for another try
            left = 1.0
            while left > 0 and (self._held or self._backlog or self._untold):
                left = self._deadline - time.monotonic()
                self._flush(max(0.0, min(left, _PATIENCE)))
        with self._lock:
            self._dropped += len(self._held) + len(self._backlog)
        self._output.close()
