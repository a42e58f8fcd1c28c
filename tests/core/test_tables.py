"""The tables and command lines that doctor reads: mountinfo, fstab, NFS options, QEMU's arguments."""

from __future__ import annotations

import json
import math

import pytest

from iohang_fuse.doctor import nfs, qemu
from iohang_fuse.doctor.qemu import Disk, Qemu
from iohang_fuse.mounttable import (
    Mounted,
    Planned,
    holding,
    is_mounted,
    lies_in,
    parse_fstab,
    parse_mount_id,
    parse_mountinfo,
    plan_for,
)

MOUNTINFO = r"""22 1 253:0 / / rw,relatime shared:1 - ext4 /dev/vda rw,discard
31 22 0:44 / /srv/nfs rw,relatime shared:9 - autofs systemd-1 rw,fd=50
40 31 0:52 / /srv/nfs rw,relatime shared:11 - nfs4 server:/vm rw,vers=4.2,soft,proto=tcp,timeo=600,retrans=2,addr=10.0.0.1
41 22 0:53 / /srv/with\040space rw - tmpfs tmpfs rw
"""

FSTAB = """
# a comment
UUID=abc /              ext4  defaults 0 1
UUID=def none           swap  sw
server:/vm   /srv/nfs/  nfs   soft,_netdev 0 0
tmpfs /srv/with\\040space tmpfs
"""


def test_the_mount_table_is_read() -> None:
    """proc(5): the mount point with its escapes, the topmost of several on one place, options of the mount and the file system."""
    table = parse_mountinfo(MOUNTINFO)
    assert [each.mountpoint for each in table] == ["/", "/srv/nfs", "/srv/nfs", "/srv/with space"]
    nfs4 = holding("/srv/nfs/vm", table)
    assert nfs4 is not None
    assert (nfs4.fstype, nfs4.source, nfs4.device_minor, nfs4.mount_id) == ("nfs4", "server:/vm", 52, 40)
    assert {"relatime", "soft", "timeo=600"} <= {*nfs4.options}
    root = holding("/srv/nfsx", table)
    assert root is not None
    assert root.mountpoint == "/"


def test_which_mount_an_open_file_lies_on() -> None:
    """proc(5): mnt_id in /proc/PID/fdinfo."""
    assert parse_mount_id("pos:\t0\nflags:\t012000000\nmnt_id:\t40\nino:\t2\n") == 40
    assert parse_mount_id("pos:\t0\n") == 0


def test_fstab_is_read() -> None:
    """fstab(5): what is mounted on directories; `/` is always, and swap nowhere."""
    planned = parse_fstab(FSTAB)
    assert planned == [
        Planned("server:/vm", "/srv/nfs", "nfs", ("soft", "_netdev")),
        Planned("tmpfs", "/srv/with space", "tmpfs"),
    ]
    assert plan_for("/srv/nfs/vm/deeper", planned) == planned[0]
    assert plan_for("/srv/nfs", planned) == planned[0]
    assert plan_for("/srv", planned) is None
    nested = Planned("server:/deep", "/srv/nfs/vm", "nfs")
    assert plan_for("/srv/nfs/vm/deeper", [*planned, nested]) == nested


def test_an_automount_that_waits_is_not_mounted() -> None:
    """An autofs stands on a mount point until somebody comes by."""
    waiting = [Mounted("/srv/nfs", 44, "autofs", "systemd-1")]
    assert not is_mounted("/srv/nfs", waiting)
    assert is_mounted("/srv/nfs", [*waiting, Mounted("/srv/nfs", 52, "nfs4", "server:/vm")])


def test_paths_lie_in_folders_by_whole_names() -> None:
    """/srv/nfsx does not lie in /srv/nfs."""
    assert lies_in("/srv/nfs", "/srv/nfs")
    assert lies_in("/srv/nfs/a", "/srv/nfs")
    assert lies_in("/srv", "/")
    assert not lies_in("/srv/nfsx", "/srv/nfs")


@pytest.mark.parametrize(
    ("options", "error", "error_s", "first_s"),
    [
        ("vers=3,soft,proto=tcp,timeo=600,retrans=2", "EIO", 180, 180),  # nfs(5): "after about 180 s"
        ("vers=3,soft,proto=tcp,timeo=10,retrans=1", "EIO", 2, 2),  # seen: 2 s
        ("vers=4.2,soft,proto=tcp,timeo=10,retrans=1", "EIO", 2, 92),  # seen: 92 s, then 2 s
        ("vers=4.2,softerr,proto=tcp6,timeo=10,retrans=1", "ETIMEDOUT", 2, 92),
        ("vers=4.1,hard,proto=tcp,timeo=600,retrans=2", None, math.inf, math.inf),
        ("vers=3", None, math.inf, math.inf),  # hard is the default
        ("vers=3,soft", "EIO", 180, 180),  # the defaults of TCP
        ("vers=3,soft,timeo=6000,retrans=5", "EIO", 600, 600),  # "up to the maximum of 600 seconds"
        ("vers=3,soft,proto=udp", "EIO", 8.8, 8.8),
        ("vers=3,soft,proto=udp,timeo=600", "EIO", 60, 60),
        ("vers=3,soft,proto=rdma,timeo=50,retrans=0", "EIO", 5, 5),
    ],
)
def test_when_nfs_gives_its_first_error(options: str, error: str | None, error_s: float, first_s: float) -> None:
    """nfs(5): TCP's linear backoff, `retrans` times after the first `timeo`; NFS 4's first one waits for TCP."""
    found = nfs.parse(options.split(","))
    assert (found.error, found.error_s, found.first_error_s) == (error, pytest.approx(error_s), pytest.approx(first_s))


# ---- QEMU

BLOCKDEV = json.dumps({"driver": "file", "filename": "/mnt/iohang/a.qcow2", "node-name": "file0"})
FORMAT = json.dumps({"driver": "qcow2", "file": "file0", "node-name": "format0", "read-only": False})


@pytest.mark.parametrize(
    ("arguments", "disks"),
    [
        ("-drive file=/mnt/iohang/a.img,format=raw,if=virtio", [Disk("/mnt/iohang/a.img", "virtio", "enospc", "report")]),
        ("-drive file=/mnt/iohang/a.img,werror=stop,rerror=stop", [Disk("/mnt/iohang/a.img", "ide", "stop", "stop")]),
        (
            "-drive file=/mnt/iohang/a.img,if=none,id=d,werror=report -device scsi-hd,drive=d,rerror=stop",
            [Disk("/mnt/iohang/a.img", "scsi-hd", "report", "stop")],
        ),
        (
            f"-blockdev§{BLOCKDEV}§-blockdev§{FORMAT}§-device§"
            + json.dumps({"driver": "virtio-blk-pci", "drive": "format0", "werror": "stop", "rerror": "stop"}),
            [Disk("/mnt/iohang/a.qcow2", "virtio-blk-pci", "stop", "stop")],
        ),
        (
            "-blockdev driver=raw,file.driver=file,file.filename=/mnt/iohang/a,,b.img,node-name=n -device nvme,drive=n,serial=1",
            [Disk("/mnt/iohang/a,b.img", "nvme", "enospc", "report")],
        ),
        ("-drive file=/mnt/iohangx/a.img", []),
        ("-drive file=/srv/a.img -cdrom /mnt/iohang/cd.iso -blockdev {broken", []),
        ("-drive", []),
    ],
)  # fmt: skip
def test_qemus_disks(arguments: str, disks: list[Disk]) -> None:
    """Both spellings, with QEMU's defaults for what is not said; disks elsewhere are none of ours."""
    words = ["/usr/bin/qemu-system-x86_64", "-name", "guest=vm1,debug-threads=on"]
    words += arguments.split("§" if "§" in arguments else " ")
    found = qemu.parse(7, words, "/mnt/iohang")
    assert found == (Qemu(7, "vm1", tuple(disks)) if disks else None)


@pytest.mark.parametrize("program", ["qemu-img", "/usr/bin/vim", "virtqemud", ""])
def test_who_is_no_qemu(program: str) -> None:
    """A program of another name that names a file on the mount is no guest."""
    assert qemu.parse(7, [program, "-drive", "file=/mnt/iohang/a.img"], "/mnt/iohang") is None
    assert qemu.parse(7, [], "/mnt/iohang") is None
