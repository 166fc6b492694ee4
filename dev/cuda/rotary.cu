/*
rotary.cu: in each head of queries and keys, channels c and c + HS/2 are a pair that turns by the angle of its
place t, t base^(-2c/HS). Rows of x are those of qkv: values, behind the heads that turn, stay as they are.
*/
#define REV_GPT2_BLOCK "dev/llama/block.h"
#include "common.h"

static const double base = 10000;
static int n, T, heads, HS, width, direction;
static act_t *x;
static float *table;

// ---- the reference, in double precision

static void check(int version) {
    (void)version;
    size_t K = (size_t)width, half = (size_t)HS / 2, samples = sampled((size_t)n, (double)n * width, 300);
    const act_t *y = fetch(x, (size_t)n * K);
    for (size_t j = 0; j < samples; j++) {
        size_t i = sample(j, samples, (size_t)n);
        for (size_t column = 0; column < K; column++) {
            size_t at = i*K + column, c = column % (size_t)HS, second = c >= half;
            double turn = direction * (double)(i % (size_t)T) * pow(base, -2.0 * (double)(c % half) / HS);
            double should = rounded(1, at), other = rounded(1, second ? at - half : at + half);
            if (column < (size_t)(heads * HS))
                should = should * cos(turn) + (second ? 1 : -1) * other * sin(turn);
            compare("x", at, to_float(y[at]), should, 1);
        }
    }
}

// ---- 1: a thread a pair, whose angle it makes: in float, as double is slow on most cards

static __global__ void turn_alone(act_t *x, size_t pairs, int T, int heads, int HS, int width, float base,
                                  float sign) {
    const size_t i = blockIdx.x * (size_t)blockDim.x + threadIdx.x, half = (size_t)HS / 2, c = i % half;
    if (i >= pairs) return;
    const size_t head = i / half % (size_t)heads, token = i / half / (size_t)heads;
    act_t *a = x + token * (size_t)width + head * (size_t)HS + c;
    const float angle = (float)(token % (size_t)T) * powf(base, -2.0f * (float)c / (float)HS);
    const float cosine = cosf(angle), sine = sign * sinf(angle), u = to_float(a[0]), v = to_float(a[half]);
    set(a, u * cosine - v * sine);
    set(a + half, v * cosine + u * sine);
}

// ---- 2: a thread a pair, whose angle is in a table; 3: a thread eight pairs, 16 bytes at a time

// ---- the experiment

static void set_up(const int *d) {
    n = d[0], T = d[1], heads = d[2], HS = d[3], width = d[2] * d[3] + 3 * d[3];
    direction = d[4];
    x = make_activations((size_t)n * (size_t)width, 1), table = make_floats((size_t)T * (size_t)HS, 0);
    rotary_table(table, 0, T, HS, base);
    work_bytes = 2.0 * n * heads * HS * sizeof(act_t);
}
static void reset(void) { refill(x, (size_t)n * (size_t)width, 1); }
static void run(int version) {
    const size_t pairs = (size_t)n * (size_t)heads * (size_t)(HS / 2);
    const float sign = (float)direction;
    if (version == 1)
        LAUNCH(turn_alone, blocks_for(pairs, THREADS), THREADS, 0, x, pairs, T, heads, HS, width, (float)base,
               sign);
    else if (version == 2)
        LAUNCH(rotary_kernel<1>, blocks_for(pairs, THREADS), THREADS, 0, x, table, pairs, T, heads, HS, width,
               sign);
    else rotary_turn(x, table, n, T, heads, HS, width, direction);
}

static const Version versions[] = {{1, "cos and sin for each pair, in float", 8e-3, 1},
    {2, "a table of all places", 8e-3, 1}, {3, "the block's: 16 bytes at a time", 8e-3, 1}, {0, NULL, 0, 0}};
// n, T, heads that turn, HS, direction
static const Shape odd[] = {{"14 of 7, forward", {14, 7, 3, 10, 1}},
    {"130 of 65, back", {130, 65, 5, 16, -1}}, {"40 of 40, wide", {40, 40, 2, 128, 1}}, {NULL, {0, 0, 0, 0}}};
static const Shape shapes[] = {{"16384, 12 heads", {16384, 2048, 12, 64, 1}},
    {"back", {16384, 2048, 12, 64, -1}}, {"36 heads", {16384, 2048, 36, 64, 1}}, {NULL, {0, 0, 0, 0}}};
static const Experiment experiments[] = {{"rotary", versions, odd, shapes, set_up, reset, run, check}};

int main(int argc, char **argv) { return run_experiments(argc, argv, experiments, 1); }
