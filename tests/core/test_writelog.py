"""What the write log keeps, and gives back, example by example; whole lives of a log are test_writelog_machine.py's."""

from __future__ import annotations

import gc
import math
import weakref
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from iohang_fuse.writelog import Entry, WriteLog

KIB = 1 << 10
MIB = 1 << 20
BLOCK = 64 * KIB
SIZE = 24  # small, so that ranges touch, overlap and enclose one another

spots = st.integers(0, SIZE)
writes = st.tuples(st.just("write"), spots, st.binary(min_size=1, max_size=8))
changes = st.lists(st.one_of(writes, writes, st.tuples(st.just("truncate"), spots, st.just(b""))), max_size=12)
factors = st.sampled_from([1, 1, 5, BLOCK // 8, BLOCK // 3, MIB // 8])


@pytest.fixture
def log() -> WriteLog:
    return WriteLog(MIB)


def add(log: WriteLog, start: int, data: bytes, *, stable: bool = False) -> None:
    """A write that met no error is acknowledged."""
    log.add(start, data, stable=stable, errors_before=log.errors)


def apply(content: bytearray, start: int, data: bytes | memoryview) -> None:
    """What a write does to a file: zeros in the gap, if there is one."""
    content.extend(bytes(max(start - len(content), 0)))
    content[start : start + len(data)] = data


def cut(content: bytearray, size: int) -> None:
    """What a change of size does."""
    del content[size:]
    content.extend(bytes(size - len(content)))


class Data(bytes):
    """A request's bytes, so that a test can see whether anybody still has them."""


# ---- P3: what is given back


@given(changes, st.binary(max_size=SIZE), factors, st.randoms(), spots, spots)
def test_it_is_what_the_consumer_was_told_whatever_the_kernel_has(
    steps: list[tuple[str, int, bytes]], stored: bytes, factor: int, randoms: Random, offset: int, size: int
) -> None:
    """P3: a read gets what was acknowledged, and the log written again in order makes the storage so.

    Each byte of an acknowledged write may still be as it was before, or be any version of it; the file may have grown or not.
    """
    log = WriteLog(1 << 40)
    stable = bytearray(stretch(stored, factor))
    told = bytearray(stable)
    versions: list[tuple[int, bytes]] = []
    kept: list[tuple[int, bytes]] = []  # without what a write to the very same place has replaced
    originals: list[tuple[int, bytes]] = []
    for what, start, data in steps:
        if what == "write":
            first, whole = start * factor, stretch(data, factor)
            add(log, first, whole)
            versions.append((first, whole))
            same = [n for n, (at, before) in enumerate(kept) if (at, len(before)) == (first, len(whole))]
            if same:
                del kept[same[-1]]
            kept.append((first, whole))
            originals.append((first, whole))
            apply(told, first, whole)
        else:
            log.truncate(start * factor)
            size_now = start * factor
            versions = [(first, whole[: size_now - first]) for first, whole in versions if first < size_now]
            kept = [(first, whole[: size_now - first]) for first, whole in kept if first < size_now]
            latest = {(first, len(whole)): n for n, (first, whole) in enumerate(kept)}
            kept = [(first, whole) for n, (first, whole) in enumerate(kept) if latest[first, len(whole)] == n]
            cut(told, start * factor)
            cut(stable, start * factor)
    assert [(entry.start, bytes(entry.data)) for entry in log] == kept
    assert log.end == max((first + len(data) for first, data in versions), default=0)

    kernel = stable[:]
    for first, data in randoms.sample(versions, len(versions)):
        for at in range(0, len(data), factor):  # a piece of it has been written back, or has not
            if randoms.random() < 0.5:
                apply(kernel, first + at, data[at : at + factor])
    if randoms.random() < 0.3:
        del kernel[max(len(stable), randoms.randint(0, len(kernel))) :]

    first, end = offset * factor, (offset + size) * factor
    answer = log.overlay(first, end - first, bytes(kernel[first:end]), log.overlapping(first, end), log.end)
    assert answer == told[first:end]

    rewritten = log.to_rewrite()
    for start, data in rewritten:
        apply(kernel, start, data)
    assert kernel == told
    end = 0
    for start, data in rewritten:
        assert start >= end, "each byte once, in the file's order"
        assert len(data) > 0
        end = start + len(data)
        assert any(isinstance(data, memoryview) and data.obj is whole for _, whole in originals), "not a copy"


def stretch(data: bytes, factor: int) -> bytes:
    """Each byte *factor* times, but for the very last, so that ranges begin and end in the middle of blocks."""
    return b"".join(bytes([byte]) * factor for byte in data)


@given(
    st.lists(st.tuples(st.integers(0, 3 * MIB), st.sampled_from([1, 512, 4096, BLOCK, BLOCK + 1, MIB])), max_size=20),
    st.integers(0, 4 * MIB),
    st.sampled_from([1, 4096, BLOCK, MIB, math.inf]),
)
def test_overlapping_is_what_looking_at_every_entry_gives(
    ranges: list[tuple[int, int]], start: int, size: float
) -> None:
    log = WriteLog(1 << 40)
    data = bytes(MIB)
    for first, length in ranges:
        add(log, first, memoryview(data)[:length])
    every = [*log]
    found = log.overlapping(start, start + size)
    assert found == [entry for entry in every if entry.start < start + size and start < entry.end]


def rewritten(log: WriteLog) -> list[tuple[int, bytes]]:
    """What would be written again, to be compared."""
    return [(start, bytes(data)) for start, data in log.to_rewrite()]


def test_newer_entries_lie_on_top(log: WriteLog) -> None:
    """P3: the log is written again in order, which is to say each byte as it was written last."""
    add(log, 0, b"aaaa")
    add(log, 2, b"bbbb")
    add(log, 1, b"c")
    assert log.overlay(0, 8, b"", (), 0) == b"acbbbb"
    assert rewritten(log) == [(0, b"a"), (1, b"c"), (2, b"bbbb")]


def test_what_is_stable_is_not_made_older_again(log: WriteLog) -> None:
    """P3: an O_DSYNC write on top of older ones is stable at once; the log is not to be written again through its past."""
    add(log, 0, b"older and longer")
    add(log, 6, b"DSYNC", stable=True)
    add(log, 30, b"apart")
    assert rewritten(log) == [(0, b"older "), (6, b"DSYNC"), (11, b"onger"), (30, b"apart")]


def test_writing_again_covers_what_many_small_writes_have_covered(log: WriteLog) -> None:
    """In whatever order they touch and bridge each other, no byte is written twice."""
    add(log, 0, b"-" * 40)
    for start in (0, 20, 10, 5, 15, 33):
        add(log, start, b"%c" % (97 + start) * 6)
    assert b"".join(data for _, data in rewritten(log)) == b"aaaaa" + b"ffffff" + b"kkkk" + b"pppppp" + b"uuuuu" + (
        b"-------" + b"\x82" * 6 + b"-"
    )
    assert sum(len(data) for _, data in rewritten(log)) == 40


def test_a_read_that_meets_no_entry_gets_the_storages_own_bytes(log: WriteLog) -> None:
    data = bytes(range(100))
    assert log.overlay(0, 100, data, (), 0) is data
    add(log, 4096, b"x")
    assert log.overlay(0, 100, data, (), 0) is data


def test_the_gap_before_an_entry_is_zeros(log: WriteLog) -> None:
    """P3: a write behind the end of the file made it longer, even if the storage has forgotten it."""
    add(log, 10, b"abc")
    assert log.overlay(0, 4, b"xy", (), 0) == b"xy\0\0"
    assert log.overlay(0, 100, b"xy", (), 0) == b"xy" + bytes(8) + b"abc"
    assert log.overlay(8, 3, b"", (), 0) == b"\0\0a"
    assert log.overlay(13, 10, b"", (), 0) == b""
    assert log.overlay(20, 10, b"", (), 0) == b""


def test_a_read_gets_what_a_sync_has_released_in_the_meantime(log: WriteLog) -> None:
    """P3: the storage may have been asked before the log was written again, and have answered what it had then."""
    add(log, 0, b"new")
    before = log.overlapping(0, 8)
    log.release(log.mark())
    assert log.overlay(0, 8, b"olddata", before, 0) == b"newdata"
    assert log.overlay(0, 8, b"", before, 0) == b"new"


def test_a_newer_write_lies_on_top_of_what_was_released(log: WriteLog) -> None:
    add(log, 0, b"first")
    before = log.overlapping(0, 8)
    log.release(log.mark())
    add(log, 1, b"EW")
    assert log.overlay(0, 8, b"older", before, 0) == b"fEWst"


def test_a_gap_stays_one_when_what_lies_behind_it_is_released(log: WriteLog) -> None:
    """P3: the storage may have been asked while it had forgotten that the file is longer; it got that back in the meantime."""
    add(log, 100, b"far")
    before, end_before = log.overlapping(0, 8), log.end
    log.release(log.mark())
    assert log.overlay(0, 8, b"xy", before, end_before) == b"xy" + bytes(6)
    assert log.overlay(98, 8, b"", before, end_before) == bytes(5), "no entry was asked for, but the size is known"


def test_a_large_entry_shows_in_every_block(log: WriteLog) -> None:
    """FUSE's largest write is 1 MiB: 17 blocks, where it begins in the middle of one."""
    data = bytes(range(256)) * 4096
    add(log, 1000, data)
    for at in (0, 999, 1000, BLOCK - 1, BLOCK, 5 * BLOCK - 7, MIB - 1, MIB, MIB + 990):
        wanted = (bytes(1000) + data)[at : at + 4096]
        assert log.overlay(at, 4096, b"\xff" * min(4096, len(wanted)), (), 0) == (
            wanted if at >= 1000 else b"\xff" * (1000 - at) + wanted[1000 - at :]
        )
        assert len(log.overlapping(at, at + 1)) == (at >= 1000)


# ---- nothing is copied


def test_the_bytes_are_those_of_the_request(log: WriteLog) -> None:
    """P10: the bytes are never copied."""
    data = bytes(1000)
    add(log, 0, data)
    (kept,) = log.overlapping(0, 1)
    assert kept.data is data
    ((_, shown),) = log.to_rewrite()
    assert isinstance(shown, memoryview)
    assert shown.obj is data
    for size in (500, 250):
        log.truncate(size)
        (clipped,) = log.overlapping(0, 1)
        assert isinstance(clipped.data, memoryview)
        assert clipped.data.obj is data
        assert clipped.data == bytes(size)
    ((_, shown),) = log.to_rewrite()
    assert isinstance(shown, memoryview)
    assert shown.obj is data


def test_a_read_that_is_under_way_keeps_what_a_truncation_clips(log: WriteLog) -> None:
    """P3: it gets the bytes from before or none; what the storage has forgotten in between is neither."""
    add(log, 0, b"acknowledged")
    before = log.overlapping(0, 12)
    log.truncate(4)
    assert log.overlay(0, 12, b"stale bytes!", before, 0) == b"acknowledged"


def test_nothing_is_kept_of_what_was_released() -> None:
    """P10: nor of what a truncation has removed."""
    log = WriteLog(MIB)
    data = [bytearray(4096) for _ in range(4)]
    views = [memoryview(one) for one in data]
    for number, view in enumerate(views):
        log.add(number * 4096, view, stable=False, errors_before=0)
        if number == 0:
            mark = log.mark()
    seen = [weakref.ref(view) for view in views]
    del views, view
    log.truncate(2 * 4096)
    log.release(mark)
    gc.collect()
    assert [ref() is not None for ref in seen] == [False, True, False, False]
    log.release(log.mark())
    assert (len(log), log.bytes, log.end) == (0, 0, 0)
    assert log._marked.blocks == log._since.blocks == {}


# ---- P3: release, truncate


def test_release_drops_exactly_what_was_before_the_mark(log: WriteLog) -> None:
    """P3: a sync makes stable what was acknowledged before it began."""
    add(log, 0, b"aa")
    add(log, 100, b"bb")
    mark = log.mark()
    add(log, 50, b"cc")
    add(log, 1, b"d")
    assert log.release(mark) == 102, "the end of what is stable now"
    assert rewritten(log) == [(1, b"d"), (50, b"cc")]
    assert log.end == 52
    assert log.release(mark) == 0
    assert len(log) == 2
    log.release(log.mark())
    assert len(log) == log.bytes == log.end == 0


def test_an_older_mark_may_come_later(log: WriteLog) -> None:
    """Two syncs at once, and the first to begin is the last to end."""
    add(log, 0, b"a")
    early = log.mark()
    add(log, 1, b"b")
    log.release(log.mark())
    add(log, 2, b"c")
    log.release(early)
    assert rewritten(log) == [(2, b"c")]


def test_a_truncation_clips(log: WriteLog) -> None:
    """P3: what was cut off must not come back when the log is written again."""
    add(log, 0, b"below")
    add(log, 3, b"across")
    add(log, 6, b"at the size")
    add(log, 20, b"beyond")
    log.truncate(6)
    assert rewritten(log) == [(0, b"bel"), (3, b"acr")]
    assert log.end == 6
    log.truncate(100)
    assert log.end == 6, "that the file has grown is the storage's own knowledge"
    add(log, 10, b"new")
    assert log.overlay(0, 20, b"beloss" + bytes(14), (), 0) == b"belacr" + bytes(4) + b"new" + bytes(7)


def test_a_clipped_entry_keeps_its_place_and_its_cost(log: WriteLog) -> None:
    """P10: its memory is not freed. P3: it stays older than what came after it."""
    add(log, 0, b"x" * 3 * BLOCK)
    mark = log.mark()
    add(log, 5, b"newer")
    log.truncate(BLOCK + 1)
    before = log.bytes
    assert before >= 3 * BLOCK
    assert [bytes(entry.data) for entry in log.overlapping(0, 100)] == [b"x" * (BLOCK + 1), b"newer"]
    assert log.overlay(4, 8, b"", (), 0) == b"xnewerxx"
    assert [*log._marked.blocks] == [0, 1]
    log.release(mark)
    assert rewritten(log) == [(5, b"newer")]
    assert log.bytes < BLOCK


def test_the_end_falls_back_to_the_next_furthest(log: WriteLog) -> None:
    add(log, 100, b"far")
    mark = log.mark()
    add(log, 50, b"near")
    log.release(mark)
    assert log.end == 54
    assert log.overlapping(60, 200) == []
    assert log.overlay(50, 100, b"", (), 0) == b"near"


# ---- P3: doubt and trust


def test_a_failed_sync_is_in_doubt_until_all_is_written_again_and_synced(log: WriteLog) -> None:
    """P3: Linux reports a failed writeback once and then calls the pages clean."""
    add(log, 0, b"a")
    assert not log.in_doubt
    log.doubt()
    assert log.in_doubt
    doubts = log.doubts
    log.trust(doubts)
    assert not log.in_doubt


def test_a_doubt_that_comes_while_the_log_is_written_again_stays(log: WriteLog) -> None:
    log.doubt()
    doubts = log.doubts
    log.doubt()
    log.trust(doubts)
    assert log.in_doubt
    log.trust(log.doubts)
    assert not log.in_doubt


def test_a_write_that_was_under_way_when_a_report_was_used_up_is_in_doubt(log: WriteLog) -> None:
    """P3: the report may have been about this one, too, which nobody had in the log then."""
    errors = log.errors
    log.doubt()
    log.trust(log.doubts)
    log.add(0, b"under way", stable=False, errors_before=errors)
    assert log.in_doubt
    log.trust(log.doubts)
    add(log, 0, b"afterwards")
    assert not log.in_doubt


def test_a_write_that_was_under_way_when_the_description_was_replaced_is_in_doubt(log: WriteLog) -> None:
    """P3: `unsettle` alone casts no doubt on what the log has."""
    errors = log.errors
    log.unsettle()
    assert not log.in_doubt
    log.add(0, b"under way", stable=False, errors_before=errors)
    assert log.in_doubt


def test_a_stable_write_needs_no_entry_while_there_is_nothing_older(log: WriteLog) -> None:
    """O_DSYNC: it is on stable storage when it returns; only what is older and written again could take its place."""
    add(log, 0, b"stable", stable=True)
    assert len(log) == log.bytes == log.end == 0
    add(log, 0, b"cached")
    add(log, 2, b"STABLE", stable=True)
    assert log.overlay(0, 8, b"xxxxxxxx", (), 0) == b"caSTABLE"
    log.release(log.mark())
    add(log, 0, b"stable", stable=True)
    assert len(log) == 0


def test_a_stable_write_that_met_an_error_has_an_entry(log: WriteLog) -> None:
    """An error that was used up while it was under way may have been its own."""
    errors = log.errors
    log.doubt()
    log.trust(log.doubts)
    log.add(0, b"stable", stable=True, errors_before=errors)
    assert len(log) == 1
    assert log.in_doubt


# ---- P10


def test_at_half_the_limit_a_sync_is_due_and_at_all_of_it_writers_wait() -> None:
    """P10: at half of it a sync is due, at all of it writers wait."""
    log = WriteLog(64 * KIB)
    seen = set()
    for number in range(64):
        assert not log.full or log.bytes >= 64 * KIB
        assert log.sync_is_due == (log.bytes > 32 * KIB)
        seen.add((log.sync_is_due, log.full))
        add(log, number * KIB, bytes(KIB))
    seen.add((log.sync_is_due, log.full))
    assert seen == {(False, False), (True, False), (True, True)}
    log.release(log.mark())
    assert (log.sync_is_due, log.full) == (False, False)


def test_without_a_limit_there_is_no_log() -> None:
    """`write_log=0`: none is kept, and nobody waits for it."""
    log = WriteLog(0)
    add(log, 0, b"data")
    assert len(log) == 0
    assert (log.sync_is_due, log.full, log.in_doubt) == (False, False, False)
    data = b"old"
    assert log.overlay(0, 10, data, (), 0) is data
    log.truncate(0)
    log.release(log.mark())
    assert log.clear() == 0


def test_small_writes_are_bounded_in_memory_too() -> None:
    """P10: a writer of single bytes (FUSE hands each write(2) on) fills the log long before it fills the memory."""
    import tracemalloc  # noqa: PLC0415 - it is needed here alone

    log = WriteLog(MIB)
    tracemalloc.start()
    try:
        number = 0
        while not log.full and number < 20_000:
            add(log, number, bytes([number & 255]))
            number += 1
        taken, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert taken <= 2 * MIB, (
        f"{taken / number:.0f} bytes for each write of one, of which the log counts {log.bytes / number:.0f}"
    )


def test_clear_says_how_many_bytes_were_lost(log: WriteLog) -> None:
    """The log line that an operator reads: bytes that were acknowledged and are not known to be stable."""
    add(log, 0, bytes(100))
    add(log, 4096, bytes(50))
    log.truncate(60)
    log.doubt()
    assert log.clear() == 60
    assert (len(log), log.bytes, log.end, log.in_doubt) == (0, 0, 0, False)
    assert log._marked.blocks == log._since.blocks == {}


def test_an_entry_ends_behind_its_last_byte() -> None:
    assert Entry(1, 10, 13, b"abc", 3).end == 13


def test_a_log_that_has_just_reached_its_limit_is_full(log: WriteLog) -> None:
    """P10: at all of it writers wait; at exactly half of it nothing is due yet."""
    add(log, 0, bytes(4096))
    exact = WriteLog(log.bytes)
    add(exact, 0, bytes(4096))
    assert exact.full
    half = WriteLog(2 * log.bytes)
    add(half, 0, bytes(4096))
    assert not half.sync_is_due


def test_a_hot_block_is_kept_once() -> None:
    """P10, P7: a thousand writes of one block are one entry: a read beside it looks at no more, and the log does not fill."""
    log = WriteLog(1 << 20)
    for number in range(1000):
        add(log, 4096, bytes([number % 256]) * 4096)
    assert len(log) == 1
    assert log.bytes < 5000
    assert log.overlay(4096, 1, b"?", log.overlapping(4096, 4097), log.end) == bytes([999 % 256])


def test_a_hot_block_is_kept_once_however_many_syncs_fail() -> None:
    """P10: each try is a mark, and a guest goes on writing meanwhile: what the log keeps does not grow with the tries."""
    log = WriteLog(1 << 20)
    for number in range(1000):
        add(log, 4096, bytes([number % 256]) * 4096)
        add(log, 8192, bytes([number % 256]) * 4096)
        log.mark()
    assert len(log) == 2
    assert log.bytes < 10000
    assert log.overlay(4096, 1, b"?", log.overlapping(4096, 4097), log.end) == bytes([999 % 256])
    add(log, 4096, b"x" * 4096)
    assert log.release(log.mark()) == 12288
    assert (len(log), log.bytes, log.end) == (0, 0, 0)
