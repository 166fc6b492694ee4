# make            the trainer, and the programs that generate text with a trained model and say how well it predicts
# make demo       two minutes: trains a small model on this project's text, lets it write, measures its memory
# make test       whether all of it is right, without network or Python: a minute or two on two cores
# make llama      train_rev_llama, sample_rev_llama and eval_rev_llama: the same programs with Llama's block; make test-llama
#                 tests it: dev/llama/README.md
# make tutorial   a network that runs backwards, in 150 lines: dev/tutorial/reverse.md walks through it
# make test-asan  the same under Address- and UndefinedBehaviorSanitizer
# make cxx        compiles the C file as C++17 without its layers, as the CUDA twin includes it
# make train_rev_gpt2cu  the CUDA twin, with nvcc: CUDA_ARCH=sm_90 for another card than this machine's, PRECISION=FP32 for
#                        float32 throughout; make sample_rev_gpt2cu eval_rev_gpt2cu use it; make test_rev_gpt2cu and
#                        make test_programcu build its tests
# make cublas            fetches cuBLAS with pip, if neither the toolkit nor Python has it
# make nccl              fetches NCCL, likewise, which NCCL=1 needs
# make test-emulated     the same kernels on the CPU, where there is no GPU
# make debug      the programs without optimization and threads, for a debugger; with STREAMS=1 the trainer prints numbers
#                 of every state, going forward and coming back
# make format     lays out the lines that differ from the last commit (clang-format and git-clang-format; pip has both)
# make gradients  the two programs dev/reference/reference.py checks against PyTorch
# make help       prints this
# MPI=1 builds the trainer and the evaluation for several processes, which mpirun starts; NCCL=1 their CUDA twins for several
# cards, one process each, which they start themselves, or with MPI=1 mpirun: dev/ranks/README.md says how.
# PROFILE=1 builds a trainer with --profile, which prints the time of a step by layer function.
# ARCH= builds for any processor of the family, OPENMP= without threads, SAN=... adds sanitizers.
# What is built already is built again for other flags with -B: make -B PROFILE=1.

CC ?= cc
CXX ?= c++
probe = $(shell echo 'int main(void) { return 0; }' | $(CC) -x c $(1) -o /dev/null - 2>/dev/null && echo '$(1)')
ARCH := $(or $(call probe,-march=native),$(call probe,-mcpu=native))
ARCH += $(and $(ARCH),$(call probe,-mprefer-vector-width=512))
# OpenMP must link as well. Apple's compiler takes it by another flag, and Homebrew has the library.
threaded = \#include <omp.h>\nint main(void) { return omp_get_max_threads() == 0; }\n
links = $(shell t=$$(mktemp) && printf '$(threaded)' | $(CC) -x c - $(1) -o $$t 2>/dev/null && echo '$(1)'; rm -f $$t)
LIBOMP = $(shell brew --prefix libomp 2>/dev/null)
OPENMP := $(or $(call links,-fopenmp),$(call links,-Xclang -fopenmp $(LIBOMP:%=-I%/include -L%/lib) -lomp))
SIMD := $(or $(OPENMP),$(call probe,-fopenmp-simd))
# musl gives a thread 128 KiB of stack unless the program says more; attention's backward pass takes 412, in double precision twice that.
ifneq ($(findstring musl,$(shell $(CC) -dumpmachine)),)
STACK := -Wl,-z,stack-size=8388608
endif
CFLAGS ?= -O3
# -Wno-pass-failed: clang need not vectorize every loop that says it may;
# contraction to FMA is allowed everywhere or nowhere, so that equal expressions give equal bits; no -ffast-math, it hides NaN
instead_of_profile = $(if $(PROFILE),dev/bench/profile.h,$(if $(STREAMS),dev/tutorial/streams.h))
PROFILED = $(if $(instead_of_profile),-DREV_GPT2_PROFILE='"$(instead_of_profile)"')
BF16_FILE = -DREV_GPT2_BF16='"dev/cpu/bf16.h"'
INCLUDED = -DREV_GPT2_CHOICES='"dev/eval/choices.h"' -DREV_GPT2_SAMPLES='"dev/sample/samples.h"'
ALL_CFLAGS = -std=gnu11 $(CFLAGS) $(ARCH) $(SIMD) -fno-math-errno -ffp-contract=fast -Wall -Wextra -Wno-unknown-pragmas -Wno-pass-failed $(BF16_FILE) $(PROFILED) $(STACK) $(SAN)

# MPI's compiler is this one with MPI's flags; Open MPI and MPICH ask for it by these names.
MPICC ?= mpicc
MPICXX ?= mpicxx
compile = $(if $(MPI),OMPI_CC='$(CC)' MPICH_CC='$(CC)' $(MPICC) $(RANKS),$(CC))
compile_cxx = $(if $(MPI),OMPI_CXX='$(CXX)' MPICH_CXX='$(CXX)' $(MPICXX),$(CXX)) $(TWIN_RANKS)
RANKS = -DREV_GPT2_RANKS='"dev/ranks/mpi.h"'
ranks_files = $(if $(MPI)$(NCCL),$(wildcard $(ROOT)dev/ranks/*.h $(ROOT)dev/ranks/*.cuh))
# The twins' ranks: NCCL's, which start by themselves or by MPI, or MPI's alone
TWIN_RANKS = $(if $(NCCL),-DREV_GPT2_RANKS='"dev/ranks/nccl.cuh"' $(if $(MPI),-DREV_GPT2_MPI),$(if $(MPI),$(RANKS)))

ROOT := $(dir $(lastword $(MAKEFILE_LIST)))
NVCC ?= nvcc
CUDA_ARCH ?= native
FP32 = $(if $(filter FP32,$(PRECISION)),-DPRECISION_FP32)
NVCC_OPTIMIZE ?= -O3
ALL_NVCCFLAGS = -std=c++17 $(NVCC_OPTIMIZE) -arch=$(CUDA_ARCH) $(FP32) -Xcompiler "-fopenmp -Wall -Wextra -Wno-unknown-pragmas" $(PROFILED) $(NVCCFLAGS)
# nvcc for ranks: the programs that have them
RANKS_NVCC = $(if $(MPI),OMPI_CXX='$(CXX)' MPICH_CXX='$(CXX)') $(NVCC) $(if $(MPI),-ccbin $(MPICXX)) $(TWIN_RANKS)
# cuBLASLt and NCCL as pip brings them, where the toolkit has none: among this Python's packages, or from `make cublas` and
# `make nccl`. Their libraries have only names with a number there.
PYTHON ?= python3
site_packages = $(shell $(PYTHON) -c 'import sysconfig; print(sysconfig.get_path("purelib"))' 2>/dev/null)
NVIDIA ?= $(ROOT).nvidia/nvidia $(site_packages)/nvidia
has = $(shell $(NVCC) $(NVCCFLAGS) -x cu -E -include $(1) -o /dev/null /dev/null 2>/dev/null && echo yes)
pip_folder = $(abspath $(patsubst %/include/$(1),%,$(firstword $(wildcard $(NVIDIA:%=%/*/include/$(1))))))
pip_flags = -I$(1)/include -L$(1)/lib -Xlinker -rpath=$(1)/lib -l:$(notdir $(firstword $(wildcard $(1)/lib/$(2).so*)))
no = $(if $(call has,cuda_runtime.h),$(error no $(1) in the toolkit or among the packages of $(PYTHON): `make -C $(ROOT) $(2)` brings it))
has_cublas = $(call has,cublasLt.h)
pip_cublas = $(call pip_folder,cublasLt.h)
CUBLAS = $(or $(if $(has_cublas),-lcublasLt),$(if $(pip_cublas),$(call pip_flags,$(pip_cublas),libcublasLt)),$(call no,cuBLASLt,cublas)-lcublasLt)
has_nccl = $(call has,nccl.h)
pip_nccl = $(call pip_folder,nccl.h)
NCCL_LIBRARY = $(if $(NCCL),$(or $(if $(has_nccl),-lnccl),$(if $(pip_nccl),$(call pip_flags,$(pip_nccl),libnccl)),$(call no,NCCL,nccl)-lnccl))
cuda = $(shell $(NVCC) --version 2>/dev/null | sed -n 's/.*release \([0-9]*\)\..*/\1/p')
cublas_package = 'nvidia-cublas$(if $(filter 12,$(cuda)),-cu12)==$(cuda).*'
nccl_package = nvidia-nccl-cu$(cuda)
EMULATE_OPTIMIZE ?= -O2
EMULATE_FLAGS = -x c++ -std=c++17 $(EMULATE_OPTIMIZE) -U_FORTIFY_SOURCE -DEMULATE $(FP32) -include $(ROOT)dev/cuda/emulate.h -Wall -Wextra -Wno-unknown-pragmas $(PROFILED) $(SAN)

all: train_rev_gpt2 sample_rev_gpt2 eval_rev_gpt2

train_rev_gpt2: train_rev_gpt2.c dev/cpu/bf16.h dev/eval/choices.h dev/sample/samples.h $(ranks_files)
	@echo 'OpenMP: $(or $(strip $(OPENMP)),none: one thread (on macOS `brew install libomp` gives more))'
	$(compile) $(ALL_CFLAGS) $(INCLUDED) -o $@ $< $(LDFLAGS) -lm

sample_rev_gpt2: dev/sample/sample.c dev/sample/samples.h dev/network_flags.h dev/output.h train_rev_gpt2.c dev/cpu/bf16.h
	$(CC) $(ALL_CFLAGS) -o $@ $< $(LDFLAGS) -lm

eval_rev_gpt2: dev/eval/eval.c dev/eval/choices.h dev/network_flags.h dev/output.h train_rev_gpt2.c dev/cpu/bf16.h $(ranks_files)
	$(compile) $(ALL_CFLAGS) -o $@ $< $(LDFLAGS) -lm

train_rev_gpt2 sample_rev_gpt2 eval_rev_gpt2: $(wildcard .debug)  # `make` makes fast ones again after `make debug`

# Llama's block in place of GPT-2's
LLAMA = -DREV_GPT2_BLOCK='"dev/llama/block.h"'
llama: train_rev_llama sample_rev_llama eval_rev_llama
llama_twin = train_rev_gpt2.cu train_rev_gpt2.c dev/llama/block.h

train_rev_llama: train_rev_gpt2.c dev/cpu/bf16.h dev/llama/block.h dev/eval/choices.h dev/sample/samples.h $(ranks_files)
	$(compile) $(ALL_CFLAGS) $(LLAMA) $(INCLUDED) -o $@ $< $(LDFLAGS) -lm

sample_rev_llama: dev/sample/sample.c dev/sample/samples.h dev/network_flags.h dev/output.h train_rev_gpt2.c dev/cpu/bf16.h dev/llama/block.h
	$(CC) $(ALL_CFLAGS) $(LLAMA) -o $@ $< $(LDFLAGS) -lm

eval_rev_llama: dev/eval/eval.c dev/eval/choices.h dev/network_flags.h dev/output.h train_rev_gpt2.c dev/cpu/bf16.h dev/llama/block.h $(ranks_files)
	$(compile) $(ALL_CFLAGS) $(LLAMA) -o $@ $< $(LDFLAGS) -lm

train_rev_llamacu: $(llama_twin) dev/eval/choices.h dev/sample/samples.h $(ranks_files)
	$(RANKS_NVCC) $(ALL_NVCCFLAGS) $(LLAMA) $(INCLUDED) -o $@ $< $(CUBLAS) $(NCCL_LIBRARY)

sample_rev_llamacu: dev/sample/sample.c dev/sample/samples.h dev/network_flags.h dev/output.h $(llama_twin)
	$(NVCC) -x cu -DTWIN $(ALL_NVCCFLAGS) $(LLAMA) -o $@ $< $(CUBLAS)

eval_rev_llamacu: dev/eval/eval.c dev/eval/choices.h dev/network_flags.h dev/output.h $(llama_twin) $(ranks_files)
	$(RANKS_NVCC) -x cu -DTWIN $(ALL_NVCCFLAGS) $(LLAMA) -o $@ $< $(CUBLAS) $(NCCL_LIBRARY)

train_rev_llama_emulated: $(llama_twin) dev/eval/choices.h dev/sample/samples.h dev/cuda/emulate.h $(ranks_files)
	$(compile_cxx) $(EMULATE_FLAGS) $(LLAMA) $(INCLUDED) -o $@ $<

# The mathematics, in float32 and in double precision; and the program
MATHEMATICS = test_rev_gpt2.c dev/test/check.h dev/sample/sample.c dev/sample/samples.h dev/output.h train_rev_gpt2.c dev/cpu/bf16.h dev/bench/profile.h
PROGRAM = dev/test/program.c dev/test/check.h dev/sample/sample.c dev/sample/samples.h dev/eval/eval.c dev/eval/choices.h dev/network_flags.h dev/output.h train_rev_gpt2.c dev/cpu/bf16.h dev/bench/profile.h

test_rev_gpt2: $(MATHEMATICS)
	$(CC) $(ALL_CFLAGS) -o $@ $< $(LDFLAGS) -lm

test_rev_gpt2_f64: $(MATHEMATICS)
	$(CC) $(ALL_CFLAGS) -DREAL=double -o $@ $< $(LDFLAGS) -lm

LLAMA_TESTS = $(LLAMA) -DREV_GPT2_BLOCK_TESTS='"dev/llama/test.h"'
test_rev_llama: $(MATHEMATICS) dev/llama/block.h dev/llama/test.h
	$(CC) $(ALL_CFLAGS) $(LLAMA_TESTS) -o $@ $< $(LDFLAGS) -lm

test_rev_llama_f64: $(MATHEMATICS) dev/llama/block.h dev/llama/test.h
	$(CC) $(ALL_CFLAGS) $(LLAMA_TESTS) -DREAL=double -o $@ $< $(LDFLAGS) -lm

test_rev_llamacu: $(MATHEMATICS) dev/llama/block.h dev/llama/test.h train_rev_gpt2.cu
	$(NVCC) -x cu -DTWIN $(ALL_NVCCFLAGS) $(LLAMA_TESTS) -o $@ $< $(CUBLAS)

test_rev_llama_emulated: $(MATHEMATICS) dev/llama/block.h dev/llama/test.h train_rev_gpt2.cu dev/cuda/emulate.h
	$(CXX) $(EMULATE_FLAGS) $(LLAMA_TESTS) -DTWIN -o $@ $<

test_program: $(PROGRAM)
	$(CC) $(ALL_CFLAGS) -o $@ $< $(LDFLAGS) -lm

train_rev_gpt2cu: train_rev_gpt2.cu train_rev_gpt2.c dev/eval/choices.h dev/sample/samples.h $(ranks_files)
	$(RANKS_NVCC) $(ALL_NVCCFLAGS) $(INCLUDED) -o $@ $< $(CUBLAS) $(NCCL_LIBRARY)

sample_rev_gpt2cu: dev/sample/sample.c dev/sample/samples.h dev/output.h train_rev_gpt2.cu train_rev_gpt2.c
	$(NVCC) -x cu -DTWIN $(ALL_NVCCFLAGS) -o $@ $< $(CUBLAS)

eval_rev_gpt2cu: dev/eval/eval.c dev/eval/choices.h dev/network_flags.h dev/output.h train_rev_gpt2.cu train_rev_gpt2.c $(ranks_files)
	$(RANKS_NVCC) -x cu -DTWIN $(ALL_NVCCFLAGS) -o $@ $< $(CUBLAS) $(NCCL_LIBRARY)

test_rev_gpt2cu: $(MATHEMATICS) train_rev_gpt2.cu
	$(NVCC) -x cu -DTWIN $(ALL_NVCCFLAGS) -o $@ $< $(CUBLAS)

test_programcu: $(PROGRAM) train_rev_gpt2.cu
	$(NVCC) -x cu -DTWIN $(ALL_NVCCFLAGS) -o $@ $< $(CUBLAS)

train_rev_gpt2_emulated: train_rev_gpt2.cu train_rev_gpt2.c dev/eval/choices.h dev/sample/samples.h dev/cuda/emulate.h $(ranks_files)
	$(compile_cxx) $(EMULATE_FLAGS) $(INCLUDED) -o $@ $<

sample_rev_gpt2_emulated: dev/sample/sample.c dev/sample/samples.h dev/output.h train_rev_gpt2.cu train_rev_gpt2.c dev/cuda/emulate.h
	$(CXX) $(EMULATE_FLAGS) -DTWIN -o $@ $<

eval_rev_gpt2_emulated: dev/eval/eval.c dev/eval/choices.h dev/network_flags.h dev/output.h train_rev_gpt2.cu train_rev_gpt2.c dev/cuda/emulate.h $(ranks_files)
	$(compile_cxx) $(EMULATE_FLAGS) -DTWIN -o $@ $<

test_rev_gpt2_emulated: $(MATHEMATICS) train_rev_gpt2.cu dev/cuda/emulate.h
	$(CXX) $(EMULATE_FLAGS) -DTWIN -o $@ $<

test_program_emulated: $(PROGRAM) train_rev_gpt2.cu dev/cuda/emulate.h
	$(CXX) $(EMULATE_FLAGS) -DTWIN -o $@ $<

# Runs programs, each with its arguments in quotes. They print their counts; here these become one line, and a program
# that dies without its own counts as a failure. Threads wait asleep, so that the tests can share the machine.
count = @for t in $(1); do \
		OMP_WAIT_POLICY=passive $$t; s=$$?; [ $$s -le 1 ] || echo "0 passed, 1 failed: $$t ended with status $$s"; done | \
	awk -v programs="$$(set -- $(1); echo $$\#)" '{print} \
		/^[0-9]+ passed, [0-9]+ failed/ {p += $$1; f += $$3; n++} \
		END {if (n < programs) f++; printf "%d passed, %d failed\n", p, f; exit f > 0}'

test-emulated: test_rev_gpt2_emulated test_program_emulated
	$(call count,"./test_rev_gpt2_emulated $(NAMES)" "./test_program_emulated $(or $(BRIEF),brief)")

# The text of the demo is this project's own.
demo/demo.txt: README.md Makefile prepro_owt.py $(wildcard *.c *.cu $(foreach e,py sh c,dev/*.$e dev/*/*.$e))
	@mkdir -p demo
	@cat $^ >$@

demo: train_rev_gpt2 sample_rev_gpt2 demo/demo.txt
	@sh dev/demo.sh demo/demo.txt

tutorial: dev/tutorial/reverse dev/tutorial/reverse_floats
	@dev/tutorial/reverse
	@printf '\n---- the same program, with states of floats\n'
	@dev/tutorial/reverse_floats

# No contraction: a force, which may be compiled into several functions, gives the same bits in all of them.
dev/tutorial/reverse dev/tutorial/reverse_floats: dev/tutorial/reverse.c
	@$(CC) -std=c11 -ffp-contract=off -O2 -Wall -Wextra $(if $(findstring floats,$@),-DFLOATS) $(SAN) -o $@ $< -lm

help:
	@awk '/^$$/ {exit} {sub(/^# ?/, ""); print}' $(ROOT)Makefile

debug:
	$(MAKE) -B all CFLAGS="-O0 -g" OPENMP=
	@touch .debug

format:
	git clang-format --style=file:dev/clang-format; [ $$? -le 1 ]  # 1: it changed something

# GRADIENTS=layers leaves the gradients of whole networks out; NAMES=layers what another compiler cannot change; BRIEF=brief most
# of the moments to die at.
test: test_rev_gpt2 test_rev_gpt2_f64 test_program
	$(call count,"./test_rev_gpt2_f64 $(GRADIENTS)" "./test_rev_gpt2 $(NAMES)" "./test_program $(BRIEF)")

test-llama: test_rev_llama test_rev_llama_f64 llama
	$(call count,"./test_rev_llama_f64 $(GRADIENTS)" ./test_rev_llama dev/llama/test.sh)

test-llama-emulated: test_rev_llama_emulated
	$(call count,"./test_rev_llama_emulated kernels cache")

test-asan:
	$(MAKE) clean-tests
	ASAN_OPTIONS=exitcode=99 $(MAKE) test GRADIENTS=layers CFLAGS="-O2 -g" SAN="-fsanitize=address,undefined -fno-sanitize-recover=all"
	$(MAKE) clean-tests

fetch = rm -rf .nvidia/part && $(PYTHON) -m pip download -q --no-deps -d .nvidia/part $(1) && \
	$(PYTHON) -m zipfile -e .nvidia/part/*.whl .nvidia/part && mkdir -p .nvidia/nvidia && \
	cp -r .nvidia/part/nvidia/. .nvidia/nvidia/ && rm -r .nvidia/part
cublas:
	$(if $(has_cublas)$(pip_cublas),,$(call fetch,$(cublas_package)))

nccl:
	$(if $(has_nccl)$(pip_nccl),,$(call fetch,$(nccl_package)))

pip_cublas:
	@echo $(pip_cublas)

cxx: train_rev_gpt2.c
	$(CXX) -x c++ -std=c++17 -Wall -Wextra -Wno-unknown-pragmas -Wno-unused-function -pedantic-errors -Werror -DREV_GPT2_OTHER_LAYERS -c -o /dev/null $<
	echo 'struct half { unsigned short bits; operator float() const { return bits; } };' | cat - $< | \
		$(CXX) -x c++ -std=c++17 -Wall -Wno-unknown-pragmas -Wno-unused-function -DREV_GPT2_OTHER_LAYERS -DACT=half -c -o /dev/null -

gradients: dev/reference/gradients dev/reference/gradients_f64
dev/reference/gradients dev/reference/gradients_f64: dev/reference/gradients.c train_rev_gpt2.c dev/cpu/bf16.h
	$(CC) $(ALL_CFLAGS) $(if $(findstring f64,$@),-DREAL=double) -o $@ $< $(LDFLAGS) -lm
gradients-llama: dev/reference/gradients_llama dev/reference/gradients_llama_f64
dev/reference/gradients_llama dev/reference/gradients_llama_f64: dev/reference/gradients.c train_rev_gpt2.c dev/cpu/bf16.h dev/llama/block.h
	$(CC) $(ALL_CFLAGS) -DREV_GPT2_BLOCK='"dev/llama/block.h"' $(if $(findstring f64,$@),-DREAL=double) -o $@ $< $(LDFLAGS) -lm

clean-tests:
	rm -f test_rev_gpt2 test_rev_gpt2_f64 test_rev_gpt2cu test_rev_gpt2_emulated
	rm -f test_program test_programcu test_program_emulated
	rm -f test_rev_llama test_rev_llama_f64 test_rev_llamacu test_rev_llama_emulated

clean: clean-tests
	rm -f $(foreach p,train sample eval,$(p)_rev_gpt2 $(p)_rev_gpt2cu $(p)_rev_gpt2_emulated)
	rm -f $(foreach p,train sample eval,$(p)_rev_llama $(p)_rev_llamacu $(p)_rev_llama_emulated)
	rm -f $(foreach p,gradients gradients_llama,dev/reference/$(p) dev/reference/$(p)_f64) dev/tutorial/reverse dev/tutorial/reverse_floats
	rm -rf demo .debug

.PHONY: all llama test-llama test-llama-emulated demo tutorial help debug format test test-asan test-emulated cublas pip_cublas nccl cxx gradients gradients-llama clean-tests clean
