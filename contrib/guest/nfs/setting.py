"""Inside the Debian guest: what all scenes need. Makes what is not there yet, and changes the server's lease where it is another.

python3 -m contrib.guest.nfs.setting LEASE_S
"""

from __future__ import annotations

import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from contrib.guest.nfs import site
from contrib.guest.nfs.scene import IOHANG

_LEASE = Path("/proc/fs/nfsd/nfsv4leasetime")


def main() -> None:
    """The command line."""
    lease_s = int(sys.argv[1])
    site.make_network()
    site.start_server(lease_s)
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(site.mount, site.KINDS))
        list(pool.map(lambda kind: site.mount_iohang(kind, IOHANG), site.KINDS))


if __name__ == "__main__":
    main()
