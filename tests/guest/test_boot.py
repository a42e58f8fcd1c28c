"""A Debian guest with systemd boots, rides out an outage of its disk, and powers off: the unit and the fstab line at work.

The source is ext4 on a disk that comes up late. The outage is the kernel's own: device-mapper's `error` target beneath the blocks
of the image, so that reads and writeback fail with EIO, while the file system's metadata live. By hand:

    python -m contrib.guest.debian.image      builds the guest's image (once; `--rebuild`: anew)
    python -m pytest tests/guest/test_boot.py

What the guest says is in the test's folder, in guest/guest.log.
"""

from __future__ import annotations

import json
import re
import subprocess
from typing import TYPE_CHECKING

import pytest

from contrib.guest.debian.guest import RECORDS_PORT, DebianGuest, build
from contrib.guest.debian.image import TREE
from contrib.guest.records import in_flight, verify_image

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

pytestmark = pytest.mark.slow

UNIT = "iohang@mnt-iohang.service"
SOURCE_MOUNT, FSTAB_MOUNT = "srv-vm.mount", "mnt-fstab.mount"
IMAGE_BYTES = 16 << 20

SOURCE_DISK = """\
[Unit]
Description=A storage that takes its time
DefaultDependencies=no
Conflicts=shutdown.target
After=systemd-udevd.service
Before=shutdown.target

[Service]
Type=oneshot
RemainAfterExit=yes
ExecStart=/usr/bin/sleep 5
ExecStart=/usr/local/bin/outage create
"""

# --nolockfs: no flush beforehand, for that would fail.
OUTAGE = """\
#!/bin/sh
set -eu
size=$(blockdev --getsz /dev/vdc)
healthy="0 $size linear /dev/vdc 0"
sick() { # all sectors but those of the images, in the order in which they lie
    filefrag -v -b512 /srv/vm/*.img | tr -s ':.' ' ' | awk '/^ *[0-9]+ / { print $4, $6 }' | sort -n |
        awk -v at=0 -v size="$size" '
            { if ($1 > at) print at, $1 - at, "linear /dev/vdc", at; print $1, $2, "error"; at = $1 + $2 }
            END { if (size > at) print at, size - at, "linear /dev/vdc", at }'
}
turn() {
    dmsetup reload source
    dmsetup suspend --nolockfs source
    dmsetup resume source
}
case $1 in
    create) echo "$healthy" | dmsetup create source ;;
    begin)
        dmesg -n 3 # what the kernel says of each block would come between the words of others on the console
        sick | turn
        ;;
    end) echo "$healthy" | turn ;;
esac
"""

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


def users_of_the_mount() -> dict[str, str]:
    units = "/etc/systemd/system"
    return {f"{units}/{name}": STANDS_FOR for name in USERS} | {
        f"{units}/multi-user.target.wants/{name}": f"-> ../{name}" for name in USERS
    }


def site_files(unit_timeout: str, fstab_timeout: str, drop_in: str = "") -> dict[str, str]:
    """The guest as an administrator sets it up, from contrib/systemd: the unit, its drop-in, and the line for fstab."""

    def shipped(name: str, timeout: str) -> str:
        text = (TREE / "contrib" / "systemd" / name).read_text()
        assert "timeout=5min" in text
        return text.replace("/srv/nfs/vm", "/srv/vm").replace("timeout=5min", f"timeout={timeout},interval=1")

    unit = (TREE / "contrib" / "systemd" / "iohang@.service").read_text()
    wanted_by = re.search(r"^WantedBy=(\S+)$", unit, re.MULTILINE)
    line = re.search(r"^/srv/vm .*$", shipped("fstab", fstab_timeout), re.MULTILINE)
    assert wanted_by is not None
    assert line is not None
    units = "/etc/systemd/system"
    return {
        "/etc/fstab": (
            "/dev/mapper/source /srv/vm ext4 _netdev,x-systemd.requires=source-disk.service,x-systemd.device-timeout=600 0 0\n"
            f"{line[0].replace('/mnt/iohang', '/mnt/fstab')}\n"
        ),
        "/srv/vm/not-mounted-yet": "The directory beneath the source's mount.\n",
        "/mnt/iohang/.keep": "",
        "/mnt/fstab/.keep": "",
        "/usr/local/bin/outage": OUTAGE,
        f"{units}/source-disk.service": SOURCE_DISK,
        f"{units}/consumer.service": CONSUMER,
        f"{units}/other-consumer.service": OTHER_CONSUMER,
        f"{units}/multi-user.target.wants/consumer.service": "-> ../consumer.service",
        f"{units}/multi-user.target.wants/other-consumer.service": "-> ../other-consumer.service",
        f"{units}/iohang@.service": unit,
        f"{units}/{wanted_by[1]}.wants/{UNIT}": "-> ../iohang@.service",  # what `systemctl enable` does
        f"{units}/{UNIT}.d/mount.conf": shipped("mount.conf", unit_timeout) + drop_in,
    }


class Site:
    """A guest with a source disk, and what tests ask of it again and again."""

    def __init__(self, folder: Path, files: Mapping[str, str]) -> None:
        self._folder = folder
        self.disk = folder / "source.img"
        vm = folder / "vm"
        vm.mkdir()
        for name in ("shared.img", "other.img"):
            (vm / name).write_bytes(b"\xa5" * IMAGE_BYTES)  # zeros would be left out, and have no blocks to fail
        with self.disk.open("wb") as disk:
            disk.truncate(64 << 20)
        subprocess.run(["mke2fs", "-q", "-t", "ext4", "-d", str(vm), str(self.disk)], check=True)
        self.guest = DebianGuest(build(), folder / "guest", disks=[self.disk], files=files)

    def works(self) -> None:
        """Wait until the consumer has done some more."""
        steps = len(self.guest.steps)
        self.guest.wait_until(lambda: len(self.guest.steps) > steps + 20, "the consumer's I/O")

    def status(self) -> str:
        return self.guest.properties(UNIT, "StatusText")["StatusText"]

    def hangs(self) -> None:
        """Begin an outage, and wait until the consumer hangs."""
        self.guest.run("outage", "begin")
        self.guest.wait_until(lambda: "shared.img (EIO)" in self.status(), "the hang as the unit's status")

    def journal(self) -> str:
        return self.guest.run("journalctl", "--no-pager", "-o", "cat", "-u", UNIT)

    def assert_clean(self) -> None:
        """The guest has unmounted the source's file system, and nothing is wrong in it."""
        told = subprocess.run(["dumpe2fs", "-h", str(self.disk)], capture_output=True, text=True, check=True).stdout
        assert re.search(r"^Filesystem state: +clean$", told, re.MULTILINE)
        assert "needs_recovery" not in told, "it was not unmounted"
        assert subprocess.run(["e2fsck", "-f", "-n", str(self.disk)], capture_output=True, check=False).returncode == 0

    def verified_bytes(self) -> int:
        """Compare the image on the disk with every write that was acknowledged in the guest."""
        image = self._folder / "shared.img"
        subprocess.run(["debugfs", "-R", f"dump /shared.img {image}", str(self.disk)], capture_output=True, check=True)
        assert image.stat().st_size == IMAGE_BYTES
        report = verify_image(image, self.guest.records)
        assert not report.mismatches
        return report.verified_bytes

    def console(self) -> list[str]:
        return [line.text for line in self.guest.console]

    def line_of(self, words: str) -> int:
        """Which line of the console has *words*."""
        (number,) = [number for number, line in enumerate(self.console()) if words in line]
        return number


def microseconds(guest: DebianGuest, unit: str, what: str) -> int:
    """Since the guest's boot."""
    return int(guest.properties(unit, f"{what}TimestampMonotonic")[f"{what}TimestampMonotonic"])


def oldest_held_s(guest: DebianGuest) -> float:
    """How long the image's oldest request has been held."""
    (image,) = json.loads(guest.run("iohangctl", "--json", "-m", "/mnt/iohang", "list"))
    assert image["held"], f"nothing is held, in an outage: {image}"
    return float(image["oldest-age"])


def complaints(console: Iterable[str]) -> list[str]:
    """Lines of the kernel's and of systemd's that no clean shutdown has."""
    words = re.compile(r"FAILED|Failed to|still around|blocked for more|Call Trace|BUG:")
    return [line.strip() for line in console if words.search(line) and "iohang-mount[" not in line]


def test_a_host_boots_rides_out_an_outage_and_powers_off(tmp_path: Path) -> None:
    """Issue: "the unit and the fstab line come up after the source [...] and shutdown leaves nothing hanging".

    Platform fact 21: the unit is before libvirtd, virtqemud and libvirt-guests, which are started after it, and stopped before it.
    P1, P3: the consumer sees no error, and every acknowledged byte is on the disk, although the kernel calls a page clean whose
    writeback has failed.
    """
    site = Site(tmp_path, site_files("1h", "1h") | users_of_the_mount())
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
    files = site_files(unit_timeout, fstab_timeout, f"TimeoutStopSec=10s\n{on_console}")
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
