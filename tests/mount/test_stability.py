"""P3 from the first day: what was acknowledged is on stable storage, so a later fsync has nothing to lie about."""

from __future__ import annotations

import os
import shutil
import subprocess
from typing import TYPE_CHECKING

import pytest

from tests.harness import FlakySource, Mount

if TYPE_CHECKING:
    from collections.abc import Iterator
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


@pytest.mark.parametrize("flags", [0, os.O_DIRECT], ids=["buffered", "direct"])
def test_acknowledged_writes_survive_a_power_cut(tmp_path: Path, disk: Path, flags: int) -> None:
    """P3: "every write acknowledged before it is on stable storage" - here even without an fsync."""
    content = bytearray(os.urandom(64 * BLOCK))
    (disk / "vm.img").write_bytes(content)
    os.sync()
    with Mount(disk, tmp_path / "mnt", log=tmp_path / "log") as mount:
        fd = os.open(mount.mountpoint / "vm.img", os.O_RDWR | flags)
        try:
            for number in (3, 17, 63, 3):
                new = os.urandom(BLOCK)  # not aligned in memory, and it need not be
                assert os.pwrite(fd, new, number * BLOCK) == BLOCK
                content[number * BLOCK : (number + 1) * BLOCK] = new
                assert after_power_cut(tmp_path, "vm.img") == bytes(content)
        finally:
            os.close(fd)


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
def test_backing_flags(tmp_path: Path, direct: str) -> None:
    """Section 4: direct where SOURCE takes it unaligned, synchronous elsewhere; O_APPEND does not reach the backing file."""
    real = tmp_path / "real"
    real.mkdir()
    (real / "vm.img").write_bytes(bytes(BLOCK))
    with (
        FlakySource(real, tmp_path / "flaky", tmp_path / "trigger", tmp_path / "flaky.log"),
        Mount(tmp_path / "flaky", tmp_path / "over-fuse", f"direct={direct}", log=tmp_path / "log1") as over_fuse,
        Mount(real, tmp_path / "over-disk", f"direct={direct}", log=tmp_path / "log2") as over_disk,
    ):
        for mount, is_direct in ((over_fuse, direct == "auto"), (over_disk, False)):
            fd = os.open(mount.mountpoint / "vm.img", os.O_RDWR | os.O_APPEND)
            try:
                os.write(fd, b"x" * 512)
                flags = backing_flags(mount.pid, "vm.img")
                assert flags
                for one in flags:
                    assert bool(one & os.O_DIRECT) == is_direct
                    assert one & os.O_DSYNC
                    assert not one & (os.O_APPEND | os.O_CREAT | os.O_EXCL | os.O_TRUNC)
            finally:
                os.close(fd)
        assert (real / "vm.img").read_bytes() == bytes(BLOCK) + b"x" * 1024
