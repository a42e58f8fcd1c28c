"""iohangctl: asks the monitor of a mount, and tells it what to do.

Over the qemu.qmp library, which is QEMU's own client. Each verb is one command of the monitor's; `--json` shows its answer.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import errno
import io
import json
import logging
import math
import os
import re
import shutil
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from qemu.qmp import ConnectError, ExecuteError, QMPClient, QMPError

from iohang_fuse.config import LONGEST_SOCKET, RUN, nearest, parse_span, socket_of
from iohang_fuse.doctor import findings, survey
from iohang_fuse.doctor.examination import examine
from iohang_fuse.messages import printable, span_words
from iohang_fuse.qmp import PACKAGE

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping, Sequence

FINE, HANGING, TIMED_OUT, UNKNOWN = 0, 1, 2, 3
"""Exit codes of `check`, which are those of a monitoring plug-in: OK, WARNING, CRITICAL, UNKNOWN."""

REFUSED, USAGE = 1, 2
"""Exit codes of the other verbs: where they could not, and for wrong usage."""

ANSWER_S = 10.0
"""The monitor answers at once, whatever the storage does. If not, the server itself is stuck."""

SHORTEST_DELAY_S, LONGEST_DELAY_S = 0.1, 3600.0
"""Between two frames of `top`."""

NO_MOUNT = f"no mount has a monitor in {RUN}; say which one with -m DIRECTORY, or its socket with -s FILE"

ACTS = {
    "retry": "try what is held now, and do not wait for the next interval",
    "drain": "try what is held now; if that fails, answer it with its error",
    "fail": "answer what is held with an error, now",
    "pause": "hold no more: later errors are passed on to their consumers",
    "unpause": "hold again",
}


VERBS = ("status", "check", "watch", "top", "doctor", "list", "held", *ACTS, "set")
JUDGES = {"check", "doctor"}  # whose exit code is their answer

SETTABLE = ("timeout", "read_timeout", "write_timeout", "fsync_timeout", "interval")


class Problem(Exception):
    """What went wrong, in one line."""


class Misuse(Problem):
    """What is wrong with the command line."""


class _Parser(argparse.ArgumentParser):
    """argparse, which says in one line what is wrong and what would be right."""

    def error(self, message: str) -> NoReturn:
        verb = re.search(r"^argument VERB: invalid choice: '(.*)' \(choose from", message)
        if verb is not None:
            message = f"no verb {verb[1]!r}{nearest(verb[1], VERBS) or f'; there are {chr(44).join(VERBS)}'}"
        raise Misuse(f"{message}; see {self.prog} --help")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line. Returns the exit code."""
    words = sys.argv[1:] if arguments is None else arguments
    verb = next((word for word in words if word in VERBS), "")
    _prepare_streams()
    code = REFUSED
    try:
        given = _parsed(words)
        code = _doctor(given) if given.verb == "doctor" else asyncio.run(_run(given))
        sys.stdout.flush()
    except SystemExit:  # after --help
        return 0
    except Problem as problem:
        text = printable(str(problem))
        code = USAGE if isinstance(problem, Misuse) else REFUSED
    except KeyboardInterrupt:
        return 0 if verb in {"watch", "top"} else 130
    except BrokenPipeError:  # `iohangctl list | head -1` has what it wants
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return UNKNOWN if verb in JUDGES else 0
    except Exception as error:  # noqa: BLE001 - a plug-in that ends with Python's 1 would say that an image hangs
        text = printable(f"a bug of iohangctl, please report it: {type(error).__name__}: {error}")
    else:
        return code
    print(f"iohangctl: {text}", file=sys.stderr)  # noqa: T201
    if verb == "check":  # what monitoring systems show is a plug-in's stdout
        print(f"IOHANG UNKNOWN - {text}")  # noqa: T201
    return UNKNOWN if verb in JUDGES else code


def _prepare_streams() -> None:
    logging.getLogger("qemu").addHandler(logging.NullHandler())  # what it has to say is said here, in one line
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # whatever the locale is, and a file is called
            stream.reconfigure(errors="backslashreplace")


def _parsed(words: Sequence[str]) -> argparse.Namespace:
    """Raises `Misuse`. An unknown option is said to be that before anything is missed."""
    parser = _parser()
    given, unknown = parser.parse_known_args(words)
    if unknown:
        parser.error(f"{unknown[0]!r} is {'no option' if unknown[0].startswith('-') else 'one argument too many'} here")
    if given.verb is None:
        parser.error(f"which verb? There are {', '.join(VERBS)}")
    return given


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="iohangctl",
        description="Ask a mount of iohang-fuse which images hang, and say what to do.",
        allow_abbrev=False,
    )
    parser.add_argument("--json", action="store_true", help="the monitor's own answer, for programs")
    where = parser.add_mutually_exclusive_group()
    where.add_argument("-m", "--mountpoint", metavar="DIRECTORY", help="the mount (needed where there are several)")
    where.add_argument("-s", "--socket", metavar="FILE", help="its monitor's socket, where that is elsewhere")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB")
    verbs.add_parser("status", help="how the mount is, in a few lines")
    verbs.add_parser(
        "check",
        help="the same in one line, with a monitoring plug-in's exit code: 0 fine, 1 hanging, 2 timed out, 3 unknown",
    )
    verb = verbs.add_parser(
        "top", help="the images that hang or have had trouble, live; all mounts without -m; q quits"
    )
    verb.add_argument("-d", "--delay", metavar="SPAN", default="1", help="between two frames (1 s)")
    verb.add_argument("-n", "--frames", metavar="COUNT", type=int, help="end after so many")
    verb.add_argument(
        "-b", "--batch", action="store_true", help="in plain lines, as it is anyway where stdout is no terminal"
    )
    verb = verbs.add_parser(
        "doctor",
        help="what would go wrong in an outage; exit code 0: nothing worse than advice, 1: warnings, 2: problems, 3: unknown",
    )
    verb.add_argument("mount", nargs="?", metavar="MOUNTPOINT", help="the same as -m")
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
        help=", ".join(SETTABLE),
    )
    return parser


# ---- the monitor


def find_socket(given: argparse.Namespace) -> Path:
    """The monitor's socket. Raises `Problem` with what would be right."""
    for option, value, what in (("-s", given.socket, "socket"), ("-m", given.mountpoint, "mount point")):
        if value is not None and (not value or "\0" in value):
            raise Misuse(f"{option}: {value!r} is no path; name the {what}")
    if given.socket:
        return Path(given.socket)
    if given.mountpoint:
        # Not resolved by the kernel: a mount whose server is gone answers nothing.
        return socket_of(Path(_real(given.mountpoint)))
    found = _sockets()
    if len(found) == 1:
        return found[0]
    if not found:
        raise Problem(NO_MOUNT)
    raise Problem(
        "several mounts have a monitor; say which one with -m DIRECTORY, or its socket with -s FILE: "
        + ", ".join(map(str, found))
    )


def _sockets() -> list[Path]:
    return sorted(path for path in RUN.glob("*.sock") if survey.listens(path))


async def _run(given: argparse.Namespace) -> int:
    if given.verb == "top":
        return await _top(given)
    order = _settings(given.what) if given.verb == "set" else {}  # what is wrong with it needs no server to say so
    async with _connected(given, find_socket(given)) as client:
        return await _do(client, given, order)


@contextlib.asynccontextmanager
async def _connected(given: argparse.Namespace, path: Path) -> AsyncIterator[QMPClient]:
    """The monitor's client. Raises `Problem`."""
    client = QMPClient("iohangctl")
    try:
        await asyncio.wait_for(client.connect(str(path)), ANSWER_S)
    except (ConnectError, ValueError) as error:
        raise Problem(_no_monitor(given, path, error)) from None
    except TimeoutError:
        raise Problem(
            f"{path}: no answer within {ANSWER_S:g} s; the server is stuck: see its log, and its stack with py-spy"
        ) from None
    try:
        _check_greeting(client, path)
        if given.mountpoint:
            await _check_mountpoint(client, path, _real(given.mountpoint))
        yield client
    except QMPError as error:
        raise Problem(f"{path}: the connection broke: {error}") from None
    finally:
        with contextlib.suppress(Exception):  # it raises what has ended the connection, which is said already
            await client.disconnect()


async def _top(given: argparse.Namespace) -> int:
    # Not before: rich is for this screen alone.
    from iohang_fuse import top  # noqa: PLC0415

    try:
        interval_s = parse_span(given.delay)
    except ValueError as error:
        raise Problem(f"--delay: {error}") from None
    if not SHORTEST_DELAY_S <= interval_s <= LONGEST_DELAY_S:
        raise Problem(f"--delay: '{given.delay}' is out of range; say {SHORTEST_DELAY_S:g} s to {LONGEST_DELAY_S:g} s")
    if given.frames is not None and given.frames < 1:
        raise Problem(f"--frames: {given.frames} is no number of frames; say 1 or more")
    one = find_socket(given) if given.socket or given.mountpoint else None
    if one is not None:
        async with _connected(given, one):  # whether there is such a mount at all
            pass
    elif not _sockets():
        raise Problem(NO_MOUNT)
    wish = top.Wish(interval_s, given.frames or math.inf, json=given.json, plain=given.batch)
    try:
        return await top.run(wish, _sockets if one is None else lambda: [one])
    except BrokenPipeError:  # `iohangctl top | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _doctor(given: argparse.Namespace) -> int:
    """Not on an event loop: the survey forks. Raises `Problem` where there is no such mount."""
    if given.mount and given.mountpoint and _real(given.mount) != _real(given.mountpoint):
        raise Problem(f"-m {given.mountpoint} and {given.mount} are different mounts; say one of them")
    given.mountpoint = given.mount or given.mountpoint
    path = find_socket(given)
    answer, settings, why_not = asyncio.run(_asked_for_doctor(given, path))
    where = answer["mountpoint"] if answer else given.mountpoint and _real(given.mountpoint)
    mounted = survey.find_mount(where) if where else None
    if mounted is None:
        raise Problem(
            f"{where} is no mount of iohang-fuse; before mounting, say iohang-mount --check SOURCE {where}"
            if where
            else f"{path}: {why_not}; say which mount it is: iohangctl doctor MOUNTPOINT"
        )
    facts = survey.of_mount(mounted, path, answer, settings, why_not)
    found = examine(facts)
    width = shutil.get_terminal_size((findings.WIDTH, 24)).columns
    sys.stdout.write(findings.report(facts.source, facts.mountpoint, found, json_=given.json, width=width))
    return findings.exit_code(found)


async def _asked_for_doctor(
    given: argparse.Namespace, path: Path
) -> tuple[dict[str, Any] | None, dict[str, Any] | None, str]:
    """The monitor's answers to query-status and query-settings, None where it gives none, and why."""
    try:
        async with _connected(given, path) as client:
            answer = await _ask(client, "query-status")
            try:
                return answer, await _ask(client, "query-settings"), ""
            except Problem as older:  # a server that was started before this program was upgraded
                return answer, None, str(older)
    except Problem as problem:
        return None, None, str(problem).removeprefix(f"{path}: ")


def _no_monitor(given: argparse.Namespace, path: Path, error: Exception) -> str:
    """Why there is nobody at *path*, and what would be right."""
    cause = error.exc if isinstance(error, ConnectError) else error
    if len(os.fsencode(path)) > LONGEST_SOCKET:
        return f"{path}: a socket's name has {LONGEST_SOCKET} bytes at most; name the one that the mount was told by monitor=FILE"
    if not isinstance(cause, OSError):
        why = str(cause) or "it ends the connection at once"
        return f"{path}: what listens there does not speak QMP ({why}); name the monitor of a mount"
    why = cause.strerror or str(cause)
    if cause.errno == errno.EACCES:
        return f"{path}: {why}; it is for root and the group that the mount was told by monitor_group=GROUP"
    if given.mountpoint:
        return f"{given.mountpoint} has no monitor ({path}: {why}); is it the mount point of an iohang-mount, with a monitor?"
    return f"{path}: {why}; is it mounted, and with a monitor?"


def _check_greeting(client: QMPClient, path: Path) -> None:
    """QEMU's own monitors answer, too, and `query-status` means something else there."""
    package = (client.greeting.QMP.version if client.greeting else {}).get("package")
    if package != PACKAGE:
        raise Problem(
            f"{path} is no monitor of an iohang-mount, but QMP of {package or 'something else'!r}; name that of a mount"
        )


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


async def _do(client: QMPClient, given: argparse.Namespace, order: Mapping[str, object]) -> int:
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
        answer = await _ask(client, "io-hang-set", order)
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
            raise Misuse(f"{word!r} sets nothing; say KEY=VALUE, such as timeout=5min")
        name = key.replace("-", "_")
        if name not in SETTABLE:
            there_are = nearest(name, SETTABLE) or f"; there are {', '.join(SETTABLE)}"
            raise Misuse(f"{key!r} cannot be set{there_are}")
        if name.replace("_", "-") in settings:
            raise Misuse(f"{name} is given twice; leave one of them out")
        settings[name.replace("_", "-")] = value
    if len(settings) == len(image):
        raise Misuse(f"nothing to set for {words[0]!r}; say KEY=VALUE, such as timeout=5min")
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
            print(json.dumps(event) if json_ else printable(f"{at} {_event(event)}"), flush=True)  # noqa: T201
            if event["event"] == "SHUTDOWN":
                return 0


# ---- words


def _show(lines: Sequence[str]) -> None:
    for line in lines:
        print(printable(line))  # noqa: T201


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
