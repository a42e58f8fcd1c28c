"""The outage plot: one load on three storages while the source beneath them fails twice.

    python -m contrib.bench.outage [--svg docs/outage.svg] [--minutes 2]

Root is needed, /dev/fuse, fio, nbdkit and nbdfuse; for the picture matplotlib (`pip install --group bench`). Beside the picture
come the same figures as CSV and JSON. A table of verdicts is printed either way. The exit code is 1 if fio on iohang-fuse met an
error, or a byte that was acknowledged is not in the source.

All three run at the same time, over one flaky source, so that an outage is the same moment for all of them: each read, write and
fsync fails with EIO.

iohang-fuse  all options at their defaults: tried again every 5 s, held for up to 60 s
the source   by itself
the peer     nbdkit's retry-request filter, mounted by nbdfuse, at its defaults: 2 retries, 2 s apart. It retries, and can be
             mounted, and nothing else does both. `cache=none`, or the page cache beneath it would hide the outage from its reads.

The load is fio's: 8 clients of 16 KiB at random places, 70 % reads, O_DIRECT, each with a pause after each operation.
They pause instead of keeping to a rate, because fio makes up for what a rate has missed: the burst after
an outage would be fio's doing, and hide the line. As soon as one client is told of an error all of them stop, as a database would.

Each client writes to its own part of the image. When all is over every block that was acknowledged is looked for in SOURCE, by
the header that fio puts into each: its place, and the time of the last write there. And fio reads all of it and compares the
checksums.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import os
import re
import shutil
import signal
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.harness import FlakySource, Mount, mounted_at, wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator

MINUTES = 2.0
OUTAGES = ((1 / 6, 3.0), (1 / 2, 28.0))
"""Begin, as a part of the whole, and length in seconds. The first is one that the peer's two retries outlive: a switch that
learns its routes anew. The second is a server's fail-over or restart. It is no multiple of the 5 s between
attempts, so that it shows what they cost: up to 5 s more."""

CLIENTS = 8
PAUSE_MS = (
    25  # so that the load is some 300 operations a second: a quiet guest's, and far below what any of the three can do
)
BLOCK = 16384
PART_MIB = 8  # of the image, for each client
IMAGE_MIB = CLIENTS * PART_MIB
START_S = 1.0  # until all three are at work; no part of the picture
GRACE_S = 70  # beyond the end, for what is held

CLOCK_S = 0.1
"""How far fio's log, in milliseconds, and its stamps may be apart. The one before is another write of the same
client, and with its pauses seconds earlier."""

_HEADER = struct.Struct(
    "<HHIQQII"
)  # fio's struct verify_header: magic, type, length, seed, offset, seconds, nanoseconds
_MAGIC = 0xACCA


@dataclass(frozen=True)
class Operation:
    """A read or write that fio has been answered: times in seconds since the beginning."""

    end_s: float
    latency_s: float
    write: bool
    offset: int


@dataclass
class Contender:
    """One storage under load, and what became of it."""

    key: str
    name: str
    image: Path
    beneath: Path
    operations: list[Operation] = field(default_factory=list)
    error: str = ""
    stopped_s: float | None = None
    wrong: int = 0
    looked_at: int = 0

    @property
    def longest_s(self) -> float:
        """The longest that a client waited for an answer."""
        return max((operation.latency_s for operation in self.operations), default=0.0)


# ---- the rig


@contextmanager
def peer(image: Path, folder: Path) -> Iterator[Path]:
    """The same image by nbdfuse from nbdkit with its retry-request filter."""
    mountpoint = folder / "peer"
    mountpoint.mkdir()
    with (folder / "peer.log").open("wb") as log:
        process = subprocess.Popen(
            ["nbdfuse", str(mountpoint / "disk.img"), "[", "nbdkit", "--exit-with-parent", "-f", "--filter=retry-request",
             "file", str(image), "cache=none", "]"],
            stdout=log, stderr=log, start_new_session=True,
        )  # fmt: skip
    try:
        wait_until(lambda: process.poll() is not None or mounted_at(mountpoint), 20, "nbdfuse to serve")
        if process.poll() is not None:
            raise AssertionError(f"nbdfuse: {(folder / 'peer.log').read_text()}")
        yield mountpoint / "disk.img"
    finally:
        subprocess.run(["umount", "-l", str(mountpoint)], check=False, stderr=subprocess.DEVNULL)
        with suppress(subprocess.TimeoutExpired):
            process.wait(10)
        process.kill()
        process.wait()


@contextmanager
def rig(engine: str | None) -> Iterator[tuple[FlakySource, list[Contender], Path]]:
    """Three images in one source, each seen through one contender; gone afterwards."""
    folder = Path(tempfile.mkdtemp(prefix="iohang-outage-"))
    try:
        real = folder / "real"
        real.mkdir()
        for key in ("iohang", "source", "peer"):
            prepare(real / f"{key}.img", folder)
        with ExitStack() as stack:
            flaky = stack.enter_context(
                FlakySource(real, folder / "src", folder / "trigger", folder / "flaky.log"),
            )
            options = [f"engine={engine}"] if engine else []
            mount = stack.enter_context(Mount(folder / "src", folder / "mnt", *options, log=folder / "mnt.log"))
            third = stack.enter_context(peer(folder / "src" / "peer.img", folder))
            stack.callback(flaky.heal)
            yield (
                flaky,
                [
                    Contender("iohang", "iohang-fuse (defaults)", mount.mountpoint / "iohang.img", real / "iohang.img"),
                    Contender("source", "the source itself", folder / "src" / "source.img", real / "source.img"),
                    Contender("peer", "nbdfuse + nbdkit retry-request (defaults)", third, real / "peer.img"),
                ],
                folder,
            )
    finally:
        shutil.rmtree(folder, ignore_errors=True)


# ---- the load


def prepare(image: Path, folder: Path) -> None:
    """Fill *image* with fio's blocks, so that every one of them can be checked."""
    command = ["fio", *verified(image), "--name=fill", f"--size={IMAGE_MIB}m", "--rw=write", "--end_fsync=1"]
    subprocess.run(command, check=True, cwd=folder, stdout=subprocess.DEVNULL)


def verified(image: Path) -> list[str]:
    """Arguments of fio that prefill, load and check have in common."""
    return [f"--filename={image}", f"--bs={BLOCK}", "--verify=crc32c", "--do_verify=0", "--verify_state_save=0",
            "--fallocate=none"]  # fmt: skip


def load(contender: Contender, folder: Path, seconds: float) -> subprocess.Popen[bytes]:
    """Start fio on the image; it logs each operation."""
    # libaio, as QEMU's aio=native: synchronous writes of one file would go one at a time through FUSE.
    with (
        (folder / f"{contender.key}.json").open("wb") as report,
        (folder / f"{contender.key}.err").open("wb") as errors,
    ):
        return subprocess.Popen(
        ["fio", *verified(contender.image), "--name=load", "--direct=1", "--rw=randrw", "--rwmixread=70", "--ioengine=libaio",
         "--iodepth=1", f"--numjobs={CLIENTS}", "--thread", f"--size={PART_MIB}m", f"--offset_increment={PART_MIB}m",
         f"--thinktime={PAUSE_MS}ms", "--time_based", f"--runtime={seconds + START_S:g}", "--exitall_on_error=1",
         "--group_reporting",
         f"--write_lat_log={contender.key}", "--log_offset=1", "--log_unix_epoch=1", "--per_job_logs=0",
         "--output-format=json"],
        cwd=folder, stdout=report, stderr=errors, start_new_session=True,
    )  # fmt: skip


def run(flaky: FlakySource, contenders: list[Contender], folder: Path, minutes: float) -> None:
    """Load, outages, and the end of both."""
    seconds = minutes * 60
    began_s = time.time() + START_S
    plan = [
        moment for begin_s, end_s in outages(seconds) for moment in ((begin_s, flaky_fails), (end_s, FlakySource.heal))
    ]
    processes = {contender.key: load(contender, folder, seconds) for contender in contenders}
    try:
        while any(process.poll() is None for process in processes.values()):
            now_s = time.time() - began_s
            if plan and now_s >= plan[0][0]:
                plan.pop(0)[1](flaky)
            for contender in contenders:
                watch(contender, folder, now_s)
            if now_s > seconds + GRACE_S:
                raise AssertionError("fio does not end")
            if sys.stderr.isatty():
                print(f"\r\033[K{now_s:5.0f} of {seconds:.0f} s", end="\r", file=sys.stderr, flush=True)
            time.sleep(0.02)
    finally:
        flaky.heal()
        for process in processes.values():
            process.terminate()
            with suppress(subprocess.TimeoutExpired):
                process.wait(30)  # what is held is answered now
            process.kill()
    for contender in contenders:
        collect(contender, folder, began_s)


def flaky_fails(flaky: FlakySource) -> None:
    """The outage: every read, write and fsync of an image."""
    flaky.fail("data *.img errno=EIO")


def watch(contender: Contender, folder: Path, now_s: float) -> None:
    """Note when fio is told of an error: it says so at once. It ends later, since closing syncs, which fails as well."""
    if contender.stopped_s is None and b"error" in (folder / f"{contender.key}.err").read_bytes():
        contender.stopped_s = now_s
        say(f"{now_s:5.1f} s: fio on {contender.name} has met an error")


def say(text: str) -> None:
    """What has happened, for whoever watches."""
    print(f"{text}", file=sys.stderr, flush=True)


def collect(contender: Contender, folder: Path, began_s: float) -> None:
    """What fio has logged and reported."""
    report = (folder / f"{contender.key}.json").read_text()
    error = json.loads(report[report.index("{") :])["jobs"][0]["error"]
    contender.error = os.strerror(error) if error else ""
    if not error:
        contender.stopped_s = None
    for path in sorted(folder.glob(f"{contender.key}_lat.*log")):
        for row in path.read_text().splitlines():
            at_ms, latency_ns, direction, _, offset = (int(word, 0) for word in row.split(",")[:5])
            contender.operations.append(Operation(at_ms / 1e3 - began_s, latency_ns / 1e9, direction == 1, offset))
    contender.operations.sort(key=lambda operation: operation.end_s)


# ---- the bytes


def check(contender: Contender, folder: Path) -> None:
    """Look in the source for the last acknowledged write of each block, and at every block's checksum."""
    latest = {operation.offset: operation for operation in contender.operations if operation.write}
    contender.looked_at = len(latest)
    # fio stamps a block just before it sends it, in the time of a clock that began with fio: what they have in common says when.
    delays_s = []
    with contender.beneath.open("rb") as file:
        for offset, operation in latest.items():
            file.seek(offset)
            magic, _, length, _, place, seconds, nanoseconds = _HEADER.unpack(file.read(_HEADER.size))
            if (magic, length, place) != (_MAGIC, BLOCK, offset):
                contender.wrong += BLOCK
            else:
                delays_s.append(operation.end_s - operation.latency_s - seconds - nanoseconds / 1e9)
    if delays_s:
        usual_s = statistics.median(delays_s)
        contender.wrong += BLOCK * sum(abs(delay_s - usual_s) > CLOCK_S for delay_s in delays_s)
    done = subprocess.run(
        ["fio", "--name=check", f"--filename={contender.beneath}", f"--bs={BLOCK}", f"--size={IMAGE_MIB}m", "--rw=read",
         "--verify=crc32c", "--verify_state_save=0", "--verify_fatal=0", "--continue_on_error=verify"],
        cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False,
    )  # fmt: skip
    contender.wrong += BLOCK * len(set(re.findall(r"verify: bad.*offset (\d+)", done.stdout)))


# ---- what is shown


@dataclass(frozen=True)
class Second:
    """What one second had."""

    at_s: int
    operations: int
    longest_s: float


def by_second(contender: Contender, seconds: float) -> list[Second]:
    """Each whole second of the load, up to the one in which it stopped."""
    last_s = min(seconds, contender.stopped_s or seconds)
    table = []
    for at_s in range(math.ceil(last_s)):
        here = [operation.latency_s for operation in contender.operations if at_s <= operation.end_s < at_s + 1]
        table.append(Second(at_s, len(here), max(here, default=math.nan)))
    return table


def verdict(contender: Contender) -> str:
    """One line about one of them."""
    return (
        f"{contender.name:42}{len(contender.operations):>12,}{contender.error or 'none':>22}"
        f"{f'{contender.stopped_s:.0f}' if contender.stopped_s else '-':>12}{contender.longest_s:>18.1f}"
        f"{contender.looked_at * BLOCK >> 20:>14,}{contender.wrong:>13,}"
    )


def save(path: Path, contenders: list[Contender], seconds: float) -> None:
    """The figures as CSV, one line a second, and all of it as JSON, beside the picture."""
    tables = {contender.key: by_second(contender, seconds) for contender in contenders}
    with path.with_suffix(".csv").open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["storage", "second", "operations", "longest_latency_s"])
        for key, table in tables.items():
            for row in table:
                latency = "" if math.isnan(row.longest_s) else f"{row.longest_s:.6f}"
                writer.writerow([key, row.at_s, row.operations, latency])
    summary: dict[str, Any] = {
        "seconds": seconds,
        "outages": [{"begin_s": begin_s, "end_s": end_s} for begin_s, end_s in outages(seconds)],
        "load": {"clients": CLIENTS, "pause_ms": PAUSE_MS, "block_bytes": BLOCK, "reads_percent": 70},
        "storages": {
            contender.key: {
                "name": contender.name,
                "operations": len(contender.operations),
                "error": contender.error or None,
                "stopped_s": contender.stopped_s and round(contender.stopped_s, 1),
                "longest_latency_s": round(contender.longest_s, 3),
                "acknowledged_bytes_compared": contender.looked_at * BLOCK,
                "wrong_bytes": contender.wrong,
            }
            for contender in contenders
        },
    }
    path.with_suffix(".json").write_text(json.dumps(summary, indent=2) + "\n")


def outages(seconds: float) -> list[tuple[float, float]]:
    """Begin and end of each, in seconds since the beginning."""
    return [(part * seconds, part * seconds + length_s) for part, length_s in OUTAGES]


LINE, STOP, BAND, GREY = "#0072B2", "#D55E00", "#E4E4E4", "#555555"
"""Blue and vermilion of Okabe and Ito, which everybody can tell apart, also in print."""


def draw(path: Path, contenders: list[Contender], seconds: float) -> None:
    """The picture: a row for each storage, throughput at the left and latency at the right."""
    import matplotlib as mpl  # noqa: PLC0415 - in a dependency group of its own, and needed for nothing else

    mpl.use("svg" if path.suffix == ".svg" else "agg")
    import matplotlib.pyplot as plt  # noqa: PLC0415 - after its backend has been chosen

    mpl.rcParams.update(
        {
            "svg.fonttype": "none",  # text stays text: searchable, and in the reader's own font
            "svg.hashsalt": "outage",  # the same figures give the same file
            "font.family": "sans-serif",
            "font.sans-serif": ["DejaVu Sans", "Verdana", "Arial"],
            "font.size": 10,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.edgecolor": GREY,
            "xtick.color": GREY,
            "ytick.color": GREY,
            "xtick.labelcolor": "black",
            "ytick.labelcolor": "black",
        }
    )
    figure, grid = plt.subplots(len(contenders), 2, figsize=(9.2, 6.0), sharex=True, sharey="col", facecolor="white")
    top = max(row.operations for contender in contenders for row in by_second(contender, seconds)) * 1.25
    for contender, (rate, latency) in zip(contenders, grid, strict=True):
        table = by_second(contender, seconds)
        whole = table[:-1] if contender.stopped_s else table  # the last one is a part of a second
        for axes in (rate, latency):
            for begin_s, end_s in outages(seconds):
                axes.axvspan(begin_s, end_s, color=BAND, linewidth=0, zorder=0)
            axes.tick_params(length=3)
        # Each figure stands in the middle of its second.
        rate.plot([row.at_s + 0.5 for row in whole], [row.operations for row in whole], color=LINE, linewidth=1.5)
        latency.plot(
            [row.at_s + 0.5 for row in table], [row.longest_s for row in table],
            color=LINE, linewidth=1, marker="o", markersize=2.2,
        )  # fmt: skip
        rate.set_title(contender.name, loc="left", fontsize=10.5, fontweight="bold")
        latency.set_title(outcome(contender), loc="left", fontsize=10, color=STOP if contender.error else "black")
        if contender.stopped_s:
            last = whole[-1].operations if whole else 0
            rate.plot(
                [contender.stopped_s],
                [last if not whole else 0],
                marker="X",
                markersize=9,
                color=STOP,
                clip_on=False,
                zorder=5,
            )
            rate.plot(
                [whole[-1].at_s + 0.5, contender.stopped_s] if whole else [], [last, 0] if whole else [],
                color=LINE, linewidth=1.5,
            )  # fmt: skip
            rate.annotate(
                "I/O error:\nconsumer stops", (contender.stopped_s, 0), xytext=(9, 9), textcoords="offset points",
                color=STOP, fontsize=10, linespacing=1.2,
            )  # fmt: skip
            latency.axvline(contender.stopped_s, color=STOP, linewidth=1.2, linestyle=(0, (4, 2)))
    for rate, latency in grid:
        rate.set_ylim(0, top)
        rate.set_ylabel("operations/s")
        latency.set_yscale("log")
        latency.set_ylim(5e-4, 120)
        latency.set_yticks([1e-3, 1e-2, 0.1, 1, 10], ["1 ms", "10 ms", "100 ms", "1 s", "10 s"])
        latency.minorticks_off()
        latency.grid(axis="y", color="#D0D0D0", linewidth=0.5)
        latency.set_axisbelow(True)
        latency.set_ylabel("longest latency\nin each second")
    for axes in grid[-1]:
        axes.set_xlim(0, seconds)
        axes.set_xticks(range(0, int(seconds) + 1, 20))
        axes.set_xlabel("time, s")
    for begin_s, end_s in outages(seconds):
        grid[0][0].text(
            (begin_s + end_s) / 2,
            top * 0.99,
            f"outage\n{end_s - begin_s:.0f} s",
            ha="center",
            va="top",
            fontsize=9,
            color=GREY,
        )
    figure.align_ylabels()
    figure.tight_layout(h_pad=1.4, w_pad=2.0)
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None, dpi=110)
    plt.close(figure)


def outcome(contender: Contender) -> str:
    """What became of it, in a few words, for the picture."""
    if contender.error:
        return f"stopped by an I/O error at {contender.stopped_s:.0f} s"
    return f"no error; longest pause {contender.longest_s:.0f} s"


def checked(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The arguments, or one line and the exit code 2."""
    arguments = parser.parse_args()
    seconds = arguments.minutes * 60
    # The second outage, and what follows it, have to fit in.
    if not outages(seconds)[1][1] + 10 <= seconds <= 3600:
        parser.exit(2, "outage: --minutes has to be between 1.3 and 60\n")
    missing = [name for name in ("fio", "nbdkit", "nbdfuse") if not shutil.which(name)]
    if os.geteuid() != 0 or not os.path.exists("/dev/fuse") or missing:
        parser.exit(
            2,
            f"outage: this needs root, /dev/fuse, fio, nbdkit and nbdfuse{'; missing: ' if missing else ''}{', '.join(missing)}\n",
        )
    if arguments.svg is not None:
        if arguments.svg.suffix not in {".svg", ".png"} or not arguments.svg.absolute().parent.is_dir():
            parser.exit(2, f"outage: --svg {arguments.svg}: a file FILE.svg in a directory that exists\n")
        try:
            import matplotlib as mpl  # noqa: F401, PLC0415 - before two minutes of load, not after them
        except ImportError:
            parser.exit(2, "outage: --svg needs matplotlib: pip install --group bench\n")
    return arguments


def main() -> int:
    """The run, the table, and the picture; 1 if iohang-fuse has let something through."""
    parser = argparse.ArgumentParser(description="One load on three storages while their source fails twice.")
    parser.add_argument("--svg", type=Path, metavar="FILE", help="the picture; CSV and JSON of the same name beside it")
    parser.add_argument("--minutes", type=float, default=MINUTES, metavar="M", help="of load in all (%(default)s)")
    parser.add_argument("--engine", choices=("uring", "threads"), help="of iohang-fuse; its own choice where not given")
    arguments = checked(parser)
    seconds = arguments.minutes * 60
    signal.signal(signal.SIGTERM, lambda number, _frame: sys.exit(128 + number))  # and so clean up
    try:
        with rig(arguments.engine) as (flaky, contenders, folder):
            run(flaky, contenders, folder, arguments.minutes)
            for contender in contenders:
                check(contender, folder)
    except KeyboardInterrupt:
        return 130
    except AssertionError as error:
        print(f"outage: {error}", file=sys.stderr)
        return 2
    spans = " and ".join(f"from {begin_s:.0f} to {end_s:.0f} s" for begin_s, end_s in outages(seconds))
    print(f"{seconds:.0f} s of load; the source failed {spans}\n")
    print(
        f"{'':42}{'operations':>12}{'error':>22}{'stopped, s':>12}{'longest pause, s':>18}{'compared, MiB':>14}{'bytes wrong':>13}"
    )
    for contender in contenders:
        print(verdict(contender))
    if arguments.svg is not None:
        save(arguments.svg, contenders, seconds)
        draw(arguments.svg, contenders, seconds)
    ours = contenders[0]
    return 1 if ours.error or ours.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
