#!/usr/bin/env bash
# How much two trainings started at once slow each other down: tokens/s of the median step, alone and beside the other.
#
#     dev/bench/two.sh                 a small network on as many cores as there are; let nothing else run
#     OMP_WAIT_POLICY=active dev/bench/two.sh    the same, had threads that wait not been told to sleep
#
# It trains on its own repository's text with ./train_rev_gpt2, or the trainer that is given.
cd "$(dirname "$0")/../.." || exit 1
trainer=${1:-./train_rev_gpt2} dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cat README.md ./*.c >"$dir/text.txt"

train() {
    "$trainer" -i "$dir/text.txt" --layers 6 --channels 128 --heads 4 --context 128 -b 8 -t 128 -x 60 -v 0 |
        sed -n 's/.*| *\([0-9]*\) tokens\/s.*/\1/p' | sort -n | awk '{a[NR] = $1} END {print a[int((NR + 1) / 2)]}'
}
for round in 1 2 3; do
    alone=$(train)
    train >"$dir/other" & one=$(train)
    wait
    awk -v a="$alone" -v b="$one" -v c="$(cat "$dir/other")" 'BEGIN {
        if (!a || !b || !c) exit 1
        printf "alone %d tokens/s; two at once %d and %d, %.2f and %.2f of it\n", a, b, c, b / a, c / a}' || exit 1
done
