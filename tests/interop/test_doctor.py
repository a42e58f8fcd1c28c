"""`iohangctl doctor` and `iohang-mount --check` on real mounts: one that is fine, one whose source is missing, dead ones."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from qemu.qmp import QMPClient

from iohang_fuse.config import load, socket_of
from iohang_fuse.doctor import survey
from iohang_fuse.presence import mount_table
from tests.harness import FlakySource, Mount, engine_here, mounted_at, wait_until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

CTL = [sys.executable, "-c", "import sys; from iohang_fuse.ctl import main; sys.exit(main())"]
MOUNT = [sys.executable, "-m", "iohang_fuse.cli"]
OF_THIS_HOST = {"memory", "hung tasks", "engine", "limits"}
"""What depends on the machine that runs the tests, and is judged by the tests of the pure part (tests/core/test_doctor.py)."""
EXIT_CODES = {"ok": 0, "advice": 0, "warning": 1, "problem": 2}


class Place:
    """Directories for a source and a mount, and an fstab of their own."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.source, self.mountpoint, self.fstab = path / "src", path / "mnt", path / "fstab"
        for directory in (path / "real", self.source, self.mountpoint):
            directory.mkdir()
        self.fstab.write_text("")
        self._mounts = 0
        self.findings: list[dict[str, str]] = []  # of the last question

    def run(self, *words: object) -> subprocess.CompletedProcess[str]:
        command = [*map(str, words)]
        return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)

    def doctor(self) -> tuple[int, dict[str, dict[str, str]]]:
        """The exit code, as it would be but for what is wrong with this host, and the worst finding about each thing."""
        return self._found(self.run(*CTL, "--json", "doctor", self.mountpoint))

    def check(self, *options: object) -> tuple[int, dict[str, dict[str, str]]]:
        return self._found(self.run(*MOUNT, "--check", "--json", self.source, self.mountpoint, *options))

    def _found(self, done: subprocess.CompletedProcess[str]) -> tuple[int, dict[str, dict[str, str]]]:
        assert done.stderr == ""
        said: dict[str, Any] = json.loads(done.stdout)
        assert said["mountpoint"] == str(self.mountpoint)
        self.findings = said["findings"]
        worst_last = sorted(self.findings, key=lambda each: [*EXIT_CODES].index(each["level"]))
        assert done.returncode == EXIT_CODES[worst_last[-1]["level"]] == EXIT_CODES[said["worst"]]
        code = max(EXIT_CODES[each["level"]] for each in worst_last if each["about"] not in OF_THIS_HOST)
        return code, {each["about"]: each for each in worst_last}

    def mount(self, *options: str) -> Mount:
        self._mounts += 1
        return Mount(self.source, self.mountpoint, *options, log=self.path / f"mnt-{self._mounts}.log")

    def flaky(self) -> FlakySource:
        return FlakySource(self.path / "real", self.source, self.path / "trigger", self.path / "flaky.log")


async def ask(monitor: Path, command: str) -> Any:
    client = QMPClient("test")
    await client.connect(str(monitor))
    try:
        return await client.execute(command)
    finally:
        await client.disconnect()


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    monkeypatch.setenv("LIBMOUNT_FSTAB", str(tmp_path / "fstab"))
    yield Place(tmp_path)
    for name in ("mnt", "src"):
        while mounted_at(tmp_path / name):
            subprocess.run(["umount", "-l", str(tmp_path / name)], check=True)


def test_a_mount_that_is_fine(place: Place) -> None:
    """Exit code 0: nothing worse than advice. In words, too, for the one mount that there is or that is named."""
    (place.source / "a.img").write_bytes(bytes(4096))
    with place.mount("allow_other"):
        code, found = place.doctor()
        assert code == 0, found
        assert {about for about, each in found.items() if each["level"] != "ok"} - OF_THIS_HOST == {"guests"}
        assert found["max_background"]["seen"] == "4096 is in force"
        assert found["engine"]["seen"].split(":")[0] == engine_here()
        assert {*found} >= OF_THIS_HOST - {"memory"}, "which is looked at in any case"
        words = place.run(*CTL, "-m", place.mountpoint, "doctor")
        lines = words.stdout.splitlines()
        assert lines[0] == f"{place.source} at {place.mountpoint}"
        assert "ok      max_background: 4096 is in force" in lines
        counted = re.fullmatch(r"(\d+) problems?, (\d+) warnings?, (\d+) of advice, (\d+) ok", lines[-1])
        assert counted is not None
        problems, warnings, advice, fine = map(int, counted.groups())
        assert (advice >= 1, fine >= 3) == (True, True), "guests; source, max_background, monitor, users"
        assert words.returncode == (2 if problems else 1 if warnings else 0)


def test_what_is_in_force_is_judged_not_what_was_asked_for(place: Place) -> None:
    """max_background in force, as the kernel has it; and timeouts as `iohangctl set` has left them."""
    (place.source / "a.img").write_bytes(bytes(4096))
    with place.mount("allow_other", "timeout=10") as mount:
        assert place.doctor()[1]["guests"]["level"] == "ok"
        assert place.run(*CTL, "-m", place.mountpoint, "set", "timeout=inf").returncode == 0
        minor = next(each.device_minor for each in mount_table() if each.mountpoint == str(mount.mountpoint))
        with open(f"/sys/fs/fuse/connections/{minor}/max_background", "w") as setting:
            setting.write("12\n")
        code, found = place.doctor()
        assert code == 1
        assert "a request may wait for ever" in found["guests"]["seen"]
        assert found["max_background"]["seen"] == "4096 is asked for, and 12 is in force"
        assert place.run(*CTL, "-m", place.mountpoint, "pause").returncode == 0
        assert place.doctor()[1]["holding"]["level"] == "warning"


def test_the_monitor_tells_the_settings_that_the_mount_was_given(place: Place) -> None:
    """`query-settings`: the options in force, each as config.py understands it."""
    options = (
        "allow_other,timeout=5min,read_timeout=inf,interval=2,errors=EIO:ENOSPC,timeout_errno=ENOSPC,held_limit=2G,write_log=8M,"
        "max_background=100,engine=threads,direct=never,blocked_after=3"
    )
    with place.mount(options):
        told = asyncio.run(ask(socket_of(place.mountpoint), "query-settings"))
        settings = survey.settings_of(load(place.source, place.mountpoint, [options]))
        assert survey.settings_told(told) == replace(settings, errors=settings.errors | {"EAGAIN"})
        assert (told["recovery-gate"], told["attr-timeout"]) == (4, 1)


def test_a_source_whose_mount_has_not_come(place: Place) -> None:
    """Issue: "whether SOURCE is really mounted (an empty directory under an NFS mount point!)"."""
    place.fstab.write_text(f"images {place.source} tmpfs defaults 0 0\n")
    with place.mount("allow_other"):
        code, found = place.doctor()
        assert code == 2
        assert "where /etc/fstab mounts images, and nothing is mounted there" in found["source"]["seen"]
        assert f"mount {place.source}" in found["source"]["do"]
        log = "is not mounted: what is served is the directory beneath"
        wait_until(lambda: log in (place.path / "mnt-1.log").read_text(), 20, "the log's warning")
        subprocess.run(["mount", "-T", str(place.fstab), str(place.source)], check=True)
        code, found = place.doctor()
        assert code == 2
        assert f"tmpfs images has been mounted over it at {place.source}" in found["source"]["seen"]
        subprocess.run(["umount", str(place.source)], check=True)
    assert place.check()[0] == 2
    subprocess.run(["mount", "-T", str(place.fstab), str(place.source)], check=True)
    with place.mount("allow_other"):
        code, found = place.doctor()
        assert code == 0, found
        assert found["source"]["seen"].endswith(f"on tmpfs images mounted at {place.source}, as /etc/fstab says")


@pytest.fixture
def on_root() -> Iterator[Path]:
    """An empty directory on the root file system, on which neither /tmp nor /var/tmp need be."""
    device = os.stat("/").st_dev
    above = next(each for each in ("/var/tmp", "/var/lib", "/root", "/") if os.stat(each).st_dev == device)
    with tempfile.TemporaryDirectory(prefix="iohang-test-", dir=above) as made:
        yield Path(made)


def test_an_empty_directory_on_the_root_file_system(place: Place, on_root: Path) -> None:
    """What is suspicious and no more is said so: a warning."""
    place.source = on_root
    code, found = place.check()
    assert (code, found["source"]["level"]) == (1, "warning")
    (on_root / "a.img").touch()
    assert place.check()[1]["source"]["level"] == "ok"


def test_it_answers_while_the_source_hangs(place: Place) -> None:
    """Works while the storage is dead: says that SOURCE does not answer, and everything else; nothing waits for it at the end."""
    with place.flaky() as flaky, place.mount("allow_other"):
        flaky.fail("* * hang")
        try:
            begin_s = time.monotonic()
            for code, found in (place.doctor(), place.check("-o", "monitor=none")):
                assert code == 2
                assert (found["source"]["level"], found["source"]["seen"]) == (
                    "problem",
                    f"{place.source} does not answer",
                )
                assert found["source type"]["seen"].startswith("fuse")
            assert time.monotonic() - begin_s < 60
        finally:
            flaky.heal()
        wait_until(lambda: place.doctor()[1]["source"]["level"] == "ok", 60, "SOURCE to answer again")


def test_a_server_that_is_gone(place: Place) -> None:
    """A stuck one does not answer, a killed one leaves its mount and its socket; its options are then those of /etc/fstab."""
    (place.source / "a.img").touch()
    line = (
        f"{place.source} {place.mountpoint} iohang allow_other,timeout=15,x-systemd.requires-mounts-for={place.source}"
    )
    place.fstab.write_text(f"{line}\n")
    mount = place.mount("allow_other")
    mount.process.send_signal(signal.SIGSTOP)
    code, found = place.doctor()
    assert (code, found["monitor"]["level"]) == (2, "problem")
    assert "the server is stuck" in found["monitor"]["seen"]
    mount.process.kill()
    mount.process.wait()
    code, found = place.doctor()
    assert code == 2
    assert found["monitor"]["level"] == "problem"
    assert "its server is gone" in found["monitor"]["seen"]
    assert found["settings"]["seen"].endswith("judged by its line in /etc/fstab")
    assert "a request may wait up to 15 s" in found["guests"]["seen"]


def test_what_is_no_mount_is_unknown(place: Place) -> None:
    """Exit code 3, as `check` has it, and one line that says what to do."""
    done = place.run(*CTL, "doctor", place.mountpoint)
    assert (done.returncode, done.stdout) == (3, "")
    assert done.stderr == (
        f"iohangctl: {place.mountpoint} is no mount of iohang-fuse; before mounting, say iohang-mount --check SOURCE "
        f"{place.mountpoint}\n"
    )
    done = place.run(*CTL, "-s", place.path / "none.sock", "doctor")
    assert (done.returncode, done.stderr.count("\n")) == (3, 1)
    assert "No such file" in done.stderr
    assert place.run(*CTL, "doctor", "--frob").returncode == 3
    done = place.run(*CTL, "-m", "/mnt/a", "doctor", "/mnt/b")
    assert (done.returncode, done.stderr) == (
        3,
        "iohangctl: -m /mnt/a and /mnt/b are different mounts; say one of them\n",
    )


def test_check_mounts_nothing(place: Place) -> None:
    """`iohang-mount --check`: the same findings before mounting; exit codes 0 to 3."""
    (place.source / "a.img").touch()
    assert place.check("-o", "allow_other")[0] == 0
    assert not mounted_at(place.mountpoint)
    assert place.check("-o", "timeout=0")[0] == 1
    place.check("-o", "allow_other,interval=10,timeout=5")
    limits = [each for each in place.findings if each["about"] == "limits"]
    assert [each["level"] for each in limits if "interval is 10 s and timeout 5 s" in each["seen"]] == ["warning"]
    wrong = place.run(*MOUNT, "--check", place.source, place.mountpoint, "-o", "timeot=5")
    assert (wrong.returncode, wrong.stdout) == (3, "")
    assert "the nearest is 'timeout'" in wrong.stderr
    assert place.run(*MOUNT, "--check", place.source).returncode == 3
    place.mountpoint.rmdir()
    code, found = place.check("-o", "allow_other")
    assert (code, found["mount"]["seen"]) == (2, f"MOUNTPOINT {place.mountpoint} does not exist; make it with mkdir(1)")
    place.mountpoint.mkdir()
    place.source = place.path / "absent"
    code, found = place.check("-o", "allow_other")
    assert (code, found["source"]["level"]) == (2, "problem")
    assert found["source"]["seen"].startswith(f"SOURCE {place.source} does not exist")


def test_check_meets_a_monitor_that_is_there_already(place: Place) -> None:
    """Two mount points may have the same socket's name; one that a dead server has left is no obstacle."""
    with place.mount("allow_other", f"monitor={place.path}/m.sock") as mount:
        (place.path / "mnt2").mkdir()
        place.mountpoint = place.path / "mnt2"
        assert place.check("-o", f"allow_other,monitor={place.path}/m.sock")[1]["monitor"]["level"] == "warning"
        mount.process.kill()
        mount.process.wait()
        assert place.check("-o", f"allow_other,monitor={place.path}/m.sock")[1]["monitor"]["level"] == "ok"


def test_a_running_qemu_is_seen(place: Place, program: Callable[[str, str], str]) -> None:
    """QEMU's werror and rerror, from the command line of one that has a disk on the mount."""
    (place.source / "a.img").write_bytes(bytes(1 << 20))
    qemu = program("qemu-system-x86_64", "qemu-system-x86")
    drive = f"file={place.mountpoint}/a.img,format=raw,if=none,id=d0,werror=stop"
    words = ["-machine", "none", "-S", "-display", "none", "-monitor", "none", "-serial", "none", "-name", "vm1"]
    with place.mount("allow_other"), subprocess.Popen([qemu, *words, "-drive", drive]) as process:
        try:
            wait_until(lambda: "QEMU vm1" in place.doctor()[1], 60, "QEMU in /proc")
            found = place.doctor()[1]["QEMU vm1"]
            assert found["seen"] == f"{place.mountpoint}/a.img: werror=stop, rerror=report"
            assert found["level"] == "advice"
        finally:
            process.kill()
            process.wait()
