"""What `iohangctl top` shows: the monitors' answers in, rows and lines out.

1. Pure: top.py asks, draws and listens to the keyboard.
2. An image has a row if it hangs, or has hung while somebody looked. A healthy one that never did has none: there may be
   hundreds.
3. A mount's `clock` turns the monitor's seconds since the epoch into the wall clock's words.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from iohang_fuse.messages import printable, size_words, span_words

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

HEAD = ("MOUNT", "IMAGE", "STATE", "HELD", "OLDEST", "GIVEN UP IN", "ERROR", "ATTEMPTS", "RETRY IN", "BYTES", "SINCE")

_FIRST_TO_GO = ("BYTES", "ATTEMPTS", "MOUNT", "SINCE", "RETRY IN", "OLDEST", "ERROR", "GIVEN UP IN")
"""Where the terminal is narrow. What is left says which image, how it is, and how much is held."""

_MOST_PAST = 200
"""Images of one mount whose trouble is over that are remembered."""

_WORST_FIRST = ("timed-out", "hanging")


@dataclass(slots=True)
class Seen:
    """What is known of one mount. *gone* says why its monitor does not answer; what it had said before is not shown then."""

    name: str
    clock: Callable[[float], str]
    status: Mapping[str, Any] | None = None
    images: Sequence[Mapping[str, Any]] = ()
    gone: str = ""
    past: dict[str, str] = field(default_factory=dict)
    """By image, how its last hang ended; the latest last."""

    def answered(self, status: Mapping[str, Any], images: Sequence[Mapping[str, Any]]) -> None:
        """The monitor has."""
        self.name = status["mountpoint"]
        self.status, self.images, self.gone = status, images, ""
        for image in images:
            # An answer may be older than the event of the end, which has come before it.
            if image["state"] != "healthy" and image["image"] not in self.past:
                self._remember(image["image"], "over")

    def lost(self, why: str) -> None:
        """It does not answer any more."""
        self.status, self.images, self.gone = None, (), why

    def heard(self, event: Mapping[str, Any]) -> None:
        """An event: also a hang too short to be seen in any answer leaves its row."""
        if event["event"] != "BLOCK_IO_HANG":
            return
        data = event["data"]
        ended = "over"
        if not data["set"]:
            at = self.clock(event["timestamp"]["seconds"])
            ended = f"over at {at}, after {span_words(data['duration'])}"
            if data["given-up"] or data["passed-on"]:
                ended += f", {data['given-up'] + data['passed-on']} errors"
        self._remember(data["image"], ended)

    def _remember(self, image: str, ended: str) -> None:
        self.past.pop(image, None)
        self.past[image] = ended
        while len(self.past) > _MOST_PAST:
            del self.past[next(iter(self.past))]


@dataclass(frozen=True, slots=True)
class Row:
    """One image: a cell for each of `HEAD`."""

    state: str
    cells: tuple[str, ...]


def rows(mounts: Sequence[Seen]) -> list[Row]:
    """The sick first: timed out, hanging, each the longest first; then those whose trouble is over, the latest first."""
    sick: list[tuple[int, float, Row]] = []
    past: list[Row] = []
    for mount in mounts:
        open_ = {image["image"] for image in mount.images}
        for image in mount.images:
            if image["state"] != "healthy":
                rank = _WORST_FIRST.index(image["state"]) if image["state"] in _WORST_FIRST else len(_WORST_FIRST)
                sick.append((rank, -image.get("oldest-age", 0), _row(mount, image)))
        if not mount.gone:
            for name, ended in reversed(_past(mount).items()):
                past.append(_past_row(mount.name, name, "healthy" if name in open_ else "closed", ended))
    return [row for _, _, row in sorted(sick, key=lambda each: each[:2])] + past


def _past(mount: Seen) -> dict[str, str]:
    sick = {image["image"] for image in mount.images if image["state"] != "healthy"}
    return {name: ended for name, ended in mount.past.items() if name not in sick}


def _row(mount: Seen, image: Mapping[str, Any]) -> Row:
    given_up = _span(image.get("nearest-deadline"), "never") if image["held"] else "-"
    state = image["state"] + ("" if image["holding"] else ", paused")
    cells = (
        mount.name, image["image"], state, str(image["held"]), _span(image.get("oldest-age")), given_up,
        image.get("errno") or "no answer", str(image["attempts"]), _span(image.get("next-retry")), size_words(image["bytes"]),
        mount.clock(image["since"]) if "since" in image else "-",
    )  # fmt: skip
    return Row(image["state"], tuple(map(printable, cells)))


def _past_row(mount: str, image: str, state: str, ended: str) -> Row:
    return Row(state, (printable(mount), printable(image), state, "0", "-", "-", "-", "-", "-", "-", printable(ended)))


def totals(mount: Seen) -> str:
    """One line for a mount."""
    status = mount.status
    if status is None:
        return printable(f"{mount.name}: {mount.gone or 'has not answered yet'}")
    words = (
        f"{mount.name}: {status['status']}: {status['images']} images open, {status['hanging']} hanging, "
        f"{status['timed-out']} timed out; {status['held']} requests held, {size_words(status['held-bytes'])}"
    )
    return printable(words if status["holding"] else f"{words}; holding is paused")


def columns(found: Sequence[Row], width: int) -> list[int]:
    """Which of `HEAD` fit in *width* characters. MOUNT is left out where all rows are of one."""
    kept = [*range(len(HEAD))]
    if len({row.cells[0] for row in found}) < 2:
        kept.remove(HEAD.index("MOUNT"))
    widths = [max(len(HEAD[i]), *(len(row.cells[i]) for row in found)) if found else len(HEAD[i]) for i in kept]
    needs = dict(zip(kept, widths, strict=True))
    for name in _FIRST_TO_GO:
        if sum(needs.values()) + 2 * (len(needs) - 1) <= width:
            break
        needs.pop(HEAD.index(name), None)
    return [*needs]


def plain(mounts: Sequence[Seen], at: str) -> list[str]:
    """One frame in lines, for a file or a pipe. *at*: when it was, in words."""
    found = rows(mounts)
    kept = [i for i in range(len(HEAD)) if len(mounts) > 1 or HEAD[i] != "MOUNT"]
    table = [[HEAD[i] for i in kept], *([row.cells[i] for i in kept] for row in found)] if found else []
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return [
        *(f"{at} {totals(mount)}" for mount in mounts),
        *("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in table),
    ]


def as_json(mounts: Sequence[Seen], at_s: float) -> dict[str, object]:
    """One frame for programs: the monitors' own answers. *at_s*: seconds since the epoch."""
    return {
        "at": at_s,
        "mounts": [
            {"mountpoint": mount.name, "gone": mount.gone}
            if mount.status is None
            else {**mount.status, "images": [*mount.images], "past": _past(mount)}
            for mount in mounts
        ],
    }


def _span(seconds: float | None, otherwise: str = "-") -> str:
    return otherwise if seconds is None else span_words(max(seconds, 0))
