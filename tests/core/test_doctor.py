"""What doctor says of which facts: each finding seen, with its level and with what to do."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import pytest

from iohang_fuse.doctor import findings, nfs
from iohang_fuse.doctor.examination import examine, longest_wait_s
from iohang_fuse.doctor.facts import Facts, Host, Limit, Served, Settings
from iohang_fuse.doctor.findings import Finding, Level
from iohang_fuse.doctor.qemu import Disk, Qemu
from iohang_fuse.mounttable import Mounted, Planned, Sight

OK, ADVICE, WARNING, PROBLEM = Level
ROOT = Mounted("/", 1, "ext4", "/dev/vda", ("rw", "relatime"))
SHORT = ("rw", "vers=3", "soft", "proto=tcp", "timeo=50", "retrans=2")
FSTAB = Planned("server:/vm", "/srv/nfs", "nfs", ("soft",))


def nfs_mount(*options: str) -> Mounted:
    return Mounted("/srv/nfs", 50, "nfs4" if "vers=4.2" in options else "nfs", "server:/vm", options)


GOOD = Facts(
    source="/srv/nfs/vm",
    mountpoint="/mnt/iohang",
    settings=Settings(mount_words=("allow_other",)),
    sight=Sight("/srv/nfs/vm", empty=False),
    table=(ROOT, nfs_mount(*SHORT)),
    planned=(FSTAB,),
    host=Host(memory_available_bytes=8 << 30),
    served=Served(answers=True, engine="uring", images=3, max_background=4096),
    monitor="/run/iohang/mnt-iohang.sock",
)
BEFORE = dataclasses.replace(GOOD, served=None)


def with_(facts: Facts = GOOD, **changes: Any) -> Facts:
    """*facts* with other settings, host or server (`host__is_root=False`), or other facts."""
    nested: dict[str, dict[str, Any]] = {}
    for key, value in changes.items():
        outer, _, inner = key.rpartition("__")
        nested.setdefault(outer, {})[inner] = value
    direct = nested.pop("", {})
    parts = {outer: dataclasses.replace(getattr(facts, outer), **inner) for outer, inner in nested.items()}
    return dataclasses.replace(facts, **parts, **direct)


def about(facts: Facts, subject: str) -> list[Finding]:
    return [finding for finding in examine(facts) if finding.about == subject]


def test_a_mount_that_is_fine_has_nothing_worse_than_advice() -> None:
    """Exit code 0: nothing worse than advice; and what was looked at is said also where it is fine."""
    found = examine(GOOD)
    assert findings.exit_code(found) == 0
    assert [each.about for each in found if each.level is not OK] == ["guests"]
    assert {each.about for each in found} >= {
        "source", "nfs", "direct I/O", "limits", "max_background", "engine", "hung tasks", "memory", "monitor", "users", "guests",
    }  # fmt: skip


NFS4_DEFAULTS = ("rw", "vers=4.2", "soft", "proto=tcp", "timeo=600", "retrans=2")
SHORT4 = ("rw", "vers=4.2", "soft", "proto=tcp", "timeo=50", "retrans=2")
NOT_MOUNTED = {"table": (ROOT,), "sight": Sight("/srv/nfs/vm", empty=True, on_root=True)}
EMPTY_ON_ROOT = {"table": (ROOT,), "planned": (), "sight": Sight("/srv/nfs/vm", empty=True, on_root=True)}
LOCAL = {"table": (ROOT,), "planned": (), "sight": Sight("/srv/nfs/vm", empty=False, on_root=True)}

CASES: list[tuple[Facts, str, Level, str, str]] = [
    # SOURCE
    (GOOD, "source", OK, "on nfs server:/vm mounted at /srv/nfs, as /etc/fstab says", ""),
    (
        with_(**NOT_MOUNTED),
        "source",
        PROBLEM,
        "lies under /srv/nfs, where /etc/fstab mounts server:/vm, and nothing is mounted there",
        "mount /srv/nfs; and wait_source=5min",
    ),
    (with_(table=(ROOT, Mounted("/srv/nfs", 9, "autofs", "systemd-1"))), "source", PROBLEM, "nothing is mounted", "mount"),
    (with_(**EMPTY_ON_ROOT), "source", WARNING, "is an empty directory on this host's root file system", "findmnt -T"),
    (with_(**LOCAL), "source", OK, "is there, on ext4 /dev/vda mounted at /", ""),
    (
        with_(planned=(dataclasses.replace(FSTAB, source="server:/other"),)),
        "source",
        WARNING,
        "is there",
        "findmnt /srv/nfs",
    ),
    (with_(sight=Sight("/srv/nfs/vm", "...", answers=False)), "source", PROBLEM, "does not answer", "iohangctl status"),
    (
        with_(BEFORE, sight=Sight("/srv/nfs/vm", "...", answers=False)),
        "source",
        PROBLEM,
        "does not answer",
        "mount when it answers",
    ),
    (
        with_(sight=Sight("/srv/nfs/vm", "SOURCE /srv/nfs/vm does not exist")),
        "source",
        PROBLEM,
        "does not exist",
        "findmnt",
    ),
    # NFS
    (GOOD, "nfs", OK, "NFS 3, soft,timeo=50,retrans=2: the first error comes after about 15 s", ""),
    (
        with_(table=(ROOT, nfs_mount(*NFS4_DEFAULTS)), settings__write_timeout_s=600, settings__read_timeout_s=600,
              settings__fsync_timeout_s=600),
        "nfs",
        OK,
        "first error comes after about 3 min 0 s",
        "",
    ),
    (with_(table=(ROOT, nfs_mount(*NFS4_DEFAULTS))), "nfs", WARNING, "first error comes after about 3 min 0 s",
     "-o timeout=420 or more; or mount /srv/nfs with softerr,timeo=50,retrans=2"),
    (with_(table=(ROOT, nfs_mount(*SHORT4))), "nfs", OK, "the first error comes after about 15 s", ""),
    (with_(table=(ROOT, nfs_mount("vers=4.2", "soft", "timeo=10", "retrans=1"))), "nfs", OK,
     "about 10 s (an NFS 4 call does not fail while its connection is up, 9.0 s with reconnect=auto), each later one after 2.0",
     ""),
    (with_(table=(ROOT, nfs_mount(*NFS4_DEFAULTS)), settings__reconnect="never"), "nfs", WARNING, "after about 3 min 0 s",
     "-o timeout=420 or more; or mount /srv/nfs with softerr,timeo=50,retrans=2, from a server with lease-time=15"),
    (with_(table=(ROOT, nfs_mount(*SHORT4)), settings__reconnect="never"), "nfs", WARNING,
     "(an NFS 4 call does not fail while its connection is up, 1 min 30 s for a lease of 1 min 30 s), each later one after 15",
     "lease-time=15 in its /etc/nfs.conf"),
    (with_(table=(ROOT, nfs_mount(*SHORT4)), settings__reconnect="never", lease_s=15), "nfs", OK, "about 30 s (", ""),
    (with_(table=(ROOT, nfs_mount(*SHORT4)), settings__reconnect="never", settings__read_timeout_s=5, lease_s=15), "nfs", WARNING,
     "about 30 s", "-o timeout=105 or more"),
    (with_(table=(ROOT, nfs_mount("vers=3", "soft", "timeo=600"))), "nfs", WARNING, "about 3 min 0 s", "softerr,timeo=50"),
    (with_(table=(ROOT, nfs_mount("vers=3", "hard", "timeo=600"))), "nfs", WARNING, "NFS 3, hard", "mount /srv/nfs with soft"),
    (
        with_(table=(ROOT, nfs_mount("vers=3", "softerr", "timeo=50")), settings__errors=frozenset({"EIO"})),
        "nfs",
        PROBLEM,
        "It is ETIMEDOUT, and errors does not have that",
        "add ETIMEDOUT to errors",
    ),
    # what else SOURCE lies on
    (with_(**LOCAL), "source type", OK, "ext4: a local file system", ""),
    (with_(table=(ROOT, Mounted("/srv/nfs", 7, "ceph", "a:/"))), "source type", ADVICE, "ceph, mounted at /srv/nfs", "rehearsing"),
    (with_(table=(ROOT, Mounted("/srv/nfs", 7, "fuse.sshfs", "a:/"))), "source type", ADVICE, "fuse.sshfs", "rehearsing"),
    (GOOD, "direct I/O", OK, "nfs takes it unaligned", ""),
    (with_(**LOCAL), "direct I/O", OK, "ext4 wants it aligned", ""),
    (with_(settings__direct="never"), "direct I/O", ADVICE, "direct=never", "leave direct=never out"),
    (
        with_(planned=(FSTAB, Planned("/srv/nfs/vm", "/mnt/iohang", "iohang", ("allow_other",)))),
        "fstab",
        ADVICE,
        "the line of /mnt/iohang has no _netdev and no x-systemd.requires-mounts-for=/srv/nfs/vm",
        "add _netdev,x-systemd.requires-mounts-for=/srv/nfs/vm",
    ),
    # the mount
    (with_(BEFORE, refusal="MOUNTPOINT /mnt/iohang does not exist"), "mount", PROBLEM, "MOUNTPOINT /mnt/iohang does not", ""),
    (with_(served__settings_from="the defaults"), "settings", ADVICE, "judged by the defaults", ""),
    (with_(served__holding=False), "holding", WARNING, "paused", "iohangctl unpause"),
    (
        with_(settings__read_timeout_s=0, settings__write_timeout_s=0, settings__fsync_timeout_s=0),
        "timeout",
        WARNING,
        "all timeouts are 0",
        "-o timeout=5min",
    ),
    (with_(settings__fsync_timeout_s=0), "timeout", WARNING, "the timeout of fsyncs is 0", "leave that option out"),
    (with_(monitor=None), "monitor", WARNING, "there is none", "leave monitor=none out"),
    (with_(served__answers=False, served__why_not="Connection refused"), "monitor", PROBLEM, "Connection refused",
     "umount /mnt/iohang"),
    (with_(BEFORE, monitor_taken=True), "monitor", WARNING, "another mount's listens", "-o monitor="),
    (BEFORE, "monitor", OK, "is free", ""),
    (GOOD, "monitor", OK, "answers", ""),
    # the host
    (with_(limits=(Limit("max_request_timeout is 20 s", "sysctl", fatal=True),)), "limits", PROBLEM, "is 20 s", "sysctl"),
    (with_(limits=(Limit("only 1024 files", "LimitNOFILE", fatal=False),)), "limits", WARNING, "only 1024", "LimitNOFILE"),
    (GOOD, "limits", OK, "leave room", ""),
    (GOOD, "max_background", OK, "4096 is in force", ""),
    (with_(served__max_background=12), "max_background", WARNING, "12 is in force", "echo 4096 > /sys/fs/fuse/connections/"),
    (with_(served__max_background=None), "max_background", WARNING, "cannot be read", "mount -t fusectl"),
    (with_(served__max_background=None, host__is_root=False), "max_background", ADVICE, "only root can read", "as root"),
    (GOOD, "engine", OK, "uring", ""),
    (with_(served__engine="threads", served__engine_reason="EPERM"), "engine", ADVICE, "threads: EPERM", "sysctl -w"),
    (with_(BEFORE, host__io_uring_disabled=2), "engine", ADVICE, "io_uring_disabled is 2", "sysctl -w"),
    (with_(BEFORE, host__io_uring_disabled=2, settings__engine="uring"), "engine", PROBLEM, "engine is uring", "sysctl -w"),
    (with_(BEFORE, host__io_uring_disabled=1), "engine", OK, "is 1", ""),
    (with_(BEFORE, host__io_uring_disabled=1, host__is_root=False), "engine", ADVICE, "is 1", "engine=threads"),
    (with_(BEFORE, host__io_uring_disabled=2, settings__engine="threads"), "engine", OK, "engine is threads", ""),
    (GOOD, "hung tasks", OK, "is 120, a request may wait up to 1 min 20 s", ""),
    (with_(host__hung_task_timeout_s=0, host__hung_task_panic=True), "hung tasks", OK, "does not look for them", ""),
    (with_(host__hung_task_timeout_s=60), "hung tasks", ADVICE, "is 60", ""),
    (
        with_(host__hung_task_timeout_s=60, host__hung_task_panic=True),
        "hung tasks",
        PROBLEM,
        "kernel.hung_task_panic is set",
        "sysctl -w kernel.hung_task_panic=0",
    ),
    (GOOD, "memory", OK, "each of 3 open images are 1.19 GiB; 8 GiB are available", ""),
    (with_(host__memory_available_bytes=1 << 30), "memory", WARNING, "1 GiB are available", "-o held_limit=416M"),
    (GOOD, "users", OK, "allow_other", ""),
    (with_(settings__mount_words=()), "users", ADVICE, "allow_other is not given", "-o allow_other,default_permissions"),
    (with_(BEFORE, host__is_root=False), "users", PROBLEM, "does not say user_allow_other", "echo user_allow_other >>"),
    (with_(BEFORE, host__is_root=False, host__user_allow_other=True), "users", OK, "may use the mount", ""),
    # the guests
    (GOOD, "guests", ADVICE, "a request may wait up to 1 min 20 s", 'ATTR{device/timeout}="110"'),
    (
        with_(settings__read_timeout_s=math.inf),
        "guests",
        ADVICE,
        "a request may wait for ever",
        "nvme_core.io_timeout=4294967;",
    ),
    (
        with_(**LOCAL, settings__read_timeout_s=10, settings__write_timeout_s=10, settings__fsync_timeout_s=10),
        "guests",
        OK,
        "up to 10 s",
        "",
    ),
]  # fmt: skip


@pytest.mark.parametrize(
    ("facts", "subject", "level", "seen", "do"), CASES, ids=[f"{case[1]}-{case[2]}-{case[3][:30]}" for case in CASES]
)
def test_each_finding(facts: Facts, subject: str, level: Level, seen: str, do: str) -> None:
    """Each finding has its level, what is seen, and what to do: nothing but ok goes without a meaning or a remedy."""
    (found,) = about(facts, subject)
    assert (found.level, seen in found.seen) == (level, True), found
    assert do in found.do
    assert bool(do) <= bool(found.do)
    if level is not OK:
        assert found.means or found.do, found


def test_where_source_does_not_lie_where_it_should_nothing_else_hides_it() -> None:
    """An empty directory under an NFS mount point is a problem, whatever else is fine, and so is exit code 2."""
    found = examine(with_(**NOT_MOUNTED))
    assert [each.about for each in found if each.level is PROBLEM] == ["source"]
    assert findings.exit_code(found) == 2


def test_a_source_that_came_after_its_mount() -> None:
    """Who has mounted too early serves what lies beneath, also once SOURCE is there: a problem."""
    nfs_, bare = dataclasses.replace(nfs_mount(*SHORT), mount_id=40), dataclasses.replace(ROOT, mount_id=22)
    assert findings.exit_code(examine(with_(served__serves=nfs_, served__lies_on=nfs_))) == 0
    found = about(with_(served__serves=bare, served__lies_on=nfs_), "source")
    assert [each.level for each in found] == [OK, PROBLEM]
    assert "open on ext4 /dev/vda, and nfs server:/vm has been mounted over it at /srv/nfs" in found[1].seen
    assert "umount /mnt/iohang" in found[1].do


def test_a_refusal_that_is_known_already_is_not_said_twice() -> None:
    """SOURCE that does not exist is one finding."""
    sight = Sight("/srv/nfs/vm", "SOURCE /srv/nfs/vm does not exist")
    found = examine(with_(BEFORE, sight=sight, refusal=sight.problem))
    assert sum("does not exist" in each.seen for each in found) == 1


@pytest.mark.parametrize(
    ("options", "wait_s"),
    [
        (SHORT, 5 + 60 + 15),
        (("vers=3", "soft", "timeo=10", "retrans=1"), 2 + 60 + 2),  # noticed before blocked_after
        (NFS4_DEFAULTS, 5 + 60 + 180),
        (("vers=3", "hard"), math.inf),
    ],
)
def test_the_longest_wait(options: tuple[str, ...], wait_s: float) -> None:
    """P1: "Bound: timeout + at most one attempt", and what passes before the first failure is noticed."""
    assert longest_wait_s(with_(table=(ROOT, nfs_mount(*options)))) == wait_s


@pytest.mark.parametrize(
    ("options", "lease_s", "error_s", "first_error_s"),
    [
        ("vers=3,soft,timeo=10,retrans=1", None, 2, 2),  # seen
        ("vers=4.2,soft,timeo=10,retrans=1", None, 2, 92),  # seen
        ("vers=4.2,softerr,timeo=50,retrans=2", None, 15, 105),
        ("vers=4.2,soft,timeo=100,retrans=1", 90, 20, 100),
        ("vers=4.2,soft,timeo=600,retrans=2", 90, 180, 180),
        ("vers=4.2,soft,timeo=6000,retrans=9", 90, 600, 600),
        ("vers=4.2,soft,timeo=10,retrans=1", 15, 2, 20),
        ("vers=4.2,soft,timeo=10,retrans=1", 10, 2, 20),
        ("vers=4.2,soft,timeo=10,retrans=1", 31, 2, 34),  # three tries of 11 s
        ("vers=4.2,soft,timeo=10,retrans=1", 3600, 2, 182),
        ("vers=4.2,hard,timeo=10,retrans=1", 15, math.inf, math.inf),
        ("vers=4.2,soft,timeo=0,retrans=0", 90, 60, 120),  # the kernel takes its default for 0
    ],
)
def test_when_an_nfs_mount_gives_its_first_error(
    options: str, lease_s: float | None, error_s: float, first_error_s: float
) -> None:
    """An NFS 4 call that was sent fails at its first `timeo` x (`retrans` + 1) after TCP has given its connection up."""
    found = nfs.parse(options.split(","), lease_s)
    assert (found.error_s, found.first_error_s) == (error_s, first_error_s)


def test_the_lease_of_the_mount_that_lies_on_top() -> None:
    """As the client knows it, of the right mount; a mount without a lease says none."""
    stats = "".join(
        f"device {device} mounted on {where} with fstype {fstype}\n\topts:\trw\n\tnfsv4:\tbm0=0x1,sessions{lease}\n"
        for device, where, fstype, lease in [
            ("/dev/vda", "/", "ext4", ""),
            ("server:/vm", r"/srv/my\040vms", "nfs4 statvers=1.1", ",lease_time=90,lease_expired=0"),
            ("server:/vm", r"/srv/my\040vms", "nfs4 statvers=1.1", ",lease_time=15,lease_expired=0"),
            ("server:/v3", "/srv/v3", "nfs statvers=1.1", ""),
        ]
    )
    asked = ["/srv/my vms", "/srv/v3", "/", "/srv"]
    assert [nfs.parse_lease_s(stats, each) for each in asked] == [15, None, None, None]


# ---- QEMU


def disk(driver: str = "virtio-blk-pci", werror: str = "enospc", rerror: str = "report") -> Facts:
    return with_(qemus=(Qemu(7, "vm1", (Disk("/mnt/iohang/a.img", driver, werror, rerror),)),))


def test_a_qemu_that_passes_an_error_on_is_told_how_to_pause() -> None:
    """QEMU's default is werror=enospc,rerror=report: what is given up is an I/O error in the guest."""
    (found,) = about(disk(), "QEMU vm1")
    assert (found.level, found.seen) == (ADVICE, "/mnt/iohang/a.img: werror=enospc, rerror=report")
    assert "werror=stop,rerror=stop" in found.do


def test_a_qemu_that_pauses_is_fine() -> None:
    """werror=stop and rerror=stop pause the guest, and so does werror=enospc for an ENOSPC."""
    (found,) = about(disk(werror="stop", rerror="stop"), "QEMU vm1")
    assert found.level is OK
    at_enospc = with_(disk(rerror="stop"), settings__timeout_errno="ENOSPC")
    assert [each.level for each in about(at_enospc, "QEMU vm1")] == [OK]
    assert [each.level for each in about(disk(rerror="stop"), "QEMU vm1")] == [ADVICE]


@pytest.mark.parametrize("driver", ["scsi-hd", "ide-hd", "nvme", "ide", "usb-storage"])
def test_a_disk_whose_guest_gives_up_is_named(driver: str) -> None:
    """SCSI, SATA and NVMe guests have a timeout of about 30 s; virtio-blk has none."""
    found = about(disk(driver, "stop", "stop"), "QEMU vm1")
    assert [each.level for each in found] == [ADVICE, OK]
    assert f"is a {driver} disk" in found[0].seen


# ---- how it is said


def test_the_words() -> None:
    """The worst last, next to the prompt; a command on one line of its own; and a count."""
    long_command = "sysctl -w " + "x" * 150
    found = [
        Finding(PROBLEM, "b", "it is dead", "nothing works", long_command),
        Finding(OK, "a", "word " * 40),
        Finding(WARNING, "c", "odd"),
    ]
    said = findings.lines(found, width=60)
    assert said[-1] == "1 problem, 1 warning, 0 of advice, 1 ok"
    assert said[-2] == f"        -> {long_command}"
    assert said[-3] == "problem b: it is dead. Nothing works"
    assert said[-4] == "warning c: odd"
    assert max(map(len, said[:-2])) <= 60


@pytest.mark.parametrize(
    ("levels", "code"), [([], 0), ([OK, ADVICE], 0), ([WARNING, OK], 1), ([ADVICE, PROBLEM, WARNING], 2)]
)
def test_exit_codes(levels: list[Level], code: int) -> None:
    """0 nothing worse than advice, 1 warnings, 2 problems: in line with `iohangctl check`."""
    assert findings.exit_code([Finding(level, "a", "b") for level in levels]) == code


def test_json() -> None:
    """For programs: the worst level, and each finding in the order in which it was looked at."""
    said = json.loads(findings.report("/s", "/m", [Finding(WARNING, "a", "b", "c", "d")], json_=True))
    assert said == {
        "source": "/s",
        "mountpoint": "/m",
        "worst": "warning",
        "findings": [{"level": "warning", "about": "a", "seen": "b", "means": "c", "do": "d"}],
    }
