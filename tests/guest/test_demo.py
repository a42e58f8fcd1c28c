"""README's first command, as somebody at a terminal sees it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.parametrize("terminal", ["xterm", "dumb"])
def test_demonstration_on_a_terminal(terminal: str) -> None:
    """The demonstration ends with its verdict: the guest on iohang-fuse saw no error, the bare one did."""
    done = subprocess.run(
        ["script", "-qec", f"{sys.executable} -m contrib.demo --outage 4", "/dev/null"],
        cwd=ROOT,
        env={**os.environ, "TERM": terminal},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    assert "iohang-fuse holds with.img" in done.stdout, "live progress: what is held, since when, until when"
    assert "noticed a pause and nothing else" in done.stdout
