#!/usr/bin/env bash
# How far from the true embedding is the one reconstructed at the bottom of the network? Relative error in one
# training step from scratch, floating-point streams beside integer ones, by depth.  usage: dev/measure/drift.sh
cd "$(dirname "$0")/../.." && make -s train_rev_gpt2 || exit 1
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT
seq 20000 >"$out/numbers.txt"
printf '%-12s %4s  %12s %12s %12s\n' mode L float fixed 'loss'
for mode in midpoint midpoint-a leapfrog hamiltonian; do
    for L in 12 48 96; do
        for stream in float fixed; do
            rm -rf "$out/run"
            ./train_rev_gpt2 -i "$out/numbers.txt" -e d6 --layers $L --channels 128 --heads 4 --context 64 -b 4 -x 1 -v 0 \
                --mode $mode --stream $stream -o "$out/run" >"$out/log" || exit 1
            declare $stream="$(awk -F, 'NR == 2 {print $8}' "$out/run/log.csv")" loss="$(awk -F, 'NR == 2 {print $3}' "$out/run/log.csv")"
        done
        printf '%-12s %4d  %12s %12s %12s\n' $mode $L "$float" "$fixed" "$loss"
    done
done
