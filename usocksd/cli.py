"""The command line of usocksd."""

from __future__ import annotations

from collections.abc import Sequence

from usocksd.config import UsocksdConfig
from usocksd.serve.daemon import Daemon, Subparsers, run
from usocksd.settings.flags import Flag, Settings


def _listen(values: Sequence[str]) -> Settings:
    places = [value.rpartition(":") for value in values]
    ports = {port for _, _, port in places}
    if len(ports) > 1 or not all(port.isascii() and port.isdigit() for port in ports):
        raise ValueError("expected PORT or ADDRESS:PORT, with the same port each time")
    addresses = [address.removeprefix("[").removesuffix("]") for address, colon, _ in places if colon]
    if addresses and len(addresses) < len(values):
        raise ValueError("PORT alone is all addresses: expected nothing beside it")
    return {"incoming.port": int(*ports)} | ({"incoming.addresses": addresses} if addresses else {})


FLAGS = (
    Flag(
        name="--listen",
        metavar="[ADDRESS:]PORT",
        help="serve SOCKS there (default: port 1080 of all addresses)",
        settings=_listen,
    ),
    Flag(
        name="--allow",
        metavar="NETWORK",
        help="clients that may connect (default: loopback, link-local and private networks)",
        settings=lambda values: {"incoming.allow_from": list(values)},
    ),
    Flag(
        name="--deny",
        metavar="SITE",
        help="destinations to deny: a host, a .domain with all its hosts, an address or a network",
        settings=lambda values: {"outgoing.deny_sites": list(values)},
    ),
)
USOCKSD = Daemon(
    name="usocksd",
    description="A SOCKS server (4, 4a, 5) with access control and a choice of egress address.",
    config=UsocksdConfig,
    file="/etc/usocksd.toml",
    file_required=False,
    control="/run/usocksd/control.sock",
    columns=("peer", "user", "rule", "egress"),
    flags=FLAGS,
    verbs=("explain",),
    examine="usocksd.commands.serve:examine",
    build="usocksd.commands.serve:build",
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run usocksd with these arguments, or the process's; returns the exit status."""
    return run(USOCKSD, add_verbs, argv)


def add_verbs(subparsers: Subparsers) -> None:
    """Add all verbs to the command line."""
    from usocksd.commands import diff, explain  # noqa: PLC0415
    from usocksd.serve.verbs import check, install, parsers  # noqa: PLC0415

    check.add_parser(subparsers, USOCKSD)
    explain.add_parser(subparsers, USOCKSD)
    diff.add_parser(subparsers)
    parsers.add_parsers(subparsers, USOCKSD)
    install.add_parsers(subparsers, USOCKSD.name)
