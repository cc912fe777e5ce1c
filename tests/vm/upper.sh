# shellcheck shell=bash disable=SC2034,SC2154,SC2164,SC2317 # sourced by suite.sh, under set -e
#
# Disks that are written: an upper is made, filled, killed, filled up, handed over and read again.
# Needs what suite.sh and recovery.sh define.

upper_base=$folder/ext4/ext4-3layers-3

# new_disk SIZE: sets config; the files are on the guest's own tmpfs.
new_disk() {
    rm -rf /tmp/disk
    config=$(obd-ublk create /tmp/disk --size "$1")
    [ "$config" = /tmp/disk/config.v1.json ] || fail "printed '$config'"
}

a_new_disk_takes_a_file_system_and_keeps_it() {
    local config dev
    new_disk 64M
    dev=$(obd-ublk attach "$config")
    [ "$(blockdev --getro "$dev")" = 0 ] || fail "$dev is read-only"
    [ "$(cat "/sys/block/${dev#/dev/}/queue/write_cache")" = "write back" ] || fail "no volatile cache"
    mkfs.ext4 -q "$dev"
    mkdir -p /mnt/disk
    mount "$dev" /mnt/disk
    cp -r "$folder/cases/stack8" /mnt/disk/
    (cd /mnt/disk && find . -type f -exec sha256sum {} +) >/tmp/disk.sums
    [ "$(wc -l </tmp/disk.sums)" -gt 3 ] || fail "nothing was copied"
    expect_status 12 obd-ublk detach "$dev"
    # Somebody else would write to it as well.
    expect_status 12 obd-ublk attach "$config"
    sync
    obd-ublk stat "$dev" | grep -q 'takes writes' || fail "$(obd-ublk stat "$dev")"
    umount /mnt/disk
    obd-ublk-device-check pack "$dev" /tmp/disk.pack
    obd-ublk detach "$dev"
    nothing_left
    obd-ublk export "$config" -o /tmp/disk.raw
    fsck.ext4 -fn /tmp/disk.raw
    dev=$(obd-ublk attach --mount /mnt/disk "$config")
    obd-ublk-device-check check "$dev" /tmp/disk.pack || true
    (cd /mnt/disk && sha256sum --quiet -c /tmp/disk.sums)
    echo more >/mnt/disk/more
    obd-ublk detach --unmount "$dev"
    nothing_left
    dev=$(obd-ublk attach --read-only --mount /mnt/disk "$config")
    grep -q more /mnt/disk/more || fail "the last file is gone"
    ! touch /mnt/disk/no || fail "written in spite of --read-only"
    obd-ublk detach --unmount "$dev"
    nothing_left
    rm -rf /tmp/disk /tmp/disk.raw
}

an_image_is_written_through_an_upper_of_its_own() {
    local dev
    rm -rf /tmp/upper
    mkdir -p /mnt/disk
    dev=$(obd-ublk attach --upper /tmp/upper --mount /mnt/disk "$upper_base/config.json")
    (cd /mnt/disk && sha256sum --quiet -c "$upper_base/sums")
    echo changed >/mnt/disk/new
    rm -rf /mnt/disk/etc
    obd-ublk detach --unmount "$dev"
    dev=$(obd-ublk attach --upper /tmp/upper --mount /mnt/disk "$upper_base/config.json")
    [ "$(cat /mnt/disk/new)" = changed ] || fail "the change is gone"
    [ ! -e /mnt/disk/etc ] || fail "what was removed is back"
    obd-ublk detach --unmount "$dev"
    # The image itself has not changed.
    dev=$(obd-ublk attach --mount /mnt/disk "$upper_base/config.json")
    (cd /mnt/disk && sha256sum --quiet -c "$upper_base/sums")
    obd-ublk detach --unmount "$dev"
    dev=$(obd-ublk attach --upper /tmp/short-lived --ephemeral "$upper_base/config.json")
    [ -s /tmp/short-lived/writable_data ] || fail "no upper"
    dd if=/dev/zero of="$dev" bs=1M count=1 oflag=direct 2>/dev/null
    obd-ublk detach "$dev"
    [ -z "$(ls /tmp/short-lived)" ] || fail "left: $(ls /tmp/short-lived)"
    # Removed as well when its server cannot do it any more.
    dev=$(obd-ublk attach --unsupervised --upper /tmp/short-lived --ephemeral "$upper_base/config.json")
    read_pid "$dev"
    kill -9 "$pid"
    pause 1
    obd-ublk detach "$dev"
    [ -z "$(ls /tmp/short-lived)" ] || fail "left after a kill: $(ls /tmp/short-lived)"
    nothing_left
    rm -rf /tmp/upper /tmp/short-lived
}

# Written and verified by fio while servers die, and a mounted file system beside it. A device whose
# servers die early more than five times is given up: hence rounds, each with an attach of its own.
killed_servers_lose_no_write() {
    local config dev fs pid state kills=0 writer round copy
    dmesg -C
    new_disk 64M
    mkdir -p /mnt/disk
    for round in 1 2 3; do
        dev=$(obd-ublk attach "$config")
        fs=$(obd-ublk attach --upper /tmp/upper "$upper_base/config.json")
        mount "$fs" /mnt/disk
        fio --name=w --filename="$dev" --rw=randwrite --bs=4k --size=32m --io_size=16m --direct=1 \
            --ioengine=io_uring --iodepth=32 --fsync=64 --verify=crc32c --verify_fatal=1 \
            --randseed="$round" --output=/tmp/fio.log &
        writer=$!
        for _ in 1 2 3; do
            cp -r "$folder/cases/stack8" "/mnt/disk/copy$kills"
            kill_and_wait "$dev" KILL
            kill_and_wait "$fs" KILL
            kills=$((kills + 2))
        done
        wait "$writer" || fail "fio: $(tail -n 5 /tmp/fio.log)"
        for copy in /mnt/disk/copy*; do
            diff -r "$folder/cases/stack8" "$copy"
        done
        umount /mnt/disk
        fsck.ext4 -fn "$fs"
        obd-ublk detach "$dev"
        obd-ublk detach "$fs"
    done
    no_io_error_in_the_kernels_log
    echo "$kills kills while writing" >&3
    nothing_left
    rm -rf /tmp/disk /tmp/upper
}

# Unsupervised, so that nobody comes: what was acknowledged is there at the next attach all the same.
acknowledged_writes_outlive_a_server_that_nobody_replaces() {
    local config dev pid
    new_disk 16M
    dev=$(obd-ublk attach --unsupervised "$config")
    head -c 1048576 /dev/urandom >/tmp/random
    dd if=/tmp/random of="$dev" bs=64k oflag=direct 2>/dev/null
    read_pid "$dev"
    kill -9 "$pid"
    pause 1
    obd-ublk detach "$dev"
    obd-ublk export "$config" -o /tmp/seen.raw
    cmp -n 1048576 /tmp/random /tmp/seen.raw || fail "export does not see it"
    dev=$(obd-ublk attach --unsupervised "$config")
    cmp -n 1048576 /tmp/random "$dev" || fail "the device does not have it"
    obd-ublk detach "$dev"
    nothing_left
    rm -rf /tmp/disk /tmp/random /tmp/seen.raw
}

a_full_disk_below_fails_writes_and_nothing_else() {
    local config dev
    mkdir -p /tmp/small
    mount -t tmpfs -o size=4m none /tmp/small
    config=$(obd-ublk create /tmp/small/disk --size 64M)
    dev=$(obd-ublk attach "$config")
    head -c 1048576 /dev/urandom >/tmp/random
    dd if=/tmp/random of="$dev" bs=64k oflag=direct 2>/dev/null
    ! dd if=/dev/urandom of="$dev" bs=64k seek=100 count=200 oflag=direct 2>/tmp/dd.log ||
        fail "200 writes of 64 KiB fit into 4 MiB"
    grep -qi 'no space' /tmp/dd.log || fail "$(cat /tmp/dd.log)"
    cmp -n 1048576 /tmp/random "$dev"
    mount -o remount,size=32m /tmp/small
    dd if=/tmp/random of="$dev" bs=64k seek=200 oflag=direct,sync 2>/dev/null || fail "still full"
    obd-ublk detach "$dev"
    dev=$(obd-ublk attach "$config")
    cmp -n 1048576 /tmp/random "$dev"
    dd if="$dev" bs=64k skip=200 count=16 2>/dev/null | cmp - /tmp/random
    obd-ublk detach "$dev"
    umount /tmp/small
    nothing_left
}

discarded_sectors_read_as_zeros_for_good() {
    local dev
    rm -rf /tmp/upper
    dev=$(obd-ublk attach --upper /tmp/upper "$upper_base/config.json")
    dd if=/dev/urandom of="$dev" bs=1M count=1 oflag=direct 2>/dev/null
    blkdiscard -o 4096 -l 65536 "$dev"
    # Below it the image has data.
    blkdiscard -z -o 8388608 -l 65536 "$dev"
    obd-ublk detach "$dev"
    dev=$(obd-ublk attach --upper /tmp/upper "$upper_base/config.json")
    cmp -n 65536 -i 4096:0 "$dev" /dev/zero
    cmp -n 65536 -i 8388608:0 "$dev" /dev/zero
    obd-ublk detach "$dev"
    nothing_left
    rm -rf /tmp/upper
}

written_devices_are_upgraded_under_load() {
    local config dev pauses=() took writer
    dmesg -C
    new_disk 64M
    dev=$(obd-ublk attach "$config")
    fio --name=w --filename="$dev" --rw=randwrite --bs=4k --size=32m --io_size=24m --direct=1 \
        --ioengine=io_uring --iodepth=16 --fsync=128 --verify=crc32c --verify_fatal=1 \
        --output=/tmp/fio.log &
    writer=$!
    for _ in 1 2 3; do
        took=$(obd-ublk upgrade "$dev")
        pauses+=("${took##*  }")
    done
    wait "$writer" || fail "fio: $(tail -n 5 /tmp/fio.log)"
    no_io_error_in_the_kernels_log
    echo "upgrade pauses: ${pauses[*]}" >&3
    obd-ublk detach "$dev"
    nothing_left
    rm -rf /tmp/disk
}

a_quota_warns_fails_with_enospc_and_is_kept_by_successors() {
    local config dev pid state
    new_disk 64M
    dev=$(obd-ublk attach --quota 8M "$config")
    obd-ublk stat "$dev" | grep -q '^quota  *0 % of 8.00 MiB' || fail "$(obd-ublk stat "$dev")"
    dd if=/dev/urandom of="$dev" bs=64k count=120 oflag=direct conv=fsync 2>/dev/null
    obd-ublk stat "$dev" | grep -q '^warning .* of the quota' || fail "$(obd-ublk stat "$dev")"
    [ "$(grep -c 'writes may soon fail' "/run/obd-ublk/${dev#/dev/ublkb}/log")" = 1 ] ||
        fail "$(cat "/run/obd-ublk/${dev#/dev/ublkb}/log")"
    ! dd if=/dev/urandom of="$dev" bs=64k seek=200 count=16 oflag=direct 2>/tmp/dd.log ||
        fail "120 + 16 writes of 64 KiB fit into 8 MiB"
    grep -qi 'no space' /tmp/dd.log || fail "$(cat /tmp/dd.log)"
    obd-ublk why "$dev" | grep -q 'quota' || fail "$(obd-ublk why "$dev")"
    kill_and_wait "$dev" KILL
    obd-ublk stat --json "$dev" | grep -q '"quota_bytes": *8388608' || fail "lost by the successor"
    obd-ublk upgrade "$dev"
    obd-ublk stat --json "$dev" | grep -q '"quota_bytes": *8388608' || fail "lost by the upgrade"
    # What is discarded and flushed makes room.
    blkdiscard -o 0 -l $((4 << 20)) "$dev"
    dd if=/dev/zero of="$dev" bs=4k seek=8191 count=1 oflag=direct conv=fsync 2>/dev/null || true
    sync "$dev"
    dd if=/dev/urandom of="$dev" bs=64k seek=200 count=16 oflag=direct conv=fsync 2>/dev/null ||
        fail "still full"
    ! obd-ublk stat "$dev" | grep -q '^warning' || fail "$(obd-ublk stat "$dev")"
    obd-ublk detach "$dev"
    expect_status 64 obd-ublk attach --quota 8M "$upper_base/config.json"
    nothing_left
    rm -rf /tmp/disk
}

# Filled, emptied and compacted: smaller, and what it was.
a_detached_disk_is_compacted() {
    local config dev before after
    new_disk 64M
    dev=$(obd-ublk attach "$config")
    mkfs.ext4 -q "$dev"
    mkdir -p /mnt/disk
    mount -o discard "$dev" /mnt/disk
    dd if=/dev/urandom of=/mnt/disk/large bs=1M count=40 conv=fsync 2>/dev/null
    cp -r "$folder/cases/stack8" /mnt/disk/
    rm /mnt/disk/large
    sync
    (cd /mnt/disk && find . -type f -exec sha256sum {} +) >/tmp/disk.sums
    umount /mnt/disk
    expect_status 12 obd-ublk compact "$config"
    obd-ublk detach "$dev"
    obd-ublk export "$config" -o /tmp/disk.raw
    before=$(stat -c %s /tmp/disk/writable_data)
    obd-ublk compact "$config" >&3
    after=$(stat -c %s /tmp/disk/writable_data)
    [ "$after" -lt $((before / 2)) ] || fail "$before bytes are $after now"
    obd-ublk export "$config" | cmp - /tmp/disk.raw
    dev=$(obd-ublk attach --mount /mnt/disk "$config")
    (cd /mnt/disk && sha256sum --quiet -c /tmp/disk.sums)
    obd-ublk detach --unmount "$dev"
    obd-ublk export "$config" -o /tmp/disk.raw
    fsck.ext4 -fn /tmp/disk.raw
    nothing_left
    rm -rf /tmp/disk /tmp/disk.raw
}

a_disk_grows_between_two_attaches_and_its_file_system_with_it() {
    local config dev
    new_disk 32M
    dev=$(obd-ublk attach "$config")
    mkfs.ext4 -q "$dev"
    expect_status 12 obd-ublk resize "$config" 64M
    obd-ublk detach "$dev"
    obd-ublk resize "$config" 64M >&3
    expect_status 64 obd-ublk resize "$config" 32M
    dev=$(obd-ublk attach --mount /mnt/disk "$config")
    [ "$(blockdev --getsize64 "$dev")" = $((64 << 20)) ] || fail "$(blockdev --getsize64 "$dev")"
    resize2fs "$dev" 2>/dev/null
    dd if=/dev/urandom of=/mnt/disk/large bs=1M count=40 conv=fsync 2>/dev/null || fail "no room"
    obd-ublk detach --unmount "$dev"
    obd-ublk export "$config" -o /tmp/disk.raw
    fsck.ext4 -fn /tmp/disk.raw
    nothing_left
    rm -rf /tmp/disk /tmp/disk.raw
}

# Under a mounted file system that is written to, where the kernel can; refused where it cannot.
an_attached_disk_grows_where_the_kernel_can() {
    local config dev writer
    new_disk 64M
    dev=$(obd-ublk attach "$config")
    mkfs.ext4 -q "$dev"
    if [[ "$(uname -r)" = 6.12* ]]; then
        expect_status 4 obd-ublk resize "$dev" 128M
        [ "$(blockdev --getsize64 "$dev")" = $((64 << 20)) ] || fail "the size changed"
        obd-ublk detach "$dev"
        nothing_left
        rm -rf /tmp/disk
        return
    fi
    mkdir -p /mnt/disk
    mount "$dev" /mnt/disk
    (while :; do
        dd if=/dev/urandom of=/mnt/disk/busy bs=64k count=64 conv=fsync 2>/dev/null || exit 1
    done) &
    writer=$!
    pause 1
    expect_status 64 obd-ublk resize "$dev" 32M
    obd-ublk resize "$dev" 128M >&3
    [ "$(blockdev --getsize64 "$dev")" = $((128 << 20)) ] || fail "$(blockdev --getsize64 "$dev")"
    obd-ublk stat --json "$dev" | grep -q "\"size_bytes\": *$((128 << 20))" || fail "stat"
    resize2fs "$dev" 2>/dev/null
    kill -0 "$writer" || fail "a write failed"
    # A successor finds the larger disk, and its device as large.
    kill_and_wait "$dev" KILL
    [ "$(blockdev --getsize64 "$dev")" = $((128 << 20)) ] || fail "after a kill"
    dd if=/dev/urandom of=/mnt/disk/large bs=1M count=90 conv=fsync 2>/dev/null || fail "no room"
    kill "$writer"
    wait "$writer" || true
    sha256sum /mnt/disk/large >/tmp/disk.sums
    umount /mnt/disk
    fsck.ext4 -fn "$dev"
    obd-ublk detach "$dev"
    dev=$(obd-ublk attach --mount /mnt/disk "$config")
    sha256sum --quiet -c /tmp/disk.sums
    obd-ublk detach --unmount "$dev"
    nothing_left
    rm -rf /tmp/disk
}

# Over layers and over nothing, with kills; what overlaybd itself would read is what export reads.
sparse_uppers_take_a_file_system_and_kills() {
    local config dev pid state kills=0 copy
    rm -rf /tmp/disk
    config=$(obd-ublk create /tmp/disk --sparse --on "$upper_base/config.json")
    dev=$(obd-ublk attach "$config")
    [ "$(cat "/sys/block/${dev#/dev/}/queue/discard_max_bytes")" = 0 ] || fail "DISCARD is offered"
    mkdir -p /mnt/disk
    mount "$dev" /mnt/disk
    (cd /mnt/disk && sha256sum --quiet -c "$upper_base/sums")
    for _ in 1 2 3; do
        cp -r "$folder/cases/stack8" "/mnt/disk/copy$kills"
        kill_and_wait "$dev" KILL
        kills=$((kills + 1))
    done
    for copy in /mnt/disk/copy*; do
        diff -r "$folder/cases/stack8" "$copy"
    done
    umount /mnt/disk
    fsck.ext4 -fn "$dev"
    # Zeros over layers are there at the next attach, too.
    blkdiscard -z -o 8388608 -l 65536 "$dev"
    obd-ublk detach "$dev"
    dev=$(obd-ublk attach "$config")
    cmp -n 65536 -i 8388608:0 "$dev" /dev/zero
    obd-ublk detach "$dev"
    rm -rf /tmp/disk
    config=$(obd-ublk create /tmp/disk --sparse --size 64M)
    dev=$(obd-ublk attach "$config")
    fio --name=w --filename="$dev" --rw=randwrite --bs=4k --size=32m --direct=1 \
        --ioengine=io_uring --iodepth=32 --fsync=64 --verify=crc32c --verify_fatal=1 \
        --output=/tmp/fio.log || fail "fio: $(tail -n 5 /tmp/fio.log)"
    blkdiscard "$dev"
    obd-ublk detach "$dev"
    [ "$(du -k /tmp/disk/writable_data | cut -f1)" -lt 1024 ] || fail "nothing was given back"
    nothing_left
    rm -rf /tmp/disk
}

# new_file_system TYPE: sets config and dev; a device with a new file system at /mnt/disk. xfs takes
# no less than 300 MiB; what is not written takes no memory of the guest.
new_file_system() {
    new_disk 320M
    dev=$(obd-ublk attach "$config")
    "mkfs.$1" -q "$dev"
    mkdir -p /mnt/disk
    mount -t "$1" -o discard "$dev" /mnt/disk
}

# The file system's own judgement of an unmounted device.
check_file_system() { # check_file_system TYPE DEV
    case $1 in
    ext4) fsck.ext4 -fn "$2" ;;
    xfs) xfs_repair -n "$2" ;;
    esac
}

fio_verifies_a_mounted_ext4_and_xfs_under_kills() {
    local config dev pid state type writer round copy
    dmesg -C
    for type in ext4 xfs; do
        new_file_system "$type"
        fio --name=w --directory=/mnt/disk --rw=randwrite --bs=4k --size=32m --direct=1 \
            --ioengine=io_uring --iodepth=32 --fsync=64 --verify=crc32c --verify_fatal=1 \
            --output=/tmp/fio.log &
        writer=$!
        for round in 1 2 3; do
            cp -r "$folder/cases/stack8" "/mnt/disk/copy$round"
            kill_and_wait "$dev" KILL
        done
        wait "$writer" || fail "fio on $type: $(tail -n 5 /tmp/fio.log)"
        for copy in /mnt/disk/copy*; do
            diff -r "$folder/cases/stack8" "$copy"
        done
        umount /mnt/disk
        check_file_system "$type" "$dev"
        obd-ublk detach "$dev"
        # And once more from what is on the disk.
        dev=$(obd-ublk attach "$config")
        check_file_system "$type" "$dev"
        obd-ublk detach "$dev"
    done
    no_io_error_in_the_kernels_log
    nothing_left
    rm -rf /tmp/disk
}

# Reads, writes, truncates, maps, punches and copies ranges of one file, each compared with a copy.
fsx_finds_no_fault_in_a_mounted_ext4_and_xfs() {
    local config dev type seed times
    repeat 3 1
    for type in ext4 xfs; do
        new_file_system "$type"
        for seed in $(seq "$times"); do
            "$folder/bin/fsx" -q -N 2000 -S "$seed" -P /tmp "/mnt/disk/fsx$seed" >/tmp/fsx.log 2>&1 ||
                fail "fsx on $type, seed $seed: $(tail -n 5 /tmp/fsx.log)"
            sync
            echo 3 >/proc/sys/vm/drop_caches
        done
        umount /mnt/disk
        check_file_system "$type" "$dev"
        obd-ublk detach "$dev"
    done
    nothing_left
    rm -rf /tmp/disk
}

upper_smoke=(a_new_disk_takes_a_file_system_and_keeps_it killed_servers_lose_no_write)
upper_rest=(fio_verifies_a_mounted_ext4_and_xfs_under_kills
    fsx_finds_no_fault_in_a_mounted_ext4_and_xfs an_image_is_written_through_an_upper_of_its_own
    acknowledged_writes_outlive_a_server_that_nobody_replaces
    a_full_disk_below_fails_writes_and_nothing_else
    a_quota_warns_fails_with_enospc_and_is_kept_by_successors
    a_detached_disk_is_compacted a_disk_grows_between_two_attaches_and_its_file_system_with_it
    an_attached_disk_grows_where_the_kernel_can
    sparse_uppers_take_a_file_system_and_kills discarded_sectors_read_as_zeros_for_good
    written_devices_are_upgraded_under_load)
