"""Inside the Debian guest: fio, QEMU's block layer and SQLite through one outage, bare and with iohang-fuse; JSON to stdout.

    python3 -m contrib.guest.nfs.setting 15
    python3 -m contrib.guest.nfs.apps [--kinds v3-softerr,v4.2-soft] [--seconds 40]

All are at work at once when packets are dropped, and until all work again or have had their time; then what each was told is
compared with what the server has. What is expected: errors on the bare mounts, and with iohang-fuse none, and nothing lost.

SQLite's DELETE journal is a file that comes and goes with each transaction: opening and unlinking are metadata operations, which
are never held. What it sees in an outage is reported like all else.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from contrib.guest.nfs import site
from contrib.guest.nfs.database import Sqlite
from contrib.guest.nfs.programs import Fio, Program, QemuIo

WAYS = ("bare", "iohang")
KINDS = "v3-softerr,v4.2-soft"
SECONDS = 40.0
"""Long enough for 4.2's first error, which takes 20 s with a lease of 15; 25 s were not enough for any program to see it."""

_START_LIMIT_S = 120.0
_RECOVERY_LIMIT_S = 90.0
_SETTLE_S = 6.0
"""What an old connection has still to deliver arrives in that time."""


def _programs(directory: Path, beneath: Path, folder: Path) -> list[Program]:
    """All of them, at work in *directory*, which is *beneath* at the server."""

    def files(name: str) -> tuple[Path, Path]:
        return directory / name, beneath / name

    return [
        Fio(*files("fio.img"), folder),
        QemuIo(*files("qemu-none.img"), "none"),
        QemuIo(*files("qemu-writeback.img"), "writeback"),
        Sqlite(*files("wal.db"), "wal"),
        Sqlite(*files("delete.db"), "delete"),
    ]


def play(kinds: list[site.Kind], seconds: float) -> dict[str, Any]:
    """One outage, and what became of everyone."""
    with tempfile.TemporaryDirectory() as folder:
        cells: dict[tuple[str, str], list[Program]] = {}
        for kind in kinds:
            for way in WAYS:
                name = f"apps-{kind.name}-{way}"
                beneath = kind.export / name
                shutil.rmtree(beneath, ignore_errors=True)
                beneath.mkdir()
                logs = Path(folder) / name
                logs.mkdir()
                cells[kind.name, way] = _programs((kind.bare if way == "bare" else kind.iohang) / name, beneath, logs)
        everyone = [program for cell in cells.values() for program in cell]
        missing = _wait(everyone, time.monotonic(), _START_LIMIT_S)
        if missing:
            for program in everyone:
                program.stop()
            raise RuntimeError(f"not at work before the outage: {[(each.name, each.verdict()) for each in missing]}")
        began_s = time.monotonic()
        say(f"packets dropped, for {seconds:g} s")
        site.drop()
        time.sleep(max(began_s + seconds - time.monotonic(), 0))
        site.restore()
        ended_s = time.monotonic()
        say(f"ended after {ended_s - began_s:.1f} s")
        deaf = _wait(everyone, ended_s, _RECOVERY_LIMIT_S)
        say(
            f"all work again after {time.monotonic() - ended_s:.1f} s" if not deaf else f"{len(deaf)} do not work again"
        )
        for program in everyone:
            program.stop()
        time.sleep(_SETTLE_S)
        found = [
            {"kind": kind, "way": way, "program": program.name, "again": program not in deaf, **program.verdict()}
            for (kind, way), cell in cells.items()
            for program in cell
        ]
    return {"seconds": round(ended_s - began_s, 1), "cells": found}


def _wait(programs: list[Program], since_s: float, limit_s: float) -> list[Program]:
    """Until all have worked since then, or are gone; those that have not."""
    deadline_s = time.monotonic() + limit_s
    waiting = programs
    while not all(program.gone for program in waiting) and time.monotonic() < deadline_s:
        waiting = [program for program in waiting if not program.works(since_s)]
        time.sleep(0.5)
    return waiting


def say(words: str) -> None:
    """Progress, for who looks at the guest's log."""
    print(words, file=sys.stderr, flush=True)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", default=KINDS, help="which mounts, by commas")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="how long the outage is")
    given = parser.parse_args()
    kinds = [kind for kind in site.KINDS if kind.name in given.kinds.split(",")]
    json.dump(play(kinds, given.seconds), sys.stdout)


if __name__ == "__main__":
    main()
