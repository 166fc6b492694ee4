/*
eval.c: how well a model predicts a text. It prints the loss, with the trainer's network and validation.

    ./eval_rev_gpt2 -e model.bin -j tokens.bin                     the loss of each token, and its perplexity
    ./eval_rev_gpt2 -e gpt2.bin -j tokens.bin --mode bdia --distill gpt2.bin
                                                                   beside a teacher: how near the two are

It includes the trainer, the CUDA twin with -DTWIN, and replaces its main program; with EVAL_NO_MAIN it can be
included itself.
*/
#ifndef REV_GPT2_INCLUDED  // by another program of its kind
#define REV_GPT2_INCLUDED
#define REV_GPT2_NO_MAIN
#ifdef TWIN
#include "../../train_rev_gpt2.cu"
#else
#include "../../train_rev_gpt2.c"
#endif
#endif

// ---- the command line

static const Option eval_options[] = {
    {"-e", STRING, &opt.start, "d12", 0, 0, "a model file; or an untrained network: d6 d12 d24 d36 d48"},
    {"-j", STRING, &opt.val, "", 0, 0,
     "tokens: a file or a pattern in quotes (.bin of llm.c, or .txt for bytes)"},
    {"-b", INTEGER, &opt.B, "4", 1, 1 << 24, "sequences a batch"},
    {"-t", INTEGER, &opt.T, "0", 1, 1 << 24, "tokens a sequence; 0: the context"},
    {"-m", INTEGER, &opt.val_batches, "20", 0, 1e9, "batches, if there are that many; 0: all"},
    {"--distill", STRING, &opt.distill, "", 0, 0,
     "a baseline model file of the same shape: the teacher to be compared with"},
#include "../network_flags.h"
};
enum { EVAL_OPTIONS = sizeof eval_options / sizeof eval_options[0] };

static void check_eval_options(void) {
    if (strlen(opt.start) > PATH - 64 || strlen(opt.distill) > PATH - 64)
        die(STATUS_USAGE, "-e or --distill: a name of over %d bytes", PATH - 64);
    if (!opt.val[0]) die(STATUS_USAGE,
        "-j is missing: the tokens to evaluate on, a .bin of llm.c or a .txt; --help lists the flags");
}

// ---- from the flags to the end

// Takes the memory, and fills it from files or random numbers.
static void load_networks(Model *m) {
    plan(m);
    model_alloc(m);
    if (model_path(-1)) load_model(model_path(-1), m);
    else init_parameters(m, (uint64_t)opt.seed);
    if (!m->has_teacher) return;
    Model teacher = teacher_of(m);
    load_model(opt.distill, &teacher);
}

static void evaluate(Model *m, const Data *d) {
    double means[METRICS];
    int batches = validate(m, d, means);
    check_numbers(m, 0, means[LOSS], NAN);
    printf("validation loss %.4f, perplexity %.2f, ", means[LOSS], exp(means[LOSS]));
    printf("%d batches of -b %d times -t %d, %s", batches, m->B, m->T, network_flags(&m->net));
    print_comparison(m, means);
}

// The whole program; returns the exit status.
int eval_main(int argc, char **argv) {
    Model m;
    Data d;
    memset(&m, 0, sizeof m);
    memset(&d, 0, sizeof d);
    parse_options(options, OPTIONS, 1, argv);  // what has no flag here is as the trainer has it
    if (begin(eval_options, EVAL_OPTIONS, "eval_rev_gpt2 -e MODEL -j TOKENS [flags]", argc, argv))
        return finish();
    check_eval_options();
    data_open(&d, opt.val);
    m.net = choose_network(or_else(d.V, 50257), -1);
    choose_teacher(&m);
    choose_shape(&m);
    choose_precision();
    data_check(&d, opt.val, m.net.V, m.B, m.T, 0);
    load_networks(&m);
    evaluate(&m, &d);
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
