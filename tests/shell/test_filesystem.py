"""What the file system gives the device for requests that have no task. All else of it is tested through a mount."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Any

import pyfuse3
import pytest
import trio

from iohang_fuse.filesystem import Filesystem
from iohang_fuse.rehandle import RehandleList
from tests.core.world import policy
from tests.shell.fakes import Shell

if TYPE_CHECKING:
    from trio.testing import MockClock


@pytest.fixture
def shell(nursery: trio.Nursery, autojump_clock: MockClock) -> Shell:  # noqa: ARG001
    return Shell.on(nursery, policy())


@pytest.fixture
def filesystem(shell: Shell) -> Filesystem:
    made = Filesystem.__new__(Filesystem)  # without SOURCE
    made._requests = shell.requests
    return made


def _begin(filesystem: Filesystem, op: str, number: int) -> Any:
    """What is left to do."""
    left: list[Any] = []

    def never(_: object) -> None:
        raise AssertionError

    if op == "read":
        filesystem.begin_read(number, 0, 4096, (-1, b""), never, left.append)
    else:
        filesystem.begin_write(number, 0, bytes(4096), never, left.append)
    (more,) = left
    return more


@pytest.mark.parametrize("op", ["read", "write"])
async def test_a_bug_costs_one_request(
    shell: Shell, filesystem: Filesystem, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, op: str
) -> None:
    """P11: it is answered EIO, and counted; nothing is raised at who takes the requests of all images."""

    def bug(*_: object, **__: object) -> None:
        raise ZeroDivisionError

    bugs = Filesystem.bugs
    monkeypatch.setattr(RehandleList, "arrive", bug)
    more = _begin(filesystem, op, shell.handle.number)
    with pytest.raises(pyfuse3.FUSEError) as caught:
        await more()
    assert (caught.value.errno, Filesystem.bugs) == (errno.EIO, bugs + 1)
    assert f"a bug in _finish_{op}" in caplog.text


@pytest.mark.parametrize("op", ["read", "write"])
async def test_a_handle_that_is_not_there(filesystem: Filesystem, op: str) -> None:
    """The kernel asks for none. One request has an error, and the mount stays."""
    more = _begin(filesystem, op, 4711)
    with pytest.raises(pyfuse3.FUSEError):
        await more()


async def test_what_a_read_that_has_failed_comes_to(shell: Shell, filesystem: Filesystem) -> None:
    """Its errno, as FUSEError."""
    shell.requests.hold_no_more()
    shell.storage.errno = errno.ESTALE
    left: list[Any] = []
    filesystem.begin_read(shell.handle.number, 0, 4096, (-1, b""), left.append, left.append)
    await trio.sleep(1)
    with pytest.raises(pyfuse3.FUSEError) as caught:
        await left[0]()
    assert caught.value.errno == errno.ESTALE
