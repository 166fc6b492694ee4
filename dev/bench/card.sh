#!/usr/bin/env bash
# The CUDA twin on a machine with a card, in nine minutes: is it right, how fast is it beside its peers,
# what does reversal cost, how much fits?
#
#     dev/bench/card.sh build [LLMC]   where nvcc is: programs for sm_90 into .gpu/; LLMC: a checkout of llm.c
#     dev/bench/card.sh run OUT        where the card is, with .gpu/: rows.csv, log.txt, table.txt and more in OUT
#     dev/bench/card.sh rehearse       without a card: every part with emulated programs and tiny shapes
#     dev/bench/card.sh train OUT TRAIN VAL    where the card is: five networks learn from token files, in about
#                                              three minutes; what each logs is in OUT, for dev/measure/plot.py loss
#
# `run` needs no network and no compiler, but Python; for peers and tools PyTorch, compute-sanitizer and ncu.
# Whatever fails or hangs is a row that says so, and the rest goes on. Exit status: 0 all that must be right
# is right, 1 not all, 2 usage.
set -u
folder=$(realpath -m "${2:-.}")
cd "$(dirname "$0")/../.." || exit 1

# Parts in order of worth: name, seconds at most, whether the exit status depends on it. What a part leaves of
# its time the later ones have.
PARTS=${PARTS:-"
    environment   8  must
    checks       20  must
    layers       35  must
    bits         20  must
    twins        15  must
    ranks        12  must
    ours         36  may
    peers        42  may
    attention    25  may
    price        36  may
    largest      70  may
    depth        65  may
    sanitizer    60  must
    ncu          40  may
    float32      20  must
    large        35  may"}
SECONDS_IN_ALL=${SECONDS_IN_ALL:-525}
BIN=${BIN:-.gpu}
PYTHON=${PYTHON:-python3}

# What is run; a rehearsal has all of it smaller
KERNELS=(matmul attention layernorm classifier adamw stream_step embed rmsnorm rotary swiglu)
MODES=(baseline midpoint midpoint-a leapfrog hamiltonian)
DEVICE=${DEVICE:-cuda}
VOCABULARY=${VOCABULARY:-50257} TOKENS=${TOKENS:-16777216}
MIB_AT_MOST=${MIB_AT_MOST:-81559}   # of the card's memory: what the paper's tables and ours are of
MIB_TO_SPARE=${MIB_TO_SPARE:-2560}  # of the card's memory: for the driver and the libraries
GPT2=${GPT2:--e d12} FEW_LAYERS=${FEW_LAYERS---layers 2} LENGTH=${LENGTH:-1024} STEPS=${STEPS:-12} BATCHES=${BATCHES:-8 16 32 64}
SHAPE_OF_TORCH=${SHAPE_OF_TORCH:-'"L":12,"C":768,"NH":12,"T":1024'}
LARGE_BATCHES=${LARGE_BATCHES:-256 1024} LARGER=${LARGER:--e d36 -b 8}
DEEP=${DEEP:--e d12 --layers 96 --channels 512 --heads 8 -b 16}
DEPTHS=${DEPTHS:-96 64 32 16} MOST_OF_DEPTHS=${MOST_OF_DEPTHS:-128}
WIDTH_OF_DEPTHS=${WIDTH_OF_DEPTHS---channels 512 --heads 8}
ATTENTION=${ATTENTION:-16 1024 12 64} SMALL_SHAPES=${SMALL_SHAPES:-}
TEST=${TEST:-layers} TEST_FP32=${TEST_FP32:-kernels}
BITS=${BITS:--e d6 --layers 4 --channels 256 --heads 4 --context 512 -t 512 -b 20 --chunk 16}
TOKENS_OF_BITS=${TOKENS_OF_BITS:-10240}  # of its micro-batch
TWINS=${TWINS:--e d6 --layers 6 --channels 128 --heads 2 --context 128 -b 4 -t 128 -x 50 -l 1e-4}
LEARNING=${LEARNING:--b 32 -x 400 -u 40 -v 40 -l 6e-4 --shuffle}
TINY=${TINY:-}  # more flags of every run

card() { "$PYTHON" dev/bench/card.py "$@"; }

# record WHAT [OPTIONS of `card.py row`] -- COMMAND...: for as long as its part has; its figures become a row
record() {
    local what=$1 options=() left=$((deadline - SECONDS)) status=124
    shift
    while [ "$1" != -- ]; do options+=("$1"); shift; done
    shift
    echo "no time left" >"$tmp/output"
    if [ $left -gt 0 ]; then
        timeout -k 2 $left "$@" >"$tmp/output" 2>&1 </dev/null
        status=$?
    fi
    { echo "== $part, $what: $* (status $status, at $SECONDS s)"; cat "$tmp/output"; } >>"$out/log.txt"
    AT=$SECONDS card row "$out/rows.csv" "$part" "$what" $status "${options[@]}" <"$tmp/output" || right=0
}

# train WHAT FLAGS...: some steps of ours
train() {
    local what=$1
    shift
    record "$what" -- "$BIN/train" -i "$tmp/tokens.bin" -t "$LENGTH" -l 1e-4 -x "${steps:-$STEPS}" "$@" $TINY
}

# torch_steps B STEPS: what bench.py asks of PyTorch
torch_steps() {
    tr "'" '"' <<<"{$SHAPE_OF_TORCH,'B':$1,'steps':$2,'precision':'bf16','compiled':true,'device':'$DEVICE'}"
}

part_environment() {
    record card -- nvidia-smi --query-gpu=name,memory.total,memory.free,driver_version --format=csv,noheader
    record libraries -- bash -c 'all=$(ldd "$@" 2>&1) && ! grep "not found" <<<"$all" || { echo "$all"; exit 1; }' \
        ldd "$BIN"/{train,train_nccl,test,test_fp32} "$BIN"/k_*
    record program -- "$BIN/train" --version
    record compiler -- cat "$BIN/built.txt"
}
part_checks() { local k; for k in "${KERNELS[@]}"; do record "check $k" -- "$BIN/k_$k" check; done; }
part_layers() { record "test $TEST" -- "$BIN/test" $TEST; }
part_bits() {  # policies train the same model, and one of them the same twice: several tiles, the library's products
    local mode memory first
    for mode in midpoint hamiltonian baseline; do
        first=
        for memory in store reverse reverse auto checkpoint; do
            case "$mode $memory" in baseline\ [ra]*|hamiltonian\ [ac]*) continue ;; esac
            rm -rf "$tmp/bits"
            record "$mode $memory" -- \
                "$BIN/train" -i "$tmp/tokens.bin" $BITS -x 3 -l 1e-3 --mode $mode --memory $memory -o "$tmp/bits"
            mv "$tmp/bits/model_00000003.bin" "$tmp/model_$first" 2>/dev/null
            [ -z "$first" ] || record "$mode $memory: the model of store" -- cmp "$tmp/model_" "$tmp/model_$first"
            first=other
        done
    done
}
part_twins() {
    local mode
    for mode in "${MODES[@]}"; do
        record "$mode beside the C twin" --losses "$BIN/loss_$mode.txt" -- \
            "$BIN/train" -i "$BIN/text.txt" $TWINS --mode "$mode"
    done
}
part_ranks() {  # one rank by NCCL, as far as a single card can show it
    local ranks program
    for ranks in "train" "train_nccl --ranks 1"; do
        program=${ranks%% *}
        record "$ranks" -- "$BIN"/$ranks -i "$tmp/tokens.bin" $BITS -d $((2 * TOKENS_OF_BITS)) -x 3 -o "$tmp/$program"
    done
    record "one rank: the model without NCCL" -- cmp "$tmp"/train{,_nccl}/model_00000003.bin
    record "one rank: the state" -- cmp "$tmp"/train{,_nccl}/state_00000003.bin
}
part_ours() {
    local B
    for B in ${BATCHES#* * }; do
        train "ours baseline store B=$B" $GPT2 -b "$B" --mode baseline
        train "ours midpoint reverse B=$B" $GPT2 -b "$B" --mode midpoint
        train "ours midpoint store B=$B" $GPT2 -b "$B" --mode midpoint --memory store
    done
    steps=5 train "profile store" $GPT2 -b "$B" --mode baseline --profile
    steps=5 train "profile reverse" $GPT2 -b "$B" --mode midpoint --profile
}
part_peers() {
    local B tokens llmc flags
    set -- $BATCHES
    B=$3 tokens=$((B * LENGTH))
    # llm.c without recomputation, with GELU fused; -v 0 would divide by zero
    flags="$GPT2 -b $B -t $LENGTH -d $tokens -x $STEPS -l 1e-4 -r 0 -ge 1 -v 1000 -m 1 -s 0 -h 0"
    for llmc in "$BIN"/llmc*; do
        [ -x "$llmc" ] || continue
        record "$(basename "$llmc") B=$B" --tokens $tokens -- \
            "$llmc" -i "$tmp/tokens.bin" -j "$tmp/tokens.bin" $flags
    done
    for B in $1 $2; do train "ours baseline store B=$B" $GPT2 -b "$B" --mode baseline; done
    record "PyTorch compiled B=$3" --tokens $tokens -- "$PYTHON" dev/bench/bench.py torch "$(torch_steps "$3" 20)"
}
part_attention() {
    local k
    record "last attention" -- "$BIN/k_attention" last $SMALL_SHAPES
    record "PyTorch's attention" -- "$PYTHON" dev/bench/card.py attention "$DEVICE" $ATTENTION
    for k in "${KERNELS[@]}"; do
        [ "$k" = attention ] || record "last $k" -- "$BIN/k_$k" last $SMALL_SHAPES
    done
}
part_price() {
    local memory
    for memory in store reverse; do
        steps=5 train "774M midpoint $memory" $LARGER --mode midpoint --memory $memory
        steps=5 train "L=96 C=512 midpoint $memory" $DEEP --mode midpoint --memory $memory
    done
}
# largest FLAGS...: by two plans
largest() {
    timeout -k 2 20 "$PYTHON" dev/bench/card.py largest "$memory_free" \
        "$BIN/train" -i "$tmp/tokens.bin" -t "$LENGTH" "$@" $TINY
}
part_largest() {
    local mode memory some B
    while read -r mode memory some; do
        set -- $GPT2 --mode "$mode" --memory "$memory"
        B=$(largest "$@")
        steps=$some train "largest $mode $memory B=$B" "$@" -b "$B"
    done <<<"baseline store 2
        baseline checkpoint 2
        midpoint reverse 1"
}
part_depth() {
    local policy L B
    for policy in "baseline store" "midpoint reverse" "midpoint checkpoint"; do
        for L in $DEPTHS; do
            set -- -e d12 --layers "$L" $WIDTH_OF_DEPTHS --mode ${policy% *} --memory ${policy#* }
            B=$(largest "$@")
            [ "$B" -le "$MOST_OF_DEPTHS" ] || B=$MOST_OF_DEPTHS
            steps=4 train "L=$L $policy B=$B" "$@" -b "$B"
        done
    done
}
part_sanitizer() {
    local check tools="compute-sanitizer --error-exitcode 9 --report-api-errors no --tool"
    for check in "memcheck attention" "racecheck attention" "memcheck layernorm" "racecheck layernorm" \
        "memcheck classifier" "racecheck classifier" "memcheck stream_step" "memcheck adamw" "memcheck embed" \
        "memcheck matmul"; do
        record "$check" -- $tools ${check% *} "$BIN/k_${check#* }" check
    done
}
part_ncu() {
    local metrics=gpu__time_duration.sum,dram__bytes.sum,smsp__inst_executed.sum
    metrics+=,launch__registers_per_thread,sm__warps_active.avg.pct_of_peak_sustained_active
    record "one step" -- bash -c \
        'ncu --csv --log-file "$0" --print-units base --clock-control none --metrics "$@"; s=$?; cat "$0"; exit $s' \
        "$out/ncu.csv" $metrics \
        "$BIN/train" -i "$tmp/tokens.bin" -t "$LENGTH" $GPT2 $FEW_LAYERS -b 16 -x 1 $TINY --mode baseline
}
part_float32() { record "test $TEST_FP32, float32" -- "$BIN/test_fp32" $TEST_FP32; }
part_large() {
    local B
    for B in $LARGE_BATCHES; do steps=4 train "midpoint reverse B=$B" $GPT2 -b "$B" --mode midpoint; done
}
part_fails() { record "what fails" -- false; }
part_hangs() { record "what hangs" -- sleep 1000; }

run() {
    local part deadline=0 seconds must right all_right=1 out tmp memory_free warm watch
    out=$folder SECONDS=0
    if [ ! -x "$BIN/train" ]; then
        echo "card.sh: there is no $BIN/train: dev/bench/card.sh build makes it" >&2
        exit 1
    fi
    mkdir -p "$out" && : >"$out/log.txt" && rm -f "$out/rows.csv" || exit 1
    tmp=$(mktemp -d) BIN=$(realpath "$BIN")
    trap "rm -rf '$tmp'" EXIT
    library_path
    export TORCHINDUCTOR_CACHE_DIR=$tmp/inductor
    # PyTorch compiles while nothing is timed
    set -- $BATCHES
    timeout -k 2 76 "$PYTHON" dev/bench/bench.py torch "$(torch_steps "$3" 2)" >"$tmp/warm" 2>&1 &
    warm=$!
    card tokens "$tmp/tokens.bin" "$TOKENS" "$VOCABULARY"
    memory_free=$(timeout 30 nvidia-smi --query-gpu=memory.total --format=csv,noheader,nounits | head -n 1)
    memory_free=${memory_free:-$MIB_AT_MOST}
    memory_free=$(((memory_free < MIB_AT_MOST ? memory_free : MIB_AT_MOST) - MIB_TO_SPARE << 20))
    # keeps the driver awake between programs, and shows what clocks they had
    nvidia-smi --query-gpu=timestamp,clocks.sm,power.draw,temperature.gpu --format=csv -l 2 >"$out/clocks.csv" 2>&1 &
    watch=$!
    deadline=$SECONDS
    while read -r part seconds must; do
        [ -n "$part" ] || continue
        deadline=$((deadline + seconds)) right=1
        [ $deadline -lt "$SECONDS_IN_ALL" ] || deadline=$SECONDS_IN_ALL
        [ "$part" != ours ] || wait $warm
        echo "== $part, at $SECONDS s"
        "part_$part"
        [ $right = 1 ] || [ "$must" != must ] || all_right=0
    done <<<"$PARTS"
    kill $warm $watch 2>/dev/null
    wait $warm $watch
    { echo "== PyTorch's compilation"; cat "$tmp/warm"; } >>"$out/log.txt"
    echo && card table "$out/rows.csv" | tee "$out/table.txt"
    echo "all that must be right is right: $([ $all_right = 1 ] && echo yes || echo no); $SECONDS s"
    [ $all_right = 1 ]
}

# library_path: where the libraries lie that pip brought with PyTorch
library_path() {
    local pip
    pip=$("$PYTHON" -c 'import glob, nvidia as n;print(":".join(glob.glob(list(n.__path__)[0] + "/*/lib")))' \
        2>/dev/null)
    export LD_LIBRARY_PATH=${pip:+$pip:}${LD_LIBRARY_PATH:-}
}

learn() {
    local mode status=0
    library_path
    for mode in "${MODES[@]}"; do  # with all memory policies the same, bit for bit; this one is the fastest
        mkdir -p "$folder/$mode" || return 1
        "$BIN/train" -i "$1" -j "$2" $GPT2 $LEARNING --mode "$mode" --memory store $TINY -o "$folder/$mode" \
            >"$folder/output.txt" 2>&1 || status=1
        echo "$mode: $(tail -n 2 "$folder/output.txt" | paste -sd ' ')"
    done
    return $status
}

twin_losses() {  # of the C twin, for part_twins
    local mode
    for mode in "${MODES[@]}"; do
        OMP_WAIT_POLICY=passive ./train_rev_gpt2 -i "$BIN/text.txt" $TWINS --mode "$mode" |
            sed -n 's/^step .*| loss \([0-9.]*\) .*/\1/p' >"$BIN/loss_$mode.txt"
    done
}
own_text() { cat README.md dev/*.md ./*.c ./*.py | head -c 300000 | tr -cd '\11\12\40-\176'; }

# build_llmc: of a copy, for its Makefile asks a card for its architecture, and nvcc 13 refuses a line
build_llmc() {
    local copy=$tmp/llmc host='cudaMemLocation{cudaMemLocationTypeHost, 0}' flags cudnn pip wheel
    cp -r "$folder" "$copy"
    sed -i 's/__has_include(<nvml.h>)/0/' "$copy/llmc/mfu.h"
    sed -i "s/PreferredLocation, cudaCpuDeviceId/PreferredLocation, $host/" "$copy/llmc/cuda_utils.cuh"
    # cuDNN's attention: of a release no newer than PyTorch's there, by a frontend that is nothing but headers
    "$PYTHON" -m pip download -q --no-deps -d "$tmp" nvidia-cudnn-cu13==9.15.1.9 nvidia-cudnn-frontend==1.14.1
    for wheel in "$tmp"/nvidia_cudnn*.whl; do "$PYTHON" -m zipfile -e "$wheel" "$tmp/cudnn"; done
    pip=$(make -s pip_cublas)
    ln -s "$pip"/lib/libcublas.so.* "$tmp/libcublas.so"
    ln -s "$pip"/lib/libcublasLt.so.* "$tmp/libcublasLt.so"
    ln -s "$tmp"/cudnn/nvidia/cudnn/lib/libcudnn.so.* "$tmp/libcudnn.so"
    flags="--use_fast_math -std=c++17 -O3 -w -DENABLE_BF16 -gencode arch=compute_90,code=sm_90"
    flags+=" ${pip:+-I$pip/include} -L$tmp"
    cudnn="-DENABLE_CUDNN -I$tmp/cudnn/nvidia/cudnn/include -I$tmp/cudnn/include llmc/cudnn_att.cpp -lcudnn"
    cd "$copy" || return
    nvcc $flags -o "$bin/llmc" train_gpt2.cu -lcublas -lcublasLt &
    nvcc $flags -o "$bin/llmc_cudnn" train_gpt2.cu $cudnn -lcublas -lcublasLt &
    wait
}

build() {
    local tmp bin k glibc status=0
    if [ $# = 2 ] && [ ! -f "$folder/train_gpt2.cu" ]; then
        echo "card.sh: there is no train_gpt2.cu of llm.c in $folder" >&2
        exit 2
    fi
    if ! command -v nvcc >/dev/null; then
        echo "card.sh: nvcc is not on the path" >&2
        exit 1
    fi
    tmp=$(mktemp -d)
    trap "rm -rf '$tmp'" EXIT
    bin=$tmp/bin && mkdir "$bin" && make -s cublas || exit 1  # what was built before stays until all is there
    export CUDA_ARCH=sm_90
    make -s -j 2 -B train_rev_gpt2cu test_rev_gpt2cu PROFILE=1 || exit 1
    mv train_rev_gpt2cu "$bin/train" && mv test_rev_gpt2cu "$bin/test"
    make -s nccl && make -s -B train_rev_gpt2cu NCCL=1 || exit 1
    mv train_rev_gpt2cu "$bin/train_nccl"
    make -s -j 2 -B train_rev_gpt2cu test_rev_gpt2cu PRECISION=FP32 || exit 1
    mv train_rev_gpt2cu "$bin/train_fp32" && mv test_rev_gpt2cu "$bin/test_fp32"
    make -s -j 2 -B -C dev/cuda kernels || exit 1
    for k in "${KERNELS[@]}"; do mv "dev/cuda/$k" "$bin/k_$k"; done
    [ $# = 1 ] || (build_llmc)
    if [ $# = 2 ] && ! ls "$bin"/llmc*; then
        echo "card.sh: llm.c was not built" >&2
        status=1
    fi
    own_text >"$bin/text.txt"
    make -s train_rev_gpt2 && BIN=$bin twin_losses || exit 1
    glibc=$(objdump -T "$bin"/* 2>/dev/null | grep -o 'GLIBC_[0-9.]*' | sort -Vu | tail -n 1)
    { nvcc --version | grep release; git describe --always --dirty; echo "needs $glibc"; } | paste -sd ' ' \
        >"$bin/built.txt"
    cat "$bin/built.txt"
    if [ "$(printf '%s\n' GLIBC_2.35 "$glibc" | sort -V | tail -n 1)" != GLIBC_2.35 ]; then
        echo "card.sh: that is newer than GLIBC_2.35, the oldest that a machine with a card may have" >&2
    fi
    rm -rf "$BIN" && mv "$bin" "$BIN" || exit 1
    ls -l "$BIN"
    du -sh "$BIN"
    return $status
}

# stand_in FILE LINE...: a program that cannot exist without a card
stand_in() {
    { echo '#!/bin/bash'; echo 'echo "(a stand-in for $(basename "$0"))"'; printf '%s\n' "${@:2}"; } >"$1"
    chmod +x "$1"
}
stand_ins() {
    local tools=$BIN/tools
    mkdir "$tools"
    stand_in "$BIN/llmc" 'for i in 1 2 3 4; do' \
        'echo "step    $i/4 | loss 11.0 (+nanz)| norm 1.0 (+nanz)| lr 1e-04 | 20.00 ms | 1% MFU | 99 tok/s"' \
        done
    stand_in "$tools/nvidia-smi" 'case $1 in *total) echo 2;; *) echo "none, as if NVIDIA H100, 2 MiB";; esac'
    sed -i 2d "$tools/nvidia-smi"  # whose first line is read
    # what it would watch are checks, which have a part of their own
    stand_in "$tools/compute-sanitizer" 'shift 6' '[ -x "$1" ] && [ "$2" = check ]' 's=$?' 'echo "ERROR SUMMARY: 0 errors"' 'exit $s'
    stand_in "$tools/ncu" 'shift' 'file=$2' 'shift 8' '"$@"' 's=$?' \
        'echo ID,Kernel Name,Metric Name,Metric Unit,Metric Value | sed "s/[^,]*/\"&\"/g" >$file' \
        'for kernel in limits embed_forward "void attention_forward<(int)64>"; do' \
        'echo "0,$kernel(int),gpu__time_duration.sum,ns,12345" | sed "s/[^,]*/\"&\"/g" >>$file' \
        'echo "0,$kernel(int),dram__bytes.sum,byte,2500000" | sed "s/[^,]*/\"&\"/g" >>$file' done 'exit $s'
}

passed=0 failed=0
expect() {  # WHAT COMMAND...
    if "${@:2}"; then passed=$((passed + 1)); else failed=$((failed + 1)); echo "FAILED $1"; fi
}

rehearse() {
    local k status not_right
    make -s train_rev_gpt2 && make -s -B train_rev_gpt2_emulated PROFILE=1 || exit 1
    make -s -C dev/cuda $(printf '%s_emulated ' "${KERNELS[@]}") || exit 1
    BIN=$(mktemp -d)
    trap "rm -rf '$BIN'" EXIT
    stand_ins
    mv train_rev_gpt2_emulated "$BIN/train"
    make -s -B train_rev_gpt2_emulated NCCL=1 || exit 1
    mv train_rev_gpt2_emulated "$BIN/train_nccl"
    for k in "${KERNELS[@]}"; do cp "dev/cuda/${k}_emulated" "$BIN/k_$k"; done
    # the test program takes minutes in emulation and has steps of its own in CI: here its place is taken
    cp "$BIN/k_stream_step" "$BIN/test"
    cp "$BIN/k_stream_step" "$BIN/test_fp32"
    echo emulated >"$BIN/built.txt"
    own_text | head -c 20000 >"$BIN/text.txt"
    export BIN PYTHON PATH=$BIN/tools:$PATH DEVICE=cpu TORCHDYNAMO_DISABLE=1 OMP_NUM_THREADS=1
    export SECONDS_IN_ALL=6000 VOCABULARY=257 TOKENS=65536 MIB_TO_SPARE=1 LENGTH=16 STEPS=4
    export GPT2="-e d6 --layers 1" TINY="--channels 32 --heads 2 --context 16 --chunk 2 --head-chunk 32"
    export BATCHES="1 2 3 4" SHAPE_OF_TORCH='"L":1,"C":32,"NH":2,"T":16,"V":512' ATTENTION="1 64 2 32"
    export LARGE_BATCHES="5 6" LARGER="-e d6 --layers 1 -b 2" DEEP="-e d6 --layers 3 -b 2"
    export TOKENS_OF_BITS=48 BITS="-e d6 --layers 1 --channels 32 --heads 2 --context 16 -t 16 -b 3 --chunk 2" FEW_LAYERS=
    export DEPTHS="2 1" MOST_OF_DEPTHS=4 WIDTH_OF_DEPTHS= SMALL_SHAPES=small TEST=check TEST_FP32=check
    export TWINS="-e d6 --layers 1 --channels 32 --heads 2 --context 16 -b 2 -t 16 -x 6 -l 1e-4"
    twin_losses
    # ten times as long for all but two, for this machine may be busy
    PARTS="fails 5 may
        hangs 2 may
        $(awk 'NF {print $1, 10 * $2, $3}' <<<"$PARTS")" bash dev/bench/card.sh run "$BIN/out"
    status=$?
    expect "exit status 0" [ $status = 0 ]
    expect "what hangs is reported" grep -q 'what hangs,time over' "$BIN/out/rows.csv"
    expect "what fails is reported" grep -q 'what fails,failed (1)' "$BIN/out/rows.csv"
    not_right=$(cut -d, -f 4 "$BIN/out/rows.csv" | grep -c 'time over\|failed\|wrong')
    expect "nothing else is wrong" [ "$not_right" = 2 ]
    for k in $(awk '{print $1}' <<<"$PARTS"); do
        expect "a row of $k" grep -q "^[0-9]*,$k,.*,right" "$BIN/out/rows.csv"
    done
    PARTS="fails 3 must" bash dev/bench/card.sh run "$BIN/again" >/dev/null
    expect "exit status 1 if what must not fail fails" [ $? = 1 ]
    echo "$passed passed, $failed failed"
    [ $failed = 0 ]
}

case "${1:-}/$#" in
build/1|build/2) build "$@" ;;
run/2) [ -n "$2" ] && run ;;
rehearse/1) rehearse ;;
train/4) [ -n "$2" ] && learn "$(realpath "$3")" "$(realpath "$4")" ;;
*) sed -n '5,9s/^# *//p' "$0" >&2; exit 2 ;;
esac
