"""Connections that hear nothing any more: which are closed, on the kernel's own sockets, and what follows when they hear again."""

from __future__ import annotations

import errno
import os
import socket
import subprocess
import sys
from ipaddress import ip_address
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import pytest
import trio

from iohang_fuse import presence, reconnect, sockdiag
from iohang_fuse.mounttable import Mounted
from iohang_fuse.reconnect import Reconnect, hears, is_deaf, server_of
from iohang_fuse.sockdiag import ESTABLISHED, SYN_SENT, Connection

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from iohang_fuse.requests import Requests

LOOPBACK = ip_address("127.0.0.1")
HEARD = Connection(socket.AF_INET, ESTABLISHED, 0, b"")
LATE = Connection(socket.AF_INET, ESTABLISHED, 2, b"late")
DEAF = Connection(socket.AF_INET, ESTABLISHED, 5, b"deaf")
CALLING = Connection(socket.AF_INET, SYN_SENT, 0, b"")
CALLING_LONG = Connection(socket.AF_INET, SYN_SENT, 1, b"calling")


# ---- the kernel's own sockets


def test_a_connection_that_lives_is_found_and_closed() -> None:
    """Only that to this server's port; and closed, both ends know."""
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_server(("127.0.0.1", 0)) as another:
        client, other = (socket.create_connection(each.getsockname()) for each in (server, another))
        (found,) = sockdiag.connections(LOOPBACK, server.getsockname()[1])
        assert (found.state, found.lost) == (ESTABLISHED, 0)
        assert not is_deaf(found)
        assert sockdiag.connections(ip_address("127.0.0.9"), server.getsockname()[1]) == []
        sockdiag.close(found)
        with pytest.raises(OSError, match=os.strerror(errno.ECONNABORTED)):
            client.recv(1)
        sockdiag.close(found)  # that it is gone already is no error
        other.settimeout(0.2)
        with pytest.raises(TimeoutError):
            other.recv(1)
        client.close()
        other.close()


def test_ipv6() -> None:
    """The same for a server at an address of IPv6."""
    with socket.create_server(("::1", 0), family=socket.AF_INET6) as server:
        client = socket.create_connection(server.getsockname()[:2])
        (found,) = sockdiag.connections(ip_address("::1"), server.getsockname()[1])
        sockdiag.close(found)
        with pytest.raises(OSError, match=os.strerror(errno.ECONNABORTED)):
            client.recv(1)
        client.close()


CUT_OFF = """
import errno, socket, subprocess, sys, time
from ipaddress import ip_address
from iohang_fuse import sockdiag
from iohang_fuse.reconnect import is_deaf

def link(state):
    subprocess.run(["ip", "link", "set", "lo", state], check=True)

link("up")
server = socket.create_server(("127.0.0.1", 0))
client = socket.create_connection(server.getsockname())
link("down")
client.send(b"into the void")
deadline_s = time.monotonic() + 60
while not is_deaf(found := sockdiag.connections(ip_address("127.0.0.1"), server.getsockname()[1])[0]):
    if time.monotonic() > deadline_s:
        sys.exit(f"not deaf within 60 s: {found}")
    time.sleep(0.1)
sockdiag.close(found)
try:
    client.recv(1)
except OSError as error:
    assert error.errno == errno.ECONNABORTED, error
    print("closed after", found.lost)
"""


def test_a_connection_that_is_cut_off_gets_deaf_and_is_closed() -> None:
    """In a network of its own, whose only link goes down with a byte under way."""
    done = subprocess.run(
        ["unshare", "--net", sys.executable, "-c", CUT_OFF], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.stdout.startswith("closed after 4"), done.stdout + done.stderr


# ---- which, and when


@pytest.mark.parametrize(
    ("connection", "deaf", "heard"),
    [
        (HEARD, False, True),
        (LATE, False, False),
        (DEAF, True, False),
        (CALLING, False, False),
        (CALLING_LONG, True, False),
    ],
)
def test_what_is_deaf(connection: Connection, deaf: bool, heard: bool) -> None:  # noqa: FBT001 - a table's columns
    """A slow link's, and one's that loses a packet, is left alone."""
    assert is_deaf(connection) is deaf
    assert hears([connection]) is heard
    assert not hears([])


@pytest.mark.parametrize(
    ("fstype", "options", "server"),
    [
        ("nfs", "rw,vers=3,proto=tcp,addr=10.0.0.1", ("10.0.0.1", 2049)),
        ("nfs4", "rw,vers=4.2,proto=tcp6,port=20490,addr=fd00::1", ("fd00::1", 20490)),
        ("nfs4", "rw,vers=4.2,proto=tcp6,addr=fe80::1%eth0", ("fe80::1", 2049)),
        ("nfs", "rw,vers=3,proto=udp,addr=10.0.0.1", None),
        ("nfs4", "rw,vers=4.2,proto=rdma,port=20049,addr=10.0.0.1", None),
        ("nfs4", "rw,vers=4.2,proto=tcp", None),
        ("nfs4", "rw,proto=tcp,addr=nas", None),
        ("ext4", "rw,addr=10.0.0.1", None),
    ],
)
def test_whose_server(fstype: str, options: str, server: tuple[str, int] | None) -> None:
    """From /proc/self/mountinfo, as the kernel writes it (nfs_show_mount_options)."""
    expected = None if server is None else (ip_address(server[0]), server[1])
    assert server_of(fstype, options.split(",")) == expected


class World:
    """A SOURCE on NFS with one image, whose connections are what the test says."""

    def __init__(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.connections: list[Connection] = [HEARD]
        self.closed: list[bytes] = []
        self.retried = 0
        self.looks = 0
        self.sick = True
        self.problem: OSError | None = None
        mounted = Mounted(str(tmp_path), 1, "nfs4", "nas:/vm", ("proto=tcp", "addr=10.0.0.1"))
        monkeypatch.setattr(presence, "mount_table", lambda: [Mounted("/", 2, "ext4", "/dev/sda1"), mounted])
        monkeypatch.setattr(sockdiag, "connections", self._connections)
        monkeypatch.setattr(sockdiag, "close", lambda connection: self.closed.append(connection.identity))
        monkeypatch.setattr(reconnect, "LOOK_S", 0.001)
        self.reconnect = Reconnect(cast("Requests", self), str(tmp_path))

    @property
    def images(self) -> dict[int, Any]:
        return {1: SimpleNamespace(held=SimpleNamespace(sick=self.sick))}

    def retry(self, _image: object) -> None:
        self.retried += 1

    def _connections(self, server: object, port: int) -> list[Connection]:
        assert (server, port) == (ip_address("10.0.0.1"), 2049)
        self.looks += 1
        if self.problem is not None:
            raise self.problem
        return self.connections


async def until(condition: Callable[[], bool]) -> None:
    with trio.fail_after(20):
        while not condition():  # noqa: ASYNC110 - it changes in a thread
            await trio.sleep(0.001)


async def test_what_is_held_is_tried_when_the_server_is_heard_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once; and what is deaf until then is closed."""
    world = World(tmp_path, monkeypatch)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(world.reconnect.serve)
        await until(lambda: world.looks > 2)
        assert (world.closed, world.retried) == ([], 0), "all is heard: what is sick is so for another reason"
        world.connections = [DEAF, LATE]
        await until(lambda: b"deaf" in world.closed)
        assert set(world.closed) == {b"deaf"}
        assert world.retried == 0
        world.connections = [HEARD]
        await until(lambda: world.retried > 0)
        looks = world.looks
        await until(lambda: world.looks > looks + 2)
        assert world.retried == 1
        nursery.cancel_scope.cancel()


async def test_nobody_looks_while_all_is_well(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A healthy mount costs nothing, and no connection of it is ever closed."""
    world = World(tmp_path, monkeypatch)
    world.sick = False
    world.connections = [DEAF]
    async with trio.open_nursery() as nursery:
        nursery.start_soon(world.reconnect.serve)
        await trio.sleep(0.05)
        assert world.looks == 0
        world.sick = True
        await until(lambda: world.closed != [])
        nursery.cancel_scope.cancel()


def test_before_what_must_not_be_overtaken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """P5: what was given up may wait in another connection than the one that has answered; it goes with it."""
    world = World(tmp_path, monkeypatch)
    world.connections = [HEARD, LATE, CALLING]
    world.reconnect.close_what_waits()
    assert world.closed == [b"late"]


async def test_who_may_not_says_so_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Without CAP_NET_ADMIN, or on a kernel that cannot: one line, and the mount goes on without."""
    world = World(tmp_path, monkeypatch)
    world.problem = PermissionError(errno.EPERM, "Operation not permitted")
    with trio.fail_after(20):
        await world.reconnect.serve()
    (line,) = [record.getMessage() for record in caplog.records]
    assert "EPERM (Operation not permitted)" in line
    assert "CAP_NET_ADMIN" in line
