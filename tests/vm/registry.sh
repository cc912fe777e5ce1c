# shellcheck shell=bash disable=SC2034,SC2154,SC2164,SC2317 # sourced by suite.sh, under set -e
#
# Images whose layers lie in a registry, which is a process of ours on the guest's loopback: read
# through the cache, with faults, kills and a registry that is slow or gone. Needs what suite.sh and
# recovery.sh define.

registry_address=127.0.0.1:5500

# start_registry OPTION...: serves /tmp/blobs; sets registry_pid
start_registry() {
    ip link set lo up
    obd-ublk-mock-registry "$registry_address" /tmp/blobs "$@" >/tmp/registry.log 2>&1 &
    registry_pid=$!
    for _ in $(seq 100); do
        ! grep -q '^http[^ ]*$' /tmp/registry.log || return 0
        pause 0.1
    done
    fail "the registry did not start: $(cat /tmp/registry.log)"
}

stop_registry() {
    kill -9 "$registry_pid"
    wait "$registry_pid" || true
}

# new_blobs FILE...: what the registry has, lowest layer first; /tmp/far.json is the image
new_blobs() {
    local file number=10
    rm -rf /tmp/blobs /tmp/cache
    mkdir -p /tmp/blobs
    export OBD_UBLK_CACHE_DIR=/tmp/cache
    for file in "$@"; do
        cp "$file" "/tmp/blobs/$number"
        number=$((number + 1))
    done
    python3 - /tmp/blobs/* >/tmp/far.json <<'PYTHON'
import hashlib, json, os, sys
lowers = []
for path in sys.argv[1:]:
    digest = hashlib.sha256(open(path, "rb").read()).hexdigest()
    lowers.append({"digest": "sha256:" + digest, "size": os.path.getsize(path)})
print(json.dumps({"repoBlobUrl": "http://127.0.0.1:5500/v2/test/blobs", "lowers": lowers}))
PYTHON
}

# A fifth of the answers are wrong; then the server dies, then the registry, then the server again.
# The uppermost layer's folder is a mount of its own, where its file comes to be.
an_image_in_a_bad_registry_is_served_and_outlives_it() {
    local dev pid state registry_pid
    new_blobs "$golden"/*.commit
    mkdir -p /mnt/layer
    mount -t tmpfs none /mnt/layer
    python3 - <<'PYTHON'
import json
config = json.load(open("/tmp/far.json"))
config["lowers"][-1]["dir"] = "/mnt/layer"
for lower in config["lowers"][:4]:
    del lower["size"]
json.dump(config, open("/tmp/far.json", "w"))
PYTHON
    start_registry --faults 20 --seed 7
    dmesg -C
    dev=$(obd-ublk attach /tmp/far.json)
    kill_and_wait "$dev" KILL
    obd-ublk-device-check check "$dev" "$golden/pack"
    stop_registry
    kill_and_wait "$dev" KILL
    obd-ublk-device-check check "$dev" "$golden/pack"
    no_io_error_in_the_kernels_log
    for _ in {1..300}; do
        [ ! -e /mnt/layer/overlaybd.commit ] || break
        pause 0.1
    done
    cmp /mnt/layer/overlaybd.commit "$(find /tmp/blobs -type f | sort | tail -n 1)"
    obd-ublk detach "$dev"
    # Attached anew, nobody is asked for what is here; nor after a reboot, by somebody to whom the
    # cache is elsewhere.
    export OBD_UBLK_PERSIST_DIR=/tmp/persist.d
    dev=$(obd-ublk attach --persist /tmp/far.json)
    obd-ublk-device-check check "$dev" "$golden/pack"
    obd-ublk detach --keep-persist "$dev"
    nothing_left
    [ "$(env -u OBD_UBLK_CACHE_DIR obd-ublk restore "$dev")" = "$dev" ]
    obd-ublk-device-check check "$dev" "$golden/pack"
    obd-ublk detach "$dev"
    nothing_left
    umount /mnt/layer
    rm -rf /tmp/blobs /tmp/cache
}

# What is here is read, and the device detached, while a read waits for a registry that is slow.
a_slow_registry_delays_neither_hits_nor_detach() {
    local dev reader registry_pid start
    new_blobs "$(dirname "$fio_config")/layer.lz4"
    start_registry
    dev=$(obd-ublk attach --unsupervised /tmp/far.json)
    dd if="$dev" of=/dev/null bs=4k count=1 iflag=direct 2>/dev/null
    stop_registry
    start_registry --delay-ms 40000
    # As many as one queue has tags for, and more.
    fio --name=far --filename="$dev" --readonly --rw=randread --bs=4k --offset=4m --size=3m \
        --direct=1 --ioengine=io_uring --iodepth=64 --io_size=3m --output=/tmp/fio.log \
        >/dev/null 2>&1 &
    reader=$!
    sleep 2
    kill -0 "$reader" || fail "nothing waits: $(cat /tmp/fio.log)"
    start=$SECONDS
    dd if="$dev" of=/dev/null bs=4k count=1 iflag=direct 2>/dev/null
    [ $((SECONDS - start)) -le 5 ] || fail "a hit took $((SECONDS - start)) s"
    timeout 60 obd-ublk detach "$dev"
    [ $((SECONDS - start)) -le 20 ] || fail "the detach took $((SECONDS - start)) s"
    wait "$reader" || true
    stop_registry
    nothing_left
    rm -rf /tmp/blobs /tmp/cache
}

registry_smoke=(an_image_in_a_bad_registry_is_served_and_outlives_it
    a_slow_registry_delays_neither_hits_nor_detach)
