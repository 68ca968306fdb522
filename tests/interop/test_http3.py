"""HTTP/3 through UDP ASSOCIATE: curl_cffi asks, aioquic answers, and the certificate is checked."""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import socket
import threading
from collections.abc import Iterator
from ipaddress import ip_address
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from world import Daemon

REASON = "not installed (PyPI curl-cffi, aioquic)"
requests: Any = pytest.importorskip("curl_cffi.requests", reason=REASON)
aioquic: Any = pytest.importorskip("aioquic.asyncio", reason=REASON)
BODY = b"over QUIC " * 20_000


def certificate(folder: Path, host: str = "127.0.0.1") -> tuple[Path, Path]:
    """A certificate for this address that signs itself, and its key."""
    from cryptography import x509  # noqa: PLC0415  # aioquic brings it
    from cryptography.hazmat.primitives import hashes, serialization  # noqa: PLC0415
    from cryptography.hazmat.primitives.asymmetric import ec  # noqa: PLC0415
    from cryptography.x509.oid import NameOID  # noqa: PLC0415

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, host)])
    now = datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ip_address(host))]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    cert_file, key_file = folder / "cert.pem", folder / "key.pem"
    cert_file.write_bytes(made.public_bytes(serialization.Encoding.PEM))
    kind = serialization.PrivateFormat.PKCS8
    key_file.write_bytes(key.private_bytes(serialization.Encoding.PEM, kind, serialization.NoEncryption()))
    return cert_file, key_file


@contextlib.contextmanager
def server(cert: Path, key: Path, host: str = "127.0.0.1", port: int = 0) -> Iterator[int]:
    """An HTTP/3 server that answers everything with BODY; its port."""
    from aioquic.asyncio.protocol import QuicConnectionProtocol  # noqa: PLC0415
    from aioquic.h3.connection import H3_ALPN, H3Connection  # noqa: PLC0415
    from aioquic.h3.events import HeadersReceived  # noqa: PLC0415
    from aioquic.quic.configuration import QuicConfiguration  # noqa: PLC0415

    class Protocol(QuicConnectionProtocol):  # type: ignore[misc]
        _http: Any = None

        def quic_event_received(self, event: Any) -> None:
            if self._http is None:
                self._http = H3Connection(self._quic)
            for each in self._http.handle_event(event):
                if isinstance(each, HeadersReceived):
                    length = str(len(BODY)).encode()
                    self._http.send_headers(each.stream_id, [(b":status", b"200"), (b"content-length", length)])
                    self._http.send_data(each.stream_id, BODY, end_stream=True)
            self.transmit()

    configuration = QuicConfiguration(alpn_protocols=H3_ALPN, is_client=False)
    configuration.load_cert_chain(cert, key)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.bind((host, port))
        port = probe.getsockname()[1]
    loop = asyncio.new_event_loop()

    serve = aioquic.serve(host, port, configuration=configuration, create_protocol=Protocol)
    serving = loop.run_until_complete(serve)
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        yield port
    finally:
        loop.call_soon_threadsafe(serving.close)
        loop.call_soon_threadsafe(loop.call_later, 0.2, loop.stop)  # until what it has closed is closed
        thread.join()
        loop.close()


def test_http3(daemon: Daemon, tmp_path: Path) -> None:
    cert, key = certificate(tmp_path)
    with server(cert, key) as port:
        proxy = f"socks5://{daemon.host}:{daemon.port}"
        answer = requests.get(
            f"https://127.0.0.1:{port}/", http_version="v3only", proxy=proxy, verify=str(cert), timeout=30
        )
        assert answer.status_code == 200
        assert answer.content == BODY
        with pytest.raises(requests.exceptions.RequestException):  # another authority
            requests.get(f"https://127.0.0.1:{port}/", http_version="v3only", proxy=proxy, timeout=30)
