"""The monitor without a mount: what is sent to whom when storage flaps."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, cast

import trio

from iohang_fuse.events import HangBegan, HangEnded, HeldLimitReached, Op, TimedOut
from iohang_fuse.monitor import BURST, Monitor, _Client

if TYPE_CHECKING:
    from pathlib import Path

    from trio.testing import MockClock


class Ear:
    """A client that remembers the data of each event."""

    def __init__(self) -> None:
        self.heard: list[dict[str, Any]] = []
        self.session = self

    def event(self, name: str, data: dict[str, Any], at_s: float) -> bytes:
        return json.dumps({"name": name, "at": at_s, **data}).encode()

    def send(self, data: bytes) -> None:
        self.heard.append(json.loads(data))


def monitor(tmp_path: Path, ear: Ear) -> Monitor:
    made = Monitor(tmp_path / "m.sock", cast("Any", None), (0, 1, 0))
    made._clients.add(cast("_Client", ear))
    return made


def begin(image: str = "a.img") -> HangBegan:
    return HangBegan(image, Op.READ, 5, trio.current_time(), trio.current_time() + 60)


def end(image: str = "a.img") -> HangEnded:
    return HangEnded(image, 5, trio.current_time(), 1.0, 1, 1, 0, 0)


async def test_each_hang_is_told_of_once(
    tmp_path: Path,
    autojump_clock: MockClock,  # noqa: ARG001 - pytest-trio looks for it here
) -> None:
    """P9: "A hang gives one begin event and one end event", with image, errno, count and times."""
    ear = Ear()
    told = monitor(tmp_path, ear)
    for event in (begin(), TimedOut("a.img", True, Op.READ, 5, trio.current_time(), 0), end()):  # noqa: FBT003
        told.tell(event)
    told.tell(HeldLimitReached("a.img", 5, trio.current_time(), 1))  # the log's alone
    assert [(each["name"], each["set"], each["image"], each["errno"]) for each in ear.heard] == [
        ("BLOCK_IO_HANG", True, "a.img", "EIO"),
        ("BLOCK_IO_HANG_TIMEOUT", True, "a.img", "EIO"),
        ("BLOCK_IO_HANG", False, "a.img", "EIO"),
    ]
    assert ear.heard[0]["timeout"] == 60


async def test_what_flaps_is_told_of_less_often(
    tmp_path: Path,
    nursery: trio.Nursery,
    autojump_clock: MockClock,  # noqa: ARG001 - pytest-trio looks for it here
) -> None:
    """Issue: "limited in rate per image when storage flaps": what is left out is counted, and the last word is always told."""
    ear = Ear()
    told = monitor(tmp_path, ear)
    nursery.start_soon(told._send_what_waits)
    for _ in range(500):
        told.tell(begin())
        await trio.sleep(0.01)
        told.tell(end())
        await trio.sleep(0.01)
    told.tell(begin("b.img"))
    assert ear.heard[-1]["image"] == "b.img", "another image is told of at once"
    await trio.sleep(5)
    of_a = [each for each in ear.heard if each["image"] == "a.img"]
    assert BURST < len(of_a) <= BURST + 10 + 5
    assert of_a[-1]["set"] is False, "that the storage works again"
    assert sum(each.get("left-out", 0) for each in of_a) + len(of_a) == 1000
    await trio.sleep(60)
    assert len(told._throttle) == 0, "nothing is kept of an image that has been quiet"


async def test_one_kind_of_event_does_not_hide_the_other(
    tmp_path: Path,
    nursery: trio.Nursery,
    autojump_clock: MockClock,  # noqa: ARG001 - pytest-trio looks for it here
) -> None:
    """P9: whoever keeps account of hangs by their events hears of the end of each, whatever else is told meanwhile."""
    ear = Ear()
    told = monitor(tmp_path, ear)
    nursery.start_soon(told._send_what_waits)
    for _ in range(BURST + 1):
        told.tell(begin())
    told.tell(end())
    told.tell(TimedOut("a.img", False, Op.READ, 5, trio.current_time(), 0))  # noqa: FBT003
    await trio.sleep(3)
    assert [each["set"] for each in ear.heard if each["name"] == "BLOCK_IO_HANG"][-1] is False
