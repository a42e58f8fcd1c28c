"""A Debian guest with systemd boots, rides out an outage of its disk, and powers off: the unit and the fstab line at work.

The guest is that of debian_site.py; what uses the images is a program of our own (consumer.py), with O_DIRECT as QEMU does it.
QEMU itself does in test_nested.py. By hand:

    python -m contrib.guest.debian.image      builds the guest's image (once; `--rebuild`: anew)
    python -m pytest tests/guest/test_boot.py

What the guest says is in the test's folder, in guest/guest.log.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import pytest

from contrib.guest.debian.guest import RECORDS_PORT
from contrib.guest.records import in_flight
from tests.guest.debian_site import (
    FSTAB_MOUNT,
    SOURCE_MOUNT,
    UNIT,
    Site,
    complaints,
    oldest_held_s,
    site_files,
    wanted,
)

if TYPE_CHECKING:
    from pathlib import Path

    from contrib.guest.debian.guest import DebianGuest

pytestmark = pytest.mark.slow

# What has guests on the mount, by the names of Debian's units. Nothing is said here of its order: that is our unit's business.
STANDS_FOR = """\
[Unit]
Description=What stands for the real one

[Service]
Type=oneshot
RemainAfterExit=yes
ExecStart=/usr/bin/true
# Long enough to be overtaken by what does not wait for it.
ExecStop=/usr/bin/sleep 3
"""
USERS = ("libvirtd.service", "virtqemud.service", "libvirt-guests.service")

CONSUMER = f"""\
[Unit]
Description=What uses a disk image
Requires={UNIT}
After={UNIT}

[Service]
ExecStart=/usr/bin/python3 -m contrib.guest.debian.consumer /mnt/iohang/shared.img {RECORDS_PORT}
# Of which there are four, one for each signal, where a process in state D heeds none.
TimeoutStopSec=2s
"""

OTHER_CONSUMER = """\
[Unit]
Description=What uses a disk image on the mount of fstab
RequiresMountsFor=/mnt/fstab

[Service]
ExecStart=/usr/bin/python3 -m contrib.guest.debian.consumer /mnt/fstab/other.img /dev/null
TimeoutStopSec=2s
"""

CONSUMERS = {"consumer.service": CONSUMER, "other-consumer.service": OTHER_CONSUMER}


def microseconds(guest: DebianGuest, unit: str, what: str) -> int:
    """Since the guest's boot."""
    return int(guest.properties(unit, f"{what}TimestampMonotonic")[f"{what}TimestampMonotonic"])


def test_a_host_boots_rides_out_an_outage_and_powers_off(tmp_path: Path) -> None:
    """Issue: "the unit and the fstab line come up after the source [...] and shutdown leaves nothing hanging".

    Platform fact 21: the unit is before libvirtd, virtqemud and libvirt-guests, which are started after it, and stopped before it.
    P1, P3: the consumer sees no error, and every acknowledged byte is on the disk, although the kernel calls a page clean whose
    writeback has failed.
    """
    site = Site(tmp_path, site_files("1h", "1h") | wanted(CONSUMERS | dict.fromkeys(USERS, STANDS_FOR)))
    with site.guest as guest:
        guest.wait_until(lambda: guest.state("consumer.service") == "active", "the consumer, ordered after the unit")
        guest.wait_until(lambda: guest.state(FSTAB_MOUNT) == "active", "the line in fstab")

        source_up = microseconds(guest, SOURCE_MOUNT, "ActiveEnter")
        assert source_up > 5_000_000, "the source is late"
        assert source_up < microseconds(guest, UNIT, "ExecMainStart") < microseconds(guest, UNIT, "ActiveEnter")
        assert source_up < microseconds(guest, FSTAB_MOUNT, "InactiveExit")
        assert microseconds(guest, UNIT, "ActiveEnter") < microseconds(guest, "consumer.service", "ExecMainStart")
        guest.wait_until(
            lambda: guest.state("remote-fs.target") == "active", "the target that guests are ordered after"
        )
        for unit in (UNIT, FSTAB_MOUNT):
            assert microseconds(guest, unit, "ActiveEnter") < microseconds(guest, "remote-fs.target", "ActiveEnter")
        for user in USERS:
            guest.wait_until(lambda user=user: guest.state(user) == "active", f"{user}, ordered after the unit")
            assert microseconds(guest, UNIT, "ActiveEnter") < microseconds(guest, user, "InactiveExit"), user
        for mountpoint in ("/mnt/iohang", "/mnt/fstab"):
            assert guest.run("ls", mountpoint).split() == ["lost+found", "other.img", "shared.img"], (
                "the source, not what it hides"
            )
            assert guest.run("findmnt", "-n", "-o", "SOURCE,FSTYPE", mountpoint).split() == [
                "/srv/vm",
                "fuse.iohang-mount",
            ]
        assert 'Status: "serving /srv/vm at /mnt/iohang"' in guest.run("systemctl", "status", "--no-pager", UNIT)
        guest.run(
            "modprobe", "--dry-run", "--all", "nfs", "nfsd", "nf_tables", "sch_netem"
        )  # for guests that want more
        site.works()

        site.hangs()
        bare = guest.ask("dd", "if=/srv/vm/shared.img", "of=/dev/null", "bs=4096", "count=1", "iflag=direct")
        assert "Input/output error" in bare.err, "the outage is real"
        assert re.search(
            r'Status: "1 image hangs, since .*: shared.img \(EIO\)', guest.run("systemctl", "status", UNIT)
        )
        guest.wait_until(lambda: oldest_held_s(guest) > 5, "some retries")
        assert guest.ask("iohangctl", "-m", "/mnt/iohang", "check").code == 1
        assert guest.ask("iohangctl", "-m", "/mnt/fstab", "check").code == 1
        guest.run("ls", "-l", "/mnt/iohang")
        assert in_flight(guest.records)
        guest.run("outage", "end")
        guest.wait_until(lambda: site.status() == "serving /srv/vm at /mnt/iohang", "the end of the hang as the status")
        site.works()
        journal = site.journal()
        assert journal.count("shared.img: fsync failed with EIO") == journal.count("failed with EIO") == 1, journal
        assert journal.count("shared.img: recovered after") == 1, journal

        guest.power_off()
    assert guest.done is not None, "the consumer was asked to end, and could"
    assert (guest.done.errors, guest.done.mismatches) == (0, 0)
    assert complaints(site.console()) == []
    stopping = site.line_of(f"Stopping {UNIT}")
    assert stopping < site.line_of(f"Stopped {UNIT}")
    for user in USERS:
        assert site.line_of(f"Stopped {user}") < stopping, user
    assert any("reboot: Power down" in line for line in site.console())
    site.assert_clean()
    assert site.verified_bytes() > 20 * 4096


@pytest.mark.parametrize(("unit_timeout", "fstab_timeout"), [("10s", "inf"), ("inf", "10s")])
def test_a_power_off_in_an_outage_comes_to_its_end(tmp_path: Path, unit_timeout: str, fstab_timeout: str) -> None:
    """P8: "SIGTERM and unmount have a defined end, too", with consumers in state D, whom no signal ends.

    The unit ends regularly: what is held gets its answer at its timeout, for which the server asks systemd to wait, and where there
    is none, at the second SIGTERM. fstab's mount has nobody who insists: systemd asks umount(8) once, and ends its server at last.
    """
    # The journal has gone before the end. What is written to it as fields is not for the console; so stderr is not to look like it.
    on_console = "StandardError=journal+console\nUnsetEnvironment=JOURNAL_STREAM\n"
    files = site_files(unit_timeout, fstab_timeout, f"TimeoutStopSec=10s\n{on_console}") | wanted(CONSUMERS)
    files["/etc/systemd/system.conf.d/short.conf"] = "[Manager]\nDefaultTimeoutStopSec=5s\n"  # of 90
    site = Site(tmp_path, files)
    with site.guest as guest:
        site.works()
        site.hangs()
        guest.wait_until(
            lambda: guest.ask("iohangctl", "-m", "/mnt/fstab", "check").code != 0, "the other one to hang, too"
        )
        guest.power_off()
    console = site.console()
    fstabs = {
        f"[FAILED] Failed unmounting {unit} - {path}."
        for unit, path in ((FSTAB_MOUNT, "/mnt/fstab"), (SOURCE_MOUNT, "/srv/vm"))
    }
    assert set(complaints(console)) <= fstabs
    # Two words: the kernel's own lines may come between any two characters of ours.
    insisted = any("SIGTERM again" in line or "is detached; held requests" in line for line in console)
    assert insisted == (unit_timeout == "inf")
    assert any(f"Stopped {UNIT}" in line for line in console)
    assert any("reboot: Power down" in line for line in console)
    site.assert_clean()
    assert site.verified_bytes() > 10 * 4096
