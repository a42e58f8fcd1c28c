"""The demonstration: two guests, one outage. One guest's disk lies on iohang-fuse, the other's on the bare source.

    python -m contrib.demo [--outage 8] [--keep]

Both write and read back all the time. The storage beneath both fails for some seconds, as NFS does. At the end every
block that a guest was told is written is compared in the source itself, and a verdict says who noticed what.
Exit code 0 if the guest on iohang-fuse saw no error and lost no byte, and the bare one did see errors; 1 otherwise.
"""

from __future__ import annotations

import argparse
import contextlib
import re
import shutil
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from contrib.guest.guest import Guest, GuestUnavailableError, build, verify_image
from tests.harness import FlakySource, Mount

if TYPE_CHECKING:
    from collections.abc import Iterator

IMAGE_BYTES = 64 << 20
BEFORE_S, AFTER_S = 6, 6


@dataclass
class Side:
    """One of the two guests."""

    title: str
    guest: Guest
    image: Path  # in the source itself

    @property
    def uptime_s(self) -> float:
        """The guest's own clock."""
        return self.guest.last_tick.uptime_s if self.guest.last_tick else 0.0


class Screen:
    """Live on a terminal; a line a second elsewhere."""

    def __init__(self, console: Console) -> None:
        self._console = console
        live = console.is_terminal and not console.is_dumb_terminal
        self._live = Live(console=console, refresh_per_second=8) if live else None
        self._line_s = 0.0

    @contextlib.contextmanager
    def shown(self) -> Iterator[None]:
        """While the demonstration runs."""
        with self._live or contextlib.nullcontext():
            yield

    def show(self, phase: str, sides: list[Side], held: str) -> None:
        """The present state of both guests."""
        if self._live is not None:
            self._live.update(Group(Text(phase, style="bold"), _table(sides), Text(held, style="yellow")))
        elif time.monotonic() - self._line_s >= 1:
            self._line_s = time.monotonic()
            words = [
                f"{side.title}: {len(side.guest.steps)} I/Os, {len(side.guest.in_flight)} pending, "
                f"{len(side.guest.errors)} errors, clock {side.uptime_s:.0f} s"
                for side in sides
            ]
            self._console.print(f"{phase} | {' | '.join(words)} | {held}", soft_wrap=True)


def _table(sides: list[Side]) -> Table:
    table = Table("guest", "its clock", "I/Os done", "pending", "last I/O", "I/O errors", "its kernel says")
    now_s = time.monotonic()
    for side in sides:
        steps = side.guest.steps
        ago_s = now_s - steps[-1].host_s if steps else 0.0
        messages = side.guest.kernel_io_errors
        table.add_row(
            side.title,
            f"{side.uptime_s:.0f} s",
            str(len(steps)),
            str(len(side.guest.in_flight)),
            Text(f"{ago_s:.1f} s ago", style="yellow" if ago_s > 1 else "green"),
            Text(str(len(side.guest.errors)), style="bold red" if side.guest.errors else "green"),
            Text(
                re.sub(r"^\[ *[\d.]+\] ", "", messages[-1])[:50] if messages else "-",
                style="red" if messages else "green",
            ),
        )
    return table


def held_words(log: str) -> str:
    """What iohang-mount's log says is held now, since when and until when."""
    lines = [line for line in log.splitlines() if "held since" in line]
    if not lines or "recovered after" in lines[-1]:
        return "iohang-fuse: nothing is held"
    match = re.search(r"(\S+): (\w+) failed with (\S+).*held since (\S+), until (\S+)", lines[-1])
    if match is None:
        return lines[-1]
    image, operation, error, since, until = match.groups()
    return f"iohang-fuse holds {image}: a {operation} failed with {error}; since {since}, until {until} at the latest"


def rehearse(folder: Path, outage_s: float, console: Console) -> bool:
    """The whole demonstration in *folder*. Returns the verdict."""
    console.print("Preparing a guest: Debian's cloud kernel and busybox ...")
    kernel = build()
    real = folder / "real"
    real.mkdir()
    for name in ("with.img", "without.img"):
        with (real / name).open("wb") as image:
            image.truncate(IMAGE_BYTES)
    with (
        FlakySource(real, folder / "storage", folder / "outage", folder / "storage.log") as storage,
        Mount(folder / "storage", folder / "iohang", "interval=1", log=folder / "iohang.log") as mount,
        Guest(kernel, folder / "iohang" / "with.img", log=folder / "with.log") as with_us,
        Guest(kernel, folder / "storage" / "without.img", log=folder / "without.log") as without_us,
    ):
        sides = [
            Side("on iohang-fuse", with_us, real / "with.img"),
            Side("on the bare storage", without_us, real / "without.img"),
        ]
        try:
            _run_phases(sides, outage_s, storage, mount, Screen(console))
        finally:
            storage.heal()  # or the guests could not be ended
        for side in sides:
            side.guest.finish()
    return verdict(sides, outage_s, console)


def _run_phases(sides: list[Side], outage_s: float, storage: FlakySource, mount: Mount, screen: Screen) -> None:
    with screen.shown():
        for phase, span_s in (("Storage works", BEFORE_S), ("OUTAGE", outage_s), ("Storage works again", AFTER_S)):
            if phase == "OUTAGE":
                storage.fail("data *.img errno=EIO")
            else:
                storage.heal()
            end_s = time.monotonic() + span_s
            while (left_s := end_s - time.monotonic()) > 0:
                screen.show(f"{phase}: {left_s:3.0f} s to go", sides, held_words(mount.log_text()))
                time.sleep(0.1)


def verdict(sides: list[Side], outage_s: float, console: Console) -> bool:
    """Compare every acknowledged byte in the source itself, and say who noticed what."""
    table = Table("verdict", *(side.title for side in sides), title=f"An outage of {outage_s:g} s")
    reports = [verify_image(side.image, side.guest.records) for side in sides]
    table.add_row("I/Os done", *(str(len(side.guest.steps)) for side in sides))
    table.add_row("I/O errors seen by the guest", *(str(len(side.guest.errors)) for side in sides))
    table.add_row("errors in its kernel's log", *(str(len(side.guest.kernel_io_errors)) for side in sides))
    table.add_row("bytes verified in the source", *(f"{report.verified_bytes:,}" for report in reports))
    table.add_row("blocks with wrong bytes", *(str(len(report.mismatches)) for report in reports))
    table.add_row("longest pause", *(f"{side.guest.longest_pause_s:.1f} s" for side in sides))
    console.print(table)
    ours, bare = sides
    unharmed = not ours.guest.errors and not ours.guest.kernel_io_errors and not reports[0].mismatches
    harmed = bool(bare.guest.errors)
    if unharmed and harmed:
        console.print(
            "[bold green]The guest on iohang-fuse noticed a pause and nothing else. The other one saw errors.[/]"
        )
    elif not unharmed:
        console.print("[bold red]The guest on iohang-fuse was harmed: this is a bug; keep the logs with --keep.[/]")
    else:
        console.print("[bold red]The bare guest saw no error either, so this outage has shown nothing.[/]")
    return unharmed and harmed


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="contrib/run", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--outage", type=float, default=8, metavar="SECONDS", help="how long the storage fails (8)")
    parser.add_argument("--keep", action="store_true", help="keep logs and images")
    args = parser.parse_args()
    console = Console()
    folder = Path(tempfile.mkdtemp(prefix="iohang-demo-"))
    try:
        return 0 if rehearse(folder, args.outage, console) else 1
    except GuestUnavailableError as error:
        console.print(f"[red]{error}[/]")
        return 1
    except KeyboardInterrupt:
        return 130
    finally:
        if args.keep:
            console.print(f"Logs and images are in {folder}")
        else:
            shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
