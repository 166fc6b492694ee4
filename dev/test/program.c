/*
program.c: what must hold of the program, checked on a machine without network or Python.

What is claimed, in this order:

- batches cover the tokens; checkpoints are complete pairs; a container's limit is respected;
- text becomes GPT-2's tokens and comes back, and a terminal is shown nothing that it would obey;
- training gives the same bytes for any policy and number of threads, and files come back as they were;
- text, logits and losses of the programs that use a model are those of its network;
- a conversion and back is the same file, and a teacher is not forgotten;
- bad input, numbers that blow up, a full disk or a folder that vanishes end with one line and a status;
- a run that dies at any moment, half-way through a file operation, is resumed and ends with the same bytes.

The file includes the trainer and, around it, these programs; with -DTWIN the CUDA twin. It wraps the file
operations and runs itself as the trainer (--trainer N flags...) where a process has to die: the N-th file
operation then kills it half-way, or interrupts it if N is negative; above FULL, the disk is full from
operation N - FULL on. As --sampler flags... it is the program that generates text, as --evaluator the one
that evaluates.

The table at the end says what is run. An argument is the name of a test, which is run after those whose files
it uses; or one of these words: "short" stops before bad input and dying, "brief" lets the trainer die at few
moments only.
*/
#include "check.h"
#include <sys/file.h>
#include <sys/resource.h>
#include <sys/stat.h>

// ---- file operations that fail

enum { FULL = 1000 };
static int file_operations, die_at_operation;  // 0: never

static int time_to_die(void) {
    file_operations++;
    if (die_at_operation < 0 && file_operations == -die_at_operation) raise(SIGINT);
    if (die_at_operation > FULL) return file_operations >= die_at_operation - FULL;
    return file_operations == die_at_operation;
}
static int end_or_fail(int error) {
    if (die_at_operation <= FULL) raise(SIGKILL);
    errno = error;
    return -1;
}
static size_t fatal_fwrite(const void *data, size_t size, size_t count, FILE *f) {
    if (!time_to_die()) return fwrite(data, size, count, f);
    (void)!fwrite(data, size, count / 2, f);
    fflush(f);
    end_or_fail(ENOSPC);
    return count / 2;
}
// The environment says with which error a file system refuses to sync a directory, or to lock one.
static int refused(const char *name) {
    const char *error = getenv(name);
    if (error) errno = atoi(error);
    return error != NULL;
}
static int fatal_fsync(int fd) {
    struct stat st;
    if (getenv("NO_SYNC") && fstat(fd, &st) == 0 && S_ISDIR(st.st_mode) && refused("NO_SYNC")) return -1;
    return time_to_die() ? end_or_fail(EIO) : fsync(fd);
}
static int refusing_flock(int fd, int operation) { return refused("NO_LOCK") ? -1 : flock(fd, operation); }
static int fatal_rename(const char *from, const char *to) {
    return time_to_die() ? end_or_fail(EROFS) : rename(from, to);
}

#define fwrite fatal_fwrite
// The environment says at which read of tokens a signal comes, or from which on a terminal closes.
static int interrupting_fseeko(FILE *f, off_t at, int whence) {
    static int reads;
    const char *when = getenv("INTERRUPT_AT_READ"), *closing = getenv("CLOSE_AT_READ");
    reads++;
    if (when && reads == atoi(when)) raise(SIGINT);
    if (closing && reads >= atoi(closing)) raise(SIGHUP);
    return fseeko(f, at, whence);
}

#define fsync fatal_fsync
#define fseeko interrupting_fseeko
#define flock refusing_flock
#define rename fatal_rename
#define REV_GPT2_PROFILE "dev/bench/profile.h"  // for --profile
#define REV_GPT2_CHOICES "dev/eval/choices.h"
#define SAMPLE_NO_MAIN
#include "../sample/sample.c"
#define EVAL_NO_MAIN
#include "../eval/eval.c"

static int brief;  // few of the moments to die at, for programs that take long to begin or to run
// How far apart the moments are at which a test lets the trainer die, or interrupts it. When brief, there are
// still two of the 31 file operations and more: the later one leaves a checkpoint to resume from.
static int apart(int when_brief) {
    if (!brief) return twin ? 3 : 1;
    return twin ? when_brief * 3 / 2 : when_brief;
}

// ---- running the programs

// Networks for most tests
#define SMALL "-e d6 --layers 2 --channels 16 --heads 2 --context 16 "
#define TINY SMALL "-b 2 -t 16 -x 6 -n 2 -v 3 -m 2 "

// Is what was printed one line, with this word? Of the twin's lines the trainer's are counted: a card's
// driver may have any to say, and the trainer one of its own where the library has no way to multiply.
static int one_line(const char *word) {
    static const char ours[] = "_rev_gpt2: ", library[] = "train_rev_gpt2: cuBLASLt has no way";
    int lines = 0, found = 0;
    for (char *line = output, *end; (end = strchr(line, '\n')) != NULL; line = end + 1) {
        char *at = strstr(line, word);
        int from_us = strncmp(line + strcspn(line, "_"), ours, strlen(ours)) == 0;
        if (twin && (!from_us || strncmp(line, library, strlen(library)) == 0)) continue;
        lines++;
        found |= at && at < end;
    }
    return lines == 1 && found;
}

// Runs this program as another, argv[1 .. argc - 1], with the flags; its stdout is left in the file `stdout`,
// its stderr in `output`. A flag's value is one word; in that of --prompt _ stands for a space.
static int run_as(char **argv, int argc, int milliseconds, const char *format, va_list args) {
    char flags[2048];
    vsnprintf(flags, sizeof flags, format, args);
    for (char *word = strtok(flags, " "); word && argc < 63; word = strtok(NULL, " ")) {
        argv[argc++] = word;
        for (char *c = word; strcmp(argv[argc - 2], "--prompt") == 0 && *c; c++) *c = *c == '_' ? ' ' : *c;
    }
    return run_itself(argv, milliseconds, "stdout");
}

// The trainer, which dies at a file operation as --trainer has it, or is killed after milliseconds; 0:
// neither
__attribute__((format(printf, 3, 4)))
static int dying_trainer(int operation, int milliseconds, const char *format, ...) {
    char number[16], *argv[64] = {self, (char *)"--trainer", number};
    va_list args;
    va_start(args, format);
    snprintf(number, sizeof number, "%d", operation);
    int status = run_as(argv, 3, milliseconds, format, args);
    va_end(args);
    return status;
}
__attribute__((format(printf, 1, 2))) static int trainer(const char *format, ...) {
    char *argv[64] = {self, (char *)"--trainer", (char *)"0"};
    va_list args;
    va_start(args, format);
    int status = run_as(argv, 3, 0, format, args);
    va_end(args);
    return status;
}
__attribute__((format(printf, 1, 2))) static int sampler(const char *format, ...) {
    char *argv[64] = {self, (char *)"--sampler"};
    va_list args;
    va_start(args, format);
    int status = run_as(argv, 2, 0, format, args);
    va_end(args);
    return status;
}
__attribute__((format(printf, 1, 2))) static int evaluator(const char *format, ...) {
    char *argv[64] = {self, (char *)"--evaluator"};
    va_list args;
    va_start(args, format);
    int status = run_as(argv, 2, 0, format, args);
    va_end(args);
    return status;
}

static void check_ok(int status) { check(status == STATUS_OK, "status %d: %s", status, output); }

__attribute__((format(printf, 1, 2))) static void shell(const char *format, ...) {
    char command[2 * PATH];
    va_list args;
    va_start(args, format);
    vsnprintf(command, sizeof command, format, args);
    va_end(args);
    check(system(command) == 0, "%s", command);
}

// ---- files

static void write_tokens(const char *name, int count, int V, int header_count) {
    int32_t header[256] = {20240520, 1, header_count, V};
    FILE *f = fopen(name, "wb");
    (fwrite)(header, sizeof header, 1, f);
    for (int i = 0; i < count; i++) {
        uint16_t token = (uint16_t)(random_bits(8, 8, (uint64_t)i) % 16 + (uint64_t)(i % 7));
        (fwrite)(&token, sizeof token, 1, f);
    }
    fclose(f);
}

// A tokenizer of V tokens: the bytes, then these, then as many more as are needed; `end` is the end of text.
static const char *const joined[] = {" t", "he", " the", "in", "re", "on", " a", "at", "st", "\n\n", "'s",
                                     "  "};
static void write_tokenizer(const char *name, int V, int end, int header_V) {
    char text[32];
    int32_t header[256] = {20240328, 2, header_V, end};
    FILE *f = fopen(name, "wb");
    (fwrite)(header, sizeof header, 1, f);
    for (int i = 0; i < V; i++) {
        if (i < 268) snprintf(text, sizeof text, "%s", i < 256 ? "" : joined[i - 256]);
        else snprintf(text, sizeof text, "<%d>", i);
        if (i < 256) text[0] = (char)i;
        size_t length = i < 256 ? 1 : strlen(text);
        fputc((int)length, f);
        (fwrite)(text, 1, length, f);
    }
    fclose(f);
}

// The bytes of a file in memory of its own, ended by a 0, and how many they are; NULL and 0 if there is none
static size_t read_file(const char *name, char **data) {
    struct stat st;
    *data = NULL;
    FILE *f = fopen(name, "rb");
    if (!f || fstat(fileno(f), &st) != 0) return 0;
    *data = (char *)malloc((size_t)st.st_size + 1);
    size_t n = fread(*data, 1, (size_t)st.st_size, f);
    (*data)[n] = 0;
    fclose(f);
    return n;
}

static int same_files(const char *a, const char *b) {
    char *x, *y;
    size_t n = read_file(a, &x), k = read_file(b, &y);
    int same = n > 0 && n == k && memcmp(x, y, n) == 0;
    free(x), free(y);
    return same;
}

// The columns of log.csv that do not measure time or memory are the same.
static int same_logs(const char *a, const char *b) {
    char *x, *y, *p, *q;
    size_t n = read_file(a, &x), k = read_file(b, &y);
    int same = n > 0 && k > 0;
    for (p = x, q = y; same && *p && *q; p = strchr(p, '\n') + 1, q = strchr(q, '\n') + 1) {
        char *end = p;
        for (int comma = 0; comma < 5 && *end && *end != '\n'; end++) comma += *end == ',';
        same = strncmp(p, q, (size_t)(end - p)) == 0;
    }
    same = same && *p == *q;
    free(x), free(y);
    return same;
}

// Changes a bit of the byte at a place, or cuts the file there.
static void damage(const char *name, long at, int truncate_there) {
    char c = 0;
    if (truncate_there) {
        check(truncate(name, at) == 0, "cannot cut %s", name);
        return;
    }
    int fd = open(name, O_RDWR);
    check(pread(fd, &c, 1, at) == 1, "cannot read %s", name);
    c ^= 0x10;
    check(pwrite(fd, &c, 1, at) == 1, "cannot write %s", name);
    close(fd);
}

// ---- what is read: batches, checkpoints, limits

// Batches in order cover every shard once.
static void check_order(Data *d, Model *m) {
    const int shards[2] = {(int)(d->shards[0].count - 1) / 16, (int)(d->shards[1].count - 1) / 16};
    const int all = shards[0] + shards[1];
    check(sequences_of(d, 16, 0) == all, "%d sequences", (int)sequences_of(d, 16, 0));
    for (int first = 0; first <= all; first++) {
        int in[32], out[32], same = 1;
        data_batch(d, m, (uint64_t)first, 0, 0);
        to_host(in, m->inputs, sizeof in), to_host(out, m->targets, sizeof out);
        for (int b = 0; b < 2; b++) {
            int number = (first + b) % all, second = number >= shards[0];
            unsigned char raw[34];
            int64_t at = 1024 + 2 * 16 * (number - (second ? shards[0] : 0));
            same &= pread(fileno(shard_file(d, &d->shards[second])), raw, sizeof raw, at) == sizeof raw;
            for (int t = 0; t < 16; t++) same &= in[16*b + t] == raw[2*t] && out[16*b + t] == raw[2*t + 2];
        }
        check(same, "the batch from sequence %d on is not those tokens", first);
    }
}
static void check_shuffle(Data *d, Model *m) {
    int different = 0, shifted = 1, first_token = -1;
    for (uint64_t i = 0; i < 200; i++) {
        int in[32], out[32];
        data_batch(d, m, i, 1, 42);
        to_host(in, m->inputs, sizeof in), to_host(out, m->targets, sizeof out);
        shifted &= memcmp(in + 1, out, 15 * sizeof(int)) == 0;
        shifted &= memcmp(in + 17, out + 16, 15 * sizeof(int)) == 0;
        different += first_token >= 0 && in[0] != first_token;
        first_token = in[0];
    }
    check(shifted, "targets of a random batch are not its inputs moved by one");
    check(different > 100, "random batches are not random");
}

static void test_batches(void) {
    Model m;
    Data d;
    memset(&m, 0, sizeof m);
    m.net.L = 1, m.net.C = 8, m.net.NH = 1, m.net.V = 32, m.net.Vp = 128, m.net.maxT = 16, m.net.grid = 20;
    set_mode(&m.net, MIDPOINT);
    m.B = 2, m.T = 16, m.chunk = 2, m.head_chunk = 32, m.memory = REVERSE;
    plan(&m), model_alloc(&m);
    data_open(&d, "train*.bin");
    check(d.files.gl_pathc == 2 && d.V == 32, "%d shards with vocabulary %d", (int)d.files.gl_pathc, d.V);
    check_order(&d, &m);
    check_shuffle(&d, &m);
    model_free(&m);
    data_close(&d);
}

// What a folder holds are complete pairs; names that only begin like one are none, wherever they are read.
static void test_checkpoints(void) {
    shell("mkdir names; cd names; touch model_00000003.bin state_00000003.bin model_00000004.bin "
          "state_00000007.bin state_00000009.bin model_00000007.xyz model_00000009.bak model_0000000.bin "
          "model_00000005.bin.tmp");
    Checkpoints c = find_checkpoints("names");
    check(c.count == 1 && c.first == 3 && c.last == 3 && c.models == 2 && c.half == 9,
          "%d pairs from %d to %d, %d models, half a pair %d", c.count, c.first, c.last, c.models, c.half);
}

#ifndef TWIN
// The least limit of the control groups above the process counts.
static void test_container(void) {
    shell("mkdir -p mount/a/b/c; echo max > mount/a/b/memory.max; echo 5000000 > mount/a/memory.max; "
          "echo 6000000 > mount/memory.max");
    shell("printf '1:name=systemd:/\\n0::/a/b/c\\n' > groups");
    size_t limit = container_limit("groups", "mount");
    check(limit == 5000000, "a group above: %zu", limit);
    shell("printf '0::/\\nx\\n' > groups");
    limit = container_limit("groups", "mount");
    check(limit == 6000000, "the root: %zu", limit);
    shell("printf '2:memory:/a\\n' > groups");
    check(container_limit("groups", "mount") == SIZE_MAX && container_limit("/nowhere", "mount") == SIZE_MAX,
          "no limit");
}
#endif

// ---- text

// Lower tokens are joined first: " the" = " t" + "he", though "in" and "he" meet as well. No word crosses
// a space.
static void test_encoding(void) {
    static const struct { const char *text; int count, tokens[12]; } codes[] = {
        {" the", 1, {258}},
        {"the the", 3, {'t', 257, 258}},
        {" thin", 3, {256, 'h', 259}},
        {"it's", 3, {'i', 't', 266}},
        {"x  the", 3, {'x', ' ', 258}},
        {"a  ", 2, {'a', 267}},
        {"a\n\n", 2, {'a', 265}},
        {"a\n\nb", 4, {'a', '\n', '\n', 'b'}},
        {"\xC3\xA9", 2, {0xC3, 0xA9}},
        {"<|endoftext|>", 1, {299}},
        {"a <|endoftext|><|endoftext|> the", 5, {'a', ' ', 299, 299, 258}},
        {"", 0, {0}}};
    write_tokenizer("tokenizer300.bin", 300, 299, 300);
    Tokenizer z = tokenizer_open("tokenizer300.bin", 300), bytes = tokenizer_open(NULL, 256);
    check(z.eot == 299 && bytes.eot == -1, "ends of text");
    Index x = index_open(&z);
    for (size_t i = 0; i < sizeof codes / sizeof codes[0]; i++) {
        int tokens[16], count = encode(&x, codes[i].text, 1, tokens);
        size_t size = sizeof(int) * (size_t)count;
        check(count == codes[i].count && memcmp(tokens, codes[i].tokens, size) == 0,
              "\"%s\" becomes %d tokens, the first %d", codes[i].text, count, tokens[0]);
    }
    for (uint64_t i = 0; i < 300; i++) {  // any bytes come back, whether UTF-8 or not
        char text[40] = "", back[40] = "";
        int tokens[40], n = (int)(random_bits(1, 1, i) % 39), at = 0;
        uint64_t range = i < 150 ? 255 : 127;
        for (int j = 0; j < n; j++) text[j] = (char)(1 + random_bits(1, i + 2, (uint64_t)j) % range);
        int count = encode(&x, text, 0, tokens);
        for (int j = 0; j < count; j++) {
            size_t length = (size_t)token_length(&z, tokens[j]);
            memcpy(back + at, z.texts[tokens[j]] + 1, length);
            at += (int)length;
        }
        check(at == n && memcmp(text, back, 40) == 0, "a text of %d bytes comes back as %d", n, at);
    }
    static char spaces[20002];
    static int of_spaces[20001];
    memset(spaces, ' ', 20001);
    int count = encode(&x, spaces, 0, of_spaces), pairs = 0;
    for (int i = 0; i < count; i++) pairs += of_spaces[i] == 267;
    check(count == 10001 && pairs == 10000, "20,001 spaces are %d tokens, %d pairs", count, pairs);
    check(encode(&x, "<|endoftext|>", 0, of_spaces) == 13, "an end of text that is meant as text");
    free(x.slots), free(z.texts), free(bytes.texts);
}

// Where the first word of a text ends
static void test_words(void) {
    static const struct { const char *text; int length; } cuts[] = {
        {"hello world", 5}, {" world!", 6}, {"123abc", 3}, {" 12", 3}, {"...a", 3}, {"'llama", 3},
        {"'tis", 2}, {" 's", 2}, {"   a", 2}, {"\t\ta", 1}, {"\xC3\xA9t\xC3\xA9 ", 5}, {"\xE2\x80\x94x", 3},
        {"\xC2\xBD\x31z", 3}, {"\xE3\x80\x80x", 3}, {"\xF0\x9F\x8E\x89x", 4}, {"\xFF", 1}};
    for (size_t i = 0; i < sizeof cuts / sizeof cuts[0]; i++) {
        int length = word_length((const unsigned char *)cuts[i].text);
        check(length == cuts[i].length, "the first word of \"%s\" has %d bytes", cuts[i].text, length);
    }
}

#define UNICODE "a\xC3\xA9\xE2\x82\xAC\xF0\x9F\x8E\x89\n\tb"  // of one to four bytes
typedef struct { const char *bytes, *shown; } Display;

// What reaches the terminal is UTF-8 without control characters; what is no UTF-8 is shown as U+FFFD, here ?.
static void test_terminal(void) {
    static const Display displays[] = {
        {UNICODE, UNICODE}, {"\x1B[31mx\x07\r\x7F", "[31mx"}, {"\xE2\x82", "?"}, {"\xE2\x82z", "?z"},
        {"\xE2\x82\xC3\xA9", "?\xC3\xA9"}, {"\x80", "?"}, {"\xC0\xAF", "??"}, {"\xED\xA0\x80", "?"},
        {"\xC2\x9B", "?"}, {"\xF4\x90\x80\x80", "?"}, {"\xE0\x80\x80", "?"}, {"\xFF\xFE", "??"}};
    for (size_t i = 0; i < sizeof displays / sizeof displays[0]; i++) {
        Character u = {{0}, 0, 0};
        char expected[64] = "";
        capture();
        for (const char *c = displays[i].bytes; *c; c++) print_byte(&u, (unsigned char)*c);
        print_byte(&u, -1);
        char *text = captured();
        for (const char *c = displays[i].shown; *c; c++) {
            if (*c == '?') strcat(expected, "\xEF\xBF\xBD");
            else strncat(expected, c, 1);
        }
        check(strcmp(text, expected) == 0, "text %d is shown as %s", (int)i, text);
        free(text);
    }
}

// Samples in training are only without control characters, be they of two bytes, also in two tokens.
static void test_sampled_text(void) {
    static const Display displays[] = {
        {UNICODE, UNICODE}, {"\x1B[31mx\x07\r\x7F", "[31mx"}, {"\xC2\x9B", "\xC2"},
        {"\xC2\x9B\x9B", "\xC2"}, {"\xC2\x1B\x80z", "\xC2z"}, {"\xC2\xA0\xC2", "\xC2\xA0\xC2"},
        {"\x9Bz", "z"}, {"\xC3\x9B", "\xC3\x9B"}};
    Tokenizer bytes = tokenizer_open(NULL, 256);
    for (size_t i = 0; i < sizeof displays / sizeof displays[0]; i++) {
        capture();
        for (const char *c = displays[i].bytes; *c; c++) print_token(&bytes, (unsigned char)*c);
        char *text = captured();
        check(strcmp(text, displays[i].shown) == 0, "text %d is sampled as %s", (int)i, text);
        free(text);
    }
    free(bytes.texts);
}

// ---- training

// The final model is the same bytes for every policy and number of threads.
static void test_deterministic(void) {
    static const struct { const char *threads, *memory, *model; } runs[] = {
        {"1", "store", "run0/model_00000006.bin"},
        {"2", "checkpoint", "run1/model_00000006.bin"},
        {"3", "reverse", "run2/model_00000006.bin"}};
    for (int i = 0; i < 3; i++) {
        setenv("OMP_NUM_THREADS", runs[i].threads, 1);
        check_ok(trainer("-i train0.bin " TINY "--mode midpoint --memory %s -o run%d", runs[i].memory, i));
        check(same_files(runs[0].model, runs[i].model), "%s with %s threads trains another model",
              runs[i].memory, runs[i].threads);
    }
    unsetenv("OMP_NUM_THREADS");
}

// What is printed about the time changes nothing, and adds up.
static void test_profile(void) {
    char *printed;
    double share, shares = 0;
    int status = trainer("-i train0.bin " TINY "--mode midpoint --profile -o profile");
    check(status == 0 && same_files("run0/model_00000006.bin", "profile/model_00000006.bin"),
          "--profile trains another model");
    read_file("stdout", &printed);
    char *line = strstr(printed, "\nlayer function");
    if (line) line++;
    while (line && (line = strchr(line + 1, '\n')) != NULL && sscanf(line, "%*s %*d %*f %lf%%", &share) == 1)
        shares += share;
    check(fabs(shares - 100) < 2 && strstr(printed, "matmul_backward") && !strstr(printed, " inf"),
          "the shares of --profile are %g %%: %s", shares, printed);
    free(printed);
}

// Products in bf16 train another model, and the same one whatever the policy.
static void test_precision(void) {
    int has_bf16 = layers_bf16(1), both = layers_bf16(0) && has_bf16;
    int status = trainer("-i train0.bin " TINY "--mode midpoint --precision bf16 -o bf16");
    check(status == 0 && same_files("run0/model_00000006.bin", "bf16/model_00000006.bin") == !both,
          "--precision bf16 trains the model of float32");
    check(has_bf16 || strstr(output, "no products in bf16"), "without bf16: %s", output);
    status = trainer("-i train0.bin " TINY "--mode midpoint --precision bf16 --memory store -o bf16store");
    check(status == 0 && same_files("bf16/model_00000006.bin", "bf16store/model_00000006.bin"),
          "in bf16 store trains another model");
}

// A model file that is loaded and saved again is the same file, in bf16 too; a baseline has llm.c's layout.
static void test_model_files(void) {
    char *x;
    static const int32_t expected[] = {20240326, 3, 16, 32, 2, 2, 16, 128, 0, 0, 0};
    const size_t size = 1024 + 4 * (128*16 + 16*16 + 2 * (12*16*16 + 13*16) + 2*16);
    int status = trainer("-i train0.bin -b 2 -e run0/model_00000006.bin -x 0 -o again");
    check(status == 0 && same_files("run0/model_00000006.bin", "again/model_00000000.bin"),
          "loading and saving changed a model: %s", output);
    check_ok(trainer("-i train0.bin " SMALL "-b 2 --mode baseline -x 0 -o base"));
    check(trainer("-i train0.bin -b 2 -e run0/model_00000006.bin -x 0 --save bf16 -o half") == 0 &&
          trainer("-i train0.bin -b 2 -e half/model_00000000.bin -x 0 --save bf16 -o half2") == 0 &&
          same_files("half/model_00000000.bin", "half2/model_00000000.bin"),
          "a bf16 model is not what was saved: %s", output);
    size_t bytes = read_file("base/model_00000000.bin", &x);
    check(bytes == size && memcmp(x, expected, sizeof expected) == 0, "a baseline is not in llm.c's format");
    free(x);
}

// A .txt is read as bytes.
static void test_bytes(void) {
    shell("head -c 3000 run0/model_00000006.bin > bytes.txt");
    check_ok(trainer("-i bytes.txt -e d6 --layers 1 --channels 8 --heads 2 --context 16 -x 2 -s 1 -g 9"));
    check_ok(trainer("-i bytes.txt -e d6 --layers 2 --channels 8 --heads 2 --context 32 -x 2 -o bytes"));
}

// ---- the use of a model: its text, its loss, its logits

#define BYTES "-e bytes/model_00000002.bin "
#define TRAINED "-e run0/model_00000006.bin "

// The text is the same for any number of threads, another for another seed, and ends where the context does.
static void test_sample(void) {
    char *x;
    for (int threads = 1; threads <= 3; threads++) {
        char n[2] = {(char)('0' + threads), 0};
        setenv("OMP_NUM_THREADS", n, 1);
        int status = sampler(BYTES "--prompt ab_cd -g 20 --top-k 9 --temperature 0.8");
        check(status == 0 && strstr(output, "20 tokens after 5 in"), "%s", output);
        shell("cp stdout text%d", threads);
    }
    unsetenv("OMP_NUM_THREADS");
    size_t n = read_file("text1", &x);
    check(n >= 6 && strncmp(x, "ab cd", 5) == 0 && same_files("text1", "text2") &&
          same_files("text1", "text3"),
          "the text depends on threads: %s", x);
    free(x);
    int status = sampler(BYTES "--prompt ab_cd -g 20 --top-k 9 --temperature 0.8 --seed 5");
    check(status == 0 && !same_files("text1", "stdout"), "another seed, the same text");
    status = sampler(BYTES "--prompt abc -g 500");
    check(status == 0 && strstr(output, "30 tokens after 3 in"), "the context is 32: %s", output);
    check(strstr(output, "the context of 32 ends here") != NULL, "it does not say why it ends: %s", output);
    check_ok(trainer("-i bytes.txt -b 1 -x 0 -s 1 -g 500 " BYTES));  // long samples in training
}

// The loss of an evaluation is the one of the log.
// All of a text: the figures do not depend on how many sequences a batch has.
static void test_evaluate_all(void) {
    static const char *const files[] = {"val.bin", "train*.bin"};
    for (int i = 0; i < 2; i++) {
        check_ok(evaluator(TRAINED "-j %s -b 1 -t 16 -m 0", files[i]));
        shell("cp stdout all");
        for (int B = 3; B <= 19; B += 8) {
            check_ok(evaluator(TRAINED "-j %s -b %d -t 16 -m 0", files[i], B));
            check(same_files("stdout", "all"), "another evaluation of %s for -b %d", files[i], B);
        }
    }
}

// ---- multiple choice

// A file of questions about tokens below 32. Completions of every third have one token, and so share a row.
enum { QUESTIONS = 30 };
static int token_at(uint64_t question, uint64_t draw) { return (int)(random_bits(9, question, draw) % 32); }
static void write_choices(const char *name, int version) {
    int32_t header[256] = {20240522, version, QUESTIONS, 0, version == 2 ? 32 : 0};
    FILE *f = fopen(name, "wb");
    (fwrite)(header, sizeof header, 1, f);
    for (uint64_t q = 0, draw = 0; q < QUESTIONS; q++) {
        const int completions = 2 + (int)(q % 3), context = 1 + (int)(random_bits(9, q, draw++) % 19);
        int words[512] = {65535, 0, 0, (int)q % completions, completions, context}, n = version == 1 ? 6 : 5;
        uint16_t written[512];
        for (int i = 0; i < context && version == 1; i++) words[n++] = token_at(q, 100 + (uint64_t)i);
        for (int c = 0; c < completions; c++) {
            const int ending = q % 3 ? 1 + (int)(random_bits(9, q, draw++) % 5) : 1;
            words[n++] = version == 1 ? ending : context + ending;
            if (version == 2) words[n++] = context;
            if (version == 2) words[n++] = 3 * ending;
            for (int i = 0; i < context && version == 2; i++) words[n++] = token_at(q, 100 + (uint64_t)i);
            for (int i = 0; i < ending; i++) words[n++] = token_at(q, draw++);
        }
        words[1] = version == 1 ? 2 * n : n;
        for (int i = 0; i < n; i++) written[i] = (uint16_t)words[i];
        (fwrite)(written, 2, (size_t)n, f);
    }
    fclose(f);
}

// The sum of the log-likelihoods of a completion's tokens, from the logits of a pass over it alone
static double alone(Model *m, const Completion *x) {
    int tokens[64];
    double sum = 0;
    Model g = *m;
    g.B = 1, g.T = x->inputs, g.chunk = 1;
    for (int i = 0; i < x->inputs; i++) tokens[i] = token_of(x, i);
    to_device(m->inputs, tokens, (size_t)x->inputs * sizeof(int));
    forward(&g);
    for (int i = 0; i < x->ending; i++) {
        static float logits[65536];
        double all = 0;
        head_logits(&g, x->context - 1 + i, 1);
        host_logits(&g, 0, logits);
        for (int v = 0; v < g.net.V; v++) all += exp((double)logits[v]);
        sum += (double)logits[x->after[i]] - log(all);
    }
    return sum;
}

// In training p_{-1} may have no plane of its own.
static void check_choices(int training) {
    Model m;
    memset(&m, 0, sizeof m);
    m.net = load_model("run0/model_00000006.bin", NULL);
    m.B = 4, m.T = 16, m.chunk = 2, m.head_chunk = 32, m.memory = STORE, m.training = training;
    plan(&m), model_alloc(&m), load_model("run0/model_00000006.bin", &m);
    check((m.planes[0] == m.planes[1]) == training, "planes of a model to answer questions");
    for (int version = 1; version <= 2; version++) {
        Choices c;
        double most = 0;
        choices_open(&c, version == 1 ? "one.bin" : "two.bin");
        if (version == 1) c.V = 32;  // llm.c's are of GPT-2's tokens
        choices_fit(&c, &m);
        choices_score(&m, &c, 0);
        for (int i = 0; i < c.count; i++) most = larger(most, fabs(c.all[i].score[0] - alone(&m, &c.all[i])));
        check(most < (rounding > 0 ? 0.2 : 1e-5), "version %d: scores are off by %g", version, most);
        Accuracy a = {0, 0, 0, 0, 0, 0, 0};
        add_accuracy(&a, &c);
        int right = 0;
        for (int q = 0; q < c.questions; q++) {
            int best = c.first[q];
            for (int i = best; i < c.first[q + 1]; i++)
                if (c.all[i].score[0] > c.all[best].score[0]) best = i;
            right += best - c.first[q] == c.labels[q];
        }
        check(a.questions == QUESTIONS && a.right == right, "%g are right, not %d", a.right, right);
        choices_close(&c);
    }
    model_free(&m);
}
static void test_choices(void) {
    write_choices("one.bin", 1), write_choices("two.bin", 2);
    check_choices(0);
    check_choices(1);
}

// Neither batches nor threads change a score; a training is the same with choices and without.
static void test_choices_programs(void) {
    int status = evaluator("-e base/model_00000000.bin --mode bdia --choices two.bin -t 16");
    check(status == 0 && strstr(output, "no text was read"), "a conversion's grid without a text: %s", output);
    check_ok(evaluator(TRAINED "--choices two.bin -b 4 -t 16 --csv scores"));
    static const char *const others[] = {"-b 1", "-b 7 --chunk 2 --head-chunk 5"};
    for (int i = 0; i < 2; i++) {
        check_ok(evaluator(TRAINED "--choices two.bin -t 16 --csv other%d %s", i, others[i]));
        char other[16];
        snprintf(other, sizeof other, "other%d", i);
        // a card rounds by the shape of a batch
        check(twin || same_files("scores", other), "other scores for %s", others[i]);
    }
    check(evaluator(TRAINED "--choices two.bin --csv scores -t 16") == STATUS_OK, "%s", output);
    static const struct { const char *flags, *says; } refused[] = {
        {"--choices val.bin -t 16", "not a file of choices"}, {"--choices one.bin -t 16", "vocabulary"},
        {"--choices two.bin -t 3", "has a completion of"},
        {"--choices cut.bin -t 16", "ends within question"}};
    shell("head -c 1500 two.bin > cut.bin");
    for (size_t i = 0; i < sizeof refused / sizeof refused[0]; i++) {
        int status = evaluator(TRAINED "%s", refused[i].flags);
        check(status == STATUS_DATA && one_line(refused[i].says), "%s: %s", refused[i].flags, output);
    }
    check_ok(trainer("-i train0.bin " TINY "-o quiet"));
    check_ok(trainer("-i train0.bin " TINY "--choices two.bin -o asked"));
    check(same_files("quiet/model_00000006.bin", "asked/model_00000006.bin") &&
          same_files("quiet/state_00000006.bin", "asked/state_00000006.bin"), "questions changed a training");
    shell("grep -c choices_acc, asked/log.csv > rows");
    char *x;
    read_file("rows", &x);
    check(x && atoi(x) == 3, "%s rows of choices, not those of steps 0, 3 and 6", x);
    free(x);
}

// ---- what file systems and machines cannot do

// One that cannot sync a directory, or lock one, still holds a run; a disk that fails does not.
static void test_file_systems(void) {
    static const int no_sync[] = {EINVAL, ENOSYS, EOPNOTSUPP, EROFS, EIO};
    static const int no_locks[] = {ENOSYS, EOPNOTSUPP, ENOLCK};
    char error[16];
    for (int i = 0; i < 5; i++) {
        snprintf(error, sizeof error, "%d", no_sync[i]);
        setenv("NO_SYNC", error, 1);
        int status = trainer("-i train0.bin " TINY "-o sync%d", i);
        if (i < 4) check_ok(status);
        else check(status == STATUS_DATA && one_line("cannot write"), "a faulty disk: %s", output);
    }
    unsetenv("NO_SYNC");
    for (int i = 0; i < 3; i++) {
        snprintf(error, sizeof error, "%d", no_locks[i]);
        setenv("NO_LOCK", error, 1);
        int status = trainer("-i train0.bin " TINY "-o lock%d", i);
        check(status == STATUS_OK && one_line("has no locks"), "no locks: %d, %s", status, output);
    }
    snprintf(error, sizeof error, "%d", EWOULDBLOCK);
    setenv("NO_LOCK", error, 1);
    int status = trainer("-i train0.bin " TINY "-o lock3");
    check(status == STATUS_DATA && one_line("in use by another run"), "a lock: %d, %s", status, output);
    unsetenv("NO_LOCK");
}

// More files of tokens than a process may open
static void test_many_shards(void) {
    struct rlimit all, few;
    if (twin) return;  // a card's driver opens files of its own
    shell("mkdir many; for i in $(seq 100); do cp train1.bin many/$i.bin; done");
    getrlimit(RLIMIT_NOFILE, &all);
    few = all;
    few.rlim_cur = 30;
    setrlimit(RLIMIT_NOFILE, &few);
    check_ok(trainer("-i many/*.bin -j many/*.bin -x 6 " SMALL));
    check_ok(trainer("-i many/*.bin -x 6 --shuffle " SMALL));
    setrlimit(RLIMIT_NOFILE, &all);
}

// Lanes round a step's gradient elsewhere, and no more; a run keeps them.
static void test_lanes(void) {
    static const char flags[] = "-i train0.bin -j val.bin " SMALL "-b 2 -t 16 -d 128 -x 4 -n 2 -v 2 -m 2";
    double losses[4];
    for (int lanes = 1; lanes <= 4; lanes++) {
        char *log, directory[16], path[32];
        snprintf(directory, sizeof directory, "lanes%d", lanes);
        check_ok(trainer("%s --lanes %d -o %s", flags, lanes, directory));
        snprintf(path, sizeof path, "%s/log.csv", directory);
        read_file(path, &log);
        const char *row = strstr(log, "\n4,train,");
        losses[lanes - 1] = row ? atof(row + 9) : 0;
        check(row && fabs(losses[lanes - 1] - losses[0]) < 1e-4, "%d lanes: loss %g for %g", lanes,
              losses[lanes - 1], losses[0]);
        free(log);
    }
    check_ok(trainer("%s -o lanes", flags));
    check(same_files("lanes/model_00000004.bin", "lanes4/model_00000004.bin") &&
          same_files("lanes/state_00000004.bin", "lanes4/state_00000004.bin"), "each micro-batch is no lane");
    check(!same_files("lanes1/state_00000004.bin", "lanes4/state_00000004.bin"), "lanes change nothing");
    check(trainer("%s --lanes 5 -o lanes", flags) == STATUS_USAGE && one_line("--lanes 5: a step has 4 micro-batches"),
          "too many lanes: %s", output);
    check(trainer("%s --lanes 3 -y 1 -o lanes", flags) == STATUS_USAGE && strstr(output, "--lanes 4"),
          "other lanes on resuming: %s", output);
    check(trainer("%s --ranks 2 -o lanes", flags) == STATUS_USAGE && one_line("--ranks needs --plan"), "%s", output);
    setenv("PMI_SIZE", "3", 1);
    check(trainer("%s -o lanes", flags) == STATUS_USAGE && one_line("one of 3 processes"), "mpirun: %s", output);
    unsetenv("PMI_SIZE");
    setenv("SLURM_STEP_NUM_TASKS", "2", 1);
    check(trainer("%s -o lanes", flags) == STATUS_USAGE && one_line("one of 2 processes"), "srun: %s", output);
    unsetenv("SLURM_STEP_NUM_TASKS");
}

// What a signal says is seen before the next batch.
static void test_interrupt(void) {
    Job j;
    double means[METRICS], drift;
    memset(&j, 0, sizeof j);
    j.m.net = load_model("run0/model_00000006.bin", NULL);
    j.m.B = 2, j.m.T = 16, j.m.chunk = 2, j.m.head_chunk = 32, j.m.memory = REVERSE, j.m.training = 1;
    j.run.B = 2, j.run.accumulate = 3, j.run.lanes = j.m.lanes = 1;
    plan(&j.m), model_alloc(&j.m);
    data_open(&j.data, "train*.bin");
    for (interrupted = 0; interrupted < 2; interrupted++) {
        int N = j.m.B * j.m.T;
        device_zero(j.m.losses, (size_t)N * sizeof(real_t));
        validate(&j.m, &j.data, means);
        int done = mean_of(&j.m, LOSS) > 0, complete = step_gradients(&j, &drift) > 0;
        check(done == !interrupted && complete == !interrupted, "interrupted %d: validated %d, trained %d",
              (int)interrupted, done, complete);
    }
    interrupted = 0;
    model_free(&j.m);
    data_close(&j.data);
}

// ---- documents

// Of 31s, end-of-text, and smaller tokens: one that fills a sequence of 16 with the end-of-text before it,
// one of 2.5 sequences, one token, and others
enum { DOCUMENTS = 7, SEQUENCE = 16, ENDS = 31 };
static const int document_lengths[DOCUMENTS] = {15, 39, 1, 16, 7, 30, 32};
static int document_token(int d, int i) { return (int)(random_bits(10, (uint64_t)d, (uint64_t)i) % 31); }

// A file of documents first .. end - 1, cut to so many tokens, and behind them so many sequences of nothing.
// Returns how many sequences there are.
static int write_documents(const char *name, int first, int end, int sequence, int nothing) {
    int32_t header[256] = {20240520, 1, 0, 32, sequence, ENDS};
    uint16_t tokens[1024];
    int n = 0;
    for (int d = first; d < end; d++) {
        tokens[n++] = ENDS;
        for (int i = 0; i < document_lengths[d]; i++) tokens[n++] = (uint16_t)document_token(d, i);
        while (n % sequence) tokens[n++] = ENDS;
    }
    for (int i = 0; i <= nothing * sequence; i++) tokens[n++] = ENDS;
    header[2] = n;
    FILE *f = fopen(name, "wb");
    (fwrite)(header, sizeof header, 1, f), (fwrite)(tokens, 2, (size_t)n, f);
    fclose(f);
    return (n - 1) / sequence;
}

// The piece of a document that begins at a token, unpadded, and the token after it. Returns its length,
// 0 beyond the document.
static int document_piece(int tokens[SEQUENCE + 1], int d, int at) {
    int length = document_lengths[d] + 1, n = at < length ? smaller_of(SEQUENCE, length - at) : 0;
    for (int i = 0; i <= n; i++)
        tokens[i] = (at + i) % length ? document_token(d, at + i - 1) : ENDS;
    return n;
}

// The logits of a token in double precision, less the log of the sum of their exponentials
static void log_softmax(double logits[32], Model *m, int token) {
    static float row[65536];
    double sum = 0;
    head_logits(m, token, 1);
    host_logits(m, 0, row);
    for (int v = 0; v < 32; v++) sum += exp((double)row[v]);
    for (int v = 0; v < 32; v++) logits[v] = (double)row[v] - log(sum);
}

// The means of two networks' metrics over all tokens of the documents, each piece passing alone and unpadded
static void metrics_by_hand(double means[METRICS], Model *m, Model *teacher) {
    int tokens[SEQUENCE + 1], counted = 0;
    Model *const both[2] = {m, teacher};
    memset(means, 0, METRICS * sizeof *means);
    for (int d = 0; d < DOCUMENTS; d++)
        for (int at = 0, n; (n = document_piece(tokens, d, at)) > 0; at += n) {
            for (int i = 0; i < 2; i++) {
                both[i]->T = n;
                to_device(both[i]->inputs, tokens, (size_t)n * sizeof(int));
                forward(both[i]);
            }
            for (int i = 0; i < n; i++, counted++) {
                double p[32], q[32];
                int top = 0, top_q = 0;
                log_softmax(p, m, i), log_softmax(q, teacher, i);
                means[LOSS] -= p[tokens[i + 1]], means[TEACHER_LOSS] -= q[tokens[i + 1]];
                for (int v = 0; v < 32; v++) {
                    means[DIVERGENCE] += exp(p[v]) * (p[v] - q[v]);
                    if (p[v] > p[top]) top = v;
                    if (q[v] > q[top_q]) top_q = v;
                }
                means[AGREEMENT] += top == top_q;
            }
        }
    for (int k = 0; k < METRICS; k++) means[k] /= counted;
}

// The norm of the gradient of the mean loss over all tokens, each piece passing alone and unpadded
static double norm_by_hand(Model *m) {
    int tokens[SEQUENCE + 1], counted = 0;
    double drift, sum = 0;
    size_t P = parameter_count(&m->net);
    real_t *grads = (real_t *)malloc(P * sizeof(real_t));
    for (int d = 0; d < DOCUMENTS; d++) counted += document_lengths[d] + 1;
    for (int d = 0; d < DOCUMENTS; d++)
        for (int at = 0; (m->T = document_piece(tokens, d, at)) > 0; at += m->T) {
            set_batch(m, tokens, tokens + 1);
            forward_backward(m, (double)m->T / counted, &drift);
        }
    to_host(grads, m->grads, P * sizeof(real_t));
    for (size_t i = 0; i < P; i++) sum += (double)grads[i] * grads[i];
    free(grads);
    return sqrt(sum);
}

static void open_model(Model *m, const char *path, int training) {
    memset(m, 0, sizeof *m);
    m->training = training;
    m->net = load_model(path, NULL), m->B = 1, m->T = SEQUENCE, m->chunk = 1, m->head_chunk = SEQUENCE;
    m->memory = m->net.mode == BASELINE ? STORE : REVERSE;
    plan(m), model_alloc(m), load_model(path, m);
}

// The number of a log's row so many commas behind its name; 0: the loss, 2: the gradient's norm
static double logged_in(const char *directory, const char *row, int commas) {
    char path[64], *log;
    snprintf(path, sizeof path, "%s/log.csv", directory);
    read_file(path, &log);
    const char *at = log ? strstr(log, row) : NULL;
    if (at) at += strlen(row);
    for (; at && commas > 0; commas--) at = strchr(at, ',') ? strchr(at, ',') + 1 : NULL;
    double number = at ? atof(at) : NAN;
    free(log);
    return number;
}

// Losses of files of documents are means over what counts: those of the log, of evaluations and beside a
// teacher, however the sequences are cut into batches. The gradient's norm is that of one batch as well.
static void test_documents(void) {
    static const char *const cut[] = {"-b 14", "-b 7 -d 224", "-b 2 -d 224", "-b 1 -d 224 --lanes 3"};
    static const char taught[] = "taught_by/model_00000006.bin", student[] = "student/model_00000002.bin";
    const double near = rounding > 0 ? 0.05 : 2e-5;
    double means[METRICS], shown[METRICS] = {0};
    Model m, teacher;
    int sequences = write_documents("documents.bin", 0, DOCUMENTS, SEQUENCE, 1);
    check(sequences == 14, "%d sequences", sequences);
    check_ok(trainer("-i train0.bin " TINY "--mode baseline -l 1e-2 -o taught_by"));
    check_ok(trainer("-i train1.bin -b 2 -x 2 -n 2 -l 1e-2 -e %s --mode bdia -o student", taught));
    open_model(&m, student, 1), open_model(&teacher, taught, 0);
    metrics_by_hand(means, &m, &teacher);
    const double norm = norm_by_hand(&m);
    model_free(&m), model_free(&teacher);
    for (int i = 0; i < 4; i++) {
        char directory[16];
        snprintf(directory, sizeof directory, "cut%d", i);
        check_ok(trainer("-i documents.bin -j documents.bin -e %s -x 1 -v 1 -m 0 %s -o %s", student, cut[i],
                         directory));
        double loss = logged_in(directory, "\n1,train,", 0), before = logged_in(directory, "\n0,val,", 0);
        check(fabs(loss - means[LOSS]) < near && fabs(before - means[LOSS]) < near,
              "%s: losses %.8g and %.8g, by hand %.8g", cut[i], loss, before, means[LOSS]);
        double of_step = logged_in(directory, "\n1,train,", 2);
        check(norm > 0 && fabs(of_step - norm) < near * norm, "%s: a gradient of norm %g, not %g", cut[i],
              of_step, norm);
    }
    for (int b = 1; b <= 9; b += 4) {
        char *x;
        check_ok(evaluator("-e %s --distill %s -j documents.bin -b %d -m 0", student, taught, b));
        if (b == 1) shell("cp stdout evaluated");
        check(same_files("stdout", "evaluated"), "another evaluation for -b %d", b);
        read_file("stdout", &x);
        sscanf(x, "validation loss %lf,%*[^|]| teacher %lf | KL %lf | same top token %lf",
               shown, shown + 1, shown + 2, shown + 3);
        check(fabs(shown[LOSS] - means[LOSS]) < near + 1e-4 &&
              fabs(shown[TEACHER_LOSS] - means[TEACHER_LOSS]) < near + 1e-4 &&
              fabs(shown[DIVERGENCE] - means[DIVERGENCE]) < near + 1e-3 * means[DIVERGENCE] &&
              fabs(shown[AGREEMENT] - 100 * means[AGREEMENT]) < (rounding > 0 ? 5 : 0.006),
              "by hand %g, %g, %g, %g: %s", means[0], means[1], means[2], means[3], x);
        free(x);
    }
    check_ok(trainer("-i documents.bin -e %s --distill %s -x 1 -b 7 -d 224 -o cut4", student, taught));
    double kl = logged_in("cut4", "\n1,train_kl,", 0);
    check(fabs(kl - means[DIVERGENCE]) < near + 1e-3 * means[DIVERGENCE], "KL %g, by hand %g", kl,
          means[DIVERGENCE]);
}

// A training on documents is the same bytes under every policy, with any number of threads, and resumed;
// sequences begin where documents or their pieces do, and what counts nowhere is no loss and no gradient.
static void test_documents_trained(void) {
    static const char flags[] =
        "-i documents?.bin -j documents1.bin " SMALL "-b 3 -d 144 -x 4 -n 2 -v 2 --shuffle";
    static const char *const policies[] = {"store", "checkpoint", "reverse", "auto --budget 1G"};
    write_documents("documents1.bin", 0, 4, SEQUENCE, 0);
    write_documents("documents2.bin", 4, DOCUMENTS, SEQUENCE, 0);
    for (int i = 0; i < 4; i++) {
        char model[64], state[64], threads[2] = {(char)('1' + i % 3), 0};
        setenv("OMP_NUM_THREADS", threads, 1);
        check_ok(trainer("%s --memory %s -o filled%d", flags, policies[i], i));
        snprintf(model, sizeof model, "filled%d/model_00000004.bin", i);
        snprintf(state, sizeof state, "filled%d/state_00000004.bin", i);
        check(same_files("filled0/model_00000004.bin", model) &&
              same_files("filled0/state_00000004.bin", state), "--memory %s trains otherwise", policies[i]);
    }
    unsetenv("OMP_NUM_THREADS");
    shell("cp -r filled0 filled; rm filled/*4.bin");
    check_ok(trainer("%s -o filled -y 1", flags));
    check(same_files("filled/model_00000004.bin", "filled0/model_00000004.bin") &&
          same_logs("filled/log.csv", "filled0/log.csv"), "resumed, it ends with other bytes");
    Data d;
    Model m;
    open_model(&m, "filled0/model_00000004.bin", 0);
    data_open(&d, "documents?.bin");
    int began = 1, uncounted = 0;
    for (uint64_t i = 0; i < 200; i++) {
        int in[SEQUENCE], out[SEQUENCE], counted = 0, moved = 1;
        const int told = data_batch(&d, &m, i, 1, 42);
        to_host(in, m.inputs, sizeof in), to_host(out, m.targets, sizeof out);
        for (int t = 0; t < SEQUENCE; t++) {
            int next = t + 1 < SEQUENCE ? in[t + 1] : out[t];
            counted += out[t] >= 0;
            moved &= out[t] == (in[t] == ENDS && next == ENDS ? -1 : next) || t + 1 == SEQUENCE;
        }
        check(moved && counted == told, "sequence %d: %d targets count, not %d", (int)i, counted, told);
        uncounted += SEQUENCE - counted;
        // a document's first piece, or the second or third of one
        int piece = in[0] == ENDS;
        for (int k = 0; k < DOCUMENTS; k++)
            for (int at = SEQUENCE; at <= document_lengths[k]; at += SEQUENCE)
                piece |= in[0] == document_token(k, at - 1);
        began &= piece;
    }
    check(began && uncounted > 0, "a sequence begins elsewhere, or all %d tokens count", 200 * SEQUENCE);
    model_free(&m), data_close(&d);
    write_documents("padding.bin", 0, 0, SEQUENCE, 2);
    check_ok(trainer("-i padding.bin -j padding.bin " SMALL "-b 2 -x 2 -v 1 -c 0 -n 1 -o padding"));
    check(logged_in("padding", "\n2,train,", 0) == 0 && logged_in("padding", "\n2,train,", 2) == 0 &&
          logged_in("padding", "\n2,val,", 0) == 0, "a loss or a gradient where nothing counts");
    check_ok(trainer("-i train0.bin " SMALL "-b 2 -x 0 -o unpadded"));
    check(same_files("padding/model_00000002.bin", "unpadded/model_00000000.bin"), "padding trains");
}

// What an interrupt leaves undone after a step, its validation and questions, is done when the run goes on.
static void test_owed(void) {
    write_choices("two.bin", 2);
    check_ok(trainer("-i train0.bin -j val.bin --choices two.bin " TINY "-o paid"));
    for (int n = 1; n <= 38; n += apart(6)) {
        char read[12];
        snprintf(read, sizeof read, "%d", n);
        shell("rm -rf owed");
        setenv("INTERRUPT_AT_READ", read, 1);
        int status = trainer("-i train0.bin -j val.bin --choices two.bin " TINY "-o owed");
        unsetenv("INTERRUPT_AT_READ");
        check(status == STATUS_INTERRUPTED || (n > 1 && status == STATUS_OK), "read %d: %d, %s", n, status,
              output);
        check_ok(trainer("-i train0.bin -j val.bin --choices two.bin " TINY "-o owed -y 1"));
        check(same_logs("paid/log.csv", "owed/log.csv"), "interrupted at read %d: another log", n);
    }
}

// A terminal that closes interrupts a run, however often it says so; under nohup it does not.
static void test_closing(void) {
    static const char flags[] = "-i train0.bin -j val.bin " TINY;
    check_ok(trainer("%s -o open", flags));
    void (*before)(int) = signal(SIGHUP, SIG_DFL);
    setenv("CLOSE_AT_READ", "3", 1);
    int status = trainer("%s -o closed", flags);
    check(status == STATUS_INTERRUPTED && one_line("interrupted after step"), "closed: %d, %s", status, output);
    signal(SIGHUP, SIG_IGN);
    check_ok(trainer("%s -o nohup", flags));
    signal(SIGHUP, before);
    unsetenv("CLOSE_AT_READ");
    check_ok(trainer("%s -o closed -y 1", flags));
    check(same_logs("open/log.csv", "closed/log.csv") && same_logs("open/log.csv", "nohup/log.csv"),
          "a terminal that closes changes the log");
}

// A run goes on with fewer sequences at a time: the same sequences a step, nearly the same losses.
static void test_smaller_batch(void) {
    check_ok(trainer("-i train*.bin " SMALL "-n 4 -d 64 -b 4 -x 8 -o four"));
    check_ok(trainer("-i train*.bin " SMALL "-n 4 -d 64 -b 4 -x 4 -o fewer"));
    check_ok(trainer("-i train*.bin " SMALL "-n 4 -d 64 -b 1 -x 8 -o fewer -y 1"));
    shell("grep -c ', other bits' stdout > said; tail -n 1 four/log.csv > a; tail -n 1 fewer/log.csv > b");
    char *said, *a, *b;
    read_file("said", &said), read_file("a", &a), read_file("b", &b);
    double x = atof(strstr(a, "train,") + 6), y = atof(strstr(b, "train,") + 6);
    check(said && atoi(said) == 1, "it does not say that bits change");
    check(fabs(x - y) < 1e-3 * x && x > 0, "the loss after going on is %g, not %g", y, x);
    free(said), free(a), free(b);
    int status = trainer("-i train*.bin " SMALL "-d 32 -b 2 -x 9 -o fewer -y 1");
    check(status == STATUS_USAGE && one_line("resume with the same"), "another -d: %d, %s", status, output);
}

static void test_vocabularies(void) {
    static const struct { int tokens, model, suits; } cases[] = {
        {50257, 50257, 1}, {50257, 50258, 1}, {50257, 50304, 1}, {256, 256, 1},
        {50258, 50257, 0}, {50257, 50305, 0}, {256, 50257, 0}, {50200, 50257, 0}, {130, 256, 0}};
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++)
        check(vocabulary_suits(cases[i].tokens, cases[i].model) == cases[i].suits,
              "%d tokens for a model of %d", cases[i].tokens, cases[i].model);
}

static void test_evaluate(void) {
    char *x, *y, number[32] = "";
    check(trainer(TRAINED "-i train0.bin -j val.bin -b 2 -t 16 -m 2 -x 0 -o eval") == 0 &&
          evaluator(TRAINED "-j val.bin -b 2 -t 16 -m 2") == 0, "%s", output);
    read_file("stdout", &x), read_file("eval/log.csv", &y);
    char *last = y ? strstr(y, "\n0,val,") : NULL;
    if (last) snprintf(number, sizeof number, "loss %.4f,", atof(last + 7));
    check(last && x && strstr(x, number), "the evaluation says %s, the log %s", x, number);
    free(x), free(y);
}

// Logits in a file are those of the same pass in this process.
static void test_logits(void) {
    char *x;
    check_ok(sampler(TRAINED "-i train0.bin -b 2 -t 16 --head-chunk 10 --logits logits.npy"));
    size_t n = read_file("logits.npy", &x), size = 128 + 4 * 32 * 32;
    static const char path[] = "run0/model_00000006.bin";
    Model m;
    Data d;
    memset(&m, 0, sizeof m);
    m.net = load_model(path, NULL), m.B = 2, m.T = 16, m.chunk = 2, m.head_chunk = 32, m.memory = REVERSE;
    plan(&m), model_alloc(&m), load_model(path, &m);
    data_open(&d, "train0.bin"), data_batch(&d, &m, 0, 0, 0);
    forward(&m), head_logits(&m, 0, 32);
    double worst = 0;
    for (int i = 0; i < 32 * 32 && n == size; i++) {
        float got;
        act_t want;
        memcpy(&got, x + 128 + 4 * i, sizeof got);
        to_host(&want, m.logits + i / 32 * m.net.Vp + i % 32, sizeof want);
        worst = larger(worst, off((float)want, got));  // a library may multiply 10 tokens otherwise than 32
    }
    int head = n == size && memcmp(x, "\x93NUMPY\1\0\x76", 10) == 0 && x[127] == '\n';
    check(head && strstr(x + 10, "'<f4'") && strstr(x + 10, "(2, 16, 32)") && worst < 1e-6,
          "--logits: %d bytes, off by %g", (int)n, worst);
    free(x);
    model_free(&m), data_close(&d);
}

// What "abcde" and a byte look like on the terminal; control characters are left out
static void show_byte(char *text, int byte) {
    const char *end = byte >= 32 || byte == '\n' || byte == '\t' ? "abcde%c\n" : "abcde\n";
    if (byte >= 128) end = "abcde\xEF\xBF\xBD\n";
    snprintf(text, 16, end, byte);
}

// A program that uses a model ends on a signal with one line, and leaves no file behind.
static void test_interrupted_use(void) {
    setenv("INTERRUPT_AT_READ", "2", 1);
    int status = evaluator(TRAINED "-j val.bin -b 1 -t 16 -m 3");
    check(status == STATUS_INTERRUPTED && one_line("interrupted"), "evaluating: %d, %s", status, output);
    setenv("INTERRUPT_AT_READ", "1", 1);
    status = sampler(TRAINED "-i train0.bin -b 2 -t 16 --logits cut.npy");
    check(status == STATUS_INTERRUPTED && one_line("interrupted"), "writing logits: %d, %s", status, output);
    check(access("cut.npy", F_OK) != 0 && access("cut.npy.tmp", F_OK) != 0, "an interrupt leaves logits");
    unsetenv("INTERRUPT_AT_READ");
}

// Of tokens that nobody knows a sample begins as the training text does, or after what ends a document; and an empty
// prompt is refused.
static void test_sample_begin(void) {
    Job j;
    int32_t header[256];
    uint16_t first;
    memset(&j, 0, sizeof j);
    write_tokens("none.bin", 0, 300, 0), write_tokens("some.bin", 400, 300, 400);
    FILE *f = fopen("some.bin", "rb");
    check(f && fread(header, sizeof header, 1, f) == 1 && fread(&first, 2, 1, f) == 1, "some.bin is not there");
    fclose(f);
    sampled = tokenizer_open(NULL, 300);
    data_open(&j.data, "[ns]o[nm]e.bin");
    check(j.data.files.gl_pathc == 2 && sample_begin(&j) == first, "a sample begins after %d", sample_begin(&j));
    j.data.documents = 20, j.data.shards->eot = 7;
    check(sample_begin(&j) == 7 && sampled.eot == 7, "a sample of documents begins after %d", sample_begin(&j));
    data_close(&j.data);
    free(sampled.texts);
    check_ok(trainer("-i some.bin " SMALL "-b 1 -x 0 -o some"));
    shell("%s --sampler -e some/model_00000000.bin --prompt '' 2>said; test $? = 2 && grep -q 'nothing says' said", self);
}

// A prompt's logits are rows of its tokens, and the last one decides what a greedy text begins with.
static void test_prompt_logits(void) {
    char *x;
    float row[256] = {0};
    int best = 0, said = 0;
    check_ok(sampler(BYTES "--prompt abcde --logits prompt.npy"));
    size_t n = read_file("prompt.npy", &x), size = 128 + 4 * 5 * 256;
    check(n == size && strstr(x + 10, "(1, 5, 256)"), "a prompt's logits have %d bytes", (int)n);
    if (n == size) memcpy(row, x + 128 + 4 * 4 * 256, sizeof row);
    free(x);
    for (int v = 1; v < 256; v++) best = row[v] > row[best] ? v : best;
    check_ok(sampler(BYTES "--prompt abcde -g 1 --temperature 0"));
    read_file("stdout", &x);
    // a library may multiply one token otherwise than five, and round otherwise
    double least = row[best] - 1e-6 - 2 * rounding * fabs(row[best]);
    for (int v = 0; v < 256 && x; v++) {
        char shown[16];
        if (v != best && (!twin || row[v] < least)) continue;
        show_byte(shown, v);
        said |= strcmp(x, shown) == 0;
    }
    check(said, "the likeliest byte is %d, the text %s", best, x ? x : "");
    free(x);
}

// ---- conversions

// A baseline converted and back is the same file, and the header says what it was converted to.
static void test_convert(void) {
    // header: mode, grid, K, stem, shift, a
    static const struct { const char *flags; int32_t header[6]; } kinds[] = {
        {"--mode bdia", {6, 20, 0, 1, 6, -1}},
        {"--mode retrofit --coefficient 1 --fixed-point 2 --stem 1 --grid 18", {5, 18, 2, 1, 0, 16}},
        {"--mode bdia --coefficient -0.75 --stem 0", {6, 20, 0, 0, 2, -3}},
        {"--mode bdia --ordinary 1", {6, 20, 0, -1, 6, -1}}};
    for (int i = 0; i < 4; i++) {
        const char *flags = kinds[i].flags;
        char *x, there[64], back[64], twice[64];
        int32_t header[17] = {0};
        snprintf(there, sizeof there, "there%d/model_00000000.bin", i);
        snprintf(back, sizeof back, "back%d/model_00000000.bin", i);
        snprintf(twice, sizeof twice, "twice%d/model_00000000.bin", i);
        check(trainer("-i train0.bin -b 2 -x 0 -e base/model_00000000.bin %s -o there%d", flags, i) == 0 &&
              trainer("-i train0.bin -b 2 -x 0 -e %s --mode baseline -o back%d", there, i) == 0,
              "%s", output);
        check(same_files("base/model_00000000.bin", back), "%s and back is another file", flags);
        if (read_file(there, &x) > sizeof header) memcpy(header, x, sizeof header);
        const int32_t got[] = {header[8], header[10], header[11], header[12], header[13], header[16]};
        check(header[1] == 1003 && memcmp(got, kinds[i].header, sizeof got) == 0,
              "%s: header %d %d %d %d %d %d", flags, got[0], got[1], got[2], got[3], got[4], got[5]);
        free(x);
        check_ok(trainer("-i train0.bin -b 2 -x 0 -e %s -o twice%d", there, i));
        check(same_files(there, twice), "%s: loading and saving changed the model", flags);
    }
}

static void patch(const char *name, int slot, int32_t value) {
    FILE *f = fopen(name, "r+b");
    fseek(f, 4 * slot, SEEK_SET);
    (fwrite)(&value, sizeof value, 1, f);
    fclose(f);
}

// A conversion's grid leaves two bits above the largest value of the model on its text. Where one is left there
// is a word; where a value has no place, the end.
static void test_grid(void) {
    enum { WIDTH = 16, TOKEN = 8 };
    static const char flags[] = "-i train0.bin -j val.bin -e large.bin -b 2 -t 16 --mode bdia -x 1 -m 1 -l 1e-9";
    const float value = 27600;
    int32_t word, header[16] = {0};
    char *x;
    memcpy(&word, &value, sizeof word);
    shell("cp base/model_00000000.bin large.bin");
    patch("large.bin", 256 + TOKEN * WIDTH + 3, word);
    check_ok(trainer("%s -o large_run", flags));
    read_file("stdout", &x);
    check(strstr(x, "--grid 14: streams stay below 32768") && strstr(x, "bits left 2"),
          "the grid of a model that reaches %g: %s", value, x);
    free(x);
    if (read_file("large_run/model_00000001.bin", &x) > sizeof header) memcpy(header, x, sizeof header);
    check(header[10] == 14, "it was saved as %d", header[10]);
    free(x);
    int status = trainer("%s --grid 15", flags);
    check(status == 0 && strstr(output, "one bit left, or none"), "one bit more: %s", output);
    status = trainer("%s --grid 17", flags);
    check(status == STATUS_NUMBERS && strstr(output, "left the grid's range of +-16384"), "too fine: %s", output);
    check_ok(evaluator("-e large.bin --mode bdia -j val.bin -b 2 -t 16 -m 1"));
    read_file("stdout", &x);
    check(strstr(x, "--grid 14: streams stay") != NULL, "evaluation: %s", x);
    free(x);
}

// A run beside a teacher, in any policy and cut in two, gives the same bytes; it goes on beside no other.
static void test_teacher(void) {
    static const char flags[] = "-i train0.bin -j val.bin -e base/model_00000000.bin --distill "
        "run_base/model_00000006.bin --mode bdia --coefficient 0.25 -b 2 -t 16 -n 2 -v 2 -m 2";
    check_ok(trainer("-i train0.bin " TINY "--mode baseline -o run_base"));
    check_ok(trainer("%s -x 4 -o taught", flags));
    shell("cp -r taught cut_short; rm cut_short/*4.bin");
    check(trainer("%s -x 4 -o cut_short -y 1 --memory store", flags) == 0 &&
          same_files("taught/model_00000004.bin", "cut_short/model_00000004.bin") &&
          same_files("taught/state_00000004.bin", "cut_short/state_00000004.bin") &&
          same_logs("taught/log.csv", "cut_short/log.csv"), "a run that was cut has other bytes: %s", output);
    int status = trainer("%s -x 5 -o cut_short -y 1 --loss kl-teacher", flags);
    check(status == STATUS_USAGE && strstr(output, "--loss (1: kl, 2: kl-teacher) 1, not 2"),
          "another --loss: %s", output);
    status = trainer("-i train0.bin -b 2 -t 16 -x 5 -o cut_short -y 1");
    check(status == STATUS_USAGE && strstr(output, "--loss (1: kl, 2: kl-teacher) 1, not 0"),
          "no teacher on resuming: %s", output);
    status = trainer("-i train0.bin -b 2 -t 16 -x 5 -o cut_short -y 1 --distill base/model_00000000.bin");
    check(status == STATUS_USAGE && strstr(output, "--distill, as a checksum,"),
          "another teacher on resuming: %s", output);
    status = trainer("%s -x 5 -o cut_short -y 1 --stem 2", flags);
    check(status == STATUS_USAGE && strstr(output, "--coefficient 0.25 --stem 1 --grid"),
          "another --stem on resuming: %s", output);
}

// A model's validation beside its teacher is the log's last rows.
static void test_compare(void) {
    double logged[METRICS] = {0}, shown[METRICS] = {-1, -1, -1, -1};
    static const char *const rows[METRICS] = {
        "\n4,val,", "\n4,val_teacher,", "\n4,val_kl,", "\n4,val_agreement,"};
    char *x, *y;
    read_file("taught/log.csv", &x);
    for (int i = 0; i < METRICS; i++) {
        char *at = x ? strstr(x, rows[i]) : NULL;
        if (at) logged[i] = atof(at + strlen(rows[i]));
    }
    check_ok(evaluator("-j val.bin -e taught/model_00000004.bin --distill run_base/model_00000006.bin "
                       "-b 2 -t 16 -m 2"));
    read_file("stdout", &y);
    if (y) sscanf(y, "validation loss %lf,%*[^|]| teacher %lf | KL %lf | same top token %lf",
                  shown, shown + 1, shown + 2, shown + 3);
    int losses = fabs(logged[0] - shown[0]) < 1e-4 && fabs(logged[1] - shown[1]) < 1e-4;
    check(losses && logged[2] > 0 && logged[3] > 0 && fabs(logged[2] - shown[2]) < 1e-3 * logged[2] &&
          fabs(100 * logged[3] - shown[3]) < 0.01, "the evaluation says %s, the log %s", y, x);
    free(x), free(y);
}

// ---- bad input

// An exit status, and exactly one line that contains the word
typedef struct { int status; const char *word, *flags; } Refusal;
typedef int (*Program)(const char *flags, ...);

static void check_refusals(Program program, const Refusal *cases) {
    for (const Refusal *c = cases; c->word; c++) {
        int status = program("%s", c->flags);
        check(status == c->status && one_line(c->word),
              "%s: status %d for %d, one line with \"%s\" expected: %s",
              c->flags, status, c->status, c->word, output);
    }
}

#define ONE_LAYER "-e d6 --layers 1 --channels 8 --heads 1 "
#define BASE "-e base/model_00000000.bin "

static const Refusal trainer_refusals[] = {
    // flags and their values
    {2, "-i", "-e d12"},
    {2, "no such flag", "-i train0.bin --frobnicate"},
    {2, "no such flag", "-i train0.bin -r 1"},
    {2, "a flag and its value are two words", "-i train0.bin --mode=leapfrog"},
    {2, "--help lists them", "-i train0.bin -pn 2"},
    {2, "--help", "-i train0.bin -h 1"},
    {2, "twice", "-i train0.bin -b 2 -b 4"},
    {2, "needs a value", "-i train0.bin -b"},
    {2, "-b 0", "-i train0.bin -b 0"},
    {2, "-b 4x", "-i train0.bin -b 4x"},
    {2, "-b 1e3", "-i train0.bin -b 1e3"},
    {2, "-b 99999999999999999999", "-i train0.bin -b 99999999999999999999"},
    {2, "-d -5", "-i train0.bin -d -5"},
    {2, "-l nan", "-i train0.bin -l nan"},
    {2, "-l 1e999", "-i train0.bin -l 1e999"},
    {2, "--step-size", "-i train0.bin -e d6 --step-size x"},
    {2, "float32", "-i train0.bin --precision half"},
    {2, "train_, sample_ and eval_rev_gpt2 each", "-e d6 --prompt a"},
    {2, "train_, sample_ and eval_rev_gpt2 each", "-e d6 -i train0.bin --logits x.npy"},
    {2, "train_, sample_ and eval_rev_gpt2 each", "-e d6 -i train0.bin --temperature 1"},
    {2, "train_, sample_ and eval_rev_gpt2 each", "-e d6 -i train0.bin --top-k 3"},
    {2, "train_, sample_ and eval_rev_gpt2 each", "-e d6 -j val.bin --eval"},
    {2, "-y, -n and -nk need -o", "-i train0.bin -y 1"},
    {2, "-y, -n and -nk need -o", "-i train0.bin -n 5"},
    {2, "-y, -n and -nk need -o", "-i train0.bin -nk 5"},
    {2, "-x, how many steps", "-i train0.bin -e d6 -b 1 -t 16 --shuffle"},
    // networks, streams and shapes
    {2, "midpoint", "-i train0.bin --mode euler"},
    {2, "no --stream fixed", "-i train0.bin --mode baseline --stream fixed"},
    {2, "no --grid", "-i train0.bin --mode baseline --grid 20"},
    {2, "--grid needs --stream fixed", "-i train0.bin --stream float --grid 20"},
    {2, "one of d6 d12", "-i train0.bin -e d7"},
    {2, "heads", "-i train0.bin -e d6 --heads 5"},
    {2, "context", "-i train0.bin -e d6 --context 16 -t 32"},
    {2, "multiple", "-i train0.bin -e d6 -b 2 -t 16 -d 33"},
    {2, "2^30", "-i train0.bin -e d6 --context 1000000 -b 100000"},
    {2, "keeps its sizes", "-i train0.bin " TRAINED "--layers 3"},
    {2, "midpoint network", "-i train0.bin " TRAINED "--mode leapfrog"},
    // memory
    {2, "another --mode than baseline", "-i train0.bin --mode baseline --memory reverse"},
    {2, "another --mode than baseline", "-i train0.bin --mode baseline --memory auto"},
    {2, "--budget needs --memory auto", "-i train0.bin --budget 1G"},
    {2, "--budget 1024:", "-i train0.bin --memory auto --budget 1K"},
    {2, "--budget 3145728:", "-i train0.bin --memory auto --budget 3M"},
    {2, "--budget 536870912:", "-i train0.bin --memory auto --budget 0.5G"},
    {2, "K, M or G", "-i train0.bin --memory auto --budget 1T"},
    {2, "K, M or G", "-i train0.bin --memory auto --budget G"},
    {2, "K, M or G", "-i train0.bin --memory auto --budget 1GB"},
    {2, "K, M or G", "-i train0.bin --memory auto --budget -1G"},
    {2, "K, M or G", "-i train0.bin --memory auto --budget nan"},
    {3, "out of memory", "-i train0.bin -e d48 --layers 65536 --channels 4096 --heads 64 -b 1 -t 16"},
    // conversions and teachers
    {2, "multiple of 1/256", "-i train0.bin --mode bdia --coefficient 0.001"},
    {2, "--coefficient 0:", "-i train0.bin --mode bdia --coefficient 0"},
    {2, "--coefficient 0.06250001:", "-i train0.bin --mode bdia --coefficient 0.06250001"},
    {2, "--coefficient -1:", "-i train0.bin --mode bdia --coefficient -1"},
    {2, "--coefficient 1.5", "-i train0.bin --mode bdia --coefficient 1.5"},
    {2, "--fixed-point needs --mode retrofit", "-i train0.bin --mode bdia --fixed-point 2"},
    {2, "--stem, --ordinary need --mode retrofit or bdia", "-i train0.bin --mode midpoint --stem 1"},
    {2, "--coefficient needs --mode retrofit or bdia", "-i train0.bin " BASE "--coefficient 1"},
    {2, "--stem: retrofit of 12 layers takes steps from 0 to 11, 0 among them, as", "-i train0.bin --mode retrofit --stem 0"},
    {2, "--stem: bdia of 6 layers takes steps from 0 to 5, as", "-i train0.bin -e d6 --mode bdia --stem 7"},
    {2, "from 0 to 11, 0 among them, as", "-i train0.bin --mode retrofit --ordinary 1-3,11"},
    {2, "from 0 to 5, as", "-i train0.bin -e d6 --mode bdia --ordinary 0-1,6"},
    {2, "from 0 to 5, as", "-i train0.bin -e d6 --mode bdia --ordinary 3-1"},
    {2, "from 0 to 5, as", "-i train0.bin -e d6 --mode bdia --ordinary 0-"},
    {2, "from 0 to 5, as", "-i train0.bin -e d6 --mode bdia --ordinary 1,,2"},
    {2, "--ordinary 0,: bdia of 6 layers takes steps from 0 to 5, as", "-i train0.bin -e d6 --mode bdia --ordinary 0,"},
    {2, "from 0 to 5, as", "-i train0.bin -e d6 --mode bdia --ordinary 4294967296"},
    {2, "--stem, --ordinary need --mode retrofit or bdia", "-i train0.bin --mode midpoint --ordinary 1"},
    {2, "one of them is meant", "-i train0.bin --mode bdia --ordinary 0-1 --stem 2"},
    {2, "multiply every rounding", "-i train0.bin --mode bdia --stream float -t 16"},
    {2, "bdia have no --step-size", "-i train0.bin --mode bdia --step-size 1"},
    {2, "midpoint network", "-i train0.bin " TRAINED "--mode bdia"},
    {1, "its coefficient is 0", "-i train0.bin -e bdia0.bin"},
    {1, "2^shift is -64", "-i train0.bin -e bdia1.bin"},
    {1, "its shift is 9", "-i train0.bin -e bdia9.bin"},
    {2, "--loss kl and kl-teacher need --distill", "-i train0.bin --loss kl"},
    {1, "No such file", "-i train0.bin --distill nothing.bin"},
    {2, "of a midpoint network", "-i train0.bin --distill run0/model_00000006.bin"},
    {2, "of the model's sizes is meant", "-i train0.bin -e d6 --distill base/model_00000000.bin"},
    {3, "the teacher, --distill",
     "-e bytes0.bin -i thirty.txt -b 1 -t 16 -x 2 --mode bdia --distill bytes_nan.bin"},
    // tokens
    {1, "No such file", "-i nothing.bin"},
    {1, "no file's name is of this pattern", "-i nothing*.bin"},
    {1, "?name", "-i a\nname.bin"},
    {1, "not a regular file", "-i ."},
    {1, "not a token file", "-i empty.bin"},
    {1, "not a token file", "-i run0/model_00000006.bin"},
    {1, "too short", "-i empty.txt -b 1 -t 16"},
    {1, "the 17 tokens", "-i one.txt -b 1 -t 16"},
    {1, "its number of tokens is -5", "-i negative.bin"},
    {1, "1124 bytes, but", "-i short.bin"},
    {1, "too short", "-i train0.bin -e d6 -b 64 -t 1024"},
    {1, "its vocabulary is 70000", "-i v70000.bin"},
    {1, "vocabulary", "-i train0.bin -j other.bin -e d6 -b 1 -t 16"},
    {1, "but the vocabulary has 6", "-i small.bin " ONE_LAYER "-b 1 -t 16"},
    {1, "shards.bin has", "-i shard*.bin -e d6 -b 1 -t 16"},
    {1, "at token 299", "-e d6 --layers 1 -i v300.bin -x 0 -s 1 --tokenizer cut.bin"},
    {1, "goes on", "-e d6 --layers 1 -i v300.bin -x 0 -s 1 --tokenizer long.bin"},
    {1, "end of text", "-e d6 --layers 1 -i v300.bin -x 0 -s 1 --tokenizer end.bin"},
    // models and folders
    {1, "No such file", "-i train0.bin -e nothing.bin"},
    {1, "gpt2-large: No such file; a new network is one of d6", "-i train0.bin -e gpt2-large"},
    {1, "not a regular file", "-i train0.bin -e ./"},
    {1, "not a model file", "-i train0.bin -e empty.bin"},
    {1, "not a model file", "-i train0.bin -e train0.bin"},
    {1, "cannot make", "-i train0.bin " ONE_LAYER "-b 1 -t 16 -o no/such/place"},
    {1, "not a log", "-i train0.bin " ONE_LAYER "-b 1 -t 16 -y 1 -o foreign"},
#ifdef TWIN  // what a GPU's kernels do not take
    {2, "heads of 136 channels", "-i train0.bin -e d6 --layers 1 --channels 136 --heads 1 -b 1 -t 16"},
    {2, "4104 channels", "-i train0.bin -e d6 --layers 1 --channels 4104 --heads 54 -b 1 -t 16"},
    {2, "65535 sequences", "-i train0.bin " ONE_LAYER "-b 65536 -t 1 --chunk 65536"},
#endif
    {0, NULL, NULL}};

static const Refusal sampler_refusals[] = {
    // flags and their values
    {2, "--prompt is missing", "-e d6"},
    {2, "-i is missing", "-e d6 --logits x.npy"},
    {2, "--prompt needs a value", "-e d6 --prompt"},
    {2, "twice", "-e d6 --prompt a --prompt b"},
    {2, "no such flag", "-e d6 --prompt a -x 5"},
    {2, "no such flag", "-e d6 --prompt a -h 1"},
    {2, "no such flag", "-e d6 --prompt a --distill base/model_00000000.bin"},
    {2, "no such flag", "-e m.bin --prompt x --memory store"},
    {2, "train_, sample_ and eval_rev_gpt2 each", "-e d6 --prompt a --eval"},
    {2, "-g 0", "-e d6 --prompt a -g 0"},
    {2, "--temperature", "-e d6 --prompt a --temperature -1"},
    {2, "--top-k", "-e d6 --prompt a --top-k x"},
    {2, "longer than the context", BYTES "--prompt abcdefghijklmnopqrstuvwxyzabcdefghi"},
    {2, "longer than the context", TRAINED "-i train0.bin -b 1 -t 17 --logits y.npy"},
    {2, "midpoint network", TRAINED "--prompt a --mode leapfrog"},
    // what is read
    {1, "No such file", "-e nothing.bin --prompt a"},
    {1, "not a model file", "-e train0.bin --prompt a"},
    {1, "No such file", "-e d6 -i nothing.bin --logits y.npy"},
    {1, "fewer than", BYTES "-i thirty.txt -b 4 -t 16 --logits y.npy"},
    {1, "too short", BYTES "-i thirty.txt -b 1 -t 32 --logits y.npy"},
    {1, "its vocabulary has 64", TRAINED "-i other.bin -b 1 -t 16 --logits y.npy"},
    {1, "--tokenizer, a file", TRAINED "--prompt abc"},
    {1, "No such file", TRAINED "--prompt a --tokenizer nothing.bin"},
    {1, "not a tokenizer file", TRAINED "--prompt a --tokenizer train0.bin"},
    {1, "has 300 tokens, the model's 32", TRAINED "--prompt a --tokenizer tokenizer300.bin"},
    {3, "logit of token", "-e nan.bin --prompt abc"},
    {3, "logit of token 0 at position 0", "-e nan.bin --prompt abc --logits nan.npy"},
    // what is written
    {1, "of another kind", TRAINED "-i train0.bin -b 1 -t 16 --logits run0/log.csv"},
    {1, "not a regular file", TRAINED "-i train0.bin -b 1 -t 16 --logits /dev/null"},
    {1, "File exists", TRAINED "-i train0.bin -b 1 -t 16 --logits new.npy"},
    {1, "cannot write", TRAINED "-i train0.bin -b 1 -t 16 --logits no/such/x.npy"},
    {0, NULL, NULL}};

static const Refusal evaluator_refusals[] = {
    // flags and their values
    {2, "-j is missing", "-e d6"},
    {2, "no such flag", "-e d6 -j val.bin -o nowhere"},
    {2, "no such flag", "-e m.bin -j val.bin --memory auto --budget 1G"},
    {2, "a trainer that has it", "-e m.bin -j val.bin --profile"},
    {2, "train_, sample_ and eval_rev_gpt2 each", "-e d6 -j val.bin --prompt a"},
    {2, "longer than the context", TRAINED "-j val.bin -t 17"},
    {2, "midpoint network", TRAINED "-j val.bin --mode bdia"},
    {2, "of a midpoint network", TRAINED "-j val.bin --distill run0/model_00000006.bin"},
    // what is read
    {1, "No such file", TRAINED "-j nothing.bin"},
    {1, "No such file", "-e nothing.bin -j val.bin"},
    {1, "too short", "-e bytes0.bin -j sixteen.txt -b 4 -t 16"},
    {1, "vocabulary", TRAINED "-j other.bin -b 1 -t 16"},
    {3, "the loss is not a finite number", "-e bytes_nan.bin -j thirty.txt -b 1 -t 16"},
    {3, "the teacher, --distill", "-e bytes0.bin -j thirty.txt -b 1 -t 16 --distill bytes_nan.bin"},
    {0, NULL, NULL}};

// Puts a number at one of the places of four bytes that a file has.
// Files that something is wrong with
static void make_bad_files(void) {
    enum { WEIGHTS = 256, NOT_A_NUMBER = 0x7FC00000 };
    write_tokens("short.bin", 50, 32, 100);
    write_tokens("other.bin", 500, 64, 500);
    write_tokens("small.bin", 500, 6, 500);
    write_tokens("v300.bin", 5000, 300, 5000);
    write_tokens("v70000.bin", 500, 70000, 500);
    write_tokens("negative.bin", 500, 32, -5);
    write_tokens("shards.bin", 100, 32, 100);
    write_tokens("shards2.bin", 100, 64, 100);
    write_tokenizer("cut.bin", 299, 0, 300);
    write_tokenizer("long.bin", 301, 0, 300);
    write_tokenizer("end.bin", 300, 300, 300);
    shell(": > empty.bin; : > empty.txt; printf x > one.txt; "
          "printf 12345678901234567890123456789 > thirty.txt; printf 1234567890123456 > sixteen.txt");
    // models of bytes with a weight that is NaN, and a baseline without
    shell("cp bytes/model_00000002.bin nan.bin");
    patch("nan.bin", WEIGHTS, NOT_A_NUMBER);
    check_ok(trainer("-i bytes.txt -e d6 --layers 2 --channels 8 --heads 2 --context 32 --mode baseline -x 0 "
                     "-o bytes_base"));
    shell("cp bytes_base/model_00000000.bin bytes0.bin; cp bytes0.bin bytes_nan.bin");
    patch("bytes_nan.bin", WEIGHTS, NOT_A_NUMBER);
    // the coefficient of a bdia network is 0, -16 or -1 / 2^9: its numerator is slot 16, its shift slot 13
    shell("for i in 0 1 9; do cp there0/model_00000000.bin bdia$i.bin; done");
    patch("bdia0.bin", 16, 0);
    patch("bdia1.bin", 16, -64);
    patch("bdia9.bin", 13, 9);
    // a file that another program is writing, and a log of something else
    shell(": > new.npy.tmp; mkdir foreign; echo a,b,c > foreign/log.csv");
}

static void test_refusals(void) {
    make_bad_files();
    check_refusals(trainer, trainer_refusals);
    check_refusals(sampler, sampler_refusals);
    check_refusals(evaluator, evaluator_refusals);
    shell("! ls | grep nan.npy");  // logits that are no numbers leave no file, half-way or whole
}

// Documents say what -t is, and files of them go with files of as many tokens a sequence.
static void test_documents_refused(void) {
    static const Refusal refusals[] = {
        {1, "cut to sequences of 8 tokens, so -t 8 is meant, not 16", "-i eights.bin -t 16 " SMALL},
        {1, "sequences of 8 tokens, so -t 8 is meant, not 16", "-i train0.bin -j eights.bin -t 16 " SMALL},
        {1, "sequences of 16 tokens, so -t 16 is meant, not 8", "-i eights.bin -j sixteens.bin " SMALL},
        {1, "but a8.bin has 8", "-i a*.bin " SMALL}, {1, "but b0.bin has 0", "-i b*.bin " SMALL},
        {1, "length of sequences is -1", "-i minus.bin " SMALL},
        {1, "end-of-text token is 32", "-i end32.bin " SMALL},
        {2, "-t 16: longer than the context of 8", "-i sixteens.bin " ONE_LAYER "--context 8"},
        {0, NULL, NULL}};
    char *x;
    write_documents("eights.bin", 0, 3, 8, 0), write_documents("sixteens.bin", 0, 3, SEQUENCE, 0);
    shell("cp eights.bin a8.bin; cp sixteens.bin a9.bin; cp train0.bin b0.bin; cp eights.bin b8.bin");
    shell("cp eights.bin minus.bin; cp eights.bin end32.bin");
    patch("minus.bin", 4, -1), patch("end32.bin", 5, 32);
    check_refusals(trainer, refusals);
    check_ok(trainer("-i eights.bin -x 1 -b 1 " SMALL));
    shell("grep -c '^B 1, T 8, ' stdout > eight");
    read_file("eight", &x);
    check(x && atoi(x) == 1, "-t is not what documents are cut to");
    free(x);
    check_ok(sampler(TRAINED "-i eights.bin -b 2 --logits eights.npy"));
    check(read_file("eights.npy", &x) == 128 + 4 * 2 * 8 * 32, "--logits of documents");
    free(x);
}

// A run that blows up says where; what it saved before computes.
static void test_blowing_up(void) {
    char *x = NULL;
    int status = trainer("-i train0.bin " SMALL "-b 2 -t 16 -n 1 --mode baseline "
                         "-l 1000 -c 1000 -x 50 -o nan");
    check(status == STATUS_NUMBERS && strstr(output, "step ") && read_file("nan/log.csv", &x) > 0,
          "a run that blows up ended with %d: %s", status, output);
    free(x);
    status = trainer("-i train0.bin " SMALL "-b 2 -t 16 --mode midpoint -l 1000 -c 1000 -x 50");
    check(status == STATUS_NUMBERS && strstr(output, "grid"),
          "streams that leave the range ended with %d: %s", status, output);
    status = trainer("-i train0.bin " SMALL "-l 1 -c 1000 -x 30 -nk 1 -n 1 -o blow");
    check(status == STATUS_NUMBERS, "a run that blows up ended with %d: %s", status, output);
    for (int i = 1; i < 30; i++) {
        char name[64];
        snprintf(name, sizeof name, "blow/model_%08d.bin", i);
        if (read_file(name, &x) > 0)
            check(trainer("-i train0.bin -j val.bin -b 4 -e %s -x 0", name) == 0,
                  "%s does not compute: %s", name, output);
        free(x);
    }
}

// The disk is full, or read-only, from any file operation on: one line, status 1; what was saved is whole.
static void test_full_disk(void) {
    static const char flags[] = "-i train0.bin " TINY "--mode leapfrog -o disk";
    int operation, status = STATUS_DATA;
    for (operation = 1; status == STATUS_DATA && operation < 200; operation += apart(11)) {
        shell("rm -rf disk");
        status = dying_trainer(FULL + operation, 0, "%s", flags);
        if (status == 0) break;
        check(status == STATUS_DATA && one_line("cannot write"),
              "a disk full from operation %d on ended with %d: %s", operation, status, output);
        check(trainer("%s -y 1", flags) == 0, "after a disk full from operation %d on it did not resume: %s",
              operation, output);
        check(operation == 1 || same_files("disk/model_00000006.bin", "firstdisk.bin"),
              "a disk full from operation %d on changed the result", operation);
        if (operation == 1) shell("cp disk/model_00000006.bin firstdisk.bin");
    }
    check(status == 0 && operation > 20, "only %d file operations", operation);
}

// Whoever reads the output goes away: the step is finished and saved. The folder vanishes: it cannot be.
static void test_vanishing(void) {
    shell("%s --trainer 0 -i train0.bin " SMALL "-b 2 -t 16 -x 9000 -n 0 -o pipe 2> stderr | "
          "head -n 3 > /dev/null; test -e pipe/state_0000*.bin && grep -q 'its reader has gone' stderr",
              self);
    shell("(i=0; while [ ! -e gone/model_00000003.bin ] && [ $((i += 1)) -lt 3000 ]; do sleep 0.01; done; "
          "mv gone went) &");
    int status = trainer("-i train0.bin " SMALL "-b 2 -t 16 -x 9000 -n 1 -o gone");
    check(status == STATUS_DATA && one_line("cannot write"), "a folder that vanished ended with %d: %s",
          status, output);
}

// Not where a sanitizer or a driver reserves more, or a GPU's memory is meant
#if !defined(__SANITIZE_ADDRESS__) && !defined(TWIN)
#define HAS_ADDRESS_LIMIT
// Less address space than the plan is said before anything is allocated.
static void test_little_memory(void) {
    shell("ulimit -v 1000000; %s --trainer 0 -i train0.bin -e d24 -b 16 -t 16 2> stderr > stdout; "
          "test $? = 3 && grep -q 'the machine has 0.9' stderr", self);
}
#endif

// A model that was changed or broken is not read, nor do two runs share a folder.
static void test_foreign_files(void) {
    shell("cp -r run0 forged; cp run0/model_00000002.bin forged/model_00000006.bin");
    int status = trainer("-i train0.bin " TINY "--mode midpoint -y 1 -o forged");
    check(status == STATUS_DATA && strstr(output, "checksum"), "another step's model resumed with %d: %s",
          status, output);
    shell("mkdir busy");
    int lock = open("busy", O_RDONLY);
    flock(lock, LOCK_EX);
    status = trainer("-i train0.bin " TINY "-o busy");
    check(status == STATUS_DATA && strstr(output, "another run"), "a folder in use was taken: %d %s",
          status, output);
    close(lock);
    status = trainer("-x 1 -i train0.bin -e d6 -t 16 -o run0");
    check(status == STATUS_USAGE, "a folder of another run was taken");
    for (int cut = 0; cut < 2; cut++) {
        shell("cp run0/model_00000006.bin broken.bin");
        damage("broken.bin", cut ? 3000 : 13, cut);
        status = trainer("-i train0.bin -e broken.bin -b 2 -x 1");
        check(status == STATUS_DATA, "a broken model ended with %d: %s", status, output);
    }
}

// ---- dying and resuming

// The trainer dies at one file operation after the other and is resumed; the run that was never cut stays in
// the folder `kept`.
static void check_dying(const char *variant, int first) {
    char flags[512];
    int died = 1, operation;
    snprintf(flags, sizeof flags, "-i train*.bin -j val.bin " TINY "%s", variant);
    check_ok(trainer("%s -o whole", flags));
    for (operation = first; died && operation < 500; operation += apart(17)) {
        shell("rm -rf cut");
        died = dying_trainer(operation, 0, "%s -o cut", flags) == 256 + SIGKILL;
        if (!died) break;
        check(trainer("%s -o cut -y 1", flags) == 0, "after dying at file operation %d it did not resume: %s",
              operation, output);
        check(same_files("whole/model_00000006.bin", "cut/model_00000006.bin") &&
              same_files("whole/state_00000006.bin", "cut/state_00000006.bin"),
              "%s: dying at file operation %d changed the result", variant, operation);
        check(same_logs("whole/log.csv", "cut/log.csv"), "%s: dying at file operation %d changed the log",
              variant, operation);
    }
    check(operation > 30 && !died, "only %d file operations could be interrupted", operation);
    // Ctrl-C: the step is finished and saved
    shell("rm -rf cut");
    int status = dying_trainer(-12, 0, "%s -o cut", flags);
    check(status == STATUS_INTERRUPTED && one_line("interrupted after step"), "Ctrl-C ended with %d: %s",
          status, output);
    check(trainer("%s -o cut -y 1", flags) == 0 &&
          same_files("whole/model_00000006.bin", "cut/model_00000006.bin") &&
          same_logs("whole/log.csv", "cut/log.csv"), "Ctrl-C changed the result");
    shell("rm -rf cut kept; mv whole kept");
}

static void test_dying(void) {
    char *x;
    check_dying("--mode midpoint-a --shuffle --save bf16", 1);
    check_dying("--mode leapfrog -d 64 -nk 1", 6);
    // a run that only wrote its initial model can be resumed as well, also if it died writing a row of its log
    static const char flags[] =
        "-i train*.bin -j val.bin " SMALL "-b 2 -n 2 -v 3 -m 2 --mode leapfrog -d 64 -nk 1";
    check_ok(trainer("%s -x 0 -o zero", flags));
    shell("printf 0,v >> zero/log.csv");
    check(trainer("%s -x 6 -o zero -y 1", flags) == 0 &&
          same_files("kept/model_00000006.bin", "zero/model_00000006.bin") &&
          same_logs("kept/log.csv", "zero/log.csv"), "-x 0 and resuming is not one run: %s", output);
    // so can one that died before its log had any
    shell("mkdir none; : > none/log.csv");
    check_ok(trainer("%s -x 6 -o none -y 1", flags));
    check(same_logs("kept/log.csv", "none/log.csv"), "a run that began with an empty log has another");
    check(read_file("kept/model_00000004.bin", &x) == 0 && read_file("kept/model_00000006.bin", &x) > 0,
          "-nk 1 keeps another number of checkpoints");
    free(x);
}

// A longer run in `whole`, cut in `cut`: its flags, its last step and what that leaves
static char long_run[256], whole_model[64], cut_model[64], cut_state[64];
static int last_step;

// Killed at random moments
static void test_killed(void) {
    static const char shape[] = SMALL "-b 2 -t 16 ";
    last_step = brief ? 64 : 400;
    snprintf(long_run, sizeof long_run,
             "-i train*.bin %s --mode hamiltonian -x %d -n 7 -nk 2", shape, last_step);
    snprintf(whole_model, sizeof whole_model, "whole/model_%08d.bin", last_step);
    snprintf(cut_model, sizeof cut_model, "cut/model_%08d.bin", last_step);
    snprintf(cut_state, sizeof cut_state, "cut/state_%08d.bin", last_step);
    double start = seconds();
    check_ok(trainer("-i train0.bin %s -x 0", shape));
    int start_ms = (int)(1000 * (seconds() - start));  // a GPU's processes take their time to begin
    start = seconds();
    check_ok(trainer("%s -o whole", long_run));
    int kills = 0, run_ms = (int)(1000 * (seconds() - start)) - start_ms;
    uint64_t seed = (uint64_t)time(NULL);
    printf("  killed at random with seed %" PRIu64 "\n", seed);
    for (int i = 0; i < (brief ? 2 : 5); i++) {
        int milliseconds = 1 + start_ms + (int)(random_uniform(seed, 0, (uint64_t)i) * run_ms / 3);
        kills += dying_trainer(0, milliseconds, "%s -o cut -y 1", long_run) == 256 + SIGKILL;
    }
    check_ok(trainer("%s -o cut -y 1", long_run));
    check(kills > 0, "no run was killed");
    check(same_files(whole_model, cut_model) && same_logs("whole/log.csv", "cut/log.csv"),
          "being killed %d times changed the result", kills);
}

// The bytes that --plan says are needed in all
static double planned(const char *memory) {
    char *x;
    check_ok(trainer("%s -o planned --memory %s --plan", long_run, memory));
    read_file("stdout", &x);
    char *total = x ? strstr(x, "\ntotal ") : NULL;
    double bytes = total ? atof(total + 7) : 0;
    free(x);
    return bytes;
}

// Policy and budget may change on resuming, what shapes the arithmetic may not.
static void test_changed_flags(void) {
    double least = planned("reverse"), most = planned("store");
    shell("rm -rf cut; cp -r whole cut; rm %s %s", cut_model, cut_state);
    check(trainer("%s -o cut -y 1 --memory checkpoint", long_run) == 0 && same_files(whole_model, cut_model),
          "another policy changed the result");
    shell("rm %s %s", cut_model, cut_state);
    int status = trainer("%s -o cut -y 1 --memory auto --budget %.0f", long_run, floor((least + most) / 2));
    check(least < most && status == 0 && same_files(whole_model, cut_model),
          "--memory auto between %.0f and %.0f bytes changed the result: %s", least, most, output);
    status = trainer("%s -o planned --memory auto --budget %.0f", long_run, floor(least / 2));
    check(status == STATUS_USAGE && one_line("are needed"), "half of what is needed is enough: %d, %s",
          status, output);
    int has_bf16 = layers_bf16(1), both = layers_bf16(0) && has_bf16;
    status = trainer("%s -o cut -y 1 --precision %s", long_run, precision_names[both || !has_bf16]);
    check(status == (both ? STATUS_USAGE : STATUS_OK) && (both || strstr(output, "no products in")),
          "another --precision on resuming ended with %d: %s", status, output);
    check(trainer("%s -o cut -y 1 --chunk 1", long_run) == STATUS_USAGE, "another --chunk on resuming");
    check(trainer("%s -o cut -y 1 --slice 3", long_run) == STATUS_USAGE, "another --slice on resuming");
    check(trainer("%s -o cut -y 1 --group 1", long_run) == STATUS_USAGE, "another --group on resuming");
    shell("rm %s", cut_model);  // half of a pair is named, and not taken
    check_ok(trainer("%s -o cut -y 1", long_run));
    shell("grep -q 'whose model or state is alone' stdout");
    shell("rm %s %s", cut_model, cut_state);
    status = trainer("%s -o cut -y 1 --grid 18", long_run);
    check(status == 0 && !same_files(whole_model, cut_model), "another --grid on resuming: %d, %s", status, output);
    status = trainer("%s -o cut -y 1 --stream float", long_run);
    check(status == STATUS_USAGE && one_line("--grid 18; resume"), "floats on resuming: %d, %s", status, output);
    shell("rm -rf cut; cp -r whole cut");
    check(trainer("%s -o cut", long_run) == STATUS_USAGE, "checkpoints would have been overwritten");
}

// A state or model that is not what was saved is not resumed: what is done to it, $S and $M, beside an older
// state, $B; and a word of the line that says so
static void test_damaged_files(void) {
    static const struct { const char *command, *word; } states[] = {
        {"cp $M $S", "not a state file"}, {": > $S", "not a state file"},
        {"truncate -s 700 $S", "not a state file"}, {"truncate -s 5000 $S", "5000 bytes"},
        {"echo >> $S", "bytes"}, {"cp $B $S", "and step"}};
    for (size_t i = 0; i < sizeof states / sizeof states[0]; i++) {
        shell("rm -rf cut; cp -r whole cut; M=%s S=%s B=cut/state_%08d.bin; %s", cut_model, cut_state,
              (last_step - 1) / 7 * 7, states[i].command);
        int status = trainer("%s -o cut -y 1", long_run);
        check(status == STATUS_DATA && one_line(states[i].word), "%s: %d, %s",
              states[i].command, status, output);
    }
    shell("rm -rf cut; cp -r whole cut");
    damage(cut_state, 5000, 0);
    check(trainer("%s -o cut -y 1", long_run) == STATUS_DATA && strstr(output, "checksum"),
          "a corrupt state was taken: %s", output);
    damage(cut_model, 5000, 1);
    check(trainer("%s -o cut -y 1", long_run) == STATUS_DATA && strstr(output, "bytes"),
          "a truncated model was taken: %s", output);
}

// ---- what is run

enum { SHORT, ALL };
static const Word words[] = {{"short", SHORT}, {"brief", ALL}, {NULL, 0}};

static const Test tests[] = {
    {"what is read", "batches", test_batches, SHORT},
    {"what is read", "checkpoints", test_checkpoints, SHORT},
#ifndef TWIN
    {"what is read", "container", test_container, SHORT},
#endif
    {"what is read", "vocabularies", test_vocabularies, SHORT},
    {"text", "encoding", test_encoding, SHORT},
    {"text", "words", test_words, SHORT},
    {"text", "terminal", test_terminal, SHORT},
    {"text", "sampled-text", test_sampled_text, SHORT},
    {"training", "deterministic", test_deterministic, SHORT},
    {"training", "profile", test_profile, SHORT},
    {"training", "precision", test_precision, SHORT},
    {"training", "model-files", test_model_files, SHORT},
    {"training", "bytes", test_bytes, SHORT},
    {"training", "smaller-batch", test_smaller_batch, SHORT},
    {"training", "lanes", test_lanes, SHORT},
    {"training", "documents", test_documents, SHORT},
    {"training", "documents-trained", test_documents_trained, SHORT},
    {"training", "interrupt", test_interrupt, SHORT},
    {"training", "owed", test_owed, SHORT},
    {"training", "closing", test_closing, SHORT},
    {"what is missing", "file-systems", test_file_systems, SHORT},
    {"what is missing", "many-shards", test_many_shards, SHORT},
    {"the use of a model", "sample", test_sample, SHORT},
    {"the use of a model", "evaluate", test_evaluate, SHORT},
    {"the use of a model", "evaluate-all", test_evaluate_all, SHORT},
    {"the use of a model", "choices", test_choices, SHORT},
    {"the use of a model", "choices-programs", test_choices_programs, SHORT},
    {"the use of a model", "logits", test_logits, SHORT},
    {"the use of a model", "interrupted-use", test_interrupted_use, SHORT},
    {"the use of a model", "sample-begin", test_sample_begin, SHORT},
    {"the use of a model", "prompt-logits", test_prompt_logits, SHORT},
    {"conversions", "convert", test_convert, SHORT},
    {"conversions", "grid", test_grid, SHORT},
    {"conversions", "teacher", test_teacher, SHORT},
    {"conversions", "compare", test_compare, SHORT},
    {"bad input", "refusals", test_refusals, ALL},
    {"bad input", "documents-refused", test_documents_refused, ALL},
    {"bad input", "blowing-up", test_blowing_up, ALL},
    {"bad input", "full-disk", test_full_disk, ALL},
    {"bad input", "vanishing", test_vanishing, ALL},
#ifdef HAS_ADDRESS_LIMIT
    {"bad input", "little-memory", test_little_memory, ALL},
#endif
    {"bad input", "foreign-files", test_foreign_files, ALL},
    {"dying and resuming", "dying", test_dying, ALL},
    {"dying and resuming", "killed", test_killed, ALL},
    {"dying and resuming", "changed-flags", test_changed_flags, ALL},
    {"dying and resuming", "damaged-files", test_damaged_files, ALL},
    {NULL, NULL, NULL, 0}};

// A test that is named is run after those whose files it uses, which stand before it in the table of tests.
static const struct { const char *test, *uses; } files[] = {
    {"profile", "deterministic"}, {"precision", "deterministic"}, {"model-files", "deterministic"},
    {"bytes", "deterministic"}, {"evaluate", "deterministic"}, {"logits", "deterministic"},
    {"evaluate-all", "deterministic"}, {"choices", "deterministic"}, {"choices-programs", "choices"},
    {"interrupt", "deterministic"}, {"documents-refused", "deterministic"},
    {"interrupted-use", "deterministic"},
    {"foreign-files", "deterministic"},
    {"sample", "bytes"}, {"prompt-logits", "bytes"},
    {"choices-programs", "model-files"}, {"convert", "model-files"}, {"grid", "model-files"},
    {"teacher", "model-files"}, {"compare", "teacher"},
    {"refusals", "encoding"}, {"refusals", "bytes"}, {"refusals", "convert"},
    {"changed-flags", "killed"}, {"damaged-files", "killed"}};

static void choose_files(void) {
    for (int i = sizeof tests / sizeof tests[0] - 2; i >= 0; i--)
        for (size_t j = 0; j < sizeof files / sizeof files[0]; j++) {
            if (!chosen[i] || strcmp(files[j].test, tests[i].name) != 0) continue;
            for (int k = 0; k < i; k++) chosen[k] |= strcmp(files[j].uses, tests[k].name) == 0;
        }
}

int main(int argc, char **argv) {
    static char folder[] = "/tmp/rev_gpt2_test_XXXXXX";
    if (argc > 2 && strcmp(argv[1], "--trainer") == 0) {
        die_at_operation = atoi(argv[2]);
        argv[2] = argv[0];
        return rev_gpt2_main(argc - 2, argv + 2);
    }
    if (argc > 1 && strcmp(argv[1], "--sampler") == 0) {
        argv[1] = argv[0];
        return sample_main(argc - 1, argv + 1);
    }
    if (argc > 1 && strcmp(argv[1], "--evaluator") == 0) {
        argv[1] = argv[0];
        return eval_main(argc - 1, argv + 1);
    }
    find_self(argv[0]);
    setvbuf(stdout, NULL, _IOLBF, 0);
    choose_tests(tests, words, argc, argv);
    choose_files();
    for (int i = 1; i < argc; i++) brief |= strcmp(argv[i], "brief") == 0;
    if (!mkdtemp(folder) || chdir(folder) != 0) die(STATUS_DATA, "cannot make %s", folder);
    write_tokens("train0.bin", 700, 32, 700);
    write_tokens("train1.bin", 450, 32, 450);
    write_tokens("val.bin", 300, 32, 300);
    for (const Test *t = tests; t->name; t++)
        if (chosen[t - tests]) run_test(t);
    shell("rm -rf %s", folder);
    return report();
}
