"""Inside the Debian guest: an SQLite database that commits until it is told to stop. A process of its own, for programs.py.

    python3 -m contrib.guest.nfs.database FILE wal|delete

Says `{"committed": N}` for each row whose COMMIT has returned, and `{"error": ...}` for each transaction that
failed; then it connects anew and goes on with the next row. A line on stdin ends the work, its end the connection: in between the
database can be copied as a crash would leave it.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
import sys
import threading
import time

PAUSE_S = 0.25
"""Between two transactions: the guest's CPU is emulated."""

_LOCK_TIMEOUT_S = 5.0


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
