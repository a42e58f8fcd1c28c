"""The Debian guest with an NFS server and client hosts, from outside: boot it, set it up, have outages played in it."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from contrib.guest.debian.guest import DebianGuest, build
from contrib.guest.nfs.outages import LEASE_S, by_name
from contrib.guest.nfs.site import QUICK

if TYPE_CHECKING:
    from pathlib import Path

PACKAGES = (
    "nfs-kernel-server",
    "nfs-common",
    "nftables",  # drops packets
    "iproute2",  # client hosts, and netem
    "fio",  # a consumer, and what measures
    "qemu-utils",  # qemu-io, a consumer
    "procps",
    "iputils-ping",
    "tcpdump",  # to see for oneself
)
"""What the guest has beside those of every Debian guest."""

_MEMORY_MIB = 2048
_EXPORT_BYTES = 1 << 30
_SCENE_LIMIT_S = 600


class Guest:
    """The guest, with its server's disk, and the lease that its server has."""

    def __init__(self, folder: Path, timing: str = QUICK) -> None:
        disk = folder / "export.img"
        with disk.open("wb") as file:
            file.truncate(_EXPORT_BYTES)
        self.debian = DebianGuest(build(extra=PACKAGES), folder, disks=[disk], memory_mib=_MEMORY_MIB)
        self._lease_s = 0
        self._timing = timing

    def outage(self, name: str) -> dict[str, Any]:
        """One outage; what was seen. Raises RuntimeError with the scene's words if it could not be played."""
        self.set_up(by_name(name).lease_s)
        seen: dict[str, Any] = json.loads(self.python("scene", name))
        return seen

    def set_up(self, lease_s: int = LEASE_S) -> None:
        """Have all mounts there, and the server with that lease."""
        if lease_s != self._lease_s:
            self.python("setting", str(lease_s), self._timing)
            self._lease_s = lease_s

    def python(self, module: str, *arguments: str) -> str:
        """What a module of contrib.guest.nfs says in the guest. Raises RuntimeError if it fails."""
        return self.debian.run("python3", "-m", f"contrib.guest.nfs.{module}", *arguments, timeout_s=_SCENE_LIMIT_S)
