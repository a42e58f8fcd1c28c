"""The life of a request, from its arrival to its answer: `begin_read`, `begin_write`, and `_live` for what has to wait.

1. A healthy read or write has no task: `begin_read` and `begin_write` make its first attempt, and what that comes to answers it.
   Where it fails, or must wait before it, one task has the data, the descriptor and the waiting from there to the answer
   (`_live`). Nothing is handed to another one: timer and recovery only wake it.
2. What becomes of it is decided in rehandle.py, in which order in ordering.py. This module keeps time, wakes, and sends
   events to their listeners.
3. What a write, a read and an fsync have to do with the write log stands there, and in `sync`: a write is in it
   before it is answered; a read gets what is in it; an fsync is answered when what was in it is stable (P3).
4. An open(2) may never return (NFS 4, on soft mounts, too). So it is no part of an attempt: it is an `Opening`, which
   requests wait for and leave behind.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import logging
import math
import os
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

import outcome
import trio

from iohang_fuse.engine import Abandoned, Engine, Transfer
from iohang_fuse.events import Event, HangEnded, Op, ReopenRefused
from iohang_fuse.images import Handle, Image, Opening
from iohang_fuse.rehandle import NOTHING, HeldBytes, Policy, Request, State, Step
from iohang_fuse.ring import LARGE_BYTES, Reply
from iohang_fuse.source import NotTheSame
from iohang_fuse.tally import Tally

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine, Iterable

    from iohang_fuse.backing import Backing
    from iohang_fuse.ordering import Fences

T = TypeVar("T")
More: TypeAlias = "Callable[[], Coroutine[Any, Any, T]]"
"""What is left of a request's life, to be called and awaited."""
log = logging.getLogger(__name__)

_FAILURES_OF_THE_DEAD = 2
"""From the second failure on, it may be the descriptor: the next attempt opens the file anew. ESTALE says so itself."""

_OPEN_S = 1.0
"""So long what has an old description waits for an open(2) before it tries that one. An open takes some round trips."""


class Requests:
    """All images of a mount and the requests on them."""

    def __init__(
        self,
        policy: Policy,
        held_limit: int,
        listeners: Iterable[Callable[[Event], None]],
        *,
        write_log: int = 0,
        engine: Engine | None = None,
    ) -> None:
        """*write_log*: bytes per image, 0 for none."""
        self.engine = Engine() if engine is None else engine
        self._policy = policy
        self._held_bytes = HeldBytes(held_limit)
        self._write_log = write_log
        self.tally = Tally(self._sick)
        self._listeners = [self.tally.tell, *listeners]
        # Errors of a write that may be those of an earlier one's writeback: of the storage, or of its space (NFS, ext4).
        self._may_use_up = policy.errors | {errno.ENOSPC, errno.EDQUOT}
        self._nursery: trio.Nursery | None = None
        self._now: Callable[[], float] = (
            trio.current_time
        )  # on the hot path without its two detours, once there is a run
        self._next_handle = 1
        self._fences: dict[int, Fences] = {}  # by node: of images that are closed
        self.images: dict[int, Image] = {}
        self.handles: dict[int, Handle] = {}
        self.holding = True
        self.awake_s = math.inf  # when the loop will have its next look at things: long ago means that it is stuck
        # Both block. See reconnect.py, which may replace them.
        self.settle: Callable[[float], None] = _nothing  # what was sent so long ago is with the storage, or gone
        self.hasten: Callable[[], None] = _nothing  # nothing is to wait for a retransmission
        self.others_wait: Callable[[], bool] = (
            _never  # whether requests come more than one at a time; where there is a ring
        )

    async def serve(self, nursery: trio.Nursery) -> None:
        """Watch for attempts that do not return; timers run in *nursery* while an image is sick. Never returns."""
        self._nursery = nursery
        self._now = trio.lowlevel.current_clock().current_time
        nursery.start_soon(self.engine.serve)
        pause_s = min(1.0, self._policy.blocked_after_s / 4)
        while True:
            self.awake_s = trio.current_time() + pause_s
            await trio.sleep(pause_s)
            now = trio.current_time()
            for image in [*self.images.values()]:
                if image.held.blocked(now):
                    self._tick(image)

    # ---- handles

    def opened(self, node_id: int, name: str, backing: Backing, flags: int) -> Handle:
        """A new handle on the image *node_id*, opened by its consumer with *flags*."""
        image = self.images.get(node_id)
        if image is None:
            image = self.images[node_id] = Image(
                node_id, name, self._policy, self._held_bytes, self._write_log, self.tally
            )
            image.held.holding = self.holding
            image.held.fences = self._fences.pop(node_id, image.held.fences)
        image.no_witness = False  # this one's opener may be able to
        handle = Handle(self._next_handle, image, backing, flags)
        self._next_handle += 1
        image.handles[handle.number] = self.handles[handle.number] = handle
        return handle

    async def released(self, number: int) -> list[Backing]:
        """The handle's last close. Returns what is to be closed now, which blocks, once no attempt is inside the handle."""
        handle = self.handles[number]
        image = handle.image
        if handle.writable:
            await self._make_stable(handle)
        unused = [handle.backing]
        del self.handles[number]
        del image.handles[number]
        if image.witness is not None and not any(other.writable for other in image.handles.values()):
            unused.append(image.witness)
            image.witness = None
        if not image.handles and self.images.get(image.node_id) is image:
            self._apply(image, image.held.closed(trio.current_time()))
            del self.images[image.node_id]
            if image.held.fences:  # what was given up may still land when the image is opened again
                self._fences[image.node_id] = image.held.fences
        while handle.in_use:
            handle.idle = trio.Event()
            await handle.idle.wait()
        return unused

    async def _make_stable(self, handle: Handle) -> None:
        """Before a writer's description goes, what it might still be told of must be known (NFS syncs at close, too)."""
        image = handle.image
        if image.log:
            try:
                await self.sync(handle, data_only=True)
            except OSError as error:
                if not any(other.writable for other in image.handles.values() if other is not handle):
                    log.error(  # noqa: TRY400 - the errno says it all
                        "%s: closed with %d bytes that were acknowledged and are not known to be stable: %s. What is in the image "
                        "may be older than its consumer believes: check it (fsck) before it is used again.",
                        image.held.image, image.log.clear(), error,
                    )  # fmt: skip

    # ---- the life of a request

    async def read(self, handle: Handle, offset: int, size: int) -> bytes:
        """Up to *size* bytes at *offset*. Raises OSError when it was given up or its error is passed on."""
        data = self.read_at_once(handle, offset, size)
        if data is None:
            self.tally.reads += 1
            request, step = handle.image.held.arrive(Op.READ, offset, size, self._now())
            data = await self._go_on_reading(handle, request, step, 0)
        return data

    def read_at_once(self, handle: Handle, offset: int, size: int) -> bytes | None:
        """The same where it takes no time, or None. A large answer is valid until the next call only."""
        image, backing = handle.image, handle.backing
        if (
            backing.reads_cached
            and not backing.failures
            # Of several large ones at once, the kernel's threads can copy one while the loop answers another.
            and not (size > LARGE_BYTES and backing.large_reads_on_ring and (handle.in_use or self.others_wait()))
            and image.held.may_read_at_once(offset, offset + size)
        ):
            cached = backing.read_cached(offset, size)
            if cached is not None:
                written = image.log
                if written.end > offset:
                    cached = written.overlay(offset, size, cached, (), written.end)
                self.tally.reads += 1
                self.tally.bytes_read += len(cached)
                return cached
        return None

    def begin_read(
        self,
        handle: Handle,
        offset: int,
        size: int,
        reply: Reply | None,
        answer: Callable[[bytes | None], object],
        go_on: Callable[[More[bytes]], object],
    ) -> None:
        """Begin a read that takes its time, without a task.

        Now or later, either *answer* is called with the bytes, or with None where the *reply* has been made; or *go_on* with what
        is to be awaited for them: once, on the event loop, where there may be no task.
        """
        image, backing, tally = handle.image, handle.backing, self.tally
        held, written = image.held, image.log
        tally.reads += 1
        request, step = held.arrive(Op.READ, offset, size, self._now())
        try:
            if step is not NOTHING or backing.failures:
                self._apply(image, step)
                go_on(functools.partial(self._go_on_reading, handle, request, NOTHING, 0))
                return
            # Most of them. The storage may have dropped what a failed writeback left in its cache; the log has it.
            before, end_before = written.overlapping(offset, offset + size), written.end
            work = Transfer(backing, offset, size)
            if not before:
                work.reply = reply
        except Exception as error:  # noqa: BLE001 - a bug, for whoever asked
            go_on(functools.partial(self._raise, handle, request, error))
            return

        def landed(data: bytes | None) -> bool:
            self._apply(image, held.succeeded(request, self._now()))
            if request.answer is not None:  # it was given up
                return False
            if data is None:
                tally.bytes_read += size
            else:
                data = written.overlay(offset, size, data, before, end_before)
                tally.bytes_read += len(data)
            answer(data)
            return True

        rest = functools.partial(self._go_on_reading, handle, request, NOTHING, 1)
        self._take_off(handle, request, work, landed, rest, go_on)

    async def _go_on_reading(self, handle: Handle, request: Request, step: Step, begun: int) -> bytes:
        """What is left of a read's life after *step*, and after so many attempts that were begun."""
        offset, size, written = request.offset, request.length, handle.image.log
        work = Transfer(handle.backing, offset, size)

        async def attempt(request: Request) -> bytes:
            before, end_before = written.overlapping(offset, offset + size), written.end
            data = await self._fly(handle, request, work)
            return written.overlay(offset, size, data, before, end_before)  # type: ignore[arg-type]

        data = await self._live(handle, request, step, attempt, begun)
        self.tally.bytes_read += len(data)
        return data

    async def write(self, handle: Handle, offset: int, data: bytes) -> int:
        """Write all of *data* at *offset*. Raises OSError when it was given up or its error is passed on."""
        self.tally.writes += 1
        request, step = handle.image.held.arrive(Op.WRITE, offset, len(data), self._now())
        return await self._go_on_writing(handle, request, step, 0, data)

    def begin_write(
        self,
        handle: Handle,
        offset: int,
        data: bytes,
        answer: Callable[[int], object],
        go_on: Callable[[More[int]], object],
    ) -> None:
        """The same for a write, as `begin_read`: *answer* is called with how many bytes were written, which is all of them."""
        image, backing, size = handle.image, handle.backing, len(data)
        held, end = image.held, offset + size
        self.tally.writes += 1
        request, step = held.arrive(Op.WRITE, offset, size, self._now())
        try:
            if step is not NOTHING or not self._is_plain(image, backing):
                self._apply(image, step)
                go_on(functools.partial(self._go_on_writing, handle, request, NOTHING, 0, data))
                return
            # Most of them. All that `_go_on_writing` does beyond this needs a reason, of which `_is_plain` finds none.
            errors = image.log.errors
            work = Transfer(backing, offset, size, data, image.set_id, end > image.size)
        except Exception as error:  # noqa: BLE001 - a bug, for whoever asked
            go_on(functools.partial(self._raise, handle, request, error))
            return

        def landed(_count: int) -> bool:
            self._written(handle, offset, data, errors)
            self._apply(image, held.succeeded(request, self._now()))
            answer(size)
            return True

        rest = functools.partial(self._go_on_writing, handle, request, NOTHING, 1, data)
        self._take_off(handle, request, work, landed, rest, go_on)

    async def _go_on_writing(self, handle: Handle, request: Request, step: Step, begun: int, data: bytes) -> int:
        """What is left of a write's life after *step*, and after so many attempts that were begun."""
        image, backing, offset, size = handle.image, handle.backing, request.offset, len(data)

        async def attempt(request: Request) -> int:
            needs_witness = image.log.limit and not backing.stable
            if needs_witness and image.witness is None and not image.no_witness:
                await self._have_witness(handle, request)
            errors, witnessed = image.log.errors, image.witness is not None
            work = Transfer(backing, offset, size, data, image.set_id, offset + size > image.size)
            await self._fly_writing(handle, request, offset, offset + size, work)
            if needs_witness and not witnessed:
                image.log.doubt()
            self._written(handle, offset, data, errors)
            return size

        return await self._live(handle, request, step, attempt, begun)

    def _take_off(
        self,
        handle: Handle,
        request: Request,
        work: Transfer,
        landed: Callable[[Any], bool],
        rest: More[Any],
        go_on: Callable[[More[Any]], object],
    ) -> None:
        """Begin a first attempt. *landed* is called with its result; unless that answers the request, *rest* is left to do.

        Every step is applied where it arises: between this and the task that goes on, others change the rehandle list.
        """
        image, backing = handle.image, handle.backing
        held, writes = image.held, work.data is not None

        def tell(result: outcome.Outcome[Any]) -> None:
            request.wake = None
            more = rest
            try:
                if writes:
                    image.writes_no_more(request)
                error = result.error if isinstance(result, outcome.Error) else None
                if type(error) is not Abandoned:  # which goes on: `_late` will tell
                    request.aloft = False
                    handle.returned()
                    if error is None:
                        backing.failures = 0  # of others, meanwhile
                        if landed(result.unwrap()):
                            return
                    elif isinstance(error, OSError):
                        backing.failed(error)
                        self._apply(image, self._failed(image, request, error))
                    else:
                        raise error
            except Exception as bug:  # noqa: BLE001 - for whoever asked
                more = functools.partial(self._raise, handle, request, bug)
            go_on(more)

        handle.in_use += 1
        request.aloft = True
        try:
            if writes:
                image.writes(request, work.offset, work.offset + work.size)
            flight = self.engine.flight(
                work, functools.partial(self._late, handle, request), calm=held.gate_open and not held.sick
            )
            request.wake = flight.abandon
            flight.take_off(tell)
        except Exception as error:  # noqa: BLE001 - it goes where those of the attempt go
            tell(outcome.Error(error))

    async def _raise(self, handle: Handle, request: Request, error: Exception) -> Any:
        self._gone(handle.image, request, 1)
        raise error

    def _is_plain(self, image: Image, backing: Backing) -> bool:
        """Whether a write whose turn has come has nothing to wait for, and nothing to do besides."""
        return not (
            backing.failures
            or backing.serial
            or image.recovering
            or image.held.fences
            or (image.witness is None and image.log.limit and not backing.stable)
        )

    async def _have_witness(self, handle: Handle, request: Request) -> None:
        """Open the witness before the first write; who comes meanwhile waits, or would put the log in doubt.

        Not for that write: it may not return, and others must not wait for it (P4).
        """
        image, backing = handle.image, handle.backing
        await self._revive(handle, request)
        limit_s = self._policy.blocked_after_s
        await self._wait(image, request, lambda: _is_awaited(image.opening, limit_s))
        if image.opening is None and image.witness is None and not image.no_witness:
            try:
                await self._opened(image, request, lambda: image.open_witness(backing, self._policy.errors), limit_s)
            except OSError as error:
                backing.failed(error)
                raise

    def _written(self, handle: Handle, offset: int, data: bytes, errors_before: int) -> None:
        """A write has succeeded, and is about to be acknowledged."""
        image, stable, end = handle.image, handle.backing.stable, offset + len(data)
        self.tally.bytes_written += len(data)
        image.log.add(offset, data, stable=stable, errors_before=errors_before)
        if end > image.size:
            image.wrote(end)
        if stable:
            image.stable_size = max(image.stable_size, end)

    async def truncate(self, handle: Handle, size: int) -> None:
        """Change the image's size through *handle*."""
        await self.resize(handle, size, lambda: handle.backing.truncate(size))

    async def resize(self, handle: Handle, size: int, work: Callable[[], T]) -> T:
        """Run *work*, which changes the image's size to *size*, in its place in the order."""
        image = handle.image

        async def attempt(request: Request) -> T:
            image.resizing(size)
            result = await self._fly_writing(handle, request, size, math.inf, work)
            image.resizing(size)
            image.truncated(size)
            return result

        self.tally.writes += 1
        return await self.run(handle, Op.WRITE, size, 0, attempt, end=math.inf)

    async def sync(self, handle: Handle, *, data_only: bool, own: bool = False) -> None:
        """Make stable what was acknowledged before. Raises OSError when it was given up or its error is passed on.

        *own*: the server's, which nobody waits for, and which waits for no other.
        """
        image = handle.image

        async def attempt(request: Request) -> None:
            # Any sync that begins from now on will do. They come one at a time, or one would use up the other's report.
            wanted = image.syncs + 1
            await self._wait(image, request, lambda: image.sync_in_flight and image.synced[data_only] < wanted)
            if image.synced[data_only] >= wanted:
                return
            image.sync_in_flight = True
            image.syncs = number = image.syncs + 1
            try:
                await self._sync(handle, request, data_only=data_only)
                image.synced[True] = number
                if not data_only:
                    image.synced[False] = number
            finally:
                image.sync_in_flight = False
                image.bystanders.unpark_all()

        self.tally.fsyncs += not own
        await self.run(handle, Op.FSYNC, 0, 0, attempt, ordered=not own, own=own)

    async def _sync(self, handle: Handle, request: Request, *, data_only: bool) -> None:
        image, log_ = handle.image, handle.image.log
        if log_.in_doubt:
            await self._recover(handle, request, data_only=data_only)
            return
        mark, resizes = log_.mark(), image.resizes
        backing = image.to_sync(handle)
        if backing is None:
            return
        others = image.writers(backing)
        if any(_on_two_mounts(other, backing) for other in others):
            image.doubt()  # SOURCE was mounted anew, and some were opened anew there, and some not
            await self._recover(handle, request, data_only=data_only)
            return

        def work() -> int:
            for other in others:
                if other.apart and other.unsynced:
                    other.sync(data_only=data_only)
            return backing.sync(data_only=data_only)

        size = await self._attempt(handle, request, work)
        image.made_stable(mark, resizes, size)

    async def _recover(self, handle: Handle, request: Request, *, data_only: bool) -> None:
        """A sync, after a report of a failed writeback may have been used up: open anew, write the log again, sync.

        What is written again and synced on one description is stable, whichever that is. But one that is replaced later may miss
        a report: as long as that is to come the log stays in doubt, and each sync is one of these.
        """
        image = handle.image
        settled = await self._open_all(handle, request)
        image.recovering = True  # from here on, a write that overlaps the log waits
        try:
            await self._wait(
                image, request, lambda: any(image.log.overlapping(*bytes_) for bytes_ in image.writing.values())
            )
            doubts, mark, resizes = image.log.doubts, image.log.mark(), image.resizes
            writes = image.log.to_rewrite()
            backing = image.to_sync(handle)
            if backing is None:
                return
            others = image.writers(backing)
            began_s, fenced = trio.current_time(), bool(image.held.fences)

            def work() -> int:
                if fenced:
                    self._ask(backing)
                self.settle(0)  # what the page cache has sent, and not got rid of
                if any(_on_two_mounts(other, backing) for other in others):
                    raise OSError(errno.ESTALE, "open on two mounts: one cannot be opened anew where the other one is")
                return backing.rewrite(writes, data_only=data_only)

            image.log.unsettle()
            try:
                size = await self._attempt(handle, request, work)
            finally:
                image.log.unsettle()
            image.held.fences.lift(began_s)
            if settled:
                image.log.trust(doubts)
            if image.log.seq != mark:
                image.log.doubt()  # it may have landed, and been lost, before the new description was open
            image.made_stable(mark, resizes, size)
        finally:
            image.recovering = False
            image.bystanders.unpark_all()
        log.debug("%s: %d writes were written again, and synced", image.held.image, len(writes))

    async def _open_all(self, handle: Handle, request: Request) -> bool:
        """Open anew all through which the image may be written, and what a sync uses, if any has failed.

        Returns whether that is over. It is not waited for long, because the old ones may work: in a server's grace period, for
        example, in which NFS 4 opens nothing.
        """
        image = handle.image
        backing = image.to_sync(handle)
        if backing is not None and image.worn and image.opening is None:
            renew = self._renewal(image, *image.writers(backing), backing)

            def renew_all() -> OSError | None:
                refusal = renew()
                image.worn = refusal is not None  # what has failed meanwhile were the old ones
                return refusal

            await self._opened(image, request, renew_all, _OPEN_S)
        await self._wait(image, request, lambda: _is_awaited(image.opening, _OPEN_S))
        return image.opening is None

    async def _wait(self, image: Image, request: Request, obstacle: Callable[[], bool]) -> None:
        """Wait inside an attempt, before its system call, while there is an *obstacle*; until its deadline at most."""
        while obstacle():
            if image.held.sick:
                image.held.limit_wait(request, trio.current_time())
            if request.deadline_s is not None and trio.current_time() >= request.deadline_s:
                raise self._last_error(image, request)
            with trio.move_on_after(1):  # the deadline may be set, or an operator move it, while this waits
                await image.bystanders.park()

    def _last_error(self, image: Image, request: Request) -> OSError:
        """For an attempt that comes to its end before its system call."""
        number = request.errno or image.held.errno or errno.EIO
        number = number if number in self._policy.errors else min(self._policy.errors)
        return OSError(number, os.strerror(number))

    async def run(
        self,
        handle: Handle,
        op: Op,
        offset: int,
        length: int,
        attempt: Callable[[Request], Awaitable[T]],
        *,
        end: float | None = None,
        ordered: bool = True,
        own: bool = False,
    ) -> T:
        """Answer one request: the result of *attempt*, or OSError when it was given up or its error is passed on."""
        request, step = handle.image.held.arrive(op, offset, length, self._now(), end=end, ordered=ordered)
        request.own = own
        return await self._live(handle, request, step, attempt)

    async def _live(
        self,
        handle: Handle,
        request: Request,
        step: Step,
        attempt: Callable[[Request], Awaitable[T]],
        begun: int = 0,
    ) -> T:
        """What is left of a request's life after *step*. *begun*: attempts; `request.attempts` counts those whose turn has come."""
        image = handle.image
        held = image.held
        try:
            while True:
                self._apply(image, step)
                if request.state is State.WAITING:
                    await self._next_state(request)
                if request.answer is not None:
                    raise OSError(request.answer, os.strerror(request.answer))
                begun += 1
                self.tally.retries += begun > 1
                try:
                    result = await attempt(request)
                except Abandoned:
                    step = Step()
                except OSError as error:
                    step = self._failed(image, request, error)
                else:
                    if begun > 1:
                        log.debug(
                            "%s: %s of %d bytes at %d, attempt %d: done", image.held.image, request.op, request.length,
                            request.offset, request.attempts,
                        )  # fmt: skip
                    step = held.succeeded(request, self._now())
                    if request.answer is None:
                        self._apply(image, step)
                        return result
        except BaseException:
            self._gone(image, request, begun)
            raise

    def _failed(self, image: Image, request: Request, error: OSError) -> Step:
        """An attempt has."""
        op = request.op
        log.debug(
            "%s: %s of %d bytes at %d, attempt %d: %s",
            image.held.image, op, request.length, request.offset, request.attempts, error,
        )  # fmt: skip
        if op is Op.FSYNC or (op is Op.WRITE and error.errno in self._may_use_up):
            image.doubt()
        number = error.errno or errno.EIO
        self.tally.failed(image.held.image, op, number)
        return image.held.failed(request, number, trio.current_time())

    def _gone(self, image: Image, request: Request, begun: int) -> None:
        """The answer, a bug, or the end of the server.

        An attempt in its thread reports itself; one whose turn came and that was not begun (its read was given up before this task
        ran again) does not.
        """
        returned = request.attempts > begun or (request.state is State.TRYING and not request.aloft)
        self._apply(image, image.held.cancelled(request, trio.current_time(), returned=returned))

    async def _fly_writing(self, handle: Handle, request: Request, start: int, end: float, work: Callable[[], T]) -> T:
        """`_fly` for what changes these bytes: not while they are written again from the log, nor before the storage answers."""
        image, backing = handle.image, handle.backing
        if image.recovering or backing.serial:
            await self._wait(
                image,
                request,
                lambda: (
                    (image.recovering and bool(image.log.overlapping(start, end))) or (backing.serial and backing.busy)
                ),
            )
        image.writes(request, start, end)
        backing.busy = True
        try:
            if not (backing.failures or image.held.fences or request.uncertain):  # most of them: what `_fly` does then
                try:
                    result = await self._attempt(handle, request, work)
                except OSError as error:
                    backing.failed(error)
                    raise
                backing.failures = 0  # of others, meanwhile
                return result
            fenced, failed_s = image.held.fences.stand(start, end), request.failed_s if request.uncertain else None

            def alone() -> T:
                if fenced:
                    self._ask(backing)
                elif failed_s is not None:
                    # That attempt may still be under way, and land after a younger write.
                    self.settle(self._now() - failed_s)
                return work()

            result = await self._fly(handle, request, alone)
            if fenced:
                image.held.fences.lift(request.started_s)
            return result
        finally:
            backing.busy = False  # where it means something, nobody else is in it
            image.writes_no_more(request)

    async def _fly(self, handle: Handle, request: Request, work: Callable[[], T]) -> T:
        """Have *work* done; where *handle* seems to be dead, on a backing file that is opened anew."""
        backing = handle.backing
        if backing.failures:
            await self._revive(handle, request)
        try:
            result = await self._attempt(handle, request, work)
        except OSError as error:
            backing.failed(error)
            raise
        backing.failures = 0
        return result

    def _ask(self, backing: Backing) -> None:
        """In a thread, before what may not be overtaken by what was given up (P5). Raises OSError unless the storage answers."""
        backing.ask()
        self.settle(0)  # the answer may have come on one connection, and what was given up wait in another one

    # ---- open(2), which may never return

    async def _revive(self, handle: Handle, request: Request) -> None:
        """Have the file opened anew where *handle* has failed often enough and that was not just tried, nor is under way."""
        image, backing = handle.image, handle.backing
        enough = 1 if backing.errno == errno.ESTALE else _FAILURES_OF_THE_DEAD
        tried_s = trio.current_time() - backing.renewed_s
        if backing.failures >= enough and tried_s >= self._policy.interval_s / 2 and image.opening is None:
            await self._opened(image, request, self._renewal(image, backing), _OPEN_S)

    async def _opened(self, image: Image, request: Request, work: Callable[[], OSError | None], limit_s: float) -> None:
        """Have *work* open the image's file, and wait so long for it."""
        opening = self._open(image, work)
        await self._wait(image, request, lambda: _is_awaited(opening, limit_s))
        if opening.error is not None:
            raise opening.error

    def _open(self, image: Image, work: Callable[[], OSError | None]) -> Opening:
        """Begin *work*, which opens the image's file, or says why not. No other may be under way."""
        assert image.opening is None
        assert self._nursery is not None
        opening = image.opening = Opening(trio.current_time())
        self._nursery.start_soon(self._see_it_open, image, opening, work, name=f"open of {image.held.image}")
        return opening

    async def _see_it_open(self, image: Image, opening: Opening, work: Callable[[], OSError | None]) -> None:
        try:
            self._report_refusal(image, await self.engine.flight(work, lambda: None).land())
        except OSError as error:
            opening.error = error
        except Exception as error:  # who waited for it may have gone
            log.exception("%s: a bug in opening it anew; the mount stays", image.held.image)
            opening.error = error
        finally:
            image.opening = None
            opening.over.set()
            image.bystanders.unpark_all()
        if image.witness is not None and not any(handle.writable for handle in image.handles.values()):
            late, image.witness = image.witness, None  # the last writer has gone in the meantime
            with contextlib.suppress(OSError):
                await self.engine.flight(late.close, lambda: None).land()

    def _renewal(self, image: Image, *backings: Backing) -> Callable[[], OSError | None]:
        """What opens them anew, in a thread. Where that cannot be, the old description is tried again; returns why."""
        where = image.where(image.stable_size)._replace(samples=tuple(image.samples)) if image.where else None
        owner = image.renewals + 1
        for backing in backings:
            backing.renewed_s = trio.current_time()

        def renew() -> OSError | None:
            refusal = None
            for backing in backings:
                try:
                    if where is not None:
                        backing.renew(where, owner)
                        image.renewals = owner
                except OSError as error:
                    refusal = error
            return refusal

        return renew

    def _report_refusal(self, image: Image, refusal: OSError | None) -> None:
        if refusal is None or (refusal.errno in self._policy.errors and not isinstance(refusal, NotTheSame)):
            return  # that the storage fails, everybody knows by now
        text = refusal.strerror or str(refusal)
        if text != image.refusal:
            image.refusal = text
            self._tell(image, ReopenRefused(image.held.image, text, trio.current_time()))

    async def _attempt(self, handle: Handle, request: Request, work: Callable[[], T]) -> T:
        held = handle.image.held
        flight = self.engine.flight(
            work, functools.partial(self._late, handle, request), calm=held.gate_open and not held.sick
        )
        request.wake = flight.abandon
        handle.in_use += 1
        request.aloft = True
        try:
            result = await flight.land()
        except (Abandoned, trio.Cancelled):
            raise  # it goes on: `_late` will tell
        except Exception:
            request.aloft = False
            handle.returned()
            raise
        finally:
            request.wake = None  # the rehandle list may remember the request for a while, but not its data
        request.aloft = False
        handle.returned()
        return result

    def _late(self, handle: Handle, request: Request) -> None:
        """An attempt has returned that nobody waits for any more."""
        request.aloft = False
        handle.returned()
        self._apply(handle.image, handle.image.held.returned(trio.current_time()))

    async def _next_state(self, request: Request) -> None:
        task = trio.lowlevel.current_task()

        def wake() -> None:
            request.wake = None
            trio.lowlevel.reschedule(task)

        def abort(_raise_cancel: object) -> trio.lowlevel.Abort:
            request.wake = None
            return trio.lowlevel.Abort.SUCCEEDED

        request.wake = wake
        await trio.lowlevel.wait_task_rescheduled(abort)
        await trio.lowlevel.checkpoint_if_cancelled()  # no attempt goes out after the end of the server

    # ---- time and operators

    def writes_in_flight(self) -> dict[str, int]:
        """By image, how many attempts of writes and fsyncs are inside a system call."""
        found = {
            image.held.image: sum(request.op is not Op.READ for request in image.held.trying)
            for image in self.images.values()
        }
        return {name: count for name, count in found.items() if count}

    def listen(self, listener: Callable[[Event], None]) -> None:
        """Tell *listener*, too, of what happens to images."""
        self._listeners.append(listener)

    def _sick(self) -> set[str]:
        return {image.held.image for image in self.images.values() if image.held.sick}

    @property
    def policy(self) -> Policy:
        """For images that are opened from now on."""
        return self._policy

    @property
    def held_bytes(self) -> int:
        """What is held in all, against `held_limit`."""
        return self._held_bytes.held

    @property
    def held_limit(self) -> int:
        """Of `held_bytes`."""
        return self._held_bytes.limit

    def retry(self, image: Image) -> None:
        """Try what is held now."""
        self._apply(image, image.held.retry(trio.current_time()))

    def hasten_soon(self) -> None:
        """An operator wants an answer now: nothing is to wait for the next retransmission."""
        if self._nursery is not None:
            self._nursery.start_soon(self._hasten, name="hasten")

    async def _hasten(self) -> None:
        try:
            await trio.to_thread.run_sync(self.hasten, abandon_on_cancel=True)
        except Exception as error:  # noqa: BLE001 - no thread to be had, for example; it is tried again anyway
            log.debug("what waits for a retransmission waits: %s", error)

    def drain(self, image: Image) -> None:
        """An operator: try what is held now, and if that fails answer it with its error."""
        self._apply(image, image.held.drain(trio.current_time()))

    def fail(self, image: Image) -> None:
        """An operator: answer what is held, now; writes inside a system call once they return (P5)."""
        self._apply(image, image.held.end(trio.current_time()))

    def set_holding(self, image: Image, *, on: bool) -> None:
        """An operator: whether failures are held from now on."""
        image.held.holding = on
        self._apply(image, image.held.tick(trio.current_time()))

    def set_policy(self, image: Image, policy: Policy) -> None:
        """An operator: other timeouts, or another interval."""
        self._apply(image, image.held.set_policy(policy, trio.current_time()))

    def set_policy_of_new_images(self, policy: Policy) -> None:
        """An operator: for those that are opened from now on."""
        self._policy = policy

    def hold_no_more(self) -> None:
        """The end of the server: answer what is held, and pass every later error on."""
        self.holding = False
        for image in [*self.images.values()]:
            image.held.holding = False
            self._apply(image, image.held.end(trio.current_time()))

    def _apply(self, image: Image, step: Step) -> None:
        """Do what a decision says: tell the listeners, wake the requests, set the timer, send the probe."""
        held, log_ = image.held, image.log
        if step is NOTHING and held.room and log_.bytes * 2 <= log_.limit and image.timer is None and not held.sick:
            return  # most of them, on a healthy image
        if log_.full == held.room:
            more = image.held.set_room(trio.current_time(), room=not image.log.full)
            step = Step([*step.events, *more.events], [*step.woken, *more.woken], step.probe)
        if step is not NOTHING:
            self._tell_and_wake(image, step)
        if image.held.sick and self._nursery is not None:
            if image.timer is None:
                image.timer = trio.CancelScope()
                self._nursery.start_soon(self._keep_time, image, image.timer, name=f"timer of {image.held.image}")
                for asked in image.questions:
                    asked.set()
            image.timer.deadline = image.held.next_tick_s
        elif image.timer is not None:
            image.timer.cancel()
            image.timer = None
        if image.log.sync_is_due and not (image.syncing or image.held.timed_out) and self._nursery is not None:
            image.syncing = True
            self._nursery.start_soon(self._sync_by_itself, image, name=f"sync of {image.held.image}")

    def _tell_and_wake(self, image: Image, step: Step) -> None:
        for event in step.events:
            self._tell(image, event)
        for request in step.woken:
            if request.wake is not None:
                request.wake()
        if step.probe and self._nursery is not None:
            self._nursery.start_soon(self._probe, image, name=f"probe of {image.held.image}")

    def _tell(self, image: Image, event: Event) -> None:
        if isinstance(event, HangEnded):
            image.refusal = ""
        for listener in self._listeners:
            try:
                listener(event)
            except Exception:  # whoever looks on must not keep a request from being woken
                log.exception("%s: a listener failed at %s", image.held.image, event)

    async def _sync_by_itself(self, image: Image) -> None:
        """The write log is half full. Consumers wait for this only where it is full."""
        try:
            # Not in order: a write before it in line may be waiting for the room that this makes.
            await self.sync(next(iter(image.handles.values())), data_only=True, own=True)
        except Exception as error:  # noqa: BLE001 - a sync that nobody asked for has nobody to tell; the log keeps all
            log.debug("%s: the server's own sync: %s", image.held.image, error)
            image.log.mark()  # a block that was written before the sync and since then counts once
            if image.log.full and not (image.held.sick and image.held.holding):
                # A full disk, for example, or nothing is held any more: no outage to wait for the end of.
                number = getattr(error, "errno", None) or errno.EIO
                self._apply(image, image.held.no_room(number, trio.current_time()))
            await trio.sleep(self._policy.interval_s)
        image.syncing = False
        self._apply(image, Step())

    async def _keep_time(self, image: Image, scope: trio.CancelScope) -> None:
        """The timer of one sick image. `_apply` moves its deadline, and replaces or ends it."""
        while image.timer is scope:
            with scope:
                await trio.sleep_forever()
            if image.timer is scope:
                # Should the tick fail, the next one is an interval away.
                image.timer = scope = trio.CancelScope(deadline=trio.current_time() + self._policy.interval_s)
                self._tick(image)

    def _tick(self, image: Image) -> None:
        try:
            self._apply(image, image.held.tick(trio.current_time()))
        except Exception:  # a bug costs the hanging image its timer's turn, not every image the mount (P11)
            log.exception("%s: a bug in the timer; the mount stays", image.held.image)

    async def _probe(self, image: Image) -> None:
        """Read a little where the image last failed: a timed-out image without requests would never be seen to work again."""
        started_s = trio.current_time()
        success = False
        handle = max(image.handles.values(), key=lambda h: h.readable, default=None)
        if handle is None:  # what was given up had outlived the last close
            self._apply(image, image.held.closed(started_s))
        else:
            backing, offset, readable = handle.backing, image.held.offset, handle.readable

            def work() -> object:
                backing.ask()  # what follows may be answered by the page cache
                return backing.read(offset, 512) if readable else backing.sync(data_only=True)

            # All its descriptors may be dead, and whoever comes is answered without a second attempt.
            opening = image.opening or self._open(image, self._renewal(image, backing))
            handle.in_use += 1
            with trio.move_on_at(opening.began_s + self._policy.blocked_after_s):
                await opening.over.wait()
            try:
                await self.engine.flight(work, handle.returned).land()
            except Exception as error:  # noqa: BLE001 - whatever it is, it is no sign that the image works
                image.doubt()
                if isinstance(error, OSError):
                    self.tally.failed(image.held.image, Op.READ if readable else Op.FSYNC, error.errno or errno.EIO)
                log.debug("%s: probe at %d: %s", image.held.image, offset, error)
            else:
                success = True
            handle.returned()
            if success and image.held.unsynced:
                success = await self._probe_by_sync(image, handle)
        self._apply(image, image.held.probed(started_s, trio.current_time(), success=success))

    async def _probe_by_sync(self, image: Image, handle: Handle) -> bool:
        """What a sync could not make stable is written again, and synced: the page cache answers everything else."""
        try:
            await self.sync(handle, data_only=True, own=True)
        except Exception as error:  # noqa: BLE001 - whatever it is, it is no sign that the image works (P11)
            log.debug("%s: probe by sync: %s", image.held.image, error)
            return False
        return True


def _is_awaited(opening: Opening | None, limit_s: float) -> bool:
    return opening is not None and not opening.over.is_set() and trio.current_time() < opening.began_s + limit_s


def _never() -> bool:
    return False


def _nothing(_ago_s: float = 0) -> None:
    return


def _on_two_mounts(one: Backing, other: Backing) -> bool:
    return one.device != other.device and bool(one.device and other.device)
