"""umount.fuse.iohang-mount: umount(8)'s helper, which comes back when the server has ended and SOURCE is free.

umount(2) is done before the server has noticed. Whoever unmounts SOURCE next, as systemd does at shutdown with a line in fstab,
would find it in use by a server that is about to end, and leave NFS mounted while the network goes.

umount(8) calls it where it has looked the mount up in its own table, /run/mount/utab: that is, where the mount was made with a word
that is for mount(8) itself, such as `_netdev`. Without one it asks the kernel, which says `fuse`, and calls no helper of ours.
"""

from __future__ import annotations

import argparse
import errno
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from iohang_fuse import syscalls

if TYPE_CHECKING:
    from collections.abc import Sequence

EX_USAGE, EX_FAILURE = 1, 32  # umount(8) has mount(8)'s

LONGEST_WAIT_S = 10.0
"""For the server's end. One that goes on serves a copy of the mount in another mount namespace, or waits for SOURCE."""

_PAUSE_S = 0.02


def main(argv: Sequence[str] | None = None) -> int:
    """`umount.fuse.iohang-mount MOUNTPOINT [-flnrv] [-t TYPE] [-N NAMESPACE]`, as umount(8) calls it."""
    parser = argparse.ArgumentParser(
        prog="umount.fuse.iohang-mount",
        description="Helper of umount(8): unmount MOUNTPOINT, and wait for its server to end.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("mountpoint", metavar="MOUNTPOINT")
    add("-l", dest="lazy", action="store_true", help="detach it now, in use or not, and wait for nobody")
    add("-f", dest="force", action="store_true", help="abort the connection: all that is held ends with an error")
    add("-v", dest="verbose", action="store_true", help="say more")
    for option in ("-n", "-r"):
        add(option, action="store_true", help="accepted, for umount(8)")
    add("-t", metavar="TYPE", help="accepted, for umount(8)")
    add("-N", dest="namespace", metavar="NAMESPACE", help="not supported")
    try:
        arguments = parser.parse_args(argv)
    except SystemExit as done:
        return EX_USAGE if done.code else 0
    if arguments.namespace is not None:
        return _failed("-N: other mount namespaces are not supported; enter it first, with nsenter --mount", EX_USAGE)
    return unmount(arguments.mountpoint, lazy=arguments.lazy, force=arguments.force, verbose=arguments.verbose)


def unmount(mountpoint: str, *, lazy: bool, force: bool, verbose: bool) -> int:
    """The exit code; what went wrong is on stderr."""
    servers = [] if lazy else _servers_of(mountpoint)
    flags = lazy * syscalls.MNT_DETACH | force * syscalls.MNT_FORCE
    try:
        syscalls.umount(mountpoint, flags)
    except OSError as error:
        # As umount(8) has it without a helper.
        said = {errno.EBUSY: "target is busy.", errno.EINVAL: "not mounted."}
        return _failed(f"{mountpoint}: {said.get(error.errno or 0, error.strerror)}", EX_FAILURE)
    if verbose:
        sys.stdout.write(f"umount: {mountpoint} unmounted\n")
    if lazy:
        return 0
    deadline_s = time.monotonic() + LONGEST_WAIT_S
    while alive := [pid for pid in servers if Path(f"/proc/{pid}").exists()]:
        if time.monotonic() > deadline_s:
            why = "it serves a copy in another mount namespace, or waits for SOURCE; its log says which"
            sys.stderr.write(f"umount: {mountpoint} is unmounted, its server ({alive[0]}) goes on: {why}\n")
            break
        time.sleep(_PAUSE_S)
    return 0


def _failed(words: str, code: int) -> int:
    sys.stderr.write(f"umount: {words}\n")
    return code


def _servers_of(mountpoint: str) -> list[int]:
    """Who serves it: has /dev/fuse open, and has been told of that mount point."""
    found = []
    for process in Path("/proc").iterdir():
        if process.name.isdigit():
            try:
                # In this order: to read the command line of a process that hangs in a page fault may take as long as that.
                if _has_fuse_open(process) and os.fsencode(mountpoint) in (process / "cmdline").read_bytes().split(
                    b"\0"
                ):
                    found.append(int(process.name))
            except OSError:
                continue  # it has ended, or is none of ours
    return found


def _has_fuse_open(process: Path) -> bool:
    for link in (process / "fd").iterdir():
        try:
            if os.readlink(link) == "/dev/fuse":
                return True
        except OSError:
            continue
    return False


if __name__ == "__main__":
    sys.exit(main())
