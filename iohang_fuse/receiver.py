"""How requests are taken from /dev/fuse: pyfuse3's main loop, with a cheaper lock and a cheaper wait.

1. pyfuse3 has many tasks, of which one at a time waits for /dev/fuse, with trio.Lock and trio.lowlevel.wait_readable. For each
   request that is two or three rounds of trio's loop and two changes of epoll's set, which cost more than all the rest of a
   small request. Here the one that has been served goes on with the next request, as long as there is one.
2. pyfuse3 finds both in its global `trio`. pyfuse3.asyncio replaces that in the same way: nothing of pyfuse3 is changed.
3. After some requests in a row trio has its turn all the same: answers, timers and signals do not wait for a busy guest (P7).
"""

from __future__ import annotations

import select
from typing import TYPE_CHECKING, Any, NoReturn

import pyfuse3
import trio

from iohang_fuse import limits

if TYPE_CHECKING:
    from collections.abc import Callable

IN_A_ROW = 16
"""Requests between two rounds of trio's loop: 16 reads of 1 MiB from the page cache take some 3 ms."""


class Turnstile:
    """In place of trio.Lock: who leaves may enter again at once, and calls one who waits, in case that he does not.

    Of those who wait the latest is called first: the fewest tasks, and their receive buffers, stay in use.
    """

    def __init__(self) -> None:
        self._taken = False
        self._called = False  # somebody was called, and has not run since
        self._waiting: list[trio.lowlevel.Task] = []

    async def __aenter__(self) -> None:
        while self._taken:
            await self._wait()
        self._taken = True

    async def __aexit__(self, *_: object) -> None:
        self._taken = False
        if self._waiting and not self._called:
            self._called = True
            trio.lowlevel.reschedule(self._waiting.pop())

    async def _wait(self) -> None:
        task = trio.lowlevel.current_task()
        self._waiting.append(task)

        def abort(_raise_cancel: Callable[[], NoReturn]) -> trio.lowlevel.Abort:
            self._waiting.remove(task)
            return trio.lowlevel.Abort.SUCCEEDED

        await trio.lowlevel.wait_task_rescheduled(abort)
        self._called = False


class _Lowlevel:
    """trio.lowlevel, but for one function."""

    def __init__(self) -> None:
        self._ready = select.poll()
        self._fd = -1
        self._in_a_row = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(trio.lowlevel, name)

    async def wait_readable(self, fd: int) -> None:
        """Until *fd* is readable; without a round of the loop if it is, IN_A_ROW times."""
        if fd != self._fd:
            self._fd = fd
            self._ready = select.poll()
            self._ready.register(fd, select.POLLIN)
        self._in_a_row += 1
        if self._in_a_row < IN_A_ROW and self._ready.poll(0):
            return
        self._in_a_row = 0
        await trio.lowlevel.wait_readable(fd)


class _Trio:
    """trio, but for two names."""

    Lock = Turnstile

    def __init__(self) -> None:
        self.lowlevel = _Lowlevel()

    def __getattr__(self, name: str) -> Any:
        return getattr(trio, name)


async def main() -> None:
    """Serve the mount of `pyfuse3.init` until it is unmounted, or pyfuse3.terminate() is called."""
    pyfuse3.trio = _Trio()  # type: ignore[attr-defined]
    await pyfuse3.main(limits.MIN_TASKS, limits.MAX_TASKS)
