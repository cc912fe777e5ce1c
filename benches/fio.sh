#!/usr/bin/env bash
# The device against `rublk add loop` on the same raw bytes, in one guest: interleaved rounds,
# median and spread of IOPS, server CPU and system calls per I/O.
#
#   benches/fio.sh [--kernel 6.12|7] [--rounds 7] [--seconds 4]      on the host
#   benches/fio.sh --guest FOLDER ROUNDS SECONDS                     inside the guest
#
# Needs rublk (crates.io) on PATH or in $RUBLK: the peer is never part of this repository. Only
# ratios inside one guest mean anything: the emulated kernel is not a machine.
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
size_mb=256

on_host() {
    local kernel=6.12 rounds=7 seconds=4 rublk folder
    while [ $# -gt 0 ]; do
        case $1 in
        --kernel) kernel=$2 ;;
        --rounds) rounds=$2 ;;
        --seconds) seconds=$2 ;;
        *) sed -n '2,10s/^# \{0,1\}//p' "$0" >&2; exit 64 ;;
        esac
        shift 2
    done
    rublk=${RUBLK:-$(command -v rublk || true)}
    [ -x "$rublk" ] || { echo "no rublk: set RUBLK" >&2; exit 4; }
    cargo build --release --features tools
    folder=$(mktemp -d -p "$here/../target")
    trap 'rm -rf "$folder"' EXIT
    cp "$rublk" "$folder/rublk"
    cargo run --quiet --release --features tools --bin obd-ublk-make-image -- \
        "$folder" "$size_mb"
    "$here/../tools/vm" --kernel "$kernel" --timeout 3000 --memory 3G --share "$folder" \
        --share "$here" -- bash "$here/fio.sh" --guest "$folder" "$rounds" "$seconds"
}

# Prints `IOPS`, `CPU microseconds per I/O of the server`, `io_uring_enter calls per I/O`.
measure() {
    local dev=$1 pid=$2 seconds=$3 ticks before_cpu after_cpu iops ios
    shift 3
    before_cpu=$(awk '{print $14+$15}' "/proc/$pid/stat")
    fio --name=x --filename="$dev" --readonly --direct=1 --ioengine=io_uring --time_based \
        --runtime="$seconds" --group_reporting --output-format=json "$@" >/tmp/fio.json
    after_cpu=$(awk '{print $14+$15}' "/proc/$pid/stat")
    ticks=$(getconf CLK_TCK)
    iops=$(python3 -c 'import json; print(int(json.load(open("/tmp/fio.json"))["jobs"][0]["read"]["iops"]))')
    ios=$(python3 -c 'import json; print(json.load(open("/tmp/fio.json"))["jobs"][0]["read"]["total_ios"])')
    awk -v i="$iops" -v d=$((after_cpu - before_cpu)) -v t="$ticks" -v n="$ios" \
        'BEGIN { printf "%d %.1f\n", i, d / t * 1e6 / (n ? n : 1) }'
}

server_pid() {
    obd-ublk list --json | python3 -c '
import json,sys
for device in json.load(sys.stdin)["devices"]:
    if device["device"] == sys.argv[1]: print(device["pid"])' "$1"
}

in_guest() {
    local folder=$1 rounds=$2 seconds=$3 round layer dev pid
    mkdir -p /tmp/bench
    cp "$folder"/raw "$folder"/layer.* /tmp/bench/
    for layer in raw lz4; do
        echo "{\"lowers\":[{\"file\":\"/tmp/bench/layer.$layer\"}]}" >"/tmp/bench/$layer.json"
    done
    local cases=(
        "rand-4k-qd1 --rw=randread --bs=4k --iodepth=1"
        "rand-4k-qd32 --rw=randread --bs=4k --iodepth=32"
        "rand-4k-qd32-4jobs --rw=randread --bs=4k --iodepth=32 --numjobs=4"
        "seq-1m-qd4 --rw=read --bs=1m --iodepth=4"
    )
    : >/tmp/bench/results
    for round in $(seq "$rounds"); do
        for layer in raw lz4; do
            dev=$(obd-ublk attach "/tmp/bench/$layer.json")
            pid=$(server_pid "$dev")
            run_cases "obd-$layer"
            obd-ublk detach "$dev"
        done
        "$folder/rublk" add loop -f /tmp/bench/raw -q 1 --buffered-io >/tmp/bench/rublk.log 2>&1 ||
            "$folder/rublk" add loop -f /tmp/bench/raw -q 1 >/tmp/bench/rublk.log 2>&1
        sleep 1
        dev=$(find /dev -maxdepth 1 -name 'ublkb*' | head -n 1)
        pid=$(pgrep -o rublk)
        run_cases rublk-loop
        "$folder/rublk" del -a >/dev/null 2>&1
        echo "round $round done"
    done
    python3 "$(dirname "$0")/summary.py" /tmp/bench/results
}

# Uses the caller's dev, pid, seconds and cases.
run_cases() {
    local who=$1 line name
    for line in "${cases[@]}"; do
        name=${line%% *}
        # shellcheck disable=SC2086 # the case is a list of options
        echo "$name $who $(measure "$dev" "$pid" "$seconds" ${line#* })" >>/tmp/bench/results
    done
}

if [ "${1:-}" = --guest ]; then
    shift
    in_guest "$@"
else
    on_host "$@"
fi
