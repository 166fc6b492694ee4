/*
choices.h: multiple choice. A question has completions of a context, and the network chooses the likeliest.
The files are dev/eval/choices.py's, or llm.c's evaluation files, such as its HellaSwag.

    int32 header[256]   20240522, version, questions, words of the longest question, vocabulary (0: 50257)
    version 2           a question is uint16 words: 65535, how many words it has (low, high), which completion
                        is right, how many there are, and of each: its tokens, how many of them are context,
                        its length in characters, the tokens
    version 1, llm.c's  65535, bytes, number, right completion, completions, tokens of the context, these, and
                        of each completion: its tokens, these

eval_rev_gpt2 includes it for --choices; so does the trainer, which `make` builds with it, to choose every -v
steps. A completion's score is the sum of its tokens' log-likelihoods. What has more tokens than the context
loses its first ones.
*/

typedef struct {
    int question, context, ending, characters;  // tokens of the context, and of what is scored after it
    const uint16_t *before, *after;             // these tokens
    int inputs;                                 // tokens that the network reads
    int row, state;                             // where a pass has it
    double score[2];                            // of the network, and of its teacher
} Completion;

typedef struct {
    const char *path;
    int V, questions, count;  // of completions
    uint16_t *words;
    int *labels, *first;      // (questions), (questions + 1): the right completion, the first one's place
    Completion *all;
} Choices;

// ---- reading

typedef struct { const uint16_t *at, *end; const char *path; int question; } Reader;

static const uint16_t *take_words(Reader *r, int64_t count) {
    const uint16_t *at = r->at;
    if (count > r->end - at) die(STATUS_DATA, "%s: ends within question %d", r->path, r->question);
    r->at += count;
    return at;
}
static int take_word(Reader *r) { return *take_words(r, 1); }

static void wrong_question(const Reader *r, const char *what) {
    die(STATUS_DATA, "%s: question %d %s", r->path, r->question, what);
}

static void add_completion(Choices *c, const Reader *r, Completion added) {
    if (added.context < 1 || added.ending < 1)
        wrong_question(r, "has a completion without a context or without tokens");
    for (int i = 0; i < added.context + added.ending; i++) {
        int token = i < added.context ? added.before[i] : added.after[i - added.context];
        if (token >= c->V) wrong_question(r, "has a token beyond the vocabulary");
    }
    added.question = r->question;
    c->all[c->count++] = added;
}

static void read_question(Choices *c, Reader *r, int version) {
    Completion added;
    memset(&added, 0, sizeof added);
    const uint16_t *begin = r->at;
    if (take_word(r) != 65535) wrong_question(r, "does not begin with 65535");
    const int low = take_word(r), high = take_word(r);  // in version 1 bytes, and the question's number
    const int64_t words = version == 1 ? low / 2 : low | (int64_t)high << 16;
    const int label = take_word(r), completions = take_word(r);
    if (label >= completions) wrong_question(r, "has no completion that is right");
    if (version == 1) {
        added.context = take_word(r);
        added.before = take_words(r, added.context);
    }
    for (int i = 0; i < completions; i++) {
        added.ending = take_word(r);
        if (version == 2) {
            added.context = take_word(r);
            added.ending -= added.context;
            added.characters = take_word(r);
            added.before = take_words(r, added.context);
        }
        if (added.ending > 0) added.after = take_words(r, added.ending);
        if (version == 1) added.characters = added.ending;
        add_completion(c, r, added);
    }
    if (r->at - begin != words) wrong_question(r, "is not as long as it says");
    c->labels[r->question] = label;
    c->first[r->question + 1] = c->count;
}

static void choices_open(Choices *c, const char *path) {
    int32_t header[256];
    memset(c, 0, sizeof *c);
    FILE *f = open_input(path, header, 20240522, "file of choices");
    checked(path, "version", header[1], 1, 2);
    size_t bytes = size_of(f, path) - sizeof header;
    c->path = path;
    c->questions = header[2];
    c->V = or_else(header[1] == 2 ? header[4] : 0, GPT2_V);
    if (c->questions < 1 || (size_t)c->questions > bytes / 2)
        die(STATUS_DATA, "%s: %d questions in %zu bytes", path, c->questions, bytes);
    c->words = (uint16_t *)malloc(bytes);
    c->labels = (int *)malloc((size_t)c->questions * sizeof(int));
    c->first = (int *)calloc((size_t)c->questions + 1, sizeof(int));
    c->all = (Completion *)malloc(bytes / 4 * sizeof(Completion));  // one takes two words at least
    if (!c->words || !c->labels || !c->first || !c->all) die(STATUS_NUMBERS, "out of memory for %s", path);
    if (fread(c->words, 1, bytes, f) != bytes) die(STATUS_DATA, "%s: ends early", path);
    fclose(f);
    Reader r = {c->words, c->words + bytes / 2, path, 0};
    for (; r.question < c->questions; r.question++) read_question(c, &r, header[1]);
    if (r.at != r.end || bytes % 2) die(STATUS_DATA, "%s: goes on after its last question", path);
}

static void choices_close(Choices *c) {
    free(c->words);
    free(c->labels);
    free(c->first);
    free(c->all);
}

// Cuts completions to what the model reads at a time.
static void choices_fit(Choices *c, const Model *m) {
    check_vocabulary(c->path, c->V, m->net.V);
    for (Completion *x = c->all; x < c->all + c->count; x++) {
        int excess = x->context + x->ending - (m->T + 1);
        if (x->ending > m->T) die(STATUS_DATA, "%s: question %d has a completion of %d tokens, but -t is %d",
            c->path, x->question, x->ending, m->T);
        if (excess > 0) x->before += excess;
        if (excess > 0) x->context -= excess;
        x->inputs = x->context + x->ending - 1;
    }
}

// ---- scores

static int token_of(const Completion *x, int i) {
    return i < x->context ? x->before[i] : x->after[i - x->context];
}

static int by_length(const void *a, const void *b) {  // the longest first; then as they come
    const Completion *x = *(const Completion *const *)a, *y = *(const Completion *const *)b;
    if (x->inputs != y->inputs) return y->inputs - x->inputs;
    return (x > y) - (x < y);
}

// Whether two completions are the same to the network, but for their last token
static int same_inputs(const Completion *x, const Completion *y) {
    if (x->question != y->question || x->inputs != y->inputs || x->context != y->context) return 0;
    for (int i = 0; i < x->inputs; i++)
        if (token_of(x, i) != token_of(y, i)) return 0;
    return 1;
}

// A pass: a batch of completions, a row each, but those of the same inputs share one. The head is evaluated
// only where tokens are scored: these states move to the front of the stream, once for each completion.
typedef struct { int completions, states; } Pass;
// How many states the head is evaluated for at a time; and at least, if --head-chunk has room: a CPU sums in
// another order where there are one or two, and a score should not depend on what else is in its batch.
enum { MOST_STATES = 4096, LEAST_STATES = 3 };

// Whether the last of n tokens' slices has so few
static int few_left(int n, int slice) { return n % slice > 0 && n % slice < LEAST_STATES; }

// Takes of the completions that are left, the longest first, as many as the model has room for; g becomes the
// model of that batch, whose inputs are set.
static Pass fill_pass(Model *g, const Model *m, Completion **left, int count, int *inputs) {
    const int T = left[0]->inputs < LEAST_STATES ? smaller_of(LEAST_STATES, m->T) : left[0]->inputs;
    const int rows_a_chunk = smaller_of(m->chunk * m->T / T, 65535 / m->net.NH);
    const int rows = m->B / m->chunk * rows_a_chunk;
    Pass p = {0, 0};
    int row = -1;
    for (Completion *last = NULL; p.completions < count; p.completions++) {
        Completion *x = left[p.completions];
        // states that moved to the front before must not lie where these come from
        int shares = last && same_inputs(x, last) && p.states < row * T + x->context;
        if (!shares && row + 1 == rows) break;
        if (!shares) row++;
        for (int t = 0; t < T && !shares; t++) inputs[row * T + t] = t < x->inputs ? token_of(x, t) : 0;
        x->row = row;
        x->state = p.states;
        p.states += x->ending;
        last = x;
    }
    if (p.states < LEAST_STATES) p.states = smaller_of(LEAST_STATES, m->B * m->T);
    *g = forward_only(m);
    g->B = row + 1;
    g->T = T;
    g->chunk = smaller_of(rows_a_chunk, g->B);
    const int n = g->chunk * T, rest = g->B % g->chunk * T;
    while (g->slice > LEAST_STATES && (few_left(n, g->slice) || few_left(rest, g->slice))) g->slice--;
    to_device(g->inputs, inputs, (size_t)g->B * (size_t)T * sizeof(int));
    return p;
}

// Adds to the scores what states [from, from + n) say; targets (states) is host memory.
static void score_states(Model *g, Pass p, Completion **of, int from, int n, int which, const int *targets) {
    static real_t losses[MOST_STATES];
    to_device(g->targets, targets + from, (size_t)n * sizeof(int));
    head_logits(g, from, n);
    classifier(g->losses, g->logits, g->targets, n, g->net.V, g->net.Vp, 0);
    to_host(losses, g->losses, (size_t)n * sizeof(real_t));
    for (int c = 0; c < p.completions; c++)
        for (int k = 0; k < of[c]->ending; k++)
            if (within(of[c]->state + k, from, from + n - 1))
                of[c]->score[which] -= losses[of[c]->state + k - from];
}

static void score_pass(Model *g, Pass p, Completion **of, int which, int *targets) {
    const size_t C = (size_t)g->net.C;
    forward(g);
    memset(targets, 0, (size_t)p.states * sizeof(int));
    for (int c = 0; c < p.completions; c++)
        for (int k = 0; k < of[c]->ending; k++) {
            size_t to = (size_t)(of[c]->state + k);
            size_t from = (size_t)(of[c]->row * g->T + of[c]->context - 1 + k);
            if (from > to) device_copy(g->cur + to * C, g->cur + from * C, C * sizeof(stream_t));
            targets[to] = of[c]->after[k];
        }
    const int most = smaller_of(g->head_chunk, MOST_STATES);
    for (int i = 0, n; i < p.states; i += n) {
        n = smaller_of(most, p.states - i);
        if (within(p.states - i - n, 1, LEAST_STATES - 1) && n > 2 * LEAST_STATES) n -= LEAST_STATES;
        score_states(g, p, of, i, n, which, targets);
    }
}

// The scores of all completions; which: 1 if the model is a teacher
static void choices_score(const Model *m, Choices *c, int which) {
    const double start = seconds();
    Completion **sorted = (Completion **)malloc((size_t)c->count * sizeof(Completion *));
    int *tokens = (int *)malloc((size_t)m->B * (size_t)m->T * sizeof(int));
    if (!sorted || !tokens) die(STATUS_NUMBERS, "out of memory for %d completions", c->count);
    for (int i = 0; i < c->count; i++) {
        sorted[i] = &c->all[i];
        c->all[i].score[which] = 0;
    }
    qsort(sorted, (size_t)c->count, sizeof *sorted, by_length);
    for (int done = 0, pass = 0; done < c->count && !stops(); pass++) {
        Model g;
        Pass p = fill_pass(&g, m, sorted + done, c->count - done, tokens);
        if (pass % ranks == rank) score_pass(&g, p, sorted + done, which, tokens);
        done += p.completions;
        if (!isatty(2) || rank > 0) continue;
        double left = (seconds() - start) * (c->count - done) / done;
        fprintf(stderr, "\r%s: %d of %d completions, %.0f s left ", c->path, done, c->count, left);
        if (done == c->count) fprintf(stderr, "\r\033[K");
    }
    double *scores = doubles((size_t)c->count);  // of the others' passes they are 0
    for (int i = 0; i < c->count; i++) scores[i] = c->all[i].score[which];
    ranks_combine(scores, (size_t)c->count);
    for (int i = 0; i < c->count; i++) c->all[i].score[which] = scores[i];
    free(scores);
    free(sorted);
    free(tokens);
}

// ---- accuracy

// The completion with the best score, or score a character; of equals the first
static int answer_of(const Choices *c, int question, int which, int normed) {
    int best = c->first[question];
    double most = -INFINITY;
    for (int i = c->first[question]; i < c->first[question + 1]; i++) {
        double score = c->all[i].score[which];
        if (normed) score /= fmax(c->all[i].characters, 1);
        if (score > most) {
            most = score;
            best = i;
        }
    }
    return best - c->first[question];
}

// Sums over questions; same: where the teacher chooses the same; apart: of differences to its scores; scores:
// of all, which are numbers if this is one
typedef struct { int questions, completions; double right, right_normed, same, apart, scores; } Accuracy;

static void add_accuracy(Accuracy *a, const Choices *c) {
    a->questions += c->questions;
    a->completions += c->count;
    for (int i = 0; i < c->count; i++) {
        a->apart += fabs(c->all[i].score[0] - c->all[i].score[1]);
        a->scores += c->all[i].score[0] + c->all[i].score[1];
    }
    for (int q = 0; q < c->questions; q++) {
        a->right += answer_of(c, q, 0, 0) == c->labels[q];
        a->right_normed += answer_of(c, q, 0, 1) == c->labels[q];
        a->same += answer_of(c, q, 0, 0) == answer_of(c, q, 1, 0);
    }
}

// The standard error of a mean of n zeros and ones
static double standard_error(double mean, int n) { return n > 1 ? sqrt(mean * (1 - mean) / (n - 1)) : 0; }

// ---- all files

static struct {
    const char *pattern, *csv;
    glob_t found;
    Choices *files;
    int count;
} asked;

#define CHOICES_OPTION {"--choices", STRING, &asked.pattern, "", 0, 0, \
    "questions with choices of answers: files of dev/eval/choices.py, or a pattern of them in quotes"},

static void choices_end(void) {
    for (int i = 0; i < asked.count; i++) choices_close(&asked.files[i]);
    globfree(&asked.found);
    free(asked.files);
}

static void choices_begin(const Model *m) {
    if (!asked.pattern[0]) return;
    if (!opt.val_every) die(STATUS_USAGE, "--choices needs -v: every how many steps");
    if (glob(asked.pattern, GLOB_NOCHECK, NULL, &asked.found) != 0)
        die(STATUS_DATA, "%s: cannot be searched for", asked.pattern);
    asked.count = (int)asked.found.gl_pathc;
    asked.files = (Choices *)calloc(asked.found.gl_pathc, sizeof(Choices));
    if (!asked.files) die(STATUS_NUMBERS, "out of memory for a list of %d files", asked.count);
    atexit(choices_end);
    for (int i = 0; i < asked.count; i++) {
        choices_open(&asked.files[i], asked.found.gl_pathv[i]);
        choices_fit(&asked.files[i], m);
    }
}

static void print_accuracy(const Accuracy *a) {
    const double n = a->questions, right = a->right / n, normed = a->right_normed / n;
    printf("acc %.4f +- %.4f, ", right, standard_error(right, a->questions));
    printf("acc_norm %.4f +- %.4f, %d questions", normed, standard_error(normed, a->questions), a->questions);
}

// What happens in training every -v steps
static void choices_step(Job *j) {
    Accuracy a = {0, 0, 0, 0, 0, 0, 0};
    if (!asked.count) return;
    for (int i = 0; i < asked.count; i++) {
        choices_score(&j->m, &asked.files[i], 0);
        if (interrupted) return;
        add_accuracy(&a, &asked.files[i]);
    }
    check_numbers(&j->m, j->step, a.scores, NAN);
    printf("step %5d/%d | choices: ", j->step, j->total);
    print_accuracy(&a);
    printf("\n");
    if (j->csv) fprintf(j->csv, "%d,choices_acc,%.8g,,,,,,\n", j->step, a.right / a.questions);
    if (j->csv) fprintf(j->csv, "%d,choices_acc_norm,%.8g,,,,,,\n", j->step, a.right_normed / a.questions);
}
