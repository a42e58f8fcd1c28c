"""fio, QEMU and SQLite in bad weather: no error, and what was acknowledged is on SOURCE's own disk, not only in the mount."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from contextlib import closing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pytest

from tests.harness import wait_until
from tests.weather import (
    DATA,
    SLOW_S,
    TIMEOUT_S,
    kill_and_wait,
    output_of,
    say,
    state,
    storm_mount,
    storm_s,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from tests.weather import StormMount

STORM_S = 10
MIB = 1 << 20


# ---- fio

FIO_SIZE = 24 * MIB
FIO_JOBS = {
    "direct-1": ["--ioengine=libaio", "--iodepth=1", "--direct=1"],
    "direct-64": ["--ioengine=libaio", "--iodepth=64", "--direct=1"],
    "buffered": ["--ioengine=psync", "--direct=0"],
}


@pytest.mark.parametrize("job", FIO_JOBS)
def test_fio_finds_every_block(program: Callable[[str, str], str], disk_path: Path, tmp_path: Path, job: str) -> None:
    """P1, P3, P6 for fio: written through the storm, verified in it, and then on SOURCE's own disk."""
    fio = program("fio", "fio")
    end_s = time.monotonic() + storm_s(STORM_S)

    def passes(path: Path, number: int, *more: str) -> Any:
        command = [
            fio, "--name=storm", f"--filename={path}", f"--size={FIO_SIZE}", "--rw=randwrite", "--bsrange=512-1m",
            "--fsync=32", "--end_fsync=1", "--fallocate=none", "--verify=crc32c", "--verify_fatal=1",
            "--verify_state_save=0", f"--randseed={number}", "--output-format=json", *more,
        ]  # fmt: skip
        output = output_of(command, SLOW_S, cwd=tmp_path)
        job = json.loads(output[output.index("{") :])["jobs"][0]
        assert job["error"] == 0, output
        return job

    with storm_mount(disk_path, tmp_path, DATA) as storm:
        on_disk = storm.disk / "disk.img"
        with on_disk.open("wb") as file:
            file.truncate(FIO_SIZE)
        number = storm.seed
        with storm.weather():
            while time.monotonic() < end_s or not storm.noticed():  # fio computes half of its time
                number += 1
                written = passes(storm.mountpoint / "disk.img", number, *FIO_JOBS[job])
                assert written["write"]["io_bytes"] == FIO_SIZE
                assert written["read"]["io_bytes"] == FIO_SIZE, "verified through the mount"
                beneath = passes(on_disk, number, "--verify_only", "--ioengine=psync", "--direct=0")
                assert beneath["read"]["io_bytes"] == FIO_SIZE
        say(f"{number - storm.seed} passes")
        storm.assert_masked()


# ---- QEMU

IMAGE = 4 * MIB + 512
REQUESTS = 32  # at once


def qemu_round(chance: random.Random, model: bytearray, *, overlapping: bool) -> str:
    """Commands for qemu-io: writes at once, a flush, and reads that verify them; *model* becomes what must be there."""
    sectors = len(model) // 512
    commands = [(512 * (sectors - 1), 512, chance.randrange(1, 256))]  # the last sector always
    for _ in range(REQUESTS):
        first = chance.randrange(sectors)
        count = min(int(2 ** chance.uniform(0, 8)), sectors - first)
        if overlapping:  # all of them within 256 sectors
            first, count = chance.randrange(200), chance.randint(1, 56)
        commands.append((first * 512, count * 512, chance.randrange(1, 256)))
    if not overlapping:
        commands = apart(commands)
    for offset, length, pattern in commands:
        model[offset : offset + length] = bytes([pattern]) * length
    synchronous = chance.random() < 0.3
    verb = "write" if synchronous else "aio_write"
    writes = [f"{verb} -q -P {pattern} {offset} {length}" for offset, length, pattern in commands]
    reads = [f"read -q -P {pattern} {offset} {length}" for offset, length, pattern in uniform(commands, model)]
    return "\n".join([*writes, "aio_flush", "flush", *reads, ""])


def apart(commands: list[tuple[int, int, int]]) -> list[tuple[int, int, int]]:
    """Those that overlap none before them."""
    kept: list[tuple[int, int, int]] = []
    for offset, length, pattern in commands:
        if all(offset + length <= other or other + size <= offset for other, size, _ in kept):
            kept.append((offset, length, pattern))
    return kept


def uniform(commands: list[tuple[int, int, int]], model: bytearray) -> Iterator[tuple[int, int, int]]:
    """Those of which every byte is still as written: `read -P` can verify them."""
    for offset, length, pattern in commands:
        if model.count(pattern, offset, offset + length) == length:
            yield offset, length, pattern


@pytest.mark.parametrize("cache", ["none", "writeback"])
def test_qemu_finds_every_pattern(
    program: Callable[[str, str], str], disk_path: Path, tmp_path: Path, cache: str
) -> None:
    """P1, P3, P4 and P6 for QEMU's block layer: the raw image on SOURCE's disk is as the model after each flush."""
    qemu_io = program("qemu-io", "qemu-utils")
    end_s = time.monotonic() + storm_s(STORM_S)
    # Native AIO submits in the order of the commands; threads do not, so that overlapping writes would land in any order.
    aio = "native" if cache == "none" else "threads"
    with storm_mount(disk_path, tmp_path, DATA) as storm:
        chance, model = random.Random(f"{cache} {storm.seed}"), bytearray(IMAGE)
        (storm.disk / "disk.img").write_bytes(model)
        command: list[str | Path] = [qemu_io, "-f", "raw", "-t", cache, "-i", aio, storm.mountpoint / "disk.img"]
        rounds = 0
        with storm.weather():
            while time.monotonic() < end_s:
                rounds += 1
                commands = tmp_path / "commands"
                commands.write_text(qemu_round(chance, model, overlapping=aio == "native" and chance.random() < 0.5))
                with commands.open() as script:
                    output = output_of(command, SLOW_S, stdin=script).replace("qemu-io> ", "").strip()
                assert not output, f"round {rounds}: {output}\n{commands.read_text()}"
                wrong = different_sectors((storm.disk / "disk.img").read_bytes(), model)
                assert not wrong, f"round {rounds}: {wrong}\n{commands.read_text()}"
        say(f"{rounds} rounds")
        storm.assert_masked()


def different_sectors(found: bytes, model: bytearray) -> str:
    """Where two images differ; nothing if they do not."""
    if found == model:
        return ""
    sectors = [at for at in range(0, len(model), 512) if found[at : at + 512] != model[at : at + 512]]
    return f"{len(found)} bytes, not {len(model)}; {len(sectors)} sectors are wrong, the first at {sectors[:8]}"


# ---- SQLite

COMMITTER = """
import sqlite3, sys
connection = sqlite3.connect(sys.argv[1], isolation_level=None)
connection.execute("PRAGMA synchronous = FULL")
connection.execute("PRAGMA wal_autocheckpoint = 50")
number = connection.execute("SELECT coalesce(max(id), 0) FROM rows").fetchone()[0]
while True:
    number += 1
    connection.execute("BEGIN IMMEDIATE")
    connection.execute("INSERT INTO rows VALUES (?, ?)", (number, content(number)))
    if number % 7 == 0:
        connection.execute("UPDATE rows SET content = ? WHERE id = ?", (content(-number), number - 3))
    connection.execute("COMMIT")
    print(number, flush=True)
"""
CONTENT = """
import random
def content(number):
    chance = random.Random(number)
    return chance.randbytes(chance.randrange(6000))
"""


def content(number: int) -> bytes:
    """What the row *number* has; of -number: after its update."""
    scope: dict[str, Any] = {}
    exec(CONTENT, scope)  # noqa: S102 - the same source for the child and for us
    return bytes(scope["content"](number))


def row(number: int, last: int) -> tuple[int, bytes]:
    """The row *number* of a database in which *last* is the last."""
    updated_by = number + 3
    return number, content(-updated_by if updated_by % 7 == 0 and updated_by <= last else number)


@dataclass
class Committer:
    """A child that commits rows one after the other; *acknowledged* is the last whose COMMIT has returned."""

    database: Path
    acknowledged: int = 0
    _process: subprocess.Popen[str] = field(init=False)

    def __post_init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", CONTENT + COMMITTER, str(self.database)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self.said: list[str] = []
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.strip().isdecimal():
                self.acknowledged = int(line)
            else:
                self.said.append(line)

    def assert_alive(self) -> None:
        assert self._process.poll() is None, f"exit code {self._process.returncode}: {''.join(self.said)}"

    def stand_still(self) -> int:
        """Stop it between two of its system calls; returns the last row that it has acknowledged for sure."""
        self.assert_alive()
        self._process.send_signal(signal.SIGSTOP)
        wait_until(lambda: state(self._process.pid) in "TXZ", TIMEOUT_S, "the committer to stop")
        return self.acknowledged

    def go_on(self) -> None:
        self._process.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        """SIGKILL, and wait for the answer to its last request."""
        kill_and_wait([self._process.pid])
        self._process.wait(TIMEOUT_S)
        self._reader.join(TIMEOUT_S)
        assert self._process.stdout is not None
        self._process.stdout.close()


def assert_committed(storm: StormMount, copy: Path, acknowledged: int) -> None:
    """What is on SOURCE's disk now has every acknowledged row, and at most one more, which was on its way."""
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(storm.disk, copy)
    (copy / "rows.db-shm").unlink(missing_ok=True)
    with closing(sqlite3.connect(copy / "rows.db")) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        rows = connection.execute("SELECT id, content FROM rows ORDER BY id").fetchall()
    last = len(rows)
    assert acknowledged <= last <= acknowledged + 1, f"{last} rows are there, {acknowledged} were acknowledged"
    wrong = [number for number, found in enumerate(rows, 1) if found != row(number, last)]
    assert not wrong, f"rows {wrong[:20]} of {last} are wrong"


@pytest.mark.parametrize("journal_mode", ["wal", "delete"])
def test_sqlite_has_every_acknowledged_row(disk_path: Path, tmp_path: Path, journal_mode: str) -> None:
    """P1 and P3 for SQLite: at any moment SOURCE's disk alone has each row whose COMMIT has returned, and a sound database.

    The child is stopped every other second, and killed in the middle of an outage; a new one goes on from what is there.
    """
    end_s = time.monotonic() + storm_s(STORM_S)
    with storm_mount(disk_path, tmp_path, DATA) as storm:
        database = storm.mountpoint / "rows.db"
        with closing(sqlite3.connect(database, isolation_level=None)) as connection:
            assert connection.execute(f"PRAGMA journal_mode = {journal_mode}").fetchone() == (journal_mode,)
            connection.execute("CREATE TABLE rows (id INTEGER PRIMARY KEY, content BLOB)")
        first = Committer(database)
        try:
            with storm.weather() as weather:
                while time.monotonic() < end_s:
                    time.sleep(1)
                    assert_committed(storm, tmp_path / "copy", first.stand_still())
                    first.go_on()
                wait_until(weather.in_outage.is_set, what="an outage")
                first.assert_alive()
                os.kill(first._process.pid, signal.SIGKILL)
        finally:
            first.kill()
        assert not first.said, first.said
        assert_committed(storm, tmp_path / "copy", first.acknowledged)
        second = Committer(database)
        try:
            with storm.weather(number=1):
                wait_until(lambda: second.acknowledged > first.acknowledged + 20, TIMEOUT_S, "20 more rows")
        finally:
            second.kill()
        assert not second.said, second.said
        assert_committed(storm, tmp_path / "copy", second.acknowledged)
        say(f"{first.acknowledged}, then {second.acknowledged} rows")
        storm.assert_masked()
