#!/bin/sh
# What `make demo` does, with a C compiler, make and a shell alone: trains a byte-level GPT on this project's own text, a
# midpoint network that runs backwards; lets it write; and measures its memory beside that of the ordinary network.
# About two minutes on two cores, $DEMO_SECONDS (75) of them training.
# usage: dev/demo.sh TEXT     (TEXT ends in .txt; the folder demo is used for the rest)
[ -r "$1" ] || { echo "usage: dev/demo.sh TEXT" >&2; exit 2; }
command -v awk >/dev/null || { echo "dev/demo.sh needs awk" >&2; exit 1; }
text=$(cd "$(dirname "$1")" && pwd)/$(basename "$1")
cd "$(dirname "$0")/.." && make -s train_rev_gpt2 sample_rev_gpt2 && mkdir -p demo || exit 1
out=demo seconds=${DEMO_SECONDS:-75}
net='-e d6 --channels 128 --heads 4 --context 64'
learn='-b 16 -l 2e-3 -u 50 --beta2 0.99 --shuffle'
rm -rf "$out/run" "$out/probe"

# one step of a network of L layers, the rest of the flags as given: its peak memory, less weights, gradients and moments
measure() {
    layers=$1; shift
    ./train_rev_gpt2 -i "$text" $net --layers $layers -x 1 -o "$out/probe" "$@" >"$out/probe.log" || exit 1
    awk -F, 'FNR == NR {if (FNR == 2) peak = $9; next} {split($0, f, " "); plan[f[1]] = f[2]}
        END {printf "%8.1f", (peak - plan["parameters"] - plan["gradients"] - plan["optimizer"]) / 1048576}' "$out/probe/log.csv" "$out/probe.log"
    rm -rf "$out/probe"
}
row() {
    name=$1; shift
    shallow=$(measure 6 "$@") && deep=$(measure 48 "$@") || exit 1
    printf '%-54s %s MiB %s MiB\n' "$name" "$shallow" "$deep"
}

# how many steps are $seconds: the mean of some, after the first ones
./train_rev_gpt2 -i "$text" $net --layers 6 $learn -x 12 -o "$out/probe" >"$out/probe.log" || exit 1
steps=$(awk -F, -v seconds=$seconds 'NR > 5 {ms += $6; n++} END {printf "%d", seconds * 1000 * n / ms}' "$out/probe/log.csv")
rm -rf "$out/probe"

echo "Training on $1: midpoint, 6 layers, --memory reverse, $steps steps. Every step checks that the streams, run"
echo 'backwards, are the embedding again: drift 0 means to the bit.'
./train_rev_gpt2 -i "$text" $net --layers 6 $learn -x $steps -o "$out/run" | while IFS= read -r line; do
    case $line in step*[05]0/*) echo "$line" ;; esac
done
model=$(ls "$out"/run/model_*.bin 2>/dev/null) || exit 1

echo
echo 'It writes:'
echo
for start in '// The ' '    for (int ' 'static void '; do
    ./sample_rev_gpt2 -e "$model" --prompt "$start" -g 50 --temperature 0.6 2>/dev/null || exit 1
done
echo
echo 'Activation memory of a step of 2048 tokens, measured just now: 6 layers as trained, and 48 like them'
row 'baseline --memory store'                    -b 32 --mode baseline --memory store
row 'baseline --memory checkpoint'               -b 32 --mode baseline --memory checkpoint
row 'baseline --memory store, 16 batches of 2'   -b 2 -d 2048 --mode baseline --memory store
row 'midpoint --memory reverse'                  -b 32 --mode midpoint --memory reverse
echo
echo 'The last one does not grow with depth. Small batches whose gradients are accumulated are the rival to beat:'
echo 'reversal pays in deep networks and long contexts. README.md says more; go on with'
echo "  ./sample_rev_gpt2 -e $model --prompt 'static int ' -g 50"
