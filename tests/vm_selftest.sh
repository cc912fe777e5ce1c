#!/usr/bin/env bash
# Checks tools/vm against its own --help, on each kernel named as an argument
# (default: 6.12 and 7). Three to four minutes per kernel under software emulation.
# shellcheck disable=SC2016 # what is in single quotes is for the guest
set -uo pipefail

vm=$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/../tools/vm
dir=$(mktemp -d /tmp/vm-selftest.XXXXXX)
trap 'rm -rf "$dir"' EXIT
[ $# -gt 0 ] || set -- 6.12 7
passed=0 failed=0

check() { # NAME COMMAND...: one line, passed if COMMAND succeeds
    local name=$1
    shift
    if "$@"; then
        passed=$((passed + 1)) && echo "ok      $name"
    else
        failed=$((failed + 1)) && echo "FAILED  $name"
    fi
}

run() { # OPTION... -- COMMAND...: sets status; output in $dir/out, $dir/err
    status=0
    "$vm" --kernel "$kernel" "$@" >"$dir/out" 2>"$dir/err" </dev/null || status=$?
}

is() { # WHAT WANTED GOT
    [ "$2" = "$3" ] || { echo "        $1: wanted '$2', got '$3'"; sed 's/^/        err: /' "$dir/err" | tail -n 5; return 1; }
}

result() { # STATUS OUT ERR of the last run
    is status "$1" "$status" && is stdout "$2" "$(cat "$dir/out")" && is stderr "$3" "$(cat "$dir/err")"
}

leftovers() {
    pgrep -f "$dir/" || true
    find "$dir/tmp" -mindepth 1
    find /run/virtiofsd -name '*vm-selftest*' 2>/dev/null
}

usage_error() { # OPTION...: refused at once, with a message
    status=0
    "$vm" "$@" >"$dir/out" 2>"$dir/err" || status=$?
    is status 64 "$status" && [ -s "$dir/err" ]
}

mkdir "$dir/tmp" "$dir/bin" "$dir/ro" "$dir/rw" "$dir/rw/sub dir"
export TMPDIR=$dir/tmp OBD_UBLK_BIN_DIR=$dir/bin
printf '#!/bin/sh\necho "from the bin dir: $*"\n' >"$dir/bin/obd-probe"
chmod +x "$dir/bin/obd-probe"
head -c 1048576 /dev/urandom >"$dir/ro/random"
ln -s ro "$dir/link"
sum=$(sha256sum <"$dir/ro/random")
truncate -s 64M "$dir/disk0"
truncate -s 32M "$dir/disk1"

check "usage: no COMMAND" usage_error --kernel 6.12 --
check "usage: unknown option" usage_error --frob -- true
check "usage: no such share" usage_error --share "$dir/none" -- true
check "usage: --timeout 0" usage_error --timeout 0 -- true

for kernel; do
    echo "kernel $kernel"
    run -- sh -c 'uname -r; test -c /dev/ublk-control && echo ublk; echo apart >&2'
    release=$(head -n 1 "$dir/out")
    check "kernel $kernel is ${release%-amd64}, with ublk" result 0 "$release"$'\nublk' apart
    check "the release is of the series" test "${release#"$kernel".}" != "$release"

    for code in 1 77 124 255; do
        run -- sh -c "exit $code"
        check "status $code" result "$code" "" ""
    done
    run -- sh -c 'kill -9 $$'
    check "status of a death by signal" result 137 "" ""
    run -- no-such-command
    check "status of a missing command" is status 127 "$status"

    run --share "$dir/ro" -- cat "$dir/ro/random"
    check "1 MiB of any bytes through stdout" is sum "$sum" "$(sha256sum <"$dir/out")"
    "$vm" --kernel "$kernel" --share "$dir/ro" -- sh -c "cat '$dir/ro/random'; cat '$dir/ro/random' >&2" \
        2> >(sleep 1; sha256sum >"$dir/err.sum") > >(sleep 1; sha256sum >"$dir/out.sum")
    sleep 2
    check "the same on both streams, into slow readers" is sums "$sum $sum" "$(cat "$dir/out.sum") $(cat "$dir/err.sum")"
    run -- sh -c 'echo one; sleep 300 & sleep 300 >/dev/null 2>&1 & exit 3'
    check "processes left behind do not hold it up" result 3 one ""
    run -- sh -c 'echo a >/dev/stdout; echo b >/dev/stderr; cat; printf "$1|$2|$3"' sh "it's" '$HOME "x"' $'two\nlines'
    check "arguments as they are, /dev/std*, empty stdin" result 0 "a
it's|\$HOME \"x\"|two
lines" b

    run --share "$dir/ro" --share-rw "$dir/rw/sub dir" --share "$dir/link" --env "A=b c" --env NONE -- sh -c '
        cd "$1" && cmp random ../link/random && echo same
        touch random 2>/dev/null && echo "wrote into a read-only share"
        mount -o remount,rw "$1" 2>/dev/null; touch random 2>/dev/null && echo "wrote after a remount"
        echo new >"$1/../rw/sub dir/file"
        ls "$1/.."; obd-probe "$A" "[$NONE]"; touch /usr/here /tmp/here && pwd' sh "$dir/ro"
    check "shares at the same path, read-only or not, PATH, --env" result 0 "same
bin
link
ro
rw
from the bin dir: b c []
$dir/ro" ""
    check "what was written to --share-rw" is file new "$(cat "$dir/rw/sub dir/file")"
    check "the host is as it was" test ! -e /usr/here -a ! -e /tmp/here

    run --disk "$dir/disk0" --disk "$dir/disk1" --no-ublk -- sh -ec '
        test ! -e /dev/ublk-control
        modprobe xfs; modprobe loop; modprobe dm-flakey; dmsetup targets | grep -o flakey
        blockdev --getsize64 /dev/vda /dev/vdb
        mkfs.ext4 -q /dev/vda; mount /dev/vda /mnt; echo kept >/mnt/file
        echo raw | dd of=/dev/vdb status=none'
    check "disks in order, modules" result 0 "flakey
67108864
33554432" ""
    check "a disk keeps what was written" is content "kept raw" \
        "$(debugfs -R 'cat file' "$dir/disk0" 2>/dev/null) $(head -c 3 "$dir/disk1")"

    run --timeout 2 -- sh -c 'echo before; sleep 60'
    check "timeout" is "status and output" "124 before" "$status $(cat "$dir/out")"

    run --pidfile "$dir/pid" --disk "$dir/disk0" -- sh -c 'echo before; sleep 60' &
    until [ -s "$dir/pid" ]; do sleep 0.2; done
    sleep 2
    kill -9 "$(cat "$dir/pid")"
    wait $!
    check "power cut" is "output" "before" "$(cat "$dir/out")"
    check "power cut, as told" grep -q "vm: the VM died after COMMAND was started" "$dir/err"
    check "no pidfile is left" test ! -e "$dir/pid"

    run -- sh -c 'echo c >/proc/sysrq-trigger; sleep 60'
    check "panic: status" is status 137 "$status"
    check "panic: reported, with the console" grep -q "vm| .*Kernel panic" "$dir/err"

    run --memory 16M -- true
    check "a boot that fails twice" is status 125 "$status"
    check "a boot that fails is tried once more" is "retries told" 1 "$(grep -c "trying once more" "$dir/err")"

    for signal in INT:130 TERM:143; do
        # A shell without job control lets its children ignore SIGINT.
        perl -e '$SIG{INT} = "DEFAULT"; exec @ARGV' "$vm" --kernel "$kernel" --pidfile "$dir/pid" -- sleep 60 2>"$dir/err" &
        until [ -s "$dir/pid" ]; do sleep 0.2; done
        kill -"${signal%:*}" $!
        status=0
        wait $! || status=$?
        check "SIG${signal%:*} ends it" is status "${signal#*:}" "$status"
    done
    check "nothing is left behind" is leftovers "" "$(leftovers)"
done

echo "$passed passed, $failed failed"
[ "$failed" = 0 ]
