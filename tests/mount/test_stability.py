"""P3 as a power cut sees it: on a copy of the disk without the kernel's caches, after an fsync, a close, an O_DSYNC write."""

from __future__ import annotations

import os
import shutil
import subprocess
from typing import TYPE_CHECKING

import pytest

from tests.harness import FlakySource, Mount, wait_until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

BLOCK = 4096


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """An ext4 file system on a disk image, mounted: what is not in the image is what a power cut would lose."""
    image, mountpoint = tmp_path / "disk", tmp_path / "src"
    mountpoint.mkdir()
    with image.open("wb") as file:
        file.truncate(64 << 20)
    subprocess.run(["mkfs.ext4", "-q", str(image)], check=True)
    subprocess.run(["mount", "-o", "loop", str(image), str(mountpoint)], check=True)
    yield mountpoint
    subprocess.run(["umount", str(mountpoint)], check=True)


def after_power_cut(tmp_path: Path, name: str) -> bytes:
    """The file as it is on a copy of the disk taken now, without the kernel's caches, after the journal's recovery."""
    copy, mountpoint = tmp_path / "copy", tmp_path / "copied"
    shutil.copyfile(tmp_path / "disk", copy)
    mountpoint.mkdir(exist_ok=True)
    subprocess.run(["mount", "-o", "loop", str(copy), str(mountpoint)], check=True)
    try:
        return (mountpoint / name).read_bytes()
    finally:
        subprocess.run(["umount", str(mountpoint)], check=True)


def sync_file(fd: int) -> None:
    os.fsync(fd)


def sync_data(fd: int) -> None:
    os.fdatasync(fd)


def nothing(_fd: int) -> None:
    """The write itself is synchronous."""


@pytest.mark.parametrize("flags", [0, os.O_DIRECT], ids=["buffered", "direct"])
@pytest.mark.parametrize(
    ("more", "sync"), [(0, sync_file), (0, sync_data), (os.O_DSYNC, nothing), (os.O_SYNC, nothing)]
)
def test_acknowledged_writes_survive_a_power_cut(
    tmp_path: Path, disk: Path, flags: int, more: int, sync: Callable[[int], None]
) -> None:
    """P3: "every write acknowledged before it is on stable storage": after an fsync, or without one where each is synchronous."""
    content = bytearray(os.urandom(64 * BLOCK))
    (disk / "vm.img").write_bytes(content)
    os.sync()
    with Mount(disk, tmp_path / "mnt", log=tmp_path / "log") as mount:
        fd = os.open(mount.mountpoint / "vm.img", os.O_RDWR | flags | more)
        try:
            for number in (3, 17, 63, 3):
                new = os.urandom(BLOCK)  # not aligned in memory, and it need not be
                assert os.pwrite(fd, new, number * BLOCK) == BLOCK
                content[number * BLOCK : (number + 1) * BLOCK] = new
                sync(fd)
                assert after_power_cut(tmp_path, "vm.img") == bytes(content)
        finally:
            os.close(fd)


def test_a_closed_file_survives_a_power_cut(tmp_path: Path, disk: Path) -> None:
    """The last close of a writer syncs, as NFS does."""
    with Mount(disk, tmp_path / "mnt", log=tmp_path / "log") as mount:
        (mount.mountpoint / "vm.img").write_bytes(b"all of it" * 10_000)
        assert after_power_cut(tmp_path, "vm.img") == b"all of it" * 10_000


def test_the_server_syncs_by_itself(tmp_path: Path, disk: Path) -> None:
    """P10: a consumer that never syncs: beyond half of `write_log` the server does, and nobody waits for long."""
    with Mount(disk, tmp_path / "mnt", "write_log=1M", log=tmp_path / "log") as mount:
        data = os.urandom(64 * BLOCK)
        with (mount.mountpoint / "vm.img").open("wb", buffering=0) as file:
            for _ in range(40):  # ten times the log
                file.write(data)
            wait_until(
                lambda: len(after_power_cut(tmp_path, "vm.img")) >= 39 * len(data), what="most of it to be stable"
            )


def backing_flags(pid: int, name: str) -> list[int]:
    """The open flags of every descriptor that process *pid* has on a file called *name*, O_PATH ones left out."""
    found = []
    for number in os.listdir(f"/proc/{pid}/fd"):
        try:
            if os.path.basename(os.readlink(f"/proc/{pid}/fd/{number}")) != name:
                continue
            with open(f"/proc/{pid}/fdinfo/{number}", encoding="ascii") as info:
                flags = next(int(line.split()[1], 8) for line in info if line.startswith("flags:"))
        except OSError:
            continue
        if not flags & os.O_PATH:
            found.append(flags)
    return found


@pytest.mark.parametrize("direct", ["auto", "never"])
@pytest.mark.parametrize("asked", [0, os.O_DIRECT, os.O_DSYNC, os.O_SYNC, os.O_DIRECT | os.O_DSYNC])
def test_backing_flags(tmp_path: Path, direct: str, asked: int) -> None:
    """Section 4: direct where the consumer is and SOURCE takes it unaligned, O_DSYNC and O_SYNC as the consumer has it."""
    real = tmp_path / "real"
    real.mkdir()
    (real / "vm.img").write_bytes(bytes(BLOCK))
    with (
        FlakySource(real, tmp_path / "flaky", tmp_path / "trigger", tmp_path / "flaky.log"),
        Mount(tmp_path / "flaky", tmp_path / "over-fuse", f"direct={direct}", log=tmp_path / "log1") as over_fuse,
        Mount(real, tmp_path / "over-disk", f"direct={direct}", log=tmp_path / "log2") as over_disk,
    ):
        for mount, takes_direct in ((over_fuse, direct == "auto"), (over_disk, False)):
            fd = os.open(mount.mountpoint / "vm.img", os.O_RDWR | os.O_APPEND | asked)
            try:
                os.write(fd, b"x" * 512)
                flags = backing_flags(mount.pid, "vm.img")
                assert len(flags) == (1 if asked & os.O_DSYNC else 2)  # and the witness, for syncs
                assert {bool(one & os.O_DIRECT) for one in flags} == {takes_direct and bool(asked & os.O_DIRECT)}
                assert {one & os.O_SYNC for one in flags} == {asked & os.O_SYNC}
                assert not any(one & (os.O_APPEND | os.O_CREAT | os.O_EXCL | os.O_TRUNC) for one in flags)
            finally:
                os.close(fd)
        assert (real / "vm.img").read_bytes() == bytes(BLOCK) + b"x" * 1024
