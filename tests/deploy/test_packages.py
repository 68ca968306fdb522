"""The wheel as indexes, pip and `install` take it: its metadata, and the files that it puts on a host."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tomllib
from importlib.metadata import Distribution, PathDistribution
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"


@pytest.fixture(scope="module")
def installed() -> Path:
    folder = os.environ.get("TRANSOCKS_TESTED")
    if folder is None:
        pytest.skip("only ./test makes a wheel")
    return Path(folder)


@pytest.fixture(scope="module")
def distribution(installed: Path) -> Distribution:
    (folder,) = installed.glob("transocks-*.dist-info")
    return PathDistribution(folder)


def test_the_metadata_is_complete(distribution: Distribution) -> None:
    found = distribution.metadata
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert (found["License-Expression"], found.get_all("License-File")) == ("MIT", ["LICENSE"])
    licence = (ROOT / "LICENSE").read_text()
    assert [path.read_text() for path in distribution.files or () if path.name == "LICENSE"] == [licence]
    assert {"TCP", "UDP"} <= set(re.findall(r"\w+", found["Summary"]))
    assert found["Requires-Python"] == project["requires-python"]
    assert len(found.get_all("Project-URL") or ()) == len(project["urls"])
    classifiers = set(found.get_all("Classifier") or ())
    assert classifiers == set(project["classifiers"])
    assert {f"Programming Language :: Python :: 3.{minor}" for minor in range(11, 15)} <= classifiers
    assert not any(each.startswith("License ::") for each in classifiers), "PEP 639: the expression says it"


def test_links_of_the_readme_work_outside_of_the_repository(distribution: Distribution) -> None:
    found = distribution.metadata
    page = str(found.get_payload())  # type: ignore[attr-defined]
    assert found["Description-Content-Type"] == "text/markdown"
    assert page.startswith("# transocks\n")
    assert "docs/running.md" in page, "the text of a link stays"
    links = re.findall(r"\]\(([^)]*)\)|(?:src|href|srcset)=\"([^\"]*)\"", page)
    assert not [each for each in ("".join(pair) for pair in links) if not each.startswith("https://")]


class Host:
    """A host of which there are only files."""

    def __init__(self, root: Path, programs: Path) -> None:
        self.root = root
        self.programs = programs

    def do(self, daemon: str, *words: str, status: int = 0) -> list[str]:
        """What it prints, one line each, with paths as the host sees them."""
        command = (self.programs / daemon, *words, f"--root={self.root}")
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == status, done.stdout + done.stderr
        return (done.stdout + done.stderr).replace(str(self.root), "").splitlines()

    def files(self) -> dict[str, tuple[str, int, int]]:
        """Each file: what is in it, its mode, and when it was written."""
        found = {}
        for path in self.root.rglob("*"):
            if path.is_file():
                about = path.stat()
                found[f"/{path.relative_to(self.root)}"] = (path.read_text(), about.st_mode & 0o777, about.st_mtime_ns)
        return found


@pytest.fixture
def host(installed: Path, tmp_path: Path) -> Host:
    return Host(tmp_path, installed / "bin")


def test_install_puts_each_file_where_it_belongs_and_uninstall_takes_it_away(host: Host) -> None:
    for daemon in ("usocksd", "transocks"):
        before = set(host.files())
        said = host.do(daemon, "install")
        after = host.files()
        lists = f"/usr/local/lib/transocks/{daemon}.sha256"
        assert {f"installed {path}" for path in set(after) - before - {lists}} == set(said)
        assert {path for path in after if path.startswith("/etc/") and path not in before} == {
            f"/etc/{daemon}.toml",
            f"/etc/logrotate.d/{daemon}",
        }
        assert after[f"/etc/{daemon}.toml"][:2] == ((DEPLOY / f"{daemon}.toml").read_text(), 0o640)
        units = {path.name for path in (DEPLOY / "systemd").glob(f"{daemon}*.*[te]")}
        assert {f"/usr/local/lib/systemd/system/{unit}" for unit in units} <= set(after)
        for kind in ("sysusers", "tmpfiles"):
            text = (DEPLOY / f"{kind}.d" / f"{daemon}.conf").read_text()
            assert after[f"/usr/local/lib/{kind}.d/{daemon}.conf"][:2] == (text, 0o644)
        share = {path.removeprefix("/usr/local/share/") for path in after if path.startswith("/usr/local/share/")}
        assert {path for path in share if daemon in Path(path).name.lstrip("_").partition(".")} == {
            f"man/man8/{daemon}.8",
            f"bash-completion/completions/{daemon}.bash",
            f"zsh/site-functions/_{daemon}",
            f"fish/vendor_completions.d/{daemon}.fish",
        }
        unit = after[f"/usr/local/lib/systemd/system/{daemon}.service"][0]
        assert f"\nExecStart={host.programs}/{daemon} -f /etc/{daemon}.toml\n" in unit
        assert host.do(daemon, "install") == [f"{daemon}: nothing to do"]
        assert host.files() == after
    assert after["/usr/local/lib/transocks/transocks-rules.sh"][1] == 0o755
    checksums = "".join(text for path, (text, *_) in after.items() if path.endswith(".sha256"))
    check = ["sha256sum", "--check", "--strict", "--quiet"]
    subprocess.run(check, input=checksums.replace("  /", f"  {host.root}/"), text=True, check=True)
    for daemon in ("usocksd", "transocks"):
        host.do(daemon, "uninstall")
        assert host.do(daemon, "uninstall") == [f"{daemon}: nothing to do"]
    assert host.files() == {}


def test_what_was_edited_is_kept(host: Host) -> None:
    config, unit = "/etc/usocksd.toml", "/usr/local/lib/systemd/system/usocksd.socket"
    mine = host.root / config[1:]
    mine.parent.mkdir()
    mine.write_text("# mine\n")
    kept = [f"kept {path}: it has been edited" for path in (unit, config)]
    assert kept[1] in host.do("usocksd", "install")
    host.do("usocksd", "uninstall")
    assert host.files().keys() == {config}, "it was there before"
    mine.unlink()
    host.do("usocksd", "install")
    for path in (unit, config):
        (host.root / path[1:]).write_text("# edited\n")
    assert host.do("usocksd", "install") == [*kept, "usocksd: nothing to do"]
    assert [line for line in host.do("usocksd", "uninstall") if line.startswith("kept")] == kept
    assert {path: text for path, (text, *_) in host.files().items()} == dict.fromkeys((config, unit), "# edited\n")


def test_units_of_another_place_are_right(host: Host) -> None:
    """As a package of a distribution would have them; judged by systemd."""
    (said,) = host.do("transocks", "install", "--bin=/root/.local/bin", status=1)
    assert "services see no home directories" in said
    assert host.files() == {}
    host.do("transocks", "install", "--prefix=/usr", "--bin=/usr/bin")
    units = sorted((host.root / "usr/lib/systemd/system").iterdir())
    assert len(units) == 6
    text = "".join(unit.read_text() for unit in units)
    assert not re.findall("/opt/|/usr/local/", text)
    updated = host.do("transocks", "install", "--prefix=/usr")
    assert {line.partition(" ")[0] for line in updated} == {"updated"}
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not installed (Debian: systemd)")
    for unit in units:  # what they start has to exist
        unit.write_text(unit.read_text().replace("/usr/lib/transocks/", f"{host.root}/usr/lib/transocks/"))
    environment = os.environ | {"SYSTEMD_UNIT_PATH": f"{units[0].parent}:"}
    verify = ["systemd-analyze", "verify", "--man=no", *units]
    done = subprocess.run(verify, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")
