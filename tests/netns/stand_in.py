"""Stands in for transocks: sends each connection its original destination, then echoes.

    stand_in.py redirect|tproxy PORT ADDRESS ...

Prints a line once it listens. Standard library only; runs in a namespace as a process, so that it can be killed.
"""

from __future__ import annotations

import select
import socket
import struct
import sys
from ipaddress import ip_address

IP_TRANSPARENT, IPV6_TRANSPARENT, SO_ORIGINAL_DST = 19, 75, 80  # linux/in.h, linux/in6.h, linux/netfilter_ipv4.h


def listen(kind: str, address: str, port: int) -> socket.socket:
    six = ":" in address
    listener = socket.socket(socket.AF_INET6 if six else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if six:
        listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
    if kind == "tproxy":
        level, option = (socket.IPPROTO_IPV6, IPV6_TRANSPARENT) if six else (socket.SOL_IP, IP_TRANSPARENT)
        listener.setsockopt(level, option, 1)
    listener.bind((address, port))
    listener.listen()
    return listener


def original_destination(accepted: socket.socket, kind: str) -> tuple[str, int]:
    if kind == "tproxy":
        address, port = accepted.getsockname()[:2]
        return address, port
    if accepted.family == socket.AF_INET:
        raw = accepted.getsockopt(socket.SOL_IP, SO_ORIGINAL_DST, 16)
        port, packed = struct.unpack_from("!2xH4s", raw)
    else:
        raw = accepted.getsockopt(socket.IPPROTO_IPV6, SO_ORIGINAL_DST, 28)
        port, packed = struct.unpack_from("!2xH4x16s", raw)
    return str(ip_address(packed)), port


def main(kind: str, port: str, *addresses: str) -> None:
    listeners = [listen(kind, address, int(port)) for address in addresses]
    connections: list[socket.socket] = []
    print("listening", flush=True)
    while True:
        for sock in select.select([*listeners, *connections], [], [])[0]:
            try:
                if sock in listeners:
                    accepted, _ = sock.accept()
                    connections.append(accepted)
                    host, going = original_destination(accepted, kind)
                    accepted.sendall(f"redirected {host} {going}\n".encode())
                elif data := sock.recv(1000):
                    sock.sendall(data)
                else:
                    connections.remove(sock)
                    sock.close()
            except OSError:
                continue


if __name__ == "__main__":
    main(*sys.argv[1:])
