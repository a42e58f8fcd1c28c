"""Inside the Debian guest: consumers that go on after an error, and know what each block must hold.

1. A direct consumer is a QEMU with cache=none: O_DIRECT writes, each answer final. A buffered one is a QEMU with cache=writeback:
   a write, and then an fsync, which is asked again until it says 0.
2. Like QEMU they hold a shared lock on a byte of the image, which NFS 4 passes on to its server.
3. A block is *lost* if it holds something else than the last write that was acknowledged, or a later one that was not. What a
   consumer reads back is compared, too.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import struct
import threading
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

BLOCK_BYTES = 4096

Mode = Literal["direct", "buffered"]

_PAUSE_S = 0.25
"""Between two steps: the guest's CPU is emulated, and there are two dozen consumers."""

_LOCK_BYTE = 100  # where QEMU has its own (block/file-posix.c)


@dataclass(frozen=True, slots=True)
class Step:
    """One system call: when, and how it ended (0, or an errno)."""

    call: str
    began_s: float
    ended_s: float
    errno: int


@dataclass(slots=True)
class Block:
    """What a block may hold: one of these numbers of writes."""

    acknowledged: int | None = None
    unknown: set[int] = field(default_factory=set)

    def allows(self, number: int | None) -> bool:
        """None: the block as it was made."""
        return number == self.acknowledged or number in self.unknown


class Consumer(threading.Thread):
    """I/O on one image until `stop`. *blocks*: after so many it begins again with the first."""

    def __init__(self, image: Path, mode: Mode, blocks: int) -> None:
        super().__init__(daemon=True)
        self.mode = mode
        self.steps: list[Step] = []
        self.blocks = [Block() for _ in range(blocks)]
        self.misread = 0
        self.stop = threading.Event()
        self._name = image.name.encode()
        self._fd = os.open(image, os.O_RDWR | (os.O_DIRECT if mode == "direct" else 0))
        _lock(self._fd)

    def run(self) -> None:
        """The thread."""
        number = 0
        buffer = mmap.mmap(-1, BLOCK_BYTES)  # on a page, as O_DIRECT wants it
        while not self.stop.wait(_PAUSE_S):
            index = number % len(self.blocks)
            self._write(index, number, buffer)
            self._read_back(max(index - 3, 0), buffer)
            number += 1
        # Closed last: close(2) may wait for what is not written.
        self._do("close", lambda: os.close(self._fd))

    def verify(self, image: Path) -> int:
        """How many blocks of *image*, as the server has it, hold what they must not."""
        data = image.read_bytes()
        wrong = 0
        for index, block in enumerate(self.blocks):
            found = data[index * BLOCK_BYTES : (index + 1) * BLOCK_BYTES]
            wrong += not any(found == self._content(number) for number in {block.acknowledged, *block.unknown})
        return wrong

    def _write(self, index: int, number: int, buffer: mmap.mmap) -> None:
        block = self.blocks[index]
        block.unknown.add(number)
        buffer[:] = self._content(number)
        written = self._do("write", lambda: _whole(os.pwritev(self._fd, [buffer], index * BLOCK_BYTES)))
        if written and self.mode == "buffered":
            # Who asks a second time is told the lie, where there is one.
            while not self._do("fsync", lambda: os.fsync(self._fd)):
                if self.stop.wait(_PAUSE_S):
                    return
        if written:
            block.acknowledged = number
            block.unknown.clear()

    def _read_back(self, index: int, buffer: mmap.mmap) -> None:
        block = self.blocks[index]
        if self._do("read", lambda: _whole(os.preadv(self._fd, [buffer], index * BLOCK_BYTES))):
            self.misread += not any(
                buffer[:] == self._content(number) for number in {block.acknowledged, *block.unknown}
            )

    def _content(self, number: int | None) -> bytes:
        if number is None:
            return bytes(BLOCK_BYTES)
        return struct.pack("64s", b"%s %d" % (self._name[:48], number)) * (BLOCK_BYTES // 64)

    def _do(self, name: str, call: object) -> bool:
        began_s = time.monotonic()
        number = 0
        try:
            call()  # type: ignore[operator]
        except OSError as error:
            number = error.errno or errno.EIO
        self.steps.append(Step(name, began_s, time.monotonic(), number))
        return not number


class Looker(threading.Thread):
    """Asks for the attributes of an image, by its name, once a second."""

    def __init__(self, image: Path) -> None:
        super().__init__(daemon=True)
        self.steps: list[Step] = []
        self.stop = threading.Event()
        self._image = image

    def run(self) -> None:
        """The thread."""
        while not self.stop.wait(1):
            began_s = time.monotonic()
            number = 0
            try:
                self._image.stat()
            except OSError as error:
                number = error.errno or errno.EIO
            self.steps.append(Step("stat", began_s, time.monotonic(), number))


def _whole(count: int) -> None:
    if count != BLOCK_BYTES:
        raise OSError(errno.ENODATA, "short")


def _lock(fd: int) -> None:
    """As QEMU does: an open file description's own lock, shared."""
    lock = struct.pack("hhqqi4x", fcntl.F_RDLCK, os.SEEK_SET, _LOCK_BYTE, 1, 0)
    fcntl.fcntl(fd, fcntl.F_OFD_SETLK, lock)


def since(steps: Sequence[Step], began_s: float) -> list[Step]:
    """Those that began at *began_s* or later."""
    return [step for step in steps if step.began_s >= began_s]
