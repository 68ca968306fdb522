"""One request put to a policy: which names are resolved, which address counts, and where it leaves from."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from usocksd.clients import ALLOW_FROM, TRUSTED, Client, ClientRules
from usocksd.config import UsocksdConfig
from usocksd.decision import REQUIRED, USERS, Decision, Policy
from usocksd.egress import Source
from usocksd.errors import NO_SUCH_NAME, Denied, Error, NoEgress, ResolveError
from usocksd.names.match import parse_network
from usocksd.net.address import IPAddress, numeric_address
from usocksd.settings.loader import parse

CLIENT = Client.at("10.1.2.3")
RULES = parse(
    UsocksdConfig,
    """
    [[rule]]
    name = "secret"
    action = "deny"
    to = [".secret.test", "203.0.113.66"]
    [[rule]]
    name = "other pool"
    action = "allow"
    to = ["2001:db8::/32"]
    egress = "empty"
    [[rule]]
    name = "short"
    action = "deny"
    to = ["short"]
    [egress.empty]
    addresses = ["192.0.2.1"]
    """,
    "test",
).access_rules(lambda _: False)
V4, DENIED_V4, NO_EGRESS_V6 = "203.0.113.5", "203.0.113.66", "2001:db8::5"


def pick(pool: str, client: Client, site: str, address: IPAddress) -> Source:
    if pool == "empty":
        raise NoEgress("no usable egress address")
    return Source(f"from {site}")


def decide(host: str, full_names: Sequence[str] = (), found: dict[str, Sequence[str]] | None = None) -> Decision:
    """A decision as a session makes it; `found` are the addresses of the names that exist."""
    decision = Decision(RULES, CLIENT, host, 443)
    if decision.unresolved:
        for name in decision.names(full_names or (host,)):
            if found and name in found:
                decision.resolved(map(numeric_address, found[name]))
            else:
                decision.not_resolved(ResolveError(name, NO_SUCH_NAME))
    return decision


@pytest.mark.parametrize(
    ("full_names", "found", "name", "error"),
    [
        # the first that has addresses
        (["x.a.test", "x.b.test", "x"], {"x.b.test": [V4], "x": [V4]}, "x.b.test", None),
        # a denied one is left out, and never resolved
        (["x.secret.test", "x.b.test"], {"x.secret.test": [V4], "x.b.test": [V4]}, "x.b.test", None),
        # a denial counts more than names that do not exist
        (["x.a.test", "x.secret.test", "short", "x"], {}, "x.secret.test", "denied by secret"),
        (["x.a.test", "x"], {}, "x", "x.a.test: no such name"),
    ],
)
def test_names(full_names: list[str], found: dict[str, Sequence[str]], name: str, error: str | None) -> None:
    decision = Decision(RULES, CLIENT, "x", 443)
    asked, problem = [], None
    try:
        for each in decision.names(full_names):
            asked.append(each)
            if each in found:
                decision.resolved(map(numeric_address, found[each]))
            else:
                decision.not_resolved(ResolveError(each, NO_SUCH_NAME))
    except Error as raised:
        problem = str(raised)
    assert (decision.name, problem) == (name, error)
    assert "x.secret.test" not in asked


def test_a_failure_of_name_servers_ends_the_search() -> None:
    decision = Decision(RULES, CLIENT, "x", 443)
    with pytest.raises(ResolveError, match="timed out"):  # noqa: PT012
        for name in decision.names(["x.a.test", "x"]):
            decision.not_resolved(ResolveError(name, "timed out"))
    assert decision.name == "x.a.test"


def test_a_name_that_a_search_domain_has_completed_is_judged_as_both() -> None:
    with pytest.raises(Denied, match="short"):
        decide("short", ["short.b.test"], {"short.b.test": [V4]})


@pytest.mark.parametrize(
    ("addresses", "rule", "dialled", "error"),
    [
        ([DENIED_V4, V4], "default", [V4], None),
        ([NO_EGRESS_V6, V4], "default", [V4], None),
        ([NO_EGRESS_V6, DENIED_V4], "other pool", [], NoEgress),
        ([DENIED_V4, NO_EGRESS_V6], "other pool", [], NoEgress),
        ([DENIED_V4, "127.0.0.1"], "secret", [], Denied),
    ],
)
def test_which_address_counts(addresses: list[str], rule: str, dialled: list[str], error: type[Error] | None) -> None:
    decision = decide("a.test", found={"a.test": addresses})
    assert decision.ruling
    assert decision.ruling.rule == "default"  # of the name
    if error is None:
        assert [address for address, _ in decision.choose_egress(pick)] == dialled
    else:
        with pytest.raises(error):
            decision.choose_egress(pick)
    assert decision.ruling.rule == rule
    assert decision.candidates
    assert [each.host for each in decision.candidates] == addresses


def test_the_site_is_that_of_all_addresses() -> None:
    ((_, source),) = decide("203.0.113.9").choose_egress(pick)
    assert source == Source("from cb0071")
    first, second = decide("a.test", found={"a.test": [V4, "192.0.2.9"]}).choose_egress(pick)
    assert first == (V4, Source("from c00002"))
    assert second == ("192.0.2.9", Source("from c00002"))


def test_in_the_end_the_address_that_was_connected_counts() -> None:
    decision = Decision(RULES, CLIENT, "a.test", 443)
    decision.judge_name("a.test")
    decision.resolved(map(numeric_address, [V4, NO_EGRESS_V6]))
    decision.choose_egress(lambda *_: Source())
    assert decision.ruling
    assert decision.ruling.rule == "default"
    decision.connected(NO_EGRESS_V6)
    assert (decision.ruling.rule, decision.ruling.pool) == ("other pool", "empty")


def test_invalid_hosts() -> None:
    with pytest.raises(ResolveError, match="not a host name"):
        Decision(RULES, CLIENT, "a..b", 443)


@pytest.mark.parametrize(
    ("client", "refusal"),
    [
        (Client.at("10.1.2.3", user="ci"), None),
        (Client.at("10.1.2.3", user="bob"), USERS),
        (Client.at("10.1.2.3"), REQUIRED),
        (Client.at("192.0.2.1", user="ci"), ALLOW_FROM),
        (Client("10.1.2.3", 1, numeric_address("10.1.2.3"), "ci", numeric_address("192.0.2.9")), None),
        (Client("10.1.2.3", 1, numeric_address("10.1.2.3"), "ci", numeric_address("192.0.2.8")), TRUSTED),
        (Client("192.0.2.1", 1, numeric_address("192.0.2.1"), "ci", numeric_address("192.0.2.9")), ALLOW_FROM),
        # a proxy's own connection: it is trusted, whatever allow_from says
        (Client("192.0.2.9", 1, numeric_address("192.0.2.9"), "ci", numeric_address("192.0.2.9"), local=True), None),
    ],
)
def test_who_is_refused_before_any_rule(client: Client, refusal: str | None) -> None:
    trusted = ClientRules([parse_network("192.0.2.9")])
    policy = Policy(ClientRules(), RULES, frozenset(["ci"]), required=True, trusted=trusted)
    assert policy.refusal(client) == refusal
