#!/usr/bin/env bash
# How far from the true embedding is the one reconstructed at the bottom of the network? Relative error in one
# training step from scratch, floating-point streams beside integer ones, by depth.  usage: dev/drift.sh
cd "$(dirname "$0")/.." && make -s train_rev_gpt2 || exit 1
text=$(mktemp --suffix=.txt) out=$(mktemp -d)
cp train_rev_gpt2.c "$text"
printf '%-12s %4s  %12s %12s %12s\n' mode L float fixed 'loss'
for mode in midpoint midpoint-a leapfrog hamiltonian; do
    for L in 12 48 96; do
        for stream in float fixed; do
            rm -rf "$out"
            ./train_rev_gpt2 -i "$text" -e d6 --layers $L --channels 128 --heads 4 --context 64 -b 4 -x 1 -v 0 \
                --mode $mode --stream $stream -o "$out" >"$text.log" || { cat "$text.log"; exit 1; }
            declare $stream="$(awk -F, 'NR == 2 {print $8}' "$out/log.csv")" loss="$(awk -F, 'NR == 2 {print $3}' "$out/log.csv")"
        done
        printf '%-12s %4d  %12s %12s %12s\n' $mode $L "$float" "$fixed" "$loss"
    done
done
rm -rf "$text" "$text.log" "$out"
