"""Inside the Debian guest: writes that were given up, and may still lie in a socket (P5). What was seen goes to stdout, as JSON.

    python3 -m contrib.guest.nfs.late [--iohang OPTIONS]

1. *All*: a write to each of some blocks fails, because nothing gets through. Then all connections work again but one, which has
   such a write in it; the consumer, who was told of the error, writes something else to the same blocks.
2. *One*: only one connection is cut off. What is written by it fails; a consumer of iohang-fuse is not told, because it is tried
   again, and succeeds on another one. The consumer writes something else to the same blocks.

Then the connection works again, too. What the consumer has written last is to stay. With `nconnect` a later write does not wait
behind an earlier one.
"""

from __future__ import annotations

import argparse
import functools
import json
import mmap
import multiprocessing
import os
import re
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from contrib.guest.nfs import site
from contrib.guest.nfs.load import BLOCK_BYTES

if TYPE_CHECKING:
    from collections.abc import Sequence
    from multiprocessing.connection import Connection
    from pathlib import Path

KINDS = (
    site.Kind("late-v3", "vers=3,soft,nolock", 21),
    site.Kind("late-v3-nconnect", "vers=3,soft,nolock,nconnect=4", 22),
    site.Kind("late-v4.2-nconnect", "vers=4.2,soft,nconnect=4", 23),
)

IOHANG = "timeout=3,interval=1"

_BLOCKS = 6
_LANDS_S = 45
"""A connection that was cut off for 20 s or so sends again within that time (the kernel doubles its pauses)."""
_LIMIT_S = 120


class Writer:
    """The consumer of one image, in a process of its own: one that has it open must not fork and exec (scene.Hand says why)."""

    def __init__(self, image: Path) -> None:
        self.image = image
        self._ours, theirs = multiprocessing.Pipe()
        self._process = multiprocessing.get_context("fork").Process(target=_serve, args=(theirs, image), daemon=True)
        self._process.start()
        theirs.close()

    def write(self, letter: str, blocks: Sequence[int]) -> set[int]:
        """These blocks, at once, full of *letter*. Returns those whose write has failed."""
        self._ours.send((letter, blocks))
        if not self._ours.poll(_LIMIT_S):
            raise TimeoutError(f"no answer to a write within {_LIMIT_S} s")
        failed: set[int] = self._ours.recv()
        return failed

    def close(self) -> None:
        """End it."""
        self._ours.send(None)
        self._process.join(_LIMIT_S)


def _serve(orders: Connection, image: Path) -> None:
    fd = os.open(image, os.O_RDWR | os.O_DIRECT)
    with ThreadPoolExecutor(_BLOCKS) as pool:
        while order := orders.recv():
            letter, blocks = order
            written = pool.map(functools.partial(_write, fd, letter), blocks)
            orders.send({block for block, good in zip(blocks, written, strict=True) if not good})


def _write(fd: int, letter: str, block: int) -> bool:
    buffer = mmap.mmap(-1, BLOCK_BYTES)
    buffer[:] = letter.encode() * BLOCK_BYTES
    try:
        return os.pwritev(fd, [buffer], block * BLOCK_BYTES) == BLOCK_BYTES
    except OSError:
        return False


def begin(kind: site.Kind, way: str, cut: str) -> Writer:
    """A consumer with its image."""
    name = _image(kind, way, cut)
    (kind.export / name).write_bytes(b"0" * BLOCK_BYTES * _BLOCKS)
    return Writer((kind.bare if way == "bare" else kind.iohang) / name)


def _image(kind: site.Kind, way: str, cut: str) -> str:
    return f"{kind.name}-{way}-{cut}.img"


def play(kind: site.Kind, way: str, cut: str, writer: Writer) -> dict[str, Any]:
    """The whole story, on one mount."""
    host = kind.host if way == "bare" else site.other(kind.host)
    several = "nconnect" in kind.options  # and not by what is seen: version 3 connects anew from the same port
    everything = range(_BLOCKS)
    writer.write("1", everything)  # each connection has been used
    if cut == "all":
        _drop(host, None)
    else:
        _drop(host, next(iter(_unsent(host))))
    began_s = time.monotonic()
    failed = writer.write("X", everything)
    failed_s = time.monotonic() - began_s
    waiting = _unsent(host)
    if cut == "all" and several:
        _drop(host, max(waiting, key=lambda port: waiting[port], default=0))
    elif cut == "all":
        _restore(host)  # it waits in the only one there is
    again = failed if cut == "all" else set(everything)
    rewritten_s = _rewrite(writer, again)
    if several:
        _restore(host)
    time.sleep(_LANDS_S)
    writer.close()
    data = (kind.export / _image(kind, way, cut)).read_bytes()
    found = "".join(chr(data[block * BLOCK_BYTES]) for block in range(_BLOCKS))
    return {
        "kind": kind.name,
        "way": way,
        "cut": cut,
        "failed": len(failed),
        "failed_after_s": round(failed_s, 1),
        "unsent_bytes": waiting,
        "rewritten_after_s": round(rewritten_s, 1),
        "found": found,
        "overwritten": sum(found[block] != "Y" for block in again),
    }


def _rewrite(writer: Writer, failed: set[int]) -> float:
    """Write something else to each block whose write has failed, until it succeeds."""
    began_s = time.monotonic()
    left = failed
    while left := writer.write("Y", sorted(left)):
        if time.monotonic() > began_s + _LIMIT_S:
            raise TimeoutError(f"{writer.image}: blocks {left} could not be written again within {_LIMIT_S} s")
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
    table = f"table inet late{host} {{\n chain in {{\n type filter hook input priority 0;\n {rule}\n }}\n}}\n"
    site.run("nft", "-f", "-", text=f"table inet late{host}\ndelete table inet late{host}\n{table}")


def _restore(host: int) -> None:
    site.run("nft", "delete", "table", "inet", f"late{host}")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--iohang", default=IOHANG, help="its options")
    options = parser.parse_args().iohang
    for kind in KINDS:
        site.mount(kind)
        site.mount_iohang(kind, options)
    seen: list[dict[str, Any]] = []
    for cut in ("all", "one"):
        stories = [
            (kind, way) for kind in KINDS if cut == "all" or "nconnect" in kind.name for way in ("bare", "iohang")
        ]
        writers = [begin(kind, way, cut) for kind, way in stories]  # they fork; no thread is there yet
        with ThreadPoolExecutor(len(stories)) as pool:
            seen += pool.map(lambda story, writer, cut=cut: play(story[0], story[1], cut, writer), stories, writers)
    for kind in KINDS:
        site.unmount(kind)
    json.dump(seen, sys.stdout)


if __name__ == "__main__":
    main()
