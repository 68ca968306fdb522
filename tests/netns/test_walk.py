"""doctor's reading of rules against the kernel's: the same packet, and where it really gets."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from ipaddress import ip_address
from pathlib import Path
from socket import socket as Socket

import daemons
import lab
import pytest

from transocks.netfilter.loaded import loaded
from transocks.netfilter.ruleset import Packet
from transocks.netfilter.walk import walk

PORT = 80
REDIRECTED, DIRECT, REFUSED = "redirected", "direct", "refused"

OUTPUT = "type nat hook output priority -100;"
RULESETS = {
    "redirect": (REDIRECTED, f"chain o {{ {OUTPUT} tcp dport 80 redirect to :1081; }}"),
    "another port": (DIRECT, f"chain o {{ {OUTPUT} tcp dport 443 redirect to :1081; }}"),
    "exempt by an address": (
        DIRECT,
        f"chain o {{ {OUTPUT} ip daddr 203.0.113.0/24 accept; meta l4proto tcp redirect to :1081; }}",
    ),
    "accepted by one nat chain, redirected by the next": (
        REDIRECTED,
        f"""chain first {{ type nat hook output priority -150; accept; }}
            chain second {{ {OUTPUT} meta l4proto tcp redirect to :1081; }}""",
    ),
    "the first nat chain wins": (
        REFUSED,
        f"""chain second {{ {OUTPUT} meta l4proto tcp redirect to :1081; }}
            chain first {{ type nat hook output priority -110; meta l4proto tcp redirect to :9; }}""",
    ),
    "nat comes after mangle, whatever its priority": (
        REDIRECTED,
        """chain n { type nat hook output priority -160; meta l4proto tcp meta mark 7 redirect to :1081; }
           chain m { type route hook output priority -150; meta mark set 7; }""",
    ),
    "a filter after nat sees the new port": (
        REFUSED,
        f"""chain n {{ {OUTPUT} meta l4proto tcp redirect to :1081; }}
            chain f {{ type filter hook output priority 0; tcp dport 1081 reject with tcp reset; }}""",
    ),
    "a filter before nat sees the old one": (
        REDIRECTED,
        f"""chain n {{ {OUTPUT} meta l4proto tcp redirect to :1081; }}
            chain f {{ type filter hook output priority -200; tcp dport 1081 reject with tcp reset; }}""",
    ),
    "jump, return, go on": (
        REDIRECTED,
        f"""chain j {{ tcp dport 80 return; tcp dport 80 accept; }}
            chain n {{ {OUTPUT} jump j; meta l4proto tcp redirect to :1081; }}""",
    ),
    "goto does not come back": (
        DIRECT,
        f"""chain j {{ tcp dport 443 redirect to :1081; }}
            chain n {{ {OUTPUT} meta l4proto tcp goto j; meta l4proto tcp redirect to :1081; }}""",
    ),
    "a verdict map": (
        REDIRECTED,
        f"""chain j {{ meta l4proto tcp redirect to :1081; }}
            chain n {{ {OUTPUT} ip daddr . tcp dport vmap {{ 203.0.113.80 . 80 : jump j, 203.0.113.80 . 81 : drop }}; }}""",
    ),
    "not tracked": (
        DIRECT,
        f"""chain r {{ type filter hook output priority -300; notrack; }}
            chain n {{ {OUTPUT} meta l4proto tcp redirect to :1081; }}""",
    ),
    "owner, state, interface": (
        REDIRECTED,
        f"""chain n {{ {OUTPUT} meta skuid 1-60000 accept; ct state established accept; iifname "eth0" accept;
                     oifname != "eth*" accept; tcp flags & (syn | ack) == syn redirect to :1081; }}""",
    ),
    "policy": (REFUSED, f"""chain n {{ {OUTPUT} meta l4proto tcp redirect to :1081; }}
            chain f {{ type filter hook output priority 1; ct state new ct status dnat jump r; }}
            chain r {{ meta mark & 0xff == 0 meta l4proto tcp reject with tcp reset; }}"""),
}  # fmt: skip
IPTABLES = {
    "redirect": (REDIRECTED, "*nat\n-A OUTPUT -p tcp -m tcp --dport 80 -j REDIRECT --to-ports 1081\nCOMMIT\n"),
    "mark, set in mangle": (
        DIRECT,
        "*mangle\n-A OUTPUT -d 203.0.113.80 -p tcp -j MARK --set-mark 7\nCOMMIT\n"
        "*nat\n-A OUTPUT -m mark --mark 7 -j RETURN\n-A OUTPUT -p tcp -j REDIRECT --to-ports 1081\nCOMMIT\n",
    ),
    "mark with a mask": (
        REDIRECTED,
        "*mangle\n-A OUTPUT -p tcp -j MARK --set-xmark 0x10/0xf0\n-A OUTPUT -p tcp -j MARK --set-xmark 0x1/0xf\nCOMMIT\n"
        "*nat\n-A OUTPUT -p tcp -m mark --mark 0x11/0xff -j REDIRECT --to-ports 1081\nCOMMIT\n",
    ),
    "owner, type, ports, not": (
        REDIRECTED,
        "*nat\n-N X\n-A OUTPUT -m addrtype --dst-type LOCAL -j RETURN\n-A OUTPUT ! -o lo -p tcp -j X\n"
        "-A X -m owner --uid-owner 1-60000 -j RETURN\n-A X -p tcp -m multiport --dports 53,853,8000:9000 -j RETURN\n"
        "-A X ! -d 10.0.0.0/8 -p tcp -m comment --comment \"-j ACCEPT\" -j REDIRECT --to-ports 1081\nCOMMIT\n",
    ),
    "refused behind": (
        REFUSED,
        "*nat\n-A OUTPUT -p tcp -j REDIRECT --to-ports 1081\nCOMMIT\n"
        "*filter\n-A OUTPUT -p tcp -m conntrack --ctstate DNAT -j REJECT --reject-with icmp-port-unreachable\nCOMMIT\n",
    ),
    "not tracked": (
        DIRECT,
        "*raw\n-A OUTPUT -p tcp -j CT --notrack\nCOMMIT\n*nat\n-A OUTPUT -p tcp -j REDIRECT --to-ports 1081\nCOMMIT\n",
    ),
}  # fmt: skip


@pytest.fixture
def ends(host_net: lab.Net) -> Iterator[tuple[Socket, Socket]]:
    """Where connections get if they are redirected, and if not."""
    with host_net.client.listen("127.0.0.1", 1081) as near, host_net.outside.listen(lab.WEB_V4, PORT) as far:
        near.setblocking(False)
        far.setblocking(False)
        yield near, far


def test_nft_is_read_as_the_kernel_does(host_net: lab.Net, ends: tuple[Socket, Socket]) -> None:
    with inside(host_net) as net:
        for name, (expected, text) in RULESETS.items():
            host_net.client.run("nft", "-f", "-", input=f"table ip t {{ {text} }}".replace("}", "}\n"))
            assert (name, reached(host_net, *ends), read(host_net, net)) == (name, expected, expected)
            host_net.client.run("nft", "flush", "ruleset")


@pytest.mark.parametrize("variant", ["nft", "legacy"])
def test_iptables_is_read_as_the_kernel_does(host_net: lab.Net, ends: tuple[Socket, Socket], variant: str) -> None:
    restore = f"iptables-{variant}-restore"
    if shutil.which(restore) is None:
        pytest.skip(f"there is no {restore}")
    with inside(host_net) as net:
        for name, (expected, text) in IPTABLES.items():
            if "--uid-owner" in text and host_net.lab.rootless:
                continue  # there is one user id, so rules for others don't load
            host_net.client.run(restore, input=EMPTY)
            host_net.client.run(restore, "--noflush", input=text)
            assert (name, reached(host_net, *ends), read(host_net, net)) == (name, expected, expected)


EMPTY = "*raw\nCOMMIT\n*mangle\nCOMMIT\n*nat\nCOMMIT\n*filter\nCOMMIT\n"


@contextlib.contextmanager
def inside(net: lab.Net) -> Iterator[Path]:
    """/proc/PID/net of a process on the client."""
    with net.client.popen("sleep", "infinity") as sleeper:
        try:
            yield Path(f"/proc/{sleeper.pid}/net")
        finally:
            sleeper.kill()


def reached(net: lab.Net, near: Socket, far: Socket) -> str:
    with net.client.socket() as sock:
        sock.settimeout(daemons.PATIENCE)
        try:
            sock.connect((lab.WEB_V4, PORT))
        except ConnectionRefusedError:
            return REFUSED
        for listener, name in ((near, REDIRECTED), (far, DIRECT)):
            with contextlib.suppress(BlockingIOError):
                listener.accept()[0].close()
                return name
    raise AssertionError("nobody has accepted it")


def read(net: lab.Net, folder: Path) -> str:
    packet = Packet(
        version=4, destination=ip_address(lab.WEB_V4), dport=PORT, oif="eth0", uid=0, gid=0, source_type="local"
    )
    way = walk(loaded(lambda *argv: net.client.run(*argv).stdout, folder), "output", packet)
    if not way.certain:
        return f"uncertain: {way.steps}"
    if way.blocked is not None:
        return REFUSED
    if way.turned is None:
        return DIRECT
    return REDIRECTED if way.turned.action.port == 1081 else REFUSED  # nobody listens there
