#!/bin/busybox sh
# /init of the initramfs before Debian: the root file system is /dev/vda, and /dev/vdb is a tar archive that is unpacked over it
# (image.py: this tree as it is now, and what the caller of this run adds). Then Debian's own systemd.
#
# shellcheck shell=dash
/bin/busybox mount -t proc proc /proc
/bin/busybox --install -s /bin
export PATH=/bin
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
for module in virtio_ring virtio virtio_pci_legacy_dev virtio_pci_modern_dev virtio_pci virtio_blk; do
    insmod "/modules/$module.ko"
done
# What fails here ends QEMU, and is the last thing on its console: as PID 1 ends, the kernel panics (panic=-1).
set -e
mount -t ext4 /dev/vda /root
tar -x -f /dev/vdb -C /root
for directory in proc sys dev; do
    mount --move "/$directory" "/root/$directory"
done
exec switch_root /root /sbin/init
