"""A configuration on trial goes by itself unless somebody confirms it."""

from __future__ import annotations

import os
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from daemons import free_port, lives, wait_until
from tiny import Tiny

NOBODY = "configuration not confirmed in time: going back to the previous one"
STILL = "nothing has changed: the configuration in force stays"


def files(tiny: Tiny) -> list[str]:
    """The content, as each generation's workers read it, of the file that their configuration names."""
    return [record["file"] for record in tiny.records("tiny") if "file" in record]


def warned(tiny: Tiny) -> list[str]:
    """The warnings of the configurations that have come into force."""
    messages = [record["message"] for record in tiny.records()]
    return [message.rpartition(" ")[2] for message in messages if message.startswith(f"{tiny.config}: ")]


def test_it_goes_by_itself(tmp_path: Path) -> None:
    """The text and the files before the trial come back, whatever is on disk now; also after a crash."""
    named, first, second = tmp_path / "named", free_port(), free_port()
    named.write_text("old")
    with Tiny(tmp_path, ports=[first], file=str(named)).ready() as tiny:
        tiny.expected.add("a worker ended")
        client = tiny.client(b"echo", port=first)
        named.write_text("new")
        tiny.write(ports=[second], warning="there is something to say")
        answer = tiny.ask("reload", confirm=2)
        assert (answer["ok"], answer["generation"], answer["warnings"]) == (
            True,
            2,
            [f"{tiny.config}: there is something to say"],
        )
        assert 0 < answer["confirm_within"] <= 2
        assert lives(tiny.client(b"echo", port=second))
        named.write_text("newer")
        (worker,) = (row["pid"] for row in tiny.rows() if row["state"] == "serving")
        os.kill(worker, signal.SIGKILL)
        tiny.record(NOBODY)
        wait_until(lambda: tiny.generation() == 3, "it is back")
        assert files(tiny)[:2] == ["old", "new"]
        assert files(tiny)[-1] == "old"
        status = tiny.ask("status")
        assert status["listening"] == [f"127.0.0.1:{first}"]
        config = status["config"]
        assert (config["generation"], config["confirm_within"], config["last_reload"]["ok"]) == (3, None, False)
        (fault,) = config["last_reload"]["faults"]
        assert fault == f"{tiny.config}: not confirmed within 2 s: what was in force before it is again"
        assert lives(client)
        assert lives(tiny.client(b"echo", port=first))
        assert not tiny.ask("confirm")["confirmed"]
        # The file is unchanged: correcting it is the admin's task.
        assert tiny.ask("reload")["generation"] == 4
        assert tiny.ask("status")["listening"] == [f"127.0.0.1:{second}"]


def test_it_stays_when_it_is_confirmed(tmp_path: Path) -> None:
    """And the next trial goes back to it."""
    with Tiny(tmp_path, warning="first").ready() as tiny:
        assert tiny.ask("confirm") == {"ok": True, "confirmed": False}
        tiny.write(warning="second")
        assert tiny.ask("reload", confirm=86400)["warnings"] == [f"{tiny.config}: second"]
        assert 86000 < tiny.ask("status")["config"]["confirm_within"] <= 86400
        assert tiny.ask("confirm") == {"ok": True, "confirmed": True}
        assert tiny.ask("status")["config"]["confirm_within"] is None
        tiny.write(warning="third")
        assert tiny.ask("reload", confirm=1)["warnings"] == [f"{tiny.config}: third"]
        wait_until(lambda: tiny.generation() == 4, "the second is back")
        assert warned(tiny) == ["first", "second", "third", "second"]


def test_another_reload_is_no_confirmation(tmp_path: Path) -> None:
    """It changes no deadline unless it is on trial itself; the configuration before the first trial comes back."""
    with Tiny(tmp_path, warning="first").ready() as tiny:
        tiny.write(warning="second")
        assert tiny.ask("reload", confirm=86400)["ok"]
        tiny.write(warning="third")
        assert 86000 < tiny.ask("reload")["confirm_within"] <= 86400
        tiny.write(warning="fourth")
        assert tiny.ask("reload", confirm=1)["confirm_within"] <= 1
        wait_until(lambda: tiny.generation() == 5, "the first is back")
        assert warned(tiny)[-1] == "first"


@pytest.mark.parametrize("seconds", [None, 1])
def test_a_reload_under_way_can_t_be_confirmed(tmp_path: Path, seconds: int | None) -> None:
    """Its operator has not seen the effect yet."""
    with Tiny(tmp_path, warning="first").ready() as tiny:
        tiny.write(warning="second")
        assert tiny.ask("reload", confirm=86400)["ok"]
        tiny.write(warning="third")
        text = tiny.config.read_text()
        tiny.config.unlink()
        os.mkfifo(tiny.config)
        with ThreadPoolExecutor() as threads:
            asked = threads.submit(tiny.ask, "reload", **({} if seconds is None else {"confirm": seconds}))
            with tiny.config.open("w") as file:  # opened for reading by now
                refusal = "a reload is under way: confirm what it brings when you have seen that"
                assert tiny.ask("confirm") == {"ok": False, "error": refusal}
                file.write(text)
            assert asked.result()["confirm_within"] > 0
        if seconds is None:
            assert tiny.ask("confirm")["confirmed"]
        else:
            wait_until(lambda: tiny.generation() == 4, "the first is back")


def test_a_trial_that_can_t_begin(tmp_path: Path) -> None:
    with Tiny(tmp_path).ready() as tiny:
        tiny.expected |= {"bad configuration", STILL}
        for seconds in (0, -1, 86401, True, 1.5, "1"):
            answer = tiny.ask("reload", confirm=seconds)
            assert answer == {"ok": False, "error": "confirm: expected seconds, an integer from 1 to 86400"}
        good = tiny.config.read_text()
        tiny.config.write_text("ports = 1")
        assert not tiny.ask("reload", confirm=1)["ok"]
        assert not tiny.ask("confirm")["confirmed"]
        tiny.config.write_text(good)
        assert tiny.ask("reload") == {"ok": True, "generation": 2, "confirm_within": None, "warnings": []}


def test_it_tries_again_to_come_back(tmp_path: Path) -> None:
    with Tiny(tmp_path, timing={"return_again": 0.1}).ready() as tiny:
        tiny.expected |= {"reload failed", STILL}
        assert tiny.ask("reload", confirm=1)["ok"]
        tiny.flag("fail-build").touch()
        tiny.record(STILL)
        tiny.flag("fail-build").unlink()
        wait_until(lambda: tiny.generation() == 3, "it is back")
        assert len(tiny.records(NOBODY)) >= 2


@pytest.mark.parametrize("reloads", [0, 3])
def test_a_stop_does_not_wait_for_it(tmp_path: Path, reloads: int) -> None:
    with Tiny(tmp_path).ready() as tiny:
        assert tiny.ask("reload", confirm=86400)["ok"]
        for _ in range(reloads):
            tiny.signal(signal.SIGHUP)
        tiny.end()
        assert tiny.records("stopping with an unconfirmed configuration: the next start reads it again")
