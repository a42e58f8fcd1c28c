"""Inside the Debian guest: checks of functions.py about who owns a file, and about files that are open in an outage."""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from typing import TYPE_CHECKING

from contrib.guest.nfs import site, squashed
from contrib.guest.nfs.checking import (
    BLOCK_BYTES,
    FIRST_ERRORS,
    KINDS,
    LONG_OUTAGE_S,
    OUTAGE_S,
    PLAIN,
    SQUASHED_KINDS,
    USER,
    equal,
    folder,
    opened,
    page_of,
    read_page,
    say,
    until,
)
from contrib.guest.nfs.holder import Holder

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

_GONE_LIMIT_S = 30.0
"""After the last close, which is not waited for."""

# ---- root_squash


def root_squash(kind: site.Kind) -> None:
    """Each call of each user comes to what it comes to on the bare mount, and leaves the same at the server."""
    came, left = {}, {}
    for user in (USER, 0):
        for way, root in (("bare", kind.bare), ("iohang", kind.iohang)):
            name = f"squashed-{kind.name}-{user}-{way}"
            beneath = kind.export / name
            shutil.rmtree(beneath, ignore_errors=True)
            squashed.prepare(beneath)
            came[way] = squashed.run_as(user, root / name)
            left[way] = squashed.at_server(beneath)
        differ = {
            call: (came["bare"][call], came["iohang"][call])
            for call in came["bare"]
            if came["bare"][call] != came["iohang"][call]
        }
        equal(differ, {}, f"calls of user {user} that differ, bare and through iohang-fuse")
        equal(left["iohang"], left["bare"], f"at the server, of user {user}")
        owner = user or 65534
        equal(came["iohang"]["create"], [owner, owner, 0o100600, 8192], "owner, group, mode and size of a new file")
        equal(came["iohang"]["read private"], "EACCES", "another's private file")


# ---- files that have no name any more


def unlinked(kind: site.Kind) -> None:
    """Unlinked while open: it goes on through its descriptor, as .nfsXXXX at the server, which is gone after close."""
    with folder(kind, "unlinked") as (_, through, beneath):
        with opened(through / "file", os.O_RDWR | os.O_CREAT | os.O_DIRECT) as fd:
            os.pwritev(fd, [page_of(b"a" * BLOCK_BYTES)], 0)
            (through / "file").unlink()
            assert not (through / "file").exists(), "the name"
            os.pwritev(fd, [page_of(b"b" * BLOCK_BYTES)], BLOCK_BYTES)
            os.fsync(fd)
            equal(read_page(fd, 0) + read_page(fd, BLOCK_BYTES), b"a" * BLOCK_BYTES + b"b" * BLOCK_BYTES, "read back")
            silly = sorted(path.name for path in beneath.iterdir())
            assert [name[:4] for name in silly] == [".nfs"], f"at the server while it is open: {silly}"
            equal(os.fstat(fd).st_size, 2 * BLOCK_BYTES, "fstat")
        _gone(beneath, "the open file")
        (through / "other").write_bytes(b"c")
        (through / "other").unlink()
        _gone(beneath, "the closed file")
        through.rmdir()
        assert not beneath.exists(), "the directory after rmdir"


def _gone(beneath: Path, what: str) -> None:
    assert until(lambda: not list(beneath.iterdir()), _GONE_LIMIT_S), f"{what} is left: {sorted(beneath.iterdir())}"


def unlinked_in_outages(_kind: site.Kind) -> None:
    """The same through outages of 10 s and 30 s: held, and recovered through the descriptor that there is."""
    holders: dict[str, tuple[Holder, Path]] = {}
    with contextlib.ExitStack() as stack:
        for name in PLAIN:
            _, through, beneath = stack.enter_context(folder(KINDS[name], "gone"))
            holders[name] = Holder(through / "file", unlink=True), beneath
            stack.callback(holders[name][0].kill)
        for seconds in (OUTAGE_S, LONG_OUTAGE_S):
            for holder, _ in holders.values():
                holder.works()
            _drop(seconds)
        for holder, _ in holders.values():
            holder.works()
            holder.stop()
        for name, (holder, beneath) in holders.items():
            equal(holder.errors, [], f"{name}: its errors")
            assert holder.longest_s > LONG_OUTAGE_S / 2, f"{name}: the outage was no pause: {holder.longest_s:.1f} s"
            silly = list(beneath.iterdir())
            equal(len(silly), 1, f"{name}: files at the server while it is open")
            equal(holder.wrong(silly[0]), 0, f"{name}: acknowledged blocks that are not there")
            holder.close()
            _gone(beneath, name)


def first_errors(_kind: site.Kind) -> None:
    """What doctor says of the first error, seen on the bare mounts."""
    holders: dict[str, Holder] = {}
    with contextlib.ExitStack() as stack:
        for name in FIRST_ERRORS:
            through, _, _ = stack.enter_context(folder(KINDS[name], "first"))
            _wait_for(through)
            holders[name] = Holder(through / "file")
            stack.callback(holders[name].kill)
        for holder in holders.values():
            holder.works()
        _drop(LONG_OUTAGE_S)
        for holder in holders.values():
            holder.works(1)
    seen = {name: (holder.errors[0]["took_s"], holder.errors[0]["error"]) for name, holder in holders.items()}
    say(f"first errors: {seen}")
    for name, (wanted_s, wanted) in FIRST_ERRORS.items():
        took_s, error = seen[name]
        equal(error, wanted, f"{name}: its first error")
        # The guest is emulated; and the client looks at its own times.
        assert wanted_s - 1 <= took_s <= wanted_s + 6, f"{name}: after {took_s:.1f} s, not {wanted_s} s"


def _wait_for(directory: Path) -> None:
    """A bare mount may be deaf from an outage before."""
    deadline_s = time.monotonic() + 90
    while True:
        try:
            (directory / "works").write_bytes(b"")
        except OSError:
            if time.monotonic() > deadline_s:
                raise
            time.sleep(1)
        else:
            return


def squashed_opened_anew(_kind: site.Kind) -> None:
    """A private file of a user is opened anew as that user, where root is nobody: after dropped packets, and stale handles."""
    holders: dict[str, tuple[Holder, Path]] = {}
    with contextlib.ExitStack() as stack:
        for kind in SQUASHED_KINDS:
            _, through, beneath = stack.enter_context(folder(kind, "anew"))
            holders[kind.name] = Holder(through / "file", user=USER), beneath / "file"
            stack.callback(holders[kind.name][0].kill)
        outages: tuple[Callable[[], None], ...] = (lambda: _drop(LONG_OUTAGE_S), _take_export_back)
        for outage in outages:
            for holder, _ in holders.values():
                holder.works()
            outage()
        for name, (holder, beneath) in holders.items():
            holder.works()
            holder.stop()
            equal(holder.errors, [], f"{name}: its errors")
            equal(holder.wrong(beneath), 0, f"{name}: acknowledged blocks that are not there")
            equal(beneath.stat().st_uid, USER, f"{name}: its owner")
            holder.close()


def _drop(seconds: float) -> None:
    site.drop()
    time.sleep(seconds)
    site.restore()


def _take_export_back() -> None:
    """The one directory. The hosts may still have another: who may have nothing any more is told EACCES, and not ESTALE."""
    site.run("exportfs", "-u", f"{site.NETWORK}:{site.SQUASHED}")
    site.run("exportfs", "-f")
    time.sleep(OUTAGE_S)
    site.export("rw")
