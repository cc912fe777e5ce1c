#!/usr/bin/env bash
# The device against `rublk add loop` on the same raw bytes, in one guest: IOPS, server CPU and
# system calls per I/O, in rounds that take the sides in turn.
#
#   benches/fio.sh [--write] [--kernel 6.12|7] [--rounds 7] [--seconds 4] [--queues 2]  on the host
#   benches/fio.sh --guest read|write ROUNDS SECONDS QUEUES                        inside the guest
#
# Reads go to a raw and an LZ4 layer of ours and to the peer on the raw bytes. Writes go to a new
# upper without layers (append pair) and to the peer on a file of the same size whose blocks are all
# allocated. Nothing is flushed but where a case says so; both sides write to the page cache, which
# has nothing of their files at the start of what is measured.
#
# Both sides have the same number of queues, the same depth (128), request size (512 KiB) and
# backing: files on one ext4 disk, read through the page cache, which holds all of them before each
# run. Each case runs three times: for SECONDS/2 without being measured, so that every buffer has
# been touched; for SECONDS undisturbed, which gives IOPS and CPU (user and system time of all
# threads of the server, the kernel's workers for it included); and for SECONDS/2 with an strace
# attached to the server, which gives the system calls. strace slows a server down, so that it
# finds larger batches waiting: the calls per I/O of both sides are lower bounds. Our device also
# counts its own io_uring_enter; the summary shows that for the undisturbed run, too.
#
# Needs fio, strace and rublk (crates.io) on PATH or in $RUBLK: the peer is never part of this
# repository. Only ratios inside one guest mean anything: the emulated kernel is not a machine.
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
size_mb=256
depth=128
peer_id=90

on_host() {
    local kernel=6.12 rounds=7 seconds=4 queues=2 mode="read" rublk folder tool
    while [ $# -gt 0 ]; do
        case $1 in
        --write)
            mode="write"
            shift
            continue
            ;;
        --kernel) kernel=$2 ;;
        --rounds) rounds=$2 ;;
        --seconds) seconds=$2 ;;
        --queues) queues=$2 ;;
        *) break ;;
        esac
        shift 2
    done
    [ $# = 0 ] || { sed -n '2,23s/^# \{0,1\}//p' "$0" >&2; exit 64; }
    rublk=${RUBLK:-$(command -v rublk || true)}
    [ -x "$rublk" ] || { echo "no rublk: set RUBLK" >&2; exit 4; }
    for tool in fio strace; do
        command -v "$tool" >/dev/null || { echo "no $tool: install it" >&2; exit 4; }
    done
    cargo build --release --locked --features tools --manifest-path "$here/../Cargo.toml"
    folder=$(mktemp -d -p "$here/../target")
    # shellcheck disable=SC2064 # the folder of now
    trap "rm -rf '$folder'" EXIT
    mkdir "$folder/files"
    "$here/../target/release/obd-ublk-make-image" "$folder/files" "$size_mb"
    # Nobody reads it here.
    rm "$folder/files/layer.zstd"
    cp "$rublk" "$folder/files/rublk"
    # Without a flush an upper grows with every write.
    mkfs.ext4 -q -d "$folder/files" "$folder/disk" $((size_mb * 24))M
    "$here/../tools/vm" --kernel "$kernel" --timeout 5000 --memory 3G --share "$here" \
        --disk "$folder/disk" -- bash "$here/fio.sh" --guest "$mode" "$rounds" "$seconds" "$queues"
}

# The process that serves $1, by the kernel's word: for our devices and for others.
server_pid() {
    obd-ublk list --all --json | python3 -c '
import json, sys
for device in json.load(sys.stdin)["devices"]:
    if device["device"] == sys.argv[1]: print(device["pid"])' "$1"
}

# Our own count of io_uring_enter; 0 for the peer.
own_enters() {
    [ "$who" != rublk-loop ] || { echo 0; return; }
    obd-ublk stat "$dev" --json | python3 -c '
import json, sys
print(json.load(sys.stdin)["counters"]["total"]["enters"])'
}

# run_fio SECONDS OPTIONS...: prints `IOPS IOS`.
run_fio() {
    local seconds=$1
    shift
    fio --name=x --filename="$dev" "${access[@]}" --direct=1 --ioengine=io_uring --time_based \
        --runtime="$seconds" --group_reporting --output-format=json "$@" >/tmp/fio.json
    python3 -c '
import json
job = json.load(open("/tmp/fio.json"))["jobs"][0]
side = max(job["read"], job["write"], key=lambda side: side["total_ios"])
print(int(side["iops"]), side["total_ios"])'
}

# Writes what is dirty of the files behind the device, and lets their pages go. Those alone: without
# all caches every program of the guest comes back from the host.
forget_pages() {
    local file
    for file in /mnt/raw /mnt/upper/*; do
        [ ! -f "$file" ] || dd of="$file" oflag=nocache conv=notrunc,fdatasync count=0 status=none
    done
}

cpu_ticks() { awk '{ print $14 + $15 }' "/proc/$pid/stat"; }

# Whether every thread of the server is traced, but for the kernel's own workers.
all_traced() {
    local task
    for task in /proc/"$pid"/task/*; do
        case $(cat "$task/comm") in iou-*) continue ;; esac
        ! grep -q '^TracerPid:[[:space:]]*0$' "$task/status" || return 1
    done
}

# count_calls SECONDS OPTIONS...: prints the server's system calls per I/O.
count_calls() {
    local tracer ios tries=100
    rm -f /tmp/calls
    strace -f -c -o /tmp/calls -p "$pid" 2>/tmp/strace.log &
    tracer=$!
    until all_traced; do
        tries=$((tries - 1))
        [ $tries -gt 0 ] || { cat /tmp/strace.log >&2; return 1; }
        sleep 0.1
    done
    read -r _ ios < <(run_fio "$@")
    kill -TERM "$tracer"
    # Its status is that of the signal.
    wait "$tracer" || true
    awk -v ios="$ios" '$NF == "total" { calls = $4 } END { printf "%.4f\n", calls / ios }' /tmp/calls
}

# One case on one side: `ROUND CASE WHO IOPS CPU-US-PER-IO CALLS-PER-IO OWN-ENTERS-PER-IO`.
measure() {
    local name=$1 cpu_before enters_before cpu enters iops ios calls
    shift
    run_fio "$half" "$@" >/dev/null
    # A file that is written need not be in the page cache, on either side.
    [ "$mode" = read ] || forget_pages
    cpu_before=$(cpu_ticks) enters_before=$(own_enters)
    read -r iops ios < <(run_fio "$seconds" "$@")
    cpu=$(($(cpu_ticks) - cpu_before)) enters=$(($(own_enters) - enters_before))
    calls=$(count_calls "$half" "$@")
    awk -v cpu="$cpu" -v hz="$(getconf CLK_TCK)" -v ios="$ios" -v enters="$enters" \
        -v head="$round $name $who $iops" -v calls="$calls" \
        'BEGIN { printf "%s %.2f %s %.4f\n", head, cpu / hz * 1e6 / ios, calls, enters / ios }' \
        >>/tmp/results
    tail -n 1 /tmp/results >&2
}

start_device() {
    if [ "$who" = rublk-loop ]; then
        local options=(-n "$peer_id" -q "$queues" -d "$depth" -f /mnt/raw --buffered-io)
        [ "$mode" = write ] || options+=(--read-only)
        /mnt/rublk add loop "${options[@]}" \
            >/tmp/rublk.log 2>&1 || { cat /tmp/rublk.log >&2; return 1; }
        dev=/dev/ublkb$peer_id
    elif [ "$mode" = write ]; then
        rm -rf /mnt/upper
        dev=$(obd-ublk attach --queues "$queues" --depth "$depth" \
            "$(obd-ublk create /mnt/upper --size "${size_mb}M")")
    else
        dev=$(obd-ublk attach --queues "$queues" --depth "$depth" "/tmp/${who#obd-}.json")
    fi
    local tries=100
    until pid=$(server_pid "$dev") && [ -n "$pid" ] && [ -b "$dev" ]; do
        tries=$((tries - 1))
        [ $tries -gt 0 ] || { echo "$who: no device" >&2; return 1; }
        sleep 0.1
    done
    # Numbers of a device that answers something else mean nothing.
    [ "$mode" = write ] || cmp -n $((16 << 20)) "$dev" /mnt/raw
}

stop_device() {
    if [ "$who" = rublk-loop ]; then
        /mnt/rublk del -n "$peer_id" >/tmp/rublk.log 2>&1 || { cat /tmp/rublk.log >&2; return 1; }
    else
        obd-ublk detach "$dev"
    fi
}

in_guest() {
    local mode=$1 rounds=$2 seconds=$3 queues=$4 half=$((($3 + 1) / 2)) round who dev pid turn line
    local sides=(obd-raw obd-lz4 rublk-loop) access=(--readonly)
    local cases=(
        "rand-4k-qd1 --rw=randread --bs=4k --iodepth=1"
        "rand-4k-qd32 --rw=randread --bs=4k --iodepth=32"
        "rand-4k-qd32-4jobs --rw=randread --bs=4k --iodepth=32 --numjobs=4"
        "seq-1m-qd4 --rw=read --bs=1m --iodepth=4"
    )
    if [ "$mode" = write ]; then
        sides=(obd-append rublk-loop)
        # Written to for good: the device's content is thrown away.
        access=(--allow_mounted_write=0)
        cases=(
            "write-4k-qd32 --rw=randwrite --bs=4k --iodepth=32"
            "write-4k-qd32-flushed --rw=randwrite --bs=4k --iodepth=32 --fsync=256"
            "write-1m-qd4 --rw=write --bs=1m --iodepth=4"
        )
    fi
    mount -o noatime /dev/vda /mnt
    for who in raw lz4; do
        echo "{\"lowers\":[{\"file\":\"/mnt/layer.$who\"}]}" >"/tmp/$who.json"
    done
    : >/tmp/results
    for round in $(seq "$rounds"); do
        for turn in "${!sides[@]}"; do
            # Another side begins each round.
            who=${sides[$(((round + turn) % ${#sides[@]}))]}
            [ "$mode" = write ] || cat /mnt/raw /mnt/layer.* >/dev/null
            echo "round $round of $rounds: $who" >&2
            start_device
            for line in "${cases[@]}"; do
                # shellcheck disable=SC2086 # the case is a list of options
                measure $line
            done
            stop_device
        done
    done
    echo "kernel $(uname -r), $(nproc) processors; $rounds rounds of $seconds s; $queues queues," \
        "depth $depth; $(/mnt/rublk --version), buffered; ext4, page cache"
    python3 "$here/summary.py" /tmp/results
}

if [ "${1:-}" = --guest ]; then
    shift
    in_guest "$@"
else
    on_host "$@"
fi
