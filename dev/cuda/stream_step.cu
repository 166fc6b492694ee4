/*
stream_step.cu: s = alpha s + beta cur + gamma F in integers on a grid, and back: one run is both. Each version must give the
reference's integers, and after the step back the very bytes it began with.
*/
#include "common.h"

static size_t count;
static int grid;
static Coefficients k;
static stream_t *s, *cur;
static act_t *f, *f2;
static uint16_t *r;
static uint32_t *low;

// The reference: floor divisions as the mathematics has them (numbers that grow here do so far below 64 bits)
static int64_t floor_div(int64_t x, int64_t y) { return x / y - (x % y != 0 && (x < 0) != (y < 0)); }
static int64_t floor_mod(int64_t x, int64_t y) { return x - floor_div(x, y) * y; }
static int64_t scaled(int64_t x, int n) { return floor_div(2 * n * x + (1 << k.shift), 2 << k.shift); }
static int32_t start(uint32_t seed, size_t i) { return (int32_t)lrintf(number(seed, i) * (float)(4 << grid)); }
static int64_t stepped(size_t i) {
    int64_t x = start(1, i);
    float force = f2 ? rounded(3, i) + rounded(4, i) : rounded(3, i);
    if (r) x = floor_div(x, 16) * k.alpha + floor_mod(floor_mod(x, 16), k.alpha);  // a remainder on an empty stack
    else x = scaled(x, k.alpha);
    return x + scaled(start(2, i), k.beta) + llrint(force * (float)ldexp(k.gamma, grid));
}

// ---- 1: a thread an element; 2: a thread four of them, 16 bytes of a stream at a time

static void step(int version, int direction) {
    Step one = {k, 1, 1, 1, (float)ldexp(k.gamma, grid), k.alpha, direction > 0 ? 1 : -k.alpha, 1, direction};
    if (version == 1 && k.shift && !r) LAUNCH(step_low_kernel, blocks_for(count, THREADS), THREADS, 0, s, s, cur, f, f2, low, count, one, reached);
    else if (version == 1) LAUNCH(step_kernel<1>, blocks_for(count, THREADS), THREADS, 0, s, s, cur, f, f2, r, count, one, reached);
    else stream_step(s, s, cur, f, f2, r, low, count, k, grid, direction);
}
static void run(int version) { step(version, 1), step(version, -1); }

static void put_starts(stream_t *x, uint32_t seed) {
    stream_t *host = (stream_t *)malloc(count * sizeof(stream_t));
    for (size_t i = 0; i < count; i++) host[i].fixed = start(seed, i);
    to_device(x, host, count * sizeof(stream_t));
    free(host);
}
static void reset(void) {}  // a run ends where it began
static void check(int version) {
    const stream_t *x = fetch(s, count);
    const uint16_t *rest = r ? fetch(r, count) : NULL;
    for (size_t i = 0; i < count; i++) compare("s after both steps", i, x[i].fixed, start(1, i), 1);
    for (size_t i = 0; i < count && r; i++) compare("r after both steps", i, rest[i], 0, 1);
    step(version, 1);
    x = fetch(s, count);
    for (size_t i = 0; i < count; i++) compare("s after a step", i, x[i].fixed, (double)stepped(i), 1);
    step(version, -1);
    compare("fault", 0, stream_take_reach() > 31, 0, 1);
}

static void set_up(const int *d) {
    count = (size_t)d[0], grid = d[2] ? 23 : 20;
    k.alpha = d[3], k.shift = d[4], k.beta = (1 << k.shift) - k.alpha, k.gamma = 0.5;
    s = (stream_t *)allocate(count * sizeof *s), cur = (stream_t *)allocate(count * sizeof *cur);
    f = make_activations(count, 3), f2 = d[1] ? make_activations(count, 4) : NULL, r = d[2] ? (uint16_t *)allocate(count * sizeof *r) : NULL;
    low = k.shift && !r ? (uint32_t *)allocate((count + 31) / 32 * (size_t)k.shift * sizeof *low) : NULL;
    put_starts(s, 1), put_starts(cur, 2);
    work_bytes = 2.0 * (double)count * (12 + (f2 ? 2 : 1) * (double)sizeof(act_t) + (r ? 4 : k.shift / 8.0));
}

static const Version versions[] = {{1, "a thread an element", 0, 1}, {2, "the trainer's: four elements a thread", 0, 1}, {0, NULL, 0, 0}};
// elements, whether F comes in halves, whether remainders are kept for the whole pass, alpha times 2^shift, shift
static const Shape odd[] = {{"midpoint", {1003, 0, 0, 1, 0}}, {"leapfrog", {1004, 1, 0, -1, 0}}, {"midpoint-a, 13/16", {1004, 1, 1, 13, 4}},
                            {"midpoint-a, 19/16", {1003, 0, 1, 19, 4}}, {"bdia, -1/16", {1003, 1, 0, -1, 4}}, {"bdia, 5/8", {1004, 0, 0, 5, 3}},
                            {NULL, {0, 0, 0, 0}}};
static const Shape shapes[] = {{"midpoint", {16384 * 768, 1, 0, 1, 0}}, {"leapfrog", {16384 * 768, 1, 0, -1, 0}}, {"midpoint-a", {16384 * 768, 1, 1, 13, 4}},
                               {"bdia, -1/16", {16384 * 768, 1, 0, -1, 4}}, {NULL, {0, 0, 0, 0}}};
static const Experiment experiments[] = {{"stream step and back", versions, odd, shapes, set_up, reset, run, check}};

int main(int argc, char **argv) { return run_experiments(argc, argv, experiments, 1); }
