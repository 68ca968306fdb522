"""What a client wants to reach: from its session to the upstream that is to reach it."""

from __future__ import annotations

from typing import NamedTuple

from transocks.original_dst import Destination


class Request(NamedTuple):
    """What a client wants to reach, and what is known of it."""

    client: Destination
    """numeric address and port of the client"""
    destination: Destination
    """where it was going: the original destination"""
    name: str | None = None
    """to be asked for instead of the address; canonical"""
    first: bytes = b""
    """what the client has said already: goes on unchanged, once"""
    repeatable: bool = False
    """`first` is a TLS hello: may be sent to a second proxy when one fails"""
