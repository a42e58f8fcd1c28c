"""A Debian guest as an administrator sets it up: a source that comes up late, the unit, fstab, and an outage on command.

The source is ext4 on a disk of its own. The outage is the kernel's own: device-mapper's `error` target beneath the blocks of the
images, so that reads and writeback fail with EIO, while the file system's metadata live.
"""

from __future__ import annotations

import json
import re
import subprocess
from typing import TYPE_CHECKING

from contrib.guest.debian.guest import DebianGuest, build
from contrib.guest.debian.image import TREE
from contrib.guest.records import verify_image

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

UNIT = "iohang@mnt-iohang.service"
SOURCE_MOUNT, FSTAB_MOUNT = "srv-vm.mount", "mnt-fstab.mount"
IMAGE_BYTES = 16 << 20
UNITS = "/etc/systemd/system"

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


def site_files(unit_timeout: str, fstab_timeout: str, drop_in: str = "") -> dict[str, str]:
    """The guest as an administrator sets it up, from contrib/systemd: the unit, its drop-in, and the line for fstab.

    Nobody uses the mounts: see `wanted`.
    """

    def shipped(name: str, timeout: str) -> str:
        text = (TREE / "contrib" / "systemd" / name).read_text()
        assert "timeout=5min" in text
        return text.replace("/srv/nfs/vm", "/srv/vm").replace("timeout=5min", f"timeout={timeout},interval=1")

    unit = (TREE / "contrib" / "systemd" / "iohang@.service").read_text()
    wanted_by = re.search(r"^WantedBy=(\S+)$", unit, re.MULTILINE)
    line = re.search(r"^/srv/vm .*$", shipped("fstab", fstab_timeout), re.MULTILINE)
    assert wanted_by is not None
    assert line is not None
    return {
        "/etc/fstab": (
            "/dev/mapper/source /srv/vm ext4 _netdev,x-systemd.requires=source-disk.service,x-systemd.device-timeout=600 0 0\n"
            f"{line[0].replace('/mnt/iohang', '/mnt/fstab')}\n"
        ),
        "/srv/vm/not-mounted-yet": "The directory beneath the source's mount.\n",
        "/mnt/iohang/.keep": "",
        "/mnt/fstab/.keep": "",
        "/usr/local/bin/outage": OUTAGE,
        f"{UNITS}/source-disk.service": SOURCE_DISK,
        f"{UNITS}/iohang@.service": unit,
        f"{UNITS}/{wanted_by[1]}.wants/{UNIT}": "-> ../iohang@.service",  # what `systemctl enable` does
        f"{UNITS}/{UNIT}.d/mount.conf": shipped("mount.conf", unit_timeout) + drop_in,
    }


def wanted(units: Mapping[str, str]) -> dict[str, str]:
    """Units of services by their names, as files, and enabled."""
    return {f"{UNITS}/{name}": text for name, text in units.items()} | {
        f"{UNITS}/multi-user.target.wants/{name}": f"-> ../{name}" for name in units
    }


class Site:
    """A guest with a source disk, and what tests ask of it again and again."""

    def __init__(
        self, folder: Path, files: Mapping[str, str | Path], *, packages: Iterable[str] = (), memory_mib: int = 768
    ) -> None:
        self._folder = folder
        self.disk = folder / "source.img"
        vm = folder / "vm"
        vm.mkdir()
        for name in ("shared.img", "other.img"):
            (vm / name).write_bytes(b"\xa5" * IMAGE_BYTES)  # zeros would be left out, and have no blocks to fail
        with self.disk.open("wb") as disk:
            disk.truncate(64 << 20)
        subprocess.run(["mke2fs", "-q", "-t", "ext4", "-d", str(vm), str(self.disk)], check=True)
        self.guest = DebianGuest(
            build(extra=packages), folder / "guest", disks=[self.disk], files=files, memory_mib=memory_mib
        )

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


def oldest_held_s(guest: DebianGuest) -> float:
    """How long the image's oldest request has been held."""
    (image,) = json.loads(guest.run("iohangctl", "--json", "-m", "/mnt/iohang", "list"))
    assert image["held"], f"nothing is held, in an outage: {image}"
    return float(image["oldest-age"])


def complaints(console: Iterable[str]) -> list[str]:
    """Lines of the kernel's and of systemd's that no clean shutdown has."""
    words = re.compile(r"FAILED|Failed to|still around|blocked for more|Call Trace|BUG:")
    return [line.strip() for line in console if words.search(line) and "iohang-mount[" not in line]
