"""How requests are taken from /dev/fuse: pyfuse3's main loop, with a cheaper lock and a cheaper wait.

1. pyfuse3 has many tasks, of which one at a time waits for /dev/fuse, with trio.Lock and trio.lowlevel.wait_readable. For each
   request that is two or three rounds of trio's loop and two changes of epoll's set, which cost more than all the rest of a
   small request. Here the one that has been served goes on with the next request, as long as there is one.
2. pyfuse3 finds both in its global `trio`. pyfuse3.asyncio replaces that in the same way: nothing of pyfuse3 is changed.
3. After some requests in a row trio has its turn all the same: answers, timers and signals do not wait for a busy guest (P7).
4. What is done in one round of the loop is answered before anything new is taken: a guest is woken once for all of it, and
   waking a processor that sleeps costs more than an answer. And while more requests wait, several tasks take them in one round:
   each sleeps until its request is done, and what a round costs is shared by all that it takes.
"""

from __future__ import annotations

import gc
import select
from typing import TYPE_CHECKING, Any, NoReturn

import pyfuse3
import trio

from iohang_fuse import limits

if TYPE_CHECKING:
    from collections.abc import Callable

IN_A_ROW = 16
"""Requests between two rounds of trio's loop: 16 reads of 1 MiB from the page cache take some 3 ms."""

CALLED = 8
"""Tasks that are called at once while requests wait. On the workload 4k-write-16 of contrib/benchmark 8 do more than 4, 4 more than
1. Who is called for nothing costs time."""

NEW_OBJECTS = 20_000
"""Between two searches for garbage, instead of 700: some 5,000 writes, whose entries in the write log are no garbage for long, by
the way of 4k writes."""


class _Device:
    """/dev/fuse, as its descriptor becomes known."""

    def __init__(self) -> None:
        self._ready = select.poll()
        self._fd = -1
        self.in_a_row = 0
        self.wanted = 1  # so many tasks to take requests at once
        self.slept = False  # whether who takes the next one has slept since the one before

    def is_ready(self) -> bool:
        """Whether a request waits there."""
        return bool(self._ready.poll(0))

    async def wait(self, fd: int) -> None:
        """Until *fd* is readable; without a round of the loop if it is, IN_A_ROW times."""
        if fd != self._fd:
            self._fd = fd
            self._ready = select.poll()
            self._ready.register(fd, select.POLLIN)
        self.in_a_row += 1
        if self.in_a_row >= IN_A_ROW or not self._ready.poll(0):
            self.in_a_row = 0
            self.wanted = max(self.wanted - 1, 1)
            await trio.lowlevel.wait_readable(fd)
        elif self.slept:  # and meanwhile nobody has taken it
            self.wanted = min(self.wanted + 1, CALLED)
        else:
            self.wanted = 1


def others_wait() -> bool:
    """Whether the request that was taken last had been waiting for its turn: there are more than one at a time."""
    return _device.in_a_row > 0


def request_waits() -> bool:
    """Whether there is a request to be taken from /dev/fuse."""
    return _device.is_ready()


_device = _Device()


class Turnstile:
    """In place of trio.Lock: who leaves may enter again at once, and calls others who wait, in case that he does not.

    Of those who wait the latest is called first: the fewest tasks, and their receive buffers, stay in use.
    """

    def __init__(self, device: _Device) -> None:
        self._device = device
        self._taken = False
        self._latest: trio.lowlevel.Task | None = None
        self._called = 0  # who were called, and have not run since
        self._waiting: list[trio.lowlevel.Task] = []

    async def __aenter__(self) -> None:
        task = trio.lowlevel.current_task()
        slept = task is not self._latest
        if slept and not self._taken:  # he has just answered; so may others, who come first
            await trio.lowlevel.checkpoint()
        while self._taken:
            await self._wait(task)
        self._taken = True
        self._latest = task
        self._device.slept = slept

    async def __aexit__(self, *_: object) -> None:
        self._taken = False
        while self._waiting and self._called < self._device.wanted:
            self._called += 1
            trio.lowlevel.reschedule(self._waiting.pop())

    async def _wait(self, task: trio.lowlevel.Task) -> None:
        self._waiting.append(task)

        def abort(_raise_cancel: Callable[[], NoReturn]) -> trio.lowlevel.Abort:
            self._waiting.remove(task)
            return trio.lowlevel.Abort.SUCCEEDED

        await trio.lowlevel.wait_task_rescheduled(abort)
        self._called -= 1


class _Lowlevel:
    """trio.lowlevel, but for one function."""

    def __init__(self, device: _Device) -> None:
        self.wait_readable = device.wait

    def __getattr__(self, name: str) -> Any:
        return getattr(trio.lowlevel, name)


class _Trio:
    """trio, but for two names."""

    def __init__(self, device: _Device) -> None:
        self._device = device
        self.lowlevel = _Lowlevel(device)

    def Lock(self) -> Turnstile:  # noqa: N802 - trio's name
        return Turnstile(self._device)

    def __getattr__(self, name: str) -> Any:
        return getattr(trio, name)


async def main() -> None:
    """Serve the mount of `pyfuse3.init` until it is unmounted, or pyfuse3.terminate() is called."""
    gc.freeze()  # what is there by now stays
    gc.set_threshold(NEW_OBJECTS, *gc.get_threshold()[1:])
    pyfuse3.trio = _Trio(_device)  # type: ignore[attr-defined]
    await pyfuse3.main(limits.MIN_TASKS, limits.MAX_TASKS)
