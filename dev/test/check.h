/*
check.h: what the two test programs share, test_rev_gpt2.c for the mathematics and program.c for the program.

It counts checks, prints sections, keeps what is printed, and lets a program run itself in a process of its own
where one has to die. It comes before the trainer, so that both can wrap what the trainer calls: hence the
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

static double wall_clock(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

// Prints what the section before came to, and the name of the one that begins; NULL: none does.
static void section(const char *name) {
    static double last;
    static int before;
    if (last > 0) printf("  %d checks, %.1f s\n", passed + failed - before, wall_clock() - last);
    before = passed + failed;
    last = wall_clock();
    if (name) printf("%s\n", name);
    fflush(stdout);
}

// ---- comparing

// What is stored as an activation is rounded, relative to its size, by at most this: to bf16, or not at all. A
// variable, or nvcc warns of what it rules out.
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

// Runs this program with these arguments, its stdout in the file `out` unless that is NULL. After `milliseconds`,
// if not 0, it is killed. Returns its exit status, or 256 + the signal; its stderr is left in `output`. A fork
// alone would not do: threads and a card's driver do not survive it.
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
