"""Seeded simulations of whole images: the real `Requests` and `Backing`, on trio's clock and on kernel.py.

1. `Model` is what a consumer may believe. It knows nothing of iohang_fuse: requests arrive and are answered, and every read,
   and the disk at every moment, must be explained by those (P3 to P6). It judges by *units* of four bytes.
2. `Sky` flies attempts: each takes its time, and its work is done at one moment of it. While it is inside a system call, the
   work of others may be done, and pages be written back.
3. `Simulation` is the consumers, the weather and the end of one seed. `run(seed)` raises `Failed` with the seed's history.

A unit's word says which request it is from, and where it belongs: `number << 12 | unit`. Requests are numbered as they
arrive. 0 is a hole.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import math
import os
import random
from array import array
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import TYPE_CHECKING

import outcome
import pytest
import trio
from trio.testing import MockClock

from iohang_fuse import backing as backing_module
from iohang_fuse import writelog
from iohang_fuse.backing import Backing
from iohang_fuse.engine import Abandoned
from iohang_fuse.events import Op
from iohang_fuse.rehandle import Policy
from iohang_fuse.source import SERVER, Opened, Where
from tests.shell.fakes import BegunRequests
from tests.shell.kernel import Disk, Fault, Kernel

if TYPE_CHECKING:
    from collections.abc import Callable

    from iohang_fuse.images import Handle

UNIT = 4
BITS = 12  # of a word: the unit's number
NAME = b"disk.img"
FOREVER = math.inf

ERRNOS = [errno.EIO, errno.EIO, errno.ETIMEDOUT, errno.ENOTCONN]
TRANSIENT = frozenset({errno.EIO, errno.ETIMEDOUT, errno.ESTALE, errno.ENOTCONN})


class Failed(AssertionError):
    """A promise was broken."""


# ---- what a consumer may believe


@dataclass(eq=False)
class Change:
    """A write of the units `start <= unit < end`, or with *end* None a change of size to *start* units."""

    number: int
    start: int
    end: int | None
    ok: bool | None = None  # None: not yet answered
    answered: int = 0  # on the model's own clock, which counts what happens
    durable: bool = False  # a crash may not lose it
    lost: bool = False  # nobody was left to whom it could be promised

    def word(self, unit: int) -> int:
        """What the unit is once this has landed."""
        return 0 if self.end is None else self.number << BITS | unit


class Model:
    """The requests on one file, and what they allow."""

    def __init__(self, size: int, most: int) -> None:
        """*size* and *most*: units that the file has, and ever can have."""
        self.clock = 0
        self.size = size
        self.changes: list[Change] = [Change(0, 0, size, ok=True, durable=True)]
        self.at: list[list[Change]] = [[self.changes[0]] if unit < size else [] for unit in range(most)]
        self.landed = [0] * most  # by unit: the youngest change that has reached the file
        self.durable_size = 0  # index into `changes`, from which sizes are reckoned

    # requests

    def begin(self) -> int:
        """A request arrives. Returns the moment."""
        self.clock += 1
        return self.clock

    def change(self, start: int, end: int | None) -> Change:
        """A write or a change of size arrives."""
        self.clock += 1
        change = Change(len(self.changes), start, end)
        self.changes.append(change)
        for unit in self.at[start:end]:
            unit.append(change)
        return change

    def answer(self, change: Change, *, ok: bool, durable: bool = False) -> None:
        self.clock += 1
        change.ok, change.answered, change.durable = ok, self.clock, ok and durable

    def synced(self, arrived_change: int) -> str:
        """A sync is answered 0 that arrived when there were so many changes. Returns what it ought to have waited for."""
        for change in self.changes[:arrived_change]:
            if change.ok is None:
                return f"a sync was answered before {change}, which had arrived before it"
            change.durable |= change.ok and not change.lost
        return ""

    def forget(self) -> None:
        """The last writer has gone and was told that its data may be lost."""
        for change in self.changes:
            change.lost |= not change.durable

    # what they allow

    def allowed(self, unit: int, must: Callable[[Change], bool], upto: int | None = None) -> set[int]:
        """The words that *unit* may have where all changes that *must* have landed have."""
        words = set()
        for change in reversed(self.at[unit]):
            if upto is None or change.number < upto:
                words.add(change.word(unit))
                if must(change):
                    return words
        words.add(0)
        return words

    def sizes(self, must: Callable[[Change], bool]) -> int:
        """The sizes that the file may have, in units: bit n for n."""
        mask = 1
        for change in self.changes:
            if change.end is None:
                new = 1 << change.start
                if not must(change) and mask >> change.start:  # and what it cut off was written again in part
                    new |= (1 << mask.bit_length()) - (1 << change.start)
            else:  # it may have landed in part
                below = mask & ((1 << change.end) - 1)
                least = (below & -below).bit_length() - 1
                new = mask & ~((1 << change.end) - 1)
                if below:
                    new |= 1 << change.end
                    if not must(change):
                        new |= (1 << change.end) - (1 << least)  # by pages: zeros before it, too
            mask = new if must(change) else mask | new
        return mask

    def judge_read(self, arrived: int, changes: int, start: int, count: int, data: bytes) -> str:
        """A read of *count* units at *start* is answered, that arrived at *arrived*, after so many changes."""
        words = array("I", data[: len(data) // UNIT * UNIT])
        if len(data) % UNIT or len(words) > count:
            return f"a read of {count} units was answered with {len(data)} bytes"

        def settled(change: Change) -> bool:
            return bool(change.ok) and change.answered < arrived and not change.lost

        def before(change: Change) -> bool:  # P4: what overlaps is waited for
            return bool(change.ok) and change.number < changes and not change.lost

        for unit, word in enumerate(words, start):
            allowed = self.allowed(unit, before)
            if word not in allowed:
                return f"a read got {told(word)} in unit {unit}; allowed: {', '.join(map(told, sorted(allowed)))}"
        concurrent = any(
            change.end is None and (change.ok is None or change.answered > arrived) for change in self.changes
        )
        if not concurrent:
            have = start + len(words)
            sizes = self.sizes(settled)
            fits = (
                sizes >> have if len(words) == count else sizes >> have & 1 or (not words and sizes & (1 << have) - 1)
            )
            if not fits:
                return f"a read of {count} units at {start} got {len(words)}; possible sizes: {spans(sizes)}"
        return ""

    def judge_disk(self, data: bytes) -> str:
        """What a crash at this moment would leave."""

        def must(change: Change) -> bool:
            return change.durable

        words = array("I", bytes(data[: len(data) // UNIT * UNIT]))
        if len(data) % UNIT:
            return f"the disk has {len(data)} bytes"
        for unit, word in enumerate(words):
            of_unit = self.at[unit]
            if of_unit and word == of_unit[-1].word(unit):
                continue
            allowed = self.allowed(unit, must)
            if word not in allowed:
                return f"the disk has {told(word)} in unit {unit}; allowed: {', '.join(map(told, sorted(allowed)))}"
        sizes = self.sizes(must)
        if not sizes >> len(words) & 1:
            return f"the disk has {len(words)} units; possible: {spans(sizes)}"
        return ""

    def content(self, change: Change) -> bytes:
        """What a write has to write."""
        assert change.end is not None
        return array("I", map(change.word, range(change.start, change.end))).tobytes()


def told(word: int) -> str:
    """A word in words."""
    return f"#{word >> BITS}@{word & (1 << BITS) - 1}" if word else "0"


def spans(mask: int) -> str:
    """The bits of a mask."""
    return ",".join(str(bit) for bit in range(mask.bit_length()) if mask >> bit & 1)


# ---- attempts


class WouldBlock(BaseException):
    """A thread would have to wait here. Its work is begun again later: nothing takes a lock after its first effect."""


class Lock:
    """threading.Lock, where only one thread at a time goes on."""

    def __init__(self) -> None:
        self.taken = False

    def __enter__(self) -> None:
        if self.taken:
            raise WouldBlock
        self.taken = True

    def __exit__(self, *_: object) -> None:
        self.taken = False

    def acquire(self, *, blocking: bool) -> bool:
        assert not blocking
        taken, self.taken = self.taken, True
        return not taken

    def release(self) -> None:
        self.taken = False


class Sky:
    """Where attempts fly."""

    def __init__(self, nursery: trio.Nursery, takes_s: Callable[[], tuple[float, float]]) -> None:
        """*takes_s*: seconds until the work of the next attempt is done, and from there until it returns."""
        self.nursery = nursery
        self.takes_s = takes_s
        self.pending: list[Flight] = []  # whose work is not yet done

    def flight(self, work: Callable[[], object], late: Callable[[], None], *, calm: bool = False) -> Flight:  # noqa: ARG002
        return Flight(self, work, late)

    async def serve(self) -> None:
        """Flights bring themselves back."""


class Flight:
    """`engine.Flight`, on trio's clock."""

    def __init__(self, sky: Sky, work: Callable[[], object], late: Callable[[], None]) -> None:
        self._sky = sky
        self._work = work
        self._late = late
        self._tell: Callable[[outcome.Outcome[object]], object] | None = None
        self._result: outcome.Outcome[object] | None = None

    async def land(self) -> object:
        self.take_off(functools.partial(trio.lowlevel.reschedule, trio.lowlevel.current_task()))
        return await trio.lowlevel.wait_task_rescheduled(self._abort)

    def take_off(self, tell: Callable[[outcome.Outcome[object]], object]) -> None:
        self._tell = tell
        self._sky.pending.append(self)
        self._sky.nursery.start_soon(self._fly)

    def abandon(self) -> None:
        if self._tell is not None:
            tell, self._tell = self._tell, None
            tell(outcome_of(Abandoned()))

    def perform(self) -> None:
        """Do the work, unless it was done while another was inside a system call."""
        if self in self._sky.pending:
            self._sky.pending.remove(self)  # it may come to a moment in which others' work is done
            try:
                self._result = outcome_of(self._work)
            except WouldBlock:
                self._sky.pending.append(self)

    async def _fly(self) -> None:
        before_s, after_s = self._sky.takes_s()
        await trio.sleep(before_s)
        self.perform()
        while self._result is None:  # an open(2) waits
            await trio.sleep(0.5)
            self.perform()
        if after_s:
            await trio.sleep(after_s)
        if self._tell is None:
            self._late()
        else:
            tell, self._tell = self._tell, None
            tell(self._result)

    def _abort(self, _raise_cancel: object) -> trio.lowlevel.Abort:
        self._tell = None
        return trio.lowlevel.Abort.SUCCEEDED


def outcome_of(work: Callable[[], object] | BaseException) -> outcome.Outcome[object]:
    """`outcome.capture`, for everything but WouldBlock."""
    if isinstance(work, BaseException):
        return outcome.Error(work)
    result = outcome.capture(work)
    if isinstance(result, outcome.Error) and isinstance(result.error, WouldBlock):
        raise result.error
    return result


def patch_engine(patch: pytest.MonkeyPatch, kernel: Kernel) -> None:
    """Have backing.py run on *kernel*."""
    patch.setattr(backing_module, "os", kernel.os)
    patch.setattr(backing_module, "open_again", kernel.open_again)
    patch.setattr(backing_module, "open_same", kernel.open_same)
    patch.setattr(backing_module, "threading", SimpleNamespace(Lock=Lock))
    patch.setattr(writelog, "_ENTRY_BYTES", 0)  # small logs, so that they fill up
    patch.setattr(backing_module, "syscalls", kernel)


# ---- one seed


@dataclass
class Weather:
    """What the storage does for a while."""

    down: float = 0.0  # how likely an exchange fails
    writeback: float = 0.0  # how likely a page fails to be written back
    errno: int = errno.EIO
    effects: tuple[str, ...] = ("none",)
    slow_s: float = 0.01
    opens_wait: bool = False  # until it is over: the lease of NFS 4, or its server's grace period


class Settings:
    """What a seed has drawn."""

    def __init__(self, dice: random.Random) -> None:
        self.units = dice.choice([32, 128, 256, 512])
        self.size = dice.randrange(self.units + 1)
        self.consumers = dice.choice([1, 3, 8, 20])
        self.requests = dice.randint(30, 160)
        self.usual_s = dice.choice([0.01, 0.3, 2.0])  # what an attempt takes in fair weather, at most
        self.pause_s = dice.choice([0.05, 0.3, 1.0])
        self.span = dice.choice([4, 16, 40])  # units of a request, at most
        times = [3.0, 10.0, 60.0, 60.0]
        self.timeout_s = {op: dice.choice(times) for op in Op}
        self.interval_s = dice.choice([0.5, 2.0, 5.0])
        self.write_log = dice.choice([256, 1024, 4096, 4096])
        self.held_limit = dice.choice([400, 1 << 20, 1 << 20])
        self.racing = dice.random() < 0.2
        self.flags = dice.choice(
            [
                [os.O_RDWR],
                [os.O_RDWR, os.O_RDONLY],
                [os.O_RDWR | os.O_DIRECT],
                [os.O_RDWR | os.O_DSYNC],
                [os.O_RDWR, os.O_RDWR | os.O_DSYNC, os.O_RDWR | os.O_DIRECT, os.O_RDONLY, os.O_WRONLY],
            ]
        )
        self.direct_is_stable = dice.random() < 0.5
        self.truncates = dice.choice([0.0, 0.0, 0.1])
        self.syncs = dice.choice([0.03, 0.2])
        self.reads = dice.choice([0.2, 0.5])
        self.handles = dice.choice([1, 2, 5])
        self.reopening = dice.choice([0.0, 0.02, 0.1])
        self.badness = dice.choice([0.0, 0.3, 0.7, 1.0])
        self.misses = dice.choice([0.0, 0.3, 1.0])  # how likely a page that failed leaves the cache
        self.nested = dice.choice([0.0, 0.1, 0.4])
        self.cut = dice.choice([0.0, 0.0, 0.2])  # how likely a call is short
        self.few_descriptors = dice.random() < 0.1
        self.operators = dice.choice([0.0, 0.0, 0.2])
        self.ends_held = dice.random() < 0.15
        self.nowait = dice.random() < 0.5

    @property
    def policy(self) -> Policy:
        return Policy(
            timeout_s=self.timeout_s,
            interval_s=self.interval_s,
            errors=TRANSIENT,
            timeout_errno=errno.EIO,
            blocked_after_s=5.0,
        )


@dataclass(eq=False)
class Open:
    """An open handle, and the requests on it."""

    handle: Handle
    flags: int
    busy: int = 0
    closing: bool = False

    @property
    def readable(self) -> bool:
        return self.flags & os.O_ACCMODE != os.O_WRONLY

    @property
    def writable(self) -> bool:
        return self.flags & os.O_ACCMODE != os.O_RDONLY


@dataclass
class Report:
    """What a run was, for whoever wonders whether it was worth it."""

    requests: int = 0
    failed: int = 0
    recoveries: int = 0
    disks: int = 0
    events: list[str] = field(default_factory=list)


class Simulation:
    """One seed."""

    def __init__(self, seed: int, **fixed: object) -> None:
        """*fixed*: settings that the seed does not draw."""
        self.seed = seed
        self.dice = random.Random(seed)
        self.set = Settings(self.dice)
        vars(self.set).update(fixed)
        self.model = Model(self.set.size, self.set.units)
        self.kernel = Kernel()
        self.disk: Disk = self.kernel.create(NAME, self.model.content(self.model.changes[0]))
        self.decoy = Disk(99, bytearray(b"somebody else's"))
        self.fair = Weather(slow_s=self.set.usual_s)
        self.weather = self.fair
        self.history: list[str] = []
        self.report = Report()
        self.problem = ""
        self.opens: list[Open] = []
        self.left = self.set.requests
        self.nesting = 0
        self.answer_s = 0.0  # the longest that a request took
        self.told_of_loss: set[int] = set()  # handles whose flush has failed
        self.longest_s = 0.0
        self.ended = False

    # ---- the outside

    def run(self) -> Report:
        """Raises `Failed`."""
        with pytest.MonkeyPatch.context() as patch:
            patch_engine(patch, self.kernel)
            patch.setattr(trio._core._run, "_ALLOW_DETERMINISTIC_SCHEDULING", True)
            trio._core._run._r.seed(self.seed)
            try:
                trio.run(self._main, clock=MockClock(autojump_threshold=0))
            except (Exception, BaseExceptionGroup) as error:
                self.problem = self.problem or f"{type(error).__name__}: {error}"
                raise Failed(self._story()) from error
        if self.problem:  # found in an attempt that nobody awaited
            raise Failed(self._story())
        self.report.events = self.history
        return self.report

    def _story(self) -> str:
        settings = ", ".join(f"{name}={value!r}" for name, value in vars(self.set).items())
        return "\n".join([f"seed {self.seed}: {self.problem}", settings, *self.history[-5000:], self.problem])

    def note(self, text: str) -> None:
        self.history.append(f"{trio.current_time() - self.began_s:9.3f} {text}")

    def fail(self, text: str) -> None:
        """A promise is broken: the run ends."""
        if text and not self.problem:
            self.problem = text
            self.note(text)
        if text:
            raise Failed(text)

    async def _main(self) -> None:
        self.began_s = trio.current_time()
        with trio.fail_after(100_000):
            async with trio.open_nursery() as nursery, trio.open_nursery() as flying:
                self.sky = Sky(flying, self._takes_s)
                self._connect()
                self.nursery = nursery
                self.requests = BegunRequests(
                    self.set.policy, self.set.held_limit, [self._event], write_log=self.set.write_log, engine=self.sky
                )
                async with trio.open_nursery() as serving:
                    self.serving = serving
                    serving.start_soon(self.requests.serve, serving)
                    await trio.lowlevel.checkpoint()
                    await self._live()
                    serving.cancel_scope.cancel()

    def _connect(self) -> None:
        kernel, dice = self.kernel, self.dice
        kernel.fault = self._fault
        kernel.drops = lambda: dice.random() < self.set.misses
        kernel.most = self._most
        kernel.before_call = self._meanwhile
        kernel.wrote = self._wrote
        kernel.resized = self._resized
        kernel.note = lambda text: self.note(f"        {text}")
        kernel.racing = self.set.racing
        kernel.flushes_at_close = dice.random() < 0.5

    def _event(self, event: object) -> None:
        self.note(f"    {event}")

    # ---- the storage

    def _takes_s(self) -> tuple[float, float]:
        whole_s = self.dice.choice([0.0, self.weather.slow_s, self.weather.slow_s * self.dice.random()])
        self.longest_s = max(self.longest_s, whole_s)
        before_s = self.dice.choice([0.0, 0.5, 1.0]) * whole_s
        return before_s, whole_s - before_s

    def _most(self, count: int) -> int:
        if count > UNIT and self.dice.random() < self.set.cut:
            return self.dice.randrange(UNIT, count, UNIT)
        return count

    def _fault(self, exchange: str) -> Fault | None:
        weather = self.weather
        if self.dice.random() < 0.003:
            self.check_disk()
        if exchange == "open same" and self.set.few_descriptors:
            return Fault(errno.EMFILE)
        likely = max(weather.down, weather.writeback) if exchange == "writeback" else weather.down
        if not likely:
            return None
        if exchange == "write":
            likely /= 4  # to the page cache
        if self.dice.random() >= likely:
            return None
        effect = self.dice.choice(weather.effects)
        if effect == "late" and (
            exchange not in {"direct", "writeback", "truncate"} or (self.set.racing and exchange == "writeback")
        ):
            effect = "none"
        if effect == "part" and exchange == "truncate":
            effect = "whole"
        fault = Fault(weather.errno, effect)
        self.note(f"        {exchange}: {errno.errorcode[fault.errno]}, {effect}")
        return fault

    def _meanwhile(self, call: str) -> None:
        """What happens while a thread enters the kernel."""
        if self.weather.opens_wait and call.startswith("open_"):
            raise WouldBlock
        dice = self.dice
        what = dice.random()
        if what < 0.08:
            self.kernel.write_back(self.disk, dice.choice([1, 4]))
        elif what < 0.1:
            self.kernel.evict(self.disk)
        elif what < 0.11:
            self.check_disk()
        if self.nesting < 3 and self.sky.pending and dice.random() < self.set.nested:
            self.nesting += 1
            self.sky.pending[dice.randrange(len(self.sky.pending))].perform()
            self.nesting -= 1
        self.note(f"      {call}")

    def check_disk(self) -> None:
        self.report.disks += 1
        problem = self.model.judge_disk(self.disk.data)
        if problem:
            self.fail(f"P3: after a crash, {problem}")

    def _wrote(self, disk: Disk, offset: int, data: bytes) -> None:
        if disk is not self.disk:
            self.fail("P5: a write to another file of that name")
        words = array("I", data)
        landing = {self.model.changes[word >> BITS].number for word in words}  # several, when the log is written again
        self.note(f"      {sorted(landing)} land in {offset // UNIT}..{offset // UNIT + len(words)}")
        for unit, word in enumerate(words, offset // UNIT):
            change = self.model.changes[word >> BITS]
            if word != change.word(unit):
                self.fail(f"a write of #{change.number} puts {told(word)} into unit {unit}")
            if change.ok is None:
                if self.model.landed[unit] > change.number:
                    self.fail(f"P4: #{change.number} lands in unit {unit} after #{self.model.landed[unit]}")
                self.model.landed[unit] = change.number
            if change.ok is False:
                self.fail(f"P5: #{change.number} was answered with an error, and lands")

    def _resized(self, _disk: Disk, size: int) -> None:
        asked = [c for c in self.model.changes if c.end is None and c.start * UNIT == size and c.ok is None]
        self.note(f"      size {size // UNIT}: {[change.number for change in asked]}")
        if not asked:
            self.fail(f"P5: a change of size to {size} lands that is answered")
        for unit in range(size // UNIT, self.set.units):
            if self.model.landed[unit] > asked[-1].number:
                self.fail(
                    f"P4: #{asked[-1].number}, a change of size, lands in {unit} after #{self.model.landed[unit]}"
                )
            self.model.landed[unit] = max(self.model.landed[unit], asked[0].number)

    async def _change_weather(self) -> None:
        """Outages, and everything else that befalls a file server."""
        dice = self.dice
        while True:
            await trio.sleep(dice.choice([0.2, 1.0, 4.0]))
            self._operate()
            if dice.random() >= self.set.badness:
                continue
            lasts_s = self._spoil()
            if self.weather.opens_wait:
                lasts_s = dice.choice([lasts_s, 1000.0])  # what waits for it is not given up in time
            await trio.sleep(lasts_s)
            self._clear_up()

    def _operate(self) -> None:
        """An operator has all that is held tried now, or answered now."""
        if self.dice.random() < self.set.operators and not self.ended:
            for image in self.requests.images.values():
                decide = self.dice.choice([image.held.retry, image.held.retry, image.held.end])
                self.note(f"operator: {decide.__name__}")
                self.requests._apply(image, decide(trio.current_time()))

    def _spoil(self) -> float:
        """Another weather. Returns how many seconds it lasts."""
        dice, kernel = self.dice, self.kernel
        effects = dice.choice(
            [("none",), ("none", "whole", "part"), ("none", "late"), ("none", "part", "whole", "late")]
        )
        number = dice.choice(ERRNOS)
        what = dice.choice("outage outage flaky writeback writeback full slow stale remount replaced grace".split())
        self.note(f"weather: {what}")
        lasts_s = dice.choice([0.1, 1.0, 5.0, 30.0, 80.0])
        slow_s = dice.choice([0.01, 0.5, 8.0])
        match what:
            case "outage" | "grace":  # and in a grace period, what is open works
                down = float(what == "outage")
                opens_wait = what == "grace" or dice.random() < 0.5
                self.weather = Weather(down, down, number, effects, slow_s, opens_wait)
            case "flaky":
                self.weather = Weather(0.3, 0.3, number, effects, slow_s)
            case "writeback":
                self.weather = Weather(0.0, dice.choice([0.05, 0.3, 1.0]), number, effects, slow_s)
            case "full":
                self.weather = Weather(0.0, 0.5, errno.ENOSPC, ("none", "part"), slow_s)
            case "slow":
                self.weather = Weather(slow_s=dice.choice([1.0, 30.0]))
            case "stale":
                kernel.make_stale(self.disk)
                lasts_s = 0.0
            case "remount":
                kernel.remount(self.disk)
                lasts_s = 0.0
            case "replaced":
                kernel.names[NAME] = self.decoy
                if dice.random() < 0.5:
                    kernel.make_stale(self.disk)
        return lasts_s

    def _clear_up(self) -> None:
        self.note("weather: fair")
        self.weather = self.fair
        self.kernel.names[NAME] = self.disk

    # ---- the consumers

    async def _live(self) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._change_weather)
            async with trio.open_nursery() as consumers:
                for _ in range(self.set.consumers):
                    consumers.start_soon(self._consume)
                consumers.start_soon(self._flush_pages)
                if self.set.ends_held:
                    consumers.start_soon(self._end)
            nursery.cancel_scope.cancel()
        self._clear_up()
        await trio.sleep(2 * self.set.interval_s + self.longest_s)
        if not self.ended:
            await self._works_again()
        await self._close_all()

    async def _flush_pages(self) -> None:
        """The kernel's flusher thread; and the check that every request ends."""
        quiet_s = 0.0
        while self.left > 0 or any(each.busy for each in self.opens):
            await trio.sleep(0.5)
            if self.dice.random() < 0.3:
                self.kernel.write_back(self.disk, 1)
            quiet_s = 0.0 if self.left > 0 else quiet_s + 0.5
            if quiet_s == 200:
                self._clear_up()
            if quiet_s > 3000:
                self.fail("P8: a request is not answered")

    async def _end(self) -> None:
        """SIGTERM."""
        await trio.sleep(self.dice.uniform(0, self.set.requests / self.set.consumers * self.set.pause_s))
        self.note("hold no more")
        self.ended = True
        self.requests.hold_no_more()

    async def _consume(self) -> None:
        dice = self.dice
        while self.left > 0:
            self.left -= 1
            one = await self._some_handle()
            what = dice.random()
            if what < self.set.reopening:
                await self._close(one)
                continue
            one.busy += 1
            began_s = trio.current_time()
            try:
                await self._request(one)
            finally:
                one.busy -= 1
            self._bounded(trio.current_time() - began_s)
            if dice.random() < 0.7:
                await trio.sleep(dice.random() * self.set.pause_s)

    def _bounded(self, took_s: float) -> None:
        self.answer_s = max(self.answer_s, took_s)
        # Its own timeout begins with its first failure, or in a sick image with its arrival; before that it waits for its turn.
        most_s = 2 * max(self.set.timeout_s.values()) + 12 * self.longest_s + 4 * self.set.interval_s + 10
        if took_s > most_s:
            self.fail(f"P1, P8: a request took {took_s:.1f} s, and {most_s:.1f} would be enough")

    async def _some_handle(self) -> Open:
        while True:
            usable = [one for one in self.opens if not one.closing]
            if usable and (len(usable) >= self.set.handles or self.dice.random() < 0.7):
                return self.dice.choice(usable)
            flags = self.dice.choice(self.set.flags)
            try:
                return self._open(flags)
            except OSError as error:
                self.note(f"open: {error}")
                await trio.sleep(0.2)

    def _open(self, flags: int) -> Open:
        if self.kernel.names[NAME] is not self.disk:
            raise OSError(errno.ENOENT, "replaced")
        fd = self.kernel.open(NAME, flags)
        stable = bool(flags & os.O_DSYNC) or (bool(flags & os.O_DIRECT) and self.set.direct_is_stable)
        nowait = self.set.nowait and not flags & (os.O_DIRECT | os.O_WRONLY)
        opened = Opened(fd, flags, stable, nowait=nowait)
        handle = self.requests.opened(1, "disk.img", Backing(opened, SERVER), flags)
        if handle.image.where is None:
            disk = self.disk
            handle.image.where = lambda size: Where("", NAME, disk.number, b"", size)
            self._watch(handle)
        one = Open(handle, flags)
        self.opens.append(one)
        self.note(f"handle {handle.number} opened with {flags:o}")
        return one

    def _watch(self, handle: Handle) -> None:
        """Note what becomes of the write log."""
        log = handle.image.log
        clear = log.clear

        def cleared() -> int:
            lost = clear()
            if lost:
                self.note(f"the log's {lost} bytes are lost")
                self.model.forget()
                # Who has been flushed, and waits for its release, has written nothing since.
                writers = {one.handle.number for one in self.opens if one.writable and not one.closing}
                if not self.told_of_loss or not writers <= self.told_of_loss:
                    self.fail("P3: acknowledged data was dropped, and close(2) was told that all is well")
            return lost

        log.clear = cleared  # type: ignore[method-assign]

    async def _close(self, one: Open) -> None:
        one.closing = True
        while one.busy:  # noqa: ASYNC110 - the end of the last of many
            await trio.sleep(0.05)
        number = one.handle.number
        if one.writable and one.handle.image.log:
            changes = len(self.model.changes)
            self.note(f"handle {number}: flush")
            try:
                await self.requests.sync(one.handle, data_only=True)
            except OSError as error:
                self.note(f"handle {number}: flush: {error}")
                self.told_of_loss.add(number)
            else:
                self._synced(changes)
        self.note(f"handle {number}: release")
        unused = await self.requests.released(number)
        self.opens.remove(one)
        for backing in unused if isinstance(unused, list) else [unused]:
            with contextlib.suppress(OSError):
                backing.close()
        self.note(f"handle {number} closed")

    def _synced(self, changes: int) -> None:
        self.fail(self.model.synced(changes))
        self.check_disk()

    async def _request(self, one: Open) -> None:
        dice = self.dice
        self.report.requests += 1
        units = self.set.units
        start = dice.randrange(units)
        count = min(dice.randint(1, self.set.span), units - start)
        what = dice.random()
        try:
            if what < self.set.syncs:
                await self._sync(one)
            elif one.writable and what < self.set.syncs + self.set.truncates:
                await self._change(one, self.model.change(start, None))
            elif one.readable and (not one.writable or what < self.set.syncs + self.set.truncates + self.set.reads):
                await self._read(one, start, count)
            elif one.writable:
                await self._change(one, self.model.change(start, start + count))
        except OSError as error:
            self.report.failed += 1
            if error.errno not in {*TRANSIENT, errno.ENOSPC}:
                raise

    async def _read(self, one: Open, start: int, count: int) -> None:
        arrived, changes = self.model.begin(), len(self.model.changes)
        data = await self.requests.read(one.handle, start * UNIT, count * UNIT)
        self.note(f"read of {start}..{start + count} by {one.handle.number}")
        problem = self.model.judge_read(arrived, changes, start, count, data)
        if problem:
            self.fail(f"P3, P4, P6: {problem}")

    async def _sync(self, one: Open) -> None:
        self.model.begin()
        changes = len(self.model.changes)
        self.note(f"sync by {one.handle.number}")
        try:
            await self.requests.sync(one.handle, data_only=self.dice.random() < 0.5)
        except OSError as error:
            self.note(f"sync by {one.handle.number}: {error}")
            raise
        self.note(f"sync by {one.handle.number}: done")
        self._synced(changes)

    async def _change(self, one: Open, change: Change) -> None:
        self.note(f"#{change.number} {change.start}..{change.end} by {one.handle.number}")
        try:
            if change.end is None:
                await self.requests.truncate(one.handle, change.start * UNIT)
            else:
                data = self.model.content(change)
                done = await self.requests.write(one.handle, change.start * UNIT, data)
                if done != len(data):
                    self.fail(f"P6: {done} of {len(data)} bytes")
        except OSError as error:
            self.note(f"#{change.number}: {error}")
            self.model.answer(change, ok=False)
            raise
        self.note(f"#{change.number}: done")
        if (
            one.handle.image.log.bytes > self.set.write_log + 16 * self.set.span * UNIT
        ):  # what was in flight when it was full
            self.fail(f"P10: {one.handle.image.log.bytes} bytes are in the write log")
        self.model.answer(change, ok=True, durable=bool(one.flags & os.O_DSYNC))

    # ---- the end

    async def _works_again(self) -> None:
        """The storage is well again: everything has to be."""
        for one in [*self.opens]:
            if one.readable:
                await self._soon(
                    f"reads of handle {one.handle.number}", lambda one=one: self._read(one, 0, self.set.units)
                )
        if not any(one.writable for one in self.opens):
            self._open(os.O_RDWR)
        last = next(one for one in self.opens if one.writable)
        image = last.handle.image
        await self._soon("a sync", lambda: self._sync(last))
        for _ in range(2):
            await self._sync_when_open(last)
        if image.log:
            self.fail(f"P10: {len(image.log)} entries are in the write log after a quiet sync")
        if image.log.in_doubt or image.log.bytes:
            self.fail(f"P3: the log is in doubt after a quiet sync, with {image.log.bytes} bytes")
        await trio.sleep(2 * self.set.usual_s)  # the server's own sync and the probe may be under way
        held = image.held
        if held.in_flight or held.held or held.waiting or self.requests._held_bytes.held:
            self.fail(
                f"P10: {held.in_flight} in flight, {len(held.held)} held, {self.requests._held_bytes.held} bytes, by nobody"
            )
        for one in self.opens:
            if one.readable:
                await self._read(one, 0, self.set.units)

    async def _close_all(self) -> None:
        """Nothing is left of what was open."""
        while self.opens:
            await self._close(self.opens[0])
        if self.requests.images or self.requests.handles or self.kernel.open_files:
            self.fail(f"P10: {len(self.requests.images)} images, {self.kernel.open_files} descriptors are left")
        await trio.sleep(2 * self.set.interval_s + 1)
        tasks = {task.name for task in self.serving.child_tasks}
        if len(tasks) > 1:
            self.fail(f"P10: tasks are left: {tasks}")
        if self.kernel.violations:
            self.fail(self.kernel.violations[0])
        if self.decoy.data != b"somebody else's":
            self.fail("P5: another file was written to")

    async def _sync_when_open(self, last: Open) -> None:
        """A read's open(2) may be under way, and then one for the syncs: each takes its time, and a sync goes on without."""
        image = last.handle.image
        if image.log.in_doubt:
            with trio.fail_after(600):
                while image.opening is not None:  # noqa: ASYNC110 - on a clock that jumps
                    await trio.sleep(0.1)
            await self._soon("one more sync", lambda: self._sync(last))

    async def _soon(self, what: str, request: Callable[[], object]) -> None:
        """It works within a few intervals, as a consumer sees it who asks again and again."""
        for _ in range(12):
            began_s = trio.current_time()
            try:
                await request()  # type: ignore[misc]
            except OSError as error:
                self.note(f"{what}: {error}")
                await trio.sleep(self.set.interval_s)
            else:
                self._bounded(trio.current_time() - began_s)
                return
        self.fail(f"the storage is well again, and {what} fail for ever")


def run(seed: int, **fixed: object) -> Report:
    """Raises `Failed` with the history of *seed*. *fixed*: settings that it does not draw."""
    return Simulation(seed, **fixed).run()
