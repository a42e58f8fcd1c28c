"""The ceiling that pyfuse3 sets as it comes: handlers that do nothing.

    python -m contrib.bench.empty_handlers MOUNTPOINT FILE BYTES

One file FILE of BYTES bytes: a read gives zeros, a write is thrown away, an fsync has nothing to do. pyfuse3's own main loop
serves it, with `min_tasks=64`, because tasks that come and go would be measured otherwise.
"""

from __future__ import annotations

import errno
import os
import stat
import sys
from typing import cast

import pyfuse3
import trio

FILE_INODE = pyfuse3.InodeT(2)
_ZEROS = memoryview(bytes(1 << 20))
"""As much as one FUSE read may ask for; nobody ever copies it but libfuse."""


class EmptyHandlers(pyfuse3.Operations):
    """The root directory and one file."""

    def __init__(self, name: bytes, size: int) -> None:
        super().__init__()
        self._name, self._size = name, size

    async def lookup(
        self, parent_inode: pyfuse3.InodeT, name: bytes, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        """The file, or ENOENT."""
        if parent_inode != pyfuse3.ROOT_INODE or name != self._name:
            raise pyfuse3.FUSEError(errno.ENOENT)
        return await self.getattr(FILE_INODE, ctx)

    async def getattr(self, inode: pyfuse3.InodeT, ctx: pyfuse3.RequestContext) -> pyfuse3.EntryAttributes:
        """Nothing of it ever changes."""
        del ctx
        entry = pyfuse3.EntryAttributes()
        entry.st_ino = inode
        directory = inode == pyfuse3.ROOT_INODE
        entry.st_mode = pyfuse3.ModeT(stat.S_IFDIR | 0o755 if directory else stat.S_IFREG | 0o644)
        entry.st_nlink = 1
        entry.st_size = 0 if directory else self._size
        return entry

    async def open(self, inode: pyfuse3.InodeT, flags: pyfuse3.FlagT, ctx: pyfuse3.RequestContext) -> pyfuse3.FileInfo:
        """Any number of times."""
        del flags, ctx
        return pyfuse3.FileInfo(fh=pyfuse3.FileHandleT(inode))

    async def read(self, fh: pyfuse3.FileHandleT, off: int, size: int) -> bytes:
        """Zeros."""
        del fh, off
        return cast("bytes", _ZEROS[:size])  # any contiguous buffer is taken

    async def write(self, fh: pyfuse3.FileHandleT, off: int, buf: bytes) -> int:
        """Taken, and forgotten."""
        del fh, off
        return len(buf)

    async def fsync(self, fh: pyfuse3.FileHandleT, datasync: bool) -> None:  # noqa: FBT001 - pyfuse3's signature
        """Nothing is dirty. Without a handler the kernel would not ask again, which nobody else gains from."""

    async def flush(self, fh: pyfuse3.FileHandleT) -> None:
        """See fsync."""

    async def release(self, fh: pyfuse3.FileHandleT) -> None:
        """Nothing is open."""


def main() -> None:
    """Serve until it is unmounted."""
    mountpoint, name, size = sys.argv[1:]
    options = {*pyfuse3.default_options, "fsname=empty_handlers"}
    pyfuse3.init(EmptyHandlers(os.fsencode(name), int(size)), mountpoint, options)
    try:
        trio.run(pyfuse3.main, 64)
    finally:
        pyfuse3.close(unmount=False)


if __name__ == "__main__":
    main()
