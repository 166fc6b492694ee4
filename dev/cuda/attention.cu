/*
attention.cu: causal attention of NH heads, from qkv (B, T, 3C).

    forward     p = softmax(scale q k^T), out (B, T, C) = p v, lse (B, NH, T) = log of the softmax's denominator
    backward    dv = p^T dout;  ds = p (dout v^T - out . dout);  dq = scale ds k;  dk = scale ds^T q
*/
#include "common.h"

static int B, T, C, NH;
static act_t *qkv, *out, *dout, *dqkv;
static float *lse;

// ---- the reference, in double precision, of sampled heads

static double x(int b, int t, int part, int h, int c) { return rounded(1, ((size_t)b * T + t) * 3*C + (size_t)(part*C + h * (C / NH) + c)); }
static double g(int b, int t, int h, int c) { return rounded(2, ((size_t)b * T + t) * C + (size_t)(h * (C / NH) + c)); }

// p (T) of a query, and the log of its denominator
static double probabilities(double *p, int b, int h, int t) {
    double highest = -1e30, sum = 0;
    int hs = C / NH;
    for (int u = 0; u <= t; u++) {
        p[u] = 0;
        for (int c = 0; c < hs; c++) p[u] += x(b, t, 0, h, c) * x(b, u, 1, h, c) / sqrt(hs);
        highest = fmax(highest, p[u]);
    }
    for (int u = 0; u <= t; u++) sum += exp(p[u] - highest);
    for (int u = 0; u <= t; u++) p[u] = exp(p[u] - highest) / sum;
    return highest + log(sum);
}
static void check_forward(int version) {
    (void)version;
    int hs = C / NH;
    size_t rows = (size_t)B * NH * T, samples = sampled(rows, (double)rows * T * hs, 200);
    const act_t *y = fetch(out, (size_t)B * T * C);
    const float *l = fetch(lse, rows);
    double *p = (double *)malloc(sizeof(double) * (size_t)T);
    for (size_t j = 0; j < samples; j++) {
        size_t row = sample(j, samples, rows);
        int t = (int)(row % T), h = (int)(row / T % NH), b = (int)(row / T / NH);
        compare("lse", row, l[row], probabilities(p, b, h, t), 1);
        for (int c = 0; c < hs; c++) {
            double sum = 0;
            size_t at = ((size_t)b * T + t) * C + (size_t)(h*hs + c);
            for (int u = 0; u <= t; u++) sum += p[u] * x(b, u, 2, h, c);
            compare("out", at, to_float(y[at]), sum, 0.1);
        }
    }
    free(p);
}
static void check_backward(int version) {
    (void)version;
    int hs = C / NH;
    const act_t *got = fetch(dqkv, (size_t)B * T * 3*C);
    double *p = (double *)malloc(sizeof(double) * (size_t)T), *d = (double *)malloc(sizeof(double) * (size_t)T * 3 * (size_t)hs);
    size_t heads = sampled((size_t)B * NH, (double)B * NH * T * T * hs, 1);
    for (size_t j = 0; j < heads; j++) {
        int b = (int)(j / NH), h = (int)(j % NH);
        memset(d, 0, sizeof(double) * (size_t)T * 3 * (size_t)hs);
        for (int t = 0; t < T; t++) {
            double delta = 0;
            probabilities(p, b, h, t);
            for (int u = 0; u <= t; u++)
                for (int c = 0; c < hs; c++) delta += p[u] * x(b, u, 2, h, c) * g(b, t, h, c);
            for (int u = 0; u <= t; u++) {
                double dp = 0;
                for (int c = 0; c < hs; c++) dp += x(b, u, 2, h, c) * g(b, t, h, c);
                for (int c = 0; c < hs; c++) {
                    double ds = p[u] * (dp - delta) / sqrt(hs);
                    d[t*3*hs + c] += ds * x(b, u, 1, h, c);
                    d[u*3*hs + hs + c] += ds * x(b, t, 0, h, c);
                    d[u*3*hs + 2*hs + c] += p[u] * g(b, t, h, c);
                }
            }
        }
        for (int t = 0; t < T; t++)
            for (int part = 0; part < 3; part++)
                for (int c = 0; c < hs; c++) {
                    size_t at = ((size_t)b * T + t) * 3*C + (size_t)(part*C + h*hs + c);
                    compare("dqkv", at, to_float(got[at]), d[t*3*hs + part*hs + c], 0.3);
                }
    }
    free(p), free(d);
}

// ---- 1: a thread a query, or a key: everything again and again from memory

static __device__ float dot_alone(const act_t *x, const act_t *y, int hs) {
    float sum = 0;
    for (int c = 0; c < hs; c++) sum += to_float(x[c]) * to_float(y[c]);
    return sum;
}
static __global__ void forward_alone(act_t *out, float *lse, const act_t *qkv, int T, int C, int NH, int hs, float scale) {
    int t = (int)(blockIdx.x * blockDim.x + threadIdx.x), b = (int)blockIdx.y / NH, h = (int)blockIdx.y % NH;
    const act_t *all = qkv + (size_t)b * T * 3*C + h*hs, *q = all + (size_t)t * 3*C;
    float highest = -1e30f, sum = 0;
    if (t >= T) return;
    for (int u = 0; u <= t; u++) highest = fmaxf(highest, scale * dot_alone(q, all + (size_t)u * 3*C + C, hs));
    for (int u = 0; u <= t; u++) sum += __expf(scale * dot_alone(q, all + (size_t)u * 3*C + C, hs) - highest);
    for (int c = 0; c < hs; c++) {
        float o = 0;
        for (int u = 0; u <= t; u++) o += __expf(scale * dot_alone(q, all + (size_t)u * 3*C + C, hs) - highest) * to_float(all[(size_t)u * 3*C + 2*C + c]);
        set(out + ((size_t)b * T + t) * C + h*hs + c, o / sum);
    }
    lse[(size_t)blockIdx.y * T + t] = highest + logf(sum);
}
// ---- 2: the scores once a query, in registers of a warp: a lane a channel, the softmax carried along. Sums over lanes take the time.

static __global__ void forward_warp(act_t *out, float *lse, const act_t *qkv, int T, int C, int NH, int hs, float scale) {
    int t = (int)(blockIdx.x * (blockDim.x / WARP) + threadIdx.x / WARP), lane = threadIdx.x % WARP, b = (int)blockIdx.y / NH, h = (int)blockIdx.y % NH;
    const act_t *all = qkv + (size_t)b * T * 3*C + h*hs, *q = all + (size_t)t * 3*C;
    float o[4] = {}, highest = -1e30f, sum = 0;
    if (t >= T) return;
    for (int u = 0; u <= t; u++) {
        const act_t *k = all + (size_t)u * 3*C + C, *v = k + C;
        float s = 0;
        for (int c = lane; c < hs; c += WARP) s += to_float(q[c]) * to_float(k[c]);
        s = warp_sum(s) * scale;
        float higher = fmaxf(highest, s), shrink = __expf(highest - higher), p = __expf(s - higher);
        sum = sum * shrink + p;
        for (int i = 0, c = lane; i < 4 && c < hs; i++, c += WARP) o[i] = o[i] * shrink + p * to_float(v[c]);
        highest = higher;
    }
    for (int i = 0, c = lane; i < 4 && c < hs; i++, c += WARP) set(out + ((size_t)b * T + t) * C + h*hs + c, o[i] / sum);
    if (lane == 0) lse[(size_t)blockIdx.y * T + t] = highest + logf(sum);
}

// backward, 1: a warp a query, which adds to keys and values by atomics, in float32
static float *sums;  // (B, T, 3C)
static __global__ void backward_atomics(float *d, const act_t *dout, const act_t *qkv, const act_t *out, const float *lse, int T, int C, int NH, int hs, float scale) {
    int t = (int)(blockIdx.x * (blockDim.x / WARP) + threadIdx.x / WARP), lane = threadIdx.x % WARP, b = (int)blockIdx.y / NH, h = (int)blockIdx.y % NH;
    size_t first = (size_t)b * T * 3*C + (size_t)(h*hs);
    if (t >= T) return;
    const act_t *q = qkv + first + (size_t)t * 3*C, *dy = dout + ((size_t)b * T + t) * C + h*hs, *y = out + ((size_t)b * T + t) * C + h*hs;
    float delta = 0;
    for (int c = lane; c < hs; c += WARP) delta += to_float(dy[c]) * to_float(y[c]);
    delta = warp_sum(delta);
    for (int u = 0; u <= t; u++) {
        const act_t *k = qkv + first + (size_t)u * 3*C + C, *v = k + C;
        float s = 0, dp = 0;
        for (int c = lane; c < hs; c += WARP) s += to_float(q[c]) * to_float(k[c]), dp += to_float(dy[c]) * to_float(v[c]);
        float p = __expf(warp_sum(s) * scale - lse[(size_t)blockIdx.y * T + t]), ds = p * (warp_sum(dp) - delta) * scale;
        for (int c = lane; c < hs; c += WARP) {
            d[first + (size_t)t * 3*C + c] += ds * to_float(k[c]);
            atomicAdd(d + first + (size_t)u * 3*C + C + c, ds * to_float(q[c]));
            atomicAdd(d + first + (size_t)u * 3*C + 2*C + c, p * to_float(dy[c]));
        }
    }
}

// 3 forward, 2 backward: the trainer's tiles, but 16 rows a warp, whatever its M. What is read from shared memory is multiplied once.
#define OF_SIZE_ALONE(f, ...) do { \
        if (hs % 8) f<32, 0, 1>(__VA_ARGS__); \
        else if (hs <= 64) f<64, 1, 1>(__VA_ARGS__); \
        else f<128, 1, 1>(__VA_ARGS__); \
    } while (0)

// ---- the experiments

static void set_up(const int *d) {
    B = d[0], T = d[1], C = d[2], NH = d[3];
    size_t N = (size_t)B * T;
    qkv = make_activations(N * 3*C, 1), dout = make_activations(N * C, 2), out = make_activations(N * C, 0), dqkv = make_activations(N * 3*C, 0);
    lse = make_floats(N * NH, 0), sums = make_floats(N * 3*C, 0);
    work_flops = 2.0 * B * T * T * C;
}
static void set_up_backward(const int *d) {
    set_up(d);
    attention_forward(out, lse, qkv, B, T, C, NH, NH, NH);
    work_flops *= 2.5;
}
static void reset_forward(void) { spoil(out, (size_t)B * T * C * sizeof(act_t)), spoil(lse, (size_t)B * T * NH * sizeof(float)); }
static void reset_backward(void) { spoil(dqkv, (size_t)B * T * 3*C * sizeof(act_t)); }
static void run_forward(int version) {
    int hs = C / NH;
    float scale = (float)(1 / sqrt((double)hs));
    dim3 threads(blocks_for((size_t)T, 128), (unsigned)(B * NH)), warps(blocks_for((size_t)T, THREADS / WARP), (unsigned)(B * NH));
    if (version == 1) LAUNCH(forward_alone, threads, 128, 0, out, lse, qkv, T, C, NH, hs, scale);
    else if (version == 2) LAUNCH(forward_warp, warps, THREADS, 0, out, lse, qkv, T, C, NH, hs, scale);
    else if (version == 3) OF_SIZE_ALONE(attention_forward_of, out, lse, qkv, B, T, C, NH, NH, NH);
    else attention_forward(out, lse, qkv, B, T, C, NH, NH, NH);
}
static void run_backward(int version) {
    int hs = C / NH;
    size_t count = (size_t)B * T * 3*C;
    dim3 warps(blocks_for((size_t)T, THREADS / WARP), (unsigned)(B * NH));
    if (version == 2) {
        float2 *rows = (float2 *)(void *)partial_sums;
        LAUNCH(delta_kernel, blocks_for((size_t)B * T * NH, THREADS / 8), THREADS, 0, rows, lse, out, dout, B * T, T, heads_of(C, NH, NH, NH), hs % 8 == 0);
        OF_SIZE_ALONE(attention_backward_of, dqkv, dout, qkv, rows, B, T, C, NH, NH, NH);
    }
    if (version > 2) attention_backward(dqkv, dout, qkv, out, lse, B, T, C, NH, NH, NH);
    if (version > 1) return;
    CUDA(cudaMemset(sums, 0, count * sizeof(float)));
    LAUNCH(backward_atomics, warps, THREADS, 0, sums, dout, qkv, out, lse, T, C, NH, hs, (float)(1 / sqrt((double)hs)));
    scale_cast(dqkv, sums, 1, count);
}

static const Version forwards[] = {{1, "a thread a query", 2e-2, 1}, {2, "a warp a query, the softmax carried along", 2e-2, 1},
                                   {3, "tiles of 64 keys on tensor cores, the next one on its way; 16 queries a warp", 2e-2, 1},
                                   {4, "the trainer's: 32 queries a warp, half the reads from shared memory", 2e-2, 1}, {0, NULL, 0, 0}};
static const Version backwards[] = {{1, "a warp a query, sums by atomics: other bits each time", 2e-2, 1},
                                    {2, "tiles on tensor cores, once along queries, once along keys; 16 rows a warp", 2e-2, 1},
                                    {3, "the trainer's: 32 rows a warp where registers hold them", 2e-2, 1}, {0, NULL, 0, 0}};
static const Shape odd[] = {{"2 x 67, heads of 20", {2, 67, 40, 2}}, {"1 x 130, of 64", {1, 130, 64, 1}}, {"1 x 200, of 24", {1, 200, 48, 2}},
                            {"1 x 70, of 128", {1, 70, 128, 1}}, {NULL, {0, 0, 0, 0}}};
static const Shape shapes[] = {{"16 x 1024, 12 heads of 64", {16, 1024, 768, 12}}, {"4 x 4096", {4, 4096, 768, 12}}, {"heads of 128", {16, 1024, 768, 6}}, {NULL, {0, 0, 0, 0}}};
static const Experiment experiments[] = {
    {"attention, forward", forwards, odd, shapes, set_up, reset_forward, run_forward, check_forward},
    {"attention, backward", backwards, odd, shapes, set_up_backward, reset_backward, run_backward, check_backward}};

int main(int argc, char **argv) { return run_experiments(argc, argv, experiments, 2); }
