"""`iohangctl top` on a real terminal (a pty), above real mounts, through an outage and the end of a server."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import termios
import threading
import time
from contextlib import suppress
from typing import TYPE_CHECKING

import pytest

from tests.harness import FlakySource, Mount, wait_until
from tests.terminal import ALTERNATE_SCREEN, Terminal

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

BLOCK = 4096
CTL = [sys.executable, "-c", "import sys; from iohang_fuse.ctl import main; sys.exit(main())"]


class Site:
    """A mount above a source that fails on command."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.socket = path / "m.sock"
        (path / "real").mkdir()
        for name in ("a.img", "b.img"):
            (path / "real" / name).write_bytes(bytes(1 << 20))
        self.flaky = FlakySource(path / "real", path / "src", path / "trigger", path / "flaky.log")
        self.mount = self.mount_again("mnt.log")

    def mount_again(self, log: str) -> Mount:
        options = ("timeout=600", "interval=1", f"monitor={self.socket}")
        self.mount = Mount(self.path / "src", self.path / "mnt", *options, log=self.path / log)
        return self.mount

    def read(self, name: str = "a.img") -> threading.Thread:
        """A consumer, which waits as long as its image hangs."""

        def consume() -> None:
            with suppress(OSError), (self.path / "mnt" / name).open("rb") as file:
                file.read(BLOCK)

        thread = threading.Thread(target=consume, daemon=True)
        thread.start()
        return thread

    def close(self) -> None:
        self.flaky.heal()
        with self.flaky, self.mount:
            pass


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    site = Site(tmp_path)
    yield site
    site.close()


def line_of(screen: str, first: str) -> list[str]:
    """The words of the line that begins with *first*."""
    (line,) = (line for line in screen.splitlines() if line.startswith(first))
    return line.split()


def test_an_outage_on_the_screen(site: Site) -> None:
    """One row per image that hangs or has had trouble; q quits, and the terminal is as it was."""
    with Terminal(*CTL, "-s", site.socket, "top", "-d", "200ms") as terminal:
        terminal.wait_for(f"{site.path}/mnt: healthy: 0 images open", "no image hangs", "each 0.2 s; q quits")
        site.flaky.fail("data a.img errno=EIO")
        consumer = site.read()
        screen = terminal.wait_for("a.img", "hanging", "EIO", "1 hanging, 0 timed out")
        assert line_of(screen, "IMAGE") == [
            "IMAGE", "STATE", "HELD", "OLDEST", "GIVEN", "UP", "IN", "ERROR", "ATTEMPTS", "RETRY", "IN", "BYTES", "SINCE",
        ]  # fmt: skip
        assert "b.img" not in screen
        site.flaky.heal()
        consumer.join(60)
        screen = terminal.wait_for("over at ", "0 requests held")
        assert line_of(screen, "a.img")[:2] in (["a.img", "healthy"], ["a.img", "closed"])
        terminal.press(b"q")
        assert terminal.end() == 0
        assert ALTERNATE_SCREEN in terminal.output


@pytest.mark.parametrize("end", ["ctrl-c", "SIGTERM", "SIGHUP", "Q"])
def test_whatever_ends_it_restores_the_terminal(site: Site, end: str) -> None:
    """Quits with q or Ctrl-C, restores the terminal; a signal is no other end, and Ctrl-Z none at all."""
    with Terminal(*CTL, "-s", site.socket, "top", "-d", "60") as terminal:
        terminal.wait_for("q quits")
        wait_until(lambda: not terminal.now()[3] & termios.ECHO, 20, "keys that come one by one, and unechoed")
        assert terminal.now()[6][termios.VSUSP] == b"\0"
        assert terminal.now()[3] & termios.ISIG
        terminal.press(b"x")
        if end == "ctrl-c":
            terminal.press(b"\x03")
        elif end == "Q":
            terminal.press(b"Q")
        else:
            terminal.process.send_signal(getattr(signal, end))
        assert terminal.end() == 0


def test_it_survives_the_servers_end(site: Site) -> None:
    """Says so, and goes on with the next server at the same place."""
    with Terminal(*CTL, "-s", site.socket, "top", "-d", "200ms") as terminal:
        terminal.wait_for("healthy")
        site.mount.stop()
        terminal.wait_for(f"{site.path}/mnt: ", "it is asked again each time")
        site.mount_again("mnt2.log")
        terminal.wait_for("healthy: 0 images open")
        site.mount.process.send_signal(signal.SIGSTOP)
        try:
            terminal.wait_for("no answer for ", "the server is stuck")
        finally:
            site.mount.process.send_signal(signal.SIGCONT)
        terminal.wait_for("healthy: 0 images open")
        assert "Traceback" not in terminal.output.decode()
        terminal.press(b"q")
        assert terminal.end() == 0


@pytest.mark.parametrize(("columns", "rows"), [(30, 5), (10, 2), (1, 1)])
def test_small_terminals(site: Site, columns: int, rows: int) -> None:
    """What does not fit is left out, and what there is to see is seen; also when the window is made small while it runs."""
    site.flaky.fail("data * errno=EIO")
    consumers = [site.read("a.img"), site.read("b.img")]
    with Terminal(*CTL, "-s", site.socket, "top", "-d", "200ms") as terminal:
        terminal.wait_for("a.img", "b.img")
        terminal.resize(columns, rows)
        if columns == 30:
            screen = terminal.wait_for("IMAGE  STATE    HELD", "1 more; ")
            assert len([line for line in screen.splitlines() if "hanging  " in line]) == 1
        drawn = len(terminal.output)
        wait_until(lambda: terminal.text() is not None and len(terminal.output) > drawn + 200, 60, "more frames")
        assert terminal.process.poll() is None
        terminal.press(b"q")
        assert terminal.end() == 0
        assert "Traceback" not in terminal.output.decode()
    site.flaky.heal()
    for consumer in consumers:
        consumer.join(60)


def test_without_a_terminal_it_is_lines(site: Site) -> None:
    """Not on a terminal: one frame per interval in plain lines (as `top -b`), -n COUNT frames; with --json, one object a line."""
    site.flaky.fail("data a.img errno=EIO")
    consumer = site.read()
    command = [*CTL, "-s", str(site.socket)]

    def frames(*words: str) -> list[str]:
        done = subprocess.run([*command, *words], capture_output=True, text=True, timeout=60, check=True)
        assert done.stderr == ""
        return done.stdout.splitlines()

    wait_until(lambda: "hanging" in frames("top", "-n", "1")[0], 60, "the hang")
    begin_s = time.monotonic()
    lines = frames("top", "-n", "3", "-d", "500ms")
    assert time.monotonic() - begin_s >= 1
    assert len(lines) == 9
    assert lines[0].endswith("mnt: hanging: 1 images open, 1 hanging, 0 timed out; 1 requests held, 0 B")
    assert lines[2].split()[:2] == ["a.img", "hanging"]
    objects = [json.loads(line) for line in frames("--json", "top", "-n", "2", "-d", "100ms")]
    assert [each["mounts"][0]["images"][0]["errno"] for each in objects] == ["EIO", "EIO"]
    site.flaky.heal()
    consumer.join(60)


def test_batch_on_a_terminal_and_a_reader_that_goes(site: Site) -> None:
    """As `top -b`; and `iohangctl top | head -1` ends without a word of its own."""
    with Terminal(*CTL, "-s", site.socket, "top", "-b", "-n", "2", "-d", "100ms") as terminal:
        assert terminal.end() == 0
        assert ALTERNATE_SCREEN not in terminal.output
        assert terminal.output.count(b"healthy: 0 images open") == 2
    with subprocess.Popen(
        [*CTL, "-s", str(site.socket), "top", "-d", "100ms"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as top:
        assert top.stdout is not None
        assert top.stderr is not None
        top.stdout.readline()
        top.stdout.close()
        assert top.wait(60) == 0
        assert top.stderr.read() == b""


def test_all_mounts_where_none_is_named(site: Site) -> None:
    """Several mounts if no mountpoint is given, those that come later, too."""
    with (
        Mount(site.path / "real", site.path / "one", log=site.path / "one.log"),
        Terminal(*CTL, "top", "-d", "200ms", rows=200) as terminal,
    ):
        terminal.wait_for(f"{site.path}/one: healthy")
        with Mount(site.path / "src", site.path / "two", "timeout=600", log=site.path / "two.log"):
            terminal.wait_for(f"{site.path}/two: healthy")
            site.flaky.fail("data a.img errno=EIO")
            thread = threading.Thread(target=(site.path / "two" / "a.img").read_bytes, daemon=True)
            thread.start()
            terminal.wait_for("a.img", "hanging")
            site.flaky.heal()
            thread.join(60)
        terminal.wait_for(f"{site.path}/two: ", "it is asked again")
        terminal.press(b"q")
        assert terminal.end() == 0


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["top", "-d", "5x"], "iohangctl: --delay: '5x' is no span of time"),
        (["top", "-d", "0"], "iohangctl: --delay: '0' is out of range; say 0.1 s to 3600 s"),
        (["top", "-d", "inf"], "iohangctl: --delay: 'inf' is out of range"),
        (["top", "-n", "0"], "iohangctl: --frames: 0 is no number of frames; say 1 or more"),
        (["-s", "/nonexistent.sock", "top"], "iohangctl: /nonexistent.sock: No such file or directory"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(words: list[str], says: str) -> None:
    """One clear line that names what is wrong and what would be right, and the documented exit code."""
    done = subprocess.run([*CTL, *words], capture_output=True, text=True, timeout=60, check=False)
    usage = 1 if "-s" in words else 2
    assert (done.returncode, done.stderr.count("\n")) == (usage, 1)
    assert done.stderr.startswith(says)
