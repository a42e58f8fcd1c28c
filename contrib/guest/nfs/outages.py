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
    """One kind. *expected*: what it does to a bare mount, by the manuals and the source of Linux 6.1. *timeout*: iohang-fuse's."""

    name: str
    what: str
    expected: str
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
        "dropped-long", "packets dropped, with the server's default lease of 90 s",
        "Version 3 fails each call after timeo x (retrans + 1), 2 s here (xprt_calc_majortimeo). Version 4 does not "
        "fail what was sent while TCP holds its connection, which is the lease (rpc_check_timeout, "
        "xs_tcp_set_connect_timeout): 92 s. A hard mount waits. An fsync is told of a failed write once. Afterwards "
        "the client is deaf until TCP sends its next SYN: up to 64 s on version 3, 32 s on 4.2.",
        120, site.drop, site.restore,
        lease_s=DEFAULT_LEASE_S,
    ),
    Outage(
        "dropped", "packets dropped",
        "The same, with 20 s on version 4.2. Deaf until the next retransmission, as long again as the outage on "
        "version 3, 7 s on 4.2.",
        40, site.drop, site.restore,
    ),
    Outage(
        "stopped", "server stopped",
        "Connection refused: tried each 3 s, and an error at the first of these after 2 s, on both versions "
        "(call_connect_status). Version 4.2 gets its opens back by reclaiming them in the grace period.",
        20, lambda: _systemctl("stop"), lambda: _systemctl("start"),
    ),
    Outage(
        "rebooted", "server lost power",
        "What was written and not committed is gone at the server, whose write verifier is another one: the client "
        "writes it again (nfs_direct_commit_complete), if no error has dropped it. Version 4.2 has lost its session, "
        "and reclaims its opens.",
        20, site.cut_power, site.return_power,
    ),
    Outage(
        "unexported", "directory not exported: stale handles",
        "ESTALE at once, from each call (nfsd_set_fh_dentry), on hard mounts, too. A GETATTR or READ that has it "
        "marks the file dead on this client for good (nfs_set_inode_stale): it must be opened anew.",
        15, lambda: site.export("none"), lambda: site.export("rw"),
    ),
    Outage(
        "expired", "cut off, and all state dropped at the server",
        "Version 3 as with dropped packets. On version 4.2 opens are done anew, but locks are lost, and who held one "
        "has EIO until he closes the file (nfs4_copy_lock_stateid, recover_lost_locks). QEMU holds such locks.",
        25, site.drop, _expire,
    ),
    Outage(
        "read-only", "export made read-only",
        "EROFS from each write, to open files, too (nfsd_permission; nfs4_check_file); buffered: at the fsync, once. "
        "Waiting does not help: iohang-fuse passes it on.",
        10, lambda: site.export("ro"), lambda: site.export("rw"),
        errors_pass=frozenset({"EROFS"}),
    ),
    Outage(
        "full", "server's disk full",
        "ENOSPC from each write that needs a block; buffered: at the fsync, once. Passed on, but where errors has it.",
        10, site.fill_disk, site.empty_disk, sparse=True,
        errors_pass=frozenset({"ENOSPC"}),
    ),
    Outage(
        "slow", "a link with 300 ms each way",
        "No error: each call has its answer within 2 s.",
        20, lambda: site.impair("delay", "300ms"), site.impair,
    ),
    Outage(
        "lossy", "a link that loses 20 % of its packets",
        "TCP sends again; on version 3 a call may take more than its 2 s, and fail.",
        20, lambda: site.impair("loss", "20%"), site.impair,
    ),
    Outage(
        "too-long", "packets dropped for longer than timeout=5",
        "Bare as above. On iohang-fuse EIO, when the timeout has passed; and what was given up must not land later "
        "(P5).",
        40, site.drop, site.restore, timeout="5",
        errors_pass=frozenset({"EIO"}),
    ),
)  # fmt: skip


def by_name(name: str) -> Outage:
    """Raises KeyError."""
    return {outage.name: outage for outage in OUTAGES}[name]


def _systemctl(verb: str) -> None:
    site.run("systemctl", verb, "nfs-server")
