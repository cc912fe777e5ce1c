#!/usr/bin/env bash
# Instructions per lookup in the merged map, for 1 and for 32 layers with the same number of
# entries: counted by valgrind, so the same on every run and whatever else the machine does.
#
#   benches/instructions.sh
set -euo pipefail

cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/.."
lookups=1000000
bench=$(cargo bench --bench lookup --no-run 2>&1 | sed -n 's/.*(\(target[^)]*\)).*/\1/p')

count() {
    valgrind --tool=callgrind --callgrind-out-file=/dev/null "$bench" --count "$1" "$2" 2>&1 |
        sed -n 's/.*Collected : //p'
}

declare -A per_lookup
for layers in 1 32; do
    # Without lookups it still builds the map: that part is taken off.
    base=$(count "$layers" 0)
    all=$(count "$layers" "$lookups")
    per_lookup[$layers]=$(((all - base) * 1000 / lookups))
    echo "$layers layers: $((per_lookup[$layers] / 1000)).$((per_lookup[$layers] % 1000)) instructions"
done
awk -v a="${per_lookup[32]}" -v b="${per_lookup[1]}" 'BEGIN { printf "ratio %.4f\n", a / b }'
