"""Data I/O on backing files, without blocking the event loop.

1. An attempt is one function call in a worker thread; its coroutine sleeps until it lands. Nothing is decided here:
   how many attempts an image may have in flight is the rehandle list's business.
2. A short count is never an answer: reads go on to the end of the file, writes to the end of their data (P6). A write
   that failed half way is not continued by the next attempt: that one writes all of it again.
3. A write in a thread cannot be called back. `Flight.abandon` is for reads.
"""

from __future__ import annotations

import contextlib
import errno
import os
import threading
from typing import TYPE_CHECKING, Generic, TypeVar

import outcome
import trio

from iohang_fuse.source import SERVER, Caller, acting_as, by_descriptor

if TYPE_CHECKING:
    from collections.abc import Callable

T = TypeVar("T")


class Abandoned(Exception):
    """The read was given up while its attempt was in flight."""


class Flight(Generic[T]):
    """One attempt: `await flight.land()` runs *work* in a thread and gives its result or exception."""

    def __init__(self, work: Callable[[], T], on_late_return: Callable[[], None]) -> None:
        self._work = work
        self._on_late_return = on_late_return
        self._task: trio.lowlevel.Task | None = None
        self._token = trio.lowlevel.current_trio_token()

    async def land(self) -> T:
        """Raises what *work* raised, EAGAIN if no thread could be started, or `Abandoned`."""
        self._task = trio.lowlevel.current_task()
        try:
            trio.lowlevel.start_thread_soon(self._work, self._deliver, "iohang data")
        except RuntimeError as error:  # "can't start new thread": the process is at its limit, which passes
            self._task = None
            raise OSError(errno.EAGAIN, str(error)) from error
        result: T = await trio.lowlevel.wait_task_rescheduled(self._abort)
        return result

    def abandon(self) -> None:
        """Wake the waiting coroutine with `Abandoned`; the thread goes on, and its result is dropped."""
        if self._task is not None:
            task, self._task = self._task, None
            trio.lowlevel.reschedule(task, outcome.Error(Abandoned()))

    def _deliver(self, result: outcome.Outcome[T]) -> None:
        with contextlib.suppress(trio.RunFinishedError):  # the server has ended without waiting for this thread
            self._token.run_sync_soon(self._landed, result)

    def _landed(self, result: outcome.Outcome[T]) -> None:
        if self._task is None:
            self._on_late_return()
        else:
            task, self._task = self._task, None
            trio.lowlevel.reschedule(task, result)

    def _abort(self, _raise_cancel: object) -> trio.lowlevel.Abort:
        self._task = None
        return trio.lowlevel.Abort.SUCCEEDED


class Backing:
    """The open backing file of one handle.

    Where writes are made final by O_DSYNC, each attempt has a descriptor to itself while it runs. Linux reports a failed
    writeback once per open file description: two writes at once on one would share the report, and the second would be
    told that its lost data is safe (file_check_and_advance_wb_err in the kernel's mm/filemap.c).
    """

    def __init__(self, fd: int, spare_flags: int | None, opener: Caller) -> None:
        self.fd = fd
        self._spare_flags = spare_flags
        self._spares: list[int] = []
        self._opener = opener
        self._main_turn = threading.Lock()

    def read(self, offset: int, size: int) -> bytes:
        """Up to *size* bytes; fewer only at the end of the file."""
        data = os.pread(self.fd, size, offset)
        if len(data) in {0, size}:
            return data
        parts = [data]
        have = len(data)
        while have < size:
            data = os.pread(self.fd, size - have, offset + have)
            if not data:
                break
            parts.append(data)
            have += len(data)
        return b"".join(parts)

    def write(self, offset: int, data: bytes) -> int:
        """Write all of *data*; when this returns, its result is final. Clears set-ID bits as the opener's write would."""

        # acting_as: without CAP_FSETID the kernel drops set-user-ID and set-group-ID bits on a write.
        # Around the write alone: it does not nest, and opening a spare is one more.
        def write_as_opener(fd: int) -> int:
            with acting_as(self._opener, with_groups=False):
                return _write_whole(fd, data, offset)

        return self._exclusively(write_as_opener)

    def truncate(self, size: int) -> None:
        """Change the file's size."""
        with acting_as(self._opener, with_groups=False):
            os.ftruncate(self.fd, size)

    def sync(self, *, data_only: bool) -> None:
        """fsync(2) or fdatasync(2)."""
        self._exclusively(os.fdatasync if data_only else os.fsync)

    def close(self) -> None:
        """Close all descriptors; blocks where the file system flushes on close. Raises what closing the main one did."""
        _close_spares(self._spares)
        os.close(self.fd)

    def _exclusively(self, work: Callable[[int], T]) -> T:
        if self._spare_flags is None:
            return work(self.fd)
        spares = self._spares
        try:
            fd = spares.pop()
        except IndexError:
            fd = self._open_spare()
        if fd < 0:
            with self._main_turn:
                return work(self.fd)
        try:
            result = work(fd)
        except BaseException:
            # Every other descriptor will report this same failure once more, to a write that has done nothing wrong:
            # those at hand are closed now, those in use when they come back and find another list.
            stale, self._spares = self._spares, []
            _close_spares([*stale, fd])
            raise
        if spares is self._spares:
            spares.append(fd)
        else:
            _close_spares([fd])
        return result

    def _open_spare(self) -> int:
        """One more description of the same file, or -1 where there is none to be had.

        Nobody may open it again (mode 0444, made by its user), or no more files may be open: not the storage's fault, so
        neither an error for the guest nor a reason to hold.
        """
        assert self._spare_flags is not None
        for who in (self._opener, SERVER):
            try:
                with acting_as(who):
                    return os.open(by_descriptor(self.fd), self._spare_flags)
            except PermissionError:
                continue
            except OSError as error:
                if error.errno not in {errno.EMFILE, errno.ENFILE}:
                    raise
        return -1


def _close_spares(descriptors: list[int]) -> None:
    for fd in descriptors:
        with contextlib.suppress(OSError):  # its writes have had their answers; the descriptor is gone all the same
            os.close(fd)


def _write_whole(fd: int, data: bytes, offset: int) -> int:
    count = os.pwrite(fd, data, offset)
    if count == len(data):
        return count
    rest = memoryview(data)[count:]
    while rest:
        if count == 0:  # write(2) may answer 0 for nothing but an empty write
            raise OSError(errno.EIO, "pwrite(2) wrote nothing and reported no error")
        count = os.pwrite(fd, rest, offset + len(data) - len(rest))
        rest = rest[count:]
    return len(data)
