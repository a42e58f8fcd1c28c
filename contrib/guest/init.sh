#!/bin/busybox sh
# /init of the test guest: I/O without end on /dev/vda, and a clock beside it.
#
# Records go out on the second serial port, one line each (records.py reads them); the first port is the kernel's console,
# so that a printk never cuts a record in two. Words come in on the second port: stop, dmesg, poweroff.
# Parameters are words of the kernel's command line, which the kernel hands to /init in its environment:
# iohang_run, iohang_blocks, iohang_workers, iohang_duration_s (0: until told to stop), and iohang_dd_mib (0: none): how much
# one dd writes, and then one reads, from the disk's start on, before the workers begin. It overwrites what is there.
#
# shellcheck shell=dash disable=SC2034,SC2154

/bin/busybox mount -t proc proc /proc
/bin/busybox --install -s /bin
export PATH=/bin
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
mount -t tmpfs run /run
for module in virtio_ring virtio virtio_pci_legacy_dev virtio_pci_modern_dev virtio_pci virtio_blk; do
    insmod "/modules/$module.ko"
done
exec 3<>/dev/ttyS1
stty raw -echo 115200 <&3

# No $(...) below this line wherever it runs once a step: a fork costs milliseconds under TCG. Results come back in variables.

uptime() {
    read -r now rest </proc/uptime
}

# The content of a block, 64 bytes a line and a sector number in each, is a function of run, pass and block
# (records.block_content is the same on the host).
content() {
    set --
    for sector in 0 1 2 3 4 5 6 7; do
        line="iohang run=$iohang_run pass=$pass block=$block sector=$sector"
        set -- "$@" "$line" "$line" "$line" "$line" "$line" "$line" "$line" "$line"
    done
    printf '%-63s\n' "$@" >"$want"
}

# record OPERATION OUTCOME [MORE]
record() {
    uptime
    echo "IO pass=$pass block=$block op=$1 $2 uptime=$now$3" >&3
}

# failed OPERATION RC
failed() {
    errors=$((errors + 1))
    read -r message <"$stderr"
    record "$1" ERROR " rc=$2 message=$message"
}

write_block() {
    content
    # From here to the acknowledgement nobody can know what is on the disk.
    eval "acknowledged_$slot="
    record write begin
    if dd if="$want" of=/dev/vda bs=4096 count=1 oflag=direct,seek_bytes seek=$((block * spacing)) conv=notrunc,fsync \
        2>"$stderr"; then
        eval "acknowledged_$slot=$pass"
        writes=$((writes + 1))
        record write ok
    else
        failed write $?
    fi
}

read_block() {
    content
    record read begin
    if dd if=/dev/vda of="$got" bs=4096 count=1 iflag=direct,skip_bytes,fullblock skip=$((block * spacing)) \
        2>"$stderr"; then
        reads=$((reads + 1))
        if cmp -s "$want" "$got"; then
            record read ok
        else
            mismatches=$((mismatches + 1))
            # The first line of what was there instead tells a stale block from a misplaced one.
            read -r message <"$got"
            record read MISMATCH " message=$message"
        fi
    else
        failed read $?
    fi
}

# worker NUMBER: owns the blocks NUMBER, NUMBER + workers, ...; one write and one read of an earlier block at each step.
worker() {
    number=$1
    want=/run/want.$number got=/run/got.$number stderr=/run/stderr.$number
    slots=$((iohang_blocks / iohang_workers))
    step=0 writes=0 reads=0 mismatches=0 errors=0
    while [ ! -e /run/stop ]; do
        pass=$((step / slots + 1))
        slot=$((step * 37 % slots))
        block=$((slot * iohang_workers + number))
        write_block

        earlier=$((step - step * 31 % slots))
        [ $earlier -ge 0 ] || earlier=0
        slot=$((earlier * 37 % slots))
        block=$((slot * iohang_workers + number))
        eval "pass=\$acknowledged_$slot"
        [ -z "$pass" ] || read_block

        step=$((step + 1))
        uptime
        [ "$deadline_s" -eq 0 ] || [ "${now%.*}" -lt "$deadline_s" ] || : >/run/stop
    done
    echo "$writes $reads $mismatches $errors" >"/run/totals.$number"
}

# One sequential stream in each direction, 1 MiB at a time, past the guest's page cache: for a benchmark.
stream() {
    stderr=/run/stderr.dd
    for operation in write read; do
        case $operation in
            write) set -- if=/dev/zero of=/dev/vda oflag=direct conv=notrunc,fsync ;;
            read) set -- if=/dev/vda of=/dev/null iflag=direct ;;
        esac
        uptime
        begin=$now
        if dd "$@" bs=1048576 count="$iohang_dd_mib" 2>"$stderr"; then outcome=ok; else outcome=ERROR; fi
        uptime
        echo "DD op=$operation outcome=$outcome mib=$iohang_dd_mib begin=$begin uptime=$now" >&3
    done
}

# The counted loop shows that the CPU goes on, /proc/uptime that the clock does; the sleep ends on a whole second.
clock() {
    spins=0
    while [ ! -e /run/done ]; do
        round=0
        while [ $round -lt 500 ]; do
            round=$((round + 1))
        done
        spins=$((spins + round))
        read -r name user nice system idle iowait rest </proc/stat
        uptime
        echo "TICK uptime=$now spins=$spins user=$user nice=$nice system=$system idle=$idle iowait=$iowait" >&3
        usleep $((1000000 - (1${now#*.} - 100) * 10000))
    done
}

supervisor() {
    number=0
    while [ $number -lt "$iohang_workers" ]; do
        worker $number &
        number=$((number + 1))
    done
    wait
    writes=0 reads=0 mismatches=0 errors=0
    for totals in /run/totals.*; do
        read -r w r m e <"$totals"
        writes=$((writes + w)) reads=$((reads + r)) mismatches=$((mismatches + m)) errors=$((errors + e))
    done
    complaints='I/O error|critical .* error|blk_update_request|blocked for more than|hung.task|remount|Call Trace|BUG:|WARNING:'
    dmesg | grep -Ei "$complaints" | while read -r line; do echo "KMSG $line" >&3; done
    uptime
    echo "DONE writes=$writes reads=$reads mismatches=$mismatches errors=$errors uptime=$now" >&3
    : >/run/done
}

sectors=0
[ ! -e /sys/block/vda/size ] || read -r sectors </sys/block/vda/size
if [ $((sectors / 8)) -lt "$iohang_blocks" ]; then
    echo "no disk, or one of less than $iohang_blocks blocks of 4 KiB ($sectors sectors)" >/dev/ttyS0
    poweroff -f
fi
spacing=$((sectors * 512 / iohang_blocks / 4096 * 4096))
uptime
deadline_s=0
[ "$iohang_duration_s" -eq 0 ] || deadline_s=$((${now%.*} + 1 + iohang_duration_s))
echo "READY run=$iohang_run blocks=$iohang_blocks workers=$iohang_workers spacing=$spacing uptime=$now" >&3
if [ "$iohang_dd_mib" -gt 0 ]; then stream; fi
clock &
supervisor &
while read -r word <&3; do
    case $word in
        stop) : >/run/stop ;;
        dmesg)
            dmesg | while read -r line; do echo "DMESG $line" >&3; done
            echo "DMESG-END" >&3
            ;;
        poweroff) poweroff -f ;;
    esac
done
# PID 1 must not end: the kernel would panic.
poweroff -f
