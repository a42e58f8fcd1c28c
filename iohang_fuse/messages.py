"""What the log says of an event: one sentence with the image, the error, since when and until when; and the same as fields.

Pure: `clock` turns the event's monotonic seconds into the wall clock's words.
"""

from __future__ import annotations

import errno as errnos
import logging
import math
import os
from typing import TYPE_CHECKING

from iohang_fuse.events import Event, GivenUp, HangBegan, HangEnded, HeldLimitReached, Op, ReopenRefused, TimedOut

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


def printable(text: str) -> str:
    r"""*text* on one line: a file's name may have newlines and a terminal's commands in it. They become `\n`, `\x1b`."""
    if text.isprintable():
        return text
    return "".join(
        each if each.isprintable() else each.encode("unicode_escape", "surrogatepass").decode("ascii") for each in text
    )


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


def size_words(size: int) -> str:
    """Bytes as an operator says them: `512 B`, `4 KiB`, `1.06 GiB`."""
    for unit, bits in (("GiB", 30), ("MiB", 20), ("KiB", 10)):
        if size >= 1 << bits:
            return f"{size / (1 << bits):.3g} {unit}" if size < 1000 << bits else f"{size >> bits} {unit}"
    return f"{size} B"


def sentence(  # noqa: C901, PLR0911 - one for each kind of event
    event: Event, clock: Callable[[float], str]
) -> tuple[int, str]:
    """The level and the text of one log line."""
    match event:
        case HangBegan() if event.own:
            return logging.WARNING, (
                f"{event.image}: the server's own sync failed with {error_words(event.errno)}; tried again since "
                f"{clock(event.at_s)}, until it succeeds. Nobody waits for it yet; nothing is lost."
            )
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
            return logging.WARNING, (
                f"{event.image}: closed by its last consumer; whether the storage works again is not known."
            )
        case TimedOut():
            return logging.WARNING, f"{event.image}: works again; failures are held as before."
        case GivenUp() if event.held_s:
            return logging.ERROR, (
                f"{event.image}: {event.op}{_where(event)} was given up after {span_words(event.held_s)}: "
                f"{error_words(event.errno)}; its consumer has {errno_name(event.answer)}."
            )
        case GivenUp():
            return logging.ERROR, (
                f"{event.image}: {event.op}{_where(event)} failed with {error_words(event.errno)} and was not held, because the "
                f"image is timed out; its consumer has {errno_name(event.answer)}."
            )
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


def _where(event: GivenUp) -> str:
    return "" if event.op is Op.FSYNC else f" of {event.length} bytes at {event.offset}"


KINDS = {
    "hang-begin": "edab743baa214332a1dfa25b880d781c",
    "hang-end": "952daba70cab40019f72b805f7467c6f",
    "timed-out": "9544398fa30843e2913de5c2b76c330d",
    "works-again": "dc7a638f837d425499cb9a21db8786ce",
    "closed": "d9ced8b0290046229995c160e1bbf3b1",
    "given-up": "f2daf3e10d4f400b96fb0397edfb5ac8",
    "held-limit": "dbfe3743a3584c1f91428b91f5ea2070",
    "reopen-refused": "9bcdec992e5345678c35c26229cb2efd",
}
"""Each kind of event, with the journal's MESSAGE_ID for it. They are documented, and never change."""


def kind_of(event: Event) -> str:  # noqa: PLR0911 - one for each kind of event
    """The kind of *event*, a key of `KINDS`."""
    match event:
        case HangBegan():
            return "hang-begin"
        case HangEnded():
            return "hang-end"
        case TimedOut(on=True):
            return "timed-out"
        case TimedOut():
            return "closed" if event.closed else "works-again"
        case GivenUp():
            return "given-up"
        case HeldLimitReached():
            return "held-limit"
        case ReopenRefused():
            return "reopen-refused"


def fields(event: Event) -> dict[str, str]:
    """The journal's fields of *event*: what its sentence says, for programs. What an event has not is left out."""
    kind = kind_of(event)
    found = {"MESSAGE_ID": KINDS[kind], "IOHANG_EVENT": kind, "IOHANG_IMAGE": event.image}
    errno = getattr(event, "errno", None)
    if errno is not None:
        found |= {"IOHANG_ERRNO": errno_name(errno) or "", "ERRNO": str(errno)}
    for name in "op held held_max recovered given_up passed_on offset length held_bytes why".split():
        value = getattr(event, name, None)
        if value is not None:
            found[f"IOHANG_{name.upper()}"] = str(value)
    if isinstance(event, HangEnded):
        found["IOHANG_DURATION_S"] = f"{event.duration_s:.3f}"
    if isinstance(event, GivenUp):
        found |= {"IOHANG_ANSWER": errno_name(event.answer) or "", "IOHANG_HELD_S": f"{event.held_s:.3f}"}
    return found
