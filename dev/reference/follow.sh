#!/usr/bin/env bash
# Does GPT-2 124M train here as it trains in PyTorch? Each network for three steps from the same file and batches.
# usage: dev/reference/follow.sh TOKENS    (GPT-2 tokens from prepro_owt.py; 10 GB of disk, 10 minutes on two cores)
[ -r "$1" ] || { echo "usage: dev/reference/follow.sh TOKENS" >&2; exit 2; }
tokens=$(realpath "$1")
cd "$(dirname "$0")/../.." && make -s train_rev_gpt2 || exit 1
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT
for mode in baseline midpoint midpoint-a leapfrog hamiltonian; do
    ./train_rev_gpt2 -i "$tokens" -e d12 -b 4 -t 256 -x 0 --mode $mode -o "$out/start" >/dev/null &&
    ./train_rev_gpt2 -i "$tokens" -e "$out/start/model_00000000.bin" -b 4 -t 256 -x 3 -o "$out/run" >/dev/null || exit 1
    echo "== $mode"
    python3 dev/reference/reference.py train --model "$out/start/model_00000000.bin" --tokens "$tokens" -b 4 -t 256 -x 3 \
        -l 6e-4 -u 0 -q 0.1 -c 0.1 --log "$out/run/log.csv" --tolerance 1e-3 || failed=1
    rm -rf "$out/start" "$out/run"
done
exit ${failed:-0}
