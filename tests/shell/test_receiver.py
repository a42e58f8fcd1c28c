"""How requests are taken: by tasks as pyfuse3 has them, from a pipe in place of /dev/fuse, of which each byte is a request."""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING

import pytest
import trio

from iohang_fuse import receiver
from iohang_fuse.receiver import CALLED, IN_A_ROW

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

TASKS = 64


class Rounds(trio.abc.Instrument):
    """Counts those of trio's loop."""

    count = 0

    def before_io_wait(self, _timeout: float) -> None:
        self.count += 1


class Mount:
    """A pipe, the tasks that take from it, and what they did: ("take" or "answer", which request, in which round)."""

    def __init__(self, handle: Callable[[int], Awaitable[None]]) -> None:
        self.trio = receiver._Trio(receiver._Device())
        self.lock = self.trio.Lock()
        self.end, self.guest = os.pipe()
        self.handle = handle
        self.rounds = Rounds()
        self.did: list[tuple[str, int, int]] = []
        self.tasks: list[int] = []  # who did it
        self.inside = 0

    def ask(self, *requests: int) -> None:
        """The guest's part."""
        os.write(self.guest, bytes(requests))

    async def serve(self) -> None:
        """One of pyfuse3's tasks."""
        while True:
            async with self.lock:
                assert self.inside == 0, "one at a time"
                self.inside += 1
                await self.trio.lowlevel.wait_readable(self.end)
                self.inside -= 1
            (request,) = os.read(self.end, 1)
            self._note("take", request)
            await self.handle(request)
            self._note("answer", request)

    def _note(self, what: str, request: int) -> None:
        self.did.append((what, request, self.rounds.count))
        self.tasks.append(id(trio.lowlevel.current_task()))

    async def answered(self, count: int) -> None:
        """Until *count* requests are."""
        with trio.fail_after(20):
            while sum(what == "answer" for what, *_ in self.did) < count:  # noqa: ASYNC110 - it is no more than a test
                await trio.sleep(0.001)

    def in_rounds(self, what: str) -> list[int]:
        """How many requests were taken, or answered, in each round in which any was."""
        rounds = [number for did, _, number in self.did if did == what]
        return [rounds.count(number) for number in sorted({*rounds})]


@contextlib.asynccontextmanager
async def mounted(handle: Callable[[int], Awaitable[None]]) -> AsyncIterator[Mount]:
    mount = Mount(handle)
    trio.lowlevel.add_instrument(mount.rounds)
    async with trio.open_nursery() as nursery:
        for _ in range(TASKS):
            nursery.start_soon(mount.serve)
        await trio.testing.wait_all_tasks_blocked()
        yield mount
        nursery.cancel_scope.cancel()
    trio.lowlevel.remove_instrument(mount.rounds)
    os.close(mount.end)
    os.close(mount.guest)


async def at_once(_request: int) -> None:
    """A read from the page cache."""


async def test_who_has_answered_at_once_goes_on_in_the_same_round() -> None:
    """The point of it: a round of the loop for each request costs more than the request."""
    async with mounted(at_once) as mount:
        mount.ask(*range(IN_A_ROW - 1))
        await mount.answered(IN_A_ROW - 1)
        assert [request for what, request, _ in mount.did if what == "take"] == [*range(IN_A_ROW - 1)]
        assert mount.in_rounds("take") == [IN_A_ROW - 1]


async def test_others_have_their_turn_all_the_same() -> None:
    """P7: answers, timers and signals do not wait for a busy guest."""
    async with mounted(at_once) as mount:
        mount.ask(*[1] * 200)
        await mount.answered(200)
        assert max(mount.in_rounds("take")) <= IN_A_ROW


async def test_several_take_while_requests_wait() -> None:
    """What a round costs is shared by all that it takes, though each task sleeps until its request is done."""
    ready = trio.Event()

    async def later(_request: int) -> None:
        await ready.wait()

    async with mounted(later) as mount:
        mount.ask(*range(TASKS))
        while len(mount.did) < TASKS:
            await trio.lowlevel.checkpoint()
        assert max(mount.in_rounds("take")) == CALLED
        assert len(mount.in_rounds("take")) < TASKS - 2
        ready.set()
        await mount.answered(TASKS)


async def test_who_has_slept_answers_and_lets_others_answer_first() -> None:
    """What is done in one round is answered before anything new is taken: the guest is woken once for all of it."""
    ready = trio.Event()

    async def later(_request: int) -> None:
        await ready.wait()

    async with mounted(later) as mount:
        asleep = TASKS - 2  # there are others, who wait for more
        mount.ask(*range(asleep))
        while len(mount.did) < asleep:
            await trio.lowlevel.checkpoint()
        mount.ask(*[TASKS] * asleep)  # they wait when the others are done
        ready.set()
        await mount.answered(2 * asleep)
    answered: dict[int, int] = {}
    for (what, request, number), task in zip(mount.did, mount.tasks, strict=True):
        if what == "answer" and request < TASKS:
            answered[task] = number
        elif what == "take" and task in answered:
            assert number > answered.pop(task)


async def test_one_is_called_while_nothing_waits() -> None:
    """A guest with one request at a time is served by two tasks, and no more are woken for nothing."""
    woken: set[str] = set()

    class Woken(trio.abc.Instrument):
        def before_task_step(self, task: trio.lowlevel.Task) -> None:
            if task.coro.cr_code is Mount.serve.__code__:  # type: ignore[attr-defined]
                woken.add(str(id(task)))

    async with mounted(at_once) as mount:
        instrument = Woken()
        trio.lowlevel.add_instrument(instrument)
        for number in range(50):
            mount.ask(number)
            await mount.answered(number + 1)
        trio.lowlevel.remove_instrument(instrument)
        assert len(woken) <= 3


async def test_one_that_is_slow_is_in_nobodys_way() -> None:
    """P7: whoever waits for its request does so outside."""

    async def slow(request: int) -> None:
        if request == 0:
            await trio.sleep_forever()

    async with mounted(slow) as mount:
        mount.ask(0)
        await trio.testing.wait_all_tasks_blocked(0.01)
        for number in range(1, 100):
            mount.ask(number)
            await mount.answered(number)


@pytest.mark.parametrize("asked", [0, 3])
async def test_the_end(asked: int) -> None:
    """pyfuse3 cancels its tasks where they wait; none is left in the turnstile."""
    async with mounted(at_once) as mount:
        mount.ask(*range(asked))
        await mount.answered(asked)
    assert mount.lock._waiting == []
