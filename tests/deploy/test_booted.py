"""The units under a real systemd, with a redirected connection. It boots in namespaces: this host's /usr, its own /etc."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

PROGRAMS = "/opt/transocks/bin"  # outside of /home and /tmp, which services do not see
PYTHON = Path(os.path.realpath(sys.executable)).relative_to(os.path.realpath(sys.base_prefix))
NO_NETWORK = (
    "systemd-networkd-wait-online.service",
    "NetworkManager-wait-online.service",
    "ifupdown-wait-online.service",
)
"""They would wait for it."""
LAUNCHER = f"""\
#!/bin/sh
export PYTHONPATH=/opt/transocks/tested:/opt/transocks/libraries PYTHONSAFEPATH=1
export LD_LIBRARY_PATH=/opt/transocks/python/lib
exec /opt/transocks/python/{PYTHON} -m ${{0##*/}} "$@"
"""
PROBE = """\
[Unit]
Requires=basic.target
After=basic.target
[Service]
Type=oneshot
Environment=PATH=/opt/transocks/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
ExecStart=/bin/sh -c 'exec /bin/sh -eux /probe/commands >/probe/said 2>&1'
ExecStopPost=/bin/systemctl --no-block exit
"""
COMMANDS = r"""
ip netns add beyond
ip link add near type veth peer name far netns beyond
ip address add 192.0.2.1/24 dev near
ip link set near up
ip -n beyond address add 192.0.2.2/24 dev far
ip -n beyond address add 203.0.113.5/32 dev far
ip -n beyond link set far up
ip route add default via 192.0.2.2
systemd-run --quiet ip netns exec beyond /opt/transocks/bin/http.server --directory /probe 80
for daemon in usocksd transocks; do
    $daemon install --bin=/opt/transocks/bin
    [ "$($daemon install --bin=/opt/transocks/bin)" = "$daemon: nothing to do" ]
done
[ "$(stat -c '%a %U %G' /etc/usocksd.toml)" = "640 root usocksd" ]
printf 'workers = 1\n[outgoing]\nallow_sites = ["203.0.113.5"]\n' >/etc/usocksd.toml
printf 'workers = 1\nproxy_url = "socks5h://127.0.0.1:1080"\n[rules]\nmode = "host"\nexempt_users = ["transocks", "usocksd"]\n' \
    >/etc/transocks.toml
systemctl enable --now usocksd transocks transocks-hold || { journalctl --boot --no-pager | tail -40; exit 1; }
systemctl is-active usocksd transocks transocks-hold
curl --silent --noproxy '' --max-time 9 --retry 5 --retry-all-errors http://203.0.113.5/commands | cmp - /probe/commands
for daemon in usocksd transocks; do
    until journalctl --unit=$daemon | grep 'dest_addr="203.0.113.5:80"'; do sleep 0.1; done
done
before=$(systemctl show --property=MainPID --value usocksd transocks)
systemctl reload usocksd transocks
[ "$(systemctl show --property=MainPID --value usocksd transocks)" = "$before" ]
usocksd status | grep 'generation 2'
if usocksd uninstall; then exit 1; fi
systemctl stop transocks
if nft list tables | grep 'transocks$'; then exit 1; fi
systemctl disable --now usocksd transocks transocks-hold
for daemon in usocksd transocks; do $daemon uninstall; done
[ "$(echo /etc/*socks*)" = "/etc/transocks.toml /etc/usocksd.toml" ] # since they were edited
[ -z "$(find /usr/local/lib /etc/logrotate.d /etc/systemd -name '*socks*')" ]
: all is well
"""


def test_the_services_live_under_systemd(tmp_path: Path) -> None:
    tested = os.environ.get("TRANSOCKS_TESTED")
    missing = [name for name in ("systemd-nspawn", "systemctl", "nft", "curl") if shutil.which(name) is None]
    if tested is None or missing or os.geteuid() != 0:
        pytest.skip(f"needs root, and a wheel of ./test; not installed: {', '.join(missing) or 'nothing'}")
    programs, probe = tmp_path / "bin", tmp_path / "probe"
    for folder in (programs, probe):
        folder.mkdir()
    for daemon in ("usocksd", "transocks", "http.server"):
        (programs / daemon).write_text(LAUNCHER)
        (programs / daemon).chmod(0o755)
    (probe / "probe.service").write_text(PROBE)
    (probe / "commands").write_text(COMMANDS)
    machine = f"transocks-{os.getpid()}"
    command = [
        "systemd-nspawn", "--quiet", "--boot", "--directory=/", "--volatile=yes", f"--machine={machine}",
        "--private-network", "--register=no", "--keep-unit", "--console=pipe",
        "--overlay=/usr/local::/usr/local", f"--bind={probe}:/probe", f"--bind-ro={programs}:{PROGRAMS}",
        f"--bind-ro={tested}:/opt/transocks/tested", f"--bind-ro={sysconfig.get_path('purelib')}:/opt/transocks/libraries",
        f"--bind-ro={sys.base_prefix}:/opt/transocks/python",
        f"--bind-ro={probe}/probe.service:/etc/systemd/system/probe.service", "systemd.unit=probe.service",
        *(f"systemd.mask={name}" for name in NO_NETWORK),
    ]  # fmt: skip
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=120, check=False)
    with contextlib.suppress(OSError):
        Path("/run/systemd/nspawn/propagate", machine).rmdir()
    said = probe / "said"
    if not said.exists():
        pytest.skip(f"systemd does not boot here: {(done.stdout + done.stderr).decode(errors='replace')[-200:]}")
    assert said.read_text().endswith("\n+ : all is well\n"), said.read_text()
