"""A complete passthrough: each operation does, and refuses, what it does and refuses without the mount."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import stat
import subprocess
import threading
from typing import TYPE_CHECKING, Any

import pytest

from tests.mount.callers import outcome

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.mount.conftest import Pair

RENAME_NOREPLACE, RENAME_EXCHANGE, RENAME_WHITEOUT = 1, 2, 4  # linux/fs.h


def furnish(directory: Path) -> None:
    """One object of each common kind."""
    (directory / "file").write_bytes(b"content")
    (directory / "other").write_bytes(b"other content")
    (directory / "folder").mkdir()
    (directory / "folder" / "child").write_bytes(b"child")
    (directory / "empty").mkdir()
    (directory / "link").symlink_to("file")
    (directory / "dangling").symlink_to("nowhere")
    (directory / "loop").symlink_to("loop")
    os.mkfifo(directory / "fifo")
    os.setxattr(directory / "file", "user.colour", b"blue")


def inventory(directory: Path) -> dict[str, tuple[Any, ...]]:
    """What a tree has: type, mode, owner, links, and the content."""
    found = {}
    for folder, folders, files in os.walk(directory):
        for name in [*folders, *files]:
            path = os.path.join(folder, name)
            status = os.lstat(path)
            content: object = None
            if stat.S_ISREG(status.st_mode):
                with open(path, "rb") as file:
                    content = file.read()
            elif stat.S_ISLNK(status.st_mode):
                content = os.readlink(path)
            found[os.path.relpath(path, directory)] = (
                status.st_mode,
                status.st_uid,
                status.st_gid,
                status.st_nlink,
                status.st_rdev,
                content,
            )
    return found


def opened(path: Path, flags: int, mode: int = 0o666) -> None:
    os.close(os.open(path, flags, mode))


REFUSED: dict[str, tuple[Callable[[Path], object], int]] = {
    "stat: no such name": (lambda d: os.stat(d / "none"), errno.ENOENT),
    "stat: below a file": (lambda d: os.stat(d / "file/x"), errno.ENOTDIR),
    "stat: a name of 256 bytes": (lambda d: os.stat(d / ("x" * 256)), errno.ENAMETOOLONG),
    "stat: a loop of symlinks": (lambda d: os.stat(d / "loop"), errno.ELOOP),
    "stat: a dangling symlink": (lambda d: os.stat(d / "dangling"), errno.ENOENT),
    "open: no such name": (lambda d: opened(d / "none", os.O_RDONLY), errno.ENOENT),
    "open: a directory to write": (lambda d: opened(d / "folder", os.O_WRONLY), errno.EISDIR),
    "open: a file as directory": (lambda d: opened(d / "file", os.O_DIRECTORY), errno.ENOTDIR),
    "open: a symlink not to be followed": (lambda d: opened(d / "link", os.O_NOFOLLOW), errno.ELOOP),
    "open: a FIFO without a reader": (lambda d: opened(d / "fifo", os.O_WRONLY | os.O_NONBLOCK), errno.ENXIO),
    "create: it exists": (lambda d: opened(d / "file", os.O_CREAT | os.O_EXCL), errno.EEXIST),
    "create: a symlink is there": (lambda d: opened(d / "dangling", os.O_CREAT | os.O_EXCL), errno.EEXIST),
    "create: no such directory": (lambda d: opened(d / "none/x", os.O_CREAT), errno.ENOENT),
    "create: a directory": (lambda d: opened(d / "folder", os.O_CREAT), errno.EISDIR),
    "create: a name of 256 bytes": (lambda d: opened(d / ("x" * 256), os.O_CREAT), errno.ENAMETOOLONG),
    "mkdir: it exists": (lambda d: (d / "file").mkdir(), errno.EEXIST),
    "mkdir: below a file": (lambda d: (d / "file/x").mkdir(), errno.ENOTDIR),
    "rmdir: not empty": (lambda d: (d / "folder").rmdir(), errno.ENOTEMPTY),
    "rmdir: a file": (lambda d: (d / "file").rmdir(), errno.ENOTDIR),
    "rmdir: no such name": (lambda d: (d / "none").rmdir(), errno.ENOENT),
    "rmdir: dot": (lambda d: os.rmdir(f"{d}/empty/."), errno.EINVAL),
    "unlink: a directory": (lambda d: os.unlink(d / "folder"), errno.EISDIR),
    "unlink: no such name": (lambda d: os.unlink(d / "none"), errno.ENOENT),
    "rename: no such name": (lambda d: os.rename(d / "none", d / "x"), errno.ENOENT),
    "rename: into itself": (lambda d: os.rename(d / "folder", d / "folder/x"), errno.EINVAL),
    "rename: a directory over a file": (lambda d: os.rename(d / "folder", d / "file"), errno.ENOTDIR),
    "rename: a file over a directory": (lambda d: os.rename(d / "file", d / "empty"), errno.EISDIR),
    "rename: over a full directory": (lambda d: os.rename(d / "empty", d / "folder"), errno.ENOTEMPTY),
    "link: a directory": (lambda d: os.link(d / "folder", d / "x"), errno.EPERM),
    "link: it exists": (lambda d: os.link(d / "file", d / "other"), errno.EEXIST),
    "link: no such name": (lambda d: os.link(d / "none", d / "x"), errno.ENOENT),
    "symlink: it exists": (lambda d: os.symlink("t", d / "file"), errno.EEXIST),
    "symlink: a target too long": (lambda d: os.symlink("t" * 4096, d / "x"), errno.ENAMETOOLONG),
    "readlink: a file": (lambda d: os.readlink(d / "file"), errno.EINVAL),
    "mknod: it exists": (lambda d: os.mkfifo(d / "file"), errno.EEXIST),
    "truncate: a directory": (lambda d: os.truncate(d / "folder", 0), errno.EISDIR),
    "truncate: no such name": (lambda d: os.truncate(d / "none", 0), errno.ENOENT),
    "truncate: a negative size": (lambda d: os.truncate(d / "file", -1), errno.EINVAL),
    "truncate: beyond what SOURCE takes": (lambda d: os.truncate(d / "file", 1 << 62), errno.EFBIG),
    "chmod: no such name": (lambda d: (d / "none").chmod(0o600), errno.ENOENT),
    "getxattr: no such name": (lambda d: os.getxattr(d / "file", "user.none"), errno.ENODATA),
    "getxattr: no such namespace": (lambda d: os.getxattr(d / "file", "none.x"), errno.EOPNOTSUPP),
    "setxattr: create, it exists": (
        lambda d: os.setxattr(d / "file", "user.colour", b"", os.XATTR_CREATE),
        errno.EEXIST,
    ),
    "setxattr: replace, no such name": (
        lambda d: os.setxattr(d / "file", "user.none", b"", os.XATTR_REPLACE),
        errno.ENODATA,
    ),
    "setxattr: user's on a symlink": (
        lambda d: os.setxattr(d / "link", "user.x", b"", follow_symlinks=False),
        errno.EPERM,
    ),
    "setxattr: no such namespace": (lambda d: os.setxattr(d / "file", "none.x", b""), errno.EOPNOTSUPP),
    "setxattr: a name too long": (lambda d: os.setxattr(d / "file", "user." + "x" * 251, b""), errno.ERANGE),
    "setxattr: a value too long": (
        lambda d: os.setxattr(d / "file", "user.x", bytes(65537)),
        errno.E2BIG,
    ),
    "setxattr: more than SOURCE stores": (
        lambda d: os.setxattr(d / "file", "user.x", bytes(65000)),
        errno.ENOSPC,
    ),
    "removexattr: no such name": (lambda d: os.removexattr(d / "file", "user.none"), errno.ENODATA),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_source_refuses_is_refused_in_the_same_words(pair: Pair, case: str) -> None:
    work, number = REFUSED[case]
    # The error itself is the answer: what lambdas return besides cannot travel from the child process.
    assert pair.same(lambda d: (work(d), None)[1], furnish) == errno.errorcode[number]
    assert inventory(pair.mount) == inventory(pair.control)


DONE: dict[str, Callable[[Path], object]] = {
    "create": lambda d: opened(d / "new", os.O_CREAT | os.O_WRONLY, 0o640),
    "create exclusively": lambda d: opened(d / "new", os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600),
    "create without any permission": lambda d: opened(d / "new", os.O_CREAT | os.O_RDWR, 0),
    "create, and it exists": lambda d: opened(d / "file", os.O_CREAT | os.O_WRONLY),
    "create through a dangling symlink": lambda d: opened(d / "dangling", os.O_CREAT | os.O_WRONLY),
    "truncate at open": lambda d: opened(d / "file", os.O_TRUNC | os.O_WRONLY),
    "truncate at open through a symlink": lambda d: opened(d / "link", os.O_TRUNC | os.O_WRONLY),
    "write": lambda d: (d / "file").write_bytes(b"new content"),
    "mkdir": lambda d: (d / "new").mkdir(0o750),
    "mkdir with special bits": lambda d: os.mkdir(d / "new", 0o7777),
    "rmdir": lambda d: (d / "empty").rmdir(),
    "unlink a file": lambda d: (d / "file").unlink(),
    "unlink a symlink": lambda d: (d / "link").unlink(),
    "unlink a FIFO": lambda d: (d / "fifo").unlink(),
    "rename a file": lambda d: os.rename(d / "file", d / "new"),
    "rename a file to another directory": lambda d: os.rename(d / "file", d / "folder/new"),
    "rename a file over another": lambda d: os.rename(d / "file", d / "other"),
    "rename a directory": lambda d: os.rename(d / "folder", d / "new"),
    "rename a directory over an empty one": lambda d: os.rename(d / "folder", d / "empty"),
    "rename a symlink": lambda d: os.rename(d / "link", d / "new"),
    "rename to itself": lambda d: os.rename(d / "file", d / "file"),
    "link": lambda d: os.link(d / "file", d / "folder/hard"),
    "link a symlink itself": lambda d: os.link(d / "link", d / "hard", follow_symlinks=False),
    "link what a symlink leads to": lambda d: os.link(d / "link", d / "hard", follow_symlinks=True),
    "symlink": lambda d: os.symlink("some/where", d / "new"),
    "symlink to a target of 4095 bytes": lambda d: os.symlink("t" * 4095, d / "new"),
    "symlink to what is not UTF-8": lambda d: os.symlink(b"\xff\xfe", os.fsencode(d / "new")),
    "mknod: a file": lambda d: os.mknod(d / "new", stat.S_IFREG | 0o640),
    "mknod: a FIFO": lambda d: os.mkfifo(d / "new", 0o622),
    "mknod: a socket": lambda d: os.mknod(d / "new", stat.S_IFSOCK | 0o755),
    "mknod: a character device": lambda d: os.mknod(d / "new", stat.S_IFCHR | 0o600, os.makedev(1, 3)),
    "mknod: a block device": lambda d: os.mknod(d / "new", stat.S_IFBLK | 0o600, os.makedev(259, 70000)),
    "chmod": lambda d: (d / "file").chmod(0o4751),
    "chmod a directory": lambda d: (d / "folder").chmod(0o1700),
    "chown": lambda d: os.chown(d / "file", 4001, 4100),
    "chown the user alone": lambda d: os.chown(d / "file", 4001, -1),
    "chown the group alone": lambda d: os.chown(d / "file", -1, 4100),
    "chown a symlink": lambda d: os.lchown(d / "link", 4001, 4100),
    "truncate shorter": lambda d: os.truncate(d / "file", 3),
    "truncate longer": lambda d: os.truncate(d / "file", 9000),
}


@pytest.mark.parametrize("case", DONE)
def test_what_source_does_is_done(pair: Pair, case: str) -> None:
    pair.same(lambda d: (DONE[case](d), None)[1], furnish)
    assert inventory(pair.mount) == inventory(pair.source) == inventory(pair.control)


# ---- rename's flags


@pytest.mark.parametrize(
    ("old", "new", "flags", "expected"),
    [
        ("file", "new", RENAME_NOREPLACE, None),
        ("file", "other", RENAME_NOREPLACE, "EEXIST"),
        ("folder", "empty", RENAME_NOREPLACE, "EEXIST"),
        ("file", "other", RENAME_EXCHANGE, None),
        ("file", "folder", RENAME_EXCHANGE, None),
        ("file", "none", RENAME_EXCHANGE, "ENOENT"),
        ("file", "new", RENAME_EXCHANGE | RENAME_NOREPLACE, "EINVAL"),
        ("file", "new", RENAME_WHITEOUT, None),
        ("file", "new", 64, "EINVAL"),
    ],
)
def test_renames_flags(
    pair: Pair,
    renameat2: Callable[[Path, Path, int], None],
    old: str,
    new: str,
    flags: int,
    expected: str | None,
) -> None:
    # Looked up first: what the kernel has cached under both names must be exchanged, too.
    def work(d: Path) -> None:
        for name in (old, new):
            outcome(lambda name=name: os.stat(d / name))  # type: ignore[misc]
        renameat2(d / old, d / new, flags)

    assert pair.same(work, furnish) == expected
    assert inventory(pair.mount) == inventory(pair.source) == inventory(pair.control)


# ---- names


NAMES = {
    "not UTF-8": b"\xff\xfe\x80image",
    "255 bytes": b"n" * 255,
    "spaces and quotes": b" a 'b\" ",
    "a newline": b"a\nb",
    "a backslash": b"a\\040b",
    "a leading dash": b"-rf",
    "control characters": bytes(range(1, 32)),
}


@pytest.mark.parametrize("kind", NAMES)
def test_names_are_bytes(pair: Pair, kind: str) -> None:
    name = NAMES[kind]
    mount, source = os.fsencode(pair.mount), os.fsencode(pair.source)
    with open(mount + b"/" + name, "wb") as file:
        file.write(b"data")
    os.mkdir(mount + b"/d")
    os.rename(mount + b"/" + name, mount + b"/d/" + name)
    assert os.listdir(mount + b"/d") == os.listdir(source + b"/d") == [name]
    os.link(mount + b"/d/" + name, mount + b"/" + name)
    assert os.stat(mount + b"/" + name).st_nlink == 2
    os.unlink(mount + b"/d/" + name)
    with open(source + b"/" + name, "rb") as file:
        assert file.read() == b"data"


def test_a_tree_deeper_than_a_path_is_long(pair: Pair) -> None:
    """1,000 directories of 20 bytes each: five times PATH_MAX, made and removed step by step."""
    name = "d" * 20
    here = os.open(pair.mount, os.O_RDONLY)
    steps = [here]
    for _ in range(1000):
        os.mkdir(name, dir_fd=here)
        here = os.open(name, os.O_RDONLY | os.O_DIRECTORY, dir_fd=here)
        steps.append(here)
    fd = os.open("bottom", os.O_CREAT | os.O_WRONLY, dir_fd=here)
    assert os.write(fd, b"x") == 1
    os.close(fd)
    assert os.listdir(here) == ["bottom"]
    os.unlink("bottom", dir_fd=here)
    os.close(steps.pop())
    while steps:
        os.rmdir(name, dir_fd=steps[-1])
        os.close(steps.pop())
    assert os.listdir(pair.source) == []


def test_a_path_of_almost_path_max(pair: Pair) -> None:
    part = "p" * 200
    path = pair.mount.joinpath(*[part] * ((4095 - len(str(pair.mount))) // 201))
    path.mkdir(parents=True)
    assert path.is_dir()
    assert outcome(lambda: os.stat(str(path) + "/" + "x" * (4096 - len(str(path))))) == "ENAMETOOLONG"


# ---- special files


def test_a_fifo_works_through_the_mount(pair: Pair) -> None:
    os.mkfifo(pair.mount / "fifo")
    got = []
    reader = threading.Thread(target=lambda: got.append((pair.mount / "fifo").read_bytes()))
    reader.start()
    (pair.mount / "fifo").write_bytes(b"through the kernel, not through the server")
    reader.join(10)
    assert got == [b"through the kernel, not through the server"]


def test_a_socket_works_through_the_mount(pair: Pair) -> None:
    with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as client:
        listener.bind(str(pair.mount / "socket"))
        listener.listen()
        client.connect(str(pair.mount / "socket"))
        server, _ = listener.accept()
        with server:
            client.sendall(b"hello")
            assert server.recv(5) == b"hello"
    assert stat.S_ISSOCK(os.stat(pair.source / "socket").st_mode)


# ---- locks


def test_locks_hold_within_the_mount(pair: Pair) -> None:
    """The kernel keeps them: an flock(2) and an OFD lock keep others out, and end with the descriptor."""
    path = pair.mount / "locked"
    first = os.open(path, os.O_CREAT | os.O_RDWR)
    second = os.open(path, os.O_RDWR)
    fcntl.flock(first, fcntl.LOCK_EX)
    assert outcome(lambda: fcntl.flock(second, fcntl.LOCK_EX | fcntl.LOCK_NB)) == "EAGAIN"
    fcntl.lockf(first, fcntl.LOCK_EX)
    other = subprocess.run(
        ["python3", "-c", f"import fcntl; fcntl.lockf(open({str(path)!r}, 'r+'), fcntl.LOCK_EX | fcntl.LOCK_NB)"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert "BlockingIOError" in other.stderr
    os.close(first)
    fcntl.flock(second, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.close(second)


# ---- what FUSE or pyfuse3 cannot do: docs/limitations.rst


def test_limit_no_unnamed_files(pair: Pair) -> None:
    """O_TMPFILE is refused with EOPNOTSUPP, for which programs have a fallback: pyfuse3 has no FUSE_TMPFILE."""
    assert outcome(lambda: os.open(pair.mount, os.O_TMPFILE | os.O_RDWR)) == "ENOTSUP"


def test_limit_no_fallocate(pair: Pair) -> None:
    """fallocate(2) is refused with EOPNOTSUPP; posix_fallocate(3) then writes a byte into each block: slow, but it works."""
    import ctypes  # noqa: PLC0415

    libc = ctypes.CDLL(None, use_errno=True)
    fd = os.open(pair.mount / "file", os.O_CREAT | os.O_RDWR)
    assert libc.fallocate(fd, 0, ctypes.c_long(0), ctypes.c_long(1 << 16)) == -1
    assert ctypes.get_errno() == errno.EOPNOTSUPP
    os.posix_fallocate(fd, 0, 1 << 16)
    os.close(fd)
    assert os.stat(pair.source / "file").st_size == 1 << 16


def test_limit_holes_are_not_seen(pair: Pair) -> None:
    """SEEK_HOLE finds none, and SEEK_DATA data everywhere: a copy is right, but not sparse."""
    with (pair.source / "sparse").open("wb") as file:
        file.truncate(1 << 20)
    fd = os.open(pair.mount / "sparse", os.O_RDONLY)
    assert os.lseek(fd, 0, os.SEEK_HOLE) == 1 << 20
    assert os.lseek(fd, 4096, os.SEEK_DATA) == 4096
    os.close(fd)


def test_copy_file_range_falls_back(pair: Pair) -> None:
    """The kernel copies through memory instead: no reflinks, but the same bytes."""
    (pair.mount / "from").write_bytes(b"abc" * 1000)
    with (pair.mount / "from").open("rb") as old, (pair.mount / "to").open("wb") as new:
        assert os.copy_file_range(old.fileno(), new.fileno(), 3000) == 3000
    assert (pair.source / "to").read_bytes() == b"abc" * 1000


def test_limit_no_ioctls(pair: Pair) -> None:
    """FS_IOC_GETFLAGS (lsattr, chattr) is refused: pyfuse3 has no ioctl handler."""
    fd = os.open(pair.mount / "file", os.O_CREAT | os.O_RDWR)
    assert outcome(lambda: fcntl.ioctl(fd, 0x80086601, bytes(8))) in {"ENOTTY", "ENOSYS"}
    os.close(fd)
