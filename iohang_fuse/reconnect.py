"""An NFS mount's connections that hear nothing any more are closed, so that the kernel makes new ones.

After an outage the kernel's NFS client waits for TCP's next retransmission, or the next SYN, each twice as far off as the one
before: on Linux 6.1 up to 80 s after the server is back, and an NFS 4 call has no error for longer still (docs/howto/nfs.rst, with
the sources). Who holds requests meanwhile holds them for nothing. So, while an image is sick:

1. A connection on which nothing has been heard for 3 s, although something waits for an ACK, is closed. The kernel's NFS client
   opens another one at once, and sends on it all calls that it still waits for, as it does when a server has closed one.
2. As soon as the server is heard again, what is held is tried: there is nothing left to wait for.
3. What a call that has failed left in a socket goes with it. So nothing may overtake it on another one of `nconnect` (P5).

Nothing is closed that is heard: a slow link, or one that loses packets, has its ACKs. A mount in another network namespace than
this process's is not seen here, and has what the kernel gives it.
"""

from __future__ import annotations

import ipaddress
import logging
import os
from typing import TYPE_CHECKING

import trio

from iohang_fuse import presence, sockdiag
from iohang_fuse.messages import error_words
from iohang_fuse.mounttable import holding

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from iohang_fuse.requests import Requests
    from iohang_fuse.sockdiag import Connection

    Server = tuple[ipaddress.IPv4Address | ipaddress.IPv6Address, int]

log = logging.getLogger(__name__)

LOOK_S = 1.0
"""Between two looks while an image is sick. A look is one netlink message."""

DEAF = 4
"""So often in a row something was sent again: on Linux 0.2 s after the first time, then after 0.4, 0.8 and 1.6 s more; later where
round trips take long."""

DEAF_SYNS = 1
"""The same for a first SYN: after 1 s (RFC 6298). No round trip takes so long."""

_NFS_PORT = 2049
_TYPES = frozenset({"nfs", "nfs4"})


def is_deaf(connection: Connection) -> bool:
    """Whether it waits for an ACK, and has waited for long."""
    return connection.lost >= (DEAF_SYNS if connection.state == sockdiag.SYN_SENT else DEAF)


def hears(found: Iterable[Connection]) -> bool:
    """Whether there is one on which nothing is overdue."""
    return any(each.state == sockdiag.ESTABLISHED and not each.lost for each in found)


def server_of(fstype: str, options: Sequence[str]) -> Server | None:
    """Address and port of an NFS mount's server, from its options in /proc/self/mountinfo; None for what has no TCP connection."""
    values = dict(option.partition("=")[::2] for option in options)
    if fstype not in _TYPES or values.get("proto", "tcp") not in ("tcp", "tcp6"):
        return None
    try:
        return ipaddress.ip_address(values["addr"].partition("%")[0]), int(values.get("port") or 0) or _NFS_PORT
    except (KeyError, ValueError):
        return None


class Reconnect:
    """The connections of one SOURCE, which is a path."""

    def __init__(self, requests: Requests, source: str) -> None:
        self._requests = requests
        self._path = os.path.realpath(source)
        self._heard = True
        self._able = True

    async def serve(self) -> None:
        """Look at the connections while an image is sick. Returns only where they cannot be closed."""
        while self._able:
            await trio.sleep(LOOK_S)
            if not any(image.held.sick for image in self._requests.images.values()):
                self._heard = True
                continue
            heard = await trio.to_thread.run_sync(self._look, abandon_on_cancel=True)
            if heard and not self._heard:
                log.info("the server of %s is heard again: what is held is tried", self._path)
                for image in [*self._requests.images.values()]:
                    self._requests.retry(image)
            self._heard = heard

    def close_what_waits(self) -> None:
        """In a thread: close what has anything left that was sent more than once (rule 3). Raises nothing."""
        self._look(anyhow=True)

    def _look(self, *, anyhow: bool = False) -> bool:
        """Close what is deaf, or has lost anything; whether the server is heard."""
        mounted = holding(self._path, presence.mount_table())
        server = server_of(mounted.fstype, mounted.options) if mounted is not None else None
        if server is None or not self._able:
            return True
        try:
            found = sockdiag.connections(*server)
            closed = [each for each in found if (each.lost if anyhow else is_deaf(each))]
            for each in closed:
                sockdiag.close(each)
        except OSError as error:
            self._able = False
            log.warning(
                "connections of NFS mounts that hear nothing any more are left to the kernel, which may take a minute or two after "
                "an outage: %s. It takes CAP_NET_ADMIN, and a kernel with CONFIG_INET_DIAG_DESTROY; or say reconnect=never",
                error_words(error.errno),
            )
            return True
        if closed:
            log.debug("%d of %d connections to %s were deaf, and are closed", len(closed), len(found), server[0])
        return hears(found)
