"""The header of relayed UDP datagrams."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from usocksd.socks.datagram import BadDatagram, Header, header, parse


@pytest.mark.parametrize(
    ("host", "wire"),
    [
        ("192.0.2.1", b"\0\0\0\x01\xc0\0\x02\x01\0\x35"),
        ("2001:db8::1", b"\0\0\0\x04\x20\x01\x0d\xb8" + bytes(11) + b"\x01\0\x35"),
        ("dns.example", b"\0\0\0\x03\x0bdns.example\0\x35"),
    ],
)
def test_both_ways(host: str, wire: bytes) -> None:
    assert header(host, 53) == wire
    data = wire + b"payload"
    assert parse(memoryview(bytearray(data)), len(data)) == Header(host, 53, len(wire))
    assert parse(wire, len(wire)) == Header(host, 53, len(wire))  # without payload


@pytest.mark.parametrize(
    ("wire", "cause"),
    [
        (b"", "short"),
        (b"\0\0\0\x01", "short"),
        (b"\0\0\0\x01\xc0\0\x02\x01\0", "short"),
        (b"\0\0\0\x04" + bytes(17), "short"),
        (b"\0\0\0\x03\x0bdns.exampl\0\x35", "short"),
        (b"\0\0\x01\x01\xc0\0\x02\x01\0\x35", "fragment"),
        (b"\0\0\x80\x01\xc0\0\x02\x01\0\x35", "fragment"),
        (b"\x01\0\0\x01\xc0\0\x02\x01\0\x35", "reserved"),
        (b"\0\0\0\x02\xc0\0\x02\x01\0\x35", "address_type"),
        (b"\0\0\0\x03\0\0\x35", "name"),
        (b"\0\0\0\x03\x02\xff\xfe\0\x35", "name"),
        (b"\0\0\0\x03\x02a\0\0\x35", "name"),
    ],
)
def test_dropped(wire: bytes, cause: str) -> None:
    assert cause in BadDatagram.CAUSES
    with pytest.raises(BadDatagram) as raised:
        parse(wire, len(wire))
    assert raised.value.cause == cause


def test_bytes_behind_the_datagram_are_not_read() -> None:
    """The buffer still has those of the datagram before."""
    before = b"\0\0\0\x01\xc0\0\x02\x01\0\x35"
    with pytest.raises(BadDatagram, match="short"):
        parse(memoryview(before), 8)


@given(st.binary(max_size=300))
def test_any_datagram_has_a_header_or_a_cause(data: bytes) -> None:
    try:
        found = parse(data, len(data))
    except BadDatagram as bad:
        fault = bad
    else:
        assert found.size <= len(data)
        again = header(found.host, found.port)
        assert parse(again, len(again)) == Header(found.host, found.port, len(again))
        return
    assert fault.cause in BadDatagram.CAUSES
