"""A terminal (a pty) for a program, and pyte to read what it has drawn."""

from __future__ import annotations

import fcntl
import os
import pty
import select
import struct
import subprocess
import termios
from typing import Any, Self

import pyte

from tests.harness import wait_until

ALTERNATE_SCREEN, ITS_END = b"\x1b[?1049h", b"\x1b[?1049l"


class Terminal:
    """A program on a pty of its own, and the screen that somebody would see."""

    def __init__(self, *command: object, columns: int = 200, rows: int = 20, **environment: str) -> None:
        self._screen = pyte.Screen(columns, rows)
        self._stream = pyte.ByteStream(self._screen)
        self.output = b""
        self._master, slave = pty.openpty()
        self.resize(columns, rows)
        self._slave = slave  # kept open, to ask for its state at the end
        self.before = termios.tcgetattr(slave)
        self.process = subprocess.Popen(
            # The first terminal that a session's leader opens is its own: so Ctrl-C is a signal.
            ["sh", "-c", 'exec "$@" <"$0"', os.ttyname(slave), *map(str, command)],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            env={**os.environ, "TERM": "xterm-256color", "COLUMNS": "", "LINES": "", **environment},
            start_new_session=True,
        )

    def resize(self, columns: int, rows: int) -> None:
        fcntl.ioctl(self._master, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
        self._screen.resize(rows, columns)

    def text(self) -> str:
        """What is on the screen now."""
        while select.select([self._master], [], [], 0)[0]:
            piece = os.read(self._master, 65536)
            self.output += piece
            self._stream.feed(piece)
        return "\n".join(line.rstrip() for line in self._screen.display)

    def wait_for(self, *words: str) -> str:
        """The screen that has all of *words*. A frame may be half drawn: of two looks the second one may have less."""
        screen = ""

        def has_all() -> bool:
            nonlocal screen
            screen = self.text()
            return all(word in screen for word in words)

        try:
            wait_until(has_all, 60)
        except AssertionError:
            raise AssertionError(f"{words} are not on the screen, after 60 s; there is:\n{self.text()}") from None
        return screen

    def now(self) -> list[Any]:
        """Its state; see termios(3)."""
        return termios.tcgetattr(self._slave)

    def press(self, keys: bytes) -> None:
        os.write(self._master, keys)

    def end(self) -> int:
        """Its exit code; the terminal must be as it was."""

        def ended() -> bool:
            self.text()  # or it would wait for us to read
            return self.process.poll() is not None

        wait_until(ended, 60, "the program's end")
        self.text()
        assert self.now() == self.before
        assert self.output.count(ALTERNATE_SCREEN) == self.output.count(ITS_END)
        assert self.output.rfind(b"\x1b[?25h") > self.output.rfind(b"\x1b[?25l") or b"\x1b[?25l" not in self.output
        return self.process.returncode

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        os.close(self._slave)
        os.close(self._master)
