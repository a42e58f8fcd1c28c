"""`backing.Backing` on real files: whole answers (P6), and opening anew without ever taking another file for the same."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from iohang_fuse import backing as backing_module
from iohang_fuse import source
from iohang_fuse.backing import Backing
from iohang_fuse.source import SERVER, Caller, NotTheSame, Opened, Where, find_again, identify, open_data

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

PLAIN = os.O_RDWR | os.O_CLOEXEC
DSYNC = PLAIN | os.O_DSYNC
NOBODY = Caller(65534, 65534, os.getpid())
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can act as another user")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(range(256)) * 16)
    return path


@pytest.fixture
def opened(file: Path) -> Iterator[Callable[..., Backing]]:
    backings = []

    def open_it(flags: int = PLAIN, opener: Caller = SERVER) -> Backing:
        backing = Backing(Opened(os.open(file, flags), flags, stable=bool(flags & os.O_DSYNC)), opener)
        backings.append(backing)
        return backing

    before = open_files()
    yield open_it
    for backing in backings:
        backing.close()
    assert open_files() == before, "descriptors leak"


def open_files() -> set[str]:
    """What this process has open, apart from the listing itself."""
    found = set()
    for name in os.listdir("/proc/self/fd"):
        try:
            found.add(f"{name} {os.readlink(f'/proc/self/fd/{name}')}")
        except OSError:
            continue
    return {line for line in found if "/proc/" not in line and "anon_inode" not in line}


def short(call: Callable[..., object], most: int) -> Callable[..., object]:
    """*call* (pread or pwrite) with at most *most* bytes at a time."""
    if call is os.pread:
        return lambda fd, size, offset: call(fd, min(size, most), offset)
    return lambda fd, data, offset: call(fd, bytes(data)[:most], offset)


# ---- P6: whole answers


@pytest.mark.parametrize("most", [1, 7, 100, 4095])
def test_a_short_read_is_continued(
    opened: Callable[..., Backing], file: Path, monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    """P6: a short read in the middle of a file is continued, never passed on short."""
    monkeypatch.setattr(backing_module.os, "pread", short(os.pread, most))
    assert opened().read(3, 1000) == file.read_bytes()[3:1003]


@pytest.mark.parametrize("most", [7, 10_000])
def test_a_read_is_short_at_the_end_of_the_file_only(
    opened: Callable[..., Backing], file: Path, monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    """P6: at the end of the file a read gives what there is; beyond it, nothing."""
    monkeypatch.setattr(backing_module.os, "pread", short(os.pread, most))
    backing = opened()
    assert backing.read(4000, 1000) == file.read_bytes()[4000:]
    assert backing.read(4096, 10) == b""
    assert backing.read(10**9, 10) == b""
    assert backing.read(100, 0) == b""


def test_a_read_that_fails_half_way_fails(opened: Callable[..., Backing], monkeypatch: pytest.MonkeyPatch) -> None:
    """P6: what was read before the error is no answer."""
    calls = []

    def half(_fd: int, size: int, offset: int) -> bytes:
        calls.append(offset)
        if len(calls) > 1:
            raise OSError(errno.EIO, "half way")
        return bytes(size // 2)

    monkeypatch.setattr(backing_module.os, "pread", half)
    with pytest.raises(OSError, match="half way"):
        opened().read(0, 100)
    assert calls == [0, 50]


@pytest.mark.parametrize("flags", [PLAIN, DSYNC])
@pytest.mark.parametrize("most", [1, 7, 100])
def test_a_short_write_is_continued(
    opened: Callable[..., Backing], file: Path, monkeypatch: pytest.MonkeyPatch, most: int, flags: int
) -> None:
    """P6: a short write is continued to the end of its data, each byte at its place."""
    monkeypatch.setattr(backing_module.os, "pwrite", short(os.pwrite, most))
    data = os.urandom(1000)
    before = file.read_bytes()
    assert opened(flags).write(50, data) == 1000
    assert file.read_bytes() == before[:50] + data + before[1050:]


def test_an_empty_write_is_done(opened: Callable[..., Backing], file: Path) -> None:
    """P6: nothing to write is not an error, and does not grow the file."""
    assert opened().write(10_000, b"") == 0
    assert file.stat().st_size == 4096


def test_a_write_that_goes_nowhere_is_an_error(opened: Callable[..., Backing], monkeypatch: pytest.MonkeyPatch) -> None:
    """P8: a pwrite that writes nothing and reports nothing is not tried for ever, be it the first or a later one."""
    for counts in ([0], [60, 0]):
        left = [*counts]
        monkeypatch.setattr(backing_module.os, "pwrite", lambda _fd, _data, _offset, left=left: left.pop(0))
        with pytest.raises(OSError, match="wrote nothing") as caught:
            opened().write(0, bytes(100))
        assert caught.value.errno == errno.EIO


def test_a_write_that_failed_half_way_is_written_again_as_a_whole(
    opened: Callable[..., Backing], file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Section 4: a retry is the whole original request again."""
    backing = opened(DSYNC)
    real = os.pwrite
    offsets = []

    def flaky(fd: int, data: bytes, offset: int) -> int:
        offsets.append(offset)
        if len(offsets) == 2:
            raise OSError(errno.EIO, "half way")
        return real(fd, bytes(data)[:60], offset)

    monkeypatch.setattr(backing_module.os, "pwrite", flaky)
    with pytest.raises(OSError, match="half way"):
        backing.write(0, b"x" * 100)
    assert backing.write(0, b"x" * 100) == 100
    assert offsets == [0, 60, 0, 60]
    assert file.read_bytes()[:101] == b"x" * 100 + bytes([100])


def test_size_and_sync(opened: Callable[..., Backing], file: Path) -> None:
    """Truncate changes the size, both ways; sync tells the size that is stable now."""
    for backing in (opened(), opened(DSYNC)):
        backing.truncate(10)
        assert file.stat().st_size == 10
        backing.truncate(100)
        assert file.stat().st_size == 100
        assert backing.sync(data_only=True) == 100
        assert backing.sync(data_only=False) == 100


# ---- set-ID bits


@as_root
@pytest.mark.parametrize("flags", [PLAIN, DSYNC])
@pytest.mark.parametrize("change", ["first write", "second write", "truncate"])
def test_set_id_bits_go_when_another_user_writes(
    opened: Callable[..., Backing], file: Path, change: str, flags: int
) -> None:
    """A write by a user without CAP_FSETID drops set-user-ID and set-group-ID bits; FUSE leaves that to us."""
    file.chmod(0o6777)
    backing = opened(flags, NOBODY)
    if change == "truncate":
        backing.truncate(5)
    else:
        backing.write(0, b"x")
    if change == "second write":
        file.chmod(0o6777)
        backing.write(0, b"x")
    assert stat.S_IMODE(file.stat().st_mode) == 0o777
    assert open_as_server(file), "the thread is the server again"


@as_root
@pytest.mark.parametrize("flags", [PLAIN, DSYNC])
def test_set_id_bits_stay_when_root_writes(opened: Callable[..., Backing], file: Path, flags: int) -> None:
    """As on SOURCE itself."""
    file.chmod(0o6777)
    opened(flags).write(0, b"x")
    assert stat.S_IMODE(file.stat().st_mode) == 0o6777


def open_as_server(file: Path) -> bool:
    """Whether this thread acts as root towards file systems."""
    ids = dict(line.split(":", 1) for line in Path("/proc/thread-self/status").read_text().splitlines())
    return [ids[key].split()[3] for key in ("Uid", "Gid")] == ["0", "0"] and file.exists()


# ---- O_DSYNC


def test_synchronous_writes_come_one_at_a_time(
    opened: Callable[..., Backing], file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """P3: Linux reports a failed writeback once per description: of two writes at once, the second would be told it is safe."""
    real, inside, most = os.pwrite, [], []

    def pwrite(fd: int, data: bytes, offset: int) -> int:
        inside.append(fd)
        most.append(len(inside))
        time.sleep(0.002)
        inside.remove(fd)
        return real(fd, data, offset)

    monkeypatch.setattr(backing_module.os, "pwrite", pwrite)
    for flags, expected in ((DSYNC, 1), (PLAIN, 8)):
        most.clear()
        backing = opened(flags)
        with ThreadPoolExecutor(8) as pool:
            assert [*pool.map(lambda n, b=backing: b.write(n * 10, b"0123456789"), range(64))] == [10] * 64
        assert (max(most) == 1) == (expected == 1)
    assert file.read_bytes()[:640] == b"0123456789" * 64


# ---- written again from the log


def test_the_log_is_written_in_order_and_synced(
    opened: Callable[..., Backing], file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """P3: "write the log again in order, and sync again": short writes continued, the sync last, on the same description."""
    calls: list[tuple[str, int]] = []
    real, sync = os.pwrite, os.fdatasync

    def pwrite(fd: int, data: bytes, offset: int) -> int:
        calls.append(("write", offset))
        return real(fd, bytes(data)[:3], offset)

    def fdatasync(fd: int) -> None:
        calls.append(("sync", fd))
        sync(fd)

    monkeypatch.setattr(backing_module.os, "pwrite", pwrite)
    monkeypatch.setattr(backing_module.os, "fdatasync", fdatasync)
    backing = opened()
    writes = [(0, b"old"), (4094, b"gr"), (4096, b"own"), (1, memoryview(b"new..")[:3])]
    assert backing.rewrite(writes, data_only=True) == 4099
    assert [call for call, _ in calls] == ["write", "write", "write", "write", "sync"]
    assert [offset for call, offset in calls if call == "write"] == [0, 4094, 4097, 1]  # neighbours together
    assert file.read_bytes()[:5] == b"onew\x04"
    assert file.read_bytes()[4094:] == b"grown"


def test_a_log_of_small_writes_is_written_in_large_ones(
    opened: Callable[..., Backing], file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """3,000 writes of 1 KiB, with a gap, are four of 1 MiB at most: over a network each costs a round trip."""
    sizes: list[int] = []
    real = os.pwrite
    monkeypatch.setattr(backing_module.os, "pwrite", lambda fd, data, at: sizes.append(len(data)) or real(fd, data, at))
    backing = opened()
    content = os.urandom(3000 << 10)
    writes = [(at + (512 if at >= 1500 << 10 else 0), content[at : at + 1024]) for at in range(0, 3000 << 10, 1024)]
    backing.rewrite(writes, data_only=True)
    assert sizes == [1 << 20, 476 << 10, 1 << 20, 476 << 10]
    middle = 1500 << 10
    assert file.read_bytes() == content[:middle] + bytes(512) + content[middle:]


# ---- opened anew


def where(file: Path, size: int = 0, *, path: bytes | None = None) -> Where:
    """What a node remembers of *file*."""
    found = identify(os.open(file, os.O_PATH))
    os.close(found.fd)
    return Where(str(file.parent), path or os.fsencode(file.name), found.stat.st_ino, found.key.handle, size)


def fd_of(backing: Backing) -> int:
    return backing._now.fd


def test_a_dead_descriptor_is_replaced(opened: Callable[..., Backing], file: Path) -> None:
    """Section 4: "opens the file anew by its name": reads and writes go on, and the old description is closed."""
    backing = opened()
    old = fd_of(backing)
    assert backing.renew(where(file))
    assert fd_of(backing) != old
    with pytest.raises(OSError, match="Bad file"):
        os.fstat(old)
    backing.write(0, b"anew")
    assert backing.read(0, 4) == b"anew"


def test_an_attempt_keeps_its_description_to_the_end(
    opened: Callable[..., Backing], file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An attempt that is inside a system call when the file is opened anew must not find its number taken by another file."""
    backing = opened()
    inside, go_on = threading.Event(), threading.Event()
    real = os.pread

    def pread(fd: int, size: int, offset: int) -> bytes:
        inside.set()
        go_on.wait(10)
        return real(fd, size, offset)

    monkeypatch.setattr(backing_module.os, "pread", pread)
    old = fd_of(backing)
    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit(backing.read, 0, 10)
        inside.wait(10)
        backing.renew(where(file))
        os.fstat(old)
        go_on.set()
        assert reading.result(10) == file.read_bytes()[:10]
    with pytest.raises(OSError, match="Bad file"):
        os.fstat(old)


@as_root
@pytest.mark.parametrize("opener", [SERVER, NOBODY])
def test_each_number_is_another_owner_with_the_same_rights(
    opened: Callable[..., Backing], file: Path, monkeypatch: pytest.MonkeyPatch, opener: Caller
) -> None:
    """Section 4: an image that had ESTALE is opened anew as another open-owner of NFS 4.1 (`source.owning` says why).

    A user, his group, and the set of his supplementary groups are an owner. The witness is opened as the same one.
    """
    file.chmod(0o666)
    file.parent.chmod(0o755)
    ours = os.getgroups()
    seen: list[tuple[int, ...]] = []
    backing = opened(opener=opener)
    real = os.open

    def note(path: str | bytes, *args: object, **more: object) -> int:
        if str(path).startswith("/proc/self/fd/"):
            seen.append(tuple(os.getgroups()))
        return real(path, *args, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(source.os, "open", note)
    for owner in range(1, 16 - len(ours)):
        backing.renew(where(file), owner)
        backing.another().close()
        assert seen[-1] == seen[-2], "the witness is the same owner"
    own = seen[::2]
    assert len(set(own)) == len(own) > 1, "each is another one"
    assert all(set(groups) <= {*ours, opener.gid} for groups in own), "and has no right that another one has not"
    assert all(len(groups) <= 16 for groups in own), "NFS sends no more"
    backing.renew(where(file), 1600)
    assert len(seen[-1]) <= 16
    assert os.getgroups() == ours


def test_who_may_not_set_groups_opens_the_file_all_the_same(
    opened: Callable[..., Backing], file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server that is not root, or has no CAP_SETGID."""

    def refuse(_groups: list[int]) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(source.syscalls, "set_thread_groups", refuse)
    backing = opened()
    old = fd_of(backing)
    assert backing.renew(where(file), 1)
    assert fd_of(backing) != old


@pytest.mark.parametrize("extra", [os.O_APPEND, os.O_TRUNC, os.O_CREAT | os.O_EXCL])
def test_flags_of_the_open_do_not_survive(file: Path, extra: int) -> None:
    """Section 4: "O_APPEND, O_CREAT, O_EXCL and O_TRUNC do not survive into a reopened one"."""
    fd = os.open(file, os.O_PATH)
    try:
        before = file.read_bytes()
        asked = extra & ~os.O_TRUNC | os.O_RDWR | os.O_DSYNC
        backing = Backing(open_data(fd, asked, SERVER, direct=True), SERVER)
    finally:
        os.close(fd)
    try:
        backing.renew(where(file))
        flags = fcntl.fcntl(fd_of(backing), fcntl.F_GETFL)
        assert not flags & (os.O_APPEND | os.O_TRUNC)
        assert flags & os.O_DSYNC
        assert file.read_bytes() == before
    finally:
        backing.close()


def test_a_file_that_was_moved_is_found_through_its_descriptor(opened: Callable[..., Backing], file: Path) -> None:
    """Its name is gone, or is another file's: the descriptor itself leads to the right one."""
    backing = opened()
    at = where(file)
    file.rename(file.with_name("moved"))
    file.write_bytes(b"another")
    assert backing.renew(at)
    backing.write(0, b"mine")
    assert file.read_bytes() == b"another"
    assert file.with_name("moved").read_bytes()[:4] == b"mine"


def another(file: Path) -> str:
    file.rename(file.with_name("old"))
    file.write_bytes(bytes(8192))
    return "another file"


def shorter(file: Path) -> str:
    os.truncate(file, 4095)
    return "shorter file"


def a_directory(file: Path) -> str:
    file.rename(file.with_name("old"))
    file.mkdir()
    return "something else"


def a_link(file: Path) -> str:
    file.rename(file.with_name("old"))
    file.symlink_to("old")
    return "something else"


@pytest.mark.parametrize("change", [another, shorter, a_directory, a_link])
def test_another_file_is_never_taken_for_the_same(
    opened: Callable[..., Backing], file: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[Path], str]
) -> None:
    """Section 4: "goes on only if it is the same file (inode number, type, and a size that is not smaller...)"."""
    backing = opened()
    old = fd_of(backing)
    at = where(file, 4096)
    reason = change(file)
    real = os.open

    def dead(path: str | bytes, *args: object, **more: object) -> int:  # the descriptor leads nowhere, as after ESTALE
        if path == f"/proc/self/fd/{old}":
            raise OSError(errno.ESTALE, "stale")
        return real(path, *args, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(source.os, "open", dead)
    with pytest.raises(NotTheSame, match=reason) as caught:
        backing.renew(at)
    monkeypatch.undo()
    assert caught.value.errno == errno.ESTALE
    assert fd_of(backing) == old


def test_an_inode_number_that_is_used_again_is_another_file(opened: Callable[..., Backing], file: Path) -> None:
    """The handle has the inode's generation: "an image that was replaced by another of the same name"."""
    at = where(file)
    if not at.handle:
        pytest.skip("this file system has no handles")
    with pytest.raises(NotTheSame, match="same inode number"):
        find_again(at._replace(handle=bytes(len(at.handle))))
    os.close(find_again(at).fd)
    os.close(find_again(at._replace(handle=b"")).fd)
    opened()


def test_a_file_without_a_name_is_found_through_its_descriptor(opened: Callable[..., Backing], file: Path) -> None:
    """An image that was unlinked while it is open."""
    backing = opened()
    at = where(file)._replace(path=None)
    file.unlink()
    assert backing.renew(at)
    backing.write(0, b"x")
    assert backing.read(0, 1) == b"x"


def test_no_link_on_the_way_is_followed(file: Path) -> None:
    """What was a directory when the file was opened, and is a link to elsewhere now, does not lead to the file."""
    elsewhere = file.parent / "elsewhere"
    elsewhere.mkdir()
    os.link(file, elsewhere / file.name)
    (file.parent / "link").symlink_to("elsewhere")
    with pytest.raises(OSError, match=r"Not a directory|loop"):
        find_again(where(file, path=b"link/" + os.fsencode(file.name)))
    os.close(find_again(where(file, path=b"elsewhere/" + os.fsencode(file.name))).fd)


def test_closing_may_fail(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """close(2) may report an error of the storage (NFS); the descriptor is gone all the same."""
    backing = Backing(Opened(os.open(file, PLAIN), PLAIN, stable=False), SERVER)
    real, closed = os.close, []

    def close(fd: int) -> None:
        real(fd)
        closed.append(fd)
        raise OSError(errno.EIO, "close")

    monkeypatch.setattr(backing_module.os, "close", close)
    with pytest.raises(OSError, match="close"):
        backing.close()
    monkeypatch.undo()
    assert closed == [fd_of(backing)]


def test_found_a_closed_description_in_use(opened: Callable[..., Backing], file: Path) -> None:
    """P5: a sync that waited while the last writer was closed must not go to that number, which may be another file's by now."""
    backing = opened()
    witness = backing.another()
    number = fd_of(witness)
    witness.close()
    stranger = os.open(file.with_name("stranger"), os.O_RDWR | os.O_CREAT)
    try:
        assert stranger == number, "the kernel gives the lowest number that is free"
        for use in (
            lambda: witness.rewrite([(0, b"lost")], data_only=True),
            lambda: witness.sync(data_only=True),
            lambda: witness.write(0, b"lost"),
        ):
            with pytest.raises(OSError, match="closed in the meantime"):
                use()
        assert file.with_name("stranger").read_bytes() == b""
    finally:
        os.close(stranger)
