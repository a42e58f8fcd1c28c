"""What an operator reads in the log: each event's line, word for word, with its level."""

from __future__ import annotations

import errno
import logging
import math
import re
import uuid
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from iohang_fuse.events import Event, GivenUp, HangBegan, HangEnded, HeldLimitReached, Op, ReopenRefused, TimedOut
from iohang_fuse.messages import KINDS, error_words, fields, kind_of, printable, sentence, span_words


def clock(at_s: float) -> str:
    """Monotonic 100 is noon."""
    return f"12:{int(at_s - 100) // 60:02}:{int(at_s - 100) % 60:02}"


LINES = [
    (
        HangBegan("vm/a.img", Op.WRITE, errno.EIO, 100, 160),
        logging.WARNING,
        (
            "vm/a.img: write failed with EIO (Input/output error); held since 12:00:00, until 12:01:00 at most. "
            "Its consumer waits; nothing is lost."
        ),
    ),
    (
        HangBegan("a.img", Op.FSYNC, errno.ESTALE, 100, math.inf),
        logging.WARNING,
        (
            "a.img: fsync failed with ESTALE (Stale file handle); held since 12:00:00, until it succeeds. "
            "Its consumer waits; nothing is lost."
        ),
    ),
    (
        HangBegan("a.img", Op.READ, None, 105, 165),
        logging.WARNING,
        (
            "a.img: read failed with no answer from the storage; held since 12:00:05, until 12:01:05 at most. "
            "Its consumer waits; nothing is lost."
        ),
    ),
    (
        HangEnded("a.img", errno.EIO, 130, 30, 17, 17, 0, 0),
        logging.WARNING,
        "a.img: recovered after 30 s; held since 12:00:00, 17 requests at most; no error was passed on.",
    ),
    (
        HangEnded("a.img", errno.EIO, 190, 90, 17, 10, 5, 2),
        logging.ERROR,
        (
            "a.img: the hang since 12:00:00 is over after 1 min 30 s: 5 of its requests were given up, 2 passed on, "
            "10 recovered; the error was EIO (Input/output error)."
        ),
    ),
    (
        HangEnded("a.img", errno.EIO, 101, 1, 1, 0, 0, 1),
        logging.ERROR,
        (
            "a.img: the hang since 12:00:00 is over after 1.0 s: 0 of its requests were given up, 1 passed on, "
            "0 recovered; the error was EIO (Input/output error)."
        ),
    ),
    (
        TimedOut("a.img", on=True, op=Op.WRITE, errno=errno.EIO, at_s=160, held=3),
        logging.ERROR,
        (
            "a.img: timed out: a write was given up after EIO (Input/output error), and its consumer has the error; "
            "3 more are held. New failures are answered at once until an attempt succeeds."
        ),
    ),
    (
        TimedOut("a.img", on=False, op=Op.READ, errno=errno.EIO, at_s=170, held=0),
        logging.WARNING,
        "a.img: works again; failures are held as before.",
    ),
    (
        GivenUp("a.img", Op.WRITE, errno.ETIMEDOUT, errno.ENOSPC, 160, 60, 8192, 4096),
        logging.ERROR,
        (
            "a.img: write of 4096 bytes at 8192 was given up after 1 min 0 s: ETIMEDOUT (Connection timed out); "
            "its consumer has ENOSPC."
        ),
    ),
    (
        GivenUp("a.img", Op.FSYNC, errno.EIO, errno.EIO, 160, 0, 0, 0),
        logging.ERROR,
        (
            "a.img: fsync failed with EIO (Input/output error) and was not held, because the image is timed out; "
            "its consumer has EIO."
        ),
    ),
    (
        TimedOut("a.img", on=False, op=Op.READ, errno=errno.EIO, at_s=170, held=0, closed=True),
        logging.WARNING,
        "a.img: closed by its last consumer; whether the storage works again is not known.",
    ),
    (
        HeldLimitReached("a.img", errno.EIO, 100, 1 << 30),
        logging.ERROR,
        "a.img: EIO (Input/output error) was passed on, because 1073741824 bytes are held and held_limit allows no more.",
    ),
]


@pytest.mark.parametrize(("event", "level", "text"), LINES)
def test_each_event_has_one_line(event: Event, level: int, text: str) -> None:
    """P9: an event names the image, the errno, the count and the times; held is a warning, a give-up is an error."""
    assert sentence(event, clock) == (level, text)


def test_no_line_says_that_nothing_was_lost_when_something_was() -> None:
    """P9: `no error was passed on` is said only where every request of the hang recovered."""
    for given_up, passed_on in [(0, 1), (1, 0), (1, 1)]:
        _, text = sentence(HangEnded("a.img", errno.EIO, 130, 30, 3, 1, given_up, passed_on), clock)
        assert "no error" not in text


def test_a_file_that_is_not_opened_anew() -> None:
    """The event says why, and what to do: "otherwise it stays held, and the event says why"."""
    level, text = sentence(ReopenRefused("a.img", "its name is now that of another file", 100), clock)
    assert level == logging.ERROR
    assert text == (
        "a.img: its descriptor fails, and it was not opened anew: its name is now that of another file. It is not written by "
        "that name; put the file back under its name, or let its consumer close it."
    )


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0, "0.0 s"),
        (0.44, "0.4 s"),
        (9.94, "9.9 s"),
        (9.95, "10 s"),
        (59.4, "59 s"),
        (59.6, "1 min 0 s"),
        (185, "3 min 5 s"),
        (3599.4, "59 min 59 s"),
        (3599.6, "1 h 0 min"),
        (7800, "2 h 10 min"),
        (7 * 86400, "168 h 0 min"),
        (math.inf, "ever"),
    ],
)
def test_a_span_is_said_as_an_operator_would(seconds: float, words: str) -> None:
    """`59 s`, never `0.98 min`; rounding never gives `60 s`."""
    assert span_words(seconds) == words


def test_an_error_is_named_and_explained() -> None:
    """Name and meaning; a number without a name, and no number at all, have words too."""
    assert error_words(errno.ETIMEDOUT) == "ETIMEDOUT (Connection timed out)"
    assert error_words(None) == "no answer from the storage"
    assert error_words(4095).startswith("4095 (")


# ---- the same for programs

ONE_OF_EACH: list[Event] = [*dict.fromkeys(event for event, _, _ in LINES), ReopenRefused("a.img", "another file", 100)]


def test_each_kind_has_an_id_of_its_own_that_never_changes() -> None:
    """docs/iohang-mount.rst, LOGGING: the ids are what an administrator's alarms ask for."""
    assert {kind_of(event) for event in ONE_OF_EACH} == {*KINDS}
    page = (Path(__file__).parents[2] / "docs" / "iohang-mount.rst").read_text()
    for kind, identity in KINDS.items():
        assert re.search(rf"^``{kind}`` \(``{identity}``\)$", page, re.MULTILINE), kind
        assert uuid.UUID(hex=identity).version == 4
    assert len({*KINDS.values()}) == len(KINDS)


def test_fields_say_what_the_sentence_says() -> None:
    """Issue: "the journal's fields where there is one": image, errno, operation, event."""
    assert fields(HangBegan("vm/a.img", Op.WRITE, errno.EIO, 100, 160)) == {
        "MESSAGE_ID": KINDS["hang-begin"],
        "IOHANG_EVENT": "hang-begin",
        "IOHANG_IMAGE": "vm/a.img",
        "IOHANG_ERRNO": "EIO",
        "ERRNO": "5",
        "IOHANG_OP": "write",
    }
    ended = fields(HangEnded("a.img", None, 130, 30, 17, 10, 5, 2))
    assert ended["IOHANG_DURATION_S"] == "30.000"
    assert "IOHANG_ERRNO" not in ended, "an attempt that has not returned has none"
    assert [ended[f"IOHANG_{key}"] for key in ("HELD_MAX", "RECOVERED", "GIVEN_UP", "PASSED_ON")] == [
        "17",
        "10",
        "5",
        "2",
    ]


@pytest.mark.parametrize("event", ONE_OF_EACH)
def test_fields_are_such_as_the_journal_takes(event: Event) -> None:
    """systemd.journal-fields(7): upper case, digits and underscores, no underscore first; 64 at most."""
    for name, value in fields(event).items():
        assert re.fullmatch(r"[A-Z][A-Z0-9_]{0,63}", name)
        assert value


@given(st.text())
def test_a_line_is_one_line_whatever_a_file_is_called(name: str) -> None:
    """A name with a newline in it must not look like another line of the log, nor command a terminal."""
    shown = printable(name)
    assert shown.isprintable()
    assert shown == name or not name.isprintable()


def test_what_a_name_has_in_it_is_shown() -> None:
    """And can be read."""
    assert printable("a\nb\x1b[2J\udcff\u2028\u00e4.img") == "a\\nb\\x1b[2J\\udcff\\u2028\u00e4.img"
