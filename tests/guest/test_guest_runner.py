"""The guest runner itself: what it says of good, failing and waiting storage is true."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from contrib.guest.guest import (
    BLOCK_BYTES,
    Guest,
    GuestUnavailableError,
    Kernel,
    KernelMessage,
    Record,
    Step,
    Tick,
    block_content,
    build,
    verify_image,
)
from contrib.guest.records import in_flight, longest_pause_s, parse_record
from tests.harness import wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator

IMAGE_BYTES = 16 << 20

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def kernel() -> Kernel:
    try:
        return build()
    except GuestUnavailableError as error:
        pytest.fail(str(error))


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    with path.open("wb") as file:
        file.truncate(IMAGE_BYTES)
    return path


@contextmanager
def nbd_disk(image: Path, *filters: str, trigger: Path) -> Iterator[str]:
    """*image* behind nbdkit; all requests fail with EIO while *trigger* exists; yields QEMU's name for it."""
    if shutil.which("nbdkit") is None:
        pytest.fail("needs: apt-get install nbdkit")
    address = image.with_suffix(".nbd")
    parameters = [f"--filter={name}" for name in filters]
    parameters += [
        "--filter=error",
        "file",
        str(image),
        "error=EIO",
        "error-rate=100%",
        f"error-file={trigger}",
    ]
    if "retry-request" in filters:
        parameters += ["retry-request-retries=1000", "retry-request-delay=1"]
    process = subprocess.Popen(["nbdkit", "-f", "-U", str(address), *parameters], stderr=subprocess.DEVNULL)
    try:
        wait_until(address.exists, what="nbdkit to listen")
        yield f"nbd+unix:///?socket={address}"
    finally:
        process.terminate()
        process.wait()


def records_of(*lines: str) -> list[Record]:
    records = [parse_record(line, host_s=0) for line in lines]
    assert None not in records
    return [record for record in records if record is not None]


READY = "READY run=ab blocks=4 workers=1 spacing=8192 uptime=1.00"


@pytest.mark.slow
def test_a_guest_on_good_storage_writes_reads_and_ticks(kernel: Kernel, image: Path, tmp_path: Path) -> None:
    """At least 10 steps a second, no error anywhere, and every acknowledged byte in the image."""
    qmp = tmp_path / "qmp"
    with Guest(kernel, image, log=tmp_path / "log", qmp=qmp) as guest:
        with socket.socket(socket.AF_UNIX) as monitor:
            monitor.connect(str(qmp))
            assert "QMP" in json.loads(monitor.makefile().readline())
        time.sleep(6)
        steps_per_s = len(guest.steps) / 6
        dmesg = guest.dmesg()
        done = guest.finish()
    assert not guest.running
    assert steps_per_s > 10
    assert (done.mismatches, done.errors) == (0, 0)
    assert done.writes == sum(step.operation == "write" for step in guest.steps)
    assert done.reads == sum(step.operation == "read" for step in guest.steps)
    assert (guest.errors, guest.kernel_io_errors, guest.unparsed, guest.in_flight) == ((), (), (), ())
    assert any("Linux version" in line for line in dmesg)
    assert guest.longest_pause_s < 3
    ticks = [record for record in guest.records if isinstance(record, Tick)]
    assert len(ticks) >= 5
    assert ticks[-1].spins > ticks[0].spins
    assert ticks[-1].busy_s > ticks[0].busy_s
    report = verify_image(image, guest.records)
    written = {step.block for step in guest.steps if step.operation == "write"}
    assert report.verified_bytes == len(written) * BLOCK_BYTES
    assert (report.mismatches, report.in_doubt_blocks) == ((), ())


@pytest.mark.slow
def test_a_guest_whose_storage_fails_says_so(kernel: Kernel, image: Path, tmp_path: Path) -> None:
    """An EIO is seen in the guest's steps and, live, in its kernel's messages; I/O goes on after it."""
    trigger = tmp_path / "fail"
    with (
        nbd_disk(image, trigger=trigger) as disk,
        Guest(kernel, disk, aio=None, werror="report", rerror="report", log=tmp_path / "log") as guest,
    ):
        guest.wait_for(lambda: len(guest.steps) > 20, 30, "some steps before the outage")
        assert guest.errors == ()
        trigger.touch()
        guest.wait_for(lambda: guest.errors, 30, "a failed step")
        guest.wait_for(lambda: guest.kernel_io_errors, 30, "the kernel's message, before the end")
        live = [record for record in guest.records if isinstance(record, KernelMessage)]
        assert {message.source for message in live} == {"console"}
        trigger.unlink()
        ended = len(guest.steps)
        guest.wait_for(
            lambda: sum(step.outcome == "ok" for step in guest.steps[ended:]) > 20, 30, "I/O after the outage"
        )
        done = guest.finish()
    assert done.errors == len(guest.errors) > 0
    assert {step.outcome for step in guest.errors} == {"ERROR"}
    assert any("Input/output error" in step.detail for step in guest.errors)
    assert any("I/O error, dev vda" in line for line in guest.kernel_io_errors)
    assert len({line.strip() for line in guest.kernel_io_errors}) == len(guest.kernel_io_errors)
    assert verify_image(image, guest.records).mismatches == ()


@pytest.mark.slow
def test_a_guest_whose_storage_waits_sees_a_pause_and_no_error(kernel: Kernel, image: Path, tmp_path: Path) -> None:
    """While the storage holds its requests the guest's clock and CPU go on; then its I/O does."""
    trigger = tmp_path / "fail"
    with (
        nbd_disk(image, "retry-request", trigger=trigger) as disk,
        Guest(kernel, disk, aio=None, log=tmp_path / "log") as guest,
    ):
        guest.wait_for(lambda: len(guest.steps) > 20, 30, "some steps before the outage")
        trigger.touch()
        guest.wait_for(lambda: guest.longest_pause_s > 3, 60, "a pause that still lasts to be seen")
        assert len(guest.in_flight) == 2
        before = guest.last_tick
        guest.wait_for(lambda: guest.longest_pause_s > 6, 60, "a longer pause")
        after = guest.last_tick
        trigger.unlink()
        ended = len(guest.steps)
        guest.wait_for(lambda: len(guest.steps) > ended + 20, 30, "I/O after the pause")
        done = guest.finish()
    assert before is not None
    assert after is not None
    assert after.spins > before.spins
    assert after.uptime_s - before.uptime_s == pytest.approx(after.host_s - before.host_s, abs=1)
    assert after.iowait_s + after.idle_s > before.iowait_s + before.idle_s
    assert guest.longest_pause_s > 6
    assert (done.errors, done.mismatches, guest.kernel_io_errors) == (0, 0, ())
    assert verify_image(image, guest.records).mismatches == ()


@pytest.mark.slow
def test_wrong_bytes_are_seen_in_the_guest_and_in_the_image(kernel: Kernel, image: Path, tmp_path: Path) -> None:
    """Overwriting every block behind the guest's back is a mismatch in its reads, and in the image."""
    with Guest(kernel, image, log=tmp_path / "log") as guest:
        ready = guest.wait_ready()
        guest.wait_for(lambda: len(guest.steps) > ready.blocks, 60, "some blocks to be written")
        with image.open("r+b") as file:
            for block in range(ready.blocks):
                file.seek(block * ready.spacing_bytes)
                file.write(b"\xff" * BLOCK_BYTES)
        guest.wait_for(lambda: guest.errors, 30, "a mismatch")
        done = guest.finish()
    assert done.mismatches > 0
    assert {step.outcome for step in guest.errors} == {"MISMATCH"}
    assert verify_image(image, guest.records).mismatches


@pytest.mark.slow
def test_a_guest_killed_while_writing_leaves_every_acknowledged_byte(
    kernel: Kernel, image: Path, tmp_path: Path
) -> None:
    """The writes that were under way are in doubt, at most one for each worker; all others are verified."""
    with Guest(kernel, image, workers=4, log=tmp_path / "log") as guest:
        guest.wait_for(lambda: len(guest.steps) > 50, 60, "some steps")
        guest.wait_for(
            lambda: any(step.operation == "write" for step in guest.in_flight), 30, "a write to be under way"
        )
        guest.kill()
    report = verify_image(image, guest.records)
    assert report.mismatches == ()
    assert report.verified_bytes >= 20 * BLOCK_BYTES
    assert 0 <= len(report.in_doubt_blocks) <= 4


@pytest.mark.slow
def test_no_qemu_outlives_its_runner(kernel: Kernel, image: Path, tmp_path: Path) -> None:
    """Neither after an exception in the with block, nor after SIGKILL of the process that runs the guest."""
    with pytest.raises(ZeroDivisionError), Guest(kernel, image, log=tmp_path / "log") as guest:
        raise ZeroDivisionError
    assert not Path(f"/proc/{guest.pid}").exists()

    program = (
        "import sys, time; from pathlib import Path; from contrib.guest.guest import *\n"
        "with Guest(build(), sys.argv[1], log=Path(sys.argv[2])) as guest:\n"
        "    print(guest.pid, flush=True); time.sleep(60)"
    )
    runner = subprocess.Popen(
        [sys.executable, "-c", program, str(image), str(tmp_path / "log2")],
        cwd=ROOT,
        stdout=subprocess.PIPE,
    )
    assert runner.stdout is not None
    with runner.stdout:
        pid = int(runner.stdout.readline())
    runner.send_signal(signal.SIGKILL)
    runner.wait()
    wait_until(lambda: not Path(f"/proc/{pid}").exists() or is_zombie(pid), what="QEMU to be gone")


def is_zombie(pid: int) -> bool:
    """Nobody may reap an orphan in a container whose first process is no init."""
    return "\nState:\tZ" in Path(f"/proc/{pid}/status").read_text()


@pytest.mark.slow
def test_a_guest_without_a_disk_is_an_error_that_says_so(kernel: Kernel, tmp_path: Path) -> None:
    """QEMU's own complaint, or the guest's, is in the error."""
    with (
        pytest.raises(RuntimeError, match="No such file"),
        Guest(kernel, tmp_path / "none", log=tmp_path / "log"),
    ):
        pass
    small = tmp_path / "small.img"
    small.write_bytes(bytes(65536))
    with (
        pytest.raises(RuntimeError, match="less than 128 blocks"),
        Guest(kernel, small, log=tmp_path / "log"),
    ):
        pass


FAKE_FETCHERS = {
    "apt-cache": "echo '  Depends: linux-image-9.9'",
    "apt-get": 'echo fetched >>"$FETCHED"; sleep 0.5; : >linux-image-9.9.deb',
    "dpkg-deb": (
        "modules=unpacked/lib/modules/9.9/kernel/drivers/v; mkdir -p unpacked/boot $modules\n"
        "echo kernel >unpacked/boot/vmlinuz-9.9\n"
        "for name in virtio virtio_ring virtio_pci virtio_pci_legacy_dev virtio_pci_modern_dev virtio_blk; do\n"
        "  echo module | xz >$modules/$name.ko.xz\n"
        "done"
    ),
}


def test_two_builds_at_once_fetch_one_whole_kernel(tmp_path: Path) -> None:
    """A fresh cache, two processes: one download, the same files for both, and nothing else is left."""
    needed = ("qemu-system-x86_64", "busybox", "cpio", "setpriv", "xz")
    if missing := [name for name in needed if shutil.which(name) is None]:
        pytest.fail(f"needs the programs {missing}")
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, script in FAKE_FETCHERS.items():
        (programs / name).write_text(f"#!/bin/sh\n{script}\n")
        (programs / name).chmod(0o755)
    fetched = tmp_path / "fetched"
    cache = tmp_path / "cache"
    environment = {**os.environ, "PATH": f"{programs}:{os.environ['PATH']}", "FETCHED": str(fetched)}
    program = "import sys, pathlib, contrib.guest.guest as g; g.build(pathlib.Path(sys.argv[1]))"
    command = [sys.executable, "-c", program, str(cache)]
    builders = [subprocess.Popen(command, cwd=ROOT, env=environment) for _ in range(2)]
    assert [builder.wait() for builder in builders] == [0, 0]
    assert fetched.read_text() == "fetched\n"
    built = build(cache)
    assert built.release == "9.9"
    assert built.vmlinuz.read_text() == "kernel\n"
    assert (cache / "kernel" / "virtio_blk.ko").read_text() == "module\n"
    assert {path.name for path in cache.iterdir()} == {"kernel", "lock", built.initramfs.name}


def test_a_missing_program_is_named_by_its_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """One line that can be pasted."""
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(
        GuestUnavailableError, match=r"^a guest needs: apt-get install busybox-static .*qemu-system-x86"
    ):
        build(tmp_path / "cache")


def test_an_acknowledged_write_must_be_in_the_image(tmp_path: Path) -> None:
    """One wrong byte is one wrong sector, and its block is named."""
    image = tmp_path / "disk.img"
    content = block_content("ab", 1, 2)
    records = records_of(
        READY, "IO pass=1 block=2 op=write begin uptime=2.00", "IO pass=1 block=2 op=write ok uptime=2.10"
    )
    image.write_bytes(bytes(2 * 8192) + content)
    assert verify_image(image, records).verified_bytes == BLOCK_BYTES
    image.write_bytes(bytes(2 * 8192) + content[:600] + b"X" + content[601:])
    report = verify_image(image, records)
    assert report.verified_bytes == BLOCK_BYTES - 512
    assert [(wrong.block, wrong.sector) for wrong in report.mismatches] == [(2, 1)]
    image.write_bytes(bytes(100))
    assert len(verify_image(image, records).mismatches) == 8


@pytest.mark.parametrize("ending", ["", "IO pass=2 block=0 op=write ERROR uptime=2.30 rc=1 message=dd: I/O error"])
def test_an_unacknowledged_write_may_be_there_or_not(tmp_path: Path, ending: str) -> None:
    """Old and new are right, sector by sector; another pass's are not; an acknowledgement ends the doubt."""
    image = tmp_path / "disk.img"
    old, new, other = (block_content("ab", number, 0) for number in (1, 2, 3))
    lines = [
        READY,
        "IO pass=1 block=0 op=write begin uptime=2.00",
        "IO pass=1 block=0 op=write ok uptime=2.10",
        "IO pass=2 block=0 op=write begin uptime=2.20",
        *([ending] if ending else []),
    ]
    for content, wrong in ((old, 0), (new, 0), (new[:512] + old[512:], 0), (other, 8)):
        image.write_bytes(content)
        report = verify_image(image, records_of(*lines))
        assert len(report.mismatches) == wrong
        assert report.in_doubt_blocks == (0,)
    lines += ["IO pass=3 block=0 op=write begin uptime=3.00", "IO pass=3 block=0 op=write ok uptime=3.10"]
    image.write_bytes(new)
    assert len(verify_image(image, records_of(*lines)).mismatches) == 8


def test_records_without_ready_cannot_be_verified(tmp_path: Path) -> None:
    """Verifying nothing must not look like success."""
    with pytest.raises(ValueError, match="READY"):
        verify_image(tmp_path / "disk.img", [])


def test_a_pause_is_measured_by_the_guests_clock_while_it_lasts() -> None:
    """Ticks lengthen it, the begin of a step does not end it."""
    tick = "TICK uptime=9.00 spins=1 user=1 nice=0 system=0 idle=0 iowait=0"
    lines = [
        READY,
        "IO pass=1 block=0 op=write begin uptime=1.10",
        "IO pass=1 block=0 op=write ok uptime=2.00",
        "IO pass=1 block=1 op=write begin uptime=2.10",
        tick,
    ]
    assert longest_pause_s(records_of(*lines)) == pytest.approx(7)
    assert [step.block for step in in_flight(records_of(*lines))] == [1]
    lines.append("IO pass=1 block=1 op=write ERROR uptime=9.50 rc=1 message=dd: writing '/dev/vda': I/O error")
    records = records_of(*lines)
    assert longest_pause_s(records) == pytest.approx(7.5)
    assert in_flight(records) == ()
    failed = records[-1]
    assert isinstance(failed, Step)
    assert failed.detail == "rc=1 message=dd: writing '/dev/vda': I/O error"


@pytest.mark.parametrize("line", ["", "IO pass=1 block=", "TICK uptime=1.0 spins=", "READY run=ab", "dd: what"])
def test_a_line_that_is_no_whole_record_is_none(line: str) -> None:
    """It is kept as unparsed rather than guessed at."""
    assert parse_record(line, host_s=0) is None
