"""`explain` and `diff` as an admin uses them, compared with what the daemon does and records."""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import daemons
import pytest
import trio
from daemons import Daemon, NameServer, Served, socks5

from usocksd.cli import main
from usocksd.commands.serve import make_egress, make_policy
from usocksd.config import UsocksdConfig
from usocksd.errors import Error
from usocksd.explain import Explainer
from usocksd.host.addresses import HostAddresses
from usocksd.log.metrics import Metrics
from usocksd.names.resolver import Resolver
from usocksd.net.address import HostPort
from usocksd.settings import loader as configuration

NAMES = {
    "open.test": ["127.0.0.1"],
    "both.test": ["127.0.0.66", "127.0.0.1"],
    "partner.test": ["203.0.113.5"],
    "blocked.test": ["127.0.0.1"],
    "metadata.test": ["169.254.169.254"],
    "empty.test": [],
    # what a block list says of 127.0.0.1
    "1.0.0.127.dnsbl.test": ["127.0.0.2"],
}
CONFIG = """
control = "{folder}/control.sock"
[incoming]
port = 0
addresses = ["127.0.0.1"]
[dns]
servers = ["{dns}"]
[timeouts]
connect = 5
[[rule]]
name = "blocked"
action = "deny"
to = ["blocked.test", "127.0.0.66"]
[[rule]]
name = "not for others"
action = "deny"
from = ["192.0.2.0/24"]
[[rule]]
name = "not for ci"
action = "deny"
user = ["ci"]
[[rule]]
name = "no mail"
action = "deny"
ports = [25, "6000-6100"]
[[rule]]
name = "partners"
action = "allow"
to = ["partner.test"]
ports = ["1-65535"]
egress = "partners"
[[rule]]
name = "this host"
action = "allow"
to = ["127.0.0.1"]
egress = "listed"
[egress.partners]
addresses = ["192.0.2.77"]
[egress.listed]
addresses = ["127.0.0.1", "192.0.2.78"]
dnsbl_domains = ["dnsbl.test"]
"""
# Host, port (0: the destination's), verdict, rule
REQUESTS = [
    ("open.test", 0, "allowed", "this host"),
    ("OPEN.test.", 0, "allowed", "this host"),
    ("both.test", 0, "allowed", "this host"),
    ("127.0.0.1", 0, "allowed", "this host"),
    ("127.1", 0, "allowed", "this host"),
    ("blocked.test", 0, "denied", "blocked"),
    ("127.0.0.66", 0, "denied", "blocked"),
    ("open.test", 25, "denied", "no mail"),
    ("metadata.test", 0, "denied", "built-in: link-local"),
    ("partner.test", 0, "unreachable", "partners"),
    ("empty.test", 0, "unreachable", "default"),
    ("nobody.test", 0, "unreachable", "default"),
]
REPLIES = {"allowed": 0, "denied": 2, "unreachable": (1, 3, 4)}


@pytest.fixture(scope="module")
def dns() -> Iterator[NameServer]:
    with NameServer(NAMES) as server:
        yield server


@pytest.fixture(scope="module")
def server(dns: NameServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    folder = tmp_path_factory.mktemp("usocksd")
    with Daemon("usocksd", CONFIG.format(dns=dns.address, folder=folder), folder) as daemon:
        yield daemon


@pytest.fixture(scope="module")
def requests(server: Daemon, destination: Served) -> list[dict[str, Any]]:
    """Makes all of REQUESTS; the record of each."""
    found = []
    # By then the block lists have answered, so requests leave from the addresses that explain will name.
    server.record("detect black-listed IP")
    for host, port, verdict, _ in REQUESTS:
        with socket.create_connection(("127.0.0.1", server.port), daemons.PATIENCE) as client:
            reply = socks5(client, host, port or destination.port, as_name=True)[0]
            who = "{}:{}".format(*client.getsockname())
        assert reply == REPLIES[verdict] or verdict == "unreachable", (host, reply)
        message = {"allowed": "proxy starts", "denied": "ruleset mismatch"}.get(verdict, "dial to destination failed")
        found.append(server.record(message, client_addr=who))
    return found


def run(*words: str, status: int = 0) -> str:
    """The output of the verb: its answer, or the error."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            ended = main(words)
        except SystemExit as exit_:
            ended = int(exit_.code or 0)
    assert ended == status, out.getvalue() + err.getvalue()
    return out.getvalue() if status < 2 else err.getvalue()


def file_of(server: Daemon) -> str:
    return str(server.log.with_name("usocksd.toml"))


# ---- explain


def test_it_says_what_the_daemon_does(server: Daemon, destination: Served, requests: list[dict[str, Any]]) -> None:
    for (host, port, verdict, rule), record in zip(REQUESTS, requests, strict=True):
        words = ["explain", file_of(server), "--from", "127.0.0.1", f"{host}:{port or destination.port}", "--json"]
        judged, live = (json.loads(run(*words, *more, status=int(verdict != "allowed"))) for more in ([], ["--live"]))
        for answer in (judged, live):
            assert (answer["verdict"], answer["rule"]) == (verdict, record["rule"]) == (verdict, rule), host
            # Each rule up to the deciding one, in the order of the file.
            assert [step["matched"] for step in answer["steps"]] == [False] * (len(answer["steps"]) - 1) + [True]
            if verdict == "allowed":
                assert answer["pool"] == record["pool"] == "listed"
                sources = [each["sources"][0] for each in answer["addresses"] if each["sources"]]
                assert sources[0] == record["src_addr"].rpartition(":")[0]
                assert answer["pools"]["listed"]["listed"] == {"127.0.0.1": ["dnsbl.test"]}
                assert answer["pools"]["listed"]["local"] == ["127.0.0.1"]
            if "candidates" in record and record["candidates"] is not None:
                verdicts = [
                    f"{each['address']} {'allowed' if each['allowed'] else 'denied'} {each['rule']}"
                    for each in answer["addresses"]
                ]
                assert sorted(verdicts) == sorted(record["candidates"])  # name servers shuffle them


def test_explained_for_people(server: Daemon) -> None:
    text = run("explain", "--from", "127.0.0.1", file_of(server), "both.test:443")
    lines = text.splitlines()
    lines[11:13] = sorted(lines[11:13], reverse=True)  # name servers shuffle the addresses
    assert lines == [
        "127.0.0.1 to both.test:443: allowed by this host (line 34), pool listed, leaves from 127.0.0.1",
        "",
        "rules on both.test",
        "  6 rules do not match:",
        "    to does not list both.test (3): blocked, partners, this host",
        "    from does not list 127.0.0.1 (1): not for others",
        "    user is nobody (1): not for ci",
        "    port 443 not in its ports (1): no mail",
        "  default: allows it, no rule has decided",
        "",
        "addresses of both.test",
        '  127.0.0.66  denied by blocked (line 12): to lists "127.0.0.66"',
        "  127.0.0.1   allowed by this host (line 34), pool listed, from 127.0.0.1",
        "",
        "pool listed: 0 of 2 addresses usable",
        "  127.0.0.1  listed by dnsbl.test",
        "  192.0.2.78  not on this host",
    ]
    verbose = run("explain", file_of(server), "both.test:443", "--from", "127.0.0.1", "-v")
    assert "  no mail (line 24): does not match, port 443 not in 25, 6000-6100\n" in verbose
    strange = run("explain", file_of(server), "--from", "127.0.0.1", "a b\x1bc:80", status=1)
    assert strange.startswith("127.0.0.1 to a b\\x1bc:80: unreachable: ")


def test_a_user_without_configured_users(server: Daemon, destination: Served) -> None:
    """The daemon takes any password then, and the rule that denies "ci" does not match."""
    text = run("explain", file_of(server), "--from", "127.0.0.1", "--user", "ci", f"open.test:{destination.port}")
    first, second, *_ = text.splitlines()
    assert first.startswith(f"127.0.0.1 (ci) to open.test:{destination.port}: allowed by this host (line 34)")
    assert second == "there are no users: any password lets the client in, and the rules see no user"
    assert "user is nobody" in text


def test_what_comes_before_the_rules(server: Daemon, tmp_path: Path) -> None:
    text = run("explain", file_of(server), "--from", "203.0.113.1", "open.test:80", status=1)
    assert text == "203.0.113.1 to open.test:80: denied by allow_from: clients of this address are not admitted\n"
    users = tmp_path / "users"
    users.write_text("ci:$2y$04$" + "a" * 53 + "\n")
    config = tmp_path / "users.toml"
    config.write_text(Path(file_of(server)).read_text() + f'[auth]\nusers_file = "{users}"\n')
    assert "auth.required" in run("explain", str(config), "--from", "127.0.0.1", "open.test:80", status=1)
    assert "no such user" in run("explain", str(config), "--from", "127.0.0.1", "--user", "x", "a:80", status=1)
    text = run("explain", str(config), "--from", "127.0.0.1", "--user", "ci", "open.test:80", status=1)
    assert text.startswith("127.0.0.1 (ci) to open.test:80: denied by not for ci (line 20)\n")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--from", "127.0.0.1", "open.test"], "expected HOST:PORT"),
        (["--from", "nobody", "open.test:80"], "expected an IP address"),
        (["open.test:80"], "--from"),
        (["--from", "127.0.0.1", "a:1", "b:2", "c:3"], "unrecognized arguments"),
        (["/nowhere.toml", "--from", "127.0.0.1", "open.test:80"], "/nowhere.toml: file: can't be read"),
        (["--live", "--control", "/nowhere.sock", "--from", "::1", "open.test:80"], "no usocksd runs"),
    ],
)
def test_explain_in_trouble(words: list[str], said: str) -> None:
    assert said in run("explain", *words, status=2)


def test_a_long_wait_is_explained(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "usocksd.toml"
    with NameServer({"slow.test": None}) as silent:
        config.write_text(f'[dns]\nservers = ["{silent.address}"]\n[timeouts]\nconnect = 1.5\n')
        assert main(["explain", str(config), "--from", "127.0.0.1", "slow.test:80"]) == 1
    out, err = capsys.readouterr()
    assert "unreachable" in out
    assert err.splitlines() == [
        f"usocksd explain: waiting for name servers: {silent.address}",
        f"usocksd explain: no answer from {silent.address}",
    ]


async def test_names_that_search_domains_have_completed(dns: NameServer, tmp_path: Path) -> None:
    resolv_conf = tmp_path / "resolv.conf"
    resolv_conf.write_text("search secret.test nowhere.test test\n")
    config = configuration.parse(
        UsocksdConfig, '[[rule]]\nname = "secret"\naction = "deny"\nto = [".secret.test"]\nports = [22]', "test"
    )
    hosts, metrics = HostAddresses(), Metrics("test")
    server, _, port = dns.address.rpartition(":")
    resolver = Resolver([HostPort(server, int(port))], metrics, resolv_conf=resolv_conf)
    explainer = Explainer(
        make_policy(config, None, hosts.is_local),
        resolver,
        *make_egress(config, hosts, metrics),
        timeout=daemons.PATIENCE,
    )
    request = {"client": "127.0.0.1", "user": None, "host": "partner", "port": 80}
    async with trio.open_nursery() as nursery:
        await nursery.start(resolver.run)
        found = await explainer.explain(request)
        assert (found["verdict"], found["canonical"]) == ("allowed", "partner.test")
        assert found["absent"] == ["partner.secret.test", "partner.nowhere.test"]
        del dns.asked[:]
        denied = await explainer.explain(request | {"host": "other", "port": 22})
        assert (denied["verdict"], denied["rule"], denied["canonical"]) == ("denied", "secret", "other.secret.test")
        assert "other.secret.test" not in dns.asked
        assert denied["steps"][-1]["why"].startswith('to lists ".secret.test"')
        nursery.cancel_scope.cancel()
    for bad in ({"port": 0}, {"client": "x"}, {"host": 1}, {"user": 1}, {"port": True}):
        with pytest.raises(Error):
            await explainer.explain(request | bad)


# ---- diff


def test_what_a_change_would_do(server: Daemon, requests: list[dict[str, Any]], tmp_path: Path) -> None:
    new = tmp_path / "new.toml"
    text = Path(file_of(server)).read_text()
    text = text.replace('to = ["blocked.test", "127.0.0.66"]', 'to = ["open.test"]')
    new.write_text(text.replace('dnsbl_domains = ["dnsbl.test"]', "mark = 1"))
    answer = json.loads(run("diff", file_of(server), str(new), "--log", str(server.log), "--json", status=1))
    changes = [(c["change"], c["old"]["rule"], c["new"]["rule"], c["count"]) for c in answer["changes"]]
    assert changes == [
        ("denied", "this host", "blocked", 2),  # open.test, twice
        # (its port 25 is denied by another rule than before, which makes no difference)
        ("unknown", "blocked", "default", 1),  # blocked.test was never resolved
    ]
    assert answer["changes"][0]["example"]["host"] == "open.test"
    # both.test goes to 127.0.0.1 as before, and 127.0.0.66 is still denied: by the built-in protection.
    assert answer["same"] == len(REQUESTS) - 3
    assert answer["pools_changed"] == {"listed": 3}
    lines = run("diff", file_of(server), str(new), "--log", str(server.log), status=1).splitlines()
    assert lines[1].startswith(f"{len(REQUESTS)} requests, recorded 20")
    assert lines[2:6] == [
        f"{len(REQUESTS) - 3} decided the same, 2 differently, 1 unknown",
        "",
        "2 would be denied",
        "         2  this host (line 34) -> blocked (line 12)",
    ]
    assert lines[6].startswith("            e.g. 127.0.0.1 to open.test:")
    assert f"note: pool listed is another one in {new}: 3 of the requests would leave from it" in lines


def test_logs_of_every_kind(server: Daemon, requests: list[dict[str, Any]], tmp_path: Path) -> None:
    packed = tmp_path / "usocksd.log.1.gz"
    with server.log.open("rb") as plain, gzip.open(packed, "wb") as file:
        shutil.copyfileobj(plain, file)
    same = (file_of(server), file_of(server))
    both = json.loads(run("diff", *same, "--log", str(server.log), str(packed), "--json"))
    assert both["requests"] == both["same"] == 2 * len(REQUESTS)
    assert (both["disagreeing"], both["unreadable"], both["changes"]) == (0, 0, [])
    command = [sys.executable, "-m", "usocksd", "diff", *same, "--log", "-", "--json"]
    piped = subprocess.run(command, input=server.log.read_bytes(), capture_output=True, check=True, timeout=60)
    assert json.loads(piped.stdout)["requests"] == len(REQUESTS)
    recent = json.loads(run("diff", *same, "--log", str(server.log), "--since", "1h", "--json"))
    assert recent["requests"] == len(REQUESTS)
    assert "no request is recorded" in run(
        "diff", *same, "--log", str(server.log), "--since", "2100-01-01T00:00", status=2
    )
    cut = tmp_path / "cut.gz"
    cut.write_bytes(packed.read_bytes()[:-20])
    assert str(cut) in run("diff", *same, "--log", str(cut), status=2)


def test_diff_in_trouble(server: Daemon, tmp_path: Path) -> None:
    bad = tmp_path / "bad.toml"
    bad.write_text('[incoming]\nport = 70000\n[[rule]]\naction = "perhaps"\n')
    for words in (["explain", str(bad), "--from", "127.0.0.1", "a:80"], ["diff", file_of(server), str(bad)]):
        text = run(*words, status=2)
        assert f"{bad}:2: incoming.port: 70000" in text
        assert f"{bad}:4: rule 1: action:" in text
    same = (file_of(server), file_of(server))
    assert "--log" in run("diff", *same, status=2)
    assert "No such file" in run("diff", *same, "--log", "/nowhere.log", status=2)
    assert "/nowhere.toml" in run("diff", "/nowhere.toml", "/nowhere.toml", "--log", "x", status=2)
    assert "--since" in run("diff", *same, "--log", "x", "--since", "yesterday", status=2)
    (tmp_path / "journal").write_text('Nov 23 09:47:58 vm usocksd[1]: 2026-11-23T09:47:58Z vm usocksd info: "x"\n')
    assert "1 line could not be read (a journal" in run("diff", *same, "--log", str(tmp_path / "journal"), status=2)


# ---- fifty rules


@pytest.fixture
def fifty(tmp_path: Path, dns: NameServer) -> Path:
    """A configuration of fifty rules."""
    rules = [f'[incoming]\nallow_from = ["0.0.0.0/0"]\n[dns]\nservers = ["{dns.address}"]\n']
    for number in range(50):
        condition = (
            f'to = [".department-{number}.example", "10.{number}.0.0/16"]',
            f'from = ["192.168.{number}.0/24"]',
            f"ports = [{number}, {1000 + number}]",
        )[number % 3]
        action = "allow" if number % 2 else "deny"
        rules.append(f'[[rule]]\nname = "department {number}, rule"\naction = "{action}"\n{condition}\n')
    path = tmp_path / "fifty.toml"
    path.write_text("".join(rules))
    return path


def test_fifty_rules_fit_on_a_screen(fifty: Path, tmp_path: Path) -> None:
    text = run("explain", str(fifty), "--from", "203.0.113.1", "www.department-48.example:443", status=1)
    lines = text.splitlines()
    assert len(lines) <= 24
    assert max(map(len, lines)) <= 110
    assert lines[0] == "203.0.113.1 to www.department-48.example:443: denied by department 48, rule (line 197)"
    assert lines[-1] == '  department 48, rule (line 197): denies it, to lists ".department-48.example"'
    assert "  48 rules do not match:" in lines

    log = tmp_path / "access.log"
    record = {
        "logged_at": "2026-11-23T09:00:00.000000Z",
        "message": "proxy starts",
        "type": "access",
        "client_addr": "203.0.113.1:4000",
        "dest_port": 443,
        "candidates": ["203.0.113.5 allowed default"],
    }
    hosts = [f"www.department-{number}.example" for number in range(50)]
    log.write_text("".join(json.dumps(record | {"dest_host": host}) + "\n" for host in hosts))
    empty = tmp_path / "empty.toml"
    empty.write_text('[incoming]\nallow_from = ["0.0.0.0/0"]\n')
    lines = run("diff", str(empty), str(fifty), "--log", str(log), status=1).splitlines()
    assert len(lines) <= 24
    # Every third rule has hosts, and every second of these denies them.
    assert lines[2] == "41 decided the same, 9 differently, 0 unknown"
    assert "9 would be denied" in lines
    assert lines[-1] == "         4  in 4 more groups (--limit 0 shows all)"
