"""What a valid transocks.toml says that this host can't do, or that nobody can have meant."""

from __future__ import annotations

from collections.abc import Iterator

from transocks.config import Config
from usocksd.addresses import HostAddresses
from usocksd.errors import Fault
from usocksd.runtime.lint import Host, lint_common, readable_by_all
from usocksd.runtime.listeners import may_be_transparent
from usocksd.runtime.settings import LOCALHOST


def warnings(config: Config, source: str | None = None) -> list[str]:
    """A line for each of `lint`, for the log."""
    return [str(fault) for fault in lint(config, source)]


def lint(config: Config, source: str | None = None) -> list[Fault]:
    """What to warn of, on this host and as this user: key, value, what is wrong with it and what would be right.

    `source`: the file that the configuration is from, whose mode is looked at. Takes about a millisecond, and
    changes nothing.
    """
    host = Host.here(HostAddresses().current)
    return [
        *lint_common(config.common(), host),
        *_loop(config, host),
        *_tproxy(config),
        *_password(config, source),
    ]


def _loop(config: Config, host: Host) -> Iterator[Fault]:
    """The proxy that we ask must not be ourselves."""
    proxy = config.proxy_url
    # Other names may be ours as well; asking a name server is not for a check.
    theirs = LOCALHOST if proxy.host == "localhost" else () if isinstance(proxy.host, str) else (proxy.host,)
    for listen in (*config.listen, *config.listen_tproxy):
        for address in theirs:
            if listen.port == proxy.port and (
                listen.address == address
                or (listen.address.is_unspecified and listen.address.version == address.version and host.has(address))
            ):
                yield Fault("proxy_url", str(proxy), f"is our own listener {listen}: expected the proxy's port")
                return


def _tproxy(config: Config) -> Iterator[Fault]:
    """Whether this process could open the sockets."""
    for listen in config.listen_tproxy[:1]:
        if not may_be_transparent():
            yield Fault(
                "listen_tproxy",
                str(listen),
                "this user may not open sockets with IP_TRANSPARENT: the daemon does not start without CAP_NET_ADMIN",
            )


def _password(config: Config, source: str | None) -> Iterator[Fault]:
    password = config.proxy_url.password
    if source is not None and password is not None and password.reveal() and readable_by_all(source):
        yield Fault(
            "proxy_url", "", f"has a password, and every user may read this file: chmod o-r {source}, and give it"
            " to the group of the service",
        )  # fmt: skip
