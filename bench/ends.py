"""The far end of every measure: one process that echoes what it gets, or sends without end when told to.

Run as `python -m bench.ends`. It prints its port, and lives until its standard input closes. A connection
that sends STREAM gets an endless stream; anything else comes back as it came, and so do datagrams to the same port.
Clients keep at most one small message under way per connection, so an echo always fits the socket's buffer.
"""

import contextlib
import os
import select
import socket
import sys

STREAM = b"S"
RCVBUFFORCE = 33  # asm-generic/socket.h
CHUNK = bytes(512 * 1024)


class Ends:
    """Serves one listening socket with one epoll loop."""

    def __init__(self, listener: socket.socket, datagrams: socket.socket) -> None:
        listener.setblocking(False)
        datagrams.setblocking(False)
        self.listener = listener
        self.datagrams = datagrams
        self.buffer = memoryview(bytearray(65536))
        self.epoll = select.epoll()
        self.epoll.register(listener.fileno(), select.EPOLLIN)
        self.epoll.register(datagrams.fileno(), select.EPOLLIN)
        self.epoll.register(sys.stdin.fileno(), select.EPOLLIN | select.EPOLLHUP)
        self.connections: dict[int, socket.socket] = {}

    def run(self) -> None:
        """Serve until standard input closes."""
        listener, stdin, datagrams = self.listener.fileno(), sys.stdin.fileno(), self.datagrams.fileno()
        while True:
            for fd, events in self.epoll.poll():
                if fd == listener:
                    self.accept()
                elif fd == datagrams:
                    self.return_datagrams()
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

    def return_datagrams(self) -> None:
        buffer, receive, send = self.buffer, self.datagrams.recvfrom_into, self.datagrams.sendto
        with contextlib.suppress(BlockingIOError):
            for _ in range(256):
                size, sender = receive(buffer)
                send(buffer[:size], sender)

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
        port = listener.getsockname()[1]
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as datagrams:
            with contextlib.suppress(PermissionError):
                datagrams.setsockopt(socket.SOL_SOCKET, RCVBUFFORCE, 8 << 20)
            datagrams.bind(("127.0.0.1", port))
            print(port, flush=True)
            Ends(listener, datagrams).run()


if __name__ == "__main__":
    main()
