"""What systemd is told of a mount: that it serves, how it is, that it needs more time to end, and that it ends.

1. A status is what is true now, so it is looked at anew each time and sent when it has changed: an event only says that it is time.
2. READY=1 waits until the mount answers. STOPPING=1 waits until there is no way back: with it systemd counts down, and a mount
   that was asked to end and is in use goes on serving.
3. More time is asked for while what is held may still get its regular answer, and no longer than `LONGEST_PLEA_S`.
4. No WATCHDOG=1, whatever the unit says: a watchdog that ends a server which is slow for a minute ends every guest on the
   mount with it. That a mount answers is what `iohangctl check` is for, which tells somebody.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import trio

from iohang_fuse import diagnosis
from iohang_fuse.limits import SLOWEST_ATTEMPT_S
from iohang_fuse.status import hang_words

if TYPE_CHECKING:
    from iohang_fuse.events import Event
    from iohang_fuse.notify import Notify
    from iohang_fuse.requests import Requests

PAUSE_S = 5.0
"""Between two looks where nothing has happened: counts change without an event. Never more often than each `SHORTEST_PAUSE_S`."""

SHORTEST_PAUSE_S = 0.5

PLEA_S = 20.0
"""What is asked for at a time: four looks, so that a late one costs nothing."""

LONGEST_PLEA_S = 600.0
"""From the signal to end on. A shutdown that takes longer gets its plug pulled, and then nothing ends as it should."""


class Service:
    """One mount, as its service manager sees it. Costs nothing where there is none."""

    def __init__(self, notify: Notify, requests: Requests, serving: str) -> None:
        """*serving*: the status while all is well."""
        self._notify = notify
        self._requests = requests
        self._serving = serving
        self._ready = False
        self._ended = False
        self._asked = ""  # why it should end, and cannot yet
        self._asked_s = math.inf
        self._news = trio.Event()

    def tell(self, _event: Event) -> None:
        """Something has happened to an image."""
        self._news.set()

    def ready(self) -> None:
        """The mount answers."""
        self._ready = True
        self._news.set()

    def asked_to_end(self, words: str) -> None:
        """It has been asked to end, and goes on for now: *words* say why."""
        self._asked = words
        self._asked_s = min(self._asked_s, trio.current_time())
        self._news.set()

    def goes_on(self) -> None:
        """It is not to end any more."""
        self._asked = ""
        self._asked_s = math.inf
        self._news.set()

    def ending(self, words: str) -> None:
        """It ends now, whatever happens."""
        self._notify.tell(STOPPING=1, STATUS=words)
        self._ended = True

    async def serve(self) -> None:
        """Tell, until the end. Returns at once if nobody wants to know."""
        last = ""
        while self._notify.wanted and not self._ended:
            self._news = trio.Event()
            said: dict[str, object] = {"STATUS": self._status()}
            if self._ready:
                said["READY"] = 1
            if self._needs_time(trio.current_time()):
                self._notify.extend_timeout(PLEA_S)
            if repr(said) != last and self._notify.tell(**said):  # what did not get through is said again
                last = repr(said)
            await trio.sleep(SHORTEST_PAUSE_S)
            with trio.move_on_after(PAUSE_S - SHORTEST_PAUSE_S):
                await self._news.wait()

    def _status(self) -> str:
        if not self._ready:
            return "starting"
        hangs = hang_words((image.held for image in self._requests.images.values()), diagnosis.wall_clock)
        if self._asked:
            return f"{self._asked}; {hangs}" if hangs else self._asked
        return hangs or self._serving

    def _needs_time(self, now: float) -> bool:
        """Whether an end now would take an answer from a request that is on its way to one."""
        waited_s = now - self._asked_s
        if not 0 <= waited_s < LONGEST_PLEA_S:
            return False
        if self._requests.writes_in_flight() and waited_s < SLOWEST_ATTEMPT_S:
            return True
        deadlines = (
            request.deadline_s
            for image in self._requests.images.values()
            for request in image.held.held.values()
            if request.deadline_s is not None
        )
        return any(now < deadline_s + SLOWEST_ATTEMPT_S < math.inf for deadline_s in deadlines)
