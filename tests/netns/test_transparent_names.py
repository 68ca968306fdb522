"""Names of redirected connections: TLS and HTTP clients over a real redirect, rules and routes by name, forged names."""

from __future__ import annotations

import contextlib
import re
import shutil
import socket
import ssl
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from socket import socket as Socket

import daemons
import lab
import pytest
from daemons import Daemon, NameServer, Served, lives, receive_all, receive_exactly
from test_redirect import WEB, connect, load, usocksd

OTHER = {4: lab.OTHER_V4, 6: lab.OTHER_V6}
ALLOWED, DENIED = "www.allowed.test", "www.denied.test"

# Rules by name; connections with no name or another name are denied.
BY_NAME = f"""
[incoming]
port = 1080
addresses = ["127.0.0.1"]
[outgoing]
mark = 0x7473
[[rule]]
name = "allowed"
action = "allow"
to = ["{ALLOWED}"]
[[rule]]
name = "all else"
action = "deny"
"""
TRANSOCKS = """
listen = "localhost:1081"
proxy_url = "socks5h://127.0.0.1:1080"
mark = 0x7473
"""
USOCKSD = BY_NAME.partition("[[rule]]")[0]
CHROMIUM = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ca.pem, and for each name a NAME.pem with key and certificate."""
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not installed")
    folder = tmp_path_factory.mktemp("certificates")

    def openssl(*words: str) -> None:
        subprocess.run(["openssl", *words], cwd=folder, check=True, capture_output=True)

    new = ["req", "-x509", "-nodes", "-days", "30", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"]
    openssl(*new, "-subj", "/CN=test CA", "-keyout", "ca.key", "-out", "ca.pem")
    for name in (ALLOWED, DENIED):
        openssl(
            *new, "-subj", f"/CN={name}", "-CA", "ca.pem", "-CAkey", "ca.key", "-addext", f"subjectAltName=DNS:{name}",
            "-addext", "basicConstraints=critical,CA:FALSE", "-keyout", f"{name}.pem", "-out", f"{name}.crt",
        )  # fmt: skip
        with (folder / f"{name}.pem").open("a") as file:
            file.write((folder / f"{name}.crt").read_text())
    return folder


class Site(Served):
    """A web server over TLS: its page is its name, which its certificate has."""

    def __init__(self, net: lab.Net, address: str, name: str, certificates: Path, port: int = 443) -> None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificates / f"{name}.pem")

        def serve(sock: Socket) -> None:
            try:
                with context.wrap_socket(sock, server_side=True) as tls:
                    tls.recv(65536)
                    head = f"HTTP/1.1 200 OK\r\nContent-Length: {len(name)}\r\nConnection: close\r\n\r\n"
                    tls.sendall(head.encode() + name.encode())
            except OSError:  # a client that rejects the certificate closes
                pass

        super().__init__(net.outside.listen(address, port), serve)


@contextlib.contextmanager
def internet(net: lab.Net, certificates: Path) -> Iterator[tuple[Site, Site]]:
    """The sites of both names, over IPv4, and a name server that knows them."""
    net.lab.etc("resolv.conf", f"nameserver {lab.NEXT_V4}\n")
    sock = net.outside.socket(kind=socket.SOCK_DGRAM)
    sock.bind((lab.NEXT_V4, 53))
    with (
        NameServer({ALLOWED: [WEB[4]], DENIED: [OTHER[4]]}, sock),
        Site(net, WEB[4], ALLOWED, certificates) as allowed,
        Site(net, OTHER[4], DENIED, certificates) as denied,
    ):
        yield allowed, denied


@contextlib.contextmanager
def both(net: lab.Net, folder: Path, *, rules: str = BY_NAME, more: str = "") -> Iterator[tuple[Daemon, Daemon]]:
    with (
        usocksd(net, folder, rules) as server,
        Daemon("transocks", TRANSOCKS + more, folder, popen=net.proxy.popen) as client,
    ):
        load(net, "nft")
        yield client, server


def curl(net: lab.Net, certificates: Path, name: str, address: str) -> subprocess.CompletedProcess[str]:
    """Fetch the page of this name from this address, by TLS, the certificate checked."""
    where = f"[{address}]" if ":" in address else address
    words = ["curl", "-sS", "--cacert", certificates / "ca.pem", "--resolve", f"{name}:443:{where}"]
    return net.client.run(*words, f"https://{name}/", check=False)


def _subject(name: str) -> str:
    """A pattern for openssl's line about a certificate: since 3.2 without blanks."""
    return rf"subject=CN ?= ?{re.escape(name)}\n"


def test_rules_by_name(host_net: lab.Net, tmp_path: Path, certificates: Path) -> None:
    def page(sock: Socket) -> None:
        said = sock.recv(65536)
        sock.sendall(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n" + said.split(b"\r\n")[1])

    with (
        internet(host_net, certificates) as (allowed, denied),
        Site(host_net, WEB[6], ALLOWED, certificates) as allowed_6,
        Served(host_net.outside.listen(WEB[4], 80), page),
        both(host_net, tmp_path) as (client, server),
    ):

        def curl_http(name: str, address: str, host: str) -> subprocess.CompletedProcess[str]:
            words = ["-sS", "-H", f"Host: {host}", "--resolve", f"{name}:80:{address}", f"http://{name}/"]
            return host_net.client.run("curl", *words, check=False)

        def openssl(*more: str) -> str:
            words = ["s_client", "-connect", f"{OTHER[4]}:443", "-CAfile", str(certificates / "ca.pem"), *more]
            return host_net.client.run("openssl", *words, check=False).stdout

        # Allowed. Over IPv6 the name is requested too, and has only an IPv4 address.
        for count, (version, address) in enumerate(((4, f"{WEB[4]}:443"), (6, f"[{WEB[6]}]:443")), 1):
            done = curl(host_net, certificates, ALLOWED, WEB[version])
            assert (done.stdout, done.stderr) == (ALLOWED, "")
            record = client.record("proxy ends", dest_addr=address)
            assert (record["name"], record["name_from"]) == (ALLOWED, "tls")
            theirs = server.record("proxy ends", client_addr=record["src_addr"])
            assert (theirs["dest_host"], theirs["dest_addr"], theirs["rule"]) == (ALLOWED, f"{WEB[4]}:443", "allowed")
            assert (len(allowed.peers), allowed_6.peers) == (count, [])
        assert curl_http(ALLOWED, OTHER[4], ALLOWED).stdout == f"Host: {ALLOWED}"
        # Denied, honestly or by a forged Host.
        done = curl(host_net, certificates, DENIED, OTHER[4])
        assert done.returncode in (35, 56)  # a reset in the handshake
        assert server.record("ruleset mismatch")["dest_host"] == DENIED
        assert client.record("failed to connect to proxy server")["name"] == DENIED
        assert curl_http(ALLOWED, WEB[4], DENIED).returncode == 56
        assert curl(host_net, certificates, DENIED, WEB[4]).returncode in (35, 56)
        # To the denied site's address, with the allowed site's name: the connection reaches the allowed site.
        said = openssl("-servername", ALLOWED)
        assert re.search(_subject(ALLOWED), said)
        assert "Verification: OK" in said
        record = client.record("proxy ends", dest_addr=f"{OTHER[4]}:443")
        assert record["name"] == ALLOWED
        assert server.record("proxy ends", client_addr=record["src_addr"])["dest_addr"] == f"{WEB[4]}:443"
        # Without a name, or by one that does not exist, the address is judged.
        for more in (["-noservername"], ["-servername", "nowhere.test"]):
            assert "subject=" not in openssl(*more)
        assert {record["rule"] for record in server.records("ruleset mismatch")} == {"all else"}
        assert len(allowed.peers) == 3
        assert denied.peers == []


def test_the_wait(host_net: lab.Net, tmp_path: Path) -> None:
    """A server that speaks first is heard, on the ports of such protocols at once, and after the wait on others; a
    client that trickles waits once.
    """
    wait, long_wait = 1.0, 2.0

    def greet(sock: Socket) -> None:
        sock.sendall(b"220 welcome\r\n")
        daemons.echo(sock)

    def heard_after(port: int) -> float:
        since = time.monotonic()
        with connect(host_net, 4, port) as sock:
            assert receive_exactly(sock, 13) == b"220 welcome\r\n"
            after = time.monotonic() - since
            assert lives(sock, b"EHLO client\r\n")
        return after

    said = f"GET / HTTP/1.1\r\nHost: {ALLOWED}\r\n\r\n".encode()
    with (
        both(host_net, tmp_path, rules=USOCKSD, more=f"[names]\nwait = {wait}\nlong_wait = {long_wait}\n") as (
            client,
            _,
        ),
        Served(host_net.outside.listen(WEB[4], 25), greet),
        Served(host_net.outside.listen(WEB[4], 2500), greet),
        Served(host_net.outside.listen(WEB[4], 80), daemons.echo) as web,
    ):
        assert heard_after(25) < wait
        assert wait <= heard_after(2500) < wait + 5
        with connect(host_net, 4, 80) as sock:
            for at, byte in enumerate(said):
                sock.sendall(bytes([byte]))
                assert receive_exactly(sock, 1) == said[at : at + 1]  # which takes a wait with the first one only
            sock.shutdown(socket.SHUT_WR)
            assert receive_all(sock) == b""
        end = client.record("proxy ends", dest_addr=f"{WEB[4]}:80")
        assert (end["name"], end["tx_bytes"], end["rx_bytes"]) == (None, len(said), len(said))
        assert len(web.peers) == 1


def test_routes(host_net: lab.Net, tmp_path: Path, certificates: Path) -> None:
    """To another proxy, past all of them, and nowhere."""
    more = f"""
    [upstream.second]
    proxy_url = "socks5h://127.0.0.1:1090"
    [[route]]
    name = "second"
    to = ["{DENIED}"]
    via = "second"
    [[route]]
    name = "past"
    to = ["{OTHER[4]}"]
    ports = ["8000-8999"]
    via = "direct"
    [[route]]
    name = "no"
    to = ["{OTHER[4]}"]
    via = "reject"
    """
    second = USOCKSD.replace("1080", "1090") + f'addresses = ["{lab.PROXY_V4[1]}"]\n'
    (tmp_path / "second").mkdir()
    with (
        internet(host_net, certificates) as (allowed, denied),
        Daemon("usocksd", second, tmp_path / "second", popen=host_net.proxy.popen),
        both(host_net, tmp_path, rules=USOCKSD, more=more) as (client, _),
        Served(host_net.outside.listen(OTHER[4], 8080), daemons.echo) as plain,
    ):
        assert curl(host_net, certificates, ALLOWED, WEB[4]).stdout == ALLOWED
        assert curl(host_net, certificates, DENIED, OTHER[4]).stdout == DENIED
        assert (len(allowed.peers), denied.peers[0][0]) == (1, lab.PROXY_V4[1])
        # The name does not exist, so the address is used.
        words = ["openssl", "s_client", "-connect", f"{WEB[4]}:443", "-servername", "nowhere.test"]
        assert re.search(_subject(ALLOWED), host_net.client.run(*words, check=False).stdout)
        assert client.record("name leads nowhere")["name"] == "nowhere.test"
        assert client.record("proxy ends", name="nowhere.test")["dest_addr"] == f"{WEB[4]}:443"
        with connect(host_net, 4, 8080, OTHER[4]) as sock:
            assert lives(sock, b"\0")
        with pytest.raises(ConnectionResetError), connect(host_net, 4, 443, OTHER[4]) as sock:
            receive_all(sock)
        assert client.record("proxy ends", name=ALLOWED)["group"] == "default"
        for route, group in (("second", "second"), ("past", "direct")):
            assert client.record("proxy ends", route=route)["group"] == group
        assert client.record("rejected by route")["route"] == "no"
        assert client.record("proxy ends", route="past")["src_addr"] == "{}:{}".format(*plain.peers[0])


@pytest.fixture
def chromium(
    host_net: lab.Net, tmp_path: Path, certificates: Path
) -> Callable[[str], subprocess.CompletedProcess[str]]:
    """Prints the document at an address, or the page that explains why there is none. Trusts the test CA."""
    path = next(filter(None, map(shutil.which, CHROMIUM)), None)
    if path is None:
        pytest.skip("Chromium is not installed (Debian package chromium-headless-shell)")
    if shutil.which("certutil") is None:
        pytest.skip("certutil is not installed, with which Chromium is told of a CA (Debian package libnss3-tools)")
    home = tmp_path / "home"
    database = home / ".pki" / "nssdb"
    database.mkdir(parents=True)
    for words in (["-N", "--empty-password"], ["-A", "-t", "C,,", "-n", "test", "-i", str(certificates / "ca.pem")]):
        subprocess.run(["certutil", "-d", f"sql:{database}", *words], check=True, capture_output=True)
    options = [
        "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--disable-quic", "--no-first-run",
        "--disable-background-networking", "--disable-component-update", "--disable-sync", "--dump-dom",
        f"--user-data-dir={tmp_path / 'profile'}",
    ]  # fmt: skip
    command = ["env", f"HOME={home}", path, *options]
    return lambda url: host_net.client.run(*command, url, check=False)


@pytest.mark.parametrize("when_ech", ["name", "address"])
def test_a_browser(
    host_net: lab.Net,
    tmp_path: Path,
    certificates: Path,
    chromium: Callable[[str], subprocess.CompletedProcess[str]],
    when_ech: str,
) -> None:
    """Each of its hellos looks like ECH: rules by name match it only if the operator has set that."""
    host_net.lab.etc("hosts", f"{WEB[4]} {ALLOWED}\n{OTHER[4]} {DENIED}\n")
    more = f"[names]\nwhen_ech = '{when_ech}'\n"
    with internet(host_net, certificates) as (_, denied), both(host_net, tmp_path, more=more) as (client, server):
        done = chromium(f"https://{ALLOWED}/")
        if when_ech == "name":
            assert f">{ALLOWED}<" in done.stdout, done.stderr
            record = client.record("proxy ends", name=ALLOWED)
            assert server.record("proxy ends", client_addr=record["src_addr"])["rule"] == "allowed"
        else:
            assert "ERR_CONNECTION_RESET" in done.stdout + done.stderr
            record = client.record("failed to connect to proxy server", name=ALLOWED)
            assert server.record("ruleset mismatch")["dest_host"] == WEB[4]
        assert record["name_from"] == "unverified"
        if when_ech == "name":
            done = chromium(f"https://{DENIED}/")
            assert "ERR_CONNECTION_RESET" in done.stdout + done.stderr
        assert denied.peers == []
