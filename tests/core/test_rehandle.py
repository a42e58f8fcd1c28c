"""The rehandle list: who is held, who tries next, who is given up. Each docstring quotes the promise that its test proves."""

from __future__ import annotations

import errno
import math
import time
from typing import TYPE_CHECKING

import pytest

from iohang_fuse.events import HangBegan, HangEnded, HeldLimitReached, Op, TimedOut
from iohang_fuse.rehandle import HeldBytes, RehandleList, Request, State
from tests.core.world import NEVER, Storage, World, out_until, policy

if TYPE_CHECKING:
    from collections.abc import Callable

EIO, ENOSPC, EACCES = errno.EIO, errno.ENOSPC, errno.EACCES
KINDS = pytest.mark.parametrize("op", list(Op))


def fails_always(_request: Request, _now: float) -> int:
    return EIO


def takes(seconds: float) -> Callable[[Request, float], float]:
    return lambda _request, _now: seconds


def queued(held: RehandleList) -> int:
    return len(held._ready) + len(held._idle) + len(held._stubborn) + len(held._deadlines)


# ---- P1: masking


@KINDS
def test_a_failure_within_the_timeout_is_never_seen(op: Op) -> None:
    """P1: a request that meets a transient error is answered only when it succeeds, or when its timeout has passed."""
    world = World(storage=Storage(errno=out_until(140)))
    request = world.arrive(op)
    world.run(39)
    assert request.seq not in world.answers
    world.run(10)
    when, answer = world.answers[request.seq]
    assert answer == 0
    assert 140 <= when <= 140 + 5 + 0.01  # one interval at most after the storage is back


@KINDS
def test_the_timeout_counts_from_the_first_failed_attempt(op: Op) -> None:
    """P1: the timeout counts from its first failed attempt, be that 4 s after the arrival."""
    world = World(storage=Storage(takes_s=lambda _r, now: 4 if now < 104 else 0.01, errno=fails_always))
    request = world.arrive(op)
    world.run(4)
    assert request.deadline_s == 104 + 60
    world.run(59.9)
    assert request.state is not State.ENDED
    world.run(0.2)
    assert world.answers[request.seq] == (164, EIO)


@pytest.mark.parametrize("takes_s", [1 / 64, 2, 7, 92])
def test_a_thousand_held_requests_all_end_within_the_bound(takes_s: float) -> None:
    """P1: the bound is timeout + at most one attempt, also with 1,000 requests held and attempts that take seconds to fail."""
    world = World(storage=Storage(takes_s=takes(takes_s), errno=fails_always))
    requests = []
    for number in range(1000):
        requests.append(world.arrive([Op.READ, Op.WRITE, Op.FSYNC][number % 3]))
        world.run(1 / 64)
    world.run(60 + 3 * 92)
    for request in requests:
        when, answer = world.answers[request.seq]
        assert answer == EIO
        if request.deadline_s is None:  # its first failure met an image that was timed out already: answered at once
            assert when == world.failures_s[request.seq]
            continue
        assert request.deadline_s <= when <= request.deadline_s + takes_s
        assert request.arrived_s <= request.deadline_s - 60 <= world.failures_s.get(request.seq, math.inf)
    assert world.held_bytes.held == 0
    assert world.held.in_flight == 0


@pytest.mark.parametrize("op", [Op.WRITE, Op.FSYNC])
def test_a_write_in_flight_is_not_given_up(op: Op) -> None:
    """P1: a write or fsync is never given up while an attempt of its own is in flight; nor does it need a last one."""
    world = World(storage=Storage(takes_s=lambda _r, now: 0.01 if now < 150 else 30, errno=fails_always))
    request = world.arrive(op)
    world.run(155)
    begun_s = max(when for when, _ in world.begun)
    assert 150 <= begun_s < 160.01 < begun_s + 30  # its deadline was in the middle of the attempt
    assert world.answers[request.seq] == (begun_s + 30, EIO)
    assert [when for when, _ in world.begun if when > 160.01] == []


def test_a_write_in_flight_at_its_deadline_may_still_succeed() -> None:
    """P1: answered when it succeeds: what comes back from a late attempt is the truth, deadline or not."""
    slow_success = Storage(takes_s=lambda _r, now: 0.01 if now < 155 else 30, errno=out_until(155))
    world = World(storage=slow_success)
    request = world.arrive(Op.WRITE)
    world.run(100)
    when, answer = world.answers[request.seq]
    assert (answer, when > 160.01) == (0, True)
    assert world.edges == "()"


def test_a_read_in_flight_is_given_up_at_its_deadline() -> None:
    """P1, P5: a read may be given up in flight; its attempt counts until it has returned."""
    world = World(storage=Storage(takes_s=lambda _r, now: 0.01 if now < 155 else 30, errno=fails_always))
    request = world.arrive(Op.READ)
    world.run(62)
    assert world.answers[request.seq] == (160.01, EIO)
    assert world.held.in_flight == 1
    world.run(30)
    assert world.held.in_flight == 0


@KINDS
def test_an_error_that_is_not_transient_is_passed_on(op: Op) -> None:
    """Section 4: never EINVAL, EBADF, EACCES...: passed on at once, no hang, no event."""
    world = World(storage=Storage(errno=lambda _r, _now: EACCES))
    request = world.arrive(op)
    world.run(1)
    assert world.answers[request.seq] == (100.01, EACCES)
    assert world.events == []
    assert world.held.gate_open


def test_a_retry_that_meets_another_error_ends_with_it() -> None:
    """A held request whose retry meets an error that is not transient is passed that error; the hang's end says so."""
    world = World(storage=Storage(errno=lambda _r, now: EIO if now < 103 else EACCES))
    request = world.arrive(Op.WRITE)
    world.run(20)
    assert world.answers[request.seq] == pytest.approx((105.02, EACCES))
    assert world.edges == "()"
    ended = world.events[-1]
    assert isinstance(ended, HangEnded)
    assert (ended.held_max, ended.recovered, ended.given_up, ended.passed_on) == (1, 0, 0, 1)
    assert world.held_bytes.held == 0


def test_timeout_errno_is_what_a_given_up_request_gets() -> None:
    """Section 4: `timeout_errno` chooses the answer: ENOSPC makes an unmodified QEMU pause its guest."""
    world = World(policy(timeout_errno=ENOSPC), Storage(errno=fails_always))
    held = world.arrive(Op.WRITE)
    world.run(62)
    late = world.arrive(Op.WRITE)
    world.run(1)
    assert world.answers[held.seq] == (160.01, ENOSPC)
    assert world.answers[late.seq] == (162.01, ENOSPC)


# ---- timeout=0 and inf


def test_timeout_0_passes_every_error_on() -> None:
    """Section 4: `0` turns holding off: every error is passed on, nothing hangs, the gate stays open."""
    world = World(policy(0), Storage(errno=fails_always))
    requests = [world.arrive([*Op][number % 3]) for number in range(100)]
    world.run(1)
    assert {world.answers[r.seq][1] for r in requests} == {EIO}
    assert world.attempts == 100
    assert world.events == []
    assert world.held.gate_open


def test_timeout_0_for_one_kind_passes_that_kind_on() -> None:
    """P2: read, write and fsync may each have their own timeout: reads fail at once while a write is held."""
    world = World(policy(60, read_s=0), Storage(errno=fails_always))
    write = world.arrive(Op.WRITE)
    world.run(1)
    read = world.arrive(Op.READ)
    world.run(1)
    assert world.answers == {read.seq: (101.01, EIO)}
    assert write.held


def test_what_may_not_be_held_does_not_wait_behind_what_is() -> None:
    """P8: no request waits without a bound: with its timeout 0, a read waits for its turn at a full gate an interval at most."""
    world = World(policy(math.inf, read_s=0), Storage(takes_s=takes(92), errno=fails_always))
    for _ in range(100):
        world.arrive(Op.WRITE)
    world.run(93)
    read = world.arrive(Op.READ)
    world.run(6)
    assert world.answers[read.seq] == (198, EIO)
    assert not world.held.timed_out
    assert world.edges == "("


def test_inf_holds_until_recovery() -> None:
    """P8: with `timeout=inf` a request is held until the storage is back, be that a week."""
    week_s = 7 * 86400.0
    world = World(policy(math.inf, interval_s=300), Storage(errno=out_until(week_s)))
    requests = [world.arrive(op) for op in Op]
    world.run(week_s + 300)
    assert [world.answers[r.seq][1] for r in requests] == [0, 0, 0]
    assert world.edges == "()"


# ---- P2: per request, per kind


def test_each_request_and_each_kind_has_its_own_deadline() -> None:
    """P2: every request has its own deadline; read, write and fsync may each have their own timeout."""
    world = World(policy(read_s=10, write_s=20, fsync_s=30), Storage(errno=fails_always))
    requests = [world.arrive(op) for op in (Op.READ, Op.WRITE, Op.FSYNC)]
    world.run(3)
    requests += [world.arrive(op) for op in (Op.READ, Op.WRITE, Op.FSYNC)]
    world.run(60)
    ended = [round(world.answers[r.seq][0], 2) for r in requests]
    assert ended == [110.01, 120.01, 130.01, 113.01, 123.01, 133.01]


def test_the_success_of_another_does_not_move_a_deadline() -> None:
    """P2: no other request's success or failure moves it: a bad sector beside a healthy load is given up on time."""
    world = World(storage=Storage(errno=lambda request, _now: EIO if request.offset == 7 else 0))
    bad = world.arrive(Op.READ, offset=7)
    for number in range(700):
        world.arrive(Op.READ, offset=100 + number)
        world.run(0.1)
    assert world.answers.pop(bad.seq) == (160.01, EIO)
    assert {answer for _, answer in world.answers.values()} == {0}


# ---- P8: every wait ends


def test_a_request_that_waits_at_the_gate_has_a_deadline_from_its_arrival() -> None:
    """P8: no request waits without a deadline: one that finds the gate full has its own from when it joined the list."""
    world = World(storage=Storage(takes_s=takes(NEVER)))
    for _ in range(16):
        world.arrive(Op.WRITE)
    world.run(10)
    waiting = world.arrive(Op.WRITE)
    assert (waiting.state, waiting.deadline_s, waiting.held) == (State.WAITING, 170, True)
    world.run(61)
    assert world.answers == {waiting.seq: (170, EIO)}


def test_what_waited_for_room_when_the_hang_began_is_held_too() -> None:
    """P8: those that waited behind 16 attempts which do not return get their deadlines when the hang begins."""
    world = World(storage=Storage(takes_s=takes(NEVER)))
    requests = [world.arrive(Op.WRITE) for _ in range(40)]
    world.run(5)
    assert {r.deadline_s for r in requests} == {165}
    assert len(world.held.held) == 40
    world.run(60)
    assert len(world.answers) == 24  # the other 16 are writes in flight


@pytest.mark.parametrize("bad", [5, 8, 100, 1000])
@pytest.mark.parametrize("takes_s", [0.01, 7])
def test_bad_sectors_do_not_hide_the_recovery(bad: int, takes_s: float) -> None:
    """P8: every wait ends: what would succeed gets its turn, also behind older requests that always fail, and slowly."""
    storage = Storage(
        takes_s=lambda request, _now: takes_s if request.offset == 7 else 0.01,
        errno=lambda request, now: EIO if request.offset == 7 or now < 110 else 0,
    )
    world = World(policy(math.inf), storage)
    for _ in range(bad):
        world.arrive(Op.READ, offset=7)
    good = [world.arrive(Op.WRITE) for _ in range(50)]
    world.run(10 + 5 * (2 + bad / 64) + takes_s * (2 + bad / 4))
    assert [r.state for r in good] == [State.ENDED] * 50


@pytest.mark.parametrize("order", ["oldest", "youngest", "every other"])
def test_all_held_requests_finish_soon_after_the_recovery(order: str) -> None:
    """Section 4: the first success opens the gate and all held requests are tried at once, whatever flapped before."""

    def flapping(request: Request, now: float) -> int:
        lucky = {"oldest": request.seq <= 500, "youngest": request.seq > 500, "every other": request.seq % 2}[order]
        return 0 if now > 120 or (lucky and 110 < now < 112) else EIO

    world = World(storage=Storage(errno=flapping))
    for _ in range(1000):
        world.arrive(Op.WRITE)
    world.run(20 + 5 + 1000 / 16 * 0.02)
    assert world.edges == "()"
    assert {answer for _, answer in world.answers.values()} == {0}
    assert len(world.answers) == 1000


def test_reads_that_succeed_while_writes_fail_are_no_retry_storm() -> None:
    """P8: attempts stay bounded: a success frees each failed request once; what fails again waits for the timer."""
    storage = Storage(errno=lambda request, _now: EIO if request.op is Op.WRITE else 0)
    world = World(storage=storage)
    writes = [world.arrive(Op.WRITE) for _ in range(500)]
    reads = 0
    for _ in range(3000):  # 30 s of reads, one at a time
        world.arrive(Op.READ)
        reads += 1
        world.run(0.01)
    retries = world.attempts - reads - len(writes)
    by_success, by_timer = 500, 64 * (30 // 5)
    assert retries <= by_success + by_timer
    assert sum(answer == 0 for _, answer in world.answers.values()) >= reads - 8  # and the reads are not hindered


def test_a_flap_among_stubborn_requests_is_no_retry_storm() -> None:
    """P8: attempts stay bounded when one half of many stubborn requests recovers and the other does not."""
    healed = [120.0]
    storage = Storage(errno=lambda request, now: EIO if request.seq % 2 or now < healed[0] else 0)
    world = World(storage=storage)
    for _ in range(1000):
        world.arrive(Op.WRITE)
    world.run(1)
    for request in world.held.waiting:  # as after a flap
        request.stubborn = True
    world.held._stubborn.extend(world.held._idle)
    world.held._idle.clear()
    world.run(18)
    before = world.attempts
    world.run(10)
    assert len(world.answers) == 500
    assert world.attempts - before <= 500 + 4 * 500


def test_the_hang_ends_under_load() -> None:
    """P9: a hang ends when no request is held any more, although under load there is always one that waits its turn."""
    world = World(storage=Storage(errno=out_until(110)))
    depth = 48  # three times what may be in flight
    for _ in range(depth):
        world.arrive(Op.WRITE)
    done = 0
    for _ in range(4000):
        world.run(0.005)
        for _ in range(len(world.answers) - done):  # the guest sends the next one for each that is answered
            world.arrive(Op.WRITE)
            done += 1
    assert world.edges == "()"
    ended = world.of(HangEnded)[0]
    assert isinstance(ended, HangEnded)
    assert 110 < ended.at_s < 116
    assert ended.recovered <= 2 * depth
    assert done > 10_000


def test_operators_retry_acts_at_once() -> None:
    """Section 4: an operator's `retry` acts at once, as far as the gate allows, stubborn requests included."""
    world = World(storage=Storage(errno=fails_always))
    for _ in range(10):
        world.arrive(Op.WRITE)
    world.run(1)
    before = world.attempts
    world.do(world.held.retry(world.now))
    assert world.attempts - before == 4
    world.run(1)
    assert world.attempts - before == 10


def test_an_operator_can_end_all_held_requests() -> None:
    """P8: an operator can end any of them sooner; writes in flight end when their attempt returns (P5), reads at once."""
    world = World(policy(math.inf), Storage(takes_s=lambda _r, now: 0.01 if now < 105 else 30, errno=fails_always))
    writes = [world.arrive(Op.WRITE) for _ in range(4)]
    reads = [world.arrive(Op.READ) for _ in range(4)]
    world.run(6)
    assert {r.state for r in writes} == {State.TRYING}
    world.do(world.held.end(world.now))
    assert {world.answers[r.seq] for r in reads} == {(106, EIO)}
    world.run(30)
    assert {world.answers[r.seq][1] for r in writes} == {EIO}
    assert [world.answers[r.seq][0] for r in writes] == pytest.approx([135.01] * 4)
    assert world.edges == "(!)"


def test_ending_the_requests_of_a_healthy_image_ends_nothing() -> None:
    """P1: nothing is held there, so there is nothing to end; its requests are about to be answered."""
    world = World()
    requests = [world.arrive(Op.READ) for _ in range(20)]
    world.do(world.held.end(world.now))
    world.run(1)
    assert [world.answers[r.seq][1] for r in requests] == [0] * 20
    assert world.events == []


def test_a_drain_that_fails_answers_all_with_their_errors() -> None:
    """Section 2: "if they fail all of the image's held requests are answered with their errors", and not `timeout_errno`."""
    world = World(policy(math.inf, timeout_errno=ENOSPC), Storage(errno=lambda _r, _now: errno.ETIMEDOUT))
    requests = [world.arrive(op) for op in (Op.WRITE, Op.READ) * 20]
    world.run(1)
    before = world.attempts
    world.do(world.held.drain(world.now))
    assert world.attempts - before == 4, "through the gate"
    assert not world.answers
    world.run(1)
    assert {answer for _, answer in world.answers.values()} == {errno.ETIMEDOUT}
    assert len(world.answers) == len(requests)
    assert world.edges == "(!)"


def test_a_drain_that_succeeds_answers_nobody_with_an_error() -> None:
    """Section 2: "the oldest held requests are tried at once, through the gate; if they succeed so are the others"."""
    world = World(policy(math.inf), Storage(errno=out_until(102)))
    requests = [world.arrive(Op.WRITE) for _ in range(40)]
    world.run(2)
    world.do(world.held.drain(world.now))
    world.run(0.5)
    assert [world.answers[request.seq][1] for request in requests] == [0] * 40
    assert world.edges == "()"
    again = world.arrive(Op.WRITE)
    world.storage.errno = fails_always
    later = world.arrive(Op.WRITE)
    world.run(1)
    assert (again.state, later.state) == (State.ENDED, State.WAITING), "what fails later is held as ever"


def test_a_drain_behind_attempts_that_do_not_return_ends_what_can_be_ended() -> None:
    """P8, P5: nothing can be tried, so it fails; writes inside a system call are answered when that returns."""
    world = World(policy(math.inf), Storage(takes_s=takes(50), errno=fails_always))
    writes = [world.arrive(Op.WRITE) for _ in range(4)]
    world.run(10)
    late = [world.arrive(Op.READ) for _ in range(10)]
    world.run(1)
    world.do(world.held.drain(world.now))
    assert {world.answers[request.seq] for request in late} == {(111, EIO)}
    assert not any(request.seq in world.answers for request in writes)
    world.run(60)
    assert [world.answers[request.seq] for request in writes] == [(150, EIO)] * 4


def test_a_drain_ends_though_what_it_tries_does_not_return() -> None:
    """P8: whoever wants an end of it gets one, `blocked_after` after the attempts that decide have begun."""
    world = World(policy(math.inf), Storage(errno=fails_always))
    requests = [world.arrive(Op.READ) for _ in range(6)]
    world.run(1)
    world.storage.takes_s = takes(10_000)
    world.do(world.held.drain(world.now))
    assert not world.answers
    world.run(11)
    assert {world.answers[request.seq][1] for request in requests} == {EIO}
    assert world.held.held == {}


def test_a_drain_is_decided_by_what_is_held_and_tried_since() -> None:
    """Section 2: "the oldest held requests are tried": what began before, or is refused for its own reasons, says nothing."""
    world = World(policy(math.inf), Storage(errno=fails_always))
    held = world.arrive(Op.WRITE)
    world.run(1)
    world.storage.takes_s, world.storage.errno = takes(1), lambda request, _now: EACCES if request.op is Op.READ else 0
    world.arrive(Op.READ)
    world.run(0.5)
    world.do(world.held.drain(world.now))
    world.run(0.75)
    assert held.seq not in world.answers
    world.run(1)
    assert world.answers[held.seq][1] == 0


@pytest.mark.parametrize("order", ["drain", "end"])
def test_a_later_timeout_takes_no_end_back(order: str) -> None:
    """P8: what an operator has ended is answered when its attempt returns, whatever he sets afterwards."""
    world = World(policy(math.inf), Storage(takes_s=takes(50), errno=fails_always))
    write = world.arrive(Op.WRITE)
    world.run(10)
    world.do(getattr(world.held, order)(world.now))
    world.do(world.held.set_policy(policy(math.inf), world.now))
    world.run(60)
    assert world.answers[write.seq] == (150, EIO)


def test_a_deadline_that_an_operator_moves_counts_from_where_it_counted() -> None:
    """io-hang-set: longer, for ever, and back; who is past it by then is given up at once."""
    world = World(policy(60), Storage(errno=fails_always))
    request = world.arrive(Op.WRITE)
    read = world.arrive(Op.READ)
    world.run(50)
    world.do(world.held.set_policy(policy(60, write_s=math.inf), world.now))
    world.run(20)
    assert world.answers[read.seq] == pytest.approx((160.01, EIO))
    world.run(1000)
    assert request.state is not State.ENDED
    world.do(world.held.set_policy(policy(1100), world.now))
    world.run(29)
    assert request.state is not State.ENDED
    world.run(2)
    assert world.answers[request.seq] == pytest.approx((1200.01, EIO))
    world.do(world.held.set_policy(policy(5, interval_s=1), world.now))
    assert world.held.next_tick_s <= world.now + 1


def test_without_holding_errors_are_passed_on() -> None:
    """The end of the server: holding is off, so every later error is passed on as it is; deadlines stay."""
    world = World(storage=Storage(errno=fails_always))
    held = world.arrive(Op.WRITE)
    world.run(1)
    world.held.holding = False
    late = world.arrive(Op.WRITE)
    world.run(10)
    assert world.answers[late.seq] == pytest.approx((101.01, EIO))
    assert world.answers[held.seq] == pytest.approx((105.02, EIO))
    assert world.edges == "()"


def test_an_image_timed_out_without_a_hang_leaves_nobody_waiting() -> None:
    """P8: a request whose deadline comes from an earlier hang may be the first given up: what waits then has its deadline."""
    held = RehandleList("disk.img", policy(1, share=2, recovery_gate=1), HeldBytes(10**6))
    first, _ = held.arrive(Op.WRITE, 1048576, 512, 100)
    held.failed(first, EIO, 100)
    healthy, _ = held.arrive(Op.READ, 2097152, 512, 100)
    held.succeeded(healthy, 100.25)  # the gate opens: *first* tries again
    held.arrive(Op.READ, 3145728, 512, 100.25)
    late, _ = held.arrive(Op.FSYNC, 0, 0, 100.25, ordered=False)
    assert (late.state, late.held, late.deadline_s) == (State.WAITING, False, 101.25)
    held.succeeded(first, 100.5)  # the hang is over: *late* has its turn
    waiting, _ = held.arrive(Op.READ, 4194304, 512, 100.5)
    assert (waiting.state, waiting.deadline_s, held.sick) == (State.WAITING, None, False)
    assert [type(event) for event in held.failed(late, EIO, 103).events] == [TimedOut]
    assert (waiting.state, waiting.deadline_s, held.sick) == (State.WAITING, 104, True)
    assert held.next_tick_s == 104


def test_operators_retry_includes_stubborn_requests() -> None:
    """Section 4: an operator's `retry` acts at once, also on what only the timer would try again."""
    world = World(storage=Storage(errno=lambda request, _now: EIO if request.op is Op.WRITE else 0))
    bad = world.arrive(Op.WRITE)
    world.run(0.1)
    world.arrive(Op.READ)
    world.run(1)
    assert bad.stubborn
    before = bad.attempts
    world.do(world.held.retry(world.now))
    assert bad.attempts == before + 1


# ---- P9: one begin, one end


def test_one_begin_and_one_end_per_hang() -> None:
    """P9: a hang gives one begin event and one end event, however many requests and retries it has."""
    world = World(storage=Storage(errno=lambda _r, now: EIO if now < 120 or 200 < now < 220 else 0))
    for _ in range(100):
        world.arrive(Op.WRITE)
        world.run(0.05)
    world.run(95)
    world.now = 201
    for _ in range(100):
        world.arrive(Op.READ)
    world.run(30)
    assert world.edges == "()()"
    first, second = world.of(HangEnded)
    assert world.of(HangBegan)[0] == HangBegan("disk.img", Op.WRITE, EIO, 100.01, 160.01)
    assert isinstance(first, HangEnded)
    assert isinstance(second, HangEnded)
    assert (first.held_max, first.recovered, first.given_up, first.passed_on) == (100, 100, 0, 0)
    assert (second.errno, second.held_max, second.recovered) == (EIO, 100, 100)


def test_the_end_of_a_hang_counts_how_each_request_ended() -> None:
    """P9: one end event, with the count of those that recovered and of those that were given up."""
    world = World(policy(read_s=10, write_s=60), Storage(errno=out_until(130)))
    for number in range(30):
        world.arrive(Op.READ if number % 3 else Op.WRITE)
    world.run(60)
    assert world.edges == "(!.)"
    ended = world.of(HangEnded)[0]
    assert isinstance(ended, HangEnded)
    assert (ended.held_max, ended.recovered, ended.given_up, ended.passed_on) == (30, 10, 20, 0)


# ---- timed out


def test_the_first_give_up_makes_the_image_timed_out() -> None:
    """Section 4: after the first give-up, requests held keep their own deadlines, and new failures are answered at once."""
    world = World(storage=Storage(errno=fails_always))
    first = world.arrive(Op.WRITE)
    world.run(20)
    second = world.arrive(Op.WRITE)
    world.run(50)
    assert world.held.timed_out
    assert world.of(TimedOut) == [TimedOut("disk.img", on=True, op=Op.WRITE, errno=EIO, at_s=160.01, held=1)]
    late = world.arrive(Op.WRITE)
    world.run(1)
    assert world.answers[late.seq] == (170.01, EIO)
    assert late.deadline_s is None
    world.run(10)
    assert world.answers[first.seq][0] == 160.01
    assert world.answers[second.seq][0] == 180.01
    assert world.edges == "(!)"


def test_a_probe_goes_on_each_interval_and_its_success_ends_it() -> None:
    """Section 4: until an attempt succeeds; a probe goes on each interval so that this is noticed."""
    world = World(storage=Storage(errno=out_until(182)))
    world.arrive(Op.WRITE)
    world.run(100)
    assert world.probes == pytest.approx([160.01, 165.01, 170.01, 175.01, 180.01, 185.01])
    assert world.edges == "(!)."
    assert not world.held.sick
    assert world.held.gate_open
    assert world.held.next_tick_s == math.inf


def test_one_probe_at_a_time() -> None:
    """P10: a probe that does not return (a `hard` mount) is not followed by another thread each interval."""
    world = World(storage=Storage(takes_s=lambda r, _now: NEVER if r.seq == 0 else 0.01, errno=fails_always))
    world.arrive(Op.WRITE)
    world.run(3600)
    assert len(world.probes) == 1


def test_any_success_ends_the_timed_out_state() -> None:
    """Section 4: the first attempt that succeeds ends it, a new request's as well as a held one's; later failures are held."""
    world = World(storage=Storage(errno=lambda _r, now: EIO if now < 161 or now > 163 else 0))
    world.arrive(Op.WRITE)
    world.run(62)
    world.arrive(Op.READ)
    world.run(2)
    assert world.edges == "(!)."
    held = world.arrive(Op.WRITE)
    world.run(30)
    assert held.held
    assert world.edges == "(!).("


def test_what_the_page_cache_takes_ends_no_time_out_by_a_sync() -> None:
    """Section 4, "until an attempt succeeds": that of a sync, where a sync was given up. Others may have met the page cache."""
    world = World(storage=Storage(errno=lambda r, now: EIO if (r.op is Op.FSYNC and now < 200) or r.seq == 0 else 0))
    world.arrive(Op.FSYNC)
    world.run(62)
    for op in (Op.WRITE, Op.READ):
        world.arrive(op)
    world.run(5)
    assert world.edges == "(!)"
    again = world.arrive(Op.FSYNC)
    world.run(1)
    assert world.answers[again.seq][1] == EIO, "at once: it was not held anew"
    world.run(50)
    assert world.edges == "(!)"
    world.arrive(Op.FSYNC)
    world.run(1)
    assert world.edges == "(!)."


def test_a_sync_that_fails_later_counts_as_well() -> None:
    """A write was given up first, and a sync fails then: the next write says nothing any more; the probe does, which has synced."""
    world = World(storage=Storage(errno=lambda r, now: EIO if now < 161 or (now < 180 and r.op is not Op.WRITE) else 0))
    world.arrive(Op.WRITE)
    world.run(60.5)
    world.arrive(Op.FSYNC)
    world.run(2)
    world.arrive(Op.WRITE)
    world.run(5)
    assert world.edges == "(!)"
    world.run(20)
    assert world.edges == "(!)."


def test_a_sync_that_waited_for_what_was_given_up_counts_as_well() -> None:
    """It was held, and had not failed yet, when the image was timed out by the write before it."""
    world = World(
        policy=policy(write_s=20, fsync_s=60),
        storage=Storage(errno=lambda r, _now: EIO if r.op is Op.FSYNC or r.seq in {0, 1} else 0),
    )
    world.arrive(Op.WRITE)
    world.run(1)
    world.arrive(Op.FSYNC, ordered=True)
    world.run(25)
    assert world.held.timed_out
    world.run(60)
    assert not world.held.held
    world.arrive(Op.WRITE)
    world.run(5)
    assert world.edges == "(!)"


def test_a_request_that_is_held_for_ever_does_not_stand_in_for_the_probe_by_sync() -> None:
    """Section 4: "a probe goes on each interval so that this is noticed": a bad sector's read is no sign either way."""
    world = World(
        policy=policy(read_s=math.inf),
        storage=Storage(errno=lambda r, now: EIO if (r.op is Op.READ and r.seq) or now < 170 else 0),
    )
    bad = world.arrive(Op.READ)
    world.arrive(Op.FSYNC)
    world.run(65)
    assert world.held.timed_out
    world.run(30)
    assert bad.held
    assert not world.held.timed_out
    assert world.edges == "(!."


def test_nobody_has_the_error_of_the_server_s_own_sync() -> None:
    """P2: "no other request's success or failure moves" a request's deadline: least of all a sync that nobody has asked for."""
    world = World(storage=Storage(errno=out_until(400)))
    own = world.arrive(Op.FSYNC, own=True)
    world.run(200)
    assert own.held
    assert not world.held.timed_out
    assert world.of(HangBegan)[0].own
    asked = world.arrive(Op.FSYNC)
    world.run(50)
    assert asked.held, "the consumer's own has all of its time"
    world.run(60)
    assert world.answers[asked.seq] == (360.01, EIO) if asked.seq in world.answers else asked.held
    world.run(100)
    assert world.answers[own.seq][1] == 0
    assert world.held._tally.recovered == 0


def test_the_success_of_an_attempt_from_before_the_trouble_says_nothing() -> None:
    """An attempt that began before the hang says nothing about the storage now: the gate stays closed."""
    world = World(
        storage=Storage(takes_s=lambda r, _now: 3 if r.seq == 1 else 0.01, errno=lambda r, _n: EIO * (r.seq > 1))
    )
    world.arrive(Op.READ)
    world.arrive(Op.WRITE)
    world.run(4)
    assert not world.held.gate_open
    assert world.held.hanging


def test_the_last_close_ends_the_timed_out_state() -> None:
    """P9: a TimedOut that is on goes off, at the latest with the image's last handle."""
    world = World(storage=Storage(errno=fails_always))
    world.arrive(Op.WRITE)
    world.run(61)
    world.do(world.held.closed(world.now))
    assert world.edges == "(!)."
    assert world.of(TimedOut)[-1].closed, "nothing has shown that the storage works again"
    assert world.held.next_tick_s == math.inf
    world.do(world.held.closed(world.now))
    assert world.edges == "(!)."


# ---- the gate


def test_the_gate_closes_at_the_first_failure_and_opens_at_the_first_success() -> None:
    """Section 4: while an image hangs, `recovery_gate` attempts are in flight at most; the first success opens the gate."""
    world = World(storage=Storage(takes_s=takes(1), errno=out_until(103.5)))
    for _ in range(100):
        world.arrive(Op.WRITE)
    assert world.held.in_flight == 16  # healthy: as many as one image may have
    most = []
    while not world.answers:
        world.run(0.25)
        most.append((world.held.gate_open, world.held.in_flight))
    assert max(n for is_open, n in most[4:] if not is_open) == 4
    world.run(0.25)
    assert world.held.in_flight == 16
    world.run(20)
    assert world.edges == "()"


def test_a_success_says_nothing_about_what_failed_after_it_began() -> None:
    """P8: attempts stay bounded: a failure that is younger than the attempt which succeeds is not tried again for it."""
    storage = Storage(
        takes_s=lambda request, _now: 3 if request.op is Op.READ else 0.01,
        errno=lambda request, _now: EIO if request.op is Op.WRITE else 0,
    )
    world = World(storage=storage)
    older = world.arrive(Op.WRITE)
    world.run(1)
    world.arrive(Op.READ)  # begins in the hang and succeeds at 104
    world.run(1)
    younger = world.arrive(Op.WRITE)
    world.run(2.5)
    assert (older.attempts, younger.attempts) == (2, 1)


def test_a_blocked_attempt_that_returns_well_opens_the_gate() -> None:
    """Section 4: the first success opens the gate; this one began before the hang, and was what had not returned."""
    world = World(storage=Storage(takes_s=lambda r, _now: 20 + r.seq if r.seq <= 8 else 0.01))
    for _ in range(8):
        world.arrive(Op.WRITE)
    world.run(20.5)
    waiting = world.arrive(Op.WRITE)
    assert waiting.state is State.WAITING
    world.run(0.6)
    assert world.held.gate_open
    assert world.answers[waiting.seq][1] == 0
    assert len(world.answers) == 2


def test_the_gate_is_open_when_the_hang_is_over() -> None:
    """P7: a hang may end without any success; a healthy image has all its room again."""
    world = World(storage=Storage(errno=lambda _r, now: EIO if now < 103 else EACCES))
    world.arrive(Op.WRITE)
    world.run(10)
    assert world.edges == "()"
    assert world.held.gate_open


def test_a_new_request_makes_its_first_attempt_as_far_as_the_gate_allows() -> None:
    """Section 4: plus one first attempt for each new request as far as the gate allows; its success ends the wait of all."""
    world = World(storage=Storage(errno=out_until(102)))
    for _ in range(10):
        world.arrive(Op.WRITE)
    world.run(2.5)
    assert len(world.held.held) == 10
    world.arrive(Op.READ)
    world.run(0.1)
    assert world.edges == "()"


def test_a_bad_sector_hinders_only_itself() -> None:
    """Section 4: a request that still fails on its own is retried each interval and hinders only what overlaps it."""
    world = World(policy(math.inf), Storage(errno=lambda request, _now: EIO if request.offset == 7 else 0))
    bad = world.arrive(Op.READ, offset=7)
    late = 0
    for number in range(6000):
        sent_s = world.now
        request = world.arrive(Op.READ, offset=100 + number)
        world.run(0.01)
        late += world.answers[request.seq][0] - sent_s > 0.011
    assert late <= 2  # while the gate was closed by its first failures
    assert bad.attempts <= 2 + 60 / 5 + 1


# ---- the timer


def test_new_failures_do_not_postpone_the_timer() -> None:
    """Section 4: the timer is never postponed by new failures: a hang's ticks are `interval` apart from its beginning."""
    world = World(storage=Storage(errno=fails_always))
    for _ in range(400):
        world.arrive(Op.WRITE)
        world.run(0.1)
    assert world.ticks[:7] == pytest.approx([105.01 + 5 * n for n in range(7)])


def test_missed_ticks_do_not_pile_up() -> None:
    """After a stall of 33 s there is one tick, and the next one is at its old place in the rhythm."""
    world = World(policy(math.inf), Storage(errno=fails_always))
    world.arrive(Op.WRITE)
    world.run(1)
    world.now = 133.5
    world.do(world.held.tick(world.now))
    assert world.attempts == 2
    assert world.held.next_tick_s == pytest.approx(135.01)


@pytest.mark.parametrize("interval_s", [0.1, 0.3, 1 / 3, 5])
def test_a_tick_is_always_followed_by_a_later_one(interval_s: float) -> None:
    """P8: rounding never makes the timer due at once for ever."""
    world = World(policy(math.inf, interval_s=interval_s), Storage(errno=fails_always))
    world.arrive(Op.WRITE)
    world.run(interval_s * 500)
    assert 490 <= len(world.ticks) <= 501


# ---- attempts that do not return


@KINDS
def test_an_attempt_that_does_not_return_is_a_hang(op: Op) -> None:
    """Section 4: an attempt that does not return counts as a hang after `blocked_after`; same events, same list."""
    world = World(storage=Storage(takes_s=takes(NEVER)))
    request = world.arrive(op)
    world.run(4.99)
    assert world.events == []
    world.run(0.02)
    assert world.events == [HangBegan("disk.img", op, None, 105, 165)]
    assert request.held


def test_a_blocked_read_ends_at_its_deadline_and_a_blocked_write_at_its_return() -> None:
    """Section 4, P5: it cannot be given up if it is a write; the deadline acts on its return."""
    world = World(storage=Storage(takes_s=lambda r, _now: 500 if r.seq <= 2 else 0.01, errno=fails_always))
    read, write = world.arrive(Op.READ), world.arrive(Op.WRITE)
    world.run(100)
    assert world.answers == {read.seq: (165, EIO)}
    assert world.held.in_flight == 2
    world.run(500)
    assert world.answers[write.seq] == (600, EIO)
    assert world.held.in_flight == 0
    assert world.edges == "(!)"


def test_a_blocked_attempt_that_returns_well_ends_the_hang() -> None:
    """P1: the guest saw a pause, and no error."""
    world = World(storage=Storage(takes_s=lambda _r, now: 40 if now < 130 else 0.01))
    requests = [world.arrive(op) for op in Op for _ in range(10)]
    world.run(60)
    assert {world.answers[r.seq][1] for r in requests} == {0}
    assert world.edges == "()"


def test_blocked_writes_beyond_held_limit_are_a_hang_all_the_same() -> None:
    """P8, P9: writes that do not return cannot be passed on, so they hang; what waits behind them has its deadline."""
    world = World(storage=Storage(takes_s=takes(NEVER)), held_bytes=HeldBytes(1000, held=1000))
    for _ in range(16):
        world.arrive(Op.WRITE)
    world.run(6)
    waiting = world.arrive(Op.READ)
    assert world.edges == "("
    assert waiting.deadline_s == 166
    world.run(61)
    assert world.answers == {waiting.seq: (166, EIO)}


def test_a_request_with_a_deadline_from_an_earlier_hang_is_noticed_when_it_blocks() -> None:
    """P8: one that waited its turn in a hang that is over has a deadline already; blocking for ever is a hang nevertheless."""
    held = RehandleList("disk.img", policy(share=2, recovery_gate=1), HeldBytes(10**6))
    first, _ = held.arrive(Op.WRITE, 5242880, 512, 100)
    held.failed(first, EIO, 100)
    healthy, _ = held.arrive(Op.READ, 6291456, 512, 100)
    held.succeeded(healthy, 100)  # the gate opens: *first* tries again
    held.arrive(Op.WRITE, 7340032, 512, 100)
    waited, _ = held.arrive(Op.READ, 8388608, 512, 100)
    held.succeeded(first, 101)  # the hang is over: *waited* has its turn
    assert (waited.state, waited.held, waited.deadline_s, held.sick) == (State.TRYING, False, 160, False)
    assert held.blocked(106)
    held.tick(106)
    assert waited.held
    assert held.tick(160).woken == [waited]


# ---- P10: bounded


def test_beyond_held_limit_failures_are_passed_on() -> None:
    """P10: memory for held data is bounded; at the bound a failed write is passed on, with one message a minute."""
    world = World(storage=Storage(errno=fails_always), held_bytes=HeldBytes(10_000))
    requests = [world.arrive(Op.WRITE, length=4096) for _ in range(10)]
    world.run(1)
    assert [r.held for r in requests] == [True] * 2 + [False] * 8
    assert world.held_bytes.held == 8192
    assert {world.answers[r.seq][1] for r in requests[2:]} == {EIO}
    assert len(world.of(HeldLimitReached)) == 1
    read = world.arrive(Op.READ, length=1 << 20)  # holds no data
    world.run(1)
    assert read.held
    world.run(100)
    assert world.held_bytes.held == 0


def test_a_failure_passed_on_at_held_limit_does_not_close_the_gate() -> None:
    """P7: an image that holds nothing is not sick, so nothing would ever open its gate again."""
    world = World(storage=Storage(errno=fails_always), held_bytes=HeldBytes(1000))
    world.arrive(Op.WRITE)
    world.run(1)
    assert not world.held.sick
    assert world.held.gate_open


def test_held_bytes_return_to_zero_however_requests_end() -> None:
    """P10: the account of held data is exact: recovered, given up, passed on, ended by an operator, or cancelled."""
    for ending in ("recover", "give up", "pass on", "end", "cancel"):
        number = {"recover": 0, "pass on": EACCES}.get(ending, EIO)
        world = World(storage=Storage(errno=lambda _r, now, n=number: EIO if now < 103 else n))
        requests = [world.arrive(Op.WRITE, length=512 + n) for n in range(40)]
        world.run(2)
        assert world.held_bytes.held == sum(512 + n for n in range(40))
        if ending == "end":
            world.do(world.held.end(world.now))
        if ending == "cancel":
            for request in requests:
                world.do(world.held.cancelled(request, world.now, returned=False))
        world.run(100)
        assert (ending, world.held_bytes.held, len(world.held.held)) == (ending, 0, 0)


def give_up_all(count: int) -> float:
    """Seconds of CPU for *count* requests that are given up in one tick."""
    world = World(storage=Storage(errno=fails_always))
    for _ in range(count):
        request, _ = world.held.arrive(Op.READ, 9437184, 512, 100)
        if request.state is State.TRYING:
            world.held.failed(request, EIO, 100)
    began_s = time.process_time()
    step = world.held.tick(160)
    took_s = time.process_time() - began_s
    assert len(step.woken) == count
    return took_s


def test_ten_thousand_give_ups_at_once_cost_what_ten_times_a_thousand_do() -> None:
    """P8, P10: an outage ends for 10,000 requests in the same moment; that must not take the event loop with it."""
    small = min(give_up_all(1000) for _ in range(3))
    large = min(give_up_all(10_000) for _ in range(3))
    assert large < 40 * max(small, 0.001)
    assert large < 1


def test_a_success_beside_many_stubborn_requests_is_cheap() -> None:
    """P7: 2,000 writes that keep failing cost a healthy read beside them nothing: none of them is looked at."""
    world = World(policy(math.inf), Storage(errno=lambda request, _now: EIO if request.op is Op.WRITE else 0))
    for _ in range(2000):
        world.arrive(Op.WRITE)
    world.run(1)
    world.arrive(Op.READ)
    world.run(30)
    held = world.held
    assert len(held._stubborn) + len(held._ready) == 2000
    looked_at = []
    held._ready_again = lambda request: looked_at.append(request) or True  # type: ignore[method-assign]
    for _ in range(100):
        request, _ = held.arrive(Op.READ, 1 << 50, 512, world.now)
        held.succeeded(request, world.now)
    assert looked_at == []


@pytest.mark.parametrize("ending", ["recover", "give up", "cancel"])
def test_what_has_ended_is_forgotten(ending: str) -> None:
    """P10: over a long series of hangs nothing accumulates: requests that have ended leave every queue."""
    rounds, count = 20, 100
    world = World(storage=Storage(errno=lambda _r, now: EIO if now % 1000 < 990 and ending != "recover" else 0))
    world.now = 0.0
    if ending == "recover":
        world.storage.errno = lambda _r, now: EIO if now % 1000 < 20 else 0
    for _ in range(rounds):
        requests = [world.arrive(Op.READ) for _ in range(count)]
        world.run(30)
        if ending == "cancel":
            for request in requests:
                world.do(world.held.cancelled(request, world.now, returned=True))
        world.run(970)
        assert queued(world.held) <= 2 * 65
    assert world.held.in_flight == 0
    assert not world.held.held


def test_a_healthy_load_beside_a_long_hang_leaves_nothing_behind() -> None:
    """P10: deadlines of requests that only waited their turn go with them, also beside one that is held for a day."""
    world = World(policy(86400, share=1, recovery_gate=1), Storage(errno=lambda r, _now: EIO if r.offset == 7 else 0))
    world.arrive(Op.READ, offset=7)
    for _ in range(3000):
        world.arrive(Op.WRITE)
        world.arrive(Op.WRITE)
        world.run(0.05)
    assert world.held.hanging
    assert len(world.answers) == 6000
    assert queued(world.held) <= 2 * 70


# ---- the contract with the shell: each attempt is reported once


@pytest.mark.parametrize("report", ["succeeded", "failed", "returned", "cancelled"])
def test_a_read_given_up_as_its_attempt_returns_is_counted_once(report: str) -> None:
    """P8: its attempt has returned, but its task has yet to run when the deadline passes: in_flight must not drift."""
    held = RehandleList("disk.img", policy(), HeldBytes(0))
    read, _ = held.arrive(Op.READ, 11534336, 512, 100)
    held.failed(read, EIO, 100)
    held.tick(105)
    assert read.state is State.TRYING
    held.tick(160)
    assert (read.state, read.answer, held.in_flight) == (State.ENDED, EIO, 1)
    match report:
        case "succeeded":
            held.succeeded(read, 160)
        case "failed":
            held.failed(read, EIO, 160)
        case "returned":
            held.returned(160)
        case "cancelled":
            held.cancelled(read, 160, returned=True)
    assert (read.answer, held.in_flight) == (EIO, 0)


def test_a_cancelled_request_gives_its_place_to_the_next() -> None:
    """P11: a bug costs one request: those behind it go on."""
    held = RehandleList("disk.img", policy(share=1), HeldBytes(0))
    first, _ = held.arrive(Op.READ, 12582912, 512, 100)
    second, _ = held.arrive(Op.READ, 13631488, 512, 100)
    assert held.cancelled(first, 101, returned=True).woken == [second]
    assert held.cancelled(second, 102, returned=False).woken == []
    assert held.in_flight == 1
    held.returned(103)
    assert held.in_flight == 0


def test_lists_for_operators_are_in_order_of_arrival() -> None:
    """What waits is listed oldest first, what tries oldest attempt first."""
    world = World(storage=Storage(errno=fails_always))
    for _ in range(20):
        world.arrive(Op.WRITE)
    world.run(5.011)
    assert [r.seq for r in world.held.waiting] == list(range(5, 21))
    assert [r.seq for r in world.held.trying] == [1, 2, 3, 4]
