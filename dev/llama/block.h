/*
block.h: Llama's block in the place of GPT-2's. `make llama` builds train_rev_gpt2.c with
-DREV_GPT2_BLOCK='"dev/llama/block.h"', which includes this file where GPT-2's block stands, and once more,
with REV_GPT2_BLOCK_LAYERS, behind the layers of either twin, for what the block has of its own.

The block is F(p) = attn + mlp with attn = Attn(RMSNorm(p)), mlp = MLP(RMSNorm(p + attn)), without biases:

    RMSNorm(x) = w x / sqrt(mean of x^2 + epsilon)
    Attn       NH heads of queries read KH heads of keys and values, NH/KH neighbours each one of them. In a
               head of queries or keys at place t, channels i and i + HS/2 turn by t base^(-2i/HS): no places
               are learnt
    MLP(x)     = down (silu(gate x) * (up x)), silu(g) = g / (1 + exp(-g))

Forward, with the numbers of a token in parentheses; what is kept, if a step's internals are, has a *:

    p -> normed (C) -> * qkv ((NH + 2 KH) HS), turned in place -> * atty (C), * lse (NH) -> attn (C)
    p + attn -> normed (C) -> * gateup (2F): gate, then up -> act (F) -> mlp (C)

Back, gradients go the other way, and normed comes again from p. act comes again from gateup, an exponential a
number, and is not kept: that makes the MLP's internals smaller by a third. The gradient of gateup takes the
place of gateup, which nothing reads after that. m->wide holds what is of one slice or one group of heads: act
and its gradient, or the gradient of qkv; and before these the cosines and sines of all places, made when a
pass begins.

A group of heads is whole key heads with all their queries: attention's task owns a key head with the queries
that read it, so that no two meet in its gradient.
*/
#ifndef REV_GPT2_BLOCK_LAYERS

// ---- what a network has besides: the places in Config's block, and of slots 240 and on of model files

enum { KEY_HEADS, FFN, ROTARY_BASE, EPSILON, TIED, HEAD_SIZE };  // bits of a float32: ROTARY_BASE, EPSILON

static float float_of(int bits) {
    float f;
    memcpy(&f, &bits, sizeof f);
    return f;
}

// The sizes of a block; S: the width of qkv
typedef struct { int C, NH, KH, HS, F, S; } Sizes;
static Sizes sizes_of(const Config *net) {
    int KH = net->block[KEY_HEADS], HS = net->block[HEAD_SIZE];
    Sizes s = {net->C, net->NH, KH, HS, net->block[FFN], (net->NH + 2*KH) * HS};
    return s;
}
static double epsilon_of(const Config *net) { return (double)float_of(net->block[EPSILON]); }

// ---- the block's own layers, for the CPU and the GPU at the end of this file

// out (n, C) = RMSNorm(s + add), straight from a stream; add may be NULL
void rmsnorm_forward(act_t *out, const stream_t *s, const act_t *add, const param_t *weight, int n, int C,
                     double epsilon, int grid);
// the gradient in s + add is added to ds (n, C), and to dadd if given; dweight (C) +=
void rmsnorm_backward(real_t *ds, act_t *dadd, real_t *dweight, const act_t *dout, const stream_t *s,
                      const act_t *add, const param_t *weight, int n, int C, double epsilon, int grid);
// table (n, HS): of places first, first + 1, ... the cosines of the angles of a head's pairs, and their sines
void rotary_table(real_t *table, int first, int n, int HS, double base);
// turns the first `heads` heads of each row of x (n, width) by its angles, or back (direction -1): row i has
// those of row i % T of the table
void rotary_turn(act_t *x, const real_t *table, int n, int T, int heads, int HS, int width, int direction);
// act (n, F) = silu(gate) * up, which are the halves of each row of gateup (n, 2F)
void swiglu_forward(act_t *act, const act_t *gateup, int n, int F);
// gateup becomes its gradient, given that in act
void swiglu_backward(act_t *gateup, const act_t *dact, int n, int F);

// ---- nine tensors, in the order of model files

typedef struct {
    param_t *wte;       // (Vp, C)
    param_t *ln1w;      // (L, C)
    param_t *qkvw;      // (L, S, C): rows of queries, keys, values
    param_t *attprojw;  // (L, C, C)
    param_t *ln2w;      // (L, C)
    param_t *gateupw;   // (L, 2F, C)
    param_t *downw;     // (L, C, F)
    param_t *lnfw;      // (C)
    param_t *headw;     // (Vp, C), or wte, if they are tied
} Tensors;

enum { TENSORS = 9 };
enum { GAIN, BIAS, MATRIX, PROJECTION, VOCABULARY };  // PROJECTION: into the streams; VOCABULARY: of Vp rows
static const struct { const char *name; int kind, stacked; } tensor_kinds[TENSORS] = {  // stacked over layers
    {"wte", VOCABULARY, 0}, {"ln1w", GAIN, 1}, {"qkvw", MATRIX, 1}, {"attprojw", PROJECTION, 1},
    {"ln2w", GAIN, 1}, {"gateupw", MATRIX, 1}, {"downw", PROJECTION, 1}, {"lnfw", GAIN, 0},
    {"headw", VOCABULARY, 0}};

// The elements of each tensor, in all layers. Returns their sum.
static size_t tensor_sizes(const Config *net, size_t all[TENSORS]) {
    const Sizes s = sizes_of(net);
    size_t C = s.C, F = s.F, S = s.S, words = (size_t)net->Vp * C, total = 0;
    const size_t one[TENSORS] = {words, C, S*C, C*C, C, 2*F*C, C*F, C, net->block[TIED] ? 0 : words};
    for (int i = 0; i < TENSORS; i++) {
        all[i] = one[i];
        if (tensor_kinds[i].stacked) all[i] *= net->L;
        total += all[i];
    }
    return total;
}

static size_t parameter_count(const Config *net) {
    size_t all[TENSORS];
    return tensor_sizes(net, all);
}

// Where the tensors of layer l begin in a buffer of all.
static Tensors tensors_at(const Config *net, param_t *buffer, int l) {
    size_t all[TENSORS];
    Tensors t;
    param_t **at[TENSORS] = {&t.wte, &t.ln1w, &t.qkvw, &t.attprojw, &t.ln2w, &t.gateupw, &t.downw, &t.lnfw,
                             &t.headw};
    tensor_sizes(net, all);
    for (int i = 0; i < TENSORS; i++) {
        *at[i] = buffer;
        if (tensor_kinds[i].stacked) *at[i] += all[i] / net->L * l;
        buffer += all[i];
    }
    if (net->block[TIED]) t.headw = t.wte;
    return t;
}

// ---- internals

static size_t cache_width(const Config *net) { return sizes_of(net).S; }

// How many heads attention takes at a time: key heads with all their queries
static int heads_taken(const Model *m) {
    const Sizes s = sizes_of(&m->net);
    int queries = s.NH / s.KH;
    return (group_of(m) + queries - 1) / queries * queries;
}

// The width of qkv of so many heads of queries and their keys and values
static size_t qkv_width(const Config *net, int heads) {
    const Sizes s = sizes_of(net);
    return (size_t)(heads + 2*heads / (s.NH / s.KH)) * s.HS;
}

typedef struct {
    act_t *qkv;     // (n, S), or of a group of heads; if kept, one group's behind another's
    act_t *atty;    // (n, C), what the heads have gathered
    real_t *lse;    // (sequences, NH, T)
    act_t *gateup;  // (tokens, 2F)
} Internals;
enum { INTERNALS = 4 };

// Internals' bytes one by one, for n tokens and the halves that a step has; of a slice and a group of heads,
// unless all are kept. Returns the sum; bytes may be NULL.
static size_t internals_bytes(const Model *m, int halves, size_t n, int kept, size_t bytes[INTERNALS]) {
    const Sizes s = sizes_of(&m->net);
    size_t attn = (halves & ATTN) != 0, mlp = (halves & MLP) != 0, slice = n, total = 0;
    size_t width = qkv_width(&m->net, kept ? s.NH : heads_taken(m));
    if (!kept) slice = slice_of(m, (int)n);
    if (m->cache) width = 0;  // its qkv are there
    const size_t unpadded[INTERNALS] = {
        attn * n * width * sizeof(act_t), attn * n * s.C * sizeof(act_t),
        attn * n * s.NH * sizeof(real_t), mlp * slice * 2 * s.F * sizeof(act_t)};
    for (int i = 0; i < INTERNALS; i++) {
        if (bytes) bytes[i] = round256(unpadded[i]);
        total += round256(unpadded[i]);
    }
    return total;
}

static Internals internals_of(const Model *m, Chunk c) {
    size_t bytes[INTERNALS], before = c.kept ? (size_t)c.from * 2 * m->net.block[FFN] : 0;
    char *at = c.internals;
    int halves = 0;
    Internals a;
    if (c.attn) halves |= ATTN;
    if (c.mlp) halves |= MLP;
    internals_bytes(m, halves, (size_t)c.sequences * m->T, c.kept, bytes);
    a.qkv = (act_t *)at;
    a.atty = (act_t *)(at += bytes[0]);
    a.lse = (real_t *)(at += bytes[1]);
    a.gateup = (act_t *)(at += bytes[2]) + before;
    if (c.cache) a.qkv = c.cache + m->past * cache_width(&m->net);
    return a;
}

// ---- m->wide: the angles of a chunk's tokens, then what is as large as a slice or a group of heads

static size_t angles_size(const Config *net, size_t n) {
    return round256(n * net->block[HEAD_SIZE] * sizeof(real_t)) / sizeof(act_t);
}
static real_t *angles_of(const Model *m) { return (real_t *)(void *)m->wide; }
static act_t *wide_of(const Model *m) {
    return m->wide + angles_size(&m->net, (size_t)smaller_of(m->chunk, m->B) * m->T);
}
static size_t wide_size(const Model *m, size_t n) {
    size_t back = m->training != 0, slice = slice_of(m, (int)n);
    size_t mlp = (1 + back) * slice * m->net.block[FFN];
    return angles_size(&m->net, n) + larger_of(mlp, back * n * qkv_width(&m->net, heads_taken(m)));
}

static size_t block_scratch_bytes(const Config *net, int n) {
    const Sizes s = sizes_of(net);
    size_t into = layers_scratch_bytes(n, s.C, 2 * s.F, s.NH), out = layers_scratch_bytes(n, s.F, s.C, 0);
    return larger_of(larger_of(into, out), layers_scratch_bytes(n, s.C, s.S, 0));
}

// ---- attention: a group of heads at a time, and what goes in and out of it a slice of tokens

typedef struct {
    int heads, keys;  // how many of queries, and of keys
    int first;        // of the heads
    int width;        // of a row of qkv
    act_t *qkv;       // (n, width), their queries, keys and values
} Group;

static Group group_at(const Model *m, Chunk c, int h) {
    const Sizes s = sizes_of(&m->net);
    int heads = smaller_of(heads_taken(m), s.NH - h);
    Group g = {heads, heads / (s.NH / s.KH), h, (int)qkv_width(&m->net, heads), internals_of(m, c).qkv};
    if (c.kept) g.qkv += c.tokens * qkv_width(&m->net, h);
    return g;
}

// A group's queries, keys and values are three stretches of rows of qkvw, but one if it has all heads.
typedef struct { size_t row; int rows, column; } Stretch;  // its first row, how many, and the column of qkv
static int stretches_of(const Model *m, Group g) { return g.heads == m->net.NH ? 1 : 3; }
static Stretch stretch_at(const Model *m, Group g, int j) {
    const Sizes s = sizes_of(&m->net);
    int key = g.first / (s.NH / s.KH);
    const Stretch all = {0, g.width, 0};
    const Stretch parts[3] = {
        {(size_t)(g.first * s.HS), g.heads * s.HS, 0},
        {(size_t)((s.NH + key) * s.HS), g.keys * s.HS, g.heads * s.HS},
        {(size_t)((s.NH + s.KH + key) * s.HS), g.keys * s.HS, (g.heads + g.keys) * s.HS}};
    return stretches_of(m, g) == 1 ? all : parts[j];
}

// g.qkv = RMSNorm(p) qkvw^T, of the group's rows of it, then turned
static void qkv_forward(Model *m, int l, const stream_t *p, Chunk c, Group g) {
    const Config *net = &m->net;
    const Tensors w = tensors_at(net, m->params, l);
    int n = c.tokens, slice = slice_of(m, n);
    size_t C = net->C;
    for (int i = 0; i < n; i += slice) {
        int tokens = smaller_of(slice, n - i);
        act_t *qkv = g.qkv + (size_t)i * g.width;
        rmsnorm_forward(m->normed, p + i * C, NULL, w.ln1w, tokens, net->C, epsilon_of(net),
                        net->grid);
        for (int j = 0; j < stretches_of(m, g); j++) {
            const Stretch s = stretch_at(m, g, j);
            matmul_forward(qkv + s.column, m->normed, w.qkvw + s.row * C, NULL, tokens, net->C, s.rows,
                           g.width);
        }
    }
    rotary_turn(g.qkv, angles_of(m), n, m->T, g.heads + g.keys, net->block[HEAD_SIZE], g.width, +1);
}

// From dqkv in m->wide, which is turned back, through RMSNorm to dp. Its backward pass is linear in its
// gradient: it takes what each stretch gives it.
static void qkv_backward(Model *m, int l, const stream_t *p, real_t *dp, Chunk c, Group g) {
    const Config *net = &m->net;
    const Tensors w = tensors_at(net, m->params, l), d = tensors_at(net, m->grads, l);
    int n = c.tokens, slice = slice_of(m, n);
    size_t C = net->C;
    double epsilon = epsilon_of(net);
    rotary_turn(wide_of(m), angles_of(m), n, m->T, g.heads + g.keys, net->block[HEAD_SIZE], g.width, -1);
    for (int i = 0; i < n; i += slice) {
        int tokens = smaller_of(slice, n - i);
        const act_t *dqkv = wide_of(m) + (size_t)i * g.width;
        const stream_t *from = p + i * C;
        real_t *to = dp + i * C;
        if (!c.fresh) rmsnorm_forward(m->normed, from, NULL, w.ln1w, tokens, net->C, epsilon, net->grid);
        for (int j = 0; j < stretches_of(m, g); j++) {
            const Stretch s = stretch_at(m, g, j);
            matmul_backward(m->out, d.qkvw + s.row * C, NULL, dqkv + s.column, m->normed, w.qkvw + s.row * C,
                            NULL, tokens, net->C, s.rows, g.width);
            rmsnorm_backward(to, NULL, d.ln1w, m->out, from, NULL, w.ln1w, tokens, net->C, epsilon,
                             net->grid);
        }
    }
}

// dattn attprojw, the gradient in atty. It goes to c.attn, which is read no more: where there are slices, the
// gradient in attn is there too.
static act_t *atty_backward(Model *m, int l, Chunk c) {
    const Tensors w = tensors_at(&m->net, m->params, l), d = tensors_at(&m->net, m->grads, l);
    const act_t *atty = internals_of(m, c).atty;
    int C = m->net.C, n = c.tokens, slice = slice_of(m, n);
    for (int i = 0; i < n; i += slice) {
        int tokens = smaller_of(slice, n - i);
        size_t at = (size_t)i * C, bytes = (size_t)tokens * C * sizeof(act_t);
        const act_t *dattn = slice < n ? c.attn + at : m->dforce;
        act_t *to = slice < n ? m->out : c.attn;
        matmul_backward(to, d.attprojw, NULL, dattn, atty + at, w.attprojw, NULL, tokens, C, C, C);
        if (slice < n) device_copy(c.attn + at, to, bytes);
    }
    return c.attn;
}

static void attention_half_forward(Model *m, int l, const stream_t *p, Chunk c) {
    const Tensors w = tensors_at(&m->net, m->params, l);
    const Sizes s = sizes_of(&m->net);
    const Internals a = internals_of(m, c);
    for (int h = 0; h < s.NH; h += heads_taken(m)) {
        const Group g = group_at(m, c, h);
        act_t *out = a.atty + h * s.HS;
        real_t *lse = a.lse + (size_t)h * m->T;
        qkv_forward(m, l, p, c, g);
        if (m->past) attention_query(a.atty, c.cache, m->past, s.C, s.NH, s.KH);
        else attention_forward(out, lse, g.qkv, c.sequences, m->T, s.C, s.NH, s.KH, g.heads);
    }
    matmul_forward(c.attn, a.atty, w.attprojw, NULL, c.tokens, s.C, s.C, s.C);
}

static void attention_half_backward(Model *m, int l, const stream_t *p, real_t *dp, Chunk c) {
    const Sizes s = sizes_of(&m->net);
    const Internals a = internals_of(m, c);
    act_t *datty = atty_backward(m, l, c);
    int last = (s.NH - 1) / heads_taken(m) * heads_taken(m);
    for (int h = last; h >= 0; h -= heads_taken(m)) {  // the last group's qkv is still there
        const Group g = group_at(m, c, h);
        const act_t *dout = datty + h * s.HS, *out = a.atty + h * s.HS;
        const real_t *lse = a.lse + (size_t)h * m->T;
        if (h < last && !c.kept) qkv_forward(m, l, p, c, g);
        attention_backward(wide_of(m), dout, g.qkv, out, lse, c.sequences, m->T, s.C, s.NH, s.KH, g.heads);
        qkv_backward(m, l, p, dp, c, g);
    }
}

// ---- the MLP

static void mlp_half_forward(Model *m, int l, const stream_t *p, Chunk c) {
    const Config *net = &m->net;
    const Tensors w = tensors_at(net, m->params, l);
    const Internals a = internals_of(m, c);
    int C = net->C, F = net->block[FFN], n = c.tokens;
    act_t *act = wide_of(m);
    rmsnorm_forward(m->normed, p, c.attn, w.ln2w, n, C, epsilon_of(net), net->grid);
    matmul_forward(a.gateup, m->normed, w.gateupw, NULL, n, C, 2*F, 2*F);
    swiglu_forward(act, a.gateup, n, F);
    matmul_forward(c.mlp, act, w.downw, NULL, n, F, C, C);
}

// In a block, attn is a part of the force, and RMSNorm reads it as well: that gradient is added to m->dforce.
static void mlp_half_backward(Model *m, int l, const stream_t *p, real_t *dp, Chunk c) {
    const Config *net = &m->net;
    const Tensors w = tensors_at(net, m->params, l), d = tensors_at(net, m->grads, l);
    const Internals a = internals_of(m, c);
    int C = net->C, F = net->block[FFN], n = c.tokens;
    double epsilon = epsilon_of(net);
    act_t *act = wide_of(m), *dact = act + (size_t)n * F;
    act_t *dgateup = a.gateup, *dnormed = m->out, *dattn = c.attn ? m->dforce : NULL;
    if (!c.fresh) swiglu_forward(act, a.gateup, n, F);
    matmul_backward(dact, d.downw, NULL, m->dforce, act, w.downw, NULL, n, F, C, C);
    swiglu_backward(dgateup, dact, n, F);
    if (!c.fresh) rmsnorm_forward(m->normed, p, c.attn, w.ln2w, n, C, epsilon, net->grid);
    matmul_backward(dnormed, d.gateupw, NULL, dgateup, m->normed, w.gateupw, NULL, n, C, 2*F, 2*F);
    rmsnorm_backward(dp, dattn, d.ln2w, dnormed, p, c.attn, w.ln2w, n, C, epsilon, net->grid);
}

// ---- what stands before the first block, and behind the last

static void embed(const Model *m, stream_t *prev, stream_t *cur) {
    const Config *net = &m->net;
    const Tensors w = tensors_at(net, m->params, 0);
    double base = (double)float_of(net->block[ROTARY_BASE]);
    rotary_table(angles_of(m), m->past, m->T, net->block[HEAD_SIZE], base);
    stream_embed(prev, cur, m->inputs, w.wte, NULL, m->B * m->T, m->T, net->C, net->grid);
}

static void embed_adjoint(const Model *m) {
    const Tensors d = tensors_at(&m->net, m->grads, 0);
    const real_t *other = m->dprev == m->dcur ? NULL : m->dprev;
    embed_backward(d.wte, NULL, m->dcur, other, m->inputs, m->order, m->B * m->T, m->T, m->net.C);
}

// m->logits of n tokens from the i-th of the batch (2.3); n is at most head_chunk.
static void head_logits(Model *m, int i, int n) {
    const Config *net = &m->net;
    const Tensors w = tensors_at(net, m->params, 0);
    const stream_t *p = m->cur + (size_t)i * net->C;
    rmsnorm_forward(m->head_normed, p, NULL, w.lnfw, n, net->C, epsilon_of(net), net->grid);
    matmul_forward(m->logits, m->head_normed, w.headw, NULL, n, net->C, net->Vp, net->Vp);
}

// From the gradient in m->logits to m->dcur, and to the weights
static void head_backward(Model *m, int i, int n) {
    const Config *net = &m->net;
    const Tensors w = tensors_at(net, m->params, 0), d = tensors_at(net, m->grads, 0);
    size_t at = (size_t)i * net->C;
    matmul_backward(m->head_dnormed, d.headw, NULL, m->logits, m->head_normed, w.headw, NULL, n, net->C,
                    net->Vp, net->Vp);
    rmsnorm_backward(m->dcur + at, NULL, d.lnfw, m->head_dnormed, m->cur + at, NULL, w.lnfw, n, net->C,
                     epsilon_of(net), net->grid);
}

// ---- flops a token of the halves given, forward or back: a causal product of attention is C T / 2
// multiply-adds, of which there are two forward and five back

static double block_flops(const Config *net, int T, int halves, int back) {
    const Sizes s = sizes_of(net);
    double C = net->C, products = 0, attention = 0;
    if (halves & ATTN) {
        products += 2 * C * (s.S + C);
        attention = C * T;
    }
    if (halves & MLP) products += 6 * C * s.F;
    return back ? 2 * products + 5 * attention : products + 2 * attention;
}
// What the adjoint of attention makes again: the qkv of all groups but the last
static double group_flops(const Model *m) {
    int last = (m->net.NH - 1) / heads_taken(m) * heads_taken(m);
    return 2.0 * m->net.C * (double)qkv_width(&m->net, last);
}
static double head_flops(const Config *net) { return 2.0 * net->C * net->Vp; }

// ---- sizes, flags and files

enum { BLOCK_KIND = 1 };  // slot 14 of model files
#define BLOCK_NAME "llama"
#define BLOCK_SIZES "l135m l360m l1100m l1700m"  // what -e names: SmolLM2 and TinyLlama
#define BLOCK_DEFAULT "l135m"
// as float32: 100000, 130000 and 10000, and 1e-5
enum { BASE_100000 = 0x47C35000, BASE_130000 = 0x47FDE800, BASE_10000 = 0x461C4000, EPSILON_5 = 0x3727C5AC };
static const struct { const char *name; int sizes[5], block[6]; } block_sizes[] = {
    // context     V   L  NH     C         KH     F  base         epsilon    tied  HS
    {"l135m",  {2048, 49152, 30,  9,  576}, { 3, 1536, BASE_100000, EPSILON_5, 1, 64}},
    {"l360m",  {2048, 49152, 32, 15,  960}, { 5, 2560, BASE_100000, EPSILON_5, 1, 64}},
    {"l1100m", {2048, 32000, 22, 32, 2048}, { 4, 5632, BASE_10000,  EPSILON_5, 0, 64}},
    {"l1700m", {2048, 49152, 24, 32, 2048}, {32, 8192, BASE_130000, EPSILON_5, 1, 64}}};

static struct { int key_heads, ffn; } block_opt;
#define BLOCK_OPTIONS \
    {"--key-heads", INTEGER, &block_opt.key_heads, "0", 1, 65536, \
     "from scratch: heads of keys and values; 0: as -e says, in proportion to --heads"}, \
    {"--ffn", INTEGER, &block_opt.ffn, "0", 1, 1 << 20, \
     "from scratch: the MLP's width; 0: as -e says, in proportion to --channels"},

// Sets what flags say, where --heads or --channels may have made `was` a network of another shape.
static void block_flags(Config *net, const Config *was) {
    int *keys = &net->block[KEY_HEADS], *ffn = &net->block[FFN];
    *keys = (int)larger_of(1, (size_t)*keys * net->NH / was->NH);
    *ffn = (int)larger_of(1, (size_t)*ffn * net->C / was->C);
    while (net->NH % *keys != 0) --*keys;
    if (block_opt.key_heads) *keys = block_opt.key_heads;
    if (block_opt.ffn) *ffn = block_opt.ffn;
    net->block[HEAD_SIZE] = net->C / net->NH;
    if (net->NH % *keys != 0)
        die(STATUS_USAGE, "--key-heads %d: --heads %d is no multiple of it", *keys, net->NH);
    if (net->C % net->NH == 0 && net->block[HEAD_SIZE] % 2 != 0) die(STATUS_USAGE, "--channels %d: heads of "
        "%d channels, an odd number, which have to be pairs", net->C, net->block[HEAD_SIZE]);
}

static int checked(const char *path, const char *what, int value, int least, int most);  // Part IV

// The block's fields of a model file
static void block_read(Config *net, const int32_t header[256], const char *path) {
    int *block = net->block;
    memcpy(block, &header[240], sizeof net->block);
    checked(path, "version", header[1], 1003, 1005);
    if (net->mode == BASELINE && net->grid)
        die(STATUS_DATA, "%s: its grid is %d; a baseline has none", path, net->grid);
    if (net->mode == MIDPOINT_A) checked(path, "number of layers", net->L, 1, 224);  // so much room for a_k
    checked(path, "number of key heads", block[KEY_HEADS], 1, net->NH);
    checked(path, "width of the MLP", block[FFN], 1, 1 << 20);
    checked(path, "head tied to the embedding", block[TIED], 0, 1);
    if (net->NH % block[KEY_HEADS] != 0) die(STATUS_DATA, "%s: its %d heads cannot be shared by %d key heads",
        path, net->NH, block[KEY_HEADS]);
    if (block[HEAD_SIZE] != net->C / net->NH) die(STATUS_DATA, "%s: its %d heads have %d channels each; only "
        "those that share its %d channels are possible", path, net->NH, block[HEAD_SIZE], net->C);
    if (block[HEAD_SIZE] % 2 != 0) die(STATUS_DATA, "%s: its heads have %d channels, an odd number, "
        "which have to be pairs", path, block[HEAD_SIZE]);
    float base = float_of(block[ROTARY_BASE]), epsilon = float_of(block[EPSILON]);
    if (!(base >= 1 && base <= 1e30f))
        die(STATUS_DATA, "%s: its rotary base is %g; 1 to 1e30 is possible", path, (double)base);
    if (!(epsilon >= 0 && epsilon <= 1))
        die(STATUS_DATA, "%s: its epsilon is %g; 0 to 1 is possible", path, (double)epsilon);
}

static const char *block_text(const Config *net) {
    static char text[64];
    snprintf(text, sizeof text, ", key heads %d, F %d", net->block[KEY_HEADS], net->block[FFN]);
    return text;
}

#elif defined(REV_GPT2_OTHER_LAYERS)
// ---- the block's own layers for a GPU, behind those of train_rev_gpt2.cu, whose helpers they use

// RMSNorm, a warp a token like layernorm. x = s + add of this lane's columns of one run, 0 beyond C
template <int N> static __device__ __forceinline__ void
rms_run(float x[N], const stream_t *s, const act_t *add, int run, int C, float unit) {
    const int first = run * WARP * N;
    Few<stream_t, N> of_stream[1];
    Few<act_t, N> of_add[1] = {};
    load_token<N, 1>(of_stream, s + first, C - first);
    if (add) load_token<N, 1>(of_add, add + first, C - first);
    for (int j = 0; j < N; j++) x[j] = stream_value(of_stream[0].e[j], unit) + to_float(of_add[0].e[j]);
}
// EARLY: there are registers for gradients that are on their way; WIDE: not even for a token, so that a lane
// loads a run when it needs it, and again going back
template <int N, int RUNS> struct Lane { enum { EARLY = RUNS <= 4, WIDE = N * RUNS > 64 }; };
// x of all runs; returns 1 / the root of the mean of the squares
template <int N, int RUNS> static __device__ __forceinline__ float
rms_token(float x[RUNS][N], const stream_t *s, const act_t *add, int C, float epsilon, float unit) {
    enum { WIDE = Lane<N, RUNS>::WIDE };
    Few<stream_t, N> of_stream[RUNS];
    Few<act_t, N> of_add[RUNS] = {};
    float sum = 0;
    if (!WIDE) load_token<N, RUNS>(of_stream, s, C);
    if (!WIDE && add) load_token<N, RUNS>(of_add, add, C);
#pragma unroll
    for (int r = 0; r < RUNS; r++) {
        if (WIDE) rms_run<N>(x[r], s, add, r, C, unit);
        for (int j = 0; j < N; j++) {
            if (!WIDE) x[r][j] = stream_value(of_stream[r].e[j], unit) + to_float(of_add[r].e[j]);
            sum += x[r][j] * x[r][j];
        }
    }
    return 1 / sqrtf(warp_sum(sum) / (float)C + epsilon);
}
template <int N, int RUNS> static __global__ void __launch_bounds__(THREADS)
rmsnorm_kernel(act_t *out, const stream_t *s, const act_t *add, const param_t *weight, int n, int C,
               float epsilon, float unit) {
    const size_t i = blockIdx.x * (size_t)(blockDim.x / WARP) + threadIdx.x / WARP, at = i * (size_t)C;
    float x[RUNS][N];
    if (i >= (size_t)n) return;  // the whole warp
    const float scale = rms_token<N, RUNS>(x, s + at, add ? add + at : NULL, C, epsilon, unit);
#pragma unroll
    for (int r = 0; r < RUNS; r++) {
        const int c = column_of<N>(r);
        if (c >= C) continue;
        Few<param_t, N> w = load<N>(weight + c);
        Few<act_t, N> to;
        for (int j = 0; j < N; j++) set(to.e + j, x[r][j] * scale * w.e[j]);
        store<N>(out + at + c, to);
    }
}
// A block for a slice of tokens; partial (slices, C), of dweight
template <int N, int RUNS> static __global__ void __launch_bounds__(BACK_THREADS, RUNS <= 3 ? 3 : 2)
rmsnorm_backward_kernel(float *ds, act_t *dadd, float *partial, const act_t *dout, const stream_t *s,
                        const act_t *add, const param_t *weight, int n, int C, float epsilon, float unit) {
    SHARED(float, room);  // (N, RUNS, 32): the first of all runs, then the second ones
    enum { LINE = RUNS * WARP, EARLY = Lane<N, RUNS>::EARLY, WIDE = Lane<N, RUNS>::WIDE };
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, warps = blockDim.x / WARP;
    float x[RUNS][N], dw[RUNS][N] = {};
    for (size_t i = slice_begin((size_t)n, blockIdx.x) + (size_t)warp;
         i < slice_begin((size_t)n, blockIdx.x + 1); i += (size_t)warps) {
        const size_t at = i * (size_t)C;
        const stream_t *of_stream = s + at;
        const act_t *of_add = add ? add + at : NULL;
        Few<act_t, N> d[RUNS], other[RUNS] = {};
        if (EARLY) load_token<N, RUNS>(d, dout + at, C);
        const float scale = rms_token<N, RUNS>(x, of_stream, of_add, C, epsilon, unit);
        float mean = 0;
#pragma unroll
        for (int r = 0; r < RUNS; r++) {
            const int c = column_of<N>(r);
            if (c >= C) continue;
            Few<param_t, N> w = load<N>(weight + c);
            if (!EARLY) d[r] = load<N>(dout + at + c);
            if (WIDE) rms_run<N>(x[r], of_stream, of_add, r, C, unit);
            for (int j = 0; j < N; j++) {
                const float g = to_float(d[r].e[j]), normed = x[r][j] * scale;
                dw[r][j] += g * normed;
                mean += g * w.e[j] * normed;
            }
        }
        Few<float, N> dx[RUNS];
        if (EARLY) load_token<N, RUNS>(dx, ds + at, C);
        if (EARLY && dadd) load_token<N, RUNS>(other, dadd + at, C);
        mean = warp_sum(mean) / (float)C;
#pragma unroll
        for (int r = 0; r < RUNS; r++) {
            const int c = column_of<N>(r);
            if (c >= C) continue;
            Few<param_t, N> w = load<N>(weight + c);
            if (!EARLY) d[r] = load<N>(dout + at + c), dx[r] = load<N>(ds + at + c);
            if (!EARLY && dadd) other[r] = load<N>(dadd + at + c);
            if (WIDE) rms_run<N>(x[r], of_stream, of_add, r, C, unit);
            for (int j = 0; j < N; j++) {
                float part = (to_float(d[r].e[j]) * w.e[j] - x[r][j] * scale * mean) * scale;
                dx[r].e[j] += part;
                set(other[r].e + j, to_float(other[r].e[j]) + part);
            }
            store<N>(ds + at + c, dx[r]);
            if (dadd) store<N>(dadd + at + c, other[r]);
        }
    }
    for (int w = 0; w < warps; w++) {  // one warp after the other
        if (w == warp)
#pragma unroll
            for (int k = 0; k < N * RUNS; k++) {
                float *to = room + k * WARP + lane;
                *to = dw[k % RUNS][k / RUNS] + (w ? *to : 0);
            }
        __syncthreads();
    }
    for (int c = (int)threadIdx.x; c < C; c += (int)blockDim.x)
        partial[blockIdx.x * (size_t)C + (size_t)c] = room[c % N * LINE + c / N];
}
template <int N, int RUNS> static void
rmsnorm_forward_of(act_t *out, const stream_t *s, const act_t *add, const param_t *weight, int n, int C,
                   float epsilon, float unit) {
    LAUNCH((rmsnorm_kernel<N, RUNS>), blocks_for((size_t)n, THREADS / WARP), THREADS, 0, out, s, add, weight,
           n, C, epsilon, unit);
}
template <int N, int RUNS> static void
rmsnorm_backward_of(real_t *ds, act_t *dadd, real_t *dweight, const act_t *dout, const stream_t *s,
                    const act_t *add, const param_t *weight, int n, int C, float epsilon, float unit) {
    int slices = slices_of((size_t)n, RUNS <= 3 ? 42 : 63);  // as layernorm's
    size_t room = N * RUNS * WARP * sizeof(float);
    LAUNCH((rmsnorm_backward_kernel<N, RUNS>), (unsigned)slices, BACK_THREADS, room, ds, dadd, partial_sums,
           dout, s, add, weight, n, C, epsilon, unit);
    sum_of_rows(dweight, NULL, partial_sums, slices, C);
}
// f<N, RUNS> for C columns, of which a Llama also has 2048
#define OF_LLAMAS_WIDTH(f, by_eight, ...) do { \
        if ((by_eight) && C > 1792 && C <= 2048) f<8, 8>(__VA_ARGS__); \
        else OF_WIDTH(f, by_eight, __VA_ARGS__); \
    } while (0)
void rmsnorm_forward(act_t *out, const stream_t *s, const act_t *add, const param_t *weight, int n, int C,
                     double epsilon, int grid) {
    profile("rmsnorm_forward", 0, (double)n * C * (sizeof(stream_t) + (add ? 2 : 1) * sizeof(act_t)));
    int by_eight = in_eights(out, C) && in_eights(s, C) && in_eights(add, C) && in_eights(weight, C);
    OF_LLAMAS_WIDTH(rmsnorm_forward_of, by_eight, out, s, add, weight, n, C, (float)epsilon,
                    grid_unit(grid));
}
void rmsnorm_backward(real_t *ds, act_t *dadd, real_t *dweight, const act_t *dout, const stream_t *s,
                      const act_t *add, const param_t *weight, int n, int C, double epsilon, int grid) {
    const double streams = sizeof(stream_t) + 2 * sizeof(real_t);
    profile("rmsnorm_backward", 0, (double)n * C * (streams + (1 + !!add + 2 * !!dadd) * sizeof(act_t)));
    int by_eight = in_eights(ds, C) && in_eights(dadd, C) && in_eights(dout, C) && in_eights(s, C) &&
        in_eights(add, C) && in_eights(weight, C);
    OF_LLAMAS_WIDTH(rmsnorm_backward_of, by_eight, ds, dadd, dweight, dout, s, add, weight, n, C,
                    (float)epsilon, grid_unit(grid));
}

// Angles are made in double precision: those of far places would have few bits left in float.
static __global__ void rotary_table_kernel(float *table, int first, int n, int HS, double base) {
    const int half = HS / 2;
    const size_t i = blockIdx.x * (size_t)blockDim.x + threadIdx.x, t = i / (size_t)half;
    const size_t c = i % (size_t)half;
    if (t >= (size_t)n) return;
    const double angle = (double)(first + (int)t) * pow(base, -2.0 * (double)c / HS);
    float *to = table + t * (size_t)HS + c;
    to[0] = (float)cos(angle);
    to[half] = (float)sin(angle);
}
void rotary_table(real_t *table, int first, int n, int HS, double base) {
    profile("rotary_table", 0, (double)n * HS * sizeof(real_t));
    LAUNCH(rotary_table_kernel, blocks_for((size_t)n * (size_t)(HS / 2), THREADS), THREADS, 0, table, first,
           n, HS, base);
}

// A thread for N pairs of one head; pairs: of all heads
template <int N> static __global__ void
rotary_kernel(act_t *x, const float *table, size_t pairs, int T, int heads, int HS, int width, float sign) {
    const size_t half = (size_t)HS / 2, i = (blockIdx.x * (size_t)blockDim.x + threadIdx.x) * N, c = i % half;
    if (i >= pairs) return;
    const size_t head = i / half % (size_t)heads, token = i / half / (size_t)heads;
    act_t *a = x + token * (size_t)width + head * (size_t)HS + c;
    const float *angle = table + token % (size_t)T * HS + c;
    Few<act_t, N> u = load<N>(a), v = load<N>(a + half), to = u, to_half = v;
    Few<float, N> cosine = load<N>(angle), sine = load<N>(angle + half);
    for (int j = 0; j < N; j++) {
        const float p = to_float(u.e[j]), q = to_float(v.e[j]), turn = sign * sine.e[j];
        set(to.e + j, p * cosine.e[j] - q * turn);
        set(to_half.e + j, q * cosine.e[j] + p * turn);
    }
    store<N>(a, to);
    store<N>(a + half, to_half);
}
void rotary_turn(act_t *x, const real_t *table, int n, int T, int heads, int HS, int width, int direction) {
    profile("rotary_turn", 0, 2.0 * n * heads * HS * sizeof(act_t));
    const size_t pairs = (size_t)n * heads * (size_t)(HS / 2);
    const float sign = (float)direction;
    if (HS % 16 == 0 && in_eights(x, width) && in_eights(table, HS))
        LAUNCH(rotary_kernel<8>, blocks_for(pairs, 8 * THREADS), THREADS, 0, x, table, pairs, T, heads, HS,
               width, sign);
    else
        LAUNCH(rotary_kernel<1>, blocks_for(pairs, THREADS), THREADS, 0, x, table, pairs, T, heads, HS,
               width, sign);
}

// A thread for N of all `count` numbers of act
template <int N> static __global__ void swiglu_kernel(act_t *act, const act_t *gateup, size_t count, int F) {
    const size_t i = (blockIdx.x * (size_t)blockDim.x + threadIdx.x) * N, row = F;
    if (i >= count) return;
    const act_t *at = gateup + i / row * 2*row + i % row;
    Few<act_t, N> gate = load<N>(at), up = load<N>(at + row), to;
    for (int j = 0; j < N; j++) {
        const float g = to_float(gate.e[j]);
        set(to.e + j, g / (1 + expf(-g)) * to_float(up.e[j]));
    }
    store<N>(act + i, to);
}
template <int N> static __global__ void swiglu_backward_kernel(act_t *gateup, const act_t *dact, size_t count,
                                                               int F) {
    const size_t i = (blockIdx.x * (size_t)blockDim.x + threadIdx.x) * N, row = F;
    if (i >= count) return;
    act_t *at = gateup + i / row * 2*row + i % row;
    Few<act_t, N> gate = load<N>(at), up = load<N>(at + row), d = load<N>(dact + i), dgate, dup;
    for (int j = 0; j < N; j++) {
        const float g = to_float(gate.e[j]), s = 1 / (1 + expf(-g)), silu = g * s, dy = to_float(d.e[j]);
        set(dgate.e + j, dy * to_float(up.e[j]) * (s + silu * (1 - s)));
        set(dup.e + j, dy * silu);
    }
    store<N>(at, dgate);
    store<N>(at + row, dup);
}
void swiglu_forward(act_t *act, const act_t *gateup, int n, int F) {
    profile("swiglu_forward", 0, 3.0 * n * F * sizeof(act_t));
    const size_t count = (size_t)n * F;
    if (in_eights(act, F) && in_eights(gateup, F))
        LAUNCH(swiglu_kernel<8>, blocks_for(count, 8 * THREADS), THREADS, 0, act, gateup, count, F);
    else LAUNCH(swiglu_kernel<1>, blocks_for(count, THREADS), THREADS, 0, act, gateup, count, F);
}
void swiglu_backward(act_t *gateup, const act_t *dact, int n, int F) {
    profile("swiglu_backward", 0, 5.0 * n * F * sizeof(act_t));
    const size_t count = (size_t)n * F;
    if (in_eights(gateup, F) && in_eights(dact, F))
        LAUNCH(swiglu_backward_kernel<8>, blocks_for(count, 8 * THREADS), THREADS, 0, gateup, dact, count, F);
    else LAUNCH(swiglu_backward_kernel<1>, blocks_for(count, THREADS), THREADS, 0, gateup, dact, count, F);
}

#else
// ---- the block's own layers for the CPU, behind those of GPT-2, whose helpers they use

// Sets x (C) = s + add of one token; returns 1 / the root of the mean of its squares.
INLINE real_t rms_row(real_t *x, const stream_t *s, const act_t *add, int C, double epsilon, real_t unit) {
    real_t sum = 0;
    #pragma omp simd
    for (int c = 0; c < C; c++) x[c] = stream_value(s[c], unit);
    for (int c = 0; add && c < C; c++) x[c] += add[c];
    #pragma omp simd reduction(+:sum)
    for (int c = 0; c < C; c++) sum += x[c] * x[c];
    return (real_t)(1 / sqrt(sum / (real_t)C + (real_t)epsilon));
}

void rmsnorm_forward(act_t *out, const stream_t *s, const act_t *add, const param_t *weight, int n, int C,
                     double epsilon, int grid) {
    profile("rmsnorm_forward", 0, (double)n * C * (sizeof(stream_t) + (add ? 2 : 1) * sizeof(act_t)));
    const size_t width = C, tokens = n;
    const real_t unit = grid_unit(grid);
    #pragma omp parallel for
    for (size_t p = 0; p < SLICES; p++) {
        real_t *x = scratch + p*3*width;  // in a row of its own: loads need not wait for stores to out
        for (size_t i = slice(tokens, p); i < slice(tokens, p + 1); i++) {
            real_t scale = rms_row(x, s + i*width, add ? add + i*width : NULL, C, epsilon, unit);
            #pragma omp simd
            for (int c = 0; c < C; c++) out[i*width + c] = x[c] * scale * weight[c];
        }
    }
}

// The gradient of weight is summed up a slice of tokens at a time, and then the slices in their order.
void rmsnorm_backward(real_t *ds, act_t *dadd, real_t *dweight, const act_t *dout, const stream_t *s,
                      const act_t *add, const param_t *weight, int n, int C, double epsilon, int grid) {
    profile("rmsnorm_backward", 0, (double)n * C *
            (sizeof(stream_t) + 2 * sizeof(real_t) + (1 + !!add + 2 * !!dadd) * sizeof(act_t)));
    const size_t width = C, tokens = n;
    const real_t unit = grid_unit(grid);
    #pragma omp parallel for
    for (size_t p = 0; p < SLICES; p++) {
        real_t *dw = scratch + p*3*width, *x = dw + C;  // x: one token at a time
        memset(dw, 0, sizeof(real_t) * width);
        for (size_t i = slice(tokens, p); i < slice(tokens, p + 1); i++) {
            const act_t *d = dout + i*width;
            real_t *to = ds + i*width, *to_add = dadd ? dadd + i*width : NULL, mean = 0;
            real_t scale = rms_row(x, s + i*width, add ? add + i*width : NULL, C, epsilon, unit);
            #pragma omp simd reduction(+:mean)
            for (int c = 0; c < C; c++) {
                x[c] *= scale;
                dw[c] += d[c] * x[c];
                mean += d[c] * weight[c] * x[c];
            }
            mean /= (real_t)C;
            #pragma omp simd
            for (int c = 0; c < C; c++) {
                x[c] = (d[c] * weight[c] - x[c] * mean) * scale;
                to[c] += x[c];
            }
            for (int c = 0; to_add && c < C; c++) to_add[c] += x[c];
        }
    }
    enum { COLUMNS = 64 };  // a thread owns columns
    #pragma omp parallel for
    for (int c0 = 0; c0 < C; c0 += COLUMNS)
        for (size_t p = 0; p < SLICES; p++) {
            const real_t *dw = scratch + p*3*width;
            for (int c = c0; c < smaller_of(c0 + COLUMNS, C); c++) dweight[c] += dw[c];
        }
}

void rotary_table(real_t *table, int first, int n, int HS, double base) {
    profile("rotary_table", 0, (double)n * HS * sizeof(real_t));
    const int half = HS / 2;
    #pragma omp parallel for
    for (int i = 0; i < half; i++) {
        const double turn = pow(base, -2.0 * i / HS);
        real_t *to = table + i;
        for (int t = 0; t < n; t++, to += HS) {
            to[0] = (real_t)cos((first + t) * turn);
            to[half] = (real_t)sin((first + t) * turn);
        }
    }
}

void rotary_turn(act_t *x, const real_t *table, int n, int T, int heads, int HS, int width, int direction) {
    profile("rotary_turn", 0, 2.0 * n * heads * HS * sizeof(act_t));
    const int half = HS / 2;
    const size_t row = width, sizes = HS;
    const real_t sign = (real_t)direction;
    #pragma omp parallel for
    for (int i = 0; i < n; i++) {
        const real_t *cosines = table + i % T * sizes, *sines = cosines + half;
        act_t *a = x + i*row;
        for (int h = 0; h < heads; h++, a += HS) {
            act_t *b = a + half;
            #pragma omp simd
            for (int c = 0; c < half; c++) {
                real_t u = a[c], v = b[c], sine = sign * sines[c];
                a[c] = u * cosines[c] - v * sine;
                b[c] = v * cosines[c] + u * sine;
            }
        }
    }
}

void swiglu_forward(act_t *act, const act_t *gateup, int n, int F) {
    profile("swiglu_forward", 0, 3.0 * n * F * sizeof(act_t));
    const size_t width = F;
    #pragma omp parallel for
    for (int i = 0; i < n; i++) {
        const act_t *gate = gateup + i*2*width, *up = gate + F;
        act_t *out = act + i*width;
        #pragma omp simd
        for (int c = 0; c < F; c++) out[c] = gate[c] / (1 + real_exp(-gate[c])) * up[c];
    }
}

void swiglu_backward(act_t *gateup, const act_t *dact, int n, int F) {
    profile("swiglu_backward", 0, 5.0 * n * F * sizeof(act_t));
    const size_t width = F;
    #pragma omp parallel for
    for (int i = 0; i < n; i++) {
        const act_t *d = dact + i*width;
        act_t *gate = gateup + i*2*width, *up = gate + F;
        #pragma omp simd
        for (int c = 0; c < F; c++) {
            real_t s = 1 / (1 + real_exp(-gate[c])), silu = gate[c] * s;  // whose slope is s + silu (1 - s)
            real_t dgate = d[c] * up[c] * (s + silu * (1 - s));
            up[c] = d[c] * silu;
            gate[c] = dgate;
        }
    }
}
#endif
