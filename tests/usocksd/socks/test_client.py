"""The client role, as conversations. Docstrings name the line of the wire notes that a test is about."""

from __future__ import annotations

from typing import Any

import pytest
from conversation import after, error_of

from usocksd.errors import ProtocolError, UpstreamError
from usocksd.socks import (
    NEED_DATA,
    AuthenticationFailed,
    Command,
    Established,
    Kind,
    Reply,
    RequestRefused,
    Socks4Reply,
    SocksConnect,
    UpstreamFault,
    Version,
)

REPLY = b"\x05\x00\x00\x01\xc6\x33\x64\x09\x9c\x40"


def test_ordinary_conversation() -> None:
    client = SocksConnect("example.com", 443)
    assert client.data_to_send() == b"\x05\x01\x00"
    assert client.next_event() is NEED_DATA
    client.receive_data(b"\x05\x00")
    assert client.next_event() is NEED_DATA
    assert client.data_to_send() == b"\x05\x01\x00\x03\x0bexample.com\x01\xbb"
    assert client.data_to_send() == b""
    client.receive_data(REPLY)
    assert client.next_event() == Established("198.51.100.9", 40000)
    assert client.trailing_data == b""
    with pytest.raises(RuntimeError):
        client.next_event()


@pytest.mark.parametrize(
    ("host", "address"),
    [
        ("192.0.2.7", b"\x01\xc0\x00\x02\x07"),
        ("2001:db8::1", b"\x04" + bytes.fromhex("20010db8000000000000000000000001")),
        ("example.com", b"\x03\x0bexample.com"),
        ("127.1", b"\x03\x05127.1"),
        ("bücher.de", b"\x03\x0ab\xc3\xbccher.de"),
        ("n" * 255, b"\x03\xff" + b"n" * 255),
    ],
)
def test_addresses(host: str, address: bytes) -> None:
    """A numeric host is sent as an address, any other as a name."""
    client = after(SocksConnect(host, 80), b"\x05\x00")
    client.data_to_send()
    client.next_event()
    assert client.data_to_send() == b"\x05\x01\x00" + address + b"\x00\x50"


@pytest.mark.parametrize(("host", "address"), [("0.0.0.0", b"\x01" + bytes(4)), ("::", b"\x04" + bytes(16))])
def test_a_udp_association(host: str, address: bytes) -> None:
    """RFC 1928 section 4: all zeros if the client does not know where its datagrams will come from."""
    client = SocksConnect(host, 0, pipelined=True, command=Command.UDP_ASSOCIATE)
    assert client.data_to_send() == b"\x05\x01\x00" + b"\x05\x03\x00" + address + b"\x00\x00"
    client.receive_data(b"\x05\x00" + REPLY)
    assert client.next_event() == Established("198.51.100.9", 40000)


@pytest.mark.parametrize("username", ["us\u00e9r", "", "u" * 255])
def test_username_and_password(username: str) -> None:
    """RFC 1929, both fields in UTF-8; the request waits for the status."""
    client = SocksConnect("192.0.2.7", 80, username=username, password="key")
    assert client.data_to_send() == b"\x05\x02\x00\x02"
    client.receive_data(b"\x05\x02")
    assert client.next_event() is NEED_DATA
    raw = username.encode()
    assert client.data_to_send() == b"\x01" + bytes((len(raw),)) + raw + b"\x03key"
    client.receive_data(b"\x01\x00")
    assert client.next_event() is NEED_DATA
    assert client.data_to_send().startswith(b"\x05\x01\x00\x01")
    client.receive_data(REPLY)
    assert isinstance(client.next_event(), Established)


def test_server_may_not_want_the_credentials() -> None:
    client = after(SocksConnect("192.0.2.7", 80, username="me"), b"\x05\x00")
    client.data_to_send()
    assert client.next_event() is NEED_DATA
    assert client.data_to_send().startswith(b"\x05\x01\x00\x01")


@pytest.mark.parametrize(
    ("reply", "host"),
    [
        (REPLY, "198.51.100.9"),
        (b"\x05\x00\x00\x04" + bytes(15) + b"\x01\x9c\x40", "::1"),
        (b"\x05\x00\x00\x03\x0bexample.com\x9c\x40", "example.com"),
        (b"\x05\x00\x00\x03\x00\x9c\x40", ""),
        (b"\x05\x00\x00\x03\x01\xff\x9c\x40", "\ufffd"),
    ],
)
@pytest.mark.parametrize("trickle", [True, False])
def test_reply_of_any_address_type(reply: bytes, host: str, trickle: bool) -> None:
    """The reply may carry any ATYP; bytes behind it are payload and are handed to the relay."""
    pieces = [bytes((byte,)) for byte in reply[:-1]] if trickle else [reply[:-1]]
    client = after(SocksConnect("192.0.2.7", 80), b"\x05\x00", *pieces, reply[-1:] + b"payload")
    assert client.next_event() == Established(host, 40000)
    assert client.trailing_data == b"payload"
    client.receive_data(b" and more")
    assert client.trailing_data == b"payload and more"


@pytest.mark.parametrize("reply", [reply for reply in Reply if reply is not Reply.SUCCEEDED])
@pytest.mark.parametrize("rest", [b"", b"\x00\x01" + bytes(6), b"\x00\x09"])
def test_refused(reply: Reply, rest: bytes) -> None:
    """A refusal counts even when it is cut short or odd behind its code."""
    error = error_of(after(SocksConnect("192.0.2.7", 80), b"\x05\x00", bytes((5, reply)) + rest))
    assert isinstance(error, RequestRefused)
    assert error.reply is reply
    assert reply.name.lower().replace("_", " ") in str(error)


USER = {"username": "me", "password": "key"}
PIPELINED = {"pipelined": True}
SOCKS4 = {"version": Version.SOCKS4}


@pytest.mark.parametrize(
    ("options", "received", "error", "detail"),
    [
        # RFC 1929: any status but 0 is a refusal.
        (USER, [b"\x05\x02", b"\x01\x01"], AuthenticationFailed, None),
        (USER, [b"\x05\x02", b"\x01\xff"], AuthenticationFailed, None),
        (USER, [b"\x05\x02", b"\x05\x01"], AuthenticationFailed, None),
        (USER | PIPELINED, [b"\x05\x02\x01\x01"], AuthenticationFailed, None),
        # No acceptable method
        ({}, [b"\x05\xff"], AuthenticationFailed, None),
        (USER, [b"\x05\xff"], AuthenticationFailed, None),
        # A method that was not offered. Behind a pipelined greeting, bytes would mean something else.
        ({}, [b"\x05\x01"], UpstreamFault, Kind.MALFORMED),
        ({}, [b"\x05\x02"], UpstreamFault, Kind.MALFORMED),
        (USER, [b"\x05\x01"], UpstreamFault, Kind.MALFORMED),
        (USER, [b"\x05\x80"], UpstreamFault, Kind.MALFORMED),
        (PIPELINED, [b"\x05\x02"], UpstreamFault, Kind.MALFORMED),
        (USER | PIPELINED, [b"\x05\x00"], UpstreamFault, Kind.MALFORMED),
        # Malformed
        ({}, [b"\x04"], UpstreamFault, Kind.MALFORMED),
        ({}, [b"HTTP/1.1 400 Bad Request\r\n"], UpstreamFault, Kind.MALFORMED),
        ({}, [b"\x05\x00", b"\x01\x00"], UpstreamFault, Kind.MALFORMED),
        ({}, [b"\x05\x00\x05\x00\x00\x02\x00"], UpstreamFault, Kind.MALFORMED),
        (SOCKS4, [b"\x05\x00"], UpstreamFault, Kind.MALFORMED),
        # Closed early
        ({}, [b""], UpstreamFault, Kind.EOF),
        ({}, [b"\x05", b""], UpstreamFault, Kind.EOF),
        ({}, [b"\x05\x00", b""], UpstreamFault, Kind.EOF),
        ({}, [b"\x05\x00", REPLY[:-1], b""], UpstreamFault, Kind.EOF),
        # Refused: pipelined, with a number that is nobody's, and by SOCKS4 (some servers say version 4)
        (PIPELINED, [b"\x05\x00\x05\x02"], RequestRefused, Reply.NOT_ALLOWED),
        ({}, [b"\x05\x00\x05\xf0"], RequestRefused, 0xF0),
        *((SOCKS4, [bytes((0, code))], RequestRefused, Socks4Reply(code)) for code in (91, 92, 93)),
        (SOCKS4, [b"\x04\x5b"], RequestRefused, Socks4Reply.REJECTED),
    ],
)
def test_errors(options: dict[str, Any], received: list[bytes], error: type[UpstreamError], detail: object) -> None:
    raised = error_of(after(SocksConnect("192.0.2.7", 80, **options), *received))
    assert type(raised) is error
    assert isinstance(raised, ProtocolError) is (error is UpstreamFault)
    assert getattr(raised, "kind", getattr(raised, "reply", None)) is detail


# SOCKS4 and 4a


@pytest.mark.parametrize(
    ("host", "request_bytes"),
    [
        ("192.0.2.7", b"\x04\x01\x00\x50\xc0\x00\x02\x07me\x00"),
        ("0.0.0.0", b"\x04\x01\x00\x50\x00\x00\x00\x00me\x00"),
        ("example.com", b"\x04\x01\x00\x50\x00\x00\x00\x01me\x00example.com\x00"),
    ],
)
def test_socks4(host: str, request_bytes: bytes) -> None:
    """0.0.0.x with x≠0 means 4a. Reply VN is 0."""
    client = SocksConnect(host, 80, version=Version.SOCKS4, user_id="me")
    assert client.data_to_send() == request_bytes
    after(client, b"\x00", b"\x5a\x9c\x40\xc6\x33\x64", b"\x09payload")
    assert client.next_event() == Established("198.51.100.9", 40000)
    assert client.trailing_data == b"payload"
    assert client.data_to_send() == b""


def test_socks4_with_its_version_in_the_reply() -> None:
    """Reply VN is 0, and 4 from some servers, which others' clients take."""
    client = SocksConnect("192.0.2.7", 80, version=Version.SOCKS4)
    after(client, b"\x04", b"\x5a\x9c\x40\xc6\x33\x64\x09payload")
    assert client.next_event() == Established("198.51.100.9", 40000)
    assert client.trailing_data == b"payload"


# What can't be said


@pytest.mark.parametrize("version", list(Version))
@pytest.mark.parametrize("host", ["", "a\0b", "a\r\nb", "n" * 256, "ü" * 128, "\ud800"])
def test_invalid_hosts(host: str, version: Version) -> None:
    with pytest.raises(ValueError, match=r"empty|control|bytes|surrogates"):
        SocksConnect(host, 80, version=version)


@pytest.mark.parametrize(
    ("host", "options", "message"),
    [
        ("2001:db8::1", SOCKS4, "IPv6"),
        ("0.0.0.1", SOCKS4, "4a"),  # 0.0.0.x with x not 0 means 4a; 0.0.0.0 does not
        ("192.0.2.7", {"username": "u" * 256}, "256 bytes"),
        ("192.0.2.7", {"username": "u", "password": "ü" * 128}, "256 bytes"),
        ("192.0.2.7", SOCKS4 | {"user_id": "u" * 256}, "256 bytes"),
        ("192.0.2.7", SOCKS4 | {"user_id": "u\0u"}, "NUL"),
    ],
)
def test_requests_that_a_version_cannot_express(host: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SocksConnect(host, 80, **options)
