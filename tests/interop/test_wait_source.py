"""wait_source: a mount that waits for its source, as it does at boot."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from typing import TYPE_CHECKING, ClassVar

import pytest

from tests.harness import FlakySource, mounted_at, wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

MOUNT = [sys.executable, "-m", "iohang_fuse.cli"]


class Starting:
    """An iohang-mount that has been started, and what it has said so far."""

    started: ClassVar[list[Starting]] = []

    def __init__(self, place: Path, source: Path, *options: str, foreground: bool = False) -> None:
        self.mountpoint = place / "mnt"
        self.mountpoint.mkdir(exist_ok=True)
        self._said = place / "said"
        words = [str(source), str(self.mountpoint), "-o", ",".join(("monitor=none", f"log={place}/log", *options))]
        with self._said.open("wb") as out:
            self.process = subprocess.Popen(
                [*MOUNT, *words, *(["-f"] if foreground else [])],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                env={**os.environ, "LIBMOUNT_FSTAB": str(place / "fstab"), "NOTIFY_SOCKET": str(place / "notify")},
            )
        Starting.started.append(self)

    @property
    def said(self) -> list[str]:
        return self._said.read_text().splitlines()

    def wait_for_word(self, word: str) -> None:
        wait_until(lambda: any(word in line for line in self.said), 60, f"'{word}' in {self.said}")


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path
    while Starting.started:
        process = Starting.started.pop().process
        process.kill()  # whatever a failed test has left waiting
        process.wait()
    for name in ("mnt", "nfs"):
        while mounted_at(tmp_path / name):
            subprocess.run(["umount", "-l", str(tmp_path / name)], check=True)


def test_it_waits_until_source_exists(place: Path) -> None:
    """Option wait_source: in the background, too, the command returns when the mount serves."""
    start = Starting(place, place / "src", "wait_source=2min")
    start.wait_for_word(f"SOURCE {place}/src does not exist; waiting for up to ")
    assert start.process.poll() is None
    assert not mounted_at(start.mountpoint)
    (place / "src").mkdir()
    (place / "src" / "file").write_text("content")
    assert start.process.wait(60) == 0
    assert (start.mountpoint / "file").read_text() == "content"
    assert len(start.said) == 1


@pytest.mark.parametrize("foreground", [False, True])
def test_it_waits_for_the_mount_that_fstab_has(place: Path, *, foreground: bool) -> None:
    """An empty directory beneath a mount that has not come is not SOURCE."""
    (place / "fstab").write_text(f"images {place}/nfs tmpfs defaults 0 0\n")
    (place / "nfs" / "vm").mkdir(parents=True)
    start = Starting(place, place / "nfs" / "vm", "wait_source=2min", foreground=foreground)
    start.wait_for_word(f"{place}/nfs, where /etc/fstab mounts images, is not mounted; waiting")
    assert not mounted_at(start.mountpoint)
    subprocess.run(["mount", "-T", str(place / "fstab"), str(place / "nfs")], check=True)
    (place / "nfs" / "vm").mkdir()
    wait_until(lambda: mounted_at(start.mountpoint), 60, "the mount")
    (place / "nfs" / "vm" / "file").write_text("content")
    wait_until((start.mountpoint / "file").exists, 60, "the file through the mount")
    if foreground:
        start.process.send_signal(signal.SIGTERM)
    assert start.process.wait(60) == 0


@pytest.mark.parametrize("foreground", [False, True])
def test_what_never_comes_is_a_mount_that_failed(place: Path, *, foreground: bool) -> None:
    """It ends with mount(8)'s code 32, and one line that says for what it has waited."""
    (place / "src").write_text("no directory")
    start = Starting(place, place / "src", "wait_source=3s", foreground=foreground)
    assert start.process.wait(60) == 32
    assert start.said[-1] == f"iohang-mount: waited 3.0 s (wait_source), and SOURCE {place}/src is not a directory"
    assert len(start.said) <= 2


def test_ctrl_c_ends_the_waiting(place: Path) -> None:
    """The parent waits; Ctrl-C ends it, with mount(8)'s code 8, and leaves nothing mounted."""
    start = Starting(place, place / "src", "wait_source=10min")
    start.wait_for_word("does not exist")
    start.process.send_signal(signal.SIGINT)
    assert start.process.wait(60) == 8
    assert start.said[-1] == f"iohang-mount: interrupted while it waited for SOURCE {place}/src (wait_source)"
    assert not mounted_at(start.mountpoint)


def test_a_source_that_hangs_is_waited_for_no_longer(place: Path) -> None:
    """A SOURCE that hangs (a dead hard mount) does not make it hang beyond SPAN; when it answers, it is mounted."""
    (place / "real").mkdir()
    with FlakySource(place / "real", place / "src", place / "trigger", place / "flaky.log") as flaky:
        flaky.fail("* * hang")
        try:
            begin_s = time.monotonic()
            start = Starting(place, place / "src", "wait_source=2s")
            assert start.process.wait(60) == 32
            assert time.monotonic() - begin_s < 30
            assert start.said[-1].endswith(f"(wait_source), and SOURCE {place}/src does not answer")
            start = Starting(place, place / "src", "wait_source=5min")
            start.wait_for_word("does not answer; waiting")
        finally:
            flaky.heal()
        assert start.process.wait(60) == 0
        subprocess.run(["umount", str(start.mountpoint)], check=True)


def test_it_says_so_again_each_ten_seconds(place: Path) -> None:
    """Says each 10 s what it waits for."""
    start = Starting(place, place / "src", "wait_source=10min")
    wait_until(lambda: len(start.said) >= 2, 60, "a second line")
    start.process.send_signal(signal.SIGINT)
    start.process.wait(60)
    first, second, *_ = start.said
    assert "waiting for up to 10 min 0 s" in first
    assert "waiting for up to 9 min 50 s" in second or "waiting for up to 9 min 4" in second


def test_a_service_manager_gives_it_more_time(place: Path) -> None:
    """While a unit's start waits for its source, EXTEND_TIMEOUT_USEC is said again and again, with what is waited for as STATUS."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(place / "notify"))
        manager.settimeout(60)
        start = Starting(place, place / "src", "wait_source=10min", foreground=True)
        for _ in range(2):
            said = dict(line.split("=", 1) for line in manager.recv(4096).decode().splitlines())
            assert said["EXTEND_TIMEOUT_USEC"] == "60000000"
            assert said["STATUS"].startswith(f"SOURCE {place}/src does not exist; waiting for up to ")
        (place / "src").mkdir()
        while b"READY=1" not in manager.recv(4096):
            pass
        start.process.send_signal(signal.SIGTERM)
        assert start.process.wait(60) == 0


def test_who_does_not_ask_for_it_does_not_wait(place: Path) -> None:
    """Default 0: SOURCE must be there at once."""
    start = Starting(place, place / "src")
    assert start.process.wait(60) == 32
    assert start.said == [f"iohang-mount: SOURCE {place}/src does not exist; name the directory of the images"]
