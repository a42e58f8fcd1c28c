"""How metrics get out: over HTTP to Prometheus, or in a file to node_exporter. In threads, beside the event loop.

1. It answers while the storage is dead, and while the event loop of the mount is busy or stuck, which is then what it says.
2. It costs the mount next to nothing: a page is made at most every `FRESH_S`, `MOST_CLIENTS` are served at once, and whoever says
   nothing for `CLIENT_S` is sent away.
3. What cannot be had (a port in use, a directory that is not there) is found by `bind`, before anything is mounted.
4. A bug here costs a page, not the mount.

HTTP is the standard library's. That of prometheus_client has a thread for each client that comes, and no limit.
"""

from __future__ import annotations

import contextlib
import errno
import http.server
import logging
import signal
import socket
import socketserver
import sys
import threading
import time
from typing import TYPE_CHECKING, Any, Protocol

from iohang_fuse.textfile import Textfile

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

log = logging.getLogger(__name__)

MOST_CLIENTS = 32
"""At once; who comes then waits."""

CLIENT_S = 10.0
"""Without a byte of a client's. It is Prometheus' own default for how long a scrape may take."""

FRESH_S = 0.25
"""Younger pages are not made again: clients that come in droves must not take the processor from guests."""

STOP_S = 2.0
"""For a thread to end. It does at once, unless the file system of the file hangs."""

_NO_DESCRIPTOR_S = 1.0
_ROUND_S = 0.2  # how often a thread that waits looks whether it is to end


class _Outlet(Protocol):
    def bind(self) -> None: ...

    def serve(self) -> None: ...

    def stop(self) -> None: ...

    def close(self) -> None: ...


class Exposition:
    """The thread around an outlet: HTTP where *where* is a host and a port, or else a file."""

    def __init__(self, render: Callable[[], bytes], where: tuple[str, int] | Path) -> None:
        self._outlet: _Outlet = Http(render, *where) if isinstance(where, tuple) else Textfile(render, where)
        self._thread = threading.Thread(target=self._run, name="metrics", daemon=True)

    def bind(self) -> None:
        """Raises OSError where the outlet cannot be had."""
        self._outlet.bind()

    def start(self) -> None:
        """Serve, in a thread."""
        # Signals are for the main thread, which one of them has to wake from its read of /dev/fuse (limits.alarm_clock). A thread
        # begins with the mask of the one that starts it.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        try:
            self._thread.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def stop(self) -> None:
        """Leave nothing behind."""
        if not self._thread.is_alive():
            self._outlet.close()
            return
        self._outlet.stop()
        self._thread.join(STOP_S)

    def _run(self) -> None:
        try:
            self._outlet.serve()
        except Exception:
            log.exception("metrics: a bug; the mount goes on without them")
        finally:
            self._outlet.close()


# ---- HTTP


class Http:
    """GET /metrics, for Prometheus."""

    def __init__(self, render: Callable[[], bytes], host: str, port: int) -> None:
        self._render = render
        self._host = host
        self._port = port
        self._servers: list[_Server] = []
        self._lock = threading.Lock()
        self._page = b""
        self._page_s = float("-inf")
        self.room = threading.BoundedSemaphore(MOST_CLIENTS)
        self.ended = threading.Event()

    def bind(self) -> None:
        """At all addresses that the host's name has here. Raises OSError."""
        try:
            found = socket.getaddrinfo(self._host, self._port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        except socket.gaierror as error:
            raise OSError(errno.EADDRNOTAVAIL, f"no such host: {error.strerror}") from None
        try:
            for family, _, _, _, address in dict.fromkeys(found):
                try:
                    self._servers.append(_Server(self, family, address))
                except OSError as error:  # `localhost` is `::1` as well, where there may be no IPv6
                    if error.errno not in {errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT}:
                        raise
                    missing = error
            if not self._servers:
                raise missing
        except OSError:
            self.close()
            raise

    def serve(self) -> None:
        """Until `stop`."""
        *others, last = self._servers
        for server in others:
            threading.Thread(target=server.serve_forever, args=(_ROUND_S,), name="metrics", daemon=True).start()
        last.serve_forever(_ROUND_S)

    def stop(self) -> None:
        """`serve` is to end."""
        self.ended.set()
        for server in self._servers:
            server.shutdown()

    def close(self) -> None:
        """Nobody comes in any more."""
        for server in self._servers:
            server.server_close()
        self._servers.clear()

    def page(self) -> bytes:
        """One that is fresh."""
        with self._lock:
            now = time.monotonic()
            if now - self._page_s > FRESH_S:
                self._page = self._render()
                self._page_s = now
            return self._page


class _Server(http.server.ThreadingHTTPServer):
    """At one address."""

    request_queue_size = MOST_CLIENTS

    def __init__(self, outlet: Http, family: socket.AddressFamily, address: Any) -> None:
        self.outlet = outlet
        self.address_family = family
        self._since_s: dict[Any, float] = {}  # by the socket of a client
        super().__init__(address, _Handler)

    def server_bind(self) -> None:
        if self.address_family == socket.AF_INET6:
            self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        # Past HTTPServer's, which asks DNS for the name of the address: that may take longer than a mount may.
        socketserver.TCPServer.server_bind(self)

    def get_request(self) -> Any:
        """Raises OSError where no descriptor is left, which passes: the client still waits, and is not asked for in a loop."""
        try:
            return super().get_request()
        except OSError:
            self.outlet.ended.wait(_NO_DESCRIPTOR_S)
            raise

    def service_actions(self) -> None:
        """Who drips does not stay: each has `CLIENT_S` in all."""
        for request, since_s in [*self._since_s.items()]:
            if time.monotonic() - since_s > CLIENT_S:
                with contextlib.suppress(OSError):
                    request.shutdown(socket.SHUT_RDWR)

    def process_request(self, request: Any, client_address: Any) -> None:
        """Once there is room. Never raises: it would be said on stderr."""
        while not self.outlet.room.acquire(timeout=_ROUND_S):
            self.service_actions()
            if self.outlet.ended.is_set():
                self.shutdown_request(request)
                return
        self._since_s[request] = time.monotonic()
        try:
            super().process_request(request, client_address)
        except RuntimeError as error:  # no thread is to be had, which passes
            log.warning("metrics: a client cannot be let in: %s", error)
            del self._since_s[request]
            self.outlet.room.release()
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            del self._since_s[request]
            self.outlet.room.release()

    def handle_error(self, request: Any, client_address: Any) -> None:  # noqa: ARG002 - the library's own way
        """A client that has gone, most of the time."""
        log.debug("metrics: a client at %s: %s", client_address, sys.exception())


class _Handler(http.server.BaseHTTPRequestHandler):
    """One client, one request."""

    server: _Server
    timeout = CLIENT_S

    def do_GET(self) -> None:
        if self.path.partition("?")[0] != "/metrics":
            self._say(404, b"say GET /metrics\n")
            return
        try:
            page = self.server.outlet.page()
        except Exception:
            log.exception("metrics: a bug in making the page; the mount goes on")
            self._say(500, b"a bug; the log of the mount has its traceback\n")
        else:
            self._say(200, page, "text/plain; version=0.0.4; charset=utf-8")

    do_HEAD = do_GET  # noqa: N815 - the library's name

    def _say(self, status: int, body: bytes, kind: str = "text/plain; charset=utf-8") -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def version_string(self) -> str:
        """Python's version is nobody's business."""
        return "iohang-fuse"

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the library's name
        """Nobody wants to read of each scrape."""
