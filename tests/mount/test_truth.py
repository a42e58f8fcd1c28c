"""No acknowledged byte is lost, doubled or reordered (P3, P4, P5), on the real mount: what SOURCE has in the end is compared.

The flaky source has a page cache of its own here, which loses what it cannot write back and says so once, as Linux does.
"""

from __future__ import annotations

import errno
import mmap
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import pytest

from iohang_fuse import syscalls
from tests.exerciser import Aio, AioRequest
from tests.harness import FlakySource, Mount, wait_until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

BLOCK = 4096
BLOCKS = 64


class Site:
    """A directory, the flaky source with its page cache on it, a mount of that, and an image of 64 blocks."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.real = folder / "real"
        self.real.mkdir()
        self.image = self.real / "vm.img"
        self.content = bytearray(os.urandom(BLOCKS * BLOCK))
        self.image.write_bytes(self.content)
        self.flaky = FlakySource(
            self.real,
            folder / "flaky",
            folder / "trigger",
            folder / "flaky.log",
            page_cache=True,
            writeback_every_s=600,
        )
        self.mounted: Mount | None = None
        self.descriptors: list[int] = []

    def mount(self, *options: str) -> Mount:
        options = ("timeout=60", "interval=0.2", *options)
        self.mounted = Mount(self.folder / "flaky", self.folder / "mnt", *options, log=self.folder / "log")
        return self.mounted

    def open(self, flags: int = 0) -> int:
        fd = os.open(self.folder / "mnt/vm.img", os.O_RDWR | flags)
        self.descriptors.append(fd)
        return fd

    def write(self, fd: int, block: int, data: bytes | None = None) -> None:
        """A whole block, into the file and into the model."""
        data = data or os.urandom(BLOCK)
        assert os.pwrite(fd, data, block * BLOCK) == len(data)
        self.content[block * BLOCK : block * BLOCK + len(data)] = data

    def is_safe(self) -> bool:
        """Whether DIRECTORY itself has what was acknowledged."""
        return self.image.read_bytes() == self.content

    def close(self) -> None:
        for fd in self.descriptors:
            os.close(fd)
        self.descriptors.clear()

    def end(self) -> None:
        self.flaky.heal()
        self.close()
        if self.mounted:
            log = self.mounted.log_text()
            self.mounted.__exit__()
            assert "a bug in" not in log
        self.flaky.__exit__()


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    made = Site(tmp_path)
    yield made
    made.end()


def in_background(work: Callable[[], object]) -> threading.Thread:
    thread = threading.Thread(target=work)
    thread.start()
    return thread


# ---- P3: truth of fsync


def test_the_source_lies(site: Site) -> None:
    """The fault itself, on the bare source: one fsync fails, the next one says 0, and the data is gone."""
    fd = os.open(site.folder / "flaky/vm.img", os.O_RDWR)
    try:
        os.pwrite(fd, bytes(BLOCK), 0)
        site.flaky.fail("writeback * errno=EIO")
        with pytest.raises(OSError, match="Input/output"):
            os.fsync(fd)
        os.fsync(fd)
    finally:
        os.close(fd)
    assert site.is_safe()  # that is: the zeros have not arrived


@pytest.mark.parametrize("flags", [0, os.O_DIRECT], ids=["buffered", "direct"])
@pytest.mark.parametrize("number", ["EIO", "ETIMEDOUT"])
def test_fsync_after_lost_writeback(site: Site, flags: int, number: str) -> None:
    """P3: "after any failed sync open the file anew, write the log again in order, and sync again, before answering 0"."""
    mount = site.mount()
    fd = site.open(flags)
    for block in (3, 17, 3, 60):
        site.write(fd, block)
    site.flaky.fail(f"writeback * errno={number}")
    done = in_background(lambda: os.fsync(fd))
    wait_until(lambda: f"fsync failed with {number}" in mount.log_text(), what="the fsync to be held")
    time.sleep(0.5)
    assert done.is_alive()
    site.flaky.heal()
    done.join(20)
    assert not done.is_alive()
    assert site.is_safe()
    assert os.pread(fd, len(site.content), 0) == site.content


def test_writeback_lost_behind_everybodys_back(site: Site) -> None:
    """P3: lost before anybody asked; the fsync that is told of it is the first, and is still answered only when all is safe."""
    site.mount()
    fd = site.open()
    for block in range(10):
        site.write(fd, block)
    site.flaky.fail("writeback * errno=EIO")
    other = os.open(site.folder / "flaky/vm.img", os.O_RDWR)  # somebody else on this host has it written back
    with pytest.raises(OSError, match="Input/output"):
        os.fsync(other)
    os.close(other)
    site.flaky.heal()
    assert not site.is_safe()
    os.fsync(fd)
    assert site.is_safe()


def test_a_handle_opened_after_the_loss_is_told_the_truth(site: Site) -> None:
    """P3: Linux does not tell a later opener what somebody has already been told; the image's witness was there before."""
    site.mount()
    writer = site.open()
    site.write(writer, 5)
    site.flaky.fail("writeback * errno=EIO")
    other = os.open(site.folder / "flaky/vm.img", os.O_RDWR)
    with pytest.raises(OSError, match="Input/output"):
        os.fsync(other)
    os.close(other)
    site.flaky.heal()
    later = site.open()
    os.fsync(later)
    assert site.is_safe()


def test_reads_see_what_writeback_has_lost(site: Site) -> None:
    """No acknowledged byte is lost: a consumer reads what it wrote, though the source has dropped it; the size is as written."""
    site.mount("attr_timeout=0")
    fd = site.open(os.O_DIRECT)
    site.write(fd, 7)
    site.content.extend(bytes(3 * BLOCK))
    site.write(fd, BLOCKS + 3)  # beyond the end, with a hole before it
    site.flaky.fail("writeback * errno=EIO")
    other = os.open(site.folder / "flaky/vm.img", os.O_RDWR)
    with pytest.raises(OSError, match="Input/output"):
        os.fsync(other)
    assert os.pread(other, BLOCK, 7 * BLOCK) != site.content[7 * BLOCK : 8 * BLOCK]
    os.close(other)
    site.flaky.heal()
    assert os.fstat(fd).st_size == len(site.content)
    assert os.pread(fd, len(site.content), 0) == site.content
    os.fsync(fd)
    assert site.is_safe()


def test_truncation_clips_the_log(site: Site) -> None:
    """P4: "Truncation takes its place in that order": what was cut off does not come back when the log is written again."""
    mount = site.mount()
    fd = site.open()
    site.write(fd, 10)
    site.write(fd, 11)
    os.ftruncate(fd, 10 * BLOCK + 100)
    os.truncate(mount.mountpoint / "vm.img", 10 * BLOCK + 50)  # by its name, while it is open
    del site.content[10 * BLOCK + 50 :]
    os.ftruncate(fd, 12 * BLOCK)
    site.content.extend(bytes(12 * BLOCK - len(site.content)))
    site.write(fd, 2)
    site.flaky.fail("writeback * errno=EIO")
    done = in_background(lambda: os.fsync(fd))
    wait_until(lambda: "fsync failed" in mount.log_text(), what="the fsync to be held")
    site.flaky.heal()
    done.join(20)
    assert site.is_safe()


@pytest.mark.parametrize("flags", [os.O_DSYNC, os.O_SYNC, os.O_DSYNC | os.O_DIRECT])
def test_synchronous_writes(site: Site, flags: int) -> None:
    """P3: a write with O_DSYNC is answered when it is stable, through lost writeback, too."""
    mount = site.mount()
    fd = site.open(flags)
    site.write(fd, 1)
    assert site.is_safe()
    site.flaky.fail("writeback * errno=EIO")
    done = in_background(lambda: site.write(fd, 2))
    wait_until(lambda: "failed with EIO" in mount.log_text(), what="it to be held")
    site.flaky.heal()
    done.join(20)
    assert site.is_safe()


def test_the_last_close_tells_or_saves(site: Site) -> None:
    """The last close of a writer syncs, as NFS does: close(2) waits for the outage to end, and then all is safe."""
    mount = site.mount()
    fd = os.open(mount.mountpoint / "vm.img", os.O_RDWR)
    site.write(fd, 9)
    site.flaky.fail("writeback,fsync * errno=EIO")
    done = in_background(lambda: os.close(fd))
    wait_until(lambda: "fsync failed" in mount.log_text(), what="the close to be held")
    assert done.is_alive()
    site.flaky.heal()
    done.join(20)
    assert site.is_safe()


def test_a_close_that_is_given_up_says_so(site: Site) -> None:
    """P8: an outage longer than the timeout ends in an error of close(2) and a line in the log, and not in silence."""
    mount = site.mount("timeout=1")
    fd = os.open(mount.mountpoint / "vm.img", os.O_RDWR)
    site.write(fd, 9)
    site.flaky.fail("writeback,fsync * errno=EIO")
    with pytest.raises(OSError, match="Input/output"):
        os.close(fd)
    said = "closed with 4096 bytes that were acknowledged and are not known to be stable"
    wait_until(lambda: said in mount.log_text(), what="the line")


def test_the_write_log_is_bounded(site: Site) -> None:
    """P10: while no sync succeeds, writers wait when the log is full; when one does, they go on, and nothing is lost."""
    mount = site.mount("write_log=1M", "timeout=inf")
    fd = site.open()
    with site.image.open("r+b") as file:
        file.truncate(4 << 20)
    site.content = bytearray(site.image.read_bytes())
    site.flaky.fail("fsync,writeback * errno=EIO")
    written: list[int] = []

    def writer() -> None:
        for block in range(1024):
            site.write(fd, block)
            written.append(block)

    done = in_background(writer)
    wait_until(lambda: "the server's own sync failed" in mount.log_text(), what="the server's own sync to be held")
    wait_until(lambda: len(written) >= 241, what="the log to be full")  # 256 bytes for each write beside its data
    time.sleep(1)
    assert len(written) == 241
    mount.process.send_signal(signal.SIGUSR1)
    said = "vm.img: write log: 241 writes, 1048832 of 1048576 bytes, to be written again before the next sync; 1 writes have had"
    wait_until(lambda: said in mount.log_text(), what="the count of writes that wait")
    site.flaky.heal()
    done.join(30)
    assert not done.is_alive()
    os.fsync(fd)
    assert site.is_safe()


# ---- P4: order


@pytest.mark.parametrize("seed", range(3))
def test_overlapping_writes_land_in_order(site: Site, seed: int) -> None:
    """P4: "writes to one range land in the order in which they arrived", held or not: 400 native AIO writes over one another."""
    mount = site.mount()
    fd = site.open(os.O_DIRECT)
    dice = random.Random(seed)
    memory = mmap.mmap(-1, 400 * 3 * BLOCK)  # aligned, as O_DIRECT wants it
    memory.write(os.urandom(len(memory)))
    writes = []
    for number in range(400):
        block, length = dice.randrange(8), BLOCK * dice.choice([1, 2, 3])
        area = memoryview(memory)[number * 3 * BLOCK :][:length]
        writes.append(AioRequest("write", fd, block * BLOCK, area))
        site.content[block * BLOCK : block * BLOCK + length] = area
    site.flaky.fail("write * errno=EIO chance=0.5")
    aio = Aio(512)
    done = in_background(lambda: aio.run(writes, [400]))
    wait_until(lambda: "write failed with EIO" in mount.log_text(), what="writes to be held")
    time.sleep(0.5)
    site.flaky.heal()
    done.join(30)
    aio.close()
    assert [write.result for write in writes] == [write.length for write in writes]
    os.fsync(fd)
    assert site.is_safe()


# ---- reopen


@pytest.mark.parametrize("operation", ["read", "write", "fsync"])
def test_a_stale_handle(site: Site, operation: str) -> None:
    """Section 4: an open file that is dead for good while its name works is opened anew, and what was not safe is written again."""
    mount = site.mount()
    fd = site.open()
    site.write(fd, 4)
    site.flaky.fail(f"{operation} * stale")
    done = in_background(
        {
            "read": lambda: os.pread(site.open(os.O_DIRECT), BLOCK, 0),
            "write": lambda: site.write(fd, 5),
            "fsync": lambda: os.fsync(fd),
        }[operation]
    )
    wait_until(lambda: f"{operation} failed with ESTALE" in mount.log_text(), what="the request to be held")
    site.flaky.heal()
    done.join(20)
    assert not done.is_alive()
    os.fsync(fd)
    assert site.is_safe()
    assert "no error was passed on" in mount.log_text()


class Consumer:
    """A process with the image open: the ones that the test starts would have to close its descriptors, and wait for that."""

    def __init__(self, site: Site) -> None:
        self.site = site
        image = str(site.folder / "mnt/vm.img")
        script = f"import os; fd = os.open({image!r}, os.O_RDWR)\nwhile True: print(eval(input()), flush=True)"
        self.process = subprocess.Popen(
            [sys.executable, "-c", script],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def begin(self, expression: str) -> None:
        assert self.process.stdin
        print(expression, file=self.process.stdin, flush=True)

    def begin_write(self, block: int) -> None:
        self.begin(f"os.pwrite(fd, bytes([{block}]) * {BLOCK}, {block * BLOCK})")
        self.site.content[block * BLOCK : (block + 1) * BLOCK] = bytes([block]) * BLOCK

    def result(self) -> str:
        assert self.process.stdout
        return self.process.stdout.readline().strip()

    def end(self) -> str:
        """Kill it; what it had to say of an error."""
        self.process.kill()
        return self.process.communicate(timeout=20)[1]


@pytest.fixture
def consumer(site: Site) -> Iterator[Callable[[], Consumer]]:
    made: list[Consumer] = []
    yield lambda: made.append(Consumer(site)) or made[0]
    for one in made:
        one.end()


def mounted_anew(site: Site) -> FlakySource:
    """A source that died, was unmounted, left a bare directory for a second, and is mounted again."""
    syscalls.umount(str(site.folder / "flaky"), syscalls.MNT_DETACH)
    assert not (site.folder / "flaky/vm.img").exists()
    time.sleep(1)
    with pytest.raises(OSError, match="not connected"):  # what has SOURCE's path now is not SOURCE
        (site.folder / "mnt/wrong").write_bytes(b"wrong")
    assert list((site.folder / "flaky").iterdir()) == []
    return FlakySource(site.real, site.folder / "flaky", site.folder / "trigger", site.folder / "flaky2.log")


def written(path: Path) -> bool:
    try:
        path.write_bytes(b"new")
    except OSError:
        return False
    return True


def test_a_source_that_was_mounted_anew(site: Site, consumer: Callable[[], Consumer]) -> None:
    """Section 4: a source that was unmounted and mounted again under us: open files go on, names are found again."""
    mount = site.mount()
    user = consumer()
    user.begin_write(4)
    user.begin("os.fsync(fd)")
    user.begin_write(8)
    assert [user.result() for _ in range(3)] == [str(BLOCK), "None", str(BLOCK)]
    site.flaky.process.kill()
    site.flaky.process.wait()
    user.begin_write(5)
    wait_until(lambda: "failed with E" in mount.log_text(), what="the write to be held")
    assert not os.path.exists(mount.mountpoint / "another")
    with mounted_anew(site):
        user.begin("os.fsync(fd)")
        assert [user.result() for _ in range(2)] == [str(BLOCK), "None"]
        assert site.is_safe()
        # Not that of the image: a name that is open is answered from memory, too.
        wait_until(lambda: written(mount.mountpoint / "new"), what="names to be found again")
        assert (site.real / "new").read_bytes() == b"new"
        user.begin("os.fstat(fd).st_ino")
        assert user.result() == str(os.stat(mount.mountpoint / "vm.img").st_ino)
        with (mount.mountpoint / "vm.img").open("r+b", buffering=0) as second:
            user.begin_write(6)
            assert user.result() == str(BLOCK)
            second.seek(6 * BLOCK)
            assert second.read(BLOCK) == bytes([6]) * BLOCK
        user.begin("os.fsync(fd)")
        assert user.result() == "None"
        assert site.is_safe()
        user.end()
        mount.stop()
    assert list((site.folder / "flaky").iterdir()) == []  # nothing was written beneath


def test_an_image_that_was_replaced_is_never_written(site: Site, consumer: Callable[[], Consumer]) -> None:
    """Section 4: "the same file ...; otherwise it stays held, and the event says why": another of its name is not touched."""
    mount = site.mount("timeout=4")
    user = consumer()
    user.begin("1")
    assert user.result() == "1"
    site.flaky.process.kill()
    site.flaky.process.wait()
    site.image.rename(site.real / "old.img")
    shutil.copyfile(site.real / "old.img", site.image)
    before = site.image.read_bytes()
    with mounted_anew(site):
        user.begin_write(0)
        user.process.wait(20)
        assert "Input/output error" in user.end()
        assert "its name is now that of another file" in mount.log_text()
        assert site.image.read_bytes() == before
        mount.stop()


def test_an_inode_number_that_is_used_again(site: Site, consumer: Callable[[], Consumer]) -> None:
    """Section 4: a new file of the same name, size and, since the old one is gone, inode number: what was safe is not in it."""
    mount = site.mount("timeout=4")
    user = consumer()
    user.begin_write(4)
    user.begin("os.fsync(fd)")
    assert [user.result() for _ in range(2)] == [str(BLOCK), "None"]
    site.flaky.process.kill()
    site.flaky.process.wait()
    syscalls.umount(str(site.folder / "flaky"), syscalls.MNT_DETACH)
    backup = os.urandom(BLOCKS * BLOCK)
    site.image.unlink()
    site.image.write_bytes(backup)
    with FlakySource(site.real, site.folder / "flaky", site.folder / "trigger", site.folder / "flaky2.log"):
        user.begin_write(0)
        user.process.wait(20)
        assert "Input/output error" in user.end()
        assert "its name is now that of a" in mount.log_text()
        assert site.image.read_bytes() == backup
        mount.stop()


def test_a_source_that_was_mounted_over_itself(site: Site, consumer: Callable[[], Consumer]) -> None:
    """P3: the old mount lives on beneath open files, and the new one is what an fsync would sync: all of them move, and then 0."""
    mount = site.mount()
    user = consumer()
    user.begin_write(1)
    user.begin("os.fsync(fd)")
    assert [user.result() for _ in range(2)] == [str(BLOCK), "None"]
    syscalls.umount(str(site.folder / "flaky"), syscalls.MNT_DETACH)
    second = FlakySource(
        site.real,
        site.folder / "flaky",
        site.folder / "trigger2",
        site.folder / "flaky2.log",
        page_cache=True,
        writeback_every_s=600,
    )
    with second:
        user.begin_write(2)
        assert user.result() == str(BLOCK)
        site.flaky.fail("fsync * errno=EIO")
        user.begin("os.fsync(fd)")
        assert user.result() == "None"
        assert site.is_safe()
        user.begin_write(3)
        user.begin("os.fsync(fd)")
        assert [user.result() for _ in range(2)] == [str(BLOCK), "None"]
        site.flaky.process.kill()  # with all that it may still have in its cache
        site.flaky.process.wait()
        assert site.is_safe()
        user.end()
        mount.stop()


# ---- bounds


def test_the_bound_of_synchronous_writes(site: Site) -> None:
    """P1: "timeout + at most one attempt", also where writes come one at a time, because each is to be stable at its answer."""
    site.mount("timeout=2")
    fd = site.open(os.O_DIRECT | os.O_DSYNC)
    memory = mmap.mmap(-1, 16 * BLOCK)
    writes = [AioRequest("write", fd, n * BLOCK, memoryview(memory)[n * BLOCK :][:BLOCK]) for n in range(16)]
    site.flaky.fail("write * errno=EIO delay=1")
    aio = Aio(64)
    began_s = time.monotonic()
    aio.run(writes, [16])
    took_s = time.monotonic() - began_s
    aio.close()
    assert {write.result for write in writes} == {-errno.EIO}
    assert took_s < 2 + 1 + 1 + 2  # the first failure, the timeout, one attempt, and a busy machine


def test_the_page_cache_ends_no_time_out(site: Site) -> None:
    """Section 4: "new failures are answered at once, until an attempt succeeds"; not one that the page cache took."""
    mount = site.mount("timeout=1")
    fd = site.open()
    site.write(fd, 3)
    site.flaky.fail("writeback * errno=EIO")
    with pytest.raises(OSError, match="Input/output"):
        os.fsync(fd)
    for block in range(10):
        site.write(fd, block)
        with pytest.raises(OSError, match="Input/output"):
            os.fsync(fd)
    assert "works again" not in mount.log_text()
    assert mount.log_text().count("held since") == 1, "one hang: the other syncs were answered at once"
    site.flaky.heal()
    wait_until(lambda: "works again" in mount.log_text(), what="the probe to write the log again")
    wait_until(site.is_safe, what="all that was acknowledged")
    os.fsync(fd)
    assert site.is_safe()


# ---- P5: no zombies


def test_a_given_up_write_never_comes_back(site: Site) -> None:
    """P5: "once a write has been answered with an error, it never reaches the file", and newer data stays."""
    mount = site.mount("timeout=1")
    fd = site.open(os.O_DIRECT)
    before = bytes(site.content)
    site.flaky.fail("write * errno=EIO")
    with pytest.raises(OSError, match="Input/output"):
        os.pwrite(fd, bytes(BLOCK), 3 * BLOCK)
    site.flaky.heal()
    wait_until(lambda: "works again" in mount.log_text(), what="the image to work again")
    os.fsync(fd)
    assert site.image.read_bytes() == before
    site.write(fd, 3)
    os.fsync(fd)
    assert site.is_safe()


def test_after_a_give_up_the_storage_is_asked_first(site: Site) -> None:
    """P5: "after a give-up the range is fenced": an overlapping write goes out only when the storage itself has answered."""
    mount = site.mount("timeout=1")
    fd = site.open(os.O_DIRECT)
    site.flaky.fail("write * errno=EIO")
    with pytest.raises(OSError, match="Input/output"):
        os.pwrite(fd, bytes(BLOCK), 3 * BLOCK)
    site.flaky.heal()
    wait_until(lambda: "works again" in mount.log_text(), what="the image to work again")
    site.flaky.fail("statfs * errno=ETIMEDOUT")
    site.write(fd, 5)  # not fenced
    with ThreadPoolExecutor(1) as pool:
        fenced = pool.submit(os.pwrite, fd, b"n" * BLOCK, 3 * BLOCK)
        with pytest.raises(OSError, match="Input/output"):
            fenced.result(20)
    site.flaky.heal()
    wait_until(lambda: mount.log_text().count("works again") == 2, what="the image to work again")
    site.write(fd, 3)
    os.fsync(fd)
    assert site.is_safe()
