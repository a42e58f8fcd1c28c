"""What `iohangctl top` shows of which answers."""

from __future__ import annotations

from typing import Any

import pytest

from iohang_fuse import toptable
from iohang_fuse.toptable import HEAD, Seen


def image(name: str, state: str = "healthy", **more: Any) -> dict[str, Any]:
    """One of query-io-hang's answer."""
    sick = {"errno": "EIO", "next-retry": 2.0, "oldest-age": 12.0, "nearest-deadline": 48.0, "since": 1_700_000_000}
    return {
        "image": name, "state": state, "holding": True, "held": 0 if state == "healthy" else 3, "in-flight": 0,
        "attempts": 7, "bytes": 12288, "unsynced-bytes": 0, **({} if state == "healthy" else sick), **more,
    }  # fmt: skip


def status(mountpoint: str = "/mnt/a", **more: Any) -> dict[str, Any]:
    return {
        "mountpoint": mountpoint, "status": "healthy", "images": 2, "hanging": 0, "timed-out": 0, "held": 0, "held-bytes": 0,
        "holding": True, **more,
    }  # fmt: skip


def event(name: str, *, on: bool, kind: str = "BLOCK_IO_HANG", given_up: int = 0) -> dict[str, Any]:
    ended = {} if on else {"duration": 8.5, "given-up": given_up, "passed-on": 0, "recovered": 3}
    return {"event": kind, "timestamp": {"seconds": 1_700_000_000}, "data": {"image": name, "set": on, **ended}}


def clock(at_s: float) -> str:
    return f"T{at_s}"


def seen(*images: dict[str, Any], mountpoint: str = "/mnt/a") -> Seen:
    mount = Seen("mnt-a", clock)
    mount.answered(status(mountpoint), images)
    return mount


def cells(row: toptable.Row) -> dict[str, str]:
    return dict(zip(HEAD, row.cells, strict=True))


def test_one_row_for_each_image_that_hangs() -> None:
    """State, held, oldest, nearest deadline, errno, attempts, next retry, bytes; a healthy image has no row."""
    (row,) = toptable.rows([seen(image("a.img", "hanging"), image("b.img"))])
    said = cells(row)
    assert said == {
        "MOUNT": "/mnt/a", "IMAGE": "a.img", "STATE": "hanging", "HELD": "3", "OLDEST": "12 s", "GIVEN UP IN": "48 s",
        "ERROR": "EIO", "ATTEMPTS": "7", "RETRY IN": "2.0 s", "BYTES": "12 KiB", "SINCE": "T1700000000",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("change", "column", "says"),
    [
        ({"nearest-deadline": None}, "GIVEN UP IN", "never"),
        ({"held": 0}, "GIVEN UP IN", "-"),
        ({"errno": None}, "ERROR", "no answer"),
        ({"holding": False}, "STATE", "hanging, paused"),
        ({"next-retry": None}, "RETRY IN", "-"),
    ],
)
def test_what_is_not_a_number(change: dict[str, Any], column: str, says: str) -> None:
    """Never, nothing, no answer from the storage, paused."""
    (row,) = toptable.rows([seen(image("a.img", "hanging", **change))])
    assert cells(row)[column] == says


def test_the_worst_come_first() -> None:
    """Timed out before hanging, the longest first, and then those whose trouble is over."""
    mount = seen(
        image("young.img", "hanging", **{"oldest-age": 1.0}),
        image("old.img", "hanging", **{"oldest-age": 50.0}),
        image("dead.img", "timed-out"),
        image("fine.img"),
    )
    mount.heard(event("fine.img", on=False))
    assert [row.cells[1] for row in toptable.rows([mount])] == ["dead.img", "old.img", "young.img", "fine.img"]


def test_an_image_that_had_trouble_keeps_its_row() -> None:
    """Also where the hang was too short to be in any answer, and after its last close."""
    mount = seen(image("a.img"))
    mount.heard(event("a.img", on=True))
    mount.heard(event("a.img", on=False, given_up=2))
    mount.heard(event("b.img", on=True, kind="BLOCK_IO_HANG_TIMEOUT"))
    (row,) = toptable.rows([mount])
    assert row.state == "healthy"
    assert cells(row)["SINCE"] == "over at T1700000000, after 8.5 s, 2 errors"
    mount.answered(status(), [])
    (row,) = toptable.rows([mount])
    assert row.state == "closed"


def test_an_image_that_was_seen_hanging_keeps_its_row() -> None:
    """Without an event, too: the monitor leaves some out where storage flaps."""
    mount = seen(image("a.img", "hanging"))
    assert "past" in toptable.as_json([mount], 0)["mounts"][0]  # type: ignore[index]
    assert toptable.as_json([mount], 0)["mounts"][0]["past"] == {}  # type: ignore[index]
    mount.answered(status(), [image("a.img")])
    assert [cells(row)["SINCE"] for row in toptable.rows([mount])] == ["over"]


def test_an_answer_that_is_older_than_the_end_does_not_hide_it() -> None:
    """The answer was on its way when the hang ended, whose event came first."""
    mount = seen(image("a.img", "hanging"))
    mount.heard(event("a.img", on=True))
    mount.heard(event("a.img", on=False))
    ended = mount.past["a.img"]
    assert ended.startswith("over at ")
    mount.answered({**mount.status} if mount.status else {}, [image("a.img", "hanging")])
    assert mount.past["a.img"] == ended


def test_what_is_remembered_is_bounded() -> None:
    """A host with thousands of images must not fill the memory in a week."""
    mount = seen()
    for number in range(1000):
        mount.heard(event(f"{number}.img", on=False))
    assert len(toptable.rows([mount])) == 200
    assert toptable.rows([mount])[0].cells[1] == "999.img"


def test_a_mount_whose_server_is_gone_says_so() -> None:
    """Survives the server's end; what it had said before is not true any more."""
    mount = seen(image("a.img", "hanging"))
    mount.lost("its server has ended")
    assert toptable.totals(mount) == "/mnt/a: its server has ended"
    assert toptable.rows([mount]) == []
    assert toptable.as_json([mount], 1.5) == {
        "at": 1.5,
        "mounts": [{"mountpoint": "/mnt/a", "gone": "its server has ended"}],
    }
    mount.answered(status(), [image("a.img")])
    assert toptable.totals(mount).startswith("/mnt/a: healthy: 2 images open")


def test_totals() -> None:
    """One line for a mount."""
    mount = Seen("mnt-a", clock)
    assert toptable.totals(mount) == "mnt-a: has not answered yet"
    mount.answered(status(status="hanging", hanging=1, held=3, **{"held-bytes": 3 << 20, "holding": False}), [])
    assert toptable.totals(mount) == (
        "/mnt/a: hanging: 2 images open, 1 hanging, 0 timed out; 3 requests held, 3 MiB; holding is paused"
    )


@pytest.mark.parametrize("width", [200, 90, 70, 50, 30, 20, 1])
def test_columns_that_do_not_fit_are_left_out(width: int) -> None:
    """Small terminals: image, state and held stay to the last."""
    found = toptable.rows([seen(image("a.img", "hanging")), seen(image("b.img", "hanging"), mountpoint="/mnt/b")])
    kept = [HEAD[i] for i in toptable.columns(found, width)]
    assert kept[:1] == (["MOUNT"] if "MOUNT" in kept else ["IMAGE"])
    assert {"IMAGE", "STATE", "HELD"} <= {*kept}
    assert (len(kept) == len(HEAD)) == (width == 200)
    if kept != ["IMAGE", "STATE", "HELD"]:
        widths = [max(len(HEAD[i]), *(len(row.cells[i]) for row in found)) for i in toptable.columns(found, width)]
        assert sum(widths) + 2 * (len(widths) - 1) <= width


def test_one_mount_needs_no_column_of_its_own() -> None:
    """All rows are of the one that the first line names."""
    found = toptable.rows([seen(image("a.img", "hanging"))])
    assert "MOUNT" not in [HEAD[i] for i in toptable.columns(found, 200)]
    assert toptable.plain([seen(image("a.img", "hanging"))], "now")[1].split()[0] == "IMAGE"
    assert toptable.plain([seen(image("a.img"))], "now") == [f"now {toptable.totals(seen(image('a.img')))}"]
