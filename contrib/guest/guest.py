"""A real guest under QEMU (TCG) that does I/O all the time and says how it goes: for tests and rehearsals.

    with Guest(build(), Path("/mnt/iohang/disk.img"), log=Path("guest.log")) as guest:
        ...                                  # the outage, and its end
        print(guest.longest_pause_s, guest.errors, guest.kernel_io_errors)
        guest.finish()
    assert not verify_image(Path("/srv/nfs/vm/disk.img"), guest.records).mismatches

What lives here is QEMU's life and the two serial ports; records.py knows what the lines mean, kernel.py what
is booted, init.sh is what runs inside.
"""

from __future__ import annotations

import secrets
import selectors
import socket
import subprocess
import threading
import time
from typing import TYPE_CHECKING, Self

from contrib.guest.kernel import GuestUnavailableError, Kernel, build, default_cache
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
    from io import FileIO
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
"""The two serial ports: the kernel's own, and the workload's, whose lines no printk may cut."""

_STRIDE = 37
"""init.sh visits the blocks of a worker in steps of this prime, so it must not divide their number."""

_POLL_S = 0.02

_KILL_TIMEOUT_S = 10
"""Even SIGKILL waits for I/O that a FUSE server holds; longer than this is for the caller to know."""


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
        self.log = log
        drive = f"file={str(image).replace(',', ',,')},format={image_format},if=none,id=d,cache={cache}"
        for name, value in (("aio", aio), ("werror", werror), ("rerror", rerror)):
            drive += f",{name}={value}" if value else ""
        append = (
            # panic=-1 and -no-reboot: a panic ends QEMU. loglevel=5: errors are seen as they occur.
            f"console=ttyS0 loglevel=5 panic=-1 iohang_run={secrets.token_hex(4)} iohang_blocks={blocks}"
            f" iohang_workers={workers} iohang_duration_s={duration_s} iohang_dd_mib={dd_mib}"
        )
        self._command = [
            # A QEMU never outlives us, even if we are killed: see _serve for the thread that starts it.
            "setpriv", "--pdeathsig", "KILL",
            "qemu-system-x86_64", "-accel", "tcg", "-m", f"{memory_mib}M",
            "-nodefaults", "-nographic", "-no-reboot", "-monitor", "none",
            "-kernel", str(kernel.vmlinuz), "-initrd", str(kernel.initramfs), "-append", append,
            "-drive", drive, "-device", "virtio-blk-pci,drive=d",
            *(["-qmp", f"unix:{qmp},server=on,wait=off"] if qmp else []),
            *qemu_arguments,
        ]  # fmt: skip
        self._lock = threading.Lock()
        self._records: list[Record] = []
        self._unparsed: list[str] = []
        self._process: subprocess.Popen[bytes] | None = None
        self._ports: dict[str, socket.socket] = {}
        self._started = threading.Event()
        self._start_error: OSError | None = None
        self._thread: threading.Thread | None = None

    # Life

    def start(self) -> None:
        """Start QEMU; raises OSError if it cannot be."""
        if self._thread is not None:
            raise RuntimeError("a Guest runs once")
        log = self.log.open("ab", buffering=0)
        far_ports = {}
        for name in (_CONSOLE, _RECORDS):
            self._ports[name], far_ports[name] = socket.socketpair()
        self._thread = threading.Thread(target=self._serve, args=(log, far_ports), name="guest", daemon=True)
        self._thread.start()
        self._started.wait()
        if self._start_error is not None:
            raise self._start_error

    def wait_ready(self, timeout_s: float = 60) -> Ready:
        """Wait until the guest has booted and its I/O starts."""
        self.wait_for(lambda: self.ready, timeout_s, "the guest to boot")
        assert self.ready is not None
        return self.ready

    def wait_for(self, condition: Callable[[], object], timeout_s: float, what: str) -> None:
        """Poll *condition* until it is true.

        Raises RuntimeError if QEMU ends before that, TimeoutError after *timeout_s*.
        """
        deadline_s = time.monotonic() + timeout_s
        while not condition():
            if not self.running:
                # Its last lines may still be on their way.
                self._join()
                if condition():
                    return
                raise RuntimeError(f"QEMU ended while waiting for {what}; {self._log_end()}")
            if time.monotonic() > deadline_s:
                raise TimeoutError(f"not within {timeout_s} s: {what}; {self._log_end()}")
            time.sleep(_POLL_S)

    def say(self, word: str) -> None:
        """Send the guest a word: stop, dmesg, poweroff; raises RuntimeError if QEMU has ended."""
        if not self.running:
            raise RuntimeError(f"QEMU is not running; {self._log_end()}")
        try:
            self._ports[_RECORDS].sendall(word.encode() + b"\n")
        except OSError as error:
            raise RuntimeError(f"QEMU has ended; {self._log_end()}") from error

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
            if not self._gone(timeout_s):
                self._signal(subprocess.Popen.terminate)
                self._gone(timeout_s / 2)
        self.kill()

    def kill(self) -> None:
        """SIGKILL at once, as a crash of the host would; raises TimeoutError as stop() does."""
        self._signal(subprocess.Popen.kill)
        if not self._gone(_KILL_TIMEOUT_S):
            raise TimeoutError(f"QEMU (process {self.pid}) waits for its I/O even after SIGKILL")
        self._join()
        for port in self._ports.values():
            port.close()

    def _join(self) -> None:
        if self._thread is not None:
            self._thread.join(_KILL_TIMEOUT_S)

    def _signal(self, send: Callable[[subprocess.Popen[bytes]], None]) -> None:
        if self._process is not None and self.running:
            send(self._process)

    def _gone(self, timeout_s: float) -> bool:
        deadline_s = time.monotonic() + timeout_s
        while self.running:
            if time.monotonic() > deadline_s:
                return False
            time.sleep(_POLL_S)
        return True

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
        return self._process is not None and self._process.poll() is None

    @property
    def pid(self) -> int:
        """QEMU's process id; raises RuntimeError before start()."""
        if self._process is None:
            raise RuntimeError("the guest has not been started")
        return self._process.pid

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

    # The thread

    def _serve(self, log: FileIO, far_ports: dict[str, socket.socket]) -> None:
        """Start QEMU and read both its serial ports until it ends.

        One thread for both: the parent-death signal comes when the *thread* that started the process ends
        (prctl(2)).
        """
        with log:
            try:
                self._process = self._popen(log, far_ports)
            except OSError as error:
                self._start_error = error
                return
            finally:
                for far in far_ports.values():
                    far.close()
                self._started.set()
            self._read_ports(log)
            self._process.wait()

    def _popen(self, log: FileIO, far_ports: dict[str, socket.socket]) -> subprocess.Popen[bytes]:
        # QEMU's first serial port is the kernel's ttyS0, the second its ttyS1.
        serial = []
        for name, far in far_ports.items():
            serial += ["-chardev", f"socket,id={name},fd={far.fileno()}", "-serial", f"chardev:{name}"]
        return subprocess.Popen(
            [*self._command, *serial],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            pass_fds=[far.fileno() for far in far_ports.values()],
        )

    def _read_ports(self, log: FileIO) -> None:
        started_s = time.monotonic()
        partial = dict.fromkeys(self._ports, b"")
        with selectors.DefaultSelector() as selector:
            for name, port in self._ports.items():
                selector.register(port, selectors.EVENT_READ, name)
            while selector.get_map():
                for key, _ in selector.select():
                    name = key.data
                    try:
                        data = self._ports[name].recv(65536)
                    except ConnectionResetError:
                        data = b""
                    if not data:
                        selector.unregister(key.fileobj)
                    *lines, partial[name] = (partial[name] + data).split(b"\n")
                    now_s = time.monotonic()
                    for line in lines:
                        log.write(b"%9.3f " % (now_s - started_s) + line + b"\n")
                        self._take(name, line.decode(errors="replace").rstrip("\r"), now_s)

    def _take(self, port: str, line: str, now_s: float) -> None:
        record = KernelMessage(line, "console", now_s) if port == _CONSOLE else parse_record(line, now_s)
        with self._lock:
            if record is not None:
                self._records.append(record)
            else:
                self._unparsed.append(line)

    def _log_end(self) -> str:
        lines = self.log.read_text(errors="replace").splitlines()[-20:]
        return f"the end of {self.log}:\n" + "\n".join(lines)
