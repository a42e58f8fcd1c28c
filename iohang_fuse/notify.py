"""sd_notify(3): a word to the service manager that started us, if it wants to know.

Ours and no library: this is one datagram. Of those that there are, systemd-python and cysystemd are C to be compiled against
libsystemd, and sdnotify (last release 2016) blocks the whole server when the manager does not read. Here nothing ever raises,
and nothing waits: whoever must be heard asks again.
"""

from __future__ import annotations

import contextlib
import os
import socket
from typing import TYPE_CHECKING

from iohang_fuse.messages import printable

if TYPE_CHECKING:
    from collections.abc import Mapping

MOST_CHARACTERS = 1000
"""Of one value: systemd drops a message of more than 4 KiB (NOTIFY_BUFFER_MAX, v252) as a whole."""


class Notify:
    """The socket of the one that is told."""

    def __init__(self, address: str = "") -> None:
        """*address*: as in NOTIFY_SOCKET: a path, or `@` and the name of an abstract socket. Empty: nobody wants to know."""
        self._address = _sockaddr(address)
        self.wanted = self._address is not None

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> Notify:
        """As whoever started us has asked for."""
        return cls(environment.get("NOTIFY_SOCKET", ""))

    def tell(self, **said: object) -> bool:
        """Tell `READY=1`, `STATUS=...`; whether that is on its way. Never raises, never waits."""
        if self._address is None:
            return False
        lines = (f"{key}={printable(' '.join(str(value).split()))[:MOST_CHARACTERS]}" for key, value in said.items())
        message = "\n".join(lines).encode(errors="replace")
        with (
            contextlib.suppress(OSError),
            socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock,
        ):
            sock.setblocking(False)  # noqa: FBT003
            sock.sendto(message, self._address)
            return True
        return False

    def extend_timeout(self, seconds: float, **said: object) -> bool:
        """Ask not to be ended for so long from now: EXTEND_TIMEOUT_USEC, which has to be said again before it has passed."""
        return self.tell(**said, EXTEND_TIMEOUT_USEC=round(seconds * 1_000_000))


def _sockaddr(address: str) -> bytes | None:
    # sd_notify(3): the first character says which kind it is; others (vsock:) are for virtual machines.
    if not address.startswith(("/", "@")):
        return None
    encoded = os.fsencode(address)
    return b"\0" + encoded[1:] if encoded.startswith(b"@") else encoded
