"""The limits that keep a mount alive while requests are held: read, raised, and checked against each other.

`problems` is pure; the functions around it read and write the system's settings.
"""

from __future__ import annotations

import atexit
import logging
import math
import resource
import signal
from dataclasses import dataclass
from pathlib import Path

from iohang_fuse import presence, syscalls

SLOWEST_ATTEMPT_S = 120
"""An attempt that fails: a `soft` NFS mount, vers 4.2, gave its first error after 92 s. One that never returns (`hard`) would
need a limit that is off; that is said in the documentation, not checked."""

log = logging.getLogger(__name__)

_CONNECTIONS = Path("/sys/fs/fuse/connections")
_FILES = 1 << 20


@dataclass(frozen=True, slots=True)
class System:
    """What the system allows. Times in seconds, 0 means no limit."""

    default_request_timeout_s: int = 0
    max_request_timeout_s: int = 0
    max_map_count: int = 65530
    open_files: int = _FILES


@dataclass(frozen=True, slots=True)
class Problem:
    """One limit that does not go with another: what is seen and what that means, and what to do."""

    seen: str
    do: str
    fatal: bool

    @property
    def text(self) -> str:
        """Both in one line."""
        return f"{self.seen}: {self.do}"


def read_system() -> System:
    """The system's limits as they are now. The FUSE timeouts exist from Linux 6.15 on."""
    return System(
        default_request_timeout_s=number("/proc/sys/fs/fuse/default_request_timeout", 0),
        max_request_timeout_s=number("/proc/sys/fs/fuse/max_request_timeout", 0),
        max_map_count=number("/proc/sys/vm/max_map_count", 65530),
        open_files=resource.getrlimit(resource.RLIMIT_NOFILE)[0],
    )


def problems(
    system: System, *, timeout_s: float, shortest_timeout_s: float, interval_s: float, max_background: int
) -> list[Problem]:
    """What cannot work together, each with what would be right. *timeout_s* is the longest of the three timeouts."""
    found = []
    names = {
        "fs.fuse.default_request_timeout": system.default_request_timeout_s,
        "fs.fuse.max_request_timeout": system.max_request_timeout_s,
    }
    for name, limit_s in names.items():
        # A request is at most its first attempt, its timeout and a last attempt old.
        needed_s = timeout_s + 2 * SLOWEST_ATTEMPT_S
        if limit_s and limit_s < needed_s:
            wanted = "0" if needed_s == math.inf else f"0, or {math.ceil(needed_s)} at least,"
            found.append(
                Problem(
                    f"{name} is {limit_s} s, and the kernel kills the whole mount when a request is older, while timeout "
                    f"lets one be held for {timeout_s:g} s",
                    f"set it to {wanted} with `sysctl -w {name}=0`, or lower timeout",
                    fatal=True,
                )
            )
    if shortest_timeout_s and interval_s >= shortest_timeout_s:
        found.append(
            Problem(
                f"interval is {interval_s:g} s and timeout {shortest_timeout_s:g} s: a request would be given up before it "
                "is tried again",
                f"using an interval of {effective_interval(shortest_timeout_s, interval_s):g} s",
                fatal=False,
            )
        )
    # libfuse gives each of pyfuse3's tasks a receive buffer of its own, a mapping of 1 MiB. A close is one
    # of their requests, and in the background.
    if max_background + 1024 > system.max_map_count:
        found.append(
            Problem(
                f"max_background is {max_background}, and vm.max_map_count ({system.max_map_count}) allows fewer receive "
                "buffers",
                f"lower it, or set `sysctl -w vm.max_map_count={2 * max_background + 65530}`",
                fatal=True,
            )
        )
    if system.open_files < 4096:
        found.append(
            Problem(
                f"only {system.open_files} files may be open (RLIMIT_NOFILE), one is needed for each file that the kernel "
                "knows of",
                "raise it, for example with LimitNOFILE=1048576 in the unit",
                fatal=False,
            )
        )
    return found


def effective_interval(timeout_s: float, interval_s: float) -> float:
    """The interval that lets a request be tried again at least twice before its deadline."""
    return max(0.1, timeout_s / 3) if timeout_s and interval_s >= timeout_s else interval_s


def raise_open_files() -> None:
    """RLIMIT_NOFILE as high as we may."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    ceiling = min(_FILES, number("/proc/sys/fs/nr_open", _FILES))
    for limit in ((ceiling, max(hard, ceiling)), (hard, hard)):
        if soft >= limit[0]:
            return
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, limit)
        except (ValueError, OSError):
            continue  # more than the hard limit takes CAP_SYS_RESOURCE
        return


def set_max_background_of(mountpoint: str, count: int) -> None:
    """`set_max_background` for what is mounted there on top. Nothing, if it has been unmounted already."""
    ours = [mounted for mounted in presence.mount_table() if mounted.mountpoint == mountpoint]
    if ours:
        set_max_background(ours[-1].device_minor, count)


def set_max_background(device_minor: int, count: int) -> None:
    """Let the kernel have *count* asynchronous requests in flight on the mount. Its default, 12, is one image's held ones.

    Raises OSError where fusectl is not mounted and cannot be, or the setting is refused.
    """
    folder = _CONNECTIONS / str(device_minor)
    if not folder.exists():
        syscalls.mount("fusectl", str(_CONNECTIONS), "fusectl")
    # The threshold first: the kernel refuses nothing, but between the two writes it must not call the queue congested.
    (folder / "congestion_threshold").write_text(f"{count * 3 // 4}\n")
    (folder / "max_background").write_text(f"{count}\n")
    if int((folder / "max_background").read_text()) != count:
        raise OSError(f"{folder}/max_background did not take {count}")


def number(path: str, otherwise: int) -> int:
    """The number in a file of /proc or /sys; *otherwise* where there is none."""
    try:
        return int(Path(path).read_text())
    except (OSError, ValueError):
        return otherwise


def alarm_clock() -> None:
    """A signal a second that interrupts a read from /dev/fuse which nobody answers.

    pyfuse3 reads requests with the interpreter locked, on a blocking descriptor. If a request vanishes between poll and
    read (its process was killed), the whole server would stand still, timers of held requests included, until the next
    one comes. EINTR ends that read; pyfuse3 then polls again.
    """
    signal.signal(signal.SIGALRM, lambda _number, _frame: None)
    signal.setitimer(signal.ITIMER_REAL, 1, 1)
    # The interpreter restores what a signal does before it ends, and this one would end it: an exit status of a failure.
    atexit.register(signal.setitimer, signal.ITIMER_REAL, 0)
