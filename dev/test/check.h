/*
check.h: what the two test programs share, test_rev_gpt2.c for the mathematics and program.c for the program.

It counts checks, runs tests by name, keeps what is printed, and lets a program run itself in a process of its
own where one has to die. It comes before the trainer, so that both can wrap what the trainer calls: hence the
headers of the card, which must not see what is wrapped.
*/
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <errno.h>
#include <math.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>
#if defined(TWIN) && !defined(EMULATE)
#include <cublasLt.h>
#include <cuda_bf16.h>
#include <cuda_runtime.h>
#endif

#ifdef TWIN
static const int twin = 1;
#else
static const int twin = 0;
#endif

// ---- counting

static int passed, failed;
__attribute__((format(printf, 2, 3))) static void check(int ok, const char *format, ...) {
    va_list args;
    if (ok) passed++;
    else failed++;
    if (ok) return;
    va_start(args, format);
    printf("FAILED: ");
    vprintf(format, args);
    printf("\n");
    va_end(args);
}

// ---- comparing

// What is stored as an activation is rounded, relative to its size, by at most this: to bf16, or not at all.
// A variable, or nvcc warns of what it rules out.
#if defined(TWIN) && !defined(PRECISION_FP32)
static double rounding = 1 / 256.0;
#else
static double rounding = 0;
#endif

// The larger of two, and NaN once there was a NaN.
static double larger(double a, double b) { return isnan(a) || b <= a ? a : b; }

// How far `got` is from `want`, beyond the rounding of an activation.
static double off(double want, double got) {
    double e = fabs(got - want) - rounding * fabs(want);
    return isnan(e) || e > 0 ? e : 0;
}

// ---- what is printed

// What is printed from capture to captured, in memory of its own
static FILE *captured_file;
static int captured_stdout;
static void capture(void) {
    captured_file = tmpfile();
    captured_stdout = dup(1);
    fflush(stdout);
    dup2(fileno(captured_file), 1);
}
static char *captured(void) {
    char *text = (char *)calloc(4096, 1);
    fflush(stdout);
    dup2(captured_stdout, 1);
    close(captured_stdout);
    rewind(captured_file);
    check(fread(text, 1, 4095, captured_file) < 4095, "too much text");
    fclose(captured_file);
    return text;
}

// ---- a process of its own

static char self[4096], output[8192];  // this program's file; what the last such process said on stderr

static void find_self(const char *name) {
    if (!realpath("/proc/self/exe", self)) snprintf(self, sizeof self, "%s", name);
}

// Runs this program with these arguments, its stdout in the file `out` unless that is NULL. After
// `milliseconds`, if not 0, it is killed. Returns its exit status, or 256 + the signal; its stderr is left in
// `output`. A fork alone would not do: threads and a card's driver do not survive it.
static int run_itself(char **argv, int milliseconds, const char *out) {
    int status;
    FILE *errors = tmpfile();
    if (!errors) return 99;
    fflush(stdout);
    pid_t child = fork();
    if (child == 0) {
        if ((out && !freopen(out, "w", stdout)) || dup2(fileno(errors), 2) < 0) _exit(99);
        execv(self, argv);
        _exit(99);
    }
    if (milliseconds) {
        usleep((useconds_t)milliseconds * 1000);
        kill(child, SIGKILL);
    }
    waitpid(child, &status, 0);
    rewind(errors);
    output[fread(output, 1, sizeof output - 1, errors)] = 0;
    fclose(errors);
    return WIFSIGNALED(status) ? 256 + WTERMSIG(status) : WEXITSTATUS(status);
}

// ---- running by name

// Tests of a section stand together. A kind is what the words of the command line choose by.
typedef struct { const char *section, *name; void (*run)(void); int kind; } Test;
typedef struct { const char *name; int kind; } Word;  // runs the tests up to that kind
enum { MOST_TESTS = 64 };
static int chosen[MOST_TESTS];  // by their place in the table

// A line with all names for who asks for one that does not exist
static void no_such_test(const Test *tests, const Word *words, const char *program, const char *name) {
    fprintf(stderr, "%s: there is no test %s, but", program, name);
    for (const Test *t = tests; t->name; t++) fprintf(stderr, " %s", t->name);
    for (const Word *w = words; w->name; w++) fprintf(stderr, "%s %s",
                                                      w == words ? "; several are run by" : "", w->name);
    fprintf(stderr, "; all without a name\n");
    exit(2);
}

// Tests that are named run, and those of a word that means some; without either, all. Both tables end with an
// empty row.
static void choose_tests(const Test *tests, const Word *words, int argc, char **argv) {
    int most = MOST_TESTS, widest = 0, named = 0;
    for (const Word *w = words; w->name; w++)
        if (w->kind > widest) widest = w->kind;
    for (int i = 1; i < argc; i++) {
        int known = 0;
        for (const Word *w = words; w->name; w++) {
            if (strcmp(argv[i], w->name) != 0) continue;
            known = 1;
            if (w->kind < most) most = w->kind;
        }
        for (const Test *t = tests; t->name; t++)
            if (strcmp(argv[i], t->name) == 0) known = named = chosen[t - tests] = 1;
        if (!known) no_such_test(tests, words, argv[0], argv[i]);
    }
    for (const Test *t = tests; t->name; t++)
        if (t->kind <= most && (!named || most < widest)) chosen[t - tests] = 1;
}

static double wall_clock(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static void run_test(const Test *t) {
    static const char *section = "";
    int before = passed + failed;
    double start = wall_clock();
    if (strcmp(section, t->section) != 0) printf("%s\n", section = t->section);
    fflush(stdout);
    t->run();
    printf("  %-20s %6d checks, %.1f s\n", t->name, passed + failed - before, wall_clock() - start);
    fflush(stdout);
}

// The last line; returns the exit status.
static int report(void) {
    printf("%d passed, %d failed\n", passed, failed);
    return failed > 0;
}
