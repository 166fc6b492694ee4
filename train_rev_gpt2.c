/*
train_rev_gpt2.c: GPT-2 whose layers can be run backwards, trained without stored activations.
It follows "Reversing Large Language Models for Efficient Training and Fine-Tuning"; numbers in
parentheses, like (2.4), are equations of that paper.

The idea. An ordinary network computes p <- p + f(p) layer by layer. Back-propagation needs every p
again, in the opposite order, so all of them are kept, and memory grows with depth. Here a step uses
two neighbouring states, as integrators of differential equations do:

    next = alpha_k * prev + beta_k * cur + gamma_k * F_k(cur);     prev = cur;     cur = next

Unless alpha is 0, it can be solved for prev. The backward pass evaluates the force F_k(cur) again, steps
the state back, and uses the internals of the same evaluation for the gradient: hardly more is kept than
the last two states, and it costs one more forward pass of the blocks.

Exactly. Rounding would make the reconstructed state drift, so the streams (prev, cur) are integers on a
grid 2^-grid. What a step adds, beta*cur + gamma*F(cur), is made an integer and depends on cur alone:
subtracting it undoes adding it, if F gives the same bits twice. To that end the shapes alone fix the order
of every sum, not the number of threads nor what is kept. What is left is alpha*prev: where alpha is 1 or
-1, a sign undoes it; where it is a fraction, the bits that the product drops are kept; where it is 0, in
some steps of conversions, nothing could, and prev is kept. That way back is exact at any depth.

The file has six parts; the first declares what it calls of the others. It compiles alone, by
cc -O3 -march=native -fopenmp train_rev_gpt2.c -lm; `make` adds from dev/ bf16, samples and questions.

    I    Reversal       the whole method: networks, streams, forward, step_back, GPT-2's block, the head
    II   Memory         what each policy keeps, and the plan of every byte
    III  Conversions    pretrained networks made reversible: estimates, low bits, the teacher
    IV   Training       optimizer, random numbers, data, files, the loop
    V    Command line
    VI   Layers         for the CPU; train_rev_gpt2.cu has them for the GPU

Shapes are in comments: B sequences of T tokens, N = B*T, C channels, NH heads, L layers, V vocabulary,
Vp = V padded to a multiple of 128. A plane is one state of the whole batch, (B, T, C). Internals are what
the backward pass of a force needs besides p. A block takes a chunk, some sequences, at a time; if they are
long, its MLP takes slices of their tokens, and attention groups of heads.

On a first reading skip the layer functions, look up Model and Chunk as forward needs them, and take midpoint,
--memory reverse, short sequences: then has_estimate, keeps_plane, keeps_internals, has_teacher and past are
0, remainders and low_bits NULL, a chunk is one slice, a group all heads, and forward and step_back are the
formula above and its inverse.
*/
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <math.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#ifndef REAL
#define REAL float  // -DREAL=double: for checking gradients, with floating-point streams
#endif
#ifndef ACT
#define ACT REAL
#endif
#ifndef PARAM
#define PARAM REAL
#endif
#ifndef DEVICE
#define DEVICE  // marks what the CUDA twin's kernels call as well
#endif
typedef REAL real_t;    // gradients, moments of the optimizer, losses, statistics
typedef ACT act_t;      // activations inside a block, and gradients there
typedef PARAM param_t;  // weights
typedef union { int32_t fixed; real_t real; } stream_t;  // an element of p: in units of 2^-grid, or as it is

enum { STATUS_OK = 0, STATUS_DATA = 1, STATUS_USAGE = 2, STATUS_NUMBERS = 3, STATUS_INTERRUPTED = 130 };

// One clear line, then the end (Part IV)
__attribute__((format(printf, 2, 3), noreturn)) static void die(int status, const char *format, ...);

static int smaller_of(int a, int b) { return a < b ? a : b; }
static size_t larger_of(size_t a, size_t b) { return a > b ? a : b; }
static size_t round256(size_t bytes) { return (bytes + 255) / 256 * 256; }

// -------------------------------------------------------------------------------------------------
// Part I: reversal

// ---- the networks: one recurrence, a set of coefficients each

// The order is that of mode_names (Part IV), and of model files: another network comes last.
enum Mode { BASELINE, MIDPOINT, MIDPOINT_A, LEAPFROG, HAMILTONIAN, RETROFIT, BDIA, MODES };
enum { MAX_A = 240, MAX_ORDINARY = 256 };

typedef struct {
    int maxT, V, L, NH, C, Vp;  // from here to grid: slots 2 to 10 of a model file, in this order
    int mode;             // enum Mode
    float h;              // step size
    int grid;             // streams are integers on a grid 2^-grid; 0: floating point
    int shift, a[MAX_A];  // midpoint-a: the a_k of (3.6) times 2^shift; conversions: one a, in a[0]
    int K;                // retrofit: iterations of (4.7)
    uint32_t ordinary[MAX_ORDINARY / 32];  // conversions: a bit for each step that stays the baseline's
    int block[6];         // what another block has besides: slots 240 to 245 of its model files
} Config;
static int is_ordinary(const Config *net, int k);  // whether a conversion's step k is the baseline's

// alpha and beta times 2^shift, so that integers are enough to multiply by them
typedef struct { int alpha, beta, shift; double gamma; } Coefficients;

// Those of step k. Retrofit and bdia are conversions of a baseline, which keep some of its steps.
static Coefficients coefficients(const Config *net, int k) {
    double h = net->h, bdia = 1 + ldexp(net->a[0], -net->shift);
    int shift = net->shift, one = 1 << shift, a = net->a[net->mode == MIDPOINT_A ? k : 0];
    const Coefficients table[MODES] = {
        // alpha   beta  shift  gamma
        {      0,       1,     0,     1},  // baseline     (2.2)
        {      1,       0,     0, 2 * h},  // midpoint     (2.4)
        {      a, one - a, shift,     h},  // midpoint-a   (3.6)
        {     -1,       2,     0, h * h},  // leapfrog     (2.6)
        {      1,       0,     0,     h},  // hamiltonian  (2.8), (2.9)
        {      a, one - a, shift,     1},  // retrofit     (4.3)
        {      a, one - a, shift,  bdia},  // bdia
    };
    return table[is_ordinary(net, k) ? BASELINE : net->mode];
}

// A step's force is the whole block (2.5), or in turn one of its halves: written out, the Hamiltonian network
// q += h Attn(LN1(p)), p += h MLP(LN2(q)) (2.8), (2.9) is the midpoint recurrence at half a block a step,
// with q and p in turn as prev and cur.
enum { ATTN = 1, MLP = 2, BLOCK = 3 };
static int steps(const Config *net) { return net->mode == HAMILTONIAN ? 2 * net->L : net->L; }
static int layer_of(const Config *net, int k) { return net->mode == HAMILTONIAN ? k / 2 : k; }
static int halves_of(const Config *net, int k) {
    if (net->mode != HAMILTONIAN) return BLOCK;
    return k % 2 ? MLP : ATTN;
}

// ---- integer streams: what the layer functions of both twins do to one element

// x * scale, rounded to a whole number; *reach becomes negative if 32 bits have no place for it.
DEVICE static inline int64_t to_grid(real_t x, real_t scale, int *reach) {
    real_t v = (real_t)(sizeof x == 8 ? rint(x * scale) : rintf((float)(x * scale)));
    int inside = (v > (real_t)-0x1p31) & (v < (real_t)0x1p31);  // no branch, so that loops become vectors
    *reach |= !inside * INT32_MIN;  // clang 14 makes vectors of a product, not of -!inside
    return (int32_t)(inside ? v : 0);
}

// s * n/2^shift, rounded half up
DEVICE static inline int64_t multiply(int64_t s, int n, int shift) {
    return (n * s + (1 << shift >> 1)) >> shift;
}

// beta*cur + gamma*F in units of the grid, a function of cur alone; scale is gamma 2^grid.
// With this as `add`, a step is s = alpha*s + add. It is undone, where alpha is
//     1 or -1, by s = alpha*(s - add);
//     0, not at all: s - add must be 0 then, and the old s lies elsewhere;
//     n/2^shift, with the low bits of s that the product drops. Conversions keep them, `shift` an element a
//     step; midpoint-a pushes them on a stack of 16 bits an element, which is empty in the end (Part III).
DEVICE static inline int64_t increment(int32_t cur, real_t f, Coefficients step, real_t scale, int *reach) {
    return multiply(cur, step.beta, step.shift) + to_grid(f, scale, reach);
}

// ---- the layer functions of this part, which alone touch device memory: a CPU's (Part VI), or in the twin a
// GPU's. n counts tokens. The same input gives the same bits, whatever the number of threads.

void device_zero(void *p, size_t bytes);
void device_copy(void *dst, const void *src, size_t bytes);
void to_host(void *dst, const void *src, size_t bytes);
void layers_weights(const param_t *params, void *copy, size_t count);  // a copy for products, if wanted
size_t layers_scratch_bytes(int n, int C, int OC, int NH);  // for products C to OC and back, and attention

// both streams = wte[token] + wpe[t] (2.1); prev and cur (n, C), tokens (n); wpe may be NULL
void stream_embed(stream_t *prev, stream_t *cur, const int *tokens, const param_t *wte, const param_t *wpe,
                  int n, int T, int C, int grid);
// direction 1: from (count) is prev, and `to` becomes next; -1: from is next, and `to` becomes prev; they may
// be one place. The force is f, or f + f2 if f2 is given. What a fraction alpha drops goes to r (count), the
// stack of midpoint-a, or to low, a step's own, NULL if it will not be undone; else both are NULL.
void stream_step(stream_t *to, const stream_t *from, const stream_t *cur, const act_t *f, const act_t *f2,
                 uint16_t *r, uint32_t *low, size_t count, Coefficients step, int grid, int direction);
// the norm of x - y (count), or of x if y is NULL; and of r, if given: 0 exactly if not a bit is set
double stream_distance(const stream_t *x, const stream_t *y, const uint16_t *r, size_t count, int grid);
// dwte (Vp, C), dwpe (maxT, C) += dx = d1 + d2 (n, C); d2 and dwpe may be NULL; order: layers_order's
void embed_backward(real_t *dwte, real_t *dwpe, const real_t *d1, const real_t *d2, const int *tokens,
                    const void *order, int n, int T, int C);

// out (n, OC) = inp (n, C) weight (OC, C)^T + bias (OC); bias may be NULL. Rows of out, and of dout, are
// `width` apart: they may be columns of a wider matrix.
void matmul_forward(act_t *out, const act_t *inp, const param_t *weight, const param_t *bias,
                    int n, int C, int OC, int width);
// the same into pre, and out = GELU(pre)
void matmul_gelu_forward(act_t *out, act_t *pre, const act_t *inp, const param_t *weight, const param_t *bias,
                         int n, int C, int OC);
// dinp (n, C) = dout (n, OC) weight, times GELU'(pre) if pre is given; dweight, dbias += ; dbias may be NULL
void matmul_backward(act_t *dinp, real_t *dweight, real_t *dbias, const act_t *dout, const act_t *inp,
                     const param_t *weight, const act_t *pre, int n, int C, int OC, int width);

// out (n, C) = LN(s + add) * weight + bias, straight from a stream; add may be NULL
void layernorm_forward(act_t *out, const stream_t *s, const act_t *add, const param_t *weight,
                       const param_t *bias, int n, int C, int grid);
// the gradient in s + add is added to ds (n, C), and to dadd if given; dweight, dbias (C) +=
void layernorm_backward(real_t *ds, act_t *dadd, real_t *dweight, real_t *dbias, const act_t *dout,
                        const stream_t *s, const act_t *add, const param_t *weight, int n, int C, int grid);

// causal attention in linear memory: out (B, T, C), lse (B, NH, T): log of softmax's sum. A row of qkv
// (B, T, C + 2 NKV C/NH) holds NH heads of queries, NKV of keys, NKV of values; head h reads h / (NH/NKV).
// Or qkv, dqkv hold `heads` of the NH and what these read; out, dout, lse begin where the first's places are.
void attention_forward(act_t *out, real_t *lse, const act_t *qkv, int B, int T, int C, int NH, int NKV,
                       int heads);
void attention_backward(act_t *dqkv, const act_t *dout, const act_t *qkv, const act_t *out, const real_t *lse,
                        int B, int T, int C, int NH, int NKV, int heads);
// row t of it alone, for generating: out (C), qkv of t + 1 tokens, which begins at any element
void attention_query(act_t *out, const act_t *qkv, int t, int C, int NH, int NKV);

void scale_cast(act_t *out, const real_t *x, double scale, size_t count);  // out = scale * x
// dp += beta * dnext; dnext *= alpha (count): what the adjoint of a step is besides the force's
void adjoint_update(real_t *dp, real_t *dnext, double alpha, double beta, size_t count);

// losses (n) from logits (n, Vp), which are overwritten: by their gradient times scale, if scale is not 0
void classifier(real_t *losses, act_t *logits, const int *targets, int n, int V, int Vp, double scale);

// ---- a model, and a part of its batch

// What is kept for the backward pass: every plane of the streams, or, from REVERSE on, steps are undone.
enum Memory {
    STORE,       // every plane, and the internals of every block: what its backward pass needs besides p
    CHECKPOINT,  // every plane; blocks are evaluated again
    REVERSE,     // only planes that steps with alpha = 0 forget, and low bits; blocks are evaluated again
    AUTO         // as REVERSE, and internals and forces of as many last steps as a budget of bytes allows
};

typedef struct { int row; void *at; size_t bytes; } Buffer;  // at: the pointer in Model that will hold it

typedef struct {
    Config net;
    int B, T;               // sequences of a batch, and tokens of each
    int chunk, head_chunk;  // sequences that a force, and tokens that the head is evaluated for at a time
    int slice, group;       // tokens of a chunk the MLP, and heads that attention takes at a time; 0: all
    int training, lanes;    // whether there will be a backward pass; how many sums make a step's gradient
    int memory, objective;  // enum Memory, enum Objective
    int kept_steps;         // the last steps, whose internals are kept
    int has_teacher;        // whether there is a baseline of the same shape to come near (Part III)
    param_t *params;        // all tensors, one after the other
    void *weight_copy;      // what layers_weights makes of them
    real_t *grads, *sum, *m, *v;  // like params; of a rank's share: their sum, the optimizer's moments
    int *inputs, *targets;  // (B, T); a target below 0 does not count: no loss, no gradient
    void *order;            // what layers_order makes of the inputs
    real_t *losses;         // (B, T), or with a teacher (METRICS, B, T)

    stream_t *prev, *cur, *next;  // (B, T, C): p_{k-1}, p_k, p_{k+1} of the step at hand
    real_t *dprev, *dcur;   // (B, T, C), gradients in them
    uint16_t *remainders;   // (B, T, C), what midpoint-a's multiplications drop
    uint32_t *low;          // low bits, what the conversions' multiplications drop
    stream_t *planes[2];    // of p_{-1} and p_0, perhaps the same, and of what takes their places
    stream_t *kept_planes;  // (so many, B, T, C): of those that take no other's
    double uncancelled;     // the norm of what was left where steps with alpha = 0 were undone

    char *kept_internals;   // of the last steps, all chunks; with the force, if it is needed to undo them
    char *internals;        // of one chunk of the others
    act_t *normed;          // (slice, C), a layernorm's output
    act_t *out;             // (slice, C), the MLP's part of the force; going back, a gradient
    act_t *dforce;          // (slice, C), gamma * dloss/dnext
    act_t *wide;            // gradients inside the block: of a slice, or of a group of heads
    real_t *destimate;      // (n, C), the gradient in an estimate, n = chunk * T
    char *scratch;          // the layer functions' own

    act_t *head_normed, *head_dnormed;  // (head_chunk, C)
    act_t *logits;                      // (head_chunk, Vp), then their gradients
    param_t *teacher;                   // like params
    void *teacher_copy;
    stream_t *teacher_cur;              // (B, T, C), its last state; NULL: it goes to dprev
    act_t *teacher_logits;              // (head_chunk, Vp)

    act_t *cache;           // generating: (evaluations, cache_tokens, cache_width), the tokens so far
    int cache_tokens, past;  // how many it has room for, and how many it holds, which stand before the inputs
    Buffer buffers[32];     // every array above, as planned
    int buffer_count;
} Model;

// Some sequences of a batch, or of long ones a slice of their tokens: attention is evaluated for all of them
// with the first slice, and its adjoint with the last, but the MLP knows nothing of sequences.
typedef struct {
    // of the sequences
    int b, sequences;   // the first, and how many
    char *internals;    // what the block's backward pass needs besides attn
    int kept;           // whether internals are kept, of all slices and heads
    act_t *cache;       // their place in the model's cache, or NULL
    // of the slice
    int from, tokens;   // the first of their tokens, and how many
    size_t at, count;   // its first element in a plane, and how many elements
    act_t *attn, *mlp;  // (tokens, C), the halves, whose sum the force is; NULL where the step has none
    int fresh;          // whether m->normed still is the layernorm of the half that was just evaluated
} Chunk;

// ---- what the recurrence asks of other parts

// The block, below. Both streams begin as its embedding x (2.1), to which both gradients go back.
static size_t parameter_count(const Config *net);
static void embed(const Model *m, stream_t *prev, stream_t *cur);
static void embed_adjoint(const Model *m);
// A half of layer l's block at p (tokens, C). Going back, J^T m->dforce is added to dp and the weights'
// gradients; the MLP's goes first: it reads p + attn, and adds the gradient of attn to m->dforce. That of all
// slices lies in attn's place when attention goes back.
static void attention_half_forward(Model *m, int l, const stream_t *p, Chunk c);
static void attention_half_backward(Model *m, int l, const stream_t *p, real_t *dp, Chunk c);
static void mlp_half_forward(Model *m, int l, const stream_t *p, Chunk c);
static void mlp_half_backward(Model *m, int l, const stream_t *p, real_t *dp, Chunk c);

// Memory, Part II
static int undoes_steps(const Model *m);             // REVERSE and AUTO; otherwise every plane is kept
static int keeps_plane(const Model *m, int k);       // p_{k-1}; otherwise p_{k+1} takes its place
static void stand_at(Model *m, int k);               // sets prev, cur and next to the planes of step k
static int keeps_internals(const Model *m, int k);   // otherwise F_k is evaluated again, going back
static int slice_of(const Model *m, int n);          // how many of n tokens the MLP takes at a time
static int group_of(const Model *m);                 // how many heads attention takes at a time
static void place_internals(const Model *m, int k, Chunk *c);  // sets attn, mlp, internals, kept and cache

// Conversions, Part III. Retrofit's force has a second term, a block at an estimate of p_{k-1} that is itself
// made from p_k alone (4.7), so that it can be added and taken off like the first.
static uint32_t *low_bits(const Model *m, int k, Chunk c);  // where step k keeps them, or NULL
static int has_estimate(const Config *net, int k);          // whether step k's force has the second term
static void estimate_forward(Model *m, int k, Chunk c);     // adds it to the stream
static void estimate_back(Model *m, int k, Chunk c);        // takes it off again, and adds its adjoint

// ---- forward

static size_t plane_size(const Model *m) { return (size_t)m->B * m->T * m->net.C; }

// Step k's chunk from token i of the batch on; beyond the batch it has no tokens.
static Chunk chunk_at(const Model *m, int k, int i) {
    int full = m->chunk * m->T;
    size_t C = m->net.C;
    Chunk c;
    memset(&c, 0, sizeof c);
    c.b = i / full * m->chunk;
    c.sequences = smaller_of(m->chunk, m->B - c.b);
    c.from = i % full;
    c.tokens = smaller_of(slice_of(m, full), c.sequences * m->T - c.from);
    c.at = i * C;
    c.count = c.tokens * C;
    if (c.tokens > 0) place_internals(m, k, &c);
    return c;
}
static Chunk chunk_after(const Model *m, int k, Chunk c) {
    return chunk_at(m, k, c.b * m->T + c.from + c.tokens);
}

// All slices of the chunk's sequences as one
static Chunk all_slices(const Model *m, Chunk c) {
    size_t before = (size_t)c.from * m->net.C;
    int tokens = c.sequences * m->T;
    c.fresh = c.fresh && !c.mlp && c.tokens == tokens;  // else m->normed is the MLP's, or a slice's
    c.from = 0;
    c.tokens = tokens;
    c.at -= before;
    c.count = (size_t)tokens * m->net.C;
    if (c.attn) c.attn -= before;
    return c;
}
static int is_last_slice(const Model *m, Chunk c) { return c.from + c.tokens == c.sequences * m->T; }

// F_k(p), to c.attn and c.mlp
static void force_forward(Model *m, int k, const stream_t *p, Chunk c) {
    int l = layer_of(&m->net, k);
    if (c.attn && c.from == 0) attention_half_forward(m, l, p, all_slices(m, c));
    if (c.mlp) mlp_half_forward(m, l, p, c);
}

// Makes next of prev (direction 1), or prev of next again (-1).
static void move_stream(Model *m, int k, Chunk c, stream_t *to, const stream_t *from, int direction) {
    const act_t *f = c.attn ? c.attn : c.mlp;
    const act_t *f2 = c.attn ? c.mlp : NULL;
    uint16_t *remainders = m->remainders ? m->remainders + c.at : NULL;
    stream_step(to + c.at, from + c.at, m->cur + c.at, f, f2, remainders, low_bits(m, k, c), c.count,
                coefficients(&m->net, k), m->net.grid, direction);
}

// From m->inputs to the last pair of streams, prev and cur
static void forward(Model *m) {
    if (!m->past) layers_weights(m->params, m->weight_copy, parameter_count(&m->net));
    if (m->remainders) device_zero(m->remainders, plane_size(m) * sizeof(uint16_t));
    stand_at(m, 0);
    embed(m, m->prev, m->cur);                                    // p_{-1} = p_0 = x
    for (int k = 0; k < steps(&m->net); k++) {
        for (Chunk c = chunk_at(m, k, 0); c.tokens > 0; c = chunk_after(m, k, c)) {
            force_forward(m, k, m->cur + c.at, c);                // F_k(p_k)
            move_stream(m, k, c, m->next, m->prev, +1);           // p_{k+1}, in p_{k-1}'s place or its own
            if (has_estimate(&m->net, k)) estimate_forward(m, k, c);
        }
        stand_at(m, k + 1);
    }
}

// ---- reverse and adjoint

// dp += J_F(p)^T m->dforce, and the gradients of the weights. Once a slice's MLP has gone back, its attn is
// read no more, and makes room for its gradient; attention goes back when all slices' are there.
static void force_backward(Model *m, int k, const stream_t *p, real_t *dp, Chunk c) {
    int l = layer_of(&m->net, k);
    size_t before = (size_t)c.from * m->net.C;
    Chunk all = all_slices(m, c);
    if (c.mlp) mlp_half_backward(m, l, p, dp, c);
    if (!c.attn) return;
    if (c.tokens < all.tokens) device_copy(c.attn, m->dforce, c.count * sizeof(act_t));
    if (is_last_slice(m, c)) attention_half_backward(m, l, p - before, dp - before, all);
}

// p_{k-1} = (p_{k+1} - beta p_k - gamma F(p_k)) / alpha. Where alpha = 0 there is no division: p_{k-1}, which
// the step forgot, lies where it was, and what is left of p_{k+1} must be 0, if F came out the same.
static void undo_step(Model *m, int k, Chunk c) {
    int kept = keeps_plane(m, k);
    move_stream(m, k, c, kept ? m->next : m->prev, m->next, -1);
    if (!kept) return;
    double left = stream_distance(m->next + c.at, NULL, NULL, c.count, m->net.grid);
    m->uncancelled = hypot(m->uncancelled, left);
}

// One step back. From p_{k+1} = alpha p_{k-1} + beta p_k + gamma F(p_k), with dp_{k+1} for dloss/dp_{k+1},
//
//     dp_k += beta dp_{k+1} + J_F(p_k)^T (gamma dp_{k+1});    dp_{k-1}, as far as known, = alpha dp_{k+1}
//
//     before:  dcur = dp_{k+1}, dprev = as far as known dp_k
//     after:   dcur = dp_k, dprev = as far as known dp_{k-1}
//
// The F(p_k) that undoes the step, kept or evaluated again, is the one whose adjoint is taken.
static void step_back(Model *m, int k) {
    Coefficients step = coefficients(&m->net, k);
    double alpha = ldexp(step.alpha, -step.shift), beta = ldexp(step.beta, -step.shift);
    real_t *dp = m->dprev, *dnext = m->dcur;  // of p_k and p_{k+1}
    m->dcur = dp;
    m->dprev = dnext;
    stand_at(m, k);
    for (Chunk c = chunk_at(m, k, 0); c.tokens > 0; c = chunk_after(m, k, c)) {
        const stream_t *p = m->cur + c.at;
        if (has_estimate(&m->net, k)) estimate_back(m, k, c);
        c.fresh = !keeps_internals(m, k);
        if (c.fresh) force_forward(m, k, p, c);                   // F(p_k)
        if (undoes_steps(m)) undo_step(m, k, c);                  // p_{k-1}; then gradients may overwrite F
        scale_cast(m->dforce, dnext + c.at, step.gamma, c.count);
        force_backward(m, k, p, dp + c.at, c);                    // dp += J_F(p)^T (gamma dnext)
        if (dp == dnext) continue;                                // baseline: dp has beta dnext in it
        adjoint_update(dp + c.at, dnext + c.at, alpha, beta, c.count);  // dp += beta dnext; dnext *= alpha
    }
}

// 0 exactly, for integers, if the way back has ended where the way forward began: both streams are x again,
// no remainder is left, and every step with alpha = 0 cancelled. Or else the norm of all that is off,
// relative to x, which is made again in dcur: embed_adjoint has done with it.
static double drift_of(const Model *m) {
    int grid = m->net.grid;
    size_t count = plane_size(m);
    stream_t *x = (stream_t *)m->dcur;
    embed(m, x, x);
    double cur = stream_distance(m->cur, x, m->remainders, count, grid);
    double prev = stream_distance(m->prev, x, NULL, count, grid);
    double off = hypot(hypot(cur, prev), m->uncancelled);
    if (off == 0) return 0;
    return off / fmax(sqrt(2) * stream_distance(x, NULL, NULL, count, grid), 1e-30);
}

#ifdef REV_GPT2_BLOCK
#include REV_GPT2_BLOCK  // another block
#else
// ==== GPT-2's block: all that knows of it, down to the line that ends it ================================

// ---- sixteen tensors, in llm.c's order

typedef struct {
    param_t *wte;       // (Vp, C)
    param_t *wpe;       // (maxT, C)
    param_t *ln1w;      // (L, C)
    param_t *ln1b;      // (L, C)
    param_t *qkvw;      // (L, 3C, C)
    param_t *qkvb;      // (L, 3C)
    param_t *attprojw;  // (L, C, C)
    param_t *attprojb;  // (L, C)
    param_t *ln2w;      // (L, C)
    param_t *ln2b;      // (L, C)
    param_t *fcw;       // (L, 4C, C)
    param_t *fcb;       // (L, 4C)
    param_t *fcprojw;   // (L, C, 4C)
    param_t *fcprojb;   // (L, C)
    param_t *lnfw;      // (C)
    param_t *lnfb;      // (C)
} Tensors;

enum { TENSORS = 16 };
enum { GAIN, BIAS, MATRIX, PROJECTION, VOCABULARY };  // PROJECTION: into the streams; VOCABULARY: of Vp rows
static const struct { const char *name; int kind, stacked; } tensor_kinds[TENSORS] = {  // stacked over layers
    {"wte", VOCABULARY, 0}, {"wpe", MATRIX, 0}, {"ln1w", GAIN, 1}, {"ln1b", BIAS, 1}, {"qkvw", MATRIX, 1},
    {"qkvb", BIAS, 1}, {"attprojw", PROJECTION, 1}, {"attprojb", BIAS, 1}, {"ln2w", GAIN, 1},
    {"ln2b", BIAS, 1}, {"fcw", MATRIX, 1}, {"fcb", BIAS, 1}, {"fcprojw", PROJECTION, 1}, {"fcprojb", BIAS, 1},
    {"lnfw", GAIN, 0}, {"lnfb", BIAS, 0}};

// The elements of each tensor, in all layers. Returns their sum.
static size_t tensor_sizes(const Config *net, size_t all[TENSORS]) {
    size_t C = net->C, Vp = net->Vp, maxT = net->maxT, total = 0;
    const size_t one[TENSORS] = {Vp*C, maxT*C, C, C, 3*C*C, 3*C, C*C, C, C, C, 4*C*C, 4*C, 4*C*C, C, C, C};
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
    param_t **at[TENSORS] = {&t.wte, &t.wpe, &t.ln1w, &t.ln1b, &t.qkvw, &t.qkvb, &t.attprojw, &t.attprojb,
                             &t.ln2w, &t.ln2b, &t.fcw, &t.fcb, &t.fcprojw, &t.fcprojb, &t.lnfw, &t.lnfb};
    tensor_sizes(net, all);
    for (int i = 0; i < TENSORS; i++) {
        *at[i] = buffer;
        if (tensor_kinds[i].stacked) *at[i] += all[i] / net->L * l;
        buffer += all[i];
    }
    return t;
}

// ---- the two halves, F(p) = attn + mlp with attn = Attn(LN1(p)), mlp = MLP(LN2(p + attn)) (2.5)

// What their backward pass needs besides p and attn. The layernorms are not here: they come again from p.
typedef struct {
    act_t *qkv;       // (n, 3C), or of a group of heads; if kept, one group's behind another's
    act_t *atty;      // (n, C), what the heads have gathered
    real_t *lse;      // (sequences, NH, T)
    act_t *fch;       // (tokens, 4C)
    act_t *fch_gelu;  // (tokens, 4C)
} Internals;
enum { INTERNALS = 5 };

static size_t internals_bytes(const Model *m, int halves, size_t n, int kept, size_t bytes[INTERNALS]);
static size_t cache_width(const Config *net);  // qkv of a token

static Internals internals_of(const Model *m, Chunk c) {
    size_t bytes[INTERNALS], before = c.kept ? (size_t)c.from * 4 * m->net.C : 0;
    char *at = c.internals;
    int halves = 0;
    Internals a;
    if (c.attn) halves |= ATTN;
    if (c.mlp) halves |= MLP;
    internals_bytes(m, halves, (size_t)c.sequences * m->T, c.kept, bytes);
    a.qkv = (act_t *)at;
    a.atty = (act_t *)(at += bytes[0]);
    a.lse = (real_t *)(at += bytes[1]);
    a.fch = (act_t *)(at += bytes[2]) + before;
    a.fch_gelu = (act_t *)(at += bytes[3]) + before;
    if (c.cache) a.qkv = c.cache + m->past * cache_width(&m->net);
    return a;
}

// Attention takes a group of heads at a time, and what goes in and out of it a slice of tokens (Part II).
typedef struct {
    int heads;    // how many
    int channel;  // the first that is theirs of a token's C
    int width;    // of a row of qkv
    act_t *qkv;   // (n, width), their queries, keys and values
} Group;
static Group group_at(const Model *m, Chunk c, int h);
// g.qkv = LN1(p) qkvw^T + qkvb, of the group's rows of these: one layernorm, one product, if it has all heads
// and tokens; and from dqkv in m->wide, through LN1, to dp
static void qkv_forward(Model *m, int l, const stream_t *p, Chunk c, Group g);
static void qkv_backward(Model *m, int l, const stream_t *p, real_t *dp, Chunk c, Group g);
static act_t *atty_backward(Model *m, int l, Chunk c);  // dattn attprojw, the gradient in atty

static void attention_half_forward(Model *m, int l, const stream_t *p, Chunk c) {
    const Tensors w = tensors_at(&m->net, m->params, l);
    const Internals a = internals_of(m, c);
    int C = m->net.C, NH = m->net.NH, T = m->T;
    for (int h = 0; h < NH; h += group_of(m)) {
        const Group g = group_at(m, c, h);
        real_t *lse = a.lse + (size_t)h * T;
        qkv_forward(m, l, p, c, g);
        if (m->past) attention_query(a.atty, c.cache, m->past, C, NH, NH);
        else attention_forward(a.atty + g.channel, lse, g.qkv, c.sequences, T, C, NH, NH, g.heads);
    }
    matmul_forward(c.attn, a.atty, w.attprojw, w.attprojb, c.tokens, C, C, C);
}

static void attention_half_backward(Model *m, int l, const stream_t *p, real_t *dp, Chunk c) {
    const Internals a = internals_of(m, c);
    int C = m->net.C, NH = m->net.NH, T = m->T;
    act_t *datty = atty_backward(m, l, c), *dqkv = m->wide;
    int last = (NH - 1) / group_of(m) * group_of(m);
    for (int h = last; h >= 0; h -= group_of(m)) {  // the last group's qkv is still there
        const Group g = group_at(m, c, h);
        const act_t *dout = datty + g.channel, *out = a.atty + g.channel;
        const real_t *lse = a.lse + (size_t)h * T;
        if (h < last && !c.kept) qkv_forward(m, l, p, c, g);
        attention_backward(dqkv, dout, g.qkv, out, lse, c.sequences, T, C, NH, NH, g.heads);
        qkv_backward(m, l, p, dp, c, g);
    }
}

static void mlp_half_forward(Model *m, int l, const stream_t *p, Chunk c) {
    const Config *net = &m->net;
    const Tensors w = tensors_at(net, m->params, l);
    const Internals a = internals_of(m, c);
    int C = net->C, n = c.tokens;
    layernorm_forward(m->normed, p, c.attn, w.ln2w, w.ln2b, n, C, net->grid);
    matmul_gelu_forward(a.fch_gelu, a.fch, m->normed, w.fcw, w.fcb, n, C, 4*C);
    matmul_forward(c.mlp, a.fch_gelu, w.fcprojw, w.fcprojb, n, 4*C, C, C);
}

// In a block, attn is a part of the force, and LN2 reads it as well: that gradient is added to m->dforce.
static void mlp_half_backward(Model *m, int l, const stream_t *p, real_t *dp, Chunk c) {
    const Config *net = &m->net;
    const Tensors w = tensors_at(net, m->params, l), d = tensors_at(net, m->grads, l);
    const Internals a = internals_of(m, c);
    int C = net->C, n = c.tokens;
    act_t *dfch = m->wide, *dnormed = m->out, *dattn = c.attn ? m->dforce : NULL;
    matmul_backward(dfch, d.fcprojw, d.fcprojb, m->dforce, a.fch_gelu, w.fcprojw, a.fch, n, 4*C, C, C);
    if (!c.fresh) layernorm_forward(m->normed, p, c.attn, w.ln2w, w.ln2b, n, C, net->grid);
    matmul_backward(dnormed, d.fcw, d.fcb, dfch, m->normed, w.fcw, NULL, n, C, 4*C, 4*C);
    layernorm_backward(dp, dattn, d.ln2w, d.ln2b, dnormed, p, c.attn, w.ln2w, n, C, net->grid);
}

// ---- what stands before the first block, and behind the last

static void embed(const Model *m, stream_t *prev, stream_t *cur) {
    const Tensors w = tensors_at(&m->net, m->params, 0);
    int C = m->net.C, N = m->B * m->T;
    stream_embed(prev, cur, m->inputs, w.wte, w.wpe + (size_t)m->past * C, N, m->T, C, m->net.grid);
}

static void embed_adjoint(const Model *m) {
    const Tensors d = tensors_at(&m->net, m->grads, 0);
    const real_t *other = m->dprev == m->dcur ? NULL : m->dprev;
    embed_backward(d.wte, d.wpe, m->dcur, other, m->inputs, m->order, m->B * m->T, m->T, m->net.C);
}

// m->logits of n tokens from the i-th of the batch (2.3), W tied to the embedding; n is at most head_chunk.
static void head_logits(Model *m, int i, int n) {
    const Config *net = &m->net;
    const Tensors w = tensors_at(net, m->params, 0);
    const stream_t *p = m->cur + (size_t)i * net->C;
    layernorm_forward(m->head_normed, p, NULL, w.lnfw, w.lnfb, n, net->C, net->grid);
    matmul_forward(m->logits, m->head_normed, w.wte, NULL, n, net->C, net->Vp, net->Vp);
}

// From the gradient in m->logits to m->dcur, and to the weights
static void head_backward(Model *m, int i, int n) {
    const Config *net = &m->net;
    const Tensors w = tensors_at(net, m->params, 0), d = tensors_at(net, m->grads, 0);
    size_t at = (size_t)i * net->C;
    matmul_backward(m->head_dnormed, d.wte, NULL, m->logits, m->head_normed, w.wte, NULL, n, net->C, net->Vp,
                    net->Vp);
    layernorm_backward(m->dcur + at, NULL, d.lnfw, d.lnfb, m->head_dnormed, m->cur + at, NULL, w.lnfw,
                       n, net->C, net->grid);
}

// ==== end of GPT-2's block ==============================================================================
#endif

// ---- the head: loss, and the gradient at the end of the recurrence

static void teacher_forward(const Model *m);                // Part III: to its last state
static void distill(Model *m, int i, int n, double scale);  // Part III: logits, and losses beside its own
static double objective_of(const Model *m);                 // Part IV: its mean over the batch

// Leaves the losses of all tokens in m->losses. If scale is not 0, the gradient of the objective's sum times
// scale is added to m->dcur and to the gradients of the weights.
static void head(Model *m, double scale) {
    int N = m->B * m->T;
    if (m->has_teacher) teacher_forward(m);
    for (int i = 0; i < N; i += m->head_chunk) {
        int n = smaller_of(m->head_chunk, N - i);
        if (m->has_teacher) distill(m, i, n, scale);
        else {
            head_logits(m, i, n);
            classifier(m->losses + i, m->logits, m->targets + i, n, m->net.V, m->net.Vp, scale);
        }
        if (scale != 0) head_backward(m, i, n);
    }
}

// ---- back-propagation

// From the last pair of streams to the gradients of all weights. scale: B*T / (the targets that count in the
// optimizer's step). *drift is NAN if no step is undone. Returns the objective's mean.
static double backward(Model *m, double scale, double *drift) {
    size_t bytes = plane_size(m) * sizeof(real_t);
    device_zero(m->dcur, bytes);
    head(m, scale / (m->B * m->T));
    if (m->dprev != m->dcur) device_zero(m->dprev, bytes);  // the teacher's last state may have been there
    m->uncancelled = 0;
    for (int k = steps(&m->net) - 1; k >= 0; k--) step_back(m, k);
    embed_adjoint(m);
    *drift = undoes_steps(m) ? drift_of(m) : NAN;
    return objective_of(m);
}

static double forward_backward(Model *m, double scale, double *drift) {
    forward(m);
    return backward(m, scale, drift);
}

// -------------------------------------------------------------------------------------------------
// Part II: memory. Every buffer is planned first: what is printed and what is allocated come from one list.

// What training makes small: cross-entropy, or a divergence: KL(ours, teacher's) (4.6), KL(teacher's, ours)
enum Objective { CROSS_ENTROPY, KL, KL_TEACHER };
// What is measured of each token; without a teacher only the first. AGREEMENT: that on the likeliest token
enum Metric { LOSS, TEACHER_LOSS, DIVERGENCE, AGREEMENT, METRICS };
// The rows of --plan. The last two are sums: of the four before, and of all.
enum {
    PARAMETERS, TEACHER, GRADIENTS, OPTIMIZER, DATA, STREAMS, KEPT, WORKSPACE, HEAD, ACTIVATIONS, TOTAL, ROWS
};
static const char *const row_names[ROWS] = {"parameters", "teacher", "gradients", "optimizer", "data",
    "streams", "kept", "workspace", "head", "activations", "total"};

extern const int chunk_tokens, head_chunk_tokens, slice_tokens;  // default sizes: enough to fill the machine
extern const size_t weight_copy_bytes;  // of a weight, for layers_weights; 0: products take it as it is
size_t layers_order_bytes(int n);       // of what embed_backward wants to know of n tokens; 0: nothing
void *device_alloc(size_t bytes);       // zeroed, 256-byte aligned; NULL if there is none
void device_free(void *p);
size_t device_memory_bytes(void);       // what the device has in all, and this process may use
void layers_begin(void *memory);        // scratch memory, as much as layers_scratch_bytes says at most

// Part III: a step's estimates, all low bits, and how many blocks are evaluated before step k's own
static size_t estimate_bytes(const Model *m, int k, size_t n, int kept);
static size_t low_words(const Model *m);
static int evaluations(const Config *net, int k);

// Part IV: processes that share a run are ranks. This one's number, how many there are, and in its machine;
// how many parameters it updates, and of how many it needs a sum of gradients
static int rank = 0, ranks = 1, ranks_here = 1;
static size_t shard_size(const Config *net);
static size_t sum_size(const Model *m);

static int undoes_steps(const Model *m) { return m->memory >= REVERSE; }

#ifndef REV_GPT2_BLOCK
// ==== GPT-2's block once more: its slices, bytes and flops ===============================================

// Internals' bytes one by one, for n tokens and the halves that a step has; of a slice and a group of heads,
// unless all are kept. Returns the sum; bytes may be NULL.
static size_t internals_bytes(const Model *m, int halves, size_t n, int kept, size_t bytes[INTERNALS]) {
    size_t NH = m->net.NH, row = (size_t)m->net.C * sizeof(act_t), total = 0;
    size_t attn = (halves & ATTN) != 0, mlp = (halves & MLP) != 0, slice = n, heads = NH;
    if (!kept) slice = slice_of(m, (int)n);
    if (!kept) heads = group_of(m);
    const size_t inside = mlp * 4*slice*row;
    if (m->cache) heads = 0;  // its qkv are there
    const size_t unpadded[INTERNALS] = {
        attn * n * 3*row / NH * heads, attn * n*row, attn * n*NH * sizeof(real_t), inside, inside};
    for (int i = 0; i < INTERNALS; i++) {
        if (bytes) bytes[i] = round256(unpadded[i]);
        total += round256(unpadded[i]);
    }
    return total;
}

static size_t cache_width(const Config *net) { return 3 * (size_t)net->C; }

// A group's queries, keys and values are three stretches of rows of qkvw, but one if it has all heads.
static Group group_at(const Model *m, Chunk c, int h) {
    int hs = m->net.C / m->net.NH, heads = smaller_of(group_of(m), m->net.NH - h);
    Group g = {heads, h * hs, 3 * heads * hs, internals_of(m, c).qkv};
    if (c.kept) g.qkv += (size_t)c.tokens * 3 * g.channel;
    return g;
}
static int stretches_of(const Model *m, Group g) { return g.heads == m->net.NH ? 1 : 3; }

static void qkv_forward(Model *m, int l, const stream_t *p, Chunk c, Group g) {
    const Tensors w = tensors_at(&m->net, m->params, l);
    int n = c.tokens, slice = slice_of(m, n), stretches = stretches_of(m, g), rows = g.width / stretches;
    size_t C = m->net.C;
    for (int i = 0; i < n; i += slice) {
        int tokens = smaller_of(slice, n - i);
        act_t *qkv = g.qkv + (size_t)i * g.width;
        layernorm_forward(m->normed, p + i * C, NULL, w.ln1w, w.ln1b, tokens, m->net.C, m->net.grid);
        for (int j = 0; j < stretches; j++) {
            size_t row = j * C + g.channel;
            matmul_forward(qkv + j*rows, m->normed, w.qkvw + row * C, w.qkvb + row, tokens, m->net.C, rows,
                           g.width);
        }
    }
}

// LN1's backward pass is linear in its gradient: it takes what each stretch gives it.
static void qkv_backward(Model *m, int l, const stream_t *p, real_t *dp, Chunk c, Group g) {
    const Config *net = &m->net;
    const Tensors w = tensors_at(net, m->params, l), d = tensors_at(net, m->grads, l);
    int n = c.tokens, slice = slice_of(m, n), stretches = stretches_of(m, g), rows = g.width / stretches;
    size_t C = net->C;
    for (int i = 0; i < n; i += slice) {
        int tokens = smaller_of(slice, n - i);
        const act_t *dqkv = m->wide + (size_t)i * g.width;
        const stream_t *from = p + i * C;
        real_t *to = dp + i * C;
        if (!c.fresh) layernorm_forward(m->normed, from, NULL, w.ln1w, w.ln1b, tokens, net->C, net->grid);
        for (int j = 0; j < stretches; j++) {
            size_t row = j * C + g.channel;
            matmul_backward(m->out, d.qkvw + row * C, d.qkvb + row, dqkv + j*rows, m->normed,
                            w.qkvw + row * C, NULL, tokens, net->C, rows, g.width);
            layernorm_backward(to, NULL, d.ln1w, d.ln1b, m->out, from, NULL, w.ln1w, tokens, net->C,
                               net->grid);
        }
    }
}

// The gradient goes to c.attn, which is read no more: where there are slices, that in attn is there too.
static act_t *atty_backward(Model *m, int l, Chunk c) {
    const Tensors w = tensors_at(&m->net, m->params, l), d = tensors_at(&m->net, m->grads, l);
    const act_t *atty = internals_of(m, c).atty;
    int C = m->net.C, n = c.tokens, slice = slice_of(m, n);
    for (int i = 0; i < n; i += slice) {
        int tokens = smaller_of(slice, n - i);
        size_t at = (size_t)i * C, bytes = (size_t)tokens * C * sizeof(act_t);
        const act_t *dattn = slice < n ? c.attn + at : m->dforce;
        act_t *to = slice < n ? m->out : c.attn;
        matmul_backward(to, d.attprojw, d.attprojb, dattn, atty + at, w.attprojw, NULL, tokens, C, C, C);
        if (slice < n) device_copy(c.attn + at, to, bytes);
    }
    return c.attn;
}

// What a gradient inside the block is at its widest: the MLP's of a slice, or attention's of a group of heads
static size_t wide_size(const Model *m, size_t n) {
    size_t C = m->net.C, hs = C / m->net.NH, mlp = 4*C * slice_of(m, (int)n);
    return m->training * larger_of(mlp, 3*hs * group_of(m) * n);
}
static size_t block_scratch_bytes(const Config *net, int n) {
    return layers_scratch_bytes(n, net->C, 4 * net->C, net->NH);
}

// Flops a token of the halves given, forward or back: a causal product of attention is C T / 2 multiply-adds,
// of which there are two forward and five back.
static double block_flops(const Config *net, int T, int halves, int back) {
    double C = net->C, products = 0, attention = 0;
    if (halves & ATTN) {
        products += 8 * C * C;
        attention = C * T;
    }
    if (halves & MLP) products += 16 * C * C;
    return back ? 2 * products + 5 * attention : products + 2 * attention;
}
// What the adjoint of attention makes again: the qkv of all groups but the last
static double group_flops(const Model *m) {
    int last = (m->net.NH - 1) / group_of(m) * group_of(m);
    return 6.0 * m->net.C * m->net.C * last / m->net.NH;
}
static double head_flops(const Config *net) { return 2.0 * net->C * net->Vp; }

enum { BLOCK_KIND = 0 };  // slot 14 of model files
#define BLOCK_NAME "gpt2"
#define BLOCK_OPTIONS                            // the block's own flags
#define block_flags(net, was) ((void)0)          // sets what they say
#define block_read(net, header, path) ((void)0)  // takes the block's fields from a model file, checked
#define block_text(net) ""                       // prints them
#define BLOCK_SIZES "d6 d12 d24 d36 d48"  // what -e names: context, V, L, NH, C
static const struct { const char *name; int sizes[5], block[6]; } block_sizes[] = {
    {"d6", {1024, 50257, 6, 6, 384}, {0}}, {"d12", {1024, 50257, 12, 12, 768}, {0}},
    {"d24", {1024, 50257, 24, 16, 1024}, {0}}, {"d36", {1024, 50257, 36, 20, 1280}, {0}},
    {"d48", {1024, 50257, 48, 25, 1600}, {0}}};
#define BLOCK_DEFAULT "d12"

// ==== end of GPT-2's block, the second time ==============================================================
#endif

// ---- planes: p_{k+1} takes the place of p_{k-1}; where that is wanted still, it has one of its own

static int keeps_plane(const Model *m, int k) {
    return !undoes_steps(m) || coefficients(&m->net, k).alpha == 0;
}

static size_t planes_before(const Model *m, int k) {  // how many of the first k steps keep theirs
    size_t count = 0;
    for (int j = 0; j < k; j++) count += keeps_plane(m, j);
    return count;
}

// Where p_k lies: in the place of p_{k-2}, and so on down to one that has its own, or to p_0 or p_{-1}
static stream_t *plane_of(const Model *m, int k) {
    for (; k > 0; k -= 2)
        if (m->kept_planes && keeps_plane(m, k - 1))
            return m->kept_planes + planes_before(m, k - 1) * plane_size(m);
    return m->planes[k + 1];
}

// Whether p_{-1} and p_0, which are the same x, share a plane: where p_1 has its own, or goes in their place
static int begins_in_one_plane(const Model *m) {
    return m->net.mode == BASELINE || (m->training && keeps_plane(m, 0));
}

static void stand_at(Model *m, int k) {
    m->prev = plane_of(m, k - 1);
    m->cur = plane_of(m, k);
    m->next = k < steps(&m->net) ? plane_of(m, k + 1) : NULL;
}

// The model for a forward pass, maybe of another shape, that nothing comes back from. There p_1 takes the
// place of p_{-1}; where that shares p_0's, it is dcur, which is idle until a backward pass begins.
static Model forward_only(const Model *m) {
    Model own = *m;
    own.kept_planes = NULL;
    own.low = NULL;
    if (m->net.mode != BASELINE && m->planes[0] == m->planes[1]) own.planes[0] = (stream_t *)m->dcur;
    return own;
}

// ---- internals: of every chunk of the last steps, and of one chunk of the others at a time

static int keeps_internals(const Model *m, int k) { return k >= steps(&m->net) - m->kept_steps; }

static int slice_of(const Model *m, int n) { return m->slice > 0 ? smaller_of(m->slice, n) : n; }
static int group_of(const Model *m) { return m->group > 0 ? smaller_of(m->group, m->net.NH) : m->net.NH; }

// Which halves' outputs lie behind an evaluation's internals. Where it is kept, those that undo the step, or
// attn, if LN2 reads it; where it is not, attn, which is evaluated for all slices at once.
static int outputs_of(const Model *m, int halves, int kept) {
    if (!kept) return halves & ATTN;
    if (undoes_steps(m)) return halves;
    return halves == BLOCK ? ATTN : 0;
}
static size_t output_bytes(const Model *m, size_t n) { return round256(n * m->net.C * sizeof(act_t)); }

static size_t evaluation_bytes(const Model *m, int halves, size_t n, int kept) {
    int outputs = outputs_of(m, halves, kept);
    size_t rows = ((outputs & ATTN) != 0) + ((outputs & MLP) != 0);
    return internals_bytes(m, halves, n, kept, NULL) + rows * output_bytes(m, n);
}

// Lets the chunk's evaluation, of these halves, begin at `at`.
static void place_evaluation(const Model *m, Chunk *c, char *at, int halves, int kept) {
    size_t n = (size_t)c->sequences * m->T, before = (size_t)c->from * m->net.C;
    int outputs = outputs_of(m, halves, kept);
    char *attn = at + internals_bytes(m, halves, n, kept, NULL), *mlp = attn;
    if (outputs & ATTN) mlp += output_bytes(m, n);
    else attn = m->internals;  // where nothing is kept
    c->internals = at;
    c->kept = kept;
    if (halves & ATTN) c->attn = (act_t *)attn + before;
    if (halves & MLP) c->mlp = outputs & MLP ? (act_t *)mlp + before : m->out;
}

static size_t cache_size(const Model *m) { return m->cache_tokens * cache_width(&m->net); }

static size_t step_bytes(const Model *m, int k, size_t n, int kept) {
    return evaluation_bytes(m, halves_of(&m->net, k), n, kept) + estimate_bytes(m, k, n, kept);
}

static size_t kept_bytes(const Model *m, int k, int sequences) {  // internals of step k, of the first ones
    size_t whole = sequences / m->chunk, rest = sequences % m->chunk, T = m->T;
    return whole * step_bytes(m, k, m->chunk * T, 1) + step_bytes(m, k, rest * T, 1);
}

static void place_internals(const Model *m, int k, Chunk *c) {
    const Config *net = &m->net;
    int kept = keeps_internals(m, k);
    char *at = kept ? m->kept_internals : m->internals;
    for (int j = steps(net) - m->kept_steps; j < k; j++) at += kept_bytes(m, j, m->B);
    if (kept) at += kept_bytes(m, k, c->b);
    place_evaluation(m, c, at, halves_of(net, k), kept);
    if (m->cache) c->cache = m->cache + evaluations(net, k) * cache_size(m);
}

// ---- the plan

static void add_buffer(Model *m, int row, void *at, size_t count, size_t size) {
    const Buffer b = {row, at, round256(count * size)};
    if (b.bytes > 0) m->buffers[m->buffer_count++] = b;
}

static void plan(Model *m) {
    const Config *net = &m->net;
    size_t C = net->C, N = (size_t)m->B * m->T, P = parameter_count(net), two = net->mode != BASELINE;
    size_t n = (size_t)m->chunk * m->T, slice = slice_of(m, (int)n), H = m->head_chunk;
    size_t training = m->training != 0, teacher = m->has_teacher != 0, back = training && undoes_steps(m);
    if (m->memory != AUTO || !training) m->kept_steps = training && m->memory == STORE ? steps(net) : 0;
    m->buffer_count = 0;
    add_buffer(m, PARAMETERS, &m->params, P, sizeof(param_t));
    add_buffer(m, PARAMETERS, &m->weight_copy, P, weight_copy_bytes);
    add_buffer(m, TEACHER, &m->teacher, teacher * P, sizeof(param_t));
    add_buffer(m, TEACHER, &m->teacher_copy, teacher * P, weight_copy_bytes);
    add_buffer(m, GRADIENTS, &m->grads, training * P, sizeof(real_t));
    add_buffer(m, GRADIENTS, &m->sum, training * sum_size(m), sizeof(real_t));
    add_buffer(m, OPTIMIZER, &m->m, training * shard_size(net), sizeof(real_t));
    add_buffer(m, OPTIMIZER, &m->v, training * shard_size(net), sizeof(real_t));
    add_buffer(m, DATA, &m->inputs, N, sizeof(int));
    add_buffer(m, DATA, &m->targets, N, sizeof(int));
    add_buffer(m, DATA, &m->order, training, layers_order_bytes((int)N));
    add_buffer(m, DATA, &m->losses, teacher ? METRICS * N : N, sizeof(real_t));
    add_buffer(m, STREAMS, &m->planes[1], N*C, sizeof(stream_t));
    add_buffer(m, STREAMS, &m->dcur, training * N*C, sizeof(real_t));
    add_buffer(m, STREAMS, &m->planes[0], !begins_in_one_plane(m) * N*C, sizeof(stream_t));
    add_buffer(m, STREAMS, &m->dprev, two * training * N*C, sizeof(real_t));
    if (net->mode == MIDPOINT_A && net->grid) add_buffer(m, STREAMS, &m->remainders, N*C, sizeof(uint16_t));
    if (!training || !two) add_buffer(m, STREAMS, &m->teacher_cur, teacher * N*C, sizeof(stream_t));
    add_buffer(m, KEPT, &m->kept_planes, training * planes_before(m, steps(net)) * N*C, sizeof(stream_t));
    add_buffer(m, KEPT, &m->low, back * low_words(m), sizeof(uint32_t));
    size_t kept = 0, inside = teacher * evaluation_bytes(m, BLOCK, n, 0);
    if (net->mode == HAMILTONIAN) inside = larger_of(inside, output_bytes(m, n));  // for attn alone
    for (int k = 0; k < steps(net); k++) {
        // estimates are done with before the step's own evaluation, or begin after it: they share a place
        size_t one = larger_of(evaluation_bytes(m, halves_of(net, k), n, 0), estimate_bytes(m, k, n, 0));
        if (keeps_internals(m, k)) kept += kept_bytes(m, k, m->B);
        else inside = larger_of(inside, one);
    }
    add_buffer(m, KEPT, &m->kept_internals, kept, 1);
    add_buffer(m, WORKSPACE, &m->internals, inside, 1);
    add_buffer(m, WORKSPACE, &m->normed, slice*C, sizeof(act_t));
    add_buffer(m, WORKSPACE, &m->out, slice*C, sizeof(act_t));
    add_buffer(m, WORKSPACE, &m->dforce, training * slice*C, sizeof(act_t));
    add_buffer(m, WORKSPACE, &m->wide, wide_size(m, n), sizeof(act_t));
    if (net->mode == RETROFIT) add_buffer(m, WORKSPACE, &m->destimate, training * n*C, sizeof(real_t));
    size_t cached = evaluations(net, steps(net)) * cache_size(m);
    if (!training) add_buffer(m, WORKSPACE, &m->cache, cached, sizeof(act_t));
    size_t scratch = layers_scratch_bytes(m->head_chunk, net->C, net->Vp, 0);
    add_buffer(m, WORKSPACE, &m->scratch, larger_of(scratch, block_scratch_bytes(net, (int)n)), 1);
    add_buffer(m, HEAD, &m->head_normed, H*C, sizeof(act_t));
    add_buffer(m, HEAD, &m->head_dnormed, training * H*C, sizeof(act_t));
    add_buffer(m, HEAD, &m->logits, H * net->Vp, sizeof(act_t));
    add_buffer(m, HEAD, &m->teacher_logits, teacher * H * net->Vp, sizeof(act_t));
}

static size_t plan_bytes(const Model *m, int row) {
    size_t bytes = 0;
    for (const Buffer *b = m->buffers; b < m->buffers + m->buffer_count; b++)
        if (row == b->row || row == TOTAL || (row == ACTIVATIONS && b->row >= STREAMS)) bytes += b->bytes;
    return bytes;
}

// The bytes in all of the plan that keeps the internals of the last `kept_steps`
static double plan_keeping(Model *m, int kept_steps) {
    m->kept_steps = kept_steps;
    plan(m);
    return (double)plan_bytes(m, TOTAL);
}

// The plan; under AUTO it keeps the internals of as many of the last steps as `budget` bytes in all have room
// for. Returns 0 if they have not even room for none, which is planned then.
static int plan_within(Model *m, double budget) {
    int fits = 0, too_many = steps(&m->net) + 1;
    while (too_many - fits > 1) {
        int half = (fits + too_many) / 2;
        if (plan_keeping(m, half) <= budget) fits = half;
        else too_many = half;
    }
    return plan_keeping(m, fits) <= budget;
}

static void plan_print(const Model *m) {
    for (int row = 0; row < ROWS; row++) {
        size_t bytes = plan_bytes(m, row);
        printf("%-12s %15zu  (%.3f GiB)\n", row_names[row], bytes, (double)bytes / (1 << 30));
    }
}

static void model_free(Model *m) {
    for (int i = 0; i < m->buffer_count; i++) {
        void *p;
        memcpy(&p, m->buffers[i].at, sizeof p);
        device_free(p);
    }
}

static void model_alloc(Model *m) {
    size_t needed = plan_bytes(m, TOTAL), there = device_memory_bytes() / ranks_here;
    for (int i = 0; i < m->buffer_count; i++) {
        void *p = needed <= there ? device_alloc(m->buffers[i].bytes) : NULL;
        if (!p) die(STATUS_NUMBERS, "out of memory: %.3f GiB are needed, the machine has %.3f; --plan shows "
            "for what, and a smaller %s or -t needs less", (double)needed / (1 << 30),
            (double)there / (1 << 30), m->memory == AUTO ? "--budget, -b" : "-b");
        memcpy(m->buffers[i].at, &p, sizeof p);
    }
    if (begins_in_one_plane(m)) m->planes[0] = m->planes[1];
    if (m->net.mode == BASELINE) m->dprev = m->dcur;
    layers_begin(m->scratch);
}

// -------------------------------------------------------------------------------------------------
// Part III: conversions. A pretrained baseline's weights in a recurrence near the one they were trained in:
// BDIA of Zhang, Lewis & Kleijn, "On Exact Bit-level Reversible Transformers", 2024; and the paper's
// retrofit. Both take the true p_{k-1}, as (4.3) has it: with an estimate there, as (4.5) is printed, a step
// could not be undone.

static int converted(int mode) { return mode == RETROFIT || mode == BDIA; }
static int has_step_size(int mode) { return mode != BASELINE && !converted(mode); }

// A conversion's grid is found in its text (find_grid); where there is none it is that of SmolLM2-135M.
static const int default_grids[MODES] = {0, 20, 20, 20, 20, 14, 14};
enum { GRID_AUTO = 31 };

static int is_ordinary(const Config *net, int k) {
    return k < MAX_ORDINARY && (net->ordinary[k / 32] >> k % 32 & 1);
}
// Makes steps `from` to `end` - 1 ordinary.
static void keep_ordinary(Config *net, int from, int end) {
    for (int k = from; k < smaller_of(end, MAX_ORDINARY); k++) net->ordinary[k / 32] |= 1u << k % 32;
}
static int converted_before(const Config *net, int k) {  // how many of the first k steps are not ordinary
    int count = k;
    for (int j = 0; j < k; j++) count -= is_ordinary(net, j);
    return count;
}
static int stem_of(const Config *net) {  // n, if just the first n steps are ordinary, or else -1
    int n = 0;
    while (is_ordinary(net, n)) n++;
    return converted_before(net, MAX_ORDINARY) == MAX_ORDINARY - n ? n : -1;
}

static int ordinary_fits(const Config *net) {  // retrofit's step 0 has no block before it; L is the end
    int L = smaller_of(net->L, MAX_ORDINARY), beyond = MAX_ORDINARY - L;
    if (net->mode == RETROFIT && !is_ordinary(net, 0)) return 0;
    return converted_before(net, MAX_ORDINARY) - converted_before(net, L) == beyond;
}

static void set_mode(Config *net, int mode) {
    // of bdia what gives most for its bytes (dev/measure/pretrained.md)
    const int shifts[MODES] = {0, 0, 4, 0, 0, 4, 6}, stems[MODES] = {0, 0, 0, 0, 0, 2, 1};
    const double h[MODES] = {1, 0.25, 1, 1 / sqrt(net->L), 1, 1, 1};
    net->mode = mode;
    net->h = (float)h[mode];
    net->grid = default_grids[mode];
    net->shift = shifts[mode];
    net->a[0] = (mode == RETROFIT) - (mode == BDIA);  // retrofit is nearer with a > 0, bdia with a < 0
    net->K = mode == RETROFIT;
    memset(net->ordinary, 0, sizeof net->ordinary);
    keep_ordinary(net, 0, smaller_of(stems[mode], net->L));
}

// ---- retrofit's estimates. Its force is F_k(p_k), and a times block k-1 at the last of p^_1 = p_k and
// p^_{e+1} = p_k - f_{k-1}(p^_e) (4.7), e = 1 .. K+1. The step takes both terms one after the other.

static int has_estimate(const Config *net, int k) { return net->mode == RETROFIT && !is_ordinary(net, k); }

static int evaluations(const Config *net, int k) {
    return layer_of(net, k) + (net->mode == RETROFIT ? converted_before(net, k) * (net->K + 1) : 0);
}

// Whether a step's evaluations for estimates share a place: where sequences go in slices, to save memory. All
// but the last are made again then, going back.
static int estimates_share(const Model *m, int kept) { return !kept && m->slice > 0; }

static size_t estimate_bytes(const Model *m, int k, size_t n, int kept) {
    size_t K = m->net.K, plane = round256(n * m->net.C * sizeof(stream_t));
    if (!has_estimate(&m->net, k)) return 0;
    return (estimates_share(m, kept) ? 1 : K + 1) * evaluation_bytes(m, BLOCK, n, kept) + K * plane;
}

// One evaluation for the estimates: at p it makes the next, to = p_k - f(p). The last adds the second term to
// the stream, to += a f(p).
typedef struct { Chunk c; stream_t *p, *to; Coefficients step; } Estimate;

// The e-th of step k, of chunk c. Behind the step's own evaluation, if that is kept, or in its place lie the
// estimates, then their evaluations.
static Estimate estimate_of(const Model *m, int k, int e, Chunk c) {
    const Coefficients step = coefficients(&m->net, k), next = {0, 1, 0, -1};
    int kept = keeps_internals(m, k), before = estimates_share(m, kept) ? 0 : e - 1;
    size_t C = m->net.C, n = (size_t)c.sequences * m->T, K = m->net.K;
    size_t bytes = evaluation_bytes(m, BLOCK, n, kept), plane = round256(n * C * sizeof(stream_t));
    char *planes = c.internals + kept * bytes, *at = planes + K * plane + before * bytes;
    Estimate x = {c, m->cur + c.at, m->next + c.at, {1, 0, 0, ldexp(step.alpha, -step.shift)}};
    if (e > 1) x.p = (stream_t *)(planes + (e - 2) * plane) + c.from * C;
    if (e <= m->net.K) {
        x.to = (stream_t *)(planes + (e - 1) * plane) + c.from * C;
        x.step = next;
    }
    place_evaluation(m, &x.c, at, BLOCK, kept);
    if (c.cache) x.c.cache += e * cache_size(m);
    return x;
}

static void estimate_move(const Model *m, Estimate x, int direction) {
    const Chunk c = x.c;
    stream_step(x.to, x.to, m->cur + c.at, c.attn, c.mlp, NULL, NULL, c.count, x.step, m->net.grid,
                direction);
}

// Evaluates for the first `count` estimates of chunk c's sequences, a slice at a time.
static void estimate_evaluate(Model *m, int k, Chunk c, int count) {
    for (int e = 1; e <= count; e++)
        for (Chunk s = chunk_at(m, k, c.b * m->T); s.tokens > 0 && s.b == c.b; s = chunk_after(m, k, s)) {
            Estimate x = estimate_of(m, k, e, s);
            force_forward(m, k - 1, x.p, x.c);
            estimate_move(m, x, +1);
        }
}

static void estimate_forward(Model *m, int k, Chunk c) {
    if (is_last_slice(m, c)) estimate_evaluate(m, k, c, m->net.K + 1);
}

// The second term goes back before F_k(p_k). With v_e = dloss/dp^_e,
//     v_{K+1} = J^T (a dp_{k+1});     v_e = -J^T v_{e+1};     dp_k += every v
static void estimate_back(Model *m, int k, Chunk c) {
    const int last = m->net.K + 1, again = !keeps_internals(m, k), share = estimates_share(m, !again);
    if (c.from > 0) return;
    if (again) estimate_evaluate(m, k, c, m->net.K);
    for (int e = last; e >= 1; e--) {
        for (Chunk s = chunk_at(m, k, c.b * m->T); s.tokens > 0 && s.b == c.b; s = chunk_after(m, k, s)) {
            Estimate x = estimate_of(m, k, e, s);
            real_t *v = m->destimate + (size_t)s.from * m->net.C;
            const real_t *dto = e == last ? m->dprev + s.at : v;
            if (again && (e == last || share)) force_forward(m, k - 1, x.p, x.c);
            if (e == last && undoes_steps(m)) estimate_move(m, x, -1);
            scale_cast(m->dforce, dto, x.step.gamma, s.count);
            device_zero(v, s.count * sizeof(real_t));
            force_backward(m, k - 1, x.p, v, x.c);
        }
        Chunk all = all_slices(m, c);
        adjoint_update(m->dcur + all.at, m->destimate, 1, 1, all.count);
    }
}

// ---- what multiplying by another alpha drops. Conversions have one a = n/2^shift, n odd, and keep the low
// bits of each step: word b of 32 elements holds bit b of each. midpoint-a has one stack of remainders.

// s * n/16 for n > 0; the remainder goes on top of the stack *r, so nothing is lost (Maclaurin, Duvenaud &
// Adams 2015, section 3). remainders_fit sees to it that 16 bits are enough.
DEVICE static inline int64_t multiply_sixteenths(int64_t s, int n, uint16_t *r) {
    uint32_t stack = *r * 16u + (uint32_t)(s & 15);
    *r = (uint16_t)(stack / (uint32_t)n);
    return (s >> 4) * n + stack % (uint32_t)n;
}
DEVICE static inline int64_t unmultiply_sixteenths(int64_t s, int n, uint16_t *r) {
    int64_t quotient = s / n - (s % n < 0), digit = s - quotient * n;
    uint32_t stack = *r * (uint32_t)n + (uint32_t)digit;
    *r = (uint16_t)(stack >> 4);
    return quotient * 16 + (stack & 15);
}

// Whether 16 bits hold the deepest stack of remainders that multiplying by a_0, a_1, ... can pile up
static int remainders_fit(const Config *net) {
    uint64_t bound = 0;
    for (int k = 0; k < net->L; k++) {
        if (net->a[k] == 0 || net->a[k] < -255 || net->a[k] > 255) return 0;
        bound = (16 * bound + 15) / (uint64_t)abs(net->a[k]);
        if (bound >= 65536) return 0;
    }
    return 1;
}

// What multiply made t of, given its low bits. Dividing as real numbers is exact here, and vectors can do it.
// A flipped bit may leave what n does not divide: the remainder is added, so that the drift shows it.
DEVICE static inline int64_t unmultiply(int64_t t, int n, int shift, uint32_t low) {
    int64_t high = t - multiply((int64_t)low, n, shift);  // n times the higher bits
    int64_t quotient = (int64_t)((double)high / n);
    return quotient * (1 << shift) + low + (high - quotient * n);
}

static size_t words_of_step(const Model *m, size_t tokens) {  // for one step of so many, a slice at a time
    size_t C = m->net.C, slice = slice_of(m, m->chunk * m->T), shift = m->net.shift;
    return tokens / slice * ((slice * C + 31) / 32 * shift) + (tokens % slice * C + 31) / 32 * shift;
}

// How many words there are before step k's, for the chunk from token `from` of sequence b on
static size_t words_before(const Model *m, int k, int b, int from) {
    size_t T = m->T, whole = words_of_step(m, m->chunk * T);
    size_t step = m->B / m->chunk * whole + words_of_step(m, m->B % m->chunk * T);
    size_t before = converted_before(&m->net, k) * step;
    return before + b / m->chunk * whole + words_of_step(m, from);
}
static size_t low_words(const Model *m) {
    return converted(m->net.mode) && m->net.grid ? words_before(m, steps(&m->net), 0, 0) : 0;
}
static uint32_t *low_bits(const Model *m, int k, Chunk c) {
    if (!m->low || is_ordinary(&m->net, k)) return NULL;
    return m->low + words_before(m, k, c.b, c.from);
}

// ---- the teacher: what the network was before, another model in the same memory

// beside a teacher's logits (n, Vp): to out (METRICS, stride) go each token's metrics. Then logits are
// overwritten by the gradient of the divergence times scale, if scale is not 0
void distillation(real_t *out, size_t stride, act_t *logits, const act_t *teacher, const int *targets,
                  int n, int V, int Vp, int objective, double scale);

static Model teacher_of(const Model *m) {
    Model t = forward_only(m);
    set_mode(&t.net, BASELINE);
    t.kept_steps = 0;
    t.remainders = NULL;
    t.params = m->teacher;
    t.weight_copy = m->teacher_copy;
    // dprev is idle until the head is done; which of two buffers that is changes with every step back
    t.cur = m->teacher_cur ? m->teacher_cur : (stream_t *)m->dprev;
    t.planes[0] = t.planes[1] = t.cur;
    t.logits = m->teacher_logits;
    return t;
}

static void teacher_forward(const Model *m) {
    Model teacher = teacher_of(m);
    forward(&teacher);
}

static void distill(Model *m, int i, int n, double scale) {
    Model teacher = teacher_of(m);
    double of_divergence = m->objective == CROSS_ENTROPY ? 0 : scale;
    head_logits(&teacher, i, n);  // before ours, which is to be left in head_normed
    head_logits(m, i, n);
    distillation(m->losses + i, (size_t)m->B * m->T, m->logits, m->teacher_logits, m->targets + i, n,
                 m->net.V, m->net.Vp, m->objective, of_divergence);
    if (m->objective == CROSS_ENTROPY)
        classifier(m->losses + i, m->logits, m->targets + i, n, m->net.V, m->net.Vp, scale);
}

// -------------------------------------------------------------------------------------------------
// Part IV: training

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <glob.h>
#include <inttypes.h>
#include <signal.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#ifndef DEFAULT_PRECISION
#define DEFAULT_PRECISION "float32"
#endif
static const char *const mode_names[] = {
    "baseline", "midpoint", "midpoint-a", "leapfrog", "hamiltonian", "retrofit", "bdia", NULL};
static const char *const memory_names[] = {"store", "checkpoint", "reverse", "auto", NULL};
static const char *const objective_names[] = {"cross-entropy", "kl", "kl-teacher", NULL};
static const char *const precision_names[] = {"float32", "bf16", NULL};

void device_finish(void);          // waits until all that was asked for is done
void to_device(void *dst, const void *src, size_t bytes);
size_t device_peak_bytes(void);    // the most this process has held
double device_flops(void);         // measured limit, FLOP/s of all cores
double device_fastest(void);       // FLOP/s of the fastest product so far
const char *device_products(void);  // what they are made of now: another kind gives other bits
// The bits, but for the sign, of the largest that went into integer streams since it was last asked; 32 if
// something was NaN or had no place.
int stream_take_reach(void);
int layers_bf16(int on);           // products round operands to bf16, but for a row or two; whether they can
// ends the program, and says why, where so many sequences at a time, or channels, are too much
void layers_check(int sequences, int C, int NH);
void layers_order(void *order, const int *tokens, int n);  // for embed_backward; tokens are in host memory
// Tensors are summed and updated in pieces of so many elements, counted from each one's start: who owns some
// of them gets the bits of who owns all.
enum { PIECE = 4096 };
// sums, in host memory: of the squares of each piece of x (count)
void squares(double *sums, const real_t *x, size_t count);
void add_gradients(real_t *sum, const real_t *g, size_t count);  // sum += g
// one step of AdamW (t = 1, 2, ...) with the gradient times scale
void adamw(param_t *p, const real_t *g, real_t *m, real_t *v, size_t count, double rate, double beta1,
           double beta2, double decay, double scale, int t);

static const char *program = "train_rev_gpt2";  // its name, and maybe more after a space
static void (*last_words)(const char *line, int status);  // those of one of several ranks, which end all
static void die(int status, const char *format, ...) {
    char line[2 * 4096];
    va_list args;
    va_start(args, format);
    vsnprintf(line, sizeof line, format, args);
    va_end(args);
    for (char *c = line; *c; c++)
        if ((unsigned char)*c < 32 || *c == 127) *c = '?';  // a file's name may hold anything
    if (last_words) last_words(line, status);
    fprintf(stderr, "%.*s: %s\n", (int)strcspn(program, " "), program, line);
    exit(status);
}

static double seconds(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

// make PROFILE=1 puts dev/bench/profile.h here, which times the layer functions; else nothing does.
#ifdef REV_GPT2_PROFILE
#include REV_GPT2_PROFILE
#else
#define PROFILE_OPTION
#define profile(name, flops, bytes) ((void)(flops), (void)(bytes))
#define profile_step(begins)
#define profile_print(m, flops_limit)
#endif

// ---- lanes and shards

// The gradient of a step is a sum of lanes, each the gradient of some neighbouring micro-batches, added in
// their order. The elements of all tensors are shards, one for each rank, which sums and updates its own.

static size_t pieces_in(size_t count) { return (count + PIECE - 1) / PIECE; }

// Where the shard of rank r begins: every rank has as many pieces, or one more.
static size_t shard_begin(const Config *net, int r) {
    size_t all[TENSORS], at = 0, pieces = 0;
    tensor_sizes(net, all);
    for (int i = 0; i < TENSORS; i++) pieces += pieces_in(all[i]);
    size_t before = pieces * r / ranks;
    for (int i = 0; i < TENSORS; at += all[i++]) {
        if (before < pieces_in(all[i])) return at + before * PIECE;
        before -= pieces_in(all[i]);
    }
    return at;
}
static size_t shard_size(const Config *net) { return shard_begin(net, rank + 1) - shard_begin(net, rank); }

// The sum: a buffer of its own, or where ranks have a lane each, the shard's place in the gradients.
static size_t sum_size(const Model *m) { return m->lanes > ranks ? shard_size(&m->net) : 0; }
static real_t *sum_of(const Model *m) { return m->sum ? m->sum : m->grads + shard_begin(&m->net, rank); }

// Adds what `count` lanes have of the shard's elements from `at` on (n), in their order; the first ones begin
// the sum, and the first of these may be overwritten.
static void add_lanes(const Model *m, real_t *const *lanes, int count, size_t at, size_t n, int begin) {
    real_t *sum = sum_of(m) + at, *so_far = begin ? lanes[0] : sum;
    for (int i = begin; i < count; i++) add_gradients(so_far, lanes[i], n);
    if (so_far != sum) device_copy(sum, so_far, n * sizeof(real_t));
}

// ---- ranks share the lanes of a step. All have all parameters, and each alone the moments of its shard.
// `make MPI=1` and NCCL=1 put a file of dev/ranks here; else there is one rank, which has nobody to ask.
#ifdef REV_GPT2_RANKS
#include REV_GPT2_RANKS
#else
#define RANKS_OPTION
#define ranks_compare(argc, argv) ((void)0)  // ends all where one runs another program, or with other flags
#define ranks_same(what, text) ((void)text)  // or does not have the same text as rank 0
#define ranks_same_files(files) ((void)0)    // or the same files, a glob_t
#define ranks_combine(x, count) ((void)0)    // in host memory: adds up numbers: one rank's and 0s, or whole
#define ranks_broadcast(x, bytes) ((void)0)  // in host memory: gives all what rank 0 has
#define ranks_spread(params, net) ((void)0)  // in device memory: gives all what rank 0 has
#define ranks_gather(params, net) ((void)0)  // gives all the shards that each has
#define all_moments(m, own) (own)            // where those of all shards have their place
#define gather_moments(m, own) ((void)0)     // brings them there
#define scatter_moments(m, own) ((void)0)    // gives each its shard of what rank 0 has there
#define ranks_end() ((void)0)
static int any_rank(int here) { return here; }  // whether it is so on any rank
static void ranks_begin(void) {              // a process knows which it is
    static const char *const sizes[] = {"OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS"};
    const char *size = NULL;
    for (int i = 0; i < 3 && !size; i++) size = getenv(sizes[i]);  // the nearest launcher knows
    if (size && atoi(size) > 1) die(STATUS_USAGE, "one of %s processes that would not share anything: "
        "`make -B MPI=1` or NCCL=1 builds what does", size);
}
// adds lanes `lane`, lane + 1 and so on, of which each rank has one now, to the sum
static void ranks_exchange(Model *m, int lane) {
    add_lanes(m, &m->grads, 1, 0, parameter_count(&m->net), lane == 0);
}
#endif

// ---- losses

static void *host_alloc(size_t count, size_t size, const char *what) {  // zeroed
    void *p = calloc(count * size, 1);
    if (!p) die(STATUS_NUMBERS, "out of memory for %zu %s", count, what);
    return p;
}
static double *doubles(size_t count) { return (double *)host_alloc(count, sizeof(double), "numbers"); }

// A metric of each of the batch's tokens, to values. It waits for all that was asked for before.
static void read_metric(double *values, const Model *m, enum Metric metric) {
    size_t N = (size_t)m->B * m->T;
    real_t *of_batch = (real_t *)host_alloc(N, sizeof(real_t), "losses");
    to_host(of_batch, m->losses + metric * N, N * sizeof(real_t));
    for (size_t i = 0; i < N; i++) values[i] = (double)of_batch[i];
    free(of_batch);
}

// Over all tokens of the batch, of which those that do not count have 0
static double mean_of(const Model *m, enum Metric metric) {
    size_t N = (size_t)m->B * m->T;
    double *values = doubles(N), sum = 0;
    read_metric(values, m, metric);
    for (size_t i = 0; i < N; i++) sum += values[i];
    free(values);
    return sum / (double)N;
}

static double objective_of(const Model *m) {
    return mean_of(m, m->objective == CROSS_ENTROPY ? LOSS : DIVERGENCE);
}

// ---- optimizer

// What this rank's shard has of a tensor, whose `count` elements begin at `at`: how many, and from where on
static size_t own_part(const Config *net, size_t at, size_t count, size_t *from) {
    size_t begin = shard_begin(net, rank), end = shard_begin(net, rank + 1);
    *from = larger_of(at, begin);
    if (at + count < end) end = at + count;
    return end > *from ? end - *from : 0;
}

// The norm of the gradient: sums over pieces, added in their order
static double norm_of(const Model *m) {
    size_t all[TENSORS], at = 0, pieces = 0, from;
    double total = 0;
    const real_t *sum = sum_of(m);
    tensor_sizes(&m->net, all);
    for (int i = 0; i < TENSORS; i++) pieces += pieces_in(all[i]);
    double *sums = doubles(pieces), *next = sums;
    for (int i = 0; i < TENSORS; next += pieces_in(all[i]), at += all[i++]) {
        size_t n = own_part(&m->net, at, all[i], &from);
        if (n) squares(next + (from - at) / PIECE, sum, n);
        sum += n;
    }
    ranks_combine(sums, pieces);
    for (size_t p = 0; p < pieces; p++) total += sums[p];
    free(sums);
    return sqrt(total);
}

// Clips the gradient at norm 1 and takes one step of AdamW; matrices and embeddings decay, gains and biases
// do not. Returns the norm before clipping; if that is not finite, nothing has been changed.
static double update(Model *m, double rate, double beta1, double beta2, double decay, int t) {
    size_t all[TENSORS], at = 0, done = 0, from;
    double norm = norm_of(m), scale = norm > 1 ? 1 / norm : 1;
    if (!isfinite(norm)) return norm;
    tensor_sizes(&m->net, all);
    for (int i = 0; i < TENSORS; at += all[i++]) {
        size_t n = own_part(&m->net, at, all[i], &from);
        if (n) adamw(m->params + from, sum_of(m) + done, m->m + done, m->v + done, n, rate, beta1, beta2,
                     tensor_kinds[i].kind >= MATRIX ? decay : 0, scale, t);
        done += n;
    }
    profile("(exchange)", 0, 0);
    ranks_gather(m->params, &m->net);
    return norm;
}

// Model flops a token, forward and backward with the head
static double flops_per_token(const Model *m) {
    const Config *net = &m->net;
    double forward = block_flops(net, m->T, BLOCK, 0), back = block_flops(net, m->T, BLOCK, 1);
    double head = head_flops(net), teacher = m->has_teacher ? net->L * forward + head : 0;
    return (forward + back) * evaluations(net, steps(net)) + 3 * head + teacher;
}

// What evaluating blocks again adds, for those steps whose internals are not kept
static double flops_again(const Model *m) {
    double flops = 0;
    for (int k = 0; k < steps(&m->net) - m->kept_steps; k++) {
        int halves = halves_of(&m->net, k), K = has_estimate(&m->net, k) ? m->net.K : -1, adjoints = K + 2;
        int times = adjoints + (estimates_share(m, 0) && K > 0 ? K : 0);
        flops += times * block_flops(&m->net, m->T, halves, 0);
        if (halves & ATTN) flops += adjoints * group_flops(m);
    }
    return flops;
}

// ---- random numbers by position, not by state: the i-th of a purpose is a function of (seed, purpose, i):
// any thread can draw any of them, and a resumed run restores nothing.

enum { RANDOM_WEIGHTS, RANDOM_COEFFICIENTS, RANDOM_BATCHES, RANDOM_SAMPLES };
static uint64_t scramble(uint64_t x) {  // the finalizer of splitmix64 (Steele, Lea & Flood 2014)
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9u;
    x = (x ^ x >> 27) * 0x94D049BB133111EBu;
    return x ^ x >> 31;
}
static uint64_t random_bits(uint64_t seed, uint64_t purpose, uint64_t i) {
    return scramble(scramble(scramble(seed + 0x9E3779B97F4A7C15u) + purpose) + i * 0x9E3779B97F4A7C15u);
}
static double random_uniform(uint64_t seed, uint64_t purpose, uint64_t i) {  // [0, 1)
    return (double)(random_bits(seed, purpose, i) >> 11) * 0x1p-53;
}
static double random_normal(uint64_t seed, uint64_t purpose, uint64_t i) {  // Box-Muller
    double r = sqrt(-2 * log(1 - random_uniform(seed, purpose, 2*i)));
    return r * cos(6.283185307179586 * random_uniform(seed, purpose, 2*i + 1));
}

// The a_k of midpoint-a (3.7), rounded to sixteenths, redrawn as a whole until their remainders fit.
static void draw_coefficients(Config *net, uint64_t seed) {
    uint64_t draw = 0;
    if (net->L > 224) die(STATUS_USAGE, "midpoint-a has at most 224 layers, not %d", net->L);
    do {
        for (int k = 0; k < net->L; k++) {
            double sign = random_uniform(seed, RANDOM_COEFFICIENTS, draw++) < 0.5 ? -1 : 1;
            double u = 2 * random_uniform(seed, RANDOM_COEFFICIENTS, draw++) - 1;
            net->a[k] = (int)rint(16 * (sign + 0.5 * u));
        }
    } while (!remainders_fit(net));
}

enum { STAGE = 1 << 14 };
static param_t staging[STAGE];  // host memory for what goes to the device or to a file, a piece at a time
static size_t piece_of(size_t left) { return left < STAGE ? left : (size_t)STAGE; }

// GPT-2's initialization: N(0, 0.02), projections into the streams scaled by 1/sqrt(2L), gains 1, biases 0,
// and 0 in the padding of the vocabulary.
static void init_parameters(Model *m, uint64_t seed) {
    const Config *net = &m->net;
    const double stds[] = {0, 0, 0.02, 0.02 / sqrt(2.0 * net->L), 0.02};  // of GAIN to VOCABULARY
    size_t all[TENSORS], offset = 0;
    tensor_sizes(net, all);
    for (int t = 0; t < TENSORS; offset += all[t++]) {
        int kind = tensor_kinds[t].kind;
        size_t drawn = kind == VOCABULARY ? (size_t)net->V * net->C : all[t];
        for (size_t i = 0; i < all[t]; i += STAGE) {
            size_t n = piece_of(all[t] - i);
            #pragma omp parallel for
            for (size_t j = 0; j < n; j++) {
                double z = i + j < drawn ? random_normal(seed, RANDOM_WEIGHTS, offset + i + j) : 0;
                staging[j] = (param_t)((kind == GAIN) + stds[kind] * z);
            }
            to_device(m->params + offset + i, staging, n * sizeof(param_t));
        }
    }
}

// ---- files that are read: all but texts begin with a header, whose first number is their kind's

enum { MODEL_MAGIC = 20240326, TOKENS_MAGIC = 20240520 };
static int within(int x, int least, int most) { return x >= least && x <= most; }
static int or_else(int flag, int otherwise) { return flag ? flag : otherwise; }       // 0: not given
static int given_or(int flag, int otherwise) { return flag < 0 ? otherwise : flag; }  // -1: not given

// A value that a file has, which is possible
static int checked(const char *path, const char *what, int value, int least, int most) {
    if (!within(value, least, most))
        die(STATUS_DATA, least == most ? "%s: its %s is %d, not %d"
            : "%s: its %s is %d; %d to %d is possible", path, what, value, least, most);
    return value;
}
static void cannot(const char *what, const char *path) {
    die(STATUS_DATA, "cannot %s %s: %s", what, path, strerror(errno));
}

static FILE *open_regular(const char *path, const char *mode) {  // anything else might block, or be harmed
    struct stat st;
    errno = 0;
    FILE *f = stat(path, &st) != 0 || S_ISREG(st.st_mode) ? fopen(path, mode) : NULL;
    if (!f) die(STATUS_DATA, "%s: %s", path, errno ? strerror(errno) : "not a regular file");
    return f;
}

static FILE *open_input(const char *path, int32_t header[256], int magic, const char *what) {
    FILE *f = open_regular(path, "rb");
    if (fread(header, sizeof(int32_t), 256, f) != 256 || header[0] != magic)
        die(STATUS_DATA, "%s: not a %s (256 int32, the first %d)", path, what, magic);
    return f;
}
static size_t size_of(FILE *f, const char *path) {
    struct stat st;
    if (fstat(fileno(f), &st) != 0) cannot("read", path);
    return (size_t)st.st_size;
}
static void check_size(FILE *f, const char *path, size_t bytes) {
    if (size_of(f, path) != bytes) die(STATUS_DATA,
        "%s: %zu bytes, but what its header describes takes %zu", path, size_of(f, path), bytes);
}

// ---- data: shards of tokens, read in order as llm.c does or at random offsets as nanoGPT does

// In a file of documents each has sequences of its own. It begins with end-of-text, goes on from one sequence
// to the next, and more end-of-texts fill its last one; so targets are the inputs moved by one here as well:
// none is of another document. After end-of-text, end-of-text does not count.

enum { GPT2_V = 50257 };  // the vocabulary of files that name none
typedef struct {
    char *path;
    FILE *file;            // NULL while it is closed
    int width;             // bytes a token
    int64_t start, count;  // of the tokens in the file
    int documents, eot;    // how many tokens a sequence of documents has, and end-of-text; or 0
} Shard;
typedef struct { glob_t files; Shard *shards; int open_count, V, documents; } Data;

// Looks into a file, a .txt of bytes or llm.c's tokens. Returns its vocabulary. Slots 4 and 5 of the header,
// which llm.c leaves 0, are documents and eot.
static int shard_check(Shard *s) {
    int32_t header[256];
    size_t length = strlen(s->path);
    if (length > 4 && strcmp(s->path + length - 4, ".txt") == 0) {
        FILE *f = open_regular(s->path, "rb");
        s->width = 1;
        s->count = (int64_t)size_of(f, s->path);
        fclose(f);
        return 256;
    }
    FILE *f = open_input(s->path, header, TOKENS_MAGIC, "token file of llm.c, nor a .txt");
    checked(s->path, "version", header[1], 1, 1);
    s->width = 2;
    s->start = sizeof header;
    s->count = checked(s->path, "number of tokens", header[2], 0, INT32_MAX);
    check_size(f, s->path, sizeof header + 2 * (size_t)s->count);
    fclose(f);
    int V = checked(s->path, "vocabulary", or_else(header[3], GPT2_V), 1, 65536);
    s->documents = checked(s->path, "length of sequences", header[4], 0, 1 << 24);
    if (s->documents) s->eot = checked(s->path, "end-of-text token", header[5], 0, V - 1);
    return V;
}

static void data_open(Data *d, const char *pattern) {
    memset(d, 0, sizeof *d);
    if (glob(pattern, GLOB_NOCHECK, NULL, &d->files) != 0)
        die(STATUS_DATA, "%s: cannot be searched for", pattern);
    if (strpbrk(pattern, "*?[") && strcmp(d->files.gl_pathv[0], pattern) == 0 && access(pattern, F_OK) != 0 &&
        errno == ENOENT) die(STATUS_DATA, "%s: no file's name is of this pattern", pattern);
    d->shards = (Shard *)host_alloc(d->files.gl_pathc, sizeof(Shard), "files of tokens");
    for (size_t i = 0; i < d->files.gl_pathc; i++) {
        Shard *s = &d->shards[i];
        s->path = d->files.gl_pathv[i];
        int V = shard_check(s);
        if (i > 0 && d->V != V)
            die(STATUS_DATA, "%s: vocabulary %d, but %s has %d", s->path, V, d->shards[0].path, d->V);
        if (i > 0 && d->documents != s->documents) die(STATUS_DATA, "%s: documents are cut to %d tokens, but "
            "%s has %d (0: no documents)", s->path, s->documents, d->shards[0].path, d->documents);
        d->V = V;
        d->documents = s->documents;
    }
    ranks_same_files(&d->files);
}

static void shards_close(Data *d) {
    for (size_t i = 0; i < d->files.gl_pathc; i++) {
        if (d->shards[i].file) fclose(d->shards[i].file);
        d->shards[i].file = NULL;
    }
    d->open_count = 0;
}

// A shard is opened when it is read, and stays open until a quarter of all that a process may open are: with
// --shuffle each sequence is of another one, and a network's file system takes its time to open it.
static FILE *shard_file(Data *d, Shard *s) {
    if (s->file) return s->file;
    if (d->open_count >= sysconf(_SC_OPEN_MAX) / 4) shards_close(d);
    d->open_count++;
    return s->file = open_regular(s->path, "rb");
}

static void data_close(Data *d) {
    if (!d->shards) return;
    shards_close(d);
    globfree(&d->files);
    free(d->shards);
}

// How many sequences of T tokens a shard has, and a target after their end: side by side, or at any place
static int64_t sequences_in(const Shard *s, int T, int shuffle) {
    if (s->count <= T) return 0;
    return shuffle && !s->documents ? s->count - T : (s->count - 1) / T;
}
static int64_t sequences_of(const Data *d, int T, int shuffle) {
    int64_t sum = 0;
    for (size_t i = 0; i < d->files.gl_pathc; i++) sum += sequences_in(&d->shards[i], T, shuffle);
    return sum;
}

// Reads so many tokens of a shard from `position` on.
static void read_tokens(Data *d, Shard *s, int64_t position, int *tokens, size_t count) {
    FILE *f = shard_file(d, s);
    fseeko(f, (off_t)(s->start + position * s->width), SEEK_SET);
    for (size_t i = 0; i < count; i++, position++) {
        int low = getc_unlocked(f), high = s->width == 2 ? getc_unlocked(f) : 0;
        if (low == EOF || high == EOF)
            die(STATUS_DATA, "%s: cannot read token %" PRId64 ": was the file cut?", s->path, position);
        tokens[i] = low + 256 * high;
        if (tokens[i] >= d->V) die(STATUS_DATA, "%s: token %" PRId64 " is %d, but the vocabulary has %d",
            s->path, position, tokens[i], d->V);
    }
}

// A batch (B, T) from host memory to where forward, head and backward look for it
static void set_batch(Model *m, const int *inputs, const int *targets) {
    int N = m->B * m->T;
    to_device(m->inputs, inputs, N * sizeof(int));
    to_device(m->targets, targets, N * sizeof(int));
    if (m->order) layers_order(m->order, inputs, N);
}

// The batch whose first sequence has the number `first`, read whole before any of it goes to the device; if m
// has no inputs, none does. Returns how many targets count; the others are -1.
static int data_batch(Data *d, Model *m, uint64_t first, int shuffle, uint64_t seed) {
    int counted = 0;
    uint64_t room = (uint64_t)sequences_of(d, m->T, shuffle), B = (uint64_t)m->B;
    size_t T = m->T, N = m->B * T;
    int *inputs = (int *)host_alloc(2 * N + T + 1, sizeof(int), "numbers of a batch"), *targets = inputs + N;
    int *tokens = targets + N;  // of a sequence, and the one after it
    for (size_t b = 0; b < B; b++) {
        uint64_t number = shuffle ? random_bits(seed, RANDOM_BATCHES, first + b) : first + b;
        int64_t place = (int64_t)(number % room), here;
        Shard *s = d->shards;
        for (; place >= (here = sequences_in(s, m->T, shuffle)); s++) place -= here;
        if (!shuffle || s->documents) place *= m->T;
        read_tokens(d, s, place, tokens, T + 1);
        for (size_t t = 0; t < T; t++) {
            int counts = !s->documents || tokens[t] != s->eot || tokens[t + 1] != s->eot;
            inputs[b * T + t] = tokens[t];
            targets[b * T + t] = counts ? tokens[t + 1] : -1;
            counted += counts;
        }
    }
    if (m->inputs) set_batch(m, inputs, targets);
    free(inputs);
    return counted;
}

// GPT-2's tokens suit models that have some more: a token for padding, or up to a multiple of 128.
static int vocabulary_suits(int of_tokens, int V) {
    return of_tokens == V || (of_tokens == GPT2_V && within(V, GPT2_V, 50304));
}

static void check_vocabulary(const char *path, int of_tokens, int V) {
    if (!vocabulary_suits(of_tokens, V))
        die(STATUS_DATA, "%s: its vocabulary has %d tokens, the model's %d", path, of_tokens, V);
}

static void data_check(const Data *d, const char *pattern, int V, int T) {
    check_vocabulary(pattern, d->V, V);
    if (d->documents && d->documents != T) die(STATUS_DATA, "%s: its documents are cut to sequences of %d "
        "tokens, so -t %d is meant, not %d", pattern, d->documents, d->documents, T);
    if (sequences_of(d, T, 0) == 0)
        die(STATUS_DATA, "%s: too short, no file has the %d tokens that -t %d takes", pattern, T + 1, T);
}

// ---- what the flags of Part V say

static struct {
    const char *train, *val, *out, *start, *tokenizer, *distill, *ordinary;
    int resume, save_every, keep, overfit, layers, heads, channels, context, B, T, tokens, steps, warmup;
    int val_every, val_batches, sample_every, sample_length, seed, mode, fixed_point, stem, objective, memory;
    int precision, stream, grid, chunk, head_chunk, slice, group, lanes;
    int shuffle, save, plan, ranks, help, version;
    double rate, final_fraction, decay, step_size, coefficient, beta1, beta2, budget;
} opt;

// The flags that make the network what it is
static const char *network_flags(const Config *net) {
    enum { FLAG = 40 };  // the bytes of one, at most; a step takes four
    static char text[1400];
    int stem = stem_of(net), begun = 0;
    char *at = text + snprintf(text, FLAG, "--mode %s", mode_names[net->mode]);
    if (has_step_size(net->mode)) at += snprintf(at, FLAG, " --step-size %.9g", (double)net->h);
    if (converted(net->mode)) at += snprintf(at, FLAG, " --coefficient %.9g", ldexp(net->a[0], -net->shift));
    if (converted(net->mode) && stem >= 0) at += snprintf(at, FLAG, " --stem %d", stem);
    for (int k = 0; k < MAX_ORDINARY && stem < 0; k++)
        if (is_ordinary(net, k)) at += snprintf(at, FLAG, begun++ ? ",%d" : " --ordinary %d", k);
    if (net->mode == RETROFIT) at += snprintf(at, FLAG, " --fixed-point %d", net->K);
    if (net->grid == GRID_AUTO) strcpy(at, " --grid auto");
    else snprintf(at, FLAG, net->grid ? " --grid %d" : " --stream float", net->grid);
    return text;
}

// What besides the model shapes a run's arithmetic: it is saved with the state and may not change on
// resuming. The position in data and random numbers follows from the step.
typedef struct {
    int32_t B, T, chunk, head_chunk, accumulate, shuffle, overfit, bf16;
    int32_t mode, seed, precision, objective, teacher, lanes, slice, group;
} Run;

// All that one start of the program works on
typedef struct {
    Model m;
    Data data, val;
    Run run;
    int from, step, total;  // from: the step of the checkpoint, -1 without one; step: how many are done
    int owed;               // whether what follows that step, such as its validation, is still to be done
    int directory;          // -o, locked and open, on rank 0
    FILE *csv;              // log.csv, or NULL
    double limit;           // of the device, FLOP/s: what was measured, or what a product has reached since
} Job;

// ---- files: the model in llm.c's format, the optimizer's state beside it. A file is written aside, synced
// and renamed; the state comes first and the model last, so a model with its state is a complete pair.

enum { STATE_MAGIC = 20251127, STATE_VERSION = 5, PATH = 4096, HEADER_SIZES = 6 };

// The paths of a file in -o, and of a model or state there; each is good until the next call.
static const char *out_path(const char *name) {
    static char path[PATH + 32];
    snprintf(path, sizeof path, "%s/%s", opt.out, name);
    return path;
}
static const char *checkpoint_path(const char *what, int step) {
    static char path[PATH + 32];
    snprintf(path, sizeof path, "%s/%s_%08d.bin", opt.out, what, step);
    return path;
}

static const char unfinished[] = "unfinished.tmp";  // a file of a run until it is whole
typedef struct { FILE *file; char path[PATH + 32], aside[PATH + 64]; } Output;

static void output_failed(Output *o) {
    int error = errno;
    unlink(o->aside);
    errno = error;
    cannot("write", o->path);
}

static void output_open(Output *o, const char *path, const char *aside) {
    snprintf(o->path, sizeof o->path, "%s", path);
    snprintf(o->aside, sizeof o->aside, "%s", aside);
    o->file = fopen(aside, "wbx");
    if (!o->file) cannot("write", aside);
}
static void output_write(Output *o, const void *data, size_t bytes) {
    if (fwrite(data, 1, bytes, o->file) != bytes) output_failed(o);
}
static void output_close(Output *o) {
    if (fflush(o->file) != 0 || fsync(fileno(o->file)) != 0) output_failed(o);
    if (fclose(o->file) != 0 || rename(o->aside, o->path) != 0) output_failed(o);
}

static uint64_t checksum(uint64_t sum, const void *data, size_t words) {  // of 32 bits
    for (size_t i = 0; i < words; i++) {
        uint32_t word;
        memcpy(&word, (const char *)data + 4*i, sizeof word);
        sum = (sum ^ word) * 0x9E3779B97F4A7C15u;
        sum ^= sum >> 32;
    }
    return sum;
}

static float from_bf16(uint16_t b) {
    uint32_t bits = (uint32_t)b << 16;
    float f;
    memcpy(&f, &bits, sizeof f);
    return f;
}
static uint16_t to_bf16(float f) {  // to the nearest, ties to even
    uint32_t bits;
    memcpy(&bits, &f, sizeof bits);
    if (f != f) return 0x7FC0;
    return (uint16_t)((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}

static float file_float32[STAGE];
static uint16_t file_bf16[STAGE];

// Writes p to o as float32 or bf16, or nowhere if o is NULL. Returns the checksum of its float32, continued.
static uint64_t write_parameters(Output *o, const param_t *p, size_t count, int bf16, uint64_t sum) {
    for (size_t i = 0; i < count; i += STAGE) {
        size_t n = piece_of(count - i);
        to_host(staging, p + i, n * sizeof(param_t));
        for (size_t j = 0; j < n; j++) file_float32[j] = (float)staging[j];
        for (size_t j = 0; j < n && bf16; j++) file_bf16[j] = to_bf16(file_float32[j]);
        sum = checksum(sum, file_float32, n);
        if (o && bf16) output_write(o, file_bf16, 2*n);
        else if (o) output_write(o, file_float32, 4*n);
    }
    return sum;
}

static uint64_t read_parameters(FILE *f, const char *path, param_t *p, size_t count, int bf16, uint64_t sum) {
    for (size_t i = 0; i < count; i += STAGE) {
        size_t n = piece_of(count - i);
        void *raw = bf16 ? (void *)file_bf16 : (void *)file_float32;
        if (fread(raw, bf16 ? 2 : 4, n, f) != n) die(STATUS_DATA, "%s: ends early", path);
        for (size_t j = 0; j < n && bf16; j++) file_float32[j] = from_bf16(file_bf16[j]);
        for (size_t j = 0; j < n; j++) staging[j] = (param_t)file_float32[j];
        sum = checksum(sum, file_float32, n);
        to_device(p + i, staging, n * sizeof(param_t));
    }
    return sum;
}

// The header of a model file: all that a network is besides its parameters. From slot 2 on it has the first
// fields of Config: the sizes, and but for a baseline the mode, h and the grid.
static size_t header_words(const int32_t header[256]) { return header[1] < 1000 ? HEADER_SIZES : 9; }
static void model_header(int32_t header[256], const Config *net, int bf16) {
    int a_count = net->mode == MIDPOINT_A ? net->L : converted(net->mode);
    memset(header, 0, 256 * sizeof *header);
    header[0] = MODEL_MAGIC;
    header[1] = (bf16 ? 5 : 3) + 1000 * (net->mode != BASELINE || BLOCK_KIND);
    memcpy(&header[2], net, header_words(header) * sizeof *header);
    header[11] = net->K;
    header[12] = stem_of(net);
    if (header[12] < 0) memcpy(&header[17], net->ordinary, sizeof net->ordinary);
    if (converted(net->mode)) header[13] = net->shift;  // 0 means 4, in sixteenths
    header[14] = BLOCK_KIND;
    memcpy(&header[240], net->block, sizeof net->block);
    for (int k = 0; k < a_count; k++) header[16 + k] = net->shift ? net->a[k] : 16 * net->a[k];
}

static void save_model(const Model *m, int step, int bf16) {
    Output o;
    int32_t header[256];
    model_header(header, &m->net, bf16);
    output_open(&o, checkpoint_path("model", step), out_path(unfinished));
    output_write(&o, header, sizeof header);
    write_parameters(&o, m->params, parameter_count(&m->net), bf16, 0);
    output_close(&o);
}

// The network that a header describes
static Config network_of(const int32_t header[256], const char *path) {
    Config net;
    memset(&net, 0, sizeof net);
    memcpy(&net, &header[2], header_words(header) * sizeof *header);
    if (header[14] != BLOCK_KIND) die(STATUS_DATA, "%s: its blocks are of kind %d (0: GPT-2's, 1: Llama's), "
        "not %d: train_rev_gpt2, train_rev_llama and so on read a kind each", path, header[14], BLOCK_KIND);
    checked(path, "context", net.maxT, 1, 1 << 24);
    checked(path, "vocabulary", net.V, 1, 65536);
    checked(path, "padded vocabulary", net.Vp, net.V, 1 << 20);
    checked(path, "number of layers", net.L, 1, net.mode == MIDPOINT_A ? MAX_A : 1 << 16);
    checked(path, "number of channels", net.C, 1, 1 << 16);
    checked(path, "number of heads", net.NH, 1, net.C);
    checked(path, "mode", net.mode, header[1] >= 1000 && !BLOCK_KIND, MODES - 1);
    checked(path, "grid", net.grid, 0, 30);
    if (net.C % net.NH != 0)
        die(STATUS_DATA, "%s: its %d channels cannot be shared by %d heads", path, net.C, net.NH);
    block_read(&net, header, path);
    if (!(net.h >= 0 && net.h <= 16))
        die(STATUS_DATA, "%s: its step size is %g; 0 to 16 is possible", path, (double)net.h);
    if (net.mode == MIDPOINT_A) {
        checked(path, "shift", header[13], 0, 0);  // which means 4
        net.shift = 4;
        memcpy(net.a, &header[16], net.L * sizeof *header);
        if (!remainders_fit(&net)) die(STATUS_DATA, "%s: remainders of its a_k do not fit 16 bits", path);
    }
    if (!converted(net.mode)) return net;
    int retrofit = net.mode == RETROFIT;
    net.K = checked(path, "number of iterations", header[11], 0, 16 * retrofit);
    keep_ordinary(&net, 0, checked(path, "stem", header[12], -1, smaller_of(net.L, MAX_ORDINARY)));
    if (header[12] < 0) memcpy(net.ordinary, &header[17], sizeof net.ordinary);
    if (!ordinary_fits(&net))
        die(STATUS_DATA, "%s: no %s of %d layers has its ordinary steps", path, mode_names[net.mode], net.L);
    net.shift = checked(path, "shift", or_else(header[13], 4), 1, 8);
    int one = 1 << net.shift;
    net.a[0] = checked(path, "coefficient times 2^shift", header[16], !retrofit - one, one);
    if (net.a[0] == 0) die(STATUS_DATA, "%s: its coefficient is 0, that of a baseline", path);
    for (; net.a[0] % 2 == 0; net.shift--) net.a[0] /= 2;
    return net;
}

// Reads the header of a model file, checked; and its parameters, if m is given.
static Config read_model(const char *path, Model *m) {
    int32_t header[256];
    if (path == opt.start && access(path, F_OK) != 0 && errno == ENOENT)
        die(STATUS_DATA, "%s: No such file; a new network is one of " BLOCK_SIZES, path);
    FILE *f = open_input(path, header, MODEL_MAGIC, "model file");
    int version = header[1] % 1000, bf16 = version == 5;
    if ((version != 3 && !bf16) || !within(header[1], 0, 1999))
        die(STATUS_DATA, "%s: version %d; 3, 5, 1003 and 1005 can be read", path, header[1]);
    const Config net = network_of(header, path);
    const size_t count = parameter_count(&net);
    check_size(f, path, sizeof header + count * (bf16 ? 2 : 4));
    if (m) read_parameters(f, path, m->params, count, bf16, 0);
    fclose(f);
    return net;
}

// The same, read by rank 0 for all: another machine need not have the file.
static Config load_model(const char *path, Model *m) {
    Config net;
    memset(&net, 0, sizeof net);
    if (rank == 0) net = read_model(path, m);
    ranks_broadcast(&net, sizeof net);
    if (m) ranks_spread(m->params, &net);
    return net;
}

// The checksum of a state file's header and of the network it belongs to
static uint64_t state_checksum(const int32_t header[256], const Config *net) {
    int32_t of_model[256];
    model_header(of_model, net, 0);
    return checksum(checksum(0, header, 256), of_model, 256);
}

static void save_state(const Job *j) {
    const Model *m = &j->m;
    Output o;
    int32_t header[256] = {STATE_MAGIC, STATE_VERSION, j->step, j->owed};
    size_t count = parameter_count(&m->net);
    real_t *const moments[] = {m->m, m->v};
    memcpy(&header[4], &j->run, sizeof j->run);
    uint64_t sum = state_checksum(header, &m->net);
    if (rank == 0) output_open(&o, checkpoint_path("state", j->step), out_path(unfinished));
    if (rank == 0) output_write(&o, header, sizeof header);
    for (int i = 0; i < 2; i++) {
        gather_moments(m, moments[i]);
        if (rank == 0) sum = write_parameters(&o, all_moments(m, moments[i]), count, 0, sum);
    }
    if (rank > 0) return;
    // the weights are in the model file, unless rounded there; the checksum ties them to this state anyway
    sum = write_parameters(j->run.bf16 ? &o : NULL, m->params, count, 0, sum);
    output_write(&o, &sum, sizeof sum);
    output_close(&o);
}

// A resumed run must be what the state's was, but for how a step's sequences are cut into micro-batches.
static void check_run(const Run *was, const Run *run, const char *path) {
    enum { FIELDS = sizeof(Run) / sizeof(int32_t) };
    int apart = was->lanes == was->accumulate && run->lanes == run->accumulate;
    const struct { const char *name; int cuts; } fields[FIELDS] = {
        {"-b", 1}, {"-t", 0}, {"--chunk", 1}, {"--head-chunk", 1}, {"-d, in micro-batches,", 1},
        {"--shuffle", 0}, {"-a", 0}, {"--save (1: bf16)", 0}, {"--mode", 0}, {"--seed", 0},
        {"--precision (1: bf16)", 0}, {"--loss (1: kl, 2: kl-teacher)", 0}, {"--distill, as a checksum,", 0},
        {"--lanes", apart}, {"--slice", 1}, {"--group", 0}};  // each micro-batch a lane of its own, as before
    const int32_t *then = (const int32_t *)was, *now = (const int32_t *)run;
    int64_t sequences = (int64_t)run->B * run->accumulate;
    int cut = was->B != run->B && (int64_t)was->B * was->accumulate == sequences;
    for (int i = 0; i < FIELDS; i++)
        if (then[i] != now[i] && !(cut && fields[i].cuts)) die(STATUS_USAGE,
            "%s was saved with %s %d, not %d; resume with the same", path, fields[i].name, then[i], now[i]);
    if (cut) printf("-b %d, not %d: the same sequences, other bits, other batches for -m\n", run->B, was->B);
}

// Opens a state that suits the run, at its moments.
static FILE *open_state(const char *path, int32_t header[256], const Job *j) {
    size_t count = parameter_count(&j->m.net);
    FILE *f = open_input(path, header, STATE_MAGIC, "state file");
    if (header[1] != STATE_VERSION || header[2] != j->from) die(STATUS_DATA, "%s: of version %d and step %d, "
        "not %d (less is of an earlier program) and %d", path, header[1], header[2], STATE_VERSION, j->from);
    check_run((const Run *)&header[4], &j->run, path);
    check_size(f, path, 256 * sizeof *header + count * (j->run.bf16 ? 12 : 8) + sizeof(uint64_t));
    return f;
}

// Reads what save_state wrote, after the model beside it has been read.
static void load_state(Job *j) {
    Model *m = &j->m;
    const char *path = checkpoint_path("state", j->from);
    int32_t header[256] = {0};
    size_t count = parameter_count(&m->net);
    real_t *const moments[] = {m->m, m->v};
    FILE *f = rank == 0 ? open_state(path, header, j) : NULL;
    uint64_t saved = 0, sum = state_checksum(header, &m->net);
    for (int i = 0; i < 2; i++) {
        if (rank == 0) sum = read_parameters(f, path, all_moments(m, moments[i]), count, 0, sum);
        scatter_moments(m, moments[i]);
    }
    if (rank == 0) {
        if (j->run.bf16) sum = read_parameters(f, path, m->params, count, 0, sum);
        else sum = write_parameters(NULL, m->params, count, 0, sum);
        if (fread(&saved, sizeof saved, 1, f) != 1 || saved != sum) die(STATUS_DATA, "%s: it or its model is "
            "corrupt, the checksum does not match; remove both to resume from an earlier pair", path);
        fclose(f);
    }
    ranks_broadcast(header, sizeof header);
    ranks_spread(m->params, &m->net);
    j->owed = header[3] != 0;
    printf("resumed from %s\n", path);
    if (!opt.grid || opt.grid == m->net.grid) return;
    printf("--grid %d, not %d: other bits from here on\n", opt.grid, m->net.grid);
    m->net.grid = opt.grid;
}

// What a directory holds: how many models with their state, the first and last step of these, or -1, how many
// models in all, and the last step of which there is only one of both, or -1
typedef struct { int count, first, last, models, half; } Checkpoints;
static Checkpoints find_checkpoints(const char *directory) {
    Checkpoints c = {0, -1, -1, 0, -1};
    DIR *d = opendir(directory);
    for (struct dirent *e; d && (e = readdir(d)) != NULL;) {
        char other[32];
        int step = -1, end = 0, is_model = e->d_name[0] == 'm';  // end stays 0 where the name ends otherwise
        sscanf(e->d_name, is_model ? "model_%8d.bin%n" : "state_%8d.bin%n", &step, &end);
        if (step < 0 || end != 18 || e->d_name[end]) continue;
        snprintf(other, sizeof other, is_model ? "state_%08d.bin" : "model_%08d.bin", step);
        c.models += is_model;
        int whole = faccessat(dirfd(d), other, F_OK, 0) == 0;
        if (!whole && step > c.half) c.half = step;
        if (!whole || !is_model) continue;
        if (!c.count++ || step < c.first) c.first = step;
        if (step > c.last) c.last = step;
    }
    if (d) closedir(d);
    return c;
}

// ---- log.csv
static const char log_header[] = "step,split,loss,lr,grad_norm,ms,tokens_per_s,drift,peak_bytes\n";

// Opens the log, and cuts off its rows beyond the checkpoint, from which a resumed run goes on, not where it
// died. If what follows that step is owed, its rows of anything but training go, too.
static FILE *log_open(const Job *j) {
    const char *path = out_path("log.csv");
    char line[512], *end;
    if (rank > 0) return fopen("/dev/null", "a");
    FILE *csv = open_regular(path, "a+");
    rewind(csv);  // some systems begin to read at the end
    int begun = fgets(line, sizeof line, csv) != NULL, kept = 1;
    if (begun && strcmp(line, log_header) != 0) die(STATUS_DATA,
        "%s: not a log of this program, by its first line: move it away", path);
    for (long at = ftell(csv); kept && fgets(line, sizeof line, csv); at = ftell(csv)) {
        long row = strtol(line, &end, 10);
        int whole = end != line && *end == ',' && strchr(line, '\n');
        int again = j->owed && row == j->from && strncmp(end, ",train", 6) != 0;
        kept = whole && row <= j->from && !again;
        if (!kept && ftruncate(fileno(csv), at) != 0) cannot("write", path);
    }
    fseek(csv, 0, SEEK_END);
    if (!begun) fputs(log_header, csv);
    return csv;
}

// ---- the loop

// nanoGPT's: a linear warm-up, then a cosine from the rate to its final fraction at the last step.
static double learning_rate(int step, int total) {
    if (step < opt.warmup) return opt.rate * (step + 1) / (opt.warmup + 1);
    double done = (double)(step - opt.warmup) / (total - opt.warmup), lowest = opt.rate * opt.final_fraction;
    return lowest + 0.5 * (1 + cos(3.141592653589793 * done)) * (opt.rate - lowest);
}

static void warn(const char *line) {
    if (rank == 0) fprintf(stderr, "%.*s: %s\n", (int)strcspn(program, " "), program, line);
}

static int bits_left = 31;  // of the grid's range, the fewest so far

// Stops the run if its numbers have gone wrong: what was saved before stays.
static void check_numbers(const Model *m, int step, double loss, double drift) {
    static int warned;
    const int reach = stream_take_reach();
    bits_left = smaller_of(bits_left, 31 - reach);
    if (reach > 31) die(STATUS_NUMBERS,
        "step %d: a stream is NaN or left the grid's range of +-%g; a smaller --grid has more range%s",
        step, ldexp(1, 31 - m->net.grid), step > 1 ? ", with -y 1 as well; a lower -l may not need it" : "");
    if (bits_left < 2 && !warned++)
        warn("of the grid's range streams have one bit left, or none; a smaller --grid has more");
    if (m->has_teacher && !isfinite(mean_of(m, TEACHER_LOSS))) die(STATUS_NUMBERS,
        "step %d: the loss of the teacher, --distill %s, is not a finite number", step, opt.distill);
    if (!isfinite(loss))
        die(STATUS_NUMBERS, "step %d: the loss is not a finite number", step);
    if (m->net.grid && drift > 0) die(STATUS_NUMBERS, "step %d: the streams did not come back to where they "
        "began (off by %.2e of it); the memory or the program is faulty", step, drift);
}

// A signal sets the first. What takes long looks at it after every batch, so that all ranks end at one place.
static volatile sig_atomic_t signalled;
static int interrupted;
static int stops(void) {
    interrupted |= any_rank(signalled);
    return interrupted;
}

// How many means a validation has: the loss, and with a teacher what compares the two
static int metrics_of(const Model *m) { return m->has_teacher ? METRICS : LOSS + 1; }

// The means over -m validation batches, or all, whose last may be shorter. Returns the sequences in them.
static int64_t validate(const Model *m, Data *d, double means[METRICS]) {
    Model own = *m;
    const size_t N = (size_t)m->B * m->T, all = N * ranks;
    double *values = doubles(all), counted = 0;
    int64_t count = sequences_of(d, m->T, 0), wanted = (int64_t)opt.val_batches * m->B;
    if (wanted && wanted < count) count = wanted;
    if (m->objective == KL_TEACHER) own.objective = KL;  // one divergence to compare runs by
    memset(means, 0, METRICS * sizeof *means);
    for (int64_t i = 0; i < count && !stops(); i += (int64_t)m->B * ranks) {
        const int64_t first = i + (int64_t)m->B * rank;  // a batch for each rank, until there are no more
        own.B = (int)fmax(0, fmin(m->B, (double)(count - first)));
        if (own.B > 0) {
            counted += data_batch(d, &own, (uint64_t)first, 0, 0);
            forward(&own);
            head(&own, 0);
        }
        // token after token: sums do not depend on how they are cut into batches, nor on who has these
        for (int k = LOSS; k < metrics_of(m); k++) {
            memset(values, 0, all * sizeof *values);
            if (own.B > 0) read_metric(values + N * rank, &own, (enum Metric)k);
            ranks_combine(values, all);
            for (size_t j = 0; j < all; j++) means[k] += values[j];
        }
    }
    free(values);
    ranks_combine(&counted, 1);
    for (int k = LOSS; k < metrics_of(m); k++) means[k] /= fmax(counted, 1);
    return count;
}

static void print_comparison(const Model *m, const double means[METRICS]) {
    if (m->has_teacher) printf(" | teacher %.4f | KL %.3e | same top token %.2f%%", means[TEACHER_LOSS],
                               means[DIVERGENCE], 100 * means[AGREEMENT]);
    printf("\n");
}

static void validate_step(Job *j) {
    static const char *const splits[METRICS] = {"val", "val_teacher", "val_kl", "val_agreement"};
    double means[METRICS];
    validate(&j->m, &j->val, means);
    if (interrupted) return;
    check_numbers(&j->m, j->step, means[LOSS], NAN);
    printf("step %5d/%d | validation loss %.4f", j->step, j->total, means[LOSS]);
    for (int least = 31; any_rank(bits_left < least); least--) bits_left = smaller_of(bits_left, least - 1);
    if (converted(j->m.net.mode) && j->m.net.grid) printf(" | bits left %d", bits_left);
    print_comparison(&j->m, means);
    for (int metric = LOSS; j->csv && metric < metrics_of(&j->m); metric++)
        fprintf(j->csv, "%d,%s,%.8g,,,,,,\n", j->step, splits[metric], means[metric]);
}

// Syncs the names of the files in -o. A file system that cannot do so has not failed to write.
static void sync_names(const Job *j) {
    if (rank > 0 || fsync(j->directory) == 0) return;
    int cannot_sync = errno == EINVAL || errno == ENOSYS || errno == ENOTSUP || errno == EOPNOTSUPP;
    if (!cannot_sync && errno != EROFS) cannot("write", opt.out);
}

// Saves a complete pair, and removes the oldest ones beyond -nk.
static void save_step(Job *j) {
    Model *m = &j->m;
    Checkpoints c;
    fsync(fileno(j->csv));  // the log must not be behind its checkpoint
    if (j->step > 0) {      // what does not compute is not worth a checkpoint, let alone an older one's place
        forward(m);
        head(m, 0);
        check_numbers(m, j->step, objective_of(m), NAN);
    }
    save_state(j);
    sync_names(j);  // a model is never without its state, even after a power cut
    if (rank == 0) save_model(m, j->step, j->run.bf16);
    sync_names(j);  // before older pairs go
    while (rank == 0 && opt.keep > 0 && (c = find_checkpoints(opt.out)).count > opt.keep) {
        const char *path = checkpoint_path("model", c.first);
        if (unlink(path) != 0) cannot("remove", path);
        unlink(checkpoint_path("state", c.first));
    }
    any_rank(0);  // no rank goes on, or ends all, before it is saved
}

// Where the micro-batches of a lane begin: each has as many, or one more.
static int lane_begin(const Run *run, int lane) {
    return (int)((int64_t)run->accumulate * lane / run->lanes);
}

// Reads a step's i-th micro-batch, to m or only to count. Returns how many of its targets count.
static int read_micro_batch(Job *j, Model *m, int i) {
    const Run *run = &j->run;
    const uint64_t before = run->overfit ? 0 : (uint64_t)j->step * (uint64_t)run->accumulate;
    uint64_t first = (before + (uint64_t)i) * (uint64_t)run->B;
    profile("(reading)", 0, 0);
    return data_batch(&j->data, m, first, run->shuffle, (uint64_t)run->seed);
}

// How many micro-batches a step has, as far as they count: gradients are means over the tokens that do. Every
// rank reads all of documents. Where nothing counts, loss and gradient are 0 whatever they are divided by.
static double counted_batches(Job *j) {
    double counted = 0;
    Model nowhere = j->m;
    if (!j->data.documents) return j->run.accumulate;
    nowhere.inputs = NULL;
    for (int i = 0; i < j->run.accumulate; i++) counted += read_micro_batch(j, &nowhere, i);
    return counted > 0 ? counted / (j->m.B * j->m.T) : 1;
}

// The gradients of an optimizer step, lane after lane, unless it is interrupted; *drift is the largest.
// Returns the loss.
static double step_gradients(Job *j, double *drift) {
    const Run *run = &j->run;
    const int count = run->accumulate, longest = (count - 1) / run->lanes + 1;
    double *losses = doubles(2 * (size_t)count), *drifts = losses + count, batches = counted_batches(j);
    double loss = 0;
    *drift = NAN;
    for (int lane = rank; lane - rank < run->lanes; lane += ranks) {
        device_zero(j->m.grads, parameter_count(&j->m.net) * sizeof(real_t));
        for (int k = 0; k < longest && !stops(); k++) {
            int i = lane_begin(run, lane) + k;
            if (lane >= run->lanes || i >= lane_begin(run, lane + 1)) continue;  // others have one more
            read_micro_batch(j, &j->m, i);
            losses[i] = forward_backward(&j->m, 1 / batches, &drifts[i]);
            check_numbers(&j->m, j->step + 1, losses[i], drifts[i]);
        }
        if (interrupted) break;
        profile("(exchange)", 0, 0);
        ranks_exchange(&j->m, lane - rank);
    }
    ranks_combine(losses, 2 * (size_t)count);
    for (int i = 0; i < count; i++) {
        loss += losses[i] / batches;
        *drift = fmax(*drift, drifts[i]);  // either may be NAN
    }
    free(losses);
    return loss;
}

// One optimizer step; prints its line and logs it. An interrupt between its batches leaves all as it was.
static void train_step(Job *j) {
    static double slow;  // a running mean of the seconds a step takes, for the time left
    Model *m = &j->m;
    int divergence = m->objective != CROSS_ENTROPY;
    double start = seconds(), rate = learning_rate(j->step, j->total), drift;
    double loss = step_gradients(j, &drift);
    if (interrupted) return;
    j->step++;
    double norm = update(m, rate, opt.beta1, opt.beta2, opt.decay, j->step);
    device_finish();
    double s = seconds() - start, speed = (double)m->B * m->T * j->run.accumulate / s;
    if (!isfinite(norm))
        die(STATUS_NUMBERS, "step %d: the gradient is not finite; what was saved before stays", j->step);
    slow = slow > 0 ? 0.95 * slow + 0.05 * s : s;
    j->limit = fmax(j->limit, device_fastest() * ranks);
    printf(divergence ? "step %5d/%d | KL %.3e" : "step %5d/%d | loss %.4f", j->step, j->total, loss);
    printf(" | norm %.4f | lr %.2e | %.0f ms | %.0f tokens/s | %.0f%% of limit | ",
           norm, rate, s * 1e3, speed, 100 * speed * flops_per_token(m) / j->limit);
    if (!isnan(drift)) printf("drift %.2g | ", drift);
    size_t peak = device_peak_bytes();
    printf("%.2f GiB | %.1f min left\n", (double)peak / (1 << 30), slow * (j->total - j->step) / 60);
    if (!j->csv) return;
    fprintf(j->csv, "%d,%s,%.8g,%.6e,%.6f,%.1f,%.1f,",
            j->step, divergence ? "train_kl" : "train", loss, rate, norm, s * 1e3, speed);
    if (!isnan(drift)) fprintf(j->csv, "%.3e", drift);
    fprintf(j->csv, ",%zu\n", peak);
}

static void on_interrupt(int signal_number) {
    static const char notice[] = "\nfinishing this batch; once more ends at once\n";
    signalled = 1;
    if (signal_number == SIGHUP) return;  // a terminal that closes may say so twice, and nobody reads
    signal(SIGINT, SIG_DFL);  // a second one of either kind ends at once
    signal(SIGTERM, SIG_DFL);
    (void)!write(1, notice, sizeof notice - 1);
}

// `make` puts dev/sample/samples.h here, which writes text every -s steps, and
#ifdef REV_GPT2_SAMPLES
#include REV_GPT2_SAMPLES
#else
#define SAMPLES_OPTION
#define samples_begin(m) ((void)0)
#define samples_step(j) ((void)0)
#endif
// dev/eval/choices.h here, which answers questions every -v steps.
#ifdef REV_GPT2_CHOICES
#include REV_GPT2_CHOICES
#else
#define CHOICES_OPTION
#define choices_begin(m) ((void)0)
#define choices_step(j) ((void)0)
#endif

// Whether what happens every so many steps, and at the end, happens after this one. Never if every is 0.
static int due(int every, int step, int end) { return every > 0 && (end || step % every == 0); }

// Trains to the end of the run. What happens between two steps has been done for that of the checkpoint.
static void train(Job *j) {
    int began = j->step, saved = j->from - j->owed;
    double cost = flops_per_token(&j->m), again = flops_again(&j->m);
    if (opt.out[0]) j->csv = log_open(j);
    signal(SIGINT, on_interrupt);  // a read or write that it comes in goes on
    signal(SIGTERM, on_interrupt);
    if (signal(SIGHUP, on_interrupt) == SIG_IGN) signal(SIGHUP, SIG_IGN);  // nohup wants that
    signal(SIGPIPE, SIG_IGN);  // who reads the output may end first: fflush notices, and nothing is lost
    j->limit = device_flops();
    ranks_combine(&j->limit, 1);
    printf("limit %.0f GFLOP/s; training costs %.3g GFLOP a token", j->limit * 1e-9, cost * 1e-9);
    if (again > 0) printf(", computing blocks again makes it %.3f times that: at most %.3f of the speed of "
        "store", 1 + again / cost, cost / (cost + again));
    printf("\n");
    if (j->from >= 0 && began >= j->total)
        printf("-x %d: the checkpoint is of step %d, nothing is left to train\n", j->total, began);
    if (began < j->total && opt.warmup >= j->total)
        printf("-u %d: the warm-up takes all %d steps, and never reaches -l\n", opt.warmup, j->total);
    for (;;) {
        int step = j->step, fresh = step > saved, end = step >= j->total;
        stops();
        if (fresh && !interrupted && opt.val[0] && due(opt.val_every, step, end)) validate_step(j);
        if (fresh && !interrupted && due(opt.val_every, step, end)) choices_step(j);
        if (fresh && !interrupted && due(opt.sample_every, step, end)) samples_step(j);
        j->owed = fresh && stops();
        if (j->csv && fflush(j->csv) != 0) cannot("write", out_path("log.csv"));
        end |= interrupted || any_rank(fflush(stdout) != 0);
        if (fresh && j->csv && (end || (step > 0 && due(opt.save_every, step, 0)))) {
            save_step(j);
            saved = step;
        }
        if (end) break;
        profile_step(1);
        train_step(j);
        profile_step(0);
    }
    profile_print(&j->m, j->limit);
    if (j->csv && fclose(j->csv) != 0) cannot("write", out_path("log.csv"));
    if (interrupted) die(STATUS_INTERRUPTED, "interrupted after step %d; %s",
        j->step, opt.out[0] ? "-y 1 goes on from there" : "without -o nothing is saved");
}

// -------------------------------------------------------------------------------------------------
// Part V: the command line

static const char *const stream_names[] = {"float", "fixed", NULL};
enum { STREAM_FLOAT, STREAM_FIXED };
enum { INTEGER, NUMBER, BYTES, STRING, SWITCH, MODE_NAME, LOSS_NAME, MEMORY_NAME, TYPE_NAME, STREAM_NAME };
static const char *const *const choices[] = {
    NULL, NULL, NULL, NULL, NULL, mode_names, objective_names, memory_names, precision_names, stream_names};

typedef struct {
    const char *flag;
    int type;             // the last five choose among names
    void *at;             // a double for NUMBER and BYTES, a const char * for STRING, or else an int
    const char *initial;  // the default, as one would type it; "": the rest decides; NULL: no text, or ""
    double least, most;   // for a text the most bytes, 0: any
    const char *help;
} Option;

enum { NAME = PATH - 64, MAX_STEPS = 99999999 };  // NAME: the longest of a file that others stand beside
static const Option options[] = {
    {"-i", STRING, &opt.train, "", 0, 0, "training tokens: a .bin of llm.c, a .txt, or a pattern in quotes"},
    {"-j", STRING, &opt.val, "", 0, 0, "validation tokens, likewise"},
    {"-o", STRING, &opt.out, "", 0, NAME, "directory for log.csv, models and states; none: nothing is kept"},
    {"-y", INTEGER, &opt.resume, "0", 0, 1, "1: resume from the newest checkpoint in -o, if there is one"},
    {"-n", INTEGER, &opt.save_every, "0", 0, 1e9, "checkpoint in -o every so many steps, and at the end"},
    {"-nk", INTEGER, &opt.keep, "0", 0, 1e9, "how many checkpoints to keep; 0: all"},
    {"-a", INTEGER, &opt.overfit, "0", 0, 1, "1: overfit the first batch"},
    {"-e", STRING, &opt.start, BLOCK_DEFAULT, 0, NAME, "a model file, or from scratch: " BLOCK_SIZES},
    {"--layers", INTEGER, &opt.layers, "0", 1, 65536, "from scratch: L; 0: as -e says"},
    {"--heads", INTEGER, &opt.heads, "0", 1, 65536, "from scratch: NH; 0: as -e says"},
    {"--channels", INTEGER, &opt.channels, "0", 1, 65536, "from scratch: C; 0: as -e says"},
    {"--context", INTEGER, &opt.context, "0", 1, 1 << 24, "from scratch: longest sequence; 0: as -e says"},
    BLOCK_OPTIONS
    {"-b", INTEGER, &opt.B, "4", 1, 1 << 24, "sequences a micro-batch"},
    {"-t", INTEGER, &opt.T, "0", 1, 1 << 24, "tokens a sequence; 0: as documents are cut, or the context"},
    {"-d", INTEGER, &opt.tokens, "0", 1, 2147483647, "tokens a step, a multiple of -b times -t; 0: that"},
    {"--lanes", INTEGER, &opt.lanes, "0", 1, 2147483647,
     "parts of a step that processes share, which are added one by one; 0: its micro-batches"},
    {"-x", INTEGER, &opt.steps, "-1", 0, MAX_STEPS, "steps; -1: once through the training tokens, in order"},
    {"-l", NUMBER, &opt.rate, "6e-4", 0, 1e3, "learning rate"},
    {"-u", INTEGER, &opt.warmup, "0", 0, 1e9, "warm-up steps"},
    {"-q", NUMBER, &opt.final_fraction, "0.1", 0, 1, "the cosine schedule ends at this fraction of -l"},
    {"-c", NUMBER, &opt.decay, "0.1", 0, 1e3, "weight decay, on matrices and embeddings"},
    {"-v", INTEGER, &opt.val_every, "250", 0, 1e9, "validate every so many steps, and at the end; 0: never"},
    {"-m", INTEGER, &opt.val_batches, "20", 0, 1e9, "validation batches, if there are that many; 0: all"},
    SAMPLES_OPTION
    {"--mode", MODE_NAME, &opt.mode, "", 0, 0, "retrofit and bdia convert a baseline, and back (midpoint)"},
    {"--step-size", NUMBER, &opt.step_size, "", 0, 16,
     "h, 0 switches the blocks off (midpoint 0.25, leapfrog 1/sqrt(L), others 1)"},
    {"--coefficient", NUMBER, &opt.coefficient, "", -1, 1,
     "a, n/256 like -0.25: near 0 the original network, 1 keeps no bits (retrofit 0.0625, bdia -0.015625)"},
    {"--fixed-point", INTEGER, &opt.fixed_point, "", 0, 16, "retrofit: iterations K, each another block (1)"},
    {"--ordinary", STRING, &opt.ordinary, "", 0, 0, "retrofit and bdia: ordinary steps, like 0-1,28-29"},
    {"--stem", INTEGER, &opt.stem, "", 0, MAX_ORDINARY, "the first so many of them (retrofit 2, bdia 1)"},
    {"--distill", STRING, &opt.distill, "", 0, NAME, "model file of a baseline of this shape: the teacher"},
    {"--loss", LOSS_NAME, &opt.objective, "", 0, 0,
     "what to make small; kl, the default with --distill: KL(ours, teacher's); kl-teacher: the other way"},
    {"--memory", MEMORY_NAME, &opt.memory, "", 0, 0, "kept for the backward pass (reverse; baseline: store)"},
    {"--budget", BYTES, &opt.budget, "0", 1, 1e18, "bytes --memory auto may use, like 8G; 0: 3/4 of all"},
    {"--precision", TYPE_NAME, &opt.precision, DEFAULT_PRECISION, 0, 0,
     "of what products multiply, all else is float32; a CPU's bf16 needs AVX512-BF16 and `make`"},
    {"--stream", STREAM_NAME, &opt.stream, "", 0, 0, "fixed reverses exactly; float for baseline"},
    {"--grid", INTEGER, &opt.grid, "auto", 1, 30,
     "fixed streams are multiples of 2^-grid; auto: 20, but for conversions as their text needs"},
    {"--chunk", INTEGER, &opt.chunk, "0", 1, 1 << 24, "sequences a block takes at a time; 0: by the shape"},
    {"--head-chunk", INTEGER, &opt.head_chunk, "0", 1, 1 << 24, "tokens the head takes; 0: by the shape"},
    {"--slice", INTEGER, &opt.slice, "0", 1, 1 << 30, "tokens the MLP takes at a time; 0: by the shape"},
    {"--group", INTEGER, &opt.group, "0", 1, 1 << 16, "heads attention takes at a time; 0: by the shape"},
    {"--beta1", NUMBER, &opt.beta1, "0.9", 0, 0.999999, "AdamW"},
    {"--beta2", NUMBER, &opt.beta2, "0.95", 0, 0.999999, "AdamW"},
    {"--seed", INTEGER, &opt.seed, "1337", 0, 2147483647, "of weights, coefficients a_k, batches, samples"},
    {"--shuffle", SWITCH, &opt.shuffle, "0", 0, 0, "sequences from random offsets; else in order"},
    {"--save", TYPE_NAME, &opt.save, "float32", 0, 0, "type of the parameters in model files"},
    CHOICES_OPTION
    PROFILE_OPTION
    RANKS_OPTION
    {"--plan", SWITCH, &opt.plan, "0", 0, 0, "print where every byte would go, and end"},
    {"--ranks", INTEGER, &opt.ranks, "0", 1, 65536, "processes, of NCCL=1; with --plan: the bytes of one"},
    {"--help", SWITCH, &opt.help, "0", 0, 0, "print this, and end"},
    {"--version", SWITCH, &opt.version, "0", 0, 0, "print the version, and end"},
};
enum { OPTIONS = sizeof options / sizeof options[0], MAX_OPTIONS = 64 };

static const char *names_of(int type) {  // those it chooses among: a|b|c
    static char all[128];
    int length = 0;
    for (const char *const *name = choices[type]; *name; name++)
        length += snprintf(all + length, sizeof all - (size_t)length, length ? "|%s" : "%s", *name);
    return all;
}

// The number in a flag's text, or the place of its name. "", for what the rest decides, is NAN or -1.
static double value_of(const Option *o, const char *text) {
    static const char *const meant[] = {"a whole number", "a number", "a number, or one with K, M or G,"};
    static const char units[] = "KMG";
    const char *const *names = choices[o->type];
    char *end;
    if (!text[0]) return o->type == NUMBER ? NAN : -1;
    for (int i = 0; names && names[i]; i++)
        if (strcmp(names[i], text) == 0) return i;
    if (names) die(STATUS_USAGE, "%s %s: %s is meant", o->flag, text, names_of(o->type));
    if (strcmp(text, o->initial) == 0) return atof(text);  // it may lie outside: 0 or -1 for "by the rest"
    double x = o->type == INTEGER ? (double)strtoll(text, &end, 10) : strtod(text, &end);
    const char *unit = end > text && *end ? strchr(units, *end) : NULL;
    if (o->type == BYTES && unit) {
        x = ldexp(x, 10 * (int)(unit - units + 1));
        end++;
    }
    const char *besides = atof(o->initial) < o->least ? o->initial : "";  // such as -1, 0 or auto
    if (end == text || *end || !(x >= o->least && x <= o->most)) die(STATUS_USAGE,
        "%s %s: %s from %.10g to %.10g is meant%s%s", o->flag, text, meant[o->type], o->least, o->most,
        *besides ? ", or " : "", besides);
    return x;
}

static void set_option(const Option *o, const char *text) {
    if (o->type == STRING && o->most > 0 && (double)strlen(text) > o->most)
        die(STATUS_USAGE, "%s: a name of at most %.0f bytes is meant", o->flag, o->most);
    if (o->type == STRING) *(const char **)o->at = text;
    else if (o->type == NUMBER || o->type == BYTES) *(double *)o->at = value_of(o, text);
    else *(int *)o->at = (int)value_of(o, text);
}

static const Option *find_option(const Option *table, int count, const char *flag) {
    static const char *of_make[] = {"-s", "-g", "--tokenizer", "--choices", NULL};
    const char *hint = "--help lists them; train_, sample_ and eval_rev_" BLOCK_NAME " each have their own";
    for (const Option *o = table; o < table + count; o++)
        if (strcmp(flag, o->flag) == 0) return o;
    if (flag[0] != '-') hint = "a pattern of files needs quotes";
    else if (strchr(flag, '=')) hint = "a flag and its value are two words";
    if (strcmp(flag, "--profile") == 0) hint = "make -B PROFILE=1 builds a trainer that has it";
    for (const char **o = of_make; *o; o++)
        if (strcmp(flag, *o) == 0) hint = "`make` builds a trainer that has it";
    die(STATUS_USAGE, "%s: no such flag; %s", flag, hint);
}

static void parse_options(const Option *table, int count, int argc, char **argv) {
    int given[MAX_OPTIONS] = {0};
    for (int i = 0; i < count; i++) set_option(&table[i], table[i].initial);
    for (int i = 1; i < argc; i++) {
        const Option *o = find_option(table, count, argv[i]);
        if (given[o - table]++) die(STATUS_USAGE, "%s is given twice", o->flag);
        if (o->type == SWITCH) *(int *)o->at = 1;
        else if (++i == argc) die(STATUS_USAGE, "%s needs a value", o->flag);
        else if (!argv[i][0] && o->initial) die(STATUS_USAGE, "%s is empty", o->flag);
        else set_option(o, argv[i]);
    }
}

static void print_help(const Option *table, int count, const char *usage) {
    static const char *const values[] = {"N", "X", "N", "S", "", "NAME", "NAME", "NAME", "NAME", "NAME"};
    printf("usage: %s\n\n", usage);
    for (const Option *o = table; o < table + count; o++) {
        printf("  %-13s %-4s  ", o->flag, values[o->type]);
        if (choices[o->type]) printf("%s: ", names_of(o->type));
        printf("%s", o->help);
        if (o->initial && o->initial[0] && o->type != SWITCH) printf(" (%s)", o->initial);
        printf("\n");
    }
    printf("\nexit status: 0 done, 1 data and files, 2 usage, 3 numbers and memory, 130 interrupted\n");
}

// ---- from the flags to a network

// A network of the sizes that -e names, or of V tokens; what it will be besides is not chosen yet.
static Config new_network(int V) {
    Config net;
    memset(&net, 0, sizeof net);
    for (size_t i = 0; i < sizeof block_sizes / sizeof block_sizes[0]; i++) {
        if (strcmp(opt.start, block_sizes[i].name) != 0) continue;
        memcpy(&net, block_sizes[i].sizes, sizeof block_sizes[i].sizes);
        memcpy(net.block, block_sizes[i].block, sizeof net.block);
    }
    if (!net.L) die(STATUS_USAGE, "-e %s: a model file is meant, or one of " BLOCK_SIZES, opt.start);
    net.V = or_else(V, net.V);
    net.Vp = (net.V + 127) / 128 * 128;
    return net;
}

// Sets the mode. Baselines and their conversions have the same weights: one can be made another.
static void choose_mode(Config *net, const char *path) {
    int was = net->mode, mode = given_or(opt.mode, path ? was : MIDPOINT);
    if (path && mode == was) return;
    if (path && (has_step_size(was) || has_step_size(mode))) die(STATUS_USAGE,
        "--mode %s, but %s is of a %s network", mode_names[mode], path, mode_names[was]);
    if (!converted(was) || !converted(mode)) set_mode(net, mode);
    if (!converted(was) && converted(mode)) net->grid = GRID_AUTO;
    net->mode = mode;  // made the other, a conversion keeps its coefficient, ordinary steps, grid
    net->K = mode == RETROFIT;
    if (mode == MIDPOINT_A) draw_coefficients(net, (uint64_t)opt.seed);
}

// What --stem and --ordinary say
static void choose_ordinary(Config *net) {
    const char *at = opt.ordinary;
    char *end;
    int wrong = 0;
    if (opt.stem >= 0 || *at) memset(net->ordinary, 0, sizeof net->ordinary);
    keep_ordinary(net, 0, opt.stem);
    while (*at && !wrong) {
        long first = strtol(at, &end, 10), last = first;
        if (end > at && *end == '-') last = strtol(at = end + 1, &end, 10);
        wrong = end == at || (*end && *end != ',') || strcmp(end, ",") == 0 || first < 0 || last < first ||
                last >= MAX_ORDINARY;
        if (!wrong) keep_ordinary(net, (int)first, (int)last + 1);
        at = *end ? end + 1 : end;
    }
    const char *flag = opt.ordinary[0] ? "--ordinary " : "--stem";
    if (wrong || !ordinary_fits(net)) die(STATUS_USAGE,
        "%s%s: %s of %d layers takes steps from 0 to %d%s, as a list like 0,2-3 or the first n by --stem",
        flag, opt.ordinary, mode_names[net->mode], net->L, smaller_of(net->L, MAX_ORDINARY) - 1,
        net->mode == RETROFIT ? ", 0 among them" : "");
}

static void adjust_conversion(Config *net) {
    double a = isnan(opt.coefficient) ? ldexp(net->a[0], -net->shift) : opt.coefficient, n = ldexp(a, 8);
    if (n == 0 || n != rint(n) || (net->mode == BDIA && a == -1)) die(STATUS_USAGE,
        "--coefficient %.9g: a multiple of 1/256 is meant, not 0, and for bdia not -1: such as -0.0625", a);
    net->a[0] = (int)n;
    for (net->shift = 8; net->a[0] % 2 == 0; net->shift--) net->a[0] /= 2;
    net->K = given_or(opt.fixed_point, net->K);
    choose_ordinary(net);
}

// The file of the network that the flags ask for: that of the checkpoint at step `from` (-1: none), or -e's.
// NULL: it is new.
static const char *model_path(int from) {
    if (from >= 0) return checkpoint_path("model", from);
    int begins_as_sizes = strspn(opt.start, "dl") == 1 && strspn(opt.start + 1, "0123456789") > 0;
    return begins_as_sizes && !strpbrk(opt.start, "./") ? NULL : opt.start;
}

// That network, with what the flags change in it; V: the vocabulary of a new one, 0: as -e says.
static Config choose_network(int V, int from) {
    const char *path = model_path(from);
    const Config was = path ? load_model(path, NULL) : new_network(V);
    Config net = was;
    net.L = or_else(opt.layers, net.L);
    net.NH = or_else(opt.heads, net.NH);
    net.C = or_else(opt.channels, net.C);
    net.maxT = or_else(opt.context, net.maxT);
    block_flags(&net, &was);
    if (path && memcmp(&net, &was, sizeof net) != 0) die(STATUS_USAGE,
        "%s keeps its sizes: --layers, --heads, --channels and the like are for a new network", path);
    if (net.C % net.NH != 0) die(STATUS_USAGE, "--channels %d: no multiple of --heads %d", net.C, net.NH);
    choose_mode(&net, path);
    if (converted(net.mode)) adjust_conversion(&net);
    if (!isnan(opt.step_size)) net.h = (float)opt.step_size;
    if (opt.stream == STREAM_FIXED && !net.grid)
        net.grid = converted(net.mode) ? GRID_AUTO : default_grids[net.mode];
    if (opt.grid && (from < 0 || !net.grid)) net.grid = opt.grid;  // or else load_state takes it
    if (opt.stream == STREAM_FLOAT) net.grid = 0;
    if (from >= 0 && memcmp(&net, &was, sizeof net) != 0)
        die(STATUS_USAGE, "%s was trained with %s; resume with the same", path, network_flags(&was));
    return net;
}

// ---- from the flags to the shape of a run

static void choose_teacher(Model *m) {
    m->has_teacher = opt.distill[0] != 0;
    m->objective = given_or(opt.objective, m->has_teacher ? KL : CROSS_ENTROPY);
    if (!m->has_teacher) return;
    const Config t = load_model(opt.distill, NULL);
    if (t.mode != BASELINE || memcmp(&t, &m->net, HEADER_SIZES * sizeof(int)) != 0 ||
        memcmp(t.block, m->net.block, sizeof t.block) != 0) die(STATUS_USAGE,
        "--distill: %s is of a %s network of L %d, C %d, NH %d, V %d padded to %d, context %d; a baseline of "
        "the model's sizes is meant", opt.distill, mode_names[t.mode], t.L, t.C, t.NH, t.V, t.Vp, t.maxT);
}

static void check_options(const Model *m) {
    const Config *net = &m->net;
    int baseline = net->mode == BASELINE, has_a = converted(net->mode), has_h = has_step_size(net->mode);
    // a float stream may lose a factor of two a step back, not more
    int small = has_a && 2 * abs(net->a[0]) < 1 << net->shift && converted_before(net, net->L);
    const struct { int wrong; const char *why; } rules[] = {
        {(opt.resume || opt.save_every || opt.keep) && !opt.out[0], "-y, -n and -nk need -o, a directory"},
        {opt.ranks && !opt.plan, "--ranks needs --plan, or `make NCCL=1`; mpirun starts those of `MPI=1`"},
        {opt.objective > CROSS_ENTROPY && !opt.distill[0], "--loss kl and kl-teacher need --distill"},
        {opt.budget > 0 && opt.memory != AUTO, "--budget needs --memory auto"},
        {baseline && undoes_steps(m), "--memory reverse and auto need another --mode than baseline"},
        {baseline && (opt.stream == STREAM_FIXED || opt.grid), "baseline has no --stream fixed, no --grid"},
        {opt.stream == STREAM_FLOAT && opt.grid, "--grid needs --stream fixed"},
        {!has_h && !isnan(opt.step_size), "baseline, retrofit and bdia have no --step-size"},
        {!has_a && !isnan(opt.coefficient), "--coefficient needs --mode retrofit or bdia"},
        {!has_a && (opt.stem >= 0 || opt.ordinary[0]), "--stem, --ordinary need --mode retrofit or bdia"},
        {opt.stem >= 0 && opt.ordinary[0], "--stem n is short for --ordinary 0-(n-1): one of them is meant"},
        {opt.fixed_point >= 0 && net->mode != RETROFIT, "--fixed-point needs --mode retrofit"},
        {small && !net->grid && m->training && undoes_steps(m), "--stream float: with |a| below 1/2 steps "
            "back multiply every rounding; --stream fixed or --memory store is meant"}};
    for (size_t i = 0; i < sizeof rules / sizeof rules[0]; i++)
        if (rules[i].wrong) die(STATUS_USAGE, "%s", rules[i].why);
}

// The size of parts of n things, as few and as even as parts of at most `most` can be
static int evenly(int n, int most) {
    int parts = (int)(((int64_t)n + most - 1) / most);
    return (n + parts - 1) / parts;
}

// Sequences of more than two slices go through the MLP in slices, and through attention in groups of heads,
// fewer the longer they are, so that what a group takes does not grow. A cache has all heads.
static void choose_slices(Model *m) {
    const int NH = m->net.NH, n = m->chunk * m->T, generates = m->cache_tokens > 0 && !m->training;
    const double heads = 2.0 * NH * slice_tokens / m->T;  // all, where there are no slices
    m->slice = evenly(n, or_else(opt.slice, m->T > 2 * slice_tokens ? slice_tokens : n));
    m->group = evenly(NH, or_else(opt.group, (int)fmax(1, fmin(NH, heads))));
    if (m->slice == n) m->slice = 0;
    if (m->group == NH || generates) m->group = 0;
}

// The sizes of a batch and its parts. Returns the micro-batches of a step.
static int choose_shape(Model *m) {
    const Config *net = &m->net;
    m->B = opt.B;
    m->T = or_else(opt.T, net->maxT);
    m->memory = given_or(opt.memory, net->mode == BASELINE ? STORE : REVERSE);
    check_options(m);
    if (m->T > net->maxT) die(STATUS_USAGE, "-t %d: longer than the context of %d", m->T, net->maxT);
    // with up to 64 bytes a number the plan still fits 64 bits
    double all = (double)m->B * m->T, numbers = all * net->C * evaluations(net, steps(net));
    if (all > 0x1p30 || numbers > 0x1p55) die(STATUS_USAGE,
        "-b %d times -t %d: more than 2^30 tokens, or 2^55 numbers; -d accumulates", m->B, m->T);
    int tokens = m->B * m->T;
    if (opt.tokens % tokens != 0)
        die(STATUS_USAGE, "-d %d: no multiple of -b %d times -t %d", opt.tokens, m->B, m->T);
    // the shape alone decides, so that every policy cuts at the same places
    m->chunk = smaller_of(or_else(opt.chunk, (chunk_tokens - 1) / m->T + 1), m->B);
    m->head_chunk = smaller_of(or_else(opt.head_chunk, head_chunk_tokens), tokens);
    choose_slices(m);
    layers_check(m->chunk, net->C, net->NH);
    int accumulate = or_else(opt.tokens, tokens) / tokens;
    m->lanes = or_else(opt.lanes, accumulate);
    if (m->lanes > accumulate)
        die(STATUS_USAGE, "--lanes %d: a step has %d micro-batches of -b times -t", m->lanes, accumulate);
    return accumulate;
}

// Products in --precision, or else, where it cannot be had, in the other one. Returns which.
static int choose_precision(void) {
    const int bf16 = opt.precision, can = layers_bf16(bf16);
    if (!can && bf16)
        warn("no products in bf16 here: a CPU's need AVX512-BF16 and a build by `make`; they are in float32");
    if (!can && !bf16) warn("no products in float32 in this build: they will be in bf16");
    if (!can || !bf16 || !layers_bf16(0)) return can ? bf16 : !bf16;
    const double float32 = device_flops();
    if (layers_bf16(1) && device_flops() < 0.8 * float32)
        warn("products in bf16 are slower in this processor than those in float32");
    return bf16;
}

// ---- from a run's beginning to its end

// The network, its data and the shape of the run; no memory of the device is taken yet.
static void choose_job(Job *j) {
    Model *m = &j->m;
    if (!opt.train[0] && !opt.plan)
        die(STATUS_USAGE, "-i is missing: training tokens, llm.c's .bin or a .txt; --help lists the flags");
    if (opt.train[0]) data_open(&j->data, opt.train);
    if (opt.val[0]) data_open(&j->val, opt.val);
    opt.T = or_else(opt.T, or_else(j->data.documents, j->val.documents));
    j->from = opt.resume ? find_checkpoints(opt.out).last : -1;
    ranks_broadcast(&j->from, sizeof j->from);
    if (j->from > 0) j->step = j->from;
    ranks = or_else(opt.ranks, ranks);
    m->net = choose_network(or_else(j->data.V, j->val.V), j->from);
    m->training = 1;
    samples_begin(m);
    choose_teacher(m);
    int accumulate = choose_shape(m), precision = choose_precision();
    const Run run = {m->B, m->T, m->chunk, m->head_chunk, accumulate, opt.shuffle, opt.overfit, opt.save,
                     m->net.mode, opt.seed, precision, m->objective, 0, m->lanes, m->slice, m->group};
    j->run = run;
    double budget = opt.budget;  // only AUTO asks the device: other plans need none
    if (m->memory == AUTO && budget == 0) budget = 0.75 * (double)device_memory_bytes() / ranks_here;
    if (!plan_within(m, budget) && opt.budget > 0) die(STATUS_USAGE, "--budget %.0f: at least %.0f bytes are "
        "needed; a smaller -b or -t needs less", budget, plan_keeping(m, 0));
}

static void print_job(const Job *j) {
    const Model *m = &j->m;
    const Config *net = &m->net;
    printf("%s: L %d, C %d, NH %d%s, V %d, context %d, %zu parameters\n", network_flags(net), net->L, net->C,
           net->NH, block_text(net), net->V, net->maxT, parameter_count(net));
    printf("B %d, T %d, chunk %d, head chunk %d, %lld tokens a step, --memory %s, --precision %s",
           m->B, m->T, m->chunk, m->head_chunk, (long long)m->B * m->T * j->run.accumulate,
           memory_names[m->memory], precision_names[j->run.precision]);
    if (m->has_teacher) printf(", --loss %s", objective_names[m->objective]);
    if (m->slice > 0) printf(", slices of %d", m->slice);
    if (m->group > 0) printf(", heads in groups of %d", m->group);
    printf("\n");
    if (m->memory == AUTO)
        printf("the last %d of %d steps keep their internals\n", m->kept_steps, steps(net));
    plan_print(m);
}

// Makes -o, or takes it from others until the process ends; nothing of another run will be overwritten there.
static void claim_directory(Job *j) {
    if (mkdir(opt.out, 0777) != 0 && errno != EEXIST) cannot("make", opt.out);
    j->directory = open(opt.out, O_RDONLY | O_DIRECTORY);
    if (j->directory < 0) cannot("open", opt.out);
    int claimed = flock(j->directory, LOCK_EX | LOCK_NB) == 0;
    if (!claimed && errno == EWOULDBLOCK) die(STATUS_DATA, "%s is in use by another run", opt.out);
    if (!claimed) warn("-o: its file system has no locks, so nothing keeps a second run out of it");
    Checkpoints c = find_checkpoints(opt.out);
    if (!opt.resume && c.models && !c.count)
        die(STATUS_USAGE, "%s already holds models: choose another -o", opt.out);
    if (!opt.resume && (c.models || access(out_path("log.csv"), F_OK) == 0))
        die(STATUS_USAGE, "%s already holds a run: -y 1 resumes it, or choose another -o", opt.out);
    if (c.last != j->from) die(STATUS_DATA, "%s was written to by another run just now", opt.out);
    if (c.last < 0 && c.models) die(STATUS_DATA, "%s holds models, but no state to resume from", opt.out);
    if (opt.resume && c.half > c.last)
        printf("%s: not resumed from step %d, whose model or state is alone\n", opt.out, c.half);
    if (c.last < 0 && opt.resume) printf("%s has no checkpoint: starting anew\n", opt.out);
    unlink(out_path(unfinished));  // what a killed run left
}

// Where a conversion has no grid yet, that becomes the finest, 20 at most, which leaves two bits above the
// largest value that streams reach in the first batches of d, if there are any.
static void find_grid(Model *m, Data *d) {
    enum { COARSE = 8, FINEST = 20, TOKENS = 4096, BATCHES = 256 };  // each is a pass over all weights
    const int64_t sequences = sequences_of(d, m->T, 0);
    if (m->net.grid != GRID_AUTO) return;
    m->net.grid = default_grids[m->net.mode];
    if (!sequences) {
        warn("--grid 14, with room for values up to 131072: no text was read to see how large they are");
        return;
    }
    m->net.grid = COARSE;
    stream_take_reach();
    for (int i = 0; i < sequences && i * m->T < TOKENS && i / m->B < BATCHES; i += m->B) {
        data_batch(d, m, (uint64_t)i, 0, 0);
        forward(m);
    }
    const int bits = stream_take_reach() - COARSE;  // before the point
    if (bits > 31 - COARSE) die(STATUS_NUMBERS, "streams are NaN or beyond 8388608: was it trained?");
    m->net.grid = smaller_of(FINEST, 31 - 2 - bits);
    printf("--grid %d: streams stay below %g in the first batches\n", m->net.grid, ldexp(1, bits));
}

static void load_networks(Model *m, int from) {
    model_alloc(m);
    if (model_path(from)) load_model(model_path(from), m);
    else init_parameters(m, (uint64_t)opt.seed);
    if (!m->has_teacher) return;
    Model teacher = teacher_of(m);
    load_model(opt.distill, &teacher);
}

static void begin_job(Job *j) {
    Model *m = &j->m;
    data_check(&j->data, opt.train, m->net.V, m->T);
    if (opt.val[0]) data_check(&j->val, opt.val, m->net.V, m->T);
    ranks_same("products", device_products());
    choices_begin(m);
    int64_t epoch = sequences_of(&j->data, m->T, 0) / ((int64_t)m->B * j->run.accumulate);
    j->total = given_or(opt.steps, (int)fmin((double)epoch, MAX_STEPS));
    if (opt.steps < 0 && (epoch < 1 || opt.shuffle)) die(STATUS_USAGE,
        "-x, how many steps: there is no once through the tokens with --shuffle, or if -d is more than all");
    if (opt.out[0] && rank == 0) claim_directory(j);
    load_networks(m, j->from);
    if (m->has_teacher)  // or else it is 0
        j->run.teacher = (int32_t)write_parameters(NULL, m->teacher, parameter_count(&m->net), 0, 0) | 1;
    find_grid(m, &j->data);
    if (j->from >= 0) load_state(j);
}

static int finish(void) {
    if (fflush(stdout) != 0 || ferror(stdout))
        die(STATUS_DATA, "cannot write to stdout: a full disk, or its reader has gone");
    ranks_end();
    return STATUS_OK;
}

static void on_illegal_instruction(int signal_number) {
    static const char line[] = "rev_gpt2: this processor lacks an instruction; make -B builds for it\n";
    (void)signal_number, (void)!write(2, line, sizeof line - 1);
    _exit(STATUS_USAGE);
}

// What a program begins with: its flags, out of a table. If they ask for help or the version it ends there.
static void begin(const Option *table, int count, const char *usage, int argc, char **argv) {
    program = usage;
    for (int fd = 0; fd <= 2;) fd = open("/dev/null", O_RDWR);  // no file of ours becomes a closed stdout
    ranks_begin();
    signal(SIGXFSZ, SIG_IGN);  // a file that may not grow fails like a full disk
    signal(SIGILL, on_illegal_instruction);
    parse_options(table, count, argc, argv);
    if (opt.help) print_help(table, count, usage);
    if (opt.version) printf("rev_gpt2 0.1\n");
    if (opt.help || opt.version) exit(finish());
    ranks_compare(argc, argv);
}

#if defined(__FINITE_MATH_ONLY__) && __FINITE_MATH_ONLY__
#error "-Ofast and -ffast-math assume that no number is NaN, and reorder sums: build with -O3"
#endif

// GNU's OpenMP lets a thread that waits spin for milliseconds, which makes two programs on the same cores 30
// times slower. It reads how long before main; so where the environment does not say, the program sets it and
// begins again. (valgrind follows it with --trace-children=yes.)
#if defined(_OPENMP) && defined(__linux__) && !defined(__clang__)
#include <sys/auxv.h>
static inline void spin_briefly(char **argv) {
    if (getenv("GOMP_SPINCOUNT") || getenv("OMP_WAIT_POLICY")) return;
    setenv("GOMP_SPINCOUNT", "1000", 1);
    execv((const char *)getauxval(AT_EXECFN), argv);  // where it fails, threads spin
}
#else
static inline void spin_briefly(char **argv) { (void)argv; }
#endif

int rev_gpt2_main(int argc, char **argv) {
    static const char usage[] = "train_rev_" BLOCK_NAME " -i TOKENS [flags]\n\nFlags with one dash are "
        "llm.c's; of its others, --memory replaces -r, -q 1 a constant -k.";
    static Job j;
    begin(options, OPTIONS, usage, argc, argv);
    choose_job(&j);
    print_job(&j);
    if (!opt.plan) {
        begin_job(&j);
        train(&j);
        model_free(&j.m);
    }
    data_close(&j.data);
    data_close(&j.val);
    return finish();
}

#ifndef REV_GPT2_NO_MAIN
int main(int argc, char **argv) {
    spin_briefly(argv);
    return rev_gpt2_main(argc, argv);
}
#endif

// -------------------------------------------------------------------------------------------------
// Part VI: layers for the CPU

// ---- an element of a stream, as the layers of both twins read and make it

// x in 32 bits
DEVICE static inline int32_t narrowed(int64_t x, int *reach) {
    int32_t s = (int32_t)x;
    *reach |= (s ^ s >> 31) | -(x != s);
    return s;
}

static inline int bits_of(int reach) {
    int bits = reach < 0 ? 32 : 0;
    for (; reach > 0; reach /= 2) bits++;
    return bits;
}

static inline real_t grid_unit(int grid) { return grid ? (real_t)ldexp(1, -grid) : 0; }  // 0: floating point
DEVICE static inline real_t stream_value(stream_t s, real_t unit) {
    return unit != 0 ? (real_t)s.fixed * unit : s.real;
}

DEVICE static inline stream_t embed_element(real_t x, real_t per_unit, int *reach) {
    stream_t s;
    memset(&s, 0, sizeof s);
    if (per_unit != 0) s.fixed = narrowed(to_grid(x, per_unit, reach), reach);
    else s.real = x;
    return s;
}

#ifndef REV_GPT2_OTHER_LAYERS
// ==== the CPU's, from here to the end ================================================================

#include <sched.h>
#include <sys/resource.h>

const int chunk_tokens = 1024, head_chunk_tokens = 1024, slice_tokens = 2048;
const size_t weight_copy_bytes = 0;  // products take weights as they are
void layers_weights(const param_t *w, void *to, size_t count) { (void)w, (void)to, (void)count; }
void layers_check(int sequences, int C, int NH) { (void)sequences, (void)C, (void)NH; }  // no such limits

// A function that is inlined everywhere meets its callers' constants, and the compiler makes code for each.
#define INLINE static inline __attribute__((always_inline))
static inline size_t smaller_size(size_t a, size_t b) { return a < b ? a : b; }
static inline real_t real_max(real_t a, real_t b) { return a > b ? a : b; }
void device_finish(void) {}
void *device_alloc(size_t bytes) {
    void *p = aligned_alloc(256, round256(bytes));
    if (p) memset(p, 0, bytes);
    return p;
}
void device_free(void *p) { free(p); }
enum { MEBI = 1 << 20 };  // bytes that a thread takes at a time
void device_zero(void *p, size_t bytes) {
    profile("device_zero", 0, (double)bytes);
    #pragma omp parallel for
    for (size_t i = 0; i < bytes; i += MEBI) memset((char *)p + i, 0, smaller_size(MEBI, bytes - i));
}
void device_copy(void *dst, const void *src, size_t bytes) {
    profile("device_copy", 0, 2.0 * (double)bytes);
    #pragma omp parallel for
    for (size_t i = 0; i < bytes; i += MEBI)
        memcpy((char *)dst + i, (const char *)src + i, smaller_size(MEBI, bytes - i));
}
void to_device(void *dst, const void *src, size_t bytes) { memcpy(dst, src, bytes); }
void to_host(void *dst, const void *src, size_t bytes) { memcpy(dst, src, bytes); }
size_t device_peak_bytes(void) {
    struct rusage u;
    getrusage(RUSAGE_SELF, &u);
#ifdef __APPLE__
    return (size_t)u.ru_maxrss;  // bytes there, KiB elsewhere
#else
    return (size_t)u.ru_maxrss * 1024;
#endif
}

// The least limit that the process's control group, of version 2, or one above it sets: `self` is its
// /proc/self/cgroup, `mount` where the groups are mounted.
static size_t container_limit(const char *self, const char *mount) {
    size_t least = SIZE_MAX;
    char line[1024], path[2048], *end = NULL;
    FILE *groups = fopen(self, "r");
    while (groups && !end && fgets(line, sizeof line, groups))
        if (strncmp(line, "0::", 3) == 0) end = strchr(line, '\n');
    if (groups) fclose(groups);
    for (; end; end = strrchr(line, '/')) {
        unsigned long long bytes;
        *end = 0;
        snprintf(path, sizeof path, "%s%s/memory.max", mount, line + 3);
        FILE *f = fopen(path, "r");
        if (f && fscanf(f, "%llu", &bytes) == 1 && bytes < least) least = (size_t)bytes;  // "max" is none
        if (f) fclose(f);
    }
    return least;
}

size_t device_memory_bytes(void) {
    size_t bytes = (size_t)sysconf(_SC_PHYS_PAGES) * sysconf(_SC_PAGESIZE);
    size_t container = container_limit("/proc/self/cgroup", "/sys/fs/cgroup");
    struct rlimit space;
    if (getrlimit(RLIMIT_AS, &space) == 0) bytes = smaller_size((size_t)space.rlim_cur, bytes);
    return smaller_size(container, bytes);
}

// ---- streams
// A loop over elements is cut at multiples of PIECE, itself one of 32. If threads began anywhere, the
// compiler's vectors and what is left over would be other elements for another number of threads, and it may
// contract multiply and add in one but not in the other.
static int reached;
int stream_take_reach(void) {
    int reach = reached;
    reached = 0;
    return bits_of(reach);
}

void stream_embed(stream_t *prev, stream_t *cur, const int *tokens, const param_t *wte, const param_t *wpe,
                  int n, int T, int C, int grid) {
    profile("stream_embed", 0, (double)n * C * (sizeof(param_t) + 2 * sizeof(stream_t)));
    const size_t width = C;
    real_t unit = grid ? (real_t)ldexp(1, grid) : 0;
    int reach = 0;
    #pragma omp parallel for reduction(|:reach)
    for (int i = 0; i < n; i++) {
        const param_t *word = wte + tokens[i]*width, *pos = wpe ? wpe + i % T * width : NULL;
        stream_t *x = prev + i*width, *y = cur + i*width;
        for (int c = 0; c < C; c++)
            x[c] = y[c] = embed_element(pos ? word[c] + pos[c] : word[c], unit, &reach);
    }
    reached |= reach;
}

// Each way to multiply by alpha has a function of its own, for a piece, which returns what it reaches: so a
// loop holds only what it needs and becomes vector code; f and f2 in one struct, or threads in the loop,
// would keep compilers from that. step.gamma comes in units of the grid.
static inline real_t force_at(const act_t *f, const act_t *f2, size_t i) { return f2 ? f[i] + f2[i] : f[i]; }

// The paper's networks have alpha = 1, 0 or -1, which loses nothing, so nothing has to be kept. With alpha =
// 0 a step back multiplies s by 1, lest what a flipped bit has changed there disappear.
static int step_unit(stream_t *to, const stream_t *s, const stream_t *cur, const act_t *f, const act_t *f2,
                     size_t count, Coefficients step, int direction) {
    real_t gamma = (real_t)step.gamma;
    int64_t factor = direction < 0 && step.alpha == 0 ? 1 : step.alpha;
    int add_factor = direction > 0 ? 1 : -(int)factor, reach = 0;
    #pragma omp simd reduction(|:reach)
    for (size_t i = 0; i < count; i++) {
        int64_t add = increment(cur[i].fixed, force_at(f, f2, i), step, gamma, &reach);
        to[i].fixed = narrowed(factor * s[i].fixed + add_factor * add, &reach);
    }
    return reach;
}

// In floating point a step back is rounded: next = alpha prev + add, and prev = next / alpha - add / alpha. A
// step with alpha = 0 takes nothing from s, which may hold a NaN.
static void step_float(stream_t *to, const stream_t *s, const stream_t *cur, const act_t *f, const act_t *f2,
                       size_t count, Coefficients step, int direction) {
    double alpha = ldexp(step.alpha, -step.shift), inverse = alpha == 0 ? 1 : 1 / alpha;
    real_t beta = (real_t)ldexp(step.beta, -step.shift), gamma = (real_t)step.gamma;
    real_t scale = (real_t)(direction > 0 ? alpha : inverse);
    real_t with = direction > 0 ? 1 : -scale;
    for (size_t i = 0; i < count; i++) {
        real_t add = with * (beta * cur[i].real + gamma * force_at(f, f2, i));
        to[i].real = scale != 0 ? scale * s[i].real + add : add;
    }
}

// midpoint-a multiplies by sixteenths. A step puts the remainders on the stack r and a step back takes them
// off, for without them the division would not be exact.
static int step_remainders(stream_t *to, const stream_t *s, const stream_t *cur, const act_t *f,
                           const act_t *f2, uint16_t *r, size_t count, Coefficients step, int direction) {
    real_t gamma = (real_t)step.gamma;
    int reach = 0, sign = step.alpha < 0 ? -1 : 1, n = abs(step.alpha);
    for (size_t i = 0; i < count; i++) {
        int64_t add = increment(cur[i].fixed, force_at(f, f2, i), step, gamma, &reach), t;
        if (direction > 0) t = sign * multiply_sixteenths(s[i].fixed, n, r + i) + add;
        else t = unmultiply_sixteenths(sign * (s[i].fixed - add), n, r + i);
        to[i].fixed = narrowed(t, &reach);
    }
    return reach;
}

// Word b of a group of 32 elements holds bit b of each.
static inline void keep_bits(uint32_t *words, const uint32_t bits[32], int shift) {
    for (int b = 0; b < shift; b++) {
        uint32_t word = 0;
        #pragma omp simd reduction(|:word)
        for (int j = 0; j < 32; j++) word |= (bits[j] >> b & 1) << j;
        words[b] = word;
    }
}
static inline void recall_bits(uint32_t bits[32], const uint32_t *words, int shift) {
    for (int b = 0; b < shift; b++)
        for (int j = 0; j < 32; j++) bits[j] |= (words[b] >> j & 1) << b;
}

// Conversions multiply by alpha = n/2^shift, which drops the low bits of s: low keeps them, unless it is NULL
// because nothing will step back.
static int step_bits(stream_t *to, const stream_t *s, const stream_t *cur, const act_t *f, const act_t *f2,
                     uint32_t *low, size_t count, Coefficients step, int direction) {
    real_t gamma = (real_t)step.gamma;
    int reach = 0;
    for (size_t g = 0; g < count; g += 32) {
        uint32_t bits[32] = {0}, *words = low ? low + g / 32 * step.shift : NULL;
        int width = (int)smaller_size(32, count - g);
        if (direction < 0) recall_bits(bits, words, step.shift);
        for (int j = 0; j < width && direction > 0; j++) bits[j] = (uint32_t)s[g + j].fixed;
        if (direction > 0 && words) keep_bits(words, bits, step.shift);
        #pragma omp simd reduction(|:reach)
        for (int j = 0; j < width; j++) {
            int64_t add = increment(cur[g + j].fixed, force_at(f, f2, g + j), step, gamma, &reach);
            int64_t t = s[g + j].fixed;
            if (direction > 0) t = multiply(t, step.alpha, step.shift) + add;
            else t = unmultiply(t - add, step.alpha, step.shift, bits[j]);
            to[g + j].fixed = narrowed(t, &reach);
        }
    }
    return reach;
}

void stream_step(stream_t *to, const stream_t *from, const stream_t *cur, const act_t *f, const act_t *f2,
                 uint16_t *r, uint32_t *low, size_t count, Coefficients step, int grid, int direction) {
    double bytes = 3 * sizeof(stream_t) + (f2 ? 2 : 1) * sizeof(act_t);
    if (low) bytes += step.shift / 8.0;
    profile("stream_step", 0, (double)count * (r ? bytes + 4 : bytes));
    step.gamma = ldexp(step.gamma, grid);
    int reach = 0;
    #pragma omp parallel for reduction(|:reach)
    for (size_t i = 0; i < count; i += PIECE) {
        const size_t n = smaller_size(PIECE, count - i);
        const stream_t *s = from + i, *p = cur + i;
        const act_t *a = f + i, *b = f2 ? f2 + i : NULL;
        if (!grid) step_float(to + i, s, p, a, b, n, step, direction);
        else if (r) reach |= step_remainders(to + i, s, p, a, b, r + i, n, step, direction);
        else if (step.shift == 0) reach |= step_unit(to + i, s, p, a, b, n, step, direction);
        else reach |= step_bits(to + i, s, p, a, b, low ? low + i/32*step.shift : NULL, n, step, direction);
    }
    reached |= reach;
}

// Sums over n things are cut at the same places for any number of threads: slice p of SLICES.
enum { SLICES = 64 };
static inline size_t slice(size_t n, size_t p) { return n / SLICES * p + n % SLICES * p / SLICES; }
static inline double in_units(stream_t s, int grid) { return grid ? (double)s.fixed : (double)s.real; }

double stream_distance(const stream_t *x, const stream_t *y, const uint16_t *r, size_t count, int grid) {
    profile("stream_distance", 0, (double)count * (y ? 2 : 1) * sizeof(stream_t));
    double sums[SLICES], total = 0;
    #pragma omp parallel for
    for (int p = 0; p < SLICES; p++) {
        double sum = 0;
        for (size_t i = slice(count, p); i < slice(count, p + 1); i++) {
            double d = in_units(x[i], grid);
            if (y) d -= in_units(y[i], grid);
            sum += d * d + (r ? r[i] : 0);
        }
        sums[p] = sum;
    }
    for (int p = 0; p < SLICES; p++) total += sums[p];
    return sqrt(total);
}
size_t layers_order_bytes(int n) { return (void)n, (size_t)0; }
void layers_order(void *order, const int *tokens, int n) { (void)order, (void)tokens, (void)n; }
void embed_backward(real_t *dwte, real_t *dwpe, const real_t *d1, const real_t *d2, const int *tokens,
                    const void *order, int n, int T, int C) {
    profile("embed_backward", 0, (double)n * C * ((d2 ? 2 : 1) + 4) * sizeof(real_t));
    (void)order;  // a thread's columns meet the tokens as they come
    const size_t width = C;
    enum { COLUMNS = 16 };  // a thread owns columns, not tokens: no two threads meet in a row
    #pragma omp parallel for
    for (int c0 = 0; c0 < C; c0 += COLUMNS)
        for (int i = 0; i < n; i++) {
            real_t *word = dwte + tokens[i]*width, *place = dwpe ? dwpe + i % T * width : NULL;
            for (int c = c0; c < smaller_of(c0 + COLUMNS, C); c++) {
                real_t d = d1[i*width + c] + (d2 ? d2[i*width + c] : 0);
                word[c] += d;
                if (place) place[c] += d;
            }
        }
}

// exp makes no call here, so that loops over it become vector code: it is 2^n times a polynomial, the best on
// [-ln2/2, ln2/2], within 2e-7 (5e-6 above 87). NaN stays NaN; below -87 it is 0, far above infinite.
static inline real_t real_exp(real_t x) {
    if (sizeof(real_t) == 8) return (real_t)exp(x);
    union { float f; uint32_t u; } k, scale;
    float f = (float)x;
    k.f = f * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: the sum has no room for a fraction, so it is rounded
    int32_t n = smaller_of((int32_t)(k.u - 0x4B400000u), 127);
    float r = (f - (float)n * 0.693359375f) + (float)n * 2.12194440e-4f;  // ln 2 in two: the first is exact
    scale.u = ((uint32_t)n + 127u) << 23;
    float p = 0.0416682256f + r * (0.0083748158f + r * 0.0013836846f);
    p = 1 + r * (1 + r * (0.4999999208f + r * (0.1666642017f + r * p)));
    scale.f *= p;
    scale.u &= f < -87.0f ? 0 : ~0u;  // and not p * scale, lest there be a branch
    return (real_t)scale.f;
}

// GELU with tanh, x/2 (1 + tanh u) = x sigmoid(2u) for u = sqrt(2/pi) (x + 0.044715 x^3)
static const real_t gelu_k = (real_t)0.7978845608028654;
static inline real_t gelu_divisor(real_t x) {
    return 1 + real_exp(-2 * gelu_k * (x + (real_t)0.044715 * x * x * x));
}
static inline real_t gelu(real_t x) { return x / gelu_divisor(x); }
static inline real_t gelu_slope(real_t x) {
    real_t s = 1 / gelu_divisor(x);
    return s + x * s * (1 - s) * 2 * gelu_k * (1 + (real_t)(3 * 0.044715) * x * x);
}

// ---- matrix product
// c (M, N) = sum_k a(i,k) b(k,j), with a(i,k) = a[i*a_row + k*a_col] and so for b: strides, one of them 1,
// make it any orientation. Both operands are first packed into panels, MR rows of a and NR columns of b wide,
// so that the innermost loop reads memory in order and keeps an MR x NR tile of c in registers.
// dev/cpu/matmul.c takes the same way in steps, each with its gain. A panel consists of words: numbers, or
// with --precision bf16 pairs of them, k and k + 1, rounded to bf16: an instruction multiplies a vector of
// pairs, or a whole tile (AMX).
enum { NUMBERS, PAIRS, TILES };
#if defined(__AVX512F__)
enum { VECTOR_BYTES = 64, MR = 12 };
#elif defined(__AVX__)
enum { VECTOR_BYTES = 32, MR = 6 };
#elif defined(__aarch64__)
enum { VECTOR_BYTES = 16, MR = 12 };
#else
enum { VECTOR_BYTES = 16, MR = 6 };
#endif
typedef real_t vector_t __attribute__((vector_size(VECTOR_BYTES), aligned(sizeof(real_t)), may_alias));
enum { LANES = VECTOR_BYTES / sizeof(real_t), NV = 2, NR = NV * LANES };
// In words, a panel of b (KC, NR) and TASK rows of a (for tiles TASK_TILES) stay in L2, blocks of a (MC, KC)
// and b (KC, NC) in L3. 96 is a multiple of SIDE and of every MR and NR, KC of a tile's 16 words.
enum { GROUP = 96, KC = 1024, MC = 12 * GROUP, NC = 32 * GROUP, TASK = 8 * MR, TASK_TILES = 4 * GROUP };
enum { SIDE = 32 };  // four tiles hold sums of SIDE rows and SIDE columns

typedef struct { const real_t *at; int64_t row, col; } Matrix;
static Matrix matrix(const real_t *at, int64_t row, int64_t col) { return (Matrix){at, row, col}; }
static inline Matrix part_of(Matrix x, int i, int k) {
    return matrix(x.at + i*x.row + k*x.col, x.row, x.col);
}

static int word_kind = NUMBERS;
#if (defined(REV_GPT2_BF16) && defined(__AVX512BF16__)) || defined(EMULATE_TILES)
#include REV_GPT2_BF16  // `make` puts dev/cpu/bf16.h here; where a processor has no bf16, words are numbers:
#else
int layers_bf16(int on) { return !on; }
// how many words K numbers make; the rows of a, and the columns of b, in a panel
static inline int words_of(int K) { return K; }
static inline int panel_rows(void) { return MR; }
static inline int panel_columns(void) { return NR; }
#define pack_words(out, x, rows, K, width, is_first) ((void)(is_first))  // packs what is not numbers
#define multiply_pairs(sum, a, b) (sum)
#endif
#ifndef HAS_TILES
#define multiply_tiles(sums, K, a, b, c, row) ((void)(sums))
#define saturate_tiles() 0.0
#endif

#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define SHUFFLE __builtin_shufflevector
#endif
#endif
typedef real_t four_t __attribute__((vector_size(4 * sizeof(real_t)), aligned(sizeof(real_t)), may_alias));
// Sets out[k*width + i] = x[i*row + k] for i < rows, k < K; four by four, for which compilers know shuffles.
static inline void transpose(real_t *out, int width, const real_t *x, int64_t row, int rows, int K) {
    int rows4 = 0, K4 = 0;
#ifdef SHUFFLE
    rows4 = rows / 4 * 4;
    K4 = K / 4 * 4;
    for (int k = 0; k < K4; k += 4)
        for (int i = 0; i < rows4; i += 4) {
            const real_t *from = x + i*row + k;
            real_t *to = out + k*width + i;
            four_t a = *(const four_t *)from, b = *(const four_t *)(from + row);
            four_t c = *(const four_t *)(from + 2*row), d = *(const four_t *)(from + 3*row);
            four_t ab0 = SHUFFLE(a, b, 0, 4, 1, 5), ab2 = SHUFFLE(a, b, 2, 6, 3, 7);
            four_t cd0 = SHUFFLE(c, d, 0, 4, 1, 5), cd2 = SHUFFLE(c, d, 2, 6, 3, 7);
            *(four_t *)to = SHUFFLE(ab0, cd0, 0, 1, 4, 5);
            *(four_t *)(to + width) = SHUFFLE(ab0, cd0, 2, 3, 6, 7);
            *(four_t *)(to + 2*width) = SHUFFLE(ab2, cd2, 0, 1, 4, 5);
            *(four_t *)(to + 3*width) = SHUFFLE(ab2, cd2, 2, 3, 6, 7);
        }
#endif
    for (int i = 0; i < rows; i++)
        for (int k = i < rows4 ? K4 : 0; k < K; k++) out[k*width + i] = x[i*row + k];
}

// Packs panels of `width` rows one by one: word k*width + i of a panel is x(i, k), 0 beyond `rows`.
INLINE void pack_numbers(real_t *out, Matrix x, int rows, int K, const int width) {
    const int whole = rows / width * width, rest = rows - whole;
    if (rest) memset(out + whole*K, 0, sizeof(real_t) * K * width);
    if (x.row == 1)  // all panels at once, since they share rows of memory
        for (int k = 0; k < K; k++, x.at += x.col) {
            real_t *to = out + k*width;
            for (int i = 0; i < whole; i += width, to += K*width)
                memcpy(to, x.at + i, sizeof(real_t) * width);
            for (int i = 0; i < rest; i++) to[i] = x.at[whole + i];
        }
    else
        for (int i = 0; i < rows; i += width)
            transpose(out + i*K, width, x.at + i*x.row, x.row, smaller_of(width, rows - i), K);
}

// A product's first operand and its second, whose rows are its columns
INLINE void pack(real_t *out, Matrix x, int rows, int K, const int width, const int is_first) {
    if (word_kind == NUMBERS) pack_numbers(out, x, rows, K, width);
    else pack_words(out, x, rows, K, width, is_first);
}
static void pack_a(real_t *out, Matrix a, int rows, int K) { pack(out, a, rows, K, MR, 1); }
static void pack_b(real_t *out, Matrix b, int columns, int K) {
    pack(out, matrix(b.at, b.col, b.row), columns, K, NR, 0);
}

// What becomes of a product on its way into c
typedef struct {
    int accumulate;        // it is added to c
    const real_t *bias;    // (N), added to it
    real_t *gelu;          // (M, N), GELU(c) goes there as well
    const real_t *slope;   // (M, N), it is multiplied with GELU' of this
} Epilogue;

// Returns sum + a b, of pairs if the panels hold these.
static inline vector_t multiply_add(vector_t sum, real_t a, vector_t b, int pairs) {
    if (pairs) return multiply_pairs(sum, a, b);
    return sum + a * b;
}

// Makes the first mr rows of tile (MR, NR) = panel a (K, MR) times panel b (K, NR); the others become 0.
// Loops over sums end at a constant: compilers unroll them before they know mr, and sums lie in registers.
INLINE void multiply_panels(vector_t *tile, int mr, int K, const real_t *a, const real_t *b, int two) {
    vector_t sum[MR * NV] = {{0}};
    for (int k = 0; k < K; k++, a += MR, b += NR) {
        for (int j = 0; j < NR; j += 64 / (int)sizeof(real_t)) __builtin_prefetch(b + 8*NR + j);
        __builtin_prefetch(a + 8*MR);
        #pragma GCC unroll 24
        for (int i = 0; i < MR * NV; i++)
            if (i < mr * NV)
                sum[i] = multiply_add(sum[i], a[i / NV], ((const vector_t *)b)[i % NV], two);
    }
    #pragma GCC unroll 24
    for (int i = 0; i < MR * NV; i++) tile[i] = sum[i];
}

INLINE void finish_row(real_t *c, real_t *t, int columns, Epilogue e) {
    for (int j = 0; e.accumulate && j < columns; j++) t[j] += c[j];
    for (int j = 0; e.bias && j < columns; j++) t[j] += e.bias[j];
    for (int j = 0; e.slope && j < columns; j++) t[j] *= gelu_slope(e.slope[j]);
    for (int j = 0; j < columns; j++) c[j] = t[j];
    for (int j = 0; e.gelu && j < columns; j++) e.gelu[j] = gelu(t[j]);
}

// Makes a tile (rows, columns) of c, whose rows are `row` apart, from panels of K words.
static inline void multiply_tile(real_t *c, int64_t row, int rows, int columns, int K, const real_t *a,
                                 const real_t *b, Epilogue e) {
    real_t tile[SIDE * SIDE] __attribute__((aligned(64)));
    vector_t *sums = (vector_t *)tile;
    for (int i = 0; i < rows && word_kind != TILES; i++)  // c is needed only at the end: it comes meanwhile
        for (int j = 0; j < columns; j += 64 / (int)sizeof(real_t)) __builtin_prefetch(c + i*row + j, 1);
    if (word_kind == TILES) multiply_tiles(tile, K, a, b, c, row);
    else if (word_kind == PAIRS) multiply_panels(sums, MR, K, a, b, 1);
    else if (rows > MR / 3) multiply_panels(sums, MR, K, a, b, 0);
    else multiply_panels(sums, MR / 3, K, a, b, 0);
    const int across = panel_columns();
    for (int i = 0; i < rows; i++, c += row) {
        if (columns == NR) finish_row(c, tile + i*across, NR, e);
        else finish_row(c, tile + i*across, columns, e);
        if (e.slope) e.slope += row;
        if (e.gelu) e.gelu += row;
    }
}

static double fastest;
static real_t *scratch;
void layers_begin(void *memory) { scratch = (real_t *)memory; }
static size_t block_words(int M, int N, int K) {  // words for the blocks of a product
    return (size_t)smaller_of(KC, K + 16) * (size_t)(smaller_of(MC, M + SIDE) + smaller_of(NC, N + SIDE));
}
size_t layers_scratch_bytes(int n, int C, int OC, int NH) {
    size_t products = larger_of(block_words(n, OC, C), block_words(n, C, OC));
    size_t of_weights = larger_of(block_words(OC, C, n), block_words(C, OC, n));
    size_t rest = larger_of((size_t)SLICES * 3 * C, (size_t)n * NH);  // layernorm, attention
    return larger_of(larger_of(products, of_weights), rest) * sizeof(real_t);
}

// Rows of c are `row` apart. All threads pack a part of each block, then take tiles of c as they come. No one
// waits for the block of b alone: the barrier behind that of a does for both.
static void gemm(real_t *c, int row, int M, int N, int K, Matrix a, Matrix b, Epilogue e) {
    const int all = words_of(K), passes = (all + KC - 1) / KC, mr = panel_rows(), nr = panel_columns();
    const int pass = (all + passes - 1) / passes, task = word_kind == TILES ? TASK_TILES : TASK;
    const int stretch = word_kind == NUMBERS ? pass : (pass + 15) / 16 * 32;  // numbers a pass takes of K
    const size_t width = row;
    real_t *packed_b = scratch;
    real_t *packed_a = packed_b + smaller_of(NC, (N + nr - 1) / nr * nr) * smaller_of(KC, all);
    const double start = seconds(), multiplied = (double)M * N * K;
    #pragma omp parallel if (multiplied > 200000)  // less is done before the threads have met
    for (int j0 = 0; j0 < N; j0 += NC)
        for (int k0 = 0; k0 < K; k0 += stretch) {
            const int n = smaller_of(NC, N - j0), k = smaller_of(stretch, K - k0), words = words_of(k);
            const int last = k0 + k == K;
            #pragma omp for nowait
            for (int j = 0; j < n; j += GROUP)
                pack_b(packed_b + j*words, part_of(b, k0, j0 + j), smaller_of(GROUP, n - j), k);
            for (int i0 = 0; i0 < M; i0 += MC) {
                const int m = smaller_of(MC, M - i0);
                #pragma omp for
                for (int i = 0; i < m; i += GROUP)
                    pack_a(packed_a + i*words, part_of(a, i0 + i, k0), smaller_of(GROUP, m - i), k);
                #pragma omp for collapse(2) schedule(dynamic, 4)
                for (int r = 0; r < m; r += task)
                    for (int j = 0; j < n; j += nr)
                        for (int i = r; i < smaller_of(r + task, m); i += mr) {
                            const size_t at = (i0 + i)*width + j0 + j;
                            Epilogue here = {e.accumulate || k0 > 0, NULL, NULL, NULL};
                            if (e.bias && k0 == 0) here.bias = e.bias + j0 + j;
                            if (e.gelu && last) here.gelu = e.gelu + at;
                            if (e.slope && last) here.slope = e.slope + at;
                            multiply_tile(c + at, row, smaller_of(mr, m - i), smaller_of(nr, n - j),
                                          words, packed_a + i*words, packed_b + j*words, here);
                        }
            }
        }
    if (multiplied > 1e7) fastest = fmax(fastest, 2 * multiplied / (seconds() - start));
}

// The same for one thread and a tile of at most TILE rows, `row` apart. It packs TILE by TILE numbers at a
// time on its caller's stack, and not again what is there: operands that stay are packed once.
enum { TILE = 64, TILE_A = (TILE + MR - 1) / MR * MR };
typedef struct { Matrix x; const real_t *packed; real_t words[TILE_A * TILE]; } Panel;
static inline void set_panel(Panel *p, const real_t *at, int64_t row, int64_t col) {
    p->x = matrix(at, row, col);
    p->packed = NULL;
}
static void gemm_tile(real_t *c, int64_t row, int M, int N, int K, Panel *a, Panel *b, int accumulate) {
    const int mr = panel_rows(), nr = panel_columns();
    for (int k0 = 0; k0 < K; k0 += TILE) {
        const int k = smaller_of(TILE, K - k0), words = words_of(k);
        const Matrix rows = part_of(a->x, 0, k0);
        Epilogue e = {accumulate || k0 > 0, NULL, NULL, NULL};
        if (a->packed != rows.at) pack_a(a->words, rows, M, k);
        a->packed = rows.at;
        for (int j0 = 0; j0 < N; j0 += TILE) {
            const int n = smaller_of(TILE, N - j0);
            const Matrix columns = part_of(b->x, k0, j0);
            if (b->packed != columns.at) pack_b(b->words, columns, n, k);
            b->packed = columns.at;
            for (int j = 0; j < n; j += nr)
                for (int i = 0; i < M; i += mr)
                    multiply_tile(c + i*row + j0 + j, row, smaller_of(mr, M - i), smaller_of(nr, n - j),
                                  words, a->words + i*words, b->words + j*words, e);
        }
    }
}

// A few rows, as in generating, are neither packed, since the weights are read but once, nor rounded to bf16.
enum { FEW = 2 };
static void matvec(act_t *out, const act_t *x, const param_t *w, const param_t *bias, int n, int C, int OC,
                   int row) {
    const size_t width = C;
    #pragma omp parallel for if ((int64_t)n * C * OC > 200000)
    for (int o = 0; o < OC; o++)
        for (int i = 0; i < n; i++) {
            real_t sum = 0;
            #pragma omp simd reduction(+:sum)
            for (int c = 0; c < C; c++) sum += x[i*width + c] * w[o*width + c];
            out[i*row + o] = sum + (bias ? bias[o] : 0);
        }
}

void matmul_forward(act_t *out, const act_t *inp, const param_t *weight, const param_t *bias, int n, int C,
                    int OC, int width) {
    profile("matmul_forward", 2.0 * n * C * OC, ((double)n * (C + OC) + (double)C * OC) * sizeof(act_t));
    Epilogue e = {0, bias, NULL, NULL};
    if (n <= FEW) matvec(out, inp, weight, bias, n, C, OC, width);
    else gemm(out, width, n, OC, C, matrix(inp, C, 1), matrix(weight, 1, C), e);
}

void matmul_gelu_forward(act_t *out, act_t *pre, const act_t *inp, const param_t *weight, const param_t *bias,
                         int n, int C, int OC) {
    const double numbers = (double)n * (C + 2 * OC) + (double)C * OC;
    profile("matmul_gelu_forward", 2.0 * n * C * OC, numbers * sizeof(act_t));
    Epilogue e = {0, bias, out, NULL};
    if (n > FEW) gemm(pre, OC, n, OC, C, matrix(inp, C, 1), matrix(weight, 1, C), e);
    else matvec(pre, inp, weight, bias, n, C, OC, OC);
    for (int i = 0; n <= FEW && i < n * OC; i++) out[i] = gelu(pre[i]);
}

void matmul_backward(act_t *dinp, real_t *dweight, real_t *dbias, const act_t *dout, const act_t *inp,
                     const param_t *weight, const act_t *pre, int n, int C, int OC, int width) {
    profile("matmul_backward", 4.0 * n * C * OC, ((double)n * (2 * C + OC) + 3.0 * C * OC) * sizeof(act_t));
    Epilogue add = {1, NULL, NULL, NULL}, set = {0, NULL, NULL, pre};
    const size_t row = width;
    gemm(dweight, C, OC, C, n, matrix(dout, 1, width), matrix(inp, C, 1), add);
    enum { COLUMNS = 64 };  // a thread owns columns
    #pragma omp parallel for
    for (int o0 = 0; o0 < (dbias ? OC : 0); o0 += COLUMNS) {
        real_t sum[COLUMNS] = {0};
        int columns = smaller_of(COLUMNS, OC - o0);
        for (int i = 0; i < n; i++)
            for (int o = 0; o < columns; o++) sum[o] += dout[i*row + o0 + o];
        for (int o = 0; o < columns; o++) dbias[o0 + o] += sum[o];
    }
    gemm(dinp, C, n, C, OC, matrix(dout, width, 1), matrix(weight, C, 1), set);
}

// ---- layernorm
// Sets x (C) = s + add of one token; returns its mean, and *rstd = 1 / standard deviation.
INLINE real_t layer_row(real_t *x, real_t *rstd, const stream_t *s, const act_t *add, int C, real_t unit) {
    real_t mean = 0, variance = 0;
    #pragma omp simd
    for (int c = 0; c < C; c++) x[c] = stream_value(s[c], unit);
    for (int c = 0; add && c < C; c++) x[c] += add[c];
    #pragma omp simd reduction(+:mean)
    for (int c = 0; c < C; c++) mean += x[c];
    mean /= (real_t)C;
    #pragma omp simd reduction(+:variance)
    for (int c = 0; c < C; c++) variance += (x[c] - mean) * (x[c] - mean);
    *rstd = (real_t)(1 / sqrt(variance / (real_t)C + (real_t)1e-5));
    return mean;
}

void layernorm_forward(act_t *out, const stream_t *s, const act_t *add, const param_t *weight,
                       const param_t *bias, int n, int C, int grid) {
    profile("layernorm_forward", 0, (double)n * C * (sizeof(stream_t) + (add ? 2 : 1) * sizeof(act_t)));
    const size_t width = C, tokens = n;
    const real_t unit = grid_unit(grid);
    #pragma omp parallel for
    for (size_t p = 0; p < SLICES; p++) {
        real_t *x = scratch + p*3*width, rstd;  // in a row of its own: loads need not wait for stores to out
        for (size_t i = slice(tokens, p); i < slice(tokens, p + 1); i++) {
            real_t mean = layer_row(x, &rstd, s + i*width, add ? add + i*width : NULL, C, unit);
            #pragma omp simd
            for (int c = 0; c < C; c++) out[i*width + c] = (x[c] - mean) * rstd * weight[c] + bias[c];
        }
    }
}

// Gradients of weight and bias are summed up a slice of tokens at a time, and then the slices in their order.
void layernorm_backward(real_t *ds, act_t *dadd, real_t *dweight, real_t *dbias, const act_t *dout,
                        const stream_t *s, const act_t *add, const param_t *weight, int n, int C, int grid) {
    profile("layernorm_backward", 0, (double)n * C *
            (sizeof(stream_t) + 2 * sizeof(real_t) + (1 + !!add + 2 * !!dadd) * sizeof(act_t)));
    const size_t width = C, tokens = n;
    const real_t unit = grid_unit(grid);
    #pragma omp parallel for
    for (size_t p = 0; p < SLICES; p++) {
        real_t *dw = scratch + p*3*width, *db = dw + C, *x = db + C;  // x: one token at a time
        memset(dw, 0, sizeof(real_t) * 2 * width);
        for (size_t i = slice(tokens, p); i < slice(tokens, p + 1); i++) {
            const act_t *d = dout + i*width;
            real_t *to = ds + i*width, *to_add = dadd ? dadd + i*width : NULL, sum = 0, sum_x = 0, rstd;
            real_t mean = layer_row(x, &rstd, s + i*width, add ? add + i*width : NULL, C, unit);
            #pragma omp simd reduction(+:sum,sum_x)
            for (int c = 0; c < C; c++) {
                x[c] = (x[c] - mean) * rstd;
                dw[c] += d[c] * x[c];
                db[c] += d[c];
                sum += d[c] * weight[c];
                sum_x += d[c] * weight[c] * x[c];
            }
            sum /= (real_t)C;
            sum_x /= (real_t)C;
            #pragma omp simd
            for (int c = 0; c < C; c++) {
                x[c] = (d[c] * weight[c] - sum - x[c] * sum_x) * rstd;
                to[c] += x[c];
            }
            for (int c = 0; to_add && c < C; c++) to_add[c] += x[c];
        }
    }
    enum { COLUMNS = 64 };  // a thread owns columns
    #pragma omp parallel for
    for (int c0 = 0; c0 < C; c0 += COLUMNS)
        for (int p = 0; p < SLICES; p++) {
            const real_t *dw = scratch + p*3*width, *db = dw + C;
            for (int c = c0; c < smaller_of(c0 + COLUMNS, C); c++) {
                dweight[c] += dw[c];
                dbias[c] += db[c];
            }
        }
}

// ---- attention: tiles of TILE queries against TILE keys, the softmax carried along from tile to tile
// Of a tile of queries, and for each of them what is carried along: the highest score so far, the sum of
// exp(scale (score - highest)), and by how much the last tile of keys has shrunk what was summed before.
typedef struct { Panel q; real_t highest[TILE], sum[TILE], shrink[TILE]; } Softmax;
// Queries that read a tile of keys one after the other: for them it is packed once. Forward a task has fewer,
// lest many threads have too few tasks.
enum { STRIP = 2 * TILE, STRIP_BACKWARD = 4 * TILE };

// Scores become exponentials. Rows of score (keys, TILE) are keys, so that what is done to every query is
// done to vectors; query i sees the keys up to first + i.
INLINE void softmax_tile(real_t *score, Softmax *x, int keys, const int queries, int first, real_t scale) {
    real_t was[TILE];
    for (int i = 0; i < queries; i++) was[i] = x->highest[i];
    for (int j = 0; j < keys; j++) {
        real_t *s = score + j*TILE;
        for (int i = 0; i < smaller_of(j - first, queries); i++) s[i] = (real_t)-1e30;  // causal
        for (int i = 0; i < queries; i++) x->highest[i] = real_max(s[i], x->highest[i]);
    }
    for (int i = 0; i < queries; i++) x->sum[i] *= x->shrink[i] = real_exp((was[i] - x->highest[i]) * scale);
    for (int j = 0; j < keys; j++) {
        real_t *s = score + j*TILE;
        for (int i = 0; i < queries; i++) {
            s[i] = real_exp((s[i] - x->highest[i]) * scale);
            x->sum[i] += s[i];
        }
    }
}

void attention_forward(act_t *out, real_t *lse, const act_t *qkv, int B, int T, int C, int NH, int NKV,
                       int heads) {
    const int hs = C / NH, group = NH / NKV, Q = heads * hs;
    const size_t KV = Q / group, width = C, S = Q + 2*KV;
    const real_t scale = (real_t)(1 / sqrt((double)hs));
    profile("attention_forward", 2.0 * B * T * T * Q, (double)B * T * (S + Q) * sizeof(act_t));
    #pragma omp parallel for collapse(3) schedule(dynamic)
    for (int b = 0; b < B; b++)
        for (int h = 0; h < heads; h++)
            for (int s0 = 0; s0 < T; s0 += STRIP) {
                const size_t sequence = b * T;
                const act_t *q = qkv + sequence*S + h*hs, *k = qkv + sequence*S + Q + h / group * hs;
                const int end = smaller_of(s0 + STRIP, T);
                act_t *o = out + sequence*width + h*hs;
                real_t score[TILE * TILE], *l = lse + sequence*NH + (size_t)h*T;
                Softmax in_strip[STRIP / TILE], *x = in_strip;
                Panel k_panel, v_panel, p_panel;
                for (int q0 = s0; q0 < end; q0 += TILE, x++) {
                    set_panel(&x->q, q + q0*S, 1, S);
                    memset(x->sum, 0, sizeof x->sum);
                    for (int i = 0; i < TILE; i++) x->highest[i] = (real_t)-1e30;
                }
                for (int t0 = 0; t0 < end; t0 += TILE) {
                    const int keys = smaller_of(TILE, T - t0), first = t0 > s0 ? t0 : s0;
                    set_panel(&k_panel, k + t0*S, S, 1);
                    set_panel(&v_panel, k + KV + t0*S, S, 1);
                    x = &in_strip[(first - s0) / TILE];
                    for (int q0 = first; q0 < end; q0 += TILE, x++) {
                        const int queries = smaller_of(TILE, T - q0);
                        gemm_tile(score, TILE, keys, queries, hs, &k_panel, &x->q, 0);
                        if (queries == TILE) softmax_tile(score, x, keys, TILE, q0 - t0, scale);
                        else softmax_tile(score, x, keys, queries, q0 - t0, scale);
                        for (int i = 0; i < queries && t0; i++)
                            for (int c = 0; c < hs; c++) o[(q0 + i)*width + c] *= x->shrink[i];
                        set_panel(&p_panel, score, 1, TILE);
                        gemm_tile(o + q0*width, C, queries, hs, keys, &p_panel, &v_panel, t0 > 0);
                        for (int i = 0; i < queries && t0 == q0; i++) {  // these have met all their keys
                            for (int c = 0; c < hs; c++) o[(q0 + i)*width + c] /= x->sum[i];
                            l[q0 + i] = x->highest[i] * scale + (real_t)log(x->sum[i]);
                        }
                    }
                }
            }
}

void attention_query(act_t *out, const act_t *qkv, int t, int C, int NH, int NKV) {
    const int hs = C / NH, group = NH / NKV;
    const size_t KV = NKV * hs, S = C + 2*KV;
    const real_t scale = (real_t)(1 / sqrt((double)hs));
    profile("attention_query", 4.0 * t * C, 2.0 * t * (double)KV * sizeof(act_t));
    #pragma omp parallel for
    for (int h = 0; h < NH; h++) {
        const act_t *q = qkv + t*S + h*hs, *k0 = qkv + C + h / group * hs;
        act_t *o = out + h*hs;
        real_t top = (real_t)-1e30, sum = 0;
        for (int c = 0; c < hs; c++) o[c] = 0;
        for (int j = 0; j <= t; j++) {
            const act_t *k = k0 + j*S, *v = k + KV;
            real_t score = 0;
            #pragma omp simd reduction(+:score)
            for (int c = 0; c < hs; c++) score += q[c] * k[c];
            score *= scale;
            const real_t higher = real_max(score, top);
            const real_t shrink = real_exp(top - higher), p = real_exp(score - higher);
            top = higher;
            sum = sum * shrink + p;
            for (int c = 0; c < hs; c++) o[c] = o[c] * shrink + p * v[c];
        }
        for (int c = 0; c < hs; c++) o[c] /= sum;
    }
}

// What a strip keeps of a tile of queries and of their gradients: as rows, and as columns of the products
// that sum over queries; and delta = sum_j p_j dp_j
typedef struct { Panel q, d, q_columns, d_columns; real_t delta[TILE]; } Queries;

// A task is a strip of one head of queries. The tasks that read the same head of keys, of all its heads of
// queries, are a chain: each adds to the gradients of the keys that it sees, a tile at a time. turns (chains,
// tiles) counts who has: a tile waits for the tasks before in its chain, so that its sums have one order for
// any number of threads. Chains are taken in turn; where there are many, nobody waits.
void attention_backward(act_t *dqkv, const act_t *dout, const act_t *qkv, const act_t *out, const real_t *lse,
                        int B, int T, int C, int NH, int NKV, int heads) {
    const int hs = C / NH, group = NH / NKV, Q = heads * hs;
    const int tiles = (T + TILE - 1) / TILE, strips = (T + STRIP_BACKWARD - 1) / STRIP_BACKWARD;
    const int64_t chains = (int64_t)B * heads / group, tasks = chains * group * strips;
    const size_t KV = Q / group, width = C, S = Q + 2*KV;
    const real_t scale = (real_t)(1 / sqrt((double)hs));
    int *turns = (int *)scratch;
    profile("attention_backward", 5.0 * B * T * T * Q, 2.0 * B * T * (S + Q) * sizeof(act_t));
    memset(turns, 0, (size_t)chains * tiles * sizeof(int));
    #pragma omp parallel for schedule(monotonic: dynamic)
    for (int64_t task = 0; task < tasks; task++) {
        const int64_t chain = task % chains;
        const int member = (int)(task / chains), s = member % strips;
        const int b = (int)(chain * group / heads), g = (int)(chain % (heads / group));
        const int h = g * group + member / strips;
        const int s0 = s * STRIP_BACKWARD, end = smaller_of(s0 + STRIP_BACKWARD, T);
        const size_t sequence = b * T;
        const act_t *q = qkv + sequence*S + h*hs, *k = qkv + sequence*S + Q + g*hs;
        const act_t *o = out + sequence*width + h*hs, *d = dout + (o - out);
        act_t *dq = dqkv + (q - qkv), *dk = dqkv + (k - qkv), *dv = dk + KV;
        const real_t *l = lse + sequence*NH + (size_t)h*T;
        Queries in_strip[STRIP_BACKWARD / TILE], *x = in_strip;
        Panel k_panel, v_panel, k_columns, p_panel, ds_panel;
        real_t p[TILE * TILE], ds[TILE * TILE];
        for (int q0 = s0; q0 < end; q0 += TILE, x++) {
            set_panel(&x->q, q + q0*S, S, 1);
            set_panel(&x->d, d + q0*width, C, 1);
            set_panel(&x->q_columns, q + q0*S, S, 1);
            set_panel(&x->d_columns, d + q0*width, C, 1);
            for (int t = q0; t < smaller_of(q0 + TILE, T); t++) {
                real_t dot = 0;
                #pragma omp simd reduction(+:dot)
                for (int c = 0; c < hs; c++) dot += d[t*width + c] * o[t*width + c];
                x->delta[t - q0] = dot;
            }
        }
        for (int t0 = 0; t0 < end; t0 += TILE) {
            const int keys = smaller_of(TILE, T - t0), first = t0 > s0 ? t0 : s0;
            const int not_yet = t0 / STRIP_BACKWARD;  // strips of a head that do not see this tile
            const int turn = member / strips * (strips - not_yet) + s - not_yet;
            int *turn_now = turns + (size_t)chain * tiles + t0 / TILE;
            while (__atomic_load_n(turn_now, __ATOMIC_ACQUIRE) != turn) sched_yield();
            set_panel(&k_panel, k + t0*S, 1, S);
            set_panel(&v_panel, k + KV + t0*S, 1, S);
            set_panel(&k_columns, k + t0*S, S, 1);
            x = &in_strip[(first - s0) / TILE];
            for (int q0 = first; q0 < end; q0 += TILE, x++) {
                const int queries = smaller_of(TILE, T - q0), add = turn > 0 || q0 > first;
                gemm_tile(p, TILE, queries, keys, hs, &x->q, &k_panel, 0);
                gemm_tile(ds, TILE, queries, keys, hs, &x->d, &v_panel, 0);
                // scores become p = exp(score - lse), and dp becomes ds = p (dp - delta)
                for (int i = 0; i < queries; i++) {
                    real_t *pi = p + i*TILE, *dsi = ds + i*TILE, li = l[q0 + i], delta = x->delta[i];
                    #pragma omp simd
                    for (int j = 0; j < keys; j++) {
                        pi[j] = real_exp(pi[j] * scale - li);
                        dsi[j] = pi[j] * (dsi[j] - delta) * scale;
                    }
                    for (int j = q0 + i - t0 + 1; j < keys; j++) pi[j] = dsi[j] = 0;  // causal
                }
                set_panel(&p_panel, p, 1, TILE);
                gemm_tile(dv + t0*S, S, keys, hs, queries, &p_panel, &x->d_columns, add);
                set_panel(&ds_panel, ds, 1, TILE);
                gemm_tile(dk + t0*S, S, keys, hs, queries, &ds_panel, &x->q_columns, add);
                set_panel(&ds_panel, ds, TILE, 1);
                gemm_tile(dq + q0*S, S, queries, hs, keys, &ds_panel, &k_columns, t0 > 0);
            }
            __atomic_store_n(turn_now, turn + 1, __ATOMIC_RELEASE);
        }
    }
}

// ---- adjoint, head, optimizer
void scale_cast(act_t *out, const real_t *x, double scale, size_t count) {
    profile("scale_cast", 0, (double)count * (sizeof(act_t) + sizeof(real_t)));
    #pragma omp parallel for simd
    for (size_t i = 0; i < count; i++) out[i] = (real_t)scale * x[i];
}

void adjoint_update(real_t *dp, real_t *dnext, double alpha, double beta, size_t count) {
    real_t a = (real_t)alpha, b = (real_t)beta;
    if (alpha == 1 && beta == 0) return;
    profile("adjoint_update", 0, (double)count * 4 * sizeof(real_t));
    #pragma omp parallel for simd schedule(static, PIECE)
    for (size_t i = 0; i < count; i++) {
        dp[i] += b * dnext[i];
        dnext[i] *= a;
    }
}

static inline real_t largest(const real_t *x, int count) {
    enum { W = 64 };  // maxima side by side, as vectors
    real_t top[W];
    for (int w = 0; w < W; w++) top[w] = x[0];
    for (int i = 0; i + W <= count; i += W)
        for (int w = 0; w < W; w++) top[w] = real_max(x[i + w], top[w]);
    for (int i = count / W * W; i < count; i++) top[0] = real_max(x[i], top[0]);
    for (int w = 1; w < W; w++) top[0] = real_max(top[w], top[0]);
    return top[0];
}

void classifier(real_t *losses, act_t *logits, const int *targets, int n, int V, int Vp, double scale) {
    profile("classifier", 0, 2.0 * n * V * sizeof(act_t));
    const size_t width = Vp;
    #pragma omp parallel for
    for (int i = 0; i < n; i++) {
        act_t *x = logits + i*width;
        losses[i] = 0;
        if (targets[i] < 0 && scale != 0) memset(x, 0, width * sizeof(act_t));
        if (targets[i] < 0) continue;
        act_t target = x[targets[i]];
        real_t top = largest(x, V), sum = 0;
        #pragma omp simd reduction(+:sum)
        for (int v = 0; v < V; v++) sum += x[v] = real_exp(x[v] - top);
        if (scale != 0) {
            real_t factor = (real_t)scale / sum;
            #pragma omp simd
            for (int v = 0; v < V; v++) x[v] *= factor;
            x[targets[i]] -= (real_t)scale;
            for (int v = V; v < Vp; v++) x[v] = 0;
        }
        losses[i] = top + (real_t)log(sum) - target;
    }
}

// log p - log q = d - log(sum / sum_y): if the two are near, d is small, for their large logits cancel first.
void distillation(real_t *out, size_t stride, act_t *logits, const act_t *teacher, const int *targets, int n,
                  int V, int Vp, int objective, double scale) {
    profile("distillation", 0, 3.0 * n * V * sizeof(act_t));
    const size_t width = Vp;
    const int of_teacher = objective == KL_TEACHER;
    #pragma omp parallel for
    for (int i = 0; i < n; i++) {
        act_t *x = logits + i*width;
        const act_t *y = teacher + i*width;
        for (size_t metric = LOSS; metric < METRICS; metric++) out[stride * metric + i] = 0;
        if (targets[i] < 0 && scale != 0) memset(x, 0, width * sizeof(act_t));
        if (targets[i] < 0) continue;
        real_t top = largest(x, V), top_y = largest(y, V), apart = top - top_y, sum = 0, sum_y = 0, cross = 0;
        int first = 0;
        while (first + 1 < V && x[first] != top) first++;  // it ends for NaN too
        #pragma omp simd reduction(+:sum, sum_y, cross)
        for (int v = 0; v < V; v++) {
            real_t p = real_exp(x[v] - top), q = real_exp(y[v] - top_y), d = x[v] - y[v] - apart;
            sum += p;
            sum_y += q;
            cross += of_teacher ? -q * d : p * d;
        }
        real_t mean = cross / (of_teacher ? sum_y : sum), ratio = (real_t)log(sum / sum_y);
        out[i] = top - x[targets[i]] + (real_t)log(sum);
        out[stride * TEACHER_LOSS + i] = top_y - y[targets[i]] + (real_t)log(sum_y);
        out[stride * DIVERGENCE + i] = of_teacher ? mean + ratio : mean - ratio;
        out[stride * AGREEMENT + i] = y[first] == top_y;
        if (scale == 0) continue;
        real_t p_scale = (real_t)scale / sum, q_scale = (real_t)scale / sum_y;
        #pragma omp simd
        for (int v = 0; v < V; v++) {
            real_t p = p_scale * real_exp(x[v] - top);
            if (of_teacher) x[v] = p - q_scale * real_exp(y[v] - top_y);
            else x[v] = p * (x[v] - y[v] - apart - mean);
        }
        for (int v = V; v < Vp; v++) x[v] = 0;
    }
}

void squares(double *sums, const real_t *x, size_t count) {
    profile("squares", 0, (double)count * sizeof(real_t));
    #pragma omp parallel for
    for (size_t i = 0; i < count; i += PIECE) {
        const real_t *piece = x + i;
        const int n = (int)smaller_size(PIECE, count - i);
        double sum = 0;
        #pragma omp simd reduction(+:sum)
        for (int j = 0; j < n; j++) sum += (double)piece[j] * piece[j];
        sums[i / PIECE] = sum;
    }
}

void adamw(param_t *p, const real_t *g, real_t *m, real_t *v, size_t count, double rate, double beta1,
           double beta2, double decay, double scale, int t) {
    profile("adamw", 0, (double)count * (2 * sizeof(param_t) + 5 * sizeof(real_t)));
    real_t b1 = (real_t)beta1, b2 = (real_t)beta2, keep = (real_t)(1 - rate * decay), clip = (real_t)scale;
    real_t step = (real_t)(rate / (1 - pow(beta1, t))), unbias = (real_t)(1 / sqrt(1 - pow(beta2, t)));
    #pragma omp parallel for simd schedule(static, PIECE)
    for (size_t i = 0; i < count; i++) {
        real_t grad = clip * g[i];
        m[i] = b1 * m[i] + (1 - b1) * grad;
        v[i] = b2 * v[i] + (1 - b2) * grad * grad;
        real_t root = (real_t)(sizeof(real_t) == 8 ? sqrt(v[i]) : sqrtf((float)v[i]));
        p[i] = keep * p[i] - step * m[i] / (root * unbias + (real_t)1e-8);
    }
}

void add_gradients(real_t *sum, const real_t *g, size_t count) {
    profile("add_gradients", 0, 3.0 * (double)count * sizeof(real_t));
    #pragma omp parallel for simd schedule(static, PIECE)
    for (size_t i = 0; i < count; i++) sum[i] += g[i];
}

// Does what a core's units can for less than a millisecond, and returns the FLOP: independent chains of
// multiply-add, or products of tiles.
static double saturate(void) {
    enum { ROUNDS = 60000 };
    volatile real_t half = (real_t)0.5;  // read at run time, lest compilers see through the chains
    const real_t word = half;
    vector_t x[MR * NV], factor;
    if (word_kind == TILES) return saturate_tiles();
    for (int j = 0; j < LANES; j++) factor[j] = word;
    for (int j = 0; j < MR * NV; j++) x[j] = factor * (real_t)j;
    for (int i = 0; i < ROUNDS; i++) {
        #pragma GCC unroll 24
        for (int j = 0; j < MR * NV; j++)
            if (word_kind == PAIRS) x[j] = multiply_pairs(x[j], word, factor);
            else x[j] = x[j] * factor + factor;
    }
    for (int j = 1; j < MR * NV; j++) x[0] += x[j];
    half = x[0][0];
    return (word_kind == PAIRS ? 4.0 : 2.0) * ROUNDS * MR * NV * LANES;
}

double device_flops(void) {
    double best = 0, begun = seconds(), now = begun;
    while (now - begun < 0.02) {
        double flops = 0, start = now;
        #pragma omp parallel reduction(+:flops)
        flops += saturate();
        now = seconds();
        best = fmax(best, flops / (now - start));
    }
    return best;
}
double device_fastest(void) { return fastest; }
const char *device_products(void) {
    static const char *const kinds[] = {"float32", "pairs of bf16", "tiles of bf16"};
    return kinds[word_kind];
}

// ==== end of the layers for the CPU =================================================================
#ifdef REV_GPT2_BLOCK
#define REV_GPT2_BLOCK_LAYERS  // the block's own layers, which may use those above
#include REV_GPT2_BLOCK
#endif
#endif
