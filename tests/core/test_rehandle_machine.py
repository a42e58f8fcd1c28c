"""A machine that does to a rehandle list whatever a shell, a clock, a storage and an operator can do, in any order.

After every step it checks what must hold always; the rules themselves check what each call may do. More of it:
`IOHANG_MACHINE_EXAMPLES=5000 pytest tests/core/test_rehandle_machine.py`.
"""

from __future__ import annotations

import dataclasses
import errno
import math
import os
from typing import TYPE_CHECKING

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from iohang_fuse.events import GivenUp, HangBegan, HangEnded, HeldLimitReached, Op, TimedOut
from iohang_fuse.rehandle import HeldBytes, RehandleList, Request, State, Step
from tests.core.world import policy

if TYPE_CHECKING:
    from collections.abc import Iterable

EIO, EACCES, ENOSPC = errno.EIO, errno.EACCES, errno.ENOSPC
TIMEOUTS = st.sampled_from([0.0, 1.0, 7.0, 60.0, math.inf])


class Watched(RehandleList):
    """Counts attempts as they begin, and sees the gate at that moment."""

    most_in_flight = 0

    def _start(self, request: Request, now: float) -> None:
        assert request.state is State.WAITING
        super()._start(request, now)
        room = self.policy.share if self.gate_open else self.policy.recovery_gate
        assert self.in_flight <= room, f"{self.in_flight} attempts, the gate {'open' if self.gate_open else 'closed'}"


class Machine(RuleBasedStateMachine):
    """Times are quarters of a second, so that things fall on the same moment often, and sums are exact."""

    @initialize(
        reads=TIMEOUTS,
        writes=TIMEOUTS,
        fsyncs=TIMEOUTS,
        interval_s=st.sampled_from([0.25, 1, 5]),
        gate=st.integers(1, 4),
        share=st.integers(4, 6),
        budget=st.sampled_from([1, 3, 64]),
        limit=st.sampled_from([0, 3, 10**6]),
        timeout_errno=st.sampled_from([EIO, ENOSPC]),
    )
    def begin(
        self,
        *,
        reads: float,
        writes: float,
        fsyncs: float,
        interval_s: float,
        gate: int,
        share: int,
        budget: int,
        limit: int,
        timeout_errno: int,
    ) -> None:
        """Any policy."""
        self.policy = policy(
            read_s=reads,
            write_s=writes,
            fsync_s=fsyncs,
            interval_s=interval_s,
            timeout_errno=timeout_errno,
            recovery_gate=gate,
            share=share,
            tick_budget=budget,
        )
        self.held_bytes = HeldBytes(limit)
        self.held = Watched("disk.img", self.policy, self.held_bytes)
        self.now = 1000.0
        self.live: dict[int, Request] = {}
        self.flights: dict[int, Request] = {}  # by seq: attempts inside their system call
        self.attempts: dict[int, int] = {}  # by seq: how many of them were begun here
        self.deadlines: dict[int, float] = {}  # by seq: as first seen
        self.first_wait_s: dict[int, float] = {}  # by seq: when it first failed, or joined a sick image
        self.probes: list[float] = []
        self.hanging = self.timed_out = False
        self.apart = 0
        self.places: dict[int, tuple[int, float, bool]] = {}  # by seq: first byte, end, whether it is ordered
        self.operator = False  # an operator ended something in this step
        self.limit_reported_s = -math.inf

    # ---- what a call leads to

    def take(  # noqa: C901 - one for each kind of event
        self, step: Step, landed: Request | None = None, errno: int = 0
    ) -> None:
        """Follow *step* as the shell would. *landed*: whose attempt has just been reported, with *errno*."""
        was_timed_out = self.timed_out
        for event in step.events:
            match event:
                case HangBegan():
                    assert not self.hanging, "P9: one begin"
                    self.hanging = True
                case HangEnded():
                    assert self.hanging, "P9: one end"
                    assert event.recovered + event.given_up + event.passed_on <= event.held_max + len(self.attempts)
                    self.hanging = False
                case TimedOut():
                    assert event.on is not self.timed_out, "P9: on and off alternate"
                    self.timed_out = event.on
                case GivenUp():
                    assert self.timed_out, "P9: the first is told as the image's time-out"
                case HeldLimitReached():
                    assert self.now - self.limit_reported_s >= 60
                    self.limit_reported_s = self.now
        for request in self.unique([*step.woken, *([landed] if landed else [])]):
            if request.state is State.TRYING:
                self.begin_attempt(request)
            elif request.state is State.ENDED:
                self.ended(request, errno if request is landed else None, was_timed_out=was_timed_out)
        if step.probe:
            assert not self.probes, "one probe at a time"
            self.probes.append(self.now)

    @staticmethod
    def unique(requests: Iterable[Request]) -> list[Request]:
        return [*{request.seq: request for request in requests}.values()]

    def begin_attempt(self, request: Request) -> None:
        assert request.seq not in self.flights
        self.flights[request.seq] = request
        self.attempts[request.seq] = self.attempts.get(request.seq, 0) + 1
        assert request.attempts == self.attempts[request.seq]

    def ended(  # noqa: PLR0911 - one for each reason
        self, request: Request, errno: int | None, *, was_timed_out: bool
    ) -> None:
        """P1, P5: why may it be answered now? *errno*: of the attempt that has just landed, 0 for success, None for none."""
        if self.live.pop(request.seq, None) is None:
            return  # answered before
        if errno == 0:
            assert request.answer is None
            return
        assert request.answer is not None
        timeout_s = self.policy.timeout_s[request.op]
        deadline_s = self.deadlines.get(request.seq, request.deadline_s)
        if errno is None and request.seq in self.flights:
            assert request.op is Op.READ, "P1, P5: a write or fsync is not given up while its attempt is in flight"
        limit_reached = request.op is Op.WRITE and self.held_bytes.held + request.length > self.held_bytes.limit
        if errno is None and limit_reached and not request.attempts:
            return  # it waited for its turn in an image that hangs: its data may be held no more
        if errno is not None and request.answer == errno:
            passed_on = errno == EACCES or not self.held.holding or timeout_s == 0
            if passed_on or limit_reached:
                return
        if errno is not None and was_timed_out and request.answer == self.policy.timeout_errno:
            return  # a new failure in the timed-out state; for held ones see *still_held*
        if self.operator or request.drained:
            return
        if timeout_s == 0 or not self.held.holding:
            assert errno is None, "what may not be held gets its own error"
            assert deadline_s is not None
            assert self.now >= deadline_s
            return
        assert request.answer == self.policy.timeout_errno
        assert deadline_s is not None
        assert self.now >= deadline_s, "P1: answered before its timeout has passed"

    # ---- rules: requests and attempts

    @rule(
        op=st.sampled_from([*Op]),
        place=st.sampled_from([(0, 1), (1, 1), (0, 2), (2, 2), (3, math.inf)]),
        apart=st.booleans(),
        count=st.integers(1, 8),
    )
    def arrive(self, op: Op, place: tuple[int, float], apart: bool, count: int) -> None:  # noqa: FBT001
        """New requests: on top of each other, or *apart* from all; a write to infinity is a change of size."""
        first, length = place
        for _ in range(count):
            self.apart += 10 * apart
            at = self.apart + first
            size = 0 if length == math.inf or op is Op.FSYNC else int(length)
            end = math.inf if length == math.inf and op is Op.WRITE else None
            ordered = not (op is Op.FSYNC and apart)
            request, step = self.held.arrive(op, at, size, self.now, end=end, ordered=ordered)
            self.live[request.seq] = request
            self.places[request.seq] = (at, at + size if end is None else end, ordered)
            assert set(map(id, step.woken)) <= {id(request)}, "nothing else was waiting for this"
            self.take(step, request if request.state is State.TRYING else None)
            self.check_deadlines()

    @precondition(lambda self: self.flights)
    @rule(data=st.data(), outcome=st.sampled_from([0, 0, EIO, EIO, EIO, EACCES]), count=st.integers(1, 6))
    def land(self, data: st.DataObject, outcome: int, count: int) -> None:
        """Attempts return, in any order."""
        for _ in range(min(count, len(self.flights))):
            seq = data.draw(st.sampled_from([*self.flights]))
            self.land_one(seq, outcome)
            self.check_deadlines()

    def land_one(self, seq: int, outcome: int) -> None:
        request = self.flights.pop(seq)
        if request.state is State.ENDED:
            self.take(self.held.returned(self.now))
        elif outcome == 0:
            says_nothing = not request.held and request.started_s < self.held._sick_since_s
            gate_open, unsynced = self.held.gate_open, self.held.timed_out and self.held.unsynced
            self.take(self.held.succeeded(request, self.now), request)
            if unsynced and request.op is not Op.FSYNC:
                assert self.held.timed_out, "the page cache may have answered that"
            assert self.held.gate_open == (gate_open or not says_nothing), "the first success opens the gate"
            assert request.state is State.ENDED
            assert request.answer is None
        else:
            was_held, was_timed_out = request.held, self.held.timed_out
            self.operator = draining = self.draining()
            due = request.deadline_s is not None and self.now >= request.deadline_s
            self.first_wait_s.setdefault(seq, self.now)
            self.take(self.held.failed(request, outcome, self.now), request, outcome)
            self.operator = False
            if draining and not self.draining():
                self.drained()
                return
            if was_timed_out and not was_held and outcome == EIO:
                assert request.state is State.ENDED, "section 4: new failures are answered at once"
            if was_held and outcome == EIO and not due and self.held.holding:
                assert request.state is not State.ENDED, "P2: requests already held keep their own deadlines"

    @precondition(lambda self: self.flights)
    @rule(data=st.data(), outcome=st.sampled_from([0, EIO]))
    def deadline_and_landing_coincide(self, data: st.DataObject, outcome: int) -> None:
        """An attempt has returned, its task has yet to run, and the timer is first: its outcome is reported all the same."""
        request = self.flights[data.draw(st.sampled_from([*self.flights]))]
        self.advance(0.0)
        if request.state is State.ENDED and request.answer is not None:
            del self.flights[request.seq]
            report = self.held.failed(request, EIO, self.now) if outcome else self.held.succeeded(request, self.now)
            self.take(report)

    @precondition(lambda self: self.live)
    @rule(data=st.data(), returned=st.booleans())
    def cancel(self, data: st.DataObject, returned: bool) -> None:  # noqa: FBT001 - hypothesis calls it
        """A bug ends one request."""
        request = self.live.pop(data.draw(st.sampled_from([*self.live])))
        if returned or request.state is State.WAITING:
            self.flights.pop(request.seq, None)
        self.take(self.held.cancelled(request, self.now, returned=returned))

    # ---- rules: time

    @rule(quarters=st.integers(0, 40))
    def time_passes(self, quarters: int) -> None:
        """Some time, each tick at its moment."""
        self.advance(quarters / 4)

    @rule(seconds=st.sampled_from([70, 200]))
    def much_time_passes(self, seconds: int) -> None:
        """Past every deadline."""
        self.advance(float(seconds))

    @rule(seconds=st.sampled_from([0.25, 3.5, 11.0, 100.0]))
    def the_event_loop_stalls(self, seconds: float) -> None:
        """Ticks are missed, and made up for by one."""
        self.now += seconds
        if self.held.sick and self.held.next_tick_s <= self.now:
            self.tick()
            assert self.held.next_tick_s > self.now, "missed ticks pile up"

    def advance(self, seconds: float) -> None:
        end_s = self.now + seconds
        while self.held.sick and self.held.next_tick_s <= end_s:
            before_s = self.held.next_tick_s
            self.now = max(self.now, before_s)
            self.tick()
            assert self.held.next_tick_s > before_s
        self.now = end_s

    def tick(self) -> None:
        self.operator = draining = self.draining()
        self.take(self.held.tick(self.now))
        self.operator = False
        if draining and not self.draining():
            self.drained()
        self.check_deadlines()
        for request in self.live.values():
            may_end = request.state is State.WAITING or (request.op is Op.READ and request.held)
            if may_end and request.deadline_s is not None and self.held.sick:
                assert request.deadline_s > self.now, "P8: overdue after a tick"

    @rule()
    def watch(self) -> None:
        """What `Requests.serve` does every second or so."""
        if self.held.blocked(self.now):
            self.tick()
            assert self.held.sick
        assert not self.held.blocked(self.now)
        if self.held.holding and not self.held.timed_out:
            for request in self.held.trying:
                if request.started_s + self.policy.blocked_after_s <= self.now and self.policy.timeout_s[request.op]:
                    assert request.held, "an attempt that does not return counts as a hang"

    @precondition(lambda self: self.probes)
    @rule(success=st.booleans())
    def probe_lands(self, success: bool) -> None:  # noqa: FBT001 - hypothesis calls it
        """The probe returns."""
        self.take(self.held.probed(self.probes.pop(), self.now, success=success))
        if success:
            assert not self.held.timed_out

    # ---- rules: operators

    @rule()
    def retry(self) -> None:
        """io-hang-retry."""
        self.take(self.held.retry(self.now))
        in_queue = {id(request) for request in self.held._unstarted()}
        assert all(id(r) in in_queue for r in self.live.values() if r.state is State.WAITING)

    @rule()
    def drain(self) -> None:
        """io-hang-drain: whatever is in flight decides, and where nothing is, it is decided."""
        self.operator = True
        held = bool(self.held.held)
        self.take(self.held.drain(self.now))
        self.operator = False
        if held and not self.draining():
            self.drained()
        if self.draining():
            assert self.held.held
            assert self.held.trying

    def draining(self) -> bool:
        """Whether an operator's drain has yet to end."""
        return self.held._drained_s < math.inf

    def drained(self) -> None:
        """An end was made of what was held: what is left is inside a system call that has to return (P5)."""
        assert not self.draining()
        for request in self.held.held.values():
            assert request.state is State.TRYING
            assert request.op is not Op.READ
            assert request.drained
            self.deadlines[request.seq] = self.now

    @rule(
        reads=st.sampled_from([0, 1, 30, math.inf]),
        writes=st.sampled_from([2, 60, math.inf]),
        interval_s=st.sampled_from([0.5, 5]),
    )
    def set(self, reads: float, writes: float, interval_s: float) -> None:
        """io-hang-set: a deadline counts from where it counted, and who is past it is given up."""
        self.policy = dataclasses.replace(
            self.policy, timeout_s={Op.READ: reads, Op.WRITE: writes, Op.FSYNC: writes}, interval_s=interval_s
        )
        limited = {r.seq: r.limited_s for r in self.live.values() if r.deadline_s is not None and not r.ended}
        for seq, limited_s in limited.items():
            timeout_s = self.policy.timeout_s[self.live[seq].op]
            self.deadlines[seq] = limited_s + (timeout_s if timeout_s and self.held.holding else interval_s)
        self.take(self.held.set_policy(self.policy, self.now))
        self.check_deadlines()

    @rule()
    def end(self) -> None:
        """io-hang-fail."""
        self.operator = True
        sick = self.held.sick
        self.take(self.held.end(self.now))
        self.operator = False
        if sick:
            left = [r for r in self.live.values() if r.state is State.WAITING or r.op is Op.READ]
            assert not left
            for request in self.live.values():
                self.deadlines[request.seq] = self.now  # an operator's word does move a deadline

    @rule(room=st.booleans())
    def the_write_log_fills_or_empties(self, room: bool) -> None:  # noqa: FBT001 - hypothesis calls it
        """P10: writes wait while the write log is full, and nothing else does."""
        self.take(self.held.set_room(self.now, room=room))

    @rule(holding=st.booleans())
    def hold(self, holding: bool) -> None:  # noqa: FBT001 - hypothesis calls it
        """io-hang-pause and io-hang-unpause."""
        self.held.holding = holding

    @precondition(lambda self: not self.live and not self.probes)
    @rule()
    def close(self) -> None:
        """The image's last handle is closed, and it is opened again."""
        self.take(self.held.closed(self.now))
        assert not self.held.sick

    # ---- what holds always

    def check_deadlines(self) -> None:
        for request in self.live.values():
            if request.deadline_s is None:
                continue
            if request.seq not in self.deadlines:
                self.deadlines[request.seq] = request.deadline_s
                timeout_s = self.policy.timeout_s[request.op]
                if (
                    timeout_s and self.held.holding
                ):  # it counts from now: the first failure, or the joining of a sick image
                    assert request.deadline_s == self.now + timeout_s, "P1, P2"
            assert request.deadline_s == self.deadlines[request.seq], "P2: nothing moves a deadline"

    @invariant()
    def requests_and_attempts_are_accounted_for(self) -> None:
        """Each request is in one place, and each attempt in flight is counted once."""
        assert self.held.in_flight == len(self.flights)
        waiting, trying = self.held.waiting, self.held.trying
        assert {r.seq for r in waiting} | {r.seq for r in trying} == set(self.live)
        assert len(waiting) + len(trying) == len(self.live) == self.held._live
        assert all(request.seq in self.flights for request in trying)

    @invariant()
    def the_order_is_kept(self) -> None:
        """P4: what overlaps an earlier write that is not over waits for it, an fsync for all earlier ones; nothing else waits."""
        for seq, request in self.live.items():
            first, end, ordered = self.places[seq]
            waits = ordered and any(
                other.op is Op.WRITE
                and earlier < seq
                and (request.op is Op.FSYNC or (self.places[earlier][0] < end and first < self.places[earlier][1]))
                for earlier, other in self.live.items()
            )
            assert (seq in self.held._behind) == waits
            assert not (waits and request.attempts)

    @invariant()
    def deadlines_stay(self) -> None:
        """P2: every request has its own deadline; no other request's success or failure moves it."""
        self.check_deadlines()

    @invariant()
    def held_bytes_are_exact(self) -> None:
        """P10: what is held is accounted for, within the limit but for writes that do not return."""
        held = [r for r in self.held.held.values() if r.op is Op.WRITE]
        assert self.held_bytes.held == sum(r.length for r in held)
        if self.held_bytes.held > self.held_bytes.limit:
            in_flight_when_held = sum(r.length for r in held if r.attempts)
            assert in_flight_when_held > 0
        assert all(request.seq in self.live for request in self.held.held.values())

    @invariant()
    def hang_and_events_agree(self) -> None:
        """P9: a hang is the span in which a request is held, and it has said so."""
        assert self.held.hanging is self.hanging is bool(self.held.held)
        assert self.held.timed_out is self.timed_out
        assert self.held.gate_open or self.held.sick, "nothing would open the gate of a healthy image"

    @invariant()
    def every_wait_ends(self) -> None:
        """P8: no request waits without a deadline, and the timer is due no later than the next thing to do."""
        held = self.held
        if not held.sick:
            assert held._tick_s == math.inf
            return
        assert held.next_tick_s <= max(self.now, held._tick_s)
        assert held._tick_s < math.inf
        assert held._tick_s <= self.now + self.policy.interval_s
        for request in self.live.values():
            can_end = request.state is State.WAITING or (request.op is Op.READ and request.held)
            if request.state is State.WAITING:
                assert request.deadline_s is not None
            if can_end and request.deadline_s is not None:
                assert held.next_tick_s <= request.deadline_s

    @invariant()
    def room_is_used(self) -> None:
        """P8: nobody waits for a turn while there is room."""
        room = self.policy.share if self.held.gate_open else self.policy.recovery_gate
        if any(request.state is State.WAITING for _, _, request in self.held._ready):
            assert self.held.in_flight >= room

    @invariant()
    def queues_are_bounded(self) -> None:
        """P10: what has ended does not stay for long."""
        held = self.held
        queued = len(held._ready) + len(held._idle) + len(held._stubborn) + len(held._roomless)
        assert queued <= 2 * len(self.live) + 65
        assert len(held._deadlines) <= 2 * len(self.live) + 65

    def teardown(self) -> None:
        """P8: once the storage is back, every request finishes within a bounded number of ticks, whatever went before."""
        if not hasattr(self, "held"):
            return
        self.the_write_log_fills_or_empties(room=True)
        rounds = len(self.live) // self.policy.tick_budget + len(self.live) + 3
        before = sum(self.attempts.values())
        waiting = len(self.live)
        for _ in range(rounds):
            while self.flights:
                self.land_one(next(iter(self.flights)), 0)
            if self.probes:
                self.probe_lands(success=True)
            if not self.live and not self.held.sick:
                break
            assert self.held.sick
            self.advance(max(0.0, self.held.next_tick_s - self.now))
        assert not self.live
        assert not self.held.sick
        assert self.held.gate_open
        assert self.held.in_flight == 0
        assert self.held_bytes.held == 0
        assert sum(self.attempts.values()) - before <= waiting, "one attempt each is enough"


EXAMPLES = int(os.environ.get("IOHANG_MACHINE_EXAMPLES", "40"))
TestMachine = Machine.TestCase
TestMachine.settings = settings(
    max_examples=EXAMPLES,
    stateful_step_count=40,
    deadline=None,
    report_multiple_bugs=False,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
