"""When an NFS mount gives its first error, from its options and its server's lease.

Pure. Sources: nfs(5), "soft/hard", `timeo` and `retrans`; Linux 6.1: nfs_init_timeout_values(), xprt_calc_majortimeo(),
rpc_check_timeout(), xs_tcp_set_socket_timeouts(), xs_tcp_set_connect_timeout(), nfs4_set_lease_period(). Seen with
timeo=10,retrans=1 over TCP: 2 s, and 92 s for the first call of a 4.2 mount in an outage. docs/howto/nfs.rst tells it in words.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from iohang_fuse.mounttable import unescape

if TYPE_CHECKING:
    from collections.abc import Sequence

TYPES = frozenset({"nfs", "nfs4"})

LONGEST_TCP_S = 600.0
LONGEST_UDP_S = 60.0

LEASE_S = 90.0
"""An NFS 4 server's by default: `lease-time` in nfs.conf(5), or knfsd's nfsv4leasetime."""

_LONGEST_SILENCE_S = 180
_TRIES = 3
_SHORTEST_TRY_S = 6
"""TCP gives a silent connection up after three tries of 60 s, whatever `timeo` says; NFS 4 shortens them to fit into a lease."""


@dataclass(frozen=True, slots=True)
class Nfs:
    """What counts of a mount's options. *kind*: `soft`, `softerr` or `hard`."""

    version: str
    kind: str
    protocol: str
    timeo_s: float
    retrans: int
    lease_s: float = LEASE_S
    closed_after_s: float = math.inf
    """When iohang-fuse ends a connection that hears nothing (option `reconnect`)."""

    @property
    def error(self) -> str | None:
        """What a call ends with when the server does not answer; None if it does not end."""
        return {"soft": "EIO", "softerr": "ETIMEDOUT"}.get(self.kind)

    @property
    def error_s(self) -> float:
        """After which a call fails: TCP waits `timeo`, then twice that and so on, `retrans` more times in all; UDP doubles.

        The deadline is that of the sum of the increments: 180 s for the defaults timeo=600,retrans=2.
        """
        if self.error is None:
            return math.inf
        if self.protocol.startswith("udp"):
            return min(self.timeo_s * (1 << min(self.retrans, 16)), LONGEST_UDP_S)
        return min(self.timeo_s * (1 + self.retrans), LONGEST_TCP_S)

    @property
    def silence_s(self) -> float:
        """After which a connection ends on which what was sent is not acknowledged: by TCP_USER_TIMEOUT, if not before."""
        return min(self._tcp_gives_up_s, self.closed_after_s)

    @property
    def _tcp_gives_up_s(self) -> float:
        if self.version.startswith("4") and self.lease_s < _LONGEST_SILENCE_S:
            return float(_TRIES * max(math.ceil(self.lease_s / _TRIES), _SHORTEST_TRY_S))
        return float(_LONGEST_SILENCE_S)

    @property
    def first_error_s(self) -> float:
        """The same for the first call in an outage.

        What an NFS 4 client has sent does not fail while its connection is up. The client looks each *error_s*, and TCP counts from
        its first retransmission. So it is the first look after *silence_s*.
        """
        if self.error is None or not self.version.startswith("4"):
            return self.error_s
        return self.error_s * (math.floor(self.silence_s / self.error_s) + 1)

    def __str__(self) -> str:
        words = f"NFS {self.version}, {self.kind}"
        return words if self.error is None else f"{words},timeo={self.timeo_s * 10:g},retrans={self.retrans}"


def parse(options: Sequence[str], lease_s: float | None = None, closed_after_s: float = math.inf) -> Nfs:
    """From the options in /proc/self/mountinfo, which has them all; nfs(5)'s defaults for what is not there."""
    values = dict(option.partition("=")[::2] for option in options)
    protocol = values.get("proto", "tcp")
    udp = protocol.startswith("udp")
    return Nfs(
        version=values.get("vers") or values.get("nfsvers", "3"),
        kind="softerr" if "softerr" in values else "soft" if "soft" in values else "hard",
        protocol=protocol,
        timeo_s=(_number(values.get("timeo"), 0) or (11 if udp else 600)) / 10,
        retrans=_number(values.get("retrans"), 3 if udp else 2),
        lease_s=LEASE_S if lease_s is None else lease_s,
        closed_after_s=closed_after_s,
    )


def parse_lease_s(mountstats: str, mountpoint: str) -> float | None:
    """What the client knows of its server's lease: /proc/self/mountstats. None if it does not say: only NFS 4 has one."""
    found = None
    for block in re.split(r"^(?=device )", mountstats, flags=re.MULTILINE):
        where = re.match(r"device \S+ mounted on (\S+) with fstype nfs", block)
        if where is not None and unescape(where[1]) == mountpoint:
            found = re.search(r",lease_time=(\d+)", block)  # the last one lies on top
    return None if found is None else float(found[1])


def _number(text: str | None, otherwise: int) -> int:
    return int(text) if text and text.isdecimal() else otherwise
