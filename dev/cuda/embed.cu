/*
embed.cu: the embedding's gradient: rows of dx (n, C), summed into the row of each one's token, dwte (V, C), and place, dwpe (T, C).
*/
#include "common.h"

static int n, C, V, T;
static float *dx, *dwte, *dwpe;
static int *tokens;
static void *order;

static int token_of(size_t i) { return (int)((random_at(3, i) + 1) * (random_at(4, i) + 1) / 4 * (float)V); }  // some words are more frequent
static void check(int version) {
    (void)version;
    size_t K = (size_t)C;
    double *w = (double *)calloc((size_t)V * K, sizeof(double)), *p = (double *)calloc((size_t)T * K, sizeof(double));
    for (size_t i = 0; i < (size_t)n; i++)
        for (size_t c = 0; c < K; c++) w[(size_t)token_of(i) * K + c] += number(1, i*K + c), p[i % (size_t)T * K + c] += number(1, i*K + c);
    const float *got_w = fetch(dwte, (size_t)V * K), *got_p = fetch(dwpe, (size_t)T * K);
    for (size_t i = 0; i < (size_t)V * K; i++) compare("dwte", i, got_w[i], number(5, i) + w[i], 10);
    for (size_t i = 0; i < (size_t)T * K; i++) compare("dwpe", i, got_p[i], number(6, i) + p[i], 10);
    free(w), free(p);
}

// ---- 1: a thread an element, which adds by atomics: no two runs need give the same bits

static __global__ void add_atomically(float *dwte, float *dwpe, const float *dx, const int *tokens, size_t count, int C, int T) {
    size_t i = blockIdx.x * (size_t)blockDim.x + threadIdx.x;
    if (i >= count) return;
    size_t at = i / (size_t)C, c = i % (size_t)C;
    atomicAdd(dwte + (size_t)tokens[at] * (size_t)C + c, dx[i]);
    atomicAdd(dwpe + at % (size_t)T * (size_t)C + c, dx[i]);
}

static void set_up(const int *d) {
    n = d[0], C = d[1], V = d[2], T = d[3];
    int *host = (int *)malloc((size_t)n * sizeof(int));
    for (size_t i = 0; i < (size_t)n; i++) host[i] = token_of(i);
    tokens = (int *)allocate((size_t)n * sizeof(int));
    to_device(tokens, host, (size_t)n * sizeof(int));
    order = allocate(layers_order_bytes(n));
    layers_order(order, host, n);
    free(host);
    dx = make_floats((size_t)n * (size_t)C, 1), dwte = make_floats((size_t)V * (size_t)C, 5), dwpe = make_floats((size_t)T * (size_t)C, 6);
    work_bytes = 5.0 * n * C * sizeof(float);
}
static void reset(void) { refill(dwte, (size_t)V * (size_t)C, 5), refill(dwpe, (size_t)T * (size_t)C, 6); }
static void run(int version) {
    size_t count = (size_t)n * (size_t)C;
    if (version == 1) LAUNCH(add_atomically, blocks_for(count, THREADS), THREADS, 0, dwte, dwpe, dx, tokens, count, C, T);
    else embed_backward(dwte, dwpe, dx, NULL, tokens, order, n, T, C);
}

static const Version versions[] = {{1, "atomics", 1e-5, 1},
    {2, "the trainer's: tokens sorted by the host as it reads them, a block a word", 1e-5, 1},
    {0, NULL, 0, 0}};
static const Shape odd[] = {{"70 x 33", {70, 33, 20, 35}}, {"9000 x 4", {9000, 4, 11, 10}}, {NULL, {0, 0, 0, 0}}};
static const Shape shapes[] = {{"65536 x 768", {65536, 768, 50257, 1024}}, {NULL, {0, 0, 0, 0}}};
static const Experiment experiments[] = {{"embedding, backward", versions, odd, shapes, set_up, reset, run, check}};

int main(int argc, char **argv) { return run_experiments(argc, argv, experiments, 1); }
