# shellcheck shell=dash disable=SC1091,SC2015,SC2093,SC2154 # /config sets the rest
# PID 1 of the guest, run by a static busybox: first in the initramfs, then,
# with the argument "root", in the overlay over the host's root file system.
# /config (written by vm-boot.sh) sets what is used here without being set.

me=/busybox
[ "${1-}" = root ] && me=/run/obd-vm/busybox
for applet in cat cp hostname insmod ip ln mkdir mkfifo mount poweroff sleep timeout umount; do
    eval "$applet() { $me $applet \"\$@\"; }"
done

fail() { # the host sees the VM die before "ready", and shows the console
    echo "vm-init: $*" >/dev/console
    poweroff -f
    sleep 60
}

# --- in the initramfs -------------------------------------------------------

if [ "${1-}" != root ]; then
    mount -t devtmpfs dev /dev
    mount -t proc proc /proc
    while read -r module; do
        insmod "/modules/$module" || fail "insmod $module"
    done </modules.order

    mount -t virtiofs -o ro host /host || fail "no virtiofs root"
    mount -t tmpfs -o size=75%,mode=755 rw /rw
    mkdir /rw/upper /rw/work
    mount -t overlay -o lowerdir=/host,upperdir=/rw/upper,workdir=/rw/work root /root || fail "no overlay"

    mkdir -p /root/dev /root/proc /root/sys /root/run /root/tmp
    mount -t devtmpfs dev /root/dev
    mount -t proc -o nosuid,nodev,noexec proc /root/proc
    mount -t sysfs -o nosuid,nodev,noexec sys /root/sys
    mount -t tmpfs -o nosuid,nodev,mode=755 run /root/run
    mount -t tmpfs -o nosuid,nodev,mode=1777,size=75% tmp /root/tmp
    mkdir -p /root/run/obd-vm/host /root/run/lock
    cp /busybox /init /config /root/run/obd-vm/
    mount --move /host /root/run/obd-vm/host
    exec /busybox switch_root /root /run/obd-vm/busybox sh /run/obd-vm/init root
fi

# --- in the root file system ------------------------------------------------

cd /run/obd-vm || fail "no /run/obd-vm"

share_ro() { # REAL AT: the host's folder REAL, at AT
    mkdir -p "$2" && mount --bind "host$1" "$2" || fail "cannot share $1"
}
share_rw() { # TAG AT
    mkdir -p "$2" && mount -t virtiofs "$1" "$2" || fail "cannot share $2"
}
. /run/obd-vm/config # sets the arguments to COMMAND, too

mkdir -p /dev/pts /dev/shm
mount -t devpts -o nosuid,noexec,gid=5,mode=620,ptmxmode=666 devpts /dev/pts
mount -t tmpfs -o nosuid,nodev,mode=1777 shm /dev/shm
mount -t cgroup2 -o nosuid,nodev,noexec cgroup2 /sys/fs/cgroup
for link in "fd /proc/self/fd" "stdin /proc/self/fd/0" "stdout /proc/self/fd/1" "stderr /proc/self/fd/2"; do
    [ -e "/dev/${link%% *}" ] || ln -s "${link#* }" "/dev/${link%% *}"
done
ip link set lo up
hostname vm
# As systemd would have it; the kernel's own limit of 4096 is nobody's.
ulimit -Hn 524288
ulimit -Sn 1024

share_ro "$kernel_dir/lib/modules/$release" "/lib/modules/$release"
mount_shares
# Shared propagation is what servers meet on a host run by systemd.
umount -l host
mount --make-rshared /

wait_for() {
    tries=100
    until [ -e "$1" ]; do
        tries=$((tries - 1))
        [ $tries -gt 0 ] || fail "no $1"
        sleep 0.05
    done
}
for node in $nodes; do wait_for "$node"; done

mkfifo out err
printf '%s' "$mark" >mark
exec 3<>/dev/vport0p1
echo ready >&3
# Until the host answers, it may give up on this boot and start another one.
read -r go <&3
[ "$go" = go ] || fail "the host said: $go"

# cat, not the port itself: a port cannot be opened again as /dev/stdout.
$me cat out mark >/dev/vport0p2 3>&- &
relay_out=$!
$me cat err mark >/dev/vport0p3 3>&- &
relay_err=$!
(
    exec 3>&- </dev/null >out 2>err
    cd "$cwd" || cd /
    set_environment
    # By its path: asked for a bare name, busybox prefers its own applets.
    case $1 in
    */*) exec "$@" ;;
    esac
    IFS=:
    for path in $PATH; do
        [ -f "$path/$1" ] && [ -x "$path/$1" ] || continue
        path=$path/$1
        shift
        exec "$path" "$@"
    done
    echo "vm: $1: not found" >&2
    exit 127
) &
wait $!
status=$?

# What COMMAND wrote to a disk or to a share is not lost with the VM. No plain
# sync: it would wait for a dead ublk device, too.
while read -r dev at _; do
    case $dev in
    /dev/vd* | share[0-9]*) timeout 30 $me sync -f "$at" ;;
    esac
done </proc/mounts
for dev in /dev/vd*; do
    [ ! -b "$dev" ] || timeout 30 $me blockdev --flushbufs "$dev"
done

# The relays end when nobody holds the other end of their pipe: kill what is
# left. A process stuck in the kernel may never let go: give up after 10 s.
stuck=100
while kill -0 $relay_out 2>/dev/null || kill -0 $relay_err 2>/dev/null; do
    left=
    for p in /proc/[0-9]*; do
        p=${p#/proc/}
        case $p in 1 | "$relay_out" | "$relay_err") continue ;; esac
        # Neither kernel threads nor zombies have an executable.
        [ -e "/proc/$p/exe" ] || continue
        kill -9 "$p" 2>/dev/null && left=1
    done
    [ -z "$left" ] || stuck=$((stuck - 1))
    [ $stuck -gt 0 ] || break
    sleep 0.1
done
if [ $stuck = 0 ]; then
    echo "vm-init: processes that cannot be killed are left" >/dev/console
    kill -9 $relay_out $relay_err
    wait $relay_out $relay_err
    cat mark >/dev/vport0p2
    cat mark >/dev/vport0p3
fi
echo "exit $status" >&3
# The host ends the VM.
while :; do sleep 60; done
