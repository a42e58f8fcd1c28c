"""Acknowledged writes of one image that are not known to be on stable storage (P3).

1. Pure. The bytes are those of the request, never copied; an entry that a truncation has clipped shows less of them.
2. A sync makes stable what was acknowledged before it began: `mark` then, `release` when it has succeeded.
3. Linux reports a failed writeback once and then calls the pages clean (file_check_and_advance_wb_err in mm/filemap.c). So
   once a report may have been used up the log is *in doubt*: no sync counts until the file has been opened anew, the log
   written again in order, and all of it synced: `doubts` and `mark` before, `trust` and `release` afterwards.
4. Until then the storage may have dropped what the consumer was told is written: whatever it reads is `overlay`ed.
5. There are two parts: what the latest mark covers, and what came after it. A sync that succeeds drops the first as a whole: what
   a write costs here is to be put in, and nothing to be taken out again.
"""

from __future__ import annotations

import bisect
from typing import TYPE_CHECKING

from iohang_fuse import ordering

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence


SAMPLES = 4
SAMPLE_BYTES = 512
"""What is remembered of stable data, to know a file again: enough that two files will not have it alike by chance."""

_ENTRY_BYTES = 256
"""What an entry costs beside its data: itself, its place in two dicts, the header of a bytes object. Measured: 310 to 570."""


class Entry:
    """One acknowledged write: *data* from *start* up to *end*, which costs so many bytes of memory. Never changed."""

    # Not a frozen dataclass: one is made for each write, and setting a frozen field costs four times as much.
    __slots__ = ("cost", "data", "end", "seq", "start")

    def __init__(self, seq: int, start: int, end: int, data: bytes | memoryview, cost: int) -> None:
        self.seq = seq
        self.start = start
        self.end = end
        self.data = data
        self.cost = cost


class _Part:
    """Some of the entries: of those with the same bytes the latest, because what it was before is of no use to anybody."""

    __slots__ = ("blocks", "bytes", "end", "entries")

    def __init__(self) -> None:
        self.bytes = 0
        self.end = 0  # of the furthest
        self.entries: dict[tuple[int, int], Entry] = {}  # by first byte and end, oldest first
        self.blocks: dict[int, dict[tuple[int, int], Entry]] = {}

    def put(self, entry: Entry) -> None:
        """Add *entry*, which is younger than all others."""
        place = entry.start, entry.end
        old = self.entries.pop(place, None)
        self.entries[place] = entry
        self.bytes += entry.cost if old is None else entry.cost - old.cost
        self.end = max(self.end, entry.end)
        first, last = entry.start >> ordering.BLOCK_BITS, entry.end - 1 >> ordering.BLOCK_BITS
        if first == last:  # most of them
            block = self.blocks.get(first)
            if block is None:
                self.blocks[first] = {place: entry}
            else:
                block[place] = entry
            return
        for number in range(first, last + 1):
            self.blocks.setdefault(number, {})[place] = entry

    def overlapping(self, start: int, end: float) -> list[Entry]:
        """Entries that have a byte of the range, oldest first."""
        if start >= self.end:
            return []
        found: dict[int, Entry] = {}
        for number in ordering.blocks(start, min(end, self.end)):
            block = self.blocks.get(number)
            if block is not None:
                for entry in block.values():
                    if entry.start < end and start < entry.end:
                        found[entry.seq] = entry
        return [found[seq] for seq in sorted(found)] if len(found) > 1 else [*found.values()]

    def but(self, unwanted: Callable[[Entry], bool], clip: int | None = None) -> _Part:
        """A copy without *unwanted* entries, and without the bytes from *clip* on."""
        part = _Part()
        for entry in self.entries.values():
            if unwanted(entry):
                continue
            if clip is not None and entry.end > clip:
                # A new one, because a read that is under way may have the old one in its hand; in the old one's place.
                part.put(Entry(entry.seq, entry.start, clip, memoryview(entry.data)[: clip - entry.start], entry.cost))
            else:
                part.put(entry)
        return part


class WriteLog:
    """The log of one image. *limit* in bytes: at half of it a sync is due, at all of it writers wait (P10)."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.bytes = 0
        self.end = 0  # the end of the furthest entry
        self.errors = 0  # how often `doubt` or `unsettle` was called
        self.doubts = 0
        self._trusted = 0
        self.seq = 0  # of the youngest entry, ever
        self._marked = _Part()  # what the latest mark covers
        self._since = _Part()  # what came after it

    def __len__(self) -> int:
        return len(self._marked.entries) + len(self._since.entries)

    def __iter__(self) -> Iterator[Entry]:
        """Oldest first."""
        yield from self._marked.entries.values()
        yield from self._since.entries.values()

    def __reversed__(self) -> Iterator[Entry]:
        """Youngest first."""
        yield from reversed(self._since.entries.values())
        yield from reversed(self._marked.entries.values())

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
        if not self.limit or (stable and errors_before == self.errors and not len(self)):
            return
        self.seq += 1
        size = len(data)
        part = self._since
        before, end = part.bytes, start + size
        part.put(Entry(self.seq, start, end, data, size + _ENTRY_BYTES))
        self.bytes += part.bytes - before
        self.end = max(self.end, end)
        if errors_before != self.errors:
            self.doubts += 1  # an error in the meantime may have been about this one, too

    def mark(self) -> int:
        """What a sync that begins now is going to make stable."""
        if not self._marked.entries:
            self._marked, self._since = self._since, self._marked
        elif self._since.entries:  # the sync before this one has failed, or is still under way
            for entry in self._since.entries.values():
                self._marked.put(entry)
            self._since = _Part()
            self._count()
        return self.seq

    def samples(self, mark: int) -> list[tuple[int, bytes]]:
        """Of what a sync that began at *mark* has made stable: (first byte, data) of a few of the latest, as they are now."""
        found = []
        for entry in reversed(self):
            if entry.seq <= mark and self.overlapping(entry.start, entry.start + SAMPLE_BYTES)[-1] is entry:
                found.append((entry.start, bytes(entry.data[:SAMPLE_BYTES])))
                if len(found) == SAMPLES:
                    break
        return found

    def release(self, mark: int) -> int:
        """A sync that began at *mark* has succeeded. Returns the end of what is stable now, as far as it was in the log."""
        marked, self._marked = self._marked, _Part()
        youngest = next(reversed(marked.entries.values()), None)
        if youngest is not None and youngest.seq > mark:  # it is not the latest mark
            self._marked = marked.but(lambda entry: entry.seq <= mark)
            end = max((entry.end for entry in marked.entries.values() if entry.seq <= mark), default=0)
        else:
            end = marked.end
        self._count()
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
            self._marked, self._since = (
                part.but(lambda entry: entry.start >= size, clip=size) if part.end > size else part
                for part in (self._marked, self._since)
            )
            self._count()

    def clear(self) -> int:
        """Nobody is left to whom these writes could be promised. Returns how many bytes they had."""
        lost = sum(len(entry.data) for entry in self)
        self.release(self.mark())
        self._trusted = self.doubts
        return lost

    def to_rewrite(self) -> list[tuple[int, bytes | memoryview]]:
        """What has to be written again: (first byte, data), in the file's order, each byte as it was written last.

        Only so: what an O_DSYNC write has made stable must not be older again, not even for a moment.
        """
        writes: list[tuple[int, bytes | memoryview]] = []
        starts: list[int] = []  # of the ranges that are in it already, which do not touch each other
        ends: list[int] = []
        for entry in reversed(self):
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
        if start >= self.end:
            return []
        if not self._marked.entries:
            return self._since.overlapping(start, end)
        return self._marked.overlapping(start, end) + self._since.overlapping(start, end)

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

    def _count(self) -> None:
        self.bytes = self._marked.bytes + self._since.bytes
        self.end = max(self._marked.end, self._since.end)
