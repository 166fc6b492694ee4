/*
swiglu.c: what stands between the products of Llama's MLP. A row of gateup (n, 2F) has gate, then up.

    forward     act = silu(gate) up, where silu(g) = g / (1 + exp(-g))
    backward    gateup becomes its gradient, given that in act
*/
#define REV_GPT2_BLOCK "dev/llama/block.h"
#include "common.h"

static int n, F;
static real_t *gateup, *act, *dact, *silus;

static real_t gate_at(size_t i, size_t c) { return 12 * random_at(1, i * 2*F + c); }
static real_t up_at(size_t i, size_t c) { return 12 * random_at(1, i * 2*F + F + c); }

// ---- the reference, in double precision

static void check_forward(int version) {
    (void)version;
    for (size_t i = 0; i < (size_t)n; i++)
        for (size_t c = 0; c < (size_t)F; c++) {
            double g = gate_at(i, c);
            compare("act", i*F + c, act[i*F + c], g / (1 + exp(-g)) * up_at(i, c), 1);
        }
}
static void check_backward(int version) {
    (void)version;
    for (size_t i = 0; i < (size_t)n; i++)
        for (size_t c = 0; c < (size_t)F; c++) {
            double g = gate_at(i, c), d = random_at(2, i*F + c), sigmoid = 1 / (1 + exp(-g));
            const real_t *gate = gateup + i*2*F, *up = gate + F;
            compare("dgate", i*F + c, gate[c], d * up_at(i, c) * sigmoid * (1 + g * (1 - sigmoid)), 1);
            compare("dup", i*F + c, up[c], d * g * sigmoid, 1);
        }
}

// ---- 1: as separate operations have it, each a pass; 2: in one. exp is libm's in both

static void forward_passes(void) {
    #pragma omp parallel for
    for (size_t i = 0; i < (size_t)n; i++)
        for (size_t c = 0; c < (size_t)F; c++) {
            real_t g = gateup[i*2*F + c];
            silus[i*F + c] = g / (1 + expf(-g));
        }
    #pragma omp parallel for
    for (size_t i = 0; i < (size_t)n; i++)
        for (size_t c = 0; c < (size_t)F; c++) act[i*F + c] = silus[i*F + c] * gateup[i*2*F + F + c];
}
static void forward_libm(void) {
    #pragma omp parallel for
    for (size_t i = 0; i < (size_t)n; i++) {
        const real_t *gate = gateup + i*2*F, *up = gate + F;
        for (size_t c = 0; c < (size_t)F; c++) act[i*F + c] = gate[c] / (1 + expf(-gate[c])) * up[c];
    }
}
static void backward_passes(void) {
    #pragma omp parallel for
    for (size_t i = 0; i < (size_t)n; i++)
        for (size_t c = 0; c < (size_t)F; c++) {
            const real_t *gate = gateup + i*2*F, *up = gate + F;
            silus[i*F + c] = gate[c] / (1 + expf(-gate[c]));
            act[i*F + c] = dact[i*F + c] * up[c];
        }
    #pragma omp parallel for
    for (size_t i = 0; i < (size_t)n; i++)
        for (size_t c = 0; c < (size_t)F; c++) gateup[i*2*F + F + c] = dact[i*F + c] * silus[i*F + c];
    #pragma omp parallel for
    for (size_t i = 0; i < (size_t)n; i++)
        for (size_t c = 0; c < (size_t)F; c++) {
            real_t *gate = gateup + i*2*F, sigmoid = 1 / (1 + expf(-gate[c]));
            gate[c] = act[i*F + c] * sigmoid * (1 + gate[c] * (1 - sigmoid));
        }
}
static void backward_libm(void) {
    #pragma omp parallel for
    for (size_t i = 0; i < (size_t)n; i++) {
        real_t *gate = gateup + i*2*F, *up = gate + F;
        for (size_t c = 0; c < (size_t)F; c++) {
            real_t g = gate[c], d = dact[i*F + c], sigmoid = 1 / (1 + expf(-g));
            gate[c] = d * up[c] * sigmoid * (1 + g * (1 - sigmoid));
            up[c] = d * g * sigmoid;
        }
    }
}

// ---- the experiments

static void reset_backward(void) {
    fill(gateup, (size_t)n * 2*F, 1);
    #pragma omp parallel for simd
    for (size_t i = 0; i < (size_t)n * 2*F; i++) gateup[i] *= 12;
}
static void reset_forward(void) { fill_nan(act, (size_t)n*F); }
static void set_up(const int *d) {
    n = d[0], F = d[1];
    size_t count = (size_t)n*F;
    gateup = make(2*count, 1), dact = make(count, 2), act = make(count, 0), silus = make(count, 0);
    reset_backward();
}
static void set_up_forward(const int *d) { set_up(d), work_bytes = 3.0 * n * F * sizeof(real_t); }
static void set_up_backward(const int *d) { set_up(d), work_bytes = 5.0 * n * F * sizeof(real_t); }

static void run_forward(int version) {
    if (version == 1) forward_passes();
    else if (version == 2) forward_libm();
    else swiglu_forward(act, gateup, n, F);
}
static void run_backward(int version) {
    if (version == 1) backward_passes();
    else if (version == 2) backward_libm();
    else swiglu_backward(gateup, dact, n, F);
}

static const Version forwards[] = {
    {1, "silu, then its product with up; expf of libm", 2e-6, 0}, {2, "in one pass", 2e-6, 0},
    {3, "the block's: exp without call or branch", 2e-6, 0}, {0, NULL, 0, 0}};
static const Version backwards[] = {
    {1, "a pass for each product and for silu's slope; expf of libm", 4e-6, 0}, {2, "in one pass", 4e-6, 0},
    {3, "the block's: exp without call or branch", 4e-6, 0}, {0, NULL, 0, 0}};
static const Shape odd[] = {{"7 x 51", {7, 51, 0, 0}}, {"130 x 37", {130, 37, 0, 0}}, {NULL, {0, 0, 0, 0}}};
static const Shape shapes[] = {{"1024 x 1536", {1024, 1536, 0, 0}}, {"512 x 5632", {512, 5632, 0, 0}},
                               {NULL, {0, 0, 0, 0}}};
static const Experiment experiments[] = {
    {"SwiGLU, forward", forwards, odd, shapes, set_up_forward, reset_forward, run_forward, check_forward},
    {"SwiGLU, backward", backwards, odd, shapes, set_up_backward, reset_backward, run_backward,
     check_backward}};

int main(int argc, char **argv) { return run_experiments(argc, argv, experiments, 2); }
