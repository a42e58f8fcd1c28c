"""One QEMU from its start to its end, and what it says on its ports, line by line.

1. What runs inside is not known here: callers give the command, and get each line with its port's name.
2. A QEMU never outlives the process that started it.
"""

from __future__ import annotations

import selectors
import socket
import subprocess
import threading
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from io import FileIO
    from pathlib import Path

QEMU = ("setpriv", "--pdeathsig", "KILL", "qemu-system-x86_64", "-accel", "tcg", "-nodefaults", "-nographic")
"""What every command begins with. Even if we are killed no QEMU is left: see `Machine._serve` for the thread that starts it."""

_POLL_S = 0.02

_KILL_TIMEOUT_S = 10
"""Even SIGKILL waits for I/O that a FUSE server holds; longer than this is for the caller to know."""


class Machine:
    """QEMU, from `start()` to `kill()`; each object runs once.

    *ports* has, for each port, QEMU's arguments that plug in the chardev of that name. *take* is called with port, line and this
    machine's monotonic time for each line, in a thread of its own. All that is said goes to *log* as it comes.
    """

    def __init__(
        self,
        command: Sequence[str],
        ports: Mapping[str, Sequence[str]],
        take: Callable[[str, str, float], None],
        log: Path,
    ) -> None:
        self.log = log
        self._command = command
        self._plugs = ports
        self._take = take
        self._process: subprocess.Popen[bytes] | None = None
        self._ports: dict[str, socket.socket] = {}
        self._started = threading.Event()
        self._start_error: OSError | None = None
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Start QEMU; raises OSError if it cannot be."""
        if self._thread is not None:
            raise RuntimeError("a guest runs once")
        log = self.log.open("ab", buffering=0)
        far_ports = {}
        for name in self._plugs:
            self._ports[name], far_ports[name] = socket.socketpair()
        self._thread = threading.Thread(target=self._serve, args=(log, far_ports), name="guest", daemon=True)
        self._thread.start()
        self._started.wait()
        if self._start_error is not None:
            raise self._start_error

    def wait_for(self, condition: Callable[[], object], timeout_s: float, what: str) -> None:
        """Poll *condition* until it is true, at most half of the time: it may ask the guest, which has other things to do.

        Raises RuntimeError if QEMU ends before that, TimeoutError after *timeout_s*.
        """
        deadline_s = time.monotonic() + timeout_s
        while True:
            asked_s = time.monotonic()
            if condition():
                return
            if not self.running:
                # Its last lines may still be on their way.
                self._join()
                if condition():
                    return
                raise RuntimeError(f"QEMU ended while waiting for {what}; {self._log_end()}")
            if time.monotonic() > deadline_s:
                raise TimeoutError(f"not within {timeout_s} s: {what}; {self._log_end()}")
            time.sleep(max(_POLL_S, time.monotonic() - asked_s))

    def say(self, port: str, line: str) -> None:
        """Send the guest a line; raises RuntimeError if QEMU has ended."""
        if not self.running:
            raise RuntimeError(f"QEMU is not running; {self._log_end()}")
        try:
            self._ports[port].sendall(line.encode() + b"\n")
        except OSError as error:
            raise RuntimeError(f"QEMU has ended; {self._log_end()}") from error

    def terminate(self) -> None:
        """SIGTERM."""
        self._signal(subprocess.Popen.terminate)

    def kill(self) -> None:
        """SIGKILL at once, as a crash of the host would; raises TimeoutError if QEMU outlives it: a request is still unanswered."""
        self._signal(subprocess.Popen.kill)
        if not self.gone(_KILL_TIMEOUT_S):
            raise TimeoutError(f"QEMU (process {self.pid}) waits for its I/O even after SIGKILL")
        self._join()
        for port in self._ports.values():
            port.close()

    def gone(self, timeout_s: float) -> bool:
        """Wait for QEMU's end; whether it came."""
        deadline_s = time.monotonic() + timeout_s
        while self.running:
            if time.monotonic() > deadline_s:
                return False
            time.sleep(_POLL_S)
        return True

    @property
    def running(self) -> bool:
        """Whether there is a QEMU."""
        return self._process is not None and self._process.poll() is None

    @property
    def pid(self) -> int:
        """QEMU's process id; raises RuntimeError before start()."""
        if self._process is None:
            raise RuntimeError("the guest has not been started")
        return self._process.pid

    def _join(self) -> None:
        if self._thread is not None:
            self._thread.join(_KILL_TIMEOUT_S)

    def _signal(self, send: Callable[[subprocess.Popen[bytes]], None]) -> None:
        if self._process is not None and self.running:
            send(self._process)

    # The thread

    def _serve(self, log: FileIO, far_ports: dict[str, socket.socket]) -> None:
        """Start QEMU and read all its ports until it ends.

        One thread for both: the parent-death signal comes when the *thread* that started the process ends
        (prctl(2)).
        """
        with log:
            try:
                self._process = self._popen(log, far_ports)
            except OSError as error:
                self._start_error = error
                return
            finally:
                for far in far_ports.values():
                    far.close()
                self._started.set()
            self._read_ports(log)
            self._process.wait()

    def _popen(self, log: FileIO, far_ports: dict[str, socket.socket]) -> subprocess.Popen[bytes]:
        plugged = []
        for name, far in far_ports.items():
            plugged += ["-chardev", f"socket,id={name},fd={far.fileno()}", *self._plugs[name]]
        return subprocess.Popen(
            [*self._command, *plugged],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            pass_fds=[far.fileno() for far in far_ports.values()],
        )

    def _read_ports(self, log: FileIO) -> None:
        started_s = time.monotonic()
        partial = dict.fromkeys(self._ports, b"")
        with selectors.DefaultSelector() as selector:
            for name, port in self._ports.items():
                selector.register(port, selectors.EVENT_READ, name)
            while selector.get_map():
                for key, _ in selector.select():
                    name = key.data
                    try:
                        data = self._ports[name].recv(65536)
                    except ConnectionResetError:
                        data = b""
                    if not data:
                        selector.unregister(key.fileobj)
                    *lines, partial[name] = (partial[name] + data).split(b"\n")
                    now_s = time.monotonic()
                    for line in lines:
                        log.write(b"%9.3f " % (now_s - started_s) + line + b"\n")
                        self._take(name, line.decode(errors="replace").rstrip("\r"), now_s)

    def _log_end(self) -> str:
        lines = self.log.read_text(errors="replace").splitlines()[-20:]
        return f"the end of {self.log}:\n" + "\n".join(lines)
