"""pyfuse3.Operations: FUSE requests in, calls of source.py and requests.py out. It translates, nothing more.

1. The one place where OSError becomes FUSEError. Anything else that a handler raises is a bug: it is logged, counted, and
   answered EIO, because pyfuse3 would end the mount, and every guest with it (P11).
2. Nothing here blocks: a metadata call runs in a worker thread, a data call is a request.
3. A node is counted as looked up in the same step of the event loop in which it is answered, so FORGET cannot get between.
"""

from __future__ import annotations

import errno
import functools
import logging
import os
import time
from collections import deque
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

import pyfuse3
import trio
from pyfuse3 import EntryAttributes, FileInfo, FUSEError, StatvfsData

from iohang_fuse import source
from iohang_fuse.engine import Backing
from iohang_fuse.events import Op
from iohang_fuse.inodes import ROOT, Inodes, Node
from iohang_fuse.source import Attributes, Caller, Found, Stability

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Sequence

    from iohang_fuse.requests import Handle, Requests

P = ParamSpec("P")
T = TypeVar("T")
log = logging.getLogger(__name__)

METADATA_THREADS = 128
"""System calls on metadata at once, apart from data: a directory that hangs must leave room for `ls` of the others."""

_LISTED_AT_ONCE = 32  # entries looked up ahead of a listing: about what the kernel's buffer of 4 KiB takes
_CAPABILITY = b"security.capability"


def _translated(handler: Callable[P, Coroutine[Any, Any, T]]) -> Callable[P, Coroutine[Any, Any, T]]:
    @functools.wraps(handler)
    async def translated(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return await handler(*args, **kwargs)
        except OSError as error:
            raise FUSEError(error.errno or errno.EIO) from None
        except FUSEError:
            raise
        except Exception:
            Filesystem.bugs += 1
            log.exception("a bug in %s: answered EIO; the mount stays", handler.__name__)
            raise FUSEError(errno.EIO) from None

    return translated


class _Listing:
    """An open directory."""

    def __init__(self, node: Node, fd: int, caller: Caller) -> None:
        self.node = node
        self.fd = fd
        self.caller = caller
        self.names: list[bytes] | None = None
        self.ahead: deque[tuple[int, Found | None]] = deque()  # (position, what was found there)
        self.turn = trio.Lock()


class Filesystem(pyfuse3.Operations):
    """The mirror of one SOURCE."""

    supports_dot_lookup = False  # the kernel then never asks for a node by number, which would need open_by_handle_at
    enable_writeback_cache = False  # the kernel would acknowledge writes that nobody could hold
    enable_acl = False  # SOURCE checks its ACLs itself, as the calling user

    bugs = 0

    def __init__(
        self,
        root: Found,
        requests: Requests,
        *,
        attr_timeout_s: float,
        entry_timeout_s: float,
        stability: Stability,
    ) -> None:
        super().__init__()
        self._inodes = Inodes(root.key, root.fd)
        self._requests = requests
        self._attr_timeout_s = attr_timeout_s
        self._entry_timeout_s = entry_timeout_s
        self._stability = stability
        self._listings: dict[int, _Listing] = {}
        self._next_listing = 1
        self._limiter = trio.CapacityLimiter(METADATA_THREADS)
        self._unwanted: list[int] = []
        self._unwanted_there = trio.Event()

    async def close_unwanted(self) -> None:
        """Close O_PATH descriptors of forgotten nodes: in a thread, because the last one of a file may cost I/O."""
        while True:
            await self._unwanted_there.wait()
            self._unwanted_there = trio.Event()
            batch, self._unwanted = self._unwanted, []
            await self._do(source.close_all, batch)

    # ---- shared by the handlers

    async def _do(self, call: Callable[..., T], *args: Any) -> T:
        return await trio.to_thread.run_sync(call, *args, limiter=self._limiter, abandon_on_cancel=True)

    def _node(self, inode: int) -> Node:
        try:
            return self._inodes[inode]
        except KeyError:
            raise OSError(errno.ESTALE, "a node that the kernel has forgotten") from None

    def _discard(self, fd: int) -> None:
        self._unwanted.append(fd)
        self._unwanted_there.set()

    def _looked_up(self, found: Found, parent: int, name: bytes) -> EntryAttributes:
        node, new = self._inodes.looked_up(found.key, found.fd, parent, name)
        if not new:
            self._discard(found.fd)
        return self._entry(node, found.stat)

    def _entry(self, node: Node, attributes: os.stat_result, size: int | None = None) -> EntryAttributes:
        entry = EntryAttributes()
        entry.st_ino = node.id
        entry.generation = node.generation
        entry.entry_timeout = self._entry_timeout_s
        entry.attr_timeout = self._attr_timeout_s
        entry.st_mode = attributes.st_mode
        entry.st_nlink = attributes.st_nlink
        entry.st_uid = attributes.st_uid
        entry.st_gid = attributes.st_gid
        entry.st_rdev = attributes.st_rdev
        entry.st_size = attributes.st_size if size is None else size
        entry.st_blksize = attributes.st_blksize
        entry.st_blocks = attributes.st_blocks
        entry.st_atime_ns = attributes.st_atime_ns
        entry.st_mtime_ns = attributes.st_mtime_ns
        entry.st_ctime_ns = attributes.st_ctime_ns
        return entry

    def _name(self, node: Node) -> str:
        return os.fsdecode(self._inodes.path(node))

    # ---- names

    @_translated
    async def lookup(self, parent_inode: int, name: bytes, ctx: pyfuse3.RequestContext) -> EntryAttributes:
        try:
            found = await self._do(source.lookup, self._node(parent_inode).fd, name, _caller(ctx))
        except OSError as error:
            entry = self._remembered(parent_inode, name, error)
            if entry is None:
                raise
            return entry
        entry = self._looked_up(found, parent_inode, name)
        image = self._requests.images.get(entry.st_ino)
        if image is not None:
            image.saw(found.stat)
        return entry

    def _remembered(self, parent: int, name: bytes, error: OSError) -> EntryAttributes | None:
        """An open image is still found by its name while SOURCE fails: a manager's stat(2) is no reason to alarm it."""
        node = self._inodes.named(parent, name)
        image = None if node is None else self._requests.images.get(node.id)
        if node is None or image is None or error.errno not in image.held.policy.errors:
            return None
        remembered = image.remembered()
        if remembered is None:
            return None
        node.lookups += 1
        return self._entry(node, *remembered)

    async def forget(self, inode_list: Sequence[tuple[int, int]]) -> None:
        for inode, lookups in inode_list:
            node = self._inodes.forget(inode, lookups)
            if node is not None:
                self._discard(node.fd)

    @_translated
    async def mknod(
        self, parent_inode: int, name: bytes, mode: int, rdev: int, ctx: pyfuse3.RequestContext
    ) -> EntryAttributes:
        parent = self._node(parent_inode)
        found = await self._do(source.make_node, parent.fd, name, mode, rdev, _caller(ctx))
        return self._looked_up(found, parent_inode, name)

    @_translated
    async def mkdir(self, parent_inode: int, name: bytes, mode: int, ctx: pyfuse3.RequestContext) -> EntryAttributes:
        found = await self._do(source.make_directory, self._node(parent_inode).fd, name, mode, _caller(ctx))
        return self._looked_up(found, parent_inode, name)

    @_translated
    async def symlink(
        self, parent_inode: int, name: bytes, target: bytes, ctx: pyfuse3.RequestContext
    ) -> EntryAttributes:
        found = await self._do(source.make_symlink, self._node(parent_inode).fd, name, target, _caller(ctx))
        return self._looked_up(found, parent_inode, name)

    @_translated
    async def link(
        self, inode: int, new_parent_inode: int, new_name: bytes, ctx: pyfuse3.RequestContext
    ) -> EntryAttributes:
        node, parent = self._node(inode), self._node(new_parent_inode)
        found = await self._do(source.make_link, node.fd, parent.fd, new_name, _caller(ctx))
        return self._looked_up(found, new_parent_inode, new_name)

    @_translated
    async def unlink(self, parent_inode: int, name: bytes, ctx: pyfuse3.RequestContext) -> None:
        await self._do(source.unlink, self._node(parent_inode).fd, name, _caller(ctx))
        self._inodes.unlinked(parent_inode, name)

    @_translated
    async def rmdir(self, parent_inode: int, name: bytes, ctx: pyfuse3.RequestContext) -> None:
        await self._do(source.remove_directory, self._node(parent_inode).fd, name, _caller(ctx))
        self._inodes.unlinked(parent_inode, name)

    @_translated
    async def rename(
        self,
        parent_inode_old: int,
        name_old: bytes,
        parent_inode_new: int,
        name_new: bytes,
        flags: int,
        ctx: pyfuse3.RequestContext,
    ) -> None:
        old, new = self._node(parent_inode_old), self._node(parent_inode_new)
        await self._do(source.rename, old.fd, name_old, new.fd, name_new, flags, _caller(ctx))
        exchange = bool(flags & source.RENAME_EXCHANGE)
        self._inodes.renamed(parent_inode_old, name_old, parent_inode_new, name_new, exchange=exchange)
        for image in self._requests.images.values():
            image.held.image = self._name(self._node(image.node_id))

    @_translated
    async def readlink(self, inode: int, ctx: pyfuse3.RequestContext) -> bytes:
        return await self._do(source.readlink, self._node(inode).fd, _caller(ctx))

    # ---- attributes

    @_translated
    async def getattr(self, inode: int, _ctx: pyfuse3.RequestContext) -> EntryAttributes:
        node = self._node(inode)
        image = self._requests.images.get(inode)
        if image is None:
            return self._entry(node, await self._do(os.fstat, node.fd))
        if not image.held.sick or image.remembered() is None:
            try:
                attributes = await self._do(os.fstat, node.fd)
            except OSError as error:
                # The outage may begin with this very call: an open image's size must not become an I/O error.
                if error.errno not in image.held.policy.errors or image.remembered() is None:
                    raise
            else:
                image.saw(attributes)
                return self._entry(node, attributes)
        remembered = image.remembered()
        assert remembered is not None
        return self._entry(node, *remembered)

    @_translated
    async def setattr(
        self,
        inode: int,
        attr: EntryAttributes,
        fields: pyfuse3.SetattrFields,
        fh: int | None,
        ctx: pyfuse3.RequestContext,
    ) -> EntryAttributes:
        received_ns = time.time_ns()
        node = self._node(inode)
        size = attr.st_size if fields.update_size else None
        handle = None if fh is None else self._requests.handles.get(fh)
        image = self._requests.images.get(inode)
        if size is not None and handle is not None:
            await self._truncate(handle, size)
            size = None
        changes = Attributes(
            size=size,
            mode=attr.st_mode if fields.update_mode else None,
            uid=attr.st_uid if fields.update_uid else None,
            gid=attr.st_gid if fields.update_gid else None,
            atime_ns=attr.st_atime_ns if fields.update_atime else None,
            mtime_ns=attr.st_mtime_ns if fields.update_mtime else None,
            times_may_mean_now=fields.update_atime
            and fields.update_mtime
            and 0 <= received_ns - attr.st_mtime_ns < 100_000_000
            and 0 <= received_ns - attr.st_atime_ns < 100_000_000,
        )
        attributes = await self._do(source.change, node.fd, changes, _caller(ctx))
        if image is not None:
            if size is not None:
                image.truncated(size)
            image.saw(attributes)
        return self._entry(node, attributes)

    async def _truncate(self, handle: Handle, size: int) -> None:
        backing = handle.backing
        await self._requests.run(handle, Op.WRITE, size, 0, lambda: backing.truncate(size))
        handle.image.truncated(size)

    @_translated
    async def access(self, inode: int, mode: int, ctx: pyfuse3.RequestContext) -> bool:
        return await self._do(source.permitted, self._node(inode).fd, mode, _caller(ctx))

    @_translated
    async def statfs(self, _ctx: pyfuse3.RequestContext) -> StatvfsData:
        values = await self._do(os.fstatvfs, self._node(ROOT).fd)
        data = StatvfsData()
        for field in (
            "f_bsize", "f_frsize", "f_blocks", "f_bfree", "f_bavail", "f_files", "f_ffree", "f_favail", "f_namemax",
        ):  # fmt: skip
            setattr(data, field, getattr(values, field))
        return data

    @_translated
    async def getxattr(self, inode: int, name: bytes, ctx: pyfuse3.RequestContext) -> bytes:
        node = self._node(inode)
        image = self._requests.images.get(inode)
        if image is None or name != _CAPABILITY:
            return await self._do(source.get_xattr, node.fd, name, _caller(ctx))
        # The kernel asks for this before every buffered write. It is asked of SOURCE once, and never while that hangs.
        if image.capability is None:
            if image.held.sick:
                raise OSError(errno.ENODATA, os.strerror(errno.ENODATA))
            try:
                image.capability = await self._do(source.get_xattr, node.fd, name, _caller(ctx))
            except OSError as error:
                if error.errno in {errno.ENODATA, errno.EOPNOTSUPP}:
                    image.capability = error.errno
                raise
        if isinstance(image.capability, int):
            raise OSError(image.capability, os.strerror(image.capability))
        return image.capability

    @_translated
    async def setxattr(self, inode: int, name: bytes, value: bytes, ctx: pyfuse3.RequestContext) -> None:
        await self._do(source.set_xattr, self._node(inode).fd, name, value, _caller(ctx))
        self._forget_capability(inode)

    @_translated
    async def listxattr(self, inode: int, ctx: pyfuse3.RequestContext) -> list[bytes]:
        return await self._do(source.list_xattrs, self._node(inode).fd, _caller(ctx))

    @_translated
    async def removexattr(self, inode: int, name: bytes, ctx: pyfuse3.RequestContext) -> None:
        await self._do(source.remove_xattr, self._node(inode).fd, name, _caller(ctx))
        self._forget_capability(inode)

    def _forget_capability(self, inode: int) -> None:
        image = self._requests.images.get(inode)
        if image is not None:
            image.capability = None

    # ---- directories

    @_translated
    async def opendir(self, inode: int, ctx: pyfuse3.RequestContext) -> int:
        node = self._node(inode)
        fd = await self._do(source.open_directory, node.fd, _caller(ctx))
        number = self._next_listing
        self._next_listing += 1
        self._listings[number] = _Listing(node, fd, _caller(ctx))
        return number

    @_translated
    async def readdir(self, fh: int, start_id: int, token: pyfuse3.ReaddirToken) -> None:
        listing = self._listings[fh]
        async with listing.turn:
            await self._list(listing, start_id, token)

    async def _list(self, listing: _Listing, position: int, token: pyfuse3.ReaddirToken) -> None:
        """One reading of all names when the listing begins: entries that come or go meanwhile neither shift nor repeat others."""
        if position == 0 or listing.names is None:
            listing.names = await self._do(source.list_names, listing.fd)
            self._drop_ahead(listing)
        while position < len(listing.names):
            if not listing.ahead or listing.ahead[0][0] != position:
                self._drop_ahead(listing)
                await self._look_ahead(listing, position)
            found = listing.ahead[0][1]
            if found is not None and not self._reply(listing, position, found, token):
                return
            listing.ahead.popleft()
            position += 1

    async def _look_ahead(self, listing: _Listing, position: int) -> None:
        assert listing.names is not None
        names = listing.names[position : position + _LISTED_AT_ONCE]
        dots = sum(name in {b".", b".."} for name in names)
        found: list[Found | None] = []
        if dots:
            here = await self._do(os.fstat, listing.node.fd)
            found += [Found(-1, listing.node.key, here)] * dots
        found += await self._do(source.lookup_listed, listing.node.fd, names[dots:], listing.caller)
        listing.ahead.extend(enumerate(found, position))

    def _reply(self, listing: _Listing, position: int, found: Found, token: pyfuse3.ReaddirToken) -> bool:
        assert listing.names is not None
        name = listing.names[position]
        if found.fd < 0:  # `.` and `..`: the kernel counts no lookup for them
            return pyfuse3.readdir_reply(token, name, self._entry(listing.node, found.stat), position + 1)
        node, new = self._inodes.looked_up(found.key, found.fd, listing.node.id, name)
        if pyfuse3.readdir_reply(token, name, self._entry(node, found.stat), position + 1):
            if not new:
                self._discard(found.fd)
            return True
        self._inodes.forget(node.id, 1)  # not told to the kernel; *found* keeps its descriptor for the next call
        return False

    def _drop_ahead(self, listing: _Listing) -> None:
        for _, found in listing.ahead:
            if found is not None and found.fd >= 0:
                self._discard(found.fd)
        listing.ahead.clear()

    @_translated
    async def releasedir(self, fh: int) -> None:
        listing = self._listings.pop(fh)
        self._drop_ahead(listing)
        await self._do(os.close, listing.fd)

    @_translated
    async def fsyncdir(self, fh: int, datasync: bool) -> None:  # noqa: FBT001 - pyfuse3's signature
        await self._do(os.fdatasync if datasync else os.fsync, self._listings[fh].fd)

    # ---- data

    @_translated
    async def open(self, inode: int, flags: int, ctx: pyfuse3.RequestContext) -> FileInfo:
        node, caller = self._node(inode), _caller(ctx)
        opened = await self._do(source.open_data, node.fd, flags, caller, self._stability)
        handle = self._requests.opened(inode, self._name(node), Backing(*opened, caller), flags)
        if flags & os.O_TRUNC:
            handle.image.truncated(0)
        return FileInfo(fh=handle.number, keep_cache=False)

    @_translated
    async def create(
        self, parent_inode: int, name: bytes, mode: int, flags: int, ctx: pyfuse3.RequestContext
    ) -> tuple[FileInfo, EntryAttributes]:
        parent, caller = self._node(parent_inode), _caller(ctx)
        opened, found = await self._do(source.create_data, parent.fd, name, mode, flags, caller, self._stability)
        entry = self._looked_up(found, parent_inode, name)
        node = self._node(entry.st_ino)
        handle = self._requests.opened(node.id, self._name(node), Backing(*opened, caller), flags)
        return FileInfo(fh=handle.number, keep_cache=False), entry

    @_translated
    async def read(self, fh: int, off: int, size: int) -> bytes:
        handle = self._requests.handles[fh]
        if handle.direct and size < 512:
            # QEMU probes the alignment with short reads, and would assume 4096 where they succeed without O_DIRECT's rules.
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        backing = handle.backing
        return await self._requests.run(handle, Op.READ, off, size, lambda: backing.read(off, size))

    @_translated
    async def write(self, fh: int, off: int, buf: bytes) -> int:
        handle = self._requests.handles[fh]
        backing = handle.backing
        written = await self._requests.run(handle, Op.WRITE, off, len(buf), lambda: backing.write(off, buf))
        handle.image.wrote(off + written)
        return written

    @_translated
    async def fsync(self, fh: int, datasync: bool) -> None:  # noqa: FBT001 - pyfuse3's signature
        handle = self._requests.handles[fh]
        backing = handle.backing
        await self._requests.run(handle, Op.FSYNC, 0, 0, lambda: backing.sync(data_only=datasync))

    @_translated
    async def flush(self, fh: int) -> None:
        """close(2): nothing to do, because every write that was answered is final."""

    @_translated
    async def release(self, fh: int) -> None:
        backing = await self._requests.released(fh)
        await self._do(backing.close)

    # ---- for the operator

    def nodes(self) -> int:
        """How many inodes the kernel knows of."""
        return len(self._inodes)


def _caller(ctx: pyfuse3.RequestContext) -> Caller:
    return Caller(ctx.uid, ctx.gid, ctx.pid)
