// Times the training steps of llm.c's CPU trainer at any shape. llm.c's train_gpt2.c is included as it is, without its main (it
// fixes B=4, T=64, and evaluates and samples in between); bench.py compiles this with -I LLMC_FOLDER and llm.c's own flags.
// usage: llmc L C NH B T: weights and tokens are random; prints the time of a step after each, until it is killed.
#define TESTING
#include "train_gpt2.c"

static unsigned int state = 1337;
static unsigned int random_bits(void) {
    state ^= state << 13, state ^= state >> 17, state ^= state << 5;
    return state;
}

int main(int argc, char **argv) {
    if (argc != 6) return fprintf(stderr, "usage: llmc L C NH B T\n"), 2;
    int L = atoi(argv[1]), C = atoi(argv[2]), NH = atoi(argv[3]), B = atoi(argv[4]), T = atoi(argv[5]);
    GPT2 model;
    memset(&model, 0, sizeof model);
    model.config.max_seq_len = 1024, model.config.vocab_size = 50257, model.config.padded_vocab_size = 50304;
    model.config.num_layers = L, model.config.num_heads = NH, model.config.channels = C;
    fill_in_parameter_sizes(model.param_sizes, model.config);
    for (int i = 0; i < NUM_PARAMETER_TENSORS; i++) model.num_parameters += model.param_sizes[i];
    model.params_memory = malloc_and_point_parameters(&model.params, model.param_sizes);
    for (size_t i = 0; i < model.num_parameters; i++) model.params_memory[i] = (random_bits() / 4294967296.0f - 0.5f) * 0.07f;
    for (int i = 0; i < L * C; i++) model.params.ln1w[i] = model.params.ln2w[i] = 1;
    for (int i = 0; i < C; i++) model.params.lnfw[i] = 1;

    int *tokens = (int *)mallocCheck(((size_t)B * T + 1) * sizeof(int));
    for (int step = 1;; step++) {
        for (int i = 0; i <= B * T; i++) tokens[i] = (int)(random_bits() % 50257);
        struct timespec start, end;
        clock_gettime(CLOCK_MONOTONIC, &start);
        gpt2_forward(&model, tokens, tokens + 1, B, T);
        gpt2_zero_grad(&model);
        gpt2_backward(&model);
        gpt2_update(&model, 1e-4f, 0.9f, 0.95f, 1e-8f, 0.1f, step);
        clock_gettime(CLOCK_MONOTONIC, &end);
        printf("step %d | loss %.4f | %.3f ms\n", step, model.mean_loss,
               (end.tv_sec - start.tv_sec) * 1e3 + (end.tv_nsec - start.tv_nsec) / 1e6);
        fflush(stdout);
    }
}
