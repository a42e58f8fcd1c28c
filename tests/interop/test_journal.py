"""The log in a real journal: systemd-journald in a mount namespace of its own, and journalctl that asks for fields.

Nothing of the host is touched: /etc, /run, /var/log and /dev/log's target are the namespace's.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest

from iohang_fuse.messages import KINDS
from tests.harness import wait_until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

JOURNALD = """
set -e
# Other tests' mounts would have a copy here, and their servers wait for the last copy to go.
grep ' - fuse.iohang' /proc/self/mountinfo | cut -d' ' -f5 | while read -r at; do umount -l "$at"; done
mount -t tmpfs none /run
mount -t tmpfs none /var/log
mkdir /run/etc /run/etc/upper /run/etc/work
mount -t overlay overlay -o lowerdir=/etc,upperdir=/run/etc/upper,workdir=/run/etc/work /etc
mkdir -p /run/systemd/journal /run/systemd/journald.conf.d /run/log/journal
printf '[Journal]\\nStorage=volatile\\nReadKMsg=no\\nRateLimitBurst=0\\n' >/run/systemd/journald.conf.d/test.conf
rm -f /etc/machine-id  # which may be a link
printf 3d1219c7c4c5404aaa1f6d2a48adfda4 >/etc/machine-id
exec /lib/systemd/systemd-journald
"""


class Namespace:
    """A mount namespace with a journal."""

    def __init__(self, pid: int) -> None:
        self._enter = ["nsenter", "-m", f"-w{os.getcwd()}", "-t", str(pid)]

    def run(self, *command: str, timeout_s: float = 60) -> str:
        done = subprocess.run([*self._enter, *command], capture_output=True, text=True, timeout=timeout_s, check=False)
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout

    def start(self, *command: str, log: Path) -> subprocess.Popen[bytes]:
        with log.open("wb") as out:
            return subprocess.Popen([*self._enter, *command], stdin=subprocess.DEVNULL, stdout=out, stderr=out)

    def entries(self, *fields: str) -> list[dict[str, Any]]:
        """What journalctl finds."""
        lines = self.run("journalctl", "-o", "json", "--all", "--no-pager", *fields).splitlines()
        return [json.loads(line) for line in lines]


@pytest.fixture
def namespace(program: Callable[..., str]) -> Iterator[Namespace]:
    for name in ("unshare", "nsenter"):
        program(name, "util-linux")
    program("/lib/systemd/systemd-journald", "systemd")
    command = ["unshare", "-m", "--propagation", "slave", "sh", "-c", JOURNALD]
    with subprocess.Popen(command, stdin=subprocess.DEVNULL) as journald:
        made = Namespace(journald.pid)
        try:
            wait_until(lambda: _is_up(journald, made), what="systemd-journald")
            yield made
        finally:
            journald.terminate()
            journald.wait(20)


def _is_up(journald: subprocess.Popen[bytes], namespace: Namespace) -> bool:
    assert journald.poll() is None
    try:
        namespace.run("sh", "-c", "[ -S /run/systemd/journal/socket ]")
    except AssertionError:
        return False
    return True


def iohang(module: str, *arguments: str | Path) -> list[str]:
    return [sys.executable, "-m", f"iohang_fuse.{module}", *map(str, arguments)]


@pytest.fixture
def source(namespace: Namespace, tmp_path: Path) -> Iterator[Path]:
    """A flaky source in the namespace; `trigger` beside it is its trigger."""
    for name in ("real", "src", "mnt"):
        (tmp_path / name).mkdir()
    (tmp_path / "real" / "a.img").write_bytes(bytes(1 << 20))
    command = iohang("flaky", tmp_path / "real", tmp_path / "src", tmp_path / "trigger")
    with namespace.start(*command, log=tmp_path / "flaky.log") as flaky:
        try:
            wait_until(lambda: "is served" in (tmp_path / "flaky.log").read_text(), what="the flaky source")
            yield tmp_path / "src"
        finally:
            flaky.terminate()
            flaky.wait(20)


def an_outage(namespace: Namespace, tmp_path: Path) -> None:
    """One read is held, and succeeds."""
    (tmp_path / "trigger").write_text("data a.img errno=EIO\n")
    reading = ["dd", f"if={tmp_path}/mnt/a.img", "of=/dev/null", "bs=4096", "count=1"]
    with namespace.start(*reading, log=tmp_path / "dd.log") as consumer:
        try:
            wait_until(lambda: namespace.entries("IOHANG_EVENT=hang-begin"), what="the hang's begin in the journal")
        finally:
            (tmp_path / "trigger").unlink()
        assert consumer.wait(30) == 0
    wait_until(lambda: namespace.entries("IOHANG_EVENT=hang-end"), what="the hang's end in the journal")


def check_entries(namespace: Namespace, tmp_path: Path) -> None:
    (begun,) = namespace.entries(f"MESSAGE_ID={KINDS['hang-begin']}", "IOHANG_IMAGE=a.img")
    assert (
        begun.items()
        >= {
            "PRIORITY": "4",
            "SYSLOG_IDENTIFIER": "iohang-mount",
            "IOHANG_ERRNO": "EIO",
            "ERRNO": "5",
            "IOHANG_OP": "read",
            "IOHANG_MOUNTPOINT": str(tmp_path / "mnt"),
            "_TRANSPORT": "journal",
        }.items()
    )
    assert begun["MESSAGE"].startswith("a.img: read failed with EIO (Input/output error); held since ")
    (ended,) = namespace.entries("IOHANG_EVENT=hang-end")
    assert ended["_PID"] == begun["_PID"]
    assert float(ended["IOHANG_DURATION_S"]) > 0


def test_in_the_background_the_journal_has_fields(namespace: Namespace, source: Path, tmp_path: Path) -> None:
    """Issue: "one line at a hang's begin, one at its end [...]; the journal's fields where there is one"."""
    namespace.run(*iohang("cli", source, tmp_path / "mnt", "-o", "interval=0.2,monitor=none"))
    try:
        an_outage(namespace, tmp_path)
        check_entries(namespace, tmp_path)
        asked = ("-t", "iohang-mount", "-p", "warning")
        kinds = [entry["IOHANG_EVENT"] for entry in namespace.entries(*asked, "IOHANG_IMAGE=a.img")]
        assert kinds[:2] == ["hang-begin", "hang-end"], "found by image and priority"
        assert all(entry.get("IOHANG_IMAGE") == "a.img" for entry in namespace.entries(*asked)), (
            "nothing of another one"
        )
    finally:
        namespace.run("umount", "-l", str(tmp_path / "mnt"))


def test_in_a_unit_stderr_is_the_journal(namespace: Namespace, source: Path, tmp_path: Path) -> None:
    """The same in the foreground, where systemd says by JOURNAL_STREAM that stderr is the journal's."""
    start = shlex.join(iohang("cli", source, tmp_path / "mnt", "-f", "-o", "interval=0.2,monitor=none"))
    stream = "JOURNAL_STREAM=$(stat -L -c %d:%i /proc/self/fd/2)"
    with namespace.start("systemd-cat", "sh", "-c", f"{stream} exec {start}", log=tmp_path / "cat.log") as server:
        try:
            wait_until(lambda: any("is served at" in str(e["MESSAGE"]) for e in namespace.entries()), what="the mount")
            an_outage(namespace, tmp_path)
            check_entries(namespace, tmp_path)
        finally:
            server.terminate()
            assert server.wait(30) == 0
    wait_until(lambda: any("is unmounted" in str(e["MESSAGE"]) for e in namespace.entries()), what="its last line")
    assert {entry["_TRANSPORT"] for entry in namespace.entries("-t", "iohang-mount")} == {"journal"}


LONG = """
import logging, sys
from iohang_fuse import logs
with logs.to_syslog_or(None, level=logging.INFO):
    name = "a\\nPRIORITY=0\\n" + "x" * 400_000
    logging.getLogger("iohang_fuse").error("%s", name, extra={"fields": {"IOHANG_IMAGE": name, "IOHANG_EVENT": "long"}})
"""


def test_what_is_too_long_for_a_datagram_arrives(namespace: Namespace) -> None:
    """The sealed file is as journald wants it."""
    namespace.run(sys.executable, "-c", LONG)
    wait_until(lambda: namespace.entries("IOHANG_EVENT=long"), what="the long entry")
    (entry,) = namespace.entries("IOHANG_EVENT=long")
    assert len(entry["IOHANG_IMAGE"]) == 400_000 + len("a\nPRIORITY=0\n")
    assert entry["MESSAGE"].startswith(r"a\nPRIORITY=0\nxxx")
    assert entry["PRIORITY"] == "3"
