"""The flaky source, but with root_squash: root's requests are done as nobody. A program: its arguments are iohang-flaky's."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from iohang_fuse import filesystem, flaky
from iohang_fuse.source import Caller

if TYPE_CHECKING:
    import pyfuse3

NOBODY = Caller(65534, 65534, 0)


def squash(ctx: pyfuse3.RequestContext) -> Caller:
    """The caller as an NFS server with root_squash would have it."""
    return NOBODY if ctx.uid == 0 else Caller(ctx.uid, ctx.gid, ctx.pid)


if __name__ == "__main__":
    filesystem._caller = squash
    sys.exit(flaky.main())
