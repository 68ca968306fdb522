"""transocks doctor: what is wrong on this host, from the firewall to the upstream, and what to do."""

from __future__ import annotations

import argparse
import json
import sys
from ipaddress import ip_address

from transocks.config import TransocksConfig
from usocksd.errors import ConfigError
from usocksd.serve.verbs.client import add_config, add_verb
from usocksd.settings import loader as configuration

_DEFAULT = "/etc/transocks.toml"
_DESCRIPTION = """\
Find what keeps redirected connections from working on this host, with the configuration of transocks: firewall rules,
listeners, loops, routes, kernel settings, upstreams. For each fault and warning, one line says what was seen, and
another what to do.

doctor makes first packets of connections, like those of applications and clients, and datagrams if listen_udp is set.
The kernel tells which rules they meet. None of them leaves this host, and no listener gets a connection or datagram.
doctor greets upstreams as transocks itself would, and changes nothing on this host. All of that needs root: as another
user, it says what it did not check.

Exit status: 0 if there are no faults, 1 if there are, 2 for a wrong command line or configuration."""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add this verb to the command line."""
    parser = add_verb(subparsers, "doctor", "look for what keeps redirected connections from working", _DESCRIPTION)
    add_config(parser, f"the configuration ({_DEFAULT})")
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object, including checks that found no fault"
    )
    parser.add_argument(
        "-v", "--verbose", action="store_true", help="also print what was seen by checks that found no fault"
    )
    parser.add_argument(
        "--client",
        metavar="ADDRESS",
        type=ip_address,
        help="on a gateway: wait for the next TCP connection of this client, and say what happens to it",
    )
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    """Run the verb; returns the exit status."""
    # Imported here, so that other verbs start without it.
    from transocks.doctor import State, examine  # noqa: PLC0415
    from transocks.doctor.finding import as_json, as_text  # noqa: PLC0415

    file = args.f or _DEFAULT
    try:
        config = configuration.load(TransocksConfig, file)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    findings = examine(config, client=args.client, say=lambda line: print(line, file=sys.stderr, flush=True))
    if args.json:
        print(json.dumps(as_json(findings, file)))
    else:
        for line in as_text(findings, everything=args.verbose):
            print(line)
    return int(any(finding.state is State.FAULT for finding in findings))
