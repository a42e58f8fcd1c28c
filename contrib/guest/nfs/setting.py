"""Inside the Debian guest: the server, and all mounts of it. Made anew where the server's lease is to be another one.

    python3 -m contrib.guest.nfs.setting LEASE_S [TIMING]

TIMING is the mounts' `timeo` and `retrans`, as nfs(5) has them.
"""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor

from contrib.guest.nfs import site
from contrib.guest.nfs.scene import IOHANG


def main() -> None:
    """The command line."""
    lease_s, timing = int(sys.argv[1]), (*sys.argv[2:], site.QUICK)[0]
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(site.unmount, [kind for kind in site.KINDS if kind.iohang.is_mount()]))
        site.make_network()
        site.start_server(lease_s)
        list(pool.map(lambda kind: site.mount(kind, timing), site.KINDS))
        list(pool.map(lambda kind: site.mount_iohang(kind, IOHANG), site.KINDS))


if __name__ == "__main__":
    main()
