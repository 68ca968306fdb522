"""Which connections the rules of [rules] select: by traffic, and that the tools take every rendering."""

from __future__ import annotations

import os
from collections.abc import Iterator
from ipaddress import ip_address, ip_network

import lab
import pytest
from scene import BACKENDS, BEYOND, DIRECT, PRIVATE, REDIRECTED, Scene, backends, one_mode

from transocks.rules.config import Mode
from transocks.rules.redirection import Redirection
from transocks.rules.render import render_iptables, render_nft

NETWORK_4, NETWORK_6 = ip_network(f"{lab.WEB_V4}/32"), ip_network(f"{lab.WEB_V6}/128")


@one_mode("host")
@backends(0, 1)
def test_selected_by_destination_and_port(scene: Scene) -> None:
    scene.web.append(scene.net.outside.listen("", 8080))
    scene.start()
    scene.configure(to=[str(NETWORK_4), str(NETWORK_6)], ports=[443, "70-90"], exclude=[lab.OTHER_V6])
    scene.rules("apply")
    assert [scene.connect(a) for a in (*BEYOND, lab.OTHER_V4, lab.OTHER_V6)] == [REDIRECTED] * 2 + [DIRECT] * 2
    for address in BEYOND:
        with scene.connected(address, 8080) as (_, became):
            assert became == DIRECT
    # The list of networks to leave alone has been replaced.
    scene.configure(exclude=[str(NETWORK_4)])
    scene.rules("apply")
    assert [scene.connect(a) for a in (*BEYOND, *PRIVATE)] == [DIRECT, REDIRECTED, REDIRECTED, REDIRECTED]
    assert "as they should be" in scene.rules("verify")


@pytest.mark.parametrize(
    ("mode", "backend"),
    [("gateway", "nft"), pytest.param("tproxy", "iptables-legacy", marks=BACKENDS[2].marks)],
    indirect=True,
)
def test_selected_by_interface_and_source(scene: Scene) -> None:
    scene.start()
    for inside, became in (("lan0", REDIRECTED), ("eth0", DIRECT)):
        scene.configure(interfaces=[inside])
        scene.rules("apply")
        assert [scene.connect(a) for a in BEYOND] == [became] * 2
    scene.configure(**{"from": [f"{lab.LAN_CLIENT_V4}/24"]})
    scene.rules("apply")
    assert [scene.connect(a) for a in BEYOND] == [REDIRECTED, DIRECT]


@one_mode("host")
@backends(0, 1)
def test_selected_by_user_group_and_cgroup(scene: Scene) -> None:
    if scene.net.lab.rootless:
        pytest.skip("without root there is one user id, so rules for another don't load")
    scene.start()
    connect = f"exec 3<>/dev/tcp/{lab.WEB_V4}/80; read -r -t 0.5 line <&3; echo ${{line%% *}}"

    def became(*run: str) -> str:
        # A client that is not redirected gets no line, and is still in the queue of the web server.
        return scene.net.proxy.run(*run, "bash", "-c", connect, check=False).stdout.strip()

    scene.configure(users=["nobody", 2], groups=["daemon"], exempt_users=["bin"])
    scene.rules("apply")
    as_user = {"nobody": ["--reuid=nobody", "--clear-groups"], "games": ["--reuid=games", "--clear-groups"]}
    assert became("setpriv", *as_user["nobody"]) == REDIRECTED
    assert became("setpriv", *as_user["games"]) == ""
    assert became("setpriv", "--reuid=games", "--regid=daemon", "--clear-groups") == REDIRECTED
    assert became("setpriv", "--reuid=bin", "--regid=daemon", "--clear-groups") == ""
    scene.configure(users=["no-such-user"])
    assert "'no-such-user': there is none of that name" in scene.rules("apply", status=1)
    assert "as they should be" not in scene.rules("verify", status=1)

    # iptables and nft look for cgroups where cgroup2 is mounted; here it may be elsewhere, or nowhere.
    mounted = scene.net.proxy.run("mount", "-t", "cgroup2", "none", "/sys/fs/cgroup", check=False)
    if mounted.returncode:
        pytest.skip(f"no cgroup2 here: {mounted.stderr}")
    name = f"transocks-test-{os.getpid()}"
    folder = f"/sys/fs/cgroup/{name}"
    scene.net.proxy.run("mkdir", "-p", f"{folder}/inner")
    try:
        scene.configure(cgroups=[f"{name}/inner"])
        scene.rules("apply")
        enter = f"echo $$ > {folder}/inner/cgroup.procs; {connect}"
        assert scene.net.proxy.run("bash", "-c", enter, check=False).stdout.strip() == REDIRECTED
        assert became("env") == ""
        assert "as they should be" in scene.rules("verify")
        scene.rules("remove")
    finally:
        scene.net.proxy.run("rmdir", f"{folder}/inner", folder, check=False)


BEYOND_ADDRESSES = tuple(map(ip_address, BEYOND))


def renders(mode: Mode) -> Iterator[Redirection]:
    """One of each thing that can be asked for, then all at once."""
    host = mode is Mode.HOST
    networks = tuple(map(ip_network, ("192.168.0.0/16", "192.168.1.0/24", "203.0.113.0/24", "2001:db8::/32")))
    ports = ((443, 443), (80, 80), (8000, 8100), *((port, port) for port in range(9000, 9040, 2)))
    who = {"users": (0,), "groups": (0,)} if host else {"interfaces": ("lan0", "eth-1.5")}
    selections = [{}, *({key: value} for key, value in who.items())]
    selections += [{"from_": networks}, {"to": networks[:1]}, {"ports": ports}, {"ports": ((22, 22),)}]
    selections += [{**who, "from_": networks, "to": networks, "ports": ports}]
    for selection in selections:
        yield Redirection(mode=mode, port=2222, **selection)  # type: ignore[arg-type]
    many = tuple(ip_network(f"2001:db8:ffff:ffff:ffff:ffff:ffff:{n:x}") for n in range(0x1000, 0x1100, 2))
    for exclude in ((), networks[:2], (*networks, *many)):
        yield Redirection(mode=mode, port=2222, exclude=exclude)
    yield Redirection(
        mode=mode, port=1, mark=0xFFFFFFFF, exempt_users=(0,), reject_quic=False, closed=True, tproxy_mark=99,
        addresses=BEYOND_ADDRESSES if mode is Mode.TPROXY else (),
    )  # fmt: skip


def test_every_rendering_loads(host_net: lab.Net, backend: str) -> None:
    script = ""
    number = 0
    for wanted in (wanted for mode in Mode for wanted in renders(mode)):
        for timed in (False, True):
            if backend == "nft":
                texts = {"nft -f -": render_nft(wanted, seconds=60 if timed else None)}
            else:
                variant = backend.removeprefix("iptables-")
                texts = {
                    f"{'ip6' if version == 6 else 'ip'}tables-{variant}-restore --noflush": render_iptables(
                        wanted, version=version, until="2038-01-01T00:00:00" if timed else None
                    )
                    for version in (4, 6)
                }
            for command, text in texts.items():
                number += 1
                script += f"unshare --net {command} <<'END' || {{ echo rendering {number} >&2; exit 1; }}\n{text}END\n"
    assert number >= 66
    host_net.client.run("sh", "-e", input=script)
