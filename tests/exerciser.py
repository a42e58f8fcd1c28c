"""A random exerciser of one file against a model in memory, after fsx.

    python -m tests.exerciser FILE BENEATH --mode aio --seconds 60 --seed 5

1. FILE is written, read, truncated, synced, closed and opened again, at random from the seed; each read must equal the model.
2. BENEATH is the same file where it is really stored. After each fsync that is answered 0, and at the end, it must equal the model.
3. On a difference it prints the seed, the last 50 operations and the offset, and exits with 1.
4. Modes: `buffered`; `direct` (O_DIRECT); `aio` (native AIO: many direct requests at once, overlapping ones too, which
   must land in the order of their submission: that is P4, and more than a plain disk promises).
"""

from __future__ import annotations

import argparse
import collections
import ctypes
import mmap
import os
import random
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

LARGEST = 2 << 20
"""Size of the file; the longest requests are a quarter of it."""
SECTOR = 512
BATCH = 64  # AIO requests at once
MODES = ("buffered", "direct", "aio")


class Mismatch(Exception):
    """The file is not what was written."""


# ---- native AIO


class _Iocb(ctypes.Structure):
    """struct iocb of linux/aio_abi.h, on a little-endian machine."""

    _fields_ = (
        ("data", ctypes.c_uint64),
        ("key", ctypes.c_uint32),
        ("rw_flags", ctypes.c_int32),
        ("opcode", ctypes.c_uint16),
        ("priority", ctypes.c_int16),
        ("fd", ctypes.c_uint32),
        ("buffer", ctypes.c_uint64),
        ("length", ctypes.c_uint64),
        ("offset", ctypes.c_int64),
        ("reserved", ctypes.c_uint64),
        ("flags", ctypes.c_uint32),
        ("eventfd", ctypes.c_uint32),
    )


class _Event(ctypes.Structure):
    """struct io_event of linux/aio_abi.h."""

    _fields_ = (
        ("data", ctypes.c_uint64),
        ("iocb", ctypes.c_uint64),
        ("result", ctypes.c_int64),
        ("result2", ctypes.c_int64),
    )


_OPCODES = {"read": 0, "write": 1, "fsync": 2, "fdatasync": 3}


@dataclass
class AioRequest:
    """One request of a batch; *area* is what it reads into or writes from."""

    name: str
    fd: int
    offset: int = 0
    area: memoryview = field(default_factory=lambda: memoryview(b""))
    result: int | None = None

    @property
    def length(self) -> int:
        return len(self.area)

    @property
    def end(self) -> int:
        return self.offset + self.length

    def overlaps(self, other: AioRequest) -> bool:
        return self.offset < other.end and other.offset < self.end


class Aio:
    """A context of native AIO, by way of libaio (Debian: libaio1, on which fio depends)."""

    def __init__(self, depth: int) -> None:
        self._lib = ctypes.CDLL("libaio.so.1")
        self._context = ctypes.c_void_p()
        self._check(self._lib.io_setup(depth, ctypes.byref(self._context)))

    @staticmethod
    def _check(result: int) -> int:
        if result < 0:
            raise OSError(-result, os.strerror(-result))
        return result

    def run(self, requests: Sequence[AioRequest], calls: Sequence[int]) -> None:
        """Submit *requests* in their order, *calls* of them with each io_submit, and wait for all results."""
        self.submit(requests, calls)
        self.wait(requests, len(requests))

    def submit(self, requests: Sequence[AioRequest], calls: Sequence[int]) -> None:
        """The first half of `run`. Their memory must last until they are answered."""
        iocbs = (_Iocb * len(requests))()
        for number, (request, iocb) in enumerate(zip(requests, iocbs, strict=True)):
            iocb.data, iocb.opcode, iocb.fd = number, _OPCODES[request.name], request.fd
            iocb.offset, iocb.length = request.offset, request.length
            if request.length:
                iocb.buffer = ctypes.addressof(ctypes.c_char.from_buffer(request.area))
        pointers = (ctypes.POINTER(_Iocb) * len(requests))(*(ctypes.pointer(iocb) for iocb in iocbs))
        first = 0
        for count in calls:
            end = first + count
            while first < end:
                rest = ctypes.byref(pointers, first * ctypes.sizeof(ctypes.c_void_p))
                first += self._check(self._lib.io_submit(self._context, ctypes.c_long(end - first), rest))

    def wait(self, requests: Sequence[AioRequest], count: int) -> list[int]:
        """The other half: wait for *count* results more. Returns whose they are, in the order in which they came."""
        events = (_Event * count)()
        total = ctypes.c_long(count)
        got = self._check(self._lib.io_getevents(self._context, total, total, events, None))
        assert got == count, f"{got} results of {count}"
        for event in events:
            requests[event.data].result = event.result
        return [event.data for event in events]

    def close(self) -> None:
        self._lib.io_destroy(self._context)


# ---- the exerciser


class Exerciser:
    """Random operations on *path*, each checked against a model; *beneath* is the same file on the disk."""

    def __init__(self, path: Path, beneath: Path, mode: str, seed: int) -> None:
        self._path = path
        self._beneath = beneath
        self._direct = mode != "buffered"
        self._random = random.Random(f"{mode} {seed}")
        self._model = bytearray()
        self._arena = memoryview(mmap.mmap(-1, 8 * LARGEST))
        self._log: collections.deque[str] = collections.deque(maxlen=50)
        self.done: collections.Counter[str] = collections.Counter()
        self._aio = Aio(2 * BATCH) if mode == "aio" else None
        self._handles = [self._open(os.O_RDWR | os.O_CREAT), self._open(os.O_RDWR), self._open_to_append()]
        self._operations = {
            self._read: 30,
            self._write: 30,
            self._append: 6,
            self._truncate: 5,
            self._sync: 7,
            self._reopen: 5,
            self._compare_size: 4,
        }
        if mode == "aio":
            self._operations |= {self._batch: 60, self._read: 4, self._write: 4}

    def run(self, seconds: float) -> None:
        """Operate for that long. Raises `Mismatch`, or OSError where the mount lets an error through."""
        end_s = time.monotonic() + seconds
        names, weights = zip(*self._operations.items(), strict=True)
        try:
            while time.monotonic() < end_s:
                self._random.choices(names, weights)[0]()
            self._sync()
            self._compare("at the end", self._read_all(), bytes(self._model), 0)
        finally:
            if self._aio is not None:
                self._aio.close()
            for fd in self._handles:
                os.close(fd)
        self._compare("beneath, after the last close", self._beneath.read_bytes(), bytes(self._model), 0)

    def history(self) -> str:
        """The last 50 operations."""
        return "\n".join(self._log)

    def _did(self, name: str, words: object = "") -> None:
        self.done[name] += 1
        self._log.append(f"{self.done.total():7}: {name} {words}")

    # ---- handles

    def _open(self, flags: int) -> int:
        if self._direct:
            flags |= os.O_DIRECT
        return os.open(self._path, flags, 0o600)

    def _open_to_append(self) -> int:
        return self._open(os.O_RDWR | os.O_APPEND)

    def _reopen(self) -> None:
        """Close one handle and open it anew; the last one is for appending."""
        number = self._random.randrange(len(self._handles))
        self._did("reopen", number)
        os.close(self._handles[number])
        if number == len(self._handles) - 1:
            self._handles[number] = self._open_to_append()
        else:
            self._handles[number] = self._open(os.O_RDWR | self._random.choice([0, 0, os.O_DSYNC, os.O_SYNC]))

    def _any(self) -> int:
        return self._random.choice(self._handles)

    def _positional(self) -> int:
        # pwrite(2): on a file opened with O_APPEND, Linux appends, regardless of the offset
        return self._random.choice(self._handles[:-1])

    # ---- ranges and memory

    def _length(self) -> int:
        length = int(2 ** self._random.uniform(0, 19))
        return -(-length // SECTOR) * SECTOR if self._direct else length

    def _offset(self, below: int) -> int:
        offset = self._random.randrange(below + 1)
        return offset // SECTOR * SECTOR if self._direct else offset

    def _area(self, length: int, at: int | None = None) -> memoryview:
        if at is None:
            at = self._random.randrange(4096 // SECTOR) * SECTOR
        return self._arena[at : at + length]

    def _random_area(self, length: int, at: int | None = None) -> memoryview:
        area = self._area(length, at)
        area[:] = self._random.randbytes(length)
        return area

    # ---- operations

    def _read(self) -> None:
        offset, area = self._offset(len(self._model)), self._area(self._length())
        self._did("read", f"{len(area)} at {offset}")
        got = os.preadv(self._any(), [area], offset)
        self._compare("a read", bytes(area[:got]), bytes(self._model[offset : offset + len(area)]), offset)

    def _write(self) -> None:
        length = self._length()
        offset = self._offset(min(len(self._model) + 65536, LARGEST - length))
        area = self._random_area(length)
        self._did("write", f"{length} at {offset}")
        got = os.pwrite(self._positional(), area, offset)
        self._expect(got, length)
        self._model.extend(bytes(max(0, offset - len(self._model))))
        self._model[offset : offset + length] = area

    def _append(self) -> None:
        area = self._random_area(min(self._length(), 65536))
        if len(self._model) + len(area) <= LARGEST:
            self._did("append", f"{len(area)} at {len(self._model)}")
            self._expect(os.write(self._handles[-1], area), len(area))
            self._model += area

    def _truncate(self) -> None:
        size = self._random.randrange(LARGEST)
        if self._random.random() < 0.7:  # mostly a little
            size = max(0, min(LARGEST, len(self._model) + self._random.randrange(-65536, 65536)))
        self._did("truncate", f"{len(self._model)} to {size}")
        os.ftruncate(self._any(), size)
        self._model[size:] = bytes(max(0, size - len(self._model)))

    def _sync(self) -> None:
        name, call = self._random.choice([("fsync", os.fsync), ("fdatasync", os.fdatasync)])
        self._did(name)
        call(self._any())
        self._compare(f"beneath, after {name}", self._beneath.read_bytes(), bytes(self._model), 0)

    def _compare_size(self) -> None:
        self._did("size", len(self._model))
        self._expect(os.fstat(self._any()).st_size, len(self._model))

    def _read_all(self) -> bytes:
        area = self._area(LARGEST + 4096, 0)
        return bytes(area[: os.preadv(self._handles[0], [area], 0)])

    # ---- many at once

    def _batch(self) -> None:
        """Reads and writes below the end of the file: the kernel lets those that make it grow go one at a time."""
        assert self._aio is not None
        if len(self._model) < LARGEST // 4:
            self._did("truncate", f"{len(self._model)} to {LARGEST}")
            os.ftruncate(self._any(), LARGEST)
            self._model.extend(bytes(LARGEST - len(self._model)))
        batch = self._disjoint() if self._random.random() < 0.4 else self._overlapping()
        if self._random.random() < 0.3:
            batch.insert(self._random.randrange(len(batch)), AioRequest("fdatasync", self._any()))
        calls = self._parts(len(batch))
        self._did("batch", f"of {len(batch)}, submitted by {calls}")
        for request in batch:
            self._did(f"aio {request.name}", f"{request.length} at {request.offset}")
        self._aio.run(batch, calls)
        for number, request in enumerate(batch):
            self._expect(request.result, request.length, f"{request.name} {request.length} at {request.offset}")
            if request.name == "write":
                self._model[request.offset : request.end] = request.area
            elif request.name == "read":
                self._compare_aio(request, batch[number + 1 :])

    def _disjoint(self) -> list[AioRequest]:
        count = self._random.randint(2, BATCH)
        sectors = len(self._model) // SECTOR
        bounds = sorted(self._random.sample(range(sectors + 1), 2 * count))
        batch = [
            self._request(first * SECTOR, end * SECTOR) for first, end in zip(bounds[::2], bounds[1::2], strict=True)
        ]
        self._random.shuffle(batch)
        return self._with_memory(batch)

    def _overlapping(self) -> list[AioRequest]:
        zone = 128 * SECTOR
        first = self._random.randrange((len(self._model) - zone) // SECTOR) * SECTOR
        batch = []
        for _ in range(self._random.randint(2, BATCH)):
            start, end = sorted(self._random.sample(range(zone // SECTOR + 1), 2))
            batch.append(self._request(first + start * SECTOR, first + end * SECTOR))
        return self._with_memory(batch)

    def _request(self, offset: int, end: int) -> AioRequest:
        name = "read" if self._random.random() < 0.3 else "write"
        return AioRequest(name, self._positional(), offset, memoryview(bytes(end - offset)))

    def _with_memory(self, batch: list[AioRequest]) -> list[AioRequest]:
        at = 0
        for request in batch:
            place = self._random_area if request.name == "write" else self._area
            request.area = place(request.length, at)
            at += request.length
        return batch

    def _parts(self, total: int) -> list[int]:
        """All with one io_submit, or by a few at a time."""
        if self._random.random() < 0.5:
            return [total]
        parts: list[int] = []
        while sum(parts) < total:
            parts.append(min(self._random.randint(1, 8), total - sum(parts)))
        return parts

    def _compare_aio(self, read: AioRequest, later: Sequence[AioRequest]) -> None:
        """Each byte is as the requests before this one left it, or as one that was submitted after it and overlaps it wrote."""
        expected = bytearray(self._model[read.offset : read.end])
        got = bytes(read.area)
        for write in later:
            if got == expected:
                return
            if write.name == "write" and write.overlaps(read):
                first, end = max(read.offset, write.offset), min(read.end, write.end)
                for place in range(first, end):
                    if got[place - read.offset] == write.area[place - write.offset]:
                        expected[place - read.offset] = got[place - read.offset]
        self._compare("an aio read", got, bytes(expected), read.offset)

    # ---- checks

    def _expect(self, got: int | None, wanted: int, what: str = "") -> None:
        if got != wanted:
            words = os.strerror(-got) if got is not None and got < 0 else got
            raise Mismatch(f"{what or self._log[-1]}: the result is {words}, not {wanted}")

    @staticmethod
    def _compare(what: str, got: bytes, wanted: bytes, offset: int) -> None:
        if got == wanted:
            return
        place = first_difference(got, wanted)
        raise Mismatch(
            f"{what}: the first difference is at offset {offset + place} (the block at {(offset + place) // 4096 * 4096}): "
            f"{got[place : place + 16].hex() or 'the end'}, not {wanted[place : place + 16].hex() or 'the end'}; "
            f"{len(got)} bytes, not {len(wanted)}; {sum(a != b for a, b in zip(got, wanted, strict=False))} of them differ"
        )


def first_difference(one: bytes, other: bytes) -> int:
    """Where the two begin to differ; the shorter one's length if it is the beginning of the other."""
    for start in range(0, min(len(one), len(other)), 4096):
        if one[start : start + 4096] != other[start : start + 4096]:
            pairs = zip(one[start : start + 4096], other[start : start + 4096], strict=False)
            return next((start + n for n, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))
    return min(len(one), len(other))


def main() -> int:
    """Exercise one file; 0 if all was as it should be."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("beneath", type=Path, help="the same file where it is stored")
    parser.add_argument("--mode", choices=MODES, default="buffered")
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument("--seed", type=int, default=random.randrange(1_000_000))
    args = parser.parse_args()
    exerciser = Exerciser(args.file, args.beneath, args.mode, args.seed)
    try:
        exerciser.run(args.seconds)
    except (Mismatch, OSError) as error:
        print(f"{exerciser.history()}\nexerciser: mode {args.mode}, seed {args.seed}: {error!r}")  # noqa: T201
        return 1
    counts = ", ".join(f"{count} {name}" for name, count in sorted(exerciser.done.items()))
    print(f"exerciser: mode {args.mode}, seed {args.seed}: {exerciser.done.total()} operations: {counts}")  # noqa: T201
    return 0


if __name__ == "__main__":
    sys.exit(main())
