"""Inside the Debian guest: a real NFS server, and client hosts that mount it, each in a network namespace of its own.

1. The server is Debian's nfs-server.service, at 10.77.0.1 on a bridge. It exports ext4 on a disk that device-mapper can take away.
2. Each client host has its own address, connections, lease and open state, as hosts have; all see what is mounted.
3. What takes part in an outage is the real thing: nftables, netem, systemctl, exportfs, device-mapper. Nothing is simulated.
"""

from __future__ import annotations

import os
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

SERVER = "10.77.0.1"
NETWORK = "10.77.0.0/24"
DISK = "/dev/vdc"
EXPORT = Path("/export/vm")
SQUASHED = Path("/export/squashed")
"""The same with root_squash, which is the default of exports(5)."""

GRACE_S = 15

_EXPORTS = Path("/etc/exports")
_OPTIONS = "no_subtree_check,sync"

_DROP = """\
table inet outage {
  chain incoming {
    type filter hook input priority 0;
    tcp dport 2049 drop
  }
  chain outgoing {
    type filter hook output priority 0;
    tcp sport 2049 drop
  }
}
"""
"""At the server, both ways: nobody gets so much as a reset."""

_HOOKS = """\
table inet hooks {
  chain incoming {
    type filter hook input priority 0;
  }
  chain outgoing {
    type filter hook output priority 0;
  }
}
"""
"""The kernel writes into its own code at the first chain of a kind, and after the last (static keys: nf_hooks_needed). QEMU's
emulation, 7.2 at least, may go on with the code as it was: both processors were in ip_local_deliver for ever, in the seventh of
seven outages, and at once under `ping -f`. With chains that stay there is no first and no last one."""


@dataclass(frozen=True, slots=True)
class Kind:
    """A way to mount: what nfs(5) says of it, and where it is on this machine."""

    name: str
    options: str
    host: int
    export: Path = EXPORT

    @property
    def bare(self) -> Path:
        """An NFS mount, for consumers."""
        return Path(f"/srv/{self.name}")

    @property
    def source(self) -> Path:
        """The same by another host, for iohang-fuse: what that does to its connections is not to help the bare one."""
        return Path(f"/srv/{self.name}.source")

    @property
    def iohang(self) -> Path:
        """iohang-fuse on `source`, for consumers."""
        return Path(f"/mnt/{self.name}")


QUICK = "timeo=10,retrans=1"
"""Two seconds for a call, so that an outage of some seconds gives errors at all."""

KINDS = (
    Kind("v3-soft", "vers=3,soft,nolock", 11),
    Kind("v3-softerr", "vers=3,softerr,nolock", 12),
    Kind("v3-hard", "vers=3,hard,nolock", 13),
    Kind("v4.2-soft", "vers=4.2,soft", 14),
    Kind("v4.2-softerr", "vers=4.2,softerr", 15),
    Kind("v4.2-hard", "vers=4.2,hard", 16),
)


def run(*command: str | Path, text: str | None = None) -> str:
    """The output of a command that succeeds; raises RuntimeError with its words if it does not."""
    done = subprocess.run([str(word) for word in command], input=text, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(
            f"{' '.join(map(str, command))}: exit code {done.returncode}: {done.stderr.strip() or done.stdout}"
        )
    return done.stdout


# ---- the server


def start_server(lease_s: int) -> None:
    """Serve the exports, with that lease (by default it is 90 s), and a short grace period, so that nobody waits for its end."""
    if not Path("/dev/mapper/export").exists():
        run("dmsetup", "create", "export", text=_table("linear"))
        run("mke2fs", "-q", "-t", "ext4", "/dev/mapper/export")
        EXPORT.parent.mkdir(exist_ok=True)
        run("mount", "/dev/mapper/export", EXPORT.parent)
        for directory in (EXPORT, SQUASHED):
            directory.mkdir()
            directory.chmod(0o777)
        export("rw")
    Path("/etc/nfs.conf.d").mkdir(exist_ok=True)
    Path("/etc/nfs.conf.d/times.conf").write_text(f"[nfsd]\nlease-time={lease_s}\ngrace-time={GRACE_S}\nthreads=8\n")
    run("systemctl", "restart", "nfs-server")


def _table(target: str) -> str:
    size = run("blockdev", "--getsz", DISK).strip()
    return f"0 {size} linear {DISK} 0\n" if target == "linear" else f"0 {size} error\n"


def export(mode: str) -> None:
    """`rw`, `ro`, or `none`: no longer exported, so that its handles are stale.

    A client that nothing is exported to any more gets EACCES; these still have the other one.
    """
    squash = f"{SQUASHED} {NETWORK}(rw,root_squash,{_OPTIONS})\n"
    whole = "" if mode == "none" else f"{EXPORT} {NETWORK}({mode},no_root_squash,{_OPTIONS})\n"
    _EXPORTS.write_text(whole + squash)
    if Path("/proc/fs/nfsd/threads").exists() and Path("/proc/fs/nfsd/threads").read_text().strip() != "0":
        run("exportfs", "-ra")
        run("exportfs", "-f")  # the kernel asks anew


def cut_power() -> None:
    """What the server has not written to its disk is lost, and so are its clients' states. Nobody hears of it."""
    drop()
    run("systemctl", "stop", "nfs-server")
    _turn("error")
    run("umount", EXPORT.parent)


def return_power() -> None:
    """The file system's journal is replayed, and the server starts."""
    _turn("linear")
    run("mount", "/dev/mapper/export", EXPORT.parent)
    run("systemctl", "start", "nfs-server")
    restore()


def _turn(target: str) -> None:
    run("dmsetup", "reload", "export", text=_table(target))
    run("dmsetup", "suspend", "--nolockfs", "export")  # a flush beforehand would fail
    run("dmsetup", "resume", "export")


def expire_clients() -> None:
    """What a lease's end does, when another client wants a lock: the server forgets what its clients have open."""
    for client in Path("/proc/fs/nfsd/clients").iterdir():
        (client / "ctl").write_text("expire\n")


def fill_disk() -> None:
    """Until not one more block fits, for root neither."""
    with (EXPORT / "filler").open("wb", buffering=0) as filler:
        size = 1 << 26
        while size >= 4096:
            try:
                os.posix_fallocate(filler.fileno(), filler.seek(0, os.SEEK_END), size)
            except OSError:
                size //= 2


def empty_disk() -> None:
    """Make room again."""
    (EXPORT / "filler").unlink()


# ---- the network


def make_network() -> None:
    """The bridge that the server is at."""
    if Path("/sys/class/net/br0").exists():
        return
    run("ip", "link", "add", "br0", "type", "bridge")
    run("ip", "addr", "add", f"{SERVER}/24", "dev", "br0")
    run("ip", "link", "set", "br0", "up")
    run("nft", "-f", "-", text=_HOOKS)
    run("dmesg", "-n", "5")  # warnings, too: where a kernel is stuck


def add_host(number: int) -> None:
    """A client host: a network namespace with an address, and a name of its own for NFS 4."""
    name = f"host{number}"
    if Path(f"/run/netns/{name}").exists():
        return
    run("ip", "netns", "add", name)
    run("ip", "link", "add", f"v{number}", "type", "veth", "peer", "name", "eth0", "netns", name)
    run("ip", "link", "set", f"v{number}", "master", "br0", "up")
    run("ip", "-n", name, "addr", "add", f"10.77.0.{number}/24", "dev", "eth0")
    run("ip", "-n", name, "link", "set", "eth0", "up")
    run("modprobe", "nfs")
    # Without it all namespaces are one client to the server, and take each other's state away.
    run("ip", "netns", "exec", name, "sh", "-c", f"echo {name} > /sys/fs/nfs/net/nfs_client/identifier")


def drop() -> None:
    """No packet of NFS gets through."""
    run("nft", "-f", "-", text=_DROP)


def restore() -> None:
    """All packets do."""
    run("nft", "delete", "table", "inet", "outage")


def impair(*netem: str) -> None:
    """tc-netem(8)'s words, both ways, for all hosts; none ends it."""
    for namespace in sorted(Path("/run/netns").iterdir()):
        number = namespace.name.removeprefix("host")
        for where in (["tc", "-n", namespace.name], "eth0"), (["tc"], f"v{number}"):
            command, device = where
            if netem:
                run(*command, "qdisc", "replace", "dev", device, "root", "netem", *netem)
            else:
                run(*command, "qdisc", "del", "dev", device, "root")


# ---- the mounts


def mount(kind: Kind, timing: str = QUICK) -> None:
    """Both NFS mounts, each made by its host. *timing*: timeo and retrans, as nfs(5) has them."""
    for host, directory in ((kind.host, kind.bare), (other(kind.host), kind.source)):
        add_host(host)
        directory.mkdir(parents=True, exist_ok=True)
        run(
            *at(host),
            "mount",
            "-t",
            "nfs",
            "-o",
            f"proto=tcp,{kind.options},{timing}",
            f"{SERVER}:{kind.export}",
            directory,
        )


def mount_iohang(kind: Kind, options: str) -> None:
    """iohang-fuse on its own."""
    kind.iohang.mkdir(parents=True, exist_ok=True)
    log = f"log=/var/log/iohang-{kind.name}.log"
    run(*at(other(kind.host)), "iohang-mount", kind.source, kind.iohang, "-o", f"{log},{options}")


def at(host: int) -> tuple[str, ...]:
    """In the network of a host; all see its mounts."""
    return ("nsenter", f"--net=/run/netns/host{host}")


def other(host: int) -> int:
    """The host of the mount that iohang-fuse is on."""
    return host + 100


def unmount(kind: Kind) -> None:
    """All."""
    run("umount", kind.iohang)
    run("umount", kind.bare)
    deadline_s = time.monotonic() + 60
    while True:  # the server closes its descriptors a moment later
        try:
            run("umount", kind.source)
        except RuntimeError:
            if time.monotonic() > deadline_s:
                raise
            time.sleep(0.2)
        else:
            return
