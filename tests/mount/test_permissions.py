"""Everything is done as the calling user: what SOURCE allows, the mount allows, and what is made belongs to who made it."""

from __future__ import annotations

import ctypes
import os
import shutil
import stat
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.harness import Mount, Server
from tests.mount.callers import (
    ALICE,
    ALICE_OF_TEAM,
    BOB,
    BOB_OF_TEAM,
    ROOT,
    TEAM,
    User,
    as_user,
    outcome,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.mount.conftest import Pair


def owner(path: Path) -> tuple[int, int, str]:
    status = os.lstat(path)
    return status.st_uid, status.st_gid, oct(stat.S_IMODE(status.st_mode))


def access(path: Path, mode: int) -> None:
    """The errors of access, which os.access() keeps to itself."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.access(os.fsencode(path), mode) != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def owned(path: Path, user: User, mode: int) -> None:
    """Give *path* to *user*."""
    os.chown(path, user.uid, user.gid)
    path.chmod(mode)


# ---- what is made belongs to who made it

MAKERS: dict[str, Callable[[Path], object]] = {
    "open": lambda path: os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o666)),
    "mknod": lambda path: os.mknod(path, stat.S_IFREG | 0o666),
    "mkfifo": lambda path: os.mkfifo(path, 0o666),
    "mkdir": lambda path: os.mkdir(path, 0o777),
    "symlink": lambda path: os.symlink("target", path),
}


@pytest.mark.parametrize("maker", MAKERS)
@pytest.mark.parametrize("umask", [0o022, 0o077, 0])
def test_what_is_made_belongs_to_its_maker(any_pair: Pair, maker: str, umask: int) -> None:
    user = User(4001, 4100, (4200,), umask)

    def work(directory: Path) -> object:
        MAKERS[maker](directory / "new")
        return owner(directory / "new")

    made = any_pair.same(work, None, user)
    assert made[:2] == (4001, 4100)
    assert owner(any_pair.source / "new") == made


@pytest.mark.parametrize("maker", MAKERS)
def test_a_set_group_id_directory_gives_its_group(any_pair: Pair, maker: str) -> None:
    def prepare(directory: Path) -> None:
        (directory / "shared").mkdir()
        os.chown(directory / "shared", 0, TEAM)
        (directory / "shared").chmod(0o2775)

    def work(directory: Path, name: str = "new") -> object:
        MAKERS[maker](directory / "shared" / name)
        return owner(directory / "shared" / name)

    made = any_pair.same(work, prepare, ALICE_OF_TEAM)
    assert made[:2] == (ALICE.uid, TEAM)
    if maker == "mkdir":
        assert made[2] == "0o2755"
    assert any_pair.same(lambda d: work(d, "another"), None, User(4003, 4003)) == "EACCES"


def test_a_mode_that_forbids_its_maker_to_write(any_pair: Pair) -> None:
    """open(2): the mode is for later opens; the first handle writes all the same, in whatever way it is synced."""
    for flags in (0, os.O_DIRECT, os.O_DSYNC):

        def work(directory: Path, flags: int = flags) -> object:
            fd = os.open(directory / f"sealed-{flags}", os.O_CREAT | os.O_RDWR | flags, 0o444)
            data = bytes(4096)
            for number in range(5):
                os.pwrite(fd, data, number * 4096)
            os.fsync(fd)
            os.ftruncate(fd, 100)
            size = os.fstat(fd).st_size
            os.close(fd)
            return size, outcome(lambda: os.open(directory / f"sealed-{flags}", os.O_WRONLY))

        assert outcome(lambda work=work: as_user(ALICE, lambda: work(any_pair.mount))) == (100, "EACCES")  # type: ignore[misc]


# ---- reading, writing, searching


def furnish(directory: Path) -> None:
    """Alice's things, in all degrees of privacy, in directories that do or do not let one in."""
    for folder, folder_mode in (("public", 0o755), ("team", 0o750), ("private", 0o700), ("drop", 0o733)):
        (directory / folder).mkdir()
        for name, mode in (("all", 0o666), ("read", 0o644), ("team", 0o660), ("own", 0o600), ("none", 0)):
            (directory / folder / name).write_bytes(b"content")
            os.chown(directory / folder / name, ALICE.uid, TEAM)
            (directory / folder / name).chmod(mode)
        os.chown(directory / folder, ALICE.uid, TEAM)
        (directory / folder).chmod(folder_mode)


def everything(directory: Path) -> list[object]:
    """What one may do with them."""
    said: list[object] = []
    for folder in ("public", "team", "private", "drop"):
        at = directory / folder
        said.append((folder, outcome(lambda at=at: sorted(os.listdir(at)))))  # type: ignore[misc]
        for name in ("all", "read", "team", "own", "none"):
            path = at / name
            attempts: dict[str, Callable[[], Any]] = {
                "stat": lambda path=path: oct(os.stat(path).st_mode),
                "read": lambda path=path: path.read_bytes(),
                "write": lambda path=path: os.close(os.open(path, os.O_WRONLY)),
                "truncate": lambda path=path: os.truncate(path, 7),
                "access": lambda path=path: [os.access(path, mode) for mode in (os.R_OK, os.W_OK, os.X_OK)],
                "chmod": lambda path=path: path.chmod(stat.S_IMODE(os.stat(path).st_mode)),
                "chown": lambda path=path: os.chown(path, -1, TEAM),
                "give away": lambda path=path: os.chown(path, 4999, -1),
                "utime": lambda path=path: os.utime(path, ns=(5, 6)),
                "link": lambda path=path: (os.link(path, f"{path}.l"), os.unlink(f"{path}.l"))[0],
                "rename": lambda path=path: (os.rename(path, f"{path}.r"), os.rename(f"{path}.r", path))[0],
            }
            said += [(folder, name, what, outcome(attempt)) for what, attempt in attempts.items()]
        said.append((folder, "mkdir", outcome(lambda at=at: ((at / "d").mkdir(), (at / "d").rmdir())[0])))  # type: ignore[misc]
        said.append((folder, "chdir", outcome(lambda at=at: os.chdir(at))))  # type: ignore[misc]
    return said


@pytest.mark.parametrize(
    "user", [ROOT, ALICE, BOB, BOB_OF_TEAM, User(4003, TEAM)], ids=["root", "alice", "bob", "bob of team", "team"]
)
def test_every_right_is_sources(any_pair: Pair, user: User) -> None:
    """Owner, group, supplementary group and others: 230 attempts each, allowed or refused as without the mount."""
    any_pair.same(everything, furnish, user)


def test_searching_is_refused_even_while_the_names_are_known(any_pair: Pair) -> None:
    """The owner's own lookups must not open the way to others: the kernel has the names in its cache, and asks all the same."""
    (any_pair.source / "private/inner").mkdir(parents=True)
    (any_pair.source / "private/inner/file").write_bytes(b"secret")
    (any_pair.source / "private/inner/file").chmod(0o644)
    owned(any_pair.source / "private", ALICE, 0o700)
    path = any_pair.mount / "private/inner/file"
    for _ in range(3):
        assert as_user(ALICE, path.read_bytes) == b"secret"
        for attempt in (path.read_bytes, path.stat, lambda: os.listdir(path.parent), lambda: os.chdir(path.parent)):
            assert outcome(lambda attempt=attempt: as_user(BOB, attempt)) == "EACCES"  # type: ignore[misc]


def test_a_right_taken_away_on_source_is_gone(pair: Pair) -> None:
    (pair.source / "folder").mkdir()
    (pair.source / "folder/file").write_bytes(b"x")
    (pair.source / "folder").chmod(0o755)
    assert as_user(BOB, (pair.mount / "folder/file").read_bytes) == b"x"
    (pair.source / "folder").chmod(0o700)
    assert outcome(lambda: as_user(BOB, (pair.mount / "folder/file").read_bytes)) == "EACCES"


def test_a_sticky_directory(any_pair: Pair) -> None:
    def prepare(directory: Path) -> None:
        (directory / "tmp").mkdir()
        (directory / "tmp").chmod(0o1777)
        for name in ("alices", "bobs"):
            (directory / "tmp" / name).touch()
            owned(directory / "tmp" / name, ALICE if name == "alices" else BOB, 0o666)

    def work(directory: Path) -> object:
        return [
            outcome(lambda: os.unlink(directory / "tmp/alices")),
            outcome(lambda: os.rename(directory / "tmp/alices", directory / "tmp/x")),
            outcome(lambda: os.rename(directory / "tmp/bobs", directory / "tmp/alices")),
            outcome(lambda: os.unlink(directory / "tmp/bobs")),
        ]

    assert any_pair.same(work, prepare, BOB) == ["EPERM", "EPERM", "EPERM", None]


# ---- execution

SCRIPT = b"#!/bin/sh\necho ran\n"


@pytest.mark.parametrize(
    ("mode", "user", "runs"),
    [
        (0o711, BOB, True),  # x alone
        (0o755, BOB, True),
        (0o754, BOB, False),  # others have a right to execute, and this one may read: not enough
        (0o744, ALICE, True),
        (0o674, ALICE, False),
        (0o644, ROOT, False),
        (0o100, ROOT, True),
        (0o710, BOB_OF_TEAM, True),
        (0o710, BOB, False),
    ],
)
def test_execution_takes_the_right_to_execute(any_pair: Pair, mode: int, user: User, runs: bool) -> None:  # noqa: FBT001
    def prepare(directory: Path) -> None:
        shutil.copy("/bin/true", directory / "program")
        os.chown(directory / "program", ALICE.uid, TEAM)
        (directory / "program").chmod(mode)

    def work(directory: Path) -> object:
        return subprocess.run([directory / "program"], check=False).returncode

    assert any_pair.same(work, prepare, user) == (0 if runs else "EACCES")


def test_a_script_takes_the_right_to_read_as_well(any_pair: Pair) -> None:
    def prepare(directory: Path) -> None:
        (directory / "script").write_bytes(SCRIPT)
        (directory / "script").chmod(0o711)

    def work(directory: Path) -> object:
        return subprocess.run([directory / "script"], check=False, stderr=subprocess.DEVNULL).returncode

    assert any_pair.same(work, prepare, BOB) != 0
    (any_pair.source / "script").chmod(0o755)
    (any_pair.control / "script").chmod(0o755)
    assert any_pair.same(work, None, BOB) == 0


# ---- access control lists


def test_access_control_lists_are_sources(pair: Pair, program: Callable[..., str], run: Callable[..., str]) -> None:
    """Set through the mount, shown through the mount, and obeyed by it, because SOURCE checks as the caller."""
    setfacl, getfacl = program("setfacl", "acl"), program("getfacl", "acl")
    path = pair.mount / "file"
    path.write_bytes(b"content")
    path.chmod(0o600)
    run(setfacl, "-m", f"u:{BOB.uid}:rw,g:{TEAM}:r", path)
    shown = run(getfacl, "-cnp", path)
    assert shown == run(getfacl, "-cnp", pair.source / "file")
    assert f"user:{BOB.uid}:rw-" in shown
    assert as_user(BOB, path.read_bytes) == b"content"
    as_user(BOB, lambda: path.write_bytes(b"bob's"))
    assert as_user(ALICE_OF_TEAM, path.read_bytes) == b"bob's"
    assert outcome(lambda: as_user(ALICE_OF_TEAM, lambda: path.write_bytes(b""))) == "EACCES"
    assert outcome(lambda: as_user(ALICE, path.read_bytes)) == "EACCES"
    run(setfacl, "-b", path)
    assert outcome(lambda: as_user(BOB, path.read_bytes)) == "EACCES"


def test_default_lists_are_inherited(pair: Pair, program: Callable[..., str], run: Callable[..., str]) -> None:
    run(program("setfacl", "acl"), "-d", "-m", f"u:{BOB.uid}:rwx", pair.mount)
    as_user(ALICE, lambda: ((pair.mount / "file").write_bytes(b"x"), (pair.mount / "folder").mkdir())[0])
    for name in ("file", "folder"):
        assert f"user:{BOB.uid}:rwx" in run(program("getfacl", "acl"), "-cnp", pair.mount / name)


def test_limit_the_umask_applies_even_under_a_default_list(
    pair: Pair, program: Callable[..., str], run: Callable[..., str]
) -> None:
    """On SOURCE itself a default ACL takes the place of the umask; through FUSE the kernel has applied it already.

    pyfuse3 cannot ask it not to (FUSE_DONT_MASK). What is made is narrower than it might be, never wider.
    """
    for directory in (pair.mount, pair.control):
        run(program("setfacl", "acl"), "-d", "-m", "g::rwx,o::rwx", directory)

    def work(directory: Path) -> int:
        (directory / "new").touch(0o666)
        return os.stat(directory / "new").st_mode & 0o777

    assert as_user(ALICE, lambda: work(pair.control)) == 0o666
    assert as_user(ALICE, lambda: work(pair.mount)) == 0o644


# ---- mount options


def test_without_allow_other_nobody_else_gets_in(place: Path, tmp_path: Path) -> None:
    """Root mounted it, so root alone may look, whatever the modes say."""
    (place / "own-source").mkdir()
    (place / "own-source").chmod(0o777)
    with Mount(place / "own-source", place / "own", "monitor=none", log=tmp_path / "log"):
        (place / "own/file").touch(0o666)
        for attempt in (lambda: os.stat(place / "own/file"), lambda: os.listdir(place / "own")):
            assert outcome(lambda attempt=attempt: as_user(BOB, attempt)) == "EACCES"  # type: ignore[misc]


def test_ro_refuses_every_change(place: Path, tmp_path: Path) -> None:
    source, mount = place / "ro-source", place / "ro"
    (source / "folder/empty").mkdir(parents=True)
    (source / "file").write_bytes(b"content")
    before = {path: path.lstat() for path in sorted(source.rglob("*"))}
    changes: list[Callable[[], object]] = [
        (mount / "new").touch,
        lambda: (mount / "file").write_bytes(b""),
        lambda: os.open(mount / "file", os.O_RDWR),
        lambda: os.open(mount / "file", os.O_RDONLY | os.O_TRUNC),
        lambda: os.truncate(mount / "file", 0),
        lambda: (mount / "file").chmod(0o600),
        lambda: os.chown(mount / "file", 1, 1),
        lambda: os.utime(mount / "file"),
        (mount / "file").unlink,
        (mount / "folder/empty").rmdir,
        (mount / "new").mkdir,
        lambda: (mount / "new").symlink_to("x"),
        lambda: os.mkfifo(mount / "new"),
        lambda: os.link(mount / "file", mount / "new"),
        lambda: os.rename(mount / "file", mount / "new"),
        lambda: os.setxattr(mount / "file", "user.x", b""),
        lambda: os.removexattr(mount / "file", "user.x"),
    ]
    with Mount(source, mount, "ro", "allow_other", "monitor=none", log=tmp_path / "log"):
        for user in (ROOT, BOB):
            said = [outcome(lambda user=user, change=change: as_user(user, change)) for change in changes]  # type: ignore[misc]
            assert said == ["EROFS"] * len(changes)
            assert as_user(user, (mount / "file").read_bytes) == b"content"
        assert not os.access(mount / "file", os.W_OK)
        assert os.statvfs(mount).f_flag & os.ST_RDONLY
    assert {path: path.lstat().st_ctime_ns for path in before} == {p: s.st_ctime_ns for p, s in before.items()}


def test_a_source_that_is_read_only_itself(place: Path, tmp_path: Path, run: Callable[..., str]) -> None:
    """Mounted rw, the mount says what SOURCE says: EROFS, also for access(2)."""
    source = place / "sealed"
    source.mkdir()
    run("mount", "-t", "tmpfs", "none", source)
    try:
        (source / "file").write_bytes(b"x")
        run("mount", "-o", "remount,ro", source)
        with Mount(source, place / "sealed-mnt", "allow_other", "monitor=none", log=tmp_path / "log"):
            path = place / "sealed-mnt/file"
            assert outcome(lambda: path.write_bytes(b"")) == "EROFS"
            assert outcome(lambda: path.chmod(0o600)) == "EROFS"
            assert outcome(path.unlink) == "EROFS"
            assert outcome(lambda: access(path, os.W_OK)) == "EROFS"
    finally:
        run("umount", "-l", source)


STRANGE = ["with a space", "with,comma", "back\\slash", "a=b", "tab\there", "ünï", "all ,\\ of=it"]


@pytest.mark.parametrize("name", STRANGE)
def test_strange_names_of_source_and_mount_point(
    place: Path, tmp_path: Path, name: str, run: Callable[..., str]
) -> None:
    source, mount = place / f"s {name}", place / f"m {name}"
    source.mkdir()
    with Mount(source, mount, "monitor=none", log=tmp_path / "log"):
        (mount / "file").write_bytes(b"x")
        assert (source / "file").read_bytes() == b"x"
        shown = run("findmnt", "-n", "-r", "-o", "SOURCE", "--mountpoint", mount).rstrip("\n")
        assert shown.encode().decode("unicode_escape").encode("latin-1").decode() == str(source)
        assert mounted_at_bytes(mount)
    assert not mounted_at_bytes(mount)


def mounted_at_bytes(mount: Path) -> bool:
    return subprocess.run(["mountpoint", "-q", mount], check=False).returncode == 0


# ---- root_squash


@pytest.fixture
def squashed(place: Path, tmp_path: Path) -> Iterator[tuple[Path, Path]]:
    """A mount over a source that takes root for nobody, as NFS with root_squash does; and the directory beneath."""
    real, source, mount = place / "squash-real", place / "squash-source", place / "squash"
    real.mkdir()
    try:
        with (
            Server(
                [
                    "tests.mount.squashing_source",
                    str(real),
                    str(source),
                    str(tmp_path / "trigger"),
                    "-o",
                    "allow_other",
                ],
                source,
                tmp_path / "squash.log",
            ),
            Mount(source, mount, "allow_other", "monitor=none", log=tmp_path / "log"),
        ):
            yield real, mount
    finally:
        shutil.rmtree(real)


def test_a_user_works_where_root_may_not(squashed: tuple[Path, Path]) -> None:
    """Under root_squash the server's own identity is worth nothing: all is done, and owned, as the caller."""
    real, mount = squashed
    (real / "home").mkdir()
    owned(real / "home", ALICE, 0o700)
    home = mount / "home"

    def work() -> object:
        (home / "file").write_bytes(b"content")
        (home / "folder").mkdir()
        (home / "link").symlink_to("file")
        os.mkfifo(home / "fifo")
        os.link(home / "file", home / "hard")
        os.rename(home / "hard", home / "folder/moved")
        (home / "file").chmod(0o640)
        os.truncate(home / "file", 3)
        os.utime(home / "file", ns=(1, 2))
        os.setxattr(home / "file", "user.x", b"y")
        with (home / "file").open("r+b") as file:
            file.write(b"CON")
            os.fsync(file.fileno())
        sealed = os.open(home / "sealed", os.O_CREAT | os.O_RDWR, 0o400)
        os.write(sealed, b"a")
        os.write(sealed, b"b")
        os.fsync(sealed)
        os.close(sealed)
        fd = os.open(home, os.O_RDONLY)
        os.fsync(fd)
        os.close(fd)
        listed = sorted(os.listdir(home))
        os.unlink(home / "folder/moved")
        (home / "folder").rmdir()
        return listed, (home / "file").read_bytes(), os.access(home, os.W_OK)

    listed, content, may_write = as_user(ALICE, work)  # type: ignore[misc]
    assert listed == ["fifo", "file", "folder", "link", "sealed"]
    assert content == b"CON"
    assert may_write
    assert {owner(path)[:2] for path in (real / "home").iterdir()} == {(ALICE.uid, ALICE.gid)}
    assert (real / "home/sealed").read_bytes() == b"ab"


def test_root_is_nobody_there(squashed: tuple[Path, Path]) -> None:
    real, mount = squashed
    (real / "home").mkdir()
    (real / "home/file").touch()
    owned(real / "home", ALICE, 0o700)
    assert outcome(lambda: os.listdir(mount / "home")) == "EACCES"
    assert outcome(lambda: os.stat(mount / "home/file")) == "EACCES"
    assert outcome((mount / "new").touch) == "EACCES"
    assert outcome(lambda: (mount / "home").chmod(0o777)) == "EPERM"
    assert outcome(lambda: as_user(BOB, lambda: os.listdir(mount / "home"))) == "EACCES"
    (real / "home").chmod(0o777)
    (mount / "home/new").touch()
    assert owner(real / "home/new")[:2] == (65534, 65534)
