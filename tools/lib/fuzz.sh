#!/usr/bin/env bash
# The fuzz step of tools/test: every target of tests/fuzz for a short while. tests/fuzz/run knows
# the targets, builds them with the stable compiler and fails on the first finding.
set -euo pipefail

run=$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/../../tests/fuzz/run
if [ ! -x "$run" ]; then
    echo "fuzz: tests/fuzz/run is missing" >&2
    exit 1
fi
exec "$run" --ci
