# shellcheck shell=bash disable=SC2154 # tools/vm sets the rest
# Sourced by tools/vm: the host's packages, and the kernels.
#
# A kernel in the cache is a folder kernels/NAME_VERSION with
#   release             what uname -r will say
#   vmlinux             uncompressed (QEMU enters it directly, through PVH)
#   lib/modules/RELEASE uncompressed modules, indexed by depmod
# and a link V -> kernels/NAME_VERSION for each value V of --kernel in use.
# Package names with their versions change weekly: they are read from apt's
# metadata, never written here.

updated=
update_host_lists() { # once per call of the script
    [ -z "$updated" ] || return 0
    updated=1
    local try
    for try in 1 2 3 4 5 6; do
        # Someone else holding apt's lock is the usual reason to fail.
        if apt-get -qq update >&2; then return 0; fi
        [ "$try" = 6 ] || sleep 5
    done
    die "apt-get update failed"
}

install_missing() {
    local want=()
    [ -n "$(type -P qemu-system-x86_64)" ] || want+=(qemu-system-x86)
    [ -x "$virtiofsd" ] || want+=(qemu-system-common)
    [ -n "$(type -P modprobe)" ] || want+=(kmod)
    [ -n "$(type -P zstd)" ] || want+=(zstd)
    [ -n "$(type -P xz)" ] || want+=(xz-utils)
    # The initrd holds nothing but busybox: it must be the static one.
    if [ -z "$(type -P busybox)" ] || ldd "$(type -P busybox)" >/dev/null 2>&1; then
        want+=(busybox-static)
    fi
    [ ${#want[@]} -gt 0 ] || return 0
    (
        flock 9 # two calls at once must not both run apt
        update_host_lists
        say "installing ${want[*]}"
        DEBIAN_FRONTEND=noninteractive apt-get -qq install -y --no-install-recommends \
            -o DPkg::Lock::Timeout=300 "${want[@]}" >&2 || die "cannot install ${want[*]}"
    ) 9>"$cache/lock"
    hash -r
    [ -x "$virtiofsd" ] || die "$virtiofsd is missing: not a Debian 12 host?"
}

# Sets kdir, filling the cache if need be, and holds a shared lock on it, so
# that a --refresh elsewhere does not remove it under a running VM.
pick_kernel() {
    if [ -n "$refresh" ] || [ ! -e "$cache/$kernel" ]; then
        (
            flock 9
            # Another call may have filled it while this one waited.
            if [ -n "$refresh" ] || [ ! -e "$cache/$kernel" ]; then fetch_kernel; fi
        ) 9>"$cache/lock"
    fi
    kdir=$(realpath -- "$cache/$kernel")
    exec {kernel_lock}<"$kdir/release"
    flock -s "$kernel_lock"
    [ -e "$kdir/release" ] || die "the cached kernel was replaced just now: try again"
}

fetch_kernel() {
    local apt=() where packages name version tmp target old
    update_host_lists
    if [ "$kernel" = 6.12 ]; then
        where="the host's own suites"
    else
        where="stable-backports, testing and unstable"
        use_newer_suites
    fi
    read -r name version < <(newest_image) || true
    [ -n "${name-}" ] ||
        die "no linux-image-$kernel.*-cloud-amd64 nor -amd64 package: searched $where"

    target=kernels/${name}_$version
    if [ ! -e "$cache/$target/release" ]; then
        say "fetching $name $version"
        mkdir -p "$cache/kernels"
        tmp=$(mktemp -d "$cache/kernels/new.XXXXXX")
        # shellcheck disable=SC2064 # this very folder
        trap "rm -rf '$tmp'" EXIT
        mapfile -t packages < <(with_dependencies "$name" "$version")
        (cd "$tmp" && apt-get "${apt[@]}" -qq -o APT::Sandbox::User=root download "${packages[@]}" >&2) ||
            die "cannot download ${packages[*]}"
        unpack_kernel "$tmp" "${name#linux-image-}"
        chmod 755 "$tmp"
        rm -rf "${cache:?}/$target"
        mv -T "$tmp" "$cache/$target"
    fi
    ln -sfn "$target" "$cache/$kernel.new"
    mv -T "$cache/$kernel.new" "$cache/$kernel"

    # Drop what no link leads to and no VM uses.
    for old in "$cache"/kernels/*; do
        [ -z "$(find "$cache" -maxdepth 1 -type l -lname "kernels/${old##*/}")" ] || continue
        [ -e "$old/release" ] || { rm -rf "$old"; continue; }
        flock -n "$old/release" rm -rf "$old" || true
    done
}

# A private apt: own sources, lists and caches, so that the host's apt never
# hears of suites it must not install from. The mirror is the one the host
# gets Debian from; every list is verified against Debian's keys.
use_newer_suites() {
    local dir=$cache/apt mirror keyring=/usr/share/keyrings/debian-archive-keyring.gpg
    # Not awk '{...; exit}': apt-get would die of a closed pipe.
    mirror=$(apt-get indextargets --format "\$(LABEL)|\$(SUITE)|\$(REPO_URI)" "Created-By: Packages" |
        awk -F'|' '$1 == "Debian" && $2 !~ /-/ && !n++ { print $3 }')
    [ -n "$mirror" ] || die "the host's apt knows no Debian archive: where should a newer kernel come from?"
    mkdir -p "$dir/lists/partial" "$dir/cache/archives/partial"
    apt=(
        -o "Dir::State::lists=$dir/lists" -o Dir::State::status=/dev/null
        -o "Dir::Cache=$dir/cache" -o "Dir::Etc::sourcelist=$dir/newer.sources"
        -o Dir::Etc::sourceparts=/dev/null -o Dir::Etc::preferences=/dev/null
        -o Dir::Etc::preferencesparts=/dev/null -o APT::Sandbox::User=root
        -o Acquire::Languages=none -o Acquire::IndexTargets::deb::DEP-11::DefaultEnabled=false
    )
    write_sources() {
        printf '%s\n' "Types: deb" "URIs: $mirror" "Suites: stable-backports testing unstable" \
            "Components: main" "Architectures: amd64" "Signed-By: $keyring" >"$dir/newer.sources"
    }
    write_sources
    say "reading the package lists of stable-backports, testing and unstable"
    if apt-get "${apt[@]}" -qq --error-on=any update 2>"$dir/update.log" >&2; then return 0; fi
    # The newer archive's keys may be younger than the installed keyring. The
    # keyring package of the host's own suites carries them early, and comes
    # verified by keys the host already trusts. It is unpacked, not installed.
    if grep -q NO_PUBKEY "$dir/update.log"; then
        say "the newer suites are signed with keys this host lacks: reading them from its own debian-archive-keyring package"
        rm -rf "$dir/keyring" && mkdir "$dir/keyring"
        (cd "$dir/keyring" && apt-get -qq -o APT::Sandbox::User=root download debian-archive-keyring >&2 &&
            dpkg-deb -x debian-archive-keyring_*.deb .) || die "cannot get debian-archive-keyring"
        keyring=$dir/keyring/usr/share/keyrings/debian-archive-keyring.gpg
        [ -e "$keyring" ] || keyring=${keyring%.gpg}.pgp
        write_sources
        if apt-get "${apt[@]}" -qq --error-on=any update 2>"$dir/update.log" >&2; then return 0; fi
    fi
    cat "$dir/update.log" >&2
    die "cannot read or verify stable-backports, testing and unstable"
}

# Prints "NAME VERSION" of the newest image of series $kernel that $apt knows.
newest_image() {
    local flavour names series=${kernel//./\\.}
    for flavour in cloud-amd64 amd64; do
        mapfile -t names < <(apt-cache "${apt[@]}" pkgnames "linux-image-$kernel" |
            grep -E "^linux-image-$series\.[^-]+-$flavour\$")
        [ ${#names[@]} -gt 0 ] || continue
        # Names that others only refer to have no version to show.
        apt-cache "${apt[@]}" show --no-all-versions "${names[@]}" 2>/dev/null |
            awk '$1 == "Package:" { p = $2 } $1 == "Version:" { print p, $2 }' |
            sort -k2V | tail -n 1 | grep . && return
    done
}

# Prints NAME=VERSION of the image and of the packages of the same release it
# depends on: kernels up to 6.12 are one package, newer ones are split.
with_dependencies() {
    local release=${1#linux-image-}
    printf '%s=%s\n' "$1" "$2"
    apt-cache "${apt[@]}" show "$1=$2" | sed -n 's/^Depends: //p' | tr ',' '\n' |
        grep -oE "linux-[a-z]+-${release//+/\\+} \(= [^)]+\)" | sed -E 's/ \(= (.*)\)/=\1/' | sort -u
}

# Turns the .debs in folder $1 into what the head of this file describes.
unpack_kernel() {
    local dir=$1 release=$2 deb image
    for deb in "$dir"/*.deb; do dpkg-deb -x "$deb" "$dir/x"; done
    mkdir -p "$dir/lib/modules"
    for image in "$dir/x/lib/modules/$release" "$dir/x/usr/lib/modules/$release"; do
        [ ! -d "$image" ] || mv "$image" "$dir/lib/modules/"
    done
    image=$dir/x/boot/vmlinuz-$release
    [ -e "$image" ] || image=$dir/lib/modules/$release/vmlinuz
    [ -e "$image" ] || die "no vmlinuz in the packages of $release: their layout changed"
    # Unpacking here saves the emulator about two seconds at every boot.
    vmlinux "$image" >"$dir/vmlinux" || cp "$image" "$dir/vmlinux"
    # And compressed modules would be unpacked by the emulator too.
    find "$dir/lib" -name '*.ko.xz' -print0 | xargs -0r -n 100 -P "$(nproc)" xz -d
    find "$dir/lib" -name '*.ko.zst' -print0 | xargs -0r -n 100 -P "$(nproc)" zstd -dq --rm
    depmod -b "$dir" "$release"
    rm -rf "$dir"/x "$dir"/*.deb "$dir/lib/modules/$release/vmlinuz"
    echo "$release" >"$dir/release"
}

# Prints the ELF kernel inside a bzImage, found by the fields of its header
# (boot protocol 2.08: setup_sects, payload_offset, payload_length; the last
# four bytes of the payload are its uncompressed size).
vmlinux() {
    local unpack
    payload() {
        perl -e 'open my $f, "<:raw", $ARGV[0] or exit 1; local $/; my $d = <$f>;
            my ($off, $len) = unpack "VV", substr $d, 0x248, 8;
            binmode STDOUT;
            print substr $d, (1 + ord substr $d, 0x1f1, 1) * 512 + $off, $len - 4' "$1"
    }
    case $(payload "$1" | od -An -tx1 -N4 | tr -d ' ') in
    28b52ffd) unpack="zstd -dcq" ;;
    fd377a58) unpack="xz -dc" ;;
    1f8b*) unpack="gzip -dc" ;;
    *) return 1 ;;
    esac
    payload "$1" | $unpack
}
