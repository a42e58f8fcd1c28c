"""Limits that must go together, and what is said where they do not."""

from __future__ import annotations

import math
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from iohang_fuse import limits
from iohang_fuse.limits import Problem, System, effective_interval, problems

if TYPE_CHECKING:
    from pathlib import Path

ROOMY = System(open_files=1 << 20)


def found(
    system: System = ROOMY,
    *,
    timeout_s: float = 60,
    shortest_s: float = 60,
    interval_s: float = 5,
    max_background: int = 4096,
) -> list[Problem]:
    return problems(
        system,
        timeout_s=timeout_s,
        shortest_timeout_s=shortest_s,
        interval_s=interval_s,
        max_background=max_background,
    )


def test_the_defaults_go_together() -> None:
    """A system as it comes, with our defaults, has no problem."""
    assert found() == []


@pytest.mark.parametrize("name", ["default_request_timeout", "max_request_timeout"])
@pytest.mark.parametrize(
    ("limit_s", "timeout_s", "fatal"),
    [(0, 60, False), (299, 60, True), (300, 60, False), (3600, math.inf, True), (0, math.inf, False), (240, 0, False)],
)
def test_the_kernels_request_timeout_must_be_above_ours(
    name: str, limit_s: int, timeout_s: float, *, fatal: bool
) -> None:
    """P8: the kernel aborts the whole mount when a request is older than fs.fuse.*_request_timeout: refuse to start."""
    problem = found(System(**{f"{name}_s": limit_s}), timeout_s=timeout_s)
    assert [p.fatal for p in problem] == [True] * fatal
    if fatal:
        assert f"fs.fuse.{name} is {limit_s} s" in problem[0].text
        assert f"sysctl -w fs.fuse.{name}=0" in problem[0].text
        assert "300 at least" in problem[0].text or timeout_s == math.inf


def test_an_interval_beyond_the_timeout_is_shortened_and_said() -> None:
    """A request would be given up before it is tried again: try it twice at least, and say so."""
    (problem,) = found(shortest_s=3, interval_s=5)
    assert not problem.fatal
    assert "using an interval of 1 s" in problem.text
    assert found(shortest_s=0, interval_s=5) == []  # holding is off for that kind


@pytest.mark.parametrize(
    ("timeout_s", "interval_s", "used_s"),
    [(60, 5, 5), (5, 5, 5 / 3), (3, 5, 1), (0.2, 5, 0.1), (0, 5, 5), (math.inf, 5, 5), (5.1, 5, 5)],
)
def test_the_interval_that_is_used(timeout_s: float, interval_s: float, used_s: float) -> None:
    """The interval as asked, unless that leaves no room for two attempts; never below 0.1 s."""
    assert effective_interval(timeout_s, interval_s) == pytest.approx(used_s)


def test_receive_buffers_must_fit_the_address_space() -> None:
    """P10: libfuse maps a buffer for each request in flight; at vm.max_map_count the server would die."""
    assert found(System(max_map_count=5120)) == []
    (problem,) = found(System(max_map_count=5119))
    assert problem.fatal
    assert "max_background is 4096" in problem.text
    assert "sysctl -w vm.max_map_count=73722" in problem.text


def test_few_open_files_are_a_warning() -> None:
    """One descriptor for each file that the kernel knows of."""
    (problem,) = found(System(open_files=1024))
    assert not problem.fatal
    assert "LimitNOFILE" in problem.text
    assert found(System(open_files=4096)) == []


def test_every_problem_is_found_at_once() -> None:
    """P10: who mends one should not meet the next at the next start."""
    system = System(default_request_timeout_s=1, max_request_timeout_s=1, max_map_count=1, open_files=1)
    assert len(found(system, shortest_s=1)) == 5


def test_a_setting_that_is_not_there_is_no_limit(tmp_path: Path) -> None:
    """The FUSE timeouts exist from Linux 6.15 on."""
    assert limits.number(str(tmp_path / "absent"), 7) == 7
    (tmp_path / "garbled").write_text("unlimited\n")
    assert limits.number(str(tmp_path / "garbled"), 7) == 7
    (tmp_path / "number").write_text("65530\n")
    assert limits.number(str(tmp_path / "number"), 7) == 65530


def test_the_system_can_be_read() -> None:
    """Whatever this machine's settings are, they are numbers that can be compared."""
    system = limits.read_system()
    assert system.max_map_count > 0
    assert system.open_files != 0


def test_a_mount_that_is_gone_already_needs_no_limit(tmp_path: Path) -> None:
    """Who unmounts at once ends the server as ever, and not with a traceback."""
    limits.set_max_background_of(str(tmp_path), 4096)


def test_the_alarm_clock_is_off_when_the_interpreter_ends() -> None:
    """P12, P8: a second at the very end, when the interpreter has given signals back, must not make a failure of the exit."""
    slow_end = """
import time
from iohang_fuse import limits

class Slow:
    def __del__(self, sleep=time.sleep):
        sleep(2.5)

slow = Slow()
limits.alarm_clock()
"""
    assert subprocess.run([sys.executable, "-c", slow_end], check=False, timeout=60).returncode == 0
