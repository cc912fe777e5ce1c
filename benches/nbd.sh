#!/usr/bin/env bash
# `serve --nbd` over a raw and an lz4 layer against qemu-nbd and nbdkit on the same raw bytes, read
# by fio's nbd engine, on this machine: interleaved rounds, median and spread of IOPS, CPU time of
# the server per I/O.
#
#   benches/nbd.sh [--rounds 7] [--seconds 3] [--megabytes 256]
#
# Needs fio, nbdcopy (libnbd-bin), qemu-nbd (qemu-utils), nbdkit and python3. Only the ratios of neighbouring runs mean
# anything.
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
rounds=7 seconds=3 megabytes=256
while [ $# -gt 0 ]; do
    case $1 in
    --rounds) rounds=$2 ;;
    --seconds) seconds=$2 ;;
    --megabytes) megabytes=$2 ;;
    *) sed -n '2,10s/^# \{0,1\}//p' "$0" >&2; exit 64 ;;
    esac
    shift 2
done
for tool in fio nbdcopy qemu-nbd nbdkit python3; do
    [ -n "$(type -P "$tool")" ] || { echo "no $tool" >&2; exit 4; }
done

cd "$here/.."
cargo build --release --locked --features tools
target=${CARGO_TARGET_DIR:-target}/release
folder=$(mktemp -d)
server=
cleanup() {
    [ -z "$server" ] || kill "$server" 2>/dev/null || true
    rm -rf "$folder"
}
trap cleanup EXIT
"$target/obd-ublk-make-image" "$folder" "$megabytes"
for layer in raw lz4; do
    echo "{\"lowers\":[{\"file\":\"$folder/layer.$layer\"}]}" >"$folder/$layer.json"
done

cases=(
    "rand-4k-qd1 --rw=randread --bs=4k --iodepth=1"
    "rand-4k-qd32 --rw=randread --bs=4k --iodepth=32"
    "seq-1m-qd4 --rw=read --bs=1m --iodepth=4"
)

# Becomes the server of this name on $folder/sock.
become() {
    case $1 in
    obd-*) exec "$target/obd-ublk" serve "$folder/${1#obd-}.json" --nbd "unix:$folder/sock" ;;
    qemu-nbd) exec qemu-nbd -r -f raw -t --shared=8 -k "$folder/sock" "$folder/raw" ;;
    nbdkit) exec nbdkit -f -r -U "$folder/sock" file "$folder/raw" ;;
    esac
}

# Starts the server of this name; sets $server, the process that serves.
start() {
    local tries
    become "$1" >"$folder/log" 2>&1 &
    server=$!
    for tries in $(seq 200); do
        [ ! -S "$folder/sock" ] || return 0
        sleep 0.05
    done
    echo "$1 does not listen after $tries looks" >&2
    cat "$folder/log" >&2
    return 1
}

stop() {
    kill "$server"
    wait "$server" || true
    server=
    rm -f "$folder/sock"
}

# Prints IOPS and microseconds of the server's CPU per I/O.
measure() {
    local before after
    before=$(awk '{print $14+$15}' "/proc/$server/stat")
    fio --name=x --ioengine=nbd --uri="nbd+unix:///?socket=$folder/sock" --readonly --time_based \
        --size="${megabytes}m" --runtime="$seconds" --output="$folder/fio.json" \
        --output-format=json "$@" >/dev/null
    after=$(awk '{print $14+$15}' "/proc/$server/stat")
    python3 - "$folder/fio.json" $((after - before)) "$(getconf CLK_TCK)" <<'PY'
import json, sys
text = open(sys.argv[1]).read()
read = json.loads(text[text.index("{"):])["jobs"][0]["read"]
cpu = int(sys.argv[2]) / int(sys.argv[3])
print(f'{read["iops"]:.0f} {cpu * 1e6 / max(read["total_ios"], 1):.1f}')
PY
}

# A pass that is not counted fills the page cache and proves that all serve the same bytes.
for who in qemu-nbd nbdkit obd-raw obd-lz4; do
    start "$who"
    nbdcopy "nbd+unix:///?socket=$folder/sock" - | cmp - "$folder/raw"
    stop
done
for round in $(seq "$rounds"); do
    for who in qemu-nbd obd-raw nbdkit obd-lz4; do
        start "$who"
        for line in "${cases[@]}"; do
            # shellcheck disable=SC2086 # the case is a list of options
            echo "${line%% *} $who $(measure ${line#* })" >>"$folder/results"
        done
        stop
    done
    echo "round $round done" >&2
done
python3 "$here/nbd_summary.py" "$folder/results" qemu-nbd
