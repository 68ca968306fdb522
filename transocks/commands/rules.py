"""transocks rules VERB: the redirect rules of this host, as [rules] of the configuration says. See docs/firewall.md.

render    print what would be applied
apply     apply it: nothing else of ours is loaded then; --confirm SECONDS has it end by itself unless confirmed
confirm   make it stay
verify    say what is not as it should be
remove    leave nothing of it
hold      apply, and have it in force only while transocks accepts
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import NoReturn

import attrs

from transocks.config import Config
from transocks.firewall import change, live
from transocks.firewall.config import Mode, RulesConfig, Tool, WhenDown
from transocks.firewall.examine import examine
from transocks.firewall.render import render_iptables, render_nft
from transocks.firewall.steps import FirewallError, choose_tool
from transocks.firewall.wanted import Wanted, wanted_of
from usocksd.errors import ConfigError
from usocksd.runtime import config as configuration
from usocksd.runtime.verbs.client import Client, Refused, VerbError, visible

DEFAULT = "/etc/transocks.toml"
FAILED = 1

# For `hold`: how often it looks, for how long at a time the rules are in force, and how long a daemon may take to say
# how it is.
LOOK_EVERY, IN_FORCE, ANSWER_WITHIN = 1.0, 10, 2.0
_WELL = ("ready", "reloading")


@attrs.frozen
class Order:
    """The configuration, and what it means for the rules here."""

    config: Config
    rules: RulesConfig
    wanted: list[Wanted]
    tool: Tool
    ipv6: bool


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add this verb, which has verbs of its own, to the command line."""
    parser = subparsers.add_parser(
        "rules",
        help="render, apply, verify and remove the redirect rules",
        description="The rules that redirect connections to transocks, as [rules] of the configuration says. All but"
        " `render` need root. Exit status: 0 if all is well.",
    )
    verbs = parser.add_subparsers(title="verbs", required=True)
    _add(verbs, "render", _render, "print what `apply` would load, and run nothing")
    apply = _add(verbs, "apply", _apply, "load the rules, in the place of what is loaded of ours")
    apply.add_argument(
        "--confirm",
        type=_seconds,
        metavar="SECONDS",
        help="they end by themselves after SECONDS, unless `transocks rules confirm` comes: the kernel sees to that",
    )
    apply.add_argument("--force", action="store_true", help="also when transocks does not accept connections")
    _add(verbs, "confirm", _confirm, "after `apply --confirm`: let the rules stay")
    _add(verbs, "verify", _verify, "say what is missing, changed, reordered, or taken by rules of others before ours")
    remove = _add(verbs, "remove", _remove, "remove everything: rules of every mode and tool, and TPROXY's routing")
    remove.add_argument(
        "--keep-connections",
        action="store_true",
        help="leave what connections need that were redirected by nft, and nothing else: they may hang without. A later"
        " remove takes that away",
    )
    _add(
        verbs,
        "hold",
        _hold,
        'for when_down = "open" with nft: apply, and have the rules in force only while transocks accepts; in the'
        " foreground, until a signal ends it and the rules with it",
    )


def _add(
    verbs: argparse._SubParsersAction[argparse.ArgumentParser],
    name: str,
    run: Callable[[argparse.Namespace], int],
    help: str,
) -> argparse.ArgumentParser:
    def guarded(args: argparse.Namespace) -> int:
        try:
            return run(args)
        except ConfigError as error:
            for fault in error.faults:
                _say(f"{error.source}: {fault}")
        except FirewallError as error:
            for line in str(error).splitlines():
                _say(line)
        return FAILED

    def _say(line: str) -> None:
        print(f"transocks rules {name}: {visible(line)}", file=sys.stderr)

    parser = verbs.add_parser(name, help=help, description=f"{help[0].upper()}{help[1:]}.", allow_abbrev=False)
    # The same option as before the verb: here it must not set a default over that one.
    parser.add_argument("-f", metavar="CONFIG", default=argparse.SUPPRESS, help=f"configuration file ({DEFAULT})")
    parser.set_defaults(run=guarded)
    return parser


def _seconds(value: str) -> int:
    if not value.isascii() or not value.isdigit() or not 1 <= int(value) <= 86400:
        raise argparse.ArgumentTypeError("expected seconds, from 1 to 86400 (a day)")
    return int(value)


def _order(args: argparse.Namespace) -> Order:
    """Read the configuration. Raises ConfigError, or FirewallError."""
    path: str = args.f or DEFAULT
    config = configuration.load(Config, path)
    if config.rules is None:
        raise FirewallError(f'{path} says nothing of rules: expected [rules] with mode = "host", "gateway" or "tproxy"')
    tool = config.rules.tool or choose_tool()
    if tool is None:
        raise FirewallError("neither nft nor iptables is installed")
    wanted = wanted_of(config.rules, config.listen, config.listen_tproxy, config.mark)
    return Order(config, config.rules, wanted, tool, live.has_ipv6())


def _render(args: argparse.Namespace) -> int:
    order = _order(args)
    for wanted in order.wanted:
        if order.tool is Tool.NFT:
            print(render_nft(wanted), end="")
            continue
        for six in (False, True) if order.ipv6 else (False,):
            print(f"# for {'ip6tables' if six else 'iptables'}-restore --noflush")
            if wanted.mode is Mode.TPROXY:
                for kind in ("route", "rule"):
                    print(f"# {' '.join(live.Routing(wanted.tproxy_mark, six).step(kind, 'add').argv)}")
            print(render_iptables(wanted, six=six), end="")
    return 0


def _apply(args: argparse.Namespace) -> int:
    order = _order(args)
    if (problem := _not_accepting(order)) is not None and not args.force:
        raise FirewallError(f"{problem}; with --force the rules are applied all the same")
    change.apply(order.wanted, order.tool, seconds=args.confirm, ipv6=order.ipv6)
    print(*_what_now(order, args.confirm), sep="\n")
    return 0


def _what_now(order: Order, seconds: int | None) -> Iterator[str]:
    """What an operator should know of rules that have just been applied."""
    modes = [wanted.mode for wanted in order.wanted]
    yield f"applied by {order.tool.value}: {', '.join(mode.value for mode in modes)}"
    if seconds is not None:
        yield (
            f"for {seconds} s: then connections go directly again, unless `transocks rules confirm` comes before. New"
            " connections show whether all is well: open one now"
        )
    yield "TCP: new connections are redirected; those that were there before, as this shell's, go on as they were"
    if order.rules.reject_quic:
        yield "UDP: QUIC (port 443) to where TCP is redirected is refused, in use or not; other UDP is as it was"
    else:
        yield "UDP: is as it was"
    down = "when transocks does not accept: connections"
    if Mode.TPROXY in modes and order.tool is Tool.IPTABLES:
        yield f"{down} get no answer and time out (nft can refuse them, or let them out)"
    elif order.rules.when_down is WhenDown.CLOSED:
        yield f"{down} are refused"
    else:
        held = "are refused, unless `transocks rules hold` runs, or the units do"
        yield f"{down} {'go directly' if modes == [Mode.TPROXY] else held}"
    if Mode.HOST in modes and order.config.mark is None and not order.rules.exempt_users:
        yield (
            "warning: neither `mark` nor `rules.exempt_users` is set, so nothing exempts the proxies' own connections:"
            " those to public addresses come back to them"
        )


def _not_accepting(order: Order) -> str | None:
    """Why the rules would send connections to nobody, or None."""
    missing = [where for wanted in order.wanted for where in live.unheard(wanted, order.ipv6)]
    if missing:
        return f"transocks does not accept connections: nobody listens on {' and '.join(missing)}"
    path = order.config.control
    if path is None or not os.path.exists(path):
        return None
    try:
        state = Client("transocks", path).ask("status", timeout=ANSWER_WITHIN)["state"]
    except (VerbError, Refused) as error:
        return f"whether transocks accepts connections can't be told: {error}"
    return None if state in _WELL else f"transocks does not accept connections: it is {state}"


def _confirm(args: argparse.Namespace) -> int:
    confirmed = change.confirm(ipv6=live.has_ipv6())
    print("confirmed: the rules stay" if confirmed else "nothing to confirm: the rules are there to stay")
    return 0


def _verify(args: argparse.Namespace) -> int:
    order = _order(args)
    report = examine(order.wanted, order.tool, ipv6=order.ipv6)
    for fault in report.faults:
        print(visible(fault))
    for note in report.notes:
        print(f"note: {visible(note)}")
    if not report.faults:
        print(f"as they should be: {', '.join(wanted.mode.value for wanted in order.wanted)}, by {order.tool.value}")
    return FAILED if report.faults else 0


def _remove(args: argparse.Namespace) -> int:
    complaints = change.remove(keep=args.keep_connections)
    if complaints:
        raise FirewallError("\n".join(complaints))
    return 0


def _hold(args: argparse.Namespace) -> int:
    order = _order(args)
    if order.tool is not Tool.NFT:
        raise FirewallError("needs nft: rules of iptables have nothing that ends by itself and can be prolonged")
    if order.rules.when_down is WhenDown.CLOSED:
        raise FirewallError('when_down is "closed": then the rules stay, whatever becomes of transocks; apply them')
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler)
    try:
        _hold_for_ever(order)
    except KeyboardInterrupt:
        return 0
    finally:
        change.remove(keep=True)  # what transocks carries goes on, for as long as it lives


def _hold_for_ever(order: Order) -> NoReturn:
    in_force: bool | None = None
    said: str | None = None
    while True:
        problem = _not_accepting(order)
        if problem is None:
            try:
                change.prolong(order.wanted, IN_FORCE)
            except FirewallError:  # not loaded yet, or flushed by another
                change.apply(order.wanted, order.tool, seconds=IN_FORCE, ipv6=order.ipv6)
        elif in_force:
            _end(order.wanted)
        if problem != said or in_force is None:
            print(f"open: {problem}" if problem else "in force", flush=True)
        in_force, said = problem is None, problem
        time.sleep(LOOK_EVERY)


def _end(wanted: Sequence[Wanted]) -> None:
    try:
        change.prolong(wanted, 0)
    except FirewallError as error:  # they end by themselves
        print(error, file=sys.stderr)
