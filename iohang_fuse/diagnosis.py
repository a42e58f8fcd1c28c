"""What somebody wants to know who looks for the reason: what waits, who uses the mount, where every task and thread is.

Everything is read from this process and from /proc, and nothing from the mount, which may be what hangs.
"""

from __future__ import annotations

import logging
import math
import os
import sys
import time
import traceback
from pathlib import Path
from typing import TYPE_CHECKING

import trio

from iohang_fuse.messages import error_words

if TYPE_CHECKING:
    from iohang_fuse.rehandle import Request
    from iohang_fuse.requests import Requests

log = logging.getLogger(__name__)

_LINES_AT_ONCE = 500
_PAUSE_S = 0.05
"""So many lines of a dump, and then so long for who writes them: 10,000 held requests are more lines than may wait for him."""


async def write_dump(requests: Requests) -> None:
    """Log what SIGUSR1 asks for, as it is now."""
    for number, line in enumerate(dump(requests, trio.current_time()), start=1):
        log.info("%s", line)
        if number % _LINES_AT_ONCE == 0:
            await trio.sleep(_PAUSE_S)


def dump(requests: Requests, now: float) -> list[str]:
    """SIGUSR1's lines: the write logs, every request that waits, and the stack of every task and thread."""
    lines = [f"{len(requests.images)} images are open"]
    for image in requests.images.values():
        if image.log or image.held.pressed:
            doubt = ", to be written again before the next sync" if image.log.in_doubt else ""
            lines.append(
                f"{image.held.image}: write log: {len(image.log)} writes, {image.log.bytes} of {image.log.limit} bytes{doubt}; "
                f"{image.held.pressed} writes have had to wait for room"
            )
        lines += [_describe(image.held.image, request, now) for request in image.held.trying + image.held.waiting]
    root = trio.lowlevel.current_root_task()
    if root is not None:
        lines += _task_lines(root)
    for ident, frame in sys._current_frames().items():  # noqa: SLF001 - faulthandler cannot write to a logger
        stack = traceback.extract_stack(frame)
        lines.append(f"thread {ident}: " + " < ".join(f"{s.name}:{s.lineno}" for s in reversed(stack[-4:])))
    return lines


def _describe(image: str, request: Request, now: float) -> str:
    deadline = "none" if request.deadline_s is None else wall_clock(request.deadline_s)
    return (
        f"{image}: {request.op} of {request.length} bytes at {request.offset}: {request.state.name.lower()}"
        f"{', held' if request.held else ''}, for {now - request.arrived_s:.1f} s, {request.attempts} attempts, "
        f"last error {error_words(request.errno) if request.errno else 'none'}, deadline {deadline}"
    )


def _task_lines(root: trio.lowlevel.Task) -> list[str]:
    lines = []
    tasks = [root]
    while tasks:
        task = tasks.pop()
        try:
            stack = [f"{frame.f_code.co_name}:{line}" for frame, line in task.iter_await_frames()]
        except (RuntimeError, AttributeError, TypeError):  # pyfuse3's handlers are Cython's: no frames
            stack = ["(compiled)"]
        lines.append(f"task {task.name}: " + " > ".join(stack[-8:]))
        tasks += [child for nursery in task.child_nurseries for child in nursery.child_tasks]
    return lines


def wall_clock(at_s: float) -> str:
    """A moment of trio's clock as local time, to the second."""
    if at_s == math.inf:
        return "ever"
    return time.strftime("%H:%M:%S", time.localtime(time.time() + at_s - trio.current_time()))


def users_of(mountpoint: str) -> list[str]:
    """Processes with something open on *mountpoint*, as `qemu-system-x86 (1234)`. From /proc, never by touching the mount."""
    users = []
    for process in Path("/proc").iterdir():
        if process.name.isdigit() and _uses(process, mountpoint):
            try:
                name = (process / "comm").read_text().strip()
            except OSError:
                continue
            users.append(f"{name} ({process.name})")
    return users


def _uses(process: Path, mountpoint: str) -> bool:
    links = [process / "cwd", process / "root", process / "exe"]
    try:
        links += [*(process / "fd").iterdir()]
    except OSError:
        return False
    for link in links:
        try:
            target = os.readlink(link)
        except OSError:
            continue
        if target == mountpoint or target.startswith(mountpoint.rstrip("/") + "/"):
            return True
    try:
        return f" {mountpoint.rstrip('/')}/" in (process / "maps").read_text(errors="replace")
    except OSError:
        return False
