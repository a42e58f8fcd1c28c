"""Machines that let requests arrive at an order, and leave it, in any order, beside a model that looks at every pair.

More of it: `IOHANG_MACHINE_EXAMPLES=5000 pytest tests/core/test_ordering_machine.py`.
"""

from __future__ import annotations

import math
import os
from typing import TYPE_CHECKING
from unittest import mock

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from iohang_fuse import ordering
from iohang_fuse.ordering import Fences, Ordering, Turn, blocks

if TYPE_CHECKING:
    from random import Random

SIZE = 40  # small, so that ranges touch, overlap and enclose one another
KINDS = st.sampled_from(["write", "write", "write", "read", "cut", "sync"])


class OrderingMachine(RuleBasedStateMachine):
    """Requests are numbered as they arrive. The model knows who is there, and nothing else."""

    @initialize(scale=st.sampled_from([(0, 1), (2, 1), (3, 1), (2, 5), (16, 10_000)]))
    def begin(self, *, scale: tuple[int, int]) -> None:
        """Small blocks, so that a range lies in many of them, or the true ones and ranges of up to 400 kB."""
        bits, self.factor = scale
        self.patch = mock.patch.object(ordering, "BLOCK_BITS", bits)
        self.patch.start()
        self.order: Ordering[int] = Ordering()
        self.live: dict[int, Turn[int]] = {}  # by number, oldest first
        self.number = 0
        self.old: int | None = None  # the write that does not end

    def waits(self, number: int) -> bool:
        """P4, looking at every pair."""
        turn = self.live[number]
        return any(
            other.kind == "write"
            and earlier < number
            and (turn.kind == "sync" or (other.start < turn.end and turn.start < other.end))
            for earlier, other in self.live.items()
        )

    def arrive_one(self, kind: str, start: int, length: int) -> Turn[int]:
        self.number += 1
        start, end = start * self.factor, (start + length) * self.factor
        match kind:
            case "sync":
                turn = self.order.sync(self.number)
            case "cut":
                turn = self.order.write(self.number, start, math.inf)
            case _:
                turn = getattr(self.order, kind)(self.number, start, end)
        assert turn.whose == self.number
        assert turn.kind == ("write" if kind == "cut" else kind)
        self.live[self.number] = turn
        assert turn.waits is self.waits(self.number)
        return turn

    def leave_one(self, number: int) -> None:
        waited = {other for other, turn in self.live.items() if turn.waits and other != number}
        freed = self.order.leave(self.live.pop(number))
        assert len(freed) == len({*freed}), "each once"
        assert {*freed} == {other for other in waited if not self.waits(other)}, "those whose turn has come"

    # ---- rules

    @precondition(lambda self: len(self.live) < 24)  # the model looks at every pair
    @rule(kind=KINDS, start=st.integers(0, SIZE), length=st.integers(1, SIZE), count=st.sampled_from([1, 1, 1, 3, 8]))
    def arrive(self, kind: str, start: int, length: int, count: int) -> None:
        """New requests, one on top of the other or side by side."""
        for step in range(count):
            self.arrive_one(kind, start + step * (length % 3), length)

    @precondition(lambda self: any(not turn.waits for turn in self.live.values()))
    @rule(data=st.data(), count=st.integers(1, 5))
    def end(self, data: st.DataObject, count: int) -> None:
        """Requests whose turn had come are answered, in any order."""
        for _ in range(count):
            if able := [n for n, turn in self.live.items() if not turn.waits and n != self.old]:
                self.leave_one(data.draw(st.sampled_from(able)))

    @precondition(lambda self: any(turn.waits for turn in self.live.values()))
    @rule(data=st.data(), count=st.integers(1, 5))
    def give_up(self, data: st.DataObject, count: int) -> None:
        """Requests whose turn has not come reach their deadlines."""
        for _ in range(count):
            if waiting := [number for number, turn in self.live.items() if turn.waits]:
                self.leave_one(data.draw(st.sampled_from(waiting)))

    @precondition(lambda self: self.old is None)
    @rule(start=st.integers(0, SIZE), length=st.integers(1, SIZE))
    def one_does_not_end(self, start: int, length: int) -> None:
        """A write that is held for good."""
        self.old = self.arrive_one("write", start, length).whose

    @precondition(lambda self: len(self.live) < 10)
    @rule(
        kind=KINDS, start=st.integers(0, SIZE), length=st.integers(1, 8), ahead=st.integers(0, 3), randoms=st.randoms()
    )
    def many_pass(self, kind: str, start: int, length: int, ahead: int, randoms: Random) -> None:
        """More requests come and go than anything may be kept of them."""
        here: list[int] = []
        for step in range(70):
            here.append(self.arrive_one(kind, start + step % 7, length).whose)
            if len(here) > ahead:
                self.leave_one(here.pop(randoms.randrange(len(here))))
        for number in here:
            self.leave_one(number)

    @rule(randoms=st.randoms())
    def all_leave(self, randoms: Random) -> None:
        """P8, P10: whoever has left has left nothing."""
        numbers = [*self.live]
        randoms.shuffle(numbers)
        for number in numbers:
            self.leave_one(number)
        self.old = None
        order = self.order
        assert order.writes == 0
        assert (order._blocks, order._wide) == ({}, {})
        assert (len(order._unfinished), len(order._syncs)) == (0, 0)

    # ---- what holds always

    @invariant()
    def the_order_is_kept(self) -> None:
        """P4: never too early, never needlessly late."""
        for number, turn in self.live.items():
            assert turn.waits is self.waits(number)
            assert not turn.left

    @invariant()
    def who_waits_for_whom_is_known_on_both_sides(self) -> None:
        """Nobody waits for one that has left, that does not overlap, or that came later."""
        for turn in self.live.values():
            for other in turn.before or ():
                assert self.live[other.whose] is other
                assert other.whose < turn.whose
                assert other.kind == "write"
                assert other.overlaps(turn.start, turn.end)
                assert turn in other.after
            for other in turn.after or ():
                assert self.live[other.whose] is other
                assert turn in other.before

    @invariant()
    def structures_are_bounded(self) -> None:
        """P10: what has ended does not stay for long, whoever is still here."""
        order = self.order
        writes = [turn for turn in self.live.values() if turn.kind == "write"]
        finite = [turn for turn in writes if turn.end < math.inf]
        assert order.writes == len(writes)
        assert [*order._wide] == [turn for turn in writes if turn.end == math.inf]
        assert sum(map(len, order._blocks.values())) == sum(len(blocks(turn.start, turn.end)) for turn in finite)
        assert all(order._blocks.values())
        assert len(order._unfinished) <= 2 * len(writes) + 64
        assert len(order._syncs) <= len(self.live) + 64

    def teardown(self) -> None:
        """Nothing waits for what is not there: whoever may go goes, until nobody is left."""
        if not hasattr(self, "order"):
            return
        try:
            while self.live:
                able = [number for number, turn in self.live.items() if not turn.waits]
                assert able, "a circle"
                for number in able:
                    self.leave_one(number)
            assert (self.order._blocks, len(self.order._unfinished), len(self.order._syncs)) == ({}, 0, 0)
        finally:
            self.patch.stop()


class FencesMachine(RuleBasedStateMachine):
    """Times are small numbers, so that they coincide often."""

    def __init__(self) -> None:
        super().__init__()
        self.fences = Fences()
        self.now = 1.0
        self.began: list[float] = []  # attempts in flight, from before or after a give-up
        self.standing: list[tuple[int, float, float]] = []
        self.newest = -math.inf
        self.exact = True  # until there are so many that they are made into one

    @rule(start=st.integers(0, SIZE), length=st.sampled_from([1, 2, 5, SIZE, math.inf]), later=st.booleans())
    def give_up(self, start: int, length: float, later: bool) -> None:  # noqa: FBT001 - hypothesis calls it
        """A write is answered with an error, and something of it may be on its way."""
        self.put(start, start + length)
        self.now += later

    def put(self, start: int, end: float) -> None:
        self.fences.put(start, end, self.now)
        self.standing.append((start, end, self.now))
        self.newest = self.now
        self.exact = self.exact and len(self.standing) <= ordering._MOST_FENCES

    @rule(stride=st.integers(0, 3))
    def many_give_up(self, stride: int) -> None:
        """A whole hang is given up."""
        for number in range(40):
            self.put(number * stride, number * stride + 1)

    @rule()
    def attempt(self) -> None:
        """An attempt begins after all that has happened."""
        self.now += 1
        self.began.append(self.now)

    @precondition(lambda self: self.began)
    @rule(data=st.data())
    def succeed(self, data: st.DataObject) -> None:
        """An attempt succeeds, whenever it began."""
        began = data.draw(st.sampled_from(self.began))
        self.began.remove(began)
        self.fences.lift(began)
        self.standing = [fence for fence in self.standing if fence[2] >= began]
        self.exact = self.exact or not self.standing

    @invariant()
    def fences_stand_as_long_as_they_must(self) -> None:
        """P5: a fence stands until an attempt that began after it has succeeded; P8: and no longer, once all of them may go."""
        for at in (*range(SIZE + 1), 10 * SIZE):
            must = any(start < at + 1 and at < end for start, end, _ in self.standing)
            stands = self.fences.stand(at, at + 1)
            assert stands is must if self.exact else stands >= must
        if not self.standing:
            assert not self.fences.stand(0, math.inf)
        assert len(self.fences._fences) <= ordering._MOST_FENCES


EXAMPLES = int(os.environ.get("IOHANG_MACHINE_EXAMPLES", "40"))
machine_settings = settings(
    max_examples=EXAMPLES,
    stateful_step_count=40,
    deadline=None,
    report_multiple_bugs=False,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
TestOrdering = OrderingMachine.TestCase
TestOrdering.settings = machine_settings
TestFences = FencesMachine.TestCase
TestFences.settings = machine_settings
