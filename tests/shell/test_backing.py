"""`engine.Backing` on real files: whole answers (P6), and writes whose result is final (P3)."""

from __future__ import annotations

import errno
import os
import stat
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from iohang_fuse import engine
from iohang_fuse.engine import Backing
from iohang_fuse.source import SERVER, Caller

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

DSYNC = os.O_RDWR | os.O_DSYNC | os.O_CLOEXEC
NOBODY = Caller(65534, 65534, os.getpid())
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can act as another user")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(range(256)) * 16)
    return path


@pytest.fixture
def opened(file: Path) -> Iterator[Callable[..., Backing]]:
    backings = []

    def open_it(spare_flags: int | None = None, opener: Caller = SERVER) -> Backing:
        backing = Backing(os.open(file, os.O_RDWR | os.O_CLOEXEC), spare_flags, opener)
        backings.append(backing)
        return backing

    before = open_files()
    yield open_it
    for backing in backings:
        backing.close()
    assert open_files() == before, "descriptors leak"


def open_files() -> set[str]:
    """What this process has open, apart from the listing itself."""
    found = set()
    for name in os.listdir("/proc/self/fd"):
        try:
            found.add(f"{name} {os.readlink(f'/proc/self/fd/{name}')}")
        except OSError:
            continue
    return {line for line in found if "/proc/" not in line and "anon_inode" not in line}


def short(call: Callable[..., object], most: int) -> Callable[..., object]:
    """*call* (pread or pwrite) with at most *most* bytes at a time."""
    if call is os.pread:
        return lambda fd, size, offset: call(fd, min(size, most), offset)
    return lambda fd, data, offset: call(fd, bytes(data)[:most], offset)


# ---- P6: whole answers


@pytest.mark.parametrize("most", [1, 7, 100, 4095])
def test_a_short_read_is_continued(
    opened: Callable[..., Backing], file: Path, monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    """P6: a short read in the middle of a file is continued, never passed on short."""
    monkeypatch.setattr(engine.os, "pread", short(os.pread, most))
    assert opened().read(3, 1000) == file.read_bytes()[3:1003]


@pytest.mark.parametrize("most", [7, 10_000])
def test_a_read_is_short_at_the_end_of_the_file_only(
    opened: Callable[..., Backing], file: Path, monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    """P6: at the end of the file a read gives what there is; beyond it, nothing."""
    monkeypatch.setattr(engine.os, "pread", short(os.pread, most))
    backing = opened()
    assert backing.read(4000, 1000) == file.read_bytes()[4000:]
    assert backing.read(4096, 10) == b""
    assert backing.read(10**9, 10) == b""
    assert backing.read(100, 0) == b""


def test_a_read_that_fails_half_way_fails(opened: Callable[..., Backing], monkeypatch: pytest.MonkeyPatch) -> None:
    """P6: what was read before the error is no answer."""
    calls = []

    def half(_fd: int, size: int, offset: int) -> bytes:
        calls.append(offset)
        if len(calls) > 1:
            raise OSError(errno.EIO, "half way")
        return bytes(size // 2)

    monkeypatch.setattr(engine.os, "pread", half)
    with pytest.raises(OSError, match="half way"):
        opened().read(0, 100)
    assert calls == [0, 50]


@pytest.mark.parametrize("spare_flags", [None, DSYNC])
@pytest.mark.parametrize("most", [1, 7, 100])
def test_a_short_write_is_continued(
    opened: Callable[..., Backing], file: Path, monkeypatch: pytest.MonkeyPatch, most: int, spare_flags: int | None
) -> None:
    """P6: a short write is continued to the end of its data, each byte at its place."""
    monkeypatch.setattr(engine.os, "pwrite", short(os.pwrite, most))
    data = os.urandom(1000)
    before = file.read_bytes()
    assert opened(spare_flags).write(50, data) == 1000
    assert file.read_bytes() == before[:50] + data + before[1050:]


def test_an_empty_write_is_done(opened: Callable[..., Backing], file: Path) -> None:
    """P6: nothing to write is not an error, and does not grow the file."""
    assert opened().write(10_000, b"") == 0
    assert file.stat().st_size == 4096


def test_a_write_that_goes_nowhere_is_an_error(opened: Callable[..., Backing], monkeypatch: pytest.MonkeyPatch) -> None:
    """P8: a pwrite that writes nothing and reports nothing is not tried for ever, be it the first or a later one."""
    for counts in ([0], [60, 0]):
        left = [*counts]
        monkeypatch.setattr(engine.os, "pwrite", lambda _fd, _data, _offset, left=left: left.pop(0))
        with pytest.raises(OSError, match="wrote nothing") as caught:
            opened().write(0, bytes(100))
        assert caught.value.errno == errno.EIO


def test_a_write_that_failed_half_way_is_written_again_as_a_whole(
    opened: Callable[..., Backing], file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Section 4: a retry is the whole original request again."""
    backing = opened(DSYNC)
    real = os.pwrite
    offsets = []

    def flaky(fd: int, data: bytes, offset: int) -> int:
        offsets.append(offset)
        if len(offsets) == 2:
            raise OSError(errno.EIO, "half way")
        return real(fd, bytes(data)[:60], offset)

    monkeypatch.setattr(engine.os, "pwrite", flaky)
    with pytest.raises(OSError, match="half way"):
        backing.write(0, b"x" * 100)
    assert backing.write(0, b"x" * 100) == 100
    assert offsets == [0, 60, 0, 60]
    assert file.read_bytes()[:101] == b"x" * 100 + bytes([100])


def test_size_and_sync(opened: Callable[..., Backing], file: Path) -> None:
    """Truncate changes the size, both ways; sync works with and without a spare."""
    for backing in (opened(), opened(DSYNC)):
        backing.truncate(10)
        assert file.stat().st_size == 10
        backing.truncate(100)
        assert file.stat().st_size == 100
        backing.sync(data_only=True)
        backing.sync(data_only=False)


# ---- set-ID bits


@as_root
@pytest.mark.parametrize("spare_flags", [None, DSYNC])
@pytest.mark.parametrize("change", ["first write", "second write", "truncate"])
def test_set_id_bits_go_when_another_user_writes(
    opened: Callable[..., Backing], file: Path, change: str, spare_flags: int | None
) -> None:
    """A write by a user without CAP_FSETID drops set-user-ID and set-group-ID bits; FUSE leaves that to us."""
    file.chmod(0o6777)
    backing = opened(spare_flags, NOBODY)
    if change == "truncate":
        backing.truncate(5)
    else:
        backing.write(0, b"x")
    if change == "second write":
        file.chmod(0o6777)
        backing.write(0, b"x")
    assert stat.S_IMODE(file.stat().st_mode) == 0o777
    assert open_as_server(file), "the thread is the server again"


@as_root
@pytest.mark.parametrize("spare_flags", [None, DSYNC])
def test_set_id_bits_stay_when_root_writes(opened: Callable[..., Backing], file: Path, spare_flags: int | None) -> None:
    """As on SOURCE itself."""
    file.chmod(0o6777)
    opened(spare_flags).write(0, b"x")
    assert stat.S_IMODE(file.stat().st_mode) == 0o6777


def open_as_server(file: Path) -> bool:
    """Whether this thread acts as root towards file systems."""
    ids = dict(line.split(":", 1) for line in Path("/proc/thread-self/status").read_text().splitlines())
    return [ids[key].split()[3] for key in ("Uid", "Gid")] == ["0", "0"] and file.exists()


# ---- spare descriptors


class Descriptions:
    """Replaces pwrite: sees which descriptors are used at the same time, and fails where it is told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, together: int) -> None:
        self.in_use: list[int] = []
        self.used: list[int] = []
        self.shared = False
        self.failing: set[int] = set()  # by number of the call, from 0
        self._together = threading.Barrier(together) if together else None
        self._lock = threading.Lock()
        self._real = os.pwrite
        monkeypatch.setattr(engine.os, "pwrite", self._pwrite)

    def _pwrite(self, fd: int, data: bytes, offset: int) -> int:
        with self._lock:
            number = len(self.used)
            self.shared |= fd in self.in_use
            self.in_use.append(fd)
            self.used.append(fd)
        try:
            if self._together is not None:
                self._together.wait(10)
            if number in self.failing:
                raise OSError(errno.EIO, "writeback failed")
            return self._real(fd, data, offset)
        finally:
            with self._lock:
                self.in_use.remove(fd)


def test_writes_at_once_never_share_a_description(
    opened: Callable[..., Backing], file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """P3: Linux reports a failed writeback once per description: of two writes on one, the second would be told it is safe."""
    seen = Descriptions(monkeypatch, together=8)
    backing = opened(DSYNC)
    with ThreadPoolExecutor(8) as pool:
        for _ in range(5):
            assert [*pool.map(lambda n: backing.write(n * 10, b"0123456789"), range(8))] == [10] * 8
    assert not seen.shared
    assert len(set(seen.used)) == 8  # and they are used again
    assert backing.fd not in seen.used
    assert file.read_bytes()[:80] == b"0123456789" * 8


def test_after_a_failure_no_spare_is_used_again(
    opened: Callable[..., Backing], monkeypatch: pytest.MonkeyPatch
) -> None:
    """P3: each description would report that same failure once more, to a write that has done nothing wrong."""
    seen = Descriptions(monkeypatch, together=4)
    backing = opened(DSYNC)

    def write(offset: int) -> int:
        try:
            return backing.write(offset, b"x")
        except OSError:
            return -1

    with ThreadPoolExecutor(4) as pool:
        assert [*pool.map(write, range(4))] == [1] * 4
        assert len(backing._spares) == 4
        seen.failing = {5}  # one of the next four
        assert sorted(pool.map(write, range(4))) == [-1, 1, 1, 1]
    assert backing._spares == []


def test_where_nobody_may_open_the_file_again_writes_take_turns(
    opened: Callable[..., Backing], monkeypatch: pytest.MonkeyPatch
) -> None:
    """P3: a file of mode 0444, made by its writer, on a source that refuses root, has one description: one write at a time."""
    seen = Descriptions(monkeypatch, together=0)
    backing = opened(DSYNC)
    refused = []

    def refuse(*_args: object, **_more: object) -> int:
        refused.append(True)
        raise PermissionError(errno.EACCES, "root_squash")

    monkeypatch.setattr(engine.os, "open", refuse)
    with ThreadPoolExecutor(8) as pool:
        assert [*pool.map(lambda n: backing.write(n, b"x"), range(64))] == [1] * 64
    monkeypatch.undo()
    assert refused
    assert set(seen.used) == {backing.fd}
    assert not seen.shared


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENFILE])
def test_without_a_descriptor_to_be_had_writes_take_turns(
    opened: Callable[..., Backing], monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """P10: the process's limit of open files is no error of the guest's disk."""
    backing = opened(DSYNC)

    def none_left(*_args: object, **_more: object) -> int:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(engine.os, "open", none_left)
    written = backing.write(0, b"x")
    monkeypatch.undo()
    assert written == 1


def test_a_spare_that_cannot_be_opened_fails_the_write(
    opened: Callable[..., Backing], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error of the storage is the attempt's error: transient or not, that is decided elsewhere."""
    backing = opened(DSYNC)

    def stale(*_args: object, **_more: object) -> int:
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    monkeypatch.setattr(engine.os, "open", stale)
    with pytest.raises(OSError, match="Stale"):
        backing.write(0, b"x")
    monkeypatch.undo()


def test_every_spare_is_closed_though_closing_one_fails(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """P10: close(2) may report an error of the storage (NFS); the descriptor is gone, and the others must go too."""
    backing = Backing(os.open(file, os.O_RDWR), DSYNC, SERVER)
    extra = [os.open(file, os.O_RDWR) for _ in range(3)]
    backing._spares.extend(extra)
    real, closed = os.close, []

    def close(fd: int) -> None:
        real(fd)
        closed.append(fd)
        raise OSError(errno.EIO, "close")

    monkeypatch.setattr(engine.os, "close", close)
    with pytest.raises(OSError, match="close"):
        backing.close()
    monkeypatch.undo()
    assert closed == [*extra, backing.fd]
