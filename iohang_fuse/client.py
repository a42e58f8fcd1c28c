"""A client of monitors: which socket, whose it is, and what to say where nobody answers.

Over the qemu.qmp library, which is QEMU's own client. The mount itself is never asked: it may hang.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qemu.qmp import ConnectError, ExecuteError, QMPClient, QMPError

from iohang_fuse import bounded, presence
from iohang_fuse.config import LONGEST_SOCKET, RUN, socket_of
from iohang_fuse.doctor import survey
from iohang_fuse.mounttable import OUR_TYPE
from iohang_fuse.qmp import PACKAGE

if TYPE_CHECKING:
    import argparse
    from collections.abc import AsyncIterator, Mapping

ANSWER_S = 10.0
"""The monitor answers at once, whatever the storage does. If not, the server itself is stuck."""

LOOK_S = 2.0
"""For statfs(2) of a mount: at once where its server is gone."""

NO_MOUNT = f"no mount has a monitor in {RUN}; say which one with -m DIRECTORY, or its socket with -s FILE"


class Problem(Exception):
    """What went wrong, in one line."""


class Misuse(Problem):
    """What is wrong with the command line."""


def find_socket(given: argparse.Namespace) -> Path:
    """The monitor's socket. Raises `Problem` with what would be right."""
    for option, value, what in (("-s", given.socket, "socket"), ("-m", given.mountpoint, "mount point")):
        if value is not None and (not value or "\0" in value):
            raise Misuse(f"{option}: {value!r} is no path; name the {what}")
    if given.socket:
        return Path(given.socket)
    if given.mountpoint:
        # Not resolved by the kernel: a mount whose server is gone answers nothing.
        return socket_of(Path(real(given.mountpoint)))
    found = sockets()
    if len(found) == 1:
        return found[0]
    if not found:
        raise Problem(NO_MOUNT + _mounted_here())
    raise Problem(
        "several mounts have a monitor; say which one with -m DIRECTORY, or its socket with -s FILE: "
        + ", ".join(map(str, found))
    )


def sockets() -> list[Path]:
    """Those of this host on which somebody listens."""
    return sorted(path for path in RUN.glob("*.sock") if survey.listens(path))


@contextlib.asynccontextmanager
async def connected(given: argparse.Namespace, path: Path) -> AsyncIterator[QMPClient]:
    """The monitor's client. Raises `Problem`."""
    client = QMPClient("iohangctl")
    try:
        await asyncio.wait_for(client.connect(str(path)), ANSWER_S)
    except (ConnectError, ValueError) as error:
        raise Problem(_no_monitor(given, path, error)) from None
    except TimeoutError:
        raise Problem(
            f"{path}: no answer within {ANSWER_S:g} s; the server is stuck: see its log, and its stack with py-spy"
        ) from None
    try:
        _check_greeting(client, path)
        if given.mountpoint:
            await _check_mountpoint(client, path, real(given.mountpoint))
        yield client
    except QMPError as error:
        raise Problem(f"{path}: the connection broke: {error}") from None
    finally:
        with contextlib.suppress(Exception):  # it raises what has ended the connection, which is said already
            await client.disconnect()


def _no_monitor(given: argparse.Namespace, path: Path, error: Exception) -> str:
    """Why there is nobody at *path*, and what would be right."""
    cause = error.exc if isinstance(error, ConnectError) else error
    if len(os.fsencode(path)) > LONGEST_SOCKET:
        return f"{path}: a socket's name has {LONGEST_SOCKET} bytes at most; name the one that the mount was told by monitor=FILE"
    if not isinstance(cause, OSError):
        why = str(cause) or "it ends the connection at once"
        return f"{path}: what listens there does not speak QMP ({why}); name the monitor of a mount"
    why = cause.strerror or str(cause)
    if cause.errno == errno.EACCES:
        return f"{path}: {why}; it is for root and the group that the mount was told by monitor_group=GROUP"
    if given.mountpoint:
        return _no_monitor_of(real(given.mountpoint), f"{path}: {why}") or (
            f"{given.mountpoint} has no monitor ({path}: {why}); is it the mount point of an iohang-mount, with a monitor?"
        )
    return f"{path}: {why}; is it mounted, and with a monitor?"


def _no_monitor_of(mountpoint: str, why: str) -> str | None:
    """The same where *mountpoint* is a mount of ours: its server may be gone, or its monitor elsewhere."""
    if survey.find_mount(mountpoint) is None:
        return None
    try:
        bounded.look(lambda: os.statvfs(mountpoint).f_bsize, LOOK_S)
    except bounded.NoAnswer:
        return f"{mountpoint} is mounted, and its server does not answer, nor has it a monitor ({why}); see its log"
    except OSError as error:
        if error.errno == errno.ENOTCONN:
            return f"{mountpoint}: its server is gone; stop its guests, `umount {mountpoint}`, and mount it again"
    return (
        f"{mountpoint} is mounted, and has no monitor there ({why}); if it was mounted with monitor=FILE, say -s FILE"
    )


def _mounted_here() -> str:
    ours = sorted({each.mountpoint for each in presence.mount_table() if each.fstype == OUR_TYPE})
    return f"; mounted here: {', '.join(ours)}" if ours else ""


def _check_greeting(client: QMPClient, path: Path) -> None:
    """QEMU's own monitors answer, too, and `query-status` means something else there."""
    package = (client.greeting.QMP.version if client.greeting else {}).get("package")
    if package != PACKAGE:
        raise Problem(
            f"{path} is no monitor of an iohang-mount, but QMP of {package or 'something else'!r}; name that of a mount"
        )


def real(mountpoint: str) -> str:
    """As the mount table has it. The mount itself is not asked: it may hang."""
    parent, name = os.path.split(os.path.abspath(mountpoint))
    return os.path.join(os.path.realpath(parent), name)


async def _check_mountpoint(client: QMPClient, path: Path, wanted: str) -> None:
    """Two mount points may have the same socket's name: /mnt/a-b and /mnt/a/b."""
    serves = (await ask(client, "query-status"))["mountpoint"]
    if serves != wanted:
        raise Problem(
            f"{path} is the monitor of {serves}, not of {wanted}; mount that with monitor=FILE, and say -s FILE"
        )


async def ask(client: QMPClient, command: str, arguments: Mapping[str, object] | None = None) -> Any:
    """The answer. Raises `Problem`."""
    try:
        return await asyncio.wait_for(client.execute(command, dict(arguments or {})), ANSWER_S)
    except ExecuteError as error:
        raise Problem(str(error)) from None
    except TimeoutError:
        raise Problem(f"{command}: no answer within {ANSWER_S:g} s") from None
