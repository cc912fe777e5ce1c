# shellcheck shell=bash disable=SC2154 # tools/vm sets the rest
# Sourced by tools/vm: the initrd, the processes around QEMU, and the dialogue
# with the guest, which is three lines on a virtio-serial port:
#   guest: ready    it could start COMMAND now
#   host:  go       it must; from here on nothing is ever tried again
#   guest: exit N   COMMAND is over, its output and its writes are handed over

virtiofsd=/usr/lib/qemu/virtiofsd
qemu_pid='' ctl='' line='' helpers=() relays=()

sq() { printf "'%s'" "${1//\'/\'\\\'\'}"; } # quoted for any shell

# Writes $run/initrd: busybox, vm-init.sh, the modules the guest cannot get at
# before it has its root, and what this run is about.
write_initrd() {
    local dir=$run/initrd.d release module list action path
    release=$(<"$kdir/release")
    mkdir -p "$dir"/{dev,proc,host,rw,root,modules}
    mknod "$dir/dev/console" c 5 1
    cp "$(type -P busybox)" "$dir/busybox"
    install -m 755 "$here/lib/vm-init.sh" "$dir/init"
    sed -i '1i #!/busybox sh' "$dir/init"
    for module in virtio_pci virtio_console virtiofs overlay ${disks[0]+virtio_blk} ${load_ublk:+ublk_drv}; do
        list=$(modprobe -C /dev/null -d "$kdir" -S "$release" --show-depends "$module") ||
            die "$release has no module $module"
        while read -r action path; do
            [ "$action" = insmod ] || continue # built in
            path=${path%% *}
            [ ! -e "$dir/modules/${path##*/}" ] || continue
            cp "$path" "$dir/modules/"
            echo "${path##*/}"
        done <<<"$list"
    done >"$dir/modules.order"
    write_config "$@" >"$dir/config"
    (cd "$dir" && find . | busybox cpio -o -H newc 2>/dev/null) >"$run/initrd"
    rm -rf "$dir"
}

# Prints /config: shell assignments and functions for vm-init.sh.
write_config() {
    local item mode at real i=0 cwd=/ points=() nodes="/dev/vport0p1 /dev/vport0p2 /dev/vport0p3"
    local letters=abcdefghijklmnopqrstuvwxyz
    for item in "${disks[@]}"; do
        nodes+=" /dev/vd${letters:i++:1}"
    done
    ! shared "$PWD" || cwd=$PWD
    mark=$'\001'$(od -An -tx8 -N16 /dev/urandom | tr -d ' ')$'\002'
    echo "release=$(sq "$(<"$kdir/release")") kernel_dir=$(sq "$kdir")"
    echo "mark=$(sq "$mark") cwd=$(sq "$cwd") nodes=$(sq "$nodes")"

    # A folder reached through a symbolic link is there under both names.
    # Sorted, an outer folder is mounted before one inside it.
    i=0
    for item in "${shares[@]}"; do
        mode=${item%% *} at=${item#* }
        real=$(realpath -- "$at")
        for at in "$real" "$at"; do
            if [ "$mode" = ro ]; then
                points+=("$at"$'\n'"share_ro $(sq "$real") $(sq "$at")")
            else
                points+=("$at"$'\n'"share_rw share$i $(sq "$at")")
            fi
            [ "$real" != "${item#* }" ] || break
        done
        [ "$mode" = ro ] || i=$((i + 1))
    done
    echo "mount_shares() {"
    echo ":"
    [ ${#points[@]} = 0 ] || printf '%s\0' "${points[@]}" | LC_ALL=C sort -zu | tr '\0' '\n' |
        grep -E '^share_r[ow] '
    echo "}"

    echo "set_environment() {"
    echo "export HOME=/root USER=root LANG=C.UTF-8 TERM=dumb OBD_UBLK_VM=1"
    echo "export PATH=$(sq "$bin_dir:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin")"
    for item in "${env[@]}"; do echo "export ${item%%=*}=$(sq "${item#*=}")"; done
    echo "}"

    printf 'set --'
    for item in "$@"; do printf ' %s' "$(sq "$item")"; done
    echo
}

# Serves the host's root, in a mount namespace in which all of it is read-only:
# no bug in a guest or in a test can write through it.
serve_root() {
    # shellcheck disable=SC2016 # for the inner shell
    unshare --mount --propagation private sh -c '
        mkdir -p "$1/ro" && mount --rbind / "$1/ro" || exit 1
        while read -r _ _ _ _ at _; do
            case $at in
            "$1/ro" | "$1/ro"/*) mount -o remount,bind,ro "$(printf %b "$at")" 2>/dev/null ;;
            esac
        done </proc/self/mountinfo
        ! touch "$1/ro$1/writable" 2>/dev/null || exit 1
        shift
        exec "$@"' sh "$run" "${fs_server[@]}" --socket-path="$run/root.sock" -o source="$run/ro" -o cache=always \
        >"$run/virtiofsd.log" 2>&1 &
    helpers+=($!)
}

# Starts everything for one boot with accelerator $1.
start_vm() {
    local accel=$1 i=0 item sockets=("$run/root.sock") qemu fs_server tries
    rm -f "$run"/*.sock "$run"/ctl.* "$run/out" "$run/err"
    : >"$run/console"
    mkfifo "$run"/{ctl.in,ctl.out,out,err}
    exec {ctl}<>"$run/ctl.out"

    # Should this script be killed the hard way, its children go with it.
    local orphan=(setpriv --pdeathsig KILL --)
    # The host's root is read-only here and its files stay as they are while a guest runs, so the
    # guest may believe what it once read: with `auto` it asks again for each part of each path,
    # and starting a program costs six times as much.
    fs_server=("${orphan[@]}" "$virtiofsd" -f -o sandbox=chroot -o log_level=err)
    qemu=(
        "${orphan[@]}" qemu-system-x86_64 -no-user-config -nodefaults -no-reboot -display none
        -machine pc -smp "$cpus" -m "$memory"
        -object "memory-backend-memfd,id=mem,size=$memory,share=on" -numa "node,memdev=mem"
        -kernel "$kdir/vmlinux" -initrd "$run/initrd"
        # 5: with warnings, which is the level of a WARNING. The processor's
        # random numbers are QEMU's, that is the host's: no wait for entropy.
        # Its clock is believed: a loaded host makes it look unstable, and what
        # the kernel then patches in its own code kills it now and then where
        # that code is being emulated (an int3 in sched_clock_cpu, on 7.2).
        -append "console=ttyS0 quiet loglevel=5 panic=-1 random.trust_cpu=on tsc=reliable"
        -serial "file:$run/console"
        # The first virtio device: its ports are /dev/vport0p1, 2 and 3.
        -device "virtio-serial-pci,id=serial"
        -chardev "pipe,id=ctl,path=$run/ctl" -device "virtserialport,bus=serial.0,nr=1,chardev=ctl"
        -chardev "file,id=out,path=$run/out" -device "virtserialport,bus=serial.0,nr=2,chardev=out"
        -chardev "file,id=err,path=$run/err" -device "virtserialport,bus=serial.0,nr=3,chardev=err"
        -chardev "socket,id=root,path=$run/root.sock" -device "vhost-user-fs-pci,chardev=root,tag=host"
    )
    if [ "$accel" = kvm ]; then
        qemu+=(-accel kvm -cpu host)
    else
        # Without -cx16, 6.12 crashes in most boots under QEMU 7.2: random
        # code right after a cmpxchg16b finds the flags wrong.
        qemu+=(-accel "tcg,thread=multi" -cpu "max,-cx16")
    fi

    serve_root
    for item in "${shares[@]}"; do
        [ "${item%% *}" = rw ] || continue
        sockets+=("$run/share$i.sock")
        "${fs_server[@]}" --socket-path="$run/share$i.sock" -o cache=auto \
            -o source="$(realpath -- "${item#* }")" \
            >>"$run/virtiofsd.log" 2>&1 &
        helpers+=($!)
        qemu+=(-chardev "socket,id=share$i,path=$run/share$i.sock"
            -device "vhost-user-fs-pci,chardev=share$i,tag=share$i")
        i=$((i + 1))
    done
    i=0
    for item in "${disks[@]}"; do
        qemu+=(-drive "file=${item//,/,,},if=none,id=disk$i,format=raw,cache=writeback,discard=unmap"
            -device "virtio-blk-pci,drive=disk$i")
        i=$((i + 1))
    done

    # Both ends of each stream, before QEMU opens its own.
    perl "$here/lib/vm-relay.pl" "$run/out" "$mark" {ctl}>&- &
    relays=($!)
    perl "$here/lib/vm-relay.pl" "$run/err" "$mark" >&2 {ctl}>&- &
    relays+=($!)

    for item in "${sockets[@]}"; do
        tries=500
        until [ -S "$item" ]; do
            tries=$((tries - 1))
            if [ "$tries" = 0 ] || ! kill -0 "${helpers[@]}" 2>/dev/null; then
                return 1
            fi
            sleep 0.02
        done
    done
    "${qemu[@]}" >"$run/qemu.log" 2>&1 {ctl}>&- &
    qemu_pid=$!
    disown "$qemu_pid" # no word from bash when it is killed
}

stop_vm() {
    local pid tries=500
    for pid in $qemu_pid "${helpers[@]}" "${relays[@]}"; do
        kill -KILL "$pid" || true
        wait "$pid" || true
    done 2>/dev/null
    while [ -n "$qemu_pid" ] && kill -0 "$qemu_pid" 2>/dev/null && [ $((tries--)) -gt 0 ]; do
        sleep 0.01
    done
    # virtiofsd leaves a lock file per socket behind.
    rm -f /run/virtiofsd/"${run//\//.}"*
    [ -z "$ctl" ] || exec {ctl}>&-
    qemu_pid='' ctl='' helpers=() relays=()
}

# Reads the guest's next line into $line: 0, or 1 when the VM died, or 2 when
# $1 seconds have passed.
hear() {
    local end=$((SECONDS + $1)) part dead=''
    line=
    while :; do
        if IFS= read -r -t 0.5 part <&"$ctl"; then line+=$part; return 0; fi
        line+=$part
        [ -z "$dead" ] || return 1
        # Once more after its death: it may have spoken last.
        kill -0 "$qemu_pid" 2>/dev/null || dead=1
        [ "$SECONDS" -lt "$end" ] || return 2
    done
}

# Boots with accelerator $1, up to "ready", within $2 seconds.
boot() {
    boot_error="virtiofsd or QEMU did not start"
    if start_vm "$1"; then
        local heard=0
        hear "$2" || heard=$?
        case $heard,$line in
        0,ready) return 0 ;;
        1,*) boot_error="the VM died while booting" ;;
        2,*) boot_error="no sign of life from the guest after $2 s" ;;
        *) boot_error="the guest said: $line" ;;
        esac
    fi
    return 1
}

show_logs() {
    local log
    for log in virtiofsd.log qemu.log console; do
        [ -s "$run/$log" ] || continue
        say "the end of $log:"
        # virtiofsd says that of every QEMU that is gone.
        grep -av 'Unexpected poll revents' "$run/$log" | tail -n "${1-40}" |
            tr -d '\r' | sed 's/^/vm| /' >&2 || true
    done
}

# Chooses and proves the accelerator, boots, retries: returns with a guest that
# is ready, or not at all.
boot_somehow() {
    local choice=$accel verdict='' key
    if [ "$accel" = auto ]; then
        key=$(cat /proc/sys/kernel/random/boot_id "$kdir/release" &&
            stat -Lc '%s %Y' "$(type -P qemu-system-x86_64)")
        verdict=$cache/accel-$(printf %s "$key" | sha256sum | head -c 16)
        choice=tcg
        if [ -e "$verdict" ]; then
            choice=$(<"$verdict")
        elif [ -w /dev/kvm ]; then
            # The trial is the run itself, if it comes that far.
            if boot kvm 5; then echo kvm >"$verdict"; return 0; fi
            say "KVM does not work here ($boot_error): software emulation from now on"
            stop_vm
            echo tcg >"$verdict"
        fi
    fi
    ! boot "$choice" "$boot_timeout" || return 0
    say "$boot_error: trying once more"
    echo "$(date -u +%FT%TZ) $(<"$kdir/release") $choice: $boot_error" >>"$cache/boot-retries"
    show_logs 5
    stop_vm
    if [ "$accel" = auto ] && [ "$choice" = kvm ]; then
        choice=tcg
        echo tcg >"$verdict"
    fi
    ! boot "$choice" "$boot_timeout" || return 0
    show_logs
    die "$boot_error, twice"
}

# Lets the relays pass on what QEMU had written before its end; not for ever,
# though: nobody may be reading.
drain() {
    local tries=100
    kill -KILL "$qemu_pid" 2>/dev/null || true
    while kill -0 "${relays[0]}" 2>/dev/null || kill -0 "${relays[1]}" 2>/dev/null; do
        tries=$((tries - 1))
        [ "$tries" -gt 0 ] || break
        sleep 0.05
    done
}

boot_and_run() {
    local heard=0 status
    boot_somehow
    if [ -n "$pidfile" ]; then
        echo "$qemu_pid" >"$pidfile.$$"
        mv -T "$pidfile.$$" "$pidfile"
    fi
    echo go >"$run/ctl.in"
    hear "$timeout" || heard=$?
    case $heard,$line in
    "0,exit "*)
        # The marks are on their way, with all that precedes them.
        wait "${relays[@]}" || true
        status=${line#exit }
        ;;
    2,*)
        drain
        show_logs
        say "COMMAND did not end within $timeout s"
        status=124
        ;;
    *)
        drain
        show_logs
        say "the VM died after COMMAND was started"
        status=137
        ;;
    esac
    if grep -aEq "$trouble" "$run/console"; then
        say "the guest's kernel complained:"
        grep -aE -A 12 "$trouble" "$run/console" | head -n 60 | tr -d '\r' | sed 's/^/vm| /' >&2
    fi
    finish "$status"
}
trouble='BUG:|kernel BUG|Oops|WARNING: |general protection fault|Kernel panic|blocked for more than|soft lockup|rcu.*stall|page allocation failure|Out of memory'
