"""Makes an interface receive a packet as if a client of a gateway had sent it.

BPF_PROG_TEST_RUN (Linux 4.12) runs a program of the traffic control type on bytes that we give it. Ours is a single
call of bpf_clone_redirect with BPF_F_INGRESS: the interface receives those bytes, and they pass everything that a real
packet passes: ingress, rules with `iifname`, reverse path filter, routing. The host is not changed for that. It takes
CAP_BPF and CAP_NET_ADMIN of the host itself, which an unprivileged container does not have.
"""

from __future__ import annotations

import ctypes
import os
import platform
import socket
import struct

_SYSCALL = {"x86_64": 321, "aarch64": 280, "riscv64": 280, "loongarch64": 280, "ppc64le": 361, "s390x": 351}
# linux/bpf.h
_PROG_LOAD, _PROG_TEST_RUN = 5, 10
_SCHED_CLS = 3
_CLONE_REDIRECT, _INGRESS = 13, 1
_MOVE, _CALL, _EXIT = 0xB7, 0x85, 0x95  # of an immediate value into a register
_SIZE = 128  # larger than any union bpf_attr so far needs for these two


def inject(interface: str, frame: bytes) -> None:
    """Raises OSError."""
    index = socket.if_nametoindex(interface)
    program = ctypes.create_string_buffer(
        _instruction(_MOVE, 2, index) + _instruction(_MOVE, 3, _INGRESS) + _instruction(_CALL, 0, _CLONE_REDIRECT)
        + _instruction(_EXIT, 0, 0)
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
