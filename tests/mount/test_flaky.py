"""The shipped flaky source, as users have it: a passthrough that fails as its trigger file says, and heals at once."""

from __future__ import annotations

import concurrent.futures
import errno
import os
import signal
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any

import pytest

from contrib.bench.isolation import BLOCK, Client
from tests.harness import FlakySource, Mount, mounted_at, wait_until
from tests.mount.callers import outcome

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path


@pytest.fixture
def source(tmp_path: Path) -> Iterator[FlakySource]:
    real = tmp_path / "real"
    (real / "folder").mkdir(parents=True)
    for name in ("a.img", "b.img", "folder/a.img"):
        (real / name).write_bytes(b"x" * 8192)
    with FlakySource(real, tmp_path / "source", tmp_path / "trigger", tmp_path / "log") as flaky:
        yield flaky
        assert "a bug in" not in flaky.log_text()


@pytest.fixture
def caching(tmp_path: Path) -> Iterator[FlakySource]:
    """With a page cache that writes back for fsync and close only."""
    real = tmp_path / "real"
    real.mkdir()
    (real / "a.img").write_bytes(b"x" * 8192)
    with FlakySource(
        real,
        tmp_path / "source",
        tmp_path / "trigger",
        tmp_path / "log",
        page_cache=True,
        writeback_every_s=3600,
    ) as flaky:
        yield flaky
        assert "a bug in" not in flaky.log_text()


def write(path: Path, data: bytes = b"y", offset: int = 0) -> int:
    fd = os.open(path, os.O_WRONLY)
    try:
        return os.pwrite(fd, data, offset)
    finally:
        os.close(fd)


def fsync(path: Path) -> None:
    fd = os.open(path, os.O_RDWR)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def fsyncdir(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


OPERATIONS: dict[str, tuple[str, Callable[[Path], Any]]] = {
    "lookup": ("a.img", lambda d: os.stat(d / "a.img")),
    "getattr": ("a.img", lambda d: os.stat(d / "a.img")),
    "setattr": ("a.img", lambda d: os.chmod(d / "a.img", 0o600)),
    "open": ("a.img", lambda d: os.open(d / "a.img", os.O_RDONLY)),
    "create": ("new", lambda d: os.open(d / "new", os.O_CREAT)),
    "read": ("a.img", lambda d: (d / "a.img").read_bytes()),
    "write": ("a.img", lambda d: write(d / "a.img")),
    "fsync": ("a.img", lambda d: fsync(d / "a.img")),
    "flush": ("a.img", lambda d: os.close(os.open(d / "a.img", os.O_WRONLY))),
    "mkdir": ("new", lambda d: os.mkdir(d / "new")),
    "mknod": ("new", lambda d: os.mkfifo(d / "new")),
    "symlink": ("new", lambda d: os.symlink("x", d / "new")),
    "link": ("a.img", lambda d: os.link(d / "a.img", d / "new")),
    "unlink": ("a.img", lambda d: os.unlink(d / "a.img")),
    "rmdir": ("folder", lambda d: os.rmdir(d / "folder")),
    "rename": ("a.img", lambda d: os.rename(d / "a.img", d / "new")),
    "opendir": ("folder", lambda d: os.listdir(d / "folder")),
    "readdir": ("folder", lambda d: os.listdir(d / "folder")),
    "fsyncdir": ("folder", lambda d: fsyncdir(d / "folder")),
    "statfs": (".", os.statvfs),
    "access": ("a.img", lambda d: os.chdir(d / "folder")),
    "getxattr": ("a.img", lambda d: os.getxattr(d / "a.img", "user.x")),
    "setxattr": ("a.img", lambda d: os.setxattr(d / "a.img", "user.x", b"")),
    "listxattr": ("a.img", lambda d: os.listxattr(d / "a.img")),
    "removexattr": ("a.img", lambda d: os.removexattr(d / "a.img", "user.x")),
}


@pytest.mark.parametrize("operation", sorted(set(OPERATIONS) - {"access"}))
def test_each_operation_fails_as_it_is_told(source: FlakySource, operation: str) -> None:
    files, work = OPERATIONS[operation]
    source.fail(f"{operation} {files} errno=EREMOTEIO")
    assert outcome(lambda: work(source.mountpoint)) == "EREMOTEIO"
    source.heal()
    assert outcome(lambda: (work(source.mountpoint), None)[1]) != "EREMOTEIO"


def test_without_a_trigger_it_is_a_plain_passthrough(source: FlakySource) -> None:
    (source.mountpoint / "new").write_bytes(b"content")
    assert (source.mountpoint.parent / "real/new").read_bytes() == b"content"
    assert sorted(os.listdir(source.mountpoint)) == ["a.img", "b.img", "folder", "new"]
    assert mounted_at(source.mountpoint) == ["fuse.iohang-flaky"]


def test_only_the_files_named_fail(source: FlakySource) -> None:
    source.fail("data a.img errno=EIO")
    assert outcome((source.mountpoint / "a.img").read_bytes) == "EIO"
    assert outcome((source.mountpoint / "folder/a.img").read_bytes) == "EIO"
    assert (source.mountpoint / "b.img").read_bytes() == b"x" * 8192
    source.fail("data folder/* errno=EIO")
    assert (source.mountpoint / "a.img").read_bytes() == b"x" * 8192
    assert outcome((source.mountpoint / "folder/a.img").read_bytes) == "EIO"


def test_a_renamed_file_goes_by_its_new_name(source: FlakySource) -> None:
    source.fail("read new.img errno=EIO")
    with (source.mountpoint / "a.img").open("rb", buffering=0) as file:
        assert file.read(10) == b"x" * 10
        os.rename(source.mountpoint / "a.img", source.mountpoint / "new.img")
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        assert outcome(lambda: os.pread(file.fileno(), 512, 4096)) == "EIO"


def test_names_that_are_not_utf8(source: FlakySource) -> None:
    """In rules, and in the log, they are written with backslashes."""
    path = os.fsencode(source.mountpoint) + b"/\xff.img"
    os.close(os.open(path, os.O_CREAT))
    source.fail(r"* \xff.img errno=EIO")
    assert outcome(lambda: os.stat(path)) == "EIO"


def test_a_bad_sector(source: FlakySource) -> None:
    source.fail("read,write a.img errno=EIO bytes=4096-4607")
    fd = os.open(source.mountpoint / "a.img", os.O_RDWR | os.O_DIRECT)
    assert [outcome(lambda at=at: os.pread(fd, 512, at)) for at in (3584, 4096, 4608)] == [  # type: ignore[misc]
        b"x" * 512,
        "EIO",
        b"x" * 512,
    ]
    assert outcome(lambda: os.pwrite(fd, b"y" * 1024, 3584)) == "EIO"
    assert os.pwrite(fd, b"y" * 512, 3584) == 512
    os.close(fd)


def test_a_call_that_hangs_goes_on_when_the_rule_is_gone(source: FlakySource) -> None:
    source.fail("open a.img hang")
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        try:
            content = pool.submit((source.mountpoint / "a.img").read_bytes)
            other = pool.submit((source.mountpoint / "b.img").read_bytes)
            assert other.result(3) == b"x" * 8192
            with pytest.raises(concurrent.futures.TimeoutError):
                content.result(0.3)
        finally:
            source.heal()
        assert content.result(10) == b"x" * 8192


def test_a_call_that_hangs_fails_when_the_rule_turns_into_an_error(source: FlakySource) -> None:
    fd = os.open(source.mountpoint / "a.img", os.O_RDWR | os.O_DIRECT)
    source.fail("write a.img hang")
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        try:
            written = pool.submit(lambda: outcome(lambda: os.pwrite(fd, b"y" * 512, 0)))
            with pytest.raises(concurrent.futures.TimeoutError):
                written.result(0.3)
            source.fail("write a.img errno=ETIMEDOUT")
            assert written.result(10) == "ETIMEDOUT"
        finally:
            source.heal()
            os.close(fd)


def test_short_counts(source: FlakySource) -> None:
    source.fail("write a.img short=1000", "read a.img short=700")
    fd = os.open(source.mountpoint / "a.img", os.O_RDWR)
    assert os.pwrite(fd, b"y" * 4096, 0) == 1000
    direct = os.open(source.mountpoint / "a.img", os.O_RDONLY | os.O_DIRECT)
    assert outcome(lambda: os.pread(direct, 4096, 0)) == b"y" * 700
    source.heal()
    assert os.pread(direct, 4096, 0) == b"y" * 1000 + b"x" * 3096
    os.close(direct)
    os.close(fd)


def test_delay(source: FlakySource) -> None:
    source.fail("read a.img delay=0.4 errno=EIO")
    started = time.monotonic()
    assert outcome((source.mountpoint / "a.img").read_bytes) == "EIO"
    assert 0.4 <= time.monotonic() - started < 30


def test_it_behaves_like_nfs(source: FlakySource) -> None:
    """No RWF_NOWAIT, and direct I/O without alignment: what sets it apart from a local file system."""
    fd = os.open(source.mountpoint / "a.img", os.O_RDWR | os.O_DIRECT)
    assert os.pwrite(fd, b"unaligned", 3) == 9
    assert outcome(lambda: os.preadv(fd, [bytearray(512)], 0, os.RWF_NOWAIT)) in {"EOPNOTSUPP", "ENOTSUP", "EAGAIN"}
    os.close(fd)


def test_a_rule_that_means_nothing_is_told_in_the_log(source: FlakySource) -> None:
    source.fail("read a.img errno=EIO")
    assert outcome((source.mountpoint / "a.img").read_bytes) == "EIO"
    source.fail("read a.img errno=EOI")
    assert outcome((source.mountpoint / "a.img").read_bytes) == "EIO"
    wait_until(lambda: "errno=EOI" in source.log_text(), what="the log to name the word")
    source.fail("# nothing")
    assert (source.mountpoint / "a.img").read_bytes()


def test_it_ends_at_sigterm_even_while_a_file_is_open(source: FlakySource) -> None:
    fd = os.open(source.mountpoint / "a.img", os.O_RDONLY)
    source.process.send_signal(signal.SIGTERM)
    assert source.process.wait(10) == 0
    assert mounted_at(source.mountpoint) == []
    outcome(lambda: os.close(fd))  # ENOTCONN


@pytest.mark.parametrize("missing", ["directory", "mountpoint"])
def test_it_says_what_is_missing(tmp_path: Path, missing: str) -> None:
    for name in {"directory", "mountpoint"} - {missing}:
        (tmp_path / name).mkdir()
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "iohang_fuse.flaky",
            tmp_path / "directory",
            tmp_path / "mountpoint",
            tmp_path / "trigger",
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 32
    assert done.stderr == (f"iohang-flaky: {missing.upper()} {tmp_path / missing} does not exist; name a directory\n")


def test_an_outage_of_an_image_whose_name_is_not_utf8(source: FlakySource, tmp_path: Path) -> None:
    """The mount above names it in its log, and holds it like any other."""
    path = os.fsencode(tmp_path / "mnt") + b"/\xff\xfe.img"
    with Mount(
        source.mountpoint, tmp_path / "mnt", "monitor=none", "interval=0.1", log=tmp_path / "mount.log"
    ) as mount:
        fd = os.open(path, os.O_CREAT | os.O_RDWR)
        source.fail("data *.img errno=EIO")
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            try:
                written = pool.submit(os.pwrite, fd, b"data", 0)
                wait_until(lambda: r"\xff\xfe.img: write failed" in mount.log_text(), what="the hang in the log")
            finally:
                source.heal()
            assert written.result(10) == 4
        os.close(fd)


def test_errno_names_are_the_systems(source: FlakySource) -> None:
    for name in ("EIO", "ESTALE", "ENOSPC", "ENOTCONN", "EHOSTDOWN"):
        source.fail(f"open a.img errno={name}")
        with pytest.raises(OSError, match=r"\[Errno") as failed:
            os.open(source.mountpoint / "a.img", os.O_RDONLY)
        assert failed.value.errno == getattr(errno, name)


# ---- stale handles


@pytest.mark.parametrize(
    "work",
    [
        lambda fd: os.pread(fd, 1, 0),
        lambda fd: os.pwrite(fd, b"y", 0),
        os.fsync,
        lambda fd: os.ftruncate(fd, 1),
        os.close,  # flush
    ],
)
def test_a_stale_handle_is_dead_for_good(source: FlakySource, work: Callable[[int], Any]) -> None:
    """Whatever is done with it, and though the rule is gone; the file opened anew works."""
    path = source.mountpoint / "a.img"
    fd = os.open(path, os.O_RDWR | os.O_DIRECT)
    untouched = os.open(path, os.O_RDWR)
    source.fail("fsync a.img stale")
    assert outcome(lambda: os.fsync(fd)) == "ESTALE"
    source.heal()
    assert outcome(lambda: work(fd)) == "ESTALE"
    if work is not os.close:
        assert os.fstat(fd).st_size == 8192
        outcome(lambda: os.close(fd))
    assert os.pwrite(untouched, b"z", 0) == 1
    os.fsync(untouched)
    os.close(untouched)
    assert write(path, b"new") == 3
    assert path.read_bytes()[:4] == b"newx"


@pytest.mark.parametrize("operation", ["read", "write", "fsync", "flush"])
def test_each_operation_by_handle_can_find_it_stale(source: FlakySource, operation: str) -> None:
    files, work = OPERATIONS[operation]
    source.fail(f"{operation} {files} stale")
    assert outcome(lambda: work(source.mountpoint)) == "ESTALE"
    source.heal()
    assert outcome(lambda: (work(source.mountpoint), None)[1]) is None


# ---- chance


def test_with_the_same_seed_the_same_calls_fail(tmp_path: Path) -> None:
    """By default the seed is another each time, and the log says which."""
    (tmp_path / "real").mkdir()
    (tmp_path / "real/a.img").write_bytes(b"x")
    (tmp_path / "trigger").write_text("fsync * errno=EIO chance=0.5\n")

    def outcomes(name: str, seed: int | None) -> tuple[list[str | None], str]:
        with FlakySource(
            tmp_path / "real", tmp_path / "source", tmp_path / "trigger", tmp_path / name, seed=seed
        ) as flaky:
            path = flaky.mountpoint / "a.img"
            return [outcome(lambda: fsync(path)) for _ in range(32)], flaky.log_text()

    first, said = outcomes("log1", None)
    assert set(first) == {"EIO", None}
    seed = int(said.rsplit("; seed ", 1)[1].split()[0])
    assert outcomes("log2", seed)[0] == first
    assert outcomes("log3", seed + 1)[0] != first


def test_with_the_same_seed_the_same_of_many_at_once_fail(tmp_path: Path) -> None:
    """rehearsing.rst: "the same dice again, for the same calls in the same order": a guest has a queue of them."""
    count = 64
    (tmp_path / "real").mkdir()
    (tmp_path / "real/a.img").write_bytes(bytes(count * BLOCK))
    (tmp_path / "trigger").write_text("read,write * errno=EIO chance=0.5\n")

    def failed(name: str, kind: str) -> list[int]:
        with FlakySource(
            tmp_path / "real", tmp_path / "source", tmp_path / "trigger", tmp_path / name, seed=7
        ) as flaky:
            client = Client(flaky.mountpoint / "a.img", kind, count)
            client.run()
            return [number for number, request in enumerate(client.requests) if request.result != BLOCK]

    for kind in ("read", "write"):
        first = failed(f"{kind}1", kind)
        assert 10 < len(first) < 54
        assert [failed(f"{kind}{again}", kind) for again in range(2, 5)] == [first] * 3


# ---- the page cache


def real(source: FlakySource) -> bytes:
    """a.img as DIRECTORY has it."""
    return (source.mountpoint.parent / "real/a.img").read_bytes()


def test_a_write_is_acknowledged_from_memory(caching: FlakySource) -> None:
    """Reads see it, stat shows the size, DIRECTORY has nothing until the fsync."""
    path = caching.mountpoint / "a.img"
    fd = os.open(path, os.O_RDWR)
    other = os.open(path, os.O_RDONLY)
    os.pwrite(fd, b"y" * 4096, 8000)
    os.pwrite(fd, b"z", 20000)
    assert real(caching) == b"x" * 8192
    assert os.stat(path).st_size == os.fstat(other).st_size == 20001
    expected = b"x" * 8000 + b"y" * 4096 + bytes(20000 - 12096) + b"z"
    assert os.pread(other, 30000, 0) == expected
    assert os.pread(other, 5, 7998) == b"xxyyy"
    os.fsync(fd)
    assert real(caching) == expected
    assert os.stat(path).st_size == 20001
    (caching.mountpoint.parent / "real/a.img").write_bytes(b"another's")
    os.fsync(fd)
    assert os.pread(other, 9, 0) == real(caching) == b"another's"  # which nothing writes over: it is clean here
    os.close(other)
    os.close(fd)


def test_the_last_close_writes_back(caching: FlakySource) -> None:
    path = caching.mountpoint / "a.img"
    fds = [os.open(path, os.O_RDWR) for _ in range(2)]
    os.pwrite(fds[0], b"y", 0)
    os.close(fds[0])
    assert os.pread(fds[1], 1, 0) == b"y"
    assert real(caching)[:1] == b"x"
    os.close(fds[1])
    wait_until(lambda: real(caching)[:1] == b"y")


def test_background_writeback(tmp_path: Path) -> None:
    """Not at once, but some time later; again for what is written after that."""
    (tmp_path / "real").mkdir()
    (tmp_path / "real/a.img").write_bytes(b"x")
    with FlakySource(
        tmp_path / "real",
        tmp_path / "source",
        tmp_path / "trigger",
        tmp_path / "log",
        page_cache=True,
        writeback_every_s=0.5,
    ) as flaky:
        fd = os.open(flaky.mountpoint / "a.img", os.O_RDWR)
        for data in (b"1", b"2"):
            started = time.monotonic()
            os.pwrite(fd, data, 0)
            wait_until(lambda data=data: real(flaky) == data, 5)  # type: ignore[misc]
            assert time.monotonic() - started > 0.1
            time.sleep(0.6)  # so that nothing is under way any more
        flaky.fail("writeback * errno=EIO")
        os.pwrite(fd, b"3", 0)
        wait_until(lambda: "a.img: writeback failed, 1 bytes are lost" in flaky.log_text())
        assert os.pread(fd, 1, 0) == b"2"
        assert outcome(lambda: os.fsync(fd)) == "EIO"
        os.close(fd)


def test_at_the_end_of_the_server_all_is_written_back(caching: FlakySource) -> None:
    fd = os.open(caching.mountpoint / "a.img", os.O_RDWR)
    os.pwrite(fd, b"y", 0)
    caching.process.send_signal(signal.SIGTERM)
    assert caching.process.wait(10) == 0
    assert real(caching)[:2] == b"yx"
    outcome(lambda: os.close(fd))


def test_a_writeback_that_hangs_does_not_keep_the_server_from_its_end(caching: FlakySource) -> None:
    caching.fail("writeback * hang")
    write(caching.mountpoint / "a.img")
    caching.process.send_signal(signal.SIGTERM)
    assert caching.process.wait(10) == 0
    assert real(caching)[:1] == b"x"


@pytest.mark.parametrize("way", ["handle", "path", "open"])
def test_truncation_takes_its_place_among_the_writes(caching: FlakySource, way: str) -> None:
    path = caching.mountpoint / "a.img"
    fd = os.open(path, os.O_RDWR)
    os.pwrite(fd, b"y" * 4000, 6000)
    if way == "handle":
        os.ftruncate(fd, 7000)
    elif way == "path":
        os.truncate(path, 7000)
    else:
        os.close(os.open(path, os.O_WRONLY | os.O_TRUNC))
    left = b"" if way == "open" else b"x" * 6000 + b"y" * 1000
    assert os.stat(path).st_size == len(left)
    os.pwrite(fd, b"z" * 10, 8000)
    os.ftruncate(fd, 9000)
    expected = left.ljust(8000, b"\0") + b"z" * 10 + bytes(990)
    assert os.pread(fd, 10000, 0) == expected
    os.fsync(fd)
    assert real(caching) == expected
    os.close(fd)


def test_the_lie(caching: FlakySource) -> None:
    """A failed writeback is told once. After that fsync answers 0, and the data is gone."""
    path = caching.mountpoint / "a.img"
    fd = os.open(path, os.O_RDWR)
    os.pwrite(fd, b"y" * 8193, 0)
    caching.fail("writeback *.img errno=EIO")
    assert outcome(lambda: os.fsync(fd)) == "EIO"
    assert outcome(lambda: os.fsync(fd)) is None
    caching.heal()
    assert outcome(lambda: os.fsync(fd)) is None
    assert real(caching) == os.pread(fd, 10000, 0) == b"x" * 8192
    assert os.stat(path).st_size == 8192
    os.pwrite(fd, b"z", 0)
    os.fsync(fd)
    assert real(caching)[:2] == b"zx"
    os.close(fd)


def test_what_is_lost_is_seen_no_more(caching: FlakySource) -> None:
    """The kernel, too, has no page left of it, though neither size nor times of the file have changed."""
    fd = os.open(caching.mountpoint / "a.img", os.O_RDWR)
    os.pwrite(fd, b"y" * 4096, 0)
    assert os.pread(fd, 1, 0) == b"y"
    caching.fail("writeback * errno=EIO")
    assert outcome(lambda: os.fsync(fd)) == "EIO"
    assert os.pread(fd, 1, 0) == b"x"
    os.close(fd)


def test_each_handle_is_told_once(caching: FlakySource) -> None:
    """Whether it wrote or not; but not one that is opened when somebody has seen the error."""
    path = caching.mountpoint / "a.img"
    fds = [os.open(path, flags) for flags in (os.O_RDWR, os.O_WRONLY, os.O_RDONLY)]
    os.pwrite(fds[0], b"y", 0)
    caching.fail("writeback * errno=ENOSPC")
    for fd in fds:
        assert [outcome(lambda fd=fd: os.fsync(fd)) for _ in range(2)] == ["ENOSPC", None]  # type: ignore[misc]
    late = os.open(path, os.O_RDWR)
    os.fsync(late)
    for fd in [*fds, late]:
        os.close(fd)


def test_an_error_that_nobody_has_seen_waits_for_the_next_to_open_the_file(caching: FlakySource) -> None:
    path = caching.mountpoint / "a.img"
    caching.fail("writeback * errno=EIO")
    write(path)
    wait_until(lambda: "writeback failed" in caching.log_text())
    caching.heal()
    assert outcome(lambda: fsync(path)) == "EIO"
    assert outcome(lambda: fsync(path)) is None
    assert real(caching) == b"x" * 8192


@pytest.mark.parametrize("flag", [os.O_DSYNC, os.O_SYNC])
def test_a_synchronous_write_is_on_disk_or_fails(caching: FlakySource, flag: int) -> None:
    """It takes the file's other dirty data with it, and gives its handle the error: once."""
    path = caching.mountpoint / "a.img"
    lazy = os.open(path, os.O_RDWR)
    synchronous = os.open(path, os.O_RDWR | flag)
    os.pwrite(lazy, b"1", 0)
    os.pwrite(synchronous, b"2", 1)
    assert real(caching)[:3] == b"12x"
    caching.fail("writeback * errno=EIO")
    os.pwrite(lazy, b"3", 0)
    assert outcome(lambda: os.pwrite(synchronous, b"4", 1)) == "EIO"
    caching.heal()
    assert real(caching)[:3] == b"12x"
    assert outcome(lambda: os.fsync(synchronous)) is None
    assert outcome(lambda: os.pwrite(synchronous, b"5", 1)) == 1
    assert [outcome(lambda: os.fsync(lazy)) for _ in range(2)] == ["EIO", None]
    assert real(caching)[:3] == b"15x"
    os.close(synchronous)
    os.close(lazy)


def test_a_writeback_that_loses_some_bytes(caching: FlakySource) -> None:
    """What does not overlap them is written; so is all of it where nothing overlaps."""
    fd = os.open(caching.mountpoint / "a.img", os.O_RDWR)
    caching.fail("writeback a.img errno=EIO bytes=4096-8191")
    os.pwrite(fd, b"1" * 100, 0)
    assert outcome(lambda: os.fsync(fd)) is None
    os.pwrite(fd, b"2" * 200, 4000)
    os.pwrite(fd, b"3" * 200, 8100)
    assert [outcome(lambda: os.fsync(fd)) for _ in range(2)] == ["EIO", None]
    expected = b"1" * 100 + b"x" * 3900 + b"2" * 96 + b"x" * 4096 + b"3" * 108
    assert real(caching) == os.pread(fd, 10000, 0) == expected
    os.close(fd)


def test_a_writeback_that_hangs(caching: FlakySource) -> None:
    """The fsync waits, and the file can be read meanwhile; a delay is the same with an end of its own."""
    fd = os.open(caching.mountpoint / "a.img", os.O_RDWR)
    os.pwrite(fd, b"y", 0)
    caching.fail("writeback a.img hang")
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        try:
            synced = pool.submit(os.fsync, fd)
            with pytest.raises(concurrent.futures.TimeoutError):
                synced.result(0.3)
            assert os.pread(fd, 2, 0) == b"yx"
            assert real(caching)[:1] == b"x"
        finally:
            caching.heal()
        synced.result(10)
    assert real(caching)[:1] == b"y"
    os.pwrite(fd, b"z", 0)
    caching.fail("writeback a.img delay=0.4")
    started = time.monotonic()
    os.fsync(fd)
    assert 0.4 <= time.monotonic() - started < 30
    assert real(caching)[:1] == b"z"
    os.close(fd)


def test_a_writeback_that_fails_by_chance(caching: FlakySource) -> None:
    fd = os.open(caching.mountpoint / "a.img", os.O_RDWR)
    caching.fail("writeback * errno=EIO chance=0.5")
    seen = set()
    for number in range(64):
        before = real(caching)[:1]
        os.pwrite(fd, bytes([number]), 0)
        answer = outcome(lambda: os.fsync(fd))
        assert real(caching)[:1] == (before if answer else bytes([number]))
        seen.add(answer)
    assert seen == {"EIO", None}
    os.close(fd)


def test_an_fsync_that_fails_by_itself_loses_nothing(caching: FlakySource) -> None:
    fd = os.open(caching.mountpoint / "a.img", os.O_RDWR)
    os.pwrite(fd, b"y", 0)
    caching.fail("fsync * errno=EIO")
    assert outcome(lambda: os.fsync(fd)) == "EIO"
    assert real(caching)[:1] == b"x"
    caching.heal()
    os.fsync(fd)
    assert real(caching)[:1] == b"y"
    os.close(fd)


def test_writeback_that_fails_by_itself_is_told_too(caching: FlakySource, tmp_path: Path) -> None:
    """DIRECTORY is a real file system, which may be full."""
    with FlakySource(tmp_path / "real", tmp_path / "small", tmp_path / "none", tmp_path / "log2") as beneath:
        beneath.trigger.write_text("write a.img errno=EDQUOT\n")
        with FlakySource(
            tmp_path / "small", tmp_path / "upper", tmp_path / "none2", tmp_path / "log3", page_cache=True
        ) as upper:
            fd = os.open(upper.mountpoint / "a.img", os.O_RDWR)
            os.pwrite(fd, b"y", 0)
            assert [outcome(lambda: os.fsync(fd)) for _ in range(2)] == ["EDQUOT", None]
            os.close(fd)
    assert real(caching) == b"x" * 8192


def test_readers_see_no_gap_between_memory_and_disk(tmp_path: Path) -> None:
    """Data is in the one or in the other at each moment, and so is the size that it gives the file."""
    (tmp_path / "real").mkdir()
    with FlakySource(
        tmp_path / "real",
        tmp_path / "source",
        tmp_path / "trigger",
        tmp_path / "log",
        page_cache=True,
        writeback_every_s=0.001,
    ) as flaky:
        fd = os.open(flaky.mountpoint / "a.img", os.O_RDWR | os.O_CREAT)
        for number in range(1000):
            os.pwrite(fd, b"%08d" % number, number)
            for _ in range(3):
                assert os.fstat(fd).st_size == number + 8
                assert os.pread(fd, 8, number) == b"%08d" % number
        os.close(fd)


def test_memory_for_dirty_data_has_a_limit(caching: FlakySource) -> None:
    """Beyond it a write waits for writeback."""
    fd = os.open(caching.mountpoint / "a.img", os.O_RDWR)
    chunk = b"y" * (1 << 20)
    for number in range(64):
        os.pwrite(fd, chunk, number << 20)
    assert len(real(caching)) == 8192
    os.pwrite(fd, chunk, 64 << 20)
    assert len(real(caching)) > 64 << 20
    os.close(fd)


def test_a_new_file_has_nobody_elses_errors(caching: FlakySource) -> None:
    """Also where it gets the inode number of one that was deleted before anybody had seen its error."""
    path = caching.mountpoint / "new"
    caching.fail("writeback * errno=EIO")
    path.write_bytes(b"y")
    wait_until(lambda: "writeback failed" in caching.log_text())
    caching.heal()
    path.unlink()
    for number in range(8):
        fd = os.open(caching.mountpoint / f"new{number}", os.O_RDWR | os.O_CREAT | os.O_EXCL)
        os.pwrite(fd, b"z", 0)
        os.fsync(fd)
        os.close(fd)


def test_without_a_page_cache_a_rule_for_writeback_has_no_effect(source: FlakySource) -> None:
    source.fail("writeback * errno=EIO")
    fd = os.open(source.mountpoint / "a.img", os.O_RDWR)
    os.pwrite(fd, b"y", 0)
    assert real(source)[:1] == b"y"
    os.fsync(fd)
    os.close(fd)
    assert "no operation" not in source.log_text()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--writeback-every", "0"], "'0' is no number of seconds above 0"),
        (["--writeback-every", "nan"], "'nan' is no number of seconds above 0"),
        (["--writeback-every", "soon"], "--writeback-every"),
        (["--seed", "x"], "--seed"),
    ],
)
def test_words_that_mean_nothing(tmp_path: Path, words: list[str], says: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "iohang_fuse.flaky", tmp_path, tmp_path, tmp_path / "trigger", *words],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert says in done.stderr
