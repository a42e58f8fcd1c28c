"""sd_notify(3) to the letter: what a mount tells on NOTIFY_SOCKET, from its start through an outage to its end."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import threading
from typing import TYPE_CHECKING

import pytest

from tests.harness import FlakySource, Mount, wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


class Listener:
    """The other end of NOTIFY_SOCKET; *messages* are what has come."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.messages: list[dict[str, str]] = []
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind("\0" + address[1:] if address.startswith("@") else address)
        self._thread = threading.Thread(target=self._listen, daemon=True)
        self._thread.start()

    def _listen(self) -> None:
        while message := self._socket.recv(8192):
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


def test_a_mount_tells_how_it_is(listener: Listener, tmp_path: Path) -> None:
    """Issue 5: "READY when serving, STATUS with the hang in words, STOPPING, EXTEND_TIMEOUT while waiting or draining"."""
    source, mountpoint = tmp_path / "src", tmp_path / "mnt"
    (tmp_path / "real").mkdir()
    for name in ("a.img", "b.img"):
        (tmp_path / "real" / name).write_bytes(bytes(8192))
    with (
        FlakySource(tmp_path / "real", source, tmp_path / "trigger", tmp_path / "flaky.log") as flaky,
        Mount(source, mountpoint, "interval=0.2", "timeout=300", "monitor=none", log=tmp_path / "log") as mount,
    ):
        listener.until("READY", "^1$")
        assert (mountpoint / "a.img").stat().st_size == 8192
        assert listener.said("STATUS")[-1] == f"serving {source} at {mountpoint}"
        flaky.fail("read * errno=EIO")
        command = [sys.executable, "-c", "import sys; open(sys.argv[1], 'rb', 0).read(1)"]
        with (
            subprocess.Popen([*command, str(mountpoint / "a.img")]) as a,
            subprocess.Popen([*command, str(mountpoint / "b.img")]) as b,
        ):
            words = listener.until("STATUS", "^2 images hang")
            assert re.fullmatch(
                r"2 images hang, oldest since \d\d:\d\d:\d\d: [ab].img \(EIO\), [ab].img \(EIO\), [23] requests held",
                words,
            )
            mount.process.send_signal(signal.SIGTERM)
            listener.until("EXTEND_TIMEOUT_USEC", "^20000000$")
            assert "in use by python" in listener.until("STATUS", "SIGTERM: .*; 2 images hang")
            assert listener.said("STOPPING") == [], "it may yet go on, and systemd would begin to count"
            flaky.heal()
            assert (a.wait(60), b.wait(60)) == (0, 0)
        listener.until("STOPPING", "^1$")
        assert mount.process.wait(60) == 0, "unmounted as soon as it was free, by the one signal"
        assert listener.messages[-1] == {"STOPPING": "1", "STATUS": f"{mountpoint} is unmounted"}
    assert {*listener.said("READY")} == {"1"}
    assert {key for message in listener.messages for key in message} == {
        "READY", "STATUS", "STOPPING", "EXTEND_TIMEOUT_USEC"
    }, "above all no WATCHDOG"  # fmt: skip


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
    assert listener.messages == []


def test_a_refusal_is_told(listener: Listener, tmp_path: Path) -> None:
    """`systemctl status` shows why there is no mount."""
    command = [sys.executable, "-m", "iohang_fuse.cli", str(tmp_path / "absent"), str(tmp_path), "-f"]
    assert subprocess.run(command, check=False, timeout=60).returncode == 32
    assert listener.until("STATUS", "SOURCE") == f"SOURCE {tmp_path}/absent does not exist"
    assert listener.said("READY") == []
