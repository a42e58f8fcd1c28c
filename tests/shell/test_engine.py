"""A flight's contract with requests.py, held by the real one (a thread) and by the tests' own (trio's clock) alike."""

from __future__ import annotations

import errno
import threading
from typing import TYPE_CHECKING

import pytest
import trio

from iohang_fuse.engine import Abandoned, Flight
from tests.shell.fakes import Sky

if TYPE_CHECKING:
    from collections.abc import Callable

MOMENT_S = 0.05  # the real one flies in real time: the only test of this folder that waits


class Bench:
    """Makes flights of one kind, whose work ends when the test says so."""

    def __init__(self, kind: str, nursery: trio.Nursery) -> None:
        self.kind = kind
        self.sky = Sky(nursery, takes_s=lambda: MOMENT_S)
        self.late: list[float] = []

    def flight(self, work: Callable[[], object]) -> Flight[object]:
        """A flight that takes a moment and then does *work*."""
        if self.kind == "fake":
            return self.sky.flight(work, self._landed_late)  # type: ignore[return-value]

        def slow_work() -> object:
            threading.Event().wait(MOMENT_S)
            return work()

        return Flight(slow_work, self._landed_late)

    def _landed_late(self) -> None:
        self.late.append(trio.current_time())


@pytest.fixture(params=["real", "fake"])
def bench(request: pytest.FixtureRequest, nursery: trio.Nursery) -> Bench:
    return Bench(request.param, nursery)


async def test_a_flight_gives_the_result(bench: Bench) -> None:
    """`land` gives what the work returns, and the event loop goes on meanwhile."""
    turns = 0

    async def others() -> None:
        nonlocal turns
        while True:
            turns += 1
            await trio.sleep(MOMENT_S / 10)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(others)
        assert await bench.flight(lambda: b"data").land() == b"data"
        nursery.cancel_scope.cancel()
    assert turns > 1
    assert bench.late == []


async def test_a_flight_gives_the_exception(bench: Bench) -> None:
    """`land` raises what the work raises, errno and all."""

    def fails() -> None:
        raise OSError(errno.ETIMEDOUT, "Connection timed out")

    with pytest.raises(OSError, match="timed out") as caught:
        await bench.flight(fails).land()
    assert caught.value.errno == errno.ETIMEDOUT
    assert bench.late == []


async def test_an_abandoned_flight_is_told_of_once_it_is_back(bench: Bench) -> None:
    """P8: a read that is given up is answered at once; its attempt goes on, and says when it has returned."""
    done = []
    flight = bench.flight(lambda: done.append(True))
    began_s = trio.current_time()

    async def give_up() -> None:
        await trio.sleep(MOMENT_S / 5)
        flight.abandon()
        flight.abandon()  # once more changes nothing

    async with trio.open_nursery() as nursery:
        nursery.start_soon(give_up)
        with pytest.raises(Abandoned):
            await flight.land()
        assert (done, bench.late) == ([], [])
    await trio.sleep(4 * MOMENT_S)
    assert done == [True]
    assert len(bench.late) == 1
    assert bench.late[0] >= began_s + MOMENT_S * 0.9


async def test_a_flight_that_has_landed_cannot_be_abandoned(bench: Bench) -> None:
    """An answer that is there is not taken back, and nobody is told twice."""
    flight = bench.flight(lambda: 1)
    assert await flight.land() == 1
    flight.abandon()
    await trio.sleep(2 * MOMENT_S)
    assert bench.late == []


async def test_a_cancelled_flight_goes_on(bench: Bench) -> None:
    """A thread cannot be called back: the work is done, and the flight says when."""
    done = []
    with trio.move_on_after(MOMENT_S / 5):
        await bench.flight(lambda: done.append(True)).land()
    assert done == []
    await trio.sleep(4 * MOMENT_S)
    assert (done, len(bench.late)) == ([True], 1)


async def test_many_flights_fly_at_once(bench: Bench) -> None:
    """How many is the rehandle list's business: 64 take as long as one."""
    began_s = trio.current_time()
    async with trio.open_nursery() as nursery:
        for _ in range(64):
            nursery.start_soon(bench.flight(lambda: None).land)
    assert trio.current_time() - began_s < 20 * MOMENT_S


async def test_without_a_thread_to_be_had_the_attempt_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """P10: at the process's limit of threads an attempt fails with EAGAIN, which passes; nothing crashes."""

    def none_left(*_args: object) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr("trio.lowlevel.start_thread_soon", none_left)
    flight = Flight(lambda: None, lambda: None)
    with pytest.raises(OSError, match="start new thread") as caught:
        await flight.land()
    assert caught.value.errno == errno.EAGAIN
    flight.abandon()


def test_a_thread_that_outlives_the_server_is_no_error() -> None:
    """P8: the server may end while an attempt hangs; when that returns, nobody is there to be told."""
    go, gone = threading.Event(), threading.Event()

    def work() -> None:
        go.wait(5)

    async def server() -> None:
        flight = Flight(work, lambda: None)
        deliver = flight._deliver

        def delivered(result: object) -> None:
            deliver(result)  # type: ignore[arg-type]
            gone.set()

        flight._deliver = delivered  # type: ignore[method-assign]
        with trio.move_on_after(MOMENT_S):
            await flight.land()

    trio.run(server)
    go.set()
    assert gone.wait(5)
