"""mount(8), umount(8), findmnt(8) and df(1) with this file system: the helpers to the letter.

The programs are those of this tree, whatever is installed: each test has a mount namespace in which they lie over /usr/bin and
/usr/sbin.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.harness import wait_until
from tests.manager import PROGRAMS

if TYPE_CHECKING:
    from collections.abc import Iterator

TYPE = "fuse.iohang-mount"
NO_SYSLOG = (
    "iohang-mount: there is neither a journal nor a syslog here (/dev/log): messages will be lost; use -o log=FILE\n"
)
"""Said in containers."""

ROOM = """
set -eu
mount --make-rprivate /
for place in /usr/bin /usr/sbin; do mount -t overlay overlay -o "lowerdir=$1:$place" $place; done
echo ready
exec sleep infinity
"""


class Room:
    """A mount namespace with SOURCE, MOUNTPOINT and our programs."""

    def __init__(self, place: Path) -> None:
        self.source, self.mountpoint, self.place = place / "src", place / "mnt", place
        for folder in (self.source, self.mountpoint, place / "bin"):
            folder.mkdir()
        (self.source / "file").write_text("content")
        for program in PROGRAMS:
            shutil.copy(Path(sys.executable).parent / program, place / "bin")
        self._process = subprocess.Popen(
            ["unshare", "--mount", "sh", "-c", ROOM, "sh", str(place / "bin")], stdout=subprocess.PIPE
        )
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == b"ready\n"

    def close(self) -> None:
        self.run("umount", "-l", self.mountpoint)
        self._process.kill()
        self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()

    def run(self, *command: object) -> subprocess.CompletedProcess[str]:
        """In there."""
        done = subprocess.run(self.entered(*command), capture_output=True, text=True, timeout=60, check=False)
        done.stderr = done.stderr.replace(NO_SYSLOG, "")
        return done

    def entered(self, *command: object) -> list[str]:
        """The command that does."""
        return ["nsenter", "-t", str(self._process.pid), "-m", *map(str, command)]

    def mount(self, *arguments: object) -> None:
        done = self.run("mount", *arguments)
        assert (done.returncode, done.stderr) == (0, ""), done.stderr

    def mounted(self) -> list[str]:
        """Sources and types at MOUNTPOINT, from the mount table alone."""
        return self.run("findmnt", "-rno", "SOURCE,FSTYPE", "-M", self.mountpoint).stdout.splitlines()

    def inside(self, name: str = "file") -> Path:
        return Path(f"/proc/{self._process.pid}/root{self.mountpoint}") / name

    def servers(self) -> list[int]:
        """Who was started for MOUNTPOINT and has /dev/fuse open."""
        found = []
        for process in Path("/proc").glob("[0-9]*"):
            try:
                if os.fsencode(self.mountpoint) in (process / "cmdline").read_bytes().split(b"\0") and any(
                    os.readlink(fd) == "/dev/fuse" for fd in (process / "fd").iterdir()
                ):
                    found.append(int(process.name))
            except OSError:
                continue
        return found


@pytest.fixture
def room(tmp_path: Path) -> Iterator[Room]:
    room = Room(tmp_path)
    yield room
    room.close()


TYPES = {
    "iohang": ["-t", "iohang", "{source}"],
    "fuse.iohang-mount": ["-t", "fuse.iohang-mount", "{source}"],
    "fuse": ["-t", "fuse", "iohang-mount#{source}"],
}


def words(room: Room, kind: str) -> list[str]:
    return [*(word.format(source=room.source) for word in TYPES[kind]), str(room.mountpoint)]


@pytest.mark.parametrize("kind", TYPES)
def test_mount_shown_and_unmounted(room: Room, kind: str) -> None:
    """Issue 5: `mount`, "`findmnt` and `df` show sensible names"; and after umount(8) SOURCE is free at once."""
    room.mount(*words(room, kind), "-o", "timeout=90,_netdev")
    assert room.inside().read_text() == "content"
    assert room.mounted() == [f"{room.source} {TYPE}"]
    shown = room.run("df", "--output=source,fstype,target", room.mountpoint).stdout.splitlines()[1]
    assert shown.split() == [str(room.source), TYPE, str(room.mountpoint)]
    assert re.search(rf"^{room.source} on {room.mountpoint} type {TYPE} \(rw,", room.run("mount").stdout, re.MULTILINE)
    assert len(room.servers()) == 1
    done = room.run("umount", room.mountpoint)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert room.servers() == [], "it has ended by now, and not soon: whoever unmounts SOURCE next would find it busy"


WORDS = "rw,auto,noauto,nofail,_netdev,user,nouser,users,owner,group,defaults,comment=x,x-systemd.automount,X-mount.mkdir,relatime"


@pytest.mark.parametrize("kind", TYPES)
def test_words_for_others_are_dropped(room: Room, kind: str) -> None:
    """Section 6: "Ordinary mount words (...) are passed on or dropped as mount(8) helpers do"."""
    room.mount(*words(room, kind), "-o", WORDS + ",x-systemd.requires-mounts-for=/srv")
    assert room.mounted() == [f"{room.source} {TYPE}"]


@pytest.mark.parametrize("kind", ["iohang", "fuse.iohang-mount"])
@pytest.mark.parametrize("spelling", ["{0}", "{0}/", "{1}"])
def test_mount_a_twice(room: Room, kind: str, spelling: str) -> None:
    """Platform fact 19: "`fsname=` must equal the fstab source, or `mount -a` mounts twice", also by a symlink and with a `/`."""
    link = room.place / "link"
    link.symlink_to(room.source)
    fstab = room.place / "fstab"
    fstab.write_text(f"{spelling.format(room.source, link)} {room.mountpoint} {kind} timeout=90,_netdev,nofail 0 0\n")
    room.mount("-T", fstab, "-a")
    before = room.servers()
    room.mount("-T", fstab, "-a")
    assert len(room.mounted()) == 1
    assert room.servers() == before
    assert room.inside().read_text() == "content"


@pytest.mark.parametrize("kind", TYPES)
def test_remount_is_refused(room: Room, kind: str) -> None:
    """Issue 5: "`mount -o remount` refused with a reason", and the mount goes on as it was."""
    room.mount(*words(room, kind))
    for arguments in (["-o", "remount,ro", room.mountpoint], [*words(room, kind), "-o", "remount,timeout=5"]):
        done = room.run("mount", *arguments)
        assert done.returncode == 32
        assert (
            done.stderr
            == "iohang-mount: option remount: this file system cannot be remounted; unmount and mount again\n"
        )
    assert room.mounted() == [f"{room.source} {TYPE}"]
    assert room.inside().read_text() == "content"


def test_fake(room: Room) -> None:
    """mount(8)'s `-f`: everything is checked, and nothing is mounted."""
    room.mount("-f", *words(room, "iohang"))
    assert room.mounted() == []
    done = room.run("mount", "-f", "-t", "iohang", room.place / "absent", room.mountpoint)
    assert done.returncode == 32
    assert done.stderr == f"iohang-mount: SOURCE {room.place}/absent does not exist; name the directory of the images\n"


@pytest.mark.parametrize("kind", ["iohang"])
def test_sloppy(room: Room, kind: str) -> None:
    """mount(8)'s `-s`: "Tolerate sloppy mount options rather than failing"; without it an unknown word is one line and code 1."""
    done = room.run("mount", *words(room, kind), "-o", "frob=1")
    assert (done.returncode, done.stderr) == (1, "iohang-mount: option 'frob' is unknown; the nearest is 'ro'\n")
    assert room.mounted() == []
    done = room.run("mount", "-s", "-n", "-v", *words(room, kind), "-o", "frob=1")
    assert (done.returncode, done.stderr) == (0, "iohang-mount: warning: option 'frob' is unknown, and ignored\n")
    assert room.mounted() == [f"{room.source} {TYPE}"]


def test_another_namespace_is_refused(room: Room) -> None:
    """mount(8)'s `-N` is understood and refused, with what to do instead."""
    done = room.run("mount", "-N", "/proc/self/ns/mnt", *words(room, "iohang"))
    assert done.returncode == 1
    assert (
        done.stderr
        == "iohang-mount: -N: other mount namespaces are not supported; enter it first, with nsenter --mount\n"
    )
    assert room.mounted() == []


@pytest.mark.parametrize("word", ["_netdev", "rw"], ids=["our helper", "umount alone"])
def test_umount_of_a_mount_in_use(room: Room, word: str) -> None:
    """umount(8) as everywhere: busy is code 32 with a line; `-l` detaches at once; and both ways say the same."""
    room.mount(*words(room, "iohang"), "-o", word)
    with room.inside().open() as file:
        done = room.run("umount", room.mountpoint)
        assert (done.returncode, done.stderr) == (32, f"umount: {room.mountpoint}: target is busy.\n")
        assert room.inside().read_text() == "content"
        done = room.run("umount", "-l", room.mountpoint)
        assert (done.returncode, done.stderr) == (0, "")
        assert room.mounted() == []
        assert file.read() == "content"
    wait_until(lambda: room.servers() == [], timeout_s=60, what="the server to end with the last user")
    done = room.run("umount", room.mountpoint)
    assert done.returncode == 32
    assert "not mounted" in done.stderr


def test_umount_says_who_goes_on(room: Room) -> None:
    """A copy of the mount elsewhere keeps the server: umount(8) waits for ten seconds, says so, and has succeeded."""
    copy = room.place / "copy"
    copy.mkdir()
    room.mount(*words(room, "iohang"), "-o", "_netdev")
    room.mount("--bind", room.mountpoint, copy)
    (server,) = room.servers()
    done = room.run("umount", room.mountpoint)
    assert done.returncode == 0
    assert f"{room.mountpoint} is unmounted, its server ({server}) goes on" in done.stderr
    assert room.run("cat", copy / "file").stdout == "content"
    assert room.run("umount", copy).returncode == 0


def test_the_mount_point_is_not_opened(room: Room) -> None:
    """Platform fact 19: "Never open or list the mount point before mounting (automount)"."""
    trace = room.place / "trace"
    tracing = [
        "strace",
        "-f",
        "-qq",
        "-o",
        trace,
        "-e",
        "trace=%file,getdents64,fchdir",
        "mount",
        *words(room, "iohang"),
    ]
    with subprocess.Popen(room.entered(*tracing), stderr=subprocess.DEVNULL) as strace:
        wait_until(room.mounted, timeout_s=60, what="the mount")
        wait_until(lambda: room.run("umount", room.mountpoint).returncode == 0, timeout_s=60, what="an unmount")
        assert strace.wait(60) == 0
    calls = [re.sub(r"^\d+ +", "", line) for line in trace.read_text().splitlines() if f'"{room.mountpoint}' in line]
    mounting = next(n for n, call in enumerate(calls) if call.startswith("mount("))
    assert {call.partition("(")[0] for call in calls[:mounting]} == {"readlink", "newfstatat"}
