"""Java's own SOCKS client (java.net.Socket, HttpURLConnection), where there is a Java."""

from __future__ import annotations

import shutil
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from world import DENIED, PASSWORD, PATIENCE, UNKNOWN, USER, Daemon, FarEnd, has_ipv6

ipv6 = pytest.mark.skipif(not has_ipv6(), reason="no IPv6 on loopback here")
SOCKET_EXCEPTION = "java.net.SocketException"


class Java:
    """One Java machine for all tests, since starting it is what takes long; see Client.java for what it can do."""

    def __init__(self, path: str) -> None:
        program = Path(__file__).with_name("Client.java")
        # The environment of the tests must not give the JVM a proxy, nor make it slow.
        options = ["-XX:TieredStopAtLevel=1", "-XX:+UseSerialGC", "-Xshare:auto", "-Dfile.encoding=UTF-8"]
        self._process = subprocess.Popen(
            [path, *options, program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, encoding="utf-8"
        )

    def __call__(
        self, job: str, daemon: Daemon, host: str, port: int, text: str, user: str = "", password: str = ""
    ) -> list[str]:
        """Has one job done; returns "ok" and the lines of the answer, or the exception's class and message."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        words = [job, str(daemon.port), user, password, host, str(port), text]
        self._process.stdin.write("\t".join(words) + "\n")
        self._process.stdin.flush()
        limit = threading.Timer(PATIENCE, self._process.kill)
        limit.start()
        answer = self._process.stdout.readline()
        limit.cancel()
        return answer.rstrip("\n").split("\t")

    def close(self) -> None:
        with self._process as process:
            assert process.stdin is not None
            process.stdin.close()
            assert process.wait(PATIENCE) == 0


@pytest.fixture(scope="module")
def java() -> Iterator[Java]:
    path = shutil.which("java")
    if path is None:
        pytest.skip("java is not installed (Debian package default-jdk-headless)")
    version = subprocess.run([path, "--list-modules"], capture_output=True, text=True, check=False)
    if "jdk.compiler@" not in version.stdout:
        pytest.skip("this java has no compiler for a source file (Debian package default-jdk-headless)")
    java = Java(path)
    yield java
    java.close()


def test_a_socket(java: Java, far: FarEnd, daemon: Daemon) -> None:
    ok, peer, echoed = java("socks5", daemon, "127.0.0.1", far.echo, "hello")
    assert (ok, echoed) == ("ok", "hello")
    daemon.relayed(far, peer, protocol="SOCKS5", dest_host="127.0.0.1", dest_port=far.echo, user=None)


@ipv6
def test_a_socket_to_an_ipv6_address(java: Java, far: FarEnd, daemon: Daemon) -> None:
    ok, peer, echoed = java("socks5", daemon, "::1", far.echo, "hello")
    assert (ok, echoed) == ("ok", "hello")
    record = daemon.relayed(far, peer, protocol="SOCKS5", dest_addr=f"[::1]:{far.echo}")
    assert record["dest_host"] == "::1"


def test_a_socket_to_a_name(java: Java, far: FarEnd, daemon: Daemon, names: str) -> None:
    ok, peer, echoed = java("socks5", daemon, "inside.test", far.echo, "hello")
    assert (ok, echoed) == ("ok", "hello")
    daemon.relayed(far, peer, protocol="SOCKS5", dest_host="inside.test")


def test_a_page(java: Java, far: FarEnd, daemon: Daemon, names: str) -> None:
    ok, peer, body = java("page", daemon, "inside.test", far.web, "/page")
    assert (ok, body + "\n") == ("ok", far.page("/page"))
    daemon.relayed(far, peer, protocol="SOCKS5", dest_host="inside.test", dest_port=far.web)


def test_socks4(java: Java, far: FarEnd, daemon: Daemon) -> None:
    ok, peer, echoed = java("socks4", daemon, "127.0.0.1", far.echo, "hello")
    assert (ok, echoed) == ("ok", "hello")
    daemon.relayed(far, peer, protocol="SOCKS4/4a", dest_host="127.0.0.1", user=None)


@pytest.mark.parametrize("daemon_of_users", ["guarded", "lenient"])
def test_a_user(request: pytest.FixtureRequest, java: Java, far: FarEnd, daemon_of_users: str) -> None:
    daemon: Daemon = request.getfixturevalue(daemon_of_users)
    ok, peer, echoed = java("socks5", daemon, "127.0.0.1", far.echo, "hello", USER, PASSWORD)
    assert (ok, echoed) == ("ok", "hello")
    daemon.relayed(far, peer, protocol="SOCKS5", user=USER)


def test_no_user_if_authentication_is_optional(java: Java, far: FarEnd, lenient: Daemon) -> None:
    """Java always offers a password. Asked for one when it has none it sends the login name and an empty password."""
    ok, peer, echoed = java("socks5", lenient, "127.0.0.1", far.echo, "hello")
    assert (ok, echoed) == ("ok", "hello")
    lenient.relayed(far, peer, protocol="SOCKS5", user=None)


def test_no_user_if_authentication_is_required(java: Java, far: FarEnd, guarded: Daemon) -> None:
    answer = java("socks5", guarded, "127.0.0.1", far.echo, "hello")
    assert answer == [SOCKET_EXCEPTION, "SOCKS : authentication failed"]
    guarded.expect("handshake failed", error="wrong user or password")


def test_a_wrong_password(java: Java, far: FarEnd, guarded: Daemon) -> None:
    answer = java("socks5", guarded, "127.0.0.1", far.echo, "hello", USER, "wrong")
    assert answer == [SOCKET_EXCEPTION, "SOCKS : authentication failed"]
    guarded.expect("handshake failed", error="wrong user or password")


@pytest.mark.parametrize(
    ("job", "words"), [("socks5", "SOCKS: Connection not allowed by ruleset"), ("socks4", "SOCKS request rejected")]
)
def test_a_denied_address(java: Java, far: FarEnd, daemon: Daemon, job: str, words: str) -> None:
    assert java(job, daemon, DENIED, far.echo, "hello") == [SOCKET_EXCEPTION, words]
    daemon.expect("ruleset mismatch", dest_host=DENIED, rule="allow_sites")


def test_a_refused_port(java: Java, far: FarEnd, daemon: Daemon) -> None:
    answer = java("socks5", daemon, "127.0.0.1", far.refused, "hello")
    assert answer == [SOCKET_EXCEPTION, "SOCKS: Connection refused"]
    daemon.expect("dial to destination failed", dest_port=far.refused)


def test_an_unknown_name(java: Java, far: FarEnd, daemon: Daemon, names: str) -> None:
    answer = java("socks5", daemon, UNKNOWN, far.echo, "hello")
    assert answer == [SOCKET_EXCEPTION, "SOCKS: Host unreachable"]
    daemon.expect("dial to destination failed", dest_host=UNKNOWN)
