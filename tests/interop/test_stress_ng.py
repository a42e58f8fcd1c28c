"""stress-ng's class of file-system stressors, verifying, on the mount and on SOURCE itself: what passes there passes here."""

from __future__ import annotations

import enum
import re
import subprocess
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, NamedTuple

import pytest

from tests.harness import Mount

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

NOT_RUN = {
    "bind-mount": "may hang or reboot the machine, says stress-ng, and wants --pathological for it",
    "binderfs": "mounts file systems of its own, and uses no other",
    "inode-flags": "counts no round within ten seconds on a disk either: nothing to compare",
    "procfs": "reads all of /proc, and nothing else",
}
# Ends at once if the disk has more free inodes than a moment before: it subtracts without regard to sign.
ALONE = {"dirdeep"}
# Writes on the mount are stable when they are answered: by default these would write for minutes.
SMALLER = {name: f"--{name}-bytes=1m" for name in ("fallocate", "iomix", "sync-file")}
# Name -> cause, for what passes on SOURCE and cannot pass above FUSE. One that passes after all is an error here.
EXCEPTIONS = {
    "fiemap": "FUSE has no FS_IOC_FIEMAP: the kernel answers EOPNOTSUPP, and the stressor skips itself",
}


class Outcome(enum.Enum):
    PASSED = enum.auto()
    SKIPPED = enum.auto()
    FAILED = enum.auto()


class Result(NamedTuple):
    outcome: Outcome
    output: str


def stress(program: str, stressor: str, where: Path) -> Result:
    """Run one *stressor* for a second in *where*, or for as long as it takes to get something done; it must leave *where* empty."""
    where.mkdir()
    for seconds in (1, 10, 40):
        command = [program, f"--{stressor}=1", f"--timeout={seconds}s", "--verify", "--metrics-brief"]
        command += [f"--temp-path={where}", *([SMALLER[stressor]] if stressor in SMALLER else [])]
        try:
            done = subprocess.run(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                timeout=60 + seconds,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            return Result(Outcome.FAILED, f"did not end: {error.output!r}")
        if "skipping stress" in done.stdout:
            return Result(Outcome.SKIPPED, done.stdout)
        left = sorted(path.name for path in where.iterdir())
        if done.returncode or left:
            return Result(Outcome.FAILED, f"{done.stdout}\nexit code {done.returncode}, left behind: {left}")
        if re.search(rf"metrc: \[\d+\] {stressor} +[1-9]\d* ", done.stdout):
            return Result(Outcome.PASSED, done.stdout)
    return Result(Outcome.FAILED, f"{done.stdout}\nnothing done")


@pytest.mark.slow
def test_every_stressor_that_passes_on_source_passes_on_the_mount(
    program: Callable[[str, str], str], disk_path: Path, tmp_path: Path
) -> None:
    stress_ng = program("stress-ng", "stress-ng")
    listed = subprocess.run(
        [stress_ng, "--class", "filesystem?"], capture_output=True, text=True, check=False
    ).stdout.partition(":")[2]
    stressors = sorted(set(listed.split()) - NOT_RUN.keys())
    assert len(stressors) >= 40, listed
    source = disk_path / "source"
    source.mkdir()
    with (
        Mount(source, disk_path / "mnt", "monitor=none", log=tmp_path / "log") as mount,
        ThreadPoolExecutor(4) as pool,
    ):
        places = (disk_path, mount.mountpoint)
        runs = [(stressor, where / stressor) for stressor in stressors for where in places]
        in_company = [run for run in runs if run[0] not in ALONE]
        results = dict(zip(in_company, pool.map(lambda run: stress(stress_ng, *run), in_company), strict=True))
        results.update({run: stress(stress_ng, *run) for run in runs if run[0] in ALONE})
        assert "Traceback" not in mount.log_text()
    on_source, on_mount = ({name: results[name, where / name] for name in stressors} for where in places)
    passed = {name for name in stressors if on_source[name].outcome is Outcome.PASSED}
    assert len(passed) >= 40, on_source
    lost = {name for name in passed if on_mount[name].outcome is not Outcome.PASSED}
    assert not lost - EXCEPTIONS.keys(), "\n\n".join(
        f"{name}, on the mount only:\n{on_mount[name].output}" for name in sorted(lost - EXCEPTIONS.keys())
    )
    assert lost == EXCEPTIONS.keys(), "no exceptions any more"
