"""What the suites of others share here: a place on disk, programs by name, and a mount above a source that fails.

A missing program fails its test with the package's name: on CI nothing is skipped for want of a package.
"""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.harness import FlakySource, Mount, wait_until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


@dataclass(frozen=True)
class Rig:
    """A directory on disk, a source above it that fails on demand, and the mount that hides this.

    *disk* is SOURCE without the part that fails: what a test finds there is what the storage has.
    """

    disk: Path
    source: FlakySource
    mount: Mount

    @contextmanager
    def outage(self, seconds: float) -> Iterator[None]:
        """Every read, write and fsync of SOURCE fails with EIO, from now until *seconds* have passed.

        The caller's block runs in the outage, which lasts longer where the block does. It is an error if
        SOURCE does not really fail, or if the mount has not noticed.
        """
        held_before = self._hangs()
        end = time.monotonic() + seconds
        self.source.fail("read,write,fsync * errno=EIO")
        try:
            self._assert_source_fails()
            yield
            wait_until(lambda: time.monotonic() >= end, timeout_s=seconds + 1, what="the outage's end")
            assert self._hangs() > held_before, f"no request met the outage; the log:\n{self.mount.log_text()}"
        finally:
            self.source.heal()

    def _assert_source_fails(self) -> None:
        probe = self.source.mountpoint / "outage-probe"
        fd = os.open(probe, os.O_RDWR | os.O_CREAT)
        try:
            with pytest.raises(OSError, match=os.strerror(errno.EIO)):
                os.pwrite(fd, b"x", 0)
        finally:
            os.close(fd)

    def _hangs(self) -> int:
        return self.mount.log_text().count("EIO")


@pytest.fixture
def disk_path() -> Iterator[Path]:
    """A directory on a disk that every user may enter: /tmp may be tmpfs, which refuses what disks allow."""
    path = Path(tempfile.mkdtemp(prefix="iohang-", dir="/var/tmp"))
    path.chmod(0o755)
    yield path
    shutil.rmtree(path)


@pytest.fixture
def rig(disk_path: Path, tmp_path: Path) -> Iterator[Rig]:
    disk = disk_path / "disk"
    disk.mkdir()
    with (
        FlakySource(disk, disk_path / "source", tmp_path / "trigger", log=tmp_path / "flaky.log") as source,
        Mount(
            disk_path / "source",
            disk_path / "mnt",
            "timeout=60",
            "interval=0.2",
            "monitor=none",
            log=tmp_path / "mount.log",
        ) as mount,
    ):
        yield Rig(disk, source, mount)


@pytest.fixture(scope="session")
def program() -> Callable[[str, str], str]:
    """`program("fio", "fio")`: where the program is, or a failure that names the package to install."""

    def find(name: str, package: str) -> str:
        path = shutil.which(name)
        if path is None:
            pytest.fail(f"{name} is missing: apt-get install {package}", pytrace=False)
        return path

    return find
