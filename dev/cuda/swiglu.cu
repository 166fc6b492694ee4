/*
swiglu.cu: what stands between the products of Llama's MLP. A row of gateup (n, 2F) has gate, then up.

    forward     act = silu(gate) up, where silu(g) = g / (1 + exp(-g))
    backward    gateup becomes its gradient, given that in act
*/
#define REV_GPT2_BLOCK "dev/llama/block.h"
#include "common.h"

static int n, F;
static act_t *gateup, *act, *dact, *silus;

// ---- the reference, in double precision

static size_t most_rows(void) { return sampled((size_t)n, (double)n * F, 300); }
static void check_forward(int version) {
    (void)version;
    size_t K = (size_t)F, samples = most_rows();
    const act_t *y = fetch(act, (size_t)n * K);
    for (size_t j = 0; j < samples; j++) {
        size_t i = sample(j, samples, (size_t)n);
        for (size_t c = 0; c < K; c++) {
            double g = rounded(1, i*2*K + c), up = rounded(1, i*2*K + K + c);
            compare("act", i*K + c, to_float(y[i*K + c]), g / (1 + exp(-g)) * up, 1);
        }
    }
}
static void check_backward(int version) {
    (void)version;
    size_t K = (size_t)F, samples = most_rows();
    const act_t *y = fetch(gateup, (size_t)n * 2*K);
    for (size_t j = 0; j < samples; j++) {
        size_t i = sample(j, samples, (size_t)n), gate = i*2*K, up = gate + K;
        for (size_t c = 0; c < K; c++) {
            double g = rounded(1, gate + c), d = rounded(2, i*K + c), sigmoid = 1 / (1 + exp(-g));
            double dgate = d * rounded(1, up + c) * sigmoid * (1 + g * (1 - sigmoid));
            compare("dgate", gate + c, to_float(y[gate + c]), dgate, 1);
            compare("dup", up + c, to_float(y[up + c]), d * g * sigmoid, 1);
        }
    }
}

// ---- 1: silu in a kernel, its product with up in another: what is between is written, and read again

static __global__ void silu_alone(act_t *silus, const act_t *gateup, size_t count, int F) {
    const size_t i = blockIdx.x * (size_t)blockDim.x + threadIdx.x, row = (size_t)F;
    if (i >= count) return;
    const float g = to_float(gateup[i / row * 2*row + i % row]);
    set(silus + i, g / (1 + expf(-g)));
}
static __global__ void product_alone(act_t *act, const act_t *silus, const act_t *gateup, size_t count,
                                     int F) {
    const size_t i = blockIdx.x * (size_t)blockDim.x + threadIdx.x, row = (size_t)F;
    if (i < count) set(act + i, to_float(silus[i]) * to_float(gateup[i / row * 2*row + row + i % row]));
}

// ---- 2: in one kernel, a thread a number; 3: a thread eight of them, 16 bytes at a time

// ---- the experiments

static void set_up(const int *d) {
    n = d[0], F = d[1];
    size_t count = (size_t)n * (size_t)F;
    gateup = make_activations(2*count, 1), dact = make_activations(count, 2);
    act = make_activations(count, 0), silus = make_activations(count, 0);
}
static void set_up_forward(const int *d) { set_up(d), work_bytes = 3.0 * n * F * sizeof(act_t); }
static void set_up_backward(const int *d) { set_up(d), work_bytes = 5.0 * n * F * sizeof(act_t); }
static void reset_forward(void) { spoil(act, (size_t)n * (size_t)F * sizeof(act_t)); }
static void reset_backward(void) { refill(gateup, (size_t)n * 2 * (size_t)F, 1); }

static void run_forward(int version) {
    const size_t count = (size_t)n * (size_t)F;
    const unsigned blocks = blocks_for(count, THREADS);
    if (version == 1) {
        LAUNCH(silu_alone, blocks, THREADS, 0, silus, gateup, count, F);
        LAUNCH(product_alone, blocks, THREADS, 0, act, silus, gateup, count, F);
    } else if (version == 2) LAUNCH(swiglu_kernel<1>, blocks, THREADS, 0, act, gateup, count, F);
    else swiglu_forward(act, gateup, n, F);
}
static void run_backward(int version) {
    const size_t count = (size_t)n * (size_t)F;
    if (version == 2)
        LAUNCH(swiglu_backward_kernel<1>, blocks_for(count, THREADS), THREADS, 0, gateup, dact, count, F);
    else swiglu_backward(gateup, dact, n, F);
}

static const Version forwards[] = {{1, "silu, then its product with up", 1.2e-2, 1},
    {2, "in one kernel", 8e-3, 1}, {3, "the block's: 16 bytes at a time", 8e-3, 1}, {0, NULL, 0, 0}};
static const Version backwards[] = {{2, "in one kernel", 8e-3, 1},
    {3, "the block's: 16 bytes at a time", 8e-3, 1}, {0, NULL, 0, 0}};
static const Shape odd[] = {{"7 x 51", {7, 51, 0, 0}}, {"70 x 264", {70, 264, 0, 0}}, {NULL, {0, 0, 0, 0}}};
static const Shape shapes[] = {{"16384 x 1536", {16384, 1536, 0, 0}}, {"4096 x 5632", {4096, 5632, 0, 0}},
    {NULL, {0, 0, 0, 0}}};
static const Experiment experiments[] = {
    {"SwiGLU, forward", forwards, odd, shapes, set_up_forward, reset_forward, run_forward, check_forward},
    {"SwiGLU, backward", backwards, odd, shapes, set_up_backward, reset_backward, run_backward,
     check_backward}};

int main(int argc, char **argv) { return run_experiments(argc, argv, experiments, 2); }
