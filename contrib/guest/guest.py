"""A real guest under QEMU (TCG) that does I/O all the time and says how it goes: for tests and rehearsals.

    with Guest(build(), Path("/mnt/iohang/disk.img"), log=Path("guest.log")) as guest:
        ...                                  # the outage, and its end
        print(guest.longest_pause_s, guest.errors, guest.kernel_io_errors)
        guest.finish()
    assert not verify_image(Path("/srv/nfs/vm/disk.img"), guest.records).mismatches

machine.py is QEMU's life and its ports, records.py knows what the lines mean, kernel.py what is booted, init.sh is what
runs inside. debian/ has a guest that boots Debian with systemd.
"""

from __future__ import annotations

import secrets
import threading
from typing import TYPE_CHECKING, Self

from contrib.guest.kernel import GuestUnavailableError, Kernel, build, default_cache
from contrib.guest.machine import QEMU, Machine
from contrib.guest.records import (
    BLOCK_BYTES,
    DmesgEnd,
    Done,
    KernelMessage,
    Mismatch,
    Ready,
    Record,
    Report,
    Step,
    Stream,
    Tick,
    block_content,
    in_flight,
    longest_pause_s,
    parse_record,
    verify_image,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

__all__ = [
    "BLOCK_BYTES",
    "DmesgEnd",
    "Done",
    "Guest",
    "GuestUnavailableError",
    "Kernel",
    "KernelMessage",
    "Mismatch",
    "Ready",
    "Record",
    "Report",
    "Step",
    "Stream",
    "Tick",
    "block_content",
    "build",
    "default_cache",
    "verify_image",
]

_CONSOLE, _RECORDS = "console", "records"
"""The two serial ports: the kernel's own (ttyS0), and the workload's (ttyS1), whose lines no printk may cut."""

_STRIDE = 37
"""init.sh visits the blocks of a worker in steps of this prime, so it must not divide their number."""


class Guest:
    """QEMU on one image, from `start()` to `stop()`, or as a context manager; each object runs once.

    *image* is a path, or any file name that QEMU takes (then mostly with `aio=None`). *werror*, *rerror*:
    QEMU's own defaults where None. *blocks* blocks of 4 KiB, evenly spread over the image, are shared by
    *workers* processes, each of which has one request in flight at a time. The guest's I/O ends after
    *duration_s* seconds (0: never), or with `finish()`. Before that one dd writes *dd_mib* MiB to the image, over whatever is
    there, and one reads them (0: none); `streams` says how long each took. All that the guest and QEMU say goes to *log* as it
    comes. *qmp* is where QEMU listens for QMP, for the caller's use.
    """

    def __init__(
        self,
        kernel: Kernel,
        image: Path | str,
        *,
        log: Path,
        cache: str = "none",
        aio: str | None = "native",
        image_format: str = "raw",
        werror: str | None = None,
        rerror: str | None = None,
        memory_mib: int = 256,
        blocks: int = 128,
        workers: int = 2,
        duration_s: int = 0,
        dd_mib: int = 0,
        qmp: Path | None = None,
        qemu_arguments: Sequence[str] = (),
    ) -> None:
        if blocks % workers or blocks // workers % _STRIDE == 0:
            raise ValueError(
                f"{blocks} blocks for {workers} workers: need a multiple, whose quotient is none of {_STRIDE}"
            )
        drive = f"file={str(image).replace(',', ',,')},format={image_format},if=none,id=d,cache={cache}"
        for name, value in (("aio", aio), ("werror", werror), ("rerror", rerror)):
            drive += f",{name}={value}" if value else ""
        append = (
            # panic=-1 and -no-reboot: a panic ends QEMU. loglevel=5: errors are seen as they occur.
            f"console=ttyS0 loglevel=5 panic=-1 iohang_run={secrets.token_hex(4)} iohang_blocks={blocks}"
            f" iohang_workers={workers} iohang_duration_s={duration_s} iohang_dd_mib={dd_mib}"
        )
        command = [
            *QEMU, "-m", f"{memory_mib}M", "-no-reboot", "-monitor", "none",
            "-kernel", str(kernel.vmlinuz), "-initrd", str(kernel.initramfs), "-append", append,
            "-drive", drive, "-device", "virtio-blk-pci,drive=d",
            *(["-qmp", f"unix:{qmp},server=on,wait=off"] if qmp else []),
            *qemu_arguments,
        ]  # fmt: skip
        self._lock = threading.Lock()
        self._records: list[Record] = []
        self._unparsed: list[str] = []
        ports = {name: ["-serial", f"chardev:{name}"] for name in (_CONSOLE, _RECORDS)}
        self._machine = Machine(command, ports, self._take, log)

    # Life

    def start(self) -> None:
        """Start QEMU; raises OSError if it cannot be."""
        self._machine.start()

    def wait_ready(self, timeout_s: float = 60) -> Ready:
        """Wait until the guest has booted and its I/O starts."""
        self.wait_for(lambda: self.ready, timeout_s, "the guest to boot")
        assert self.ready is not None
        return self.ready

    def wait_for(self, condition: Callable[[], object], timeout_s: float, what: str) -> None:
        """Poll *condition* until it is true.

        Raises RuntimeError if QEMU ends before that, TimeoutError after *timeout_s*.
        """
        self._machine.wait_for(condition, timeout_s, what)

    def say(self, word: str) -> None:
        """Send the guest a word: stop, dmesg, poweroff; raises RuntimeError if QEMU has ended."""
        self._machine.say(_RECORDS, word)

    def finish(self, timeout_s: float = 60) -> Done:
        """End the guest's I/O, wait until all of it is answered and for the guest's totals, then stop."""
        self.say("stop")
        self.wait_for(lambda: self.done, timeout_s, "the guest's totals")
        assert self.done is not None
        self.stop()
        return self.done

    def dmesg(self, timeout_s: float = 30) -> list[str]:
        """The guest's whole kernel log."""
        before = len(self.records)
        self.say("dmesg")
        self.wait_for(lambda: any(isinstance(record, DmesgEnd) for record in self.records[before:]), timeout_s, "dmesg")
        new = self.records[before:]
        return [record.text for record in new if isinstance(record, KernelMessage) and record.source == "dmesg"]

    def stop(self, timeout_s: float = 10) -> None:
        """Power the guest off, else SIGTERM, else SIGKILL; returns when QEMU is gone. Safe to repeat.

        Raises TimeoutError if QEMU outlives even SIGKILL: then one of its requests is still unanswered.
        """
        if self.running:
            try:
                self.say("poweroff")
            except RuntimeError:
                timeout_s = 0
            if not self._machine.gone(timeout_s):
                self._machine.terminate()
                self._machine.gone(timeout_s / 2)
        self.kill()

    def kill(self) -> None:
        """SIGKILL at once, as a crash of the host would; raises TimeoutError as stop() does."""
        self._machine.kill()

    def __enter__(self) -> Self:
        try:
            self.start()
            self.wait_ready()
        except BaseException:
            self.kill()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, *exc: object) -> None:
        if kind is None:
            self.stop()
        else:
            self.kill()

    @property
    def running(self) -> bool:
        """Whether there is a QEMU."""
        return self._machine.running

    @property
    def pid(self) -> int:
        """QEMU's process id; raises RuntimeError before start()."""
        return self._machine.pid

    # What the guest has said

    @property
    def records(self) -> tuple[Record, ...]:
        """Everything so far, in order of arrival."""
        with self._lock:
            return tuple(self._records)

    @property
    def unparsed(self) -> tuple[str, ...]:
        """Lines of the record port that are no record: none, unless something is wrong."""
        with self._lock:
            return tuple(self._unparsed)

    @property
    def ready(self) -> Ready | None:
        """None until the guest has booted."""
        return next((record for record in self.records if isinstance(record, Ready)), None)

    @property
    def done(self) -> Done | None:
        """None until the guest's I/O has ended."""
        return next((record for record in reversed(self.records) if isinstance(record, Done)), None)

    @property
    def streams(self) -> tuple[Stream, ...]:
        """The dd's that have ended, well or not."""
        return tuple(record for record in self.records if isinstance(record, Stream))

    @property
    def last_tick(self) -> Tick | None:
        """The latest sign of life of the guest's clock and CPU."""
        return next((record for record in reversed(self.records) if isinstance(record, Tick)), None)

    @property
    def steps(self) -> tuple[Step, ...]:
        """The I/O steps that have ended, well or not."""
        return tuple(record for record in self.records if isinstance(record, Step) and record.outcome != "begin")

    @property
    def errors(self) -> tuple[Step, ...]:
        """The steps that failed or read wrong bytes."""
        return tuple(step for step in self.steps if step.outcome != "ok")

    @property
    def in_flight(self) -> tuple[Step, ...]:
        """The steps that have begun and not ended, at most one for each worker."""
        return in_flight(self.records)

    @property
    def longest_pause_s(self) -> float:
        """The longest time without a completed step, by the guest's clock; one that lasts counts too."""
        return longest_pause_s(self.records)

    @property
    def kernel_io_errors(self) -> tuple[str, ...]:
        """The guest kernel's lines about failed I/O, from its console or at the end, each once."""
        messages = (record for record in self.records if isinstance(record, KernelMessage) and record.is_io_error)
        return tuple(dict.fromkeys(message.text for message in messages))

    def _take(self, port: str, line: str, now_s: float) -> None:
        record = KernelMessage(line, "console", now_s) if port == _CONSOLE else parse_record(line, now_s)
        with self._lock:
            if record is not None:
                self._records.append(record)
            else:
                self._unparsed.append(line)
