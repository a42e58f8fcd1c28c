"""System calls that Python 3.11 has no function for. Nothing is decided here.

Each raises OSError with the call's errno. Worker threads may call all of them; setfsuid(2), setfsgid(2) and
`set_thread_groups` act on the calling thread alone, which is why glibc's setgroups(3) - it tells all threads - is not used.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import platform
from typing import Any

_libc = ctypes.CDLL(None, use_errno=True)
_brief = ctypes.PyDLL(
    None
)  # keeps the interpreter's lock: for calls that take less time than giving it up and getting it back
# setgroups(2) by number: asm/unistd.h
_SYS_SETGROUPS = {"x86_64": 116, "aarch64": 159, "ppc64le": 81, "s390x": 206, "riscv64": 159}[platform.machine()]
_SYS_IO_URING_REGISTER, _SYS_CACHESTAT = 427, 451  # asm-generic/unistd.h: the same everywhere
_IORING_REGISTER_IOWQ_MAX_WORKERS = 19  # linux/io_uring.h
_MAX_HANDLE_SZ = 128  # linux/exportfs.h
_AT_FDCWD = -100
_AT_EACCESS = 0x200
_AT_EMPTY_PATH = 0x1000
_UTIME_OMIT = (1 << 30) - 2  # linux/stat.h
_AT_STATX_FORCE_SYNC, _STATX_SIZE, _STATX_BYTES = 0x2000, 0x200, 256  # linux/fcntl.h, linux/stat.h

MNT_FORCE, MNT_DETACH = 1, 2

NFS_SUPER_MAGIC = 0x6969
FUSE_SUPER_MAGIC = 0x65735546
CIFS_SUPER_MAGIC = 0xFF534D42
SMB2_SUPER_MAGIC = 0xFE534D42
CEPH_SUPER_MAGIC = 0x00C36400
EXT4_SUPER_MAGIC = 0xEF53
XFS_SUPER_MAGIC = 0x58465342
BTRFS_SUPER_MAGIC = 0x9123683E
F2FS_SUPER_MAGIC = 0xF2F52010
TMPFS_MAGIC = 0x01021994


class _FileHandle(ctypes.Structure):
    _fields_ = (
        ("handle_bytes", ctypes.c_uint),
        ("handle_type", ctypes.c_int),
        ("f_handle", ctypes.c_ubyte * _MAX_HANDLE_SZ),
    )


class _Timespec(ctypes.Structure):
    _fields_ = (("tv_sec", ctypes.c_long), ("tv_nsec", ctypes.c_long))


class _Cachestat(ctypes.Structure):
    """struct cachestat of linux/mman.h: numbers of pages."""

    _fields_ = tuple(
        (name, ctypes.c_uint64)
        for name in ("nr_cache", "nr_dirty", "nr_writeback", "nr_evicted", "nr_recently_evicted")
    )


def _check(result: int, *names: bytes) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), *names[:1])


def setfsuid(uid: int) -> None:
    """Act as *uid* on files, in this thread. Raises EPERM if the kernel did not do it: the call itself reports nothing."""
    _libc.setfsuid(ctypes.c_uint(uid))
    if _libc.setfsuid(ctypes.c_uint(0xFFFFFFFF)) != ctypes.c_int(uid).value:
        raise OSError(errno.EPERM, f"setfsuid({uid})")


def setfsgid(gid: int) -> None:
    """Act as *gid* on files, in this thread. Raises EPERM if the kernel did not do it."""
    _libc.setfsgid(ctypes.c_uint(gid))
    if _libc.setfsgid(ctypes.c_uint(0xFFFFFFFF)) != ctypes.c_int(gid).value:
        raise OSError(errno.EPERM, f"setfsgid({gid})")


def set_thread_groups(groups: list[int]) -> None:
    """Set the supplementary groups of this thread alone."""
    array: Any = (ctypes.c_uint * len(groups))(*groups)
    _check(_libc.syscall(ctypes.c_long(_SYS_SETGROUPS), ctypes.c_size_t(len(groups)), array))


def renameat2(old_dir: int, old: bytes, new_dir: int, new: bytes, flags: int) -> None:
    """rename(2) with RENAME_NOREPLACE, RENAME_EXCHANGE or RENAME_WHITEOUT."""
    _check(_libc.renameat2(old_dir, old, new_dir, new, ctypes.c_uint(flags)), old)


def access(path: str, mode: int) -> None:
    """faccessat(2) for the identity that file systems see. os.access() makes EACCES of every error, EIO included."""
    _check(_libc.faccessat(_AT_FDCWD, path.encode(), mode, _AT_EACCESS), path.encode())


def set_times(path: str, atime_ns: int | None, mtime_ns: int | None) -> None:
    """utimensat(2); None leaves that time alone, which os.utime() cannot."""
    times = (_Timespec * 2)(
        *(_Timespec(*((0, _UTIME_OMIT) if ns is None else divmod(ns, 1_000_000_000))) for ns in (atime_ns, mtime_ns))
    )
    _check(_libc.utimensat(_AT_FDCWD, path.encode(), times, 0), path.encode())


def ask_for_size(fd: int) -> None:
    """Have a network file system ask its server for the size of *fd*, whatever it remembers; fstat(2) then has it."""
    flags = ctypes.c_int(_AT_EMPTY_PATH | _AT_STATX_FORCE_SYNC)
    _check(_libc.statx(fd, b"", flags, ctypes.c_uint(_STATX_SIZE), ctypes.create_string_buffer(_STATX_BYTES)))


def file_handle(fd: int) -> bytes:
    """The kernel's handle of an open file: it has the generation, so it tells a reused inode number from the old one.

    Empty where the file system has no handles; see name_to_handle_at(2).
    """
    handle = _FileHandle(handle_bytes=_MAX_HANDLE_SZ)
    mount_id = ctypes.c_int()
    result = _libc.name_to_handle_at(
        fd, b"", ctypes.byref(handle), ctypes.byref(mount_id), ctypes.c_int(_AT_EMPTY_PATH)
    )
    if result != 0:
        return b""
    return bytes(handle.f_handle[: handle.handle_bytes])


def file_system_magic(fd: int) -> int:
    """f_type of statfs(2), which os.statvfs leaves out."""
    buffer = ctypes.create_string_buffer(256)  # struct statfs has 120 bytes; f_type is its first word
    _check(_libc.fstatfs(fd, buffer))
    return int(ctypes.cast(buffer, ctypes.POINTER(ctypes.c_long))[0]) & 0xFFFFFFFF


_range = (ctypes.c_uint64 * 2)()
_cachestat = _Cachestat()
_brief.syscall.argtypes = (ctypes.c_long, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint)
_brief.syscall.restype = ctypes.c_long
_ADDRESSES = ctypes.addressof(_range), ctypes.addressof(_cachestat)


def is_cached(fd: int, offset: int, size: int) -> bool:
    """Whether all these bytes of a file are in the kernel's page cache, as cachestat(2) says (Linux 6.5). Never waits.

    For one thread alone: the structures are shared, because this stands before each small read.
    """
    _range[0], _range[1] = offset, size
    if _brief.syscall(_SYS_CACHESTAT, fd, *_ADDRESSES, 0) != 0:
        return False
    pages = (offset + size - 1) // mmap.PAGESIZE - offset // mmap.PAGESIZE + 1
    return bool(_cachestat.nr_cache >= pages)


def set_ring_workers(ring_fd: int, count: int) -> None:
    """Let io_uring have *count* threads of the kernel for files. Raises EINVAL before Linux 5.15."""
    counts = (ctypes.c_uint32 * 2)(count, 0)  # bounded: regular files; unbounded: 0 leaves it as it is
    result = _libc.syscall(
        ctypes.c_long(_SYS_IO_URING_REGISTER), ring_fd, _IORING_REGISTER_IOWQ_MAX_WORKERS, ctypes.byref(counts), 2
    )
    _check(result)


def mount(source: str, target: str, fstype: str) -> None:
    """Mount without flags or data."""
    _check(_libc.mount(source.encode(), os.fsencode(target), fstype.encode(), ctypes.c_ulong(0), None))


def umount(target: str, flags: int = 0) -> None:
    """umount2(2). Raises EBUSY while somebody uses the mount, unless *flags* has MNT_DETACH."""
    _check(_libc.umount2(os.fsencode(target), ctypes.c_int(flags)), os.fsencode(target))
