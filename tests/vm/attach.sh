# shellcheck shell=bash disable=SC2034,SC2154,SC2164,SC2317 # sourced by suite.sh, under set -e
#
# What `attach` can do besides a config: a single layer, a mount, a wish for the next boot; and the
# program's own test of the host. Needs what suite.sh and recovery.sh define.

layer_case=$folder/cases/zfile-lz4-4k-random
ext4_case=$folder/ext4/3
[ -d "$ext4_case" ] || ext4_case=$(find "$folder/ext4" -mindepth 1 -maxdepth 1 | sort | tail -n 1)

a_layer_is_served_and_recovered_and_named_by_its_file() {
    local dev
    cp "$layer_case/layer" /tmp/a-layer
    obd-ublk export /tmp/a-layer -o /tmp/a-layer.raw
    cd /tmp || return
    dev=$(obd-ublk attach a-layer)
    cmp "$dev" /tmp/a-layer.raw || fail "the device is not what export says"
    kill_and_wait "$dev" KILL
    echo 3 >/proc/sys/vm/drop_caches
    cmp "$dev" /tmp/a-layer.raw || fail "not the same after the server's death"
    obd-ublk list | grep -q '/tmp/a-layer$' || fail "list: $(obd-ublk list)"
    obd-ublk why a-layer
    obd-ublk detach a-layer
    nothing_left
}

attach_mounts_what_detach_unmounts() {
    local dev
    mkdir -p /mnt/own
    expect_status 6 obd-ublk attach --mount /mnt/none "$ext4_case/config.json"
    nothing_left
    dev=$(obd-ublk attach --mount /mnt/own "$ext4_case/config.json")
    grep -q "^$dev /mnt/own ext4 ro," /proc/mounts || fail "$(grep ublkb /proc/mounts)"
    (cd /mnt/own && sha256sum --quiet -c "$ext4_case/sums")
    obd-ublk list --json | grep -q '"mount": "/mnt/own"' || fail "the mount is not listed"
    expect_status 12 obd-ublk detach "$dev"
    # The note survives the server.
    kill_and_wait "$dev" KILL
    (cd /mnt/own && sleep 5) &
    sleep 1
    expect_status 12 obd-ublk detach --unmount "$dev"
    wait
    (cd /mnt/own && sha256sum --quiet -c "$ext4_case/sums")
    obd-ublk detach --unmount "$dev"
    nothing_left
    # In use all the time: it goes by force.
    dev=$(obd-ublk attach --mount /mnt/own "$ext4_case/config.json")
    (cd /mnt/own && exec sleep 30) &
    sleep 1
    obd-ublk detach --unmount --force "$dev"
    kill %1
    wait || true
    nothing_left
    # Unmounted by somebody else: detach asks the kernel, not the note.
    dev=$(obd-ublk attach --mount /mnt/own "$ext4_case/config.json")
    umount /mnt/own
    obd-ublk detach --unmount "$dev"
    nothing_left
    # Covered by something else.
    dev=$(obd-ublk attach --mount /mnt/own "$ext4_case/config.json")
    mount -t tmpfs none /mnt/own
    expect_status 12 obd-ublk detach --unmount "$dev"
    umount /mnt/own
    obd-ublk detach --unmount "$dev"
    nothing_left
}

a_mount_that_fails_leaves_nothing() {
    mkdir -p /mnt/own
    # No file system on it.
    expect_status 3 obd-ublk attach --mount /mnt/own "$layer_case/layer"
    nothing_left
    # Its name cannot be told.
    expect_status 9 obd-ublk attach --mount /mnt/own "$ext4_case/config.json" >/dev/full
    nothing_left
}

what_persists_comes_back_and_what_is_detached_does_not() {
    local one two status=0
    export OBD_UBLK_PERSIST_DIR=/tmp/persist.d
    mkdir -p /mnt/own /tmp/relative
    cp "$layer_case/layer" /tmp/relative/layer
    echo '{"lowers":[{"file":"layer"}]}' >/tmp/relative/config.json
    cd /tmp/relative || return
    one=$(obd-ublk attach --persist config.json)
    cd /
    two=$(obd-ublk attach --persist --mount /mnt/own --id 40 "$ext4_case/config.json")
    [ "$two" = /dev/ublkb40 ] || fail "$two"
    obd-ublk list
    [ "$(obd-ublk list | grep -c ' yes ')" = 2 ] || fail "not listed as persisted"
    [ "$(obd-ublk restore | wc -l)" = 2 ] || fail "what is there already is fine"
    # As a shutdown does it.
    obd-ublk detach --persisted --unmount
    nothing_left
    [ "$(obd-ublk list | grep -c absent)" = 2 ] || fail "not listed as absent"
    echo '{"schema":1}' >/tmp/persist.d/50.json
    obd-ublk restore >/tmp/restored || status=$?
    [ "$status" = 1 ] || fail "exit $status with a broken entry"
    [ "$(sort /tmp/restored | tr '\n' ' ')" = "$one $two " ] ||
        fail "restored: $(cat /tmp/restored)"
    rm /tmp/persist.d/50.json
    (cd /mnt/own && sha256sum --quiet -c "$ext4_case/sums")
    obd-ublk export "$layer_case/layer" -o /tmp/relative/raw
    cmp "$one" /tmp/relative/raw
    # A number that is wanted is not given away.
    obd-ublk detach --keep-persist "$one"
    expect_status 12 obd-ublk attach --persist --id "$(number_of "$one")" "$ext4_case/config.json"
    obd-ublk attach --persist "$ext4_case/config.json" >/tmp/three
    [ "$(cat /tmp/three)" != "$one" ] || fail "the number of $one was given away"
    obd-ublk detach "$(cat /tmp/three)"
    obd-ublk detach --unmount "$two"
    obd-ublk detach "$one"
    [ -z "$(ls /tmp/persist.d)" ] || fail "entries left: $(ls /tmp/persist.d)"
    nothing_left
}

the_self_test_passes_and_leaves_nothing() {
    obd-ublk doctor --self-test >&3
    nothing_left
    ! compgen -G '/tmp/obd-ublk-self-test-*' || fail "folders left"
    obd-ublk doctor --self-test --json | python3 -c '
import json,sys
facts = json.load(sys.stdin)
assert facts["passed"] and len(facts["steps"]) >= 11, facts'
    nothing_left
}

an_interrupted_self_test_leaves_nothing() {
    local pid seconds
    for seconds in 1 3; do
        obd-ublk doctor --self-test >/tmp/self-test.log 2>&1 &
        pid=$!
        sleep "$seconds"
        kill -TERM "$pid"
        wait "$pid" || true
        nothing_left
        ! compgen -G '/tmp/obd-ublk-self-test-*' || fail "folders left"
    done
}

attach_smoke=(the_self_test_passes_and_leaves_nothing)
attach_rest=(attach_mounts_what_detach_unmounts
    a_layer_is_served_and_recovered_and_named_by_its_file a_mount_that_fails_leaves_nothing
    what_persists_comes_back_and_what_is_detached_does_not an_interrupted_self_test_leaves_nothing)
