"""Inside the Debian guest: what a user may do in a directory of an export with root_squash, call by call.

    python3 -m contrib.guest.nfs.squashed DIRECTORY

Runs as that user, and says what each call came to, as JSON: a value, or the error's name. functions.py runs it on the bare mount
and through iohang-fuse, as root, who is nobody to the server, and as another; and compares.
"""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

OTHER = 1001
GROUP = 2000
"""Of which the user is a member beside the own group."""


def prepare(beneath: Path) -> None:
    """At the server: a directory for all, with another's files in it."""
    beneath.mkdir()
    beneath.chmod(0o777)
    for name, group, mode in (("private", OTHER, 0o600), ("readable", OTHER, 0o644), ("shared", GROUP, 0o660)):
        file = beneath / name
        file.write_bytes(name.encode())
        os.chown(file, OTHER, group)
        file.chmod(mode)


def run_as(user: int, directory: Path) -> dict[str, Any]:
    """What all calls of *user* came to; raises RuntimeError if it does not end well."""
    done = subprocess.run(
        [sys.executable, "-m", "contrib.guest.nfs.squashed", str(directory)],
        user=user, group=user, extra_groups=[GROUP], capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"squashed, as {user}: {done.stderr}")
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def at_server(beneath: Path) -> dict[str, list[int]]:
    """Owner, group, mode and size of everything there."""
    found = {}
    for path in sorted(beneath.iterdir()):
        stat = path.lstat()
        found[path.name] = [stat.st_uid, stat.st_gid, stat.st_mode, stat.st_size if path.is_file() else 0]
    return found


def _seen(stat: os.stat_result) -> list[int]:
    return [stat.st_uid, stat.st_gid, stat.st_mode, stat.st_size]


def _write(file: Path, data: bytes) -> int:
    fd = os.open(file, os.O_RDWR)
    try:
        written = os.pwrite(fd, data, 0)
        os.fsync(fd)
    finally:
        os.close(fd)
    return written


def _create(file: Path) -> list[int]:
    fd = os.open(file, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        os.pwrite(fd, bytes(8192), 0)
        os.fsync(fd)
        return _seen(os.fstat(fd))
    finally:
        os.close(fd)


def calls(here: Path) -> dict[str, Callable[[], Any]]:
    """In order: later ones build on earlier ones."""
    own, private, readable, shared = (here / name for name in ("own", "private", "readable", "shared"))
    return {
        "create": lambda: _create(own),
        "write own": lambda: _write(own, b"x" * 4096),
        "chmod own": lambda: own.chmod(0o640),
        "stat own": lambda: _seen(own.stat()),
        "truncate own": lambda: os.truncate(own, 5000),
        "utime own": lambda: os.utime(own, (1, 1)),
        "chgrp own": lambda: os.chown(own, -1, GROUP),
        "give own away": lambda: os.chown(own, OTHER, -1),
        "mkdir": lambda: (here / "directory").mkdir(0o750),
        "create in it": lambda: _create(here / "directory" / "file"),
        "rename": lambda: own.rename(here / "renamed").name,
        "link": lambda: (here / "linked").hardlink_to(here / "renamed"),
        "symlink": lambda: (here / "symbolic").symlink_to("renamed"),
        "unlink": (here / "linked").unlink,
        "read private": private.read_text,
        "write private": lambda: _write(private, b"y"),
        "chmod private": lambda: private.chmod(0o666),
        "read readable": readable.read_text,
        "write readable": lambda: _write(readable, b"y"),
        "read shared, by group": shared.read_text,
        "write shared, by group": lambda: _write(shared, b"y"),
        "list": lambda: sorted(os.listdir(here)),
        "access private": lambda: os.access(private, os.R_OK),
    }


def main() -> None:
    """The command line."""
    os.umask(0o022)
    came: dict[str, Any] = {}
    for name, call in calls(Path(sys.argv[1])).items():
        try:
            came[name] = call()
        except OSError as error:
            came[name] = errno.errorcode.get(error.errno or 0, str(error))
    json.dump(came, sys.stdout)


if __name__ == "__main__":
    main()
