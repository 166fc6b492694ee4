/*
attention.c: causal attention. out (B, T, C) and lse (B, NH, T) from qkv (B, T, 3C), and dqkv from dout.

A head has hs = C / NH channels. p(i,j) = exp(scale q_i.k_j - lse_i) for j <= i, o_i = sum_j p(i,j) v_j. Backward, with
dp(i,j) = do_i.v_j and ds = p (dp - do_i.o_i) scale: dq_i = sum ds k_j, dk_j = sum ds q_i, dv_j = sum p do_i.
*/
#include "common.h"

static int B, T, C, NH, hs;
static real_t *qkv, *out, *lse, *dout, *dqkv, *matrices;

static const real_t *head_of(const real_t *x, int b, int h, int which) { return x + (size_t)b*T*3*C + (size_t)which*C + (size_t)h*hs; }
static real_t scale_of(void) { return (real_t)(1 / sqrt((double)hs)); }

// ---- the reference: one head, o (T, hs) and d (T, 3, hs)

static void reference(int b, int h, double *o, double *l, double *d) {
    const real_t *q = head_of(qkv, b, h, 0), *k = q + C, *v = k + C, *g = dout + (size_t)b*T*C + h*hs;
    double *p = (double *)malloc(sizeof(double) * (size_t)T), scale = 1 / sqrt((double)hs);
    memset(d, 0, sizeof(double) * (size_t)T*3*hs);
    for (int t = 0; t < T; t++) {
        double top = -INFINITY, sum = 0, delta = 0;
        for (int j = 0; j <= t; j++) {
            p[j] = 0;
            for (int c = 0; c < hs; c++) p[j] += (double)q[(size_t)t*3*C + c] * k[(size_t)j*3*C + c] * scale;
            top = fmax(top, p[j]);
        }
        for (int j = 0; j <= t; j++) sum += p[j] = exp(p[j] - top);
        l[t] = top + log(sum);
        for (int c = 0; c < hs; c++) {
            double x = 0;
            for (int j = 0; j <= t; j++) x += p[j] / sum * v[(size_t)j*3*C + c];
            o[t*hs + c] = x;
            delta += x * g[(size_t)t*C + c];
        }
        for (int j = 0; j <= t; j++) {
            double dp = 0, pj = p[j] / sum;
            for (int c = 0; c < hs; c++) dp += (double)g[(size_t)t*C + c] * v[(size_t)j*3*C + c];
            double ds = pj * (dp - delta) * scale;
            for (int c = 0; c < hs; c++) {
                d[(t*3 + 0)*hs + c] += ds * k[(size_t)j*3*C + c];
                d[(j*3 + 1)*hs + c] += ds * q[(size_t)t*3*C + c];
                d[(j*3 + 2)*hs + c] += pj * g[(size_t)t*C + c];
            }
        }
    }
    free(p);
}

// ---- 1: the whole matrix of a head in memory

static real_t dot(const real_t *a, const real_t *b) {
    real_t sum = 0;
    for (int c = 0; c < hs; c++) sum += a[c] * b[c];
    return sum;
}

static void forward_matrix(int b, int h) {
    const real_t *q = head_of(qkv, b, h, 0), *k = q + C, *v = k + C;
    real_t *p = matrices, scale = scale_of();
    for (int t = 0; t < T; t++)
        for (int j = 0; j <= t; j++) p[(size_t)t*T + j] = dot(q + (size_t)t*3*C, k + (size_t)j*3*C) * scale;
    for (int t = 0; t < T; t++) {
        real_t top = p[(size_t)t*T], sum = 0, *o = out + ((size_t)b*T + t)*C + h*hs;
        for (int j = 0; j <= t; j++) top = p[(size_t)t*T + j] > top ? p[(size_t)t*T + j] : top;
        for (int j = 0; j <= t; j++) sum += p[(size_t)t*T + j] = expf(p[(size_t)t*T + j] - top);
        for (int c = 0; c < hs; c++) o[c] = 0;
        for (int j = 0; j <= t; j++)
            for (int c = 0; c < hs; c++) o[c] += p[(size_t)t*T + j] / sum * v[(size_t)j*3*C + c];
        lse[((size_t)b*NH + h)*T + t] = top + logf(sum);
    }
}

static void backward_matrix(int b, int h) {
    const real_t *q = head_of(qkv, b, h, 0), *k = q + C, *v = k + C, *g = dout + (size_t)b*T*C + h*hs;
    real_t *p = matrices, *ds = p + (size_t)T*T, *dq = dqkv + (q - qkv), *dk = dq + C, *dv = dk + C, scale = scale_of();
    for (int t = 0; t < T; t++)
        for (int j = 0; j <= t; j++) {
            p[(size_t)t*T + j] = expf(dot(q + (size_t)t*3*C, k + (size_t)j*3*C) * scale - lse[((size_t)b*NH + h)*T + t]);
            ds[(size_t)t*T + j] = dot(g + (size_t)t*C, v + (size_t)j*3*C);
        }
    for (int t = 0; t < T; t++) {
        real_t delta = 0;
        for (int j = 0; j <= t; j++) delta += p[(size_t)t*T + j] * ds[(size_t)t*T + j];
        for (int j = 0; j <= t; j++) ds[(size_t)t*T + j] = p[(size_t)t*T + j] * (ds[(size_t)t*T + j] - delta) * scale;
    }
    for (int t = 0; t < T; t++)
        for (int j = 0; j <= t; j++)
            for (int c = 0; c < hs; c++) {
                dq[(size_t)t*3*C + c] += ds[(size_t)t*T + j] * k[(size_t)j*3*C + c];
                dk[(size_t)j*3*C + c] += ds[(size_t)t*T + j] * q[(size_t)t*3*C + c];
                dv[(size_t)j*3*C + c] += p[(size_t)t*T + j] * g[(size_t)t*C + c];
            }
}

// ---- 2: a row at a time, nothing stored: the softmax is scaled down whenever a higher score comes

static inline real_t dot_vectors(const real_t *a, const real_t *b) {
    real_t sum = 0;
    #pragma omp simd reduction(+:sum)
    for (int c = 0; c < hs; c++) sum += a[c] * b[c];
    return sum;
}

static void forward_rows(int b, int h) {
    const real_t *k = head_of(qkv, b, h, 1), *v = k + C;
    real_t scale = scale_of();
    for (int t = 0; t < T; t++) {
        const real_t *q = head_of(qkv, b, h, 0) + (size_t)t*3*C;
        real_t top = -1e30f, sum = 0, *o = out + ((size_t)b*T + t)*C + h*hs;
        for (int c = 0; c < hs; c++) o[c] = 0;
        for (int j = 0; j <= t; j++) {
            real_t s = dot_vectors(q, k + (size_t)j*3*C) * scale;
            if (s > top) {
                real_t shrink = expf(top - s);
                for (int c = 0; c < hs; c++) o[c] *= shrink;
                sum *= shrink;
                top = s;
            }
            real_t p = expf(s - top);
            #pragma omp simd
            for (int c = 0; c < hs; c++) o[c] += p * v[(size_t)j*3*C + c];
            sum += p;
        }
        for (int c = 0; c < hs; c++) o[c] /= sum;
        lse[((size_t)b*NH + h)*T + t] = top + logf(sum);
    }
}

static void backward_rows(int b, int h) {
    const real_t *k = head_of(qkv, b, h, 1), *v = k + C;
    real_t scale = scale_of();
    for (int t = 0; t < T; t++) {
        const real_t *q = head_of(qkv, b, h, 0) + (size_t)t*3*C, *g = dout + ((size_t)b*T + t)*C + h*hs;
        real_t *dq = dqkv + (q - qkv), delta = dot_vectors(g, out + (g - dout)), l = lse[((size_t)b*NH + h)*T + t];
        for (int j = 0; j <= t; j++) {
            const real_t *kj = k + (size_t)j*3*C, *vj = v + (size_t)j*3*C;
            real_t p = expf(dot_vectors(q, kj) * scale - l), ds = p * (dot_vectors(g, vj) - delta) * scale;
            real_t *dk = dqkv + (kj - qkv), *dv = dk + C;
            #pragma omp simd
            for (int c = 0; c < hs; c++) {
                dq[c] += ds * kj[c];
                dk[c] += ds * q[c];
                dv[c] += p * g[c];
            }
        }
    }
}

// ---- 3: a tile of queries against a tile of keys, both in L1

enum { SQUARE = 64 };

// c (M, N) += a b, the loop over j goes along memory
static inline void add_product(real_t *c, int row, int M, int N, int K, const real_t *a, int a_row, int a_col, const real_t *b, int b_row) {
    for (int i = 0; i < M; i++)
        for (int k = 0; k < K; k++) {
            real_t x = a[(size_t)i*a_row + (size_t)k*a_col];
            #pragma omp simd
            for (int j = 0; j < N; j++) c[(size_t)i*row + j] += x * b[(size_t)k*b_row + j];
        }
}
static void turn(real_t *to, const real_t *x, int row, int rows) {  // to (hs, SQUARE) = x (rows, hs)^T
    for (int i = 0; i < rows; i++)
        for (int c = 0; c < hs; c++) to[c*SQUARE + i] = x[(size_t)i*row + c];
}

static void forward_tiles(int b, int h) {
    const real_t *q = head_of(qkv, b, h, 0), *k = q + C, *v = k + C;
    real_t scale = scale_of(), turned[SQUARE * 256], score[SQUARE * SQUARE], top[SQUARE], sum[SQUARE];
    for (int q0 = 0; q0 < T; q0 += SQUARE) {
        int queries = smaller_of(SQUARE, T - q0);
        real_t *o = out + ((size_t)b*T + q0)*C + h*hs;
        for (int i = 0; i < queries; i++) top[i] = -1e30f, sum[i] = 0, memset(o + (size_t)i*C, 0, sizeof(real_t) * (size_t)hs);
        for (int t0 = 0; t0 <= q0; t0 += SQUARE) {
            int keys = smaller_of(SQUARE, T - t0);
            memset(score, 0, sizeof score);
            turn(turned, k + (size_t)t0*3*C, 3*C, keys);
            add_product(score, SQUARE, queries, keys, hs, q + (size_t)q0*3*C, 3*C, 1, turned, SQUARE);
            for (int i = 0; i < queries; i++) {
                real_t *s = score + i*SQUARE, higher = top[i], shrink;
                int seen = smaller_of(keys, q0 + i - t0 + 1);
                for (int j = 0; j < seen; j++) s[j] *= scale, higher = s[j] > higher ? s[j] : higher;
                sum[i] *= shrink = expf(top[i] - higher);
                for (int j = 0; j < seen; j++) sum[i] += s[j] = expf(s[j] - higher);
                for (int j = seen; j < keys; j++) s[j] = 0;
                for (int c = 0; c < hs; c++) o[(size_t)i*C + c] *= shrink;
                top[i] = higher;
            }
            add_product(o, C, queries, hs, keys, score, SQUARE, 1, v + (size_t)t0*3*C, 3*C);
        }
        for (int i = 0; i < queries; i++) {
            for (int c = 0; c < hs; c++) o[(size_t)i*C + c] /= sum[i];
            lse[((size_t)b*NH + h)*T + q0 + i] = top[i] + logf(sum[i]);
        }
    }
}

static void backward_tiles(int b, int h) {
    real_t scale = scale_of(), turned[SQUARE * 256], p[SQUARE * SQUARE], ds[SQUARE * SQUARE];
    for (int q0 = 0; q0 < T; q0 += SQUARE) {
        const real_t *q = head_of(qkv, b, h, 0) + (size_t)q0*3*C, *g = dout + ((size_t)b*T + q0)*C + h*hs;
        int queries = smaller_of(SQUARE, T - q0);
        for (int t0 = 0; t0 <= q0; t0 += SQUARE) {
            const real_t *k = head_of(qkv, b, h, 1) + (size_t)t0*3*C, *v = k + C;
            real_t *dk = dqkv + (k - qkv), *dv = dk + C;
            int keys = smaller_of(SQUARE, T - t0);
            memset(p, 0, sizeof p), memset(ds, 0, sizeof ds);
            turn(turned, k, 3*C, keys);
            add_product(p, SQUARE, queries, keys, hs, q, 3*C, 1, turned, SQUARE);
            turn(turned, v, 3*C, keys);
            add_product(ds, SQUARE, queries, keys, hs, g, C, 1, turned, SQUARE);
            for (int i = 0; i < queries; i++) {
                real_t delta = dot_vectors(g + (size_t)i*C, out + (g - dout) + (size_t)i*C), l = lse[((size_t)b*NH + h)*T + q0 + i];
                for (int j = 0; j < keys; j++) {
                    real_t pj = t0 + j <= q0 + i ? expf(p[i*SQUARE + j] * scale - l) : 0;
                    p[i*SQUARE + j] = pj;
                    ds[i*SQUARE + j] = pj * (ds[i*SQUARE + j] - delta) * scale;
                }
            }
            add_product(dv, 3*C, keys, hs, queries, p, 1, SQUARE, g, C);
            add_product(dk, 3*C, keys, hs, queries, ds, 1, SQUARE, q, 3*C);
            add_product(dqkv + (q - qkv), 3*C, queries, hs, keys, ds, SQUARE, 1, k, 3*C);
        }
    }
}

// ---- the experiments

enum { MATRIX_STORED = 1, ROWS_ONLINE, SQUARES, TRAINERS, OF_PAIRS, OF_TILES };
static void run_forward(int version) {
    if (version >= TRAINERS) {
        attention_forward(out, lse, qkv, B, T, C, NH, NH, NH);
        return;
    }
    #pragma omp parallel for schedule(dynamic) if (version != MATRIX_STORED)
    for (int bh = 0; bh < B * NH; bh++)
        (version == MATRIX_STORED ? forward_matrix : version == ROWS_ONLINE ? forward_rows : forward_tiles)(bh / NH, bh % NH);
}
static void run_backward(int version) {
    if (version >= TRAINERS) {
        attention_backward(dqkv, dout, qkv, out, lse, B, T, C, NH, NH, NH);
        return;
    }
    memset(dqkv, 0, sizeof(real_t) * (size_t)B*T*3*C);
    #pragma omp parallel for schedule(dynamic) if (version != MATRIX_STORED)
    for (int bh = 0; bh < B * NH; bh++)
        (version == MATRIX_STORED ? backward_matrix : version == ROWS_ONLINE ? backward_rows : backward_tiles)(bh / NH, bh % NH);
}

static void set_up(const int *d, double products) {
    B = d[0], T = d[1], C = d[2], NH = d[3], hs = C / NH;
    size_t N = (size_t)B * T;
    qkv = make(N * 3 * C, 1), dout = make(N * C, 2), out = make(N * C, 0), lse = make((size_t)B * NH * T, 0), dqkv = make(N * 3 * C, 0);
    matrices = make((size_t)2 * T * T, 0);
    for (size_t i = 0; i < N * 3 * C; i++) qkv[i] *= 3;  // so that the softmax is not flat
    work_flops = products * B * T * T * C;               // of the half below the diagonal
}
static void set_up_forward(const int *d) { set_up(d, 2); }
static void set_up_backward(const int *d) {
    set_up(d, 5);
    attention_forward(out, lse, qkv, B, T, C, NH, NH, NH);
}
static void reset_forward(void) { fill_nan(out, (size_t)B*T*C); }
static void reset_backward(void) { fill_nan(dqkv, (size_t)B*T*3*C); }

static void check(int backward_too) {
    double *o = (double *)malloc(sizeof(double) * (size_t)T*hs*4), *d = o + (size_t)T*hs, *l = (double *)malloc(sizeof(double) * (size_t)T);
    size_t heads = (size_t)B*NH, some = sampled(heads, work_flops, 2);
    for (size_t s = 0; s < some; s++) {
        int bh = (int)sample(s, some, heads), b = bh / NH, h = bh % NH;
        reference(b, h, o, l, d);
        for (int t = 0; t < T; t++) {
            size_t at = (size_t)bh*T + t;
            if (!backward_too) compare("lse", at, lse[at], l[t], 1);
            for (int c = 0; c < hs; c++) {
                size_t to = ((size_t)b*T + t)*C + h*hs + c, from = ((size_t)b*T + t)*3*C + h*hs + c;
                if (!backward_too) compare("out", to, out[to], o[t*hs + c], 1);
                for (int x = 0; x < 3 && backward_too; x++) compare("dqkv", from + (size_t)x*C, dqkv[from + (size_t)x*C], d[(t*3 + x)*hs + c], 1);
            }
        }
    }
    free(o);
    free(l);
}
static void check_forward(int version) { (void)version, check(0); }
static void check_backward(int version) { (void)version, check(1); }

static const Version versions[] = {
    {MATRIX_STORED, "T x T matrices, plain loops", 5e-5, 0},
    {ROWS_ONLINE, "a row at a time, softmax carried along; vectors, threads", 5e-5, 0},
    {SQUARES, "tiles of 64 x 64, small products, softmax along rows", 5e-5, 0},
    {TRAINERS, "the trainer's: packed products, a query a lane", 5e-5, 0},
    {OF_PAIRS, "the trainer's, pairs of bf16", 0.05, PAIRS},
    {OF_TILES, "the trainer's, tiles of bf16", 0.05, TILES},
    {0, NULL, 0, 0}};
static const Shape odd[] = {{"2 x 131, 39 channels, 3 heads", {2, 131, 39, 3}}, {"1 x 3, 8 channels, 2 heads", {1, 3, 8, 2}}, {NULL, {0, 0, 0, 0}}};
static const Shape shapes[] = {{"4 x 256", {4, 256, 768, 12}}, {"1 x 1024", {1, 1024, 768, 12}}, {NULL, {0, 0, 0, 0}}};
static const Experiment experiments[] = {
    {"attention, forward", versions, odd, shapes, set_up_forward, reset_forward, run_forward, check_forward},
    {"attention, backward", versions, odd, shapes, set_up_backward, reset_backward, run_backward, check_backward}};

int main(int argc, char **argv) { return run_experiments(argc, argv, experiments, 2); }
