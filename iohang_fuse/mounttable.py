"""What is mounted, and what /etc/fstab says should be.

Pure: the tables' texts in, and what SOURCE lies on, or should lie on, out. presence.py reads them.
"""

from __future__ import annotations

import posixpath
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

AUTOFS = "autofs"
"""What stands on a mount point until somebody comes by: nothing is mounted there yet."""

OUR_TYPE = "fuse.iohang-mount"
"""What the mount table calls a mount of ours."""

OUR_TYPES = frozenset({OUR_TYPE, "iohang", "fuse.iohang"})
"""What /etc/fstab may call it."""

_NO_MOUNT_POINT = frozenset({"none", "swap", "/"})


@dataclass(frozen=True, slots=True)
class Mounted:
    """One line of /proc/self/mountinfo. *options* are those of the mount and of its file system."""

    mountpoint: str
    device_minor: int
    fstype: str
    source: str
    options: tuple[str, ...] = ()
    mount_id: int = 0


@dataclass(frozen=True, slots=True)
class Planned:
    """One line of /etc/fstab that mounts something on a directory."""

    source: str
    mountpoint: str
    fstype: str
    options: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Sight:
    """What a look at SOURCE has shown. *path* is without symlinks, where they could be followed.

    *problem*: why it is not there, or None. *empty* is None where it may not be listed.
    """

    path: str
    problem: str | None = None
    answers: bool = True
    empty: bool | None = None
    on_root: bool = False


def parse_mountinfo(text: str) -> list[Mounted]:
    """/proc/PID/mountinfo; see proc(5)."""
    table = []
    for line in text.split("\n")[:-1]:  # str.splitlines knows other ends, which a mount point's name may have
        fields = line.split(" ")
        separator = fields.index("-")
        table.append(
            Mounted(
                mountpoint=unescape(fields[4]),
                device_minor=int(fields[2].partition(":")[2]),
                fstype=fields[separator + 1],
                source=unescape(fields[separator + 2]),
                options=(*fields[5].split(","), *fields[separator + 3].split(",")),
                mount_id=int(fields[0]),
            )
        )
    return table


def parse_fstab(text: str) -> list[Planned]:
    """What fstab(5) mounts on directories other than `/`."""
    planned = []
    for line in text.splitlines():
        fields = line.split()
        if len(fields) >= 3 and not fields[0].startswith("#") and fields[1] not in _NO_MOUNT_POINT:
            options = tuple(fields[3].split(",")) if len(fields) > 3 else ()
            where = posixpath.normpath(unescape(fields[1]))
            planned.append(Planned(unescape(fields[0]), where, fields[2], options))
    return planned


def parse_mount_id(fdinfo: str) -> int:
    """Of the mount on which an open file lies: /proc/PID/fdinfo/FD; see proc(5). 0 where it does not say."""
    return next((int(line.split()[1]) for line in fdinfo.splitlines() if line.startswith("mnt_id:")), 0)


def holding(path: str, table: Iterable[Mounted]) -> Mounted | None:
    """What *path*, which has no symlinks, lies on: the mount nearest above it, the topmost one of several on one place."""
    found = None
    for mounted in table:
        if lies_in(path, mounted.mountpoint) and (found is None or len(mounted.mountpoint) >= len(found.mountpoint)):
            found = mounted
    return found


def plan_for(path: str, planned: Iterable[Planned]) -> Planned | None:
    """The line of /etc/fstab whose mount *path* is to lie on, if there is one."""
    found = [each for each in planned if lies_in(path, each.mountpoint)]
    return max(found, key=lambda each: len(each.mountpoint), default=None)


def is_mounted(mountpoint: str, table: Iterable[Mounted]) -> bool:
    """Whether something other than an automount that waits is mounted there."""
    return any(each.mountpoint == mountpoint and each.fstype != AUTOFS for each in table)


def lies_in(path: str, folder: str) -> bool:
    """Whether *path* is *folder* or something beneath it, by their names."""
    return path == folder or path.startswith(folder.rstrip("/") + "/")


def unescape(field: str) -> str:
    """A name as it stands in the kernel's tables and in fstab(5)."""
    for code, character in ((r"\040", " "), (r"\011", "\t"), (r"\012", "\n"), (r"\134", "\\")):
        field = field.replace(code, character)
    return field
