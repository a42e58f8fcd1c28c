"""QEMU's own block layer on the mount, through outages: raw and qcow2, both cache modes, each kind of asynchronous I/O."""

from __future__ import annotations

import random
import subprocess
import threading
from typing import TYPE_CHECKING

import pytest

from tests.harness import wait_until

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.interop.conftest import Rig

MIB = 1 << 20
SIZES = (8 * MIB, MIB + 512)
CACHES = ("none", "writeback")
SECTOR = 512
REQUESTS = 16  # at once
OUTAGES = 2
OUTAGE_S = 2.5


class Guest:
    """A qemu-io that writes, flushes and reads back, round after round, and what its image must hold in the end."""

    def __init__(self, qemu_io: str, image: Path, size: int, image_format: str, cache: str, aio: str) -> None:
        self.image = image
        self.expected = bytearray(size)
        self.rounds = 0
        self._random = random.Random(f"{image.name} {size}")
        self._stop = threading.Event()
        self._process = subprocess.Popen(
            [qemu_io, "-f", image_format, "-t", cache, "-i", aio, str(image)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            # Full after two rounds or so: the feeder is never far ahead of a qemu-io that waits for the mount.
            pipesize=4096,
        )
        self._output = ""
        self._feeder = threading.Thread(target=self._feed)
        self._drainer = threading.Thread(target=self._drain)
        self._feeder.start()
        self._drainer.start()

    def finish(self) -> None:
        """Let qemu-io end its round; fails with its output if it has seen any error or wrong byte."""
        self._stop.set()
        self._feeder.join(60)
        self._drainer.join(60)
        assert self._process.wait(60) == 0, self._output
        assert not self._output, self._output  # all commands are quiet ones

    def _feed(self) -> None:
        assert self._process.stdin is not None
        with self._process.stdin as commands:
            while not self._stop.is_set():
                try:
                    commands.write(self._round())
                    commands.flush()
                except BrokenPipeError:
                    return
                self.rounds += 1

    def _drain(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as output:
            self._output = output.read().replace("qemu-io> ", "").strip()

    def _round(self) -> str:
        """Commands that write some ranges at once, the image's last sector always among them, and verify each."""
        sectors = len(self.expected) // SECTOR
        bounds = sorted(self._random.sample(range(sectors - 1), 2 * REQUESTS - 2))
        ranges = [
            (start * SECTOR, min(end - start, 128) * SECTOR, self._random.randrange(1, 256))
            for start, end in zip(bounds[::2], bounds[1::2], strict=True)
        ]
        ranges.append(((sectors - 1) * SECTOR, SECTOR, self._random.randrange(1, 256)))
        for offset, length, pattern in ranges:
            self.expected[offset : offset + length] = bytes([pattern]) * length
        writes = [f"aio_write -q -P {pattern} {offset} {length}" for offset, length, pattern in ranges]
        reads = [f"aio_read -q -P {pattern} {offset} {length}" for offset, length, pattern in ranges]
        return "\n".join([*writes, "aio_flush", "flush", *reads, "aio_flush", ""])


@pytest.fixture
def qemu_io(program: Callable[[str, str], str]) -> str:
    return program("qemu-io", "qemu-utils")


@pytest.fixture
def qemu_img(program: Callable[[str, str], str]) -> str:
    return program("qemu-img", "qemu-utils")


def need_aio(qemu_io: str, directory: Path, aio: str) -> None:
    """Skip where this machine has no such I/O on a plain file either."""
    plain = directory / "plain"
    plain.write_bytes(bytes(MIB))
    command = [qemu_io, "-f", "raw", "-t", "none", "-i", aio, "-c", f"read 0 {MIB}", str(plain)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if aio == "io_uring" and done.returncode:
        pytest.skip(f"this kernel or its seccomp filter refuses io_uring: {done.stderr}")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("aio", ["threads", "native", "io_uring"])
@pytest.mark.parametrize("image_format", ["raw", "qcow2"])
def test_qemu_sees_no_error_and_every_byte_is_right(
    rig: Rig, qemu_io: str, qemu_img: str, tmp_path: Path, image_format: str, aio: str
) -> None:
    """P1 for QEMU, also with an image whose last sector ends beyond the last 4096 bytes, and cache=none."""
    need_aio(qemu_io, rig.disk, aio)
    guests = {}
    for size in SIZES:
        for cache in CACHES:
            if (cache, aio) == ("writeback", "native"):
                continue  # QEMU's own rule, tested below
            name = f"{size}-{cache}.{image_format}"
            image = rig.mount.mountpoint / name
            subprocess.run([qemu_img, "create", "-q", "-f", image_format, image, str(size)], check=True)
            guests[name] = Guest(qemu_io, image, size, image_format, cache, aio)
    try:
        for _ in range(OUTAGES):
            wait_for_rounds(guests)
            with rig.outage(OUTAGE_S):
                pass
        wait_for_rounds(guests)
    finally:
        failures = []
        for name, guest in guests.items():
            try:
                guest.finish()
            except AssertionError as failure:
                failures.append(f"{name}: {failure}")
    assert not failures, "\n".join(failures)

    for name, guest in guests.items():
        on_disk = rig.disk / name
        if image_format == "raw":
            assert on_disk.read_bytes() == guest.expected, f"{name} is not what was written"
        else:
            expected = tmp_path / "expected"
            expected.write_bytes(guest.expected)
            for command in (
                [qemu_img, "check", "-f", "qcow2", str(on_disk)],
                [qemu_img, "compare", "-f", "qcow2", "-F", "raw", str(on_disk), str(expected)],
            ):
                done = subprocess.run(command, capture_output=True, text=True, check=False)
                assert done.returncode == 0, f"{name}: {command}: {done.stdout}{done.stderr}"


def wait_for_rounds(guests: dict[str, Guest], more: int = 3) -> None:
    enough = {name: guest.rounds + more for name, guest in guests.items()}
    wait_until(
        lambda: all(guest.rounds >= enough[name] for name, guest in guests.items()),
        timeout_s=60,
        what=f"{more} more rounds of each",
    )


def test_native_aio_wants_direct_io_on_the_mount_as_on_source(rig: Rig, qemu_io: str) -> None:
    """Why the matrix above has no native aio with cache=writeback."""
    (rig.disk / "disk.img").write_bytes(bytes(MIB))
    for directory in (rig.disk, rig.mount.mountpoint):
        command = [qemu_io, "-f", "raw", "-t", "writeback", "-i", "native", "-c", "read 0 512"]
        done = subprocess.run([*command, directory / "disk.img"], capture_output=True, text=True, check=False)
        assert done.returncode == 1
        assert "requires cache.direct=on" in done.stderr
