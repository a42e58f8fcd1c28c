"""Whether a mount will do in an outage what it is there for: facts in, findings out.

1. Pure: what is judged here was read by survey.py, and was true then.
2. Each function looks at one thing and says what it has seen also where that is fine: who asks at 3 a.m. wants to know what has
   been looked at.
3. What is suspicious and no more is said so: the reader knows what this program cannot know.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from iohang_fuse.doctor.findings import Finding, Level
from iohang_fuse.doctor.of_source import attempt_s, first_attempt_s, source_findings
from iohang_fuse.messages import size_words, span_words

if TYPE_CHECKING:
    from collections.abc import Iterator

    from iohang_fuse.doctor.facts import Facts
    from iohang_fuse.doctor.qemu import Disk, Qemu

GUEST_DISK_TIMEOUT_S = 30
"""Linux guests: /sys/block/sdX/device/timeout for SCSI and SATA, nvme_core.io_timeout for NVMe. virtio-blk has none."""

_LONGEST_NVME_TIMEOUT_S = 4294967  # more overflows its milliseconds


def examine(facts: Facts) -> list[Finding]:
    """Everything, in the order in which a request passes it: the source, this host, the guests."""
    return [
        *_refusal(facts),
        *_server(facts),
        *source_findings(facts),
        *_timeouts(facts),
        *_limits(facts),
        *_max_background(facts),
        *_engine(facts),
        *_hung_tasks(facts),
        *_memory(facts),
        *_monitor(facts),
        *_other_users(facts),
        *_guests(facts),
        *(finding for qemu in facts.qemus for finding in _qemu(facts, qemu)),
    ]


def longest_wait_s(facts: Facts) -> float:
    """How long a guest's request may take: until the first failure is noticed, the timeout, and at most one attempt more (P1)."""
    settings = facts.settings
    attempt = attempt_s(facts)
    noticed_s = min(first_attempt_s(facts) or 0, settings.blocked_after_s)
    return noticed_s + max(settings.timeouts_s) + (0 if attempt is None else attempt)


# ---- the mount


def _refusal(facts: Facts) -> Iterator[Finding]:
    if facts.refusal is not None and facts.sight.problem is None:
        yield Finding(Level.PROBLEM, "mount", facts.refusal, "the mount would be refused")


def _server(facts: Facts) -> Iterator[Finding]:
    served = facts.served
    if served is None:
        return
    if served.settings_from:
        yield Finding(
            Level.ADVICE,
            "settings",
            f"the monitor has not told them: judged by {served.settings_from}",
            "what follows is true of a mount with these settings",
        )
    if not served.holding:
        yield Finding(
            Level.WARNING,
            "holding",
            "it is paused, for all images or some",
            "errors are passed on to the guests",
            "iohangctl unpause",
        )


def _timeouts(facts: Facts) -> Iterator[Finding]:
    timeouts_s = facts.settings.timeouts_s
    if not any(timeouts_s):
        yield Finding(
            Level.WARNING,
            "timeout",
            "all timeouts are 0",
            "nothing is held: every error is passed on",
            "-o timeout=5min (as long as your longest outage)",
        )
    elif not all(timeouts_s):
        off = [kind for kind, each in zip(("reads", "writes", "fsyncs"), timeouts_s, strict=True) if not each]
        yield Finding(
            Level.WARNING,
            "timeout",
            f"the timeout of {' and '.join(off)} is 0",
            "their errors are passed on to the guest, whatever the others wait for",
            "leave that option out, so that timeout counts for all three",
        )


def _monitor(facts: Facts) -> Iterator[Finding]:
    served = facts.served
    if facts.monitor is None:
        yield Finding(
            Level.WARNING,
            "monitor",
            "there is none (monitor=none)",
            "in an outage nobody can ask what hangs, try now, or end it",
            "leave monitor=none out",
        )
    elif served is not None and not served.answers:
        yield Finding(
            Level.PROBLEM,
            "monitor",
            f"{facts.monitor}: {served.why_not}",
            "the server is gone, or stuck, or was mounted with another monitor",
            f"look at its log, and whether its process lives; `stat -f {facts.mountpoint}` says ENOTCONN if not: "
            f"then stop the guests, `umount {facts.mountpoint}`, and mount again",
        )
    elif facts.monitor_taken:
        yield Finding(
            Level.WARNING,
            "monitor",
            f"another mount's listens at {facts.monitor}",
            "this mount would be served without, or be refused where the socket is named",
            "-o monitor=/run/iohang/ANOTHER.sock",
        )
    else:
        yield Finding(Level.OK, "monitor", f"{facts.monitor} {'answers' if served else 'is free'}")


# ---- this host


def _limits(facts: Facts) -> Iterator[Finding]:
    for limit in facts.limits:
        yield Finding(Level.PROBLEM if limit.fatal else Level.WARNING, "limits", limit.seen, do=limit.do)
    if not facts.limits:
        yield Finding(
            Level.OK,
            "limits",
            "the kernel's timeouts for FUSE, open files and receive buffers leave room for these settings",
        )


def _max_background(facts: Facts) -> Iterator[Finding]:
    if facts.served is None:
        return
    wanted, there = facts.settings.max_background, facts.served.max_background
    if there == wanted:
        yield Finding(Level.OK, "max_background", f"{there} is in force")
        return
    if there is None and not facts.host.is_root:
        yield Finding(Level.ADVICE, "max_background", "only root can read what is in force", do="ask again as root")
        return
    yield Finding(
        Level.WARNING,
        "max_background",
        f"{wanted} is asked for, and {'what is in force cannot be read' if there is None else f'{there} is in force'}",
        "while more requests than the kernel allows are held, every image of the mount waits",
        "mount -t fusectl fusectl /sys/fs/fuse/connections (unless it is); as root "
        f"`echo {wanted} > /sys/fs/fuse/connections/$(mountpoint -d {facts.mountpoint} | cut -d: -f2)/max_background`",
    )


def _engine(facts: Facts) -> Iterator[Finding]:
    served, host = facts.served, facts.host
    allow = "sysctl -w kernel.io_uring_disabled=0; or say engine=threads, knowingly"
    if served is not None and served.engine:
        if served.engine_reason:
            yield Finding(
                Level.ADVICE, "engine", f"{served.engine}: {served.engine_reason}", "it works, and is slower than io_uring",
                allow,
            )  # fmt: skip
        else:
            yield Finding(Level.OK, "engine", served.engine)
        return
    off = host.io_uring_disabled == 2 or (host.io_uring_disabled == 1 and not host.is_root)
    seen = f"kernel.io_uring_disabled is {host.io_uring_disabled}, and engine is {facts.settings.engine}"
    if off and facts.settings.engine == "uring":
        yield Finding(Level.PROBLEM, "engine", seen, "the mount would be refused", allow)
    elif off and facts.settings.engine == "auto":
        yield Finding(Level.ADVICE, "engine", seen, "threads are used, which work, and are slower", allow)
    else:
        yield Finding(Level.OK, "engine", seen)


def _hung_tasks(facts: Facts) -> Iterator[Finding]:
    host, wait_s = facts.host, longest_wait_s(facts)
    limit_s = host.hung_task_timeout_s
    seen = f"kernel.hung_task_timeout_secs is {limit_s}, a request may wait {_span(wait_s)}"
    if limit_s and wait_s >= limit_s and host.hung_task_panic:
        yield Finding(
            Level.PROBLEM,
            "hung tasks",
            f"kernel.hung_task_panic is set, {seen}",
            "a process that waits for its disk longer than that panics this host, and with it all guests",
            "sysctl -w kernel.hung_task_panic=0 (and in /etc/sysctl.d, so that it stays)",
        )
    elif limit_s and wait_s >= limit_s:
        yield Finding(
            Level.ADVICE,
            "hung tasks",
            seen,
            'the kernel logs "task blocked for more than ... seconds" of processes that wait: harmless while hung_task_panic is 0',
        )
    else:
        yield Finding(Level.OK, "hung tasks", seen if limit_s else "the kernel does not look for them")


def _memory(facts: Facts) -> Iterator[Finding]:
    available = facts.host.memory_available_bytes
    if available is None:
        return
    images = max(facts.served.images if facts.served else 1, 1)
    most = facts.settings.held_limit_bytes + images * facts.settings.write_log_bytes
    seen = (
        f"held_limit {size_words(facts.settings.held_limit_bytes)} "
        f"and a write_log of {size_words(facts.settings.write_log_bytes)} for each of {images} open images are {size_words(most)}; "
        f"{size_words(available)} are available"
    )
    if most > available:
        yield Finding(
            Level.WARNING,
            "memory",
            seen,
            "in a long outage the server may be killed for want of memory, and its guests lose their disks",
            f"-o held_limit={max((available - images * facts.settings.write_log_bytes) // 2, 64 << 20) >> 20}M",
        )
    else:
        yield Finding(Level.OK, "memory", seen)


def _other_users(facts: Facts) -> Iterator[Finding]:
    words, host = facts.settings.mount_words, facts.host
    if "allow_other" not in words:
        yield Finding(
            Level.ADVICE,
            "users",
            "allow_other is not given",
            "a QEMU that runs as another user than the one who mounts (libvirt-qemu, qemu) is refused with EACCES",
            "-o allow_other,default_permissions",
        )
    elif facts.served is None and not host.is_root and not host.user_allow_other:
        yield Finding(
            Level.PROBLEM,
            "users",
            "allow_other, as a user who is not root, and /etc/fuse.conf does not say user_allow_other",
            "fusermount3 refuses the mount",
            "echo user_allow_other >> /etc/fuse.conf, or mount as root",
        )
    else:
        yield Finding(Level.OK, "users", "other users than the one who mounts may use the mount (allow_other)")


# ---- the guests


def _guests(facts: Facts) -> Iterator[Finding]:
    wait_s = longest_wait_s(facts)
    seen = f"a request may wait {_span(wait_s)}; SCSI, SATA and NVMe guests give up after {GUEST_DISK_TIMEOUT_S} s by themselves"
    if wait_s < GUEST_DISK_TIMEOUT_S:
        yield Finding(Level.OK, "guests", seen)
        return
    seconds = _LONGEST_NVME_TIMEOUT_S if wait_s == math.inf else min(math.ceil(wait_s) + 30, _LONGEST_NVME_TIMEOUT_S)
    yield Finding(
        Level.ADVICE,
        "guests",
        seen,
        "what is set in a guest cannot be seen from here; virtio-blk has no such timeout, and needs nothing",
        'in each other guest: a udev rule ACTION=="add|change", SUBSYSTEM=="block", KERNEL=="sd*", '
        f'ATTR{{device/timeout}}="{seconds}"; on its kernel\'s command line nvme_core.io_timeout={seconds}; Windows: TimeOutValue '
        r"in HKLM\SYSTEM\CurrentControlSet\Services\Disk; and kernel.hung_task_panic=0",
    )


def _qemu(facts: Facts, qemu: Qemu) -> Iterator[Finding]:
    about = f"QEMU {qemu.name or qemu.pid}"
    for disk in qemu.disks:
        seen = f"{disk.path}: werror={disk.werror}, rerror={disk.rerror}"
        stops = _stops(facts, disk)
        if disk.gives_up and longest_wait_s(facts) >= GUEST_DISK_TIMEOUT_S:
            yield Finding(
                Level.ADVICE,
                about,
                f"{disk.path} is a {disk.driver} disk, for which the guest has a timeout of about {GUEST_DISK_TIMEOUT_S} s",
                f"a request may wait {_span(longest_wait_s(facts))} here",
                "raise it in the guest (see guests), or use virtio-blk",
            )
        if stops:
            yield Finding(Level.OK, about, f"{seen}: what is given up pauses the guest")
        else:
            yield Finding(
                Level.ADVICE,
                about,
                seen,
                "what is given up after the timeout is an I/O error in the guest",
                "werror=stop,rerror=stop (libvirt: error_policy='stop' rerror_policy='stop') pauses the guest instead; "
                "`virsh resume` it when the storage works",
            )


def _stops(facts: Facts, disk: Disk) -> bool:
    if facts.settings.timeout_errno == "ENOSPC":
        return disk.werror in {"stop", "enospc"} and disk.rerror in {"stop", "enospc"}
    return disk.werror == "stop" and disk.rerror == "stop"


# ---- words


def _span(seconds: float) -> str:
    return "for ever" if seconds == math.inf else f"up to {span_words(seconds)}"
