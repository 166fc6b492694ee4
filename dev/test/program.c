/*
program.c: what must hold of the program, checked on a machine without network or Python: its files, what it
says of bad input, being killed or without room at any moment, and resuming; and of the programs that generate
text and evaluate.

It includes the trainer and, around it, these programs; with -DTWIN the CUDA twin. It wraps the file operations,
and runs itself as the trainer (--trainer N flags...) where a process has to die: the N-th file operation then
kills it half-way, or interrupts it if N is negative; above FULL, the disk is full from operation N - FULL on. As
--sampler flags... it is the program that generates text, as --evaluator the one that evaluates.

The table of tests at the end says what is run. An argument is the name of a test, which runs after those whose
files it uses; or one of these words: "short" stops before bad input and dying, "brief" lets the trainer die at
few moments only.
*/
#include "check.h"

static int file_operations, die_at_operation;  // 0: never

enum { FULL = 1000 };
static int time_to_die(void) {
    file_operations++;
    if (die_at_operation < 0 && file_operations == -die_at_operation) raise(SIGINT);
    return die_at_operation > FULL ? file_operations >= die_at_operation - FULL : file_operations == die_at_operation;
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
static int fatal_fsync(int fd) { return time_to_die() ? end_or_fail(EIO) : fsync(fd); }
static int fatal_rename(const char *from, const char *to) { return time_to_die() ? end_or_fail(EROFS) : rename(from, to); }

#define fwrite fatal_fwrite
#define fsync fatal_fsync
#define rename fatal_rename
#define REV_GPT2_PROFILE "dev/bench/profile.h"  // for --profile
#define SAMPLE_NO_MAIN
#include "../sample/sample.c"
#define EVAL_NO_MAIN
#include "../eval/eval.c"

static int brief;  // few of the moments to die at, for programs that take long to begin or to run

// ---- running the programs

static char dir[] = "/tmp/rev_gpt2_test_XXXXXX";

// Is what was printed one line, with this word? Of the twin's lines the trainer's are counted: a card's driver may have
// any to say, and the trainer one of its own where the library has no way to multiply.
static int one_line(const char *word) {
    static const char ours[] = "_rev_gpt2: ", library[] = "train_rev_gpt2: cuBLASLt has no way";
    int lines = 0, found = 0;
    for (char *line = output, *end; (end = strchr(line, '\n')) != NULL; line = end + 1) {
        char *at = strstr(line, word);
        int counts = strncmp(line + strcspn(line, "_"), ours, strlen(ours)) == 0 && strncmp(line, library, strlen(library)) != 0;
        if (twin && !counts) continue;
        lines++;
        found |= at && at < end;
    }
    return lines == 1 && found;
}

// Runs this program as another, argv[1 .. argc - 1], with the flags; its stdout is left in the file `stdout`.
// A flag's value is one word; _ stands for a space.
static int run_as(char **argv, int argc, int milliseconds, const char *format, va_list args) {
    char flags[2048], out[PATH];
    vsnprintf(flags, sizeof flags, format, args);
    snprintf(out, sizeof out, "%s/stdout", dir);
    for (char *word = strtok(flags, " "); word && argc < 63; word = strtok(NULL, " ")) {
        argv[argc++] = word;
        for (char *c = word; strcmp(argv[argc - 2], "--prompt") == 0 && *c; c++) *c = *c == '_' ? ' ' : *c;
    }
    return run_itself(argv, milliseconds, out);
}

// The trainer; operation as --trainer has it.
__attribute__((format(printf, 3, 4))) static int trainer(int operation, int milliseconds, const char *format, ...) {
    char number[16], *argv[64] = {self, (char *)"--trainer", number};
    va_list args;
    va_start(args, format);
    snprintf(number, sizeof number, "%d", operation);
    int status = run_as(argv, 3, milliseconds, format, args);
    va_end(args);
    return status;
}

// The program that generates text
__attribute__((format(printf, 1, 2))) static int sampler(const char *format, ...) {
    char *argv[64] = {self, (char *)"--sampler"};
    va_list args;
    va_start(args, format);
    int status = run_as(argv, 2, 0, format, args);
    va_end(args);
    return status;
}

// The program that evaluates
__attribute__((format(printf, 1, 2))) static int evaluator(const char *format, ...) {
    char *argv[64] = {self, (char *)"--evaluator"};
    va_list args;
    va_start(args, format);
    int status = run_as(argv, 2, 0, format, args);
    va_end(args);
    return status;
}

static void write_tokens(const char *name, int count, int V, int header_count) {
    char path[PATH];
    int32_t header[256] = {20240520, 1, header_count, V};
    snprintf(path, sizeof path, "%s/%s", dir, name);
    FILE *f = fopen(path, "wb");
    (fwrite)(header, sizeof header, 1, f);
    for (int i = 0; i < count; i++) {
        uint16_t token = (uint16_t)(random_bits(8, 8, (uint64_t)i) % 16 + (uint64_t)(i % 7));
        (fwrite)(&token, sizeof token, 1, f);
    }
    fclose(f);
}

// A tokenizer of V tokens: the bytes, then these, then as many more as are needed; the last is the end of text.
static const char *const words[] = {" t", "he", " the", "in", "re", "on", " a", "at", "st", "\n\n", "'s", "  "};
static void write_tokenizer(const char *name, int V, int end, int header_V) {
    char path[PATH], text[32];
    int32_t header[256] = {20240328, 2, header_V, end};
    snprintf(path, sizeof path, "%s/%s", dir, name);
    FILE *f = fopen(path, "wb");
    (fwrite)(header, sizeof header, 1, f);
    for (int i = 0; i < V; i++) {
        if (i < 268) snprintf(text, sizeof text, "%s", i < 256 ? "" : words[i - 256]);
        else snprintf(text, sizeof text, "<%d>", i);
        if (i < 256) text[0] = (char)i;
        size_t length = i < 256 ? 1 : strlen(text);
        fputc((int)length, f);
        (fwrite)(text, 1, length, f);
    }
    fclose(f);
}

static size_t read_file(const char *name, char **data) {
    char path[PATH];
    struct stat st;
    *data = NULL;
    snprintf(path, sizeof path, "%s/%s", dir, name);
    FILE *f = fopen(path, "rb");
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

static void damage(const char *name, long at, int truncate_there) {
    char path[PATH], c = 0;
    snprintf(path, sizeof path, "%s/%s", dir, name);
    if (truncate_there) {
        check(truncate(path, at) == 0, "cannot cut %s", name);
        return;
    }
    int fd = open(path, O_RDWR);
    check(pread(fd, &c, 1, at) == 1, "cannot read %s", name);
    c ^= 0x10;
    check(pwrite(fd, &c, 1, at) == 1, "cannot write %s", name);
    close(fd);
}

static void shell(const char *format, ...) {
    char command[2 * PATH];
    va_list args;
    va_start(args, format);
    vsnprintf(command, sizeof command, format, args);
    va_end(args);
    check(system(command) == 0, "%s", command);
}

#ifndef TWIN
// The least limit of the control groups above the process counts.
static void test_container_limit(void) {
    char self_path[PATH], mount[PATH];
    snprintf(self_path, sizeof self_path, "%s/groups", dir);
    snprintf(mount, sizeof mount, "%s/mount", dir);
    shell("mkdir -p %s/a/b/c; echo max > %s/a/b/memory.max; echo 5000000 > %s/a/memory.max; echo 6000000 > %s/memory.max", mount, mount, mount, mount);
    shell("printf '1:name=systemd:/\\n0::/a/b/c\\n' > %s", self_path);
    check(container_limit(self_path, mount) == 5000000, "a group above: %zu", container_limit(self_path, mount));
    shell("printf '0::/\\nx\\n' > %s", self_path);
    check(container_limit(self_path, mount) == 6000000, "the root: %zu", container_limit(self_path, mount));
    shell("printf '2:memory:/a\\n' > %s", self_path);
    check(container_limit(self_path, mount) == SIZE_MAX && container_limit("/nowhere", mount) == SIZE_MAX, "no limit");
}
#endif

// The columns of log.csv that do not measure time or memory.
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

// ---- text

static void test_text(void) {
    char path[PATH];
    Tokenizer z, bytes = tokenizer_open(NULL, 256);
    write_tokenizer("tokenizer300.bin", 300, 299, 300);
    snprintf(path, sizeof path, "%s/tokenizer300.bin", dir);
    z = tokenizer_open(path, 300);
    check(z.eot == 299 && bytes.eot == -1, "ends of text");
    Index x = index_open(&z);
    // lower tokens are joined first: " the" = " t" + "he", though "in" and "he" meet as well; no word crosses a space
    static const struct { const char *text; int count, tokens[12]; } codes[] = {
        {" the", 1, {258}}, {"the the", 3, {'t', 257, 258}}, {" thin", 3, {256, 'h', 259}}, {"it's", 3, {'i', 't', 266}},
        {"x  the", 3, {'x', ' ', 258}}, {"a  ", 2, {'a', 267}}, {"a\n\n", 2, {'a', 265}}, {"a\n\nb", 4, {'a', '\n', '\n', 'b'}},
        {"\xC3\xA9", 2, {0xC3, 0xA9}}, {"", 0, {0}}};
    for (size_t i = 0; i < sizeof codes / sizeof codes[0]; i++) {
        int tokens[16], count = encode(&x, codes[i].text, tokens);
        check(count == codes[i].count && memcmp(tokens, codes[i].tokens, sizeof(int) * (size_t)count) == 0, "\"%s\" becomes %d tokens, the first %d",
              codes[i].text, count, tokens[0]);
    }
    static const struct { const char *text; int length; } cuts[] = {
        {"hello world", 5}, {" world!", 6}, {"123abc", 3}, {" 12", 3}, {"...a", 3}, {"'llama", 3}, {"'tis", 2}, {" 's", 2}, {"   a", 2},
        {"\t\ta", 1}, {"\xC3\xA9t\xC3\xA9 ", 5}, {"\xE2\x80\x94x", 3}, {"\xC2\xBD\x31z", 3}, {"\xE3\x80\x80x", 3}, {"\xF0\x9F\x8E\x89x", 4}, {"\xFF", 1}};
    for (size_t i = 0; i < sizeof cuts / sizeof cuts[0]; i++)
        check(word_length((const unsigned char *)cuts[i].text) == cuts[i].length, "the first word of \"%s\" has %d bytes", cuts[i].text, word_length((const unsigned char *)cuts[i].text));
    for (uint64_t i = 0; i < 300; i++) {  // any bytes come back, whether UTF-8 or not
        char text[40] = "", back[40] = "";
        int tokens[40], n = (int)(random_bits(1, 1, i) % 39), count, at = 0;
        for (int j = 0; j < n; j++) text[j] = (char)(1 + random_bits(1, i + 2, (uint64_t)j) % (i < 150 ? 255 : 127));
        count = encode(&x, text, tokens);
        for (int j = 0; j < count; at += token_length(&z, tokens[j++])) memcpy(back + at, z.texts[tokens[j]] + 1, (size_t)token_length(&z, tokens[j]));
        check(at == n && memcmp(text, back, 40) == 0, "a text of %d bytes comes back as %d", n, at);
    }
    // what reaches the terminal is UTF-8 without control characters
    static const char *const shown[][2] = {{"a\xC3\xA9\xE2\x82\xAC\xF0\x9F\x8E\x89\n\tb", "a\xC3\xA9\xE2\x82\xAC\xF0\x9F\x8E\x89\n\tb"}, {"\x1B[31mx\x07\r\x7F", "[31mx"},
        {"\xE2\x82", "?"}, {"\xE2\x82z", "?z"}, {"\xE2\x82\xC3\xA9", "?\xC3\xA9"}, {"\x80", "?"}, {"\xC0\xAF", "??"}, {"\xED\xA0\x80", "?"}, {"\xC2\x9B", "?"},
        {"\xF4\x90\x80\x80", "?"}, {"\xE0\x80\x80", "?"}, {"\xFF\xFE", "??"}};
    for (size_t i = 0; i < sizeof shown / sizeof shown[0]; i++) {
        Character u = {{0}, 0, 0};
        char expected[64] = "";
        capture();
        for (const char *c = shown[i][0]; *c; c++) print_byte(&u, (unsigned char)*c);
        print_byte(&u, -1);
        char *text = captured();
        for (const char *c = shown[i][1]; *c; c++) {
            if (*c == '?') strcat(expected, "\xEF\xBF\xBD");
            else strncat(expected, c, 1);
        }
        check(strcmp(text, expected) == 0, "text %d is shown as %s", (int)i, text);
        free(text);
    }
    // samples in training: only without control characters, be they of two bytes, also in two tokens
    static const char *const sampled[][2] = {{"a\xC3\xA9\xE2\x82\xAC\xF0\x9F\x8E\x89\n\tb", "a\xC3\xA9\xE2\x82\xAC\xF0\x9F\x8E\x89\n\tb"}, {"\x1B[31mx\x07\r\x7F", "[31mx"},
        {"\xC2\x9B", "\xC2"}, {"\xC2\x9B\x9B", "\xC2"}, {"\xC2\x1B\x80z", "\xC2z"}, {"\xC2\xA0\xC2", "\xC2\xA0\xC2"}, {"\x9Bz", "z"}, {"\xC3\x9B", "\xC3\x9B"}};
    for (size_t i = 0; i < sizeof sampled / sizeof sampled[0]; i++) {
        capture();
        for (const char *c = sampled[i][0]; *c; c++) print_token(&bytes, (unsigned char)*c);
        char *text = captured();
        check(strcmp(text, sampled[i][1]) == 0, "text %d is sampled as %s", (int)i, text);
        free(text);
    }
    free(x.next), free(z.texts), free(bytes.texts);
}

// A model in a file: its text, its loss, its logits.
static void test_use(void) {
    char *x, *y, number[32] = "";
    check(trainer(0, 0, "-i %s/bytes.txt -e d6 --layers 2 --channels 8 --heads 2 --context 32 -x 2 -o %s/bytes", dir, dir) == 0, "%s", output);
    for (int threads = 1; threads <= 3; threads++) {
        char n[2] = {(char)('0' + threads), 0};
        setenv("OMP_NUM_THREADS", n, 1);
        check(sampler("-e %s/bytes/model_00000002.bin --prompt ab_cd -g 20 --top-k 9 --temperature 0.8", dir) == 0 && strstr(output, "20 tokens after 5 in"), "%s", output);
        shell("cp %s/stdout %s/text%d", dir, dir, threads);
    }
    unsetenv("OMP_NUM_THREADS");
    size_t n = read_file("text1", &x);
    check(n >= 6 && strncmp(x, "ab cd", 5) == 0 && same_files("text1", "text2") && same_files("text1", "text3"), "the text depends on threads: %s", x);
    free(x);
    check(sampler("-e %s/bytes/model_00000002.bin --prompt ab_cd -g 20 --top-k 9 --temperature 0.8 --seed 5", dir) == 0 && !same_files("text1", "stdout"), "another seed, the same text");
    check(sampler("-e %s/bytes/model_00000002.bin --prompt abc -g 500", dir) == 0 && strstr(output, "30 tokens after 3 in"), "the context is 32: %s", output);
    check(trainer(0, 0, "-i %s/bytes.txt -b 1 -x 0 -s 1 -g 500 -e %s/bytes/model_00000002.bin", dir, dir) == 0, "long samples in training: %s", output);
    // validation loss: the one of the log
    check(trainer(0, 0, "-e %s/run0/model_00000006.bin -i %s/train0.bin -j %s/val.bin -b 2 -t 16 -m 2 -x 0 -o %s/eval", dir, dir, dir, dir) == 0 &&
          evaluator("-e %s/run0/model_00000006.bin -j %s/val.bin -b 2 -t 16 -m 2", dir, dir) == 0, "%s", output);
    read_file("stdout", &x), read_file("eval/log.csv", &y);
    char *last = y ? strstr(y, "\n0,val,") : NULL;
    if (last) snprintf(number, sizeof number, "loss %.4f,", atof(last + 7));
    check(last && x && strstr(x, number), "the evaluation says %s, the log %s", x, number);
    free(x), free(y);
    // logits: those of the same pass in this process
    check(sampler("-e %s/run0/model_00000006.bin -i %s/train0.bin -b 2 -t 16 --head-chunk 10 --logits %s/logits.npy", dir, dir, dir) == 0, "%s", output);
    n = read_file("logits.npy", &x);
    Model m;
    Data d;
    char path[PATH];
    memset(&m, 0, sizeof m);
    snprintf(path, sizeof path, "%s/run0/model_00000006.bin", dir);
    m.net = load_model(path, NULL), m.B = 2, m.T = 16, m.chunk = 2, m.head_chunk = 32, m.memory = REVERSE;
    plan(&m), model_alloc(&m), load_model(path, &m);
    snprintf(path, sizeof path, "%s/train0.bin", dir);
    data_open(&d, path), data_batch(&d, &m, 0, 0, 0);
    m.B = 2, m.T = 16;
    forward(&m), head_logits(&m, 0, 32);
    double worst = 0;
    for (int i = 0; i < 32 * 32 && n == 128 + 4 * 32 * 32; i++) {
        float got;
        act_t want;
        memcpy(&got, x + 128 + 4 * i, sizeof got);
        to_host(&want, m.logits + i / 32 * m.net.Vp + i % 32, sizeof want);
        worst = larger(worst, off((float)want, got));  // a library may multiply 10 tokens otherwise than 32
    }
    check(n == 128 + 4 * 32 * 32 && memcmp(x, "\x93NUMPY\1\0\x76", 10) == 0 && strstr(x + 10, "'<f4'") && strstr(x + 10, "(2, 16, 32)") && x[127] == '\n' && worst < 1e-6, "--logits: %d bytes, off by %g", (int)n, worst);
    free(x);
    model_free(&m), data_close(&d);
    // of a prompt: rows of its tokens, and the last one decides what a greedy text begins with
    check(sampler("-e %s/bytes/model_00000002.bin --prompt abcde --logits %s/prompt.npy", dir, dir) == 0, "%s", output);
    n = read_file("prompt.npy", &x);
    check(n == 128 + 4 * 5 * 256 && strstr(x + 10, "(1, 5, 256)"), "a prompt's logits have %d bytes", (int)n);
    float row[256] = {0};
    int best = 0, said = 0;
    if (n == 128 + 4 * 5 * 256) memcpy(row, x + 128 + 4 * 4 * 256, sizeof row);
    free(x);
    for (int v = 1; v < 256; v++) best = row[v] > row[best] ? v : best;
    check(sampler("-e %s/bytes/model_00000002.bin --prompt abcde -g 1 --temperature 0", dir) == 0, "%s", output);
    read_file("stdout", &x);
    for (int v = 0; v < 256 && x; v++) {  // a library may multiply one token otherwise than five, and round otherwise
        const char *end = v >= 32 || v == 10 || v == 9 ? "%c\n" : "\n";  // control characters are left out
        char shown[16] = "abcde";
        if (v != best && (!twin || row[v] < row[best] - 1e-6 - 2 * rounding * fabs(row[best]))) continue;
        if (v >= 128) end = "\xEF\xBF\xBD\n";
        snprintf(shown + 5, 8, end, v);
        said |= strcmp(x, shown) == 0;
    }
    check(said, "the likeliest byte is %d, the text %s", best, x ? x : "");
    free(x);
}

static const char tiny[] = "-e d6 --layers 2 --channels 16 --heads 2 --context 16 -b 2 -t 16 -x 6 -n 2 -v 3 -m 2";

// A baseline converted and back is the same file; a teacher's run, in any policy and cut in two, gives the same bytes.
static void test_convert(void) {
    static const char *const kinds[] = {"--mode bdia", "--mode retrofit --coefficient 1 --fixed-point 2 --stem 1", "--mode bdia --coefficient -0.75 --stem 0"};
    static const int32_t slots[][6] = {{6, 18, 0, 2, 4, -1}, {5, 18, 2, 1, 0, 16}, {6, 18, 0, 0, 2, -3}};  // mode, grid, K, stem, shift, a
    char *x, *y, flags[1024], name[64];
    for (int i = 0; i < 3; i++) {
        int32_t header[17] = {0};
        check(trainer(0, 0, "-i %s/train0.bin -b 2 -x 0 -e %s/base/model_00000000.bin %s -o %s/there%d", dir, dir, kinds[i], dir, i) == 0 &&
              trainer(0, 0, "-i %s/train0.bin -b 2 -x 0 -e %s/there%d/model_00000000.bin --mode baseline -o %s/back%d", dir, dir, i, dir, i) == 0, "%s", output);
        snprintf(name, sizeof name, "back%d/model_00000000.bin", i);
        check(same_files("base/model_00000000.bin", name), "%s and back is another file", kinds[i]);
        snprintf(name, sizeof name, "there%d/model_00000000.bin", i);
        if (read_file(name, &x) > sizeof header) memcpy(header, x, sizeof header);
        const int32_t got[] = {header[8], header[10], header[11], header[12], header[13], header[16]};
        check(header[1] == 1003 && memcmp(got, slots[i], sizeof got) == 0, "%s: header %d %d %d %d %d %d", kinds[i], got[0], got[1], got[2], got[3], got[4], got[5]);
        free(x);
        check(trainer(0, 0, "-i %s/train0.bin -b 2 -x 0 -e %s/%s -o %s/twice%d", dir, dir, name, dir, i) == 0, "%s", output);
        snprintf(flags, sizeof flags, "twice%d/model_00000000.bin", i);
        check(same_files(name, flags), "%s: loading and saving changed the model", kinds[i]);
    }
    snprintf(flags, sizeof flags, "-i %s/train0.bin -j %s/val.bin -e %s/base/model_00000000.bin --distill %s/run_base/model_00000006.bin --mode bdia --coefficient 0.25 "
             "-b 2 -t 16 -n 2 -v 2 -m 2", dir, dir, dir, dir);
    check(trainer(0, 0, "-i %s/train0.bin %s --mode baseline -o %s/run_base", dir, tiny, dir) == 0, "%s", output);
    check(trainer(0, 0, "%s -x 4 -o %s/taught", flags, dir) == 0, "%s", output);
    shell("cp -r %s/taught %s/cut_short; rm %s/cut_short/*4.bin", dir, dir, dir);
    check(trainer(0, 0, "%s -x 4 -o %s/cut_short -y 1 --memory store", flags, dir) == 0 && same_files("taught/model_00000004.bin", "cut_short/model_00000004.bin") &&
          same_files("taught/state_00000004.bin", "cut_short/state_00000004.bin") && same_logs("taught/log.csv", "cut_short/log.csv"), "a taught run that was cut has other bytes: %s", output);
    check(trainer(0, 0, "%s -x 5 -o %s/cut_short -y 1 --loss kl-teacher", flags, dir) == STATUS_USAGE && strstr(output, "--loss kl;"), "another --loss was taken on resuming: %s", output);
    check(trainer(0, 0, "-i %s/train0.bin -b 2 -t 16 -x 5 -o %s/cut_short -y 1", dir, dir) == STATUS_USAGE && strstr(output, "and --distill"), "a run went on without its teacher: %s", output);
    check(trainer(0, 0, "-i %s/train0.bin -b 2 -t 16 -x 5 -o %s/cut_short -y 1 --distill %s/base/model_00000000.bin", dir, dir, dir) == STATUS_USAGE &&
          strstr(output, "--loss kl and another --distill"), "a run went on with another teacher: %s", output);
    check(trainer(0, 0, "%s -x 5 -o %s/cut_short -y 1 --stem 1", flags, dir) == STATUS_USAGE && strstr(output, "--coefficient 0.25 --stem 2"), "another --stem was taken on resuming: %s", output);
    // validation of a model beside its teacher: the log's last rows
    double logged[METRICS] = {0}, shown[METRICS] = {-1, -1, -1, -1};
    static const char *const rows[METRICS] = {"\n4,val,", "\n4,val_teacher,", "\n4,val_kl,", "\n4,val_agreement,"};
    read_file("taught/log.csv", &x);
    for (int i = 0; i < METRICS; i++) {
        char *at = x ? strstr(x, rows[i]) : NULL;
        if (at) logged[i] = atof(at + strlen(rows[i]));
    }
    check(evaluator("-j %s/val.bin -e %s/taught/model_00000004.bin --distill %s/run_base/model_00000006.bin -b 2 -t 16 -m 2", dir, dir, dir) == 0, "%s", output);
    read_file("stdout", &y);
    if (y) sscanf(y, "validation loss %lf,%*[^|]| teacher %lf | KL %lf | same top token %lf", shown, shown + 1, shown + 2, shown + 3);
    check(logged[2] > 0 && logged[3] > 0 && fabs(logged[0] - shown[0]) < 1e-4 && fabs(logged[1] - shown[1]) < 1e-4 && fabs(logged[2] - shown[2]) < 1e-3 * logged[2] &&
          fabs(100 * logged[3] - shown[3]) < 0.01, "the evaluation says %s, the log %s", y, x);
    free(x), free(y);
}

// The bytes that --plan says are needed in all.
static double planned(const char *flags, const char *memory) {
    char *x;
    check(trainer(0, 0, "%s -o %s/planned --memory %s --plan", flags, dir, memory) == 0, "no plan: %s", output);
    read_file("stdout", &x);
    char *total = x ? strstr(x, "\ntotal ") : NULL;
    double bytes = total ? atof(total + 7) : 0;
    free(x);
    return bytes;
}

static void test_resume(void) {
    static const char *const variants[] = {"--mode midpoint-a --shuffle --save bf16", "--mode leapfrog -d 64 -nk 1"};
    for (int v = 0; v < 2; v++) {
        char flags[1024];
        snprintf(flags, sizeof flags, "-i %s/train*.bin -j %s/val.bin %s %s", dir, dir, tiny, variants[v]);
        check(trainer(0, 0, "%s -o %s/whole", flags, dir) == 0, "a plain run ended with: %s", output);
        int died = 1, operation;
        for (operation = 1 + 5*v; died && operation < 500; operation += brief ? 17 : 1) {
            shell("rm -rf %s/cut", dir);
            died = trainer(operation, 0, "%s -o %s/cut", flags, dir) == 256 + SIGKILL;
            if (!died) break;
            check(trainer(0, 0, "%s -o %s/cut -y 1", flags, dir) == 0, "after dying at file operation %d it did not resume: %s", operation, output);
            check(same_files("whole/model_00000006.bin", "cut/model_00000006.bin") && same_files("whole/state_00000006.bin", "cut/state_00000006.bin"),
                  "%s: dying at file operation %d changed the result", variants[v], operation);
            check(same_logs("whole/log.csv", "cut/log.csv"), "%s: dying at file operation %d changed the log", variants[v], operation);
        }
        check(operation > 40 && !died, "only %d file operations could be interrupted", operation);
        // Ctrl-C: the step is finished and saved
        shell("rm -rf %s/cut", dir);
        int status = trainer(-12, 0, "%s -o %s/cut", flags, dir);
        check(status == STATUS_INTERRUPTED && one_line("interrupted after step"), "Ctrl-C ended with %d: %s", status, output);
        check(trainer(0, 0, "%s -o %s/cut -y 1", flags, dir) == 0 && same_files("whole/model_00000006.bin", "cut/model_00000006.bin") &&
              same_logs("whole/log.csv", "cut/log.csv"), "Ctrl-C changed the result");
        shell("rm -rf %s/cut %s/kept; mv %s/whole %s/kept", dir, dir, dir, dir);
    }
    // a run that only wrote its initial model can be resumed as well
    char flags0[1024], *x;
    snprintf(flags0, sizeof flags0, "-i %s/train*.bin -j %s/val.bin -e d6 --layers 2 --channels 16 --heads 2 --context 16 -b 2 -n 2 -v 3 -m 2 --mode leapfrog -d 64 -nk 1", dir, dir);
    check(trainer(0, 0, "%s -x 0 -o %s/zero", flags0, dir) == 0 && trainer(0, 0, "%s -x 6 -o %s/zero -y 1", flags0, dir) == 0 &&
          same_files("kept/model_00000006.bin", "zero/model_00000006.bin") && same_logs("kept/log.csv", "zero/log.csv"), "-x 0 and resuming is not one run: %s", output);
    check(read_file("kept/model_00000004.bin", &x) == 0 && read_file("kept/model_00000006.bin", &x) > 0, "-nk 1 keeps another number of checkpoints");
    free(x);
    // killed five times at random moments of a longer run
    char flags[1024], model[64], state[64], cut_model[64];
    int last = brief ? 64 : 400;
    static const char shape[] = "-e d6 --layers 2 --channels 16 --heads 2 --context 16 -b 2 -t 16 -nk 2";
    snprintf(flags, sizeof flags, "-i %s/train*.bin %s --mode hamiltonian -x %d -n 7", dir, shape, last);
    snprintf(model, sizeof model, "whole/model_%08d.bin", last);
    snprintf(cut_model, sizeof cut_model, "cut/model_%08d.bin", last);
    snprintf(state, sizeof state, "cut/state_%08d.bin", last);
    double least = planned(flags, "reverse"), most = planned(flags, "store"), start = seconds();
    check(trainer(0, 0, "-i %s/train0.bin %s -x 0", dir, shape) == 0, "no steps: %s", output);
    int start_ms = (int)(1000 * (seconds() - start));  // a GPU's processes take their time to begin
    start = seconds();
    check(trainer(0, 0, "%s -o %s/whole", flags, dir) == 0, "a plain run ended with: %s", output);
    int kills = 0, run_ms = (int)(1000 * (seconds() - start)) - start_ms;
    uint64_t seed = (uint64_t)time(NULL);
    printf("  killed at random with seed %" PRIu64 "\n", seed);
    for (int i = 0; i < (brief ? 2 : 5); i++) {
        int milliseconds = 1 + start_ms + (int)(random_uniform(seed, 0, (uint64_t)i) * run_ms / 3);
        kills += trainer(0, milliseconds, "%s -o %s/cut -y 1", flags, dir) == 256 + SIGKILL;
    }
    check(trainer(0, 0, "%s -o %s/cut -y 1", flags, dir) == 0, "it did not resume: %s", output);
    check(kills > 0, "no run was killed");
    check(same_files(model, cut_model) && same_logs("whole/log.csv", "cut/log.csv"), "being killed %d times changed the result", kills);
    // policy and threads may change, what shapes the arithmetic may not
    shell("cd %s; rm -rf cut; cp -r whole cut; rm %s %s", dir, cut_model, state);
    check(trainer(0, 0, "%s -o %s/cut -y 1 --memory checkpoint", flags, dir) == 0 && same_files(model, cut_model),
          "another policy changed the result");
    shell("cd %s; rm %s %s", dir, cut_model, state);
    int status = trainer(0, 0, "%s -o %s/cut -y 1 --memory auto --budget %.0f", flags, dir, floor((least + most) / 2));
    check(least < most && status == 0 && same_files(model, cut_model),
          "--memory auto between %.0f and %.0f bytes changed the result: %s", least, most, output);
    status = trainer(0, 0, "%s -o %s/planned --memory auto --budget %.0f", flags, dir, floor(least / 2));
    check(status == STATUS_USAGE && one_line("are needed"), "half of what is needed is enough: %d, %s", status, output);
    int has_bf16 = layers_bf16(1), both = layers_bf16(0) && has_bf16;
    status = trainer(0, 0, "%s -o %s/cut -y 1 --precision %s", flags, dir, precision_names[both || !has_bf16]);
    check(status == (both ? STATUS_USAGE : STATUS_OK) && (both || strstr(output, "no products in")),
          "another --precision on resuming ended with %d: %s", status, output);
    check(trainer(0, 0, "%s -o %s/cut -y 1 --chunk 1", flags, dir) == STATUS_USAGE, "another --chunk was taken on resuming");
    check(trainer(0, 0, "%s -o %s/cut -y 1 --grid 18", flags, dir) == STATUS_USAGE, "another --grid was taken on resuming");
    check(trainer(0, 0, "%s -o %s/cut", flags, dir) == STATUS_USAGE, "checkpoints would have been overwritten");
    static const struct { const char *command, *word; } states[] = {
        {"cp $M $S", "not a state file"}, {": > $S", "not a state file"},
        {"truncate -s 700 $S", "not a state file"}, {"truncate -s 5000 $S", "5000 bytes"},
        {"echo >> $S", "bytes"}, {"cp $B $S", "and step"}};
    for (size_t i = 0; i < sizeof states / sizeof states[0]; i++) {
        shell("cd %s; rm -rf cut; cp -r whole cut; M=%s S=%s B=cut/state_%08d.bin; %s", dir, cut_model, state,
              (last - 1) / 7 * 7, states[i].command);
        status = trainer(0, 0, "%s -o %s/cut -y 1", flags, dir);
        check(status == STATUS_DATA && one_line(states[i].word), "%s: %d, %s", states[i].command, status, output);
    }
    shell("rm -rf %s/cut; cp -r %s/whole %s/cut", dir, dir, dir);
    damage(state, 5000, 0);
    check(trainer(0, 0, "%s -o %s/cut -y 1", flags, dir) == STATUS_DATA && strstr(output, "checksum"), "a corrupt state was taken: %s", output);
    damage(cut_model, 5000, 1);
    check(trainer(0, 0, "%s -o %s/cut -y 1", flags, dir) == STATUS_DATA && strstr(output, "bytes"), "a truncated model was taken: %s", output);
}

// The final model is the same bytes for every policy and number of threads.
static void test_training_is_deterministic(void) {
    const char *policies[] = {"store", "checkpoint", "reverse"};
    char names[3][64];
    for (int i = 0; i < 3; i++) {
        char threads[2] = {(char)('1' + i), 0};
        setenv("OMP_NUM_THREADS", threads, 1);
        check(trainer(0, 0, "-i %s/train0.bin %s --mode midpoint --memory %s -o %s/run%d", dir, tiny, policies[i], dir, i) == 0, "%s", output);
        snprintf(names[i], sizeof names[i], "run%d/model_00000006.bin", i);
        check(same_files(names[0], names[i]), "%s with %d threads trains another model", policies[i], i + 1);
    }
    unsetenv("OMP_NUM_THREADS");
    // what is printed about the time changes nothing, and adds up
    check(trainer(0, 0, "-i %s/train0.bin %s --mode midpoint --profile -o %s/profile", dir, tiny, dir) == 0 && same_files(names[0], "profile/model_00000006.bin"), "--profile trains another model");
    char *printed;
    double share, shares = 0;
    read_file("stdout", &printed);
    char *line = strstr(printed, "\nlayer function");
    if (line) line++;
    for (int rows = 0; line && (line = strchr(line + 1, '\n')) != NULL && sscanf(line, "%*s %*d %*f %lf%%", &share) == 1; rows++) shares += share;
    check(fabs(shares - 100) < 2 && strstr(printed, "matmul_backward") && !strstr(printed, " inf"), "the shares of --profile are %g %%: %s", shares, printed);
    free(printed);
    // products in bf16: another model, and the same one whatever the policy
    int has_bf16 = layers_bf16(1), both = layers_bf16(0) && has_bf16;
    check(trainer(0, 0, "-i %s/train0.bin %s --mode midpoint --precision bf16 -o %s/bf16", dir, tiny, dir) == 0 && same_files(names[0], "bf16/model_00000006.bin") == !both, "--precision bf16 trains the model of float32");
    check(has_bf16 || strstr(output, "no products in bf16"), "without bf16: %s", output);
    check(trainer(0, 0, "-i %s/train0.bin %s --mode midpoint --precision bf16 --memory store -o %s/bf16store", dir, tiny, dir) == 0 && same_files("bf16/model_00000006.bin", "bf16store/model_00000006.bin"), "in bf16 store trains another model");
    // a model file that is loaded and saved again is the same file; llm.c's layout for baseline
    check(trainer(0, 0, "-i %s/train0.bin -b 2 -e %s/run0/model_00000006.bin -x 0 -o %s/again", dir, dir, dir) == 0 &&
          same_files("run0/model_00000006.bin", "again/model_00000000.bin"), "loading and saving changed a model: %s", output);
    check(trainer(0, 0, "-i %s/train0.bin %s --mode baseline -x 0 -o %s/base", dir, "-e d6 --layers 2 --channels 16 --heads 2 --context 16 -b 2", dir) == 0, "%s", output);
    // bf16 from its file alone, and the bytes of a .txt
    check(trainer(0, 0, "-i %s/train0.bin -b 2 -e %s/run0/model_00000006.bin -x 0 --save bf16 -o %s/half", dir, dir, dir) == 0 &&
          trainer(0, 0, "-i %s/train0.bin -b 2 -e %s/half/model_00000000.bin -x 0 --save bf16 -o %s/half2", dir, dir, dir) == 0 &&
          same_files("half/model_00000000.bin", "half2/model_00000000.bin"), "a bf16 model is not what was saved: %s", output);
    shell("head -c 3000 %s/run0/model_00000006.bin > %s/bytes.txt", dir, dir);
    check(trainer(0, 0, "-i %s/bytes.txt -e d6 --layers 1 --channels 8 --heads 2 --context 16 -x 2 -s 1 -g 9", dir) == 0, "bytes: %s", output);
    char *x;
    size_t bytes = read_file("base/model_00000000.bin", &x);
    const int32_t expected[] = {20240326, 3, 16, 32, 2, 2, 16, 128, 0, 0, 0};
    check(bytes == 1024 + 4 * (128*16 + 16*16 + 2 * (12*16*16 + 13*16) + 2*16) && memcmp(x, expected, sizeof expected) == 0, "a baseline model is not in llm.c's format");
    free(x);
}

// The disk is full, or read-only, from any file operation on: one line, status 1, and what was saved is whole.
static void test_full_disk(void) {
    int operation, status = STATUS_DATA;
    char flags[1024];
    snprintf(flags, sizeof flags, "-i %s/train0.bin %s --mode leapfrog -o %s/disk", dir, tiny, dir);
    for (operation = 1; status == STATUS_DATA && operation < 200; operation += brief ? 11 : 1) {
        shell("rm -rf %s/disk", dir);
        status = trainer(FULL + operation, 0, "%s", flags);
        if (status == 0) break;
        check(status == STATUS_DATA && one_line("cannot write"), "a disk full from operation %d on ended with %d: %s", operation, status, output);
        check(trainer(0, 0, "%s -y 1", flags) == 0, "after a disk full from operation %d on it did not resume: %s", operation, output);
        check(operation == 1 || same_files("disk/model_00000006.bin", "firstdisk.bin"), "a disk full from operation %d on changed the result", operation);
        if (operation == 1) shell("cp %s/disk/model_00000006.bin %s/firstdisk.bin", dir, dir);
    }
    check(status == 0 && operation > 20, "only %d file operations", operation);
}

// Bad input: an exit status, and exactly one line that contains the word. D/ is the folder of the tests.
typedef struct { int status; const char *word, *flags; } Refusal;
enum { TRAINER, SAMPLER, EVALUATOR };
static void check_refusals(int program, const Refusal *cases, size_t count) {
    for (const Refusal *c = cases; c < cases + count; c++) {
        char flags[1024] = "";
        for (const char *p = c->flags; *p; p++) {
            if (p[0] == 'D' && p[1] == '/') strcat(flags, dir);
            else strncat(flags, p, 1);
        }
        int status = program == SAMPLER ? sampler("%s", flags) : program == EVALUATOR ? evaluator("%s", flags) : trainer(0, 0, "%s", flags);
        check(status == c->status && one_line(c->word), "%s: status %d for %d, one line with \"%s\" expected: %s", c->flags, status, c->status, c->word, output);
    }
}

static void test_bad_input(void) {
    static const Refusal cases[] = {
        {2, "-i", "-e d12"},
        {2, "no such flag", "-i D/train0.bin --frobnicate"},
        {2, "twice", "-i D/train0.bin -b 2 -b 4"},
        {2, "needs a value", "-i D/train0.bin -b"},
        {2, "-b 0", "-i D/train0.bin -b 0"},
        {2, "-b 4x", "-i D/train0.bin -b 4x"},
        {2, "-b 99999999999999999999", "-i D/train0.bin -b 99999999999999999999"},
        {2, "-l nan", "-i D/train0.bin -l nan"},
        {2, "midpoint", "-i D/train0.bin --mode euler"},
        {2, "reversed", "-i D/train0.bin --mode baseline --memory reverse"},
        {2, "reversed", "-i D/train0.bin --mode baseline --memory auto"},
        {2, "--memory auto", "-i D/train0.bin --budget 1G"},
        {2, "--budget 1024:", "-i D/train0.bin --memory auto --budget 1K"},
        {2, "--budget 3145728:", "-i D/train0.bin --memory auto --budget 3M"},
        {2, "--budget 536870912:", "-i D/train0.bin --memory auto --budget 0.5G"},
        {2, "K, M or G", "-i D/train0.bin --memory auto --budget 1T"},
        {2, "K, M or G", "-i D/train0.bin --memory auto --budget G"},
        {2, "K, M or G", "-i D/train0.bin --memory auto --budget 1GB"},
        {2, "K, M or G", "-i D/train0.bin --memory auto --budget -1G"},
        {2, "K, M or G", "-i D/train0.bin --memory auto --budget nan"},
        {2, "flag of ./sample_rev_gpt2", "-e d6 --prompt a"},
        {2, "./eval_rev_gpt2", "-e d6 -j D/val.bin --eval"},
        {2, "flag of ./sample_rev_gpt2", "-e d6 -i D/train0.bin --logits D/x.npy"},
        {2, "./sample_rev_gpt2", "-e d6 -i D/train0.bin --temperature 1"},
        {2, "./sample_rev_gpt2", "-e d6 -i D/train0.bin --top-k 3"},
        {2, "float32", "-i D/train0.bin --precision half"},
        {2, "fixed", "-i D/train0.bin --mode baseline --stream fixed"},
        {2, "--grid", "-i D/train0.bin --stream float --grid 20"},
        {2, "multiple of 1/256", "-i D/train0.bin --mode bdia --coefficient 0.001"},
        {2, "as it was", "-i D/train0.bin --mode bdia --coefficient 0"},
        {2, "--coefficient 0.06250001:", "-i D/train0.bin --mode bdia --coefficient 0.06250001"},
        {3, "the teacher, --distill", "-e D/bytes0.bin -i D/thirty.txt -b 1 -t 16 -x 2 --mode bdia --distill D/bytes_nan.bin"},
        {1, "no bdia has coefficient -16", "-i D/train0.bin -e D/bdia1.bin"},
        {2, "--coefficient -1:", "-i D/train0.bin --mode bdia --coefficient -1"},
        {2, "--coefficient 1.5", "-i D/train0.bin --mode bdia --coefficient 1.5"},
        {2, "is for --mode retrofit", "-i D/train0.bin --mode bdia --fixed-point 2"},
        {2, "are for --mode retrofit and bdia", "-i D/train0.bin --mode midpoint --stem 1"},
        {2, "are for --mode retrofit and bdia", "-i D/train0.bin -e D/base/model_00000000.bin --coefficient 1"},
        {2, "takes 1 to 12", "-i D/train0.bin --mode retrofit --stem 0"},
        {2, "takes 0 to 6", "-i D/train0.bin -e d6 --mode bdia --stem 7"},
        {2, "every rounding by 16", "-i D/train0.bin --mode bdia --stream float -t 16"},
        {2, "bdia has no --step-size", "-i D/train0.bin --mode bdia --step-size 1"},
        {2, "--loss kl needs --distill", "-i D/train0.bin --loss kl"},
        {1, "No such file", "-i D/train0.bin --distill D/nothing.bin"},
        {2, "a baseline is meant", "-i D/train0.bin --distill D/run0/model_00000006.bin"},
        {2, "but the model has", "-i D/train0.bin -e d6 --distill D/base/model_00000000.bin"},
        {2, "midpoint network", "-i D/train0.bin -e D/run0/model_00000006.bin --mode bdia"},
        {1, "no bdia has coefficient 0", "-i D/train0.bin -e D/bdia0.bin"},
        {1, "no bdia has coefficient -1 / 2^9", "-i D/train0.bin -e D/bdia9.bin"},
        {2, "--help", "-i D/train0.bin -h 1"},
        {2, "no such flag", "-i D/train0.bin -r 1"},
        {2, "heads", "-i D/train0.bin -e d6 --heads 5"},
        {2, "context", "-i D/train0.bin -e d6 --context 16 -t 32"},
        {2, "multiple", "-i D/train0.bin -e d6 -b 2 -t 16 -d 33"},
        {2, "keeps them", "-i D/train0.bin -e D/run0/model_00000006.bin --layers 3"},
        {2, "--step-size", "-i D/train0.bin -e d6 --step-size x"},
        {1, "shards.bin has", "-i D/shard*.bin -e d6 -b 1 -t 16"},
        {2, "midpoint network", "-i D/train0.bin -e D/run0/model_00000006.bin --mode leapfrog"},
        {2, "d6, d12", "-i D/train0.bin -e d7"},
        {2, "-y 1 needs -o", "-i D/train0.bin -y 1"},
        {2, "needs -o", "-i D/train0.bin -n 5"},
        {2, "-x is missing", "-i D/train0.bin -e d6 -b 1 -t 16 --shuffle"},
        {2, "-l 1e999", "-i D/train0.bin -l 1e999"},
        {2, "-d -5", "-i D/train0.bin -d -5"},
        {2, "-b 1e3", "-i D/train0.bin -b 1e3"},
        {2, "2^30", "-i D/train0.bin -e d6 --context 1000000 -b 100000"},
        {1, "not a log", "-i D/train0.bin -e d6 --layers 1 --channels 8 --heads 1 -b 1 -t 16 -y 1 -o D/foreign"},
        {2, "others of llm.c", "-i D/train0.bin -pn 2"},
        {1, "at token 299", "-e d6 --layers 1 -i D/v300.bin -x 0 -s 1 --tokenizer D/cut.bin"},
        {1, "goes on", "-e d6 --layers 1 -i D/v300.bin -x 0 -s 1 --tokenizer D/long.bin"},
        {1, "end of text", "-e d6 --layers 1 -i D/v300.bin -x 0 -s 1 --tokenizer D/end.bin"},
        {1, "not a model file", "-i D/train0.bin -e D/empty.bin"},
        {1, "not a token file", "-i D/empty.bin"},
        {1, "has 0 tokens", "-i D/empty.txt -b 1 -t 16"},
        {1, "has 1 tokens", "-i D/one.txt -b 1 -t 16"},
        {1, "not a regular file", "-i D/"},
        {1, "not a regular file", "-i D/train0.bin -e D/"},
        {1, "a vocabulary of 70000", "-i D/v70000.bin"},
        {1, "-5 tokens", "-i D/negative.bin"},
        {1, "?name", "-i D/a\nname.bin"},
        {1, "No such file", "-i D/nothing.bin"},
        {1, "not a token file", "-i D/run0/model_00000006.bin"},
        {1, "instead of", "-i D/short.bin"},
        {1, "too short", "-i D/train0.bin -e d6 -b 64 -t 1024"},
        {1, "vocabulary", "-i D/train0.bin -j D/other.bin -e d6 -b 1 -t 16"},
        {1, "but the vocabulary has 6", "-i D/small.bin -e d6 --layers 1 --channels 8 --heads 1 -b 1 -t 16"},
        {1, "No such file", "-i D/train0.bin -e D/nothing.bin"},
        {1, "not a model file", "-i D/train0.bin -e D/train0.bin"},
        {1, "cannot make", "-i D/train0.bin -e d6 --layers 1 --channels 8 --heads 1 -b 1 -t 16 -o D/no/such/place"},
        {3, "out of memory", "-i D/train0.bin -e d48 --layers 65536 --channels 4096 --heads 64 -b 1 -t 16"},
#ifdef TWIN  // what a GPU's kernels do not take
        {2, "heads of 136 channels", "-i D/train0.bin -e d6 --layers 1 --channels 136 --heads 1 -b 1 -t 16"},
        {2, "4104 channels", "-i D/train0.bin -e d6 --layers 1 --channels 4104 --heads 54 -b 1 -t 16"},
        {2, "65535 sequences", "-i D/train0.bin -e d6 --layers 1 --channels 8 --heads 1 -b 65536 -t 1 --chunk 65536"},
        {2, "for the scores of", "-i D/train0.bin -e d6 --layers 1 --channels 8 --heads 1 --context 100000 -b 1 -t 16 -x 0 -s 1 -g 99999"},
#endif
    };
    static const Refusal sample_cases[] = {
        {2, "no such flag", "-e d6 --prompt a --distill D/base/model_00000000.bin"},
        {2, "--temperature", "-e d6 --prompt a --temperature -1"},
        {2, "--top-k", "-e d6 --prompt a --top-k x"},
        {2, "--prompt needs a value", "-e d6 --prompt"},
        {2, "no such flag", "-e d6 --prompt a -x 5"},
        {1, "is no .npy", "-e D/run0/model_00000006.bin -i D/train0.bin -b 1 -t 16 --logits D/run0/log.csv"},
        {1, "not a regular file", "-e D/run0/model_00000006.bin -i D/train0.bin -b 1 -t 16 --logits /dev/null"},
        {1, "File exists", "-e D/run0/model_00000006.bin -i D/train0.bin -b 1 -t 16 --logits D/new.npy"},
        {1, "too short", "-e D/bytes/model_00000002.bin -i D/thirty.txt -b 4 -t 16 --logits D/y.npy"},
        {3, "logit of token", "-e D/nan.bin --prompt abc"},
        {3, "logit of token 0 at position 0", "-e D/nan.bin --prompt abc --logits D/nan.npy"},
        {2, "longer than the context", "-e D/bytes/model_00000002.bin --prompt abcdefghijklmnopqrstuvwxyzabcdefghi"},
        {2, "-i is missing", "-e d6 --logits D/x.npy"},
        {1, "--tokenizer says where", "-e D/run0/model_00000006.bin --prompt abc"},
        {1, "No such file", "-e D/run0/model_00000006.bin --prompt a --tokenizer D/nothing.bin"},
        {1, "not a tokenizer file", "-e D/run0/model_00000006.bin --prompt a --tokenizer D/train0.bin"},
        {1, "of 300 tokens, but the model has 32", "-e D/run0/model_00000006.bin --prompt a --tokenizer D/tokenizer300.bin"},
        {1, "cannot write", "-e D/run0/model_00000006.bin -i D/train0.bin -b 1 -t 16 --logits D/no/such/x.npy"},
        {2, "no such flag", "-e m.bin --prompt x --memory store"},
        {2, "./eval_rev_gpt2", "-e d6 --prompt a --eval"},
        {2, "no such flag", "-e d6 --prompt a -h 1"},
        {2, "twice", "-e d6 --prompt a --prompt b"},
        {2, "--prompt is missing", "-e d6"},
        {2, "-g 0", "-e d6 --prompt a -g 0"},
        {2, "longer than the context", "-e D/run0/model_00000006.bin -i D/train0.bin -b 1 -t 17 --logits D/y.npy"},
        {2, "midpoint network", "-e D/run0/model_00000006.bin --prompt a --mode leapfrog"},
        {1, "No such file", "-e D/nothing.bin --prompt a"},
        {1, "No such file", "-e d6 -i D/nothing.bin --logits D/y.npy"},
        {1, "not a model file", "-e D/train0.bin --prompt a"},
        {1, "its vocabulary has 64", "-e D/run0/model_00000006.bin -i D/other.bin -b 1 -t 16 --logits D/y.npy"},
    };
    static const Refusal eval_cases[] = {
        {2, "-j is missing", "-e d6"},
        {2, "no such flag", "-e d6 -j D/val.bin -o D/nowhere"},
        {2, "no such flag", "-e m.bin -j D/val.bin --memory auto --budget 1G"},
        {2, "a trainer that has it", "-e m.bin -j D/val.bin --profile"},
        {2, "flag of ./sample_rev_gpt2", "-e d6 -j D/val.bin --prompt a"},
        {3, "the teacher, --distill", "-e D/bytes0.bin -j D/thirty.txt -b 1 -t 16 --distill D/bytes_nan.bin"},
        {3, "the loss is not a finite number", "-e D/bytes_nan.bin -j D/thirty.txt -b 1 -t 16"},
        {2, "midpoint network", "-e D/run0/model_00000006.bin -j D/val.bin --mode bdia"},
        {2, "a baseline is meant", "-e D/run0/model_00000006.bin -j D/val.bin --distill D/run0/model_00000006.bin"},
        {2, "longer than the context", "-e D/run0/model_00000006.bin -j D/val.bin -t 17"},
        {1, "too short", "-e D/bytes0.bin -j D/thirty.txt -b 4 -t 16"},
        {1, "vocabulary", "-e D/run0/model_00000006.bin -j D/other.bin -b 1 -t 16"},
        {1, "No such file", "-e D/run0/model_00000006.bin -j D/nothing.bin"},
        {1, "No such file", "-e D/nothing.bin -j D/val.bin"},
    };
    write_tokens("short.bin", 50, 32, 100);
    write_tokens("other.bin", 500, 64, 500);
    write_tokens("small.bin", 500, 6, 500);
    write_tokens("v300.bin", 5000, 300, 5000);
    write_tokens("v70000.bin", 500, 70000, 500);
    write_tokens("negative.bin", 500, 32, -5);
    write_tokenizer("cut.bin", 299, 0, 300);
    write_tokenizer("long.bin", 301, 0, 300);
    write_tokenizer("end.bin", 300, 300, 300);
    // a model of bytes with a weight that is NaN, for what reads models; targets for --logits; a log of something else
    shell("cp %s/bytes/model_00000002.bin %s/nan.bin; printf '\\000\\000\\300\\177' | dd of=%s/nan.bin bs=1 seek=1024 conv=notrunc 2> %s/stderr", dir, dir, dir, dir);
    shell("cd %s; cp there0/model_00000000.bin bdia0.bin; cp bdia0.bin bdia9.bin; printf '\\000\\000\\000\\000' | dd of=bdia0.bin bs=1 seek=64 conv=notrunc 2> stderr; "
          "printf '\\011' | dd of=bdia9.bin bs=1 seek=52 conv=notrunc 2> stderr; cp bdia0.bin bdia1.bin; "
          "printf '\\360\\377\\377\\377' | dd of=bdia1.bin bs=1 seek=64 conv=notrunc 2> stderr", dir);
    check(trainer(0, 0, "-i %s/bytes.txt -e d6 --layers 2 --channels 8 --heads 2 --context 32 --mode baseline -x 0 -o %s/bytes_base", dir, dir) == 0, "%s", output);
    shell("cd %s; cp bytes_base/model_00000000.bin bytes0.bin; cp bytes0.bin bytes_nan.bin; printf '\\000\\000\\300\\177' | dd of=bytes_nan.bin bs=1 seek=1024 conv=notrunc 2> stderr", dir);
    shell(": > %s/new.npy.tmp; mkdir %s/foreign; echo a,b,c > %s/foreign/log.csv", dir, dir, dir);
    shell(": > %s/empty.bin; : > %s/empty.txt; printf x > %s/one.txt; printf 12345678901234567890123456789 > %s/thirty.txt", dir, dir, dir, dir);
    write_tokens("shards.bin", 100, 32, 100);
    write_tokens("shards2.bin", 100, 64, 100);
    check_refusals(TRAINER, cases, sizeof cases / sizeof cases[0]);
    check_refusals(SAMPLER, sample_cases, sizeof sample_cases / sizeof sample_cases[0]);
    check_refusals(EVALUATOR, eval_cases, sizeof eval_cases / sizeof eval_cases[0]);
    shell("! ls %s | grep nan.npy", dir);  // logits that are no numbers leave no file, half-way or whole
    // a loss that is not a number names the step, and the checkpoint before stays
    int status = trainer(0, 0, "-i %s/train0.bin %s --mode baseline -l 1000 -c 1000 -x 50 -o %s/nan", dir, "-e d6 --layers 2 --channels 16 --heads 2 --context 16 -b 2 -t 16 -n 1", dir);
    char *x = NULL;
    check(status == STATUS_NUMBERS && strstr(output, "step ") && read_file("nan/log.csv", &x) > 0, "a run that blows up ended with %d: %s", status, output);
    free(x);
    status = trainer(0, 0, "-i %s/train0.bin %s --mode midpoint -l 1000 -c 1000 -x 50", dir, "-e d6 --layers 2 --channels 16 --heads 2 --context 16 -b 2 -t 16");
    check(status == STATUS_NUMBERS && strstr(output, "grid"), "streams that leave the range ended with %d: %s", status, output);
    test_full_disk();
    // whoever reads the output goes away: the step is finished and saved
    shell("%s --trainer 0 -i %s/train0.bin %s -x 9000 -n 0 -o %s/pipe 2> %s/stderr | head -n 3 > /dev/null; test -e %s/pipe/state_0000*.bin && grep -q 'its reader has gone' %s/stderr",
          self, dir, "-e d6 --layers 2 --channels 16 --heads 2 --context 16 -b 2 -t 16", dir, dir, dir, dir);
    // a directory that vanishes
    shell("(i=0; while [ ! -e %s/gone/model_00000003.bin ] && [ $((i += 1)) -lt 3000 ]; do sleep 0.01; done; mv %s/gone %s/went) &", dir, dir, dir);
    status = trainer(0, 0, "-i %s/train0.bin %s -x 9000 -n 1 -o %s/gone", dir, "-e d6 --layers 2 --channels 16 --heads 2 --context 16 -b 2 -t 16", dir);
    check(status == STATUS_DATA && one_line("cannot write"), "a directory that vanished ended with %d: %s", status, output);
#if !defined(__SANITIZE_ADDRESS__) && !defined(TWIN)  // a driver reserves more, and a GPU's memory is not this
    // less address space than the plan: said before anything is allocated
    shell("ulimit -v 1000000; %s --trainer 0 -i %s/train0.bin -e d24 -b 16 -t 16 2> %s/stderr > %s/stdout; test $? = 3 && grep -q 'the machine has 0.9' %s/stderr", self, dir, dir, dir, dir);
#endif
    // weights that have blown up are not saved over a checkpoint that computes
    status = trainer(0, 0, "-i %s/train0.bin %s -l 1 -c 1000 -x 30 -nk 1 -n 1 -o %s/blow", dir, "-e d6 --layers 2 --channels 16 --heads 2 --context 16", dir);
    check(status == STATUS_NUMBERS, "a run that blows up ended with %d: %s", status, output);
    for (int i = 1; i < 30; i++) {
        char name[64], *x;
        snprintf(name, sizeof name, "blow/model_%08d.bin", i);
        if (read_file(name, &x) > 0)
            check(trainer(0, 0, "-i %s/train0.bin -j %s/val.bin -b 4 -e %s/%s -x 0", dir, dir, dir, name) == 0, "%s does not compute: %s", name, output);
        free(x);
    }
    // a model that was changed does not resume, nor do two runs share a directory
    shell("cp -r %s/run0 %s/forged; cp %s/run0/model_00000002.bin %s/forged/model_00000006.bin", dir, dir, dir, dir);
    status = trainer(0, 0, "-i %s/train0.bin %s --mode midpoint -y 1 -o %s/forged", dir, tiny, dir);
    check(status == STATUS_DATA && strstr(output, "checksum"), "another step's model resumed with %d: %s", status, output);
    shell("mkdir %s/busy", dir);
    char busy[PATH];
    snprintf(busy, sizeof busy, "%s/busy", dir);
    int lock = open(busy, O_RDONLY);
    flock(lock, LOCK_EX);
    status = trainer(0, 0, "-i %s/train0.bin %s -o %s/busy", dir, tiny, dir);
    check(status == STATUS_DATA && strstr(output, "another run"), "a directory in use was taken: %d %s", status, output);
    close(lock);
    check(trainer(0, 0, "-x 1 -i %s/train0.bin -e d6 -t 16 -o %s/run0", dir, dir) == STATUS_USAGE, "a directory of another run was taken");
    for (int cut = 0; cut < 2; cut++) {
        shell("cp %s/run0/model_00000006.bin %s/broken.bin", dir, dir);
        damage("broken.bin", cut ? 3000 : 13, cut);
        status = trainer(0, 0, "-i %s/train0.bin -e %s/broken.bin -b 2 -x 1", dir, dir);
        check(status == STATUS_DATA, "a broken model ended with %d: %s", status, output);
    }
}

// What a directory holds are complete pairs; names that only begin like one are none, after whatever they are read.
static void test_find_checkpoints(void) {
    shell("mkdir %s/names; cd %s/names; touch model_00000003.bin state_00000003.bin model_00000004.bin state_00000007.bin "
          "state_00000009.bin model_00000007.xyz model_00000009.bak model_0000000.bin model_00000005.bin.tmp", dir, dir);
    char path[PATH];
    snprintf(path, sizeof path, "%s/names", dir);
    Checkpoints c = find_checkpoints(path);
    check(c.count == 1 && c.first == 3 && c.last == 3 && c.models == 2, "%d pairs from %d to %d, %d models", c.count, c.first, c.last, c.models);
}

// Batches in order cover every shard once; random offsets stay inside.
static void test_batches(void) {
    Model m;
    Data d;
    char pattern[PATH];
    memset(&m, 0, sizeof m);
    m.net.L = 1, m.net.C = 8, m.net.NH = 1, m.net.V = 32, m.net.Vp = 128, m.net.maxT = 16, m.net.grid = 20;
    set_mode(&m.net, MIDPOINT);
    m.B = 2, m.T = 16, m.chunk = 2, m.head_chunk = 32, m.memory = REVERSE;
    plan(&m), model_alloc(&m);
    snprintf(pattern, sizeof pattern, "%s/train*.bin", dir);
    data_open(&d, pattern);
    check(d.shard_count == 2 && d.V == 32, "%d shards with vocabulary %d", d.shard_count, d.V);
    int64_t batches = all_places(&d, 2, 16, 0), first = (d.shards[0].count - 1) / 32;
    check(batches == first + (d.shards[1].count - 1) / 32, "%d batches", (int)batches);
    for (int64_t i = 0; i <= batches; i++) {
        const Shard *shard = &d.shards[i % batches >= first];
        int64_t at = (i % batches - (i % batches >= first ? first : 0)) * 32;
        unsigned char raw[66];
        int in[32], out[32], same = 1;
        data_batch(&d, &m, (uint64_t)i, 0, 0);
        to_host(in, m.inputs, sizeof in), to_host(out, m.targets, sizeof out);
        if (pread(shard->fd, raw, sizeof raw, 1024 + 2 * at) != sizeof raw) same = 0;
        for (int j = 0; j < 32; j++) same &= in[j] == raw[2*j] && out[j] == raw[2*j + 2];
        check(same, "batch %d is not tokens %d to %d of its shard", (int)i, (int)at, (int)at + 32);
    }
    int different = 0, shifted = 1, first_token = -1;
    for (uint64_t i = 0; i < 200; i++) {
        int in[32], out[32];
        data_batch(&d, &m, i, 1, 42);
        to_host(in, m.inputs, sizeof in), to_host(out, m.targets, sizeof out);
        shifted &= memcmp(in + 1, out, 15 * sizeof(int)) == 0 && memcmp(in + 17, out + 16, 15 * sizeof(int)) == 0;
        different += first_token >= 0 && in[0] != first_token;
        first_token = in[0];
    }
    check(shifted, "targets of a random batch are not its inputs moved by one");
    check(different > 100, "random batches are not random");
    model_free(&m);
    data_close(&d);
}

// ---- what is run

enum { SHORT, ALL };
static const Word words_of_tests[] = {{"short", SHORT}, {"brief", ALL}, {NULL, 0}};

static const Test tests[] = {
    {"batches, text", "batches", test_batches, SHORT},
    {"batches, text", "checkpoints", test_find_checkpoints, SHORT},
    {"batches, text", "text", test_text, SHORT},
#ifndef TWIN
    {"batches, text", "container", test_container_limit, SHORT},
#endif
    {"training, model files, their use", "training", test_training_is_deterministic, SHORT},
    {"training, model files, their use", "use", test_use, SHORT},
    {"training, model files, their use", "convert", test_convert, SHORT},
    {"bad input", "bad-input", test_bad_input, ALL},
    {"dying and resuming", "resume", test_resume, ALL},
    {NULL, NULL, NULL, 0}};

// A test that is run alone is run after those whose files it uses, which come before it in the table.
static const struct { const char *test, *needs; } files[] = {
    {"use", "training"}, {"convert", "training"}, {"bad-input", "text training use convert"}};

static void choose_needed(void) {
    int last = sizeof tests / sizeof tests[0] - 2;
    for (int i = last; i >= 0; i--)
        for (size_t j = 0; j < sizeof files / sizeof files[0]; j++) {
            if (!chosen[i] || strcmp(files[j].test, tests[i].name) != 0) continue;
            for (int k = 0; k < i; k++) chosen[k] |= strstr(files[j].needs, tests[k].name) != NULL;
        }
}

int main(int argc, char **argv) {
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
    choose_tests(tests, words_of_tests, argc, argv);
    choose_needed();
    for (int i = 1; i < argc; i++) brief |= strcmp(argv[i], "brief") == 0;
    if (!mkdtemp(dir)) die(STATUS_DATA, "cannot make %s", dir);
    write_tokens("train0.bin", 700, 32, 700);
    write_tokens("train1.bin", 450, 32, 450);
    write_tokens("val.bin", 300, 32, 300);
    for (const Test *t = tests; t->name; t++)
        if (chosen[t - tests]) run_test(t);
    shell("rm -rf %s", dir);
    return report();
}
