/*
profile.h: the flag --profile, which a trainer built with `make -B PROFILE=1` has. At the end of a run it
prints the time of a step by layer function, beside the least that the machine's measured limits allow.

The trainer includes this file where it has empty macros otherwise. The time from where a layer function says
what it needs belongs to that function until the next one does. flops and bytes are what no way of computing
it could do without: products, and each operand once. Tests count calls with it, experiments measure the
bandwidth.
*/
typedef struct { const char *name; int calls; double seconds, flops, bytes; } Profile;
enum { MAX_PROFILES = 64 };
static Profile profiles[MAX_PROFILES], *profiled;  // profiled: the one running, or NULL
static double profiled_since;
#define PROFILE_WAITS  // for all of a card
static int profile_wanted, profile_steps, profiling;  // the flag; steps begun; whether calls count now

#define PROFILE_OPTION {"--profile", SWITCH, &profile_wanted, "0", 0, 0, \
     "at the end, print a step's time by layer function beside what the machine's limits allow"},

static void profile(const char *name, double flops, double bytes) {
    if (!profiling) return;
    device_finish();
    double now = seconds();
    if (profiled) profiled->seconds += now - profiled_since;
    profiled_since = now;
    profiled = NULL;
    if (!name) return;
    for (profiled = profiles; profiled->name && strcmp(profiled->name, name) != 0;) profiled++;
    profiled->name = name;
    profiled->calls++;
    profiled->flops += flops;
    profiled->bytes += bytes;
}

// A step of training begins, or has ended.
static void profile_step(int begins) {
    profile(NULL, 0, 0);
    profiling = profile_wanted && begins;
    // the first one touches its memory for the first time: it is forgotten when there is a second
    if (profiling && ++profile_steps == 2) memset(profiles, 0, sizeof profiles);
}

// The measured limit, bytes/s read and written; x is changed.
static double device_bandwidth(real_t *x, size_t count) {
    size_t half = count / 128 * 64;
    double best = 0;
    for (int attempt = 0; attempt < 4; attempt++) {
        device_finish();
        double start = seconds();
        adjoint_update(x, x + half, 1, 1, half);
        device_finish();
        best = fmax(best, 4.0 * (double)half * sizeof(real_t) / (seconds() - start));
    }
    return best;
}

// Means of the steps, beside the floor: the time that the measured limits, FLOP/s and bytes/s, allow.
static void profile_print(const Model *m, double flops_limit) {
    if (!profile_wanted) return;
    if (!profile_steps) {
        printf("--profile: no step was trained\n");
        return;
    }
    int count = profile_steps > 1 ? profile_steps - 1 : 1;
    double bytes_limit = device_bandwidth(m->grads, parameter_count(&m->net)), total = 0;
    for (Profile *p = profiles; p->name; p++) total += p->seconds;
    printf("%.2f ms a step by layer function, mean of the last %d; limits %.0f GFLOP/s, %.1f GB/s\n",
           total / count * 1e3, count, flops_limit * 1e-9, bytes_limit * 1e-9);
    printf("%-20s %7s %10s %7s %9s %9s %10s %7s\n",
           "layer function", "calls", "ms", "share", "GFLOP/s", "GB/s", "floor, ms", "times");
    for (Profile *p = profiles; p->name; p++) {
        double least = fmax(p->flops / flops_limit, p->bytes / bytes_limit), s = p->seconds;
        printf("%-20s %7d %10.2f %6.1f%% %9.1f %9.1f %10.2f %7.2f\n",
               p->name, p->calls / count, s / count * 1e3, 100 * s / total, p->flops / s * 1e-9,
               p->bytes / s * 1e-9, least / count * 1e3, least > 0 ? s / least : 0);
    }
}
