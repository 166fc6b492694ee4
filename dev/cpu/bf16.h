/*
bf16.h: products of numbers rounded to bf16, by a processor's instructions: the dot product of pairs
(AVX512-BF16), or of whole tiles of them (AMX). `make` has the trainer include this file among its layers for
the CPU; where a processor has neither, it is left out. dev/cpu/README.md says what each is worth.

Words of a panel are pairs of numbers, k and k + 1. An instruction for the dot product of pairs does the work
of two multiply-adds; one for tiles adds the product of 16 x 16 words and 16 x 16 words to 16 x 16 sums. With
-DEMULATE_TILES tiles.h has these in plain C, for tests on any processor. The trainer calls layers_bf16,
words_of, panel_rows, panel_columns, pack_words, multiply_pairs, multiply_tiles, saturate_tiles.
*/
static inline int words_of(int K) { return word_kind == NUMBERS ? K : (K + 31) / 32 * 16; }
static inline int panel_rows(void) { return word_kind == TILES ? (int)SIDE : (int)MR; }
static inline int panel_columns(void) { return word_kind == TILES ? (int)SIDE : (int)NR; }

// ---- instructions

#ifdef EMULATE_TILES
#define HAS_TILES
#include "tiles.h"
#define multiply_pairs(sum, a, b) (sum)
#else
#include <immintrin.h>
typedef __m512i words_t;
// Loads the first n of 16 numbers, at least 0 and at most all; then come zeros.
static inline __mmask16 first(int n) { return (__mmask16)((1 << smaller_of(n > 0 ? n : 0, 16)) - 1); }
static inline __m512 load(const void *x, int n) { return _mm512_maskz_loadu_ps(first(n), x); }
static inline void store(real_t *out, words_t w, int n) { _mm512_mask_storeu_epi32(out, first(n), w); }

// Makes 16 words of n of 32 numbers side by side: word k of x[2k] and x[2k + 1], each rounded to the nearest,
// ties to even.
static inline words_t pairs_along(const real_t *x, int n) {
    return (words_t)_mm512_cvtne2ps_pbh(load(x + 16, n - 16), load(x, n));
}
// Makes 16 words of two rows, of which so many numbers are there: word i of low[i] and high[i].
static inline words_t pairs_across(const real_t *low, int n_low, const real_t *high, int n_high) {
    static const short order[32] = {0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23,
                                    8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    __m512i both = (__m512i)_mm512_cvtne2ps_pbh(load(high, n_high), load(low, n_low));
    return _mm512_permutexvar_epi16(_mm512_loadu_si512(order), both);
}
// Transposes 16 x 16 words: two quarters of the square change places, then so do two of each quarter's.
static inline void transpose_words(words_t w[16]) {
    static const int order[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    const __m512i at = _mm512_loadu_si512(order);
    #pragma GCC unroll 4
    for (int half = 8; half; half /= 2) {  // 16 and above are the words of the second operand
        const __m512i size = _mm512_set1_epi32(half), to_second = _mm512_set1_epi32(16 - half);
        const __m512i low = _mm512_mask_add_epi32(at, _mm512_test_epi32_mask(at, size), at, to_second);
        const __m512i high = _mm512_add_epi32(low, size);
        #pragma GCC unroll 8
        for (int pair = 0; pair < 8; pair++) {
            words_t *x = w + pair / half * 2*half + pair % half, *y = x + half, from = *x;
            *x = _mm512_permutex2var_epi32(from, low, *y);
            *y = _mm512_permutex2var_epi32(from, high, *y);
        }
    }
}
// Returns sum + a_0 b_0 + a_1 b_1, where a and b hold pairs.
static inline vector_t multiply_pairs(vector_t sum, real_t a, vector_t b) {
    return (vector_t)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_ps((float)a), (__m512bh)b);
}

#if (defined(__AMX_BF16__) || defined(__AMXBF16__)) && defined(__linux__)  // gcc's name, older clang's
#define HAS_TILES
#include <sys/syscall.h>
// Each thread says once that the processor's tiles are 16 rows of 64 bytes each.
static inline void tiles_begin(void) {
    static __thread int begun;
    static const struct { uint8_t palette, unused[15]; uint16_t row_bytes[16]; uint8_t rows[16]; } tiles = {
        1, {0}, {64, 64, 64, 64, 64, 64, 64, 64}, {16, 16, 16, 16, 16, 16, 16, 16}};
    if (!begun) _tile_loadconfig(&tiles);
    begun = 1;
}
// Linux gives tiles to a process that asks; a container or an old kernel may refuse.
static int tiles_permitted(void) {
    enum { REQUEST = 0x1023, TILE_DATA = 18 };
    return syscall(SYS_arch_prctl, REQUEST, TILE_DATA) == 0;
}
#endif
#endif

// ---- packing

// Packs 16 words of each of n rows, of which `numbers` of 32 numbers are there. Constants spare the masks.
INLINE void pack_square(real_t *to, int width, int part, Matrix x, int n, int numbers, int is_first) {
    const int along = x.col == 1;
    words_t w[16];
    #pragma GCC unroll 16
    for (int j = 0; j < 16; j++) {
        const real_t *low = x.at + 2*j*x.col, *high = low + x.col;
        if (along) w[j] = pairs_along(x.at + j*x.row, numbers * (j < n));
        else w[j] = pairs_across(low, n * (2*j < numbers), high, n * (2*j + 1 < numbers));
    }
    if (along != is_first) transpose_words(w);
    #pragma GCC unroll 16
    for (int j = 0; j < 16; j++) store(to + j*width, w[j], part);
}

// Packs pairs of numbers into panels of `width` rows: word k*width + i of a panel is x(i, 2k) and
// x(i, 2k + 1), 0 beyond `rows` and K. Tiles want panels of 16 rows, those of a first operand transposed
// 16 by 16 words; where only 16 of SIDE rows are there, what the second panel holds does not matter.
INLINE void pack_pairs(real_t *out, Matrix x, int rows, int K, const int width, const int is_first) {
    const int words = words_of(K), part = smaller_of(width, 16), depth = words / 16, along = x.col == 1;
    const int parts = (rows + width - 1) / width * (width / part);
    for (int t = 0; t < parts * depth; t++) {  // 16 words of `part` rows, in the order of memory
        const int i = part * (along ? t / depth : t % parts);
        const int k = 16 * (along ? t % depth : t / parts);
        const int numbers = smaller_of(32, K - 2*k), n = smaller_of(part, rows - i);
        real_t *to = out + i / width * width * words + k*width + i % width;
        if (n == 16 && numbers == 32) pack_square(to, width, 16, part_of(x, i, 2*k), 16, 32, is_first);
        else pack_square(to, width, part, part_of(x, i, 2*k), n, numbers, is_first);
    }
}

// Packs words of the kind that is set.
INLINE void pack_words(real_t *out, Matrix x, int rows, int K, const int width, const int is_first) {
    if (word_kind == TILES) pack_pairs(out, x, rows, K, 16, is_first);
    else pack_pairs(out, x, rows, K, width, 0);
}

// ---- tiles

#ifdef HAS_TILES
enum { TILE_WORDS = 16 * 16 };
#define LOAD_TILE(t, x) do { \
        _tile_loadd(t, (x), 64); \
        for (int line = 0; line < TILE_WORDS; line += 16) __builtin_prefetch((x) + 2*TILE_WORDS + line); \
    } while (0)
// Makes sums (SIDE, SIDE) = words (SIDE, K) of a times words (K, SIDE) of b, two tiles of each side by side.
// They will go to c, whose rows are `row` apart: c is asked for meanwhile, and the words that come two steps
// later. This makes a product up to 1.7 times as fast where others share the processor, not slower elsewhere.
static inline void multiply_tiles(real_t *sums, int K, const real_t *a, const real_t *b, const real_t *c,
                                  int64_t row) {
    enum { ROW = SIDE * sizeof(real_t) };
    const real_t *next_a = a + K*16, *next_b = b + K*16;
    tiles_begin();
    __asm__ volatile("" : : "r"(a), "r"(b) : "memory");  // gcc's loads of tiles do not say that they read
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int k = 0; k < K*16; k += TILE_WORDS) {
        const real_t *coming = c + k / TILE_WORDS * 2 % SIDE * row;
        LOAD_TILE(4, a + k);
        LOAD_TILE(6, b + k);
        _tile_dpbf16ps(0, 4, 6);
        LOAD_TILE(7, next_b + k);
        _tile_dpbf16ps(1, 4, 7);
        LOAD_TILE(5, next_a + k);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
        for (int j = 0; j < 2*SIDE; j += 16) __builtin_prefetch(coming + j / SIDE * row + j % SIDE, 1);
    }
    _tile_stored(0, sums, ROW);
    _tile_stored(1, (sums + 16), ROW);
    _tile_stored(2, (sums + 16*SIDE), ROW);
    _tile_stored(3, (sums + 16*SIDE + 16), ROW);
}
static double saturate_tiles(void) {  // products of tiles from the first cache
    enum { PRODUCTS = 1000, WORDS = 64 };
    static const real_t zeros[SIDE * WORDS] = {0};
    real_t sums[SIDE * SIDE];
    for (int i = 0; i < PRODUCTS; i++) multiply_tiles(sums, WORDS, zeros, zeros, sums, 0);
    return 4.0 * PRODUCTS * SIDE * SIDE * WORDS;
}
#endif

// ---- which of them

int layers_bf16(int on) {
    word_kind = NUMBERS;
    if (!on || sizeof(real_t) != sizeof(float)) return !on;
    word_kind = PAIRS;
#ifdef HAS_TILES
    static int warned;
    if (tiles_permitted()) word_kind = TILES;
    else if (!warned++) warn("the system keeps tiles (AMX) from this process: bf16 is slow, with other bits");
#endif
    return 1;
}
