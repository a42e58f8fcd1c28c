"""A real QEMU on the mount, in a host that boots and powers off: the guest in it sees a pause, and no error.

The host is the Debian guest of debian_site.py, so the guest in it runs under a QEMU that is emulated itself: it takes up to seven
minutes to boot, and seconds for each read and write. So this is in the long ring; each time there are test_boot.py, with a program
in the guest's place, and guests of this host (test_outage.py). It is the small guest of contrib/guest; its port for records is the
host's own, so that the test hears what it says. By hand:

    python -m pytest -m long tests/guest/test_nested.py

What the host says, and the records, are in the test's folder, in guest/guest.log.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from contrib.guest import kernel
from contrib.guest.debian.guest import RECORDS_PORT
from contrib.guest.records import KernelMessage, Ready, Tick, in_flight
from tests.guest.debian_site import UNIT, Site, complaints, oldest_held_s, site_files, wanted

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

pytestmark = [pytest.mark.slow, pytest.mark.long]

BOOT_LIMIT_S = 1200
"""One to seven minutes where nobody else needs the CPUs."""

GUESTS = "libvirt-guests.service"
"""Nothing is said in it of the mount: that it starts after it, and stops before it, is our unit's business, as for the real one."""

VMLINUZ, INITRAMFS = "/var/lib/guest/vmlinuz", "/var/lib/guest/initramfs"

# aio=threads, as docs/howto/libvirt.rst has it: with aio=native QEMU's main loop waits for a held fsync (docs/limitations.rst).
QEMU = f"""\
[Unit]
Description=A guest whose disk is on the mount

[Service]
ExecStart=/usr/bin/qemu-system-x86_64 -accel tcg,tb-size=64 -m 128 -nodefaults -nographic -no-reboot -monitor none \\
    -kernel {VMLINUZ} -initrd {INITRAMFS} \\
    -append "console=ttyS0 loglevel=6 panic=-1 mitigations=off \\
        iohang_run=nested iohang_blocks=128 iohang_workers=2 iohang_duration_s=0 iohang_dd_mib=0" \\
    -drive file=/mnt/iohang/shared.img,format=raw,if=none,id=disk,cache=none,aio=threads -device virtio-blk-pci,drive=disk \\
    -chardev stdio,id=console,signal=off -serial chardev:console \\
    -chardev pipe,id=records,path={RECORDS_PORT} -serial chardev:records
# The inner guest goes on meanwhile; long enough to be overtaken by what does not wait for it.
ExecStop=/usr/bin/sleep 3
"""


def ticks(records: Iterable[object]) -> list[Tick]:
    return [record for record in records if isinstance(record, Tick)]


def test_a_guest_of_a_real_host_sees_a_pause(tmp_path: Path) -> None:
    """Issue: "a real boot in a Debian guest [...] a guest's disk works through an outage, and shutdown leaves nothing hanging".

    P1: "answered only when it succeeds", so the inner guest sees no error, and its kernel logs none. P3: every acknowledged byte
    is on the disk, although the host's kernel calls a page clean whose writeback has failed.
    """
    booted = kernel.build()
    files = {VMLINUZ: booted.vmlinuz, INITRAMFS: booted.initramfs}
    site = Site(
        tmp_path,
        site_files("1h", "1h") | wanted({GUESTS: QEMU}) | files,
        packages=["qemu-system-x86"],
        memory_mib=1024,
    )
    with site.guest as host:
        host.wait_until(
            lambda: any(isinstance(record, Ready) for record in host.records), "the inner guest", BOOT_LIMIT_S
        )
        assert "/mnt/iohang/shared.img" in host.run("sh", "-c", "readlink /proc/$(pidof qemu-system-x86_64)/fd/*")
        site.works()

        site.hangs()
        host.wait_until(lambda: oldest_held_s(host) > 5, "some retries")
        # Reads are answered from the server's page cache; no write is on stable storage before the outage's end.
        host.wait_until(
            lambda: [step.operation for step in in_flight(host.records)] == ["write"] * 2,
            "both of the inner guest's workers to wait",
        )
        waiting = in_flight(host.records)
        before = len(ticks(host.records))
        host.wait_until(lambda: len(ticks(host.records)) > before + 3, "the inner guest's clock and CPU, which go on")
        assert in_flight(host.records) == waiting
        host.run("outage", "end")
        host.wait_until(lambda: site.status() == "serving /srv/vm at /mnt/iohang", "the end of the hang as the status")
        site.works()
        journal = site.journal()
        assert journal.count("failed with EIO") == journal.count("shared.img: recovered after") == 1, journal

        log = host.run("journalctl", "--no-pager", "--all", "-o", "cat", "-u", GUESTS).splitlines()
        assert any("Linux version" in line for line in log), "the inner guest's console"
        assert [line for line in log if KernelMessage(line, "console", 0).is_io_error] == []
        assert {step.outcome for step in host.steps} == {"ok"}
        host.power_off()  # the inner guest is in the middle of its I/O
    assert complaints(site.console()) == []
    assert site.line_of(f"Stopped {GUESTS}") < site.line_of(f"Stopping {UNIT}") < site.line_of(f"Stopped {UNIT}")
    assert any("reboot: Power down" in line for line in site.console())
    site.assert_clean()
    assert site.verified_bytes() > 10 * 4096
