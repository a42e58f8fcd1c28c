"""Every metadata system call on SOURCE.

1. Everything here blocks, so everything here runs in a worker thread; nothing here knows trio or pyfuse3.
2. Everything is relative to a descriptor: a name is looked up in an O_PATH descriptor of its directory and never followed,
   and an inode is worked on through /proc/self/fd of its own O_PATH descriptor. So no symlink, no `..` and no race
   between two calls can lead out of SOURCE.
3. Everything is done as the calling user (fsuid, fsgid and groups of this thread alone), so that permissions are checked,
   and objects owned, as SOURCE itself would have it, also under root_squash.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from iohang_fuse import syscalls
from iohang_fuse.inodes import Key

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

RENAME_EXCHANGE = 2  # linux/fs.h
_FMODE_EXEC = 0x20  # linux/fs.h: open for execve(2); the kernel passes it on in FUSE's open flags

# Direct I/O without alignment. Elsewhere (ext4, xfs) it would need aligned memory.
_DIRECT = frozenset({
    syscalls.NFS_SUPER_MAGIC,
    syscalls.FUSE_SUPER_MAGIC,
    syscalls.CIFS_SUPER_MAGIC,
    syscalls.SMB2_SUPER_MAGIC,
    syscalls.CEPH_SUPER_MAGIC,
})  # fmt: skip
# Of these, NFS has committed a direct write before it answers (nfs_direct_write_completion); the others may not have.
_DIRECT_AND_STABLE = frozenset({syscalls.NFS_SUPER_MAGIC})
# Where io_uring's own threads wait for nothing but the machine they run on.
_LOCAL = frozenset({
    syscalls.EXT4_SUPER_MAGIC,
    syscalls.XFS_SUPER_MAGIC,
    syscalls.BTRFS_SUPER_MAGIC,
    syscalls.F2FS_SUPER_MAGIC,
    syscalls.TMPFS_MAGIC,
})  # fmt: skip
_KEPT_FLAGS = os.O_ACCMODE | os.O_SYNC | os.O_DSYNC | os.O_NOATIME


class Caller(NamedTuple):
    """Who asks: what FUSE tells of the process behind a request."""

    uid: int
    gid: int
    pid: int


_SENT_GROUPS = 16
"""Of supplementary groups an NFS client sends no more (AUTH_SYS, RFC 5531)."""

SERVER = Caller(0, 0, 0)
"""Ourselves."""


class Found(NamedTuple):
    """An inode of SOURCE: a new O_PATH descriptor of it, its identity and its attributes."""

    fd: int
    key: Key
    stat: os.stat_result


@dataclass(frozen=True, slots=True)
class Attributes:
    """What a setattr changes; None leaves a field as it is. Times in nanoseconds."""

    size: int | None = None
    mode: int | None = None
    uid: int | None = None
    gid: int | None = None
    atime_ns: int | None = None
    mtime_ns: int | None = None
    times_may_mean_now: bool = False


@contextlib.contextmanager
def acting_as(caller: Caller, *, with_groups: bool = True) -> Iterator[None]:
    """Be *caller* towards file systems, in this thread, until the end of the block.

    Raises EPERM where that is impossible. A server that is not root serves its own user only and stays itself.
    """
    if (caller.uid == 0 and caller.gid == 0) or os.geteuid() != 0:
        yield
        return
    own_groups = os.getgroups()
    try:
        if with_groups:
            syscalls.set_thread_groups(_groups(caller.pid))
        syscalls.setfsgid(caller.gid)
        syscalls.setfsuid(caller.uid)
        yield
    finally:
        syscalls.setfsuid(0)
        syscalls.setfsgid(0)
        if with_groups:
            syscalls.set_thread_groups(own_groups)


def _groups(pid: int) -> list[int]:
    """Supplementary groups of *pid*, none if it is gone: FUSE does not tell them."""
    try:
        with open(f"/proc/{pid}/status", encoding="ascii", errors="replace") as file:
            for line in file:
                if line.startswith("Groups:"):
                    return [int(word) for word in line.split()[1:]]
    except OSError:
        pass
    return []


@contextlib.contextmanager
def owning(times: int, gid: int) -> Iterator[None]:
    """In this thread, until the end of the block: be another open-owner of NFS 4.1 for each number of *times*, of a few.

    A file that the client holds for dead (ESTALE) is another inode to it when it is opened anew, but the same file to the server,
    which goes on counting its owner's opens. The client waits 5 s for the numbers that it believes to be missing, at each open
    and each close (nfs_set_open_stateid_locked, nfs4_refresh_open_old_stateid), and its close of the dead one may close the
    other. It has an owner for each set of user, group and supplementary groups (nfs4_get_state_owner). So who names his group
    once more is another one, with the same rights.
    """
    own_groups = os.getgroups()
    more = times % max(_SENT_GROUPS - len(own_groups), 1)
    try:
        if more:
            with contextlib.suppress(PermissionError):  # no root: it takes longer
                syscalls.set_thread_groups([*own_groups, *[gid] * more])
        yield
    finally:
        if more:
            with contextlib.suppress(PermissionError):
                syscalls.set_thread_groups(own_groups)


def by_descriptor(fd: int) -> str:
    """A path that leads to the very inode of *fd*, be it a symlink, renamed or unlinked."""
    return f"/proc/self/fd/{fd}"


def identify(fd: int) -> Found:
    """Identity and attributes of an O_PATH descriptor, which is closed if that fails."""
    try:
        attributes = os.fstat(fd)
        return Found(fd, Key(attributes.st_dev, attributes.st_ino, syscalls.file_handle(fd)), attributes)
    except BaseException:
        os.close(fd)
        raise


def open_root(path: str) -> Found:
    """The root of SOURCE. Raises ENOTDIR, ENOENT, EACCES."""
    return identify(os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC))


def magic_of(fd: int) -> int:
    """The kind of file system."""
    return syscalls.file_system_magic(fd)


def take_over(found: Found, fd: int, key: Key, magic: int) -> bool:
    """Let the descriptor number *fd* mean what *found* is, whose own is closed, if that is the same inode of the same kind.

    With dup2(2): whoever is inside a system call on the old one goes on with that. Where SOURCE is not mounted there is an
    empty directory in its place, which is not the same.
    """
    try:
        handles_differ = found.key.handle and key.handle and found.key.handle != key.handle
        if found.key.number != key.number or handles_differ or magic_of(found.fd) != magic:
            return False
        os.dup2(found.fd, fd, inheritable=False)
    except OSError:
        return False
    finally:
        os.close(found.fd)
    return True


def lookup(directory: int, name: bytes, caller: Caller) -> Found:
    """The inode behind one *name*; a symlink is found itself. Raises ENOENT, EACCES, ENAMETOOLONG."""
    if name in {b".", b".."} or b"/" in name:
        raise OSError(errno.EINVAL, "not the name of an entry", name)
    with acting_as(caller):
        return identify(os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=directory))


def lookup_listed(directory: int, names: Sequence[bytes], caller: Caller) -> list[Found | OSError | None]:
    """The inodes behind names that a listing gave; None for what has vanished since, an error in the place of its entry.

    A caller who may list a directory but not search it still gets the entries: found as the server, then.
    """
    found: list[Found | OSError | None] = []
    for name in names:
        try:
            try:
                found.append(lookup(directory, name, caller))
            except PermissionError:
                found.append(lookup(directory, name, SERVER))
        except OSError as error:
            if error.errno == errno.EMFILE and not found:
                raise
            found.append(None if error.errno in {errno.ENOENT, errno.ESTALE} else error)
    return found


def close_all(descriptors: Sequence[int]) -> None:
    """Close O_PATH descriptors; the last one of an unlinked file may cost I/O. Nobody is there to be told of an error."""
    for fd in descriptors:
        with contextlib.suppress(OSError):
            os.close(fd)


def attributes_now(fd: int) -> os.stat_result:
    """As SOURCE's own storage has them, whatever this host remembers."""
    syscalls.ask_for_size(fd)
    return os.fstat(fd)


def change(fd: int, attributes: Attributes, caller: Caller) -> os.stat_result:
    """Change attributes in the order in which SOURCE's kernel would not undo one by the next; return the new ones."""
    path = by_descriptor(fd)
    clears_set_id = False
    with acting_as(caller):
        if attributes.uid is not None or attributes.gid is not None:
            keep = -1  # chown(2): leave this one as it is
            os.chown(
                path,
                keep if attributes.uid is None else attributes.uid,
                keep if attributes.gid is None else attributes.gid,
            )
        if attributes.mode is not None:
            try:
                os.chmod(path, stat.S_IMODE(attributes.mode))
            except PermissionError:
                clears_set_id = _clears_set_id(path, fd, stat.S_IMODE(attributes.mode))
                if not clears_set_id:
                    raise
        if attributes.size is not None:
            os.truncate(path, attributes.size)
        if attributes.atime_ns is not None or attributes.mtime_ns is not None:
            _set_times(path, attributes)
    if clears_set_id and attributes.mode is not None:
        with contextlib.suppress(PermissionError):  # root_squash; the write itself will clear them, too
            os.chmod(path, stat.S_IMODE(attributes.mode))
    return os.fstat(fd)


def _clears_set_id(path: str, fd: int, mode: int) -> bool:
    """Whether *mode* takes nothing but set-ID bits from a file that the caller may write.

    Before a write or truncation by another than the owner, the kernel clears these bits, and what it sends looks as if that
    one had called chmod(2). Who did call it could have cleared them with a write.
    """
    old = stat.S_IMODE(os.fstat(fd).st_mode)
    taken = old & ~mode
    if not taken or taken & ~(stat.S_ISUID | stat.S_ISGID) or mode & ~old:
        return False
    try:
        syscalls.access(path, os.W_OK)
    except PermissionError:
        return False
    return True


def _set_times(path: str, attributes: Attributes) -> None:
    try:
        syscalls.set_times(path, attributes.atime_ns, attributes.mtime_ns)
    except PermissionError:
        # Who may write but does not own may set both times to now, and to nothing else (utimensat(2)). The kernel has
        # put its clock in the place of "now", and pyfuse3 does not tell.
        if not attributes.times_may_mean_now:
            raise
        os.utime(path)


def readlink(fd: int, caller: Caller) -> bytes:
    """The target of a symlink."""
    with acting_as(caller):
        return os.readlink(b"", dir_fd=fd)


def make_node(directory: int, name: bytes, mode: int, rdev: int, caller: Caller) -> Found:
    """A regular file, FIFO, socket or device node, as mknod(2)."""
    with acting_as(caller):
        os.mknod(name, mode, rdev, dir_fd=directory)
    return lookup(directory, name, caller)


def make_directory(directory: int, name: bytes, mode: int, caller: Caller) -> Found:
    """A directory, as mkdir(2); set-group-ID and sticky bits survive, which mkdir(2) itself may ignore."""
    with acting_as(caller):
        os.mkdir(name, stat.S_IMODE(mode), dir_fd=directory)
    return lookup(directory, name, caller)


def make_symlink(directory: int, name: bytes, target: bytes, caller: Caller) -> Found:
    """A symlink to *target*, which is never followed here."""
    with acting_as(caller):
        os.symlink(target, name, dir_fd=directory)
    return lookup(directory, name, caller)


def make_link(fd: int, directory: int, name: bytes, caller: Caller) -> Found:
    """One more name for the inode of *fd*."""
    with acting_as(caller):
        os.link(by_descriptor(fd), name, dst_dir_fd=directory, follow_symlinks=True)
    return lookup(directory, name, caller)


def unlink(directory: int, name: bytes, caller: Caller) -> None:
    """Remove a name."""
    with acting_as(caller):
        os.unlink(name, dir_fd=directory)


def remove_directory(directory: int, name: bytes, caller: Caller) -> None:
    """Remove an empty directory."""
    with acting_as(caller):
        os.rmdir(name, dir_fd=directory)


def rename(old_dir: int, old: bytes, new_dir: int, new: bytes, flags: int, caller: Caller) -> None:
    """Move a name, with the flags of renameat2(2)."""
    with acting_as(caller):
        syscalls.renameat2(old_dir, old, new_dir, new, flags)


def open_directory(fd: int, caller: Caller) -> int:
    """A descriptor for listing and syncing a directory."""
    with acting_as(caller):
        return os.open(by_descriptor(fd), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)


def list_names(fd: int) -> list[bytes]:
    """All names in a directory, `.` and `..` first: one consistent reading, however it changes afterwards."""
    os.lseek(fd, 0, os.SEEK_SET)
    return [b".", b"..", *(os.fsencode(name) for name in os.listdir(fd))]


def check_access(fd: int, mode: int, caller: Caller) -> None:
    """access(2), as the caller's file-system identity. Raises EACCES, EROFS."""
    with acting_as(caller):
        syscalls.access(by_descriptor(fd), mode)


def get_xattr(fd: int, name: bytes, caller: Caller) -> bytes:
    """Raises ENODATA, EOPNOTSUPP."""
    with acting_as(caller):
        return os.getxattr(by_descriptor(fd), name)


def read_capability(fd: int) -> bytes | int | None:
    """security.capability, or the errno that says that there is none; None if this could not be found out."""
    try:
        return get_xattr(fd, b"security.capability", SERVER)
    except OSError as error:
        return error.errno if error.errno in {errno.ENODATA, errno.EOPNOTSUPP} else None


def set_xattr(fd: int, name: bytes, value: bytes, caller: Caller) -> None:
    """Set one extended attribute, new or not."""
    with acting_as(caller):
        os.setxattr(by_descriptor(fd), name, value)


def list_xattrs(fd: int, caller: Caller) -> list[bytes]:
    """Names of the extended attributes that the caller may see."""
    with acting_as(caller):
        names = [os.fsencode(name) for name in os.listxattr(by_descriptor(fd))]
    # `trusted` takes CAP_SYS_ADMIN (xattr(7)), which this thread keeps whoever it acts as.
    return [name for name in names if caller.uid == 0 or not name.startswith(b"trusted.")]


def remove_xattr(fd: int, name: bytes, caller: Caller) -> None:
    """Raises ENODATA."""
    with acting_as(caller):
        os.removexattr(by_descriptor(fd), name)


# ---- opening for data


class Opened(NamedTuple):
    """A data descriptor, the flags with which it is opened anew, and whether what was written through it needs no sync.

    *apart*: a sync of another description of the file may not cover what was written through this one (FUSE: the server
    decides, and some buffer for each open file).

    *nowait*: reads can be asked for what is in the page cache, and for no more (RWF_NOWAIT). *set_id*: it had set-user-ID or
    set-group-ID bits, which a write has to clear.

    *ring_reads*, *ring_writes*: io_uring is a way for them. The kernel has one thread at a time for all writes to a file, and
    for those to one in 64 of the others (io_wq_hash_work in io_uring/io_uring.c): one that does not return would be in the way
    of other images (P7). So it is a way where that thread's part is short: local file systems, which write to memory, and
    direct I/O over a network, which goes on without it. On FUSE that is the only way to have two writes of one file under way.
    """

    fd: int
    flags: int
    stable: bool
    apart: bool = False
    device: int = 0  # st_dev, 0 if it could not be found out
    nowait: bool = False
    ring_reads: bool = False
    ring_writes: bool = False
    set_id: bool = False
    size: int = 0
    attributes: os.stat_result | None = None  # as they were then


class Where(NamedTuple):
    """How to find a backing file that is open, by its name: *root* is SOURCE as the operator has named it.

    *path* is None for a file that has lost its name. *number*, *handle* (empty: unknown) and *size* are what the file must
    have to be the same: the size that is known to be stable, because growth that was lost in writeback will come again.
    *samples* are (first byte, data) that it must have where there is no handle: an inode number may be used again.
    """

    root: str
    path: bytes | None
    number: int
    handle: bytes
    size: int
    samples: tuple[tuple[int, bytes], ...] = ()


class NotTheSame(OSError):
    """What has the file's name now is not the file."""


def open_data(fd: int, flags: int, caller: Caller, *, direct: bool) -> Opened:
    """Open a regular file for data, with the consumer's own O_SYNC, O_DSYNC and (if *direct*, where it works) O_DIRECT."""
    attributes = os.fstat(fd)
    if not stat.S_ISREG(attributes.st_mode):  # the kernel opens FIFOs and devices itself: only a race can lead here
        raise OSError(errno.EINVAL, "not a regular file")
    kept = flags & _KEPT_FLAGS | os.O_CLOEXEC
    path = by_descriptor(fd)
    with acting_as(caller):
        if flags & _FMODE_EXEC:  # the kernel's own check is content with a right that others have
            syscalls.access(path, os.X_OK)
        try:
            if direct and flags & os.O_DIRECT and not flags & os.O_TRUNC and magic_of(fd) in _DIRECT:
                data = _open_direct(path, kept)
            else:
                data = os.open(path, kept | (flags & os.O_TRUNC))
        except PermissionError:
            if not flags & _FMODE_EXEC:
                raise
            data = -1
    if data < 0:  # execve(2) of a file that may be executed but not read: the kernel reads it, not the caller
        data = os.open(path, kept)
    return _opened(data, kept, direct=direct and bool(flags & os.O_DIRECT))


def _open_direct(path: str, flags: int) -> int:
    """With O_DIRECT from the beginning, if that is to be had: a FUSE server may then keep the kernel's cache out of the way.

    Otherwise the kernel asks it for the file's size before each read, and for security.capability before each write.
    """
    try:
        return os.open(path, flags | os.O_DIRECT)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
    return os.open(path, flags)


def create_data(
    directory: int, name: bytes, mode: int, flags: int, caller: Caller, *, direct: bool
) -> tuple[Opened, Found]:
    """Create (or, without O_EXCL, open) a regular file for data, as `open_data`."""
    kept = flags & _KEPT_FLAGS | os.O_CLOEXEC
    with acting_as(caller):
        data = os.open(
            name,
            kept
            | os.O_CREAT
            | os.O_NOFOLLOW
            | os.O_NONBLOCK  # a FIFO that got in between must not stop this thread
            | (flags & (os.O_EXCL | os.O_TRUNC)),
            stat.S_IMODE(mode),
            dir_fd=directory,
        )
    try:
        if not stat.S_ISREG(os.fstat(data).st_mode):
            raise OSError(errno.EINVAL, "not a regular file", name)
        os.set_blocking(data, True)
        found = identify(os.open(by_descriptor(data), os.O_PATH | os.O_CLOEXEC))
    except BaseException:
        os.close(data)
        raise
    try:
        return _opened(data, kept, direct=direct and bool(flags & os.O_DIRECT)), found
    except BaseException:
        os.close(found.fd)
        raise


def _opened(data: int, kept: int, *, direct: bool) -> Opened:
    """With direct I/O where it is wanted and had.

    Where it is not yet, it is switched on with fcntl(2), because an open(2) that a FUSE file system refuses may already have
    truncated the file.
    """
    try:
        magic = syscalls.file_system_magic(data)
        attributes = os.fstat(data)
    except BaseException:
        os.close(data)
        raise
    if direct and magic in _DIRECT:
        try:
            fcntl.fcntl(data, fcntl.F_SETFL, fcntl.fcntl(data, fcntl.F_GETFL) | os.O_DIRECT)
            kept |= os.O_DIRECT
        except OSError:
            pass
    ring = magic in _LOCAL or (magic in _DIRECT and bool(kept & os.O_DIRECT))
    stable = bool(kept & os.O_DSYNC) or (bool(kept & os.O_DIRECT) and magic in _DIRECT_AND_STABLE)
    return Opened(
        data,
        kept,
        stable,
        magic == syscalls.FUSE_SUPER_MAGIC,
        attributes.st_dev,
        nowait=magic in _LOCAL and _has_nowait(data) and without_atime(data),
        ring_reads=ring,
        ring_writes=ring,
        set_id=bool(attributes.st_mode & (stat.S_ISUID | stat.S_ISGID)),
        size=attributes.st_size,
        attributes=attributes,
    )


def without_atime(data: int) -> bool:
    """Reads are not to change the time of the last access. Returns whether that was granted.

    RWF_NOWAIT does not hold for that change: with a disk that hangs it waits for the journal (seen on ext4, Linux 6.18).
    """
    try:
        fcntl.fcntl(data, fcntl.F_SETFL, fcntl.fcntl(data, fcntl.F_GETFL) | os.O_NOATIME)
    except OSError:  # not the owner's, and no CAP_FOWNER
        return False
    return True


def _has_nowait(data: int) -> bool:
    try:
        os.preadv(data, [bytearray(1)], 0, os.RWF_NOWAIT)
    except (
        OSError
    ) as error:  # EOPNOTSUPP; EBADF where it was opened for writing alone; EAGAIN: yes, but not in the cache
        return error.errno == errno.EAGAIN
    return True


def open_again(fd: int, flags: int, opener: Caller, where: Where, *, owner: int = 0) -> int:
    """One more open file description of the file behind *fd*, which may be dead: by its name, or else through *fd* itself.

    By its name first, because a handle that has gone stale, or a file system that was unmounted, does not come back. Raises
    the reason why it cannot be had by its name if it cannot be had through *fd* either.
    """
    try:
        try:
            found = find_again(where)
        except PermissionError:  # root_squash: the server itself may not search there
            with acting_as(opener):
                found = find_again(where)
    except OSError as error:
        try:
            return open_same(fd, flags, opener, owner=owner)
        except OSError:
            raise error from None
    try:
        return open_same(found.fd, flags, opener, owner=owner)
    finally:
        os.close(found.fd)


def open_same(fd: int, flags: int, opener: Caller, *, owner: int = 0) -> int:
    """One more open file description of the very file of *fd*. *owner*: see `owning`."""
    path, asked = by_descriptor(fd), flags & ~os.O_DIRECT
    open_it = _open_direct if flags & os.O_DIRECT else os.open
    try:
        with acting_as(opener), owning(owner, opener.gid):
            data = open_it(path, asked)
    except PermissionError:  # its user may since have taken the right from himself; who has it open keeps it
        with owning(owner, os.getegid()):
            data = open_it(path, asked)
    if flags & os.O_DIRECT:
        with contextlib.suppress(OSError):  # as in `_opened`
            fcntl.fcntl(data, fcntl.F_SETFL, fcntl.fcntl(data, fcntl.F_GETFL) | os.O_DIRECT)
    return data


def find_again(where: Where) -> Found:
    """The file by its name. Raises `NotTheSame` with the reason, or what looking for it did."""
    if where.path is None:
        raise NotTheSame(errno.ESTALE, "it has no name any more")
    fd = os.open(where.root, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        for name in where.path.split(b"/"):
            below = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=fd)
            os.close(fd)
            fd = below
    except BaseException:
        os.close(fd)
        raise
    found = identify(fd)
    try:
        why = _not_the_same(found, where)
        if why:
            raise NotTheSame(errno.ESTALE, why)
    except BaseException:
        os.close(found.fd)
        raise
    return found


def _not_the_same(found: Found, where: Where) -> str:
    """Why *found* must not be taken for the file of *where*; empty if it may.

    The device is not compared: a file system that is mounted anew has another. Its handle has the generation of an inode
    number that is used again.
    """
    if not stat.S_ISREG(found.stat.st_mode):
        return "its name is now that of something else than a file"
    if found.stat.st_ino != where.number:
        return f"its name is now that of another file (inode {found.stat.st_ino}, and it was {where.number})"
    if found.key.handle and where.handle and found.key.handle != where.handle:
        return "its name is now that of a new file with the same inode number"
    if found.stat.st_size < where.size:
        return f"its name is now that of a shorter file ({found.stat.st_size} bytes, and {where.size} were safe)"
    if not (found.key.handle and where.handle) and _differs(found.fd, where.samples):
        return "its name is now that of a file with other content, which has got its inode number"
    return ""


def _differs(fd: int, samples: Sequence[tuple[int, bytes]]) -> bool:
    """Whether the file behind an O_PATH descriptor has something else than *samples*."""
    if not samples:
        return False
    data = os.open(by_descriptor(fd), os.O_RDONLY | os.O_CLOEXEC)
    try:
        return any(os.pread(data, len(sample), start) != sample for start, sample in samples)
    finally:
        os.close(data)
