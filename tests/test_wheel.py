"""`./test` tests the wheel, which users install, with everything that belongs into it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

import transocks
import usocksd

CHECKOUT = Path(__file__).parent.parent


@pytest.fixture
def installed() -> Path:
    folder = os.environ.get("TRANSOCKS_TESTED")
    if folder is None:
        pytest.skip("only ./test makes a wheel")
    return Path(folder)


def test_what_is_tested_is_installed(installed: Path) -> None:
    for package in (usocksd, transocks):
        assert Path(package.__file__).is_relative_to(installed)


def test_the_rule_files_come_along(installed: Path) -> None:
    shipped = {path.name: path.read_text() for path in (installed / "transocks/rules/templates").iterdir()}
    assert shipped == {path.name: path.read_text() for path in (CHECKOUT / "iptables").iterdir()}


def test_nothing_else_comes_along(installed: Path) -> None:
    assert {path.name for path in installed.iterdir() if not path.name.endswith(".dist-info")} == {
        "transocks",
        "usocksd",
        "bin",
    }
    assert modules(installed) == modules(CHECKOUT)


def modules(root: Path) -> set[Path]:
    return {path.relative_to(root) for name in ("usocksd", "transocks") for path in (root / name).rglob("*.py")}
