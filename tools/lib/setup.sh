# shellcheck shell=bash
# Sourced by tools/test and tools/quickstart: what a fresh Debian 12 lacks, installed on demand.
#
# Nothing is installed twice, and nothing is installed that is there: a developer's own toolchain
# is used as it is. `setup_environment` only finds and exports; `setup_all` installs first.

# The oldest compiler that the crate builds with (rust-version in Cargo.toml).
rust_minor_min=91
# The cargo-deny that deny.toml was written for.
deny_version='^0.20'
# The fsx that tests/vm/upper.sh was written for.
fsx_version='^0.3'

cache=${OBD_UBLK_CACHE:-${XDG_CACHE_HOME:-${HOME:-/var}/.cache}/obd-ublk}
llvm_lib=/usr/lib/llvm-14/lib

setup_say() { printf 'setup: %s\n' "$*" >&2; }
setup_die() {
    setup_say "$*"
    exit 1
}

setup_apt=(apt-get -qq -o DPkg::Lock::Timeout=300 -o Acquire::Retries=3)
setup_lists_updated=
setup_update_lists() {
    [ -z "$setup_lists_updated" ] || return 0
    "${setup_apt[@]}" update >&2 || setup_die "apt-get update failed"
    setup_lists_updated=1
}

# Installs the named packages, reading apt's lists first, once.
setup_install() {
    [ "$(id -u)" = 0 ] || setup_die "not root: cannot install $*"
    [ -n "$(type -P apt-get)" ] || setup_die "no apt-get here: install $* by hand"
    setup_update_lists
    setup_say "installing $*"
    DEBIAN_FRONTEND=noninteractive "${setup_apt[@]}" install -y --no-install-recommends "$@" >&2 ||
        setup_die "cannot install $*"
    hash -r
}

# Installs what of PACKAGE=PATH-OR-COMMAND is missing.
setup_missing() {
    local pair package probe want=()
    for pair; do
        package=${pair%%=*} probe=${pair#*=}
        case $probe in
        /*) [ -e "$probe" ] || want+=("$package") ;;
        *) [ -n "$(type -P "$probe")" ] || want+=("$package") ;;
        esac
    done
    [ ${#want[@]} = 0 ] || setup_install "${want[@]}"
}

# A C compiler for lz4 and zstd; libclang with its headers, because libublk's bindings are made by
# bindgen at build time; git, because the tidy test asks it what is tracked. LIBCLANG_PATH is left
# alone: libclang is found without it, and a changed value would rebuild the bindings.
setup_build_packages() {
    setup_missing gcc=cc libc6-dev=/usr/include/stdio.h linux-libc-dev=/usr/include/linux/errno.h \
        libclang1-14="$llvm_lib/libclang.so.1" libclang-common-14-dev="$llvm_lib/clang" \
        git=git ca-certificates=/etc/ssl/certs/ca-certificates.crt
}

# What the quick start and the tests in the VM use. The guest sees the host's own root, so what is
# installed here is there too. tools/vm installs what it needs for itself.
setup_run_packages() {
    setup_missing fio=fio e2fsprogs=mkfs.ext4 xfsprogs=mkfs.xfs mount=mount kmod=modprobe
}

# What tests/nbd.rs reads through, besides fio.
setup_nbd_packages() {
    setup_missing libnbd-bin=nbdcopy qemu-utils=qemu-img
}

# What tests/real_registry.rs runs. skopeo fills the registry; the registry and nginx are unpacked
# beside the other tools and not installed, because their packages start services.
setup_registry_programs() {
    local pair package file folder=$cache/tools/debian download
    setup_missing skopeo=skopeo
    for pair in docker-registry=usr/bin/docker-registry nginx=usr/sbin/nginx; do
        package=${pair%%=*} file=${pair#*=}
        [ -z "$(type -P "${file##*/}")" ] || continue
        setup_update_lists
        setup_say "unpacking $package"
        mkdir -p "$folder"
        download=$(mktemp -d)
        # apt's own user may not write there.
        (cd "$download" && apt-get -qq -o APT::Sandbox::User=root download "$package" >&2 &&
            dpkg-deb -x ./*.deb "$folder") || setup_die "cannot unpack $package"
        rm -r "$download"
    done
    # What nginx is linked with, but for what every Debian has.
    setup_missing libpcre2-8-0=/usr/lib/x86_64-linux-gnu/libpcre2-8.so.0 \
        libssl3=/usr/lib/x86_64-linux-gnu/libssl.so.3
    hash -r
}

# Whether the cargo on PATH is recent and comes with rustfmt and clippy.
setup_rust_is_good() {
    local version
    version=$(cargo --version 2>/dev/null) || return 1
    [[ $version =~ ^cargo\ 1\.([0-9]+)\. ]] || return 1
    [ "${BASH_REMATCH[1]}" -ge "$rust_minor_min" ] &&
        cargo fmt --version >/dev/null 2>&1 && cargo clippy --version >/dev/null 2>&1
}

# Puts what earlier installations left on PATH; installs nothing.
setup_environment() {
    PATH=$PATH:/usr/sbin:/sbin:$cache/tools/debian/usr/bin:$cache/tools/debian/usr/sbin
    export PATH=$cache/tools/bin:$PATH
    setup_rust_is_good && return
    local before=$PATH dir
    for dir in "${CARGO_HOME:-${HOME:-/}/.cargo}/bin" /usr/bin; do
        export PATH=$dir:$before
        hash -r
        setup_rust_is_good && return
    done
    export PATH=$before
    hash -r
}

# Debian 12's security suite carries a recent Rust under these names (for the browser's sake).
setup_rust() {
    setup_rust_is_good && return
    setup_install cargo-web rustc-web rustfmt-web rust-web-clippy
    setup_environment
    setup_rust_is_good || setup_die "no cargo >= 1.$rust_minor_min with rustfmt and clippy;" \
        "Debian 12's security suite has one: is it among apt's sources?"
}

# Built without optimisation: it runs for a second, and builds in a third of the time.
setup_deny() {
    [ -x "$cache/tools/bin/cargo-deny" ] && return
    setup_say "building cargo-deny (once)"
    env -u CARGO_TARGET_DIR CARGO_PROFILE_DEV_DEBUG=0 \
        cargo install --quiet --locked --debug --no-default-features --root "$cache/tools" \
        --version "$deny_version" cargo-deny >&2 || setup_die "cannot build cargo-deny"
}

# The exerciser of files that tests/vm/upper.sh runs; found on PATH by tests/vm.rs.
setup_fsx() {
    [ -x "$cache/tools/bin/fsx" ] && return
    setup_say "building fsx (once)"
    env -u CARGO_TARGET_DIR CARGO_PROFILE_DEV_DEBUG=0 \
        cargo install --quiet --locked --debug --root "$cache/tools" \
        --version "$fsx_version" fsx >&2 || setup_die "cannot build fsx"
}

# Everything that tools/test needs.
setup_all() {
    setup_environment
    setup_build_packages
    setup_run_packages
    setup_nbd_packages
    setup_registry_programs
    setup_missing shellcheck=shellcheck
    setup_rust
    setup_deny
    setup_fsx
    setup_say "$(cargo --version), $(rustc --version), cargo-deny in $cache/tools/bin"
}
