#!/usr/bin/env bash
# shellcheck disable=SC2317 # the checks are called by name, through check()
#
# The device, proved in a real kernel. Runs as root inside the virtual machine, started by
# tests/vm.rs with the folder that it prepared:
#
#   suite.sh FOLDER [CHECK...]
#
#   FOLDER/cases/NAME/config.json    image configs with absolute paths
#   FOLDER/cases/NAME/pack           what the device must hold (see tools/device-check.rs)
#   FOLDER/bin/fsx                  the exerciser of files, from crates.io
#   FOLDER/ext4/N/{config.json,sums,gone}   ext4 stacks, their files' sha256, their whiteouts
#
# Prints one line per check, `ok NAME` or `FAIL NAME: why`, and exits with the number of failures.
set -u
folder=$1
shift
failures=0

# pause SECONDS: without a process, which takes longer to start in an emulated guest than most pauses
# last, and takes that time from the other guest as well.
mkfifo /tmp/never
exec {never}<>/tmp/never
pause() {
    read -rt "$1" -u "$never" || true
}

# repeat MANY FEW: sets times. FEW where the guest beside this one does MANY of this check.
repeat() {
    times=$1
    if [[ " ${OBD_UBLK_FEW-} " = *" $current "* ]]; then
        times=$2
        echo "$2 times here, $1 in the other guest" >&3
    fi
}

# Those that the guest beside this one runs must be checks, or nobody would run them.
know_elsewhere() {
    local name
    for name in ${OBD_UBLK_ELSEWHERE-}; do
        declare -F "$name" >/dev/null || {
            echo "FAIL $name: no such check, said to run in the other guest" | tee -a /tmp/failed
            failures=$((failures + 1))
        }
    done
}

# A check runs in a subshell with `set -e`, its output kept for the case that it fails.
check() {
    local name=$1 start=$SECONDS
    current=$name
    if [ ${#wanted[@]} -gt 0 ] && ! [[ " ${wanted[*]} " = *" $name "* ]]; then
        return
    fi
    [[ " ${OBD_UBLK_ELSEWHERE-} " != *" $name "* ]] || return
    # Not as the condition of an `if`: there `set -e` would mean nothing. It does not say which
    # command failed, and not every command does: that goes to a file of its own, with those whose
    # failure was expected.
    (
        set -eE
        trap 'echo "exit $? at ${BASH_SOURCE[0]##*/}:$LINENO: ${BASH_COMMAND:0:200}" >&9' ERR
        "$name"
    ) 3>/tmp/check.facts 9>/tmp/check.failed >/tmp/check.log 2>&1
    local status=$?
    if [ $status -eq 0 ]; then
        echo "ok $name ($((SECONDS - start)) s)"
        sed 's/^/    /' /tmp/check.facts
    else
        echo "FAIL $name: $(tail -n 5 /tmp/check.log | tr '\n' ' ')"
        failures=$((failures + 1))
        echo "$name: $(tail -n 5 /tmp/check.log | tr '\n' ' ')" >>/tmp/failed
        sed 's/^/    /' /tmp/check.log
        echo "    exit status $status; the last commands that failed:"
        tail -n 5 /tmp/check.failed | sed 's/^/    /'
        # A program that died of a signal may have said so there only.
        dmesg | tail -n 5 | sed 's/^/    kernel: /'
        for log in /run/obd-ublk/*/log /run/obd-ublk/supervisor.log; do
            [ -e "$log" ] && tail -n 5 "$log" | sed "s|^|    $log: |"
        done
        clean_up
    fi
}

# Whatever a failed check left, so that the next one starts from nothing.
clean_up() {
    pkill -9 fio; pkill -9 -f 'obd-ublk-null --writable'
    for dir in /mnt/*; do umount -l "$dir" 2>/dev/null; done
    pkill -9 -f supervise; pkill -9 -f 'obd-ublk.*serve' ; sleep 0.5
    for node in /sys/class/ublk-char/ublkc*; do
        [ -e "$node" ] && timeout 20 obd-ublk detach --force "${node##*ublkc}"
    done
    rm -f /run/obd-ublk/upper/*
    pkill -9 -f obd-ublk-mock-registry
} >/dev/null 2>&1

fail() {
    echo "$*"
    return 1
}

# Runs a command that must exit with the given status.
expect_status() {
    local wanted_status=$1 status=0
    shift
    "$@" || status=$?
    [ "$status" -eq "$wanted_status" ] || fail "exit $status, expected $wanted_status: $*"
}

number_of() {
    echo "${1#/dev/ublkb}"
}

# Prints what is left of any device.
what_is_left() {
    ls /sys/class/ublk-char 2>/dev/null
    find /dev -maxdepth 1 -name 'ublk[bc][0-9]*' 2>/dev/null
    pgrep -a obd-ublk
    # The folder of the journals stays; a journal in it would be one too many.
    find /run/obd-ublk /run/ublksrvd -mindepth 1 2>/dev/null |
        grep -vx -e '/run/obd-ublk/supervisor.log' -e '/run/obd-ublk/upper'
    grep ublkb /proc/mounts
    true
}

# Whether something is left that shows without starting a process.
something_shows() {
    compgen -G '/sys/class/ublk-char/*' || compgen -G '/dev/ublk[bc][0-9]*' ||
        compgen -G '/run/obd-ublk/[0-9]*' || [ -e /run/obd-ublk/supervisor.sock ]
} >/dev/null

# The kernel lets go of a device a moment after its server did, and a supervisor without anything to
# guard stays for two seconds.
nothing_left() {
    local left deadline=$((SECONDS + 30))
    while :; do
        left=
        if ! something_shows; then
            left=$(what_is_left)
            [ -n "$left" ] || return 0
        fi
        [ "$SECONDS" -lt "$deadline" ] || fail "left: ${left:-$(what_is_left)}"
        pause 0.1
    done
}

a_config=$folder/cases/stack8/config.json

# --- the checks ------------------------------------------------------------------------------

doctor_says_that_attach_works_here() {
    obd-ublk doctor
}

every_golden_image_reads_as_its_export() {
    local dir dev
    for dir in "$folder"/cases/*/; do
        dev=$(obd-ublk attach --read-only "$dir/config.json")
        [[ $dev =~ ^/dev/ublkb[0-9]+$ ]] || fail "printed '$dev'"
        [ "$(blockdev --getro "$dev")" = 1 ] || fail "$dev is not read-only"
        obd-ublk-device-check check "$dev" "$dir/pack" || fail "$dir"
        obd-ublk detach "$dev"
    done
    nothing_left
}

a_device_claims_no_volatile_cache_and_no_discard() {
    local dev queue
    dev=$(obd-ublk attach "$a_config")
    queue=/sys/block/${dev#/dev/}/queue
    [ "$(cat "$queue/write_cache")" = "write through" ] || fail "write cache"
    [ "$(cat "$queue/discard_max_bytes")" = 0 ] || fail "discard"
    [ "$(cat "$queue/logical_block_size")" = 512 ] || fail "logical block size"
    ! dd if=/dev/zero of="$dev" bs=4096 count=1 oflag=direct || fail "a write went through"
    obd-ublk detach "$dev"
}

ext4_stacks_mount_and_their_files_are_right() {
    local dir dev
    for dir in "$folder"/ext4/*/; do
        dev=$(obd-ublk attach "$dir/config.json")
        mkdir -p /mnt/image
        mount -t ext4 -o ro "$dev" /mnt/image
        [ ! -s "$dir/sums" ] || (cd /mnt/image && sha256sum --quiet -c "$dir/sums")
        while read -r gone; do
            [ ! -e "/mnt/image$gone" ] || fail "$gone should be gone"
        done <"$dir/gone"
        find /mnt/image -type f -exec cat {} + >/dev/null
        expect_status 12 obd-ublk detach "$dev"
        cat /mnt/image/etc/* >/dev/null 2>&1 || true
        umount /mnt/image
        obd-ublk detach "$dev"
    done
    nothing_left
}

the_caller_gets_one_line_and_is_not_held() {
    local out id
    # The whole output, captured: a server that kept the pipe open would hang this.
    out=$(timeout 30 obd-ublk attach "$a_config" 2>&1)
    [[ $out =~ ^/dev/ublkb[0-9]+$ ]] || fail "printed '$out'"
    dd if="$out" of=/dev/null bs=4096 count=1 iflag=direct
    obd-ublk detach "$out"
    out=$(obd-ublk attach --id 7 "$a_config")
    [ "$out" = /dev/ublkb7 ] || fail "asked for 7, got $out"
    expect_status 12 obd-ublk attach --id 7 "$a_config" || expect_status 11 obd-ublk attach --id 7 "$a_config"
    id=$(number_of "$out")
    obd-ublk detach "$id"
    nothing_left
}

the_result_file_tells_success_and_failure() {
    local dev
    sed 's|"resultFile":""|"resultFile":"/tmp/result"|' "$a_config" >/tmp/result.json
    dev=$(obd-ublk attach /tmp/result.json)
    [ "$(cat /tmp/result)" = success ] || fail "found '$(cat /tmp/result)'"
    obd-ublk detach "$dev"
    echo '{"lowers":[{"file":"/nowhere"}],"resultFile":"/tmp/result"}' >/tmp/bad.json
    expect_status 6 obd-ublk attach /tmp/bad.json
    [[ $(cat /tmp/result) = failed:* ]] || fail "found '$(cat /tmp/result)'"
    nothing_left
}

a_device_is_named_by_number_path_or_config() {
    local one two
    one=$(obd-ublk attach "$a_config")
    obd-ublk detach "$a_config"
    one=$(obd-ublk attach "$a_config")
    two=$(obd-ublk attach "$a_config")
    ! obd-ublk detach "$a_config" || fail "an ambiguous config was taken"
    obd-ublk detach "$one"
    obd-ublk detach "$(number_of "$two")"
    expect_status 6 obd-ublk detach 99
    nothing_left
}

facts_are_printed_as_json() {
    local dev
    dev=$(obd-ublk attach "$a_config")
    obd-ublk list --json | python3 -c 'import json,sys; assert len(json.load(sys.stdin)["devices"]) == 1'
    dd if="$dev" of=/dev/null bs=4096 count=64 iflag=direct
    obd-ublk stat "$dev" --json | python3 -c 'import json,sys; json.load(sys.stdin)'
    obd-ublk list | grep -q "$dev"
    obd-ublk stat "$dev"
    obd-ublk doctor --json | python3 -c 'import json,sys; json.load(sys.stdin)'
    obd-ublk version --json | python3 -c 'import json,sys; json.load(sys.stdin)'
    obd-ublk detach "$dev"
}

parallel_readers_meet_no_error() {
    local dev
    dev=$(obd-ublk attach "$folder/cases/ext4-3layers-3/config.json")
    for direct in 0 1; do
        fio --name=readers --filename="$dev" --readonly --rw=randread --bs=4k --direct="$direct" \
            --ioengine=io_uring --iodepth=32 --numjobs=4 --size=64m --io_size=24m \
            --group_reporting --output=/tmp/fio.log
    done
    fio --name=seq --filename="$dev" --readonly --rw=read --bs=1m --direct=1 --ioengine=io_uring \
        --iodepth=4 --size=128m --output=/tmp/fio.log
    obd-ublk detach "$dev"
}

an_open_close_storm_is_survived() {
    local dev
    dev=$(obd-ublk attach "$a_config")
    obd-ublk-device-check storm "$dev" 2000
    obd-ublk detach "$dev"
    nothing_left
}

detach_under_load_ends_soon() {
    local dev start
    for round in 1 2 3; do
        dev=$(obd-ublk attach "$a_config")
        fio --name=load --filename="$dev" --readonly --rw=randread --bs=4k --direct=1 \
            --ioengine=io_uring --iodepth=32 --numjobs=2 --size=16m --time_based --runtime=60 \
            --output=/tmp/fio.log >/dev/null 2>&1 &
        sleep 2
        start=$SECONDS
        timeout 30 obd-ublk detach "$dev"
        [ $((SECONDS - start)) -le 15 ] || fail "round $round took $((SECONDS - start)) s"
        # A removed device has no sectors: fio reads nothing, without an error, until its time is up.
        pkill fio || true
        wait || true
    done
    nothing_left
}

a_hundred_attaches_and_detaches_leave_nothing() {
    local dev times
    repeat 100 20
    for _ in $(seq "$times"); do
        dev=$(obd-ublk attach "$a_config")
        # Read by the shell: dd would be a process more each time.
        IFS= read -rd '' -n 1 _ <"$dev" || fail "$dev cannot be read"
        obd-ublk detach "$dev"
    done
    nothing_left
}

# devices_live_at_once COUNT AT_A_TIME
devices_live_at_once() {
    local dev pids pid begun=0
    : >/tmp/devices
    while [ "$begun" -lt "$1" ]; do
        pids=()
        for _ in $(seq "$2"); do
            obd-ublk attach --queues 1 --depth 16 "$a_config" >>/tmp/devices &
            pids+=($!)
        done
        for pid in "${pids[@]}"; do
            wait "$pid" || fail "an attach failed"
        done
        begun=$((begun + $2))
    done
    [ "$(sort -u /tmp/devices | wc -l)" = "$1" ] || fail "not $1 different devices"
    [ "$(obd-ublk list --json | python3 -c 'import json,sys; print(len(json.load(sys.stdin)["devices"]))')" = "$1" ]
    while read -r dev; do
        dd if="$dev" of=/dev/null bs=64k count=4 iflag=direct 2>/dev/null || fail "$dev"
    done </tmp/devices
    pgrep obd-ublk | sed 's|.*|/proc/&/smaps_rollup|' | xargs cat |
        awk '/^Pss:/ { sum += $2 } END { printf "%d KiB of memory for all servers\n", sum }' >&3
    while read -r dev; do
        obd-ublk detach "$dev" || fail "$dev"
    done </tmp/devices
    nothing_left
}

sixty_four_attaches_at_once_all_succeed() {
    local times
    repeat 64 16
    devices_live_at_once "$times" "$times"
}

two_hundred_and_fifty_six_devices_live_at_once() {
    devices_live_at_once 256 16
}

server_pid() {
    obd-ublk list --json | python3 -c '
import json,sys
for device in json.load(sys.stdin)["devices"]:
    if device["device"] == sys.argv[1]: print(device["pid"])' "$1"
}

a_killed_server_is_cleared_by_detach_or_the_next_attach() {
    local dev pid
    for way in detach attach; do
        dev=$(obd-ublk attach --unsupervised --id 5 "$a_config")
        pid=$(server_pid "$dev")
        [ -n "$pid" ] || fail "no pid for $dev"
        kill -9 "$pid"
        sleep 1
        if [ "$way" = detach ]; then
            timeout 60 obd-ublk detach 5
        else
            dev=$(timeout 60 obd-ublk attach --unsupervised --id 5 "$a_config")
            [ "$dev" = /dev/ublkb5 ] || fail "the id was not free: $dev"
            timeout 60 obd-ublk detach "$dev"
        fi
        nothing_left
    done
    # Killed with reads in flight.
    dev=$(obd-ublk attach --unsupervised "$a_config")
    fio --name=load --filename="$dev" --readonly --rw=randread --bs=4k --direct=1 \
        --ioengine=io_uring --iodepth=32 --size=16m --time_based --runtime=30 \
        --output=/tmp/fio.log >/dev/null 2>&1 &
    sleep 2
    kill -9 "$(server_pid "$dev")"
    sleep 1
    timeout 60 obd-ublk detach "$dev"
    pkill fio || true
    wait || true
    nothing_left
}

a_truncated_layer_gives_eio_and_the_server_lives() {
    local dev pid layer=$folder/cases/lsmt-commit-random
    mkdir -p /tmp/truncated
    cp "$layer/layer" /tmp/truncated/layer
    echo '{"lowers":[{"file":"/tmp/truncated/layer"}]}' >/tmp/truncated/config.json
    dev=$(obd-ublk attach /tmp/truncated/config.json)
    pid=$(server_pid "$dev")
    truncate -s 8192 /tmp/truncated/layer
    ! dd if="$dev" of=/dev/null bs=64k iflag=direct || fail "the lost bytes were read"
    kill -0 "$pid" || fail "the server died"
    dd if="$dev" of=/dev/null bs=512 count=1 iflag=direct || true
    obd-ublk stat "$dev"
    obd-ublk detach "$dev"
    nothing_left
}

a_foreground_server_stops_cleanly_on_sigterm() {
    local pid
    obd-ublk attach --foreground "$a_config" >/tmp/foreground &
    pid=$!
    for _ in $(seq 100); do
        [ -s /tmp/foreground ] && break
        pause 0.1
    done
    dd if="$(cat /tmp/foreground)" of=/dev/null bs=4096 count=1 iflag=direct
    kill -TERM "$pid"
    expect_status 0 wait "$pid"
    nothing_left
}

wrong_options_are_refused_and_leave_nothing() {
    for wrong in --queues=0 --depth=0 --depth=5000 --id=-1 --id=x; do
        expect_status 64 obd-ublk attach "$wrong" "$a_config"
    done
    expect_status 64 obd-ublk attach
    nothing_left
}

# shellcheck source=tests/vm/recovery.sh
. "$(dirname "$0")/recovery.sh"
# shellcheck source=tests/vm/write.sh
. "$(dirname "$0")/write.sh"
# shellcheck source=tests/vm/attach.sh
. "$(dirname "$0")/attach.sh"
# shellcheck source=tests/vm/upper.sh
. "$(dirname "$0")/upper.sh"
# shellcheck source=tests/vm/make.sh
. "$(dirname "$0")/make.sh"
# shellcheck source=tests/vm/snapshot.sh
. "$(dirname "$0")/snapshot.sh"
# shellcheck source=tests/vm/registry.sh
. "$(dirname "$0")/registry.sh"
# shellcheck source=tests/vm/systemd.sh
. "$(dirname "$0")/systemd.sh"

wanted=("$@")
know_elsewhere
smoke=(doctor_says_that_attach_works_here every_golden_image_reads_as_its_export
    a_device_claims_no_volatile_cache_and_no_discard ext4_stacks_mount_and_their_files_are_right
    the_caller_gets_one_line_and_is_not_held parallel_readers_meet_no_error
    detach_under_load_ends_soon a_killed_server_is_cleared_by_detach_or_the_next_attach
    "${recovery_smoke[@]}" "${attach_smoke[@]}" "${write_smoke[@]}" "${upper_smoke[@]}"
    "${make_smoke[@]}" "${snapshot_smoke[@]}" "${registry_smoke[@]}")
if [ "${wanted[*]}" = smoke ]; then
    wanted=("${smoke[@]}")
fi
for name in "${smoke[@]}" the_result_file_tells_success_and_failure \
    a_device_is_named_by_number_path_or_config facts_are_printed_as_json \
    an_open_close_storm_is_survived a_hundred_attaches_and_detaches_leave_nothing \
    sixty_four_attaches_at_once_all_succeed a_truncated_layer_gives_eio_and_the_server_lives \
    a_foreground_server_stops_cleanly_on_sigterm wrong_options_are_refused_and_leave_nothing \
    "${recovery_rest[@]}" "${attach_rest[@]}" "${upper_rest[@]}" \
    "${snapshot_rest[@]}" "${systemd_smoke[@]}"; do
    check "$name"
done
# Those that are only run by name.
if [ ${#wanted[@]} -gt 0 ]; then
    for name in two_hundred_and_fifty_six_devices_live_at_once "${systemd_soak[@]}"; do
        check "$name"
    done
fi
# Once more at the end, where nobody has to look for them.
[ "$failures" -eq 0 ] || sed 's/^/failed: /' /tmp/failed
echo "$failures checks failed"
exit "$failures"
