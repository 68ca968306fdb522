"""The name inside the first bytes: hellos of real clients, made-up hellos, requests, and anything else."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from transocks.sniff import MOST, OTHER, Opening, Protocol, Sniffer

DATA = Path(__file__).parent / "data"
CORPUS = {path.stem: bytes.fromhex(path.read_text()) for path in sorted(DATA.glob("*.hex"))}

GREASE = 0x2A2A
ECH = 0xFE0D


def sniff(data: bytes, port: int = 443) -> Opening | None:
    return Sniffer(port).feed(data)


def vector(data: bytes, size: int) -> bytes:
    return len(data).to_bytes(size) + data


def server_name(*names: bytes, kind: int = 0) -> tuple[int, bytes]:
    return 0, vector(b"".join(bytes([kind]) + vector(name, 2) for name in names), 2)


def message(*extensions: tuple[int, bytes], session: bytes = bytes(32)) -> bytes:
    """A ClientHello with these extensions."""
    body = b"\x03\x03" + bytes(32) + vector(session, 1) + vector(b"\x2a\x2a\x13\x01", 2) + vector(b"\0", 1)
    body += vector(b"".join(kind.to_bytes(2) + vector(data, 2) for kind, data in extensions), 2)
    return b"\x01" + vector(body, 3)


def records(handshake: bytes, size: int = MOST) -> bytes:
    """A handshake message in records of at most this size."""
    pieces = [handshake[at : at + size] for at in range(0, len(handshake), size)]
    return b"".join(b"\x16\x03\x01" + vector(piece, 2) for piece in pieces)


def hello(*extensions: tuple[int, bytes]) -> bytes:
    return records(message(*extensions))


NAMED = hello((GREASE, b""), server_name(b"www.example.com"), (0x2B, b"\x02\x03\x04"))
TLS = Opening(Protocol.TLS, "www.example.com", repeatable=True)


@pytest.mark.parametrize("client", CORPUS)
def test_hellos_of_real_clients(client: str) -> None:
    name = None if client == "openssl-no-name" else "www.example.com"
    encrypted = client in ("chromium", "chromium-again")
    assert sniff(CORPUS[client]) == Opening(Protocol.TLS, name, encrypted, repeatable=True)


def test_the_corpus_is_there() -> None:
    assert {"curl", "openssl", "chromium", "python", "java"} <= CORPUS.keys()


@pytest.mark.parametrize("client", CORPUS)
@pytest.mark.parametrize("size", [1, 5, 6, 100, 1460])
def test_in_pieces(client: str, size: int) -> None:
    """Segments, as TCP may cut them."""
    data, sniffer = CORPUS[client], Sniffer(443)
    pieces = [data[at : at + size] for at in range(0, len(data), size)]
    found = [sniffer.feed(piece) for piece in pieces]
    assert found == [None] * (len(pieces) - 1) + [sniff(data)]


@pytest.mark.parametrize("size", [1, 3, 4, 5, 50, 511])
def test_over_several_records(size: int) -> None:
    """As sent by `openssl s_client -max_send_frag`, and by clients that try to evade inspection."""
    for client, data in CORPUS.items():
        cut = records(data[5:], size)
        if len(cut) < MOST:
            assert sniff(cut) == sniff(data), client
    assert sniff(records(message(server_name(b"a.example")), 1)) == Opening(Protocol.TLS, "a.example", repeatable=True)


@pytest.mark.parametrize(
    ("data", "found"),
    [
        (NAMED, TLS),
        (hello((GREASE, b"\0"), (0x2B, b"\x02\x03\x04")), Opening(Protocol.TLS, repeatable=True)),
        (hello(), Opening(Protocol.TLS, repeatable=True)),
        (records(message()[:-2])[:-1], None),
        (hello(server_name(b"WWW.Example.COM.")), TLS),
        (hello(server_name(b"www.example.com"), (ECH, b"\0\0\x01\0\x01")), TLS._replace(encrypted=True)),
        (hello((ECH, b""), server_name(b"www.example.com")), TLS._replace(encrypted=True)),
        (hello((ECH, b"")), Opening(Protocol.TLS, encrypted=True, repeatable=True)),
        # Bytes after the hello may be early data, which a server acts on.
        (NAMED + b"\x17\x03\x03\0\x01x", TLS._replace(repeatable=False)),
        (records(message(server_name(b"www.example.com")) + b"\x0b"), TLS._replace(repeatable=False)),
    ],
)
def test_tls(data: bytes, found: Opening | None) -> None:
    assert sniff(data) == found


@pytest.mark.parametrize(
    "names",
    [
        (b"",),
        (b"203.0.113.80",),
        (b"127.1",),
        (b"0x7f.1",),
        (b"2130706433",),
        (b"::1",),
        (b"[::1]",),
        (b"a..example",),
        (b"localhost",),
        (b"www.LocalHost.",),
        (b"a b.example",),
        (b"a\0.example",),
        (b"www.example.com:443",),
        (b"b\xc3\xbccher.example",),
        (b"a" * 64,),
        (b"a." * 130 + b"a",),
        (b"a" * 5000,),
        (b"a.example", b"b.example"),
    ],
)
def test_invalid_names(names: tuple[bytes, ...]) -> None:
    assert sniff(hello(server_name(*names))) == Opening(Protocol.TLS, repeatable=True)
    host = b", ".join(names)
    assert sniff(b"GET / HTTP/1.1\r\nHost: " + host + b"\r\n\r\n", 80) == Opening(Protocol.HTTP)


@pytest.mark.parametrize(
    "extension",
    [
        server_name(b"a.example", kind=1),
        (0, b""),
        (0, b"\0"),
        server_name(),
        (0, b"\0\x0c\0\0\x08a.example"),
        (0, vector(b"\0" + vector(b"a.example", 2), 2) + b"x"),
    ],
)
def test_malformed_server_names(extension: tuple[int, bytes]) -> None:
    found = sniff(hello(extension))
    assert found is not None
    assert found.name is None


@pytest.mark.parametrize(
    "data",
    [
        b"\x16\x02\x01\0\x05\x01\0\0\x01\0",  # SSL 2
        b"\x16\x03\x01\0\0",  # an empty record
        b"\x16\x03\x01\xff\xff",  # a record without measure
        b"\x16\x03\x01\0\x05\x02\0\0\x01\0",  # a server's hello
        b"\x16\x03\x01\0\x04\x01\xff\xff\xff",  # a message without measure
        b"\x16\x03\x01\0\x04\x01\0\0\0",  # nothing in it
        b"\x15\x03\x01\0\x02\x02\x28",  # an alert
        records(message())[:9] + b"\x16\x03",  # records of another length than they say
        hello(server_name(b"a.example"), server_name(b"b.example")),
        records(message()[:6])[:-2] + b"\x15\x03\x01\0\x02\x02\x28",  # another record inside the message
        records(b"\x01" + vector(message()[4:-1], 3)),
        records(b"\x01" + vector(message((GREASE, b"abc"))[4:] + b"x", 3)),
        b"",
    ],
)
def test_bytes_that_are_no_tls_hello(data: bytes) -> None:
    sniffer = Sniffer(443)
    found = sniffer.feed(data) or sniffer.finish()
    assert found.name is None
    assert not found.encrypted


@pytest.mark.parametrize(
    ("data", "name"),
    [
        (b"GET / HTTP/1.1\r\nHost: www.example.com\r\n\r\n", "www.example.com"),
        (b"GET / HTTP/1.1\r\nAccept: */*\r\nhOST:\tWWW.example.com. \t\r\n", "www.example.com"),
        (b"GET / HTTP/1.0\nHost: www.example.com\n", "www.example.com"),
        (b"M-SEARCH / HTTP/1.1\r\nHost: www.example.com:80\r\n\r\n", "www.example.com"),
        (b"OPTIONS * HTTP/1.1\r\nHost: www.example.com:\r\n\r\n", "www.example.com"),
        (b"GET http://www.example.com/x?y HTTP/1.1\r\nHost: other.example\r\n\r\n", "www.example.com"),
        (b"GET HTTP://www.example.com:80 HTTP/1.1\r\n", "www.example.com"),
        (b"GET / HTTP/1.1\r\nHost: xn--bcher-kva.example\r\n\r\n", "xn--bcher-kva.example"),
        # Requests for a proxy, or invalid ones.
        (b"CONNECT www.example.com:80 HTTP/1.1\r\nHost: www.example.com:80\r\n\r\n", None),
        (b"GET http://www.example.com:8080/ HTTP/1.1\r\nHost: www.example.com:8080\r\n\r\n", None),
        (b"GET https://www.example.com/ HTTP/1.1\r\n\r\n", None),
        (b"GET http://user@www.example.com/ HTTP/1.1\r\n\r\n", None),
        (b"GET / HTTP/1.1\r\nHost: www.example.com:81\r\n\r\n", None),
        (b"GET / HTTP/1.1\r\nHost: 203.0.113.80\r\n\r\n", None),
        (b"GET / HTTP/1.1\r\nHost: [2001:db8::1]\r\n\r\n", None),
        (b"GET / HTTP/1.1\r\nHost:\r\n\r\n", None),
        (b"GET / HTTP/1.1\r\nHost: \r\n\r\n", None),
        (b"GET / HTTP/1.1\r\nX-Host: www.example.com\r\n\r\nHost: www.example.com\r\n", None),
        (b"GET / HTTP/1.1\r\nHost : www.example.com\r\n\r\n", None),  # RFC 9112 section 5.1: to be refused
        (b"GET / HTTP/1.1\r\nX: 1\r\n Host: www.example.com\r\n\r\n", None),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", None),
    ],
)
def test_http(data: bytes, name: str | None) -> None:
    found = sniff(data, 80)
    assert found is not None
    assert (found.name, found.encrypted, found.repeatable) == (name, False, False)
    pieces = Sniffer(80)
    assert next(each for byte in data if (each := pieces.feed(bytes([byte]))) is not None) == found


@pytest.mark.parametrize("data", [b"G", b"GET", b"GET /", b"GET / HTTP/1.1\r\n", b"GET / HTTP/1.1\r\nHost: www.examp"])
def test_incomplete_http(data: bytes) -> None:
    assert sniff(data, 80) is None


@pytest.mark.parametrize(
    "data",
    [
        b"SSH-2.0-OpenSSH_9.2p1\r\n",
        b"NICK alice\r\n",
        b"EHLO client.example\r\n",
        b"GET /\r\n",
        b"GET / HTTP/1.1 \r\n",
        b"GET  / HTTP/1.1\r\n",
        b"A" * 33,
        b"A-",
        b"get / HTTP/1.1\r\nHost: www.example.com\r\n\r\n",
        b"\x05\x01\0",
        b"\x04\x01\0\x50",
        b"\0\0\0\x08\x04\xd2\x16\x2f",  # PostgreSQL asks for TLS
        b"<?xml version='1.0'?>",
        b"\x13BitTorrent protocol",
        b"\r\nGET / HTTP/1.1\r\n",
    ],
)
def test_other_protocols(data: bytes) -> None:
    sniffer = Sniffer(80)
    found = sniffer.feed(data)
    assert (found or sniffer.finish()) == OTHER
    assert (found is None) == (data == b"A-")  # which may yet become a method


def test_incomplete_bytes_when_the_wait_is_over() -> None:
    for data, found in (
        (b"", OTHER),
        (NAMED[:1], Opening(Protocol.TLS, repeatable=True)),
        (NAMED[:-1], Opening(Protocol.TLS, repeatable=True)),
        (b"GET / HTT", OTHER),
        (b"GET / HTTP/1.1\r\nAcc", Opening(Protocol.HTTP)),
    ):
        sniffer = Sniffer(443)
        assert sniffer.feed(data) is None
        assert sniffer.finish() == found


def test_bytes_that_are_too_many() -> None:
    for start in (b"GET /" + b"x" * MOST, b"GET / HTTP/1.1\r\n" + b"X: 1\r\n" * (MOST // 6 + 1)):
        assert sniff(start, 80) is not None
    big = message((GREASE, bytes(MOST + 1)), server_name(b"www.example.com"))
    assert sniff(records(big)[: MOST + 5]) == OTHER
    assert sniff(records(message(server_name(b"www.example.com"), (21, bytes(3 * MOST // 4))), 1)[:MOST]) == OTHER


# Hypothesis


@given(st.binary(max_size=300), st.integers(0, 65535))
@example(b"\x16\x03\x01\0\x04\x01\0\0\x01", 443)
def test_nothing_crashes_it(data: bytes, port: int) -> None:
    whole = Sniffer(port)
    for start in (b"", b"\x16\x03\x01", b"GET ", b"GET / HTTP/1.1\r\nHost: "):
        assert isinstance(whole.feed(start + data), Opening | None)
        assert isinstance(whole.finish(), Opening)
        whole = Sniffer(port)


@given(st.sampled_from(sorted(CORPUS)), st.data())
def test_damaged_hellos(client: str, data: st.DataObject) -> None:
    damaged = bytearray(CORPUS[client])
    for at in data.draw(st.lists(st.integers(0, len(damaged) - 1), max_size=4)):
        damaged[at] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(damaged)))
    del damaged[cut : cut + data.draw(st.integers(0, 3))]
    sniffer = Sniffer(443)
    found = sniffer.feed(bytes(damaged)) or sniffer.finish()
    assert found.name is None or found.name.isascii()


@given(st.lists(st.binary(max_size=40), max_size=8))
def test_pieces_make_no_difference(pieces: list[bytes]) -> None:
    data = b"GET / HTTP/1.1\r\n" + b"".join(pieces)
    whole, split = sniff(data, 80), Sniffer(80)
    found = split.feed(b"GET / HTTP/1.1\r\n")
    for piece in pieces:
        found = found or split.feed(piece)
    assert found == whole


@given(st.lists(st.tuples(st.integers(1, 0xFFFF).filter(lambda kind: kind != ECH), st.binary(max_size=50)), max_size=8))
def test_the_name_wherever_it_stands(extensions: list[tuple[int, bytes]]) -> None:
    shuffled = [*extensions, server_name(b"www.example.com")]
    random.Random(len(extensions)).shuffle(shuffled)
    assert sniff(hello(*shuffled)) == TLS
