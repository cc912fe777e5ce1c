# shellcheck shell=bash disable=SC2034,SC2154,SC2164,SC2317 # sourced by suite.sh, under set -e
#
# Layers that are made: an image from nothing, as README.md tells it. Needs what suite.sh defines.

# tree FOLDER: every file with its digest, every name with its mode.
tree() {
    (cd "$1" && find . -path ./lost+found -prune -o -type f -print0 | sort -z | xargs -0 sha256sum &&
        find . -path ./lost+found -prune -o -printf '%M %p %l\n' | sort)
}

# fill CONFIG SOURCE: copies what is in SOURCE onto the disk and lets it go.
fill() {
    local dev
    dev=$(obd-ublk attach --mount /mnt/make "$1")
    cp -a "$2/." /mnt/make/
    obd-ublk detach --unmount "$dev"
}

# read_only_tree IMAGE: what is on it, attached for reading.
read_only_tree() {
    local dev
    dev=$(obd-ublk attach --read-only --mount /mnt/make "$1")
    tree /mnt/make
    obd-ublk detach --unmount "$dev"
}

an_image_is_made_from_nothing() {
    local config dev before
    rm -rf /tmp/make
    mkdir -p /tmp/make/one /tmp/make/two/late /mnt/make
    cp -r "$folder/cases/stack8" "$folder/cases/rw-append" /tmp/make/one/
    ln -s stack8 /tmp/make/one/link
    seq 100000 >/tmp/make/two/numbers
    cp -r "$folder/cases/stack3" /tmp/make/two/late/

    config=$(obd-ublk create /tmp/make/base --size 128M)
    dev=$(obd-ublk attach "$config")
    mkfs.ext4 -q "$dev"
    obd-ublk detach "$dev"
    fill "$config" /tmp/make/one
    before=$(sha256sum <"/tmp/make/base/writable_data")
    obd-ublk commit -z --algorithm zstd "$config" /tmp/make/layer1
    [ "$(sha256sum <"/tmp/make/base/writable_data")" = "$before" ] || fail "commit wrote to its source"
    obd-ublk verify /tmp/make/layer1
    read_only_tree /tmp/make/layer1 >/tmp/make/first
    diff <(tree /tmp/make/one) /tmp/make/first

    config=$(obd-ublk create /tmp/make/change --on /tmp/make/layer1)
    fill "$config" /tmp/make/two
    dev=$(obd-ublk attach "$config")
    expect_status 12 obd-ublk commit -z "$config" /tmp/make/layer2
    [ ! -e /tmp/make/layer2 ] || fail "a layer of a disk in use"
    obd-ublk detach "$dev"
    obd-ublk commit -z --algorithm zstd "$config" /tmp/make/layer2

    cat >/tmp/make/image.json <<END
{"lowers": [{"file": "/tmp/make/layer1"}, {"file": "/tmp/make/layer2"}]}
END
    cp -a /tmp/make/two/. /tmp/make/one/
    read_only_tree /tmp/make/image.json >/tmp/make/second
    diff <(tree /tmp/make/one) /tmp/make/second
    # The first layer is what it was.
    read_only_tree /tmp/make/layer1 | diff /tmp/make/first -

    obd-ublk merge /tmp/make/image.json /tmp/make/merged
    obd-ublk diff /tmp/make/image.json /tmp/make/merged >/tmp/make/difference
    [ ! -s /tmp/make/difference ] || fail "the merged layer differs: $(head -3 /tmp/make/difference)"
    read_only_tree /tmp/make/merged | diff /tmp/make/second -
    obd-ublk export /tmp/make/merged -o /tmp/make/raw
    fsck.ext4 -fn /tmp/make/raw
    ls -l /tmp/make/layer1 /tmp/make/layer2 /tmp/make/merged >&3
    nothing_left
    rm -rf /tmp/make
}

make_smoke=(an_image_is_made_from_nothing)
