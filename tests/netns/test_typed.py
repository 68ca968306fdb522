"""README.md and docs/running.md, typed: every command in them, in their order, into a shell on a host of a lab.

The shell has an /etc, /opt, /usr/local and /var of its own. Commands that can't run there are in NOT_TYPED, with the
reason.
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import shutil
import socket
import ssl
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import daemons
import dns.message
import dns.rrset
import lab
import pytest

ROOT = Path(__file__).parents[2]
PROGRAMS = Path(sys.executable).parent
PORTS = {"usocksd": 1082, "transocks": 1081}  # the port that each opens last
UPSTREAMS = ("192.0.2.10", "192.0.2.11")
WWW = "www.example.com"

# Commands that are not run, by their beginnings, and why.
NOT_TYPED = {
    "./run": "makes namespaces of its own, and installs packages: test_demo.py",
    "./test": "is what runs this",
    "sudo ./run": "installs packages: test_exec.py has what it then does",
    "pipx": "would want the Internet; test_wheel.py has what it installs",
    "sudo transocks install": "writes to /usr: test_packages.py has it",
    "sudo usocksd install": "the same",
    "apt install": "there is no Internet here; ./test installs what it needs in the same way",
    "python3 -m venv /opt/transocks": "pip would want the Internet: the programs that are tested are in its place",
    "/opt/transocks/bin/pip": "the same; test_wheel.py has what it installs",
    "systemctl": "there is no systemd here; that the units exist is looked at, and test_systemd.py has the rest",
    "ansible-playbook": "large; deploy/ansible/try runs it",
    "deploy/debian/build": "wants the Internet; deploy/debian/try has it and what follows",
    "editor": "is interactive",
    "docker": "there is no docker here; that the files exist is looked at, and test_container.py has the rest",
}
# Commands with another exit status than 0: the allowed ones, and why.
STATUS = {
    "transocks doctor": {0, 1},  # no service runs, and it says so
}


def commands(document: str) -> Iterator[tuple[str, str]]:
    """The input of a reader, in order: ("type", command), and ("write PATH", text) for a configuration that is shown."""
    text = (ROOT / document).read_text()
    path = ""
    for match in re.finditer(r"`(/etc/\w+\.toml)`:|^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        if match[1]:
            path = match[1]
        elif match[2] == "toml" and path:
            yield f"write {path}", match[3]
        elif not match[2] and re.match(r"[./a-z]", match[3]):
            for line in re.sub(r"\\\n", " ", match[3]).splitlines():
                if not line.startswith("/var/log/") and (command := re.sub(r"(^|\s)# .*|\s{2,}#.*", "", line).strip()):
                    if "=" in command.split()[0] or line[0] in " }":
                        continue  # of a file that is shown
                    yield "type", command


class Shell:
    """A shell on a host of the lab, in which one command after the other is typed."""

    def __init__(self, host: lab.Host, folder: Path, **environment: str) -> None:
        words = [f"{key}={value}" for key, value in environment.items()]
        self._process = host.popen(
            # When the shell ends, so does all that it has started.
            "env", *words, "unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc",
            "bash", "--noprofile", "--norc",
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        self._folder = folder
        self.typed: list[str] = []

    def type(self, command: str) -> tuple[int, str]:
        """The exit status and the output; of background processes, nothing."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        if command.endswith("&"):
            command = f"{command[:-1]} </dev/null >>{self._folder}/background.log 2>&1 &"
        self._process.stdin.write(f"{command}\nprintf '\\n===%s===\\n' $?\n".encode())
        self._process.stdin.flush()
        said = b""
        while not (end := re.search(rb"\n===(\d+)===\n$", said)):
            more = os.read(self._process.stdout.fileno(), 65536)
            assert more, said
            said += more
        return int(end[1]), said[: end.start()].decode()

    def close(self) -> None:
        """End the shell, and what runs in the background."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def must(self, command: str) -> str:
        status, said = self.type(command)
        assert status == 0, f"{command}: {said}"
        return said


class Page(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", "6")
        self.end_headers()
        self.wfile.write(b"hello\n")

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def shell(host_net: lab.Net, tmp_path: Path) -> Iterator[Shell]:
    missing = [name for name in ("nft", "curl", "openssl", "systemd-sysusers") if shutil.which(name) is None]
    if missing or host_net.lab.rootless:
        pytest.skip(f"not installed: {', '.join(missing)}" if missing else "needs root, to make users")
    run_folder = host_net.lab.run_folder / "typed"
    run_folder.mkdir()
    with contextlib.ExitStack() as stack:
        internet(host_net, tmp_path, stack)
        shell = Shell(host_net.proxy, Path("/run/typed"), CURL_CA_BUNDLE=str(tmp_path / "ca.pem"), HOME="/run/typed")
        stack.callback(shell.close)
        shell.must("cp /etc/hosts /etc/resolv.conf /run/typed")  # the lab's, mounted over the host's
        for folder in ("etc", "usr/local"):
            shell.must(f"mkdir -p /run/typed/{folder}/new /run/typed/{folder}/work")
            layers = f"lowerdir=/{folder},upperdir=/run/typed/{folder}/new,workdir=/run/typed/{folder}/work"
            shell.must(
                f"mount -t overlay overlay -o {layers} /{folder} 2>/dev/null"
                f" || {{ cp -a /{folder}/. /run/typed/{folder}/new && mount --bind /run/typed/{folder}/new /{folder}; }}"
            )
        shell.must("cp /run/typed/hosts /run/typed/resolv.conf /etc")
        for folder in ("/opt", "/var", "/usr/lib/tmpfiles.d", "/usr/lib/sysusers.d"):
            shell.must(f"mount -t tmpfs tmpfs {folder}")
        shell.must("rm -f /etc/tmpfiles.d/* /etc/sysusers.d/*; mkdir -p /var/log /etc/systemd/system")
        shell.must("sed -i '/^transocks:\\|^usocksd:/d' /etc/passwd /etc/group /etc/shadow /etc/gshadow")
        shell.must("touch /run/typed/background.log; mkdir /run/typed/work && cd /run/typed/work")
        for name in ("run", "test", "deploy", "iptables", "pyproject.toml"):
            shell.must(f"ln -s {shlex.quote(str(ROOT / name))} .")
        shell.must(f"PATH={shlex.quote(str(PROGRAMS))}:$PATH")
        yield shell
        print(shell.must("tail -c 4000 /run/typed/background.log"))


def internet(net: lab.Net, folder: Path, stack: contextlib.ExitStack) -> None:
    """Two upstreams, a web site and a name server."""
    outside = net.outside
    net.lab.ip(outside, *(f"addr add {address}/32 dev lo" for address in (*UPSTREAMS, "10.1.2.3")))
    net.lab.ip(outside, "addr add 203.0.113.5/32 dev lo")
    for address in UPSTREAMS:
        config = (
            f'[incoming]\naddresses = ["{address}"]\nallow_from = ["0.0.0.0/0"]\n[dns]\nservers = ["{lab.NEXT_V4}"]\n'
        )
        config += '[[rule]]\naction = "allow"\nto = ["203.0.113.5"]\n'
        (folder / address).mkdir()
        stack.enter_context(daemons.Daemon("usocksd", config, folder / address, popen=outside.popen))
    names = outside.socket(socket.AF_INET, socket.SOCK_DGRAM)
    names.bind((lab.NEXT_V4, 53))

    def answer() -> None:
        while True:
            data, client = names.recvfrom(4096)
            if not data:
                return
            query = dns.message.from_wire(data)
            response = dns.message.make_response(query)
            if query.question[0].rdtype == 1:
                response.answer.append(dns.rrset.from_text(query.question[0].name, 60, "IN", "A", "203.0.113.5"))
            names.sendto(response.to_wire(), client)

    threading.Thread(target=answer, daemon=True).start()
    net.lab.etc("hosts", "127.0.0.1 localhost\n::1 localhost\n")
    net.lab.etc("resolv.conf", f"nameserver {lab.NEXT_V4}\n")
    subject = ["-subj", f"/CN={WWW}", "-addext", f"subjectAltName=DNS:{WWW}", "-nodes", "-days", "2"]
    key, certificate = folder / "key.pem", folder / "ca.pem"
    new = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-keyout", str(key), "-out", str(certificate), *subject]
    subprocess.run(new, check=True, capture_output=True)
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificate, key)
    server = ThreadingHTTPServer(("", 0), Page, bind_and_activate=False)
    server.socket.close()
    server.socket = context.wrap_socket(outside.listen("203.0.113.5", 443), server_side=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    stack.callback(server.server_close)
    stack.callback(server.shutdown)


def follow(shell: Shell, document: str) -> None:
    """Type all of a document."""
    seen_files: set[str] = set()
    started: set[str] = set()
    for what, text in commands(document):
        if what != "type":
            path = what.removeprefix("write ")
            mode = ">>" if path in seen_files else ">"
            seen_files.add(path)
            shell.must(f"cat {mode}{path} <<'END'\n{text}\nEND")
            continue
        if reason := next((NOT_TYPED[start] for start in NOT_TYPED if text.startswith(start)), None):
            shell.typed.append(f"{text}: {reason}")
            look_at(text)
            for name in ("usocksd", "transocks"):
                if re.match(rf"systemctl (enable --now|start)( \S+)* {name}( |$)", text) and name not in started:
                    started.add(name)  # what comes next asks it
                    shell.must(f"/opt/transocks/bin/{name} &")
                    wait_for(shell, PORTS[name])
            continue
        before(shell, text)
        status, said = shell.type(during(text))
        allowed = next((STATUS[start] for start in STATUS if text.startswith(start)), {0})
        assert status in allowed, f"{text}: exit status {status}: {said}"
        assert "Traceback" not in said
        shell.typed.append(text)


def before(shell: Shell, command: str) -> None:
    """Events on the reader's host meanwhile."""
    for start, name in (("transocks rules apply", "transocks"), ("curl", "usocksd")):
        if command.startswith(start):
            wait_for(shell, PORTS[name])
    if command.startswith("usocksd explain"):  # a client has been there
        ask = (
            "import socket; s = socket.create_connection(('198.51.100.10', 1080), 20, ('10.1.2.3', 0));"
            "s.sendall(b'\\5\\1\\0\\5\\1\\0\\1\\xcb\\0\\x71\\5\\1\\xbb'); print(s.recv(12, socket.MSG_WAITALL)[3:4])"
        )
        assert "x00" in shell.must(f"ip netns exec outside python3 -c {shlex.quote(ask)}")


def wait_for(shell: Shell, port: int) -> None:
    """Returns when somebody listens on this port of loopback."""
    wait = f"import socket, time\nwhile socket.socket().connect_ex(('127.0.0.1', {port})): time.sleep(0.02)"
    shell.must(f"timeout 30 python3 -c {shlex.quote(wait)}")


def during(command: str) -> str:
    """Commands that run until Ctrl-C end when nobody reads their output."""
    return f"{command} | head -n 3" if "--watch" in command else command


def look_at(command: str) -> None:
    """Files named in commands that are not typed exist."""
    words = shlex.split(command)
    if words[0] == "systemctl" and "daemon-reload" not in words:
        units = [word for word in words[2:] if not word.startswith("-")]
        for unit in units:
            name = unit if "." in unit else f"{unit}.service"
            assert (ROOT / "deploy" / "systemd" / name).exists(), command
    for word in words:
        if "/" in word and word.startswith(("deploy/", "iptables/")):
            assert (ROOT / word).exists(), command


def test_the_readme(shell: Shell) -> None:
    follow(shell, "README.md")
    assert "transocks rules remove" in shell.typed
    assert "transocks" not in shell.must("nft list tables")
    assert "usocksd connections --watch" in shell.typed


def test_running_as_a_service(shell: Shell) -> None:
    shell.must(f"mkdir -p /opt/transocks && ln -s {shlex.quote(str(PROGRAMS))} /opt/transocks/bin")
    follow(shell, "docs/running.md")
    assert shell.must("stat -c %U:%a /var/log/usocksd /etc/usocksd.toml").split() == ["usocksd:750", "root:640"]
    shell.must("nft --check --file /etc/transocks/rules.nft")
    assert "usocksd check /etc/usocksd.toml" in shell.typed
