"""Whether SOURCE is there: what is mounted, what should be, and a look at the directory itself that never takes long.

An empty directory beneath a mount point whose mount has not come is the worst SOURCE of all: guests would be written to the host's
own disk. So a directory is "there" only if the mount that /etc/fstab has for it is, too.
"""

from __future__ import annotations

import errno
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING

from iohang_fuse import bounded
from iohang_fuse.messages import error_words, span_words
from iohang_fuse.mounttable import Mounted, Planned, Sight, is_mounted, parse_fstab, parse_mountinfo, plan_for

if TYPE_CHECKING:
    from collections.abc import Callable

LOOK_S = 5.0
"""How long a look at SOURCE may take before it counts as no answer: what the default of `blocked_after` is."""

_SHORTEST_LOOK_S = 1.0
"""A shorter one would say of a busy host that SOURCE does not answer."""

_POLL_S = 1.0
_TOLD_EACH_S = 10.0


class NeverCame(Exception):
    """SOURCE was not there in time, and why."""


def mount_table() -> list[Mounted]:
    """The mounts of this namespace."""
    return parse_mountinfo(Path("/proc/self/mountinfo").read_text(errors="surrogateescape"))


def planned_mounts() -> list[Planned]:
    """What /etc/fstab mounts. $LIBMOUNT_FSTAB names another file, as for mount(8)."""
    try:
        return parse_fstab(Path(os.environ.get("LIBMOUNT_FSTAB") or "/etc/fstab").read_text(errors="surrogateescape"))
    except OSError:
        return []


def wait(source: str, span_s: float, tell: Callable[[str, float], None]) -> None:
    """Until SOURCE is there. Raises `NeverCame` after *span_s* seconds.

    *tell* gets what is waited for, as a clause, and how many seconds may be left: when the waiting begins, and each 10 s.
    """
    begin_s = told_s = time.monotonic()
    told_s -= _TOLD_EACH_S
    while True:
        left_s = begin_s + span_s - time.monotonic()
        problem = missing(sight(source, max(min(LOOK_S, left_s), _SHORTEST_LOOK_S)))
        if problem is None:
            return
        left_s = begin_s + span_s - time.monotonic()
        if left_s <= 0:
            raise NeverCame(f"waited {span_words(span_s)} (wait_source), and {problem}")
        if time.monotonic() - told_s >= _TOLD_EACH_S:
            told_s = time.monotonic()
            tell(problem, left_s)
        time.sleep(min(_POLL_S, left_s))


def missing(seen: Sight) -> str | None:
    """Why SOURCE is not there, as a clause; None if it is."""
    return unmounted_plan(seen.path) or seen.problem


def unmounted_plan(path: str) -> str | None:
    """That *path* lies under a mount point of /etc/fstab where nothing is mounted, as a clause; None if it does not."""
    plan = plan_for(path, planned_mounts())
    if plan is None or is_mounted(plan.mountpoint, mount_table()):
        return None
    return f"{plan.mountpoint}, where /etc/fstab mounts {plan.source}, is not mounted"


def sight(source: str, limit_s: float = LOOK_S) -> Sight:
    """A look at SOURCE, which takes *limit_s* at most. It mounts what an automount has there."""
    try:
        seen = bounded.look(lambda: _look(source), limit_s)
    except bounded.NoAnswer:
        return Sight(os.path.abspath(source), f"SOURCE {source} does not answer", answers=False)
    return Sight(seen["path"], seen["problem"], empty=seen["empty"], on_root=seen["on_root"])


def _look(source: str) -> dict[str, object]:
    """In the child."""
    seen: dict[str, object] = {"problem": None, "empty": None, "on_root": False}
    try:
        # Opened, not only looked up: that is what sets off an automount.
        try:
            fd = os.open(source, os.O_RDONLY | os.O_DIRECTORY)
        except PermissionError:  # root_squash: it may not be listed, and serves all the same
            fd = os.open(source, os.O_PATH | os.O_DIRECTORY)
        else:
            with os.scandir(fd) as entries:
                seen["empty"] = next(entries, None) is None
        seen["on_root"] = os.fstat(fd).st_dev == os.stat("/").st_dev
    except OSError as error:
        what = {errno.ENOENT: "does not exist", errno.ENOTDIR: "is not a directory"}.get(error.errno or 0)
        seen["problem"] = f"SOURCE {source} {what}" if what else f"SOURCE {source}: {error_words(error.errno)}"
    seen["path"] = os.path.realpath(source)
    return seen
