/*
gradients.c: one batch through the C trainer, for reference.py to compare with PyTorch.

    gradients MODEL TOKENS B T float|fixed store|checkpoint|reverse OUT

OUT receives the loss (float64), then all gradients in the model file's order, as the build's real type.
*/
#define REV_GPT2_NO_MAIN
#include "../../train_rev_gpt2.c"

int main(int argc, char **argv) {
    if (argc != 8) die(STATUS_USAGE, "gradients MODEL TOKENS B T float|fixed store|checkpoint|reverse OUT");
    const char *flags[] = {argv[0], "-e", argv[1], "-b", argv[3], "-t", argv[4], "--stream", argv[5], "--memory", argv[6]};
    parse_options(options, OPTIONS, 11, (char **)flags);
    Data tokens;
    Model m;
    memset(&m, 0, sizeof m);
    m.net = choose_network(0, -1);
    m.B = opt.B, m.T = opt.T, m.memory = opt.memory, m.training = 1, m.chunk = 2, m.head_chunk = 64;
    plan(&m);
    model_alloc(&m);
    load_model(opt.start, &m);
    data_open(&tokens, argv[2]);
    data_check(&tokens, argv[2], m.net.V, m.T);
    data_batch(&tokens, &m, 0, 0, 0);
    double drift, loss = forward_backward(&m, 1, &drift);
    check_numbers(&m, 1, loss, drift);
    FILE *f = fopen(argv[7], "wb");
    if (!f || fwrite(&loss, sizeof loss, 1, f) != 1) die(STATUS_DATA, "cannot write %s", argv[7]);
    for (size_t i = 0, count = parameter_count(&m.net); i < count; i += STAGE) {
        static real_t some[STAGE];
        size_t n = piece_of(count - i);
        to_host(some, m.grads + i, n * sizeof(real_t));
        if (fwrite(some, sizeof(real_t), n, f) != n) die(STATUS_DATA, "cannot write %s", argv[7]);
    }
    model_free(&m);
    data_close(&tokens);
    return fclose(f) == 0 ? STATUS_OK : STATUS_DATA;
}
