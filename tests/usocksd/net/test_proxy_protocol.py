"""The PROXY protocol: the bytes of the specification by hand, both ways, in pieces, and garbage."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from usocksd.net.address import HostPort, numeric_address
from usocksd.net.proxy_protocol import (
    LOCAL_HEADER,
    MAX_LENGTH,
    SIGNATURE,
    Header,
    HeaderFault,
    Receiver,
    header,
    unlikely,
)

# By hand, from section 2.2 of the specification.
V4 = bytes.fromhex("0d0a0d0a000d0a515549540a 21 11 000c  c0000201 cb007150  d903 01bb")
V6 = bytes.fromhex(
    "0d0a0d0a000d0a515549540a 21 21 002420010db8000000000000000000000001 20010db8008000000000000000000080 0001 ffff"
)
FROM_V4, TO_V4 = HostPort("192.0.2.1", 55555), HostPort("203.0.113.80", 443)
FROM_V6, TO_V6 = HostPort("2001:db8::1", 1), HostPort("2001:db8:80::80", 65535)


def packet(command: int, family: int, body: bytes, length: int | None = None) -> bytes:
    return SIGNATURE + bytes((command, family)) + (len(body) if length is None else length).to_bytes(2) + body


def received(data: bytes) -> tuple[Header | None, bytes]:
    receiver = Receiver()
    return receiver.receive_data(data), receiver.trailing_data


def one_by_one(data: bytes) -> tuple[Header | None, bytes]:
    """The same, a byte at a time; the bytes behind the header come with its last one."""
    receiver = Receiver()
    for at in range(len(data)):
        found = receiver.receive_data(data[at : at + 1])
        if found is not None:
            return found, data[at + 1 :]
    return None, b""


@pytest.mark.parametrize(("wire", "source", "destination"), [(V4, FROM_V4, TO_V4), (V6, FROM_V6, TO_V6)])
def test_the_bytes_of_the_specification(wire: bytes, source: HostPort, destination: HostPort) -> None:
    assert header(source, destination) == wire
    assert received(wire + b"\x05\x01\x00") == (Header(source, destination), b"\x05\x01\x00")


@pytest.mark.parametrize(
    ("source", "read"),
    [
        (FROM_V4, FROM_V4),
        (("::ffff:192.0.2.1", 55555), FROM_V4),
        (("fe80::1%eth0", 1), HostPort("fe80::1", 1)),
    ],
)
def test_mixed_families_are_mapped_on_the_way_and_zones_not_written(source: tuple[str, int], read: HostPort) -> None:
    wire = header(source, TO_V6)
    assert wire[13] == 0x21
    assert received(wire)[0] == Header(read, TO_V6)


def test_only_addresses_are_written() -> None:
    with pytest.raises(ValueError, match=r"www\.example"):
        header(("www.example.com", 1), TO_V4)


@pytest.mark.parametrize(
    "wire",
    [
        LOCAL_HEADER,
        packet(0x20, 0x11, V4[16:]),  # the addresses count for nothing
        packet(0x20, 0x00, b"\x04\x00\x01\x00"),
        packet(0x20, 0x31, bytes(216)),
    ],
    ids=["plain", "with addresses", "with a TLV", "unix"],
)
def test_local(wire: bytes) -> None:
    assert received(wire + b"rest") == (Header(None, None), b"rest")


def test_tlvs_are_skipped() -> None:
    tlvs = b"\x03\x00\x04\x00\x00\x00\x00" + b"\x04" + (2000).to_bytes(2) + bytes(2000)
    assert received(packet(0x21, 0x11, V4[16:] + tlvs) + b"rest") == (Header(FROM_V4, TO_V4), b"rest")


@pytest.mark.parametrize(
    ("wire", "message"),
    [
        (b"PROXY TCP4 192.0.2.1 203.0.113.80 55555 443\r\n", "version 1"),
        (b"PROXY ", "version 1"),
        (b"PUT / HTTP/1.1\r\n", "spoke HTTP"),
        (b"GET / HTTP/1.1\r\n", "spoke HTTP"),
        (b"\x05\x01\x00", "spoke SOCKS with no PROXY header"),
        (b"\x04\x01", "spoke SOCKS with no PROXY header"),
        (b"\x16\x03\x01", "spoke TLS"),
        (b"\x00", "first byte 0x00"),
        (SIGNATURE[:-1] + b"\r", "first byte 0x0d"),
        (SIGNATURE + b"\x11", "version 1, command 1"),
        (SIGNATURE + b"\x22", "version 2, command 2"),
        (packet(0x21, 0x00, b""), "family and protocol 0x00"),
        (packet(0x21, 0x12, V4[16:]), "family and protocol 0x12"),
        (packet(0x21, 0x31, bytes(216)), "family and protocol 0x31"),
        (packet(0x21, 0x11, V4[16:-1]), "11 bytes where the addresses take 12"),
        (packet(0x21, 0x21, V4[16:]), "12 bytes where the addresses take 36"),
        (packet(0x21, 0x11, b"", MAX_LENGTH + 1), f"at most {MAX_LENGTH}"),
        (packet(0x20, 0x00, b"", 65535), f"at most {MAX_LENGTH}"),
    ],
)
def test_faults(wire: bytes, message: str) -> None:
    """Refused at the first byte that can't be of a header, without a wait for the rest."""
    with pytest.raises(HeaderFault, match=message) as whole:
        received(wire)
    with pytest.raises(HeaderFault) as pieces:
        one_by_one(wire)
    assert (str(whole.value), whole.value.http) == (str(pieces.value), "HTTP" in message)


def test_the_longest() -> None:
    wire = packet(0x21, 0x11, V4[16:] + bytes(MAX_LENGTH - 12))
    assert received(wire)[0] == received(V4)[0]


hosts = st.one_of(
    st.ip_addresses(v=4).map(str),
    st.ip_addresses(v=6).filter(lambda address: address.ipv4_mapped is None).map(str),
)
addresses = st.builds(HostPort, hosts, st.integers(0, 65535))


@given(addresses, addresses, st.binary(max_size=40), st.data())
def test_a_written_header_can_be_read(
    source: HostPort, destination: HostPort, rest: bytes, data: st.DataObject
) -> None:
    wire = header(source, destination) + rest
    assert received(wire) == (Header(source, destination), rest)
    assert one_by_one(wire) == (Header(source, destination), rest)
    cut = data.draw(st.integers(0, len(wire) - len(rest) - 1))
    receiver = Receiver()
    assert receiver.receive_data(wire[:cut]) is None
    assert receiver.receive_data(wire[cut:]) == Header(source, destination)
    assert receiver.trailing_data == rest


def outcome(receive: Callable[[bytes], object], data: bytes) -> object:
    try:
        return receive(data)
    except HeaderFault as fault:
        return str(fault)


def with_one_byte(wire: bytes, at: int, value: int) -> bytes:
    return wire[: at % len(wire)] + bytes((value,)) + wire[at % len(wire) + 1 :]


@given(
    st.binary(max_size=80)
    | st.binary(min_size=4, max_size=84).map(SIGNATURE.__add__)
    | st.builds(with_one_byte, st.sampled_from([V4, V6]), st.integers(0, 51), st.integers(0, 255))
)
def test_garbage(data: bytes) -> None:
    """However the bytes are cut, the result is the same header, fault or wait; no other exception."""
    assert outcome(one_by_one, data) == outcome(received, data)


@pytest.mark.parametrize(
    ("claimed", "peer", "problem"),
    [
        ("192.0.2.1", "198.51.100.1", None),
        ("127.0.0.1", "127.0.0.1", None),
        ("::1", "127.0.0.1", None),
        ("127.0.0.1", "::ffff:127.0.0.1", None),
        ("127.0.0.1", "198.51.100.1", "loopback of another host"),
        ("127.0.0.1", "::ffff:198.51.100.1", "loopback of another host"),
        ("::1", "fe80::1%eth0", "loopback of another host"),
        ("0.0.0.0", "198.51.100.1", "claimed to come from 0.0.0.0"),
        ("::", "127.0.0.1", "claimed to come from ::"),
        ("224.0.0.1", "127.0.0.1", "claimed to come from 224.0.0.1"),
        ("ff02::1", "127.0.0.1", "claimed to come from ff02::1"),
    ],
)
def test_unlikely_clients(claimed: str, peer: str, problem: str | None) -> None:
    found = unlikely(numeric_address(claimed), numeric_address(peer))
    assert found is None if problem is None else problem in (found or "")
