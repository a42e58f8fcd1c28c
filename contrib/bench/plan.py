"""What is compared: the names of contenders and SOURCEs, what fio is asked to do, and what its JSON says came of it.

No mount is known here, and nothing is run.

Everything goes through one file that exists already, in blocks at random places. *direct* is O_DIRECT, as QEMU's cache=none
opens its images; depths are Linux AIO's, as QEMU's aio=native has them.
"""

from __future__ import annotations

import errno
import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
Mode = Literal["randread", "randwrite", "randrw"]

DELAY_US = 500
"""Of the source that stands for a network file system."""

ENGINES = ("uring", "threads")
"""The values of iohang-mount's option `engine` that are compared."""

SOURCE, DIRECT_SOURCE, PEER, CEILING = "source", "source-direct", "nbdfuse", "empty-handlers"
OUR_OPTIONS: Mapping[str, str] = {
    **{f"iohang-{engine}": f"engine={engine}" for engine in ENGINES},
    "iohang-uring-1G": "engine=uring,write_log=1G",
}
"""With the default write log (64 MiB) the server syncs each 32 MiB that are written, and waits for the disk: what the others, who
promise nothing, leave in the page cache. With 1 GiB the run is over before that."""
OURS = tuple(OUR_OPTIONS)

CONTENDERS: Mapping[str, str] = {
    SOURCE: "SOURCE itself",
    DIRECT_SOURCE: "SOURCE, past the page cache",
    "passthrough_ll": "libfuse passthrough_ll",
    "bindfs": "bindfs",
    PEER: "nbdfuse + retry-request",
    CEILING: "pyfuse3, empty handlers",
    **{f"iohang-{engine}": f"iohang-fuse, {engine}" for engine in ENGINES},
    "iohang-uring-1G": "iohang, uring, 1G log",
}
"""Names and titles, in the order of the tables."""

SOURCES: Mapping[str, str] = {
    "tmpfs": "tmpfs",
    "ext4": "ext4, file in the page cache",
    "fuse": "FUSE (bindfs over ext4)",
    "fuse-0.5ms": f"FUSE with {DELAY_US / 1000:g} ms per operation (passthrough_ll over tmpfs)",
    "flaky-0.5ms": f"FUSE with {DELAY_US / 1000:g} ms per operation (iohang-flaky over tmpfs)",
}
"""bindfs as the plain FUSE source: in C, of others' making, and as it comes: one thread."""


@dataclass(frozen=True)
class Workload:
    """One fio job, or what a guest does (*depth* 0: its dd waits for each block)."""

    name: str
    mode: Mode
    block_bytes: int
    depth: int
    direct: bool = True
    fsync_every: int = 0
    guest: bool = False

    @property
    def title(self) -> str:
        """For people, short."""
        if self.guest:
            return f"guest's dd {'reads' if self.mode == 'randread' else 'writes'}"
        block = f"{self.block_bytes // KIB}k" if self.block_bytes < MIB else f"{self.block_bytes // MIB}M"
        if self.fsync_every:
            return f"{block} write, fsync/{self.fsync_every}"
        verb = {"randread": "read", "randwrite": "write", "randrw": "70/30"}[self.mode]
        return f"{block} {verb} depth {self.depth}"

    @property
    def in_gib(self) -> bool:
        """Large blocks are given in GiB/s, small ones in thousands of operations a second (k/s)."""
        return self.guest or self.block_bytes >= MIB

    @property
    def unit(self) -> str:
        """Of `Measurement.rate`."""
        return "GiB/s" if self.in_gib else "k/s"

    @property
    def writes(self) -> bool:
        """Whether the file is another one afterwards."""
        return self.mode != "randread"

    def fio(self, file: Path, file_bytes: int, seconds: float, *, direct: bool) -> list[str]:
        """The command. *direct* False: through the page cache, whatever the workload says."""
        return [
            "fio", "--name=job", f"--filename={file}", f"--size={file_bytes}", f"--rw={self.mode}", f"--bs={self.block_bytes}",
            # In ms: of seconds fio takes the whole ones only, and 0 is for ever.
            f"--runtime={round(seconds * 1000)}ms", "--time_based",
            # One process, so that ending it ends all of it.
            "--thread",
            f"--direct={int(self.direct and direct)}",
            *(["--ioengine=psync", f"--fsync={self.fsync_every}"] if self.fsync_every
              else ["--ioengine=libaio", f"--iodepth={self.depth}"]),
            *(["--rwmixread=70"] if self.mode == "randrw" else []),
            # The file is there, whole and cached, and stays so: fio would drop it from the page cache first.
            "--allow_file_create=0", "--fallocate=none", "--invalidate=0",
            "--norandommap", "--randrepeat=1",
            # Latency from submission on: where a submission does all the work, completion takes no time (clat).
            "--lat_percentiles=1", "--clat_percentiles=0", "--percentile_list=50:99",
            "--output-format=json",
        ]  # fmt: skip


def fio(name: str, mode: Mode, block_bytes: int, depth: int) -> Workload:
    """An ordinary one."""
    return Workload(name, mode, block_bytes, depth)


LATENCY = "4k-read-1"
"""The workload that the table of latencies is about."""

WORKLOADS = (
    fio(LATENCY, "randread", 4 * KIB, 1),
    fio("4k-read-16", "randread", 4 * KIB, 16),
    fio("4k-write-16", "randwrite", 4 * KIB, 16),
    fio("1m-read-4", "randread", MIB, 4),
    fio("1m-write-4", "randwrite", MIB, 4),
    fio("16k-mixed-32", "randrw", 16 * KIB, 32),
    Workload("4k-fsync", "randwrite", 4 * KIB, 1, direct=False, fsync_every=32),
)
"""Buffered ones last: what they leave in a mount's page cache is in nobody's way there."""

NETWORK_WORKLOADS = (
    fio(LATENCY, "randread", 4 * KIB, 1),
    *(
        fio(f"{block // KIB}k-{mode.removeprefix('rand')}-{depth}", mode, block, depth)
        for depth in (16, 32)
        for block in (4 * KIB, 16 * KIB, 64 * KIB)
        for mode in ("randread", "randwrite")
    ),
)
"""For a source with latency: enough in flight that it is the latency that bounds it, and not the CPU."""


def workloads_of(source_name: str) -> tuple[Workload, ...]:
    """A source with latency has others."""
    return NETWORK_WORKLOADS if source_name.endswith("-0.5ms") else WORKLOADS


GUEST_WORKLOADS = (
    Workload("guest-write", "randwrite", MIB, 0, guest=True),
    Workload("guest-read", "randread", MIB, 0, guest=True),
)


@dataclass(frozen=True)
class Measurement:
    """One contender, once. Rates and latencies are 0 where *error* says why there are none.

    *duration_s* is how long fio or the guest measured, in seconds. *latency_p50_us* and *latency_p99_us* are from submission to
    completion, of the direction with more operations; 0 where nobody measured them. *cpu_s*: user and system time of the
    serving processes meanwhile, in seconds.
    """

    source: str
    workload: str
    contender: str
    round: int
    operations: int = 0
    bytes: int = 0
    duration_s: float = 0
    operations_per_s: float = 0
    bytes_per_s: float = 0
    latency_p50_us: float = 0
    latency_p99_us: float = 0
    cpu_s: float = 0
    error: str = ""

    def rate(self, *, in_gib: bool) -> float:
        """GiB/s, or thousands of operations a second."""
        return self.bytes_per_s / GIB if in_gib else self.operations_per_s / 1000

    def as_json(self) -> dict[str, Any]:
        """As it stands in the file of raw results."""
        return asdict(self)


def error_name(number: int) -> str:
    """`EINVAL`, or the number where it has no name."""
    return errno.errorcode.get(number, str(number))


def parse_fio(report: str) -> dict[str, Any]:
    """The fields of a `Measurement` that fio's JSON has; `error` alone if the job failed.

    Sums of both directions. Raises ValueError if *report* has no JSON, as when fio could not even start.
    """
    start = report.find("{")
    if start < 0:
        raise ValueError(f"fio gave no report: {report.strip()[-200:]}")
    job = json.loads(report[start:])["jobs"][0]
    if job["error"]:
        return {"error": error_name(job["error"])}
    read, write = job["read"], job["write"]
    busier = max(read, write, key=lambda direction: direction["total_ios"])
    if not busier["total_ios"]:
        return {"error": "nothing done"}
    percentiles = busier["lat_ns"]["percentile"]
    return {
        "operations": read["total_ios"] + write["total_ios"],
        "bytes": read["io_bytes"] + write["io_bytes"],
        "duration_s": max(read["runtime"], write["runtime"]) / 1000,
        "operations_per_s": read["iops"] + write["iops"],
        "bytes_per_s": float(read["bw_bytes"] + write["bw_bytes"]),
        "latency_p50_us": percentiles["50.000000"] / 1000,
        "latency_p99_us": percentiles["99.000000"] / 1000,
    }
