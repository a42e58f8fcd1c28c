"""The fake kernel's manners; and that the real one has the same, where it can be made to show them.

What is believed of simulation.py stands on this.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
from typing import TYPE_CHECKING, Protocol

import pytest

from iohang_fuse.source import SERVER, NotTheSame, Where
from tests.shell.kernel import PAGE, Disk, ErrSeq, Fault, Kernel, Violation

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager
    from pathlib import Path

RDWR = os.O_RDWR
DIRECT = os.O_RDWR | os.O_DIRECT
DSYNC = os.O_RDWR | os.O_DSYNC
NAME = b"disk.img"
OLD = b"o" * (2 * PAGE)


# ---- what both kernels do


class Calls(Protocol):
    def pread(self, fd: int, size: int, offset: int) -> bytes: ...
    def pwrite(self, fd: int, data: bytes, offset: int) -> int: ...
    def ftruncate(self, fd: int, size: int) -> None: ...
    def fsync(self, fd: int) -> None: ...
    def fdatasync(self, fd: int) -> None: ...


@pytest.fixture(params=["fake", "real"])
def both(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[Calls, Callable[[int], int]]]:
    """The calls of one kernel, and what opens a file of 2 pages of "o" there."""
    opened = []
    if request.param == "fake":
        kernel = Kernel()
        kernel.create(NAME, OLD)
        calls: Calls = kernel.os

        def opens(flags: int) -> int:
            opened.append(kernel.open(NAME, flags))
            return opened[-1]
    else:
        (tmp_path / "disk.img").write_bytes(OLD)
        calls = os

        def opens(flags: int) -> int:
            opened.append(os.open(tmp_path / "disk.img", flags))
            return opened[-1]

    yield calls, opens
    for fd in opened:
        with contextlib.suppress(OSError):
            (kernel.os if request.param == "fake" else os).close(fd)


Both = "tuple[Calls, Callable[[int], int]]"


@pytest.mark.parametrize("flags", [RDWR, DSYNC])
def test_a_write_is_read(both: Both, flags: int) -> None:
    """Through any description, whatever became of it on the disk."""
    calls, opens = both
    writer, reader = opens(flags), opens(os.O_RDONLY)
    assert calls.pwrite(writer, b"new", 10) == 3
    assert calls.pread(reader, 5, 9) == b"onewo"


def test_a_read_is_short_at_the_end_of_the_file(both: Both) -> None:
    """And empty beyond it."""
    calls, opens = both
    fd = opens(RDWR)
    assert calls.pread(fd, 100, len(OLD) - 3) == b"ooo"
    assert calls.pread(fd, 100, len(OLD)) == b""
    assert calls.pread(fd, 100, 10**6) == b""


def test_a_write_beyond_the_end_leaves_zeros(both: Both) -> None:
    """In the same page and in those between."""
    calls, opens = both
    fd = opens(RDWR)
    calls.pwrite(fd, b"x", len(OLD) + 3 * PAGE + 5)
    assert calls.pread(fd, 1000, len(OLD) - 1) == b"o" + bytes(3 * PAGE + 5) + b"x"


@pytest.mark.parametrize("size", [0, 5, PAGE, PAGE + 1])
def test_what_was_cut_off_comes_back_as_zeros(both: Both, size: int) -> None:
    """After ftruncate(2) down and up again, and after a write behind it."""
    calls, opens = both
    fd = opens(RDWR)
    calls.ftruncate(fd, size)
    assert calls.pread(fd, 1000, 0) == OLD[:size]
    calls.ftruncate(fd, size + 10)
    assert calls.pread(fd, 1000, 0) == OLD[:size] + bytes(10)
    calls.pwrite(fd, b"x", size + 20)
    assert calls.pread(fd, 1000, 0) == OLD[:size] + bytes(20) + b"x"


def test_an_empty_write_is_nothing(both: Both) -> None:
    """It does not grow the file."""
    calls, opens = both
    fd = opens(RDWR)
    assert calls.pwrite(fd, b"", 10**6) == 0
    assert calls.pread(fd, 1, len(OLD)) == b""


def test_a_sync_without_trouble(both: Both) -> None:
    """Of a description that may write, and of one that may not."""
    calls, opens = both
    fd, reader = opens(RDWR), opens(os.O_RDONLY)
    calls.pwrite(fd, b"new", 0)
    calls.fsync(fd)
    calls.fdatasync(reader)
    assert calls.pread(reader, 3, 0) == b"new"


# ---- errseq_t


def test_an_error_is_reported_once_to_each_that_was_open() -> None:
    """lib/errseq.c: errseq_check_and_advance."""
    errors = ErrSeq()
    a, b = errors.sample(), errors.sample()
    errors.record(errno.EIO)
    number, a = errors.advance(a)
    assert number == errno.EIO
    assert errors.advance(a)[0] == 0
    number, b = errors.advance(b)
    assert number == errno.EIO
    errors.record(errno.EIO)  # the same again is another
    assert errors.advance(a)[0] == errno.EIO


def test_an_error_that_nobody_has_seen_is_reported_to_who_comes_later() -> None:
    """lib/errseq.c: errseq_sample gives 0 until the error has been seen, and its value afterwards."""
    errors = ErrSeq()
    errors.record(errno.EIO)
    later = errors.sample()
    assert errors.advance(later)[0] == errno.EIO
    too_late = errors.sample()
    assert errors.advance(too_late)[0] == 0


# ---- the fake kernel's own


class Bench:
    """A file of 2 pages of "o", and faults that are scripted by exchange: each list is used up, and then all is well."""

    def __init__(self) -> None:
        self.kernel = Kernel()
        self.os = self.kernel.os
        self.disk: Disk = self.kernel.create(NAME, OLD)
        self.faults: dict[str, list[Fault]] = {}
        self.kernel.fault = lambda exchange: faults.pop(0) if (faults := self.faults.get(exchange)) else None

    def open(self, flags: int = RDWR) -> int:
        return self.kernel.open(NAME, flags)

    def fail(self, exchange: str, number: int = errno.EIO, effect: str = "none") -> None:
        self.faults.setdefault(exchange, []).append(Fault(number, effect))

    def again(self, fd: int, size: int = 0) -> int:
        return self.kernel.open_again(fd, RDWR, SERVER, Where("", NAME, self.disk.number, b"", size))


@pytest.fixture
def bench() -> Bench:
    return Bench()


def fails(number: int) -> AbstractContextManager[object]:
    return pytest.raises(OSError, match=re.escape(os.strerror(number)))


def test_a_write_is_on_the_disk_after_a_sync_and_not_before(bench: Bench) -> None:
    """And a crash loses the rest."""
    fd = bench.open()
    bench.os.pwrite(fd, b"safe", 0)
    bench.os.fdatasync(fd)
    bench.os.pwrite(fd, b"lost", 0)
    bench.kernel.crash()
    assert bench.os.pread(bench.open(), 4, 0) == b"safe"


@pytest.mark.parametrize("flags", [DIRECT, DSYNC])
def test_a_direct_write_and_one_with_o_dsync_are_on_the_disk_at_once(bench: Bench, flags: int) -> None:
    """open(2): O_DIRECT, O_DSYNC."""
    fd, cached = bench.open(flags), bench.open()
    assert bench.os.pread(cached, 1, 0) == b"o"
    bench.os.pwrite(fd, b"x", 0)
    assert bench.disk.data[:1] == b"x"
    assert bench.os.pread(cached, 1, 0) == b"x"


def test_a_failed_writeback_is_reported_once_and_the_pages_are_clean(bench: Bench) -> None:
    """fsync(2), NOTES: a second fsync says 0, and the data is not on the disk."""
    fd = bench.open()
    bench.os.pwrite(fd, b"lost", 0)
    bench.fail("writeback")
    with fails(errno.EIO):
        bench.os.fsync(fd)
    bench.os.fsync(fd)
    assert bench.disk.data == OLD
    assert bench.os.pread(fd, 4, 0) == b"lost"  # as long as the page is in the cache
    bench.kernel.evict(bench.disk)
    assert bench.os.pread(fd, 4, 0) == b"oooo"


def test_a_page_that_failed_may_leave_the_cache_with_the_growth(bench: Bench) -> None:
    """fs/nfs/write.c: nfs_write_error; the size is the server's again."""
    bench.kernel.drops = lambda: True
    fd = bench.open()
    bench.os.pwrite(fd, b"new", len(OLD))
    assert bench.os.fstat(fd).st_size == len(OLD) + 3
    bench.fail("writeback")
    bench.kernel.write_back(bench.disk)
    assert bench.os.fstat(fd).st_size == len(OLD)
    assert bench.os.pread(fd, 3, len(OLD)) == b""


def test_a_write_with_o_dsync_uses_the_report_up(bench: Bench) -> None:
    """generic_write_sync: it is told of any page of the file, and a sync of the same description is not told again."""
    fd, other = bench.open(DSYNC), bench.open()
    bench.os.pwrite(other, b"lost", PAGE)
    bench.fail("writeback")
    bench.kernel.write_back(bench.disk)
    with fails(errno.EIO):
        bench.os.pwrite(fd, b"x", 0)
    bench.os.fdatasync(fd)
    with fails(errno.EIO):
        bench.os.fdatasync(other)


@pytest.mark.parametrize(
    ("effect", "there"), [("none", b"oooooooo"), ("part", b"xxxxoooo"), ("whole", b"xxxxxxxx"), ("late", b"oooooooo")]
)
def test_a_direct_write_that_fails_may_have_an_effect(bench: Bench, effect: str, there: bytes) -> None:
    """Before the effect, after a part, or with the answer lost."""
    fd = bench.open(DIRECT)
    bench.fail("direct", errno.ETIMEDOUT, effect)
    with fails(errno.ETIMEDOUT):
        bench.os.pwrite(fd, b"x" * 8, 0)
    assert bench.disk.data[:8] == there


def test_a_late_write_comes_before_the_next_success(bench: Bench) -> None:
    """In order on the connection: what succeeds is behind it."""
    fd = bench.open(DIRECT)
    bench.fail("direct", errno.ETIMEDOUT, "late")
    with fails(errno.ETIMEDOUT):
        bench.os.pwrite(fd, b"late", 0)
    bench.fail("direct", errno.ETIMEDOUT)
    with fails(errno.ETIMEDOUT):
        bench.os.pwrite(fd, b"x", 8)
    assert bench.disk.data == OLD
    bench.os.pwrite(fd, b"new", 1)
    assert bench.disk.data[:5] == b"lnewo"


def test_a_racing_late_write_comes_behind_the_next_write(bench: Bench) -> None:
    """Why a range is fenced after a give-up (P5), and why an exchange is needed before anything else goes there."""
    bench.kernel.racing = True
    fd = bench.open(DIRECT)
    for asks in (False, True):
        bench.fail("direct", errno.ETIMEDOUT, "late")
        with fails(errno.ETIMEDOUT):
            bench.os.pwrite(fd, b"late", 0)
        if asks:
            bench.os.fstatvfs(fd)
        bench.os.pwrite(fd, b"new", 1)
        assert bench.disk.data[:5] == (b"lnewo" if asks else b"lateo")


def test_calls_may_be_short(bench: Bench) -> None:
    """read(2), write(2)."""
    bench.kernel.most = lambda _count: 4
    fd, direct = bench.open(), bench.open(DIRECT)
    assert bench.os.pwrite(fd, b"x" * 8, 0) == 4
    assert bench.os.pwrite(direct, b"y" * 8, 8) == 4
    assert bench.os.pread(fd, 16, 0) == b"xxxx"
    assert bench.os.pread(direct, 16, 8) == b"yyyy"


def test_a_stale_description_is_dead_for_good(bench: Bench) -> None:
    """ESTALE, until the file is opened anew by its name."""
    fd = bench.open()
    bench.kernel.make_stale(bench.disk)
    for call in (
        bench.os.fsync,
        bench.os.fstat,
        lambda fd: bench.os.pread(fd, 1, 0),
        lambda fd: bench.os.pwrite(fd, b"x", 0),
    ):
        with fails(errno.ESTALE):
            call(fd)
    assert bench.os.pread(bench.again(fd), 1, 0) == b"o"


def test_a_remount_takes_the_cache_and_its_errors_along(bench: Bench) -> None:
    """A file system that is mounted anew has another inode: nobody is told of what was lost."""
    fd = bench.open()
    bench.os.pwrite(fd, b"lost", 0)
    bench.kernel.remount(bench.disk)
    new = bench.again(fd)
    bench.os.fsync(new)
    assert bench.os.pread(new, 4, 0) == b"oooo"


def test_another_file_of_that_name_is_not_opened(bench: Bench) -> None:
    """As `source.open_again`: refused if what was open is dead, else one more description of that."""
    fd = bench.open()
    bench.kernel.create(NAME, b"another")
    assert bench.os.pread(bench.again(fd), 1, 0) == b"o"
    bench.kernel.make_stale(bench.disk)
    with pytest.raises(NotTheSame):
        bench.again(fd)


def test_a_shorter_file_of_that_name_is_not_opened(bench: Bench) -> None:
    """What is known to be stable cannot be gone."""
    fd = bench.open()
    bench.kernel.make_stale(bench.disk)
    with pytest.raises(NotTheSame):
        bench.again(fd, size=len(OLD) + 1)
    bench.again(fd, size=len(OLD))


def test_a_close_may_report(bench: Bench) -> None:
    """close(2) on NFS; the descriptor is gone all the same."""
    bench.kernel.flushes_at_close = True
    fd = bench.open()
    bench.os.pwrite(fd, b"lost", 0)
    bench.fail("writeback")
    with fails(errno.EIO):
        bench.os.close(fd)
    assert bench.kernel.open_files == 0


@pytest.mark.parametrize("call", ["pread", "close", "fsync"])
def test_a_closed_descriptor_is_not_used(bench: Bench, call: str) -> None:
    """Its number may be another file's by then: this kernel says so instead of EBADF."""
    fd = bench.open()
    bench.os.close(fd)
    arguments = (1, 0) if call == "pread" else ()
    with pytest.raises(Violation):
        getattr(bench.os, call)(fd, *arguments)
    assert bench.kernel.violations
