"""Control groups as seen by a container, by a service of systemd, or without a limit."""

import os
from pathlib import Path

import pytest

from usocksd.host.cgroup import oom_kills, usable_cpus


@pytest.fixture(autouse=True)
def eight_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))


class Host:
    """A /proc, and a cgroup file system or two."""

    def __init__(self, folder: Path) -> None:
        self.proc = folder / "proc"
        (self.proc / "self").mkdir(parents=True)
        self.top = folder / "cgroup"
        self.mounts: list[str] = []
        self.write(self.proc / "self/mountinfo", "22 1 0:5 / / rw shared:1 master:2 - ext4 /dev/vda rw,relatime\n")

    def write(self, file: Path, text: str) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)

    def mount(self, kind: str, options: str = "rw", *, root: str = "/") -> None:
        with (self.proc / "self/mountinfo").open("a") as file:
            file.write(f"31 22 0:28 {root} {self.top} rw,nosuid shared:9 - {kind} {kind} {options}\n")

    def member(self, *lines: str) -> None:
        self.write(self.proc / "self/cgroup", "".join(f"{line}\n" for line in lines))

    def group(self, path: str, **files: str) -> None:
        for name, text in files.items():
            self.write(self.top / path / name.replace("__", "."), text)


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return Host(tmp_path)


@pytest.mark.parametrize(
    ("quota", "cpus"),
    [("max 100000", 8), ("50000 100000", 1), ("100000 100000", 1), ("250000 100000", 3), ("9900000 100000", 8)],
)
def test_a_quota_is_rounded_up(host: Host, quota: str, cpus: int) -> None:
    host.mount("cgroup2")
    host.member("0::/system.slice/usocksd.service")
    host.group("system.slice/usocksd.service", cpu__max=quota)
    assert usable_cpus(host.proc) == cpus


def test_the_smallest_of_all_groups_above_counts(host: Host) -> None:
    host.mount("cgroup2")
    host.member("0::/pods/pod/container")
    host.group("pods", cpu__max="300000 100000")
    host.group("pods/pod", cpu__max="150000 100000")
    host.group("pods/pod/container", cpu__max="max 100000")
    assert usable_cpus(host.proc) == 2


@pytest.mark.parametrize(
    ("root", "path"), [("/", "/"), ("/docker/1", "/docker/1"), ("/", "/../outside"), ("/docker/1", "/elsewhere")]
)
def test_a_container_sees_its_own_group_as_the_top(host: Host, root: str, path: str) -> None:
    host.mount("cgroup2", root=root)
    host.member(f"0::{path}")
    host.group("", cpu__max="50000 100000")
    assert usable_cpus(host.proc) == 1


def test_version_1(host: Host) -> None:
    host.mount("cgroup", "rw,cpu,cpuacct")
    host.member("5:memory:/a", "4:cpu,cpuacct:/a/b", "0::/")
    host.group("a", cpu__cfs_quota_us="200000\n", cpu__cfs_period_us="100000\n")
    host.group("a/b", cpu__cfs_quota_us="-1\n", cpu__cfs_period_us="100000\n")
    assert usable_cpus(host.proc) == 2


def test_no_groups_no_quota(host: Host) -> None:
    assert usable_cpus(host.proc) == 8
    host.member("0::/")
    assert usable_cpus(host.proc) == 8


def test_the_cpus_of_this_host() -> None:
    assert 1 <= usable_cpus() <= 8


@pytest.mark.parametrize("name", ["memory__events", "memory__oom_control"])
def test_kills_of_the_own_group(host: Host, name: str) -> None:
    host.mount(*(("cgroup2", "rw") if name == "memory__events" else ("cgroup", "rw,memory")))
    host.member("0::/a/b" if name == "memory__events" else "7:memory:/a/b")
    host.group("a", **{name: "oom_kill 9\n"})
    host.group("a/b", **{name: "oom 5\nunder_oom 0\noom_kill 2\noom_group_kill 0\n"})
    assert oom_kills(host.proc) == 2


def test_kills_of_the_whole_system(host: Host) -> None:
    assert oom_kills(host.proc) is None
    host.write(host.proc / "vmstat", "oom_kill 3\n")
    host.mount("cgroup2")
    host.member("0::/")
    assert oom_kills(host.proc) == 3


NAMES = [b"x\xe9", "\u65e5\u3000\u672c".encode(), b"a\x0bb\x1c\x85", b"tab\\011and\\040space", b"\xe2\x80\xa8 - "]


@pytest.mark.parametrize("name", NAMES)
def test_anybody_may_mount_anything_anywhere(host: Host, name: bytes) -> None:
    with (host.proc / "self/mountinfo").open("ab") as file:
        file.write(b"30 22 0:29 / /home/u/" + name.replace(b" ", b"\\040") + b" rw - fuse  rw\n")  # it has no source
    host.mount("cgroup2")
    host.member("0::/")
    host.group("", cpu__max="50000 100000", memory__events="oom_kill 2\n")
    assert (usable_cpus(host.proc), oom_kills(host.proc)) == (1, 2)


def test_a_mount_point_with_a_space(host: Host) -> None:
    top = host.top
    host.top = top.with_name("a b")
    host.group("", cpu__max="50000 100000")
    host.top = Path(str(host.top).replace(" ", "\\040"))
    host.mount("cgroup2")
    host.member("0::/")
    assert usable_cpus(host.proc) == 1
