/*
classifier.cu: losses of logits (n, Vp) of which V count, and their gradient in place: (softmax - one at the target) times scale.
*/
#include "common.h"

static int n, V, Vp;
static act_t *logits;
static float *losses;
static int *targets;
static const float scale = 0.5;

static int target_of(int i) { return (int)((unsigned)i * 7919u % (unsigned)V); }
static double logit(size_t i, int v) { return rounded(1, i * (size_t)Vp + (size_t)v); }
static void check(int version) {
    (void)version;
    size_t samples = sampled((size_t)n, (double)n * V, 100);
    const act_t *d = fetch(logits, (size_t)n * (size_t)Vp);
    const float *l = fetch(losses, (size_t)n);
    for (size_t j = 0; j < samples; j++) {
        size_t i = sample(j, samples, (size_t)n);
        double sum = 0;
        for (int v = 0; v < V; v++) sum += exp(logit(i, v));
        compare("loss", i, l[i], log(sum) - logit(i, target_of((int)i)), 1);
        for (int v = 0; v < Vp; v++)
            compare("gradient", i * (size_t)Vp + (size_t)v, to_float(d[i * (size_t)Vp + (size_t)v]), v < V ? scale * (exp(logit(i, v)) / sum - (v == target_of((int)i))) : 0, 1.0 / V);
    }
}

// ---- 1: a pass for the highest, one for the sum, one for the gradient: a block a token, an element at a time

static __global__ void three_passes(float *losses, act_t *logits, const int *targets, int V, int Vp, float scale) {
    SHARED(float, room);
    act_t *x = logits + blockIdx.x * (size_t)Vp;
    int target = targets[blockIdx.x], lane = threadIdx.x % WARP;
    float top = -1e30f, sum = 0, of_target = to_float(x[target]);
    for (int v = (int)threadIdx.x; v < V; v += (int)blockDim.x) top = fmaxf(top, to_float(x[v]));
    top = warp_max(top);
    if (lane == 0) room[threadIdx.x / WARP] = top;
    __syncthreads();
    top = warp_max(lane < (int)blockDim.x / WARP ? room[lane] : -1e30f);
    for (int v = (int)threadIdx.x; v < V; v += (int)blockDim.x) sum += expf(to_float(x[v]) - top);
    sum = block_sum(sum, 0, room).x;
    if (threadIdx.x == 0) losses[blockIdx.x] = top + logf(sum) - of_target;
    for (int v = (int)threadIdx.x; v < Vp; v += (int)blockDim.x)
        set(x + v, v < V ? scale * (expf(to_float(x[v]) - top) / sum - (v == target ? 1 : 0)) : 0);
}

// ---- 2, 3: highest and sum in one pass, an element at a time, or 16 bytes

static void set_up(const int *d) {
    n = d[0], V = d[1], Vp = d[2];
    logits = make_activations((size_t)n * (size_t)Vp, 1), losses = make_floats((size_t)n, 0);
    targets = (int *)allocate((size_t)n * sizeof(int));
    for (int i = 0; i < n; i++) {
        int target = target_of(i);
        to_device(targets + i, &target, sizeof target);
    }
    work_bytes = 2.0 * n * V * sizeof(act_t);
}
static void reset(void) { refill(logits, (size_t)n * (size_t)Vp, 1), spoil(losses, (size_t)n * sizeof(float)); }
static void run(int version) {
    const size_t room = 2 * WARP * sizeof(float);
    if (version == 1) LAUNCH(three_passes, (unsigned)n, 1024, room, losses, logits, targets, V, Vp, scale);
    else if (version == 2) LAUNCH(classifier_kernel<1>, (unsigned)n, 1024, room, losses, logits, targets, V, Vp, scale);
    else classifier(losses, logits, targets, n, V, Vp, scale);
}

static const Version versions[] = {{1, "three passes", 1e-2, 1}, {2, "two passes: highest and sum at once", 1e-2, 1}, {3, "the trainer's: 16 bytes at a time", 1e-2, 1}, {0, NULL, 0, 0}};
static const Shape odd[] = {{"5 x 130", {5, 130, 256, 0}}, {"2 x 5000", {2, 5000, 5001, 0}}, {NULL, {0, 0, 0, 0}}};
static const Shape shapes[] = {{"8192 x 50257", {8192, 50257, 50304, 0}}, {NULL, {0, 0, 0, 0}}};
static const Experiment experiments[] = {{"classifier", versions, odd, shapes, set_up, reset, run, check}};

int main(int argc, char **argv) { return run_experiments(argc, argv, experiments, 1); }
