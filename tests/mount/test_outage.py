"""Outages on the real mount: a flaky source beneath, a consumer above, and the bytes compared in the source itself."""

from __future__ import annotations

import concurrent.futures
import errno
import json
import os
import re
import signal
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.harness import FlakySource, Mount, wait_until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

BLOCK = 4096


class Site:
    """A directory, a flaky source on it, and mounts of that."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.real = folder / "real"
        self.real.mkdir()
        self.flaky = FlakySource(self.real, folder / "flaky", folder / "trigger", folder / "flaky.log")
        self.mounts: list[Mount] = []
        self.descriptors: list[int] = []

    def mount(self, *options: str) -> Mount:
        number = len(self.mounts)
        mount = Mount(
            self.folder / "flaky", self.folder / f"mnt{number}", *options, log=self.folder / f"mount{number}.log"
        )
        self.mounts.append(mount)
        return mount

    def image(self, name: str = "vm.img", size: int = 64 * BLOCK) -> bytes:
        content = os.urandom(size)
        (self.real / name).write_bytes(content)
        return content

    def open(self, name: str = "vm.img", flags: int = os.O_RDWR | os.O_DIRECT) -> int:
        fd = os.open(self.mounts[0].mountpoint / name, flags)
        self.descriptors.append(fd)
        return fd

    def end(self) -> None:
        self.flaky.heal()
        for fd in self.descriptors:
            os.close(fd)
        for mount in self.mounts:
            mount.__exit__()
        self.flaky.__exit__()


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    site = Site(tmp_path)
    try:
        yield site
    finally:
        site.end()


@pytest.fixture
def worker() -> Iterator[concurrent.futures.ThreadPoolExecutor]:
    with concurrent.futures.ThreadPoolExecutor(600) as pool:
        yield pool


def aligned(data: bytes) -> memoryview:
    """*data* in memory that O_DIRECT takes on any file system."""
    import mmap  # noqa: PLC0415

    area = mmap.mmap(-1, max(len(data), mmap.PAGESIZE))
    area[: len(data)] = data
    return memoryview(area)[: len(data)]


BUSY_S = 10.0
"""What a machine that is busy otherwise may add, and less than any timeout that must not count: 30 s, or the default's 60."""


def timed(call: Callable[[], object]) -> tuple[object, float]:
    """The result, or the errno, and how long that took."""
    began = time.monotonic()
    result: object
    try:
        result = call()
    except OSError as error:
        result = error.errno
    return result, time.monotonic() - began


CALLS: dict[str, Callable[[int, memoryview], object]] = {
    "read": lambda fd, block: os.preadv(fd, [aligned(bytes(len(block)))], 0),
    "write": lambda fd, block: os.pwrite(fd, block, 0),
    "fsync": lambda fd, _block: os.fsync(fd),
}


@pytest.mark.parametrize("operation", CALLS)
@pytest.mark.parametrize("name", ["EIO", "ETIMEDOUT", "ESTALE", "ENOTCONN", "EREMOTEIO"])
def test_masking(site: Site, worker: concurrent.futures.Executor, operation: str, name: str) -> None:
    """P1: "A request that meets a transient error is answered only when it succeeds" - the consumer sees a pause."""
    site.image()
    mount = site.mount("interval=0.2", "timeout=30")
    fd = site.open()
    block = aligned(os.urandom(BLOCK))
    site.flaky.fail(f"{operation} vm.img errno={name}")
    pending = worker.submit(timed, lambda: CALLS[operation](fd, block))
    wait_until(lambda: f"failed with {name}" in mount.log_text(), what="the hang's begin in the log")
    assert not pending.done()
    time.sleep(0.7)
    site.flaky.heal()
    result, took_s = pending.result(timeout=60)
    assert result in {BLOCK, None}
    assert 0.7 <= took_s < 0.7 + BUSY_S
    if operation == "write":
        assert (site.real / "vm.img").read_bytes()[:BLOCK] == bytes(block)
    wait_until(lambda: "recovered after" in mount.log_text(), what="the hang's end in the log")


@pytest.mark.parametrize("operation", CALLS)
def test_given_up_at_the_deadline(site: Site, operation: str) -> None:
    """P1: "... or when its own timeout has passed"; section 4: "`timeout_errno` chooses the answer"."""
    site.image()
    site.mount("interval=0.2", "timeout=1")
    fd = site.open()
    site.flaky.fail(f"{operation} vm.img errno=ETIMEDOUT")
    result, took_s = timed(lambda: CALLS[operation](fd, aligned(bytes(BLOCK))))
    assert result == errno.EIO
    assert 1 <= took_s < 1 + BUSY_S


def test_enospc_pauses_a_guest(site: Site) -> None:
    """Section 4: "`timeout_errno` chooses the answer: `EIO`, or `ENOSPC`", and again while the image is timed out."""
    site.image()
    mount = site.mount("interval=0.2", "timeout=4", "timeout_errno=ENOSPC")
    fd = site.open()
    site.flaky.fail("data vm.img errno=EIO")
    assert timed(lambda: os.pwrite(fd, aligned(bytes(BLOCK)), 0))[0] == errno.ENOSPC
    result, took_s = timed(lambda: os.pwrite(fd, aligned(bytes(BLOCK)), 0))
    assert result == errno.ENOSPC
    assert took_s < 3, "section 4: timed out: new failures are answered at once"
    assert "timed out" in mount.log_text()
    site.flaky.heal()
    wait_until(lambda: "works again" in mount.log_text(), what="the probe to notice")
    assert os.pwrite(fd, aligned(b"x" * BLOCK), 0) == BLOCK
    assert (site.real / "vm.img").read_bytes()[:BLOCK] == b"x" * BLOCK


def test_holds_again_after_a_time_out(site: Site, worker: concurrent.futures.Executor) -> None:
    """Section 4: timed out "until an attempt succeeds": the next outage is held like the first one."""
    site.image()
    mount = site.mount("interval=0.2", "timeout=5")
    fd = site.open()
    site.flaky.fail("data vm.img errno=EIO")
    assert timed(lambda: os.pwrite(fd, aligned(bytes(BLOCK)), 0))[0] == errno.EIO
    site.flaky.heal()
    wait_until(lambda: "works again" in mount.log_text(), what="the probe to notice")
    site.flaky.fail("data vm.img errno=EIO")
    pending = worker.submit(timed, lambda: os.pwrite(fd, aligned(bytes(BLOCK)), 0))
    time.sleep(0.5)
    site.flaky.heal()
    assert pending.result(timeout=60)[0] == BLOCK


def test_timeout_zero_passes_errors_on(site: Site) -> None:
    """Section 4: "`0` turns holding off (every error is passed on)"."""
    site.image()
    mount = site.mount("timeout=0")
    fd = site.open()
    site.flaky.fail("data vm.img errno=ESTALE")
    for call in CALLS.values():
        result, took_s = timed(lambda call=call: call(fd, aligned(bytes(BLOCK))))  # type: ignore[misc]
        assert result == errno.ESTALE
        assert took_s < BUSY_S
    assert "held since" not in mount.log_text()


def test_timeout_inf_holds_until_recovery(site: Site, worker: concurrent.futures.Executor) -> None:
    """Section 4: "`inf` holds until recovery or an operator"."""
    site.image()
    mount = site.mount("timeout=inf", "interval=0.2")
    fd = site.open()
    site.flaky.fail("data vm.img errno=EIO")
    pending = worker.submit(timed, lambda: os.pwrite(fd, aligned(bytes(BLOCK)), 0))
    wait_until(lambda: "until it succeeds" in mount.log_text(), what="the hang's begin")
    time.sleep(1)
    site.flaky.heal()
    assert pending.result(timeout=60)[0] == BLOCK


def test_each_kind_has_its_timeout(site: Site, worker: concurrent.futures.Executor) -> None:
    """P2: "Read, write and fsync may each have their own timeout"; none moves another's deadline."""
    site.image()
    mount = site.mount("timeout=30", "read_timeout=0", "fsync_timeout=1", "interval=0.2")
    fd = site.open()
    site.flaky.fail("data vm.img errno=EIO")
    result, took_s = timed(lambda: os.fsync(fd))
    assert result == errno.EIO
    assert 1 <= took_s < 1 + BUSY_S
    site.flaky.heal()
    wait_until(lambda: "works again" in mount.log_text(), what="the end of the time-out")
    site.flaky.fail("data vm.img errno=EIO")
    # In this order: a synchronous write holds the kernel's lock on the inode, and an fsync would wait for that.
    write = worker.submit(timed, lambda: os.pwrite(fd, aligned(bytes(BLOCK)), 0))
    time.sleep(1.5)
    result, took_s = timed(lambda: CALLS["read"](fd, aligned(bytes(BLOCK))))
    assert (result, took_s < BUSY_S) == (errno.EIO, True)
    assert not write.done()
    site.flaky.heal()
    assert write.result(timeout=60)[0] == BLOCK


@pytest.mark.parametrize("name", ["ENOSPC", "EROFS", "EFBIG", "EACCES"])
def test_other_errors_are_passed_on(site: Site, name: str) -> None:
    """Section 4: only transient errnos are held; "ENOSPC and EDQUOT only where configured"."""
    site.image()
    mount = site.mount()
    fd = site.open()
    site.flaky.fail(f"write vm.img errno={name}")
    result, took_s = timed(lambda: os.pwrite(fd, aligned(bytes(BLOCK)), 0))
    assert result == getattr(errno, name)
    assert took_s < BUSY_S
    assert "held since" not in mount.log_text()


def test_configured_errors_are_held(site: Site, worker: concurrent.futures.Executor) -> None:
    """Section 4: ENOSPC is held where configured: `errors=EIO:ENOSPC`."""
    site.image()
    site.mount("errors=EIO:ENOSPC", "interval=0.2")
    fd = site.open()
    site.flaky.fail("write vm.img errno=ENOSPC")
    pending = worker.submit(timed, lambda: os.pwrite(fd, aligned(bytes(BLOCK)), 0))
    time.sleep(0.5)
    assert not pending.done()
    site.flaky.heal()
    assert pending.result(timeout=60)[0] == BLOCK


def test_short_read_is_continued(site: Site) -> None:
    """P6: "A short read or write in the middle of a file is continued, never passed on short"."""
    content = site.image(size=64 * BLOCK)
    site.mount()
    fd = site.open()
    site.flaky.fail("read vm.img short=1000")
    area = aligned(bytes(16 * BLOCK))
    assert os.preadv(fd, [area], BLOCK) == 16 * BLOCK
    assert bytes(area) == content[BLOCK : 17 * BLOCK]


def test_short_write_is_continued(site: Site) -> None:
    """P6: "A short read or write in the middle of a file is continued, never passed on short"."""
    content = site.image(size=64 * BLOCK)
    # Not direct: the kernel sends direct I/O to a FUSE source asynchronously, and makes EIO of a short write there.
    site.mount("direct=never")
    fd = site.open()
    site.flaky.fail("write vm.img short=1000")
    new = os.urandom(16 * BLOCK)
    assert os.pwrite(fd, aligned(new), 8 * BLOCK) == 16 * BLOCK
    assert (site.real / "vm.img").read_bytes() == content[: 8 * BLOCK] + new + content[24 * BLOCK :]


def test_half_a_write_is_written_again_whole(site: Site, worker: concurrent.futures.Executor) -> None:
    """P6: a write that fails half way is tried again whole, and its bytes are in SOURCE once, at their place."""
    content = site.image(size=64 * BLOCK)
    site.mount("interval=0.2")
    fd = site.open()
    new = os.urandom(16 * BLOCK)
    site.flaky.fail(f"write vm.img errno=EIO bytes={12 * BLOCK}-{13 * BLOCK}", "write vm.img short=4096")
    pending = worker.submit(os.pwrite, fd, aligned(new), 8 * BLOCK)
    time.sleep(0.5)
    assert not pending.done()
    site.flaky.heal()
    assert pending.result(timeout=60) == len(new)
    assert (site.real / "vm.img").read_bytes() == content[: 8 * BLOCK] + new + content[24 * BLOCK :]


def test_append_is_never_doubled(site: Site, worker: concurrent.futures.Executor) -> None:
    """P6: "`O_APPEND` and retries never duplicate data"."""
    content = site.image(size=BLOCK)
    site.mount("interval=0.2")
    fd = site.open(flags=os.O_WRONLY | os.O_APPEND)
    site.flaky.fail("fsync vm.img errno=EIO")  # the data has arrived; that it is stable has not been confirmed
    pending = worker.submit(os.write, fd, b"line\n")
    time.sleep(0.7)
    site.flaky.heal()
    assert pending.result(timeout=60) == 5
    assert (site.real / "vm.img").read_bytes() == content + b"line\n"


def test_truncation_is_held_like_a_write(site: Site, worker: concurrent.futures.Executor) -> None:
    """Section 2: a request is also "a change of size through an open handle (treated as a write)"."""
    site.image(size=4 * BLOCK)
    site.mount("interval=0.2")
    fd = site.open()
    site.flaky.fail("setattr vm.img errno=EIO")
    pending = worker.submit(os.ftruncate, fd, BLOCK)
    time.sleep(0.5)
    assert not pending.done()
    site.flaky.heal()
    pending.result(timeout=60)
    assert (site.real / "vm.img").stat().st_size == BLOCK
    assert os.fstat(fd).st_size == BLOCK


def test_bad_sector_hinders_nothing_else(site: Site, worker: concurrent.futures.Executor) -> None:
    """Section 4: "A request that still fails on its own (a bad sector) ... hinders only what overlaps it"."""
    content = site.image()
    site.mount("interval=0.2", "timeout=6")
    fd = site.open()
    site.flaky.fail(f"read vm.img errno=EIO bytes={8 * BLOCK}-{9 * BLOCK - 1}")
    bad = worker.submit(timed, lambda: os.preadv(fd, [aligned(bytes(BLOCK))], 8 * BLOCK))
    time.sleep(0.3)
    for number in (0, 7, 9, 63) * 25:
        area = aligned(bytes(BLOCK))
        _, took_s = timed(lambda area=area, number=number: os.preadv(fd, [area], number * BLOCK))  # type: ignore[misc]
        assert bytes(area) == content[number * BLOCK :][:BLOCK]
        assert took_s < 4, "and not until the bad one is given up"
    result, took_s = bad.result(timeout=60)
    assert result == errno.EIO
    assert 6 <= took_s < 6 + BUSY_S


def test_blocked_read_is_given_up(site: Site) -> None:
    """P8: every wait ends; section 4: "An attempt that does not return (a `hard` mount) counts as a hang"."""
    site.image()
    mount = site.mount("timeout=1", "blocked_after=0.5", "interval=0.2")
    fd = site.open()
    site.flaky.fail("read vm.img hang")
    result, took_s = timed(lambda: CALLS["read"](fd, aligned(bytes(BLOCK))))
    assert result == errno.EIO
    assert 1.5 <= took_s < 1.5 + BUSY_S
    assert "no answer from the storage" in mount.log_text()


def test_blocked_write_is_never_answered_in_flight(site: Site, worker: concurrent.futures.Executor) -> None:
    """P5: "A write is therefore never answered while an attempt is in flight"; "the deadline acts on its return"."""
    site.image()
    mount = site.mount("timeout=1", "blocked_after=0.5", "interval=0.2")
    fd = site.open()
    site.flaky.fail("write vm.img hang")
    new = os.urandom(BLOCK)
    pending = worker.submit(timed, lambda: os.pwrite(fd, aligned(new), 0))
    wait_until(lambda: "no answer from the storage" in mount.log_text(), what="the blocked attempt to be noticed")
    time.sleep(2)
    assert not pending.done()
    site.flaky.heal()
    assert pending.result(timeout=60)[0] == BLOCK
    assert (site.real / "vm.img").read_bytes()[:BLOCK] == new
    wait_until(lambda: "recovered after" in mount.log_text(), what="the hang's end")


def test_one_begin_one_end(site: Site, worker: concurrent.futures.Executor) -> None:
    """P9: "A hang gives one begin event and one end event, however many requests and retries it has"."""
    site.image()
    mount = site.mount("interval=0.2")
    fd = site.open()
    site.flaky.fail("data vm.img errno=EIO")
    reads = [
        worker.submit(lambda n=n: os.preadv(fd, [aligned(bytes(BLOCK))], n * BLOCK))  # type: ignore[misc]
        for n in range(40)
    ]
    time.sleep(1.5)
    site.flaky.heal()
    assert [read.result(timeout=60) for read in reads] == [BLOCK] * 40
    wait_until(lambda: "recovered after" in mount.log_text(), what="the hang's end")
    assert mount.log_text().count("held since") == 2, "one in the begin's line, one in the end's"
    assert "vm.img: read failed with EIO" in mount.log_text()
    assert "40 requests at most" in mount.log_text()


def test_attributes_from_memory(site: Site, worker: concurrent.futures.Executor) -> None:
    """Section 4: "the attributes of an image with open handles are answered from memory while it hangs"."""
    site.image(size=10 * BLOCK)
    site.mount("interval=0.2", "attr_timeout=0")
    fd = site.open()
    assert os.fstat(fd).st_size == 10 * BLOCK
    site.flaky.fail("* vm.img errno=EIO")
    pending = worker.submit(os.pwrite, fd, aligned(bytes(BLOCK)), 0)
    time.sleep(0.3)
    for _ in range(3):
        assert timed(lambda: os.fstat(fd).st_size)[0] == 10 * BLOCK
        assert timed(lambda: os.stat(site.mounts[0].mountpoint / "vm.img").st_size)[0] == 10 * BLOCK
    site.flaky.heal()
    assert pending.result(timeout=60) == BLOCK


def test_five_hundred_held_hinder_nobody(site: Site) -> None:
    """P7: "A healthy image never waits for a sick one. Neither do `ls`, `df`, `stat`, ..." - with 500 requests held."""
    site.image("sick.img", size=16 << 20)
    content = site.image("well.img", size=1 << 20)
    mount = site.mount("interval=1", "timeout=60")
    base = mount.mountpoint
    site.flaky.fail("data sick.img errno=EIO")
    fio = subprocess.Popen(
        ["fio", "--name=sick", f"--filename={base}/sick.img", "--rw=randwrite", "--bs=4k", "--size=16m", "--direct=1",
         "--ioengine=libaio", "--iodepth=500", "--number_ios=500", "--verify=crc32c", "--do_verify=0",
         "--iodepth_batch_submit=500", "--verify_state_save=0"],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    try:
        wait_until(lambda: held_now(mount) >= 500, what="500 requests to be held")
        for _ in range(3):
            for what, call in {
                "ls": lambda: sorted(os.listdir(base)),
                "stat": lambda: os.stat(base / "sick.img"),
                "df": lambda: os.statvfs(base),
                "create": lambda: (base / "new").write_bytes(bytes(BLOCK)),
                "rename": lambda: os.rename(base / "new", base / "newer"),
                "unlink": lambda: os.unlink(base / "newer"),
                "read": lambda: read_block(base / "well.img", 3),
                "write": lambda: write_block(base / "well.img", 3, content),
            }.items():
                result, took_s = timed(call)
                assert took_s < 1, f"{what} waited {took_s:.1f} s"
                assert not isinstance(result, int) or result == BLOCK, f"{what}: {result}"
        assert held_now(mount) >= 500
    finally:
        site.flaky.heal()
        output, _ = fio.communicate(timeout=60)
    assert fio.returncode == 0, output
    assert "err= 0" in output
    wait_until(lambda: "sick.img: recovered" in mount.log_text(), what="the hang's end")
    assert "no error was passed on" in mount.log_text()


def test_bound_holds_with_a_thousand_held(site: Site) -> None:
    """P1: "timeout + at most one attempt, also with 1,000 requests held and attempts that take seconds to fail"."""
    attempt_s, timeout_s = 2, 4
    site.image(size=1000 * BLOCK)
    mount = site.mount(f"timeout={timeout_s}", "interval=1")
    site.flaky.fail(f"read vm.img errno=EIO delay={attempt_s}")
    fio = subprocess.run(
        ["fio", "--name=held", f"--filename={mount.mountpoint}/vm.img", "--rw=randread", "--bs=4k", "--size=100%",
         "--direct=1", "--ioengine=libaio", "--iodepth=1000", "--iodepth_batch_submit=1000", "--output-format=json",
         "--continue_on_error=io"],
        capture_output=True, text=True, timeout=60, check=False, cwd=site.folder,
    )  # fmt: skip
    job = json.loads(fio.stdout[fio.stdout.index("{") :])["jobs"][0]
    assert (job["error"], job["total_err"]) == (errno.EIO, 1000)
    hang = re.search(r"is over after ([\d.]+) s: 1000 of its requests were given up", mount.log_text())
    assert hang is not None, mount.log_text()
    assert timeout_s <= float(hang[1]) <= timeout_s + attempt_s + 0.5


def test_held_limit(site: Site) -> None:
    """P10: "Memory for held data ... is bounded and configurable; at the bound there is ... a stated answer, never a crash"."""
    site.image(size=256 * BLOCK)
    mount = site.mount("held_limit=128K", "interval=0.5", "timeout=5")
    site.flaky.fail("write vm.img errno=EIO")
    fio = subprocess.run(
        ["fio", "--name=held", f"--filename={mount.mountpoint}/vm.img", "--rw=write", "--bs=4k", "--size=100%",
         "--direct=1", "--ioengine=libaio", "--iodepth=256", "--iodepth_batch_submit=256", "--output-format=json",
         "--continue_on_error=io"],
        capture_output=True, text=True, timeout=60, check=False, cwd=site.folder,
    )  # fmt: skip
    job = json.loads(fio.stdout[fio.stdout.index("{") :])["jobs"][0]
    assert (job["error"], job["total_err"]) == (errno.EIO, 256)
    assert "held_limit allows no more" in mount.log_text()
    hang = re.search(r"is over after .*: (\d+) of its requests were given up", mount.log_text())
    assert hang is not None, mount.log_text()
    assert int(hang[1]) * BLOCK <= 128 << 10
    assert os.statvfs(mount.mountpoint).f_blocks


def held_now(mount: Mount) -> int:
    """How many requests are held, from the dump that SIGUSR1 gives."""
    before = mount.log_text().count("images are open")
    os.kill(mount.pid, signal.SIGUSR1)
    wait_until(lambda: mount.log_text().count("images are open") > before, what="the dump")
    time.sleep(0.2)
    dump = mount.log_text().rpartition("images are open")[2]
    return len(re.findall(r", held,", dump))


def read_block(path: Path, number: int) -> int:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECT)
    try:
        return os.preadv(fd, [aligned(bytes(BLOCK))], number * BLOCK)
    finally:
        os.close(fd)


def write_block(path: Path, number: int, content: bytes) -> int:
    fd = os.open(path, os.O_RDWR | os.O_DIRECT)
    try:
        return os.pwrite(fd, aligned(content[:BLOCK]), number * BLOCK)
    finally:
        os.close(fd)


@pytest.mark.parametrize(
    ("call", "operation"), [("pread64,preadv2", "read"), ("pwrite64", "write"), ("fdatasync", "fsync")]
)
@pytest.mark.parametrize("name", ["EIO", "ESTALE"])
def test_errors_injected_into_our_own_system_calls(
    tmp_path: Path, worker: concurrent.futures.Executor, call: str, operation: str, name: str
) -> None:
    """P1 on a plain ext4 SOURCE: strace makes the server's own system calls fail, and the consumer sees a pause.

    With engine=threads, because what goes through io_uring is no system call that strace could see.
    """
    (tmp_path / "src").mkdir()
    image = tmp_path / "src" / "vm.img"
    content = os.urandom(64 * BLOCK)
    image.write_bytes(content)
    options = "engine=threads", "interval=0.2", "timeout=30"
    with Mount(tmp_path / "src", tmp_path / "mnt", *options, log=tmp_path / "log") as mount:
        fd = os.open(mount.mountpoint / "vm.img", os.O_RDWR)
        try:
            os.pread(fd, 512, 0)  # so that the page cache has what the kernel may ask for itself
            injection = f"inject={call}:error={name}"
            with subprocess.Popen(
                ["strace", "-f", "-qq", "-p", str(mount.pid), "-P", str(image), "-e", f"trace={call}", "-e", injection],
                stderr=subprocess.PIPE,
            ) as strace:
                try:
                    wait_until(lambda: traced(mount.pid), what="strace to attach")
                    new = os.urandom(BLOCK)
                    calls: dict[str, Callable[[], object]] = {
                        "read": lambda: os.pread(fd, BLOCK, 32 * BLOCK),
                        "write": lambda: os.pwrite(fd, new, 32 * BLOCK),
                        "fsync": lambda: os.fdatasync(fd),
                    }
                    pending = worker.submit(timed, calls[operation])
                    wait_until(lambda: f"{operation} failed with {name}" in mount.log_text(), what="the hang's begin")
                    time.sleep(1)
                    assert not pending.done()
                finally:
                    strace.send_signal(signal.SIGINT)
            result, took_s = pending.result(timeout=60)
            assert took_s >= 1
            if operation == "read":
                assert result == content[32 * BLOCK : 33 * BLOCK]
            if operation == "write":
                assert image.read_bytes() == content[: 32 * BLOCK] + new + content[33 * BLOCK :]
            wait_until(lambda: "recovered after" in mount.log_text(), what="the hang's end")
        finally:
            os.close(fd)


def traced(pid: int) -> bool:
    """Whether every thread of *pid* has a tracer."""
    states = [(task / "status").read_text() for task in Path(f"/proc/{pid}/task").iterdir()]
    return all("TracerPid:\t0\n" not in state for state in states)
