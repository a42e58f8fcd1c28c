"""The monitor of a real mount under whatever clients do: some hundred that send rubbish, many at once, and those that never read.

Issue: "qmp input fuzzed: no crash, no hang, no memory growth; 50 clients at once; one that never reads".
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import socket
import sys
import threading
import time
from contextlib import closing, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from qemu.qmp import QMPClient

from iohang_fuse.monitor import MOST_UNREAD
from tests.harness import Mount, wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator

MIB = 1 << 20
NEGOTIATE = b'{"execute": "qmp_capabilities"}'
STATUS = b'{"execute": "query-status", "id": "me"}'


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Mount]:
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "a.img").write_bytes(bytes(4096))
    with Mount(tmp_path / "src", tmp_path / "mnt", f"monitor={tmp_path / 'm.sock'}", log=tmp_path / "log") as mount:
        yield mount
        assert mount.process.poll() is None
        assert "a bug in" not in mount.log_text()
        assert "Traceback" not in mount.log_text()


def connect(server: Mount) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX)
    sock.settimeout(30)
    deadline_s = time.monotonic() + 30
    while True:
        try:
            sock.connect(str(server.mountpoint.parent / "m.sock"))
        except BlockingIOError:  # so many come at once that the kernel has no room for more
            assert time.monotonic() < deadline_s
            time.sleep(0.01)
        else:
            return sock


def lines_to_the_end(sock: socket.socket) -> list[dict[str, Any]]:
    """What the server says until it ends the connection, each line as JSON."""
    data = b""
    with suppress(ConnectionError):  # it may end while there is more of ours to read
        while piece := sock.recv(65536):
            data += piece
    *lines, rest = data.split(b"\r\n")
    assert rest == b""
    return [json.loads(line) for line in lines]


def memory_bytes(server: Mount) -> int:
    """Of the server, in core."""
    return int(Path(f"/proc/{server.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def descriptors(server: Mount) -> int:
    return len(os.listdir(f"/proc/{server.pid}/fd"))


def rubbish(dice: random.Random) -> bytes:
    """What one client sends: commands, parts of them, and what is none."""
    tokens = [b"{", b"}", b"[", b"]", b'"', b"\\", b":", b",", b" ", b"\r\n", b"\x00", b"\xff", b"1e999", b"9" * 5000, b"[" * 2000,
              NEGOTIATE, STATUS, b'{"execute": "query-commands"}', b'{"execute": "io-hang-set", "arguments": {"timeout": "x"}}',
              b'{"execute": "query-held", "arguments": {"image": "no"}}']  # fmt: skip
    begin = NEGOTIATE if dice.random() < 0.7 else b""
    return begin + b"".join(
        dice.randbytes(dice.randrange(300)) if dice.random() < 0.3 else dice.choice(tokens)
        for _ in range(dice.randrange(30))
    )


def one_client(server: Mount, dice: random.Random) -> None:
    """Sends rubbish in pieces, and goes: at once, or after what there is to hear."""
    data = rubbish(dice)
    with closing(connect(server)) as sock:
        while data:
            size = dice.randrange(1, 400)
            try:
                sock.sendall(data[:size])
            except ConnectionError:
                return  # heard no more
            data = data[size:]
        if dice.random() < 0.2:
            return
        sock.shutdown(socket.SHUT_WR)
        greeting, *answers = lines_to_the_end(sock)
        assert "QMP" in greeting
        assert all(("return" in answer) != ("error" in answer) for answer in answers)


def test_some_hundred_clients_that_send_rubbish(server: Mount) -> None:
    """No crash, no hang, no memory growth, no descriptor left; and who asks something sensible has an answer meanwhile."""
    seed = random.SystemRandom().getrandbits(32)
    sys.stdout.write(f"seed {seed}\n")
    dice = random.Random(seed)
    for _ in range(50):
        one_client(server, dice)
    wait_until(lambda: status(server)["status"] == "healthy")
    memory, open_ = memory_bytes(server), descriptors(server)
    for _ in range(350):
        one_client(server, dice)
        if dice.random() < 0.1:
            assert status(server)["images"] == 0
    wait_until(lambda: descriptors(server) <= open_, what=f"{open_} open descriptors")
    assert memory_bytes(server) < memory + 8 * MIB
    assert os.listdir(server.mountpoint) == ["a.img"]


def status(server: Mount) -> dict[str, Any]:
    with closing(connect(server)) as sock:
        sock.sendall(NEGOTIATE + STATUS)
        sock.shutdown(socket.SHUT_WR)
        found: dict[str, Any] = lines_to_the_end(sock)[-1]["return"]
        return found


def test_those_that_never_read_harm_nobody(server: Mount) -> None:
    """They ask and ask, and are dropped at a bound; while they do, 50 others are answered, and files are read."""
    memory = memory_bytes(server)
    deaf = [connect(server) for _ in range(3)]
    over = threading.Event()

    def flood(sock: socket.socket) -> None:
        with suppress(OSError):  # until it is dropped
            sock.sendall(NEGOTIATE)
            while not over.is_set():
                sock.sendall(b'{"execute": "query-commands"}' * 20)

    threads = [threading.Thread(target=flood, args=(sock,)) for sock in deaf]
    for thread in threads:
        thread.start()
    peak = 0

    async def fifty() -> list[float]:
        async def one() -> list[float]:
            client = QMPClient("one of fifty")
            await client.connect(str(server.mountpoint.parent / "m.sock"))
            times = []
            for _ in range(10):
                begin_s = time.monotonic()
                assert await client.execute("query-io-hang") == []
                times.append(time.monotonic() - begin_s)
            await client.disconnect()
            return times

        return [each for times in await asyncio.gather(*(one() for _ in range(50))) for each in times]

    try:
        for _ in range(2):
            times = asyncio.run(fifty())
            peak = max(peak, memory_bytes(server))
            assert len(times) == 500
            assert sorted(times)[250] < 5, "each has its turn"
            assert (server.mountpoint / "a.img").read_bytes() == bytes(4096)
        wait_until(lambda: server.log_text().count("it is dropped") == 3, timeout_s=60, what="three that are dropped")
    finally:
        over.set()
        for sock in deaf:
            sock.close()
        for thread in threads:
            thread.join(30)
    assert peak < memory + 3 * 4 * MOST_UNREAD, "what they do not read is bounded, and so is what holds it"
    assert status(server)["status"] == "healthy"


def test_one_that_comes_and_says_nothing_costs_little(server: Mount) -> None:
    """Hundreds of connections that say nothing: the next one waits until some go, and is served then."""
    before = descriptors(server)
    silent = [connect(server) for _ in range(220)]
    wait_until(lambda: "clients at once; the next ones wait" in server.log_text(), what="the bound")
    assert descriptors(server) <= before + 205
    assert (server.mountpoint / "a.img").read_bytes() == bytes(4096)
    for sock in silent:
        sock.close()
    assert status(server)["status"] == "healthy"
    wait_until(lambda: descriptors(server) <= before + 2, what="all are gone")
