"""Inside the Debian guest: what a file system on NFS must do beside outages, check by check; JSON to stdout.

    python3 -m contrib.guest.nfs.setting 15
    python3 -m contrib.guest.nfs.functions [NAME ...]

`{"checks": [{"name": ..., "ok": ..., "why": ...}]}`. A check that fails says why, and the others go on.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import re
import struct
import sys
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from contrib.guest.nfs import site
from contrib.guest.nfs.checking import (
    BLOCK_BYTES,
    FIRST_ERRORS,
    KINDS,
    LEASE_S,
    PLAIN,
    SQUASHED_KINDS,
    asked,
    equal,
    folder,
    opened,
    page_of,
    read_page,
    say,
    until,
)
from contrib.guest.nfs.functions_held import (
    first_errors,
    root_squash,
    squashed_opened_anew,
    unlinked,
    unlinked_in_outages,
)
from contrib.guest.nfs.scene import IOHANG

if TYPE_CHECKING:
    from collections.abc import Callable

# ---- files


def direct_unaligned(kind: site.Kind) -> None:
    """O_DIRECT at offset 3, 100 bytes: NFS takes it, and so do we."""
    with (
        folder(kind, "unaligned") as (_, through, beneath),
        opened(through / "file", os.O_RDWR | os.O_CREAT | os.O_DIRECT) as fd,
    ):
        equal(os.pwrite(fd, b"a" * BLOCK_BYTES, 0), BLOCK_BYTES, "the whole write")
        equal(os.pwrite(fd, b"b" * 100, 3), 100, "the unaligned write")
        equal(read_page(fd, 0)[:105], b"aaa" + b"b" * 100 + b"aa", "read back")
        # There at once, without any sync: nothing is kept on this host.
        equal((beneath / "file").read_bytes()[:105], b"aaa" + b"b" * 100 + b"aa", "at the server")
        assert _direct_backing(kind, "file"), "the server's own descriptor is not O_DIRECT"
        equal(os.pread(fd, 100, 3), b"b" * 100, "an unaligned direct read")
        try:
            os.pread(fd, 100, 0)
        except OSError as error:
            equal(error.errno, errno.EINVAL, "QEMU's probe of the alignment, a short direct read at 0")
        else:
            raise AssertionError("a short direct read at 0 went well: QEMU would assume an alignment of 4096")


def _direct_backing(kind: site.Kind, name: str) -> bool:
    """Whether iohang-fuse has the file open with O_DIRECT: /proc/PID/fdinfo."""
    pid = asked("iohangctl", "--json", "-m", str(kind.iohang), "status")["pid"]
    for link in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            if Path(os.readlink(link)).name == name:
                flags = re.search(r"flags:\s+(\d+)", Path(f"/proc/{pid}/fdinfo/{link.name}").read_text())
                if flags and int(flags[1], 8) & os.O_DIRECT:
                    return True
    return False


def append(kind: site.Kind) -> None:
    """O_APPEND: each write once, at the end."""
    with folder(kind, "append") as (_, through, beneath):
        with opened(through / "file", os.O_WRONLY | os.O_CREAT | os.O_APPEND) as fd:
            for number in range(20):
                os.write(fd, b"%03d\n" % number)
            os.fsync(fd)
        equal((beneath / "file").read_bytes(), b"".join(b"%03d\n" % number for number in range(20)), "at the server")


def truncate(kind: site.Kind) -> None:
    """By descriptor and by name, shorter and longer, between writes."""
    with folder(kind, "truncate") as (_, through, beneath):
        with opened(through / "file", os.O_RDWR | os.O_CREAT) as fd:
            os.pwrite(fd, b"a" * 10000, 0)
            os.ftruncate(fd, 5000)
            os.pwrite(fd, b"b" * 10, 6000)
            os.ftruncate(fd, 8000)
            os.fsync(fd)
            equal(os.fstat(fd).st_size, 8000, "fstat")
        whole = b"a" * 5000 + bytes(1000) + b"b" * 10 + bytes(1990)
        assert (beneath / "file").read_bytes() == whole, "the file at the server is as written"
        os.truncate(through / "file", 100)
        equal((beneath / "file").read_bytes(), b"a" * 100, "after truncate by name")


def dsync(kind: site.Kind) -> None:
    """O_DSYNC: an answered write is at the server, without fsync."""
    with (
        folder(kind, "dsync") as (_, through, beneath),
        opened(through / "file", os.O_RDWR | os.O_CREAT | os.O_DSYNC) as fd,
    ):
        for number in range(5):
            os.pwrite(fd, b"%d" % number * 1000, number * 1000)
            equal((beneath / "file").read_bytes()[-1000:], b"%d" % number * 1000, "at the server after its write")


# ---- two client hosts


def locks_are_local(_kind: site.Kind) -> None:
    """A lock is seen by this host's others, and by no other host; on the bare 4.2 mount it is."""
    first, second = KINDS["v4.2-soft"], KINDS["v4.2-softerr"]
    name = "functions-locks"
    (first.export / name).write_bytes(b"x")
    (first.export / name).chmod(0o666)

    def taken(file: Path) -> bool:
        with opened(file, os.O_RDWR) as fd:
            try:
                fcntl.fcntl(fd, fcntl.F_OFD_SETLK, struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, 100, 1, 0))
            except BlockingIOError:
                return True
            return False

    def lock(fd: int) -> None:
        fcntl.fcntl(fd, fcntl.F_OFD_SETLK, struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, 100, 1, 0))

    with opened(first.iohang / name, os.O_RDWR) as fd:
        lock(fd)
        assert taken(first.iohang / name), "seen on the same host, through iohang-fuse"
        assert not taken(second.iohang / name), "seen on another host, through iohang-fuse"
        assert not taken(second.bare / name), "seen on another host, on its bare mount"
    assert not taken(first.iohang / name), "left after close"
    with opened(first.bare / name, os.O_RDWR) as fd:
        lock(fd)
        assert taken(second.bare / name), "a bare lock seen on another host's bare mount"


def coherence(kind: site.Kind) -> None:
    """Live migration: what one host writes with O_DIRECT through iohang-fuse another reads so, at once, both ways."""
    other = KINDS[kind.name.removesuffix("err")]
    name = f"functions-coherence-{kind.name}"
    (kind.export / name).write_bytes(bytes(16 * BLOCK_BYTES))
    (kind.export / name).chmod(0o666)
    flags = os.O_RDWR | os.O_DIRECT
    with opened(kind.iohang / name, flags) as here, opened(other.iohang / name, flags) as there:
        for number in range(40):
            writer, reader = (here, there) if number // 10 % 2 == 0 else (there, here)
            offset = number * 7 % 16 * BLOCK_BYTES
            data = struct.pack("64s", b"%d" % number) * 64
            read_page(reader, offset)  # so that it could have it in a cache
            os.pwritev(writer, [page_of(data)], offset)
            assert read_page(reader, offset) == data, f"write {number} is read on the other host at once"


def growth(kind: site.Kind) -> None:
    """Live migration of an image that grows (qcow2): its new end, and what is there, is seen on the other host."""
    other = KINDS[kind.name.removesuffix("err")]
    took: dict[str, tuple[float, float]] = {}
    for way in ("bare", "iohang"):
        name = f"functions-growth-{kind.name}-{way}"
        (kind.export / name).write_bytes(bytes(BLOCK_BYTES))
        (kind.export / name).chmod(0o666)
        flags = os.O_RDWR | os.O_DIRECT
        here, there = ((each.bare if way == "bare" else each.iohang) / name for each in (kind, other))
        with opened(here, flags) as writer, opened(there, flags) as reader:
            os.lseek(reader, 0, os.SEEK_END)  # known there, and older than the kernel may believe it
            time.sleep(1.5)
            os.pwritev(writer, [page_of(b"g" * BLOCK_BYTES)], BLOCK_BYTES)
            took[way] = (
                _seconds_until(lambda fd=reader: os.lseek(fd, 0, os.SEEK_END) == 2 * BLOCK_BYTES),  # type: ignore[misc]
                _seconds_until(lambda fd=reader: read_page(fd, BLOCK_BYTES) == b"g" * BLOCK_BYTES),  # type: ignore[misc]
            )
    say(f"growth, {kind.name}: seconds until the size and the data are seen: {took}")
    assert max(took["bare"]) < 1, f"on the bare mounts: {took}"
    assert max(took["iohang"]) < 2, f"seconds until the new size, and then the data, are seen on the other host: {took}"


def _seconds_until(condition: Callable[[], object]) -> float:
    began_s = time.monotonic()
    assert until(condition, 100), "not within 100 s"
    return round(time.monotonic() - began_s, 1)


# ---- what our programs say


def engine(kind: site.Kind) -> None:
    """io_uring, which NFS has only with a kernel worker for each request."""
    status = asked("iohangctl", "--json", "-m", str(kind.iohang), "status")
    equal((status["engine"], status["source"]), ("uring", str(kind.source)), "engine and source")


def doctor(kind: site.Kind) -> None:
    """What the mount is, and when its first error comes: by the server's lease, and by when iohang-fuse ends a deaf connection."""
    version, word = kind.name[1:].split("-")
    known = FIRST_ERRORS.get(kind.name)
    for reconnect in ("auto", "never"):
        check = ("iohang-mount", "--check", "--json", str(kind.source), "/mnt", "-o", f"{IOHANG},reconnect={reconnect}")
        ways = [check] if reconnect == "never" else [check, ("iohangctl", "--json", "-m", str(kind.iohang), "doctor")]
        if known is None:
            wanted = rf"NFS {version}, {word}: a call that the server does not answer never fails"
        else:
            wanted = f"NFS {version}, {word},timeo=10,retrans=1: the first error comes after about "
            wanted += _words_of_first_error(version, known[0], reconnect)
        for words in ways:
            findings = {each["about"]: each for each in asked(*words)["findings"]}
            said = findings["nfs"]
            assert re.match(wanted, said["seen"]), f"{words}: {said['seen']!r} does not match {wanted!r}"
            equal(said["level"], "warning" if known is None else "ok", f"{words}: its level")
            assert "takes it unaligned" in findings["direct I/O"]["seen"], f"{words}: {findings['direct I/O']}"


def _words_of_first_error(version: str, first_s: float, reconnect: str) -> str:
    if version == "3":
        return r"2(\.0)? s$"
    ends = (
        (rf"{first_s} s", f"18 s for a lease of {LEASE_S} s")
        if reconnect == "never"
        else ("10 s", r"9\.0 s with reconnect=auto")
    )
    return rf"{ends[0]} \(.*is up, {ends[1]}\), each later one after 2\.0 s$"


# ---- all of them

CHECKS: dict[str, tuple[Callable[[site.Kind], None], tuple[str, ...]]] = {
    "direct-unaligned": (direct_unaligned, PLAIN),
    "append": (append, PLAIN),
    "truncate": (truncate, PLAIN),
    "dsync": (dsync, PLAIN),
    "locks-are-local": (locks_are_local, ("v4.2-soft",)),
    "coherence": (coherence, PLAIN),
    "growth": (growth, PLAIN),
    "engine": (engine, tuple(kind.name for kind in site.KINDS)),
    "doctor": (doctor, tuple(kind.name for kind in site.KINDS)),
    "root-squash": (root_squash, tuple(kind.name for kind in SQUASHED_KINDS)),
    "unlinked": (unlinked, PLAIN),
    "unlinked-in-outages": (unlinked_in_outages, ("v3-softerr",)),
    "first-errors": (first_errors, ("v3-softerr",)),
    "squashed-opened-anew": (squashed_opened_anew, ("squashed-v3",)),
}
"""The check, and the mounts that it is made on; those that need several have the first of them here."""


def _mount_squashed() -> None:
    def one(kind: site.Kind) -> None:
        if not kind.bare.exists():
            site.mount(kind)
            site.mount_iohang(kind, f"{IOHANG},allow_other")

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(one, SQUASHED_KINDS))


def _made(name: str, check: Callable[[site.Kind], None], kind: str) -> dict[str, Any]:
    began_s = time.monotonic()
    why = ""
    try:
        check(KINDS[kind])
    except Exception as error:  # noqa: BLE001 - whatever goes wrong is this check's, and the others go on
        why = f"{type(error).__name__}: {error}"
        traceback.print_exc()
    say(f"{name} {kind}: {why or 'ok'}")
    return {"name": name, "kind": kind, "ok": not why, "why": why, "seconds": round(time.monotonic() - began_s, 1)}


def main() -> None:
    """The command line: all checks, or those that are named."""
    _mount_squashed()
    wanted = sys.argv[1:] or list(CHECKS)
    found = [_made(name, CHECKS[name][0], kind) for name in wanted for kind in CHECKS[name][1]]
    json.dump({"checks": found}, sys.stdout)


if __name__ == "__main__":
    main()
