"""The end of a mount: the signals that ask for it, who is in the way, and what is owed to those who wait (P8).

1. The first SIGTERM unmounts. If the mount is in use it stays, its users are named, and it is unmounted as soon as they have gone.
2. The second detaches it, and answers what is held with an error. The third does not wait for anything.
3. A write or fsync inside a system call of SOURCE is not answered before that returns (P5): until the third signal.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import signal
from typing import TYPE_CHECKING

import trio

from iohang_fuse import diagnosis, presence, syscalls
from iohang_fuse.messages import error_words, printable

if TYPE_CHECKING:
    from collections.abc import Callable

    from iohang_fuse.requests import Requests
    from iohang_fuse.service import Service

log = logging.getLogger(__name__)

_WHEN_FREE_S = 600.0
"""After a first SIGTERM that found the mount in use: how long it is unmounted as soon as it is free. Long enough for guests to
shut down; not for ever, or a SIGTERM that everybody has forgotten would take the mount away between two runs of a guest."""

_LAST_CLOSE_S = 10.0
"""After a second SIGTERM: how long consumers get to close their files before they lose the mount."""

_USERS_S = 5.0
"""For finding out who uses the mount."""

_LAST_WORD_S = 0.05
"""For the monitor's SHUTDOWN to go out."""


class Unmounting:
    """Of one mount."""

    def __init__(
        self, mountpoint: str, requests: Requests, service: Service, *, say_goodbye: Callable[[str], None]
    ) -> None:
        """*say_goodbye* tells the monitor's clients why, as the last word."""
        self._mountpoint = mountpoint
        self._requests = requests
        self._service = service
        self._tell_clients = say_goodbye
        self._unmounted = False
        self._free_by_s = 0.0
        self.device_minor: int | None = None  # of the mount, once it serves
        self.detached = False
        self._dumping = trio.Lock()

    async def serve(self, nursery: trio.Nursery, end: Callable[[], None]) -> None:
        """Mind the signals. Never returns. *end* ends the server, whatever it does."""
        with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1) as signals:
            asked = 0
            async for number in signals:
                if number == signal.SIGUSR1:
                    nursery.start_soon(self._dump)
                    continue
                # A terminal that hangs up asks once; it does not insist.
                asked += number != signal.SIGHUP
                if asked > 2 and self.detached:
                    await self.say_goodbye("detached")
                    end()
                elif not self.detached:
                    await self._unmount(signal.Signals(number).name, nursery, end, insist=asked > 1)

    async def _unmount(self, why: str, nursery: trio.Nursery, end: Callable[[], None], *, insist: bool) -> None:
        """The first unmounts, or says who is in the way; the second takes no no for an answer; the third does not wait (P8)."""
        flags = syscalls.MNT_DETACH if insist else 0
        try:
            # After `umount -l` there is nothing to unmount; what is there by now is somebody else's.
            if not self._unmounted and self._on_top():
                await trio.to_thread.run_sync(syscalls.umount, self._mountpoint, flags)
            self._is_unmounted()
        except OSError as error:
            if error.errno != errno.EBUSY:
                log.error(  # noqa: TRY400 - the errno says it all
                    "%s: cannot unmount %s: %s", why, self._mountpoint, error_words(error.errno)
                )
                return
            users = await self._users()
            held = sum(len(image.held.held) for image in self._requests.images.values())
            by = (
                printable(", ".join(users))
                or "a process that was killed and waits for its I/O, or one in another mount namespace"
            )
            log.warning(
                "%s: %s stays mounted, it is in use by %s (%d requests held). It is unmounted when they have ended within %g min. "
                "Stop them, or send the signal again to detach the mount and end what is held with an error.",
                why, self._mountpoint, by, held, _WHEN_FREE_S / 60,
            )  # fmt: skip
            self._service.asked_to_end(f"{why}: {self._mountpoint} stays mounted, it is in use by {by}")
            is_watched = trio.current_time() < self._free_by_s
            self._free_by_s = trio.current_time() + _WHEN_FREE_S
            if not is_watched:
                nursery.start_soon(self._unmount_when_free)
            return
        if not insist:
            return
        self.detached = True
        self._service.asked_to_end("detached; open files are being closed")
        self._requests.hold_no_more()
        log.warning("%s again: %s is detached; held requests have their errors. Open files have %g s to be closed.",
                    why, self._mountpoint, _LAST_CLOSE_S)  # fmt: skip
        nursery.start_soon(self._end, end)

    async def _users(self) -> list[str]:
        """Who is in the way. A look at a process that hangs in a page fault may never return: no signal waits for that."""
        with trio.move_on_after(_USERS_S):
            return await trio.to_thread.run_sync(diagnosis.users_of, self._mountpoint, abandon_on_cancel=True)
        return ["processes that could not be looked at"]

    def _is_unmounted(self) -> None:
        # We end when the kernel says that the last copy of the mount is gone. A service with a mount namespace of its
        # own (systemd's PrivateTmp= and the like) may have one for as long as it runs.
        self._unmounted = True
        self._service.asked_to_end("unmounted; serving those who still use it")

    async def _unmount_when_free(self) -> None:
        """Guests that are shutting down leave one by one; systemd sends its signal once."""
        while trio.current_time() < self._free_by_s:
            await trio.sleep(1)
            if self._unmounted or self.detached:
                return
            if not self._on_top():  # `umount -l` was faster
                self._is_unmounted()
                return
            with contextlib.suppress(OSError):
                await trio.to_thread.run_sync(syscalls.umount, self._mountpoint, 0)
                self._is_unmounted()
                return
        self._service.goes_on()
        log.warning("%s is still in use, and stays mounted", self._mountpoint)

    def _on_top(self) -> bool:
        """Whether it is us whom umount(2) would take away there, and not what somebody has mounted since."""
        if self.device_minor is None:
            return True  # it has just been mounted
        there = [mounted for mounted in presence.mount_table() if mounted.mountpoint == self._mountpoint]
        return bool(there) and there[-1].device_minor == self.device_minor

    async def _end(self, end: Callable[[], None]) -> None:
        """Time for the last close, and as long as it takes for writes inside a system call: ending would answer them (P5)."""
        await trio.sleep(_LAST_CLOSE_S)
        while stuck := self._requests.writes_in_flight():
            log.warning(
                "%d writes or fsyncs are inside a system call of SOURCE that has not returned: %s. They are answered when it does. "
                "Send the signal once more to end without them: their consumers get an error, and the data may still land.",
                sum(stuck.values()), ", ".join(f"{name} ({count})" for name, count in stuck.items()),
            )  # fmt: skip
            for _ in range(round(_LAST_CLOSE_S)):
                await trio.sleep(1)
                if not self._requests.writes_in_flight():
                    break
        await self.say_goodbye("detached")
        end()

    async def say_goodbye(self, why: str) -> None:
        """The server ends now."""
        self._service.ending(f"{self._mountpoint} is {why}")
        self._tell_clients(why)
        await trio.sleep(_LAST_WORD_S)

    async def _dump(self) -> None:
        """SIGUSR1: everything that waits, and where every task and thread is. One at a time."""
        async with self._dumping:
            await diagnosis.write_dump(self._requests)
