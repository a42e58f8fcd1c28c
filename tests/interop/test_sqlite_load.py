"""SQLite under load, with outages beneath the mount: no error, and each row whose COMMIT has returned is in SOURCE."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import shutil
import sqlite3
import time
from contextlib import closing
from itertools import repeat
from typing import TYPE_CHECKING

import pytest

from tests.harness import wait_until

if TYPE_CHECKING:
    from multiprocessing.context import ForkProcess
    from multiprocessing.synchronize import Event
    from pathlib import Path

    from tests.interop.conftest import Rig

WRITERS = 4
READERS = 2
OUTAGES = 2
OUTAGE_S = 3.0
LOCK_TIMEOUT_S = 60.0  # whoever waits for the lock waits for the outage of the one who has it
ROWS_PER_COMMIT = 3


def connect(database: Path) -> sqlite3.Connection:
    connection = sqlite3.connect(database, timeout=LOCK_TIMEOUT_S, isolation_level=None)
    connection.execute("PRAGMA synchronous = FULL")
    return connection


def content(writer: int, number: int) -> bytes:
    """Of 32 bytes to 6 KiB: more than a page at times."""
    return hashlib.sha256(f"{writer}.{number}".encode()).digest() * (1 + number % 200)


def write(database: Path, writer: int, stop: Event, report: Path) -> None:
    """Insert rows, and remove the first of every seventh transaction's; then report what COMMIT has acknowledged."""
    committed: dict[int, bool] = {}
    longest_s = 0.0
    with closing(connect(database)) as connection:
        while not stop.is_set():
            began = time.monotonic()
            numbers = range(len(committed), len(committed) + ROWS_PER_COMMIT)
            connection.execute("BEGIN IMMEDIATE")
            for number in numbers:
                connection.execute("INSERT INTO rows VALUES (?, ?, ?)", (writer, number, content(writer, number)))
            if removes := numbers[0] % 7 == 0:
                connection.execute("DELETE FROM rows WHERE writer = ? AND number = ?", (writer, numbers[0]))
            connection.execute("COMMIT")
            committed.update(dict.fromkeys(numbers, True))
            if removes:
                committed[numbers[0]] = False
            longest_s = max(longest_s, time.monotonic() - began)
    report.write_text(json.dumps({"rows": list(committed.values()), "longest_s": longest_s}))


def read(database: Path, stop: Event) -> None:
    """Read the newest rows again and again; each is whole."""
    with closing(connect(database)) as connection:
        while not stop.is_set():
            newest = "SELECT writer, number, content FROM rows ORDER BY rowid DESC LIMIT 50"
            for writer, number, found in connection.execute(newest).fetchall():
                assert found == content(writer, number), f"row {writer}.{number} is wrong"


@pytest.mark.parametrize("journal_mode", ["wal", "delete"])
def test_every_committed_row_is_in_source_after_outages(rig: Rig, tmp_path: Path, journal_mode: str) -> None:
    """P1 and P3 for a database: commits wait for the outage's end, and what they acknowledged is on SOURCE."""
    database = rig.mount.mountpoint / "load.db"
    # Stays open until SOURCE has been copied: the last one to close a WAL database moves its log into it.
    with closing(connect(database)) as connection:
        assert connection.execute(f"PRAGMA journal_mode = {journal_mode}").fetchone() == (journal_mode,)
        connection.execute("CREATE TABLE rows (writer INTEGER, number INTEGER, content BLOB, UNIQUE (writer, number))")
        fork = multiprocessing.get_context("fork")
        stop = fork.Event()
        reports = [tmp_path / f"writer-{writer}.json" for writer in range(WRITERS)]
        load = [
            *(
                fork.Process(target=write, args=(database, *each))
                for each in zip(range(WRITERS), repeat(stop), reports)
            ),
            *(fork.Process(target=read, args=(database, stop)) for _ in range(READERS)),
        ]
        for process in load:
            process.start()
        try:
            for _ in range(OUTAGES):
                wait_for_rows(connection, load)
                with rig.outage(OUTAGE_S):
                    pass
            wait_for_rows(connection, load)
        finally:
            stop.set()
            for process in load:
                process.join(LOCK_TIMEOUT_S)
        assert [process.exitcode for process in load] == [0] * len(load)
        copy = tmp_path / "copy"
        shutil.copytree(rig.disk, copy)

    assert (copy / "load.db-wal").exists() == (journal_mode == "wal")
    (copy / "load.db-shm").unlink(missing_ok=True)
    results = [json.loads(report.read_text()) for report in reports]
    acknowledged = {
        (writer, number, content(writer, number))
        for writer, result in enumerate(results)
        for number, present in enumerate(result["rows"])
        if present
    }
    with closing(sqlite3.connect(copy / "load.db")) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        assert set(connection.execute("SELECT writer, number, content FROM rows")) == acknowledged
    assert max(result["longest_s"] for result in results) > OUTAGE_S - 1


def wait_for_rows(connection: sqlite3.Connection, load: list[ForkProcess], more: int = 60) -> None:
    """Until the load has committed *more* rows than now."""

    def rows() -> int:
        return int(connection.execute("SELECT count(*) FROM rows").fetchone()[0])

    def enough() -> bool:
        assert all(process.is_alive() for process in load), "a part of the load has failed"
        return rows() >= target

    target = rows() + more
    wait_until(enough, timeout_s=60, what=f"{more} more rows")
