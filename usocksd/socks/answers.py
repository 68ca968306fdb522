"""All that a SOCKS server says, as whole messages."""

from __future__ import annotations

from usocksd.socks.wire import Method, Reply, Socks4Reply, Version, pack_ip

METHOD_SELECTION = {method: bytes((5, method)) for method in Method}

# Replies that tell no address; of SOCKS4's refusals one is left, the others being about identd.
_SOCKS5 = {reply: bytes((5, reply, 0, 1)) + bytes(6) for reply in Reply}
_SOCKS4_GRANTED = bytes((0, Socks4Reply.GRANTED)) + bytes(6)
_SOCKS4_REJECTED = bytes((0, Socks4Reply.REJECTED)) + bytes(6)

_HTTP_TEXT = b"This port is a SOCKS proxy (SOCKS4, SOCKS4a, SOCKS5). It does not speak HTTP.\n"
HTTP_ERROR = (
    b"HTTP/1.1 501 SOCKS proxy, not HTTP\r\n"
    b"Content-Type: text/plain\r\n"
    b"Content-Length: %d\r\n"
    b"Connection: close\r\n"
    b"\r\n%s" % (len(_HTTP_TEXT), _HTTP_TEXT)
)

_VERSION5 = Version.SOCKS5  # looking an enum member up through its class costs as much as the rest


def failure(version: Version | None, reply: Reply) -> bytes:
    """The reply that refuses a request of that version."""
    return _SOCKS5[reply] if version is _VERSION5 else _SOCKS4_REJECTED


def success(version: Version | None, bound: tuple[str, int] | None) -> bytes:
    """The reply that grants a request of that version, with the address as getsockname(2) tells it.

    ValueError when that is not numeric.
    """
    if bound is None:
        return _SOCKS5[Reply.SUCCEEDED] if version is _VERSION5 else _SOCKS4_GRANTED
    ip = pack_ip(bound[0].partition("%")[0])  # that of a link-local address comes with its scope
    if ip is None:
        raise ValueError(f"bound address {bound[0]!r} is not numeric")
    port = bound[1].to_bytes(2)
    if version is _VERSION5:
        return (b"\x05\x00\x00\x01" if len(ip) == 4 else b"\x05\x00\x00\x04") + ip + port
    if len(ip) == 4:
        return _SOCKS4_GRANTED[:2] + port + ip
    return _SOCKS4_GRANTED  # a 4a name may have led to IPv6, which SOCKS4 has no room for
