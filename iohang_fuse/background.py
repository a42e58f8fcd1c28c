"""Into the background, and back to the parent with an answer.

fork(2) with a pipe, before trio or any thread exists. The parent waits on the pipe: the child serves (exit 0), or has said
why not (its code and one line), or has died without a word.
"""

from __future__ import annotations

import contextlib
import os
import sys
import traceback
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable


INTERRUPTED = 8
"""mount(8), EXIT STATUS: "user interrupt"."""


class Started(Protocol):
    """How the serving process tells its parent."""

    def serving(self) -> None:
        """The mount serves."""

    def refused(self, code: int, text: str) -> None:
        """There will be no mount, and why."""


class NoParent:
    """In the foreground nobody waits."""

    def __init__(self, complain: Callable[[str], None] | None = None) -> None:
        """*complain*: where the log is not what the caller sees."""
        self._complain = complain

    def serving(self) -> None:
        """Nobody to tell."""

    def refused(self, code: int, text: str) -> None:  # noqa: ARG002 - the exit code is the process's own
        """The log has it, too."""
        if self._complain is not None:
            self._complain(text)


class _Pipe:
    def __init__(self, fd: int) -> None:
        self._fd: int | None = fd

    def serving(self) -> None:
        # Not before the mount is there and has answered: until then whoever is not of the process group of the automounter (systemd
        # starts mount(8) in its own) waits at the mount point for the mount - mount(2) itself included; see autofs_d_manage().
        os.setsid()
        _let_go_of_terminal()
        self._say(b"0")

    def refused(self, code: int, text: str) -> None:
        self._say(f"{code} {text}".encode(errors="replace"))

    def _say(self, message: bytes) -> None:
        if self._fd is not None:
            fd, self._fd = self._fd, None
            os.write(fd, message)
            os.close(fd)


def run(serve: Callable[[Started], int], complain: Callable[[str], None]) -> int:
    """Run *serve* in the background. Returns, in the parent, when it serves (0) or has failed (its code)."""
    receive, send = os.pipe()
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:  # closed by who called
            stream.flush()
    child = os.fork()
    if child:
        os.close(send)
        try:
            with os.fdopen(receive, "rb") as pipe:
                words = pipe.read().decode(errors="replace").split(" ", 1)
        except KeyboardInterrupt:  # the server has had it, too, as long as it is of the terminal's
            complain("interrupted before the mount served; if it does by now, unmount it")
            return INTERRUPTED
        if words == ["0"]:
            return 0
        if words[0]:
            complain(words[1])
            return int(words[0])
        _, status = os.waitpid(child, 0)
        complain(f"the server ended before it served ({_ending(status)}); its log says more")
        return 32
    os.close(receive)
    _let_go_of_inherited()
    os.chdir("/")
    code = 32
    try:
        code = serve(_Pipe(send))
    except KeyboardInterrupt:  # said by the parent, who has had it, too
        code = INTERRUPTED
    except BaseException:  # noqa: BLE001 - whatever it is, it is said here or nowhere
        traceback.print_exc()
    finally:
        os._exit(code)


def _ending(status: int) -> str:
    code = os.waitstatus_to_exitcode(status)
    return f"signal {-code}" if code < 0 else f"exit code {code}"


def _let_go_of_inherited() -> None:
    """What a caller had open would stay open for as long as the mount lasts: his lock file, his end of a pipe, a file on a mount.

    Python marks what it opens itself as to be closed on exec; what has come through exec is not marked.
    """
    for name in os.listdir("/proc/self/fd"):
        fd = int(name)
        with contextlib.suppress(OSError):  # that of the listing is gone
            if fd > 2 and os.get_inheritable(fd):
                os.close(fd)


def _let_go_of_terminal() -> None:
    """A daemon that kept its terminal's descriptors would keep `ssh host mount ...` from returning."""
    null = os.open("/dev/null", os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(null, fd)
    os.close(null)
