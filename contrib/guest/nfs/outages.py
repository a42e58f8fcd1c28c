"""The outages: what happens at the server or in the network, and for how long.

docs/howto/nfs.rst has what is to be expected of each, from the manuals and the kernel's source, and what has been seen.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from contrib.guest.nfs import site

if TYPE_CHECKING:
    from collections.abc import Callable

LEASE_S = 15
"""Of the server, for most outages. Its default of 90 s makes 4.2's first error late."""

DEFAULT_LEASE_S = 90


@dataclass(frozen=True, slots=True)
class Outage:
    """One kind. *options*: what iohang-fuse is told for it (of `io-hang-set`)."""

    name: str
    what: str
    seconds: float
    begin: Callable[[], None]
    end: Callable[[], None]
    lease_s: int = LEASE_S
    timeout: str = "5min"
    sparse: bool = False
    """Images without blocks, so that each write needs a new one."""
    errors_pass: frozenset[str] = field(default_factory=frozenset)
    """Errors that are the consumer's own affair, which iohang-fuse passes on."""


def _expire() -> None:
    site.expire_clients()
    site.restore()


OUTAGES = (
    Outage(
        "dropped-long", "packets dropped, with the server's default lease of 90 s", 120, site.drop, site.restore,
        lease_s=DEFAULT_LEASE_S,
    ),
    Outage("dropped", "packets dropped", 40, site.drop, site.restore),
    Outage("stopped", "server stopped", 20, lambda: _systemctl("stop"), lambda: _systemctl("start")),
    Outage("rebooted", "server lost power", 20, site.cut_power, site.return_power),
    Outage(
        "unexported", "directory not exported: stale handles", 15, lambda: site.export("none"), lambda: site.export("rw"),
    ),
    Outage("expired", "cut off, and all state dropped at the server", 25, site.drop, _expire),
    Outage(
        "read-only", "export made read-only", 10, lambda: site.export("ro"), lambda: site.export("rw"),
        errors_pass=frozenset({"EROFS"}),
    ),
    Outage(
        "full", "server's disk full", 10, site.fill_disk, site.empty_disk, sparse=True,
        errors_pass=frozenset({"ENOSPC"}),
    ),
    Outage("slow", "a link with 300 ms each way", 20, lambda: site.impair("delay", "300ms"), site.impair),
    Outage("lossy", "a link that loses 20 % of its packets", 20, lambda: site.impair("loss", "20%"), site.impair),
    Outage(
        "too-long", "packets dropped for longer than timeout=5", 40, site.drop, site.restore, timeout="5",
        errors_pass=frozenset({"EIO"}),
    ),
)  # fmt: skip


def by_name(name: str) -> Outage:
    """Raises KeyError."""
    return {outage.name: outage for outage in OUTAGES}[name]


def _systemctl(verb: str) -> None:
    site.run("systemctl", verb, "nfs-server")
