"""umount.fuse.iohang-mount: whose server it waits for."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

from iohang_fuse import umount

if TYPE_CHECKING:
    import pytest


def test_only_servers_are_asked_for_their_command_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """To read the command line of a process that hangs in a page fault may take as long as that; one on this very mount, say.

    So nobody's is read but that of who has /dev/fuse open; and to be told of the mount point makes no server.
    """
    asked: list[int] = []

    def read(path: Path) -> bytes:
        asked.append(int(path.parent.name))
        return whole(path)

    whole = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", read)
    waits = ["sh", "-c", "read word", "sh", tmp_path]
    with (
        subprocess.Popen(waits, stdin=subprocess.PIPE) as guest,
        open("/dev/fuse", "rb") as fuse,
        subprocess.Popen(waits, stdin=subprocess.PIPE, pass_fds=[fuse.fileno()]) as server,
    ):
        assert umount._servers_of(str(tmp_path)) == [server.pid]
    assert server.pid in asked
    assert guest.pid not in asked
