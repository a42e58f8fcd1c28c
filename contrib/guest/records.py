"""What the guest reports, line by line, and what must therefore be in its image.

1. init.sh writes these lines; parse_record() is the only reader of them.
2. Nothing here knows QEMU, or the time: the caller passes *host_s*, its own clock when the line arrived.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

BLOCK_BYTES = 4096

SECTOR_BYTES = 512

Operation = Literal["read", "write"]

Outcome = Literal["begin", "ok", "MISMATCH", "ERROR"]

_JIFFIES_PER_S = 100  # USER_HZ, the unit of /proc/stat on x86

_IO_ERROR = re.compile(r"I/O error|critical .* error|blk_update_request|remount", re.IGNORECASE)

_STEP = re.compile(
    r"IO pass=(?P<number>\d+) block=(?P<block>\d+) op=(?P<operation>read|write)"
    r" (?P<outcome>begin|ok|MISMATCH|ERROR) uptime=(?P<uptime>[\d.]+)(?: (?P<detail>.*))?"
)


@dataclass(frozen=True, slots=True)
class Ready:
    """The guest is up. Block n lies at n * spacing_bytes."""

    run: str
    blocks: int
    workers: int
    spacing_bytes: int
    uptime_s: float
    host_s: float


@dataclass(frozen=True, slots=True)
class Step:
    """One write (direct, then flushed) or read (direct, every byte compared): its begin, or how it ended."""

    operation: Operation
    pass_number: int
    block: int
    outcome: Outcome
    detail: str  # of an ERROR: dd's exit code and words; of a MISMATCH: the first line found instead
    uptime_s: float
    host_s: float


@dataclass(frozen=True, slots=True)
class Tick:
    """The guest's clock and CPU go on: *spins* counts a busy loop, the CPU times are /proc/stat's."""

    spins: int
    busy_s: float
    idle_s: float
    iowait_s: float
    uptime_s: float
    host_s: float


@dataclass(frozen=True, slots=True)
class KernelMessage:
    """A line of the kernel's: live from its console, or from its log at the end."""

    text: str
    source: Literal["console", "log", "dmesg"]
    host_s: float

    @property
    def is_io_error(self) -> bool:
        """Whether the guest's kernel saw I/O fail; a task that merely waits long is none."""
        return _IO_ERROR.search(self.text) is not None


@dataclass(frozen=True, slots=True)
class DmesgEnd:
    """The whole kernel log that was asked for has been sent."""

    host_s: float


@dataclass(frozen=True, slots=True)
class Done:
    """The workers have ended, all I/O is answered; the guest's own totals of completed and failed steps."""

    writes: int
    reads: int
    mismatches: int
    errors: int
    uptime_s: float
    host_s: float


@dataclass(frozen=True, slots=True)
class Stream:
    """One dd over the disk's first *length_bytes*, 1 MiB at a time, has ended; how long it took by the guest's clock."""

    operation: Operation
    outcome: Outcome
    length_bytes: int
    duration_s: float
    uptime_s: float
    host_s: float


Record = Ready | Step | Tick | KernelMessage | DmesgEnd | Done | Stream


def parse_record(line: str, host_s: float) -> Record | None:
    """The record in a *line* of the guest's second serial port; None if it is not one, or not a whole one."""
    kind, _, rest = line.partition(" ")
    if kind == "IO":
        return _parse_step(line, host_s)
    if kind in ("KMSG", "DMESG"):
        return KernelMessage(rest, "log" if kind == "KMSG" else "dmesg", host_s)
    if kind == "DMESG-END":
        return DmesgEnd(host_s)
    values = dict(word.split("=", 1) for word in rest.split() if "=" in word)
    try:
        return _parse_values(kind, values, host_s)
    except (KeyError, ValueError):
        return None


def _parse_step(line: str, host_s: float) -> Step | None:
    found = _STEP.fullmatch(line)
    if found is None:
        return None
    operation: Operation = "read" if found["operation"] == "read" else "write"
    outcomes: dict[str, Outcome] = {"begin": "begin", "ok": "ok", "MISMATCH": "MISMATCH", "ERROR": "ERROR"}
    return Step(
        operation,
        int(found["number"]),
        int(found["block"]),
        outcomes[found["outcome"]],
        found["detail"] or "",
        float(found["uptime"]),
        host_s,
    )


def _parse_values(kind: str, values: dict[str, str], host_s: float) -> Record | None:
    uptime_s = float(values["uptime"])
    if kind == "READY":
        blocks, workers, spacing = (int(values[name]) for name in ("blocks", "workers", "spacing"))
        return Ready(values["run"], blocks, workers, spacing, uptime_s, host_s)
    if kind == "TICK":
        jiffies = {name: int(values[name]) for name in ("user", "nice", "system", "idle", "iowait")}
        busy = jiffies["user"] + jiffies["nice"] + jiffies["system"]
        return Tick(
            int(values["spins"]),
            busy / _JIFFIES_PER_S,
            jiffies["idle"] / _JIFFIES_PER_S,
            jiffies["iowait"] / _JIFFIES_PER_S,
            uptime_s,
            host_s,
        )
    if kind == "DONE":
        writes, reads, mismatches, errors = (int(values[name]) for name in ("writes", "reads", "mismatches", "errors"))
        return Done(writes, reads, mismatches, errors, uptime_s, host_s)
    if kind == "DD":
        operation: Operation = "read" if values["op"] == "read" else "write"
        outcome: Outcome = "ok" if values["outcome"] == "ok" else "ERROR"
        duration_s = uptime_s - float(values["begin"])
        return Stream(operation, outcome, int(values["mib"]) << 20, duration_s, uptime_s, host_s)
    return None


def longest_pause_s(records: Iterable[Record]) -> float:
    """The longest time, by the guest's clock, without a completed step; one that lasts counts up to now."""
    longest, since = 0.0, None
    for record in records:
        if isinstance(record, (KernelMessage, DmesgEnd)):
            continue
        if since is not None:
            longest = max(longest, record.uptime_s - since)
        if isinstance(record, Done):
            break
        if isinstance(record, Ready) or (isinstance(record, Step) and record.outcome != "begin"):
            since = record.uptime_s
    return longest


def in_flight(records: Iterable[Record]) -> tuple[Step, ...]:
    """The steps that have begun and not ended."""
    open_steps: dict[tuple[str, int], Step] = {}
    for record in records:
        if isinstance(record, Step):
            key = (record.operation, record.block)
            if record.outcome == "begin":
                open_steps[key] = record
            else:
                open_steps.pop(key, None)
    return tuple(open_steps.values())


def block_content(run: str, pass_number: int, block: int) -> bytes:
    """What pass *pass_number* of *run* writes to *block*; init.sh makes the same bytes."""
    lines = (
        f"iohang run={run} pass={pass_number} block={block} sector={sector}".ljust(63) + "\n"
        for sector in range(BLOCK_BYTES // SECTOR_BYTES)
    )
    return b"".join(line.encode() * (SECTOR_BYTES // 64) for line in lines)


@dataclass(frozen=True, slots=True)
class Mismatch:
    """A sector whose bytes are none of those that may be there."""

    block: int
    sector: int
    wanted_passes: tuple[int, ...]
    found: str

    def __str__(self) -> str:
        """For people."""
        return f"block {self.block} sector {self.sector}: wanted pass {self.wanted_passes}, found {self.found}"


@dataclass(frozen=True, slots=True)
class Report:
    """How an image compares with what its guest was told is in it."""

    verified_bytes: int
    in_doubt_blocks: tuple[int, ...]  # being written at the end, or their last write failed
    mismatches: tuple[Mismatch, ...]


@dataclass(slots=True)
class _BlockState:
    acknowledged: int | None = None
    possible: list[int] = field(default_factory=list)


def verify_image(path: Path, records: Iterable[Record]) -> Report:
    """Compare the raw image at *path* with every write that *records* show as acknowledged.

    A block with a later write that was not acknowledged (cut off, or failed) may hold the acknowledged bytes
    or the later ones, sector by sector. A block of which no write was ever acknowledged is not looked at.
    Raises ValueError if the records have no READY, OSError as open() and read() do.
    """
    ready = None
    states: dict[int, _BlockState] = {}
    for record in records:
        if isinstance(record, Ready):
            ready = record
        elif isinstance(record, Step) and record.operation == "write":
            state = states.setdefault(record.block, _BlockState())
            if record.outcome == "begin":
                state.possible.append(record.pass_number)
            elif record.outcome == "ok":
                # A failed write that lands after this one would be a zombie: it is not allowed any more.
                state.acknowledged = record.pass_number
                state.possible.clear()
    if ready is None:
        raise ValueError("the guest never reported READY: there is nothing to verify")
    verified_bytes = 0
    mismatches: list[Mismatch] = []
    with path.open("rb") as image:
        for block, state in sorted(states.items()):
            if state.acknowledged is None:
                continue
            image.seek(block * ready.spacing_bytes)
            found = image.read(BLOCK_BYTES)
            wrong = _compare(found, ready.run, block, (state.acknowledged, *state.possible))
            mismatches += wrong
            verified_bytes += BLOCK_BYTES - len(wrong) * SECTOR_BYTES
    in_doubt = tuple(sorted(block for block, state in states.items() if state.possible))
    return Report(verified_bytes, in_doubt, tuple(mismatches))


def _compare(found: bytes, run: str, block: int, passes: tuple[int, ...]) -> list[Mismatch]:
    contents = [block_content(run, number, block) for number in passes]
    wrong = []
    for sector in range(BLOCK_BYTES // SECTOR_BYTES):
        span = slice(sector * SECTOR_BYTES, (sector + 1) * SECTOR_BYTES)
        if found[span] not in [content[span] for content in contents]:
            start = found[span][:63].rstrip(b" \0")
            wrong.append(Mismatch(block, sector, passes, repr(start.decode(errors="replace"))))
    return wrong
