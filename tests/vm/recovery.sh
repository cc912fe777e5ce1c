# shellcheck shell=bash disable=SC2034,SC2154,SC2317 # sourced by suite.sh
#
# The device outlives its server: checks that kill, hand over and take away.

golden=$folder/cases/stack8
fio_config=$folder/fio/config.json

# Starting a process costs half a second in an emulated guest, so what is asked often is read by
# the shell itself.

# folder_of DEV
folder_of() {
    printf '/run/obd-ublk/%s' "${1#/dev/ublkb}"
}

# slurp FILE: sets text; false if there is none. Not $(<FILE): bash 5.2 ends the shell, without a
# word, if that file is gone and `set -e` holds, even on the left of ||.
slurp() {
    text=
    { IFS= read -rd '' text <"$1" || [ -n "$text" ]; } 2>/dev/null
}

# read_pid DEV: sets pid
read_pid() {
    pid=
    local text
    slurp "$(folder_of "$1")/state.json" || return 0
    [[ ! $text =~ \"pid\":\ ([0-9]+) ]] || pid=${BASH_REMATCH[1]}
}

# read_state DEV: sets state to live, lost, gone, or other
read_state() {
    local text folder pid
    folder=$(folder_of "$1")
    state=gone
    [ -d "$folder" ] || return 0
    state=other
    if [ -e "$folder/lost" ]; then
        state=lost
        return 0
    fi
    slurp "$folder/state.json" || return 0
    read_pid "$1"
    if [[ $text == *'"phase": "live"'* ]] && [ -n "$pid" ] && kill -0 "$pid" 2>/dev/null; then
        state=live
    fi
}

# wait_state DEV STATE[|STATE...] SECONDS
wait_state() {
    local deadline=$((SECONDS + $3))
    while :; do
        read_state "$1"
        [[ "|$2|" != *"|$state|"* ]] || return 0
        [ "$SECONDS" -lt "$deadline" ] || break
        pause 0.1
    done
    fail "$1 is $state, not $2, after $3 s: $(obd-ublk list 2>&1)"
}

supervisor_pid() {
    pgrep -f 'obd-ublk.*supervise|/proc/self/exe supervise' | head -n 1
}

# Kills the server of DEV and waits for another one.
kill_and_wait() {
    local dev=$1 signal=$2 pid old state
    read_pid "$dev"
    old=$pid
    [ -n "$old" ] || fail "no server of $dev"
    kill "-$signal" "$old"
    for _ in {1..600}; do
        read_state "$dev"
        read_pid "$dev"
        [ "$state" != live ] || [ "$pid" = "$old" ] || return 0
        pause 0.1
    done
    fail "$dev did not come back: $(obd-ublk list 2>&1)"
}

# Readers that end when /tmp/readers/stop is there, and say /tmp/readers/NAME.bad if they fail.
start_readers() {
    rm -rf /tmp/readers
    mkdir -p /tmp/readers
    readers=()
}

reader() { # reader NAME COMMAND...
    local name=$1
    shift
    (
        while [ ! -e /tmp/readers/stop ]; do
            "$@" >"/tmp/readers/$name.log" 2>&1 || {
                cp "/tmp/readers/$name.log" "/tmp/readers/$name.bad"
                exit 1
            }
            pause 2
        done
    ) &
    readers+=($!)
}

stop_readers() {
    touch /tmp/readers/stop
    local pid bad
    for pid in "${readers[@]}"; do
        wait "$pid" || true
    done
    for bad in /tmp/readers/*.bad; do
        [ ! -e "$bad" ] || fail "a reader failed: $bad: $(tail -n 3 "$bad")"
    done
}

fio_verify() { # fio_verify DEV SECONDS
    fio --name=verify --filename="$1" --readonly --rw=randread --bs=4k --size=8m --direct=1 \
        --ioengine=io_uring --iodepth=8 --verify=crc32c --verify_fatal=1 --time_based \
        --runtime="$2" --rate_iops=100
}

no_io_error_in_the_kernels_log() {
    ! dmesg | grep -E 'ublkb.*(error|Buffer I/O)|I/O error.*ublkb' || fail "the kernel saw an I/O error"
}

# Eight devices: two mounted, two under fio verify, four compared block by block.
killed_servers_come_back_and_no_reader_sees_an_error() {
    local kills=${OBD_UBLK_KILLS:-60} targets=() devices=() dev i
    dmesg -C
    start_readers
    for i in 0 1; do
        dev=$(obd-ublk attach "$folder/ext4/ext4-3layers-3/config.json")
        devices+=("$dev")
        targets+=("$dev")
        mkdir -p "/mnt/r$i"
        mount -t ext4 -o ro "$dev" "/mnt/r$i"
        targets+=("/mnt/r$i=$folder/ext4/ext4-3layers-3/sums")
        dev=$(obd-ublk attach "$fio_config")
        devices+=("$dev")
        targets+=("$dev")
        reader "fio$i" fio_verify "$dev" 10
        for _ in 1 2; do
            dev=$(obd-ublk attach "$golden/config.json")
            devices+=("$dev")
            targets+=("$dev=$golden/pack")
        done
    done
    obd-ublk-device-check kills "$kills" SIGKILL "${targets[@]}" >&3
    stop_readers
    no_io_error_in_the_kernels_log
    umount /mnt/r0 /mnt/r1
    for dev in "${devices[@]}"; do obd-ublk detach "$dev"; done
    nothing_left
}

a_device_comes_back_without_its_config_and_its_layers() {
    local dev
    rm -rf /tmp/vanishing
    mkdir -p /tmp/vanishing
    cp "$golden"/*.commit /tmp/vanishing/
    sed "s|$golden/|/tmp/vanishing/|g" "$golden/config.json" >/tmp/vanishing/config.json
    dev=$(obd-ublk attach /tmp/vanishing/config.json)
    rm -rf /tmp/vanishing
    kill_and_wait "$dev" ABRT
    obd-ublk-device-check check "$dev" "$golden/pack"
    obd-ublk stat "$dev" | grep -q parcel
    obd-ublk detach "$dev"
    nothing_left
}

a_device_comes_back_though_the_run_folder_is_full() {
    local dev pid state
    dev=$(obd-ublk attach "$golden/config.json")
    cat /dev/zero >/run/obd-ublk/filler 2>/dev/null || true
    ! echo more >/run/obd-ublk/more 2>/dev/null || fail "there is room left"
    kill_and_wait "$dev" KILL
    obd-ublk-device-check check "$dev" "$golden/pack"
    rm /run/obd-ublk/filler /run/obd-ublk/more
    obd-ublk detach "$dev"
    nothing_left
}

a_server_that_the_kernel_kills_for_memory_comes_back() {
    local dev pid old
    mountpoint -q /sys/fs/cgroup || mount -t cgroup2 cgroup2 /sys/fs/cgroup
    echo +memory >/sys/fs/cgroup/cgroup.subtree_control
    mkdir -p /sys/fs/cgroup/tight
    dev=$(obd-ublk attach "$golden/config.json")
    read_pid "$dev"
    old=$pid
    echo "$old" >/sys/fs/cgroup/tight/cgroup.procs
    echo 4096 >/sys/fs/cgroup/tight/memory.max
    # Touches buffers that were never touched, which takes memory.
    timeout 60 dd if="$dev" of=/dev/null bs=1M iflag=direct
    wait_state "$dev" live 60
    read_pid "$dev"
    [ "$pid" != "$old" ] || fail "the server was not killed"
    grep -q '^oom_kill [1-9]' /sys/fs/cgroup/tight/memory.events
    obd-ublk-device-check check "$dev" "$golden/pack"
    obd-ublk detach "$dev"
    rmdir /sys/fs/cgroup/tight
    nothing_left
}

ten_upgrades_under_load_are_not_noticed() {
    local dev pauses=() took pid old times
    repeat 10 4
    dmesg -C
    dev=$(obd-ublk attach "$fio_config")
    start_readers
    reader fio fio_verify "$dev" 10
    for _ in $(seq "$times"); do
        took=$(obd-ublk upgrade "$dev")
        pauses+=("${took##*  }")
    done
    # A program that is none of ours: nothing changes.
    read_pid "$dev"
    old=$pid
    ! obd-ublk upgrade "$dev" --program /bin/true || fail "/bin/true took over"
    read_pid "$dev"
    [ "$old" = "$pid" ] || fail "the server changed"
    # Every device, and then the supervisor.
    old=$(supervisor_pid)
    obd-ublk upgrade --all
    [ "$(supervisor_pid)" != "$old" ] || fail "the supervisor is the same"
    kill_and_wait "$dev" KILL
    obd-ublk stat "$dev" | grep -q parcel || fail "the new supervisor had no parcel"
    stop_readers
    no_io_error_in_the_kernels_log
    echo "upgrade pauses: ${pauses[*]}" >&3
    obd-ublk detach "$dev"
    nothing_left
}

# The old server has ended when the new program turns out not to work: the program of before brings
# the device back. What stands in the new one's way is somebody who holds the device's folder.
an_upgrade_that_fails_after_the_old_server_ended_is_rolled_back() {
    local dev pid old status=0
    dmesg -C
    dev=$(obd-ublk attach "$fio_config")
    read_pid "$dev"
    old=$pid
    start_readers
    reader fio fio_verify "$dev" 5
    # A successor tries for ten seconds, its own successor for another ten.
    flock "$(folder_of "$dev")" sleep 13 &
    obd-ublk upgrade "$dev" >/tmp/upgraded 2>&1 || status=$?
    [ "$status" != 0 ] || fail "the upgrade came through: $(cat /tmp/upgraded)"
    grep -q 'rolled back' /tmp/upgraded || fail "$(cat /tmp/upgraded)"
    wait_state "$dev" live 30
    read_pid "$dev"
    [ "$pid" != "$old" ] || fail "the old server never ended"
    stop_readers
    no_io_error_in_the_kernels_log
    obd-ublk detach "$dev"
    nothing_left
}

# settled DEV: served or gone, within a time; then nothing must be left.
settled() {
    local state
    wait_state "$1" "live|gone" 60
    [ "$state" = gone ] || obd-ublk detach "$1"
    nothing_left
}

kills_at_any_moment_end_in_a_device_or_in_nothing() {
    local dev=/dev/ublkb9 delay pid state
    for delay in 0.0 0.3 0.8; do
        # While it is attached: the caller hears of it, or has a device that works.
        obd-ublk attach --id 9 "$golden/config.json" >/tmp/attached 2>&1 &
        pid=$!
        pause 0.3
        pause "$delay"
        pkill -9 -f 'serve-device --id 9' || true
        if wait "$pid"; then
            wait_state "$dev" live 60
        fi
        settled "$dev"
        # While it is taken over.
        obd-ublk attach --id 9 "$golden/config.json"
        read_pid "$dev"
        kill -9 "$pid"
        pause "$delay"
        pkill -9 -f 'serve-successor --id 9' || true
        settled "$dev"
        # While it goes away.
        obd-ublk attach --id 9 "$golden/config.json"
        obd-ublk detach "$dev" >/dev/null 2>&1 &
        pid=$!
        pause "$delay"
        pkill -9 -f 'serve-device --id 9' || true
        wait "$pid" || true
        settled "$dev"
    done
}

a_crash_loop_is_given_up_loudly_and_recover_tries_again() {
    local dev reader pid old state
    dev=$(obd-ublk attach "$golden/config.json")
    for _ in $(seq 12); do
        read_pid "$dev"
        old=$pid
        kill -9 "$old" 2>/dev/null || true
        # Not the state of the server that was killed, which may show for a moment.
        for _ in {1..600}; do
            read_state "$dev"
            read_pid "$dev"
            [ "$state" != lost ] || break 2
            [ "$state" != live ] || [ "$pid" = "$old" ] || break
            pause 0.1
        done
    done
    [ "$state" = lost ] || fail "never given up"
    obd-ublk list 2>&1 | grep -q 'died early' || fail "list is silent: $(obd-ublk list 2>&1)"
    dd if="$dev" of=/dev/null bs=4k count=1 iflag=direct &
    reader=$!
    pause 1
    kill -0 "$reader" || fail "the reader did not wait"
    obd-ublk recover "$dev"
    wait "$reader" || fail "the reader saw an error"
    wait_state "$dev" live 5
    obd-ublk detach "$dev"
    nothing_left
}

a_supervisor_that_dies_is_replaced_and_goes_on_guarding() {
    local dev old new pid state
    dev=$(obd-ublk attach "$golden/config.json")
    old=$(supervisor_pid)
    kill -9 "$old"
    for _ in $(seq 100); do
        new=$(supervisor_pid)
        [ -z "$new" ] || [ "$new" = "$old" ] || break
        pause 0.2
    done
    [ -n "$new" ] || fail "no new supervisor"
    pause 1
    kill_and_wait "$dev" KILL
    obd-ublk stat "$dev" | grep -q parcel
    # Everything at once: only the state file is left, and `recover`.
    read_pid "$dev"
    kill -9 "$(supervisor_pid)" "$pid"
    pause 1
    obd-ublk list | grep -q recovering || fail "$(obd-ublk list)"
    obd-ublk recover --all
    obd-ublk stat "$dev" | grep -q 'opened anew'
    obd-ublk-device-check check "$dev" "$golden/pack"
    obd-ublk detach "$dev"
    nothing_left
}

detach_ends_whatever_is_in_the_way() {
    local dev reader pid state
    mkdir -p /mnt/stuck
    # Nobody serves it, and readers hang.
    dev=$(obd-ublk attach "$golden/config.json")
    read_pid "$dev"
    kill -9 "$(supervisor_pid)" "$pid"
    pause 1
    dd if="$dev" of=/dev/null bs=4k count=1 iflag=direct 2>/dev/null &
    reader=$!
    timeout 60 obd-ublk detach "$dev"
    ! wait "$reader" || fail "the reader read from nothing"
    nothing_left
    # Mounted: refused, lazily, by force.
    dev=$(obd-ublk attach "$folder/ext4/ext4-3layers-3/config.json")
    mount -t ext4 -o ro "$dev" /mnt/stuck
    expect_status 12 obd-ublk detach "$dev"
    obd-ublk detach --lazy "$dev"
    ls /mnt/stuck >/dev/null
    umount /mnt/stuck
    wait_state "$dev" gone 30
    nothing_left
    dev=$(obd-ublk attach "$folder/ext4/ext4-3layers-3/config.json")
    mount -t ext4 -o ro "$dev" /mnt/stuck
    obd-ublk detach --force "$dev"
    umount -l /mnt/stuck
    nothing_left
    # A state file that nobody can read, and a server that does not answer.
    dev=$(obd-ublk attach "$golden/config.json")
    echo '{"schema":9}' >"/run/obd-ublk/$(number_of "$dev")/state.json"
    expect_status 4 obd-ublk detach "$dev"
    obd-ublk detach --force "$dev"
    nothing_left
    dev=$(obd-ublk attach "$golden/config.json")
    read_pid "$dev"
    kill -STOP "$pid"
    expect_status 8 obd-ublk detach --timeout 2 "$dev"
    timeout 60 obd-ublk detach --force --timeout 2 "$dev"
    nothing_left
}

a_device_outlives_the_control_group_of_its_caller() {
    local dev pid state
    mountpoint -q /sys/fs/cgroup || mount -t cgroup2 cgroup2 /sys/fs/cgroup
    mkdir -p /sys/fs/cgroup/login
    dev=$(bash -c 'echo $$ >/sys/fs/cgroup/login/cgroup.procs; exec obd-ublk attach "$1"' _ "$golden/config.json")
    echo 1 >/sys/fs/cgroup/login/cgroup.kill
    pause 0.5
    wait_state "$dev" live 1
    [ -n "$(supervisor_pid)" ] || fail "the supervisor died"
    read_pid "$dev"
    [ "$(<"/proc/$pid/oom_score_adj")" = -900 ] || fail "the server's OOM score"
    [ "$(<"/proc/$(supervisor_pid)/oom_score_adj")" = -999 ] || fail "the supervisor's OOM score"
    obd-ublk detach "$dev"
    rmdir /sys/fs/cgroup/login
    nothing_left
}

why_tells_of_troubles_that_outlived_their_server() {
    local dev layer=$folder/cases/lsmt-commit-random
    rm -rf /tmp/cut
    mkdir -p /tmp/cut
    cp "$layer/layer" /tmp/cut/layer
    echo '{"lowers":[{"file":"/tmp/cut/layer"}]}' >/tmp/cut/config.json
    dev=$(obd-ublk attach /tmp/cut/config.json)
    truncate -s 8192 /tmp/cut/layer
    ! dd if="$dev" of=/dev/null bs=64k iflag=direct 2>/dev/null || fail "the lost bytes were read"
    kill_and_wait "$dev" KILL
    obd-ublk why "$dev" | grep -q 'truncated' || fail "$(obd-ublk why "$dev")"
    # Its log is turned over when it is full.
    truncate -s 1M "$(folder_of "$dev")/log"
    kill_and_wait "$dev" KILL
    # Words of libublk's may follow our own before the turn.
    [ "$(stat -c %s "$(folder_of "$dev")/log.1")" -ge 1048576 ] || fail "$(ls -l "$(folder_of "$dev")")"
    [ "$(stat -c %s "$(folder_of "$dev")/log.1")" -lt 1052672 ] || fail "the old log was not moved aside"
    [ "$(stat -c %a "$(folder_of "$dev")/log.1")" = 600 ] || fail "others can read the old log"
    [ "$(stat -c %s "$(folder_of "$dev")/log")" -lt 65536 ] || fail "the new log is not new"
    grep -q 'took over' "$(folder_of "$dev")/log" || fail "$(cat "$(folder_of "$dev")/log")"
    obd-ublk detach "$dev"
    nothing_left
}

# switches PID: how often the threads of a process have gone to sleep of themselves.
switches() {
    awk '/^voluntary_ctxt_switches/ { sum += $2 } END { print sum }' /proc/"$1"/task/*/status
}

an_idle_device_wakes_nobody_and_costs_little() {
    local dev server supervisor before after pid
    dev=$(obd-ublk attach "$fio_config")
    read_pid "$dev"
    server=$pid
    supervisor=$(supervisor_pid)
    dd if="$dev" of=/dev/null bs=1M count=8 iflag=direct 2>/dev/null
    # The queue's last timer goes off 20 s after the last request.
    sleep 25
    before=$(($(switches "$server") + $(switches "$supervisor")))
    sleep 15
    after=$(($(switches "$server") + $(switches "$supervisor")))
    [ "$before" = "$after" ] || fail "$((after - before)) wake-ups in 15 s"
    echo "idle: no wake-up in 15 s; server $(awk '/^Pss:/ { print $2 }' "/proc/$server/smaps_rollup") KiB," \
        "supervisor $(awk '/^Pss:/ { print $2 }' "/proc/$supervisor/smaps_rollup") KiB (proportional set size)" >&3
    obd-ublk detach "$dev"
    nothing_left
}

recovery_smoke=(killed_servers_come_back_and_no_reader_sees_an_error
    ten_upgrades_under_load_are_not_noticed
    kills_at_any_moment_end_in_a_device_or_in_nothing
    a_supervisor_that_dies_is_replaced_and_goes_on_guarding)
recovery_rest=(an_upgrade_that_fails_after_the_old_server_ended_is_rolled_back
    a_device_comes_back_without_its_config_and_its_layers
    a_device_comes_back_though_the_run_folder_is_full
    a_server_that_the_kernel_kills_for_memory_comes_back
    a_crash_loop_is_given_up_loudly_and_recover_tries_again
    detach_ends_whatever_is_in_the_way
    a_device_outlives_the_control_group_of_its_caller
    why_tells_of_troubles_that_outlived_their_server
    an_idle_device_wakes_nobody_and_costs_little)
