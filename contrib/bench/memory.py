"""How much memory the server takes while it holds requests, and while the write log fills: the real thing, mounted.

    python -m contrib.bench.memory [--held-limit 1G] [--write-log 64M]

Root is needed, /dev/fuse, and fio; some gigabytes of memory and of disk below $TMPDIR. It takes a few minutes.

The first table: fio writes 1 MiB at a time, past the page cache, on a source that fails; so many requests are held (and beyond
`held_limit` answered). The second: somebody writes and never syncs, on a source whose fsyncs fail, until the server lets them
wait. (Were its fsyncs not to return, FUSE itself would let them wait at half the log: it locks the file for that.)

In each line a server of its own. *bound* is held_limit + write_log + 300 MiB, in the second table without held_limit, and the
server's peak (VmHWM) is below it or is not. The exit code is 1 if it is not.

Where a pipe cannot hold a whole request, libfuse keeps a second copy of each that is held, and half as much is held.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tests.harness import FlakySource, Mount, wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator

MIB = 1 << 20
HELD = (0, 100, 250, 500, 1000, 2000)
WRITES = (MIB, 64 << 10, 4096)
REST_BYTES = 300 * MIB
"""What the server may take besides: the interpreter, threads, tasks, and what the allocator keeps."""


@dataclass(frozen=True)
class Sizes:
    """The limits of the mounts, as options and in bytes."""

    held_limit: str
    write_log: str

    @property
    def bound(self) -> int:
        """In bytes."""
        return size(self.held_limit) + size(self.write_log) + REST_BYTES


def size(text: str) -> int:
    """Bytes of `64M`, `1G`."""
    units = {"K": 10, "M": 20, "G": 30}
    return int(text[:-1]) << units[text[-1]] if text[-1] in units else int(text)


@dataclass
class Rig:
    """One mount over a flaky source, with an image that is as large as it will be: growing goes one write at a time."""

    flaky: FlakySource
    mount: Mount
    folder: Path

    @property
    def image(self) -> Path:
        """As consumers see it."""
        return self.mount.mountpoint / "vm.img"

    def memory(self, what: str) -> int:
        """`VmRSS` or `VmHWM` of the server, in bytes."""
        status = Path(f"/proc/{self.mount.pid}/status").read_text()
        return int(re.findall(rf"^{what}:\s+(\d+) kB$", status, re.MULTILINE)[0]) << 10

    def held(self) -> tuple[int, int]:
        """How many requests are held, and how many bytes of data they have, from the dump that SIGUSR1 gives."""
        dumps = self.mount.log_text().count("images are open")
        os.kill(self.mount.pid, signal.SIGUSR1)

        def dump() -> str:
            """It is complete when the threads' stacks have come, its last part."""
            before, _, last = self.mount.log_text().rpartition("images are open")
            return last if before.count("images are open") >= dumps and re.search(r"thread \d+:", last) else ""

        wait_until(dump, 60, "the dump")
        lengths = re.findall(r"write of (\d+) bytes at .*, held,", dump())
        return len(lengths), sum(map(int, lengths))


@contextmanager
def rig(sizes: Sizes, image_bytes: int) -> Iterator[Rig]:
    """Mounted, and gone afterwards."""
    folder = Path(tempfile.mkdtemp(prefix="iohang-memory-"))
    try:
        (folder / "real").mkdir()
        with (folder / "real" / "vm.img").open("wb") as file:
            file.truncate(image_bytes)
        options = ["timeout=inf", "interval=2", f"held_limit={sizes.held_limit}", f"write_log={sizes.write_log}"]
        with (
            FlakySource(folder / "real", folder / "src", folder / "trigger", folder / "flaky.log") as flaky,
            Mount(folder / "src", folder / "mnt", *options, log=folder / "mnt.log") as mount,
        ):
            try:
                yield Rig(flaky, mount, folder)
            finally:
                flaky.heal()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def settled(read: Rig, count: int, timeout_s: float = 180) -> tuple[int, int]:
    """Requests and bytes held, once there are *count*, or it has been the same for three looks."""
    looks: list[tuple[int, int]] = []
    end_s = time.monotonic() + timeout_s
    while time.monotonic() < end_s:
        looks.append(read.held())
        if looks[-1][0] >= count or (looks[-1][0] and len(looks) > 2 and len({*looks[-3:]}) == 1):
            break
        time.sleep(1)
    return looks[-1]


def hold(sizes: Sizes, count: int) -> bool:
    """One line of the first table. Returns whether the bound holds."""
    with rig(sizes, max(count, 1) * MIB) as site:
        held, data, passed_on = 0, 0, 0
        if count:
            site.flaky.fail("write vm.img errno=EIO")
            fio = subprocess.Popen(
                ["fio", "--name=held", f"--filename={site.image}", "--rw=write", "--bs=1m", f"--size={count}m",
                 "--direct=1", "--ioengine=libaio", f"--iodepth={count}", f"--iodepth_batch_submit={count}",
                 f"--number_ios={count}", "--fallocate=none", "--continue_on_error=io"],
                cwd=site.folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            )  # fmt: skip
            try:
                held, data = settled(site, count)
                passed_on = count - held
                rss = site.memory("VmRSS")
            finally:
                site.flaky.heal()
                fio.wait(300)
        else:
            rss = site.memory("VmRSS")
        wait_until(lambda: not site.held()[0], 60, "nothing to be held")
        peak, after = site.memory("VmHWM"), site.memory("VmRSS")
    fine = peak <= sizes.bound
    numbers = (
        f"{count:>8,}{held:>8,}{passed_on:>11,}{data // MIB:>12,}{rss // MIB:>8,}{peak // MIB:>8,}{after // MIB:>8,}"
    )
    print(f"{numbers}{sizes.bound // MIB:>9,}  {'holds' if fine else 'DOES NOT HOLD'}", flush=True)
    return fine


class Writer(threading.Thread):
    """Somebody who writes one block after the other, buffered, and never syncs."""

    def __init__(self, image: Path, block: int, total: int) -> None:
        super().__init__(daemon=True)
        self._image, self._block, self._total = image, block, total
        self.written = 0
        self.enough = False

    def run(self) -> None:
        """Until told that it is enough."""
        data = os.urandom(self._block)
        fd = os.open(self._image, os.O_WRONLY)
        try:
            while not self.enough and self.written < self._total:
                self.written += os.write(fd, data)
        finally:
            os.close(fd)


def fill(sizes: Sizes, block: int) -> bool:
    """Some lines of the second table. Returns whether the bound holds."""
    limit = size(sizes.write_log)
    with rig(sizes, 4 * limit) as site:
        site.flaky.fail("fsync vm.img errno=EIO")
        writer = Writer(site.image, block, 4 * limit)
        lines = [f"{'':>10}{0:>9}{site.memory('VmRSS') // MIB:>8,}"]
        writer.start()
        try:
            steps = [limit * quarter // 4 for quarter in (1, 2, 3)]
            last, since_s = 0, time.monotonic()
            while writer.is_alive():
                time.sleep(0.01)
                written = writer.written
                if steps and written >= steps[0]:
                    steps.pop(0)
                    lines.append(f"{'':>10}{written / MIB:>9.1f}{site.memory('VmRSS') // MIB:>8,}")
                if written != last:
                    last, since_s = written, time.monotonic()
                elif time.monotonic() > since_s + 4:
                    break
            waits = writer.is_alive()
            rss, peak = site.memory("VmRSS"), site.memory("VmHWM")
        finally:
            writer.enough = True
            site.flaky.heal()
            writer.join(120)
        after = site.memory("VmRSS")
    fine = waits and peak <= size(sizes.write_log) + REST_BYTES
    lines.append(
        f"{'':>10}{last / MIB:>9.1f}{rss // MIB:>8,}{peak // MIB:>8,}{after // MIB:>8,}"
        f"{(limit + REST_BYTES) // MIB:>9,}  {'waits; ' if waits else 'NEVER WAITED; '}{'holds' if fine else 'DOES NOT HOLD'}"
    )
    lines[0] = f"{block:>10,}{lines[0][10:]}"
    print("\n".join(lines), flush=True)
    return fine


def main() -> int:
    """Both tables; 1 if a bound does not hold."""
    parser = argparse.ArgumentParser(description="The server's memory by what it holds.")
    parser.add_argument("--held-limit", default="1G", metavar="SIZE")
    parser.add_argument("--write-log", default="64M", metavar="SIZE")
    arguments = parser.parse_args()
    if os.geteuid() != 0 or not os.path.exists("/dev/fuse") or not shutil.which("fio"):
        parser.exit(2, "memory: this needs root, /dev/fuse and fio\n")
    signal.signal(signal.SIGTERM, lambda number, _frame: sys.exit(128 + number))  # and so clean up
    sizes = Sizes(arguments.held_limit, arguments.write_log)
    print(f"held_limit={sizes.held_limit}, write_log={sizes.write_log}; all in MiB\n")
    print("1 MiB writes, direct, on a source that fails")
    print(f"{'asked':>8}{'held':>8}{'passed on':>11}{'data held':>12}{'RSS':>8}{'peak':>8}{'after':>8}{'bound':>9}")
    fine = [hold(sizes, count) for count in HELD]
    print("\nbuffered writes that are never synced, on a source whose fsync fails")
    print(f"{'bytes each':>10}{'written':>9}{'RSS':>8}{'peak':>8}{'after':>8}{'bound':>9}")
    fine += [fill(sizes, block) for block in WRITES]
    return 0 if all(fine) else 1


if __name__ == "__main__":
    sys.exit(main())
