r"""The journal's native protocol (systemd's docs/JOURNAL_NATIVE_PROTOCOL.md): a log line with fields that journalctl can ask for.

    journalctl IOHANG_IMAGE=vm1.img IOHANG_EVENT=hang-begin

Sixty lines of our own, because the protocol is one datagram: python3-systemd is compiled against libsystemd, which a virtual
environment on a virtualisation host has no compiler for, and the pure ones on PyPI do not pass long entries on.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import socket
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from iohang_fuse.messages import printable

if TYPE_CHECKING:
    from collections.abc import Mapping

SOCKET = Path("/run/systemd/journal/socket")

LONGEST_MESSAGE = 64 << 10
"""Characters of one line of the log. A traceback has a few thousand."""

_PRIORITIES = {logging.DEBUG: "7", logging.INFO: "6", logging.WARNING: "4", logging.ERROR: "3", logging.CRITICAL: "2"}
_DAEMON = "3"  # the facility, as in syslog(3)
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SEAL


def stderr_is_its() -> bool:
    """Whether stderr is a stream to the journal: systemd says so in JOURNAL_STREAM, and `2>file` makes it untrue."""
    try:
        device, inode = (int(number) for number in os.environ.get("JOURNAL_STREAM", "").split(":"))
        status = os.fstat(2)
    except (ValueError, OSError):
        return False
    return (status.st_dev, status.st_ino) == (device, inode)


def encoded(fields: Mapping[str, str]) -> bytes:
    """One entry. A value with a newline in it goes with its length, so that nothing in it can be taken for a field."""
    entry = bytearray()
    for name, text in fields.items():
        value = text.encode("utf-8", "backslashreplace")
        if b"\n" in value:
            entry += name.encode() + b"\n" + len(value).to_bytes(8, "little") + value + b"\n"
        else:
            entry += name.encode() + b"=" + value + b"\n"
    return bytes(entry)


class JournalHandler(logging.Handler):
    """Sends each record as one entry; `extra={"fields": {...}}` becomes fields of it.

    Only the log's own thread uses it, so it has no lock that somebody could wait for. A journal that is being started anew
    keeps its socket; without one a line is lost, as it is with syslog.
    """

    def __init__(self, identifier: str, path: Path = SOCKET) -> None:
        """*identifier*: what `journalctl -t` asks for."""
        super().__init__()
        self.lock = None
        self._path = str(path)
        self._identifier = identifier
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)

    def emit(self, record: logging.LogRecord) -> None:
        """Send *record*."""
        try:
            self._send(encoded(self._fields(record)))
        except Exception:  # noqa: BLE001 - as logging does
            self.handleError(record)

    def close(self) -> None:
        """Send nothing more."""
        self._socket.close()
        super().close()

    def _fields(self, record: logging.LogRecord) -> dict[str, str]:
        text = printable(record.getMessage())
        if record.exc_text:
            text = f"{text}\n{record.exc_text}"
        return {
            "MESSAGE": text if len(text) <= LONGEST_MESSAGE else f"{text[:LONGEST_MESSAGE]}...",
            "PRIORITY": _PRIORITIES.get(record.levelno, "6"),
            "SYSLOG_IDENTIFIER": self._identifier,
            "SYSLOG_FACILITY": _DAEMON,
            "SYSLOG_PID": str(record.process),
            "CODE_FILE": record.pathname,
            "CODE_LINE": str(record.lineno),
            "CODE_FUNC": record.funcName,
            **getattr(record, "fields", {}),
        }

    def _send(self, entry: bytes) -> None:
        try:
            self._socket.sendto(entry, self._path)
        except OSError as error:
            if error.errno not in {errno.EMSGSIZE, errno.ENOBUFS}:
                raise
            self._send_as_file(entry)

    def _send_as_file(self, entry: bytes) -> None:
        """What is too long for a datagram goes as a sealed file, whose descriptor is sent."""
        fd = os.memfd_create("iohang-log", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            with open(fd, "wb", closefd=False) as file:
                file.write(entry)
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
            # Not socket.send_fds(), which forgets the address (Python 3.11).
            rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, fd.to_bytes(4, sys.byteorder))
            self._socket.sendmsg([], [rights], 0, self._path)
        finally:
            os.close(fd)
