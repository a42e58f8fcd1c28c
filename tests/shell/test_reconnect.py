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
from iohang_fuse.reconnect import Reconnect, is_deaf, is_heard, server_of
from iohang_fuse.sockdiag import ESTABLISHED, SYN_SENT, Connection

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from iohang_fuse.requests import Requests

LOOPBACK = ip_address("127.0.0.1")


def connection(
    state: int = ESTABLISHED,
    retransmits: int = 0,
    silence_s: float = 0.1,
    waiting: int = 0,
    acked: int = 1000,
    name: str = "",
) -> Connection:
    return Connection(socket.AF_INET, state, retransmits, silence_s, waiting, acked, name.encode())


HEARD = connection()
IDLE = connection(silence_s=60)
LATE = connection(retransmits=2, silence_s=1.5, waiting=100, name="late")
DEAF = connection(retransmits=4, silence_s=3.1, waiting=100, name="deaf")


# ---- the kernel's own sockets


def test_a_connection_that_lives_is_found_and_closed() -> None:
    """Only that to this server's port; and closed, both ends know."""
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_server(("127.0.0.1", 0)) as another:
        client, other = (socket.create_connection(each.getsockname()) for each in (server, another))
        (found,) = sockdiag.connections(LOOPBACK, server.getsockname()[1])
        assert (found.state, found.retransmits, found.waiting_bytes) == (ESTABLISHED, 0, 0)
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
    print("closed after", found.retransmits, found.waiting_bytes)
"""


def test_a_connection_that_is_cut_off_gets_deaf_and_is_closed() -> None:
    """In a network of its own, whose only link goes down with a byte under way."""
    done = subprocess.run(
        ["unshare", "--net", sys.executable, "-c", CUT_OFF], capture_output=True, text=True, timeout=120, check=False
    )
    retransmits, waiting = done.stdout.removeprefix("closed after ").split()
    assert int(retransmits) >= 4, done.stdout + done.stderr
    assert int(waiting) == len("into the void"), done.stdout


# ---- which, and when


@pytest.mark.parametrize(
    ("one", "deaf", "heard"),
    [
        (HEARD, False, True),
        (IDLE, False, False),
        (LATE, False, False),
        (DEAF, True, False),
        # Nothing was sent for long, and then something was lost; on a link whose retransmissions come quickly.
        (connection(retransmits=1, silence_s=60), False, False),
        (connection(retransmits=6, silence_s=0.8), False, False),
        (connection(SYN_SENT), False, False),
        (connection(SYN_SENT, retransmits=1), False, False),  # a round trip may take more than a second
        (connection(SYN_SENT, retransmits=2), True, False),
    ],
)
def test_what_is_deaf(one: Connection, deaf: bool, heard: bool) -> None:  # noqa: FBT001 - a table's columns
    """A slow link's connection is left alone, one that has lost a packet, and one that was silent because it had nothing to say."""
    assert is_deaf(one) is deaf
    assert is_heard(one) is heard


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
        self.thens: list[list[Connection]] = []  # at the next looks
        self.server = (ip_address("10.0.0.1"), 2049)
        self.closed: list[bytes] = []
        self.retried = 0
        self.looks = 0
        self.sick = True
        self.problem: OSError | None = None
        self._where = str(tmp_path)
        monkeypatch.setattr(presence, "mount_table", self._mounts)
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
        assert (server, port) == self.server
        self.looks += 1
        if self.problem is not None:
            raise self.problem
        found = self.connections
        if self.thens:
            self.connections = self.thens.pop(0)
        return found

    def _mounts(self) -> list[Mounted]:
        address, port = self.server
        options = ("proto=tcp", f"addr={address}", f"port={port}")
        return [Mounted("/", 2, "ext4", "/dev/sda1"), Mounted(self._where, 1, "nfs4", "nas:/vm", options)]


async def until(condition: Callable[[], bool]) -> None:
    with trio.fail_after(20):
        while not condition():  # noqa: ASYNC110 - it changes in a thread
            await trio.sleep(0.001)


async def test_what_is_held_is_tried_when_the_server_is_heard_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once; and what is deaf until then is closed, and nothing else."""
    world = World(tmp_path, monkeypatch)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(world.reconnect.serve)
        await until(lambda: world.looks > 2)
        assert (world.closed, world.retried) == ([], 0), "all is heard: what is sick is so for another reason"
        world.connections = [DEAF, LATE, IDLE]
        await until(lambda: b"deaf" in world.closed)
        assert set(world.closed) == {b"deaf"}
        world.connections = [IDLE]
        looks = world.looks
        await until(lambda: world.looks > looks + 2)
        assert world.retried == 0, "nothing was heard"
        world.connections = [HEARD, IDLE]
        await until(lambda: world.retried > 0)
        looks = world.looks
        await until(lambda: world.looks > looks + 2)
        assert world.retried == 1
        nursery.cancel_scope.cancel()


async def test_a_server_that_has_refused_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel's client waits for 3 s after a refusal; so the server is asked whether it is there."""
    world = World(tmp_path, monkeypatch)
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))  # and does not listen
        world.server = (LOOPBACK, server.getsockname()[1])
        world.connections = []
        async with trio.open_nursery() as nursery:
            nursery.start_soon(world.reconnect.serve)
            await until(lambda: world.looks > 5)
            assert world.retried == 0
            server.listen()
            await until(lambda: world.retried > 0)
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


def test_an_operator_does_not_wait_for_a_retransmission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`iohangctl retry`: what was sent once more without an answer is closed, however short that is ago."""
    world = World(tmp_path, monkeypatch)
    world.connections = [HEARD, IDLE, LATE]
    world.reconnect.hasten()
    assert world.closed == [b"late"]


# ---- before what must not be overtaken (P4, P5)


def test_what_waits_behind_a_retransmission_is_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What has failed may wait in another connection than the one that has answered; it goes with it."""
    world = World(tmp_path, monkeypatch)
    world.connections = [HEARD, LATE, connection(waiting=0, name="idle")]
    world.reconnect.settle(0)
    assert world.closed == [b"late"]


def test_what_has_been_sent_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A connection that works, and has something newer in it by now, is not closed; one whose queue does not move is."""
    world = World(tmp_path, monkeypatch)
    world.connections = [
        connection(waiting=500, acked=1000, name="busy"),
        connection(waiting=500, acked=77, name="stuck"),
    ]
    world.thens = [[connection(waiting=800, acked=1500, name="busy"), connection(waiting=500, acked=77, name="stuck")]]
    world.reconnect.settle(0)
    assert world.closed == [b"stuck"]


def test_only_what_is_sent_again_is_closed_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another one that has something in it gets rid of that by itself; and it is waited for, also when it is the last one."""
    world = World(tmp_path, monkeypatch)
    busy = connection(waiting=500, acked=1000, name="busy")
    world.connections = [LATE, busy]
    world.thens = [[LATE, busy], [busy], [connection(waiting=0, acked=1500, name="busy")]]
    world.reconnect.settle(0)
    assert world.closed == [b"late"]
    assert world.looks == 4


def test_one_connection_keeps_the_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Others may use it, too: it is not closed for nothing."""
    world = World(tmp_path, monkeypatch)
    world.connections = [LATE]
    world.reconnect.settle(0)
    assert world.closed == []


def test_a_thousand_settle_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who has failed before the latest one began has nothing left to settle."""
    world = World(tmp_path, monkeypatch)
    world.reconnect.settle(0)
    looks = world.looks
    for _ in range(1000):
        world.reconnect.settle(60)
    assert world.looks == looks
    world.reconnect.settle(0)
    assert world.looks > looks


# ---- where it cannot be done


async def test_who_may_not_says_so_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Without CAP_NET_ADMIN, or on a kernel that cannot: one line, and the mount goes on without."""
    world = World(tmp_path, monkeypatch)
    world.problem = PermissionError(errno.EPERM, "Operation not permitted")
    with trio.fail_after(20):
        await world.reconnect.serve()
    world.reconnect.settle(0)
    world.reconnect.hasten()
    (line,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert "EPERM (Operation not permitted)" in line
    assert "CAP_NET_ADMIN" in line


async def test_what_passes_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """No descriptor left, or no answer in time, is no reason to do without for ever; nor does it end the server."""
    world = World(tmp_path, monkeypatch)
    world.connections = [DEAF]
    async with trio.open_nursery() as nursery:
        nursery.start_soon(world.reconnect.serve)
        for problem in (OSError(errno.EMFILE, "Too many open files"), TimeoutError("timed out")):
            world.problem, looks = problem, world.looks
            await until(lambda looks=looks: world.looks > looks + 2)
            world.reconnect.settle(0)
            world.reconnect.hasten()
        world.problem, world.closed = None, []
        await until(lambda: world.closed != [])
        nursery.cancel_scope.cancel()
    assert not [record for record in caplog.records if record.levelname == "WARNING"]


async def test_a_mount_of_another_network_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Its connections are not seen here, and the log says so once."""
    world = World(tmp_path, monkeypatch)
    world.connections = []
    world.server = (LOOPBACK, 1)  # nobody is there
    async with trio.open_nursery() as nursery:
        nursery.start_soon(world.reconnect.serve)
        await until(lambda: world.looks > 25)
        nursery.cancel_scope.cancel()
    (line,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert "another network namespace" in line
