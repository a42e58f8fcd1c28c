"""Who gets a monitor's name: real sockets in a real directory, servers as threads and as processes."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import subprocess
import sys
import threading
from typing import TYPE_CHECKING

import pytest

from iohang_fuse import socketname
from tests.harness import wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "mnt.sock"


def claim(path: Path, lost: str = "") -> socket.socket:
    return socketname.claim(path, lambda served: served == lost, lambda sock: sock.listen(64))


def leave_behind(path: Path) -> None:
    """What a killed server leaves."""
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))


def test_a_dead_name_is_replaced_and_a_living_one_is_not(path: Path) -> None:
    """A stale socket is no reason not to mount; somebody else's is."""
    leave_behind(path)
    with claim(path):
        with pytest.raises(OSError, match=os.strerror(errno.EADDRINUSE)):
            claim(path)
        assert socketname.is_alive(path)


def test_what_is_no_socket_is_left_alone(path: Path) -> None:
    """Whatever it is, it is not ours."""
    path.write_text("precious")
    with pytest.raises(FileExistsError):
        claim(path)
    assert path.read_text() == "precious"


def test_a_name_that_cannot_be_prepared_is_not_left(path: Path) -> None:
    """No socket is left where the group does not exist, and the like."""

    def fails(_socket: socket.socket) -> None:
        raise PermissionError

    with pytest.raises(PermissionError):
        socketname.claim(path, lambda _served: False, fails)
    assert not path.exists()


@pytest.mark.parametrize("stale", [True, False])
def test_of_many_that_start_in_the_same_moment_one_gets_it(
    path: Path, monkeypatch: pytest.MonkeyPatch, *, stale: bool
) -> None:
    """Who looks for a dead server must not take one for dead that has its name and does not listen yet."""
    monkeypatch.setattr(socketname, "_ASK_S", 0.001)
    interval_s = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for _ in range(50):
            if stale:
                leave_behind(path)
            won = race(path)
            assert len(won) == 1, "one, and all others know that it is taken"
            with won[0] as winner, socket.socket(socket.AF_UNIX) as client:
                client.settimeout(20)
                client.connect(str(path))
                winner.accept()[0].close()  # and it has the name
            path.unlink()
    finally:
        sys.setswitchinterval(interval_s)


def race(path: Path) -> list[socket.socket]:
    won: list[socket.socket] = []
    start = threading.Barrier(6)

    def one() -> None:
        start.wait()
        try:
            won.append(claim(path))
        except OSError as error:
            assert error.errno == errno.EADDRINUSE  # noqa: PT017 - in a thread; a wrong one makes the count wrong, too

    threads = [threading.Thread(target=one) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    return won


def test_nobody_else_can_lock_it(path: Path) -> None:
    """Whoever can open a file can lock it; /run/iohang is for all to read, its lock is not."""
    claim(path).close()
    assert (path.parent / socketname.LOCK).stat().st_mode & 0o777 == 0o600
    fd = os.open(path.parent, os.O_RDONLY)
    fcntl.flock(fd, fcntl.LOCK_EX)
    claim(path.with_name("other.sock")).close()
    os.close(fd)


def test_a_lock_that_is_held_does_not_keep_a_mount_for_ever(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """P8: every wait ends."""
    monkeypatch.setattr(socketname, "_LOCK_S", 0.2)
    fd = os.open(path.parent / socketname.LOCK, os.O_WRONLY | os.O_CREAT, 0o600)
    fcntl.flock(fd, fcntl.LOCK_EX)
    with pytest.raises(OSError, match="has been locked by another process"):
        claim(path)
    os.close(fd)
    claim(path).close()


SERVER = """
import sys, trio
from pathlib import Path
from types import SimpleNamespace
from iohang_fuse.monitor import Monitor

class Commands:
    def call(self, name, arguments):
        return {"mountpoint": sys.argv[2]}

monitor = Monitor(Path(sys.argv[1]), Commands(), (0, 0, 0))
monitor.bind(None)
print("ready", flush=True)

async def main():
    async with trio.open_nursery() as nursery:
        nursery.start_soon(monitor.serve)
        await trio.to_thread.run_sync(sys.stdin.read, abandon_on_cancel=True)
        nursery.cancel_scope.cancel()

trio.run(main)
"""


@pytest.fixture
def old(path: Path) -> Iterator[subprocess.Popen[str]]:
    """A real monitor, of /mnt, in a process of its own."""
    command = [sys.executable, "-c", SERVER, str(path), "/mnt"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        yield process
        process.kill()


def test_a_detached_mount_s_name_goes_to_the_next_one(path: Path, old: subprocess.Popen[str]) -> None:
    """Module: "The next mount at that place is who is meant by the name; the old server is found beside it"."""
    beside = path.with_name(f"mnt.{old.pid}.sock")
    with pytest.raises(OSError, match=os.strerror(errno.EADDRINUSE)):
        claim(path, lost="/mnt/other")
    with claim(path, lost="/mnt"):
        assert socketname._asked(beside) == ("/mnt", old.pid)
        assert old.stdin is not None
        old.stdin.close()
        wait_until(lambda: old.poll() is not None, what="the old server's end")
        assert not beside.exists(), "it takes its name away"
        assert path.exists(), "and leaves the new server's"


def test_a_killed_one_s_second_name_goes_with_the_next_claim(path: Path, old: subprocess.Popen[str]) -> None:
    """No socket is left for ever."""
    beside = path.with_name(f"mnt.{old.pid}.sock")
    other = path.with_name("mnt.other.sock")
    with claim(other):
        claim(path, lost="/mnt").close()
        old.kill()
        old.wait()
        assert beside.exists()
        with claim(path, lost="/mnt"):
            assert not beside.exists()
            assert other.exists(), "which is a living one's"


def test_one_that_does_not_answer_keeps_its_name(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who says nothing may be stuck, and serve all the same."""
    monkeypatch.setattr(socketname, "_ASK_S", 0.2)
    with claim(path), pytest.raises(OSError, match=os.strerror(errno.EADDRINUSE)):
        socketname.claim(path, lambda _served: True, lambda sock: sock.listen(1))
