/*
stream_step.c: s = alpha s + beta cur + gamma F in integers on a grid, and back: one run is both. Each version must give the
reference's integers, and after the step back the very bytes it began with.
*/
#include "common.h"

static size_t count;
static int grid;
static Coefficients k;
static stream_t *s, *cur;
static real_t *f, *f2;
static uint16_t *r;
static uint32_t *low;

static int32_t start(size_t i) { return (int32_t)lrintf(random_at(1, i) * (real_t)(4 << grid)); }

// The reference: floor divisions as the mathematics has them (numbers that grow here do so far below 64 bits)
static int64_t floor_div(int64_t x, int64_t y) { return x / y - (x % y != 0 && (x < 0) != (y < 0)); }
static int64_t floor_mod(int64_t x, int64_t y) { return x - floor_div(x, y) * y; }
static int64_t scaled(int64_t x, int n) { return floor_div(2 * n * x + (1 << k.shift), 2 << k.shift); }
static int64_t added(size_t i) {
    real_t force = f2 ? f[i] + f2[i] : f[i];
    return scaled(cur[i].fixed, k.beta) + llrint(force * (real_t)ldexp(k.gamma, grid));
}
static int64_t stepped(size_t i) {
    int64_t x = start(i);
    if (r) x = floor_div(x, 16) * k.alpha + floor_mod(floor_mod(x, 16), k.alpha);  // a remainder on an empty stack
    else x = scaled(x, k.alpha);
    return x + added(i);
}

// 1: an element at a time, checked as it comes
static int64_t in_range(double x) {
    if (!(x > -2147483648.0 && x < 2147483648.0)) die(STATUS_NUMBERS, "out of range");
    return (int64_t)x;
}
static void scalar(int direction) {
    int64_t n = k.alpha;
    for (size_t i = 0; i < count; i++) {
        int64_t x = s[i].fixed, add = scaled(cur[i].fixed, k.beta), digit;
        add += in_range(nearbyint((f2 ? f[i] + f2[i] : f[i]) * (real_t)ldexp(k.gamma, grid)));
        if (!r && k.shift == 0) x = direction > 0 ? n * x + add : n * (x - add);
        else if (!r && direction > 0) {
            low[i] = (uint32_t)floor_mod(x, 1 << k.shift);  // a word an element here
            x = scaled(x, k.alpha) + add;
        } else if (!r) {
            x = (x - add - scaled(low[i], k.alpha)) / n * (1 << k.shift) + low[i];
        } else if (direction > 0) {
            digit = r[i] * 16 + floor_mod(x, 16);
            x = floor_div(x, 16) * n + digit % n + add;
            r[i] = (uint16_t)(digit / n);
        } else {
            x -= add;
            digit = r[i] * n + floor_mod(x, n);
            x = floor_div(x, n) * 16 + digit % 16;
            r[i] = (uint16_t)(digit / 16);
        }
        s[i].fixed = (int32_t)in_range((double)x);
    }
}

// 2: no branch in a loop, threads; what goes wrong is gathered in a flag. Still 64 bits for everything.
static int gathered;
static inline int64_t flagged_added(size_t i, real_t gamma, int *bad) {
    real_t v = rintf((f2 ? f[i] + f2[i] : f[i]) * gamma);
    *bad |= !(v > -2147483648.0f && v < 2147483648.0f);
    return (((int64_t)k.beta * cur[i].fixed + (1 << k.shift >> 1)) >> k.shift) + (int64_t)v;
}
static void flagged(int direction) {
    const real_t gamma = (real_t)ldexp(k.gamma, grid);
    const int64_t sign = k.alpha < 0 ? -1 : 1, n = k.alpha;
    int bad = 0;
    #pragma omp parallel for reduction(|:bad)
    for (size_t i = 0; i < count; i++) {
        int64_t x = s[i].fixed, add = flagged_added(i, gamma, &bad), half = 1 << k.shift >> 1;
        if (!r && k.shift == 0) x = sign * x + (direction > 0 ? add : -sign * add);
        else if (!r && direction > 0) {
            low[i] = (uint32_t)x & ((1u << k.shift) - 1);
            x = ((n * x + half) >> k.shift) + add;
        } else if (!r) {
            x = (x - add - ((n * low[i] + half) >> k.shift)) / n * (1 << k.shift) + low[i];
        } else if (direction > 0) {
            int64_t digit = r[i] * 16 + (x & 15);
            x = (x >> 4) * n + digit % n + add;
            r[i] = (uint16_t)(digit / n);
        } else {
            int64_t quotient = (x - add) / n - ((x - add) % n < 0), digit = r[i] * n + (x - add - quotient * n);
            x = quotient * 16 + (digit & 15);
            r[i] = (uint16_t)(digit >> 4);
        }
        bad |= x != (int32_t)x;
        s[i].fixed = (int32_t)x;
    }
    gathered |= bad;
}

static void step(int version, int direction) {
    if (version == 1) scalar(direction);
    else if (version == 2) flagged(direction);
    else stream_step(s, s, cur, f, f2, r, low, count, k, grid, direction);
}
static void run(int version) { step(version, 1), step(version, -1); }

static void reset(void) {
    for (size_t i = 0; i < count; i++) s[i].fixed = start(i);
    if (r) memset(r, 0, count * sizeof *r);
    gathered = 0;
    stream_take_reach();
}
static void check(int version) {
    for (size_t i = 0; i < count; i++) compare("s after both steps", i, s[i].fixed, start(i), 1);
    for (size_t i = 0; i < count && r; i++) compare("r after both steps", i, r[i], 0, 1);
    step(version, 1);
    for (size_t i = 0; i < count; i++) compare("s after a step", i, s[i].fixed, (double)stepped(i), 1);
    compare("fault", 0, gathered | (stream_take_reach() > 31), 0, 1);
}

static void set_up(const int *d) {
    count = (size_t)d[0], grid = d[2] ? 23 : 20;
    k.alpha = d[3], k.shift = d[4], k.beta = (1 << k.shift) - k.alpha, k.gamma = 0.5;
    s = (stream_t *)allocate(count * sizeof *s), cur = (stream_t *)allocate(count * sizeof *cur);
    f = make(count, 3), f2 = d[1] ? make(count, 4) : NULL, r = d[2] ? (uint16_t *)allocate(count * sizeof *r) : NULL;
    low = k.shift && !r ? (uint32_t *)allocate(count * sizeof *low) : NULL;  // the trainer's takes far less
    for (size_t i = 0; i < count; i++) cur[i].fixed = (int32_t)lrintf(random_at(2, i) * (real_t)(4 << grid));
    work_bytes = 2.0 * (double)count * (12 + (f2 ? 8 : 4) + (r ? 4 : k.shift / 8.0));
}

static const Version versions[] = {
    {1, "an element at a time, errors as they come", 0, 0}, {2, "a flag for errors and no branch, threads", 0, 0},
    {3, "the trainer's", 0, 0}, {0, NULL, 0, 0}};
// elements, whether F comes in halves, whether remainders are kept for the whole pass, alpha times 2^shift, shift
static const Shape odd[] = {{"midpoint", {1003, 0, 0, 1, 0}}, {"leapfrog", {1004, 1, 0, -1, 0}}, {"midpoint-a, 13/16", {1004, 1, 1, 13, 4}},
                            {"midpoint-a, 19/16", {1003, 0, 1, 19, 4}}, {"bdia, -1/16", {1003, 1, 0, -1, 4}}, {"bdia, 5/8", {1004, 0, 0, 5, 3}},
                            {NULL, {0, 0, 0, 0}}};
static const Shape shapes[] = {{"midpoint", {16384 * 768, 1, 0, 1, 0}}, {"leapfrog", {16384 * 768, 1, 0, -1, 0}}, {"midpoint-a", {16384 * 768, 1, 1, 13, 4}},
                               {"bdia, -1/16", {16384 * 768, 1, 0, -1, 4}}, {NULL, {0, 0, 0, 0}}};
static const Experiment experiments[] = {{"stream step and back", versions, odd, shapes, set_up, reset, run, check}};

int main(int argc, char **argv) { return run_experiments(argc, argv, experiments, 1); }
