"""iohangctl: asks the monitor of a mount, and tells it what to do.

Each verb is one command of the monitor's; `--json` shows its answer. client.py has the way there, answers.py the words.
"""

from __future__ import annotations

import argparse
import asyncio
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

from iohang_fuse import __version__, answers
from iohang_fuse.answers import UNKNOWN
from iohang_fuse.client import NO_MOUNT, Misuse, Problem, ask, connected, find_socket, real, sockets
from iohang_fuse.config import nearest, parse_span
from iohang_fuse.doctor import findings, survey
from iohang_fuse.doctor.examination import examine
from iohang_fuse.messages import printable

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from qemu.qmp import QMPClient

REFUSED, USAGE = 1, 2
"""Exit codes of the other verbs: where they could not, and for wrong usage."""

SHORTEST_DELAY_S, LONGEST_DELAY_S = 0.1, 3600.0
"""Between two frames of `top`."""

ACTS = {
    "retry": "try what is held now, and do not wait for the next interval",
    "drain": "try what is held now; if that fails, answer it with its error",
    "fail": "answer what is held with an error, now",
    "pause": "hold no more: later errors are passed on to their consumers",
    "unpause": "hold again",
}


VERBS = ("status", "check", "watch", "top", "doctor", "list", "held", *ACTS, "set")
THERE_ARE = ", ".join(VERBS)
JUDGES = {"check", "doctor"}  # whose exit code is their answer

SETTABLE = ("timeout", "read_timeout", "write_timeout", "fsync_timeout", "interval")


class _Parser(argparse.ArgumentParser):
    """argparse, which says in one line what is wrong and what would be right."""

    def error(self, message: str) -> NoReturn:
        verb = re.search(r"^argument VERB: invalid choice: '(.*)' \(choose from", message)
        if verb is not None:
            message = f"no verb {verb[1]!r}{nearest(verb[1], VERBS) or f'; there are {THERE_ARE}'}"
        raise Misuse(f"{message}; see {self.prog} --help")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line. Returns the exit code."""
    words = sys.argv[1:] if arguments is None else arguments
    verb = next((word for word in words if word in VERBS), "")  # until it is known better
    _prepare_streams()
    code = REFUSED
    try:
        given = _parsed(words)
        verb = given.verb
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
    if given.socket is not None and given.mountpoint is not None:
        parser.error("argument -m/--mountpoint: not allowed with argument -s/--socket")
    if given.verb is None:
        parser.error(f"which verb? There are {THERE_ARE}")
    return given


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="iohangctl",
        description="Ask a mount of iohang-fuse which images hang, and say what to do.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"iohangctl {__version__}")
    _add_common(parser)
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
    for verb in verbs.choices.values():  # before the verb or behind it: who can remember that at night
        _add_common(verb, default=argparse.SUPPRESS)
    return parser


def _add_common(parser: argparse.ArgumentParser, **more: Any) -> None:
    parser.add_argument("--json", action="store_true", help="the monitor's own answer, for programs", **more)
    where = parser.add_mutually_exclusive_group()
    where.add_argument(
        "-m", "--mountpoint", metavar="DIRECTORY", help="the mount (needed where there are several)", **more
    )
    where.add_argument("-s", "--socket", metavar="FILE", help="its monitor's socket, where that is elsewhere", **more)


# ---- the monitor


async def _run(given: argparse.Namespace) -> int:
    if given.verb == "top":
        return await _top(given)
    order = _settings(given.what) if given.verb == "set" else {}  # what is wrong with it needs no server to say so
    async with connected(given, find_socket(given)) as client:
        return await _do(client, given, order)


async def _top(given: argparse.Namespace) -> int:
    # Not before: rich is for this screen alone.
    from iohang_fuse import top  # noqa: PLC0415

    try:
        interval_s = parse_span(given.delay)
    except ValueError as error:
        raise Misuse(f"--delay: {error}") from None
    if not SHORTEST_DELAY_S <= interval_s <= LONGEST_DELAY_S:
        raise Misuse(f"--delay: '{given.delay}' is out of range; say {SHORTEST_DELAY_S:g} s to {LONGEST_DELAY_S:g} s")
    if given.frames is not None and given.frames < 1:
        raise Misuse(f"--frames: {given.frames} is no number of frames; say 1 or more")
    one = find_socket(given) if given.socket or given.mountpoint else None
    if one is not None:
        async with connected(given, one):  # whether there is such a mount at all
            pass
    elif not sockets():
        raise Problem(NO_MOUNT)
    wish = top.Wish(interval_s, given.frames or math.inf, json=given.json, plain=given.batch)
    try:
        return await top.run(wish, sockets if one is None else lambda: [one])
    except BrokenPipeError:  # `iohangctl top | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _doctor(given: argparse.Namespace) -> int:
    """Not on an event loop: the survey forks. Raises `Problem` where there is no such mount."""
    if given.mount and given.mountpoint and real(given.mount) != real(given.mountpoint):
        raise Problem(f"-m {given.mountpoint} and {given.mount} are different mounts; say one of them")
    given.mountpoint = given.mount or given.mountpoint
    path = find_socket(given)
    answer, settings, why_not = asyncio.run(_asked_for_doctor(given, path))
    where = answer["mountpoint"] if answer else given.mountpoint and real(given.mountpoint)
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
        async with connected(given, path) as client:
            answer = await ask(client, "query-status")
            try:
                return answer, await ask(client, "query-settings"), ""
            except Problem as older:  # a server that was started before this program was upgraded
                return answer, None, str(older)
    except Problem as problem:
        return None, None, str(problem).removeprefix(f"{path}: ")


async def _do(client: QMPClient, given: argparse.Namespace, order: Mapping[str, object]) -> int:
    verb = given.verb
    if verb == "watch":
        return await _watch(client, json_=given.json)
    if verb in {"status", "check"}:
        answer = await ask(client, "query-status")
        images = await ask(client, "query-io-hang")
        if given.json:
            _show_json({**answer, "images": images} if verb == "status" else answer)
        else:
            _show(answers.status_lines(answer, images) if verb == "status" else [answers.check_line(answer, images)])
        return answers.judgement(answer) if verb == "check" else 0
    if verb == "set":
        answer = await ask(client, "io-hang-set", order)
    else:
        command = {"list": "query-io-hang", "held": "query-held"}.get(verb, f"io-hang-{verb}")
        answer = await ask(client, command, {"image": given.image} if given.image is not None else {})
    if given.json:
        _show_json(answer)
    else:
        _show(_WORDS.get(verb, answers.acted_lines)(answer))
    return 0


_WORDS: Mapping[str, Callable[[list[dict[str, Any]]], list[str]]] = {
    "list": answers.image_lines,
    "held": answers.held_lines,
    "set": answers.set_lines,
    "pause": answers.paused_lines,
    "unpause": answers.unpaused_lines,
}


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
            print(json.dumps(event) if json_ else printable(f"{at} {answers.event_line(event)}"), flush=True)  # noqa: T201
            if event["event"] == "SHUTDOWN":
                return 0


def _show(lines: Sequence[str]) -> None:
    for line in lines:
        print(printable(line))  # noqa: T201


def _show_json(answer: object) -> None:
    print(json.dumps(answer, indent=2))  # noqa: T201
