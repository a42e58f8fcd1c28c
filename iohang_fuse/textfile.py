"""Metrics in a file for node_exporter's textfile collector."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import stat
import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

log = logging.getLogger(__name__)

WRITE_EVERY_S = 5.0
"""The file. node_exporter is asked every 15 s or so."""


class Textfile:
    """A file that node_exporter reads. It is replaced, never changed, so that nobody reads half of it.

    Whoever writes it has the lock beside it, which nobody else may open: so two mounts that were told the same name notice, what a
    killed server has left is in nobody's way, and no other user can keep a mount from its file.
    """

    def __init__(self, render: Callable[[], bytes], path: Path) -> None:
        self._render = render
        self._path = path
        self._new = path.with_name(f".{path.name}.new")  # node_exporter reads *.prom
        self._beside = path.with_name(f".{path.name}.lock")
        self._lock: int | None = None
        self._mine: int | None = None  # the one that was put there last, to know it again
        self._ended = threading.Event()

    def bind(self) -> None:
        """Put a first one there. Raises OSError: EEXIST if another mount writes it, or what is there is no file of this kind."""
        with contextlib.suppress(FileNotFoundError):
            if not stat.S_ISREG(os.stat(self._path, follow_symlinks=False).st_mode):
                raise FileExistsError(errno.EEXIST, "it is there, and no regular file")
        self._lock = _taken(self._beside)
        try:
            self._write()
        except BaseException:
            self.close()
            raise

    def serve(self) -> None:
        """Until `stop`."""
        complained = False
        while not self._ended.wait(WRITE_EVERY_S):
            try:
                self._write()
                complained = False
            except Exception as error:
                if not complained:  # once, until it works again
                    log.warning(
                        "metrics: %s cannot be written: %s", self._path, error, exc_info=not isinstance(error, OSError)
                    )
                complained = True

    def stop(self) -> None:
        """`serve` is to end."""
        self._ended.set()

    def close(self) -> None:
        """Remove it, unless it is somebody else's by now: what is not measured any more must not look as if it were."""
        if self._mine is not None:
            with contextlib.suppress(OSError):
                if os.path.samestat(os.fstat(self._mine), os.stat(self._path, follow_symlinks=False)):
                    self._path.unlink()
            os.close(self._mine)
            self._mine = None
        if self._lock is not None:
            with contextlib.suppress(OSError):
                self._beside.unlink()
            os.close(self._lock)
            self._lock = None

    def _write(self) -> None:
        page = self._render()
        with contextlib.suppress(FileNotFoundError):
            self._new.unlink()  # what a killed server has left, or somebody has put there
        fd = os.open(self._new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
        try:
            os.fchmod(fd, 0o644)  # whatever the umask is: node_exporter is somebody else
            with open(fd, "wb", closefd=False) as file:
                file.write(page)
            os.replace(self._new, self._path)
        except BaseException:
            os.close(fd)
            raise
        if self._mine is not None:
            os.close(self._mine)
        self._mine = fd


def _taken(lock: Path) -> int:
    """The descriptor of *lock*, locked. Raises OSError: EEXIST if another mount has it."""
    while True:
        fd = os.open(lock, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(fd), os.stat(lock)):  # and not one that was removed in this moment
                return fd
        except BlockingIOError:
            os.close(fd)
            raise FileExistsError(errno.EEXIST, "another mount writes it") from None
        except FileNotFoundError:
            pass
        os.close(fd)
