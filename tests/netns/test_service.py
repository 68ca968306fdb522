"""The service as a whole under load: reloads, crashes, hangs, changed addresses and workers, logs that nobody reads.

Load is of load.py: clients that verify every byte. TRANSOCKS_HEAVY_SECONDS is for how long signals arrive (default 4,
with 50 clients; 30 is the long form, with 200).
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import socket
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from socket import socket as Socket

import daemons
import lab
import pytest
import test_redirect
from daemons import GRANTED, Daemon, Record, Served, lives, receive_all, socks5
from load import Load
from observe import Counters, carried, cpu_seconds, drops, listening, scrape, sd_messages, wait_until_stopped

SECONDS = float(os.environ.get("TRANSOCKS_HEAVY_SECONDS", "4"))
CLIENTS, LARGEST = (200, 300_000) if "TRANSOCKS_HEAVY_SECONDS" in os.environ else (50, 60_000)

USOCKSD = """
workers = 2
[incoming]
port = 1080
addresses = ["127.0.0.1"]
metrics_port = 1082
[outgoing]
mark = 0x7473
"""
TRANSOCKS = """
workers = 2
listen = "localhost:1081"
proxy_url = "socks5://127.0.0.1:1080"
mark = 0x7473
metrics_port = 1083
"""
# The time from the silence of a hanging worker until another one has replaced it.
HANG_PATIENCE = 40.0


@contextlib.contextmanager
def both(net: lab.Net, folder: Path, server_config: str = USOCKSD) -> Iterator[tuple[Daemon, Daemon]]:
    """transocks and usocksd on the client, and the rules."""
    with Daemon("usocksd", server_config, folder, popen=net.proxy.popen) as server:
        with Daemon("transocks", TRANSOCKS, folder, popen=net.proxy.popen) as client:
            test_redirect.load(net, "nft")
            yield client, server


@contextlib.contextmanager
def hammered(net: lab.Net, folder: Path) -> Iterator[Load]:
    """Load through the redirect, of both families, and under way."""
    with net.outside.listen(backlog=1024) as listener:
        port = listener.getsockname()[1]
        places = [f"{lab.WEB_V4}:{port}", f"[{lab.WEB_V6}]:{port}"]
        with Load(folder, listener, places, clients=CLIENTS, largest=LARGEST, popen=net.client.popen) as load:
            load.go_on()
            yield load


@contextlib.contextmanager
def hammered_directly(folder: Path, *ports: int) -> Iterator[Load]:
    """Load through usocksd alone, over loopback, under way on one of the ports at least."""
    with daemons.loopback(backlog=1024) as listener:
        places = [f"127.0.0.1:{port}" for port in ports]
        with Load(folder, listener, places, clients=CLIENTS, largest=LARGEST, socks=True) as load:
            load.go_on()
            yield load


def configure(daemon: Daemon, folder: Path, config: str) -> None:
    """Write another configuration, and say so."""
    (folder / f"{daemon.name}.toml").write_text(daemons.settings(daemon.name, config), encoding="utf-8")
    daemon.signal(signal.SIGHUP)


def reloads(daemon: Daemon) -> int:
    return len(daemon.records("reloaded"))


def reload(daemon: Daemon, folder: Path, config: str) -> None:
    """The same, and wait until it is in force."""
    before = reloads(daemon)
    configure(daemon, folder, config)
    daemons.wait_until(lambda: reloads(daemon) > before, lambda: f"it reloads: {daemon.lines()[-5:]}")


def wait_for_workers(daemon: Daemon, count: int) -> None:
    daemons.wait_until(
        lambda: len(daemon.workers()) == count,
        lambda: f"{daemon.name} has {count} workers: {daemon.workers()}",
        HANG_PATIENCE,
    )


# ---- reloads, crashes, hangs


def test_reloads_cost_nothing(host_net: lab.Net, tmp_path: Path) -> None:
    """SIGHUP every second at both. Meanwhile no counter falls, and at the end all add up."""
    with both(host_net, tmp_path) as (client, server), hammered(host_net, tmp_path) as load:
        counters = {1083: Counters(), 1082: Counters()}

        def scrape_all() -> None:
            for port, seen in counters.items():
                seen.see(scrape(host_net.proxy.socket(), port))

        start = time.monotonic()
        hups = 0
        # (Signals that arrive during a reload are one.)
        while time.monotonic() - start < SECONDS or min(map(reloads, (client, server))) < 2:
            if time.monotonic() - start >= hups:
                hups += 1
                client.signal(signal.SIGHUP)
                server.signal(signal.SIGHUP)
            scrape_all()
            time.sleep(0.1)  # the load's time: this is about what happens meanwhile
        for daemon in (client, server):
            wait_for_workers(daemon, 2)
            assert daemon.records("reload failed") == []
        load.go_on()
        transfers = load.stop()
        assert load.failures() == []
        assert not any(t.refused for t in transfers)
        # A SYN that is dropped comes again a second later, and nothing fails.
        assert drops(client.pid) == 0

        def add_up() -> bool:
            scrape_all()
            probes = counters[1082].total("usocksd_probes_total")
            return all(
                counters[port].total(f"{name}_connections_total", version="SOCKS5", status="granted")
                == counters[port].total(f"{name}_connections_accepted_total") - others
                == counters[port].total(f"{name}_proxy_elapsed_seconds_count")
                == len(transfers)
                for port, name, others in ((1083, "transocks", 0), (1082, "usocksd", probes))
            )

        daemons.wait_until(add_up, lambda: (len(transfers), [seen.last for seen in counters.values()]))
        for port, daemon in ((1083, client), (1082, server)):
            assert counters[port].total(f"{daemon.name}_reloads_total", result="ok") == reloads(daemon)


def test_a_killed_worker_takes_down_its_own_connections_only(host_net: lab.Net, tmp_path: Path) -> None:
    """kill -9 of a random worker of either, again and again."""
    rng = random.Random(9)
    with both(host_net, tmp_path) as (client, server), hammered(host_net, tmp_path) as load:
        lost: dict[str, set[str]] = {"transocks": set(), "usocksd": set()}
        kills = 0
        end = time.monotonic() + SECONDS
        while time.monotonic() < end:
            daemon = rng.choice((client, server))
            before = len(daemon.records("a worker was replaced"))
            victim = rng.choice(daemon.workers())
            lost[daemon.name] |= freeze(victim)
            os.kill(victim, signal.SIGKILL)
            kills += 1
            load.go_on(50)
            daemons.wait_until(
                lambda: len(daemon.records("a worker was replaced")) > before, lambda: daemon.lines()[-5:]
            )
        load.go_on()
        load.stop()
        check_failures(load, client, lost)
        assert kills >= SECONDS / 4
        for daemon in (client, server):
            wait_for_workers(daemon, 2)


def freeze(worker: int) -> set[str]:
    """Stop a worker. The peers of the connections that it has."""
    os.kill(worker, signal.SIGSTOP)
    wait_until_stopped(worker)
    return carried(worker)


def check_failures(load: Load, client: Daemon, lost: dict[str, set[str]]) -> None:
    """Nothing has failed but what a frozen worker had: `lost` are its peers, by daemon."""
    records = defaultdict(list)
    for record in client.records(type="access"):
        records[record.get("client_addr")].append(record)
    epoch = time.time() - time.monotonic()
    for failure in load.failures():

        def distance(record: Record) -> float:
            # A port comes again: which of its connections was it?
            return abs(datetime.fromisoformat(record["logged_at"]).timestamp() - epoch - failure.ended)

        own = min(records[failure.client], key=distance, default={})
        assert failure.client in lost["transocks"] or own.get("src_addr") in lost["usocksd"], (failure, own)
    assert not any(t.refused for t in load.transfers())


def test_a_worker_that_hangs_is_replaced(host_net: lab.Net, tmp_path: Path) -> None:
    """SIGSTOP, of one worker of each. Others take over what comes for it, long before it is given up."""
    with both(host_net, tmp_path) as (client, server), hammered(host_net, tmp_path) as load:
        lost = {daemon.name: freeze(daemon.workers()[0]) for daemon in (client, server)}
        for daemon in (client, server):
            daemon.record("a worker is silent")
        load.go_on()
        assert not any(daemon.records("a worker hangs, ending it") for daemon in (client, server))
        for daemon in (client, server):
            daemons.wait_until(
                lambda: daemon.records("a worker was replaced"), lambda: daemon.lines()[-5:], HANG_PATIENCE
            )
            assert daemon.records("a worker hangs, ending it")
        load.go_on()
        load.stop()
        check_failures(load, client, lost)


# ---- other configurations


def test_a_bad_configuration_changes_nothing_and_a_good_one_takes_effect(host_net: lab.Net, tmp_path: Path) -> None:
    bad = {
        "usocksd": USOCKSD.replace("workers = 2", "workers = 1000").replace("1080", "80.9") + 'allow_sites = "x"\n',
        "transocks": TRANSOCKS.replace("socks5://", "socks4://").replace("localhost:1081", "nowhere") + "extra = 1\n",
    }
    faults = {
        "usocksd": ["workers", "incoming.port", "outgoing.allow_sites"],
        "transocks": ["proxy_url", "listen", "extra"],
    }
    with both(host_net, tmp_path) as (client, server), contextlib.ExitStack() as stack:
        other = stack.enter_context(Served(host_net.outside.listen(lab.OTHER_V4), daemons.echo))
        load = stack.enter_context(hammered(host_net, tmp_path))
        workers = client.workers(), server.workers()
        for daemon in (client, server):
            configure(daemon, tmp_path, bad[daemon.name])
        for daemon in (client, server):
            daemon.record("nothing has changed: the configuration in force stays")
            said = [record["error"] for record in daemon.records("bad configuration")]
            assert len(said) == 3, said
            for key in faults[daemon.name]:
                assert any(error.startswith(key) for error in said), (key, said)
        for daemon, before in zip((client, server), workers, strict=True):
            daemons.wait_until(lambda: daemon.workers() == before, "the workers are those that there were")
        # Programs are known to put half of a bad file in force.
        with test_redirect.connect(host_net, 4, other.port, lab.OTHER_V4) as sock:
            assert lives(sock)
            reload(server, tmp_path, USOCKSD + f'deny_sites = ["{lab.OTHER_V4}"]\n')
            reload(client, tmp_path, TRANSOCKS)
            sock.sendall(b"y")  # it was allowed when it began
            assert sock.recv(1) == b"y"
        assert test_redirect.is_refused(host_net, 4, other.port, lab.OTHER_V4)
        assert server.record("ruleset mismatch")["dest_host"] == lab.OTHER_V4
        load.go_on()
        load.stop()
        assert load.failures() == []


LOOPBACK = """
workers = {workers}
[incoming]
port = {port}
addresses = ["127.0.0.1"]
metrics_port = {metrics}
[outgoing]
allow_sites = ["127.0.0.0/8"]
"""


def loopback_config(port: int, workers: int = 2, metrics: int = 0) -> str:
    return LOOPBACK.format(port=port, workers=workers, metrics=metrics)


def connect(port: int, destination: Served) -> Socket:
    """An established connection through usocksd."""
    sock = socket.create_connection(("127.0.0.1", port), daemons.PATIENCE)
    assert socks5(sock, "127.0.0.1", destination.port)[0] == GRANTED
    return sock


@contextlib.contextmanager
def queued(daemon: Daemon, port: int, destination: Served) -> Iterator[None]:
    """Connections wait in the queues of all sockets there are, since every worker is stopped until the context ends.

    In it another configuration comes into force; then they must have been served nevertheless.
    """
    workers = daemon.workers()
    with contextlib.ExitStack() as stack:
        for worker in workers:
            os.kill(worker, signal.SIGSTOP)
            stack.callback(os.kill, worker, signal.SIGCONT)
            wait_until_stopped(worker)
        waiting = [
            stack.enter_context(socket.create_connection(("127.0.0.1", port), daemons.PATIENCE)) for _ in range(30)
        ]
        yield
        for sock in waiting:
            assert socks5(sock, "127.0.0.1", destination.port)[0] == GRANTED
        assert daemon.records("a worker hangs, ending it") == []


def test_port_and_number_of_workers_change_under_load(tmp_path: Path) -> None:
    """Workers 1 -> 3 with another port, then 3 -> 2. Nothing is reset: late clients are refused by the old port."""
    old, new = daemons.free_port(), daemons.free_port()
    with contextlib.ExitStack() as stack:
        destination = stack.enter_context(Served(daemons.loopback(), daemons.echo))
        daemon = stack.enter_context(Daemon("usocksd", loopback_config(old, 1), tmp_path))
        load = stack.enter_context(hammered_directly(tmp_path, old, new))
        kept = stack.enter_context(contextlib.ExitStack())
        live = [kept.enter_context(connect(old, destination)) for _ in range(10)]
        with queued(daemon, old, destination):
            reload(daemon, tmp_path, loopback_config(new, 3))
        wait_for_workers(daemon, 1 + 3)
        changed = time.monotonic()
        load.go_on()
        live += [kept.enter_context(connect(new, destination)) for _ in range(30)]
        daemons.wait_until(
            lambda: any(t.refused and t.began > changed and t.place.endswith(f":{old}") for t in load.transfers()),
            "the old port is closed",
        )
        with queued(daemon, new, destination):
            reload(daemon, tmp_path, loopback_config(new, 2))
        load.go_on()
        for number, sock in enumerate(live):
            sock.sendall(bytes([number]))
            assert sock.recv(1) == bytes([number])
        kept.close()
        wait_for_workers(daemon, 2)
        load.go_on()
        transfers = load.stop()
        assert load.failures() == []
        assert {t.place for t in transfers if t.refused and t.began > changed} == {f"127.0.0.1:{old}"}


def test_work_spreads_over_workers(tmp_path: Path) -> None:
    """CPU time within 60:40 for 1000 short connections."""
    port = daemons.free_port()
    with (
        Served(daemons.loopback(), daemons.echo) as destination,
        Daemon("usocksd", loopback_config(port), tmp_path) as daemon,
    ):
        before = {pid: cpu_seconds(pid) for pid in daemon.workers()}
        for _ in range(1000):
            with connect(port, destination) as sock:
                assert lives(sock)
        used = [cpu_seconds(pid) - start for pid, start in before.items()]
        assert len(used) == 2
        assert max(used) <= 0.6 * sum(used), used


# ---- logs that nobody reads

# A name that a record is long with: each of its bytes takes six, and it stands there twice.
LONG_NAME = "\x01" * 255


def dropped(make: Callable[[], Socket], metrics: int) -> float:
    """How many records the daemon has dropped; `make` makes a socket where it is."""
    seen = Counters()
    seen.see(scrape(make(), metrics))
    return seen.total("usocksd_log_records_dropped_total")


def drown(make: Callable[[], Socket], port: int, metrics: int) -> None:
    """Connections that are worth a long record and nothing else, until a record is dropped."""

    def again() -> bool:
        with contextlib.ExitStack() as stack:
            socks = [stack.enter_context(make()) for _ in range(100)]
            for sock in socks:
                sock.connect(("127.0.0.1", port))
                sock.sendall(daemons.GREETING + daemons.request(LONG_NAME, 80, as_name=True))
            for sock in socks:
                receive_all(sock)
        return dropped(make, metrics) > 0

    daemons.wait_until(again, "records are dropped")


def test_a_log_pipe_that_nobody_reads(tmp_path: Path) -> None:
    port, metrics = daemons.free_port(), daemons.free_port()
    ours, theirs = os.pipe()
    with open(ours, "rb") as pipe:
        with open(theirs, "wb") as stderr:
            daemon = Daemon("usocksd", loopback_config(port, 1, metrics), tmp_path, logfile=None, stderr=stderr)
        with daemon:
            daemons.wait_until(lambda: is_open(port) and is_open(metrics), "it listens")
            with hammered_directly(tmp_path, port) as load:
                drown(Socket, port, metrics)
                load.go_on()
                load.stop()
                assert load.failures() == []
                said = records_until(pipe.fileno(), lambda r: r["message"] == "log records dropped")
                assert said["count"] > 0
                # (The metric is half a second old.)
                daemons.wait_until(lambda: dropped(Socket, metrics) >= said["count"], lambda: said)
                daemon.process.terminate()
                receive_rest(pipe.fileno())
                assert daemon.process.wait(daemons.PATIENCE) == 0


def is_open(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
        return True
    return False


def records_until(fd: int, wanted: Callable[[Record], bool]) -> Record:
    """Read a log until the record that is wanted."""
    data = b""
    while more := os.read(fd, 1 << 20):
        *lines, data = (data + more).split(b"\n")
        for line in lines:
            record: Record = json.loads(line)
            if wanted(record):
                return record
    raise AssertionError("the log has ended")


def receive_rest(fd: int) -> None:
    while os.read(fd, 1 << 20):
        pass


def test_a_log_directory_that_is_full(host_net: lab.Net, tmp_path: Path) -> None:
    if host_net.lab.rootless:
        pytest.skip("without root a tmpfs can't be made larger")
    host_net.proxy.run("mkdir", "/run/log")
    host_net.proxy.run("mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", "/run/log")
    config = USOCKSD.replace("workers = 2", "workers = 1")
    with contextlib.ExitStack() as stack:
        daemon = stack.enter_context(
            Daemon("usocksd", config, tmp_path, logfile="/run/log/usocksd.log", popen=host_net.proxy.popen, waits=False)
        )
        daemon.log = host_net.lab.run_folder / "log" / "usocksd.log"
        daemon.ready()
        listener = stack.enter_context(host_net.outside.listen(lab.WEB_V4, backlog=1024))
        load = stack.enter_context(
            Load(tmp_path, listener, ["127.0.0.1:1080"], clients=50, socks=True, popen=host_net.proxy.popen)
        )
        drown(host_net.proxy.socket, 1080, 1082)
        load.go_on()
        load.stop()
        assert load.failures() == []
        assert daemon.records("log records dropped") == []
        host_net.proxy.run("mount", "-o", "remount,size=256m", "/run/log")
        said = daemon.record("log records dropped")
        assert "No space left" in said["error"]
        daemons.wait_until(
            lambda: (
                sum(r["count"] for r in daemon.records("log records dropped")) == dropped(host_net.proxy.socket, 1082)
            ),
            lambda: daemon.records("log records dropped"),
        )


# ---- systemd


@pytest.mark.skipif(shutil.which("systemd-socket-activate") is None, reason="systemd-socket-activate is not installed")
def test_socket_activation(host_net: lab.Net, tmp_path: Path) -> None:
    """No address is configured: each listens where systemd-socket-activate does, and tells its state."""
    places = {"usocksd": ["127.0.0.1:2080"], "transocks": ["127.0.0.1:1081", "[::1]:1081"]}
    configs = {
        "usocksd": "workers = 2\n[outgoing]\nmark = 0x7473\n",
        "transocks": 'workers = 2\nmark = 0x7473\nproxy_url = "socks5://127.0.0.1:2080"\n',
    }
    with contextlib.ExitStack() as stack:
        started: dict[str, Daemon] = {}
        managers: dict[str, Socket] = {}
        for name, listened in places.items():
            manager = managers[name] = stack.enter_context(Socket(socket.AF_UNIX, socket.SOCK_DGRAM))
            manager.settimeout(daemons.PATIENCE)
            manager.bind(str(tmp_path / f"{name}.notify"))
            words = ["systemd-socket-activate", f"--setenv=NOTIFY_SOCKET={tmp_path / name}.notify"]
            words += [f"--setenv={variable}" for variable in os.environ if variable.startswith("PYTHON")]
            words += [f"--listen={place}" for place in listened]
            started[name] = stack.enter_context(
                Daemon(name, configs[name], tmp_path, popen=host_net.proxy.popen, prefix=words, waits=False)
            )
        for name, listened in places.items():
            ports = {int(place.rpartition(":")[2]) for place in listened}
            daemons.wait_until(lambda: listening(started[name].pid) >= ports, f"{name} is listened for")
        test_redirect.load(host_net, "nft")
        load = stack.enter_context(hammered(host_net, tmp_path))  # the first one starts them
        for name, daemon in started.items():
            daemons.wait_until(
                lambda: sorted(r["address"] for r in daemon.records("listening")) == places[name],
                daemon.lines,
            )
            first = sd_messages(managers[name], "READY=1")
            assert any(line.startswith("STATUS=ready: generation 1") for line in first), first
            reload(daemon, tmp_path, configs[name])
            again = sd_messages(managers[name], "READY=1")
            assert "RELOADING=1" in again
            assert any(line.startswith("MONOTONIC_USEC=") for line in again)
            assert any(line.startswith("STATUS=ready: generation 2") for line in again), again
            wait_for_workers(daemon, 2)
        load.go_on()
        load.stop()
        assert load.failures() == []
        for name, daemon in started.items():
            daemon.process.terminate()
            assert "STOPPING=1" in sd_messages(managers[name], "STOPPING=1")
            assert daemon.process.wait(daemons.PATIENCE) == 0
