"""The log of what happens to images: a sentence for each event, and few of them while storage flaps."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import trio

from iohang_fuse import diagnosis
from iohang_fuse.messages import fields, kind_of, sentence
from iohang_fuse.throttle import Throttle

if TYPE_CHECKING:
    from iohang_fuse.events import Event

log = logging.getLogger(__name__)

BURST, PER_S = 10, 0.1
"""Lines of one kind and image: ten at once, and then one in ten seconds, some 9,000 a day, however fast it flaps. What is left
out is counted in the next one, and the last one is never left out."""

_TOGETHER = {"hang-end": "hang-begin", "works-again": "timed-out", "closed": "timed-out"}
"""A begin and its end are of one kind here: the last line says how it is now."""


class EventLog:
    """A listener of `Requests`. *mountpoint* is a field of each line: the journal of a host has the lines of all its mounts."""

    def __init__(self, mountpoint: str) -> None:
        self._mountpoint = mountpoint
        self._throttle: Throttle[tuple[str, str], Event] = Throttle(BURST, PER_S)

    def tell(self, event: Event) -> None:
        """Write it down, now or a little later."""
        kind = kind_of(event)
        told = self._throttle.offer((event.image, _TOGETHER.get(kind, kind)), event, event.at_s)
        if told is not None:
            self._write(*told)

    async def serve(self) -> None:
        """Write what has had to wait. Never returns."""
        while True:
            await trio.sleep(1)
            for told in self._throttle.due(trio.current_time()):
                self._write(*told)

    def flush(self) -> None:
        """The server ends: whatever waits is written now."""
        for told in self._throttle.due(float("inf")):
            self._write(*told)

    def _write(self, event: Event, left_out: int) -> None:
        level, text = sentence(event, diagnosis.wall_clock)
        of_event = fields(event) | {"IOHANG_MOUNTPOINT": self._mountpoint}
        if left_out:
            text += f" {left_out} lines like this one were left out before it."
            of_event["IOHANG_LEFT_OUT"] = str(left_out)
        log.log(level, "%s", text, extra={"fields": of_event})
