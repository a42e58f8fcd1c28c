"""The open backing file of one handle: its descriptor, which may be opened anew beneath it, and what is done with it.

1. What is here blocks, and is called in threads; but for `Backing.read_cached`, which does not wait: the event loop calls it.
2. A short count is never an answer: reads go on to the end of the file, writes to the end of their data (P6). A write
   that failed half way is not continued by the next attempt: that one writes all of it again.
3. A descriptor is closed when the last attempt on it has returned, and never while one is inside.
"""

from __future__ import annotations

import contextlib
import errno
import math
import os
import threading
from typing import TYPE_CHECKING

from iohang_fuse import syscalls
from iohang_fuse.source import Caller, Opened, Where, acting_as, open_again, open_same, without_atime

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

_SMALL_BYTES = 64 << 10
_large = bytearray(1 << 20)  # FUSE's largest read

_GATHERED_BYTES = 1 << 20
"""Of neighbours in the write log, written again at once: copied, and as large as FUSE's and NFS's largest write."""


class _Description:
    """An open file description: closed when it has been replaced and the last attempt on it has returned."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self.users = 0
        self.replaced = False
        self.closed = False


class Backing:
    """The open backing file of one handle. It may be opened anew beneath its handle: `renew`.

    Attempts are positional, so nothing but the flags is carried over. Where the consumer asked for O_DSYNC, writes and syncs
    come one at a time: Linux reports a failed writeback once per open file description, so of two at once the second would
    be told that its lost data is safe (file_check_and_advance_wb_err in mm/filemap.c).
    """

    def __init__(self, opened: Opened, opener: Caller) -> None:
        self.stable = opened.stable  # whether a write that has returned needs no sync
        self.serial = bool(opened.flags & os.O_DSYNC)  # whether writes come one at a time
        self.apart = opened.apart
        self.unsynced = False  # whether something was written through it since it was synced: where it is *apart*
        self.device = opened.device
        # The shell's: whether a write is in flight; how often it has failed since it last worked, and with what; when opening
        # it anew was last tried.
        self.busy = False
        self.failures = 0
        self.errno: int | None = None
        self.renewed_s = -math.inf
        # Which way its reads and writes may go.
        self.reads_cached = opened.nowait
        self.reads_on_ring = opened.ring_reads and not opened.nowait
        self.large_reads_on_ring = opened.ring_reads and opened.nowait
        self.writes_on_ring = opened.ring_writes and not self.serial
        self._flags = opened.flags
        self._opener = opener
        self._owner = 0
        self._now = _Description(opened.fd)
        self._lock = threading.Lock()
        self._serial = threading.Lock() if opened.flags & os.O_DSYNC else contextlib.nullcontext()

    def failed(self, error: OSError) -> None:
        """For the shell: an attempt has."""
        self.failures += 1
        self.errno = error.errno

    def enter(self) -> _Description:
        """The description to work on. Until `leave`, its descriptor is not closed. Raises ESTALE if it is already."""
        with self._lock:
            description = self._now
            if description.closed:  # its number may be another file's by now
                raise OSError(errno.ESTALE, "closed in the meantime")
            description.users += 1
            return description

    def left(self, description: _Description) -> bool:
        """The work is done. Returns whether the caller has to close the descriptor now, which blocks."""
        with self._lock:
            description.users -= 1
            description.closed = unused = description.replaced and not description.users
        return unused

    def leave(self, description: _Description) -> None:
        """The work is done. May block."""
        if self.left(description):
            close_quietly(description.fd)

    @contextlib.contextmanager
    def _using(self) -> Iterator[int]:
        description = self.enter()
        try:
            yield description.fd
        finally:
            self.leave(description)

    def read_cached(self, offset: int, size: int) -> bytes | None:
        """All of the *size* bytes, if the kernel has them in its page cache; None otherwise. Never waits.

        A large answer is valid until the next call only: pyfuse3 has copied it to the kernel before another task runs.

        RWF_NOWAIT alone is not enough: for what is not in the cache it starts to read, and a disk that hangs may keep it there.
        """
        # Under the lock, or another thread may close the descriptor, and a third one get its number for another file. Nobody keeps
        # it for long, but the loop waits for nobody.
        if not self._lock.acquire(blocking=False):
            return None
        try:
            fd = self._now.fd
            if self._now.closed or not syscalls.is_cached(fd, offset, size):
                return None
            # A new MiB of zeros, to be overwritten at once, takes as long as the read.
            data = memoryview(_large)[:size] if _SMALL_BYTES < size <= len(_large) else bytearray(size)
            if os.preadv(fd, (data,), offset, os.RWF_NOWAIT) == size:
                return data  # type: ignore[return-value]  # nobody changes it; making bytes of it would be one copy more
        except OSError:
            pass  # an attempt that may wait will meet it, too
        finally:
            self._lock.release()
        return None

    def read(self, offset: int, size: int) -> bytes:
        """Up to *size* bytes; fewer only at the end of the file."""
        description = self.enter()
        try:
            fd = description.fd
            data = os.pread(fd, size, offset)
            if len(data) in {0, size}:
                return data
            parts = [data]
            have = len(data)
            while have < size:
                data = os.pread(fd, size - have, offset + have)
                if not data:
                    break
                parts.append(data)
                have += len(data)
            return b"".join(parts)
        finally:
            self.leave(description)

    def write(self, offset: int, data: bytes, *, as_opener: bool = True) -> int:
        """Write all of *data*. Clears set-ID bits as the opener's write would, if it is made *as_opener*."""
        if not (as_opener or self.serial):
            return self._write(offset, data)
        # Without CAP_FSETID the kernel drops set-user-ID and set-group-ID bits on a write.
        acting = acting_as(self._opener, with_groups=False) if as_opener else contextlib.nullcontext()
        with self._serial, acting:
            return self._write(offset, data)

    def _write(self, offset: int, data: bytes) -> int:
        description = self.enter()
        self.unsynced = True
        try:
            return _write_whole(description.fd, data, offset)
        finally:
            self.unsynced = True  # a sync may have begun, and cleared it, before this landed
            self.leave(description)

    def truncate(self, size: int) -> None:
        """Change the file's size."""
        with self._using() as fd, acting_as(self._opener, with_groups=False):
            os.ftruncate(fd, size)

    def sync(self, *, data_only: bool) -> int:
        """fsync(2) or fdatasync(2); returns the file's size before it, which is now stable."""
        with self._serial, self._using() as fd:
            self.unsynced = False
            size = os.fstat(fd).st_size
            try:
                _sync(fd, data_only=data_only)
            except OSError:
                self.unsynced = True
                raise
            return size

    def rewrite(self, writes: Sequence[tuple[int, bytes | memoryview]], *, data_only: bool) -> int:
        """Write all of *writes* again and sync, on one description; returns the size that is now stable."""
        with self._serial, self._using() as fd:
            for offset, data in _gathered(writes):
                _write_whole(fd, data, offset)
            size = os.fstat(fd).st_size
            _sync(fd, data_only=data_only)
            return size

    def ask(self) -> None:
        """Raises OSError unless the storage answers: after a give-up, before anything else goes to the same place (P5).

        statfs(2), because a read might be answered from the page cache.
        """
        with self._using() as fd:
            os.fstatvfs(fd)

    def another(self) -> Backing:
        """One more description of the same file, for syncs: what goes wrong on this one uses up no report on that one."""
        with self._using() as fd:
            flags = self._flags & ~os.O_SYNC
            new = open_same(fd, flags, self._opener, owner=self._owner)
            return Backing(Opened(new, flags, stable=False, apart=self.apart, device=_device(new)), self._opener)

    def renew(self, where: Where, owner: int = 0) -> bool:
        """Open the file anew, as another *owner* (`source.owning`). Returns whether that was still wanted. One at a time.

        Raises OSError with the reason where it cannot be had; the old description then stays, and is tried again.
        """
        with self._using() as fd:
            new = open_again(fd, self._flags, self._opener, where, owner=owner)
        device = _device(new)
        reads_cached = self.reads_cached and without_atime(new)
        with self._lock:  # the event loop takes it, too: no system call under it
            closed = self._now.replaced
            old = self._now
            if not closed:
                self._now = _Description(new)
                self.device, self.reads_cached, self._owner = device, reads_cached, owner
                old.replaced = True
                old.closed = unused = not old.users
        if closed:  # in the meantime
            close_quietly(new)
        elif unused:
            close_quietly(old.fd)
        return not closed

    def close(self) -> None:
        """Blocks where the file system flushes on close. Raises what closing did; the descriptor is gone all the same.

        While an attempt is inside it, that one closes it.
        """
        with self._lock:
            self._now.replaced = True
            self._now.closed = unused = not self._now.users
        if unused:
            os.close(self._now.fd)


def _device(fd: int) -> int:
    try:
        return os.fstat(fd).st_dev
    except OSError:  # the storage fails; what is written through it will tell
        return 0


def close_quietly(fd: int) -> None:
    """close(2), whatever it says."""
    # What was written through it is in the write log; the descriptor is gone all the same.
    with contextlib.suppress(OSError):
        os.close(fd)


def _gathered(writes: Sequence[tuple[int, bytes | memoryview]]) -> Iterator[tuple[int, bytes | memoryview]]:
    """The same bytes in the same order, neighbours together: small writes one by one would take minutes over a network."""
    parts: list[bytes | memoryview] = []
    first = size = 0
    for offset, data in writes:
        if parts and (offset != first + size or size + len(data) > _GATHERED_BYTES):
            yield first, b"".join(parts)
            parts = []
        if not parts:
            first, size = offset, 0
        parts.append(data)
        size += len(data)
    if parts:
        yield first, b"".join(parts)


def _sync(fd: int, *, data_only: bool) -> None:
    (os.fdatasync if data_only else os.fsync)(fd)


def _write_whole(fd: int, data: bytes | memoryview, offset: int) -> int:
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
