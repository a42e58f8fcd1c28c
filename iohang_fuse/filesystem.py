"""pyfuse3.Operations: FUSE requests in, calls of source.py and requests.py out. It translates, nothing more.

1. The one place where OSError becomes FUSEError. Anything else that a handler raises is a bug: it is logged, counted, and
   answered EIO, because pyfuse3 would end the mount, and every guest with it (P11).
2. Nothing here blocks: a metadata call runs in a worker thread, a data call is a request.
3. A node is counted as looked up in the same step of the event loop in which it is answered, so FORGET cannot get between.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import logging
import math
import os
import platform
import re
import resource
import stat
import time
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

import pyfuse3
import trio
from pyfuse3 import EntryAttributes, FileInfo, FUSEError, StatvfsData

from iohang_fuse import receiver, source, syscalls
from iohang_fuse.backing import Backing
from iohang_fuse.inodes import ROOT, Inodes, Node
from iohang_fuse.questions import Questions
from iohang_fuse.source import Attributes, Caller, Found, Where

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Sequence

    from iohang_fuse.images import Handle, Image
    from iohang_fuse.requests import More, Requests
    from iohang_fuse.ring import Reply

P = ParamSpec("P")
T = TypeVar("T")
log = logging.getLogger(__name__)

METADATA_THREADS = 512
METADATA_SHARE = 32
"""System calls on metadata at once, apart from data, and of these on one inode: an image or directory that hangs must leave
room for the others (P7). More than 16 of them that hang at once stop the mount's metadata."""

_LISTING_BYTES = 4096  # the smallest buffer with which the kernel asks for entries of a directory
_ENTRY_BYTES = 152  # struct fuse_direntplus in linux/fuse.h, before the name
_PAUSES_S = (0.01, 0.03, 0.1, 0.3, 1.0)
_TIGHT = 0.6  # of the descriptors
_ROOM_S = 0.002
"""How long an answer with a new node is put off while they are short. The kernel drops a name only between two requests
for its directory: who asks it to must be waiting by the time we answer, or the requests outrun it."""
_NOW_NS = 10_000_000_000  # how long a request that sets times to now may have waited for us
_GONE = frozenset({errno.ESTALE, errno.ENOTCONN, errno.EIO})  # errors of a mount or handle that will not come back
_SEARCH_EVERY_S = 1.0
_GONE_FOR_S = 600.0  # after the last of them: how long a node's descriptor is taken for dead when it is looked up
_CAPABILITY = b"security.capability"
_INVALIDATES = tuple(int(part) for part in re.findall(r"\d+", platform.release())[:2]) >= (6, 6)
"""Whether a write with FOPEN_DIRECT_IO drops what the kernel has cached of the place, as one with O_DIRECT alone does: Linux
80e4f25262f9. Without that, who has the file open without O_DIRECT could go on reading what is no longer there."""


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


def _begun(
    begin: Callable[[Callable[[More[T]], object]], None],
    go_on: Callable[[More[T]], object],
    finish: Callable[[More[T]], Coroutine[Any, Any, T]],
) -> None:
    """The same for what has no task: what *begin* raises and what is left to do are both for whoever awaits *finish*."""
    try:
        begin(lambda more: go_on(functools.partial(finish, more)))
    except Exception as error:  # noqa: BLE001 - for whoever asked
        go_on(functools.partial(finish, functools.partial(_raised, error)))


@_translated
async def _finish_read(more: More[bytes]) -> bytes:
    return await more()


@_translated
async def _finish_write(more: More[int]) -> int:
    return await more()


async def _raised(error: Exception) -> Any:
    raise error


class _Listing:
    """An open directory."""

    def __init__(self, node: Node, fd: int, caller: Caller) -> None:
        self.node = node
        self.fd = fd
        self.caller = caller
        self.names: list[bytes] | None = None
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
        direct: bool,
        source_path: str = "",
    ) -> None:
        """*direct*: pass O_DIRECT on where SOURCE takes it unaligned. *source_path*: where SOURCE is if it is mounted anew."""
        super().__init__()
        self._magic = source.magic_of(root.fd)
        self._inodes = Inodes(root.key, root.fd, handles_last=self._magic != syscalls.FUSE_SUPER_MAGIC)
        self._requests = requests
        self._attr_timeout_s = attr_timeout_s
        self._entry_timeout_s = entry_timeout_s
        self._direct = direct
        self._source_path = source_path
        self._searching = trio.Lock()
        self._gone_s = self._searched_s = -math.inf
        self._listings: dict[int, _Listing] = {}
        self._next_listing = 1
        self._limiter = trio.CapacityLimiter(METADATA_THREADS)
        self._busy: dict[int, int] = {}  # calls in threads, by what they are about
        self._crowds: dict[int, trio.lowlevel.ParkingLot] = {}  # who waits because that are too many
        self._unwanted: list[int] = []
        self._unwanted_there = trio.Event()
        self._closing = trio.Lock()
        self._questions = Questions(self._drop)

    async def serve(self) -> None:
        """What goes on besides the handlers. Never returns."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._questions.serve)
            await self._keep_closing_unwanted()

    async def _keep_closing_unwanted(self) -> None:
        """Close O_PATH descriptors of forgotten nodes: in a thread, because the last one of a file may cost I/O."""
        while True:
            await self._unwanted_there.wait()
            self._unwanted_there = trio.Event()
            await self._close_unwanted()

    async def _close_unwanted(self) -> None:
        async with self._closing:
            batch, self._unwanted = self._unwanted, []
            if batch:
                await self._do(source.close_all, batch)

    # ---- shared by the handlers

    async def _do(self, call: Callable[..., T], *args: Any) -> T:
        try:
            return await self._in_thread(call, *args)
        except OSError as error:
            if error.errno not in _GONE:
                raise
            self._gone_s = trio.current_time()
            if not await self._found_source_again(error.errno):
                raise
        return await self._in_thread(call, *args)

    async def _in_thread(self, call: Callable[..., T], *args: Any) -> T:
        # A call is about the inode whose descriptor comes first. What has none (opening SOURCE by its path) has no share.
        about = call.args[0] if isinstance(call, functools.partial) else next(iter(args), None)
        if not isinstance(about, int):
            return await trio.to_thread.run_sync(call, *args, limiter=self._limiter, abandon_on_cancel=True)
        while self._busy.get(about, 0) >= METADATA_SHARE:
            await self._crowds.setdefault(about, trio.lowlevel.ParkingLot()).park()
        self._busy[about] = self._busy.get(about, 0) + 1
        try:
            return await trio.to_thread.run_sync(call, *args, limiter=self._limiter, abandon_on_cancel=True)
        finally:
            self._busy[about] -= 1
            if not self._busy[about]:
                del self._busy[about]
            if self._crowds:
                self._let_one_in(about)

    def _let_one_in(self, about: int) -> None:
        crowd = self._crowds.get(about)
        if crowd is not None:
            crowd.unpark()
            if not crowd:
                del self._crowds[about]

    # SOURCE may be unmounted and mounted again beneath us, and its handles may go stale. Then the top directory is opened
    # anew by its path, and every other node when its name is looked up, which the kernel does once it does not believe it
    # any more. A new description takes over the old one's number, because other threads may be about to use that.

    async def _found_source_again(self, number: int) -> bool:
        """Whether the top directory has just been replaced by what is mounted at SOURCE's path now, if that is the same one.

        Then a call that failed may be made once more. After another error than ESTALE it may have been executed: only if it
        went to a mount that is gone.
        """
        root = self._inodes[ROOT]
        async with self._searching:
            if trio.current_time() < self._searched_s + _SEARCH_EVERY_S:
                return False
            self._searched_s = trio.current_time()
            try:
                found = await self._in_thread(source.open_root, self._source_path)
            except OSError:
                return False
            if not await self._in_thread(source.take_over, found, root.fd, root.key, self._magic):
                return False
            return self._inodes.mounted_anew(found.key) or number == errno.ESTALE

    async def _with_room(self, call: Callable[..., T], *args: Any) -> T:
        """`_do`, and again after a pause where descriptors have run out: the kernel is giving some back. Opens only."""
        for pause_s in _PAUSES_S:
            try:
                return await self._do(call, *args)
            except OSError as error:
                if error.errno != errno.EMFILE:
                    raise
            self._make_room()
            await trio.sleep(pause_s)
        return await self._do(call, *args)

    def _node(self, inode: int) -> Node:
        try:
            return self._inodes[inode]
        except KeyError:
            raise OSError(errno.ESTALE, "a node that the kernel has forgotten") from None

    def _discard(self, fd: int) -> None:
        self._unwanted.append(fd)
        self._unwanted_there.set()

    def _drop(self, late: object) -> None:
        for one in late if isinstance(late, list) else [late]:
            if isinstance(one, Found):
                self._discard(one.fd)

    async def _ask(self, image: Image, call: Callable[..., T], *args: Any) -> T | None:
        """`_with_room` about an open image; None where memory is to answer, because SOURCE does not.

        The call has a share of the image's threads, also one that begins at its directory: that must leave room for others.
        """
        about = self._node(image.node_id).fd
        return await self._questions.ask(image, lambda: self._with_room(_with_share_of, about, call, *args))

    def _looked_up(self, found: Found, parent: int, name: bytes) -> EntryAttributes:
        node, new = self._inodes.looked_up(found.key, found.fd, parent, name)
        if new:
            node.directory = stat.S_ISDIR(found.stat.st_mode)
            if self._crowded():
                self._make_room()
        else:
            self._discard(found.fd)
        return self._entry(node, found.stat)

    def _crowded(self, share: float = 0.5) -> bool:
        """Whether nodes take more than *share* of the descriptors that we may have: one each."""
        return len(self._inodes) > resource.getrlimit(resource.RLIMIT_NOFILE)[0] * share

    def _make_room(self) -> None:
        """The kernel forgets nodes only for want of memory: ask it to before the descriptors run out.

        Not for directories, which processes are in, nor for open images: they would show as deleted.
        """
        for node in self._inodes.to_forget(4):  # for one that is new: fast enough, and some are not to be had
            if node.id not in self._requests.images:
                node.asked = True
                for parent, name in node.names:
                    receiver.forget_name(parent, name)

    def _entry(self, node: Node, attributes: os.stat_result, size: int | None = None) -> EntryAttributes:
        entry = EntryAttributes()
        image = self._requests.images.get(node.id)
        if image is not None:  # growth that was acknowledged, and then lost in writeback
            size = max(attributes.st_size if size is None else size, image.log.end)
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
        # For people, logs and monitors: always valid text, which a name need not be.
        return self._inodes.path(node).decode(errors="backslashreplace")

    # ---- names

    @_translated
    async def lookup(self, parent_inode: int, name: bytes, ctx: pyfuse3.RequestContext) -> EntryAttributes:
        parent, caller = self._node(parent_inode), _caller(ctx)
        found = await self._found_or_remembered(parent, name, caller)
        if isinstance(found, EntryAttributes):
            return found
        if trio.current_time() < self._gone_s + _GONE_FOR_S and (known := self._inodes.named(parent_inode, name)):
            known.lookups += 1  # its descriptor's number must stay its own until it has been taken over
            try:
                again = found._replace(fd=os.dup(found.fd))
                await self._in_thread(source.take_over, again, known.fd, known.key, self._magic)
            except OSError:  # no descriptor left: another time
                pass
            finally:
                self.forgotten(known.id, 1)
        if self._crowded(_TIGHT) and found.key not in self._inodes:
            await trio.sleep(_ROOM_S)
        entry = self._looked_up(found, parent_inode, name)
        image = self._requests.images.get(entry.st_ino)
        if image is not None:
            image.saw(found.stat)
        return entry

    async def _found_or_remembered(self, parent: Node, name: bytes, caller: Caller) -> Found | EntryAttributes:
        image = self._image(parent.id, name)
        try:
            if image is not None:
                found = None
                if not image.speaks_from_memory:
                    found = await self._ask(image, source.lookup, parent.fd, name, caller)
                found_or_remembered = found or await self._from_memory(parent, name, caller)
                if found_or_remembered is not None:
                    return found_or_remembered
            return await self._with_room(source.lookup, parent.fd, name, caller)
        except OSError as error:
            entry = await self._from_memory(parent, name, caller) if self._masked(parent.id, name, error) else None
            if entry is None:
                raise
            return entry

    # An open image is still found by its name while SOURCE fails: a manager's stat(2) is no reason to alarm it.

    def _image(self, parent: int, name: bytes) -> Image | None:
        node = self._inodes.named(parent, name)
        return None if node is None else self._requests.images.get(node.id)

    def _masked(self, parent: int, name: bytes, error: OSError) -> bool:
        image = self._image(parent, name)
        return image is not None and error.errno in image.held.policy.errors

    async def _may_search(self, directory: Node, caller: Caller) -> bool:
        if caller.uid == 0:
            return True
        try:
            await self._do(source.check_access, directory.fd, os.X_OK, caller)
        except OSError:
            return False
        return True

    async def _from_memory(self, parent: Node, name: bytes, caller: Caller) -> EntryAttributes | None:
        return self._remembered(parent.id, name) if await self._may_search(parent, caller) else None

    def _remembered(self, parent: int, name: bytes) -> EntryAttributes | None:
        image = self._image(parent, name)
        remembered = None if image is None else image.remembered()
        if image is None or remembered is None:
            return None
        node = self._node(image.node_id)
        node.lookups += 1
        return self._entry(node, *remembered)

    def forgotten(self, inode: int, lookups: int) -> None:
        """For the device, in place of `forget`: the kernel has forgotten so many of its *lookups*."""
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
        # NFS removes a file only when its last descriptor is closed (nfs_sillyrename), ours of a forgotten node included.
        await self._close_unwanted()
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
        return await self._attributes(inode)

    async def _attributes(self, inode: int) -> EntryAttributes:
        node = self._node(inode)
        image = self._requests.images.get(inode)
        if image is None:
            return self._entry(node, await self._do(os.fstat, node.fd))
        if not image.speaks_from_memory:
            # NFS remembers a size for up to a minute (`acregmax`). But a guest that comes here from another host may have made its
            # image grow there, and what lies behind the end is read as zeros.
            direct = any(handle.direct for handle in image.handles.values())
            try:
                attributes = await self._ask(image, source.attributes_now if direct else os.fstat, node.fd)
            except OSError as error:
                # The outage may begin with this very call: an open image's size must not become an I/O error.
                if error.errno not in image.held.policy.errors or image.remembered() is None:
                    raise
            else:
                if attributes is not None:
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
            await self._requests.truncate(handle, size)
            if not (fields.update_mode or fields.update_mtime or fields.update_atime):
                return await self._attributes(inode)
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
            and attr.st_atime_ns == attr.st_mtime_ns
            and 0 <= received_ns - attr.st_mtime_ns < _NOW_NS,
        )
        if image is not None and size is not None:  # of an open file, by its name: in its place among the writes (P4)
            attributes = await self._requests.resize(
                next(iter(image.handles.values())),
                size,
                functools.partial(source.change, node.fd, changes, _caller(ctx)),
            )
        else:
            attributes = await self._do(source.change, node.fd, changes, _caller(ctx))
        if image is not None:
            image.saw(attributes)
        return self._entry(node, attributes)

    @_translated
    async def access(self, inode: int, mode: int, ctx: pyfuse3.RequestContext) -> bool:
        await self._do(source.check_access, self._node(inode).fd, mode, _caller(ctx))
        return True

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
        # The kernel asks for this before every write. SOURCE is asked once, at the open: when it hangs, it is a write that
        # must meet that, to be counted and held.
        if image.capability is None and not image.held.sick:
            image.capability = await self._do(source.read_capability, node.fd)
        capability = image.capability
        if capability is None:
            capability = errno.ENODATA
        if isinstance(capability, int):
            raise OSError(capability, os.strerror(capability))
        return capability

    def known_capability(self, inode: int) -> bytes | int | None:
        """For the device: an open image's security.capability, or the errno that says that there is none, where it is known."""
        image = self._requests.images.get(inode)
        return None if image is None else image.capability

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
        fd = await self._with_room(source.open_directory, node.fd, _caller(ctx))
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
        """One reading of all names when the listing begins: entries that come or go meanwhile neither shift nor repeat others.

        No more is looked up than is surely told in this answer: the kernel locks the directory until then, but afterwards
        a name may be unlinked, and telling it later would bring it back.
        """
        if position == 0 or listing.names is None:
            listing.names = await self._do(source.list_names, listing.fd)
        told = 0
        while not told and position < len(listing.names):
            names = _one_answer(listing.names, position)
            if self._crowded(_TIGHT):
                names = names[:1]
                await trio.sleep(_ROOM_S)
            for name, found in zip(names, await self._look_up_listed(listing, names), strict=False):
                position += 1
                if found is not None:
                    entry = (
                        found if isinstance(found, EntryAttributes) else self._looked_up(found, listing.node.id, name)
                    )
                    if not pyfuse3.readdir_reply(token, name, entry, position):
                        raise RuntimeError("the kernel asked with a smaller buffer than it ever had")
                    told += 1

    async def _look_up_listed(self, listing: _Listing, names: Sequence[bytes]) -> list[Found | EntryAttributes | None]:
        """What is behind *names*: up to the first that cannot be looked up, which is an error only in the first place."""
        parent = listing.node.id
        opened = {name: image for name in names if (image := self._image(parent, name)) is not None}
        wanted = [name for name in names if name not in {b".", b"..", *opened}]
        there: dict[bytes, Found | OSError | EntryAttributes | None] = {}
        if len(wanted) + len(opened) < len(names):
            there |= self._dots(listing.node, await self._do(os.fstat, listing.node.fd))
        found = await self._with_room(source.lookup_listed, listing.node.fd, wanted, listing.caller)
        there |= zip(wanted, found, strict=True)
        there |= await self._look_up_open(listing, opened)
        entries: list[Found | EntryAttributes | None] = []
        for name in names:
            one = there.get(name)
            unanswered = name in opened and name not in there
            if unanswered or (isinstance(one, OSError) and self._masked(parent, name, one)):
                one = self._remembered(parent, name) or one
            if isinstance(one, OSError) or (one is None and unanswered):
                break
            entries.append(one)
        rest = [there.get(name) for name in names[len(entries) :]]
        for one in rest:
            if isinstance(one, Found):
                self._discard(one.fd)
        if not entries and isinstance(rest[0], OSError):
            raise rest[0]
        return entries

    async def _look_up_open(self, listing: _Listing, opened: dict[bytes, Image]) -> dict[bytes, Found | OSError | None]:
        """The same for the names of open images; one for which memory is to answer is left out."""
        there: dict[bytes, Found | OSError | None] = {}

        async def look_up(name: bytes, image: Image) -> None:
            try:
                found = await self._ask(image, source.lookup_listed, listing.node.fd, [name], listing.caller)
            except OSError as error:
                there[name] = error
            else:
                there.update(zip([name], found or [], strict=False))

        async with trio.open_nursery() as nursery:  # all at once: each may take `blocked_after`
            for name, image in opened.items():
                if not image.speaks_from_memory:
                    nursery.start_soon(look_up, name, image)
        return there

    def _dots(self, directory: Node, attributes: os.stat_result) -> dict[bytes, EntryAttributes]:
        """`.` and `..`, of which the kernel takes the inode number alone, and counts no lookup."""
        dot, dots = self._entry(directory, attributes), self._entry(directory, attributes)
        dots.st_ino = self._inodes.parent(directory)
        return {b".": dot, b"..": dots}

    @_translated
    async def releasedir(self, fh: int) -> None:
        listing = self._listings.pop(fh)
        await self._in_thread(os.close, listing.fd)

    @_translated
    async def fsyncdir(self, fh: int, datasync: bool) -> None:  # noqa: FBT001 - pyfuse3's signature
        await self._do(os.fdatasync if datasync else os.fsync, self._listings[fh].fd)

    # ---- data

    @_translated
    async def open(self, inode: int, flags: int, ctx: pyfuse3.RequestContext) -> FileInfo:
        node, caller = self._node(inode), _caller(ctx)
        work = functools.partial(source.open_data, node.fd, flags, caller, direct=self._direct)
        image = self._requests.images.get(inode)
        if image is not None and flags & os.O_TRUNC:
            opened = await self._requests.resize(next(iter(image.handles.values())), 0, work)
        else:
            opened = await self._with_room(work)
        handle = self._opened(node, opened, flags, caller)
        if image is None and flags & os.O_TRUNC:  # somebody else has opened it, and written, in that moment
            handle.image.truncated(0)
        if handle.image.capability is None and handle.writable:
            handle.image.capability = await self._do(source.read_capability, node.fd)
        return self._told(handle)

    @_translated
    async def create(
        self, parent_inode: int, name: bytes, mode: int, flags: int, ctx: pyfuse3.RequestContext
    ) -> tuple[FileInfo, EntryAttributes]:
        parent, caller = self._node(parent_inode), _caller(ctx)
        work = functools.partial(source.create_data, parent.fd, name, mode, flags, caller, direct=self._direct)
        opened, found = await self._do(work)
        entry = self._looked_up(found, parent_inode, name)
        node = self._node(entry.st_ino)
        handle = self._opened(node, opened, flags, caller)
        if flags & os.O_TRUNC:  # and it was there, and open: somebody else had made it in that moment
            handle.image.truncated(0)
        if flags & os.O_EXCL:
            handle.image.capability = errno.ENODATA
        return self._told(handle), entry

    def _opened(self, node: Node, opened: source.Opened, flags: int, caller: Caller) -> Handle:
        handle = self._requests.opened(node.id, self._name(node), Backing(opened, caller), flags)
        if handle.image.where is None:
            handle.image.where = functools.partial(self._where, node)
            handle.image.sampled = not node.key.handle
        if opened.attributes is not None and handle.image.remembered() is None:
            handle.image.saw(opened.attributes)
        handle.image.set_id |= opened.set_id
        handle.image.wrote(opened.size)
        return handle

    def _told(self, handle: Handle) -> FileInfo:
        # For one that is opened with O_DIRECT the kernel's cache is out of the way in either case. With FOPEN_DIRECT_IO, too,
        # the kernel does not ask for security.capability before each write, and wait for the answer (fuse_direct_write_iter
        # in fs/fuse/file.c). The price: such a file cannot be mapped MAP_SHARED.
        return FileInfo(fh=handle.number, keep_cache=False, direct_io=handle.direct and _INVALIDATES)

    def _where(self, node: Node, size: int) -> Where:
        return Where(self._source_path, self._inodes.whereabouts(node), node.key.number, node.key.handle, size)

    # No coroutines of their own: each that a request's wake-ups pass through costs something every time.

    def read_at_once(self, fh: int, off: int, size: int) -> bytes | None:
        """For the device: what `read` would answer, where that takes no time; None otherwise."""
        handle = self._requests.handles.get(fh)
        if handle is None or (handle.direct and size < 512):
            return None
        return self._requests.read_at_once(handle, off, size)

    def begin_read(
        self,
        fh: int,
        off: int,
        size: int,
        reply: Reply,
        answer: Callable[[bytes | None], object],
        go_on: Callable[[More[bytes]], object],
    ) -> None:
        """For the device: what `read` answers, where that takes its time; see `Requests.begin_read`. To await raises FUSEError."""

        def begin(go_on: Callable[[More[bytes]], object]) -> None:
            self._requests.begin_read(self._to_read(fh, off, size), off, size, reply, answer, go_on)

        _begun(begin, go_on, _finish_read)

    @_translated
    def read(self, fh: int, off: int, size: int) -> Coroutine[Any, Any, bytes]:
        return self._requests.read(self._to_read(fh, off, size), off, size)

    def _to_read(self, fh: int, off: int, size: int) -> Handle:
        handle = self._requests.handles[fh]
        if handle.direct and size < 512 and off % 512 == 0:
            # QEMU probes the alignment with short reads, and would assume 4096 where they succeed without O_DIRECT's rules.
            # Elsewhere a short one is the rest of a large one: the kernel splits what is read into memory off the pages.
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return handle

    @_translated
    def write(self, fh: int, off: int, buf: bytes) -> Coroutine[Any, Any, int]:
        return self._requests.write(self._requests.handles[fh], off, buf)

    def begin_write(
        self, fh: int, off: int, buf: bytes, answer: Callable[[int], object], go_on: Callable[[More[int]], object]
    ) -> None:
        """For the device: `write`; see `Requests.begin_write`. To await raises FUSEError."""

        def begin(go_on: Callable[[More[int]], object]) -> None:
            self._requests.begin_write(self._requests.handles[fh], off, buf, answer, go_on)

        _begun(begin, go_on, _finish_write)

    @_translated
    async def fsync(self, fh: int, datasync: bool) -> None:  # noqa: FBT001 - pyfuse3's signature
        await self._requests.sync(self._requests.handles[fh], data_only=datasync)

    @_translated
    async def flush(self, fh: int) -> None:
        """close(2), and the last moment in which a writer can be told that its data is lost."""
        handle = self._requests.handles[fh]
        if handle.writable and handle.image.log:
            await self._requests.sync(handle, data_only=True)

    @_translated
    async def release(self, fh: int) -> None:
        for backing in await self._requests.released(fh):
            with contextlib.suppress(OSError):  # nobody is there to be told, and what was written has been synced
                # In a thread of its own: closes of a sick image that hang must leave room for other metadata.
                await self._requests.engine.flight(backing.close, lambda: None).land()


def _one_answer(names: Sequence[bytes], position: int) -> Sequence[bytes]:
    """The names from *position* on that fit into one answer."""
    room = _LISTING_BYTES
    for end in range(position, len(names)):
        room -= (_ENTRY_BYTES + len(names[end]) + 7) & ~7
        if room < 0:
            return names[position:end]
    return names[position:]


def _with_share_of(_about: int, call: Callable[..., T], *args: Any) -> T:
    return call(*args)


def _caller(ctx: pyfuse3.RequestContext) -> Caller:
    return Caller(ctx.uid, ctx.gid, ctx.pid)
