"""An image that another host changes beneath this mount: what `stat`, a seek to the end and a read say of it here.

SOURCE is a mount that believes attributes for ten minutes, as NFS does for up to one (`acregmax`). The other host writes beneath.
"""

from __future__ import annotations

import concurrent.futures
import mmap
import os
from typing import TYPE_CHECKING

import pytest

from tests.harness import FlakySource, Mount, wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

BLOCK = 4096
LIMIT_S = 30


@pytest.fixture
def image(tmp_path: Path) -> Iterator[tuple[Path, Path]]:
    """As the other host has it, and as it is here."""
    for name in ("real", "source", "mnt"):
        (tmp_path / name).mkdir()
    real = tmp_path / "real" / "image"
    real.write_bytes(b"a" * BLOCK)
    with (
        Mount(tmp_path / "real", tmp_path / "source", "attr_timeout=600", "monitor=none", log=tmp_path / "source.log"),
        Mount(tmp_path / "source", tmp_path / "mnt", "attr_timeout=0", "monitor=none", log=tmp_path / "log"),
    ):
        yield real, tmp_path / "mnt" / "image"


def test_growth_is_seen_through_a_direct_handle(image: tuple[Path, Path]) -> None:
    """docs/howto/live-migration.rst: "attr_timeout (1 s) is how long the destination may believe an old size"."""
    real, here = image
    fd = os.open(here, os.O_RDWR | os.O_DIRECT)
    try:
        assert os.lseek(fd, 0, os.SEEK_END) == BLOCK
        for blocks in (2, 3):
            with real.open("ab") as other:
                other.write(b"b" * BLOCK)
            assert os.lseek(fd, 0, os.SEEK_END) == blocks * BLOCK
            page = mmap.mmap(-1, BLOCK)
            assert os.preadv(fd, [page], (blocks - 1) * BLOCK) == BLOCK, "a read at what was the end"
            assert page[:] == b"b" * BLOCK
        os.truncate(real, BLOCK)
        assert os.fstat(fd).st_size == BLOCK
    finally:
        os.close(fd)


def test_attributes_that_do_not_come_are_answered_from_memory(tmp_path: Path) -> None:
    """P7: "Neither do ls, df, stat, open files' attributes" wait; also where nothing else has shown that the storage is gone."""
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "image").write_bytes(b"a" * BLOCK)
    flaky = FlakySource(tmp_path / "real", tmp_path / "source", tmp_path / "trigger", tmp_path / "flaky.log")
    options = ("attr_timeout=0", "blocked_after=1", "monitor=none")
    with (
        flaky,
        Mount(tmp_path / "source", tmp_path / "mnt", *options, log=tmp_path / "log"),
        concurrent.futures.ThreadPoolExecutor(1) as pool,
    ):
        fd = os.open(tmp_path / "mnt" / "image", os.O_RDWR | os.O_DIRECT)
        try:
            assert os.fstat(fd).st_size == BLOCK
            flaky.fail("getattr image hang")
            # The first waits for `blocked_after`, and no other does.
            sizes = pool.submit(lambda: [os.fstat(fd).st_size for _ in range(40)])
            assert sizes.result(LIMIT_S) == [BLOCK] * 40
            flaky.heal()
            with (tmp_path / "real" / "image").open("ab") as other:
                other.write(b"b" * BLOCK)
            wait_until(lambda: os.fstat(fd).st_size == 2 * BLOCK, what="the size that it has now")
        finally:
            flaky.heal()
            os.close(fd)
