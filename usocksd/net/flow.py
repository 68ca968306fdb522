"""One direction of a relay: sends to one socket what the other receives. The reactor calls its steps when one of the
two sockets is ready.
"""

from __future__ import annotations

import errno
import os
import socket
from math import inf
from typing import TYPE_CHECKING

from usocksd.net.ending import Reason, Side
from usocksd.net.endpoint import Endpoint
from usocksd.net.pipes import PIPE_SIZE, Pipe
from usocksd.net.reactor import BUFFER_SIZE, ERR, MORE, OUT

if TYPE_CHECKING:
    from usocksd.net.relay import Pair

# A direction that moved this many bytes in one turn waits for the next, so that a fast stream does not starve others.
_QUANTUM = 1024 * 1024
# A direction that fills the buffer this often in a row goes through a pipe, until a turn brings less than _TRICKLE.
_BULK_AFTER = 2
_TRICKLE = 16 * 1024
# Without a pipe, a direction asks again after this many full buffers (4 MiB).
_ASK_AGAIN_AFTER = 64
_SPLICE_FLAGS = os.SPLICE_F_NONBLOCK | os.SPLICE_F_MOVE  # never MORE: it delays the last segment


class Flow:
    """One direction: sends to `sink` what `source` receives. Registered with the reactor as the source's handler."""

    __slots__ = (
        "blocked",
        "bulk",
        "count",
        "deadline",
        "error",
        "finished",
        "full",
        "more",
        "pair",
        "pipe",
        "queued",
        "readable",
        "reverse",
        "sink",
        "source",
        "tail",
    )

    __deletable__ = ("reverse",)

    reverse: Flow

    def __init__(self, pair: Pair, source: Endpoint, sink: Endpoint) -> None:
        self.pair = pair
        self.source = source
        self.sink = sink
        self.deadline = inf
        """The pair's one deadline stands in its client's flow."""
        self.readable = source.readable
        self.more = source.more
        self.blocked = False
        """The sink is full until epoll reports that it is writable."""
        self.tail: bytes = b""
        """Received, but not yet accepted by the sink."""
        self.pipe: Pipe | None = None
        self.bulk = False
        self.full = 0
        """How many receives in a row filled the buffer; below zero after no pipe was available."""
        self.queued = False
        """It continues when the reactor has served all events of this turn, or in its next turn."""
        self.finished = False
        """All data of the source has been delivered, or can't be."""
        self.error = 0
        """The errno with which the source broke."""
        self.count = 0

    def start(self) -> None:
        """Catch up with what came before there was a relay."""
        if self.more:
            # An earlier event may have reported a reset, and is not repeated.
            self._look_for_error()
        if self.readable or self.tail:
            self.step()

    # What the reactor calls

    def on_event(self, flags: int) -> None:
        pair = self.pair
        if pair.result is not None:
            return
        try:
            if flags & MORE:
                self.more = True
                if flags & ERR:  # HUP alone: both sides have ended
                    self._look_for_error()
            if flags & OUT:
                reverse = self.reverse
                if reverse.blocked:
                    reverse.blocked = False
                    reverse.proceed()
            if flags & ~OUT:
                self.readable = True
                self.proceed()
        except Exception as error:
            pair.fail(error)

    def resume(self) -> None:
        self.queued = False
        try:
            self.step()
        except Exception as error:
            self.pair.fail(error)

    def on_deadline(self, now: float) -> None:
        pair = self.pair
        for flow in (self, self.reverse):
            if flow.error:
                pair.end(_reason(flow.error), pair.side(flow.source), flow.error)
                return
        half_closed = self.finished or self.reverse.finished
        limit = pair.limits.half_closed if half_closed else pair.limits.idle
        if pair.active + limit > now:
            self.deadline = pair.active + limit
            pair.keep_alive()
        else:
            pair.end(Reason.HALF_CLOSED if half_closed else Reason.IDLE, Side.PROXY)

    def interrupt(self, reason: BaseException) -> None:
        self.pair.end(Reason.STOPPED, Side.PROXY)

    # The work

    def proceed(self) -> None:
        """Move what can be moved: now, or after all other events if it is probably much."""
        if self.bulk or self.full:
            self._queue()
        elif not self.queued:
            self.step()

    def step(self) -> None:
        """Move what can be moved now."""
        if self.pair.result is not None or self.finished or self.blocked:
            return
        if (self.tail and not self._flush_tail()) or not self.readable:
            return
        # (A pipe with bytes in it implies `readable`: what filled it did not run dry.)
        if self.bulk:
            self._splice()
        else:
            self._copy()

    def _copy(self) -> None:
        pair = self.pair
        reactor = pair.reactor
        view = reactor.view
        quantum = _QUANTUM
        while True:
            try:
                size = self.source.sock.recv_into(view)
            except BlockingIOError:
                self.readable = self.more = False
                return
            except OSError as error:
                self._source_broke(error.errno or errno.EIO)
                return
            if size == 0:
                self._source_finished()
                return
            pair.active = reactor.now
            try:
                sent = self.sink.sock.send(view[:size])
            except BlockingIOError:
                sent = 0
            except OSError as error:
                self._sink_broke(error.errno or errno.EIO)
                return
            self.count += sent
            if sent < size:
                self.tail = bytes(view[sent:size])
                self._block()
                return
            if size < BUFFER_SIZE:
                self.full = 0
                if not self.more:
                    # A short read: the socket is empty, and epoll will report new data. Not asking again saves a
                    # quarter of a small round trip's CPU.
                    self.readable = False
                    return
            else:
                self.full += 1
                if self.full >= _BULK_AFTER:
                    self.full = 0
                    self.bulk = True
                    self._queue()
                    return
            quantum -= size
            if quantum <= 0:
                self._queue()
                return

    def _splice(self) -> None:
        """As `_copy`, through a pipe and without the bytes coming to user space."""
        pair = self.pair
        pipe = self.pipe or pair.pipes.borrow()
        if pipe is None:
            self.bulk = False
            self.full = -_ASK_AGAIN_AFTER
            self._copy()
            return
        self.pipe = pipe
        source, sink = self.source.fd, self.sink.fd
        moved = 0
        while True:
            if not pipe.filled:
                if moved >= _QUANTUM:
                    self._give_pipe_back()
                    self._queue()
                    return
                try:
                    pipe.filled = os.splice(source, pipe.writer, PIPE_SIZE, flags=_SPLICE_FLAGS)
                except BlockingIOError:
                    self._give_pipe_back()
                    if self.more:
                        self._ask_recv()
                        return
                    self.readable = False
                    self.bulk = moved >= _TRICKLE
                    return
                except OSError as error:
                    self._give_pipe_back()
                    self._source_broke(error.errno or errno.EIO)
                    return
                if not pipe.filled:
                    self._give_pipe_back()
                    self._ask_recv()
                    return
                pair.active = pair.reactor.now
            try:
                sent = os.splice(pipe.reader, sink, pipe.filled, flags=_SPLICE_FLAGS)
            except BlockingIOError:
                self._block()
                return
            except OSError as error:
                self._sink_broke(error.errno or errno.EIO)
                return
            pipe.filled -= sent
            self.count += sent
            moved += sent
            pair.active = pair.reactor.now

    def _ask_recv(self) -> None:
        """At an urgent mark splice(2) returns as if the socket were empty or ended, so ask recv(2). Not at once, since
        that may lead to splice again.
        """
        self.bulk = False
        self._queue()

    def _queue(self) -> None:
        """Continue when all events of this turn are served; once, however often this is called."""
        if not self.queued:
            self.queued = True
            self.pair.reactor.resume_later(self)

    def _flush_tail(self) -> bool:
        """Send the rest of an earlier step. True when nothing of it is left."""
        try:
            sent = self.sink.sock.send(self.tail)
        except BlockingIOError:
            sent = 0
        except OSError as error:
            self._sink_broke(error.errno or errno.EIO)
            return False
        self.count += sent
        self.tail = self.tail[sent:]
        if sent:
            self.pair.active = self.pair.reactor.now
        if self.tail:
            self._block()
            return False
        return True

    def _block(self) -> None:
        """The sink is full: read no more until it takes more."""
        self.blocked = True
        if self.sink.writable:
            # The first time that this socket is full. From now on its events tell when it is writable.
            self.sink.writable = False
            self.pair.reactor.watch_writable(self.sink.fd)

    def _give_pipe_back(self) -> None:
        pipe, self.pipe = self.pipe, None
        if pipe is not None:
            self.pair.pipes.give_back(pipe)

    def release(self) -> None:
        """The pair has ended: return what was borrowed, and drop the reference to the other flow."""
        self._give_pipe_back()
        self.source.readable, self.source.more = self.readable, self.more
        del self.reverse

    # Ends

    def _source_finished(self) -> None:
        """The source has ended."""
        self.finished = True
        pair = self.pair
        if self.error:
            pair.end(_reason(self.error), pair.side(self.source), self.error)
        elif self.reverse.finished:
            pair.end(Reason.CLOSED, pair.side(self.sink))
        else:
            try:
                self.sink.sock.shutdown(socket.SHUT_WR)
            except OSError as error:
                self._sink_broke(error.errno or errno.EIO)
                return
            # The end of a stream is a sign of life too; from now on the shorter limit counts.
            now = pair.active = pair.half_closed = pair.reactor.now
            pair.first = pair.side(self.source)
            limits = pair.limits
            pair.up.deadline = min(pair.up.deadline, now + min(limits.half_closed, limits.keepalive.half_after))

    def _source_broke(self, error: int) -> None:
        self.error = self.error or error
        self.reverse.finished = True
        self._source_finished()

    def _sink_broke(self, error: int) -> None:
        """Nothing more can be delivered; data that the sink sent before it broke still goes the other way."""
        self.finished = True
        self.tail = b""
        self._give_pipe_back()
        reverse = self.reverse
        reverse.error = reverse.error or error
        reverse.readable = reverse.more = True
        self._bound_delivery()
        if reverse.finished:
            reverse._source_finished()
        else:
            reverse.step()

    def _look_for_error(self) -> None:
        """ERR was reported: a reset need not show as an error of recv (after a FIN it reads as the end)."""
        error = self.source.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if not error:
            return
        self.error = error
        reverse = self.reverse
        if not reverse.finished:
            reverse.finished = True
            reverse.tail = b""
            reverse._give_pipe_back()
        self._bound_delivery()
        if self.finished:
            self._source_finished()

    def _bound_delivery(self) -> None:
        """One side broke: the other has a few seconds to receive what was sent before."""
        up = self.pair.up
        up.deadline = min(up.deadline, self.pair.reactor.now + self.pair.limits.deliver)


def _reason(error: int) -> Reason:
    # (shutdown(2) gives ENOTCONN for a connection that was reset.)
    return Reason.RESET if error in (errno.ECONNRESET, errno.EPIPE, errno.ENOTCONN) else Reason.ERROR
