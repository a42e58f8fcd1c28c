"""The other benchmarks on the real thing: each runs to its end, and what does not depend on the machine's speed holds."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from contrib.bench import ordering

pytestmark = pytest.mark.slow

SETUP = Path(__file__).parents[2] / "contrib" / "setup"


def run(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """*name* of contrib/bench."""
    command = [sys.executable, "-m", f"contrib.bench.{name}", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)


def test_isolation_has_all_its_figures() -> None:
    """P7: "10,000 held": all of them are answered, and none with an error. How fast is for a machine that does nothing else."""
    done = run("isolation", "--engine", "uring", "--parts", "held,waiting", "--rounds", "1", "--seconds", "0.5")
    assert not done.stderr, done.stderr
    assert done.returncode in {0, 1}
    for what in ("B, 4k randread by 16", "B, 4k randwrite by 16", "B, 4k randread by 1,"):
        assert len(re.findall(rf"^  {what}.* [0-9.]+ \([0-9.]+ to [0-9.]+\)", done.stdout, re.MULTILINE)) == 1, (
            done.stdout
        )
    assert len(re.findall(r"^  answered with an error +0 +0 +met$", done.stdout, re.MULTILINE)) == 2, done.stdout
    assert re.search(r"^\d of 9 bounds are met$", done.stdout, re.MULTILINE), done.stdout


def test_memory_is_bounded() -> None:
    """P10, by the whole table."""
    done = run("memory")
    assert (done.returncode, done.stderr) == (0, ""), done.stdout + done.stderr


def test_ordering_has_its_figures(capsys: pytest.CaptureFixture[str]) -> None:
    """Two of its rows."""
    two = {name: ordering.PATTERNS[name] for name in [*ordering.PATTERNS][:2]}
    ordering.table("Ordering", ordering.order_us, two, 0.001)
    ordering.table("WriteLog", ordering.log_us, two, 0.001)
    assert len(re.findall(r"\(x[0-9.]+\)", capsys.readouterr().out)) >= 2 * 2 * 2


def test_the_outage_plot(tmp_path: Path) -> None:
    """P1, P3: on iohang-fuse nobody is told of an error, and what was acknowledged is there; the source itself has one."""
    svg = tmp_path / "outage.svg"
    subprocess.run([SETUP, "--bench"], capture_output=True, check=True, timeout=600)  # matplotlib, for the picture
    done = run("outage", "--minutes", "1.3", "--svg", str(svg))
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"^iohang-fuse .* [0-9,]{4,} +none +- .* 0$", done.stdout, re.MULTILINE), done.stdout
    assert re.search(r"^the source itself .* Input/output error ", done.stdout, re.MULTILINE), done.stdout
    assert "<svg" in svg.read_text()
    assert json.loads(svg.with_suffix(".json").read_text())
