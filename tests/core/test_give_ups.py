"""Each request that is answered with an error has its event: the first as the image's time-out, the others as give-ups."""

from __future__ import annotations

import errno

from iohang_fuse.events import GivenUp, HangEnded, Op, TimedOut
from tests.core.world import Storage, World, policy

EIO, ENOSPC = errno.EIO, errno.ENOSPC


def dead() -> World:
    return World(policy(timeout_errno=ENOSPC), storage=Storage(errno=lambda _request, _now: EIO))


def test_each_give_up_has_its_event() -> None:
    """Issue: "one per give-up". The first makes the image timed out, and that event is its."""
    world = dead()
    for op in (Op.WRITE, Op.READ, Op.FSYNC):
        world.arrive(op, offset=8192)
        world.run(1)
    world.run(70)
    assert len(world.of(TimedOut)) == 1
    (ended,) = world.of(HangEnded)
    assert isinstance(ended, HangEnded)
    assert ended.given_up == 3
    given_up = world.of(GivenUp)
    assert [(event.op, event.errno, event.answer) for event in given_up if isinstance(event, GivenUp)] == [
        (Op.READ, EIO, ENOSPC),
        (Op.FSYNC, EIO, ENOSPC),
    ]
    first = given_up[0]
    assert isinstance(first, GivenUp)
    assert (first.image, first.offset, first.length) == ("disk.img", 8192, 4096)
    assert 60 <= first.held_s < 61
    assert world.events.index(first) < world.events.index(ended), "P9: the end of the hang is the last word about it"


def test_what_is_answered_at_once_has_its_event_too() -> None:
    """Design: "new failures are answered at once": their consumers have an error, which somebody will look for."""
    world = dead()
    world.arrive()
    world.run(61)
    world.arrive(Op.READ)
    world.run(1)
    (event,) = world.of(GivenUp)
    assert isinstance(event, GivenUp)
    assert (event.op, event.errno, event.answer, event.held_s) == (Op.READ, EIO, ENOSPC, 0)


def test_what_recovers_has_none() -> None:
    """P9: an outage that ends in time is a begin and an end, and nothing else."""
    world = World(storage=Storage(errno=lambda _request, now: EIO if now < 130 else 0))
    for _ in range(10):
        world.arrive()
    world.run(40)
    assert world.edges == "()"
    assert len(world.events) == 2
