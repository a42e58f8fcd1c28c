"""A systemd of our own for tests: the real one, as PID 1 of new namespaces, with units of our own and none of the host's.

What is mounted in there is not seen outside, /run is empty, and the host's cgroups get one more beneath their root, which goes
away. Files are looked at from outside through `Manager.path`.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Self

from tests.harness import wait_until

if TYPE_CHECKING:
    from collections.abc import Mapping

BIN = Path(sys.executable).parent

TARGETS = (
    "sysinit basic shutdown umount local-fs local-fs-pre remote-fs remote-fs-pre network-online nss-user-lookup"
).split()
"""What systemd and our units refer to; empty here."""

PROGRAMS = ("iohang-mount", "mount.iohang", "umount.fuse.iohang-mount")

BOOT = r"""
set -eu
place=$1 cgroup=$2
mount --make-rprivate /
# A copy of somebody's mount would keep it in use after he has unmounted it.
awk -v place="${place%/*}/" '/ - fuse/ && index($5, place) != 1 { print $5 }' /proc/self/mountinfo |
    while read -r point; do umount -l "$point"; done
# Pure cgroup2 whatever the host has, and its root is what is ours.
mount -t cgroup2 cgroup2 /sys/fs/cgroup
mkdir -p "/sys/fs/cgroup/$cgroup"
echo $$ >"/sys/fs/cgroup/$cgroup/cgroup.procs"
exec unshare --cgroup --pid --uts --fork --kill-child sh -euc '
    umount /sys/fs/cgroup
    mount -t cgroup2 cgroup2 /sys/fs/cgroup
    mount -t proc proc /proc
    mount --bind /proc/sys /proc/sys
    mount -o remount,bind,ro /proc/sys  # systemd raises limits of the machine; these are not its machine
    mount -t tmpfs tmpfs /run
    mkdir -p /run/systemd/system /run/lock
    # mount(8) looks in no other place for a helper, and these are to be ours, whatever is installed.
    mount -t overlay overlay -o "lowerdir=$1/bin:/usr/sbin" /usr/sbin
    mount -t overlay overlay -o "lowerdir=$1/bin:/usr/bin" /usr/bin
    mount --bind "$1/fstab" /etc/fstab
    mount --bind "$1/machine-id" /etc/machine-id
    mount --bind "$1/units" /lib/systemd/system
    mount -t tmpfs tmpfs /etc/systemd/system
    mount --bind "$1/generators" /lib/systemd/system-generators
    export container=lxc
    exec /lib/systemd/systemd --system --unit=basic.target --log-target=console --log-level=info --show-status=no
' sh "$place"
"""


class Manager:
    """Boots on entry, dies on exit, and everything in it with it."""

    def __init__(self, place: Path, units: Mapping[str, str], fstab: str = "") -> None:
        """*units*: by name or `NAME.d/PART.conf`, their text. What is mounted in *place* by now is in there, too."""
        self._cgroup = f"iohang-test-{place.name}"
        self._place = place = place / "manager"
        texts = {f"{name}.target": "[Unit]\nDefaultDependencies=no\n" for name in TARGETS} | dict(units)
        for name, text in texts.items():
            path = place / "units" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        (place / "bin").mkdir(parents=True)
        for program in PROGRAMS:
            shutil.copy(BIN / program, place / "bin")
        (place / "generators").mkdir()
        shutil.copy("/lib/systemd/system-generators/systemd-fstab-generator", place / "generators")
        (place / "fstab").write_text(fstab)
        (place / "machine-id").write_text("0123456789abcdef0123456789abcdef\n")
        self._log = place / "systemd.log"

    def __enter__(self) -> Self:
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                ["unshare", "--mount", "sh", "-c", BOOT, "sh", str(self._place), self._cgroup],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        try:
            wait_until(self._is_up, timeout_s=60, what="systemd to boot")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()  # and with it PID 1, and with that all that is in there
        self._process.wait()
        # From the host's side: its cgroup2 may be mounted anywhere, or nowhere.
        wait_until(self._is_gone, timeout_s=60, what="the cgroups to be empty")

    def _is_gone(self) -> bool:
        script = (
            "mount -t cgroup2 cgroup2 /sys/fs/cgroup && cd /sys/fs/cgroup && "
            f"if [ -d {self._cgroup} ]; then find {self._cgroup} -depth -type d -exec rmdir {{}} +; fi"
        )
        return (
            subprocess.run(["unshare", "--mount", "sh", "-c", script], check=False, capture_output=True).returncode == 0
        )

    @property
    def _pid(self) -> int:
        """Of its PID 1, as seen from outside."""
        return int(Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children").read_text().split()[0])

    def _is_up(self) -> bool:
        assert self._process.poll() is None, self._log.read_text()
        try:
            done = self.run("systemctl", "is-active", "basic.target", check=False)
        except (OSError, IndexError):
            return False
        return done.stdout.strip() == "active"

    def run(self, *command: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """A command in there."""
        done = subprocess.run(self.entered(*command), capture_output=True, text=True, timeout=120, check=False)
        if check and done.returncode:
            raise AssertionError(f"{command}: {done.stdout}{done.stderr}")
        return done

    def entered(self, *command: str) -> list[str]:
        """The command that runs *command* in there, as a child."""
        return ["nsenter", "-t", str(self._pid), "-m", "-p", "-C", "-u", *command]

    def show(self, unit: str, name: str) -> str:
        """A property of a unit."""
        return self.run("systemctl", "show", "-P", name, unit).stdout.strip()

    def path(self, path: Path) -> Path:
        """The same path as it is in there."""
        return Path(f"/proc/{self._pid}/root{path}")
