#!/usr/bin/env bash
# Fuzzes the readers of token, model, state and tokenizer files, and the flags of three programs: RUNS inputs each, made from small valid ones.
# usage: dev/fuzz/run.sh RUNS [TARGET ...]     (20000: a minute or two on two cores)
# TARGET: tokens, model, state, tokenizer, flags, sample, eval, choices; llama_model and so on: with Llama's block.
# What is found is shown, and its input kept beside the program that takes it. CC= is a clang, LIBFUZZER= its other flags.
ALL="tokens model state tokenizer flags sample eval choices llama_model llama_state llama_flags llama_sample llama_eval"
usage() { echo "usage: dev/fuzz/run.sh RUNS [${ALL// /|} ...]" >&2; exit 2; }
case $1 in ''|*[!0-9]*) usage ;; esac
for target in "${@:2}"; do case " $ALL " in *" $target "*) ;; *) usage ;; esac; done
cd "$(dirname "$0")" || exit 1
runs=$1 CC=${CC:-clang}; shift
[ $# -gt 0 ] || set -- $ALL
out=$(mktemp -d) passed=0 failed=0
trap '[ $failed -gt 0 ] || rm -rf "$out"' EXIT

build() {  # PROGRAM, which is GPT-2's or Llama's; a target is a name of it
    local block=
    [ "$1" = gpt2 ] || block='-DREV_GPT2_BLOCK="dev/llama/block.h"'
    "$CC" -std=gnu11 -g -O1 -Wall -Wextra -Wno-unused -Wno-unused-parameter -Wno-unknown-pragmas \
        -fsanitize=fuzzer,address,undefined -fno-sanitize-recover=all -fprofile-instr-generate -fcoverage-mapping \
        ${block:+"$block"} fuzz.c -o "$out/$1" -lm
}
export -f build
export CC out
printf '%s\n' gpt2 llama | xargs -P 2 -I{} bash -c 'build {}' || exit 1
for target in "$@"; do ln "$out/$([ "${target#llama_}" = "$target" ] && echo gpt2 || echo llama)" "$out/$target"; done

# What a target is about: its coverage is measured there.
functions() {
    case $1 in llama_model) echo block_read ;; llama_flags) echo block_flags ;; esac
    case ${1#llama_} in
    tokens) echo data_open data_close shard_file shard_check sequences_in sequences_of read_tokens set_batch data_batch data_check ;;
    model) echo open_input check_size read_model load_model read_parameters remainders_fit ordinary_fits tensor_sizes choose_network ;;
    state) echo open_input check_size open_state load_state read_parameters write_parameters checksum state_checksum model_header ;;
    tokenizer) echo tokenizer_open find_token find_slot push_pair pop_pair join_pair encode_word kind_of index_open word_length encode print_byte print_characters print_token first_token ;;
    flags) echo set_option parse_options print_help check_options new_network choose_mode choose_ordinary adjust_conversion choose_network choose_teacher choose_shape plan \
        learning_rate find_tokenizer ;;
    sample) echo set_option parse_options check_sample_options encode_prompt choose_sample_shape find_tokenizer word_length ;;
    choices) echo take_words add_completion read_question choices_open choices_fit answer_of add_accuracy ;;
    eval) echo set_option parse_options check_eval_options choose_teacher choose_shape ;;
    esac
}

# The lines of these functions that the inputs have reached, and which ones they have not.
lines() {
    local program=$1 profdata cov
    profdata=$("$CC" -print-prog-name=llvm-profdata) cov=$("$CC" -print-prog-name=llvm-cov)
    command -v "$profdata" >/dev/null && command -v "$cov" >/dev/null || return
    "$profdata" merge -o "$program.prof" "$program.raw" && "$cov" export "$program" -instr-profile="$program.prof" -format=lcov |
        awk -F'[:,]' -v names="$(functions "${program##*/}")" '
            BEGIN {n = split(names, list, " "); for (i = 1; i <= n; i++) wanted[list[i]] = 1}
            $1 == "SF" {ours = /train_rev_gpt2\.c|block\.h|sample\.c|samples\.h|eval\.c|choices\.h/; at = 0; name = ""; split("", start)}
            ours && $1 == "FN" {name = $NF; sub(/.*:/, "", name); start[$2] = name; seen[name] = 1}
            ours && $1 == "DA" {
                while (at < $2) if (++at in start) name = start[at]
                if (!(name in wanted)) next
                all++
                if ($3 > 0) reached++; else missed = missed " " $2
            }
            END {
                printf "  lines %d of %d, %.1f%%%s\n", reached, all, 100 * reached / (all ? all : 1), missed ? "; not" missed : ""
                for (w in wanted) if (!(w in seen)) print "  there is no " w " any more"
            }'
}

for target in "$@"; do
    program=$out/$target start=$SECONDS
    export LLVM_PROFILE_FILE=$program.raw
    mkdir "$program.corpus" && SEEDS=$program.corpus "$program" >"$program.log" 2>&1 &&
        "$program" -runs="$runs" -seed=1 -max_len=65536 -timeout=10 -artifact_prefix="$program." \
            $([ -f "$program.corpus.dict" ] && echo "-dict=$program.corpus.dict") $LIBFUZZER "$program.corpus" >"$program.log" 2>&1
    status=$?
    counts=$(sed -n 's/^#\([0-9]*\).* cov: \([0-9]*\) ft: \([0-9]*\).*/\1 executions, cov \2 ft \3/p' "$program.log" | tail -n 1)
    if [ $status -eq 0 ]; then passed=$((passed + 1)); else failed=$((failed + 1)); fi
    echo "$target: ${counts:-nothing executed}, $((SECONDS - start)) s, $([ $status -eq 0 ] && echo "no findings" || echo "a FINDING")"
    if [ $status -eq 0 ]; then
        lines "$program"
    else
        grep -anE '^FAILED|ERROR|runtime error|^ *#[0-9]+ 0x.*(train_rev_gpt2|sample|eval|block).[ch]|SUMMARY|Test unit' "$program.log" | cut -c1-400 | head -n 20
        echo "  the log: $program.log; again: $program $(ls -d "$program".crash-* "$program".leak-* "$program".timeout-* "$program".oom-* 2>/dev/null | head -n 1)"
    fi
done
echo "$passed passed, $failed failed"
[ $failed -eq 0 ]
