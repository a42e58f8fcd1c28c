"""Where log lines go: the journal, syslog, stderr or a file.

1. A thread of its own writes them, so that a full pipe or a stuck journal cannot block the event loop; what waits for it is
   bounded (`MOST_WAITING`), and so is how long the end of the process waits for it.
2. A line is a line: what a file's name has in it of newlines and a terminal's commands is shown, and does not act.
3. Nobody who writes a log line knows where it goes.
"""

from __future__ import annotations

import contextlib
import logging
import logging.handlers
import os
import queue
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from iohang_fuse import journal
from iohang_fuse.messages import printable

if TYPE_CHECKING:
    from collections.abc import Iterator
    from io import TextIOWrapper

IDENTIFIER = "iohang-mount"

MOST_WAITING = 10_000
"""Lines that wait to be written, some 10 MB; what comes then is lost, and counted."""

LAST_LINES_S = 5.0
"""How long the end of the process waits for the last lines to be written."""

_SYSLOG = Path("/dev/log")
_LINES = "%(asctime)s %(levelname)-7s %(message)s"


@contextlib.contextmanager
def to_stderr_or(file: Path | None, *, level: int) -> Iterator[None]:
    """Log to *file*, or to stderr; if that is the journal's, with fields."""
    handler: logging.Handler
    if file is not None:
        handler = _file(file)
    elif journal.stderr_is_its() and journal.SOCKET.exists():
        handler = journal.JournalHandler(IDENTIFIER)
    else:
        handler = _formatted(_Stderr(), _LINES)
    with _through_a_thread(handler, level):
        yield


@contextlib.contextmanager
def to_syslog_or(file: Path | None, *, level: int) -> Iterator[None]:
    """Log to *file*, or to the journal, or to syslog; where there is none of them, say so while somebody still listens."""
    handler: logging.Handler
    if file is not None:
        handler = _file(file)
    elif journal.SOCKET.exists():
        handler = journal.JournalHandler(IDENTIFIER)
    elif _SYSLOG.exists():
        handler = _formatted(
            logging.handlers.SysLogHandler(str(_SYSLOG), facility=logging.handlers.SysLogHandler.LOG_DAEMON),
            f"{IDENTIFIER}[%(process)d]: %(levelname)s: %(message)s",
        )
    else:
        print(  # noqa: T201
            "iohang-mount: there is neither a journal nor a syslog here (/dev/log): messages will be lost; use -o log=FILE",
            file=sys.stderr,
        )
        handler = logging.NullHandler()
    with _through_a_thread(handler, level):
        yield


class _Stderr(logging.Handler):
    """Past sys.stderr, whose buffer has a lock that the end of the process would wait for while a pipe is full."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            line = f"{self.format(record)}\n".encode(errors="backslashreplace")
            while line:
                line = line[os.write(2, line) :]
        except Exception:  # noqa: BLE001 - as logging does
            self.handleError(record)


class _Lines(logging.Formatter):
    """One line for each record, and after it a traceback's."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - logging's name
        record.message = printable(record.message)
        return super().formatMessage(record)


def touch(file: Path) -> None:
    """Raises OSError if *file* cannot be written."""
    os.close(_open(file))


def _open(file: str | Path) -> int:
    return os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o640)


class _File(logging.handlers.WatchedFileHandler):
    """Makes files of mode 0640: the server's own umask is 0, for files on the mount, and names of images are not for everybody."""

    def begin_anew(self) -> None:
        """Open the file again for the next line."""
        with contextlib.suppress(Exception):
            if self.stream is not None:
                self.stream.close()
        self.stream = None
        self.dev, self.ino = -1, -1

    def _open(self) -> TextIOWrapper:
        return open(_open(self.baseFilename), "a", encoding=self.encoding, errors=self.errors)


def _file(file: Path) -> logging.Handler:
    # Reopened when logrotate has moved it.
    return _formatted(_File(file, encoding="utf-8", errors="backslashreplace"), _LINES)


def _formatted(handler: logging.Handler, form: str) -> logging.Handler:
    handler.setFormatter(_Lines(form))
    return handler


class _ToThread(logging.handlers.QueueHandler):
    """Never waits: a line for which there is no room is counted, which its handler's lock makes exact."""

    lost = 0  # ever

    def prepare(self, record: logging.LogRecord) -> logging.LogRecord:
        # What it is made of may change, or be let go, before the thread has its turn.
        record.msg, record.args = record.getMessage(), None
        if record.exc_info:
            record.exc_text = logging.Formatter().formatException(record.exc_info)
            record.exc_info = None
        return record

    def enqueue(self, record: logging.LogRecord) -> None:
        try:
            self.queue.put_nowait(record)
        except queue.Full:
            self.lost += 1


class _Thread(logging.handlers.QueueListener):
    """Writes what comes, and how much has not come."""

    def __init__(self, sender: _ToThread, handler: logging.Handler) -> None:
        super().__init__(sender.queue, handler)
        self._sender = sender
        self._told = 0

    def handle(self, record: logging.LogRecord) -> None:
        lost = self._sender.lost
        if lost > self._told:
            text = f"{lost - self._told} lines of this log are lost: they came faster than they could be written"
            self._told = lost
            self._write(logging.LogRecord(__name__, logging.ERROR, __file__, 0, text, None, None, "handle"))
        self._write(record)

    def _write(self, record: logging.LogRecord) -> None:
        """A line that cannot be written is lost, and counted; for the next one the disk may have room, the directory be back."""
        try:
            super().handle(record)
        except Exception:  # noqa: BLE001 - there is nobody to tell but the next line
            self._sender.lost += 1
            for handler in self.handlers:
                if isinstance(handler, _File):
                    handler.begin_anew()

    def stop(self) -> None:
        """Once all is written, or after `LAST_LINES_S`: a pipe that nobody reads must not keep the process (P8)."""
        with contextlib.suppress(queue.Full):
            self.enqueue_sentinel()
        if self._thread is not None:
            self._thread.join(LAST_LINES_S)  # a daemon: the process may end without it
            if not self._thread.is_alive():
                for handler in self.handlers:
                    handler.close()
            self._thread = None


@contextlib.contextmanager
def _through_a_thread(handler: logging.Handler, level: int) -> Iterator[None]:
    handler.lock = None  # the thread alone uses it; at its end logging would wait for a lock that is held for ever
    sender = _ToThread(queue.Queue(MOST_WAITING))
    listener = _Thread(sender, handler)
    root = logging.getLogger()
    root.handlers[:] = [sender]
    root.setLevel(max(level, logging.INFO))
    logging.getLogger("iohang_fuse").setLevel(level)
    logging.raiseExceptions = False  # a log that cannot be written is no reason to print tracebacks
    listener.start()
    try:
        yield
    finally:
        listener.stop()
