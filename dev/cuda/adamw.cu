/*
adamw.cu: the squared norm of the gradient, and one step of AdamW with the gradient times what clips it. Nothing here is
computed but memory is read: four arrays of the size of the model.
*/
#include "common.h"

static size_t count;
static float *p, *g, *m, *v;
static double total, sums[(1 << 27) / PIECE];
static const double rate = 1e-3, beta1 = 0.9, beta2 = 0.95, decay = 0.1, scale = 0.5;
enum { STEP = 7 };

// ---- the norm

static __global__ void one_block(float *sum, const float *x, size_t count) {  // 1: an eighth of one multiprocessor's share at best
    SHARED(float, room);
    float own = 0;
    for (size_t i = threadIdx.x; i < count; i += blockDim.x) own += x[i] * x[i];
    own = block_sum(own, 0, room).x;
    if (threadIdx.x == 0) *sum = own;
}
static void run_norm(int version) {
    float sum;
    if (version == 1) {
        LAUNCH(one_block, 1, 1024, 2 * WARP * sizeof(float), partial_sums, g, count);
        to_host(&sum, partial_sums, sizeof sum);
        total = sum;
    } else {
        squares(sums, g, count), total = 0;
        for (size_t i = 0; i < pieces_in(count); i++) total += sums[i];
    }
}
static void check_norm(int version) {
    (void)version;
    double sum = 0;
    for (size_t i = 0; i < count; i++) sum += (double)number(2, i) * number(2, i);
    compare("norm", 0, total, sum, 0);
}

// ---- the step

static __global__ void in_double(float *p, const float *g, float *m, float *v, size_t count, double rate, double beta1, double beta2, double decay, double scale, int t) {
    size_t i = blockIdx.x * (size_t)blockDim.x + threadIdx.x;  // 1: as the algorithm is written, in double precision
    if (i >= count) return;
    double grad = scale * g[i];
    m[i] = (float)(beta1 * m[i] + (1 - beta1) * grad);
    v[i] = (float)(beta2 * v[i] + (1 - beta2) * grad * grad);
    p[i] = (float)(p[i] - rate * (m[i] / (1 - pow(beta1, t)) / (sqrt(v[i] / (1 - pow(beta2, t))) + 1e-8) + decay * p[i]));
}
static void run_step(int version) {
    if (version == 1) LAUNCH(in_double, blocks_for(count, THREADS), THREADS, 0, p, g, m, v, count, rate, beta1, beta2, decay, scale, STEP);
    else adamw(p, g, m, v, count, rate, beta1, beta2, decay, scale, STEP);
}
static __global__ void second_moments(float *v, size_t count) {
    size_t i = blockIdx.x * (size_t)blockDim.x + threadIdx.x;
    if (i < count) v[i] = random_at(4, i) + 1.001f;
}
static void check_step(int version) {
    (void)version;
    const float *gp = fetch(p, count), *gm = fetch(m, count), *gv = fetch(v, count);
    for (size_t i = 0; i < count; i++) {
        double grad = scale * number(2, i), m1 = beta1 * number(3, i) + (1 - beta1) * grad, v1 = beta2 * (number(4, i) + 1.001f) + (1 - beta2) * grad * grad;
        double p0 = number(1, i), move = m1 / (1 - pow(beta1, STEP)) / (sqrt(v1 / (1 - pow(beta2, STEP))) + 1e-8);
        compare("m", i, gm[i], m1, 1);
        compare("v", i, gv[i], v1, 1);
        compare("p", i, gp[i] - p0, -rate * (move + decay * p0), 1);
    }
}

static void set_up(const int *d) {
    count = (size_t)d[0];
    p = make_floats(count, 1), g = make_floats(count, 2), m = make_floats(count, 3), v = make_floats(count, 4);
}
static void set_up_norm(const int *d) { set_up(d), work_bytes = (double)count * sizeof(float); }
static void set_up_step(const int *d) { set_up(d), work_bytes = 7.0 * (double)count * sizeof(float); }
static void reset(void) {
    refill(p, count, 1), refill(m, count, 3);
    LAUNCH(second_moments, blocks_for(count, THREADS), THREADS, 0, v, count);
}

static const Version norms[] = {{1, "one block", 1e-5, 1}, {2, "the trainer's: a block for each piece", 1e-5, 1}, {0, NULL, 0, 0}};
static const Version steps_of_adamw[] = {{1, "in double precision", 1e-6, 1},
    {2, "the trainer's: float alone, what is constant outside, 16 bytes at a time", 1e-6, 1},
    {0, NULL, 0, 0}};
static const Shape odd[] = {{"40007", {40007, 0, 0, 0}}, {"40008", {40008, 0, 0, 0}}, {"3", {3, 0, 0, 0}},
    {NULL, {0, 0, 0, 0}}};
static const Shape shapes[] = {{"124 million", {124475904, 0, 0, 0}}, {NULL, {0, 0, 0, 0}}};
static const Experiment experiments[] = {
    {"squared norm", norms, odd, shapes, set_up_norm, reset, run_norm, check_norm},
    {"AdamW", steps_of_adamw, odd, shapes, set_up_step, reset, run_step, check_step}};

int main(int argc, char **argv) { return run_experiments(argc, argv, experiments, 2); }
