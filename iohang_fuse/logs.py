"""Where log lines go: stderr, syslog or a file.

A thread of its own writes them, so that a full pipe or a stuck syslog cannot block the event loop.
"""

from __future__ import annotations

import contextlib
import logging
import logging.handlers
import queue
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

_SYSLOG = Path("/dev/log")
_LINES = "%(asctime)s %(levelname)-7s %(message)s"


@contextlib.contextmanager
def to_stderr_or(file: Path | None, *, verbose: bool) -> Iterator[None]:
    """Log to *file*, or to stderr."""
    with _through_a_thread(_file(file) if file else _formatted(logging.StreamHandler(), _LINES), verbose=verbose):
        yield


@contextlib.contextmanager
def to_syslog_or(file: Path | None, *, verbose: bool) -> Iterator[None]:
    """Log to *file*, or to syslog; where there is none, say so while somebody still listens."""
    handler: logging.Handler
    if file is not None:
        handler = _file(file)
    elif _SYSLOG.exists():
        handler = _formatted(
            logging.handlers.SysLogHandler(str(_SYSLOG), facility=logging.handlers.SysLogHandler.LOG_DAEMON),
            "iohang-mount[%(process)d]: %(levelname)s: %(message)s",
        )
    else:
        print(  # noqa: T201
            "iohang-mount: there is no syslog here (/dev/log): messages will be lost; use -o log=FILE",
            file=sys.stderr,
        )
        handler = logging.NullHandler()
    with _through_a_thread(handler, verbose=verbose):
        yield


def _file(file: Path) -> logging.Handler:
    # Reopened when logrotate has moved it.
    return _formatted(logging.handlers.WatchedFileHandler(file), _LINES)


def _formatted(handler: logging.Handler, form: str) -> logging.Handler:
    handler.setFormatter(logging.Formatter(form))
    return handler


@contextlib.contextmanager
def _through_a_thread(handler: logging.Handler, *, verbose: bool) -> Iterator[None]:
    lines: queue.SimpleQueue[logging.LogRecord] = queue.SimpleQueue()
    listener = logging.handlers.QueueListener(lines, handler)
    root = logging.getLogger()
    root.handlers[:] = [logging.handlers.QueueHandler(lines)]
    root.setLevel(logging.INFO)
    logging.getLogger("iohang_fuse").setLevel(logging.DEBUG if verbose else logging.INFO)
    logging.raiseExceptions = False  # a log that cannot be written is no reason to print tracebacks
    listener.start()
    try:
        yield
    finally:
        listener.stop()
