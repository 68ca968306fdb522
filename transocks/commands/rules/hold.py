"""`transocks rules hold`: loads the rules of [rules] again whenever somebody has flushed them; see docs/firewall.md.

With when_down = "open" they are in force only while transocks accepts, for some seconds at a time: if this process
dies, the kernel ends them. With "closed" they are in force for good, and a guard, which nobody else can flush, refuses
connections that should be redirected while the rules are missing.
"""

from __future__ import annotations

import argparse

from transocks.commands.rules.verbs import Order, not_accepting, order_of
from transocks.rules import change
from transocks.rules.config import Tool, WhenDown
from transocks.rules.guard import OwnTables, TableWatch
from transocks.rules.loops import loops
from transocks.rules.render import render_guard
from transocks.tools import FirewallError
from usocksd.serve.notify import Notifier
from usocksd.serve.verbs.client import visible

LOOK_EVERY, IN_FORCE = 1.0, 10  # seconds between two looks, and for which rules are prolonged each time
_AT_ONCE = 3  # attempts, if rules are flushed at once again: a restart of nftables.service flushes twice
_STOP_WITHIN = 60.0  # seconds; another change of the rules may be under way, and has half of that


def hold(args: argparse.Namespace) -> int:
    """Hold the rules until a signal comes. Each change of state is printed, and told to the service manager if there is
    one.
    """
    order = order_of(args)
    if order.tool is not Tool.NFT:
        raise FirewallError("needs nft: rules of iptables have nothing that ends by itself and can be prolonged")
    for problem in loops(order.config, order.redirections):
        print(f"warning: {visible(problem)}", flush=True)
    notifier = Notifier()
    watch = TableWatch()
    keeper = _Closed(order, watch) if order.rules.when_down is WhenDown.CLOSED else _Open(order, watch)
    before: str | None = None
    try:
        while True:
            try:
                state = keeper.look()
            except FirewallError as error:  # for example a cgroup that does not exist yet: try again
                state = f"fault: {_in_a_line(error)}"
            if before is None:
                notifier.ready(state)
            if state != before:
                print(state, flush=True)
                notifier.status(state)
            before = state
            notifier.alive()
            watch.wait(LOOK_EVERY)
    except KeyboardInterrupt:
        return 0
    finally:
        notifier.stopping("stopping", _STOP_WITHIN)
        if last := keeper.end():
            print(last, flush=True)


def _in_a_line(error: FirewallError) -> str:
    return visible(" ".join(str(error).split()))


class _Keeper:
    """Loads rules again that somebody has removed."""

    def __init__(self, order: Order, watch: TableWatch) -> None:
        self._order, self._watch = order, watch
        self._applied = False

    def _apply(self, seconds: int | None = None) -> None:
        for _ in range(_AT_ONCE):
            try:
                change.apply(self._order.redirections, self._order.tool, seconds=seconds)
            finally:
                self._watch.forget()  # our own deletions, and perhaps those of others, so look
            if change.in_force(self._order.redirections):
                break
        self._applied = True


class _Open(_Keeper):
    _in_force: bool | None = None  # None: unknown, the loaded rules may be of another configuration

    def look(self) -> str:
        """Repair what has changed; returns the state in a line. Raises FirewallError."""
        if self._in_force:
            self._keep()  # first, since asking the daemon may take long
        problem = not_accepting(self._order)
        if problem is not None:
            if self._in_force is not False:
                change.prolong(self._order.redirections, 0)  # if that fails, they end by themselves
            self._in_force = False
            return f"open: {problem}"
        if not self._in_force:
            self._keep()
        self._in_force = True
        return "in force"

    def _keep(self) -> None:
        if not self._applied or not change.prolong(self._order.redirections, IN_FORCE):
            self._apply(IN_FORCE)
            change.prolong(self._order.redirections, IN_FORCE)  # marks them as held, not on trial

    def end(self) -> str:
        """End the watch; returns what an operator should know, or ""."""
        return "; ".join(change.remove(keep=True))  # connections through transocks go on


class _Closed(_Keeper):
    _guard: OwnTables | None = None
    _unguarded: str | None = ""

    def look(self) -> str:
        """Repair what has changed; returns the state in a line. Raises FirewallError."""
        if self._unguarded is not None:
            self._load_guard()
        if not self._applied or not change.in_force(self._order.redirections):
            self._apply()
        problem = not_accepting(self._order)
        state = "in force" if problem is None else f"closed: {problem}"
        return state if self._unguarded is None else f"{state}; without a guard: {self._unguarded}"

    def _load_guard(self) -> None:
        try:
            if self._guard is None:
                change.track_others(self._order.redirections)
                self._guard = OwnTables()
            self._guard.load("".join(map(render_guard, self._order.redirections)))
        except FirewallError as error:  # an old kernel, for example, or another `hold`; the rules work without a guard
            self._unguarded = _in_a_line(error)
        else:
            self._unguarded = None

    def end(self) -> str:
        """End the watch; returns what an operator should know."""
        return "closed: the rules stay; `transocks rules remove` removes them"
