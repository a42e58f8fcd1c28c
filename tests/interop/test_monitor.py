"""The monitor of a real mount, asked by QEMU's own client while the storage beneath is dead."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from qemu.qmp import ExecuteError, QMPClient

from contrib.bench.isolation import Client
from iohang_fuse import answers, ctl
from tests.harness import FlakySource, Mount, mounted_at, wait_until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

MIB = 1 << 20
BLOCK = 4096
CTL = [sys.executable, "-c", "import sys; from iohang_fuse.ctl import main; sys.exit(main())"]


class Site:
    """A mount above a source that fails on command, and its monitor's socket."""

    def __init__(self, flaky: FlakySource, mount: Mount, socket_path: Path) -> None:
        self.flaky = flaky
        self.mount = mount
        self.socket = socket_path

    def image(self, name: str = "a.img") -> Path:
        return self.mount.mountpoint / name

    def ctl(self, *words: str) -> subprocess.CompletedProcess[str]:
        """iohangctl, as a shell would run it."""
        command = [*CTL, "-s", str(self.socket), *words]
        return subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    (tmp_path / "real").mkdir()
    for name in ("a.img", "b.img"):
        (tmp_path / "real" / name).write_bytes(bytes(8 * MIB))
    with FlakySource(tmp_path / "real", tmp_path / "src", tmp_path / "trigger", tmp_path / "flaky.log") as flaky:
        options = ("timeout=600", "interval=1", f"monitor={tmp_path / 'm.sock'}")
        with Mount(tmp_path / "src", tmp_path / "mnt", *options, log=tmp_path / "mnt.log") as mount:
            try:
                yield Site(flaky, mount, tmp_path / "m.sock")
            finally:
                flaky.heal()


@contextmanager
def asking(path: Path, count: int) -> Iterator[list[int | None]]:
    """*count* reads of 4 KiB at once by native AIO; yields their results, which are there at the end."""
    results: list[int | None] = []
    consumer = Client(path, "read", count)
    consumer.start()
    yield results
    consumer.join(60)
    assert not consumer.is_alive()
    results += [request.result for request in consumer.requests]


@asynccontextmanager
async def client(site: Site) -> AsyncIterator[QMPClient]:
    """QEMU's own."""
    qmp = QMPClient("test")
    await qmp.connect(str(site.socket))
    try:
        yield qmp
    finally:
        with suppress(Exception):
            await qmp.disconnect()


def ask(site: Site, command: str, **arguments: object) -> Any:
    async def once() -> Any:
        async with client(site) as qmp:
            return await qmp.execute(command, {key.replace("_", "-"): value for key, value in arguments.items()})

    return asyncio.run(once())


def held(site: Site) -> int:
    count: int = ask(site, "query-status")["held"]
    return count


def read_in_thread(path: Path) -> tuple[threading.Thread, list[object]]:
    """One buffered read; its data, or its errno."""
    got: list[object] = []

    def read() -> None:
        try:
            fd = os.open(path, os.O_RDONLY)
            try:
                got.append(os.pread(fd, BLOCK, 0))
            finally:
                os.close(fd)
        except OSError as error:
            got.append(error.errno)

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    return thread, got


# ---- an outage, watched


def test_an_outage_is_one_begin_and_one_end(site: Site) -> None:
    """P9: "A hang gives one begin event and one end event, however many requests and retries it has"."""

    async def watched() -> list[dict[str, Any]]:
        async with client(site) as qmp:
            with qmp.listener() as events:
                site.flaky.fail("data a.img errno=EIO")
                threads = [read_in_thread(site.image())[0] for _ in range(5)]
                begun = await asyncio.wait_for(events.get(), 20)
                await asyncio.sleep(3.5)  # three retries
                site.flaky.heal()
                ended = await asyncio.wait_for(events.get(), 20)
                for thread in threads:
                    await asyncio.to_thread(thread.join, 20)
                await asyncio.sleep(0.5)
                assert events.empty()
                return [dict(begun), dict(ended)]

    begun, ended = asyncio.run(watched())
    assert (begun["event"], ended["event"]) == ("BLOCK_IO_HANG", "BLOCK_IO_HANG")
    assert begun["data"].items() >= {"set": True, "image": "a.img", "errno": "EIO", "op": "read"}.items()
    assert ended["data"].items() >= {"set": False, "image": "a.img", "given-up": 0, "passed-on": 0}.items()
    assert ended["data"]["recovered"] >= 1
    assert ended["data"]["duration"] > 3


def test_it_answers_while_the_storage_is_dead(site: Site) -> None:
    """Issue: "`query-io-hang` answers in under 50 ms with 1,000 requests held and the source blocked"."""
    site.flaky.fail("data a.img errno=EIO")
    with asking(site.image(), 1000) as results:
        wait_until(lambda: held(site) == 1000, what="1,000 held requests")
        site.flaky.fail("* * hang")

        async def timed() -> tuple[list[float], Any]:
            times = []
            async with client(site) as qmp:
                for _ in range(20):
                    begin_s = time.monotonic()
                    answer = await qmp.execute("query-io-hang")
                    times.append(time.monotonic() - begin_s)
                return times, answer

        medians: list[float] = []
        while not medians or (medians[-1] >= 0.05 and len(medians) < 3):  # somebody else may have had the processor
            times, (image,) = asyncio.run(timed())
            medians.append(sorted(times)[10])
        assert medians[-1] < 0.05, medians
        assert image["state"] == "hanging"
        assert image["held"] == 1000
        assert 0 < image["nearest-deadline"] <= 600
        assert 0 <= image["next-retry"] <= 1
        assert image["since"] <= time.time()
        assert len(ask(site, "query-held", limit=10)) == 10
        site.flaky.heal()
    assert results == [BLOCK] * 1000


def test_drain_ends_what_does_not_recover(site: Site) -> None:
    """Design: "if they succeed so are the others, if they fail all of the image's held requests are answered with their errors"."""
    site.flaky.fail("data a.img errno=ETIMEDOUT")
    with asking(site.image(), 50) as results:
        wait_until(lambda: held(site) == 50, what="50 held requests")
        other = os.open(site.image("b.img"), os.O_RDONLY)
        assert ask(site, "io-hang-drain", image="b.img") == []
        os.close(other)
        assert held(site) == 50
        (done,) = ask(site, "io-hang-drain", image="a.img")
        assert done["requests"] == 50
    assert len(results) == 50
    assert all(result is not None and result < 0 for result in results)
    assert held(site) == 0
    site.flaky.heal()


def test_drain_of_what_works_again_costs_nobody_an_error(site: Site) -> None:
    """The same, the other way round."""
    site.flaky.fail("data a.img errno=EIO")
    with asking(site.image(), 50) as results:
        wait_until(lambda: held(site) == 50, what="50 held requests")
        site.flaky.heal()
        ask(site, "io-hang-drain")
    assert results == [BLOCK] * 50


def is_killed_and_waits(pid: int) -> bool:
    """Whether SIGKILL is pending for a process in state D, which heeds none; see proc(5)."""
    status = dict(re.findall(r"^(\w+):\t(\S+)", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE))
    return status["State"] == "D" and bool(int(status["ShdPnd"], 16) & 1 << signal.SIGKILL - 1)


def test_a_killed_consumer_is_let_go(site: Site) -> None:
    """Issue: "`drain` ends a hung `kill -9`'d qemu": a process in state D that waits for its I/O."""
    site.flaky.fail("data a.img errno=EIO")
    program = (
        "import mmap, os, sys\n"
        "os.preadv(os.open(sys.argv[1], os.O_RDONLY | os.O_DIRECT), [mmap.mmap(-1, 4096)], 0)"  # as QEMU reads: not killable
    )
    command = [sys.executable, "-c", program, str(site.image())]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
        wait_until(lambda: held(site) >= 1, what="a held request")
        process.kill()
        wait_until(lambda: is_killed_and_waits(process.pid), what="a process that is killed, and cannot die")
        assert process.poll() is None
        ask(site, "io-hang-drain")
        assert process.wait(60) == -signal.SIGKILL
    site.flaky.heal()


def test_set_moves_the_deadlines_of_what_is_held(site: Site) -> None:
    """Issue: "`io-hang-set` moves the deadlines of held requests"."""
    fd = os.open(site.image(), os.O_RDONLY)
    site.flaky.fail("data a.img errno=EIO")
    thread, got = read_in_thread(site.image())
    wait_until(lambda: held(site) >= 1, what="a held request")
    assert ask(site, "query-io-hang")[0]["nearest-deadline"] > 500
    (done,) = ask(site, "io-hang-set", image="a.img", timeout="inf")
    assert done["read-timeout"] is None
    assert ask(site, "query-io-hang")[0]["nearest-deadline"] is None
    ask(site, "io-hang-set", timeout=3)
    thread.join(60)  # of 600 s that it had
    assert got == [5]
    assert ask(site, "query-status")["status"] == "timed-out"
    assert site.ctl("check").returncode == answers.CRITICAL
    site.flaky.heal()
    os.close(fd)


def test_paused_holding_passes_errors_on(site: Site) -> None:
    """Get ready for maintenance, and back."""
    assert ask(site, "io-hang-pause") == []
    site.flaky.fail("data * errno=EIO")
    thread, got = read_in_thread(site.image())
    thread.join(20)
    assert got == [5]
    assert ask(site, "query-status")["holding"] is False
    ask(site, "io-hang-unpause")
    thread, got = read_in_thread(site.image("b.img"))
    wait_until(lambda: held(site) >= 1, what="a held request")
    site.flaky.heal()
    thread.join(20)
    assert got == [bytes(BLOCK)]


def test_an_order_for_one_image_is_for_that_one(site: Site) -> None:
    """docs/iohangctl.rst: "Without IMAGE, for all open images and those that are opened later; with one, until its last close"."""
    fd = os.open(site.image(), os.O_RDONLY)
    ask(site, "io-hang-pause", image="a.img")
    ask(site, "io-hang-set", image="a.img", timeout=1)
    os.close(fd)
    wait_until(lambda: ask(site, "query-io-hang") == [], what="the last close")
    site.flaky.fail("data b.img errno=EIO")
    thread, got = read_in_thread(site.image("b.img"))
    wait_until(lambda: held(site) >= 1, what="a held request")
    assert ask(site, "query-io-hang")[0]["nearest-deadline"] > 500
    ask(site, "io-hang-set", timeout=900)
    site.flaky.heal()
    thread.join(20)
    assert got == [bytes(BLOCK)]
    fd = os.open(site.image(), os.O_RDONLY)
    (done,) = ask(site, "io-hang-set", interval=2)
    assert done["read-timeout"] == 900, "those that are opened later have it, too"
    os.close(fd)
    assert site.ctl("fail", "").stderr == "iohangctl: no image '' is open here\n"


@pytest.mark.parametrize(
    ("command", "arguments", "says"),
    [
        ("io-hang-retry", {"image": "c.img"}, "no image 'c.img' is open here; the nearest is 'a.img'"),
        ("io-hang-set", {}, "nothing to set; say one of"),
        ("io-hang-set", {"timeout": "soon"}, "Invalid parameter 'timeout': 'soon' is no span of time"),
        ("io-hang-set", {"interval": 0}, "say at least 0.1 s"),
        ("io-hang-set", {"timeout": 1, "intervall": 5}, "'intervall' is unexpected"),
        ("query-held", {"limit": 0}, "expected: a number from 1 on"),
        ("io-hang-fail", {"image": 7}, "expected: string"),
        ("io-hang-hold", {}, "has not been found"),
    ],
)
def test_what_is_wrong_is_said_and_nothing_is_done(
    site: Site, command: str, arguments: dict[str, object], says: str
) -> None:
    """Issue: "arguments checked before any effect"."""
    fd = os.open(site.image(), os.O_RDONLY)

    async def once() -> None:
        async with client(site) as qmp:
            before = await qmp.execute("query-io-hang")
            with pytest.raises(ExecuteError) as caught:
                await qmp.execute(command, arguments)
            assert says in str(caught.value)
            assert await qmp.execute("query-io-hang") == before

    asyncio.run(once())
    os.close(fd)


# ---- clients


def test_fifty_clients_and_one_that_never_reads(site: Site) -> None:
    """Issue: "50 clients at once; one that never reads": it is dropped, and harms nobody."""
    deaf = socket.socket(socket.AF_UNIX)
    deaf.connect(str(site.socket))
    deaf.sendall(b'{"execute": "qmp_capabilities"}')

    async def all_of_them() -> None:
        async def one() -> None:
            async with client(site) as qmp:
                for _ in range(20):
                    assert await qmp.execute("query-io-hang") == []

        await asyncio.gather(*(one() for _ in range(50)))

    asyncio.run(all_of_them())
    deaf.settimeout(20)
    with suppress(OSError):  # until it is dropped
        for _ in range(200_000):
            deaf.sendall(b'{"execute": "query-commands"}')
    wait_until(lambda: "it is dropped" in site.mount.log_text(), what="the deaf client's end")
    deaf.close()
    assert ask(site, "query-status")["status"] == "healthy"


def test_rubbish_is_answered_and_heard_no_more(site: Site) -> None:
    """Input is bounded; the mount serves on."""
    with socket.socket(socket.AF_UNIX) as rubbish:
        rubbish.connect(str(site.socket))
        rubbish.settimeout(20)
        with suppress(OSError):
            for _ in range(100):
                rubbish.sendall(os.urandom(20_000).replace(b" ", b"x"))
        with suppress(OSError):
            while rubbish.recv(65536):
                pass
    assert ask(site, "query-status")["status"] == "healthy"


def test_the_socket_is_for_its_group_alone(site: Site) -> None:
    """Design: "mode 0660". And it goes with the mount."""
    assert stat.S_IMODE(site.socket.stat().st_mode) == 0o660
    site.mount.stop()
    assert not site.socket.exists()


def test_a_dead_servers_socket_is_replaced_and_a_living_ones_is_not(site: Site, tmp_path: Path) -> None:
    """A stale socket is no reason not to mount; somebody else's is."""
    (tmp_path / "mnt2").mkdir()
    other = [sys.executable, "-m", "iohang_fuse.cli", str(tmp_path / "real"), str(tmp_path / "mnt2"), "-f"]
    refused = subprocess.run(
        [*other, "-o", f"monitor={site.socket}"], capture_output=True, text=True, timeout=30, check=False
    )
    assert refused.returncode == 2
    assert f"no socket at {site.socket}" in refused.stderr
    stale = tmp_path / "stale.sock"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(stale))
    with (
        Mount(tmp_path / "real", tmp_path / "mnt2", f"monitor={stale}", log=tmp_path / "mnt2.log"),
        socket.socket(socket.AF_UNIX) as alive,
    ):
        alive.connect(str(stale))
        assert json.loads(alive.recv(4096))["QMP"]["version"]["package"] == "iohang-fuse"


def test_after_a_lazy_unmount_the_next_mount_has_the_name(site: Site, tmp_path: Path) -> None:
    """docs/monitor.rst: "The next mount at that place has the name; the old server is found beside it, as long as it serves"."""
    old, fd = site.mount.pid, os.open(site.image(), os.O_RDONLY)
    subprocess.run(["umount", "-l", str(site.mount.mountpoint)], check=True)
    options = ("interval=1", f"monitor={site.socket}")
    with Mount(tmp_path / "src", site.mount.mountpoint, *options, log=tmp_path / "mnt2.log") as new:
        assert ask(site, "query-status")["pid"] == new.pid
        beside = site.socket.with_name(f"m.{old}.sock")
        assert f"from now on it is asked at {beside}" in new.log_text()
        site.flaky.fail("data a.img errno=EIO")
        with ThreadPoolExecutor() as pool:
            read = pool.submit(os.pread, fd, BLOCK, MIB)
            there = [*CTL, "-s", str(beside)]
            wait_until(lambda: b"hanging" in subprocess.run([*there, "list"], capture_output=True, check=True).stdout)
            subprocess.run([*there, "fail"], capture_output=True, check=True)
            with pytest.raises(OSError, match=os.strerror(5)):
                read.result(20)
        site.flaky.heal()
        os.close(fd)
        assert site.mount.process.wait(20) == 0
        assert not beside.exists()
        assert ask(site, "query-status")["pid"] == new.pid
        refused = [sys.executable, "-m", "iohang_fuse.cli", str(tmp_path / "real"), str(new.mountpoint), "-f"]
        assert subprocess.run(refused, capture_output=True, timeout=30, check=False).returncode == 32


def test_quit_unmounts(site: Site) -> None:
    """`quit` is SIGTERM; who listens hears SHUTDOWN."""

    async def watched() -> str:
        async with client(site) as qmp:
            with qmp.listener() as events:
                await qmp.execute("quit")
                return str((await asyncio.wait_for(events.get(), 20))["event"])

    assert asyncio.run(watched()) == "SHUTDOWN"
    wait_until(lambda: not mounted_at(site.mount.mountpoint), what="the unmount")


# ---- iohangctl


def test_iohangctl_says_it_in_words(site: Site) -> None:
    """Every message usable by a tired person, and `check` with a plug-in's exit codes."""
    assert site.ctl("check").returncode == answers.FINE
    assert site.ctl("list").stdout == "no image is open\n"
    site.flaky.fail("data a.img errno=EIO")
    thread, got = read_in_thread(site.image())
    wait_until(lambda: held(site) >= 1, what="a held request")
    check = site.ctl("check")
    assert check.returncode == answers.WARNING
    assert check.stdout.startswith("IOHANG WARNING - a.img: hanging since ")
    assert "EIO" in check.stdout
    assert "a.img: hanging since" in site.ctl("status").stdout
    assert site.ctl("list").stdout.splitlines()[1].split()[:2] == ["a.img", "hanging"]
    assert site.ctl("held").stdout.splitlines()[1].split()[:3] == ["a.img", "read", "0"]
    assert json.loads(site.ctl("--json", "held").stdout)[0]["errno"] == "EIO"
    assert "timeouts read 2 h 0 min" in site.ctl("set", "a.img", "timeout=2h").stdout
    wrong = site.ctl("set", "timout=5")
    assert (wrong.returncode, wrong.stderr) == (
        ctl.USAGE,
        "iohangctl: 'timout' cannot be set; the nearest is 'timeout'\n",
    )
    site.flaky.heal()
    assert site.ctl("retry").stdout.startswith("a.img: 1 requests were held") or got
    thread.join(20)
    assert got == [bytes(BLOCK)]


def test_a_pause_is_not_forgotten(site: Site) -> None:
    """Issue: "each answer says what was done"; and errors that are passed on surprise nobody: `check` warns, the log knows why."""
    paused = site.ctl("pause").stdout
    assert (
        paused
        == "no image is open; the errors of those that are opened from now on are passed on, until iohangctl unpause\n"
    )
    check = site.ctl("check")
    assert check.returncode == answers.WARNING
    assert check.stdout.startswith("IOHANG WARNING - holding is paused")
    with site.image().open("rb"):
        assert site.ctl("pause", "a.img").stdout.startswith(
            "a.img: errors are passed on, as they were already; 0 requests"
        )
        assert site.ctl("unpause", "a.img").stdout.startswith("a.img: errors are held; 0 requests")
    assert site.ctl("unpause").stdout == "no image is open; the errors of those that are opened from now on are held\n"
    assert site.ctl("check").returncode == answers.FINE
    log = site.mount.log_text()
    assert "an operator: io-hang-pause of all images: 0 concerned" in log
    assert "an operator: io-hang-unpause of a.img: 1 concerned" in log


def test_options_stand_before_the_verb_or_behind_it(site: Site) -> None:
    """Every message usable by a tired person, who types what comes to his mind."""
    said = [
        subprocess.run([*CTL, *words], capture_output=True, text=True, timeout=30, check=True).stdout
        for words in (
            ["-s", str(site.socket), "--json", "list"],
            ["list", "-s", str(site.socket), "--json"],
            ["--json", "list", "--socket", str(site.socket)],
        )
    ]
    assert said == ["[]\n"] * 3


def test_a_killed_server_is_recognised(site: Site) -> None:
    """Whoever is called at night is not asked whether it is mounted at all."""
    site.mount.process.kill()
    site.mount.process.wait()
    done = subprocess.run(
        [*CTL, "-m", str(site.mount.mountpoint), "check"], capture_output=True, text=True, timeout=30, check=False
    )
    assert done.returncode == answers.UNKNOWN
    assert f"{site.mount.mountpoint}: its server is gone; stop its guests, `umount " in done.stderr
    subprocess.run(["umount", str(site.mount.mountpoint)], check=True)


def test_a_monitor_elsewhere_is_to_be_named(site: Site) -> None:
    """It is mounted, and its socket is not where that of this mount point would be."""
    done = subprocess.run(
        [*CTL, "status", "-m", str(site.mount.mountpoint)], capture_output=True, text=True, timeout=30, check=False
    )
    assert done.returncode == ctl.REFUSED
    assert "if it was mounted with monitor=FILE, say -s FILE" in done.stderr


def test_iohangctl_watches(site: Site) -> None:
    """Events as they come, and the end of the mount as one of them."""
    with subprocess.Popen([*CTL, "-s", str(site.socket), "watch"], stdout=subprocess.PIPE, text=True) as watch:
        assert watch.stdout is not None
        time.sleep(1)
        site.flaky.fail("data a.img errno=EIO")
        thread, _ = read_in_thread(site.image())
        assert "a.img: hangs: read failed with EIO" in watch.stdout.readline()
        site.flaky.heal()
        assert "a.img: the hang is over after" in watch.stdout.readline()
        thread.join(20)
        site.mount.stop()
        assert "the mount ends" in watch.stdout.readline()
        assert watch.wait(10) == 0


def test_iohangctl_without_a_mount_says_what_to_do(tmp_path: Path) -> None:
    """One clear line, and the exit codes that are documented."""
    command = [*CTL, "-s", str(tmp_path / "none.sock")]
    status = subprocess.run([*command, "status"], capture_output=True, text=True, timeout=30, check=False)
    assert (status.returncode, status.stderr.count("\n")) == (ctl.REFUSED, 1)
    assert "No such file" in status.stderr
    assert (
        subprocess.run([*command, "check"], capture_output=True, timeout=30, check=False).returncode == answers.UNKNOWN
    )
