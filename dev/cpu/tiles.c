/*
tiles.c: whether tiles.h does what a processor with AMX does, to the bit; elsewhere, whether its sums are right. Numbers
are random bits, of exponents near 1 or any, so that sums are rounded, overflow and are flushed to zero.

    make tiles && ./tiles
*/
#include <stdint.h>
#if (defined(__AMX_BF16__) || defined(__AMXBF16__)) && defined(__AVX512BF16__) && defined(__linux__)
#define ON_PROCESSOR
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>
static void multiply_on_processor(uint32_t *sums, const uint32_t *a, const uint32_t *b) {
    static const struct {
        uint8_t palette, unused[15];
        uint16_t row_bytes[16];
        uint8_t rows[16];
    } tiles = {1, {0}, {64, 64, 64}, {16, 16, 16}};
    _tile_loadconfig(&tiles);
    _tile_loadd(0, sums, 64);
    _tile_loadd(1, a, 64);
    _tile_loadd(2, b, 64);
    _tile_dpbf16ps(0, 1, 2);
    _tile_stored(0, sums, 64);
    _tile_release();
}
static void round_on_processor(uint32_t *out, const uint32_t *x) {
    __m512 low = _mm512_loadu_ps(x), high = _mm512_loadu_ps(x + 16);
    _mm512_storeu_si512(out, (__m512i)_mm512_cvtne2ps_pbh(high, low));
}
static int has_tiles(void) { return syscall(SYS_arch_prctl, 0x1023, 18) == 0; }
#undef _tile_zero
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbf16ps
#endif

#define REV_GPT2_NO_MAIN
#define EMULATE_TILES 1
#include "../../train_rev_gpt2.c"

enum { WORDS = 256, ROUNDS = 20000 };
static int passed, failed;
static void check(int right, const char *what, int round) {
    if (right) passed++;
    else failed++;
    if (!right && failed <= 10) printf("FAILED %s, round %d\n", what, round);
}
static uint32_t next_bits(void) {
    static uint64_t state = 1;
    state = state * 6364136223846793005u + 1442695040888963407u;
    return (uint32_t)(state >> 32);
}
// The exponents of a round's numbers: 2^at, and at most `spread` from it, or any, those of infinity and NaN too
typedef struct { int at, spread; } Range;
enum { ANY = 128 };
static uint32_t random_float(Range r) {
    uint32_t bits = next_bits(), exponent = bits >> 23 & 0xFF;
    int near = 127 + r.at - r.spread + (int)exponent % (2*r.spread + 1);
    if (r.spread < ANY) exponent = (uint32_t)(near < 0 ? 0 : near > 255 ? 255 : near);
    return (bits & 0x807FFFFF) | exponent << 23;
}
static uint32_t random_pair(Range r) { return random_float(r) >> 16 | (random_float(r) & 0xFFFF0000); }
#ifdef ON_PROCESSOR
static uint32_t near_tie(Range r) { return (random_float(r) & 0xFFFF0000) + 0x7FFF + next_bits() % 3; }
static int is_nan(uint32_t bits) { return (bits & 0x7FFFFFFF) > 0x7F800000; }
static int same(const uint32_t *x, const uint32_t *y, int count) {  // a NaN is as good as another
    for (int i = 0; i < count; i++)
        if (x[i] != y[i] && !(is_nan(x[i]) && is_nan(y[i]))) return 0;
    return 1;
}
#endif
static double number(const uint32_t *words, int i, int k) {
    return tile_float(words[i*16 + k / 2] >> k % 2 * 16 << 16);
}

int main(void) {
    uint32_t a[WORDS], b[WORDS], before[WORDS], sums[WORDS], there[WORDS];
    for (int round = 0; round < ROUNDS; round++) {
        static const Range ranges[] = {{0, 0}, {0, 1}, {0, 4}, {0, 20}, {0, 60}, {0, ANY}, {-64, 3}, {62, 3}};
        const Range r = ranges[round % 8], of_sums = {2 * r.at, r.spread};
        for (int i = 0; i < WORDS; i++) {
            a[i] = random_pair(r);
            b[i] = random_pair(r);
            sums[i] = there[i] = before[i] = random_float(of_sums);
        }
        if (round == 6) {  // 2^-126 less a little, which is below it only if it is rounded as if no exponent were least
            memset(a, 0, sizeof a);
            memset(b, 0, sizeof b);
            memset(before, 0, sizeof before);
            memcpy(sums, before, sizeof before);
            memcpy(there, before, sizeof before);
            a[0] = b[0] = 0x2000;  // 2^-63, and 2^-126 is the product
            a[1] = 0x9A40;         // -1.5 * 2^-75
            b[16] = 0x1980;        // 2^-76
        }
        tile_load(0, sums, 64);
        tile_load(1, a, 64);
        tile_load(2, b, 64);
        tile_multiply(0, 1, 2);
        tile_store(0, sums, 64);
#ifdef ON_PROCESSOR
        if (has_tiles()) {
            multiply_on_processor(there, a, b);
            check(same(sums, there, WORDS), "the processor's product of tiles", round);
        }
        uint32_t numbers[32];
        for (int i = 0; i < 32; i++) numbers[i] = near_tie(r);
        words_t along = pairs_along((const real_t *)numbers, 32), on_processor;
        round_on_processor(on_processor.at, numbers);
        check(memcmp(&along, &on_processor, sizeof along) == 0, "the processor's rounding", round);
#endif
        if (round == 6) check(sums[0] == 0, "a sum below 2^-126", round);
        if (r.at != 0 || r.spread > 20) continue;
        int right = 1;
        for (int i = 0; i < 16; i++)
            for (int j = 0; j < 16; j++) {
                double sum = tile_float(before[i*16 + j]), size = fabs(sum);
                for (int k = 0; k < 32; k++) {
                    double term = number(a, i, k) * tile_float(b[k / 2 * 16 + j] >> k % 2 * 16 << 16);
                    sum += term;
                    size += fabs(term);
                }
                right &= fabs(sum - tile_float(sums[i*16 + j])) <= 1e-6 * size;
            }
        check(right, "sums", round);
    }
    printf("%d passed, %d failed\n", passed, failed);
    return failed > 0;
}
