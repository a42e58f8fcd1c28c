"""What the command line of a QEMU says about the disks that it has on a mount.

Pure. Both spellings: `-drive file=...,werror=...`, and `-blockdev` (JSON or not) with `-device ...,werror=...`, as libvirt has it.
What is configured over QMP while the guest runs is not to be seen there.
"""

from __future__ import annotations

import itertools
import json
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

WERROR, RERROR = "enospc", "report"
"""QEMU's defaults; see qemu(1), `-drive`."""

_WITH_TIMEOUT = ("ide", "scsi", "sata", "nvme", "usb", "sd")
"""What the drivers and interfaces begin with whose guests give a request up after a while, about 30 s on Linux."""


@dataclass(frozen=True, slots=True)
class Disk:
    """One `-drive` or disk `-device`. *driver* is empty where it cannot be told."""

    path: str
    driver: str
    werror: str
    rerror: str

    @property
    def gives_up(self) -> bool:
        """Whether the guest has a timeout of its own for it."""
        return self.driver.startswith(_WITH_TIMEOUT)


@dataclass(frozen=True, slots=True)
class Qemu:
    """One running QEMU, and its disks on the mount."""

    pid: int
    name: str
    disks: tuple[Disk, ...]


def is_qemu(program: str) -> bool:
    """By the name it was started with."""
    return re.match(r"(.*/)?(qemu-system-|qemu-kvm|kvm$)", program) is not None


def parse(pid: int, words: Sequence[str], mountpoint: str) -> Qemu | None:
    """*words*: its arguments. None if it is no QEMU, or has no disk beneath *mountpoint*."""
    if not words or not is_qemu(words[0]):
        return None
    disks = [*_drives(words, mountpoint), *_block_devices(words, mountpoint)]
    if not disks:
        return None
    name = next((_properties(value).get("guest") or value.split(",")[0] for value in _values(words, "-name")), "")
    return Qemu(pid, name, tuple(disks))


def _drives(words: Sequence[str], mountpoint: str) -> Iterator[Disk]:
    devices = [_properties(value) for value in _values(words, "-device")]
    for value in _values(words, "-drive"):
        drive = _properties(value)
        path = _beneath(drive, mountpoint)
        if path:
            device = next((each for each in devices if drive.get("id") and each.get("drive") == drive.get("id")), {})
            driver = device.get("driver") or {"none": ""}.get(drive.get("if", ""), drive.get("if", "ide"))
            yield _disk(path, driver, {**drive, **device})


def _block_devices(words: Sequence[str], mountpoint: str) -> Iterator[Disk]:
    nodes = [_properties(value) for value in _values(words, "-blockdev")]
    devices = [_properties(value) for value in _values(words, "-device")]
    for node in nodes:
        path = _beneath(node, mountpoint)
        if path:
            above = _names_above(node.get("node-name", ""), nodes)
            device = next((each for each in devices if each.get("drive") in above), {})
            yield _disk(path, device.get("driver", ""), device)


def _names_above(name: str, nodes: Sequence[dict[str, str]]) -> set[str]:
    """*name* and the nodes that lie on it: a format on its file."""
    names = {name}
    for _ in nodes:
        names |= {node.get("node-name", "") for node in nodes if {node.get("file"), node.get("backing")} & names}
    return names - {""}


def _disk(path: str, driver: str, properties: dict[str, str]) -> Disk:
    def policy(key: str, default: str) -> str:
        given = properties.get(key, default)
        return default if given == "auto" else given

    return Disk(path, driver, policy("werror", WERROR), policy("rerror", RERROR))


def _beneath(properties: dict[str, str], mountpoint: str) -> str | None:
    for key in ("file", "filename", "file.filename"):
        path = properties.get(key, "")
        if path.startswith(mountpoint.rstrip("/") + "/"):
            return path
    return None


def _values(words: Sequence[str], option: str) -> Iterator[str]:
    for word, value in itertools.pairwise(words):
        if word in {option, f"-{option}"}:
            yield value


def _properties(value: str) -> dict[str, str]:
    """`driver,key=value,...` with `,,` for a comma, or JSON."""
    if value.startswith("{"):
        try:
            found = json.loads(value)
        except ValueError:
            return {}
        flat = {key: str(each) for key, each in found.items() if isinstance(each, str | int)}
        inner = found.get("file")
        return flat | ({"file.filename": str(inner.get("filename", ""))} if isinstance(inner, dict) else {})
    first, *others = [part.replace("\0", ",") for part in value.replace(",,", "\0").split(",")]
    pairs = [part.partition("=")[::2] for part in (first, *others) if "=" in part]
    return ({} if "=" in first else {"driver": first}) | dict(pairs)
