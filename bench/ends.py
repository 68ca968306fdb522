"""The far end of every measure: one process that echoes what it gets, or sends without end when told to.

Run as `python -m bench.ends`. It prints its port, and lives until its standard input closes. A connection
that sends STREAM gets an endless stream; anything else comes back as it came. Clients keep at most one small
message under way per connection, so an echo always fits the socket's buffer.
"""

import contextlib
import os
import select
import socket
import sys

STREAM = b"S"
CHUNK = bytes(512 * 1024)


class Ends:
    """Serves one listening socket with one epoll loop."""

    def __init__(self, listener: socket.socket) -> None:
        listener.setblocking(False)
        self.listener = listener
        self.epoll = select.epoll()
        self.epoll.register(listener.fileno(), select.EPOLLIN)
        self.epoll.register(sys.stdin.fileno(), select.EPOLLIN | select.EPOLLHUP)
        self.connections: dict[int, socket.socket] = {}

    def run(self) -> None:
        """Serve until standard input closes."""
        listener, stdin = self.listener.fileno(), sys.stdin.fileno()
        while True:
            for fd, events in self.epoll.poll():
                if fd == listener:
                    self.accept()
                elif fd == stdin:
                    if not os.read(stdin, 1024):
                        return
                else:
                    self.serve(fd, events)

    def accept(self) -> None:
        with contextlib.suppress(BlockingIOError, ConnectionAbortedError):
            for _ in range(64):
                connection, _peer = self.listener.accept()
                connection.setblocking(False)
                self.connections[connection.fileno()] = connection
                self.epoll.register(connection.fileno(), select.EPOLLIN)

    def serve(self, fd: int, events: int) -> None:
        connection = self.connections[fd]
        try:
            if events & ~select.EPOLLOUT:
                data = connection.recv(65536)
                if not data:
                    raise ConnectionResetError
                if data[:1] == STREAM:
                    self.epoll.modify(fd, select.EPOLLIN | select.EPOLLOUT)
                else:
                    connection.send(data)
            elif events & select.EPOLLOUT:
                connection.send(CHUNK)
        except BlockingIOError:
            pass
        except OSError:
            del self.connections[fd]
            connection.close()  # leaves the epoll set with it


def main() -> None:
    with socket.create_server(("0.0.0.0", 0), backlog=4096) as listener:
        # Inherited by what is accepted; small answers must not wait for an acknowledgement.
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        print(listener.getsockname()[1], flush=True)
        Ends(listener).run()


if __name__ == "__main__":
    main()
