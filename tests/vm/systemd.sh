# shellcheck shell=bash disable=SC2034,SC2154,SC2317 # sourced by suite.sh
#
# Where systemd is the first process: checks that its units come, hold and go.
#
# The guest has no systemd of its own. One is started as the first process of a new PID, mount and
# control group namespace, with an empty /run; the checks' commands are run in there.

system_pid=

# in_system COMMAND...: runs a command under that systemd.
in_system() {
    nsenter --target "$system_pid" --mount --pid --cgroup -- "$@"
}

# write_boot: the first process of the namespace.
write_boot() {
cat >/tmp/system.sh <<'BOOT'
mount --make-rprivate /
umount -R /sys/fs/cgroup
mount -t cgroup2 cgroup2 /sys/fs/cgroup
mount -t tmpfs -o mode=755 run /run
mkdir -p /run/lock /run/systemd/system
printf '[Unit]\nDefaultDependencies=no\n' >/run/systemd/system/checks.target
exec env -i container=test PATH="$PATH" /lib/systemd/systemd --system --unit=checks.target \
    --log-target=kmsg --show-status=no
BOOT
}

start_system() {
    local group=/sys/fs/cgroup/system
    # Of a check that failed.
    pkill -9 -x systemd && sleep 1
    write_boot
    mountpoint -q /sys/fs/cgroup || mount -t cgroup2 cgroup2 /sys/fs/cgroup
    mkdir -p "$group"
    # shellcheck disable=SC2016 # the inner shell's
    sh -c 'echo $$ >"$1/cgroup.procs"
        exec unshare --pid --fork --mount --cgroup --mount-proc bash /tmp/system.sh' _ "$group" \
        >/tmp/system.log 2>&1 3>&- &
    for _ in $(seq 200); do
        system_pid=$(pgrep -x systemd || true)
        if [ -n "$system_pid" ] && in_system test -S /run/systemd/private; then
            return 0
        fi
        pause 0.3
    done
    fail "systemd did not start: $(cat /tmp/system.log; dmesg | grep systemd | tail -n 5)"
}

stop_system() {
    # Whatever runs in the namespace goes with its first process.
    kill -9 "$system_pid"
    for _ in $(seq 100); do
        pgrep -x systemd >/dev/null || return 0
        pause 0.1
    done
    fail "systemd cannot be killed"
}

# Process ids as they are in there.
server_in_system() {
    in_system obd-ublk list --json | python3 -c '
import json,sys
pids = [d["pid"] for d in json.load(sys.stdin)["devices"] if d["device"] == sys.argv[1]]
print(pids[0] if pids and pids[0] else "")' "$1"
}

supervisor_in_system() {
    in_system pgrep -f '^[^ ]*(/exe|/obd-ublk) supervise$' | head -n 1 || true
}

new_supervisor_in_system() { # new_supervisor_in_system NOT_THIS_PID
    local pid
    for _ in $(seq 100); do
        pid=$(supervisor_in_system)
        if [ -n "$pid" ] && [ "$pid" != "$1" ]; then
            return 0
        fi
        pause 0.3
    done
    fail "no new supervisor"
}

group_of() {
    in_system sed -n 's/^0:://p' "/proc/$1/cgroup"
}

live_in_system() { # live_in_system DEV NOT_THIS_PID: waits for another server that serves
    local pid
    for _ in $(seq 100); do
        pid=$(server_in_system "$1")
        if [ -n "$pid" ] && [ "$pid" != "${2-}" ] &&
            in_system obd-ublk list | grep -q "$1 .* live"; then
            return 0
        fi
        pause 0.3
    done
    fail "$1 is not live: $(in_system obd-ublk list 2>&1; in_system cat /run/obd-ublk/supervisor.log)"
}

expect_group() { # expect_group PID PATTERN
    local group
    group=$(group_of "$1")
    [[ "$group" =~ $2 ]] || fail "process $1 is in '$group', not in $2"
}

nothing_left_in_system() {
    local left
    for _ in $(seq 50); do
        left=$(in_system systemctl list-units --all --plain --no-legend 'obd-ublk*')
        [ -n "$left" ] || break
        pause 0.3
    done
    [ -z "$left" ] || fail "units left: $left"
    nothing_left
    left=$(in_system find /run/obd-ublk -mindepth 1 ! -name supervisor.log ! -path /run/obd-ublk/upper)
    [ -z "$left" ] || fail "files left: $left"
}

scope='^/system.slice/obd-ublk-device-[a-z0-9-]+\.scope$'
service='^/system.slice/obd-ublk-supervisor\.service$'

under_systemd_devices_and_supervisor_have_units_of_their_own() {
    local dev server old
    start_system
    rm -f /tmp/attached
    # A login, which is killed with all that it started.
    # shellcheck disable=SC2016 # the inner shell's
    in_system systemd-run --quiet --scope --unit=login.scope -- \
        sh -c 'obd-ublk attach "$1" >/tmp/attached; exec sleep 1000' _ "$golden/config.json" &
    for _ in $(seq 200); do
        [ ! -s /tmp/attached ] || break
        pause 0.3
    done
    dev=$(cat /tmp/attached)
    in_system systemctl kill --signal=KILL login.scope
    sleep 1
    live_in_system "$dev"
    server=$(server_in_system "$dev")
    old=$(supervisor_in_system)
    expect_group "$server" "$scope"
    expect_group "$old" "$service"
    [ "$(in_system cat "/proc/$server/oom_score_adj")" = -900 ]
    [ "$(in_system cat "/proc/$old/oom_score_adj")" = -999 ]
    in_system grep -q '^Max open files *1048576' "/proc/$old/limits"
    # Nobody stops a device by stopping a unit.
    ! in_system systemctl stop 'obd-ublk-device-*.scope' || fail "the scope was stopped"
    [ "$(server_in_system "$dev")" = "$server" ]
    # The server dies: the next one has a scope of its own, and the parcel.
    in_system kill -9 "$server"
    live_in_system "$dev" "$server"
    expect_group "$(server_in_system "$dev")" "$scope"
    in_system obd-ublk stat "$dev" | grep recovery >&3
    in_system obd-ublk stat "$dev" | grep -q parcel
    # The supervisor dies: systemd starts it again, and it guards.
    in_system kill -9 "$old"
    new_supervisor_in_system "$old"
    sleep 3
    expect_group "$(supervisor_in_system)" "$service"
    server=$(server_in_system "$dev")
    in_system kill -9 "$server"
    live_in_system "$dev" "$server"
    expect_group "$(server_in_system "$dev")" "$scope"
    # Both die at once: systemd gives the new supervisor what the old one knew.
    old=$(supervisor_in_system)
    server=$(server_in_system "$dev")
    in_system kill -9 "$old" "$server"
    live_in_system "$dev" "$server"
    in_system obd-ublk stat "$dev" | grep recovery >&3
    in_system obd-ublk stat "$dev" | grep -q parcel || fail "no parcel outlived the supervisor"
    # It is stopped with its unit: the server has it started again.
    old=$(supervisor_in_system)
    in_system systemctl stop obd-ublk-supervisor.service
    new_supervisor_in_system "$old"
    expect_group "$(supervisor_in_system)" "$service"
    sleep 2
    # Handed to another program, it is in a scope again.
    server=$(server_in_system "$dev")
    in_system obd-ublk upgrade "$dev" >&3
    [ "$(server_in_system "$dev")" != "$server" ]
    expect_group "$(server_in_system "$dev")" "$scope"
    obd-ublk-device-check check "$dev" "$golden/pack"
    in_system obd-ublk detach "$dev"
    nothing_left_in_system
    stop_system
}

# fake_run SCRIPT: what systemd-run does from now on.
fake_run() {
    mkdir -p /usr/local/lib/fake
    printf '#!/bin/sh\n%s\n' "$1" >/usr/local/lib/fake/systemd-run
    chmod 755 /usr/local/lib/fake/systemd-run
}

under_a_systemd_that_does_not_answer_devices_come_up_all_the_same() {
    local dev server what
    start_system
    for what in 'echo "Failed to connect to bus" >&2; exit 1' 'exec sleep 1000'; do
        fake_run "$what"
        dev=$(in_system env PATH="/usr/local/lib/fake:$PATH" obd-ublk attach "$golden/config.json" 2>/tmp/warned)
        grep -q 'no unit of its own' /tmp/warned || fail "no warning: $(cat /tmp/warned)"
        server=$(server_in_system "$dev")
        expect_group "$server" '^/obd-ublk$'
        expect_group "$(supervisor_in_system)" '^/obd-ublk$'
        # The supervisor inherited the search path: the successor gets no scope either.
        in_system kill -9 "$server"
        live_in_system "$dev" "$server"
        expect_group "$(server_in_system "$dev")" '^/obd-ublk$'
        in_system grep -q 'without one, then' /run/obd-ublk/supervisor.log
        in_system obd-ublk stat "$dev" | grep recovery >&3
        obd-ublk-device-check check "$dev" "$golden/pack"
        in_system obd-ublk detach "$dev"
        nothing_left_in_system
        in_system rm /run/obd-ublk/supervisor.log
    done
    # There is none at all.
    in_system mount --bind /dev/null /usr/bin/systemd-run
    dev=$(in_system obd-ublk attach "$golden/config.json" 2>/tmp/warned)
    grep -q 'no unit of its own' /tmp/warned || fail "no warning: $(cat /tmp/warned)"
    expect_group "$(server_in_system "$dev")" '^/obd-ublk$'
    in_system obd-ublk detach "$dev"
    nothing_left_in_system
    stop_system
}

systemd_smoke=(under_systemd_devices_and_supervisor_have_units_of_their_own)
# By name only, in the soak tier: it waits for several deadlines, four minutes under emulation.
systemd_soak=(under_a_systemd_that_does_not_answer_devices_come_up_all_the_same)
