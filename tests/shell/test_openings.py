"""An open(2) that does not return, as on NFS 4 while a lease cannot be renewed, and in a server's grace period.

On kernel.py, where *opens_wait* stands for that. What it keeps from its answer, what it does not, and what becomes of it.
"""

# ruff: noqa: ARG001 - pytest-trio takes the clock from each test's own arguments

from __future__ import annotations

import errno
import math
import os
from typing import TYPE_CHECKING

import pytest
import trio

from iohang_fuse.backing import Backing
from iohang_fuse.events import Op
from tests.core.world import policy
from tests.shell.kernel import PAGE, Fault
from tests.shell.simulation import NAME, WouldBlock
from tests.shell.test_simulation import Bench

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from trio.testing import MockClock

    from iohang_fuse.images import Handle
    from iohang_fuse.rehandle import Policy
    from iohang_fuse.source import Where

OUTAGE = ["read", "direct", "writeback", "fsync", "statfs", "lookup", "open"]
KINDS = pytest.mark.parametrize("op", list(Op))
Make = "Callable[..., Cut]"


class Cut(Bench):
    """A bench whose storage can be cut off, and whose open(2) can wait."""

    opens_wait = False
    waiting = False  # an open(2) has begun to

    def __init__(self, nursery: trio.Nursery, patch: pytest.MonkeyPatch, given: Policy) -> None:
        super().__init__(nursery, patch, given)
        self.kernel.before_call = self._enter

    def _enter(self, call: str) -> None:
        if self.opens_wait and call.startswith("open_"):
            self.waiting = True
            raise WouldBlock

    def cut_off(self) -> None:
        self.failing.update(dict.fromkeys(OUTAGE, Fault(errno.EIO)))
        self.opens_wait = True

    def cut_off_no_more(self, *, opens_wait: bool) -> None:
        self.failing.clear()
        self.opens_wait = opens_wait

    def request(self, handle: Handle, op: Op) -> Callable[[], Awaitable[object]]:
        """One that meets the storage: the handle is direct, or syncs."""
        return {
            Op.READ: lambda: self.requests.read(handle, 0, 3),
            Op.WRITE: lambda: self.requests.write(handle, 0, b"new"),
            Op.FSYNC: lambda: self.requests.sync(handle, data_only=True),
        }[op]

    async def lose_and_sync_in_a_grace_period(self, handle: Handle) -> list[object]:
        """The answer to come: what was written is lost, the sync has met an outage, and what is over now is all but open(2)."""
        self.lose()
        self.cut_off()
        answer = self.start(self.request(handle, Op.FSYNC))
        await trio.sleep(30)
        self.cut_off_no_more(opens_wait=True)
        return answer

    async def until_an_open_waits(self) -> None:
        with trio.fail_after(60):
            while not self.waiting:  # noqa: ASYNC110 - on a clock that jumps
                await trio.sleep(0.1)

    async def until(self, answer: list[object], limit_s: float = 1000) -> float:
        """Wait for an answer. Returns how long that took."""
        began_s = trio.current_time()
        with trio.fail_after(limit_s):
            while not answer:  # noqa: ASYNC110 - on a clock that jumps
                await trio.sleep(0.1)
        return trio.current_time() - began_s


@pytest.fixture
def cut(nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Cut]:
    def make(given: Policy | None = None) -> Cut:
        return Cut(nursery, monkeypatch, given or policy())

    return make


# ---- every wait ends


@KINDS
@pytest.mark.parametrize("timeout_s", [7, 12, 60])
async def test_it_keeps_no_request_from_its_deadline(
    cut: Make, autojump_clock: MockClock, op: Op, timeout_s: float
) -> None:
    """P1: "Bound: timeout + at most one attempt", and P8: opening anew is no attempt, and not waited for beyond the deadline."""
    it = cut(policy(timeout_s))
    handle = it.open(os.O_RDWR | os.O_DIRECT)
    it.cut_off()
    took_s = await it.until(answer := it.start(it.request(handle, op)))
    assert answer == [-errno.EIO]
    assert timeout_s <= took_s < timeout_s + 1.2
    assert (handle.image.held.in_flight, handle.in_use) == (0, 0)


@KINDS
@pytest.mark.parametrize("order", ["fail", "drain", "end of the server"])
async def test_it_keeps_no_request_from_an_operator(cut: Make, autojump_clock: MockClock, op: Op, order: str) -> None:
    """P8: "an operator can end what is held sooner"; a drain waits for the attempts that it has begun, which have their limit."""
    it = cut(policy(math.inf))
    handle = it.open(os.O_RDWR | os.O_DIRECT)
    it.cut_off()
    answer = it.start(it.request(handle, op))
    await it.until_an_open_waits()
    if order == "fail":
        it.requests.fail(handle.image)
    elif order == "drain":
        it.requests.drain(handle.image)
    else:
        it.requests.hold_no_more()
    took_s = await it.until(answer)
    assert answer == [-errno.EIO]
    assert took_s < (6.5 if order == "drain" else 1.2)
    assert it.requests.writes_in_flight() == {}, "a second SIGTERM waits for nothing"


async def test_what_need_not_wait_for_it_does_not(cut: Make, autojump_clock: MockClock) -> None:
    """P8, P1: only who has it opened waits, for an attempt's time; others are tried, and given up, meanwhile."""
    it = cut(policy(20))
    handle, other = it.open(os.O_RDWR | os.O_DIRECT), it.open(os.O_RDWR | os.O_DIRECT)
    it.cut_off()
    answers = [it.start(lambda h=h, at=at: it.requests.read(h, at, 3)) for at in range(20) for h in (handle, other)]
    await it.until_an_open_waits()
    await trio.sleep(0.5)
    assert len(handle.image.held.trying) == 1
    for answer in answers:
        await it.until(answer, 30)
    await trio.sleep(100)
    assert len(it.sky.pending) == 1, "one at a time for each image, whatever is tried"


# ---- the old descriptor


@KINDS
async def test_the_old_descriptor_is_tried_meanwhile(cut: Make, autojump_clock: MockClock, op: Op) -> None:
    """P1: "answered only when it succeeds": in a grace period a new open(2) waits, and what is open works."""
    it = cut(policy(300))
    handle = it.open(os.O_RDWR | os.O_DIRECT)
    it.cut_off()
    answer = it.start(it.request(handle, op))
    await trio.sleep(100)
    it.cut_off_no_more(opens_wait=True)
    assert await it.until(answer) < 5.2, "an interval"
    assert answer[0] in {b"ooo", 3, None}
    assert not handle.image.held.sick


async def test_a_timed_out_image_is_seen_to_work_again(cut: Make, autojump_clock: MockClock) -> None:
    """Section 4: ...until an attempt succeeds; a probe goes on each interval, and no open(2) keeps it."""
    it = cut(policy(3))
    handle = it.open(os.O_RDWR | os.O_DIRECT)
    it.cut_off()
    await it.until(it.start(it.request(handle, Op.READ)))
    await trio.sleep(30)
    it.cut_off_no_more(opens_wait=True)
    await trio.sleep(11)
    assert not handle.image.held.timed_out


async def test_an_fsync_after_a_lost_writeback_goes_on_without_it(cut: Make, autojump_clock: MockClock) -> None:
    """P3 on a description that works, while NFS 4 opens nothing: what is written again and synced on it is stable."""
    it = cut(policy(300))
    handle = it.open()
    await it.requests.write(handle, 0, b"new")
    answer = await it.lose_and_sync_in_a_grace_period(handle)
    assert await it.until(answer) < 6.2, "an interval, and a second for an open(2) that might return"
    assert answer == [None]
    assert it.disk.data[:3] == b"new"


async def test_what_is_lost_before_it_comes_late_is_found(cut: Make, autojump_clock: MockClock) -> None:
    """P3: a description that replaces the witness late may have missed a report: until a sync after that, none proves a thing."""
    it = cut(policy(300))
    handle, other = it.open(), it.open()
    await it.requests.write(handle, 0, b"new")
    answer = await it.lose_and_sync_in_a_grace_period(handle)
    await it.until(answer)
    await it.requests.write(handle, 0, b"newer")
    it.lose()
    with pytest.raises(OSError, match="Input/output"):
        other.backing.sync(data_only=True)  # the report; who opens the file from now on has none
    it.opens_wait = False
    await trio.sleep(20)
    it.opens_wait = True
    await it.requests.sync(handle, data_only=True)
    assert it.disk.data[:5] == b"newer"
    assert not handle.image.log.in_doubt, "where each open(2) takes its time, that one was enough"
    await it.requests.write(handle, 0, b"newest")
    await it.requests.sync(handle, data_only=True)
    assert it.disk.data[:6] == b"newest"


async def test_syncs_that_wait_for_it_leave_others_their_turn(cut: Make, autojump_clock: MockClock) -> None:
    """P1: at most `recovery_gate` attempts are in flight while an image hangs: syncs that cannot go on are none of these."""
    it = cut(policy(300))
    handle = it.open()
    await it.requests.write(handle, 0, b"new")
    it.lose()
    it.cut_off()
    syncs = [it.start(it.request(handle, Op.FSYNC)) for _ in range(10)]
    read = it.start(lambda: it.requests.read(handle, 2 * PAGE, 3))
    await trio.sleep(60)
    it.cut_off_no_more(opens_wait=True)
    assert await it.until(read) < 11
    it.opens_wait = False
    for sync in syncs:
        await it.until(sync, 20)
    assert syncs == [[None]] * 10


async def test_a_first_write_does_not_wait_for_its_witness(cut: Make, autojump_clock: MockClock) -> None:
    """P1, P3: it goes out without one after `blocked_after`, and so the log is in doubt, although one comes later."""
    it = cut()
    handle = it.open()
    it.opens_wait = True
    answers = [it.start(lambda at=at: it.requests.write(handle, at, b"new")) for at in (0, 8, 16)]
    for answer in answers:
        assert await it.until(answer) < 5.2
    assert answers == [[3]] * 3
    it.lose()
    fd = it.kernel.open(NAME, os.O_RDWR)
    with pytest.raises(OSError, match="Input/output"):
        it.kernel.fsync(fd)  # somebody else is told of it, and then the witness comes
    it.kernel.close(fd)
    it.opens_wait = False
    await trio.sleep(2)
    assert handle.image.witness is not None
    await it.requests.sync(handle, data_only=True)
    assert it.disk.data[:3] == b"new"


# ---- what becomes of it


@KINDS
async def test_what_comes_late_is_used(cut: Make, autojump_clock: MockClock, op: Op) -> None:
    """Section 4, Reopen: the requests that waited have their errors, and the next one has a descriptor that works."""
    it = cut(policy(20))
    handle = it.open(os.O_RDWR | os.O_DIRECT)
    it.cut_off()
    it.kernel.make_stale(it.disk)
    await it.until(answer := it.start(it.request(handle, op)))
    assert answer == [-errno.EIO]
    it.cut_off_no_more(opens_wait=False)
    await trio.sleep(1)
    assert handle.image.opening is None
    assert await it.requests.read(handle, 0, 3) == b"ooo"
    assert it.kernel.open_files == 1


@pytest.mark.parametrize("flags", [os.O_RDONLY, os.O_RDWR | os.O_DIRECT, os.O_RDWR])
async def test_what_comes_too_late_is_closed(cut: Make, autojump_clock: MockClock, flags: int) -> None:
    """P10: a close waits for the data and not for the open(2), and nothing is left of it."""
    it = cut(policy(3, interval_s=1))
    handle = it.open(flags)
    if flags == os.O_RDWR:  # its witness
        it.opens_wait = True
        await it.until(it.start(it.request(handle, Op.WRITE)))
    else:
        it.cut_off()
        await it.until(it.start(it.request(handle, Op.READ)))
    assert handle.image.opening is not None
    it.failing.clear()
    with trio.fail_after(12):
        await it.close(handle)
    assert it.requests.images == {}
    it.opens_wait = False
    await trio.sleep(2)
    assert it.kernel.open_files == 0
    assert it.kernel.violations == []


async def test_each_time_that_it_is_opened_anew_is_another_owner(
    cut: Make, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`source.owning`: the one that the dead inode was opened as is not used again; attempts that fail use none up."""
    owners: list[int] = []
    real = Backing.renew

    def renew(backing: Backing, where: Where, owner: int = 0) -> bool:
        done = real(backing, where, owner)
        owners.append(owner)
        return done

    monkeypatch.setattr(Backing, "renew", renew)
    it = cut(policy(1000))
    handle = it.open(os.O_RDWR | os.O_DIRECT)
    for outage in (1, 2, 3):
        it.failing.update(dict.fromkeys(OUTAGE, Fault(errno.ESTALE)))
        answer = it.start(lambda: it.requests.write(handle, 0, b"new"))
        await trio.sleep(60)
        it.failing.clear()
        await it.until(answer)
        assert answer == [3]
        assert owners[-1] == outage == len(owners)
