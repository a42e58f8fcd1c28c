"""What the tests of bad input share: a place with what may be in the way, and that one line is said and nothing is done."""

from __future__ import annotations

import os
import socket
import threading
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from iohang_fuse import socketname
from tests.harness import mounted_at

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import pytest


def make_place(tmp_path: Path) -> Path:
    """`src` and `mnt`, a `file`, a `loop` of links, and a `dead` socket."""
    for name in ("src", "mnt"):
        (tmp_path / name).mkdir()
    (tmp_path / "file").write_text("precious")
    (tmp_path / "loop").symlink_to("loop")
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(tmp_path / "dead"))
    return tmp_path


def tree(place: Path) -> dict[str, bytes | None]:
    found = (path for path in place.rglob("*") if path.name != socketname.LOCK)
    return {str(path): path.read_bytes() if path.is_file() else None for path in found}


@contextmanager
def nothing_is_done(place: Path) -> Iterator[None]:
    """No mount, no file (but for the lock of monitors' names, which stays), no socket, no process, no thread."""
    before, threads = tree(place), threading.active_count()
    yield
    assert tree(place) == before
    assert mounted_at(place / "mnt") == []
    assert threading.active_count() == threads
    assert not [pid for pid in Path("/proc").iterdir() if pid.name.isdigit() and str(place) in _command_line(pid)]


def _command_line(pid: Path) -> str:
    try:
        return (pid / "cmdline").read_text() if pid.name != str(os.getpid()) else ""
    except OSError:
        return ""


def check_line(stderr: str, program: str, says: str) -> None:
    """One line of *program*'s, in which the words of *says*, which `|` separates, stand in this order."""
    assert stderr.count("\n") == 1, stderr
    assert stderr.endswith("\n")
    assert stderr.startswith(f"{program}: ")
    assert len(stderr) < 600
    assert "Traceback" not in stderr
    rest = stderr
    for words in says.split("|"):
        assert words in rest, f"{words!r} in {stderr!r}"
        rest = rest.partition(words)[2]


def run_here(
    main: Callable[[list[str]], int], arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> tuple[int, str, str]:
    code = main(arguments)
    said = capsys.readouterr()
    return code, said.out, said.err
