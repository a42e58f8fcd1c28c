"""Inside the Debian guest: who has one file open, and writes, syncs and reads it back, through an outage. A process of its own.

    python3 -m contrib.guest.nfs.holder FILE [--unlink]

Says `{"call": "write", "took_s": ..., "error": "EIO" or null}` for each call. A line on stdin ends the work: then it says
`{"blocks": [...]}`, the number that each block was last given and acknowledged with, and keeps the file open until stdin ends.
`Holder` is the side of who starts it.
"""

from __future__ import annotations

import argparse
import errno
import json
import mmap
import os
import struct
import subprocess
import sys
import threading
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

BLOCK_BYTES = 4096
BLOCKS = 16

_PAUSE_S = 0.25
_LIMIT_S = 90.0


class Holder:
    """One such process. *user*: whose; root's where it is not given."""

    def __init__(self, file: Path, *, unlink: bool = False, user: int = 0) -> None:
        self.calls: list[dict[str, Any]] = []
        self.blocks: list[int | None] = []
        self._said = threading.Condition()
        self._crash = ""
        self._process = subprocess.Popen(
            [sys.executable, "-m", "contrib.guest.nfs.holder", str(file), *(["--unlink"] if unlink else [])],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            user=user, group=user, extra_groups=[],
        )  # fmt: skip
        threading.Thread(target=self._listen, daemon=True).start()

    def works(self, more: int = 3) -> None:
        """Wait until so many more calls have gone well; raises AssertionError with what it says instead."""
        with self._said:
            enough = self._well() + more
            assert self._said.wait_for(lambda: self._well() >= enough, _LIMIT_S), f"it does not go on: {self}"

    def stop(self) -> None:
        """End its work; the file stays open."""
        assert self._process.stdin is not None
        self._process.stdin.write("stop\n")
        self._process.stdin.flush()
        with self._said:
            assert self._said.wait_for(lambda: self.blocks, _LIMIT_S), f"it does not end: {self}"

    def close(self) -> None:
        """End it."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        assert self._process.wait(_LIMIT_S) == 0, str(self)

    def kill(self) -> None:
        """Whatever it does."""
        self._process.kill()

    @property
    def errors(self) -> list[dict[str, Any]]:
        """The calls that failed."""
        return [call for call in list(self.calls) if call["error"]]

    @property
    def longest_s(self) -> float:
        """Its longest call."""
        return max(float(call["took_s"]) for call in list(self.calls))

    def wrong(self, beneath: Path) -> int:
        """How many blocks of the file, as the server has it, are not as acknowledged."""
        data = beneath.read_bytes()
        return sum(
            number is not None and data[index * BLOCK_BYTES : (index + 1) * BLOCK_BYTES] != content(number)
            for index, number in enumerate(self.blocks)
        )

    def __str__(self) -> str:
        return f"{len(self.calls)} calls, errors {self.errors[:5]}, last {self.calls[-1:]}, {self._crash[-500:]}"

    def _well(self) -> int:
        return len(self.calls) - len(self.errors)

    def _listen(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            with self._said:
                try:
                    said = json.loads(line)
                except ValueError:
                    self._crash += line
                    continue
                if "blocks" in said:
                    self.blocks = said["blocks"]
                else:
                    self.calls.append(said)
                self._said.notify_all()


# ---- the process


def content(number: int) -> bytes:
    """Of a block's write with this number."""
    return struct.pack("64s", b"holder %d" % number) * (BLOCK_BYTES // 64)


def _do(name: str, call: Callable[[], object]) -> bool:
    began_s = time.monotonic()
    error = None
    try:
        call()
    except OSError as caught:
        error = errno.errorcode.get(caught.errno or 0, str(caught))
    print(json.dumps({"call": name, "took_s": time.monotonic() - began_s, "error": error}), flush=True)
    return error is None


def _work(fd: int, stop: threading.Event) -> list[int | None]:
    buffer = mmap.mmap(-1, BLOCK_BYTES)  # on a page, as O_DIRECT wants it
    acknowledged: list[int | None] = [None] * BLOCKS
    number = 0

    def read_back(index: int) -> None:
        if os.preadv(fd, [buffer], index * BLOCK_BYTES) != BLOCK_BYTES or buffer[:] != content(number):
            raise OSError(errno.EILSEQ, "it reads otherwise")

    while not stop.wait(_PAUSE_S):
        index = number % BLOCKS
        buffer[:] = content(number)
        acknowledged[index] = None  # until the answer nobody knows what is there
        written = _do("write", lambda index=index: os.pwritev(fd, [buffer], index * BLOCK_BYTES))  # type: ignore[misc]
        if written and _do("fsync", lambda: os.fsync(fd)):
            acknowledged[index] = number
            _do("read", lambda index=index: read_back(index))  # type: ignore[misc]
        number += 1
    return acknowledged


def _listen(stop: threading.Event) -> None:
    sys.stdin.readline()
    stop.set()


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file")
    parser.add_argument("--unlink", action="store_true")
    given = parser.parse_args()
    fd = os.open(given.file, os.O_RDWR | os.O_CREAT | os.O_DIRECT, 0o600)
    if given.unlink:
        os.unlink(given.file)
    stop = threading.Event()
    threading.Thread(target=_listen, args=(stop,), daemon=True).start()
    print(json.dumps({"blocks": _work(fd, stop)}), flush=True)
    sys.stdin.read()
    os.close(fd)


if __name__ == "__main__":
    main()
