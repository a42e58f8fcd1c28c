"""What happened to an image, as values.

1. Pure: no trio, no os, no clock. Times are the caller's monotonic seconds.
2. A hang gives one `HangBegan` and one `HangEnded`, however many requests and retries it has (P9).
3. The same value feeds every listener: log, metrics and monitor.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass


class Op(enum.StrEnum):
    """The kinds of request that can be held; a change of size through an open handle is a WRITE."""

    READ = "read"
    WRITE = "write"
    FSYNC = "fsync"


@dataclass(frozen=True, slots=True)
class HangBegan:
    """An image's first request is held. *errno* is None where an attempt has not returned (a `hard` mount).

    *own*: it is the server's own sync, for which nobody waits.
    """

    image: str
    op: Op
    errno: int | None
    at_s: float
    deadline_s: float
    own: bool = False


@dataclass(frozen=True, slots=True)
class HangEnded:
    """No request of the image is held any more. *passed_on*: ended by an error that is not transient, or holding is off."""

    image: str
    errno: int | None
    at_s: float
    duration_s: float
    held_max: int
    recovered: int
    given_up: int
    passed_on: int


@dataclass(frozen=True, slots=True)
class TimedOut:
    """The image's first give-up (*on*), or the first attempt that succeeded after it (not *on*), or its last close (*closed*)."""

    image: str
    on: bool
    op: Op
    errno: int | None
    at_s: float
    held: int
    closed: bool = False


@dataclass(frozen=True, slots=True)
class GivenUp:
    """A request was answered with the error *answer*, after the one that `TimedOut` has told of.

    *errno* is that of its latest attempt. *held_s*: how long it was held; 0 where the image is timed out, and new failures are
    answered at once.
    """

    image: str
    op: Op
    errno: int | None
    answer: int
    at_s: float
    held_s: float
    offset: int
    length: int


@dataclass(frozen=True, slots=True)
class HeldLimitReached:
    """A failure was passed on because the data held has reached `held_limit`; once a minute."""

    image: str
    errno: int
    at_s: float
    held_bytes: int


@dataclass(frozen=True, slots=True)
class ReopenRefused:
    """A file whose descriptor seems to be dead was not opened anew, because of *why*; once per hang and reason."""

    image: str
    why: str
    at_s: float


Event = HangBegan | HangEnded | TimedOut | GivenUp | HeldLimitReached | ReopenRefused
