"""The monitor: a unix socket around qmp.py.

1. A client costs nobody anything. What it sends is bounded (qmp.py), what it does not read is bounded (`MOST_UNREAD`), and then
   it is dropped. It is served by tasks of its own.
2. Commands are made at once, one after the other, in the order in which a client sends them.
3. Nothing here touches the storage: it answers while that is dead.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import shutil
import socket
import time
from typing import TYPE_CHECKING

import trio

from iohang_fuse import socketname
from iohang_fuse.commands import ARGUMENTS, Commands
from iohang_fuse.config import LONGEST_SOCKET
from iohang_fuse.events import Event, HangBegan, HangEnded, TimedOut
from iohang_fuse.messages import errno_name
from iohang_fuse.qmp import PACKAGE, Call, QmpError, Session
from iohang_fuse.throttle import Throttle

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

log = logging.getLogger(__name__)

MODE = 0o660

MOST_UNREAD = 4 << 20
"""Bytes that wait for a client to read them: ten answers of `query-held` with 1,000 requests."""

MOST_CLIENTS = 200
"""At once. Each costs two tasks and a descriptor; who comes then waits."""

BURST, PER_S = 20, 1.0
"""Events of one kind and image: so many at once, and so many a second in the long run. When storage flaps, what is left out is
counted in the next one that is sent, and the last one is never left out."""

_Said = tuple[str, dict[str, object], float]
"""An event as QMP has it: its name, its data, and when it was (seconds since the epoch)."""

_RECEIVE_BYTES = 16 << 10

_PAUSE_S = 0.001
"""After each command of a client: an answer may take some milliseconds to make, and guests have their turn in between (P7)."""


class _Client:
    """One connection."""

    def __init__(self, stream: trio.SocketStream, session: Session) -> None:
        self.session = session
        self._stream = stream
        self._unread = bytearray()
        self._more = trio.Event()
        self._all_sent = trio.Event()
        self._scope = trio.CancelScope()

    def send(self, data: bytes) -> None:
        """Soon. A client that does not read is dropped."""
        self._unread += data
        if len(self._unread) > MOST_UNREAD:
            log.warning("monitor: a client has %d bytes to read and does not; it is dropped", len(self._unread))
            self._unread.clear()
            self._scope.cancel()
        self._more.set()

    async def serve(self, call: Callable[[Call], object]) -> None:
        """Until it goes."""
        with self._scope:
            async with self._stream, trio.open_nursery() as nursery:
                nursery.start_soon(self._write)
                self.send(self.session.greeting())
                with contextlib.suppress(trio.BrokenResourceError, trio.ClosedResourceError):
                    while not self.session.ended and (data := await self._stream.receive_some(_RECEIVE_BYTES)):
                        for item in self.session.feed(data):
                            self.send(item if isinstance(item, bytes) else self._answered(item, call))
                            await trio.sleep(_PAUSE_S)
                    if self._unread:  # the last words of a connection that ends
                        with trio.move_on_after(1):
                            await self._all_sent.wait()
                nursery.cancel_scope.cancel()

    def _answered(self, item: Call, call: Callable[[Call], object]) -> bytes:
        try:
            return self.session.answer(item, call(item))
        except QmpError as error:
            return self.session.refuse(item, error)
        except Exception:  # a bug costs one command, not the mount (P11)
            log.exception("monitor: a bug in %s", item.name)
            return self.session.refuse(item, QmpError(f"a bug in {item.name}; the log of the mount has its traceback"))

    async def _write(self) -> None:
        try:
            while True:
                await self._more.wait()
                self._more, self._all_sent = trio.Event(), trio.Event()
                while self._unread:
                    data = bytes(self._unread[:_RECEIVE_BYTES])
                    await self._stream.send_all(data)
                    del self._unread[: len(data)]
                self._all_sent.set()
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            self._scope.cancel()  # it is gone


class Monitor:
    """The socket of one mount."""

    def __init__(self, path: Path, commands: Commands, version: tuple[int, int, int]) -> None:
        self._path = path
        self._commands = commands
        self._version = version
        self._clients: set[_Client] = set()
        self._throttle: Throttle[tuple[str, str], _Said] = Throttle(BURST, PER_S)  # by image and event
        self._socket: socket.socket | None = None
        self._identity = (0, 0)

    def bind(self, group: str | None, has_lost: Callable[[str], bool] = lambda _mountpoint: False) -> None:
        """Make the socket, for root and *group*. Raises OSError, or LookupError if there is no such group.

        Who has the name already keeps it, unless it is dead or *has_lost* its mount point: see socketname.py.
        """
        if len(os.fsencode(self._path)) > LONGEST_SOCKET:
            raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG))
        if not self._path.parent.exists():
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._path.parent.chmod(0o755)  # whatever the umask is: the group has to come through

        def prepare(sock: socket.socket) -> None:
            if group is not None:
                shutil.chown(self._path, group=group)
            self._path.chmod(MODE)  # before it listens: nobody has come in by then
            sock.listen(64)

        sock = socketname.claim(self._path, has_lost, prepare)
        self._socket, self._identity = sock, socketname.identity_of(self._path)
        sock.setblocking(False)  # noqa: FBT003

    async def serve(self) -> None:
        """Never returns; leaves no socket behind."""
        assert self._socket is not None
        listener = trio.SocketListener(trio.socket.from_stdlib_socket(self._socket))
        room = trio.Semaphore(MOST_CLIENTS)
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._send_what_waits)
                while True:
                    if not room.value:
                        log.warning("monitor: %d clients at once; the next ones wait until some go", MOST_CLIENTS)
                    await room.acquire()
                    try:
                        stream = await listener.accept()
                    except OSError as error:  # no descriptor left, which passes
                        log.warning("monitor: a client cannot be let in: %s", error)
                        room.release()
                        await trio.sleep(1)
                        continue
                    nursery.start_soon(self._serve_client, stream, room)
        finally:
            self.close()

    def close(self) -> None:
        """Nobody comes in any more."""
        if self._socket is not None:
            # In this order: a server that starts in this moment has the lock, and asks whether anybody listens.
            self._socket.close()
            self._socket = None
            socketname.give_back(self._path, self._identity)

    async def _serve_client(self, stream: trio.SocketStream, room: trio.Semaphore) -> None:
        client = _Client(stream, Session(ARGUMENTS, self._version, PACKAGE))
        self._clients.add(client)
        try:
            await client.serve(lambda call: self._call(client, call))
        except Exception:
            log.exception("monitor: a bug in serving a client; the mount stays")
        finally:
            self._clients.discard(client)
            room.release()

    def _call(self, client: _Client, call: Call) -> object:
        if call.name == "query-version":
            return client.session.version
        return self._commands.call(call.name, call.arguments)

    # ---- events

    def tell(self, event: Event) -> None:
        """Something has happened to an image."""
        said = _said(event)
        if said is None:
            return
        name, data = said
        told = self._throttle.offer((event.image, name), (name, data, time.time()), event.at_s)
        if told is not None:
            self._send(*told)

    def shut_down(self, reason: str) -> None:
        """The mount ends."""
        for client in self._clients:
            client.send(client.session.event("SHUTDOWN", {"reason": reason}, time.time()))

    async def _send_what_waits(self) -> None:
        while True:
            await trio.sleep(1 / PER_S)
            for told in self._throttle.due(trio.current_time()):
                self._send(*told)

    def _send(self, said: _Said, left_out: int) -> None:
        name, data, at_s = said
        if left_out:
            data = data | {"left-out": left_out}
        for client in self._clients:
            client.send(client.session.event(name, data, at_s))


def _said(event: Event) -> tuple[str, dict[str, object]] | None:
    """QMP's words for it; None for what is no event of the monitor's, but a line of the log."""
    match event:
        case HangBegan():
            left_s = event.deadline_s - event.at_s
            return "BLOCK_IO_HANG", {
                "set": True, "image": event.image, "errno": errno_name(event.errno), "op": str(event.op), "held": 1,
                "timeout": left_s if left_s < float("inf") else None,
            }  # fmt: skip
        case HangEnded():
            return "BLOCK_IO_HANG", {
                "set": False, "image": event.image, "errno": errno_name(event.errno), "duration": event.duration_s,
                "held": 0, "held-max": event.held_max, "recovered": event.recovered, "given-up": event.given_up,
                "passed-on": event.passed_on,
            }  # fmt: skip
        case TimedOut():
            return "BLOCK_IO_HANG_TIMEOUT", {
                "set": event.on, "image": event.image, "errno": errno_name(event.errno), "op": str(event.op),
                "held": event.held,
            }  # fmt: skip
    return None
