"""The server itself: nothing blocks its event loop, nothing leaks, and it does not run out of descriptors."""

from __future__ import annotations

import concurrent.futures
import os
import re
import resource
import stat
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

import pytest

from tests.harness import FlakySource, Mount, wait_until
from tests.mount.callers import ALICE, as_user

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path


@pytest.fixture
def own(place: Path, tmp_path: Path) -> Iterator[Mount]:
    """A mount that no other test uses; its SOURCE is beside it."""
    with _mount(place / f"own-{tmp_path.name}", tmp_path) as mount:
        yield mount


@contextmanager
def _mount(folder: Path, tmp_path: Path) -> Iterator[Mount]:
    (folder / "source").mkdir(parents=True)
    with Mount(folder / "source", folder / "mnt", "allow_other", "monitor=none", log=tmp_path / "log") as mount:
        yield mount
        assert "a bug in" not in mount.log_text()


def every_operation(directory: Path) -> None:
    """One of each, through whatever *directory* is on."""
    directory = directory / "work"
    directory.mkdir()
    (directory / "file").write_bytes(b"x" * 5000)
    fd = os.open(directory / "file", os.O_RDWR)
    os.pread(fd, 1000, 0)
    os.pwrite(fd, b"y", 4000)
    os.ftruncate(fd, 4500)
    os.fsync(fd)
    os.fchmod(fd, 0o600)
    os.fstat(fd)
    os.close(fd)
    os.chown(directory / "file", ALICE.uid, ALICE.gid)
    os.utime(directory / "file", ns=(1, 2))
    os.truncate(directory / "file", 100)
    os.setxattr(directory / "file", "user.x", b"y")
    os.getxattr(directory / "file", "user.x")
    os.listxattr(directory / "file")
    os.removexattr(directory / "file", "user.x")
    os.access(directory / "file", os.R_OK)
    os.link(directory / "file", directory / "hard")
    (directory / "soft").symlink_to("file")
    os.readlink(directory / "soft")
    os.mkfifo(directory / "fifo")
    os.mknod(directory / "device", stat.S_IFCHR | 0o600, os.makedev(1, 3))
    (directory / "folder").mkdir()
    os.rename(directory / "hard", directory / "folder/moved")
    fd = os.open(directory, os.O_RDONLY)
    os.listdir(fd)
    os.fsync(fd)
    os.close(fd)
    os.statvfs(directory)
    for name in ("folder/moved", "soft", "fifo", "device", "file"):
        os.unlink(directory / name)
    (directory / "folder").rmdir()
    directory.rmdir()


def test_no_system_call_on_source_is_made_by_the_event_loop(
    own: Mount, tmp_path: Path, program: Callable[..., str], engine: str
) -> None:
    """Strace shows who calls: the main thread is the event loop, and knows /dev/fuse and its wake-ups only.

    And reads of what is in the page cache, which do not wait: after cachestat(2), and with RWF_NOWAIT.
    """
    log = tmp_path / "trace"
    strace = subprocess.Popen(
        [program("strace", "strace"), "-f", "-y", "-e", "trace=file,desc,clone3", "-o", str(log), "-p", str(own.pid)],
        stderr=subprocess.PIPE,
    )
    assert strace.stderr is not None
    strace.stderr.readline()
    every_operation(own.mountpoint)
    as_user(ALICE, lambda: os.listdir(own.mountpoint))
    strace.terminate()
    strace.wait()
    strace.stderr.close()
    source = str(own.mountpoint.parent / "source")
    loop, threads = [], []
    for line in log.read_text(errors="replace").splitlines():
        thread, call = line.split(maxsplit=1)
        (loop if int(thread) == own.pid else threads).append(call)
    of_source = re.compile(rf"{re.escape(source)}|/proc/self/fd|^\w*(open|stat|access|xattr)\w*\(")
    assert not [call for call in loop if of_source.search(call) and not re.match(r"preadv2\(.*, RWF_NOWAIT\)", call)]
    assert [call for call in loop if "/dev/fuse" in call]
    names = {call.partition("(")[0] for call in threads if of_source.search(call)}
    assert {
        "openat", "mkdirat", "unlinkat", "renameat", "linkat", "symlinkat", "readlinkat", "utimensat", "pread64",
        "fsync", "ftruncate",
    } <= names  # fmt: skip
    assert ("pwrite64" in names) is (engine == "threads"), "on the ring it is no system call"


# ---- what hangs, hangs alone


@pytest.fixture
def flaky(tmp_path: Path) -> Iterator[tuple[FlakySource, Path]]:
    real = tmp_path / "real"
    for folder in ("one", "two"):
        (real / folder).mkdir(parents=True)
        for name in ("a.img", "b.img"):
            (real / folder / name).write_bytes(b"x" * 8192)
    with (
        FlakySource(real, tmp_path / "source", tmp_path / "trigger", tmp_path / "flaky.log") as source,
        Mount(
            tmp_path / "source",
            tmp_path / "mnt",
            "monitor=none",
            "timeout=60",
            "interval=0.2",
            "blocked_after=0.5",
            "attr_timeout=0",
            log=tmp_path / "mount.log",
        ) as mount,
    ):
        yield source, mount.mountpoint
        source.heal()


def _at_once(work: Callable[[], object], pool: concurrent.futures.Executor, what: str) -> None:
    """*work* is done within 15 s, and it is known what was not."""
    try:
        pool.submit(work).result(timeout=15)
    except concurrent.futures.TimeoutError:
        pytest.fail(f"waited for what hangs: {what}")


@pytest.mark.parametrize("operation", ["getattr", "setattr", "open", "lookup", "access", "getxattr", "unlink", "read"])
def test_one_operation_that_hangs_stops_nothing_else(flaky: tuple[FlakySource, Path], operation: str) -> None:
    """P7: thirty calls that do not return, on one file, and everything else answers."""
    source, mount = flaky
    victim = mount / "one/a.img"
    calls: dict[str, Callable[[], object]] = {
        "getattr": victim.stat,
        "setattr": lambda: victim.chmod(0o600),
        "open": victim.read_bytes,
        "lookup": victim.stat,
        "access": lambda: os.access(victim, os.W_OK),
        "getxattr": lambda: _ignoring(lambda: os.getxattr(victim, "user.x")),
        "unlink": lambda: _ignoring(victim.unlink),
        "read": victim.read_bytes,
    }
    with concurrent.futures.ThreadPoolExecutor(40) as stuck, concurrent.futures.ThreadPoolExecutor(4) as pool:
        try:
            source.fail(f"{operation} one/a.img hang")
            hanging = [stuck.submit(calls[operation]) for _ in range(30)]
            done, _ = concurrent.futures.wait(hanging, timeout=0.7)
            assert not done
            two = mount / "two"
            _at_once(lambda: sorted(os.listdir(two)), pool, "ls of another directory")
            _at_once((two / "a.img").read_bytes, pool, "a read")
            _at_once(lambda: (two / "b.img").write_bytes(b"y"), pool, "a write")
            _at_once((two / "new").touch, pool, "a create")
            _at_once(lambda: os.rename(two / "new", two / "newer"), pool, "a rename")
            _at_once((two / "newer").unlink, pool, "an unlink")
            _at_once(lambda: os.statvfs(mount), pool, "df")
            _at_once(mount.stat, pool, "stat of the mount point")
            assert not [one for one in hanging if one.done()]
        finally:
            source.heal()
        concurrent.futures.wait(hanging, timeout=20)
        assert all(one.done() for one in hanging)


def _ignoring(work: Callable[[], object]) -> None:
    with suppress(OSError):
        work()


def test_stat_and_ls_of_an_open_image_that_hangs(flaky: tuple[FlakySource, Path]) -> None:
    """P7: as on a hard mount, nothing about the image returns. Its attributes are known all the same."""
    source, mount = flaky
    image = mount / "one/a.img"
    fd = os.open(image, os.O_RDWR | os.O_DIRECT)
    os.fstat(fd)
    with concurrent.futures.ThreadPoolExecutor(4) as stuck, concurrent.futures.ThreadPoolExecutor(4) as pool:
        try:
            source.fail("* one/a.img hang")
            write = stuck.submit(os.pwrite, fd, b"z" * 8192, 8192)
            wait_until(lambda: "no answer from the storage" in _log(mount), what="the hang to be noticed")
            for _ in range(3):
                _at_once(lambda: os.fstat(fd), pool, "fstat")
                _at_once(image.stat, pool, "stat")
                _at_once(
                    lambda: subprocess.run(
                        ["ls", "-F", "--color=always", image.parent], check=True, capture_output=True
                    ),
                    pool,
                    "ls",
                )
            assert not write.done()
        finally:
            source.heal()
            concurrent.futures.wait([write], timeout=20)
            size = os.fstat(fd).st_size
            os.close(fd)
        assert write.result(0) == 8192
        assert size == 16384


def _log(mount: Path) -> str:
    return (mount.parent / "mount.log").read_text()


# ---- nothing leaks


def descriptors(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


def resident_kib(pid: int) -> int:
    with open(f"/proc/{pid}/status", encoding="ascii", errors="replace") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("VmRSS:"))


def test_descriptors_come_back_when_the_kernel_forgets(own: Mount) -> None:
    """One O_PATH descriptor for each inode that the kernel knows of, and none for what it does not."""
    source = own.mountpoint.parent / "source"
    for folder in range(20):
        (source / str(folder)).mkdir()
        for number in range(100):
            (source / str(folder) / str(number)).touch()
    before = descriptors(own.pid)
    subprocess.run(["find", own.mountpoint, "-size", "+1G"], check=True)
    assert descriptors(own.pid) > before + 1500

    def forgotten() -> bool:
        with open("/proc/sys/vm/drop_caches", "w", encoding="ascii") as file:
            file.write("2\n")
        return descriptors(own.pid) <= before + 5

    wait_until(forgotten, what="the descriptors to be closed")


def test_every_operation_gives_its_descriptors_back(own: Mount) -> None:
    its_own = descriptors(own.pid)
    every_operation(own.mountpoint)
    wait_until(lambda: descriptors(own.pid) <= its_own + 1, 5, "the first round's descriptors to be closed")
    before = descriptors(own.pid)
    for _ in range(20):
        every_operation(own.mountpoint)
    wait_until(lambda: descriptors(own.pid) <= before + 1, 5, "all descriptors to be closed")


def test_more_files_than_descriptors(own: Mount) -> None:
    """A tree with several times as many files as the server may open: the kernel is asked to forget in time, and nothing fails."""
    limit = 2000
    resource.prlimit(own.pid, resource.RLIMIT_NOFILE, (limit, limit))
    source = own.mountpoint.parent / "source"
    for folder in range(6):
        (source / str(folder)).mkdir()
        for number in range(1000):
            (source / str(folder) / str(number)).touch()
    (source / "large").mkdir()
    for number in range(3000):
        (source / "large" / str(number)).touch()
    with (own.mountpoint / "0/500").open("r+b") as file:
        assert len(os.listdir(own.mountpoint / "large")) == 3000
        for _ in range(2):
            found = subprocess.run(
                ["find", own.mountpoint, "-type", "f", "-mtime", "-9"], check=False, capture_output=True, text=True
            )
            assert not found.stderr
            assert len(found.stdout.splitlines()) == 9000
            file.write(b"still here")
            file.flush()
        # Open images are not forgotten: their names would show as deleted.
        assert os.readlink(f"/proc/self/fd/{file.fileno()}") == str(own.mountpoint / "0/500")
    assert descriptors(own.pid) < limit


@pytest.mark.parametrize("count", [3000, pytest.param(20_000, marks=pytest.mark.slow)])
def test_memory_is_stable_over_many_files(own: Mount, count: int) -> None:
    """Made and unlinked, two at a time; the first quarter is warming up."""
    script = (
        "import os, sys\n"
        "os.chdir(sys.argv[1])\n"
        "for n in range(int(sys.argv[2])):\n"
        "    name = f'{sys.argv[3]}-{n}'\n"
        "    os.close(os.open(name, os.O_CREAT | os.O_EXCL | os.O_WRONLY)) if n % 8 == 0 else os.mknod(name)\n"
        "    os.unlink(name)\n"
    )

    def make(count: int) -> None:
        workers = [
            subprocess.Popen([sys.executable, "-c", script, own.mountpoint, str(count // 2), mark]) for mark in "ab"
        ]
        assert [worker.wait() for worker in workers] == [0, 0]

    make(count // 4)
    before = resident_kib(own.pid)
    make(count - count // 4)
    assert resident_kib(own.pid) - before < 3000
    wait_until(lambda: descriptors(own.pid) < 25, 5, "the descriptors to be closed")


# ---- as users see it


def test_find_and_ls_over_10000_entries(own: Mount, record_property: Callable[[str, object], None]) -> None:
    """For the record, with a bound that only a quadratic listing would reach."""
    source = own.mountpoint.parent / "source"
    for number in range(10_000):
        (source / f"file-{number:05d}").touch()
    for name, command in (("find", ["find", "."]), ("find with stat", ["find", ".", "-size", "-1G"])):
        started = time.monotonic()
        done = subprocess.run(command, cwd=own.mountpoint, check=True, capture_output=True)
        record_property(name, round(time.monotonic() - started, 2))
        assert done.stdout.count(b"file-") == 10_000
        assert time.monotonic() - started < 20
