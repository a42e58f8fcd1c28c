"""What the order of requests and the write log cost, by how many requests there are.

    python -m contrib.bench.ordering [--quick]

The complexity that this is to show (iohang_fuse/ordering.py):

* An arrival looks, in each block of 64 KiB that it touches (17 at most), at the youngest writes until one covers the rest: at
  16 of 4 KiB, or 128 of 512 bytes, as long as writes do not overlap each other. That does not depend on how many requests
  are in flight, and leaving costs what arriving has cost. A write that waits on top of others that wait is
  found first: a pile on one block costs as much as a single write.
* The exception: requests larger than the writes of a pile beneath them look at all of that pile (last row). Each larger
  write ends the search for those after it, a read does not.
* A change of size looks at all unfinished writes. The kernel lets one at a time go for each file.
* An fsync costs nothing but its place in a queue.
* WriteLog: an `add` costs its blocks; a `release` looks at each entry that the log has, and removes those before its mark: at
  one sync per 32 writes each entry is looked at about once.

In each row the number in flight is kept while requests arrive at the end and leave: the oldest whose turn has come. Cost is
the time of one arrival and one departure. In brackets: how many times the cost with 1 in flight, in the same row. Beside it
stands what a request of FUSE costs anyway: about 50 us (one 4 KiB read through a passthrough on one core).
"""

from __future__ import annotations

import argparse
import gc
import itertools
import random
import time
from collections import deque
from typing import TYPE_CHECKING

from iohang_fuse.ordering import Ordering, Turn
from iohang_fuse.writelog import WriteLog

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    Work = tuple[str, int, float]  # kind, first byte, end

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
DEPTHS = (1, 10, 100, 1_000, 10_000)
FUSE_REQUEST_US = 50
_BATCH = 200


def random_4k() -> Iterator[Work]:
    """In a file of 10 GiB."""
    dice = random.Random(2020)  # noqa: S311 - the same each time, not secret
    while True:
        at = dice.randrange(10 * GIB // 4096) * 4096
        yield "write", at, at + 4096


def sequential_4k() -> Iterator[Work]:
    """As an installer writes."""
    return (("write", at, at + 4096) for at in itertools.count(0, 4096))


def same_block() -> Iterator[Work]:
    """Each waits for the one before it."""
    return itertools.repeat(("write", 4096, 8192))


def overlapping_halves() -> Iterator[Work]:
    """Each overlaps the one before it, and none covers another."""
    return (("write", at, at + 4096) for at in itertools.count(0, 2048))


def same_halves() -> Iterator[Work]:
    """The same on two places: each is covered by the one before the last."""
    return itertools.cycle([("write", 0, 4096), ("write", 2048, 6144)])


def sequential_1m() -> Iterator[Work]:
    """FUSE's largest, not aligned: 17 blocks each."""
    return (("write", at, at + MIB) for at in itertools.count(512, MIB))


def random_512() -> Iterator[Work]:
    """In 64 MiB, so that 10,000 of them lie 10 to a block."""
    dice = random.Random(2020)  # noqa: S311 - see above
    while True:
        at = dice.randrange(64 * MIB // 512) * 512
        yield "write", at, at + 512


def with_syncs() -> Iterator[Work]:
    """A database: after each 32 writes an fsync."""
    writes = random_4k()
    while True:
        yield from itertools.islice(writes, 32)
        yield "sync", 0, 0


def with_reads() -> Iterator[Work]:
    """Half and half, in 1 GiB, some of them over what is being written."""
    dice = random.Random(2020)  # noqa: S311 - see above
    for kind in itertools.cycle(["read", "write"]):
        at = dice.randrange(GIB // 4096) * 4096
        yield kind, at, at + dice.choice([4096, 16384, 65536])


def large_reads_on_a_pile() -> Iterator[Work]:
    """64 KiB read over writes that all wait on the same 4 KiB: the exception."""
    return itertools.cycle([("write", 4096, 8192)] * 15 + [("read", 0, 65536)])


PATTERNS = {
    "random 4k in 10 GiB": random_4k,
    "sequential 4k": sequential_4k,
    "all on the same 4k": same_block,
    "overlapping halves, moving on": overlapping_halves,
    "overlapping halves, in place": same_halves,
    "sequential 1M": sequential_1m,
    "random 512 in 64 MiB": random_512,
    "random 4k, fsync every 32": with_syncs,
    "reads and writes, 4k to 64k": with_reads,
    "64k reads on a pile of 4k": large_reads_on_a_pile,
}


def order_us(pattern: Callable[[], Iterator[Work]], depth: int, least_s: float) -> float:
    """Microseconds for one arrival and one departure with *depth* requests in flight."""
    order: Ordering[list[object]] = Ordering()
    ready: deque[Turn[list[object]]] = deque()

    def arrive(work: Work) -> None:
        kind, start, end = work
        whose: list[object] = []  # as a request knows its turn, which is what is told when it comes
        if kind == "write":
            turn = order.write(whose, start, end)
        elif kind == "read":
            turn = order.read(whose, start, end)
        else:
            turn = order.sync(whose)
        whose.append(turn)
        if not turn.waits:
            ready.append(turn)

    def leave() -> None:
        for whose in order.leave(ready.popleft()):
            (turn,) = whose
            assert isinstance(turn, Turn)
            ready.append(turn)

    def step(work: Work) -> None:
        arrive(work)
        leave()

    works = pattern()
    for work in itertools.islice(works, depth - 1):
        arrive(work)
    return typical_us(lambda: [*itertools.islice(works, _BATCH)], step, least_s)


def typical_us(prepare: Callable[[], list[Work]], step: Callable[[Work], None], least_s: float) -> float:
    """The median batch's microseconds a step, over *least_s* seconds at least; the garbage collector waits, as for timeit.

    Time of this thread, not of the clock: other processes of the machine are no part of the cost.
    """
    times: list[float] = []
    end_s = time.thread_time() + least_s
    gc.collect()
    gc.disable()
    try:
        while len(times) < 5 or time.thread_time() < end_s:
            works = prepare()
            began_s = time.thread_time()
            for work in works:
                step(work)
            times.append((time.thread_time() - began_s) / len(works) * 1e6)
    finally:
        gc.enable()
    return sorted(times)[len(times) // 2]


def log_us(pattern: Callable[[], Iterator[Work]], depth: int, least_s: float) -> float:
    """Microseconds for one write in a log that has *depth* entries before a sync releases all but the youngest half."""
    log = WriteLog(1 << 50)
    data = bytes(MIB)
    marks: deque[int] = deque()
    views: dict[int, bytes] = {}
    count = 0

    def step(work: Work) -> None:
        nonlocal count
        _, start, end = work
        length = int(end) - start
        log.add(start, views.setdefault(length, data[:length]), stable=False, errors_before=0)
        count += 1
        if count % max(depth // 2, 1) == 0:
            marks.append(log.mark())
            if len(marks) > 1:
                log.release(marks.popleft())

    works = (work for work in pattern() if work[0] == "write")
    for work in itertools.islice(works, depth):
        step(work)
    size = max(_BATCH, depth)  # so that each batch has its share of releases
    return typical_us(lambda: [*itertools.islice(works, size)], step, least_s)


def table(
    title: str,
    cost_us: Callable[[Callable[[], Iterator[Work]], int, float], float],
    patterns: dict[str, Callable[[], Iterator[Work]]],
    least_s: float,
) -> None:
    """One line a pattern, as each is known."""
    print(f"\n{title}")
    print(f"{'':32}" + "".join(f"{depth:>16,}" for depth in DEPTHS) + f"{'of a request':>14}")
    for name, pattern in patterns.items():
        costs = []
        print(f"{name:32}", end="", flush=True)
        for depth in DEPTHS:
            costs.append(cost_us(pattern, depth, least_s))
            ratio = costs[-1] / costs[0]
            print(
                f"{costs[-1]:8.1f} ({f'x{ratio:.1f}' if ratio < 100 else f'x{ratio:.0f}'})".rjust(16),
                end="",
                flush=True,
            )
        print(f"{max(costs) / FUSE_REQUEST_US:>14.0%}")


def main() -> None:
    """Both tables, in a minute or so."""
    parser = argparse.ArgumentParser(description="What the order of requests and the write log cost.")
    parser.add_argument("--quick", action="store_true", help="a tenth of the time, and less exact")
    least_s = 0.05 if parser.parse_args().quick else 0.5
    scale = f"last column: the dearest against a FUSE request of about {FUSE_REQUEST_US} us"
    table(f"Ordering: us for arriving and leaving, by requests in flight; {scale}", order_us, PATTERNS, least_s)
    logged = {name: PATTERNS[name] for name in [*PATTERNS][:7]}
    table(f"WriteLog: us for add and its share of release, by entries kept; {scale}", log_us, logged, least_s)


if __name__ == "__main__":
    main()
