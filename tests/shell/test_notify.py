"""One datagram to NOTIFY_SOCKET, whatever is at the other end; and when a service asks for more time."""

from __future__ import annotations

import socket
import threading
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import trio

from iohang_fuse import service
from iohang_fuse.limits import SLOWEST_ATTEMPT_S
from iohang_fuse.notify import MOST_CHARACTERS, Notify

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(f"{tmp_path}/notify")
        sock.settimeout(20)
        yield sock


def test_lines(manager: socket.socket) -> None:
    """sd_notify(3): "newline-separated list of variable assignments"; a value has no newline, and no half of a character."""
    notify = Notify(manager.getsockname())
    assert notify.tell(READY=1, STATUS="a\nb\udcff")
    assert manager.recv(8192) == b"READY=1\nSTATUS=a b\\udcff"
    assert notify.tell(STATUS="ü" * 5000, READY=1)
    assert manager.recv(8192).decode() == f"STATUS={'ü' * MOST_CHARACTERS}\nREADY=1"
    assert notify.extend_timeout(1.5, STATUS="waiting")
    assert manager.recv(8192) == b"STATUS=waiting\nEXTEND_TIMEOUT_USEC=1500000"


@pytest.mark.parametrize(
    "address", ["", "relative", "vsock:2:1", "/nonexistent/notify", "@nobody-listens", "/" + "x" * 300]
)
def test_never_raises(address: str) -> None:
    """Whoever cannot be told is not told, and nobody fails for it."""
    notify = Notify(address)
    assert notify.tell(READY=1) is False
    assert notify.wanted == address.startswith(("/", "@"))


def test_never_waits(manager: socket.socket) -> None:
    """A manager that does not read costs nothing: the message is lost, which the sender knows."""
    notify = Notify(manager.getsockname())

    def fill() -> None:
        while notify.tell(STATUS="x"):
            pass

    filling = threading.Thread(target=fill, daemon=True)
    filling.start()
    filling.join(20)
    assert not filling.is_alive(), "it waits for a manager that does not read"
    manager.recv(8192)
    assert notify.tell(STATUS="x")


def test_from_environment(manager: socket.socket) -> None:
    """NOTIFY_SOCKET says where; without it nobody is told."""
    assert Notify.from_environment({"NOTIFY_SOCKET": manager.getsockname()}).tell(READY=1)
    assert not Notify.from_environment({}).wanted


# ---- more time


class Requests:
    """As much of it as is asked for."""

    def __init__(self) -> None:
        self.writing: dict[str, int] = {}
        self.deadlines: list[float] = []

    @property
    def images(self) -> dict[int, Any]:
        if not self.deadlines:
            return {}
        held = {n: SimpleNamespace(deadline_s=deadline_s) for n, deadline_s in enumerate(self.deadlines)}
        return {1: SimpleNamespace(held=SimpleNamespace(held=held))}

    def writes_in_flight(self) -> dict[str, int]:
        return self.writing


async def test_more_time_while_an_answer_is_on_its_way(autojump_clock: Any) -> None:
    """P1 and P8 at a shutdown: what is held may use its own timeout, but neither for ever nor without being asked to end."""
    requests = Requests()
    mount = service.Service(Notify(), requests, "serving")  # type: ignore[arg-type]
    requests.deadlines = [50.0]
    assert not mount._needs_time(10), "nobody has asked"
    mount.asked_to_end("SIGTERM")
    begun = autojump_clock.current_time()
    requests.deadlines = [begun + 50, float("inf")]
    assert mount._needs_time(begun)
    assert mount._needs_time(begun + 50 + SLOWEST_ATTEMPT_S - 1), "its last attempt may take so long"
    assert not mount._needs_time(begun + 50 + SLOWEST_ATTEMPT_S + 1)
    requests.deadlines = [float("inf")]
    assert not mount._needs_time(begun), "no wait for what never ends"
    requests.deadlines = [begun + 1e6]
    assert mount._needs_time(begun + service.LONGEST_PLEA_S - 1)
    assert not mount._needs_time(begun + service.LONGEST_PLEA_S)
    requests.deadlines, requests.writing = [], {"a.img": 1}
    assert mount._needs_time(begun + SLOWEST_ATTEMPT_S - 1), "a write inside a system call, P5"
    assert not mount._needs_time(begun + SLOWEST_ATTEMPT_S), "not for a hard mount whose server is dead"
    mount.goes_on()
    assert not mount._needs_time(begun)


async def test_what_did_not_get_through_is_said_again(autojump_clock: Any) -> None:  # noqa: ARG001 - the clock of this run
    """READY=1 is not lost because systemd was busy; and a status that has not changed is not said again."""
    told: list[dict[str, object]] = []

    class Deaf(Notify):
        def tell(self, **said: object) -> bool:
            told.append(said)
            return len(told) > 3

    mount = service.Service(Deaf("/somewhere"), Requests(), "serving")  # type: ignore[arg-type]
    mount.ready()
    with trio.move_on_after(60):
        await mount.serve()
    assert told == [{"STATUS": "serving", "READY": 1}] * 4
