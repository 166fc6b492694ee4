/*
test_rev_gpt2.c: what must hold of train_rev_gpt2.c, checked on a machine without network or Python.

It includes the trainer and, around it, the programs that generate text and evaluate, so it can call every
function, and wraps the allocator and the file operations.
Built with -DREAL=double it checks gradients against finite differences; built as the trainer is, it
checks everything else. With -DTWIN it includes the CUDA twin instead, whose activations are bf16 or, with
-DPRECISION_FP32, float. With the argument "kernels" it stops after single layers, with "layers" before what
starts processes and uses files, with "short" after the first of those; with "brief" it does everything, but
lets the trainer die at few moments. It runs
itself as the trainer (--trainer N flags...) where a process has to die: the N-th file operation then kills
it half-way, or interrupts it if N is negative; above FULL, the disk is full from operation N - FULL on. As
--sampler flags... it is the program that generates text, as --evaluator the one that evaluates.
*/
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <errno.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>
#ifdef _OPENMP
#include <omp.h>
#endif

static size_t allocated;                // bytes handed out by the allocator
static int file_operations, die_at_operation;  // 0: never

#ifdef TWIN
#ifndef EMULATE
#include <cublasLt.h>
#include <cuda_bf16.h>
#include <cuda_runtime.h>
#endif
#else
static void *counted_alloc(size_t alignment, size_t bytes) {
    allocated += bytes;
    return aligned_alloc(alignment, bytes);
}
#endif

enum { FULL = 1000 };
static int time_to_die(void) {
    file_operations++;
    if (die_at_operation < 0 && file_operations == -die_at_operation) raise(SIGINT);
    return die_at_operation > FULL ? file_operations >= die_at_operation - FULL : file_operations == die_at_operation;
}
static int end_or_fail(int error) {
    if (die_at_operation <= FULL) raise(SIGKILL);
    errno = error;
    return -1;
}
static size_t fatal_fwrite(const void *data, size_t size, size_t count, FILE *f) {
    if (!time_to_die()) return fwrite(data, size, count, f);
    (void)!fwrite(data, size, count / 2, f);
    fflush(f);
    end_or_fail(ENOSPC);
    return count / 2;
}
static int fatal_fsync(int fd) { return time_to_die() ? end_or_fail(EIO) : fsync(fd); }
static int fatal_rename(const char *from, const char *to) { return time_to_die() ? end_or_fail(EROFS) : rename(from, to); }

#ifdef TWIN
#define cudaMalloc(p, bytes) (allocated += (bytes), (cudaMalloc)(p, bytes))
#else
#define aligned_alloc counted_alloc
#endif
#define fwrite fatal_fwrite
#define fsync fatal_fsync
#define rename fatal_rename
#define REV_GPT2_PROFILE "dev/bench/profile.h"  // counts the calls
#define SAMPLE_NO_MAIN
#include "dev/sample/sample.c"
#define EVAL_NO_MAIN
#include "dev/eval/eval.c"
#ifdef TWIN
static const int twin = 1;
#else
static const int twin = 0;
#endif
#if defined(_OPENMP) && !defined(TWIN)
enum { MOST_THREADS = 3, ALL_POLICIES = 2 };  // how many threads are tried, and with which of these numbers all policies
#else
enum { MOST_THREADS = 1, ALL_POLICIES = 1 };
#endif
// Relative, of what is stored as an activation. A variable, or nvcc warns of what it rules out.
static double rounding = sizeof(act_t) == 2 ? 1 / 256.0 : 0;
// GELU in the epilogue of a product in bf16 may be made of tanh.approx, which is off by 2^-11: that moves 0.5 x (1 + t)
// by 8e-4 at most, where t is not yet 1, and its slope by 0.5 + |x| du/dx times as much. Float32 is float32 throughout.
static const double gelu_slack = sizeof(act_t) == 2 ? 1e-3 : 0, slope_slack = sizeof(act_t) == 2 ? 7e-3 : 0;

// ---- counting

static int passed, failed;
static int brief;  // few of the moments to die at, for programs that take long to begin or to run
__attribute__((format(printf, 2, 3))) static void check(int ok, const char *format, ...) {
    va_list args;
    if (ok) passed++;
    else failed++;
    if (ok) return;
    va_start(args, format);
    printf("FAILED: ");
    vprintf(format, args);
    printf("\n");
    va_end(args);
}
// The larger of two, and NaN once there was a NaN.
static double larger(double a, double b) { return isnan(a) || b <= a ? a : b; }

// How far `got` is from `want`, beyond the rounding of an activation.
static double off(double want, double got) {
    double e = fabs(got - want) - rounding * fabs(want);
    return isnan(e) || e > 0 ? e : 0;
}

static void section(const char *name) {
    static double last;
    static int before;
    if (last > 0) printf("  %d checks, %.1f s\n", passed + failed - before, seconds() - last);
    before = passed + failed;
    last = seconds();
    if (name) printf("%s\n", name);
    fflush(stdout);
}

static void set_threads(int n) {
#ifdef _OPENMP
    omp_set_num_threads(n);
#else
    (void)n;
#endif
}

// ---- small networks

static uint64_t draws;
static double uniform(void) { return 2 * random_uniform(7, 99, draws++) - 1; }

static real_t *random_reals(size_t n, double scale) {
    real_t *x = (real_t *)calloc(n, sizeof(real_t));
    for (size_t i = 0; i < n; i++) x[i] = (real_t)(scale * uniform());
    return x;
}

// Device memory until release(): with these bytes, or zeros if from is NULL
static void *lent[32];
static int lent_count;
static void *on_device(const void *from, size_t bytes) {
    void *p = lent[lent_count++] = device_alloc(bytes);
    if (from) to_device(p, from, bytes);
    return p;
}
static void release(void) {
    while (lent_count) device_free(lent[--lent_count]);
}
static real_t *from_device(const real_t *x, size_t n) {
    real_t *host = (real_t *)malloc(n * sizeof(real_t));
    to_host(host, x, n * sizeof(real_t));
    return host;
}
// As activations on the device, zeros if x is NULL; and back. bf16 rounds on the way.
static act_t *activations(const real_t *x, size_t n) {
    act_t *host = (act_t *)calloc(n, sizeof(act_t));
    for (size_t i = 0; i < n && x; i++) host[i] = (act_t)x[i];
    act_t *p = (act_t *)on_device(host, n * sizeof(act_t));
    free(host);
    return p;
}
static real_t *as_reals(const act_t *x, size_t n) {
    act_t *host = (act_t *)malloc(n * sizeof(act_t));
    real_t *y = (real_t *)malloc(n * sizeof(real_t));
    to_host(host, x, n * sizeof(act_t));
    for (size_t i = 0; i < n; i++) y[i] = (real_t)host[i];
    free(host);
    return y;
}
static param_t *weights_on_device(const real_t *w, size_t n) {  // for products
    param_t *p = (param_t *)on_device(w, n * sizeof(param_t));
    layers_weights(p, weight_copy_bytes ? on_device(NULL, n * weight_copy_bytes) : NULL, n);
    return p;
}

// One network of each mode, and conversions with other numbers: a / 2^shift, K, stem. The last is for a test to set.
static struct { int mode, a, shift, K, stem; } networks[] = {
    {BASELINE, 0, 0, 0, 0}, {MIDPOINT, 0, 0, 0, 0}, {MIDPOINT_A, 0, 0, 0, 0}, {LEAPFROG, 0, 0, 0, 0}, {HAMILTONIAN, 0, 0, 0, 0},
    {RETROFIT, 1, 2, 1, 2}, {BDIA, -1, 4, 0, 2}, {RETROFIT, -1, 0, 2, 1}, {RETROFIT, 3, 4, 3, 3}, {BDIA, -5, 3, 0, 0}, {BDIA, 1, 0, 0, 5},
    {BASELINE, 0, 0, 0, 0}};
enum { NETWORKS = sizeof networks / sizeof networks[0] - 1 };
#ifdef EMULATE
enum { KINDS = MODES };  // one network of each mode, where kernels see nothing new in others
static const int slow = 1;  // emulated kernels are: what repeats itself is left out
#else
enum { KINDS = NETWORKS };
static const int slow = 0;
#endif
static const char *name_of(int network) {
    static char text[64];
    int mode = networks[network].mode;
    snprintf(text, sizeof text, converted(mode) ? "%s (%d / 2^%d, K %d, stem %d)" : "%s", mode_names[mode], networks[network].a, networks[network].shift,
             networks[network].K, networks[network].stem);
    return text;
}
static int grid_of(int network) { return default_grids[networks[network].mode]; }
static void set_network(Config *net, int network) {
    set_mode(net, networks[network].mode);
    if (!converted(net->mode)) return;
    net->a[0] = networks[network].a, net->shift = networks[network].shift, net->K = networks[network].K, net->stem = smaller_of(networks[network].stem, net->L);
}
static int taught_by = -1;  // the objective of the next models, which have a teacher then

typedef struct { int L, C, NH, V, B, T, chunk, head_chunk; } Shape;
static const Shape odd = {5, 60, 3, 65, 3, 37, 2, 50}, deep = {96, 16, 2, 32, 2, 8, 1, 16}, even = {2, 32, 4, 128, 4, 64, 4, 256};
static const Shape least = {2, 2, 1, 32, 3, 1, 2, 3};  // where padding counts: attention's internals are larger than the MLP's
static const Shape tiles = {2, 64, 1, 65, 2, 150, 1, 100};  // several of a GPU's, and products as its library takes them

static int evaluations_of(const Config *net, int k) { return has_estimate(net, k) ? net->K + 2 : 1; }

// The first T tokens of the first sequence, as a batch of their own
static Model one_sequence(const Model *m, int T) {
    Model s = *m;
    s.B = 1, s.T = T, s.kept_planes = NULL, s.low = NULL, s.cache = NULL;
    return s;
}

// A planned and allocated model with weights large enough that the forces matter, and a batch.
static void make_model(Model *m, Shape s, int network, int memory, int grid) {
    memset(m, 0, sizeof *m);
    m->net.L = s.L, m->net.C = s.C, m->net.NH = s.NH, m->net.V = s.V, m->net.Vp = (s.V + 127) / 128 * 128, m->net.maxT = s.T + 3;
    set_network(&m->net, network);
    m->net.grid = grid;
    if (m->net.mode == MIDPOINT_A) draw_coefficients(&m->net, 5);
    m->has_teacher = taught_by >= 0, m->objective = m->has_teacher ? taught_by : CROSS_ENTROPY;
    m->B = s.B, m->T = s.T, m->chunk = s.chunk, m->head_chunk = s.head_chunk, m->training = 1, m->cache_tokens = s.T + 2;
    m->memory = smaller_of(memory, AUTO);  // AUTO, and one and two more: keeps one step, half of them, all
    m->kept_steps = memory == AUTO ? 1 : memory == AUTO + 1 ? steps(&m->net) / 2 : steps(&m->net);
    plan(m);
    model_alloc(m);
    size_t one[TENSORS], all[TENSORS], at = 0;
    tensor_sizes(&m->net, one, all);
    for (int t = 0; t < TENSORS; at += all[t++])
        for (size_t i = 0; i < all[t]; i += STAGE) {
            size_t n = piece_of(all[t] - i);
            for (size_t j = 0; j < n; j++) {
                double x = (tensor_kinds[t].kind == GAIN) + (s.L > 50 ? 0.1 : 0.3) * uniform();
                staging[j] = (param_t)(t == 0 && i + j >= (size_t)s.V * (size_t)s.C ? 0 : x);
            }
            to_device(m->params + at + i, staging, n * sizeof(param_t));
            for (size_t j = 0; j < n; j++) staging[j] *= (param_t)0.9;
            if (m->has_teacher) to_device(m->teacher + at + i, staging, n * sizeof(param_t));
        }
    int N = s.B * s.T, *inputs = (int *)malloc(2 * (size_t)N * sizeof(int)), *targets = inputs + N;
    for (int i = 0; i < N; i++) {
        inputs[i] = (int)(random_bits(3, 3, (uint64_t)i) % (uint64_t)s.V);
        targets[i] = (int)(random_bits(4, 4, (uint64_t)i) % (uint64_t)s.V);
    }
    set_batch(m, inputs, targets);
    free(inputs);
}

#ifndef TWIN
// ---- finite differences, in double precision

#define DIRECTIONS 4

// Compares a gradient with finite differences of f along random directions (+-1 in every element): the mean of
// (d . u)^2 over such u is |d|^2, so this estimates the norm of the difference over the norm of the gradient.
static void check_gradient(const char *what, double (*f)(void *), void *context, real_t *x, const real_t *gradient, size_t n) {
    const double eps = 1e-4;
    double difference = 0, norm = 0;
    real_t *saved = (real_t *)malloc(n * sizeof(real_t)), *moved = (real_t *)malloc(n * sizeof(real_t));
    to_host(saved, x, n * sizeof(real_t));
    for (int d = 0; d < DIRECTIONS; d++) {
        double value[4], along = 0;
        const double at[4] = {2, 1, -1, -2};
        for (int i = 0; i < 4; i++) {
            for (size_t j = 0; j < n; j++) {
                double u = random_bits(11, (uint64_t)d, j) & 1 ? 1 : -1;
                moved[j] = (real_t)(saved[j] + at[i] * eps * u);
                if (i == 0) along += u * gradient[j];
            }
            to_device(x, moved, n * sizeof(real_t));
            value[i] = f(context);
        }
        double measured = (-value[0] + 8 * value[1] - 8 * value[2] + value[3]) / (12 * eps);
        difference += (measured - along) * (measured - along);
        norm += along * along;
    }
    to_device(x, saved, n * sizeof(real_t));
    free(saved), free(moved);
    check(sqrt(difference / norm) <= 1e-6, "%s: the gradient differs from finite differences by %.2e", what, sqrt(difference / norm));
}

static double model_loss(void *context) {
    Model *m = (Model *)context;
    forward(m);
    head(m, 0);
    return objective_of(m);
}

static void test_network_gradients(int objective) {
    set_threads(1);  // so small a network has nothing for a second
    for (int mode = 0; mode < (objective ? RETROFIT + 1 : NETWORKS); mode += objective ? RETROFIT : 1) {
        Model m;
        size_t one[TENSORS], all[TENSORS], at = 0;
        double drift;
        taught_by = objective ? objective : -1;
        make_model(&m, odd, mode, mode == BASELINE ? STORE : REVERSE, 0);
        taught_by = -1;
        tensor_sizes(&m.net, one, all);
        forward_backward(&m, 1, &drift);
        for (int t = 0; t < TENSORS; t++) {
            char what[128];
            size_t n = t == 0 ? (size_t)m.net.V * (size_t)m.net.C : all[t];
            snprintf(what, sizeof what, "%s %s, %s", name_of(mode), tensor_kinds[t].name, objective_names[objective]);
            check_gradient(what, model_loss, &m, m.params + at, m.grads + at, n);
            at += all[t];
        }
        model_free(&m);
    }
}

// One layer on its own: y = f(x, w, b), loss = y . weights.
typedef struct {
    int kind, n, C, OC, T, NH, NKV;
    real_t *x, *w, *b, *y, *y2, *probe;  // probe: dloss/dy
    stream_t *s;
    int *tokens;
} Layer;
enum { MATMUL, MATMUL_GELU, LAYERNORM, ATTENTION, CLASSIFIER, EMBEDDING, DISTILLATION };  // and one more for the other direction

static double layer_loss(void *context) {
    Layer *l = (Layer *)context;
    size_t count = (size_t)l->n * (size_t)l->OC;
    double loss = 0;
    switch (l->kind) {
    case MATMUL: matmul_forward(l->y, l->x, l->w, l->b, l->n, l->C, l->OC); break;
    case MATMUL_GELU: matmul_gelu_forward(l->y, l->y2, l->x, l->w, l->b, l->n, l->C, l->OC); break;
    case LAYERNORM: layernorm_forward(l->y, l->s, l->x, l->w, l->b, l->n, l->C, 0); break;
    case ATTENTION: attention_forward(l->y, l->y2, l->x, l->n / l->T, l->T, l->OC, l->NH, l->NKV); break;
    case CLASSIFIER:
        memcpy(l->y2, l->x, sizeof(real_t) * (size_t)l->n * (size_t)l->C);
        classifier(l->y, l->y2, l->tokens, l->n, l->C - 3, l->C, 0);
        break;
    case DISTILLATION: case DISTILLATION + 1:
        memcpy(l->y2, l->x, sizeof(real_t) * (size_t)l->n * (size_t)l->C);
        distillation(l->b, (size_t)l->n, l->y2, l->w, l->tokens, l->n, l->C - 3, l->C, KL + l->kind - DISTILLATION, 0);
        memcpy(l->y, l->b + DIVERGENCE * l->n, sizeof(real_t) * (size_t)l->n);
        break;
    case EMBEDDING:
        stream_embed(l->s, l->s + count, l->tokens, l->w, l->b, l->n, l->T, l->OC, 0);
        for (size_t i = 0; i < count; i++) l->y[i] = l->s[i].real;
        break;
    }
    for (size_t i = 0; i < count; i++) loss += l->y[i] * l->probe[i];
    return loss;
}

static void test_layer_gradients(void) {
    enum { N = 2 * 70, C = 24, OC = 40, T = 70, NH = 6 };  // T crosses a tile of attention
    Layer l = {0, N, C, OC, T, NH, NH, random_reals(N * 3*C, 1), random_reals(OC * 100, 1), random_reals(200 * OC, 1),
               random_reals(N * 100, 0), random_reals(N * 100, 0), random_reals(N * 100, 1),
               (stream_t *)calloc(2 * N * 100, sizeof(stream_t)), (int *)calloc(N, sizeof(int))};
    real_t *dx = random_reals(N * 100, 0), *dw = random_reals(OC * 100, 0), *db = random_reals(200 * OC, 0), *dy = random_reals(N * 100, 0);
    void *scratch = device_alloc(layers_scratch_bytes(4096, 4096, 4096, 64));
    layers_begin(scratch);
    for (int i = 0; i < N * 100; i++) l.s[i].real = (real_t)uniform();

    matmul_backward(dx, dw, db, l.probe, l.x, l.w, NULL, N, C, OC);
    check_gradient("matmul input", layer_loss, &l, l.x, dx, N * C);
    check_gradient("matmul weight", layer_loss, &l, l.w, dw, OC * C);
    check_gradient("matmul bias", layer_loss, &l, l.b, db, OC);

    // GELU's slope multiplies what comes from the layer above, here the identity
    l.kind = MATMUL_GELU;
    real_t *identity = random_reals(OC * OC, 0), *ignored = random_reals(OC * OC, 0);
    for (int i = 0; i < OC; i++) identity[i*OC + i] = 1;
    layer_loss(&l);
    matmul_backward(dy, ignored, NULL, l.probe, l.y, identity, l.y2, N, OC, OC);
    memset(dw, 0, sizeof(real_t) * OC * C);
    memset(db, 0, sizeof(real_t) * OC);
    matmul_backward(dx, dw, db, dy, l.x, l.w, NULL, N, C, OC);
    check_gradient("matmul gelu input", layer_loss, &l, l.x, dx, N * C);
    check_gradient("matmul gelu weight", layer_loss, &l, l.w, dw, OC * C);

    l.kind = LAYERNORM;
    l.OC = C;
    memset(dx, 0, sizeof(real_t) * N * C);
    memset(dy, 0, sizeof(real_t) * N * C);
    memset(dw, 0, sizeof(real_t) * C);
    memset(db, 0, sizeof(real_t) * C);
    layernorm_backward(dx, dy, dw, db, l.probe, l.s, l.x, l.w, N, C, 0);
    check_gradient("layernorm add", layer_loss, &l, l.x, dy, N * C);
    check_gradient("layernorm stream", layer_loss, &l, (real_t *)l.s, dx, N * C);
    check_gradient("layernorm weight", layer_loss, &l, l.w, dw, C);
    check_gradient("layernorm bias", layer_loss, &l, l.b, db, C);

    l.kind = ATTENTION;
    for (int i = 0; i < 3; i++) {
        static const int key_heads[] = {NH, 2, 1};
        static const char *const what[] = {"attention", "attention, three heads a key", "attention, one head of keys"};
        l.NKV = key_heads[i];
        layer_loss(&l);
        attention_backward(dx, l.probe, l.x, l.y, l.y2, N / T, T, C, NH, l.NKV);
        check_gradient(what[i], layer_loss, &l, l.x, dx, (size_t)(N * (C + 2 * l.NKV * (C / NH))));
    }

    l.kind = CLASSIFIER;
    l.OC = 1;
    for (int i = 0; i < N; i++) l.tokens[i] = i % (C - 3), l.probe[i] = 2;
    memcpy(dx, l.x, sizeof(real_t) * N * C);
    classifier(l.y, dx, l.tokens, N, C - 3, C, 2);
    check_gradient("classifier", layer_loss, &l, l.x, dx, N * C);

    for (l.kind = DISTILLATION; l.kind <= DISTILLATION + 1; l.kind++) {
        memcpy(dx, l.x, sizeof(real_t) * N * C);
        distillation(l.b, N, dx, l.w, l.tokens, N, C - 3, C, KL + l.kind - DISTILLATION, 2);
        check_gradient("distillation", layer_loss, &l, l.x, dx, N * C);
    }

    l.kind = EMBEDDING;
    l.OC = C;
    memset(dw, 0, sizeof(real_t) * 30 * C);
    memset(db, 0, sizeof(real_t) * T * C);
    for (int i = 0; i < N; i++) l.tokens[i] = i * i % 30;
    embed_backward(dw, db, l.probe, NULL, l.tokens, NULL, N, T, C);
    check_gradient("embedding of tokens", layer_loss, &l, l.w, dw, 30 * C);
    check_gradient("embedding of positions", layer_loss, &l, l.b, db, T * C);
    real_t *all[] = {l.x, l.w, l.b, l.y, l.y2, l.probe, (real_t *)l.s, dx, dw, db, dy, identity, ignored};
    for (size_t i = 0; i < sizeof all / sizeof all[0]; i++) free(all[i]);
    free(l.tokens);
    device_free(scratch);
}

#endif

// ---- matrix product and attention against the obvious loops

static double gelu_reference(double x) { return 0.5 * x * (1 + tanh(0.7978845608028654 * (x + 0.044715 * x * x * x))); }
static double gelu_slope_reference(double x) {
    double t = tanh(0.7978845608028654 * (x + 0.044715 * x * x * x));
    return 0.5 * (1 + t) + 0.5 * x * (1 - t * t) * 0.7978845608028654 * (1 + 3 * 0.044715 * x * x);
}
static void round_to_bf16(real_t *x, size_t n) {
    for (size_t i = 0; i < n; i++) x[i] = (real_t)from_bf16(to_bf16((float)x[i]));
}

// Sums of products of numbers that bf16 holds; with it, all others have to be rounded to those first.
static void test_matmul(int bf16) {
    static const int shapes[][3] = {{1, 1, 1}, {7, 301, 5}, {37, 60, 180}, {130, 2201, 33}, {1200, 40, 70}, {3, 20, 3200}, {1030, 3100, 20}, {1030, 3100, 20}, {2, 60, 180}, {70, 64, 192}};  // four cross a block each, the last with its scratch for either order; one or two rows go another way
    if (!layers_bf16(bf16)) return;
    for (int i = 0; i < 10; i++) {
        int n = shapes[i][0], C = shapes[i][1], OC = shapes[i][2];
        size_t nC = (size_t)n * (size_t)C, nOC = (size_t)n * (size_t)OC, W = (size_t)OC * (size_t)C;
        real_t *x = random_reals(nC, 1), *w = random_reals(W + (size_t)OC, 1), *b = w + W, *dy = random_reals(nOC, 1), *pre = random_reals(nC, 3);
        real_t *was = random_reals(W + (size_t)OC, 1), *got[6];
        double worst = 0, worst_gelu = 0;
        size_t room = i % 2 ? layers_scratch_bytes(n, C, OC, 0) : layers_scratch_bytes(n, OC, C, 0);
        char guard[64], after[64], *scratch = (char *)on_device(NULL, room + sizeof guard);
        memset(guard, 0xA5, sizeof guard);
        to_device(scratch + room, guard, sizeof guard);
        layers_begin(scratch);
        act_t *y = activations(NULL, nOC), *gelu_y = activations(NULL, nOC), *dx = activations(NULL, nC), *slope = activations(NULL, nC);
        param_t *p = weights_on_device(w, W + (size_t)OC);
        matmul_forward(y, activations(x, nC), p, p + W, n, C, OC);
        got[0] = as_reals(y, nOC);
        round_to_bf16(x, nC), round_to_bf16(w, twin ? W + (size_t)OC : W), round_to_bf16(dy, nOC), round_to_bf16(pre, nC);
        p = weights_on_device(w, W + (size_t)OC);
        act_t *X = activations(x, nC), *dY = activations(dy, nOC);
        matmul_forward(y, X, p, p + W, n, C, OC);
        got[1] = as_reals(y, nOC);
        if (bf16 && n > 2)
            check(memcmp(got[0], got[1], nOC * sizeof(real_t)) == 0, "matmul_forward (%d, %d, %d) does not round to the nearest bf16", n, C, OC);
        matmul_gelu_forward(gelu_y, y, X, p, p + W, n, C, OC);
        got[2] = as_reals(gelu_y, nOC), got[3] = as_reals(y, nOC);
        for (int r = 0; r < n; r++)
            for (int o = 0; o < OC; o++) {
                double sum = b[o];
                for (int c = 0; c < C; c++) sum += (double)x[r*C + c] * w[o*C + c];
                worst = larger(larger(worst, off(sum, got[1][r*OC + o])), off(sum, got[3][r*OC + o]));
                // GELU of the sum, or of what was stored of it: in the product's ending, or behind it
                double gelu = got[2][r*OC + o], stored = got[3][r*OC + o];
                double apart = fmin(off(gelu_reference(sum), gelu), off(gelu_reference(stored), gelu));
                worst_gelu = larger(worst_gelu, apart - gelu_slack);
            }
        check(worst < 1e-4 && worst_gelu < 1e-4, "matmul_forward (%d, %d, %d) is off by %g, GELU by %g", n, C, OC, worst, worst_gelu);
        // the gradients of weights are added to what is there
        double sum_w = was[0], sum_b = was[W], last_w = was[W - 1], last_b = was[W + (size_t)OC - 1];
        real_t *dw = (real_t *)on_device(was, (W + (size_t)OC) * sizeof(real_t));
        matmul_backward(dx, dw, dw + W, dY, X, p, NULL, n, C, OC);
        got[4] = from_device(dw, W + (size_t)OC);
        for (int r = 0; r < n; r++) {
            sum_w += (double)dy[r*OC] * x[r*C], sum_b += dy[r*OC];
            last_w += (double)dy[r*OC + OC - 1] * x[r*C + C - 1], last_b += dy[r*OC + OC - 1];
        }
        sum_w -= got[4][0], sum_b -= got[4][W], last_w -= got[4][W - 1], last_b -= got[4][W + (size_t)OC - 1];
        check(fabs(sum_w) < 1e-3 && fabs(sum_b) < 1e-3 && fabs(last_w) < 1e-3 && fabs(last_b) < 1e-3,
              "matmul_backward (%d, %d, %d): weight or bias is off by %g, %g, %g, %g", n, C, OC, sum_w, sum_b, last_w, last_b);
        matmul_backward(slope, dw, NULL, dY, X, p, activations(pre, nC), n, C, OC);
        free(got[0]), got[0] = as_reals(dx, nC), got[5] = as_reals(slope, nC);
        worst = worst_gelu = 0;
        for (int r = 0; r < n; r++)
            for (int c = 0; c < C; c++) {
                double sum = 0;
                for (int o = 0; o < OC; o++) sum += (double)dy[r*OC + o] * w[o*C + c];
                worst = larger(worst, off(sum, got[0][r*C + c]));
                double slope = gelu_slope_reference(pre[r*C + c]), slack = slope_slack * fabs(sum);
                worst_gelu = larger(worst_gelu, off(sum * slope, got[5][r*C + c]) - slack);
            }
        check(worst < 1e-3 && worst_gelu < 1e-3, "matmul_backward (%d, %d, %d) is off by %g, times GELU' by %g", n, C, OC, worst, worst_gelu);
        to_host(after, scratch + room, sizeof after);
        check(memcmp(guard, after, sizeof guard) == 0, "matmul (%d, %d, %d) writes past its scratch", n, C, OC);
        for (int j = 0; j < 6; j++) free(got[j]);
        free(x), free(w), free(dy), free(pre), free(was);
        release();
    }
    layers_bf16(0);
}

// Scores up to about `spread`, so that later tiles have the higher ones.
static void test_attention(int bf16, double spread) {
    static const int shapes[][5] = {{2, 131, 40, 2, 2}, {1, 65, 128, 2, 2}, {1, 70, 128, 1, 1}, {1, 130, 20, 5, 5},  // B, T, C, NH, NKV
                                    {2, 131, 48, 6, 2}, {1, 70, 96, 6, 1}, {1, 129, 30, 6, 2}, {2, 66, 256, 4, 2}};  // fewer heads of keys
    if (!layers_bf16(bf16)) return;
    for (int i = 0; i < 8; i++) {
        int B = shapes[i][0], T = shapes[i][1], C = shapes[i][2], NH = shapes[i][3], NKV = shapes[i][4];
        int HS = C / NH, KV = NKV * HS, S = C + 2*KV;
        size_t N = (size_t)B * (size_t)T;
        real_t *qkv = random_reals(N * (size_t)S, sqrt(spread)), *dy = random_reals(N * (size_t)C, 1);
        double *p = (double *)calloc((size_t)T, sizeof(double)), *d = (double *)calloc(N * (size_t)S, sizeof(double));
        double worst = 0, worst_lse = 0, worst_query = 0, difference = 0, norm = 0;
        if (bf16) round_to_bf16(qkv, N * (size_t)S), round_to_bf16(dy, N * (size_t)C);  // what remains is the rounding of p, and of what is stored
        act_t *in = activations(qkv, N * (size_t)S), *out = activations(NULL, N * (size_t)C), *din = activations(NULL, N * (size_t)S);
        act_t *alone = activations(NULL, N * (size_t)C);  // a query at a time; not of all tokens
        real_t *lse = (real_t *)on_device(NULL, N * (size_t)NH * sizeof(real_t));
        layers_begin(on_device(NULL, layers_scratch_bytes((int)N, C, 4*C, NH)));
        attention_forward(out, lse, in, B, T, C, NH, NKV);
        attention_backward(din, activations(dy, N * (size_t)C), in, out, lse, B, T, C, NH, NKV);
        for (size_t token = 0; token < N; token += 13)
            attention_query(alone + token * (size_t)C, in + token / (size_t)T * (size_t)T * (size_t)S, (int)(token % (size_t)T), C, NH, NKV);
        real_t *got = as_reals(out, N * (size_t)C), *got_lse = from_device(lse, N * (size_t)NH), *got_d = as_reals(din, N * (size_t)S);
        real_t *got_alone = as_reals(alone, N * (size_t)C);
        for (int b = 0; b < B; b++)
            for (int h = 0; h < NH; h++)
                for (int t = 0; t < T; t++) {
                    double sum = 0, highest = -1e30, along = 0;
                    int at = (b*T + t)*S + h*HS, kt = (b*T + t)*S + C + h / (NH / NKV) * HS, row = (b*T + t)*C + h*HS;  // of query and key in qkv, and in out
                    for (int u = 0; u <= t; u++) {
                        double dot = 0;
                        for (int c = 0; c < HS; c++) dot += (double)qkv[at + c] * qkv[kt - (t - u)*S + c];
                        p[u] = dot / sqrt(HS);
                        highest = larger(highest, p[u]);
                    }
                    for (int u = 0; u <= t; u++) sum += p[u] = exp(p[u] - highest);
                    worst_lse = larger(worst_lse, fabs(highest + log(sum) - got_lse[(b*NH + h)*T + t]) / spread);
                    for (int c = 0; c < HS; c++) {
                        double o = 0, g = dy[row + c];
                        for (int u = 0; u <= t; u++) {
                            o += p[u] / sum * qkv[kt - (t - u)*S + KV + c];
                            d[kt - (t - u)*S + KV + c] += p[u] / sum * g;
                        }
                        along += o * g;
                        worst = larger(worst, off(o, got[row + c]) / sqrt(spread));
                        if ((b*T + t) % 13 == 0) worst_query = larger(worst_query, off(o, got_alone[row + c]) / sqrt(spread));
                    }
                    for (int u = 0; u <= t; u++) {
                        double dp = 0;
                        int ku = kt - (t - u)*S;
                        for (int c = 0; c < HS; c++) dp += (double)dy[row + c] * qkv[ku + KV + c];
                        double ds = p[u] / sum * (dp - along) / sqrt(HS);
                        for (int c = 0; c < HS; c++) d[at + c] += ds * qkv[ku + c], d[ku + c] += ds * qkv[at + c];
                    }
                }
        for (size_t j = 0; j < N * (size_t)S; j++) difference += pow(d[j] - got_d[j], 2), norm += d[j] * d[j];
        double most = bf16 ? 4e-3 : 1e-5 * fmax(1, spread / 100);
        check(worst < most && worst_lse < 1e-5, "attention %d is off by %g, its log-sum-exp by %g", i, worst, worst_lse);
        check(worst_query < most, "attention %d: a query alone is off by %g", i, worst_query);
        check(sqrt(difference / norm) < (bf16 ? 1e-2 : 1e-5 * fmax(1, spread / 10)), "attention %d: the gradient is off by %g", i, sqrt(difference / norm));
        free(qkv), free(dy), free(p), free(d), free(got), free(got_lse), free(got_d), free(got_alone);
        release();
    }
    layers_bf16(0);
}

// Losses of logits whose highest stands anywhere, against double precision.
static void test_classifier(void) {
    enum { V = 130, Vp = 256 };
    for (int at = 0; at < V; at += 43) {
        real_t x[Vp] = {0};
        double sum = 0;
        int target = 7;
        for (int v = 0; v < V; v++) x[v] = (real_t)(3 * uniform());
        x[at] = 300;
        if (rounding > 0) round_to_bf16(x, V);
        for (int v = 0; v < V; v++) sum += exp((double)x[v] - 300);
        double expected = 300 + log(sum) - x[target];
        real_t *losses = (real_t *)on_device(NULL, sizeof(real_t));
        act_t *logits = activations(x, Vp);
        classifier(losses, logits, (int *)on_device(&target, sizeof target), 1, V, Vp, 1);
        real_t *loss = from_device(losses, 1), *d = as_reals(logits, Vp);
        check(fabs(expected - *loss) < 1e-4 && fabs(d[at] - 1) < 1e-5 && fabs(d[target] + 1) < 1e-5, "a logit of 300 at %d: loss %g for %g", at, (double)*loss, expected);
        free(loss), free(d);
        release();
    }
    real_t x[16] = {1, 2, 3, -1, 0, 5, 99, 99, 0, 0, 0, 0, 0, 0, 99, 99}, *losses = (real_t *)on_device(NULL, 2 * sizeof(real_t));
    int targets[2] = {2, 5};
    act_t *logits = activations(x, 16);
    classifier(losses, logits, (int *)on_device(targets, sizeof targets), 2, 6, 8, 0.5);
    real_t *loss = from_device(losses, 2), *d = as_reals(logits, 16);
    double sum = exp(1) + exp(2) + exp(3) + exp(-1) + 1 + exp(5);
    check(fabs(loss[0] - (log(sum) - 3)) < 1e-5 && fabs(loss[1] - log(6)) < 1e-5, "classifier's losses");
    check(off(0.5 * (exp(3) / sum - 1), d[2]) < 1e-6 && off(0.5 / 6, d[8]) < 1e-6 && d[6] == 0 && d[15] == 0, "classifier's gradient");
    free(loss), free(d);
    release();
}

// Losses, divergence both ways and its gradient beside a teacher's logits, against the definitions in double precision.
static void test_distillation(void) {
    enum { N = 3, V = 70, Vp = 128 };
    for (int objective = KL; objective <= KL_TEACHER; objective++) {
        real_t x[N * Vp], y[N * Vp];
        int targets[N] = {3, 69, 11};
        for (int i = 0; i < N * Vp; i++) x[i] = (real_t)(4 * uniform()), y[i] = (real_t)(x[i] + uniform());
        for (int v = 0; v < Vp; v++) y[2*Vp + v] = x[2*Vp + v];  // the last row agrees, the first does not
        x[5] = 9, y[5] = 1, y[6] = 8;
        if (rounding > 0) round_to_bf16(x, N * Vp), round_to_bf16(y, N * Vp);
        act_t *logits = activations(x, N * Vp), *same = activations(x, N * Vp), *teacher = activations(y, N * Vp);
        real_t *out = (real_t *)on_device(NULL, METRICS * (N + 2) * sizeof(real_t));
        int *on = (int *)on_device(targets, sizeof targets);
        distillation(out, N + 2, same, teacher, on, N, V, Vp, objective, 0);
        distillation(out, N + 2, logits, teacher, on, N, V, Vp, objective, 0.5);
        real_t *held = from_device(out, METRICS * (N + 2)), *d = as_reals(logits, N * Vp), *kept = as_reals(same, N * Vp);
        double worst = 0, worst_gradient = 0;
        check(memcmp(kept, x, sizeof x) == 0, "distillation without a scale changes the logits");
        for (int i = 0; i < N; i++) {
            double lse[2] = {0, 0}, kl = 0;
            const real_t *a = x + i * Vp, *b = y + i * Vp;
            for (int v = 0; v < V; v++) lse[0] += exp((double)a[v]), lse[1] += exp((double)b[v]);
            lse[0] = log(lse[0]), lse[1] = log(lse[1]);
            for (int v = 0; v < V; v++) {
                double p = a[v] - lse[0], q = b[v] - lse[1];
                kl += objective == KL ? exp(p) * (p - q) : exp(q) * (q - p);
            }
            for (int v = 0; v < Vp; v++) {
                double p = a[v] - lse[0], q = b[v] - lse[1], g = v >= V ? 0 : objective == KL ? exp(p) * (p - q - kl) : exp(p) - exp(q);
                worst_gradient = larger(worst_gradient, off(0.5 * g, d[i * Vp + v]));
            }
            worst = larger(worst, fabs(held[i] - (lse[0] - a[targets[i]])) + fabs(held[N + 2 + i] - (lse[1] - b[targets[i]])) + fabs(held[2 * (N + 2) + i] - kl));
        }
        check(worst < 2e-5 && worst_gradient < 2e-6, "%s: losses or divergence are off by %g, the gradient by %g", objective_names[objective], worst, worst_gradient);
        check(held[3 * (N + 2)] == 0 && held[3 * (N + 2) + 2] == 1 && fabs(held[2 * (N + 2) + 2]) < 1e-6, "agreement, or a divergence of equals");
        free(held), free(d), free(kept);
        release();
    }
}

// KL of a network to the baseline with the same weights, whose projections are made smaller; equal: with the same block in every layer.
static double kl_of_conversion(int mode, int shift, int K, int stem, double projections, int equal) {
    Model m;
    size_t one[TENSORS], all[TENSORS], at = 0;
    networks[NETWORKS].mode = mode, networks[NETWORKS].a = 1, networks[NETWORKS].shift = shift;
    networks[NETWORKS].K = K, networks[NETWORKS].stem = stem;
    taught_by = KL;
    make_model(&m, odd, NETWORKS, STORE, default_grids[mode]);
    taught_by = -1;
    real_t *w = from_device(m.params, tensor_sizes(&m.net, one, all));
    for (int t = 0; t < TENSORS; at += all[t++]) {
        int writes = tensor_kinds[t].kind == PROJECTION || strstr(tensor_kinds[t].name, "projb");
        for (size_t i = 0; i < all[t]; i++) {
            if (equal && tensor_kinds[t].stacked) w[at + i] = w[at + i % one[t]];
            if (writes && (i < one[t] || !equal)) w[at + i] *= (real_t)projections;
        }
    }
    to_device(m.params, w, at * sizeof(param_t));
    to_device(m.teacher, w, at * sizeof(param_t));
    forward(&m);
    head(&m, 0);
    double kl = objective_of(&m), apart = fabs(mean_of(&m, LOSS) - mean_of(&m, TEACHER_LOSS));
    if (mode == BASELINE) check(fabs(kl) < 1e-6 && apart == 0 && mean_of(&m, AGREEMENT) == 1, "a copy of the teacher is %g and %g apart from it", kl, apart);
    free(w);
    model_free(&m);
    return kl;
}

// A student with its teacher's weights is the teacher. A conversion comes near it as a goes to 0; retrofit also with K where forces are
// small, and bdia where neighbouring blocks do nearly the same.
static void test_conversion_is_near(void) {
    double before = 1, kl[5];
    kl_of_conversion(BASELINE, 0, 0, 0, 1, 0);
    for (int shift = 1; shift < 8; shift += 2, before = kl[0]) {
        kl[0] = kl_of_conversion(BDIA, shift, 0, 0, 1, 0);
        check(kl[0] > 0 && kl[0] < before / 4 + rounding, "bdia, a = 1/2^%d: KL %g after %g", shift, kl[0], before);
    }
    if (rounding > 0) return;  // of logits, which are further apart than these
    for (int K = 0; K < 3; K++) kl[K] = kl_of_conversion(RETROFIT, 2, K, 1, 0.025, 0);
    check(kl[1] < kl[0] / 4 && kl[2] < kl[1] / 4, "retrofit: KL %g, %g, %g for K = 0, 1, 2", kl[0], kl[1], kl[2]);
    kl[3] = kl_of_conversion(BDIA, 2, 0, 1, 0.05, 1), kl[4] = kl_of_conversion(BDIA, 2, 0, 1, 0.025, 1);
    check(kl[4] < kl[3] / 2, "bdia of equal blocks: KL %g, and %g with forces half as large", kl[3], kl[4]);
}

// What is cut into pieces, for copying or for threads, is whole, and the same bits for any number of threads.
static void test_pieces(void) {
    enum { COUNT = 1000003 };  // some pieces of 1 MiB, and a part of one
    const size_t bytes = sizeof(real_t) * COUNT, n = 4443;
    real_t *x = random_reals(COUNT, 1), *zero = (real_t *)calloc(COUNT, sizeof(real_t)), *y = (real_t *)on_device(NULL, bytes), *first = NULL;
    device_copy(y, on_device(x, bytes), bytes);
    real_t *got = from_device(y, COUNT);
    check(memcmp(x, got, bytes) == 0, "device_copy");
    device_zero(y, bytes - sizeof(real_t));
    free(got), got = from_device(y, COUNT);
    check(memcmp(got, zero, bytes - sizeof(real_t)) == 0 && got[COUNT - 1] == x[COUNT - 1], "device_zero");
    free(got);
    for (size_t i = 3*n; i < 4*n; i++) x[i] *= x[i];
    for (int threads = 1; threads <= (twin ? 1 : 5); threads++) {
        real_t *all = (real_t *)on_device(x, sizeof(real_t) * 5 * n);
        act_t *force = activations(x + 2*n, n);
        set_threads(threads);
        Coefficients leapfrog = {-1, 2, 0, 0.3};
        stream_step((stream_t *)all, (stream_t *)(all + n), force, NULL, NULL, NULL, n, leapfrog, 0, 1);
        adamw(all + n, all + 2*n, all + 4*n, all + 3*n, n, 1e-3, 0.9, 0.95, 0.1, 0.7, 3);
        got = from_device(all, 5 * n);
        if (!first) first = got, got = NULL;
        else check(memcmp(first, got, sizeof(real_t) * 5 * n) == 0, "AdamW or a float stream has other bits with %d threads", threads);
        free(got);
    }
    real_t *force = as_reals(activations(x + 2*n, n), n);
    double worst = 0;
    for (size_t i = 0; i < n; i++) worst = larger(worst, fabs(2.0 * x[n + i] - x[i] + 0.3 * force[i] - first[i]));
    check(worst < 1e-6, "a step of a float stream is off by %g", worst);
    set_threads(2);
    free(x), free(zero), free(first), free(force);
    release();
}

// ---- exactness

static void test_multiplication(void) {
    int wrong = 0;
    for (int i = 0; i < 20000; i++) {
        int n = 1 + (int)(random_bits(1, 1, (uint64_t)i) % 255);
        uint16_t r = (uint16_t)(random_bits(1, 2, (uint64_t)i) % (n < 16 ? 4096u * (unsigned)n / 16 : 4096u)), was = r, r2;
        int32_t s = (int32_t)random_bits(1, 3, (uint64_t)i);
        int64_t t = multiply_sixteenths(s, n, &r), back = unmultiply_sixteenths(t, n, (r2 = r, &r2));
        wrong += fabs((double)t - (double)s * n / 16) > n || back != s || r2 != was;
    }
    check(wrong == 0, "%d of 20000 products by n/16 are wrong or do not come back", wrong);
    wrong = 0;
    for (int i = 0; i < 20000; i++) {  // by a fraction whose denominator is a power of two, the low bits kept
        int shift = i % 9, n = shift ? (int)(random_bits(1, 4, (uint64_t)i) % (1u << shift)) | 1 : 1;
        int32_t s = (int32_t)random_bits(1, 5, (uint64_t)i);
        if (i / 9 % 2) n = -n;
        int64_t t = multiply(s, n, shift);
        wrong += fabs((double)t - ldexp((double)s * n, -shift)) > 0.5 || unmultiply(t, n, shift, (uint32_t)s & ((1u << shift) - 1)) != s ||
                 unmultiply(t + 1, n, shift, (uint32_t)s & ((1u << shift) - 1)) == s;
    }
    check(wrong == 0, "%d of 20000 products by n/2^m are wrong or do not come back", wrong);
}

static void test_policies(int bf16) {
    Shape shapes[] = {odd, deep, even, odd, least};
    if (!layers_bf16(bf16)) return;
    if (slow) shapes[1].chunk = 2;
    if (sizeof(act_t) == 2) shapes[2] = tiles;
    for (int s = 0; s < 5; s++)  // the fourth time with a teacher
        for (int mode = MIDPOINT; mode < NETWORKS; mode++) {
            param_t *reference = NULL;
            double loss0 = 0;
            int again = mode > BDIA;  // a network of this kind has been here: what takes long is left out
            if ((again || (bf16 && !twin)) && s > 1) continue;
            if (again && (bf16 || slow)) continue;
            if (slow && s == 2 && mode != MIDPOINT && mode != HAMILTONIAN) continue;
            if (s == 3 && mode > MIDPOINT_A && mode < RETROFIT) continue;
            taught_by = s == 3 ? KL : -1;
            for (int threads = again ? ALL_POLICIES : 1; threads <= (again ? ALL_POLICIES : MOST_THREADS); threads++)
                for (int memory = threads > ALL_POLICIES ? REVERSE : STORE; memory <= (threads == ALL_POLICIES ? AUTO + 2 : REVERSE); memory++) {
                    Model m;
                    double drift, loss;
                    if (slow && s > 0 && memory != STORE && memory != REVERSE && memory != AUTO + 1) continue;
                    draws = 0;
                    set_threads(threads);
                    make_model(&m, shapes[s], mode, memory, mode == MIDPOINT_A ? 23 : 20);
                    size_t bytes = parameter_count(&m.net) * sizeof(param_t);
                    loss = forward_backward(&m, 1, &drift);
                    param_t *grads = (param_t *)malloc(bytes);
                    to_host(grads, m.grads, bytes);
                    if (!reference) {
                        double norm = norm_squared(m.grads, parameter_count(&m.net));
                        check(isfinite(norm) && norm > 1e-6 && !stream_take_fault(), "%s L=%d: the gradient's norm is %g", name_of(mode), m.net.L, norm);
                        reference = (param_t *)malloc(bytes);
                        memcpy(reference, grads, bytes);
                        loss0 = loss;
                    }
                    check(loss == loss0 && memcmp(reference, grads, bytes) == 0, "%s L=%d: --memory %s, %d steps kept, with %d threads has other gradients",
                          name_of(mode), m.net.L, memory_names[m.memory], m.kept_steps, threads);
                    if (memory >= REVERSE) check(drift == 0, "%s L=%d: drift %g", name_of(mode), m.net.L, drift);
                    if (s == 3 && threads == 1) {  // the same batch again: what the first left in buffers must not matter
                        device_zero(m.grads, bytes);
                        forward_backward(&m, 1, &drift);
                        to_host(grads, m.grads, bytes);
                        check(memcmp(reference, grads, bytes) == 0, "%s L=%d: --memory %s, a second pass has other gradients", name_of(mode), m.net.L, memory_names[m.memory]);
                    }
                    free(grads);
                    model_free(&m);
                }
            free(reference);
        }
    for (int threads = 1; threads <= MOST_THREADS; threads++) {  // baseline has two policies, and is taught by the way
        Model m[2];
        real_t *grads[2];
        double drift;
        for (int memory = STORE; memory <= CHECKPOINT; memory++) {
            draws = 0;
            set_threads(memory == STORE ? 1 : threads);
            make_model(&m[memory], odd, BASELINE, memory, 0);
            forward_backward(&m[memory], 1, &drift);
            grads[memory] = from_device(m[memory].grads, parameter_count(&m[memory].net));
        }
        check(memcmp(grads[0], grads[1], parameter_count(&m[0].net) * sizeof(real_t)) == 0, "baseline: store and checkpoint differ with %d threads", threads);
        free(grads[0]), free(grads[1]);
        model_free(&m[0]), model_free(&m[1]);
    }
    taught_by = -1;
    set_threads(2);
    layers_bf16(0);
}

static int calls_of(const char *name) {
    for (Profile *p = profiles; p->name; p++)
        if (strcmp(p->name, name) == 0) return p->calls;
    return 0;
}

// A step whose internals are kept is not evaluated again: dev/bench/profile.h counts the calls.
static void test_work(void) {
    for (int mode = MIDPOINT; mode < KINDS; mode += slow ? RETROFIT - MIDPOINT : 1)
        for (int memory = STORE; memory <= AUTO + 2; memory++) {
            Model m;
            double drift;
            int chunks = 2, expected = 0, norms;  // odd has 3 sequences, 2 a chunk
            make_model(&m, odd, mode, memory, grid_of(mode));
            norms = (m.B * m.T + m.head_chunk - 1) / m.head_chunk;
            memset(profiles, 0, sizeof profiles);
            profiling = 1;
            forward_backward(&m, 1, &drift);
            profile(NULL, 0, 0);
            profiling = 0;
            for (int k = 0; k < steps(&m.net); k++) {
                int halves = halves_of(&m.net, k) == BLOCK ? 2 : 1, kept = keeps_internals(&m, k), estimates = 2 * (evaluations_of(&m.net, k) - 1);
                if (halves_of(&m.net, k) & ATTN) expected += chunks * evaluations_of(&m.net, k) * (kept ? 1 : 2);
                // on the way forward, again if not kept, and for gradients but where one is left from that
                norms += chunks * (halves + estimates + (kept ? 0 : halves + estimates) + halves - !kept + estimates);
            }
            check(calls_of("layernorm_forward") == norms, "%s, %s, %d steps kept: %d layernorms, not %d", name_of(mode), memory_names[m.memory], m.kept_steps,
                  calls_of("layernorm_forward"), norms);
            check(calls_of("attention_forward") == expected && calls_of("attention_backward") == chunks * evaluations(&m.net, steps(&m.net)) && calls_of("classifier") > 0,
                  "%s, %s, %d steps kept: attention is computed %d times, not %d", name_of(mode), memory_names[m.memory], m.kept_steps,
                  calls_of("attention_forward"), expected);
            model_free(&m);
        }
}

// Gradients of products in bf16 are near those in float32, and not the same.
static void test_bf16_gradients(void) {
    for (int mode = 0; mode < NETWORKS && layers_bf16(0) && layers_bf16(1); mode++) {
        real_t *g[2];
        double difference = 0, norm = 0, drift;
        size_t P = 0;
        for (int bf16 = 0; bf16 < 2; bf16++) {
            Model m;
            layers_bf16(bf16);
            draws = 0;
            make_model(&m, even, mode, mode == BASELINE ? STORE : REVERSE, grid_of(mode));
            forward_backward(&m, 1, &drift);
            P = parameter_count(&m.net);
            g[bf16] = (real_t *)malloc(P * sizeof(real_t));
            to_host(g[bf16], m.grads, P * sizeof(real_t));
            model_free(&m);
        }
        for (size_t i = 0; i < P; i++) difference += pow((double)g[1][i] - g[0][i], 2), norm += pow((double)g[0][i], 2);
        check(difference > 0 && sqrt(difference / norm) < 0.05, "%s: gradients in bf16 are off by %g", name_of(mode), sqrt(difference / norm));
        free(g[0]), free(g[1]);
    }
    layers_bf16(0);
}

static void flip(stream_t *s, int bit) {
    stream_t x;
    to_host(&x, s, sizeof x);
    x.fixed ^= 1 << bit;
    to_device(s, &x, sizeof x);
}

// A bit of a stream flips in mid-backward, or before it: the streams do not come back to the embedding.
static void test_flipped_bit(void) {
    for (int mode = MIDPOINT; mode < KINDS; mode++)
        for (int bit = 0; bit < 31; bit += slow ? 30 : 6) {
            Model m;
            double drift;
            make_model(&m, odd, mode, REVERSE, grid_of(mode));
            forward(&m);
            head(&m, 1.0 / (m.B * m.T));
            for (int k = steps(&m.net) - 1; k >= 0; k--) {
                if (k == steps(&m.net) / 2) flip(m.prev + 1234, bit);
                step_back(&m, k);
            }
            drift = drift_of(&m);
            check(drift > 0, "%s: bit %d flipped in mid-backward went unnoticed", name_of(mode), bit);
            stream_take_fault();
            forward(&m);
            flip(m.cur + 77, bit);
            backward(&m, 1, &drift);
            check(stream_take_fault() || drift > 0, "%s: bit %d flipped before the backward pass went unnoticed", name_of(mode), bit);
            if (m.kept_planes) {  // steps with alpha = 0: what they made, what they overwrote, and what comes from there
                forward(&m);
                head(&m, 1.0 / (m.B * m.T));
                m.uncancelled = 0;
                for (int k = steps(&m.net) - 1; k >= 0; k--) {
                    if (k == 0) flip(m.cur + 1234, bit);
                    step_back(&m, k);
                }
                check(drift_of(&m) > 0, "%s: bit %d flipped in the stem went unnoticed", name_of(mode), bit);
                stream_take_fault();
                forward(&m);
                flip(m.kept_planes + (size_t)(m.net.stem - 1) * plane_size(&m) + 99, bit);
                backward(&m, 1, &drift);
                check(stream_take_fault() || drift > 0, "%s: bit %d flipped in a kept plane went unnoticed", name_of(mode), bit);
            }
            forward_backward(&m, 1, &drift);
            check(!stream_take_fault() && drift == 0, "%s: a flipped bit is not forgotten by the next pass", name_of(mode));
            if (m.low) {
                forward(&m);
                flip((stream_t *)m.low + 5, bit);
                backward(&m, 1, &drift);
                check(drift > 0, "%s: bit %d flipped among the low bits went unnoticed", name_of(mode), bit);
            }
            model_free(&m);
        }
}

// In a process of its own: the trainer's check of such a step ends it.
static int flipped_bit_ends(void) {
    Model m;
    double drift;
    make_model(&m, odd, LEAPFROG, REVERSE, 20);
    forward(&m);
    flip(m.prev + 1234, 3);
    double loss = backward(&m, 1, &drift);
    check_numbers(&m, 1, loss, drift);
    return 0;
}

static void fill(param_t *p, size_t count, double value) {
    param_t *x = (param_t *)malloc(count * sizeof(param_t));
    for (size_t i = 0; i < count; i++) x[i] = (param_t)value;
    to_device(p, x, count * sizeof(param_t));
    free(x);
}

// A force that is NaN or too large, an embedding that is, and a sum of two values inside the range that leaves it.
static void test_range(void) {
    static const char *const what[] = {"a force of 1e5", "a force that is NaN", "an embedding of 1e5", "a sum of 1500 and more"};
    for (int mode = MIDPOINT; mode < KINDS; mode++)
        for (int kind = 0; kind < 4; kind++) {
            Model m;
            double drift;
            make_model(&m, odd, mode, REVERSE, 20);
            Tensors w = tensors_at(&m.net, m.params, steps(&m.net) > m.net.L ? 0 : 2);
            size_t C = (size_t)m.net.C, words = (size_t)m.net.V * C;
            if (kind < 2) fill(w.fcprojb + 7, 1, kind ? NAN : 1e5);
            if (kind == 2) fill(w.wte + 65, 1, 1e5), fill(m.params + (size_t)m.net.Vp * C + 5, 1, 1e5);
            if (kind == 3) {
                fill(m.params, words, 1500);
                fill(w.attprojb, C, 1500 / coefficients(&m.net, 0).gamma);
            }
            forward_backward(&m, 1, &drift);
            check(stream_take_fault() && !stream_take_fault(), "%s: %s went unnoticed", name_of(mode), what[kind]);
            model_free(&m);
        }
}

// ---- memory

static void test_plan(void) {
    for (int i = 0; i < 2 * NETWORKS; i++)
        for (int mode = i / 2, memory = STORE; memory <= (mode == BASELINE ? CHECKPOINT : AUTO + 2); memory++) {
            Model m;
            size_t rows[ROWS], before = allocated;
            taught_by = i % 2 ? KL : -1;
            make_model(&m, odd, mode, memory, mode == BASELINE ? 0 : 20);
            taught_by = -1;
            plan_rows(&m, rows);
            check(allocated - before == rows[TOTAL], "%s, %s: planned %zu bytes, allocated %zu", name_of(mode), memory_names[m.memory],
                  rows[TOTAL], allocated - before);
            model_free(&m);
        }
    // GPT-2 124M, 64 sequences of 1024 tokens, default chunks
    Model m;
    memset(&m, 0, sizeof m);
    m.net.L = 12, m.net.C = 768, m.net.NH = 12, m.net.V = 50257, m.net.Vp = 50304, m.net.maxT = 1024, m.net.grid = 20;
    m.B = 64, m.T = 1024, m.head_chunk = head_chunk_tokens, m.chunk = default_chunk(m.T), m.training = 1;
    for (int mode = MIDPOINT; mode < NETWORKS; mode++) {
        size_t at12[ROWS], at96[ROWS], token_layers = (size_t)m.B * (size_t)m.T * 12;
        set_network(&m.net, mode), m.memory = REVERSE;
        for (int k = 0; k < 96 && mode == MIDPOINT_A; k++) m.net.a[k] = 16;
        m.net.L = 96, plan(&m), plan_rows(&m, at96);
        m.net.L = 12, plan(&m), plan_rows(&m, at12);
        size_t plane = (size_t)m.B * (size_t)m.T * 768, stem = (size_t)m.net.stem, bits = plane / 8 * (size_t)m.net.shift * converted(m.net.mode);
        check(at12[ACTIVATIONS] - at12[KEPT] == at96[ACTIVATIONS] - at96[KEPT] && at12[KEPT] == 4 * plane * stem + (12 - stem) * bits &&
              at96[KEPT] == 4 * plane * stem + (96 - stem) * bits, "%s: %zu bytes of activations at L=12, %zu at L=96; kept %zu and %zu", name_of(mode),
              at12[ACTIVATIONS], at96[ACTIVATIONS], at12[KEPT], at96[KEPT]);
        check(converted(m.net.mode) || (double)at12[ACTIVATIONS] <= ((mode == MIDPOINT_A ? 1.40 : 1.30) + (twin ? rounding > 0 ? 1 : 3 : 0)) * (1 << 30), "%s: %zu bytes of activations", name_of(mode), at12[ACTIVATIONS]);  // a GPU's chunks are larger
        m.memory = STORE, plan(&m), plan_rows(&m, at12);
        check(at12[KEPT] <= (size_t)evaluations_of(&m.net, 11) * token_layers * 768 * (14*sizeof(act_t) + 2*sizeof(stream_t)), "%s: store keeps %zu bytes", name_of(mode), at12[KEPT]);
        // a budget is used up to the last step that fits
        m.net.L = 96, m.memory = AUTO;
        for (int share = 0; share <= 8; share++) {
            double least = plan_keeping(&m, 0), most = plan_keeping(&m, steps(&m.net)), budget = least + (most - least) / 8 * share;
            int enough = plan_within(&m, budget), kept = m.kept_steps, more = kept < steps(&m.net) && plan_keeping(&m, kept + 1) <= budget;
            check(enough && plan_keeping(&m, kept) <= budget && !more && (abs(kept - steps(&m.net) * share / 8) <= 1 || evaluations_of(&m.net, kept) > 1),
                  "%s: a budget of %.0f bytes keeps %d steps", name_of(mode), budget, kept);
            check(!plan_within(&m, least - 1) && m.kept_steps == 0, "%s: a budget that is too small is enough", name_of(mode));
        }
    }
}

#ifndef TWIN
// Peak resident memory minus that at start is the plan. In a process of its own, since a peak never falls.
static int resident_matches_plan(int memory) {
    Shape s = {3, 256, 4, 512, 16, 512, 2, 512};  // a plane of 8 MiB
    Model m;
    size_t rows[ROWS];
    double drift;
    long before = (long)device_peak_bytes();
    make_model(&m, s, MIDPOINT, memory, 20);
    forward_backward(&m, 1, &drift);
    update(&m, 1e-3, 0.9, 0.95, 0.1, 1);
    plan_rows(&m, rows);
    long off = (long)device_peak_bytes() - before - (long)rows[TOTAL];
    if (labs(off) <= 4 << 20) return 0;
    printf("resident memory is off its plan of %zu by %ld bytes\n", rows[TOTAL], off);
    return 1;
}
#endif

// ---- optimizer, schedule, bf16

static void test_optimizer(void) {
    double p = 0.5, m1 = 0, v1 = 0;
    real_t x[4] = {0.5, 0, 0, 0}, *at = (real_t *)on_device(x, sizeof x);  // weight, gradient, two moments
    for (int t = 1; t <= 5; t++) {
        double g = 0.3 * t - 0.7, clip = 0.5;
        x[1] = (real_t)g;
        to_device(at + 1, x + 1, sizeof(real_t));
        adamw(at, at + 1, at + 2, at + 3, 1, 1e-2, 0.9, 0.95, 0.1, clip, t);
        m1 = 0.9 * m1 + 0.1 * g * clip, v1 = 0.95 * v1 + 0.05 * g * clip * g * clip;
        p -= 1e-2 * 0.1 * p;
        p -= 1e-2 * (m1 / (1 - pow(0.9, t))) / (sqrt(v1 / (1 - pow(0.95, t))) + 1e-8);
        to_host(x, at, sizeof(real_t));
        check(fabs(p - x[0]) < 1e-6, "AdamW step %d: %.9g for %.9g", t, (double)x[0], p);
    }
    release();
    opt.rate = 1, opt.warmup = 10, opt.final_fraction = 0.1;
    check(fabs(learning_rate(0, 110) - 1 / 11.0) < 1e-12 && learning_rate(10, 110) == 1 && fabs(learning_rate(60, 110) - 0.55) < 1e-12 &&
          fabs(learning_rate(110, 110) - 0.1) < 1e-12, "the schedule is not nanoGPT's cosine");
    check(to_bf16(1.0f) == 0x3F80 && to_bf16(1.00390625f) == 0x3F80 && to_bf16(1.01171875f) == 0x3F82 && from_bf16(0xC040) == -3.0f &&
          to_bf16((float)NAN) == 0x7FC0, "bf16 is not rounded to nearest even");
}

// update: clips at norm 1, decays matrices and embeddings and nothing else, touches every tensor.
static void test_update(void) {
    Model m;
    size_t one[TENSORS], all[TENSORS], at = 0;
    make_model(&m, odd, MIDPOINT, REVERSE, 20);
    size_t P = tensor_sizes(&m.net, one, all);
    real_t *before = from_device(m.params, P), *after, first, last;
    device_zero(m.grads, P * sizeof(real_t));
    update(&m, 0.01, 0.9, 0.95, 0.5, 1);
    after = from_device(m.params, P);
    for (int t = 0; t < TENSORS; at += all[t++]) {
        int matrix = strcmp(tensor_kinds[t].name + strlen(tensor_kinds[t].name) - 1, "b") != 0 && strncmp(tensor_kinds[t].name, "ln", 2) != 0;
        double worst = 0;
        for (size_t i = at; i < at + all[t]; i++) worst = larger(worst, fabs(after[i] - before[i] * (matrix ? 1 - 0.01 * 0.5 : 1)));
        check(worst < 1e-6, "decay of %s is off by %g", tensor_kinds[t].name, worst);
    }
    for (size_t i = 0; i < P; i++) after[i] = 1;
    to_device(m.grads, after, P * sizeof(real_t));
    double norm = update(&m, 0, 0.9, 0.95, 0, 1);
    to_host(&first, m.m, sizeof first), to_host(&last, m.m + P - 1, sizeof last);
    check(fabs(norm - sqrt((double)P)) < 1e-3 && fabs(first - 0.1 / norm) < 1e-8 && fabs(last - 0.1 / norm) < 1e-8, "the gradient is not clipped at norm 1");
    fill(m.grads + 5, 1, NAN);
    free(before), before = from_device(m.params, P);
    check(isnan(update(&m, 1, 0.9, 0.95, 1, 2)), "the norm of a gradient that is NaN");
    free(after), after = from_device(m.params, P);
    check(memcmp(before, after, P * sizeof(real_t)) == 0, "a gradient that is NaN changed the weights");
    free(before), free(after);
    model_free(&m);
}

#ifndef TWIN
// The vectorized exponential and what is built on it, against libm.
static void test_functions(void) {
    double worst = 0, worst_gelu = 0;
    for (double x = -80; x < 80; x += 0.01) {
        double u = 0.7978845608028654 * (x + 0.044715 * x * x * x), t = tanh(u), du = 0.7978845608028654 * (1 + 3 * 0.044715 * x * x);
        worst = larger(worst, fabs((double)real_exp((real_t)x) / exp((double)(real_t)x) - 1));
        worst_gelu = larger(worst_gelu, fabs((double)gelu((real_t)x) - 0.5 * x * (1 + t)) / fmax(1, fabs(x)));
        worst_gelu = larger(worst_gelu, fabs((double)gelu_slope((real_t)x) - (0.5 * (1 + t) + 0.5 * x * (1 - t * t) * du)));
    }
    check(worst < 4e-7, "exp is off by %g", worst);
    check(worst_gelu < 4e-6, "GELU or its slope is off by %g", worst_gelu);  // u itself is rounded
    check(isnan(real_exp((real_t)NAN)) && isnan(real_exp((real_t)-NAN)) && real_exp(0) == 1 && real_exp(-1e30f) == 0 && real_exp(-INFINITY) == 0 &&
          real_exp(-86.9f) > 0 && real_exp(88.6f) > 2.9e38 && real_exp(100) > 3.4e38 && real_exp(1e3f) > 3.4e38 && real_exp(1e30f) > 3.4e38 &&
          real_exp(INFINITY) > 3.4e38, "exp at NaN, 0 or far out");
}

#endif

// A shorter batch of one sequence goes through the same numbers: what comes later changes nothing before it.
static void test_causality(void) {
    for (int memory = STORE; memory <= REVERSE; memory++) {
        Model m;
        size_t row = 60 * sizeof(stream_t);
        make_model(&m, odd, HAMILTONIAN, memory, 20);
        forward(&m);
        stream_t *whole = (stream_t *)malloc(row * (size_t)m.T), *some = (stream_t *)malloc(row * (size_t)m.T);
        to_host(whole, m.cur, row * (size_t)m.T);
        for (int t = 3; t <= m.T; t += 12) {  // one or two tokens take another path through the matrix product
            double worst = 0;
            Model shorter = one_sequence(&m, t);
            forward(&shorter);
            to_host(some, shorter.cur, row * (size_t)t);
            for (int i = 0; i < 60 * t; i++) worst = larger(worst, abs(whole[i].fixed - some[i].fixed) / 1048576.0);
            check(worst <= (twin ? 0.1 : 0), "the first %d tokens depend on what follows, by %g", t, worst);  // libraries choose by size
        }
        free(whole), free(some);
        model_free(&m);
    }
}

// What is printed from capture to captured, in memory of its own
static FILE *captured_file;
static int captured_stdout;
static void capture(void) {
    captured_file = tmpfile();
    captured_stdout = dup(1);
    fflush(stdout);
    dup2(fileno(captured_file), 1);
}
static char *captured(void) {
    char *text = (char *)calloc(4096, 1);
    fflush(stdout);
    dup2(captured_stdout, 1);
    close(captured_stdout);
    rewind(captured_file);
    check(fread(text, 1, 4095, captured_file) < 4095, "too much text");
    fclose(captured_file);
    return text;
}

// What generate prints
static char *generated(Model *m, const Tokenizer *z, const int *prompt, int given, int length, Sampler s) {
    capture();
    generate(m, z, prompt, given, length, s);
    return captured();
}

// The logits of a token whose past is in the cache are those of a whole forward pass, in every mode and however many came at once.
static void test_cache(int bf16) {
    if (!layers_bf16(bf16)) return;
    for (int mode = 0; mode < KINDS; mode++)
        for (int s = 0; s < 2; s++) {
            Model m;
            make_model(&m, s ? even : odd, mode, mode == BASELINE ? STORE : REVERSE, grid_of(mode));
            size_t V = (size_t)m.net.V;
            float *whole = (float *)malloc(V * (size_t)m.T * sizeof(float));
            int *tokens = (int *)malloc((size_t)m.T * sizeof(int));
            double worst = 0, largest = 0;
            to_host(tokens, m.inputs, (size_t)m.T * sizeof(int));
            Model g = one_sequence(&m, m.T);
            forward(&g);
            for (int t = 0; t < m.T; t++) {
                head_logits(&g, t, 1);
                host_logits(&m, 0, whole + V * (size_t)t);
            }
            for (int first = 1; first < m.T; first += slow ? 13 : 5) {
                next_logits(&m, tokens, first, 0);
                for (int t = first; t < m.T; t++) {
                    const float *one = next_logits(&m, tokens + t, 1, t);
                    for (size_t v = 0; v < V; v++) {
                        worst = larger(worst, fabs(one[v] - whole[V * (size_t)t + v]));
                        largest = larger(largest, fabs(one[v]));
                    }
                }
                to_device(m.inputs, tokens, (size_t)m.T * sizeof(int));
            }
            check(worst < (bf16 ? 3e-2 : 1e-5) * fmax(1, largest), "%s: cached logits are off by %g of %g", name_of(mode), worst, largest);
            free(whole), free(tokens);
            model_free(&m);
        }
    layers_bf16(0);
}

// Greedy text is what whole forward passes would choose; it ends at an end of text; another series of draws is another text.
static void test_generate(void) {
    for (int i = 0; i < 2 * KINDS; i++) {
        Model m;
        Shape shape = odd;
        int mode = i / 2, beyond = i % 2;  // beyond the T of training
        if (beyond) shape.T = 6, shape.head_chunk = 10;
        make_model(&m, shape, mode, mode == BASELINE ? CHECKPOINT : REVERSE, grid_of(mode));
        Tokenizer z = tokenizer_open(NULL, m.net.V);
        Sampler greedy = {0, 0, 1, 0}, free_draws = {1, 0, 1, 0};
        int prompt[40] = {3, 1, 4, 1, 5}, length = beyond ? 6 : 20, given = beyond ? 3 : 5;
        float logits[65];
        double worst = 0;
        char *text = generated(&m, &z, prompt, given, length, greedy), *again, *next = text;
        for (int t = given; t < given + length; t++) {
            int best = 0;
            to_device(m.inputs, prompt, (size_t)t * sizeof(int));
            Model whole = one_sequence(&m, t);
            forward(&whole);
            head_logits(&whole, t - 1, 1);
            host_logits(&m, 0, logits);
            for (int v = 1; v < m.net.V; v++) best = logits[v] > logits[best] ? v : best;
            prompt[t] = (int)strtol(next, &next, 10);
            if (prompt[t] < 0 || prompt[t] >= m.net.V) prompt[t] = 0;
            worst = larger(worst, logits[best] - logits[prompt[t]]);
        }
        check(worst <= (twin ? 0.1 : 0) && strcmp(next, " ") == 0, "%s: greedy text is %s, by %g not the likeliest", name_of(mode), text, worst);
        z.eot = prompt[given];
        free(text);
        text = generated(&m, &z, prompt, given, length, greedy);
        check(text[0] == 0, "after an end of text comes %s", text);
        free(text);
        z.eot = -1;
        text = generated(&m, &z, prompt, given, length, free_draws);
        free_draws.series = 1;
        again = generated(&m, &z, prompt, given, length, free_draws);
        check(strcmp(text, again) != 0, "two series draw the same text");
        free(text), free(again);
        free(z.texts);
        model_free(&m);
    }
}

// Samples in training are generate's, at temperature 1 from all tokens, however far the cache in the gradients reaches.
static void test_sample_step(void) {
    Job j;
    memset(&j, 0, sizeof j);
    make_model(&j.m, odd, MIDPOINT, REVERSE, 20);
    j.z = tokenizer_open(NULL, j.m.net.V);
    j.m.cache_tokens = 12, j.step = 3, j.run.seed = 5;
    Sampler s = {1, 0, 5, 3};
    int start = first_token(&j.z);
    capture();
    printf("--- sample after step 3\n");
    generate(&j.m, &j.z, &start, 1, 12, s);
    printf("\n---\n");
    char *text = captured();
    capture();
    sample_step(&j);
    char *again = captured();
    check(strlen(text) > 40 && strcmp(text, again) == 0, "a sample in training is %s, not %s", again, text);
    free(text), free(again), free(j.z.texts);
    model_free(&j.m);
}

// What the embedding adds to the gradients of words comes to the same as what it adds to those of places: every token has one of each.
static void test_embedding(void) {
    Model m;
    double drift, worst = 0, most = 0;
    make_model(&m, odd, MIDPOINT, REVERSE, 20);
    size_t P = parameter_count(&m.net), C = (size_t)m.net.C, words = (size_t)m.net.Vp;
    forward(&m);
    head(&m, 1.0 / (m.B * m.T));
    real_t *of_head = from_device(m.grads, P);
    device_zero(m.grads, P * sizeof(real_t));
    forward_backward(&m, 1, &drift);
    real_t *all = from_device(m.grads, P);
    for (size_t c = 0; c < C; c++) {
        double word = 0, place = 0;
        for (size_t v = 0; v < words; v++) word += (double)all[v*C + c] - of_head[v*C + c];
        for (size_t t = 0; t < (size_t)m.net.maxT; t++) place += all[(words + t) * C + c];
        worst = larger(worst, fabs(word - place)), most = larger(most, fabs(place));
    }
    check(most > 0 && worst < 1e-4 * most, "gradients of words are off those of places by %g of %g", worst, most);
    free(of_head), free(all);
    model_free(&m);
}

static void test_accumulation(void) {
    Model whole, half;
    Shape s = even;
    double drift, worst = 0, norm = 0;
    make_model(&whole, s, MIDPOINT, REVERSE, 20);
    forward_backward(&whole, 1, &drift);
    s.B = 2, s.chunk = 1;
    draws = 0;
    make_model(&half, s, MIDPOINT, REVERSE, 20);
    size_t P = parameter_count(&half.net);
    device_copy(half.params, whole.params, P * sizeof(param_t));
    for (int i = 0; i < 2; i++) {
        int tokens[2][2 * 64];  // of even's T
        to_host(tokens[0], whole.inputs + i * 2 * s.T, sizeof tokens[0]);
        to_host(tokens[1], whole.targets + i * 2 * s.T, sizeof tokens[1]);
        set_batch(&half, tokens[0], tokens[1]);
        forward_backward(&half, 0.5, &drift);
    }
    real_t *a = from_device(whole.grads, P), *b = from_device(half.grads, P);
    for (size_t i = 0; i < P; i++) worst = larger(worst, fabs(a[i] - b[i])), norm = larger(norm, fabs(a[i]));
    free(a), free(b);
    check(worst < (1e-5 + rounding) * norm, "two micro-batches differ from one batch by %g of %g", worst, norm);
    model_free(&whole), model_free(&half);
}

// ---- the program: files, resuming, bad input

static char self[PATH], dir[] = "/tmp/rev_gpt2_test_XXXXXX", output[8192];

// Is what was printed one line, with this word? Of the twin's lines the trainer's are counted: a card's driver may have
// any to say, and the trainer one of its own where the library has no way to multiply.
static int one_line(const char *word) {
    static const char ours[] = "_rev_gpt2: ", library[] = "train_rev_gpt2: cuBLASLt has no way";
    int lines = 0, found = 0;
    for (char *line = output, *end; (end = strchr(line, '\n')) != NULL; line = end + 1) {
        char *at = strstr(line, word);
        int counts = strncmp(line + strcspn(line, "_"), ours, strlen(ours)) == 0 && strncmp(line, library, strlen(library)) != 0;
        if (twin && !counts) continue;
        lines++;
        found |= at && at < end;
    }
    return lines == 1 && found;
}

// Runs this program as another, argv[1 .. argc - 1], with the flags. After `milliseconds`, if not 0, it is killed.
// Returns its exit status, or 256 + the signal; its stderr is left in `output`, its stdout in the file `stdout`.
// A flag's value is one word; _ stands for a space.
static int run_as(char **argv, int argc, int milliseconds, const char *format, va_list args) {
    char flags[2048], path[PATH], out[PATH];
    int status;
    vsnprintf(flags, sizeof flags, format, args);
    snprintf(path, sizeof path, "%s/stderr", dir);
    snprintf(out, sizeof out, "%s/stdout", dir);
    for (char *word = strtok(flags, " "); word && argc < 63; word = strtok(NULL, " ")) {
        argv[argc++] = word;
        for (char *c = word; strcmp(argv[argc - 2], "--prompt") == 0 && *c; c++) *c = *c == '_' ? ' ' : *c;
    }
    fflush(stdout);
    pid_t child = fork();
    if (child == 0) {
        if (!freopen(out, "w", stdout) || !freopen(path, "w", stderr)) _exit(99);
        execv(self, argv);
        _exit(99);
    }
    if (milliseconds) {
        usleep((useconds_t)milliseconds * 1000);
        kill(child, SIGKILL);
    }
    waitpid(child, &status, 0);
    FILE *f = fopen(path, "r");
    output[f ? fread(output, 1, sizeof output - 1, f) : 0] = 0;
    if (f) fclose(f);
    return WIFSIGNALED(status) ? 256 + WTERMSIG(status) : WEXITSTATUS(status);
}

// The trainer; operation as --trainer has it.
__attribute__((format(printf, 3, 4))) static int trainer(int operation, int milliseconds, const char *format, ...) {
    char number[16], *argv[64] = {self, (char *)"--trainer", number};
    va_list args;
    va_start(args, format);
    snprintf(number, sizeof number, "%d", operation);
    int status = run_as(argv, 3, milliseconds, format, args);
    va_end(args);
    return status;
}

// The program that generates text
__attribute__((format(printf, 1, 2))) static int sampler(const char *format, ...) {
    char *argv[64] = {self, (char *)"--sampler"};
    va_list args;
    va_start(args, format);
    int status = run_as(argv, 2, 0, format, args);
    va_end(args);
    return status;
}

// The program that evaluates
__attribute__((format(printf, 1, 2))) static int evaluator(const char *format, ...) {
    char *argv[64] = {self, (char *)"--evaluator"};
    va_list args;
    va_start(args, format);
    int status = run_as(argv, 2, 0, format, args);
    va_end(args);
    return status;
}

static void write_tokens(const char *name, int count, int V, int header_count) {
    char path[PATH];
    int32_t header[256] = {20240520, 1, header_count, V};
    snprintf(path, sizeof path, "%s/%s", dir, name);
    FILE *f = fopen(path, "wb");
    (fwrite)(header, sizeof header, 1, f);
    for (int i = 0; i < count; i++) {
        uint16_t token = (uint16_t)(random_bits(8, 8, (uint64_t)i) % 16 + (uint64_t)(i % 7));
        (fwrite)(&token, sizeof token, 1, f);
    }
    fclose(f);
}

// A tokenizer of V tokens: the bytes, then these, then as many more as are needed; the last is the end of text.
static const char *const words[] = {" t", "he", " the", "in", "re", "on", " a", "at", "st", "\n\n", "'s", "  "};
static void write_tokenizer(const char *name, int V, int end, int header_V) {
    char path[PATH], text[32];
    int32_t header[256] = {20240328, 2, header_V, end};
    snprintf(path, sizeof path, "%s/%s", dir, name);
    FILE *f = fopen(path, "wb");
    (fwrite)(header, sizeof header, 1, f);
    for (int i = 0; i < V; i++) {
        if (i < 268) snprintf(text, sizeof text, "%s", i < 256 ? "" : words[i - 256]);
        else snprintf(text, sizeof text, "<%d>", i);
        if (i < 256) text[0] = (char)i;
        size_t length = i < 256 ? 1 : strlen(text);
        fputc((int)length, f);
        (fwrite)(text, 1, length, f);
    }
    fclose(f);
}

static size_t read_file(const char *name, char **data) {
    char path[PATH];
    struct stat st;
    *data = NULL;
    snprintf(path, sizeof path, "%s/%s", dir, name);
    FILE *f = fopen(path, "rb");
    if (!f || fstat(fileno(f), &st) != 0) return 0;
    *data = (char *)malloc((size_t)st.st_size + 1);
    size_t n = fread(*data, 1, (size_t)st.st_size, f);
    (*data)[n] = 0;
    fclose(f);
    return n;
}

static int same_files(const char *a, const char *b) {
    char *x, *y;
    size_t n = read_file(a, &x), k = read_file(b, &y);
    int same = n > 0 && n == k && memcmp(x, y, n) == 0;
    free(x), free(y);
    return same;
}

static void damage(const char *name, long at, int truncate_there) {
    char path[PATH], c = 0;
    snprintf(path, sizeof path, "%s/%s", dir, name);
    if (truncate_there) {
        check(truncate(path, at) == 0, "cannot cut %s", name);
        return;
    }
    int fd = open(path, O_RDWR);
    check(pread(fd, &c, 1, at) == 1, "cannot read %s", name);
    c ^= 0x10;
    check(pwrite(fd, &c, 1, at) == 1, "cannot write %s", name);
    close(fd);
}

static void shell(const char *format, ...) {
    char command[2 * PATH];
    va_list args;
    va_start(args, format);
    vsnprintf(command, sizeof command, format, args);
    va_end(args);
    check(system(command) == 0, "%s", command);
}

#ifndef TWIN
// The least limit of the control groups above the process counts.
static void test_container_limit(void) {
    char self_path[PATH], mount[PATH];
    snprintf(self_path, sizeof self_path, "%s/groups", dir);
    snprintf(mount, sizeof mount, "%s/mount", dir);
    shell("mkdir -p %s/a/b/c; echo max > %s/a/b/memory.max; echo 5000000 > %s/a/memory.max; echo 6000000 > %s/memory.max", mount, mount, mount, mount);
    shell("printf '1:name=systemd:/\\n0::/a/b/c\\n' > %s", self_path);
    check(container_limit(self_path, mount) == 5000000, "a group above: %zu", container_limit(self_path, mount));
    shell("printf '0::/\\nx\\n' > %s", self_path);
    check(container_limit(self_path, mount) == 6000000, "the root: %zu", container_limit(self_path, mount));
    shell("printf '2:memory:/a\\n' > %s", self_path);
    check(container_limit(self_path, mount) == SIZE_MAX && container_limit("/nowhere", mount) == SIZE_MAX, "no limit");
}
#endif

// The columns of log.csv that do not measure time or memory.
static int same_logs(const char *a, const char *b) {
    char *x, *y, *p, *q;
    size_t n = read_file(a, &x), k = read_file(b, &y);
    int same = n > 0 && k > 0;
    for (p = x, q = y; same && *p && *q; p = strchr(p, '\n') + 1, q = strchr(q, '\n') + 1) {
        char *end = p;
        for (int comma = 0; comma < 5 && *end && *end != '\n'; end++) comma += *end == ',';
        same = strncmp(p, q, (size_t)(end - p)) == 0;
    }
    same = same && *p == *q;
    free(x), free(y);
    return same;
}

// ---- text

static void test_text(void) {
    char path[PATH];
    Tokenizer z, bytes = tokenizer_open(NULL, 256);
    write_tokenizer("tokenizer300.bin", 300, 299, 300);
    snprintf(path, sizeof path, "%s/tokenizer300.bin", dir);
    z = tokenizer_open(path, 300);
    check(z.eot == 299 && bytes.eot == -1, "ends of text");
    Index x = index_open(&z);
    // lower tokens are joined first: " the" = " t" + "he", though "in" and "he" meet as well; no word crosses a space
    static const struct { const char *text; int count, tokens[12]; } codes[] = {
        {" the", 1, {258}}, {"the the", 3, {'t', 257, 258}}, {" thin", 3, {256, 'h', 259}}, {"it's", 3, {'i', 't', 266}},
        {"x  the", 3, {'x', ' ', 258}}, {"a  ", 2, {'a', 267}}, {"a\n\n", 2, {'a', 265}}, {"a\n\nb", 4, {'a', '\n', '\n', 'b'}},
        {"\xC3\xA9", 2, {0xC3, 0xA9}}, {"", 0, {0}}};
    for (size_t i = 0; i < sizeof codes / sizeof codes[0]; i++) {
        int tokens[16], count = encode(&x, codes[i].text, tokens);
        check(count == codes[i].count && memcmp(tokens, codes[i].tokens, sizeof(int) * (size_t)count) == 0, "\"%s\" becomes %d tokens, the first %d",
              codes[i].text, count, tokens[0]);
    }
    static const struct { const char *text; int length; } cuts[] = {
        {"hello world", 5}, {" world!", 6}, {"123abc", 3}, {" 12", 3}, {"...a", 3}, {"'llama", 3}, {"'tis", 2}, {" 's", 2}, {"   a", 2},
        {"\t\ta", 1}, {"\xC3\xA9t\xC3\xA9 ", 5}, {"\xE2\x80\x94x", 3}, {"\xC2\xBD\x31z", 3}, {"\xE3\x80\x80x", 3}, {"\xF0\x9F\x8E\x89x", 4}, {"\xFF", 1}};
    for (size_t i = 0; i < sizeof cuts / sizeof cuts[0]; i++)
        check(word_length((const unsigned char *)cuts[i].text) == cuts[i].length, "the first word of \"%s\" has %d bytes", cuts[i].text, word_length((const unsigned char *)cuts[i].text));
    for (uint64_t i = 0; i < 300; i++) {  // any bytes come back, whether UTF-8 or not
        char text[40] = "", back[40] = "";
        int tokens[40], n = (int)(random_bits(1, 1, i) % 39), count, at = 0;
        for (int j = 0; j < n; j++) text[j] = (char)(1 + random_bits(1, i + 2, (uint64_t)j) % (i < 150 ? 255 : 127));
        count = encode(&x, text, tokens);
        for (int j = 0; j < count; at += token_length(&z, tokens[j++])) memcpy(back + at, z.texts[tokens[j]] + 1, (size_t)token_length(&z, tokens[j]));
        check(at == n && memcmp(text, back, 40) == 0, "a text of %d bytes comes back as %d", n, at);
    }
    // what reaches the terminal is UTF-8 without control characters
    static const char *const shown[][2] = {{"a\xC3\xA9\xE2\x82\xAC\xF0\x9F\x8E\x89\n\tb", "a\xC3\xA9\xE2\x82\xAC\xF0\x9F\x8E\x89\n\tb"}, {"\x1B[31mx\x07\r\x7F", "[31mx"},
        {"\xE2\x82", "?"}, {"\xE2\x82z", "?z"}, {"\xE2\x82\xC3\xA9", "?\xC3\xA9"}, {"\x80", "?"}, {"\xC0\xAF", "??"}, {"\xED\xA0\x80", "?"}, {"\xC2\x9B", "?"},
        {"\xF4\x90\x80\x80", "?"}, {"\xE0\x80\x80", "?"}, {"\xFF\xFE", "??"}};
    for (size_t i = 0; i < sizeof shown / sizeof shown[0]; i++) {
        Character u = {{0}, 0, 0};
        char expected[64] = "";
        capture();
        for (const char *c = shown[i][0]; *c; c++) print_byte(&u, (unsigned char)*c);
        print_byte(&u, -1);
        char *text = captured();
        for (const char *c = shown[i][1]; *c; c++) {
            if (*c == '?') strcat(expected, "\xEF\xBF\xBD");
            else strncat(expected, c, 1);
        }
        check(strcmp(text, expected) == 0, "text %d is shown as %s", (int)i, text);
        free(text);
    }
    // samples in training: only without control characters, be they of two bytes, also in two tokens
    static const char *const sampled[][2] = {{"a\xC3\xA9\xE2\x82\xAC\xF0\x9F\x8E\x89\n\tb", "a\xC3\xA9\xE2\x82\xAC\xF0\x9F\x8E\x89\n\tb"}, {"\x1B[31mx\x07\r\x7F", "[31mx"},
        {"\xC2\x9B", "\xC2"}, {"\xC2\x9B\x9B", "\xC2"}, {"\xC2\x1B\x80z", "\xC2z"}, {"\xC2\xA0\xC2", "\xC2\xA0\xC2"}, {"\x9Bz", "z"}, {"\xC3\x9B", "\xC3\x9B"}};
    for (size_t i = 0; i < sizeof sampled / sizeof sampled[0]; i++) {
        capture();
        for (const char *c = sampled[i][0]; *c; c++) print_token(&bytes, (unsigned char)*c);
        char *text = captured();
        check(strcmp(text, sampled[i][1]) == 0, "text %d is sampled as %s", (int)i, text);
        free(text);
    }
    free(x.next), free(z.texts), free(bytes.texts);
}

static void test_drawing(void) {
    const float logits[5] = {0, 2, 1, -1, 0.5f}, ties[4] = {1, 3, 3, 2};
    const struct { double temperature; int top_k; } cases[] = {{1, 0}, {0.5, 0}, {2, 3}, {1, 1}, {0, 0}, {1, 5}};
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        double p[5], sum = 0, worst = 0, t = cases[i].temperature;
        int counts[5] = {0}, draws = 20000, order[5] = {3, 0, 1, 4, 2};  // rank of each
        for (int v = 0; v < 5; v++) {
            int in = t > 0 && (cases[i].top_k == 0 || order[v] < cases[i].top_k);
            sum += p[v] = in ? exp(logits[v] / t) : t == 0 && v == 1;
        }
        for (int d = 0; d < draws; d++) counts[draw_among(logits, 5, t, cases[i].top_k, (d + 0.5) / draws)]++;
        for (int v = 0; v < 5; v++) worst = larger(worst, fabs(counts[v] / (double)draws - p[v] / sum));
        check(worst < 1e-3, "temperature %g, top-k %d: a token's share is off by %g", t, cases[i].top_k, worst);
    }
    for (int d = 0; d < 10; d++) check(draw_among(ties, 4, 1, 1, d / 10.0) == 1 && draw_among(ties, 4, 0, 0, d / 10.0) == 1, "of equals, not the first");
    int other = 0;
    for (int d = 0; d < 1000; d++) other += draw_token(logits, 5, d / 1000.0) != draw_among(logits, 5, 1, 0, d / 1000.0);
    check(other == 0, "at temperature 1, from all tokens, %d draws of 1000 are others", other);
}

// A model in a file: its text, its loss, its logits.
static void test_use(void) {
    char *x, *y, number[32] = "";
    check(trainer(0, 0, "-i %s/bytes.txt -e d6 --layers 2 --channels 8 --heads 2 --context 32 -x 2 -o %s/bytes", dir, dir) == 0, "%s", output);
    for (int threads = 1; threads <= 3; threads++) {
        char n[2] = {(char)('0' + threads), 0};
        setenv("OMP_NUM_THREADS", n, 1);
        check(sampler("-e %s/bytes/model_00000002.bin --prompt ab_cd -g 20 --top-k 9 --temperature 0.8", dir) == 0 && strstr(output, "20 tokens after 5 in"), "%s", output);
        shell("cp %s/stdout %s/text%d", dir, dir, threads);
    }
    unsetenv("OMP_NUM_THREADS");
    size_t n = read_file("text1", &x);
    check(n >= 6 && strncmp(x, "ab cd", 5) == 0 && same_files("text1", "text2") && same_files("text1", "text3"), "the text depends on threads: %s", x);
    free(x);
    check(sampler("-e %s/bytes/model_00000002.bin --prompt ab_cd -g 20 --top-k 9 --temperature 0.8 --seed 5", dir) == 0 && !same_files("text1", "stdout"), "another seed, the same text");
    check(sampler("-e %s/bytes/model_00000002.bin --prompt abc -g 500", dir) == 0 && strstr(output, "30 tokens after 3 in"), "the context is 32: %s", output);
    check(trainer(0, 0, "-i %s/bytes.txt -b 1 -x 0 -s 1 -g 500 -e %s/bytes/model_00000002.bin", dir, dir) == 0, "long samples in training: %s", output);
    // validation loss: the one of the log
    check(trainer(0, 0, "-e %s/run0/model_00000006.bin -i %s/train0.bin -j %s/val.bin -b 2 -t 16 -m 2 -x 0 -o %s/eval", dir, dir, dir, dir) == 0 &&
          evaluator("-e %s/run0/model_00000006.bin -j %s/val.bin -b 2 -t 16 -m 2", dir, dir) == 0, "%s", output);
    read_file("stdout", &x), read_file("eval/log.csv", &y);
    char *last = y ? strstr(y, "\n0,val,") : NULL;
    if (last) snprintf(number, sizeof number, "loss %.4f,", atof(last + 7));
    check(last && x && strstr(x, number), "the evaluation says %s, the log %s", x, number);
    free(x), free(y);
    // logits: those of the same pass in this process
    check(sampler("-e %s/run0/model_00000006.bin -i %s/train0.bin -b 2 -t 16 --head-chunk 10 --logits %s/logits.npy", dir, dir, dir) == 0, "%s", output);
    n = read_file("logits.npy", &x);
    Model m;
    Data d;
    char path[PATH];
    memset(&m, 0, sizeof m);
    snprintf(path, sizeof path, "%s/run0/model_00000006.bin", dir);
    m.net = load_model(path, NULL), m.B = 2, m.T = 16, m.chunk = 2, m.head_chunk = 32, m.memory = REVERSE;
    plan(&m), model_alloc(&m), load_model(path, &m);
    snprintf(path, sizeof path, "%s/train0.bin", dir);
    data_open(&d, path), data_batch(&d, &m, 0, 0, 0);
    m.B = 2, m.T = 16;
    forward(&m), head_logits(&m, 0, 32);
    double worst = 0;
    for (int i = 0; i < 32 * 32 && n == 128 + 4 * 32 * 32; i++) {
        float got;
        act_t want;
        memcpy(&got, x + 128 + 4 * i, sizeof got);
        to_host(&want, m.logits + i / 32 * m.net.Vp + i % 32, sizeof want);
        worst = larger(worst, off((float)want, got));  // a library may multiply 10 tokens otherwise than 32
    }
    check(n == 128 + 4 * 32 * 32 && memcmp(x, "\x93NUMPY\1\0\x76", 10) == 0 && strstr(x + 10, "'<f4'") && strstr(x + 10, "(2, 16, 32)") && x[127] == '\n' && worst < 1e-6, "--logits: %d bytes, off by %g", (int)n, worst);
    free(x);
    model_free(&m), data_close(&d);
    // of a prompt: rows of its tokens, and the last one decides what a greedy text begins with
    check(sampler("-e %s/bytes/model_00000002.bin --prompt abcde --logits %s/prompt.npy", dir, dir) == 0, "%s", output);
    n = read_file("prompt.npy", &x);
    check(n == 128 + 4 * 5 * 256 && strstr(x + 10, "(1, 5, 256)"), "a prompt's logits have %d bytes", (int)n);
    float row[256] = {0};
    int best = 0, said = 0;
    if (n == 128 + 4 * 5 * 256) memcpy(row, x + 128 + 4 * 4 * 256, sizeof row);
    free(x);
    for (int v = 1; v < 256; v++) best = row[v] > row[best] ? v : best;
    check(sampler("-e %s/bytes/model_00000002.bin --prompt abcde -g 1 --temperature 0", dir) == 0, "%s", output);
    read_file("stdout", &x);
    for (int v = 0; v < 256 && x; v++) {  // a library may multiply one token otherwise than five, and round otherwise
        const char *end = v >= 32 || v == 10 || v == 9 ? "%c\n" : "\n";  // control characters are left out
        char shown[16] = "abcde";
        if (v != best && (!twin || row[v] < row[best] - 1e-6 - 2 * rounding * fabs(row[best]))) continue;
        if (v >= 128) end = "\xEF\xBF\xBD\n";
        snprintf(shown + 5, 8, end, v);
        said |= strcmp(x, shown) == 0;
    }
    check(said, "the likeliest byte is %d, the text %s", best, x ? x : "");
    free(x);
}

static const char tiny[] = "-e d6 --layers 2 --channels 16 --heads 2 --context 16 -b 2 -t 16 -x 6 -n 2 -v 3 -m 2";

// A baseline converted and back is the same file; a teacher's run, in any policy and cut in two, gives the same bytes.
static void test_convert(void) {
    static const char *const kinds[] = {"--mode bdia", "--mode retrofit --coefficient 1 --fixed-point 2 --stem 1", "--mode bdia --coefficient -0.75 --stem 0"};
    static const int32_t slots[][6] = {{6, 18, 0, 2, 4, -1}, {5, 18, 2, 1, 0, 16}, {6, 18, 0, 0, 2, -3}};  // mode, grid, K, stem, shift, a
    char *x, *y, flags[1024], name[64];
    for (int i = 0; i < 3; i++) {
        int32_t header[17] = {0};
        check(trainer(0, 0, "-i %s/train0.bin -b 2 -x 0 -e %s/base/model_00000000.bin %s -o %s/there%d", dir, dir, kinds[i], dir, i) == 0 &&
              trainer(0, 0, "-i %s/train0.bin -b 2 -x 0 -e %s/there%d/model_00000000.bin --mode baseline -o %s/back%d", dir, dir, i, dir, i) == 0, "%s", output);
        snprintf(name, sizeof name, "back%d/model_00000000.bin", i);
        check(same_files("base/model_00000000.bin", name), "%s and back is another file", kinds[i]);
        snprintf(name, sizeof name, "there%d/model_00000000.bin", i);
        if (read_file(name, &x) > sizeof header) memcpy(header, x, sizeof header);
        const int32_t got[] = {header[8], header[10], header[11], header[12], header[13], header[16]};
        check(header[1] == 1003 && memcmp(got, slots[i], sizeof got) == 0, "%s: header %d %d %d %d %d %d", kinds[i], got[0], got[1], got[2], got[3], got[4], got[5]);
        free(x);
        check(trainer(0, 0, "-i %s/train0.bin -b 2 -x 0 -e %s/%s -o %s/twice%d", dir, dir, name, dir, i) == 0, "%s", output);
        snprintf(flags, sizeof flags, "twice%d/model_00000000.bin", i);
        check(same_files(name, flags), "%s: loading and saving changed the model", kinds[i]);
    }
    snprintf(flags, sizeof flags, "-i %s/train0.bin -j %s/val.bin -e %s/base/model_00000000.bin --distill %s/run_base/model_00000006.bin --mode bdia --coefficient 0.25 "
             "-b 2 -t 16 -n 2 -v 2 -m 2", dir, dir, dir, dir);
    check(trainer(0, 0, "-i %s/train0.bin %s --mode baseline -o %s/run_base", dir, tiny, dir) == 0, "%s", output);
    check(trainer(0, 0, "%s -x 4 -o %s/taught", flags, dir) == 0, "%s", output);
    shell("cp -r %s/taught %s/cut_short; rm %s/cut_short/*4.bin", dir, dir, dir);
    check(trainer(0, 0, "%s -x 4 -o %s/cut_short -y 1 --memory store", flags, dir) == 0 && same_files("taught/model_00000004.bin", "cut_short/model_00000004.bin") &&
          same_files("taught/state_00000004.bin", "cut_short/state_00000004.bin") && same_logs("taught/log.csv", "cut_short/log.csv"), "a taught run that was cut has other bytes: %s", output);
    check(trainer(0, 0, "%s -x 5 -o %s/cut_short -y 1 --loss kl-teacher", flags, dir) == STATUS_USAGE && strstr(output, "--loss kl;"), "another --loss was taken on resuming: %s", output);
    check(trainer(0, 0, "-i %s/train0.bin -b 2 -t 16 -x 5 -o %s/cut_short -y 1", dir, dir) == STATUS_USAGE && strstr(output, "and --distill"), "a run went on without its teacher: %s", output);
    check(trainer(0, 0, "-i %s/train0.bin -b 2 -t 16 -x 5 -o %s/cut_short -y 1 --distill %s/base/model_00000000.bin", dir, dir, dir) == STATUS_USAGE &&
          strstr(output, "--loss kl and another --distill"), "a run went on with another teacher: %s", output);
    check(trainer(0, 0, "%s -x 5 -o %s/cut_short -y 1 --stem 1", flags, dir) == STATUS_USAGE && strstr(output, "--coefficient 0.25 --stem 2"), "another --stem was taken on resuming: %s", output);
    // validation of a model beside its teacher: the log's last rows
    double logged[METRICS] = {0}, shown[METRICS] = {-1, -1, -1, -1};
    static const char *const rows[METRICS] = {"\n4,val,", "\n4,val_teacher,", "\n4,val_kl,", "\n4,val_agreement,"};
    read_file("taught/log.csv", &x);
    for (int i = 0; i < METRICS; i++) {
        char *at = x ? strstr(x, rows[i]) : NULL;
        if (at) logged[i] = atof(at + strlen(rows[i]));
    }
    check(evaluator("-j %s/val.bin -e %s/taught/model_00000004.bin --distill %s/run_base/model_00000006.bin -b 2 -t 16 -m 2", dir, dir, dir) == 0, "%s", output);
    read_file("stdout", &y);
    if (y) sscanf(y, "validation loss %lf,%*[^|]| teacher %lf | KL %lf | same top token %lf", shown, shown + 1, shown + 2, shown + 3);
    check(logged[2] > 0 && logged[3] > 0 && fabs(logged[0] - shown[0]) < 1e-4 && fabs(logged[1] - shown[1]) < 1e-4 && fabs(logged[2] - shown[2]) < 1e-3 * logged[2] &&
          fabs(100 * logged[3] - shown[3]) < 0.01, "the evaluation says %s, the log %s", y, x);
    free(x), free(y);
}

// The bytes that --plan says are needed in all.
static double planned(const char *flags, const char *memory) {
    char *x;
    check(trainer(0, 0, "%s -o %s/planned --memory %s --plan", flags, dir, memory) == 0, "no plan: %s", output);
    read_file("stdout", &x);
    char *total = x ? strstr(x, "\ntotal ") : NULL;
    double bytes = total ? atof(total + 7) : 0;
    free(x);
    return bytes;
}

static void test_resume(void) {
    static const char *const variants[] = {"--mode midpoint-a --shuffle --save bf16", "--mode leapfrog -d 64 -nk 1"};
    for (int v = 0; v < 2; v++) {
        char flags[1024];
        snprintf(flags, sizeof flags, "-i %s/train*.bin -j %s/val.bin %s %s", dir, dir, tiny, variants[v]);
        check(trainer(0, 0, "%s -o %s/whole", flags, dir) == 0, "a plain run ended with: %s", output);
        int died = 1, operation;
        for (operation = 1 + 5*v; died && operation < 500; operation += brief ? 17 : 1) {
            shell("rm -rf %s/cut", dir);
            died = trainer(operation, 0, "%s -o %s/cut", flags, dir) == 256 + SIGKILL;
            if (!died) break;
            check(trainer(0, 0, "%s -o %s/cut -y 1", flags, dir) == 0, "after dying at file operation %d it did not resume: %s", operation, output);
            check(same_files("whole/model_00000006.bin", "cut/model_00000006.bin") && same_files("whole/state_00000006.bin", "cut/state_00000006.bin"),
                  "%s: dying at file operation %d changed the result", variants[v], operation);
            check(same_logs("whole/log.csv", "cut/log.csv"), "%s: dying at file operation %d changed the log", variants[v], operation);
        }
        check(operation > 40 && !died, "only %d file operations could be interrupted", operation);
        // Ctrl-C: the step is finished and saved
        shell("rm -rf %s/cut", dir);
        int status = trainer(-12, 0, "%s -o %s/cut", flags, dir);
        check(status == STATUS_INTERRUPTED && one_line("interrupted after step"), "Ctrl-C ended with %d: %s", status, output);
        check(trainer(0, 0, "%s -o %s/cut -y 1", flags, dir) == 0 && same_files("whole/model_00000006.bin", "cut/model_00000006.bin") &&
              same_logs("whole/log.csv", "cut/log.csv"), "Ctrl-C changed the result");
        shell("rm -rf %s/cut %s/kept; mv %s/whole %s/kept", dir, dir, dir, dir);
    }
    // a run that only wrote its initial model can be resumed as well
    char flags0[1024], *x;
    snprintf(flags0, sizeof flags0, "-i %s/train*.bin -j %s/val.bin -e d6 --layers 2 --channels 16 --heads 2 --context 16 -b 2 -n 2 -v 3 -m 2 --mode leapfrog -d 64 -nk 1", dir, dir);
    check(trainer(0, 0, "%s -x 0 -o %s/zero", flags0, dir) == 0 && trainer(0, 0, "%s -x 6 -o %s/zero -y 1", flags0, dir) == 0 &&
          same_files("kept/model_00000006.bin", "zero/model_00000006.bin") && same_logs("kept/log.csv", "zero/log.csv"), "-x 0 and resuming is not one run: %s", output);
    check(read_file("kept/model_00000004.bin", &x) == 0 && read_file("kept/model_00000006.bin", &x) > 0, "-nk 1 keeps another number of checkpoints");
    free(x);
    // killed five times at random moments of a longer run
    char flags[1024], model[64], state[64], cut_model[64];
    int last = brief ? 64 : 400;
    static const char shape[] = "-e d6 --layers 2 --channels 16 --heads 2 --context 16 -b 2 -t 16 -nk 2";
    snprintf(flags, sizeof flags, "-i %s/train*.bin %s --mode hamiltonian -x %d -n 7", dir, shape, last);
    snprintf(model, sizeof model, "whole/model_%08d.bin", last);
    snprintf(cut_model, sizeof cut_model, "cut/model_%08d.bin", last);
    snprintf(state, sizeof state, "cut/state_%08d.bin", last);
    double least = planned(flags, "reverse"), most = planned(flags, "store"), start = seconds();
    check(trainer(0, 0, "-i %s/train0.bin %s -x 0", dir, shape) == 0, "no steps: %s", output);
    int start_ms = (int)(1000 * (seconds() - start));  // a GPU's processes take their time to begin
    start = seconds();
    check(trainer(0, 0, "%s -o %s/whole", flags, dir) == 0, "a plain run ended with: %s", output);
    int kills = 0, run_ms = (int)(1000 * (seconds() - start)) - start_ms;
    uint64_t seed = (uint64_t)time(NULL);
    printf("  killed at random with seed %" PRIu64 "\n", seed);
    for (int i = 0; i < (brief ? 2 : 5); i++) {
        int milliseconds = 1 + start_ms + (int)(random_uniform(seed, 0, (uint64_t)i) * run_ms / 3);
        kills += trainer(0, milliseconds, "%s -o %s/cut -y 1", flags, dir) == 256 + SIGKILL;
    }
    check(trainer(0, 0, "%s -o %s/cut -y 1", flags, dir) == 0, "it did not resume: %s", output);
    check(kills > 0, "no run was killed");
    check(same_files(model, cut_model) && same_logs("whole/log.csv", "cut/log.csv"), "being killed %d times changed the result", kills);
    // policy and threads may change, what shapes the arithmetic may not
    shell("cd %s; rm -rf cut; cp -r whole cut; rm %s %s", dir, cut_model, state);
    check(trainer(0, 0, "%s -o %s/cut -y 1 --memory checkpoint", flags, dir) == 0 && same_files(model, cut_model),
          "another policy changed the result");
    shell("cd %s; rm %s %s", dir, cut_model, state);
    int status = trainer(0, 0, "%s -o %s/cut -y 1 --memory auto --budget %.0f", flags, dir, floor((least + most) / 2));
    check(least < most && status == 0 && same_files(model, cut_model),
          "--memory auto between %.0f and %.0f bytes changed the result: %s", least, most, output);
    status = trainer(0, 0, "%s -o %s/planned --memory auto --budget %.0f", flags, dir, floor(least / 2));
    check(status == STATUS_USAGE && one_line("are needed"), "half of what is needed is enough: %d, %s", status, output);
    int has_bf16 = layers_bf16(1), both = layers_bf16(0) && has_bf16;
    status = trainer(0, 0, "%s -o %s/cut -y 1 --precision %s", flags, dir, precision_names[both || !has_bf16]);
    check(status == (both ? STATUS_USAGE : STATUS_OK) && (both || strstr(output, "no products in")),
          "another --precision on resuming ended with %d: %s", status, output);
    check(trainer(0, 0, "%s -o %s/cut -y 1 --chunk 1", flags, dir) == STATUS_USAGE, "another --chunk was taken on resuming");
    check(trainer(0, 0, "%s -o %s/cut -y 1 --grid 18", flags, dir) == STATUS_USAGE, "another --grid was taken on resuming");
    check(trainer(0, 0, "%s -o %s/cut", flags, dir) == STATUS_USAGE, "checkpoints would have been overwritten");
    static const struct { const char *command, *word; } states[] = {
        {"cp $M $S", "not a state file"}, {": > $S", "not a state file"},
        {"truncate -s 700 $S", "not a state file"}, {"truncate -s 5000 $S", "5000 bytes"},
        {"echo >> $S", "bytes"}, {"cp $B $S", "and step"}};
    for (size_t i = 0; i < sizeof states / sizeof states[0]; i++) {
        shell("cd %s; rm -rf cut; cp -r whole cut; M=%s S=%s B=cut/state_%08d.bin; %s", dir, cut_model, state,
              (last - 1) / 7 * 7, states[i].command);
        status = trainer(0, 0, "%s -o %s/cut -y 1", flags, dir);
        check(status == STATUS_DATA && one_line(states[i].word), "%s: %d, %s", states[i].command, status, output);
    }
    shell("rm -rf %s/cut; cp -r %s/whole %s/cut", dir, dir, dir);
    damage(state, 5000, 0);
    check(trainer(0, 0, "%s -o %s/cut -y 1", flags, dir) == STATUS_DATA && strstr(output, "checksum"), "a corrupt state was taken: %s", output);
    damage(cut_model, 5000, 1);
    check(trainer(0, 0, "%s -o %s/cut -y 1", flags, dir) == STATUS_DATA && strstr(output, "bytes"), "a truncated model was taken: %s", output);
}

// The final model is the same bytes for every policy and number of threads.
static void test_training_is_deterministic(void) {
    const char *policies[] = {"store", "checkpoint", "reverse"};
    char names[3][64];
    for (int i = 0; i < 3; i++) {
        char threads[2] = {(char)('1' + i), 0};
        setenv("OMP_NUM_THREADS", threads, 1);
        check(trainer(0, 0, "-i %s/train0.bin %s --mode midpoint --memory %s -o %s/run%d", dir, tiny, policies[i], dir, i) == 0, "%s", output);
        snprintf(names[i], sizeof names[i], "run%d/model_00000006.bin", i);
        check(same_files(names[0], names[i]), "%s with %d threads trains another model", policies[i], i + 1);
    }
    unsetenv("OMP_NUM_THREADS");
    // what is printed about the time changes nothing, and adds up
    check(trainer(0, 0, "-i %s/train0.bin %s --mode midpoint --profile -o %s/profile", dir, tiny, dir) == 0 && same_files(names[0], "profile/model_00000006.bin"), "--profile trains another model");
    char *printed;
    double share, shares = 0;
    read_file("stdout", &printed);
    char *line = strstr(printed, "\nlayer function");
    if (line) line++;
    for (int rows = 0; line && (line = strchr(line + 1, '\n')) != NULL && sscanf(line, "%*s %*d %*f %lf%%", &share) == 1; rows++) shares += share;
    check(fabs(shares - 100) < 2 && strstr(printed, "matmul_backward") && !strstr(printed, " inf"), "the shares of --profile are %g %%: %s", shares, printed);
    free(printed);
    // products in bf16: another model, and the same one whatever the policy
    int has_bf16 = layers_bf16(1), both = layers_bf16(0) && has_bf16;
    check(trainer(0, 0, "-i %s/train0.bin %s --mode midpoint --precision bf16 -o %s/bf16", dir, tiny, dir) == 0 && same_files(names[0], "bf16/model_00000006.bin") == !both, "--precision bf16 trains the model of float32");
    check(has_bf16 || strstr(output, "no products in bf16"), "without bf16: %s", output);
    check(trainer(0, 0, "-i %s/train0.bin %s --mode midpoint --precision bf16 --memory store -o %s/bf16store", dir, tiny, dir) == 0 && same_files("bf16/model_00000006.bin", "bf16store/model_00000006.bin"), "in bf16 store trains another model");
    // a model file that is loaded and saved again is the same file; llm.c's layout for baseline
    check(trainer(0, 0, "-i %s/train0.bin -b 2 -e %s/run0/model_00000006.bin -x 0 -o %s/again", dir, dir, dir) == 0 &&
          same_files("run0/model_00000006.bin", "again/model_00000000.bin"), "loading and saving changed a model: %s", output);
    check(trainer(0, 0, "-i %s/train0.bin %s --mode baseline -x 0 -o %s/base", dir, "-e d6 --layers 2 --channels 16 --heads 2 --context 16 -b 2", dir) == 0, "%s", output);
    // bf16 from its file alone, and the bytes of a .txt
    check(trainer(0, 0, "-i %s/train0.bin -b 2 -e %s/run0/model_00000006.bin -x 0 --save bf16 -o %s/half", dir, dir, dir) == 0 &&
          trainer(0, 0, "-i %s/train0.bin -b 2 -e %s/half/model_00000000.bin -x 0 --save bf16 -o %s/half2", dir, dir, dir) == 0 &&
          same_files("half/model_00000000.bin", "half2/model_00000000.bin"), "a bf16 model is not what was saved: %s", output);
    shell("head -c 3000 %s/run0/model_00000006.bin > %s/bytes.txt", dir, dir);
    check(trainer(0, 0, "-i %s/bytes.txt -e d6 --layers 1 --channels 8 --heads 2 --context 16 -x 2 -s 1 -g 9", dir) == 0, "bytes: %s", output);
    char *x;
    size_t bytes = read_file("base/model_00000000.bin", &x);
    const int32_t expected[] = {20240326, 3, 16, 32, 2, 2, 16, 128, 0, 0, 0};
    check(bytes == 1024 + 4 * (128*16 + 16*16 + 2 * (12*16*16 + 13*16) + 2*16) && memcmp(x, expected, sizeof expected) == 0, "a baseline model is not in llm.c's format");
    free(x);
}

// The disk is full, or read-only, from any file operation on: one line, status 1, and what was saved is whole.
static void test_full_disk(void) {
    int operation, status = STATUS_DATA;
    char flags[1024];
    snprintf(flags, sizeof flags, "-i %s/train0.bin %s --mode leapfrog -o %s/disk", dir, tiny, dir);
    for (operation = 1; status == STATUS_DATA && operation < 200; operation += brief ? 11 : 1) {
        shell("rm -rf %s/disk", dir);
        status = trainer(FULL + operation, 0, "%s", flags);
        if (status == 0) break;
        check(status == STATUS_DATA && one_line("cannot write"), "a disk full from operation %d on ended with %d: %s", operation, status, output);
        check(trainer(0, 0, "%s -y 1", flags) == 0, "after a disk full from operation %d on it did not resume: %s", operation, output);
        check(operation == 1 || same_files("disk/model_00000006.bin", "firstdisk.bin"), "a disk full from operation %d on changed the result", operation);
        if (operation == 1) shell("cp %s/disk/model_00000006.bin %s/firstdisk.bin", dir, dir);
    }
    check(status == 0 && operation > 20, "only %d file operations", operation);
}

// Bad input: an exit status, and exactly one line that contains the word. D/ is the folder of the tests.
typedef struct { int status; const char *word, *flags; } Refusal;
enum { TRAINER, SAMPLER, EVALUATOR };
static void check_refusals(int program, const Refusal *cases, size_t count) {
    for (const Refusal *c = cases; c < cases + count; c++) {
        char flags[1024] = "";
        for (const char *p = c->flags; *p; p++) {
            if (p[0] == 'D' && p[1] == '/') strcat(flags, dir);
            else strncat(flags, p, 1);
        }
        int status = program == SAMPLER ? sampler("%s", flags) : program == EVALUATOR ? evaluator("%s", flags) : trainer(0, 0, "%s", flags);
        check(status == c->status && one_line(c->word), "%s: status %d for %d, one line with \"%s\" expected: %s", c->flags, status, c->status, c->word, output);
    }
}

static void test_bad_input(void) {
    static const Refusal cases[] = {
        {2, "-i", "-e d12"},
        {2, "no such flag", "-i D/train0.bin --frobnicate"},
        {2, "twice", "-i D/train0.bin -b 2 -b 4"},
        {2, "needs a value", "-i D/train0.bin -b"},
        {2, "-b 0", "-i D/train0.bin -b 0"},
        {2, "-b 4x", "-i D/train0.bin -b 4x"},
        {2, "-b 99999999999999999999", "-i D/train0.bin -b 99999999999999999999"},
        {2, "-l nan", "-i D/train0.bin -l nan"},
        {2, "midpoint", "-i D/train0.bin --mode euler"},
        {2, "reversed", "-i D/train0.bin --mode baseline --memory reverse"},
        {2, "reversed", "-i D/train0.bin --mode baseline --memory auto"},
        {2, "--memory auto", "-i D/train0.bin --budget 1G"},
        {2, "--budget 1024:", "-i D/train0.bin --memory auto --budget 1K"},
        {2, "--budget 3145728:", "-i D/train0.bin --memory auto --budget 3M"},
        {2, "--budget 536870912:", "-i D/train0.bin --memory auto --budget 0.5G"},
        {2, "K, M or G", "-i D/train0.bin --memory auto --budget 1T"},
        {2, "K, M or G", "-i D/train0.bin --memory auto --budget G"},
        {2, "K, M or G", "-i D/train0.bin --memory auto --budget 1GB"},
        {2, "K, M or G", "-i D/train0.bin --memory auto --budget -1G"},
        {2, "K, M or G", "-i D/train0.bin --memory auto --budget nan"},
        {2, "flag of ./sample_rev_gpt2", "-e d6 --prompt a"},
        {2, "./eval_rev_gpt2", "-e d6 -j D/val.bin --eval"},
        {2, "flag of ./sample_rev_gpt2", "-e d6 -i D/train0.bin --logits D/x.npy"},
        {2, "./sample_rev_gpt2", "-e d6 -i D/train0.bin --temperature 1"},
        {2, "./sample_rev_gpt2", "-e d6 -i D/train0.bin --top-k 3"},
        {2, "float32", "-i D/train0.bin --precision half"},
        {2, "fixed", "-i D/train0.bin --mode baseline --stream fixed"},
        {2, "--grid", "-i D/train0.bin --stream float --grid 20"},
        {2, "multiple of 1/256", "-i D/train0.bin --mode bdia --coefficient 0.001"},
        {2, "as it was", "-i D/train0.bin --mode bdia --coefficient 0"},
        {2, "--coefficient 0.06250001:", "-i D/train0.bin --mode bdia --coefficient 0.06250001"},
        {3, "the teacher, --distill", "-e D/bytes0.bin -i D/thirty.txt -b 1 -t 16 -x 2 --mode bdia --distill D/bytes_nan.bin"},
        {1, "no bdia has coefficient -16", "-i D/train0.bin -e D/bdia1.bin"},
        {2, "--coefficient -1:", "-i D/train0.bin --mode bdia --coefficient -1"},
        {2, "--coefficient 1.5", "-i D/train0.bin --mode bdia --coefficient 1.5"},
        {2, "is for --mode retrofit", "-i D/train0.bin --mode bdia --fixed-point 2"},
        {2, "are for --mode retrofit and bdia", "-i D/train0.bin --mode midpoint --stem 1"},
        {2, "are for --mode retrofit and bdia", "-i D/train0.bin -e D/base/model_00000000.bin --coefficient 1"},
        {2, "takes 1 to 12", "-i D/train0.bin --mode retrofit --stem 0"},
        {2, "takes 0 to 6", "-i D/train0.bin -e d6 --mode bdia --stem 7"},
        {2, "every rounding by 16", "-i D/train0.bin --mode bdia --stream float -t 16"},
        {2, "bdia has no --step-size", "-i D/train0.bin --mode bdia --step-size 1"},
        {2, "--loss kl needs --distill", "-i D/train0.bin --loss kl"},
        {1, "No such file", "-i D/train0.bin --distill D/nothing.bin"},
        {2, "a baseline is meant", "-i D/train0.bin --distill D/run0/model_00000006.bin"},
        {2, "but the model has", "-i D/train0.bin -e d6 --distill D/base/model_00000000.bin"},
        {2, "midpoint network", "-i D/train0.bin -e D/run0/model_00000006.bin --mode bdia"},
        {1, "no bdia has coefficient 0", "-i D/train0.bin -e D/bdia0.bin"},
        {1, "no bdia has coefficient -1 / 2^9", "-i D/train0.bin -e D/bdia9.bin"},
        {2, "--help", "-i D/train0.bin -h 1"},
        {2, "no such flag", "-i D/train0.bin -r 1"},
        {2, "heads", "-i D/train0.bin -e d6 --heads 5"},
        {2, "context", "-i D/train0.bin -e d6 --context 16 -t 32"},
        {2, "multiple", "-i D/train0.bin -e d6 -b 2 -t 16 -d 33"},
        {2, "keeps them", "-i D/train0.bin -e D/run0/model_00000006.bin --layers 3"},
        {2, "--step-size", "-i D/train0.bin -e d6 --step-size x"},
        {1, "shards.bin has", "-i D/shard*.bin -e d6 -b 1 -t 16"},
        {2, "midpoint network", "-i D/train0.bin -e D/run0/model_00000006.bin --mode leapfrog"},
        {2, "d6, d12", "-i D/train0.bin -e d7"},
        {2, "-y 1 needs -o", "-i D/train0.bin -y 1"},
        {2, "needs -o", "-i D/train0.bin -n 5"},
        {2, "-x is missing", "-i D/train0.bin -e d6 -b 1 -t 16 --shuffle"},
        {2, "-l 1e999", "-i D/train0.bin -l 1e999"},
        {2, "-d -5", "-i D/train0.bin -d -5"},
        {2, "-b 1e3", "-i D/train0.bin -b 1e3"},
        {2, "2^30", "-i D/train0.bin -e d6 --context 1000000 -b 100000"},
        {1, "not a log", "-i D/train0.bin -e d6 --layers 1 --channels 8 --heads 1 -b 1 -t 16 -y 1 -o D/foreign"},
        {2, "others of llm.c", "-i D/train0.bin -pn 2"},
        {1, "at token 299", "-e d6 --layers 1 -i D/v300.bin -x 0 -s 1 --tokenizer D/cut.bin"},
        {1, "goes on", "-e d6 --layers 1 -i D/v300.bin -x 0 -s 1 --tokenizer D/long.bin"},
        {1, "end of text", "-e d6 --layers 1 -i D/v300.bin -x 0 -s 1 --tokenizer D/end.bin"},
        {1, "not a model file", "-i D/train0.bin -e D/empty.bin"},
        {1, "not a token file", "-i D/empty.bin"},
        {1, "has 0 tokens", "-i D/empty.txt -b 1 -t 16"},
        {1, "has 1 tokens", "-i D/one.txt -b 1 -t 16"},
        {1, "not a regular file", "-i D/"},
        {1, "not a regular file", "-i D/train0.bin -e D/"},
        {1, "a vocabulary of 70000", "-i D/v70000.bin"},
        {1, "-5 tokens", "-i D/negative.bin"},
        {1, "?name", "-i D/a\nname.bin"},
        {1, "No such file", "-i D/nothing.bin"},
        {1, "not a token file", "-i D/run0/model_00000006.bin"},
        {1, "instead of", "-i D/short.bin"},
        {1, "too short", "-i D/train0.bin -e d6 -b 64 -t 1024"},
        {1, "vocabulary", "-i D/train0.bin -j D/other.bin -e d6 -b 1 -t 16"},
        {1, "but the vocabulary has 6", "-i D/small.bin -e d6 --layers 1 --channels 8 --heads 1 -b 1 -t 16"},
        {1, "No such file", "-i D/train0.bin -e D/nothing.bin"},
        {1, "not a model file", "-i D/train0.bin -e D/train0.bin"},
        {1, "cannot make", "-i D/train0.bin -e d6 --layers 1 --channels 8 --heads 1 -b 1 -t 16 -o D/no/such/place"},
        {3, "out of memory", "-i D/train0.bin -e d48 --layers 65536 --channels 4096 --heads 64 -b 1 -t 16"},
#ifdef TWIN  // what a GPU's kernels do not take
        {2, "heads of 136 channels", "-i D/train0.bin -e d6 --layers 1 --channels 136 --heads 1 -b 1 -t 16"},
        {2, "4104 channels", "-i D/train0.bin -e d6 --layers 1 --channels 4104 --heads 54 -b 1 -t 16"},
        {2, "65535 sequences", "-i D/train0.bin -e d6 --layers 1 --channels 8 --heads 1 -b 65536 -t 1 --chunk 65536"},
        {2, "for the scores of", "-i D/train0.bin -e d6 --layers 1 --channels 8 --heads 1 --context 100000 -b 1 -t 16 -x 0 -s 1 -g 99999"},
#endif
    };
    static const Refusal sample_cases[] = {
        {2, "no such flag", "-e d6 --prompt a --distill D/base/model_00000000.bin"},
        {2, "--temperature", "-e d6 --prompt a --temperature -1"},
        {2, "--top-k", "-e d6 --prompt a --top-k x"},
        {2, "--prompt needs a value", "-e d6 --prompt"},
        {2, "no such flag", "-e d6 --prompt a -x 5"},
        {1, "is no .npy", "-e D/run0/model_00000006.bin -i D/train0.bin -b 1 -t 16 --logits D/run0/log.csv"},
        {1, "not a regular file", "-e D/run0/model_00000006.bin -i D/train0.bin -b 1 -t 16 --logits /dev/null"},
        {1, "File exists", "-e D/run0/model_00000006.bin -i D/train0.bin -b 1 -t 16 --logits D/new.npy"},
        {1, "too short", "-e D/bytes/model_00000002.bin -i D/thirty.txt -b 4 -t 16 --logits D/y.npy"},
        {3, "logit of token", "-e D/nan.bin --prompt abc"},
        {3, "logit of token 0 at position 0", "-e D/nan.bin --prompt abc --logits D/nan.npy"},
        {2, "longer than the context", "-e D/bytes/model_00000002.bin --prompt abcdefghijklmnopqrstuvwxyzabcdefghi"},
        {2, "-i is missing", "-e d6 --logits D/x.npy"},
        {1, "--tokenizer says where", "-e D/run0/model_00000006.bin --prompt abc"},
        {1, "No such file", "-e D/run0/model_00000006.bin --prompt a --tokenizer D/nothing.bin"},
        {1, "not a tokenizer file", "-e D/run0/model_00000006.bin --prompt a --tokenizer D/train0.bin"},
        {1, "of 300 tokens, but the model has 32", "-e D/run0/model_00000006.bin --prompt a --tokenizer D/tokenizer300.bin"},
        {1, "cannot write", "-e D/run0/model_00000006.bin -i D/train0.bin -b 1 -t 16 --logits D/no/such/x.npy"},
        {2, "no such flag", "-e m.bin --prompt x --memory store"},
        {2, "./eval_rev_gpt2", "-e d6 --prompt a --eval"},
        {2, "no such flag", "-e d6 --prompt a -h 1"},
        {2, "twice", "-e d6 --prompt a --prompt b"},
        {2, "--prompt is missing", "-e d6"},
        {2, "-g 0", "-e d6 --prompt a -g 0"},
        {2, "longer than the context", "-e D/run0/model_00000006.bin -i D/train0.bin -b 1 -t 17 --logits D/y.npy"},
        {2, "midpoint network", "-e D/run0/model_00000006.bin --prompt a --mode leapfrog"},
        {1, "No such file", "-e D/nothing.bin --prompt a"},
        {1, "No such file", "-e d6 -i D/nothing.bin --logits D/y.npy"},
        {1, "not a model file", "-e D/train0.bin --prompt a"},
        {1, "its vocabulary has 64", "-e D/run0/model_00000006.bin -i D/other.bin -b 1 -t 16 --logits D/y.npy"},
    };
    static const Refusal eval_cases[] = {
        {2, "-j is missing", "-e d6"},
        {2, "no such flag", "-e d6 -j D/val.bin -o D/nowhere"},
        {2, "no such flag", "-e m.bin -j D/val.bin --memory auto --budget 1G"},
        {2, "a trainer that has it", "-e m.bin -j D/val.bin --profile"},
        {2, "flag of ./sample_rev_gpt2", "-e d6 -j D/val.bin --prompt a"},
        {3, "the teacher, --distill", "-e D/bytes0.bin -j D/thirty.txt -b 1 -t 16 --distill D/bytes_nan.bin"},
        {3, "the loss is not a finite number", "-e D/bytes_nan.bin -j D/thirty.txt -b 1 -t 16"},
        {2, "midpoint network", "-e D/run0/model_00000006.bin -j D/val.bin --mode bdia"},
        {2, "a baseline is meant", "-e D/run0/model_00000006.bin -j D/val.bin --distill D/run0/model_00000006.bin"},
        {2, "longer than the context", "-e D/run0/model_00000006.bin -j D/val.bin -t 17"},
        {1, "too short", "-e D/bytes0.bin -j D/thirty.txt -b 4 -t 16"},
        {1, "vocabulary", "-e D/run0/model_00000006.bin -j D/other.bin -b 1 -t 16"},
        {1, "No such file", "-e D/run0/model_00000006.bin -j D/nothing.bin"},
        {1, "No such file", "-e D/nothing.bin -j D/val.bin"},
    };
    write_tokens("short.bin", 50, 32, 100);
    write_tokens("other.bin", 500, 64, 500);
    write_tokens("small.bin", 500, 6, 500);
    write_tokens("v300.bin", 5000, 300, 5000);
    write_tokens("v70000.bin", 500, 70000, 500);
    write_tokens("negative.bin", 500, 32, -5);
    write_tokenizer("cut.bin", 299, 0, 300);
    write_tokenizer("long.bin", 301, 0, 300);
    write_tokenizer("end.bin", 300, 300, 300);
    // a model of bytes with a weight that is NaN, for what reads models; targets for --logits; a log of something else
    shell("cp %s/bytes/model_00000002.bin %s/nan.bin; printf '\\000\\000\\300\\177' | dd of=%s/nan.bin bs=1 seek=1024 conv=notrunc 2> %s/stderr", dir, dir, dir, dir);
    shell("cd %s; cp there0/model_00000000.bin bdia0.bin; cp bdia0.bin bdia9.bin; printf '\\000\\000\\000\\000' | dd of=bdia0.bin bs=1 seek=64 conv=notrunc 2> stderr; "
          "printf '\\011' | dd of=bdia9.bin bs=1 seek=52 conv=notrunc 2> stderr; cp bdia0.bin bdia1.bin; "
          "printf '\\360\\377\\377\\377' | dd of=bdia1.bin bs=1 seek=64 conv=notrunc 2> stderr", dir);
    check(trainer(0, 0, "-i %s/bytes.txt -e d6 --layers 2 --channels 8 --heads 2 --context 32 --mode baseline -x 0 -o %s/bytes_base", dir, dir) == 0, "%s", output);
    shell("cd %s; cp bytes_base/model_00000000.bin bytes0.bin; cp bytes0.bin bytes_nan.bin; printf '\\000\\000\\300\\177' | dd of=bytes_nan.bin bs=1 seek=1024 conv=notrunc 2> stderr", dir);
    shell(": > %s/new.npy.tmp; mkdir %s/foreign; echo a,b,c > %s/foreign/log.csv", dir, dir, dir);
    shell(": > %s/empty.bin; : > %s/empty.txt; printf x > %s/one.txt; printf 12345678901234567890123456789 > %s/thirty.txt", dir, dir, dir, dir);
    write_tokens("shards.bin", 100, 32, 100);
    write_tokens("shards2.bin", 100, 64, 100);
    check_refusals(TRAINER, cases, sizeof cases / sizeof cases[0]);
    check_refusals(SAMPLER, sample_cases, sizeof sample_cases / sizeof sample_cases[0]);
    check_refusals(EVALUATOR, eval_cases, sizeof eval_cases / sizeof eval_cases[0]);
    shell("! ls %s | grep nan.npy", dir);  // logits that are no numbers leave no file, half-way or whole
    // a loss that is not a number names the step, and the checkpoint before stays
    int status = trainer(0, 0, "-i %s/train0.bin %s --mode baseline -l 1000 -c 1000 -x 50 -o %s/nan", dir, "-e d6 --layers 2 --channels 16 --heads 2 --context 16 -b 2 -t 16 -n 1", dir);
    char *x = NULL;
    check(status == STATUS_NUMBERS && strstr(output, "step ") && read_file("nan/log.csv", &x) > 0, "a run that blows up ended with %d: %s", status, output);
    free(x);
    status = trainer(0, 0, "-i %s/train0.bin %s --mode midpoint -l 1000 -c 1000 -x 50", dir, "-e d6 --layers 2 --channels 16 --heads 2 --context 16 -b 2 -t 16");
    check(status == STATUS_NUMBERS && strstr(output, "grid"), "streams that leave the range ended with %d: %s", status, output);
    test_full_disk();
    // whoever reads the output goes away: the step is finished and saved
    shell("%s --trainer 0 -i %s/train0.bin %s -x 9000 -n 0 -o %s/pipe 2> %s/stderr | head -n 3 > /dev/null; test -e %s/pipe/state_0000*.bin && grep -q 'its reader has gone' %s/stderr",
          self, dir, "-e d6 --layers 2 --channels 16 --heads 2 --context 16 -b 2 -t 16", dir, dir, dir, dir);
    // a directory that vanishes
    shell("(i=0; while [ ! -e %s/gone/model_00000003.bin ] && [ $((i += 1)) -lt 3000 ]; do sleep 0.01; done; mv %s/gone %s/went) &", dir, dir, dir);
    status = trainer(0, 0, "-i %s/train0.bin %s -x 9000 -n 1 -o %s/gone", dir, "-e d6 --layers 2 --channels 16 --heads 2 --context 16 -b 2 -t 16", dir);
    check(status == STATUS_DATA && one_line("cannot write"), "a directory that vanished ended with %d: %s", status, output);
#if !defined(__SANITIZE_ADDRESS__) && !defined(TWIN)  // a driver reserves more, and a GPU's memory is not this
    // less address space than the plan: said before anything is allocated
    shell("ulimit -v 1000000; %s --trainer 0 -i %s/train0.bin -e d24 -b 16 -t 16 2> %s/stderr > %s/stdout; test $? = 3 && grep -q 'the machine has 0.9' %s/stderr", self, dir, dir, dir, dir);
#endif
    // weights that have blown up are not saved over a checkpoint that computes
    status = trainer(0, 0, "-i %s/train0.bin %s -l 1 -c 1000 -x 30 -nk 1 -n 1 -o %s/blow", dir, "-e d6 --layers 2 --channels 16 --heads 2 --context 16", dir);
    check(status == STATUS_NUMBERS, "a run that blows up ended with %d: %s", status, output);
    for (int i = 1; i < 30; i++) {
        char name[64], *x;
        snprintf(name, sizeof name, "blow/model_%08d.bin", i);
        if (read_file(name, &x) > 0)
            check(trainer(0, 0, "-i %s/train0.bin -j %s/val.bin -b 4 -e %s/%s -x 0", dir, dir, dir, name) == 0, "%s does not compute: %s", name, output);
        free(x);
    }
    // a model that was changed does not resume, nor do two runs share a directory
    shell("cp -r %s/run0 %s/forged; cp %s/run0/model_00000002.bin %s/forged/model_00000006.bin", dir, dir, dir, dir);
    status = trainer(0, 0, "-i %s/train0.bin %s --mode midpoint -y 1 -o %s/forged", dir, tiny, dir);
    check(status == STATUS_DATA && strstr(output, "checksum"), "another step's model resumed with %d: %s", status, output);
    shell("mkdir %s/busy", dir);
    char busy[PATH];
    snprintf(busy, sizeof busy, "%s/busy", dir);
    int lock = open(busy, O_RDONLY);
    flock(lock, LOCK_EX);
    status = trainer(0, 0, "-i %s/train0.bin %s -o %s/busy", dir, tiny, dir);
    check(status == STATUS_DATA && strstr(output, "another run"), "a directory in use was taken: %d %s", status, output);
    close(lock);
    check(trainer(0, 0, "-x 1 -i %s/train0.bin -e d6 -t 16 -o %s/run0", dir, dir) == STATUS_USAGE, "a directory of another run was taken");
    status = trainer(1, 0, "--flip");
    check(status == STATUS_NUMBERS && strstr(output, "did not come back"), "a flipped bit ended with %d: %s", status, output);
    for (int cut = 0; cut < 2; cut++) {
        shell("cp %s/run0/model_00000006.bin %s/broken.bin", dir, dir);
        damage("broken.bin", cut ? 3000 : 13, cut);
        status = trainer(0, 0, "-i %s/train0.bin -e %s/broken.bin -b 2 -x 1", dir, dir);
        check(status == STATUS_DATA, "a broken model ended with %d: %s", status, output);
    }
}

// What a directory holds are complete pairs; names that only begin like one are none, after whatever they are read.
static void test_find_checkpoints(void) {
    shell("mkdir %s/names; cd %s/names; touch model_00000003.bin state_00000003.bin model_00000004.bin state_00000007.bin "
          "state_00000009.bin model_00000007.xyz model_00000009.bak model_0000000.bin model_00000005.bin.tmp", dir, dir);
    char path[PATH];
    snprintf(path, sizeof path, "%s/names", dir);
    Checkpoints c = find_checkpoints(path);
    check(c.count == 1 && c.first == 3 && c.last == 3 && c.models == 2, "%d pairs from %d to %d, %d models", c.count, c.first, c.last, c.models);
}

// Batches in order cover every shard once; random offsets stay inside.
static void test_batches(void) {
    Model m;
    Data d;
    char pattern[PATH];
    Shape s = {1, 8, 1, 32, 2, 16, 2, 32};
    make_model(&m, s, MIDPOINT, REVERSE, 20);
    snprintf(pattern, sizeof pattern, "%s/train*.bin", dir);
    data_open(&d, pattern);
    check(d.shard_count == 2 && d.V == 32, "%d shards with vocabulary %d", d.shard_count, d.V);
    int64_t batches = all_places(&d, 2, 16, 0), first = (d.shards[0].count - 1) / 32;
    check(batches == first + (d.shards[1].count - 1) / 32, "%d batches", (int)batches);
    for (int64_t i = 0; i <= batches; i++) {
        const Shard *shard = &d.shards[i % batches >= first];
        int64_t at = (i % batches - (i % batches >= first ? first : 0)) * 32;
        unsigned char raw[66];
        int in[32], out[32], same = 1;
        data_batch(&d, &m, (uint64_t)i, 0, 0);
        to_host(in, m.inputs, sizeof in), to_host(out, m.targets, sizeof out);
        if (pread(shard->fd, raw, sizeof raw, 1024 + 2 * at) != sizeof raw) same = 0;
        for (int j = 0; j < 32; j++) same &= in[j] == raw[2*j] && out[j] == raw[2*j + 2];
        check(same, "batch %d is not tokens %d to %d of its shard", (int)i, (int)at, (int)at + 32);
    }
    int different = 0, shifted = 1, first_token = -1;
    for (uint64_t i = 0; i < 200; i++) {
        int in[32], out[32];
        data_batch(&d, &m, i, 1, 42);
        to_host(in, m.inputs, sizeof in), to_host(out, m.targets, sizeof out);
        shifted &= memcmp(in + 1, out, 15 * sizeof(int)) == 0 && memcmp(in + 17, out + 16, 15 * sizeof(int)) == 0;
        different += first_token >= 0 && in[0] != first_token;
        first_token = in[0];
    }
    check(shifted, "targets of a random batch are not its inputs moved by one");
    check(different > 100, "random batches are not random");
    model_free(&m);
    data_close(&d);
}

int main(int argc, char **argv) {
    if (argc > 2 && strcmp(argv[1], "--trainer") == 0) {
        die_at_operation = atoi(argv[2]);
        argv[2] = argv[0];
        if (argc > 3 && strcmp(argv[3], "--flip") == 0) return flipped_bit_ends();
        return rev_gpt2_main(argc - 2, argv + 2);
    }
    if (argc > 1 && strcmp(argv[1], "--sampler") == 0) {
        argv[1] = argv[0];
        return sample_main(argc - 1, argv + 1);
    }
    if (argc > 1 && strcmp(argv[1], "--evaluator") == 0) {
        argv[1] = argv[0];
        return eval_main(argc - 1, argv + 1);
    }
#ifndef TWIN
    if (argc > 2 && strcmp(argv[1], "--resident") == 0) return resident_matches_plan(atoi(argv[2]));
#endif
    if (!realpath("/proc/self/exe", self)) snprintf(self, sizeof self, "%s", argv[0]);
    static const char *const arguments[] = {"kernels", "layers", "short", "brief"};
    int known = argc == 1;
    for (int i = 0; i < 4 && argc == 2; i++) known |= strcmp(argv[1], arguments[i]) == 0;
    if (!known) die(STATUS_USAGE, "usage: %s [kernels|layers|short|brief]", argv[0]);
    setvbuf(stdout, NULL, _IOLBF, 0);
    int kernels = argc > 1 && strcmp(argv[1], "kernels") == 0, layers = kernels || (argc > 1 && strcmp(argv[1], "layers") == 0);
    int without_files = argc > 1 && strcmp(argv[1], "short") == 0;
    brief = argc > 1 && strcmp(argv[1], "brief") == 0;
    if (sizeof(real_t) == 8) {
#ifndef TWIN
        section("layers against finite differences");
        test_layer_gradients();
        if (!layers) {
            section("networks against finite differences");
            for (int objective = CROSS_ENTROPY; objective <= KL_TEACHER; objective++) test_network_gradients(objective);
        }
#endif
    } else {
        section("matrix product and attention against plain loops");
        test_matmul(0);
        test_matmul(1);
        test_attention(0, 1);
        test_attention(0, 300);
        test_attention(1, 1);
        test_classifier();
        test_distillation();
        test_conversion_is_near();
        test_pieces();
#ifndef TWIN
        test_functions();
#endif
        test_causality();
        test_cache(0);
        test_cache(1);
    }
    if (sizeof(real_t) == 4 && !kernels) {
        section("exact multiplication by sixteenths");
        test_multiplication();
        section("store = checkpoint = reverse = auto, 1, 2 and 3 threads, float32 and bf16");
        test_policies(0);
        test_policies(1);
        test_work();
        test_bf16_gradients();
        if (!layers_bf16(1)) printf("  this processor or build has no dot products of bf16: they are not tested\n");
        layers_bf16(0);
        section("optimizer, accumulation");
        test_optimizer();
        test_update();
        test_embedding();
        test_accumulation();
        section("samples");
        test_drawing();
        test_generate();
        test_sample_step();
    }
    if (sizeof(real_t) == 4 && !layers) {
        if (!mkdtemp(dir)) die(STATUS_DATA, "cannot make %s", dir);
        write_tokens("train0.bin", 700, 32, 700);
        write_tokens("train1.bin", 450, 32, 450);
        write_tokens("val.bin", 300, 32, 300);
        section("a flipped bit, a value out of range");
        test_flipped_bit();
        test_range();
        section("the plan");
        test_plan();
#ifndef TWIN
        test_container_limit();
#endif
#if !defined(__SANITIZE_ADDRESS__) && !defined(TWIN)
        for (int memory = STORE; memory <= AUTO + 2; memory++) {
            char command[PATH + 32];
            snprintf(command, sizeof command, "%s --resident %d", self, memory);
            check(system(command) == 0, "resident memory under --memory %s", memory_names[smaller_of(memory, AUTO)]);
        }
#endif
        section("batches, text");
        test_batches();
        test_find_checkpoints();
        test_text();
        section("training, model files, their use");
        test_training_is_deterministic();
        test_use();
        test_convert();
        if (!without_files) {
            section("bad input");
            test_bad_input();
            section("dying and resuming");
            test_resume();
        }
        shell("rm -rf %s", dir);
    }
    section(NULL);
    printf("%d passed, %d failed\n", passed, failed);
    return failed > 0;
}
