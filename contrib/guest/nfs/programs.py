"""Inside the Debian guest: other people's programs as consumers, each on a file of its own, and what they say of it.

1. All are processes that are started before the outage, by one that has no file open on the mounts: close(2) of an inherited
   descriptor with unwritten data waits for the server.
2. What a program was told is safe is compared with what is in the file, which is read at the server, beneath NFS.
3. Nothing here waits without a limit; a program that does not end is killed, and that is said.
"""

from __future__ import annotations

import collections
import errno
import json
import random
import signal
import struct
import subprocess
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from collections.abc import Iterator

END_LIMIT_S = 60.0
"""For a program's end, once it has been asked. Bare programs may have to wait for the mount's errors."""

_GOES_ON_AFTER = ":".join(str(number) for number in (errno.EIO, errno.EILSEQ, errno.ETIMEDOUT))
"""What fio's continue_on_error is to mean: by itself the first two, and a `softerr` mount's error would end it."""


class Program(Protocol):
    """What apps.py does with each."""

    name: str

    def works(self, since_s: float) -> bool:
        """Whether something that began then or later has gone well."""

    @property
    def gone(self) -> bool:
        """Whether it has ended by itself."""

    def stop(self) -> None:
        """Ask it to end, and return at once."""

    def verdict(self) -> dict[str, Any]:
        """Wait for its end, and compare."""


class Fio:
    """fio: direct, four at once, reads back and verifies what it has written while it goes on. Errors do not end it.

    Each sector has a header with its own place in the file. Every place is written once, so an acknowledged block that is not
    on the server is seen: it is still zero.
    """

    BYTES = 64 << 20
    _BLOCK, _SECTOR = 4096, 512
    _HEADER = struct.Struct("<HHIQQ")  # magic, type, length, seed, offset: fio's verify.h
    _MAGIC = 0xACCA

    def __init__(self, file: Path, beneath: Path, folder: Path) -> None:
        self.name = "fio"
        self._beneath = beneath
        self._logs = folder / f"{beneath.name}.fio"
        self._last: tuple[float, int] = (0.0, 0)
        with beneath.open("wb") as made:
            made.truncate(self.BYTES)
        beneath.chmod(0o666)
        self._process = subprocess.Popen(
            [
                "fio", "--name=job", f"--filename={file}", f"--size={self.BYTES}", "--rw=randwrite",
                f"--bs={self._BLOCK}", "--ioengine=libaio", "--iodepth=4", "--direct=1", "--fallocate=none",
                "--rate_iops=40", "--time_based", "--runtime=900", "--randseed=2020", "--continue_on_error=all",
                f"--ignore_error={','.join(3 * [_GOES_ON_AFTER])}",
                "--verify=crc32c", f"--verify_interval={self._SECTOR}", "--verify_backlog=16", "--verify_fatal=0",
                f"--write_lat_log={self._logs}", "--log_offset=1", "--output-format=json",
            ],
            cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    def works(self, since_s: float) -> bool:
        """By the blocks that the server has of the file: fio tells nothing before its end."""
        blocks = self._beneath.stat().st_blocks
        at_s, seen = self._last
        if at_s < since_s:
            self._last = (time.monotonic(), blocks)
            return False
        return blocks > seen

    @property
    def gone(self) -> bool:
        """Of an error that it takes as fatal."""
        return self._process.poll() is not None

    def stop(self) -> None:
        """SIGINT: it ends what is in flight, and reports."""
        self._process.send_signal(signal.SIGINT)

    def verdict(self) -> dict[str, Any]:
        """The errors that fio counts, and the blocks that its log calls done."""
        try:
            out, err = self._process.communicate(timeout=END_LIMIT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            return {"ended": False}
        if "{" not in out:
            return {"ended": True, "calls": 0, "acknowledged": 0, "errors": {err or out: 1}, "longest_s": 0.0}
        job = json.loads(out[out.index("{") : out.rindex("}") + 1])["jobs"][0]
        lines = [line for line in err.splitlines() if line.startswith("fio:") and "signal" not in line]
        done = sorted(set(self._written()))
        return {
            "ended": True,
            "calls": job["read"]["total_ios"] + job["write"]["total_ios"],
            "acknowledged": len(done),
            "errors": {name: job[name] for name in ("error", "total_err", "first_error") if job.get(name)},
            "first_lines": lines[:5],
            "longest_s": round(max(job[each]["clat_ns"]["max"] for each in ("read", "write")) / 1e9, 1),
            "lost": self._lost(done),
            "misread": sum("verify" in line and "bad" in line for line in lines),
        }

    def _written(self) -> Iterator[int]:
        """The offsets of the writes that were acknowledged: time, latency, direction, size, offset, priority."""
        with Path(f"{self._logs}_clat.1.log").open() as log:
            for line in log:
                words = line.split(",")
                if int(words[2]) == 1:
                    yield int(words[4])

    def _lost(self, offsets: list[int]) -> int:
        """How many of the blocks are not there, all of their sectors."""
        lost = 0
        with self._beneath.open("rb") as file:
            for offset in offsets:
                file.seek(offset)
                block = file.read(self._BLOCK)
                lost += not all(
                    self._header(block, at) == (self._MAGIC, self._SECTOR, offset + at)
                    for at in range(0, self._BLOCK, self._SECTOR)
                )
        return lost

    def _header(self, block: bytes, at: int) -> tuple[int, int, int]:
        magic, _, length, _, offset = self._HEADER.unpack_from(block, at)
        return magic, length, offset


class QemuIo:
    """qemu-io with one of QEMU's cache modes: some writes, a flush, and each read back, command after command.

    A write is acknowledged when a flush after it has gone well. What failed may be there or not, page by page.
    """

    _SLOTS, _SLOT, _PAGE = 32, 65536, 4096
    _WRITES = 3
    _PAUSE_S = 0.3

    def __init__(self, file: Path, beneath: Path, cache: str) -> None:
        self.name = f"qemu-io {cache}"
        self._beneath = beneath
        self._random = random.Random(beneath.name)  # noqa: S311
        self._may_be = [{0} for _ in range(self._SLOTS)]  # as the file is made
        self._errors: collections.Counter[str] = collections.Counter()
        self._took: list[tuple[float, float, bool]] = []  # began, took, well
        self._misread = self._acknowledged = 0
        self._stop = threading.Event()
        beneath.write_bytes(bytes(self._SLOTS * self._SLOT))
        beneath.chmod(0o666)
        aio = "native" if cache == "none" else "threads"
        self._process = subprocess.Popen(
            ["qemu-io", "-f", "raw", "-t", cache, "-i", aio, str(file)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, bufsize=0,
        )  # fmt: skip
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def works(self, since_s: float) -> bool:
        """Commands after then."""
        return any(well and began_s >= since_s for began_s, _, well in list(self._took))

    @property
    def gone(self) -> bool:
        """Its process."""
        return self._process.poll() is not None

    def stop(self) -> None:
        """After the round that it is in."""
        self._stop.set()

    def verdict(self) -> dict[str, Any]:
        """What went wrong, and the slots that hold what they must not."""
        self._thread.join(END_LIMIT_S)
        if ended := not self._thread.is_alive():
            try:
                self._process.wait(END_LIMIT_S)
            except subprocess.TimeoutExpired:
                ended = False
        if not ended:
            self._process.kill()
        return {
            "ended": ended,
            "calls": len(self._took),
            "acknowledged": self._acknowledged,
            "errors": dict(self._errors),
            "longest_s": round(max(took_s for _, took_s, _ in self._took), 1),
            "lost": self._lost(),
            "misread": self._misread,
        }

    def _work(self) -> None:
        assert self._process.stdin is not None
        self._answer()  # the first prompt
        number = 0
        while not self._stop.wait(self._PAUSE_S):
            written: dict[int, int] = {}
            for slot in self._random.sample(range(self._SLOTS), self._WRITES):
                number += 1
                pattern = number % 255 + 1
                self._may_be[slot].add(pattern)
                if self._do(f"write -q -P {pattern} {slot * self._SLOT} {self._SLOT}"):
                    written[slot] = pattern
            if self._do("flush"):
                for slot, pattern in written.items():
                    self._may_be[slot] = {pattern}
                    self._acknowledged += 1
            for slot, pattern in written.items():
                self._do(f"read -q -P {pattern} {slot * self._SLOT} {self._SLOT}")
        self._process.stdin.close()

    def _do(self, command: str) -> bool:
        """Whether it went well; it says nothing then."""
        assert self._process.stdin is not None
        began_s = time.monotonic()
        try:
            self._process.stdin.write(command.encode() + b"\n")
            said = self._answer()
        except OSError as error:
            said = f"gone: {error}"
        if "Pattern verification failed" in said:
            self._misread += 1
        elif said:
            self._errors[f"{command.split(maxsplit=1)[0]}: {said}"] += 1
        self._took.append((began_s, time.monotonic() - began_s, not said))
        return not said

    def _answer(self) -> str:
        """What is said before the next prompt."""
        assert self._process.stdout is not None
        said = b""
        while not said.endswith(b"qemu-io> "):
            more = self._process.stdout.read(4096)
            if not more:
                break
            said += more
        return said.decode().replace("qemu-io> ", "").strip()

    def _lost(self) -> int:
        data = self._beneath.read_bytes()
        lost = 0
        for slot, allowed in enumerate(self._may_be):
            whole = data[slot * self._SLOT : (slot + 1) * self._SLOT]
            pages = [whole[at : at + self._PAGE] for at in range(0, self._SLOT, self._PAGE)]
            lost += not all(page == page[:1] * self._PAGE and page[0] in allowed for page in pages)
        return lost
