/*
matmul.cu: the products of training: out (n, OC) = inp (n, C) weight (OC, C)^T + bias, and their gradients; GELU after one of them.

    forward     pre = inp weight^T + bias, out = GELU(pre)
    backward    dinp (n, C) = dout weight times GELU'(pre);  dweight += dout^T inp;  dbias += sum of dout over tokens
*/
#include "common.h"

static int n, C, OC, with_gelu;
static act_t *inp, *dout, *out, *pre, *dinp, *pre_inp;
static float *weights_bias, *dweight, *dbias;

// ---- the reference, in double precision, of sampled elements

static double gelu_of(double x) { return 0.5 * x * (1 + tanh(0.7978845608028654 * (x + 0.044715 * x * x * x))); }
static double gelu_slope_of(double x) {
    double t = tanh(0.7978845608028654 * (x + 0.044715 * x * x * x));
    return 0.5 * (1 + t) + 0.5 * x * (1 - t * t) * 0.7978845608028654 * (1 + 3 * 0.044715 * x * x);
}
static void check_forward(int version) {
    (void)version;
    size_t count = (size_t)n * OC, samples = sampled(count, (double)count * C, 2000);
    const act_t *y = fetch(out, count), *p = fetch(pre, count);
    for (size_t j = 0; j < samples; j++) {
        size_t at = sample(j, samples, count), r = at / OC, o = at % OC;
        double sum = rounded(2, (size_t)OC * C + o);
        for (size_t c = 0; c < (size_t)C; c++) sum += (double)rounded(1, r*C + c) * rounded(2, o*C + c);
        if (with_gelu) compare("pre", at, to_float(p[at]), sum, sqrt(C) / 10), sum = gelu_of(sum);
        compare("out", at, to_float(y[at]), sum, sqrt(C) / 10);
    }
}
static void check_backward(int version) {
    (void)version;
    size_t count = (size_t)n * C, samples = sampled(count, (double)count * OC, 2000), wide = (size_t)OC * C;
    const act_t *d = fetch(dinp, count);
    for (size_t j = 0; j < samples; j++) {
        size_t at = sample(j, samples, count), r = at / C, c = at % C;
        double sum = 0;
        for (size_t o = 0; o < (size_t)OC; o++) sum += (double)rounded(3, r*OC + o) * rounded(2, o*C + c);
        compare("dinp", at, to_float(d[at]), with_gelu ? sum * gelu_slope_of(rounded(4, at)) : sum, sqrt(OC) / 10);
    }
    const float *w = fetch(dweight, wide), *b = fetch(dbias, (size_t)OC);
    samples = sampled(wide, (double)wide * n, 500);
    for (size_t j = 0; j < samples; j++) {
        size_t at = sample(j, samples, wide), o = at / C, c = at % C;
        double sum = number(5, at), sum_b = number(6, o);
        for (size_t r = 0; r < (size_t)n; r++) {
            sum += (double)rounded(3, r*OC + o) * rounded(1, r*C + c);
            sum_b += rounded(3, r*OC + o);
        }
        compare("dweight", at, w[at], sum, sqrt(n));
        compare("dbias", o, b[o], sum_b, sqrt(n));
    }
}

// ---- 1: a thread an element, which reads its row and its column: the trainer's way with shapes that the library does not take
// ---- 2: the library's product, then passes for bias and GELU, 2 bytes a thread

static __global__ void bias_gelu(act_t *out, act_t *pre, const act_t *bias, size_t count, int OC) {
    size_t i = blockIdx.x * (size_t)blockDim.x + threadIdx.x;
    if (i >= count) return;
    float x = to_float(out[i]) + to_float(bias[i % (size_t)OC]);
    if (pre) set(pre + i, x), x = gelu(x);
    set(out + i, x);
}
static __global__ void times_slope(act_t *dinp, const act_t *pre, size_t count) {
    size_t i = blockIdx.x * (size_t)blockDim.x + threadIdx.x;
    if (i < count) set(dinp + i, to_float(dinp[i]) * gelu_slope(to_float(pre[i])));
}
static __global__ void sums_alone(float *partial, const act_t *x, int n, int columns) {
    size_t c = blockIdx.y * (size_t)blockDim.x + threadIdx.x, slice = blockIdx.x;
    float sum = 0;
    if (c >= (size_t)columns) return;
    for (size_t i = slice_begin((size_t)n, slice); i < slice_begin((size_t)n, slice + 1); i++)
        sum += to_float(x[i * (size_t)columns + c]);
    partial[slice * (size_t)columns + c] = sum;
}
static void bias_gradient(int slices) {
    LAUNCH(sums_alone, dim3((unsigned)slices, blocks_for((size_t)OC, THREADS)), THREADS, 0, partial_sums,
        dout, n, OC);
    sum_of_rows(dbias, NULL, partial_sums, slices, OC);
}

// ---- 3: bias in the library's ending, GELU a pass of 16 bytes a thread: the trainer's way but on some cards
// in bf16
// ---- 4: GELU in the library's ending as well, where the trainer has it so

// ---- the experiments

static void set_up(const int *d) {
    n = d[0], C = d[1], OC = d[2], with_gelu = d[3];
    size_t nC = (size_t)n * C, nOC = (size_t)n * OC, wide = (size_t)OC * C;
    inp = make_activations(nC, 1), dout = make_activations(nOC, 3), pre_inp = make_activations(nC, 4);
    out = make_activations(nOC, 0), pre = make_activations(nOC, 0), dinp = make_activations(nC, 0);
    weights_bias = make_floats(wide + OC, 2), dweight = make_floats(wide, 5), dbias = make_floats((size_t)OC, 6);
    layers_weights(weights_bias, allocate((wide + OC) * sizeof(act_t)), wide + OC);
    work_flops = 2.0 * n * C * OC;
}
static void set_up_backward(const int *d) { set_up(d), work_flops *= 2; }
static void reset_forward(void) { spoil(out, (size_t)n * OC * sizeof(act_t)), spoil(pre, (size_t)n * OC * sizeof(act_t)); }
static void reset_backward(void) {
    spoil(dinp, (size_t)n * C * sizeof(act_t));
    refill(dweight, (size_t)OC * C, 5), refill(dbias, (size_t)OC, 6);
}
static void run_forward(int version) {
    const float *bias = weights_bias + (size_t)OC * C;
    size_t count = (size_t)n * OC;
    Product s = {OC, n, C, 1, 0, 0, CUBLASLT_EPILOGUE_BIAS, C, OC};
    act_t *to = with_gelu ? pre : out;
    const act_t *w = copy_of(weights_bias), *b = copy_of(bias);
    if (version == 1) LAUNCH(product_kernel, blocks_for(count, THREADS), THREADS, 0, s, to, w, inp, b);
    else if (version == 3) matmul_forward(to, inp, weights_bias, bias, n, C, OC, OC);
    else if (version == 2) {
        matmul_forward(out, inp, weights_bias, NULL, n, C, OC, OC);
        LAUNCH(bias_gelu, blocks_for(count, THREADS), THREADS, 0, out, with_gelu ? pre : NULL, copy_of(bias), count, OC);
    } else if (with_gelu) matmul_gelu_forward(out, pre, inp, weights_bias, bias, n, C, OC);
    else matmul_forward(out, inp, weights_bias, bias, n, C, OC, OC);
    if (version % 2 && with_gelu) gelu_pass<0>(out, pre, count);
}
static void run_backward(int version) {
    const act_t *slope = with_gelu ? pre_inp : NULL;
    size_t count = (size_t)n * C;
    if (version == 1) {
        const act_t *copy = copy_of(weights_bias);
        Product in = {C, n, OC, 0, 0, 0, CUBLASLT_EPILOGUE_DEFAULT, OC, C};
        Product w = {C, OC, n, 0, 1, 1, CUBLASLT_EPILOGUE_DEFAULT, OC, C};
        LAUNCH(product_kernel, blocks_for(count, THREADS), THREADS, 0, in, dinp, copy, dout, NULL);
        LAUNCH(product_kernel, blocks_for((size_t)OC * C, THREADS), THREADS, 0, w, dweight, inp, dout, NULL);
    } else if (version == 4) matmul_backward(dinp, dweight, dbias, dout, inp, weights_bias, slope, n, C, OC, OC);
    else matmul_backward(dinp, dweight, version == 2 ? NULL : dbias, dout, inp, weights_bias, NULL, n, C, OC, OC);
    if (version < 3) bias_gradient(version == 1 ? 1 : slices_of((size_t)n, 64));
    if (version < 3 && slope) LAUNCH(times_slope, blocks_for(count, THREADS), THREADS, 0, dinp, slope, count);
    if (version == 3 && slope) gelu_pass<1>(dinp, slope, count);
}

static const Version forwards[] = {{1, "a thread an element", 2e-2, 1}, {2, "the library, then passes for bias and GELU", 2e-2, 1},
    {3, "bias in the library's ending, GELU 16 bytes at a time", 2e-2, 1},
    {4, "the trainer's: GELU in the library's ending, where that is fast", 2e-2, 1}, {0, NULL, 0, 0}};
static const Version backwards[] = {{1, "a thread an element", 2e-2, 1},
    {2, "the library, then passes for GELU' and dbias", 2e-2, 1},
    {3, "passes of 16 bytes at a time", 2e-2, 1},
    {4, "the trainer's: GELU' in the library's ending, where that is fast", 2e-2, 1}, {0, NULL, 0, 0}};
static const Shape odd[] = {
    {"70 x 51 to 33, GELU", {70, 51, 33, 1}}, {"33 x 64 to 96, GELU", {33, 64, 96, 1}},
    {"33 x 96 to 64, GELU", {33, 96, 64, 1}}, {"130 x 64 to 1088, GELU", {130, 64, 1088, 1}},
    {"40 x 32 to 8", {40, 32, 8, 0}}, {NULL, {0, 0, 0, 0}}};
static const Shape shapes[] = {{"768 to 768", {16384, 768, 768, 0}}, {"768 to 2304", {16384, 768, 2304, 0}}, {"768 to 3072, GELU", {16384, 768, 3072, 1}},
                               {"3072 to 768", {16384, 3072, 768, 0}}, {"768 to 50304", {8192, 768, 50304, 0}}, {NULL, {0, 0, 0, 0}}};
static const Shape backward_shapes[] = {{"768 to 768", {16384, 768, 768, 0}}, {"768 to 2304", {16384, 768, 2304, 0}}, {"768 to 3072", {16384, 768, 3072, 0}},
                                        {"3072 to 768, GELU'", {16384, 3072, 768, 1}}, {"768 to 50304", {8192, 768, 50304, 0}}, {NULL, {0, 0, 0, 0}}};
static const Experiment experiments[] = {
    {"product, forward", forwards, odd, shapes, set_up, reset_forward, run_forward, check_forward},
    {"products, backward", backwards, odd, backward_shapes, set_up_backward, reset_backward, run_backward, check_backward}};

int main(int argc, char **argv) { return run_experiments(argc, argv, experiments, 2); }
