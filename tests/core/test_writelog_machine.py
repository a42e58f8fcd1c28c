"""A machine that lives the life of one image's write log above a kernel that forgets, and is a consumer who forgets nothing.

It keeps the shell's rules (requests.py): a write that overlaps one under way waits, so does one that overlaps the log while
that is written again, and syncs come one at a time. More of it:
`IOHANG_MACHINE_EXAMPLES=5000 pytest tests/core/test_writelog_machine.py`.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING
from unittest import mock

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from iohang_fuse import ordering
from iohang_fuse.writelog import Entry, WriteLog

if TYPE_CHECKING:
    from random import Random

SIZE = 24  # small, so that ranges touch, overlap and enclose one another


def put(content: bytearray, start: int, data: bytes | memoryview) -> None:
    """What a write does to a file: zeros in the gap, if there is one."""
    content.extend(bytes(max(start - len(content), 0)))
    content[start : start + len(data)] = data


def cut(content: bytearray, size: int) -> None:
    """What a change of size does."""
    del content[size:]
    content.extend(bytes(size - len(content)))


@dataclass
class Write:
    """One that the log has, or that is under way."""

    start: int
    data: bytes
    stable: bool
    errors_before: int
    seq: int = 0
    cost: int = 0

    @property
    def end(self) -> int:
        return self.start + len(self.data)

    def overlaps(self, start: int, end: float) -> bool:
        return self.start < end and start < self.end


@dataclass
class Read:
    """One that is under way. *seen*: all that the file has been since it began, as its consumers know it."""

    start: int
    size: int
    before: list[Entry]
    end_before: int
    seen: list[bytes]
    answer: bytes | None = None


@dataclass
class Sync:
    """One that is under way; it writes *again* first, if the log is in doubt."""

    mark: int
    doubts: int
    again: list[tuple[int, bytes | memoryview]] | None = field(default=None)


class Machine(RuleBasedStateMachine):
    """*told* is what the file is to its consumers, *safe* what a power cut cannot change, *kernel* what it has just now."""

    @initialize(bits=st.sampled_from([0, 2, 3, 16]), content=st.binary(max_size=SIZE), limit=st.integers(1, 4000))
    def begin(self, *, bits: int, content: bytes, limit: int) -> None:
        """Small blocks, so that an entry lies in many of them, or the true ones."""
        self.patch = mock.patch.object(ordering, "BLOCK_BITS", bits)
        self.patch.start()
        self.log = WriteLog(limit)
        self.told, self.safe, self.kernel = bytearray(content), bytearray(content), bytearray(content)
        self.entries: list[Write] = []
        self.writes: list[Write] = []  # under way
        self.reads: list[Read] = []
        self.sync: Sync | None = None
        self.unreported = False  # a failed writeback, of which nobody has been told yet
        self.number = 0
        self.marked = 0  # the latest mark

    def changed(self) -> None:
        """The file is another one to its consumers, and a read under way may see it so."""
        for read in self.reads:
            read.seen.append(bytes(self.told))

    def told_with(self, write: Write) -> bytes:
        """The file with one more write: its caller has not been told, but who reads at the same time may see it."""
        told = self.told[:]
        put(told, write.start, write.data)
        return bytes(told)

    def rewriting(self, start: int, end: float) -> bool:
        """Whether these bytes are just being written again from the log."""
        return bool(self.sync and self.sync.again is not None and self.log.overlapping(start, end))

    # ---- rules: writes

    @rule(start=st.integers(0, SIZE), length=st.integers(1, 12), stable=st.sampled_from([False, False, True]))
    def write_begins(self, start: int, length: int, stable: bool) -> None:  # noqa: FBT001 - hypothesis calls it
        """The kernel has it from now on, or some of it; it is acknowledged later."""
        end = start + length
        if any(write.overlaps(start, end) for write in self.writes) or self.rewriting(start, end):
            return
        self.number += 1
        data = bytes((self.number * 37 + at) % 251 + 1 for at in range(length))
        self.writes.append(Write(start, data, stable, self.log.errors))
        put(self.kernel, start, data)
        for read in self.reads:
            read.seen.append(self.told_with(self.writes[-1]))

    @precondition(lambda self: self.writes)
    @rule(data=st.data())
    def write_is_acknowledged(self, data: st.DataObject) -> None:
        """In any order."""
        self.acknowledge(self.writes.pop(data.draw(st.integers(0, len(self.writes) - 1))))

    @rule(start=st.integers(0, SIZE), length=st.integers(1, 12), randoms=st.randoms(), forget=st.booleans())
    def write(self, start: int, length: int, randoms: Random, forget: bool) -> None:  # noqa: FBT001 - hypothesis calls it
        """One that is over at once, and may be forgotten as soon as that."""
        count = len(self.writes)
        self.write_begins(start, length, stable=False)
        if len(self.writes) > count:
            self.acknowledge(self.writes.pop())
        if forget:
            self.writeback_fails(randoms, size=True)

    def acknowledge(self, write: Write) -> None:
        same = [
            old
            for old in self.entries
            if (old.start, len(old.data)) == (write.start, len(write.data)) and old.seq > self.marked
        ]
        logged = not (write.stable and not self.entries and write.errors_before == self.log.errors)
        before = self.log.bytes
        self.log.add(write.start, write.data, stable=write.stable, errors_before=write.errors_before)
        put(self.told, write.start, write.data)
        self.changed()
        if write.stable and write.errors_before == self.log.errors:
            put(self.kernel, write.start, write.data)  # it is on the storage: nothing could be dropped any more
        if logged:
            write.seq, write.cost = self.log.seq, self.log.bytes - before
            if same:  # a block that is written again is kept once
                write.cost += same[-1].cost
                self.entries.remove(same[-1])
            assert len(write.data) <= write.cost <= len(write.data) + 1024
            self.entries.append(write)
        else:
            put(self.safe, write.start, write.data)
            assert self.log.bytes == before

    def keep_the_latest(self) -> None:
        """Of those with the same bytes that came after the mark, and of those before it."""
        latest = {(w.seq > self.marked, w.start, w.end): w for w in self.entries}
        self.entries = [w for w in self.entries if latest[w.seq > self.marked, w.start, w.end] is w]

    @precondition(lambda self: self.writes)
    @rule(data=st.data())
    def write_fails(self, data: st.DataObject) -> None:
        """It is told of somebody else's writeback, and tried again: NFS and ext4 do so (`doubt` in `Requests.run`)."""
        write = self.writes[data.draw(st.integers(0, len(self.writes) - 1))]
        self.log.doubt()
        self.unreported = self.unreported and self.sync is not None  # see `somebody_else_is_told`
        write.errors_before = self.log.errors
        put(self.kernel, write.start, write.data)

    @rule(size=st.integers(0, SIZE))
    def truncate(self, size: int) -> None:
        """A change of size, at once; the storage does not forget it."""
        if any(write.overlaps(size, math.inf) for write in self.writes) or self.rewriting(size, math.inf):
            return
        for content in (self.kernel, self.told, self.safe):
            cut(content, size)
        self.log.truncate(size)
        self.changed()
        self.entries = [write for write in self.entries if write.start < size]
        for write in self.entries:
            write.data = write.data[: size - write.start]
        self.keep_the_latest()

    # ---- rules: reads

    @rule(start=st.integers(0, SIZE), size=st.integers(1, SIZE))
    def read_begins(self, start: int, size: int) -> None:
        """P4: not over a write that is under way."""
        if not any(write.overlaps(start, start + size) for write in self.writes):
            seen = [bytes(self.told), *map(self.told_with, self.writes)]  # one further on may have made the file longer
            before = self.log.overlapping(start, start + size)
            self.reads.append(Read(start, size, before, self.log.end, seen))

    @precondition(lambda self: any(read.answer is None for read in self.reads))
    @rule()
    def storage_answers(self) -> None:
        """What the kernel has just now, whatever that is."""
        read = next(read for read in self.reads if read.answer is None)
        read.answer = bytes(self.kernel[read.start : read.start + read.size])

    @precondition(lambda self: any(read.answer is not None for read in self.reads))
    @rule()
    def read_ends(self) -> None:
        """P3: each byte is one that the file had for its consumers while the read was under way.

        Bytes are not said to be of the same moment, as they are not on Linux where somebody else writes or cuts the file.
        """
        read = next(read for read in self.reads if read.answer is not None)
        self.reads.remove(read)
        assert read.answer is not None
        answer = self.log.overlay(read.start, read.size, read.answer, read.before, read.end_before)
        whole = [seen[read.start : read.start + read.size] for seen in read.seen]
        assert len(answer) >= min(map(len, whole)), f"{answer!r} of {whole}"
        for at, byte in enumerate(answer):
            allowed = {seen[at] for seen in whole if at < len(seen)}
            if allowed and min(map(len, whole)) <= at:
                allowed.add(
                    0
                )  # a write that makes the file longer, and is not acknowledged, has shown its end before its bytes
            assert byte in allowed, f"{answer!r} at {at} of {whole}"

    # ---- rules: the kernel forgets

    @rule(randoms=st.randoms(), size=st.booleans())
    def writeback_fails(self, randoms: Random, size: bool) -> None:  # noqa: FBT001 - hypothesis calls it
        """P3: each byte that is not safe may be as it was, or any version of it, and the file may have grown or not."""
        kernel = self.safe[:]
        # What may have failed is over: a stable write that has met no error has not.
        dropped = [*self.entries, *self.writes]
        for write in randoms.sample(dropped, len(dropped)):
            for at, byte in enumerate(write.data, write.start):
                if randoms.random() < 0.5:
                    put(kernel, at, bytes([byte]))
        if size:
            del kernel[randoms.randint(len(self.safe), len(kernel)) :]
        self.kernel = kernel
        self.unreported = True

    @precondition(lambda self: self.unreported and self.sync is None)
    @rule()
    def somebody_else_is_told(self) -> None:
        """A description that goes away takes a report with it, and says so (`doubt`).

        Not while it is being synced: that has a description of its own (requests.py, the witness), and is told itself.
        """
        self.unreported = False
        self.log.doubt()

    # ---- rules: syncs

    @precondition(lambda self: self.sync is None)
    @rule()
    def sync_begins(self) -> None:
        """Plain, or with the log written again, if that is in doubt."""
        doubts, mark = self.log.doubts, self.log.mark()
        self.marked = mark
        self.keep_the_latest()
        if not self.log.in_doubt:
            self.sync = Sync(mark, doubts)
        elif not any(self.log.overlapping(write.start, write.end) for write in self.writes):
            self.sync = Sync(mark, doubts, self.log.to_rewrite())

    @precondition(lambda self: self.sync)
    @rule(works=st.sampled_from([True, True, False]))
    def sync_ends(self, works: bool) -> None:  # noqa: FBT001 - hypothesis calls it
        """P3: if it answers 0, every write acknowledged before it is on stable storage."""
        assert self.sync is not None
        sync, self.sync = self.sync, None
        if sync.again is not None and not self.unreported:
            for start, data in sync.again:
                put(self.kernel, start, data)
        if self.unreported or not works:
            self.unreported = False
            self.log.doubt()
            return
        if sync.again is not None:
            self.log.trust(sync.doubts)
        stable = [write.end for write in self.entries if write.seq <= sync.mark]
        assert self.log.release(sync.mark) == max(stable, default=0)
        for write in self.entries:
            if write.seq <= sync.mark:
                put(self.safe, write.start, write.data)
        self.entries = [write for write in self.entries if write.seq > sync.mark]
        newer = [*self.entries, *self.writes]
        for at, byte in enumerate(self.safe):
            versions = {write.data[at - write.start] for write in newer if write.overlaps(at, at + 1)}
            assert self.kernel[at] in {byte, *versions}, f"P3: byte {at}"

    @precondition(lambda self: self.sync is None and not self.reads)
    @rule(start=st.integers(0, SIZE), size=st.integers(1, SIZE), randoms=st.randoms())
    def syncs_pass_a_read(self, start: int, size: int, randoms: Random) -> None:
        """The storage has answered the read, and has its memory back before the answer is looked at."""
        self.writeback_fails(randoms, size=True)
        self.read_begins(start, size)
        if self.reads:
            self.storage_answers()
        for _ in range(2):
            self.sync_begins()
            if self.sync:
                self.sync_ends(works=True)
        if self.reads:
            self.read_ends()

    # ---- what holds always

    @invariant()
    def the_log_is_its_model(self) -> None:
        """P10: bytes and end are exact; nothing is left in the blocks of what is gone."""
        log = self.log
        assert len(log) == len(self.entries)
        assert [(e.seq, e.start, e.data) for e in log] == [(w.seq, w.start, w.data) for w in self.entries]
        assert log.bytes == sum(write.cost for write in self.entries)
        assert log.end == max((write.end for write in self.entries), default=0)
        assert log.full is (log.bytes >= log.limit)
        assert log.sync_is_due is (2 * log.bytes > log.limit)
        for part in (log._marked, log._since):
            indexed = [(number, entry) for number, block in part.blocks.items() for entry in block.values()]
            assert len(indexed) == sum(len(ordering.blocks(e.start, e.end)) for e in part.entries.values())
            assert all(part.entries[entry.start, entry.end] is entry for _, entry in indexed)
            assert all(part.blocks.values())

    @invariant()
    def overlapping_finds_all(self) -> None:
        """Against looking at every entry."""
        for start in range(0, SIZE + 12, 3):
            for end in (start + 1, start + 7, math.inf):
                found = [entry.seq for entry in self.log.overlapping(start, end)]
                assert found == [write.seq for write in self.entries if write.overlaps(start, end)]

    @invariant()
    def the_log_makes_it_right_again(self) -> None:
        """P3: whatever the kernel has, a read gets what was acknowledged, and so does the storage from the log."""
        if self.writes:
            return  # of them the kernel may show more than anybody was told
        size = len(self.told) + 5
        assert self.log.overlay(0, size, bytes(self.kernel), (), 0) == self.told
        if not (self.sync and self.sync.again is not None):
            kernel, end = self.kernel[:], 0
            for start, data in self.log.to_rewrite():
                assert start >= end, "each byte once, in the file's order"
                end = start + len(data)
                put(kernel, start, data)
            assert kernel == self.told

    def teardown(self) -> None:
        """Once the storage works again, two syncs are enough for all of it, whatever went before."""
        if not hasattr(self, "log"):
            return
        try:
            while self.writes:
                write = self.writes.pop()
                self.log.add(write.start, write.data, stable=False, errors_before=write.errors_before)
                put(self.told, write.start, write.data)
                write.seq = self.log.seq
                self.entries.append(write)
            self.sync = None
            for _ in range(2):
                self.sync_begins()
                self.sync_ends(works=True)
            assert self.kernel == self.told
            assert (len(self.log), self.log.bytes, self.log.end) == (0, 0, 0)
            assert self.log._marked.blocks == self.log._since.blocks == {}
            assert not self.log.in_doubt
        finally:
            self.patch.stop()


EXAMPLES = int(os.environ.get("IOHANG_MACHINE_EXAMPLES", "40"))
TestMachine = Machine.TestCase
TestMachine.settings = settings(
    max_examples=EXAMPLES,
    stateful_step_count=40,
    deadline=None,
    report_multiple_bugs=False,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
