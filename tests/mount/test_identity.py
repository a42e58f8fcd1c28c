"""Identity by (device, inode, file handle), found relative to directories: hard links are one file, and nothing leaves SOURCE."""

from __future__ import annotations

import os
import re
import subprocess
import threading
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest

from tests.harness import wait_until
from tests.mount.callers import outcome

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from tests.mount.conftest import Pair

RENAME_EXCHANGE = 2  # linux/fs.h


# ---- hard links


def test_hard_links_are_one_inode(pair: Pair) -> None:
    (pair.mount / "a").write_bytes(b"first")
    os.link(pair.mount / "a", pair.mount / "b")
    assert os.stat(pair.mount / "a").st_ino == os.stat(pair.mount / "b").st_ino
    with (pair.mount / "a").open("r+b") as one, (pair.mount / "b").open("rb") as other:
        one.write(b"FIRST")
        one.flush()
        assert other.read() == b"FIRST"
        os.ftruncate(one.fileno(), 2)
        assert os.fstat(other.fileno()).st_size == 2


def test_hard_links_made_on_source_are_one_inode(pair: Pair) -> None:
    (pair.source / "a").write_bytes(b"x")
    (pair.source / "folder").mkdir()
    os.link(pair.source / "a", pair.source / "folder/b")
    assert os.path.samefile(pair.mount / "a", pair.mount / "folder/b")


def test_the_count_of_links_is_fresh_at_every_name(pair: Pair) -> None:
    """At once, although the kernel may keep attributes for a second: each change is made through the mount."""
    names = [pair.mount / name for name in "abcd"]
    names[0].touch()
    fd = os.open(names[0], os.O_RDONLY)
    for count, name in enumerate(names[1:], 2):
        os.link(names[0], name)
        assert {os.stat(one).st_nlink for one in names[:count]} == {count}
    names[1].unlink()
    assert {os.stat(one).st_nlink for one in (names[0], names[2], names[3])} == {3}
    (pair.mount / "new").touch()
    os.rename(pair.mount / "new", names[2])
    assert os.stat(names[0]).st_nlink == os.fstat(fd).st_nlink == 2
    os.rename(names[0], names[3])  # two names of one file: rename(2) does nothing
    assert names[0].exists()
    names[0].unlink()
    names[3].unlink()
    assert os.fstat(fd).st_nlink == 0
    os.close(fd)


def test_the_count_of_directories_is_fresh(pair: Pair) -> None:
    (pair.mount / "folder").mkdir()
    for name, count in (("a", 3), ("b", 4)):
        (pair.mount / "folder" / name).mkdir()
        assert os.stat(pair.mount / "folder").st_nlink == count
    (pair.mount / "folder/a").rmdir()
    assert os.stat(pair.mount / "folder").st_nlink == 3
    (pair.mount / "elsewhere").mkdir()
    os.rename(pair.mount / "folder/b", pair.mount / "elsewhere/b")
    assert (os.stat(pair.mount / "folder").st_nlink, os.stat(pair.mount / "elsewhere").st_nlink) == (2, 3)


# ---- directories that move


def test_children_keep_working_when_their_directory_is_renamed(pair: Pair) -> None:
    (pair.mount / "a/b/c").mkdir(parents=True)
    (pair.mount / "a/b/c/file").write_bytes(b"data")
    inside = os.open(pair.mount / "a/b/c", os.O_RDONLY)
    fd = os.open(pair.mount / "a/b/c/file", os.O_RDWR)
    os.rename(pair.mount / "a", pair.mount / "moved")
    os.rename(pair.mount / "moved/b", pair.mount / "b")
    assert os.pread(fd, 4, 0) == b"data"
    assert os.listdir(inside) == ["file"]
    os.close(os.open("new", os.O_CREAT | os.O_WRONLY, dir_fd=inside))
    assert sorted(os.listdir(pair.source / "b/c")) == ["file", "new"]
    assert (pair.mount / "b/c/file").read_bytes() == b"data"
    assert outcome(lambda: os.stat(pair.mount / "a/b/c/file")) == "ENOENT"
    os.close(fd)
    os.close(inside)


def test_a_directory_renamed_on_source_keeps_its_open_children(pair: Pair) -> None:
    (pair.mount / "a").mkdir()
    fd = os.open(pair.mount / "a/file", os.O_CREAT | os.O_RDWR)
    os.rename(pair.source / "a", pair.source / "b")
    os.write(fd, b"data")
    assert os.fstat(fd).st_size == 4
    os.close(fd)
    assert (pair.mount / "b/file").read_bytes() == b"data"
    wait_until(lambda: not (pair.mount / "a").exists(), 5, "the old name to be forgotten (attr_timeout)")


def test_a_directory_removed_while_it_is_open(pair: Pair) -> None:
    (pair.mount / "a").mkdir()
    inside = os.open(pair.mount / "a", os.O_RDONLY)
    (pair.mount / "a").rmdir()
    assert os.fstat(inside).st_nlink == os.fstat(inside).st_nlink == 0
    assert os.listdir(inside) == []
    assert outcome(lambda: os.open("x", os.O_CREAT, dir_fd=inside)) == "ENOENT"
    os.close(inside)


# ---- changes behind our back


def _reused(source: Path, number: int) -> bool:
    """Make files until one has the inode *number*; remove the others."""
    made = []
    try:
        for count in range(2000):
            path = source / f"try-{count}"
            path.write_bytes(b"the new file")
            if path.stat().st_ino == number:
                path.rename(source / "file")
                return True
            made.append(path)
        return False
    finally:
        for path in made:
            path.unlink()


def test_an_inode_number_used_again_is_another_file(pair: Pair) -> None:
    """ext4 gives a number out again at once. The file handle has the generation: the old file is not taken for the new."""
    path = pair.mount / "file"
    (pair.source / "file").write_bytes(b"the old file")
    number = os.stat(path).st_ino
    assert path.read_bytes() == b"the old file"
    (pair.source / "file").unlink()
    wait_until(lambda: not path.exists(), 5, "the name to be forgotten")
    assert _reused(pair.source, number), "SOURCE is not on ext4? It did not use the number again"
    wait_until(path.exists, 5, "the new file to be seen")
    assert path.read_bytes() == b"the new file"
    assert path.stat().st_ino == number
    assert path.stat().st_size == 12


def test_an_open_file_is_not_its_successor(pair: Pair) -> None:
    (pair.source / "file").write_bytes(b"the old file")
    fd = os.open(pair.mount / "file", os.O_RDWR)
    (pair.source / "file").unlink()
    (pair.source / "file").write_bytes(b"the new file")
    wait_until(
        lambda: (pair.mount / "file").read_bytes() == b"the new file", 5, "the new file to be seen (attr_timeout)"
    )
    os.pwrite(fd, b"THE", 0)
    assert os.pread(fd, 20, 0) == b"THE old file"
    assert os.fstat(fd).st_nlink == 0
    assert (pair.source / "file").read_bytes() == b"the new file"
    os.close(fd)


def test_a_file_that_becomes_a_directory(pair: Pair) -> None:
    (pair.source / "name").touch()
    assert (pair.mount / "name").is_file()
    (pair.source / "name").unlink()
    (pair.source / "name").mkdir()
    (pair.source / "name/child").touch()
    wait_until((pair.mount / "name").is_dir, 5, "the directory to be seen")
    assert os.listdir(pair.mount / "name") == ["child"]


# ---- other file systems within SOURCE


def test_a_file_system_mounted_within_source(pair: Pair, run: Callable[..., str]) -> None:
    """Its inodes have numbers that SOURCE's own may have, too: both stay apart."""
    (pair.source / "inner").mkdir()
    run("mount", "-t", "tmpfs", "none", pair.source / "inner")
    try:
        (pair.source / "outer").write_bytes(b"outer")
        (pair.mount / "inner/file").write_bytes(b"inner")
        assert (pair.source / "inner/file").read_bytes() == b"inner"
        assert os.listdir(pair.mount / "inner") == ["file"]
        inside = {os.stat(pair.mount / name).st_ino for name in ("inner", "inner/file", "outer", ".")}
        assert len(inside) == 4
        for call in (os.rename, os.link):
            assert outcome(lambda call=call: call(pair.mount / "outer", pair.mount / "inner/x")) == "EXDEV"  # type: ignore[misc]
    finally:
        run("umount", "-l", pair.source / "inner")  # lazily: the server has descriptors there until the kernel forgets


# ---- nothing leaves SOURCE


def test_a_symlink_to_the_outside_is_followed_by_the_caller_not_by_the_server(
    pair: Pair, program: Callable[..., str]
) -> None:
    """It leads where the caller's own name space has it, as with any file system; the server only reads it out."""
    outside = pair.control / "outside"
    outside.write_bytes(b"outside")
    (pair.source / "out").symlink_to(outside)
    (pair.source / "up").symlink_to("../../../../../../../../etc/hostname")
    (pair.source / "relative").symlink_to("../.")
    assert os.readlink(pair.mount / "out") == str(outside)
    with _traced(pair, program("strace", "strace")) as calls:
        assert (pair.mount / "out").read_bytes() == b"outside"
        outcome((pair.mount / "up").read_bytes)
        assert os.path.samefile(pair.mount / "relative", pair.mount.parent)
        (pair.mount / "out").write_bytes(b"written")
        os.truncate(pair.mount / "out", 3)
        os.chmod(pair.mount / "out", 0o600)
    assert outside.read_bytes() == b"wri"
    assert outside.stat().st_mode & 0o777 == 0o600
    assert calls
    # What readlink(2) gave goes to the kernel, by way of pyfuse3's socket; nothing else may have anything to do with it.
    reached = [line for line in calls if re.search("outside|hostname", line)]
    assert [line for line in reached if "readlink" in line]
    assert not [line for line in reached if not re.search(r"readlink|writev\(|recvfrom\(|write\(\d+</dev/fuse>", line)]


@contextmanager
def _traced(pair: Pair, strace_program: str) -> Iterator[list[str]]:
    """The server's system calls on files during the block, each with the paths of its descriptors."""
    log = pair.control / "trace"
    strace = subprocess.Popen(
        [strace_program, "-f", "-y", "-s", "200", "-e", "trace=file,desc", "-o", str(log), "-p", str(pair.server.pid)],
        stderr=subprocess.PIPE,
    )
    assert strace.stderr is not None
    strace.stderr.readline()
    lines: list[str] = []
    try:
        yield lines
    finally:
        strace.terminate()
        strace.wait()
        strace.stderr.close()
        lines += log.read_text(errors="replace").splitlines()


@pytest.mark.alone
@pytest.mark.parametrize("kind", ["a directory on the way", "the file itself"])
def test_no_race_with_a_symlink_leads_out(pair: Pair, kind: str, renameat2: Callable[[Path, Path, int], None]) -> None:
    """A name flips between the real thing and a symlink to the outside, while it is read, written, created in and changed.

    It does so through the mount and on SOURCE, thousands of times, and the server never touches the outside. What a caller may
    rightly reach is told apart by forbidding symlinks to the caller (O_NOFOLLOW, and directory descriptors).
    """
    outside = pair.control / "outside"
    outside.mkdir()
    (outside / "file").write_bytes(b"outside")
    (pair.source / "real").mkdir()
    (pair.source / "real/file").write_bytes(b"inside!")
    if kind == "the file itself":
        flips, (one, other) = "real", ("file", "decoy")
        (pair.source / "real/decoy").symlink_to(outside / "file")
    else:
        flips, (one, other) = ".", ("real", "decoy")
        (pair.source / "decoy").symlink_to(outside)
    over = threading.Event()

    def flip(directory: Path) -> None:
        while not over.is_set():
            renameat2(directory / flips / one, directory / flips / other, RENAME_EXCHANGE)

    flippers = [threading.Thread(target=flip, args=(directory,)) for directory in (pair.source, pair.mount)]
    for flipper in flippers:
        flipper.start()
    reached = []
    succeeded = 0
    end = time.monotonic() + 2
    try:
        while time.monotonic() < end:
            for use in (_read, _write, _create, _change):
                try:
                    reached.append(use(pair.mount))
                    succeeded += 1
                except OSError:
                    continue  # ELOOP, ENOTDIR, ENOENT: what a race may answer
    finally:
        over.set()
        for flipper in flippers:
            flipper.join()
    assert succeeded > 50
    assert b"outside" not in reached
    assert os.listdir(outside) == ["file"]
    assert (outside / "file").read_bytes() == b"outside"
    assert (outside / "file").stat().st_mode & 0o777 != 0o612


def _opened(mount: Path, flags: int) -> int:
    """`real/file`, by a caller who follows no symlink: from here on, a way out could only be the server's."""
    directory = os.open(mount / "real", os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        return os.open("file", flags | os.O_NOFOLLOW, dir_fd=directory)
    finally:
        os.close(directory)


def _read(mount: Path) -> bytes:
    fd = _opened(mount, os.O_RDONLY)
    try:
        return os.read(fd, 7)
    finally:
        os.close(fd)


def _write(mount: Path) -> bytes:
    fd = _opened(mount, os.O_WRONLY)
    try:
        os.write(fd, b"inside!")
    finally:
        os.close(fd)
    return b""


def _create(mount: Path) -> bytes:
    directory = os.open(mount / "real", os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        os.close(os.open("new", os.O_CREAT | os.O_EXCL | os.O_WRONLY, dir_fd=directory))
        os.unlink("new", dir_fd=directory)
    finally:
        os.close(directory)
    return b""


def _change(mount: Path) -> bytes:
    fd = _opened(mount, os.O_RDWR)
    try:
        os.fchmod(fd, 0o612)
    finally:
        os.close(fd)
    return b""


def test_the_server_looks_up_no_dots(pair: Pair) -> None:
    """`..` at the top of the mount is the kernel's business; SOURCE's parent cannot be reached by any name."""
    top = pair.mount.parent
    assert os.path.samefile(top / "..", top.parent)
    assert os.path.samefile(top / pair.mount.name / "..", top)
