"""A kernel with a network file system, in memory: what backing.py calls, with Linux's manners, the bad ones included.

1. `Disk` is a file on the server: what is in it has survived a crash of the client's host. `Inode` is what the client knows
   of it: page cache, size, and the errseq_t of its failed writebacks. `Description` is an open(2).
2. Nothing here is random by itself: `fault` says what becomes of each exchange with the server, `drops` whether a page that
   failed leaves the cache, `most` how many bytes a call takes. `before_call` runs at the beginning of each call: what
   other threads and the kernel's own do in that moment.
3. A call is atomic, and a call of several exchanges is not: `before_call` is not called between those, but each has its fault.

The rules of errseq_t are those of lib/errseq.c; of fsync and O_DSYNC, those of file_check_and_advance_wb_err and
generic_write_sync (mm/filemap.c, include/linux/fs.h); of close, truncate and failed pages, those of fs/nfs.
"""

from __future__ import annotations

import errno
import os
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import TYPE_CHECKING, NamedTuple

from iohang_fuse.source import NotTheSame

if TYPE_CHECKING:
    from collections.abc import Callable

    from iohang_fuse.source import Caller, Where

PAGE = 64
"""Bytes of a page: small, so that few bytes of data are many pages."""


class Violation(AssertionError):
    """Something was done to this kernel that must never be done."""


class Fault(NamedTuple):
    """An exchange with the server fails with *errno*, after *effect*: none, part, whole, or late.

    Late: the server executes it when the network is back, before (or, if the kernel is `racing`, just behind) the next
    exchange about the file that succeeds.
    """

    errno: int
    effect: str = "none"


class ErrSeq:
    """errseq_t: the latest error, a count, and whether anybody has seen it."""

    def __init__(self) -> None:
        self._errno = 0
        self._count = 0
        self._seen = False

    @property
    def _value(self) -> tuple[int, int, bool]:
        return self._errno, self._count, self._seen

    def record(self, number: int) -> None:
        """errseq_set: one that nobody has seen is replaced, one that was seen is counted on."""
        self._errno = number
        if self._seen:
            self._count += 1
            self._seen = False

    def sample(self) -> tuple[int, int, bool]:
        """errseq_sample, at open(2): who comes later sees what nobody has seen yet."""
        return self._value if self._seen else (0, 0, False)

    def advance(self, since: tuple[int, int, bool]) -> tuple[int, tuple[int, int, bool]]:
        """errseq_check_and_advance: the error since *since*, or 0, and the new *since*."""
        if self._value == since:
            return 0, since
        self._seen = True
        return self._errno, self._value


@dataclass(eq=False)
class Disk:
    """A file on the server."""

    number: int
    data: bytearray
    late: list[tuple[int, bytes | None]] = field(default_factory=list)  # write of bytes at, or (None) truncate to

    def store(self, offset: int, data: bytes) -> None:
        if offset > len(self.data):
            self.data.extend(bytes(offset - len(self.data)))
        self.data[offset : offset + len(data)] = data

    def resize(self, size: int) -> None:
        del self.data[size:]
        self.data.extend(bytes(size - len(self.data)))


@dataclass(eq=False)
class Inode:
    """A file in the client's memory. Bytes of a cached page beyond `size` are zero."""

    disk: Disk
    size: int
    device: int = 1
    pages: dict[int, bytearray] = field(default_factory=dict)
    dirty: dict[int, None] = field(default_factory=dict)  # page numbers, longest dirty first
    errors: ErrSeq = field(default_factory=ErrSeq)

    def page(self, number: int) -> bytearray:
        """The page, in the cache; what the server has is read if it is not there."""
        page = self.pages.get(number)
        if page is None:
            end = min((number + 1) * PAGE, self.size)
            page = self.disk.data[number * PAGE : max(end, number * PAGE)]
            page.extend(bytes(PAGE - len(page)))
            self.pages[number] = page
        return page

    def revalidate(self) -> None:
        """The size is the server's, or as far as there are dirty pages."""
        dirty_end = max((min((number + 1) * PAGE, self.size) for number in self.dirty), default=0)
        size = max(len(self.disk.data), dirty_end)
        if size < self.size:
            self.shrink(size)
        self.size = size

    def shrink(self, size: int) -> None:
        """Nothing is cached beyond *size* any more."""
        self.size = size
        for number in [number for number in self.pages if (number + 1) * PAGE > size]:
            keep = size - number * PAGE
            if keep <= 0:
                del self.pages[number]
                self.dirty.pop(number, None)
            else:
                self.pages[number][keep:] = bytes(PAGE - keep)


@dataclass(eq=False)
class Description:
    """An open file description."""

    inode: Inode
    flags: int
    since: tuple[int, int, bool]
    stale: bool = False
    inside: int = 0  # calls


class Kernel:
    """The kernel and its server. `os` is what takes the place of the module in backing.py."""

    def __init__(self) -> None:
        self.fault: Callable[[str], Fault | None] = lambda _exchange: None
        self.drops: Callable[[], bool] = lambda: False
        self.most: Callable[[int], int] = lambda count: count
        self.before_call: Callable[[str], None] = lambda _call: None
        self.wrote: Callable[[Disk, int, bytes], None] = lambda _disk, _offset, _data: (
            None
        )  # by a call, to cache or disk
        self.resized: Callable[[Disk, int], None] = lambda _disk, _size: None
        self.note: Callable[[str], None] = lambda _text: None
        self.racing = False  # a late write may come just behind the direct write that is next
        self.flushes_at_close = False  # as NFS does
        self.names: dict[bytes, Disk] = {}
        self.inodes: dict[Disk, Inode] = {}
        self.violations: list[str] = []
        self._numbers = 100
        self._fds: dict[int, Description] = {}
        self._next_fd = 1000
        constants = {name: value for name, value in vars(os).items() if name.startswith(("O_", "RWF_"))}
        calls = "pread preadv pwrite ftruncate fdatasync fsync fstat fstatvfs close".split()
        self.os = SimpleNamespace(**constants, **{name: getattr(self, name) for name in calls}, strerror=os.strerror)

    # ---- for tests

    def create(self, name: bytes, data: bytes = b"") -> Disk:
        """A new file; one that had the name has lost it."""
        self._numbers += 1
        disk = self.names[name] = Disk(self._numbers, bytearray(data))
        return disk

    def inode(self, disk: Disk) -> Inode:
        """What the client knows of *disk*."""
        if disk not in self.inodes:
            self.inodes[disk] = Inode(disk, len(disk.data))
        return self.inodes[disk]

    def write_back(self, disk: Disk, count: int = 1) -> None:
        """The flusher thread: the *count* pages that have been dirty for longest."""
        inode = self.inode(disk)
        for number in [*inode.dirty][:count]:
            self._write_back(inode, number)

    def evict(self, disk: Disk) -> None:
        """Want of memory: all clean pages leave the cache."""
        inode = self.inode(disk)
        inode.pages = {number: page for number, page in inode.pages.items() if number in inode.dirty}

    def make_stale(self, disk: Disk) -> None:
        """The server has forgotten its file handles: what is open is dead for good, and may be opened anew."""
        for description in self._fds.values():
            if description.inode.disk is disk:
                description.stale = True

    def remount(self, disk: Disk) -> None:
        """The file system was unmounted and is mounted anew: what is open is dead, and the cache with it."""
        self.make_stale(disk)
        self.inodes.pop(disk, None)

    def crash(self) -> None:
        """The client's host: all that is in memory is lost."""
        self.inodes.clear()
        self._fds.clear()

    def settle(self, disk: Disk) -> None:
        """What was late has its effect."""
        late, disk.late = disk.late, []
        for place, data in late:
            if data is None:
                disk.resize(place)
            else:
                disk.store(place, data)
        inode = self.inodes.get(disk)
        if late and inode is not None:  # the server's answers tell of a new size
            inode.revalidate()

    @property
    def open_files(self) -> int:
        return len(self._fds)

    # ---- system calls

    def open(self, name: bytes, flags: int) -> int:
        """A new description of what is in `names`."""
        self.before_call("open")
        if name not in self.names:
            raise _error(errno.ENOENT)
        return self._open(self.names[name], flags)

    def open_again(self, fd: int, flags: int, _opener: Caller, where: Where, *, owner: int = 0) -> int:  # noqa: ARG002 - NFS 4.1's alone
        """`source.open_again`: by its name, if that is still the file, or else through what is open."""
        self.before_call(f"open_again {fd}")
        old = self._fds.get(fd)
        if old is None:
            raise self._violated(f"open_again of a closed descriptor {fd}")
        try:
            disk = None if where.path is None else self.names.get(where.path)
            if disk is None:
                raise _error(errno.ENOENT)
            self._exchange(disk, "lookup")
            if disk.number != where.number:
                raise NotTheSame(errno.ESTALE, "its name is now that of another file")
            size = self.inode(disk).size
            if size < where.size:
                raise NotTheSame(errno.ESTALE, f"it is shorter: {size} bytes, and {where.size} were safe")
        except OSError as error:
            if old.stale:
                raise
            try:
                return self._open(old.inode.disk, flags, old.inode)
            except OSError:
                raise error from None
        return self._open(disk, flags)

    def open_same(self, fd: int, flags: int, _opener: Caller, *, owner: int = 0) -> int:  # noqa: ARG002 - the same
        """`source.open_same`: one more description of what is open, through /proc/self/fd."""
        with self._call(fd, "open_same") as it:
            self._exchange(it.inode.disk, "open same")
            return self._open(it.inode.disk, flags, it.inode)

    def close(self, fd: int) -> None:
        """Where it flushes (NFS) it may report an error, and the descriptor is gone all the same."""
        self.before_call(f"close {fd}")
        description = self._fds.pop(fd, None)
        if description is None:
            raise self._violated(f"close of a closed descriptor {fd}")
        if description.inside:
            raise self._violated(f"close of {fd} while a call is inside it")
        if self.flushes_at_close and not description.stale:
            self._flush(description.inode)
            self._report(description)

    def pread(self, fd: int, size: int, offset: int) -> bytes:
        """Short at the end of the file, or after `most` bytes, or before a page that cannot be had."""
        with self._call(fd, "pread") as it:
            inode = it.inode
            count = self.most(size)
            if it.flags & os.O_DIRECT:
                self._flush_range(inode, offset, offset + count)
                self._exchange(inode.disk, "read")
                return bytes(inode.disk.data[offset : offset + count])
            end = min(offset + count, inode.size)
            data = bytearray()
            while offset < end:
                number, low = divmod(offset, PAGE)
                try:
                    page = self._cached(inode, number)
                except OSError:
                    if data:
                        break
                    raise
                high = min(PAGE, end - number * PAGE)
                data += page[low:high]
                offset += high - low
            return bytes(data)

    def is_cached(self, fd: int, offset: int, size: int) -> bool:
        """cachestat(2): whether all these pages are in the cache."""
        pages = self._fds[fd].inode.pages
        return all(number in pages for number in range(offset // PAGE, (offset + size - 1) // PAGE + 1))

    def preadv(self, fd: int, buffers: tuple[bytearray], offset: int, flags: int) -> int:
        """What is in the cache, and no more; a page may have gone since `is_cached` was asked."""
        assert flags == os.RWF_NOWAIT, "whoever may wait uses pread"
        with self._call(fd, "preadv") as it:
            (buffer,) = buffers
            end = min(offset + len(buffer), it.inode.size)
            if not self.is_cached(fd, offset, max(end - offset, 1)):
                raise _error(errno.EAGAIN)
            data = b"".join(it.inode.pages[n] for n in range(offset // PAGE, (max(end, 1) - 1) // PAGE + 1))
            data = data[offset % PAGE :][: max(end - offset, 0)]
            buffer[: len(data)] = data
            return len(data)

    def pwrite(self, fd: int, data: bytes | memoryview, offset: int) -> int:
        """To the cache, or with O_DIRECT to the server; with O_DSYNC it is written back at once."""
        with self._call(fd, "pwrite") as it:
            inode, data = it.inode, bytes(data)
            if it.flags & os.O_ACCMODE == os.O_RDONLY:
                raise self._violated("a write through what is open for reading")
            if not data:
                return 0
            data = data[: self.most(len(data))]
            if it.flags & os.O_DIRECT:
                return self._write_direct(inode, data, offset)
            fault = self.fault("write")
            taken = data if fault is None else _effect(fault, data)
            count = self._write_cached(inode, taken, offset)
            if fault is not None:
                raise _error(fault.errno)
            if it.flags & os.O_DSYNC:
                self._flush_range(inode, offset, offset + count, report=False)
                self._report(it)
            return count

    def ftruncate(self, fd: int, size: int) -> None:
        """As NFS does it: dirty pages go first, and then the server is asked to."""
        with self._call(fd, "ftruncate") as it:
            inode = it.inode
            self._flush(inode)
            self._change(inode.disk, "truncate", size, None)
            inode.shrink(size)

    def fsync(self, fd: int) -> None:
        """All dirty pages, and then the error that this description has not been told of yet."""
        with self._call(fd, "fsync") as it:
            fault = self.fault("fsync")
            if fault is None or fault.effect != "none":
                self._flush(it.inode)
                self._report(it)
            if fault is not None:
                raise _error(fault.errno)

    fdatasync = fsync

    def fstat(self, fd: int) -> SimpleNamespace:
        """Only the size, and on which mount it is."""
        with self._call(fd, "fstat") as it:
            return SimpleNamespace(st_size=it.inode.size, st_dev=it.inode.device)

    def fstatvfs(self, fd: int) -> None:
        """Nothing but an exchange."""
        with self._call(fd, "fstatvfs") as it:
            self._exchange(it.inode.disk, "statfs")

    # ---- inside

    def _open(self, disk: Disk, flags: int, inode: Inode | None = None) -> int:
        self._exchange(disk, "open")
        inode = inode or self.inode(disk)
        if flags & (os.O_CREAT | os.O_EXCL | os.O_TRUNC | os.O_APPEND):
            raise self._violated(f"opened with flags {flags:o}")
        self._next_fd += 1
        self.note(f"opened {self._next_fd}")
        self._fds[self._next_fd] = Description(inode, flags, inode.errors.sample())
        return self._next_fd

    def _call(self, fd: int, name: str) -> _Inside:
        description = self._fds.get(fd)
        if description is None:
            raise self._violated(f"{name} on a closed descriptor {fd}")
        description.inside += 1
        try:
            self.before_call(f"{name} {fd}")
            if description.stale:
                raise _error(errno.ESTALE)
        except BaseException:
            description.inside -= 1
            raise
        return _Inside(description)

    def _violated(self, text: str) -> Violation:
        self.violations.append(text)
        return Violation(text)

    def _exchange(self, disk: Disk, name: str) -> None:
        """Something that changes nothing."""
        fault = self.fault(name)
        if fault is not None:
            raise _error(fault.errno)
        self.settle(disk)

    def _change(self, disk: Disk, name: str, place: int, data: bytes | None) -> None:
        """A write of *data* at *place*, or a change of the size to *place*."""
        fault = self.fault(name)
        if fault is not None and fault.effect in {"none", "late"}:
            if fault.effect == "late":
                disk.late.append((place, data))
            raise _error(fault.errno)
        behind = self.racing and name != "writeback"
        if not behind:
            self.settle(disk)
        if data is None:
            disk.resize(place)
            self.resized(disk, place)
            if fault is not None and disk in self.inodes:  # the answer was lost; the next one tells of the size
                self.inodes[disk].revalidate()
        else:
            part = data if fault is None else _effect(fault, data)
            disk.store(place, part)
            if name == "direct":
                self.wrote(disk, place, part)
        if behind:
            self.settle(disk)
        if fault is not None:
            raise _error(fault.errno)

    def _cached(self, inode: Inode, number: int) -> bytearray:
        if number not in inode.pages and number * PAGE < len(inode.disk.data):
            self._exchange(inode.disk, "read")
        return inode.page(number)

    def _write_cached(self, inode: Inode, data: bytes, offset: int) -> int:
        done = 0
        while done < len(data):
            number, low = divmod(offset + done, PAGE)
            high = min(PAGE, low + len(data) - done)
            if low == 0 and high == PAGE:
                page = inode.pages.setdefault(number, bytearray(PAGE))
            else:
                try:
                    page = self._cached(inode, number)
                except OSError:
                    if done:
                        break
                    raise
            page[low:high] = data[done : done + high - low]
            inode.dirty.setdefault(number)
            done += high - low
            inode.size = max(inode.size, offset + done)
        if done:
            self.wrote(inode.disk, offset, data[:done])
        return done

    def _write_direct(self, inode: Inode, data: bytes, offset: int) -> int:
        self._flush_range(inode, offset, offset + len(data))
        try:
            self._change(inode.disk, "direct", offset, data)
        finally:
            for number in range(offset // PAGE, (offset + len(data) - 1) // PAGE + 1):
                inode.pages.pop(number, None)
            inode.size = max(inode.size, len(inode.disk.data))
        return len(data)

    def _flush(self, inode: Inode) -> None:
        for number in [*inode.dirty]:
            self._write_back(inode, number)

    def _flush_range(self, inode: Inode, start: int, end: int, *, report: bool = True) -> None:
        """filemap_write_and_wait_range: its own errors are those of these pages; whoever syncs is told of them, too."""
        number = 0
        for page in range(start // PAGE, (end - 1) // PAGE + 1):
            if page in inode.dirty:
                number = self._write_back(inode, page) or number
        if number and report:
            raise _error(number)

    def _write_back(self, inode: Inode, number: int) -> int:
        """The page is clean afterwards, whatever happens. Returns the errno."""
        if number not in inode.dirty:
            return 0
        del inode.dirty[number]
        end = min((number + 1) * PAGE, inode.size)
        try:
            self._change(inode.disk, "writeback", number * PAGE, bytes(inode.pages[number][: end - number * PAGE]))
        except OSError as error:
            inode.errors.record(error.errno or errno.EIO)
            if self.drops():
                inode.pages.pop(number, None)
                inode.revalidate()
            return error.errno or errno.EIO
        return 0

    def _report(self, description: Description) -> None:
        number, description.since = description.inode.errors.advance(description.since)
        if number:
            self.note(f"reports {errno.errorcode[number]}")
            raise _error(number)


class _Inside:
    """A call is inside a description."""

    def __init__(self, description: Description) -> None:
        self._description = description

    def __enter__(self) -> Description:
        return self._description

    def __exit__(self, *_: object) -> None:
        self._description.inside -= 1


def _effect(fault: Fault, data: bytes) -> bytes:
    if fault.effect == "whole":
        return data
    return data[: len(data) // 8 * 4] if fault.effect == "part" else b""


def _error(number: int) -> OSError:
    return OSError(number, os.strerror(number))
