"""usocksd explain: what would happen to one request, and why. See docs/explain.md, and usocksd/explain.py."""

from __future__ import annotations

import argparse
import re
import shutil
import textwrap
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Final

from usocksd.acl import BIND, CONNECT, UDP_ASSOCIATE
from usocksd.config import UsocksdConfig
from usocksd.net.address import join_port, numeric_address
from usocksd.serve.daemon import Daemon
from usocksd.serve.verbs.client import (
    ControlClient,
    add_file,
    add_verb,
    find_control,
    print_json,
    run_verb,
    say,
    visible,
)
from usocksd.settings import loader as configuration
from usocksd.settings.types import split_port

Json = dict[str, Any]

_PREFIX: Final = "usocksd explain: "

# Seconds for resolving, and for the answer of a daemon that resolves.
_RESOLVE_WITHIN, _ANSWER_WITHIN = 30.0, 60.0

_DESCRIPTION = """\
Tell what would happen to a request: the rule that decides and why those before it do not match, the addresses of the
name and the verdict on each, the egress pool, the address to leave from and the ones that are next, and which addresses
of the pool can't be used. The name is really resolved, and block lists are asked. Nothing is connected.

The rules are those of FILE on this host as it is now, or with --live those that the running daemon has in force, with
its resolver and what it knows of its egress addresses.

Exit status: 0 if it would be connected, 1 if not (a rule denies it, the name has no address, there is no egress
address), 2 for trouble (a faulty file, a wrong command line, no daemon)."""

# After this many seconds of waiting, stderr says what for.
_SAY_AFTER: Final = 1.0

# How many are shown without --verbose: single rules, names in a group of rules, addresses, and sources.
_FEW_STEPS: Final = 4
_MOST_NAMES: Final = 12
_MOST_ADDRESSES: Final = 10
_MOST_SOURCES: Final = 3


class _Parser(argparse.ArgumentParser):
    """Takes positional arguments before, between and behind options: FILE --from ADDRESS HOST:PORT."""

    _intermixing = False

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        if self._intermixing:
            return super().parse_known_args(args, namespace)
        self._intermixing = True
        try:
            return self.parse_known_intermixed_args(args, namespace)
        finally:
            self._intermixing = False


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser], daemon: Daemon[UsocksdConfig]) -> None:
    """Add this verb to a command line that has an option -f, the configuration."""
    parser = add_verb(subparsers, "explain", "tell what would happen to a request, and why", _DESCRIPTION)
    parser.__class__ = _Parser  # add_parser() would make another class
    add_file(parser, daemon.file)
    parser.add_argument(
        "--from", dest="client", metavar="ADDRESS", required=True, type=_parse_client, help="the client's address"
    )
    parser.add_argument("--user", metavar="USER", help="the user that it authenticates as (default: none)")
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument(
        "--udp",
        dest="command",
        action="store_const",
        const=UDP_ASSOCIATE,
        default=CONNECT,
        help="a datagram of a UDP association (default: a connection)",
    )
    kind.add_argument(
        "--bind", dest="command", action="store_const", const=BIND, help="a connection from there, by BIND"
    )
    parser.add_argument("--live", action="store_true", help="ask the running daemon instead of judging FILE")
    parser.add_argument(
        "--control",
        metavar="PATH",
        help=f"with --live: its control socket (default: as its configuration says, or {daemon.control})",
    )
    parser.add_argument("-v", "--verbose", action="store_true", help="show every rule, address and egress address")
    parser.add_argument("--json", action="store_true", help="print one JSON object, with everything")
    parser.add_argument(
        "to", metavar="HOST:PORT", type=_parse_destination, help="the destination, as a client writes it; [IPv6]:PORT"
    )
    parser.set_defaults(run=partial(_run, daemon))


def _parse_client(text: str) -> str:
    try:
        return str(numeric_address(text))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected an IP address, not {text!r}") from None


def _parse_destination(text: str) -> tuple[str, int]:
    try:
        host, port = split_port(text)
    except ValueError:
        port = None
    if not port:
        raise argparse.ArgumentTypeError(f"expected HOST:PORT or [IPv6]:PORT, not {text!r}")
    return host, port


def _run(daemon: Daemon[UsocksdConfig], args: argparse.Namespace) -> int:
    host, port = args.to
    request = {"client": args.client, "user": args.user, "host": host, "port": port, "command": args.command}

    def run() -> int:
        answer = _ask(daemon, args, request) if args.live else _judge(daemon, args, request)
        if args.json:
            print_json(answer)
        else:
            print("\n".join(map(visible, _as_text(answer, verbose=args.verbose))), flush=True)
        return 0 if answer["verdict"] == "allowed" else 1

    return run_verb(_PREFIX, run, failed=2)


def _ask(daemon: Daemon[UsocksdConfig], args: argparse.Namespace, request: Json) -> Json:
    args.f = args.file or args.f
    client = ControlClient(daemon.name, find_control(daemon, args, _PREFIX))
    with _saying(lambda: "waiting for the daemon, which asks its name servers"):
        return client.ask("explain", timeout=_ANSWER_WITHIN, **request)


def _judge(daemon: Daemon[UsocksdConfig], args: argparse.Namespace, request: Json) -> Json:
    path: str | None = args.file or args.f
    if path is None and not Path(daemon.file).exists():
        say(_PREFIX, f"there is no {daemon.file}: judged by the defaults")
        config = configuration.parse(UsocksdConfig, "", daemon.file)
    else:
        config = configuration.load(UsocksdConfig, path or daemon.file)
    # Imported here: trio takes a tenth of a second to load, which other verbs do not need.
    import trio  # noqa: PLC0415

    return trio.run(_explain, config, request)


async def _explain(config: UsocksdConfig, request: Json) -> Json:
    """The answer of a daemon with this configuration, computed here."""
    import trio  # noqa: PLC0415

    from usocksd.commands.serve import make_egress, make_policy, make_users  # noqa: PLC0415
    from usocksd.dnsbl import Lookups  # noqa: PLC0415
    from usocksd.explain import Explainer  # noqa: PLC0415
    from usocksd.host.addresses import HostAddresses  # noqa: PLC0415
    from usocksd.log.metrics import Metrics  # noqa: PLC0415
    from usocksd.names.resolver import make_resolver  # noqa: PLC0415

    metrics, hosts = Metrics("usocksd"), HostAddresses()
    policy = make_policy(config, make_users(config), hosts.is_local)
    resolver = make_resolver(config.dns, metrics)
    egress, listings = make_egress(config, hosts, metrics)
    lookups = Lookups(listings, listings.take, config.dns.servers, metrics)
    explainer = Explainer(policy, resolver, egress, listings, min(config.timeouts.connect, _RESOLVE_WITHIN))
    waiting = lambda: f"waiting for name servers: {', '.join(resolver.servers) or 'those that the system asks'}"  # noqa: E731
    with _saying(waiting):
        async with trio.open_nursery() as nursery:
            await nursery.start(resolver.run)
            unanswered = await lookups.once()
            answer = await explainer.explain(request)
            nursery.cancel_scope.cancel()
    if silent := [server for server, answers in resolver.servers.items() if not answers]:
        say(_PREFIX, f"no answer from {', '.join(silent)}")
    for each, why in unanswered.items():
        for pool in answer["pools"].values():
            if str(each.address) in pool["addresses"]:
                pool.setdefault("unanswered", {}).setdefault(str(each.address), {})[each.domain] = why
    return answer


@contextmanager
def _saying(what: Callable[[], str]) -> Iterator[None]:
    """If the block takes long, say on stderr what it waits for."""
    timer = threading.Timer(_SAY_AFTER, lambda: say(_PREFIX, what()))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


# ---- for people


def _as_text(answer: Json, *, verbose: bool) -> Iterator[str]:
    yield _headline(answer)
    if answer["note"]:
        yield answer["note"]
    steps = answer["steps"]
    if steps:
        absent = [name for name in answer["absent"] if name != answer["canonical"]]
        before = f", since there is no {', no '.join(absent)}" if absent else ""
        # The name may be allowed, and all its addresses denied.
        allowed = answer["verdict"] != "denied" or bool(answer["addresses"])
        yield ""
        yield f"rules on {answer['canonical']}{before}"
        yield from _steps(steps, allowed=allowed, verbose=verbose)
    addresses = answer["addresses"]
    # An address that was asked for is what the rules above are about.
    if addresses and (len(addresses) > 1 or addresses[0]["steps"] != steps):
        shown = addresses if verbose else addresses[:_MOST_ADDRESSES]
        width = max(len(each["address"]) for each in shown)
        yield ""
        yield f"addresses of {answer['canonical']}"
        for each in shown:
            yield f"  {each['address']:{width}}  {_verdict(each, verbose=verbose)}"
            if verbose:
                yield from _steps(each["steps"], allowed=each["allowed"], verbose=True, indent="      ")
        yield from _more(len(addresses) - len(shown))
    for name, pool in answer["pools"].items():
        if pool["addresses"]:
            yield ""
            yield f"pool {name}: {_traits(pool)}"
            yield from _pool(pool, verbose=verbose)


def _headline(answer: Json) -> str:
    client = answer["client"] if answer["user"] is None else f"{answer['client']} ({answer['user']})"
    how = {CONNECT: "", BIND: " by BIND", UDP_ASSOCIATE: " by UDP"}[answer["command"]]
    text = f"{client} to {join_port(answer['host'], answer['port'])}{how}: {answer['verdict']}"
    if answer["rule"] is not None:
        by = ", allowed by" if answer["verdict"] == "unreachable" else " by"
        steps = [*answer["steps"], *(step for each in answer["addresses"] for step in each["steps"])]
        text += f"{by} {_rule(next((step for step in steps if step['rule'] == answer['rule']), answer))}"
    if answer["error"] is not None:
        text += f": {answer['error']}"
    if answer["verdict"] == "allowed":
        source = next(each["sources"][0] for each in answer["addresses"] if each["sources"])
        text += f", pool {answer['pool']}, leaves from {source or 'what the kernel chooses'}"
    return text


def _rule(step: Json) -> str:
    """A rule, and where it is in the configuration."""
    line = step.get("line")
    return str(step["rule"]) if line is None else f"{step['rule']} (line {line})"


def _steps(steps: Sequence[Json], *, allowed: bool, verbose: bool, indent: str = "  ") -> Iterator[str]:
    """The rules that did not match, then the one that did, and whether it `allowed` the request."""
    *others, last = steps
    if verbose or len(others) <= _FEW_STEPS:
        yield from (f"{indent}{_rule(step)}: does not match, {step['why']}" for step in others)
    else:
        groups: dict[str, list[str]] = {}
        for step in others:
            # (Each rule may have other ports.)
            why = re.sub(r"^(port \d+ not in) .*", r"\1 its ports", step["why"])
            groups.setdefault(why, []).append(step["rule"])
        yield f"{indent}{len(others)} rules do not match:"
        wrapper = textwrap.TextWrapper(
            max(shutil.get_terminal_size((110, 40)).columns, 40),
            initial_indent=f"{indent}  ",
            subsequent_indent=f"{indent}    ",
            break_on_hyphens=False,
            break_long_words=False,
        )
        for why, names in sorted(groups.items(), key=lambda group: -len(group[1])):
            more = f" and {len(names) - _MOST_NAMES} more" if len(names) > _MOST_NAMES else ""
            yield from wrapper.wrap(visible(f"{why} ({len(names)}): {', '.join(names[:_MOST_NAMES])}{more}"))
    yield f"{indent}{_rule(last)}: {'allows' if allowed else 'denies'} it, {last['why']}"


def _verdict(each: Json, *, verbose: bool) -> str:
    """The verdict on an address of the name."""
    last = each["steps"][-1]
    if not each["allowed"]:
        return f"denied by {_rule(last)}: {last['why']}"
    text = f"allowed by {_rule(last)}, pool {each['pool']}"
    if each["error"] is not None:
        return f"{text}, but {each['error']}"
    first, *others = each["sources"]
    if first is None:
        return text
    shown = others if verbose else others[:_MOST_SOURCES]
    more = f" and {len(others) - len(shown)} more" if len(others) > len(shown) else ""
    return f"{text}, from {first}" + (f", next {', '.join(shown)}{more}" if shown else "")


def _traits(pool: Json) -> str:
    here = [address for address in pool["addresses"] if address in pool["local"] and address not in pool["listed"]]
    traits = [f"{len(here)} of {len(pool['addresses'])} addresses usable"]
    return ", ".join(traits + [f"{key} {pool[key]}" for key in ("iface", "mark") if pool[key] is not None])


def _pool(pool: Json, *, verbose: bool) -> Iterator[str]:
    """The addresses that can't be used or are listed, and lists that did not answer."""
    lines = []
    for address in pool["addresses"]:
        unanswered = pool.get("unanswered", {}).get(address, {})
        state = [
            *([] if address in pool["local"] else ["not on this host"]),
            *([f"listed by {', '.join(pool['listed'][address])}"] if address in pool["listed"] else []),
            *(f"{domain} does not answer: {why}" for domain, why in unanswered.items()),
        ]
        if state or verbose:
            lines.append(f"  {address}  {', '.join(state) or 'usable'}")
    shown = lines if verbose else lines[:_MOST_ADDRESSES]
    yield from shown
    yield from _more(len(lines) - len(shown))


def _more(count: int) -> Iterator[str]:
    if count:
        yield f"  and {count} more (-v shows all)"
