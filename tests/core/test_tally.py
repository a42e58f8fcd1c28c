"""What is counted for metrics: how many images have counts of their own, and how each failed request ended, once."""

from __future__ import annotations

import errno

import pytest

from iohang_fuse.events import HangBegan, HangEnded, Op, TimedOut
from iohang_fuse.rehandle import HeldBytes
from iohang_fuse.tally import BUCKETS_S, MOST_IMAGES, Tally
from tests.core.world import World, policy

EIO = errno.EIO


def began(image: str) -> HangBegan:
    return HangBegan(image, Op.READ, EIO, 100.0, 160.0)


def test_images_with_counts_of_their_own_are_bounded() -> None:
    """P10: "Memory [...] is bounded": 10,000 images that fail one after the other take the place of `MOST_IMAGES`."""
    tally = Tally()
    for number in range(10_000):
        tally.failed(f"{number}.img", Op.READ, EIO)
    assert len(tally.images) == MOST_IMAGES
    assert [*tally.images] == [f"{number}.img" for number in range(10_000 - MOST_IMAGES, 10_000)]
    assert tally.others.errors == {}


def test_the_longest_without_an_error_makes_room() -> None:
    """Its latest error counts, and not its first."""
    tally = Tally(most_images=2)
    for image in ("a", "b", "a", "c"):
        tally.failed(image, Op.READ, EIO)
    assert {*tally.images} == {"a", "c"}
    assert tally.images["a"].errors == {(Op.READ, EIO): 2}


def test_who_is_in_trouble_keeps_his_counts() -> None:
    """An alert must not lose its image in the middle of an outage, because more images fail than have room."""
    sick: set[str] = set()
    tally = Tally(lambda: sick, most_images=2)
    for image in ("a", "b"):
        sick.add(image)
        tally.failed(image, Op.WRITE, EIO)
        tally.tell(began(image))
    for _ in range(3):
        tally.failed("c", Op.WRITE, EIO)
    tally.tell(began("c"))
    tally.tell(TimedOut("c", True, Op.WRITE, EIO, 160.0, 0))  # noqa: FBT003
    assert {*tally.images} == {"a", "b"}
    assert (tally.others.errors, tally.others.hangs, tally.others.timeouts) == ({(Op.WRITE, EIO): 3}, 1, 1)
    sick.remove("a")
    tally.failed("d", Op.READ, EIO)
    assert {*tally.images} == {"b", "d"}


def test_the_durations_of_hangs() -> None:
    """A bucket has what lasted as long as its bound or less, as Prometheus' `le` says."""
    tally = Tally()
    for duration_s in (0.2, BUCKETS_S[0], 30.5, 10**6):
        tally.tell(HangEnded("a", EIO, 100.0, duration_s, 1, 1, 0, 0))
    assert tally.bucketed[0] == 2
    assert tally.bucketed[BUCKETS_S.index(60.0)] == 1
    assert tally.bucketed[-1] == 1
    assert sum(tally.bucketed) == 4
    assert tally.hung_s == pytest.approx(10**6 + 31.7)


def test_a_timeout_counts_when_it_begins() -> None:
    """Its end is an event, too."""
    tally = Tally()
    for on in (True, False):
        tally.tell(TimedOut("a", on, Op.READ, EIO, 100.0, 0))
    assert tally.images["a"].timeouts == 1


# ---- how requests end


def fail(world: World, number: int) -> None:
    """From now on each attempt does, with *number*; or succeeds."""
    world.storage.errno = lambda _request, _now: number


def outcomes(world: World) -> tuple[int, int, int]:
    tally = world.held._tally
    return tally.recovered, tally.given_up, tally.passed_on


def test_each_failed_request_ends_once() -> None:
    """Words: "recovered / given up / passed on: how a failed request ended"."""
    world = World(policy(20))
    world.arrive()
    world.run(1)
    assert outcomes(world) == (0, 0, 0), "what succeeds at once has not failed"
    fail(world, EIO)
    for _ in range(10):
        world.arrive(Op.READ)
    world.run(10)
    assert outcomes(world) == (0, 0, 0), "held, and nothing else yet"
    fail(world, 0)
    world.run(10)
    assert outcomes(world) == (10, 0, 0)
    fail(world, EIO)
    for _ in range(10):
        world.arrive()
    world.run(30)
    assert outcomes(world) == (10, 10, 0)
    for _ in range(5):  # the image is timed out: these are never held
        world.arrive()
    world.run(1)
    assert outcomes(world) == (10, 10, 5)
    assert len(world.answers) == 26


def test_what_is_not_transient_is_passed_on() -> None:
    """Words: "passed on: never held (its errno is not transient, or holding is off)"."""
    world = World()
    fail(world, errno.ENOSPC)
    world.arrive()
    world.run(1)
    assert outcomes(world) == (0, 0, 1)
    fail(world, EIO)
    world.held.holding = False
    world.arrive()
    world.run(1)
    assert outcomes(world) == (0, 0, 2)
    assert world.held._tally.over_limit == 0


def test_what_held_limit_refuses_is_passed_on_and_counted_each_time() -> None:
    """Design: "beyond it new failures are passed on": an event a minute, and a count of every one."""
    world = World(held_bytes=HeldBytes(3 * 4096))
    fail(world, EIO)
    for _ in range(10):
        world.arrive()
    world.run(3)
    assert outcomes(world) == (0, 0, 7)
    assert world.held._tally.over_limit == 7
