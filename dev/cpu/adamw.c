/*
adamw.c: the squared norm of the gradient, and one step of AdamW with the gradient times what clips it. Nothing here is
computed but memory is read: four arrays of the size of the model.
*/
#include "common.h"

static size_t count;
static real_t *p, *g, *m, *v, *a, *b;
static double norm, sums[(1 << 24) / PIECE];
static const double rate = 1e-3, beta1 = 0.9, beta2 = 0.95, decay = 0.1, scale = 0.5;
enum { STEP = 7 };

// ---- the norm

static void run_norm(int version) {
    if (version == 1) {
        norm = 0;
        for (size_t i = 0; i < count; i++) norm += (double)g[i] * g[i];  // one chain of additions: each waits for the last
    } else if (version == 2) {
        double sum = 0;
        #pragma omp parallel for simd reduction(+:sum)
        for (size_t i = 0; i < count; i++) sum += (double)g[i] * g[i];
        norm = sum;
    } else {
        squares(sums, g, count), norm = 0;
        for (size_t i = 0; i < pieces_in(count); i++) norm += sums[i];
    }
}
static void check_norm(int version) {
    (void)version;
    long double sum = 0;
    for (size_t i = 0; i < count; i++) sum += (long double)g[i] * g[i];
    compare("norm", 0, norm, (double)sum, 0);
}

// ---- the step

static void passes(void) {  // each line of the algorithm a pass
    for (size_t i = 0; i < count; i++) a[i] = (real_t)scale * g[i];
    for (size_t i = 0; i < count; i++) m[i] = (real_t)beta1 * m[i] + (real_t)(1 - beta1) * a[i];
    for (size_t i = 0; i < count; i++) v[i] = (real_t)beta2 * v[i] + (real_t)(1 - beta2) * a[i] * a[i];
    for (size_t i = 0; i < count; i++) a[i] = m[i] / (real_t)(1 - pow(beta1, STEP));
    for (size_t i = 0; i < count; i++) b[i] = v[i] / (real_t)(1 - pow(beta2, STEP));
    for (size_t i = 0; i < count; i++) p[i] -= (real_t)(rate * decay) * p[i];
    for (size_t i = 0; i < count; i++) p[i] -= (real_t)rate * a[i] / (sqrtf(b[i]) + 1e-8f);
}
static void one_pass(void) {  // in double precision wherever C makes it so
    #pragma omp parallel for
    for (size_t i = 0; i < count; i++) {
        double grad = scale * g[i];
        m[i] = (real_t)(beta1 * m[i] + (1 - beta1) * grad);
        v[i] = (real_t)(beta2 * v[i] + (1 - beta2) * grad * grad);
        double mean = m[i] / (1 - pow(beta1, STEP)), square = v[i] / (1 - pow(beta2, STEP));
        p[i] = (real_t)(p[i] - rate * (mean / (sqrt(square) + 1e-8) + decay * p[i]));
    }
}
static void run_step(int version) {
    if (version == 1) passes();
    else if (version == 2) one_pass();
    else adamw(p, g, m, v, count, rate, beta1, beta2, decay, scale, STEP);
}
static real_t second_moment(size_t i) { return random_at(4, i) + (real_t)1.001; }
static void check_step(int version) {
    (void)version;
    for (size_t i = 0; i < count; i++) {
        double grad = scale * g[i], m1 = beta1 * random_at(3, i) + (1 - beta1) * grad, v1 = beta2 * second_moment(i) + (1 - beta2) * grad * grad;
        double p0 = random_at(1, i), move = m1 / (1 - pow(beta1, STEP)) / (sqrt(v1 / (1 - pow(beta2, STEP))) + 1e-8);
        compare("m", i, m[i], m1, 1);
        compare("v", i, v[i], v1, 1);
        compare("p", i, (double)p[i] - p0, -rate * (move + decay * p0), 1);
    }
}

static void set_up(const int *d) {
    count = (size_t)d[0];
    p = make(count, 1), g = make(count, 2), m = make(count, 3), v = make(count, 4), a = make(count, 0), b = make(count, 0);
}
static void set_up_norm(const int *d) { set_up(d), work_bytes = (double)count * sizeof(real_t); }
static void set_up_step(const int *d) { set_up(d), work_bytes = 7.0 * (double)count * sizeof(real_t); }
static void reset(void) {
    fill(p, count, 1), fill(m, count, 3);
    for (size_t i = 0; i < count; i++) v[i] = second_moment(i);
}

static const Version norms[] = {
    {1, "one sum", 1e-10, 0}, {2, "vectors, a sum a thread: other bits for other threads", 1e-10, 0},
    {3, "the trainer's: a sum a piece of 4,096", 1e-10, 0}, {0, NULL, 0, 0}};
static const Version steps_of_adamw[] = {
    {1, "each line of the algorithm a pass", 1e-6, 0}, {2, "one pass, threads, double precision", 1e-6, 0},
    {3, "the trainer's: float alone, what is constant outside", 1e-6, 0}, {0, NULL, 0, 0}};
static const Shape odd[] = {{"10007", {10007, 0, 0, 0}}, {"3", {3, 0, 0, 0}}, {NULL, {0, 0, 0, 0}}};
static const Shape shapes[] = {{"16 million", {1 << 24, 0, 0, 0}}, {NULL, {0, 0, 0, 0}}};
static const Experiment experiments[] = {
    {"squared norm", norms, odd, shapes, set_up_norm, reset, run_norm, check_norm},
    {"AdamW", steps_of_adamw, odd, shapes, set_up_step, reset, run_step, check_step}};

int main(int argc, char **argv) { return run_experiments(argc, argv, experiments, 2); }
