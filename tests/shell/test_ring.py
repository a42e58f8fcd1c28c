"""io_uring itself, in each of the ways in which kernels tell what is done."""

from __future__ import annotations

import errno
import gc
import os
import select
import socket
import struct
import time
from typing import TYPE_CHECKING

import pytest

from iohang_fuse import ring as ring_module
from iohang_fuse.ring import Ring

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

ENTRIES = 8


class Outcome:
    """An operation that remembers what it was told."""

    def __init__(self) -> None:
        self.result: int | None = None
        self.data: bytes | None = b""

    def done(self, result: int, data: bytes | None) -> None:
        assert self.result is None, "told once"
        self.result, self.data = result, None if data is None else bytes(data[: max(result, 0)])


@pytest.fixture(params=range(len(ring_module._WAYS)), ids=["cooperative", "by interrupt"])
def ring(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Ring:
    """What this kernel cannot do, it refuses with EINVAL: then there is nothing to be seen of that way here."""
    monkeypatch.setattr(ring_module, "_WAYS", ring_module._WAYS[request.param : request.param + 1])
    return Ring(ENTRIES)


@pytest.fixture
def fd(tmp_path: Path) -> Iterator[int]:
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(range(256)) * 16)
    number = os.open(path, os.O_RDWR)
    yield number
    os.close(number)


def wait(ring: Ring, *outcomes: Outcome) -> None:
    """As the event loop does: hand over, sleep until the descriptor is readable, collect."""
    end_s = time.monotonic() + 20
    ready = select.poll()
    ready.register(ring.fileno, select.POLLIN)
    while any(outcome.result is None for outcome in outcomes):
        ring.about_to_wait()
        assert ready.poll(max(end_s - time.monotonic(), 0) * 1000), "nobody was told, and there is something to be told"
        os.eventfd_read(ring.fileno)
        ring.waited()
        ring.collect()


def test_reads_and_writes(ring: Ring, fd: int) -> None:
    """Each at its place."""
    read, write, again = Outcome(), Outcome(), Outcome()
    ring.read(read, fd, 100, 50)
    ring.write(write, fd, 4000, b"hello")
    wait(ring, read, write)
    assert (read.result, read.data, write.result) == (50, bytes(range(100, 150)), 5)
    ring.read(again, fd, 4000, 5)
    wait(ring, again)
    assert again.data == b"hello"


def test_errors_and_short_counts_are_told(ring: Ring, fd: int) -> None:
    """The kernel's own words; what to make of them is for others."""
    bad, short, end = Outcome(), Outcome(), Outcome()
    ring.write(bad, 10_000, 0, b"x")
    ring.read(short, fd, 4090, 100)
    ring.read(end, fd, 1 << 40, 10)
    wait(ring, bad, short, end)
    assert (bad.result, short.result, end.result) == (-errno.EBADF, 6, 0)
    assert short.data[:6] == bytes(range(250, 256))


def test_the_queues_go_round(ring: Ring, fd: int) -> None:
    """Many times their lengths, in batches of each size that there is room for: each is told its own."""
    number = 0
    for batch in [*range(1, ENTRIES + 1)] * 20:
        outcomes = []
        for _ in range(batch):
            assert ring.room > 0
            outcome = Outcome()
            ring.read(outcome, fd, number % 4000, 4)
            outcomes.append((number % 4000, outcome))
            number += 1
        assert ring.room == ENTRIES - batch
        wait(ring, *(outcome for _, outcome in outcomes))
        assert all(outcome.data == bytes((at + n) % 256 for n in range(4)) for at, outcome in outcomes)


def test_what_is_done_while_nobody_waits_is_collected(ring: Ring, fd: int) -> None:
    """A busy loop does not sleep: `collect` alone finds what is done."""
    outcome = Outcome()
    ring.waited()
    ring.read(outcome, fd, 0, 4)
    ring.hand_over()
    end_s = time.monotonic() + 20
    while outcome.result is None and time.monotonic() < end_s:
        ring.collect()
    assert outcome.result == 4


def test_what_is_hurried_is_begun_before_all_is_handed_over(ring: Ring, fd: int) -> None:
    """And what is put there afterwards goes with all else."""
    early, late = Outcome(), Outcome()
    ring.write(early, fd, 0, b"early")
    ring.hurry()
    end_s = time.monotonic() + 20
    while os.pread(fd, 5, 0) != b"early":
        assert time.monotonic() < end_s, "it waits"
    ring.write(late, fd, 5, b"late")
    wait(ring, early, late)
    assert (early.result, late.result, os.pread(fd, 9, 0)) == (5, 4, b"earlylate")
    ring.hurry()  # nothing is there
    assert ring.room == ENTRIES


def test_what_was_done_before_one_waits_ends_the_wait(ring: Ring, fd: int) -> None:
    """P7: an answer that is there must not sleep until the next one comes."""
    for _ in range(300):
        outcome = Outcome()
        ring.waited()
        ring.read(outcome, fd, 0, 4)
        ring.hand_over()
        wait(ring, outcome)
        assert outcome.result == 4


def test_what_is_done_can_be_seen_awake(ring: Ring, fd: int) -> None:
    """Without a system call: the event loop looks for a moment before it sleeps."""
    assert not ring.is_done()
    outcome = Outcome()
    ring.waited()
    ring.read(outcome, fd, 0, 4)
    ring.hand_over()
    end_s = time.monotonic() + 20
    while not ring.is_done() and time.monotonic() < end_s:
        pass
    assert ring.is_done()
    ring.collect()
    assert outcome.result == 4


def test_large_reads_have_memory_of_their_own(tmp_path: Path) -> None:
    """As many at once as there are, each its own bytes, until the next `hand_over`; then the memory is used again."""
    path = tmp_path / "large.img"
    content = os.urandom(4 << 20)
    path.write_bytes(content)
    ring, fd = Ring(64), os.open(path, os.O_RDONLY)
    for _ in range(5):
        kept: list[tuple[int, bytes]] = []

        class Copied(Outcome):
            def __init__(self, at: int, kept: list[tuple[int, bytes]] = kept) -> None:
                super().__init__()
                self.at, self.kept = at, kept

            def done(self, result: int, data: bytes | None) -> None:
                super().done(result, data)
                self.kept.append((self.at, data))

        outcomes = [Copied(number * 100_000) for number in range(30)]
        for outcome in outcomes:
            ring.read(outcome, fd, outcome.at, 1 << 20)
        ring.hand_over()
        end_s = time.monotonic() + 20
        while any(outcome.result is None for outcome in outcomes) and time.monotonic() < end_s:
            ring.collect()  # and not `hand_over`, which takes the memory back
        ring.hurry()  # does not take it back, either
        ring.read(Outcome(), fd, 3, 1 << 20)
        ring.hurry()
        while not ring.is_done():
            assert time.monotonic() < end_s
        assert all(bytes(data) == content[at : at + (1 << 20)] for at, data in kept)
        assert len(kept) == 30
        ring.collect()
    ring.hand_over()
    assert len(ring._buffers) == ring_module._MOST_BUFFERS
    short = Outcome()
    ring.read(short, fd, (4 << 20) - 5, 1 << 20)
    wait(ring, short)
    assert short.result == 5
    os.close(fd)


HEAD = b"sixteen bytes..."
SMALL, LARGE = 700, ring_module.LARGE_BYTES + 512
sizes = pytest.mark.parametrize("size", [SMALL, LARGE], ids=["small", "large"])


@pytest.fixture
def content(tmp_path: Path) -> bytes:
    content = os.urandom(1 << 20)
    (tmp_path / "content.img").write_bytes(content)
    return content


@pytest.fixture
def content_fd(tmp_path: Path, content: bytes) -> Iterator[int]:
    assert content
    number = os.open(tmp_path / "content.img", os.O_RDONLY)
    yield number
    os.close(number)


@pytest.fixture
def asker() -> Iterator[tuple[socket.socket, int]]:
    """Who gets the reply, as one message as from /dev/fuse, and the descriptor that it is written to."""
    near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    far.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4 << 20)
    near.settimeout(20)
    with near, far:
        yield near, far.fileno()


@pytest.fixture
def replying() -> Ring:
    return Ring(ENTRIES)


@sizes
def test_a_reply_is_made_of_what_was_read(
    replying: Ring, content: bytes, content_fd: int, asker: tuple[socket.socket, int], size: int
) -> None:
    """Again and again, whatever was in that memory before: the head, and behind it the bytes that were asked for."""
    near, far = asker
    before = len(ring_module._aloft)
    for number in range(3 * ring_module._MOST_BUFFERS):
        outcome, head = Outcome(), HEAD[:-2] + b"%02d" % number
        replying.read(outcome, content_fd, number, size, (far, head))
        replying.hand_over()
        assert near.recv(1 << 20) == head + content[number : number + size], "though nobody has collected anything"
        wait(replying, outcome)
        assert (outcome.result, outcome.data) == (size, None)
    assert len(replying._buffers) <= 1
    assert len(ring_module._aloft) == before


@sizes
def test_a_short_read_has_no_reply(
    replying: Ring, content: bytes, content_fd: int, asker: tuple[socket.socket, int], size: int
) -> None:
    """What becomes of it is not for the kernel to decide. P6: "never passed on short"."""
    near, far = asker
    before = len(ring_module._aloft)
    short, end = Outcome(), Outcome()
    replying.read(short, content_fd, (1 << 20) - 100, size, (far, HEAD))
    replying.read(end, content_fd, 1 << 30, size, (far, HEAD))
    wait(replying, short, end)
    assert (short.result, short.data) == (100, content[-100:])
    assert (end.result, end.data) == (0, b"")
    assert len(ring_module._aloft) == before
    near.settimeout(0)
    with pytest.raises(BlockingIOError):
        near.recv(100)


def test_a_failed_read_has_no_reply(replying: Ring, tmp_path: Path, asker: tuple[socket.socket, int]) -> None:
    """Its errno is told, as without one."""
    near, far = asker
    folder = os.open(tmp_path, os.O_RDONLY)
    before = len(ring_module._aloft)
    outcome = Outcome()
    replying.read(outcome, folder, 0, SMALL, (far, HEAD))
    wait(replying, outcome)
    assert outcome.result == -errno.EISDIR
    assert len(ring_module._aloft) == before
    near.settimeout(0)
    with pytest.raises(BlockingIOError):
        near.recv(100)
    os.close(folder)


@sizes
def test_a_reply_that_is_refused_leaves_what_was_read(
    replying: Ring, content: bytes, content_fd: int, size: int
) -> None:
    """Whoever waits for it may have gone, or the kernel may have no memory: it is for the loop to find out."""
    before = len(ring_module._aloft)
    outcome = Outcome()
    replying.read(outcome, content_fd, 5, size, (10_000, HEAD))
    wait(replying, outcome)
    assert (outcome.result, outcome.data) == (size, content[5 : 5 + size])
    assert len(ring_module._aloft) == before


@sizes
def test_before_linux_5_19_there_are_no_replies(
    content: bytes,
    content_fd: int,
    asker: tuple[socket.socket, int],
    monkeypatch: pytest.MonkeyPatch,
    size: int,
) -> None:
    """Whoever reads gets the bytes."""
    near, far = asker
    outcome = Outcome()
    monkeypatch.setattr(ring_module, "_WAYS", ring_module._WAYS[1:])
    ring = Ring(ENTRIES)
    ring.read(outcome, content_fd, 5, size, (far, HEAD))
    wait(ring, outcome)
    assert (outcome.result, outcome.data) == (size, content[5 : 5 + size])
    near.settimeout(0)
    with pytest.raises(BlockingIOError):
        near.recv(100)


hurried = pytest.mark.parametrize("is_hurried", [False, True], ids=["handed over", "hurried"])


@sizes
@hurried
@pytest.mark.parametrize("taken", [0, 1])
def test_a_read_with_a_reply_that_is_not_taken_is_told_once(
    replying: Ring,
    content_fd: int,
    content: bytes,
    asker: tuple[socket.socket, int],
    monkeypatch: pytest.MonkeyPatch,
    taken: int,
    size: int,
    is_hurried: bool,  # noqa: FBT001 - a parameter
) -> None:
    """The kernel has no memory for both, or for the reply, which must not go out by itself then: nobody knows what it would say."""
    near, far = asker
    real, calls = ring_module._enter, []

    def few(number: int, ring_fd: int, count: int, *rest: object) -> int:
        calls.append(count)
        return real(number, ring_fd, 1, *rest) if taken else -1  # and another one, if it is asked again

    outcome, behind, more = Outcome(), Outcome(), Outcome()
    before = len(ring_module._aloft)
    replying.read(outcome, content_fd, 7, size, (far, HEAD))
    with monkeypatch.context() as patch:
        patch.setattr(ring_module, "_enter", few)
        if is_hurried:
            replying.hurry()
            replying.write(behind, far, 0, b"behind it")
            replying.hurry()
            assert (outcome.result, behind.result) == (None, None)
        replying.hand_over()
    wait(replying, outcome)
    assert behind.result == (-errno.EAGAIN if is_hurried else None), "it comes after what was not taken"
    assert (outcome.result, outcome.data) == (-errno.EAGAIN, None if taken else b"")
    assert len(calls) == (3 if is_hurried and not taken else 1)
    assert replying.room == ENTRIES
    assert sum(one is not None for _, one in ring_module._aloft.values()) == before + taken, (
        "into which the kernel reads"
    )
    replying.read(more, content_fd, 9, size, (far, HEAD))
    wait(replying, more)
    assert (more.result, more.data) == (size, None)
    assert len(ring_module._aloft) == before + taken
    assert near.recv(1 << 20) == HEAD + content[9 : 9 + size]


def test_many_are_collected_at_once(fd: int) -> None:
    """In one round of the loop."""
    ring = Ring(512)
    ring.waited()
    outcomes = [Outcome() for _ in range(300)]
    for number, outcome in enumerate(outcomes):
        ring.read(outcome, fd, number, 4)
    ring.hand_over()
    time.sleep(0.3)  # the kernel's threads; nobody can be asked whether they are done without collecting
    ring.collect()
    assert sum(outcome.result == 4 for outcome in outcomes) > 200
    wait(ring, *outcomes)


def test_what_was_done_before_a_refusal_ends_the_wait(ring: Ring, fd: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there is no memory for the next one, what the system call would have brought is signalled all the same."""
    real, done, refused = ring_module._enter, Outcome(), Outcome()

    def no_memory(number: int, ring_fd: int, count: int, *rest: object) -> int:
        return -1 if count else real(number, ring_fd, count, *rest)

    ring.waited()
    ring.read(done, fd, 0, 4)
    ring.hand_over()
    time.sleep(0.05)
    ring.write(refused, fd, 0, b"x")
    with monkeypatch.context() as patch:
        patch.setattr(ring_module, "_enter", no_memory)
        ring.about_to_wait()
    ready = select.poll()
    ready.register(ring.fileno, select.POLLIN)
    assert ready.poll(0)
    ring.collect()
    assert (done.result, refused.result) == (4, -errno.EAGAIN)


def test_a_bug_costs_one_operation(ring: Ring, fd: int, caplog: pytest.LogCaptureFixture) -> None:
    """P11: the others are told, of those that are done as of those that the kernel has refused."""

    class Buggy(Outcome):
        def done(self, result: int, data: bytes | None) -> None:
            super().done(result, data)
            raise ZeroDivisionError("planted")

    outcomes = [Buggy(), Outcome(), Buggy(), Outcome()]
    for outcome in outcomes:
        ring.read(outcome, fd, 0, 4)
    wait(ring, *outcomes)
    assert [outcome.result for outcome in outcomes] == [4] * 4
    assert caplog.text.count("a bug in what is done") == 2


def test_no_operation_begins_in_the_system_call(ring: Ring, fd: int) -> None:
    """Nothing may ever block the loop: each has IOSQE_ASYNC, where linux/io_uring.h has the flags."""
    outcomes = [Outcome(), Outcome()]
    ring.read(outcomes[0], fd, 0, 4)
    ring.write(outcomes[1], fd, 0, b"x")
    for index in range(2):
        opcode, flags = struct.unpack_from("=BB", ring._sqes, index * 64)
        assert (opcode, flags) == ((22, 23)[index], 1 << 4)
    wait(ring, *outcomes)


@hurried
def test_what_the_kernel_does_not_take_is_told_so(
    ring: Ring,
    fd: int,
    monkeypatch: pytest.MonkeyPatch,
    is_hurried: bool,  # noqa: FBT001 - a parameter
) -> None:
    """In its order, and what comes after it is handed over as ever."""
    real, calls, order = ring_module._enter, [], []

    class Ordered(Outcome):
        def done(self, result: int, data: bytes | None) -> None:
            super().done(result, data)
            order.append(self)

    def one_alone(number: int, ring_fd: int, count: int, *rest: object) -> int:
        """It takes one, and has no memory for the others."""
        calls.append(count)
        return real(number, ring_fd, 1, *rest) if len(calls) == 1 else -1

    outcomes = [Ordered() for _ in range(4)]
    for outcome in outcomes:
        ring.read(outcome, fd, 0, 4)
    with monkeypatch.context() as patch:
        patch.setattr(ring_module, "_enter", one_alone)
        if is_hurried:
            ring.hurry()
            assert order == []
        ring.hand_over()
    assert order == outcomes[1:]
    assert [outcome.result for outcome in order] == [-errno.EAGAIN] * 3
    assert ring.room == ENTRIES
    more = Outcome()
    ring.write(more, fd, 0, b"more")
    wait(ring, outcomes[0], more)
    assert (outcomes[0].result, more.result) == (4, 4)


def test_memory_outlives_the_ring(fd: int) -> None:
    """The kernel may still write into it when the server has ended: it must not be anybody else's by then."""
    before = len(ring_module._aloft)
    ring = Ring(ENTRIES)
    for _ in range(ENTRIES):
        ring.read(Outcome(), fd, 0, 4096)
    ring.hand_over()
    del ring
    gc.collect()
    assert len(ring_module._aloft) == before + ENTRIES


def test_nothing_is_left_of_a_ring(fd: int) -> None:
    """P10: nor is it there for a child process."""
    gc.collect()  # what other tests have left
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        ring = Ring(ENTRIES)
        assert not any(os.get_inheritable(number) for number in (ring.fileno, ring._fd))
        outcome = Outcome()
        ring.read(outcome, fd, 0, 4)
        wait(ring, outcome)
        del ring
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_kernel_without_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """The errno of io_uring_setup(2); EINVAL alone means that another way may do."""
    tried = []

    def refuse(*_: object) -> int:
        tried.append(1)
        ring_module.ctypes.set_errno(errno.ENOSYS)
        return -1

    monkeypatch.setattr(ring_module, "_call", refuse)
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(OSError, match="not implemented") as caught:
        Ring(ENTRIES)
    assert caught.value.errno == errno.ENOSYS
    assert len(tried) == 1
    assert len(os.listdir("/proc/self/fd")) == before


def test_without_a_descriptor_left_nothing_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    """P10: at the process's limit there is no ring, and nothing of one."""

    def none_left(*_: object) -> int:
        raise OSError(errno.EMFILE, "Too many open files")

    before = len(os.listdir("/proc/self/fd"))
    monkeypatch.setattr(ring_module.os, "eventfd", none_left)
    with pytest.raises(OSError, match="Too many"):
        Ring(ENTRIES)
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_kernel_that_is_too_old_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before Linux 5.6 each way is EINVAL, which says nothing to anybody."""

    def refuse(*_: object) -> int:
        ring_module.ctypes.set_errno(errno.EINVAL)
        return -1

    monkeypatch.setattr(ring_module, "_call", refuse)
    with pytest.raises(OSError, match=r"before 5\.6"):
        Ring(ENTRIES)
