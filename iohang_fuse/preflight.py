"""Whether there will be a mount: what can be refused is refused here, before anything is done.

Each refusal is one line and one of mount(8)'s exit codes. MOUNTPOINT is neither opened nor listed: on an automount that would wait
for the mount that we are to be.
"""

from __future__ import annotations

import errno
import os
import stat
import sys
from typing import TYPE_CHECKING

from iohang_fuse import limits, logs, presence
from iohang_fuse.messages import error_words, span_words

if TYPE_CHECKING:
    from collections.abc import Callable

    from iohang_fuse.config import Config
    from iohang_fuse.notify import Notify

SUBTYPE = "iohang-mount"  # findmnt shows fuse.iohang-mount: the type that fstab has, too
EX_USAGE, EX_SYSTEM, EX_INTERRUPTED, EX_FAILURE = 1, 2, 8, 32  # mount(8), EXIT STATUS

_START_EXTENSION_S = 60.0
"""What a start that waits for SOURCE asks for each ten seconds, so that systemd's TimeoutStartSec= does not end it."""


class Refusal(Exception):
    """Why there will be no mount, in one line, and mount(8)'s exit code for it."""

    def __init__(self, code: int, text: str) -> None:
        super().__init__(text)
        self.code = code


def wait_for_source(config: Config, tell: Callable[[str, float], None]) -> None:
    """As long as `wait_source` says. Raises `Refusal`. *tell* is that of `presence.wait`.

    Before anything else is done, in the process that was started: whoever waits for it sees what it waits for, and can end it.
    """
    if not config.wait_source_s:
        return
    try:
        presence.wait(str(config.source), config.wait_source_s, tell)
    except presence.NeverCame as error:
        raise Refusal(EX_FAILURE, str(error)) from None
    except KeyboardInterrupt:
        raise Refusal(EX_INTERRUPTED, f"interrupted while it waited for SOURCE {config.source} (wait_source)") from None


def say_waiting(notify: Notify, what: str, left_s: float) -> None:
    """What is waited for; and a service manager gives the start more time, until the next word in ten seconds."""
    said = f"{what}; waiting for up to {span_words(left_s)}"
    print(f"iohang-mount: {said}", file=sys.stderr, flush=True)  # noqa: T201
    notify.extend_timeout(_START_EXTENSION_S, STATUS=said)


def check_paths(config: Config) -> str:
    """The mount point without symlinks. Raises `Refusal` if SOURCE or MOUNTPOINT cannot be what they are given as.

    MOUNTPOINT is neither opened nor listed: on an automount that would wait for the mount that we are.
    """
    _check_directory("SOURCE", str(config.source), "name the directory of the images")
    origin = os.path.realpath(config.source)
    mountpoint = os.path.realpath(config.mountpoint)
    for mounted in presence.mount_table():
        if mounted.mountpoint == mountpoint and mounted.fstype == f"fuse.{SUBTYPE}":
            state = "" if _answers(mountpoint) else ", and its server is gone; `umount` it first"
            raise Refusal(EX_FAILURE, f"{mountpoint} is already an iohang-mount of {mounted.source}{state}")
    _check_directory("MOUNTPOINT", mountpoint, "make it with mkdir(1)")
    if origin == mountpoint:
        raise Refusal(EX_FAILURE, f"SOURCE and MOUNTPOINT are both {origin}; name two directories")
    if _lies_in(origin, mountpoint):
        raise Refusal(
            EX_FAILURE,
            f"SOURCE {origin} lies under MOUNTPOINT {mountpoint}: the mount would hide it; mount elsewhere",
        )
    if _lies_in(mountpoint, origin):
        raise Refusal(
            EX_FAILURE,
            f"MOUNTPOINT {mountpoint} lies under SOURCE {origin}: the mount would show itself; mount elsewhere",
        )
    return mountpoint


def _check_directory(what: str, path: str, right: str) -> None:
    """Raises `Refusal` unless *path* is one. stat(2) neither opens it nor sets off an automount."""
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        raise Refusal(EX_FAILURE, f"{what} {path} does not exist; {right}") from None
    except OSError as error:
        raise Refusal(EX_FAILURE, f"{what} {path}: {error_words(error.errno)}") from None
    if not stat.S_ISDIR(mode):
        raise Refusal(EX_FAILURE, f"{what} {path} is not a directory; name one")


def _lies_in(path: str, folder: str) -> bool:
    return os.path.commonpath([path, folder]) == folder


def _answers(mountpoint: str) -> bool:
    try:
        os.statvfs(mountpoint)  # stat(2) could be answered from the kernel's cache
    except OSError as error:
        return error.errno != errno.ENOTCONN
    return True


def check_log(config: Config) -> None:
    """Raises `Refusal` if the log file cannot be written, while there is somebody to tell."""
    if config.log is not None:
        try:
            logs.touch(config.log)
        except OSError as error:
            raise Refusal(
                EX_USAGE, f"log {config.log} cannot be written: {error_words(error.errno)}; name a file"
            ) from None


def longest_timeout_s(config: Config) -> float:
    """Of the three kinds of request."""
    return max(config.read_timeout_s, config.write_timeout_s, config.fsync_timeout_s)


def check_limits(config: Config) -> None:
    """Raises `Refusal` with every limit that would kill the mount; the others are warned about when it serves."""
    fatal = [problem.text for problem in limit_problems(config) if problem.fatal]
    if fatal:
        raise Refusal(EX_SYSTEM, "; ".join(fatal))


def limit_problems(config: Config) -> list[limits.Problem]:
    """What the system's limits do to this mount."""
    timeouts = [t for t in (config.read_timeout_s, config.write_timeout_s, config.fsync_timeout_s) if t]
    return limits.problems(
        limits.read_system(),
        timeout_s=longest_timeout_s(config),
        shortest_timeout_s=min(timeouts, default=0),
        interval_s=config.interval_s,
        max_background=config.max_background,
    )
