"""The name of a monitor's socket in the file system: who has it, and who gets it.

1. One server at a time looks and takes: a lock on the directory, which the kernel gives back for whoever is killed. Without it,
   two that start in the same moment take each other for dead.
2. A name that a dead server has left is replaced; one that answers is somebody's.
3. But for this: a server whose mount was detached (`umount -l`) serves files that are still open, for as long as they are. The
   next mount at that place is who is meant by the name; the old server is found beside it, under a name with its process's number.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import glob
import json
import logging
import os
import socket
import struct
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

log = logging.getLogger(__name__)

_LOCK_S = 10.0
"""How long to wait for those that look and take at the same time: each needs milliseconds, or `_ASK_S`."""

_ASK_S = 2.0
"""How long a server has to say which mount point it serves; it answers in milliseconds, whatever its storage does."""

_MOST_BYTES = 64 << 10

LOCK = ".iohang.lock"
"""Beside the sockets. It stays: to remove it while somebody waits for it would let two have it."""

Identity = tuple[int, int]


def claim(path: Path, has_lost: Callable[[str], bool], prepare: Callable[[socket.socket], None]) -> socket.socket:
    """A socket that is bound to *path* and *prepare*d, to listen. Raises OSError; EADDRINUSE if somebody else has the name.

    *has_lost*: whether a server that serves this mount point, as it says itself, has lost it.
    """
    with _locked(path.parent):
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            try:
                sock.bind(str(path))
            except OSError as error:
                if error.errno != errno.EADDRINUSE:
                    raise
                _make_free(path, has_lost)
                sock.bind(str(path))
            try:
                prepare(sock)
            except BaseException:
                path.unlink(missing_ok=True)
                raise
        except BaseException:
            sock.close()
            raise
        return sock


def give_back(path: Path, identity: Identity) -> None:
    """Remove the name, or the one beside it, if it is still that of the socket with this *identity*."""
    with contextlib.suppress(OSError), _locked(path.parent):
        for name in (path, _beside(path, os.getpid())):
            with contextlib.suppress(OSError):
                if identity_of(name) == identity:
                    name.unlink()


def identity_of(path: Path) -> Identity:
    """Of the socket that has this name now."""
    status = path.lstat()
    return status.st_dev, status.st_ino


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    # A file of its own, which nobody else may open: whoever can open something can lock it, for as long as he likes.
    fd = os.open(folder / LOCK, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        deadline_s = time.monotonic() + _LOCK_S
        while True:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline_s:
                    raise OSError(
                        errno.EBUSY, f"{folder} has been locked by another process for {_LOCK_S:g} s"
                    ) from None
                time.sleep(0.01)
        yield
    finally:
        os.close(fd)


def _make_free(path: Path, has_lost: Callable[[str], bool]) -> None:
    """Raises OSError if *path* is no socket, or somebody's."""
    if not path.is_socket():
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))
    for left in path.parent.glob(glob.escape(path.stem) + ".*" + path.suffix):
        if left.is_socket() and not is_alive(left):
            left.unlink()
    if is_alive(path):
        served, pid = _asked(path)
        if served is None and not is_alive(path):  # it was about to end
            path.unlink(missing_ok=True)
            return
        if served is None or not has_lost(served):
            raise OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE))
        beside = _beside(path, pid)
        with contextlib.suppress(FileExistsError):
            os.link(path, beside)
        log.warning(
            "monitor: process %d serves what is still open of the mount that was detached here; from now on it is asked at %s",
            pid, beside,
        )  # fmt: skip
    path.unlink()


def _beside(path: Path, pid: int) -> Path:
    return path.with_name(f"{path.stem}.{pid}{path.suffix}")


def is_alive(path: Path) -> bool:
    """Whether a server listens at *path*: one that was killed leaves its socket."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)  # noqa: FBT003 - one that does not accept is alive, too
        try:
            probe.connect(str(path))
        except OSError as error:
            return error.errno != errno.ECONNREFUSED
        return True


def _asked(path: Path) -> tuple[str | None, int]:
    """Which mount point the server at *path* says that it serves (None: it does not say), and its process's number."""
    answer = bytearray()
    deadline_s = time.monotonic() + _ASK_S
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as asking:
        asking.settimeout(_ASK_S)
        try:
            asking.connect(str(path))
            pid = struct.unpack("3i", asking.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[0]
            asking.sendall(b'{"execute": "qmp_capabilities"}{"execute": "query-status"}')
            while len(answer) < _MOST_BYTES and time.monotonic() < deadline_s and (data := asking.recv(4096)):
                answer += data
                *lines, _ = bytes(answer).split(b"\n")
                for line in lines:
                    said = json.loads(line)
                    if isinstance(said, dict) and "mountpoint" in (said.get("return") or {}):
                        return str(said["return"]["mountpoint"]), int(pid)
        except (OSError, ValueError):
            pass
    return None, 0
