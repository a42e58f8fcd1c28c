"""What the log says of an event: one sentence with the image, the error, since when and until when.

Pure: `clock` turns the event's monotonic seconds into the wall clock's words.
"""

from __future__ import annotations

import errno as errnos
import logging
import math
import os
from typing import TYPE_CHECKING

from iohang_fuse.events import Event, HangBegan, HangEnded, HeldLimitReached, ReopenRefused, TimedOut

if TYPE_CHECKING:
    from collections.abc import Callable


def error_words(errno: int | None) -> str:
    """`EIO (Input/output error)`; without a number, that the storage has not answered."""
    if errno is None:
        return "no answer from the storage"
    return f"{errnos.errorcode.get(errno, errno)} ({os.strerror(errno)})"


def errno_name(errno: int | None) -> str | None:
    """`EIO`; a number that has no name as it is."""
    return None if errno is None else errnos.errorcode.get(errno, str(errno))


def span_words(seconds: float) -> str:
    """Seconds as an operator says them: `0.4 s`, `59 s`, `3 min 5 s`, `2 h 10 min`."""
    if seconds == math.inf:
        return "ever"
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def sentence(  # noqa: PLR0911 - one for each kind of event
    event: Event, clock: Callable[[float], str]
) -> tuple[int, str]:
    """The level and the text of one log line."""
    match event:
        case HangBegan():
            until = "until it succeeds" if event.deadline_s == math.inf else f"until {clock(event.deadline_s)} at most"
            return logging.WARNING, (
                f"{event.image}: {event.op} failed with {error_words(event.errno)}; "
                f"held since {clock(event.at_s)}, {until}. Its consumer waits; nothing is lost."
            )
        case HangEnded() if event.given_up or event.passed_on:
            return logging.ERROR, (
                f"{event.image}: the hang since {clock(event.at_s - event.duration_s)} is over after "
                f"{span_words(event.duration_s)}: {event.given_up} of its requests were given up, {event.passed_on} passed on, "
                f"{event.recovered} recovered; the error was {error_words(event.errno)}."
            )
        case HangEnded():
            return logging.WARNING, (
                f"{event.image}: recovered after {span_words(event.duration_s)}; "
                f"held since {clock(event.at_s - event.duration_s)}, {event.held_max} requests at most; no error was passed on."
            )
        case TimedOut(on=True):
            return logging.ERROR, (
                f"{event.image}: timed out: a {event.op} was given up after {error_words(event.errno)}, and its consumer "
                f"has the error; {event.held} more are held. New failures are answered at once until an attempt succeeds."
            )
        case TimedOut(closed=True):
            return (
                logging.WARNING,
                f"{event.image}: closed by its last consumer; whether the storage works again is not known.",
            )
        case TimedOut():
            return logging.WARNING, f"{event.image}: works again; failures are held as before."
        case HeldLimitReached():
            return logging.ERROR, (
                f"{event.image}: {error_words(event.errno)} was passed on, because {event.held_bytes} bytes are held and "
                f"held_limit allows no more."
            )
        case ReopenRefused():
            return logging.ERROR, (
                f"{event.image}: its descriptor fails, and it was not opened anew: {event.why}. It is not written by that name; "
                f"put the file back under its name, or let its consumer close it."
            )
