#!/usr/bin/env bash
# Power cuts: a guest writes through an upper on a disk of its own, and is killed in the middle of it;
# the next one looks at every sector and goes on.
#
#   tests/vm/power.sh [KERNEL] [ROUNDS]        on the host; default: 6.12 20
#   tests/vm/power.sh --guest ROUND FIRST-DURABLE...
#
# The disk is a file that survives QEMU; the guest's memory, with every page that was not synced,
# does not. A step counts as durable when the guest has said so after its sync.
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

on_host() {
    local kernel=${1:-6.12} rounds=${2:-20} round done=() pid durable folder out status
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
        for _ in $(seq 1200); do
            ! grep -q durable "$out" || break
            kill -0 $! 2>/dev/null || break
            sleep 0.1
        done
        # Some rounds are cut soon, some late.
        sleep "$((round % 3)).$((RANDOM % 10))"
        pid=$(cat "$folder/pid" 2>/dev/null || true)
        [ -z "$pid" ] || kill -9 "$pid" 2>/dev/null || true
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

if [ "${1:-}" = --guest ]; then
    shift
    in_guest "$@"
else
    on_host "$@"
fi
