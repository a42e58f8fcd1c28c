"""Questions about an open image - its attributes, its name - which SOURCE may leave unanswered while an outage lasts (P7).

1. Who asks waits until SOURCE has answered, the image has begun to hang, or `blocked_after` has passed. Then memory answers.
2. The question itself is in a task of its own, and goes on: it keeps its thread, and its share of these, until SOURCE has
   answered, and what it does besides (finding SOURCE where it was mounted anew) is not broken off half way.
3. What it finds then is dropped: memory may have been told of newer things since.
4. While an image has a question that was left so, no other is asked: each would cost a thread, and its asker the wait.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, TypeVar

import outcome
import trio

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from iohang_fuse.images import Image

T = TypeVar("T")
log = logging.getLogger(__name__)


class Questions:
    """Those of a mount."""

    def __init__(self, drop: Callable[[object], None]) -> None:
        """*drop*: what to do with an answer that nobody waits for any more; it may have a descriptor."""
        self._drop = drop
        self._nursery: trio.Nursery | None = None

    async def serve(self) -> None:
        """Be there for the questions' tasks. Never returns."""
        try:
            async with trio.open_nursery() as self._nursery:
                await trio.sleep_forever()
        finally:
            self._nursery = None  # handlers end a little later

    async def ask(self, image: Image, question: Callable[[], Awaitable[T]]) -> T | None:
        """What *question* gives or raises; None where memory is to answer, which it can."""
        if self._nursery is None or image.remembered() is None:
            return await question()
        settled = trio.Event()
        answer: list[outcome.Outcome[T]] = []
        left = False

        async def go() -> None:
            try:
                answer.append(outcome.Value(await question()))
            except Exception as error:  # noqa: BLE001 - it is raised by `unwrap`, or logged
                answer.append(outcome.Error(error))
            settled.set()
            if left:
                image.unanswered -= 1
                self._dispose_of(answer[0])

        image.questions.add(settled)
        self._nursery.start_soon(go, name=f"question about {image.held.image}")
        try:
            with trio.move_on_after(image.held.policy.blocked_after_s):
                await settled.wait()
        finally:
            image.questions.discard(settled)
            if not answer:
                left = True
                image.unanswered += 1
        return answer[0].unwrap() if answer else None

    def _dispose_of(self, late: outcome.Outcome[object]) -> None:
        try:
            self._drop(late.unwrap())
        except OSError:
            pass  # its asker has had an answer
        except Exception:
            log.exception("a bug in a question that nobody waited for any more; the mount stays")
