"""A flight's contract with requests.py, held by the real ones (a thread, the ring) and by the tests' own (trio's clock) alike."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import gc
import os
import socket
import sys
import threading
import time
from typing import TYPE_CHECKING

import pytest
import trio

from iohang_fuse import backing as backing_module
from iohang_fuse import engine as engine_module
from iohang_fuse import ring as ring_module
from iohang_fuse import source as source_module
from iohang_fuse.backing import Backing
from iohang_fuse.engine import Abandoned, Engine, Transfer, Unavailable
from iohang_fuse.source import SERVER, Opened, Where, open_data
from tests.shell.fakes import Sky

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from iohang_fuse.engine import Flight

MOMENT_S = 0.05  # the real ones fly in real time: the only test of this folder that waits


async def until(condition: Callable[[], object]) -> None:
    with trio.fail_after(20):
        while not condition():  # noqa: ASYNC110 - of threads, which set no trio.Event
            await trio.sleep(MOMENT_S / 5)


class HeldSky(Sky):
    """Whose flights land when the test says so."""

    def __init__(self, nursery: trio.Nursery) -> None:
        super().__init__(nursery)
        self.go = trio.Event()

    async def fly(self) -> None:
        await self.go.wait()


class Bench:
    """Makes flights of one kind, whose work ends when the test says so: no machine is too slow for these tests."""

    def __init__(self, kind: str, nursery: trio.Nursery) -> None:
        self.kind = kind
        self.sky = HeldSky(nursery)
        self.engine = Engine()
        nursery.start_soon(self.engine.serve)
        self.go = threading.Event()
        self.begun: list[None] = []
        self.late: list[float] = []

    def flight(self, work: Callable[[], object]) -> Flight[object]:
        """A flight that waits for `let_go` and then does *work*."""
        if self.kind == "fake":
            return self.sky.flight(work, self._landed_late)  # type: ignore[return-value]

        def slow_work() -> object:
            self.begun.append(None)
            assert self.go.wait(60), "nobody let it go"
            return work()

        return self.engine.flight(slow_work, self._landed_late)

    @property
    def aloft(self) -> int:
        """How many have begun; before `let_go`, that is how many are up."""
        return self.sky.aloft if self.kind == "fake" else len(self.begun)

    def let_go(self) -> None:
        """What has been started and what is started from now on ends."""
        self.sky.go.set()
        self.go.set()

    def _landed_late(self) -> None:
        self.late.append(trio.current_time())


@pytest.fixture(params=["real", "fake"])
def bench(request: pytest.FixtureRequest, nursery: trio.Nursery) -> Iterator[Bench]:
    bench = Bench(request.param, nursery)
    yield bench
    bench.go.set()  # a test that failed leaves no thread behind


async def test_a_flight_gives_the_result(bench: Bench) -> None:
    """`land` gives what the work returns, and the event loop goes on meanwhile."""
    turns = 0

    async def others() -> None:
        nonlocal turns
        while turns < 5:
            turns += 1
            await trio.sleep(MOMENT_S / 10)
        bench.let_go()  # a loop that did not go on would never come here

    async with trio.open_nursery() as nursery:
        nursery.start_soon(others)
        with trio.fail_after(20):
            assert await bench.flight(lambda: b"data").land() == b"data"
    assert turns == 5
    assert bench.late == []


async def test_a_flight_gives_the_exception(bench: Bench) -> None:
    """`land` raises what the work raises, errno and all."""

    def fails() -> None:
        raise OSError(errno.ETIMEDOUT, "Connection timed out")

    bench.let_go()
    with pytest.raises(OSError, match="timed out") as caught:
        await bench.flight(fails).land()
    assert caught.value.errno == errno.ETIMEDOUT
    assert bench.late == []


async def test_an_abandoned_flight_is_told_of_once_it_is_back(bench: Bench) -> None:
    """P8: a read that is given up is answered at once; its attempt goes on, and says when it has returned."""
    done = []
    flight = bench.flight(lambda: done.append(True))

    async def give_up() -> None:
        await trio.testing.wait_all_tasks_blocked()
        flight.abandon()
        flight.abandon()  # once more changes nothing

    async with trio.open_nursery() as nursery:
        nursery.start_soon(give_up)
        with pytest.raises(Abandoned), trio.fail_after(20):
            await flight.land()
    assert (done, bench.late) == ([], [])
    bench.let_go()
    await until(lambda: bench.late)
    await trio.testing.wait_all_tasks_blocked()
    assert (done, len(bench.late)) == ([True], 1)


async def test_a_flight_that_has_landed_cannot_be_abandoned(bench: Bench) -> None:
    """An answer that is there is not taken back, and nobody is told twice."""
    bench.let_go()
    flight = bench.flight(lambda: 1)
    assert await flight.land() == 1
    flight.abandon()
    await trio.testing.wait_all_tasks_blocked(MOMENT_S)
    assert bench.late == []


async def test_a_cancelled_flight_goes_on(bench: Bench) -> None:
    """A thread cannot be called back: the work is done, and the flight says when."""
    done = []
    with trio.move_on_after(MOMENT_S / 5) as scope:
        await bench.flight(lambda: done.append(True)).land()
    assert scope.cancelled_caught
    assert done == []
    bench.let_go()
    await until(lambda: bench.late)
    assert (done, len(bench.late)) == ([True], 1)


async def test_many_flights_fly_at_once(bench: Bench) -> None:
    """How many is the rehandle list's business: 64 are up together."""
    async with trio.open_nursery() as nursery:
        for _ in range(64):
            nursery.start_soon(bench.flight(lambda: None).land)
        await until(lambda: bench.aloft == 64)
        bench.let_go()


# ---- threads


async def test_without_a_thread_to_be_had_the_attempt_fails(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """P10: at the process's limit of threads an attempt fails with EAGAIN, which passes; nothing crashes."""
    assert await bench.engine.flight(lambda: 1, lambda: None).land() == 1
    stuck = threading.Event()

    def none_left(_thread: object) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(engine_module.threading.Thread, "start", none_left)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(bench.engine.flight(stuck.wait, lambda: None).land)  # has the thread that there is
        await trio.testing.wait_all_tasks_blocked()
        flight = bench.engine.flight(lambda: None, lambda: None)
        with pytest.raises(OSError, match="start new thread") as caught:
            await flight.land()
        assert caught.value.errno == errno.EAGAIN
        flight.abandon()
        stuck.set()
    assert await bench.engine.flight(lambda: 2, lambda: None).land() == 2, "once it is free again"


async def test_what_does_not_return_keeps_nobody_waiting(bench: Bench) -> None:
    """P7: 100 calls that do not return, and the next one is done all the same."""
    stuck = threading.Event()
    async with trio.open_nursery() as nursery:
        for _ in range(100):
            nursery.start_soon(bench.engine.flight(stuck.wait, lambda: None).land)
        await trio.testing.wait_all_tasks_blocked()
        with trio.fail_after(20):
            assert await bench.engine.flight(lambda: "next", lambda: None).land() == "next"
        stuck.set()


async def test_idle_threads_go(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """P10: what a burst has started ends when there is no more work, and what comes after it is done."""
    monkeypatch.setattr(engine_module, "_IDLE_S", MOMENT_S)
    together = threading.Barrier(21)
    async with trio.open_nursery() as nursery:
        for _ in range(20):
            nursery.start_soon(bench.engine.flight(lambda: together.wait(20), lambda: None).land)
        await trio.testing.wait_all_tasks_blocked()
        assert bench.engine.threads.count >= 20
        together.wait(20)
    await until(lambda: not bench.engine.threads.count)
    assert await bench.engine.flight(lambda: 1, lambda: None).land() == 1


def test_a_thread_that_outlives_the_server_is_no_error(capfd: pytest.CaptureFixture[str]) -> None:
    """P8: the server may end while an attempt hangs; when that returns, nobody is there to be told."""
    go, gone = threading.Event(), threading.Event()

    def work() -> None:
        go.wait(20)

    async def server() -> None:
        engine = Engine()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(engine.serve)
            with trio.move_on_after(MOMENT_S):
                await engine.flight(work, gone.set).land()
            nursery.cancel_scope.cancel()

    trio.run(server)
    others = {thread for thread in threading.enumerate() if thread.name == "iohang data"}
    assert others
    go.set()
    threading.Event().wait(MOMENT_S)
    assert not gone.is_set()
    assert capfd.readouterr() == ("", "")


# ---- reads and writes, on the ring and in threads alike


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "disk.img"
    file.write_bytes(bytes(range(256)) * 16)
    return file


class Place:
    """A real file, and an engine that works on it."""

    def __init__(self, engine: Engine, path: Path) -> None:
        self.engine = engine
        self.path = path
        self.late = 0

    def open(self, flags: int = os.O_RDWR) -> Backing:
        return Backing(
            Opened(os.open(self.path, flags), flags, stable=False, ring_reads=True, ring_writes=True), SERVER
        )

    def flight(self, backing: Backing, offset: int, size: int, data: bytes | None = None) -> Flight[object]:
        return self.engine.flight(Transfer(backing, offset, size, data), self._late, calm=True)

    async def read(self, backing: Backing, offset: int, size: int) -> object:
        return await self.flight(backing, offset, size).land()

    async def write(self, backing: Backing, offset: int, data: bytes) -> object:
        return await self.flight(backing, offset, len(data), data).land()

    def _late(self) -> None:
        self.late += 1


@pytest.fixture(params=["uring", "threads"])
def place(request: pytest.FixtureRequest, nursery: trio.Nursery, path: Path) -> Place:
    engine = Engine(request.param)
    assert engine.name == request.param
    nursery.start_soon(engine.serve)
    return Place(engine, path)


async def test_what_is_written_is_read(place: Place) -> None:
    """Reads and writes reach the file, each at its place; the description's own position plays no part."""
    backing = place.open()
    assert await place.write(backing, 100, b"hello") == 5
    assert await place.read(backing, 98, 9) == b"\x62\x63hello\x69\x6a"
    assert place.path.read_bytes()[100:105] == b"hello"
    backing.close()


async def test_a_read_is_short_at_the_end_alone(place: Place) -> None:
    """P6: "A short read ... in the middle of a file is continued, never passed on short"; at its end there is no more."""
    backing = place.open()
    assert await place.read(backing, 4090, 100) == bytes(range(250, 256))
    assert await place.read(backing, 4096, 10) == b""
    assert await place.read(backing, 1 << 40, 10) == b""
    backing.close()


async def test_an_error_has_its_errno(place: Place) -> None:
    """What the kernel said reaches the rehandle list as it is."""
    writing, reading = place.open(os.O_WRONLY), place.open(os.O_RDONLY)
    for flight in (place.flight(writing, 0, 10), place.flight(reading, 0, 1, b"x")):
        with pytest.raises(OSError, match="Bad file descriptor") as caught:
            await flight.land()
        assert caught.value.errno == errno.EBADF
    writing.close()
    reading.close()


async def test_many_at_once_each_its_own(place: Place) -> None:
    """500 writes and then 500 reads at once: each block is its own, and has its own data."""
    backing = place.open()
    blocks = [os.urandom(1000) for _ in range(500)]

    async def check(number: int) -> None:
        assert await place.read(backing, number * 1000, 1000) == blocks[number]

    async with trio.open_nursery() as nursery:
        for number, block in enumerate(blocks):
            nursery.start_soon(place.write, backing, number * 1000, block)
    async with trio.open_nursery() as nursery:
        for number in range(500):
            nursery.start_soon(check, number)
    assert place.path.read_bytes() == b"".join(blocks)
    assert place.engine.on_ring.count == 0
    backing.close()


@contextlib.contextmanager
def slow_file(tmp_path: Path) -> Iterator[tuple[Path, int]]:
    """A file of which a read does not return until something is written to the descriptor that comes with it."""
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    end = os.open(fifo, os.O_RDWR)
    yield fifo, end
    os.close(end)


async def test_an_abandoned_read_keeps_its_descriptor(place: Place, tmp_path: Path) -> None:
    """P8: it is answered at once, goes on, and says when it has returned; its descriptor is not closed, and not another's."""
    with slow_file(tmp_path) as (fifo, end):
        fd = os.open(fifo, os.O_RDONLY)
        # A FIFO has no offset: pread(2) and io_uring refuse one, so a thread's read(2) stands for a file that hangs.
        backing = Backing(Opened(fd, os.O_RDONLY, stable=False), SERVER)
        work = Transfer(backing, 0, 4)
        backing.read = lambda _offset, size: _read(backing, size)  # type: ignore[method-assign]
        flight = place.engine.flight(work, place._late, calm=True)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_abandoned, flight)
            await trio.sleep(MOMENT_S)
            flight.abandon()
        backing.close()
        assert fcntl.fcntl(fd, fcntl.F_GETFD) >= 0, "the attempt is still inside"
        assert place.late == 0
        os.write(end, b"data")
        await until(lambda: place.late)
        with pytest.raises(OSError, match="Bad file"):
            fcntl.fcntl(fd, fcntl.F_GETFD)


def _read(backing: Backing, size: int) -> bytes:
    description = backing.enter()
    try:
        return os.read(description.fd, size)
    finally:
        backing.leave(description)


async def _abandoned(flight: Flight[object]) -> None:
    with pytest.raises(Abandoned):
        await flight.land()


async def test_after_close_nothing_is_read_from_anothers_file(place: Place) -> None:
    """A descriptor's number may be another file's by now: ESTALE, and no attempt."""
    backing = place.open()
    backing.close()
    with pytest.raises(OSError, match="closed in the meantime") as caught:
        await place.read(backing, 0, 10)
    assert caught.value.errno == errno.ESTALE


# ---- the ring's own


@pytest.fixture
def ring(nursery: trio.Nursery, path: Path) -> Place:
    engine = Engine("uring")
    nursery.start_soon(engine.serve)
    return Place(engine, path)


async def test_the_ring_is_used_and_no_thread(ring: Place) -> None:
    """Issue: "data I/O without a Python thread per operation"."""
    backing = ring.open()
    for number in range(10):
        await ring.write(backing, number, b"x")
        await ring.read(backing, number, 1)
    assert ring.engine.threads.count == 0
    backing.close()


async def test_a_large_write_is_begun_before_the_loop_s_turn_is_over(ring: Place) -> None:
    """While the kernel copies it, the next one is received. Its result comes in a turn of the loop, as any."""
    backing, data, told = ring.open(), os.urandom(1 << 20), []
    ring.flight(backing, 0, len(data), data).take_off(told.append)
    end_s = time.monotonic() + 20
    while ring.path.read_bytes() != data:
        assert time.monotonic() < end_s, "it waits for the loop"
    assert told == []
    with trio.fail_after(20):
        while not told:
            await trio.lowlevel.checkpoint()
    assert told[0].unwrap() == 1 << 20
    backing.close()


async def test_what_the_ring_has_done_is_told_before_anything_else_in_that_turn(ring: Place) -> None:
    """A guest is woken once for all of it, because nothing new is taken before that is answered (receiver.py, point 5)."""
    assert ring.engine.ring is not None
    near, far = socket.socketpair()
    backing = ring.open()
    seen = []

    async def take(told: list[object]) -> None:
        await trio.lowlevel.wait_readable(near)
        near.recv(1)
        seen.append(len(told))

    for _ in range(20):  # trio has no order for those of one turn
        told: list[object] = []
        async with trio.open_nursery() as nursery:
            nursery.start_soon(take, told)
            await trio.testing.wait_all_tasks_blocked(0.001)
            ring.flight(backing, 0, 10).take_off(told.append)
            ring.engine.ring.hand_over()
            end_s = time.monotonic() + 20
            while not ring.engine.ring.is_done():
                assert time.monotonic() < end_s
            far.send(b"x")
    assert seen == [1] * 20
    backing.close()
    near.close()
    far.close()


async def test_what_was_read_may_go_at_once_to_who_has_asked(place: Place) -> None:
    """By the ring; where it is none, or not all of it could be had, the attempt has it. P6: "never passed on short"."""
    near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    near.settimeout(0)
    backing = place.open()

    def read(offset: int) -> Flight[object]:
        work = Transfer(backing, offset, 100)
        work.reply = far.fileno(), b"head"
        return place.engine.flight(work, place._late, calm=True)

    whole = await read(50).land()
    if place.engine.name == "uring":
        assert whole is None
        assert near.recv(1000) == b"head" + bytes(range(50, 150))
    else:
        assert whole == bytes(range(50, 150))
    assert await read(4090).land() == bytes(range(250, 256))
    assert await read(4096).land() == b""
    with pytest.raises(BlockingIOError):
        near.recv(1000)
    backing.close()
    near.close()
    far.close()


async def test_a_read_that_the_kernel_may_still_make_keeps_its_descriptor(
    ring: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has taken the read, and had no memory for the reply: the attempt goes on in a thread, and the number is nobody else's."""
    near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    near.settimeout(0)
    real = ring_module._enter
    monkeypatch.setattr(ring_module, "_enter", lambda number, fd, count, *rest: real(number, fd, min(count, 1), *rest))
    backing = ring.open()
    work = Transfer(backing, 50, 100)
    work.reply = far.fileno(), b"head"
    description = backing._now
    assert await ring.engine.flight(work, ring._late, calm=True).land() == bytes(range(50, 150))
    backing.close()
    os.fstat(description.fd)
    with pytest.raises(BlockingIOError):
        near.recv(1000)
    os.close(description.fd)
    near.close()
    far.close()


def test_what_comes_at_once_is_waited_for_awake(monkeypatch: pytest.MonkeyPatch) -> None:
    """What comes within `_AWAKE_S` is seen, again and again; where it was in vain, the next sleeps are not put off."""
    monkeypatch.setattr(engine_module, "_AWAKE_S", 0.001)
    patience = engine_module._Patience()
    asked: list[int] = []

    def comes(at: int) -> Callable[[], bool]:
        asked.clear()
        return lambda: len(asked) >= at or bool(asked.append(1))

    for _ in range(5):
        patience.wait(comes(3))
        assert len(asked) == 3
    patience.wait(comes(10**9))
    assert len(asked) > 10
    for _ in range(engine_module._SLEEPS):
        patience.wait(comes(3))
        assert not asked
    patience.wait(comes(3))
    assert len(asked) == 3


async def test_the_loop_stays_awake_for_a_request_when_nothing_is_under_way(ring: Place) -> None:
    """P7: what is under way in a thread ends the loop's sleep, and is not kept waiting by a look at /dev/fuse."""
    asked: list[int] = []
    ring.engine.request_waits = lambda: bool(asked.append(1))
    await trio.sleep(0.01)
    assert asked
    go, inside = threading.Event(), trio.Event()
    token = trio.lowlevel.current_trio_token()

    def work() -> None:
        token.run_sync_soon(inside.set)
        go.wait(20)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(ring.engine.flight(work, lambda: None).land)
        await inside.wait()
        asked.clear()
        for _ in range(2 * engine_module._SLEEPS):
            await trio.sleep(0.0001)
        assert not asked
        go.set()
    for _ in range(2 * engine_module._SLEEPS):
        await trio.sleep(0.0001)
    assert asked


@pytest.mark.parametrize("where", ["in threads", "on the ring"])
async def test_what_does_not_return_does_not_put_the_loop_to_sleep(
    ring: Place, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """P7: while attempts of one image hang, the loop goes on to stay awake for the requests of the others."""
    monkeypatch.setattr(engine_module, "_LATE_S", 0.05)
    asked: list[int] = []
    ring.engine.request_waits = lambda: bool(asked.append(1))
    go = threading.Event()
    under_way = ring.engine.threads.under_way if where == "in threads" else ring.engine.on_ring
    async with trio.open_nursery() as nursery:
        if where == "in threads":
            for _ in range(3):
                nursery.start_soon(ring.engine.flight(lambda: go.wait(20), lambda: None).land)
        else:
            ages = [under_way.begin() for _ in range(3)]
        with trio.fail_after(20):
            while under_way.late < 3:  # noqa: ASYNC110 - what is waited for is the clock
                await trio.sleep(0.0001)
        asked.clear()
        for _ in range(2 * engine_module._SLEEPS):
            await trio.sleep(0.0001)
        assert asked
        if where == "in threads":
            go.set()
        else:
            for age in ages:
                under_way.end(age)
    assert (under_way.count, under_way.late) == (0, 0)


def test_what_is_under_way_grows_late() -> None:
    """In whatever order it ends."""
    under_way = engine_module._UnderWay()
    ages = []
    for _ in range(4):
        ages.append(under_way.begin())
        under_way.mark()
    assert (under_way.count, under_way.late) == (4, 3)
    for age, late in zip([ages[3], ages[0], ages[2], ages[1]], [3, 2, 1, 0], strict=True):
        under_way.end(age)
        assert under_way.late == late
    under_way.mark()
    assert (under_way.count, under_way.late) == (0, 0)


@pytest.mark.parametrize("why", ["sick", "as its opener", "not fit for it"])
async def test_what_does_not_go_on_the_ring(ring: Place, why: str) -> None:
    """P7: a sick image, and what the ring's threads could wait for, stays off it; what needs the opener's rights, too."""
    backing = ring.open()
    backing.writes_on_ring = why != "not fit for it"
    work = Transfer(backing, 0, 1, b"x", as_opener=why == "as its opener")
    assert await ring.engine.flight(work, lambda: None, calm=why != "sick").land() == 1
    assert ring.engine.threads.count == 1
    backing.close()


async def test_what_was_on_the_ring_is_freed(ring: Place) -> None:
    """P10: data must not wait for the garbage collector."""
    backing = ring.open()
    gc.disable()
    try:
        for number in range(100):
            data = os.urandom(1000)
            await ring.write(backing, number, data)
            assert sys.getrefcount(data) == 2, "this one's, and the call's"
    finally:
        gc.enable()
    backing.close()


@pytest.mark.parametrize("count", [3, 0, -errno.EINTR, -errno.EAGAIN])
async def test_what_the_ring_leaves_over_is_done_in_a_thread(
    ring: Place, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    """P6: "A short read or write in the middle of a file is continued, never passed on short"; EINTR is tried again at once."""
    done = engine_module._RingFlight.done
    seen = []

    def cut(flight: engine_module._RingFlight, result: int, data: bytes) -> None:
        seen.append(result)
        done(flight, count, data)

    monkeypatch.setattr(engine_module._RingFlight, "done", cut)
    backing = ring.open()
    assert await ring.write(backing, 0, b"0123456789") == 10
    if count:  # a read of nothing is the end of the file
        assert await ring.read(backing, 0, 10) == b"0123456789"
    assert seen[0] == 10
    assert ring.path.read_bytes()[:10] == b"0123456789"
    backing.close()


@pytest.mark.parametrize("size", [1, 1 << 20])
async def test_what_the_kernel_has_no_memory_for_is_done_in_a_thread(
    ring: Place, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    """io_uring_enter(2) may fail; no attempt does for that."""
    monkeypatch.setattr(ring_module, "_enter", lambda *_: -1)
    backing = ring.open()
    with trio.fail_after(20):
        assert await ring.write(backing, 0, b"x" * size) == size
    assert ring.path.read_bytes()[:size] == b"x" * size
    assert (ring.engine.on_ring.count, ring.engine.threads.count) == (0, 1)
    monkeypatch.undo()
    assert await ring.write(backing, 0, b"y") == 1, "and the next one goes on the ring again"
    assert ring.engine.threads.count == 1
    backing.close()


async def test_a_bug_costs_one_request(
    ring: Place, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """P11: trio calls an instrument that has raised never again; what is collected next is collected all the same."""
    collect = ring_module.Ring.collect
    planted = []

    def buggy(self: ring_module.Ring) -> None:
        if not planted:
            planted.append(1)
            raise ZeroDivisionError("planted")
        collect(self)

    monkeypatch.setattr(ring_module.Ring, "collect", buggy)
    backing = ring.open()
    with trio.move_on_after(MOMENT_S):
        await ring.write(backing, 0, b"x")
    assert "planted" in caplog.text
    with trio.fail_after(20):
        assert await ring.write(backing, 0, b"y") == 1
    backing.close()


async def test_a_bug_in_what_a_thread_s_result_leads_to_costs_one_request(
    nursery: trio.Nursery, caplog: pytest.LogCaptureFixture
) -> None:
    """P11: the others' results are told of all the same."""
    engine = Engine()
    nursery.start_soon(engine.serve)

    def bug(_: object) -> None:
        raise ZeroDivisionError("planted")

    engine.flight(int, int).take_off(bug)
    with trio.fail_after(20):
        while "planted" not in caplog.text:  # noqa: ASYNC110 - of a thread's doing
            await trio.sleep(0.001)
        assert await engine.flight(int, int).land() == 0


def test_without_io_uring(monkeypatch: pytest.MonkeyPatch) -> None:
    """Issue: "`threads` where io_uring is not to be had"; who asks for uring by name is told why not."""

    def refused(_entries: int) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(engine_module, "Ring", refused)
    engine = Engine("auto")
    assert engine.name == "threads"
    assert engine.why_not == (
        "[Errno 1] Operation not permitted; see sysctl kernel.io_uring_disabled, and the unit's SystemCallFilter"
    )
    with pytest.raises(Unavailable, match="not permitted"):
        Engine("uring")


def test_without_a_wish_for_it_the_kernel_is_not_asked_for_io_uring(monkeypatch: pytest.MonkeyPatch) -> None:
    """A seccomp filter may kill whoever asks: engine=threads does not."""
    monkeypatch.setattr(ring_module, "_call", None)
    assert Engine("threads").name == "threads"
    with pytest.raises(TypeError):
        Engine("uring")


# ---- at once, from the page cache


@pytest.fixture
def cached(path: Path) -> Iterator[Backing]:
    """A file of which the page cache has all, on a file system that can be asked for that."""
    opened = open_data(os.open(path, os.O_PATH), os.O_RDWR, SERVER, direct=True)
    if not opened.nowait:
        pytest.skip(f"{path} lies on a file system that cannot be asked for what is cached (RWF_NOWAIT)")
    backing = Backing(opened, SERVER)
    backing.read(0, 4096)
    yield backing
    backing.close()


def test_what_is_cached_is_read_at_once(cached: Backing, path: Path) -> None:
    """Issue: "Where the source supports RWF_NOWAIT, cached reads are answered inline": whole, or not at all."""
    assert cached.read_cached(100, 50) == path.read_bytes()[100:150]
    assert cached.read_cached(0, 4096) == path.read_bytes()
    assert cached.read_cached(4000, 200) is None, "at its end an attempt has to tell how much there is"


def test_what_is_not_cached_is_not_asked_for(cached: Backing, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing may ever block the loop: RWF_NOWAIT would start to read from the disk, and may wait to hand that over."""
    os.fsync(cached.enter().fd)
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    asked = []
    monkeypatch.setattr(backing_module.os, "preadv", lambda *args: asked.append(args))
    assert cached.read_cached(0, 4096) is None
    assert asked == []


def test_reads_do_not_change_the_time_of_the_last_access(cached: Backing, path: Path) -> None:
    """That change waits for the journal of a disk that hangs, on the event loop: also of a descriptor that was opened anew."""

    def flags() -> int:
        description = cached.enter()
        cached.leave(description)
        return fcntl.fcntl(description.fd, fcntl.F_GETFL)

    assert flags() & os.O_NOATIME
    where = Where(str(path.parent), path.name.encode(), path.stat().st_ino, b"", 0)
    assert cached.renew(where)
    assert flags() & os.O_NOATIME
    assert cached.reads_cached


def test_a_descriptor_that_is_being_replaced_is_not_read_from(cached: Backing) -> None:
    """It may be closed, and its number another file's, between a look at it and the read: not without the lock, and no waiting."""
    with cached._lock:
        assert cached.read_cached(0, 10) is None
    assert cached.read_cached(0, 10) is not None
    cached._now.closed = True
    assert cached.read_cached(0, 10) is None
    cached._now.closed = False


def test_small_answers_stay_and_large_ones_until_the_next(cached: Backing, path: Path) -> None:
    """A large one is copied to the kernel before anything else is read; a small one may be changed by nobody."""
    content = os.urandom(1 << 20)
    path.write_bytes(content)
    cached.read(0, 1 << 20)
    first, second = cached.read_cached(0, 4096), cached.read_cached(4096, 64 << 10)
    for size in (100 << 10, 1 << 20):
        assert cached.read_cached(0, size) == content[:size]
    assert (first, second) == (content[:4096], content[4096 : 68 << 10])


def test_nothing_that_may_wait_is_done_under_the_lock_that_the_loop_takes(
    cached: Backing, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """P7: opening anew takes as long as the storage does; the event loop takes this lock before each attempt."""
    calls = []

    class Watched:
        """os, which tells which calls were made, and that none was under the lock."""

        def __getattr__(self, name: str) -> object:
            real = getattr(os, name)
            if not callable(real) or name == "strerror":
                return real

            def call(*args: object, **kwargs: object) -> object:
                assert not cached._lock.locked(), name
                calls.append(name)
                return real(*args, **kwargs)

            return call

    def without_atime(fd: int) -> bool:
        assert not cached._lock.locked()
        calls.append("fcntl")
        return source_module.without_atime(fd)

    monkeypatch.setattr(backing_module, "os", Watched())
    monkeypatch.setattr(backing_module, "without_atime", without_atime)
    where = Where(str(path.parent), path.name.encode(), path.stat().st_ino, b"", 0)
    assert cached.renew(where)
    cached.sync(data_only=True)
    assert {"fstat", "fcntl", "close", "fdatasync"} <= {*calls}
