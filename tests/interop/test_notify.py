"""sd_notify(3) to the letter: what a mount tells on NOTIFY_SOCKET, from its start through an outage to its end."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import threading
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.harness import FlakySource, Mount, wait_until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


class Listener:
    """The other end of NOTIFY_SOCKET; *messages* are what has come."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.messages: list[dict[str, str]] = []
        self.look: Callable[[], object] = lambda: None
        self.seen: list[object] = []  # what look() has seen when each message came
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind("\0" + address[1:] if address.startswith("@") else address)
        self._thread = threading.Thread(target=self._listen, daemon=True)
        self._thread.start()

    def _listen(self) -> None:
        while message := self._socket.recv(8192):
            self.seen.append(self.look())
            self.messages.append(dict(line.split("=", 1) for line in message.decode().split("\n")))

    def close(self) -> None:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as end:
            end.sendto(b"", self._socket.getsockname())
        self._thread.join(20)
        self._socket.close()

    def said(self, key: str) -> list[str]:
        """All values of *key*, in their order."""
        return [message[key] for message in [*self.messages] if key in message]

    def until(self, key: str, pattern: str) -> str:
        """Wait until *key* has had a value like that."""
        wait_until(
            lambda: any(re.search(pattern, value) for value in self.said(key)),
            timeout_s=60,
            what=f"{key}={pattern} among {self.messages}",
        )
        return next(value for value in reversed(self.said(key)) if re.search(pattern, value))


@pytest.fixture(params=["path", "abstract"])
def listener(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Listener]:
    listener = Listener(f"{tmp_path}/notify" if request.param == "path" else f"@iohang-test-{os.getpid()}")
    monkeypatch.setenv("NOTIFY_SOCKET", listener.address)
    yield listener
    listener.close()


@pytest.fixture
def site(tmp_path: Path) -> Iterator[tuple[FlakySource, Path]]:
    """A source that fails on command and is well in the end, whatever happened, and a mount point."""
    (tmp_path / "real").mkdir()
    for name in ("a.img", "b.img"):
        (tmp_path / "real" / name).write_bytes(bytes(8192))
    flaky = FlakySource(tmp_path / "real", tmp_path / "src", tmp_path / "trigger", tmp_path / "flaky.log")
    with flaky:
        yield flaky, tmp_path / "mnt"


READ = "import sys; open(sys.argv[1], 'rb', 0).read(1)"


def test_a_mount_tells_how_it_is(listener: Listener, site: tuple[FlakySource, Path], tmp_path: Path) -> None:
    """Issue 5: "READY when serving, STATUS with the hang in words, STOPPING, EXTEND_TIMEOUT while waiting or draining"."""
    flaky, mountpoint = site
    with (
        Mount(
            flaky.mountpoint, mountpoint, "interval=0.2", "timeout=300", "monitor=none", log=tmp_path / "log"
        ) as mount,
        ExitStack() as consumers,
    ):
        listener.until("READY", "^1$")
        assert listener.said("STATUS")[-1] == f"serving {flaky.mountpoint} at {mountpoint}"
        flaky.fail("read * errno=EIO")
        readers = [
            consumers.enter_context(subprocess.Popen([sys.executable, "-c", READ, str(mountpoint / name)]))
            for name in ("a.img", "b.img")
        ]
        consumers.callback(flaky.heal)
        words = listener.until("STATUS", "^2 images hang")
        assert re.fullmatch(
            r"2 images hang, oldest since \d\d:\d\d:\d\d: [ab].img \(EIO\), [ab].img \(EIO\), \d+ requests held", words
        )
        mount.process.send_signal(signal.SIGTERM)
        listener.until("EXTEND_TIMEOUT_USEC", "^20000000$")
        assert "in use by python" in listener.until("STATUS", "SIGTERM: .*; 2 images hang")
        assert listener.said("STOPPING") == [], "it may yet go on, and systemd would begin to count"
        flaky.heal()
        assert [reader.wait(60) for reader in readers] == [0, 0]
        listener.until("STOPPING", "^1$")
        assert mount.process.wait(60) == 0, "unmounted as soon as it was free, by the one signal"
        assert listener.messages[-1] == {"STOPPING": "1", "STATUS": f"{mountpoint} is unmounted"}
    assert {*listener.said("READY")} == {"1"}
    assert {key for message in listener.messages for key in message} == {
        "READY", "STATUS", "STOPPING", "EXTEND_TIMEOUT_USEC"
    }, "above all no WATCHDOG"  # fmt: skip


def test_ready_means_ready(listener: Listener, site: tuple[FlakySource, Path], tmp_path: Path) -> None:
    """Issue 5: "READY when serving": not when it is mounted, but when it has answered and its limits are in force."""
    flaky, mountpoint = site
    flaky.fail("getattr * delay=1")
    listener.look = lambda: [path.read_text() for path in limits_of(mountpoint)]
    with Mount(flaky.mountpoint, mountpoint, "max_background=777", "monitor=none", log=tmp_path / "log"):
        listener.until("READY", "^1$")
        flaky.heal()
    first = next(number for number, message in enumerate(listener.messages) if "READY" in message)
    assert listener.seen[first] == ["777\n"]


def limits_of(mountpoint: Path) -> list[Path]:
    """Where the kernel has max_background of what is mounted there, without touching the mount."""
    lines = [line.split() for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    minors = [fields[2].partition(":")[2] for fields in lines if fields[4] == str(mountpoint)]
    return [Path(f"/sys/fs/fuse/connections/{minor}/max_background") for minor in minors]


def test_nobody_is_told_from_the_background(listener: Listener, tmp_path: Path) -> None:
    """A NOTIFY_SOCKET that mount(8) has from its caller is the caller's: READY there would be a lie about another service."""
    source, mountpoint = tmp_path / "src", tmp_path / "mnt"
    source.mkdir()
    mountpoint.mkdir()
    command = [
        sys.executable,
        "-m",
        "iohang_fuse.cli",
        str(source),
        str(mountpoint),
        "-o",
        "monitor=none,log=/dev/null",
    ]
    subprocess.run(command, check=True, timeout=60)
    subprocess.run(["umount", str(mountpoint)], check=True)
    command[3] = str(tmp_path / "absent")
    assert subprocess.run(command, check=False, timeout=60).returncode == 32
    assert listener.messages == []


def test_a_refusal_is_told(listener: Listener, tmp_path: Path) -> None:
    """`systemctl status` shows why there is no mount."""
    command = [sys.executable, "-m", "iohang_fuse.cli", str(tmp_path / "absent"), str(tmp_path), "-f"]
    assert subprocess.run(command, check=False, timeout=60).returncode == 32
    assert listener.until("STATUS", "SOURCE") == (
        f"SOURCE {tmp_path}/absent does not exist; name the directory of the images"
    )
    assert listener.said("READY") == []
