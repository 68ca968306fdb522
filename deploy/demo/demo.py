"""`./run`: shows the whole path in network namespaces; this machine's network is not touched.

A host with both daemons and the rules of `transocks rules apply` is connected to a simulated Internet. Plain curl
fetches pages through the daemons; then the access records of both show the result of each fetch.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests/netns"))

import beyond
import lab
import samples

ROOT = Path(__file__).resolve().parents[2]
# Two sites of one server, so that only the name distinguishes them.
WWW, DENIED = "www.beyond.example", "ads.beyond.example"
NAMES = dict.fromkeys((WWW, DENIED), (lab.WEB_V4, lab.WEB_V6))
EGRESS = [*lab.PROXY_V4[1:], *lab.PROXY_V6[1:]]  # not the first ones, which the kernel would choose itself
CONFIGURATIONS: dict[str, dict[str, object]] = {  # differences from the samples in deploy/
    "usocksd": {
        "outgoing.addresses": EGRESS,
        "outgoing.deny_sites": [DENIED],
        "outgoing.mark": 0x7473,  # the rules exempt it
    },
    # socks5h: usocksd is asked for the name, if the client's first bytes have one.
    "transocks": {"proxy_url": "socks5h://127.0.0.1:1080", "mark": 0x7473, "listen_udp": "localhost:1084",
                  "rules.mode": "host", "rules.udp_ports": [53]},
}  # fmt: skip
PORTS = {"transocks": 1081, "usocksd": 1080}
PATIENCE = 60.0  # seconds; on an idle machine these steps take milliseconds

if sys.stdout.isatty() and not os.environ.get("NO_COLOR"):
    BOLD, DIM, GOOD, BAD, PLAIN = "\033[1m", "\033[2m", "\033[32m", "\033[31m", "\033[0m"
else:
    BOLD = DIM = GOOD = BAD = PLAIN = ""


class DemoError(Exception):
    """The demo can't go on; the message is for the terminal."""


@dataclass
class Lookup:
    """One lookup by the C library, over UDP."""

    found: str = ""
    transocks: dict[str, Any] = field(default_factory=dict)  # the record of its datagrams
    usocksd: dict[str, Any] = field(default_factory=dict)

    command = f"getent ahostsv4 {WWW}"

    @property
    def right(self) -> bool:
        return self.found == lab.WEB_V4 and self.usocksd.get("src_addr", "").rpartition(":")[0] in EGRESS


@dataclass
class Fetch:
    """One curl, the expected result, and the actual one."""

    arguments: tuple[str, ...]
    allowed: bool = True
    status: int = -1  # curl's exit status
    code: str = ""  # HTTP's
    saw: str = ""  # the address that the web server saw
    complaint: str = ""
    transocks: dict[str, Any] = field(default_factory=dict)  # its last access record
    usocksd: dict[str, Any] = field(default_factory=dict)

    @property
    def command(self) -> str:
        return " ".join(("curl", *self.arguments))

    @property
    def result(self) -> str:
        if self.code == "200":
            return "200 OK"
        return f"reset ({self.status})" if self.was_reset else f"failed ({self.status})"

    @property
    def was_reset(self) -> bool:
        return self.status != 0 and "reset by peer" in self.complaint

    @property
    def egress(self) -> str:
        return str(self.usocksd.get("src_addr", "-")).rpartition(":")[0].strip("[]") or "none"

    @property
    def decision(self) -> str:
        rule = self.usocksd.get("rule", "no record")
        return f"denied: {rule}" if self.usocksd.get("message") == "ruleset mismatch" else f"allowed: {rule}"

    @property
    def right(self) -> bool:
        if self.allowed:
            return self.code == "200" and self.saw == self.egress and self.egress in EGRESS
        return self.was_reset and self.decision.startswith("denied")


class Demo:
    """The lab, and the daemons and servers in it."""

    def __init__(self, net: lab.Net) -> None:
        self.net = net
        self.folder = net.lab.run_folder / "demo"  # its path outside; in the lab it is /run/demo
        self.folder.mkdir()

    def start_the_world(self) -> None:
        outside = self.net.outside
        for address in (lab.WEB_V4, lab.WEB_V6):
            beyond.serve_web(outside.listen(address, 80))
        names = outside.socket(socket.AF_INET, socket.SOCK_DGRAM)
        names.bind((lab.NEXT_V4, 53))
        beyond.serve_names(names, NAMES)
        self.net.lab.etc("hosts", "127.0.0.1 localhost\n::1 localhost\n")
        self.net.lab.etc("resolv.conf", f"nameserver {lab.NEXT_V4}\noptions timeout:2\n")

    def start_daemon(self, name: str, settings: dict[str, object]) -> None:
        sample = (ROOT / f"deploy/{name}.toml").read_text(encoding="utf-8")
        config = samples.derive(sample, settings | {"control": f"/run/demo/{name}.sock"})
        (self.folder / f"{name}.toml").write_text(config, encoding="utf-8")
        with (self.folder / f"{name}.stderr").open("wb") as stderr:
            daemon = self.net.proxy.popen(
                sys.executable, "-m", name, "-f", f"/run/demo/{name}.toml",
                "-logformat", "json", "-logfile", f"/run/demo/{name}.log",
                stdin=subprocess.DEVNULL, stdout=stderr, stderr=stderr,
            )  # fmt: skip
        deadline = time.monotonic() + PATIENCE
        while not self._accepts(PORTS[name]):
            if daemon.poll() is not None or time.monotonic() > deadline:
                raise DemoError(f"{name} did not start:\n{self.last_words(name)}")
            time.sleep(0.02)

    def _accepts(self, port: int) -> bool:
        with self.net.proxy.socket() as probe:
            return probe.connect_ex(("127.0.0.1", port)) == 0

    def last_words(self, name: str) -> str:
        files = [self.folder / f"{name}.{kind}" for kind in ("stderr", "log")]
        return "".join(file.read_text(encoding="utf-8") for file in files if file.exists())

    def load_rules(self) -> str:
        """Load the rules as an operator would; returns the first line of the output."""
        done = self.net.proxy.run(
            sys.executable, "-m", "transocks", "rules", "apply", "-f", "/run/demo/transocks.toml", check=False
        )
        if done.returncode:
            raise DemoError(f"the rules could not be loaded:\n{done.stderr.strip()}")
        return done.stdout.partition("\n")[0]

    def fetch(self, fetch: Fetch) -> None:
        # Ignore the user's proxy settings and .curlrc.
        environment = {key: value for key, value in os.environ.items() if not key.lower().endswith("_proxy")}
        done = self.net.client.run(
            "curl", "-q", "-sS", "-i", "--max-time", "30", "-w", r"\n%{http_code}", *fetch.arguments,
            check=False, env=environment,
        )  # fmt: skip
        page, _, fetch.code = done.stdout.rpartition("\n")
        fetch.status, fetch.complaint = done.returncode, done.stderr.strip()
        for line in page.splitlines():
            if line.lower().startswith("x-your-address:"):
                fetch.saw = line.split(":", 1)[1].strip()

    def look_up(self) -> Lookup:
        """Look a name up, and wait for the records of the datagrams."""
        lookup = Lookup()
        earlier = {name: len(self._flows(name)) for name in PORTS}
        done = self.net.client.run(*lookup.command.split(), check=False)
        lookup.found = done.stdout.partition(" ")[0]
        deadline = time.monotonic() + PATIENCE
        while not (lookup.transocks and lookup.usocksd) and time.monotonic() < deadline:
            lookup.transocks, lookup.usocksd = (next(iter(self._flows(name)[earlier[name] :]), {}) for name in PORTS)
            time.sleep(0.01)
        return lookup

    def fetch_recorded(self, fetch: Fetch) -> None:
        """Fetch, and wait for the access records, which are written after the relay.

        Nothing else is redirected, so transocks's next record is of this fetch. curl's local port is no help: since
        8.14 it is -1 after a failed handshake.
        """
        earlier = len(self._records("transocks"))
        self.fetch(fetch)
        deadline = time.monotonic() + PATIENCE
        while not (fetch.transocks and fetch.usocksd) and time.monotonic() < deadline:
            fetch.transocks = next(iter(self._records("transocks")[earlier:]), {})
            # transocks's source address is usocksd's client address.
            source = fetch.transocks.get("src_addr")
            fetch.usocksd = next((r for r in self._records("usocksd") if source and r["client_addr"] == source), {})
            time.sleep(0.01)

    def _records(self, name: str) -> list[dict[str, Any]]:
        """Its access records of ended connections, in their order."""
        others = {"proxy starts", "not redirected", "association starts", "udp flow", "association ends"}
        return [r for r in self._all_records(name) if r.get("type") == "access" and r["message"] not in others]

    def _flows(self, name: str) -> list[dict[str, Any]]:
        """Its records of datagrams."""
        return [r for r in self._all_records(name) if r["message"] == "udp flow"]

    def _all_records(self, name: str) -> list[dict[str, Any]]:
        lines = (self.folder / f"{name}.log").read_text(encoding="utf-8").split("\n")[:-1]
        return [json.loads(line) for line in lines]

    def shell(self) -> None:
        """A shell on the host with the daemons, until it ends."""
        (self.folder / "bashrc").write_text(
            "PS1='transocks demo \\$ '\ncd /run/demo\nunset http_proxy https_proxy all_proxy\n"
            f"PATH={shlex.quote(str(Path(sys.executable).parent))}:$PATH\n",
            encoding="utf-8",
        )
        print(
            f"\nA shell on the host with the daemons ({BOLD}exit{PLAIN} ends it all). The configurations and logs"
            f" are in its folder. Try:\n"
            f"  curl -v http://{WWW}/            transocks rules verify -f transocks.toml\n"
            f"  tail -f *.log                                 transocks doctor -f transocks.toml\n"
            f"  usocksd explain --from 127.0.0.1 usocksd.toml {DENIED}:443\n"
        )
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the shell
        self.net.proxy.popen("bash", "--rcfile", "/run/demo/bashrc", "-i").wait()


def tell_the_path(rootless: bool, applied: str, before: Fetch) -> None:
    means = "by user namespaces, without root" if rootless else "in network namespaces"
    print(f"{BOLD}One host and a simulated Internet{PLAIN}, {means}; this machine's network is not touched.\n")
    stages = (
        ("curl", "has no proxy set", ""),
        ("firewall", "redirects all but", "mark 0x7473"),
        ("transocks :1081", "recovers address", "and name"),
        ("usocksd :1080", "judges, and picks", "an egress address"),
        (WWW, lab.WEB_V4, lab.WEB_V6),
    )
    for line, style, between in ((0, BOLD, "-> "), (1, DIM, "   "), (2, DIM, "   ")):
        print("  " + between.join(f"{style}{stage[line]:<20}{PLAIN}" for stage in stages))
    print(f"\n  {'rules':<15} transocks rules apply: {applied}")
    for name, settings in CONFIGURATIONS.items():
        shown = ", ".join(f"{key} = {samples.toml(key, value)}" for key, value in settings.items())
        print(textwrap.fill(shown, 116, initial_indent=f"  {name + '.toml':<15} ", subsequent_indent=" " * 18))
    print(f"\n  Before the rules, the web server saw this host as {before.saw}. With the rules:\n")


def tell_the_fetches(fetches: Sequence[Fetch]) -> None:
    heads = ("plain curl", "result", "original destination", "usocksd's decision", "egress address")
    rows = [
        (f.command, f.result, str(f.transocks.get("dest_addr", "no record")), f.decision, f.egress) for f in fetches
    ]
    widths = [max(map(len, column)) for column in zip(heads, *rows, strict=True)]
    print("    " + DIM + "  ".join(h.ljust(w) for h, w in zip(heads, widths, strict=True)).rstrip() + PLAIN)
    for fetch, row in zip(fetches, rows, strict=True):
        mark = f"{GOOD}ok{PLAIN}" if fetch.right else f"{BAD}NO{PLAIN}"
        print(f" {mark} " + "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip())
        if not fetch.right:
            print(
                f"    {BAD}curl's exit status {fetch.status}, the server saw {fetch.saw or 'nobody'}{PLAIN}"
                f" {fetch.complaint}"
            )


def tell_the_lookup(lookup: Lookup) -> None:
    mark = f"{GOOD}ok{PLAIN}" if lookup.right else f"{BAD}NO{PLAIN}"
    source = lookup.usocksd.get("src_addr", "nowhere")
    print(f"\n {mark} {lookup.command}: {lookup.found or 'nothing'}, by UDP through both, from {source}")


def tell_the_records(fetches: Sequence[Fetch | Lookup]) -> None:
    for fetch in fetches:
        print(f"\n  {DIM}The access records of{PLAIN} {fetch.command}")
        for name in ("transocks", "usocksd"):
            record = dict(getattr(fetch, name))
            for key in ("topic", "logged_at", "severity", "utsname", "type", "request_id"):
                record.pop(key, None)
            text = f'"{record.pop("message", "none")}" ' + " ".join(
                f"{k}={v}" for k, v in record.items() if v is not None
            )
            print(textwrap.fill(text, 116, initial_indent=f"  {name:<11}", subsequent_indent=" " * 13))


def demo(net: lab.Net, keep: bool) -> bool:
    """Run the demo and print its story; returns whether every fetch had the expected result."""
    it = Demo(net)
    it.start_the_world()
    before = Fetch(("-4", f"http://{WWW}/"))
    it.fetch(before)
    for name, settings in CONFIGURATIONS.items():
        it.start_daemon(name, settings)
    applied = it.load_rules()
    fetches = [
        Fetch((f"http://{lab.WEB_V4}/",)),
        Fetch((f"http://[{lab.WEB_V6}]/",)),
        Fetch(("-4", f"http://{WWW}/")),
        Fetch(("-4", f"http://{DENIED}/"), allowed=False),
        Fetch(("-4", f"https://{DENIED}/"), allowed=False),
    ]
    for fetch in fetches:
        it.fetch_recorded(fetch)
    lookup = it.look_up()
    tell_the_path(net.lab.rootless, applied, before)
    tell_the_fetches(fetches)
    tell_the_lookup(lookup)
    tell_the_records((fetches[2], lookup))
    good = lookup.right and all(fetch.right for fetch in fetches)
    done = (
        f"{GOOD}All of it had the expected result.{PLAIN}"
        if good
        else f"{BAD}Not all of it had the expected result.{PLAIN}"
    )
    hint = "" if keep else "  ./run --keep opens a shell inside; sudo ./run curl URL does the same on this machine."
    print(f"\n{BOLD}{done}{PLAIN}{DIM}{hint}{PLAIN}")
    if not good:
        for name in CONFIGURATIONS:
            words = it.last_words(name).splitlines()[-5:]
            print(f"\nThe last lines of {name}:\n" + "\n".join(f"  {line}" for line in words), file=sys.stderr)
    if keep:
        it.shell()
    return good


def main() -> int:
    parser = argparse.ArgumentParser(prog="./run", description=__doc__)
    parser.add_argument("--keep", action="store_true", help="keep it running, with a shell inside")
    keep: bool = parser.parse_args().keep
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        with lab.host_net() as net:
            return 0 if demo(net, keep) else 1
    except lab.LabUnavailable as error:
        print(f"The demo needs network namespaces, and can't create them: {error}", file=sys.stderr)
    except DemoError as error:
        print(error, file=sys.stderr)
    except KeyboardInterrupt:
        return 130
    return 1


if __name__ == "__main__":
    sys.exit(main())
