#!/bin/sh
# Prints the drivers' own instructions per packet and direction, measured with callgrind (package valgrind).
# Usage: tests/examples/driver_cost.sh [frames]   (from the workspace's top folder)
set -eu
frames=${1:-100000}
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT
cargo build --quiet --profile bench --example driver_cost --package tests
binary=${CARGO_TARGET_DIR:-target}/release/examples/driver_cost
for direction in up down; do
    valgrind --tool=callgrind --callgrind-out-file="$out/$direction" \
        "$binary" "$direction" "$frames" >"$out/$direction.log" 2>&1
    # One line for each function and source file, with what was executed in it and not below it. What is not inlined of
    # the drivers has a name of theirs; the fake hypervisor is never inlined.
    callgrind_annotate --threshold=100 --auto=no --show-percs=no "$out/$direction" 2>/dev/null |
        tr -d , |
        awk -v frames="$frames" -v direction="$direction" '
            /FakeHypervisor|fake::/ { next }
            /:driver_cost::measured_|[:<]net(back|front)::|[:<]xen::(packet|page|ring|shared|netif)/ { own += $1 }
            END { printf "%-5s %6.1f instructions per packet\n", direction, own / frames }'
done
