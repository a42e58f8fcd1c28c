"""`iohang-mount` as administrators use it: by hand, through mount(8), from fstab; and how a mount ends."""

from __future__ import annotations

import contextlib
import os
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.harness import FlakySource, Mount, mounted_at, wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator

TYPE = "fuse.iohang-mount"


@pytest.fixture
def paths(tmp_path: Path) -> Iterator[tuple[Path, Path]]:
    """SOURCE with one file in it, and MOUNTPOINT; whatever is mounted there in the end is unmounted."""
    source, mountpoint = tmp_path / "src", tmp_path / "mnt"
    source.mkdir()
    mountpoint.mkdir()
    (source / "file").write_text("content")
    yield source, mountpoint
    while mounted_at(mountpoint):
        subprocess.run(["umount", "-l", str(mountpoint)], check=True)


@pytest.fixture(scope="session")
def programs() -> None:
    """mount(8) finds programs in a short PATH: contrib/setup has put links there."""
    for program in ("/usr/bin/iohang-mount", "/sbin/mount.iohang"):
        assert Path(program).exists(), f"{program} is missing; run contrib/setup --test"


def iohang_mount(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "iohang_fuse.cli", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )


def server_of(mountpoint: Path) -> int:
    """The pid of the process that serves *mountpoint*, from its command line."""
    for process in Path("/proc").iterdir():
        if process.name.isdigit():
            try:
                words = (process / "cmdline").read_bytes().split(b"\0")
            except OSError:
                continue
            if os.fsencode(mountpoint) in words and any(b"iohang" in word for word in words):
                return int(process.name)
    raise AssertionError(f"nobody serves {mountpoint}")


def test_background(paths: tuple[Path, Path], tmp_path: Path) -> None:
    """Section 6: "In the background by default; the parent exits 0 only when the mount serves"."""
    source, mountpoint = paths
    done = iohang_mount(source, mountpoint, "-o", f"log={tmp_path}/log")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert (mountpoint / "file").read_text() == "content"
    assert mounted_at(mountpoint)[-1] == TYPE
    assert "is served at" in (tmp_path / "log").read_text()
    pid = server_of(mountpoint)
    assert os.getsid(pid) == pid, "in a session of its own: no terminal's hang-up reaches it"
    for fd in (0, 1, 2):
        assert os.readlink(f"/proc/{pid}/fd/{fd}") == "/dev/null", "or `ssh host iohang-mount ...` would not return"
    subprocess.run(["umount", str(mountpoint)], check=True)
    wait_until(lambda: not Path(f"/proc/{pid}").exists(), what="the server to end after umount(8)")
    assert "is unmounted" in (tmp_path / "log").read_text()


def test_background_keeps_nothing_of_its_caller(paths: tuple[Path, Path], tmp_path: Path) -> None:
    """Who mounts with a lock file open must not hold that lock for as long as the mount lasts."""
    with (tmp_path / "lock").open("w") as lock:
        done = subprocess.run(
            [sys.executable, "-m", "iohang_fuse.cli", *paths, "-o", f"log={tmp_path}/log"],
            pass_fds=[lock.fileno()],
            timeout=30,
            check=False,
        )
    assert done.returncode == 0
    open_there = [os.readlink(fd) for fd in Path(f"/proc/{server_of(paths[1])}/fd").iterdir()]
    assert str(tmp_path / "lock") not in open_there
    assert str(tmp_path / "log") in open_there


def test_a_log_is_not_for_everybody(paths: tuple[Path, Path], tmp_path: Path) -> None:
    """Nor is the one that follows after logrotate(8) has moved the first: the server's umask is 0, for what consumers make."""
    log = tmp_path / "log"
    assert iohang_mount(*paths, "-o", f"log={log}").returncode == 0
    log.rename(tmp_path / "log.1")
    os.kill(server_of(paths[1]), signal.SIGUSR1)
    wait_until(log.exists, what="a new log")
    assert [path.stat().st_mode & 0o777 for path in (log, tmp_path / "log.1")] == [0o640, 0o640]


@pytest.mark.parametrize(
    "command",
    [
        ["mount", "-t", "fuse", "iohang-mount#{source}", "{mountpoint}", "-o", "timeout=90,_netdev,nofail"],
        ["mount", "-t", "fuse.iohang-mount", "{source}", "{mountpoint}", "-o", "timeout=90,allow_other"],
        ["mount", "-t", "iohang", "{source}", "{mountpoint}", "-o", "timeout=90,_netdev,x-systemd.automount"],
    ],
)
@pytest.mark.usefixtures("programs")
def test_mount_8(paths: tuple[Path, Path], command: list[str]) -> None:
    """Section 6: "also as `mount.iohang` and `mount -t fuse.iohang-mount`"; findmnt shows source and type."""
    source, mountpoint = paths
    subprocess.run([word.format(source=source, mountpoint=mountpoint) for word in command], check=True)
    assert (mountpoint / "file").read_text() == "content"
    shown = subprocess.run(
        ["findmnt", "-rno", "SOURCE,FSTYPE", str(mountpoint)], check=True, capture_output=True, text=True
    )
    assert shown.stdout.split() == [str(source), TYPE]
    subprocess.run(["umount", str(mountpoint)], check=True)


@pytest.mark.parametrize("fstype", ["fuse.iohang-mount", "iohang"])
@pytest.mark.usefixtures("programs")
def test_fstab_line(paths: tuple[Path, Path], tmp_path: Path, fstype: str) -> None:
    """An fstab line works, and `mount -a` a second time mounts nothing twice."""
    source, mountpoint = paths
    fstab = tmp_path / "fstab"
    fstab.write_text(f"{source} {mountpoint} {fstype} timeout=90,_netdev,nofail,noauto,x-systemd.automount 0 0\n")
    fstab.write_text(fstab.read_text().replace("noauto,", ""))
    for _ in range(2):
        subprocess.run(["mount", "-T", str(fstab), "-a"], check=True)
        assert mounted_at(mountpoint) == [TYPE]
    assert (mountpoint / "file").read_text() == "content"


def refusal(*arguments: object) -> tuple[int, str]:
    done = iohang_mount(*arguments)
    assert done.returncode != 0
    assert "Traceback" not in done.stderr
    return done.returncode, done.stderr


def test_refuses_bad_paths(paths: tuple[Path, Path], tmp_path: Path) -> None:
    """A source that does not exist, is no directory, or lies under the mount point; each with mount(8)'s code 32 and a line."""
    source, mountpoint = paths
    (tmp_path / "inside").mkdir()
    (source / "deeper").mkdir()
    for bad_source, bad_mountpoint, words in (
        (tmp_path / "absent", mountpoint, "absent does not exist"),
        (source / "file", mountpoint, "file is not a directory"),
        (source, tmp_path / "absent", "absent does not exist"),
        (source, source / "file", "file is not a directory"),
        (source, tmp_path, "lies under MOUNTPOINT"),
        (source, source, "SOURCE and MOUNTPOINT are both"),
        (source, source / "deeper", "lies under SOURCE"),
    ):
        code, message = refusal(bad_source, bad_mountpoint)
        assert (code, message.count("\n")) == (32, 1)
        assert words in message
    assert mounted_at(mountpoint) == []


def test_refuses_a_second_mount(paths: tuple[Path, Path], tmp_path: Path) -> None:
    """A second mount on the same place is refused, and the first goes on."""
    source, mountpoint = paths
    with Mount(source, mountpoint, log=tmp_path / "log"):
        code, message = refusal(source, mountpoint)
        assert code == 32
        assert f"{mountpoint} is already an iohang-mount of {source}" in message
        assert (mountpoint / "file").read_text() == "content"


def test_refuses_all_bad_options_at_once(paths: tuple[Path, Path], tmp_path: Path) -> None:
    """Bad input: "all errors at once, each with its key and the nearest known name"; nothing is mounted."""
    source, mountpoint = paths
    config = tmp_path / "iohang.yaml"
    config.write_text("intervall: 5\nread_timeout: soon\n")
    code, message = refusal(source, mountpoint, "-c", config, "-o", "timeou=3,errors=EIOO")
    assert code == 1
    for words in ("intervall", "'interval'", "read_timeout", "timeou", "'timeout'", "EIOO", "EIO"):
        assert words in message
    assert message.count("\n") == 4
    assert mounted_at(mountpoint) == []


def test_a_log_that_cannot_be_written(paths: tuple[Path, Path]) -> None:
    """Bad input gets one clear line, in the background as well."""
    source, mountpoint = paths
    code, message = refusal(source, mountpoint, "-o", "log=/nonexistent/log")
    assert (code, message.count("\n")) == (1, 1)
    assert "/nonexistent/log" in message
    assert mounted_at(mountpoint) == []


@pytest.mark.parametrize("signal_number", [signal.SIGTERM, signal.SIGINT])
def test_signals_unmount(paths: tuple[Path, Path], tmp_path: Path, signal_number: signal.Signals) -> None:
    """Ctrl-C and SIGTERM unmount cleanly."""
    source, mountpoint = paths
    with Mount(source, mountpoint, log=tmp_path / "log") as mount:
        mount.process.send_signal(signal_number)
        assert mount.process.wait(10) == 0
        assert mounted_at(mountpoint) == []


def session_of(leader: int) -> dict[int, str]:
    """The processes of *leader*'s session, and where in the kernel each waits."""
    told = subprocess.run(["pgrep", "-s", str(leader)], capture_output=True, text=True, check=False).stdout
    found = {}
    for pid in map(int, told.split()):
        with contextlib.suppress(OSError):  # it has ended
            found[pid] = Path(f"/proc/{pid}/wchan").read_text()
    return found


HANGS = "request_wait_answer"  # in FUSE


@pytest.mark.parametrize(
    ("rule", "waits", "more"),
    [
        ("* * hang", [HANGS], ""),
        ("statfs * hang", [HANGS, "pipe_read"], "; if it does by now, unmount it"),  # anon_pipe_read in newer kernels
    ],
    ids=["parent", "server"],
)
def test_ctrl_c_before_it_serves(
    paths: tuple[Path, Path], tmp_path: Path, rule: str, waits: list[str], more: str
) -> None:
    """iohang-mount(8): "8: Interrupted (Ctrl-C) before it served", where SOURCE hangs for the parent, or the server; one line."""
    source, mountpoint = paths
    (tmp_path / "flaky").mkdir()
    with FlakySource(source, tmp_path / "flaky", tmp_path / "trigger", tmp_path / "flaky.log") as flaky:
        flaky.fail(rule)
        command = [sys.executable, "-m", "iohang_fuse.cli", tmp_path / "flaky", mountpoint, "-o"]
        command.append(f"monitor=none,log={tmp_path}/log")
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True) as start:
            try:
                wait_until(
                    lambda: (
                        sorted(where.removeprefix("anon_") for where in session_of(start.pid).values()) == sorted(waits)
                    ),
                    60,
                    f"its processes to wait in {waits}",
                )
                os.killpg(start.pid, signal.SIGINT)  # as a terminal does
            finally:
                flaky.heal()  # what hangs heeds no signal but SIGKILL
            assert start.wait(60) == 8
            assert start.stderr is not None
            assert start.stderr.read() == f"iohang-mount: interrupted before the mount served{more}\n"
            wait_until(lambda: not session_of(start.pid), 60, "the server to end, too")
    assert mounted_at(mountpoint) == []


def test_busy_mount_says_who(paths: tuple[Path, Path], tmp_path: Path) -> None:
    """SIGTERM while the mount is busy: it keeps serving and says who holds it; once free, it unmounts."""
    source, mountpoint = paths
    with Mount(source, mountpoint, log=tmp_path / "log") as mount:
        with subprocess.Popen(["tail", "-f", str(mountpoint / "file")], stdout=subprocess.DEVNULL) as tail:
            wait_until(lambda: "file" in str([*map(os.readlink, fds(tail.pid))]), what="tail to open the file")
            mount.process.send_signal(signal.SIGTERM)
            wait_until(lambda: f"in use by tail ({tail.pid})" in mount.log_text(), what="the message")
            assert (mountpoint / "file").read_text() == "content"
            tail.kill()
        assert mount.stop() == 0
        assert mounted_at(mountpoint) == []


def fds(pid: int) -> list[Path]:
    return [fd for fd in Path(f"/proc/{pid}/fd").iterdir() if fd.name > "2"]


def test_second_sigterm_ends_everything(paths: tuple[Path, Path], tmp_path: Path) -> None:
    """P8: "SIGTERM and unmount have a defined end, too": the second one detaches, and held requests get their error."""
    source, mountpoint = paths
    flaky_point = tmp_path / "flaky"
    with (
        FlakySource(source, flaky_point, tmp_path / "trigger", tmp_path / "flaky.log") as flaky,
        Mount(flaky_point, mountpoint, "timeout=inf", log=tmp_path / "log") as mount,
    ):
        flaky.fail("data * errno=EIO")
        with subprocess.Popen(
            [sys.executable, "-c", f"open({str(mountpoint / 'file')!r}, 'r+b', 0).write(b'x')"],
            stderr=subprocess.PIPE,
            text=True,
        ) as consumer:
            wait_until(lambda: "failed with EIO" in mount.log_text(), what="the write to be held")
            mount.process.send_signal(signal.SIGTERM)
            wait_until(lambda: "in use by" in mount.log_text(), what="who holds it")
            assert "1 requests held" in mount.log_text()
            assert consumer.poll() is None
            mount.process.send_signal(signal.SIGTERM)
            assert consumer.stderr is not None
            assert "Input/output error" in consumer.stderr.read()
        assert mount.process.wait(15) == 0
        assert mounted_at(mountpoint) == []


def test_a_copy_of_the_mount_elsewhere(paths: tuple[Path, Path], tmp_path: Path) -> None:
    """P8: a copy of the mount (a bind mount, another mount namespace) keeps the server; the second SIGTERM ends it."""
    source, mountpoint = paths
    copy = tmp_path / "copy"
    copy.mkdir()
    with Mount(source, mountpoint, log=tmp_path / "log") as mount:
        subprocess.run(["mount", "--bind", str(mountpoint), str(copy)], check=True)
        try:
            mount.process.send_signal(signal.SIGTERM)
            wait_until(lambda: not mounted_at(mountpoint), what="umount here")
            assert (copy / "file").read_text() == "content"
            assert mount.process.poll() is None
            mount.process.send_signal(signal.SIGTERM)
            assert mount.process.wait(15) == 0
        finally:
            subprocess.run(["umount", "-l", str(copy)], check=True)


def test_sigterm_takes_no_other_mount_away(paths: tuple[Path, Path], tmp_path: Path) -> None:
    """A mount in use is unmounted later, as soon as it is free: that, and not what somebody has mounted there since."""
    source, mountpoint = paths
    with Mount(source, mountpoint, log=tmp_path / "log") as mount, (mountpoint / "file").open() as file:
        mount.process.send_signal(signal.SIGTERM)
        wait_until(lambda: "stays mounted" in mount.log_text(), what="the server to wait for its user")
        subprocess.run(["umount", "-l", str(mountpoint)], check=True)
        subprocess.run(["mount", "-t", "tmpfs", "tmpfs", str(mountpoint)], check=True)
        time.sleep(2.5)  # two of the server's looks
        assert mounted_at(mountpoint) == ["tmpfs"]
        assert file.read() == "content"
        file.close()
        assert mount.process.wait(20) == 0
        assert mounted_at(mountpoint) == ["tmpfs"]


def test_a_signal_after_a_lazy_unmount_is_for_what_was_unmounted(paths: tuple[Path, Path], tmp_path: Path) -> None:
    """P8: signals end the server of a mount that `umount -l` has taken away, and leave alone what was mounted there since."""
    source, mountpoint = paths
    with Mount(source, mountpoint, log=tmp_path / "log") as mount:
        fd = os.open(mountpoint / "file", os.O_RDONLY)
        subprocess.run(["umount", "-l", str(mountpoint)], check=True)
        subprocess.run(["mount", "-t", "tmpfs", "tmpfs", str(mountpoint)], check=True)
        for _ in range(3):
            mount.process.send_signal(signal.SIGTERM)
            wait_until(
                lambda: mount.process.poll() is not None or caught(mount.process.pid), what="the signal to arrive"
            )
            assert mounted_at(mountpoint) == ["tmpfs"]
        assert mount.process.wait(20) == 0
        assert mounted_at(mountpoint) == ["tmpfs"]
        assert "cannot unmount" not in mount.log_text()
        with pytest.raises(OSError, match="not connected"):
            os.close(fd)  # flush asks the server


def caught(pid: int) -> bool:
    """Whether no signal waits for the process any more."""
    text = Path(f"/proc/{pid}/status").read_text()
    return all(int(mask, 16) == 0 for mask in re.findall(r"^S[h]?d?Pnd:\t(\w+)", text, re.MULTILINE))


def test_killed_server_stays_mounted(paths: tuple[Path, Path], tmp_path: Path) -> None:
    """Platform fact 19: "After a crash, stay mounted (ENOTCONN) rather than uncover it"; and a new mount says what to do."""
    source, mountpoint = paths
    with Mount(source, mountpoint, log=tmp_path / "log") as mount:
        mount.process.kill()
        mount.process.wait()
        with pytest.raises(OSError, match="not connected"):
            (mountpoint / "file").read_text()
        code, message = refusal(source, mountpoint)
        assert code == 32
        assert "its server is gone; `umount` it first" in message
        subprocess.run(["umount", str(mountpoint)], check=True)
        done = iohang_mount(source, mountpoint)
        assert done.returncode == 0
        assert (mountpoint / "file").read_text() == "content"


def test_limits_are_set(paths: tuple[Path, Path], tmp_path: Path) -> None:
    """Platform facts 1 and 2: max_background is set before the mount is announced, and RLIMIT_NOFILE is raised."""
    source, mountpoint = paths
    with Mount(source, mountpoint, "max_background=777", log=tmp_path / "log") as mount:
        minor = os.minor(os.stat(mountpoint).st_dev)
        assert Path(f"/sys/fs/fuse/connections/{minor}/max_background").read_text() == "777\n"
        files = re.search(r"Max open files\s+(\d+)\s+(\d+)", Path(f"/proc/{mount.pid}/limits").read_text())
        assert files is not None
        soft, hard = int(files[1]), int(files[2])
        # Beyond the hard limit takes CAP_SYS_RESOURCE, which a container's root may lack.
        assert soft == hard >= resource.getrlimit(resource.RLIMIT_NOFILE)[1]


@pytest.mark.parametrize("name", ["default_request_timeout", "max_request_timeout"])
def test_kernel_timeouts_are_checked(paths: tuple[Path, Path], name: str) -> None:
    """Platform fact 9: the kernel would abort the whole connection when a held request is older than its timeout."""
    source, mountpoint = paths
    setting = Path(f"/proc/sys/fs/fuse/{name}")
    if not setting.exists():
        pytest.skip("this kernel (before Linux 6.15) has no FUSE request timeouts")
    before = setting.read_text()
    setting.write_text("300\n")
    try:
        code, message = refusal(source, mountpoint, "-o", "timeout=90")
        assert code == 2
        assert f"fs.fuse.{name} is 300 s" in message
        assert "sysctl" in message
        assert iohang_mount(source, mountpoint, "-o", "timeout=30").returncode == 0
    finally:
        setting.write_text(before)


def test_sigusr1_dumps(paths: tuple[Path, Path], tmp_path: Path) -> None:
    """SIGUSR1 writes the held requests and all task stacks to the log."""
    source, mountpoint = paths
    flaky_point = tmp_path / "flaky"
    with (
        FlakySource(source, flaky_point, tmp_path / "trigger", tmp_path / "flaky.log") as flaky,
        Mount(flaky_point, mountpoint, "interval=0.3", log=tmp_path / "log") as mount,
    ):
        flaky.fail("data * errno=EIO")
        with subprocess.Popen(["dd", f"of={mountpoint}/file", "if=/dev/zero", "bs=512", "count=1", "conv=notrunc"],
                              stderr=subprocess.DEVNULL) as consumer:  # fmt: skip
            wait_until(lambda: "failed with EIO" in mount.log_text(), what="the write to be held")
            os.kill(mount.pid, signal.SIGUSR1)
            wait_until(lambda: "thread " in mount.log_text(), what="the dump")
            assert re.search(r"file: write of 512 bytes at 0: waiting, held, for \d\.\d s, \d+ attempts, last error EIO",
                             mount.log_text())  # fmt: skip
            assert "_keep_time" in mount.log_text()
            flaky.heal()
            assert consumer.wait(10) == 0


@pytest.mark.parametrize("insist", [False, True], ids=["until it returns", "third signal"])
def test_sigterm_waits_for_a_write_in_a_system_call(paths: tuple[Path, Path], tmp_path: Path, *, insist: bool) -> None:
    """P5: "a write is therefore never answered while an attempt is in flight"; SIGTERM says so, and a third one ends it all."""
    source, mountpoint = paths
    flaky_point = tmp_path / "flaky"
    with (
        FlakySource(source, flaky_point, tmp_path / "trigger", tmp_path / "flaky.log") as flaky,
        Mount(flaky_point, mountpoint, "timeout=1", "blocked_after=0.5", log=tmp_path / "log") as mount,
    ):
        flaky.fail("write * hang")
        with subprocess.Popen(
            [sys.executable, "-c", f"open({str(mountpoint / 'file')!r}, 'r+b', 0).write(b'x')"],
            stderr=subprocess.PIPE,
            text=True,
        ) as consumer:
            wait_until(lambda: "no answer from the storage" in mount.log_text(), what="the write to be held")
            mount.process.send_signal(signal.SIGTERM)
            wait_until(lambda: "in use by" in mount.log_text(), what="who holds it")
            mount.process.send_signal(signal.SIGTERM)
            wait_until(
                lambda: "1 writes or fsyncs are inside a system call" in mount.log_text(), what="the word about it"
            )
            assert "file (1)" in mount.log_text()
            mount.process.send_signal(signal.SIGHUP)  # a terminal that hangs up does not insist
            time.sleep(0.5)
            assert consumer.poll() is None
            assert mount.process.poll() is None
            if insist:
                mount.process.send_signal(signal.SIGTERM)
                assert consumer.wait(15) == 1
            flaky.heal()
            assert consumer.stderr is not None
            said = consumer.stderr.read()
            assert ("Error" in said) == insist
            assert consumer.wait(15) == (1 if insist else 0)
            mount.process.wait(15)
    assert (source / "file").read_bytes().startswith(b"x")


def test_vanished_request_does_not_stop_the_server(paths: tuple[Path, Path], tmp_path: Path) -> None:
    """Platform fact 8: a request that vanishes between poll and read leaves pyfuse3 in a blocking read.

    The interpreter is locked meanwhile; the timers of held requests must go on all the same.
    """
    source, mountpoint = paths
    flaky_point = tmp_path / "flaky"
    with (
        FlakySource(source, flaky_point, tmp_path / "trigger", tmp_path / "flaky.log") as flaky,
        Mount(flaky_point, mountpoint, "interval=0.3", "attr_timeout=0", log=tmp_path / "log") as mount,
    ):
        flaky.fail("data * errno=EIO")
        consumer = subprocess.Popen(
            ["dd", f"of={mountpoint}/file", "if=/dev/zero", "bs=512", "count=1", "conv=notrunc"]
        )
        wait_until(lambda: "failed with EIO" in mount.log_text(), what="the write to be held")
        # strace holds the server for 2 s before its read; the request that it was woken for is gone by then.
        with subprocess.Popen(
            ["strace", "-f", "-qq", "-p", str(mount.pid), "-P", "/dev/fuse", "-e", "trace=readv", "-e",
             "inject=readv:delay_enter=2000000"],
            stderr=subprocess.DEVNULL,
        ) as strace:  # fmt: skip
            status = Path(f"/proc/{mount.pid}/status")
            wait_until(lambda: f"TracerPid:\t{strace.pid}\n" in status.read_text(), what="strace to attach")
            victim = subprocess.Popen(["stat", str(mountpoint / "absent")], stdout=subprocess.DEVNULL)
            time.sleep(0.5)
            victim.kill()
            victim.wait()
            time.sleep(2)
            strace.send_signal(signal.SIGINT)
        flaky.heal()
        try:
            assert consumer.wait(10) == 0
        finally:
            os.kill(mount.pid, signal.SIGUSR1)  # any signal ends the blocking read, so that a failed test ends, too
            consumer.wait(10)


def test_a_bug_costs_one_request(paths: tuple[Path, Path], tmp_path: Path) -> None:
    """P11: "Whatever goes wrong in a handler is answered EIO, logged with its traceback, and counted. The mount stays."."""
    source, mountpoint = paths
    program = tmp_path / "buggy.py"
    program.write_text(
        "from iohang_fuse import backing, cli, source\n"
        "def buggy(*args): raise ZeroDivisionError('planted')\n"
        "source.list_xattrs = source.open_directory = backing.Backing.read = buggy\n"
        f"raise SystemExit(cli.main([{str(source)!r}, {str(mountpoint)!r}, '-f']))\n"
    )
    with (tmp_path / "log").open("wb") as log, subprocess.Popen([sys.executable, program], stderr=log) as server:
        wait_until(lambda: "is served" in (tmp_path / "log").read_text(), what="the mount")
        for _ in range(3):
            for call in (os.listxattr, os.listdir, lambda path: (path / "file").read_text()):
                with pytest.raises(OSError, match="Errno 5"):
                    call(mountpoint)
        (mountpoint / "new").write_text("works")
        assert (source / "new").read_text() == "works"
        server.send_signal(signal.SIGTERM)
        assert server.wait(10) == 0
    logged = (tmp_path / "log").read_text()
    assert logged.count("ZeroDivisionError: planted") >= 9
    assert "the mount stays" in logged
