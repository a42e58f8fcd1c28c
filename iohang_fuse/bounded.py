"""A look at something that may never answer, such as a directory on a dead `hard` mount, with a limit of time.

In a child process: a thread inside a system call that does not return would keep this process from ending.
"""

from __future__ import annotations

import json
import os
import select
import signal
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable


_left_behind: list[int] = []
"""Children that were killed and cannot die before their system call returns."""


class NoAnswer(Exception):
    """It has not returned within the limit."""


def look(at: Callable[[], Any], limit_s: float) -> Any:
    """What *at* returns, by way of JSON. Raises `NoAnswer`, or the OSError that *at* raised.

    For a process without other threads (fork). Who is left behind in a system call has nothing of ours open: whoever waits
    for the end of our output would otherwise wait for the storage.
    """
    _bury()
    receive, send = os.pipe()
    child = os.fork()
    if child == 0:
        _answer(at, send)
    os.close(send)
    try:
        words = _read_all(receive, time.monotonic() + limit_s)
    except BaseException:
        os.kill(child, signal.SIGKILL)
        _left_behind.append(child)
        raise
    finally:
        os.close(receive)
    os.waitpid(child, 0)
    answer = json.loads(words or "{}")
    if "value" in answer:
        return answer["value"]
    if "errno" in answer:
        raise OSError(answer["errno"], os.strerror(answer["errno"]))
    raise RuntimeError(answer.get("bug", "the child process that looked has died"))


def _bury() -> None:
    for child in [*_left_behind]:
        if os.waitpid(child, os.WNOHANG)[0]:
            _left_behind.remove(child)


def _read_all(fd: int, deadline_s: float) -> bytes:
    words = b""
    while True:
        if not select.select([fd], [], [], max(deadline_s - time.monotonic(), 0))[0]:
            raise NoAnswer
        piece = os.read(fd, 65536)
        if not piece:
            return words
        words += piece


def _answer(at: Callable[[], Any], send: int) -> None:
    """The child's whole life."""
    try:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        null = os.open(os.devnull, os.O_RDWR)
        for fd in (0, 1, 2):
            os.dup2(null, fd)
        pipe = os.dup2(send, 3, inheritable=False) if send != 3 else send
        os.closerange(4, os.sysconf("SC_OPEN_MAX"))
        try:
            answer: dict[str, Any] = {"value": at()}
        except OSError as error:
            answer = {"errno": error.errno}
        except Exception as error:  # noqa: BLE001 - said by the parent
            answer = {"bug": repr(error)}
        with os.fdopen(pipe, "wb") as out:
            out.write(json.dumps(answer).encode())
    finally:
        os._exit(0)
