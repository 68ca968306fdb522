"""OpenSSH through netcat as its ProxyCommand, as ssh_config(5) shows it, to a real sshd; and netcat by itself."""

from __future__ import annotations

import contextlib
import getpass
import os
import pwd
import socket
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from random import Random

import pytest
from world import DENIED, PATIENCE, UNKNOWN, Clients, Daemon, FarEnd, has_ipv6, need

SOME = Random(6).randbytes(300_000)
ipv6 = pytest.mark.skipif(not has_ipv6(), reason="no IPv6 on loopback here")
# The -X of nc(1), and the protocol of the access record.
versions = pytest.mark.parametrize(("version", "protocol"), [("4", "SOCKS4/4a"), ("5", "SOCKS5")])


def netcat() -> str:
    """The path of an nc that speaks SOCKS."""
    path = need("nc", "netcat-openbsd")
    if "OpenBSD" not in subprocess.run([path, "-h"], capture_output=True, text=True, check=False).stderr:
        pytest.skip("nc is not OpenBSD's, the one that speaks SOCKS (Debian package netcat-openbsd)")
    return path


class Ssh:
    """An sshd for this user and one key, on a free port of 127.0.0.1, and an ssh that has that key."""

    def __init__(self, folder: Path) -> None:
        keygen = need("ssh-keygen", "openssh-client")
        self._ssh = need("ssh", "openssh-client")
        self._sshd = need("sshd", "openssh-server")
        shell = pwd.getpwuid(os.getuid()).pw_shell
        if shell.endswith(("/nologin", "/false")):
            pytest.skip(f"sshd lets in nobody whose shell is {shell}")
        self._nc = netcat()
        self._folder = folder
        for name in "host", "user":
            command = [keygen, "-q", "-t", "ed25519", "-N", "", "-C", "", "-f", str(folder / name)]
            subprocess.run(command, check=True, timeout=PATIENCE)
        (folder / "known").write_text(f"the-far-end {(folder / 'host.pub').read_text()}")
        (folder / "sshd_config").write_text(
            f"HostKey {folder}/host\nAuthorizedKeysFile {folder}/user.pub\nStrictModes no\nUsePAM no\n"
            "PasswordAuthentication no\nPermitRootLogin prohibit-password\nPidFile none\n"
        )
        self._log = (folder / "sshd.log").open("ab")
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._thread = threading.Thread(target=self._accept)
        self._thread.start()

    def _accept(self) -> None:
        # sshd can't be told to take a free port, but it serves a connection that somebody else accepted (-i).
        command = [self._sshd, "-i", "-e", "-f", str(self._folder / "sshd_config")]
        sessions = []
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self._listener.accept()
                with connection:
                    sessions.append(subprocess.Popen(command, stdin=connection, stdout=connection, stderr=self._log))
        for session in sessions:
            session.wait(PATIENCE)

    def run(
        self, clients: Clients, daemon: Daemon, version: str, host: str, command: str, stdin: bytes = b""
    ) -> subprocess.CompletedProcess[bytes]:
        """Runs a command on that host, by way of the daemon."""
        folder = self._folder
        # fmt: off
        return clients.run(
            self._ssh, "-F", "none", "-i", folder / "user", "-p", str(self.port),
            "-o", "BatchMode=yes", "-o", "IdentitiesOnly=yes", "-o", "StrictHostKeyChecking=yes",
            "-o", f"UserKnownHostsFile={folder / 'known'}", "-o", "HostKeyAlias=the-far-end",
            "-o", f"ProxyCommand={self._nc} -X {version} -x {daemon.address} %h %p",
            f"{getpass.getuser()}@{host}", command, stdin=stdin,
        )
        # fmt: on

    @property
    def log(self) -> str:
        """The output of sshd."""
        return (self._folder / "sshd.log").read_text()

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join(PATIENCE)
        self._listener.close()
        self._log.close()


@pytest.fixture(scope="module")
def ssh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ssh]:
    # The directory for sshd's privilege separation, if it is root; Debian's service makes it.
    prison = Path("/run/sshd")
    made = os.geteuid() == 0 and not prison.exists()
    if made:
        prison.mkdir(0o755)
    try:
        ssh = Ssh(tmp_path_factory.mktemp("ssh"))
        yield ssh
        ssh.close()
    finally:
        if made:
            prison.rmdir()


# Sends the address of the client, as nc does below, then echoes.
ECHO = 'set -- $SSH_CONNECTION; echo "$1:$2"; cat'


@versions
def test_a_command_by_address(clients: Clients, daemon: Daemon, ssh: Ssh, version: str, protocol: str) -> None:
    done = ssh.run(clients, daemon, version, "127.0.0.1", ECHO, SOME)
    assert done.returncode == 0, done.stderr.decode() + ssh.log
    peer, _, echoed = done.stdout.partition(b"\n")
    assert echoed == SOME
    record = daemon.expect("proxy ends", src_addr=peer.decode())
    wanted = {"protocol": protocol, "dest_host": "127.0.0.1", "dest_port": ssh.port, "user": None, "error": None}
    assert record.items() >= wanted.items()
    assert record["tx_bytes"] > len(SOME)
    assert record["rx_bytes"] > len(SOME)


def test_a_command_by_name(clients: Clients, daemon: Daemon, ssh: Ssh, names: str) -> None:
    """Where the name has an address of each family, but sshd listens on that of IPv4 alone."""
    done = ssh.run(clients, daemon, "5", "both.test", ECHO, SOME)
    assert done.returncode == 0, done.stderr.decode() + ssh.log
    peer, _, echoed = done.stdout.partition(b"\n")
    assert echoed == SOME
    daemon.expect("proxy ends", src_addr=peer.decode(), dest_host="both.test", dest_addr=f"127.0.0.1:{ssh.port}")


def test_the_exit_status_of_the_command(clients: Clients, daemon: Daemon, ssh: Ssh) -> None:
    assert ssh.run(clients, daemon, "5", "127.0.0.1", "exit 42").returncode == 42
    daemon.expect("proxy ends", dest_port=ssh.port)


@versions
def test_a_denied_host(clients: Clients, daemon: Daemon, ssh: Ssh, version: str, protocol: str) -> None:
    done = ssh.run(clients, daemon, version, DENIED, "true")
    assert done.returncode == 255
    assert b"nc: connection failed, SOCKSv" + version.encode() in done.stderr
    daemon.expect("ruleset mismatch", protocol=protocol, dest_host=DENIED, dest_port=ssh.port, rule="allow_sites")


# netcat without a proxy: the far end's echo sends the address of its client.


class Netcat:
    """nc through a daemon, by default to the far end's echo; it ends its direction when all is sent."""

    def __init__(self, clients: Clients, far: FarEnd) -> None:
        self._path = netcat()
        self._clients = clients
        self._far = far

    def __call__(
        self, daemon: Daemon, version: str, host: str, *, port: int | None = None
    ) -> subprocess.CompletedProcess[bytes]:
        command = [self._path, "-N", "-X", version, "-x", daemon.address, host, str(port or self._far.echo)]
        return self._clients.run(*command, stdin=SOME)

    def peer(self, done: subprocess.CompletedProcess[bytes]) -> str:
        """The address of the client, if everything came back."""
        assert (done.returncode, done.stderr) == (0, b"")
        peer, _, echoed = done.stdout.partition(b"\n")
        assert echoed == SOME
        return peer.decode()


@pytest.fixture
def nc(clients: Clients, far: FarEnd) -> Netcat:
    return Netcat(clients, far)


def complaint(done: subprocess.CompletedProcess[bytes]) -> str:
    assert done.returncode == 1
    return done.stderr.decode().strip()


@versions
def test_nc_to_an_ipv4_address(nc: Netcat, far: FarEnd, daemon: Daemon, version: str, protocol: str) -> None:
    """It ends its direction first, and must still get the echo."""
    peer = nc.peer(nc(daemon, version, "127.0.0.1"))
    daemon.relayed(far, peer, protocol=protocol, dest_host="127.0.0.1", dest_port=far.echo)


@ipv6
def test_nc_to_an_ipv6_address(nc: Netcat, far: FarEnd, daemon: Daemon) -> None:
    peer = nc.peer(nc(daemon, "5", "::1"))
    daemon.relayed(far, peer, protocol="SOCKS5", dest_host="::1", dest_addr=f"[::1]:{far.echo}")


def test_nc_to_a_name(nc: Netcat, far: FarEnd, daemon: Daemon, names: str) -> None:
    peer = nc.peer(nc(daemon, "5", "inside.test"))
    daemon.relayed(far, peer, protocol="SOCKS5", dest_host="inside.test", dest_addr=f"127.0.0.1:{far.echo}")


@pytest.mark.parametrize(("version", "words"), [("4", "Request rejected or failed"), ("5", "Connection refused")])
def test_nc_to_a_refused_port(nc: Netcat, far: FarEnd, daemon: Daemon, version: str, words: str) -> None:
    done = nc(daemon, version, "127.0.0.1", port=far.refused)
    assert complaint(done) == f"nc: connection failed, SOCKSv{version} error: {words}"
    daemon.expect("dial to destination failed", dest_port=far.refused)


def test_nc_to_a_denied_address(nc: Netcat, daemon: Daemon) -> None:
    done = nc(daemon, "5", DENIED)
    assert complaint(done) == "nc: connection failed, SOCKSv5 error: Connection not allowed by ruleset"
    daemon.expect("ruleset mismatch", dest_host=DENIED)


def test_nc_to_an_unknown_name(nc: Netcat, daemon: Daemon, names: str) -> None:
    done = nc(daemon, "5", UNKNOWN)
    assert complaint(done) == "nc: connection failed, SOCKSv5 error: Host unreachable"
    daemon.expect("dial to destination failed", dest_host=UNKNOWN)


def test_nc_where_a_user_is_needed(nc: Netcat, guarded: Daemon) -> None:
    assert complaint(nc(guarded, "5", "127.0.0.1")) == "nc: authentication method negotiation failed"
    guarded.expect("handshake failed", error="no acceptable authentication method among [00]")


def test_nc_speaking_http(nc: Netcat, daemon: Daemon) -> None:
    done = nc(daemon, "connect", "127.0.0.1")
    assert complaint(done) == 'nc: Proxy error: "HTTP/1.1 501 SOCKS proxy, not HTTP"'
    daemon.expect("handshake failed", error="spoke HTTP to a SOCKS port")
