"""Recorded requests decided again: what is read from a record, what differs, and what stays unknown."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from datetime import datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from usocksd.clients import TRUSTED, ClientRules
from usocksd.config import UsocksdConfig
from usocksd.decision import Policy
from usocksd.log.formats import FORMATS, Severity
from usocksd.records import AccessRecord, RecordedRequest, Skipped, lines_of, read_record
from usocksd.replay import Change, Replay, compare, judge
from usocksd.settings import loader as configuration

AT = "2026-11-23T09:47:58.777489Z"
BOTH = ("203.0.113.5", "2001:db8::5")


def policy(text: str = "", users: Sequence[str] | None = None, *, required: bool = False) -> Policy:
    """`text` is a configuration; this host has the address 198.51.100.1."""
    config = configuration.parse(UsocksdConfig, text, "test")
    rules = config.access_rules(lambda ip: str(ip) == "198.51.100.1")
    clients = ClientRules(config.incoming.allow_from or ())
    in_front = config.incoming.proxy_protocol
    trusted = None if in_front is None else ClientRules(in_front.trusted)
    return Policy(clients, rules, None if users is None else frozenset(users), required, trusted)


def fields(**changes: Any) -> dict[str, Any]:
    """Those of a record of a request for www.example.com; `...` leaves one out."""
    record = {
        "type": "access",
        "client_addr": "10.1.2.3:40000",
        "dest_host": "www.example.com",
        "dest_port": 443,
        "dest_addr": "203.0.113.5:443",
        "user": None,
        "rule": "default",
        "candidates": ["203.0.113.5 allowed default", "2001:db8::5 denied some rule"],
    }
    return {key: value for key, value in (record | changes).items() if value is not ...}


def line(message: str = "proxy starts", **changes: Any) -> bytes:
    """The record in JSON."""
    head = {"topic": "usocksd", "logged_at": AT, "severity": "info", "utsname": "vm", "message": message}
    record = fields(**(head | changes))
    return json.dumps(record, separators=(",", ":")).encode()


def lines(message: str = "proxy starts", **changes: Any) -> list[bytes]:
    """The record in each format, as the daemon writes it."""
    moment, record = datetime.fromisoformat(AT).timestamp(), fields(**changes)
    return [
        FORMATS[name]("usocksd", "vm").format(moment, Severity.INFO, message, record)
        for name in ("plain", "logfmt", "json")
    ]


def request(
    host: str | None = "www.example.com", candidates: Sequence[str] | None = ("203.0.113.5",), **more: Any
) -> RecordedRequest:
    known = None if candidates is None else tuple(candidates)
    values: dict[str, Any] = {"client": "10.1.2.3", "user": None, "port": 443, "name": None, "dialled": None}
    return RecordedRequest(host=host, candidates=known, **(values | more))


def recorded(given: bytes) -> RecordedRequest:
    record = read_record(given)
    assert isinstance(record, AccessRecord)
    return record.request


# ---- records

TROUBLE = 'a "b" [203.0.113.9 x=1\\ \n\u2028 {}] \x07=\x1b'


@pytest.mark.parametrize(
    ("message", "changes"),
    [
        ("proxy starts", {}),
        ("proxy starts", {"user": TROUBLE, "rule": TROUBLE, "dest_host": TROUBLE, "dest_name": "www.example.com"}),
        ("proxy starts", {"candidates": [], "dest_addr": None}),
        ("proxy starts", {"candidates": ...}),
        ("proxy starts", {"peer_addr": "[2001:db8::1]:4000", "client_addr": "[2001:db8::2]:4000", "dest_port": 65535}),
        (
            "ruleset mismatch",
            {"candidates": ["203.0.113.5 denied rule 1", '2001:db8::5 denied deny_sites "2001:db8::/32"']},
        ),
        ("dial to destination failed", {"dest_addr": ..., "candidates": ["203.0.113.5 allowed default"]}),
        ("denied access", {"dest_host": ..., "error": "not in allow_from"}),
        ("proxy ends", {"elapsed": 0.002208, "reason": "closed"}),
        ("proxy ends with an error", {}),
        ("handshake failed", {"dest_host": ..., "tried_user": 'info: "proxy ends'}),
        ("addresses of this host changed", {"type": ..., "client_addr": ..., "added": ["203.0.113.5"], "removed": []}),
    ],
)
def test_every_format_is_read_alike(message: str, changes: dict[str, Any]) -> None:
    plain, logfmt, as_json = map(read_record, lines(message, **changes))
    assert as_json is not Skipped.UNREADABLE
    assert plain == logfmt == as_json


@given(st.text(), st.text())
def test_texts_of_clients_read_back_from_every_format(user: str, host: str) -> None:
    plain, logfmt, as_json = map(recorded, lines(user=user, dest_host=host))
    assert plain == logfmt == as_json


@given(
    st.binary(max_size=200) | st.builds(lambda value: json.dumps(value).encode(), st.dictionaries(st.text(), st.text()))
)
def test_any_line_is_read(given: bytes) -> None:
    for before in (b"", b"topic=", b"2026-11-23T09:47:58.777489Z vm usocksd info: "):
        read_record(before + given)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (line(), request(candidates=BOTH, dialled=BOTH[0])),
        (
            line("ruleset mismatch", dest_addr=..., user="ci", dest_name="www.example.com.corp.example"),
            request(candidates=BOTH, user="ci", name="www.example.com.corp.example"),
        ),
        (line(candidates=None, dest_host=BOTH[0]), request(BOTH[0], (), dialled=BOTH[0])),
        # denied before it was resolved
        (line("ruleset mismatch", candidates=..., dest_addr=...), request(candidates=None)),
        # the name had no address
        (line("dial to destination failed", candidates=..., dest_addr=...), request(candidates=())),
        # not let in
        (
            line("denied access", dest_host=..., dest_port=..., dest_addr=..., candidates=...),
            request(None, None, port=0),
        ),
        # named by a proxy, and that proxy's own
        (line(peer_addr="192.0.2.1:5"), request(candidates=BOTH, dialled=BOTH[0], proxy="192.0.2.1")),
        (
            line(peer_addr="10.1.2.3:40000"),
            request(candidates=BOTH, dialled=BOTH[0], proxy="10.1.2.3", local=True),
        ),
        (line(client_addr="[fe80::1%eth0]:4"), request(candidates=BOTH, dialled=BOTH[0], client="fe80::1%eth0")),
    ],
)
def test_what_a_record_says(given: bytes, expected: RecordedRequest) -> None:
    record = read_record(given)
    allowed = not any(message in given for message in (b"ruleset mismatch", b"denied access"))
    assert record == AccessRecord(AT, expected, allowed)


@pytest.mark.parametrize(
    ("given", "skipped"),
    [
        (line("proxy ends"), Skipped.OTHER),
        (json.dumps(json.loads(line("proxy ends with an error"))).encode(), Skipped.OTHER),
        (b'{"message":"listening","address":"127.0.0.1:1080"}', Skipped.OTHER),
        (b"\n", Skipped.OTHER),
        (line("handshake failed", dest_host=..., dest_port=...), Skipped.NO_REQUEST),
        (line("command not supported"), Skipped.NO_REQUEST),
        (b"topic=usocksd type=access message=x", Skipped.OTHER),
        (b"topic=usocksd type=access message=x y", Skipped.UNREADABLE),
        (b"Nov 23 09:47:58 vm usocksd[4711]: from a journal", Skipped.UNREADABLE),
        (b"[1, 2]", Skipped.UNREADABLE),
        (b"[" * 100_000, Skipped.UNREADABLE),
        (line(client_addr="nobody:1"), Skipped.UNREADABLE),
        (line(dest_port="443"), Skipped.UNREADABLE),
        (line(candidates=[1]), Skipped.UNREADABLE),
        (line(candidates="203.0.113.5"), Skipped.UNREADABLE),
        (line(candidates=["nonsense allowed default"]), Skipped.UNREADABLE),
        (line(user=["ci"]), Skipped.UNREADABLE),
        (line(logged_at=...), Skipped.UNREADABLE),
    ],
)
def test_lines_that_say_nothing_about_a_request(given: bytes, skipped: Skipped) -> None:
    assert read_record(given) is skipped


def test_a_request_can_not_pass_for_the_end_of_a_connection() -> None:
    assert recorded(line(dest_host='x","message":"proxy ends')).host == 'x","message":"proxy ends'


def test_lines_without_an_end_come_in_pieces() -> None:
    file = io.BytesIO(b"a" * 25 + b"\nb\n")
    assert list(lines_of(file.readline, 10)) == [b"a" * 10, b"a" * 10, b"a" * 5 + b"\n", b"b\n"]


# ---- differences

NONE = policy()
DENY_NAME = policy('[[rule]]\nname = "no example"\naction = "deny"\nto = [".example.com"]')
DENY_ADDRESS = policy('[[rule]]\nname = "no v4"\naction = "deny"\nto = ["203.0.113.0/24"]')
POOLS = '[[rule]]\nname = "partners"\naction = "allow"\nto = ["{to}"]\negress = "p"\n[egress.p]\nmark = 1\n'
POOL = policy(POOLS.format(to="www.example.com"))
POOL_OF_ADDRESS = policy(POOLS.format(to="2001:db8::/32"))
GATEWAY = "192.0.2.1"
PROXIED = '[incoming.proxy_protocol]\nport = 1090\ntrusted = ["{}"]\n'
TRUSTING = policy(PROXIED.format(GATEWAY))
ONLY_OTHERS = policy('[incoming]\nallow_from = ["192.0.2.9"]\n' + PROXIED.format(GATEWAY))
NOT_CI = policy('[[rule]]\nname = "not ci"\naction = "deny"\nuser = ["ci"]', users=["ci", "bob"])


@pytest.mark.parametrize(
    ("old", "new", "given", "expected"),
    [
        (NONE, DENY_NAME, request(), (Change.DENIED, "default", "no example")),
        (NONE, DENY_NAME, request("WWW.Example.com."), (Change.DENIED, "default", "no example")),
        (NONE, DENY_NAME, request(name="x.example.org", host="x"), None),
        (DENY_NAME, NONE, request(), (Change.ALLOWED, "no example", "default")),
        (DENY_NAME, NONE, request(candidates=None), (Change.UNKNOWN, "no example", "default")),
        (DENY_NAME, DENY_NAME, request(candidates=None), None),
        (DENY_NAME, NONE, request(candidates=()), (Change.ALLOWED, "no example", "default")),
        (NONE, DENY_ADDRESS, request(), (Change.DENIED, "default", "no v4")),
        (NONE, DENY_ADDRESS, request("203.0.113.9", None), (Change.DENIED, "default", "no v4")),
        (NONE, DENY_ADDRESS, request(candidates=BOTH), (Change.ADDRESSES, "default", "no v4")),
        (DENY_ADDRESS, NONE, request(candidates=BOTH), (Change.ADDRESSES, "no v4", "default")),
        (NONE, DENY_ADDRESS, request(candidates=["2001:db8::5"]), None),
        (NONE, POOL, request(), (Change.POOL, "default", "partners")),
        (NONE, POOL, request(candidates=()), (Change.POOL, "default", "partners")),
        (NONE, POOL_OF_ADDRESS, request(candidates=BOTH), (Change.POOL, "default", "partners")),
        (NONE, POOL_OF_ADDRESS, request(), None),
        (NONE, ONLY_OTHERS, request(), (Change.DENIED, "default", "allow_from")),
        (ONLY_OTHERS, NONE, request(None, None), (Change.UNKNOWN, "allow_from", "")),
        (TRUSTING, NONE, request(proxy=GATEWAY), (Change.DENIED, "default", TRUSTED)),
        (TRUSTING, policy(PROXIED.format("192.0.2.2")), request(proxy=GATEWAY), (Change.DENIED, "default", TRUSTED)),
        (NONE, TRUSTING, request(proxy=GATEWAY), (Change.ALLOWED, TRUSTED, "default")),
        (TRUSTING, ONLY_OTHERS, request(proxy=GATEWAY), (Change.DENIED, "default", "allow_from")),
        (TRUSTING, ONLY_OTHERS, request(client=GATEWAY, proxy=GATEWAY, local=True), None),
        (TRUSTING, NONE, request(), None),
        (NONE, policy(users=["ci"], required=True), request(), (Change.UNKNOWN, "default", "")),
        (NONE, policy(users=["ci"], required=True), request(None, None), (Change.UNKNOWN, "", "")),
        (policy(users=["ci"]), policy(users=["bob"]), request(user="ci"), (Change.DENIED, "default", "users_file")),
        (policy(users=["ci", "bob"]), NOT_CI, request(user="bob"), None),
        (policy(users=["ci", "bob"]), NOT_CI, request(user="ci"), (Change.DENIED, "default", "not ci")),
        (NONE, DENY_NAME, request("not a name"), None),
        (NONE, DENY_NAME, request(name="not a name"), None),
        (NONE, policy('[incoming]\nallow_from = ["fe80::/10"]'), request(client="fe80::1%eth0"), None),
    ],
)
def test_difference(old: Policy, new: Policy, given: RecordedRequest, expected: tuple[Change, str, str] | None) -> None:
    found = compare(judge(old, given), judge(new, given))
    assert (found and (found[0], found[1].rule, found[2].rule)) == expected


def test_the_pool_is_that_of_the_address_that_was_dialled() -> None:
    given = request(candidates=BOTH, dialled="2001:db8::5")
    assert judge(POOL_OF_ADDRESS, given).pool == "p"
    assert judge(POOL_OF_ADDRESS, request(candidates=BOTH)).pool == "default"


# ---- the whole log


def test_a_log() -> None:
    both = Replay(NONE, DENY_NAME)
    later = "2026-11-23T10:00:00.000000Z"
    log = [
        line(dest_host="www.example.org", logged_at=later),
        line(),
        line("proxy ends"),
        line(logged_at=later),
        line("ruleset mismatch", candidates=..., dest_addr=..., dest_host="x.example.com"),  # and NONE denies nothing
        b"garbage",
        line("handshake failed", dest_host=..., dest_port=...),
    ]
    both.read(log)
    assert (both.requests, both.same, both.first, both.last) == (4, 1, AT, later)
    (group,) = both.groups(Change.DENIED)
    assert (group.count, group.old.rule, group.new.rule) == (2, "default", "no example")
    assert group.example == read_record(log[1])
    assert both.count(Change.UNKNOWN) == 1
    assert both.leaving == {"default": 1}
    assert both.skipped == {Skipped.OTHER: 1, Skipped.UNREADABLE: 1, Skipped.NO_REQUEST: 1}
    recent = Replay(NONE, DENY_NAME)
    recent.read(log, since="2026-11-23T09:50:00.000000Z")
    assert recent.requests == 2


def test_records_that_the_old_policy_contradicts() -> None:
    both = Replay(DENY_NAME, NONE)
    both.read([line(), line(dest_host="www.example.org"), line("ruleset mismatch")])
    assert (both.disagreeing, both.disagreement) == (1, read_record(line()))
    unknown = Replay(policy(users=["ci"], required=True), NONE)
    unknown.read([line()])
    assert (unknown.count(Change.UNKNOWN), unknown.disagreeing) == (1, 0)


def test_memory_is_bounded() -> None:
    sites = [f"h{number}.test" for number in range(20)]
    new = policy(f"[outgoing]\ndeny_sites = {json.dumps(sites)}")
    both = Replay(NONE, new, most_remembered=7, most_groups=3)
    for _ in range(2):
        both.read(line(dest_host=site) for site in sites)
    assert len(both._known) <= 7
    groups = both.groups(Change.DENIED)
    assert [group.count for group in groups] == [34, 2, 2, 2]
    assert groups[0].new.rule == "other rules"
    assert both.count(Change.DENIED) == both.requests == 40


def test_datagrams() -> None:
    flow = read_record(line("udp flow", command="udp_associate", dest_port=53))
    assert isinstance(flow, AccessRecord)
    assert (flow.request.command, flow.request.port, flow.allowed) == ("udp_associate", 53, True)
    old = policy()
    new = policy('[[rule]]\naction = "deny"\nprotocol = "udp"\nname = "no datagrams"')
    change = compare(judge(old, flow.request), judge(new, flow.request))
    assert change is not None
    assert (change[0], change[2].rule) == (Change.DENIED, "no datagrams")
    assert judge(new, RecordedRequest("10.1.2.3", None, "www.example.com", 53, None, BOTH, None)).allowed
    for message in ("association starts", "association ends"):
        assert read_record(line(message, command="udp_associate", dest_host="0.0.0.0")) is Skipped.OTHER
    assert read_record(line("udp flow", command="udp_associate", destinations=9)) is Skipped.OTHER
    assert read_record(line("proxy starts", command="unheard of")) is Skipped.UNREADABLE
