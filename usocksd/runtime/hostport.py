"""host:port as text."""

from __future__ import annotations


def join_port(host: object, port: int) -> str:
    """host:port, with brackets where the host is an IPv6 address."""
    text = str(host)
    return f"[{text}]:{port}" if ":" in text else f"{text}:{port}"
