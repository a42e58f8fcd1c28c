"""Outages of a real NFS server, under the kernel's own client, with six kinds of mount at the same time.

Three of eleven: `python -m contrib.guest.nfs` plays all, and docs/outages-on-nfs.rst has what was seen.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from contrib.guest.nfs import report
from contrib.guest.nfs.outages import by_name
from contrib.guest.nfs.scene import INTERVAL_S

if TYPE_CHECKING:
    from contrib.guest.nfs.guest import Guest

pytestmark = [pytest.mark.slow, pytest.mark.alone]

AGAIN_S = INTERVAL_S + 1 + 6
""""consumers go on within one interval + 1 s of the server's return"; and 6 s more than is promised, because the guest's
processors are emulated, and other tests run beside it."""


def cell(scene: dict[str, Any], kind: str, way: str) -> dict[str, Any]:
    (found,) = [each for each in scene["cells"] if (each["kind"], each["way"]) == (kind, way)]
    return dict(found)


def errors(seen: dict[str, Any]) -> int:
    return sum(sum(seen[mode]["errors"].values()) for mode in report.MODES)


def test_packets_dropped(guest: Guest) -> None:
    """P1, P3, P9 where the error is NFS's own: "0 errors and 0 lost bytes for every outage shorter than the timeout".

    The kernel alone is deaf for longer than `AGAIN_S`. That the bare mounts have errors is the proof that there was an outage.
    """
    scene = guest.outage("dropped")
    assert report.problems(scene, again_s=AGAIN_S) == []
    for kind in ("v3-soft", "v3-softerr", "v4.2-soft", "v4.2-softerr"):
        assert errors(cell(scene, kind, "bare")), f"{kind}: the bare mount has seen no error, so nothing was proven"
    assert cell(scene, "v3-soft", "bare")["buffered"]["lost_bytes"], "an fsync that says 0 lies on a soft mount (P3)"


def test_stale_handles(guest: Guest) -> None:
    """Design: "An open file can be dead for good while its name works again (ESTALE [...])": it is opened anew.

    As another owner, or version 4.2 takes 17 s for it (`source.owning`).
    """
    scene = guest.outage("unexported")
    assert report.problems(scene, again_s=AGAIN_S) == []
    told = {
        name
        for each in scene["cells"]
        if each["way"] == "bare"
        for mode in report.MODES
        for name in each[mode]["errors"]
    }
    assert any(name.endswith("ESTALE") for name in told), told


def test_longer_than_the_timeout(guest: Guest) -> None:
    """P1: "answered only when it succeeds, or when its own timeout has passed", with EIO; and P5 after that: nothing lands late."""
    scene = guest.outage("too-long")
    assert report.problems(scene, again_s=AGAIN_S, errors_pass=by_name("too-long").errors_pass) == []
    for kind in ("v3-soft", "v4.2-softerr"):
        seen = cell(scene, kind, "iohang")
        assert errors(seen), f"{kind}: nothing was given up"
        assert all(name.endswith(" EIO") for mode in report.MODES for name in seen[mode]["errors"]), seen
