"""What examination.py judges: one frozen value, which survey.py reads.

Pure. Times in seconds (math.inf is allowed), sizes in bytes; None is what could not be read.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from iohang_fuse.doctor.qemu import Qemu
    from iohang_fuse.mounttable import Mounted, Planned, Sight


@dataclass(frozen=True, slots=True)
class Settings:
    """Of the options of a mount, those that must go with something else. Errors are names."""

    read_timeout_s: float = 60
    write_timeout_s: float = 60
    fsync_timeout_s: float = 60
    interval_s: float = 5
    blocked_after_s: float = 5
    errors: frozenset[str] = frozenset({"EIO", "ETIMEDOUT"})
    timeout_errno: str = "EIO"
    held_limit_bytes: int = 1 << 30
    write_log_bytes: int = 64 << 20
    max_background: int = 4096
    engine: str = "auto"
    direct: str = "auto"
    reconnect: str = "auto"
    mount_words: tuple[str, ...] = ()

    @property
    def timeouts_s(self) -> tuple[float, float, float]:
        """Of all three kinds."""
        return (self.read_timeout_s, self.write_timeout_s, self.fsync_timeout_s)


@dataclass(frozen=True, slots=True)
class Served:
    """What is known of a mount that is served, or was."""

    answers: bool
    """Its monitor does."""
    why_not: str = ""
    settings_from: str = ""
    """Where its settings come from if its monitor did not tell them."""
    engine: str = ""
    engine_reason: str = ""
    images: int = 0
    holding: bool = True
    max_background: int | None = None
    serves: Mounted | None = None
    """What the server's SOURCE lies on: what was there when it was opened."""
    lies_on: Mounted | None = None
    """What SOURCE's path leads to now, in the server's mount namespace."""


@dataclass(frozen=True, slots=True)
class Limit:
    """limits.py's finding: what is seen and what it means, and what to do."""

    seen: str
    do: str
    fatal: bool


@dataclass(frozen=True, slots=True)
class Host:
    """What is set on the machine that mounts."""

    is_root: bool = True
    user_allow_other: bool = False
    io_uring_disabled: int | None = 0
    hung_task_timeout_s: int = 120
    """0 where the kernel does not look for hung tasks."""
    hung_task_panic: bool = False
    memory_available_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class Facts:
    """All of it. *served* is None before a mount is made."""

    source: str
    mountpoint: str
    settings: Settings
    sight: Sight
    table: tuple[Mounted, ...] = ()
    planned: tuple[Planned, ...] = ()
    limits: tuple[Limit, ...] = ()
    host: Host = Host()
    served: Served | None = None
    monitor: str | None = ""
    """Its socket; None if there is to be none."""
    monitor_taken: bool = False
    """Before a mount is made: another one listens there."""
    qemus: tuple[Qemu, ...] = ()
    refusal: str | None = None
    """Before a mount is made: why it would be refused."""
    lease_s: float | None = None
    """Of the NFS 4 server beneath SOURCE."""
