"""In which order the requests of one image reach its file (P4), and which of its bytes are fenced (P5).

1. Pure: who waits and who may go; nothing here knows the time, an attempt, or who is held.
2. A read or write that overlaps an earlier write waits until that one has *left*: it was answered, and no attempt of it is
   in flight. A change of size is a write from there to infinity. An fsync waits for every write that arrived before it.
3. Nothing else waits: not a write for a read, not a younger write for an fsync, not what does not overlap.
4. What an arrival costs does not depend on how many requests there are, but on how many writes of its neighbourhood it has
   to look at: in each block of 64 KiB the youngest come first, and the first that covers the rest ends the search, because
   whatever came before that one is waited for by it. A change of size, which is rare, looks at all.
"""

from __future__ import annotations

import math
from collections import OrderedDict, deque
from typing import TYPE_CHECKING, Generic, TypeVar

if TYPE_CHECKING:
    from collections.abc import Iterator

T = TypeVar("T")

BLOCK_BITS = 16
"""Blocks of 64 KiB: FUSE's largest write (1 MiB) is in 17 of them at most, and 16 writes of 4 KiB fill one."""

_MOST_FENCES = 64
"""More are made into one that spans them all: a fence too large costs a read before a write, and nothing else."""


def blocks(start: int, end: float) -> range:
    """The numbers of the blocks in which a finite range lies."""
    return range(start >> BLOCK_BITS, (int(end) - 1 >> BLOCK_BITS) + 1)


class Turn(Generic[T]):
    """The place in the order of one request, which is *whose*. Its bytes are `start <= byte < end`."""

    # What most never change is the class's own: one is made for each write.
    before: set[Turn[T]] | None = None  # writes that it waits for
    after: dict[Turn[T], None] | None = None  # who waits for it, oldest first
    waits = False
    left = False

    def __init__(self, whose: T, seq: int, start: int, end: float, kind: str) -> None:
        self.whose = whose
        self.seq = seq
        self.start = start
        self.end = end
        self.kind = kind
        self.blocks = blocks(start, end) if end != math.inf else range(0)

    def overlaps(self, start: int, end: float) -> bool:
        """Whether it has a byte of that range."""
        return self.start < end and start < self.end

    def wait_for(self, others: set[Turn[T]]) -> None:
        """It goes when none of *others*, which are added to those before it, is left."""
        self.before = others if self.before is None else self.before | others
        for other in others:
            if other.after is None:
                other.after = {}
            other.after[self] = None
        self.waits = True


class Ordering(Generic[T]):
    """The unfinished writes of one image, and who waits for them."""

    def __init__(self) -> None:
        self._seq = 0
        self._blocks: dict[int, dict[Turn[T], None]] = {}  # unfinished writes by block, oldest first
        self._wide: dict[Turn[T], None] = {}  # unfinished changes of size
        self._unfinished: deque[Turn[T]] = deque()  # all of both, oldest first; those that left go when they are first
        self._syncs: OrderedDict[Turn[T], None] = OrderedDict()  # waiting, oldest first
        self.writes = 0  # unfinished ones

    def read(self, whose: T, start: int, end: float) -> Turn[T]:
        """A read arrives. `waits` says whether it may go."""
        self._seq += 1
        turn = Turn(whose, self._seq, start, end, "read")
        self._look_ahead(turn)
        return turn

    def obstructed(self, start: int, end: float) -> bool:
        """Whether a read that arrives now would have to wait."""
        return self.writes > 0 and next(self._earlier(start, end), None) is not None

    def write(self, whose: T, start: int, end: float) -> Turn[T]:
        """A write arrives, or with *end* infinite a change of size to *start*."""
        self._seq += 1
        turn = Turn(whose, self._seq, start, end, "write")
        self._look_ahead(turn)
        self.writes += 1
        self._unfinished.append(turn)
        if end == math.inf:
            self._wide[turn] = None
        for number in turn.blocks:
            block = self._blocks.get(number)
            if block is None:
                self._blocks[number] = {turn: None}
            else:
                block[turn] = None
        return turn

    def sync(self, whose: T) -> Turn[T]:
        """An fsync arrives."""
        self._seq += 1
        turn = Turn(whose, self._seq, 0, 0, "sync")
        if self.writes:
            turn.waits = True
            self._syncs[turn] = None
        return turn

    def leave(self, turn: Turn[T]) -> list[T]:
        """*turn* is over, or was given up while it waited. Returns whose turn has come."""
        turn.left = True
        if turn.kind == "write":
            self._forget(turn)
        elif turn.kind == "sync":
            self._syncs.pop(turn, None)
        freed = self._freed(turn) if turn.before or turn.after else []
        if self._syncs:
            freed += self._synced()
        return freed

    def _freed(self, turn: Turn[T]) -> list[T]:
        before, after, turn.before, turn.after = turn.before or set(), turn.after or {}, None, None
        for other in before:
            if other.after is not None:
                other.after.pop(turn, None)
        freed = []
        for waiter in after:
            assert waiter.before is not None
            waiter.before.discard(turn)
            # Who left without its turn still has others before it, for which the waiter relied on it.
            waiter.wait_for({other for other in before if other.overlaps(waiter.start, waiter.end)})
            if not waiter.before:
                waiter.waits = False
                freed.append(waiter.whose)
        return freed

    def _look_ahead(self, turn: Turn[T]) -> None:
        """*turn* has arrived: which writes it waits for."""
        if self.writes and (self._wide or not turn.blocks or not self._blocks.keys().isdisjoint(turn.blocks)):
            earlier = {*self._earlier(turn.start, turn.end)}
            if earlier:
                turn.wait_for(earlier)

    def _earlier(self, start: int, end: float) -> Iterator[Turn[T]]:
        """Writes to wait for: with those that they wait for themselves, all that overlap the range."""
        if end == math.inf:
            yield from (turn for turn in self._unfinished if not turn.left and turn.overlaps(start, end))
            return
        for turn in reversed(self._wide):
            if turn.start < end:
                yield turn
                if turn.start <= start:
                    break
        for number in blocks(start, end):
            low, high = max(start, number << BLOCK_BITS), min(end, (number + 1) << BLOCK_BITS)
            for turn in reversed(self._blocks.get(number, ())):
                if turn.start < high and low < turn.end:
                    yield turn
                    if turn.start <= low and high <= turn.end:
                        break

    def _forget(self, turn: Turn[T]) -> None:
        self.writes -= 1
        if turn.end == math.inf:
            del self._wide[turn]
        for number in turn.blocks:
            block = self._blocks[number]
            if len(block) == 1:
                del self._blocks[number]
            else:
                del block[turn]
        unfinished = self._unfinished
        while unfinished and unfinished[0].left:
            unfinished.popleft()
        # One old write that is held must not keep all that came after it in memory.
        if len(unfinished) > 2 * self.writes + 64:
            self._unfinished = deque(other for other in unfinished if not other.left)

    def _synced(self) -> Iterator[T]:
        oldest = self._unfinished[0].seq if self._unfinished else math.inf
        while self._syncs and next(iter(self._syncs)).seq < oldest:
            turn, _ = self._syncs.popitem(last=False)
            turn.waits = False
            yield turn.whose


class Fences:
    """Bytes that a write which was answered with an error may still reach, and until when.

    A soft NFS mount may deliver a failed call's request when the network is back. What the storage itself has answered after
    the give-up (not a cache) has gone the same way behind it.
    """

    def __init__(self) -> None:
        self._fences: list[tuple[int, float, float]] = []  # first byte, end, when it was put up

    def __bool__(self) -> bool:
        """Whether there is one."""
        return bool(self._fences)

    def put(self, start: int, end: float, now: float) -> None:
        """A write to these bytes has been given up *now* (monotonic seconds)."""
        self._fences.append((start, end, now))
        if len(self._fences) > _MOST_FENCES:
            firsts, ends, times = zip(*self._fences, strict=True)
            self._fences = [(min(firsts), max(ends), max(times))]

    def stand(self, start: int, end: float) -> bool:
        """Whether one of these bytes is fenced."""
        return any(first < end and start < last for first, last, _ in self._fences)

    def lift(self, began_s: float) -> None:
        """The storage has answered what was asked at *began_s*."""
        if self._fences:
            self._fences = [fence for fence in self._fences if fence[2] >= began_s]
