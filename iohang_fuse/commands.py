"""The monitor's commands: what an operator can ask, and have done, and what each answers.

1. Arguments are checked before anything is done: their kinds by qmp.py, with the checks that stand here, and that there is such
   an image by `Commands.call`.
2. Each acts at once and never waits for the storage; what comes of it later, the events tell.
3. Ages and remaining times are seconds, `since` is seconds since the epoch.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import time
from typing import TYPE_CHECKING, Any

import trio

from iohang_fuse import limits
from iohang_fuse.config import nearest, parse_span, shown
from iohang_fuse.events import Op
from iohang_fuse.messages import errno_name
from iohang_fuse.qmp import Argument, QmpError, string
from iohang_fuse.rehandle import State

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from iohang_fuse.images import Image
    from iohang_fuse.rehandle import Policy, Request
    from iohang_fuse.requests import Requests

log = logging.getLogger(__name__)

MOST_REQUESTS = 1000
"""In one answer of `query-held`, unless told: some 200 KB."""

MOST_COMPARED = 100
"""Images whose names are looked at for the nearest neighbour of one that is not there."""

SHORTEST_INTERVAL_S = 0.1

_TIMEOUTS = {
    "timeout": tuple(Op),
    "read-timeout": (Op.READ,),
    "write-timeout": (Op.WRITE,),
    "fsync-timeout": (Op.FSYNC,),
}


def _span(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError("expected: seconds, or a span of time such as '90s', '5min', 'inf'")  # noqa: TRY004 - see qmp.py
    return parse_span(value)


def _interval(value: object) -> float:
    seconds = _span(value)
    if not SHORTEST_INTERVAL_S <= seconds < math.inf:
        raise ValueError(f"{value!r} is no interval; say at least {SHORTEST_INTERVAL_S} s")
    return seconds


def _count(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError("expected: a number from 1 on")
    return value


_IMAGE = {"image": Argument(string)}

ARGUMENTS: Mapping[str, Mapping[str, Argument]] = {
    "query-version": {},
    "query-commands": {},
    "query-status": {},
    "query-settings": {},
    "query-io-hang": _IMAGE,
    "query-held": {**_IMAGE, "limit": Argument(_count)},
    "io-hang-retry": _IMAGE,
    "io-hang-drain": _IMAGE,
    "io-hang-fail": _IMAGE,
    "io-hang-pause": _IMAGE,
    "io-hang-unpause": _IMAGE,
    "io-hang-set": {**_IMAGE, "interval": Argument(_interval), **dict.fromkeys(_TIMEOUTS, Argument(_span))},
    "quit": {},
}
"""By command, what it takes."""

_LASTING = {"io-hang-pause", "io-hang-unpause", "io-hang-set"}
"""What is said of all images is true of those that are opened later, too."""


@dataclasses.dataclass(frozen=True, slots=True)
class About:
    """What `query-status` says of the mount, and nobody can change."""

    source: str
    mountpoint: str
    version: str
    pid: int


class Commands:
    """The commands on the images of one mount."""

    def __init__(
        self, requests: Requests, about: About, end: Callable[[], None], settings: Mapping[str, object] | None = None
    ) -> None:
        """*end*: what `quit` does, which is what SIGTERM does. *settings*: the options that nobody can change."""
        self._settings = settings or {}
        self._requests = requests
        self._about = about
        self._end = end
        self._begun_s = time.time()

    def call(self, name: str, arguments: Mapping[str, Any]) -> object:
        """Make one of `ARGUMENTS`. Raises QmpError where there is no such image."""
        method: Callable[..., Any] = getattr(self, "_" + name.replace("-", "_"))
        given = {key.replace("-", "_"): value for key, value in arguments.items()}
        if "image" not in ARGUMENTS[name]:
            return method()
        image = given.pop("image", None)
        if name in _LASTING:
            given["for_all"] = image is None
        answer = method(self._images(image), **given)
        if name.startswith("io-hang-"):  # who asks later why a guest has had an error finds it here
            words = [f"{key}={value}" for key, value in arguments.items() if key != "image"]
            what = "all images" if image is None else image
            log.info("an operator: %s of %s: %d concerned", " ".join([name, *words]), what, len(answer))
        return answer

    def _images(self, name: str | None) -> list[Image]:
        images = [*self._requests.images.values()]
        if name is None:
            return images
        found = [image for image in images if image.held.image == name]
        if not found:
            # Of some alone: to compare a name with thousands would take a part of a second from everybody.
            names = [image.held.image for image in images[:MOST_COMPARED]]
            raise QmpError(f"no image {shown(name)} is open here{nearest(name, names)}")
        return found

    # ---- questions

    def _query_commands(self) -> object:
        return [{"name": name} for name in sorted({*ARGUMENTS, "qmp_capabilities"})]

    def _query_status(self) -> object:
        requests = self._requests
        images = [*requests.images.values()]
        states = [_state(image) for image in images]
        worst = next((state for state in ("timed-out", "hanging") if state in states), "healthy")
        engine = requests.engine
        return {
            "status": worst,
            "running": True,
            "images": len(images),
            "hanging": states.count("hanging"),
            "timed-out": states.count("timed-out"),
            "held": sum(len(image.held.held) for image in images),
            "held-bytes": requests.held_bytes,
            "holding": requests.holding and all(image.held.holding for image in images),
            "engine": engine.name,
            **({"engine-reason": engine.why_not} if engine.why_not else {}),
            **dataclasses.asdict(self._about),
            "since": self._begun_s,
        }

    def _query_settings(self) -> object:
        """The options in force for what is opened now."""
        policy = self._requests.policy
        return {
            **{f"{op}-timeout": _finite(policy.timeout_s[op]) for op in Op},
            "interval": policy.interval_s,
            "blocked-after": policy.blocked_after_s,
            "recovery-gate": policy.recovery_gate,
            "errors": sorted(str(errno_name(number)) for number in policy.errors),
            "timeout-errno": errno_name(policy.timeout_errno),
            **self._settings,
        }

    def _query_io_hang(self, images: list[Image]) -> object:
        return [_described(image) for image in images]

    def _query_held(self, images: list[Image], limit: int = MOST_REQUESTS) -> object:
        now = trio.current_time()
        found: list[dict[str, object]] = []
        for image in images:
            for request in image.held.held.values():
                if len(found) == limit:
                    return found
                found.append(_request(image, request, now))
        return found

    # ---- acts

    def _io_hang_retry(self, images: list[Image]) -> object:
        answer = self._act(images, self._requests.retry)
        self._requests.hasten_soon()
        return answer

    def _io_hang_drain(self, images: list[Image]) -> object:
        return self._act(images, self._requests.drain)

    def _io_hang_fail(self, images: list[Image]) -> object:
        return self._act(images, self._requests.fail)

    def _act(self, images: list[Image], act: Callable[[Image], None]) -> object:
        """*act* on those that are sick. The answer says how many requests of each were held before, and are now."""
        done = []
        for image in images:
            if image.held.sick:
                before = len(image.held.held)
                act(image)
                done.append({"image": image.held.image, "requests": before, "held": len(image.held.held)})
        return done

    def _io_hang_pause(self, images: list[Image], *, for_all: bool) -> object:
        return self._set_holding(images, on=False, for_all=for_all)

    def _io_hang_unpause(self, images: list[Image], *, for_all: bool) -> object:
        return self._set_holding(images, on=True, for_all=for_all)

    def _set_holding(self, images: list[Image], *, on: bool, for_all: bool) -> object:
        if for_all:
            self._requests.holding = on
        changed = []
        for image in images:
            changed.append(
                {"image": image.held.image, "held": len(image.held.held), "changed": image.held.holding is not on}
            )
            self._requests.set_holding(image, on=on)
        return changed

    def _io_hang_set(self, images: list[Image], *, for_all: bool, **given: float) -> object:
        if not given:
            raise QmpError(f"nothing to set; say one of {', '.join(sorted({'interval', *_TIMEOUTS}))}")
        _check_against_the_kernel(given)
        if for_all:
            self._requests.set_policy_of_new_images(_changed(self._requests.policy, given))
        done = []
        for image in images:
            policy = _changed(image.held.policy, given)
            self._requests.set_policy(image, policy)
            timeouts = {f"{op}-timeout": _finite(policy.timeout_s[op]) for op in Op}
            done.append(
                {"image": image.held.image, "held": len(image.held.held), "interval": policy.interval_s, **timeouts}
            )
        return done

    def _quit(self) -> object:
        self._end()
        return {}


def _check_against_the_kernel(given: Mapping[str, float]) -> None:
    """What would be refused at the start is refused now, too: the kernel would end the whole mount."""
    timeouts = [seconds for name, seconds in given.items() if name != "interval" and seconds]
    found = limits.problems(
        limits.read_system(),
        timeout_s=max(timeouts, default=0),
        shortest_timeout_s=0,
        interval_s=SHORTEST_INTERVAL_S,
        max_background=1,
    )
    fatal = [problem.text for problem in found if problem.fatal]
    if fatal:
        raise QmpError("; ".join(fatal))


def _changed(policy: Policy, given: Mapping[str, float]) -> Policy:
    timeouts = dict(policy.timeout_s)
    for key in ("timeout", *_TIMEOUTS):  # the one for all first: what is said of one kind is more
        value = given.get(key.replace("-", "_"))
        if value is not None:
            timeouts |= dict.fromkeys(_TIMEOUTS[key], value)
    shortest_s = min((each for each in timeouts.values() if each > 0), default=math.inf)
    interval_s = limits.effective_interval(shortest_s, given.get("interval", policy.interval_s))
    return dataclasses.replace(policy, timeout_s=timeouts, interval_s=interval_s)


def _state(image: Image) -> str:
    if image.held.timed_out:
        return "timed-out"
    return "hanging" if image.held.hanging else "healthy"


def _described(image: Image) -> dict[str, object]:
    held, now = image.held, trio.current_time()
    requests = [*held.held.values()]
    deadlines = [request.deadline_s for request in requests if request.deadline_s is not None]
    described: dict[str, object] = {
        "image": held.image,
        "state": _state(image),
        "holding": held.holding,
        "held": len(requests),
        "in-flight": held.in_flight,
        "attempts": sum(request.attempts for request in requests),
        "bytes": sum(request.length for request in requests if request.op is Op.WRITE),
        "unsynced-bytes": image.log.bytes,
    }
    if held.sick:
        described |= {"errno": errno_name(held.errno), "next-retry": _finite(max(held.next_tick_s - now, 0))}
    if requests:
        oldest_s = min(request.limited_s for request in requests)
        described |= {"oldest-age": now - oldest_s, "nearest-deadline": _finite(max(min(deadlines) - now, 0))}
    if held.since_s is not None:
        described["since"] = time.time() - (now - held.since_s)
    if image.refusal:
        described["reopen-refused"] = image.refusal
    return described


def _request(image: Image, request: Request, now: float) -> dict[str, object]:
    return {
        "image": image.held.image,
        "op": str(request.op),
        "offset": request.offset,
        "length": request.length,
        "state": "in-flight" if request.state is State.TRYING else "waiting",
        "age": now - request.arrived_s,
        "deadline": None if request.deadline_s is None else _finite(request.deadline_s - now),
        "errno": errno_name(request.errno),
        "attempts": request.attempts,
    }


def _finite(seconds: float) -> float | None:
    """JSON has no infinity: null, for what is never."""
    return seconds if seconds < math.inf else None
