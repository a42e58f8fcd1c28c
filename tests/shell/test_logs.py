"""Where log lines go, on real sockets, files and pipes; and that whoever reads them cannot stop the server."""

from __future__ import annotations

import logging
import logging.handlers
import os
import socket
import subprocess
import sys
import time
from contextlib import closing, contextmanager
from typing import TYPE_CHECKING

import pytest

from iohang_fuse import diagnosis, journal, logs
from tests.harness import wait_until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

log = logging.getLogger("iohang_fuse.test")


@pytest.fixture(autouse=True)
def as_it_was() -> Iterator[None]:
    """The root logger is the process's."""
    root, ours = logging.getLogger(), logging.getLogger("iohang_fuse")
    before = root.handlers[:], root.level, ours.level, logging.raiseExceptions
    yield
    root.handlers[:], root.level, level, logging.raiseExceptions = before
    ours.setLevel(level)


class Journal:
    """A socket as journald has it, and what came in by it."""

    def __init__(self, path: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(str(path))
        self._socket.settimeout(20)

    def close(self) -> None:
        self._socket.close()

    def entry(self) -> dict[bytes, bytes]:
        """The next entry's fields."""
        data, fds, _, _ = socket.recv_fds(self._socket, 1 << 20, 1)
        for fd in fds:  # as long as it is, it came as a file
            assert data == b""
            data = os.pread(fd, 1 << 24, 0)
            with pytest.raises(OSError, match="Operation not permitted"):  # journald takes no other
                os.write(fd, b"x")
            os.close(fd)
        return decoded(data)


def decoded(data: bytes) -> dict[bytes, bytes]:
    """The other side of the protocol: `NAME=value` up to the newline, or the name alone, a length of 8 bytes, and the value."""
    fields = {}
    while data:
        head, _, rest = data.partition(b"\n")
        name, equals, value = head.partition(b"=")
        if not equals:
            size = int.from_bytes(rest[:8], "little")
            value, rest = rest[8 : 8 + size], rest[8 + size + 1 :]
        fields[name], data = value, rest
    return fields


@pytest.fixture
def there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Journal]:
    monkeypatch.setattr(journal, "SOCKET", tmp_path / "socket")
    monkeypatch.setattr(journal.JournalHandler.__init__, "__defaults__", (tmp_path / "socket",))
    with closing(Journal(tmp_path / "socket")) as made:
        yield made


@contextmanager
def stderr_of(stream: int) -> Iterator[None]:
    saved = os.dup(2)
    os.dup2(stream, 2)
    try:
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)


def test_in_the_background_a_line_is_an_entry_with_fields(there: Journal) -> None:
    """Issue: "the journal's fields where there is one"."""
    with logs.to_syslog_or(None, level=logging.INFO):
        log.error("%s: hangs", "a.img", extra={"fields": {"IOHANG_IMAGE": "a.img", "MESSAGE_ID": "f" * 32}})
        log.debug("not at this level")
        log.info("next")
    entry = there.entry()
    assert (
        entry.items()
        >= {
            b"MESSAGE": b"a.img: hangs",
            b"PRIORITY": b"3",
            b"SYSLOG_IDENTIFIER": b"iohang-mount",
            b"SYSLOG_FACILITY": b"3",
            b"IOHANG_IMAGE": b"a.img",
            b"MESSAGE_ID": b"f" * 32,
        }.items()
    )
    following = there.entry()
    assert (following[b"MESSAGE"], following[b"PRIORITY"]) == (b"next", b"6")


def test_a_name_with_newlines_forges_nothing(there: Journal) -> None:
    """Nothing in a value is taken for a field, nor for another line."""
    name = "a\nPRIORITY=7\nx"
    with logs.to_syslog_or(None, level=logging.INFO):
        log.error("%s: hangs", name, extra={"fields": {"IOHANG_IMAGE": name}})
    entry = there.entry()
    assert entry[b"MESSAGE"] == rb"a\nPRIORITY=7\nx: hangs"
    assert entry[b"IOHANG_IMAGE"] == name.encode()
    assert entry[b"PRIORITY"] == b"3"


def test_a_traceback_and_bytes_that_are_no_text_go_through(there: Journal) -> None:
    """P11: a bug is "logged with its traceback", whatever is in it."""
    with logs.to_syslog_or(None, level=logging.INFO):
        try:
            raise ValueError("\udcff")
        except ValueError:
            log.exception("a bug")
    lines = there.entry()[b"MESSAGE"].split(b"\n")
    assert lines[0] == b"a bug"
    assert lines[1] == b"Traceback (most recent call last):"
    assert lines[-1] == rb"ValueError: \udcff"


def test_what_is_too_long_for_a_datagram_goes_as_a_file_and_is_bounded(there: Journal) -> None:
    """Protocol: "If the datagram is too large, a sealed memfd is passed". And a line has its limit."""
    long = "ä" * 300_000
    with logs.to_syslog_or(None, level=logging.INFO):
        log.error("%s", long, extra={"fields": {"IOHANG_IMAGE": long}})
    entry = there.entry()
    assert entry[b"MESSAGE"].decode() == "ä" * journal.LONGEST_MESSAGE + "..."
    assert entry[b"IOHANG_IMAGE"].decode() == long


def test_stderr_is_the_journal_s_only_where_it_is(
    there: Journal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """systemd.exec(5): JOURNAL_STREAM is that of stderr, or stderr has been redirected since, and gets plain lines."""
    with (tmp_path / "stream").open("wb") as stream, stderr_of(stream.fileno()):
        status = os.fstat(2)
        monkeypatch.setenv("JOURNAL_STREAM", f"{status.st_dev}:{status.st_ino}")
        with logs.to_stderr_or(None, level=logging.INFO):
            log.warning("to the journal")
    assert there.entry()[b"MESSAGE"] == b"to the journal"
    assert (tmp_path / "stream").read_bytes() == b""
    for value in ("1:1", "x", ""):
        monkeypatch.setenv("JOURNAL_STREAM", value)
        with (tmp_path / "plain").open("ab") as stream, stderr_of(stream.fileno()), logs.to_stderr_or(None, level=20):
            log.warning("to %s, whose name is\n%r", "stderr", value)
    lines = (tmp_path / "plain").read_text().splitlines()
    assert [line.split(" ", 2)[2] for line in lines] == [
        rf"WARNING to stderr, whose name is\n{value!r}" for value in ("1:1", "x", "")
    ]


def test_a_journal_that_is_gone_is_no_harm(there: Journal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A line is lost, and the next one goes through when it is back."""
    lost: list[str] = []
    monkeypatch.setattr(journal.JournalHandler, "handleError", lambda _, record: lost.append(record.getMessage()))
    with logs.to_syslog_or(None, level=logging.INFO):
        log.info("one")
        assert there.entry()[b"MESSAGE"] == b"one"
        there.close()
        (tmp_path / "socket").unlink()
        log.info("two")
        wait_until(lambda: lost == ["two"], what="the thread's attempt")
        with closing(Journal(tmp_path / "socket")) as back:
            log.info("three")
            assert back.entry()[b"MESSAGE"] == b"three"


def test_a_file_takes_any_name(tmp_path: Path) -> None:
    """Neither bytes that are no text nor a locale without them cost a line."""
    with logs.to_stderr_or(tmp_path / "log", level=logging.INFO):
        log.info("%s", "ä\udcff\nx")
        try:
            raise ValueError("ä\udcff")
        except ValueError:
            log.exception("a bug")
    text = (tmp_path / "log").read_text(encoding="utf-8")
    assert "INFO    ä\\udcff\\nx\n" in text
    assert text.endswith("ValueError: ä\\udcff\n")


async def test_a_long_dump_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SIGUSR1 with 10,000 held requests is 20,000 lines, more than may wait to be written; the threads' stacks come last."""
    lines = [f"line {number}" for number in range(5000)]
    monkeypatch.setattr(diagnosis, "dump", lambda *_: lines)
    monkeypatch.setattr(logs, "MOST_WAITING", 1500)
    with logs.to_stderr_or(tmp_path / "log", level=logging.INFO):
        await diagnosis.write_dump(None)  # type: ignore[arg-type]
    assert [line.split("INFO    ")[1] for line in (tmp_path / "log").read_text().splitlines()] == lines


def test_a_log_whose_directory_was_away_goes_on(tmp_path: Path) -> None:
    """What cannot be written is counted, and the next line is written as soon as that is possible."""
    folder, away = tmp_path / "log.d", tmp_path / "away"
    folder.mkdir()
    with logs.to_stderr_or(folder / "log", level=logging.INFO):
        log.info("first")
        until(lambda: "first" in (folder / "log").read_text())
        folder.rename(away)
        log.info("lost")
        until(lambda: "lost" not in (away / "log").read_text() and writer_is_idle())
        folder.mkdir()
        log.info("again")
        until((folder / "log").exists)
    text = (folder / "log").read_text()
    assert "again" in text
    assert "1 lines of this log are lost" in text


def writer_is_idle() -> bool:
    (handler,) = logging.getLogger().handlers
    assert isinstance(handler, logging.handlers.QueueHandler)
    time.sleep(0.05)
    return handler.queue.empty()


def until(condition: Callable[[], object]) -> None:
    end_s = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end_s
        time.sleep(0.01)


def test_debug_is_ours_alone(tmp_path: Path) -> None:
    """`log_level=debug` is about retries, not about what libraries have to say; `warning` is for all."""
    for level, expected in ((logging.DEBUG, ["ours", "theirs"]), (logging.WARNING, [])):
        with logs.to_stderr_or(tmp_path / f"{level}", level=level):
            log.debug("ours")
            logging.getLogger("trio").debug("nobody's")
            logging.getLogger("trio").info("theirs")
        assert [line.split()[-1] for line in (tmp_path / f"{level}").read_text().splitlines()] == expected


STUCK = """
import logging, sys, time
from iohang_fuse import logs
logs.LAST_LINES_S = 1.0
log = logging.getLogger("iohang_fuse")
begin = time.monotonic()
with logs.to_stderr_or(None, level=logging.INFO):
    for number in range(3 * logs.MOST_WAITING):
        log.info("%s", "x" * 200)
    print(time.monotonic() - begin < 30, logging.getLogger().handlers[0].lost >= logs.MOST_WAITING, flush=True)
"""


def test_a_pipe_that_nobody_reads_stops_nothing() -> None:
    """Module: "a full pipe or a stuck journal cannot block the event loop", nor fill the memory (P10), nor keep the end (P8)."""
    with subprocess.Popen([sys.executable, "-c", STUCK], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"True True\n"
        assert process.wait(60) == 0
        assert process.stderr is not None
        assert process.stderr.read(65536).startswith(b"20")


def test_what_was_lost_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once there is room again."""
    monkeypatch.setattr(logs, "MOST_WAITING", 5)
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    writer = os.open(fifo, os.O_WRONLY)
    got = b""
    with stderr_of(writer), logs.to_stderr_or(None, level=logging.INFO):
        for _ in range(2000):
            log.info("%s", "x" * 200)
        deadline = time.monotonic() + 30
        while b" lines of this log are lost" not in got and time.monotonic() < deadline:
            try:
                got += os.read(reader, 65536)
            except BlockingIOError:
                log.info("still here")
                time.sleep(0.01)
    os.close(writer)
    os.close(reader)
    assert b" lines of this log are lost: they came faster than they could be written\n" in got
