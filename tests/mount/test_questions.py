"""What is asked about an open image in the moment in which an outage begins: memory answers, and nobody waits for its end."""

from __future__ import annotations

import concurrent.futures
import contextlib
import itertools
import os
import time
from typing import TYPE_CHECKING

import pytest

from contrib.bench.isolation import Site
from iohang_fuse.filesystem import METADATA_SHARE
from tests.harness import FlakySource, Mount, wait_until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

BLOCK = 4096
NEVER_S = 600
"""For `blocked_after`, and for the timeout: what is answered sooner was not answered by them."""
LIMIT_S = 60
STATS = METADATA_SHARE + 8


@contextlib.contextmanager
def _site(folder: Path, *options: str) -> Iterator[tuple[Site, int]]:
    """A mount, and the open image a.img on it, of one block, of which nobody has asked for attributes since its open."""
    (folder / "real").mkdir()
    for name in ("a.img", "b.img", "c.img"):
        (folder / "real" / name).write_bytes(b"x" * BLOCK)
    with (
        FlakySource(folder / "real", folder / "src", folder / "trigger", folder / "flaky.log") as flaky,
        Mount(
            folder / "src", folder / "mnt", "monitor=none", "attr_timeout=0", *options, log=folder / "mnt.log"
        ) as mount,
    ):
        fd = os.open(mount.mountpoint / "a.img", os.O_RDWR | os.O_DIRECT)
        try:
            os.pwrite(fd, b"x" * BLOCK, 0)  # before the first one, the server opens the file once more
            yield Site(flaky, mount, folder), fd
        finally:
            flaky.heal()
            os.close(fd)
        assert "a bug" not in mount.log_text()


@pytest.fixture
def pool() -> Iterator[concurrent.futures.ThreadPoolExecutor]:
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        yield pool


def _answered(call: concurrent.futures.Future[object], what: str) -> object:
    try:
        return call.result(timeout=LIMIT_S)
    except concurrent.futures.TimeoutError:
        pytest.fail(f"waits for the end of the outage: {what}")


@pytest.mark.parametrize("asked", ["stat", "fstat", "ls"])
def test_what_was_asked_before_the_hang_is_answered_when_it_begins(
    tmp_path: Path, pool: concurrent.futures.Executor, asked: str
) -> None:
    """P7: "A question about an open image that is under way when its hang begins is answered from memory then".

    Neither do other names of the directory wait for it: a listing that is under way locks the directory in the kernel.
    """
    with _site(tmp_path, f"timeout={NEVER_S}", f"blocked_after={NEVER_S}", "interval=0.2") as (site, fd):
        folder = site.mount.mountpoint
        calls: dict[str, Callable[[], object]] = {
            "stat": lambda: (folder / "a.img").stat().st_size,
            "fstat": lambda: os.fstat(fd).st_size,
            "ls": lambda: sorted(os.listdir(folder)),
        }
        before = site.waiting(site.flaky)
        site.flaky.fail("lookup,getattr a.img hang", "write a.img errno=EIO")
        try:
            early = pool.submit(calls[asked])
            looks = itertools.accumulate(
                iter(lambda: site.waiting(site.flaky) > before, None), lambda n, yes: (n + 1) * yes
            )
            wait_until(lambda: next(looks) > 25, what="the question to hang in SOURCE, and not just to pass through it")
            assert not early.done()
            write = pool.submit(os.pwrite, fd, b"y" * BLOCK, BLOCK)
            wait_until(lambda: "write failed with EIO" in site.mount.log_text(), what="the hang's begin")
            assert _answered(pool.submit((folder / "b.img").stat), "another name, which the kernel does not know yet")
            assert _answered(early, asked) == (["a.img", "b.img", "c.img"] if asked == "ls" else BLOCK)
            for name, call in calls.items():
                _answered(pool.submit(call), f"{name}, after that")
            assert not write.done()
            assert site.waiting(site.flaky) > before, "SOURCE has answered: nothing of this was from memory"
        finally:
            site.flaky.heal()
        assert write.result(timeout=LIMIT_S) == BLOCK
        wait_until(lambda: os.fstat(fd).st_size == 2 * BLOCK, what="SOURCE to be asked again")


def test_what_blocks_is_answered_when_that_is_noticed(tmp_path: Path, pool: concurrent.futures.Executor) -> None:
    """P7: the same where nothing fails, and nothing returns (a `hard` mount): everybody has asked before the hang is noticed."""
    with _site(tmp_path, f"timeout={NEVER_S}", "blocked_after=2", "interval=0.2") as (site, fd):
        folder = site.mount.mountpoint
        site.flaky.fail("* a.img hang")
        try:
            write = pool.submit(os.pwrite, fd, b"y" * BLOCK, BLOCK)
            early = {
                "stat": pool.submit((folder / "a.img").stat),
                "fstat": pool.submit(os.fstat, fd),
                "ls": pool.submit(os.listdir, folder),
                "another name": pool.submit((folder / "c.img").stat),
            }
            for what, call in early.items():
                _answered(call, what)
            assert not write.done()
        finally:
            site.flaky.heal()
        assert write.result(timeout=LIMIT_S) == BLOCK


def test_a_question_that_is_not_answered_while_nothing_else_hangs(
    tmp_path: Path, pool: concurrent.futures.Executor
) -> None:
    """P7: "after `blocked_after` ... although nothing hangs"; "no other is asked" then."""
    with _site(tmp_path, "blocked_after=0.5") as (site, fd):
        folder = site.mount.mountpoint
        os.listdir(folder)
        site.flaky.fail("lookup,getattr a.img hang")
        try:
            for what, call in {
                "stat": (folder / "a.img").stat,
                "fstat": lambda: os.fstat(fd),
                "ls": lambda: os.listdir(folder),
            }.items():
                _answered(pool.submit(call), what)  # type: ignore[arg-type]
            began_s = time.monotonic()
            for _ in range(STATS):
                _answered(pool.submit((folder / "a.img").stat), "stat, once more")
            assert time.monotonic() - began_s < STATS * 0.5, "each has waited for `blocked_after`"
            wait_until(lambda: site.waiting(site.flaky) == 1, what="SOURCE to have one question, and no other")
            assert "hangs" not in site.mount.log_text()
        finally:
            site.flaky.heal()
        (folder.parent / "real" / "a.img").chmod(0o640)
        wait_until(lambda: os.fstat(fd).st_mode & 0o777 == 0o640, what="SOURCE to be asked again")


def test_what_is_found_late_is_dropped(tmp_path: Path, pool: concurrent.futures.Executor) -> None:
    """P7: "What SOURCE says to it so late is dropped", with the descriptor that a lookup has opened."""
    rounds, open_now_and_then = 6, 3
    with _site(tmp_path, "blocked_after=0.2") as (site, fd):
        image = site.mount.mountpoint / "a.img"
        before = _descriptors(site.mount.pid)
        for mode in range(0o600, 0o600 + rounds):
            site.flaky.fail("lookup a.img hang")
            _answered(pool.submit(image.stat), "stat")
            (tmp_path / "real" / "a.img").chmod(mode)
            assert os.fstat(fd).st_mode & 0o777 != mode, "P7: no other is asked"
            site.flaky.heal()
            wait_until(lambda mode=mode: os.fstat(fd).st_mode & 0o777 == mode, what="SOURCE to be asked again")  # type: ignore[misc]
        wait_until(
            lambda: _descriptors(site.mount.pid) < before + open_now_and_then, what="what was found late to be closed"
        )


def test_questions_about_many_images_leave_room_in_their_directory(tmp_path: Path) -> None:
    """P7: "metadata has threads of its own (512), and each inode a share of these (32)".

    A question about an image has a share of the image's, also where it is about its name: the directory has room for others.
    """
    with _site(tmp_path, f"blocked_after={NEVER_S}") as (site, _), contextlib.ExitStack() as opened:
        images = [site.mount.mountpoint / f"{number}.img" for number in range(STATS)]
        for image in images:
            (tmp_path / "real" / image.name).write_bytes(b"x")
            opened.enter_context(image.open("rb"))
        before = site.waiting(site.flaky)
        with concurrent.futures.ThreadPoolExecutor(STATS + 1) as pool:
            try:
                site.flaky.fail("lookup *[0-9].img hang")
                stats = [pool.submit(image.stat) for image in images]
                wait_until(lambda: site.waiting(site.flaky) >= before + STATS, what="all questions to be under way")
                assert _answered(pool.submit((site.mount.mountpoint / "b.img").stat), "another name in their directory")
            finally:
                site.flaky.heal()
            assert {_answered(stat, "a stat, after the outage").st_size for stat in stats} == {1}  # type: ignore[attr-defined]


def _descriptors(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))
