"""The units of contrib/systemd, as systemd sees them: verified, and run by a systemd of our own (tests/manager.py)."""

from __future__ import annotations

import errno
import mmap
import os
import re
import shutil
import signal
import stat
import subprocess
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.harness import FlakySource, engine_here, wait_until
from tests.manager import Manager

if TYPE_CHECKING:
    from collections.abc import Iterator

UNITS = Path(__file__).parents[2] / "contrib" / "systemd"

NAMESPACES = """
    PrivateTmp PrivateDevices PrivateMounts PrivateIPC PrivateNetwork PrivateUsers ProtectSystem ProtectHome ProtectKernelTunables
    ProtectKernelModules ProtectKernelLogs ProtectControlGroups ProtectProc ProcSubset ReadOnlyPaths ReadWritePaths
    InaccessiblePaths ExecPaths NoExecPaths TemporaryFileSystem BindPaths BindReadOnlyPaths
    RootDirectory RootImage MountImages ExtensionImages
    MountFlags MountAPIVFS LogNamespace DynamicUser IPCNamespacePath NetworkNamespacePath JoinsNamespaceOf
""".split()
"""systemd.exec(5): with one of these a service gets a mount namespace, some of them in newer versions only."""

MOST_EXPOSED = 55
"""What `systemd-analyze security` may say at most, times ten. Nearly all that is left is what a mount namespace would do; 2 are for
CAP_NET_ADMIN, without which a deaf connection of an NFS mount stays deaf."""


def settings(unit: str) -> list[tuple[str, str]]:
    lines = (UNITS / unit).read_text().splitlines()
    return [(key, value) for key, _, value in (line.partition("=") for line in lines if re.match(r"[A-Z]\w*=", line))]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The units by the names that an administrator gives them."""
    shutil.copytree(UNITS, tmp_path / "units")
    (tmp_path / "units/iohang@mnt-iohang.service.d").mkdir()
    shutil.copy(UNITS / "mount.conf", tmp_path / "units/iohang@mnt-iohang.service.d")
    shutil.copy(UNITS / "iohang@.service", tmp_path / "units/iohang@mnt-iohang.service")
    return tmp_path / "units"


def analyze(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["systemd-analyze", "--man=no", *arguments],
        env=os.environ | {"SYSTEMD_UNIT_PATH": f"{folder}:", "SYSTEMD_COLORS": "0"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.mark.parametrize("unit", ["iohang@mnt-iohang.service", "mnt-iohang.mount", "mnt-iohang.automount"])
def test_units_verify(folder: Path, unit: str) -> None:
    """Systemd understands each line of the units: `systemd-analyze verify` has nothing to say."""
    done = analyze(folder, "verify", str(folder / unit))
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_security(folder: Path) -> None:
    """The unit is hardened as far as a mount allows: `systemd-analyze security` stays below its threshold."""
    unit = str(folder / "iohang@mnt-iohang.service")
    done = analyze(folder, "security", "--no-pager", "--offline=yes", f"--threshold={MOST_EXPOSED}", unit)
    assert done.returncode == 0, done.stdout[-200:]


@pytest.mark.parametrize("unit", ["iohang@.service", "mnt-iohang.mount", "mount.conf"])
def test_no_mount_namespace(unit: str) -> None:
    """Platform fact 21: in a unit "no option that makes a mount namespace: the mount would not be seen outside"."""
    found = settings(unit)
    assert found
    assert [key for key, _ in found if key in NAMESPACES] == []


def test_order() -> None:
    """Platform fact 21: the unit is before libvirtd, virtqemud, libvirt-guests, pve-guests and remote-fs.target."""
    for unit in ("iohang@.service", "mnt-iohang.mount"):
        before = " ".join(value for key, value in settings(unit) if key == "Before").split()
        assert {"libvirtd.service", "virtqemud.service", "libvirt-guests.service", "pve-guests.service"} <= {*before}
    assert (
        "remote-fs.target" in " ".join(value for key, value in settings("iohang@.service") if key == "Before").split()
    )


# ---- run by systemd


class House:
    """A source that fails on command, and the unit for a mount of it, under a systemd of our own."""

    def __init__(self, place: Path, options: str, service: str) -> None:
        self.disk, self.source, self.mountpoint = place / "disk", place / "src", place / "mnt"
        self.disk.mkdir()
        self.mountpoint.mkdir()
        (self.disk / "vm.img").write_bytes(b"x" * 65536)
        self.log = place / "server.log"
        self.flaky = FlakySource(self.disk, self.source, place / "trigger", place / "flaky.log")
        escaped = subprocess.run(
            ["systemd-escape", "--path", str(self.mountpoint)], check=True, capture_output=True, text=True
        ).stdout.strip()
        self.unit = f"iohang@{escaped}.service"
        conf = (UNITS / "mount.conf").read_text().replace("/srv/nfs/vm", str(self.source))
        conf, replaced = re.subn("(?m)^Environment=OPTIONS=.*", f"Environment=OPTIONS={options}", conf)
        assert replaced == 1
        self.manager = Manager(
            place,
            {
                "iohang@.service": (UNITS / "iohang@.service").read_text(),
                f"{self.unit}.d/mount.conf": f"{conf}StandardError=append:{self.log}\n{service}\n",
                # What a shutdown does to the unit: a stop that comes with another unit's start.
                "shut.target": f"[Unit]\nDefaultDependencies=no\nConflicts={self.unit}\n",
            },
        )

    def start(self) -> None:
        self.manager.run("systemctl", "start", self.unit)

    def shut_down(self) -> None:
        self.manager.run("systemctl", "start", "--no-block", "shut.target")

    def state(self) -> str:
        return self.manager.show(self.unit, "ActiveState")

    def status(self) -> str:
        return self.manager.show(self.unit, "StatusText")

    def until_status(self, pattern: str) -> str:
        """Wait for it, and what it says."""
        wait_until(lambda: re.search(pattern, self.status()), timeout_s=60, what=f"{pattern} in {self.status()!r}")
        return self.status()

    @property
    def pid(self) -> str:
        """Of the server, in there."""
        return self.manager.show(self.unit, "MainPID")

    @property
    def image(self) -> Path:
        return self.manager.path(self.mountpoint / "vm.img")

    def said(self) -> str:
        return self.log.read_text(errors="replace")


@pytest.fixture
def house(disk_path: Path, request: pytest.FixtureRequest) -> Iterator[House]:
    """Indirect: `options` of the mount, and lines of the unit's [Service] (`service`)."""
    given: dict[str, Any] = getattr(request, "param", {})
    house = House(disk_path, given.get("options", "allow_other,interval=0.2"), given.get("service", ""))
    try:
        with house.manager:
            yield house
            house.flaky.heal()
    finally:
        house.flaky.__exit__()


def has_open(pid: int, name: str) -> bool:
    """Whether the process, or its one child, has a file of that name open."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    links = [link for each in (pid, *children) for link in Path(f"/proc/{each}/fd").iterdir()]
    return any(os.readlink(link).endswith(name) for link in links)


def kill_all(pid: int) -> None:
    for each in (*Path(f"/proc/{pid}/task/{pid}/children").read_text().split(), pid):
        os.kill(int(each), signal.SIGKILL)


def reading(path: Path) -> tuple[threading.Thread, list[object]]:
    """A read past the page cache, in a thread: its bytes, or its errno."""
    got: list[object] = []

    def read() -> None:
        try:
            fd = os.open(path, os.O_RDONLY | os.O_DIRECT)
            buffer = mmap.mmap(-1, 4096)
            try:
                os.readv(fd, [buffer])
                got.append(buffer[:])
            finally:
                os.close(fd)
        except OSError as error:
            got.append(error.errno)

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    return thread, got


def test_ready_when_it_answers_and_status_in_words(house: House) -> None:
    """Issue 5: "Type=notify, READY when serving, STATUS with the hang in words"; umount(8) ends the service in peace."""
    house.start()  # returns with READY=1
    assert house.image.read_bytes()[:1] == b"x"
    assert house.until_status("serving") == f"serving {house.source} at {house.mountpoint}"
    house.flaky.fail("data * errno=EIO")
    thread, got = reading(house.image)
    house.until_status(r"^1 image hangs, since \d\d:\d\d:\d\d: vm.img \(EIO\), 1 request held$")
    assert house.state() == "active"
    house.flaky.heal()
    thread.join(60)
    assert got == [b"x" * 4096]
    house.until_status("^serving ")


def test_umount_ends_the_service(house: House) -> None:
    """umount(8) of a mount that nobody uses ends the unit, without a failure; and it can be started again."""
    for _ in range(2):
        house.start()
        house.manager.run("umount", str(house.mountpoint))
        wait_until(lambda: house.state() == "inactive", timeout_s=60, what="the unit to end")
        assert (house.manager.show(house.unit, "Result"), house.manager.show(house.unit, "ExecMainStatus")) == (
            "success",
            "0",
        )


def test_no_restart_by_hand(house: House) -> None:
    """A restart would take the disks of all running guests away: `systemctl stop` and `restart` are refused."""
    house.start()
    for verb in ("stop", "restart"):
        done = house.manager.run("systemctl", verb, house.unit, check=False)
        assert "refuse" in done.stderr
    assert house.image.read_bytes()[:1] == b"x"


@pytest.mark.parametrize("house", [{"service": "TimeoutStopSec=50"}], indirect=True)
def test_shutdown_unmounts_when_the_last_one_has_left(house: House) -> None:
    """Issue 5: "shutdown leaves nothing hanging": the unit waits for those who use it, says who, and is then done at once."""
    house.start()
    with subprocess.Popen(
        house.manager.entered("tail", "-f", str(house.mountpoint / "vm.img")), stdout=subprocess.DEVNULL
    ) as tail:
        wait_until(lambda: has_open(tail.pid, "/vm.img"), timeout_s=60, what="tail to follow the image")
        house.shut_down()
        house.until_status(r"SIGTERM: \S+ stays mounted, it is in use by tail \(\d+\)")
        assert house.image.read_bytes()[:1] == b"x"
        kill_all(tail.pid)
    wait_until(lambda: house.state() == "inactive", timeout_s=45, what="the end, long before the second signal")
    assert "SIGTERM again" not in house.said()
    assert house.manager.show(house.unit, "Result") == "success"


@pytest.mark.parametrize(
    "house", [{"options": "allow_other,timeout=inf,interval=0.2", "service": "TimeoutStopSec=4"}], indirect=True
)
def test_shutdown_ends_what_is_held_for_ever(house: House) -> None:
    """P8: "SIGTERM and unmount have a defined end, too": the unit's second SIGTERM answers what is held with its error."""
    house.start()
    house.flaky.fail("data * errno=EIO")
    thread, got = reading(house.image)
    house.until_status("1 request held")
    house.shut_down()
    house.until_status("SIGTERM: .*in use by.*; 1 image hangs")
    thread.join(60)
    assert got == [errno.EIO]
    wait_until(lambda: "SIGTERM again" in house.said(), what="the line, which may come after the answer")
    wait_until(lambda: house.state() in {"inactive", "failed"}, timeout_s=60, what="the end")
    assert house.manager.show(house.unit, "Result") == "timeout"
    assert house.status() == f"{house.mountpoint} is unmounted", "it has had its own end, and was not killed"


@pytest.mark.parametrize(
    "house", [{"options": "allow_other,timeout=60,interval=0.2", "service": "TimeoutStopSec=3"}], indirect=True
)
def test_shutdown_waits_for_what_may_still_succeed(house: House) -> None:
    """Issue 5: "EXTEND_TIMEOUT while waiting or draining": what is held keeps its time, P1, though TimeoutStopSec is shorter."""
    house.start()
    house.flaky.fail("data * errno=EIO")
    thread, got = reading(house.image)
    house.until_status("1 request held")
    began = time.monotonic()
    house.shut_down()
    wait_until(lambda: time.monotonic() > began + 12, what="four times TimeoutStopSec")
    assert (got, house.state()) == ([], "deactivating")
    house.flaky.heal()
    thread.join(60)
    assert got == [b"x" * 4096]
    wait_until(lambda: house.state() == "inactive", timeout_s=60, what="the end")
    assert "SIGTERM again" not in house.said()


def test_a_crash_leaves_the_mount_in_the_way(house: House) -> None:
    """Platform fact 19: "After a crash, stay mounted (ENOTCONN) rather than uncover it", and nothing is started above it."""
    house.start()
    house.manager.run("kill", "-KILL", house.pid)
    wait_until(lambda: house.state() == "failed", timeout_s=60, what="systemd to notice")
    with pytest.raises(OSError, match="not connected"):
        house.image.stat()
    done = house.manager.run("systemctl", "start", house.unit, check=False)
    assert done.returncode != 0
    assert "its server is gone; `umount` it first" in house.status()
    house.manager.run("umount", str(house.mountpoint))
    house.start()
    assert house.image.read_bytes()[:1] == b"x"


@pytest.mark.parametrize(
    ("house", "code", "words"),
    [
        ({"service": "Environment=SOURCE=/absent"}, "32", "SOURCE /absent does not exist"),
        # What the unit itself has, where there is no drop-in: "Empty, so that a missing drop-in gets a line that says so".
        ({"service": "Environment=SOURCE= OPTIONS="}, "1", "SOURCE: '' is no path"),
        ({"options": "allow_other,timeot=5"}, "1", "option 'timeot' is unknown; the nearest is 'timeout'"),
    ],
    indirect=["house"],
)
def test_a_start_that_fails_says_why(house: House, code: str, words: str) -> None:
    """Bad input gets one clear line: in the journal and, where the server has got so far, in `systemctl status`."""
    done = house.manager.run("systemctl", "start", house.unit, check=False)
    assert done.returncode != 0
    assert (house.state(), house.manager.show(house.unit, "ExecMainStatus")) == ("failed", code)
    assert house.said().count("\n") == 1
    assert words in house.said()


def test_hardening_hinders_nobody(house: House) -> None:
    """What the unit forbids is not what consumers do: the mount works in it as it does by hand, and with the same engine."""
    house.start()
    inside = house.manager.path(house.mountpoint)
    namespace = house.manager.run("readlink", "/proc/self/ns/mnt").stdout
    for process in (house.pid, "1"):
        assert house.manager.run("readlink", f"/proc/{process}/ns/mnt").stdout == namespace
    assert f"engine {engine_here()}" in house.said()
    assert "Seccomp:\t2" in house.manager.run("cat", f"/proc/{house.pid}/status").stdout
    (inside / "new").write_bytes(b"data")
    (inside / "new").chmod(0o4711)
    assert stat.S_IMODE((house.disk / "new").stat().st_mode) == 0o4711
    os.chown(inside / "new", 65534, 65534)
    os.setxattr(inside / "new", "user.x", b"1")
    os.mkfifo(inside / "fifo")
    os.link(inside / "new", inside / "link")
    os.symlink("new", inside / "symlink")
    os.rename(inside / "link", inside / "renamed")
    os.truncate(inside / "new", 100)
    fd = os.open(inside / "new", os.O_RDWR | os.O_DIRECT)
    os.fsync(fd)
    os.close(fd)
    house.manager.run("su", "-s", "/bin/sh", "nobody", "-c", f"echo more >>{house.mountpoint}/new")
    denied = house.manager.run(
        "su", "-s", "/bin/sh", "nobody", "-c", f"echo more >>{house.mountpoint}/vm.img", check=False
    )
    assert "Permission denied" in denied.stderr
    with pytest.raises(PermissionError):  # said in the unit
        os.mknod(inside / "node", stat.S_IFCHR | 0o600, os.makedev(1, 3))
    assert "a bug in" not in house.said()


# ---- fstab, .mount and .automount


@pytest.fixture
def storage(disk_path: Path) -> Path:
    """A directory with one image; what fstab mounts at `source`, and iohang-mount mirrors at `mnt`."""
    for name in ("disk", "source", "mnt"):
        (disk_path / name).mkdir()
    (disk_path / "disk" / "vm.img").write_bytes(b"x" * 4096)
    return disk_path


def fstab(storage: Path) -> list[str]:
    """contrib/systemd/fstab's three lines: the storage, the mount of it, and the commented one by automount."""
    text = (UNITS / "fstab").read_text().replace("/srv/nfs/vm", f"{storage}/source")
    text = text.replace("/mnt/iohang", f"{storage}/mnt").replace("nfs.example:/vm", f"{storage}/disk")
    lines = [line.removeprefix("#") for line in text.splitlines() if len(line.split()) == 6 and "  0  0" in line]
    assert len(lines) == 3
    lines[0] = f"{storage}/disk {storage}/source none bind,_netdev 0 0"  # there is no NFS server
    return lines


def escaped(path: Path, suffix: str) -> str:
    command = ["systemd-escape", "--path", f"--suffix={suffix}", str(path)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def type_at(manager: Manager, path: Path) -> str:
    return manager.run("findmnt", "-rno", "FSTYPE,SOURCE", str(path), check=False).stdout.strip()


def test_fstab_at_boot_and_shutdown(storage: Path) -> None:
    """Platform fact 20: "fstab needs both `_netdev` and `x-systemd.requires-mounts-for=SOURCE`": after SOURCE."""
    source, mount, _ = fstab(storage)
    with Manager(storage, {}, f"{mount}\n{source}\n") as manager:
        manager.run("systemctl", "start", "remote-fs.target")
        assert type_at(manager, storage / "mnt") == f"fuse.iohang-mount {storage}/source"
        assert manager.path(storage / "mnt/vm.img").read_bytes() == b"x" * 4096
        for _ in range(2):
            manager.run("mount", "-a")
            assert type_at(manager, storage / "mnt").count("fuse.iohang-mount") == 1
        manager.run("systemctl", "stop", escaped(storage / "source", "mount"))
        assert type_at(manager, storage / "mnt") == type_at(manager, storage / "source") == ""
        assert manager.show(escaped(storage / "mnt", "mount"), "Result") == "success"


def units(storage: Path) -> dict[str, str]:
    """contrib/systemd's .mount and .automount, for the mount point there."""
    found = {}
    for suffix in ("mount", "automount"):
        text = (UNITS / f"mnt-iohang.{suffix}").read_text().replace("/srv/nfs/vm", f"{storage}/source")
        found[escaped(storage / "mnt", suffix)] = text.replace("/mnt/iohang", f"{storage}/mnt")
    return found


@pytest.mark.parametrize("way", ["fstab", "units"])
def test_automount(storage: Path, way: str) -> None:
    """Platform fact 19: "Never open or list the mount point before mounting (automount)": the first use gets its answer."""
    source, _, automount = fstab(storage)
    lines = [source, automount] if way == "fstab" else [source]
    with Manager(storage, units(storage) if way == "units" else {}, "\n".join(lines) + "\n") as manager:
        manager.run("systemctl", "start", escaped(storage / "mnt", "automount"))
        assert type_at(manager, storage / "mnt").startswith("autofs ")
        assert manager.run("cat", f"{storage}/mnt/vm.img").stdout == "x" * 4096
        assert type_at(manager, storage / "mnt").endswith(f"fuse.iohang-mount {storage}/source")
        assert type_at(manager, storage / "source") != "", "SOURCE came first"
        if way == "units":
            assert manager.show(escaped(storage / "mnt", "mount"), "OOMScoreAdjust") == "-900"
        manager.run("umount", f"{storage}/mnt")
        assert manager.run("cat", f"{storage}/mnt/vm.img").stdout == "x" * 4096, "and the next use mounts again"
