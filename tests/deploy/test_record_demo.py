"""deploy/record_demo.py: what a terminal shows, as a picture."""

from __future__ import annotations

import runpy
from pathlib import Path
from xml.etree import ElementTree

import pytest

ROOT = Path(__file__).parents[2]
MADE = runpy.run_path(str(ROOT / "deploy/record_demo.py"))


def texts(picture: str) -> list[str]:
    return [
        "".join(each.itertext()) for each in ElementTree.fromstring(picture).iter("{http://www.w3.org/2000/svg}text")
    ]


def test_a_terminal_becomes_a_picture() -> None:
    script = r"test -t 1; printf 'a <b>  & c\n\n\033[1m\033[32mgood\033[0m, %s\n' $?"
    lines = list(MADE["record"]("sh", "-c", script))
    picture = MADE["svg"](lines)
    assert texts(picture) == ["a <b>  & c", "good, 0"]
    assert '<tspan class="b g">good</tspan>, 0' in picture
    with pytest.raises(SystemExit, match="exit status 3"):
        list(MADE["record"]("sh", "-c", "exit 3"))


def test_pictures_of_the_documents() -> None:
    shown = texts((ROOT / "docs/run.svg").read_text(encoding="utf-8"))
    assert shown[0] == "$ ./run"
    assert shown[-1].startswith("All of it had the expected result.")
    assert {"transocks", "usocksd"} < set(" ".join(texts((ROOT / "docs/picture.svg").read_text())).split())
