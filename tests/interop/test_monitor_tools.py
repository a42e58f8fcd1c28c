"""QEMU's own tools for people, qmp-shell and qmp-tui, on a real terminal at the monitor of a real mount."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import termios
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.harness import FlakySource, Mount, wait_until
from tests.terminal import Terminal

if TYPE_CHECKING:
    from collections.abc import Iterator

BIN = Path(sys.executable).parent
ROWS = 60
"""Room for an answer of many lines."""


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Mount]:
    """An image that hangs, under a timeout of ten minutes."""
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "a.img").write_bytes(bytes(4096))
    with FlakySource(tmp_path / "real", tmp_path / "src", tmp_path / "trigger", tmp_path / "flaky.log") as flaky:
        options = ("timeout=600", "interval=1", f"monitor={tmp_path}/m.sock")
        with Mount(tmp_path / "src", tmp_path / "mnt", *options, log=tmp_path / "mnt.log") as mount:
            flaky.fail("data a.img errno=EIO")
            with subprocess.Popen(["cat", str(tmp_path / "mnt" / "a.img")], stdout=subprocess.DEVNULL) as consumer:
                try:
                    wait_until(lambda: "held since" in mount.log_text(), 60, "the hang")
                    yield mount
                finally:
                    flaky.heal()
                    assert consumer.wait(60) == 0


def deadline_s(tmp_path: Path) -> float:
    """How soon the hanging image's first request is given up, as iohangctl has it."""
    command = [BIN / "iohangctl", "--json", "-s", tmp_path / "m.sock", "list"]
    (image,) = json.loads(subprocess.run(command, capture_output=True, check=True, timeout=60).stdout)
    return float(image["nearest-deadline"])


def test_qmp_shell(mount: Mount, tmp_path: Path) -> None:
    """Issue: "the real `qemu.qmp` client, `qmp-shell` and `qmp-tui` work against it": what is typed there is done and answered."""
    with Terminal(BIN / "qmp-shell", tmp_path / "m.sock", rows=ROWS, HOME=str(tmp_path)) as terminal:

        def answer(command: str) -> Any:
            answers = len(answered())
            terminal.press(f"{command}\r".encode())
            wait_until(lambda: len(answered()) > answers, 60, f"an answer to {command}")
            return json.loads(answered()[-1])

        def answered() -> list[str]:
            terminal.text()
            return [line for line in terminal.output.decode().splitlines() if re.match(r"\{.*\}$", line)]

        terminal.wait_for("Welcome to the QMP low-level shell!", "Connected to QEMU ", "(QEMU)")
        status = answer("query-status")["return"]
        assert (status["status"], status["running"], status["pid"]) == ("hanging", True, mount.pid)
        assert deadline_s(tmp_path) > 300
        (done,) = answer("io-hang-set image=a.img timeout=300")["return"]
        assert (done["image"], done["write-timeout"]) == ("a.img", 300)
        assert deadline_s(tmp_path) <= 300
        assert answer("io-hang-set timout=5")["error"]["class"] == "GenericError"
        assert answer("io-hang-frob")["error"]["class"] == "CommandNotFound"
        terminal.press(b"query-io-h\t\r")  # its completion, from query-commands
        terminal.wait_for('"nearest-deadline"')
        terminal.press(b"\x04")
        assert terminal.end() == 0


def test_qmp_tui(mount: Mount, tmp_path: Path) -> None:
    """The same; it shows the greeting, and events as they come. Alt+Enter sends, Esc ends it."""
    with Terminal(BIN / "qmp-tui", tmp_path / "m.sock", rows=ROWS, HOME=str(tmp_path)) as terminal:

        def sees(*words: str) -> None:
            def drawn() -> bool:
                terminal.press(b"\x1b[B")  # Down: to the editor below, or nowhere; without a key nothing new is drawn
                return all(word in terminal.text() for word in words)

            try:
                wait_until(drawn, 60)
            except AssertionError:
                raise AssertionError(f"{words} are not on the screen:\n{terminal.text().strip()}") from None

        def send(command: str) -> None:
            terminal.press(f"{command}\x1b\r".encode())

        sees("[Connected ", "iohang-fuse", "qmp_capabilities", '"return": {}')
        assert not terminal.now()[3] & termios.ICANON
        send('{"execute": "query-status"}')
        sees('"hanging"', f'"pid": {mount.pid}')
        send('{"execute": "io-hang-set", "arguments": {"timeout": 300}}')
        sees('"write-timeout": 300')
        assert deadline_s(tmp_path) <= 300
        send('{"execute": "io-hang-fail", "arguments": {"imag": "a.img"}}')
        sees('"GenericError"')
        (tmp_path / "trigger").unlink()
        sees("BLOCK_IO_HANG", '"recovered"')
        terminal.press(b"\x1b")
        assert terminal.end() == 0
