"""What `systemctl status` says of the hangs: one line.

Pure: `clock` turns monotonic seconds into the wall clock's words.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from iohang_fuse.messages import errno_name

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from iohang_fuse.rehandle import RehandleList

MOST_NAMES = 3
"""Of images: the line is for a terminal, `iohangctl list` has them all."""


def hang_words(images: Iterable[RehandleList], clock: Callable[[float], str]) -> str | None:
    """`2 images hang, oldest since 12:01:07: vm1.qcow2 (EIO), vm2.qcow2 (ESTALE), 14 requests held`; None if all is well."""
    sick = [image for image in images if image.hanging or image.timed_out]
    if not sick:
        return None
    # Those that are timed out and hold nothing have no since; they come last.
    sick.sort(key=lambda image: (image.since_s is None, image.since_s or 0.0))
    parts = []
    if hanging := sum(image.hanging for image in sick):
        oldest = clock(sick[0].since_s) if sick[0].since_s is not None else "?"
        parts.append(
            f"{_count(hanging, 'image hangs', 'images hang')}, {'oldest ' if hanging > 1 else ''}since {oldest}"
        )
    if timed_out := sum(image.timed_out for image in sick):
        parts.append(f"{_count(timed_out, 'image', 'images')} timed out")
    names = [f"{image.image} ({errno_name(image.errno) or 'no answer'})" for image in sick[:MOST_NAMES]]
    if len(sick) > MOST_NAMES:
        names.append(f"{len(sick) - MOST_NAMES} more")
    held = _count(sum(len(image.held) for image in sick), "request", "requests")
    return f"{', '.join(parts)}: {', '.join(names)}, {held} held"


def _count(number: int, one: str, more: str) -> str:
    return f"{number} {one if number == 1 else more}"
