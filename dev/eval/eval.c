/*
eval.c: how well a model predicts a text, and how often it chooses the right answer, with the trainer's
network and validation.

    ./eval_rev_gpt2 -e model.bin -j tokens.bin                     the loss of each token, and its perplexity
    ./eval_rev_gpt2 -e model.bin --choices piqa.bin                the accuracy on dev/eval/choices.py's files
    ./eval_rev_gpt2 -e gpt2.bin -j tokens.bin --mode bdia --distill gpt2.bin
                                                                   beside a teacher: how near the two are

It includes the trainer, the CUDA twin with -DTWIN, and replaces its main program; with EVAL_NO_MAIN it can be
included itself.
*/
#ifndef REV_GPT2_INCLUDED  // by another program of its kind
#define REV_GPT2_INCLUDED
#define REV_GPT2_NO_MAIN
#ifndef REV_GPT2_CHOICES
#define REV_GPT2_CHOICES "dev/eval/choices.h"
#endif
#ifdef TWIN
#include "../../train_rev_gpt2.cu"
#else
#include "../../train_rev_gpt2.c"
#endif
#endif
#include "../output.h"

// ---- the command line

static const Option eval_options[] = {
    {"-e", STRING, &opt.start, BLOCK_DEFAULT, 0, NAME, "a model file; or an untrained network: " BLOCK_SIZES},
    {"-j", STRING, &opt.val, "", 0, 0,
     "tokens: a file or a pattern in quotes (.bin of llm.c, or .txt for bytes)"},
    CHOICES_OPTION
    {"--csv", STRING, &asked.csv, "", 0, NAME, "write the log-likelihoods of all choices to this file"},
    {"-b", INTEGER, &opt.B, "4", 1, 1 << 24, "sequences a batch"},
    {"-t", INTEGER, &opt.T, "0", 1, 1 << 24, "tokens a sequence; 0: as documents are cut, or the context"},
    {"-m", INTEGER, &opt.val_batches, "20", 0, 1e9, "batches, if there are that many; 0: all"},
    {"--distill", STRING, &opt.distill, "", 0, NAME,
     "a baseline model file of the same shape: the teacher to be compared with"},
    RANKS_OPTION
#include "../network_flags.h"
};
enum { EVAL_OPTIONS = sizeof eval_options / sizeof eval_options[0] };

static void check_eval_options(void) {
    if (!opt.val[0] && !asked.pattern[0]) die(STATUS_USAGE, "-j is missing: the tokens to evaluate on, a "
        ".bin of llm.c or a .txt; or --choices; --help lists the flags");
    if (asked.csv[0] && !asked.pattern[0]) die(STATUS_USAGE, "--csv is for --choices");
}

// ---- from the flags to the end

static void end_if_interrupted(void) {  // sums are of a part of the tokens then
    if (interrupted) die(STATUS_INTERRUPTED, "interrupted");
}

static void evaluate(Model *m, Data *d) {
    double means[METRICS];
    int64_t sequences = validate(m, d, means);
    end_if_interrupted();
    check_numbers(m, 0, means[LOSS], NAN);
    printf("validation loss %.4f, perplexity %.2f, ", means[LOSS], exp(means[LOSS]));
    printf("%" PRId64 " sequences of -t %d, %s", sequences, m->T, network_flags(&m->net));
    print_comparison(m, means);
}

static void output_scores(Output *o) { output_create(o, asked.csv, "file,question,"); }

// Every completion's score, as the numbers behind the accuracies
static void write_scores(const Model *m) {
    char line[PATH + 256];
    Output o;
    output_scores(&o);
    snprintf(line, sizeof line, "file,question,completion,tokens,characters,loglikelihood,label%s\n",
             m->has_teacher ? ",teacher" : "");
    output_write(&o, line, strlen(line));
    for (const Choices *c = asked.files; c < asked.files + asked.count; c++)
        for (int i = 0; i < c->count; i++) {
            const Completion *x = &c->all[i];
            int q = x->question, in_question = i - c->first[q];
            int length = snprintf(line, sizeof line, "\"%s\",%d,%d,%d,%d,%.6f,%d", c->path, q, in_question,
                                  x->ending, x->characters, x->score[0], c->labels[q]);
            if (m->has_teacher) snprintf(line + length, sizeof line - (size_t)length, ",%.6f", x->score[1]);
            strcat(line, "\n");
            output_write(&o, line, strlen(line));
        }
    output_close(&o);
}

static void print_file(const char *name, const Accuracy *a, const Model *m) {
    printf("%s: ", name);
    print_accuracy(a);
    if (m->has_teacher) printf(", as the teacher chooses %.2f%%, log-likelihoods %.3g apart",
                               100 * a->same / a->questions, a->apart / a->completions);
    printf("\n");
}

static void evaluate_choices(const Model *m) {
    Accuracy all = {0, 0, 0, 0, 0, 0, 0};
    Model teacher = teacher_of(m);
    Output o;
    if (asked.csv[0] && rank == 0) {  // what cannot be written is known before anything is computed
        output_scores(&o);
        fclose(o.file);
        unlink(o.aside);
    }
    const double start = seconds();
    teacher.has_teacher = 0;
    for (int i = 0; i < asked.count; i++) {
        Choices *c = &asked.files[i];
        Accuracy a = {0, 0, 0, 0, 0, 0, 0};
        choices_score(m, c, 0);
        if (m->has_teacher) choices_score(&teacher, c, 1);
        end_if_interrupted();
        add_accuracy(&a, c);
        check_numbers(m, 0, a.scores, NAN);
        add_accuracy(&all, c);
        print_file(c->path, &a, m);
    }
    if (asked.count > 1) print_file("all", &all, m);
    if (rank > 0) return;
    fprintf(stderr, "%.1f questions/s\n", all.questions / (seconds() - start));
    if (asked.csv[0]) write_scores(m);
}

// The whole program; returns the exit status.
int eval_main(int argc, char **argv) {
    Model m;
    Data d;
    memset(&m, 0, sizeof m);
    memset(&d, 0, sizeof d);
    parse_options(options, OPTIONS, 1, argv);  // what has no flag here is as the trainer has it
    begin(eval_options, EVAL_OPTIONS, "eval_rev_" BLOCK_NAME " -e MODEL -j TOKENS [flags]", argc, argv);
    check_eval_options();
    if (opt.val[0]) data_open(&d, opt.val);
    opt.T = or_else(opt.T, d.documents);
    m.net = choose_network(d.V, -1);
    if (!model_path(-1)) warn("an untrained network: -e names no file");
    choose_teacher(&m);
    choose_shape(&m);
    choose_precision();
    if (opt.val[0]) data_check(&d, opt.val, m.net.V, m.T);
    ranks_same("products", device_products());
    choices_begin(&m);
    plan(&m);
    load_networks(&m, -1);
    find_grid(&m, &d);
    heed_signals();
    if (opt.val[0]) evaluate(&m, &d);
    if (asked.count) evaluate_choices(&m);
    model_free(&m);
    data_close(&d);
    return finish();
}

#ifndef EVAL_NO_MAIN
int main(int argc, char **argv) {
    spin_briefly(argv);
    return eval_main(argc, argv);
}
#endif
