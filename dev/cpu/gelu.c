/*
gelu.c: GELU with tanh, x/2 (1 + tanh u), u = sqrt(2/pi) (x + 0.044715 x^3), and its slope. The loop is the same for all
versions; only how exp or tanh is computed differs. The error is against double precision, for x in [-12, 12].
*/
#include "common.h"

static size_t count;
static real_t *x, *y;

static double inner(double v) { return sqrt(2 / M_PI) * (v + 0.044715 * v * v * v); }
static double reference(double v) { return v / (1 + exp(-2 * inner(v))); }
static double slope_reference(double v) {
    double s = 1 / (1 + exp(-2 * inner(v)));
    return s + v * s * (1 - s) * 2 * sqrt(2 / M_PI) * (1 + 3 * 0.044715 * v * v);
}

static const real_t root = (real_t)0.7978845608028654;  // of 2 / pi

static inline real_t by_tanh(real_t v) { return 0.5f * v * (1 + tanhf(root * (v + 0.044715f * v * v * v))); }
static inline real_t slope_by_tanh(real_t v) {
    real_t t = tanhf(root * (v + 0.044715f * v * v * v));
    return 0.5f * (1 + t) + 0.5f * v * (1 - t * t) * root * (1 + 3 * 0.044715f * v * v);
}

// 1 + tanh u = 2 sigmoid(2u): one exponential, and no difference of nearly equal numbers where u is far below 0
static inline real_t by_sigmoid(real_t v) { return v / (1 + expf(-2 * root * (v + 0.044715f * v * v * v))); }
static inline real_t slope_by_sigmoid(real_t v) {
    real_t s = 1 / (1 + expf(-2 * root * (v + 0.044715f * v * v * v)));
    return s + v * s * (1 - s) * 2 * root * (1 + 3 * 0.044715f * v * v);
}

#define EACH(f) \
    _Pragma("omp parallel for") \
    for (size_t i = 0; i < count; i++) y[i] = f(x[i])

static void run_gelu(int version) {
    if (version == 1) { EACH(by_tanh); }
    else if (version == 2) { EACH(by_sigmoid); }
    else { EACH(gelu); }
}
static void run_slope(int version) {
    if (version == 1) { EACH(slope_by_tanh); }
    else if (version == 2) { EACH(slope_by_sigmoid); }
    else { EACH(gelu_slope); }
}

static void set_up(const int *d) {
    count = (size_t)d[0];
    x = make(count, 1), y = make(count, 0);
    for (size_t i = 0; i < count; i++) x[i] *= 12;
    work_bytes = 2.0 * (double)count * sizeof(real_t);
}
static void reset(void) { fill_nan(y, count); }
static void check_gelu(int version) {
    (void)version;
    for (size_t i = 0; i < count; i++) compare("gelu", i, y[i], reference(x[i]), 1);
}
static void check_slope(int version) {
    (void)version;
    for (size_t i = 0; i < count; i++) compare("slope", i, y[i], slope_reference(x[i]), 1);
}

static const Version versions[] = {
    {1, "tanhf of libm", 2e-6, 0}, {2, "as a sigmoid, expf of libm", 2e-6, 0}, {3, "the trainer's: exp without call or branch", 2e-6, 0},
    {0, NULL, 0, 0}};
static const Shape odd[] = {{"10007", {10007, 0, 0, 0}}, {NULL, {0, 0, 0, 0}}};
static const Shape shapes[] = {{"1024 x 3072", {1024 * 3072, 0, 0, 0}}, {NULL, {0, 0, 0, 0}}};
static const Experiment experiments[] = {
    {"GELU", versions, odd, shapes, set_up, reset, run_gelu, check_gelu}, {"GELU'", versions, odd, shapes, set_up, reset, run_slope, check_slope}};

int main(int argc, char **argv) { return run_experiments(argc, argv, experiments, 2); }
