"""fio writes at depth 32 and verifies every block, with and without outages beneath the mount, then in SOURCE itself."""

from __future__ import annotations

import json
import subprocess
from typing import TYPE_CHECKING, Any

import pytest

from tests.harness import Mount, wait_until

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.interop.conftest import Rig

    Fio = Callable[..., subprocess.Popen[str]]

SIZE = 64 << 20
OUTAGE_S = 3.0
AFTERWARDS = ("--do_verify=0",)
MEANWHILE = ("--verify_backlog=64", "--verify_backlog_batch=32")  # reads what it has written while it writes on
VERIFY_ONLY = ("--verify_only",)


@pytest.fixture
def fio(program: Callable[[str, str], str], tmp_path: Path) -> Fio:
    """`fio(path, *arguments)`: fio at work on the file *path*, 32 requests at once and past the page cache."""
    binary = program("fio", "fio")

    def start(path: Path, *arguments: str) -> subprocess.Popen[str]:
        command = [
            binary,
            "--name=job",
            f"--filename={path}",
            f"--size={SIZE}",
            "--rw=randwrite",
            "--bsrange=4k-64k",
            "--ioengine=libaio",
            "--iodepth=32",
            "--direct=1",
            "--fallocate=none",
            "--verify=crc32c",
            "--verify_fatal=1",
            "--randseed=2020",
            "--output-format=json",
            *arguments,
        ]
        return subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    return start


def result(process: subprocess.Popen[str], *directions: str) -> Any:
    """The report on fio's one job, which has met no error and transferred a file's worth in *directions*."""
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, out + err
    assert not err, err
    job = json.loads(out[out.index("{") :])["jobs"][0]
    assert job["error"] == 0, out
    for direction in directions:
        assert job[direction]["io_bytes"] == SIZE, f"{direction}: {out}"
    return job


def create(image: Path) -> None:
    """A sparse image of full size: the kernel lets requests that make a file grow go one at a time."""
    with image.open("wb") as file:
        file.truncate(SIZE)


def longest_s(job: Any, direction: str) -> float:
    return float(job[direction]["clat_ns"]["max"]) / 1e9


@pytest.mark.parametrize("verified", [AFTERWARDS, MEANWHILE], ids=["afterwards", "meanwhile"])
def test_every_block_is_right(fio: Fio, disk_path: Path, tmp_path: Path, verified: tuple[str, ...]) -> None:
    source = disk_path / "source"
    source.mkdir()
    create(source / "disk.img")
    with Mount(source, disk_path / "mnt", "monitor=none", log=tmp_path / "log") as mount:
        result(fio(mount.mountpoint / "disk.img", *verified), "write")
        result(fio(mount.mountpoint / "disk.img", *VERIFY_ONLY), "read")
    result(fio(source / "disk.img", *VERIFY_ONLY), "read")


@pytest.mark.parametrize("verified", [AFTERWARDS, MEANWHILE], ids=["afterwards", "meanwhile"])
def test_outages_are_a_pause_and_every_block_is_right(fio: Fio, rig: Rig, verified: tuple[str, ...]) -> None:
    """P1 for a consumer with 32 requests in flight: it sees no error, only requests that take as long as the outage."""
    on_disk = rig.disk / "disk.img"
    create(on_disk)
    with rig.outage(OUTAGE_S):
        writer = fio(rig.mount.mountpoint / "disk.img", *verified)
    wait_until(
        lambda: writer.poll() is not None or on_disk.stat().st_blocks * 512 > SIZE / 8,
        what="fio to write after the outage",
    )
    with rig.outage(OUTAGE_S):
        assert writer.poll() is None, f"fio had ended before its second outage: {writer.communicate()}"
    job = result(writer, "write")
    assert longest_s(job, "write") > OUTAGE_S - 1
    assert "32 requests at most" in rig.mount.log_text(), rig.mount.log_text()

    with rig.outage(OUTAGE_S):
        reader = fio(rig.mount.mountpoint / "disk.img", *VERIFY_ONLY)
    job = result(reader, "read")
    assert longest_s(job, "read") > OUTAGE_S - 1

    result(fio(on_disk, *VERIFY_ONLY), "read")
