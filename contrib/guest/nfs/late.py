"""Inside the Debian guest: writes that were given up, and may still lie in a socket (P5). What was seen goes to stdout, as JSON.

    python3 -m contrib.guest.nfs.late [--iohang OPTIONS]

A write to each of some blocks fails, because nothing gets through. Then all connections work again but one, which has such a
write in it; the consumer, who was told of the error, writes something else to the same blocks; then that connection works again,
too. What the consumer has written last is to stay. With `nconnect` a later write does not wait behind an earlier one.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import re
import sys
import threading
import time
from dataclasses import dataclass
from typing import Any

from contrib.guest.nfs import site
from contrib.guest.nfs.load import BLOCK_BYTES

KINDS = (
    site.Kind("late-v3", f"vers=3,soft,{site.QUICK},nolock", 21),
    site.Kind("late-v3-nconnect", f"vers=3,soft,{site.QUICK},nolock,nconnect=4", 22),
    site.Kind("late-v4.2-nconnect", f"vers=4.2,soft,{site.QUICK},nconnect=4", 23),
)

IOHANG = "timeout=3,interval=1"

_BLOCKS = 16
_LANDS_S = 45
"""A connection that was cut off for 20 s or so sends again within that time (the kernel doubles its pauses)."""
_LIMIT_S = 120


@dataclass(slots=True)
class Writer:
    """The consumer of one image."""

    fd: int
    failed: set[int]

    def write(self, block: int, letter: bytes) -> bool:
        """One block full of *letter*, by O_DIRECT."""
        buffer = mmap.mmap(-1, BLOCK_BYTES)
        buffer[:] = letter * BLOCK_BYTES
        try:
            return os.pwritev(self.fd, [buffer], block * BLOCK_BYTES) == BLOCK_BYTES
        except OSError:
            return False

    def write_all(self, letter: bytes) -> None:
        """All blocks at once; which have failed."""
        threads = [threading.Thread(target=self._try, args=(block, letter)) for block in range(_BLOCKS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def _try(self, block: int, letter: bytes) -> None:
        if not self.write(block, letter):
            self.failed.add(block)


def play(kind: site.Kind, way: str) -> dict[str, Any]:
    """The whole story, on one mount."""
    directory, host = (kind.bare, kind.host) if way == "bare" else (kind.iohang, site.other(kind.host))
    name = f"{kind.name}-{way}.img"
    image = kind.export / name
    image.write_bytes(b"0" * BLOCK_BYTES * _BLOCKS)
    writer = Writer(os.open(directory / name, os.O_RDWR | os.O_DIRECT), set())
    writer.write_all(b"1")  # each connection has been used
    _drop(host, None)
    began_s = time.monotonic()
    writer.write_all(b"X")
    failed_s = time.monotonic() - began_s
    waiting = _unsent(host)
    left = max(waiting, key=lambda port: waiting[port], default=0)
    _drop(host, left)
    rewritten_s = _rewrite(writer)
    _restore()
    time.sleep(_LANDS_S)
    os.close(writer.fd)
    data = image.read_bytes()
    found = "".join(chr(data[block * BLOCK_BYTES]) for block in range(_BLOCKS))
    return {
        "kind": kind.name,
        "way": way,
        "failed": len(writer.failed),
        "failed_after_s": round(failed_s, 1),
        "unsent_bytes": waiting,
        "rewritten_after_s": round(rewritten_s, 1),
        "found": found,
        "overwritten": sum(found[block] != "Y" for block in writer.failed),
    }


def _rewrite(writer: Writer) -> float:
    """Write something else to each block whose write has failed, until it succeeds."""
    began_s = time.monotonic()
    for block in sorted(writer.failed):
        while not writer.write(block, b"Y"):
            if time.monotonic() > began_s + _LIMIT_S:
                raise TimeoutError(f"block {block} could not be written again within {_LIMIT_S} s")
            time.sleep(0.2)
    return time.monotonic() - began_s


def _unsent(host: int) -> dict[int, int]:
    """Bytes that wait in each connection of *host*, by its port."""
    shown = site.run(*site.at(host), "ss", "-tnH", "dst", site.SERVER, "dport", "=", "2049")
    found = {}
    for line in shown.splitlines():
        if match := re.match(r"\S+ +\d+ +(\d+) +\S+:(\d+) ", line):
            found[int(match[2])] = int(match[1])
    return found


def _drop(host: int, port: int | None) -> None:
    """Nothing of *host* gets through; or only its connection from *port* is cut off."""
    source = f"ip saddr 10.77.0.{host} tcp dport 2049"
    rule = f"{source} drop" if port is None else f"{source} tcp sport {port} drop"
    table = f"table inet late {{\n chain in {{\n type filter hook input priority 0;\n {rule}\n }}\n}}\n"
    site.run("nft", "-f", "-", text=f"table inet late\ndelete table inet late\n{table}")


def _restore() -> None:
    site.run("nft", "delete", "table", "inet", "late")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--iohang", default=IOHANG, help="its options")
    options = parser.parse_args().iohang
    seen = []
    for kind in KINDS:
        site.mount(kind)
        site.mount_iohang(kind, options)
    for kind in KINDS:
        for way in ("bare", "iohang"):
            print(f"late: {kind.name}, {way}", file=sys.stderr, flush=True)
            seen.append(play(kind, way))
    for kind in KINDS:
        site.unmount(kind)
    json.dump(seen, sys.stdout)


if __name__ == "__main__":
    main()
