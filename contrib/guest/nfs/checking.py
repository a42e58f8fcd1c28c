"""Inside the Debian guest: what the checks of functions.py share: the mounts, a folder for each check, and small words."""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import shutil
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any

from contrib.guest.nfs import site

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

USER = 1000
LEASE_S = 15
OUTAGE_S = 10.0
LONG_OUTAGE_S = 30.0
"""Longer than any of the mounts needs for its first error."""

SQUASHED_KINDS = tuple(
    site.Kind(f"squashed-{version}", f"vers={version[1:]},softerr{more}", host, site.SQUASHED)
    for version, more, host in (("v3", ",nolock", 31), ("v4.2", "", 32))
)

KINDS = {kind.name: kind for kind in (*site.KINDS, *SQUASHED_KINDS)}
PLAIN = ("v3-softerr", "v4.2-softerr")
FIRST_ERRORS = {
    "v3-soft": (2, "EIO"),
    "v3-softerr": (2, "ETIMEDOUT"),
    "v4.2-soft": (20, "EIO"),
    "v4.2-softerr": (20, "ETIMEDOUT"),
}
"""By docs/howto/nfs.rst, for timeo=10,retrans=1 and a lease of 15 s."""

BLOCK_BYTES = 4096


@contextlib.contextmanager
def folder(kind: site.Kind, name: str) -> Iterator[tuple[Path, Path, Path]]:
    """A new directory: bare, through iohang-fuse, and at the server."""
    name = f"functions-{name}-{kind.name}"
    beneath = kind.export / name
    shutil.rmtree(beneath, ignore_errors=True)
    beneath.mkdir()
    beneath.chmod(0o777)
    yield kind.bare / name, kind.iohang / name, beneath


@contextlib.contextmanager
def opened(file: Path, flags: int) -> Iterator[int]:
    """A descriptor, closed in the end."""
    fd = os.open(file, flags, 0o644)
    try:
        yield fd
    finally:
        os.close(fd)


def page_of(data: bytes) -> mmap.mmap:
    """For O_DIRECT."""
    page = mmap.mmap(-1, BLOCK_BYTES)
    page[: len(data)] = data
    return page


def read_page(fd: int, offset: int) -> bytes:
    """Past the page cache."""
    page = mmap.mmap(-1, BLOCK_BYTES)
    return page[: os.preadv(fd, [page], offset)]


def until(condition: Callable[[], object], limit_s: float) -> bool:
    """Whether it came true in time."""
    deadline_s = time.monotonic() + limit_s
    while not condition():
        if time.monotonic() > deadline_s:
            return False
        time.sleep(0.1)
    return True


def equal(found: object, wanted: object, what: str) -> None:
    """Raises AssertionError that says both."""
    assert found == wanted, f"{what}: {found!r}, and not {wanted!r}"


def asked(*words: str) -> dict[str, Any]:
    """The answer of a program of ours, whatever its exit code."""
    done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=60)
    assert done.stdout, f"{' '.join(words)}: {done.stderr}"
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def say(words: str) -> None:
    """Progress, for who looks at the guest's log."""
    print(words, file=sys.stderr, flush=True)
