"""From the rule files to the rules for one purpose: text in, commands out; nothing is run here."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from enum import Enum
from pathlib import Path

import attrs


class Tool(Enum):
    """What loads the rules."""

    NFT = "nft"
    IPTABLES = "iptables"


@attrs.frozen
class Step:
    """One command and what it reads on standard input."""

    argv: tuple[str, ...]
    stdin: str = ""


@attrs.frozen
class RuleSet:
    """How to load the rules, and how to remove them; each step is atomic by itself."""

    load: tuple[Step, ...]
    unload: tuple[Step, ...]


def choose_tool(which: Callable[[str], str | None] = shutil.which) -> Tool | None:
    """nft where it is (one transaction for both families), else iptables, else None."""
    if which("nft"):
        return Tool.NFT
    return Tool.IPTABLES if which("iptables-restore") else None


def render(tool: Tool, *, name: str, port: int, gid: int, ipv6: bool = True) -> RuleSet:
    """The rules of iptables/host.* for the processes with the effective group `gid` alone, redirected to `port`.

    name: what tells these rules from others on the host, [a-z0-9_], at most 20 characters. ipv6: whether this
    kernel has IPv6 (ip6tables fails without; an nft table of the inet family does not).
    """
    if tool is Tool.NFT:
        return _render_nft(name, port, gid)
    rendered = [_render_iptables(name, port, gid, six) for six in ((False, True) if ipv6 else (False,))]
    # Removed in the opposite order: what hooked in last goes first.
    return RuleSet(
        tuple(step for load, _ in rendered for step in load),
        tuple(step for _, unload in rendered[::-1] for step in unload),
    )


def _render_nft(name: str, port: int, gid: int) -> RuleSet:
    text = _template("host.nft")
    text = _replace(text, r"^(define transocks_port =) 1081$", rf"\1 {port}", 1)
    text = _replace(text, r"\binet transocks\b", f"inet {name}", 4)
    text = _replace(text, r"^(\t\t)(meta l4proto tcp jump|udp dport 443 jump) ", rf"\1meta skgid {gid} \2 ", 2)
    return RuleSet((Step(("nft", "-f", "-"), text),), (Step(("nft", "delete", "table", "inet", name)),))


def _render_iptables(name: str, port: int, gid: int, six: bool) -> tuple[tuple[Step, ...], tuple[Step, ...]]:
    restore = ("ip6tables-restore" if six else "iptables-restore", "--noflush")
    chain = name.upper().replace("_", "-")
    text = _template("host.v6" if six else "host.v4")
    text = re.sub(r"^#.*\n", "", text, flags=re.MULTILINE)
    text = re.sub(r"\bTRANSOCKS\b", chain, text)
    text = _replace(text, r"--to-ports 1081$", f"--to-ports {port}", 1)
    text = _replace(text, r"^-([AI]) OUTPUT (.*) -j", rf"-\1 OUTPUT \2 -m owner --gid-owner {gid} -j", 2)
    unload = []
    # A table at a time, so that one that is gone already keeps nothing of the other.
    for table, body in re.findall(r"^\*(\w+)\n(.*?)^COMMIT", text, re.MULTILINE | re.DOTALL):
        hooks = re.findall(r"^-[AI] (OUTPUT .*)$", body, re.MULTILINE)
        chains = re.findall(r"^-N (\S+)$", body, re.MULTILINE)
        lines = [f"-D {hook}" for hook in hooks] + [f"-F {c}" for c in chains] + [f"-X {c}" for c in chains]
        unload.append(Step(restore, "\n".join([f"*{table}", *lines, "COMMIT", ""])))
    return (Step(restore, text),), tuple(unload)


def _replace(text: str, pattern: str, replacement: str, count: int) -> str:
    """re.sub that insists: rules that were not narrowed as asked must not be loaded."""
    text, found = re.subn(pattern, replacement, text, flags=re.MULTILINE)
    if found != count:
        raise AssertionError(f"the rule files have changed: {pattern} matches {found} times, not {count}")
    return text


def _template(file: str) -> str:
    installed = Path(__file__).parent / "rules"  # in a wheel; in a checkout they stand where operators look for them
    folder = installed if installed.is_dir() else Path(__file__).parents[2] / "iptables"
    return (folder / file).read_text(encoding="utf-8")
