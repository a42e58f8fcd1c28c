"""iohangctl top: the mounts and their sick images, as they are now, again and again.

1. A mount whose server ends, or does not answer, is said to; it is asked again at each interval, and so is one that comes later.
2. On a terminal it is a screen, with rich; elsewhere, and with --json, one frame after the other in lines.
3. Whatever ends it - q, Ctrl-C, SIGTERM, the end of the terminal - the terminal is as it was before.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import math
import os
import signal
import sys
import termios
import time
import tty
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qemu.qmp import QMPClient, QMPError
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from iohang_fuse import toptable
from iohang_fuse.toptable import HEAD, Seen

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

ANSWER_S = 10.0
"""As iohangctl's other verbs: the monitor answers at once, whatever the storage does."""

_PATIENCE_S = 1.0
"""How long a frame waits for the answers; who has not answered by then is shown as before, or as slow."""

_STYLES = {"timed-out": "bold red", "hanging": "yellow", "healthy": "green", "closed": "dim"}


@dataclass(frozen=True, slots=True)
class Wish:
    """What was asked for on the command line."""

    interval_s: float
    frames: float = math.inf
    json: bool = False
    plain: bool = False


async def run(wish: Wish, sockets: Callable[[], Sequence[Path]]) -> int:
    """Until q, Ctrl-C or the last frame. *sockets* finds the monitors, each time anew."""
    # It says on stderr what is said on the screen: that a connection has ended.
    logging.getLogger("qemu.qmp").addHandler(logging.NullHandler())
    logging.getLogger("qemu.qmp").propagate = False
    watched: dict[Path, _Watched] = {}
    quits = asyncio.Event()
    with _quitting_at_signals(quits), _screen(wish, quits) as show:
        frame = 0
        while True:
            for path in sockets():
                watched.setdefault(path, _Watched(path))
            await _refresh([*watched.values()], wish.interval_s)
            show([watched[path].seen for path in sorted(watched)])
            frame += 1
            if frame >= wish.frames:
                break
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(quits.wait(), wish.interval_s)
            if quits.is_set():
                break
    for one in watched.values():
        await one.disconnect()
    return 0


# ---- the monitors


class _Watched:
    """One monitor: connected to as long as it is there."""

    def __init__(self, path: Path) -> None:
        self.seen = Seen(path.stem, lambda at_s: time.strftime("%T", time.localtime(at_s)))
        self._path = path
        self._client: QMPClient | None = None
        self._asking: asyncio.Task[None] | None = None
        self._asked_s = 0.0

    def refresh(self) -> asyncio.Task[None]:
        """Ask, unless the last question is still open."""
        if self._asking is None or self._asking.done():
            self._asked_s = time.monotonic()
            self._asking = asyncio.create_task(self._ask())
        return self._asking

    def is_late(self) -> None:
        """It has not answered in time for this frame."""
        late_s = time.monotonic() - self._asked_s
        self.seen.lost(f"no answer for {late_s:.0f} s; the server is stuck: see its log")

    async def _ask(self) -> None:
        try:
            client = self._client or await self._connect()
            async with asyncio.timeout(ANSWER_S):
                status: Any = await client.execute("query-status")
                images: Any = await client.execute("query-io-hang")
            while not client.events.empty():
                self.seen.heard(dict(await client.events.get()))
            self.seen.answered(status, images)
        except (OSError, QMPError, TimeoutError) as error:
            self.seen.lost(f"{_why(error)}; it is asked again each time")
            await self.disconnect()

    async def _connect(self) -> QMPClient:
        self._client = client = QMPClient("iohangctl top")
        async with asyncio.timeout(ANSWER_S):
            await client.connect(str(self._path))
        return client

    async def disconnect(self) -> None:
        """Raises nothing: a connection that has ended says so by an exception."""
        client, self._client = self._client, None
        if client is not None:
            with contextlib.suppress(Exception):
                await asyncio.wait_for(client.disconnect(), ANSWER_S)


def _why(error: Exception) -> str:
    if isinstance(error, TimeoutError):
        return f"no answer for {ANSWER_S:.0f} s"
    inner = getattr(error, "exc", None)  # a ConnectError has the reason within
    if isinstance(inner, OSError):
        return f"there is no server any more ({inner.strerror or inner})"
    return "its server has ended"


async def _refresh(watched: Sequence[_Watched], interval_s: float) -> None:
    if not watched:
        return
    asking = {one.refresh(): one for one in watched}
    _, late = await asyncio.wait(asking, timeout=max(_PATIENCE_S, interval_s / 2))
    for task in late:
        asking[task].is_late()


# ---- the screen


@contextlib.contextmanager
def _screen(wish: Wish, quits: asyncio.Event) -> Iterator[Callable[[Sequence[Seen]], None]]:
    """What shows a frame."""
    if wish.json:
        yield lambda seen: _print([json.dumps(toptable.as_json(seen, time.time()))])
        return
    if wish.plain or not sys.stdout.isatty() or os.environ.get("TERM", "dumb") == "dumb":
        yield lambda seen: _print(toptable.plain(seen, time.strftime("%F %T")))
        return
    console = Console()
    # auto_refresh: off, or a thread would draw at a moment of its own.
    with _listening_to_q(quits), Live(console=console, screen=True, auto_refresh=False) as live:
        yield lambda seen: live.update(_drawn(seen, console, wish.interval_s), refresh=True)


def _print(lines: Sequence[str]) -> None:
    sys.stdout.write("\n".join(lines) + "\n")
    sys.stdout.flush()


def _drawn(seen: Sequence[Seen], console: Console, interval_s: float) -> Group:
    width, height = console.size
    found = toptable.rows(seen)
    kept = toptable.columns(found, width)
    said = _mount_lines(seen, max(height // 3, 1))
    room = max(height - len(said) - 3, 1)  # the head, the line below, and one that says how many more there are
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    for i in kept:
        table.add_column(
            HEAD[i], no_wrap=True, overflow="ellipsis", justify="right" if HEAD[i] in {"HELD", "ATTEMPTS"} else "left"
        )
    for row in found[:room]:
        table.add_row(*(Text(row.cells[i]) for i in kept), style=_STYLES.get(row.state, ""))
    foot = f"{time.strftime('%T')}, each {interval_s:g} s; q quits"
    if len(found) > room:
        foot = f"{len(found) - room} more; {foot}"
    body = table if found else Text("no image hangs, and none has since this was started", style="green")
    return Group(
        *(said or [Text("no mount has a monitor here", style="red")]), body, Text(foot, style="dim", no_wrap=True)
    )


def _mount_lines(seen: Sequence[Seen], most: int) -> list[Text]:
    """A line for each mount, those first that are not well; how many more there are in the last one's place."""
    worst_first = sorted(seen, key=lambda mount: mount.status is not None and mount.status["status"] == "healthy")
    shown = worst_first if len(seen) <= most else worst_first[: most - 1]
    said = [Text(toptable.totals(mount), style="red" if mount.gone else "bold") for mount in shown]
    if len(shown) < len(seen):
        said.append(Text(f"{len(seen) - len(shown)} more mounts; iohangctl top -m DIRECTORY shows one", style="bold"))
    for line in said:
        line.no_wrap, line.overflow = True, "ellipsis"
    return said


@contextlib.contextmanager
def _listening_to_q(quits: asyncio.Event) -> Iterator[None]:
    """Keys one by one and unechoed, Ctrl-C as ever. Ctrl-Z does nothing: it would leave the terminal in this state."""
    if not sys.stdin.isatty():
        yield
        return
    fd = sys.stdin.fileno()
    before = termios.tcgetattr(fd)
    loop = asyncio.get_running_loop()

    def key() -> None:
        try:
            keys = os.read(fd, 64)
        except OSError:
            keys = b""
        if not keys or b"q" in keys.lower():  # or the terminal has gone
            quits.set()
            loop.remove_reader(fd)

    try:
        tty.setcbreak(fd)
        now = termios.tcgetattr(fd)
        now[6][termios.VSUSP] = b"\0"
        termios.tcsetattr(fd, termios.TCSANOW, now)
        loop.add_reader(fd, key)
        yield
    finally:
        loop.remove_reader(fd)
        with contextlib.suppress(termios.error):
            termios.tcsetattr(fd, termios.TCSADRAIN, before)


@contextlib.contextmanager
def _quitting_at_signals(quits: asyncio.Event) -> Iterator[None]:
    loop = asyncio.get_running_loop()
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    for number in numbers:
        loop.add_signal_handler(number, quits.set)
    try:
        yield
    finally:
        for number in numbers:
            loop.remove_signal_handler(number)
