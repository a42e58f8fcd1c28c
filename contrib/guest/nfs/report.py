"""What the scenes have seen, as a table, and what of it should not have been.

Pure: scene.py's values in, texts out.
"""

from __future__ import annotations

import collections
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

WAYS = {"bare": "bare", "iohang": "iohang-fuse"}
MODES = ("direct", "buffered")

_PAGE = """\
===============================
Outages on real NFS, one by one
===============================

.. This page is written by ``python -m contrib.guest.nfs --docs docs``.

Each cell was measured in a Debian guest, on the kernel's own NFS client and server (Linux {kernel}), by ::

    python -m contrib.guest.nfs --docs docs

An outage meets all mounts at the same time; each has a client host of its own.
On each work two consumers, one that writes and reads with O_DIRECT (QEMU with ``cache=none``), and one that writes, reads, and asks
for an fsync until it has a good one (``cache=writeback``); both go on after an error. The mounts have ``timeo=10,retrans=1``, so
that errors come at all. iohang-fuse has ``interval={interval}``, and ``timeout=5min`` but where a row says otherwise; the server's
lease is {lease} s but where a row says otherwise, and its grace period {grace} s.

*Errors*: what the consumers were told. *Lost*: bytes that were acknowledged (to the buffered consumer by an fsync that said 0), and
are not on the server afterwards. *Stale*: blocks that were read, and did not hold what was written last. The time is that from the
outage's end until the last consumer had a good answer again; on iohang-fuse it is to be one ``interval`` and 1 s at most. What it
means for the choice of options stands in `howto/nfs.rst <howto/nfs.rst>`_.

"""

_EXPECTED = """

What was to be expected
=======================

Of the bare mounts, by nfs(5), exports(5) and the source of Linux 6.1, whose functions are named.

"""


def problems(scene: dict[str, Any], *, again_s: float, errors_pass: Iterable[str] = ()) -> list[str]:
    """What iohang-fuse has promised, and has not kept. *again_s*: consumers go on no later after the end of the outage."""
    found = []
    for cell in scene["cells"]:
        if cell["way"] != "iohang":
            continue
        where = f"{scene['outage']}, {cell['kind']}"
        if not cell["recovered"]:
            found.append(f"{where}: did not recover")
        for mode in MODES:
            seen = cell[mode]
            wrong = {name: count for name, count in seen["errors"].items() if name.split()[1] not in errors_pass}
            if wrong:
                found.append(f"{where}, {mode}: errors {wrong}")
            if seen["lost_bytes"] or seen["misread_blocks"]:
                found.append(
                    f"{where}, {mode}: {seen['lost_bytes']} bytes lost, {seen['misread_blocks']} blocks misread"
                )
            if (seen["again_s"] or 0) > again_s:
                found.append(f"{where}, {mode}: went on after {seen['again_s']} s, and not within {again_s:g}")
            found += [f"{where}, {mode}: {words}" for words in _unpaired(cell["events"][mode])]
    return found


def _unpaired(events: Sequence[dict[str, Any]]) -> Iterator[str]:
    """P9: one begin, one end."""
    hangs = [event["set"] for event in events if event["event"] == "BLOCK_IO_HANG"]
    if hangs != [True, False] * (len(hangs) // 2):
        yield f"events {hangs}"


def cell_words(cell: dict[str, Any]) -> str:
    """`12 EIO, 24 KiB lost, 17 s`."""
    errors: collections.Counter[str] = collections.Counter()
    for mode in MODES:
        for name, count in cell[mode]["errors"].items():
            errors[name.split()[1]] += count
    words = [f"{count} {name}" for name, count in sorted(errors.items())] or ["no error"]
    lost = sum(cell[mode]["lost_bytes"] for mode in MODES)
    stale = sum(cell[mode]["misread_blocks"] for mode in MODES)
    if lost:
        words.append(f"{lost // 1024} KiB lost")
    if stale:
        words.append(f"{stale} stale")
    again = [cell[mode]["again_s"] for mode in MODES]
    words.append(f"{max(again):.1f} s" if cell["recovered"] and None not in again else "not again")
    return ", ".join(words)


def lines(scene: dict[str, Any]) -> list[str]:
    """A scene for a terminal."""
    head = f"{scene['what']} ({scene['seconds']:.0f} s)"
    return [head, *(f"  {cell['kind']:13} {WAYS[cell['way']]:12} {cell_words(cell)}" for cell in scene["cells"])]


def page(scenes: Sequence[dict[str, Any]], expected: Mapping[str, str], **values: object) -> str:
    """The page for docs/. *expected*: of a bare mount, by the outages' names."""
    kinds = list(dict.fromkeys(cell["kind"] for scene in scenes for cell in scene["cells"]))
    rows = [["outage", "", *kinds]]
    for scene in scenes:
        head = f"{scene['what']}, {scene['seconds']:.0f} s"
        for way, name in WAYS.items():
            cells = {cell["kind"]: cell_words(cell) for cell in scene["cells"] if cell["way"] == way}
            rows.append([head if way == "bare" else "", name, *(cells.get(kind, "") for kind in kinds)])
    body = "".join(_row(row) for row in rows)
    table = ".. list-table::\n   :header-rows: 1\n\n" + body
    expectations = "".join(f"*{scene['what']}*\n    {expected[scene['outage']]}\n\n" for scene in scenes)
    return _PAGE.format(**values) + table + _EXPECTED + expectations.rstrip("\n") + "\n"


def _row(cells: Sequence[str]) -> str:
    return "".join(f"   {'*' if number == 0 else ' '} - {text}".rstrip() + "\n" for number, text in enumerate(cells))
