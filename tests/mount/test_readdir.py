"""Listings: whole, stable while the directory changes, and fast enough for 10,000 entries."""

from __future__ import annotations

import ctypes
import os
import random
import threading
from typing import TYPE_CHECKING, Any

import pytest

from tests.harness import FlakySource, Mount, wait_until
from tests.mount.callers import BOB, outcome
from tests.mount.conftest import CHECKED_BY_KERNEL

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.mount.conftest import Mounts, Pair

MANY = 10_000


class Stream:
    """opendir(3) and friends, which Python shows only in part."""

    def __init__(self, path: Path) -> None:
        self.inode = 0  # d_ino of the last entry
        self._libc: Any = ctypes.CDLL(None, use_errno=True)
        self._libc.opendir.restype = self._libc.readdir.restype = ctypes.c_void_p
        self._libc.telldir.restype = ctypes.c_long
        for name in ("readdir", "telldir", "rewinddir", "closedir"):
            getattr(self._libc, name).argtypes = [ctypes.c_void_p]
        self._libc.seekdir.argtypes = [ctypes.c_void_p, ctypes.c_long]
        self._stream = self._libc.opendir(os.fsencode(path))
        assert self._stream, os.strerror(ctypes.get_errno())

    def next(self) -> str | None:
        """One name, or None at the end. Raises OSError."""
        ctypes.set_errno(0)
        entry = self._libc.readdir(self._stream)
        if not entry:
            if ctypes.get_errno():
                raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
            return None
        self.inode = ctypes.c_uint64.from_address(entry).value
        return os.fsdecode(ctypes.string_at(entry + 19))  # struct dirent: d_name follows ino, off, reclen and type

    def rest(self) -> list[str]:
        return [*iter(self.next, None)]

    def tell(self) -> int:
        return int(self._libc.telldir(self._stream))

    def seek(self, position: int) -> None:
        self._libc.seekdir(self._stream, position)

    def rewind(self) -> None:
        self._libc.rewinddir(self._stream)

    def close(self) -> None:
        self._libc.closedir(self._stream)


@pytest.fixture
def many(pair: Pair) -> Pair:
    for number in range(MANY):
        (pair.source / f"entry-{number:05d}").touch()
    return pair


@pytest.fixture
def some(pair: Pair) -> Pair:
    for number in range(300):
        (pair.source / f"entry-{number:05d}").touch()
    return pair


def test_all_entries_once(many: Pair) -> None:
    names = os.listdir(many.mount)
    assert sorted(names) == [f"entry-{n:05d}" for n in range(MANY)]
    with os.scandir(many.mount) as entries:
        assert all(entry.is_file() and entry.inode() == os.stat(many.source / entry.name).st_ino for entry in entries)


def test_an_empty_directory(pair: Pair) -> None:
    assert os.listdir(pair.mount) == []
    stream = Stream(pair.mount)
    assert sorted(stream.rest()) == [".", ".."]
    stream.close()


def test_dots_have_their_inodes(pair: Pair) -> None:
    """`.` and `..` as getdents(2) gives them: the directory and its parent."""
    (pair.mount / "inner").mkdir()
    stream = Stream(pair.mount / "inner")
    listed = {stream.next(): stream.inode for _ in range(2)}
    stream.close()
    assert listed == {".": os.stat(pair.mount / "inner").st_ino, "..": os.stat(pair.mount).st_ino}


def test_types_in_the_listing(pair: Pair) -> None:
    (pair.source / "file").touch()
    (pair.source / "folder").mkdir()
    (pair.source / "link").symlink_to("folder")
    with os.scandir(pair.mount) as entries:
        kinds = {e.name: (e.is_file(follow_symlinks=False), e.is_dir(follow_symlinks=False)) for e in entries}
    assert kinds == {"file": (True, False), "folder": (False, True), "link": (False, False)}


@pytest.mark.parametrize("where", ["mount", "source"])
def test_a_listing_while_entries_come_and_go(many: Pair, where: str) -> None:
    """POSIX: what is there from beginning to end is listed exactly once; what comes or goes may be listed or not, not twice."""
    changing: Path = getattr(many, where)
    over = threading.Event()
    turns = 0

    def churn() -> None:
        nonlocal turns
        chance = random.Random(7)
        while not over.is_set():
            names = [changing / f"{chance.choice('amz')}-{chance.randrange(10**6)}" for _ in range(20)]
            for name in names:
                name.touch()
            for name in names:
                name.unlink(missing_ok=True)
            turns += 1

    churner = threading.Thread(target=churn)
    churner.start()
    try:
        for _ in range(3):
            names = os.listdir(many.mount)
            assert len(names) == len(set(names))
            assert len([name for name in names if name.startswith("entry-")]) == MANY
    finally:
        over.set()
        churner.join()
    assert turns > 2


def test_a_listing_while_its_entries_go(some: Pair) -> None:
    """`rm` in a loop over readdir(3): nothing is skipped."""
    stream = Stream(some.mount)
    seen = 0
    while (name := stream.next()) is not None:
        if name not in {".", ".."}:
            os.unlink(some.mount / name)
            seen += 1
    stream.close()
    assert seen == 300
    assert os.listdir(some.source) == []


def test_a_name_unlinked_between_two_reads_of_a_listing_stays_unlinked(mounts: Mounts) -> None:
    """The listing must not bring a name back to the kernel's cache that was looked up before, and unlinked since."""
    mount = mounts.pair(CHECKED_BY_KERNEL).mount  # where the kernel may trust its cache
    paths = [mount / f"entry-{number:05d}" for number in range(300)]
    for path in paths:
        path.touch()
    stream = Stream(mount)
    stream.next()
    for path in paths:
        path.unlink()
    stream.rest()
    stream.close()
    assert {outcome(path.stat) for path in paths} == {"ENOENT"}


def test_rewinding_reads_anew(some: Pair) -> None:
    stream = Stream(some.mount)
    before = stream.rest()
    (some.mount / "new").touch()
    (some.mount / "entry-00000").unlink()
    stream.rewind()
    after = stream.rest()
    stream.close()
    assert set(after) - set(before) == {"new"}
    assert set(before) - set(after) == {"entry-00000"}


def test_positions_lead_back(some: Pair) -> None:
    """telldir(3) and seekdir(3), also after entries have come and gone."""
    stream = Stream(some.mount)
    for _ in range(100):
        stream.next()
    position = stream.tell()
    rest = stream.rest()
    (some.mount / "aaa").touch()
    gone = next(name for name in rest if name.startswith("entry-"))
    (some.mount / gone).unlink()
    stream.seek(position)
    assert stream.rest() in (rest, [name for name in rest if name != gone])
    stream.seek(0)
    assert len(stream.rest()) in {302, 303}
    stream.close()


def test_two_listings_of_one_directory_at_once(some: Pair) -> None:
    first, second = Stream(some.mount), Stream(some.mount)
    names: tuple[list[str | None], list[str | None]] = ([], [])
    for _ in range(302):
        names[0].append(first.next())
        names[1].append(second.next())
    first.close()
    second.close()
    assert names[0] == names[1]
    assert None not in names[0]


def test_names_of_255_bytes_in_a_listing(pair: Pair) -> None:
    expected = [f"{number:03d}".ljust(255, "x") for number in range(200)]
    for name in expected:
        (pair.source / name).touch()
    assert sorted(os.listdir(pair.mount)) == expected


def test_a_directory_that_may_be_listed_but_not_searched(any_pair: Pair) -> None:
    """`r--`: the names are shown, and nothing behind them."""

    def prepare(directory: Path) -> None:
        (directory / "shown").mkdir()
        (directory / "shown/file").touch()
        (directory / "shown").chmod(0o744)

    def work(directory: Path) -> object:
        return os.listdir(directory / "shown"), outcome(lambda: os.stat(directory / "shown/file"))

    assert any_pair.same(work, prepare, BOB) == (["file"], "EACCES")


def test_a_directory_that_may_be_searched_but_not_listed(any_pair: Pair) -> None:
    def prepare(directory: Path) -> None:
        (directory / "hidden").mkdir()
        (directory / "hidden/file").write_bytes(b"x")
        (directory / "hidden").chmod(0o711)

    def work(directory: Path) -> object:
        return outcome(lambda: os.listdir(directory / "hidden")), (directory / "hidden/file").read_bytes()

    assert any_pair.same(work, prepare, BOB) == ("EACCES", b"x")


# ---- a listing of what fails


@pytest.fixture
def failing(tmp_path: Path) -> Iterator[tuple[FlakySource, Mount]]:
    real = tmp_path / "real"
    real.mkdir()
    for number in range(100):
        (real / f"file-{number:02d}").touch()
    with (
        FlakySource(real, tmp_path / "source", tmp_path / "trigger", tmp_path / "flaky.log") as source,
        Mount(
            tmp_path / "source", tmp_path / "mnt", "monitor=none", "attr_timeout=0", log=tmp_path / "mount.log"
        ) as mount,
    ):
        yield source, mount


def descriptors(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


def test_an_error_in_the_middle_is_told_after_what_comes_before_it(failing: tuple[FlakySource, Mount]) -> None:
    """And the kernel's count of what it was shown stays right: all descriptors come back when it forgets."""
    source, mount = failing
    before = descriptors(mount.pid)
    source.fail("lookup file-50 errno=EIO")
    for _ in range(20):
        stream = Stream(mount.mountpoint)
        assert stream.next()
        with pytest.raises(OSError, match="Input/output error"):
            stream.rest()
        stream.close()
    source.heal()
    assert len(os.listdir(mount.mountpoint)) == 100
    wait_until(lambda: _forgotten(mount.pid) <= before + 3, what="the server to close what the kernel has forgotten")


def _forgotten(pid: int) -> int:
    """Descriptors of the server after the kernel was told to forget names and inodes."""
    with open("/proc/sys/vm/drop_caches", "w", encoding="ascii") as file:
        file.write("2\n")
    return descriptors(pid)


def test_a_listing_shows_an_open_image_that_fails(failing: tuple[FlakySource, Mount]) -> None:
    """P7: `ls` of a directory does not fail for one image in an outage."""
    source, mount = failing
    with (mount.mountpoint / "file-50").open("r+b") as file:
        file.write(b"x")
        file.flush()
        assert os.fstat(file.fileno()).st_size == 1
        source.fail("* file-50 errno=EIO")
        with os.scandir(mount.mountpoint) as entries:
            sizes = {entry.name: entry.stat().st_size for entry in entries}
        source.heal()
    assert len(sizes) == 100
    assert sizes["file-50"] == 1
