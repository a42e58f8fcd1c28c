"""contrib/benchmark on the real thing: every cell has a figure that fio has given, and nothing stays mounted."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from contrib.bench.plan import CONTENDERS, DIRECT_SOURCE, SOURCE, WORKLOADS
from tests.harness import wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator

COMMAND = Path(__file__).parents[2] / "contrib" / "benchmark"
SECONDS = 1


def leftovers() -> list[str]:
    """What the benchmark has mounted, and its folders."""
    mounts = [line for line in Path("/proc/self/mountinfo").read_text().splitlines() if "iohang-bench-" in line]
    places = {Path("/dev/shm"), Path("/tmp"), Path("/var/tmp"), Path(os.environ.get("TMPDIR", "/var/tmp"))}
    return mounts + [str(path) for place in places for path in place.glob("iohang-bench-*")]


@pytest.fixture(autouse=True)
def nothing_stays() -> Iterator[None]:
    before = leftovers()
    yield
    assert [one for one in leftovers() if one not in before] == []


def measurements(file: Path) -> list[dict[str, Any]]:
    return list(json.loads(file.read_text())["measurements"])


@pytest.mark.slow
@pytest.mark.alone
def test_every_cell_has_a_figure(tmp_path: Path) -> None:
    svg = tmp_path / "picture.svg"
    options = ["--source", "tmpfs", "--rounds", "1", "--seconds", str(SECONDS), "--svg", str(svg)]
    done = subprocess.run([COMMAND, *options], capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stderr

    cells = {(one["contender"], one["workload"]): one for one in measurements(tmp_path / "picture.json")}
    contenders = [name for name in CONTENDERS if name != DIRECT_SOURCE]  # tmpfs has no other way
    assert {*cells} == {(name, workload.name) for name in contenders for workload in WORKLOADS}
    blocks = {workload.name: workload.block_bytes for workload in WORKLOADS}
    for (contender, workload), cell in cells.items():
        assert cell["error"] == "", cell
        # These four are separate figures of fio's, and must agree.
        assert cell["bytes"] == pytest.approx(cell["operations"] * blocks[workload], rel=0.001), cell
        assert cell["duration_s"] == pytest.approx(SECONDS, rel=0.5), cell
        # In a mixture the two directions end at slightly different times.
        assert cell["operations_per_s"] == pytest.approx(cell["operations"] / cell["duration_s"], rel=0.05), cell
        assert 0 < cell["latency_p50_us"] <= cell["latency_p99_us"], cell
        assert (cell["cpu_s"] > 0) == (contender != SOURCE), cell
    for name in contenders:
        assert f"\n{CONTENDERS[name]}" in done.stdout
    assert "fails" not in done.stdout
    assert "<svg" in svg.read_text()


@pytest.mark.slow
def test_a_guest_is_measured(tmp_path: Path) -> None:
    options = [
        "--guest",
        "--source",
        "tmpfs",
        "--rounds",
        "1",
        "--workload",
        "4k-read-1",
        "--svg",
        str(tmp_path / "picture.svg"),
    ]
    command = [COMMAND, *options, "--contender", "source", "iohang-threads"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stderr
    cells = {(one["contender"], one["workload"]): one for one in measurements(tmp_path / "picture.json")}
    for contender in ("source", "iohang-threads"):
        for workload in ("guest-write", "guest-read"):
            cell = cells[contender, workload]
            assert cell["error"] == "", cell
            assert cell["bytes_per_s"] * max(cell["duration_s"], 0.01) == pytest.approx(cell["bytes"]), cell
    assert "guest's dd" in done.stdout


def test_an_interruption_leaves_nothing_mounted(tmp_path: Path) -> None:
    svg = tmp_path / "picture.svg"
    options = ["--source", "tmpfs", "--rounds", "9", "--workload", "4k-read-1", "--svg", str(svg)]
    command = [COMMAND, *options, "--contender", "source", "nbdfuse", "iohang-threads"]
    said = tmp_path / "said"
    with said.open("wb") as out:
        benchmark = subprocess.Popen(command, stdout=out, stderr=out)
    wait_until(lambda: "round 1 of 9" in said.read_text() or benchmark.poll() is not None, 300, "the first round")
    assert benchmark.poll() is None, said.read_text()
    benchmark.send_signal(signal.SIGINT)
    assert benchmark.wait(60) == 130, said.read_text()
    assert "interrupted" in said.read_text()
