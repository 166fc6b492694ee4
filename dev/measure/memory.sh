#!/usr/bin/env bash
# Does memory depend on depth, and is the plan true? Peak resident memory of one training step, less what the plan
# gives to parameters, gradients and optimizer, beside the planned rest.
# usage: dev/measure/memory.sh depth      C=256, 64 sequences of 512 tokens, L = 12 to 96, reverse
#        dev/measure/memory.sh policies   GPT-2 124M, 8 sequences of 512 tokens, each policy
cd "$(dirname "$0")/../.." && make -s train_rev_gpt2 || exit 1
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT
data=$out/numbers
seq 20000 >"$data.txt"

row() {  # NAME FLAGS...: one line of the table
    local name=$1; shift
    rm -rf "$out/run"
    ./train_rev_gpt2 "$@" -x 1 -v 0 -o "$out/run" >"$out/log" || exit 1
    awk -F, 'FNR == NR {if (FNR == 2) peak = $9; next} {split($0, f, " "); plan[f[1]] = f[2]}
        END {rest = plan["parameters"] + plan["gradients"] + plan["optimizer"]; M = 1048576
             printf "%-22s %10.1f %12.1f %12.1f %12.1f\n", name, peak / M, rest / M, (peak - rest) / M, (plan["total"] - rest) / M}' \
        name="$name" "$out/run/log.csv" "$out/log"
}

printf '%-22s %10s %12s %12s %12s\n' MiB peak 'weights etc.' measured planned
case $1 in
depth) for L in 12 24 48 96; do
        row "midpoint reverse L=$L" -i "$data.txt" -e d6 --layers $L --channels 256 --heads 4 --context 512 -b 64 --mode midpoint
    done ;;
policies)
    python3 - "$data" <<'PY' || exit 1
import random, struct, sys  # any tokens will do
tokens = [random.randrange(50257) for _ in range(5000)]
open(sys.argv[1] + ".bin", "wb").write(struct.pack("<256i", 20240520, 1, len(tokens), *[0] * 253) + struct.pack("<5000H", *tokens))
PY
    row "baseline store" -i "$data.bin" -e d12 -b 8 -t 512 --mode baseline
    row "baseline checkpoint" -i "$data.bin" -e d12 -b 8 -t 512 --mode baseline --memory checkpoint
    for memory in store checkpoint reverse; do
        row "midpoint $memory" -i "$data.bin" -e d12 -b 8 -t 512 --mode midpoint --memory $memory
    done ;;
*) echo "usage: dev/measure/memory.sh depth|policies" >&2; exit 2 ;;
esac
