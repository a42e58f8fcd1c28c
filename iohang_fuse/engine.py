"""Data I/O on backing files, without blocking the event loop.

1. An attempt is an operation on the ring or a function call in a thread; when it lands, whoever waits is told on the event loop, be
   that a coroutine (`Flight.land`) or a call (`Flight.take_off`). Nothing is decided here but which of both: how many attempts an
   image may have in flight is the rehandle list's business.
2. What the ring leaves over of a short count is done in a thread, where backing.py sees to it (P6).
3. A write that is under way cannot be called back. `Flight.abandon` is for reads.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import logging
import os
import queue
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any, Generic, TypeVar

import outcome
import trio

from iohang_fuse.backing import Backing, close_quietly
from iohang_fuse.ring import LARGE_BYTES, Reply, Ring

T = TypeVar("T")
_Landed = Callable[[outcome.Outcome[Any]], None]
log = logging.getLogger(__name__)

_IDLE_S = 10.0
"""After which a thread without work offers to go."""

_MOST_ON_RING = 4096
"""Operations on the ring at once: its completion queue has room for twice that. More than that go to threads."""

_RING_WORKERS = 512
"""Threads that the kernel may have for the ring, instead of four for each processor: on a file system that cannot be asked
without waiting, each read is one of them while it is under way."""

_AWAKE_S = 60e-6
"""So long the event loop stays awake for what may come at once: to wake a processor that sleeps takes about as long."""

_AWAKE_FOR = 2
"""Operations under way at most. With more of them it hardly sleeps between one and the next."""

_LATE_S = 1.0
"""What has been under way for longer, or twice as long, does not count there: it may never return, and what the loop does for
healthy images shall not depend on it (P7)."""

_SLEEPS = 64
"""Without staying awake, after it was in vain: most sources take longer, and it shall cost them next to nothing."""

_TRY_AGAIN = frozenset({-errno.EINTR, -errno.EAGAIN, -errno.ECANCELED})


class Abandoned(Exception):
    """The read was given up while its attempt was in flight."""


class Unavailable(Exception):
    """The engine that was asked for is not to be had here, and why."""


class Transfer:
    """One read or write of a backing file: the work of an attempt, for any engine."""

    __slots__ = ("as_opener", "backing", "data", "offset", "on_ring", "reply", "size")

    def __init__(
        self,
        backing: Backing,
        offset: int,
        size: int,
        data: bytes | None = None,
        as_opener: bool = False,  # noqa: FBT001, FBT002 - by position: one is made for each request
        grows: bool = False,  # noqa: FBT001, FBT002
    ) -> None:
        """A write of *data*, or else a read of *size* bytes. *as_opener*: for `Backing.write`. *grows*: the file, by it."""
        self.backing = backing
        self.offset = offset
        self.size = size
        self.data = data
        self.as_opener = as_opener
        self.reply: Reply | None = None  # where what is read may go at once; the attempt's result is None then
        if data is None:
            self.on_ring = backing.reads_on_ring or (backing.large_reads_on_ring and size > LARGE_BYTES)
        else:
            # On FUSE a write that makes the file grow keeps its lock until it has returned, and one that waits for that lock
            # would keep the kernel's thread, and with it other images' writes (P7).
            self.on_ring = backing.writes_on_ring and not (as_opener or (grows and backing.apart))

    def __call__(self) -> bytes | int:
        """All of it, in a thread: `Backing.read` or `Backing.write`."""
        if self.data is None:
            return self.backing.read(self.offset, self.size)
        return self.backing.write(self.offset, self.data, as_opener=self.as_opener)


class _UnderWay:
    """How many there are, and how many of them are `late`: begun before the last call of `mark` but one."""

    __slots__ = ("_age", "_old", "count", "late")

    def __init__(self) -> None:
        self.count = self.late = 0
        self._old = 0  # begun before the last call, and not late
        self._age = 0  # calls of `mark`

    @property
    def due(self) -> int:
        """Of which one may hear at any moment."""
        return self.count - self.late

    def begin(self) -> int:
        """One more. Returns what `end` has to be told."""
        self.count += 1
        return self._age

    def end(self, age: int) -> None:
        self.count -= 1
        if age < self._age - 1:
            self.late -= 1
        elif age < self._age:
            self._old -= 1

    def mark(self) -> None:
        self.late += self._old
        self._old = self.count - self.late
        self._age += 1


class Flight(Generic[T]):
    """One attempt: `await flight.land()` has *work* done in a thread and gives its result or exception."""

    def __init__(self, engine: Engine, work: Callable[[], T], on_late_return: Callable[[], None]) -> None:
        self._engine = engine
        self._work = work
        self._on_late_return = on_late_return
        self._tell: Callable[[outcome.Outcome[T]], object] | None = None

    async def land(self) -> T:
        """Raises what *work* raised, EAGAIN if no thread could be started, or `Abandoned`."""
        self.take_off(functools.partial(trio.lowlevel.reschedule, trio.lowlevel.current_task()))
        result: T = await trio.lowlevel.wait_task_rescheduled(self._abort)
        return result

    def take_off(self, tell: Callable[[outcome.Outcome[T]], object]) -> None:
        """The same without a coroutine: *tell* is called on the event loop. Raises EAGAIN if no thread could be started."""
        self._start()
        self._tell = tell

    def abandon(self) -> None:
        """Tell whoever waits `Abandoned`; the attempt goes on, and its result is dropped."""
        if self._tell is not None:
            tell, self._tell = self._tell, None
            tell(outcome.Error(Abandoned()))

    def landed(self, result: outcome.Outcome[T]) -> None:
        """The attempt has returned. For the engine, on the event loop."""
        if self._tell is None:
            self._on_late_return()
        else:
            tell, self._tell = self._tell, None
            tell(result)

    def _start(self) -> None:
        self._engine.threads.submit(self._work, self.landed)

    def _abort(self, _raise_cancel: object) -> trio.lowlevel.Abort:
        self._tell = None
        return trio.lowlevel.Abort.SUCCEEDED


class _RingFlight(Flight["bytes | int | None"]):
    """The same on the ring."""

    _work: Transfer

    def _start(self) -> None:
        work, engine = self._work, self._engine
        assert engine.ring is not None
        self._description = description = work.backing.enter()
        try:
            if work.data is None:
                engine.ring.read(self, description.fd, work.offset, work.size, work.reply)
            else:
                work.backing.unsynced = True
                engine.ring.write(self, description.fd, work.offset, work.data)
        except BaseException:
            if work.backing.left(description):
                engine.close_later(description.fd)
            raise
        self._age = engine.on_ring.begin()
        if work.data is not None and work.size > LARGE_BYTES:
            engine.ring.hurry()  # the next one is received, which is a copy, while the kernel copies this one

    def done(self, result: int, data: bytes | None) -> None:
        """For the ring to call, on the event loop."""
        work = self._work
        self._engine.on_ring.end(self._age)
        if work.data is not None:
            work.backing.unsynced = True  # a sync may have begun, and cleared it, before this landed
        if result < 0 and data is None and work.data is None:
            pass  # it is never closed
        elif work.backing.left(self._description):
            self._engine.close_later(self._description.fd)
        if result == work.size:
            self.landed(outcome.Value(data if work.data is None else result))
        elif result == 0 and work.data is None:  # at the end of the file
            self.landed(outcome.Value(b""))
        elif result >= 0 or result in _TRY_AGAIN:
            try:
                self._engine.threads.submit(work, self.landed)
            except OSError as error:
                self.landed(outcome.Error(error))
        else:
            self.landed(outcome.Error(OSError(-result, os.strerror(-result))))


class Threads:
    """A thread for each call that is under way, so that none waits for another that does not return.

    What they have done reaches the event loop in batches, through an eventfd.
    """

    def __init__(self) -> None:
        self._eventfd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._signal = functools.partial(os.eventfd_write, self._eventfd, 1)
        self._close = functools.partial(os.close, self._eventfd)
        self._jobs: queue.SimpleQueue[tuple[Callable[[], Any], _Landed, int] | None] = queue.SimpleQueue()
        self._done: deque[tuple[_Landed, int, outcome.Outcome[Any]] | None] = deque()  # None: a thread offers to go
        self._signalled = False
        self.count = 0
        self.under_way = _UnderWay()

    def __del__(self) -> None:
        self._close()  # a thread has a reference to us, so the last one has gone

    def submit(self, work: Callable[[], T], landed: Callable[[outcome.Outcome[T]], None]) -> None:
        """Have *work* done, and *landed* called with what came of it. Raises EAGAIN if no thread can be started."""
        if self.under_way.count >= self.count:
            try:
                threading.Thread(target=self._serve, name="iohang data", daemon=True).start()
            except RuntimeError as error:  # "can't start new thread": the process is at its limit, which passes
                raise OSError(errno.EAGAIN, str(error)) from error
            self.count += 1
        self._jobs.put((work, landed, self.under_way.begin()))

    async def serve(self) -> None:
        """Tell those whose work is done. Never returns."""
        while True:
            await trio.lowlevel.wait_readable(self._eventfd)
            os.eventfd_read(self._eventfd)
            self._signalled = False
            while self._done:
                done = self._done.popleft()
                if done is not None:
                    landed, age, result = done
                    self.under_way.end(age)
                    try:
                        landed(result)
                    except Exception:  # a bug costs one request, not the mount (P11)
                        log.exception("a bug in what an attempt in a thread led to; the mount stays")
                elif self.count > self.under_way.count:  # one has had nothing to do for a while
                    self.count -= 1  # who goes is decided here
                    self._jobs.put(None)

    def _serve(self) -> None:
        while True:
            try:
                job = self._jobs.get(timeout=_IDLE_S)
            except queue.Empty:
                self._report(None)
                continue
            if job is None:
                return
            work, landed, age = job
            result = outcome.capture(work)
            del work, job  # data of a request must not stay here until the next one
            self._report((landed, age, result))
            del landed, result

    def _report(self, done: tuple[_Landed, int, outcome.Outcome[Any]] | None) -> None:
        self._done.append(done)
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
        self.on_ring = _UnderWay()
        self.request_waits: Callable[[], bool] = _never  # at /dev/fuse. Must not block
        self.why_not = ""  # there is no ring
        self.ring: Ring | None = None
        if choice != "threads":
            try:
                self.ring = _ring()
            except Unavailable as error:
                if choice == "uring":
                    raise
                self.why_not = str(error)
        self.threads = Threads()

    @property
    def name(self) -> str:
        """`uring` or `threads`."""
        return "threads" if self.ring is None else "uring"

    def flight(self, work: Callable[[], T], on_late_return: Callable[[], None], *, calm: bool = False) -> Flight[T]:
        """An attempt. *calm*: nothing is the matter with its image, so it may go where a sick one could be in others' way."""
        if calm and type(work) is Transfer and work.on_ring and self.ring and self.on_ring.count < _MOST_ON_RING:
            return _RingFlight(self, work, on_late_return)  # type: ignore[return-value]
        return Flight(self, work, on_late_return)

    def close_later(self, fd: int) -> None:
        """Close a descriptor in a thread. Nobody waits for that."""
        with contextlib.suppress(OSError):  # no thread to be had: one descriptor less until the mount ends
            self.threads.submit(functools.partial(close_quietly, fd), lambda _result: None)

    async def serve(self) -> None:
        """Bring back what has been done. Never returns."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.threads.serve)
            if self.ring is not None:
                nursery.start_soon(self._serve_ring, self.ring)

    async def _serve_ring(self, ring: Ring) -> None:
        batches = _Batches(self, ring)
        trio.lowlevel.add_instrument(batches)
        try:
            while True:
                await trio.lowlevel.wait_readable(ring.fileno)  # ends trio's wait; all else is in `_Batches`
                with contextlib.suppress(BlockingIOError):
                    os.eventfd_read(ring.fileno)
        finally:
            trio.lowlevel.remove_instrument(batches)


class _Patience:
    """Stays awake for what may come at once, unless it was in vain just now."""

    def __init__(self) -> None:
        self._sleeps = 0

    def wait(self, has_come: Callable[[], bool]) -> None:
        if self._sleeps:
            self._sleeps -= 1
            return
        until_s = time.perf_counter() + _AWAKE_S
        while not has_come():
            if time.perf_counter() > until_s:
                self._sleeps = _SLEEPS
                return


class _Batches(trio.abc.Instrument):
    """All that a turn of the event loop has for the ring is handed over, and all that is done collected, at once.

    trio would never again call one that raises: a bug costs one request, not every image the ring (P11).
    """

    def __init__(self, engine: Engine, ring: Ring) -> None:
        self._engine = engine
        self._ring = ring
        self._for_ring, self._for_request = _Patience(), _Patience()
        self._mark_s = 0.0

    def before_io_wait(self, timeout: float) -> None:
        try:
            if timeout > 0:
                self._ring.about_to_wait()
                self._stay_awake()
            else:
                self._ring.hand_over()
        except Exception:
            log.exception("a bug in handing over to io_uring; the mount stays")

    def _stay_awake(self) -> None:
        engine = self._engine
        on_ring, in_threads = engine.on_ring, engine.threads.under_way
        if time.monotonic() > self._mark_s:
            self._mark_s = time.monotonic() + _LATE_S
            on_ring.mark()
            in_threads.mark()
        if not on_ring.due:
            if not in_threads.due:
                self._for_request.wait(engine.request_waits)
        elif on_ring.due <= _AWAKE_FOR:
            self._for_ring.wait(self._ring.is_done)

    def after_io_wait(self, timeout: float) -> None:
        try:
            if timeout > 0:
                self._ring.waited()
            self._ring.collect()
        except Exception:
            log.exception("a bug in collecting from io_uring; the mount stays")


def _never() -> bool:
    return False


def _ring() -> Ring:
    try:
        ring = Ring(2 * _MOST_ON_RING)  # a read and its reply are two
    except OSError as error:
        raise Unavailable(f"{error}; see sysctl kernel.io_uring_disabled, and the unit's SystemCallFilter") from error
    with contextlib.suppress(OSError):  # before Linux 5.15
        ring.allow_workers(_RING_WORKERS)
    return ring
