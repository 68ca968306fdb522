"""transocks.toml as typed values. deploy/transocks.toml tells the operator what each setting does."""

from __future__ import annotations

import enum
import re
import socket
from typing import Annotated
from urllib.parse import unquote

import attrs

from usocksd.match import canonical_host
from usocksd.runtime.common import Common
from usocksd.runtime.config import Invalid, Parser, SecretStr, show
from usocksd.runtime.hostport import join_port
from usocksd.runtime.settings import (
    ANY_ADDRESS,
    LOCALHOST,
    DnsConfig,
    IPAddress,
    LimitsConfig,
    ListenAddress,
    ListenIP,
    ListenPort,
    LogConfig,
    Mark,
    SocketPath,
    Timeouts,
    Workers,
    check_distinct_address,
    parse_address,
    split_port,
    text,
)


class ProxyScheme(enum.Enum):
    """What the upstream proxy speaks."""

    SOCKS5 = "socks5"
    HTTP = "http"


@attrs.frozen(kw_only=True)
class ProxyURL:
    """The upstream proxy. User and password are set both or neither. str(), for log records, has no user."""

    scheme: ProxyScheme
    host: IPAddress | str
    port: int
    username: str | None = None
    password: SecretStr | None = None

    def __str__(self) -> str:
        return f"{self.scheme.value}://{join_port(self.host, self.port)}"


# socks5h ("the proxy resolves") is the same to us, and the original took it.
_SCHEMES = {"socks5": ProxyScheme.SOCKS5, "socks5h": ProxyScheme.SOCKS5, "http": ProxyScheme.HTTP}

_URL = re.compile(r"([^:/?#@]*)://(?:(.*)@)?([^/?#@]*)(/?)", re.DOTALL)


def parse_proxy_url(value: str) -> ProxyURL:
    """socks5://USER:PASSWORD@HOST:PORT or http://USER:PASSWORD@HOST:PORT.

    User and password are percent-decoded (RFC 3986 section 3.2.1). The port of a SOCKS server defaults to
    1080 as in the original; an HTTP proxy has no usual one (3128, 8080, 80), and the original could not dial
    without: it is required.

    Raises Invalid, which quotes nothing of the URL: any part of a mistyped one may be the password.
    """
    match = _URL.fullmatch(value)
    if match is None:
        raise ValueError
    scheme = _SCHEMES.get(match[1].lower())
    if scheme is None:
        raise Invalid("expected socks5:// or http:// at the start")
    username, password = _userinfo(match[2], scheme)
    try:
        hostname, port = split_port(match[3])
        if "%" in hostname or (":" in hostname and not match[3].startswith("[")):
            raise ValueError  # ::1:1080 could be either; zones are lost on the way
        host = canonical_host(hostname)
    except ValueError:
        raise Invalid("expected HOST:PORT, with an IPv6 address in brackets, at the end") from None
    if not isinstance(host, str) and (host.is_unspecified or host.is_multicast):
        raise Invalid("expected the address of one host, not the unspecified address or multicast")
    if port is None and scheme is ProxyScheme.SOCKS5:
        port = 1080
    if not port:
        raise Invalid("expected a port from 1 to 65535, as in http://HOST:3128")
    return ProxyURL(scheme=scheme, host=host, port=port, username=username, password=password)


def _userinfo(value: str | None, scheme: ProxyScheme) -> tuple[str | None, SecretStr | None]:
    if value is None:
        return None, None
    if re.search(r"[/?#]|%(?![0-9a-fA-F]{2})", value):
        raise Invalid("expected user and password percent-encoded: / as %2F, ? as %3F, # as %23, % as %25, @ as %40")
    raw_user, _, raw_password = value.partition(":")
    try:
        user, password = unquote(raw_user, errors="strict"), unquote(raw_password, errors="strict")
    except UnicodeDecodeError:
        raise Invalid("expected user and password in UTF-8, percent-encoded") from None
    if re.search(r"[\x00-\x1f\x7f]", user + password):
        raise Invalid("expected user and password without control characters")
    if scheme is ProxyScheme.SOCKS5 and not (1 <= len(user.encode()) <= 255 and len(password.encode()) <= 255):
        raise Invalid("expected a user of 1 to 255 bytes and a password of at most 255 (RFC 1929)")
    if scheme is ProxyScheme.HTTP and ":" in user:
        raise Invalid("expected a user without a colon (RFC 7617)")
    return user, SecretStr(password)


_LISTEN_EXPECTED = '"host:port" or a list of them, as in "localhost:1081", "[::1]:1081" or ":1081" (all interfaces)'


def _parse_listen(value: object) -> tuple[ListenAddress, ...]:
    """Every address of every entry; the faults of all entries in one group."""
    entries = [value] if type(value) is str else value
    if type(entries) is not list or not entries:
        raise ValueError
    addresses: list[ListenAddress] = []
    faults: list[Invalid] = []
    for index, entry in enumerate(entries):
        try:
            found = _parse_listen_entry(entry)
            for listen in found:
                check_distinct_address(
                    listen.address, [other.address for other in addresses if other.port == listen.port]
                )
            addresses += found
        except ValueError as exc:
            expected = exc.expected if isinstance(exc, Invalid) else f"expected {_LISTEN_EXPECTED}"
            at = f"[{index}]" if type(value) is list else ""
            faults.append(Invalid(expected, shown=show(entry), at=at))
    if faults:
        raise ExceptionGroup("listen", faults)
    return tuple(addresses)


def _parse_listen_entry(value: object) -> list[ListenAddress]:
    if type(value) is not str:
        raise ValueError
    host, port = split_port(value)
    if port is None:
        raise Invalid('expected a port, as in "localhost:1081"')
    pair = ANY_ADDRESS if host in ("", "*") else LOCALHOST if host.lower() == "localhost" else None
    if pair is not None:
        return [ListenAddress(address, port, optional=True) for address in pair]
    try:
        address = parse_address(host)
    except Invalid:
        raise
    except ValueError:
        return [ListenAddress(address, port) for address in _lookup(host)]
    if address.is_multicast:
        raise Invalid("is multicast, expected an address of this host")
    return [ListenAddress(address, port)]


def _lookup(name: str) -> list[IPAddress]:
    """The addresses of a name of this host, by the system's resolver: asked once, as the original did."""
    try:
        canonical_host(name)
        infos = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
    except OSError as exc:
        raise Invalid(f"expected a name that resolves: {exc.strerror}") from None
    found = [str(info[4][0]) for info in infos]
    # An address with a zone (link-local) can't be listened on without naming it, and it isn't meant either.
    return list(dict.fromkeys(parse_address(address) for address in found if "%" not in address))


def _parse_listen_tproxy(value: object) -> tuple[ListenAddress, ...]:
    """The same, with IP_TRANSPARENT; an empty list is none."""
    found = () if value == [] else _parse_listen(value)
    return tuple(attrs.evolve(listen, transparent=True) for listen in found)


Listen = Annotated[tuple[ListenAddress, ...], Parser(_parse_listen, _LISTEN_EXPECTED)]
ListenTproxy = Annotated[tuple[ListenAddress, ...], Parser(_parse_listen_tproxy, _LISTEN_EXPECTED)]


@attrs.frozen(kw_only=True)
class Config:
    """The whole of transocks.toml; only `proxy_url` is required."""

    proxy_url: Annotated[
        ProxyURL,
        text(
            parse_proxy_url,
            "socks5://USER:PASSWORD@HOST:PORT or http://USER:PASSWORD@HOST:PORT (user and password optional)",
            secret=True,
        ),
    ]
    listen: Listen = tuple(ListenAddress(address, 1081, optional=True) for address in LOCALHOST)
    """`localhost` is both 127.0.0.1 and ::1, whatever the resolver says: REDIRECT goes to either."""
    listen_tproxy: ListenTproxy = ()
    """where TPROXY rules bring connections; their addresses are as in `listen`, their ports others"""
    mark: Mark | None = None
    """SO_MARK of the connections to the upstream, so that the firewall rules can exempt them"""
    log: LogConfig = attrs.field(factory=LogConfig)
    dns: DnsConfig = attrs.field(factory=DnsConfig)
    timeouts: Timeouts = attrs.field(factory=Timeouts)
    limits: LimitsConfig = attrs.field(factory=LimitsConfig)
    metrics_port: ListenPort | None = None
    """None: 1083 if nobody else has it; 0: no metrics endpoint"""
    metrics_address: ListenIP = LOCALHOST[0]
    workers: Workers | None = None
    """None: one for each CPU that this process may use"""
    control: SocketPath = "/run/transocks/control.sock"
    """None: no control socket"""

    def __attrs_post_init__(self) -> None:
        ports = {listen.port for listen in self.listen if listen.port}
        for listen in self.listen_tproxy:
            if listen.port in ports:
                expected = "has a port of listen, expected another: a listener is for REDIRECT or for TPROXY"
                raise Invalid(expected, shown=show(str(listen)), at="listen_tproxy")

    def common(self) -> Common:
        """The settings that usocksd has too."""
        return Common(
            listen=(
                *(("listen", listen) for listen in self.listen),
                *(("listen_tproxy", listen) for listen in self.listen_tproxy),
            ),
            metrics_prefix="",
            metrics_port=self.metrics_port,
            metrics_default=1083,
            metrics_address=self.metrics_address,
            mark_key="mark",
            mark=self.mark,
            log=self.log,
            timeouts=self.timeouts,
            limits=self.limits,
            workers=self.workers,
            control=self.control,
            control_default="/run/transocks/control.sock",
            more={"listen_tproxy": tuple(map(str, self.listen_tproxy)), "proxy_url": str(self.proxy_url)},
        )


__all__ = ["Config", "ProxyScheme", "ProxyURL", "parse_proxy_url"]
