#!/usr/bin/env bash
# The part of tools/quickstart that needs a kernel with ublk: it runs on the host or in the virtual
# machine, with obd-ublk on PATH.
set -euo pipefail

# Relative paths in the image's config are taken from the current directory.
cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/../../tests/fixtures/golden"
config=ext4-3layers/config.3.json

say() { printf 'quickstart: %s\n' "$*"; }

device='' mounted=''
folder=$(mktemp -d)
# shellcheck disable=SC2317 # called by the trap
cleanup() {
    local status=$?
    trap - EXIT
    set +e
    [ -z "$mounted" ] || umount "$folder"
    [ -z "$device" ] || obd-ublk detach "$device"
    rmdir "$folder"
    [ "$status" = 0 ] || say "FAILED (exit status $status)" >&2
    exit "$status"
}
trap cleanup EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

say "kernel $(uname -r), $(obd-ublk version)"
device=$(obd-ublk attach "$config")
say "attached $config as $device"
if [ ! -b "$device" ]; then
    say "$device is no block device" >&2
    exit 1
fi
obd-ublk list

mount -t ext4 -o ro "$device" "$folder"
mounted=1
say "mounted read-only; $(find "$folder" -xdev -type f | wc -l) files, in /:"
ls -l "$folder"

# The digests come from the tree that the image was made of.
digests=$(sed -nE 's|^ *"(/[^"]+)": "([0-9a-f]{64})",?$|\2  .\1|p' manifest.json)
(cd "$folder" && sha256sum --check --quiet --strict <<<"$digests")
say "$(wc -l <<<"$digests") files have the content they were made with"

say "random 4 KiB reads for 3 s, 32 at a time:"
figures=$(fio --name=quickstart --filename="$device" --readonly --rw=randread --bs=4k --direct=1 \
    --ioengine=libaio --iodepth=32 --time_based --runtime=3)
grep -E '^ +(read: |lat .*min=)' <<<"$figures"

umount "$folder"
mounted=''

left=$device
obd-ublk detach "$device"
device=''
if [ -e "$left" ]; then
    say "$left is still there" >&2
    exit 1
fi
say "detached $left; nothing is left"
