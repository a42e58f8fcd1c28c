"""The same of iohangctl and of the monitor's commands: what is wrong with an order is one line, and nothing is done.

docs/iohangctl.rst, EXIT STATUS: "What is wrong is one line on stderr that names it and says what would be right".
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
from typing import TYPE_CHECKING, Any

import pytest
from qemu.qmp import ExecuteError, QMPClient

from iohang_fuse import client, ctl
from tests.harness import Mount
from tests.interop.one_line import check_line, make_place, nothing_is_done, run_here

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture
def place(tmp_path: Path) -> Path:
    return make_place(tmp_path)


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
    monkeypatch.setattr(client, "ANSWER_S", 0.3)
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
