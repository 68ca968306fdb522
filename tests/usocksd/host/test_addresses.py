from __future__ import annotations

import errno
import logging
import os
import resource
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from ipaddress import IPv4Address, IPv6Address, ip_address
from pathlib import Path

import pytest
import trio
from trio.testing import MockClock

from usocksd.host.addresses import HostAddresses
from usocksd.host.sockets import SocketOwners
from usocksd.log.metrics import Metrics
from usocksd.net.address import IPAddress


def test_the_snapshot_has_loopback_and_all_of_it_is_local() -> None:
    addresses = HostAddresses()
    assert IPv4Address("127.0.0.1") in addresses.current
    for text in ("127.0.0.1", "127.9.9.9", "::1", "::ffff:127.0.0.1"):
        assert addresses.is_local(ip_address(text))
    assert not addresses.is_local(IPv4Address("203.0.113.1"))
    assert not addresses.is_local(IPv6Address("2001:db8::1"))


# --- the watch, in a network namespace of its own ---


def in_namespace(command: list[str]) -> list[str] | None:
    """The command to run this in a new network namespace; None where that is not permitted."""
    if shutil.which("unshare") is None or shutil.which("ip") is None:
        return None
    for options in ("-n", "-Urn"):
        if subprocess.run(["unshare", options, "ip", "link"], capture_output=True, check=False).returncode == 0:
            return ["unshare", options, *command]
    return None


@pytest.mark.parametrize("scenario", ["comes_and_goes", "overrun", "point_to_point", "no_descriptors", "routed_here"])
def test_addresses_come_and_go(scenario: str) -> None:
    command = in_namespace([sys.executable, __file__, scenario])
    if command is None:
        pytest.skip("needs unshare and ip, and root or user namespaces")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (Path.cwd(), *sys.path)))}
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60, env=environment)
    assert result.returncode == 0, result.stderr
    assert result.stdout == "done\n"


async def ip(*arguments: str) -> None:
    await trio.run_process(["ip", *arguments])


class Changes(logging.Handler):
    """Lets the scenario wait for the record that tells of a change instead of some time."""

    def __init__(self, addresses: HostAddresses) -> None:
        super().__init__()
        self._addresses = addresses
        self._changed = trio.Event()
        self.heard: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.heard.append(record.getMessage())
        self._changed.set()

    async def until(self, condition: Callable[[frozenset[IPAddress]], bool]) -> None:
        with trio.fail_after(10):
            while not condition(self._addresses.current):
                self._changed = trio.Event()
                await self._changed.wait()


async def comes_and_goes(addresses: HostAddresses, changes: Changes) -> None:
    four, six = IPv4Address("198.51.100.7"), IPv6Address("2001:db8::7")
    await ip("link", "add", "d0", "type", "veth", "peer", "name", "d1")
    await ip("link", "set", "d0", "up")
    await ip("link", "set", "d1", "up")
    await ip("addr", "add", "198.51.100.7/24", "dev", "d0")
    await changes.until(lambda now: four in now)
    assert addresses.is_local(four)
    await ip("addr", "add", "2001:db8::7/64", "dev", "d0")  # tentative at first, counted when it is usable
    await changes.until(lambda now: six in now)
    with socket.socket(socket.AF_INET6) as sock:
        sock.bind((str(six), 0))
    # the same address on another interface: it stays until the last interface has lost it
    await ip("addr", "add", "198.51.100.7/32", "dev", "d1")
    await ip("addr", "del", "198.51.100.7/24", "dev", "d0")
    await ip("addr", "add", "198.51.100.8/24", "dev", "d0")
    await changes.until(lambda now: IPv4Address("198.51.100.8") in now)
    assert four in addresses.current
    unchanged = addresses.current
    await ip("addr", "del", "198.51.100.7/32", "dev", "d1")
    await changes.until(lambda now: four not in now)
    assert unchanged - addresses.current == {four}
    await ip("link", "del", "d0")
    await changes.until(lambda now: six not in now and IPv4Address("198.51.100.8") not in now)


async def overrun(addresses: HostAddresses, changes: Changes) -> None:
    many_changes_at_once()
    await changes.until(lambda now: len(now) >= 2999)
    assert IPv4Address("10.0.0.1") not in addresses.current
    assert IPv4Address("10.11.183.1") in addresses.current


def many_changes_at_once() -> None:
    """More events than the socket's buffer holds, while nothing reads it: ENOBUFS, and a new dump."""
    subprocess.run(["ip", "link", "add", "d0", "type", "bridge"], check=True)
    batch = "".join(f"addr add 10.{n >> 8}.{n & 255}.1/32 dev d0\n" for n in range(3000))
    subprocess.run(["ip", "-batch", "-"], input=batch, text=True, check=True)
    subprocess.run(["ip", "addr", "del", "10.0.0.1/32", "dev", "d0"], check=True)


async def point_to_point(addresses: HostAddresses, changes: Changes) -> None:
    await ip("link", "add", "d0", "type", "bridge")
    await ip("addr", "add", "192.0.2.1", "peer", "192.0.2.2", "dev", "d0")
    await changes.until(lambda now: IPv4Address("192.0.2.1") in now)
    assert not addresses.is_local(IPv4Address("192.0.2.2"))


# --- owners of sockets ---


@pytest.mark.parametrize(("family", "host"), [(socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")])
def test_the_owner_of_a_connected_socket(family: socket.AddressFamily, host: str) -> None:
    owners = SocketOwners()
    with socket.create_server((host, 0), family=family) as listener:
        there = listener.getsockname()[:2]
        with socket.create_connection(there) as client:
            here = client.getsockname()[:2]
            assert owners.owner_uid(here, there) == os.geteuid()
            with listener.accept()[0]:
                assert owners.owner_uid(there, here) == os.geteuid()
            # no such socket; the kernel answers with the listener when only the local end fits
            assert owners.owner_uid((host, 1), there) is None
            assert owners.owner_uid(there, (host, 1)) is None
        assert owners.owner_uid(here, there) is None  # TIME_WAIT or gone: nobody's
    owners.close()


@pytest.mark.parametrize(("family", "host"), [(socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")])
def test_the_owner_of_a_udp_socket(family: socket.AddressFamily, host: str) -> None:
    owners = SocketOwners(udp=True)
    there = (host, 9)
    with socket.socket(family, socket.SOCK_DGRAM) as client:
        client.bind((host, 0))
        here = client.getsockname()[:2]
        assert owners.owner_uid(here, there) == os.geteuid()
        client.connect(there)
        assert owners.owner_uid(here, there) == os.geteuid()
        # Its other end is elsewhere, so these datagrams are not its own.
        assert owners.owner_uid(here, (host, 10)) is None
    assert owners.owner_uid(here, there) is None
    with socket.socket(family, socket.SOCK_DGRAM) as client:  # as resolvers do
        client.sendto(b"", there)
        assert owners.owner_uid((host, client.getsockname()[1]), there) == os.geteuid()
    owners.close()


def test_an_ipv4_client_on_an_ipv6_socket_is_found() -> None:
    owners = SocketOwners()
    with socket.create_server(("127.0.0.1", 0)) as listener, socket.socket(socket.AF_INET6) as client:
        client.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        client.connect(("::ffff:127.0.0.1", listener.getsockname()[1]))
        here = ("127.0.0.1", client.getsockname()[1])
        assert owners.owner_uid(here, listener.getsockname()) == os.geteuid()
    owners.close()


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root: a socket of another user, and one bound to a device")
def test_another_users_socket_and_one_bound_to_a_device() -> None:
    owners = SocketOwners()
    program = (
        "import socket, sys; s = socket.create_connection(('127.0.0.1', int(sys.argv[1])))\n"
        "print(s.getsockname()[1], flush=True); sys.stdin.read()"
    )
    with socket.create_server(("127.0.0.1", 0)) as listener:
        there = listener.getsockname()
        with subprocess.Popen(
            ["/usr/bin/env", "python3", "-c", program, str(there[1])],
            user=12345,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        ) as other:
            assert other.stdout is not None
            assert owners.owner_uid(("127.0.0.1", int(other.stdout.readline())), there) == 12345
        with socket.socket() as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b"lo\0")
            client.connect(there)
            assert owners.owner_uid(client.getsockname(), there) == 0
    owners.close()


@pytest.mark.parametrize("code", [errno.EAFNOSUPPORT, errno.EMFILE])
async def test_while_they_cannot_be_watched_the_addresses_stay(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, autojump_clock: MockClock, code: int
) -> None:
    """From the start, or later: then it is tried again."""
    caplog.set_level(logging.INFO)
    metrics = Metrics("test")
    addresses = HostAddresses(metrics)
    snapshot = addresses.current

    def refused(family: int) -> socket.socket:
        raise OSError(code, os.strerror(code))

    def watched() -> bool:
        return bool(metrics.snapshot()["test_addresses_watched"]["values"][0][1][0])

    async with trio.open_nursery() as nursery:
        with monkeypatch.context() as patch:
            patch.setattr("usocksd.host.addresses.connect", refused)
            await nursery.start(addresses.watch)
            await trio.sleep(300)
            assert addresses.current is snapshot
            assert not watched()
        await trio.sleep(31)
        assert watched()
        nursery.cancel_scope.cancel()
    first, again = (record.message for record in caplog.records if "watched" in record.message)
    assert "not watched" in first
    assert "again" in again


async def routed_here(addresses: HostAddresses, changes: Changes) -> None:
    """No interface has them, but they belong to this host."""
    four, six = IPv4Address("198.51.100.3"), IPv6Address("2001:db8:9::1234")
    await ip("link", "set", "lo", "up")
    await ip("route", "add", "local", "198.51.100.0/28", "dev", "lo")
    await ip("route", "add", "local", "2001:db8:9::/64", "dev", "lo")
    # (As for TPROXY: such a table makes no address ours.)
    await ip("route", "add", "local", "default", "dev", "lo", "table", "100")
    await changes.until(lambda now: four in now and six in now)
    for address in (four, six):
        assert addresses.is_local(address)
        with socket.socket(socket.AF_INET if address.version == 4 else socket.AF_INET6) as sock:
            if address.version == 6:
                sock.setsockopt(socket.IPPROTO_IPV6, 78, 1)  # IPV6_FREEBIND
            sock.bind((str(address), 0))
    assert IPv4Address("198.51.100.16") not in addresses.current
    assert HostAddresses().current.networks == addresses.current.networks
    await ip("route", "del", "local", "198.51.100.0/28", "dev", "lo")
    await changes.until(lambda now: four not in now)
    assert six in addresses.current


async def no_descriptors(addresses: HostAddresses, changes: Changes) -> None:
    """No descriptor is left when the addresses must be dumped again; later there are some."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    many_changes_at_once()
    resource.setrlimit(resource.RLIMIT_NOFILE, (1, hard))
    changes.heard.clear()
    while "addresses of this host are not watched: the last known ones stay in use" not in changes.heard:
        await trio.sleep(0.01)
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    await changes.until(lambda now: len(now) >= 2999)


SCENARIOS = {
    "comes_and_goes": comes_and_goes,
    "overrun": overrun,
    "point_to_point": point_to_point,
    "no_descriptors": no_descriptors,
    "routed_here": routed_here,
}


async def main(scenario: str) -> None:
    addresses = HostAddresses(look_every=0.05)
    changes = Changes(addresses)
    logger = logging.getLogger("usocksd.host.addresses")
    logger.setLevel(logging.INFO)
    logger.addHandler(changes)
    async with trio.open_nursery() as nursery:
        await nursery.start(addresses.watch)
        await SCENARIOS[scenario](addresses, changes)
        nursery.cancel_scope.cancel()
    print("done")


if __name__ == "__main__":
    trio.run(main, sys.argv[1])
