/*
fuzz.c: what a broken or hostile file, or any command line, must not do to train_rev_gpt2.c, sample/sample.c or
eval/eval.c. A libFuzzer harness; run.sh builds it and runs it under the name of each target: tokens, model, state,
tokenizer, flags, sample, eval and choices; those where a block has its say once more with Llama's.

It includes all three programs. The end of the program becomes a jump back, files are one file in memory whatever their
name, and all that the trainer holds is written down. So after each input it is known whether the program would have
ended as it promises, with one line and the right status, or gone on with nothing left open and nothing misread.
Inputs are the files themselves; what else a target needs (a batch's shape, a prompt) is in the part of the header
that the readers ignore. SEEDS=DIR in the environment writes valid inputs there, and for flags DIR.dict, instead.
*/
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <glob.h>
#include <inttypes.h>
#include <math.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#define UNSEEN __attribute__((no_sanitize("coverage")))  // the harness's own loops are not what libFuzzer should look at

static jmp_buf ended;
static int status;           // that the trainer ended with, or 0
static char message[1 << 14];  // what it said
static FILE *screen;           // its stdout
static int memory_file;        // all its files
static char memory_path[32];

__attribute__((noreturn)) static void fail(const char *what) {
    fprintf(stderr, "FAILED: %s; status %d, message: %s\n", what, status, message);
    abort();
}

#define MAX_BUFFERS (int)(sizeof m.buffers / sizeof *m.buffers)

// ---- what is held

enum { MEMORY, FILE_POINTER, DESCRIPTOR, OURS };
static struct { void *at; int kind; } held[1024];
static int held_count;

static void *hold(int kind, void *at) {
    if (!at) return at;
    if (held_count == 1024) fail("the trainer holds a thousand things");
    held[held_count].at = at;
    held[held_count++].kind = kind;
    return at;
}
static void let_go(int kind, void *at) {
    int i = held_count - 1;
    while (i >= 0 && (held[i].at != at || held[i].kind != kind)) i--;
    if (i < 0) fail("freed or closed what was not open");
    held[i] = held[--held_count];
    if (kind == FILE_POINTER) fclose((FILE *)at);
    else if (kind == DESCRIPTOR) close((int)(intptr_t)at);
    else free(at);
}
static void *ours(size_t bytes) { return hold(OURS, malloc(bytes ? bytes : 1)); }

// ---- what the trainer calls

__attribute__((noreturn)) static void leave(int s) {
    status = s;
    longjmp(ended, 1);
}
static FILE *fuzz_fopen(const char *mode) {  // the one file is there already
    return (FILE *)hold(FILE_POINTER, fopen(memory_path, strcmp(mode, "wbx") == 0 ? "wb" : mode));
}
static int fuzz_open(void) { return (int)(intptr_t)hold(DESCRIPTOR, (void *)(intptr_t)open(memory_path, O_RDONLY)); }
static int fuzz_fclose(FILE *f) {
    let_go(FILE_POINTER, f);
    return 0;
}
static int fuzz_close(int fd) {
    let_go(DESCRIPTOR, (void *)(intptr_t)fd);
    return 0;
}
static void fuzz_free(void *p) {
    if (p) let_go(MEMORY, p);
}
__attribute__((format(printf, 2, 3))) static int fuzz_fprintf(FILE *f, const char *format, ...) {
    va_list args;
    va_start(args, format);
    size_t length = strlen(message);
    int n = f == stderr ? vsnprintf(message + length, sizeof message - length, format, args) : vfprintf(f, format, args);
    va_end(args);
    return n;
}
static const char *const names[8] = {"a.bin", "b.bin", "c.bin", ".txt", "a.txt", "b.txt", "c.txt", "d.txt"};
static char *globbed[3];
static int glob_count;
static int fuzz_glob(glob_t *g) {
    g->gl_pathc = (size_t)glob_count;
    g->gl_pathv = globbed;
    return 0;
}
// What reaches the terminal must be UTF-8 without control characters; of the trainer's own samples, only without these.
static int sampling;
UNSEEN static ssize_t show(void *cookie, const char *text, size_t n) {
    static const uint32_t least[4] = {0, 0xA0, 0x800, 0x10000};
    static uint32_t code;
    static int left, length;
    static unsigned char last;
    (void)cookie;
    for (size_t i = 0; i < n; i++) {
        unsigned char c = (unsigned char)text[i];
        if (sampling) {
            if ((c < 32 && c != '\n' && c != '\t') || c == 127) fail("sampled a control character");
            if (last == 0xC2 && c >= 128 && c < 160) fail("sampled a control character of two bytes");
            last = c;
            continue;
        }
        if (left ? (c & 0xC0) != 0x80 : (c >= 0x80 && c < 0xC0) || c >= 0xF8) fail("printed what is no UTF-8");
        if (!left && c >= 0x80) left = length = c < 0xE0 ? 1 : c < 0xF0 ? 2 : 3, code = c & (0x3Fu >> length);
        else if (left) left--, code = code << 6 | (c & 63);
        else if ((c < 32 && c != '\n' && c != '\t') || c == 127) fail("printed a control character");
        if (c >= 0x80 && !left && (code < least[length] || code > 0x10FFFF || (code >= 0xD800 && code < 0xE000)))
            fail("printed what is no character");
    }
    return (ssize_t)n;
}

static void put_file(const void *bytes, size_t size) {
    if (pwrite(memory_file, bytes, size, 0) != (ssize_t)size || ftruncate(memory_file, (off_t)size) != 0) fail("memfd");
}
static size_t get_file(void *bytes, size_t room) { return (size_t)pread(memory_file, bytes, room, 0); }

static char seed_directory[2048];
static void write_seed(const char *name, const void *bytes, size_t size) {
    char path[4096];
    snprintf(path, sizeof path, "%s%s%s", seed_directory, name[0] == '.' ? "" : "/", name);
    FILE *f = fopen(path, "wb");
    if (!f || fwrite(bytes, 1, size, f) != size || fclose(f) != 0) fail("cannot write seeds");
}

#undef stdout
#define stdout screen
#define exit(s) leave(s)
#define printf(...) fuzz_fprintf(screen, __VA_ARGS__)
#define fprintf(...) fuzz_fprintf(__VA_ARGS__)
#define putchar(c) fputc(c, screen)
#define malloc(n) hold(MEMORY, malloc(n))
#define calloc(n, size) hold(MEMORY, calloc(n, size))
#define aligned_alloc(a, n) hold(MEMORY, aligned_alloc(a, n))
#define free(p) fuzz_free(p)
#define fopen(path, mode) fuzz_fopen(mode)
#define fclose(f) fuzz_fclose(f)
#define open(path, flags) fuzz_open()
#define unlink(path) ((void)0, 0)
#define close(fd) fuzz_close(fd)
#define stat(path, st) fstat(memory_file, st)
#define glob(pattern, flags, error, g) fuzz_glob(g)
#define globfree(g) (void)(g)
#define rename(from, to) 0
#define access(path, mode) (strlen(path) % 2 ? 0 : -1)
#define REV_GPT2_CHOICES "dev/eval/choices.h"
#define SAMPLE_NO_MAIN
#include "../sample/sample.c"
#define EVAL_NO_MAIN
#include "../eval/eval.c"

static int may_end_with;  // the only status that die may now have
static int whole;         // whether tokens are being read from a file that is not cut meanwhile
static Model m;
static char path[PATH + 32];

static int32_t word(const uint8_t *bytes, size_t size, size_t i) {
    int32_t w = 0;
    if (size >= 4 * i + 4) memcpy(&w, bytes + 4 * i, 4);
    return w;
}

// ---- the block: a small network's own sizes, what a network must be, what it takes at least, names of sizes

#ifdef REV_GPT2_BLOCK
#define SMALL "l135m"
#define LARGE "l1700m"
#define BLOCK_FLAGS " --key-heads 1 --ffn 9"

static void set_block(Config *net, int kind) {
    const float base = 50, least = 1e-5f;
    net->block[KEY_HEADS] = 1 + kind % 2, net->block[FFN] = 5, net->block[TIED] = kind % 3 == 0, net->block[HEAD_SIZE] = net->C / net->NH;
    memcpy(&net->block[ROTARY_BASE], &base, sizeof base);
    memcpy(&net->block[EPSILON], &least, sizeof least);
}
static int possible_block(const Config *net) {
    const Sizes s = sizes_of(net);
    const double base = (double)float_of(net->block[ROTARY_BASE]);
    if (s.KH < 1 || s.KH > s.NH || s.NH % s.KH || s.F < 1 || s.F > 1 << 20 || s.HS < 2 || s.HS % 2 || s.HS * s.NH != s.C) return 0;
    return base >= 1 && base <= 1e31 && epsilon_of(net) >= 0 && epsilon_of(net) <= 1 && within(net->block[TIED], 0, 1);
}
// In one layer
static double least_weights(const Config *net) {
    const double C = net->C, HS = C / net->NH;
    return 2 * C * C + 2 * net->block[KEY_HEADS] * HS * C + 3 * C * net->block[FFN];
}
static double least_kept(const Config *net) {  // numbers of a token
    const double C = net->C, HS = C / net->NH;
    return 2 * C + 2 * net->block[KEY_HEADS] * HS + 2.0 * net->block[FFN];
}
#else
#define SMALL "d6"
#define LARGE "d48"
#define BLOCK_FLAGS ""

static void set_block(const Config *net, int kind) { (void)net, (void)kind; }
static int possible_block(const Config *net) { return net->C % net->NH == 0; }
static double least_weights(const Config *net) { return 12.0 * net->C * net->C; }
static double least_kept(const Config *net) { return (net->mode == HAMILTONIAN ? 8.0 : 13.0) * net->C; }
#endif

// A small network with weights, in m; kind: a mode.
static void make_model(int kind) {
    memset(&m, 0, sizeof m);
    m.net.maxT = 3, m.net.V = 5, m.net.L = 2, m.net.NH = 2, m.net.C = 4, m.net.Vp = 7;
    set_block(&m.net, kind);
    set_mode(&m.net, kind);
    m.net.h = 0.5f, m.net.ordinary[0] /= 2;
    if (kind == MIDPOINT_A) draw_coefficients(&m.net, 1);
    size_t bytes = parameter_count(&m.net) * sizeof(param_t);
    m.params = (param_t *)ours(bytes), m.m = (real_t *)ours(bytes), m.v = (real_t *)ours(bytes);
    m.grads = (real_t *)ours(bytes);
    init_parameters(&m, 1);
    memcpy(m.m, m.params, bytes);
    memcpy(m.v, m.params, bytes);
}
static const Run base_run = {4, 3, 2, 8, 1, 0, 0, 0, MIDPOINT, 1337, 0, CROSS_ENTROPY, 0, 1, 0, 0};
static uint8_t models[2 * MODES][1 << 14];  // files of every mode and precision
static size_t model_sizes[2 * MODES];

// ---- token files: header words 8 to 11 say how to read them

// from: where the tokens lie in the file, if that is known
UNSEEN static void check_batch(int V, int eot, const uint8_t *from) {
    for (int i = 0; i < m.B * m.T; i++) {
        int target = m.targets[i];
        if (target == -1 && m.inputs[i] == eot) target = eot;  // it does not count
        if (m.inputs[i] < 0 || m.inputs[i] >= V || target < 0 || target >= V) fail("a token beyond the vocabulary");
        if ((i + 1) % m.T && m.inputs[i + 1] != target) fail("a target is not the next input");
        if (from && m.inputs[i] != (from[2*i] | from[2*i + 1] << 8)) fail("a token is another");
    }
}
static void fuzz_tokens(const uint8_t *bytes, size_t size) {
    static Data d;
    uint32_t how = (uint32_t)word(bytes, size, 8), T = (uint32_t)word(bytes, size, 9) % 16384;
    int shuffle = how >> 8 & 1;
    uint64_t index;
    memcpy(&index, size >= 48 ? bytes + 40 : (const uint8_t *)"\0\0\0\0\0\0\0", 8);
    memset(&d, 0, sizeof d);
    memset(&m, 0, sizeof m);
    m.T = 1 + (int)(T < 16000 ? T % 16 : T - 10000), m.B = m.T > 16 ? 1 : 1 + (int)(how >> 4 & 7);
    glob_count = 1 + (int)(how & 3) % 3;
    for (int i = 0; i < glob_count; i++) globbed[i] = (char *)names[i + (how >> (12 + i) & 1) * 4];
    may_end_with = STATUS_DATA;
    data_open(&d, "*");
    if (d.documents && d.documents < 6400 && how >> 11 & 1) m.T = d.documents, m.B = m.T > 16 ? 1 : m.B;
    data_check(&d, "*", how >> 9 & 1 ? 50257 : d.V, m.T);
    size_t n = (size_t)m.B * (size_t)m.T;
    m.inputs = (int *)ours(n * sizeof(int)), m.targets = (int *)ours(n * sizeof(int));
    whole = !(how >> 10 & 1);
    if (!whole) put_file(bytes, size / 2);
    for (int k = 0; k < (m.T > 16 ? 1 : 3); k++) {
        data_batch(&d, &m, index + (uint64_t)k, shuffle, index);
        uint64_t room = (uint64_t)sequences_of(&d, m.T, 0), first = (index + (uint64_t)k) % room;
        int in_order = !shuffle && glob_count == 1 && d.shards[0].width == 2 && first + (uint64_t)m.B <= room;
        check_batch(d.V, d.documents ? d.shards[0].eot : -2, in_order ? bytes + 1024 + 2 * (uint64_t)m.T * first : NULL);
    }
    data_close(&d);
}
static void seeds_tokens(void) {
    static struct { int32_t header[256]; uint16_t tokens[8000]; } f;
    for (int i = 0; i < 19; i++) {
        int count = i == 15 ? 8000 : 20 + 9 * i, how = (i & 7) << 4 | (i & 1) << 8 | (i == 5) << 10 | (i == 6) << 9 | i % 3;
        memset(&f, 0, sizeof f);
        if (i % 4 == 3) how |= 7 << 12;
        f.header[0] = 20240520, f.header[1] = 1, f.header[2] = count, f.header[3] = i & 2 ? 256 : 0;
        f.header[8] = i == 15 ? 0 : how, f.header[9] = i == 15 ? 16200 : i, f.header[10] = i;
        for (int j = 0; j < count; j++) f.tokens[j] = (uint16_t)(j * 37 % (i & 2 ? 256 : 50257));
        if (i > 15) {  // tokens just beyond the vocabulary, and a place just beyond the last
            f.header[3] = i == 17, f.header[8] = f.header[9] = 0, f.header[10] = i == 18 ? count - 1 : 0;
            for (int j = 0; j < count; j++) f.tokens[j] = i == 16 ? 50257 : i == 17;
        }
        if (i == 12 || i == 13) {  // documents, whose ends do not count
            f.header[4] = i, f.header[5] = 5, f.header[8] |= 1 << 11;
            for (int j = 0; j < count; j++) f.tokens[j] = (uint16_t)(j % i < 9 ? 5 + j % i : 5);
        }
        snprintf(path, sizeof path, "tokens%d", i);
        write_seed(path, &f, sizeof f.header + 2 * (size_t)count);
    }
}

// ---- model files

UNSEEN static void check_parameters(const uint8_t *from, size_t count, int bf16) {
    for (size_t i = 0; i < count; i++) {
        float now = (float)m.params[i], was;
        if (bf16) was = from_bf16((uint16_t)(from[2*i] | from[2*i + 1] << 8));
        else memcpy(&was, from + 4*i, 4);
        if (memcmp(&was, &now, 4) != 0) fail("a parameter is another");
    }
}
static void fuzz_model(const uint8_t *bytes, size_t size) {
    memset(&m, 0, sizeof m);
    may_end_with = STATUS_DATA;
    opt.start = "model.bin";
    m.net = choose_network(256, -1);
    size_t count = parameter_count(&m.net);
    const Config *c = &m.net;
    if (count * 2 > size || c->maxT < 1 || c->V < 1 || c->V > c->Vp || c->V > 65536 || c->L < 1 || c->NH < 1 || c->C < 1 ||
        !possible_block(c) || c->mode < 0 || c->mode >= MODES || !(c->h >= 0 && c->h <= 16) || c->grid < 0 || c->grid > 30 ||
        (c->mode == BASELINE && c->grid) || (c->mode == MIDPOINT_A && !remainders_fit(c)) ||
        (converted(c->mode) && (c->K < 0 || c->K > 16 || !ordinary_fits(c) || c->shift < 0 || c->shift > 8 ||
                                c->a[0] % 2 == 0 || abs(c->a[0]) > 1 << c->shift))) fail("an impossible network was taken");
    m.params = (param_t *)ours(count * sizeof(param_t));
    load_model("model.bin", &m);
    check_parameters(bytes + 1024, count, word(bytes, size, 1) % 1000 == 5);
    for (int k = 0; k < steps(&m.net); k++) {
        Coefficients c = coefficients(&m.net, k);
        if (!isfinite(c.gamma) || (c.alpha == 0) != (m.net.mode == BASELINE || is_ordinary(&m.net, k))) fail("a step that does not reverse");
    }
    m.B = m.T = m.chunk = m.head_chunk = m.training = 1;
    plan(&m);
    plan_print(&m);
    if (plan_bytes(&m, PARAMETERS) < count * sizeof(param_t) || m.buffer_count > MAX_BUFFERS) fail("the plan is wrong");
}
static void seeds_model(void) {
    for (int i = 0; i < 2 * MODES; i++) {
        snprintf(path, sizeof path, "model%d", i);
        write_seed(path, models[i], model_sizes[i]);
    }
    const int32_t slot12 = -1, slot17 = 2;  // ordinary steps that are not the first ones: step 1
    memcpy(models[2 * BDIA] + 4 * 12, &slot12, sizeof slot12);
    memcpy(models[2 * BDIA] + 4 * 17, &slot17, sizeof slot17);
    write_seed("model_ordinary", models[2 * BDIA], model_sizes[2 * BDIA]);
#ifdef REV_GPT2_BLOCK
    static const int32_t values[] = {0, 1, 2, 3, 1 << 20, 1 << 30, -1, 0x7F800000, 0x7FC00000, 0x3F000000, 0x71C9F2CA};
    for (int slot = 240; slot < 246; slot++)  // each field with what may be there and what may not
        for (size_t i = 0; i < sizeof values / sizeof *values; i++) {
            static uint8_t bytes[sizeof models[0]];
            memcpy(bytes, models[2 * MIDPOINT], sizeof bytes);
            memcpy(bytes + 4 * slot, &values[i], 4);
            snprintf(path, sizeof path, "slot%d_%zu", slot, i);
            write_seed(path, bytes, model_sizes[2 * MIDPOINT]);
        }
#endif
}

// ---- state files, of a small network; word 30 of the header asks for the right checksum

// A run of a small network, at step 7
static Job make_job(int bf16) {
    Job j;
    memset(&j, 0, sizeof j);
    make_model(MIDPOINT);
    j.m = m, j.run = base_run, j.run.bf16 = bf16, j.from = j.step = 7;
    return j;
}
static void fuzz_state(const uint8_t *bytes, size_t size) {
    Job j = make_job(word(bytes, size, 11) & 1);
    const Run run = j.run;
    size_t count = parameter_count(&m.net), body = count * (run.bf16 ? 12 : 8), length = 1024 + body + 8;
    int known = word(bytes, size, 1) == STATE_VERSION;
    int whole = size == length && word(bytes, size, 0) == STATE_MAGIC && known && word(bytes, size, 2) == 7;
    int same = size >= 1024 && memcmp(bytes + 16, &run, sizeof run) == 0, right = 0;
    if (size == length) {
        int32_t header[256];
        memcpy(header, bytes, sizeof header);
        uint64_t sum = state_checksum(header, &m.net);
        sum = checksum(sum, bytes + 1024, body / 4);
        if (!run.bf16) sum = checksum(sum, m.params, count);
        if (word(bytes, size, 30) && pwrite(memory_file, &sum, 8, (off_t)(length - 8)) != 8) fail("memfd");
        right = word(bytes, size, 30) || memcmp(&sum, bytes + length - 8, 8) == 0;
    }
    may_end_with = same || size < 1024 || word(bytes, size, 0) != STATE_MAGIC || !known ||
        word(bytes, size, 2) != 7 ? STATUS_DATA : STATUS_USAGE;
    load_state(&j);
    if (!whole || !same || !right) fail("a wrong state was taken");
    if (memcmp(m.m, bytes + 1024, 4 * count) || memcmp(m.v, bytes + 1024 + 4 * count, 4 * count) ||
        (run.bf16 && memcmp(m.params, bytes + 1024 + 8 * count, 4 * count))) fail("a moment is another");
    may_end_with = STATUS_OK;
}
static void seeds_state(void) {
    static uint8_t bytes[1 << 14];
    for (int i = 0; i < 6; i++) {
        const Job j = make_job(i & 1);
        save_state(&j);
        size_t size = get_file(bytes, sizeof bytes);
        bytes[120] = i >= 2;  // the first two are right as they are
        if (i >= 4) bytes[4] = (uint8_t)(STATE_VERSION + 3 - i);
        snprintf(path, sizeof path, "state%d", i);
        write_seed(path, bytes, size);
    }
}

// ---- tokenizers; the header from word 4 on is a prompt

static void check_encode(const Tokenizer *z, const char *text) {
    Index x = index_open(z);
    size_t length = strlen(text), at = 0;
    char *prompt = (char *)ours(length + 1);
    int *tokens = (int *)ours(length * sizeof(int));
    memcpy(prompt, text, length + 1);
    for (size_t i = 0; i < length; i++) {
        int n = word_length((const unsigned char *)prompt + i);  // in the middle of characters as well
        if (n < 1 || (size_t)n > length - i) fail("a word of no length, or beyond the text");
    }
    may_end_with = STATUS_DATA;
    int count = encode(&x, prompt, 0, tokens);
    may_end_with = STATUS_OK;
    free(x.slots);
    for (int i = 0; i < count; at += (size_t)token_length(z, tokens[i++]))
        if (tokens[i] < 0 || tokens[i] >= z->V || tokens[i] == z->eot || token_length(z, tokens[i]) < 1 ||
            (size_t)token_length(z, tokens[i]) > length - at ||
            memcmp(z->texts[tokens[i]] + 1, text + at, (size_t)token_length(z, tokens[i])) != 0) fail("tokens are not the text");
    if (at != length) fail("tokens are not all of the text");
}
static void fuzz_tokenizer(const uint8_t *bytes, size_t size) {
    int own = word(bytes, size, 2), V = (own >= 1 && own <= 1024) || own == 50257 ? own : 256;
    char prompt[201] = "";
    may_end_with = STATUS_DATA;
    Tokenizer z = tokenizer_open("tokenizer.bin", V);
    Character u = {{0}, 0, 0};
    size_t at = 1024;
    for (int i = 0; i < V; at += 1 + (size_t)bytes[at], i++)
        if (!bytes[at] || token_length(&z, i) != bytes[at] || memcmp(z.texts[i] + 1, bytes + at + 1, bytes[at]) != 0) fail("a token is another");
    if (at != size) fail("a tokenizer of another size was taken");
    for (int i = 0; i < V; i++) print_characters(&z, &u, i);
    print_byte(&u, -1);
    fflush(screen);
    sampling = 1;
    for (int i = 0; i < V; i++) print_token(&z, i);
    fflush(screen);
    sampling = 0;
    if (first_token(&z) < (V > 256 ? -1 : 0) || first_token(&z) >= V) fail("no first token");
    memcpy(prompt, bytes + 16, 200);
    check_encode(&z, prompt);
    may_end_with = STATUS_OK;
    free(z.texts);
}
static void seeds_tokenizer(void) {
    static const char *const texts[20] = {"a", "b", "c", " ", "'", "s", "\n", "\xC3", "\xA9", "\xE2", "\x80", "\x99",
                                          "ab", " a", "'s", "\xC3\xA9", "abc", " ab", "aa", "<|endoftext|>"};
    static const char *const hostile[8] = {"\x1B[2J", "\xC2\x9B", "\xED\xA0\x80", "\xE0\x82\x80", "\xF4\x90\x80\x80", "\xF0\x80\x80\x80",
                                           "\xC1\x81", "\x7F"};
    static const char *const prompts[6] = {"abc a", "  ab's\n\nbb", "\xC3\xA9 a\xC3\xA9 \xC3", "a\xE2\x80\x99s   ", "Q", ""};
    for (int i = 0; i < 13; i++) {
        uint8_t f[8192] = {0}, *at = f + 1024;
        int32_t header[4] = {TOKENIZER_MAGIC, 2, i % 2 ? 256 + 5 : 20, i == 4 ? -1 : i == 5 ? 20 : i % 2 ? 260 : 19};
        if (i == 11) header[1] = 1, header[2] = 50257;
        memcpy(f, header, sizeof header);
        strcpy((char *)f + 16, prompts[i % 6]);
        for (int t = 0; t < header[2] && t < 261; t++) {
            const char *text = i == 2 && t < 8 ? hostile[t] : texts[t < 20 ? t : t < 256 ? 0 : t - 244];
            *at = i % 2 && t < 256 ? 1 : (uint8_t)strlen(text);
            if (i % 2 && t < 256) at[1] = (uint8_t)t;
            else memcpy(at + 1, text, *at);
            if (i == 12 && t == 9) *at = 0;
            at += 1 + *at;
        }
        snprintf(path, sizeof path, "tokenizer%d", i);
        write_seed(path, f, (size_t)(at - f));
    }
}

// ---- flags, a line each; a model file is there whatever its name

static int split_flags(const uint8_t *bytes, size_t size, char *argv[256]) {
    int argc = 1;
    argv[0] = (char *)"train_rev_gpt2";
    for (size_t i = 0, end; i < size && argc < 256; i = end + 1) {
        for (end = i; end < size && bytes[end] != '\n' && bytes[end]; end++) {}
        argv[argc] = (char *)ours(end - i + 1);
        memcpy(argv[argc], bytes + i, end - i);
        argv[argc++][end - i] = 0;
    }
    memset(&m, 0, sizeof m);
    memset(&opt, 0x55, sizeof opt);
    may_end_with = STATUS_USAGE;
    return argc;
}

// The network of -e, whose file is of some kind; its name, and that of a tokenizer
static void find_files(int V, int from) {
    size_t kind = strlen(opt.start) % (2 * MODES);
    put_file(models[kind], model_sizes[kind]);
    m.net = choose_network(V, from);
    const char *model = model_path(-1), *tokenizer = find_tokenizer(m.net.V);
    if (model && strcmp(model, opt.start) != 0) fail("a model of another name");
    if (tokenizer && tokenizer != opt.tokenizer && strlen(tokenizer) > PATH + 30) fail("a name that was cut");
}

static void check_shape(int accumulate) {
    double N = (double)m.B * m.T;
    if (m.T < 1 || m.T > m.net.maxT || N > 1 << 30 || m.chunk < 1 || m.chunk > m.B || m.head_chunk < 1 || m.head_chunk > N ||
        accumulate < 1 || !possible_block(&m.net) || (m.net.mode == BASELINE && m.net.grid)) fail("an impossible shape");
}

static void fuzz_flags(const uint8_t *bytes, size_t size) {
    char *argv[256];
    int argc = split_flags(bytes, size, argv);
    parse_options(options, OPTIONS, argc, argv);
    if (opt.help) print_help(options, OPTIONS, "train_rev_gpt2");
    if (opt.help || opt.version) return;
    find_files(argc % 2 ? 256 : 50257, opt.resume ? 7 : -1);
    m.training = 1;
    choose_teacher(&m);
    int accumulate = choose_shape(&m);
    may_end_with = STATUS_OK;
    check_shape(accumulate);
    double N = (double)m.B * m.T, C = m.net.C, kept = 4 * C * N * (double)planes_before(&m, steps(&m.net));
    if (m.memory == STORE) kept += N * m.net.L * 4 * least_kept(&m.net);
    if (m.memory != STORE || steps(&m.net) < 200 || size % 16 == 0) {  // it takes long for many
        double budget = opt.budget > 0 ? opt.budget : 1e15;
        int within = m.memory == AUTO ? plan_within(&m, budget) : 0;
        if (m.memory != AUTO) plan(&m);
            plan_print(&m);
        if (within && ((double)plan_bytes(&m, TOTAL) > budget || m.kept_steps > steps(&m.net))) fail("a plan beyond its budget");
        double all = 4 * least_weights(&m.net) * m.net.L + 8 * N * C + kept;
        if (m.buffer_count > MAX_BUFFERS || (double)plan_bytes(&m, TOTAL) < all || (double)plan_bytes(&m, KEPT) < kept) fail("the plan is too small");
    }
    int total = opt.steps > 0 ? opt.steps : 1000;
    for (int i = 0; i < 4; i++) {
        double rate = learning_rate((int)((int64_t)total * i / 4), total);
        if (!(rate >= 0 && rate <= opt.rate * 1.0001)) fail("an impossible learning rate");
    }
}
// A seed of each line, and a dictionary of a table's flags with what they choose among
static void write_lines(const char *const *lines, size_t count, const Option *table, int table_count) {
    static const char *const values[] = {"0", "1", "-1", "65536", "16777216", "1000000000", "2147483647", "99999999999999999999",
                                         "nan", "inf", "1e-400", "0x1p-3", SMALL, LARGE, "1024", "64", "16384", "1.5G", "800M", "7K"};
    char dictionary[1 << 14] = "", *at = dictionary, text[4200];
    for (size_t i = 0; i < count; i++) {
        size_t n = strlen(lines[i]);
        for (size_t j = 0; j <= n; j++) text[j] = lines[i][j] == ' ' ? '\n' : lines[i][j];
        snprintf(path, sizeof path, "line%zu", i);
        write_seed(path, text, n);
    }
    for (int i = 0; i < table_count; i++) {
        at += sprintf(at, "\"\\x0A%s\\x0A\"\n", table[i].flag);
        const char *const *names = choices[table[i].type];
        for (int c = 0; names && names[c]; c++) at += sprintf(at, "\"%s\"\n", names[c]);
    }
    for (size_t i = 0; i < sizeof values / sizeof *values; i++) at += sprintf(at, "\"%s\"\n", values[i]);
    write_seed(".dict", dictionary, strlen(dictionary));
}

static void seeds_flags(void) {
    static const char *const lines[] = {
        "-i data/*.bin -j val.bin -e " SMALL " -o out -y 1 -n 100 -nk 2 -b 4 -t 64 -d 1024 -x 100 -l 3e-4 -u 10 -q 0 -c 0.1 -v 50 -m 5 -s 50 -g 32",
        "-i a.txt -e " SMALL " --layers 3 --heads 4 --channels 32 --context 64" BLOCK_FLAGS " --mode leapfrog --memory checkpoint --stream fixed --grid 18",
        "-i a.txt -e " SMALL " --mode midpoint-a --step-size 0.5 --stream float --seed 7 --shuffle --save bf16 --chunk 2 --head-chunk 100",
        "--plan -e " LARGE " --mode hamiltonian --memory store -b 16 --beta1 0.8 --beta2 0.9", "--plan -e " SMALL " --mode baseline -t 0 -x -1",
        "-e out/model.bin -i x -s 1 --tokenizer t.bin -g 1", "-h", "--help", "--version", "--prompt", "-e " SMALL " --top-k", "--eval",
        "-e " SMALL " --plan -j val.bin -b 2 --mode midpoint", "-e model.bin -i x -a 1 -t 3 -x 0x1 -l nan",
        "-e fourteen-b.bin -i x --mode bdia --coefficient -0.0625 --stem 1 --distill teacher.bin --loss kl-teacher -t 3", "-e " SMALL " --mode retrofit --fixed-point 3 --plan",
        "-e " SMALL " -i x --mode leapfrog --memory auto --budget 2.5G --precision bf16 -t 8",
        "-e " SMALL " --mode retrofit --ordinary 0,2-3,5 --plan", "-e " SMALL " --mode bdia --ordinary 1-,4 -i x",
        "-i x --mode hamiltonian --memory checkpoint --layers 65536 --channels 65536 --heads 1 -b 16384 -t 65536 --context 65536"};
    char text[4200];
    memset(text, 'a', sizeof text);
    memcpy(text, "-i\nx\n-e\n./", 10);
    write_seed("flags_long", text, sizeof text);
    write_lines(lines, sizeof lines / sizeof *lines, options, OPTIONS);
}

// ---- flags of the program that generates text

static void fuzz_sample(const uint8_t *bytes, size_t size) {
    char *argv[256];
    int argc = split_flags(bytes, size, argv), given = 0;
    memset(&sample, 0x55, sizeof sample);
    parse_options(options, OPTIONS, 1, argv);
    parse_options(sample_options, SAMPLE_OPTIONS, argc, argv);
    if (opt.help) print_help(sample_options, SAMPLE_OPTIONS, "sample_rev_gpt2");
    if (opt.help || opt.version) return;
    check_sample_options();
    find_files(argc % 2 ? 256 : 50257, -1);
    if (sample.prompt) {
        Tokenizer z = tokenizer_open(NULL, 256);
        Character u = {{0}, 0, 0};
        int *prompt = encode_prompt(&z, &given);
        if (given != (int)strlen(sample.prompt) + !sample.prompt[0]) fail("a byte is no token");
        if (given <= 64) check_encode(&z, sample.prompt);  // a long one is for the tokenizer's target
        for (int i = 0; i < given && sample.prompt[0]; i++) print_characters(&z, &u, prompt[i]);
        print_byte(&u, -1);
        free(prompt);
        free(z.texts);
    }
    may_end_with = STATUS_USAGE;
    choose_sample_shape(&m, given);
    may_end_with = STATUS_OK;
    check_shape(1);
    if (m.training || (given && (m.B != 1 || m.T != given))) fail("a prompt is not the batch");
    plan(&m);
    double all = 4 * least_weights(&m.net) * m.net.L + 8 * (double)m.B * m.T * m.net.C;
    if (m.buffer_count > MAX_BUFFERS || (double)plan_bytes(&m, TOTAL) < all) fail("the plan is too small");
}
static void seeds_sample(void) {
    static const char *const lines[] = {
        "-e out/model.bin --prompt h\xC3\xA9llo's!! --temperature 0.8 --top-k 40 --tokenizer t.bin -g 1", "--help", "--version", "-x 3",
        "-e m.bin -i x --logits out.npy -t 2 -b 3 --chunk 2 --head-chunk 5", "-e " SMALL " --prompt abc -g 63 --seed 5 --precision bf16",
        "-e fourteen-b.bin -i x --mode bdia --coefficient -0.0625 --stem 1 --grid 19 -t 3 --logits o", "--prompt a --logits o.npy",
        "-e " SMALL " --mode retrofit --ordinary 0,5 --fixed-point 3 --prompt ab --stream fixed", "-e " SMALL " --prompt  --step-size 0.5 --temperature 0"};
    write_lines(lines, sizeof lines / sizeof *lines, sample_options, SAMPLE_OPTIONS);
}

// ---- flags of the program that evaluates

static void fuzz_eval(const uint8_t *bytes, size_t size) {
    char *argv[256];
    int argc = split_flags(bytes, size, argv);
    parse_options(options, OPTIONS, 1, argv);
    parse_options(eval_options, EVAL_OPTIONS, argc, argv);
    if (opt.help) print_help(eval_options, EVAL_OPTIONS, "eval_rev_gpt2");
    if (opt.help || opt.version) return;
    check_eval_options();
    find_files(argc % 2 ? 256 : 50257, -1);
    choose_teacher(&m);
    choose_shape(&m);
    may_end_with = STATUS_OK;
    check_shape(1);
    if (m.training || m.cache_tokens) fail("an evaluation trains or samples");
    plan(&m);
    int planes = m.net.mode == BASELINE ? 1 : 2;
    double all = 4 * (1 + m.has_teacher) * least_weights(&m.net) * m.net.L + 4 * planes * (double)m.B * m.T * m.net.C;
    if (m.buffer_count > MAX_BUFFERS || (double)plan_bytes(&m, TOTAL) < all) fail("the plan is too small");
}
static void seeds_eval(void) {
    static const char *const lines[] = {
        "-e out/model.bin -j x -b 2 -t 3 -m 0", "--help", "--version", "-x 3", "-e " SMALL, "-j *.bin -e " SMALL " --mode midpoint --precision bf16",
        "-e fourteen-b.bin -j x --mode bdia --coefficient -0.0625 --stem 1 --distill teacher.bin -t 3", "-e " SMALL " -j x --mode midpoint-a --step-size 0.5",
        "-e m.bin -j x --stream fixed --grid 19 --chunk 2 --head-chunk 5", "-e " SMALL " -j x --mode retrofit --ordinary 0,2-3 --fixed-point 3 --stream float"};
    write_lines(lines, sizeof lines / sizeof *lines, eval_options, EVAL_OPTIONS);
}

// ---- files of choices; header words 5 to 7 are the model that they are for

static void fuzz_choices(const uint8_t *bytes, size_t size) {
    Choices c;
    may_end_with = STATUS_DATA;
    choices_open(&c, "choices.bin");
    const uint16_t *end = c.words + (size - 1024) / 2;
    memset(&m, 0, sizeof m);
    m.T = 1 + (int)((uint32_t)word(bytes, size, 5) % 9), m.B = 4, m.chunk = 2, m.net.NH = 2;
    m.net.V = word(bytes, size, 6) == 1 ? 50304 : c.V;
    choices_fit(&c, &m);
    may_end_with = STATUS_OK;
    if (c.first[c.questions] != c.count) fail("completions are lost");
    for (int i = 0; i < c.count; i++) {
        const Completion *x = &c.all[i];
        if (x->context < 1 || x->ending < 1 || x->inputs > m.T || x->inputs != x->context + x->ending - 1) fail("a wrong completion");
        if (x->before < c.words || x->before + x->context > end || x->after < c.words || x->after + x->ending > end) fail("tokens beyond the file");
        for (int k = 0; k <= x->inputs; k++)
            if (token_of(x, k) >= c.V) fail("a token beyond the vocabulary");
        c.all[i].score[0] = i % 7;
    }
    Accuracy a = {0, 0, 0, 0, 0, 0, 0};
    add_accuracy(&a, &c);
    if (a.questions != c.questions || a.right > a.questions) fail("a wrong accuracy");
    choices_close(&c);
}
static void seeds_choices(void) {
    for (int i = 0; i < 6; i++) {
        struct { int32_t header[256]; uint16_t words[256]; } f = {{20240522, 2 - i % 2, 3, 0, i == 2 ? 300 : 0, i, i == 4}, {0}};
        uint16_t *at = f.words;
        for (int q = 0; q < 3; q++) {
            uint16_t *begin = at;
            *at++ = 65535, *at++ = 0, *at++ = (uint16_t)(i % 2 ? q : 0), *at++ = 1, *at++ = 2;
            if (i % 2) *at++ = 2, *at++ = 40, *at++ = 41;
            for (int k = 0; k < 2; k++) {
                *at++ = (uint16_t)(i % 2 ? 1 + k : 3 + k);
                if (i % 2 == 0) *at++ = 2, *at++ = 9, *at++ = 40, *at++ = 41;
                for (int t = 0; t < 1 + k; t++) *at++ = (uint16_t)(42 + t);
            }
            begin[1] = (uint16_t)((at - begin) * (i % 2 ? 2 : 1));
        }
        snprintf(path, sizeof path, "choices%d", i);
        write_seed(path, &f, 1024 + 2 * (size_t)(at - f.words));
    }
}

// ---- the target, by the program's name: llama_model is that of model

static const struct { const char *name; void (*fuzz)(const uint8_t *, size_t), (*seeds)(void); } targets[] = {
    {"tokens", fuzz_tokens, seeds_tokens}, {"model", fuzz_model, seeds_model}, {"state", fuzz_state, seeds_state},
    {"tokenizer", fuzz_tokenizer, seeds_tokenizer}, {"flags", fuzz_flags, seeds_flags}, {"sample", fuzz_sample, seeds_sample},
    {"eval", fuzz_eval, seeds_eval}, {"choices", fuzz_choices, seeds_choices}, {NULL, NULL, NULL}}, *target = targets;

static void choose_target(const char *program) {
    const char *slash = strrchr(program, '/'), *name = slash ? slash + 1 : program;
    if (strncmp(name, "llama_", 6) == 0) name += 6;
    while (target->name && strcmp(target->name, name) != 0) target++;
    if (!target->name) fail("a program that is called by no target's name");
}

int LLVMFuzzerInitialize(int *argc, char ***argv) {
    (void)argc;
    choose_target((*argv)[0]);
    memory_file = memfd_create("fuzz", 0);
    snprintf(memory_path, sizeof memory_path, "/proc/self/fd/%d", memory_file);
    screen = fopencookie(NULL, "w", (cookie_io_functions_t){.write = show});
    parse_options(options, OPTIONS, 1, NULL);
    for (int i = 0; i < 2 * MODES; i++) {
        make_model(i / 2);
        save_model(&m, 0, i % 2);
        model_sizes[i] = get_file(models[i], sizeof models[i]);
        if (model_sizes[i] != 1024 + parameter_count(&m.net) * (i % 2 ? 2 : 4)) fail("a model of the wrong size");
    }
    snprintf(seed_directory, sizeof seed_directory, "%s", getenv("SEEDS") ? getenv("SEEDS") : "");
    if (seed_directory[0]) target->seeds();
    while (held_count) let_go(held[0].kind, held[0].at);
    if (seed_directory[0]) _exit(0);
    return 0;
}

int LLVMFuzzerTestOneInput(const uint8_t *bytes, size_t size) {
    status = whole = 0;
    message[0] = 0;
    put_file(bytes, size);
    if (!setjmp(ended)) target->fuzz(bytes, size);
    fflush(screen);
    size_t length = strlen(message);
    if (status && status != may_end_with) fail("not the status of such a failure");
    if (status && (strncmp(message + strcspn(message, "_"), "_rev_gpt2: ", 11) != 0 || length < 20 || strchr(message, '\n') != message + length - 1))
        fail("not one line");
    for (size_t i = 0; i + 1 < length; i++)
        if ((unsigned char)message[i] < 32) fail("a control character in the message");
    if (whole && strstr(message, "was the file cut?")) fail("read beyond the end of a file");
    if (!status && message[0]) fail("a message, but no end");
    while (held_count) {
        if (!status && held[0].kind != OURS) fail("something was left open or allocated");
        let_go(held[0].kind, held[0].at);
    }
    return 0;
}
