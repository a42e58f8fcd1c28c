"""A Debian guest under QEMU (TCG): it boots with systemd, runs what the host says, and ends with its own power-off.

    with DebianGuest(build(), folder, disks=[disk], files={"/etc/fstab": "..."}) as guest:
        guest.run("mount", "-a")
        guest.wait_until(lambda: guest.state("mnt-iohang.mount") == "active", "the mount")
        guest.power_off()

Its first serial port is the console, with what the kernel and systemd say; the agent (agent.py) answers on a port of virtio-serial,
and a second such port is for what runs inside: lines as records.py reads them. All of it goes to FOLDER/guest.log.
"""

from __future__ import annotations

import json
import re
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

from contrib.guest import kernel
from contrib.guest.debian.image import Debian, build, payload
from contrib.guest.machine import QEMU, Machine
from contrib.guest.records import Done, Record, Step, parse_record

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

__all__ = ["Console", "Debian", "DebianGuest", "Outcome", "build"]

RECORDS_PORT = "/dev/virtio-ports/iohang.records"
"""In the guest; one process at a time may have it open."""

LIMIT_S = 360
"""For a boot, or any other long step. Under a minute on an idle machine; a guest is emulated, and tests run beside others."""

_CONSOLE, _CONTROL, _RECORDS = "console", "control", "records"

_APPEND = (
    "console=ttyS0 loglevel=4 panic=-1 "  # a panic ends QEMU, with -no-reboot
    "systemd.show_status=1 systemd.getty_auto=no SYSTEMD_COLORS=0 mitigations=off"
)


_ESCAPES = re.compile(r"\x1b(\[[0-9;?]*[A-Za-z]|.)")
"""systemd moves a terminal's cursor where a job takes long."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a command in the guest ended."""

    code: int
    out: str
    err: str


@dataclass(frozen=True, slots=True)
class Console:
    """A line of the console."""

    text: str
    host_s: float


class DebianGuest:
    """One boot, on an overlay of its own in *folder*.

    *disks* are raw images, in the guest /dev/vdc and so on; *files* are as in `image.payload`.
    """

    def __init__(
        self,
        debian: Debian,
        folder: Path,
        *,
        disks: Sequence[Path] = (),
        files: Mapping[str, str | Path] | None = None,
        memory_mib: int = 768,
        cpus: int = 2,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        payload(folder / "payload.tar", files)
        overlay = folder / "root.qcow2"
        kernel.run(
            "qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw", "-b", str(debian.root.absolute()), str(overlay)
        )
        command = [
            *QEMU, "-cpu", "max", "-smp", str(cpus), "-m", f"{memory_mib}M", "-no-reboot", "-monitor", "none",
            "-kernel", str(debian.kernel.vmlinuz), "-initrd", str(debian.kernel.initramfs), "-append", _APPEND,
            *_drive(overlay, "qcow2", "unsafe"), *_drive(folder / "payload.tar", "raw", "unsafe"),
            "-device", "virtio-serial-pci",
        ]  # fmt: skip
        for disk in disks:
            command += _drive(disk, "raw", "writeback")
        ports = {_CONSOLE: ["-serial", f"chardev:{_CONSOLE}"]}
        for name in (_CONTROL, _RECORDS):
            ports[name] = ["-device", f"virtserialport,chardev={name},name=iohang.{name}"]
        self._machine = Machine(command, ports, self._take, folder / "guest.log")
        self._lock = threading.Lock()
        self._ready = False
        self._answers: dict[int, Outcome] = {}
        self._asked = 0
        self._console: list[Console] = []
        self._records: list[Record] = []

    # Life

    def __enter__(self) -> Self:
        try:
            self._machine.start()
            self.wait_until(lambda: self._ready, "the agent, which systemd starts")
        except BaseException:
            self._machine.kill()
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        self._machine.kill()

    def power_off(self, timeout_s: float = LIMIT_S) -> float:
        """`systemctl poweroff`, until QEMU has ended; returns the seconds. Raises TimeoutError with the console's end."""
        began_s = time.monotonic()
        self.send("systemctl", "poweroff")
        self.wait_until(lambda: not self.running, "the power-off", timeout_s)
        return time.monotonic() - began_s

    @property
    def running(self) -> bool:
        """Whether there is a QEMU."""
        return self._machine.running

    def wait_until(self, condition: Callable[[], object], what: str, timeout_s: float = LIMIT_S) -> None:
        """Poll *condition*; raises TimeoutError, and RuntimeError if QEMU ends before."""
        self._machine.wait_for(condition, timeout_s, what)

    # What it is told

    def send(self, *command: str) -> int:
        """Have *command* run, without waiting for its end; returns its number for `outcome`."""
        with self._lock:
            self._asked += 1
            number = self._asked
        self._machine.say(_CONTROL, json.dumps({"id": number, "command": command}))
        return number

    def outcome(self, number: int) -> Outcome | None:
        """How a command that was sent has ended, if it has."""
        with self._lock:
            return self._answers.get(number)

    def ask(self, *command: str, timeout_s: float = LIMIT_S) -> Outcome:
        """Run *command* to its end, whatever that is."""
        number = self.send(*command)
        self.wait_until(lambda: self.outcome(number), f"{' '.join(command)} in the guest", timeout_s)
        outcome = self.outcome(number)
        assert outcome is not None
        return outcome

    def run(self, *command: str, timeout_s: float = LIMIT_S) -> str:
        """The output of a *command* that succeeds; raises RuntimeError if it does not."""
        outcome = self.ask(*command, timeout_s=timeout_s)
        if outcome.code:
            raise RuntimeError(f"{' '.join(command)}: exit code {outcome.code}: {outcome.err or outcome.out}")
        return outcome.out

    def properties(self, unit: str, *names: str) -> dict[str, str]:
        """What `systemctl show` says of *unit*."""
        shown = self.run("systemctl", "show", f"--property={','.join(names)}", unit)
        return dict(line.partition("=")[::2] for line in shown.splitlines())

    def state(self, unit: str) -> str:
        """Its ActiveState."""
        return self.properties(unit, "ActiveState")["ActiveState"]

    def say(self, word: str) -> None:
        """Send *word* to the process in the guest that has RECORDS_PORT open."""
        self._machine.say(_RECORDS, word)

    # What it has said

    @property
    def console(self) -> tuple[Console, ...]:
        """All lines of the console."""
        with self._lock:
            return tuple(self._console)

    @property
    def records(self) -> tuple[Record, ...]:
        """What a consumer in the guest has reported."""
        with self._lock:
            return tuple(self._records)

    @property
    def steps(self) -> tuple[Step, ...]:
        """A consumer's steps that have ended, well or not."""
        return tuple(record for record in self.records if isinstance(record, Step) and record.outcome != "begin")

    @property
    def done(self) -> Done | None:
        """The totals of a consumer that has ended."""
        return next((record for record in reversed(self.records) if isinstance(record, Done)), None)

    def _take(self, port: str, line: str, now_s: float) -> None:
        if port == _CONTROL:
            value: dict[str, Any] = json.loads(line)
            with self._lock:
                if "ready" in value:
                    self._ready = True
                else:
                    self._answers[value["id"]] = Outcome(value["code"], value["out"], value["err"])
            return
        record = parse_record(line, now_s) if port == _RECORDS else None
        with self._lock:
            if record is not None:
                self._records.append(record)
            else:
                self._console.append(Console(_ESCAPES.sub("", line), now_s))


def _drive(path: Path, image_format: str, cache: str) -> list[str]:
    name = str(path).replace(",", ",,")
    return ["-drive", f"file={name},format={image_format},if=virtio,cache={cache}"]
