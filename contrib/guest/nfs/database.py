"""Inside the Debian guest: an SQLite database that commits until it is told to stop. A process of its own.

    python3 -m contrib.guest.nfs.database FILE wal|delete

Says `{"committed": N}` for each row whose COMMIT has returned, and `{"error": ...}` for each transaction that
failed; then it connects anew and goes on with the next row. A line on stdin ends the work, its end the connection: in between the
database can be copied as a crash would leave it.
"""

from __future__ import annotations

import collections
import hashlib
import json
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

PAUSE_S = 0.25
"""Between two transactions: the guest's CPU is emulated."""

_LOCK_TIMEOUT_S = 5.0

_END_LIMIT_S = 60.0


class Sqlite:
    """The process, in one of SQLite's journal modes. What is compared is a copy as a crash at the end would leave it."""

    def __init__(self, file: Path, beneath: Path, journal_mode: str) -> None:
        self.name = f"sqlite {journal_mode}"
        self._beneath = beneath
        self._committed: set[int] = set()
        self._errors: collections.Counter[str] = collections.Counter()
        self._took: list[tuple[float, float, bool]] = []
        self._stopped = threading.Event()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "contrib.guest.nfs.database", str(file), journal_mode],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        self._crash = ""
        threading.Thread(target=self._listen, daemon=True).start()

    def works(self, since_s: float) -> bool:
        """Transactions that began then or later."""
        return any(well and began_s >= since_s for began_s, _, well in list(self._took))

    @property
    def gone(self) -> bool:
        """Its process: of SIGBUS, where a page of the log's index (-shm, which is mapped) could not be read."""
        return self._process.poll() is not None

    def stop(self) -> None:
        """After the transaction that it is in; the connection stays."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write("stop\n")
            self._process.stdin.flush()
        except OSError:
            self._crash = self._crash or "it has ended before"

    def verdict(self) -> dict[str, Any]:
        """What went wrong, and what the copy has."""
        stopped = self._process.poll() is not None or self._stopped.wait(_END_LIMIT_S)
        with tempfile.TemporaryDirectory() as folder:
            for file in self._beneath.parent.glob(f"{self._beneath.name}*"):
                if not file.name.endswith("-shm"):  # what is in memory only, after a crash
                    shutil.copy(file, folder)
            integrity, lost = self._compare(Path(folder) / self._beneath.name)
        assert self._process.stdin is not None
        with suppress(OSError):  # it may be gone
            self._process.stdin.close()
        ended = stopped and self._ended()
        if self._process.returncode:
            self._crash += f" exit code {self._process.returncode}"
        return {
            "ended": ended,
            "calls": len(self._took),
            "acknowledged": len(self._committed),
            "errors": dict(self._errors),
            "crash": self._crash[-500:],
            "longest_s": round(max((took_s for _, took_s, _ in self._took), default=0.0), 1),
            "lost": lost,
            "integrity": integrity,
            "misread": 0,
        }

    def _ended(self) -> bool:
        try:
            self._process.wait(_END_LIMIT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            return False
        return True

    def _listen(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            try:
                said = json.loads(line)
            except ValueError:
                self._crash += line
                continue
            if "stopped" in said:
                self._stopped.set()
                continue
            self._took.append((time.monotonic() - said["took_s"], said["took_s"], "committed" in said))
            if "error" in said:
                self._errors[said["error"]] += 1
            else:
                self._committed.add(said["committed"])

    def _compare(self, copy: Path) -> tuple[str, int]:
        """What PRAGMA integrity_check says, and how many acknowledged rows are not there as they were."""
        try:
            with closing(sqlite3.connect(copy)) as connection:
                said = "; ".join(str(row[0]) for row in connection.execute("PRAGMA integrity_check").fetchmany(5))
                rows = dict(connection.execute("SELECT number, content FROM rows").fetchall())
        except sqlite3.Error as error:
            return f"{type(error).__name__}: {error}", len(self._committed)
        return said, sum(rows.get(number) != content(number) for number in self._committed)


# ---- the process


def content(number: int) -> bytes:
    """Of 32 bytes to 6 KiB: more than a page at times."""
    return hashlib.sha256(str(number).encode()).digest() * (1 + number * 37 % 200)


def connect(file: str, journal_mode: str) -> sqlite3.Connection:
    """As an application that wants each COMMIT to last."""
    connection = sqlite3.connect(file, timeout=_LOCK_TIMEOUT_S, isolation_level=None)
    connection.execute("PRAGMA synchronous = FULL")
    connection.execute(f"PRAGMA journal_mode = {journal_mode}")
    connection.execute("CREATE TABLE IF NOT EXISTS rows (number INTEGER PRIMARY KEY, content BLOB)")
    return connection


def _say(**said: object) -> None:
    print(json.dumps(said), flush=True)


def _commit(connection: sqlite3.Connection, number: int) -> None:
    connection.execute("BEGIN IMMEDIATE")
    connection.execute("INSERT INTO rows VALUES (?, ?)", (number, content(number)))
    connection.execute("COMMIT")
    if connection.execute("SELECT content FROM rows WHERE number = ?", (number,)).fetchone() != (content(number),):
        raise sqlite3.DatabaseError("the row that was committed reads otherwise")


def main() -> None:
    """The command line."""
    file, journal_mode = sys.argv[1:]
    stop = threading.Event()

    def listen() -> None:
        sys.stdin.readline()
        stop.set()

    threading.Thread(target=listen, daemon=True).start()
    connection = None
    number = 0
    while not stop.wait(PAUSE_S):
        began_s = time.monotonic()
        try:
            connection = connection or connect(file, journal_mode)
            _commit(connection, number)
        except sqlite3.Error as error:
            name = getattr(error, "sqlite_errorname", type(error).__name__)
            _say(error=f"{name}: {error}", took_s=time.monotonic() - began_s)
            if connection is not None:
                connection.close()
            connection = None
        else:
            _say(committed=number, took_s=time.monotonic() - began_s)
        number += 1
    _say(stopped=True)
    sys.stdin.read()
    if connection is not None:
        connection.close()


if __name__ == "__main__":
    main()
