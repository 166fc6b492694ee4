/*
tiles.h: a processor's tiles (AMX) in plain C, so that products through them are tested where there are none:

    make -B test_rev_gpt2 SAN=-DEMULATE_TILES && ./test_rev_gpt2 layers

bf16.h includes this file in the place of the processor's instructions. Sums have the same bits, with what
the manual says of each instruction: its order, what is rounded, what is flushed to zero. dev/cpu/tiles.c
compares the two.
*/
typedef struct { uint32_t at[16]; } words_t;
enum { TILE_REGISTERS = 8 };
static __thread words_t tile_registers[TILE_REGISTERS][16];

static inline float tile_float(uint32_t bits) {
    union { uint32_t u; float f; } x = {bits};
    return x.f;
}
static inline uint32_t tile_bits(float f) {
    union { float f; uint32_t u; } x = {f};
    return x.u;
}
static inline float flush(float x) {  // what is below 2^-126 becomes 0 of its sign
    uint32_t bits = tile_bits(x);
    return bits & 0x7F800000 ? x : tile_float(bits & 0x80000000);
}
static inline float rounded(double x) {  // what would be below 2^-126, had a float any exponent, likewise
    return fabs(x) < 0x1.ffffffp-127 ? copysignf(0, (float)x) : (float)x;
}
// Rounds to the nearest bf16, ties to even.
static inline uint32_t bf16_bits(real_t number) {
    uint32_t bits = tile_bits(flush((float)number));
    return number == number ? (bits + 0x7FFF + (bits >> 16 & 1)) >> 16 : bits >> 16 | 0x40;
}

// Makes 16 words of n of 32 numbers side by side.
static inline words_t pairs_along(const real_t *x, int n) {
    words_t w = {{0}};
    for (int k = 0; k < smaller_of(n, 32); k++) w.at[k / 2] |= bf16_bits(x[k]) << k % 2 * 16;
    return w;
}
// Makes 16 words of two rows, of which so many numbers are there.
static inline words_t pairs_across(const real_t *low, int n_low, const real_t *high, int n_high) {
    words_t w = {{0}};
    for (int i = 0; i < n_low; i++) w.at[i] = bf16_bits(low[i]);
    for (int i = 0; i < n_high; i++) w.at[i] |= bf16_bits(high[i]) << 16;
    return w;
}
static inline void transpose_words(words_t w[16]) {
    for (int i = 0; i < 16; i++)
        for (int j = 0; j < i; j++) {
            uint32_t from = w[i].at[j];
            w[i].at[j] = w[j].at[i];
            w[j].at[i] = from;
        }
}
static inline void store(real_t *out, words_t w, int n) { memcpy(out, w.at, sizeof(uint32_t) * (size_t)n); }

static inline void tiles_begin(void) {}
static inline int tiles_permitted(void) { return 1; }
static inline void tile_load(int tile, const void *from, size_t stride) {
    for (int i = 0; i < 16; i++) memcpy(&tile_registers[tile][i], (const char *)from + (size_t)i * stride, 64);
}
static inline void tile_store(int tile, void *to, size_t stride) {
    for (int i = 0; i < 16; i++) memcpy((char *)to + (size_t)i * stride, &tile_registers[tile][i], 64);
}
// Products of even and of odd numbers are added apart, one by one, each sum rounded once: a product of two bf16
// is exact in double, and its sum with a float is rounded to it as if it had been, too.
static inline void tile_multiply(int sums, int a, int b) {
    for (int i = 0; i < 16; i++) {
        float of_parity[2][16] = {{0}};
        for (int k = 0; k < 32; k++) {
            const float x = flush(tile_float(tile_registers[a][i].at[k / 2] >> k % 2 * 16 << 16));
            for (int j = 0; j < 16; j++) {
                const float y = flush(tile_float(tile_registers[b][k / 2].at[j] >> k % 2 * 16 << 16));
                of_parity[k % 2][j] = rounded((double)of_parity[k % 2][j] + (double)x * y);
            }
        }
        for (int j = 0; j < 16; j++) {
            const float sum = flush(of_parity[0][j] + of_parity[1][j]);
            uint32_t *to = &tile_registers[sums][i].at[j];
            *to = tile_bits(flush(flush(tile_float(*to)) + sum));
        }
    }
}
#define _tile_zero(t) memset(tile_registers[t], 0, sizeof tile_registers[t])
#define _tile_loadd(t, from, stride) tile_load(t, from, stride)
#define _tile_stored(t, to, stride) tile_store(t, to, stride)
#define _tile_dpbf16ps(sums, a, b) tile_multiply(sums, a, b)
