"""`transocks exec`: one command's connections through both daemons, and no trace of it afterwards."""

from __future__ import annotations

import contextlib
import os
import pwd
import select
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import lab
import pytest
from daemons import Daemon, running, wait_until
from scene import ONLY_PATH

# Connects to each address, tells its own port and user, and what it was told; then waits for a line, if asked to.
CONNECT = """
import os, socket, sys
for address in sys.argv[1:]:
    if address == "wait":
        sys.stdin.readline()
        break
    with socket.create_connection((address, 80), 10) as s:
        s.sendall(b"hello\\n")  # as HTTP does: a client that is silent on port 80 is waited for
        print(s.getsockname()[1], os.getuid(), s.recv(100).decode(), flush=True)
"""

SECRET = b"secret " * 10
# The same, and sends something on request.
GOING_ON = f"""
import socket, sys
made = [socket.create_connection((address, 80), 10) for address in sys.argv[1:]]
for s in made:
    s.sendall(b"hello\\n")
    print(s.recv(100).decode(), flush=True)
sys.stdin.readline()
for s in made:
    try:
        s.sendall({SECRET!r})
        s.recv(1)
    except ConnectionResetError:
        print("refused")
"""


WEB = (lab.WEB_V4, lab.WEB_V6)


@dataclass
class Trial:
    net: lab.Net
    bin: Path
    tool: str
    servers: list[socket.socket]
    more: str = ""

    def argv(self, *command: str, **environment: str) -> list[str]:
        settings = [f"{key}={value}" for key, value in environment.items()]
        python = [sys.executable, "-c", ONLY_PATH.format(more=self.more), "exec", *command]
        if not command[0].startswith("--"):
            python.insert(-len(command), "--")
        return ["env", "-u", "SUDO_USER", f"PATH={self.bin}", f"TMPDIR={self.bin}", *settings, *python]

    def start(self, *command: str) -> subprocess.Popen[str]:
        pipe = subprocess.PIPE
        return self.net.client.popen(*self.argv(*command), stdin=pipe, stdout=pipe, stderr=pipe, text=True)

    def run(self, *command: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return self.net.client.run(*self.argv(*command, **environment), check=False)

    def rules(self) -> str:
        if self.tool == "nft":
            return self.net.client.run("nft", "list", "ruleset").stdout
        tools = ("iptables-save", "ip6tables-save")
        lines = [self.net.client.run(tool, "-t", table).stdout for tool in tools for table in ("nat", "filter")]
        return "\n".join(line for line in "".join(lines).splitlines() if line.startswith("-"))

    def accept(self) -> tuple[socket.socket, int]:
        """Accept one connection at the web, say hello; returns it, and the port that it came from."""
        ready, _, _ = select.select(self.servers, [], [], 10)
        accepted, peer = ready[0].accept()
        accepted.sendall(b"hello")
        return accepted, int(peer[1])

    def answer(self) -> int:
        """The same, and no more."""
        accepted, port = self.accept()
        accepted.close()
        return port


def skip_without_groups(net: lab.Net) -> None:
    if net.lab.rootless:
        pytest.skip("without root there is one group id, so nothing tells a command's connections from others")


@pytest.fixture(params=["nft", "iptables"])
def trial(request: pytest.FixtureRequest, host_net: lab.Net, tmp_path: Path) -> Iterator[Trial]:
    skip_without_groups(host_net)
    wanted = {"nft": ["nft"], "iptables": ["iptables-restore", "ip6tables-restore"]}[request.param]
    for name in wanted:
        target = shutil.which(name)
        if target is None:
            pytest.skip(f"{name} is not installed")
        (tmp_path / name).symlink_to(target)
    servers = [host_net.outside.listen(address, 80) for address in WEB]
    yield Trial(host_net, tmp_path, request.param, servers)
    for server in servers:
        server.close()


# Tests that do not depend on the tool that holds the rules.
one_tool = pytest.mark.parametrize("trial", ["nft"], indirect=True)


def line_of(file: IO[str] | None) -> str:
    """The next line that a process writes there."""
    assert file is not None
    return file.readline().removesuffix("\n")


def plain_python(*arguments: str) -> tuple[str, ...]:
    """For users who can't see this one's."""
    python = "/usr/bin/python3"
    if not os.access(python, os.X_OK):
        pytest.skip(f"{python} is not installed")
    return (python, "-c", CONNECT, *arguments)


def python(*arguments: str) -> tuple[str, ...]:
    return (sys.executable, "-c", CONNECT, *arguments)


def test_only_the_command_is_redirected(trial: Trial) -> None:
    before = trial.rules()
    process = trial.start(*python(*WEB, "wait"))
    for _ in WEB:
        there = trial.answer()
        port, uid, greeting = line_of(process.stdout).split()
        assert (int(port) != there, uid, greeting) == (True, "0", "hello")  # the proxy has a port of its own
    # While that one runs, another process's connections go directly.
    other = trial.net.client.popen(*python(*WEB), stdout=subprocess.PIPE, text=True)
    directly = [trial.answer() for _ in WEB]
    assert [int(line.split()[0]) for line in other.communicate(timeout=10)[0].splitlines()] == directly
    assert trial.rules() != before
    process.communicate("\n", timeout=10)
    assert process.returncode == 0
    assert trial.rules() == before


@one_tool
def test_through_another_proxy(trial: Trial, tmp_path: Path) -> None:
    assert "--via: expected socks5://" in trial.run("--via", "ftp://h", "--", "true").stderr
    rule = f'[[rule]]\naction = "allow"\nto = ["{lab.WEB_V4}"]\n'  # an address of that host itself
    proxy = f'{rule}[incoming]\nport = 1080\naddresses = ["{lab.NEXT_V4}"]\nallow_from = ["198.51.100.0/24"]\n'
    with Daemon("usocksd", proxy, tmp_path, popen=trial.net.outside.popen) as server:
        process = trial.start("--via", f"socks5h://{lab.NEXT_V4}:1080", "--", *python(lab.WEB_V4))
        trial.answer()
        assert line_of(process.stdout).endswith(" hello")
        assert process.wait(10) == 0
        assert server.record("proxy starts")["dest_host"] == lab.WEB_V4


def test_forgotten_connections_stay_off_the_wire(trial: Trial) -> None:
    process = trial.start(sys.executable, "-c", GOING_ON, *WEB)
    with contextlib.ExitStack() as stack:
        for _ in WEB:
            stack.enter_context(trial.accept()[0])
            assert line_of(process.stdout) == "hello"
        wire = stack.enter_context(trial.net.outside.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3)))
        wire.bind(("eth0", 0))
        wire.setblocking(False)
        trial.net.client.forget_connections()
        out, err = process.communicate("\n", timeout=20)
        with contextlib.suppress(BlockingIOError):
            while True:
                assert SECRET not in wire.recv(1 << 17)
        assert out == "refused\n" * len(WEB), err


# Asks each address by UDP, and tells its own port and the answer.
DATAGRAMS = """
import socket, sys
for address in sys.argv[1:]:
    with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_DGRAM) as s:
        s.settimeout(10)
        s.connect((address, 53))
        s.send(b"hello")
        print(s.getsockname()[1], s.recv(100).decode(), flush=True)
"""


def test_with_udp(trial: Trial) -> None:
    (trial.bin / "ip").symlink_to(shutil.which("ip") or "")
    routing = [("ip", version, "rule") for version in ("-4", "-6")]
    before = trial.rules(), [trial.net.client.run(*words).stdout for words in routing]
    sockets = []
    for address in WEB:
        sock = trial.net.outside.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_DGRAM)
        sock.bind((address, 53))
        sock.settimeout(10)
        sockets.append(sock)
    process = trial.start("--udp", "--", sys.executable, "-c", DATAGRAMS, *WEB)
    for sock in sockets:
        data, sender = sock.recvfrom(100)
        sock.sendto(f"{data.decode()} {sender[1]}".encode(), sender)
        port, greeting, there = line_of(process.stdout).split()
        assert (greeting, int(there)) == ("hello", sender[1])
        assert port != there  # the proxy has a port of its own
        sock.close()
    _, errors = process.communicate(timeout=20)
    assert process.returncode == 0, errors
    assert (trial.rules(), [trial.net.client.run(*words).stdout for words in routing]) == before


@one_tool
@pytest.mark.parametrize(
    ("status", "command"),
    [(128 + signal.SIGKILL, ["/bin/sh", "-c", "kill -KILL $$"]), (127, ["/no/such/command"]), (126, ["/etc/hostname"])],
)
def test_exit_status_passes_through(trial: Trial, status: int, command: list[str]) -> None:
    assert trial.run(*command).returncode == status


@one_tool
def test_signals_pass_through(trial: Trial) -> None:
    before = trial.rules()
    process = trial.start("/bin/sh", "-c", "trap 'exit 9' TERM; echo ready; while :; do read -r line; done")
    assert line_of(process.stdout) == "ready"
    process.terminate()
    process.communicate("\n" * 100, timeout=10)
    assert process.returncode == 9
    assert trial.rules() == before


@one_tool
def test_runs_as_the_user_who_called_sudo(trial: Trial) -> None:
    entry = pwd.getpwnam("daemon")
    done = trial.run("/bin/sh", "-c", "/usr/bin/id -u; /usr/bin/id -G; echo $HOME", SUDO_USER="daemon")
    uid, groups, home = done.stdout.splitlines()
    assert (uid, home) == (str(entry.pw_uid), entry.pw_dir)
    assert str(entry.pw_gid) in groups.split()
    assert "0" not in groups.split()


MOUNTED = "from transocks.commands.exec import cgroups as c; real = c.mounted; c.mounted = lambda: {};"


@pytest.fixture(params=["cgroup2", "net_cls", "group"])
def hold(request: pytest.FixtureRequest, trial: Trial, tmp_path: Path) -> Iterator[str]:
    """Only this identifies the command's connections on this host."""
    kind: str = request.param
    kept = {"cgroup2": "kind == 'cgroup2'", "net_cls": "kind != 'cgroup2'", "group": "kind is None"}[kind]
    kept = f"[each for each in real() if each[0].{kept}]"
    trial.more = MOUNTED.format(kept)
    mount = tmp_path / "net_cls"
    if kind == "net_cls":
        mount.mkdir()
        mounted = trial.net.client.run("mount", "-t", "cgroup", "-o", "net_cls", "none", str(mount), check=False)
        if mounted.returncode:
            pytest.skip(f"no net_cls here: {mounted.stderr}")
    if kind != "group":
        there = f"{trial.more} print([c.end(each.folder) for each in c.make('transocks_exec_test', 1)])"
        if trial.net.client.run(sys.executable, "-c", there).stdout == "[]\n":
            pytest.skip(f"no {kind} here in which a cgroup can be made")
    yield kind
    if kind == "net_cls":
        trial.net.client.run("umount", str(mount))


def test_a_process_that_changes_its_group_is_held(trial: Trial, hold: str) -> None:
    setpriv = shutil.which("setpriv")
    assert setpriv is not None
    process = trial.start(setpriv, "--reuid=65534", "--regid=65534", "--clear-groups", *plain_python(*WEB))
    there = [trial.answer() for _ in WEB]
    out, err = process.communicate(timeout=20)
    lines = [line.split() for line in out.splitlines()]
    assert [uid for _, uid, _ in lines] == ["65534"] * len(WEB), err
    assert [int(port) == other for (port, _, _), other in zip(lines, there, strict=True)] == [hold == "group"] * 2
    assert ("processes that change their group (su, sudo, setpriv) connect directly" in err) == (hold == "group")


# Makes a cgroup below its own, leaves a process in there, and tells where its own is.
NESTING = """
import os, signal
path = open("/proc/self/cgroup").read().rpartition("0::")[2].strip()
mounts = [line.split()[1] for line in open("/proc/self/mounts") if line.split()[2] == "cgroup2"]
folder = next((mount + path for mount in mounts if "transocks_exec_" in path and os.path.isdir(mount + path)), "")
if folder:
    os.mkdir(f"{folder}/below")
    if os.fork() == 0:
        open(f"{folder}/below/cgroup.procs", "w").write("0")
        signal.pause()
print(folder)
"""


def test_kill_9_ends_processes_left_behind_and_their_cgroup(trial: Trial) -> None:
    inhabitants, before = _processes(trial), trial.rules()
    process = trial.start(sys.executable, "-c", NESTING)
    folder = line_of(process.stdout)
    if folder:
        assert "and left behind: " in line_of(process.stderr)
    process.kill()
    process.communicate(timeout=10)
    if not folder:
        pytest.skip("no cgroup of version 2 here")
    for left in _processes(trial).keys() - inhabitants.keys():
        wait_until(lambda: not running(left), f"process {left} ends")
    assert not os.path.exists(folder)
    assert trial.rules() == before
    assert _processes(trial).keys() == inhabitants.keys()


def test_processes_left_behind_are_held_until_they_end(trial: Trial, hold: str) -> None:
    before = trial.rules()
    go = trial.bin / "go"
    os.mkfifo(go)
    later = f"(read -r line < {go}; exec {' '.join(map(shlex.quote, python(lab.WEB_V4)))}) & exit 3"
    process = trial.start("/bin/sh", "-c", later)
    if hold == "group":
        line_of(process.stderr)
    assert "the command has ended, and left behind: sh (" in line_of(process.stderr)
    go.write_text("go\n")
    there = trial.answer()
    out, err = process.communicate(timeout=10)
    assert out, err
    assert int(out.split()[0]) != there
    assert process.returncode == 3
    assert trial.rules() == before


@one_tool
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_processes_left_behind(trial: Trial, number: signal.Signals) -> None:
    before = trial.rules()
    # A shell's background processes ignore SIGINT; this one ignores SIGTERM too.
    process = trial.start("/bin/sh", "-c", "(trap '' TERM; /bin/sleep 1000) & exit 4")
    while "and left behind: " not in line_of(process.stderr):
        pass
    while any(line.startswith("/bin/sleep 1000") for line in _processes(trial).values()):
        process.send_signal(number)
        time.sleep(0.05)
    process.communicate(timeout=10)
    assert process.returncode == 4
    assert trial.rules() == before


@pytest.mark.parametrize(
    ("trial", "victim"),
    [*(("nft", victim) for victim in ("exec", "holder", "usocksd", "transocks")), ("iptables", "exec")],
    indirect=["trial"],
)
def test_kill_9_leaves_nothing(trial: Trial, victim: str) -> None:
    before = trial.rules()
    inhabitants = _processes(trial)
    process = trial.start("/bin/sh", "-c", "echo ready; read -r line")
    assert line_of(process.stdout) == "ready"
    assert trial.rules() != before
    assert list(trial.bin.glob("transocks-exec-*"))
    words = {"usocksd": "-m usocksd", "transocks": "-m transocks -f"}.get(victim, "cli.main()")
    pids = sorted(pid for pid, line in _processes(trial).items() if words in line)
    pid = pids[1 if victim == "holder" else 0]  # the holder is exec's child; the workers of daemons came later
    os.kill(pid, signal.SIGKILL)
    process.communicate("\n", timeout=10)
    # Where it was killed itself, the holder finishes behind it: wait for the end of the last one.
    for left in _processes(trial).keys() - inhabitants.keys():
        wait_until(lambda: not running(left), f"process {left} ends")
    assert trial.rules() == before
    assert _processes(trial).keys() == inhabitants.keys()
    assert not list(trial.bin.glob("transocks-exec-*"))


def test_where_ipv6_is_switched_off(host_net: lab.Net) -> None:
    """/proc/net/if_inet6 is there then, and empty: there is no ::1 to listen on."""
    skip_without_groups(host_net)
    host_net.client.sysctl("net.ipv6.conf.all.disable_ipv6", 1)
    command = [sys.executable, "-m", "transocks", "exec", "--", "true"]
    assert host_net.client.run("timeout", "20", *command, check=False).returncode == 0


def test_without_root_it_fails_with_a_message(host_net: lab.Net) -> None:
    command = ["setpriv", "--bounding-set=-all", sys.executable, "-m", "transocks", "exec", "--", "true"]
    done = host_net.client.run(*command, check=False)
    assert done.returncode == 125
    assert "needs root, with CAP_NET_ADMIN: sudo transocks exec" in done.stderr


def _processes(trial: Trial) -> dict[int, str]:
    """Command lines of what runs in the lab."""
    mine = os.readlink(f"/proc/{trial.net.lab.agent_pid}/ns/mnt")
    found: dict[int, str] = {}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if os.readlink(entry / "ns/mnt") == mine:
                found[int(entry.name)] = (entry / "cmdline").read_text().replace("\0", " ")
        except OSError:
            continue
    return found
