"""iohangctl: asks the monitor of a mount, and tells it what to do.

Over the qemu.qmp library, which is QEMU's own client. Each verb is one command of the monitor's; `--json` shows its answer.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import socket
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qemu.qmp import ConnectError, ExecuteError, QMPClient, QMPError

from iohang_fuse.config import RUN, socket_of
from iohang_fuse.messages import span_words

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

FINE, HANGING, TIMED_OUT, UNKNOWN = 0, 1, 2, 3
"""Exit codes of `check`, which are those of a monitoring plug-in: OK, WARNING, CRITICAL, UNKNOWN."""

REFUSED = 1
"""Exit code of the other verbs where they could not; argparse's own for wrong usage is 2."""

ANSWER_S = 10.0
"""The monitor answers at once, whatever the storage does. If not, the server itself is stuck."""

ACTS = {
    "retry": "try what is held now, and do not wait for the next interval",
    "drain": "try what is held now; if that fails, answer it with its error",
    "fail": "answer what is held with an error, now",
    "pause": "hold no more: later errors are passed on to their consumers",
    "unpause": "hold again",
}


class Problem(Exception):
    """What went wrong, in one line."""


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line. Returns the exit code."""
    words = sys.argv[1:] if arguments is None else arguments
    try:
        given = _parser().parse_args(words)
    except SystemExit as end:
        return UNKNOWN if end.code and "check" in words else int(end.code or 0)
    try:
        return asyncio.run(_run(given))
    except Problem as problem:
        print(f"iohangctl: {problem}", file=sys.stderr)  # noqa: T201
    except KeyboardInterrupt:
        return 0 if given.verb == "watch" else 130
    return UNKNOWN if given.verb == "check" else REFUSED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="iohangctl", description="Ask a mount of iohang-fuse which images hang, and say what to do."
    )
    parser.add_argument("--json", action="store_true", help="the monitor's own answer, for programs")
    where = parser.add_mutually_exclusive_group()
    where.add_argument("-m", "--mountpoint", metavar="DIRECTORY", help="the mount (needed where there are several)")
    where.add_argument("-s", "--socket", metavar="FILE", help="its monitor's socket, where that is elsewhere")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    verbs.add_parser("status", help="how the mount is, in a few lines")
    verbs.add_parser(
        "check",
        help="the same in one line, with a monitoring plug-in's exit code: 0 fine, 1 hanging, 2 timed out, 3 unknown",
    )
    verbs.add_parser("watch", help="events, as they come; Ctrl-C ends it")
    for name, meaning in {
        "list": "the open images, and what each waits for",
        "held": "each held request",
        **ACTS,
    }.items():
        verb = verbs.add_parser(name, help=meaning)
        verb.add_argument("image", nargs="?", help="this one; all of them otherwise")
    verb = verbs.add_parser(
        "set", help="change timeouts or the interval while the mount serves; what is held moves with them"
    )
    verb.add_argument(
        "what",
        nargs="+",
        metavar="[IMAGE] KEY=VALUE",
        help="timeout, read_timeout, write_timeout, fsync_timeout, interval",
    )
    return parser


# ---- the monitor


def find_socket(given: argparse.Namespace) -> Path:
    """The monitor's socket. Raises `Problem` with what would be right."""
    if given.socket:
        return Path(given.socket)
    if given.mountpoint:
        # Not resolved by the kernel: a mount whose server is gone answers nothing.
        return socket_of(Path(_real(given.mountpoint)))
    found = sorted(path for path in RUN.glob("*.sock") if _listens(path))
    if len(found) == 1:
        return found[0]
    if not found:
        raise Problem(f"no mount has a monitor in {RUN}; say which one with -m DIRECTORY, or its socket with -s FILE")
    raise Problem(
        f"several mounts have a monitor; say which one with -m DIRECTORY: {', '.join(path.stem for path in found)}"
    )


def _listens(path: Path) -> bool:
    """Whether a server does: one that was killed leaves its socket."""
    with socket.socket(socket.AF_UNIX) as probe:
        probe.setblocking(False)  # noqa: FBT003 - one that does not accept is alive, too
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            return False
        except OSError:
            return True
        return True


async def _run(given: argparse.Namespace) -> int:
    path = find_socket(given)
    client = QMPClient("iohangctl")
    try:
        await asyncio.wait_for(client.connect(str(path)), ANSWER_S)
    except ConnectError as error:
        why = error.exc.strerror if isinstance(error.exc, OSError) else str(error.exc)
        raise Problem(f"{path}: {why}; is it mounted, and with a monitor?") from None
    except TimeoutError:
        raise Problem(
            f"{path}: no answer within {ANSWER_S:g} s; the server is stuck: see its log, and its stack with py-spy"
        ) from None
    try:
        if given.mountpoint:
            await _check_mountpoint(client, path, _real(given.mountpoint))
        return await _do(client, given)
    except QMPError as error:
        raise Problem(f"{path}: the connection broke: {error}") from None
    finally:
        with contextlib.suppress(Exception):  # it raises what has ended the connection, which is said already
            await client.disconnect()


def _real(mountpoint: str) -> str:
    """As the mount table has it. The mount itself is not asked: it may hang."""
    parent, name = os.path.split(os.path.abspath(mountpoint))
    return os.path.join(os.path.realpath(parent), name)


async def _check_mountpoint(client: QMPClient, path: Path, wanted: str) -> None:
    """Two mount points may have the same socket's name: /mnt/a-b and /mnt/a/b."""
    serves = (await _ask(client, "query-status"))["mountpoint"]
    if serves != wanted:
        raise Problem(
            f"{path} is the monitor of {serves}, not of {wanted}; mount that with monitor=FILE, and say -s FILE"
        )


async def _ask(client: QMPClient, command: str, arguments: Mapping[str, object] | None = None) -> Any:
    try:
        return await asyncio.wait_for(client.execute(command, dict(arguments or {})), ANSWER_S)
    except ExecuteError as error:
        raise Problem(str(error)) from None
    except TimeoutError:
        raise Problem(f"{command}: no answer within {ANSWER_S:g} s") from None


async def _do(client: QMPClient, given: argparse.Namespace) -> int:
    verb = given.verb
    if verb == "watch":
        return await _watch(client, json_=given.json)
    if verb in {"status", "check"}:
        answer = await _ask(client, "query-status")
        images = await _ask(client, "query-io-hang")
        if given.json:
            _show_json({**answer, "images": images} if verb == "status" else answer)
        else:
            _show(_status(answer, images) if verb == "status" else [_check(answer, images)])
        return {"healthy": FINE, "hanging": HANGING}.get(answer["status"], TIMED_OUT) if verb == "check" else 0
    if verb == "set":
        answer = await _ask(client, "io-hang-set", _settings(given.what))
    else:
        command = {"list": "query-io-hang", "held": "query-held"}.get(verb, f"io-hang-{verb}")
        answer = await _ask(client, command, {"image": given.image} if given.image is not None else {})
    if given.json:
        _show_json(answer)
    else:
        _show({"list": _list, "held": _held, "set": _set}.get(verb, _acted)(answer))
    return 0


def _settings(words: Sequence[str]) -> dict[str, object]:
    image = [] if "=" in words[0] else [words[0]]
    settings: dict[str, object] = {"image": image[0]} if image else {}
    for word in words[len(image) :]:
        key, equals, value = word.partition("=")
        if not equals:
            raise Problem(f"'{word}' sets nothing; say KEY=VALUE, such as timeout=5min")
        settings[key.replace("_", "-")] = value
    return settings


async def _watch(client: QMPClient, *, json_: bool) -> int:
    with client.listener() as events:
        running = asyncio.ensure_future(client.runstate_changed())
        while True:
            getting = asyncio.ensure_future(events.get())
            await asyncio.wait({getting, running}, return_when=asyncio.FIRST_COMPLETED)
            if not getting.done():
                getting.cancel()
                raise Problem("the mount has ended")
            event: dict[str, Any] = dict(getting.result())
            at = time.strftime("%F %T", time.localtime(event["timestamp"]["seconds"]))
            print(json.dumps(event) if json_ else f"{at} {_event(event)}", flush=True)  # noqa: T201
            if event["event"] == "SHUTDOWN":
                return 0


# ---- words


def _show(lines: Sequence[str]) -> None:
    for line in lines:
        print(line)  # noqa: T201


def _show_json(answer: object) -> None:
    print(json.dumps(answer, indent=2))  # noqa: T201


def _status(answer: dict[str, Any], images: list[dict[str, Any]]) -> list[str]:
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


def _check(answer: dict[str, Any], images: list[dict[str, Any]]) -> str:
    word = {"healthy": "OK", "hanging": "WARNING"}.get(answer["status"], "CRITICAL")
    sick = [_sick(image) for image in images if image["state"] != "healthy"]
    said = (
        "; ".join(sick[:3]) + (f"; and {len(sick) - 3} more" if len(sick) > 3 else "")
        if sick
        else f"{answer['images']} images open"
    )
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


def _list(images: list[dict[str, Any]]) -> list[str]:
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


def _held(requests: list[dict[str, Any]]) -> list[str]:
    if not requests:
        return ["nothing is held"]
    head = ("IMAGE", "OP", "OFFSET", "LENGTH", "STATE", "AGE", "GIVEN UP IN", "ERROR", "ATTEMPTS")
    return _table([head, *map(_request_row, requests)])


def _request_row(each: dict[str, Any]) -> tuple[str, ...]:
    return (
        each["image"], each["op"], str(each["offset"]), str(each["length"]), each["state"], _span(each["age"]),
        _span(each["deadline"], "never"), each["errno"] or "-", str(each["attempts"]),
    )  # fmt: skip


def _acted(done: list[dict[str, Any]]) -> list[str]:
    if not done:
        return ["nothing is held, so there was nothing to do"]
    if "changed" in done[0]:
        return [
            f"{each['image']}: {'changed' if each['changed'] else 'was so already'}; {each['held']} requests are held"
            for each in done
        ]
    return [
        f"{each['image']}: {each['requests']} requests were held; now {each['held']} are"
        + ("; iohangctl list says what becomes of them" if each["held"] else "")
        for each in done
    ]


def _set(done: list[dict[str, Any]]) -> list[str]:
    if not done:
        return ["no image is open; those that are opened from now on have it"]
    return [
        f"{each['image']}: timeouts read {_span(each['read-timeout'], 'inf')}, write {_span(each['write-timeout'], 'inf')}, "
        f"fsync {_span(each['fsync-timeout'], 'inf')}; interval {_span(each['interval'])}; {each['held']} requests are held"
        for each in done
    ]


def _event(event: Mapping[str, Any]) -> str:
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
