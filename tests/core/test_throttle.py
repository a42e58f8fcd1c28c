"""How often the same thing is told: bounded, counted, and the last word never lost."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from iohang_fuse.throttle import Throttle

BURST, PER_S = 3, 0.5


def test_some_are_told_at_once_and_the_latest_later() -> None:
    """Issue: "limited in rate", and what is left out is counted in the next one that is told."""
    throttle: Throttle[str, int] = Throttle(BURST, PER_S)
    assert [throttle.offer("a", n, 0) for n in range(6)] == [(0, 0), (1, 0), (2, 0), None, None, None]
    assert throttle.offer("b", 7, 0) == (7, 0), "another key has its own"
    assert throttle.due(1.9) == []
    assert throttle.due(2.0) == [(5, 2)]
    assert throttle.due(3.0) == []
    assert throttle.offer("a", 8, 4.0) == (8, 0)


def test_nothing_is_kept_of_what_is_quiet() -> None:
    """P10: bounded, however many images there have ever been."""
    throttle: Throttle[int, int] = Throttle(BURST, PER_S)
    for key in range(100):
        throttle.offer(key, 0, 0)
    assert len(throttle) == 100
    throttle.due(BURST / PER_S + 0.1)
    assert len(throttle) == 0


@given(st.lists(st.tuples(st.floats(0, 3), st.booleans()), max_size=200))
def test_the_rate_is_bounded_and_nothing_is_lost(steps: list[tuple[float, bool]]) -> None:
    """In any span of time at most burst + rate x span are told; each one is told or counted; the last is always told."""
    throttle: Throttle[str, int] = Throttle(BURST, PER_S)
    now, offered, told, at = 0.0, 0, [], []
    for wait_s, offers in steps:
        now += wait_s
        if offers:
            found = throttle.offer("a", offered, now)
            offered += 1
            got = [] if found is None else [found]
        else:
            got = throttle.due(now)
        told += got
        at += [now] * len(got)
    for first in range(len(at)):
        for last in range(first, len(at)):
            assert last - first + 1 <= BURST + (at[last] - at[first]) * PER_S + 1e-6
    told += throttle.due(now + 1 / PER_S)
    assert len(told) + sum(left_out for _, left_out in told) == offered
    assert not offered or told[-1][0] == offered - 1
