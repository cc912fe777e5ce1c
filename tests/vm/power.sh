#!/usr/bin/env bash
# Power cuts: a guest writes through an upper on a disk of its own, or fills the cache there, and is
# killed in the middle of it; the next one looks at every sector and goes on.
#
#   tests/vm/power.sh [KERNEL] [ROUNDS]         an upper; on the host; default: 6.12 20
#   tests/vm/power.sh --cache [KERNEL] [ROUNDS] the cache; default: 6.12 4
#   tests/vm/power.sh --guest ROUND FIRST-DURABLE...
#   tests/vm/power.sh --guest-cache ROUND FOLDER
#
# The disk is a file that survives QEMU; the guest's memory, with every page that was not synced,
# does not. A step counts as durable when the guest has said so after its sync. Of the cache nothing
# has to be durable, and nothing that is torn may be read.
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)

in_guest() {
    local round=$1 dev
    shift
    mount /dev/vda /mnt
    [ -e /mnt/upper ] || obd-ublk create /mnt/upper --size 8M >/dev/null
    dev=$(obd-ublk attach /mnt/upper/config.v1.json)
    echo "attached"
    [ $# = 0 ] || obd-ublk-device-check audit "$dev" "$@"
    echo "audited"
    [ "$round" != last ] || {
        obd-ublk detach "$dev"
        obd-ublk verify /mnt/upper/config.v1.json
        umount /mnt
        return
    }
    exec obd-ublk-device-check churn "$dev" $((round * 1000000))
}

# The registry's image is FOLDER/raw; it is slow, so that the power fails while the cache fills.
in_guest_cache() {
    local round=$1 folder=$2 dev had
    mount /dev/vda /mnt
    export OBD_UBLK_CACHE_DIR=/mnt/cache
    ip link set lo up
    obd-ublk-mock-registry 127.0.0.1:5500 "$folder/blobs" --rate 16777216 >/tmp/registry.log 2>&1 &
    until grep -q '^http' /tmp/registry.log; do sleep 0.1; done
    [ "$round" = 1 ] || {
        # What the cut has left is read first, and by itself.
        had=$(obd-ublk cache ls --json | tr -d '\n ')
        dev=$(obd-ublk attach --unsupervised "$folder/config.json")
        cmp "$dev" "$folder/raw"
        obd-ublk detach "$dev"
        obd-ublk cache fsck
        echo "all sectors are right; the cut had left ${had:0:160}"
    }
    echo "audited"
    [ "$round" != 99 ] || {
        umount /mnt
        return
    }
    echo "filling"
    while :; do
        obd-ublk cache gc --to 0
        dev=$(obd-ublk attach --unsupervised "$folder/config.json")
        dd if="$dev" of=/dev/null bs=64k iflag=direct 2>/dev/null
        obd-ublk detach "$dev"
    done
}

cut_cache() {
    local kernel=${1:-6.12} rounds=${2:-4} round folder out status digest
    folder=$(mktemp -d -p "$here/../../target")
    # shellcheck disable=SC2064 # the folder of now
    trap "rm -rf '$folder'" EXIT
    mkdir -p "$folder/data/blobs"
    "${OBD_UBLK_BIN_DIR:?}/obd-ublk-make-image" "$folder/data" 24
    cp "$folder/data/layer.lz4" "$folder/data/blobs/10"
    digest=$(sha256sum <"$folder/data/blobs/10" | head -c 64)
    printf '{"repoBlobUrl":"http://127.0.0.1:5500/v2/test/blobs","lowers":[{"digest":"sha256:%s","size":%s}]}' \
        "$digest" "$(stat -c %s "$folder/data/blobs/10")" >"$folder/data/config.json"
    truncate -s 128M "$folder/disk"
    mkfs.ext4 -q "$folder/disk"
    out=$folder/out
    for round in $(seq "$rounds") 99; do
        status=0
        "$here/../../tools/vm" --kernel "$kernel" --timeout 180 --share "$here" \
            --share "$folder/data" --disk "$folder/disk" --pidfile "$folder/pid" \
            -- bash "$here/power.sh" --guest-cache "$round" "$folder/data" \
            >"$out" 2>"$folder/err" &
        if [ "$round" != 99 ]; then
            wait_for "$out" filling $!
            sleep "$((round % 3)).$((RANDOM % 10))"
            cut_power "$folder/pid"
        fi
        wait $! || status=$?
        if ! grep -q audited "$out" || { [ "$round" = 99 ] && [ "$status" != 0 ]; }; then
            echo "FAIL a_power_cut_leaves_nothing_torn_in_the_cache: round $round:" \
                "$(tail -n 3 "$out" "$folder/err")"
            return 1
        fi
        echo "    round $round: $(grep sectors "$out" || echo 'a new cache')"
    done
    echo "ok a_power_cut_leaves_nothing_torn_in_the_cache ($rounds cuts)"
}

# wait_for FILE WORD PID: until the word is there, or the process is gone, two minutes at most
wait_for() {
    for _ in $(seq 1200); do
        ! grep -q "$2" "$1" || return 0
        kill -0 "$3" 2>/dev/null || return 0
        sleep 0.1
    done
}

# cut_power PIDFILE: of that QEMU
cut_power() {
    local pid
    pid=$(cat "$1" 2>/dev/null || true)
    [ -z "$pid" ] || kill -9 "$pid" 2>/dev/null || true
}

on_host() {
    local kernel=${1:-6.12} rounds=${2:-20} round done=() durable folder out status
    folder=$(mktemp -d -p "$here/../../target")
    # shellcheck disable=SC2064 # the folder of now
    trap "rm -rf '$folder'" EXIT
    truncate -s 96M "$folder/disk"
    mkfs.ext4 -q "$folder/disk"
    out=$folder/out
    for round in $(seq "$rounds"); do
        "$here/../../tools/vm" --kernel "$kernel" --timeout 120 --share "$here" \
            --disk "$folder/disk" --pidfile "$folder/pid" \
            -- bash "$here/power.sh" --guest "$round" "${done[@]}" >"$out" 2>"$folder/err" &
        wait_for "$out" durable $!
        # Some rounds are cut soon, some late.
        sleep "$((round % 3)).$((RANDOM % 10))"
        cut_power "$folder/pid"
        wait $! || true
        durable=$(sed -n 's/^durable \([0-9]*\)$/\1/p' "$out" | tail -n 1)
        if [ -z "$durable" ] || ! grep -q audited "$out"; then
            echo "FAIL a_power_cut_loses_nothing_that_was_synced: round $round: $(tail -n 3 "$out" "$folder/err")"
            return 1
        fi
        echo "    cut $round after step $((durable - round * 1000000)): $(grep sectors "$out" || true)"
        done+=("$((round * 1000000))-$durable")
    done
    status=0
    "$here/../../tools/vm" --kernel "$kernel" --timeout 120 --share "$here" --disk "$folder/disk" \
        -- bash "$here/power.sh" --guest last "${done[@]}" >"$out" 2>"$folder/err" || status=$?
    [ "$status" = 0 ] || {
        echo "FAIL a_power_cut_loses_nothing_that_was_synced: $(tail -n 3 "$out" "$folder/err")"
        return 1
    }
    echo "ok a_power_cut_loses_nothing_that_was_synced ($rounds cuts; $(grep sectors "$out"))"
}

case ${1:-} in
--guest) in_guest "${@:2}" ;;
--guest-cache) in_guest_cache "${@:2}" ;;
--cache) cut_cache "${@:2}" ;;
*) on_host "$@" ;;
esac
