# shellcheck shell=bash disable=SC2034,SC2154,SC2164,SC2317 # sourced by suite.sh, under set -e
#
# Snapshots of mounted devices: the layer is whole, the device goes on, and comes back when its
# server is killed in the middle of it. Needs what suite.sh, recovery.sh and upper.sh define.

# A file system is frozen, becomes a layer, and is written on; the layer alone is the file system of
# that moment.
a_mounted_file_system_becomes_a_layer_and_is_written_on() {
    local config dev n status=0
    rm -rf /tmp/disk /tmp/snap
    mkdir -p /tmp/snap /mnt/disk
    new_disk 64M
    dev=$(obd-ublk attach "$config")
    mkfs.ext4 -q "$dev"
    mount "$dev" /mnt/disk
    for n in 1 2 3; do
        cp -r "$folder/cases/stack8" "/mnt/disk/copy$n"
        (cd /mnt/disk && find . -type f -exec sha256sum {} +) >"/tmp/snap/sums$n"
        obd-ublk snapshot "$dev" --freeze --out "/tmp/disk/layer$n" --upper "/tmp/disk/u$n" \
            --config-out "/tmp/disk/config$n.json" --commit "/tmp/disk/zfile$n" >&3
        # Not in the layer.
        echo late >"/mnt/disk/late$n"
    done
    expect_status 64 obd-ublk snapshot "$dev" --out /tmp/disk/layer1 --upper /tmp/disk/u9 \
        --config-out /tmp/disk/config9.json
    ! compgen -G '/tmp/disk/*9*' || fail "something is left of a snapshot that was refused"
    [ "$(obd-ublk list | grep -c config3.json)" = 1 ] || fail "$(obd-ublk list)"
    # The successor is made of the new layers, from the parcel.
    kill_and_wait "$dev" KILL
    obd-ublk stat "$dev" | grep -q parcel || fail "$(obd-ublk stat "$dev")"
    (cd /mnt/disk && sha256sum --quiet -c /tmp/snap/sums3)
    [ "$(cat /mnt/disk/late3)" = late ] || fail "the last file is gone"
    umount /mnt/disk
    fsck.ext4 -fn "$dev"
    obd-ublk detach "$dev"
    for n in 1 2 3; do
        obd-ublk verify "/tmp/disk/layer$n" >/dev/null
        # It was compressed behind our back.
        for _ in $(seq 200); do
            [ ! -e "/tmp/disk/zfile$n" ] || [ -e "/tmp/disk/zfile$n.log" ] || break
            pause 0.3
        done
        obd-ublk verify "/tmp/disk/zfile$n" >/dev/null || fail "$(cat "/tmp/disk/zfile$n.log")"
        # The layers up to this one, without the upper: as they were made, and compressed.
        python3 - "$n" layer >/tmp/snap/config.json <<'PYTHON'
import json, sys
n, name = int(sys.argv[1]), sys.argv[2]
print(json.dumps({"lowers": [{"file": f"/tmp/disk/{name}{i + 1}"} for i in range(n)]}))
PYTHON
        sed 's/layer\([0-9]\)/zfile\1/g' /tmp/snap/config.json >/tmp/snap/zfile.json
        [ "$(obd-ublk diff --json /tmp/snap/config.json /tmp/snap/zfile.json |
            python3 -c 'import json, sys; print(json.load(sys.stdin)["differing_bytes"])')" = 0 ] ||
            fail "the compressed layer $n differs"
        dev=$(obd-ublk attach --mount /mnt/disk /tmp/snap/config.json)
        (cd /mnt/disk && sha256sum --quiet -c "/tmp/snap/sums$n")
        [ ! -e "/mnt/disk/late$n" ] || fail "layer $n has what came later"
        obd-ublk detach --unmount "$dev"
    done
    expect_status 6 obd-ublk attach "$config" || status=$?
    [ "$status" = 0 ]
    nothing_left
    rm -rf /tmp/disk /tmp/snap
}

# The server is killed at some moment of a snapshot under fio, again and again: it comes back as
# before or as after, and every block is as fio wrote it.
servers_killed_in_a_snapshot_come_back_as_before_or_after() {
    local config dev writer n pid before=0 after=0 delay took state times
    dmesg -C
    new_disk 64M
    repeat 8 4
    for n in $(seq "$times"); do
        dev=$(obd-ublk attach "$config")
        fio --name=w --filename="$dev" --rw=randwrite --bs=4k --size=16m --io_size=4m --direct=1 \
            --ioengine=io_uring --iodepth=16 --fsync=64 --verify=crc32c --verify_fatal=1 \
            --randseed="$n" --output=/tmp/fio.log &
        writer=$!
        pause 0.5
        read_pid "$dev"
        obd-ublk snapshot "$dev" --out "/tmp/disk/layer$n" --upper "/tmp/disk/u$n" \
            --config-out "/tmp/disk/config$n.json" >/tmp/snapshot.log 2>&1 &
        took=$!
        delay=$((n * 15 + RANDOM % 15))
        printf -v delay '0.%03d' $delay
        pause "$delay"
        kill -9 "$pid"
        wait "$took" || true
        wait_state "$dev" live 60
        wait "$writer" || fail "round $n: fio: $(tail -n 5 /tmp/fio.log)"
        if obd-ublk list | grep -q "config$n.json"; then
            after=$((after + 1))
            config=/tmp/disk/config$n.json
        else
            before=$((before + 1))
            [ ! -e "/tmp/disk/layer$n" ] || fail "round $n: a layer without a config"
        fi
        obd-ublk-device-check pack "$dev" /tmp/disk.pack
        obd-ublk detach "$dev"
        nothing_left
        dev=$(obd-ublk attach "$config")
        obd-ublk-device-check check "$dev" /tmp/disk.pack
        obd-ublk detach "$dev"
        ! compgen -G '/tmp/disk/*/*.snapshot*' || fail "round $n: an intent is left"
    done
    no_io_error_in_the_kernels_log
    echo "$before times as before, $after times as after" >&3
    nothing_left
    rm -rf /tmp/disk
}

snapshot_smoke=(a_mounted_file_system_becomes_a_layer_and_is_written_on)
snapshot_rest=(servers_killed_in_a_snapshot_come_back_as_before_or_after)
