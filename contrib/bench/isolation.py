"""What a sick image costs a healthy one: the real thing, mounted over the flaky source (P7 in docs/semantics.rst).

    python -m contrib.bench.isolation [--engine uring|threads] [--parts held,waiting,blocked] [--rounds 5] [--seconds 3]

Root is needed, /dev/fuse, and fio. Image A is the sick one, image B the healthy one, both opened O_DIRECT unless a line says
otherwise. A minute or two for each part and engine; the exit code is 1 if a bound is not met.

held     1,000 reads and writes are held on A, at distinct offsets. How fast is B, against B while A is well? The two take turns
         on one mount, a fresh ratio each round; what counts is their median, since a machine with neighbours has its moods.
waiting  10,000 requests are held on A, by native AIO. What does the server cost meanwhile, and how soon are all of them
         answered when the source is well again, and in which order? *resumed after* counts from the end of the trouble: it is
         the timer that notices, so it is up to an interval (5 s). The bound is on *all within*, from the first answer to the
         last.
blocked  requests on A go into the source and do not come back, as on a `hard` mount: more of them than an image may have there
         (rehandle.SHARE, 64), so that the rest wait in front; and on four images at once. With engine=threads, of direct writes to
         one file one alone is inside: the source is a FUSE file system, whose kernel keeps the file's lock for it.

Beside B stand `ls`, `df`, `stat`, and open and close of another file, in milliseconds, while A is well and while it is not.

About the order: *places* is how far from its place in the order of submission a request is answered. What a success sets free
goes by age, and up to rehandle.SHARE attempts are under way at once and end in any order, which explains the median. The few
that were just being tried when the source became well wait for the next tick (at most the gate's 4, and
what came back behind them): they explain the maximum.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from iohang_fuse.presence import mount_table
from tests.exerciser import Aio, AioRequest
from tests.harness import FlakySource, Mount, wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from contextlib import AbstractContextManager

MIB = 1 << 20
BLOCK = 4096
ENGINES = ("uring", "threads")
PARTS = ("held", "waiting", "blocked")
INTERVAL_S = 5  # the default, and what the bound on CPU time is about

HELD = 1000
MANY = 10_000
MAX_BACKGROUND = 16384  # above MANY, so that all of them are the server's to hold
SICK_REQUESTS = 128  # that go to A where attempts block: above 64, and above any share
WAITING_TICKS = 4  # of the timer, at least, while CPU time is counted

SETTLE_S = 2.0  # after the dump: writing its 10,000 lines costs more CPU than all the waiting

HELD_BOUND, BLOCKED_BOUND = 0.9, 0.8  # of B's own throughput
CPU_BOUND = 2.0  # % of a core
RESUME_BOUND_S = 2.0

NOBODY = "data nobody.img errno=EIO"
"""In force while A is well: the source, which is in Python, takes longer for everything while there is a rule to be looked at."""

WORKLOADS = (("randread", 16), ("randwrite", 16), ("randread", 1))  # what B does, and how much of it at once
B_MIB = 64
SICK = tuple(f"a{number}.img" for number in range(4))

MEMORY = "/dev/shm"  # noqa: S108 - a tmpfs, and mkdtemp makes the name
_CONNECTIONS = Path("/sys/fs/fuse/connections")
_TICKS_PER_S = os.sysconf("SC_CLK_TCK")


Latencies = dict[str, list[float]]
Wait = Callable[[], None]  # for the end of a consumer


# ---- the site


@dataclass
class Site:
    """One mount over a flaky source, and what fails beneath it."""

    flaky: FlakySource
    mount: Mount
    folder: Path

    def at(self, name: str) -> Path:
        """The file *name* as consumers see it."""
        return self.mount.mountpoint / name

    def waiting(self, server: FlakySource | Mount) -> int:
        """Requests that *server* has not answered, as the kernel counts them: no question to the server."""
        return int((_CONNECTIONS / str(_minor(server.mountpoint)) / "waiting").read_text())

    def held(self) -> int:
        """Requests that are held, from the dump that SIGUSR1 gives."""
        dumps = self.mount.log_text().count("images are open")
        os.kill(self.mount.pid, signal.SIGUSR1)

        def dump() -> str:
            """It is complete when the threads' stacks have come, its last part."""
            before, _, last = self.mount.log_text().rpartition("images are open")
            return last if before.count("images are open") >= dumps and re.search(r"thread \d+:", last) else ""

        wait_until(dump, 60, "the dump")
        return dump().count(", held,")

    def cpu_s(self) -> float:
        """CPU time that the server's process has had, in seconds; exact to 1/SC_CLK_TCK (10 ms)."""
        fields = Path(f"/proc/{self.mount.pid}/stat").read_text().rpartition(") ")[2].split()
        return (int(fields[11]) + int(fields[12])) / _TICKS_PER_S  # utime and stime of proc(5), 14 and 15 from pid = 1


def _minor(mountpoint: Path) -> int:
    return next(entry.device_minor for entry in mount_table() if entry.mountpoint == str(mountpoint))


@contextmanager
def site(engine: str, **images: int) -> Iterator[Site]:
    """Mounted, with *images* of so many MiB, and gone afterwards."""
    # In memory where there is room: the moods of a disk are no part of this.
    folder = Path(tempfile.mkdtemp(prefix="iohang-isolation-", dir=MEMORY if os.path.isdir(MEMORY) else None))
    try:
        real = folder / "real"
        real.mkdir()
        for name, mib in images.items():
            with (real / f"{name}.img").open("wb") as file:
                for _ in range(mib):
                    file.write(os.urandom(MIB))
        for number in range(10):
            (real / f"other{number}").write_bytes(bytes(BLOCK))
        options = [
            "timeout=600",  # nobody is given up
            f"interval={INTERVAL_S}",
            f"max_background={MAX_BACKGROUND}",
            "attr_timeout=0",  # so that each stat and open is the server's to answer, and none the kernel's
            f"engine={engine}",
        ]
        with (
            FlakySource(real, folder / "src", folder / "trigger", folder / "flaky.log") as flaky,
            Mount(folder / "src", folder / "mnt", *options, log=folder / "mnt.log") as mount,
        ):
            try:
                yield Site(flaky, mount, folder)
            finally:
                flaky.heal()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


# ---- consumers


def fio(*arguments: str, folder: Path) -> subprocess.Popen[str]:
    """Start fio."""
    return subprocess.Popen(
        ["fio", "--output-format=json", "--fallocate=none", *arguments],
        cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
    )  # fmt: skip


def throughput(where: Site, workload: str, depth: int, seconds: float) -> float:
    """4k operations a second on B. Where B waits for A, the trouble is ended after a while, and the figure is low."""
    process = fio(
        "--name=b", f"--filename={where.at('b.img')}", f"--size={B_MIB}m", f"--rw={workload}", "--bs=4k", "--direct=1",
        "--ioengine=libaio", f"--iodepth={depth}", "--time_based", f"--runtime={seconds}", "--norandommap", folder=where.folder,
    )  # fmt: skip
    try:
        out, _ = process.communicate(timeout=seconds + 20)
    except subprocess.TimeoutExpired:
        where.flaky.heal()
        out, _ = process.communicate(timeout=120)
    except BaseException:
        process.kill()
        raise
    job = json.loads(out[out.index("{") :])["jobs"][0]
    if job["error"]:
        raise AssertionError(f"B met an error: {os.strerror(job['error'])}")
    return float(job["read" if workload == "randread" else "write"]["iops"])


@contextmanager
def trouble(where: Site, rule: str, start: Callable[[], Wait], ready: Callable[[], object]) -> Iterator[None]:
    """*rule* is in force and a consumer that *start* has started is at work on A, from the moment when *ready*."""
    where.flaky.fail(rule)
    wait: Wait = nothing
    try:
        wait = start()
        wait_until(ready, 60, f"A's requests to be in trouble ({rule})")
        yield
    finally:
        where.flaky.heal()
        wait()


def nothing() -> None:
    """There is nobody to wait for."""


def direct(where: Site, requests: int, *images: str, workload: str = "randrw") -> Wait:
    """Start fio with so many requests at once on each of *images*, at distinct offsets, past the page cache."""
    arguments = [
        "--name=global", f"--size={requests * BLOCK}", f"--rw={workload}", "--bs=4k", "--direct=1", "--ioengine=libaio",
        f"--iodepth={requests}", f"--iodepth_batch_submit={requests}", f"--number_ios={requests}",
    ]  # fmt: skip
    for name in images:
        arguments += [f"--name={name}", f"--filename={where.at(name)}"]
    process = fio(*arguments, folder=where.folder)

    def wait() -> None:
        with suppress(subprocess.TimeoutExpired):
            process.communicate(timeout=60)
        process.kill()

    return wait


def buffered(where: Site, requests: int, image: str) -> Wait:
    """Start so many threads with one read each, through the page cache and so far apart that no readahead meets.

    They share one descriptor: whoever opens a file again that has a page under way waits for that page, in the kernel.
    """
    fd = os.open(where.at(image), os.O_RDONLY)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
    step = os.fstat(fd).st_size // requests // BLOCK * BLOCK
    threads = [
        threading.Thread(target=os.pread, args=(fd, BLOCK, number * step), daemon=True) for number in range(requests)
    ]
    for thread in threads:
        thread.start()

    def wait() -> None:
        for thread in threads:
            thread.join(60)
        os.close(fd)

    return wait


# ---- tables


def line(what: str, value: str, bound: str, *, met: bool) -> bool:
    """Print one figure against its bound."""
    print(f"  {what:<50}{value:>24}   {bound:<14}{'met' if met else 'NOT met'}", flush=True)
    return met


def note(what: str, value: str) -> None:
    """Print one figure that has no bound."""
    print(f"  {what:<50}{value:>24}", flush=True)


def progress(text: str) -> None:
    """On a terminal, what is going on; it is overwritten by what comes next."""
    if sys.stderr.isatty():
        print(f"\r\033[K  {text}", end="\r", file=sys.stderr, flush=True)


def metadata(where: Site, seconds: float, into: Latencies) -> None:
    """Milliseconds of each call by its name, in turn for so many seconds."""

    def open_and_close() -> None:
        os.close(os.open(where.at("other3"), os.O_RDWR))

    calls: dict[str, Callable[[], object]] = {
        "ls": lambda: os.listdir(where.mount.mountpoint),
        "df": lambda: os.statvfs(where.mount.mountpoint),
        "stat": lambda: os.stat(where.at("other2")),
        "open+close": open_and_close,
    }
    end_s = time.monotonic() + seconds
    while time.monotonic() < end_s:
        for name, call in calls.items():
            began_s = time.perf_counter()
            call()
            into.setdefault(name, []).append((time.perf_counter() - began_s) * 1e3)


def show_metadata(well: Latencies, sick: Latencies) -> None:
    """Median and longest of each call."""
    for name in well:
        words = [f"{statistics.median(each[name]):.1f}, {max(each[name]):.1f}" for each in (sick, well)]
        note(f"{name}, ms: median, max (while A is well)", f"{words[0]} ({words[1]})")


def compare(
    where: Site, what: str, bound: float, rounds: int, seconds: float, begin: Callable[[], AbstractContextManager[None]]
) -> list[bool]:
    """B's throughput with trouble on A against B's without, round by round, and the metadata calls beside it.

    *begin* gives a context manager, in which A is in trouble.
    """
    ratios: list[list[float]] = [[] for _ in WORKLOADS]
    own: list[list[float]] = [[] for _ in WORKLOADS]
    well: Latencies = {}
    sick: Latencies = {}
    for number in range(rounds):
        figures: dict[bool, list[float]] = {}
        # Whoever is first in one round is second in the next: neither has the warmer machine.
        for troubled in (False, True) if number % 2 == 0 else (True, False):
            progress(f"{what}: round {number + 1} of {rounds}, A is {'in trouble' if troubled else 'well'}")
            if troubled:
                with begin():
                    figures[True] = [throughput(where, *workload, seconds) for workload in WORKLOADS]
                    metadata(where, 0.5, sick)
            else:
                where.flaky.fail(NOBODY)
                figures[False] = [throughput(where, *workload, seconds) for workload in WORKLOADS]
                metadata(where, 0.5, well)
        for well_s, sick_s, its_own, its_ratios in zip(figures[False], figures[True], own, ratios, strict=True):
            its_own.append(well_s)
            its_ratios.append(sick_s / well_s)
    print(f"  {what}")
    fine = []
    for (workload, depth), its_own, each in zip(WORKLOADS, own, ratios, strict=True):
        middle = statistics.median(each)
        value = f"{middle:.2f} ({min(each):.2f} to {max(each):.2f})"
        name = f"B, 4k {workload} by {depth}, against its {statistics.median(its_own):,.0f}/s"
        fine.append(line(name, value, f">= {bound}", met=middle >= bound))
    show_metadata(well, sick)
    return fine


# ---- the parts


def held(engine: str, rounds: int, seconds: float) -> list[bool]:
    """1,000 requests held on A."""
    with site(engine, a0=HELD * BLOCK // MIB + 1, b=B_MIB) as where:

        def ready() -> bool:
            return where.waiting(where.mount) >= HELD and where.held() >= HELD

        def begin() -> AbstractContextManager[None]:
            return trouble(where, "data a0.img errno=EIO", lambda: direct(where, HELD, "a0.img"), ready)

        return compare(where, f"{HELD:,} held on A", HELD_BOUND, rounds, seconds, begin)


def blocked(engine: str, rounds: int, seconds: float) -> list[bool]:
    """Attempts that do not return: on one image direct, on one image buffered, on four images.

    Of direct writes to one file, the kernel lets one at a time into a FUSE source: the others wait for the inode's lock.
    """
    count = SICK_REQUESTS
    fine = []
    with site(engine, b=B_MIB, **{Path(name).stem: 8 for name in SICK}) as where:
        for what, start, images in (
            (f"{count} reads sent to A, which blocks", lambda: direct(where, count, SICK[0], workload="randread"), 1),
            (f"{count} writes sent to A, which blocks", lambda: direct(where, count, SICK[0], workload="randwrite"), 1),
            (f"{count} buffered reads sent to A, which blocks", lambda: buffered(where, count, SICK[0]), 1),
            (
                f"{count} reads sent to each of 4 that block",
                lambda: direct(where, count, *SICK, workload="randread"),
                4,
            ),
        ):
            inside: list[int] = []

            @contextmanager
            def begin(
                start: Callable[[], Wait] = start, total: int = images * count, seen: list[int] = inside
            ) -> Iterator[None]:
                with trouble(where, "data a?.img hang", start, lambda: where.waiting(where.mount) >= total):
                    yield
                    seen.append(where.waiting(where.flaky))

            fine += compare(where, what, BLOCKED_BOUND, rounds, seconds, begin)
            # How many of an image may be inside is the server's decision: see rehandle.SHARE.
            note("attempts inside the source", f"{min(inside)}")
    return fine


class Client(threading.Thread):
    """One consumer with so many requests at once on *path*. They are all of one kind, each 4 KiB, at distinct offsets."""

    def __init__(self, path: Path, kind: str, count: int) -> None:
        super().__init__(daemon=True)
        self._path = path
        area = memoryview(mmap.mmap(-1, count * BLOCK))
        self.requests = [
            AioRequest(kind, -1, number * BLOCK, area[number * BLOCK : (number + 1) * BLOCK]) for number in range(count)
        ]
        self.order: list[int] = []
        self.first_s = self.last_s = 0.0

    def run(self) -> None:
        """Submit, and wait for all."""
        aio = Aio(len(self.requests))
        fd = os.open(self._path, os.O_RDWR | os.O_DIRECT)
        try:
            for request in self.requests:
                request.fd = fd
            aio.submit(self.requests, [len(self.requests)])
            first = aio.wait(self.requests, 1)
            self.first_s = time.monotonic()
            self.order = first + aio.wait(self.requests, len(self.requests) - 1)
            self.last_s = time.monotonic()
        finally:
            os.close(fd)
            aio.close()


def departures(order: Sequence[int]) -> list[int]:
    """How many places from that of its submission each request was answered."""
    place = {number: at for at, number in enumerate(sorted(order))}
    return [abs(at - place[number]) for at, number in enumerate(order)]


def waiting(engine: str, kind: str, ticks: int = WAITING_TICKS) -> list[bool]:
    """10,000 requests held on A: what they cost, and how they are answered."""
    fine = []
    with site(engine, a0=MANY * BLOCK // MIB + 1) as where:
        where.flaky.fail("data a0.img errno=EIO")
        client = Client(where.at("a0.img"), kind, MANY)
        progress(f"{MANY:,} {kind}s on A: until all are held")
        submitted_s = time.monotonic()
        client.start()
        try:
            wait_until(lambda: where.waiting(where.mount) >= MANY and where.held() >= MANY, 120, "all to be held")
            held_after_s = time.monotonic() - submitted_s
            time.sleep(SETTLE_S)
            window_s = ticks * INTERVAL_S + 1
            cpu_s, began_s = where.cpu_s(), time.monotonic()
            while (rest_s := began_s + window_s - time.monotonic()) > 0:
                progress(f"{MANY:,} {kind}s on A: {rest_s:.0f} s more of waiting")
                time.sleep(min(1, rest_s))
            cpu_percent = (where.cpu_s() - cpu_s) / (time.monotonic() - began_s) * 100
        finally:
            where.flaky.heal()
            healed_s = time.monotonic()
            client.join(120)
        assert not client.is_alive(), "A's requests are not answered"
        wrong = sum(request.result != BLOCK for request in client.requests)
    print(f"  {MANY:,} {kind}s held on A")
    note("all held after, s", f"{held_after_s:.1f}")
    fine.append(
        line(
            "CPU of the server while waiting, % of a core",
            f"{cpu_percent:.2f}",
            f"< {CPU_BOUND}",
            met=cpu_percent < CPU_BOUND,
        )
    )
    note("resumed after, s", f"{client.first_s - healed_s:.1f}")
    took_s = client.last_s - client.first_s
    fine.append(line("all within, s", f"{took_s:.2f}", f"<= {RESUME_BOUND_S}", met=took_s <= RESUME_BOUND_S))
    fine.append(line("answered with an error", f"{wrong}", "0", met=not wrong))
    away = departures(client.order)
    note("places from its own: median, max", f"{statistics.median(away):.0f}, {max(away)}")
    return fine


def checked(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The arguments, or one line and the exit code 2."""
    arguments = parser.parse_args()
    parts = arguments.parts.split(",")
    if unknown := [part for part in parts if part not in PARTS]:
        parser.exit(2, f"isolation: no part {', '.join(unknown)!r}; there are: {', '.join(PARTS)}\n")
    if arguments.rounds < 1 or not 0.5 <= arguments.seconds <= 60:
        parser.exit(2, "isolation: --rounds has to be at least 1, and --seconds from 0.5 to 60\n")
    if os.geteuid() != 0 or not os.path.exists("/dev/fuse") or not shutil.which("fio"):
        parser.exit(2, "isolation: this needs root, /dev/fuse and fio\n")
    return arguments


def main() -> int:
    """All parts on all engines, one after the other; 1 if a bound is not met."""
    parser = argparse.ArgumentParser(description="What a sick image costs a healthy one.")
    parser.add_argument("--engine", choices=ENGINES, help="one engine; otherwise each of them")
    parser.add_argument("--parts", default=",".join(PARTS), metavar="PART[,PART]", help="of %(default)s")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="of each comparison (%(default)s)")
    parser.add_argument("--seconds", type=float, default=3, metavar="S", help="of each figure of B (%(default)s)")
    arguments = checked(parser)
    parts = arguments.parts.split(",")
    signal.signal(signal.SIGTERM, lambda number, _frame: sys.exit(128 + number))  # and so clean up
    fine: list[bool] = []
    try:
        for engine in [arguments.engine] if arguments.engine else ENGINES:
            print(f"engine={engine}")
            if "held" in parts:
                fine += held(engine, arguments.rounds, arguments.seconds)
            if "waiting" in parts:
                for kind in ("write", "read"):
                    fine += waiting(engine, kind)
            if "blocked" in parts:
                fine += blocked(engine, arguments.rounds, arguments.seconds)
    except KeyboardInterrupt:
        return 130
    except AssertionError as error:
        print(f"isolation: {error}", file=sys.stderr)
        return 2
    print(f"{sum(fine)} of {len(fine)} bounds are met")
    return 0 if all(fine) else 1


if __name__ == "__main__":
    sys.exit(main())
