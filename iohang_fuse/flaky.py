"""A flaky source: rehearse an outage before there is one.

    iohang-flaky DIRECTORY MOUNTPOINT TRIGGER

It mirrors DIRECTORY at MOUNTPOINT, as a process of its own, and obeys the file TRIGGER, which need not exist. Each of its
lines is a rule, and the first that fits a call is the one that counts:

    OPERATIONS  FILES  WHAT...

    data        *.img           errno=EIO                   # read, write and fsync of images fail
    write,fsync vm1.img         errno=ETIMEDOUT delay=2     # fail after 2 s, as a `softerr` mount does
    read        vm1.img         errno=EIO bytes=4096-8191   # a bad sector
    *           vm1.img         hang                        # a `hard` mount: nothing returns until the rule is gone
    write       *               short=512                   # 512 bytes are taken, and the caller is told so
    read        *               delay=0.05                  # a slow network

OPERATIONS are the names of FUSE requests joined by commas, `data`, or `*`; FILES is a shell pattern for the path below
DIRECTORY or for its last part. Take the file away, or empty it, and the outage is over. Replace it with mv(1), so that no
half of it is ever read. Like NFS, and unlike a local file system, such a source has no RWF_NOWAIT, takes unaligned direct
I/O, and fails with whatever errno it is told.
"""

from __future__ import annotations

import argparse
import errno
import fnmatch
import logging
import math
import os
import re
import signal
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import pyfuse3
import trio

from iohang_fuse import limits, logs, source, syscalls
from iohang_fuse.events import Op
from iohang_fuse.filesystem import Filesystem
from iohang_fuse.rehandle import Policy
from iohang_fuse.requests import Requests

if TYPE_CHECKING:
    from collections.abc import Callable

T = TypeVar("T")
log = logging.getLogger(__name__)

_DATA = frozenset({"read", "write", "fsync"})
_WITH_BYTES = frozenset({"read", "write"})
_BY_INODE = "getattr setattr readlink open opendir access getxattr setxattr listxattr removexattr link".split()
_BY_NAME = "lookup mknod mkdir unlink rmdir symlink rename create".split()
_BY_HANDLE = "read write fsync flush release".split()
_BY_LISTING = "readdir fsyncdir".split()
_OPERATIONS = frozenset([*_BY_INODE, *_BY_NAME, *_BY_HANDLE, *_BY_LISTING, "statfs"])


class BadRule(Exception):
    """A line of the trigger file that says nothing sensible, and what would be right."""


@dataclass(frozen=True, slots=True)
class Rule:
    """One line of the trigger file. *bytes_from* and *bytes_to* are the first and the last byte it is about.

    With bytes, it is about reads and writes alone, whatever else it names.
    """

    operations: frozenset[str]
    files: str
    errno: int = 0
    hang: bool = False
    short: int | None = None
    delay_s: float = 0
    bytes_from: int = 0
    bytes_to: float = math.inf

    def fits(self, operation: str, path: str, offset: int, length: int) -> bool:
        """Whether the rule is about this call."""
        return (
            operation in self.operations
            and (fnmatch.fnmatchcase(path, self.files) or fnmatch.fnmatchcase(os.path.basename(path), self.files))
            and (self._all_bytes or operation in _WITH_BYTES)
            and offset <= self.bytes_to
            and offset + max(length, 1) > self.bytes_from
        )

    @property
    def _all_bytes(self) -> bool:
        return (self.bytes_from, self.bytes_to) == (0, math.inf)


def parse(text: str) -> list[Rule]:
    """The rules of a trigger file. Raises `BadRule` with the line's number."""
    rules = []
    for number, line in enumerate(text.splitlines(), 1):
        words = line.partition("#")[0].split()
        if words:
            try:
                rules.append(_parse_line(words))
            except BadRule as error:
                raise BadRule(f"line {number}: {error}") from None
    return rules


def _parse_line(words: list[str]) -> Rule:
    if len(words) < 3:
        raise BadRule(f"{' '.join(words)!r} is not `OPERATIONS FILES WHAT...`, as in `write *.img errno=EIO`")
    operations = _operations(words[0])
    fields: dict[str, Any] = {}
    for word in words[2:]:
        fields |= _what(word)
        if word.startswith(("short=", "bytes=")) and not operations & _WITH_BYTES:
            raise BadRule(f"{word!r} is for read and write")
    return Rule(operations, words[1], **fields)


def _what(word: str) -> dict[str, Any]:
    key, _, value = word.partition("=")
    if word == "hang":
        return {"hang": True}
    if key == "errno" and isinstance(getattr(errno, value, None), int):
        return {"errno": getattr(errno, value)}
    if key == "delay" and re.fullmatch(r"\d+(\.\d*)?|\.\d+", value, re.ASCII):
        return {"delay_s": float(value)}
    if key == "short" and re.fullmatch(r"\d+", value, re.ASCII):
        return {"short": int(value)}
    span = re.fullmatch(r"(\d+)-(\d+)", value, re.ASCII)
    if key == "bytes" and span and int(span[1]) <= int(span[2]):
        return {"bytes_from": int(span[1]), "bytes_to": int(span[2])}
    raise BadRule(f"{word!r} is none of errno=NAME, hang, short=BYTES, delay=SECONDS, bytes=FIRST-LAST")


def _operations(word: str) -> frozenset[str]:
    if word == "*":
        return _OPERATIONS
    names = frozenset().union(*(_DATA if name == "data" else {name} for name in word.split(",")))
    unknown = names - _OPERATIONS
    if unknown:
        raise BadRule(
            f"no operation {', '.join(sorted(unknown))}; there are: {', '.join(sorted(_OPERATIONS))}, data, *"
        )
    return names


class Trigger:
    """The trigger file, read again whenever it has changed."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._seen: tuple[int, int, int] | None = None
        self._rules: list[Rule] = []

    def rule(self, operation: str, path: str, offset: int, length: int) -> Rule | None:
        """The rule in force for a call, if there is one."""
        try:
            status = os.stat(self._path)
        except FileNotFoundError:
            self._seen, self._rules = None, []
            return None
        seen = (status.st_ino, status.st_mtime_ns, status.st_size)
        if seen != self._seen:
            self._seen = seen
            try:
                with open(self._path, encoding="utf-8") as file:
                    self._rules = parse(file.read())
            except (BadRule, OSError, UnicodeDecodeError) as error:
                log.error("%s: %s; the rules before it stay in force", self._path, error)  # noqa: TRY400
        return next((rule for rule in self._rules if rule.fits(operation, path, offset, length)), None)


class FlakyFilesystem(Filesystem):
    """The same passthrough, with a fault in front of each operation that a rule names."""

    trigger: Trigger

    async def _obey(self, operation: str, path: str, offset: int = 0, length: int = 0) -> Rule | None:
        rule = self.trigger.rule(operation, path, offset, length)
        if rule is None:
            return None
        if rule.delay_s:
            await trio.sleep(rule.delay_s)
        while rule is not None and rule.hang:
            await trio.sleep(0.02)
            rule = self.trigger.rule(operation, path, offset, length)
        if rule is not None and rule.errno:
            raise pyfuse3.FUSEError(rule.errno)
        return rule

    def _path_of(self, inode: int) -> str:
        try:
            return self._name(self._node(inode))
        except OSError:
            return ""

    async def read(self, fh: int, off: int, size: int) -> bytes:
        rule = await self._obey("read", self._requests.handles[fh].image.held.image, off, size)
        return await super().read(fh, off, size if rule is None or rule.short is None else min(size, rule.short))

    async def write(self, fh: int, off: int, buf: bytes) -> int:
        rule = await self._obey("write", self._requests.handles[fh].image.held.image, off, len(buf))
        return await super().write(fh, off, buf if rule is None or rule.short is None else buf[: rule.short])


def _with_fault(name: str, path_of: Callable[[FlakyFilesystem, tuple[Any, ...]], str]) -> None:
    plain = getattr(Filesystem, name)

    async def faulty(self: FlakyFilesystem, *args: Any) -> Any:
        await self._obey(name, path_of(self, args))
        return await plain(self, *args)

    setattr(FlakyFilesystem, name, faulty)


def _named(self: FlakyFilesystem, args: tuple[Any, ...]) -> str:
    parent, name = self._path_of(args[0]), args[1].decode(errors="backslashreplace")
    return name if parent in {"", "."} else f"{parent}/{name}"


for _name in _BY_INODE:
    _with_fault(_name, lambda self, args: self._path_of(args[0]))
for _name in _BY_NAME:
    _with_fault(_name, _named)
for _name in _BY_LISTING:
    _with_fault(_name, lambda self, args: self._name(self._listings[args[0]].node))
for _name in sorted({*_BY_HANDLE} - {"read", "write"}):
    _with_fault(_name, lambda self, args: self._requests.handles[args[0]].image.held.image)
_with_fault("statfs", lambda _self, _args: ".")


async def _serve(directory: str, mountpoint: str, trigger: str, options: set[str]) -> None:
    os.umask(0)
    nothing_held = Policy(dict.fromkeys(Op, 0.0), 5.0, frozenset(), errno.EIO, share=1024)
    filesystem = FlakyFilesystem(
        source.open_root(directory),
        Requests(nothing_held, 0, []),
        attr_timeout_s=0,
        entry_timeout_s=0,
        stability=source.Stability.LAZY,
    )
    filesystem.trigger = Trigger(trigger)
    pyfuse3.init(filesystem, mountpoint, {f"fsname={directory}", "subtype=iohang-flaky", *options})
    limits.alarm_clock()
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(filesystem.close_unwanted)
            nursery.start_soon(_unmount_at_signal, mountpoint)
            log.info("%s is served at %s; outages as %s says", directory, mountpoint, trigger)
            await pyfuse3.main(limits.MIN_TASKS, limits.MAX_TASKS)
            nursery.cancel_scope.cancel()
    finally:
        pyfuse3.close(unmount=False)


async def _unmount_at_signal(mountpoint: str) -> None:
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        async for _ in signals:
            try:
                await trio.to_thread.run_sync(syscalls.umount, mountpoint)
            except OSError:
                await trio.to_thread.run_sync(syscalls.umount, mountpoint, syscalls.MNT_DETACH)
                pyfuse3.terminate()


def main() -> int:
    """The command `iohang-flaky`."""
    parser = argparse.ArgumentParser(
        prog="iohang-flaky", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("directory")
    parser.add_argument("mountpoint")
    parser.add_argument("trigger", help="the file with the rules; need not exist")
    parser.add_argument("-o", dest="options", action="append", default=[], help="mount words, such as allow_other")
    args = parser.parse_args()
    limits.raise_open_files()
    paths = [os.path.abspath(path) for path in (args.directory, args.mountpoint, args.trigger)]
    for path in paths[:2]:
        if not os.path.isdir(path):
            print(f"iohang-flaky: {path} is not a directory", file=sys.stderr)  # noqa: T201
            return 1
    with logs.to_stderr_or(None, verbose=False):
        trio.run(
            _serve,
            paths[0],
            paths[1],
            paths[2],
            {word for option in args.options for word in option.split(",")},
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
