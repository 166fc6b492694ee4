/*
samples.h: the text that a training writes every -s steps; and what sample.c has of it: the file of a tokenizer, and
the logits of what follows some tokens, with a cache of all before them.

The trainer includes this file where it has empty macros otherwise.
*/

// ---- tokens and their texts

enum { TOKENIZER_MAGIC = 20240328 };
typedef unsigned char Text[256];                       // of a token: its length, then its bytes
typedef struct { int V, eot; Text *texts; } Tokenizer;  // eot: the token between documents, or -1

// Reads llm.c's gpt2_tokenizer.bin, which must suit V tokens. With path NULL a token is a byte, or if V is
// not 256 has no text; GPT-2's end of text is known all the same.
static Tokenizer tokenizer_open(const char *path, int V) {
    Text *texts = (Text *)host_alloc((size_t)V, sizeof(Text), "tokens' texts");
    Tokenizer z = {V, vocabulary_suits(GPT2_V, V) ? GPT2_V - 1 : -1, texts};
    int32_t header[256];
    for (int i = 0; i < V && V == 256; i++) {
        z.texts[i][0] = 1;
        z.texts[i][1] = (unsigned char)i;
    }
    if (!path) return z;
    FILE *f = open_input(path, header, TOKENIZER_MAGIC, "tokenizer file");
    check_vocabulary(path, header[2], V);
    if (checked(path, "version", header[1], 1, 2) == 2) z.eot = header[3];  // version 1 does not say
    checked(path, "end of text", z.eot, -1, header[2] - 1);
    for (int i = 0; i < header[2]; i++) {
        unsigned char *text = z.texts[i];
        if (fread(text, 1, 1, f) != 1 || !text[0] || fread(text + 1, 1, text[0], f) != text[0])
            die(STATUS_DATA, "%s: ends early, or is corrupt, at token %d of %d", path, i, header[2]);
    }
    if (fgetc(f) != EOF) die(STATUS_DATA, "%s: goes on after its last token", path);
    fclose(f);
    return z;
}

// The token that a text without a prompt begins after: an end of text, or of bytes a new line, which fewer tokens
// share as far as they go. Of more whose end of text is not known there is none: -1.
static int first_token(const Tokenizer *z) {
    if (z->eot >= 0 || z->V > 256) return z->eot;
    return '\n' * (z->V > '\n');
}

// Prints a token, a number if it has no text. Of control characters, which from U+80 on are C2 80 to C2 9F,
// a terminal gets newlines and tabs alone.
static void print_token(const Tokenizer *z, int token) {
    static int last;
    if (!z->texts[token][0]) printf("%d ", token);
    for (int i = 1; i <= z->texts[token][0]; i++) {
        int c = z->texts[token][i], control = c < 32 || c == 127 || (last == 0xC2 && c >= 128 && c < 160);
        if (!control || c == '\n' || c == '\t') putchar(last = c);
    }
    fflush(stdout);
}

// ---- what follows

// A row of m->logits, without its padding, to host memory.
static void host_logits(const Model *m, int row, float *logits) {
    static act_t some[65536];
    to_host(some, m->logits + (size_t)row * (size_t)m->net.Vp, (size_t)m->net.V * sizeof(act_t));
    for (int v = 0; v < m->net.V; v++) logits[v] = (float)some[v];
}

// The logits (V) of what follows T tokens, and `past` others whose keys and values are in the cache
static const float *next_logits(Model *m, const int *tokens, int T, int past) {
    static float logits[65536];
    Model g = forward_only(m);
    g.B = 1;
    g.T = T;
    g.past = past;
    g.group = 0;
    if (m->training) g.cache = (act_t *)m->grads;  // nothing else is there between two steps
    to_device(m->inputs, tokens, (size_t)T * sizeof(int));
    forward(&g);
    head_logits(&g, T - 1, 1);
    host_logits(m, 0, logits);
    for (int v = 0; v < m->net.V; v++)
        if (!isfinite(logits[v])) die(STATUS_NUMBERS, "the logit of token %d is not a finite number", v);
    return logits;
}

// Draws a token by softmax(logits), with `draw` uniform in [0, 1).
static int draw_token(const float *logits, int V, double draw) {
    double top = -INFINITY, sum = 0;
    for (int v = 0; v < V; v++)  // not fmax, at which gcc 12 breaks off for arm64
        if (logits[v] > top) top = (double)logits[v];
    for (int v = 0; v < V; v++) sum += exp((double)logits[v] - top);
    for (int v = 0; v < V - 1; v++)
        if ((draw -= exp((double)logits[v] - top) / sum) < 0) return v;
    return V - 1;
}

// ---- in training

#define SAMPLES_OPTION \
    {"-s", INTEGER, &opt.sample_every, "0", 0, 1e9, "sample every so many steps, and at the end; 0: never"}, \
    {"-g", INTEGER, &opt.sample_length, "64", 1, 1 << 24, "tokens a sample, as far as the context reaches"}, \
    {"--tokenizer", STRING, &opt.tokenizer, "", 0, 0, "llm.c's gpt2_tokenizer.bin (beside -i, or here)"},

// --tokenizer; or for GPT-2's vocabulary gpt2_tokenizer.bin, beside the training tokens or here; or NULL.
static const char *find_tokenizer(int V) {
    static char beside[PATH + 32];
    const char *here = "gpt2_tokenizer.bin", *slash = strrchr(opt.train, '/');
    if (opt.tokenizer[0]) return opt.tokenizer;
    if (!vocabulary_suits(GPT2_V, V)) return NULL;
    snprintf(beside, sizeof beside, "%.*s%s", slash ? (int)(slash - opt.train + 1) : 0, opt.train, here);
    if (access(beside, F_OK) == 0) return beside;
    return access(here, F_OK) == 0 ? here : NULL;
}

static Tokenizer sampled;  // of what is being trained, if it is sampled

// A sample's cache lies in the gradients: it has as many tokens as these have room for.
static void samples_begin(Model *m) {
    const Config *net = &m->net;
    size_t token = (size_t)evaluations(net, steps(net)) * cache_width(net) * sizeof(act_t);
    size_t room = parameter_count(net) * sizeof(real_t) / token, context = (size_t)net->maxT;
    if (!opt.sample_every) return;
    sampled = tokenizer_open(find_tokenizer(net->V), net->V);
    m->cache_tokens = smaller_of(opt.sample_length, (int)(room < context ? room : context));
}

// What a sample begins after: if no tokenizer knows an end of text documents may, or it begins as the training text does.
static int sample_begin(Job *j) {
    Shard *s = j->data.shards;
    if (sampled.eot < 0 && j->data.documents) sampled.eot = s->eot;
    int token = first_token(&sampled);
    while (token < 0 && !s->count) s++;
    if (token < 0) read_tokens(&j->data, s, 0, &token, 1);
    return token;
}

static void samples_step(Job *j) {
    int token = sample_begin(j);
    uint64_t seed = (uint64_t)j->run.seed, series = (uint64_t)j->step << 32;
    printf("--- sample after step %d\n", j->step);
    for (int i = 0; i < j->m.cache_tokens && !signalled; i++) {
        const float *logits = next_logits(&j->m, &token, 1, i);
        token = draw_token(logits, sampled.V, random_uniform(seed, RANDOM_SAMPLES, series | (uint64_t)i));
        if (token == sampled.eot) break;
        print_token(&sampled, token);
    }
    printf("\n---\n");
    check_numbers(&j->m, j->step, 0, NAN);
}
