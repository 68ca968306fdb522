"""The verbs of `transocks rules` except `hold`. Each takes the arguments, and returns the exit status."""

from __future__ import annotations

import argparse
import contextlib
import os
import time
from collections.abc import Iterator, Sequence

import attrs

from transocks.commands.rules import FAILED, question
from transocks.config import DIRECT, TransocksConfig
from transocks.rules import change, live, routing
from transocks.rules.config import Mode, RulesConfig, Tool, WhenDown
from transocks.rules.loops import loops
from transocks.rules.redirection import Redirection, redirections_of, takes_quic
from transocks.rules.render import render_all_nft, render_iptables
from transocks.rules.verify import verify as examine
from transocks.tools import FirewallError, one_change
from transocks.tracing.links import filtered_bridges
from usocksd.serve.verbs.client import Answer, ControlClient, Refused, VerbError, visible
from usocksd.settings import loader as configuration

DEFAULT = "/etc/transocks.toml"
ANSWER_WITHIN = 2.0  # seconds for a daemon to answer
_LOOK_AGAIN_AFTER = 0.2
_WELL = ("ready", "reloading")


@attrs.frozen
class Order:
    """The configuration, and what it means for the rules here."""

    config: TransocksConfig
    rules: RulesConfig
    redirections: list[Redirection]
    tool: Tool


def order_of(args: argparse.Namespace) -> Order:
    """Read the configuration. Raises ConfigError, or FirewallError."""
    path: str = args.f or DEFAULT
    config = configuration.load(TransocksConfig, path)
    if config.rules is None:
        raise FirewallError(f'{path} says nothing of rules: expected [rules] with mode = "host", "gateway" or "tproxy"')
    tool = config.rules.tool or live.choose_tool()
    if tool is None:
        raise FirewallError("neither nft nor iptables is installed")
    redirections = redirections_of(config.rules, config.listen, config.listen_tproxy, config.mark, config.listen_udp)
    return Order(config, config.rules, redirections, tool)


def render(args: argparse.Namespace) -> int:
    """Print the rules that `apply` would load."""
    order = order_of(args)
    if order.tool is Tool.NFT:
        print(render_all_nft(order.redirections), end="")
        return 0
    for redirection in order.redirections:
        for version in live.versions():
            print(f"# for {live.iptables(version)}-restore --noflush")
            if redirection.by_tproxy:
                for kind in ("route", "rule"):
                    print(f"# {routing.Routing(redirection.tproxy_mark, version).by_hand(kind)}")
            print(render_iptables(redirection, version=version), end="")
    return 0


def apply(args: argparse.Namespace) -> int:
    """Load the rules, and say what that means. On a terminal, ask whether to keep them."""
    asks = args.confirm is None and not args.yes and question.can_ask()
    seconds = question.SECONDS if asks else args.confirm
    order = order_of(args)
    problem, status = _ask(order) if args.force else _ask_patiently(order)
    all_down, some_down = _upstreams_down(status)
    problems = [*([problem] if problem else []), *all_down, *loops(order.config, order.redirections)]
    if problems and not args.force:
        raise FirewallError(
            "\n".join([*problems, "nothing was changed; with --force the rules are applied all the same"])
        )
    change.apply(order.redirections, order.tool, seconds=seconds)
    print(*_what_now(order, seconds), sep="\n")
    if problem is None and not status:
        print("whether its upstreams answer is not known: transocks has no control socket here that could be asked")
    for problem in (*problems, *some_down):
        print(f"warning: {visible(problem)}")
    return _keep_or_remove(question.SECONDS) if asks else 0


def _keep_or_remove(seconds: int) -> int:
    answer = question.is_to_keep(seconds)
    if answer:
        change.confirm()
        print("kept")
    elif answer is not None:
        _remove(keep=False)
        print("removed: connections go directly again")
    elif change.is_for_good():
        print("kept by `transocks rules confirm`")
        return 0
    else:
        print("no answer: the rules have no effect any more, and new connections go directly again")
    return 0 if answer else FAILED


def _what_now(order: Order, seconds: int | None) -> Iterator[str]:
    """What an operator should know of rules that have just been applied."""
    modes = [redirection.mode for redirection in order.redirections if not redirection.udp]
    yield f"applied by {order.tool.value}: {', '.join(redirection.title for redirection in order.redirections)}"
    if seconds is not None:
        yield (
            f"for {seconds} s: then connections go directly again, unless `transocks rules confirm` comes before. Open"
            " a new connection now, to see whether it works"
        )
    yield "TCP: new connections are redirected; existing ones, such as this shell's, go on as they were"
    if order.rules.when_down is WhenDown.CLOSED:
        where = "on a host; through a gateway, " if Mode.HOST in modes and len(modes) > 1 else ""
        if modes != [Mode.HOST]:
            yield f"closed: {where}those that this gateway has not tracked so far are reset"
    yield from _what_of_udp(order)
    if any(each.by_tproxy for each in order.redirections) and live.versions() != live.routed_versions():
        yield "IPv6: switched off here, so TPROXY has no routing for it: apply again when it is switched on"
    down = "when transocks does not accept: connections"
    if Mode.TPROXY in modes and order.tool is Tool.IPTABLES:
        yield f"{down} get no answer and time out (nft can refuse them, or let them out)"
    elif order.rules.when_down is WhenDown.CLOSED:
        yield f"{down} are refused"
    else:
        held = "`transocks rules hold` or the units" if order.tool is Tool.NFT else "nft with `transocks rules hold`"
        yield f"{down} {'go directly' if modes == [Mode.TPROXY] else f'are refused; {held} can let them out'}"
    if Mode.TPROXY in modes:
        for (bridge, version), setting in filtered_bridges().items():
            if version in live.versions() and (not order.rules.interfaces or bridge in order.rules.interfaces):
                yield (
                    f"warning: {bridge} is a bridge and {setting}=1: TPROXY gets no connection over IPv{version} from"
                    f' there. sysctl {setting}=0 helps; where Docker or Kubernetes need it, mode = "gateway"'
                )


def _what_of_udp(order: Order) -> Iterator[str]:
    other = "UDP: "
    if order.rules.udp_ports:
        yield f"UDP: to port {_shown(order.redirections[-1].ports)} goes through transocks, in use or not"
        if any(each.udp and each.mode is Mode.HOST for each in order.redirections):
            yield "UDP: when transocks does not run, this host's gets no answer"
        other += "all other "
    if order.rules.reject_quic and not takes_quic(order.rules):
        yield "UDP: QUIC (port 443) to where TCP is redirected is refused, in use or not; other UDP is as it was"
    else:
        yield f"{other}is as it was"


def _shown(ports: Sequence[tuple[int, int]]) -> str:
    return ", ".join(str(low) if low == high else f"{low}-{high}" for low, high in ports)


def not_accepting(order: Order) -> str | None:
    """Why the rules would send connections to nobody, or None."""
    return _ask(order)[0]


def _ask(order: Order) -> tuple[str | None, Answer]:
    """As `not_accepting`; and the daemon's answer to `health`, empty if it can't be asked."""
    missing = [where for redirection in order.redirections for where in live.missing_listeners(redirection)]
    if missing:
        return f"transocks does not accept connections: nobody listens on {' and '.join(missing)}", {}
    path = order.config.control
    if path is None or not os.path.exists(path):
        return None, {}
    try:
        health = ControlClient("transocks", path).ask("health", timeout=ANSWER_WITHIN)
    except (VerbError, Refused) as error:
        return f"whether transocks accepts connections can't be told: {error}", {}
    state = health["state"]
    return None if state in _WELL else f"transocks does not accept connections: it is {state}", health


def _ask_patiently(order: Order) -> tuple[str | None, Answer]:
    """As `_ask`; asks again for a moment while all upstreams of a group are down, since they may have just started."""
    deadline = time.monotonic() + ANSWER_WITHIN
    while True:
        problem, status = _ask(order)
        if not _upstreams_down(status)[0] or time.monotonic() >= deadline:
            return problem, status
        time.sleep(_LOOK_AGAIN_AFTER)


def _upstreams_down(status: Answer) -> tuple[list[str], list[str]]:
    """Two lists: groups without an upstream that answers, whose connections would be refused; and groups where some
    upstreams answer, or whose connections then go directly.
    """
    refusing, others = [], []
    for name, group in (status.get("daemon") or {}).get("upstreams", {}).items():
        down = [each for each in group["upstreams"] if not each["up"]]
        why = "; ".join(f"{each['upstream']}: {each['why']}" for each in down)
        if 0 < len(down) < len(group["upstreams"]):
            others.append(f"{len(down)} of {len(group['upstreams'])} upstreams of {name} do not answer: {why}")
        elif down and group["when_all_down"] == DIRECT:
            others.append(f"no upstream of {name} answers, so transocks connects directly: {why}")
        elif down:
            refusing.append(f"no upstream of {name} answers, so every connection would be reset: {why}")
    return refusing, others


def confirm(args: argparse.Namespace) -> int:
    """Keep rules that are on trial."""
    print("confirmed: the rules stay" if change.confirm() else "nothing to confirm: no rules are on trial")
    return 0


def verify(args: argparse.Namespace) -> int:
    """Print where the loaded rules differ from [rules]."""
    order = order_of(args)
    with one_change():  # a change under way would look like faults
        found = examine(order.redirections, order.tool)
    for text, is_fault in sorted(found, key=lambda remark: not remark[1]):
        print(visible(text) if is_fault else f"note: {visible(text)}")
    faulty = any(is_fault for _, is_fault in found)
    if not faulty:
        modes = ", ".join(redirection.title for redirection in order.redirections)
        print(f"as they should be: {modes}, by {order.tool.value}")
    return FAILED if faulty else 0


def remove(args: argparse.Namespace) -> int:
    """Remove all rules."""
    _remove(keep=args.keep_connections)
    return 0


def _remove(*, keep: bool) -> None:
    held = False
    with contextlib.suppress(FirewallError):  # removing the rules matters more
        held = change.is_held()
    complaints = change.remove(keep=keep)
    if held:
        complaints.append("`transocks rules hold` runs, and loads them again: end it first, or stop its unit")
    if complaints:
        raise FirewallError("\n".join(complaints))
