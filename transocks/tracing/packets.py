"""Packets as bytes, and an interface that receives one as if a client of a gateway had sent it.

BPF_PROG_TEST_RUN (Linux 4.12) runs a program of the traffic control type on bytes that we give it. Ours is a single
call of bpf_clone_redirect with BPF_F_INGRESS: the interface receives those bytes, and they pass everything that a real
packet passes: ingress, rules with `iifname`, reverse path filter, routing. The host is not changed for that. It takes
CAP_BPF and CAP_NET_ADMIN of the host itself, which an unprivileged container does not have.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import platform
import socket
import struct

from transocks.tracing.reports import RST, TCP, Packet

_TTL = 64
_IPV4, _IPV6 = 0x0800, 0x86DD
_SENDER = bytes((2, 0, 0, 0, 0, 1))  # a hardware address of local administration

_SYSCALL = {"x86_64": 321, "aarch64": 280, "riscv64": 280, "loongarch64": 280, "ppc64le": 361, "s390x": 351}
# linux/bpf.h
_PROG_LOAD, _PROG_TEST_RUN = 5, 10
_SCHED_CLS = 3
_CLONE_REDIRECT, _INGRESS = 13, 1
_MOVE, _CALL, _EXIT = 0xB7, 0x85, 0x95  # of an immediate value into a register
_SIZE = 128  # larger than any union bpf_attr so far needs for these two
_SIOCGIFHWADDR = 0x8927  # linux/sockios.h


def datagram(packet: Packet) -> bytes:
    """An IP packet with the header of TCP or UDP, without payload: RFC 791, RFC 8200, RFC 9293."""
    source, destination = packet.source.packed, packet.destination.packed
    if packet.protocol == TCP:
        sequence = 2 if packet.flags & RST else 1  # behind the SYN
        head = struct.pack(">HHIIBB", packet.sport, packet.dport, sequence, 0, 5 << 4, packet.flags)
        before, after = head + struct.pack(">H", 65535), bytes(2)
    else:
        before, after = struct.pack(">HHH", packet.sport, packet.dport, 8), b""
    size = len(before) + 2 + len(after)
    pseudo = source + destination + struct.pack(">II", size, packet.protocol)
    segment = before + struct.pack(">H", _checksum(pseudo + before + bytes(2) + after)) + after
    if packet.source.version == 6:
        return struct.pack(">IHBB", 6 << 28, size, packet.protocol, _TTL) + source + destination + segment
    ip = struct.pack(">BBHHHBBH", 0x45, 0, 20 + size, 1, 0, _TTL, packet.protocol, 0) + source + destination
    return ip[:10] + struct.pack(">H", _checksum(ip)) + ip[12:] + segment


def _checksum(data: bytes) -> int:
    """RFC 1071, of an even number of bytes."""
    total: int = sum(struct.unpack(f">{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def inject(device: str, packet: Packet, to: str | None = None) -> None:
    """Let a device receive a packet, addressed to the hardware address of `to` (the bridge that the device belongs to).

    Raises OSError.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        answer = fcntl.ioctl(sock, _SIOCGIFHWADDR, struct.pack("16s24x", (to or device).encode()))
    kind = struct.pack(">H", _IPV4 if packet.source.version == 4 else _IPV6)
    frame = answer[18:24] + _SENDER + kind + datagram(packet)
    program = ctypes.create_string_buffer(
        _instruction(_MOVE, 2, socket.if_nametoindex(device)) + _instruction(_MOVE, 3, _INGRESS)
        + _instruction(_CALL, 0, _CLONE_REDIRECT) + _instruction(_EXIT, 0, 0)
    )  # fmt: skip
    license_ = ctypes.create_string_buffer(b"GPL")
    data = ctypes.create_string_buffer(frame, len(frame))
    loaded = _bpf(
        _PROG_LOAD,
        struct.pack("=IIQQ", _SCHED_CLS, len(program) // 8, ctypes.addressof(program), ctypes.addressof(license_)),
    )
    try:
        _bpf(_PROG_TEST_RUN, struct.pack("=IIIIQQI", loaded, 0, len(frame), 0, ctypes.addressof(data), 0, 1))
    finally:
        os.close(loaded)


def _instruction(operation: int, register: int, value: int) -> bytes:
    return struct.pack("=BBhi", operation, register, 0, value)


def _bpf(command: int, attributes: bytes) -> int:
    number = _SYSCALL.get(platform.machine())
    if number is None:
        raise OSError(f"bpf(2) of {platform.machine()} is not known here")
    buffer = ctypes.create_string_buffer(attributes, _SIZE)
    result = int(ctypes.CDLL(None, use_errno=True).syscall(number, command, buffer, _SIZE))
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return result
