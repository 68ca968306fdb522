"""The server role, as conversations. Docstrings name the line of the wire notes that a test is about."""

from __future__ import annotations

import contextlib
import gc
import weakref
from collections.abc import Callable

import pytest
from conversation import after

from usocksd.errors import ProtocolError
from usocksd.socks import (
    NEED_DATA,
    AddressType,
    ClientFault,
    Command,
    Credentials,
    Kind,
    Method,
    Reply,
    Request,
    Server,
    Version,
)

GREETING = b"\x05\x01\x00"
CONNECT_V4 = b"\x05\x01\x00\x01\xc0\x00\x02\x07\x00\x50"
CONNECT_NAME = b"\x05\x01\x00\x03\x0bexample.com\x01\xbb"
CONNECT_V6 = b"\x05\x01\x00\x04" + bytes.fromhex("20010db8000000000000000000000001") + b"\x01\xbb"
SOCKS4_CONNECT = b"\x04\x01\x00\x50\xc0\x00\x02\x07me\x00"
SOCKS4A_CONNECT = b"\x04\x01\x01\xbb\x00\x00\x00\x01me\x00example.com\x00"

FAILURE = b"\x05\x01\x00\x01\x00\x00\x00\x00\x00\x00"
REJECTED = b"\x00\x5b\x00\x00\x00\x00\x00\x00"

PASSWORD_ONLY = (Method.USERNAME_PASSWORD,)


def server_after(*received: bytes, methods: tuple[Method, ...] = (Method.NO_AUTHENTICATION,)) -> Server:
    """A server that was sent each of `received` and needed more after each but the last."""
    return after(Server(methods=methods), *received)


def fault_of(server: Server) -> ClientFault:
    with pytest.raises(ClientFault) as raised:
        server.next_event()
    with pytest.raises(ClientFault) as again:
        server.next_event()
    assert (again.value.kind, again.value.reply, str(again.value)) == (
        raised.value.kind,
        raised.value.reply,
        str(raised.value),
    )
    assert isinstance(raised.value, ProtocolError)
    assert server.data_to_send() == b""  # all that is to be sent is in the fault
    return raised.value


# SOCKS5: greeting


def test_ordinary_conversation() -> None:
    """Chromium `05 01 00`, ATYP 3 always."""
    assert Server().version is None
    server = Server()
    server.receive_data(GREETING)
    assert server.next_event() is NEED_DATA
    assert server.version is Version.SOCKS5
    assert server.data_to_send() == b"\x05\x00"
    assert server.data_to_send() == b""
    server.receive_data(CONNECT_NAME)
    assert server.next_event() == Request(Version.SOCKS5, Command.CONNECT, AddressType.NAME, "example.com", 443)
    assert server.trailing_data == b""
    server.reply(Reply.SUCCEEDED, ("198.51.100.9", 40000))
    assert server.data_to_send() == b"\x05\x00\x00\x01\xc6\x33\x64\x09\x9c\x40"


@pytest.mark.parametrize(
    ("greeting", "methods", "chosen"),
    [
        (b"\x05\x01\x00", (Method.NO_AUTHENTICATION,), 0),  # Chromium, PySocks, proxychains
        (b"\x05\x02\x00\x01", (Method.NO_AUTHENTICATION,), 0),  # curl
        (b"\x05\x03\x00\x01\x02", (Method.NO_AUTHENTICATION,), 0),  # curl with a user
        (b"\x05\x03\x00\x01\x02", (Method.USERNAME_PASSWORD,), 2),
        (b"\x05\x02\x00\x02", (Method.NO_AUTHENTICATION,), 0),  # Java, proxychains with a user
        (b"\x05\x02\x00\x02", (Method.USERNAME_PASSWORD,), 2),
        (b"\x05\x02\x00\x02", (Method.USERNAME_PASSWORD, Method.NO_AUTHENTICATION), 2),
        (b"\x05\x02\x02\x00", (Method.NO_AUTHENTICATION, Method.USERNAME_PASSWORD), 0),
        (b"\x05\xff" + bytes(range(254, -1, -1)), (Method.NO_AUTHENTICATION,), 0),
    ],
)
def test_clients_greetings(greeting: bytes, methods: tuple[Method, ...], chosen: int) -> None:
    """The greetings of Chromium, curl, PySocks, Java and proxychains. Our preference decides."""
    server = server_after(greeting, methods=methods)
    assert server.next_event() is NEED_DATA
    assert server.data_to_send() == bytes((5, chosen))


# SOCKS5: input in pieces


def test_everything_in_one_segment() -> None:
    """Greeting, credentials, request and payload in one segment; payload must stay intact."""
    payload = b"\x16\x03\x01 hello \x00\xff" * 1000
    server = server_after(b"\x05\x01\x02" + b"\x01\x02me\x03key" + CONNECT_NAME + payload, methods=PASSWORD_ONLY)
    assert server.next_event() == Credentials("me", "key")
    server.answer_credentials(accepted=True)
    assert isinstance(server.next_event(), Request)
    assert server.trailing_data == payload
    assert server.data_to_send() == b"\x05\x02" + b"\x01\x00"
    server.receive_data(b"more")
    server.reply(Reply.SUCCEEDED)
    assert server.trailing_data == payload + b"more"


def test_optimistic_client() -> None:
    """Some clients send greeting and request at once without waiting (optimistic): serve them."""
    server = server_after(GREETING + CONNECT_V4)
    assert isinstance(server.next_event(), Request)
    server.reply(Reply.SUCCEEDED)
    assert server.data_to_send() == b"\x05\x00" + b"\x05\x00\x00\x01" + bytes(6)


# SOCKS5: credentials (RFC 1929)


def test_credentials_rejected() -> None:
    """RFC 1929: reply VER is 01; status 0 or close. (The Go original answers 0xff.)"""
    server = server_after(b"\x05\x01\x02\x01\x01a\x01b", methods=PASSWORD_ONLY)
    server.next_event()
    server.answer_credentials(accepted=False)
    assert server.data_to_send() == b"\x05\x02" + b"\x01\x01"
    with pytest.raises(RuntimeError):
        server.next_event()


@pytest.mark.parametrize("pieces", [1, 2, 3])
def test_unasked_credentials(pieces: int) -> None:
    """Tor's and go-socks5's tests write greeting, credentials and request at once, and wait for three answers."""
    said = b"\x05\x02\x00\x02" + b"\x01\x02me\x06secret" + CONNECT_V4 + b"payload"
    size = -(-len(said) // pieces)
    server = server_after(*(said[at : at + size] for at in range(0, len(said), size)))
    request = server.next_event()
    assert isinstance(request, Request)
    assert (request.host, server.method) == ("192.0.2.7", Method.NO_AUTHENTICATION)
    assert server.data_to_send() == b"\x05\x00" + b"\x01\x00"
    assert server.trailing_data == b"payload"


def test_password_is_not_shown() -> None:
    """The debug log of the Go original prints passwords; the repr of ours has none."""
    assert "secret" not in repr(Credentials("me", "secret"))


@pytest.mark.parametrize("command", list(Command))
def test_commands_are_parsed(command: Command) -> None:
    """BIND and UDP ASSOCIATE are understood; sessions answer 07."""
    server = server_after(GREETING, bytes((5, command)) + CONNECT_V4[2:])
    event = server.next_event()
    assert isinstance(event, Request)
    assert event.command is command


@pytest.mark.parametrize("request_bytes", [GREETING + CONNECT_V4, SOCKS4_CONNECT])
def test_bound_address_is_never_a_name(request_bytes: bytes) -> None:
    """BND.ADDR: never a domain (several clients reject it)."""
    server = server_after(request_bytes)
    server.next_event()
    with pytest.raises(ValueError, match="not numeric"):
        server.reply(Reply.SUCCEEDED, ("example.com", 80))


# SOCKS4 and 4a


@pytest.mark.parametrize(
    ("message", "host", "port", "bound", "reply"),
    [
        (SOCKS4_CONNECT, "192.0.2.7", 80, "198.51.100.9", b"\x00\x5a\x9c\x40\xc6\x33\x64\x09"),
        # A 4a name may resolve to IPv6, for which the reply has no room.
        (SOCKS4A_CONNECT, "example.com", 443, "2001:db8::1", b"\x00\x5a" + bytes(6)),
    ],
)
def test_socks4(message: bytes, host: str, port: int, bound: str, reply: bytes) -> None:
    """0.0.0.x with x≠0 means 4a. Reply VN is 0."""
    server = server_after(message + b"payload")
    kind = AddressType.NAME if message is SOCKS4A_CONNECT else AddressType.IPV4
    assert server.next_event() == Request(Version.SOCKS4, Command.CONNECT, kind, host, port, "me")
    assert server.version is Version.SOCKS4
    assert server.trailing_data == b"payload"
    server.reply(Reply.SUCCEEDED, (bound, 40000))
    assert server.data_to_send() == reply


@pytest.mark.parametrize(
    ("prefix", "suffix"),
    [
        (b"\x04\x01\x00\x50\xc0\x00\x02\x07", b""),
        (b"\x04\x01\x00\x50\x00\x00\x00\x01", b"host\x00"),
        (b"\x04\x01\x00\x50\x00\x00\x00\x01me\x00", b""),
    ],
    ids=["USERID", "USERID of 4a", "host name"],
)
@pytest.mark.parametrize("trickle", [True, False])
def test_socks4_caps(prefix: bytes, suffix: bytes, trickle: bool) -> None:
    """USERID and host name are capped (reply 91 and close past the cap)."""
    fits = server_after(prefix + b"x" * 255 + b"\x00" + suffix)
    assert isinstance(fits.next_event(), Request)

    first = [prefix + b"x" * 255] if trickle else []
    rest = b"x" if trickle else prefix + b"x" * 256 + b"\x00" + suffix
    fault = fault_of(server_after(*first, rest))
    assert fault.kind is Kind.TOO_LONG
    assert fault.reply == REJECTED


# Requests


def request(message: bytes, *, version: Version = Version.SOCKS5) -> Request:
    """The server's result for a request, after a greeting in SOCKS5."""
    event = server_after(*([GREETING] if version is Version.SOCKS5 else []), message).next_event()
    assert isinstance(event, Request)
    assert event.version is version
    return event


@pytest.mark.parametrize(
    ("message", "address_type", "host", "port"),
    [
        (CONNECT_V4, AddressType.IPV4, "192.0.2.7", 80),
        (CONNECT_V6, AddressType.IPV6, "2001:db8::1", 443),
        (CONNECT_NAME, AddressType.NAME, "example.com", 443),
        # Address literals sent as names (Chromium, old curl) come through as sent, for the rules to judge.
        (b"\x05\x01\x00\x03\x07127.0.1\xff\xff", AddressType.NAME, "127.0.1", 65535),
        (b"\x05\x01\x00\x03\x03::1\x00\x50", AddressType.NAME, "::1", 80),
        (b"\x05\x01\x00\x03\x0a" + "bücher.de".encode() + b"\x00\x50", AddressType.NAME, "bücher.de", 80),
        (b"\x05\x01\x00\x03\x05a\xe2\x80\x8db\x00\x50", AddressType.NAME, "a\u200db", 80),  # IDNA's joiner
        (b"\x05\x01\x00\x03\xff" + b"n" * 255 + b"\x00\x00", AddressType.NAME, "n" * 255, 0),
        (b"\x05\x01\x77\x01\x7f\x00\x00\x01\x00\x50", AddressType.IPV4, "127.0.0.1", 80),  # RSV not 0
        # In SOCKS4, 0.0.0.x with x not 0 announces a name (4a); 0.0.0.0 does not.
        (b"\x04\x01\x00\x50\x00\x00\x00\x00\x00", AddressType.IPV4, "0.0.0.0", 80),
        (b"\x04\x01\x00\x50\x00\x00\x01\x00\x00", AddressType.IPV4, "0.0.1.0", 80),
        (b"\x04\x01\x00\x50\x00\x01\x00\x01\x00", AddressType.IPV4, "0.1.0.1", 80),
        (b"\x04\x01\x00\x50\x01\x00\x00\x00\x00", AddressType.IPV4, "1.0.0.0", 80),
    ],
)
def test_addresses(message: bytes, address_type: AddressType, host: str, port: int) -> None:
    version = Version(message[0])
    assert request(message, version=version) == Request(version, Command.CONNECT, address_type, host, port)


def test_socks4_commands_and_user_ids() -> None:
    """USERID is a claim that nobody verifies: odd bytes in it are no reason to refuse."""
    assert request(b"\x04\x02" + SOCKS4_CONNECT[2:], version=Version.SOCKS4).command is Command.BIND
    odd = b"\x04\x01\x00\x50\xc0\x00\x02\x07j\xf6rg\x00"
    assert request(odd, version=Version.SOCKS4).user_id == "j\ufffdrg"


@pytest.mark.parametrize(
    ("message", "username", "password"),
    [
        (b"\x01\x05us\xc3\xa9r\x03p\xc3\xa4", "us\u00e9r", "p\u00e4"),
        (b"\x01\x00\x00", "", ""),
        (b"\x01\x01u\x00", "u", ""),
        (b"\x01\x00\x01p", "", "p"),
        (b"\x01\xff" + b"u" * 255 + b"\xff" + b"p" * 255, "u" * 255, "p" * 255),
        (b"\x05\x01u\x01p", "u", "p"),  # some clients put SOCKS's version there, and other servers take it
    ],
)
def test_credentials(message: bytes, username: str, password: str) -> None:
    """RFC 1929: reply VER is 01, status 0; and empty user names and passwords."""
    server = server_after(b"\x05\x01\x02", message, methods=PASSWORD_ONLY)
    assert server.data_to_send() == b"\x05\x02"
    assert server.next_event() == Credentials(username, password)
    server.answer_credentials(accepted=True)
    assert server.data_to_send() == b"\x01\x00"
    assert server.next_event() is NEED_DATA
    server.receive_data(CONNECT_V4)
    assert isinstance(server.next_event(), Request)


# Replies


@pytest.mark.parametrize("reply", [reply for reply in Reply if reply is not Reply.SUCCEEDED])
@pytest.mark.parametrize("bound", [None, ("192.0.2.1", 1), ("2001:db8::1", 1)])
def test_failure_replies(reply: Reply, bound: tuple[str, int] | None) -> None:
    """Every reply is complete. On failure `05 REP 00 01 00000000 0000`, in SOCKS4 always 91."""
    for message, answer in ((GREETING + CONNECT_V4, bytes((5, reply, 0, 1)) + bytes(6)), (SOCKS4_CONNECT, REJECTED)):
        server = server_after(message)
        server.next_event()
        server.data_to_send()
        server.reply(reply, bound)
        assert server.data_to_send() == answer


@pytest.mark.parametrize(
    ("bound", "answer"),
    [
        (None, b"\x05\x00\x00\x01\x00\x00\x00\x00\x00\x00"),
        (("192.0.2.1", 513), b"\x05\x00\x00\x01\xc0\x00\x02\x01\x02\x01"),
        (("2001:db8::1", 513), b"\x05\x00\x00\x04" + bytes.fromhex("20010db8") + bytes(11) + b"\x01\x02\x01"),
        (("fe80::1%eth0", 513), b"\x05\x00\x00\x04" + bytes.fromhex("fe80") + bytes(13) + b"\x01\x02\x01"),
    ],
)
def test_success_replies(bound: tuple[str, int] | None, answer: bytes) -> None:
    """BND.ADDR is numeric: the real local address of the outgoing socket, or 0.0.0.0:0."""
    server = server_after(GREETING + CONNECT_V4)
    server.next_event()
    server.data_to_send()
    server.reply(Reply.SUCCEEDED, bound)
    assert server.data_to_send() == answer


# Faults

_COMMAND_UNKNOWN = b"\x05\x00" + b"\x05\x07\x00\x01" + bytes(6)
_TYPE_UNKNOWN = b"\x05\x00" + b"\x05\x08\x00\x01" + bytes(6)
_BAD_NAMES = [b"", b"a\nb", b"\x7f", b"\xc2\x85", b"\xff\xfe", b"\xed\xa0\x80"]
_NO_AUTHENTICATION = (Method.NO_AUTHENTICATION,)


def named(name: bytes) -> bytes:
    return b"\x05\x01\x00\x03" + bytes((len(name),)) + name + b"\x00\x50"


@pytest.mark.parametrize(
    ("received", "methods", "kind", "reply"),
    [
        # GSSAPI (01) is declined by not choosing it. (Java takes an answer that is not version 5 for SOCKS4.)
        (b"\x05\x01\x01", _NO_AUTHENTICATION, Kind.NO_METHOD, b"\x05\xff"),
        (b"\x05\x02\x01\x02", _NO_AUTHENTICATION, Kind.NO_METHOD, b"\x05\xff"),
        (b"\x05\x00", _NO_AUTHENTICATION, Kind.NO_METHOD, b"\x05\xff"),
        (b"\x05\x01\x00", PASSWORD_ONLY, Kind.NO_METHOD, b"\x05\xff"),
        (b"\x05\x02\x00\x01", PASSWORD_ONLY, Kind.NO_METHOD, b"\x05\xff"),
        # SOCKS4 can't authenticate, so it is no way around a password.
        (SOCKS4_CONNECT, PASSWORD_ONLY, Kind.NO_METHOD, REJECTED),
        (SOCKS4A_CONNECT, PASSWORD_ONLY, Kind.NO_METHOD, REJECTED),
        # We have answered with version 5, so SOCKS4 behind it is answered in SOCKS5 (Java).
        (b"\x05\x02\x00\x02" + SOCKS4_CONNECT, _NO_AUTHENTICATION, Kind.MALFORMED, b"\x05\x00" + FAILURE),
        # Credentials that were not offered, or twice.
        (GREETING + b"\x01\x01u\x01p" + CONNECT_V4, _NO_AUTHENTICATION, Kind.MALFORMED, b"\x05\x00" + FAILURE),
        (
            b"\x05\x02\x00\x02" + b"\x01\x01u\x01p" * 2 + CONNECT_V4,
            _NO_AUTHENTICATION,
            Kind.MALFORMED,
            b"\x05\x00\x01\x00" + FAILURE,
        ),
        # A wrong version of RFC 1929, and text that is not UTF-8.
        *(
            (b"\x05\x01\x02" + message, PASSWORD_ONLY, Kind.MALFORMED, b"\x05\x02" + b"\x01\x01")
            for message in (b"\x02\x01u\x01p", b"\x01\x01\xff\x01p", b"\x01\x01u\x02\xc3\x28")
        ),
        *(
            (GREETING + bytes((5, n)) + CONNECT_V4[2:], _NO_AUTHENTICATION, Kind.BAD_COMMAND, _COMMAND_UNKNOWN)
            for n in (0, 4, 9, 0xF0)
        ),
        # UDP ASSOCIATE is none of SOCKS4's.
        *((bytes((4, n)) + SOCKS4_CONNECT[2:], _NO_AUTHENTICATION, Kind.BAD_COMMAND, REJECTED) for n in (0, 3, 0xF0)),
        *(
            (GREETING + bytes((5, 1, 0, n)) + bytes(6), _NO_AUTHENTICATION, Kind.BAD_ADDRESS_TYPE, _TYPE_UNKNOWN)
            for n in (0, 2, 5, 255)
        ),
        # Names that are empty, undecodable, or have control characters.
        *(
            (GREETING + named(name), _NO_AUTHENTICATION, Kind.MALFORMED, b"\x05\x00" + FAILURE)
            for name in (*_BAD_NAMES, b"a\0b")
        ),
        *(
            (b"\x04\x01\x00\x50\x00\x00\x00\x01\x00" + name + b"\x00", _NO_AUTHENTICATION, Kind.MALFORMED, REJECTED)
            for name in _BAD_NAMES
        ),
        (b"\x16\x03\x01\x02\x00\x01", _NO_AUTHENTICATION, Kind.TLS, b""),
        *((bytes((n, 1, 2)), _NO_AUTHENTICATION, Kind.MALFORMED, b"") for n in (0, 1, 3, 6, 0x40, 0x5B, ord("g"), 255)),
    ],
)
def test_faults(received: bytes, methods: tuple[Method, ...], kind: Kind, reply: bytes) -> None:
    """Each gets a complete reply, behind the method selection if the client has not waited for that."""
    fault = fault_of(server_after(received, methods=methods))
    assert (fault.kind, fault.reply) == (kind, reply)


def test_an_unknown_command_is_refused_when_the_whole_request_was_read() -> None:
    """Closing a socket with unread bytes would reset the connection."""
    message = bytes((5, 4)) + CONNECT_NAME[2:]
    assert fault_of(server_after(GREETING, message[:-1], message[-1:])).kind is Kind.BAD_COMMAND


@pytest.mark.parametrize("first", [b"GET / HTTP/1.1\r\n", b"CONNECT example.com:443 HTTP/1.1\r\n", b"A", b"Z"])
def test_http(first: bytes) -> None:
    """The first byte is an ASCII capital letter: a short plain HTTP error tells what this port is."""
    fault = fault_of(server_after(first))
    assert fault.kind is Kind.HTTP
    head, _, body = fault.reply.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 501 ")
    assert b"Content-Length: %d" % len(body) in head.split(b"\r\n")
    assert b"Connection: close" in head.split(b"\r\n")
    assert b"SOCKS" in body
    assert len(fault.reply) < 300


# The end of the input, and calls out of turn


@pytest.mark.parametrize(
    "whole",
    [GREETING + CONNECT_NAME, SOCKS4A_CONNECT, b"\x05\x02\x00\x02" + CONNECT_V6],
    ids=["5", "4a", "Java"],
)
def test_eof_at_every_byte(whole: bytes) -> None:
    """Impatient clients cut off at every byte: told apart from other faults, no verdict on the request."""
    for cut in range(len(whole)):
        pieces = [whole[:cut]] if cut else []
        fault = fault_of(server_after(*pieces, b""))
        assert fault.kind is Kind.EOF
        assert fault.reply in (b"", b"\x05\x00")  # at most the method selection


def test_eof_behind_the_request_is_no_fault() -> None:
    """A client may send all it has and close its side before it got an answer."""
    server = server_after(GREETING + CONNECT_V4 + b"all of it")
    server.receive_data(b"")
    assert isinstance(server.next_event(), Request)
    assert server.trailing_data == b"all of it"


def test_input_behind_a_fault_is_dropped() -> None:
    """After an error the machine stays there, and keeps nothing."""
    server = server_after(b"GET /")
    fault_of(server)
    server.receive_data(GREETING)
    assert fault_of(server).kind is Kind.HTTP
    assert server.trailing_data == b""


@pytest.mark.parametrize(
    "call",
    [
        lambda server: server.reply(Reply.SUCCEEDED),
        lambda server: server.answer_credentials(accepted=True),
        lambda server: server.answer_credentials(accepted=False),
    ],
)
def test_calls_out_of_turn(call: Callable[[Server], None]) -> None:
    """A bug of ours is no ProtocolError."""
    with pytest.raises(RuntimeError):
        call(Server())
    server = server_after(GREETING + CONNECT_V4)
    server.next_event()
    with pytest.raises(RuntimeError):
        server.next_event()
    server.reply(Reply.SUCCEEDED)
    with pytest.raises(RuntimeError):
        call(server)
    with pytest.raises(RuntimeError):
        server.next_event()


def test_verdict_is_waited_for() -> None:
    """No event before the credentials were judged, whatever was sent behind them."""
    server = server_after(b"\x05\x01\x02\x01\x01a\x01b" + CONNECT_V4, methods=PASSWORD_ONLY)
    server.next_event()
    with pytest.raises(RuntimeError):
        server.next_event()
    with pytest.raises(RuntimeError):
        server.reply(Reply.SUCCEEDED)


class WatchedServer(Server):
    """A server that can be weakly referenced."""


@pytest.mark.parametrize("received", [GREETING + CONNECT_V4, b"GET /", GREETING + b"\x05\x01\x00\x03\x01\xff\x00\x50"])
def test_no_garbage_is_left(received: bytes) -> None:
    """A connection's state goes without the garbage collector, which runs rarely here."""
    gc.disable()
    try:
        server = WatchedServer()
        server.receive_data(received)
        with contextlib.suppress(ClientFault):
            server.next_event()
        gone = weakref.ref(server)
        del server
        assert gone() is None
    finally:
        gc.enable()
