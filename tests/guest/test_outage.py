"""A real guest rides out outages: Debian's kernel under TCG, `cache=none,aio=native`, virtio-blk, on an image on the mount."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import pytest

from contrib.guest.guest import Guest, build, verify_image
from contrib.guest.records import Tick
from tests.harness import FlakySource, Mount, wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

IMAGE_BYTES = 64 << 20

pytestmark = pytest.mark.slow


@pytest.fixture
def flaky(tmp_path: Path) -> Iterator[FlakySource]:
    (tmp_path / "real").mkdir()
    with (tmp_path / "real" / "shared.img").open("wb") as image:
        image.truncate(IMAGE_BYTES)
    with FlakySource(tmp_path / "real", tmp_path / "flaky", tmp_path / "trigger", tmp_path / "flaky.log") as flaky:
        try:
            yield flaky
        finally:
            flaky.heal()


def ticks(guest: Guest, since_s: float, until_s: float) -> list[Tick]:
    return [record for record in guest.records if isinstance(record, Tick) and since_s <= record.host_s <= until_s]


def test_guest_notices_nothing_but_a_pause(tmp_path: Path, flaky: FlakySource) -> None:
    """P1 end to end: the guest writes and reads back through three outages of 5 s, sees no error, and loses no byte.

    With aio=threads: while an fsync is held, its kernel makes the image's next write wait already when it is submitted, and with
    aio=native that is QEMU's main loop (docs/limitations.rst). Its clock would go on only if no outage began in an fsync.
    """
    with (
        Mount(tmp_path / "flaky", tmp_path / "mnt", "interval=1", log=tmp_path / "log") as mount,
        Guest(build(), mount.mountpoint / "shared.img", log=tmp_path / "guest.log", aio="threads") as guest,
    ):
        for _ in range(3):
            steps = len(guest.steps)
            guest.wait_for(lambda steps=steps: len(guest.steps) > steps + 50, 30, "the guest to work")  # type: ignore[misc]
            hangs = mount.log_text().count("failed with EIO")
            flaky.fail("data *.img errno=EIO")
            wait_until(
                lambda hangs=hangs: mount.log_text().count("failed with EIO") > hangs, what="a request to be held"
            )  # type: ignore[misc]
            began_s = time.monotonic()
            time.sleep(5)
            assert guest.in_flight, "the guest's requests are pending"
            alive = ticks(guest, began_s, time.monotonic())
            assert len(alive) >= 4, "the guest's clock goes on during the outage"
            assert alive[-1].spins > alive[0].spins, "and so does its CPU"
            flaky.heal()
            wait_until(
                lambda hangs=hangs: mount.log_text().count("recovered after") > hangs, what="the end of the hang"
            )  # type: ignore[misc]
        steps = len(guest.steps)
        guest.wait_for(lambda: len(guest.steps) > steps + 50, 30, "the guest to work")
        kernel_log = "\n".join(guest.dmesg())
        done = guest.finish()
        assert guest.longest_pause_s >= 5
    assert (done.errors, done.mismatches) == (0, 0)
    assert not guest.errors
    assert not guest.kernel_io_errors
    assert "I/O error" not in kernel_log
    report = verify_image(tmp_path / "real" / "shared.img", guest.records)
    assert not report.mismatches
    assert report.verified_bytes > 100 * 4096
    assert "given up" not in mount.log_text()


def test_guest_gets_its_error_after_the_timeout(tmp_path: Path, flaky: FlakySource) -> None:
    """P1: "... or when its own timeout has passed": `timeout=3` and an outage of 10 s, the error 3 to 5 s after the failure."""
    with (
        Mount(tmp_path / "flaky", tmp_path / "mnt", "timeout=3", "interval=1", log=tmp_path / "log") as mount,
        Guest(build(), mount.mountpoint / "shared.img", log=tmp_path / "guest.log") as guest,
    ):
        guest.wait_for(lambda: len(guest.steps) > 50, 30, "the guest to work")
        flaky.fail("data *.img errno=EIO")
        wait_until(lambda: "failed with EIO" in mount.log_text(), what="a request to be held")
        failed_s = time.monotonic()
        guest.wait_for(lambda: guest.errors, 10, "the guest's error")
        assert 3 - 0.5 <= guest.errors[0].host_s - failed_s <= 5
        wait_until(lambda: guest.kernel_io_errors, what="the guest kernel's message")
        while time.monotonic() < failed_s + 10:
            time.sleep(0.1)
        flaky.heal()
        wait_until(lambda: "works again" in mount.log_text(), what="the probe to notice")
        steps, errors = len(guest.steps), len(guest.errors)
        guest.wait_for(lambda: len(guest.steps) > steps + 50, 30, "the guest to work again")
        done = guest.finish()
        assert len(guest.errors) - errors <= 2, "no new errors once the storage works"
    assert done.mismatches == 0
    assert not verify_image(tmp_path / "real" / "shared.img", guest.records).mismatches
