"""The verb connections: selection, order, rates, and screens."""

import argparse
import json
import os
import pty
import selectors
import signal
import subprocess
import time
from collections.abc import Callable
from typing import Any

import pytest

from usocksd.serve.verbs.selection import add_options, select

Bench = Any
Make = Callable[..., dict[str, Any]]


def answer(connections: list[dict[str, Any]], partial: list[int] | None = None) -> dict[str, Any]:
    """An answer of the daemon; `partial` are workers that were too busy to list all."""
    return {"connections": connections, "partial": partial or []}


def test_a_table(bench: Bench, connection: Make) -> None:
    before = connection(1, name="www.beyond.example", user="alice")
    after = before | {"tx_bytes": 1000, "rx_bytes": 1002000, "age": 3725.0}
    other = connection(2, state="handshake", destination=None, egress=None, rule=None, tx_bytes=0, rx_bytes=0)
    bench.start(connections=[answer([before, other]), answer([after, other])])
    title, heading, *rows = bench.lines("connections")
    assert title.startswith("2 connections, tx 0 B/s, rx ")
    columns = "client destination name user rule egress state age idle tx rx tx/s rx/s worker"
    assert " ".join(heading.split()) == columns
    # As wide as it needs to be: nobody's terminal.
    assert len(heading) > 130
    first, second = rows
    start = "198.51.100.10:40001  203.0.113.80:80  www.beyond.example  alice  default  192.0.2.1:51278  relay"
    assert first.startswith(start)
    assert first[len(start) :].split()[:8] == ["1h", "02m", "0.5s", "1000", "B", "979", "KiB", "0"]
    unknown = "198.51.100.10:40002 - - - - - handshake 1m 00s 0.5s 0 B 0 B 0 B/s 0 B/s 4712"
    assert " ".join(second.split()) == unknown


def test_nothing_to_list(bench: Bench) -> None:
    bench.start(connections=answer([]))
    title, _ = bench.lines("connections")
    assert title == "0 connections, tx 0 B/s, rx 0 B/s"
    assert bench.json("connections") == {"ok": True, "connections": [], "partial": []}


def test_rates(bench: Bench, connection: Make) -> None:
    old, gone, new = connection(1), connection(2), connection(3, tx_bytes=50000, rx_bytes=0, age=0.1)
    grown = old | {"tx_bytes": 51000, "rx_bytes": 102000}
    bench.start(connections=[answer([old, gone]), answer([new, grown])])
    listed = bench.json("connections")["connections"]
    found = [next(each for each in listed if each["id"] == wanted["id"]) for wanted in (old, new)]
    assert len(listed) == 2
    # Half a second and what the machine takes on top.
    assert 50000 / 5 < found[0]["tx_rate"] <= 50000 / 0.5
    assert found[0]["rx_rate"] == pytest.approx(2 * found[0]["tx_rate"], abs=1)
    assert found[1]["tx_rate"] == 50000 / 0.5
    assert {key: found[0][key] for key in grown} == grown


def test_rates_are_those_between_the_readings(bench: Bench, connection: Make) -> None:
    """Rates use the times of the readings; a connection that one answer has left out has none."""
    old = connection(1, at=100.0)
    grown = old | {"at": 110.0, "tx_bytes": 2000}
    missed = connection(2, at=110.0, worker=4713)
    bench.start(connections=[answer([old], partial=[4713]), answer([grown, missed])])
    found = {each["id"]: (each["tx_rate"], each["rx_rate"]) for each in bench.json("connections")["connections"]}
    assert found == {old["id"]: (100.0, 0.0), missed["id"]: (None, None)}


def test_an_answer_that_is_not_whole(bench: Bench, connection: Make) -> None:
    bench.start(connections=[answer([], partial=[4712]), answer([connection()], partial=[4713])])
    title, _, row = bench.lines("connections")
    assert title == "1 connection, tx 0 B/s, rx 0 B/s; not all: no whole answer in time from 1 worker"
    assert row.split()[-3:] == ["-", "-", "4712"]
    assert bench.json("connections")["partial"] == [4713]


def test_texts_of_clients_are_not_markup(bench: Bench, connection: Make) -> None:
    evil = "a\x1b]0;owned\x07\r\n[bold red]b\u202e\ud800[/]:smile:"
    bench.start(connections=answer([connection(name=evil, user="[link=http://x]u[/link]")]))
    out = "\n".join(bench.lines("connections"))
    assert r"a\x1b]0;owned\x07\r\n[bold red]b\u202e\ud800[/]:smile:" in out
    assert "[link=http://x]u[/link]" in out
    assert "\x1b" not in out
    ascii_only = dict(os.environ) | {"PYTHONIOENCODING": "ascii"}
    bench.answers = {"connections": answer([connection(name="bücher.example")])}
    assert r"b\xfccher.example" in "\n".join(bench.lines("connections", env=ascii_only))


def test_no_colour_for_a_pipe(bench: Bench, connection: Make) -> None:
    bench.start(connections=answer([connection()]))
    forced = dict(os.environ) | {"FORCE_COLOR": "1", "TERM": "xterm-256color"}
    assert "\x1b" not in "\n".join(bench.lines("connections", env=forced))


@pytest.fixture
def five(connection: Make) -> list[dict[str, Any]]:
    many = [
        connection(
            1, client="10.0.0.9:1000", destination="203.0.113.80:443", name="www.Example.com.", age=10, user="bob"
        ),
        connection(2, client="10.0.0.10:1000", destination="203.0.113.81:443", name="badexample.com", age=50, idle=40),
        connection(3, client="[2001:db8::9]:1", destination="[2001:db8::80]:443", age=40, tx_bytes=10**6, user="bobby"),
        connection(
            4, client="[::ffff:10.0.1.1]:1", destination=None, name="example.com", age=30, egress=None, rule=None
        )
        | {"peer": "10.9.0.1:4000"},
        connection(5, client="10.1.0.1:1000", destination="203.0.113.80:80", age=7200, rule="allow_sites .example.net"),
    ]
    return [each | {"tx_rate": 0.0, "rx_rate": float(number)} for number, each in enumerate(many, 1)]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("", "54321"),
        ("--reverse", "12345"),
        ("--sort age", "52341"),
        ("--sort age --reverse", "14325"),
        ("--sort idle --limit 1", "2"),
        ("--sort bytes --limit 2", "35"),
        ("--sort client", "12453"),
        ("--sort client --reverse --limit 1", "3"),
        ("--sort destination", "53241"),
        ("--sort user", "52413"),
        ("--sort worker --limit 0", ""),
        ("--client 10.0.0.0/8", "5421"),
        ("--client 10.0.0.9", "1"),
        ("--client 2001:db8::/32", "3"),
        ("--destination 203.0.113.80", "51"),
        ("--destination 203.0.113.80:443", "1"),
        ("--destination 203.0.113.0/24:443", "21"),
        ("--destination 2001:db8::80", "3"),
        ("--destination [2001:db8::80]:443", "3"),
        ("--destination [2001:db8::80]:80", ""),
        ("--destination example.com", "41"),
        ("--destination .EXAMPLE.com.", "41"),
        ("--destination example.com:443", "1"),
        ("--destination :443", "321"),
        ("--destination :443 --client 10.0.0.0/8", "21"),
        ("--user bob", "1"),
        ("--rule allow_sites", "5"),
        ("--egress 192.0.2.0/24", "5321"),
        ("--peer 10.9.0.0/16", "4"),
        ("--min-age 45", "52"),
        ("--min-age 2h", "5"),
        ("--min-idle 40s", "2"),
    ],
)
def test_selection(five: list[dict[str, Any]], words: str, expected: str) -> None:
    parser = argparse.ArgumentParser()
    add_options(parser, ("peer", "user", "rule", "egress"))
    args = parser.parse_args(words.split())
    assert "".join(each["id"][-1] for each in select(five, args)[: args.limit]) == expected


def test_the_order_and_limit_of_json(bench: Bench, five: list[dict[str, Any]]) -> None:
    bench.start(connections=answer(five))
    # All without a byte per second by now: the oldest first.
    found = bench.json("connections", "--limit", "3")["connections"]
    assert [each["id"][-1] for each in found] == ["5", "2", "3"]


def test_the_title_tells_what_is_not_shown(bench: Bench, five: list[dict[str, Any]]) -> None:
    bench.start(connections=answer(five))
    title, _, *rows = bench.lines("connections", "--client", "10.0.0.0/8", "--limit", "2")
    assert title == "4 of 5 connections, tx 0 B/s, rx 0 B/s; 2 shown"
    assert len(rows) == 2


def test_watch_into_a_pipe(bench: Bench, connection: Make) -> None:
    bench.start(connections=answer([connection()]))
    command = bench.command("connections", "--watch", "0.1")
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as verb:
        assert verb.stdout is not None
        seen = [verb.stdout.readline() for _ in range(8)]
        verb.send_signal(signal.SIGINT)
        _rest, errors = verb.communicate(timeout=20)
    assert (verb.returncode, errors) == (0, "")
    for title, heading, row, empty in (seen[:4], seen[4:]):
        assert " 1 connection, " in title
        assert heading.startswith("client")
        assert row.startswith("198.51.100.10:40001")
        assert empty == "\n"


def test_watch_as_json_until_the_daemon_ends(bench: Bench, connection: Make) -> None:
    bench.start(connections=answer([connection()]))
    command = bench.command("connections", "--watch", "0.1", "--json")
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as verb:
        assert verb.stdout is not None
        for _ in range(2):
            assert json.loads(verb.stdout.readline())["connections"][0]["tx_rate"] == 0
        bench.lines("drain")
        _, errors = verb.communicate(timeout=20)
    assert verb.returncode == 1
    assert "usocksd connections: " in errors
    assert "Traceback" not in errors


class Terminal:
    """A terminal, and a verb in its foreground."""

    def __init__(self, command: list[str], *, columns: int = 100, lines: int = 10) -> None:
        self.pid, self._fd = pty.fork()
        if not self.pid:
            os.environ |= {"COLUMNS": str(columns), "LINES": str(lines), "TERM": "xterm-256color"}
            os.execv(command[0], command)
        self.seen = b""

    def wait_for(self, text: bytes, times: int = 1) -> None:
        deadline = time.monotonic() + 20
        while self.seen.count(text) < times:
            with selectors.DefaultSelector() as selector:
                selector.register(self._fd, selectors.EVENT_READ)
                ready = selector.select(max(deadline - time.monotonic(), 0))
            assert ready, f"no {text!r} in {self.seen!r}"
            self.seen += os.read(self._fd, 1 << 16)

    def type(self, keys: bytes) -> None:
        os.write(self._fd, keys)

    def end(self) -> int:
        """Read to the end; the exit status."""
        try:
            while data := os.read(self._fd, 1 << 16):
                self.seen += data
        except OSError:
            pass  # EIO: nobody has the other side any more
        os.close(self._fd)
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


ENTER, LEAVE = b"\x1b[?1049h", b"\x1b[?1049l"


def test_watch_on_a_terminal(bench: Bench, connection: Make) -> None:
    many = [connection(number, name=f"host{number}.example\x1b[2J") for number in range(200)]
    bench.start(connections=answer(many))
    terminal = Terminal(bench.command("connections", "--watch", "0.1"))
    # It redraws, in a screen of its own that is left on Ctrl-C.
    terminal.wait_for(b"200 connections, ", 3)
    terminal.type(b"\x03")
    assert terminal.end() == 0
    assert terminal.seen.count(ENTER) == terminal.seen.count(LEAVE) == 1
    assert b"; 8 shown" in terminal.seen
    assert b"\x1b[2J" not in terminal.seen.replace(b"\x1b[2J\x1b[H", b"")
    assert b"Traceback" not in terminal.seen


def test_a_terminal_gets_what_fits(bench: Bench, connection: Make) -> None:
    bench.start(connections=answer([connection(name="n" * 250)]))
    terminal = Terminal(bench.command("connections"), columns=100)
    assert terminal.end() == 0
    lines = terminal.seen.decode().splitlines()
    assert len(lines) == 3
    assert "…" in lines[2]
    assert b"n" * 100 not in terminal.seen
