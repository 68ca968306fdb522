"""Probes, and pipelined handshakes: which segment has what, and that a probe opens no connection."""

from __future__ import annotations

import pytest
from conversation import after, error_of

from usocksd.socks import (
    INQUIRY,
    NEED_DATA,
    SOCKS4_PROBE,
    AuthenticationFailed,
    ClientFault,
    Credentials,
    Established,
    Kind,
    Method,
    Probe,
    Probed,
    Server,
    SocksConnect,
    UpstreamFault,
    Version,
)

ASKS = b"\x05\x01\x00\x03\x0bexample.com\x01\xbb"
NOWHERE = b"\x05\x01\x00\x01\x00\x00\x00\x00\x00\x00"
CREDENTIALS = b"\x01\x02me\x03key"
REPLY = b"\x05\x00\x00\x01\xc6\x33\x64\x09\x9c\x40"
REQUIRED = (Method.USERNAME_PASSWORD,)


# A pipelined client


@pytest.mark.parametrize("username", [None, "me"])
def test_everything_at_once(username: str | None) -> None:
    client = SocksConnect("example.com", 443, username=username, password="key", pipelined=True)
    assert client.data_to_send() == (b"\x05\x01\x02" + CREDENTIALS if username else b"\x05\x01\x00") + ASKS
    after(client, b"\x05\x02\x01\x00" if username else b"\x05\x00", REPLY + b"payload")
    assert client.next_event() == Established("198.51.100.9", 40000)
    assert client.data_to_send() == b""
    assert client.trailing_data == b"payload"


def test_pipelining_changes_nothing_in_socks4() -> None:
    said = [
        SocksConnect("a.example", 80, version=Version.SOCKS4, pipelined=each).data_to_send() for each in (False, True)
    ]
    assert said[0] == said[1] == b"\x04\x01\x00\x50\x00\x00\x00\x01\x00a.example\x00"


# Probes, by what other servers do


def test_a_server_that_is_not_ours() -> None:
    probe = Probe()
    assert probe.data_to_send() == b"\x05\x02\xf5\x00"
    assert probe.next_event() is NEED_DATA
    probe.receive_data(b"\x05\x00")
    assert probe.next_event() == Probed(ours=False, pipelines=None)
    assert probe.data_to_send() == b""
    with pytest.raises(RuntimeError):
        probe.next_event()


@pytest.mark.parametrize(
    ("answer", "pipelines"),
    [
        (b"\x05\x08\x00\x01" + bytes(6), True),  # dante
        (REPLY, True),  # pproxy: yes, and then closes
        (b"\x05\x07", True),
        (b"", False),
        (b"\x00", False),
    ],
)
def test_whether_a_server_pipelines(answer: bytes, pipelines: bool) -> None:
    probe = Probe(pipelined=True)
    assert probe.data_to_send() == b"\x05\x02\xf5\x00" + NOWHERE
    probe.receive_data(b"\x05\x00")
    assert probe.next_event() == Probed(ours=False, pipelines=None)
    # microsocks leaves it at that.
    assert probe.next_event() is NEED_DATA
    probe.receive_data(answer)
    assert probe.next_event() == Probed(ours=False, pipelines=pipelines)
    with pytest.raises(RuntimeError):
        probe.next_event()


def test_both_answers_in_one_segment() -> None:
    probe = after(Probe(pipelined=True), b"\x05\x00" + REPLY)
    assert [probe.next_event(), probe.next_event()] == [Probed(False, None), Probed(False, True)]


@pytest.mark.parametrize("pipelined", [False, True])
def test_credentials_are_sent_to_servers_that_want_them(pipelined: bool) -> None:
    probe = Probe("me", "key", pipelined=pipelined)
    said = probe.data_to_send()
    assert said == (b"\x05\x02\xf5\x02" + CREDENTIALS + NOWHERE if pipelined else b"\x05\x03\xf5\x00\x02")
    probe.receive_data(b"\x05\x02")
    assert probe.next_event() is NEED_DATA
    assert probe.data_to_send() == (b"" if pipelined else CREDENTIALS)
    probe.receive_data(b"\x01\x00")
    assert probe.next_event() == Probed(ours=False, pipelines=None)


@pytest.mark.parametrize("answer", [b"\x05\x02\x01\x01", b"\x05\xf5\x01\x01", b"\x05\xff"])
@pytest.mark.parametrize("pipelined", [False, True])
def test_a_server_that_refuses_our_credentials(answer: bytes, pipelined: bool) -> None:
    error = error_of(after(Probe("me", "key", pipelined=pipelined), answer))
    assert isinstance(error, AuthenticationFailed)


@pytest.mark.parametrize("answer", [b"\x05\x02", b"\x05\x01", b"HTTP/1.1 400 Bad Request\r\n"])
def test_servers_that_do_not_speak_socks5(answer: bytes) -> None:
    error = error_of(after(Probe(), answer))
    assert isinstance(error, UpstreamFault)
    assert error.kind is Kind.MALFORMED


# Probes, by a usocksd

METHODS = [(Method.NO_AUTHENTICATION, Method.USERNAME_PASSWORD), (Method.NO_AUTHENTICATION,), REQUIRED]


@pytest.mark.parametrize("methods", METHODS)
@pytest.mark.parametrize("pipelined", [False, True])
def test_ours(methods: tuple[Method, ...], pipelined: bool) -> None:
    """Known without credentials, also where they are required."""
    server, probe = Server(methods=methods), Probe(pipelined=pipelined)
    server.receive_data(probe.data_to_send())
    assert server.next_event() is INQUIRY
    answer = server.data_to_send()
    assert answer == b"\x05\xf5"
    probe.receive_data(answer)
    assert probe.next_event() == Probed(ours=True, pipelines=True)
    assert probe.data_to_send() == b""


@pytest.mark.parametrize("pipelined", [False, True])
@pytest.mark.parametrize("right", [False, True])
def test_ours_judges_credentials(pipelined: bool, right: bool) -> None:
    server, probe = Server(methods=REQUIRED), Probe("me", "key", pipelined=pipelined)
    server.receive_data(probe.data_to_send())
    if not pipelined:
        assert server.next_event() is NEED_DATA
        probe.receive_data(server.data_to_send())
        assert probe.next_event() is NEED_DATA
        server.receive_data(probe.data_to_send())
    assert server.next_event() == Credentials("me", "key")
    if right:
        server.answer_credentials(accepted=True)
        assert server.next_event() is INQUIRY
        probe.receive_data(server.data_to_send())
        assert probe.next_event() == Probed(ours=True, pipelines=True)
    else:
        server.answer_credentials(accepted=False)
        probe.receive_data(server.data_to_send())
        assert isinstance(error_of(probe), AuthenticationFailed)


@pytest.mark.parametrize("methods", METHODS)
def test_ours_is_asked_by_socks4(methods: tuple[Method, ...]) -> None:
    """It answers as any other server, and takes it for a probe."""
    server = Server(methods=methods)
    server.receive_data(SOCKS4_PROBE[:-1])
    assert server.next_event() is NEED_DATA
    server.receive_data(SOCKS4_PROBE[-1:] + b"\x04\x01")
    assert server.next_event() is INQUIRY
    assert server.data_to_send() == b"\x00\x5b" + bytes(6)
    with pytest.raises(RuntimeError):
        server.next_event()


@pytest.mark.parametrize("methods", METHODS)
@pytest.mark.parametrize("behind", [b"", b"\x01\x02me\x03key"])
def test_a_probe_never_becomes_a_connection(methods: tuple[Method, ...], behind: bytes) -> None:
    """Whatever comes behind it, and whenever."""
    server = Server(methods=methods)
    server.receive_data((b"\x05\x02\xf5\x02" if behind else b"\x05\x02\xf5\x00") + behind + ASKS)
    if behind:
        assert isinstance(server.next_event(), Credentials)
        server.answer_credentials(accepted=True)
    assert server.next_event() is INQUIRY
    for more in (ASKS, b"\x05\x01\x00" + ASKS, b""):
        server.receive_data(more)
        with pytest.raises(RuntimeError):
            server.next_event()
        with pytest.raises(RuntimeError):
            server.reply(0)  # type: ignore[arg-type]
        with pytest.raises(RuntimeError):
            server.answer_credentials(accepted=True)


def test_a_probe_that_offers_credentials_and_sends_none() -> None:
    server = Server()
    server.receive_data(b"\x05\x02\xf5\x02")
    assert server.next_event() is NEED_DATA
    server.receive_data(b"")
    with pytest.raises(ClientFault, match="inside its credentials"):
        server.next_event()


def test_a_client_that_offers_everything_is_no_probe() -> None:
    server = Server()
    server.receive_data(b"\x05\x03\x00\x02\xf5")
    assert server.next_event() is NEED_DATA
    assert server.data_to_send() == b"\x05\x00"
