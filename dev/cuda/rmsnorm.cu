/*
rmsnorm.cu: RMSNorm of x = s + add, straight from a stream s in fixed point, to an activation; C channels a
token. Llama's block has it where GPT-2's has layernorm.

    forward     out = weight x r, where r = 1 / sqrt(mean of x^2 + epsilon)
    backward    ds, dother += the gradient in x;  dweight (C) += the sum over all tokens
*/
#define REV_GPT2_BLOCK "dev/llama/block.h"
#include "common.h"

static const double epsilon = 1e-5;
static int n, C;
enum { GRID = 20 };
static stream_t *s;
static act_t *add, *out, *dout, *dother;
static float *weight, *ds, *dweight;

// ---- the reference, in double precision

static int32_t fixed_at(size_t i) { return (int32_t)((1 + 2 * number(1, i)) * (1 << GRID)); }
static double value(size_t i) { return ldexp(fixed_at(i), -GRID) + (add ? rounded(2, i) : 0); }
static double reciprocal(size_t at) {
    double squares = 0;
    for (size_t c = 0; c < (size_t)C; c++) squares += pow(value(at + c), 2);
    return 1 / sqrt(squares / C + epsilon);
}
static void check_forward(int version) {
    (void)version;
    size_t K = (size_t)C, samples = sampled((size_t)n, (double)n * C, 300);
    const act_t *y = fetch(out, (size_t)n * K);
    for (size_t j = 0; j < samples; j++) {
        size_t at = sample(j, samples, (size_t)n) * K;
        double r = reciprocal(at);
        for (size_t c = 0; c < K; c++)
            compare("out", at + c, to_float(y[at + c]), value(at + c) * r * number(3, c), 1);
    }
}
static void check_backward(int version) {
    (void)version;
    size_t K = (size_t)C;
    double *dw = (double *)calloc(K, sizeof(double));
    const float *dx = fetch(ds, (size_t)n * K), *got = fetch(dweight, K);
    const act_t *da = add ? fetch(dother, (size_t)n * K) : NULL;
    for (size_t i = 0; i < (size_t)n; i++) {
        double mean = 0, r = reciprocal(i*K);
        for (size_t c = 0; c < K; c++) {
            double d = rounded(4, i*K + c), x = value(i*K + c) * r;
            dw[c] += d * x;
            mean += d * number(3, c) * x / C;
        }
        for (size_t c = 0; c < K; c++) {
            double g = (rounded(4, i*K + c) * number(3, c) - value(i*K + c) * r * mean) * r;
            compare("ds", i*K + c, dx[i*K + c], number(5, i*K + c) + g, 1);
            if (add) compare("dother", i*K + c, to_float(da[i*K + c]), rounded(6, i*K + c) + g, 1);
        }
    }
    for (size_t c = 0; c < K; c++)
        compare("dweight", c, got[c], number(7, c) + dw[c], sqrt(n));
    free(dw);
}

// ---- 1: a thread a token. Neighbouring threads read C elements apart: each 32-byte sector is fetched for
// one element.

static __device__ float element(const stream_t *s, const act_t *add, size_t at, float unit) {
    return stream_value(s[at], unit) + (add ? to_float(add[at]) : 0);
}
static __device__ float reciprocal_alone(const stream_t *s, const act_t *add, size_t at, int C, float unit) {
    float squares = 0;
    for (size_t c = 0; c < (size_t)C; c++) {
        float x = element(s, add, at + c, unit);
        squares += x * x;
    }
    return 1 / sqrtf(squares / (float)C + (float)epsilon);
}
static __global__ void forward_alone(act_t *out, const stream_t *s, const act_t *add, const float *weight,
                                     int n, int C, float unit) {
    size_t at = (blockIdx.x * (size_t)blockDim.x + threadIdx.x) * (size_t)C;
    if (at >= (size_t)n * (size_t)C) return;
    float r = reciprocal_alone(s, add, at, C, unit);
    for (size_t c = 0; c < (size_t)C; c++) set(out + at + c, element(s, add, at + c, unit) * r * weight[c]);
}
static __global__ void backward_alone(float *ds, act_t *dother, float *dweight, const act_t *dout,
                                      const stream_t *s, const act_t *add, const float *weight, int n, int C,
                                      float unit) {
    size_t at = (blockIdx.x * (size_t)blockDim.x + threadIdx.x) * (size_t)C;
    if (at >= (size_t)n * (size_t)C) return;
    float r = reciprocal_alone(s, add, at, C, unit), sum = 0;
    for (size_t c = 0; c < (size_t)C; c++) {
        float d = to_float(dout[at + c]), x = element(s, add, at + c, unit) * r;
        atomicAdd(dweight + c, d * x);
        sum += d * weight[c] * x;
    }
    for (size_t c = 0; c < (size_t)C; c++) {
        float x = element(s, add, at + c, unit) * r;
        float dx = (to_float(dout[at + c]) * weight[c] - x * sum / (float)C) * r;
        ds[at + c] += dx;
        if (add) set(dother + at + c, to_float(dother[at + c]) + dx);
    }
}

// ---- 2: a block a token: neighbours read neighbours, but there are a sum over the block and its barriers

static __global__ void forward_block(act_t *out, const stream_t *s, const act_t *add, const float *weight,
                                     int C, float unit) {
    SHARED(float, room);
    size_t at = blockIdx.x * (size_t)C;
    float squares = 0;
    for (size_t c = threadIdx.x; c < (size_t)C; c += blockDim.x) {
        float x = element(s, add, at + c, unit);
        squares += x * x;
    }
    float r = 1 / sqrtf(block_sum(squares, 0, room).x / (float)C + (float)epsilon);
    for (size_t c = threadIdx.x; c < (size_t)C; c += blockDim.x)
        set(out + at + c, element(s, add, at + c, unit) * r * weight[c]);
}

// ---- 3: a warp a token, which is read once into registers: the block's, where C is no multiple of 8
// ---- 4: the block's, 16 bytes at a time

// ---- the experiments

static void set_up(const int *d) {
    n = d[0], C = d[1];
    size_t count = (size_t)n * (size_t)C;
    stream_t *host = (stream_t *)malloc(count * sizeof(stream_t));
    s = (stream_t *)allocate(count * sizeof(stream_t));
    for (size_t i = 0; i < count; i++) host[i].fixed = fixed_at(i);
    to_device(s, host, count * sizeof(stream_t));
    free(host);
    add = d[2] ? make_activations(count, 2) : NULL;
    weight = make_floats((size_t)C, 3), dout = make_activations(count, 4), out = make_activations(count, 0);
    ds = make_floats(count, 5), dother = make_activations(count, 6), dweight = make_floats((size_t)C, 7);
}
static void set_up_forward(const int *d) {
    set_up(d);
    work_bytes = (double)n * C * (4 + (d[2] ? 2 : 1) * sizeof(act_t));
}
static void set_up_backward(const int *d) {
    set_up(d);
    work_bytes = (double)n * C * (12 + (d[2] ? 4 : 1) * sizeof(act_t));
}
static void reset_forward(void) { spoil(out, (size_t)n * (size_t)C * sizeof(act_t)); }
static void reset_backward(void) {
    size_t count = (size_t)n * (size_t)C;
    refill(ds, count, 5), refill(dother, count, 6), refill(dweight, (size_t)C, 7);
}
static void run_forward(int version) {
    float unit = grid_unit(GRID), e = (float)epsilon;
    if (version == 1)
        LAUNCH(forward_alone, blocks_for((size_t)n, 128), 128, 0, out, s, add, weight, n, C, unit);
    else if (version == 2)
        LAUNCH(forward_block, (unsigned)n, THREADS, 2 * WARP * sizeof(float), out, s, add, weight, C, unit);
    else if (version == 3) OF_WIDTH(rmsnorm_forward_of, 0, out, s, add, weight, n, C, e, unit);
    else rmsnorm_forward(out, s, add, weight, n, C, epsilon, GRID);
}
static void run_backward(int version) {
    act_t *da = add ? dother : NULL;
    float unit = grid_unit(GRID), e = (float)epsilon;
    if (version == 1)
        LAUNCH(backward_alone, blocks_for((size_t)n, 128), 128, 0, ds, dother, dweight, dout, s, add, weight,
               n, C, unit);
    else if (version == 3)
        OF_WIDTH(rmsnorm_backward_of, 0, ds, da, dweight, dout, s, add, weight, n, C, e, unit);
    else rmsnorm_backward(ds, da, dweight, dout, s, add, weight, n, C, epsilon, GRID);
}

static const Version forwards[] = {{1, "a thread a token", 8e-3, 1}, {2, "a block a token", 8e-3, 1},
    {3, "a warp a token, which is read once", 8e-3, 1},
    {4, "the block's: 16 bytes at a time", 8e-3, 1}, {0, NULL, 0, 0}};
static const Version backwards[] = {{1, "a thread a token, sums by atomics: other bits each time", 8e-3, 1},
    {3, "slices of tokens, then their sum", 8e-3, 1},
    {4, "the block's: 16 bytes at a time", 8e-3, 1}, {0, NULL, 0, 0}};
static const Shape odd[] = {{"7 x 51", {7, 51, 0, 0}}, {"70 x 1100, + activation", {70, 1100, 1, 0}},
    {"130 x 264", {130, 264, 0, 0}}, {"70 x 2048, + activation", {70, 2048, 1, 0}},
    {"5 x 4096", {5, 4096, 0, 0}}, {NULL, {0, 0, 0, 0}}};
static const Shape shapes[] = {{"16384 x 576", {16384, 576, 0, 0}}, {"+ activation", {16384, 576, 1, 0}},
    {"16384 x 2048", {16384, 2048, 0, 0}}, {NULL, {0, 0, 0, 0}}};
static const Experiment experiments[] = {
    {"RMSNorm, forward", forwards, odd, shapes, set_up_forward, reset_forward, run_forward,
     check_forward},
    {"RMSNorm, backward", backwards, odd, shapes, set_up_backward, reset_backward, run_backward,
     check_backward}};

int main(int argc, char **argv) { return run_experiments(argc, argv, experiments, 2); }
