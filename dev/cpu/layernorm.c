/*
layernorm.c: layernorm of x = s + add, straight from a stream s, fixed point or floating; C channels a token.

    forward     out = (x - mean) rstd weight + bias
    backward    ds, dadd += the gradient in x;  dweight, dbias (C) += sums over all tokens
*/
#include "common.h"

static int n, C, grid;
static stream_t *s;
static real_t *add, *weight, *bias, *out, *dout, *ds, *dadd, *dweight, *dbias, *values;

typedef struct { const stream_t *s; const real_t *add; real_t unit; } Token;  // of the grid; 0: floating point
static inline Token token(size_t i) {
    Token t = {s + i*C, add ? add + i*C : NULL, grid ? (real_t)ldexp(1, -grid) : 0};
    return t;
}
static inline real_t value(Token t, int c) { return (t.unit != 0 ? (real_t)t.s[c].fixed * t.unit : t.s[c].real) + (t.add ? t.add[c] : 0); }

// ---- the reference, in double precision

static void statistics(Token t, double *mean, double *rstd) {
    double sum = 0, squares = 0;
    for (int c = 0; c < C; c++) sum += value(t, c);
    for (int c = 0; c < C; c++) squares += pow(value(t, c) - sum / C, 2);
    *mean = sum / C;
    *rstd = 1 / sqrt(squares / C + 1e-5);
}

static void check_forward(int version) {
    (void)version;
    double mean, rstd;
    for (size_t i = 0; i < (size_t)n; i++) {
        statistics(token(i), &mean, &rstd);
        for (int c = 0; c < C; c++) compare("out", i*C + c, out[i*C + c], (value(token(i), c) - mean) * rstd * weight[c] + bias[c], 1);
    }
}

static void check_backward(int version) {
    (void)version;
    double mean, rstd, *dw = (double *)calloc(2 * (size_t)C, sizeof(double)), *db = dw + C;
    for (size_t i = 0; i < (size_t)n; i++) {
        double sum = 0, sum_x = 0;
        statistics(token(i), &mean, &rstd);
        for (int c = 0; c < C; c++) {
            double d = dout[i*C + c], x = (value(token(i), c) - mean) * rstd;
            dw[c] += d * x, db[c] += d;
            sum += d * weight[c] / C, sum_x += d * weight[c] * x / C;
        }
        for (int c = 0; c < C; c++) {
            double dx = (dout[i*C + c] * weight[c] - sum - (value(token(i), c) - mean) * rstd * sum_x) * rstd;
            compare("ds", i*C + c, ds[i*C + c], random_at(6, i*C + c) + dx, 1);
            if (add) compare("dadd", i*C + c, dadd[i*C + c], random_at(7, i*C + c) + dx, 1);
        }
    }
    for (int c = 0; c < C; c++) {
        compare("dweight", c, dweight[c], random_at(8, c) + dw[c], 1);
        compare("dbias", c, dbias[c], random_at(9, c) + db[c], 1);
    }
    free(dw);
}

// ---- 1: a pass that makes floats of the stream, then plain loops

static void to_values(void) {
    for (size_t i = 0; i < (size_t)n; i++)
        for (int c = 0; c < C; c++) values[i*C + c] = value(token(i), c);
}
static real_t plain_statistics(const real_t *x, real_t *rstd) {
    real_t mean = 0, variance = 0;
    for (int c = 0; c < C; c++) mean += x[c];
    mean /= C;
    for (int c = 0; c < C; c++) variance += (x[c] - mean) * (x[c] - mean);
    *rstd = 1 / sqrtf(variance / C + 1e-5f);
    return mean;
}
static void forward_plain(void) {
    to_values();
    for (size_t i = 0; i < (size_t)n; i++) {
        real_t rstd, mean = plain_statistics(values + i*C, &rstd);
        for (int c = 0; c < C; c++) out[i*C + c] = (values[i*C + c] - mean) * rstd * weight[c] + bias[c];
    }
}
static void backward_plain(void) {
    to_values();
    for (size_t i = 0; i < (size_t)n; i++) {
        const real_t *x = values + i*C, *d = dout + i*C;
        real_t rstd, mean = plain_statistics(x, &rstd), sum = 0, sum_x = 0;
        for (int c = 0; c < C; c++) sum += d[c] * weight[c], sum_x += d[c] * weight[c] * (x[c] - mean) * rstd;
        for (int c = 0; c < C; c++) {
            real_t normed = (x[c] - mean) * rstd, dx = (d[c] * weight[c] - sum / C - normed * sum_x / C) * rstd;
            dweight[c] += d[c] * normed;
            dbias[c] += d[c];
            ds[i*C + c] += dx;
            if (add) dadd[i*C + c] += dx;
        }
    }
}

// ---- 2, 3: straight from the stream, as vectors, with threads

// The mean and 1 / standard deviation of a token. From the sums of x and x^2, one pass is enough, but where the mean is
// large against the deviation their difference has few digits left.
static inline __attribute__((always_inline)) real_t vector_statistics(Token t, real_t *rstd, int one_pass) {
    real_t mean = 0, squares = 0;
    #pragma omp simd reduction(+:mean,squares)
    for (int c = 0; c < C; c++) {
        real_t x = value(t, c);
        mean += x;
        if (one_pass) squares += x * x;
    }
    mean /= C;
    if (one_pass) squares -= C * mean * mean;
    #pragma omp simd reduction(+:squares)
    for (int c = 0; c < (one_pass ? 0 : C); c++) squares += (value(t, c) - mean) * (value(t, c) - mean);
    *rstd = 1 / sqrtf(squares / C + 1e-5f);
    return mean;
}

static inline __attribute__((always_inline)) void forward_kind(const Token t, size_t i, int one_pass) {
    real_t rstd, mean = vector_statistics(t, &rstd, one_pass), *to = out + i*C;
    #pragma omp simd
    for (int c = 0; c < C; c++) to[c] = (value(t, c) - mean) * rstd * weight[c] + bias[c];
}
// The question what a token consists of is asked outside the loops, so each loop is written out for its case
static inline __attribute__((always_inline)) void forward_token(size_t i, int one_pass) {
    Token t = token(i);
    if (t.add && t.unit != 0) forward_kind(t, i, one_pass);
    else if (t.add) t.unit = 0, forward_kind(t, i, one_pass);
    else if (t.unit != 0) t.add = NULL, forward_kind(t, i, one_pass);
    else t.add = NULL, t.unit = 0, forward_kind(t, i, one_pass);
}
static void forward_vectors(void) {
    #pragma omp parallel for
    for (int i = 0; i < n; i++) forward_token(i, 0);
}
static void forward_one_pass(void) {
    #pragma omp parallel for
    for (int i = 0; i < n; i++) forward_token(i, 1);
}

static inline __attribute__((always_inline)) void backward_kind(const Token t, size_t i, real_t *dw, real_t *db) {
    const real_t *d = dout + i*C;
    real_t *x = ds + i*C, *y = t.add ? dadd + i*C : NULL;
    real_t rstd, mean = vector_statistics(t, &rstd, 0), sum = 0, sum_x = 0;
    #pragma omp simd reduction(+:sum,sum_x)
    for (int c = 0; c < C; c++) {
        real_t normed = (value(t, c) - mean) * rstd, dn = d[c] * weight[c];
        dw[c] += d[c] * normed;
        db[c] += d[c];
        sum += dn;
        sum_x += dn * normed;
    }
    #pragma omp simd
    for (int c = 0; c < C; c++) {
        real_t normed = (value(t, c) - mean) * rstd, dx = (d[c] * weight[c] - sum / C - normed * sum_x / C) * rstd;
        x[c] += dx;
        if (y) y[c] += dx;
    }
}
static void backward_token(size_t i, real_t *dw, real_t *db) {
    Token t = token(i);
    if (t.add && t.unit != 0) backward_kind(t, i, dw, db);
    else if (t.add) t.unit = 0, backward_kind(t, i, dw, db);
    else if (t.unit != 0) t.add = NULL, backward_kind(t, i, dw, db);
    else t.add = NULL, t.unit = 0, backward_kind(t, i, dw, db);
}
static void backward_vectors(void) {
    for (size_t i = 0; i < (size_t)n; i++) backward_token(i, dweight, dbias);
}
static void backward_threads(void) {
    #pragma omp parallel
    {
        real_t *dw = (real_t *)calloc(2 * (size_t)C, sizeof(real_t)), *db = dw + C;
        #pragma omp for
        for (size_t i = 0; i < (size_t)n; i++) backward_token(i, dw, db);
        #pragma omp critical
        for (int c = 0; c < C; c++) dweight[c] += dw[c], dbias[c] += db[c];
        free(dw);
    }
}

// ---- the experiments

static void set_up(const int *d) {
    n = d[0], C = d[1], grid = d[2];
    size_t count = (size_t)n*C;
    s = (stream_t *)allocate(count * sizeof(stream_t));
    for (size_t i = 0; i < count; i++) {
        real_t x = 1 + 2 * random_at(1, i);
        if (grid) s[i].fixed = (int32_t)lrint(ldexp(x, grid));
        else s[i].real = x;
    }
    add = d[3] ? make(count, 2) : NULL;
    weight = make(C, 3), bias = make(C, 4), dout = make(count, 5), out = make(count, 0), values = make(count, 0);
    ds = make(count, 6), dadd = make(count, 7), dweight = make(C, 8), dbias = make(C, 9);
}
static void set_up_forward(const int *d) { set_up(d), work_bytes = (double)n * C * (d[3] ? 12 : 8); }
static void set_up_backward(const int *d) { set_up(d), work_bytes = (double)n * C * (d[3] ? 28 : 16); }
static void reset_forward(void) { fill_nan(out, (size_t)n*C); }
static void reset_backward(void) { fill(ds, (size_t)n*C, 6), fill(dadd, (size_t)n*C, 7), fill(dweight, C, 8), fill(dbias, C, 9); }

static void run_forward(int version) {
    if (version == 1) forward_plain();
    else if (version == 2) forward_vectors();
    else if (version == 3) forward_one_pass();
    else layernorm_forward(out, s, add, weight, bias, n, C, grid);
}
static void run_backward(int version) {
    if (version == 1) backward_plain();
    else if (version == 2) backward_vectors();
    else if (version == 3) backward_threads();
    else layernorm_backward(ds, add ? dadd : NULL, dweight, dbias, dout, s, add, weight, n, C, grid);
}

static const Version forwards[] = {
    {1, "the stream made floats first, plain loops", 1e-4, 0}, {2, "straight from the stream, vectors, threads", 1e-5, 0},
    {3, "mean and variance in one pass", 1e-3, 0}, {4, "the trainer's", 1e-5, 0}, {0, NULL, 0, 0}};
static const Version backwards[] = {
    {1, "the stream made floats first, plain loops", 1e-4, 0}, {2, "straight from the stream, vectors", 1e-4, 0},
    {3, "threads, a partial sum a thread: other bits each time", 1e-4, 0}, {4, "the trainer's: a partial sum a slice", 1e-4, 0}, {0, NULL, 0, 0}};
static const Shape odd[] = {{"7 x 51, float", {7, 51, 0, 0}}, {"130 x 37, fixed + activation", {130, 37, 20, 1}}, {NULL, {0, 0, 0, 0}}};
static const Shape shapes[] = {{"float", {1024, 768, 0, 0}}, {"fixed", {1024, 768, 20, 0}}, {"fixed + activation", {1024, 768, 20, 1}},
                               {NULL, {0, 0, 0, 0}}};
static const Experiment experiments[] = {
    {"layernorm, forward", forwards, odd, shapes, set_up_forward, reset_forward, run_forward, check_forward},
    {"layernorm, backward", backwards, odd, shapes, set_up_backward, reset_backward, run_backward, check_backward}};

int main(int argc, char **argv) { return run_experiments(argc, argv, experiments, 2); }
