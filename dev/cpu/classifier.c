/*
classifier.c: losses (n) and, in place, the gradients of logits (n, Vp), softmax less the target, times 1/n. A chunk of the
head: 1024 tokens, 200 MB. Columns from V to Vp are padding.
*/
#include "common.h"

static int n, V, Vp, *targets;
static real_t *logits, *losses, *saved;

static void check(int version) {
    (void)version;
    size_t rows = sampled((size_t)n, (double)n * V, 16);
    for (size_t r = 0; r < rows; r++) {
        size_t i = sample(r, rows, (size_t)n);
        const real_t *x = saved + i*Vp, *d = logits + i*Vp;
        double top = -INFINITY, sum = 0;
        for (int v = 0; v < V; v++) top = fmax(top, x[v]);
        for (int v = 0; v < V; v++) sum += exp(x[v] - top);
        compare("losses", i, losses[i], top + log(sum) - x[targets[i]], 1);
        for (int v = 0; v < Vp; v++) {
            double p = v < V ? exp(x[v] - top) / sum : 0;
            compare("dlogits", i*Vp + v, d[v], (p - (v == targets[i])) / n, 1.0 / n / V);
        }
    }
}

// 1: one pass over the chunk after another
static void passes(void) {
    for (int i = 0; i < n; i++) {  // softmax
        real_t *x = logits + (size_t)i*Vp, top = x[0], sum = 0, target = x[targets[i]];
        for (int v = 0; v < V; v++) top = x[v] > top ? x[v] : top;
        for (int v = 0; v < V; v++) sum += x[v] = expf(x[v] - top);
        losses[i] = top + logf(sum) - target;
        saved[(size_t)n*Vp + i] = sum;
    }
    for (int i = 0; i < n; i++)
        for (int v = 0; v < V; v++) logits[(size_t)i*Vp + v] /= saved[(size_t)n*Vp + i];
    for (int i = 0; i < n; i++)
        for (int v = 0; v < Vp; v++) logits[(size_t)i*Vp + v] = v < V ? (logits[(size_t)i*Vp + v] - (v == targets[i])) / n : 0;
}

// 2, 3: all of a row while it is in L2
static inline __attribute__((always_inline)) void row(int i, real_t (*exponential)(real_t)) {
    real_t *x = logits + (size_t)i*Vp, top = x[0], sum = 0, target = x[targets[i]];
    for (int v = 0; v < V; v++) top = x[v] > top ? x[v] : top;
    for (int v = 0; v < V; v++) x[v] = exponential(x[v] - top);
    #pragma omp simd reduction(+:sum)
    for (int v = 0; v < V; v++) sum += x[v];
    real_t factor = 1 / (sum * n);
    for (int v = 0; v < V; v++) x[v] *= factor;
    x[targets[i]] -= (real_t)1 / n;
    for (int v = V; v < Vp; v++) x[v] = 0;
    losses[i] = top + logf(sum) - target;
}
static void rows(void) {
    #pragma omp parallel for
    for (int i = 0; i < n; i++) row(i, expf);
}
static void rows_of_vectors(void) {
    #pragma omp parallel for
    for (int i = 0; i < n; i++) row(i, real_exp);
}

static void run(int version) {
    if (version == 1) passes();
    else if (version == 2) rows();
    else if (version == 3) rows_of_vectors();
    else classifier(losses, logits, targets, n, V, Vp, 1.0 / n);
}

static void set_up(const int *d) {
    n = d[0], V = d[1], Vp = d[2];
    logits = make((size_t)n*Vp, 0), losses = make(n, 0), saved = make((size_t)n*Vp + n, 1);
    targets = (int *)allocate(sizeof(int) * (size_t)n);
    for (size_t i = 0; i < (size_t)n*Vp; i++) saved[i] *= 8;
    for (int i = 0; i < n; i++) targets[i] = (int)((int64_t)i * 7919 % V);
    work_bytes = 2.0 * n * V * sizeof(real_t);
}
static void reset(void) { device_copy(logits, saved, sizeof(real_t) * (size_t)n*Vp), fill_nan(losses, n); }

static const Version versions[] = {
    {1, "one pass over the chunk after another", 1e-4, 0}, {2, "row by row, threads", 1e-4, 0},
    {3, "+ exp without call or branch: vectors", 1e-4, 0}, {4, "the trainer's: + maxima side by side", 1e-4, 0}, {0, NULL, 0, 0}};
static const Shape odd[] = {{"5 x 131", {5, 131, 256, 0}}, {"3 x 1", {3, 1, 128, 0}}, {NULL, {0, 0, 0, 0}}};
static const Shape shapes[] = {{"1024 x 50257", {1024, 50257, 50304, 0}}, {NULL, {0, 0, 0, 0}}};
static const Experiment experiments[] = {{"classifier", versions, odd, shapes, set_up, reset, run, check}};

int main(int argc, char **argv) { return run_experiments(argc, argv, experiments, 1); }
