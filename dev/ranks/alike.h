/*
alike.h: what the ranks of a training must have alike, whoever brings their messages: mpi.h, or sockets.h.

Before anything is made or read they compare the program, flags, processor and C library, and the trainer its token
files and kind of products. Who includes this has ranks_broadcast and ranks_combine, and fills hosts in.
*/
#include <sys/utsname.h>
#ifdef _OPENMP
#include <omp.h>
#endif

enum { HOST = 64 };
static char (*hosts)[HOST];  // the machine of each rank

static void ranks_broadcast(void *x, size_t bytes);
static void ranks_combine(double *x, size_t count);
static FILE *open_regular(const char *path, const char *mode);

// A number that Slurm or mpirun has put into the environment
static int number_in(const char *name, int otherwise) {
    const char *text = getenv(name);
    char *end;
    if (!text || !text[0]) return otherwise;
    const long n = strtol(text, &end, 10);
    if (*end || n < 0 || n > 65536) die(STATUS_USAGE, "%s=%s in the environment: a whole number up to 65536 is meant", name, text);
    return (int)n;
}

// Ends one of several processes that somebody has started, which know nothing of each other.
static void end_if_alone(const char *hint) {
    static const char *const names[] = {"OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS"};
    for (int i = 0; i < 3; i++) {
        const int count = number_in(names[i], 1);
        if (count > 1) die(STATUS_USAGE, "one of %d processes that would not share anything: %s", count, hint);
        if (getenv(names[i])) return;  // the nearest launcher knows
    }
}

static uint64_t mixed(uint64_t sum, const void *data, size_t bytes) {
    for (size_t i = 0; i < bytes; i++) sum = (sum ^ ((const unsigned char *)data)[i]) * 0x100000001B3u;
    return sum ^ sum >> 29;
}

enum { LONGEST = 3000 };  // of a text that is shown; all of it is compared
static void ranks_same(const char *what, const char *text) {
    static char of_first[LONGEST + 64], own[LONGEST + 64];
    double agreed = 0;
    snprintf(own, sizeof own, "%016" PRIx64 "%s: %.*s", mixed(1, text, strlen(text)), what, LONGEST, text);
    memcpy(of_first, own, sizeof own);
    ranks_broadcast(of_first, sizeof of_first);
    if (strcmp(own, of_first) != 0) die(STATUS_USAGE,
        "on %s it differs from rank 0 on %s: here %s; there %s", hosts[rank], hosts[0], own + 16, of_first + 16);
    ranks_combine(&agreed, 1);  // nobody goes on before all have compared
}

// Ends where ranks read different files, as far as their number, sizes and first words tell.
static void ranks_same_files(const glob_t *files) {
    static char text[LONGEST + 64];
    unsigned char first[1024];
    snprintf(text, sizeof text, "%zu files", (size_t)files->gl_pathc);
    ranks_same("tokens", text);
    for (size_t i = 0; i < files->gl_pathc; i++) {
        const char *path = files->gl_pathv[i];
        struct stat st;
        FILE *f = open_regular(path, "rb");
        size_t there = fread(first, 1, sizeof first, f);
        if (fstat(fileno(f), &st) != 0) die(STATUS_DATA, "cannot read %s: %s", path, strerror(errno));
        fclose(f);
        snprintf(text, sizeof text, "%.*s, %" PRId64 " bytes, header %016" PRIx64, LONGEST, path,
                 (int64_t)st.st_size, mixed(1, first, there));
        ranks_same("tokens", text);
    }
}

// The first line of a file that has a word, or ""
static const char *line_with(const char *path, const char *word) {
    static char line[512];
    FILE *f = fopen(path, "r");
    int found = 0;
    while (f && !found && fgets(line, sizeof line, f)) found = strncmp(line, word, strlen(word)) == 0;
    if (f) fclose(f);
    line[found ? strcspn(line, "\n") : 0] = 0;
    return line;
}

static uint64_t program_sum(void) {  // of the program's file, where the system shows it; or else of its compiler
    static unsigned char piece[1 << 16];
    uint64_t sum = mixed(1, __VERSION__, sizeof __VERSION__);
    FILE *f = fopen("/proc/self/exe", "rb");
    size_t n;
    while (f && (n = fread(piece, 1, sizeof piece, f)) > 0) sum = mixed(sum, piece, n);
    if (f) fclose(f);
    return sum;
}

static void compare_all(int argc, char **argv) {
    static char text[1 << 16];
    struct utsname system;
    snprintf(text, sizeof text, "%016" PRIx64, program_sum());
    ranks_same("program, checksum", text);
    text[0] = 0;
    for (int i = 1; i < argc; i++) {
        if (strcmp(argv[i], "--rank") == 0) i++;  // each rank's own
        else snprintf(text + strlen(text), sizeof text - strlen(text), "%s%s", text[0] ? " " : "", argv[i]);
    }
    ranks_same("flags", text);
    const char *processor = line_with("/proc/cpuinfo", "model name");
    if (!processor[0]) processor = line_with("/proc/cpuinfo", "CPU part");  // on ARM
    uname(&system);
    snprintf(text, sizeof text, "%s %s", system.machine, processor + strcspn(processor, ":"));
    ranks_same("processor", text);
#ifdef _CS_GNU_LIBC_VERSION
    confstr(_CS_GNU_LIBC_VERSION, text, sizeof text);  // its pow, log and cos are in the numbers, too
    ranks_same("C library", text);
#endif
#ifdef _OPENMP
    if (ranks > 1) printf("%d ranks, %d of them in this machine, %d threads each\n",
                          ranks, ranks_here, omp_get_max_threads());
#endif
}

// ---- cores: those that a rank may use are shared among the ranks that may use them as well

#ifdef _OPENMP
static void choose_threads(int sharing) {
    int cores = omp_get_num_procs();
    if (!getenv("OMP_NUM_THREADS")) omp_set_num_threads(cores > sharing ? cores / sharing : 1);
}
#ifdef __linux__
static int overlapping(const cpu_set_t *own, const cpu_set_t *of, int count) {
    cpu_set_t both;
    int sharing = 0;
    for (int r = 0; r < count; r++) {
        CPU_AND(&both, own, &of[r]);
        sharing += CPU_COUNT(&both) > 0;
    }
    return sharing;
}
#endif
#endif
