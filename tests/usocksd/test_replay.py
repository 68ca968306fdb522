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

from usocksd import replay
from usocksd.clients import TRUSTED, ClientRules
from usocksd.config import Config
from usocksd.log.formats import FORMATS, Severity
from usocksd.names.match import canonical_host
from usocksd.net.address import numeric_address
from usocksd.policy import Policy
from usocksd.records import Asked, Record, Skipped, lines_of, read_record
from usocksd.replay import Change, Replay
from usocksd.settings import loader as configuration

AT = "2026-11-23T09:47:58.777489Z"


def policy(text: str = "", users: Sequence[str] | None = None, *, required: bool = False) -> Policy:
    """`text` is a configuration; this host has the address 198.51.100.1."""
    config = configuration.parse(Config, text, "test")
    rules = config.access_rules(lambda ip: str(ip) == "198.51.100.1")
    clients = ClientRules(config.incoming.allow_from or ())
    in_front = config.incoming.proxy_protocol
    trusted = None if in_front is None else ClientRules(in_front.trusted)
    return Policy(clients, rules, None if users is None else frozenset(users), required, trusted)


def line(message: str = "proxy starts", **fields: Any) -> bytes:
    record = {
        "topic": "usocksd",
        "logged_at": AT,
        "severity": "info",
        "utsname": "vm",
        "message": message,
        "type": "access",
        "client_addr": "10.1.2.3:40000",
        "dest_host": "www.example.com",
        "dest_port": 443,
        "dest_addr": "203.0.113.5:443",
        "user": None,
        "rule": "default",
        "candidates": ["203.0.113.5 allowed default", "2001:db8::5 denied some rule"],
    }
    return json.dumps({k: v for k, v in (record | fields).items() if v is not ...}, separators=(",", ":")).encode()


def lines(message: str = "proxy starts", **fields: Any) -> dict[str, bytes]:
    """The same record in each format, as the daemon writes it."""
    record = json.loads(line(message, **fields))
    for key in ("topic", "logged_at", "severity", "utsname", "message"):
        del record[key]
    moment = datetime.fromisoformat(AT).timestamp()
    return {
        name: FORMATS[name]("usocksd", "vm").format(moment, Severity.INFO, message, record)
        for name in ("plain", "logfmt", "json")
    }


def asked(
    host: str | None = "www.example.com", candidates: Sequence[str] | None = ("203.0.113.5",), **more: Any
) -> Asked:
    fields: dict[str, Any] = {"client": "10.1.2.3", "user": None, "port": 443, "name": None, "dialled": None}
    return Asked(host=host, candidates=None if candidates is None else tuple(candidates), **(fields | more))


# ---- records


TROUBLE = 'a "b" [203.0.113.9 x=1\\ \n\u2028 {}] \x07=\x1b'
RECORDS: list[tuple[str, dict[str, Any]]] = [
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
]


@pytest.mark.parametrize(("message", "fields"), RECORDS)
def test_every_format_is_read_alike(message: str, fields: dict[str, Any]) -> None:
    read = {name: read_record(text) for name, text in lines(message, **fields).items()}
    assert read["json"] is not Skipped.UNREADABLE
    assert read["plain"] == read["logfmt"] == read["json"]


@given(st.text(), st.text())
def test_what_clients_chose_is_read_back_from_every_format(user: str, host: str) -> None:
    read = [read_record(text) for text in lines(user=user, dest_host=host).values()]
    assert isinstance(read[2], Record)
    assert read[0] == read[1] == read[2]


@given(st.binary())
def test_any_line_is_read(line: bytes) -> None:
    for before in (b"", b"topic=", b"2026-11-23T09:47:58.777489Z vm usocksd info: "):
        read_record(before + line)


def test_what_a_record_says() -> None:
    candidates = ("203.0.113.5", "2001:db8::5")
    expected = asked(candidates=candidates, dialled="203.0.113.5")
    assert read_record(line()) == Record(AT, expected, True)
    denied = line("ruleset mismatch", dest_addr=..., user="ci", dest_name="www.example.com.corp.example")
    more = {"user": "ci", "name": "www.example.com.corp.example"}
    assert read_record(denied) == Record(AT, asked(candidates=candidates, **more), False)


@pytest.mark.parametrize(
    ("peer", "expected"),
    [
        (None, {}),
        ("192.0.2.1:5", {"peer": "192.0.2.1"}),
        ("10.1.2.3:40000", {"peer": "10.1.2.3", "own": True}),
    ],
)
def test_who_has_named_the_client(peer: str | None, expected: dict[str, Any]) -> None:
    record = read_record(line(peer_addr=peer))
    assert isinstance(record, Record)
    assert record.asked == asked(candidates=BOTH, dialled=BOTH[0], **expected)


def test_an_ipv6_client() -> None:
    record = read_record(line(client_addr="[fe80::1%eth0]:40000"))
    assert isinstance(record, Record)
    assert policy('[incoming]\nallow_from = ["fe80::/10"]').judge(record.asked).allowed


@pytest.mark.parametrize(
    ("given", "candidates"),
    [
        (line(candidates=...), ("203.0.113.5",)),  # as it was before candidates were recorded
        (line("ruleset mismatch", candidates=..., dest_addr=...), None),  # denied before it was resolved
        (line("dial to destination failed", candidates=..., dest_addr=...), ()),  # the name had no address
    ],
)
def test_addresses_that_were_not_recorded(given: bytes, candidates: tuple[str, ...] | None) -> None:
    record = read_record(given)
    assert isinstance(record, Record)
    assert record.asked.candidates == candidates


def test_a_client_that_was_not_admitted() -> None:
    given = line("denied access", dest_host=..., dest_port=..., dest_addr=..., candidates=...)
    assert read_record(given) == Record(AT, asked(None, None, port=0), False)


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
def test_what_says_nothing_about_a_request(given: bytes, skipped: Skipped) -> None:
    assert read_record(given) is skipped


@given(
    st.binary(max_size=200) | st.builds(lambda value: json.dumps(value).encode(), st.dictionaries(st.text(), st.text()))
)
def test_no_line_breaks_it(given: bytes) -> None:
    read_record(given)


def test_a_request_can_not_pass_for_the_end_of_a_connection() -> None:
    assert isinstance(read_record(line(dest_host='x","message":"proxy ends')), Record)


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
BOTH = ("203.0.113.5", "2001:db8::5")
GATEWAY = "192.0.2.1"
PROXIED = '[incoming.proxy_protocol]\nport = 1090\ntrusted = ["{}"]\n'
TRUSTING = policy(PROXIED.format(GATEWAY))
DENY_ALL_CLIENTS = policy('[incoming]\nallow_from = ["192.0.2.9"]\n' + PROXIED.format(GATEWAY))


@pytest.mark.parametrize(
    ("old", "new", "given", "expected"),
    [
        (NONE, DENY_NAME, asked(), (Change.DENIED, "default", "no example")),
        (NONE, DENY_NAME, asked("WWW.Example.com."), (Change.DENIED, "default", "no example")),
        (NONE, DENY_NAME, asked(name="x.example.org", host="x"), None),
        (DENY_NAME, NONE, asked(), (Change.ALLOWED, "no example", "default")),
        (DENY_NAME, NONE, asked(candidates=None), (Change.UNKNOWN, "no example", "default")),
        (DENY_NAME, DENY_NAME, asked(candidates=None), None),
        (DENY_NAME, NONE, asked(candidates=()), (Change.ALLOWED, "no example", "default")),
        (NONE, DENY_ADDRESS, asked(), (Change.DENIED, "default", "no v4")),
        (NONE, DENY_ADDRESS, asked("203.0.113.9", None), (Change.DENIED, "default", "no v4")),
        (NONE, DENY_ADDRESS, asked(candidates=BOTH), (Change.ADDRESSES, "default", "no v4")),
        (DENY_ADDRESS, NONE, asked(candidates=BOTH), (Change.ADDRESSES, "no v4", "default")),
        (NONE, DENY_ADDRESS, asked(candidates=["2001:db8::5"]), None),
        (NONE, POOL, asked(), (Change.POOL, "default", "partners")),
        (NONE, POOL, asked("www.example.com", ()), (Change.POOL, "default", "partners")),
        (NONE, POOL_OF_ADDRESS, asked(candidates=BOTH), (Change.POOL, "default", "partners")),
        (NONE, POOL_OF_ADDRESS, asked(), None),
        (NONE, policy('[incoming]\nallow_from = ["192.0.2.0/24"]'), asked(), (Change.DENIED, "default", "allow_from")),
        (
            policy('[incoming]\nallow_from = ["192.0.2.0/24"]'),
            NONE,
            asked(None, None),
            (Change.UNKNOWN, "allow_from", ""),
        ),
        (TRUSTING, NONE, asked(peer=GATEWAY), (Change.DENIED, "default", TRUSTED)),
        (TRUSTING, policy(PROXIED.format("192.0.2.2")), asked(peer=GATEWAY), (Change.DENIED, "default", TRUSTED)),
        (NONE, TRUSTING, asked(peer=GATEWAY), (Change.ALLOWED, TRUSTED, "default")),
        (TRUSTING, DENY_ALL_CLIENTS, asked(peer=GATEWAY), (Change.DENIED, "default", "allow_from")),
        (TRUSTING, DENY_ALL_CLIENTS, asked(client=GATEWAY, peer=GATEWAY, own=True), None),
        (TRUSTING, NONE, asked(), None),
        (NONE, policy(users=["ci"], required=True), asked(), (Change.UNKNOWN, "default", "")),
        (policy(users=["ci"]), policy(users=["bob"]), asked(user="ci"), (Change.DENIED, "default", "users_file")),
        (NONE, DENY_NAME, asked("not a name"), None),
    ],
)
def test_difference(old: Policy, new: Policy, given: Asked, expected: tuple[Change, str, str] | None) -> None:
    found = replay.compare(old.judge(given), new.judge(given))
    assert (None if found is None else found[:3]) == expected


def test_users_decide() -> None:
    rule = '[[rule]]\nname = "not ci"\naction = "deny"\nuser = ["ci"]'
    old, new = policy(users=["ci", "bob"]), policy(rule, users=["ci", "bob"])
    assert replay.compare(old.judge(asked(user="bob")), new.judge(asked(user="bob"))) is None
    found = replay.compare(old.judge(asked(user="ci")), new.judge(asked(user="ci")))
    assert found == (Change.DENIED, "default", "not ci", "", "")


def test_the_pool_is_that_of_the_address_that_was_dialled() -> None:
    given = asked(candidates=BOTH, dialled="2001:db8::5")
    assert POOL_OF_ADDRESS.judge(given).pool == "p"
    assert POOL_OF_ADDRESS.judge(asked(candidates=BOTH)).pool == "default"


RULE = st.fixed_dictionaries(
    {
        "action": st.sampled_from(["allow", "deny"]),
        "to": st.lists(
            st.sampled_from(["a.test", ".test", "203.0.113.0/29", "203.0.113.5", "2001:db8::/64", "127.0.0.1"]),
            min_size=1,
            max_size=2,
        ),
        "ports": st.lists(st.sampled_from([25, 80]), min_size=1, max_size=2),
        "from": st.lists(st.sampled_from(["10.0.0.0/8", "192.168.0.0/16"]), min_size=1, max_size=1),
    },
)
ADDRESSES = st.sampled_from(["203.0.113.5", "203.0.113.9", "2001:db8::5", "127.0.0.1", "198.51.100.1"])
ASKED = st.builds(
    asked,
    host=st.sampled_from(["a.test", "b.test", "test", "203.0.113.5", "127.0.0.1", "203.0.113.77"]),
    candidates=st.lists(ADDRESSES, min_size=1, max_size=3, unique=True),
    client=st.sampled_from(["10.1.2.3", "192.168.1.1"]),
    port=st.sampled_from([25, 80, 443]),
)


def as_toml(rules: list[dict[str, Any]]) -> str:
    return "".join(
        "[[rule]]\n" + "".join(f"{key} = {json.dumps(value)}\n" for key, value in rule.items()) for rule in rules
    )


@given(st.lists(RULE, max_size=4), st.lists(RULE, max_size=4), st.lists(ASKED, max_size=20))
def test_counts_agree_with_deciding_each_request_by_itself(
    old: list[dict[str, Any]], new: list[dict[str, Any]], requests: list[Asked]
) -> None:
    policies = policy(as_toml(old)), policy(as_toml(new))

    def addresses(policy: Policy, one: Asked) -> set[str]:
        """What may be dialled, by the rules as they are."""
        client, host = numeric_address(one.client), canonical_host(one.host or "")
        if not policy.rules.decide_name(client, None, host, one.port).allowed:
            return set()
        if not isinstance(host, str):
            return {str(host)}
        assert one.candidates is not None
        decide = policy.rules.decide_address
        return {a for a in one.candidates if decide(client, None, host, numeric_address(a), one.port).allowed}

    both = Replay(*policies)
    expected = dict.fromkeys((Change.DENIED, Change.ALLOWED, Change.ADDRESSES), 0)
    for one in requests:
        both.add(Record(AT, one, True))
        before, after = (addresses(policy, one) for policy in policies)
        if bool(before) != bool(after):
            expected[Change.ALLOWED if after else Change.DENIED] += 1
        elif before != after:
            expected[Change.ADDRESSES] += 1
    assert {change: both.count(change) for change in expected} == expected
    assert both.requests == len(requests) == both.same + sum(both.count(change) for change in Change)


@given(st.lists(RULE, max_size=4), st.lists(ASKED, max_size=20))
def test_a_policy_does_not_differ_from_itself(rules: list[dict[str, Any]], requests: list[Asked]) -> None:
    both = Replay(policy(as_toml(rules)), policy(as_toml(rules)))
    for one in requests:
        both.add(Record(AT, one, True))
    assert both.same == len(requests)


# ---- the whole log


def test_a_log() -> None:
    both = Replay(NONE, DENY_NAME)
    later = "2026-11-23T10:00:00.000000Z"
    lines = [
        line(),
        line("proxy ends"),
        line(logged_at=later),
        line(dest_host="www.example.org", logged_at=later),
        line("ruleset mismatch", candidates=..., dest_addr=..., dest_host="x.example.com"),  # and NONE denies nothing
        b"garbage",
        line("handshake failed", dest_host=..., dest_port=...),
    ]
    both.read(lines)
    assert (both.requests, both.same, both.first, both.last) == (4, 1, AT, later)
    (group,) = both.groups(Change.DENIED)
    assert (group.count, group.difference[:3]) == (2, (Change.DENIED, "default", "no example"))
    assert group.example == read_record(lines[0])
    assert both.count(Change.UNKNOWN) == 1
    assert both.leaving == {"default": 1}
    assert both.skipped == {Skipped.OTHER: 1, Skipped.UNREADABLE: 1, Skipped.NO_REQUEST: 1}
    recent = Replay(NONE, DENY_NAME)
    recent.read(lines, since="2026-11-23T09:50:00.000000Z")
    assert recent.requests == 2


def test_records_that_the_old_policy_contradicts() -> None:
    both = Replay(DENY_NAME, NONE)
    both.read([line(), line(dest_host="www.example.org"), line("ruleset mismatch")])
    assert both.disagreeing == 1
    assert both.disagreement == read_record(line())


def test_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replay, "_MOST_REMEMBERED", 7)
    monkeypatch.setattr(replay, "_MOST_GROUPS", 3)
    sites = [f"h{number}.test" for number in range(20)]
    both = Replay(NONE, policy(f"[outgoing]\ndeny_sites = {json.dumps(sites)}"))
    for _ in range(2):
        both.read(line(dest_host=site) for site in sites)
    assert len(both._known) <= 7
    groups = both.groups(Change.DENIED)
    assert [group.count for group in groups] == [34, 2, 2, 2]
    assert groups[0].difference.new == "other rules"
    assert both.count(Change.DENIED) == both.requests == 40
