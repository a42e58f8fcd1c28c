"""An open(2) of SOURCE that does not return, on the real mount: as on NFS 4 in an outage, and in a server's grace period."""

from __future__ import annotations

import concurrent.futures
import errno
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.harness import wait_until
from tests.mount.test_outage import BLOCK, BUSY_S, CALLS, Site, aligned, timed

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.harness import Mount

CUT_OFF = "data vm.img errno=EIO"
WAITS = "open vm.img hang"


@pytest.fixture
def worker() -> Iterator[concurrent.futures.ThreadPoolExecutor]:
    """To be asked for before `site`, whose end lets everything return."""
    with concurrent.futures.ThreadPoolExecutor(10) as pool:
        yield pool


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    site = Site(tmp_path)
    try:
        yield site
    finally:
        site.end()


def opens_under_way(mount: Mount) -> int:
    """How many of the server's threads are inside openat(2)."""
    found = 0
    for task in Path(f"/proc/{mount.pid}/task").iterdir():
        with (task / "syscall").open() as file:
            words = file.read().split()
        # Of its arguments the second is a path, which is not ours to read; the third has the flags.
        found += words[0] == OPENAT and bool(int(words[3], 16) & os.O_CLOEXEC)
    return found


OPENAT = {"x86_64": "257", "aarch64": "56"}[os.uname().machine]  # asm/unistd.h


@pytest.mark.parametrize("operation", CALLS)
def test_it_keeps_no_request_from_its_deadline(worker: concurrent.futures.Executor, site: Site, operation: str) -> None:
    """P1: "Bound: timeout + at most one attempt", P8: "No request is held longer than its bound"."""
    site.image()
    mount = site.mount("timeout=3", "interval=0.2", "blocked_after=1")
    fd = site.open()
    assert os.pwrite(fd, aligned(bytes(BLOCK)), BLOCK) == BLOCK  # so that an fsync has something to write again
    site.flaky.fail(CUT_OFF, WAITS)
    pending = worker.submit(timed, lambda: CALLS[operation](fd, aligned(bytes(BLOCK))))
    wait_until(lambda: opens_under_way(mount), what="the file to be opened anew")
    concurrent.futures.wait([pending], 40)
    assert pending.done()
    result, took_s = pending.result()
    assert result == errno.EIO
    assert 3 <= took_s < 3 + BUSY_S
    assert opens_under_way(mount) == 1, "it goes on"
    site.flaky.heal()
    wait_until(lambda: not opens_under_way(mount), what="it to return")
    wait_until(lambda: "works again" in mount.log_text(), what="the probe to notice")
    assert CALLS[operation](fd, aligned(bytes(BLOCK))) in {BLOCK, None}
    assert "a bug in" not in mount.log_text()


@pytest.mark.parametrize("operation", ["read", "write"])
def test_the_old_descriptor_is_tried_meanwhile(worker: concurrent.futures.Executor, site: Site, operation: str) -> None:
    """P1: "answered only when it succeeds": what is open works in a grace period, although a new open(2) waits."""
    site.image()
    mount = site.mount("timeout=120", "interval=0.2", "blocked_after=1")
    fd = site.open()
    assert os.pwrite(fd, aligned(bytes(BLOCK)), BLOCK) == BLOCK  # the first one has a descriptor for syncs opened
    site.flaky.fail(CUT_OFF, WAITS)
    block = aligned(os.urandom(BLOCK))
    pending = worker.submit(timed, lambda: CALLS[operation](fd, block))
    wait_until(lambda: opens_under_way(mount), what="the file to be opened anew")
    site.flaky.fail(WAITS)
    concurrent.futures.wait([pending], 40)
    assert pending.done()
    assert pending.result()[0] == BLOCK
    assert opens_under_way(mount) == 1
    if operation == "write":
        assert (site.real / "vm.img").read_bytes()[:BLOCK] == bytes(block)
    wait_until(lambda: "recovered after" in mount.log_text(), what="the hang's end")


def test_the_second_sigterm_does_not_wait_for_it(site: Site) -> None:
    """P8: "ends what is held with its error ... and waits for writes inside a system call": this one is in none."""
    site.image()
    mount = site.mount("timeout=inf", "interval=0.2", "blocked_after=600")
    image = str(mount.mountpoint / "vm.img")
    script = f"import os; os.pwrite(os.open({image!r}, os.O_WRONLY), b'x', 0)"
    site.flaky.fail(CUT_OFF)  # the consumer's own open(2) must not wait
    with subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.PIPE, text=True) as consumer:
        wait_until(lambda: "failed with EIO" in mount.log_text(), what="the write to be held")
        site.flaky.fail(CUT_OFF, WAITS)
        try:
            wait_until(lambda: opens_under_way(mount), what="the file to be opened anew")
            mount.process.send_signal(signal.SIGTERM)
            wait_until(lambda: "in use by" in mount.log_text(), what="who holds it")
            mount.process.send_signal(signal.SIGTERM)
            wait_until(lambda: consumer.poll() is not None, what="the write to be answered")
            wait_until(lambda: "is unmounted" in mount.log_text(), what="the end")
            assert opens_under_way(mount) == 1
        finally:
            site.flaky.heal()  # NFS lets a thread that ends go, and FUSE does not
        assert consumer.stderr is not None
        assert "Input/output error" in consumer.stderr.read()
    assert mount.process.wait(60) == 0
