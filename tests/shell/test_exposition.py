"""How metrics get out: a thread that nobody can hold up, and a file that nobody reads half of."""

from __future__ import annotations

import errno
import fcntl
import http.client
import os
import re
import resource
import signal
import socket
import stat
import threading
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from iohang_fuse import exposition, textfile
from iohang_fuse.exposition import MOST_CLIENTS, Exposition
from tests.harness import wait_until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

HOST = "127.0.0.1"
PAGE = b"iohang_up 1\n"


def free_port(family: socket.AddressFamily = socket.AF_INET, host: str = HOST) -> int:
    with socket.socket(family) as sock:
        sock.bind((host, 0))
        port: int = sock.getsockname()[1]
        return port


def get(port: int, path: str = "/metrics", method: str = "GET") -> tuple[http.client.HTTPResponse, bytes]:
    """One request, as http.client makes it."""
    connection = http.client.HTTPConnection(HOST, port, timeout=60)
    try:
        connection.request(method, path)
        response = connection.getresponse()
        return response, response.read()
    finally:
        connection.close()


@contextmanager
def serving(render: Callable[[], bytes], where: tuple[str, int] | Path) -> Iterator[Exposition]:
    made = Exposition(render, where)
    made.bind()
    made.start()
    try:
        yield made
    finally:
        made.stop()


@pytest.fixture
def port() -> Iterator[int]:
    number = free_port()
    with serving(lambda: PAGE, (HOST, number)):
        yield number


# ---- HTTP


def test_a_scrape(port: int) -> None:
    """The content type is that of the text format 0.0.4, which each Prometheus reads."""
    response, page = get(port, "/metrics?collect[]=all")
    assert (response.status, page) == (200, PAGE)
    assert response.getheader("Content-Type") == "text/plain; version=0.0.4; charset=utf-8"


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("HEAD", "/metrics", 200), ("GET", "/", 404), ("GET", "/metrics/x", 404), ("HEAD", "/x", 404)],
)  # fmt: skip
def test_other_requests(port: int, method: str, path: str, status: int) -> None:
    """What is not there says what is."""
    response, body = get(port, path, method)
    assert response.status == status
    assert body == (b"" if method == "HEAD" else b"say GET /metrics\n")


def test_nothing_can_be_changed(port: int) -> None:
    """It is there to be read."""
    assert get(port, method="POST")[0].status == 501


@pytest.mark.parametrize(
    "sent", [b"", b"\r\n\r\n", b"GET", b"\0" * 20_000, b"GET /metrics", b"\xff\xfe\n\n", b"A" * 8192]
)
def test_garbage_harms_nobody(port: int, sent: bytes) -> None:
    """Input is bounded; the next one is served."""
    with socket.create_connection((HOST, port), timeout=60) as sock:
        sock.sendall(sent)
        sock.shutdown(socket.SHUT_WR)
        while sock.recv(65536):
            pass
    assert get(port)[1] == PAGE


def test_a_head_has_no_body(port: int) -> None:
    """RFC 9110, 9.3.2; whoever asks so reads none, http.client too."""
    assert raw(port, b"HEAD /metrics HTTP/1.0\r\n\r\n").endswith(b"\r\n\r\n")


def test_an_endless_request_is_answered_all_the_same(port: int) -> None:
    """Input is bounded: it is not read to an end that may never come."""
    assert b" 414 " in raw(port, b"A" * 65537).splitlines()[0]


def raw(port: int, sent: bytes) -> bytes:
    """All that the server says to *sent*, of which it does not see the end."""
    with socket.create_connection((HOST, port), timeout=60) as sock:
        sock.sendall(sent)
        return sock.makefile("rb").read()


def test_slow_clients_keep_nobody_waiting(port: int) -> None:
    """Issue: a slow client harms nobody: here all but one of those that may come say nothing, or half of it."""
    slow = [socket.create_connection((HOST, port), timeout=60) for _ in range(MOST_CLIENTS - 1)]
    try:
        for sock in slow[::2]:
            sock.sendall(b"GET /metr")
        assert get(port)[1] == PAGE
    finally:
        for sock in slow:
            sock.close()


def test_a_crowd_of_slow_clients_is_sent_away(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bounded: those that come then wait, and not for ever: whoever says nothing for CLIENT_S, and reads nothing, has to go."""
    monkeypatch.setattr(exposition._Handler, "timeout", 0.5)
    port = free_port()
    with serving(lambda: b"x" * (64 << 20), (HOST, port)):
        slow = [socket.create_connection((HOST, port), timeout=60) for _ in range(2 * MOST_CLIENTS)]
        try:
            for sock in slow[::2]:
                sock.sendall(b"GET /metrics HTTP/1.1\r\n\r\n")  # and never reads the answer
            wait_until(lambda: get(port, "/none")[0].status == 404, timeout_s=60)
        finally:
            for sock in slow:
                sock.close()


def test_clients_are_bounded(port: int) -> None:
    """Who comes when there are MOST_CLIENTS waits until one has gone; each costs a thread and a descriptor."""
    slow = [socket.create_connection((HOST, port), timeout=60) for _ in range(MOST_CLIENTS)]
    try:
        for sock in slow[:-1]:
            sock.sendall(b"GET /metr")
        with socket.create_connection((HOST, port), timeout=1) as last:
            last.sendall(b"GET /metrics HTTP/1.0\r\n\r\n")
            with pytest.raises(TimeoutError):
                last.recv(1)
            slow[0].close()
            last.settimeout(60)
            assert last.makefile("rb").read().endswith(PAGE)
    finally:
        for sock in slow:
            sock.close()


def test_pages_are_not_made_for_each_of_a_crowd() -> None:
    """Point 2 of exposition.py: "a page is made at most every `FRESH_S`"."""
    made = 0

    def render() -> bytes:
        nonlocal made
        made += 1
        return b"%d\n" % made

    number = free_port()
    with serving(render, (HOST, number)):
        asked = 0
        while made < 3:
            get(number)
            asked += 1
            assert asked < 10_000
        assert asked > made


def test_a_bug_costs_a_page(caplog: pytest.LogCaptureFixture) -> None:
    """P11: "A bug costs one request", here one page, which the log has with its traceback."""
    broken = True

    def render() -> bytes:
        if broken:
            raise ZeroDivisionError
        return PAGE

    number = free_port()
    with serving(render, (HOST, number)):
        assert get(number)[0].status == 500
        assert "ZeroDivisionError" in caplog.text
        broken = False
        assert get(number)[1] == PAGE


def test_a_port_in_use_is_refused(port: int) -> None:
    """A port in use is an error at the start, and not a mount without metrics."""
    with pytest.raises(OSError, match=r"^\[Errno 98\]"):
        Exposition(lambda: PAGE, (HOST, port)).bind()


def test_no_such_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """Said as it is, of a name that the resolver does not know."""

    def resolve(*_arguments: object, **_options: object) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    with pytest.raises(OSError, match=rf"^\[Errno {errno.EADDRNOTAVAIL}\] no such host: Name or service not known$"):
        Exposition(lambda: PAGE, ("iohang.invalid", 9811)).bind()


@pytest.mark.parametrize(("family", "host"), [(socket.AF_INET, "192.0.2.1"), (socket.AF_INET6, "::1")])
def test_an_address_that_cannot_be_had(family: socket.AddressFamily, host: str) -> None:
    """The error is the kernel's: RFC 5737 keeps 192.0.2.1 for documentation, and not every container has IPv6."""
    made = Exposition(lambda: PAGE, (host, 0))
    try:
        free_port(family, host)
    except OSError as error:
        with pytest.raises(OSError, match=rf"^\[Errno {error.errno}\]"):
            made.bind()
    else:  # ::1 nearly everywhere; the other one with net.ipv4.ip_nonlocal_bind
        made.bind()
    made.stop()


def test_ipv6() -> None:
    """`[::1]:9811`; a host without it is the previous test's business."""
    try:
        number = free_port(socket.AF_INET6, "::1")
    except OSError:
        return
    with serving(lambda: PAGE, ("::1", number)), socket.create_connection(("::1", number), timeout=60) as sock:
        sock.sendall(b"GET /metrics HTTP/1.0\r\n\r\n")
        assert sock.makefile("rb").read().endswith(PAGE)


def test_where_there_is_no_ipv6(monkeypatch: pytest.MonkeyPatch) -> None:
    """`localhost` is `::1` as well, where there may be no IPv6: an address that cannot be had hinders no other of the same name.

    RFC 3849 keeps 2001:db8::/32 for documentation: the kernel's answer is EADDRNOTAVAIL, or EAFNOSUPPORT without IPv6.
    """
    number = free_port()
    addresses = [(socket.AF_INET6, ("2001:db8::1", number, 0, 0)), (socket.AF_INET, (HOST, number))]
    found = [(family, socket.SOCK_STREAM, socket.IPPROTO_TCP, "", address) for family, address in addresses]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_arguments, **_options: found)
    with serving(lambda: PAGE, ("localhost", number)):
        monkeypatch.undo()
        assert get(number)[1] == PAGE


def test_without_descriptors_it_is_no_loop(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A client that cannot be let in for want of a descriptor still waits: it is not asked for in a loop, and gets in later."""
    tries: list[float] = []

    def count(server: exposition._Server) -> None:
        tries.append(time.monotonic())
        counted(server)

    counted = exposition._Server.service_actions  # once after each look at who waits
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    with socket.socket() as client:
        client.settimeout(60)
        free = os.dup(0)
        os.close(free)
        resource.setrlimit(resource.RLIMIT_NOFILE, (free, before[1]))  # the kernel's own EMFILE
        try:
            client.connect((HOST, port))
            client.sendall(b"GET /metrics HTTP/1.0\r\n\r\n")
            monkeypatch.setattr(exposition._Server, "service_actions", count)
            wait_until(lambda: len(tries) > 4, 60, "some looks")
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, before)
        assert tries[4] - tries[1] > 2 * exposition._NO_DESCRIPTOR_S
        answer = b"".join(iter(lambda: client.recv(4096), b""))
    assert answer.endswith(PAGE)


def test_the_port_is_free_afterwards() -> None:
    """The next mount can have it at once, whoever was connected (TIME_WAIT is our end's); and there is no thread left."""
    number = free_port()
    for _ in range(2):
        with serving(lambda: PAGE, (HOST, number)):
            assert raw(number, b"GET /metrics HTTP/1.0\r\n\r\n").endswith(PAGE)
            left = socket.create_connection((HOST, number), timeout=60)
        left.close()
    assert "metrics" not in {thread.name for thread in threading.enumerate()}


def test_signals_are_for_the_main_thread(port: int) -> None:
    """limits.alarm_clock interrupts the main thread's read: no signal may be delivered here instead."""
    assert get(port)[1] == PAGE
    (thread,) = (thread for thread in threading.enumerate() if thread.name == "metrics")
    status = Path(f"/proc/self/task/{thread.native_id}/status").read_text()
    blocked = int(re.search(r"^SigBlk:\t(\w+)", status, re.MULTILINE)[1], 16)  # type: ignore[index]
    assert all(blocked >> (number - 1) & 1 for number in (signal.SIGALRM, signal.SIGTERM, signal.SIGUSR1))


# ---- a file


@pytest.fixture
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(textfile, "WRITE_EVERY_S", 0.01)


@pytest.mark.usefixtures("often")
def test_nobody_reads_half_of_a_file(tmp_path: Path) -> None:
    """Issue: written atomically: who reads it has all of one page, whenever he does; with a mode that node_exporter may read."""
    path = tmp_path / "iohang.prom"
    pages = 0

    def render() -> bytes:
        nonlocal pages
        pages += 1
        return b"%d\n" % pages * 50_000

    before = os.umask(0)  # the server's
    try:
        with serving(render, path):
            wrote = pages
            while pages < wrote + 50:
                lines = {*path.read_bytes().splitlines()}
                assert len(lines) == 1
            assert stat.S_IMODE(path.stat().st_mode) == 0o644
    finally:
        os.umask(before)
    assert [*tmp_path.iterdir()] == [], "it is removed at the end, and nothing else is left"


def test_the_first_file_may_be_read(tmp_path: Path) -> None:
    """Whatever the umask is: node_exporter is somebody else, and the first page is written with the umask of who mounts."""
    path = tmp_path / "iohang.prom"
    made = Exposition(lambda: PAGE, path)
    before = os.umask(0o077)
    try:
        made.bind()
        assert (path.read_bytes(), stat.S_IMODE(path.stat().st_mode)) == (PAGE, 0o644)
    finally:
        os.umask(before)
        made.stop()


def test_two_mounts_do_not_write_one_file(tmp_path: Path) -> None:
    """Two that share a configuration file would take turns in hiding each other."""
    path = tmp_path / "iohang.prom"
    with serving(lambda: PAGE, path):
        other = Exposition(lambda: b"other\n", path)
        with pytest.raises(OSError, match="another mount writes it"):
            other.bind()
        other.stop()
        assert path.read_bytes() == PAGE


def test_nobody_else_can_lock_the_file(tmp_path: Path) -> None:
    """Whoever may read a file may lock it: that keeps no mount from its metrics, or a mount from its start."""
    path = tmp_path / "iohang.prom"
    path.write_bytes(PAGE)
    with path.open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with serving(lambda: PAGE, path):
            assert (tmp_path / ".iohang.prom.lock").stat().st_mode & 0o777 == 0o600


def test_what_a_killed_server_has_left_is_replaced(tmp_path: Path) -> None:
    """The file, and the next one that it was about to put there."""
    path = tmp_path / "iohang.prom"
    path.write_text("old\n")
    (tmp_path / ".iohang.prom.new").write_text("half")
    (tmp_path / ".iohang.prom.lock").touch()
    with serving(lambda: PAGE, path):
        assert path.read_bytes() == PAGE
    assert [*tmp_path.iterdir()] == []


def test_what_is_no_file_of_ours_is_left_alone(tmp_path: Path) -> None:
    """A directory, a link to somewhere, a pipe; and what somebody else has put there meanwhile."""
    path = tmp_path / "iohang.prom"
    for make, number in ((path.mkdir, errno.EEXIST), (lambda: path.symlink_to("/etc/passwd"), errno.EEXIST)):
        make()
        with pytest.raises(OSError, match=rf"^\[Errno {number}\]"):
            Exposition(lambda: PAGE, path).bind()
        path.rmdir() if path.is_dir() else path.unlink()
    os.mkfifo(path)
    with pytest.raises(OSError, match="no regular file"):
        Exposition(lambda: PAGE, path).bind()
    path.unlink()
    with serving(lambda: PAGE, path):
        path.unlink()
        path.write_text("somebody's\n")
    assert path.read_text() == "somebody's\n"


def test_a_directory_that_is_not_there_is_refused(tmp_path: Path) -> None:
    """At the start, while there is somebody to tell."""
    with pytest.raises(FileNotFoundError):
        Exposition(lambda: PAGE, tmp_path / "none" / "iohang.prom").bind()


@pytest.mark.usefixtures("often")
def test_a_disk_that_is_full_for_a_while(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """It is said once, and written again as soon as that is possible."""
    folder, away = tmp_path / "there", tmp_path / "away"
    folder.mkdir()
    path = folder / "iohang.prom"
    pages = 0

    def render() -> bytes:
        nonlocal pages
        pages += 1
        return PAGE

    with serving(render, path):
        folder.rename(away)
        wrote = pages
        wait_until(lambda: pages > wrote + 20)
        assert caplog.text.count("cannot be written") == 1
        away.rename(folder)
        path.unlink()
        wait_until(path.exists)
