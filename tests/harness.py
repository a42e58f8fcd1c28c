"""What tests and demonstrations need around the real thing: mounts as processes, and a flaky source beneath.

Waits are by polling a condition, never by a bare sleep.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Self

from iohang_fuse.engine import Engine

if TYPE_CHECKING:
    from collections.abc import Callable


def wait_until(condition: Callable[[], object], timeout_s: float = 20, what: str = "") -> None:
    """Poll *condition* every 20 ms until it is true; fail after *timeout_s* with *what* it was."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {timeout_s} s: {what or condition}")
        time.sleep(0.02)


def mounted_at(mountpoint: Path) -> list[str]:
    """The file-system types mounted at *mountpoint*, undermost first, without touching the mount."""
    types = []
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        left, right = line.split(" - ", 1)
        where = left.split()[4].encode().decode("unicode_escape")
        if where == str(mountpoint):
            types.append(right.split()[0])
    return types


def engine_here() -> str:
    """What `engine=auto` is on this machine."""
    return Engine("auto").name


class Server:
    """A FUSE server in the foreground as a process of its own; its log goes to a file."""

    def __init__(self, arguments: list[str], mountpoint: Path, log: Path) -> None:
        self.mountpoint = mountpoint
        self.log = log
        mountpoint.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as out:
            self.process = subprocess.Popen(
                [sys.executable, "-m", *arguments],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
            )
        try:
            wait_until(self._serving, what=f"{arguments} to serve; its log:\n{self.log_text()}")
        except BaseException:
            self.process.kill()
            raise

    def _serving(self) -> bool:
        if self.process.poll() is not None:
            raise AssertionError(f"exit code {self.process.returncode}; its log:\n{self.log_text()}")
        return "is served" in self.log_text()

    @property
    def pid(self) -> int:
        return self.process.pid

    def log_text(self) -> str:
        return self.log.read_text(errors="replace")

    def stop(self, timeout_s: float = 20) -> int:
        """SIGTERM and wait; a mount that stays busy is torn down by a second SIGTERM, as an operator would."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                return self.process.wait(timeout_s)
            except subprocess.TimeoutExpired:
                self.process.send_signal(signal.SIGTERM)
                try:
                    self.process.wait(timeout_s)
                except subprocess.TimeoutExpired:
                    self.process.kill()
                    self.process.wait()
                    subprocess.run(["umount", "-l", str(self.mountpoint)], check=False)
                raise AssertionError(f"{self.mountpoint} was busy; its log:\n{self.log_text()}") from None
        return self.process.returncode

    def __enter__(self) -> Self:
        return self

    def __exit__(self, _kind: object = None, error: BaseException | None = None, _where: object = None) -> None:
        try:
            self.stop()
        except AssertionError:
            if error is None:  # what went wrong first is what somebody wants to read
                raise
        if mounted_at(self.mountpoint):
            subprocess.run(["umount", "-l", str(self.mountpoint)], check=False)


class Mount(Server):
    """iohang-mount in the foreground: `Mount(source, mountpoint, "timeout=10", "interval=0.2", log=path)`."""

    engine = "auto"  # for those that do not name one themselves: tests/mount runs once on each

    def __init__(self, source: Path, mountpoint: Path, *options: str, log: Path) -> None:
        arguments = ["iohang_fuse.cli", str(source), str(mountpoint), "-f"]
        for option in (f"engine={self.engine}", *options):
            arguments += ["-o", option]
        super().__init__(arguments, mountpoint, log)


class FlakySource(Server):
    """The shipped flaky source: mirrors *directory* at *mountpoint* and fails as its trigger file says.

    `flaky.fail("write,fsync *.img errno=EIO")`, `flaky.fail("read a.img hang", "write * delay=0.5")`, `flaky.heal()`.
    With *page_cache*, `flaky.fail("writeback *.img errno=EIO")` loses what was written, as Linux does.
    """

    def __init__(
        self,
        directory: Path,
        mountpoint: Path,
        trigger: Path,
        log: Path,
        *,
        page_cache: bool = False,
        writeback_every_s: float | None = None,
        seed: int | None = None,
    ) -> None:
        self.trigger = trigger
        arguments = ["iohang_fuse.flaky", str(directory), str(mountpoint), str(trigger)]
        if page_cache:
            arguments.append("--page-cache")
        if writeback_every_s is not None:
            arguments += ["--writeback-every", str(writeback_every_s)]
        if seed is not None:
            arguments += ["--seed", str(seed)]
        super().__init__(arguments, mountpoint, log)

    def fail(self, *rules: str) -> None:
        """Put *rules* in force at once: `OPERATIONS PATTERN ACTION...`, one a line."""
        new = self.trigger.with_suffix(".new")
        new.write_text("\n".join(rules) + "\n")
        os.replace(new, self.trigger)

    def heal(self) -> None:
        """End of the outage."""
        self.trigger.unlink(missing_ok=True)
