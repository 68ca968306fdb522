"""Upstream proxies as the configuration names them: by URL."""

from __future__ import annotations

import enum
import re
from typing import Annotated
from urllib.parse import unquote

import attrs

from usocksd.names.match import canonical_host
from usocksd.net.address import IPAddress, join_port
from usocksd.settings.loader import Invalid
from usocksd.settings.types import one_or_more, parse_zoned_address, split_port


class ProxyScheme(enum.Enum):
    """The protocol of an upstream proxy, and whether it resolves names."""

    SOCKS5 = "socks5"
    """asked for addresses only"""
    SOCKS5H = "socks5h"
    SOCKS4A = "socks4a"
    HTTP = "http"

    @property
    def takes_names(self) -> bool:
        """Whether the proxy is to resolve names itself, if one is known."""
        return self is not ProxyScheme.SOCKS5

    @property
    def is_socks5(self) -> bool:
        """Whether the proxy speaks SOCKS5."""
        return self in (ProxyScheme.SOCKS5, ProxyScheme.SOCKS5H)


class Discovery(enum.Enum):
    """What the host of a URL stands for, other than one proxy: the second part of its scheme."""

    SERVICE = "srv"
    """the servers in its SRV records"""
    ADDRESSES = "dns"
    """each of its addresses"""


class SecretStr:
    """A string that does not print: str(), repr() and format() give "***", `reveal()` gives the string."""

    __slots__ = ("_value",)

    def __init__(self, value: str) -> None:
        self._value = value

    def reveal(self) -> str:
        return self._value

    def __repr__(self) -> str:
        return "***"

    def __eq__(self, other: object) -> bool:
        return self._value == other._value if isinstance(other, SecretStr) else NotImplemented

    def __hash__(self) -> int:
        return hash(self._value)


@attrs.frozen(kw_only=True)
class ProxyURL:
    """The upstream proxy. A password is set only beside a user. str(), for log records, has neither."""

    scheme: ProxyScheme
    host: IPAddress | str
    port: int
    """0 if `discovery` finds it"""
    username: str | None = None
    password: SecretStr | None = None
    discovery: Discovery | None = None

    @property
    def secret(self) -> str | None:
        """The password in clear."""
        return None if self.password is None else self.password.reveal()

    def __str__(self) -> str:
        if self.discovery is None:
            return f"{self.scheme.value}://{join_port(self.host, self.port)}"
        place = join_port(self.host, self.port) if self.port else self.host
        return f"{self.scheme.value}+{self.discovery.value}://{place}"


_SCHEMES = {scheme.value: scheme for scheme in ProxyScheme}
_DISCOVERIES = {discovery.value: discovery for discovery in Discovery}

_URL = re.compile(r"([^:/?#@]*)://(?:(.*)@)?([^/?#@]*)(/?)", re.DOTALL)

_EXPECTED = (
    "socks5://USER:PASSWORD@HOST:PORT or http://USER:PASSWORD@HOST:PORT (user and password optional; also socks5h and"
    " socks4a), or a list of them"
)


def parse_proxy_url(value: str) -> ProxyURL:
    """SCHEME://USER:PASSWORD@HOST:PORT, where the scheme is one of ProxyScheme; socks4a has no password. With +srv
    behind the scheme, the host is a service with SRV records, which have the port; with +dns, each address of the name
    is a proxy.

    User and password are percent-decoded (RFC 3986 section 3.2.1). The port of a SOCKS server defaults to
    1080 as in the original; an HTTP proxy has no usual one (3128, 8080, 80), and the original could not dial
    without: it is required.

    Raises Invalid, which quotes nothing of the URL: any part of a mistyped one may be the password.
    """
    match = _URL.fullmatch(value)
    if match is None:
        raise ValueError
    first, plus, second = match[1].lower().partition("+")
    scheme, discovery = _SCHEMES.get(first), _DISCOVERIES.get(second)
    if scheme is None or (plus and discovery is None):
        raise Invalid("expected socks5://, socks5h://, socks4a:// or http:// at the start, or one of them with +srv or"
                      " +dns")  # fmt: skip
    username, password = _userinfo(match[2], scheme)
    try:
        hostname, port = split_port(match[3])
        if ":" in hostname and not match[3].startswith("["):
            raise ValueError  # ::1:1080 could be either
        address, percent, zone = hostname.partition("%")
        host = canonical_host(address)
        if percent and isinstance(host, str):
            raise ValueError
    except ValueError:
        raise Invalid("expected HOST:PORT, with an IPv6 address in brackets, at the end") from None
    if not isinstance(host, str):
        # As in RFC 6874, [fe80::1%25eth0], or with a plain %.
        host = parse_zoned_address(f"{host}{percent}{unquote(zone[2:]) if zone.startswith('25') else zone}")
    if not isinstance(host, str) and (host.is_unspecified or host.is_multicast):
        raise Invalid("expected the address of one host, not the unspecified address or multicast")
    if discovery is not None and not isinstance(host, str):
        raise Invalid(f"expected a name to look up with +{discovery.value}, not an address")
    if discovery is Discovery.SERVICE:
        if port is not None:
            raise Invalid("expected no port with +srv: the records have it")
        return ProxyURL(scheme=scheme, host=host, port=0, username=username, password=password, discovery=discovery)
    if port is None and scheme is not ProxyScheme.HTTP:
        port = 1080
    if not port:
        raise Invalid("expected a port from 1 to 65535, as in http://HOST:3128")
    return ProxyURL(scheme=scheme, host=host, port=port, username=username, password=password, discovery=discovery)


def _userinfo(value: str | None, scheme: ProxyScheme) -> tuple[str | None, SecretStr | None]:
    if value is None:
        return None, None
    if re.search(r"[/?#]|%(?![0-9a-fA-F]{2})", value):
        raise Invalid("expected user and password percent-encoded: / as %2F, ? as %3F, # as %23, % as %25, @ as %40")
    raw_user, colon, raw_password = value.partition(":")
    try:
        user, password = unquote(raw_user, errors="strict"), unquote(raw_password, errors="strict")
    except UnicodeDecodeError:
        raise Invalid("expected user and password in UTF-8, percent-encoded") from None
    if re.search(r"[\x00-\x1f\x7f]", user + password):
        raise Invalid("expected user and password without control characters")
    if scheme is ProxyScheme.SOCKS4A:
        if colon or not 1 <= len(user.encode()) <= 255:
            raise Invalid("expected a user of 1 to 255 bytes and no password, which SOCKS4 does not have")
        return user, None
    if scheme.is_socks5 and not (1 <= len(user.encode()) <= 255 and len(password.encode()) <= 255):
        raise Invalid("expected a user of 1 to 255 bytes and a password of at most 255 (RFC 1929)")
    if scheme is ProxyScheme.HTTP and ":" in user:
        raise Invalid("expected a user without a colon (RFC 7617)")
    return user, SecretStr(password)


ProxyURLs = Annotated[tuple[ProxyURL, ...], one_or_more(lambda value: [parse_proxy_url(value)], _EXPECTED, secret=True)]
"""The proxies of one group, in order."""
