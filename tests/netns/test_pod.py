"""The sidecar of deploy/kubernetes in a network namespace that looks like a pod's: its probe, its rules, the way out."""

from __future__ import annotations

import socket
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from socket import socket as Socket
from typing import Any

import lab
import pytest
import yaml
from daemons import Daemon, NameServer, Served, wait_until
from lab import Net
from scene import python_for_others

SIDECAR = Path(__file__).parents[2] / "deploy" / "kubernetes" / "transocks" / "sidecar"
POD, NODE, NODE_OUTSIDE = lab.LAN_CLIENT_V4, lab.LAN_GATEWAY_V4, lab.PROXY_V4[0]
PROXY = "usocksd.egress.svc.cluster.local"
# Containers see neither the processes of others nor a file system that they can write to.
CONTAINER = 'mount -o remount,bind,ro / && mount -o remount,ro /run && exec "$@"'


@pytest.fixture
def pod_net(gateway_net: Net) -> Net:
    """The client is a pod: eth0 with a /24, and no IPv6, as in most clusters. The gateway is its node."""
    if gateway_net.lab.rootless:
        pytest.skip("a user namespace with one uid has no other user to be")
    gateway_net.client.sysctl("net.ipv6.conf.all.disable_ipv6", 1)
    gateway_net.lab.etc("resolv.conf", f"nameserver {NODE}\nsearch default.svc.cluster.local\noptions ndots:5\n")
    (gateway_net.lab.run_folder / "transocks").mkdir(0o777)
    (gateway_net.lab.run_folder / "transocks").chmod(0o777)  # an emptyDir
    return gateway_net


def test_the_sidecar_takes_the_pods_connections(pod_net: Net) -> None:
    template = yaml.safe_load((SIDECAR / "sidecar.yaml").read_text())["spec"]["template"]["spec"]
    sidecar, rules = template["initContainers"]
    config = (SIDECAR / "transocks.toml").read_text()
    pod, node = pod_net.client, pod_net.proxy
    python, environment = python_for_others(lambda *words: pod.run(*became(sidecar), *words, check=False))
    given = f"metrics_port = 1083\n{config}"  # the default; the harness would turn it off
    names = node.socket(kind=socket.SOCK_DGRAM)
    names.bind((NODE, 53))
    with (
        tempfile.TemporaryDirectory() as name,  # pytest's own folders are private
        NameServer({PROXY: [NODE]}, names),
        Served(pod_net.outside.listen("", 80), tell_its_client),
        Daemon(
            "usocksd",
            '[incoming]\nport = 1080\n[outgoing]\nallow_sites = ["203.0.113.0/24"]\n',
            (folder := Path(name)),
            popen=node.popen,
        ),
    ):
        folder.chmod(0o777)
        prefix = [*became(sidecar), *environment]
        with Daemon("transocks", given, folder, popen=pod.popen, prefix=prefix, python=python) as transocks:
            # The kubelet asks from the node.
            path, port = sidecar["startupProbe"]["httpGet"]["path"], sidecar["ports"][0]["containerPort"]
            probe = ["curl", "-sf", f"http://{POD}:{port}{path}"]
            wait_until(lambda: node.run(*probe, check=False).stdout == "ready\n", transocks.stderr)
            assert client_seen(pod_net, lab.WEB_V4) == POD

            apart = ["unshare", "--mount", "--pid", "--fork", "--mount-proc", "sh", "-c", CONTAINER, "sh"]
            command = ["-m", *rules["command"], "-f", str(folder / "transocks.toml")]
            pod.run(*apart, *became(rules), sys.executable, *command)

            assert client_seen(pod_net, lab.WEB_V4) == NODE_OUTSIDE
            assert client_seen(pod_net, lab.PRIVATE_V4) == POD, "the cluster's own addresses are left alone"
            record = transocks.record("proxy ends")
            assert record["client_addr"].startswith(f"{POD}:")
            assert record["upstream"] == f"socks5h://{NODE}:1080"  # each address of the name is an upstream
        with pytest.raises(ConnectionRefusedError):
            client_seen(pod_net, lab.WEB_V4)


def became(container: Mapping[str, Any]) -> list[str]:
    """Words before a command that make it run with the user and the capabilities of a container."""
    context = container["securityContext"]
    assert context["readOnlyRootFilesystem"]
    assert not context["allowPrivilegeEscalation"]
    assert context["capabilities"]["drop"] == ["ALL"]
    kept = "".join(f",+{each.lower()}" for each in context["capabilities"].get("add", ()))
    user, group = context["runAsUser"], context["runAsGroup"]
    words = ["setpriv", f"--reuid={user}", f"--regid={group}", "--clear-groups", "--no-new-privs"]
    return [*words, f"--bounding-set=-all{kept}", "--inh-caps=-all"]


def tell_its_client(sock: Socket) -> None:
    """A server that says who its client is."""
    sock.recv(100)
    sock.sendall(sock.getpeername()[0].removeprefix("::ffff:").encode())


def client_seen(net: Net, address: str) -> str:
    """What that server, at `address`, says to a connection of the pod."""
    with net.client.socket() as sock:
        sock.settimeout(5)
        sock.connect((address, 80))
        sock.sendall(b"hello\n")
        return sock.recv(100).decode()
