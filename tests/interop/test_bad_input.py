"""Whatever is wrong with what a user says: one line that names it, where it stands, and what would be right; and nothing is done.

Issue: "Each bad option, bad YAML, bad argument: one clear line, exit code as documented; a table-driven test over at least 60 of
them". What is found before anything is done runs in this process, and some of each table again as a process of its own.
"""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from iohang_fuse import cli, mount, socketname
from tests.interop.one_line import check_line, make_place, nothing_is_done, run_here

if TYPE_CHECKING:
    from collections.abc import Iterator

USAGE, SYSTEM, FAILURE = 1, 2, 32  # docs/iohang-mount.rst, EXIT STATUS


@pytest.fixture
def place(tmp_path: Path) -> Path:
    return make_place(tmp_path)


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
    ("source: /srv\n", 1, "source is no option but an argument; leave it out"),
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
        left = {path.name for path in place.iterdir()} - {socketname.LOCK}  # which stays
        assert left == {"dead", "file", "loop", "mnt", "src"}
        assert (place / "file").read_text() == "precious"


@contextmanager
def as_nobody() -> Iterator[None]:
    """As somebody else than root, whom nothing is forbidden; wherever this tree lies, all that is needed of it is imported."""
    groups = os.getgroups()
    os.setgroups([])
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)
        os.setgroups(groups)


@pytest.mark.usefixtures("never_mounts")
def test_a_file_that_may_not_be_read(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """docs/iohang-mount.rst, EXIT STATUS: "1: wrong usage: an argument, an option, or the configuration file"."""
    (place / "iohang.yaml").write_text("timeout: 5x\n")
    place.chmod(0o755)
    monkeypatch.chdir(place)
    path = "/proc/self/cwd/iohang.yaml"  # whatever lies above may be closed to others
    with as_nobody():
        code, out, err = run_here(cli.main, ["src", "mnt", "-c", path], capsys)
    check_line(err, "iohang-mount", f"{path}:1: timeout: '5x'")
    (place / "iohang.yaml").chmod(0)
    with nothing_is_done(place), as_nobody():
        code, out, err = run_here(cli.main, ["src", "mnt", "-c", path], capsys)
    assert (code, out) == (USAGE, "")
    check_line(err, "iohang-mount", f"{path} cannot be read: Permission denied; name a readable file")


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
