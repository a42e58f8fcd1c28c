"""How metrics get out: over HTTP to Prometheus, or in a file to node_exporter. A thread of its own for either.

1. It answers while the storage is dead, and while the event loop of the mount is busy or stuck, which is then what it says.
2. It costs the mount next to nothing: a page is made at most every `FRESH_S`, `MOST_CLIENTS` are served at once, each has
   `CLIENT_S`, and what it sends is bounded.
3. What cannot be had (a port in use, a directory that is not there) is found by `bind`, before anything is mounted.
4. A bug here costs a page, not the mount.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import signal
import socket
import stat
import threading
import time
from typing import TYPE_CHECKING, Protocol

import trio

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

log = logging.getLogger(__name__)

MOST_CLIENTS = 32
"""At once; who comes then waits."""

CLIENT_S = 10.0
"""From its connection to the last byte. It is Prometheus' own default for how long a scrape may take."""

FRESH_S = 0.25
"""Younger pages are not made again: clients that come in droves must not take the processor from guests."""

WRITE_EVERY_S = 5.0
"""The file. node_exporter is asked every 15 s or so."""

STOP_S = 2.0
"""For the thread to end. It does at once, unless the file system of the file hangs."""

_REQUEST_BYTES = 8 << 10
_PAUSE_S = 0.005  # between two clients


class _Outlet(Protocol):
    def bind(self) -> None: ...

    async def serve(self) -> None: ...

    def close(self) -> None: ...


class Exposition:
    """The thread around an outlet: HTTP where *where* is a host and a port, or else a file."""

    def __init__(self, render: Callable[[], bytes], where: tuple[str, int] | Path) -> None:
        self._outlet: _Outlet = Http(render, *where) if isinstance(where, tuple) else Textfile(render, where)
        self._thread: threading.Thread | None = None
        self._token: trio.lowlevel.TrioToken | None = None
        self._scope: trio.CancelScope | None = None

    def bind(self) -> None:
        """Raises OSError where the outlet cannot be had."""
        self._outlet.bind()

    def start(self) -> None:
        """Serve, in a thread."""
        begun = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(begun,), name="metrics", daemon=True)
        self._thread.start()
        begun.wait()

    def stop(self) -> None:
        """Leave nothing behind."""
        if self._thread is None:
            self._outlet.close()
            return
        if self._token is not None and self._scope is not None:
            with contextlib.suppress(trio.RunFinishedError):
                self._token.run_sync_soon(self._scope.cancel)
        self._thread.join(STOP_S)

    def _run(self, begun: threading.Event) -> None:
        # They are for the main thread, which one of them has to wake from its read of /dev/fuse (limits.alarm_clock).
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        try:
            trio.run(self._serve, begun)
        except Exception:
            log.exception("metrics: a bug; the mount goes on without them")
        finally:
            begun.set()
            self._outlet.close()

    async def _serve(self, begun: threading.Event) -> None:
        with trio.CancelScope() as self._scope:
            self._token = trio.lowlevel.current_trio_token()
            begun.set()
            await self._outlet.serve()


# ---- HTTP


class Http:
    """GET /metrics, for Prometheus."""

    def __init__(self, render: Callable[[], bytes], host: str, port: int) -> None:
        self._render = render
        self._host = host
        self._port = port
        self._sockets: list[socket.socket] = []
        self._page = b""
        self._page_s = float("-inf")

    def bind(self) -> None:
        """At all addresses that the host's name has here. Raises OSError."""
        try:
            found = socket.getaddrinfo(self._host, self._port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        except socket.gaierror as error:
            raise OSError(errno.EADDRNOTAVAIL, f"no such host: {error.strerror}") from None
        try:
            for family, kind, protocol, _, address in dict.fromkeys(found):
                sock = socket.socket(family, kind | socket.SOCK_CLOEXEC, protocol)
                self._sockets.append(sock)
                # Soon after a restart, too. Two that listen are refused all the same.
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                if family == socket.AF_INET6:
                    sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                sock.bind(address)
                sock.listen(MOST_CLIENTS)
        except OSError:
            self.close()
            raise

    def close(self) -> None:
        """Nobody comes in any more."""
        for sock in self._sockets:
            sock.close()
        self._sockets.clear()

    async def serve(self) -> None:
        """Never returns."""
        room = trio.CapacityLimiter(MOST_CLIENTS)
        async with trio.open_nursery() as nursery:
            for sock in self._sockets:
                sock.setblocking(False)  # noqa: FBT003
                listener = trio.SocketListener(trio.socket.from_stdlib_socket(sock))
                nursery.start_soon(self._accept, listener, room, nursery)

    async def _accept(self, listener: trio.SocketListener, room: trio.CapacityLimiter, nursery: trio.Nursery) -> None:
        while True:
            client = object()
            await room.acquire_on_behalf_of(client)
            try:
                stream = await listener.accept()
            except OSError as error:  # no descriptor left, which passes
                log.warning("metrics: a client cannot be let in: %s", error)
                room.release_on_behalf_of(client)
                await trio.sleep(1)
                continue
            nursery.start_soon(self._serve_client, stream, lambda who=client: room.release_on_behalf_of(who))
            await trio.sleep(_PAUSE_S)

    async def _serve_client(self, stream: trio.SocketStream, leave: Callable[[], None]) -> None:
        try:
            with trio.move_on_after(CLIENT_S):
                async with stream:
                    with contextlib.suppress(trio.BrokenResourceError):
                        await stream.send_all(self._answer(await _request_line(stream)))
                        await _farewell(stream)
        finally:
            leave()

    def _answer(self, line: bytes) -> bytes:
        method, _, rest = line.partition(b" ")
        path = rest.partition(b" ")[0].partition(b"?")[0]
        if method not in {b"GET", b"HEAD"}:
            return _response("405 Method Not Allowed", b"say GET /metrics\n", extra="Allow: GET, HEAD\r\n")
        if path != b"/metrics":
            return _response("404 Not Found", b"say GET /metrics\n", bodiless=method == b"HEAD")
        try:
            page = self._fresh()
        except Exception:
            log.exception("metrics: a bug in making the page; the mount goes on")
            return _response("500 Internal Server Error", b"a bug; the log of the mount has its traceback\n")
        return _response("200 OK", page, "text/plain; version=0.0.4; charset=utf-8", bodiless=method == b"HEAD")

    def _fresh(self) -> bytes:
        now = time.monotonic()
        if now - self._page_s > FRESH_S:
            self._page = self._render()
            self._page_s = now
        return self._page


async def _request_line(stream: trio.SocketStream) -> bytes:
    """The first line of a request, after its last one has come."""
    received = b""
    while b"\r\n\r\n" not in received and b"\n\n" not in received and len(received) < _REQUEST_BYTES:
        data = await stream.receive_some(_REQUEST_BYTES)
        if not data:
            break
        received += data
    return received.partition(b"\n")[0].rstrip(b"\r")


async def _farewell(stream: trio.SocketStream) -> None:
    """A connection that is closed with something unread is reset, and the answer may be lost: read until the client has gone."""
    await stream.send_eof()
    while await stream.receive_some(_REQUEST_BYTES):
        pass


def _response(
    status: str, body: bytes, kind: str = "text/plain; charset=utf-8", *, extra: str = "", bodiless: bool = False
) -> bytes:
    head = (
        f"HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\n{extra}"
        "Cache-Control: no-store\r\nConnection: close\r\n\r\n"
    )
    return head.encode() + (b"" if bodiless else body)


# ---- a file


class Textfile:
    """A file that node_exporter reads. It is replaced, never changed, so that nobody reads half of it.

    Whoever writes it keeps a lock on the one that he has put there: so two mounts that were told the same name notice, and what a
    killed server has left is in nobody's way.
    """

    def __init__(self, render: Callable[[], bytes], path: Path) -> None:
        self._render = render
        self._path = path
        self._new = path.with_name(f".{path.name}.new")  # node_exporter reads *.prom
        self._mine: int | None = None

    def bind(self) -> None:
        """Put a first one there. Raises OSError: EEXIST if another mount writes it, or what is there is no file of this kind."""
        try:
            there = os.open(self._path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except FileNotFoundError:
            there = None
        if there is not None:
            try:
                if not stat.S_ISREG(os.fstat(there).st_mode):
                    raise FileExistsError(errno.EEXIST, "it is there, and no regular file")
                fcntl.flock(there, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise FileExistsError(errno.EEXIST, "another mount writes it") from None
            finally:
                os.close(there)
        self._write()

    async def serve(self) -> None:
        """Never returns."""
        complained = False
        while True:
            await trio.sleep(WRITE_EVERY_S)
            try:
                self._write()
                complained = False
            except Exception as error:
                if not complained:  # once, until it works again
                    log.warning(
                        "metrics: %s cannot be written: %s", self._path, error, exc_info=not isinstance(error, OSError)
                    )
                complained = True

    def close(self) -> None:
        """Remove it, unless it is somebody else's by now: what is not measured any more must not look as if it were."""
        if self._mine is not None:
            with contextlib.suppress(OSError):
                if os.path.samestat(os.fstat(self._mine), os.stat(self._path, follow_symlinks=False)):
                    self._path.unlink()
            os.close(self._mine)
            self._mine = None

    def _write(self) -> None:
        page = self._render()
        fd = os.open(self._new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with open(fd, "wb", closefd=False) as file:
                file.write(page)
            os.replace(self._new, self._path)
        except BaseException:
            os.close(fd)
            raise
        if self._mine is not None:
            os.close(self._mine)
        self._mine = fd
