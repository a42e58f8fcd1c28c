"""How fast the mount is, against everything else that one could mount: all contenders in one run, on the same file.

    contrib/benchmark [--source tmpfs ext4 fuse fuse-0.5ms flaky-0.5ms] [--rounds 5] [--seconds 2] [--guest] [--svg FILE]

Root is needed, /dev/fuse, Debian's packages (contrib/setup --bench installs them), and 256 MiB each of /dev/shm and of disk below
$TMPDIR (/var/tmp). A round is each workload with each contender once, one at a time; the order of contenders rotates by one
each round. Before each measurement the file is synced and read once, so that it is clean and in the page cache.

For each SOURCE the tables are: rates (the median of the rounds; beneath it the least and the most), the ratios that are asked
for beside their bounds, latencies, and the CPU time of the serving processes, with their children. fio's own CPU time is
nobody's. `fails EINVAL` is what the consumer was told, in place of a figure.

A contender runs as it comes. So of 32 requests 12 are on their way at once (the kernel's max_background) with all mounts but
iohang-fuse, whose own default is larger; and libfuse's passthrough_ll hands O_DIRECT on, so that on ext4 it is the disk that is
measured. There "SOURCE itself" is the page cache, which the other mounts are served from, and its second line is with O_DIRECT.
iohang-fuse may be faster than pyfuse3 with empty handlers, because it does not use all of pyfuse3's main loop (receiver.py).

The exit code is 0 if everything was measured, whatever the verdicts; 1 if it could not be, 130 if it was interrupted.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import signal
import subprocess
import sys
import time
from typing import Any

from contrib.bench.arguments import parse_arguments
from contrib.bench.chart import draw
from contrib.bench.contenders import FILE_BYTES, Running, Site, UnavailableError, contenders, cpu_s, require, source
from contrib.bench.figures import Results, report
from contrib.bench.plan import CONTENDERS, GUEST_WORKLOADS, Measurement, Workload, parse_fio, workloads_of
from contrib.guest.guest import Guest, GuestUnavailableError, Kernel, build

STARTING_S = 0.8
"""What a run of fio takes besides its measuring; for the first guess at the time left."""
GUEST_MIB = 128
GUEST_S = 15
"""For its boot and both streams; a guess as well."""
GUEST_TIMEOUT_S = 300


class Progress:
    """What is measured now, and how long it may yet take: one line on a terminal, one a workload elsewhere."""

    def __init__(self, total_s: float) -> None:
        self._left_s, self._done_s, self._begin_s = total_s, 0.0, time.monotonic()
        self._last = ""

    def show(self, where: str, what: str) -> None:
        """*where* is a source, round and workload; *what* the contender."""
        slowness = (time.monotonic() - self._begin_s) / self._done_s if self._done_s else 1
        left_s = math.ceil(self._left_s * slowness)
        left = f"{left_s // 60}:{left_s % 60:02} left"
        if sys.stderr.isatty():
            print(f"\r\033[K{where}, {what}; {left}"[:200], end="", file=sys.stderr, flush=True)
        elif where != self._last:
            print(f"{where}; {left}", file=sys.stderr, flush=True)
        self._last = where

    def done(self, guess_s: float) -> None:
        """Something that had been guessed at *guess_s* seconds is over."""
        self._left_s -= guess_s
        self._done_s += guess_s

    def clear(self) -> None:
        """Before something else is printed."""
        if sys.stderr.isatty():
            print("\r\033[K", end="", file=sys.stderr, flush=True)


def run_fio(site: Site, contender: Running, workload: Workload, round_number: int, seconds: float) -> Measurement:
    """One run of fio, and the server's CPU time meanwhile."""
    command = workload.fio(contender.file, FILE_BYTES, seconds, direct=contender.direct)
    before_s = cpu_s(contender.pid)
    # A mount that does not answer would hold up everything else for ever.
    done = subprocess.run(
        command, cwd=site.scratch, capture_output=True, text=True, check=False, timeout=120 + 10 * seconds
    )
    used_s = cpu_s(contender.pid) - before_s
    try:
        figures = parse_fio(done.stdout)
    except ValueError:
        raise UnavailableError(f"fio: {(done.stderr or done.stdout).strip()[-200:]}") from None
    return Measurement(site.name, workload.name, contender.name, round_number, cpu_s=used_s, **figures)


def run_guest(site: Site, contender: Running, kernel: Kernel, round_number: int) -> list[Measurement]:
    """A guest that boots with the file as its disk, writes and reads; its CPU is emulated, which slows all alike."""
    cpu: list[float] = [cpu_s(contender.pid)]
    guest = Guest(kernel, contender.file, log=site.scratch / "guest.log", dd_mib=GUEST_MIB)
    try:
        with guest:
            for count in (1, 2):
                guest.wait_for(lambda count=count: len(guest.streams) >= count, GUEST_TIMEOUT_S, "the guest's dd")  # type: ignore[misc]
                cpu.append(cpu_s(contender.pid))
    except (RuntimeError, TimeoutError):  # QEMU cannot use such a file, or ended
        return [
            Measurement(site.name, workload.name, contender.name, round_number, error="QEMU")
            for workload in GUEST_WORKLOADS
        ]
    measured = []
    for index, (workload, stream) in enumerate(zip(GUEST_WORKLOADS, guest.streams, strict=False)):
        figures: dict[str, Any] = {"error": "EIO"}
        if stream.outcome == "ok":
            rate = stream.length_bytes / max(stream.duration_s, 0.01)  # the guest's clock has hundredths
            figures = {
                "bytes": stream.length_bytes,
                "duration_s": stream.duration_s,
                "bytes_per_s": rate,
                "cpu_s": cpu[index + 1] - cpu[index],
            }
        measured.append(Measurement(site.name, workload.name, contender.name, round_number, **figures))
    return measured


class Benchmark:
    """What was asked for on the command line, and what has been measured so far."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self._arguments = arguments
        self._kernel = build() if arguments.guest else None
        self.measurements: list[Measurement] = []
        guesses = [self._fio_guess_s * len(self.workloads(name)) + self._guest_guess_s for name in arguments.source]
        self._progress = Progress(arguments.rounds * len(arguments.contender) * sum(guesses))

    @property
    def _fio_guess_s(self) -> float:
        return float(self._arguments.seconds) + STARTING_S

    @property
    def _guest_guess_s(self) -> float:
        return GUEST_S if self._kernel else 0

    def workloads(self, source_name: str) -> list[Workload]:
        """Those of fio on this SOURCE, as far as they were asked for."""
        wanted = self._arguments.workload
        return [one for one in workloads_of(source_name) if not wanted or one.name in wanted]

    def measure(self, source_name: str) -> str:
        """All rounds on one SOURCE; returns its title. What was measured before an interruption stays."""
        arguments = self._arguments
        self._progress.show(f"{source_name}: preparing", "")
        with source(source_name) as site, contenders(site, arguments.contender) as running:
            for absent in (one for one in running if one.unavailable):
                self._progress.clear()
                print(f"{CONTENDERS[absent.name]} is not there: {absent.unavailable}", file=sys.stderr)
            for round_number in range(arguments.rounds):
                turn = round_number % len(running)
                order = running[turn:] + running[:turn]
                for workload in self.workloads(source_name):
                    where = f"{source_name}, round {round_number + 1} of {arguments.rounds}, {workload.title}"
                    for contender in order:
                        self._progress.show(where, CONTENDERS[contender.name])
                        self._measure_fio(site, contender, workload, round_number)
                if self._kernel:
                    where = f"{source_name}, round {round_number + 1} of {arguments.rounds}, guest"
                    for contender in order:
                        self._progress.show(where, CONTENDERS[contender.name])
                        self._measure_guest(site, contender, self._kernel, round_number)
            self._progress.clear()
            return site.title

    def _measure_fio(self, site: Site, contender: Running, workload: Workload, round_number: int) -> None:
        if contender.unavailable:
            absent = Measurement(site.name, workload.name, contender.name, round_number, error="to start")
            self.measurements.append(absent)
        else:
            site.warm()
            self.measurements.append(run_fio(site, contender, workload, round_number, self._arguments.seconds))
        self._progress.done(self._fio_guess_s)

    def _measure_guest(self, site: Site, contender: Running, kernel: Kernel, round_number: int) -> None:
        if not contender.unavailable:
            site.warm()
            self.measurements += run_guest(site, contender, kernel, round_number)
        self._progress.done(self._guest_guess_s)

    def results(self, source_name: str) -> Results:
        """What was measured on one SOURCE."""
        extra = GUEST_WORKLOADS if self._kernel else ()
        chosen = [one for one in self.measurements if one.source == source_name]
        return Results(chosen, [*self.workloads(source_name), *extra])


def machine() -> dict[str, Any]:
    """Where it was measured."""
    kernel = platform.release().partition("-")[0]
    return {"cpus": os.cpu_count(), "kernel": kernel, "python": platform.python_version()}


def machine_words() -> str:
    """The same in words."""
    return "{cpus} CPUs, Linux {kernel}, Python {python}".format(**machine())


def run(arguments: argparse.Namespace) -> None:
    """Measures, prints, and writes both files."""
    require()
    for file in (arguments.json, arguments.svg):
        file.parent.mkdir(parents=True, exist_ok=True)
    benchmark = Benchmark(arguments)
    shown: dict[str, Results] = {}
    settings = {"rounds": arguments.rounds, "seconds": arguments.seconds, "file_bytes": FILE_BYTES}
    about = f"{arguments.rounds} x {arguments.seconds:g} s, file of {FILE_BYTES >> 20} MiB, {machine_words()}"
    print(about)
    for name in arguments.source:
        title = benchmark.measure(name)
        shown[title] = benchmark.results(name)
        # The bounds are for ext4; on another file system the same table is without them.
        bounded = name == "ext4" and title.startswith("ext4")
        print(f"\n{report(title, shown[title], bounded=bounded, network=name.endswith('-0.5ms'))}", flush=True)
        # At once: the next SOURCE may be interrupted.
        raw = {"machine": machine(), **settings, "measurements": [one.as_json() for one in benchmark.measurements]}
        arguments.json.write_text(json.dumps(raw, indent=1) + "\n")
    draw(shown, arguments.svg, about)
    print(f"\n{arguments.svg}: the picture\n{arguments.json}: every single measurement")


def main() -> int:
    """The command line."""
    arguments = parse_arguments(sys.argv[1:])
    signal.signal(signal.SIGTERM, lambda number, _frame: sys.exit(128 + number))  # and so clean up
    try:
        run(arguments)
    except KeyboardInterrupt:
        print("\nbenchmark: interrupted; all is unmounted again", file=sys.stderr)
        return 130
    except (UnavailableError, GuestUnavailableError, OSError, subprocess.SubprocessError) as error:
        print(f"\nbenchmark: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
