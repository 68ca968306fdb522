"""The HTTP CONNECT client, as conversations. Docstrings name the line of the wire notes a test is about."""

from __future__ import annotations

from base64 import b64decode
from itertools import pairwise

import pytest
from conversation import after, error_of
from hypothesis import given
from hypothesis import strategies as st

from transocks.http_connect import MAX_HEAD, HttpConnect
from usocksd.errors import UpstreamError
from usocksd.socks import (
    NEED_DATA,
    AuthenticationFailed,
    Established,
    Kind,
    RequestRefused,
    UpstreamFault,
)

OK = b"HTTP/1.1 200 OK\r\n\r\n"


def asked(*received: bytes) -> HttpConnect:
    """A client that was sent each of `received` and needed more after each but the last."""
    return after(HttpConnect("example.com", 443), *received)


def test_ordinary_conversation() -> None:
    client = HttpConnect("example.com", 443)
    assert client.data_to_send() == b"CONNECT example.com:443 HTTP/1.1\r\nHost: example.com:443\r\n\r\n"
    assert client.data_to_send() == b""
    assert client.next_event() is NEED_DATA
    client.receive_data(OK)
    assert client.next_event() == Established("0.0.0.0", 0)
    assert client.trailing_data == b""
    with pytest.raises(RuntimeError):
        client.next_event()


@pytest.mark.parametrize(
    ("host", "authority"),
    [
        ("192.0.2.7", b"192.0.2.7:80"),
        ("2001:db8::1", b"[2001:db8::1]:80"),
        ("::ffff:192.0.2.7", b"[::ffff:192.0.2.7]:80"),
        ("xn--bcher-kva.de", b"xn--bcher-kva.de:80"),
        ("_service.example", b"_service.example:80"),
    ],
)
def test_hosts(host: str, authority: bytes) -> None:
    """IPv6 hosts are bracketed, in both places."""
    request = HttpConnect(host, 80).data_to_send()
    assert request == b"CONNECT " + authority + b" HTTP/1.1\r\nHost: " + authority + b"\r\n\r\n"


@pytest.mark.parametrize(
    "host",
    ["", "a b", "a\r\nX: y", "a\n", "a/b", "u@h", "h:1", "[::1]", "fe80::1%eth0", "bücher.de", "n" * 256],
)
def test_hosts_that_do_not_fit_into_a_request(host: str) -> None:
    """A name comes from the client's bytes: it must not end the line, or the authority, it stands in."""
    with pytest.raises(ValueError, match="host of a CONNECT request"):
        HttpConnect(host, 80)


@pytest.mark.parametrize(
    ("username", "password", "token"),
    [
        ("Aladdin", "open sesame", "Aladdin:open sesame"),
        ("me", None, "me:"),
        ("me", "a:b@c%", "me:a:b@c%"),
        ("", "key", ":key"),
        ("üser", "pä" * 100, "üser:" + "pä" * 100),
    ],
)
def test_proxy_authorization(username: str, password: str | None, token: str) -> None:
    """Proxy-Authorization from the URL's user and password (percent-decoded before)."""
    request = HttpConnect("192.0.2.7", 80, username=username, password=password).data_to_send()
    lines = request.split(b"\r\n")
    name, value = lines[2].split(b": ")
    assert name == b"Proxy-Authorization"
    assert value.startswith(b"Basic ")
    assert b64decode(value[6:], validate=True).decode() == token
    assert lines[3:] == [b"", b""]


@pytest.mark.parametrize(("username", "password"), [("a:b", "c"), ("a\n", "c"), ("a", "c\0")])
def test_credentials_that_basic_has_no_room_for(username: str, password: str) -> None:
    with pytest.raises(ValueError, match="user name"):
        HttpConnect("192.0.2.7", 80, username=username, password=password)


@pytest.mark.parametrize(
    "head",
    [
        b"HTTP/1.1 200 Connection established\r\n\r\n",
        b"HTTP/1.0 200 OK\r\nVia: x\r\n\r\n",
        b"HTTP/1.1 201 Created\r\n\r\n",
        b"HTTP/1.1 204\r\n\r\n",
        b"HTTP/1.1 299 \r\n\r\n",
        b"HTTP/1.1 200 OK\n\n",
        b"HTTP/1.1 200 OK\r\nA: b\n\r\n",
    ],
)
@pytest.mark.parametrize("payload", [b"", b"\r\n\r\nHTTP/1.1 200 OK\r\n\r\n", bytes(range(256)) * 200])
def test_any_2xx_is_success(head: bytes, payload: bytes) -> None:
    """Any 2xx is success. Nothing past the response head is consumed."""
    client = asked(head + payload)
    assert client.next_event() == Established()
    assert client.trailing_data == payload
    client.receive_data(b"more")
    assert client.trailing_data == payload + b"more"


def test_body_headers_of_a_success_are_ignored() -> None:
    """Content-Length and Transfer-Encoding on a 2xx are ignored."""
    client = asked(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello")
    assert client.next_event() == Established()
    assert client.trailing_data == b"5\r\nhello"


def test_1xx_is_skipped() -> None:
    """1xx is skipped."""
    client = asked(
        b"HTTP/1.1 100 Continue\r\n\r\n",
        b"HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\nHTTP/1.1 102 Processing\r\n\r\nHTT",
        b"P/1.1 200 OK\r\n\r\npayload",
    )
    assert client.next_event() == Established()
    assert client.trailing_data == b"payload"


@pytest.mark.parametrize("status", [300, 302, 400, 403, 404, 500, 502, 503, 504, 999])
def test_refused(status: int) -> None:
    """Every status but 2xx is a refusal, and the error has it."""
    error = error_of(asked(b"HTTP/1.1 %d Some reason\r\nContent-Length: 5\r\n\r\nhello" % status))
    assert isinstance(error, RequestRefused)
    assert error.reply == status
    assert str(error) == f"the proxy refused: {status} Some reason"


def test_refused_with_a_long_reason() -> None:
    error = error_of(asked(b"HTTP/1.1 502 " + b"\xff" * 5000 + b"\r\n\r\n"))
    assert len(str(error)) < 150


def test_authentication_required() -> None:
    error = error_of(asked(b"HTTP/1.1 407 Proxy Authentication Required\r\n\r\n"))
    assert isinstance(error, AuthenticationFailed)


@pytest.mark.parametrize(
    "received",
    [
        b"\x05\x00",
        b"HTTX",
        b"HTTP/2 200\r\n\r\n",
        b"HTTP/1.1  200 OK\r\n\r\n",
        b"HTTP/1.1 2000 OK\r\n\r\n",
        b"HTTP/1.1 20 OK\r\n\r\n",
        b"HTTP/1.1 099 OK\r\n\r\n",
        b"HTTP/1.1 200OK\r\n\r\n",
        b"HTTP/1.1\r\n\r\n",
        b"\r\n\r\n",
    ],
)
def test_answers_that_are_not_http(received: bytes) -> None:
    error = error_of(asked(received))
    assert isinstance(error, UpstreamFault)
    assert error.kind is Kind.MALFORMED


@pytest.mark.parametrize("received", [[], [b"HTTP/1.1 200 OK\r\n"], [b"HTTP/1.1 100 Continue\r\n\r\n"]])
def test_closed_early(received: list[bytes]) -> None:
    error = error_of(asked(*received, b""))
    assert isinstance(error, UpstreamFault)
    assert error.kind is Kind.EOF


def head_of(size: int) -> bytes:
    start, end = b"HTTP/1.1 200 OK\r\nX: ", b"\r\n\r\n"
    return start + b"x" * (size - len(start) - len(end)) + end


def test_response_head_is_bounded() -> None:
    """The response head is bounded."""
    assert asked(head_of(MAX_HEAD) + b"payload").next_event() == Established()
    assert asked(head_of(MAX_HEAD)[:-1], b"\n").next_event() == Established()
    for received in ([head_of(MAX_HEAD + 1)], [head_of(MAX_HEAD + 1)[:-1], b"\n"], [b"HTTP/1.1 " * MAX_HEAD]):
        error = error_of(asked(*received))
        assert isinstance(error, UpstreamFault)
        assert error.kind is Kind.TOO_LONG


def test_interim_responses_are_bounded_too() -> None:
    """The response head is bounded: an endless row of 1xx is no way around it."""
    error = error_of(asked(b"HTTP/1.1 100 Continue\r\n\r\n" * (MAX_HEAD // 25 + 1)))
    assert isinstance(error, UpstreamFault)
    assert error.kind is Kind.TOO_LONG


def outcome(pieces: list[bytes]) -> object:
    """The result of a conversation in which the proxy sends `pieces` and closes."""
    client = HttpConnect("example.com", 443)
    event: object = NEED_DATA
    try:
        for piece in [*pieces, b""]:
            client.receive_data(piece)
            if event is NEED_DATA:
                event = client.next_event()
                assert event is not NEED_DATA or len(client.trailing_data) <= MAX_HEAD
    except RequestRefused as refusal:
        return str(refusal)
    except UpstreamError as error:
        return type(error)
    return event, client.trailing_data


@given(
    st.one_of(
        st.binary(),
        st.lists(
            st.sampled_from([OK, b"HTTP/1.1 ", b"100 ", b"200", b" OK", b"\r", b"\n", b"\r\n\r\n", b"X: y", b"403"]),
            max_size=12,
        ).map(b"".join),
    ),
    st.lists(st.integers(0, 200), max_size=10),
)
def test_any_split_of_anything_is_the_same(received: bytes, cuts: list[int]) -> None:
    """Garbage gives an UpstreamError or a wait for more, never another exception, whatever the pieces."""
    places = sorted({0, len(received), *(cut for cut in cuts if cut < len(received))})
    whole = outcome([received] if received else [])
    assert outcome([received[start:end] for start, end in pairwise(places)]) == whole
    assert outcome([bytes((byte,)) for byte in received]) == whole
