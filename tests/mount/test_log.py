"""The log of a real mount through an outage: what an operator reads, and what `debug` adds."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
from typing import TYPE_CHECKING

import pytest

from tests.harness import FlakySource, Mount, wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

NAME = "a\nERROR forged.img"


@pytest.fixture
def flaky(tmp_path: Path) -> Iterator[FlakySource]:
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / NAME).write_bytes(bytes(1 << 16))
    with FlakySource(tmp_path / "real", tmp_path / "src", tmp_path / "trigger", tmp_path / "flaky.log") as source:
        yield source


def lines_of_an_outage(flaky: FlakySource, tmp_path: Path, *options: str) -> list[str]:
    """The log's lines, without their times, of one read that is tried some times and succeeds."""
    options = ("interval=0.2", f"monitor={tmp_path / 'm.sock'}", *options)
    with Mount(tmp_path / "src", tmp_path / "mnt", *options, log=tmp_path / "log") as mount:
        flaky.fail("data * errno=EIO")
        fd = os.open(tmp_path / "mnt" / NAME, os.O_RDONLY)
        reader = threading.Thread(target=os.pread, args=(fd, 4096, 0))
        reader.start()
        wait_until(lambda: "held since" in mount.log_text(), what="a hang")
        wait_until(lambda: attempts(tmp_path) >= 4, what="some retries")
        flaky.heal()
        reader.join(30)
        assert not reader.is_alive()
        os.close(fd)
    return [line.split(" ", 2)[2] for line in mount.log_text().splitlines()]


def attempts(tmp_path: Path) -> int:
    """Of the read that is held."""
    command = [
        sys.executable,
        "-c",
        "from iohang_fuse.ctl import main; main()",
        "-s",
        str(tmp_path / "m.sock"),
        "--json",
        "list",
    ]
    done = subprocess.run(command, capture_output=True, check=True, timeout=30)
    return sum(image["attempts"] for image in json.loads(done.stdout))


def test_an_outage_is_two_lines(flaky: FlakySource, tmp_path: Path) -> None:
    """Issue: "one line at a hang's begin, one at its end [...] as a sentence with image, errno, since, until", for any name."""
    lines = [line for line in lines_of_an_outage(flaky, tmp_path) if "forged" in line]
    assert len(lines) == 2
    begin = r"WARNING a\\nERROR forged\.img: read failed with EIO \(.*\); held since ([0-9:]{8}), until [0-9:]{8} at most\. "
    begun = re.match(begin, lines[0])
    assert begun is not None, lines
    assert re.match(rf"WARNING a\\nERROR forged\.img: recovered after [0-9.]+ s; held since {begun[1]}, ", lines[1]), (
        lines
    )


def test_debug_shows_each_retry(flaky: FlakySource, tmp_path: Path) -> None:
    """Issue: "`debug` shows each retry": by number, with its error, and the last one, too."""
    lines = lines_of_an_outage(flaky, tmp_path, "log_level=debug")
    tries = [re.search(r": read of (\d+) bytes at 0, attempt (\d+): (.*)", line) for line in lines]
    found = [(int(each[2]), each[3]) for each in tries if each]
    assert len(found) >= 4
    assert [number for number, _ in found] == [*range(1, len(found) + 1)]
    assert all(re.match(r"\[Errno 5\]", said) for _, said in found[:-1])
    assert found[-1][1] == "done"


def test_warning_has_hangs_and_errors_alone(flaky: FlakySource, tmp_path: Path) -> None:
    """docs/iohang-mount.rst: "`warning` logs hangs and errors alone"."""
    command = [sys.executable, "-m", "iohang_fuse.cli", str(tmp_path / "src"), str(tmp_path / "mnt")]
    (tmp_path / "mnt").mkdir()
    log = tmp_path / "quiet.log"
    subprocess.run([*command, "-o", f"log_level=warning,monitor=none,interval=0.2,log={log}"], check=True, timeout=60)
    try:
        flaky.fail("data * errno=EIO")
        fd = os.open(tmp_path / "mnt" / NAME, os.O_RDONLY)
        reader = threading.Thread(target=os.pread, args=(fd, 4096, 0))
        reader.start()
        wait_until(lambda: "held since" in log.read_text(), what="a hang")
        flaky.heal()
        reader.join(30)
        os.close(fd)
    finally:
        flaky.heal()
        subprocess.run(["umount", str(tmp_path / "mnt")], check=True)
    assert " INFO " not in log.read_text()
