"""What iohangctl prints of the monitor's answers and events: lines for people."""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING, Any

from iohang_fuse.messages import span_words

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

FINE, WARNING, CRITICAL, UNKNOWN = 0, 1, 2, 3
"""Exit codes of `iohangctl check`, which are those of a monitoring plug-in."""


def status_lines(answer: dict[str, Any], images: list[dict[str, Any]]) -> list[str]:
    """`iohangctl status`: the mount, and what is not healthy."""
    engine = f"engine {answer['engine']}" + (f" ({answer['engine-reason']})" if "engine-reason" in answer else "")
    lines = [
        f"{answer['source']} at {answer['mountpoint']}, process {answer['pid']}, iohang-fuse {answer['version']}, {engine}"
    ]
    lines.append(
        f"{answer['status']}: {answer['images']} images open, {answer['hanging']} hanging, {answer['timed-out']} timed out; "
        f"{answer['held']} requests held, {answer['held-bytes']} bytes"
    )
    if not answer["holding"]:
        lines.append("holding is paused, for all images or some: errors are passed on. iohangctl unpause ends that.")
    return [*lines, *(_sick(image) for image in images if image["state"] != "healthy")]


def judgement(answer: dict[str, Any]) -> int:
    """The exit code of `iohangctl check`. A pause that was forgotten is a warning: the next outage is not held."""
    if answer["status"] == "healthy":
        return FINE if answer["holding"] else WARNING
    return WARNING if answer["status"] == "hanging" else CRITICAL


def check_line(answer: dict[str, Any], images: list[dict[str, Any]]) -> str:
    """`iohangctl check`, with performance data as plug-ins have them."""
    word = {FINE: "OK", WARNING: "WARNING"}.get(judgement(answer), "CRITICAL")
    sick = [_sick(image) for image in images if image["state"] != "healthy"]
    said = (
        "; ".join(sick[:3]) + (f"; and {len(sick) - 3} more" if len(sick) > 3 else "")
        if sick
        else f"{answer['images']} images open"
    )
    if not answer["holding"]:
        said = f"holding is paused: errors are passed on until iohangctl unpause; {said}"
    return f"IOHANG {word} - {said} | held={answer['held']} hanging={answer['hanging']} timed_out={answer['timed-out']}"


def _sick(image: dict[str, Any]) -> str:
    words = f"{image['image']}: {image['state']}"
    if "since" in image:
        words += f" since {time.strftime('%T', time.localtime(image['since']))}"
    words += f", {image['errno'] or 'no answer from the storage'}, {image['held']} held"
    if image.get("nearest-deadline") is not None:
        words += f", the first is given up in {span_words(image['nearest-deadline'])}"
    if image.get("next-retry") is not None:
        words += f", tried again in {span_words(image['next-retry'])}"
    return words + (f"; not opened anew: {image['reopen-refused']}" if "reopen-refused" in image else "")


def image_lines(images: list[dict[str, Any]]) -> list[str]:
    """`iohangctl list`."""
    if not images:
        return ["no image is open"]
    head = ("IMAGE", "STATE", "HELD", "OLDEST", "GIVEN UP IN", "ERROR", "RETRY IN")
    return _table([head, *map(_image_row, images)])


def _image_row(image: dict[str, Any]) -> tuple[str, ...]:
    given_up = _span(image.get("nearest-deadline"), "never") if image["held"] else "-"
    return (
        image["image"], image["state"], str(image["held"]), _span(image.get("oldest-age")), given_up,
        image.get("errno") or "-", _span(image.get("next-retry")),
    )  # fmt: skip


def held_lines(requests: list[dict[str, Any]]) -> list[str]:
    """`iohangctl held`."""
    if not requests:
        return ["nothing is held"]
    head = ("IMAGE", "OP", "OFFSET", "LENGTH", "STATE", "AGE", "GIVEN UP IN", "ERROR", "ATTEMPTS")
    return _table([head, *map(_request_row, requests)])


def _request_row(each: dict[str, Any]) -> tuple[str, ...]:
    return (
        each["image"], each["op"], str(each["offset"]), str(each["length"]), each["state"], _span(each["age"]),
        _span(each["deadline"], "never"), each["errno"] or "-", str(each["attempts"]),
    )  # fmt: skip


def acted_lines(done: list[dict[str, Any]]) -> list[str]:
    """What `iohangctl retry`, `drain` and `fail` have done."""
    if not done:
        return ["nothing is held, so there was nothing to do"]
    return [
        f"{each['image']}: {each['requests']} requests were held; now {each['held']} are"
        + ("; iohangctl list says what becomes of them" if each["held"] else "")
        for each in done
    ]


def paused_lines(done: list[dict[str, Any]]) -> list[str]:
    """What `iohangctl pause` has done."""
    if not done:
        return [
            "no image is open; the errors of those that are opened from now on are passed on, until iohangctl unpause"
        ]
    return [
        f"{each['image']}: errors are passed on{_already(each)}; {each['held']} requests are held until their next failure"
        for each in done
    ]


def unpaused_lines(done: list[dict[str, Any]]) -> list[str]:
    """What `iohangctl unpause` has done."""
    if not done:
        return ["no image is open; the errors of those that are opened from now on are held"]
    return [f"{each['image']}: errors are held{_already(each)}; {each['held']} requests are held" for each in done]


def _already(each: dict[str, Any]) -> str:
    return "" if each["changed"] else ", as they were already"


def set_lines(done: list[dict[str, Any]]) -> list[str]:
    """What is in force after `iohangctl set`."""
    if not done:
        return ["no image is open; those that are opened from now on have it"]
    return [
        f"{each['image']}: timeouts read {_span(each['read-timeout'], 'inf')}, write {_span(each['write-timeout'], 'inf')}, "
        f"fsync {_span(each['fsync-timeout'], 'inf')}; interval {_span(each['interval'])}; {each['held']} requests are held"
        for each in done
    ]


def event_line(event: Mapping[str, Any]) -> str:
    """`iohangctl watch`."""
    data = event["data"]
    match event["event"], data.get("set"):
        case "BLOCK_IO_HANG", True:
            error = data["errno"] or "no answer from the storage"
            until = "until it succeeds" if data["timeout"] is None else f"for up to {span_words(data['timeout'])}"
            return f"{data['image']}: hangs: {data['op']} failed with {error}; held {until}, see iohangctl list"
        case "BLOCK_IO_HANG", False:
            return (
                f"{data['image']}: the hang is over after {span_words(data['duration'])}: {data['recovered']} recovered, "
                f"{data['given-up']} given up, {data['passed-on']} passed on"
            )
        case "BLOCK_IO_HANG_TIMEOUT", True:
            error = data["errno"] or "no answer from the storage"
            return f"{data['image']}: timed out: a {data['op']} was given up ({error}); {data['held']} more are held"
        case "BLOCK_IO_HANG_TIMEOUT", False:
            return f"{data['image']}: works again, or was closed"
        case "SHUTDOWN", _:
            return f"the mount ends: {data['reason']}"
    return f"{event['event']} {json.dumps(data)}"


def _span(seconds: float | None, otherwise: str = "-") -> str:
    return otherwise if seconds is None else span_words(max(seconds, 0))


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
