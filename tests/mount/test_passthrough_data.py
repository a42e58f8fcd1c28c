"""A complete passthrough, data: every way to open, read, write and sync a file."""

from __future__ import annotations

import errno
import mmap
import multiprocessing
import os
import random
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.mount.callers import outcome

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.mount.conftest import Pair


@pytest.fixture(params=["disk", "memory"])
def two_kinds(request: pytest.FixtureRequest) -> Pair:
    """SOURCE on a disk, whose own O_DIRECT wants alignment, and on a tmpfs."""
    name = "pair" if request.param == "disk" else "memory_pair"
    chosen: Pair = request.getfixturevalue(name)
    return chosen


def aligned(data: bytes) -> mmap.mmap:
    """*data* at the beginning of a page."""
    memory = mmap.mmap(-1, max(len(data), 1))
    memory.write(data)
    return memory


@pytest.mark.parametrize("flags", [0, os.O_DIRECT, os.O_SYNC, os.O_DSYNC, os.O_DIRECT | os.O_SYNC])
def test_any_offset_and_length_whatever_the_flags(two_kinds: Pair, flags: int) -> None:
    """Seeded writes and reads, unaligned ones too, compared with a model and with SOURCE."""
    chance = random.Random(f"seed {flags}")
    model = bytearray(chance.randbytes(300_000))
    path = two_kinds.mount / "image"
    path.write_bytes(model)
    fd = os.open(path, os.O_RDWR | flags)
    for _ in range(120):
        offset, length = chance.randrange(290_000), chance.choice([1, 511, 512, 4096, 4097, 70_000])
        if chance.random() < 0.5:
            length = min(length, 300_000 - offset)
            data = chance.randbytes(length)
            assert os.pwrite(fd, data, offset) == length
            model[offset : offset + length] = data
        elif length >= 512 or not flags & os.O_DIRECT:
            assert os.pread(fd, length, offset) == model[offset : offset + length]
    os.fsync(fd)
    os.close(fd)
    assert (two_kinds.source / "image").read_bytes() == model


def test_short_reads_of_a_direct_handle_are_refused(two_kinds: Pair) -> None:
    """QEMU probes the alignment so: below 512 bytes EINVAL, as a disk would say, and 512 works."""
    (two_kinds.source / "image").write_bytes(bytes(8192))
    fd = os.open(two_kinds.mount / "image", os.O_RDWR | os.O_DIRECT)
    for length in (1, 256, 511):
        assert outcome(lambda length=length: os.pread(fd, length, 0)) == "EINVAL"  # type: ignore[misc]
    assert os.pread(fd, 512, 0) == bytes(512)
    assert os.pwrite(fd, b"short", 3) == 5
    os.close(fd)
    assert (two_kinds.source / "image").read_bytes() == bytes(3) + b"short" + bytes(8184)


def test_limit_no_shared_mapping_of_a_direct_handle(two_kinds: Pair) -> None:
    """docs/limitations.rst: "MAP_SHARED of a handle with O_DIRECT is refused with ENODEV"; MAP_PRIVATE is not."""
    (two_kinds.source / "image").write_bytes(b"x" * mmap.PAGESIZE)
    fd = os.open(two_kinds.mount / "image", os.O_RDWR | os.O_DIRECT)
    with pytest.raises(OSError, match="No such device"):
        mmap.mmap(fd, mmap.PAGESIZE)
    with mmap.mmap(fd, mmap.PAGESIZE, flags=mmap.MAP_PRIVATE) as memory:
        assert memory[:1] == b"x"
    os.close(fd)


def test_direct_and_cached_handles_see_one_file(two_kinds: Pair) -> None:
    """What is written past the kernel's cache is not hidden by it, and the other way round, while both are open."""
    (two_kinds.source / "image").write_bytes(bytes(2 * mmap.PAGESIZE))
    direct = os.open(two_kinds.mount / "image", os.O_RDWR | os.O_DIRECT)
    cached = os.open(two_kinds.mount / "image", os.O_RDWR)
    block = mmap.mmap(-1, mmap.PAGESIZE)
    for number in range(1, 20):
        new = bytes([number]) * mmap.PAGESIZE
        assert os.pread(cached, mmap.PAGESIZE, 0)[:1] == bytes([number - 1]), "in the kernel's cache now"
        block[:] = new
        os.pwrite(direct, block, 0)
        assert os.pread(cached, mmap.PAGESIZE, 0) == new
        os.pwrite(cached, new, mmap.PAGESIZE)
        os.preadv(direct, [block], mmap.PAGESIZE)
        assert block[:] == new
    os.close(direct)
    os.close(cached)


def test_large_direct_reads_into_any_memory(two_kinds: Pair) -> None:
    """The kernel splits a read into memory off the pages, and its last part may be a few bytes: it is whole all the same."""
    data = random.Random(1).randbytes(3 << 20)
    (two_kinds.source / "image").write_bytes(data)
    fd = os.open(two_kinds.mount / "image", os.O_RDONLY | os.O_DIRECT)
    memory = mmap.mmap(-1, 4 << 20)
    for shift in (0, 16, 32, 100, 511):
        for size in (1 << 20, 2 << 20):
            area = memoryview(memory)[shift:][:size]
            assert os.preadv(fd, [area], 4096) == size
            assert area == data[4096:][:size]
    os.close(fd)


def test_the_end_of_a_file_through_a_direct_handle(two_kinds: Pair) -> None:
    """The last read may come back shorter than 512 bytes: only what is asked for must not be."""
    (two_kinds.source / "image").write_bytes(b"x" * 700)
    fd = os.open(two_kinds.mount / "image", os.O_RDONLY | os.O_DIRECT)
    buffer = aligned(bytes(4096))
    assert os.preadv(fd, [buffer], 0) == 700
    assert os.preadv(fd, [buffer], 512) == 188
    assert os.preadv(fd, [buffer], 4096) == 0
    os.close(fd)


@pytest.mark.parametrize("size", [1 << 20, (4 << 20) + 512])
def test_large_direct_transfers(two_kinds: Pair, size: int) -> None:
    data = random.Random(size).randbytes(size)
    fd = os.open(two_kinds.mount / "image", os.O_CREAT | os.O_RDWR | os.O_DIRECT)
    assert os.pwritev(fd, [aligned(data)], 0) == size
    buffer = aligned(bytes(size))
    assert os.preadv(fd, [buffer], 0) == size
    assert buffer[:] == data
    os.close(fd)


def test_offsets_beyond_4_gib(pair: Pair) -> None:
    offset = (5 << 30) + 12345
    fd = os.open(pair.mount / "large", os.O_CREAT | os.O_RDWR)
    os.pwrite(fd, b"far away", offset)
    assert os.pread(fd, 8, offset) == b"far away"
    assert os.pread(fd, 8, 1 << 32) == bytes(8)
    os.close(fd)
    with (pair.source / "large").open("rb") as file:
        file.seek(offset)
        assert file.read() == b"far away"
    through, without = os.stat(pair.mount / "large"), os.stat(pair.source / "large")
    assert through.st_size == without.st_size == offset + 8
    assert through.st_blocks == without.st_blocks < 100


@pytest.mark.parametrize(
    ("flags", "result"), [(os.O_RDONLY, "write EBADF"), (os.O_WRONLY, "read EBADF"), (os.O_RDWR, "")]
)
def test_a_handle_does_what_it_was_opened_for(pair: Pair, flags: int, result: str) -> None:
    (pair.source / "file").write_bytes(b"x")
    fd = os.open(pair.mount / "file", flags)
    said = [
        f"{name} {answer}"
        for name, answer in (
            ("read", outcome(lambda: os.pread(fd, 1, 0))),
            ("write", outcome(lambda: os.pwrite(fd, b"y", 0))),
        )
        if isinstance(answer, str)
    ]
    os.close(fd)
    assert " ".join(said) == result


# ---- O_APPEND


def _append(path: Path, mark: bytes, count: int) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_APPEND)
    for number in range(count):
        os.write(fd, b"%s%06d\n" % (mark, number))
    os.close(fd)


def test_two_processes_append_to_one_file(pair: Pair) -> None:
    """No line is lost, torn or doubled, and each process's lines are in its order."""
    path = pair.mount / "log"
    path.touch()
    fork = multiprocessing.get_context("fork")
    writers = [fork.Process(target=_append, args=(path, mark, 400)) for mark in (b"a", b"b")]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    lines = (pair.source / "log").read_bytes().splitlines()
    for mark in (b"a", b"b"):
        assert [line for line in lines if line[:1] == mark] == [b"%s%06d" % (mark, n) for n in range(400)]
    assert len(lines) == 800


def test_an_appending_handle_ignores_offsets_as_linux_does(pair: Pair) -> None:
    """Append and a size that has changed: the end is the file's, not the handle's (pwrite(2), BUGS)."""

    def work(d: Path) -> bytes:
        (d / "file").write_bytes(b"12345")
        fd = os.open(d / "file", os.O_RDWR | os.O_APPEND)
        os.write(fd, b"67")
        os.ftruncate(fd, 3)
        os.write(fd, b"ab")
        os.pwrite(fd, b"cd", 0)
        os.close(fd)
        return (d / "file").read_bytes()

    assert pair.same(work) == b"123abcd"


def test_appending_belongs_to_the_kernel_and_truncating_to_the_open(pair: Pair) -> None:
    """O_APPEND and O_TRUNC are not passed on to the descriptors that writes get: a second try would append, or truncate, again."""
    path = pair.mount / "file"
    path.write_bytes(b"old")
    first = os.open(path, os.O_TRUNC | os.O_RDWR | os.O_APPEND)
    second = os.open(path, os.O_RDWR)
    os.pwrite(second, b"abc", 0)
    os.write(first, b"d")
    assert (pair.source / "file").read_bytes() == b"abcd"
    backing = [
        number
        for number in os.listdir(f"/proc/{pair.server.pid}/fd")
        if outcome(lambda n=number: os.readlink(f"/proc/{pair.server.pid}/fd/{n}")) == str(pair.source / "file")  # type: ignore[misc]
    ]
    assert len(backing) >= 3
    for number in backing:
        info = Path(f"/proc/{pair.server.pid}/fdinfo/{number}").read_text()
        assert not int(info.split("flags:")[1].split()[0], 8) & (os.O_APPEND | os.O_TRUNC)
    os.close(first)
    os.close(second)


# ---- mmap


def test_shared_mappings_read_and_write(pair: Pair) -> None:
    path = pair.mount / "mapped"
    path.write_bytes(bytes(3 * mmap.PAGESIZE))
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as memory:
        memory[5000:5005] = b"hello"
        assert os.pread(file.fileno(), 5, 5000) == b"hello"
        memory.flush()
        assert (pair.source / "mapped").read_bytes()[5000:5005] == b"hello"
        os.pwrite(file.fileno(), b"there", 5000)
        assert memory[5000:5005] == b"there"
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as memory:
        assert memory[5000:5005] == b"there"


def test_a_mapping_outlives_its_descriptor_and_its_name(pair: Pair) -> None:
    path = pair.mount / "mapped"
    path.write_bytes(b"x" * mmap.PAGESIZE)
    os.link(pair.source / "mapped", pair.source / "kept")
    with path.open("r+b") as file:
        memory = mmap.mmap(file.fileno(), 0)
    path.unlink()
    memory[0:4] = b"last"
    memory.flush()
    memory.close()
    assert (pair.source / "kept").read_bytes()[:5] == b"lastx"


def test_two_mappings_of_one_file_are_one_memory(pair: Pair) -> None:
    (pair.mount / "one").write_bytes(bytes(mmap.PAGESIZE))
    os.link(pair.mount / "one", pair.mount / "two")
    with (
        (pair.mount / "one").open("r+b") as first,
        (pair.mount / "two").open("r+b") as second,
        mmap.mmap(first.fileno(), 0) as here,
        mmap.mmap(second.fileno(), 0) as there,
    ):
        here[10] = 7
        assert there[10] == 7


# ---- sizes and holes


def test_sparse_files_stay_sparse(pair: Pair) -> None:
    fd = os.open(pair.mount / "sparse", os.O_CREAT | os.O_RDWR)
    os.ftruncate(fd, 1 << 30)
    os.pwrite(fd, b"x" * 4096, 1 << 29)
    os.fsync(fd)
    assert os.fstat(fd).st_blocks == os.stat(pair.source / "sparse").st_blocks < 64
    assert os.pread(fd, 10, 1 << 20) == bytes(10)
    os.close(fd)


def test_truncation_cuts_and_zeroes(pair: Pair) -> None:
    """What a truncation cut off never comes back, also within a page."""

    def work(d: Path) -> bytes:
        fd = os.open(d / "file", os.O_CREAT | os.O_RDWR)
        os.write(fd, b"x" * 5000)
        os.ftruncate(fd, 100)
        os.ftruncate(fd, 5000)
        os.pwrite(fd, b"end", 4997)
        os.close(fd)
        return (d / "file").read_bytes()

    assert pair.same(work) == b"x" * 100 + bytes(4897) + b"end"


def test_reads_see_a_size_that_changed_on_source(pair: Pair) -> None:
    """The kernel may keep a size for attr_timeout (1 s), but an open asks anew."""
    path = pair.mount / "file"
    path.write_bytes(b"short")
    assert path.read_bytes() == b"short"
    (pair.source / "file").write_bytes(b"rather longer")
    assert path.read_bytes() == b"rather longer"
    (pair.source / "file").write_bytes(b"s")
    assert path.read_bytes() == b"s"


# ---- sync


def test_sync_of_files_directories_and_the_file_system(pair: Pair) -> None:
    fd = os.open(pair.mount / "file", os.O_CREAT | os.O_RDWR)
    os.write(fd, b"x")
    os.fdatasync(fd)
    os.fsync(fd)
    os.close(fd)
    for flags in (os.O_RDONLY, os.O_RDONLY | os.O_DIRECTORY):
        fd = os.open(pair.mount if flags & os.O_DIRECTORY else pair.mount / "file", flags)
        os.fsync(fd)
        os.fdatasync(fd)
        os.close(fd)
    os.sync()


# ---- threads


def test_many_threads_on_one_descriptor(pair: Pair) -> None:
    """Eight writers, each in its own stripe, with readers between: every byte lands where it belongs."""
    fd = os.open(pair.mount / "file", os.O_CREAT | os.O_RDWR)
    os.ftruncate(fd, 8 << 16)

    def write(stripe: int) -> None:
        for turn in range(64):
            os.pwrite(fd, bytes([stripe + 1]) * 1024, (turn * 8 + stripe) * 1024)
            os.pread(fd, 1024, (turn * 8 + (stripe + 3) % 8) * 1024)

    threads = [threading.Thread(target=write, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    os.close(fd)
    expected = b"".join(bytes([n + 1]) * 1024 for n in range(8)) * 64
    assert (pair.source / "file").read_bytes() == expected


# ---- unlinked, renamed


@pytest.fixture
def doomed(pair: Pair) -> Iterator[int]:
    fd = os.open(pair.mount / "doomed", os.O_CREAT | os.O_RDWR, 0o640)
    os.write(fd, b"before")
    os.unlink(pair.mount / "doomed")
    yield fd
    os.close(fd)


def test_a_file_unlinked_while_open_keeps_working(pair: Pair, doomed: int) -> None:
    assert os.listdir(pair.source) == []
    assert os.pread(doomed, 6, 0) == b"before"
    assert os.pwrite(doomed, b"after", 6) == 5
    os.fsync(doomed)
    status = os.fstat(doomed)
    assert (status.st_nlink, status.st_size, status.st_mode & 0o777) == (0, 11, 0o640)
    os.ftruncate(doomed, 3)
    os.fchmod(doomed, 0o600)
    os.fchown(doomed, 4001, 4001)
    os.utime(doomed, ns=(1, 2))
    os.setxattr(doomed, "user.x", b"y")
    status = os.fstat(doomed)
    assert (status.st_size, status.st_mode & 0o777, status.st_uid, status.st_mtime_ns) == (3, 0o600, 4001, 2)
    assert os.getxattr(doomed, "user.x") == b"y"
    assert os.pread(doomed, 10, 0) == b"bef"


def test_a_file_unlinked_while_open_can_be_opened_again_by_descriptor(doomed: int) -> None:
    again = os.open(f"/proc/self/fd/{doomed}", os.O_RDWR)
    assert os.pread(again, 6, 0) == b"before"
    os.pwrite(again, b"B", 0)
    os.close(again)
    assert os.pread(doomed, 6, 0) == b"Before"


def test_a_name_used_again_is_another_file(pair: Pair, doomed: int) -> None:
    (pair.mount / "doomed").write_bytes(b"the new one")
    assert os.pread(doomed, 20, 0) == b"before"
    assert os.fstat(doomed).st_ino != os.stat(pair.mount / "doomed").st_ino
    os.pwrite(doomed, b"BEFORE", 0)
    assert (pair.source / "doomed").read_bytes() == b"the new one"


def test_a_file_replaced_while_open_keeps_working(pair: Pair) -> None:
    (pair.mount / "old").write_bytes(b"old")
    (pair.mount / "new").write_bytes(b"new")
    fd = os.open(pair.mount / "old", os.O_RDWR)
    os.rename(pair.mount / "new", pair.mount / "old")
    assert os.pread(fd, 3, 0) == b"old"
    assert os.fstat(fd).st_nlink == 0
    os.pwrite(fd, b"OLD", 0)
    os.close(fd)
    assert (pair.source / "old").read_bytes() == b"new"


def test_a_file_renamed_while_open_keeps_working(pair: Pair) -> None:
    (pair.mount / "a").mkdir()
    (pair.mount / "b").mkdir()
    fd = os.open(pair.mount / "a/file", os.O_CREAT | os.O_RDWR)
    os.rename(pair.mount / "a/file", pair.mount / "b/other")
    os.write(fd, b"data")
    os.rename(pair.mount / "b", pair.mount / "c")
    os.write(fd, b" and more")
    os.ftruncate(fd, 12)
    assert os.fstat(fd).st_nlink == 1
    os.close(fd)
    assert (pair.source / "c/other").read_bytes() == b"data and mor"


def test_reading_from_a_directory_handle_is_refused(pair: Pair) -> None:
    fd = os.open(pair.mount, os.O_RDONLY)
    assert outcome(lambda: os.read(fd, 1)) == errno.errorcode[errno.EISDIR]
    os.close(fd)
