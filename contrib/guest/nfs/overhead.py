"""Inside the Debian guest: how much slower iohang-fuse is than the bare NFS mount beneath it, by fio; JSON to stdout.

    python3 -m contrib.guest.nfs.setting 15
    python3 -m contrib.guest.nfs.overhead [--kinds v3-softerr,v4.2-softerr] [--seconds 3]

Each workload is run on both in turns, `ROUNDS` times, so that what else happens on the machine meets both; the ratio is that of the
medians. The CPU is emulated, and the network has no latency to hide behind: what a request costs in CPU counts far more than
on hardware, so the ratios are worse than a real client's. Only the ratios mean anything.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from contrib.guest.nfs import site

if TYPE_CHECKING:
    from pathlib import Path

ROUNDS = 3
SECONDS = 3.0
KINDS = "v3-softerr,v4.2-softerr"
BYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class Workload:
    """One of fio's. Its figure is operations or bytes a second."""

    name: str
    rw: str
    block: str
    depth: int


WORKLOADS = (
    Workload("4k randread d1", "randread", "4k", 1),
    Workload("4k randread d16", "randread", "4k", 16),
    Workload("4k randwrite d16", "randwrite", "4k", 16),
    Workload("1M read d4", "read", "1M", 4),
    Workload("1M write d4", "write", "1M", 4),
)


def measured(workload: Workload, file: Path, seconds: float) -> float:
    """Its operations in a second; raises RuntimeError if fio meets an error."""
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [
                "fio", "--name=job", f"--filename={file}", f"--size={BYTES}", f"--rw={workload.rw}", f"--bs={workload.block}",
                f"--iodepth={workload.depth}", "--ioengine=libaio", "--direct=1", "--time_based", f"--runtime={seconds:g}",
                "--norandommap", "--fallocate=none", "--output-format=json",
            ],
            cwd=folder, capture_output=True, text=True, check=False, timeout=120,
        )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"{workload.name} on {file}: {done.stderr or done.stdout}")
    job = json.loads(done.stdout[done.stdout.index("{") :])["jobs"][0]
    return float(job["read" if "read" in workload.rw else "write"]["iops"])


def compare(kind: site.Kind, seconds: float) -> list[dict[str, Any]]:
    """All workloads on one mount."""
    name = f"overhead-{kind.name}.img"
    (kind.export / name).write_bytes(bytes(BYTES))
    (kind.export / name).chmod(0o666)
    found = []
    for workload in WORKLOADS:
        figures: dict[str, list[float]] = {"bare": [], "iohang": []}
        for _ in range(ROUNDS):
            for way, figure in figures.items():
                figure.append(measured(workload, (kind.bare if way == "bare" else kind.iohang) / name, seconds))
        bare, iohang = (statistics.median(figures[way]) for way in ("bare", "iohang"))
        found.append(
            {
                "kind": kind.name,
                "workload": workload.name,
                "bare_iops": [round(each) for each in figures["bare"]],
                "iohang_iops": [round(each) for each in figures["iohang"]],
                "ratio": round(iohang / bare, 2),
            }
        )
        print(f"{kind.name} {workload.name}: {iohang / bare:.2f}", file=sys.stderr, flush=True)
    (kind.export / name).unlink()
    return found


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", default=KINDS, help="which mounts, by commas")
    parser.add_argument(
        "--seconds", type=float, default=SECONDS, help="of each run; there are 30 of them for each mount"
    )
    given = parser.parse_args()
    kinds = [kind for kind in site.KINDS if kind.name in given.kinds.split(",")]
    json.dump({"workloads": [row for kind in kinds for row in compare(kind, given.seconds)]}, sys.stdout)


if __name__ == "__main__":
    main()
