"""The life of a request, from its arrival to its answer, top to bottom in `Requests.run`.

1. The data, the descriptor and the waiting live in the coroutine that pyfuse3 started for the request. Nothing is handed
   to another task: timer and recovery only wake it.
2. What becomes of it is decided in rehandle.py. This module keeps time, wakes, and sends events to their listeners.
3. An image is an open inode of SOURCE, whichever handles are open on it. It exists from the first open to the last close.
"""

from __future__ import annotations

import errno
import logging
import os
from typing import TYPE_CHECKING, TypeVar

import trio

from iohang_fuse.engine import Abandoned, Backing, Flight
from iohang_fuse.events import Event, Op
from iohang_fuse.rehandle import HeldBytes, Policy, RehandleList, Request, State, Step

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

T = TypeVar("T")
log = logging.getLogger(__name__)


class Image:
    """One open inode: its handles, its rehandle list, and its attributes as last seen."""

    def __init__(self, node_id: int, name: str, policy: Policy, held_bytes: HeldBytes) -> None:
        self.node_id = node_id
        self.held = RehandleList(name, policy, held_bytes)
        self.handles: dict[int, Handle] = {}
        self.capability: bytes | int | None = None  # security.capability, or the errno it gave; None: not yet asked
        self._stat: os.stat_result | None = None
        self._end = 0  # the end of the furthest write since those attributes were read
        self.timer: trio.CancelScope | None = None  # of the task that calls `tick`, while the image is sick

    def saw(self, attributes: os.stat_result) -> None:
        """Remember attributes that SOURCE has just given."""
        self._stat = attributes

    def wrote(self, end: int) -> None:
        """A write up to *end* has succeeded."""
        self._end = max(self._end, end)

    def truncated(self, size: int) -> None:
        """The size was changed."""
        self._end = size
        if self._stat is not None and self._stat.st_size > size:
            self._stat = None

    def remembered(self) -> tuple[os.stat_result, int] | None:
        """Attributes from memory and the size with them, for `stat` while the image hangs."""
        return None if self._stat is None else (self._stat, max(self._stat.st_size, self._end))


class Handle:
    """One open of an image. Its backing descriptors live until the last attempt on them has returned."""

    def __init__(self, number: int, image: Image, backing: Backing, flags: int) -> None:
        self.number = number
        self.image = image
        self.backing = backing
        self.direct = bool(flags & os.O_DIRECT)  # as the consumer opened it
        self.readable = flags & os.O_ACCMODE != os.O_WRONLY
        self.in_use = 0
        self.idle = trio.Event()

    def returned(self) -> None:
        """An attempt on this handle has returned."""
        self.in_use -= 1
        if self.in_use == 0:
            self.idle.set()


class Requests:
    """All images of a mount and the requests on them."""

    def __init__(self, policy: Policy, held_limit: int, listeners: Iterable[Callable[[Event], None]]) -> None:
        self._policy = policy
        self._held_bytes = HeldBytes(held_limit)
        self._listeners = [*listeners]
        self._nursery: trio.Nursery | None = None
        self._next_handle = 1
        self.images: dict[int, Image] = {}
        self.handles: dict[int, Handle] = {}
        self.holding = True

    async def serve(self, nursery: trio.Nursery) -> None:
        """Watch for attempts that do not return; timers run in *nursery* while an image is sick. Never returns."""
        self._nursery = nursery
        pause_s = min(1.0, self._policy.blocked_after_s / 4)
        while True:
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
            image = self.images[node_id] = Image(node_id, name, self._policy, self._held_bytes)
            image.held.holding = self.holding
        handle = Handle(self._next_handle, image, backing, flags)
        self._next_handle += 1
        image.handles[handle.number] = self.handles[handle.number] = handle
        return handle

    async def released(self, number: int) -> Backing:
        """The handle's last close. Returns its backing file once no attempt is inside it; closing blocks, so it is the caller's."""
        handle = self.handles.pop(number)
        image = handle.image
        del image.handles[number]
        if not image.handles and self.images.get(image.node_id) is image:
            self._apply(image, image.held.closed(trio.current_time()))
            del self.images[image.node_id]
        while handle.in_use:
            handle.idle = trio.Event()
            await handle.idle.wait()
        return handle.backing

    # ---- the life of a request

    async def run(self, handle: Handle, op: Op, offset: int, length: int, attempt: Callable[[], T]) -> T:
        """Answer one request: the result of *attempt*, or OSError when it was given up or its error is passed on."""
        image = handle.image
        held = image.held
        sent = 0  # attempts that were sent out; `request.attempts` counts those whose turn has come
        request, step = held.arrive(op, offset, length, trio.current_time())
        try:
            while True:
                self._apply(image, step)
                if request.state is State.WAITING:
                    await self._next_state(request)
                if request.answer is not None:
                    raise OSError(request.answer, os.strerror(request.answer))
                sent += 1
                try:
                    result = await self._attempt(handle, request, attempt)
                except Abandoned:
                    step = Step()
                except OSError as error:
                    log.debug(
                        "%s: %s of %d bytes at %d, attempt %d: %s",
                        held.image, op, length, offset, request.attempts, error,
                    )  # fmt: skip
                    step = held.failed(request, error.errno or errno.EIO, trio.current_time())
                else:
                    step = held.succeeded(request, trio.current_time())
                    if request.answer is None:
                        self._apply(image, step)
                        return result
        except BaseException:
            # The answer, a bug, or the end of the server. An attempt in its thread reports itself; one whose turn came and
            # that was not sent out (its read was given up before this task ran again) does not.
            self._apply(image, held.cancelled(request, trio.current_time(), returned=request.attempts > sent))
            raise

    async def _attempt(self, handle: Handle, request: Request, attempt: Callable[[], T]) -> T:
        image = handle.image

        def late() -> None:
            handle.returned()
            self._apply(image, image.held.returned(trio.current_time()))

        flight = Flight(attempt, late)
        request.wake = flight.abandon
        handle.in_use += 1
        try:
            result = await flight.land()
        except (Abandoned, trio.Cancelled):
            raise  # the thread goes on: `late` will tell
        except OSError:
            handle.returned()
            raise
        except Exception:  # a bug: this request's end, and no other's (P11)
            handle.returned()
            self._apply(image, image.held.cancelled(request, trio.current_time(), returned=True))
            raise
        finally:
            request.wake = None  # the rehandle list may remember the request for a while, but not its data
        handle.returned()
        return result

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

    def hold_no_more(self) -> None:
        """The end of the server: answer what is held, and pass every later error on."""
        self.holding = False
        for image in [*self.images.values()]:
            image.held.holding = False
            self._apply(image, image.held.end(trio.current_time()))

    def _apply(self, image: Image, step: Step) -> None:
        """Do what a decision says: tell the listeners, wake the requests, set the timer, send the probe."""
        for event in step.events:
            for listener in self._listeners:
                try:
                    listener(event)
                except Exception:  # whoever looks on must not keep a request from being woken
                    log.exception("%s: a listener failed at %s", image.held.image, event)
        for request in step.woken:
            if request.wake is not None:
                request.wake()
        if image.held.sick and self._nursery is not None:
            if image.timer is None:
                image.timer = trio.CancelScope()
                self._nursery.start_soon(self._keep_time, image, image.timer, name=f"timer of {image.held.image}")
            image.timer.deadline = image.held.next_tick_s
        elif image.timer is not None:
            image.timer.cancel()
            image.timer = None
        if step.probe and self._nursery is not None:
            self._nursery.start_soon(self._probe, image, name=f"probe of {image.held.image}")

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
        if handle is not None:
            backing, offset = handle.backing, image.held.offset
            handle.in_use += 1
            try:
                if handle.readable:
                    await Flight(lambda: backing.read(offset, 512), handle.returned).land()
                else:
                    await Flight(lambda: backing.sync(data_only=True), handle.returned).land()
            except Exception as error:  # noqa: BLE001 - whatever it is, it is no sign that the image works
                log.debug("%s: probe at %d: %s", image.held.image, offset, error)
            else:
                success = True
            handle.returned()
        self._apply(image, image.held.probed(started_s, trio.current_time(), success=success))
