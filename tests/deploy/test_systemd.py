"""The units in deploy/systemd: judged by systemd's own tools, and the commands in them by real connections."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1] / "netns"))

import lab

ROOT = Path(__file__).parents[2]
UNITS = ROOT / "deploy" / "systemd"
SERVICES = [
    "usocksd.service",
    "transocks.service",
    "transocks-rules.service",
    "transocks-rules-early.service",
    "transocks-hold.service",
    "transocks-hold-closed.service",
]
INSTALLED = re.compile(r"/opt/transocks/bin/\w+|/usr/local/lib/transocks/[\w.-]+")


def tool(name: str) -> str:
    found = shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not installed (Debian: systemd)")
    return found


def run(*command: str | Path, **options: object) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False, **options)  # type: ignore[call-overload]
    assert done.returncode == 0, done.stdout + done.stderr
    output: str = done.stdout + done.stderr
    return output


def settings(unit: str) -> list[tuple[str, str]]:
    """Every setting of a unit file, in order."""
    text = re.sub(r"\\\n", " ", (UNITS / unit).read_text())
    return [(m[1], m[2]) for m in re.finditer(r"^(\w+)=(.*)$", text, re.MULTILINE)]


# ---- systemd's own tools


def test_systemd_finds_no_fault_in_any_unit(tmp_path: Path) -> None:
    analyze = tool("systemd-analyze")
    units = sorted(p for p in UNITS.iterdir() if p.suffix in {".service", ".socket"})
    assert {p.name for p in units} == {*SERVICES, "usocksd.socket", "transocks.socket"}
    for unit in units:  # what they start has to exist
        text = unit.read_text()
        for path in INSTALLED.findall(text):
            program = tmp_path / path[1:]
            program.parent.mkdir(parents=True, exist_ok=True)
            program.write_text("#!/bin/sh\n")
            program.chmod(0o755)
        (tmp_path / unit.name).write_text(INSTALLED.sub(lambda m: f"{tmp_path}{m[0]}", text))
    environment = os.environ | {"SYSTEMD_UNIT_PATH": f"{tmp_path}:"}
    assert run(analyze, "verify", "--man=no", *(tmp_path / u.name for u in units), env=environment) == ""


@pytest.mark.parametrize("service", SERVICES)
def test_no_service_is_exposed_more_than_2_5(service: str) -> None:
    run(tool("systemd-analyze"), "security", "--offline=true", "--threshold=25", "--no-pager", UNITS / service)


def test_a_service_with_the_right_to_set_marks_is_no_more_exposed_than_2_5(tmp_path: Path) -> None:
    analyze = tool("systemd-analyze")
    found = re.search(
        r"^```ini\n(\[Service\]\n[^`]*CAP_NET_ADMIN[^`]*)```", (ROOT / "docs/running.md").read_text(), re.M
    )
    assert found is not None
    for service in ("usocksd.service", "transocks.service"):
        shutil.copy(UNITS / service, tmp_path)
        drop_in = tmp_path / f"{service}.d" / "mark.conf"
        drop_in.parent.mkdir()
        drop_in.write_text(found[1])
        environment = os.environ | {"SYSTEMD_UNIT_PATH": f"{tmp_path}:"}
        arguments = ("security", "--offline=true", "--threshold=25", "--no-pager", tmp_path / service)
        output = run(analyze, *arguments, env=environment)
        assert re.search(r"✗ CapabilityBoundingSet=~CAP_NET_ADMIN", output), "the drop-in was not looked at"


def test_users_and_folders_are_made_as_the_units_want_them(tmp_path: Path) -> None:
    sysusers, tmpfiles = tool("systemd-sysusers"), tool("systemd-tmpfiles")
    if os.geteuid() != 0:
        pytest.skip("folders of other users need root")
    (tmp_path / "etc").mkdir()
    for name in ("transocks", "usocksd"):
        (tmp_path / "etc" / f"{name}.toml").write_text("")
    for _ in range(2):
        run(sysusers, f"--root={tmp_path}", *sorted((ROOT / "deploy" / "sysusers.d").iterdir()))
        run(tmpfiles, f"--root={tmp_path}", "--create", *sorted((ROOT / "deploy" / "tmpfiles.d").iterdir()))
    accounts = {words[0]: words for words in (x.split(":") for x in (tmp_path / "etc/passwd").read_text().splitlines())}
    groups = {words[0]: words for words in (x.split(":") for x in (tmp_path / "etc/group").read_text().splitlines())}
    for name in ("transocks", "usocksd"):
        unit = dict(settings(f"{name}.service"))
        assert (unit["User"], unit["Group"]) == (name, name)
        uid, gid = int(accounts[name][2]), int(groups[name][2])
        assert 0 < uid < 1000
        assert accounts[name][6].endswith("nologin")
        folder = (tmp_path / "var/log" / unit["LogsDirectory"]).stat()
        assert (folder.st_uid, folder.st_gid, folder.st_mode & 0o7777) == (uid, gid, int(unit["LogsDirectoryMode"], 8))
        config = (tmp_path / "etc" / f"{name}.toml").stat()
        assert (config.st_uid, config.st_gid, config.st_mode & 0o7777) == (0, gid, 0o640)


# ---- the rules, by the commands of their units


@dataclass
class Rules:
    """transocks-rules.service and transocks-rules-early.service on the host that they belong to."""

    place: str
    net: lab.Net
    file: Path
    tmp: Path

    def do(self, unit: str, setting: str, policy: str | None = None, *, check: bool = True) -> int:
        """Run the command that the unit has for this, in the environment that it sets; returns the exit status."""
        found = settings(unit)
        (command,) = [v for k, v in found if k == setting]
        environment = dict(word.split("=", 1) for k, v in found if k == "Environment" for word in shlex.split(v))
        assert environment["POLICY"] == "open"
        assert dict(found)["EnvironmentFile"] == "-/etc/transocks/rules.env"
        environment |= {"RULES": str(self.file)} | ({} if policy is None else {"POLICY": policy})
        words = shlex.split(command.replace("/usr/local/lib/transocks/", f"{UNITS}/"))
        arguments = (f"{k}={v}" for k, v in environment.items())
        path = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
        return self.net.proxy.run("env", "-i", path, *arguments, *words, check=check).returncode

    def start(self, policy: str | None = None) -> None:
        self.do("transocks-rules.service", "ExecStart", policy)

    def stop(self, policy: str | None = None) -> None:
        self.do("transocks-rules.service", "ExecStopPost", policy)

    def dump(self) -> str:
        """Everything that is loaded but the chain that keeps NAT going."""
        text = self.net.proxy.run("nft", "list", "ruleset").stdout
        return re.sub(
            r"table inet transocks_nat {\n\tchain \w+ {\n\t\ttype nat [^\n]*\n\t\tct state new accept\n\t}\n}\n",
            "",
            text,
        )


@pytest.fixture(params=["host", "gateway"])
def rules(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Rules]:
    tool("nft")
    reason = lab.unavailable()
    if reason is not None:
        pytest.skip(f"no network namespaces here: {reason}")
    make: Callable[[], object] = lab.host_net if request.param == "host" else lab.gateway_net
    file = tmp_path / "rules.nft"
    shutil.copy(ROOT / "iptables" / f"{request.param}.nft", file)
    with make() as net:  # type: ignore[attr-defined]
        # Rules loaded by others must stay unchanged.
        net.proxy.run(
            "nft", "table inet foreign { chain c { type filter hook output priority 0; tcp dport 9 drop; }; }"
        )
        yield Rules(request.param, net, file, tmp_path)


BEYOND = (lab.WEB_V4, lab.WEB_V6)
PRIVATE = (lab.PRIVATE_V4, lab.PRIVATE_V6)


class World:
    """Where connections of the client end: at transocks's port, or at port 80 of the destination itself."""

    def __init__(self, rules: Rules, stack: ExitStack) -> None:
        self.client = rules.net.client
        host = rules.place == "host"
        inside = ("127.0.0.1", "::1") if host else (lab.LAN_GATEWAY_V4, lab.LAN_GATEWAY_V6)
        self.transocks = [stack.enter_context(rules.net.proxy.listen(a, 1081)) for a in inside]
        self.there = stack.enter_context(rules.net.outside.listen("", 80))
        self.stack = stack

    def dial(self, address: str, *, mark: int = 0) -> socket.socket:
        made = self.stack.enter_context(self.client.socket(socket.AF_INET6 if ":" in address else socket.AF_INET))
        if mark:
            made.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, mark)
        made.settimeout(10)
        made.connect((address, 80))
        return made

    def accept(self, address: str, where: str) -> socket.socket:
        listener = self.there if where == "direct" else self.transocks[":" in address]
        listener.settimeout(10)
        accepted = self.stack.enter_context(listener.accept()[0])
        accepted.settimeout(10)
        return accepted

    def goes(self, where: str, *addresses: str, mark: int = 0) -> bool:
        for address in addresses:
            if where == "refused":
                with pytest.raises(ConnectionRefusedError):  # a reset; without one it would be a TimeoutError
                    self.dial(address, mark=mark)
            else:
                self.dial(address, mark=mark)
                self.accept(address, where)
        return True


@pytest.fixture
def world(rules: Rules) -> Iterator[World]:
    with ExitStack() as stack:
        yield World(rules, stack)


def echoes(one: socket.socket, other: socket.socket) -> bool:
    one.sendall(b"ping")
    assert other.recv(4) == b"ping"
    other.sendall(b"pong")
    return one.recv(4) == b"pong"


def test_open_without_transocks_connections_go_directly(rules: Rules, world: World) -> None:
    before = rules.dump()
    rules.do("transocks-rules-early.service", "ExecStart")
    assert rules.dump() == before, "open is the default, and does nothing early"
    rules.start()
    once = rules.dump()
    assert world.goes("redirected", *BEYOND)
    assert world.goes("direct", *PRIVATE)
    rules.start()
    assert rules.dump() == once
    rules.do("transocks-rules.service", "ExecReload")
    assert rules.dump() == once
    for _ in range(2):
        rules.stop()
        assert rules.dump() == before
    assert world.goes("direct", *BEYOND, *PRIVATE)
    rules.do("transocks-rules-early.service", "ExecStopPost")
    assert rules.net.proxy.run("nft", "list", "ruleset").stdout == before, "nothing at all is left"


def test_closed_without_transocks_connections_are_refused_at_once(rules: Rules, world: World) -> None:
    before = rules.dump()
    rules.do("transocks-rules-early.service", "ExecStart", "closed")
    refusing = rules.dump()
    assert world.goes("refused", *BEYOND)
    assert world.goes("direct", *PRIVATE)
    for _ in range(2):
        rules.start("closed")
    assert world.goes("redirected", *BEYOND)
    for _ in range(2):
        rules.stop("closed")
        assert rules.dump() == refusing
    assert world.goes("refused", *BEYOND)
    assert world.goes("direct", *PRIVATE)
    if rules.place == "host":
        assert world.goes("direct", *BEYOND, mark=0x7473)
    rules.do("transocks-rules-early.service", "ExecStopPost", "closed")
    assert rules.net.proxy.run("nft", "list", "ruleset").stdout == before, "nothing at all is left"
    assert world.goes("direct", *BEYOND)


def test_connections_that_are_there_outlive_every_change(rules: Rules, world: World) -> None:
    pairs = [(world.dial(a), world.accept(a, "direct")) for a in BEYOND]
    rules.start("closed")
    pairs += [(world.dial(a), world.accept(a, "redirected")) for a in BEYOND]
    for policy in ("closed", "open"):
        for change in (rules.stop, rules.start):
            change(policy)
            assert all(echoes(one, other) for one, other in pairs), (change, policy)


def test_an_impossible_change_fails_and_changes_nothing(rules: Rules) -> None:
    rules.start("closed")
    loaded = rules.dump()
    good = rules.file.read_text()
    for policy in ("", "opne"):
        for unit, setting in (
            ("transocks-rules.service", "ExecStart"),
            ("transocks-rules.service", "ExecStopPost"),
            ("transocks-rules-early.service", "ExecStart"),
        ):
            assert rules.do(unit, setting, policy, check=False) == 1
    for text in (good + "table inet broken {", good.replace("redirect to", "counter dnat to")):
        rules.file.write_text(text)
        assert rules.do("transocks-rules.service", "ExecStopPost", "closed", check=False) != 0
    rules.file.unlink()
    for setting in ("ExecStart", "ExecReload", "ExecStopPost"):
        assert rules.do("transocks-rules.service", setting, check=False) == 1
    assert rules.dump() == loaded


def test_the_shell_script_has_no_fault_that_shellcheck_knows() -> None:
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed")
    run("shellcheck", UNITS / "transocks-rules.sh")
