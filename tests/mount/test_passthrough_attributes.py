"""A complete passthrough, attributes: stat, times, modes, owners, extended attributes, statfs."""

from __future__ import annotations

import mmap
import os
import stat
import subprocess
import time
from typing import TYPE_CHECKING

import pytest

from tests.mount.callers import ALICE, BOB, TEAM, User, as_user, outcome

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.mount.conftest import Pair

YEAR_2001_NS = 1_000_000_000_123_456_789
YEAR_2033_NS = 2_000_000_000_987_654_321


def of(status: os.stat_result) -> tuple[int, ...]:
    return (
        status.st_mode, status.st_nlink, status.st_uid, status.st_gid, status.st_rdev, status.st_size, status.st_blocks,
        status.st_blksize, status.st_mtime_ns, status.st_ctime_ns,
    )  # fmt: skip


def test_stat_says_what_source_says(pair: Pair) -> None:
    (pair.source / "file").write_bytes(b"x" * 10000)
    (pair.source / "folder").mkdir()
    (pair.source / "link").symlink_to("somewhere")
    os.mkfifo(pair.source / "fifo")
    os.mknod(pair.source / "device", stat.S_IFBLK | 0o600, os.makedev(259, 70000))
    for name in ("file", "folder", "link", "fifo", "device"):
        through, without = os.lstat(pair.mount / name), os.lstat(pair.source / name)
        assert of(through) == of(without), name
        assert through.st_ino == without.st_ino, name


# ---- times


@pytest.mark.parametrize("kind", ["file", "folder", "link"])
@pytest.mark.parametrize("times", [(YEAR_2001_NS, YEAR_2033_NS), (0, 1), (-5_000_000_001, 4_294_967_296_000_000_001)])
def test_times_to_the_nanosecond(pair: Pair, kind: str, times: tuple[int, int]) -> None:
    (pair.mount / "file").touch()
    (pair.mount / "folder").mkdir()
    (pair.mount / "link").symlink_to("file")
    os.utime(pair.mount / kind, ns=times, follow_symlinks=False)
    for directory in (pair.mount, pair.source):
        status = os.lstat(directory / kind)
        assert (status.st_atime_ns, status.st_mtime_ns) == times
    if kind == "link":
        assert os.stat(pair.source / "file").st_mtime_ns > YEAR_2001_NS


def test_one_time_alone_leaves_the_other(pair: Pair, run: Callable[..., str]) -> None:
    """UTIME_OMIT and UTIME_NOW, as touch(1) has them."""
    path = pair.mount / "file"
    path.touch()
    os.utime(path, ns=(YEAR_2001_NS, YEAR_2001_NS))
    run("touch", "-m", "-d", "@2000000000.5", path)
    status = os.stat(pair.source / "file")
    assert (status.st_atime_ns, status.st_mtime_ns) == (YEAR_2001_NS, 2_000_000_000_500_000_000)
    run("touch", "-a", path)
    status = os.stat(pair.source / "file")
    assert abs(status.st_atime - time.time()) < 5
    assert status.st_mtime_ns == 2_000_000_000_500_000_000


def test_setting_one_time_does_not_undo_a_write(pair: Pair, program: Callable[..., str]) -> None:
    """The other time is left alone, not set to what it was: somebody may be writing."""
    path = pair.source / "file"
    path.touch()
    traced = subprocess.Popen(
        [
            program("strace", "strace"),
            "-f",
            "-e",
            "trace=utimensat",
            "-o",
            str(pair.control / "trace"),
            "-p",
            str(pair.server.pid),
        ],
        stderr=subprocess.PIPE,
    )
    assert traced.stderr is not None
    traced.stderr.readline()  # "attached"
    subprocess.run(["touch", "-a", str(pair.mount / "file")], check=True)
    traced.terminate()
    traced.wait()
    traced.stderr.close()
    assert "UTIME_OMIT" in (pair.control / "trace").read_text()


def test_who_may_write_may_touch(any_pair: Pair) -> None:
    """utimensat(2): now may be set by whoever may write, other times by the owner alone."""
    path = any_pair.mount / "file"
    path.touch()
    os.chown(any_pair.source / "file", ALICE.uid, ALICE.gid)
    path.chmod(0o666)
    os.utime(path, ns=(YEAR_2001_NS, YEAR_2001_NS))
    as_user(BOB, lambda: os.utime(path))
    assert abs(os.stat(any_pair.source / "file").st_mtime - time.time()) < 5
    assert outcome(lambda: as_user(BOB, lambda: os.utime(path, ns=(1, 1)))) == "EPERM"
    path.chmod(0o644)
    assert outcome(lambda: as_user(BOB, lambda: os.utime(path))) == "EACCES"
    as_user(ALICE, lambda: os.utime(path, ns=(1, 1)))
    assert os.stat(any_pair.source / "file").st_mtime_ns == 1


def test_reading_and_writing_set_times(pair: Pair) -> None:
    path = pair.mount / "file"
    path.touch()
    os.utime(path, ns=(YEAR_2001_NS, YEAR_2001_NS))
    with path.open("r+b") as file:
        file.write(b"x")
    assert os.stat(path).st_mtime_ns == os.stat(pair.source / "file").st_mtime_ns > YEAR_2001_NS
    before = os.stat(pair.mount).st_mtime_ns
    time.sleep(0.02)
    (pair.mount / "another").touch()
    assert os.stat(pair.mount).st_mtime_ns == os.stat(pair.source).st_mtime_ns > before


# ---- sizes by name


def test_truncate_by_name_by_who_may_write(any_pair: Pair) -> None:
    """truncate(2) needs no ownership, although FUSE sends a new mtime along."""
    path = any_pair.mount / "file"
    path.write_bytes(b"12345")
    path.chmod(0o666)
    as_user(BOB, lambda: os.truncate(path, 2))
    assert (any_pair.source / "file").read_bytes() == b"12"
    path.chmod(0o644)
    assert outcome(lambda: as_user(BOB, lambda: os.truncate(path, 1))) == "EACCES"


def test_truncate_moves_mtime_and_ctime_even_to_the_same_size(pair: Pair) -> None:
    path = pair.mount / "file"
    path.write_bytes(b"12345")
    os.utime(path, ns=(YEAR_2001_NS, YEAR_2001_NS))
    os.truncate(path, 5)
    assert os.stat(path).st_mtime_ns == os.stat(pair.source / "file").st_mtime_ns > YEAR_2001_NS


# ---- set-ID bits

SPECIAL = 0o6777


def _written(path: Path) -> None:
    with path.open("r+b") as file:
        file.write(b"x")


def _written_directly(path: Path) -> None:
    fd = os.open(path, os.O_RDWR | os.O_DIRECT)
    with mmap.mmap(-1, mmap.PAGESIZE) as block:
        os.pwrite(fd, block, 0)
    os.close(fd)


BY_MODE: dict[str, Callable[[Path], object]] = {
    "write": _written,
    "direct write": _written_directly,  # of which the kernel does not ask for security.capability: see filesystem._told
    "truncate": lambda path: os.truncate(path, 1),
    "truncate at open": lambda path: os.close(os.open(path, os.O_WRONLY | os.O_TRUNC)),
}


@pytest.mark.parametrize("user", [User(0, 0), ALICE, BOB])
@pytest.mark.parametrize("how", BY_MODE)
def test_set_id_bits_go_when_another_writes_and_stay_for_root(any_pair: Pair, user: User, how: str) -> None:
    def prepare(directory: Path) -> None:
        path = directory / "file"
        path.write_bytes(b"content")
        os.chown(path, ALICE.uid, ALICE.gid)
        path.chmod(SPECIAL)

    def work(directory: Path) -> str:
        BY_MODE[how](directory / "file")
        return oct(os.stat(directory / "file").st_mode & 0o7777)

    assert any_pair.same(work, prepare, user) == ("0o6777" if user.uid == 0 else "0o777")
    assert oct(os.stat(any_pair.source / "file").st_mode & 0o7777) == ("0o6777" if user.uid == 0 else "0o777")


@pytest.mark.parametrize("how", ["write", "truncate"])
def test_set_id_bits_go_when_the_writer_is_not_the_opener(any_pair: Pair, how: str) -> None:
    """A descriptor may be handed on; what counts is who writes."""

    def prepare(directory: Path) -> None:
        path = directory / "file"
        path.write_bytes(b"content")
        os.chown(path, ALICE.uid, ALICE.gid)
        path.chmod(SPECIAL)

    def work(directory: Path) -> str:
        fd = os.open(directory / "file", os.O_RDWR)
        as_user(BOB, lambda: os.pwrite(fd, b"x", 0) if how == "write" else os.ftruncate(fd, 1))
        os.close(fd)
        return oct(os.stat(directory / "file").st_mode & 0o7777)

    assert any_pair.same(work, prepare) == "0o777"


def test_set_id_bits_go_with_the_owner(pair: Pair) -> None:
    def prepare(directory: Path) -> None:
        (directory / "file").touch()
        (directory / "file").chmod(0o6755)

    def work(directory: Path) -> str:
        os.chown(directory / "file", ALICE.uid, ALICE.gid)
        return oct(os.stat(directory / "file").st_mode)

    assert pair.same(work, prepare) == "0o100755"


def test_chmod_sgid_by_who_is_not_in_the_group(any_pair: Pair) -> None:
    def prepare(directory: Path) -> None:
        (directory / "file").touch()
        os.chown(directory / "file", ALICE.uid, TEAM)

    def work(directory: Path) -> str:
        (directory / "file").chmod(0o2755)
        return oct(os.stat(directory / "file").st_mode)

    assert any_pair.same(work, prepare, ALICE) == "0o100755"
    assert any_pair.same(work, None, User(ALICE.uid, ALICE.gid, (TEAM,))) == "0o102755"


# ---- extended attributes


def test_xattrs_come_and_go(pair: Pair) -> None:
    (pair.mount / "file").touch()
    (pair.mount / "folder").mkdir()
    for name in ("file", "folder"):
        path, source = pair.mount / name, pair.source / name
        os.setxattr(path, "user.empty", b"")
        os.setxattr(path, "user.binary", bytes(range(256)), os.XATTR_CREATE)
        os.setxattr(path, "user.binary", b"\xff\x00", os.XATTR_REPLACE)
        os.setxattr(path, "trusted.secret", b"root's")
        assert {n: os.getxattr(source, n) for n in os.listxattr(source)} == {
            "user.empty": b"",
            "user.binary": b"\xff\x00",
            "trusted.secret": b"root's",
        }
        assert {n: os.getxattr(path, n) for n in os.listxattr(path)} == {
            "user.empty": b"",
            "user.binary": b"\xff\x00",
            "trusted.secret": b"root's",
        }
        os.removexattr(path, "user.empty")
        assert sorted(os.listxattr(source)) == ["trusted.secret", "user.binary"]


def test_xattrs_of_a_symlink_are_its_own(pair: Pair) -> None:
    (pair.mount / "file").touch()
    (pair.mount / "link").symlink_to("file")
    os.setxattr(pair.mount / "link", "trusted.x", b"link", follow_symlinks=False)
    assert os.listxattr(pair.source / "file") == []
    assert os.listxattr(pair.mount / "link", follow_symlinks=False) == ["trusted.x"]
    assert os.getxattr(pair.source / "link", "trusted.x", follow_symlinks=False) == b"link"
    os.removexattr(pair.mount / "link", "trusted.x", follow_symlinks=False)
    assert os.listxattr(pair.source / "link", follow_symlinks=False) == []


def test_xattrs_follow_the_files_permissions(any_pair: Pair) -> None:
    def prepare(directory: Path) -> None:
        for name, mode in (("private", 0o600), ("shown", 0o644), ("open", 0o666)):
            path = directory / name
            path.touch()
            os.setxattr(path, "user.x", b"value")
            os.setxattr(path, "trusted.x", b"value")
            path.chmod(mode)

    def work(directory: Path) -> list[object]:
        return [
            (
                name,
                outcome(lambda p=directory / name: os.getxattr(p, "user.x")),  # type: ignore[misc]
                outcome(lambda p=directory / name: os.getxattr(p, "trusted.x")),  # type: ignore[misc]
                outcome(lambda p=directory / name: os.listxattr(p)),  # type: ignore[misc]
                outcome(lambda p=directory / name: os.setxattr(p, "user.y", b"")),  # type: ignore[misc]
                outcome(lambda p=directory / name: os.setxattr(p, "trusted.y", b"")),  # type: ignore[misc]
                outcome(lambda p=directory / name: os.removexattr(p, "user.x")),  # type: ignore[misc]
            )
            for name in ("private", "shown", "open")
        ]

    answers = any_pair.same(work, prepare, BOB)
    assert [row[1] for row in answers] == ["EACCES", b"value", b"value"]
    assert all("trusted.x" not in row[3] for row in answers)


def test_a_users_capabilities_of_files_are_not_for_others_to_give(any_pair: Pair) -> None:
    def prepare(directory: Path) -> None:
        (directory / "file").touch()
        os.chown(directory / "file", ALICE.uid, ALICE.gid)

    def work(directory: Path) -> object:
        return [
            outcome(
                lambda: os.setxattr(directory / "file", "security.capability", bytes.fromhex("01000002" + "00" * 16))
            ),
            outcome(lambda: os.setxattr(directory / "file", "security.x", b"")),
        ]

    assert any_pair.same(work, prepare, ALICE) == ["EPERM", "EPERM"]


def test_a_capability_set_while_the_file_is_open_is_seen(pair: Pair) -> None:
    """The answer is kept for the sake of writes, which ask each time; setting or removing it must not be lost on that."""
    path = pair.mount / "file"
    value = bytes.fromhex("01000002" + "00" * 16)
    with path.open("wb") as file:
        file.write(b"x")
        file.flush()
        assert outcome(lambda: os.getxattr(path, "security.capability")) == "ENODATA"
        os.setxattr(path, "security.capability", value)
        assert os.getxattr(path, "security.capability") == value
        os.removexattr(path, "security.capability")
        assert outcome(lambda: os.getxattr(path, "security.capability")) == "ENODATA"


# ---- statfs


def test_statfs_is_sources(pair: Pair, memory_pair: Pair) -> None:
    for one in (pair, memory_pair):
        through, without = os.statvfs(one.mount), os.statvfs(one.source)
        for field in ("f_bsize", "f_frsize", "f_blocks", "f_files", "f_namemax"):
            assert getattr(through, field) == getattr(without, field), field
        assert abs(through.f_bavail - without.f_bavail) < 0.01 * without.f_blocks


def test_df_shows_source_and_its_space(pair: Pair, run: Callable[..., str]) -> None:
    words = run("df", "--output=source,fstype,size", str(pair.mount)).splitlines()[1].split()
    assert words[:2] == [str(pair.source.parent), "fuse.iohang-mount"]
    assert words[2] == run("df", "--output=size", str(pair.source)).splitlines()[1].strip()


def test_limit_no_time_of_birth(pair: Pair, run: Callable[..., str]) -> None:
    """statx(2) gives none: pyfuse3 has no FUSE_STATX."""
    (pair.mount / "file").touch()
    assert run("stat", "-c", "%W", pair.mount / "file").strip() == "0"
