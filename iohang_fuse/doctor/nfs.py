"""When an NFS mount gives its first error, from its options.

Pure. Sources: nfs(5), "soft/softerr/hard", `timeo` and `retrans`; the kernel's nfs_init_timeout_values() and
xprt_calc_majortimeo(). Seen with timeo=10,retrans=1 over TCP: 2 s, and 92 s for the first call of a 4.2 mount in an outage.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

TYPES = frozenset({"nfs", "nfs4"})

LONGEST_TCP_S = 600.0
LONGEST_UDP_S = 60.0

LEASE_S = 90.0
"""Before its first error an NFS 4 mount tries for as long as its lease, by the server's default, to get its session back."""


@dataclass(frozen=True, slots=True)
class Nfs:
    """What counts of a mount's options. *kind*: `soft`, `softerr` or `hard`."""

    version: str
    kind: str
    protocol: str
    timeo_s: float
    retrans: int

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
    def first_error_s(self) -> float:
        """The same for the first call in an outage."""
        return self.error_s + (LEASE_S if self.version.startswith("4") else 0)

    def __str__(self) -> str:
        words = f"NFS {self.version}, {self.kind}"
        return words if self.error is None else f"{words},timeo={self.timeo_s * 10:g},retrans={self.retrans}"


def parse(options: Sequence[str]) -> Nfs:
    """From the options in /proc/self/mountinfo, which has them all; nfs(5)'s defaults for what is not there."""
    values = dict(option.partition("=")[::2] for option in options)
    protocol = values.get("proto", "tcp")
    udp = protocol.startswith("udp")
    return Nfs(
        version=values.get("vers") or values.get("nfsvers", "3"),
        kind="softerr" if "softerr" in values else "soft" if "soft" in values else "hard",
        protocol=protocol,
        timeo_s=_number(values.get("timeo"), 11 if udp else 600) / 10,
        retrans=_number(values.get("retrans"), 3 if udp else 2),
    )


def _number(text: str | None, otherwise: int) -> int:
    return int(text) if text and text.isdecimal() else otherwise
