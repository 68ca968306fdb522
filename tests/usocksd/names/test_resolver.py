from __future__ import annotations

import os
import resource
import socket
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from ipaddress import ip_address
from itertools import pairwise
from pathlib import Path
from typing import Any

import dns.flags
import dns.message
import dns.rcode
import dns.rdatatype
import dns.rrset
import pytest
import trio
import trio.testing
from trio.testing import MockClock

from usocksd.errors import ResolveError
from usocksd.log.metrics import Metrics
from usocksd.names.resolv_conf import parse
from usocksd.names.resolver import Most, Resolver
from usocksd.net.address import HostPort, IPAddress


def addresses(*texts: str) -> tuple[IPAddress, ...]:
    return tuple(ip_address(text) for text in texts)


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


class Place:
    """A directory with a hosts file and a resolv.conf, and resolvers that read them."""

    def __init__(self, directory: Path, nursery: trio.Nursery) -> None:
        self.hosts = directory / "hosts"
        self.resolv_conf = directory / "resolv.conf"
        self.clock = Clock()
        self.nursery = nursery

    async def server(self, answer: Answer) -> Server:
        server = Server(answer)
        await self.nursery.start(server.serve)
        return server

    async def resolver(self, *servers: HostPort, lifetime: float | None = 5.0, **more: Any) -> Resolver:
        """One that asks these servers, or else those of resolv.conf."""
        resolver = Resolver(
            servers or None,
            Metrics("test"),
            resolv_conf=self.resolv_conf,
            hosts=self.hosts,
            lifetime=lifetime,
            clock=self.clock,
            **more,
        )
        await self.nursery.start(resolver.run)
        return resolver

    async def serving(self, answer: Answer, **more: Any) -> tuple[Server, Resolver]:
        """A server, and a resolver that asks it."""
        server = await self.server(answer)
        return server, await self.resolver(server.endpoint, **more)


@pytest.fixture
async def place(tmp_path: Path) -> AsyncIterator[Place]:
    async with trio.open_nursery() as nursery:
        yield Place(tmp_path, nursery)
        nursery.cancel_scope.cancel()


# --- against a server that does as it is told ---

Answer = Callable[[dns.message.Message], Sequence[dns.message.Message | bytes]]


def sockets_on_one_port(host: str) -> tuple[trio.socket.SocketType, trio.socket.SocketType]:
    for _ in range(100):
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        tcp = socket.create_server((host, 0), family=family)
        udp = socket.socket(family, socket.SOCK_DGRAM)
        try:
            udp.bind(tcp.getsockname())
        except OSError:  # taken by another program
            tcp.close()
            udp.close()
        else:
            return trio.socket.from_stdlib_socket(udp), trio.socket.from_stdlib_socket(tcp)
    raise OSError("no port is free for both UDP and TCP")


class Server:
    """A DNS server on loopback. `answer` makes the datagrams for a query; `asked` counts name and type."""

    def __init__(self, answer: Answer, host: str = "127.0.0.1") -> None:
        self.answer = answer
        self.asked: Counter[tuple[str, str]] = Counter()
        self.got_query = trio.Event()
        self.released = trio.Event()  # answers wait for it
        self.released.set()
        self._udp, self._tcp = sockets_on_one_port(host)
        self.over_tcp = 0
        self.silent_over_tcp = False
        self.before: Callable[[dns.message.Message, object], Awaitable[object]] | None = None
        """Done before each answer."""
        self.lies = 0

    async def serve(self, task_status: trio.TaskStatus[None]) -> None:
        with self._udp, self._tcp:
            task_status.started()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._serve_tcp)
                while True:
                    wire, client = await self._udp.recvfrom(4096)
                    nursery.start_soon(self._reply, wire, client)

    async def _reply(self, wire: bytes, client: object) -> None:
        replies = self._replies(wire)
        await self.released.wait()
        if self.before is not None:
            await self.before(dns.message.from_wire(wire), client)
            self.lies += 1
        for reply in replies:
            await self._udp.sendto(reply, client)  # type: ignore[arg-type]

    @property
    def endpoint(self) -> HostPort:
        return HostPort("127.0.0.1", self._udp.getsockname()[1])

    def _replies(self, wire: bytes) -> list[bytes]:
        query = dns.message.from_wire(wire)
        question = query.question[0]
        self.asked[question.name.to_text(omit_final_dot=True), dns.rdatatype.to_text(question.rdtype)] += 1
        self.got_query.set()
        return [
            reply if isinstance(reply, bytes) else reply.to_wire(want_shuffle=False) for reply in self.answer(query)
        ]

    async def _serve_tcp(self) -> None:
        while True:
            stream = trio.SocketStream((await self._tcp.accept())[0])
            async with stream:
                wire = b""
                while len(wire) < 2 or len(wire) < 2 + int.from_bytes(wire[:2], "big"):
                    wire += await stream.receive_some()
                self.over_tcp += 1
                if self.silent_over_tcp:
                    await trio.sleep_forever()
                query = dns.message.from_wire(wire[2:])
                reply = records({"big.test": ["192.0.2.1"]})(query)[0]
                assert isinstance(reply, dns.message.Message)
                await stream.send_all(len(reply.to_wire()).to_bytes(2, "big") + reply.to_wire())


def records(zone: dict[str, list[str]], ttl: int = 60, minimum: int | None = None) -> Answer:
    """Answers as a server for these names would; `minimum` puts a SOA into negative answers."""

    def answer(query: dns.message.Message) -> list[dns.message.Message]:
        question = query.question[0]
        name = question.name.to_text(omit_final_dot=True)
        reply = dns.message.make_response(query)
        version = 4 if question.rdtype == dns.rdatatype.A else 6
        found = [text for text in zone.get(name, ()) if ip_address(text).version == version]
        if found:
            reply.answer.append(dns.rrset.from_text(question.name, ttl, "IN", question.rdtype, *found))
        elif name not in zone:
            reply.set_rcode(dns.rcode.NXDOMAIN)
        if not found and minimum is not None:
            soa = f"ns.test. admin.test. 1 2 3 4 {minimum}"
            reply.authority.append(dns.rrset.from_text("test.", 3600, "IN", "SOA", soa))
        return [reply]

    return answer


def silence(query: dns.message.Message) -> list[bytes]:
    return []


def dead_or(answer: Answer) -> Answer:
    """Names that begin with "dead" get no answer."""
    return lambda query: [] if query.question[0].name.to_text().startswith("dead") else answer(query)


def refusal(query: dns.message.Message, rcode: dns.rcode.Rcode = dns.rcode.SERVFAIL) -> list[dns.message.Message]:
    reply = dns.message.make_response(query)
    reply.set_rcode(rcode)
    return [reply]


async def cause_of_failure(resolver: Resolver, name: str) -> str:
    with pytest.raises(ResolveError) as caught:
        await resolver.resolve(name)
    assert caught.value.name == name
    return caught.value.cause


async def test_families_in_turn_and_then_from_the_cache(place: Place) -> None:
    zone = ["192.0.2.1", "192.0.2.2", "192.0.2.3", "2001:db8::1"]
    server, resolver = await place.serving(records({"www.test": zone}))
    expected = addresses("2001:db8::1", "192.0.2.1", "192.0.2.2", "192.0.2.3")
    assert resolver.cached("www.test") is None
    assert await resolver.resolve("www.test") == expected
    assert resolver.cached("www.test") == expected
    assert await resolver.resolve("WWW.Test.") == expected
    assert resolver.cached("WWW.Test.") == expected
    assert server.asked == {("www.test", "A"): 1, ("www.test", "AAAA"): 1}


async def test_a_ttl_is_respected_and_kept_within_bounds(place: Place) -> None:
    server, resolver = await place.serving(
        records({"www.test": ["192.0.2.1"], "a.test": ["192.0.2.1"]}, ttl=60, minimum=900)
    )
    await resolver.resolve("www.test")
    place.clock.now += 59
    assert resolver.cached("www.test")
    place.clock.now += 2
    assert resolver.cached("www.test") is None
    await resolver.resolve("www.test")
    assert server.asked["www.test", "A"] == 2
    server.answer = records({"zero.test": ["192.0.2.1", "2001:db8::1"]}, ttl=0)
    await resolver.resolve("zero.test")
    place.clock.now += 4
    assert resolver.cached("zero.test")
    place.clock.now += 2
    assert resolver.cached("zero.test") is None
    server.answer = records({"long.test": ["192.0.2.1", "2001:db8::1"]}, ttl=10**6)
    await resolver.resolve("long.test")
    place.clock.now += 3601
    assert resolver.cached("long.test") is None


async def test_the_ttl_of_a_cname_counts(place: Place) -> None:
    def answer(query: dns.message.Message) -> list[dns.message.Message]:
        question = query.question[0]
        reply = dns.message.make_response(query)
        reply.answer.append(dns.rrset.from_text(question.name, 10, "IN", "CNAME", "target.test."))
        text = "192.0.2.1" if question.rdtype == dns.rdatatype.A else "2001:db8::1"
        reply.answer.append(dns.rrset.from_text("target.test.", 600, "IN", question.rdtype, text))
        return [reply]

    _, resolver = await place.serving(answer)
    assert await resolver.resolve("alias.test") == addresses("2001:db8::1", "192.0.2.1")
    place.clock.now += 11
    assert resolver.cached("alias.test") is None


async def test_absence_is_remembered_as_long_as_the_soa_says(place: Place) -> None:
    server, resolver = await place.serving(records({"empty.test": []}, minimum=30))
    for name, cause in (("none.test", "no such name"), ("empty.test", "no address")):
        assert await cause_of_failure(resolver, name) == cause
        place.clock.now += 29
        assert await cause_of_failure(resolver, name) == cause
        assert server.asked[name, "A"] == 1
        with pytest.raises(ResolveError, match=cause):
            resolver.cached(name)
        place.clock.now += 2
        assert await cause_of_failure(resolver, name) == cause
        assert server.asked[name, "A"] == 2


async def test_an_absence_without_a_soa_is_hardly_kept(place: Place) -> None:
    """RFC 2308 section 5: without a SOA it is not to be cached."""
    server, resolver = await place.serving(records({"empty.test": []}))
    for name in ("none.test", "empty.test"):
        await cause_of_failure(resolver, name)
        place.clock.now += 6
        await cause_of_failure(resolver, name)
        assert server.asked[name, "A"] == 2
    # Beside addresses it is: else names without IPv6 would be asked for all the time.
    server.answer = records({"four.test": ["192.0.2.1"]})
    await resolver.resolve("four.test")
    place.clock.now += 59
    assert resolver.cached("four.test")


async def test_hosts_localhost_and_literals_are_never_asked_for(place: Place) -> None:
    place.hosts.write_text(
        "# comment\n192.0.2.9 Build.Example. build # alias\n2001:db8::9\tbuild.example\n"
        "127.0.0.1 localhost\nnonsense here\n192.0.2.10\n192.0.2.11 bad..name good.example\n192.0.2 www.test\n"
    )
    server, resolver = await place.serving(records({}))
    assert resolver.cached("build.example") == addresses("2001:db8::9", "192.0.2.9")
    assert resolver.cached("build") == addresses("192.0.2.9")
    assert resolver.cached("good.example") == addresses("192.0.2.11")
    assert resolver.cached("www.test") is None
    for name in ("localhost", "LOCALHOST.", "app.localhost"):
        assert await resolver.resolve(name) == addresses("::1", "127.0.0.1")
    for text, literal in (("192.0.2.1", "192.0.2.1"), ("0x7f.1", "127.0.0.1"), ("[::1]", "::1"), ("::1", "::1")):
        assert await resolver.resolve(text) == addresses(literal)
    for text in ("1.2.3.4.5", "256.1.1.1", "", "a..b", "a b"):
        assert await cause_of_failure(resolver, text) == "not a host name"
    assert not server.asked


async def test_files_are_read_again_when_they_change(place: Place) -> None:
    old, new = (
        await place.server(records({"www.test": ["192.0.2.1"]})),
        await place.server(records({"www.test": ["192.0.2.2"]})),
    )
    place.hosts.write_text("192.0.2.9 build\n")
    place.resolv_conf.write_text("nameserver 127.0.0.1\n")
    resolver = await place.resolver(port=old.endpoint.port)
    assert await resolver.resolve("www.test") == addresses("192.0.2.1")
    # replaced by another file, as editors and DHCP clients do
    for file, text in ((place.hosts, "192.0.2.10 build\n"), (place.resolv_conf, "nameserver 127.0.0.1\nsearch x\n")):
        draft = file.with_suffix(".new")
        draft.write_text(text)
        os.replace(draft, file)
    assert resolver.cached("www.test")  # looked at once a second at most
    place.clock.now += 1
    assert resolver.cached("build") == addresses("192.0.2.10")
    assert resolver.cached("www.test") is None
    assert resolver.full_names("www") == ("www.x", "www")
    place.hosts.unlink()
    place.clock.now += 1
    assert resolver.cached("build") is None
    assert not new.asked


async def test_while_a_file_cannot_be_read_its_old_contents_stay(
    place: Place, caplog: pytest.LogCaptureFixture
) -> None:
    place.hosts.write_text("192.0.2.9 build\n")
    resolver = await place.resolver((await place.server(records({}))).endpoint)
    place.hosts.write_text("192.0.2.10 build again\n")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, hard))  # no descriptor is left in the moment of the change
    try:
        for _ in range(2):
            place.clock.now += 1
            assert resolver.cached("build") == addresses("192.0.2.9")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert len(caplog.records) == 1
    place.clock.now += 1
    assert resolver.cached("build") == addresses("192.0.2.10")


async def test_a_line_of_resolv_conf_that_is_wrong_does_not_cost_the_others(
    place: Place, caplog: pytest.LogCaptureFixture
) -> None:
    server = await place.server(records({"www.lab.test": ["192.0.2.1"]}))
    text = b"search a..b\nsearch lab.test\nnameserver \xff\nnameserver https://dns.example/\nnameserver 127.0.0.1\n"
    place.resolv_conf.write_bytes(text + b"options timeout:0\n")
    resolver = await place.resolver(port=server.endpoint.port)
    assert await resolver.search("www") == addresses("192.0.2.1")
    assert len(caplog.records) == 2


def test_an_address_is_no_search_domain() -> None:
    conf = parse("search 10.0.0.1 lab.test ::1 0x7f.1\n")
    assert conf.search == ("lab.test",)
    assert [line for line, _ in conf.faults] == ["search 10.0.0.1", "search ::1", "search 0x7f.1"]


async def test_search_domains(place: Place) -> None:
    place.resolv_conf.write_text("search corp.test lab.test\noptions ndots:2\n")
    zone = {"www.lab.test": ["192.0.2.1"], "a.b": ["192.0.2.2"], "x.y.z": ["192.0.2.3"], "empty.corp.test": []}
    server, resolver = await place.serving(records(zone | {"empty.lab.test": ["192.0.2.4"], "none": []}))
    assert await resolver.search("www") == addresses("192.0.2.1")
    assert ("www.corp.test", "A") in server.asked
    assert ("www", "A") not in server.asked
    assert await resolver.search("a.b") == addresses("192.0.2.2")
    assert ("a.b.corp.test", "A") in server.asked
    assert await resolver.search("x.y.z") == addresses("192.0.2.3")
    assert ("x.y.z.corp.test", "A") not in server.asked
    assert await resolver.search("empty") == addresses("192.0.2.4")
    for text, cause in (("nowhere", "no such name"), ("none", "no address"), ("a b", "not a host name")):
        with pytest.raises(ResolveError) as caught:
            await resolver.search(text)
        assert (caught.value.name, caught.value.cause) == (text, cause)
    # A name is queried only as given, without search domains.
    server.asked.clear()
    assert await cause_of_failure(resolver, "www") == "no such name"
    assert set(server.asked) == {("www", "A"), ("www", "AAAA")}


async def test_a_failure_ends_the_search(place: Place) -> None:
    """Else a name would mean another host for as long as a server is in trouble."""
    place.resolv_conf.write_text("search corp.test lab.test\n")

    def answer(query: dns.message.Message) -> Sequence[dns.message.Message | bytes]:
        if query.question[0].name.to_text().endswith(".corp.test."):
            return refusal(query)
        return records({"www.lab.test": ["203.0.113.66"]})(query)

    _server, resolver = await place.serving(answer)
    with pytest.raises(ResolveError) as caught:
        await resolver.search("www")
    assert (caught.value.name, caught.value.cause) == ("www", "servers failed")


async def test_both_families_are_of_one_name(place: Place) -> None:
    """Each searched for by itself, this name would be two hosts."""
    place.resolv_conf.write_text("search corp.test lab.test\n")
    truth = records({"www.corp.test": ["192.0.2.1"], "www.lab.test": ["203.0.113.66", "2001:db8::66"]})

    def answer(query: dns.message.Message) -> Sequence[dns.message.Message | bytes]:
        question = query.question[0]
        # There are servers that say so of names which have no AAAA record.
        if question.name.to_text() == "www.corp.test." and question.rdtype == dns.rdatatype.AAAA:
            return refusal(query, dns.rcode.NXDOMAIN)
        return truth(query)

    _, resolver = await place.serving(answer)
    assert await resolver.search("www") == addresses("192.0.2.1")


@pytest.mark.parametrize(
    ("resolv_conf", "text", "names"),
    [
        ("", "www", ["www"]),
        ("search corp.test lab.test", "www", ["www.corp.test", "www.lab.test", "www"]),
        ("search corp.test lab.test", "WWW", ["www.corp.test", "www.lab.test", "www"]),
        ("search corp.test lab.test", "a.b", ["a.b", "a.b.corp.test", "a.b.lab.test"]),
        ("search corp.test\noptions ndots:5", "a.b", ["a.b.corp.test", "a.b"]),
        ("search corp.test\noptions ndots:0", "www", ["www", "www.corp.test"]),
        (
            "search corp.test\noptions ndots:99",
            ".".join("a" * 16),
            [".".join("a" * 16), ".".join("a" * 16) + ".corp.test"],
        ),
        ("domain corp.test", "www", ["www.corp.test", "www"]),
        ("search one.test\nsearch two.test two.test", "www", ["www.two.test", "www"]),
        ("search . a..b Bad!name Corp.TEST.", "www", ["www.corp.test", "www"]),
        ("search corp.test", "www.", ["www"]),
        ("search corp.test", "a.b.", ["a.b"]),
        ("search corp.test", "www\u3002", ["www"]),
        ("search corp.test", "www\uff0e", ["www"]),
        ("search corp.test", "www\uff61", ["www"]),
        ("search corp.test", "localhost", ["localhost"]),
        ("search corp.test", "app.localhost", ["app.localhost"]),
        ("search corp.test", "build", ["build"]),  # in the hosts file
        ("search corp.test", "127.1", ["127.0.0.1"]),
        ("search corp.test", "a" * 63, ["a" * 63 + ".corp.test", "a" * 63]),
        (
            "search corp.test",
            ".".join(["a" * 61] * 4),
            [".".join(["a" * 61] * 4)],
        ),  # one with the domain would be too long
    ],
)
async def test_the_names_that_a_name_may_stand_for(place: Place, resolv_conf: str, text: str, names: list[str]) -> None:
    place.resolv_conf.write_text(f"nameserver 192.0.2.53\n{resolv_conf}\n")
    place.hosts.write_text("192.0.2.9 build\n")
    resolver = await place.resolver(hostname=lambda: "host")
    assert list(resolver.full_names(text)) == names


async def test_the_domain_of_the_host_is_the_one_to_search(place: Place) -> None:
    resolver = await place.resolver(hostname=lambda: "host.corp.test")
    assert resolver.full_names("www") == ("www.corp.test", "www")
    place.resolv_conf.write_text("search lab.test\n")
    place.clock.now += 1
    assert resolver.full_names("www") == ("www.lab.test", "www")
    with pytest.raises(ValueError, match="not a host name"):
        resolver.full_names("a..b")


async def test_askers_of_one_name_share_a_query_and_survive_each_other(place: Place) -> None:
    server = await place.server(records({"www.test": ["192.0.2.1", "2001:db8::1"]}))
    server.released = trio.Event()
    resolver = await place.resolver(server.endpoint)
    got: list[tuple[IPAddress, ...]] = []

    async def ask(scope: trio.CancelScope) -> None:
        with scope:
            got.append(await resolver.resolve("www.test"))

    scopes = [trio.CancelScope() for _ in range(20)]
    async with trio.open_nursery() as nursery:
        for scope in scopes:
            nursery.start_soon(ask, scope)
        await server.got_query.wait()
        scopes[0].cancel()  # the one that came first gives up
        scopes[7].cancel()
        await trio.testing.wait_all_tasks_blocked()
        server.released.set()
    assert got == [addresses("2001:db8::1", "192.0.2.1")] * 18
    assert server.asked == {("www.test", "A"): 1, ("www.test", "AAAA"): 1}


async def test_the_last_asker_gone_ends_the_query(place: Place) -> None:
    server, resolver = await place.serving(silence)
    assert resolver._nursery is not None
    async with trio.open_nursery() as nursery:
        nursery.start_soon(resolver.resolve, "www.test")
        await server.got_query.wait()
        assert resolver._nursery.child_tasks
        nursery.cancel_scope.cancel()
    await trio.testing.wait_all_tasks_blocked()
    assert not resolver._nursery.child_tasks
    assert not resolver._queries
    server.answer = records({"www.test": ["192.0.2.1"]})
    assert await resolver.resolve("www.test") == addresses("192.0.2.1")


async def test_a_server_that_never_answers_costs_the_deadline_and_nothing_else(place: Place) -> None:
    server, resolver = await place.serving(dead_or(records({"www.test": ["192.0.2.1", "2001:db8::1"]})), lifetime=0.3)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(cause_of_failure, resolver, "dead1.test")
        nursery.start_soon(cause_of_failure, resolver, "dead2.test")
        assert len(await resolver.resolve("www.test")) == 2
    asked = server.asked["dead1.test", "A"]
    assert await cause_of_failure(resolver, "dead1.test") == "timed out"
    assert server.asked["dead1.test", "A"] == asked  # a failure is remembered, shortly
    place.clock.now += 2
    assert await cause_of_failure(resolver, "dead1.test") == "timed out"
    assert server.asked["dead1.test", "A"] > asked
    with trio.move_on_after(0.05) as scope:  # the asker's own deadline is the shorter one
        await resolver.resolve("dead3.test")
    assert scope.cancelled_caught


async def test_the_next_server_is_asked(place: Place, autojump_clock: MockClock) -> None:
    place.resolv_conf.write_text("options timeout:1\n")
    good = await place.server(records({"www.test": ["192.0.2.1"]}))
    for bad in (refusal, lambda query: refusal(query, dns.rcode.REFUSED), silence):
        server = await place.server(bad)
        resolver = await place.resolver(server.endpoint, good.endpoint)
        assert await resolver.resolve("www.test") == addresses("192.0.2.1")


async def test_a_server_that_is_dead_is_asked_last_for_a_while(place: Place, autojump_clock: MockClock) -> None:
    place.resolv_conf.write_text("options timeout:1\n")
    truth = records({f"{name}.test": ["192.0.2.1", "2001:db8::1"] for name in "abcde"})
    dead, good = await place.server(silence), await place.server(truth)
    resolver = await place.resolver(dead.endpoint, good.endpoint)
    await resolver.resolve("a.test")
    assert dead.asked == {("a.test", "A"): 1, ("a.test", "AAAA"): 1}
    dead.asked.clear()
    with trio.fail_after(0.9):  # nobody waits for it any more
        await resolver.resolve("b.test")
    assert not dead.asked
    # A while later one query finds out whether it is back. It is not.
    place.clock.now += 31
    await resolver.resolve("c.test")
    assert dead.asked.total() == 2
    # And then it is: the first is the first again.
    place.clock.now += 31
    dead.answer = truth
    await resolver.resolve("d.test")
    assert dead.asked.total() == 4
    good.asked.clear()
    await resolver.resolve("e.test")
    assert not good.asked


async def test_a_server_that_leaves_some_queries_unanswered_is_not_dead(place: Place) -> None:
    """As for a zone far away. Queries for its names do not change the order of servers for others."""
    place.resolv_conf.write_text("options timeout:1\n")

    zone = {"www.test": ["192.0.2.1"], "web.test": ["192.0.2.2"]}
    first, second = await place.server(dead_or(records(zone))), await place.server(records({}))
    resolver = await place.resolver(first.endpoint, second.endpoint)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(cause_of_failure, resolver, "dead.test")
        await first.got_query.wait()
        assert await resolver.resolve("www.test") == addresses("192.0.2.1")
    assert await resolver.resolve("web.test") == addresses("192.0.2.2")


async def test_one_bad_moment_has_no_lasting_effect(place: Place, autojump_clock: MockClock) -> None:
    truth = records({f"{name}.test": ["192.0.2.1", "2001:db8::1"] for name in "abcd"})
    first, second = await place.server(silence), await place.server(truth)
    resolver = await place.resolver(first.endpoint, second.endpoint)
    await resolver.resolve("a.test")
    first.answer = truth
    second.asked.clear()
    place.clock.now += 2.1
    await resolver.resolve("b.test")
    assert not second.asked
    # In vain again and again, it is tried less and less often.
    first.answer = silence
    for seconds in (0.0, 2.1, 4.1, 8.1):
        place.clock.now += seconds
        first.asked.clear()
        await resolver.resolve("c.test")
        assert first.asked
        resolver._cache.clear()
        place.clock.now += seconds
        first.asked.clear()
        await resolver.resolve("d.test")
        assert not first.asked
        resolver._cache.clear()


@pytest.mark.parametrize("options", ["", "options timeout:1 attempts:5", "options timeout:5 attempts:1"])
async def test_a_server_that_takes_its_time(place: Place, autojump_clock: MockClock, options: str) -> None:
    """Whether it is the only server, or the next one has been asked meanwhile and is silent."""
    place.resolv_conf.write_text(options)

    async def think(*_: object) -> None:
        await trio.sleep(2)

    slow, silent = await place.server(records({"www.test": ["192.0.2.1", "2001:db8::1"]})), await place.server(silence)
    slow.before = think
    for servers in ((slow.endpoint,), (slow.endpoint, silent.endpoint), (silent.endpoint, slow.endpoint)):
        resolver = await place.resolver(*servers, lifetime=None)
        assert await resolver.resolve("www.test") == addresses("2001:db8::1", "192.0.2.1")


@pytest.mark.parametrize(
    ("options", "seconds"), [("", 10), ("options timeout:1 attempts:1", 1), ("options timeout:99 attempts:9", 150)]
)
async def test_how_long_servers_are_waited_for(
    place: Place, autojump_clock: MockClock, options: str, seconds: float
) -> None:
    place.resolv_conf.write_text(options)
    server, resolver = await place.serving(silence, lifetime=None)
    began = trio.current_time()
    assert await cause_of_failure(resolver, "www.test") == "timed out"
    assert trio.current_time() - began == pytest.approx(seconds)
    # After 1 s, 2 s, 4 s, ...: a packet may have been lost.
    assert server.asked["www.test", "A"] == {10: 4, 1: 1, 150: 8}[int(seconds)]


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "::1%lo"])
async def test_how_a_name_server_may_be_written(place: Place, host: str) -> None:
    """The unspecified address is this host, as to the C library, and a link-local one has its interface behind it."""
    async with trio.open_nursery() as nursery:
        server = Server(records({"www.test": ["192.0.2.1", "2001:db8::1"]}), "::1" if ":" in host else "127.0.0.1")
        await nursery.start(server.serve)
        place.resolv_conf.write_text(f"nameserver {host}\n")
        resolver = await place.resolver(port=server.endpoint.port)
        assert await resolver.resolve("www.test") == addresses("2001:db8::1", "192.0.2.1")
        nursery.cancel_scope.cancel()


async def test_an_impossible_server_is_recorded_once(place: Place, caplog: pytest.LogCaptureFixture) -> None:
    good = await place.server(records({"www.test": ["192.0.2.1"], "web.test": ["192.0.2.1"]}))
    resolver = await place.resolver(HostPort("fe80::1", 53), good.endpoint)
    for name in ("www.test", "web.test"):
        assert await resolver.resolve(name) == addresses("192.0.2.1")
    assert [record.message for record in caplog.records] == ["name server can't be used"]
    assert set(good.asked.values()) == {1}


async def test_the_cache_is_bounded(place: Place) -> None:
    """Names without an address do not push out those that have one, and the addresses of a name are limited."""
    zone = {f"{n}.test": ["192.0.2.1", "192.0.2.2", "2001:db8::1", "2001:db8::2"] for n in range(10)}
    _, resolver = await place.serving(records(zone, minimum=60), most=Most(names=3, absent=2, addresses=3))
    for n in range(10):
        assert await resolver.resolve(f"{n}.test") == addresses("2001:db8::1", "192.0.2.1", "2001:db8::2")
        await cause_of_failure(resolver, f"none{n}.test")
    assert sorted(resolver._cache) == ["7.test", "8.test", "9.test"]
    assert sorted(resolver._failures) == ["none8.test", "none9.test"]


async def test_one_client_s_names_do_not_hold_up_another_s(place: Place) -> None:
    _, resolver = await place.serving(
        dead_or(records({"www.test": ["192.0.2.1"]})), sockets=8, lifetime=60, most=Most(waiting=50)
    )
    refused = 0

    async def ask(name: str) -> None:
        nonlocal refused
        try:
            await resolver.resolve(name, "192.0.2.66")
        except ResolveError as error:
            refused += error.cause == "too many names are asked for"

    async with trio.open_nursery() as nursery:
        for number in range(500):
            nursery.start_soon(ask, f"dead{number}.test")
        await trio.testing.wait_all_tasks_blocked()
        assert refused == 500 - 4 - 50
        with trio.fail_after(3):
            assert await resolver.resolve("www.test", "192.0.2.1") == addresses("192.0.2.1")
        # Refused names were not queried, so nothing is cached for them.
        assert "too many names are asked for" not in {entry.cause for entry in resolver._failures.values()}
        nursery.cancel_scope.cancel()


async def test_where_no_server_listens_the_next_is_asked_at_once(place: Place) -> None:
    good = await place.server(records({"www.test": ["192.0.2.1"]}))
    with socket.socket(type=socket.SOCK_DGRAM) as closed:
        closed.bind(("127.0.0.1", 0))
        nobody = HostPort("127.0.0.1", closed.getsockname()[1])
    with trio.fail_after(0.9):
        resolver = await place.resolver(nobody, good.endpoint)
        assert await resolver.resolve("www.test") == addresses("192.0.2.1")
        resolver = await place.resolver(nobody)
        assert await cause_of_failure(resolver, "www.test") == "servers failed"


@pytest.mark.parametrize("rcode", [dns.rcode.FORMERR, dns.rcode.NOTIMP])
async def test_a_server_that_takes_no_edns(place: Place, rcode: dns.rcode.Rcode) -> None:
    def answer(query: dns.message.Message) -> Sequence[dns.message.Message | bytes]:
        if query.edns >= 0:
            reply = refusal(query, rcode)[0]
            reply.use_edns(False)
            reply.question.clear()  # it has not looked so far
            return [reply]
        return records({"www.test": ["192.0.2.1"], "web.test": ["192.0.2.2"]})(query)

    server, resolver = await place.serving(answer)
    assert await resolver.resolve("www.test") == addresses("192.0.2.1")
    server.asked.clear()
    assert await resolver.resolve("web.test") == addresses("192.0.2.2")
    assert server.asked["web.test", "A"] == 1  # remembered


@pytest.mark.parametrize("cut", [False, True])
async def test_truncated_answers_are_asked_for_again_over_tcp(place: Place, cut: bool) -> None:
    """Also those that end in the middle of a record, as some forwarders send them."""

    def answer(query: dns.message.Message) -> list[bytes]:
        reply = (
            records({"big.test": ["192.0.2.9", "2001:db8::9"]})(query)[0] if cut else dns.message.make_response(query)
        )
        assert isinstance(reply, dns.message.Message)
        reply.flags |= dns.flags.TC
        wire = reply.to_wire()
        return [wire[:-13] if cut else wire]  # without its OPT and 2 bytes

    server, resolver = await place.serving(answer)
    assert await resolver.resolve("big.test") == addresses("192.0.2.1")
    assert server.over_tcp == 2


async def test_a_repeated_truncated_answer_is_no_answer(place: Place, autojump_clock: MockClock) -> None:
    """It is queried over TCP, where no answer comes, and meanwhile once more over UDP."""

    def answer(query: dns.message.Message) -> list[dns.message.Message]:
        reply = dns.message.make_response(query)
        reply.flags |= dns.flags.TC
        return [reply]

    server, resolver = await place.serving(answer, lifetime=4.0)
    server.silent_over_tcp = True
    assert await cause_of_failure(resolver, "big.test") == "timed out"
    assert server.asked["big.test", "A"] > 1


@pytest.mark.parametrize("truth_follows", [True, False])
async def test_lies_about_the_question_are_not_believed(place: Place, truth_follows: bool) -> None:
    truth = records({"www.test": ["192.0.2.1", "2001:db8::1"]})

    def answer(query: dns.message.Message) -> list[dns.message.Message | bytes]:
        other_id = records({"www.test": ["203.0.113.66", "2001:db8::66"]})(query)[0]
        assert isinstance(other_id, dns.message.Message)
        other_id.id = query.id ^ 1
        other_name = dns.message.make_query("evil.test", query.question[0].rdtype, id=query.id)
        other_question = records({"evil.test": ["203.0.113.66", "2001:db8::66"]})(other_name)[0]
        no_answer = query.to_wire()  # the query itself, not a response
        return [other_id, other_question, no_answer, b"\x00garbage", *(truth(query) if truth_follows else ())]

    _, resolver = await place.serving(answer, lifetime=5.0 if truth_follows else 0.3)
    if truth_follows:
        assert await resolver.resolve("www.test") == addresses("2001:db8::1", "192.0.2.1")
    else:
        assert await cause_of_failure(resolver, "www.test") == "timed out"


async def test_an_answer_from_another_address_is_ignored(place: Place) -> None:
    truth = records({"www.test": ["192.0.2.1", "2001:db8::1"]})
    lie = records({"www.test": ["203.0.113.66", "2001:db8::66"]})
    server = await place.server(truth)
    with trio.socket.socket(type=socket.SOCK_DGRAM) as other:
        await other.bind(("127.0.0.2", 0))  # another port is another address, too
        server.before = lambda query, client: other.sendto(lie(query)[0].to_wire(), client)  # type: ignore[union-attr]
        resolver = await place.resolver(server.endpoint)
        assert await resolver.resolve("www.test") == addresses("2001:db8::1", "192.0.2.1")
        assert server.lies == 2


async def test_chains_and_loops_of_cnames(place: Place) -> None:
    """Followed as far as the answer goes: a recursive server puts the whole chain into it."""

    def answer(query: dns.message.Message) -> list[dns.message.Message]:
        question = query.question[0]
        first, *_ = question.name.to_text().split(".")
        links = {"chain": 10, "long": 30, "loop": 0, "self": 0, "open": 2}[first]
        reply = dns.message.make_response(query)
        names = [question.name.to_text(), *(f"{first}{n}.test." for n in range(links))]
        if first == "loop":
            names = ["loop.test.", "pool.test.", "loop.test."]
        elif first == "self":
            names = ["self.test.", "self.test."]
        for name, target in pairwise(names):
            reply.answer.append(dns.rrset.from_text(name, 60, "IN", "CNAME", target))
        if first in {"chain", "long"}:
            text = "192.0.2.1" if question.rdtype == dns.rdatatype.A else "2001:db8::1"
            reply.answer.append(dns.rrset.from_text(names[-1], 60, "IN", question.rdtype, text))
        return [reply]

    _server, resolver = await place.serving(answer)
    assert await resolver.resolve("chain.test") == addresses("2001:db8::1", "192.0.2.1")
    assert await cause_of_failure(resolver, "open.test") == "no address"
    for endless in ("long.test", "loop.test", "self.test"):
        assert await cause_of_failure(resolver, endless) == "servers failed"


async def test_sockets_are_bounded_and_names_wait_for_them(place: Place) -> None:
    server, resolver = await place.serving(dead_or(records({"www.test": ["192.0.2.1", "2001:db8::1"]})), sockets=2)
    before = len(os.listdir("/proc/self/fd"))
    with trio.fail_after(2):  # the lifetime is 5 s
        async with trio.open_nursery() as nursery:
            scopes = [trio.CancelScope() for _ in range(20)]

            async def ask(number: int) -> None:
                with scopes[number]:
                    await cause_of_failure(resolver, f"dead{number}.test")

            for number in range(20):
                nursery.start_soon(ask, number)
            await server.got_query.wait()
            await trio.testing.wait_all_tasks_blocked()
            assert len(os.listdir("/proc/self/fd")) == before + 1
            for scope in scopes:
                scope.cancel()
            assert len(await resolver.resolve("www.test")) == 2


async def test_sockets_are_bounded_with_any_number_of_servers(place: Place, autojump_clock: MockClock) -> None:
    silent = [(await place.server(silence)).endpoint for _ in range(4)]
    resolver = await place.resolver(*silent, sockets=16, lifetime=60)
    before = most = len(os.listdir("/proc/self/fd"))
    async with trio.open_nursery() as nursery:
        for number in range(8):
            nursery.start_soon(cause_of_failure, resolver, f"dead{number}.test")
        for _ in range(40):
            await trio.sleep(0.25)
            most = max(most, len(os.listdir("/proc/self/fd")))
        nursery.cancel_scope.cancel()
    # Each name has four at a time, one of which its session does not use meanwhile.
    assert before + 4 <= most <= before + 16 // 2 + 16 // 8


async def test_names_without_an_answer_give_way(place: Place, autojump_clock: MockClock) -> None:
    """However many they are, and with much more time to live than anybody waits for an answer."""

    server, resolver = await place.serving(
        dead_or(records({"www.test": ["192.0.2.1"], "web.test": ["192.0.2.2"]})), sockets=4, lifetime=60
    )
    async with trio.open_nursery() as nursery:
        for number in range(20):
            nursery.start_soon(cause_of_failure, resolver, f"dead{number}.test")
        await server.got_query.wait()
        await trio.testing.wait_all_tasks_blocked()
        with trio.fail_after(3):
            assert await resolver.resolve("www.test") == addresses("192.0.2.1")
            assert await resolver.resolve("web.test") == addresses("192.0.2.2")
        nursery.cancel_scope.cancel()
    await trio.testing.wait_all_tasks_blocked()
    assert resolver._turns._free == 2


async def test_an_answer_about_another_name_is_no_answer(place: Place) -> None:
    def answer(query: dns.message.Message) -> list[dns.message.Message]:
        reply = dns.message.make_response(query)
        kind = query.question[0].rdtype
        text = "203.0.113.66" if kind == dns.rdatatype.A else "2001:db8::66"
        reply.answer.append(dns.rrset.from_text("evil.test.", 60, "IN", kind, text))
        return [reply]

    _, resolver = await place.serving(answer)
    assert await cause_of_failure(resolver, "www.test") == "no address"


@pytest.mark.parametrize("address", ["192.0.2.1", "2001:db8::1"])
async def test_with_one_family_nobody_waits_for_a_server_that_drops_the_other(place: Place, address: str) -> None:
    kind = dns.rdatatype.A if "." in address else dns.rdatatype.AAAA

    def answer(query: dns.message.Message) -> Sequence[dns.message.Message | bytes]:
        return records({"www.test": [address]}, ttl=600)(query) if query.question[0].rdtype == kind else []

    _, resolver = await place.serving(answer, lifetime=60.0)
    with trio.fail_after(5):
        assert await resolver.resolve("www.test") == addresses(address)
    place.clock.now += 9
    assert resolver.cached("www.test") == addresses(address)
    place.clock.now += 2  # less than the TTL, since the other family may come back
    assert resolver.cached("www.test") is None


async def test_mapped_addresses_are_ipv4(place: Place) -> None:
    _, resolver = await place.serving(records({"www.test": ["::ffff:127.0.0.1", "127.0.0.1"]}))
    assert await resolver.resolve("www.test") == addresses("127.0.0.1")


async def test_a_fault_of_one_query_is_not_that_of_others(
    place: Place, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    _, resolver = await place.serving(records({"www.test": ["192.0.2.1"]}))

    async def broken(*_: object, **__: object) -> None:
        raise KeyError("bug")

    with monkeypatch.context() as patch:
        patch.setattr(resolver._servers, "ask", broken)
        assert await cause_of_failure(resolver, "bug.test") == "servers failed"
    assert "resolver failed" in caplog.text
    assert await resolver.resolve("www.test") == addresses("192.0.2.1")


async def test_stopping_the_resolver_wakes_the_askers(tmp_path: Path, place: Place) -> None:
    server = await place.server(silence)
    resolver = Resolver([server.endpoint], Metrics("test"), hosts=tmp_path / "none", resolv_conf=tmp_path / "none")
    async with trio.open_nursery() as asker, trio.open_nursery() as nursery:
        await nursery.start(resolver.run)
        asker.start_soon(cause_of_failure, resolver, "www.test")
        await server.got_query.wait()
        nursery.cancel_scope.cancel()
