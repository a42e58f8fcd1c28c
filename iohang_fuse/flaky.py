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
    read        *               errno=EIO chance=0.01       # one read in a hundred fails
    data        vm1.img         stale                       # each handle that is used now is dead for good
    writeback   vm1.img         errno=EIO                   # what was written is lost, and the next fsync alone tells

OPERATIONS are the names of FUSE requests joined by commas, `writeback` (see below), `data`, or `*`; FILES is a shell pattern
for the path below DIRECTORY or for its last part. Take the file away, or empty it, and the outage is over. Replace it with
mv(1), so that no half of it is ever read. Like NFS, and unlike a local file system, such a source has no RWF_NOWAIT, takes
unaligned direct I/O, and fails with whatever errno it is told.

With --page-cache it acknowledges writes as a kernel does, from memory: they reach DIRECTORY at fsync, at the last close, some
seconds later, or at once where the file was opened with O_SYNC or O_DSYNC. And it loses them as Linux does: where writeback
fails, the data is dropped and called clean, each handle is told so once, and the next fsync answers 0.
"""

from __future__ import annotations

import argparse
import errno
import fnmatch
import logging
import math
import os
import random
import re
import signal
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import pyfuse3
import trio

from iohang_fuse import __version__, config, limits, logs, mountwords, receiver, source, syscalls
from iohang_fuse.engine import Engine
from iohang_fuse.events import Op
from iohang_fuse.filesystem import Filesystem
from iohang_fuse.inodes import Node
from iohang_fuse.messages import printable
from iohang_fuse.pagecache import DirtyData, WritebackErrors
from iohang_fuse.rehandle import Policy
from iohang_fuse.requests import Requests

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

T = TypeVar("T")
log = logging.getLogger(__name__)

_DATA = frozenset({"read", "write", "fsync"})
_WITH_BYTES = frozenset({"read", "write", "writeback"})
_WITH_COUNT = frozenset({"read", "write"})
_WITH_STALE = frozenset({"read", "write", "fsync", "flush"})
_BY_INODE = "getattr setattr readlink open opendir access getxattr setxattr listxattr removexattr link".split()
_BY_NAME = "lookup mknod mkdir unlink rmdir symlink rename create".split()
_BY_HANDLE = "read write fsync flush release".split()
_BY_LISTING = "readdir fsyncdir".split()
_OPERATIONS = frozenset([*_BY_INODE, *_BY_NAME, *_BY_HANDLE, *_BY_LISTING, "statfs", "writeback"])

_DIRTY_LIMIT = 64 << 20
"""Dirty bytes of one file beyond which a write waits for writeback, as the kernel's does (balance_dirty_pages)."""
_MAX_BACKGROUND = 16384
"""Requests that may hang here at once, as on a network file system, which has no such limit. The kernel's own, 12, would be met
by those on one file, and stop all others: a hang that has nothing to do with the rule."""
_END_S = 2.0
"""How long the end of the server waits for requests and writeback, which a rule may have made hang."""


class BadRule(Exception):
    """A line of the trigger file that says nothing sensible, and what would be right."""


@dataclass(frozen=True, slots=True)
class Rule:
    """One line of the trigger file. *bytes_from* and *bytes_to* are the first and the last byte it is about.

    With bytes, it is about reads, writes and writeback alone, whatever else it names.
    """

    operations: frozenset[str]
    files: str
    errno: int = 0
    hang: bool = False
    stale: bool = False
    short: int | None = None
    delay_s: float = 0
    chance: float = 1
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
        if word.startswith("short=") and not operations & _WITH_COUNT:
            raise BadRule(f"{word!r} is for read and write")
        if word.startswith("bytes=") and not operations & _WITH_BYTES:
            raise BadRule(f"{word!r} is for read, write and writeback")
        if word == "stale" and not operations <= _WITH_STALE:
            others = ", ".join(sorted(operations - _WITH_STALE)) if words[0] != "*" else "*"
            raise BadRule(f"'stale' is for read, write, fsync and flush, which are by handle, and not for {others}")
    return Rule(operations, words[1], **fields)


def _what(word: str) -> dict[str, Any]:
    key, _, value = word.partition("=")
    if word in {"hang", "stale"}:
        return {word: True}
    if key == "errno" and isinstance(getattr(errno, value, None), int):
        return {"errno": getattr(errno, value)}
    if key == "delay" and re.fullmatch(r"\d+(\.\d*)?|\.\d+", value, re.ASCII):
        return {"delay_s": float(value)}
    if key == "short" and re.fullmatch(r"\d+", value, re.ASCII):
        return {"short": int(value)}
    span = re.fullmatch(r"(\d+)-(\d+)", value, re.ASCII)
    if key == "bytes" and span and int(span[1]) <= int(span[2]):
        return {"bytes_from": int(span[1]), "bytes_to": int(span[2])}
    if key == "chance" and re.fullmatch(r"0(\.\d*)?|\.\d+|1(\.0*)?", value, re.ASCII):
        return {"chance": float(value)}
    raise BadRule(
        f"{word!r} is none of errno=NAME, hang, stale, short=BYTES, delay=SECONDS, bytes=FIRST-LAST, chance=0...1"
    )


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


class Call:
    """What a rule is asked about: an operation on some ranges of a file, each an offset and a length.

    Dice are thrown once a call and rule, so that a call that hangs by `chance` does so until that rule is gone.
    """

    def __init__(self, operation: str, path: str, ranges: Iterable[tuple[int, int]] = ((0, 0),)) -> None:
        self._operation = operation
        self._path = path
        self._ranges = [*ranges]
        self._lucky: dict[Rule, bool] = {}

    def meets(self, rule: Rule, dice: random.Random) -> bool:
        """Whether the rule is about this call, and its chance has come."""
        if not any(rule.fits(self._operation, self._path, offset, length) for offset, length in self._ranges):
            return False
        if rule.chance < 1 and rule not in self._lucky:
            self._lucky[rule] = dice.random() < rule.chance
        return self._lucky.get(rule, True)


class Trigger:
    """The trigger file, read again whenever it has changed."""

    def __init__(self, path: str, seed: int | None = None) -> None:
        self._path = path
        self._dice = random.Random(seed)  # noqa: S311 - to be had again, not to be secret
        self._seen: tuple[int, int, int] | None = None
        self._rules: list[Rule] = []
        self._changed: trio.Event | None = None  # while somebody looks for a change

    def rule(self, call: Call) -> Rule | None:
        """The rule in force for a call, if there is one."""
        seen = self._status()
        if seen is None:
            self._seen, self._rules = None, []
            return None
        if seen != self._seen:
            self._seen = seen
            try:
                with open(self._path, encoding="utf-8") as file:
                    self._rules = parse(file.read())
            except (BadRule, OSError, UnicodeDecodeError) as error:
                log.error("%s: %s; the rules before it stay in force", self._path, error)  # noqa: TRY400
        return next((rule for rule in self._rules if call.meets(rule, self._dice)), None)

    def _status(self) -> tuple[int, int, int] | None:
        try:
            status = os.stat(self._path)
        except FileNotFoundError:
            return None
        return status.st_ino, status.st_mtime_ns, status.st_size

    async def fault(self, call: Call) -> Rule | None:
        """The same once the rule's delay is over, and the rules that say `hang` are gone."""
        return await self.endured(call, self.rule(call))

    async def endured(self, call: Call, rule: Rule | None) -> Rule | None:
        """The same where the *rule* is known."""
        if rule is not None and rule.delay_s:
            await trio.sleep(rule.delay_s)
        while rule is not None and rule.hang:
            await self._change(self._seen)
            rule = self.rule(call)
        return rule

    async def _change(self, seen: tuple[int, int, int] | None) -> None:
        """Until the file is another than *seen*. One looks for all that hang: hundreds of them must not keep the others waiting."""
        if self._changed is not None:
            await self._changed.wait()
            return
        self._changed = changed = trio.Event()
        try:
            while self._status() == seen:  # noqa: ASYNC110 - of a file, which sets no trio.Event
                await trio.sleep(0.02)
        finally:
            self._changed = None
            changed.set()


class _CachedFile:
    """A file as the page cache has it. It lasts while a handle is open, or nobody has seen the last error."""

    def __init__(self, inode: int) -> None:
        self.inode = inode
        self.dirty = DirtyData()
        self.errors = WritebackErrors()
        self.turn = trio.Lock()  # so that nobody sees the data between here and DIRECTORY
        self.handles: dict[int, _CachedHandle] = {}
        self.writers: dict[int, None] = {}  # handles that can write, the oldest first
        self.in_background = False  # whether writeback is due some time


@dataclass(slots=True)
class _CachedHandle:
    file: _CachedFile
    known: int  # of the file's errors
    synchronous: bool


class CachingFilesystem(Filesystem):
    """The same passthrough, with a page cache of its own where *writeback_every_s* is not None.

    The kernel's own cache of this mount is bypassed then: it would go on showing what writeback has lost. So a file on it
    cannot be mapped shared.
    """

    def __init__(self, *args: Any, trigger: Trigger, writeback_every_s: float | None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.trigger = trigger
        self.nursery: trio.Nursery | None = None
        self._writeback_every_s = writeback_every_s
        self._files: dict[int, _CachedFile] = {}
        self._cached: dict[int, _CachedHandle] = {}

    def _entry(self, node: Node, attributes: os.stat_result, size: int | None = None) -> pyfuse3.EntryAttributes:
        entry = super()._entry(node, attributes, size)
        if node.id in self._files:  # for listings: the kernel appends where it was last told that the file ends
            entry.st_size = max(entry.st_size, self._files[node.id].dirty.end)
        return entry

    # ---- handles

    async def open(self, inode: int, flags: int, ctx: pyfuse3.RequestContext) -> pyfuse3.FileInfo:
        file = self._files.get(inode)
        if file is None or not flags & os.O_TRUNC:
            info = await super().open(inode, flags, ctx)
        else:
            async with file.turn:
                info = await super().open(inode, flags, ctx)
                file.dirty.clear()
        return info if self._writeback_every_s is None else self._cached_handle(inode, info, flags)

    async def create(
        self, parent_inode: int, name: bytes, mode: int, flags: int, ctx: pyfuse3.RequestContext
    ) -> tuple[pyfuse3.FileInfo, pyfuse3.EntryAttributes]:
        info, entry = await super().create(parent_inode, name, mode, flags, ctx)
        if self._writeback_every_s is not None:
            if flags & os.O_TRUNC and entry.st_ino in self._files:  # somebody else was quicker
                self._files[entry.st_ino].dirty.clear()
            self._cached_handle(entry.st_ino, info, flags)
        return info, await self._as_written(entry, ctx)

    def _cached_handle(self, inode: int, info: pyfuse3.FileInfo, flags: int) -> pyfuse3.FileInfo:
        info.direct_io = True
        file = self._files.setdefault(inode, _CachedFile(inode))
        handle = _CachedHandle(file, file.errors.sample(), bool(flags & os.O_DSYNC))  # O_SYNC includes O_DSYNC
        self._cached[info.fh] = file.handles[info.fh] = handle
        if flags & os.O_ACCMODE != os.O_RDONLY:
            file.writers[info.fh] = None
        return info

    async def release(self, fh: int) -> None:
        """The last close writes back. It has nobody to tell of an error: whoever opens the file next is told."""
        handle = self._cached.get(fh)
        if handle is not None:
            file = handle.file
            while file.dirty.size and [*file.writers] == [fh]:
                await self._write_back(file)
            file.writers.pop(fh, None)
            del self._cached[fh], file.handles[fh]
            if not file.handles and file.errors.seen:
                self._files.pop(file.inode, None)
        await super().release(fh)

    def forgotten(self, inode: int, lookups: int) -> None:
        """An error that nobody has seen ends with the inode: its number may soon be another file's."""
        super().forgotten(inode, lookups)
        try:
            self._node(inode)
        except OSError:
            self._files.pop(inode, None)

    # ---- data

    def read_at_once(self, _fh: int, _off: int, _size: int) -> bytes | None:
        return None  # rules come first

    def known_capability(self, _inode: int) -> bytes | int | None:
        return None  # rules come first

    # Of `begin_read` and `begin_write`, which lead here, see FlakyFilesystem: rules come first.

    async def read(self, fh: int, off: int, size: int) -> bytes:
        handle = self._cached.get(fh)
        if handle is None:
            return await super().read(fh, off, size)
        async with handle.file.turn:
            return handle.file.dirty.over(off, size, await super().read(fh, off, size))

    async def write(self, fh: int, off: int, buf: bytes) -> int:
        handle = self._cached.get(fh)
        if handle is None:
            return await super().write(fh, off, buf)
        file = handle.file
        async with file.turn:
            file.dirty.write(off, buf)
        if handle.synchronous:
            await self._write_back(file)
            self._tell(handle)
        elif file.dirty.size > _DIRTY_LIMIT:
            await self._write_back(file)
        elif not file.in_background and self.nursery is not None:
            file.in_background = True
            self.nursery.start_soon(self._write_back_later, file)
        return len(buf)

    async def fsync(self, fh: int, datasync: bool) -> None:  # noqa: FBT001 - pyfuse3's signature
        handle = self._cached.get(fh)
        if handle is not None:
            await self._write_back(handle.file)
            self._tell(handle)
        await super().fsync(fh, datasync)

    def _tell(self, handle: _CachedHandle) -> None:
        number, handle.known = handle.file.errors.news(handle.known)
        if number:
            raise pyfuse3.FUSEError(number)

    # ---- writeback

    async def _write_back(self, file: _CachedFile) -> None:
        """Write what is dirty to DIRECTORY, or lose it. Raises nothing: errors are for the handles to fetch."""
        if not file.dirty.size:
            return
        path = self._requests.handles[next(iter(file.writers))].image.held.image
        ranges = ((extent.offset, len(extent.data)) for extent in file.dirty.extents)
        rule = await self.trigger.fault(Call("writeback", path, ranges))
        async with file.turn:
            if rule is not None and rule.errno:
                lost = file.dirty.cut(rule.bytes_from, rule.bytes_to + 1)
                self._lost(file, path, lost, rule.errno)
            for offset, data in file.dirty.extents:
                try:
                    await super().write(next(iter(file.writers)), offset, data)
                except pyfuse3.FUSEError as error:
                    self._lost(file, path, len(data), error.errno)
            file.dirty.clear()

    def _lost(self, file: _CachedFile, path: str, count: int, number: int) -> None:
        if count:
            file.errors.failed(number)
            log.warning("%s: writeback failed, %d bytes are lost: %s", path, count, os.strerror(number))

    async def _write_back_later(self, file: _CachedFile) -> None:
        assert self._writeback_every_s is not None
        await trio.sleep(self._writeback_every_s)
        file.in_background = False  # what is written from here on has its own time
        await self._write_back(file)

    async def write_all_back(self) -> None:
        """The end of the server, as far as it comes in time."""
        with trio.move_on_after(_END_S):
            async with trio.open_nursery() as nursery:
                for file in self._files.values():
                    nursery.start_soon(self._write_back, file)

    # ---- sizes

    async def setattr(
        self,
        inode: int,
        attr: pyfuse3.EntryAttributes,
        fields: pyfuse3.SetattrFields,
        fh: int | None,
        ctx: pyfuse3.RequestContext,
    ) -> pyfuse3.EntryAttributes:
        file = self._files.get(inode)
        if file is None or not fields.update_size:
            return await self._as_written(await super().setattr(inode, attr, fields, fh, ctx), ctx)
        async with file.turn:
            entry = await super().setattr(inode, attr, fields, fh, ctx)
            file.dirty.cut(attr.st_size, math.inf)
        return await self._as_written(entry, ctx)

    async def getattr(self, inode: int, ctx: pyfuse3.RequestContext) -> pyfuse3.EntryAttributes:
        return await self._as_written(await super().getattr(inode, ctx), ctx)

    async def lookup(self, parent_inode: int, name: bytes, ctx: pyfuse3.RequestContext) -> pyfuse3.EntryAttributes:
        return await self._as_written(await super().lookup(parent_inode, name, ctx), ctx)

    async def link(
        self, inode: int, new_parent_inode: int, new_name: bytes, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        return await self._as_written(await super().link(inode, new_parent_inode, new_name, ctx), ctx)

    async def _as_written(self, entry: pyfuse3.EntryAttributes, ctx: pyfuse3.RequestContext) -> pyfuse3.EntryAttributes:
        """The same with the size that the file has with its dirty data: asked again in its turn, for writeback moves both."""
        file = self._files.get(entry.st_ino)
        if file is not None:
            async with file.turn:
                entry.st_size = max((await super().getattr(entry.st_ino, ctx)).st_size, file.dirty.end)
        return entry


class FlakyFilesystem(CachingFilesystem):
    """The same once more, with a fault in front of each operation that a rule names."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._stale: set[int] = set()  # handles

    async def _obey(
        self, operation: str, path: str, offset: int = 0, length: int = 0, fh: int | None = None
    ) -> Rule | None:
        return await self._endure(*self._meet(operation, path, offset, length, fh), fh)

    def _meet(self, operation: str, path: str, offset: int, length: int, fh: int | None) -> tuple[Call, Rule | None]:
        call = Call(operation, path, [(offset, length)])
        return call, None if fh in self._stale else self.trigger.rule(call)

    async def _endure(self, call: Call, rule: Rule | None, fh: int | None) -> Rule | None:
        if fh not in self._stale:
            rule = await self.trigger.endured(call, rule)
            if rule is not None and rule.stale and fh is not None:
                self._stale.add(fh)
        if fh in self._stale:
            raise pyfuse3.FUSEError(errno.ESTALE)
        if rule is not None and rule.errno:
            raise pyfuse3.FUSEError(rule.errno)
        return rule

    def _path_of(self, inode: int) -> str:
        try:
            return self._name(self._node(inode))
        except OSError:
            return ""

    def _path_of_handle(self, fh: int) -> str:
        return self._requests.handles[fh].image.held.image

    # Dice are thrown where a call begins, in the order of the calls: tasks run in any.

    def begin_read(
        self, fh: int, off: int, size: int, _reply: object, _answer: object, go_on: Callable[[Any], Any]
    ) -> None:
        call, rule = self._meet("read", self._path_of_handle(fh), off, size, fh)

        async def read() -> bytes:
            met = await self._endure(call, rule, fh)
            return await self.read(fh, off, size if met is None or met.short is None else min(size, met.short))

        go_on(read)

    def begin_write(self, fh: int, off: int, buf: bytes, _answer: object, go_on: Callable[[Any], Any]) -> None:
        call, rule = self._meet("write", self._path_of_handle(fh), off, len(buf), fh)

        async def write() -> int:
            met = await self._endure(call, rule, fh)
            return await self.write(fh, off, buf if met is None or met.short is None else buf[: met.short])

        go_on(write)

    async def release(self, fh: int) -> None:
        await self._obey("release", self._path_of_handle(fh))
        self._stale.discard(fh)
        await super().release(fh)


def _with_fault(
    name: str,
    path_of: Callable[[FlakyFilesystem, tuple[Any, ...]], str],
    handle_of: Callable[[tuple[Any, ...]], int | None] = lambda _args: None,
) -> None:
    plain = getattr(CachingFilesystem, name)

    async def faulty(self: FlakyFilesystem, *args: Any) -> Any:
        await self._obey(name, path_of(self, args), fh=handle_of(args))
        return await plain(self, *args)

    setattr(FlakyFilesystem, name, faulty)


def _named(self: FlakyFilesystem, args: tuple[Any, ...]) -> str:
    parent, name = self._path_of(args[0]), args[1].decode(errors="backslashreplace")
    return name if parent in {"", "."} else f"{parent}/{name}"


for _name in _BY_INODE:
    _with_fault(_name, lambda self, args: self._path_of(args[0]))
_with_fault("setattr", lambda self, args: self._path_of(args[0]), lambda args: args[3])
for _name in _BY_NAME:
    _with_fault(_name, _named)
for _name in _BY_LISTING:
    _with_fault(_name, lambda self, args: self._name(self._listings[args[0]].node))
for _name in ("fsync", "flush"):
    _with_fault(_name, lambda self, args: self._path_of_handle(args[0]), lambda args: args[0])
_with_fault("statfs", lambda _self, _args: ".")


class _Refused(Exception):
    """Why there will be no mount, in one line."""


async def _serve(
    directory: str, mountpoint: str, trigger: str, options: set[str], writeback_every_s: float | None, seed: int
) -> None:
    os.umask(0)
    try:
        root = source.open_root(directory)
    except OSError as error:
        raise _Refused(f"DIRECTORY {directory}: {error.strerror}") from None
    nothing_held = Policy(dict.fromkeys(Op, 0.0), 5.0, frozenset(), errno.EIO, share=1024)
    requests = Requests(nothing_held, 0, [], engine=Engine("auto"))
    filesystem = FlakyFilesystem(
        root,
        requests,
        attr_timeout_s=0,
        entry_timeout_s=0,
        direct=False,
        trigger=Trigger(trigger, seed),
        writeback_every_s=writeback_every_s,
    )
    try:
        pyfuse3.init(filesystem, mountpoint, {f"fsname={directory}", "subtype=iohang-flaky", *options})
    except RuntimeError as error:
        raise _Refused(f"the kernel or libfuse refused the mount on {mountpoint}: {error}") from None
    limits.alarm_clock()
    try:
        async with trio.open_nursery() as nursery:
            filesystem.nursery = nursery
            nursery.start_soon(filesystem.serve)
            nursery.start_soon(requests.serve, nursery)
            nursery.start_soon(_unmount_at_signal, mountpoint, nursery.cancel_scope)
            nursery.start_soon(_announce, mountpoint, f"{directory} is served at {mountpoint}", trigger, seed)
            await receiver.main(filesystem)
            await filesystem.write_all_back()
            nursery.cancel_scope.cancel()
    finally:
        pyfuse3.close(unmount=False)


async def _announce(mountpoint: str, what: str, trigger: str, seed: int) -> None:
    await trio.to_thread.run_sync(os.stat, mountpoint)
    try:
        await trio.to_thread.run_sync(limits.set_max_background_of, mountpoint, _MAX_BACKGROUND)
    except OSError as error:
        log.warning("max_background stays at 12: %s. More requests than that which hang here stop all files", error)
    log.info("%s; outages as %s says; seed %d", what, trigger, seed)


async def _unmount_at_signal(mountpoint: str, server: trio.CancelScope) -> None:
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        async for _ in signals:
            try:
                await trio.to_thread.run_sync(syscalls.umount, mountpoint)
            except OSError:
                await trio.to_thread.run_sync(syscalls.umount, mountpoint, syscalls.MNT_DETACH)
                pyfuse3.terminate()
            await trio.sleep(_END_S)
            server.cancel()


def _seconds(word: str) -> float:
    if not re.fullmatch(r"[0-9]+\.?[0-9]*|\.[0-9]+", word) or not float(word) > 0:
        raise argparse.ArgumentTypeError(f"{word!r} is no number of seconds above 0; say 0.5 or 2")
    return float(word)


def _mount_words(words: str) -> list[str]:
    for word in words.split(","):
        if word not in mountwords.FLAGS:
            near = config.nearest(word, mountwords.FLAGS) or f"; there are {', '.join(sorted(mountwords.FLAGS))}"
            raise argparse.ArgumentTypeError(f"{word!r} is no mount word{near}")
    return words.split(",")


class _Parser(argparse.ArgumentParser):
    """argparse with one line in place of a usage text."""

    def error(self, message: str) -> NoReturn:
        self.exit(config.USAGE, f"iohang-flaky: {printable(message)}; see iohang-flaky --help\n")


def main() -> int:
    """The command `iohang-flaky`."""
    parser = _Parser(prog="iohang-flaky", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--version", action="version", version=f"iohang-flaky {__version__}")
    parser.add_argument("directory")
    parser.add_argument("mountpoint")
    parser.add_argument("trigger", help="the file with the rules; need not exist")
    parser.add_argument(
        "-o", dest="options", action="extend", type=_mount_words, default=[], help="mount words, such as allow_other"
    )
    parser.add_argument(
        "--page-cache", action="store_true", help="acknowledge writes from memory, and write them back later"
    )
    parser.add_argument(
        "--writeback-every", type=_seconds, default=2.0, metavar="SECONDS", help="how long they may stay there (2)"
    )
    parser.add_argument("--seed", type=int, help="for rules with chance=; the log says which it was")
    args = parser.parse_args()
    paths = [os.path.abspath(path) for path in (args.directory, args.mountpoint, args.trigger)]
    for what, path in zip(("DIRECTORY", "MOUNTPOINT"), paths, strict=False):
        if not os.path.isdir(path):
            why = "is not a directory" if os.path.lexists(path) else "does not exist"
            return _refused(f"{what} {path} {why}; name a directory")
    limits.raise_open_files()
    try:
        with logs.to_stderr_or(None, level=logging.INFO):
            trio.run(
                _serve,
                paths[0],
                paths[1],
                paths[2],
                set(args.options),
                args.writeback_every if args.page_cache else None,
                random.SystemRandom().getrandbits(32) if args.seed is None else args.seed,
            )
    except _Refused as error:
        return _refused(str(error))
    return 0


def _refused(text: str) -> int:
    print(f"iohang-flaky: {printable(text)}", file=sys.stderr)  # noqa: T201
    return config.MOUNT_FAILURE


if __name__ == "__main__":
    sys.exit(main())
