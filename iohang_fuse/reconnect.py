"""An NFS mount's connections that hear nothing any more are closed, so that the kernel makes new ones.

After an outage the kernel's NFS client waits for TCP's next retransmission, or the next SYN, each twice as far off as the one
before: on Linux 6.1 up to 80 s after the server is back, and an NFS 4 call has no error for longer still (docs/howto/nfs.rst, with
the sources). Who holds requests meanwhile holds them for nothing. So:

1. While an image is sick, a connection is closed on which nothing has been heard for 3 s although something was sent again and
   again. The kernel's client opens another one, and sends on it all calls that it still waits for, as when a server has closed one.
2. When the server is heard again, what is held is tried: there is nothing left to wait for. Where there is no connection, because
   the server has refused one, it is asked by one of ours.
3. Before a write that has failed is tried again, or is followed by another one, each connection in which it may still wait has sent
   what it has, or is closed: with `nconnect` the younger one might overtake it otherwise (P4, P5). One connection keeps the order.

What is heard is left alone: a slow link, one that loses packets, a server with too much to do. A mount in another network namespace
than this process's is not seen here, and has what the kernel gives it.
"""

from __future__ import annotations

import errno
import ipaddress
import logging
import os
import socket
import threading
import time
from typing import TYPE_CHECKING

import trio

from iohang_fuse import presence, sockdiag
from iohang_fuse.messages import error_words
from iohang_fuse.mounttable import holding

if TYPE_CHECKING:
    from collections.abc import Sequence

    from iohang_fuse.requests import Requests
    from iohang_fuse.sockdiag import Connection

    Server = tuple[ipaddress.IPv4Address | ipaddress.IPv6Address, int]

log = logging.getLogger(__name__)

LOOK_S = 1.0
"""Between two looks while an image is sick. A look is one netlink message."""

DEAF_S = 3.0
"""Without an ACK. Longer than any round trip, and shorter than a guest notices."""

DEAF_RETRANSMITS = 4
"""And so often in a row something was sent again: 0.2 s after the first time, then after 0.4, 0.8 and 1.6 s more (Linux). A
connection that had nothing to send is silent, too."""

DEAF_SYNS = 2
"""The same for a first SYN, which is sent again after 1 s, and 2 s more (RFC 6298)."""

SETTLED_S = 1.0
"""So long a connection has, to get rid of what is in it, before rule 3 closes it."""

HEARD_S = 2.0
"""An ACK that is no older came since the last look, or with the connection itself."""

_UNSEEN_LOOKS = 10

_NFS_PORT = 2049
_TYPES = frozenset({"nfs", "nfs4"})

_FOR_GOOD = {errno.EPERM, errno.EACCES, errno.EOPNOTSUPP, errno.ENOENT, errno.EAFNOSUPPORT, errno.EPROTONOSUPPORT}
"""Errors of netlink that will be the same next time."""


def is_deaf(connection: Connection) -> bool:
    """Whether it waits for an ACK, and has waited for long."""
    if connection.state == sockdiag.SYN_SENT:
        return connection.retransmits >= DEAF_SYNS
    return connection.retransmits >= DEAF_RETRANSMITS and connection.silence_s >= DEAF_S


def is_heard(connection: Connection) -> bool:
    """Whether it has heard something just now, and waits for nothing that is overdue."""
    return connection.state == sockdiag.ESTABLISHED and not connection.retransmits and connection.silence_s <= HEARD_S


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
    """The connections of one SOURCE, which is a path. Its look at the path may block."""

    def __init__(self, requests: Requests, source: str) -> None:
        self._requests = requests
        self._path = os.path.realpath(source)
        self._server: Server | None = None
        self._deaf = False
        self._unseen = 0
        self._able = True
        self._settling = threading.Lock()
        self._settled_s = 0.0  # of time.monotonic(): when the latest `settle` began

    async def serve(self) -> None:
        """Look at the connections while an image is sick (rules 1 and 2). Returns only where they cannot be closed."""
        while self._able:
            await trio.sleep(LOOK_S)
            if not any(image.held.sick for image in self._requests.images.values()):
                self._deaf, self._unseen = False, 0
                continue
            if await trio.to_thread.run_sync(self._look, abandon_on_cancel=True):
                log.info("the server of %s is heard again: what is held is tried", self._path)
                for image in [*self._requests.images.values()]:
                    self._requests.retry(image)

    def _look(self) -> bool:
        """In a thread: close what is deaf. Returns whether the server is heard again. Raises nothing."""
        found = self._connections()
        if found is None:
            return False
        self._say_if_unseen(found)
        deaf = [each for each in found if is_deaf(each)]
        self._close(deaf)
        established = any(each.state == sockdiag.ESTABLISHED for each in found)
        was_deaf, self._deaf = self._deaf, self._deaf or bool(deaf) or not established
        if was_deaf and not deaf and (any(is_heard(each) for each in found) if established else self._answers()):
            self._deaf = False
            return True
        return False

    def _answers(self) -> bool:
        """Whether the server takes a connection: the kernel's client asks one that has refused its own each 3 s."""
        if self._server is None:
            return False
        try:
            socket.create_connection((str(self._server[0]), self._server[1]), LOOK_S).close()
        except OSError:
            return False
        return True

    def hasten(self) -> None:
        """In a thread, for an operator: no connection is to wait for its next retransmission. Raises nothing."""
        self._close([each for each in self._connections() or () if each.retransmits])

    def settle(self, ago_s: float) -> None:
        """In a thread: what was sent that long ago, or before, is with the server, or gone (rule 3). Raises nothing.

        Blocks for `SETTLED_S` and a moment at most.
        """
        since_s = time.monotonic() - ago_s
        with self._settling:
            if self._settled_s > since_s:
                return
            began_s = time.monotonic()
            found = self._connections() or []
            waiting = {each.identity: each.acked_bytes + each.waiting_bytes for each in found if each.waiting_bytes}
            several = len(found) > 1
            while waiting and several:
                left = [each for each in self._connections() or [] if each.acked_bytes < waiting.get(each.identity, 0)]
                too_late = time.monotonic() > began_s + SETTLED_S
                stuck = {each.identity for each in left if too_late or each.retransmits}
                self._close([each for each in left if each.identity in stuck])
                waiting = {each.identity: waiting[each.identity] for each in left if each.identity not in stuck}
                if waiting:
                    time.sleep(SETTLED_S / 50)
            self._settled_s = began_s

    def _connections(self) -> list[Connection] | None:
        """Those to the server, None where there is none, or they cannot be seen."""
        if not self._able:
            return None
        try:
            mounted = holding(self._path, presence.mount_table())
            self._server = server_of(mounted.fstype, mounted.options) if mounted is not None else None
            return None if self._server is None else sockdiag.connections(*self._server)
        except (OSError, ValueError) as error:
            self._report(error)
            return None

    def _close(self, connections: Sequence[Connection]) -> None:
        try:
            for each in connections:
                sockdiag.close(each)
        except OSError as error:
            self._report(error)
        else:
            if connections:
                log.debug("%d connections of %s are closed", len(connections), self._path)

    def _report(self, error: OSError | ValueError) -> None:
        number = getattr(error, "errno", None)
        if number not in _FOR_GOOD or not self._able:
            log.debug("connections of %s: %s", self._path, error)  # it passes: no descriptor left, for example
            return
        self._able = False
        log.warning(
            "connections of NFS mounts that hear nothing any more are left to the kernel, which may take a minute or two after an "
            "outage: %s. It takes CAP_NET_ADMIN, AF_NETLINK, and a kernel with CONFIG_INET_DIAG_DESTROY; or say reconnect=never",
            error_words(number),
        )

    def _say_if_unseen(self, found: Sequence[Connection]) -> None:
        self._unseen = 0 if found else self._unseen + 1
        if self._unseen == _UNSEEN_LOOKS:
            log.warning(
                "%s has no connection to its server that is seen here: was it mounted in another network namespace? What "
                "reconnect=auto does is not done for it",
                self._path,
            )
