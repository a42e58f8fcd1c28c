"""What has been counted since the mount began: metrics.py shows it, and nothing decides by it.

1. Pure: no trio, no os, no clock.
2. The hot path adds to plain ints here, and does nothing else: no label is looked up for a request that succeeds.
3. An image has counts of its own from its first error on. `MOST_IMAGES` have (P10): a new one takes the place of the one whose
   latest error is the longest ago, unless that is sick; where all are, the new one is counted with `OTHERS`. So no count ever
   jumps or falls: what goes is gone, as after a restart.
4. Another thread reads what is here, without a lock: ints as they are, dicts and lists as copies, which are made in one step of
   the interpreter.
"""

from __future__ import annotations

from bisect import bisect_left
from typing import TYPE_CHECKING

from iohang_fuse.events import Event, HangBegan, HangEnded, Op, TimedOut

if TYPE_CHECKING:
    from collections.abc import Callable

MOST_IMAGES = 250
"""More than a host has disks. Each may have some twenty series, which is where Prometheus' own cost begins."""

OTHERS = "/others"
"""The label of those for whom there is no room. No image has that name: names are relative to SOURCE."""

BUCKETS_S = (1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1800.0, 3600.0)
"""Of the durations of hangs: a blip, a failover, a reboot of the server, and what somebody had to get up for."""


class ImageTally:
    """The counts of one image, or of `OTHERS`."""

    __slots__ = ("errors", "hangs", "latest", "timeouts")

    def __init__(self) -> None:
        self.hangs = 0
        self.timeouts = 0
        self.errors: dict[tuple[Op, int], int] = {}  # by errno
        self.latest = 0  # its latest error, among those of all; 0: none


class Tally:
    """The counts of one mount. Requests are counted when they arrive, bytes when they are answered."""

    def __init__(self, sick: Callable[[], set[str]] = set, *, most_images: int = MOST_IMAGES) -> None:
        """*sick*: the names of the images that are in trouble now."""
        self.reads = self.writes = self.fsyncs = 0
        self.bytes_read = self.bytes_written = 0
        self.retries = 0
        # How requests that failed, or waited where others had, have ended.
        self.recovered = self.given_up = self.passed_on = 0
        self.over_limit = 0  # of those passed on: because of `held_limit`
        self.bucketed = [0] * (len(BUCKETS_S) + 1)  # hangs that are over, by the first bucket that they fit into
        self.hung_s = 0.0  # all of them together
        self.images: dict[str, ImageTally] = {}
        self.others = ImageTally()
        self._sick = sick
        self._most_images = most_images
        self._errors = 0

    def failed(self, image: str, op: Op, errno: int) -> None:
        """An attempt at the backing file has failed."""
        errors = self._of(image).errors
        errors[op, errno] = errors.get((op, errno), 0) + 1

    def tell(self, event: Event) -> None:
        """Something has happened to an image."""
        match event:
            case HangBegan():
                self._of(event.image).hangs += 1
            case HangEnded():
                self.bucketed[bisect_left(BUCKETS_S, event.duration_s)] += 1
                self.hung_s += event.duration_s
            case TimedOut(on=True):
                self._of(event.image).timeouts += 1

    def _of(self, image: str) -> ImageTally:
        found = self.images.get(image)
        if found is None:
            there_is_room = len(self.images) < self._most_images or self._make_room()
            found = ImageTally() if there_is_room else self.others
            if there_is_room:
                self.images[image] = found
        self._errors += 1
        found.latest = self._errors
        return found

    def _make_room(self) -> bool:
        sick = self._sick()
        well = [name for name in self.images if name not in sick]
        if well:
            del self.images[min(well, key=lambda name: self.images[name].latest)]
        return bool(well)
