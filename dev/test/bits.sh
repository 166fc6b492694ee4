#!/usr/bin/env bash
# Checksums of what a trainer computes, over its networks, policies and precisions: a change that claims to change nothing
# must leave every line as it was.
#   dev/test/bits.sh ./train_rev_gpt2 > before;  (change, make)  dev/test/bits.sh ./train_rev_gpt2 | diff before -
# Each line is of one short run: its flags, and a checksum over its model, its optimizer state and its log without the times.
set -u
if [ $# != 1 ] || [ ! -x "$1" ]; then
    echo "usage: dev/test/bits.sh PROGRAM, a trainer that can be run" >&2
    exit 2
fi
program=$(realpath "$1") failed=0
export LC_ALL=C OMP_WAIT_POLICY=passive
dir=$(mktemp -d) && cd "$dir" || exit 1
trap 'rm -rf "$dir"' EXIT
awk 'BEGIN { x = 1; for (i = 0; i < 6000; i++) { x = (x * 16807) % 2147483647; printf "%c", 97 + x % 13 } }' >train.txt
shape="-i train.txt -j train.txt -e d6 --layers 5 --channels 24 --heads 3 --context 70 -b 3 --chunk 2 --head-chunk 100 -x 3 -v 2 -m 1 -n 2"

run() {  # NAME FLAGS...: trains, prints its line
    local name=$1; shift
    if ! "$program" $shape "$@" -o "$name" >"$name.out" 2>&1; then
        echo "failed: $* ($(tail -n 1 "$name.out"))"
        failed=1
        return
    fi
    cut -d, -f1-5,8 "$name/log.csv" >"$name/log"
    echo "$(cat "$name/log" "$name"/model_*.bin "$name"/state_*.bin | sha256sum | cut -c1-16) $*"
}

count=0
every() {  # FLAGS...: under each policy; baseline has two
    local memory policies="store checkpoint reverse auto"
    case "$*" in *baseline*) policies="store checkpoint" ;; esac
    for memory in $policies; do run $((count += 1)) "$@" --memory $memory; done
}

for precision in float32 bf16; do
    run teacher_$precision --mode baseline --precision $precision
    for mode in baseline midpoint midpoint-a leapfrog hamiltonian; do every --mode $mode --precision $precision; done
    for conversion in "bdia --coefficient 0.25" "bdia --coefficient -0.0625 --stem 0" "retrofit --coefficient 1" \
        "retrofit --fixed-point 3 --coefficient -0.1875 --stem 1"; do
        every --mode $conversion --distill teacher_$precision/model_00000003.bin --precision $precision
    done
    run loss_$precision --mode bdia --distill teacher_$precision/model_00000003.bin --loss kl-teacher --precision $precision
    run mean_$precision --mode midpoint -d 420 --shuffle --save bf16 --precision $precision
    run float_$precision --mode leapfrog --stream float --precision $precision
done
exit $failed
