"""Hosts and ports as text."""

from __future__ import annotations


def join_port(host: object, port: int) -> str:
    """host:port, with brackets where the host is an IPv6 address."""
    text = str(host)
    return f"[{text}]:{port}" if ":" in text else f"{text}:{port}"


def unmapped(host: str) -> str:
    """A numeric address as a socket tells it, with an IPv4-mapped one (::ffff:192.0.2.1, what a socket for both
    families has) as IPv4: one host has one address, to limits, rules, records and the PROXY protocol.
    """
    return host.removeprefix("::ffff:") if "." in host else host
