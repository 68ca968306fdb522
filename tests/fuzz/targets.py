"""Every parser that meets strangers' bytes, one small function each: bytes in, nothing out, and no exception but a bug.

The documented exceptions of a parser are caught here, so that any other is a finding. Where it takes
pieces, it has to make the same of them as of the whole.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import tempfile
from collections.abc import Callable, Iterable, Iterator
from datetime import UTC, datetime
from ipaddress import ip_address
from pathlib import Path
from typing import Any, TypeVar

import dns.exception
import dns.name
import dns.rdatatype
import trio

from transocks.http_connect import MAX_HEAD, HttpConnect
from transocks.rules.live import CHAINS
from transocks.rules.loaded import compare, parse_nft, parse_save, replacement, seconds_left, without_term
from transocks.sniff import MOST, Sniffer
from transocks.tracing.reports import MESSAGE
from transocks.tracing.reports import parse as parse_trace
from transocks.tracing.trace import trace_of
from transocks.udp.sockets import original_destination
from usocksd.acl import AccessRules, Rule
from usocksd.clients import Client, ClientRules
from usocksd.decision import Decision, Policy
from usocksd.errors import ResolveError, UpstreamError
from usocksd.explain import read_request
from usocksd.host.netlink import messages
from usocksd.log.formats import JSON, Formatter, Logfmt, Plain, Severity
from usocksd.names import name_query
from usocksd.names.hosts_file import HostsFile
from usocksd.names.match import canonical_host, parse_network
from usocksd.names.resolv_conf import parse as parse_resolv_conf
from usocksd.names.sites import SiteList, parse_entry
from usocksd.net.address import numeric_address
from usocksd.net.proxy_protocol import HeaderFault, Receiver, unlikely
from usocksd.records import AccessRecord, read_record
from usocksd.replay import judge
from usocksd.serve.channel import Channel
from usocksd.serve.control import answer_line
from usocksd.serve.exporter import BadRequest, parse_request
from usocksd.serve.server import Peer
from usocksd.socks import (
    NEED_DATA,
    ClientFault,
    ClientRole,
    Credentials,
    Inquiry,
    Method,
    Probe,
    Reply,
    Request,
    Server,
    SocksConnect,
    Version,
)
from usocksd.socks.datagram import BadDatagram
from usocksd.socks.datagram import header as datagram_header
from usocksd.socks.datagram import parse as parse_datagram
from usocksd.socks.wire import MAX_INCOMPLETE

T = TypeVar("T")
Target = Callable[[bytes], None]

TARGETS: dict[str, Target] = {}


def target(function: Target) -> Target:
    """One of them, by its name."""
    TARGETS[function.__name__] = function
    return function


def pieces(data: bytes) -> Iterator[bytes]:
    """Cut into pieces, in a way that depends only on the first byte."""
    step = data[0] % 7 + 1 if data else 1
    at = 0
    while at < len(data):
        yield data[at : at + step]
        at, step = at + step, step * 2 % 61 + 1


# ---- SOCKS, HTTP CONNECT, PROXY


_METHODS = (
    (Method.NO_AUTHENTICATION,),
    (Method.USERNAME_PASSWORD,),
    (Method.USERNAME_PASSWORD, Method.NO_AUTHENTICATION),
    (Method.NO_AUTHENTICATION, Method.USERNAME_PASSWORD),
)


@target
def socks_server(data: bytes) -> None:
    """Bytes of clients of usocksd. The first byte selects its configuration."""
    methods, rest = _METHODS[data[0] % 4] if data else _METHODS[0], data[1:]
    whole, cut = (_serve(methods, parts) for parts in ([rest], pieces(rest)))
    assert whole == cut, (whole, cut)


def _serve(methods: tuple[Method, ...], parts: Iterable[bytes]) -> tuple[list[object], bytes, bytes]:
    server, said, events, over = Server(methods=methods), b"", list[object](), False
    left = b""
    try:
        for part in (*filter(None, parts), b""):
            if over:
                left += part if isinstance(events[-1], Request) else b""
                continue
            server.receive_data(part)
            while not over and (event := server.next_event()) is not NEED_DATA:
                events.append(event)
                if isinstance(event, Credentials):
                    server.answer_credentials(accepted=True)
                elif isinstance(event, Inquiry):
                    over = True
                elif isinstance(event, Request):
                    server.reply(Reply.HOST_UNREACHABLE)
                    over = True
                    left = server.trailing_data
            said += server.data_to_send()
            assert over or len(server.trailing_data) <= MAX_INCOMPLETE
    except ClientFault as fault:
        events.append((fault.kind, str(fault)))
        said += fault.reply
    return events, said, left


def _client(make: Callable[[], ClientRole], data: bytes, most: int) -> None:
    assert _ask(make(), [data], most) == _ask(make(), pieces(data), most)


def _ask(machine: ClientRole, parts: Iterable[bytes], most: int) -> tuple[list[object], bytes]:
    said, events = machine.data_to_send(), list[object]()
    heard = left = b""
    try:
        for part in (*filter(None, parts), b""):
            heard += part
            if events:
                left += part
                continue
            machine.receive_data(part)
            event = machine.next_event()
            said += machine.data_to_send()
            if event is NEED_DATA:
                assert len(heard) <= most
            else:
                events.append(event)
                left = machine.trailing_data
    except UpstreamError as error:  # (the earlier answers are no longer needed)
        return [type(error), str(error)[:20]], b""
    return [*events, left], said


@target
def datagram(data: bytes) -> None:
    """Datagrams of clients of usocksd, and of transocks's upstreams; behind each is what the buffer had before."""
    try:
        found = parse_datagram(memoryview(data + b"\xff" * 300), len(data))
    except BadDatagram as bad:
        causes = {bad.cause}
    else:
        causes = set()
    assert causes <= set(BadDatagram.CAUSES)
    if causes:
        return
    assert found.size <= len(data)
    again = datagram_header(found.host, found.port)
    assert parse_datagram(again, len(again)) == (found.host, found.port, len(again))


@target
def original_destination_of_datagram(data: bytes) -> None:
    """Control messages of recvmsg(2), as the kernel would make them: of the right length, whatever is in them."""
    for level, kind, size in ((socket.IPPROTO_IP, 20, 16), (socket.IPPROTO_IPV6, 74, 28)):
        message = (level, kind, (data + bytes(size))[:size])
        found = original_destination([(0, 0, data), message], v6=level == socket.IPPROTO_IPV6)
        assert found is not None
        ip_address(found[0])


@target
def socks_client(data: bytes) -> None:
    """Answers of transocks's upstreams."""
    how = data[0] if data else 0

    def make() -> ClientRole:
        if how % 5 == 4:
            return SocksConnect("192.0.2.1", 80, version=Version.SOCKS4)
        user = "user" if how & 1 else None
        return SocksConnect("www.example.com", 443, username=user, password=user, pipelined=bool(how & 2))

    _client(make, data[1:], MAX_INCOMPLETE)


@target
def socks_probe(data: bytes) -> None:
    """The same bytes, for a probe."""
    how = data[0] if data else 0
    user = "user" if how & 1 else None
    _client(lambda: Probe(user, user, pipelined=bool(how & 2)), data[1:], MAX_INCOMPLETE)


@target
def http_connect(data: bytes) -> None:
    """Answers of HTTP proxies."""
    _client(lambda: HttpConnect("www.example.com", 443), data, MAX_HEAD)


@target
def proxy_header(data: bytes) -> None:
    """PROXY headers."""
    found = []
    for parts in ([data], pieces(data)):
        receiver, header, behind = Receiver(), None, b""
        try:
            for part in filter(None, parts):
                if header is not None:
                    behind += part
                elif (header := receiver.receive_data(part)) is not None:
                    behind = receiver.trailing_data
            found.append((header, behind))
        except HeaderFault:
            found.append((None, b"fault"))
        if header is not None and header.source is not None:
            unlikely(numeric_address(header.source.host), numeric_address("192.0.2.1"))
    assert found[0] == found[1]


# ---- names


@target
def sniff(data: bytes) -> None:
    """First bytes of clients of redirected connections: TLS, HTTP, or anything."""
    port = (443, 80, 8080, 0)[data[0] % 4] if data else 0
    found = []
    for parts in ([data[1:]], pieces(data[1:])):
        sniffer, opening = Sniffer(port), None
        for part in filter(None, parts):
            opening = sniffer.feed(part)
            if opening is not None:
                break
        found.append(opening)
        name = (opening or sniffer.finish()).name
        assert name is None or canonical_host(name) == name
    # (Of pieces, an error may be known before the bytes behind it are there, and what is behind a hello not yet.)
    assert len(data) > MOST or (found[0] and found[0].name) == (found[1] and found[1].name), found


@target
def host(data: bytes) -> None:
    """Names and addresses as clients write them: what is no address here is none for anybody."""
    text = data.decode("utf-8", "replace")
    try:
        found = canonical_host(text)
    except ValueError:
        return
    assert canonical_host(str(found)) == found
    if isinstance(found, str):
        assert len(found) <= 253
        assert found.isascii()
        with contextlib.suppress(OSError):
            socket.inet_aton(found)
            raise AssertionError(f"{text!r} is the name {found!r}, and an address of inet_aton")


@target
def site(data: bytes) -> None:
    """Entries of lists of destinations, which may be fetched from somewhere: two ways to read them, one meaning."""
    text = data.decode("utf-8", "backslashreplace")
    try:
        entry = parse_entry(text)
    except ValueError:
        return
    sites = SiteList([entry])
    assert len(sites) == 1
    assert list(sites.entries()) == [entry]
    if "/" in text:
        assert str(parse_network(str(entry))) == str(parse_network(text))


_RULES = AccessRules(
    [
        Rule(name="a", allow=False, to=(SiteList(map(parse_entry, [".example", "10.0.0.0/8", "x.test", "::/16"])),)),
        Rule(
            name="b", allow=True, to=(SiteList(map(parse_entry, ["", "127.0.0.1", "2001:db8::/32"])),), ports=((1, 99),)
        ),
    ],
    lambda address: address == ip_address("192.0.2.7"),
)
_POLICY = Policy(ClientRules(), _RULES, frozenset(["ci"]), required=False)


@target
def record(data: bytes) -> None:
    """Lines of the log, of which clients have chosen a part; and the rules asked again about what they say."""
    for line in data.split(b"\n"):
        found = read_record(line)
        if isinstance(found, AccessRecord):
            judge(_POLICY, found.request)


@target
def judged(data: bytes) -> None:
    """A request as it comes, brought to the rules: every host that can be asked for can be judged."""
    server = Server()
    server.receive_data(b"\x05\x01\x00" + data)
    try:
        request = server.next_event()
    except ClientFault:
        return
    if isinstance(request, Request):
        try:
            decision = Decision(_RULES, Client.at("10.9.9.9"), request.host, request.port)
        except ResolveError:
            return
        ruling = decision.ruling or decision.judge_name(decision.sent)
        last = decision.trace()[-1]
        assert (last.matched, last.rule) == (True, ruling.rule)


# ---- DNS


_QUERY = name_query.NameQuery([], dns.name.from_text("www.example.com."), [dns.rdatatype.A], lambda _, __: None)


@target
def dns_answer(data: bytes) -> None:
    """Answers of name servers."""
    message = _QUERY._read(data, dns.rdatatype.A)
    if message is not None:
        with contextlib.suppress(dns.exception.DNSException):
            found = name_query._found(message)
            assert found.ttl is None or found.ttl >= 0
            for address in found.addresses:
                numeric_address(address)


class _File:
    """A file, to be written again and again."""

    def __init__(self) -> None:
        memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
        self.path = Path(tempfile.mkdtemp(prefix="fuzz-", dir=memory)) / "file"
        self._fd = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o600)

    def write(self, data: bytes) -> Path:
        os.ftruncate(self._fd, 0)
        os.pwrite(self._fd, data, 0)
        return self.path


_file: list[_File] = []


def _on_disk(data: bytes) -> Path:
    if not _file:
        _file.append(_File())
    return _file[0].write(data)


@target
def hosts_file(data: bytes) -> None:
    """/etc/hosts, which programs write as well."""
    hosts = HostsFile(_on_disk(data))
    hosts.reread()
    for name in ("localhost", "a", data[:20].decode("utf-8", "replace")):
        hosts.addresses(name)


@target
def resolv_conf(data: bytes) -> None:
    """/etc/resolv.conf, which DHCP servers write."""
    conf = parse_resolv_conf(data.decode("utf-8", "replace"), hostname="host.example")
    assert 0 <= conf.ndots <= 15
    assert 1 <= conf.timeout <= 30
    for server in conf.servers:
        numeric_address(server)
    assert all(canonical_host(domain) == domain for domain in conf.search)


# ---- the doors


async def _explain(request: dict[str, Any]) -> dict[str, Any]:
    read_request(request)
    return {"read": list(request)}


_HANDLERS = {"explain": _explain, "status": _explain}


@target
def control_request(data: bytes) -> None:
    """Requests on the control socket."""
    answer = _drive(answer_line(_HANDLERS, data.partition(b"\n")[0], Peer(0)))
    values = json.loads(answer)
    assert answer.endswith(b"\n")
    assert values["ok"] or values["error"] != "internal error"


def _drive(coroutine: Any) -> Any:
    """Run what waits for nothing."""
    try:
        coroutine.send(None)
    except StopIteration as done:
        return done.value
    raise AssertionError("it waits")


@target
def metrics_request(data: bytes) -> None:
    """Requests on the metrics port."""
    with contextlib.suppress(BadRequest):
        parse_request(data)


@target
def netlink(data: bytes) -> None:
    """Messages of the kernel: trusted, but parsed with care."""
    assert sum(len(body) for _, _, body in messages(data)) <= len(data)


# ---- what the kernel and the tools say of rules: those of strangers among them


@target
def nft_rules(data: bytes) -> None:
    """nft's listing of rules that anybody has made."""
    for table in parse_nft(data.decode("utf-8", "replace")):
        seconds_left(table, datetime.now(UTC))
        assert list(compare("it", table, table)) == []
        assert len(list(compare("it", table, None))) == 1


@target
def iptables_save(data: bytes) -> None:
    """Output of iptables-save; parsing our text of it gives the same tables."""
    text = data.decode("utf-8", "replace")
    parse_save(text)
    ours = parse_save(text, CHAINS)
    for table in ours:
        assert list(compare("it", table, table)) == []
        with contextlib.suppress(ValueError):  # a time that no tool prints
            seconds_left(table, datetime.now(UTC))
        without_term(table)
    replacement(ours, [], CHAINS)
    assert parse_save(replacement([], ours, CHAINS), CHAINS) == ours


@target
def trace(data: bytes) -> None:
    """The kernel's reports of packets, and the traces that they make."""
    reports = [
        report for kind, _, body in messages(data) if kind == MESSAGE and (report := parse_trace(body)) is not None
    ]
    packets = [report.packet for report in reports if report.packet]
    for protocol, port in {(packet.protocol, end) for packet in packets for end in (packet.sport, packet.dport)}:
        for back in (False, True):
            found = trace_of(reports, protocol, port, back=back)
            if found is not None:
                assert {found.packet.sport, found.packet.dport} >= {port}
                assert len(found.marks) < len(found.reports)
                assert (found.stop is None) is (found.delivered or found.left)


# ---- between master and worker


@target
def channel(data: bytes) -> None:
    """Messages that are torn."""
    whole, cut = (trio.run(_received, list(parts)) for parts in ([data], pieces(data)))
    assert whole == cut


async def _received(parts: list[bytes]) -> list[object]:
    ours, theirs = trio.socket.socketpair()
    found = list[object]()

    async def send() -> None:
        with theirs, contextlib.suppress(OSError):  # a client that has enough closes
            for part in filter(None, parts):
                await theirs.send(part)

    end = Channel(ours)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(send)
        while (received := await end.receive()) is not None:
            found.append(received)
        end.close()
    return found


# ---- what is written of strangers


_FORMATS: tuple[Formatter, ...] = (Plain("t", "h"), Logfmt("t", "h"), JSON("t", "h"))


@target
def log_record(data: bytes) -> None:
    """Names and users in the log: one line, nothing that a terminal obeys, and JSON reads back."""
    text = data.decode("utf-8", "surrogateescape")
    for each in _FORMATS:
        line = each.format(0.0, Severity.INFO, "m", {"user": text, "list": [text, data]}).decode()
        assert line[-1] == "\n"
        assert line[:-1].isprintable()
    read = json.loads(line)
    assert "log_error" in read or read["user"] == re.sub("[\ud800-\udfff]+", "\ufffd", text)
