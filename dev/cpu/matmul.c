/*
matmul.c: the matrix products of training, in three orientations.

    forward     out (n, OC) = inp (n, C) weight (OC, C)^T + bias
    backward    dinp (n, C) = dout (n, OC) weight;  dweight (OC, C) += dout^T inp

All are c(i,j) += sum_k a(i,k) b(k,j) with strides, one of them 1 (Matrix). Versions 1 to 6 take any of them.
*/
#include "common.h"

static int n, C, OC;
static real_t *inp, *weight, *bias, *out, *dout, *dinp, *dweight, *pre;

// ---- the reference: one element

static double operand(real_t x, int bf16) {  // as the instruction for pairs sees it
    union { float f; uint32_t u; } v;
    v.f = (float)x;
    if (bf16) v.u = (v.u + 0x7FFF + (v.u >> 16 & 1)) & 0xFFFF0000;
    return v.f;
}
static double element(Matrix a, Matrix b, int i, int j, int K, int bf16) {
    double sum = 0;
    for (int k = 0; k < K; k++) sum += operand(a.at[i*a.row + k*a.col], bf16) * operand(b.at[k*b.row + j*b.col], bf16);
    return sum;
}
static double gelu_reference(double x) { return 0.5 * x * (1 + tanh(sqrt(2 / M_PI) * (x + 0.044715 * x * x * x))); }
static double slope_reference(double x) {
    double k = sqrt(2 / M_PI), t = tanh(k * (x + 0.044715 * x * x * x));
    return 0.5 * (1 + t) + 0.5 * x * (1 - t * t) * k * (1 + 3 * 0.044715 * x * x);
}

// ---- versions 1 to 6: c (M, N) += a b

typedef void Product(real_t *c, int M, int N, int K, Matrix a, Matrix b);

// 1
static void naive(real_t *c, int M, int N, int K, Matrix a, Matrix b) {
    for (int i = 0; i < M; i++)
        for (int j = 0; j < N; j++) {
            real_t sum = 0;
            for (int k = 0; k < K; k++) sum += a.at[i*a.row + k*a.col] * b.at[k*b.row + j*b.col];
            c[(size_t)i*N + j] += sum;
        }
}

// 2: the innermost loop is the one along which b lies in memory
static void part(real_t *c, int N, Matrix a, Matrix b, int i, int j0, int j1, int k0, int k1) {
    real_t *row = c + (size_t)i*N;
    if (b.col == 1) {
        for (int k = k0; k < k1; k++) {
            const real_t x = a.at[i*a.row + k*a.col], *from = b.at + k*b.row;
            #pragma omp simd
            for (int j = j0; j < j1; j++) row[j] += x * from[j];
        }
    } else {  // b.row == 1, and a.col too
        for (int j = j0; j < j1; j++) {
            const real_t *x = a.at + i*a.row, *y = b.at + j*b.col;
            real_t sum = 0;
            #pragma omp simd reduction(+:sum)
            for (int k = k0; k < k1; k++) sum += x[k] * y[k];
            row[j] += sum;
        }
    }
}
static void vectors(real_t *c, int M, int N, int K, Matrix a, Matrix b) {
    for (int i = 0; i < M; i++) part(c, N, a, b, i, 0, N, 0, K);
}

// 3: a block of b serves many rows while it is in L2
static void blocks(real_t *c, int M, int N, int K, Matrix a, Matrix b) {
    const int I = 64, J = b.col == 1 ? 1024 : 64, KB = b.col == 1 ? 64 : 1024;  // the innermost loop stays long
    #pragma omp parallel for schedule(dynamic)
    for (int i0 = 0; i0 < M; i0 += I)
        for (int k0 = 0; k0 < K; k0 += KB)
            for (int j0 = 0; j0 < N; j0 += J)
                for (int i = i0; i < smaller_of(i0 + I, M); i++)
                    part(c, N, a, b, i, j0, smaller_of(j0 + J, N), k0, smaller_of(k0 + KB, K));
}

// 4: a tile of c in registers: MR x NR sums where b lies along j, else 4 x 4 sums that are vectors along k
static void tiles(real_t *c, int M, int N, int K, Matrix a, Matrix b) {
    const int across = b.col == 1, rows = across ? MR : 4, columns = across ? NR : 4;
    #pragma omp parallel for collapse(2) schedule(dynamic, 4)
    for (int j0 = 0; j0 < N; j0 += columns)
        for (int i0 = 0; i0 < M; i0 += rows) {
            real_t *to = c + (size_t)i0*N + j0;
            if (i0 + rows > M || j0 + columns > N) {
                for (int i = i0; i < smaller_of(i0 + rows, M); i++) part(c, N, a, b, i, j0, smaller_of(j0 + columns, N), 0, K);
            } else if (across) {
                vector_t sum[MR][NV];
                memset(sum, 0, sizeof sum);
                for (int k = 0; k < K; k++) {
                    #pragma GCC unroll 12
                    for (int i = 0; i < MR; i++)
                        #pragma GCC unroll 2
                        for (int v = 0; v < NV; v++)
                            sum[i][v] += a.at[(i0 + i)*a.row + k*a.col] * *(const vector_t *)(b.at + k*b.row + j0 + v*LANES);
                }
                for (int i = 0; i < MR; i++)
                    for (int v = 0; v < NV; v++) *(vector_t *)(to + (size_t)i*N + v*LANES) += sum[i][v];
            } else {
                vector_t sum[4][4];
                int k = 0;
                memset(sum, 0, sizeof sum);
                for (; k + LANES <= K; k += LANES) {
                    #pragma GCC unroll 4
                    for (int i = 0; i < 4; i++)
                        #pragma GCC unroll 4
                        for (int j = 0; j < 4; j++)
                            sum[i][j] += *(const vector_t *)(a.at + (i0 + i)*a.row + k) * *(const vector_t *)(b.at + (j0 + j)*b.col + k);
                }
                #pragma GCC unroll 4
                for (int i = 0; i < 4; i++)
                    #pragma GCC unroll 4
                    for (int j = 0; j < 4; j++) {
                        vector_t along = sum[i][j];
                        real_t s = 0;
                        for (int l = 0; l < LANES; l++) s += along[l];
                        for (int rest = k; rest < K; rest++) s += a.at[(i0 + i)*a.row + rest] * b.at[rest + (j0 + j)*b.col];
                        to[(size_t)i*N + j] += s;
                    }
            }
        }
}

// 5, 6: both operands are first packed into panels, `width` rows of x side by side: out[k*width + i] = x(i, k); what lies beyond
// the last row does not matter, its sums are not stored
typedef void Pack(real_t *to, const real_t *x, int64_t row, int64_t col, int rows, int K, int width);

static void pack_elements(real_t *to, const real_t *x, int64_t row, int64_t col, int rows, int K, int width) {
    for (int i0 = 0; i0 < rows; i0 += width)
        for (int k = 0; k < K; k++)
            for (int i = i0; i < i0 + width; i++) *to++ = i < rows ? x[i*row + k*col] : 0;
}

// By blocks of 4 x 4 where a row lies along k; else all panels together, as the memory is read along them
static void pack_blocks(real_t *to, const real_t *x, int64_t row, int64_t col, int rows, int K, int width) {
    if (row == 1) {
        for (int k = 0; k < K; k++)
            for (int i = 0; i < rows; i += width)
                for (int j = i; j < smaller_of(i + width, rows); j++) to[(size_t)i*K + k*width + j - i] = x[j + k*col];
    } else {
        for (int i = 0; i < rows; i += width) transpose(to + (size_t)i*K, width, x + i*row, row, smaller_of(width, rows - i), K);
    }
}

static void add_tile(real_t *c, int N, int rows, int columns, int K, const real_t *a, const real_t *b) {
    vector_t sum[MR][NV], tile[MR][NV];  // sum is in registers only as long as nobody asks for its address
    const vector_t zero = {0};
    #pragma GCC unroll 12
    for (int i = 0; i < MR; i++)
        for (int v = 0; v < NV; v++) sum[i][v] = zero;
    for (int k = 0; k < K; k++, a += MR, b += NR) {
        #pragma GCC unroll 12
        for (int i = 0; i < MR; i++)
            #pragma GCC unroll 2
            for (int v = 0; v < NV; v++) sum[i][v] += a[i] * ((const vector_t *)b)[v];
    }
    #pragma GCC unroll 12
    for (int i = 0; i < MR; i++)
        for (int v = 0; v < NV; v++) tile[i][v] = sum[i][v];
    for (int i = 0; i < rows; i++)
        for (int j = 0; j < columns; j++) c[(size_t)i*N + j] += ((real_t *)tile[i])[j];
}

static void panels(real_t *c, int M, int N, int K, Matrix a, Matrix b, Pack *pack_with) {
    enum { KB = 512, JB = 3072, IB = 1152, SOME = 96 };  // SOME is a multiple of MR and NR
    static real_t pa[IB * KB] __attribute__((aligned(64))), pb[KB * JB] __attribute__((aligned(64)));
    for (int k0 = 0; k0 < K; k0 += KB)
        for (int j0 = 0; j0 < N; j0 += JB) {
            int k = smaller_of(KB, K - k0), columns = smaller_of(JB, N - j0);
            #pragma omp parallel for
            for (int j = 0; j < columns; j += SOME)
                pack_with(pb + (size_t)j*k, b.at + (j0 + j)*b.col + k0*b.row, b.col, b.row, smaller_of(SOME, columns - j), k, NR);
            for (int i0 = 0; i0 < M; i0 += IB) {
                int rows = smaller_of(IB, M - i0);
                #pragma omp parallel for
                for (int i = 0; i < rows; i += SOME)
                    pack_with(pa + (size_t)i*k, a.at + (i0 + i)*a.row + k0*a.col, a.row, a.col, smaller_of(SOME, rows - i), k, MR);
                #pragma omp parallel for collapse(2) schedule(dynamic, 4)
                for (int r = 0; r < rows; r += SOME)
                    for (int j = 0; j < columns; j += NR)
                        for (int i = r; i < smaller_of(r + SOME, rows); i += MR)
                            add_tile(c + (size_t)(i0 + i)*N + j0 + j, N, smaller_of(MR, rows - i), smaller_of(NR, columns - j), k,
                                     pa + (size_t)i*k, pb + (size_t)j*k);
            }
        }
}
static void packed(real_t *c, int M, int N, int K, Matrix a, Matrix b) { panels(c, M, N, K, a, b, pack_elements); }
static void packed_blocks(real_t *c, int M, int N, int K, Matrix a, Matrix b) { panels(c, M, N, K, a, b, pack_blocks); }

static Product *const products[] = {NULL, naive, vectors, blocks, tiles, packed, packed_blocks};
enum { TRAINERS = 7, OF_PAIRS = 8, OF_TILES = 9, SEPARATE = 10, FUSED = 11 };

// ---- the experiments

static void set_up(const int *d) {
    n = d[0], C = d[1], OC = d[2];
    size_t rows = (size_t)n, in = (size_t)C, on = (size_t)OC;
    inp = make(rows * in, 1), weight = make(on * in, 2), bias = make(on, 3), dout = make(rows * on, 4);
    out = make(rows * on, 0), dinp = make(rows * in, 0), dweight = make(on * in, 0), pre = make(rows * (in > on ? in : on), 6);
}
static void set_up_forward(const int *d) { set_up(d), work_flops = 2.0 * n * C * OC; }
static void set_up_backward(const int *d) { set_up(d), work_flops = 4.0 * n * C * OC; }
static void reset_forward(void) { fill_nan(out, (size_t)n * (size_t)OC); }
static void reset_backward(void) { fill(dweight, (size_t)OC * (size_t)C, 5), fill_nan(dinp, (size_t)n * (size_t)C); }

static void run_forward(int version) {
    if (version >= TRAINERS) {
        matmul_forward(out, inp, weight, bias, n, C, OC, OC);
        return;
    }
    #pragma omp parallel for
    for (int i = 0; i < n; i++) memcpy(out + (size_t)i*OC, bias, sizeof(real_t) * (size_t)OC);
    products[version](out, n, OC, C, matrix(inp, C, 1), matrix(weight, 1, C));
}
static void run_backward(int version) {
    if (version >= TRAINERS) {
        matmul_backward(dinp, dweight, NULL, dout, inp, weight, NULL, n, C, OC, OC);
        return;
    }
    memset(dinp, 0, sizeof(real_t) * (size_t)n * (size_t)C);
    products[version](dinp, n, C, OC, matrix(dout, OC, 1), matrix(weight, C, 1));
    products[version](dweight, OC, C, n, matrix(dout, 1, OC), matrix(inp, C, 1));
}
static void run_gelu_forward(int version) {
    if (version == FUSED) {
        matmul_gelu_forward(out, pre, inp, weight, bias, n, C, OC);
        return;
    }
    matmul_forward(pre, inp, weight, bias, n, C, OC, OC);
    #pragma omp parallel for simd
    for (size_t i = 0; i < (size_t)n * (size_t)OC; i++) out[i] = gelu(pre[i]);
}
static void run_gelu_backward(int version) {
    matmul_backward(dinp, dweight, NULL, dout, inp, weight, version == FUSED ? pre : NULL, n, C, OC, OC);
    if (version == FUSED) return;
    #pragma omp parallel for simd
    for (size_t i = 0; i < (size_t)n * (size_t)C; i++) dinp[i] *= gelu_slope(pre[i]);
}

static int of_bf16(int version) { return version == OF_PAIRS || version == OF_TILES; }
static void check_forward(int version) {
    size_t all = (size_t)n * (size_t)OC, some = sampled(all, work_flops, 4099);
    for (size_t s = 0; s < some; s++) {
        size_t at = sample(s, some, all), i = at / (size_t)OC, j = at % (size_t)OC;
        double sum = element(matrix(inp, C, 1), matrix(weight, 1, C), (int)i, (int)j, C, of_bf16(version)) + bias[j];
        compare("out", at, out[at], version < SEPARATE ? sum : gelu_reference(sum), 1);
    }
}
static void check_backward(int version) {
    size_t all = (size_t)n * (size_t)C, some = sampled(all, work_flops, 4099);
    for (size_t s = 0; s < some; s++) {
        size_t at = sample(s, some, all);
        double sum = element(matrix(dout, OC, 1), matrix(weight, C, 1), (int)(at / (size_t)C), (int)(at % (size_t)C), OC, of_bf16(version));
        compare("dinp", at, dinp[at], version < SEPARATE ? sum : sum * slope_reference(pre[at]), 1);
    }
    all = (size_t)OC * (size_t)C, some = sampled(all, work_flops, 4099);
    for (size_t s = 0; s < some; s++) {
        size_t at = sample(s, some, all);
        double sum = element(matrix(dout, 1, OC), matrix(inp, C, 1), (int)(at / (size_t)C), (int)(at % (size_t)C), n, of_bf16(version));
        compare("dweight", at, dweight[at], random_at(5, at) + sum, 1);
    }
}

static const Version versions[] = {  // 1 to 4 add up all of K in one float, up to 50304 numbers
    {1, "three loops", 1e-3, 0},
    {2, "the inner loop along memory: vectors", 1e-3, 0},
    {3, "+ threads, cache blocks", 1e-3, 0},
    {4, "a tile in registers, operands where they lie", 1e-3, 0},
    {5, "+ operands packed, element by element", 1e-4, 0},
    {6, "+ packed by 4 x 4 blocks, several panels at a time", 1e-4, 0},
    {TRAINERS, "the trainer's", 1e-4, 0},
    {OF_PAIRS, "the trainer's, pairs of bf16", 1e-4, PAIRS},
    {OF_TILES, "the trainer's, tiles of bf16", 1e-4, TILES},
    {0, NULL, 0, 0}};
static const Version with_gelu[] = {
    {SEPARATE, "the product, then a pass of GELU", 1e-4, 0}, {FUSED, "GELU in the product's ending", 1e-4, 0}, {0, NULL, 0, 0}};
static const Shape odd[] = {{"67 x 51 x 133", {67, 51, 133, 0}}, {"37 x 1101 x 70", {37, 1101, 70, 0}}, {NULL, {0, 0, 0, 0}}};
static const Shape shapes[] = {{"768 to 768", {1024, 768, 768, 0}}, {"768 to 2304", {1024, 768, 2304, 0}},
                               {"768 to 3072", {1024, 768, 3072, 0}}, {"3072 to 768", {1024, 3072, 768, 0}},
                               {"768 to 50304", {1024, 768, 50304, 0}}, {NULL, {0, 0, 0, 0}}};
static const Shape wider[] = {{"768 to 3072", {1024, 768, 3072, 0}}, {NULL, {0, 0, 0, 0}}};
static const Shape narrower[] = {{"3072 to 768", {1024, 3072, 768, 0}}, {NULL, {0, 0, 0, 0}}};
static const Experiment experiments[] = {
    {"product, forward", versions, odd, shapes, set_up_forward, reset_forward, run_forward, check_forward},
    {"products, backward", versions, odd, shapes, set_up_backward, reset_backward, run_backward, check_backward},
    {"product with GELU, forward", with_gelu, odd, wider, set_up_forward, reset_forward, run_gelu_forward, check_forward},
    {"products with GELU', backward", with_gelu, odd, narrower, set_up_backward, reset_backward, run_gelu_backward, check_backward}};

int main(int argc, char **argv) { return run_experiments(argc, argv, experiments, 4); }
