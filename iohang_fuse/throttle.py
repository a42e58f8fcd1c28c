"""How often the same thing may be told: some at once, and few in the long run.

Pure: callers pass *now*. What comes too early waits, and only the latest of it: so the last word is always told, a little later,
and with it how many before it were not. The log and the monitor keep to this while storage flaps.
"""

from __future__ import annotations

from typing import Generic, TypeVar

K = TypeVar("K")
T = TypeVar("T")


class _Bucket(Generic[T]):
    """What is told under one key."""

    def __init__(self, burst: float) -> None:
        self.left = burst
        self.at_s: float | None = None
        self.left_out = 0
        self.waiting: tuple[T] | None = None


class Throttle(Generic[K, T]):
    """Under each key, *burst* at once and *per_s* a second in the long run."""

    def __init__(self, burst: int, per_s: float) -> None:
        self._burst = burst
        self._per_s = per_s
        self._buckets: dict[K, _Bucket[T]] = {}

    def __len__(self) -> int:
        """How many keys it remembers: those of which something was told lately."""
        return len(self._buckets)

    def offer(self, key: K, what: T, now: float) -> tuple[T, int] | None:
        """*what*, and how many before it were left out, if it may be told now; None if it has to wait."""
        bucket = self._buckets.setdefault(key, _Bucket(self._burst))
        bucket.left_out += bucket.waiting is not None
        bucket.waiting = (what,)
        return self._taken(bucket, now)

    def due(self, now: float) -> list[tuple[T, int]]:
        """What has waited and may be told now, each with how many before it were left out. To be asked now and then."""
        told = []
        for key, bucket in [*self._buckets.items()]:
            if bucket.waiting is None:
                if now - (bucket.at_s or 0) > self._burst / self._per_s:
                    del self._buckets[key]  # as good as new
            elif (taken := self._taken(bucket, now)) is not None:
                told.append(taken)
        return told

    def _taken(self, bucket: _Bucket[T], now: float) -> tuple[T, int] | None:
        if bucket.at_s is not None:
            bucket.left = min(bucket.left + (now - bucket.at_s) * self._per_s, self._burst)
        bucket.at_s = now
        if bucket.left < 1 or bucket.waiting is None:
            return None
        bucket.left -= 1
        (what,), left_out = bucket.waiting, bucket.left_out
        bucket.waiting, bucket.left_out = None, 0
        return what, left_out
