/*
common.h: what the experiments in this folder share.

Each file holds one kernel in numbered versions, from the obvious one to the trainer's own: the trainer is included here,
so the last version is its function and no copy. Every version is checked against a plain reference in double precision
before it is timed; percentages are of the limit of this machine, measured by the same process.

    ./matmul            all versions, a line each
    ./matmul 3          version 3
    ./matmul last       the last version of each experiment, timed without a check
    ./matmul table      all, as Markdown
    ./matmul check      only whether they are right, on small and odd shapes
    ./matmul small      those shapes timed too, which takes no time even in emulation
*/
#define REV_GPT2_NO_MAIN
#define REV_GPT2_PROFILE "dev/bench/profile.h"  // has device_bandwidth
#ifdef TWIN  // dev/cuda
#include "../../train_rev_gpt2.cu"
#else
#include "../../train_rev_gpt2.c"
#endif

typedef struct {
    int number;        // from 1; 0 ends the list
    const char *what;  // what changed
    double tolerance;  // the largest error it may have
    int bf16;          // products of bf16: 1, or 2 for a processor's tiles (TILES)
} Version;
typedef struct { const char *name; int d[5]; } Shape;  // name NULL ends the list
typedef struct {
    const char *title;
    const Version *versions;
    const Shape *odd, *shapes;      // for checks; for timing, in the order of their work
    void (*set_up)(const int *d);   // allocates and fills the operands, says the work
    void (*reset)(void);            // makes results as before a run
    void (*run)(int version);
    void (*check)(int version);     // calls compare() on the results of a run
} Experiment;

static double work_flops, work_bytes;  // of one run; what has flops is measured in flops
enum { MOST_EXPERIMENTS = 4, MOST_VERSIONS = 16, MOST_SHAPES = 8, MOST_OPERANDS = 16, REPEATS = 9, ROUNDS = 3, COLD = 1 << 25 };

// ---- operands

// A number in [-1, 1) that depends on seed and index alone
DEVICE static inline real_t random_at(uint32_t seed, size_t i) {
    uint32_t x = (uint32_t)i * 0x9E3779B1u + seed * 0x7FEB352Du;
    x = (x ^ x >> 16) * 0x21F0AAADu;
    x = (x ^ x >> 15) * 0x735A2D97u;
    return (real_t)(int32_t)(x ^ x >> 15) * (real_t)4.656612873e-10;
}

#ifndef TWIN
static void fill(real_t *x, size_t count, uint32_t seed) {
    #pragma omp parallel for simd
    for (size_t i = 0; i < count; i++) x[i] = random_at(seed, i);
}

static inline void fill_nan(real_t *x, size_t count) {  // so that an element nobody writes is found
    #pragma omp parallel for simd
    for (size_t i = 0; i < count; i++) x[i] = (real_t)NAN;
}
#endif

static void *operands[MOST_OPERANDS];
static int operand_count;
static void *allocate(size_t bytes) {  // until the next shape
    void *p = device_alloc(bytes);
    if (!p || operand_count == MOST_OPERANDS) die(STATUS_NUMBERS, "no memory for the operands");
    return operands[operand_count++] = p;
}

#ifndef TWIN
static real_t *make(size_t count, uint32_t seed) {
    real_t *x = (real_t *)allocate(count * sizeof(real_t));
    fill(x, count, seed);
    return x;
}
#endif

// ---- checking

static struct { double error, is, should; const char *what; size_t at; } worst;
static void compare(const char *what, size_t at, double is, double should, double scale) {
    double error = fabs(is - should) / (fabs(should) + scale);
    if (error <= worst.error) return;
    worst.error = error == error ? error : INFINITY;
    worst.is = is, worst.should = should, worst.what = what, worst.at = at;
}

// Of `count` things every one if they take little work, or else `some` of them, spread: the s-th is returned.
static inline size_t sampled(size_t count, double work, size_t some) { return work < 5e7 || count < some ? count : some; }
static inline size_t sample(size_t s, size_t samples, size_t count) {
    return samples == count ? s : (size_t)((double)s * ((double)count - 1) / ((double)samples - 1));
}

// ---- timing

static real_t *cold;
static size_t cold_count = COLD;
static int by_value(const void *a, const void *b) {
    double d = *(const double *)a - *(const double *)b;
    return d < 0 ? -1 : d > 0;
}

// The best time of several, and the median. As in training, the caches hold something else before each.
static double best_time(const Experiment *e, int version, double *median) {
    double times[REPEATS], spent = 0;
    int count = 0;
    while (count < REPEATS && (count < 3 ? spent < 2 : spent < 1)) {
        e->reset();
        device_zero(cold, cold_count * sizeof(real_t));
        device_finish();
        double start = seconds();
        e->run(version);
        device_finish();
        spent += times[count++] = seconds() - start;
    }
    qsort(times, (size_t)count, sizeof *times, by_value);
    *median = times[count / 2];
    return times[0];
}

enum { LINES, TABLE, CHECK };
enum { LAST = -1 };  // instead of a version's number
static int small_shapes;
static int passed, failed;
static double limit_flops[3], limit_bytes;  // the best seen
static double rates[MOST_EXPERIMENTS][MOST_VERSIONS][MOST_SHAPES];  // flops or bytes a second, the best seen; 0: not measured

static int set_bf16(int bf16) {  // whether it can
    int can = layers_bf16(bf16 > 0);
#ifndef TWIN
    if (can && bf16 == PAIRS) word_kind = PAIRS;
    can = can && word_kind == bf16;
#endif
    return can;
}
static void measure_limits(void) {
    for (int bf16 = 0; bf16 < 3; bf16++)
        if (set_bf16(bf16)) limit_flops[bf16] = fmax(limit_flops[bf16], device_flops());
    set_bf16(0);
    limit_bytes = fmax(limit_bytes, device_bandwidth(cold, cold_count));
}
static void print_limits(void) {
    int threads = 0;
    #pragma omp parallel reduction(+:threads)
    threads++;
#ifdef TWIN
    printf("%s, ", device.name);
#endif
    printf("threads: %d, limits: %.1f GFLOP/s, %.1f with pairs of bf16, %.1f with tiles of them, %.1f GB/s\n", threads,
           limit_flops[0] * 1e-9, limit_flops[1] * 1e-9, limit_flops[2] * 1e-9, limit_bytes * 1e-9);
}

// Whether a version is right on the operands as they are
static int is_right(const Experiment *e, const Version *v, const Shape *s) {
    worst.error = -1;  // a check that compares nothing fails
    e->reset();
    e->run(v->number);
    e->check(v->number);
    int right = worst.error >= 0 && worst.error <= v->tolerance;
    if (!right)
        printf("FAILED %s, %s, version %d: %s[%zu] is %.9g, should be %.9g, error %.1e\n", e->title, s->name, v->number, worst.what,
               worst.at, worst.is, worst.should, worst.error);
    right ? passed++ : failed++;
    return right;
}

static const Shape *shapes_in(const Experiment *e, int mode) { return mode == CHECK || small_shapes ? e->odd : e->shapes; }
static int chosen(const Version *v, int only) {
    if (only == LAST) return v[1].number == 0;
    return only == 0 || v->number == only;
}

// Every version at every shape; a version that will take longer than three seconds is left out.
static void run_experiment(const Experiment *e, double rate[MOST_VERSIONS][MOST_SHAPES], int mode, int only) {
    const Shape *shapes = shapes_in(e, mode);
    for (int c = 0; shapes[c].name; c++) {
        work_flops = work_bytes = 0;
        while (operand_count > 0) device_free(operands[--operand_count]);
        e->set_up(shapes[c].d);
        for (const Version *v = e->versions; v->number; v++) {
            double work = work_flops > 0 ? work_flops : work_bytes, *r = rate[v - e->versions], median;
            if (!chosen(v, only)) continue;
            double slowest = 0;  // known so far, of another shape
            for (int j = 0; j < c; j++) slowest = r[j] > 0 && (slowest == 0 || r[j] < slowest) ? r[j] : slowest;
            if (mode != CHECK && slowest > 0 && work / slowest > 3) continue;
            if (!set_bf16(v->bf16)) {  // not on this processor
#ifndef TWIN
                failed += v->bf16 == NUMBERS;  // which all have
#endif
                continue;
            }
            // what is last was checked at small shapes; a reference of the large ones takes longer than they are timed
            int unchecked = only == LAST && mode == LINES && !small_shapes;
            if ((unchecked || is_right(e, v, &shapes[c])) && mode != CHECK) {
                double best = best_time(e, v->number, &median);
                double limit = work_flops > 0 ? limit_flops[v->bf16] : limit_bytes;
                r[c] = fmax(r[c], work / best);
                if (mode == LINES)
                    printf("%s, %s, version %d, %s: error %.1e, best %.2f ms, median %.2f ms, %.1f %s, %.0f%% of the limit\n", e->title,
                           shapes[c].name, v->number, v->what, worst.error, best * 1e3, median * 1e3, r[c] * 1e-9,
                           work_flops > 0 ? "GFLOP/s" : "GB/s", 100 * r[c] / limit);
            }
            set_bf16(0);
            fflush(stdout);
        }
    }
}

static void print_table(const Experiment *e, double rate[MOST_VERSIONS][MOST_SHAPES], int only) {
    const Shape *shapes = shapes_in(e, TABLE);
    printf("\n| %s, %s | |", e->title, work_flops > 0 ? "GFLOP/s" : "GB/s");
    for (const Shape *s = shapes; s->name; s++) printf(" %s |", s->name);
    printf("\n|---|---|");
    for (const Shape *s = shapes; s->name; s++) printf("---|");
    for (const Version *v = e->versions; v->number; v++) {
        if (!chosen(v, only)) continue;
        printf("\n| %d | %s |", v->number, v->what);
        for (int c = 0; shapes[c].name; c++) {
            double r = rate[v - e->versions][c];
            if (r > 0) printf(" %.*f (%.0f%%) |", r < 1e10, r * 1e-9, 100 * r / (work_flops > 0 ? limit_flops[v->bf16] : limit_bytes));
            else printf(" – |");
        }
    }
    printf("\n");
}

static int run_experiments(int argc, char **argv, const Experiment *experiments, int count) {
    int mode = LINES, only = 0;
    for (int i = 1; i < argc; i++) {
        char *end;
        if (strcmp(argv[i], "table") == 0) mode = TABLE;
        else if (strcmp(argv[i], "check") == 0) mode = CHECK;
        else if (strcmp(argv[i], "small") == 0) small_shapes = 1, cold_count = COLD >> 10;
        else if (strcmp(argv[i], "last") == 0) only = LAST;
        else if ((only = (int)strtol(argv[i], &end, 10)) <= 0 || *end)
            die(STATUS_USAGE, "usage: %s [VERSION|last] [table|check|small]", argv[0]);
    }
    void *scratch = device_alloc(layers_scratch_bytes(4096, 4096, 4096, 0));
    cold = (real_t *)device_alloc(COLD * sizeof(real_t));
    if (!scratch || !cold) die(STATUS_NUMBERS, "no memory");
    layers_begin(scratch);
    // a table shows the best of several rounds: where a machine is shared, others come and go
    for (int round = 0; round < (mode == TABLE ? ROUNDS : 1); round++) {
        if (mode != CHECK) measure_limits();
        if (mode == LINES) print_limits();
        for (int i = 0; i < count; i++) run_experiment(&experiments[i], rates[i], mode, only);
    }
    if (only > 0 && passed + failed == 0) die(STATUS_USAGE, "%s has no version %d, or none for this processor", argv[0], only);
    while (operand_count > 0) device_free(operands[--operand_count]);
    device_free(cold);
    device_free(scratch);
    if (mode == TABLE) {
        print_limits();
        for (int i = 0; i < count; i++) print_table(&experiments[i], rates[i], only);
        printf("\n");
    } else if (passed + failed > 0) printf("%d passed, %d failed\n", passed, failed);
    return failed > 0 || (passed == 0 && only != LAST);
}
