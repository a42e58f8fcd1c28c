"""Acknowledged writes of one image that are not known to be on stable storage (P3).

1. Pure. The bytes are those of the request, never copied; an entry that a truncation has clipped shows less of them.
2. A sync makes stable what was acknowledged before it began: `mark` then, `release` when it has succeeded.
3. Linux reports a failed writeback once and then calls the pages clean (file_check_and_advance_wb_err in mm/filemap.c). So
   once a report may have been used up the log is *in doubt*: no sync counts until the file has been opened anew, the log
   written again in order, and all of it synced: `doubts` and `mark` before, `trust` and `release` afterwards.
4. Until then the storage may have dropped what the consumer was told is written: whatever it reads is `overlay`ed.
"""

from __future__ import annotations

import bisect
from typing import TYPE_CHECKING

from iohang_fuse.ordering import blocks

if TYPE_CHECKING:
    from collections.abc import Sequence


SAMPLES = 4
SAMPLE_BYTES = 512
"""What is remembered of stable data, to know a file again: enough that two files will not have it alike by chance."""

_ENTRY_BYTES = 256
"""What an entry costs beside its data: itself, its place in two dicts, the header of a bytes object. Measured: 220 to 480."""


class Entry:
    """One acknowledged write: *data* from *start* up to *end*, which costs so many bytes of memory. Never changed."""

    # Not a frozen dataclass: one is made for each write, and setting a frozen field costs four times as much.
    __slots__ = ("blocks", "cost", "data", "end", "seq", "start")

    def __init__(
        self, seq: int, start: int, data: bytes | memoryview, cost: int, in_blocks: range | None = None
    ) -> None:
        self.seq = seq
        self.start = start
        self.end = end = start + len(data)
        self.data = data
        self.cost = cost
        self.blocks = blocks(start, end) if in_blocks is None else in_blocks


class WriteLog:
    """The log of one image. *limit* in bytes: at half of it a sync is due, at all of it writers wait (P10)."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.bytes = 0
        self.end = 0  # the end of the furthest entry
        self.errors = 0  # how often `doubt` or `unsettle` was called
        self.doubts = 0
        self._trusted = 0
        self._seq = 0
        self._entries: dict[int, Entry] = {}  # by seq, oldest first
        self._blocks: dict[int, dict[int, Entry]] = {}  # by block
        self._latest: dict[tuple[int, int], int] = {}  # by first byte and length: the seq of the latest

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def in_doubt(self) -> bool:
        """Whether a plain sync proves nothing."""
        return self.doubts > self._trusted

    @property
    def sync_is_due(self) -> bool:
        """Whether the server has to sync by itself."""
        return self.bytes * 2 > self.limit

    @property
    def full(self) -> bool:
        """Whether writers have to wait."""
        return 0 < self.limit <= self.bytes

    def add(self, start: int, data: bytes, *, stable: bool, errors_before: int) -> None:
        """A write is about to be acknowledged. *errors_before*: what `errors` was when its attempt began.

        A *stable* one needs no entry, unless what is older might be written again on top of it.
        """
        if not self.limit or (stable and not self._entries and errors_before == self.errors):
            return
        self._seq += 1
        size = len(data)
        place = start, size
        superseded = self._latest.get(place)
        if superseded is None:
            entry = Entry(self._seq, start, data, size + _ENTRY_BYTES)
            self._put(entry)
            self.end = max(self.end, entry.end)
        else:  # a hot block: what it was before is of no use to anybody
            self._latest[place] = self._seq
            self._replace(superseded, start, data)
        if errors_before != self.errors:
            self.doubts += 1  # an error in the meantime may have been about this one, too

    def mark(self) -> int:
        """What a sync that begins now is going to make stable."""
        return self._seq

    def samples(self, mark: int) -> list[tuple[int, bytes]]:
        """Of what a sync that began at *mark* has made stable: (first byte, data) of a few of the latest, as they are now."""
        found = []
        for entry in reversed(self._entries.values()):
            if entry.seq <= mark and self.overlapping(entry.start, entry.start + SAMPLE_BYTES)[-1] is entry:
                found.append((entry.start, bytes(entry.data[:SAMPLE_BYTES])))
                if len(found) == SAMPLES:
                    break
        return found

    def release(self, mark: int) -> int:
        """A sync that began at *mark* has succeeded. Returns the end of what is stable now, as far as it was in the log."""
        furthest, end = False, 0
        # A copy, because a dict from whose front entries vanish is searched through ever longer gaps.
        for seq in [*self._entries]:
            if seq > mark:
                break
            end = max(end, self._entries[seq].end)
            furthest |= self._remove(seq)
        if furthest:
            self.end = max((entry.end for entry in self._entries.values()), default=0)
        return end

    def doubt(self) -> None:
        """The report of a failed writeback may have been used up by an attempt that failed, or gone with its description."""
        self.errors += 1
        self.doubts += 1

    def unsettle(self) -> None:
        """The description that syncs is being replaced: what is in flight has landed before it, and is told to nobody."""
        self.errors += 1

    def trust(self, doubts: int) -> None:
        """All that was in the log when `doubts` was so has been written again, and synced."""
        self._trusted = doubts

    def truncate(self, size: int) -> None:
        """The file was cut, or has grown, to *size*."""
        if self.end > size:
            clipped = False
            for entry in [entry for entry in self._entries.values() if entry.end > size]:
                self._remove(entry.seq)
                if entry.start < size:
                    # A new one, because a read that is under way may have the old one in its hand; in the old one's place.
                    self._put(Entry(entry.seq, entry.start, memoryview(entry.data)[: size - entry.start], entry.cost))
                    clipped = True
            if clipped:
                self._entries = dict(sorted(self._entries.items()))
            self.end = max((entry.end for entry in self._entries.values()), default=0)

    def clear(self) -> int:
        """Nobody is left to whom these writes could be promised. Returns how many bytes they had."""
        lost = sum(len(entry.data) for entry in self._entries.values())
        self.release(self._seq)
        self._trusted = self.doubts
        return lost

    def to_rewrite(self) -> list[tuple[int, bytes | memoryview]]:
        """What has to be written again: (first byte, data), in the file's order, each byte as it was written last.

        Only so: what an O_DSYNC write has made stable must not be older again, not even for a moment.
        """
        writes: list[tuple[int, bytes | memoryview]] = []
        starts: list[int] = []  # of the ranges that are in it already, which do not touch each other
        ends: list[int] = []
        for entry in reversed(self._entries.values()):
            first = bisect.bisect_left(ends, entry.start)
            last = bisect.bisect_right(starts, entry.end)
            at = entry.start
            for low, high in (*zip(starts[first:last], ends[first:last], strict=True), (entry.end, entry.end)):
                if at < low:
                    writes.append((at, memoryview(entry.data)[at - entry.start : low - entry.start]))
                at = max(at, high)
            starts[first:last], ends[first:last] = (
                [min(entry.start, *starts[first:last])] if first < last else [entry.start],
                [max(entry.end, *ends[first:last])] if first < last else [entry.end],
            )
        writes.sort(key=lambda write: write[0])
        return writes

    def overlapping(self, start: int, end: float) -> list[Entry]:
        """Entries that have a byte of the range, oldest first."""
        if not self._entries or start >= self.end:
            return []
        found = {
            entry.seq: entry
            for number in blocks(start, min(end, self.end))
            for entry in self._blocks.get(number, {}).values()
            if entry.start < end and start < entry.end
        }
        return [found[seq] for seq in sorted(found)]

    def overlay(self, start: int, size: int, data: bytes, before: Sequence[Entry], end_before: int) -> bytes:
        """What a consumer has to get for a read of *size* bytes at *start* to which the storage has answered *data*.

        *before* and *end_before* are what `overlapping` and `end` said when the read began: a sync may have released that since,
        while *data* is older.
        """
        now = self.overlapping(start, start + size)
        have = len(data)
        # So far does the file reach at least; there are zeros in its gaps.
        known = min(size, max(self.end - start, end_before - start, 0))
        if not now and not before and known <= have:
            return data
        patched = bytearray(data)
        patched.extend(bytes(max(known - have, 0)))
        for entry in (*before, *now):
            low, high = max(start, entry.start), min(start + size, entry.end)
            if low < high:
                patched[low - start : high - start] = entry.data[low - entry.start : high - entry.start]
        return bytes(patched)

    def _put(self, entry: Entry) -> None:
        seq, start, end = entry.seq, entry.start, entry.end
        self._entries[seq] = entry
        self._latest[start, end - start] = seq
        self.bytes += entry.cost
        for number in entry.blocks:
            block = self._blocks.get(number)
            if block is None:
                self._blocks[number] = {seq: entry}
            else:
                block[seq] = entry

    def _replace(self, seq: int, start: int, data: bytes) -> None:
        """A new entry in the place of one with the same bytes; much cheaper than `_remove` and `_put`."""
        old = self._entries.pop(seq)
        new, cost = self._seq, len(data) + _ENTRY_BYTES
        self._entries[new] = entry = Entry(new, start, data, cost, old.blocks)
        self.bytes += cost - old.cost  # of one that was clipped it is more
        for number in old.blocks:
            block = self._blocks[number]
            del block[seq]
            block[new] = entry

    def _remove(self, seq: int) -> bool:
        """Returns whether it was (one of) the furthest."""
        entry = self._entries.pop(seq)
        start, end = entry.start, entry.end
        if self._latest.get((start, end - start)) == seq:
            del self._latest[start, end - start]
        for number in entry.blocks:
            block = self._blocks[number]
            del block[seq]
            if not block:
                del self._blocks[number]
        self.bytes -= entry.cost
        return end >= self.end
