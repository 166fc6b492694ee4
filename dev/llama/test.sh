#!/usr/bin/env bash
# What must hold of train_rev_llama, sample_rev_llama and eval_rev_llama as programs; `make llama` builds them, and
# ./train_rev_gpt2, if it is there, has to refuse their files. What must hold of the mathematics: test_rev_llama.
#   dev/llama/test.sh         the programs                dev/llama/test.sh ranks        the same bits from 1, 2 and 3 processes of MPI
here=$(cd "$(dirname "$0")/../.." && pwd) passed=0 failed=0
export LC_ALL=C OMP_WAIT_POLICY=passive
dir=$(mktemp -d) && cd "$dir" || exit 1
trap 'rm -rf "$dir"' EXIT
train=$here/train_rev_llama sample=$here/sample_rev_llama eval=$here/eval_rev_llama
awk 'BEGIN { x = 1; for (i = 0; i < 6000; i++) { x = (x * 16807) % 2147483647; printf "%c", 97 + x % 13 } }' >train.txt
shape="-e l135m --layers 5 --channels 24 --heads 3 --context 70"
batch="-i train.txt -j train.txt -b 3 --chunk 2 --head-chunk 100 -x 3 -v 2 -m 1 -n 2"

check() {  # NAME CONDITION: a condition is a shell's status
    if [ "$2" = 0 ]; then passed=$((passed + 1)); else failed=$((failed + 1)); echo "FAILED: $1"; fi
}

# sum NAME FLAGS...: trains into a directory of that name; the checksum of its models, states and losses, which policies share
sum() {
    local name=$1; shift
    rm -rf "$name"
    "$train" $batch "$@" -o "$name" >"$name.out" 2>&1 || { echo "$name: $(tail -n 1 "$name.out")"; return; }
    cut -d, -f1-5 "$name/log.csv" >"$name/log"
    cat "$name/log" "$name"/model_*.bin "$name"/state_*.bin | sha256sum | cut -c1-16
}

# every FLAGS...: all policies, with 1 to 3 threads, give the same
every() {
    local memory threads=1 first="" now policies="store checkpoint reverse auto"
    case "$*" in *baseline*) policies="store checkpoint" ;; esac
    for memory in $policies; do
        threads=$((threads % 3 + 1))
        now=$(OMP_NUM_THREADS=$threads sum same $shape "$@" --memory $memory)
        first=${first:-$now}
        [ "$now" = "$first" ] && [ ${#now} = 16 ]
        check "$* --memory $memory, $threads threads: $now, not $first" $?
    done
}

policies() {
    local precision mode precisions="float32 bf16"
    ! "$train" $shape --plan --precision bf16 2>&1 | grep -q 'no products in bf16' || precisions=float32  # which it would be again
    for precision in $precisions; do
        sum teacher $shape --mode baseline --precision $precision >/dev/null
        for mode in baseline midpoint midpoint-a leapfrog hamiltonian; do every --mode $mode --precision $precision; done
        for mode in "bdia --coefficient 0.25" "retrofit --fixed-point 3 --coefficient -0.1875 --stem 1"; do
            every --mode $mode --distill teacher/model_00000003.bin --precision $precision
        done
    done
    local narrow="--layers 4 --channels 24 --context 70"
    shape="-e l135m $narrow --heads 6 --key-heads 3 --ffn 37" every --mode midpoint --slice 23 --group 3
    shape="-e l135m $narrow --heads 6 --key-heads 2" every --mode hamiltonian --slice 23 --group 1
    shape="-e l360m $narrow --heads 12 --key-heads 4" every --mode bdia --slice 50 --group 2 -d 420 --shuffle --save bf16
    shape="-e l1100m $narrow --heads 4" every --mode retrofit --slice 23
}

resume() {  # a run that is stopped goes on to the same bytes, and a converted model is a model like others
    sum whole $shape --mode midpoint-a -s 1 -g 8 >/dev/null
    cp -r whole parts && rm parts/*3.bin parts/log
    "$train" $batch $shape -s 1 -g 8 --mode midpoint-a -o parts -y 1 >parts.out 2>&1
    cmp -s whole/model_00000003.bin parts/model_00000003.bin && cmp -s whole/state_00000003.bin parts/state_00000003.bin
    check "resume: $(tail -n 1 parts.out)" $?
    [ "$(od -An -td4 -j4 -N4 whole/model_00000003.bin | tr -d ' ')" = 1003 ]
    check "version of midpoint-a's file" $?
    sum base $shape --mode baseline --save bf16 >/dev/null
    [ "$(od -An -td4 -j4 -N4 base/model_00000003.bin | tr -d ' ')" = 1005 ]
    check "version of a baseline's file" $?
    "$train" $batch -e base/model_00000003.bin --mode bdia -o converted >converted.out 2>&1
    check "a baseline's file converted: $(tail -n 1 converted.out)" $?
}

uses() {  # text, tokens and losses
    local greedy bytes
    sum run $shape --mode hamiltonian >/dev/null
    greedy=$("$sample" -e run/model_00000003.bin --prompt "$(head -c 20 train.txt)" --temperature 0 -g 12 2>/dev/null)
    bytes=$("$sample" -e run/model_00000003.bin -i train.txt -t 20 --temperature 0 -g 12 2>/dev/null)
    [ "$greedy" = "$bytes" ] && [ ${#greedy} -gt 20 ]
    check "a prompt from a file: $bytes, not $greedy" $?
    "$sample" -e run/model_00000003.bin -i train.txt -b 2 --logits out.npy >/dev/null 2>&1 && [ "$(wc -c <out.npy)" = $((128 + 4*2*70*256)) ]
    check "logits" $?
    "$eval" -e run/model_00000003.bin -j train.txt -b 3 --chunk 2 --head-chunk 100 -m 1 >eval.out 2>&1 &&
        grep -q "validation loss $(awk -F, '$2 == "val" { loss = $3 } END { printf "%.4f", loss }' run/log.csv)," eval.out
    check "eval: $(cat eval.out)" $?
}

# wrong STATUS TEXT COMMAND...: it ends so, with one line that has the text
wrong() {
    local status=$1 text=$2; shift 2
    "$@" >wrong.out 2>wrong.err
    [ $? = "$status" ] && [ "$(wc -l <wrong.err)" = 1 ] && grep -q -e "$text" wrong.err
    check "$*: not status $status, $text: $(cat wrong.err)" $?
}

# spoilt SLOT VALUE TEXT: the model with another number in its header is refused
spoilt() {
    cp run/model_00000003.bin spoilt.bin
    printf "$(printf '\\x%02x\\x%02x\\x%02x\\x%02x' $(($2 & 255)) $(($2 >> 8 & 255)) $(($2 >> 16 & 255)) $(($2 >> 24 & 255)))" |
        dd of=spoilt.bin bs=1 seek=$((4 * $1)) conv=notrunc 2>/dev/null
    wrong 1 "$3" "$train" $batch -e spoilt.bin
}

bad_input() {
    local flags="$batch -e l135m --layers 2 --channels 24 --heads 3"
    wrong 2 "one of l135m" "$train" $batch -e l12
    wrong 2 "--key-heads 2: --heads 3 is no multiple" "$train" $flags --key-heads 2
    wrong 2 "--channels 24: no multiple of --heads 5" "$train" $batch -e l135m --channels 24 --heads 5
    wrong 2 "heads of 3 channels, an odd number" "$train" $batch -e l135m --channels 9 --heads 3
    wrong 2 "midpoint-a has at most 224" "$train" $flags --layers 225 --mode midpoint-a
    wrong 2 "keeps its sizes" "$train" $batch -e run/model_00000003.bin --ffn 5
    wrong 2 "keeps its sizes" "$train" $batch -e run/model_00000003.bin --key-heads 3
    sum other $shape --mode baseline --ffn 50 >/dev/null
    wrong 2 "a baseline of the model's sizes" "$train" $batch $shape --mode bdia --distill other/model_00000003.bin
    spoilt 1 3 "its version is 3"
    spoilt 8 0 "grid is 20; a baseline has none"
    spoilt 14 0 "blocks are of kind 0"
    spoilt 14 2 "blocks are of kind 2"
    spoilt 240 2 "cannot be shared by 2 key heads"
    spoilt 240 0 "number of key heads is 0"
    spoilt 241 0 "width of the MLP is 0"
    spoilt 241 63 "what its header describes"
    spoilt 242 0 "rotary base is 0"
    spoilt 243 $((0x7FC00000)) "epsilon is nan"
    spoilt 244 2 "head tied to the embedding is 2"
    spoilt 244 0 "what its header describes"
    spoilt 245 16 "heads have 16 channels each"
    [ -x "$here/train_rev_gpt2" ] || return
    wrong 1 "blocks are of kind 1" "$here/train_rev_gpt2" -i train.txt -e run/model_00000003.bin
    "$here/train_rev_gpt2" $batch -e d6 --layers 2 --channels 24 --heads 3 --context 70 -o gpt2 >/dev/null 2>&1
    wrong 1 "blocks are of kind 0" "$train" $batch -e gpt2/model_00000003.bin
    wrong 1 "blocks are of kind 0" "$sample" -e gpt2/model_00000003.bin --prompt a
    wrong 1 "blocks are of kind 0" "$eval" -e gpt2/model_00000003.bin -j train.txt
}

ranks() {
    local mpirun one many n
    command -v mpicc >/dev/null || { echo "no MPI here: left out"; check "" 0; return; }
    cp -r "$here" tree && make -s -C tree -B train_rev_llama MPI=1 >make.out 2>&1
    check "make MPI=1: $(tail -n 1 make.out)" $?
    mpirun="mpirun --oversubscribe --allow-run-as-root"
    mpirun --version 2>/dev/null | grep -q "Open MPI" || mpirun=mpirun
    for mode in "baseline" "midpoint-a" "bdia"; do
        one=$(train=$dir/tree/train_rev_llama; sum one $shape --mode $mode -d 840 --lanes 4)
        for n in 2 3; do
            rm -rf many
            OMP_NUM_THREADS=1 $mpirun -n $n tree/train_rev_llama $batch $shape --mode $mode -d 840 --lanes 4 -o many >many.out 2>&1
            many=$(cut -d, -f1-5 many/log.csv | cat - many/model_*.bin many/state_*.bin | sha256sum | cut -c1-16)
            [ "$one" = "$many" ]
            check "$mode: $n ranks: $many, not $one" $?
        done
    done
}

if [ "$1" = ranks ]; then ranks
else
    policies
    resume
    uses
    bad_input
fi
echo "$passed passed, $failed failed"
[ $failed = 0 ]
