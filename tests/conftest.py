"""Two tests at a time, where contrib/check has them run by pytest-xdist; and those that must be `alone` are.

What shares a place or a cache takes turns in one of the two processes: the guests, the benchmarks. What is `alone` comes last,
in one of them, and whoever runs beside it waits until it is over. Without pytest-xdist nothing here does anything.
"""

from __future__ import annotations

import fcntl
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

HERE = Path(__file__).parent
TAKING_TURNS = {
    HERE / "guest": "guests",
    HERE / "interop/test_benches.py": "benchmarks",
    HERE / "interop/test_benchmark.py": "benchmarks",
    HERE / "interop/test_systemd.py": "managers",  # each has its own systemd, and all have the same cgroups
    HERE / "interop/test_mount8.py": "managers",
}


def is_one_of_two(config: pytest.Config) -> bool:
    return hasattr(config, "workerinput")


def group_of(item: pytest.Item) -> str:
    if item.get_closest_marker("alone"):
        return "alone"
    return next((name for place, name in TAKING_TURNS.items() if item.path.is_relative_to(place)), "")


@pytest.hookimpl(wrapper=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> Iterator[None]:
    if not is_one_of_two(config):
        return (yield)
    for item in items:
        if group := group_of(item):
            item.add_marker(pytest.mark.xdist_group(group))
    yield  # pytest-xdist looks at the groups, and pytest sorts the tests by the fixtures that they share
    for item in items:
        assert item.nodeid.endswith(f"@{group_of(item)}") or not group_of(item), "pytest-xdist has not seen its group"
    order = ["guests", "benchmarks", "managers", "", "alone"]  # the longest first, so that both end at the same time
    items.sort(key=lambda item: order.index(group_of(item)))
    return None


@pytest.fixture(autouse=True)
def _turn(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    if not is_one_of_two(request.config):
        yield
        return
    both = tmp_path_factory.getbasetemp().parent  # each process has a folder of its own there
    with ExitStack() as stack:
        # Who wants to be alone has the gate, until who is inside has gone: nobody gets past.
        with (both / "gate").open("w") as gate:
            fcntl.flock(gate, fcntl.LOCK_EX)
            inside = stack.enter_context((both / "inside").open("w"))
            fcntl.flock(inside, fcntl.LOCK_EX if request.node.get_closest_marker("alone") else fcntl.LOCK_SH)
        yield
