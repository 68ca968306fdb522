"""The facts that checks judge: from the kernel, from the running daemon, and from traces of samples. Nothing is
changed.
"""

from __future__ import annotations

import contextlib
import pwd
import socket
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path

import attrs

from transocks.config import TransocksConfig
from transocks.rules import live
from transocks.rules.config import Mode, RulesConfig
from transocks.rules.loops import Sender, sender_of
from transocks.rules.redirection import Redirection, eligible, redirections_of
from transocks.tools import FirewallError
from transocks.tracing.fate import Fate, Reach, fate_of
from transocks.tracing.links import Links, filtered_bridges, links
from transocks.tracing.names import RuleNames
from transocks.tracing.reports import SYN, TCP, UDP
from transocks.tracing.samples import Result, Sample, samples, try_out
from transocks.tracing.trace import Trace
from transocks.tracing.tracer import Tracer
from transocks.upstreams.proxy_url import ProxyURL
from usocksd.host.addresses import HostAddresses
from usocksd.host.sockets import ListeningSocket, listeners
from usocksd.net.address import IPAddress, without_zone
from usocksd.serve.verbs.client import Answer, ControlClient, VerbError

AS_ROOT = "run it as root"
_DNS = ((53, 53),)
"""What the files in iptables/ take of UDP"""


@attrs.frozen(kw_only=True)
class Host:
    """This host. Each fact is read, and each sample tried, when a check first asks for it."""

    config: TransocksConfig
    tracer: Tracer | None = None
    """None: no packets can be traced, since this user is not root for example"""
    why: str = ""
    """why there is no tracer"""
    client: IPAddress | None = None
    """if given, its next connection is judged instead of samples"""
    names: RuleNames = attrs.field(factory=RuleNames)
    proc: Path = Path("/proc")
    counters: Mapping[str, int] = attrs.field(default=attrs.Factory(lambda self: self.counted(), takes_self=True))
    """how many packets the kernel had dropped before the checks began"""

    # ---- what the kernel says

    def read(self, path: str) -> str | None:
        """A file below /proc, if it is there and may be read."""
        try:
            return (self.proc / path).read_text("ascii", "replace").strip()
        except OSError:
            return None

    def sysctl(self, name: str) -> str | None:
        """A kernel setting, net.ipv4.ip_forward for example; None if there is none of that name."""
        return self.read(f"sys/{name.replace('.', '/')}")

    def number(self, name: str) -> int | None:
        """A kernel setting that is a number."""
        text = self.sysctl(name)
        return int(text) if text and text.lstrip("-").isdigit() else None

    def of_interface(self, interface: str, name: str) -> int:
        """A setting of an interface for IPv4."""
        return int(self.read(f"sys/net/ipv4/conf/{interface}/{name}") or 0)

    def counted(self) -> dict[str, int]:
        """How many packets this network namespace has dropped so far: the counters of /proc/net/netstat by name, and
        conntrack's "drop" and "early_drop".
        """
        found: dict[str, int] = {}
        lines = [line.split()[1:] for line in (self.read("net/netstat") or "").splitlines()]
        for names, values in zip(lines[::2], lines[1::2], strict=False):  # a line of names, a line of values
            found |= {name: int(value) for name, value in zip(names, values, strict=False)}
        head, *rows = [line.split() for line in (self.read("net/stat/nf_conntrack") or "").splitlines()] or [[]]
        for name in {"drop", "early_drop"} & set(head):  # hexadecimal, a line for each CPU
            found[name] = sum(int(row[head.index(name)], 16) for row in rows)
        return found

    def since(self, name: str) -> int:
        """How much such a counter has grown since the checks began."""
        return self.counted().get(name, 0) - self.counters.get(name, 0)

    @cached_property
    def versions(self) -> tuple[int, ...]:
        """The IP versions in use: with disable_ipv6=1 nobody can listen, nor send."""
        return live.routed_versions()

    @cached_property
    def links(self) -> Links:
        """The interfaces; none where ip(8) is not installed."""
        try:
            return links()
        except FirewallError:
            return Links()

    @cached_property
    def bridges(self) -> dict[tuple[str, int], str]:
        """Bridges whose packets the rules see: by name and IP version, the setting that causes it."""
        return filtered_bridges()

    @cached_property
    def listeners(self) -> tuple[ListeningSocket, ...] | None:
        """None: the kernel does not tell."""
        try:
            return listeners()
        except OSError:
            return None

    @cached_property
    def datagram_sockets(self) -> tuple[ListeningSocket, ...]:
        """The UDP sockets that are not connected; none where the kernel does not tell."""
        return () if self.listeners is None else listeners(udp=True)

    def listener(self, address: IPAddress, port: int, *, udp: bool = False) -> ListeningSocket | None:
        """The socket that accepts connections, or takes datagrams, to this local address."""
        there = self.datagram_sockets if udp else self.listeners or ()
        return next((listener for listener in there if listener.accepts(without_zone(address), port)), None)

    @cached_property
    def _addresses(self) -> HostAddresses:
        return HostAddresses()

    def is_local(self, address: IPAddress) -> bool:
        """Whether a connection to it ends on this host."""
        return self._addresses.is_local(without_zone(address))

    # ---- the daemon, and its configuration

    @cached_property
    def status(self) -> Answer | None:
        """The running daemon's answer to `status`."""
        if not self.config.control:
            return None
        try:
            return ControlClient("transocks", self.config.control).ask("status", timeout=2)
        except VerbError:
            return None

    @cached_property
    def daemon(self) -> Sender:
        """What identifies the daemon's connections to rules; if it does not run, the user of its unit."""
        sender = next((self.sender(each) for each in self.listeners or () if each.port in self.ports), Sender())
        if sender.uid is None:
            with contextlib.suppress(KeyError):
                sender = Sender(uid=pwd.getpwnam("transocks").pw_uid)
        return attrs.evolve(sender, marks=frozenset({self.config.mark or 0}))

    def sender(self, listener: ListeningSocket) -> Sender:
        """What identifies a listening process's connections to rules; its cgroup only if [rules] selects cgroups."""
        sender, rules = sender_of(listener, self.proc), self.config.rules
        return sender if rules is not None and rules.cgroups else attrs.evolve(sender, cgroup=None)

    @property
    def ports(self) -> set[int]:
        """Where transocks listens."""
        return {listen.port for listen in (*self.config.listen, *self.config.listen_tproxy)}

    @property
    def proxies(self) -> tuple[ProxyURL, ...]:
        """All upstreams, each once."""
        return tuple(dict.fromkeys(url for group in self.config.groups().values() for url in group.proxy_url))

    @property
    def stated(self) -> bool:
        """Whether the configuration has [rules]."""
        return self.config.rules is not None

    @cached_property
    def redirections(self) -> tuple[Redirection, ...]:
        """What [rules] redirects; without [rules], the redirections that the listeners could serve."""
        config, rules = self.config, self.config.rules
        if rules is None:
            modes = [
                mode for mode in Mode if eligible(mode, config.listen_tproxy if mode is Mode.TPROXY else config.listen)
            ]
            everywhere = all(listen.address.is_unspecified for listen in config.listen)
            if Mode.TPROXY in modes and Mode.GATEWAY in modes and not everywhere:
                modes.remove(Mode.GATEWAY)
            rules = RulesConfig(mode=tuple(modes), udp_ports=_DNS if config.listen_udp else ())
        try:
            return tuple(redirections_of(rules, config.listen, config.listen_tproxy, config.mark, config.listen_udp))
        except FirewallError:
            return ()

    # ---- what the kernel did with packets

    @cached_property
    def fates(self) -> tuple[Fate, ...]:
        """The fates of all samples, in all modes."""
        found = [
            fate_of(result, redirection, self.names)
            for redirection in self.redirections
            for result in self._results(redirection)
        ]
        # Rules loaded by hand need not cover all modes that the listeners could serve.
        behind = {Reach.ARRIVED, Reach.STOPPED}
        titles = {f.redirection.title for f in found if f.reach in behind or (f.reach is Reach.PASSED and f.text)}
        return tuple(f for f in found if self.stated or not titles or f.redirection.title in titles)

    def _results(self, redirection: Redirection) -> list[Result]:
        if self.tracer is None:
            return []
        if self.client is None:
            return [try_out(self.tracer, sample) for sample in samples(redirection, self.links, self.versions)]
        port = self.tracer.port_of(self.client)
        trace = None if port is None else self.tracer.trace(TCP, port)
        if port is None or trace is None or redirection.mode is Mode.HOST or redirection.udp:
            return []
        to, iif = trace.packet, device(trace.iif)
        sample = Sample(destination=to.destination, port=to.dport, source=self.client, iif=iif)
        return [Result(sample=sample, trace=trace, back=self.tracer.trace(TCP, port, back=True))]

    @cached_property
    def arrived(self) -> tuple[Fate, ...]:
        """The first sample of each mode and family that arrived."""
        found: dict[str, Fate] = {}
        for fate in self.fates:
            if fate.reach is Reach.ARRIVED:
                found.setdefault(fate.name, fate)
        return tuple(found.values())

    def open(self, who: Sender, address: IPAddress, port: int, protocol: int = TCP) -> Result:
        """Try a connection as this process would open it, or a datagram as it would send it."""
        return self.try_out(Sample(destination=address, port=port, protocol=protocol, who=who))

    def try_out(self, sample: Sample, *, flags: int = SYN) -> Result:
        """Try a sample; without a tracer, the result has no trace."""
        if self.tracer is None:
            return Result(sample=sample)
        return try_out(self.tracer, sample, flags=flags)

    def comes_back(self, result: Result) -> str | None:
        """The rule that redirects it to a port of transocks, if one does."""
        trace = result.trace
        if result.sample.protocol == UDP:
            by_tproxy = {redirection.tproxy_mark for redirection in self.redirections if redirection.udp}
            marks = trace.marks if trace is not None and trace.delivered else ()
            return next((self.names.of(mark.cause) for mark in marks if mark.after in by_tproxy), None)
        turn = trace.turn if trace is not None else None
        if turn is None or turn.to is None or turn.to[1] not in self.ports or not self.is_local(turn.to[0]):
            return None
        return self.names.of(turn.cause)

    def stop(self, trace: Trace | None) -> str | None:
        """The rule or part of the kernel that stopped a packet, for messages."""
        return self.names.stop(trace.stop) if trace is not None and trace.stop is not None else None


def device(index: int) -> str:
    """The name of an interface by its number."""
    try:
        return socket.if_indextoname(index)
    except OSError:
        return f"interface {index}"
