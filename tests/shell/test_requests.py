"""The life of a request, on trio's autojump clock: days of outage in no time, and no threads (see fakes.py)."""

# ruff: noqa: ARG001 - pytest-trio takes the clock from each test's own arguments

from __future__ import annotations

import errno
import functools
import gc
import math
import os
import random
import socket
import weakref
from typing import TYPE_CHECKING, Any, ClassVar

import outcome
import pytest
import trio
import trio.testing

from iohang_fuse.backing import Backing
from iohang_fuse.commands import About, Commands
from iohang_fuse.engine import Abandoned, Engine
from iohang_fuse.events import HangBegan, HangEnded, HeldLimitReached, Op, TimedOut
from iohang_fuse.images import Image
from iohang_fuse.rehandle import HeldBytes
from iohang_fuse.source import SERVER, Opened
from tests.core.world import policy
from tests.shell.fakes import BegunRequests, FakeBacking, Shell, Storage

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from trio.testing import MockClock

    from iohang_fuse.rehandle import Policy, Request, Step

EIO = errno.EIO
FOR_EVER = math.inf

Start = "Callable[..., Shell]"


@pytest.fixture
def start(nursery: trio.Nursery) -> Callable[..., Shell]:
    def start(given: Policy | None = None, **more: int) -> Shell:
        return Shell.on(nursery, given or policy(), **more)

    return start


def kinds(shell: Shell) -> list[type]:
    return [type(event) for event in shell.events]


# ---- P1: masking


async def test_a_success_is_answered_with_its_result(start: Start, autojump_clock: MockClock) -> None:
    """One attempt, no hold, no event."""
    shell = start()
    assert await shell.run(Op.READ, "data") == "data"
    assert shell.storage.attempts == 1
    assert shell.events == []


@pytest.mark.parametrize("op", list(Op))
async def test_an_outage_is_a_pause(start: Start, autojump_clock: MockClock, op: Op) -> None:
    """P1: a request that meets a transient error is answered only when it succeeds...: here 30 s later, with its result."""
    shell = start()
    shell.storage.errno = EIO
    answers = shell.send(100, op)
    await trio.sleep(28)
    assert answers == []
    shell.storage.errno = 0
    await trio.sleep(3)
    assert len(answers) == 100
    assert {answer for _, answer in answers} == {0}
    assert sorted(shell.storage.reached) == list(range(100))  # each write once
    assert kinds(shell) == [HangBegan, HangEnded]


@pytest.mark.parametrize("op", list(Op))
async def test_a_request_is_given_up_at_its_deadline(start: Start, autojump_clock: MockClock, op: Op) -> None:
    """P1: ...or when its own timeout has passed, and P5: once a write has its error, it never reaches the file."""
    shell = start()
    shell.storage.errno = EIO
    sent_s = trio.current_time()
    assert await shell.answer(op, "late") == (pytest.approx(sent_s + 60), EIO)
    shell.storage.errno = 0
    await trio.sleep(100)
    assert shell.storage.reached == [("probe", 1 << 20), *["sync"] * (op is Op.FSYNC)]


async def test_a_write_in_flight_is_answered_when_it_returns(start: Start, autojump_clock: MockClock) -> None:
    """P1, P5: a write is never given up while an attempt of its own is in flight."""
    shell = start(policy(10))
    shell.storage.errno = EIO
    shell.sky.takes_s = lambda: 92.0
    sent_s = trio.current_time()
    assert await shell.answer(Op.WRITE) == (pytest.approx(sent_s + 92), EIO)
    assert shell.storage.attempts == 1


async def test_a_read_in_flight_is_given_up_and_its_thread_is_waited_for(
    start: Start, autojump_clock: MockClock
) -> None:
    """P8: a read that does not return ends at its deadline. Its descriptor stays open until the attempt has returned."""
    shell = start()
    takes_s = [500.0]
    shell.sky.takes_s = lambda: takes_s.pop() if takes_s else 0.0
    sent_s = trio.current_time()
    when, answer = await shell.answer(Op.READ)
    assert (answer, when) == (EIO, pytest.approx(sent_s + 65, abs=1.3))  # noticed after blocked_after, then its timeout
    await trio.sleep(0.1)  # the probe of that moment
    assert shell.held.in_flight == 1
    assert shell.handle.in_use == 1
    [backing] = await shell.requests.released(shell.handle.number)
    assert trio.current_time() == pytest.approx(sent_s + 500)
    assert backing is shell.handle.backing
    assert shell.held.in_flight == 0


async def test_an_error_without_a_number_is_an_input_output_error(start: Start, autojump_clock: MockClock) -> None:
    """OSError may come without errno; it is held like EIO."""
    shell = start()

    def broken() -> None:
        raise OSError("no number")

    with pytest.raises(OSError, match="Input/output error") as caught:
        await shell.life(shell.handle, Op.READ, broken)
    assert caught.value.errno == EIO
    assert kinds(shell) == [HangBegan, TimedOut, HangEnded]


async def test_attempts_while_hanging_stay_within_the_gate(start: Start, autojump_clock: MockClock) -> None:
    """Section 4: while an image hangs, at most `recovery_gate` attempts are in flight."""
    shell = start()
    shell.storage.errno = EIO
    shell.sky.takes_s = lambda: 1.0
    shell.send(100)
    await trio.sleep(2)
    shell.sky.most_aloft = 0
    await trio.sleep(50)
    assert shell.sky.most_aloft == 4


# ---- P7: images do not hinder each other


async def test_a_healthy_image_never_waits_for_a_sick_one(start: Start, autojump_clock: MockClock) -> None:
    """P7: with 1,000 requests held on one image, another image keeps its speed."""
    shell = start()
    shell.storage.errno = EIO
    sick = shell.send(1000)
    await trio.sleep(1)
    other = shell.requests.opened(8, "other.img", FakeBacking(Storage()), os.O_RDWR)
    began_s = trio.current_time()
    for _ in range(1000):
        await shell.life(other, Op.READ, Storage().attempt())
    assert trio.current_time() == began_s
    assert sick == []


# ---- timed out, and the probe


async def test_the_probe_finds_the_recovery_of_an_idle_image(start: Start, autojump_clock: MockClock) -> None:
    """Section 4: until an attempt succeeds; a probe goes on each interval, where the image last failed."""
    shell = start()
    shell.storage.errno = EIO
    with pytest.raises(OSError, match="Input/output"):
        await shell.run(Op.READ, offset=12345)
    await trio.sleep(18)
    assert shell.held.timed_out
    shell.storage.errno = 0
    await trio.sleep(6)
    assert not shell.held.timed_out
    assert shell.storage.reached == [("probe", 12345)]
    assert kinds(shell) == [HangBegan, TimedOut, HangEnded, TimedOut]
    assert shell.handle.image.timer is None
    attempts = shell.storage.attempts
    await trio.sleep(100)
    assert shell.storage.attempts == attempts


async def test_the_probe_of_a_write_only_image_is_a_sync(start: Start, autojump_clock: MockClock) -> None:
    """A handle that may not read is asked by fdatasync instead."""
    shell = start(flags=os.O_WRONLY)
    shell.storage.errno = EIO
    await shell.answer()
    shell.storage.errno = 0
    await trio.sleep(6)
    assert isinstance(shell.handle.backing, FakeBacking)
    assert shell.handle.backing.syncs >= 1
    assert not shell.held.timed_out


async def test_a_probe_with_a_bug_is_a_failed_probe(
    start: Start, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """P11: whatever goes wrong in it, the mount stays, and the next probe goes out."""
    shell = start()
    shell.storage.errno = EIO
    await shell.answer()
    reads = []

    def broken(_offset: int, _size: int) -> bytes:
        reads.append(trio.current_time())
        raise OverflowError

    monkeypatch.setattr(shell.handle.backing, "read", broken)
    await trio.sleep(21)
    assert len(reads) == 5  # one with the tick that gave up, and then each interval
    assert shell.handle.in_use == 0


async def test_a_probe_by_sync_with_a_bug_is_a_failed_probe(
    start: Start, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """P11: the log that it writes again may be more than there is memory for."""
    shell = start()
    shell.storage.errno = EIO
    await shell.answer(Op.FSYNC)
    shell.storage.errno = 0
    tried = []

    def broken(_writes: object, *, data_only: bool) -> int:
        tried.append(data_only)
        raise MemoryError

    monkeypatch.setattr(shell.handle.backing, "rewrite", broken)
    await trio.sleep(21)
    assert len(tried) >= 4
    assert shell.held.timed_out
    assert (await shell.answer(Op.WRITE))[1] == 0, "the mount stays"


async def test_new_failures_of_a_timed_out_image_are_answered_at_once(start: Start, autojump_clock: MockClock) -> None:
    """Section 4: new failures are answered at once, until an attempt succeeds."""
    shell = start()
    shell.storage.errno = EIO
    await shell.answer()
    now = trio.current_time()
    assert await shell.answer(Op.WRITE) == (now, EIO)
    shell.storage.errno = 0
    assert await shell.answer(Op.WRITE) == (now, 0)
    assert not shell.held.timed_out


# ---- P8: every wait ends


async def test_an_attempt_that_does_not_return_is_noticed(start: Start, autojump_clock: MockClock) -> None:
    """Section 4: it counts as a hang after `blocked_after`; what waits behind it is given up at its deadline."""
    shell = start()
    shell.sky.takes_s = lambda: FOR_EVER
    answers = shell.send(40)
    await trio.sleep(6.5)
    assert kinds(shell) == [HangBegan]
    await trio.sleep(60)
    assert len(answers) == 24
    assert shell.held.in_flight == 16


async def test_the_end_of_the_server_answers_what_is_held(start: Start, autojump_clock: MockClock) -> None:
    """P8: SIGTERM has a defined end: held requests get their errors, and later errors are passed on."""
    shell = start(policy(math.inf))
    shell.storage.errno = EIO
    answers = shell.send(100)
    await trio.sleep(12)
    shell.requests.hold_no_more()
    now = trio.current_time()
    await trio.sleep(1)
    assert answers == [(now, EIO)] * 100
    now = trio.current_time()
    assert await shell.answer() == (now, EIO)
    later = shell.requests.opened(9, "later.img", FakeBacking(shell.storage), os.O_RDWR)
    with pytest.raises(OSError, match="Input/output"):
        await shell.life(later, Op.READ, shell.storage.attempt())


async def test_a_read_given_up_between_its_turn_and_its_attempt(start: Start, autojump_clock: MockClock) -> None:
    """P8: the timer and a request's task may be due in the same moment: in_flight must not drift, or the image ends silent."""
    shell = start()
    shell.storage.errno = EIO
    answers = shell.send(8, Op.READ)
    await trio.sleep(1)
    image = shell.handle.image
    shell.requests._apply(image, image.held.retry(trio.current_time()))  # 4 have their turn; their tasks run later
    shell.requests.hold_no_more()
    assert image.held.in_flight == 4
    attempts = shell.storage.attempts
    await trio.sleep(1)
    assert len(answers) == 8
    assert shell.storage.attempts == attempts
    assert image.held.in_flight == 0
    assert shell.handle.in_use == 0


@pytest.mark.parametrize("lands", ["with success", "with an error", "with a bug"])
async def test_a_read_given_up_between_its_return_and_its_answer(
    start: Start, autojump_clock: MockClock, lands: str
) -> None:
    """P8: the deadline passes after the attempt has returned and before its task runs again: it is counted once."""
    shell = start(policy(math.inf))
    shell.storage.errno = EIO
    answers = shell.send(1, Op.READ)
    await trio.sleep(1)
    shell.sky.after_landing = shell.requests.hold_no_more
    shell.storage.errno = 0 if lands == "with success" else EIO
    if lands == "with a bug":
        shell.storage.errno = "bug"  # type: ignore[assignment]
    await trio.sleep(10)
    assert [answer for _, answer in answers] == [EIO] or lands == "with a bug"
    assert shell.held.in_flight == 0
    assert shell.handle.in_use == 0


async def test_nothing_goes_out_after_the_end(start: Start, autojump_clock: MockClock) -> None:
    """P5: when the server's tasks are cancelled, what waited its turn does not begin another attempt."""
    shell = start(policy(math.inf))
    shell.storage.errno = EIO
    async with trio.open_nursery() as handlers:
        for tag in range(50):
            handlers.start_soon(shell.run, Op.WRITE, tag)
        await trio.sleep(1)
        launched = len(shell.sky.launched)
        image = shell.handle.image
        shell.requests._apply(image, image.held.retry(trio.current_time()))
        handlers.cancel_scope.cancel()
    await trio.sleep(20)
    assert len(shell.sky.launched) == launched
    assert image.held.in_flight == 0
    assert image.held.held == {}
    assert kinds(shell) == [HangBegan, HangEnded]


async def test_a_cancelled_attempt_counts_until_it_returns(start: Start, autojump_clock: MockClock) -> None:
    """A thread cannot be called back: its descriptor stays open, and its place taken, until it is back."""
    shell = start()
    shell.sky.takes_s = lambda: 10.0
    with trio.move_on_after(1):
        await shell.run(Op.WRITE, "late")
    assert (shell.held.in_flight, shell.handle.in_use) == (1, 1)
    await trio.sleep(10)
    assert (shell.held.in_flight, shell.handle.in_use) == (0, 0)
    assert shell.storage.reached == ["late"]


# ---- P9, P10, P11


async def test_events_name_the_image_and_alternate(start: Start, autojump_clock: MockClock) -> None:
    """P9: a hang gives one begin event and one end event, each naming the image, the errno, the count and the times."""
    shell = start()
    for _ in range(3):
        shell.storage.errno = EIO
        shell.send(20)
        await trio.sleep(11)
        shell.storage.errno = 0
        await trio.sleep(100)
    assert kinds(shell) == [HangBegan, HangEnded] * 3
    for event in shell.events:
        assert event.image == "disk.img"
        assert event.errno == EIO


async def test_a_bug_costs_one_request(start: Start, autojump_clock: MockClock) -> None:
    """P11: a bug in an attempt is its own request's error; 40 of them leave room for the next."""
    shell = start()

    def bug() -> None:
        raise ValueError("a bug")

    for _ in range(40):
        with pytest.raises(ValueError, match="a bug"):
            await shell.life(shell.handle, Op.WRITE, bug)
    assert await shell.run(Op.WRITE, "fine") == "fine"
    assert (shell.held.in_flight, shell.handle.in_use) == (0, 0)


async def test_a_bug_passes_its_turn_on(start: Start, autojump_clock: MockClock) -> None:
    """P11: those that wait behind it get their turn."""
    shell = start(policy(share=4))

    def bug() -> None:
        raise ValueError("a bug")

    async def one() -> None:
        with pytest.raises(ValueError, match="a bug"):
            await shell.life(shell.handle, Op.WRITE, bug)

    async with trio.open_nursery() as handlers:
        for _ in range(50):
            handlers.start_soon(one)
    assert shell.held.in_flight == 0


async def test_a_listener_with_a_bug_keeps_nobody_waiting(
    start: Start, autojump_clock: MockClock, nursery: trio.Nursery, caplog: pytest.LogCaptureFixture
) -> None:
    """P11: whoever looks on must not keep a request from its answer, nor another listener from the event."""
    shell = start()

    def broken(_event: object) -> None:
        raise KeyError("a bug in a listener")

    shell.requests._listeners.insert(0, broken)
    shell.storage.errno = EIO
    answers = shell.send(20)
    await trio.sleep(1)
    shell.storage.errno = 0
    await trio.sleep(5)
    assert [answer for _, answer in answers] == [0] * 20
    assert kinds(shell) == [HangBegan, HangEnded]
    assert "a listener failed" in caplog.text
    assert not nursery.cancel_scope.cancel_called


async def test_a_bug_in_the_timer_costs_one_turn(
    start: Start, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """P11: the mount stays, and the timer comes again."""
    shell = start()
    shell.storage.errno = EIO
    answers = shell.send(5)
    await trio.sleep(1)
    tick, calls = shell.held.tick, []

    def broken_once(now: float) -> Step:
        calls.append(now)
        if len(calls) == 1:
            raise AssertionError("a bug in the timer")
        return tick(now)

    monkeypatch.setattr(shell.held, "tick", broken_once)
    shell.storage.errno = 0
    await trio.sleep(12)
    assert [answer for _, answer in answers] == [0] * 5
    assert "a bug in the timer" in caplog.text


async def test_an_answered_request_does_not_keep_its_data(start: Start, autojump_clock: MockClock) -> None:
    """P10: the rehandle list may remember a request for a while, but not the megabyte that it wrote."""

    class Data(bytearray):
        __slots__ = ("__weakref__",)

    shell = start()
    shell.storage.errno = EIO
    alive: list[weakref.ref[Data]] = []

    async def write() -> None:
        data = Data(1000)
        alive.append(weakref.ref(data))

        def attempt() -> int:
            shell.storage.attempt()()
            return len(data)

        await shell.life(shell.handle, Op.WRITE, attempt, len(alive) * 1000, len(data))

    async with trio.open_nursery() as handlers:
        for _ in range(20):
            handlers.start_soon(write)
        await trio.sleep(1)
        shell.storage.errno = 0
    await trio.sleep(1)  # trio itself remembers the task that ran last
    gc.collect()
    assert [ref() for ref in alive] == [None] * 20


# ---- handles and images


async def test_an_image_lives_from_its_first_open_to_its_last_close(start: Start, autojump_clock: MockClock) -> None:
    """The last close ends what was known of it: a TimedOut that was on goes off with it."""
    shell = start()
    second = shell.requests.opened(7, "disk.img", FakeBacking(shell.storage), os.O_RDONLY)
    assert second.image is shell.handle.image
    shell.storage.errno = EIO
    await shell.answer()
    await shell.requests.released(shell.handle.number)
    assert shell.held.timed_out
    await shell.requests.released(second.number)
    assert kinds(shell) == [HangBegan, TimedOut, HangEnded, TimedOut]
    assert shell.requests.images == {}
    assert shell.requests.handles == {}
    again = shell.requests.opened(7, "disk.img", FakeBacking(shell.storage), os.O_RDWR)
    assert again.image is not shell.handle.image


def test_attributes_are_remembered_with_the_size_as_written() -> None:
    """Section 4: the attributes of an image are answered from memory while it hangs, and its size grows with writes."""
    image = Image(7, "disk.img", policy(), HeldBytes(0), 0)
    assert image.remembered() is None
    attributes = os.stat(__file__)
    image.saw(attributes)
    image.wrote(10)
    assert image.remembered() == (attributes, attributes.st_size)
    image.wrote(attributes.st_size + 5)
    assert image.remembered() == (attributes, attributes.st_size + 5)
    image.truncated(3)
    assert image.remembered() == (
        attributes,
        3,
    )  # "the attributes of an image with open handles are answered from memory"
    image.wrote(7)
    assert image.remembered() == (attributes, 7)


# ---- anything


@pytest.mark.parametrize("seed", range(6))
async def test_a_random_outage(start: Start, autojump_clock: MockClock, seed: int) -> None:
    """P1, P8, P10: whatever the storage does, every request is answered in its bound, and each success reached it once."""
    dice = random.Random(seed)
    print(f"seed {seed}")  # noqa: T201 - pytest shows it where the test fails
    shell = start(policy(read_s=30, write_s=60, fsync_s=90, interval_s=2))
    end_s = trio.current_time() + 300
    longest_s = 9.0
    answered: list[int] = []

    async def weather() -> None:
        while trio.current_time() < end_s:
            shell.storage.errno = dice.choice([0, 0, EIO, errno.ETIMEDOUT])
            shell.sky.takes_s = functools.partial(float, dice.choice([0.0, 0.01, 1.0, longest_s]))
            await trio.sleep(dice.choice([0.1, 3, 40, 100]))
        shell.storage.errno = 0
        shell.sky.takes_s = lambda: 0.01

    async def consumer() -> None:
        while trio.current_time() < end_s:
            op = dice.choice(list(Op))
            sent_s = trio.current_time()
            tag = object()
            when, answer = await shell.answer(op, tag)
            answered.append(answer)
            bound_s = shell.held.policy.timeout_s[op] + 2 * longest_s + 17 * longest_s  # and its wait for a first turn
            assert when - sent_s <= bound_s
            assert shell.storage.reached.count(tag) == (0 if answer else 1) or (op is Op.READ and answer)
            await trio.sleep(dice.choice([0.0, 0.5, 5.0]))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(weather)
        for _ in range(dice.choice([5, 60])):
            nursery.start_soon(consumer)
    await trio.sleep(60)
    assert len(answered) > 50
    assert (shell.held.in_flight, shell.handle.in_use, shell.held.sick) == (0, 0, False)
    assert shell.requests._held_bytes.held == 0
    edges = [type(e) for e in shell.events if isinstance(e, HangBegan | HangEnded)]
    assert edges == [HangBegan, HangEnded] * (len(edges) // 2)


# ---- P4, P5: what has failed may still be under way


@pytest.mark.parametrize("others_succeed", [False, True])
async def test_a_write_that_has_failed_settles_before_it_is_tried_again(
    start: Start,
    nursery: trio.Nursery,
    autojump_clock: MockClock,
    others_succeed: bool,  # noqa: FBT001 - a parameter of the test
) -> None:
    """P4: "writes to one range land in the order in which they arrived": its first attempt must not land after a younger write.

    With `nconnect`, the first one's bytes may wait in another connection than that by which the second one succeeds (reconnect.py).
    """
    shell = start()
    story: list[object] = []
    shell.requests.settle = lambda ago_s: story.append(("settled", ago_s))

    def attempt() -> int:
        story.append("attempt")
        if story.count("attempt") == 1:
            raise OSError(EIO, "")
        return 0

    async def write(request: Request) -> int:
        return await shell.requests._fly_writing(shell.handle, request, 0, 512, attempt)

    async def succeed() -> None:
        await trio.sleep(1)
        shell.handle.backing.failures = 0  # as after another's success on the same handle

    if others_succeed:
        nursery.start_soon(succeed)
    await shell.requests.run(shell.handle, Op.WRITE, 0, 512, write)
    assert story == ["attempt", ("settled", pytest.approx(5)), "attempt"]
    await shell.requests.run(shell.handle, Op.WRITE, 0, 512, write)
    assert story[3:] == ["attempt"], "one that has not failed has nothing to settle"


async def test_after_a_give_up_the_next_write_asks_and_settles(
    start: Start, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """P5: "an overlapping write goes out only after another attempt on the image has succeeded since", and nothing overtakes it."""
    shell = start(policy(10))
    story: list[str] = []
    shell.requests.settle = lambda ago_s: story.append(f"settled {ago_s}")
    monkeypatch.setattr(FakeBacking, "ask", lambda _: story.append("asked"))

    def attempt() -> int:
        story.append("attempt")
        if "asked" not in story:
            raise OSError(EIO, "")
        return 0

    async def write(request: Request) -> int:
        return await shell.requests._fly_writing(shell.handle, request, 0, 512, attempt)

    with pytest.raises(OSError, match="Input/output error"):
        await shell.requests.run(shell.handle, Op.WRITE, 0, 512, write)
    del story[:]
    await shell.requests.run(shell.handle, Op.WRITE, 0, 512, write)
    at = story.index("settled 0")
    assert story[at - 1 : at + 2] == ["asked", "settled 0", "attempt"]


async def test_what_the_page_cache_has_sent_settles_before_the_log_is_written_again(
    start: Start, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """P3, P4: a writeback that has failed may still be under way, too."""
    shell = start()
    story: list[str] = []
    shell.requests.settle = lambda ago_s: story.append(f"settled {ago_s}")

    def sync(_: object, *, data_only: bool) -> int:
        story.append(f"sync {data_only}")
        if len(story) == 1:
            raise OSError(EIO, "")
        return 0

    monkeypatch.setattr(FakeBacking, "sync", sync)
    await shell.requests.sync(shell.handle, data_only=True)
    assert story == ["sync True", "settled 0", "sync True"]


async def test_who_hastens_and_fails_harms_nobody(start: Start, autojump_clock: MockClock) -> None:
    """P11: an operator's word, and no thread or descriptor to be had: the mount stays."""
    shell = start()
    called = []

    def hasten() -> None:
        called.append(True)
        raise OSError(errno.EMFILE, "Too many open files")

    shell.requests.hasten = hasten
    await shell.requests._hasten()
    assert called


async def test_an_operator_s_retry_hastens(
    start: Start, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Issue: consumers go on "at once with `iohangctl retry`": not even the kernel's next retransmission is waited for."""
    shell = start()
    called = []
    monkeypatch.setattr(shell.requests, "hasten_soon", lambda: called.append(True))
    commands = Commands(shell.requests, About("/srv/vm", "/mnt/iohang", "0", 1), lambda: None, {})
    for name, hastens in (("io-hang-drain", 0), ("io-hang-retry", 1)):
        commands.call(name, {})
        assert len(called) == hastens


# ---- replies


async def test_what_the_write_log_has_is_not_replied_by_the_kernel(nursery: trio.Nursery, tmp_path: Path) -> None:
    """P3: the storage may have dropped it after a failed writeback; the log has it, and what is read there is no answer."""
    path = tmp_path / "disk.img"
    path.write_bytes(b"-" * 20_000)
    backing = Backing(
        Opened(os.open(path, os.O_RDWR), os.O_RDWR, stable=False, ring_reads=True, ring_writes=True), SERVER
    )
    requests = BegunRequests(policy(), 1 << 30, [], write_log=1 << 20, engine=Engine("uring"))
    nursery.start_soon(requests.serve, nursery)
    handle = requests.opened(7, "disk.img", backing, os.O_RDWR)
    near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    near.settimeout(0)
    reply = far.fileno(), b"head"
    assert await requests.read_later(handle, 0, 8192, reply) is None
    assert near.recv(10_000) == b"head" + b"-" * 8192
    await requests.write(handle, 4096, b"written!")
    path.write_bytes(b"-" * 20_000)
    assert await requests.read_later(handle, 0, 4097, reply) == b"-" * 4096 + b"w"
    with pytest.raises(BlockingIOError):
        near.recv(10_000)
    assert await requests.read_later(handle, 4104, 1, reply) is None
    assert near.recv(10_000) == b"head-"
    assert (requests.tally.reads, requests.tally.bytes_read) == (3, 8192 + 4097 + 1)
    backing.close()
    near.close()
    far.close()


class _Held:
    """In place of a flight: one that lands when the test says so, with what the test says."""

    up: ClassVar[list[_Held]] = []

    def __init__(self, _sky: object, work: Any, on_late_return: Callable[[], None]) -> None:
        self.work = work
        self._on_late_return = on_late_return
        self._tell: Callable[[outcome.Outcome[Any]], object] | None = None

    def take_off(self, tell: Callable[[outcome.Outcome[Any]], object]) -> None:
        self._tell = tell
        self.up.append(self)

    async def land(self) -> Any:
        self.take_off(functools.partial(trio.lowlevel.reschedule, trio.lowlevel.current_task()))
        return await trio.lowlevel.wait_task_rescheduled(lambda _: trio.lowlevel.Abort.SUCCEEDED)

    def abandon(self) -> None:
        if self._tell is not None:
            tell, self._tell = self._tell, None
            tell(outcome.Error(Abandoned()))

    def arrive(self, result: outcome.Outcome[Any]) -> None:
        self.up.remove(self)
        if self._tell is None:
            self._on_late_return()
        else:
            tell, self._tell = self._tell, None
            tell(result)


@pytest.fixture
def held_flights(monkeypatch: pytest.MonkeyPatch) -> list[_Held]:
    """Those that are under way: each lands when the test says so."""
    monkeypatch.setattr("tests.shell.fakes.FakeFlight", _Held)
    monkeypatch.setattr(_Held, "up", [])
    return _Held.up


def _ignore(*_: object) -> None:
    """Nobody is interested in the answer."""


@pytest.mark.parametrize("retried_by", ["operator", "tick"])
async def test_no_write_is_abandoned_by_another_s_failure(
    nursery: trio.Nursery, autojump_clock: MockClock, held_flights: list[_Held], retried_by: str
) -> None:
    """P5: no write is under way twice. Two first attempts fail in one round of the loop; the first one's is sent again between."""
    shell = Shell.on(nursery, policy(recovery_gate=1))
    left = []
    for at in (0, 8192):
        shell.requests.begin_write(shell.handle, at, bytes(4096), _ignore, left.append)
    first, second = held_flights
    shell.handle.backing.renewed_s = trio.current_time()  # it is not to be opened anew
    second.arrive(outcome.Error(OSError(errno.EIO, "failed")))
    if retried_by == "operator":
        shell.requests.retry(shell.handle.image)
    else:
        shell.held._tick_s = trio.current_time()
        shell.requests._tick(shell.handle.image)
    first.arrive(outcome.Error(OSError(errno.EIO, "failed")))
    for more in left:
        nursery.start_soon(more)
        await trio.testing.wait_all_tasks_blocked()
    assert len(left) == 2
    assert len(held_flights) == shell.held.in_flight == shell.handle.in_use == 1


async def test_a_hang_begins_before_it_is_ended(
    nursery: trio.Nursery, autojump_clock: MockClock, held_flights: list[_Held]
) -> None:
    """P9: an operator's io-hang-fail comes in the same round of the loop as the first failure."""
    shell = Shell.on(nursery, policy())
    left = []
    shell.requests.begin_read(shell.handle, 0, 4096, None, _ignore, left.append)
    held_flights[0].arrive(outcome.Error(OSError(errno.EIO, "failed")))
    shell.requests.fail(shell.handle.image)
    (more,) = left
    with pytest.raises(OSError, match="Input/output") as caught:
        await more()
    assert caught.value.errno == errno.EIO
    assert [type(event) for event in shell.events].index(HangBegan) == 0
    assert HangEnded in [type(event) for event in shell.events]


async def test_what_an_arrival_leads_to_is_done_before_it_goes_on(
    nursery: trio.Nursery, autojump_clock: MockClock, held_flights: list[_Held]
) -> None:
    """P5, P9: between that and the task that goes on, others change the rehandle list. Here: there is no room for its data."""
    shell = Shell.on(nursery, policy(recovery_gate=1), held_limit=4096)
    shell.requests.begin_write(shell.handle, 0, bytes(4096), _ignore, _ignore)
    held_flights[0].arrive(outcome.Error(OSError(errno.EIO, "failed")))
    assert shell.held.sick
    seen: list[list[type]] = []
    for number in range(1, 10):
        shell.requests.begin_write(
            shell.handle,
            number * 4096,
            bytes(4096),
            _ignore,
            lambda _: seen.append([type(each) for each in shell.events]),
        )
    first = next(types for types in seen if len(types) > 1)
    assert first == [HangBegan, HeldLimitReached]


@pytest.mark.parametrize("op", [Op.READ, Op.WRITE])
@pytest.mark.parametrize("where", ["Transfer", "Sky.flight", "_Held.take_off", "the result"])
async def test_a_bug_in_a_first_attempt_costs_one_request(
    nursery: trio.Nursery,
    autojump_clock: MockClock,
    monkeypatch: pytest.MonkeyPatch,
    held_flights: list[_Held],
    op: Op,
    where: str,
) -> None:
    """P11: and it leaves nothing behind."""
    shell = Shell.on(nursery, policy())
    answers: list[object] = []
    left = []

    def begin() -> None:
        if op is Op.READ:
            shell.requests.begin_read(shell.handle, 0, 4096, None, answers.append, left.append)
        else:
            shell.requests.begin_write(shell.handle, 0, bytes(4096), answers.append, left.append)

    def bug(*_: object, **__: object) -> None:
        raise ZeroDivisionError

    with monkeypatch.context() as patch:
        if where == "Transfer":
            patch.setattr("iohang_fuse.requests.Transfer", bug)
        elif where == "Sky.flight":
            patch.setattr(shell.sky, "flight", bug)
        elif where == "_Held.take_off":
            patch.setattr(_Held, "take_off", bug)
        begin()
        if where == "the result":
            held_flights[0].arrive(outcome.Error(ZeroDivisionError()))
    (more,) = left
    with pytest.raises(ZeroDivisionError):
        await more()
    assert answers == []
    assert (shell.held.in_flight, shell.handle.in_use, shell.handle.image.writing) == (0, 0, {})
    left.clear()
    begin()
    held_flights[0].arrive(outcome.Value(bytes(4096) if op is Op.READ else 4096))
    assert answers == [bytes(4096) if op is Op.READ else 4096]
    assert (left, shell.handle.in_use) == ([], 0)
