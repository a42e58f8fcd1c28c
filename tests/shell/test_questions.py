"""Questions about an open image, on trio's autojump clock: who answers, and when (see questions.py)."""

# ruff: noqa: ARG001 - pytest-trio takes the clock from each test's own arguments

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING

import pytest
import trio
import trio.testing

from iohang_fuse.questions import Questions
from tests.core.world import policy
from tests.shell.fakes import Shell

if TYPE_CHECKING:
    from trio.testing import MockClock

EIO = errno.EIO
BLOCKED_AFTER_S = 5.0


class Asker:
    """The questions of a mount with one image, and the late answers that were dropped."""

    def __init__(self, nursery: trio.Nursery) -> None:
        self.shell = Shell.on(nursery, policy(blocked_after_s=BLOCKED_AFTER_S))
        self.image = self.shell.handle.image
        self.dropped: list[object] = []
        self.questions = Questions(self._drop)
        nursery.start_soon(self.questions.serve)

    def _drop(self, late: object) -> None:
        if late == "a bug":
            raise RuntimeError("in what drops it")
        self.dropped.append(late)

    async def ask(self, takes_s: float, answer: object = "SOURCE") -> tuple[object, float]:
        """What came of a question that takes so long, and after which time."""
        began_s = trio.current_time()

        async def question() -> object:
            await trio.sleep(takes_s)
            if isinstance(answer, Exception):
                raise answer
            return answer

        return await self.questions.ask(self.image, question), trio.current_time() - began_s


@pytest.fixture
async def asker(nursery: trio.Nursery) -> Asker:
    """Of an image that memory knows."""
    asker = Asker(nursery)
    asker.image.saw(os.stat("/"))
    await trio.testing.wait_all_tasks_blocked()
    return asker


async def test_an_answer_in_time_is_the_answer(asker: Asker, autojump_clock: MockClock) -> None:
    """So is an error. Nothing is left of the question."""
    assert await asker.ask(4) == ("SOURCE", pytest.approx(4))
    with pytest.raises(OSError, match="of SOURCE"):
        await asker.ask(1, OSError(EIO, "of SOURCE"))
    assert (asker.image.unanswered, asker.image.questions, asker.dropped) == (0, set(), [])
    assert not asker.image.speaks_from_memory


async def test_memory_answers_when_the_hang_begins(asker: Asker, autojump_clock: MockClock) -> None:
    """P7: "A question about an open image that is under way when its hang begins is answered from memory then"."""
    asker.shell.storage.errno = EIO
    asker.shell.sky.takes_s = lambda: 2.0
    asker.shell.send(1)
    assert await asker.ask(100) == (None, pytest.approx(2))
    assert asker.image.held.sick
    asker.shell.storage.errno = 0
    await trio.sleep(20)
    assert not asker.image.held.sick
    assert asker.image.speaks_from_memory, "P7: while it is under way no other is asked"
    await trio.sleep(100)
    assert not asker.image.speaks_from_memory
    assert asker.dropped == ["SOURCE"]


async def test_memory_answers_after_blocked_after(asker: Asker, autojump_clock: MockClock) -> None:
    """P7: "...or that is not answered within `blocked_after`"."""
    assert await asker.ask(100) == (None, pytest.approx(BLOCKED_AFTER_S))
    assert not asker.image.held.sick
    assert asker.image.speaks_from_memory
    await trio.sleep(100)
    assert not asker.image.speaks_from_memory
    assert asker.dropped == ["SOURCE"]


async def test_a_late_error_is_nobody_s(
    asker: Asker, autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    """P11: nor is a bug in what comes late: it is logged, and the next question is asked."""
    for answer in (OSError(EIO, "of SOURCE"), ZeroDivisionError("of ours"), "a bug"):
        assert await asker.ask(10, answer) == (None, pytest.approx(BLOCKED_AFTER_S))
        await trio.sleep(10)
        assert asker.image.unanswered == 0
    assert await asker.ask(1) == ("SOURCE", pytest.approx(1))
    assert caplog.text.count("a bug in a question") == 2
    assert asker.dropped == []


async def test_where_memory_knows_nothing_source_is_waited_for(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    """There is nothing else to answer with."""
    asker = Asker(nursery)
    await trio.testing.wait_all_tasks_blocked()
    assert await asker.ask(100) == ("SOURCE", pytest.approx(100))
