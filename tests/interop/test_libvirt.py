"""libvirt above the mount, with its own libvirtd, QEMU and a guest that does I/O all the time.

The whole in a mount namespace with an /etc, /var and /run of its own, and a PID namespace: nothing of this machine's libvirt,
if it has one, is seen or changed, and nothing is left.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from contrib.guest.kernel import build
from tests.interop.own import OWN, kept

if TYPE_CHECKING:
    from collections.abc import Callable

TIMEOUT_S = 300

DOMAIN = """\
<domain type='qemu'><name>guest</name><memory unit='MiB'>256</memory>
<os><type arch='x86_64' machine='pc'>hvm</type><kernel>/srv/vmlinuz</kernel><initrd>/srv/initramfs</initrd>
<cmdline>console=ttyS0 panic=-1 iohang_run=1 iohang_blocks=64 iohang_workers=2 iohang_duration_s=0 iohang_dd_mib=0</cmdline></os>
<devices><emulator>/usr/bin/qemu-system-x86_64</emulator>
<disk type='file' device='disk'>
  <driver name='qemu' type='raw' cache='none' io='threads' error_policy='stop' rerror_policy='stop'/>
  <source file='/mnt/iohang/guest.img'/><target dev='vda' bus='virtio'/>
</disk>
<serial type='file'><source path='/run/guest/console'/><target port='0'/></serial>
<serial type='file'><source path='/run/guest/records'/><target port='1'/></serial>
</devices></domain>
"""

BEFORE = """\
set -eu
trap 'echo "this failed: $BASH_COMMAND"; cat /run/iohang.log' ERR
# What is mounted beneath would be hidden, and still in the mount table, where libvirt takes the last cgroup2 for the right one.
findmnt -rno TARGET | grep -E '^/(etc|var)/' | tac | while IFS= read -r at; do
    case $PLACE/ in "$at"/*) ;; *) umount -l "$(printf %b "$at")" 2>/dev/null || true ;; esac
done
for own in /etc /var; do
    mkdir -p "$PLACE$own" && mount -t tmpfs tmpfs "$PLACE$own" && mkdir "$PLACE$own/upper" "$PLACE$own/work"
    mount -t overlay overlay -o "lowerdir=$own,upperdir=$PLACE$own/upper,workdir=$PLACE$own/work" $own
done
own /srv /mnt /run
mkdir -p /srv/disk /mnt/flaky /mnt/iohang /etc/libvirt /var/log/libvirt /var/lib/libvirt/qemu /run/guest && chmod 777 /run/guest
truncate -s 16M /srv/disk/guest.img && chmod 600 /srv/disk/guest.img
cp "$VMLINUZ" /srv/vmlinuz && cp "$INITRAMFS" /srv/initramfs && chmod 644 /srv/vmlinuz /srv/initramfs
getent passwd libvirt-qemu >/dev/null || useradd --system --user-group libvirt-qemu
printf '%s\\n' 'security_driver = "none"' 'namespaces = []' 'cgroup_controllers = []' 'stdio_handler = "file"' >/run/conf
mv /run/conf /etc/libvirt/qemu.conf
iohang-flaky -o allow_other /srv/disk /mnt/flaky /run/outage 2>/run/flaky.log &
until grep -q 'is served' /run/flaky.log; do sleep 0.1; done
iohang-mount /mnt/flaky /mnt/iohang -o allow_other,timeout=10,interval=0.5,log=/run/iohang.log
libvirtd -d
within() { # SECONDS COMMAND...: until it succeeds
    end=$(($(date +%s) + $1)); shift
    until "$@"; do [ "$(date +%s)" -lt "$end" ] || { echo "not within its time: $*"; exit 1; }; sleep 0.2; done
}
works() { before=$(wc -l </run/guest/records); within 60 more_than "$before"; }
more_than() { [ "$(wc -l </run/guest/records)" -gt $(($1 + 20)) ]; }
state() { virsh domstate --reason guest | grep -q "^$1"; }
unharmed() { ! grep -E 'ERROR|MISMATCH' /run/guest/records; }
hangs() { iohangctl check | grep -q "guest.img: hanging"; }
listens() { virsh list >/dev/null 2>&1; }
within 60 listens
virsh create /dev/stdin <<<"$DOMAIN" >/dev/null
[ "$(stat -c %U /srv/disk/guest.img)" = libvirt-qemu ] || { echo "the image is not QEMU's user's"; exit 1; }
within 120 test -s /run/guest/records
works
"""


def in_namespaces(tmp_path: Path, program: Callable[[str, str], str], script: str) -> None:
    """Run *script* after `BEFORE`: a guest works, and nothing has failed yet."""
    for name, package in {"libvirtd": "libvirt-daemon", "virsh": "libvirt-clients"}.items():
        program(name, package)
    kernel = build()
    given = {
        "PLACE": str(tmp_path),
        "VMLINUZ": str(kernel.vmlinuz),
        "INITRAMFS": str(kernel.initramfs),
        "DOMAIN": DOMAIN,
    }
    needed = kept(kernel.vmlinuz.parent, kernel.initramfs.parent)
    done = subprocess.run(
        ["unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc", "bash", "-c", OWN + BEFORE + script],
        env={**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", **given, **needed},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=TIMEOUT_S, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout


@pytest.mark.slow
def test_an_outage_within_the_timeout(tmp_path: Path, program: Callable[[str, str], str]) -> None:
    """docs/howto/libvirt.rst: "libvirt does not know of it: the guest is running", and goes on without an error."""
    script = """
        iohangctl set timeout=10min >/dev/null  # a busy machine may take its time for what follows
        echo 'data *.img errno=EIO' >/run/outage
        within 60 hangs
        state running
        rm /run/outage
        works
        unharmed
        grep -q 'no error was passed on' /run/iohang.log
    """
    in_namespaces(tmp_path, program, script)


@pytest.mark.slow
def test_an_outage_beyond_the_timeout(tmp_path: Path, program: Callable[[str, str], str]) -> None:
    """docs/howto/libvirt.rst: with error_policy='stop' "QEMU pauses the guest at EIO, too; virsh resume lets it go on"."""
    script = """
        echo 'data *.img errno=EIO' >/run/outage
        within 60 state 'paused (I/O error)'
        rm /run/outage
        within 60 grep -q 'works again' /run/iohang.log
        virsh resume guest >/dev/null
        works
        unharmed
    """
    in_namespaces(tmp_path, program, script)


@pytest.mark.slow
def test_a_guest_is_destroyed_in_an_outage(tmp_path: Path, program: Callable[[str, str], str]) -> None:
    """docs/howto/libvirt.rst: "virsh destroy ... waits until its requests are answered; iohangctl drain ends that"."""
    script = """
        iohangctl set timeout=inf >/dev/null
        echo 'data *.img errno=EIO' >/run/outage
        within 60 hangs
        virsh destroy guest >/run/destroyed 2>&1 &
        sleep 3
        [ ! -s /run/destroyed ]
        iohangctl drain >/dev/null
        within 60 grep -q destroyed /run/destroyed
    """
    in_namespaces(tmp_path, program, script)
