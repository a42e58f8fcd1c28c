"""A real guest in an outage, seen through the monitor by QEMU's own client (qemu.qmp), and what an operator does about it."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from qemu.qmp import QMPClient

from contrib.guest.guest import Guest, build, verify_image
from tests.harness import FlakySource, Mount, mounted_at, wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator

IMAGE_BYTES = 64 << 20
LIMIT_S = 60

pytestmark = pytest.mark.slow


class Site:
    """A mount with a monitor, above a source that fails on command."""

    def __init__(self, folder: Path, flaky: FlakySource, mount: Mount) -> None:
        self.flaky = flaky
        self.mount = mount
        self.socket = folder / "monitor.sock"
        self.image = mount.mountpoint / "shared.img"
        self.beneath = folder / "real" / "shared.img"

    def ask(self, command: str, **arguments: object) -> Any:
        """One command, over a connection of its own."""

        async def once() -> Any:
            qmp = QMPClient("test")
            await qmp.connect(str(self.socket))
            try:
                return await qmp.execute(command, arguments)
            finally:
                await qmp.disconnect()

        return asyncio.run(once())

    def attempts(self) -> int:
        """How often what is held now has been tried."""
        return sum(int(request["attempts"]) for request in self.ask("query-held"))


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    (tmp_path / "real").mkdir()
    with (tmp_path / "real" / "shared.img").open("wb") as image:
        image.truncate(IMAGE_BYTES)
    with FlakySource(tmp_path / "real", tmp_path / "flaky", tmp_path / "trigger", tmp_path / "flaky.log") as flaky:
        options = ("timeout=600", "interval=0.5", f"monitor={tmp_path / 'monitor.sock'}")
        with Mount(tmp_path / "flaky", tmp_path / "mnt", *options, log=tmp_path / "log") as mount:
            try:
                yield Site(tmp_path, flaky, mount)
            finally:
                flaky.heal()


@contextmanager
def healed(flaky: FlakySource) -> Iterator[None]:
    """No outage afterwards: where a test fails in one, its QEMU could not be ended."""
    try:
        yield
    finally:
        flaky.heal()


def test_a_guests_outage_is_one_begin_and_one_end(site: Site, tmp_path: Path) -> None:
    """Issue: "A real outage with a real guest, watched by the real qemu.qmp client: exactly one begin and one end event".

    P9: "... however many requests and retries it has, each naming the image, the errno, the count and the times". aio=threads, so
    that the guest's eight workers have their requests held beside one another.
    """

    async def watched(guest: Guest) -> tuple[dict[str, Any], dict[str, Any]]:
        qmp = QMPClient("watcher")
        await qmp.connect(str(site.socket))
        with qmp.listener() as events:
            await asyncio.to_thread(guest.wait_for, lambda: len(guest.steps) > 50, LIMIT_S, "the guest to work")
            site.flaky.fail("data *.img errno=EIO")
            begun = dict(await asyncio.wait_for(events.get(), LIMIT_S))
            await asyncio.to_thread(
                wait_until, lambda: len(guest.in_flight) == 8, LIMIT_S, "all of its workers to wait"
            )
            async with asyncio.timeout(LIMIT_S):
                while (await qmp.execute("query-io-hang"))[0]["attempts"] < 20:  # noqa: ASYNC110 - it must be asked
                    await asyncio.sleep(0.1)
            assert not guest.errors
            assert events.empty(), "twenty attempts, and no word more"
            site.flaky.heal()
            ended = dict(await asyncio.wait_for(events.get(), LIMIT_S))
            steps = len(guest.steps)
            await asyncio.to_thread(
                guest.wait_for, lambda: len(guest.steps) > steps + 50, LIMIT_S, "the guest to go on"
            )
            assert events.empty()
        await qmp.disconnect()
        return begun, ended

    with Guest(build(), site.image, log=tmp_path / "guest.log", aio="threads", workers=8) as guest, healed(site.flaky):
        begun, ended = asyncio.run(watched(guest))
        done = guest.finish()
    assert (begun["event"], ended["event"]) == ("BLOCK_IO_HANG", "BLOCK_IO_HANG")
    assert begun["data"].items() >= {"set": True, "image": "shared.img", "errno": "EIO"}.items()
    assert ended["data"].items() >= {"set": False, "image": "shared.img", "given-up": 0, "passed-on": 0}.items()
    assert ended["data"]["recovered"] > 1
    assert 0 < ended["data"]["duration"] < guest.longest_pause_s + LIMIT_S
    assert (done.errors, done.mismatches, guest.kernel_io_errors) == (0, 0, ())
    assert not verify_image(site.beneath, guest.records).mismatches


@pytest.mark.parametrize("by", ["iohangctl", "qemu.qmp"])
def test_drain_ends_a_killed_qemu(site: Site, tmp_path: Path, by: str) -> None:
    """Issue: "`drain` ends a hung `kill -9`'d qemu". P8: "an operator can end any of them sooner".

    The kernel lets no process go that waits for O_DIRECT on FUSE, whatever signal it has got; and it cannot be unmounted, either.
    """
    with Guest(build(), site.image, log=tmp_path / "guest.log") as guest, healed(site.flaky):
        guest.wait_for(lambda: len(guest.steps) > 20, LIMIT_S, "the guest to work")
        site.flaky.fail("data *.img errno=EIO")
        wait_until(lambda: guest.in_flight and site.attempts() > 0, LIMIT_S, "a request to be held")
        os.kill(guest.pid, signal.SIGKILL)
        wait_until(lambda: "D" in states(guest.pid), LIMIT_S, "QEMU to wait in the kernel, killed as it is")
        before = site.attempts()
        wait_until(lambda: site.attempts() > before + 4, LIMIT_S, "more retries")
        assert guest.running, "killed, and still there"
        assert subprocess.run(["umount", site.mount.mountpoint], capture_output=True, check=False).returncode == 32

        if by == "qemu.qmp":
            assert site.ask("io-hang-drain")[0]["image"] == "shared.img"
        else:
            program = "import sys; from iohang_fuse.ctl import main; sys.exit(main())"
            subprocess.run(
                [sys.executable, "-c", program, "-s", str(site.socket), "drain"], check=True, timeout=LIMIT_S
            )
        wait_until(lambda: not guest.running, LIMIT_S, "QEMU's end")
        assert not Path(f"/proc/{guest.pid}").exists()
        subprocess.run(["umount", site.mount.mountpoint], check=True, timeout=LIMIT_S)
        assert site.mount.process.wait(LIMIT_S) == 0, "the server ends with its mount, in the outage"
    assert not mounted_at(site.mount.mountpoint)


def states(pid: int) -> str:
    """The states of all threads of a process, one letter each."""
    letters = ""
    for task in Path(f"/proc/{pid}/task").glob("*/stat"):
        with suppress(OSError):  # it has just ended
            letters += task.read_text().rpartition(")")[2].split()[0]
    return letters
