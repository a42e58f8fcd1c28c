"""Whole images on a kernel that fails as Linux does, by seed; that the judge finds what it is for; and what it has found.

`IOHANG_SEEDS=10000 pytest tests/shell/test_simulation.py -k seeds` runs more of them, from `IOHANG_FIRST_SEED` on.
"""

# ruff: noqa: ARG001 - pytest-trio takes the clock from each test's own arguments

from __future__ import annotations

import contextlib
import errno
import os
from typing import TYPE_CHECKING

import pytest
import trio

from iohang_fuse.backing import Backing
from iohang_fuse.events import Op
from iohang_fuse.images import Handle, Image
from iohang_fuse.ordering import Ordering
from iohang_fuse.rehandle import RehandleList
from iohang_fuse.source import SERVER, Opened, Where
from iohang_fuse.writelog import WriteLog
from tests.core.world import policy
from tests.shell import simulation
from tests.shell.fakes import BegunRequests
from tests.shell.kernel import PAGE, Disk, Fault, Kernel
from tests.shell.simulation import NAME, Failed, Sky, patch_engine

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator, Sequence

    from trio.testing import MockClock

    from iohang_fuse.ordering import Turn
    from iohang_fuse.rehandle import Policy, Request
    from iohang_fuse.writelog import Entry

CHUNKS = 10
SEEDS = int(os.environ.get("IOHANG_SEEDS", "300"))
FIRST = int(os.environ.get("IOHANG_FIRST_SEED", "0"))


@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_seeds(chunk: int) -> None:
    """P1, P3, P4, P5, P6, P8, P10: whatever the storage does, and whenever its client crashes, each answer was true."""
    for seed in range(FIRST + SEEDS * chunk // CHUNKS, FIRST + SEEDS * (chunk + 1) // CHUNKS):
        simulation.run(seed)


# ---- the judge finds what it is for


def finds(seeds: int, *promises: str, **fixed: object) -> None:
    """One of so many seeds breaks one of the *promises*. *fixed*: settings that they do not draw."""
    found = []
    for seed in range(seeds):
        found.append(failure_of(seed, **fixed))
        if any(promise in found[-1] for promise in promises):
            return
    pytest.fail(f"the planted bug was not found; other failures: {[line for line in found if line]}")


def failure_of(seed: int, **fixed: object) -> str:
    """In a line; empty if there is none."""
    try:
        simulation.run(seed, **fixed)
    except Failed as failed:
        return str(failed).splitlines()[0]
    return ""


def test_planted_a_failed_sync_is_simply_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """P3: Linux reports a failed writeback once and then calls the pages clean."""
    monkeypatch.setattr(WriteLog, "doubt", lambda _log: None)
    finds(100, "P3")


def test_planted_nobody_waits_for_its_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    """P4: a request that overlaps a held or in-flight write of the same image waits for it."""
    monkeypatch.setattr(Ordering, "_earlier", lambda *_: iter(()))
    finds(100, "P4")


def test_planted_the_youngest_is_tried_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """P4: writes to one range land in the order in which they arrived."""

    def oldest_alone(self: Ordering[Request], start: int, end: float) -> Iterator[Turn[Request]]:
        return iter([turn for turn in self._unfinished if not turn.left and turn.overlaps(start, end)][:1])

    monkeypatch.setattr(Ordering, "_earlier", oldest_alone)  # those between have their turn in the same moment
    push = RehandleList._push_ready

    def last_first(self: RehandleList, request: Request, since_s: float) -> None:
        request.seq = -request.seq
        push(self, request, since_s)
        request.seq = -request.seq

    monkeypatch.setattr(RehandleList, "_push_ready", last_first)
    finds(100, "P4")


def test_planted_a_write_in_flight_is_answered_at_its_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    """P5: a write is never answered while an attempt is in flight."""
    overdue = RehandleList._overdue

    def impatient(self: RehandleList, now: float) -> list[Request]:
        late = [
            request
            for request in self.trying
            if request.deadline_s is not None and request.deadline_s <= now and request.held
        ]
        return [*dict.fromkeys([*overdue(self, now), *late])]

    monkeypatch.setattr(RehandleList, "_overdue", impatient)
    finds(300, "P5", "P4")


def test_planted_a_truncation_takes_the_whole_entry(monkeypatch: pytest.MonkeyPatch) -> None:
    """P3: what is left of a clipped write was acknowledged, too."""

    def careless(self: WriteLog, size: int) -> None:
        self._marked, self._since = (part.but(lambda entry: entry.end > size) for part in (self._marked, self._since))
        self._count()

    monkeypatch.setattr(WriteLog, "truncate", careless)
    finds(300, "P3")


def test_planted_the_log_is_forgotten_when_the_file_is_opened_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """P3: after any failed sync open the file anew, write the log again in order, and sync again."""
    monkeypatch.setattr(WriteLog, "to_rewrite", lambda _log: [])
    finds(100, "P3")


def test_planted_a_read_gets_what_the_storage_has(monkeypatch: pytest.MonkeyPatch) -> None:
    """P3: the storage may have dropped what the consumer was told is written, until it is written again."""

    def bare(_log: WriteLog, _start: int, _size: int, data: bytes, _before: Sequence[Entry], _end: int) -> bytes:
        return data

    monkeypatch.setattr(WriteLog, "overlay", bare)
    finds(100, "P3")


def test_planted_a_sync_covers_what_came_after_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """P3: a sync makes stable what was acknowledged before it began."""
    made_stable = Image.made_stable

    def generous(image: Image, _mark: int, *rest: int) -> None:
        made_stable(image, image.log.mark(), *rest)

    monkeypatch.setattr(Image, "made_stable", generous)
    finds(300, "P3")


# ---- what it has found


class Bench:
    """`Requests` on a fake kernel, without dice: faults are scripted by exchange, and flights by `takes_s`."""

    def __init__(
        self, nursery: trio.Nursery, patch: pytest.MonkeyPatch, given: Policy, write_log: int = 1 << 20
    ) -> None:
        self.kernel = Kernel()
        self.disk = self.kernel.create(NAME, b"o" * 4 * PAGE)
        self.failing: dict[str, Fault] = {}
        self.kernel.fault = self.failing.get
        self.flights_s: list[tuple[float, float]] = []  # of the next ones; then they take no time
        self.sky = Sky(nursery, lambda: self.flights_s.pop(0) if self.flights_s else (0.0, 0.0))
        patch_engine(patch, self.kernel)
        self.requests = BegunRequests(given, 1 << 20, [], write_log=write_log, engine=self.sky)
        nursery.start_soon(self.requests.serve, nursery)
        self.requests._nursery = nursery  # a test's first request comes before `serve` runs
        self.nursery = nursery

    def open(self, flags: int = os.O_RDWR) -> Handle:
        """A handle of a consumer."""
        backing = Backing(
            Opened(self.kernel.open(NAME, flags), flags, bool(flags & (os.O_DSYNC | os.O_DIRECT))), SERVER
        )
        handle = self.requests.opened(1, "disk.img", backing, flags)
        handle.image.where = lambda size: Where("", NAME, self.disk.number, b"", size)
        return handle

    async def close(self, handle: Handle) -> None:
        """As filesystem.py does it."""
        for backing in await self.requests.released(handle.number):
            with contextlib.suppress(OSError):
                backing.close()

    def lose(self) -> None:
        """The dirty pages fail to be written back, and leave the cache."""
        self.failing["writeback"] = Fault(errno.EIO)
        self.kernel.write_back(self.disk, 100)
        self.kernel.evict(self.disk)
        del self.failing["writeback"]

    def start(self, request: Callable[[], Awaitable[object]]) -> list[object]:
        """Begin a request; the list gets its result, or its errno negated."""
        answer: list[object] = []

        async def one() -> None:
            try:
                answer.append(await request())
            except OSError as error:
                answer.append(-(error.errno or 0))

        self.nursery.start_soon(one)
        return answer


@pytest.fixture
def bench(nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Bench]:
    def make(given: Policy | None = None, **more: int) -> Bench:
        return Bench(nursery, monkeypatch, given or policy(), **more)

    return make


Make = "Callable[..., Bench]"


async def test_found_two_syncs_at_once(bench: Make, autojump_clock: MockClock) -> None:
    """P3: an fsync answered 0 means that every write acknowledged before it is stable, although another was told of the loss."""
    it = bench()
    handle = it.open()
    await it.requests.write(handle, 0, b"new")
    it.lose()
    it.flights_s = [(0.0, 10.0), (1.0, 0.0)]  # the first gets the report, and brings it late
    it.start(lambda: it.requests.sync(handle, data_only=True))
    await trio.sleep(0.5)
    await it.requests.sync(handle, data_only=True)
    assert it.disk.data[:3] == b"new"


async def test_found_a_write_with_o_dsync_uses_up_the_report_of_a_sync(bench: Make, autojump_clock: MockClock) -> None:
    """P3: the failure of a write on the description that a sync uses may be the only report that there is."""
    it = bench()
    handle, other = it.open(os.O_RDWR | os.O_DSYNC), it.open()
    await it.requests.write(other, 0, b"new")
    it.lose()
    it.flights_s = [(1.0, 0.0), (0.0, 10.0)]
    answer = it.start(lambda: it.requests.sync(other, data_only=True))
    await trio.sleep(0.5)
    it.start(lambda: it.requests.write(handle, 2 * PAGE, b"dsync"))
    while not answer:  # noqa: ASYNC110
        await trio.sleep(0.5)
    assert it.disk.data[:3] == b"new"


async def test_found_dead_descriptors_of_a_timed_out_image(bench: Make, autojump_clock: MockClock) -> None:
    """Section 4: ...until an attempt succeeds; a probe goes on each interval, which must be able to."""
    it = bench()
    handle = it.open(os.O_RDONLY)
    it.kernel.make_stale(it.disk)
    it.kernel.names[NAME] = Disk(1, bytearray())
    with pytest.raises(OSError, match="Input/output"):
        await it.requests.read(handle, 0, 3)
    it.kernel.names[NAME] = it.disk
    await trio.sleep(11)
    assert await it.requests.read(handle, 0, 3) == b"ooo"


async def test_found_a_time_out_that_the_page_cache_ended(bench: Make, autojump_clock: MockClock) -> None:
    """Section 4: after a give-up "new failures are answered at once, until an attempt succeeds": not one that the page cache took.

    And the probe notices that the storage is back: it writes the log again, and syncs it.
    """
    it = bench(policy(3), write_log=1 << 20)
    handle = it.open()
    await it.requests.write(handle, 0, b"new")
    it.failing["writeback"] = Fault(errno.EIO)
    with pytest.raises(OSError, match="Input/output"):
        await it.requests.sync(handle, data_only=True)
    for number in range(5):
        await it.requests.write(handle, PAGE * number, b"newer")
        assert handle.image.held.timed_out
        began_s = trio.current_time()
        with pytest.raises(OSError, match="Input/output"):
            await it.requests.sync(handle, data_only=True)
        assert trio.current_time() - began_s < 1
        await trio.sleep(7)
        assert handle.image.held.timed_out
    it.failing.clear()
    await trio.sleep(6)
    assert not handle.image.held.timed_out
    assert not handle.image.log
    assert it.disk.data[:5] == b"newer"


async def test_found_a_dead_descriptor_and_a_timeout_below_the_interval(bench: Make, autojump_clock: MockClock) -> None:
    """Section 4, Reopen: how often a descriptor has failed counts, and not how often one request has tried it."""
    it = bench(policy(3, interval_s=5))
    dead, well = it.open(os.O_RDONLY), it.open(os.O_RDONLY)
    next(iter(it.kernel._fds.values())).stale = True
    for _ in range(4):
        await it.requests.read(well, 0, 3)
        with contextlib.suppress(OSError):
            await it.requests.read(dead, 0, 3)
        await trio.sleep(10)
    assert await it.requests.read(dead, 0, 3) == b"ooo"


async def test_found_older_data_over_durable_data(bench: Make, autojump_clock: MockClock) -> None:
    """P3: what an O_DSYNC write has made stable is not older again while the log is written, not even for a moment."""
    it = bench()
    plain, durable = it.open(), it.open(os.O_RDWR | os.O_DSYNC)
    await it.requests.write(plain, 0, b"older")
    await it.requests.write(durable, 0, b"newer")
    plain.image.doubt()
    seen = set()

    def crash(_call: str) -> None:
        it.kernel.write_back(it.disk, 100)
        seen.add(bytes(it.disk.data[:5]))

    it.kernel.before_call = crash
    await it.requests.sync(plain, data_only=True)
    assert seen == {b"newer"}


async def test_found_a_fence_lifted_by_the_page_cache(bench: Make, autojump_clock: MockClock) -> None:
    """P5: ...only after another attempt has succeeded that has reached the storage."""
    it = bench(policy(3, interval_s=5))
    it.kernel.racing = True
    direct, cached = it.open(os.O_RDWR | os.O_DIRECT), it.open(os.O_RDONLY)
    await it.requests.read(cached, 2 * PAGE, 1)
    it.failing["direct"] = Fault(errno.ETIMEDOUT, "late")
    with pytest.raises(OSError, match="Input/output"):
        await it.requests.write(direct, 0, b"late")
    it.failing.clear()
    await it.requests.read(cached, 2 * PAGE, 1)
    await it.requests.write(direct, 0, b"new!")
    assert it.disk.data[:4] == b"new!"


async def test_found_a_read_beside_a_truncation(bench: Make, autojump_clock: MockClock) -> None:
    """P4: a read that began before a truncation gets what was there, or what is there, and nothing older than both."""
    it = bench()
    handle = it.open()
    await it.requests.write(handle, 20, b"older")
    await it.requests.write(handle, 10, b"n" * 15)
    it.flights_s = [(0.0, 10.0)]
    answer = it.start(lambda: it.requests.read(handle, 20, 5))
    await trio.sleep(1)
    await it.requests.truncate(handle, 12)
    await trio.sleep(20)
    assert answer[0] in {b"nnnnn", bytes(5), b""}


async def test_found_the_own_sync_of_a_closed_image(bench: Make, autojump_clock: MockClock) -> None:
    """P10, P11: no closed descriptor is used, whose number may be another file's; and nothing is left."""
    it = bench(policy(60, read_s=3), write_log=64)
    handle = it.open()
    it.failing.update(dict.fromkeys(["writeback", "fsync", "read"], Fault(errno.EIO)))
    await it.requests.write(handle, 0, b"x" * PAGE)  # the server's own sync fails, and is held for 60 s
    with pytest.raises(OSError, match="Input/output"):
        await it.requests.read(handle, 2 * PAGE, 1)
    await it.close(handle)  # timed out: its sync is answered at once
    assert it.requests.images == {}
    await trio.sleep(100)
    assert it.kernel.violations == []
    assert it.kernel.open_files == 0


async def test_found_a_witness_that_is_the_writer(bench: Make, autojump_clock: MockClock) -> None:
    """P3: where there is no descriptor for the witness, a retry of somebody opens it anew, and it has missed the report."""
    it = bench()
    handle = it.open()
    it.failing["open same"] = Fault(errno.EMFILE)
    await it.requests.write(handle, 0, b"new")
    it.kernel.remount(it.disk)
    await it.requests.read(handle, 2 * PAGE, 1)
    await it.requests.sync(handle, data_only=True)
    assert it.disk.data[:3] == b"new"


async def test_found_a_landing_before_the_file_is_opened_anew(bench: Make, autojump_clock: MockClock) -> None:
    """P3: a write that landed in a cache which is gone by the time it is acknowledged, while the witness was opened anew."""
    it = bench()
    handle = it.open()
    await it.requests.write(handle, 0, b"one")
    it.failing["fsync"] = Fault(errno.EIO)
    synced = it.start(lambda: it.requests.sync(handle, data_only=True))
    await trio.sleep(1)
    del it.failing["fsync"]
    it.flights_s = [(0.0, 10.0)]  # it lands at once, and its thread comes back late
    written = it.start(lambda: it.requests.write(handle, 2 * PAGE, b"two"))
    await trio.sleep(0.5)
    it.kernel.remount(it.disk)
    await trio.sleep(5)
    assert synced == [None]
    assert not written
    await trio.sleep(20)
    assert written == [3]
    await it.requests.sync(handle, data_only=True)
    assert it.disk.data[2 * PAGE : 2 * PAGE + 3] == b"two"


async def test_found_growth_that_only_a_cache_has(bench: Make, autojump_clock: MockClock) -> None:
    """Section 4: "a size that is not smaller than what is known to be stable": what lies in a cache may still be lost."""
    it = bench(policy(3))
    lost, kept = it.open(os.O_RDWR | os.O_DSYNC), it.open()
    it.failing["writeback"] = Fault(errno.EIO)
    grown = it.start(lambda: it.requests.write(lost, 8 * PAGE, b"x"))  # in the cache, not on the disk, and given up
    await trio.sleep(4)
    assert grown == [-errno.EIO]
    it.failing.clear()
    await trio.sleep(10)
    await it.requests.write(kept, 0, b"y")
    await it.requests.sync(kept, data_only=True)
    assert 0 < kept.image.stable_size <= 4 * PAGE


async def test_a_write_waits_while_the_log_is_written_again(bench: Make, autojump_clock: MockClock) -> None:
    """P4: what a younger write has put there is not overwritten by the older one from the log."""
    it = bench()
    handle = it.open()
    await it.requests.write(handle, 0, b"old!")
    handle.image.doubt()
    it.flights_s = [(0.0, 0.0), (10.0, 0.0)]  # opening anew, and the recovery, which knows by now what it will write
    synced = it.start(lambda: it.requests.sync(handle, data_only=True))
    await trio.sleep(1)
    written = it.start(lambda: it.requests.write(handle, 0, b"new!"))
    beside = it.start(lambda: it.requests.write(handle, 2 * PAGE, b"new!"))
    await trio.sleep(1)
    assert not written
    assert beside == [4]  # "Nothing else waits"
    await trio.sleep(20)
    assert (synced, written) == ([None], [4])
    await it.requests.sync(handle, data_only=True)
    assert it.disk.data[:4] == b"new!"


async def test_what_lands_while_the_witness_is_opened_anew_is_in_doubt(bench: Make, autojump_clock: MockClock) -> None:
    """P3: it may have been lost, and told to somebody else, before the new description was open: a plain sync proves nothing."""
    it = bench()
    handle = it.open()
    await it.requests.write(handle, 0, b"one")
    handle.image.doubt()
    it.flights_s = [(0.0, 0.0), (5.0, 0.0)]  # opening anew, and the recovery
    synced = it.start(lambda: it.requests.sync(handle, data_only=True))
    await trio.sleep(1)
    await it.requests.write(handle, 2 * PAGE, b"two")
    await trio.sleep(10)
    assert synced == [None]
    assert handle.image.log.in_doubt
    await it.requests.sync(handle, data_only=True)
    assert not handle.image.log.in_doubt


@pytest.mark.parametrize(("number", "doubted"), [(errno.EIO, True), (errno.ENOSPC, True), (errno.EFBIG, False)])
async def test_a_write_that_fails_puts_the_log_in_doubt(
    bench: Make, autojump_clock: MockClock, number: int, *, doubted: bool
) -> None:
    """P3: the error of a write may be the report of an earlier one's writeback (NFS): then it is used up."""
    it = bench(policy(0))
    handle, direct = it.open(), it.open(os.O_RDWR | os.O_DIRECT)
    await it.requests.write(handle, 0, b"one")
    it.failing["direct"] = Fault(number)
    with pytest.raises(OSError, match=os.strerror(number)):
        await it.requests.write(direct, 2 * PAGE, b"two")
    assert handle.image.log.in_doubt == doubted


async def test_found_a_timer_after_the_last_close(bench: Make, autojump_clock: MockClock) -> None:
    """P8: an image without handles has nobody left to whom it could work again: it is let go."""
    it = bench(policy(3))
    handle = it.open()
    image = handle.image
    await it.close(handle)
    await trio.sleep(1)
    request, step = image.held.arrive(Op.FSYNC, 0, 0, trio.current_time(), ordered=False)  # as the server's own sync
    it.requests._apply(image, step)
    it.requests._apply(image, image.held.failed(request, errno.EIO, trio.current_time()))
    await trio.sleep(100)  # given up
    assert not image.held.sick
    assert image.timer is None


async def test_found_how_far_the_file_reaches(bench: Make, autojump_clock: MockClock) -> None:
    """P6: a read of a hole is as long as the file was when it began, though a sync releases its end meanwhile."""
    it = bench()
    handle, direct = it.open(), it.open(os.O_RDONLY | os.O_DIRECT)
    await it.requests.write(handle, 8 * PAGE, b"end")
    it.lose()
    it.flights_s = [(0.0, 10.0)]  # the server's file ends before it, now
    answer = it.start(lambda: it.requests.read(direct, 5 * PAGE, PAGE))
    await trio.sleep(1)
    await it.requests.sync(handle, data_only=True)
    assert not handle.image.log
    await trio.sleep(20)
    assert answer == [bytes(PAGE)]


@pytest.mark.parametrize("what", ["full", "no holding"])
async def test_found_writes_that_wait_for_room_for_ever(bench: Make, autojump_clock: MockClock, what: str) -> None:
    """P8: no request waits longer than its bound, though the write log is full and the disk as well."""
    it = bench(policy(30), write_log=64)
    handle = it.open()
    it.failing["writeback"] = Fault(errno.ENOSPC if what == "full" else errno.EIO)
    if what == "no holding":
        it.requests.hold_no_more()
    answers = []
    for at in range(0, 1000, 100):
        answers.append(it.start(lambda at=at: it.requests.write(handle, at, b"x" * 60)))
        await trio.sleep(1)
    await trio.sleep(100)
    assert all(answers)


async def test_nobody_waits_for_the_first_write(bench: Make, autojump_clock: MockClock) -> None:
    """P4: "Nothing else waits": others wait for the witness to be open, and not for the write that had it opened."""
    it = bench()
    handle = it.open()
    it.flights_s = [(1.0, 0.0), (10.0, 0.0)]  # the opening of the witness, and the first write
    began_s = trio.current_time()
    answers = [it.start(lambda at=at: it.requests.write(handle, at, b"2222")) for at in (0, 64, 128, 192)]
    await trio.sleep(1.5)
    assert sorted(answers) == [[], [4], [4], [4]], "whichever was the first"
    assert not handle.image.log.in_doubt, "they waited for the witness"
    while [] in answers:  # noqa: ASYNC110 - on a clock that jumps
        await trio.sleep(0.1)
    assert trio.current_time() - began_s >= 11


async def test_without_a_witness_to_be_had_writes_go_on(bench: Make, autojump_clock: MockClock) -> None:
    """No descriptor left is no reason to wait: each write goes at once, and puts the log in doubt."""
    it = bench()
    handle = it.open()
    it.failing["open same"] = Fault(errno.EMFILE)
    it.flights_s = [(0.0, 0.0), *[(1.0, 0.0)] * 8]
    answers = [it.start(lambda at=at: it.requests.write(handle, at, b"2222")) for at in range(0, 64, 8)]
    await trio.sleep(1.2)
    assert answers == [[4]] * 8, "at once, and not one after the other"
    assert handle.image.log.in_doubt
    assert not handle.image.held.hanging
