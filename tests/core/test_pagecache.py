"""What is dirty, what a read sees of it, and whom a failed writeback is told."""

from __future__ import annotations

import errno
import math

from hypothesis import given
from hypothesis import strategies as st

from iohang_fuse.pagecache import DirtyData, WritebackErrors

SIZE = 24  # small, so that ranges touch, overlap and enclose one another
spots = st.integers(0, SIZE)
changes = st.one_of(
    st.tuples(st.just("write"), spots, st.binary(max_size=8)),
    st.tuples(st.just("cut"), spots, st.one_of(spots, st.just(math.inf))),
)


@given(st.lists(changes, max_size=12), st.binary(max_size=SIZE), spots, spots)
def test_it_is_what_a_list_of_bytes_would_be(steps: list[tuple], stored: bytes, offset: int, size: int) -> None:
    """Against a model: each dirty byte by itself."""
    dirty = DirtyData()
    model: dict[int, int] = {}
    for what, start, other in steps:
        if what == "write":
            dirty.write(start, other)
            model |= dict(enumerate(other, start))
        else:
            cut = [at for at in model if start <= at < other]
            assert dirty.cut(start, max(start, other)) == len(cut)
            for at in cut:
                del model[at]
    assert {at: byte for extent in dirty.extents for at, byte in enumerate(extent.data, extent.offset)} == model
    assert all(left.end <= right.offset for left, right in zip(dirty.extents, dirty.extents[1:], strict=False))
    assert all(extent.data for extent in dirty.extents)
    assert dirty.size == len(model)
    assert dirty.end == max(model, default=-1) + 1

    end = max(len(stored), dirty.end)
    whole = bytes(model.get(at, stored[at] if at < len(stored) else 0) for at in range(end))
    assert dirty.over(offset, size, stored[offset : offset + size]) == whole[offset : offset + size]
    dirty.clear()
    assert (dirty.size, dirty.end, dirty.extents) == (0, 0, [])


def test_the_buffer_of_a_write_may_change_afterwards() -> None:
    dirty = DirtyData()
    buffer = bytearray(b"abc")
    dirty.write(0, buffer)
    buffer[:] = b"xyz"
    assert dirty.over(0, 3, b"") == b"abc"


def test_each_handle_is_told_of_an_error_once() -> None:
    errors = WritebackErrors()
    first, second = errors.sample(), errors.sample()
    errors.failed(errno.EIO)
    number, first = errors.news(first)
    assert number == errno.EIO
    assert errors.news(first) == (0, first)
    number, second = errors.news(second)
    assert number == errno.EIO
    assert errors.news(second) == (0, second)


def test_a_later_handle_is_told_what_nobody_has_seen() -> None:
    errors = WritebackErrors()
    early = errors.sample()
    errors.failed(errno.ENOSPC)
    unseen = errors.sample()
    assert errors.news(unseen)[0] == errno.ENOSPC
    assert errors.news(errors.sample())[0] == 0
    assert errors.news(early)[0] == errno.ENOSPC


def test_of_errors_that_nobody_has_seen_the_newest_is_told() -> None:
    errors = WritebackErrors()
    known = errors.sample()
    errors.failed(errno.EIO)
    errors.failed(errno.ENOSPC)
    number, known = errors.news(known)
    assert number == errno.ENOSPC
    assert errors.news(known)[0] == 0


def test_the_same_error_again_is_news_again() -> None:
    errors = WritebackErrors()
    known = errors.sample()
    for _ in range(2):
        errors.failed(errno.EIO)
        number, known = errors.news(known)
        assert number == errno.EIO
    assert errors.news(known)[0] == 0


def test_it_says_whether_anybody_has_still_to_see_an_error() -> None:
    errors = WritebackErrors()
    assert errors.seen
    errors.failed(errno.EIO)
    assert not errors.seen
    errors.news(errors.sample())
    assert errors.seen
