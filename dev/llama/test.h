/*
test.h: what must hold of Llama's block besides what must of any. In test_rev_llama, test_rev_gpt2.c includes
it, and runs its own tests on networks of this block.
*/

// A shape's heads are those of keys; twice as many of queries read them, or four times, where an even number
// of channels is left for each. Nothing divides the MLP's width; the head of an odd vocabulary is not tied.
static void set_block(Config *net) {
    const int keys = net->NH == 4 ? 2 : net->NH, ratio = net->C % (4 * net->NH) == 0 ? 2 * net->NH / keys : 1;
    const float base = 50, epsilon = 1e-5f;  // so low a base turns all pairs in few tokens
    net->NH = ratio * keys;
    net->block[KEY_HEADS] = keys;
    net->block[HEAD_SIZE] = net->C / net->NH;
    net->block[FFN] = 5 * net->C / 2 + 3;
    net->block[TIED] = net->V % 2 == 0;
    memcpy(&net->block[ROTARY_BASE], &base, sizeof base);
    memcpy(&net->block[EPSILON], &epsilon, sizeof epsilon);
}
static int group_in(const Config *net, Shape s) { return s.group * net->NH / s.NH; }
static double weights_of(Shape s) { return s.L > 50 ? 0.1 : 0.2; }  // a product of two grows faster
static const char *norm_function(void) { return "rmsnorm_forward"; }

// A force of 1e5 and more, one that is NaN, an embedding of 1e5, and one of 1500 with a force as large. Where
// all normed values are 1, each row of weights is a sum.
static void spoil(Model *m, int kind) {
    const size_t C = (size_t)m->net.C, F = (size_t)m->net.block[FFN];
    Tensors w = tensors_at(&m->net, m->params, steps(&m->net) > m->net.L ? 0 : 2);
    if (kind == 0) fill(w.downw + 7 * F, F, 1e6), fill(w.gateupw, 2 * F * C, 1), fill(w.ln2w, C, 5);
    if (kind == 1) fill(w.downw + 7 * F, 1, NAN);
    if (kind == 2) fill(w.wte, (size_t)m->net.V * C, 1e5);
    if (kind < 3) return;
    fill(w.wte, (size_t)m->net.V * C, 1500);
    for (int l = 0; l < m->net.L; l++) {
        w = tensors_at(&m->net, m->params, l);
        fill(w.ln1w, C, 1);
        fill(w.qkvw, (size_t)sizes_of(&m->net).S * C, 1 / (double)C);
        fill(w.attprojw, C * C, 1500 / (double)C / coefficients(&m->net, 0).gamma);
    }
}

// ---- the layers by their formulas, in double precision

static double silu(double x) { return x / (1 + exp(-x)); }

static void test_rmsnorm(void) {
    enum { N = 70, C = 24 };
    const double epsilon = 1e-2;
    real_t *x = random_reals(N * C, 1), *add = random_reals(N * C, 1), *w = random_reals(C, 1);
    stream_t *s = (stream_t *)calloc(N * C, sizeof(stream_t));
    for (int i = 0; i < N * C; i++) s[i].fixed = (int32_t)(x[i] * (1 << 20));
    if (rounding > 0) round_to_bf16(add, N * C);
    layers_begin(on_device(NULL, layers_scratch_bytes(N, C, C, 1)));
    act_t *out = activations(NULL, N * C);
    for (int added = 0; added < 2; added++) {
        double worst = 0;
        rmsnorm_forward(out, (stream_t *)on_device(s, N * C * sizeof(stream_t)),
                        added ? activations(add, N * C) : NULL,
                        (param_t *)on_device(w, C * sizeof(param_t)), N, C, epsilon, 20);
        real_t *got = as_reals(out, N * C);
        for (int i = 0; i < N; i++) {
            double sum = 0, y[C];
            for (int c = 0; c < C; c++) {
                y[c] = ldexp(s[i*C + c].fixed, -20) + added * add[i*C + c];
                sum += y[c] * y[c];
            }
            for (int c = 0; c < C; c++)
                worst = larger(worst, fabs(y[c] * w[c] / sqrt(sum / C + epsilon) - got[i*C + c]));
        }
        check(worst < 1e-6 + rounding, "RMSNorm is off by %g", worst);
        free(got);
    }
    free(x), free(add), free(w), free(s);
    release();
}

// Two heads of three are turned, in rows of which more is not touched; turned back, they are what they were.
static void test_rotary(void) {
    enum { N = 14, T = 7, HS = 10, HEADS = 2, WIDTH = 37, FIRST = 1000 };
    real_t *x = random_reals(N * WIDTH, 1);
    if (rounding > 0) round_to_bf16(x, N * WIDTH);
    real_t *table = (real_t *)on_device(NULL, T * HS * sizeof(real_t));
    act_t *y = activations(x, N * WIDTH);
    double worst = 0, worst_back = 0;
    rotary_table(table, FIRST, T, HS, 10000);
    rotary_turn(y, table, N, T, HEADS, HS, WIDTH, +1);
    real_t *got = as_reals(y, N * WIDTH);
    rotary_turn(y, table, N, T, HEADS, HS, WIDTH, -1);
    real_t *back = as_reals(y, N * WIDTH);
    for (int i = 0; i < N * WIDTH; i++) {
        int column = i % WIDTH, pair = column % HS % (HS / 2), second = column % HS >= HS / 2;
        double angle = (FIRST + i / WIDTH % T) * pow(10000, -2.0 * pair / HS), want = x[i];
        double other = x[second ? i - HS / 2 : i + HS / 2];
        if (column < HEADS * HS) want = x[i] * cos(angle) + (second ? 1 : -1) * other * sin(angle);
        worst = larger(worst, fabs(want - got[i]));
        worst_back = larger(worst_back, fabs(x[i] - back[i]));
    }
    check(worst < 1e-6 + rounding && worst_back < 1e-6 + 2 * rounding, "turning is off by %g, and back by %g",
          worst, worst_back);
    free(x), free(got), free(back);
    release();
}

static void test_swiglu(void) {
    enum { N = 9, F = 37 };
    real_t *x = random_reals(N * 2*F, 4), *dy = random_reals(N * F, 1);
    double worst = 0, worst_back = 0;
    x[0] = -200, x[1] = 20, x[2] = -30;
    if (rounding > 0) round_to_bf16(x, N * 2*F), round_to_bf16(dy, N * F);
    act_t *gateup = activations(x, N * 2*F), *act = activations(NULL, N * F);
    swiglu_forward(act, gateup, N, F);
    swiglu_backward(gateup, activations(dy, N * F), N, F);
    real_t *got = as_reals(act, N * F), *back = as_reals(gateup, N * 2*F);
    for (int i = 0; i < N * F; i++) {
        int at = i / F * 2*F + i % F;
        double g = x[at], up = x[at + F], s = 1 / (1 + exp(-g)), slope = s * (1 + g * (1 - s));
        worst = larger(worst, off(silu(g) * up, got[i]));
        worst_back = larger(worst_back, larger(off(dy[i] * up * slope, back[at]),
                                               off(dy[i] * silu(g), back[at + F])));
    }
    check(worst < 4e-6 + rounding && worst_back < 4e-6 + rounding, "SwiGLU is off by %g, its gradient by %g",
          worst, worst_back);
    free(x), free(dy), free(got), free(back);
    release();
}

// Attention knows places as distances alone: a pass that begins 321 places further on gives the same.
static void test_distances(void) {
    Model m;
    double worst = 0;
    make_model(&m, even, BASELINE, STORE, 0);
    const size_t bytes = plane_size(&m) * sizeof(stream_t);
    real_t *here = (real_t *)malloc(2 * bytes), *there = here + plane_size(&m);
    forward(&m);
    to_host(here, m.cur, bytes);
    const Sizes s = sizes_of(&m.net);
    rotary_table(angles_of(&m), 321, m.T, s.HS, (double)float_of(m.net.block[ROTARY_BASE]));
    stand_at(&m, 0);
    stream_embed(m.prev, m.cur, m.inputs, m.params, NULL, m.B * m.T, m.T, s.C, 0);
    for (int k = 0; k < steps(&m.net); k++) {
        for (Chunk c = chunk_at(&m, k, 0); c.tokens > 0; c = chunk_after(&m, k, c)) {
            force_forward(&m, k, m.cur + c.at, c);
            move_stream(&m, k, c, m.next, m.prev, +1);
        }
        stand_at(&m, k + 1);
    }
    to_host(there, m.cur, bytes);
    for (size_t i = 0; i < plane_size(&m); i++) worst = larger(worst, fabs(here[i] - there[i]));
    check(worst < 1e-4 + 10 * rounding, "321 places further on states are others, by %g", worst);
    free(here);
    model_free(&m);
}

#define BLOCK_TESTS \
    {"layers against their formulas", "rmsnorm", test_rmsnorm, KERNELS}, \
    {"layers against their formulas", "rotary", test_rotary, KERNELS}, \
    {"layers against their formulas", "swiglu", test_swiglu, KERNELS}, \
    {"networks against one another", "distances", test_distances, KERNELS},
#define BLOCK_DOUBLE_TESTS BLOCK_TESTS
