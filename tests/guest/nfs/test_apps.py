"""fio, QEMU's block layer and SQLite on a real NFS client, through an outage, bare and with iohang-fuse."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from contrib.guest.nfs.guest import Guest

pytestmark = [pytest.mark.slow, pytest.mark.long]

KINDS = ("v3-softerr", "v4.2-soft")
PROGRAMS = ("fio", "qemu-io none", "qemu-io writeback", "sqlite wal", "sqlite delete")
METADATA = {"sqlite delete"}
"""Opens, makes and unlinks a file for each transaction: that is never held, and fails as it does on the bare mount."""


@pytest.fixture(scope="module")
def seen(guest: Guest) -> dict[str, Any]:
    guest.set_up()
    found: dict[str, Any] = json.loads(guest.python("apps"))
    return found


def cells(seen: dict[str, Any], way: str) -> dict[tuple[str, str], dict[str, Any]]:
    return {(cell["kind"], cell["program"]): cell for cell in seen["cells"] if cell["way"] == way}


def test_all_were_there(seen: dict[str, Any]) -> None:
    for way in ("bare", "iohang"):
        assert set(cells(seen, way)) == {(kind, program) for kind in KINDS for program in PROGRAMS}


def test_no_program_sees_an_error(seen: dict[str, Any]) -> None:
    """P1, P6: "The guest sees a pause, never an I/O error." For each program, and the pause is the outage."""
    for where, cell in cells(seen, "iohang").items():
        assert cell["ended"], f"{where} does not end: {cell}"
        assert not cell["misread"], f"{where}: {cell}"
        if where[1] not in METADATA:
            assert not cell["errors"], f"{where}: {cell}"
            assert cell["again"], f"{where} does not go on: {cell}"
            assert cell["longest_s"] > seen["seconds"] / 2, f"{where}: the outage was no pause: {cell}"


def test_nothing_acknowledged_is_lost(seen: dict[str, Any]) -> None:
    """P3: "An fsync answered 0 means that every write acknowledged before it is on stable storage"; DELETE journals included."""
    for where, cell in cells(seen, "iohang").items():
        assert cell["acknowledged"], f"{where}: {cell}"
        assert cell["lost"] == 0, f"{where}: {cell}"
        assert cell.get("integrity", "ok") == "ok", f"{where}: {cell}"


def test_on_the_bare_mounts_it_was_an_outage(seen: dict[str, Any]) -> None:
    """What the above is worth: without iohang-fuse most programs had errors, or were ended by one.

    Not each: on 4.2 the first error takes 20 s, and a program whose first call comes late has its answer before that.
    """
    for kind in KINDS:
        noticed = {
            program
            for (one, program), cell in cells(seen, "bare").items()
            if one == kind and (cell["errors"] or cell["misread"] or cell.get("crash") or not cell["ended"])
        }
        assert len(noticed) >= 3, f"{kind}: {noticed}"
