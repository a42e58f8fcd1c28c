"""A sick image and a healthy one on the real mount, under load and for some ticks. `contrib.bench.isolation` has the figures.

That single calls go through while 500 requests are held is in test_outage.py.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any

import pytest

from contrib.bench.isolation import BLOCK, Client, Site, buffered, departures, direct, trouble
from iohang_fuse.filesystem import METADATA_THREADS
from iohang_fuse.rehandle import SHARE, TICK_BUDGET
from tests.harness import FlakySource, Mount, wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = pytest.mark.alone

MIB = 1 << 20
INTERVAL_S = 1.0
LOAD_S = 3  # three ticks of the timer
SLOW_S = 2.0
"""Longer than a healthy request takes on the slowest machine that runs this, and far shorter than the trouble lasts."""


OPENER = """\
import os, sys, threading
for _ in range(int(sys.argv[2])):
    threading.Thread(target=os.open, args=(sys.argv[1], os.O_RDONLY)).start()
"""


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    """Images a0 and b on one mount; nobody is given up."""
    (tmp_path / "real").mkdir()
    for name in ("a0.img", "b.img"):
        (tmp_path / "real" / name).write_bytes(bytes(16 * MIB))
    with FlakySource(tmp_path / "real", tmp_path / "src", tmp_path / "trigger", tmp_path / "flaky.log") as flaky:
        options = ("timeout=600", f"interval={INTERVAL_S}", "attr_timeout=0")
        with Mount(tmp_path / "src", tmp_path / "mnt", *options, log=tmp_path / "mnt.log") as mount:
            try:
                yield Site(flaky, mount, tmp_path)
            finally:
                flaky.heal()


def load_on_b(site: Site, rw: str, seconds: float) -> Any:
    """The report of fio on 4k requests on B at depth 16, from first to last: no errors."""
    done = subprocess.run(
        ["fio", "--name=b", f"--filename={site.at('b.img')}", "--size=16m", f"--rw={rw}", "--bs=4k", "--direct=1",
         "--ioengine=libaio", "--iodepth=16", "--time_based", f"--runtime={seconds}", "--norandommap", "--output-format=json"],
        capture_output=True, text=True, timeout=seconds + 30, check=False, cwd=site.folder,
    )  # fmt: skip
    job = json.loads(done.stdout[done.stdout.index("{") :])["jobs"][0]
    assert (done.returncode, job["error"]) == (0, 0), done.stdout + done.stderr
    return job


def assert_b_goes_on(site: Site) -> None:
    """B's reads and writes are served all the time, and the calls beside them."""
    job = load_on_b(site, "randrw", LOAD_S)
    for direction in ("read", "write"):
        assert job[direction]["total_ios"] > 50 * LOAD_S
        longest_s = job[direction]["clat_ns"]["max"] / 1e9
        assert longest_s < SLOW_S, f"a {direction} of B waited {longest_s:.1f} s"
    for call in (os.listdir, os.statvfs, os.stat):
        began_s = time.monotonic()
        call(site.mount.mountpoint)  # type: ignore[operator]
        assert time.monotonic() - began_s < SLOW_S, call


def test_b_keeps_working_while_300_are_held_on_a(site: Site) -> None:
    """P7: "A healthy image never waits for a sick one", under load, while the timer tries A's requests again."""

    def held() -> bool:
        return site.waiting(site.mount) >= 300 and site.held() >= 300

    with trouble(site, "data a0.img errno=EIO", lambda: direct(site, 300, "a0.img"), held):
        assert_b_goes_on(site)
        assert site.held() >= 300
    assert "no error was passed on" in site.mount.log_text()


@pytest.mark.parametrize("way", [direct, buffered])
def test_b_keeps_working_while_a_blocks(site: Site, way: Any) -> None:
    """P7: "A healthy image never waits for a sick one" - nor for attempts that do not return, more than A's share of them."""
    count = 4 * SHARE

    def blocked() -> bool:
        return site.waiting(site.mount) >= count and site.waiting(site.flaky) > 0

    with trouble(site, "data a0.img hang", lambda: way(site, count, "a0.img"), blocked):
        assert_b_goes_on(site)
        assert site.waiting(site.mount) >= count


def test_2000_held_cost_nothing_and_are_resumed_oldest_first(site: Site) -> None:
    """P7: "With 1,000 requests held on one image, another image keeps its speed": twice as many use next to no CPU.

    Section 4: "The first success opens the gate and all held requests are tried again at once, oldest first".
    """
    count, window_s = 2000, 4 * INTERVAL_S
    client = Client(site.at("a0.img"), "write", count)
    site.flaky.fail("data a0.img errno=EIO")
    client.start()
    try:
        wait_until(lambda: site.waiting(site.mount) >= count and site.held() >= count, 60, "all to be held")
        cpu_s = site.cpu_s()
        time.sleep(window_s)
        cpu_s = site.cpu_s() - cpu_s
    finally:
        site.flaky.heal()
        client.join(60)
    assert not client.is_alive()
    # Each tick tries TICK_BUDGET at most, of 2,000: that is some 30 ms, where trying all of them took more than a second.
    assert cpu_s < 0.15 * window_s, f"{cpu_s:.2f} s of CPU in {window_s:.0f} s of waiting"
    assert {request.result for request in client.requests} == {BLOCK}
    # All of them, those that the timer has tried in vain in the meantime included; but for the few that it was trying just then.
    away = sorted(departures(client.order))[: -TICK_BUDGET or None]
    assert max(away) <= 8 * SHARE, "more than attempts that are under way at once explain"


def test_opens_that_hang_leave_room_for_other_metadata(site: Site) -> None:
    """P7: "Neither do `ls`, `df`, `stat`" wait, whatever hangs of a sick image: more opens of it than there are threads."""
    count = METADATA_THREADS + 50
    before = site.waiting(site.mount)
    site.flaky.fail("open a0.img hang")
    opens = subprocess.Popen([sys.executable, "-c", OPENER, str(site.at("a0.img")), str(count)])
    try:
        wait_until(lambda: site.waiting(site.mount) >= before + count, 60, "all opens to hang")
        assert_b_goes_on(site)
        assert site.waiting(site.mount) >= before + count
    finally:
        site.flaky.heal()
        assert opens.wait(60) == 0
