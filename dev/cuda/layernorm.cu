/*
layernorm.cu: layernorm of x = s + add, straight from a stream s in fixed point, to an activation; C channels a token.

    forward     out = (x - mean) rstd weight + bias
    backward    ds, dother += the gradient in x;  dweight, dbias (C) += sums over all tokens
*/
#include "common.h"

static int n, C;
enum { GRID = 20 };
static stream_t *s;
static act_t *add, *out, *dout, *dother;
static float *weight, *bias, *ds, *dweight, *dbias;

// ---- the reference, in double precision

static int32_t fixed_at(size_t i) { return (int32_t)((1 + 2 * number(1, i)) * (1 << GRID)); }
static double value(size_t i) { return ldexp(fixed_at(i), -GRID) + (add ? rounded(2, i) : 0); }
static void statistics(size_t at, double *mean, double *rstd) {
    double sum = 0, squares = 0;
    for (size_t c = 0; c < (size_t)C; c++) sum += value(at + c);
    for (size_t c = 0; c < (size_t)C; c++) squares += pow(value(at + c) - sum / C, 2);
    *mean = sum / C;
    *rstd = 1 / sqrt(squares / C + 1e-5);
}
static void check_forward(int version) {
    (void)version;
    size_t K = (size_t)C, samples = sampled((size_t)n, (double)n * C, 300);
    const act_t *y = fetch(out, (size_t)n * K);
    for (size_t j = 0; j < samples; j++) {
        double mean, rstd;
        size_t at = sample(j, samples, (size_t)n) * K;
        statistics(at, &mean, &rstd);
        for (size_t c = 0; c < K; c++) compare("out", at + c, to_float(y[at + c]), (value(at + c) - mean) * rstd * number(3, c) + number(4, c), 1);
    }
}
static void check_backward(int version) {
    (void)version;
    size_t K = (size_t)C;
    double mean, rstd, *dw = (double *)calloc(2 * K, sizeof(double)), *db = dw + K;
    const float *dx = fetch(ds, (size_t)n * K), *got_w = fetch(dweight, K), *got_b = fetch(dbias, K);
    const act_t *da = add ? fetch(dother, (size_t)n * K) : NULL;
    for (size_t i = 0; i < (size_t)n; i++) {
        double sum = 0, sum_x = 0;
        statistics(i*K, &mean, &rstd);
        for (size_t c = 0; c < K; c++) {
            double d = rounded(5, i*K + c), x = (value(i*K + c) - mean) * rstd;
            dw[c] += d * x, db[c] += d;
            sum += d * number(3, c) / C, sum_x += d * number(3, c) * x / C;
        }
        for (size_t c = 0; c < K; c++) {
            double g = (rounded(5, i*K + c) * number(3, c) - sum - (value(i*K + c) - mean) * rstd * sum_x) * rstd;
            compare("ds", i*K + c, dx[i*K + c], number(6, i*K + c) + g, 1);
            if (add) compare("dother", i*K + c, to_float(da[i*K + c]), rounded(7, i*K + c) + g, 1);
        }
    }
    for (size_t c = 0; c < K; c++) {
        compare("dweight", c, got_w[c], number(8, c) + dw[c], sqrt(n));
        compare("dbias", c, got_b[c], number(9, c) + db[c], sqrt(n));
    }
    free(dw);
}

// ---- 1: a thread a token. Neighbouring threads read C elements apart: each 32-byte sector is fetched for one element.

static __device__ float2 statistics_alone(const stream_t *x, const act_t *a, int C, float unit) {
    float2 y = {0, 0};
    for (int c = 0; c < C; c++) y.x += stream_value(x[c], unit) + (a ? to_float(a[c]) : 0);
    y.x /= (float)C;
    for (int c = 0; c < C; c++) {
        float d = stream_value(x[c], unit) + (a ? to_float(a[c]) : 0) - y.x;
        y.y += d * d;
    }
    y.y = 1 / sqrtf(y.y / (float)C + 1e-5f);
    return y;
}
static __device__ float token_element(const stream_t *s, const act_t *add, size_t at, float unit) {
    return stream_value(s[at], unit) + (add ? to_float(add[at]) : 0);
}
static __global__ void forward_alone(act_t *out, const stream_t *s, const act_t *add, const float *weight, const float *bias, int n, int C, float unit) {
    size_t at = (blockIdx.x * (size_t)blockDim.x + threadIdx.x) * (size_t)C;
    if (at >= (size_t)n * (size_t)C) return;
    float2 y = statistics_alone(s + at, add ? add + at : NULL, C, unit);
    for (int c = 0; c < C; c++) set(out + at + c, (token_element(s, add, at + (size_t)c, unit) - y.x) * y.y * weight[c] + bias[c]);
}
static __global__ void backward_alone(float *ds, act_t *dother, float *dweight, float *dbias, const act_t *dout, const stream_t *s, const act_t *add,
                                      const float *weight, int n, int C, float unit) {
    size_t at = (blockIdx.x * (size_t)blockDim.x + threadIdx.x) * (size_t)C;
    if (at >= (size_t)n * (size_t)C) return;
    float2 y = statistics_alone(s + at, add ? add + at : NULL, C, unit);
    float sum = 0, sum_x = 0;
    for (int c = 0; c < C; c++) {
        float d = to_float(dout[at + (size_t)c]), x = (token_element(s, add, at + (size_t)c, unit) - y.x) * y.y;
        atomicAdd(dweight + c, d * x);
        atomicAdd(dbias + c, d);
        sum += d * weight[c], sum_x += d * weight[c] * x;
    }
    for (int c = 0; c < C; c++) {
        float x = (token_element(s, add, at + (size_t)c, unit) - y.x) * y.y;
        float dx = (to_float(dout[at + (size_t)c]) * weight[c] - sum / (float)C - x * sum_x / (float)C) * y.y;
        ds[at + (size_t)c] += dx;
        if (add) set(dother + at + c, to_float(dother[at + (size_t)c]) + dx);
    }
}

// ---- 2: a block a token: neighbours read neighbours, but most of the time goes into sums over the block and its barriers

static __global__ void forward_block(act_t *out, const stream_t *s, const act_t *add, const float *weight, const float *bias, int C, float unit) {
    SHARED(float, room);
    size_t at = blockIdx.x * (size_t)C;
    float sum = 0, squares = 0;
    for (int c = (int)threadIdx.x; c < C; c += (int)blockDim.x) sum += token_element(s, add, at + (size_t)c, unit);
    float mean = block_sum(sum, 0, room).x / (float)C;
    for (int c = (int)threadIdx.x; c < C; c += (int)blockDim.x) {
        float d = token_element(s, add, at + (size_t)c, unit) - mean;
        squares += d * d;
    }
    float rstd = 1 / sqrtf(block_sum(squares, 0, room).x / (float)C + 1e-5f);
    for (int c = (int)threadIdx.x; c < C; c += (int)blockDim.x) set(out + at + c, (token_element(s, add, at + (size_t)c, unit) - mean) * rstd * weight[c] + bias[c]);
}

// ---- 3: a warp a token, whose lanes keep their columns in registers: read once, but by 4 and 2 bytes, so
// that instructions take the time. The trainer's, where C is no multiple of 8

// ---- 4: the trainer's, 16 bytes at a time: a lane has runs of 8 neighbouring columns

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
    weight = make_floats((size_t)C, 3), bias = make_floats((size_t)C, 4), dout = make_activations(count, 5), out = make_activations(count, 0);
    ds = make_floats(count, 6), dother = make_activations(count, 7), dweight = make_floats((size_t)C, 8), dbias = make_floats((size_t)C, 9);
}
static void set_up_forward(const int *d) { set_up(d), work_bytes = (double)n * C * (4 + (d[2] ? 2 : 1) * sizeof(act_t)); }
static void set_up_backward(const int *d) { set_up(d), work_bytes = (double)n * C * (12 + (d[2] ? 4 : 1) * sizeof(act_t)); }
static void reset_forward(void) { spoil(out, (size_t)n * (size_t)C * sizeof(act_t)); }
static void reset_backward(void) {
    size_t count = (size_t)n * (size_t)C;
    refill(ds, count, 6), refill(dother, count, 7), refill(dweight, (size_t)C, 8), refill(dbias, (size_t)C, 9);
}
static void run_forward(int version) {
    float unit = grid_unit(GRID);
    if (version == 1) LAUNCH(forward_alone, blocks_for((size_t)n, 128), 128, 0, out, s, add, weight, bias, n, C, unit);
    else if (version == 2) LAUNCH(forward_block, (unsigned)n, THREADS, 2 * WARP * sizeof(float), out, s, add, weight, bias, C, unit);
    else if (version == 3) OF_WIDTH(layernorm_forward_of, 0, out, s, add, weight, bias, n, C, unit);
    else layernorm_forward(out, s, add, weight, bias, n, C, GRID);
}
static void run_backward(int version) {
    if (version == 1)
        LAUNCH(backward_alone, blocks_for((size_t)n, 128), 128, 0, ds, dother, dweight, dbias, dout, s, add, weight, n, C, grid_unit(GRID));
    else if (version == 3) OF_WIDTH(layernorm_backward_of, 0, ds, add ? dother : NULL, dweight, dbias, dout,
        s, add, weight, n, C, grid_unit(GRID));
    else layernorm_backward(ds, add ? dother : NULL, dweight, dbias, dout, s, add, weight, n, C, GRID);
}

static const Version forwards[] = {{1, "a thread a token", 8e-3, 1}, {2, "a block a token", 8e-3, 1},
                                   {3, "a warp a token, which is read once", 8e-3, 1},
                                   {4, "the trainer's: 16 bytes at a time", 8e-3, 1}, {0, NULL, 0, 0}};
static const Version backwards[] = {{1, "a thread a token, sums by atomics: other bits each time", 8e-3, 1},
    {3, "slices of tokens, then their sum", 8e-3, 1},
    {4, "the trainer's: 16 bytes at a time", 8e-3, 1}, {0, NULL, 0, 0}};
static const Shape odd[] = {{"7 x 51", {7, 51, 0, 0}}, {"70 x 1100, + activation", {70, 1100, 1, 0}},
    {"130 x 264", {130, 264, 0, 0}}, {"70 x 1600, + activation", {70, 1600, 1, 0}}, {NULL, {0, 0, 0, 0}}};
static const Shape shapes[] = {{"16384 x 768", {16384, 768, 0, 0}}, {"+ activation", {16384, 768, 1, 0}}, {"16384 x 1600", {16384, 1600, 1, 0}}, {NULL, {0, 0, 0, 0}}};
static const Experiment experiments[] = {
    {"layernorm, forward", forwards, odd, shapes, set_up_forward, reset_forward, run_forward, check_forward},
    {"layernorm, backward", backwards, odd, shapes, set_up_backward, reset_backward, run_backward, check_backward}};

int main(int argc, char **argv) { return run_experiments(argc, argv, experiments, 2); }
