"""Inside the Debian guest: I/O without end on one image, O_DIRECT as QEMU does it, in the words that records.py reads.

    python3 -m contrib.guest.debian.consumer IMAGE PORT

What init.sh does in the small guest: of 128 blocks, evenly spread over the image, each worker owns every second one; it writes one
(then fsync), reads an earlier one back and compares it, and says begin and end of each on PORT. After SIGTERM it ends what is in
flight, and says its totals.
"""

from __future__ import annotations

import mmap
import os
import secrets
import signal
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING

from contrib.guest.records import BLOCK_BYTES, block_content

if TYPE_CHECKING:
    from contrib.guest.records import Operation

_BLOCKS, _WORKERS, _STRIDE = 128, 2, 37
"""As in guest.py and init.sh: a worker visits its blocks in steps of a prime that does not divide their number."""

_SLOTS = _BLOCKS // _WORKERS

_PAUSE_S = 0.05
"""Between two steps: the guest's CPU, emulated, is for others, too."""


class Consumer:
    """The work on one image."""

    def __init__(self, image: Path, port: Path) -> None:
        self._fd = os.open(image, os.O_RDWR | os.O_DIRECT)
        self._port = os.open(port, os.O_WRONLY)
        self._spacing = os.fstat(self._fd).st_size // _BLOCKS // BLOCK_BYTES * BLOCK_BYTES
        if not self._spacing:
            raise SystemExit(f"{image} has less than {_BLOCKS} blocks of {BLOCK_BYTES} bytes")
        self._run = secrets.token_hex(4)
        self._lock = threading.Lock()
        self._totals = dict.fromkeys(("writes", "reads", "mismatches", "errors"), 0)
        self.stop = threading.Event()

    def work(self) -> None:
        """Until `stop` is set and all is answered."""
        self._say(f"READY run={self._run} blocks={_BLOCKS} workers={_WORKERS} spacing={self._spacing} {_uptime()}")
        threads = [threading.Thread(target=self._worker, args=(number,)) for number in range(_WORKERS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        totals = " ".join(f"{name}={count}" for name, count in self._totals.items())
        self._say(f"DONE {totals} {_uptime()}")

    def _worker(self, number: int) -> None:
        buffer = mmap.mmap(-1, BLOCK_BYTES)  # on a page, as O_DIRECT wants it
        acknowledged: dict[int, int] = {}
        step = 0
        while not self.stop.wait(_PAUSE_S):
            block = step * _STRIDE % _SLOTS * _WORKERS + number
            passes = step // _SLOTS + 1
            acknowledged.pop(block, None)  # until the answer nobody knows what is there
            if self._step("write", passes, block, buffer):
                acknowledged[block] = passes
            earlier = max(step - step * 31 % _SLOTS, 0) * _STRIDE % _SLOTS * _WORKERS + number
            if earlier in acknowledged:
                self._step("read", acknowledged[earlier], earlier, buffer)
            step += 1

    def _step(self, operation: Operation, passes: int, block: int, buffer: mmap.mmap) -> bool:
        content = block_content(self._run, passes, block)
        what = f"IO pass={passes} block={block} op={operation}"
        self._say(f"{what} begin {_uptime()}")
        try:
            if operation == "write":
                buffer[:] = content
                whole = os.pwritev(self._fd, [buffer], block * self._spacing) == BLOCK_BYTES
                os.fsync(self._fd)
            else:
                whole = os.preadv(self._fd, [buffer], block * self._spacing) == BLOCK_BYTES
        except OSError as error:
            return self._ended(f"{what} ERROR {_uptime()} rc={error.errno} message={error.strerror}", "errors")
        if not whole or buffer[:] != content:
            return self._ended(f"{what} MISMATCH {_uptime()} message={buffer[:63]!r}", "mismatches")
        self._ended(f"{what} ok {_uptime()}", f"{operation}s")
        return True

    def _ended(self, line: str, total: str) -> bool:
        with self._lock:
            self._totals[total] += 1
        self._say(line)
        return False

    def _say(self, line: str) -> None:
        with self._lock:
            os.write(self._port, line.encode() + b"\n")


def _uptime() -> str:
    return f"uptime={Path('/proc/uptime').read_text().split()[0]}"


def main() -> None:
    """The command line."""
    image, port = sys.argv[1:]
    consumer = Consumer(Path(image), Path(port))
    signal.signal(signal.SIGTERM, lambda *_: consumer.stop.set())
    consumer.work()


if __name__ == "__main__":
    main()
