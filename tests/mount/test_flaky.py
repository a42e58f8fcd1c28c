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
    assert 0.4 <= time.monotonic() - started < 3


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
    assert done.returncode == 1
    assert done.stderr == f"iohang-flaky: {tmp_path / missing} is not a directory\n"


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
