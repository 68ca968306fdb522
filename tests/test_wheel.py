"""`./test` tests the wheel, which users install, with everything that belongs into it."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import transocks
import usocksd

CHECKOUT = Path(__file__).parent.parent
LIBRARY = Path("transocks__mypyc")
"""Shared by all compiled modules."""


def compiled_modules() -> list[str]:
    """The list in pyproject.toml."""
    build = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]
    modules: list[str] = build["targets"]["wheel"]["hooks"]["custom"]["modules"]
    return modules


@pytest.fixture
def installed() -> Path:
    folder = os.environ.get("TRANSOCKS_TESTED")
    if folder is None:
        pytest.skip("only ./test makes a wheel")
    return Path(folder)


def test_what_is_tested_is_installed(installed: Path) -> None:
    for package in (usocksd, transocks):
        assert Path(package.__file__).is_relative_to(installed.parent / "interpreted")
        command = [sys.executable, "-c", f"import {package.__name__}; print({package.__name__}.__file__)"]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        assert Path(done.stdout.strip()).is_relative_to(installed)


def test_all_modules_of_the_hot_path_are_compiled_or_none(installed: Path) -> None:
    listed = {Path(name).with_suffix("") for name in compiled_modules()}
    compiled = {shared.with_name(shared.name.partition(".")[0]) for shared in libraries(installed)}
    form = "compiled" if compiled else "interpreted"
    assert compiled == (listed | {LIBRARY} if compiled else set())
    for name in ("usocksd", "transocks"):
        done = subprocess.run([sys.executable, "-m", name, "--version"], capture_output=True, text=True, check=True)
        assert done.stdout == f"{name} {usocksd.__version__} ({form})\n"


@pytest.mark.parametrize("module", compiled_modules())
def test_what_only_compiled_code_gets_wrong(module: str) -> None:
    """mypy accepts both. mypyc gives a name one type in a function, and makes a list of a generator expression."""
    tree = ast.parse((CHECKOUT / module).read_text())
    for function in ast.walk(tree):
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
            caught: dict[str, set[str]] = {}
            for node in ast.walk(function):
                if isinstance(node, ast.ExceptHandler) and node.name is not None and node.type is not None:
                    caught.setdefault(node.name, set()).add(ast.unparse(node.type))
            for name, classes in caught.items():
                assert len(classes) == 1, f"{module}: {function.name}: `except ... as {name}` of {classes}"
        if isinstance(function, ast.GeneratorExp):
            endless = [each for each in function.generators if ast.unparse(each.iter).startswith(("count(", "cycle("))]
            assert not endless, f"{module}:{function.lineno}: never ends when compiled"


INHERITED = """
import importlib, pkgutil, sys, transocks, usocksd
for package in (transocks, usocksd):
    for found in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        if not found.name.endswith("__main__"):
            for each in vars(importlib.import_module(found.name)).values():
                if isinstance(each, type) and each.__module__ == found.name and "__mypyc_attrs__" not in vars(each):
                    if any("__mypyc_attrs__" in vars(base) for base in each.__mro__):
                        print(each)
"""


def test_no_interpreted_class_inherits_from_a_compiled_one(installed: Path) -> None:
    """Nobody could make an object of it, which interpreted tests do not see."""
    done = subprocess.run([sys.executable, "-c", INHERITED], capture_output=True, text=True, check=True)
    assert done.stdout == ""


def test_a_compiled_frame_has_its_place_in_a_traceback(installed: Path) -> None:
    code = "from usocksd.names.match import parse_network as parse; parse('10.0.0.0/x')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    where = re.search(r'File "[^"]*usocksd/names/match.py", line (\d+), in parse_network', done.stderr)
    assert where, done.stderr
    lines = (installed / "usocksd" / "names" / "match.py").read_text().splitlines()
    assert lines[int(where[1]) - 1].lstrip().startswith("raise ValueError")


def test_the_rule_files_come_along(installed: Path) -> None:
    shipped = {path.name: path.read_text() for path in (installed / "transocks/rules/templates").iterdir()}
    assert shipped == {path.name: path.read_text() for path in (CHECKOUT / "iptables").iterdir()}


def test_nothing_else_comes_along(installed: Path) -> None:
    assert {path.name for path in installed.iterdir() if not path.name.endswith(".dist-info")} == {
        "transocks",
        "usocksd",
        "bin",
        *(path.name for path in libraries(installed) if len(path.parts) == 1),
    }
    assert modules(installed) == modules(CHECKOUT)


def libraries(installed: Path) -> set[Path]:
    return {path.relative_to(installed) for path in installed.rglob("*.so")}


def modules(root: Path) -> set[Path]:
    return {path.relative_to(root) for name in ("usocksd", "transocks") for path in (root / name).rglob("*.py")}
