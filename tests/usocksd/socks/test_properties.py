"""Properties of every input: splits don't matter, garbage does no harm, the roles understand each other."""

from __future__ import annotations

from dataclasses import dataclass
from ipaddress import ip_address
from itertools import pairwise

from hypothesis import assume, given
from hypothesis import strategies as st

from usocksd.errors import UpstreamError
from usocksd.socks import (
    NEED_DATA,
    AddressType,
    AuthenticationFailed,
    ClientFault,
    Command,
    Credentials,
    Established,
    Inquiry,
    Method,
    Probe,
    Probed,
    Reply,
    Request,
    Server,
    SocksConnect,
    Version,
)
from usocksd.socks.wire import MAX_INCOMPLETE

METHODS = st.sampled_from(
    [
        (Method.NO_AUTHENTICATION,),
        (Method.USERNAME_PASSWORD,),
        (Method.USERNAME_PASSWORD, Method.NO_AUTHENTICATION),
        (Method.NO_AUTHENTICATION, Method.USERNAME_PASSWORD),
    ]
)
NAMES = st.text(st.characters(exclude_categories=["Cc", "Cs"]), min_size=1, max_size=255).filter(
    lambda name: len(name.encode()) <= 255
)
FIELDS = st.text(st.characters(exclude_categories=["Cs"]), max_size=255).filter(lambda text: len(text.encode()) <= 255)
PORTS = st.integers(0, 65535)
V4 = st.ip_addresses(v=4).map(str)
V6 = st.ip_addresses(v=6).map(str)
CUTS = st.lists(st.integers(0, 600), max_size=20)


@dataclass
class Heard:
    """The result of feeding bytes to a server: events, answers, and leftovers."""

    events: list[Credentials | Request | Inquiry]
    sent: bytes
    trailing: bytes
    fault: tuple[str, str] | None  # kind, message


def split(data: bytes, cuts: list[int]) -> list[bytes]:
    places = sorted({0, len(data), *(cut for cut in cuts if cut < len(data))})
    return [data[start:end] for start, end in pairwise(places)]


def feed(pieces: list[bytes], methods: tuple[Method, ...], *, eof: bool = False) -> Heard:
    """The result of `pieces` with a server that accepts every user and refuses every request."""
    server = Server(methods=methods)
    heard = Heard([], b"", b"", None)
    over = False
    try:
        for piece in [*pieces, b""] if eof else pieces:
            server.receive_data(piece)
            while not over and (event := server.next_event()) is not NEED_DATA:
                heard.events.append(event)
                if isinstance(event, Credentials):
                    server.answer_credentials(accepted=True)
                    continue
                if isinstance(event, Request):
                    server.reply(Reply.NOT_ALLOWED)
                over = True
            if not over:
                assert len(server.trailing_data) <= MAX_INCOMPLETE
            heard.sent += server.data_to_send()
    except ClientFault as fault:
        assert server.trailing_data == b""
        heard.sent += fault.reply
        heard.fault = (fault.kind.value, str(fault))
    heard.trailing = server.trailing_data
    return heard


def addresses() -> st.SearchStrategy[bytes]:
    return st.one_of(
        st.ip_addresses(v=4).map(lambda ip: b"\x01" + ip.packed),
        st.ip_addresses(v=6).map(lambda ip: b"\x04" + ip.packed),
        NAMES.map(str.encode).map(lambda name: b"\x03" + bytes((len(name),)) + name),
    )


def field(text: str) -> bytes:
    return bytes((len(text.encode()),)) + text.encode()


@st.composite
def conversations(draw: st.DrawFn) -> tuple[bytes, tuple[Method, ...]]:
    """All that a client says in a valid handshake, and payload behind it; and the server's methods."""
    payload = draw(st.binary(max_size=50))
    port = draw(PORTS).to_bytes(2)
    if draw(st.booleans()):
        command = bytes((draw(st.sampled_from([1, 2])),))
        user = draw(st.binary(max_size=255)).replace(b"\0", b"?") + b"\0"
        if draw(st.booleans()):
            return b"\x04" + command + port + b"\0\0\0\x07" + user + draw(NAMES).encode() + b"\0" + payload, (
                Method.NO_AUTHENTICATION,
            )
        ip = draw(st.ip_addresses(v=4).filter(lambda ip: not 0 < int(ip) < 256)).packed
        return b"\x04" + command + port + ip + user + payload, (Method.NO_AUTHENTICATION,)
    method = draw(st.sampled_from([Method.NO_AUTHENTICATION, Method.USERNAME_PASSWORD]))
    offered = bytes(draw(st.lists(st.sampled_from([1, 3, 0x80]), max_size=3))) + bytes((method,))
    said = b"\x05" + bytes((len(offered),)) + offered
    if method is Method.USERNAME_PASSWORD:
        said += b"\x01" + field(draw(FIELDS)) + field(draw(FIELDS))
    command = bytes((draw(st.sampled_from(list(Command))),))
    return said + b"\x05" + command + b"\0" + draw(addresses()) + port + payload, (method,)


@given(conversations(), CUTS)
def test_any_split_of_a_conversation_is_the_same_conversation(
    conversation: tuple[bytes, tuple[Method, ...]], cuts: list[int]
) -> None:
    """Input may arrive one byte at a time, or all in one segment."""
    said, methods = conversation
    whole = feed([said], methods)
    assert whole.fault is None
    assert isinstance(whole.events[-1], Request)
    assert feed(split(said, cuts), methods) == whole
    assert feed([bytes((byte,)) for byte in said], methods) == whole


GARBAGE = st.one_of(
    st.binary(max_size=700),
    st.builds(
        bytes.__add__,
        st.sampled_from([b"\x04", b"\x05", b"\x05\x01\x00", b"\x05\x01\xf5", b"\x05\x02\xf5\x02"]),
        st.binary(max_size=700),
    ),
    # A valid conversation with one byte changed.
    st.builds(
        lambda said, place, byte: said[: place % len(said)] + bytes((byte,)) + said[place % len(said) + 1 :],
        conversations().map(lambda conversation: conversation[0]),
        st.integers(0, 1000),
        st.integers(0, 255),
    ),
)


@given(GARBAGE, CUTS, METHODS, st.booleans())
def test_garbage_to_the_server(garbage: bytes, cuts: list[int], methods: tuple[Method, ...], eof: bool) -> None:
    """A protocol error or a wait for more, never another exception; bounded; whatever the pieces."""
    whole = feed([garbage] if garbage else [], methods, eof=eof)
    assert whole.fault is not None or not eof or isinstance(whole.events[-1], Request | Inquiry)
    assert feed(split(garbage, cuts), methods, eof=eof) == whole


@given(
    st.one_of(
        st.binary(max_size=300),
        st.builds(
            bytes.__add__,
            st.sampled_from([b"\x05", b"\x05\x00", b"\x05\x00\x05\x00\x00", b"\x05\x02\x01\x00\x05\x00", b"\x00\x5a"]),
            st.binary(max_size=300),
        ),
    ),
    CUTS,
    st.sampled_from(list(Version)),
    st.sampled_from([None, "me"]),
    st.booleans(),
    st.booleans(),
)
def test_garbage_to_the_client(
    garbage: bytes, cuts: list[int], version: Version, username: str | None, pipelined: bool, eof: bool
) -> None:
    """The same for the client role: an UpstreamError or a wait for more."""

    def outcome(pieces: list[bytes]) -> object:
        client = SocksConnect("example.com", 80, version=version, username=username, pipelined=pipelined)
        event: object = NEED_DATA
        try:
            for piece in [*pieces, b""] if eof else pieces:
                client.receive_data(piece)
                if event is NEED_DATA:
                    event = client.next_event()
                    assert event is not NEED_DATA or len(client.trailing_data) <= MAX_INCOMPLETE
        except UpstreamError as error:
            return type(error)
        return event, client.trailing_data, client.data_to_send()

    assert outcome(split(garbage, cuts)) == outcome([garbage] if garbage else [])


ANSWERS = st.sampled_from(
    [b"", b"\x05", b"\x05\x00", b"\x05\xf5", b"\x05\x02\x01\x00", b"\x05\xf5\x01\x00", b"\x05\x02\x01", b"\x05\xff"]
)


@given(
    st.builds(bytes.__add__, ANSWERS, st.binary(max_size=300)),
    CUTS,
    st.sampled_from([None, "me"]),
    st.booleans(),
    st.booleans(),
)
def test_garbage_to_a_probe(garbage: bytes, cuts: list[int], username: str | None, pipelined: bool, eof: bool) -> None:
    """The result does not depend on the pieces, and every error is an UpstreamError."""

    def outcome(pieces: list[bytes]) -> object:
        probe = Probe(username, pipelined=pipelined)
        said = probe.data_to_send()
        learned: list[Probed] = []
        try:
            for piece in [*pieces, b""] if eof else pieces:
                probe.receive_data(piece)
                while not over(learned, pipelined) and isinstance(event := probe.next_event(), Probed):
                    learned.append(event)
                said += probe.data_to_send()
        except UpstreamError as error:
            return type(error), learned
        assert not eof or over(learned, pipelined)
        return learned, said

    def over(learned: list[Probed], pipelined: bool) -> bool:
        return bool(learned) and (learned[-1].pipelines is not None or not pipelined)

    assert outcome(split(garbage, cuts)) == outcome([garbage] if garbage else [])


@given(
    st.lists(st.sampled_from([0, 1, 2, 3, 0x80]), max_size=5).map(bytes),
    st.one_of(st.binary(max_size=300), conversations().map(lambda conversation: conversation[0])),
    CUTS,
    METHODS,
    st.booleans(),
)
def test_no_probe_leads_to_a_request(
    also: bytes, behind: bytes, cuts: list[int], methods: tuple[Method, ...], eof: bool
) -> None:
    """Whatever else it offers and sends: no connection gets past authentication."""
    greeting = bytes((5, 1 + len(also), Method.PROBE)) + also
    heard = feed(split(greeting + behind, cuts), methods, eof=eof)
    assert not any(isinstance(event, Request) for event in heard.events)
    assert heard.sent.startswith(b"\x05\xf5") or (heard.fault is None and not heard.events)


@dataclass
class Told:
    """The result of a conversation between a SocksConnect and a Server."""

    credentials: Credentials | None = None
    request: Request | None = None
    answer: Established | UpstreamError | None = None


def converse(
    client: SocksConnect,
    server: Server,
    *,
    accept: bool = True,
    bound: tuple[str, int] | None = None,
) -> Told:
    told = Told()
    while told.answer is None:
        server.receive_data(client.data_to_send())
        try:
            event = server.next_event()
            if isinstance(event, Credentials):
                told.credentials = event
                server.answer_credentials(accepted=accept)
            elif isinstance(event, Request):
                told.request = event
                server.reply(Reply.SUCCEEDED, bound)
            client.receive_data(server.data_to_send() + (b"payload" if told.request else b""))
        except ClientFault as fault:
            client.receive_data(fault.reply)
        try:
            answer = client.next_event()
            told.answer = None if answer is NEED_DATA else answer
        except UpstreamError as error:
            told.answer = error
    return told


@given(st.one_of(V4, V6), PORTS, st.sampled_from(list(Version)), st.none() | st.tuples(V4 | V6, PORTS))
def test_addresses_and_bound_addresses_arrive(
    host: str, port: int, version: Version, bound: tuple[str, int] | None
) -> None:
    """Numeric requests and replies mean the same on both sides."""
    if version is Version.SOCKS4:
        assume(":" not in host and not 0 < int(ip_address(host)) < 256)
    client = SocksConnect(host, port, version=version, user_id="me")
    told = converse(client, Server(), bound=bound)
    assert told.request is not None
    assert (told.request.version, told.request.command) == (version, Command.CONNECT)
    assert told.request.address_type is (AddressType.IPV6 if ":" in host else AddressType.IPV4)
    assert (ip_address(told.request.host), told.request.port) == (ip_address(host), port)
    assert told.request.user_id == ("me" if version is Version.SOCKS4 else "")
    if bound is None or (version is Version.SOCKS4 and ":" in bound[0]):
        bound = ("0.0.0.0", 0)
    assert isinstance(told.answer, Established)
    assert (ip_address(told.answer.bound_host), told.answer.bound_port) == (ip_address(bound[0]), bound[1])
    assert client.trailing_data == b"payload"


def is_address(text: str) -> bool:
    try:
        ip_address(text)
    except ValueError:
        return False
    return True


@given(NAMES, PORTS, st.sampled_from(list(Version)))
def test_names_arrive(name: str, port: int, version: Version) -> None:
    """Names arrive as sent: ATYP 3, or 4a. (An address is no name, and any text may happen to be one.)"""
    assume(not is_address(name))
    told = converse(SocksConnect(name, port, version=version, pipelined=port % 2 == 1), Server())
    assert told.request is not None
    assert (told.request.host, told.request.port) == (name, port)
    assert told.request.address_type is AddressType.NAME


@given(st.none() | FIELDS, FIELDS, METHODS, st.booleans())
def test_credentials_arrive(username: str | None, password: str, methods: tuple[Method, ...], accept: bool) -> None:
    """With and without users; the server's preference decides whether they are asked for."""
    client = SocksConnect("example.com", 80, username=username, password=password)
    told = converse(client, Server(methods=methods), accept=accept)
    if methods[0] is Method.USERNAME_PASSWORD and username is not None:
        assert told.credentials == Credentials(username, password)
        assert isinstance(told.answer, Established if accept else AuthenticationFailed)
    else:
        assert told.credentials is None
        possible = Method.NO_AUTHENTICATION in methods
        assert isinstance(told.answer, Established if possible else AuthenticationFailed)
