"""The random exerciser on a mount in bad weather: whatever is read is what was written, and so is what SOURCE has."""

from __future__ import annotations

import re
import sys
from typing import TYPE_CHECKING

import pytest

from tests.exerciser import MODES
from tests.weather import SLOW_S, Kind, output_of, say, storm_mount, storm_s

if TYPE_CHECKING:
    from pathlib import Path

STORM_S = 12


@pytest.mark.parametrize("mode", MODES)
def test_every_read_and_every_byte_beneath_are_what_was_written(disk_path: Path, tmp_path: Path, mode: str) -> None:
    """P1, P3, P4 and P6 at once: no error, all stable after each fsync, in the order of arrival, nothing short or twice."""
    seconds = storm_s(STORM_S)
    with storm_mount(disk_path, tmp_path, set(Kind)) as storm:
        with storm.weather():
            output = output_of(
                [
                    sys.executable, "-m", "tests.exerciser", storm.mountpoint / "disk.img", storm.disk / "disk.img",
                    "--mode", mode, "--seconds", str(seconds), "--seed", str(storm.seed),
                ],
                seconds + SLOW_S,
            )  # fmt: skip
        say(output)
        operations = re.search(r"(\d+) operations", output)
        assert operations is not None, output
        assert int(operations[1]) > 10 * seconds, output
        storm.assert_masked()
