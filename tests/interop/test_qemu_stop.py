"""A real QEMU whose disk hangs: what its own monitor does when it is told to stop the guest."""

from __future__ import annotations

import asyncio
import subprocess
from contextlib import contextmanager
from typing import TYPE_CHECKING

from qemu.qmp import QMPClient

from tests.harness import wait_until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from tests.interop.conftest import Rig

NOT_ANSWERED_S = 3
ANSWERED_S = 60


@contextmanager
def process(*command: str) -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(command, stdin=subprocess.DEVNULL) as started:
        try:
            yield started
        finally:
            started.kill()


def test_qemu_stops_when_its_requests_are_answered(
    rig: Rig, tmp_path: Path, program: Callable[[str, str], str]
) -> None:
    """docs/howto/during-an-outage.rst: "QEMU waits for its requests before it stops, and its monitor answers nobody meanwhile"."""
    qemu, qemu_io = program("qemu-system-x86_64", "qemu-system-x86"), program("qemu-io", "qemu-utils")
    (rig.disk / "disk.img").write_bytes(bytes(1 << 20))
    file = f"driver=file,node-name=disk,filename={rig.mount.mountpoint}/disk.img,cache.direct=on,aio=threads"
    monitors = [tmp_path / "qmp-1", tmp_path / "qmp-2"]
    qmp = [word for path in monitors for word in ("-qmp", f"unix:{path},server=on,wait=off")]

    async def stop_in_an_outage() -> None:
        first, second = QMPClient(), QMPClient()
        await first.connect(str(monitors[0]))
        await second.connect(str(monitors[1]))
        assert (await second.execute("query-status"))["status"] == "running"
        address = {"type": "unix", "data": {"path": str(tmp_path / "nbd")}}
        await first.execute("nbd-server-start", {"addr": address})
        await first.execute("block-export-add", {"type": "nbd", "id": "e", "node-name": "disk", "writable": True})
        rig.source.fail("data * errno=EIO")
        with process(qemu_io, "-f", "raw", "-c", "write 0 64k", f"nbd+unix:///disk?socket={tmp_path / 'nbd'}") as guest:
            wait_until(lambda: "write failed with EIO" in rig.mount.log_text(), what="the write to be held")
            stop = asyncio.create_task(first.execute("stop"))
            await asyncio.wait({stop}, timeout=NOT_ANSWERED_S)
            status = asyncio.create_task(second.execute("query-status"))
            await asyncio.wait({status}, timeout=NOT_ANSWERED_S)
            assert not stop.done()
            assert not status.done()
            rig.source.heal()
            await asyncio.wait_for(stop, ANSWERED_S)
            assert (await asyncio.wait_for(status, ANSWERED_S))["status"] == "paused"
            assert guest.wait(ANSWERED_S) == 0
        await first.disconnect()
        await second.disconnect()

    with process(qemu, "-M", "none", "-display", "none", "-nodefaults", "-blockdev", file, *qmp):
        wait_until(lambda: all(path.exists() for path in monitors), timeout_s=ANSWERED_S, what="QEMU's monitors")
        asyncio.run(stop_in_an_outage())
