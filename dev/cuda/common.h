/*
common.h: what the experiments in this folder share: the harness of dev/cpu/common.h, over the CUDA twin. Operands lie on the
device; the number at a place depends on its seed and index alone, so references ask number() and keep no copy.
Built with -DEMULATE they run on a machine without a GPU; only "check" is of use there.
*/
#define TWIN
#include "../cpu/common.h"

// ---- operands on the device

static inline float number(uint32_t seed, size_t i) { return random_at(seed, i); }
static inline float rounded(uint32_t seed, size_t i) { return to_float(act_t(random_at(seed, i))); }  // as an activation

static __global__ void fill_floats(float *x, size_t count, uint32_t seed) {
    size_t i = blockIdx.x * (size_t)blockDim.x + threadIdx.x;
    if (i < count) x[i] = random_at(seed, i);
}
static __global__ void fill_activations(act_t *x, size_t count, uint32_t seed) {
    size_t i = blockIdx.x * (size_t)blockDim.x + threadIdx.x;
    if (i < count) set(x + i, random_at(seed, i));
}
static inline void refill(float *x, size_t count, uint32_t seed) { LAUNCH(fill_floats, blocks_for(count, THREADS), THREADS, 0, x, count, seed); }
static inline void refill(__nv_bfloat16 *x, size_t count, uint32_t seed) {
    LAUNCH(fill_activations, blocks_for(count, THREADS), THREADS, 0, (act_t *)x, count, seed);
}
static inline float *make_floats(size_t count, uint32_t seed) {
    float *x = (float *)allocate(count * sizeof(float));
    refill(x, count, seed);
    return x;
}
static inline act_t *make_activations(size_t count, uint32_t seed) {
    act_t *x = (act_t *)allocate(count * sizeof(act_t));
    refill(x, count, seed);
    return x;
}
static inline void spoil(void *x, size_t bytes) { CUDA(cudaMemset(x, 0xFF, bytes)); }  // NaN, so that an element nobody writes is found

// On the host, until the next call of as many others
template <class E> static const E *fetch(const E *x, size_t count) {
    static void *lent[8];
    static int turn;
    void *&p = lent[turn++ % 8];
    p = realloc(p, count * sizeof(E));
    if (!p) die(STATUS_NUMBERS, "no memory to check results");
    to_host(p, x, count * sizeof(E));
    return (const E *)p;
}
