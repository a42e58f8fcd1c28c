"""Who waits for whom in one image, example by example; every other order of events is test_ordering_machine.py's."""

from __future__ import annotations

import gc
import math
import weakref

import pytest

from iohang_fuse.ordering import Fences, Ordering, Turn, blocks

KIB = 1 << 10
MIB = 1 << 20
BLOCK = 64 * KIB


class Someone:
    """Whose turn it is, so that a test can see whether anybody still knows them."""


def assert_empty(order: Ordering) -> None:
    """Nothing is left of anybody."""
    assert order.writes == 0
    assert (order._blocks, order._wide) == ({}, {})
    assert (len(order._unfinished), len(order._syncs)) == (0, 0)


@pytest.fixture
def order() -> Ordering[str]:
    return Ordering()


# ---- P4: order


@pytest.mark.parametrize("kind", ["read", "write"])
@pytest.mark.parametrize(
    ("start", "end", "waits"),
    [
        (4096, 8192, True),
        (4096, 4608, True),
        (8191, 8192, True),
        (0, 4097, True),
        (8191, 9000, True),
        (0, MIB, True),
        (0, 4096, False),
        (8192, 12288, False),
        (4096 + BLOCK, 8192 + BLOCK, False),
        (4096 + (1 << 32), 8192 + (1 << 32), False),
    ],
)
def test_what_overlaps_an_earlier_write_waits(
    order: Ordering[str], kind: str, start: int, end: int, *, waits: bool
) -> None:
    """P4: a request that overlaps a held or in-flight write of the same image waits for it. Nothing else waits."""
    write = order.write("write", 4096, 8192)
    assert not write.waits
    later = getattr(order, kind)("later", start, end)
    assert later.waits is waits
    assert order.leave(write) == (["later"] if waits else [])
    assert not later.waits


def test_writes_to_one_range_land_in_the_order_in_which_they_arrived(order: Ordering[str]) -> None:
    """P4: writes to one range land in the order in which they arrived."""
    turns = [order.write(str(number), 0, 4096) for number in range(100)]
    assert [turn.waits for turn in turns] == [False] + [True] * 99
    for number, turn in enumerate(turns[:-1]):
        assert order.leave(turn) == [str(number + 1)]
    assert order.leave(turns[-1]) == []
    assert_empty(order)


def test_nothing_waits_for_a_read(order: Ordering[str]) -> None:
    """P4: nothing else waits: not a write for a read, nor an fsync, nor another read."""
    order.read("read", 0, MIB)
    assert not order.write("write", 0, 4096).waits
    order = Ordering()
    order.read("read", 0, MIB)
    assert not order.read("other", 0, 4096).waits
    assert not order.sync("sync").waits


def test_a_write_passes_a_read_that_waits(order: Ordering[str]) -> None:
    """P4: nothing else waits: a read that waits for a write stands in nobody's way."""
    write = order.write("write", 0, 4096)
    assert order.read("read", 0, 8192).waits
    assert not order.write("younger", 4096, 8192).waits
    assert order.leave(write) == ["read"], "and it does not wait for what came after it"


def test_reads_behind_a_write_come_all_at_once(order: Ordering[str]) -> None:
    write = order.write("write", 0, MIB)
    reads = [order.read(str(at), at * BLOCK, (at + 1) * BLOCK) for at in range(16)]
    assert all(read.waits for read in reads)
    assert order.leave(write) == [str(at) for at in range(16)]


def test_a_write_waits_for_all_that_it_overlaps(order: Ordering[str]) -> None:
    """P4, across blocks: 1 MiB waits for a small write in each block, and comes once, when the last one has left."""
    small = [order.write(str(at), at * BLOCK + 4096, at * BLOCK + 8192) for at in range(17)]
    large = order.write("large", 4096, 8192 + MIB)
    for turn in small[::-1][1:]:
        assert large.waits
        assert order.leave(turn) == []
    assert order.leave(small[-1]) == ["large"]


def test_older_writes_of_other_bytes_of_the_same_block_are_not_forgotten(order: Ordering[str]) -> None:
    """P4: the search ends at a write that covers the *rest*, and not at the first that overlaps."""
    left, right = order.write("left", 0, 4096), order.write("right", 4096, 8192)
    both = order.write("both", 2048, 6144)
    assert order.leave(right) == []
    assert order.leave(left) == ["both"]
    assert order.leave(both) == []


@pytest.mark.parametrize(("older", "younger"), [((0, 1), (1, 4096)), ((4095, 4096), (0, 4095))])
def test_one_byte_that_the_youngest_leaves_is_enough(
    order: Ordering[str], older: tuple[int, int], younger: tuple[int, int]
) -> None:
    """P4: the write that ends the search covers every byte of the rest."""
    first, second = order.write("older", *older), order.write("younger", *younger)
    assert order.read("read", 0, 4096).waits
    assert order.leave(second) == []
    assert order.leave(first) == ["read"]


# ---- P4: changes of size


def test_a_change_of_size_is_a_write_to_infinity(order: Ordering[str]) -> None:
    """P4: truncation takes its place in that order."""
    before, far = order.write("before", 0, 4096), order.write("far", 1 << 40, (1 << 40) + 1)
    cut = order.write("cut", 4096, math.inf)
    assert cut.waits
    assert order.leave(before) == [], "what lies before the new size has nothing to do with it"
    below = order.write("below", 0, 4096)
    assert not below.waits
    order.leave(below)
    beyond, across = order.read("beyond", 1 << 41, (1 << 41) + 1), order.write("across", 4095, 4097)
    assert order.leave(far) == ["cut"]
    assert beyond.waits
    assert across.waits
    assert order.leave(cut) == ["beyond", "across"]


def test_changes_of_size_go_one_after_the_other(order: Ordering[str]) -> None:
    """P4: two changes of size always overlap."""
    shrink, grow = order.write("shrink", 0, math.inf), order.write("grow", MIB, math.inf)
    again = order.write("again", 4096, math.inf)
    between = order.read("between", 5000, 6000)
    assert order.leave(shrink) == ["grow"]
    assert order.leave(grow) == ["again"]
    assert order.leave(again) == ["between"]
    order.leave(between)
    assert_empty(order)


# ---- P4: fsync


def test_an_fsync_waits_for_every_earlier_write_and_for_no_other(order: Ordering[str]) -> None:
    """P4: an fsync covers, and waits for, every write that arrived before it."""
    writes = [order.write(str(at), at * MIB, at * MIB + 1) for at in range(5)]
    sync = order.sync("sync")
    assert sync.waits
    younger = order.write("younger", 10 * MIB, 11 * MIB)
    assert not younger.waits, "nothing waits for an fsync"
    order.leave(younger)
    for turn in writes[:0:-1]:
        assert order.leave(turn) == []
    late = order.write("late", 10 * MIB, 11 * MIB)
    assert order.leave(writes[0]) == ["sync"], "and it does not wait for what came after it"
    order.leave(sync)
    order.leave(late)
    assert_empty(order)


def test_an_fsync_waits_for_a_change_of_size(order: Ordering[str]) -> None:
    cut = order.write("cut", 0, math.inf)
    assert order.sync("sync").waits
    assert order.leave(cut) == ["sync"]


def test_fsyncs_do_not_wait_for_each_other(order: Ordering[str]) -> None:
    write = order.write("write", 0, 1)
    order.sync("first")
    between = order.write("between", 1, 2)
    order.sync("second")
    assert order.leave(between) == []
    assert order.leave(write) == ["first", "second"]


def test_what_waits_itself_is_waited_for_by_an_fsync(order: Ordering[str]) -> None:
    """P4: a write that has not had its turn has arrived all the same."""
    first, second = order.write("first", 0, 1), order.write("second", 0, 1)
    order.sync("sync")
    assert order.leave(first) == ["second"]
    assert order.leave(second) == ["sync"]


# ---- leaving without having had one's turn


def test_who_gives_up_leaves_those_behind_it_where_they_were(order: Ordering[str]) -> None:
    """P4: a write that was given up while it waited does not let the next one pass the one that it waited for itself."""
    first = order.write("first", 0, 4096)
    given_up = order.write("given up", 0, 4096)
    last = order.write("last", 0, 4096)
    assert order.leave(given_up) == []
    assert last.waits
    assert order.leave(first) == ["last"]


def test_who_gives_up_passes_on_only_what_overlaps(order: Ordering[str]) -> None:
    """P4: nothing else waits, not even for what somebody before it was waiting for."""
    left, right = order.write("left", 0, 4096), order.write("right", 4096, 8192)
    both = order.write("both", 0, 8192)
    read = order.read("read", 4096, 8192)
    assert order.leave(both) == []
    assert order.leave(right) == ["read"]
    assert not read.waits
    assert order.leave(left) == []


def test_whom_somebody_was_holding_up_alone_comes_at_once(order: Ordering[str]) -> None:
    """P4: the write between the two overlaps both; once it is given up, they have nothing to do with each other."""
    first = order.write("first", 0, 4096)
    between = order.write("between", 0, 8192)
    last = order.write("last", 4096, 8192)
    assert last.waits
    assert order.leave(between) == ["last"]
    assert order.leave(first) == []


def test_a_whole_chain_that_gives_up_in_any_order(order: Ordering[str]) -> None:
    first = order.write("first", 0, 4096)
    chain = [order.write(str(number), 0, 4096) for number in range(10)]
    last = order.write("last", 0, 4096)
    for number in (5, 4, 6, 0, 9, 1, 8, 2, 7, 3):
        assert order.leave(chain[number]) == []
    assert last.waits
    assert order.leave(first) == ["last"]
    order.leave(last)
    assert_empty(order)


def test_who_gave_up_is_not_told_of_its_turn(order: Ordering[str]) -> None:
    write = order.write("write", 0, 4096)
    for turn in (order.read("read", 0, 4096), order.write("other", 0, 4096), order.sync("sync")):
        assert order.leave(turn) == []
    assert order.leave(write) == []
    assert_empty(order)


def test_a_write_that_gives_up_lets_an_fsync_go(order: Ordering[str]) -> None:
    """P4: it waits for writes; one that has been answered with an error is none."""
    first, second = order.write("first", 0, 1), order.write("second", 0, 1)
    order.sync("sync")
    assert order.leave(second) == []
    assert order.leave(first) == ["sync"]


# ---- P10: bounded


@pytest.mark.parametrize("kind", ["write", "read", "sync", "cut"])
def test_nobody_is_remembered_who_has_left(kind: str) -> None:
    """P10: the order keeps nobody alive, whatever it was that they wanted and whether or not they had to wait for it."""
    order: Ordering[Someone] = Ordering()
    arrive = {
        "write": lambda whose: order.write(whose, 0, MIB),
        "read": lambda whose: order.read(whose, 0, MIB),
        "sync": order.sync,
        "cut": lambda whose: order.write(whose, 5, math.inf),
    }[kind]
    people = [Someone() for _ in range(10)]
    seen = [weakref.ref(someone) for someone in people]
    turns = [arrive(someone) for someone in people]
    for turn in turns[::2] + turns[::-2]:
        order.leave(turn)
    assert_empty(order)
    del people, turns, turn
    gc.collect()
    assert not any(ref() for ref in seen)


@pytest.mark.parametrize("kind", ["write", "overlapping", "read", "sync", "cut"])
def test_one_old_write_does_not_keep_what_came_after_it(kind: str) -> None:
    """P10: one write is held for hours (timeout=inf) while others come and go, or come and are given up."""
    order: Ordering[Someone] = Ordering()
    old = order.write(Someone(), 0, MIB)
    seen = []
    for number in range(2000):
        whose = Someone()
        seen.append(weakref.ref(whose))
        match kind:
            case "write":
                turn = order.write(whose, (number + 1) * MIB, (number + 2) * MIB)
            case "overlapping":
                turn = order.write(whose, 4096, 2 * MIB)
            case "read":
                turn = order.read(whose, 4096, 8192)
            case "sync":
                turn = order.sync(whose)
            case "cut":
                turn = order.write(whose, 4096, math.inf)
        order.leave(turn)
        del turn, whose
    assert sum(ref() is not None for ref in seen) <= 2 + 64
    assert not old.after
    assert len(order._blocks) == 16
    order.leave(old)
    assert_empty(order)


def test_an_arrival_looks_at_its_neighbourhood_alone(order: Ordering[str]) -> None:
    """What an arrival costs does not depend on how many requests there are: the youngest that covers it is the one to wait for."""
    for _ in range(1000):
        order.write("same", 0, 4096)
    assert len(order.write("same", 0, 4096).before) == 1
    assert len(order.write("larger", 0, MIB).before) > 1
    assert len(order.write("larger", 0, MIB).before) == 1
    assert len(order.read("read", 4096, MIB // 2).before) == 1


def test_many_cuts_are_waited_for_as_one(order: Ordering[str]) -> None:
    for size in (0, 4096, 0, 4096):
        order.write("cut", size, math.inf)
    assert len(order.read("read", 8192, 12288).before) == 1, "the youngest waits for all others itself"
    assert len(order.read("read", 0, 12288).before) == 2, "it begins behind the first byte, so one older is looked at"


@pytest.mark.parametrize(
    ("start", "end", "numbers"),
    [
        (0, 1, [0]),
        (0, BLOCK, [0]),
        (BLOCK - 1, BLOCK + 1, [0, 1]),
        (BLOCK, 2 * BLOCK, [1]),
        (1, 1 + MIB, [*range(17)]),
        (BLOCK, float(2 * BLOCK), [1]),
    ],
)
def test_blocks(start: int, end: float, numbers: list[int]) -> None:
    assert [*blocks(start, end)] == numbers


def test_a_turn_does_not_overlap_its_neighbours() -> None:
    turn = Turn("", 1, 10, 20, "write")
    assert [at for at in range(30) if turn.overlaps(at, at + 1)] == [*range(10, 20)]
    assert turn.overlaps(0, math.inf)
    assert not turn.overlaps(20, math.inf)


# ---- P5: fences


def test_a_fence_stands_until_an_attempt_that_began_after_it_has_succeeded() -> None:
    """P5: an overlapping write goes out only after another attempt on the image has succeeded since."""
    fences = Fences()
    assert not fences.stand(0, MIB)
    fences.put(4096, 8192, 100.0)
    fences.lift(99.9)  # it began before: the two may be on their way together
    fences.lift(100.0)
    assert fences.stand(8191, 8192)
    assert fences.stand(0, 4097)
    assert fences.stand(0, math.inf)
    assert not fences.stand(0, 4096)
    assert not fences.stand(8192, math.inf)
    fences.lift(100.1)
    assert not fences.stand(0, math.inf)


def test_a_success_lifts_the_fences_before_it_alone() -> None:
    fences = Fences()
    fences.put(0, 10, 1.0)
    fences.put(20, 30, 3.0)
    fences.lift(2.0)
    assert not fences.stand(0, 10)
    assert fences.stand(20, 30)


def test_a_change_of_size_is_fenced_to_infinity() -> None:
    fences = Fences()
    fences.put(4096, math.inf, 1.0)
    assert fences.stand(1 << 50, (1 << 50) + 1)
    assert not fences.stand(0, 4096)


def test_fences_are_bounded() -> None:
    """P10: a thousand writes that are given up together; a fence too large costs a read before a write, and nothing else."""
    fences = Fences()
    for number in range(1000):
        fences.put(number * 8192, number * 8192 + 4096, float(number))
    assert len(fences._fences) <= 64
    assert all(fences.stand(number * 8192, number * 8192 + 1) for number in range(1000))
    fences.lift(998.5)
    assert fences.stand(999 * 8192, 999 * 8192 + 1)


def test_fences_that_were_made_into_one_stand_as_long_as_the_youngest() -> None:
    """P5: and as far as the furthest."""
    fences = Fences()
    fences.put(1 << 30, math.inf, 0.0)
    for number in range(64):
        fences.put(number * 8192, number * 8192 + 4096, float(number + 1))
    fences.lift(63.5)
    assert fences.stand(0, 1)
    assert fences.stand(1 << 40, (1 << 40) + 1)


def test_all_fences_go_at_last() -> None:
    """P8: an attempt that began after all of them lifts them all, made into one or not."""
    fences = Fences()
    for number in range(1000):
        fences.put(number * 8192, number * 8192 + 4096, float(number))
    fences.lift(999.5)
    assert not fences.stand(0, math.inf)
