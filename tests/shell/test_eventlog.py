"""The log of an outage: a line for each event, and few of them while storage flaps."""

from __future__ import annotations

import errno
import logging
from typing import TYPE_CHECKING

import pytest
import trio

from iohang_fuse.eventlog import BURST, PER_S, EventLog
from iohang_fuse.events import GivenUp, HangBegan, HangEnded, Op

if TYPE_CHECKING:
    from trio.testing import MockClock


@pytest.fixture
def events(caplog: pytest.LogCaptureFixture) -> EventLog:
    caplog.set_level(logging.INFO, "iohang_fuse.eventlog")
    return EventLog("/mnt")


def begin(image: str = "a.img") -> HangBegan:
    return HangBegan(image, Op.READ, errno.EIO, trio.current_time(), trio.current_time() + 60)


def end(image: str = "a.img") -> HangEnded:
    return HangEnded(image, errno.EIO, trio.current_time(), 1.0, 1, 1, 0, 0)


def fields_of(record: logging.LogRecord) -> dict[str, str]:
    found: dict[str, str] = record.__dict__["fields"]
    return found


async def test_a_hang_is_a_line_at_its_begin_and_one_at_its_end(
    events: EventLog,
    caplog: pytest.LogCaptureFixture,
    autojump_clock: MockClock,  # noqa: ARG001 - pytest-trio looks for it here
) -> None:
    """Issue: "one line at a hang's begin, one at its end", each with the fields of the journal."""
    events.tell(begin())
    events.tell(end())
    first, last = caplog.records
    assert first.getMessage().startswith("a.img: read failed with EIO (Input/output error); held since ")
    assert last.getMessage().startswith("a.img: recovered after 1.0 s; held since ")
    assert fields_of(first)["IOHANG_EVENT"] == "hang-begin"
    assert fields_of(last).items() >= {"IOHANG_IMAGE": "a.img", "IOHANG_MOUNTPOINT": "/mnt"}.items()
    assert "IOHANG_LEFT_OUT" not in fields_of(last)


async def test_a_thousand_give_ups_at_once_are_few_lines(
    events: EventLog,
    caplog: pytest.LogCaptureFixture,
    nursery: trio.Nursery,
    autojump_clock: MockClock,  # noqa: ARG001 - pytest-trio looks for it here
) -> None:
    """Issue: "one per give-up (limited in rate)": how many were not shown is said, and the end of the hang is not hidden."""
    nursery.start_soon(events.serve)
    for number in range(1000):
        now = trio.current_time()
        events.tell(GivenUp("a.img", Op.WRITE, errno.EIO, errno.EIO, now, 60, number * 4096, 4096))
    events.tell(end())
    assert len(caplog.records) == BURST + 1
    await trio.sleep(1 / PER_S + 2)
    assert len(caplog.records) == BURST + 2
    last = caplog.records[-1]
    assert "write of 4096 bytes at 4091904 " in last.getMessage()
    assert last.getMessage().endswith(f" {1000 - BURST - 1} lines like this one were left out before it.")
    assert fields_of(last)["IOHANG_LEFT_OUT"] == str(1000 - BURST - 1)


async def test_storage_that_flaps_does_not_fill_the_disk(
    events: EventLog,
    caplog: pytest.LogCaptureFixture,
    nursery: trio.Nursery,
    autojump_clock: MockClock,  # noqa: ARG001 - pytest-trio looks for it here
) -> None:
    """P10: an hour of flapping at 10 hangs a second is a bounded log, whose last line says how it is now."""
    nursery.start_soon(events.serve)
    for _ in range(36_000):
        events.tell(begin())
        await trio.sleep(0.05)
        events.tell(end())
        await trio.sleep(0.05)
    events.tell(begin("b.img"))
    assert "b.img" in caplog.records[-1].getMessage(), "another image is not hidden"
    await trio.sleep(1 / PER_S + 2)
    of_a = [record for record in caplog.records if fields_of(record)["IOHANG_IMAGE"] == "a.img"]
    assert 3600 * PER_S * 0.9 < len(of_a) <= BURST + 3600 * PER_S + 2
    assert "recovered" in of_a[-1].getMessage()
    assert len(of_a) + sum(int(fields_of(record).get("IOHANG_LEFT_OUT", 0)) for record in of_a) == 72_000


async def test_what_waits_is_written_at_the_end(
    events: EventLog,
    caplog: pytest.LogCaptureFixture,
    autojump_clock: MockClock,  # noqa: ARG001 - pytest-trio looks for it here
) -> None:
    """The last word is told also where the server ends before its turn has come."""
    for _ in range(BURST + 3):
        events.tell(begin())
    events.tell(end())
    events.flush()
    assert "recovered" in caplog.records[-1].getMessage()
    assert fields_of(caplog.records[-1])["IOHANG_LEFT_OUT"] == "3"
