"""In place of threads: a `Flight` on trio's own clock, because the autojump clock does not wait for threads.

It has the interface and the manners of `iohang_fuse.engine.Flight`; test_engine.py holds both to the same contract.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Generic, TypeVar

import outcome
import trio

from iohang_fuse.backing import Backing
from iohang_fuse.engine import Abandoned
from iohang_fuse.events import Op
from iohang_fuse.images import Handle
from iohang_fuse.requests import Requests
from iohang_fuse.source import SERVER, Opened

if TYPE_CHECKING:
    from collections.abc import Callable

    from iohang_fuse.events import Event
    from iohang_fuse.rehandle import Policy, RehandleList
    from iohang_fuse.requests import More
    from iohang_fuse.ring import Reply

T = TypeVar("T")


@dataclass
class Sky:
    """Where fake flights fly: how long the next attempt takes, and who is up. *nursery* keeps those that nobody awaits."""

    nursery: trio.Nursery
    name: str = "sky"
    takes_s: Callable[[], float] = lambda: 0.0
    aloft: int = 0
    most_aloft: int = 0
    launched: list[float] = field(default_factory=list)
    calm: list[bool] = field(default_factory=list)  # by launch: whether nothing was the matter with the image
    after_landing: Callable[[], None] = lambda: None  # before the task that awaited the flight runs again

    def flight(self, work: Callable[[], T], on_late_return: Callable[[], None], *, calm: bool = False) -> FakeFlight[T]:
        """What `Engine.flight` is to the shell: a `Sky` is its engine."""
        self.calm.append(calm)
        return FakeFlight(self, work, on_late_return)

    async def serve(self) -> None:
        """Flights bring themselves back."""

    async def fly(self) -> None:
        """How a flight passes its time; a test's own sky may wait for something else than the clock."""
        await trio.sleep(self.takes_s())


class FakeFlight(Generic[T]):
    """One attempt: *work* is called when it lands."""

    def __init__(self, sky: Sky, work: Callable[[], T], on_late_return: Callable[[], None]) -> None:
        self._sky = sky
        self._work = work
        self._on_late_return = on_late_return
        self._tell: Callable[[outcome.Outcome[T]], object] | None = None

    async def land(self) -> T:
        """Raises what *work* raised, or `Abandoned`."""
        self.take_off(functools.partial(trio.lowlevel.reschedule, trio.lowlevel.current_task()))
        result: T = await trio.lowlevel.wait_task_rescheduled(self._abort)
        return result

    def take_off(self, tell: Callable[[outcome.Outcome[T]], object]) -> None:
        """The same without a coroutine."""
        self._tell = tell
        self._sky.nursery.start_soon(self._fly)

    def abandon(self) -> None:
        """Tell whoever waits `Abandoned`; the flight goes on, and its result is dropped."""
        if self._tell is not None:
            tell, self._tell = self._tell, None
            tell(outcome.Error(Abandoned()))

    async def _fly(self) -> None:
        sky = self._sky
        sky.launched.append(trio.current_time())
        sky.aloft += 1
        sky.most_aloft = max(sky.most_aloft, sky.aloft)
        await sky.fly()
        sky.aloft -= 1
        result = outcome.capture(self._work)
        if self._tell is None:
            self._on_late_return()
        else:
            tell, self._tell = self._tell, None
            tell(result)
        sky.after_landing()

    def _abort(self, _raise_cancel: object) -> trio.lowlevel.Abort:
        self._tell = None
        return trio.lowlevel.Abort.SUCCEEDED


@dataclass
class Storage:
    """A scripted file: fails while *errno* is set, remembers what reached it."""

    errno: int = 0
    reached: list[object] = field(default_factory=list)
    attempts: int = 0

    def attempt(self, tag: object = None) -> Callable[[], object]:
        """What a handler passes to `Requests.run`; its result is *tag*."""

        def work() -> object:
            self.attempts += 1
            if self.errno:
                raise OSError(self.errno, "scripted")
            self.reached.append(tag)
            return tag

        return work


class FakeBacking(Backing):
    """A backing file for the probe, on a `Storage`."""

    def __init__(self, storage: Storage) -> None:
        super().__init__(Opened(-1, 0, stable=True), SERVER)
        self.storage = storage
        self.syncs = 0

    def read(self, offset: int, size: int) -> bytes:
        """A probe of a readable handle."""
        self.storage.attempt(("probe", offset))()
        return b"\0" * size

    def sync(self, *, data_only: bool) -> int:
        """A probe of a write-only handle."""
        assert data_only
        self.syncs += 1
        self.storage.attempt("sync")()
        return 0

    def rewrite(self, writes: object, *, data_only: bool) -> int:  # noqa: ARG002 - nothing is in the log
        """A probe after a sync that has failed."""
        return self.sync(data_only=data_only)

    def ask(self) -> None:
        """The storage is there; what it does with data is another matter."""

    def close(self) -> None:
        """Nothing to close."""


class BegunRequests(Requests):
    """Whose reads and writes begin without a task, as the receiver's do, and are awaited."""

    async def read(self, handle: Handle, offset: int, size: int) -> bytes:
        """As `Requests.read`."""
        data = self.read_at_once(handle, offset, size)
        if data is None:
            data = await self.read_later(handle, offset, size)
        assert data is not None  # without a reply
        return data

    async def read_later(self, handle: Handle, offset: int, size: int, reply: Reply | None = None) -> bytes | None:
        """None: the *reply* has been made."""
        return await _begun(functools.partial(self.begin_read, handle, offset, size, reply))

    async def write(self, handle: Handle, offset: int, data: bytes) -> int:
        """As `Requests.write`."""
        return await _begun(functools.partial(self.begin_write, handle, offset, data))


async def _begun(begin: Callable[[Callable[[T], object], Callable[[More[T]], object]], None]) -> T:
    told: list[tuple[bool, object]] = []
    has_landed = trio.Event()

    def tell(is_answer: bool, what: object) -> None:  # noqa: FBT001
        assert not told, "told twice"
        told.append((is_answer, what))
        has_landed.set()

    begin(functools.partial(tell, True), functools.partial(tell, False))  # noqa: FBT003
    if not told:
        await has_landed.wait()
    ((is_answer, what),) = told
    return what if is_answer else await what()  # type: ignore[return-value, operator]


@dataclass
class Shell:
    """`Requests` with one image, on a `Sky`."""

    requests: Requests
    handle: Handle
    storage: Storage
    sky: Sky
    events: list[Event]
    sent: int = 0

    @property
    def held(self) -> RehandleList:
        """The image's rehandle list."""
        return self.handle.image.held

    async def run(
        self, op: Op = Op.WRITE, tag: object = None, *, offset: int | None = None, length: int = 4096
    ) -> object:
        """One request on the scripted file. It overlaps no other, and waits for none, unless *offset* says so."""
        self.sent += 1
        at = self.sent << 20 if offset is None else offset
        return await self.life(self.handle, op, self.storage.attempt(tag), at, length)

    async def life(
        self, handle: Handle, op: Op, work: Callable[[], object], offset: int = 0, length: int = 512
    ) -> object:
        """One request on *handle*, of which each attempt is *work*."""
        return await self.requests.run(
            handle,
            op,
            offset,
            length,
            lambda request: self.requests._fly(handle, request, work),
            ordered=op is not Op.FSYNC,
        )

    async def answer(self, op: Op = Op.WRITE, tag: object = None) -> tuple[float, int]:
        """When a request was answered, and with what: 0 or an errno."""
        try:
            await self.run(op, tag)
        except OSError as error:
            return trio.current_time(), error.errno or -1
        return trio.current_time(), 0

    def send(self, count: int, op: Op = Op.WRITE) -> list[tuple[float, int]]:
        """*count* requests at once; the list fills with their answers."""
        answers: list[tuple[float, int]] = []

        async def one(tag: int) -> None:
            answers.append(await self.answer(op, tag))

        for tag in range(count):
            self.sky.nursery.start_soon(one, tag)
        return answers

    @classmethod
    def on(cls, nursery: trio.Nursery, policy: Policy, *, flags: int = 2, held_limit: int = 1 << 30) -> Shell:
        """An image opened with *flags* (O_RDWR), and the tasks of `Requests.serve` in *nursery*."""
        events: list[Event] = []
        storage = Storage()
        sky = Sky(nursery)
        requests = BegunRequests(policy, held_limit, [events.append], engine=sky)  # type: ignore[arg-type]
        handle = requests.opened(7, "disk.img", FakeBacking(storage), flags)
        nursery.start_soon(requests.serve, nursery)
        requests._nursery = nursery  # a test's first request comes before `serve` runs
        return cls(requests, handle, storage, sky, events)
