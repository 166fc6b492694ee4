#!/usr/bin/env bash
# Do the reversible networks learn as well as the ordinary one? 1000 steps on the bytes of a text, its last tenth held
# out: validation loss in nats a byte.  usage: [SEED=1] dev/measure/quality.sh TEXT     (about 25 minutes on two cores)
[ -r "$1" ] || { echo "usage: dev/measure/quality.sh TEXT" >&2; exit 2; }
text=$(realpath "$1")
cd "$(dirname "$0")/../.." && make -s train_rev_gpt2 || exit 1
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT
python3 prepro_owt.py --text "$text" --tokenizer byte --val last:10% --out "$out" >/dev/null || exit 1
printf '%-12s %4s %6s  %s\n' mode L h 'validation loss'
while read -r L mode h; do
    ./train_rev_gpt2 -i "$out/train_000000.bin" -j "$out/val_000000.bin" -e d6 --layers $L --channels 128 --heads 4 --context 64 -b 16 \
        -x 1000 -l 1e-3 -u 100 -q 0.1 -c 0.1 --beta2 0.99 --shuffle -v 1000 -m 1000 --mode $mode ${h:+--step-size $h} --seed ${SEED:-1337} >"$out/log" || exit 1
    printf '%-12s %4d %6s  %s\n' $mode $L "${h:--}" "$(sed -n 's/.*validation loss //p' "$out/log" | tail -n 1)"
done <<'RUNS'
6 baseline
6 midpoint 0.25
6 midpoint 0.5
6 leapfrog 0.5
6 leapfrog 1
6 hamiltonian 1
6 midpoint-a 1
12 baseline
12 midpoint 0.25
12 leapfrog 0.3
12 hamiltonian 1
12 midpoint-a 1
RUNS
