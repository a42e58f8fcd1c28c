"""Reads the facts that examination.py judges.

Nothing here waits for the storage for long: SOURCE is looked at by presence.py, with a limit, and everything else is in /proc,
/sys, /etc and the monitor's answers.
"""

from __future__ import annotations

import math
import os
import socket
from pathlib import Path
from typing import TYPE_CHECKING, Any

from iohang_fuse import bounded, limits, presence
from iohang_fuse.config import Config, ConfigError, load
from iohang_fuse.doctor import nfs, qemu
from iohang_fuse.doctor.facts import Facts, Host, Limit, Served, Settings
from iohang_fuse.messages import errno_name
from iohang_fuse.mounttable import OUR_TYPE, OUR_TYPES, holding, parse_mount_id, parse_mountinfo

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from iohang_fuse.mounttable import Mounted

_CONNECTIONS = Path("/sys/fs/fuse/connections")
_FILES = 1 << 20


def before_mount(config: Config, refusal: Callable[[], str | None]) -> Facts:
    """What *config* would meet. *refusal* says why the mount would not come to be; it is asked if SOURCE is there."""
    sight = presence.sight(str(config.source))
    settings = settings_of(config)
    monitor = config.monitor_path
    table = tuple(presence.mount_table())
    return Facts(
        source=str(config.source),
        mountpoint=str(config.mountpoint),
        settings=settings,
        sight=sight,
        table=table,
        planned=tuple(presence.planned_mounts()),
        limits=_limits(settings, limits.read_system().open_files),
        host=read_host(),
        monitor=None if monitor is None else str(monitor),
        monitor_taken=monitor is not None and monitor.exists() and listens(monitor),
        qemus=qemus(str(config.mountpoint)),
        refusal=refusal() if sight.problem is None else None,
        lease_s=_lease_s(holding(sight.path, table)),
    )


def of_mount(
    mounted: Mounted, monitor: Path, status: Mapping[str, Any] | None, told: Mapping[str, Any] | None, why_not: str = ""
) -> Facts:
    """A mount that is there. *status* and *told*: its monitor's query-status and query-settings; None without an answer."""
    if told is None:
        settings, settings_from = _settings_from_fstab(mounted)
    else:
        settings, settings_from = settings_told(told), ""
    pid = None if status is None else status["pid"]
    sight = presence.sight(mounted.source)
    serves, lies_on = _what_it_serves(pid, sight.path)
    table = tuple(presence.mount_table())
    return Facts(
        source=mounted.source,
        mountpoint=mounted.mountpoint,
        settings=settings,
        sight=sight,
        table=table,
        planned=tuple(presence.planned_mounts()),
        limits=_limits(settings, _open_files(pid)),
        host=read_host(),
        served=Served(
            answers=status is not None,
            why_not=why_not,
            settings_from=settings_from,
            engine=status["engine"] if status else "",
            engine_reason=status.get("engine-reason", "") if status else "",
            images=status["images"] if status else 0,
            holding=status["holding"] if status else True,
            max_background=limits.number(f"{_CONNECTIONS}/{mounted.device_minor}/max_background", 0) or None,
            serves=serves,
            lies_on=lies_on,
        ),
        monitor=str(monitor),
        qemus=qemus(mounted.mountpoint),
        lease_s=_lease_s(holding(sight.path, table)),
    )


def find_mount(mountpoint: str) -> Mounted | None:
    """The mount of ours at *mountpoint*, from the mount table."""
    found = [each for each in presence.mount_table() if each.mountpoint == mountpoint and each.fstype == OUR_TYPE]
    return found[-1] if found else None


def listens(path: Path) -> bool:
    """Whether a server does at this socket: one that was killed leaves it behind."""
    with socket.socket(socket.AF_UNIX) as probe:
        probe.setblocking(False)  # noqa: FBT003 - one that does not accept is alive, too
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            return False
        except OSError:
            return True
        return True


# ---- settings


def settings_of(config: Config) -> Settings:
    """Those of a mount that is to be."""
    return Settings(
        read_timeout_s=config.read_timeout_s,
        write_timeout_s=config.write_timeout_s,
        fsync_timeout_s=config.fsync_timeout_s,
        interval_s=config.interval_s,
        blocked_after_s=config.blocked_after_s,
        errors=frozenset(str(errno_name(number)) for number in config.errors),
        timeout_errno=str(errno_name(config.timeout_errno)),
        held_limit_bytes=config.held_limit_bytes,
        write_log_bytes=config.write_log_bytes,
        max_background=config.max_background,
        engine=config.engine,
        direct=config.direct,
        reconnect=config.reconnect,
        mount_words=config.mount_words,
    )


def settings_told(told: Mapping[str, Any]) -> Settings:
    """From the answer to query-settings."""

    def span(key: str) -> float:
        return math.inf if told[key] is None else float(told[key])

    return Settings(
        read_timeout_s=span("read-timeout"),
        write_timeout_s=span("write-timeout"),
        fsync_timeout_s=span("fsync-timeout"),
        interval_s=span("interval"),
        blocked_after_s=span("blocked-after"),
        errors=frozenset(told["errors"]),
        timeout_errno=told["timeout-errno"],
        held_limit_bytes=told["held-limit"],
        write_log_bytes=told["write-log"],
        max_background=told["max-background"],
        engine=told["engine"],
        direct=told["direct"],
        reconnect=told.get("reconnect", "never"),  # of an older server, after an upgrade
        mount_words=tuple(told["mount-words"]),
    )


def _settings_from_fstab(mounted: Mounted) -> tuple[Settings, str]:
    for line in presence.planned_mounts():
        if line.mountpoint == mounted.mountpoint and line.fstype in OUR_TYPES:
            try:
                return settings_of(
                    load(line.source, line.mountpoint, [",".join(line.options)])
                ), "its line in /etc/fstab"
            except ConfigError:
                break
    # What the mount table shows of it is what the kernel was told.
    words = tuple({"allow_other", "default_permissions"} & {*mounted.options})
    defaults = settings_of(load(mounted.source, mounted.mountpoint, words))
    return defaults, "the defaults"


# ---- the system


def read_host() -> Host:
    """What is set on this machine."""
    return Host(
        is_root=os.geteuid() == 0,
        user_allow_other=_says_user_allow_other(),
        io_uring_disabled=limits.number("/proc/sys/kernel/io_uring_disabled", 0),
        hung_task_timeout_s=limits.number("/proc/sys/kernel/hung_task_timeout_secs", 0),
        hung_task_panic=bool(limits.number("/proc/sys/kernel/hung_task_panic", 0)),
        memory_available_bytes=_memory_available(),
    )


def qemus(mountpoint: str) -> tuple[qemu.Qemu, ...]:
    """The running ones with disks beneath *mountpoint*, by their command lines."""
    try:
        found = [qemu.parse(pid, words, mountpoint) for pid, words in bounded.look(_command_lines, presence.LOOK_S)]
    except bounded.NoAnswer:
        return ()
    return tuple(each for each in found if each is not None)


def _command_lines() -> list[tuple[int, list[str]]]:
    """In a child: that of a process which hangs in a page fault cannot be read, and who tries to waits with it."""
    found = []
    for process in Path("/proc").iterdir():
        if process.name.isdigit():
            try:
                words = (process / "cmdline").read_bytes().split(b"\0")
            except OSError:
                continue
            if qemu.is_qemu(os.fsdecode(words[0])):
                found.append((int(process.name), [os.fsdecode(word) for word in words]))
    return found


def _what_it_serves(pid: int | None, source: str) -> tuple[Mounted | None, Mounted | None]:
    """The mount that the server's SOURCE lies on, and the one that its path leads to now; None where /proc does not say."""
    try:
        table = parse_mountinfo(Path(f"/proc/{pid}/mountinfo").read_text(errors="surrogateescape"))
        opened = [link.name for link in Path(f"/proc/{pid}/fd").iterdir() if _leads_to(link, source)]
        mount_ids = {parse_mount_id(Path(f"/proc/{pid}/fdinfo/{name}").read_text()) for name in opened}
    except OSError:
        return None, None
    lies_on = holding(source, table)
    by_id = {each.mount_id: each for each in table}
    if lies_on is None or lies_on.mount_id in mount_ids:
        return lies_on, lies_on
    return next((by_id[each] for each in mount_ids if each in by_id), None), lies_on


def _leads_to(link: Path, path: str) -> bool:
    try:
        return os.readlink(link) == path
    except OSError:  # closed meanwhile
        return False


def _lease_s(below: Mounted | None) -> float | None:
    """The file is the kernel's own and asks no server."""
    if below is None or below.fstype not in nfs.TYPES:
        return None
    try:
        mountstats = Path("/proc/self/mountstats").read_text(errors="surrogateescape")
    except OSError:
        return None
    return nfs.parse_lease_s(mountstats, below.mountpoint)


def _limits(settings: Settings, open_files: int) -> tuple[Limit, ...]:
    system = limits.read_system()
    found = limits.problems(
        limits.System(
            system.default_request_timeout_s, system.max_request_timeout_s, system.max_map_count, open_files=open_files
        ),
        timeout_s=max(settings.timeouts_s),
        shortest_timeout_s=min((each for each in settings.timeouts_s if each), default=0),
        interval_s=settings.interval_s,
        max_background=settings.max_background,
    )
    return tuple(Limit(each.seen, each.do, each.fatal) for each in found)


def _open_files(pid: int | None) -> int:
    """RLIMIT_NOFILE of the server; enough where it may not be asked."""
    try:
        lines = Path(f"/proc/{pid}/limits").read_text().splitlines()
    except OSError:
        return _FILES
    soft = next((line.split()[3] for line in lines if line.startswith("Max open files")), "unlimited")
    return int(soft) if soft.isdecimal() else _FILES


def _memory_available() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:")), None)


def _says_user_allow_other() -> bool:
    try:
        return "user_allow_other" in map(str.strip, Path("/etc/fuse.conf").read_text(errors="replace").splitlines())
    except OSError:
        return False
