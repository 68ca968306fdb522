import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import usocksd
from usocksd.log.formats import Severity
from usocksd.log.log import LEVELS, Log, parse_level, setup

ROOT = Path(usocksd.__file__).parents[1]
LIMIT = 20.0

StartLog = Callable[..., Log]


@pytest.fixture(autouse=True)
def no_level_in_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CYBOZU_LOG_LEVEL", raising=False)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[StartLog]:
    started: list[Log] = []

    def start(level: str | None = None, format: str | None = "json") -> Log:
        started.append(setup("usocksd", str(tmp_path / "log"), level, format))
        return started[-1]

    yield start
    for log in started:
        log.close(LIMIT)


def written(log: Log, tmp_path: Path) -> list[dict[str, Any]]:
    log.close(LIMIT)
    return [json.loads(text) for text in (tmp_path / "log").read_bytes().splitlines()]


def test_names_of_levels() -> None:
    numbers = {"critical": 2, "crit": 2, "error": 3, "warning": 4, "warn": 4, "information": 6, "info": 6, "debug": 7}
    assert {name: int(parse_level(name)) for name in LEVELS} == numbers
    for name in ("", "INFO", "trace"):
        with pytest.raises(ValueError, match="no such log level"):
            parse_level(name)


def test_where_the_level_comes_from(start: StartLog, monkeypatch: pytest.MonkeyPatch) -> None:
    assert start().level is Severity.INFO
    assert start("").level is Severity.INFO
    monkeypatch.setenv("CYBOZU_LOG_LEVEL", "warn")
    assert start().level is Severity.WARNING
    assert start("debug").level is Severity.DEBUG
    monkeypatch.setenv("CYBOZU_LOG_LEVEL", "nonsense")
    assert start().level is Severity.INFO


def test_bad_names_and_places(start: StartLog, tmp_path: Path) -> None:
    threads = len(os.listdir("/proc/self/task"))
    with pytest.raises(ValueError, match="no such log level: 'loud'"):
        start("loud")
    with pytest.raises(ValueError, match="no such log format: 'xml'"):
        start(format="xml")
    with pytest.raises(FileNotFoundError):
        setup("usocksd", str(tmp_path / "none" / "log"), None, None)
    assert len(os.listdir("/proc/self/task")) == threads
    assert not logging.getLogger("usocksd").handlers


@pytest.mark.parametrize("name", ["usocksd.names.resolver", "transocks"])
def test_standard_loggers(start: StartLog, tmp_path: Path, name: str) -> None:
    log = start()
    logging.getLogger(name).warning("look at %s", "this", extra={"fields": {"n": 1, "x": None}})
    (record,) = written(log, tmp_path)
    assert record.pop("logged_at").endswith("Z")
    assert record == {
        "topic": "usocksd",
        "severity": "warning",
        "utsname": log.formatter.utsname,
        "message": "look at this",
        "n": 1,
        "x": None,
    }


def test_severities_and_set_level(start: StartLog, tmp_path: Path) -> None:
    log = start("debug")
    logger = logging.getLogger("usocksd.test")
    for level in Severity:
        log.set_level(level)
        assert [each for each in Severity if log.enabled(each)] == [each for each in Severity if each <= level]
        for number in (1, 10, 15, 20, 25, 30, 40, 50, 60):
            logger.log(number, "at %d", number)
    got = [(record["severity"], record["message"]) for record in written(log, tmp_path)]
    critical = [("critical", "at 50"), ("critical", "at 60")]
    error = [("error", "at 40"), *critical]
    warning = [("warning", "at 30"), *error]
    info = [("info", "at 20"), ("info", "at 25"), *warning]
    debug = [("debug", "at 10"), ("debug", "at 15"), *info]
    assert got == critical + error + warning + info + debug


def test_exceptions(start: StartLog, tmp_path: Path) -> None:
    log = start()
    try:
        raise OSError(5, "broken")
    except OSError:
        logging.getLogger("usocksd").exception("it failed", extra={"fields": {"n": 1}})
        logging.getLogger("usocksd").exception("it failed", extra={"fields": {"error": "mine"}})
    logging.getLogger("usocksd").error("nothing", exc_info=True)
    first, second, third = written(log, tmp_path)
    assert (first["severity"], first["error"], first["n"]) == ("error", "[Errno 5] broken", 1)
    assert first["traceback"].startswith("Traceback (most recent call last):\n")
    assert "test_log.py" in first["traceback"]
    assert second["error"] == "mine"
    assert "error" not in third


class Unprintable:
    def __str__(self) -> str:
        raise RuntimeError("no text")


@pytest.mark.parametrize(
    ("args", "fields"),
    [
        ((), {"Bad-Key": 1}),
        ((), {"message": 1}),
        ((), {"k": Unprintable()}),
        ((), 5),
        ((1, 2), {}),
        ((Unprintable(),), {}),
    ],
    ids=["key", "reserved key", "value", "no mapping", "number of arguments", "argument"],
)
def test_mistakes_in_a_log_call(start: StartLog, tmp_path: Path, args: tuple[object, ...], fields: object) -> None:
    log = start()
    logging.getLogger("usocksd").info("hello %s", *args, extra={"fields": fields})
    (record,) = written(log, tmp_path)
    assert record["message"] == "hello %s"
    assert record["severity"] == "info"
    if args or fields:
        assert "log_error" in record


def test_close_gives_the_loggers_back(start: StartLog) -> None:
    log = start("error")
    logger = logging.getLogger("transocks")
    before = (logger.propagate, len(logger.handlers), logger.level)
    log.close(LIMIT)
    after = (logger.propagate, len(logger.handlers), logger.level)
    assert (before, after) == ((False, 1, logging.ERROR), (True, 0, logging.NOTSET))


STDERR = """
import logging
from usocksd.log.log import setup
log = setup("transocks", None, None, "json")
for number in range({count}):
    logging.getLogger("transocks").info("x" * 100, extra={{"fields": {{"n": number}}}})
log.close({timeout})
print(log.dropped)
"""


def test_a_process_ends_though_nobody_reads_its_stderr() -> None:
    reader, writer = os.pipe()
    script = STDERR.format(count=5000, timeout=0.1)
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=writer, check=True, timeout=LIMIT)
    os.close(writer)
    with os.fdopen(reader, "rb") as stream:
        numbers = [json.loads(text)["n"] for text in stream]
    assert numbers == list(range(len(numbers)))
    assert len(numbers) + int(done.stdout) == 5000


@pytest.mark.parametrize("broken", [True, False])
def test_a_process_lives_though_its_stderr_breaks(broken: bool) -> None:
    reader, writer = os.pipe()
    if broken:
        os.close(reader)
    command = [sys.executable, "-c", STDERR.format(count=10, timeout=LIMIT)]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=writer, check=True)
    os.close(writer)
    assert done.stdout == (b"10\n" if broken else b"0\n")
    if not broken:
        with os.fdopen(reader, "rb") as stream:
            assert [json.loads(text)["n"] for text in stream] == list(range(10))
