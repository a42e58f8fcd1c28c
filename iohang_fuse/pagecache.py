"""What Linux keeps of a file between write(2) and the storage, and how it loses it.

1. Pure: bytes and numbers. Who writes back, when, and whether that fails, is flaky.py's business.
2. A byte is dirty from its write until it is written back or dropped. Nothing tells a dropped byte from one that was never
   written: after a failed writeback Linux calls the pages clean (PostgreSQL's "fsyncgate", https://lwn.net/Articles/752063).
3. That a writeback has failed is remembered beside the data, and told to each handle once.
"""

from __future__ import annotations

import bisect
import math
from typing import NamedTuple


class Extent(NamedTuple):
    """Dirty bytes in a row."""

    offset: int
    data: bytes

    @property
    def end(self) -> int:
        """The first offset behind it."""
        return self.offset + len(self.data)


class DirtyData:
    """The dirty bytes of one file: extents in the order of their offsets, none of which overlap."""

    def __init__(self) -> None:
        self.extents: list[Extent] = []
        self.size = 0  # in bytes

    @property
    def end(self) -> int:
        """The first offset behind all of it: the file is at least as long."""
        return self.extents[-1].end if self.extents else 0

    def write(self, offset: int, data: bytes) -> None:
        """Newer data takes the place of older."""
        if data:
            self.cut(offset, offset + len(data))
            bisect.insort(self.extents, Extent(offset, bytes(data)))
            self.size += len(data)

    def cut(self, start: int, end: float) -> int:
        """Forget what is dirty from *start* up to but not including *end*; tells how many bytes that was."""
        first = bisect.bisect_right(self.extents, start, key=lambda extent: extent.end)
        last = bisect.bisect_left(self.extents, end, lo=first, key=lambda extent: extent.offset)
        kept = []
        for offset, data in self.extents[first:last]:
            if offset < start:
                kept.append(Extent(offset, data[: start - offset]))
            if offset + len(data) > end:
                kept.append(Extent(int(end), data[int(end) - offset :]))
        lost = sum(len(extent.data) for extent in self.extents[first:last]) - sum(len(extent.data) for extent in kept)
        self.extents[first:last] = kept
        self.size -= lost
        return lost

    def clear(self) -> None:
        """All of it is written back."""
        self.cut(0, math.inf)

    def over(self, offset: int, size: int, stored: bytes) -> bytes:
        """What a read of *size* bytes at *offset* gives where the storage gave *stored*, which ends where its file ends."""
        seen = bytearray(stored)
        seen.extend(
            bytes(max(min(self.end - offset, size) - len(seen), 0))
        )  # a hole, up to where dirty data ends the file
        for extent in self.extents[bisect.bisect_right(self.extents, offset, key=lambda extent: extent.end) :]:
            if extent.offset >= offset + size:
                break
            start = max(extent.offset - offset, 0)
            piece = extent.data[max(offset - extent.offset, 0) : offset + size - extent.offset]
            seen[start : start + len(piece)] = piece
        return bytes(seen)


class WritebackErrors:
    """Which writeback error of a file is news to whom: errseq_t of the kernel (lib/errseq.c).

    It has room for the newest error alone.
    """

    def __init__(self) -> None:
        self._errno = 0
        self._count = 0
        self.seen = True  # by anybody; an error that nobody has seen outlives the last close

    def failed(self, errno: int) -> None:
        """A writeback has failed (errseq_set)."""
        self._errno = errno
        self._count += 1
        self.seen = False

    def sample(self) -> int:
        """What a new handle knows: all errors, but for one that nobody has seen yet (errseq_sample)."""
        return self._count if self.seen else self._count - 1

    def news(self, known: int) -> tuple[int, int]:
        """The errno to tell a handle that knows *known*, or 0; and what it knows now (errseq_check_and_advance)."""
        if known == self._count:
            return 0, known
        self.seen = True
        return self._errno, self._count
