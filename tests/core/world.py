"""A rehandle list with what the shell is to it, in numbers: attempts that take their time, wake-ups, and the timer."""

from __future__ import annotations

import errno
import heapq
import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from iohang_fuse.events import Event, HangBegan, HangEnded, Op, TimedOut
from iohang_fuse.rehandle import HeldBytes, Policy, RehandleList, Request, State, Step

if TYPE_CHECKING:
    from collections.abc import Callable

NEVER = math.inf
TRANSIENT = frozenset({errno.EIO, errno.ETIMEDOUT, errno.ESTALE})


def policy(
    timeout_s: float = 60,
    *,
    read_s: float | None = None,
    write_s: float | None = None,
    fsync_s: float | None = None,
    interval_s: float = 5,
    timeout_errno: int = errno.EIO,
    recovery_gate: int = 4,
    blocked_after_s: float = 5,
    share: int = 16,
    tick_budget: int = 64,
) -> Policy:
    """The defaults of the interface; *timeout_s* for the kinds that have none of their own."""
    timeouts = {Op.READ: read_s, Op.WRITE: write_s, Op.FSYNC: fsync_s}
    return Policy(
        timeout_s={op: timeout_s if own is None else own for op, own in timeouts.items()},
        interval_s=interval_s,
        errors=TRANSIENT,
        timeout_errno=timeout_errno,
        recovery_gate=recovery_gate,
        blocked_after_s=blocked_after_s,
        share=share,
        tick_budget=tick_budget,
    )


@dataclass
class Storage:
    """How long an attempt takes, and its errno (0: it succeeds), by the request and the time at which it begins."""

    takes_s: Callable[[Request, float], float] = lambda _request, _now: 0.01
    errno: Callable[[Request, float], int] = lambda _request, _now: 0


def out_until(end_s: float, number: int = errno.EIO) -> Callable[[Request, float], int]:
    """An outage: everything that begins before *end_s* fails."""
    return lambda _request, now: number if now < end_s else 0


@dataclass
class World:
    """One image on a *storage*. `run` lets time pass; `answers` says when each request was answered, and with what."""

    policy: Policy = field(default_factory=policy)
    storage: Storage = field(default_factory=Storage)
    held_bytes: HeldBytes = field(default_factory=lambda: HeldBytes(1 << 30))
    now: float = 100.0
    events: list[Event] = field(default_factory=list)
    answers: dict[int, tuple[float, int]] = field(default_factory=dict)  # by seq: (when, errno or 0)
    attempts: int = 0
    begun: list[tuple[float, int]] = field(default_factory=list)  # (when, seq) of each attempt
    ticks: list[float] = field(default_factory=list)
    probes: list[float] = field(default_factory=list)
    failures_s: dict[int, float] = field(default_factory=dict)  # by seq: its first failed attempt

    def __post_init__(self) -> None:
        self.held = RehandleList("disk.img", self.policy, self.held_bytes)
        self._arrived = 0
        self._landings: list[tuple[float, int, Request | float, int]] = []

    def arrive(
        self,
        op: Op = Op.WRITE,
        length: int = 4096,
        offset: int | None = None,
        *,
        ordered: bool = False,
        own: bool = False,
    ) -> Request:
        """A new request now, which no other overlaps unless *offset* says so; an fsync waits for writes if *ordered*."""
        self._arrived += 1
        at = self._arrived << 20 if offset is None else offset
        request, step = self.held.arrive(op, at, length, self.now, ordered=ordered or op is not Op.FSYNC)
        request.own = own
        self._begin(request)
        self.do(step)
        return request

    def run(self, seconds: float = 0.0) -> None:
        """Let time pass, with every landing and tick at its moment."""
        end_s = self.now + seconds
        while True:
            tick_s = self.held.next_tick_s if self.held.sick else NEVER
            landing_s = self._landings[0][0] if self._landings else NEVER
            blocked_s = self._next_blocked_s()
            due_s = max(self.now, min(tick_s, landing_s, blocked_s))
            if due_s > end_s:
                break
            self.now = due_s
            if landing_s <= due_s:
                self._land()
            else:
                self.ticks.append(due_s)
                self.do(self.held.tick(due_s))
        self.now = end_s

    def do(self, step: Step, landed: Request | None = None) -> None:
        """What the shell does with a step, which the attempt of *landed* has led to."""
        self.events += step.events
        for request in step.woken:
            self._begin(request)
        for request in (*step.woken, *([landed] if landed else ())):
            if request.state is State.ENDED:
                self.answers.setdefault(request.seq, (self.now, request.answer or 0))
        if step.probe:
            self.probes.append(self.now)
            probe = Request(0, Op.READ, self.held.offset, 512, self.now)
            self._launch(probe, self.now)

    def of(self, kind: type) -> list[Event]:
        """The events of one kind."""
        return [event for event in self.events if isinstance(event, kind)]

    @property
    def edges(self) -> str:
        """Hangs and time-outs as a word: `(` a hang begins, `)` it ends, `!` timed out, `.` no more."""
        letters = {HangBegan: "(", HangEnded: ")"}
        return "".join(
            ("!" if event.on else ".") if isinstance(event, TimedOut) else letters.get(type(event), "")
            for event in self.events
        )

    def _begin(self, request: Request) -> None:
        if request.state is State.TRYING:
            self.attempts += 1
            self.begun.append((self.now, request.seq))
            self._launch(request, self.now)

    def _launch(self, request: Request, now: float) -> None:
        landing_s = now + self.storage.takes_s(request, now)
        if landing_s < NEVER:
            entry = (landing_s, len(self.begun) + len(self.probes), request, self.storage.errno(request, now))
            heapq.heappush(self._landings, entry)

    def _land(self) -> None:
        _, _, request, number = heapq.heappop(self._landings)
        assert isinstance(request, Request)
        if request.seq == 0:
            self.do(self.held.probed(request.arrived_s, self.now, success=not number))
        elif request.state is State.ENDED:
            self.do(self.held.returned(self.now))
        elif number:
            self.failures_s.setdefault(request.seq, self.now)
            self.do(self.held.failed(request, number, self.now), request)
        else:
            self.do(self.held.succeeded(request, self.now), request)

    def _next_blocked_s(self) -> float:
        """When the watch of `Requests.serve` finds an attempt that does not return."""
        for request in self.held.trying:
            at_s = max(self.now, request.started_s + self.policy.blocked_after_s)
            if self.held.blocked(at_s):
                return at_s
        return NEVER
