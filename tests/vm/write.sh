# shellcheck shell=bash disable=SC2034,SC2154,SC2317 # sourced by suite.sh
#
# Writing through a real kernel, to a disk of memory that knows no image: whether what the front end
# announces is what the block layer makes of it, and whether data, flushes and discards arrive.

# start_ram_disk [OPTION...]: serves a writable disk of 128 MiB; sets dev and server
start_ram_disk() {
    obd-ublk-null --writable --sectors 262144 "$@" >/tmp/ram-disk.log 2>&1 &
    server=$!
    local _
    for _ in $(seq 300); do
        dev=$(head -n 1 /tmp/ram-disk.log)
        [[ ! $dev =~ ^/dev/ublkb[0-9]+$ ]] || return 0
        kill -0 "$server" 2>/dev/null || break
        pause 0.1
    done
    fail "no disk: $(cat /tmp/ram-disk.log)"
}

# Ends the server, which must have answered no request with an error.
stop_ram_disk() {
    kill -TERM "$server"
    wait "$server"
    tail -n 1 /tmp/ram-disk.log >&3
    grep -q '"errors":0,"panics":0' /tmp/ram-disk.log || fail "$(tail -n 1 /tmp/ram-disk.log)"
    nothing_left
}

# counter NAME: of the disk that was stopped
counter() {
    grep -o "\"$1\":[0-9]*" /tmp/ram-disk.log | cut -d: -f2
}

a_writable_device_announces_its_cache_durable_writes_and_discards() {
    local dev server queue
    start_ram_disk
    queue=/sys/block/${dev#/dev/}/queue
    [ "$(blockdev --getro "$dev")" = 0 ] || fail "$dev is read-only"
    [ "$(cat "$queue/write_cache")" = "write back" ] || fail "write cache"
    [ "$(cat "$queue/fua")" = 1 ] || fail "fua"
    [ "$(cat "$queue/discard_granularity")" = 4096 ] || fail "discard granularity"
    [ "$(cat "$queue/discard_max_bytes")" = 268435456 ] || fail "discard_max_bytes"
    [ "$(cat "$queue/write_zeroes_max_bytes")" = 268435456 ] || fail "write_zeroes_max_bytes"
    [ "$(cat "$queue/logical_block_size")" = 512 ] || fail "logical block size"
    stop_ram_disk
}

random_writes_with_syncs_are_read_back_right() {
    local dev server
    # Flushes of 2 ms: many requests come while one is under way.
    start_ram_disk --flush-us 2000
    fio --name=write --filename="$dev" --rw=randwrite --bs=4k --size=48m --direct=1 \
        --ioengine=io_uring --iodepth=32 --fsync=16 --verify=crc32c --verify_fatal=1 --do_verify=1
    fio --name=syncers --filename="$dev" --rw=randwrite --bs=4k --size=1m --offset=64m \
        --offset_increment=4m --direct=1 --ioengine=psync --fsync=1 --numjobs=4 --time_based \
        --runtime=3
    dd if=/dev/zero of="$dev" bs=4k count=64 oflag=direct,dsync
    stop_ram_disk
    [ "$(counter flushes)" -gt 0 ] || fail "nobody flushed"
    [ "$(counter disk_flushes)" -lt "$(counter flushes)" ] || fail "flushes were not shared"
}

a_file_system_is_made_written_and_found_whole() {
    local dev server
    start_ram_disk
    mkfs.ext4 -q "$dev"
    mkdir -p /mnt/rw
    mount -t ext4 -o discard "$dev" /mnt/rw
    dd if=/dev/urandom of=/mnt/rw/file bs=64k count=256 conv=fsync
    (cd /mnt/rw && sha256sum file) >/tmp/rw.sums
    cp /mnt/rw/file /mnt/rw/other
    rm /mnt/rw/other
    sync
    umount /mnt/rw
    fsck.ext4 -f -n "$dev"
    mount -t ext4 -o ro "$dev" /mnt/rw
    (cd /mnt/rw && sha256sum -c /tmp/rw.sums)
    umount /mnt/rw
    stop_ram_disk
    [ "$(counter flushes)" -gt 0 ] || fail "a journal without a flush"
}

what_is_discarded_or_zeroed_reads_as_zeros() {
    local dev server
    start_ram_disk
    dd if=/dev/urandom of="$dev" bs=1M count=32 oflag=direct
    blkdiscard --offset $((4 << 20)) --length $((8 << 20)) "$dev"
    blkdiscard --zeroout --offset $((16 << 20)) --length $((4 << 20)) "$dev"
    cmp --bytes $((8 << 20)) --ignore-initial $((4 << 20)):0 "$dev" /dev/zero
    cmp --bytes $((4 << 20)) --ignore-initial $((16 << 20)):0 "$dev" /dev/zero
    ! cmp --bytes 4096 --ignore-initial $((12 << 20)):0 "$dev" /dev/zero || fail "too much went"
    blkdiscard "$dev"
    cmp --bytes $((128 << 20)) "$dev" /dev/zero
    stop_ram_disk
    [ "$(counter discards)" -ge 3 ] || fail "discards did not arrive"
}

write_smoke=(a_writable_device_announces_its_cache_durable_writes_and_discards
    random_writes_with_syncs_are_read_back_right
    a_file_system_is_made_written_and_found_whole
    what_is_discarded_or_zeroed_reads_as_zeros)
