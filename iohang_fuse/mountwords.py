"""The words of a mount: which go to libfuse, which are for mount(8) alone, and which cannot be, with the reason.

Pure tables. Their sources are fuse_mount_opts[] in libfuse's lib/mount.c (3.14.0 to 3.18.2), mount(8) and fstab(5).
"""

from __future__ import annotations

import os

# What libfuse takes in every version from 3.14.0 to 3.18.2: fuse_mount_opts[] in its lib/mount.c.
OPPOSITE = {
    "ro": "rw",
    "nosuid": "suid",
    "nodev": "dev",
    "noexec": "exec",
    "sync": "async",
    "noatime": "atime",
}
OPPOSITE |= {yes: no for no, yes in OPPOSITE.items()}
FLAGS = frozenset({*OPPOSITE, "dirsync", "allow_other", "default_permissions"})
CONTEXTS = frozenset({"context", "fscontext", "defcontext", "rootcontext"})

DROPPED = frozenset(
    {
        # For mount(8) itself: mount.fuse3 strips most of them, a helper of one's own gets them.
        *("defaults", "_netdev", "nofail", "auto", "noauto", "comment", "uhelper", "helper"),
        *("user", "nouser", "users", "nousers", "owner", "noowner", "group", "nogroup"),
        # Legitimate in fstab and handed on by mount(8), but libfuse 3.14.0 refuses them. They tune when a
        # timestamp is written, which is SOURCE's affair, or they state a default.
        *("relatime", "norelatime", "strictatime", "nostrictatime", "diratime", "nodiratime"),
        *("lazytime", "nolazytime", "iversion", "noiversion"),
        *("mand", "nomand", "silent", "loud", "symfollow"),
    }
)

_INTERNAL = "the server sets it itself; leave it out"
_BLOCK_DEVICE = "for block devices only; leave it out"
_OWNERSHIP = "owners and modes are those of SOURCE; leave it out"
_CACHING = "SOURCE can change elsewhere, too; leave it out"
_ATTR_TIMEOUT = "one option rules them all; say attr_timeout"
_PRIVILEGES = "the server needs its privileges to act as its callers; leave it out"

REFUSED = {
    "remount": "this file system cannot be remounted; unmount and mount again",
    "auto_unmount": "after a crash a guest could write into the bare directory; leave it out",
    "nosymfollow": "libfuse before 3.17 cannot set it; leave it out, knowingly",
    "max_read": "it ends the mount; the sizes are negotiated with the kernel; leave it out",
    "nonempty": "libfuse 3 always allows that; leave it out",
    "allow_root": "not supported; say allow_other with default_permissions",
    "direct_io": "decided for each open file; see the option direct",
    "debug": "not an option here; say log_level=debug, or -v",
    **dict.fromkeys(("subtype", "fd", "rootmode", "user_id", "group_id"), _INTERNAL),
    **dict.fromkeys(("blkdev", "blksize", "loop"), _BLOCK_DEVICE),
    **dict.fromkeys(("umask", "uid", "gid"), _OWNERSHIP),
    **dict.fromkeys(("kernel_cache", "auto_cache"), _CACHING),
    **dict.fromkeys(("entry_timeout", "negative_timeout", "ac_attr_timeout"), _ATTR_TIMEOUT),
    **dict.fromkeys(("setuid", "drop_privileges"), _PRIVILEGES),
}
"""Words that mean something to libfuse or to mount(8), with the reason why not here, and what to do."""


def libfuse_escaped(word: str) -> str:
    r"""*word* so that libfuse's `-o` takes it for one word, and pyfuse3, which encodes as ASCII, takes it.

    Backslash, comma and all but printable ASCII become `\ooo`; see process_real_option_group() in libfuse's
    lib/fuse_opt.c.
    """
    return "".join(
        chr(byte) if 0x20 <= byte < 0x7F and byte not in b"\\," else f"\\{byte:03o}" for byte in os.fsencode(word)
    )
