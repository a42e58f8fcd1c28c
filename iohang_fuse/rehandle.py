"""Which requests may try, which are held, and what becomes of them.

1. Every decision about retrying is taken here, and nowhere else.
2. This module does not know the time (callers pass *now*, monotonic seconds), how an attempt is made, or who waits for
   the answer. Each call returns a `Step`: the events, and the requests that have to be woken.
3. One `RehandleList` per image. A request is WAITING, TRYING or ENDED; the transitions are `_start`, `_wait_again` and
   `_answer`.
4. A request has one deadline. It is set once, when the request first fails or has to wait in a sick image, and nothing
   but an operator moves it (P2).
5. Who has waited longest since arrival or last attempt goes first. So every wait for a turn ends: by age alone, eight
   bad sectors that fail slowly would keep the gate to themselves (P8). What a success of another sets free goes by age: each
   of these is tried once, and whoever fails again is stubborn (below).
6. Before its first attempt a request waits for its turn in the order of ordering.py; it gives its place up when it ends.
   Before each attempt a write also waits for room in the write log (`set_room`).
7. Each attempt that is started (TRYING) is reported exactly once: `succeeded`, `failed`, `returned` or `cancelled`.

How a hang goes. A transient failure closes the *recovery gate*: at most `recovery_gate` attempts of the image are in
flight. Each tick of the timer lets held requests try again. The first success opens the gate, and every held request is
tried at once.

A request that fails once more in its attempt after such a success is *stubborn*: a bad sector, or a flap. Successes of
others say nothing about it, so only the timer tries it again; otherwise every healthy read beside a bad sector would be
a retry. When a stubborn request does succeed, all others are tried again as well.
"""

from __future__ import annotations

import enum
import heapq
import math
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from iohang_fuse.events import Event, GivenUp, HangBegan, HangEnded, HeldLimitReached, Op, TimedOut
from iohang_fuse.ordering import Fences, Ordering, Turn
from iohang_fuse.tally import Tally

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

SHARE = 64
"""Attempts in flight for one image while it is healthy: enough to keep a network with 2 ms and 30,000 operations a second busy.
Where each is a thread, 70 images that all block at once stay within systemd's default TasksMax (4915); beyond that an attempt that
gets no thread fails with EAGAIN, which is held, and so TasksMax= has to be raised for more."""

TICK_BUDGET = 64
"""Held requests tried again per tick while the gate is closed: 10,000 held must not cost more than a few ms of CPU per
interval, and yet 60 bad sectors must not hide that the rest would succeed. Later ticks go on where this one stopped."""


class State(enum.Enum):
    """Where a request stands."""

    WAITING = enum.auto()
    TRYING = enum.auto()
    ENDED = enum.auto()


@dataclass(frozen=True, slots=True)
class Policy:
    """The part of the configuration that decisions need. Times in seconds; `errors` are errno numbers."""

    timeout_s: Mapping[Op, float]
    interval_s: float
    errors: frozenset[int]
    timeout_errno: int
    recovery_gate: int = 4
    blocked_after_s: float = 5.0
    share: int = SHARE
    tick_budget: int = TICK_BUDGET


@dataclass(slots=True)
class HeldBytes:
    """The memory that is held in all images together, against `held_limit` (P10). Only writes hold data."""

    limit: int
    held: int = 0

    def take(self, count: int, *, whatever_the_limit: bool = False) -> bool:
        """Account for *count* bytes of data, unless that would exceed the limit."""
        if self.held + count > self.limit and not whatever_the_limit:
            return False
        self.held += count
        return True

    def give_back(self, count: int) -> None:
        """*count* bytes of data are held no more."""
        self.held -= count


class Request:
    """One read, write or fsync, from its arrival to its answer."""

    # What most requests never change are the class's own: one is made for each request.
    state: State = State.WAITING
    attempts: int = 0
    started_s: float = 0.0  # of the latest attempt
    failed_s: float = -math.inf  # of the latest failure
    errno: int | None = None  # of the latest failure
    deadline_s: float | None = None
    limited_s: float = 0.0  # since when: of that much its timeout is counted
    held: bool = False
    freed: bool = False  # a success of another has let it try again, and it has not yet
    stubborn: bool = False
    own: bool = False  # the server's own sync: its error is nobody's answer
    drained: bool = False  # by an operator: its next failure is its answer
    ended: bool = False  # by an operator: no other word of his moves its deadline
    uncertain: bool = False  # a write of which an attempt has failed in a way that may still reach the file
    turn: Turn[Request] | None = None  # its place in the order
    answer: int | None = None  # the errno to answer, once ENDED by a give-up
    wake: Callable[[], None] | None = None  # the shell's: whoever waits for this request's next state
    aloft: bool = False  # the shell's: an attempt is inside a system call, or about to be

    def __init__(self, seq: int, op: Op, offset: int, length: int, arrived_s: float) -> None:
        self.seq = seq
        self.op = op
        self.offset = offset
        self.length = length
        self.arrived_s = arrived_s

    @property
    def waits_since_s(self) -> float:
        """When its latest attempt failed, or else when it arrived."""
        return max(self.arrived_s, self.failed_s)


@dataclass(slots=True)
class Step:
    """What a call has led to: events in order, requests to wake, and whether a probe is due."""

    events: list[Event] = field(default_factory=list)
    woken: list[Request] = field(default_factory=list)
    probe: bool = False


NOTHING = Step()
"""What most calls have led to. Nothing is ever added to it."""


class RehandleList:
    """All requests of one image that have been accepted and not yet answered."""

    def __init__(self, image: str, policy: Policy, held_bytes: HeldBytes, tally: Tally | None = None) -> None:
        self.image = image
        self.policy = policy
        self.holding = True  # off: every error is passed on
        self.timed_out = False
        self.unsynced = (
            False  # timed out, and a sync has failed: what the page cache takes and gives is no sign of life
        )
        self.gate_open = True
        self.held: dict[int, Request] = {}  # by seq, in the order in which they were first held
        self.errno: int | None = None  # of the image's latest failure
        self.offset = 0  # where that was: the probe reads there
        self.fences = Fences()
        self.room = True  # whether the write log takes more
        self.pressed = 0  # writes that had to wait for room in the write log, ever
        self._order: Ordering[Request] = Ordering()
        self._held_bytes = held_bytes
        self._tally = Tally() if tally is None else tally
        self._seq = 0
        self._trying: dict[int, Request] = {}  # by seq, oldest attempt first
        self._abandoned = 0  # reads answered while their attempt is still in the system call
        self._live = 0  # requests that have not ended
        # Requests that have ended stay in these until `_sweep`: removing each would cost a search.
        self._dead = 0
        self._behind: dict[int, Request] = {}  # by seq: its turn in the order has not come
        self._roomless: deque[Request] = deque()  # writes: until there is room in the write log
        self._ready: list[tuple[float, int, Request]] = []  # heap, longest waiting first: may try when there is room
        self._idle: deque[Request] = deque()  # failed, longest waiting first: until a success or the timer
        self._stubborn: deque[Request] = deque()  # the same, until the timer
        self._deadlines: list[tuple[float, int, Request]] = []  # heap
        self._success_s = -math.inf  # when the latest attempt that succeeded had begun
        self._sick_since_s = math.inf
        self._limit_reported_s = -math.inf
        self._tick_s = math.inf  # when the timer is due next
        self._probing = False
        self._drained_s = math.inf  # since when an operator wants an end of what is held, one way or the other
        self._hang: _Hang | None = None

    # ---- what the shell asks

    @property
    def hanging(self) -> bool:
        """True from the first held request until none is held any more."""
        return self._hang is not None

    @property
    def sick(self) -> bool:
        """Hanging, or timed out and not yet seen to work again."""
        return self._hang is not None or self.timed_out

    @property
    def since_s(self) -> float | None:
        """When the hang began that there is; None without one."""
        return None if self._hang is None else self._hang.since_s

    @property
    def in_flight(self) -> int:
        """Attempts inside a system call, those of already answered reads included."""
        return len(self._trying) + self._abandoned

    @property
    def waiting(self) -> list[Request]:
        """Requests outside a system call, oldest first."""
        queued = (*self._unstarted(), *self._idle, *self._stubborn)
        return sorted((r for r in queued if r.state is State.WAITING), key=lambda request: request.seq)

    @property
    def trying(self) -> list[Request]:
        """Requests inside a system call, oldest attempt first."""
        return [*self._trying.values()]

    @property
    def next_tick_s(self) -> float:
        """When `tick` has to be called next; infinity while there is nothing to wait for."""
        while self._deadlines and self._deadlines[0][2].state is State.ENDED:
            heapq.heappop(self._deadlines)
        return min(self._tick_s, self._deadlines[0][0]) if self._deadlines else self._tick_s

    def may_read_at_once(self, start: int, end: int) -> bool:
        """Whether a read of these bytes that takes no time needs no `arrive`: the image is well, and nothing is before it."""
        return self._hang is None and not self.timed_out and not self._order.obstructed(start, end)

    # ---- what happens to a request

    def arrive(
        self, op: Op, offset: int, length: int, now: float, *, end: float | None = None, ordered: bool = True
    ) -> tuple[Request, Step]:
        """A new request of *length* bytes, which concerns the file up to *end* (of a change of size: infinity).

        It may try at once (TRYING) as far as there is room; otherwise it waits its turn, or has its answer already. One that
        is not *ordered* waits for no other: the server's own sync, which has nothing to do but with what was acknowledged.
        """
        self._seq += 1
        self._live += 1
        request = Request(self._seq, op, offset, length, now)
        order, turn = self._order, None
        if not ordered:
            pass
        elif op is Op.WRITE:
            turn = order.write(request, offset, offset + length if end is None else end)
        elif order.writes:  # otherwise nobody waits for it, and it waits for nobody
            turn = order.sync(request) if op is Op.FSYNC else order.read(request, offset, offset + length)
        request.turn = turn
        behind = turn is not None and turn.waits
        slots = self.policy.share if self.gate_open else self.policy.recovery_gate
        if (
            not (behind or self._ready)
            and len(self._trying) + self._abandoned < slots
            and (self.room or self._has_room(request))
        ):
            # `_start`, without the call
            request.state = State.TRYING
            request.attempts = 1
            request.started_s = now
            self._trying[self._seq] = request
            return request, NOTHING
        step = Step()
        if behind:
            self._behind[request.seq] = request
        else:
            self._push_ready(request, request.waits_since_s)
            self._pump(now, step)
        if self.sick and request.state is State.WAITING:
            self._limit_wait(request, now)
            # With the gate open it waits for room, as on a healthy image. Held, it would keep the hang going: under load
            # there is always one that waits.
            if not self.gate_open:
                self._hold_waiting(request, now, step)
                self._pump(now, step)
        return request, step

    def succeeded(self, request: Request, now: float) -> Step:
        """The attempt of *request* has succeeded; it is answered by its own coroutine."""
        if request.state is State.ENDED:
            return self.returned(now)  # a read, given up in the moment in which its attempt returned
        del self._trying[request.seq]
        self._end(request)
        if not (self._ready or request.held or self._hang is not None or self.timed_out):
            return NOTHING
        step = Step()
        # What began before the trouble did says nothing about it, unless it was what had not returned.
        if self.sick and (request.held or request.started_s >= self._sick_since_s):
            self._recover(request.started_s, now, step, everyone=request.stubborn, synced=request.op is Op.FSYNC)
        if request.held:
            self._the_hang.recovered += not request.own
            self._tally.recovered += not request.own
            self._release(request, now, step)
        if self._ready:
            self._pump(now, step)
        return step

    def failed(self, request: Request, errno: int, now: float) -> Step:
        """The attempt of *request* has failed: it is held, given up or passed on."""
        if request.state is State.ENDED:
            return self.returned(now)
        step = Step()
        del self._trying[request.seq]
        request.errno = errno
        request.failed_s = now
        request.uncertain |= errno in self.policy.errors
        if errno not in self.policy.errors or not self._may_hold(request):
            self._pass_on(request, errno, now, step)
            self._pump(now, step)
            return step

        was_held = request.held
        self.errno, self.offset = errno, request.offset
        self.unsynced |= self.timed_out and request.op is Op.FSYNC
        closes_gate = request.started_s >= self._success_s and not request.stubborn
        request.stubborn = request.stubborn or request.freed
        request.freed = False
        if request.deadline_s is not None and now >= request.deadline_s:
            self._give_up(request, now, step, errno if request.drained else None)
        elif self.timed_out and not request.held:
            self._tally.passed_on += not request.own
            self._answer(request, self.policy.timeout_errno, now)
            self._tell_given_up(request, now, step)
        elif request.held or self._hold(request, now, step):
            self._wait_again(request)
        else:
            self._report_limit(errno, now, step)
            self._answer(request, errno, now)
        if closes_gate and self.sick:
            self.gate_open = False
        if request.started_s >= self._drained_s and was_held:
            self._end_drain(now, step)
        self._pump(now, step)
        return step

    def returned(self, now: float) -> Step:
        """An attempt has returned, or was never begun, whose read had been answered before (an abandoned one)."""
        step = Step()
        self._abandoned -= 1
        self._pump(now, step)
        return step

    def cancelled(self, request: Request, now: float, *, returned: bool) -> Step:
        """The coroutine of *request* is gone without an answer. Its attempt has *returned*, or `returned` will come."""
        if request.state is State.ENDED:
            return self.returned(now) if returned else Step()
        step = Step()
        if self._trying.pop(request.seq, None) is not None and not returned:
            self._abandoned += 1
        self._end(request)
        if request.held:
            self._release(request, now, step)
        self._pump(now, step)
        return step

    # ---- time and operators

    def tick(self, now: float) -> Step:
        """The timer: give up what is overdue, and let the held requests try again."""
        step = Step()
        self._notice_blocked(now, step)
        self._end_drain_behind_what_blocks(now, step)
        for request in self._overdue(now):
            if request.held or self._may_hold(request):
                self._give_up(request, now, step)
            else:
                self._pass_on(request, self.errno or self.policy.timeout_errno, now, step)
                step.woken.append(request)
        if now >= self._tick_s:
            missed = math.floor((now - self._tick_s) / self.policy.interval_s)
            self._tick_s += (missed + 1) * self.policy.interval_s
            budget = self.policy.tick_budget
            while budget and (failed := self._longer_waiting()):
                budget -= self._ready_again(failed.popleft())
            if self.timed_out and not self._probing and not self._is_probed_by_a_request():
                self._probing = step.probe = True
        self._pump(now, step)
        if not self.sick:
            self._tick_s = math.inf
        return step

    def _is_probed_by_a_request(self) -> bool:
        """What is held is tried each interval, and its success ends the time-out: of a sync's, that of a sync alone."""
        if not self.unsynced:
            return bool(self.held)
        return any(each.op is Op.FSYNC for each in (*self.held.values(), *self._trying.values()))

    def blocked(self, now: float) -> bool:
        """Whether an attempt has been in flight for `blocked_after` and is not held yet (a `hard` mount)."""
        for request in self._trying.values():
            if request.started_s + self.policy.blocked_after_s > now:
                return False
            if self._unnoticed(request):
                return True
        return False

    def probed(self, started_s: float, now: float, *, success: bool) -> Step:
        """The probe that a `Step` asked for has returned. While the image is `unsynced`, a sync is part of a *success*."""
        step = Step()
        self._probing = False
        if success:
            self._recover(started_s, now, step, everyone=False, synced=True)
            self._pump(now, step)
        return step

    def retry(self, now: float) -> Step:
        """An operator: try all held requests now, as far as the gate allows."""
        step = Step()
        while failed := self._longer_waiting():
            self._ready_again(failed.popleft())
        self._pump(now, step)
        return step

    def drain(self, now: float) -> Step:
        """An operator: try the oldest held requests now. If one fails, all held ones are answered with their errors.

        So they are at once where nothing can be tried, because attempts that do not return have the gate.
        """
        step = Step()
        if self.held:
            self._drained_s = now
            while failed := self._longer_waiting():
                self._ready_again(failed.popleft(), oldest_first=True)
            self._pump(now, step)
            self._end_drain_behind_what_blocks(now, step)
        return step

    def _end_drain_behind_what_blocks(self, now: float, step: Step) -> None:
        if self._drained_s < math.inf and all(
            now - request.started_s >= self.policy.blocked_after_s for request in self._trying.values()
        ):
            self._end_drain(now, step)

    def _end_drain(self, now: float, step: Step) -> None:
        self._drained_s = math.inf
        for request in [*self.held.values()]:
            errno = request.errno or self.errno or self.policy.timeout_errno
            if request.state is State.WAITING or request.op is Op.READ:
                self._give_up(request, now, step, errno)
            elif request.state is State.TRYING:
                request.drained = True
                self._end_on_return(request, now)

    @staticmethod
    def _end_on_return(request: Request, now: float) -> None:
        """Its deadline is now, which acts when the attempt returns (P5)."""
        request.limited_s = request.deadline_s = now
        request.ended = True

    def set_policy(self, policy: Policy, now: float) -> Step:
        """An operator: other timeouts or another interval. Deadlines that there are move; who is past it is given up."""
        self.policy = policy
        self._deadlines.clear()
        for request in (*self._trying.values(), *self.waiting):
            if request.deadline_s is not None and not request.ended:
                self._set_deadline(request)
        if self.sick:
            self._tick_s = min(self._tick_s, now + policy.interval_s)
        return self.tick(now)

    def end(self, now: float) -> Step:
        """An operator: answer every request of a sick image. Writes in flight end when their attempt returns (P5)."""
        step = Step()
        if not self.sick:
            return step  # all are about to be answered, and an error would be of our making
        for request in self.waiting:
            self._give_up(request, now, step)
        for request in [*self._trying.values()]:
            self._end_on_return(request, now)
            if request.op is Op.READ:
                self._give_up(request, now, step)
        self._pump(now, step)
        return step

    def set_room(self, now: float, *, room: bool) -> Step:
        """Whether the write log takes more. Writes wait until it does."""
        step = Step()
        self.room = room
        if room:
            while self._roomless:
                self._ready_again(self._roomless.popleft())
            self._pump(now, step)
        return step

    def no_room(self, errno: int, now: float) -> Step:
        """There will be no room: the writes that wait for it are answered with *errno*, which the sync has met."""
        step = Step()
        while self._roomless:
            request = self._roomless.popleft()
            if request.state is State.WAITING:
                self._pass_on(request, errno, now, step)
                step.woken.append(request)
        self._pump(now, step)
        return step

    def closed(self, now: float) -> Step:
        """The image's last handle is closed: nobody is left to notice whether it works again."""
        step = Step()
        if self.timed_out:
            self._leave_timed_out(now, step, closed=True)
        return step

    # ---- transitions

    @property
    def _slots(self) -> int:
        return self.policy.share if self.gate_open else self.policy.recovery_gate

    def _has_room(self, request: Request) -> bool:
        return self.room or request.op is not Op.WRITE or request.length == 0

    def _pump(self, now: float, step: Step) -> None:
        """Start what may start, oldest first."""
        while self._ready and self.in_flight < self._slots:
            request = heapq.heappop(self._ready)[2]
            if request.state is not State.WAITING:
                continue
            if self._has_room(request):
                self._start(request, now)
                step.woken.append(request)
            else:
                self.pressed += 1
                self._roomless.append(request)

    def _unstarted(self) -> list[Request]:
        """Those that wait, but not because they have failed; some may have ended."""
        return [*self._behind.values(), *self._roomless, *(entry[2] for entry in self._ready)]

    def _start(self, request: Request, now: float) -> None:
        request.state = State.TRYING
        request.attempts += 1
        request.started_s = now
        self._trying[request.seq] = request

    def _push_ready(self, request: Request, since_s: float) -> None:
        heapq.heappush(self._ready, (since_s, request.seq, request))

    def _ready_again(self, request: Request, *, oldest_first: bool = False) -> bool:
        """*oldest_first*: by arrival, and not by its latest attempt."""
        if request.state is State.WAITING:
            self._push_ready(request, request.arrived_s if oldest_first else request.waits_since_s)
        return request.state is State.WAITING

    def _wait_again(self, request: Request) -> None:
        request.state = State.WAITING
        (self._stubborn if request.stubborn else self._idle).append(request)

    def _longer_waiting(self) -> deque[Request] | None:
        """The one of the two queues of failed requests whose first has waited longer; None if both are empty."""
        queues = [queue for queue in (self._idle, self._stubborn) if queue]
        return min(queues, key=lambda queue: queue[0].failed_s, default=None)

    def _may_hold(self, request: Request) -> bool:
        return self.holding and self.policy.timeout_s[request.op] > 0

    def limit_wait(self, request: Request, now: float) -> None:
        """An attempt of *request* has begun, and waits before its system call, in a sick image: from now on with a deadline."""
        if request.state is State.TRYING and self._may_hold(request):
            self._limit_wait(request, now)

    def _limit_wait(self, request: Request, now: float) -> None:
        """Give *request* its deadline. One that may not be held does not wait longer than an interval for its turn."""
        if request.deadline_s is not None:
            return
        request.limited_s = now
        self._set_deadline(request)

    def _set_deadline(self, request: Request) -> None:
        wait_s = self.policy.timeout_s[request.op] if self._may_hold(request) else self.policy.interval_s
        if request.own and self._may_hold(request):
            wait_s = (
                math.inf
            )  # nobody waits for it, so nobody is to have its error: not even by a time-out of the image
        request.deadline_s = request.limited_s + wait_s
        if wait_s != math.inf:
            heapq.heappush(self._deadlines, (request.deadline_s, request.seq, request))

    def _hold(self, request: Request, now: float, step: Step, *, in_flight: bool = False) -> bool:
        """Hold *request*, unless the image is timed out or there is no room for its data (which an attempt in flight has)."""
        if self.timed_out or not self._may_hold(request):
            return False
        if request.op is Op.WRITE and not self._held_bytes.take(request.length, whatever_the_limit=in_flight):
            return False
        self._limit_wait(request, now)
        request.held = True
        self.held[request.seq] = request
        if self._hang is None:
            self._begin(request, now, step)
        self._the_hang.held_max = max(self._the_hang.held_max, len(self.held))
        return True

    def _hold_waiting(self, request: Request, now: float, step: Step) -> None:
        """Hold what has not failed itself; answer it where there is no room for its data."""
        if self.timed_out or not self._may_hold(request) or self._hold(request, now, step):
            return
        errno = self.errno or self.policy.timeout_errno
        self._report_limit(errno, now, step)
        self._answer(request, errno, now)
        step.woken.append(request)

    def _begin(self, request: Request, now: float, step: Step) -> None:
        self._hang = _Hang(since_s=now, errno=request.errno)
        self._tick_s = now + self.policy.interval_s
        self._sick_since_s = now
        assert request.deadline_s is not None
        step.events.append(HangBegan(self.image, request.op, request.errno, now, request.deadline_s, own=request.own))
        for waiting in sorted(self._unstarted(), key=lambda each: each.seq):
            if waiting.state is State.WAITING:
                self._limit_wait(waiting, now)
                self._hold_waiting(waiting, now, step)

    @property
    def _the_hang(self) -> _Hang:
        """The hang that there is while a request is held."""
        assert self._hang is not None
        return self._hang

    def _release(self, request: Request, now: float, step: Step) -> None:
        """*request* is held no more. The hang ends with the last one."""
        request.held = False
        del self.held[request.seq]
        if request.op is Op.WRITE:
            self._held_bytes.give_back(request.length)
        hang = self._the_hang
        if not self.held:
            self._hang = None
            self._drained_s = math.inf
            if not self.timed_out:
                self._tick_s = math.inf
                self.gate_open = True
            step.events.append(
                HangEnded(
                    self.image,
                    hang.errno,
                    now,
                    now - hang.since_s,
                    hang.held_max,
                    hang.recovered,
                    hang.given_up,
                    hang.passed_on,
                )
            )

    def _recover(self, started_s: float, now: float, step: Step, *, everyone: bool, synced: bool) -> None:
        """An attempt that began at *started_s* has succeeded: open the gate, and try again what failed before it."""
        self._success_s = max(self._success_s, started_s)
        self.gate_open = True
        self._drained_s = math.inf
        if self.timed_out and (synced or not self.unsynced):
            self._leave_timed_out(now, step)
        for queue in (self._idle, self._stubborn) if everyone else (self._idle,):
            while queue and queue[0].failed_s <= started_s:
                request = queue.popleft()
                request.freed = self._ready_again(request, oldest_first=not request.stubborn)

    def _leave_timed_out(self, now: float, step: Step, *, closed: bool = False) -> None:
        self.timed_out = self.unsynced = False
        if not self.held:
            self._tick_s = math.inf
            self.gate_open = True
        step.events.append(TimedOut(self.image, False, Op.READ, self.errno, now, len(self.held), closed))  # noqa: FBT003

    def _overdue(self, now: float) -> list[Request]:
        """Requests whose deadline has passed and that may be answered now.

        A write or fsync in flight may not (P5): `failed` looks at its deadline when the attempt returns.
        """
        overdue = []
        while self._deadlines and self._deadlines[0][0] <= now:
            request = heapq.heappop(self._deadlines)[2]
            may_be_abandoned = request.op is Op.READ and (request.held or self._may_hold(request))
            if request.state is State.WAITING or (request.state is State.TRYING and may_be_abandoned):
                overdue.append(request)
        return overdue

    def _give_up(self, request: Request, now: float, step: Step, errno: int | None = None) -> None:
        """Answer *request* with *errno*, or `timeout_errno`; the image's first give-up makes it timed out."""
        if self._trying.pop(request.seq, None) is not None:
            self._abandoned += 1
        self._tally.given_up += not request.own
        self.unsynced |= self.timed_out and request.op is Op.FSYNC and request.errno is not None
        self._answer(request, self.policy.timeout_errno if errno is None else errno, now)
        step.woken.append(request)
        if not self.timed_out:
            self.timed_out = True
            self.unsynced = any(each.op is Op.FSYNC and each.errno is not None for each in self.held.values())
            if self._hang is None:  # sick all the same: what waits here must not wait for ever
                self._sick_since_s = now
                for waiting in self._unstarted():
                    if waiting.state is State.WAITING:
                        self._limit_wait(waiting, now)
            if self._tick_s == math.inf:
                self._tick_s = now + self.policy.interval_s
            others = len(self.held) - request.held
            step.events.append(TimedOut(self.image, True, request.op, request.errno, now, others))  # noqa: FBT003
        else:
            self._tell_given_up(request, now, step)
        if request.held:
            self._the_hang.given_up += not request.own
            self._release(request, now, step)

    def _tell_given_up(self, request: Request, now: float, step: Step) -> None:
        """One event each: `TimedOut` tells of the image's first alone."""
        if request.own:
            return
        held_s = now - request.limited_s if request.held else 0.0
        answer = self.policy.timeout_errno if request.answer is None else request.answer
        step.events.append(
            GivenUp(self.image, request.op, request.errno, answer, now, held_s, request.offset, request.length)
        )

    def _pass_on(self, request: Request, errno: int, now: float, step: Step) -> None:
        self._tally.passed_on += not request.own
        self._answer(request, errno, now)
        if request.held:
            self._the_hang.passed_on += not request.own
            self._release(request, now, step)

    def _answer(self, request: Request, errno: int, now: float) -> None:
        if request.uncertain and request.op is Op.WRITE and request.turn is not None:
            self.fences.put(request.turn.start, request.turn.end, now)
        self._end(request)
        request.answer = errno

    def _end(self, request: Request) -> None:
        """*request* is over. Whose turn in the order has come is ready: the caller pumps."""
        request.state = State.ENDED
        if self._behind:
            self._behind.pop(request.seq, None)
        turn = request.turn
        if turn is not None:
            request.turn = None
            for next_one in self._order.leave(turn):
                if self._behind.pop(next_one.seq, None) is not None:
                    self._push_ready(next_one, next_one.waits_since_s)
        self._live -= 1
        self._dead += 1
        if self._dead > self._live + 64:
            self._sweep()

    def _sweep(self) -> None:
        """Drop what has ended from the queues: a few steps for each request, and at most half of what is kept is dead."""
        self._dead = 0
        for heap in (self._ready, self._deadlines):
            heap[:] = [entry for entry in heap if entry[2].state is not State.ENDED]
            heapq.heapify(heap)
        self._roomless = deque(r for r in self._roomless if r.state is not State.ENDED)
        self._idle = deque(r for r in self._idle if r.state is not State.ENDED)
        self._stubborn = deque(r for r in self._stubborn if r.state is not State.ENDED)

    def _notice_blocked(self, now: float, step: Step) -> None:
        for request in [*self._trying.values()]:
            if request.started_s + self.policy.blocked_after_s > now:
                break
            if self._unnoticed(request):
                self._limit_wait(request, now)
                self._hold(request, now, step, in_flight=True)
                if request.started_s >= self._success_s:
                    self.gate_open = False

    def _unnoticed(self, request: Request) -> bool:
        """Whether *request*, blocked, has yet to be held; or to get its deadline, where the image is timed out."""
        if request.held or not self._may_hold(request):
            return False
        return request.deadline_s is None or not self.timed_out

    def _report_limit(self, errno: int, now: float, step: Step) -> None:
        """A request is passed on because of `held_limit`."""
        self._tally.passed_on += 1
        self._tally.over_limit += 1
        if now - self._limit_reported_s >= 60:  # a message a minute: each failure beyond the limit comes here
            self._limit_reported_s = now
            step.events.append(HeldLimitReached(self.image, errno, now, self._held_bytes.held))


@dataclass(slots=True)
class _Hang:
    """What the end of a hang will say about it."""

    since_s: float
    errno: int | None
    held_max: int = 0
    recovered: int = 0
    given_up: int = 0
    passed_on: int = 0
