"""Data I/O on backing files, without blocking the event loop.

1. An attempt is an operation on the ring or a function call in a thread; its coroutine sleeps until it lands. Nothing is
   decided here but which of both: how many attempts an image may have in flight is the rehandle list's business.
2. A short count is never an answer: reads go on to the end of the file, writes to the end of their data (P6). A write
   that failed half way is not continued by the next attempt: that one writes all of it again.
3. A write that is under way cannot be called back. `Flight.abandon` is for reads.
4. The event loop makes one call of a file system itself, which does not wait: `Backing.read_cached`.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import importlib
import logging
import math
import mmap
import os
import queue
import struct
import threading
from collections import deque
from typing import TYPE_CHECKING, Any, Generic, TypeVar, cast

import outcome
import trio

from iohang_fuse import syscalls
from iohang_fuse.source import Caller, Opened, Where, acting_as, open_again, open_same, without_atime

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

T = TypeVar("T")
linux_uring: Any = None  # caio's module, once a ring was asked for
_no_uring = ""  # why it cannot be imported
log = logging.getLogger(__name__)

_IDLE_S = 10.0
"""After which a thread without work offers to go."""

_MOST_ON_RING = 4096
"""Operations on the ring at once: with a completion queue of four times that, which is what caio and the kernel make of it,
none can overflow. More than that go to threads."""

_RING_WORKERS = 512
"""Threads that the kernel may have for the ring, instead of four for each processor: on a file system that cannot be asked
without waiting, each read is one of them while it is under way."""

_SQE_BYTES, _FLAGS_AT, _IOSQE_ASYNC, _IORING_OFF_SQES = 64, 1, 1 << 4, 0x10000000
"""struct io_uring_sqe: its size, where its flags are, one of them; where mmap(2) has the submission queue (linux/io_uring.h)."""

_SMALL_BYTES = 64 << 10
_large = bytearray(1 << 20)  # FUSE's largest read

_TRY_AGAIN = frozenset({-errno.EINTR, -errno.EAGAIN, -errno.ECANCELED})

_GATHERED_BYTES = 1 << 20
"""Of neighbours in the write log, written again at once: copied, and as large as FUSE's and NFS's largest write."""


class Abandoned(Exception):
    """The read was given up while its attempt was in flight."""


class Unavailable(Exception):
    """The engine that was asked for is not to be had here, and why."""


class Transfer:
    """One read or write of a backing file: the work of an attempt, for any engine."""

    __slots__ = ("as_opener", "backing", "data", "offset", "on_ring", "size")

    def __init__(
        self,
        backing: Backing,
        offset: int,
        size: int,
        data: bytes | None = None,
        *,
        as_opener: bool = False,
        grows: bool = False,
    ) -> None:
        """A write of *data*, or else a read of *size* bytes. *as_opener*: for `Backing.write`. *grows*: the file, by it."""
        self.backing = backing
        self.offset = offset
        self.size = size
        self.data = data
        self.as_opener = as_opener
        if data is None:
            self.on_ring = backing.reads_on_ring
        else:
            # On FUSE a write that makes the file grow keeps its lock until it has returned, and one that waits for that lock
            # would keep the kernel's thread, and with it other images' writes (P7).
            self.on_ring = backing.writes_on_ring and not (as_opener or (grows and backing.apart))

    def __call__(self) -> bytes | int:
        """All of it, in a thread: `Backing.read` or `Backing.write`."""
        if self.data is None:
            return self.backing.read(self.offset, self.size)
        return self.backing.write(self.offset, self.data, as_opener=self.as_opener)


class Flight(Generic[T]):
    """One attempt: `await flight.land()` has *work* done in a thread and gives its result or exception."""

    def __init__(self, engine: Engine, work: Callable[[], T], on_late_return: Callable[[], None]) -> None:
        self._engine = engine
        self._work = work
        self._on_late_return = on_late_return
        self._task: trio.lowlevel.Task | None = None

    async def land(self) -> T:
        """Raises what *work* raised, EAGAIN if no thread could be started, or `Abandoned`."""
        self._start()
        self._task = trio.lowlevel.current_task()
        result: T = await trio.lowlevel.wait_task_rescheduled(self._abort)
        return result

    def abandon(self) -> None:
        """Wake the waiting coroutine with `Abandoned`; the attempt goes on, and its result is dropped."""
        if self._task is not None:
            task, self._task = self._task, None
            trio.lowlevel.reschedule(task, outcome.Error(Abandoned()))

    def landed(self, result: outcome.Outcome[T]) -> None:
        """The attempt has returned. For the engine, on the event loop."""
        if self._task is None:
            self._on_late_return()
        else:
            task, self._task = self._task, None
            trio.lowlevel.reschedule(task, result)

    def _start(self) -> None:
        self._engine.threads.submit(self._work, self.landed)

    def _abort(self, _raise_cancel: object) -> trio.lowlevel.Abort:
        self._task = None
        return trio.lowlevel.Abort.SUCCEEDED


class _RingFlight(Flight["bytes | int"]):
    """The same on the ring. What a short count has left over is done in a thread."""

    _work: Transfer

    def _start(self) -> None:
        work = self._work
        self._description = description = work.backing.enter()
        try:
            if work.data is None:
                operation = linux_uring.Operation.read(work.size, description.fd, work.offset)
            else:
                work.backing.unsynced = True
                operation = linux_uring.Operation.write(work.data, description.fd, work.offset)
            self._operation = operation
            operation.set_callback(self._done)
            self._engine.send(operation)
        except BaseException:
            if work.backing.left(description):
                self._engine.close_later(description.fd)
            raise

    def _done(self, count: int) -> None:
        """For caio to call, on the event loop."""
        work, operation = self._work, self._operation
        del self._operation  # it has this method, which has it
        self._engine.on_ring -= 1
        if work.data is not None:
            work.backing.unsynced = True  # a sync may have begun, and cleared it, before this landed
        if work.backing.left(self._description):
            self._engine.close_later(self._description.fd)
        if count == work.size or (count == 0 and work.data is None):  # 0: at the end of the file
            self.landed(outcome.Value(count if work.data is not None else cast("bytes", operation.get_value())))
        elif count >= 0 or count in _TRY_AGAIN:
            try:
                self._engine.threads.submit(work, self.landed)
            except OSError as error:
                self.landed(outcome.Error(error))
        else:
            self.landed(outcome.Error(OSError(-count, os.strerror(-count))))


class Threads:
    """A thread for each call that is under way, so that none waits for another that does not return.

    What they have done reaches the event loop in batches, through an eventfd.
    """

    def __init__(self) -> None:
        self._eventfd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._signal = functools.partial(os.eventfd_write, self._eventfd, 1)
        self._close = functools.partial(os.close, self._eventfd)
        self._jobs: queue.SimpleQueue[tuple[Callable[[], Any], Callable[[outcome.Outcome[Any]], None]] | None] = (
            queue.SimpleQueue()
        )
        self._done: deque[tuple[Callable[[outcome.Outcome[Any]], None] | None, outcome.Outcome[Any] | None]] = deque()
        self._signalled = False
        self.count = 0
        self.under_way = 0

    def __del__(self) -> None:
        self._close()  # a thread has a reference to us, so the last one has gone

    def submit(self, work: Callable[[], T], landed: Callable[[outcome.Outcome[T]], None]) -> None:
        """Have *work* done, and *landed* called with what came of it. Raises EAGAIN if no thread can be started."""
        if self.under_way >= self.count:
            try:
                threading.Thread(target=self._serve, name="iohang data", daemon=True).start()
            except RuntimeError as error:  # "can't start new thread": the process is at its limit, which passes
                raise OSError(errno.EAGAIN, str(error)) from error
            self.count += 1
        self.under_way += 1
        self._jobs.put((work, landed))

    async def serve(self) -> None:
        """Tell those whose work is done. Never returns."""
        while True:
            await trio.lowlevel.wait_readable(self._eventfd)
            os.eventfd_read(self._eventfd)
            self._signalled = False
            while self._done:
                landed, result = self._done.popleft()
                if landed is not None and result is not None:
                    self.under_way -= 1
                    landed(result)
                elif self.count > self.under_way:  # one has had nothing to do for a while; who goes is decided here
                    self.count -= 1
                    self._jobs.put(None)

    def _serve(self) -> None:
        while True:
            try:
                job = self._jobs.get(timeout=_IDLE_S)
            except queue.Empty:
                self._report(None, None)
                continue
            if job is None:
                return
            work, landed = job
            result = outcome.capture(work)
            del work, job  # data of a request must not stay here until the next one
            self._report(landed, result)
            del landed, result

    def _report(
        self, landed: Callable[[outcome.Outcome[Any]], None] | None, result: outcome.Outcome[Any] | None
    ) -> None:
        self._done.append((landed, result))
        # Read and set without a lock: at worst there is one signal too many.
        if not self._signalled:
            self._signalled = True
            self._signal()


class Engine:
    """How attempts are made: `uring` or `threads`, for all images of a mount.

    On the ring: reads and writes where neither handing them to the kernel nor the kernel's own workers can wait for another
    image (`source.open_data` says where). All else in threads.
    """

    def __init__(self, choice: str = "threads") -> None:
        """*choice*: `uring`, `threads`, or `auto`, which is `uring` where it can be had. Raises `Unavailable`."""
        self.on_ring = 0
        self.why_not = ""  # there is no ring
        self._ring: _Ring | None = None
        self._to_send = False
        if choice != "threads":
            try:
                self._ring = _Ring()
            except Unavailable as error:
                if choice == "uring":
                    raise
                self.why_not = str(error)
        self.threads = Threads()

    @property
    def name(self) -> str:
        """`uring` or `threads`."""
        return "threads" if self._ring is None else "uring"

    def flight(self, work: Callable[[], T], on_late_return: Callable[[], None], *, calm: bool = False) -> Flight[T]:
        """An attempt. *calm*: nothing is the matter with its image, so it may go where a sick one could be in others' way."""
        if (
            calm
            and self._ring is not None
            and type(work) is Transfer
            and (
                work.backing.reads_on_ring if work.data is None else work.backing.writes_on_ring and not work.as_opener
            )
            and self.on_ring < _MOST_ON_RING
        ):
            return _RingFlight(self, work, on_late_return)  # type: ignore[return-value]
        return Flight(self, work, on_late_return)

    def send(self, operation: Any) -> None:
        """Put *operation* on the ring. The kernel gets it, with all others of this turn, before the loop waits again."""
        assert self._ring is not None
        self._ring.submit(operation)
        self.on_ring += 1
        self._to_send = True

    def close_later(self, fd: int) -> None:
        """Close a descriptor in a thread. Nobody waits for that."""
        with contextlib.suppress(OSError):  # no thread to be had: one descriptor less until the mount ends
            self.threads.submit(functools.partial(_close_quietly, fd), lambda _result: None)

    async def serve(self) -> None:
        """Bring back what has been done. Never returns."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.threads.serve)
            if self._ring is not None:
                nursery.start_soon(self._serve_ring, self._ring)

    async def _serve_ring(self, ring: _Ring) -> None:
        sender = _Sender(self)
        trio.lowlevel.add_instrument(sender)
        try:
            while True:
                await trio.lowlevel.wait_readable(ring.fileno)
                with contextlib.suppress(BlockingIOError):
                    ring.poll()
                ring.process_events(_MOST_ON_RING)
        finally:
            trio.lowlevel.remove_instrument(sender)

    def flush(self) -> None:
        """Hand over to the kernel what is on the ring."""
        if self._to_send and self._ring is not None:
            self._to_send = False
            try:
                self._ring.flush()
            except Exception as error:  # noqa: BLE001 - trio would never call this again, and nothing be handed over any more
                # SystemError is caio's word for an errno: no memory, say. It is all still on the ring.
                log.debug("io_uring_enter: %s; once more", error)
                self._to_send = True
                os.eventfd_write(self._ring.fileno, 1)


class _Sender(trio.abc.Instrument):
    """What makes a batch of a turn: trio calls this before it waits."""

    def __init__(self, engine: Engine) -> None:
        self._flush = engine.flush

    def before_io_wait(self, timeout: float) -> None:  # noqa: ARG002 - trio's signature
        self._flush()


def _import_caio() -> None:
    """Only for who wants a ring: it asks the kernel when it is imported, and a seccomp filter may kill for that."""
    global linux_uring, _no_uring  # noqa: PLW0603
    if linux_uring is None and not _no_uring:
        try:
            linux_uring = importlib.import_module("caio.linux_uring")
        except ImportError as error:
            _no_uring = str(error)


class _Ring:
    """caio's io_uring, with IOSQE_ASYNC on each operation: handing it over never waits for the file.

    Without it the kernel may begin an operation in io_uring_enter(2) itself, on the event loop: with RWF_NOWAIT where it believes
    that the file has that, and on FUSE, whose files can be polled, even without (io_file_supports_nowait in io_uring/rw.c).
    There a write waits for the inode's lock, which one that hangs may have (seen on Linux 6.18).

    caio has no argument for flags. They are put into the submission queue, which is shared memory, behind caio's back and before
    `flush`; the first operation makes sure that caio's entries are where they should be.
    """

    def __init__(self) -> None:
        """Raises `Unavailable`."""
        _import_caio()
        if linux_uring is None:
            raise Unavailable(_no_uring)
        before = {*os.listdir("/proc/self/fd")}
        try:
            self._context = linux_uring.Context(_MOST_ON_RING)
        except (SystemError, OSError) as error:
            raise Unavailable(
                f"{error}; see sysctl kernel.io_uring_disabled, and the unit's SystemCallFilter"
            ) from error
        self.fileno = self._context.fileno
        try:
            self._map(before)
        except (OSError, StopIteration) as error:
            raise Unavailable(f"the submission queue cannot be had: {error}") from error
        self._submitted = 0
        self.poll, self.process_events, self.flush = (
            self._context.poll,
            self._context.process_events,
            self._context.flush,
        )
        self._try()

    def _map(self, before: set[str]) -> None:
        fd = next(
            int(name)
            for name in sorted({*os.listdir("/proc/self/fd")} - before)
            if os.path.lexists(f"/proc/self/fd/{name}")
            and os.readlink(f"/proc/self/fd/{name}") == "anon_inode:[io_uring]"
        )
        for each in (fd, self.fileno):
            os.set_inheritable(each, False)  # noqa: FBT003
        with contextlib.suppress(OSError):  # before Linux 5.15
            syscalls.set_ring_workers(fd, _RING_WORKERS)
        self._entries = (
            1 << _MOST_ON_RING.bit_length()
        )  # caio asks for one more, and the kernel makes a power of two of it
        self._queue = mmap.mmap(fd, self._entries * _SQE_BYTES, offset=_IORING_OFF_SQES)

    def submit(self, operation: Any) -> None:
        """Put *operation* on the ring; `flush` hands it over."""
        self._context.submit(operation)
        self._queue[self._submitted % self._entries * _SQE_BYTES + _FLAGS_AT] = _IOSQE_ASYNC
        self._submitted += 1

    def _try(self) -> None:
        offset = 0x1234_5678
        self.submit(linux_uring.Operation.read(1, self.fileno, offset))
        _, flags, _, fd, at = struct.unpack_from("=BBHiQ", self._queue)
        if (flags, fd, at) != (_IOSQE_ASYNC, self.fileno, offset):
            raise Unavailable(f"this caio ({self._context!r}) lays its ring out in another way than is known")
        self.flush()


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
        self.generation = 0  # how often it has been opened anew
        # The shell's: whether a write is in flight; how often it has failed since it last worked, and with what; when opening
        # it anew was last tried, and why it could not be had.
        self.busy = False
        self.failures = 0
        self.errno: int | None = None
        self.renewed_s = -math.inf
        self.refusal: OSError | None = None
        # Which way its reads and writes may go.
        self.reads_cached = opened.nowait
        self.reads_on_ring = opened.ring_reads and not opened.nowait
        self.writes_on_ring = opened.ring_writes and not self.serial
        self._flags = opened.flags
        self._opener = opener
        self._now = _Description(opened.fd)
        self._lock = threading.Lock()
        self._serial = threading.Lock() if opened.flags & os.O_DSYNC else contextlib.nullcontext()
        self._renewing = threading.Lock()

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
            _close_quietly(description.fd)

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
            new = open_same(fd, flags, self._opener)
            return Backing(Opened(new, flags, stable=False, apart=self.apart, device=_device(new)), self._opener)

    def renew(self, where: Where, generation: int) -> bool:
        """Open the file anew, unless that has been done since *generation*. Returns whether it was done.

        Raises OSError with the reason where it cannot be had; the old description then stays, and is tried again.
        """
        # Who comes while another one opens it does not wait for that: it may take as long as an attempt.
        if not self._renewing.acquire(blocking=False):
            return False
        try:
            if self.generation != generation:
                return False
            with self._using() as fd:
                new = open_again(fd, self._flags, self._opener, where)
            device = _device(new)
            reads_cached = self.reads_cached and without_atime(new)
            with self._lock:  # the event loop takes it, too: no system call under it
                closed = self._now.replaced
                old = self._now
                if not closed:
                    self._now = _Description(new)
                    self.device, self.reads_cached = device, reads_cached
                    self.generation += 1
                    old.replaced = True
                    old.closed = unused = not old.users
            if closed:  # in the meantime
                _close_quietly(new)
                return False
            if unused:
                _close_quietly(old.fd)
            return True
        finally:
            self._renewing.release()

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


def _close_quietly(fd: int) -> None:
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
