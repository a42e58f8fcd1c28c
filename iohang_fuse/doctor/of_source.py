"""examination.py's judgement of SOURCE: whether it is there, what it lies on, and when that gives its first error.

Pure.
"""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING

from iohang_fuse.doctor import nfs
from iohang_fuse.doctor.findings import Finding, Level
from iohang_fuse.messages import span_words
from iohang_fuse.mounttable import OUR_TYPES, Mounted, holding, is_mounted, plan_for

if TYPE_CHECKING:
    from collections.abc import Iterator

    from iohang_fuse.doctor.facts import Facts

_TAKES_DIRECT = frozenset({"nfs", "nfs4", "cifs", "smb3", "ceph", "fuse", "fuseblk"})
"""File systems that take O_DIRECT without alignment, as in source.py."""

_NETWORK = frozenset({"nfs", "nfs4", "cifs", "smb3", "ceph", "glusterfs", "9p"})

_ADVISED = "softerr,timeo=50,retrans=2"
"""An error after 15 s: soon enough for several attempts within a minute, late enough for a server that is only slow."""

_RECONNECTED_S = 4.0
"""From the moment in which an image counts as sick until a connection that hears nothing is closed (reconnect.py)."""

_SHORT_LEASE_S = 15
"""An NFS 4 server's lease with which the first error comes after 30 s; docs/howto/nfs.rst has what it costs."""


def source_findings(facts: Facts) -> Iterator[Finding]:
    """SOURCE, from its name down."""
    yield from _presence(facts)
    yield from _covered(facts)
    below = holding(facts.sight.path, facts.table)
    if below is not None:
        found = _nfs_of(facts)
        yield from _nfs(facts, below, found) if found is not None else _other(below)
        yield from _direct(facts, below)
    yield from _fstab(facts, below)


def attempt_s(facts: Facts) -> float | None:
    """How long an attempt may take that fails; None where SOURCE's type does not tell."""
    found = _nfs_of(facts)
    return None if found is None else found.error_s


def first_attempt_s(facts: Facts) -> float | None:
    """The same for the first one of an outage."""
    found = _nfs_of(facts)
    return None if found is None else found.first_error_s


def _nfs_of(facts: Facts) -> nfs.Nfs | None:
    below = holding(facts.sight.path, facts.table)
    if below is None or below.fstype not in nfs.TYPES:
        return None
    settings = facts.settings
    closed_after_s = settings.blocked_after_s + _RECONNECTED_S if settings.reconnect == "auto" else math.inf
    return nfs.parse(below.options, facts.lease_s, closed_after_s)


def _presence(facts: Facts) -> Iterator[Finding]:
    sight = facts.sight
    plan = plan_for(sight.path, facts.planned)
    if plan is not None and not is_mounted(plan.mountpoint, facts.table):
        yield Finding(
            Level.PROBLEM,
            "source",
            f"{facts.source} lies under {plan.mountpoint}, where /etc/fstab mounts {plan.source}, and nothing is mounted there",
            "what is there is a directory of this host's own disk: guests would find none of their images, or fill it",
            f"mount {plan.mountpoint}; and wait_source=5min, so that a mount of iohang waits for it",
        )
    elif not sight.answers:
        yield Finding(
            Level.PROBLEM,
            "source",
            f"{facts.source} does not answer",
            "its storage is dead now, or very slow; what is said of it here is from the mount table",
            "iohangctl status says what hangs of a mount that is served" if facts.served else "mount when it answers",
        )
    elif sight.problem is not None:
        yield Finding(Level.PROBLEM, "source", sight.problem, do=f"findmnt -T {facts.source}")
    elif sight.empty and sight.on_root and plan is None:
        yield Finding(
            Level.WARNING,
            "source",
            f"{facts.source} is an empty directory on this host's root file system",
            "if storage is to be mounted there, it is not; if it is meant to be a local directory, all is well",
            f"findmnt -T {facts.source}; with a line for its mount in /etc/fstab this is known, and not guessed",
        )
    else:
        yield from _mounted_as_planned(facts)


def _covered(facts: Facts) -> Iterator[Finding]:
    served = facts.served
    if served is None or served.serves is None or served.lies_on is None:
        return
    if served.serves.mount_id != served.lies_on.mount_id:
        was, now = served.serves, served.lies_on
        yield Finding(
            Level.PROBLEM,
            "source",
            f"the server has {facts.source} open on {was.fstype} {was.source}, and {now.fstype} {now.source} has been mounted over "
            f"it at {now.mountpoint}",
            "it was mounted before its source, and guests find and write what lies beneath",
            f"stop the guests, umount {facts.mountpoint}, and mount again, with wait_source=5min",
        )


def _mounted_as_planned(facts: Facts) -> Iterator[Finding]:
    plan = plan_for(facts.sight.path, facts.planned)
    below = holding(facts.sight.path, facts.table)
    where = f", on {below.fstype} {below.source} mounted at {below.mountpoint}" if below else ""
    seen = f"{facts.source} is there{where}"
    if plan is None or below is None or plan.mountpoint != below.mountpoint:
        yield Finding(Level.OK, "source", seen)
    elif ":" in plan.source and ":" in below.source and plan.source.rstrip("/") != below.source.rstrip("/"):
        yield Finding(
            Level.WARNING,
            "source",
            seen,
            f"/etc/fstab mounts something else there: {plan.source}",
            f"findmnt {plan.mountpoint}, and mount what is right",
        )
    else:
        yield Finding(Level.OK, "source", f"{seen}, as /etc/fstab says")


def _nfs(facts: Facts, below: Mounted, found: nfs.Nfs) -> Iterator[Finding]:
    settings = facts.settings
    shortest_s = min((each for each in settings.timeouts_s if each), default=math.inf)
    if found.error is None:
        yield Finding(
            Level.WARNING,
            "nfs",
            f"{found}: a call that the server does not answer never fails",
            f"it counts as a hang after blocked_after ({span_words(settings.blocked_after_s)}), and reads are answered at their "
            "timeout; but a write is answered when the server does, whatever timeout, drain and fail say",
            f"mount {below.mountpoint} with {_ADVISED}",
        )
        return
    seen = f"{found}: the first error comes after about {span_words(found.first_error_s)}"
    if found.first_error_s != found.error_s:
        ends = (
            f"for a lease of {span_words(found.lease_s)}" if found.closed_after_s == math.inf else "with reconnect=auto"
        )
        seen += (
            f" (an NFS 4 call does not fail while its connection is up, {span_words(found.silence_s)} {ends}), "
            f"each later one after {span_words(found.error_s)}"
        )
    if found.error not in settings.errors:
        yield Finding(
            Level.PROBLEM,
            "nfs",
            f"{seen}. It is {found.error}, and errors does not have that",
            "it is passed on to the guest at once",
            f"add {found.error} to errors, or leave errors out",
        )
    elif found.first_error_s >= settings.blocked_after_s + shortest_s:
        yield Finding(
            Level.WARNING,
            "nfs",
            seen,
            f"its timeout ({span_words(shortest_s)}) counts from blocked_after ({span_words(settings.blocked_after_s)}) on: "
            "a write would be given up with its first error, and never be tried again",
            _in_time(found, below, settings.blocked_after_s + shortest_s),
        )
    else:
        yield Finding(Level.OK, "nfs", seen)


def _in_time(found: nfs.Nfs, below: Mounted, limit_s: float) -> str:
    """What to do about a first error that comes later than *limit_s*."""
    longer = f"-o timeout={math.ceil(found.first_error_s + found.error_s + 60)} or more"
    advised = nfs.parse((f"vers={found.version}", *_ADVISED.split(",")), found.lease_s, found.closed_after_s)
    shorter = dataclasses.replace(advised, lease_s=_SHORT_LEASE_S)
    remount = f"{longer}; or mount {below.mountpoint} with {_ADVISED}"
    if advised.first_error_s < limit_s:
        return remount
    if shorter.first_error_s < limit_s:
        return f"{remount}, from a server with lease-time={_SHORT_LEASE_S} in its /etc/nfs.conf"
    return longer


def _other(below: Mounted) -> Iterator[Finding]:
    if below.fstype in _NETWORK or below.fstype.startswith("fuse"):
        seen = (
            f"{below.fstype}, mounted at {below.mountpoint}: when it gives its first error does not show in its options"
        )
        yield Finding(
            Level.ADVICE,
            "source type",
            seen,
            do="rehearse an outage, and see what iohangctl watch says: docs/rehearsing.rst",
        )
    else:
        yield Finding(
            Level.OK,
            "source type",
            f"{below.fstype}: a local file system",
            "its errors are held like all others; they go away by themselves where a SAN, iSCSI or multipath is beneath",
        )


def _direct(facts: Facts, below: Mounted) -> Iterator[Finding]:
    takes = below.fstype.partition(".")[0] in _TAKES_DIRECT
    if takes and facts.settings.direct == "never":
        yield Finding(
            Level.ADVICE,
            "direct I/O",
            f"direct=never, and {below.fstype} would take it",
            "QEMU's cache=none goes through this host's page cache: after a live migration another host may see old data",
            "leave direct=never out",
        )
    elif takes:
        yield Finding(
            Level.OK, "direct I/O", f"{below.fstype} takes it unaligned: QEMU's cache=none is past the page cache"
        )
    else:
        yield Finding(
            Level.OK,
            "direct I/O",
            f"{below.fstype} wants it aligned: data goes through the page cache, and fsync tells the truth",
        )


def _fstab(facts: Facts, below: Mounted | None) -> Iterator[Finding]:
    ours = [each for each in facts.planned if each.mountpoint == facts.mountpoint and each.fstype in OUR_TYPES]
    for line in ours:
        missing = []
        if below is not None and below.fstype in _NETWORK and "_netdev" not in line.options:
            missing.append("_netdev")
        if not any(each.startswith("x-systemd.requires-mounts-for=") for each in line.options):
            missing.append(f"x-systemd.requires-mounts-for={facts.source}")
        if missing:
            yield Finding(
                Level.ADVICE,
                "fstab",
                f"the line of {facts.mountpoint} has no {' and no '.join(missing)}",
                "at boot it may come up before its source",
                f"add {','.join(missing)}",
            )
