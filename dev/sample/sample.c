/*
sample.c: what a trained model is for. It writes text, or the logits of text, with the trainer's network.

    ./sample_rev_gpt2 -e model.bin --prompt TEXT                       writes TEXT and what comes after it
    ./sample_rev_gpt2 -e model.bin -i tokens.bin -t 20                 goes on after a file's first 20 tokens
    ./sample_rev_gpt2 -e model.bin --prompt TEXT --logits out.npy      the logits of TEXT, for numpy.load
    ./sample_rev_gpt2 -e model.bin -i tokens.bin --logits out.npy      those of the first batch of a file

It includes the trainer, the CUDA twin with -DTWIN, and replaces its main program; with SAMPLE_NO_MAIN it can
be included itself. A text becomes tokens by GPT-2's byte pair encoding: it is cut into words, and a word's
bytes are joined as long as two neighbours make a token. What the network answers is drawn at a temperature,
from the likeliest tokens, and printed in whole characters.
*/
#ifndef REV_GPT2_INCLUDED  // by another program of its kind
#define REV_GPT2_INCLUDED
#define REV_GPT2_NO_MAIN
#define REV_GPT2_SAMPLES "dev/sample/samples.h"
#ifdef TWIN
#include "../../train_rev_gpt2.cu"
#else
#include "../../train_rev_gpt2.c"
#endif
#endif
#include "../output.h"

// ---- a text to tokens

// The tokens by their texts: a hash table of tokens, -1 where a slot is empty
typedef struct { const Tokenizer *z; int *slots; uint32_t mask; } Index;

static int token_length(const Tokenizer *z, int token) { return z->texts[token][0]; }

// The slot of the token whose text is these bytes, or the empty one where it would be.
static int *find_slot(const Index *x, const unsigned char *text, int length) {
    uint32_t hash = 2166136261u;  // FNV-1a
    for (int i = 0; i < length; i++) hash = (hash ^ text[i]) * 16777619u;
    for (;; hash++) {
        int *slot = &x->slots[hash & x->mask];
        if (*slot < 0) return slot;
        if (token_length(x->z, *slot) == length && memcmp(x->z->texts[*slot] + 1, text, (size_t)length) == 0)
            return slot;
    }
}

static Index index_open(const Tokenizer *z) {
    Index x = {z, NULL, 1};
    while (x.mask < 2 * (uint32_t)z->V) x.mask = 2 * x.mask + 1;
    x.slots = (int *)malloc((x.mask + 1) * sizeof(int));
    if (!x.slots) die(STATUS_NUMBERS, "out of memory for an index of %d tokens", z->V);
    for (uint32_t i = 0; i <= x.mask; i++) x.slots[i] = -1;
    for (int i = 0; i < z->V; i++) {
        if (i == z->eot || token_length(z, i) == 0) continue;
        int *slot = find_slot(&x, z->texts[i] + 1, token_length(z, i));
        if (*slot < 0) *slot = i;  // of equal texts the first counts
    }
    return x;
}

// The token whose text is these bytes, or -1; never the end of text.
static int find_token(const Index *x, const unsigned char *text, int length) {
    return length > 255 ? -1 : *find_slot(x, text, length);
}

// What kind of character begins at text, and its bytes in *length: a letter, number, space or other, as GPT-2
// cuts text into words. Beyond ASCII the usual punctuation and symbols are known; elsewhere tokens may differ
// from tiktoken's, never their text.
static char kind_of(const unsigned char *text, int *length) {
    static const struct { unsigned first, last; char kind; } known[] = {  // the first that holds, or a letter
        {'A', 'Z', 'L'}, {'a', 'z', 'L'}, {'0', '9', 'N'}, {9, 13, ' '}, {' ', ' ', ' '}, {0, 0x7F, 'O'},
        {0x85, 0x85, ' '}, {0xA0, 0xA0, ' '}, {0xAA, 0xAA, 'L'}, {0xB5, 0xB5, 'L'}, {0xBA, 0xBA, 'L'},
        {0xB2, 0xB3, 'N'}, {0xB9, 0xB9, 'N'}, {0xBC, 0xBE, 'N'}, {0x80, 0xBF, 'O'}, {0xD7, 0xD7, 'O'},
        {0xF7, 0xF7, 'O'}, {0x300, 0x36F, 'O'}, {0x1680, 0x1680, ' '}, {0x2000, 0x200A, ' '},
        {0x2028, 0x2029, ' '}, {0x202F, 0x202F, ' '}, {0x205F, 0x205F, ' '}, {0x2070, 0x2070, 'N'},
        {0x2071, 0x2071, 'L'}, {0x2074, 0x2079, 'N'}, {0x207F, 0x207F, 'L'}, {0x2080, 0x2089, 'N'},
        {0x2090, 0x209C, 'L'}, {0x2150, 0x2189, 'N'}, {0x2460, 0x249B, 'N'}, {0x200B, 0x2BFF, 'O'},
        {0x3000, 0x3000, ' '}, {0x3005, 0x3007, 'L'}, {0x3001, 0x3020, 'O'}, {0xFE00, 0xFE6F, 'O'},
        {0xFF10, 0xFF19, 'N'}, {0xFF00, 0xFF20, 'O'}, {0x1F000, 0x10FFFF, 'O'}};
    unsigned c = *text;
    *length = 1;
    if (c >= 0x80) {
        c &= c < 0xE0 ? 31 : 15;
        if (*text >= 0xF0) c &= 7;
        for (; (text[*length] & 0xC0) == 0x80 && *length < 4; ++*length) c = c << 6 | (text[*length] & 63);
    }
    for (size_t i = 0; i < sizeof known / sizeof known[0]; i++)
        if (c >= known[i].first && c <= known[i].last) return known[i].kind;
    return 'L';
}

// The length of the first word of text (ended by a 0): GPT-2's pattern 's|'t|'re|'ve|'m|'ll|'d| ?letters|
// ?digits| ?others|spaces, the last of several spaces belonging to the word that follows.
static int word_length(const unsigned char *text) {
    static const char *const endings[] = {"'s", "'t", "'re", "'ve", "'m", "'ll", "'d"};
    int length, at = 0, last = 0;
    for (int i = 0; i < 7; i++)
        if (strncmp((const char *)text, endings[i], strlen(endings[i])) == 0) return (int)strlen(endings[i]);
    if (*text == ' ' && text[1] && kind_of(text + 1, &length) != ' ') at = 1;
    char kind = kind_of(text + at, &length);
    for (; text[at] && kind_of(text + at, &length) == kind; at += length) last = at;
    return kind == ' ' && text[at] && last > 0 ? last : at;
}

// Two neighbours that make a token: where the first begins in its word, and the bytes of both
typedef struct { int token, at, length; } Pair;

// Bytes of a word that are a token: how many, 0 once others swallowed them, and how many the ones before have
typedef struct { int token, length, before; } Segment;

// A word on its way to tokens
typedef struct {
    const Index *x;
    const unsigned char *text;
    int length;
    Segment *segments;  // by the byte they begin at
    Pair *heap;         // pairs that make a token, the lowest first; some have lost their segments meanwhile
    int pairs;
} Encoding;

static int comes_first(Pair a, Pair b) { return a.token != b.token ? a.token < b.token : a.at < b.at; }

static void push_pair(Encoding *w, int at) {
    const int second = at + w->segments[at].length;
    if (second >= w->length) return;
    Pair p = {0, at, w->segments[at].length + w->segments[second].length};
    p.token = find_token(w->x, w->text + at, p.length);
    if (p.token < 0) return;
    int i = w->pairs++;
    for (; i > 0 && comes_first(p, w->heap[(i - 1) / 2]); i = (i - 1) / 2) w->heap[i] = w->heap[(i - 1) / 2];
    w->heap[i] = p;
}

static Pair pop_pair(Encoding *w) {
    Pair first = w->heap[0], last = w->heap[--w->pairs];
    int i = 0;
    for (int child = 1; child < w->pairs; child = 2 * i + 1) {
        if (child + 1 < w->pairs && comes_first(w->heap[child + 1], w->heap[child])) child++;
        if (!comes_first(w->heap[child], last)) break;
        w->heap[i] = w->heap[child];
        i = child;
    }
    w->heap[i] = last;
    return first;
}

// Joins the two segments of a pair, if both are still there.
static void join_pair(Encoding *w, Pair p) {
    Segment *first = &w->segments[p.at];
    const int second = p.at + first->length, after = p.at + p.length;
    if (first->length == 0 || second >= after || second + w->segments[second].length != after) return;
    w->segments[second].length = 0;
    first->length = p.length;
    first->token = p.token;
    if (after < w->length) w->segments[after].before = p.length;
    push_pair(w, p.at);
    if (first->before) push_pair(w, p.at - first->before);
}

// Byte pair encoding: a word begins as its bytes; neighbours are joined as long as any two make a token, and
// always those that make the lowest token, which was learnt first, or the first of these. Returns how many
// tokens it has.
static int encode_word(Encoding *w, int *tokens) {
    int count = 0;
    for (int i = 0; i < w->length; i++) {
        Segment p = {find_token(w->x, w->text + i, 1), 1, i > 0};
        if (p.token < 0) die(STATUS_DATA, "the tokenizer has no token for byte %d of the prompt", w->text[i]);
        w->segments[i] = p;
    }
    w->pairs = 0;
    for (int i = 0; i < w->length; i++) push_pair(w, i);
    while (w->pairs > 0) join_pair(w, pop_pair(w));
    for (int i = 0; i < w->length; i += w->segments[i].length) tokens[count++] = w->segments[i].token;
    return count;
}

// Tokens of `text`, at most one a byte, into `tokens`; returns how many. If special, <|endoftext|> is the
// token between documents, where there is one.
static int encode(const Index *x, const char *text, int special, int *tokens) {
    static const char end_of_text[] = "<|endoftext|>";
    size_t size = strlen(text) + 1;
    Segment *segments = (Segment *)malloc(size * sizeof(Segment));
    Pair *heap = (Pair *)malloc(2 * size * sizeof(Pair));  // a join takes one away, and brings two at most
    char *piece = (char *)malloc(size);                    // of the text, up to an end of text
    int count = 0;
    if (!segments || !heap || !piece) die(STATUS_NUMBERS, "out of memory for a prompt of %zu bytes", size);
    for (const char *end; text; text = end ? end + sizeof end_of_text - 1 : NULL) {
        end = special && x->z->eot >= 0 ? strstr(text, end_of_text) : NULL;
        snprintf(piece, size, "%.*s", end ? (int)(end - text) : (int)strlen(text), text);
        for (const unsigned char *at = (const unsigned char *)piece; *at;) {
            Encoding w = {x, at, word_length(at), segments, heap, 0};
            count += encode_word(&w, tokens + count);
            at += w.length;
        }
        if (end) tokens[count++] = x->z->eot;
    }
    free(segments);
    free(heap);
    free(piece);
    return count;
}

// ---- bytes to a terminal

// A character of UTF-8 on its way to the terminal: `have` of its `length` bytes
typedef struct { unsigned char bytes[4]; int have, length; } Character;

// Prints a byte (-1: the end), whole characters at a time. ASCII's control characters are left out; others,
// and what is no UTF-8, become U+FFFD.
static void print_byte(Character *u, int c) {
    static const uint32_t least[5] = {0, 0, 0xA0, 0x800, 0x10000};  // U+80 to U+9F are control characters
    static const char *const unknown = "\xEF\xBF\xBD";
    if (u->have && (c & 0xC0) != 0x80) {
        fputs(unknown, stdout);
        u->have = 0;
    }
    if (u->have) {
        u->bytes[u->have++] = (unsigned char)c;
        if (u->have < u->length) return;
        uint32_t code = u->bytes[0] & (0x7Fu >> u->length);
        for (int i = 1; i < u->length; i++) code = code << 6 | (u->bytes[i] & 63);
        int valid = code >= least[u->length] && code <= 0x10FFFF && (code < 0xD800 || code >= 0xE000);
        if (valid) fwrite(u->bytes, 1, (size_t)u->length, stdout);
        else fputs(unknown, stdout);
        u->have = 0;
    } else if (c >= 0xC2 && c <= 0xF4) {
        u->bytes[0] = (unsigned char)c;
        u->have = 1;
        u->length = 2 + (c >= 0xE0) + (c >= 0xF0);
    } else if (c >= 0x80) {
        fputs(unknown, stdout);
    } else if ((c >= 32 && c < 127) || c == '\n' || c == '\t') {
        putchar(c);
    }
}

static void print_characters(const Tokenizer *z, Character *u, int token) {
    if (token_length(z, token) == 0) printf("%d ", token);
    for (int i = 1; i <= token_length(z, token); i++) print_byte(u, z->texts[token][i]);
    fflush(stdout);
}

// ---- logits

// Writes the logits of the batch that has gone forward, (B, T, V), as numpy.load reads them.
static void save_logits(Model *m, const char *path) {
    static float logits[65536];
    Output o;
    int N = m->B * m->T, V = m->net.V;
    char shape[118], header[129];
    snprintf(shape, sizeof shape,
             "{'descr': '<f4', 'fortran_order': False, 'shape': (%d, %d, %d), }", m->B, m->T, V);
    // version 1.0, and 118 bytes follow
    snprintf(header, sizeof header, "\x93NUMPY%c%c%c%c%-117s\n", 1, 0, 118, 0, shape);
    output_create(&o, path, "\x93NUMPY");
    output_write(&o, header, sizeof header - 1);
    for (int i = 0; i < N; i++) {
        if (i % m->head_chunk == 0) head_logits(m, i, smaller_of(m->head_chunk, N - i));
        host_logits(m, i % m->head_chunk, logits);
        if (signalled) {
            unlink(o.aside);
            die(STATUS_INTERRUPTED, "interrupted; %s is as it was", path);
        }
        for (int v = 0; v < V; v++) {
            if (isfinite(logits[v])) continue;
            unlink(o.aside);
            die(STATUS_NUMBERS, "the logit of token %d at position %d is not a finite number", v, i);
        }
        output_write(&o, logits, (size_t)V * sizeof(float));
    }
    output_close(&o);
}

// ---- samples

typedef struct { double logit; int token; } Candidate;

// Draws a token by softmax(logits / temperature) among the top_k likeliest (0: all), with `draw` uniform in
// [0, 1). Temperature 0 takes the likeliest; of equals the first counts. logits (V) are finite numbers.
static int draw_among(const float *logits, int V, double temperature, int top_k, double draw) {
    static Candidate best[65536];
    int n = 0, most = top_k > 0 ? smaller_of(top_k, V) : V;
    double top = -INFINITY, sum = 0;
    if (temperature == 0) most = 1;
    for (int v = 0; v < V; v++) {
        Candidate c = {(double)logits[v], v};
        if (n == most && c.logit <= best[n - 1].logit) continue;
        if (n < most) n++;
        int i = n - 1;  // in order, if some are left out
        for (; most < V && i > 0 && best[i - 1].logit < c.logit; i--) best[i] = best[i - 1];
        best[i] = c;
        top = fmax(top, c.logit);
    }
    for (int i = 0; i < n && n > 1; i++) sum += exp((best[i].logit - top) / temperature);
    for (int i = 0; i < n - 1; i++)
        if ((draw -= exp((best[i].logit - top) / temperature) / sum) < 0) return best[i].token;
    return best[n - 1].token;
}

typedef struct { double temperature; int top_k; uint64_t seed, series; } Sampler;  // a series, its draws

// Prints up to `length` tokens after the `given` ones of `prompt` (at least 1), each drawn from what the
// network expects after all before it, until an end of text; returns how many. The cache takes all but one.
static int generate(Model *m, const Tokenizer *z, const int *prompt, int given, int length, Sampler s) {
    Character u = {{0}, 0, 0};
    const float *logits = next_logits(m, prompt, given, 0);
    int drawn = 0;
    for (; drawn < length && !signalled; drawn++) {
        double draw = random_uniform(s.seed, RANDOM_SAMPLES, s.series << 32 | (uint64_t)drawn);
        int token = draw_among(logits, m->net.V, s.temperature, s.top_k, draw);
        if (token == z->eot) break;
        print_characters(z, &u, token);
        if (drawn + 1 < length) logits = next_logits(m, &token, 1, given + drawn);
    }
    print_byte(&u, -1);
    return drawn;
}

// ---- the command line

static struct {
    const char *prompt, *logits;
    double temperature;
    int top_k, plain;
} sample;

static const Option sample_options[] = {
    {"-e", STRING, &opt.start, BLOCK_DEFAULT, 0, NAME, "a model file; or an untrained network: " BLOCK_SIZES},
    {"--prompt", STRING, &sample.prompt, NULL, 0, 0, "generate -g tokens after this text; it may be empty"},
    {"--plain", SWITCH, &sample.plain, "0", 0, 0, "<|endoftext|> in --prompt is text, not the token"},
    {"-g", INTEGER, &opt.sample_length, "64", 1, 1 << 24, "tokens to generate, if the context has room"},
    {"--temperature", NUMBER, &sample.temperature, "1", 0, 100,
     "logits are divided by it; 0 takes the likeliest token"},
    {"--top-k", INTEGER, &sample.top_k, "0", 1, 65536, "draw from the k likeliest tokens; 0: from all"},
    {"--seed", INTEGER, &opt.seed, "1337", 0, 2147483647, "of what is drawn, and of an untrained network"},
    {"--tokenizer", STRING, &opt.tokenizer, "", 0, 0,
     "llm.c's gpt2_tokenizer.bin; for GPT-2's vocabulary it is looked for beside -i and here"},
    {"--logits", STRING, &sample.logits, "", 0, NAME,
     "write the logits of --prompt, or the first batch of -i, to this .npy instead"},
    {"-i", STRING, &opt.train, "", 0, 0,
     "tokens for --logits, or instead of --prompt: a .bin of llm.c, or .txt for bytes"},
    {"-b", INTEGER, &opt.B, "4", 1, 1 << 24, "sequences of -i, for --logits"},
    {"-t", INTEGER, &opt.T, "0", 1, 1 << 24,
     "tokens a sequence of -i; 0: as documents are cut, or the context; for a prompt: how many, 0: all"},
#include "../network_flags.h"
};
enum { SAMPLE_OPTIONS = sizeof sample_options / sizeof sample_options[0] };

static void check_sample_options(void) {
    if (!sample.prompt && !sample.logits[0] && !opt.train[0])
        die(STATUS_USAGE, "--prompt is missing, or -i to go on after, or --logits; --help lists the flags");
    if (!sample.prompt && !opt.train[0])
        die(STATUS_USAGE, "-i is missing: tokens for --logits, a .bin of llm.c or a .txt; or --prompt");
}

// The prompt's tokens, at least one; *given: how many
static int *encode_prompt(const Tokenizer *z, int *given) {
    int *tokens = (int *)malloc((strlen(sample.prompt) + 1) * sizeof(int));
    if (!tokens) die(STATUS_NUMBERS, "out of memory for the prompt");
    if (sample.prompt[0] && !token_length(z, 0))
        die(STATUS_DATA, "--prompt needs the texts of the model's %d tokens: --tokenizer, a file like "
            "gpt2_tokenizer.bin with as many", z->V);
    Index x = index_open(z);
    *given = encode(&x, sample.prompt, !sample.plain, tokens);
    free(x.slots);
    if (!*given && first_token(z) < 0) die(STATUS_USAGE, "--prompt is empty, and nothing says which of the "
        "model's %d tokens ends a text: a --tokenizer may, or -i gives tokens to go on after", z->V);
    if (!*given) tokens[(*given)++] = first_token(z);
    return tokens;
}

// The first -t tokens of a file as a prompt, all if that is 0; *given: how many
static int *read_prompt(Data *d, int V, int *given) {
    Shard *s = d->shards;
    check_vocabulary(s->path, d->V, V);
    if (opt.T > s->count || s->count < 1)
        die(STATUS_DATA, "%s: %" PRId64 " tokens, fewer than a prompt of -t %d", s->path, s->count, opt.T);
    const size_t count = opt.T ? (size_t)opt.T : (size_t)s->count;
    int *tokens = (int *)host_alloc(count, sizeof(int), "tokens of a prompt");
    read_tokens(d, s, 0, tokens, count);
    *given = (int)count;
    return tokens;
}

// The sizes of the batch: that of -b and -t, or a prompt of `given` tokens with a cache for what follows
static void choose_sample_shape(Model *m, int given) {
    if (given > m->net.maxT) die(STATUS_USAGE,
        "a prompt of %d tokens is longer than the context of %d", given, m->net.maxT);
    if (given) {
        opt.B = 1;
        opt.T = given;
    }
    if (given && !sample.logits[0]) {  // the last token is not looked at again
        m->cache_tokens = smaller_of(opt.sample_length + given - 1, m->net.maxT);
        opt.head_chunk = or_else(opt.head_chunk, 1);
    }
    choose_shape(m);
}

// ---- from the flags to the end

static void write_logits(Model *m, Data *d, const int *prompt, int given) {
    if (given) to_device(m->inputs, prompt, (size_t)given * sizeof(int));
    else data_batch(d, m, 0, 0, 0);
    forward(m);
    check_numbers(m, 0, 0, NAN);
    save_logits(m, sample.logits);
}

static void continue_prompt(Model *m, const Tokenizer *z, const int *prompt, int given) {
    Sampler s = {sample.temperature, sample.top_k, (uint64_t)opt.seed, 0};
    Character u = {{0}, 0, 0};
    double start = seconds();
    for (const char *c = sample.prompt; c && *c; c++) print_byte(&u, (unsigned char)*c);
    for (int i = 0; i < given && !sample.prompt; i++) print_characters(z, &u, prompt[i]);
    print_byte(&u, -1);
    int drawn = generate(m, z, prompt, given, m->cache_tokens + 1 - given, s);
    printf("\n");
    fflush(stdout);  // before what goes to stderr
    if (signalled) die(STATUS_INTERRUPTED, "interrupted after %d tokens", drawn);
    check_numbers(m, 0, 0, NAN);
    double spent = seconds() - start;
    fprintf(stderr, "%d tokens after %d in %.2f s, %.1f tokens/s", drawn, given, spent, drawn / spent);
    if (given + drawn > m->net.maxT) fprintf(stderr, "; the context of %d ends here", m->net.maxT);
    fprintf(stderr, "\n");
}

// The whole program; returns the exit status.
int sample_main(int argc, char **argv) {
    static const char usage[] = "sample_rev_" BLOCK_NAME " -e MODEL --prompt TEXT [flags]";
    Model m;
    Data d, no_text;  // a prompt is short, and what is printed is a continuation
    Tokenizer z = {0, -1, NULL};
    int *prompt = NULL, given = 0;
    memset(&m, 0, sizeof m);
    memset(&d, 0, sizeof d);
    memset(&no_text, 0, sizeof no_text);
    parse_options(options, OPTIONS, 1, argv);  // what has no flag here is as the trainer has it
    begin(sample_options, SAMPLE_OPTIONS, usage, argc, argv);
    check_sample_options();
    if (opt.train[0]) data_open(&d, opt.train);
    opt.T = or_else(opt.T, d.documents);
    m.net = choose_network(d.V, -1);
    if (!model_path(-1)) warn("an untrained network: -e names no file");
    if (sample.prompt || !sample.logits[0]) z = tokenizer_open(find_tokenizer(m.net.V), m.net.V);
    if (sample.prompt) prompt = encode_prompt(&z, &given);
    else if (!sample.logits[0]) prompt = read_prompt(&d, m.net.V, &given);
    choose_sample_shape(&m, given);
    if (!given) data_check(&d, opt.train, m.net.V, m.T);
    if (!given && sequences_of(&d, m.T, 0) < m.B)
        die(STATUS_DATA, "%s: fewer than -b %d sequences of -t %d tokens", opt.train, m.B, m.T);
    choose_precision();
    plan(&m);
    load_networks(&m, -1);
    find_grid(&m, &no_text);
    heed_signals();
    if (sample.logits[0]) write_logits(&m, &d, prompt, given);
    else continue_prompt(&m, &z, prompt, given);
    model_free(&m);
    data_close(&d);
    free(z.texts);
    free(prompt);
    return finish();
}

#ifndef SAMPLE_NO_MAIN
int main(int argc, char **argv) {
    spin_briefly(argv);
    return sample_main(argc, argv);
}
#endif
