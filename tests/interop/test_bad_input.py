"""Whatever is wrong with what a user says: one line that names it, where it stands, and what would be right; and nothing is done.

Issue: "Each bad option, bad YAML, bad argument: one clear line, exit code as documented; a table-driven test over at least 60 of
them". What is found before anything is done runs in this process, and some of each table again as a process of its own.
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
import subprocess
import sys
import threading
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from qemu.qmp import ExecuteError, QMPClient

from iohang_fuse import cli, ctl, mount
from tests.harness import Mount, mounted_at

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

USAGE, SYSTEM, FAILURE = 1, 2, 32  # docs/iohang-mount.rst, EXIT STATUS


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """`src` and `mnt`, a `file`, a `loop` of links, and a `dead` socket."""
    for name in ("src", "mnt"):
        (tmp_path / name).mkdir()
    (tmp_path / "file").write_text("precious")
    (tmp_path / "loop").symlink_to("loop")
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(tmp_path / "dead"))
    return tmp_path


def tree(place: Path) -> dict[str, bytes | None]:
    return {str(path): path.read_bytes() if path.is_file() else None for path in place.rglob("*")}


@contextmanager
def nothing_is_done(place: Path) -> Iterator[None]:
    """No mount, no file, no socket, no process, no thread."""
    before, threads = tree(place), threading.active_count()
    yield
    assert tree(place) == before
    assert mounted_at(place / "mnt") == []
    assert threading.active_count() == threads
    assert not [pid for pid in Path("/proc").iterdir() if pid.name.isdigit() and str(place) in _command_line(pid)]


def _command_line(pid: Path) -> str:
    try:
        return (pid / "cmdline").read_text() if pid.name != str(os.getpid()) else ""
    except OSError:
        return ""


def check_line(stderr: str, program: str, says: str) -> None:
    """One line of *program*'s, in which the words of *says*, which `|` separates, stand in this order."""
    assert stderr.count("\n") == 1, stderr
    assert stderr.endswith("\n")
    assert stderr.startswith(f"{program}: ")
    assert len(stderr) < 600
    assert "Traceback" not in stderr
    rest = stderr
    for words in says.split("|"):
        assert words in rest, f"{words!r} in {stderr!r}"
        rest = rest.partition(words)[2]


# ---- iohang-mount: options

SEE = "; see iohang-mount --help"
SPAN = "is no span of time; say 90 (seconds), 90s, 500ms, 5min, 2h, 1d or inf"
SIZE = "is no size; say bytes, or 512K, 64M, 1G, 2T"

OPTIONS = [  # what stands after -o, and what is said of it
    ("timeout=60x", f"option timeout: '60x' {SPAN}"),
    ("timeout=-1", f"option timeout: '-1' {SPAN}"),
    ("timeout=nan", f"option timeout: 'nan' {SPAN}"),
    ("timeout=1e3", f"option timeout: '1e3' {SPAN}"),
    ("timeout=5m", f"option timeout: '5m' {SPAN}"),
    ("timeout=1,5s", "option '5s' is unknown"),
    ("timeout=", "option timeout needs a value; say timeout=VALUE"),
    ("timeout", "option timeout needs a value; say timeout=VALUE"),
    ("timeout=99999d", "option timeout: '99999d' is more than ten years; say 3650d at most, or inf"),
    ("timeot=5", "option 'timeot' is unknown; the nearest is 'timeout'"),
    ("read-timeout=5", "option 'read-timeout' is unknown; the nearest is 'read_timeout'"),
    ("read_timeout=soon", f"option read_timeout: 'soon' {SPAN}"),
    ("fsync_timeout=5 s", f"option fsync_timeout: '5 s' {SPAN}"),
    ("write_timeout=٣", f"option write_timeout: '٣' {SPAN}"),
    ("interval=0", "option interval: '0' is out of range; say 100ms to 1d"),
    ("interval=inf", "option interval: 'inf' is out of range; say 100ms to 1d"),
    ("interval=2d", "option interval: '2d' is out of range; say 100ms to 1d"),
    ("errors=", "option errors needs a value"),
    ("errors=EFOO", "option errors: 'EFOO' is no error's name"),
    ("errors=EIO:ETIMDOUT", "option errors: 'ETIMDOUT' is no error's name; the nearest is 'ETIMEDOUT'"),
    ("errors=EIO:", "option errors: '' is no error's name"),
    ("errors=5", "option errors: '5' is no error's name; see errno(3)"),
    ("errors=EINVAL", "option errors: EINVAL is never transient|leave it out"),
    ("errors=EINTR", "option errors: EINTR is always retried at once|leave it out"),
    ("timeout_errno=EACCES", "option timeout_errno: 'EACCES' is not one of the choices; say EIO or ENOSPC"),
    ("recovery_gate=0", "option recovery_gate: '0' is out of range; say a whole number from 1 to 1000"),
    ("recovery_gate=4.0", "option recovery_gate: '4.0' is out of range; say a whole number"),
    ("recovery_gate=-4", "option recovery_gate: '-4' is out of range; say a whole number"),
    ("blocked_after=0", "option blocked_after: '0' is out of range; say 1ms or more"),
    ("held_limit=0", "option held_limit: '0' would hold nothing; say 1G, or timeout=0"),
    ("held_limit=1.5G", f"option held_limit: '1.5G' {SIZE}"),
    ("held_limit=64MB", f"option held_limit: '64MB' {SIZE}"),
    ("held_limit=-1", f"option held_limit: '-1' {SIZE}"),
    ("held_limit=inf", f"option held_limit: 'inf' {SIZE}"),
    ("write_log=4K", "option write_log: '4K' is less than one large write; say 1M or more"),
    ("max_background=70000", "option max_background: '70000' is out of range; say a whole number from 1 to 65535"),
    ("engine=fast", "option engine: 'fast' is not one of the choices; say auto or uring or threads"),
    ("direct=yes", "option direct: 'yes' is not one of the choices; say auto or never"),
    ("attr_timeout=inf", "option attr_timeout: 'inf' is out of range; say 3650d at most"),
    ("attr_timeout=-1", f"option attr_timeout: '-1' {SPAN}"),
    ("log_level=loud", "option log_level: 'loud' is not one of the choices; say debug or info or warning"),
    (f"monitor=/run/{'x' * 103}", "option monitor: |is longer than a socket's name may be (107 bytes); say a shorter path"),
    ("monitor=", "option monitor needs a value"),
    ("monitor=/a\nb", r"option monitor: '/a\nb' has a newline or NUL in it; say a path without"),
    ("monitor_group=nobody-has-this", "option monitor_group: 'nobody-has-this' is no group here; say one of getent(1) group"),
    ("log=", "option log needs a value"),
    ("config=/nonexistent.yaml", "/nonexistent.yaml cannot be read: No such file or directory; name a readable file"),
    ("config=/", "/ cannot be read: Is a directory; name a readable file"),
    ("config=/dev/zero", "/dev/zero is larger than 1 MiB; name a YAML file"),
    ("debug", "option debug: not an option here; say log_level=debug, or -v"),
    ("auto_unmount", "option auto_unmount: |leave it out"),
    ("uid=0", "option uid: |leave it out"),
    ("allow_root", "option allow_root: not supported; say allow_other with default_permissions"),
    ("max_read=4096", "option max_read: |leave it out"),
    ("ro=1", "option ro takes no value; say ro alone"),
    ("alow_other", "option 'alow_other' is unknown; the nearest is 'allow_other'"),
    ("fsname=x", "option fsname: 'x' is not SOURCE; leave it out"),
    ('log="x', "option 'log=\"x': the double quote is never closed; close it"),
    ("\x1b[2J=1", r"option '\x1b[2J' is unknown; see iohang-mount --help"),
    (b"\xff=1", r"option '\udcff' is unknown; see iohang-mount --help"),
]  # fmt: skip


def run_here(
    main: Callable[[list[str]], int], arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> tuple[int, str, str]:
    code = main(arguments)
    said = capsys.readouterr()
    return code, said.out, said.err


@pytest.fixture
def never_mounts(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(*_args: object, **_options: object) -> int:
        raise AssertionError("bad input came through to the mount")

    monkeypatch.setattr(mount, "run", run)
    monkeypatch.setattr(sys, "argv", ["iohang-mount"])


@pytest.mark.usefixtures("never_mounts")
@pytest.mark.parametrize(("option", "says"), OPTIONS)
def test_a_bad_option(place: Path, option: str | bytes, says: str, capsys: pytest.CaptureFixture[str]) -> None:
    """docs/iohang-mount.rst, EXIT STATUS: "1: wrong usage: an argument, an option, or the configuration file"."""
    arguments = [str(place / "src"), str(place / "mnt"), "-o", os.fsdecode(option)]
    with nothing_is_done(place):
        code, out, err = run_here(cli.main, arguments, capsys)
    assert (code, out) == (USAGE, "")
    check_line(err, "iohang-mount", says)


# ---- iohang-mount: the configuration file

FILES: list[tuple[str | bytes, int, str]] = [  # what is in it, the line that is named, and what is said
    ("interval: 1\ntimeot: 5\n", 2, "timeot is an unknown key; the nearest is 'timeout'"),
    ("interval: 1\n\ninterval: 2\n", 3, "interval is given twice, first on line 1; leave one of them out"),
    ("timeout: 60x\n", 1, f"timeout: '60x' {SPAN}"),
    ("timeout: yes\n", 1, f"timeout: True {SPAN}"),
    ("timeout: .nan\n", 1, f"timeout: '.nan' {SPAN}"),
    ("timeout: [1, 2]\n", 1, f"timeout: ['1', '2'] {SPAN}"),
    ("timeout: {a: 1}\n", 1, f"timeout: {{}} {SPAN}"),
    ("timeout: !!python/object/apply:os.system [id]\n", 1, f"timeout: ['id'] {SPAN}"),
    ("\ntimeout:\n", 2, "timeout has no value; give it one, or leave it out"),
    ("errors: [EIO, EFOO]\n", 1, "errors: 'EFOO' is no error's name"),
    ("errors: []\n", 1, "errors: [] names no error; say EIO:ETIMEDOUT"),
    ("held_limit: 1 GiB\n", 1, f"held_limit: '1 GiB' {SIZE}"),
    ("ro: true\n", 1, "ro is a mount word; give it with -o, or in fstab"),
    ("config: /x\n", 1, "config: a configuration file cannot name another; leave it out"),
    ("source: /srv\n", 1, "source is an unknown key"),
    ("- timeout\n", 1, "no mapping; give lines of `key: value`"),
    ("just words\n", 1, "no mapping; give lines of `key: value`"),
    ("interval: 1\n\ttimeout: 2\n", 2, "no YAML: |'\\t'|; indent with spaces"),
    ("interval: [1\ntimeout: 2\n", 2, "no YAML: "),
    ("a: 1\n---\nb: 2\n", 2, "no YAML: |another document"),
    ("timeout: 'x\n", 2, "no YAML: |; give lines of `key: value`"),
    ("timeout: *x\n", 1, "no YAML: found undefined alias"),
    ("timeout: @x\n", 1, "no YAML: found character '@' that cannot start any token"),
    (b"interval: 1\ntimeout: \xff\n", 2, "no UTF-8; save it as UTF-8"),
    ("interval: 1\ntimeout: \x07\n", 2, "a control character; remove it"),
    ("interval: 1\r\ntimeout: 1x\r\n", 2, f"timeout: '1x' {SPAN}"),
    (b"\xff\xfet\x00i\x00", 1, "no UTF-8; save it as UTF-8"),
]  # fmt: skip


@pytest.mark.usefixtures("never_mounts")
@pytest.mark.parametrize(("text", "line", "says"), FILES)
def test_a_bad_file(place: Path, text: str | bytes, line: int, says: str, capsys: pytest.CaptureFixture[str]) -> None:
    """docs/iohang-mount.rst: "An unknown key, a key given twice and a wrong value are errors, told with their line"."""
    path = place / "iohang.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with nothing_is_done(place):
        code, out, err = run_here(cli.main, [str(place / "src"), str(place / "mnt"), "-c", str(path)], capsys)
    assert (code, out) == (USAGE, "")
    check_line(err, "iohang-mount", f"{path}:{line}: |{says}")


# ---- iohang-mount: arguments, as processes

PROCESSES = [  # of {p}, the place; exit code; what is said
    ("", USAGE, f"the following arguments are required: SOURCE, MOUNTPOINT{SEE}"),
    ("{p}/src", USAGE, f"the following arguments are required: MOUNTPOINT{SEE}"),
    ("{p}/src {p}/mnt more", USAGE, f"unrecognized arguments: more{SEE}"),
    ("{p}/src {p}/mnt --frob", USAGE, f"unrecognized arguments: --frob{SEE}"),
    ("{p}/src {p}/mnt -o", USAGE, f"argument -o: expected one argument{SEE}"),
    ("{p}/src {p}/mnt -c", USAGE, f"argument -c: expected one argument{SEE}"),
    ("{p}/src {p}/mnt -N 1", USAGE, "-N: other mount namespaces are not supported; enter it first, with nsenter"),
    ("{p}/src {p}/mnt -o timeout=60x", USAGE, f"option timeout: '60x' {SPAN}"),
    ("{p}/src {p}/mnt -o remount,ro", FAILURE, "option remount: |unmount and mount again"),
    ("{p}/absent {p}/mnt", FAILURE, "SOURCE {p}/absent does not exist; name the directory of the images"),
    ("{p}/file {p}/mnt", FAILURE, "SOURCE {p}/file is not a directory; name one"),
    ("{p}/loop {p}/mnt", FAILURE, "SOURCE {p}/loop: ELOOP (Too many levels of symbolic links)"),
    ("{p}/file/x {p}/mnt", FAILURE, "SOURCE {p}/file/x: ENOTDIR (Not a directory)"),
    ("{p}/src {p}/absent", FAILURE, "MOUNTPOINT {p}/absent does not exist; make it with mkdir(1)"),
    ("{p}/src {p}/file", FAILURE, "MOUNTPOINT {p}/file is not a directory; name one"),
    ("{p}/src {p}/loop", FAILURE, "MOUNTPOINT {p}/loop: ELOOP"),
    ("{p}/src {p}/src", FAILURE, "SOURCE and MOUNTPOINT are both {p}/src; name two directories"),
    ("{p}/src {p}", FAILURE, "SOURCE {p}/src lies under MOUNTPOINT {p}: the mount would hide it; mount elsewhere"),
    ("{p} {p}/mnt", FAILURE, "MOUNTPOINT {p}/mnt lies under SOURCE {p}: the mount would show itself; mount elsewhere"),
    ("{p}/src {p}/mnt -o log={p}/absent/log", USAGE, "log {p}/absent/log cannot be written: ENOENT|; name a file"),
    ("{p}/src {p}/mnt -o log={p}/src", USAGE, "log {p}/src cannot be written: EISDIR (Is a directory); name a file"),
    ("{p}/src {p}/mnt -o monitor={p}/file,log={p}/log", SYSTEM, "monitor: no socket at {p}/file: EEXIST (File exists); say "),
    ("{p}/src {p}/mnt -f -o monitor={p}/file/x,log={p}/log", SYSTEM, "monitor: no socket at {p}/file/x: ENOTDIR|; say "),
    ("{p}/src {p}/mnt -c {p}/iohang.yaml", USAGE, "{p}/iohang.yaml cannot be read: No such file or directory; name "),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "code", "says"), PROCESSES)
def test_bad_arguments(place: Path, arguments: str, code: int, says: str) -> None:
    """docs/iohang-mount.rst, EXIT STATUS, of a real process, in the background and in the foreground."""
    command = [sys.executable, "-m", "iohang_fuse.cli", *arguments.format(p=place).split()]
    (place / "log").touch()
    with nothing_is_done(place) if "log={p}/log" not in arguments else nothing_is_left(place):
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (code, "")
    check_line(done.stderr, "iohang-mount", says.format(p=place))


@contextmanager
def nothing_is_left(place: Path) -> Iterator[None]:
    """The same, but that the log has said so, too."""
    (place / "log").unlink()
    yield
    assert len((place / "log").read_text().splitlines()) == 1
    (place / "log").unlink()
    with nothing_is_done(place):
        assert sorted(path.name for path in place.iterdir()) == ["dead", "file", "loop", "mnt", "src"]
        assert (place / "file").read_text() == "precious"


def test_a_file_that_may_not_be_read(place: Path) -> None:
    """As somebody else than root, whom nothing is forbidden."""
    path = place / "iohang.yaml"
    path.write_text("timeout: 5\n")
    path.chmod(0)
    for folder in (place, *place.parents):
        folder.chmod(folder.stat().st_mode | 0o055)
    program = f"import sys; sys.path[:0] = {sys.path}; from iohang_fuse import cli; sys.exit(cli.main())"
    command = [
        "setpriv",
        "--reuid=65534",
        "--clear-groups",
        sys.executable,
        "-c",
        program,
        "/srv",
        "/mnt",
        "-c",
        str(path),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, cwd="/")
    assert done.returncode == USAGE
    check_line(done.stderr, "iohang-mount", f"{path} cannot be read: Permission denied; name a readable file")


def test_mount_iohang_says_the_same(place: Path) -> None:
    """As mount(8)'s helper, by its name, with the words that mount(8) gives it."""
    helper = place / "mount.iohang"
    helper.write_text(f"#!{sys.executable}\nimport sys\nfrom iohang_fuse.cli import main\nsys.exit(main())\n")
    helper.chmod(0o755)
    for options, code, says in (
        ("rw,timeot=5", USAGE, "option 'timeot' is unknown; the nearest is 'timeout'"),
        (
            "rw,_netdev,remount",
            FAILURE,
            "option remount: this file system cannot be remounted; unmount and mount again",
        ),
    ):
        command = [str(helper), str(place / "src"), str(place / "mnt"), "-n", "-o", options]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == code
        check_line(done.stderr, "iohang-mount", says)
    done = subprocess.run(
        [str(helper), str(place / "src"), "-f"], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == USAGE
    check_line(done.stderr, "iohang-mount", "the following arguments are required: MOUNTPOINT; see mount.iohang --help")


# ---- iohang-flaky

FLAKY = [
    ("", USAGE, "the following arguments are required: directory, mountpoint, trigger; see iohang-flaky --help"),
    ("{p}/src {p}/mnt", USAGE, "the following arguments are required: trigger"),
    ("{p}/src {p}/mnt {p}/t more", USAGE, "unrecognized arguments: more"),
    ("{p}/src {p}/mnt {p}/t --frob", USAGE, "unrecognized arguments: --frob"),
    ("{p}/src {p}/mnt {p}/t --seed x", USAGE, "argument --seed: |'x'"),
    ("{p}/src {p}/mnt {p}/t --writeback-every x", USAGE, "argument --writeback-every: 'x' is no number of seconds above 0; say "),
    ("{p}/src {p}/mnt {p}/t --writeback-every 0", USAGE, "argument --writeback-every: '0' is no number of seconds above 0"),
    ("{p}/src {p}/mnt {p}/t --writeback-every nan", USAGE, "'nan' is no number of seconds"),
    ("{p}/src {p}/mnt {p}/t --writeback-every inf", USAGE, "'inf' is no number of seconds"),
    ("{p}/src {p}/mnt {p}/t -o xyzzy", USAGE, "argument -o: 'xyzzy' is no mount word; there are allow_other, "),
    ("{p}/src {p}/mnt {p}/t -o alow_other", USAGE, "argument -o: 'alow_other' is no mount word; the nearest is 'allow_other'"),
    ("{p}/absent {p}/mnt {p}/t", FAILURE, "DIRECTORY {p}/absent does not exist; name a directory"),
    ("{p}/src {p}/file {p}/t", FAILURE, "MOUNTPOINT {p}/file is not a directory; name a directory"),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "code", "says"), FLAKY)
def test_iohang_flaky(place: Path, arguments: str, code: int, says: str) -> None:
    """docs/rehearsing.rst: "Exit codes are those of iohang-mount(8)"."""
    command = [sys.executable, "-m", "iohang_fuse.flaky", *arguments.format(p=place).split()]
    with nothing_is_done(place):
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (code, "")
    check_line(done.stderr, "iohang-flaky", says.format(p=place))


# ---- iohangctl, without a mount


class Listener:
    """Something that listens, says *data* to whoever comes, and goes on listening or not."""

    def __init__(self, path: Path, data: bytes, *, stays: bool) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.bind(str(path))
        self._socket.listen()
        self._clients: list[socket.socket] = []
        self._data, self._stays = data, stays
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self) -> None:
        while True:
            try:
                client = self._socket.accept()[0]
            except OSError:
                return
            client.sendall(self._data)
            self._clients.append(client)
            if not self._stays:
                client.close()

    def close(self) -> None:
        self._socket.shutdown(socket.SHUT_RDWR)
        self._thread.join(10)
        for each in (*self._clients, self._socket):
            each.close()


QEMU = b'{"QMP": {"version": {"qemu": {"micro": 0, "minor": 2, "major": 7}, "package": "Debian 1:7.2"}, "capabilities": []}}\r\n'
HELP = "; see iohangctl --help"

CTL = [  # arguments, exit code (`check` has 3 in any case), what is said
    ("", ctl.USAGE, f"which verb? There are status, check, |set{HELP}"),
    ("--json", ctl.USAGE, f"which verb?|{HELP}"),
    ("frob", ctl.USAGE, "no verb 'frob'; there are status,|set"),
    ("retri", ctl.USAGE, f"no verb 'retri'; the nearest is 'retry'{HELP}"),
    ("--frob status", ctl.USAGE, f"'--frob' is no option here{HELP}"),
    ("status x", ctl.USAGE, "'x' is one argument too many here"),
    ("list a b", ctl.USAGE, "'b' is one argument too many here"),
    ("check x", ctl.UNKNOWN, "'x' is one argument too many here"),
    ("check --frob", ctl.UNKNOWN, "'--frob' is no option here"),
    ("-s {p}/a -m {p}/b status", ctl.USAGE, "argument -m/--mountpoint: not allowed with argument -s/--socket"),
    ("-s", ctl.USAGE, "argument -s/--socket: expected one argument"),
    ("-s '' status", ctl.USAGE, "-s: '' is no path; name the socket"),
    ("-m '' fail", ctl.USAGE, "-m: '' is no path; name the mount point"),
    ("-m '' check", ctl.UNKNOWN, "-m: '' is no path; name the mount point"),
    ("set", ctl.USAGE, "the following arguments are required: [IMAGE] KEY=VALUE; see iohangctl set --help"),
    ("set a.img", ctl.USAGE, "nothing to set for 'a.img'; say KEY=VALUE, such as timeout=5min"),
    ("set timeout=5 a.img", ctl.USAGE, "'a.img' sets nothing; say KEY=VALUE"),
    ("set timout=5", ctl.USAGE, "'timout' cannot be set; the nearest is 'timeout'"),
    ("set =5", ctl.USAGE, "'' cannot be set; there are timeout, read_timeout, "),
    ("set a.img errors=EIO", ctl.USAGE, "'errors' cannot be set; there are timeout, "),
    ("set timeout=5 timeout=6", ctl.USAGE, "timeout is given twice; leave one of them out"),
    ("set read-timeout=5 read_timeout=6", ctl.USAGE, "read_timeout is given twice; leave one of them out"),
    ("-s {p}/absent status", ctl.REFUSED, "{p}/absent: No such file or directory; is it mounted, and with a monitor?"),
    ("-s {p}/absent check", ctl.UNKNOWN, "{p}/absent: No such file or directory; is it mounted, and with a monitor?"),
    ("-s {p}/dead status", ctl.REFUSED, "{p}/dead: Connection refused; is it mounted, and with a monitor?"),
    ("-s {p}/file check", ctl.UNKNOWN, "{p}/file: Connection refused; is it mounted"),
    ("-s {p}/mnt watch", ctl.REFUSED, "{p}/mnt: Connection refused; is it mounted"),
    ("-s {p}/loop list", ctl.REFUSED, "{p}/loop: Too many levels of symbolic links"),
    (f"-s /{'x' * 120} status", ctl.REFUSED, "a socket's name has 107 bytes at most; name the one that the mount was told by"),
    ("-m {p}/mnt status", ctl.REFUSED, "{p}/mnt has no monitor (/run/iohang/|.sock: |); is it the mount point of an iohang"),
    ("-m {p}/absent check", ctl.UNKNOWN, "{p}/absent has no monitor (/run/iohang/|); is it the mount point"),
    ("-s {p}/closes check", ctl.UNKNOWN, "{p}/closes: what listens there does not speak QMP (it ends the connection at once); "),
    ("-s {p}/ssh status", ctl.REFUSED, "{p}/ssh: what listens there does not speak QMP (|SSH-2.0|); name the monitor of a mount"),
    ("-s {p}/json status", ctl.REFUSED, "{p}/json: what listens there does not speak QMP (|); name the monitor of a mount"),
    ("-s {p}/qemu check", ctl.UNKNOWN, "{p}/qemu is no monitor of an iohang-mount, but QMP of 'Debian 1:7.2'; name that of "),
    ("-s {p}/mute check", ctl.UNKNOWN, "{p}/mute: no answer within 0.3 s; the server is stuck: see its log"),
]  # fmt: skip

LISTENERS = {"closes": (b"", False), "ssh": (b"SSH-2.0-OpenSSH_9.2\r\n", True), "json": (b'{"a": 1}\r\n', True),
             "qemu": (QEMU + b'{"return": {}}\r\n', True), "mute": (b"", True)}  # fmt: skip


@pytest.mark.parametrize(("arguments", "code", "says"), CTL)
def test_iohangctl(
    place: Path,
    arguments: str,
    code: int,
    says: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """docs/iohangctl.rst, EXIT STATUS. Of `check`, stdout has the line that a monitoring system shows."""
    monkeypatch.setattr(ctl, "ANSWER_S", 0.3)
    name = next((name for name in LISTENERS if f"/{name} " in arguments), None)
    words = ["" if word == "''" else word.format(p=place) for word in arguments.split()]
    if name is None:
        with nothing_is_done(place):
            found, out, err = run_here(ctl.main, words, capsys)
    else:
        data, stays = LISTENERS[name]
        with closing(Listener(place / name, data, stays=stays)):
            found, out, err = run_here(ctl.main, words, capsys)
    assert found == code
    check_line(err, "iohangctl", says.format(p=place))
    if code == ctl.UNKNOWN:
        assert out == f"IOHANG UNKNOWN - {err.removeprefix('iohangctl: ')}"
    else:
        assert out == ""


IOHANGCTL = [sys.executable, "-c", "import sys; from iohang_fuse.ctl import main; sys.exit(main())"]


@pytest.mark.parametrize("index", [0, 2, 7, 22, 23, 34])
def test_iohangctl_as_a_process(place: Path, index: int) -> None:
    """The same, as a shell sees it."""
    arguments, code, says = CTL[index]
    with closing(Listener(place / "qemu", *LISTENERS["qemu"][:1], stays=True)):
        command = [*IOHANGCTL, *arguments.format(p=place).split()]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == code
    check_line(done.stderr, "iohangctl", says.format(p=place))


def test_check_never_says_hanging_by_accident(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """docs/iohangctl.rst: "Whatever goes wrong, it is never 1 or 2"; Python's own exit code for what nobody foresaw is 1."""

    def bug(_given: object) -> Path:
        raise ZeroDivisionError("a\nb")

    monkeypatch.setattr(ctl, "find_socket", bug)
    assert ctl.main(["check"]) == ctl.UNKNOWN
    said = capsys.readouterr()
    check_line(said.err, "iohangctl", r"a bug of iohangctl, please report it: ZeroDivisionError: a\nb")
    assert said.out.startswith("IOHANG UNKNOWN - a bug of iohangctl")
    assert ctl.main(["status"]) == ctl.REFUSED
    check_line(capsys.readouterr().err, "iohangctl", "ZeroDivisionError")


# ---- iohangctl and QMP, of a mount that serves


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mount]:
    """A mount with two open images, one of which has a name that is none for a terminal."""
    folder = tmp_path_factory.mktemp("served")
    (folder / "src").mkdir()
    names = ["a.img", "b\n\x1b[2J.img"]
    for name in names:
        (folder / "src" / name).write_bytes(b"x" * 4096)
    with Mount(folder / "src", folder / "mnt", f"monitor={folder / 'm.sock'}", log=folder / "log") as mount_:
        open_ = [os.open(folder / "mnt" / name, os.O_RDONLY) for name in names]
        yield mount_
        for fd in open_:
            os.close(fd)


def execute(mount_: Mount, command: str, arguments: dict[str, object]) -> Any:
    async def once() -> Any:
        client = QMPClient("test")
        await client.connect(str(mount_.mountpoint.parent / "m.sock"))
        try:
            return await client.execute(command, arguments)
        finally:
            await client.disconnect()

    return asyncio.run(once())


@contextmanager
def the_policy_stays(mount_: Mount) -> Iterator[None]:
    """Neither timeouts nor interval nor holding are changed, of no image and of none to come."""
    execute(mount_, "io-hang-set", {"timeout": 123, "interval": 7})
    yield
    for image in (*execute(mount_, "io-hang-set", {"timeout": 123}), *execute(mount_, "io-hang-set", {"interval": 7})):
        assert {image[f"{op}-timeout"] for op in ("read", "write", "fsync")} == {123}
        assert image["interval"] == 7
    assert execute(mount_, "query-status", {})["holding"]


ORDERS = [
    ("retry nosuch", "no image 'nosuch' is open here"),
    ("drain a.imgg", "no image 'a.imgg' is open here; the nearest is 'a.img'"),
    ("fail ''", "no image '' is open here"),
    ("pause /a.img", "no image '/a.img' is open here; the nearest is 'a.img'"),
    ("unpause A.IMG", "no image 'A.IMG' is open here"),
    ("list x", "no image 'x' is open here"),
    ("held x", "no image 'x' is open here"),
    ("set x timeout=5", "no image 'x' is open here"),
    ("set timeout=60x", "Invalid parameter 'timeout': '60x' is no span of time; say 90 (seconds)"),
    ("set timeout=", "Invalid parameter 'timeout': '' is no span of time"),
    ("set timeout=-1", "Invalid parameter 'timeout': '-1' is no span of time"),
    ("set read_timeout=nan", "Invalid parameter 'read-timeout': 'nan' is no span of time"),
    ("set fsync_timeout=9999999d", "Invalid parameter 'fsync-timeout': '9999999d' is more than ten years; say 3650d at most"),
    ("set interval=0", "Invalid parameter 'interval': '0' is no interval; say at least 0.1 s"),
    ("set interval=inf", "Invalid parameter 'interval': 'inf' is no interval; say at least 0.1 s"),
    ("set timeout=5 interval=soon", "Invalid parameter 'interval': 'soon' is no span of time"),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "says"), ORDERS)
def test_a_bad_order(served: Mount, arguments: str, says: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Issue: "arguments checked before any effect"."""
    words = ["" if word == "''" else word for word in arguments.split()]
    with the_policy_stays(served):
        code, out, err = run_here(ctl.main, ["-s", str(served.mountpoint.parent / "m.sock"), *words], capsys)
    assert (code, out) == (ctl.REFUSED, "")
    check_line(err, "iohangctl", says)


COMMANDS: list[tuple[str, dict[str, object], str]] = [
    ("query-io-hang", {"image": 7}, "Invalid parameter 'image': expected: string"),
    ("query-io-hang", {"image": None}, "Invalid parameter 'image': expected: string"),
    ("query-io-hang", {"images": "a.img"}, "Parameter 'images' is unexpected"),
    ("query-status", {"image": "a.img"}, "Parameter 'image' is unexpected"),
    ("query-held", {"limit": 0}, "Invalid parameter 'limit': expected: a number from 1 on"),
    ("query-held", {"limit": True}, "Invalid parameter 'limit': expected: a number from 1 on"),
    ("query-held", {"limit": 1.5}, "Invalid parameter 'limit': expected: a number from 1 on"),
    ("query-held", {"limit": "5"}, "Invalid parameter 'limit': expected: a number from 1 on"),
    ("io-hang-fail", {"image": ["a.img"]}, "Invalid parameter 'image': expected: string"),
    ("io-hang-fail", {"image": "x" * 5000}, "no image "),
    ("io-hang-set", {}, "nothing to set; say one of"),
    ("io-hang-set", {"image": "a.img"}, "nothing to set; say one of"),
    ("io-hang-set", {"timeout": True}, "Invalid parameter 'timeout': expected: seconds, or a span of time"),
    ("io-hang-set", {"timeout": None}, "Invalid parameter 'timeout': expected: seconds, or a span of time"),
    ("io-hang-set", {"timeout": [5]}, "Invalid parameter 'timeout': expected: seconds, or a span of time"),
    ("io-hang-set", {"timeout": -5}, "Invalid parameter 'timeout': -5 is no span of time"),
    ("io-hang-set", {"timeout": 1e300}, "Invalid parameter 'timeout': 1e+300 is no span of time"),
    ("io-hang-set", {"interval": 0.05}, "Invalid parameter 'interval': 0.05 is no interval; say at least 0.1 s"),
    ("io-hang-set", {"timeout": 5, "frob": 1}, "Parameter 'frob' is unexpected"),
    ("io-hang-set", {"timeout": 5, "image": "nosuch"}, "no image 'nosuch' is open here"),
    ("io-hang-hold", {}, "The command 'io-hang-hold' has not been found"),
    ("quit", {"force": True}, "Parameter 'force' is unexpected"),
]  # fmt: skip


@pytest.mark.parametrize(("command", "arguments", "says"), COMMANDS)
def test_a_bad_command(served: Mount, command: str, arguments: dict[str, object], says: str) -> None:
    """docs/monitor.rst: "Wrong arguments are refused before anything is done"."""
    with the_policy_stays(served), pytest.raises(ExecuteError) as caught:
        execute(served, command, arguments)
    assert says in str(caught.value)
    assert len(str(caught.value)) < 600
    assert "\n" not in str(caught.value)


def test_names_that_are_none_for_a_terminal(served: Mount) -> None:
    """A line is a line: what iohangctl prints of a name does not act on the terminal; `--json` has it as it is."""
    command = [*IOHANGCTL, "-s", str(served.mountpoint.parent / "m.sock"), "list"]
    plain = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert r"b\n\x1b[2J.img" in plain.stdout
    assert len(plain.stdout.splitlines()) == 3
    quoted = subprocess.run([*command[:-1], "--json", "list"], capture_output=True, text=True, timeout=60, check=True)
    assert [image["image"] for image in json.loads(quoted.stdout)] == ["a.img", "b\n\x1b[2J.img"]


def test_a_reader_that_goes_away_is_no_error(served: Mount) -> None:
    """`iohangctl list | head -0` prints no traceback."""
    command = [*IOHANGCTL, "-s", str(served.mountpoint.parent / "m.sock"), "list"]
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True, timeout=60, check=False)
    os.close(write)
    assert (done.returncode, done.stderr) == (0, "")
