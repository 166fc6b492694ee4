/*
rmsnorm.c: RMSNorm of x = s + add, straight from a stream s, fixed point or floating; C channels a token.
Llama's block has it where GPT-2's has layernorm.

    forward     out = weight x r, where r = 1 / sqrt(mean of x^2 + epsilon)
    backward    ds, dadd += the gradient in x;  dweight (C) += the sum over all tokens
*/
#define REV_GPT2_BLOCK "dev/llama/block.h"
#include "common.h"

static const double epsilon = 1e-5;
static int n, C, grid;
static stream_t *s;
static real_t *add, *weight, *out, *dout, *ds, *dadd, *dweight, *values;

// unit: of the grid; 0: floating point
typedef struct { const stream_t *s; const real_t *add; real_t unit; } Token;
static inline Token token(size_t i) {
    Token t = {s + i*C, add ? add + i*C : NULL, grid ? (real_t)ldexp(1, -grid) : 0};
    return t;
}
static inline real_t value(Token t, int c) {
    real_t x = t.unit != 0 ? (real_t)t.s[c].fixed * t.unit : t.s[c].real;
    return t.add ? x + t.add[c] : x;
}

// ---- the reference, in double precision

static double reciprocal(Token t) {
    double squares = 0;
    for (int c = 0; c < C; c++) squares += pow(value(t, c), 2);
    return 1 / sqrt(squares / C + epsilon);
}

static void check_forward(int version) {
    (void)version;
    for (size_t i = 0; i < (size_t)n; i++) {
        double r = reciprocal(token(i));
        for (int c = 0; c < C; c++)
            compare("out", i*C + c, out[i*C + c], value(token(i), c) * r * weight[c], 1);
    }
}

static void check_backward(int version) {
    (void)version;
    double *dw = (double *)calloc((size_t)C, sizeof(double));
    for (size_t i = 0; i < (size_t)n; i++) {
        const real_t *d = dout + i*C;
        double r = reciprocal(token(i)), mean = 0;
        for (int c = 0; c < C; c++) {
            double normed = value(token(i), c) * r;
            dw[c] += d[c] * normed;
            mean += d[c] * weight[c] * normed / C;
        }
        for (int c = 0; c < C; c++) {
            double dx = (d[c] * weight[c] - value(token(i), c) * r * mean) * r;
            compare("ds", i*C + c, ds[i*C + c], random_at(5, i*C + c) + dx, 1);
            if (add) compare("dadd", i*C + c, dadd[i*C + c], random_at(6, i*C + c) + dx, 1);
        }
    }
    for (int c = 0; c < C; c++) compare("dweight", c, dweight[c], random_at(7, c) + dw[c], 1);
    free(dw);
}

// ---- 1: a pass that makes floats of the stream, then plain loops

static void to_values(void) {
    for (size_t i = 0; i < (size_t)n; i++)
        for (int c = 0; c < C; c++) values[i*C + c] = value(token(i), c);
}
static real_t plain_reciprocal(const real_t *x) {
    real_t squares = 0;
    for (int c = 0; c < C; c++) squares += x[c] * x[c];
    return 1 / sqrtf(squares / C + (real_t)epsilon);
}
static void forward_plain(void) {
    to_values();
    for (size_t i = 0; i < (size_t)n; i++) {
        const real_t *x = values + i*C, r = plain_reciprocal(x);
        for (int c = 0; c < C; c++) out[i*C + c] = x[c] * r * weight[c];
    }
}
static void backward_plain(void) {
    to_values();
    for (size_t i = 0; i < (size_t)n; i++) {
        const real_t *x = values + i*C, *d = dout + i*C, r = plain_reciprocal(x);
        real_t sum = 0;
        for (int c = 0; c < C; c++) sum += d[c] * weight[c] * x[c] * r;
        for (int c = 0; c < C; c++) {
            real_t normed = x[c] * r, dx = (d[c] * weight[c] - normed * sum / C) * r;
            dweight[c] += d[c] * normed;
            ds[i*C + c] += dx;
            if (add) dadd[i*C + c] += dx;
        }
    }
}

// ---- 2, 3: straight from the stream, as vectors, with threads

// A token of each kind goes to a copy of f: what it consists of is asked outside the loops
#define BY_KIND(f, ...) do { \
        Token t = token(i); \
        if (t.add && t.unit != 0) f(t, __VA_ARGS__); \
        else if (t.add) t.unit = 0, f(t, __VA_ARGS__); \
        else if (t.unit != 0) t.add = NULL, f(t, __VA_ARGS__); \
        else t.add = NULL, t.unit = 0, f(t, __VA_ARGS__); \
    } while (0)

INLINE real_t vector_reciprocal(const Token t) {
    real_t squares = 0;
    #pragma omp simd reduction(+:squares)
    for (int c = 0; c < C; c++) squares += value(t, c) * value(t, c);
    return 1 / sqrtf(squares / C + (real_t)epsilon);
}
INLINE void forward_twice(const Token t, real_t *to) {
    real_t r = vector_reciprocal(t);
    #pragma omp simd
    for (int c = 0; c < C; c++) to[c] = value(t, c) * r * weight[c];
}
static void forward_vectors(void) {
    #pragma omp parallel for
    for (size_t i = 0; i < (size_t)n; i++) BY_KIND(forward_twice, out + i*C);
}
INLINE void forward_kept(const Token t, real_t *to) {
    real_t squares = 0;
    #pragma omp simd reduction(+:squares)
    for (int c = 0; c < C; c++) {
        to[c] = value(t, c);
        squares += to[c] * to[c];
    }
    real_t r = 1 / sqrtf(squares / C + (real_t)epsilon);
    #pragma omp simd
    for (int c = 0; c < C; c++) to[c] *= r * weight[c];
}
static void forward_in_place(void) {
    #pragma omp parallel for
    for (size_t i = 0; i < (size_t)n; i++) BY_KIND(forward_kept, out + i*C);
}

INLINE void backward_token(const Token t, size_t i, real_t *dw) {
    const real_t *d = dout + i*C, r = vector_reciprocal(t);
    real_t *x = ds + i*C, *y = t.add ? dadd + i*C : NULL, sum = 0;
    #pragma omp simd reduction(+:sum)
    for (int c = 0; c < C; c++) {
        real_t normed = value(t, c) * r;
        dw[c] += d[c] * normed;
        sum += d[c] * weight[c] * normed;
    }
    #pragma omp simd
    for (int c = 0; c < C; c++) {
        real_t dx = (d[c] * weight[c] - value(t, c) * r * sum / C) * r;
        x[c] += dx;
        if (y) y[c] += dx;
    }
}
static void backward_vectors(void) {
    for (size_t i = 0; i < (size_t)n; i++) BY_KIND(backward_token, i, dweight);
}
static void backward_threads(void) {
    #pragma omp parallel
    {
        real_t *dw = (real_t *)calloc((size_t)C, sizeof(real_t));
        #pragma omp for
        for (size_t i = 0; i < (size_t)n; i++) BY_KIND(backward_token, i, dw);
        #pragma omp critical
        for (int c = 0; c < C; c++) dweight[c] += dw[c];
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
    weight = make(C, 3), dout = make(count, 4), out = make(count, 0), values = make(count, 0);
    ds = make(count, 5), dadd = make(count, 6), dweight = make(C, 7);
}
static void set_up_forward(const int *d) { set_up(d), work_bytes = (double)n * C * (d[3] ? 12 : 8); }
static void set_up_backward(const int *d) { set_up(d), work_bytes = (double)n * C * (d[3] ? 28 : 16); }
static void reset_forward(void) { fill_nan(out, (size_t)n*C); }
static void reset_backward(void) {
    fill(ds, (size_t)n*C, 5), fill(dadd, (size_t)n*C, 6);
    fill(dweight, C, 7);
}

static void run_forward(int version) {
    if (version == 1) forward_plain();
    else if (version == 2) forward_vectors();
    else if (version == 3) forward_in_place();
    else rmsnorm_forward(out, s, add, weight, n, C, epsilon, grid);
}
static void run_backward(int version) {
    if (version == 1) backward_plain();
    else if (version == 2) backward_vectors();
    else if (version == 3) backward_threads();
    else rmsnorm_backward(ds, add ? dadd : NULL, dweight, dout, s, add, weight, n, C, epsilon, grid);
}

static const Version forwards[] = {
    {1, "the stream made floats first, plain loops", 1e-4, 0},
    {2, "straight from the stream, vectors, threads", 1e-5, 0},
    {3, "read once, its floats kept in the output", 1e-5, 0},
    {4, "the block's: in a row of their own", 1e-5, 0},
    {0, NULL, 0, 0}};
static const Version backwards[] = {
    {1, "the stream made floats first, plain loops", 1e-4, 0},
    {2, "straight from the stream, vectors", 1e-4, 0},
    {3, "threads, a partial sum a thread: other bits each time", 1e-4, 0},
    {4, "the block's: a partial sum a slice", 1e-4, 0},
    {0, NULL, 0, 0}};
static const Shape odd[] = {{"7 x 51, float", {7, 51, 0, 0}},
                            {"130 x 37, fixed + activation", {130, 37, 20, 1}},
                            {NULL, {0, 0, 0, 0}}};
static const Shape shapes[] = {{"float", {1024, 576, 0, 0}}, {"fixed", {1024, 576, 20, 0}},
                               {"fixed + activation", {1024, 576, 20, 1}}, {NULL, {0, 0, 0, 0}}};
static const Experiment experiments[] = {
    {"RMSNorm, forward", forwards, odd, shapes, set_up_forward, reset_forward, run_forward,
     check_forward},
    {"RMSNorm, backward", backwards, odd, shapes, set_up_backward, reset_backward, run_backward,
     check_backward}};

int main(int argc, char **argv) { return run_experiments(argc, argv, experiments, 2); }
