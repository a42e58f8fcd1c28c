"""Random weather for a flaky source, and the mount that stands in it.

1. `Weather` puts outages of random kinds in force for 0.05 to 2 s, with quiet between them, and heals at its end. Its seed is
   printed; a test that failed is run again with IOHANG_SEED, and with IOHANG_WEATHER=stale,hang for some kinds alone.
2. No outage is as long as the timeout of `storm_mount`, so no request may be given up, and no consumer may see an error.
3. Storms last seconds; IOHANG_MINUTES=10 makes each last 10 minutes.
"""

from __future__ import annotations

import enum
import os
import random
import re
import secrets
import signal
import subprocess
import threading
import time
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from tests.harness import FlakySource, Mount, wait_until

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Sequence

OUTAGE_S = (0.05, 2.0)
QUIET_S = (0.1, 0.8)
TIMEOUT_S = 60  # of the mount
INTERVAL_S = 0.2
SLOW_S = 4 * TIMEOUT_S
"""How long a consumer may take beyond its storm before it counts as stuck: each request has one timeout at most."""


class Kind(enum.Enum):
    """What an outage is like."""

    ERRNO = "errno"  # reads, writes and fsyncs fail at once
    LATE = "late"  # operations fail after a while, as on a `softerr` mount
    SLOW = "slow"  # operations succeed after a while
    HANG = "hang"  # operations do not return, as on a `hard` mount
    CHANCE = "chance"  # some operations fail
    SIZE = "size"  # changes of size fail
    SHORT_READ = "short-read"  # whole sectors; only with --page-cache, see `storm_mount`
    SHORT_WRITE = "short-write"  # some is taken; of an asynchronous direct write, the kernel makes EIO then
    STALE = "stale"  # open files are dead for good; opened anew they work
    WRITEBACK = "writeback"  # what was taken is lost, and one fsync says so
    LOSSY = "lossy"  # the same, now and then, and fsyncs fail as well


_RULES = {
    Kind.ERRNO: "data * errno={errno}",
    Kind.LATE: "{operations} * errno=ETIMEDOUT delay={late_s:.3f}",
    Kind.SLOW: "{operations} * delay={slow_s:.3f}",
    Kind.HANG: "{operations} * hang",
    Kind.CHANCE: "{operations} * errno={errno} chance={chance:.2f}",
    Kind.SIZE: "setattr * errno={errno}",
    Kind.SHORT_READ: "read * short={sectors}",
    Kind.SHORT_WRITE: "write * short={length}",
    Kind.STALE: "{operations},flush * stale",
    Kind.WRITEBACK: "writeback * errno={errno}",
    Kind.LOSSY: "writeback * errno=EIO chance={chance:.2f}\nfsync * errno={errno} chance={chance:.2f}",
}

DATA = frozenset(Kind) - {Kind.SIZE}
"""For consumers that change sizes by name, too: only a change through an open handle is a request."""


def storm_s(default_s: float) -> float:
    """How long a storm lasts: *default_s*, or IOHANG_MINUTES."""
    minutes = os.environ.get("IOHANG_MINUTES")
    return float(minutes) * 60 if minutes else default_s


def new_seed() -> int:
    """A random one, or IOHANG_SEED."""
    return int(os.environ.get("IOHANG_SEED") or secrets.randbelow(1_000_000))


def chosen(kinds: Collection[Kind]) -> frozenset[Kind]:
    """*kinds*, or those among them that IOHANG_WEATHER names."""
    names = os.environ.get("IOHANG_WEATHER")
    left = frozenset(kinds) & {Kind(name) for name in names.split(",")} if names else frozenset(kinds)
    assert left, f"IOHANG_WEATHER={names} leaves none of {sorted(kind.value for kind in kinds)}"
    return left


def say(words: str) -> None:
    """Print, for whoever reads the report of a failed test."""
    print(words)  # noqa: T201


def rules(kind: Kind, chance: random.Random) -> list[str]:
    """Rules of the trigger file for one outage of that *kind*."""
    fields = {
        "operations": ",".join(chance.sample(("read", "write", "fsync"), chance.randint(1, 3))),
        "errno": chance.choice(("EIO", "ETIMEDOUT", "ENOTCONN", "ECONNRESET", "EHOSTDOWN", "EREMOTEIO")),
        "late_s": chance.uniform(0.02, 0.5),
        "slow_s": chance.uniform(0.002, 0.05),
        "chance": chance.uniform(0.1, 0.9),
        "sectors": 512 * chance.randint(1, 128),
        "length": int(2 ** chance.uniform(9, 16)),  # 512 B to 64 KiB, and seldom a multiple of anything
    }
    return _RULES[kind].format(**fields).splitlines()


class Weather:
    """Outages of *source* from the block's beginning to its end, or for *seconds*."""

    def __init__(self, source: FlakySource, seed: int, kinds: Collection[Kind], seconds: float = float("inf")) -> None:
        self._source = source
        self._random = random.Random(seed)
        self._kinds = sorted(kinds, key=lambda kind: kind.value)
        self._coming: list[Kind] = []
        self._seconds = seconds
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._blow, name="weather", daemon=True)
        self._error: BaseException | None = None
        self._end_s = 0.0
        self.outages: list[tuple[float, float, list[str]]] = []
        """Begin and length in seconds, and the rules; the times of day are in the mount's log."""
        self.in_outage = threading.Event()
        say(f"weather: seed {seed}, kinds {','.join(kind.value for kind in self._kinds)}")

    def _blow(self) -> None:
        began_s = time.monotonic()
        try:
            while self._pause(self._random.uniform(*QUIET_S)):
                lines = [line for kind in self._next_kinds() for line in rules(kind, self._random)]
                length_s = OUTAGE_S[0] * (OUTAGE_S[1] / OUTAGE_S[0]) ** self._random.random()
                self.outages.append((time.monotonic() - began_s, length_s, lines))
                self._source.fail(*lines)
                self.in_outage.set()
                self._pause(length_s)
                self.in_outage.clear()
                self._source.heal()
        except BaseException as error:  # noqa: BLE001 - raised again where somebody sees it, in __exit__
            self._error = error
        finally:
            self.in_outage.clear()
            self._source.heal()

    def _next_kinds(self) -> list[Kind]:
        """One kind or two. Each has its turn before any comes again, so that a short storm has them all."""
        if len(self._coming) < 2:
            self._coming += self._random.sample(self._kinds, len(self._kinds))
        return [self._coming.pop(0) for _ in range(min(len(self._coming), self._random.choice([1, 1, 2])))]

    def _pause(self, seconds: float) -> bool:
        """Wait; False once the weather is over."""
        return not self._over.wait(max(0.0, min(seconds, self._end_s - time.monotonic()))) and (
            time.monotonic() < self._end_s
        )

    def __enter__(self) -> Self:
        self._end_s = time.monotonic() + self._seconds
        self._thread.start()
        return self

    def __exit__(self, *_error: object) -> None:
        self._over.set()
        self._thread.join()
        if self._error is not None:
            raise self._error
        for at_s, length_s, lines in self.outages:
            say(f"weather: {at_s:7.2f} s, for {length_s:.2f} s: {'; '.join(lines)}")


# ---- a mount in it


@dataclass(frozen=True)
class StormMount:
    """A directory on disk, the flaky source that mirrors it, and the mount above that. *disk* is what storage has."""

    disk: Path
    source: FlakySource
    mount: Mount
    kinds: frozenset[Kind]
    seed: int

    @property
    def mountpoint(self) -> Path:
        return self.mount.mountpoint

    def weather(self, seconds: float = float("inf"), *, number: int = 0) -> Weather:
        """The storm; a test's second one has another *number*."""
        return Weather(self.source, self.seed + number, self.kinds, seconds)

    def noticed(self) -> bool:
        """Whether a request has met the weather."""
        return re.search(r"failed with|no answer from", self.mount.log_text()) is not None

    def assert_masked(self) -> None:
        """The mount has met outages and has passed none of them on; neither server has a bug."""
        text = self.mount.log_text()
        assert self.noticed(), f"no request met the weather; the log:\n{text}"
        passed_on = re.findall(r".* (?:ERROR|CRITICAL) .*|Traceback.*", text)
        assert not passed_on, "\n".join(passed_on[:20])
        assert "Traceback" not in self.source.log_text(), self.source.log_text()


@contextmanager
def storm_mount(folder: Path, logs: Path, kinds: Collection[Kind], *words: str) -> Iterator[StormMount]:
    """A mount in *folder* on a flaky source for *kinds*, with mount words of the test's own; *logs* is for logs.

    The source has a page cache of its own, and the kernel has none of it. So it can lose writeback, and its short reads reach
    the mount: the kernel's page cache takes a short read of a FUSE source for the end of the file and goes on with zeros, after
    a short direct one as well (generic_file_read_iter in mm/filemap.c).
    """
    seed = new_seed()
    disk = folder / "disk"
    disk.mkdir(exist_ok=True)
    options = (f"timeout={TIMEOUT_S}", f"interval={INTERVAL_S}", "monitor=none", *words)
    with (
        FlakySource(
            disk, folder / "source", logs / "trigger", log=logs / "flaky.log", page_cache=True, seed=seed
        ) as source,
        Mount(folder / "source", folder / "mnt", *options, log=logs / "mount.log") as mount,
    ):
        try:
            yield StormMount(disk, source, mount, chosen(kinds), seed)
        finally:
            source.heal()


# ---- consumers as processes


def output_of(command: Sequence[str | Path], timeout_s: float, **options: Any) -> str:
    """What *command* prints, both streams; it fails if its exit code is not 0 or if it takes longer than *timeout_s*.

    Not subprocess.run(): a killed process whose request is held ends only with the answer, and run() would wait for that.
    """
    process: subprocess.Popen[str] = subprocess.Popen(
        [str(word) for word in command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        **{"stdin": subprocess.DEVNULL} | options,
    )  # fmt: skip
    try:
        output, _ = process.communicate(timeout=timeout_s)
    except BaseException:
        process.kill()
        with suppress(subprocess.TimeoutExpired):
            process.communicate(timeout=10)
        raise
    assert process.returncode == 0, f"{command[0]}: exit code {process.returncode}:\n{_both_ends(output)}"
    return output


def _both_ends(text: str, length: int = 5000) -> str:
    return text if len(text) <= 2 * length else f"{text[:length]}\n[...]\n{text[-length:]}"


def kill_and_wait(processes: Collection[int]) -> None:
    """SIGKILL, and wait until they are gone or zombies: a request of theirs that is held keeps them until its answer."""
    for pid in processes:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    wait_until(lambda: not any(state(pid) not in "XZ" for pid in processes), TIMEOUT_S, f"the end of {processes}")


def state(pid: int) -> str:
    """One letter, as in /proc/PID/stat of every thread's leader: `R`, `S`, `D`, `T`, `Z`; `X` where there is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return "X"
