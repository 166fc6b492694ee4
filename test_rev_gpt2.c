/*
test_rev_gpt2.c: what must hold of the mathematics of train_rev_gpt2.c, checked on a machine without network
or Python. What must hold of the program, its files and its flags, is in dev/test/program.c.

What is claimed, in this order:

- in double precision the gradients of every layer and every network are those of finite differences;
- a layer gives what its formula gives, for sizes that fit no block and for any number of threads;
- a conversion is near the network it comes from; no token depends on what follows it;
- gradients are the same bits under every policy and with any number of threads, beside a teacher too; what is
  kept is not computed again; a flipped bit or a value out of range does not go unnoticed;
- memory is what was planned, to the byte, and when reversing does not depend on depth;
- the optimizer, clipping, decay and accumulation of a training step are what they are said to be;
- generation by the cache is what whole forward passes give.

The file includes the trainer and, around it, the program that generates text, so it can call every function,
and wraps the allocator. Built with -DREAL=double it checks the first claim; built as the trainer is, all
others. With -DTWIN it includes the CUDA twin instead, whose activations are bf16 or, with -DPRECISION_FP32,
float.

The tables of tests at the end say what is run. An argument is the name of a test, or one of these words:
"kernels" runs those of single layers, "layers" all but those of memory and of what goes wrong, "short" and
"brief" all.
*/
#include "dev/test/check.h"
#include <sys/resource.h>
#ifdef _OPENMP
#include <omp.h>
#endif

static size_t allocated;  // bytes handed out by the allocator
#ifdef TWIN
#define cudaMalloc(p, bytes) (allocated += (bytes), (cudaMalloc)(p, bytes))
#else
enum { GUARD = 256 };  // bytes behind each buffer, which nothing may touch
static void *counted_alloc(size_t alignment, size_t bytes) {
    allocated += bytes;
    void *p = aligned_alloc(alignment, bytes + GUARD);
    if (p) memset((char *)p + bytes, 0xA5, GUARD);
    return p;
}
#define aligned_alloc counted_alloc
#endif
#define REV_GPT2_PROFILE "dev/bench/profile.h"  // counts the calls
#define SAMPLE_NO_MAIN
#include "dev/sample/sample.c"

// GELU in the epilogue of a product in bf16 may be made of tanh.approx, which is off by 2^-11: that moves 0.5
// x (1 + t) by 8e-4 at most, where t is not yet 1, and its slope by 0.5 + |x| du/dx times as much. Float32 is
// float32 throughout.
static const double gelu_slack = sizeof(act_t) == 2 ? 1e-3 : 0, slope_slack = sizeof(act_t) == 2 ? 7e-3 : 0;

#ifdef EMULATE
#define SLOW  // emulated kernels are, and so is an emulated processor: what repeats itself is left out
#endif
#ifdef SLOW
static const int slow = 1;
#else
static const int slow = 0;
#endif

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

// One network of each mode, then conversions with other numbers: a / 2^shift, K, a bit for each ordinary step.
// The last is for a test to set.
static struct { int mode, a, shift, K; uint32_t ordinary; } networks[] = {
    {BASELINE, 0, 0, 0, 0},
    {MIDPOINT, 0, 0, 0, 0},
    {MIDPOINT_A, 0, 0, 0, 0},
    {LEAPFROG, 0, 0, 0, 0},
    {HAMILTONIAN, 0, 0, 0, 0},
    {RETROFIT, 1, 2, 1, 3},
    {BDIA, -1, 4, 0, 3},
    {RETROFIT, -1, 0, 2, 1},
    {RETROFIT, 3, 4, 3, 0x17},
    {BDIA, -5, 3, 0, 0},
    {BDIA, -1, 2, 0, 0x1A},
    {BDIA, 1, 0, 0, 0x1F},
    {BASELINE, 0, 0, 0, 0}};
enum { NETWORKS = sizeof networks / sizeof networks[0] - 1 };
#ifdef SLOW
enum { KINDS = MODES };  // one network of each mode, where kernels see nothing new in others
#else
enum { KINDS = NETWORKS };
#endif
static const char *name_of(int network) {
    static char text[64];
    int mode = networks[network].mode;
    if (!converted(mode)) return mode_names[mode];
    snprintf(text, sizeof text, "%s (%d / 2^%d, K %d, ordinary %#x)", mode_names[mode],
             networks[network].a, networks[network].shift, networks[network].K, networks[network].ordinary);
    return text;
}
static int grid_of(int network) {  // a conversion's default has room for more than there is here
    return converted(networks[network].mode) ? 18 : default_grids[networks[network].mode];
}
static void set_network(Config *net, int network) {
    set_mode(net, networks[network].mode);
    if (!converted(net->mode)) return;
    net->a[0] = networks[network].a, net->shift = networks[network].shift;
    net->K = networks[network].K, net->ordinary[0] = networks[network].ordinary;
    if (net->L < 32) net->ordinary[0] &= (1u << net->L) - 1;
}
static int taught_by = -1;  // the objective of the next models, which have a teacher then

typedef struct { int L, C, NH, V, B, T, chunk, head_chunk, slice, group; } Shape;
//                           L   C  NH   V   B    T  chunk  head_chunk  slice  group
static const Shape odd   = { 5, 60,  3, 65,  3,  37,  2,     50,         0,     0};  // nothing divides anything
static const Shape deep  = {96, 16,  2, 32,  2,   8,  1,     16,         0,     0};
static const Shape even  = { 2, 32,  4, 128, 4,  64,  4,    256,         0,     0};
// attention's internals are larger than the MLP's
static const Shape least = { 2,  2,  1, 32,  3,   1,  2,      3,         0,     0};
// several of a GPU's, as its library takes them
static const Shape tiles = { 2, 64,  1, 65,  2, 150,  1,    100,         0,     0};
// stands for odd where whole networks run many times and that is slow
static const Shape small = { 4, 20,  1, 65,  3,  11,  2,     10,         0,     0};
// slices and groups, of which nothing is a whole number either; and a GPU's
static const Shape cut   = { 4, 60,  3, 65,  3,  37,  2,     50,        23,     2};
static const Shape cut16 = { 2, 64,  2, 65,  1, 150,  1,    100,        64,     1};

// What tests know of the block, further down: its own sizes for those of a shape, the groups of heads that
// stand for the shape's, how large weights are, the layer function that normalizes, how a value goes wrong
static void set_block(Config *net);
static double weights_of(Shape s);
static int group_in(const Config *net, Shape s);
static const char *norm_function(void);
static void spoil(Model *m, int kind);

static int evaluations_of(const Config *net, int k) { return has_estimate(net, k) ? net->K + 2 : 1; }

// The first T tokens of the first sequence, as a batch of their own
static Model one_sequence(const Model *m, int T) {
    Model s = forward_only(m);
    s.B = 1, s.T = T, s.cache = NULL;
    return s;
}

// A planned and allocated model with weights large enough that the forces matter, and a batch.
static void make_model(Model *m, Shape s, int network, int memory, int grid) {
    memset(m, 0, sizeof *m);
    m->net.L = s.L, m->net.C = s.C, m->net.NH = s.NH;
    m->net.V = s.V, m->net.Vp = (s.V + 127) / 128 * 128, m->net.maxT = s.T + 3;
    set_block(&m->net);
    set_network(&m->net, network);
    m->net.grid = grid;
    if (m->net.mode == MIDPOINT_A) draw_coefficients(&m->net, 5);
    m->has_teacher = taught_by >= 0, m->objective = m->has_teacher ? taught_by : CROSS_ENTROPY;
    m->B = s.B, m->T = s.T, m->chunk = s.chunk, m->head_chunk = s.head_chunk;
    m->slice = s.slice, m->group = group_in(&m->net, s);
    m->training = 1, m->cache_tokens = s.T + 2;
    m->memory = smaller_of(memory, AUTO);  // AUTO, and one and two more: keeps one step, half of them, all
    m->kept_steps = memory == AUTO ? 1 : memory == AUTO + 1 ? steps(&m->net) / 2 : steps(&m->net);
    plan(m);
    model_alloc(m);
    size_t all[TENSORS], at = 0, words = (size_t)s.V * (size_t)s.C;
    tensor_sizes(&m->net, all);
    for (int t = 0; t < TENSORS; at += all[t++])
        for (size_t i = 0; i < all[t]; i += STAGE) {
            size_t n = piece_of(all[t] - i);
            for (size_t j = 0; j < n; j++) {
                double x = (tensor_kinds[t].kind == GAIN) + weights_of(s) * uniform();
                staging[j] = (param_t)(i + j >= words && tensor_kinds[t].kind == VOCABULARY ? 0 : x);
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

// Compares a gradient with finite differences of f along random directions (+-1 in every element): the mean
// of (d . u)^2 over such u is |d|^2, so this estimates the norm of the difference over the norm of the
// gradient.
static void check_gradient(const char *what, double (*f)(void *), void *context, real_t *x,
                           const real_t *gradient, size_t n) {
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
    check(sqrt(difference / norm) <= 1e-6, "%s: the gradient differs from finite differences by %.2e", what,
          sqrt(difference / norm));
}

static double model_loss(void *context) {
    Model *m = (Model *)context;
    forward(m);
    head(m, 0);
    return objective_of(m);
}

// For every tensor of a network
static void check_network_gradients(Shape shape, int network, int objective) {
    Model m;
    size_t all[TENSORS], at = 0;
    double drift;
    taught_by = objective == CROSS_ENTROPY ? -1 : objective;
    make_model(&m, shape, network, network == BASELINE ? STORE : REVERSE, 0);
    taught_by = -1;
    tensor_sizes(&m.net, all);
    forward_backward(&m, 1, &drift);
    for (int t = 0; t < TENSORS; t++) {
        char what[128];
        size_t words = (size_t)m.net.V * (size_t)m.net.C;
        size_t n = tensor_kinds[t].kind == VOCABULARY ? smaller_size(words, all[t]) : all[t];
        if (!n) continue;  // a tied head
        snprintf(what, sizeof what, "%s %s, %s, slices of %d", name_of(network), tensor_kinds[t].name,
                 objective_names[objective], shape.slice);
        check_gradient(what, model_loss, &m, m.params + at, m.grads + at, n);
        at += all[t];
    }
    model_free(&m);
}

static void test_network_gradients(void) {
    static const struct { int network, objective; } beside_teacher[] = {
        {BASELINE, KL}, {RETROFIT, KL}, {BASELINE, KL_TEACHER}, {RETROFIT, KL_TEACHER}};
    set_threads(1);  // so small a network has nothing for a second
    for (int network = 0; network < NETWORKS; network++) {
        check_network_gradients(odd, network, CROSS_ENTROPY);
        int sliced = network == MIDPOINT || network == HAMILTONIAN || network == RETROFIT;
        if (sliced) check_network_gradients(cut, network, CROSS_ENTROPY);
    }
    for (size_t i = 0; i < sizeof beside_teacher / sizeof beside_teacher[0]; i++)
        check_network_gradients(odd, beside_teacher[i].network, beside_teacher[i].objective);
}

// One layer on its own: y = f(x, w, b), loss = y . weights.
typedef struct {
    int kind, n, C, OC, T, NH, NKV;
    real_t *x, *w, *b, *y, *y2, *probe;  // probe: dloss/dy
    stream_t *s;
    int *tokens;
} Layer;
// The last has one more behind it, for the divergence in the other direction.
enum { MATMUL, MATMUL_GELU, LAYERNORM, ATTENTION, CLASSIFIER, EMBEDDING, DISTILLATION };

static double layer_loss(void *context) {
    Layer *l = (Layer *)context;
    size_t count = (size_t)l->n * (size_t)l->OC;
    double loss = 0;
    switch (l->kind) {
    case MATMUL: matmul_forward(l->y, l->x, l->w, l->b, l->n, l->C, l->OC, l->OC); break;
    case MATMUL_GELU: matmul_gelu_forward(l->y, l->y2, l->x, l->w, l->b, l->n, l->C, l->OC); break;
    case LAYERNORM: layernorm_forward(l->y, l->s, l->x, l->w, l->b, l->n, l->C, 0); break;
    case ATTENTION: attention_forward(l->y, l->y2, l->x, l->n / l->T, l->T, l->OC, l->NH, l->NKV, l->NH); break;
    case CLASSIFIER:
        memcpy(l->y2, l->x, sizeof(real_t) * (size_t)l->n * (size_t)l->C);
        classifier(l->y, l->y2, l->tokens, l->n, l->C - 3, l->C, 0);
        break;
    case DISTILLATION: case DISTILLATION + 1:
        memcpy(l->y2, l->x, sizeof(real_t) * (size_t)l->n * (size_t)l->C);
        distillation(l->b, (size_t)l->n, l->y2, l->w, l->tokens, l->n, l->C - 3, l->C,
                     KL + l->kind - DISTILLATION, 0);
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
    Layer l = {0, N, C, OC, T, NH, NH,
               random_reals(N * 3*C, 1), random_reals(OC * 100, 1), random_reals(200 * OC, 1),
               random_reals(N * 100, 0), random_reals(N * 100, 0), random_reals(N * 100, 1),
               (stream_t *)calloc(2 * N * 100, sizeof(stream_t)), (int *)calloc(N, sizeof(int))};
    real_t *dx = random_reals(N * 100, 0), *dy = random_reals(N * 100, 0);
    real_t *dw = random_reals(OC * 100, 0), *db = random_reals(200 * OC, 0);
    void *scratch = device_alloc(layers_scratch_bytes(4096, 4096, 4096, 64));
    layers_begin(scratch);
    for (int i = 0; i < N * 100; i++) l.s[i].real = (real_t)uniform();

    matmul_backward(dx, dw, db, l.probe, l.x, l.w, NULL, N, C, OC, OC);
    check_gradient("matmul input", layer_loss, &l, l.x, dx, N * C);
    check_gradient("matmul weight", layer_loss, &l, l.w, dw, OC * C);
    check_gradient("matmul bias", layer_loss, &l, l.b, db, OC);

    // GELU's slope multiplies what comes from the layer above, here the identity
    l.kind = MATMUL_GELU;
    real_t *identity = random_reals(OC * OC, 0), *ignored = random_reals(OC * OC, 0);
    for (int i = 0; i < OC; i++) identity[i*OC + i] = 1;
    layer_loss(&l);
    matmul_backward(dy, ignored, NULL, l.probe, l.y, identity, l.y2, N, OC, OC, OC);
    memset(dw, 0, sizeof(real_t) * OC * C);
    memset(db, 0, sizeof(real_t) * OC);
    matmul_backward(dx, dw, db, dy, l.x, l.w, NULL, N, C, OC, OC);
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
        static const char *const what[] = {"attention", "attention, three heads a key",
                                           "attention, one head of keys"};
        l.NKV = key_heads[i];
        layer_loss(&l);
        attention_backward(dx, l.probe, l.x, l.y, l.y2, N / T, T, C, NH, l.NKV, NH);
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

// ---- layers against their formulas

static double gelu_reference(double x) {
    return 0.5 * x * (1 + tanh(0.7978845608028654 * (x + 0.044715 * x * x * x)));
}
static double gelu_slope_reference(double x) {
    double t = tanh(0.7978845608028654 * (x + 0.044715 * x * x * x));
    return 0.5 * (1 + t) + 0.5 * x * (1 - t * t) * 0.7978845608028654 * (1 + 3 * 0.044715 * x * x);
}
static void round_to_bf16(real_t *x, size_t n) {
    for (size_t i = 0; i < n; i++) x[i] = (real_t)from_bf16(to_bf16((float)x[i]));
}

// The operands of a product (n, C) by (OC, C) and a bias (OC), and what gradients are added to
typedef struct {
    int n, C, OC;
    size_t nC, nOC, W;  // elements of x, of y and of w; the bias stands behind w
    real_t *x, *w, *dy, *pre, *was;
    act_t *on_x, *on_dy;  // on the device
    param_t *on_w;
} Operands;

// y, and GELU of it: in the product's ending, of the sum, or behind it, of what was stored
static void check_product(const Operands *o) {
    const int n = o->n, C = o->C, OC = o->OC;
    double worst = 0, worst_gelu = 0;
    act_t *y = activations(NULL, o->nOC), *of_gelu = activations(NULL, o->nOC);
    matmul_forward(y, o->on_x, o->on_w, o->on_w + o->W, n, C, OC, OC);
    real_t *alone = as_reals(y, o->nOC);
    matmul_gelu_forward(of_gelu, y, o->on_x, o->on_w, o->on_w + o->W, n, C, OC);
    real_t *got = as_reals(y, o->nOC), *got_gelu = as_reals(of_gelu, o->nOC);
    for (int r = 0; r < n; r++)
        for (int k = 0; k < OC; k++) {
            double sum = o->w[o->W + (size_t)k], stored = got[r*OC + k], gelu = got_gelu[r*OC + k];
            for (int c = 0; c < C; c++) sum += (double)o->x[r*C + c] * o->w[k*C + c];
            worst = larger(worst, larger(off(sum, alone[r*OC + k]), off(sum, stored)));
            double apart = fmin(off(gelu_reference(sum), gelu), off(gelu_reference(stored), gelu));
            worst_gelu = larger(worst_gelu, apart - gelu_slack);
        }
    check(worst < 1e-4 && worst_gelu < 1e-4, "matmul_forward (%d, %d, %d) is off by %g, GELU by %g",
          n, C, OC, worst, worst_gelu);
    free(alone), free(got), free(got_gelu);
}

// The gradients of weights are added to what is there: their first and last elements
static void check_weight_gradients(const Operands *o, const real_t *got) {
    const int n = o->n, C = o->C, OC = o->OC;
    const size_t last = o->W + (size_t)OC - 1;
    double sum_w = o->was[0], sum_b = o->was[o->W], last_w = o->was[o->W - 1], last_b = o->was[last];
    for (int r = 0; r < n; r++) {
        sum_w += (double)o->dy[r*OC] * o->x[r*C], sum_b += o->dy[r*OC];
        last_w += (double)o->dy[r*OC + OC - 1] * o->x[r*C + C - 1], last_b += o->dy[r*OC + OC - 1];
    }
    sum_w -= got[0], sum_b -= got[o->W], last_w -= got[o->W - 1], last_b -= got[last];
    check(fabs(sum_w) < 1e-3 && fabs(sum_b) < 1e-3 && fabs(last_w) < 1e-3 && fabs(last_b) < 1e-3,
          "matmul_backward (%d, %d, %d): weight or bias is off by %g, %g, %g, %g",
          n, C, OC, sum_w, sum_b, last_w, last_b);
}

// dx, and dx times GELU's slope
static void check_product_back(const Operands *o) {
    const int n = o->n, C = o->C, OC = o->OC;
    double worst = 0, worst_gelu = 0;
    act_t *dx = activations(NULL, o->nC), *sloped = activations(NULL, o->nC);
    real_t *dw = (real_t *)on_device(o->was, (o->W + (size_t)OC) * sizeof(real_t));
    matmul_backward(dx, dw, dw + o->W, o->on_dy, o->on_x, o->on_w, NULL, n, C, OC, OC);
    real_t *got_dw = from_device(dw, o->W + (size_t)OC);
    check_weight_gradients(o, got_dw);
    matmul_backward(sloped, dw, NULL, o->on_dy, o->on_x, o->on_w, activations(o->pre, o->nC), n, C, OC, OC);
    real_t *got = as_reals(dx, o->nC), *got_sloped = as_reals(sloped, o->nC);
    for (int r = 0; r < n; r++)
        for (int c = 0; c < C; c++) {
            double sum = 0, slope = gelu_slope_reference(o->pre[r*C + c]);
            for (int k = 0; k < OC; k++) sum += (double)o->dy[r*OC + k] * o->w[k*C + c];
            worst = larger(worst, off(sum, got[r*C + c]));
            worst_gelu = larger(worst_gelu, off(sum * slope, got_sloped[r*C + c]) - slope_slack * fabs(sum));
        }
    check(worst < 1e-3 && worst_gelu < 1e-3,
          "matmul_backward (%d, %d, %d) is off by %g, times GELU' by %g", n, C, OC, worst, worst_gelu);
    free(got_dw), free(got), free(got_sloped);
}

// Columns of a wider matrix are the same product, and nothing else is touched there.
static void check_columns(const Operands *o) {
    const int n = o->n, C = o->C, OC = o->OC, width = OC + 24, from = 16;
    const size_t all = (size_t)n * (size_t)width, grads = o->W + (size_t)OC;
    int touched = 0;
    double worst = 0;
    real_t *sevens = random_reals(all, 1), *dy = random_reals(all, 1);
    for (int i = 0; i < n * width; i++) sevens[i] = 7;
    for (int i = 0; i < n * OC; i++) dy[i / OC * width + from + i % OC] = o->dy[i];
    act_t *y = activations(NULL, o->nOC), *wide = activations(sevens, all), *on_dy = activations(dy, all);
    act_t *dx = activations(NULL, o->nC), *dx_wide = activations(NULL, o->nC);
    real_t *dw = (real_t *)on_device(o->was, grads * sizeof(real_t));
    real_t *dw_wide = (real_t *)on_device(o->was, grads * sizeof(real_t));
    matmul_forward(y, o->on_x, o->on_w, o->on_w + o->W, n, C, OC, OC);
    matmul_forward(wide + from, o->on_x, o->on_w, o->on_w + o->W, n, C, OC, width);
    matmul_backward(dx, dw, dw + o->W, o->on_dy, o->on_x, o->on_w, NULL, n, C, OC, OC);
    matmul_backward(dx_wide, dw_wide, dw_wide + o->W, on_dy + from, o->on_x, o->on_w, NULL, n, C, OC, width);
    real_t *a[] = {as_reals(y, o->nOC), as_reals(dx, o->nC), from_device(dw, grads)};
    real_t *b[] = {as_reals(wide, all), as_reals(dx_wide, o->nC), from_device(dw_wide, grads)};
    for (int i = 0; i < n * width; i++) {
        int column = i % width - from;
        if (column < 0 || column >= OC) touched += b[0][i] != 7;
        else worst = larger(worst, off(a[0][i / width * OC + column], b[0][i]));
    }
    for (size_t i = 0; i < o->nC; i++) worst = larger(worst, off(a[1][i], b[1][i]));
    for (size_t i = 0; i < grads; i++) worst = larger(worst, off(a[2][i], b[2][i]));
    check(touched == 0 && worst <= (twin ? 1e-3 : 0), "columns of a wider matrix (%d, %d, %d): off by %g, %d "
          "others touched", n, C, OC, worst, touched);
    for (int i = 0; i < 3; i++) free(a[i]), free(b[i]);
    free(sevens), free(dy);
}

// Products in bf16 round their operands to the nearest. A row or two are products as they are.
static void check_rounding(const Operands *o, const real_t *got) {
    act_t *y = activations(NULL, o->nOC);
    matmul_forward(y, o->on_x, o->on_w, o->on_w + o->W, o->n, o->C, o->OC, o->OC);
    real_t *rounded = as_reals(y, o->nOC);
    check(memcmp(got, rounded, o->nOC * sizeof(real_t)) == 0,
          "matmul_forward (%d, %d, %d) does not round to the nearest bf16", o->n, o->C, o->OC);
    free(rounded);
}

// Sums of products of numbers that bf16 holds; with it, all others have to be rounded to those first.
static void check_matmul(int n, int C, int OC, int bf16, int order) {
    Operands o = {n, C, OC, (size_t)n * (size_t)C, (size_t)n * (size_t)OC, (size_t)OC * (size_t)C,
                  NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL};
    const size_t all = o.W + (size_t)OC;
    size_t room = order ? layers_scratch_bytes(n, C, OC, 0) : layers_scratch_bytes(n, OC, C, 0);
    char guard[64], after[64], *scratch = (char *)on_device(NULL, room + sizeof guard);
    memset(guard, 0xA5, sizeof guard);
    to_device(scratch + room, guard, sizeof guard);
    layers_begin(scratch);
    o.x = random_reals(o.nC, 1), o.w = random_reals(all, 1), o.dy = random_reals(o.nOC, 1);
    o.pre = random_reals(o.nC, 3), o.was = random_reals(all, 1);
    act_t *y = activations(NULL, o.nOC);
    param_t *w = weights_on_device(o.w, all);
    matmul_forward(y, activations(o.x, o.nC), w, w + o.W, n, C, OC, OC);
    real_t *got = as_reals(y, o.nOC);
    round_to_bf16(o.x, o.nC), round_to_bf16(o.w, twin ? all : o.W);
    round_to_bf16(o.dy, o.nOC), round_to_bf16(o.pre, o.nC);
    o.on_w = weights_on_device(o.w, all);
    o.on_x = activations(o.x, o.nC), o.on_dy = activations(o.dy, o.nOC);
    if (bf16 && n > 2) check_rounding(&o, got);
    check_product(&o);
    check_product_back(&o);
    check_columns(&o);
    to_host(after, scratch + room, sizeof after);
    check(memcmp(guard, after, sizeof guard) == 0, "matmul (%d, %d, %d) writes past its scratch", n, C, OC);
    free(got), free(o.x), free(o.w), free(o.dy), free(o.pre), free(o.was);
    release();
}

static void test_matmul(void) {
    static const int shapes[][3] = {  // n, C, OC
        {1, 1, 1},
        {7, 301, 5},
        {37, 60, 180},
        {130, 2201, 33},   // four cross a block each
        {1200, 40, 70},
        {3, 20, 3200},
        {1030, 3100, 20},  // with scratch for either order
        {1030, 3100, 20},
        {2, 60, 180},      // one or two rows go another way
        {70, 64, 192}};
    for (int bf16 = 0; bf16 < 2; bf16++)
        for (int i = 0; i < 10 && layers_bf16(bf16); i++)
            check_matmul(shapes[i][0], shapes[i][1], shapes[i][2], bf16, i % 2);
    layers_bf16(0);
}

typedef struct { int B, T, C, NH, NKV; } AttentionShape;

// Attention and the gradient of out . dy by their definitions: out (B, T, C), lse (B, NH, T), and what is
// added to d, which is like qkv
static void attention_reference(AttentionShape s, const real_t *qkv, const real_t *dy,
                                double *out, double *lse, double *d) {
    const int T = s.T, HS = s.C / s.NH, KV = s.NKV * HS, S = s.C + 2*KV;
    double *p = (double *)calloc((size_t)T, sizeof(double));
    for (int i = 0; i < s.B * s.NH * T; i++) {
        int b = i / T / s.NH, h = i / T % s.NH, t = i % T, row = (b*T + t)*s.C + h*HS;
        // where the query stands, and the first key of its sequence
        int query = (b*T + t)*S + h*HS, key = b*T*S + s.C + h / (s.NH / s.NKV) * HS;
        const real_t *q = qkv + query, *k = qkv + key, *v = k + KV, *g = dy + row;
        double *dq = d + query, *dk = d + key, *dv = dk + KV, sum = 0, highest = -1e30, along = 0;
        for (int u = 0; u <= t; u++) {
            double dot = 0;
            for (int c = 0; c < HS; c++) dot += (double)q[c] * k[u*S + c];
            p[u] = dot / sqrt(HS);
            highest = larger(highest, p[u]);
        }
        for (int u = 0; u <= t; u++) sum += p[u] = exp(p[u] - highest);
        for (int u = 0; u <= t; u++) p[u] /= sum;
        lse[i] = highest + log(sum);
        for (int c = 0; c < HS; c++) {
            double o = 0;
            for (int u = 0; u <= t; u++) {
                o += p[u] * v[u*S + c];
                dv[u*S + c] += p[u] * g[c];
            }
            out[row + c] = o;
            along += o * g[c];
        }
        for (int u = 0; u <= t; u++) {
            double dp = 0;
            for (int c = 0; c < HS; c++) dp += (double)g[c] * v[u*S + c];
            double ds = p[u] * (dp - along) / sqrt(HS);
            for (int c = 0; c < HS; c++) dq[c] += ds * k[u*S + c], dk[u*S + c] += ds * q[c];
        }
    }
    free(p);
}

// The last heads of keys alone, with the queries that read them, are the same as among all.
static void check_group(AttentionShape s, const real_t *qkv, const real_t *dy, const act_t *out,
                        const act_t *din) {
    const int HS = s.C / s.NH, g = s.NKV / 2, heads = (s.NKV - g) * (s.NH / s.NKV), h = s.NH - heads;
    const int S = s.C + 2 * s.NKV * HS, Q = heads * HS, KV = (s.NKV - g) * HS, width = Q + 2*KV, T = s.T;
    const size_t N = (size_t)s.B * (size_t)T, NC = N * (size_t)s.C, NG = N * (size_t)width;
    real_t *of_group = (real_t *)malloc(NG * sizeof(real_t));
    int *from = (int *)malloc((size_t)width * sizeof(int)), wrong = 0;
    for (int c = 0; c < width; c++) {
        int part = c < Q ? 0 : 1 + (c - Q) / KV;
        from[c] = part ? s.C + (part - 1) * s.NKV * HS + g * HS + (c - Q) % KV : h * HS + c;
    }
    for (size_t i = 0; i < NG; i++)
        of_group[i] = qkv[i / (size_t)width * (size_t)S + (size_t)from[i % (size_t)width]];
    act_t *in = activations(of_group, NG), *o = activations(NULL, NC), *d = activations(NULL, NG);
    act_t *on_dy = activations(dy, NC);
    real_t *lse = (real_t *)on_device(NULL, N * (size_t)s.NH * sizeof(real_t)) + (size_t)h * (size_t)T;
    attention_forward(o + h*HS, lse, in, s.B, T, s.C, s.NH, s.NKV, heads);
    for (int threads = 3; threads > 0; threads -= 2) {  // of few heads threads share one
        set_threads(threads);
        attention_backward(d, on_dy + h*HS, in, o + h*HS, lse, s.B, T, s.C, s.NH, s.NKV, heads);
        real_t *all[] = {as_reals(out, NC), as_reals(din, N * (size_t)S)};
        real_t *some[] = {as_reals(o, NC), as_reals(d, NG)};
        for (size_t i = 0; i < NC; i++)
            if ((int)(i % (size_t)s.C) >= h*HS) wrong += all[0][i] != some[0][i];
        for (size_t i = 0; i < NG; i++)
            wrong += all[1][i / (size_t)width * (size_t)S + (size_t)from[i % (size_t)width]] != some[1][i];
        for (int i = 0; i < 2; i++) free(all[i]), free(some[i]);
    }
    set_threads(2);
    check(wrong == 0, "attention (%d, %d, %d): %d of %d heads alone: %d numbers differ", s.B, T, s.C, heads,
          s.NH, wrong);
    free(of_group), free(from);
}

// Scores up to about `spread`, so that later tiles have the higher ones
static void check_attention(AttentionShape s, int bf16, double spread) {
    const int C = s.C, NH = s.NH, NKV = s.NKV, S = C + 2 * NKV * (C / NH);
    const size_t T = (size_t)s.T, N = (size_t)s.B * T;
    const size_t NC = N * (size_t)C, NS = N * (size_t)S, L = N * (size_t)NH;
    double worst = 0, worst_lse = 0, worst_query = 0, difference = 0, norm = 0;
    real_t *qkv = random_reals(NS, sqrt(spread)), *dy = random_reals(NC, 1);
    // what remains is the rounding of p, and of what is stored
    if (bf16) round_to_bf16(qkv, NS), round_to_bf16(dy, NC);
    double *o = (double *)calloc(NC + L + NS, sizeof(double)), *l = o + NC, *d = l + L;
    attention_reference(s, qkv, dy, o, l, d);
    act_t *in = activations(qkv, NS), *din = activations(NULL, NS), *out = activations(NULL, NC);
    act_t *alone = activations(NULL, NC);  // a query at a time; not of all tokens
    real_t *lse = (real_t *)on_device(NULL, L * sizeof(real_t));
    layers_begin(on_device(NULL, layers_scratch_bytes((int)N, C, 4*C, NH)));
    attention_forward(out, lse, in, s.B, s.T, C, NH, NKV, NH);
    attention_backward(din, activations(dy, NC), in, out, lse, s.B, s.T, C, NH, NKV, NH);
    for (size_t token = 0; token < N; token += 13)
        attention_query(alone + token * (size_t)C, in + token / T * T * (size_t)S, (int)(token % T),
                        C, NH, NKV);
    check_group(s, qkv, dy, out, din);
    real_t *got = as_reals(out, NC), *got_alone = as_reals(alone, NC), *got_lse = from_device(lse, L);
    real_t *got_d = as_reals(din, NS);
    for (size_t j = 0; j < L; j++) worst_lse = larger(worst_lse, fabs(l[j] - got_lse[j]) / spread);
    for (size_t j = 0; j < NC; j++) {
        worst = larger(worst, off(o[j], got[j]) / sqrt(spread));
        if (j / (size_t)C % 13 != 0) continue;
        worst_query = larger(worst_query, off(o[j], got_alone[j]) / sqrt(spread));
    }
    for (size_t j = 0; j < NS; j++) difference += pow(d[j] - got_d[j], 2), norm += d[j] * d[j];
    char what[64];
    snprintf(what, sizeof what, "attention (%d, %d, %d), %d and %d heads", s.B, s.T, C, NH, NKV);
    double most = bf16 ? 4e-3 : 1e-5 * fmax(1, spread / 100);
    double most_d = bf16 ? 1e-2 : 1e-5 * fmax(1, spread / 10);
    check(worst < most && worst_lse < 1e-5, "%s is off by %g, its log-sum-exp by %g", what, worst, worst_lse);
    check(worst_query < most, "%s: a query alone is off by %g", what, worst_query);
    check(sqrt(difference / norm) < most_d, "%s: the gradient is off by %g", what, sqrt(difference / norm));
    free(qkv), free(dy), free(o), free(got), free(got_lse), free(got_d), free(got_alone);
    release();
}

static void test_attention(void) {
    static const AttentionShape shapes[] = {
        {2, 131, 40, 2, 2}, {1, 65, 128, 2, 2}, {1, 70, 128, 1, 1}, {1, 130, 20, 5, 5},
        {2, 131, 48, 6, 2}, {1, 70, 96, 6, 1}, {1, 129, 30, 6, 2}, {2, 66, 256, 4, 2},  // fewer key heads
        {1, 600, 16, 4, 2}};  // a CPU's strips wait for each other
    const int count = slow ? 8 : 9;
    static const struct { int bf16; double spread; } kinds[] = {{0, 1}, {0, 300}, {1, 1}};
    for (int kind = 0; kind < 3; kind++)
        for (int i = 0; i < count && layers_bf16(kinds[kind].bf16); i++)
            check_attention(shapes[i], kinds[kind].bf16, kinds[kind].spread);
    layers_bf16(0);
}

// A query that sees more keys than a card's shared memory has room for
static void test_long_query(void) {
    enum { T = 20000, C = 8, NH = 2, HS = C / NH, S = 3*C };  // scores are divided by sqrt(HS) = 2
    real_t *qkv = random_reals((size_t)T * S, 3);
    act_t *out = activations(NULL, C);
    attention_query(out, activations(qkv, (size_t)T * S), T - 1, C, NH, NH);
    real_t *got = as_reals(out, C);
    for (int h = 0; h < NH; h++) {
        double sum = 0, o[HS] = {0}, worst = 0;
        for (int t = 0; t < T; t++) {
            const real_t *q = qkv + (T - 1) * S + h*HS, *k = qkv + t*S + C + h*HS, *v = k + C;
            double score = 0;
            for (int c = 0; c < HS; c++) score += (double)q[c] * k[c];
            sum += exp(score / 2);
            for (int c = 0; c < HS; c++) o[c] += exp(score / 2) * v[c];
        }
        for (int c = 0; c < HS; c++) worst = larger(worst, fabs(o[c] / sum - got[h*HS + c]));
        check(worst < (rounding > 0 ? 2e-2 : 1e-4), "a query of %d keys is off by %g", T, worst);
    }
    free(qkv), free(got);
    release();
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
        check(fabs(expected - *loss) < 1e-4 && fabs(d[at] - 1) < 1e-5 && fabs(d[target] + 1) < 1e-5,
              "a logit of 300 at %d: loss %g for %g", at, (double)*loss, expected);
        free(loss), free(d);
        release();
    }
    real_t x[16] = {1, 2, 3, -1, 0, 5, 99, 99, 0, 0, 0, 0, 0, 0, 99, 99};
    real_t *losses = (real_t *)on_device(NULL, 2 * sizeof(real_t));
    int targets[2] = {2, 5};
    act_t *logits = activations(x, 16);
    classifier(losses, logits, (int *)on_device(targets, sizeof targets), 2, 6, 8, 0.5);
    real_t *loss = from_device(losses, 2), *d = as_reals(logits, 16);
    double sum = exp(1) + exp(2) + exp(3) + exp(-1) + 1 + exp(5);
    check(fabs(loss[0] - (log(sum) - 3)) < 1e-5 && fabs(loss[1] - log(6)) < 1e-5, "classifier's losses");
    check(off(0.5 * (exp(3) / sum - 1), d[2]) < 1e-6 && off(0.5 / 6, d[8]) < 1e-6 && d[6] == 0 && d[15] == 0,
          "classifier's gradient");
    free(loss), free(d);
    release();
}

// Losses, divergence both ways and its gradient beside a teacher's logits, against their definitions.
static void test_distillation(void) {
    enum { N = 3, V = 70, Vp = 128 };
    for (int objective = KL; objective <= KL_TEACHER; objective++) {
        real_t x[N * Vp], y[N * Vp];
        int targets[N] = {3, 69, 11};
        for (int i = 0; i < N * Vp; i++) x[i] = (real_t)(4 * uniform()), y[i] = (real_t)(x[i] + uniform());
        for (int v = 0; v < Vp; v++) y[2*Vp + v] = x[2*Vp + v];  // the last row agrees, the first does not
        x[5] = 9, y[5] = 1, y[6] = 8;
        if (rounding > 0) round_to_bf16(x, N * Vp), round_to_bf16(y, N * Vp);
        act_t *logits = activations(x, N * Vp), *same = activations(x, N * Vp);
        act_t *teacher = activations(y, N * Vp);
        real_t *out = (real_t *)on_device(NULL, METRICS * (N + 2) * sizeof(real_t));
        int *on = (int *)on_device(targets, sizeof targets);
        distillation(out, N + 2, same, teacher, on, N, V, Vp, objective, 0);
        distillation(out, N + 2, logits, teacher, on, N, V, Vp, objective, 0.5);
        real_t *held = from_device(out, METRICS * (N + 2));
        real_t *d = as_reals(logits, N * Vp), *kept = as_reals(same, N * Vp);
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
                double p = a[v] - lse[0], q = b[v] - lse[1], g = 0;
                if (v < V) g = objective == KL ? exp(p) * (p - q - kl) : exp(p) - exp(q);
                worst_gradient = larger(worst_gradient, off(0.5 * g, d[i * Vp + v]));
            }
            double loss = lse[0] - a[targets[i]], of_teacher = lse[1] - b[targets[i]];
            worst = larger(worst, fabs(held[i] - loss) + fabs(held[N + 2 + i] - of_teacher) +
                           fabs(held[2 * (N + 2) + i] - kl));
        }
        check(worst < 2e-5 && worst_gradient < 2e-6,
              "%s: losses or divergence are off by %g, the gradient by %g",
              objective_names[objective], worst, worst_gradient);
        check(held[3 * (N + 2)] == 0 && held[3 * (N + 2) + 2] == 1 && fabs(held[2 * (N + 2) + 2]) < 1e-6,
              "agreement, or a divergence of equals");
        free(held), free(d), free(kept);
        release();
    }
}

// A target below 0 does not count: no loss, no gradient, and what counts beside it is as ever.
static void test_uncounted(void) {
    enum { N = 4, V = 70, Vp = 128, CLASSIFIER = CROSS_ENTROPY };
    const int all[N] = {3, 69, 11, 0}, some[N] = {-1, 69, -1, 0};
    real_t x[N * Vp], y[N * Vp];
    for (int i = 0; i < N * Vp; i++) x[i] = (real_t)(4 * uniform()), y[i] = (real_t)(4 * uniform());
    for (int objective = CLASSIFIER; objective <= KL_TEACHER; objective++)
        for (int scaled = 0; scaled < 2; scaled++) {
            real_t *out[2], *d[2], *plain = as_reals(activations(x, N * Vp), N * Vp);
            const int metrics = objective == CLASSIFIER ? 1 : METRICS;
            for (int i = 0; i < 2; i++) {
                act_t *logits = activations(x, N * Vp);
                int *targets = (int *)on_device(i ? some : all, sizeof all);
                real_t *losses = (real_t *)on_device(y, METRICS * N * sizeof(real_t));
                if (objective == CLASSIFIER) classifier(losses, logits, targets, N, V, Vp, 0.5 * scaled);
                else distillation(losses, N, logits, activations(y, N * Vp), targets, N, V, Vp, objective,
                                  0.5 * scaled);
                out[i] = from_device(losses, METRICS * N), d[i] = as_reals(logits, N * Vp);
            }
            int same = 1, none = 1, kept = 1;
            for (int i = 0; i < N; i++) {
                for (int k = 0; k < metrics; k++) {
                    same &= some[i] < 0 || out[0][k*N + i] == out[1][k*N + i];
                    none &= some[i] >= 0 || out[1][k*N + i] == 0;
                }
                for (int v = i*Vp; v < (i + 1)*Vp; v++) {
                    same &= some[i] < 0 || d[0][v] == d[1][v];
                    none &= !scaled || some[i] >= 0 || d[1][v] == 0;
                    kept &= scaled || objective == CLASSIFIER || d[1][v] == plain[v];
                }
            }
            check(same && none && kept, "%s, scale %g: same %d, nothing %d, kept %d",
                  objective_names[objective], 0.5 * scaled, same, none, kept);
            free(plain);
            for (int i = 0; i < 2; i++) free(out[i]), free(d[i]);
            release();
        }
}

#ifdef TWIN
// A large product takes the fastest way, but its bits are those of the first that the library proposes. The
// emulated library has three for it, of which the second is the fastest and sums in another order, and the
// third is the next and adds up from what it is added to.
static void check_ways(int accumulate) {
    enum { M = 256, N = 4096, K = 32 };
    const size_t bytes = M * N * (accumulate ? sizeof(float) : sizeof(act_t));
    Product s = {M, N, K, 1, 0, accumulate, CUBLASLT_EPILOGUE_DEFAULT, K, M};
    Known first = {}, *way = NULL;
    real_t *x = random_reals((M + N) * K, 11), *begun = random_reals(M * N, 12);
    act_t *a = activations(x, M * K), *b = activations(x + M * K, N * K);
    void *d[2], *got[2];
    setenv("EMULATED_WAYS", "1", 1);
    layers_begin(on_device(NULL, layers_scratch_bytes(1, 1, 1, 1)));
    for (int i = 0; i < 2; i++) d[i] = on_device(begun, bytes);
    for (int i = 0; i < OFTEN; i++) way = way_of(s, d[0], a, b, NULL, NULL);
    check(way && way->ways > 1, "a large product has no ways to choose from");
    choose(&first, s, NULL, NULL);
    for (int i = 0; i < 2; i++) {
        multiply_by(i ? &first : way, d[i], a, b, NULL, NULL);
        got[i] = malloc(bytes);
        to_host(got[i], d[i], bytes);
    }
    check(memcmp(got[0], got[1], bytes) == 0, "%s: the fastest way has other bits than the first",
          accumulate ? "added to" : "set");
    unsetenv("EMULATED_WAYS");
    free(x), free(begun), free(got[0]), free(got[1]);
    release();
}
static void test_ways(void) {
    check_ways(0);
    check_ways(1);
    // of more shapes than are known at a time the first is met again
    enum { M = 16, SHAPES = 1100 };
    act_t *x = (act_t *)on_device(NULL, (M + 1) * SHAPES * sizeof(act_t));
    for (int i = 0; i <= SHAPES; i++) {
        const int n = i % SHAPES + 1;
        const Product s = {M, n, M, 1, 0, 0, CUBLASLT_EPILOGUE_DEFAULT, M, M};
        const Known *way = way_of(s, x, x, x, NULL, NULL);
        check(way && memcmp(&way->product, &s, sizeof s) == 0, "shape %d has no way", i);
    }
    release();
}
#endif

// What is cut into pieces, for copying or for threads, is whole, and the same bits for any number of threads.
// Whole pieces of a tensor have the same sums of squares, and AdamW makes the same of them, wherever they lie in
// memory and whoever else computes the others: what ranks rely on.
static void test_shards(void) {
    enum { COUNT = 3 * PIECE + 100, FROM = PIECE, LEFT = COUNT - FROM };
    const size_t bytes = sizeof(real_t) * COUNT;
    real_t *x = random_reals(4 * COUNT, 7);
    double sums[4], left[3], worst = 0;
    for (size_t i = 3 * COUNT; i < 4 * COUNT; i++) x[i] *= x[i];
    real_t *whole = (real_t *)on_device(x, 4 * bytes);
    layers_begin(on_device(NULL, layers_scratch_bytes(1, 1, 1, 1)));
    squares(sums, whole + COUNT, COUNT);
    for (int p = 0; p < 4; p++) {
        double sum = 0;
        for (size_t i = (size_t)p * PIECE; i < (size_t)smaller_of((p + 1) * PIECE, COUNT); i++)
            sum += (double)x[COUNT + i] * x[COUNT + i];
        worst = larger(worst, fabs(sums[p] / sum - 1));
    }
    check(worst < 1e-6, "a piece's sum of squares is off by %g of it", worst);
    adamw(whole, whole + COUNT, whole + 2*COUNT, whole + 3*COUNT, COUNT, 1e-3, 0.9, 0.95, 0.1, 0.7, 3);
    real_t *want = from_device(whole, 4 * COUNT);
    for (int off = 0; off < 5; off++) {
        real_t *room = (real_t *)on_device(NULL, 4 * (bytes + 64));
        real_t *part[4];
        for (int i = 0; i < 4; i++) {
            part[i] = room + i * (COUNT + 8) + off * (i + 1) % 7;
            to_device(part[i], x + i * COUNT + FROM, sizeof(real_t) * LEFT);
        }
        squares(left, part[1], LEFT);
        check(memcmp(left, sums + 1, sizeof left) == 0, "%d elements off: other sums of squares", off);
        adamw(part[0], part[1], part[2], part[3], LEFT, 1e-3, 0.9, 0.95, 0.1, 0.7, 3);
        for (int i = 0; i < 4; i++) {
            real_t *got = from_device(part[i], LEFT);
            check(memcmp(got, want + i * COUNT + FROM, sizeof(real_t) * LEFT) == 0,
                  "%d elements off: AdamW gives other bits", off);
            free(got);
        }
    }
    free(x), free(want);
    release();
}

static void test_pieces(void) {
    enum { COUNT = 1000003 };  // some pieces of 1 MiB, and a part of one
    const size_t bytes = sizeof(real_t) * COUNT, n = 4443;
    real_t *x = random_reals(COUNT, 1), *zero = (real_t *)calloc(COUNT, sizeof(real_t)), *first = NULL;
    real_t *y = (real_t *)on_device(NULL, bytes);
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
        stream_step((stream_t *)all, (stream_t *)all, (stream_t *)(all + n), force, NULL, NULL, NULL, n, leapfrog, 0, 1);
        adamw(all + n, all + 2*n, all + 4*n, all + 3*n, n, 1e-3, 0.9, 0.95, 0.1, 0.7, 3);
        got = from_device(all, 5 * n);
        if (!first) first = got, got = NULL;
        else check(memcmp(first, got, sizeof(real_t) * 5 * n) == 0,
                   "AdamW or a float stream has other bits with %d threads", threads);
        free(got);
    }
    real_t *force = as_reals(activations(x + 2*n, n), n);
    double worst = 0;
    for (size_t i = 0; i < n; i++) worst = larger(worst,
                                                  fabs(2.0 * x[n + i] - x[i] + 0.3 * force[i] - first[i]));
    check(worst < 1e-6, "a step of a float stream is off by %g", worst);
    set_threads(2);
    free(x), free(zero), free(first), free(force);
    release();
}

#ifndef TWIN
// The vectorized exponential and what is built on it, against libm.
static void test_functions(void) {
    double worst = 0, worst_gelu = 0;
    for (double x = -80; x < 80; x += 0.01) {
        double of_gelu = (double)gelu((real_t)x) - gelu_reference(x);
        double of_slope = (double)gelu_slope((real_t)x) - gelu_slope_reference(x);
        worst = larger(worst, fabs((double)real_exp((real_t)x) / exp((double)(real_t)x) - 1));
        worst_gelu = larger(worst_gelu, larger(fabs(of_gelu) / fmax(1, fabs(x)), fabs(of_slope)));
    }
    check(worst < 4e-7, "exp is off by %g", worst);
    check(worst_gelu < 4e-6, "GELU or its slope is off by %g", worst_gelu);  // u itself is rounded
    int small = real_exp(0) == 1 && real_exp(-1e30f) == 0 && real_exp(-INFINITY) == 0 && real_exp(-86.9f) > 0;
    int large = real_exp(88.6f) > 2.9e38 && real_exp(100) > 3.4e38 && real_exp(1e3f) > 3.4e38 &&
                real_exp(1e30f) > 3.4e38 && real_exp(INFINITY) > 3.4e38;
    check(isnan(real_exp((real_t)NAN)) && isnan(real_exp((real_t)-NAN)) && small && large,
          "exp at NaN, 0 or far out");
}

#endif

// ---- networks against one another

// KL of a network to the baseline with the same weights, whose projections are made smaller; equal: with the
// same block in every layer.
static double kl_of_conversion(int mode, int shift, int K, int ordinary, double projections, int equal) {
    Model m;
    size_t all[TENSORS], at = 0;
    networks[NETWORKS].mode = mode, networks[NETWORKS].a = 1, networks[NETWORKS].shift = shift;
    networks[NETWORKS].K = K, networks[NETWORKS].ordinary = (uint32_t)ordinary;
    taught_by = KL;
    make_model(&m, odd, NETWORKS, STORE, grid_of(NETWORKS));
    taught_by = -1;
    real_t *w = from_device(m.params, tensor_sizes(&m.net, all));
    for (int t = 0; t < TENSORS; at += all[t++]) {
        int writes = tensor_kinds[t].kind == PROJECTION || strstr(tensor_kinds[t].name, "projb");
        size_t one = tensor_kinds[t].stacked ? all[t] / (size_t)m.net.L : all[t];
        for (size_t i = 0; i < all[t]; i++) {
            if (equal && tensor_kinds[t].stacked) w[at + i] = w[at + i % one];
            if (writes && (i < one || !equal)) w[at + i] *= (real_t)projections;
        }
    }
    to_device(m.params, w, at * sizeof(param_t));
    to_device(m.teacher, w, at * sizeof(param_t));
    forward(&m);
    head(&m, 0);
    double kl = objective_of(&m), apart = fabs(mean_of(&m, LOSS) - mean_of(&m, TEACHER_LOSS));
    if (mode == BASELINE) check(fabs(kl) < 1e-6 && apart == 0 && mean_of(&m, AGREEMENT) == 1,
                                "a copy of the teacher is %g and %g apart from it", kl, apart);
    free(w);
    model_free(&m);
    return kl;
}

// A student with its teacher's weights is the teacher. A conversion comes near it as a goes to 0; retrofit
// also with K where forces are small, and bdia where neighbouring blocks do nearly the same.
static void test_conversion_is_near(void) {
    double before = 1, kl[5];
    kl_of_conversion(BASELINE, 0, 0, 0, 1, 0);
    for (int shift = 1; shift < 8; shift += 2, before = kl[0]) {
        kl[0] = kl_of_conversion(BDIA, shift, 0, 0, 1, 0);
        check(kl[0] > 0 && kl[0] < before / 4 + rounding, "bdia, a = 1/2^%d: KL %g after %g", shift, kl[0],
              before);
    }
    if (rounding > 0) return;  // of logits, which are further apart than these
    for (int K = 0; K < 3; K++) kl[K] = kl_of_conversion(RETROFIT, 2, K, 1, 0.025, 0);
    check(kl[1] < kl[0] / 4 && kl[2] < kl[1] / 4, "retrofit: KL %g, %g, %g for K = 0, 1, 2", kl[0], kl[1],
          kl[2]);
    kl[3] = kl_of_conversion(BDIA, 2, 0, 1, 0.05, 1), kl[4] = kl_of_conversion(BDIA, 2, 0, 1, 0.025, 1);
    check(kl[4] < kl[3] / 2, "bdia of equal blocks: KL %g, and %g with forces half as large", kl[3], kl[4]);
}

// A shorter batch of one sequence goes through the same numbers: what comes later changes nothing before it.
static void test_causality(void) {
    for (int memory = STORE; memory <= REVERSE; memory++) {
        Model m;
        size_t row = 60 * sizeof(stream_t);
        make_model(&m, odd, HAMILTONIAN, memory, 20);
        forward(&m);
        stream_t *whole = (stream_t *)malloc(row * (size_t)m.T);
        stream_t *some = (stream_t *)malloc(row * (size_t)m.T);
        to_host(whole, m.cur, row * (size_t)m.T);
        // one or two tokens take another path through the matrix product
        for (int t = 3; t <= m.T; t += 12) {
            double worst = 0;
            Model shorter = one_sequence(&m, t);
            forward(&shorter);
            to_host(some, shorter.cur, row * (size_t)t);
            for (int i = 0; i < 60 * t; i++) worst = larger(worst, abs(whole[i].fixed - some[i].fixed));
            worst /= 1 << 20;
            // a GPU's library chooses its kernels by size
            check(worst <= (twin ? 0.1 : 0), "the first %d tokens depend on what follows, by %g", t, worst);
        }
        free(whole), free(some);
        model_free(&m);
    }
}

// ---- exactness

// By sixteenths, what is lost goes to a stack of remainders; by a fraction whose denominator is a power of
// two, the low bits are kept. Both come back.
static void test_multiplication(void) {
    int wrong = 0;
    for (int i = 0; i < 20000; i++) {
        int n = 1 + (int)(random_bits(1, 1, (uint64_t)i) % 255);
        unsigned most = n < 16 ? 4096u * (unsigned)n / 16 : 4096u;
        uint16_t r = (uint16_t)(random_bits(1, 2, (uint64_t)i) % most), was = r, r2;
        int32_t s = (int32_t)random_bits(1, 3, (uint64_t)i);
        int64_t t = multiply_sixteenths(s, n, &r), back = unmultiply_sixteenths(t, n, (r2 = r, &r2));
        wrong += fabs((double)t - (double)s * n / 16) > n || back != s || r2 != was;
    }
    check(wrong == 0, "%d of 20000 products by n/16 are wrong or do not come back", wrong);
    wrong = 0;
    for (int i = 0; i < 20000; i++) {
        int shift = i % 9, n = shift ? (int)(random_bits(1, 4, (uint64_t)i) % (1u << shift)) | 1 : 1;
        int32_t s = (int32_t)random_bits(1, 5, (uint64_t)i);
        if (i / 9 % 2) n = -n;
        uint32_t low = (uint32_t)s & ((1u << shift) - 1);
        int64_t t = multiply(s, n, shift);
        wrong += fabs((double)t - ldexp((double)s * n, -shift)) > 0.5 || unmultiply(t, n, shift, low) != s ||
                 unmultiply(t + 1, n, shift, low) == s;
    }
    check(wrong == 0, "%d of 20000 products by n/2^m are wrong or do not come back", wrong);
}

// With how many threads, and under which policies: all six where something may differ by their number
typedef struct { int threads, first, last; } Tried;
enum { ALL_POLICIES = AUTO + 2 };  // auto keeps one step, half of them, all
#if defined(_OPENMP) && !defined(TWIN)
static const Tried tried[] = {{1, STORE, REVERSE}, {2, STORE, ALL_POLICIES}, {3, REVERSE, REVERSE}};
static const Tried *const tried_again = &tried[1];  // for conversions with other numbers
#else
static const Tried tried[] = {{1, STORE, ALL_POLICIES}};
static const Tried *const tried_again = &tried[0];
#endif
enum { TRIED = sizeof tried / sizeof tried[0] };

// Sets of networks: a bit for each, by its place in the table
enum {
    NONE = 0,
    EACH = (1 << (BDIA + 1)) - (1 << MIDPOINT),  // one of each mode but baseline
    MORE = (1 << NETWORKS) - (1 << MIDPOINT),    // and conversions with other numbers
    PAIR = 1 << MIDPOINT | 1 << HAMILTONIAN,     // whole blocks, and halves in turn
    LONG = PAIR | 1 << MIDPOINT_A | 1 << BDIA,   // besides, what keeps remainders and bits of so many layers
    LAST = 1 << HAMILTONIAN | 1 << RETROFIT | 1 << BDIA,  // beside a teacher
    SOME = 1 << MIDPOINT | 1 << MIDPOINT_A | 1 << HAMILTONIAN | 1 << RETROFIT | 1 << BDIA};

// Which networks run at which shape. Where activations are bf16, another shape may take its place.
typedef struct {
    const Shape *shape, *in_bf16;
    int taught_by;  // -1: by no teacher
    int float32, products, card, emulated;  // networks in float32; in bf16, of the CPU's products, of a card
} Comparison;
static const Comparison comparisons[] = {
    // shape  in_bf16  taught_by  float32  products  card  emulated
    {  &odd,     &odd,        -1,    MORE,     EACH, EACH,     EACH},
    { &deep,    &deep,        -1,    MORE,     EACH, EACH,     LONG},
    { &even,   &tiles,        -1,    EACH,     NONE, EACH,     PAIR},
    {  &cut,   &cut16,        -1,    EACH,     PAIR, EACH,     PAIR},
    {  &odd,     &odd,        KL,    SOME,     NONE, SOME,     SOME},
    {  &cut,   &cut16,        KL,    LAST,     NONE, LAST,     NONE},
    {&least,   &least,        -1,    EACH,     NONE, EACH,     EACH}};
enum { COMPARISONS = sizeof comparisons / sizeof comparisons[0] };

static int networks_of(const Comparison *c, int bf16) {
    int all = twin ? c->card : c->products;
    if (!bf16) all = c->float32;
    return slow ? all & c->emulated : all;
}

// What a step of a network gave first, for all other ways to the same
typedef struct { param_t *grads; double loss; } Reference;

// Whether nothing has been written behind a model's buffers. The emulated card sees to that itself.
static int within_buffers(const Model *m) {
    int outside = 0;
#ifndef TWIN
    for (const Buffer *b = m->buffers; b < m->buffers + m->buffer_count; b++) {
        unsigned char *p;
        memcpy(&p, b->at, sizeof p);
        for (int i = 0; i < GUARD; i++) outside += p[b->bytes + (size_t)i] != 0xA5;
    }
#endif
    (void)m;
    return outside == 0;
}

static void check_policy(Shape shape, int network, int memory, int threads, Reference *first) {
    Model m;
    double drift;
    char what[128];
    draws = 0;
    set_threads(threads);
    make_model(&m, shape, network, memory, 20);
    snprintf(what, sizeof what, "%s L=%d: --memory %s, %d steps kept, with %d threads", name_of(network),
             m.net.L, memory_names[m.memory], m.kept_steps, threads);
    size_t P = parameter_count(&m.net), bytes = P * sizeof(param_t);
    double loss = forward_backward(&m, 1, &drift);
    param_t *grads = (param_t *)malloc(bytes);
    to_host(grads, m.grads, bytes);
    if (!first->grads) {
        double norm = norm_of(&m);
        check(isfinite(norm) && norm > 1e-6 && stream_take_reach() < 32, "%s: the gradient's norm is %g",
              what, norm);
        first->grads = (param_t *)malloc(bytes);
        memcpy(first->grads, grads, bytes);
        first->loss = loss;
    }
    check(loss == first->loss && memcmp(first->grads, grads, bytes) == 0, "%s: other gradients", what);
    if (memory >= REVERSE) check(drift == 0, "%s: drift %g", what, drift);
    check(within_buffers(&m), "%s: writes behind a buffer", what);
    // the same batch again: what the first left in buffers must not matter
    if (taught_by >= 0 && threads == 1) {
        device_zero(m.grads, bytes);
        forward_backward(&m, 1, &drift);
        to_host(grads, m.grads, bytes);
        check(memcmp(first->grads, grads, bytes) == 0, "%s: a second pass has other gradients", what);
    }
    free(grads);
    model_free(&m);
}

// few: three policies stand for all, where it is slow
static void check_network(Shape shape, int network, int few) {
    Reference first = {NULL, 0};
    const Tried *begin = tried, *end = tried + TRIED;
    if (network > BDIA) begin = tried_again, end = tried_again + 1;
    for (const Tried *t = begin; t < end; t++)
        for (int memory = t->first; memory <= t->last; memory++) {
            if (few && memory != STORE && memory != REVERSE && memory != AUTO + 1) continue;
            check_policy(shape, network, memory, t->threads, &first);
        }
    free(first.grads);
}

// Baseline has two policies.
static void check_baseline(Shape shape, int threads) {
    Model m[2];
    real_t *grads[2];
    double drift;
    size_t P = 0;
    for (int memory = STORE; memory <= CHECKPOINT; memory++) {
        draws = 0;
        set_threads(memory == STORE ? 1 : threads);
        make_model(&m[memory], shape, BASELINE, memory, 0);
        forward_backward(&m[memory], 1, &drift);
        P = parameter_count(&m[memory].net);
        grads[memory] = from_device(m[memory].grads, P);
    }
    check(memcmp(grads[0], grads[1], P * sizeof(real_t)) == 0,
          "baseline: store and checkpoint differ with %d threads", threads);
    free(grads[0]), free(grads[1]);
    model_free(&m[0]), model_free(&m[1]);
}

// Gradients are the same bits under every policy, with any number of threads, and a second time.
static void test_policies(void) {
    for (int bf16 = 0; bf16 < 2; bf16++) {
        if (!layers_bf16(bf16)) continue;
        for (int i = 0; i < COMPARISONS; i++) {
            const Comparison *c = &comparisons[i];
            Shape shape = sizeof(act_t) == 2 ? *c->in_bf16 : *c->shape;
            if (slow && shape.L == deep.L) shape.chunk = 2;  // fewer kernels
            if (slow && c->taught_by >= 0) shape = small;
            taught_by = c->taught_by;
            for (int network = 0; network < NETWORKS; network++) {
                int few = slow && (i > 0 || (network != MIDPOINT && network != RETROFIT));
                if (networks_of(c, bf16) >> network & 1) check_network(shape, network, few);
            }
        }
        taught_by = -1;
        for (int i = 0; i < TRIED; i++) {
            check_baseline(odd, tried[i].threads);
            check_baseline(cut, tried[i].threads);
        }
        set_threads(2);
    }
    if (!layers_bf16(1)) printf("  this processor or build has no products of bf16: they are not tested\n");
    layers_bf16(0);
}

static int calls_of(const char *name) {
    for (Profile *p = profiles; p->name; p++)
        if (strcmp(p->name, name) == 0) return p->calls;
    return 0;
}

// How often an evaluation of the whole network computes attention, and normalizes, a chunk: forward, again if
// a step is not kept, and for gradients but where one is left from that
static void count_work(const Model *m, int *attentions, int *norms) {
    *attentions = *norms = 0;
    for (int k = 0; k < steps(&m->net); k++) {
        int kept = keeps_internals(m, k), evaluated = evaluations_of(&m->net, k);
        int halves = halves_of(&m->net, k) == BLOCK ? 2 : 1, estimates = 2 * (evaluated - 1);
        if (halves_of(&m->net, k) & ATTN) *attentions += evaluated * (kept ? 1 : 2);
        *norms += halves + estimates + (kept ? 0 : halves + estimates) + halves - !kept + estimates;
    }
}

// A step whose internals are kept is not evaluated again: dev/bench/profile.h counts the calls.
static void test_work(void) {
    for (int network = MIDPOINT; network < KINDS; network += slow ? RETROFIT - MIDPOINT : 1)
        for (int memory = STORE; memory <= AUTO + 2; memory++) {
            Model m;
            double drift;
            char what[128];
            const int chunks = 2;  // of 3 sequences, 2 a chunk
            int attentions, norms;
            make_model(&m, slow ? small : odd, network, memory, grid_of(network));
            snprintf(what, sizeof what, "%s, %s, %d steps kept", name_of(network), memory_names[m.memory],
                     m.kept_steps);
            memset(profiles, 0, sizeof profiles);
            profiling = 1;
            forward_backward(&m, 1, &drift);
            profile(NULL, 0, 0);
            profiling = 0;
            count_work(&m, &attentions, &norms);
            attentions *= chunks;
            norms = norms * chunks + (m.B * m.T + m.head_chunk - 1) / m.head_chunk;  // and the head's
            int normed = calls_of(norm_function()), attended = calls_of("attention_forward");
            int back = calls_of("attention_backward");
            check(normed == norms, "%s: %d layernorms, not %d", what, normed, norms);
            check(attended == attentions && back == chunks * evaluations(&m.net, steps(&m.net)) &&
                  calls_of("classifier") > 0, "%s: attention is computed %d times, not %d", what, attended,
                  attentions);
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
        for (size_t i = 0; i < P; i++) {
            difference += pow((double)g[1][i] - g[0][i], 2);
            norm += pow((double)g[0][i], 2);
        }
        check(difference > 0 && sqrt(difference / norm) < 0.05, "%s: gradients in bf16 are off by %g",
              name_of(mode), sqrt(difference / norm));
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
            make_model(&m, slow ? small : odd, mode, REVERSE, grid_of(mode));
            forward(&m);
            head(&m, 1.0 / (m.B * m.T));
            for (int k = steps(&m.net) - 1; k >= 0; k--) {
                if (k == steps(&m.net) / 2) flip(m.prev + 434, bit);
                step_back(&m, k);
            }
            drift = drift_of(&m);
            check(drift > 0, "%s: bit %d flipped in mid-backward went unnoticed", name_of(mode), bit);
            stream_take_reach();
            forward(&m);
            flip(m.cur + 77, bit);
            backward(&m, 1, &drift);
            check(stream_take_reach() == 32 || drift > 0,
                  "%s: bit %d flipped before the backward pass went unnoticed", name_of(mode), bit);
            // steps with alpha = 0: what they made, what they overwrote, and what comes from there
            if (m.kept_planes) {
                int last = steps(&m.net) - 1;
                while (!is_ordinary(&m.net, last)) last--;
                forward(&m);
                head(&m, 1.0 / (m.B * m.T));
                m.uncancelled = 0;
                for (int k = steps(&m.net) - 1; k >= 0; k--) {
                    if (k == last) flip(m.cur + 434, bit);
                    step_back(&m, k);
                }
                check(drift_of(&m) > 0, "%s: bit %d flipped where an ordinary step is undone went unnoticed",
                      name_of(mode), bit);
                stream_take_reach();
                forward(&m);
                flip(plane_of(&m, last - 1) + 99, bit);
                backward(&m, 1, &drift);
                check(stream_take_reach() == 32 || drift > 0, "%s: bit %d flipped in a kept plane went unnoticed",
                      name_of(mode), bit);
            }
            forward_backward(&m, 1, &drift);
            check(stream_take_reach() < 32 && drift == 0, "%s: a flipped bit is not forgotten by the next pass",
                  name_of(mode));
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

static void test_flipped_bit_ends(void) {
    char *argv[] = {self, (char *)"--flip", NULL};
    int status = run_itself(argv, 0, NULL);
    check(status == STATUS_NUMBERS && strstr(output, "did not come back"), "a flipped bit ended with %d: %s",
          status, output);
}

static void fill(param_t *p, size_t count, double value) {
    param_t *x = (param_t *)malloc(count * sizeof(param_t));
    for (size_t i = 0; i < count; i++) x[i] = (param_t)value;
    to_device(p, x, count * sizeof(param_t));
    free(x);
}

#ifdef REV_GPT2_BLOCK_TESTS
#include REV_GPT2_BLOCK_TESTS
#else
#define BLOCK_TESTS
#define BLOCK_DOUBLE_TESTS
static void set_block(Config *net) { (void)net; }
static int group_in(const Config *net, Shape s) { return (void)net, s.group; }
static double weights_of(Shape s) { return s.L > 50 ? 0.1 : 0.3; }
static const char *norm_function(void) { return "layernorm_forward"; }
static void spoil(Model *m, int kind) {
    Tensors w = tensors_at(&m->net, m->params, steps(&m->net) > m->net.L ? 0 : 2);
    size_t C = (size_t)m->net.C, words = (size_t)m->net.V * C;
    if (kind < 2) fill(w.fcprojb + 7, 1, kind ? NAN : 1e5);
    if (kind == 2) fill(w.wte + 65, 1, 1e5), fill(m->params + (size_t)m->net.Vp * C + 5, 1, 1e5);
    if (kind < 3) return;
    fill(m->params, words, 1500);
    fill(w.attprojb, C, 1500 / coefficients(&m->net, 0).gamma);
}
#endif

// A force that is NaN or too large, an embedding that is, and a sum of two values inside the range that
// leaves it.
static void test_range(void) {
    static const char *const what[] = {"a force of 1e5", "a force that is NaN", "an embedding of 1e5",
                                       "a sum of 1500 and more"};
    for (int mode = MIDPOINT; mode < KINDS; mode++)
        for (int kind = 0; kind < 4; kind++) {
            Model m;
            double drift;
            make_model(&m, slow ? small : odd, mode, REVERSE, 20);
            spoil(&m, kind);
            forward_backward(&m, 1, &drift);
            check(stream_take_reach() == 32 && stream_take_reach() == 0, "%s: %s went unnoticed", name_of(mode),
                  what[kind]);
            model_free(&m);
        }
}

// ---- memory

// What the allocators hand out is the plan.
static void test_plan(void) {
    for (int i = 0; i < 4 * NETWORKS; i++) {
        int network = i / 4, last = network == BASELINE ? CHECKPOINT : AUTO + 2;
        for (int memory = STORE; memory <= last; memory++) {
            Model m;
            size_t before = allocated;
            taught_by = i % 2 ? KL : -1;
            make_model(&m, i & 2 ? cut : odd, network, memory, network == BASELINE ? 0 : 20);
            taught_by = -1;
            check(allocated - before == plan_bytes(&m, TOTAL), "%s, %s: planned %zu bytes, allocated %zu",
                  name_of(network), memory_names[m.memory], plan_bytes(&m, TOTAL), allocated - before);
            // two states and their gradients; a step 0 whose p_1 has a plane of its own begins with one state;
            // a baseline has one of each, and one of its teacher
            int begins_in_one = memory < REVERSE || (networks[network].ordinary & 1);
            size_t plane = round256(4 * plane_size(&m)), states = begins_in_one ? 3 : 4;
            if (network == BASELINE) states = 2 + (size_t)m.has_teacher;
            size_t streams = states * plane + (m.remainders ? round256(2 * plane_size(&m)) : 0);
            check(plan_bytes(&m, STREAMS) == streams, "%s, %s: %zu bytes of streams, not %zu", name_of(network),
                  memory_names[m.memory], plan_bytes(&m, STREAMS), streams);
            model_free(&m);
        }
    }
}

// GPT-2 124M as a network, 64 sequences of 1024 tokens, default chunks, planned and not allocated
static Model large_model(int network) {
    Model m;
    memset(&m, 0, sizeof m);
    m.net.L = 12, m.net.C = 768, m.net.NH = 12, m.net.V = 50257, m.net.Vp = 50304, m.net.maxT = 1024;
    m.net.grid = 20;
    set_block(&m.net);
    m.B = 64, m.T = 1024, m.head_chunk = head_chunk_tokens, m.chunk = chunk_tokens / m.T, m.training = 1;
    set_network(&m.net, network);
    m.memory = REVERSE;
    for (int k = 0; k < 96 && network == MIDPOINT_A; k++) m.net.a[k] = 16;
    return m;
}

// Reversing, nothing but what is kept for ordinary steps and low bits depends on depth.
static void test_plan_of_depth(void) {
    for (int network = MIDPOINT; network < NETWORKS; network++) {
        Model m = large_model(network);
        m.net.L = 96, plan(&m);
        size_t kept96 = plan_bytes(&m, KEPT), activations96 = plan_bytes(&m, ACTIVATIONS);
        m.net.L = 12, plan(&m);
        size_t kept12 = plan_bytes(&m, KEPT), activations12 = plan_bytes(&m, ACTIVATIONS);
        size_t tokens = (size_t)m.B * (size_t)m.T, plane = tokens * 768;
        size_t ordinary = (size_t)(12 - converted_before(&m.net, 12)) * (size_t)converted(m.net.mode);
        size_t bits = plane / 8 * (size_t)m.net.shift * converted(m.net.mode);
        check(activations12 - kept12 == activations96 - kept96 &&
              kept12 == 4 * plane * ordinary + (12 - ordinary) * bits &&
              kept96 == 4 * plane * ordinary + (96 - ordinary) * bits,
              "%s: %zu bytes of activations at L=12, %zu at L=96; kept %zu and %zu", name_of(network),
              activations12, activations96, kept12, kept96);
        double most = (network == MIDPOINT_A ? 1.40 : 1.30) * (1 << 30);
        if (twin) most += (rounding > 0 ? 1.5 : 4.5) * (1 << 30);  // a GPU's chunks are larger
        check(converted(m.net.mode) || (double)activations12 <= most, "%s: %zu bytes of activations",
              name_of(network), activations12);
        m.memory = STORE, plan(&m), kept12 = plan_bytes(&m, KEPT);
        size_t of_channel = 14 * sizeof(act_t) + 2 * sizeof(stream_t);
        check(kept12 <= (size_t)evaluations_of(&m.net, 11) * tokens * 12 * 768 * of_channel,
              "%s: store keeps %zu bytes", name_of(network), kept12);
    }
}

// A long sequence costs little more than its streams; the rest is the same from some length on.
static void test_plan_of_length(void) {
    for (int network = MIDPOINT; network < NETWORKS; network++) {
        Model m = large_model(network);
        double activations[2], per_token;
        m.B = 1, m.chunk = 1;
        for (int i = 0; i < 2; i++) {
            m.T = (1 + i) * 16 * slice_tokens;
            choose_slices(&m);
            plan(&m);
            activations[i] = (double)plan_bytes(&m, ACTIVATIONS) - (double)plan_bytes(&m, KEPT);
        }
        per_token = (activations[1] - activations[0]) / (16 * slice_tokens) / m.net.C;
        double most = 28.0 + 2 * (network == MIDPOINT_A) + 8 * (m.net.mode == RETROFIT) * m.net.K;
        check(per_token > 16 && per_token <= most, "%s: %g C bytes a token, at most %g are meant",
              name_of(network), per_token, most);
    }
}

// A budget is used up to the last step that fits.
static void test_budget(void) {
    for (int network = MIDPOINT; network < NETWORKS; network++) {
        Model m = large_model(network);
        m.net.L = 96, m.memory = AUTO;
        int all = steps(&m.net);
        double least = plan_keeping(&m, 0), most = plan_keeping(&m, all);
        for (int share = 0; share <= 8; share++) {
            double budget = least + (most - least) / 8 * share;
            int enough = plan_within(&m, budget), kept = m.kept_steps;
            int more = kept < all && plan_keeping(&m, kept + 1) <= budget;
            int near = abs(kept - all * share / 8) <= 1 || evaluations_of(&m.net, kept) > 1;
            check(enough && plan_keeping(&m, kept) <= budget && !more && near,
                  "%s: a budget of %.0f bytes keeps %d steps", name_of(network), budget, kept);
            check(!plan_within(&m, least - 1) && m.kept_steps == 0,
                  "%s: a budget that is too small is enough",
                  name_of(network));
        }
    }
}

#if !defined(__SANITIZE_ADDRESS__) && !defined(TWIN)  // a sanitizer has its own memory, a GPU's is not this
#define HAS_RESIDENT_MEMORY
// Peak resident memory minus that at start is the plan. In a process of its own, since a peak never falls.
static int resident_matches_plan(int memory) {
    Shape s = {3, 256, 4, 512, 16, 512, 2, 512, 0, 0};  // a plane of 8 MiB
    Model m;
    double drift;
    long before = (long)device_peak_bytes();
    make_model(&m, s, MIDPOINT, memory, 20);
    forward_backward(&m, 1, &drift);
    update(&m, 1e-3, 0.9, 0.95, 0.1, 1);
    long planned = (long)plan_bytes(&m, TOTAL), off = (long)device_peak_bytes() - before - planned;
    if (labs(off) <= 4 << 20) return 0;
    fprintf(stderr, "resident memory is off its plan of %ld by %ld bytes\n", planned, off);
    return 1;
}

// What f returns, in a child: that of a program that has just begun, for exec hands the peak of what it
// replaces on, and a fork does not.
static int in_child(int (*f)(int), int argument) {
    int status;
    pid_t child = fork();
    if (child == 0) _exit(f(argument));
    waitpid(child, &status, 0);
    return WIFEXITED(status) ? WEXITSTATUS(status) : 99;
}

static void test_resident_memory(void) {
    for (int memory = STORE; memory <= AUTO + 2; memory++) {
        char number[16], *argv[] = {self, (char *)"--resident", number, NULL};
        snprintf(number, sizeof number, "%d", memory);
        check(run_itself(argv, 0, NULL) == 0, "--memory %s: %s", memory_names[smaller_of(memory, AUTO)],
              output);
    }
}
#endif

// ---- training

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
    check(fabs(learning_rate(0, 110) - 1 / 11.0) < 1e-12 && learning_rate(10, 110) == 1 &&
          fabs(learning_rate(60, 110) - 0.55) < 1e-12 && fabs(learning_rate(110, 110) - 0.1) < 1e-12,
          "the schedule is not nanoGPT's cosine");
    check(to_bf16(1.0f) == 0x3F80 && to_bf16(1.00390625f) == 0x3F80 && to_bf16(1.01171875f) == 0x3F82 &&
          from_bf16(0xC040) == -3.0f && to_bf16((float)NAN) == 0x7FC0, "bf16 is not rounded to nearest even");
}

// update: clips at norm 1, decays matrices and embeddings and nothing else, touches every tensor.
static void test_update(void) {
    Model m;
    size_t all[TENSORS], at = 0;
    make_model(&m, odd, MIDPOINT, REVERSE, 20);
    size_t P = tensor_sizes(&m.net, all);
    real_t *before = from_device(m.params, P), *after, first, last;
    device_zero(m.grads, P * sizeof(real_t));
    update(&m, 0.01, 0.9, 0.95, 0.5, 1);
    after = from_device(m.params, P);
    for (int t = 0; t < TENSORS; at += all[t++]) {
        const char *name = tensor_kinds[t].name;
        int matrix = name[strlen(name) - 1] != 'b' && strncmp(name, "ln", 2) != 0;
        double worst = 0, left = matrix ? 1 - 0.01 * 0.5 : 1;
        for (size_t i = at; i < at + all[t]; i++) worst = larger(worst, fabs(after[i] - before[i] * left));
        check(worst < 1e-6, "decay of %s is off by %g", name, worst);
    }
    for (size_t i = 0; i < P; i++) after[i] = 1;
    to_device(m.grads, after, P * sizeof(real_t));
    double norm = update(&m, 0, 0.9, 0.95, 0, 1);
    to_host(&first, m.m, sizeof first), to_host(&last, m.m + P - 1, sizeof last);
    check(fabs(norm - sqrt((double)P)) < 1e-3 && fabs(first - 0.1 / norm) < 1e-8 &&
          fabs(last - 0.1 / norm) < 1e-8, "the gradient is not clipped at norm 1");
    fill(m.grads + 5, 1, NAN);
    free(before), before = from_device(m.params, P);
    check(isnan(update(&m, 1, 0.9, 0.95, 1, 2)), "the norm of a gradient that is NaN");
    free(after), after = from_device(m.params, P);
    check(memcmp(before, after, P * sizeof(real_t)) == 0, "a gradient that is NaN changed the weights");
    free(before), free(after);
    model_free(&m);
}

#ifndef REV_GPT2_BLOCK
// What the embedding adds to the gradients of words comes to the same as what it adds to those of places:
// every token has one of each.
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
    check(most > 0 && worst < 1e-4 * most, "gradients of words are off those of places by %g of %g", worst,
          most);
    free(of_head), free(all);
    model_free(&m);
}
#endif

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
    check(worst < (1e-5 + rounding) * norm, "two micro-batches differ from one batch by %g of %g", worst,
          norm);
    model_free(&whole), model_free(&half);
}

// The gradient of a batch whose sequences end early, each elsewhere, is that of the sequences one by one, as
// long as each is, and so is its loss; and it is the same bits under every policy.
static void check_padding(Shape s, int network, int objective) {
    const int lengths[4] = {s.T, 0, s.T / 2 + 1, 1}, store = network == BASELINE;
    double drift, loss[2] = {0, 0}, worst = 0, most = 0, counted = 0;
    real_t *grads[3];
    for (int policy = 0; policy < 3 - store; policy++) {
        static const int policies[] = {STORE, CHECKPOINT, REVERSE};
        Model m;
        draws = 0;
        taught_by = objective == CROSS_ENTROPY ? -1 : objective;
        make_model(&m, s, network, policies[policy], grid_of(network));
        taught_by = -1;
        const size_t T = (size_t)s.T, N = (size_t)s.B * T, P = parameter_count(&m.net);
        int *inputs = (int *)malloc(2 * N * sizeof(int)), *targets = inputs + N;
        to_host(inputs, m.inputs, N * sizeof(int)), to_host(targets, m.targets, N * sizeof(int));
        counted = 0;
        for (int b = 0; b < s.B; counted += lengths[b++])
            for (int t = lengths[b]; t < s.T; t++) targets[b*s.T + t] = -1;
        set_batch(&m, inputs, targets);
        loss[0] = forward_backward(&m, (double)N / counted, &drift) * (double)N / counted;
        check(store || policies[policy] != REVERSE || drift == 0, "drift %g", drift);
        grads[policy] = from_device(m.grads, P);
        if (policy > 0)
            check(memcmp(grads[0], grads[policy], P * sizeof(real_t)) == 0, "%s: policies differ",
                  name_of(network));
        device_zero(m.grads, P * sizeof(real_t));
        for (int b = 0; b < s.B && policy == 2 - store; b++) {
            Model one = m;
            one.B = 1, one.T = lengths[b], one.chunk = 1;
            if (!one.T) continue;
            set_batch(&one, inputs + b*s.T, targets + b*s.T);
            loss[1] += forward_backward(&one, one.T / counted, &drift) * one.T / counted;
        }
        free(inputs);
        if (policy == 2 - store) {
            real_t *apart = from_device(m.grads, P);
            for (size_t i = 0; i < P; i++) {
                worst = larger(worst, fabs(grads[0][i] - apart[i]));
                most = larger(most, fabs(apart[i]));
            }
            free(apart);
        }
        model_free(&m);
    }
    check(fabs(loss[0] - loss[1]) < (1e-5 + rounding) * fabs(loss[1]), "%s: a loss of %g, not %g",
          name_of(network), loss[0], loss[1]);
    check(most > 0 && worst < (1e-5 + rounding) * most, "%s: padding changes gradients by %g of %g",
          name_of(network), worst, most);
    for (int policy = 0; policy < 3 - store; policy++) free(grads[policy]);
}
static void test_padding(void) {
    check_padding(even, BASELINE, CROSS_ENTROPY);
    check_padding(even, MIDPOINT, CROSS_ENTROPY);
    check_padding(even, HAMILTONIAN, CROSS_ENTROPY);
    check_padding(even, MIDPOINT, KL);
}

// ---- generation

// What generate prints
static char *generated(Model *m, const Tokenizer *z, const int *prompt, int given, int length, Sampler s) {
    capture();
    generate(m, z, prompt, given, length, s);
    return captured();
}

// The logits of a token whose past is in the cache are those of a whole forward pass, in every mode and
// however many came at once.
static void check_cache(int bf16) {
    if (!layers_bf16(bf16)) return;
    for (int mode = 0; mode < KINDS; mode++)
        for (int s = 0; s < 3; s++) {
            const Shape shapes[] = {odd, even, cut};
            Model m;
            make_model(&m, shapes[s], mode, mode == BASELINE ? STORE : REVERSE, grid_of(mode));
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
            check(worst < (bf16 ? 3e-2 : 1e-5) * fmax(1, largest), "%s: cached logits are off by %g of %g",
                  name_of(mode), worst, largest);
            free(whole), free(tokens);
            model_free(&m);
        }
    layers_bf16(0);
}

static void test_cache(void) {
    check_cache(0);
    check_cache(1);
}

static void test_drawing(void) {
    const float logits[5] = {0, 2, 1, -1, 0.5f}, ties[4] = {1, 3, 3, 2};
    static const struct { double temperature; int top_k; } cases[] = {
        {1, 0}, {0.5, 0}, {2, 3}, {1, 1}, {0, 0}, {1, 5}};
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        double p[5], sum = 0, worst = 0, t = cases[i].temperature;
        int counts[5] = {0}, draws = 20000, order[5] = {3, 0, 1, 4, 2};  // rank of each
        for (int v = 0; v < 5; v++) {
            int in = t > 0 && (cases[i].top_k == 0 || order[v] < cases[i].top_k);
            sum += p[v] = in ? exp(logits[v] / t) : t == 0 && v == 1;
        }
        for (int d = 0; d < draws; d++) counts[draw_among(logits, 5, t, cases[i].top_k, (d + 0.5) / draws)]++;
        for (int v = 0; v < 5; v++) worst = larger(worst, fabs(counts[v] / (double)draws - p[v] / sum));
        check(worst < 1e-3, "temperature %g, top-k %d: a token's share is off by %g",
              t, cases[i].top_k, worst);
    }
    for (int d = 0; d < 10; d++)
        check(draw_among(ties, 4, 1, 1, d / 10.0) == 1 && draw_among(ties, 4, 0, 0, d / 10.0) == 1,
              "of equals, not the first");
    int other = 0;
    for (int d = 0; d < 1000; d++)
        other += draw_token(logits, 5, d / 1000.0) != draw_among(logits, 5, 1, 0, d / 1000.0);
    check(other == 0, "at temperature 1, from all tokens, %d draws of 1000 are others", other);
}

// Greedy text is what whole forward passes would choose; it ends at an end of text; another series of draws
// is another text.
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
        check(worst <= (twin ? 0.1 : 0) && strcmp(next, " ") == 0,
              "%s: greedy text is %s, by %g not the likeliest", name_of(mode), text, worst);
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

// Samples in training are generate's, at temperature 1 from all tokens, however far the cache in the
// gradients reaches.
static void test_sample_step(void) {
    Job j;
    memset(&j, 0, sizeof j);
    make_model(&j.m, odd, MIDPOINT, REVERSE, 20);
    sampled = tokenizer_open(NULL, j.m.net.V);
    j.m.cache_tokens = 12, j.step = 3, j.run.seed = 5;
    Sampler s = {1, 0, 5, 3};
    int start = first_token(&sampled);
    capture();
    printf("--- sample after step 3\n");
    generate(&j.m, &sampled, &start, 1, 12, s);
    printf("\n---\n");
    char *text = captured();
    capture();
    samples_step(&j);
    char *again = captured();
    check(strlen(text) > 40 && strcmp(text, again) == 0, "a sample in training is %s, not %s", again, text);
    free(sampled.texts), free(text), free(again);
    model_free(&j.m);
}

// ---- what is run

enum { KERNELS, LAYERS, ALL };
static const Word words[] = {
    {"kernels", KERNELS}, {"layers", LAYERS}, {"short", ALL}, {"brief", ALL}, {NULL, 0}};

#ifndef TWIN
static const Test double_tests[] = {  // built with -DREAL=double
    {"layers against finite differences", "layer-gradients", test_layer_gradients, KERNELS},
    BLOCK_DOUBLE_TESTS
    {"networks against finite differences", "network-gradients", test_network_gradients, ALL},
    {NULL, NULL, NULL, 0}};
#endif

static const Test tests[] = {
    {"layers against their formulas", "matmul", test_matmul, KERNELS},
    {"layers against their formulas", "attention", test_attention, KERNELS},
    {"layers against their formulas", "long-query", test_long_query, KERNELS},
    {"layers against their formulas", "classifier", test_classifier, KERNELS},
    {"layers against their formulas", "distillation", test_distillation, KERNELS},
    {"layers against their formulas", "uncounted", test_uncounted, KERNELS},
    {"layers against their formulas", "pieces", test_pieces, KERNELS},
    {"layers against their formulas", "shards", test_shards, KERNELS},
#ifdef TWIN
    {"layers against their formulas", "ways", test_ways, KERNELS},
#endif
#ifndef TWIN
    {"layers against their formulas", "functions", test_functions, KERNELS},
#endif
    BLOCK_TESTS
    {"networks against one another", "conversion", test_conversion_is_near, KERNELS},
    {"networks against one another", "causality", test_causality, KERNELS},
    {"exactness", "multiplication", test_multiplication, LAYERS},
    {"exactness", "policies", test_policies, LAYERS},
    {"exactness", "work", test_work, LAYERS},
    {"exactness", "bf16", test_bf16_gradients, LAYERS},
    {"exactness", "flipped-bit", test_flipped_bit, ALL},
    {"exactness", "flipped-bit-ends", test_flipped_bit_ends, ALL},
    {"exactness", "range", test_range, ALL},
    {"memory", "plan", test_plan, ALL},
    {"memory", "plan-of-depth", test_plan_of_depth, ALL},
    {"memory", "plan-of-length", test_plan_of_length, ALL},
    {"memory", "budget", test_budget, ALL},
#ifdef HAS_RESIDENT_MEMORY
    {"memory", "resident", test_resident_memory, ALL},
#endif
    {"training", "optimizer", test_optimizer, LAYERS},
    {"training", "update", test_update, LAYERS},
#ifndef REV_GPT2_BLOCK
    {"training", "embedding", test_embedding, LAYERS},
#endif
    {"training", "accumulation", test_accumulation, LAYERS},
    {"training", "padding", test_padding, LAYERS},
    {"generation", "cache", test_cache, KERNELS},
    {"generation", "drawing", test_drawing, LAYERS},
    {"generation", "generate", test_generate, LAYERS},
    {"generation", "sample-step", test_sample_step, LAYERS},
    {NULL, NULL, NULL, 0}};

int main(int argc, char **argv) {
    if (argc > 1 && strcmp(argv[1], "--flip") == 0) return flipped_bit_ends();
#ifdef HAS_RESIDENT_MEMORY
    if (argc > 2 && strcmp(argv[1], "--resident") == 0) return in_child(resident_matches_plan, atoi(argv[2]));
#endif
    find_self(argv[0]);
    setvbuf(stdout, NULL, _IOLBF, 0);
    const Test *all = tests;
#ifndef TWIN
    if (sizeof(real_t) == sizeof(double)) all = double_tests;
#endif
    choose_tests(all, words, argc, argv);
    for (const Test *t = all; t->name; t++) {
        if (!chosen[t - all]) continue;
        draws = 0;  // a test has the same numbers whatever is run before it
        layers_bf16(0);
        run_test(t);
    }
    return report();
}
