"""What the tests on a real mount share: a place on disk, mounts that several tests use, and a pair of directories each."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.harness import Mount
from tests.mount.callers import ROOT, User, as_user, outcome

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

OPEN_TO_ALL = "allow_other"
CHECKED_BY_KERNEL = "allow_other,default_permissions"


@dataclass(frozen=True)
class Pair:
    """A directory seen twice - on SOURCE and through the mount - and one like it beside them, which no mount shows."""

    source: Path
    mount: Path
    control: Path
    server: Mount

    def same(
        self, work: Callable[[Path], Any], prepare: Callable[[Path], object] | None = None, user: User = ROOT
    ) -> Any:
        """The outcome of *work* through the mount, which must be the one without a mount; *prepare* acts on SOURCE."""
        if prepare is not None:
            prepare(self.control)
            prepare(self.source)
        without = outcome(lambda: as_user(user, lambda: work(self.control)))
        through = outcome(lambda: as_user(user, lambda: work(self.mount)))
        assert through == without
        return through


class Mounts:
    """Mounts made on first use and kept to the end of the session, one for each file system beneath and set of options."""

    def __init__(self, place: Path) -> None:
        self._place = place
        self._mounts: dict[tuple[Path, str], tuple[Path, Mount]] = {}
        self._stack = ExitStack()
        self._pairs = 0

    def pair(self, options: str, disk: Path | None = None) -> Pair:
        """A new pair of directories that everybody may write."""
        disk = disk or self._place
        if (disk, options) not in self._mounts:
            number = len(self._mounts)
            source = disk / f"source-{number}"
            source.mkdir()
            server = Mount(
                source,
                self._place / f"mount-{number}",
                options,
                "monitor=none",
                log=self._place / f"log-{number}",
            )
            self._mounts[disk, options] = source, self._stack.enter_context(server)
        source, server = self._mounts[disk, options]
        self._pairs += 1
        name = f"test-{self._pairs}"
        control = source.parent / f"control-{self._pairs}"
        for directory in (source / name, control):
            directory.mkdir()
            directory.chmod(0o777)
        return Pair(source / name, server.mountpoint / name, control, server)

    def close(self) -> None:
        """Unmount all."""
        self._stack.close()


@pytest.fixture(scope="session", params=["uring", "threads"], autouse=True)
def engine(request: pytest.FixtureRequest) -> Iterator[str]:
    """All tests of this folder run once with each engine."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Mount, "engine", request.param)
        yield request.param


@pytest.fixture(scope="session")
def place(engine: str) -> Iterator[Path]:
    """A directory on a disk, which everybody may enter."""
    path = Path(tempfile.mkdtemp(prefix=f"iohang-{engine}-", dir="/var/tmp"))
    path.chmod(0o755)
    yield path
    shutil.rmtree(path)


@pytest.fixture(scope="session")
def memory(engine: str) -> Iterator[Path]:
    """A directory on a tmpfs, which everybody may enter."""
    path = Path(tempfile.mkdtemp(prefix=f"iohang-{engine}-", dir="/dev/shm"))
    path.chmod(0o755)
    yield path
    shutil.rmtree(path)


@pytest.fixture(scope="session")
def mounts(place: Path) -> Iterator[Mounts]:
    shared = Mounts(place)
    yield shared
    shared.close()


def _without_bugs(pair: Pair) -> Iterator[Pair]:
    before = len(pair.server.log_text())
    yield pair
    said = pair.server.log_text()[before:]
    assert "a bug in" not in said, said
    assert pair.server.process.poll() is None, said


@pytest.fixture
def pair(mounts: Mounts) -> Iterator[Pair]:
    """On a disk, open to all users, permissions checked by SOURCE alone."""
    yield from _without_bugs(mounts.pair(OPEN_TO_ALL))


@pytest.fixture(params=[OPEN_TO_ALL, CHECKED_BY_KERNEL])
def any_pair(mounts: Mounts, request: pytest.FixtureRequest) -> Iterator[Pair]:
    """The same with and without `default_permissions`."""
    yield from _without_bugs(mounts.pair(request.param))


@pytest.fixture
def memory_pair(mounts: Mounts, memory: Path) -> Iterator[Pair]:
    """On a tmpfs."""
    yield from _without_bugs(mounts.pair(OPEN_TO_ALL, memory))


@pytest.fixture(scope="session")
def program() -> Callable[..., str]:
    """`program("setfacl", "acl")`: where a program is, or a failure that names the package to install."""

    def find(name: str, package: str) -> str:
        path = shutil.which(name)
        if path is None:
            pytest.fail(f"{name} is missing: apt-get install {package}", pytrace=False)
        return path

    return find


@pytest.fixture
def run() -> Callable[..., str]:
    """`run("ls", path)`: the output of a program that succeeds."""

    def start(*arguments: str | Path) -> str:
        done = subprocess.run([*map(str, arguments)], capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{arguments}: {done.stderr}"
        return done.stdout

    return start


@pytest.fixture(scope="session")
def renameat2() -> Callable[[Path, Path, int], None]:
    """rename(2) with flags, which Python has not. Raises OSError."""
    libc = ctypes.CDLL(None, use_errno=True)

    def rename(old: Path, new: Path, flags: int) -> None:
        if libc.renameat2(-100, os.fsencode(old), -100, os.fsencode(new), ctypes.c_uint(flags)) != 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))

    return rename
