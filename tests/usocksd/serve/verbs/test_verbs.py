"""The output and exit status of each verb."""

import json
import os
import signal
import socket
import subprocess
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import pytest

from usocksd.serve.verbs.client import ControlClient, VerbError
from usocksd.serve.verbs.show import duration, size

Bench = Any

STATUS = {
    "name": "usocksd",
    "version": "1.0",
    "form": "compiled",
    "pid": 4711,
    "uptime": 3725.0,
    "state": "ready",
    "config": {"file": "/etc/usocksd.toml", "generation": 3, "since": "2026-11-23T12:00:00Z", "last_reload": None},
    "listening": ["127.0.0.1:1080", "[::1]:1080"],
    "metrics": "127.0.0.1:1082",
    "log": {"level": "info", "dropped": 0, "failing": None},
    "connections": {"live": 12, "total": 3456, "limit": 0, "per_client": 0, "shed": 0, "turned_away": 0},
    "rates": {"connections": 1.5, "tx_bytes": 1000.0, "rx_bytes": 20480.0},
    "partial": [],
    "waiting": 0,
    "generations": [
        {
            "generation": 3,
            "state": "serving",
            "workers": [
                {
                    "pid": 4712,
                    "slot": 0,
                    "state": "serving",
                    "version": "1.0",
                    "live": 5,
                    "most": 480000,
                    "paused": False,
                    "descriptors": {"open": 20, "limit": 1048576},
                    "rss": 31457280,
                    "cpu": 1.25,
                    "silent": 0.25,
                }
            ],
        }
    ],
    "daemon": {},
}


def test_status(bench: Bench) -> None:
    bench.start(status=STATUS)
    assert bench.lines("status") == [
        "usocksd         ready, version 1.0 (compiled), pid 4711, up 1h 02m",
        "configuration   /etc/usocksd.toml, generation 3 since 2026-11-23T12:00:00Z",
        "listening       127.0.0.1:1080, [::1]:1080",
        "metrics         127.0.0.1:1082",
        "log             level info, 0 records dropped",
        "connections     12 live, 3456 in all",
        "under pressure  0 shed, 0 turned away",
        "waiting         0 to be accepted",
        "rates           1.5 connections/s, tx 1000 B/s, rx 20 KiB/s",
        "",
        "generation  worker  slot  state    version  connections          files  memory   cpu  silent",
        "3 serving     4712     0  serving  1.0      5 of 480000  20 of 1048576  30 MiB  1.2s    0.2s",
    ]
    assert bench.json("status") == {"ok": True, **STATUS}


REFUSED = {"at": "2026-11-23T12:05:00Z", "ok": False, "faults": ["port: 0: expected\x1b[2J more", "x: y"]}
LIMITS = {"live": 12, "total": 3456, "limit": 100, "per_client": 5, "shed": 1, "turned_away": 2}
WELL = {"upstream": "socks5://192.0.2.1:1080", "up": True, "why": None}
DOWN = {"upstream": "http://192.0.2.2:3128", "up": False, "why": "connect 192.0.2.2:3128: Connection refused"}
SLOW = {"upstream": "socks5://192.0.2.3:1080", "up": True, "why": None, "slow": True, "latency": 2.01}
GROUPS = {
    "default": {"policy": "failover", "upstreams": [WELL]},
    "far": {"policy": "sticky", "upstreams": [DOWN, WELL]},
    "slow": {"policy": "sticky", "upstreams": [SLOW, WELL]},
}
WITHOUT, WITH = WELL | {"udp": False}, WELL | {"udp": None}
UDP_GROUPS = {
    "default": {"policy": "failover", "when_no_udp": "refuse", "upstreams": [WITHOUT]},
    "direct": {"policy": "failover", "when_no_udp": "direct", "upstreams": [WITHOUT]},
    "both": {"policy": "sticky", "when_no_udp": "refuse", "upstreams": [WITHOUT, WITH]},
}
SIX = [f"198.51.100.{number}" for number in range(10, 16)]
POOLS = {
    "default": {"addresses": [], "local": [], "listed": {}},
    "well": {"addresses": SIX[:1], "local": SIX[:1], "listed": {}},
    "partners": {"addresses": SIX, "local": SIX[5:], "listed": {SIX[5]: ["bl.example", "other.example"]}},
}


@pytest.mark.parametrize(
    ("changes", "shown"),
    [
        ({"state": "broken"}, ["usocksd         broken, version 1.0 (compiled), pid 4711, up 1h 02m"]),
        (
            {"config": {"file": None, "generation": 3, "since": "2026-11-23T12:00:00Z", "last_reload": REFUSED}},
            [
                "configuration   no file, generation 3 since 2026-11-23T12:00:00Z",
                "last reload     2026-11-23T12:05:00Z, refused:",
                r"                port: 0: expected\x1b[2J more",
                "                x: y",
            ],
        ),
        (
            {"listening": [], "metrics": None, "connections": LIMITS, "waiting": 7},
            [
                "listening       nowhere",
                "metrics         nowhere",
                "log             level info, 0 records dropped",
                "connections     12 live, 3456 in all, limit 100, limit per client 5",
                "under pressure  1 shed, 2 turned away",
                "waiting         7 to be accepted",
            ],
        ),
        (
            {"log": {"level": "info", "dropped": 1, "failing": "No space left on device"}},
            ["log             level info, 1 record dropped; can't be written: No space left on device"],
        ),
        (
            {"partial": [4712, 4713]},
            ["rates           1.5 connections/s, tx 1000 B/s, rx 20 KiB/s; without 2 workers too busy to answer"],
        ),
        (
            {"daemon": {"upstreams": GROUPS}},
            [
                "upstreams default  1 of 1 up",
                "upstreams far      1 of 2 up; sticky; down: http://192.0.2.2:3128 (connect 192.0.2.2:3128: Connection"
                " refused)",
                "upstreams slow     2 of 2 up; sticky; slow: socks5://192.0.2.3:1080 (2.0 s)",
            ],
        ),
        (
            {"daemon": {"udp": True, "upstreams": UDP_GROUPS}},
            [
                "upstreams default  1 of 1 up; without UDP: socks5://192.0.2.1:1080",
                "upstreams direct   1 of 1 up; without UDP: socks5://192.0.2.1:1080",
                "upstreams both     2 of 2 up; sticky; without UDP: socks5://192.0.2.1:1080",
            ],
        ),
        (
            {"daemon": {"pools": POOLS}, "generations": []},
            [
                "egress well      1 address",
                "egress partners  6 addresses; not on this host: 198.51.100.10, 198.51.100.11, 198.51.100.12,"
                " 198.51.100.13, 1 more; listed: 198.51.100.15 (bl.example, other.example)",
            ],
        ),
    ],
)
def test_status_in_trouble(bench: Bench, changes: dict[str, Any], shown: list[str]) -> None:
    bench.start(status=STATUS | changes)
    lines = bench.lines("status")
    at = lines.index(shown[0])
    assert lines[at : at + len(shown)] == shown


def test_reload(bench: Bench) -> None:
    answer = {"generation": 4, "confirm_within": None, "warnings": []}
    bench.start(reload=answer)
    assert bench.lines("reload") == ["usocksd has reloaded: generation 4 serves"]
    assert bench.json("reload") == {"ok": True, **answer}


def test_reload_on_trial(bench: Bench) -> None:
    bench.start(
        reload={"generation": 4, "confirm_within": 59.9, "warnings": ["x.toml:3: rule 1: \x1b[31m: remove it"]},
        confirm={"confirmed": True},
    )
    result = bench.run("reload", "--confirm", "60")
    assert result.stdout.splitlines() == [
        "usocksd has reloaded: generation 4 serves",
        "for 60 s: then the previous configuration comes back, unless `usocksd confirm` comes first. Open a new"
        " connection now, to see whether it works",
    ]
    assert result.stderr == "usocksd reload: warning: x.toml:3: rule 1: \\x1b[31m: remove it\n"
    assert bench.lines("confirm") == ["confirmed: the configuration stays"]
    for wrong in ("0", "86401", "1m", "-1"):
        assert bench.run("reload", f"--confirm={wrong}").returncode == 2


def test_nothing_to_confirm(bench: Bench) -> None:
    bench.start(confirm={"confirmed": False})
    assert bench.lines("confirm") == ["nothing to confirm: no configuration is on trial"]
    assert bench.json("confirm") == {"ok": True, "confirmed": False}


def test_reload_with_faults(bench: Bench) -> None:
    bench.start(reload={"faults": ["70000", "\x1b[31m"]})
    result = bench.run("reload")
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr.splitlines() == [
        "usocksd reload: bad configuration /etc/usocksd.toml",
        "usocksd reload: /etc/usocksd.toml: port: 70000: expected less",
        r"usocksd reload: /etc/usocksd.toml: port: \x1b[31m: expected less",
    ]
    result = bench.run("reload", "--json")
    assert result.returncode == 1
    assert json.loads(result.stdout)["faults"] == [
        "/etc/usocksd.toml: port: 70000: expected less",
        "/etc/usocksd.toml: port: \x1b[31m: expected less",
    ]


def test_drain(bench: Bench) -> None:
    bench.start()
    assert bench.lines("drain") == [
        "usocksd accepts no more connections, and ends when those that there are have ended"
    ]
    bench.join()
    assert not bench.control.exists()


def test_log_level(bench: Bench) -> None:
    bench.start(log_level={"level": "info"})
    assert bench.lines("log-level") == ["info"]
    assert bench.lines("log-level", "debug") == ["debug"]
    assert bench.json("log-level", "debug") == {"ok": True, "level": "debug"}


@pytest.mark.parametrize(
    "words",
    [
        ["log-level", "loud"],
        ["status", "--limit", "3"],
        ["connections", "--sort", "luck"],
        ["connections", "--client", "here"],
        ["connections", "--destination", "a b"],
        ["connections", "--destination", "443"],
        ["connections", "--destination", ":70000"],
        ["connections", "--min-age", "old"],
        ["connections", "--upstream", "socks5"],
        ["connections", "--watch", "0"],
        ["connections", "--limit", "-1"],
        ["start"],
    ],
)
def test_usage_errors(bench: Bench, words: list[str]) -> None:
    result = bench.run(*words)
    assert (result.returncode, result.stdout) == (2, "")
    assert "usage:" in result.stderr


# ---- where the daemon is


def test_the_socket_of_the_configuration(bench: Bench, tmp_path: Path) -> None:
    bench.start(log_level={"level": "info"})
    bench.config.write_text(f'control = "{bench.control}"\n[incoming]\nport = "bad, and of no interest"\n')
    elsewhere = tmp_path / "elsewhere.toml"
    bench.config.rename(elsewhere)
    bench.config.write_text('control = "/nonexistent/from-the-default-file"')
    assert "/nonexistent/from-the-default-file" in bench.run("log-level").stderr
    assert bench.lines("-f", str(elsewhere), "log-level") == ["info"]
    assert bench.lines("log-level", "-f", str(elsewhere)) == ["info"]
    assert bench.lines("log-level", "--control", str(bench.control)) == ["info"]
    assert bench.lines("-f", "/nonexistent", "log-level", "--control", str(bench.control)) == ["info"]


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        (b"control = ", "Invalid value (at end of document)"),
        (b"control = 5", "control is not a string"),
        (b"\xff", "'utf-8' codec can't decode byte 0xff in position 0: invalid start byte"),
        (None, "Is a directory"),
    ],
)
def test_a_bad_configuration_does_not_prevent_it(bench: Bench, text: bytes | None, complaint: str) -> None:
    bench.start(log_level={"level": "info"})
    if text is None:
        bench.config.mkdir()
    else:
        bench.config.write_bytes(text)
    result = bench.run("log-level")
    assert (result.returncode, result.stdout) == (0, "info\n")
    assert result.stderr == f"usocksd log-level: {bench.config}: {complaint}; trying {bench.control}\n"


def test_a_configuration_that_is_not_there(bench: Bench) -> None:
    bench.start(log_level={"level": "info"})
    assert bench.lines("log-level") == ["info"]
    result = bench.run("-f", "/nonexistent.toml", "log-level")
    assert (result.returncode, result.stdout) == (0, "info\n")
    assert "/nonexistent.toml: No such file or directory; trying" in result.stderr


def test_no_control_socket(bench: Bench) -> None:
    bench.config.write_text('control = ""')
    result = bench.run("status")
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr == f"usocksd status: {bench.config} says that there is no control socket\n"


def fails(bench: Bench, *words: str) -> str:
    """The complaint of a verb that fails."""
    result = bench.run(*words)
    assert (result.returncode, result.stdout) == (1, "")
    (line,) = result.stderr.splitlines()
    assert isinstance(line, str)
    return line


def test_no_daemon(bench: Bench) -> None:
    assert fails(bench, "status") == f"usocksd status: no usocksd runs: there is no control socket {bench.control}"
    bench.start()
    bench.die()
    assert fails(bench, "status", "--json") == (
        f"usocksd status: no usocksd runs: nobody listens on its control socket {bench.control}"
    )
    assert "AF_UNIX path too long" in fails(bench, "status", "--control", "x" * 200)


@pytest.mark.parametrize("said", [b"", b"220 mail.example ESMTP\r\n", b"[]\n", b'{"ok"'])
def test_something_else_answers(bench: Bench, said: bytes) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(bench.control))
        listener.listen()
        with subprocess.Popen(bench.command("status"), stderr=subprocess.PIPE, text=True) as verb:
            sock, _ = listener.accept()
            with sock:
                sock.sendall(said)
            _, errors = verb.communicate(timeout=20)
    assert verb.returncode == 1
    assert ("is no usocksd" if said else "without an answer") in errors
    assert "Traceback" not in errors


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to be somebody else")
def test_no_permission(bench: Bench) -> None:
    bench.start(log_level={"level": "info"})
    # The verb keeps root's files and loses root's power over the permissions of others.
    os.chown(bench.control, 65534, 65534)
    os.chmod(bench.control, 0o600)
    words = ["setpriv", "--bounding-set=-all", "--inh-caps=-all", *bench.command("log-level")]
    result = subprocess.run(words, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr == f"usocksd log-level: no permission to use {bench.control}: only its owner and root may\n"


def test_a_daemon_that_hangs(bench: Bench) -> None:
    with socket.socket(socket.AF_UNIX) as hung, ExitStack() as stack:
        hung.bind(str(bench.control))
        hung.listen(1)
        client = ControlClient("usocksd", str(bench.control))
        with pytest.raises(VerbError, match=r"usocksd does not answer on .*control.sock \(waited 0.2 s\)"):
            client.ask("status", timeout=0.2)
        # Soon nobody else can even wait.
        with suppress(BlockingIOError):
            while True:
                sock = stack.enter_context(socket.socket(socket.AF_UNIX))
                sock.setblocking(False)
                sock.connect(str(bench.control))
        assert "usocksd does not answer on" in fails(bench, "status")


def test_interrupted(bench: Bench) -> None:
    bench.start(status={"hang": True}, log_level={"level": "info"})
    with subprocess.Popen(bench.command("status"), stdout=subprocess.PIPE, stderr=subprocess.PIPE) as verb:
        # Loaded and asking: it has connected when its socket is there.
        while not any("socket:" in link for link in links(verb.pid)):
            assert verb.poll() is None
        verb.send_signal(signal.SIGINT)
        assert verb.communicate(timeout=20) == (b"", b"")
    assert verb.returncode == 130


def links(pid: int) -> list[str]:
    found = []
    for fd in Path(f"/proc/{pid}/fd").iterdir():
        try:
            found.append(str(fd.readlink()))
        except FileNotFoundError:
            continue
    return found


def test_a_reader_that_has_seen_enough(bench: Bench) -> None:
    bench.start(status=STATUS)
    reading, writing = os.pipe()
    os.close(reading)
    result = subprocess.run(
        bench.command("status", "--json"), stdout=writing, stderr=subprocess.PIPE, text=True, check=False
    )
    os.close(writing)
    assert (result.returncode, result.stderr) == (2, "")


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0.0s"),
        (-1, "0.0s"),
        (9.94, "9.9s"),
        (9.96, "10s"),
        (59.4, "59s"),
        (59.6, "1m 00s"),
        (3599.6, "1h 00m"),
        (3725, "1h 02m"),
        (86399.9, "1d 00h"),
        (270000, "3d 03h"),
    ],
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1023.6, "1.0 KiB"),
        (1024, "1.0 KiB"),
        (10 * 1024, "10 KiB"),
        (1023.6 * 1024, "1.0 MiB"),
        (3200000000.0, "3.0 GiB"),
        (2**60, "1024 PiB"),
    ],
)
def test_size(count: float, text: str) -> None:
    assert size(count) == text
