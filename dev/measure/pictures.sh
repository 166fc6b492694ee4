#!/usr/bin/env bash
# Makes the pictures of the README, dev/pictures/loss.svg and memory.svg; loss.svg shows the runs of dev/measure/quality.sh
# with L=12.  usage: dev/measure/pictures.sh TEXT     (about 25 minutes on two cores; needs matplotlib)
[ -r "$1" ] || { echo "usage: dev/measure/pictures.sh TEXT" >&2; exit 2; }
text=$(realpath "$1")
cd "$(dirname "$0")/../.." && make -s train_rev_gpt2 || exit 1
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT
mkdir -p dev/pictures && python3 dev/measure/plot.py memory --out dev/pictures/memory.svg || exit 1
python3 prepro_owt.py --text "$text" --tokenizer byte --val last:10% --out "$out" >/dev/null || exit 1
while read -r mode h; do
    ./train_rev_gpt2 -i "$out/train_000000.bin" -j "$out/val_000000.bin" -o "$out/$mode" -e d6 --layers 12 --channels 128 --heads 4 --context 64 -b 16 \
        -x 1000 -l 1e-3 -u 100 -q 0.1 -c 0.1 --beta2 0.99 --shuffle -v 100 -m 1000 --mode $mode ${h:+--step-size $h} >/dev/null || exit 1
done <<'RUNS'
baseline
midpoint 0.25
midpoint-a 1
leapfrog 0.3
hamiltonian 1
RUNS
python3 dev/measure/plot.py loss "$out"/{baseline,midpoint,midpoint-a,leapfrog,hamiltonian} --out dev/pictures/loss.svg \
    --title "The reversible networks learn no worse than the ordinary one" \
    --note "L = 12, C = 128, a token is a byte of the text; lines with markers: validation, faint: training, smoothed"
