/*
reverse.c: a network that runs backwards, and nothing else. `make tutorial` runs it, reverse.md walks through
it, train_rev_gpt2.c does the same for GPT-2. Numbers like (2.4) are equations of the paper named there.

A network makes states p_0, p_1, ..., p_L. Back-propagation needs them again, from the last to the first, so
usually all are kept. Reversing keeps the last two, and computes each of the others from the two after it.
(This program keeps all as well, to compare.) With p_{-1} = p_0 = x,

    p_{k+1} = alpha p_{k-1} + beta p_k + gamma F_k(p_k)
    p_{k-1} = (p_{k+1} - beta p_k - gamma F_k(p_k)) / alpha
*/
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

static const struct Network { const char *name; int alpha, beta; double gamma; } networks[] = {
    {"midpoint",     1, 0, 2 * 0.25},   // (2.4)         p_{k+1} = p_{k-1} + 2h F_k(p_k)
    {"leapfrog",    -1, 2, 0.3 * 0.3},  // (2.6)         p_{k+1} = 2 p_k - p_{k-1} + h^2 F_k(p_k)
    {"hamiltonian",  1, 0, 0.25},       // (2.8), (2.9)  q += h F(r), then r += h F(q): they take turns as p_k
}, *net;  // the one that runs

// What is learnt: two matrices a step, and the first state, x. The loss is half the square of the last state.
enum { L = 48, C = 4, H = 8, COUNT = L * 2 * H * C + C };  // steps; numbers in a state, in a hidden layer
static union { struct { double W1[L][H][C], W2[L][H][C], x[C]; }; double all[COUNT]; } params, grads, stored;

// ---- a state holds whole numbers, in units of 2^-24: what was added to them can be taken off again, exactly
#ifdef FLOATS  // or not: sums of floats are rounded
typedef float number_t;
static number_t to_state(double v) { return (float)v; }
static double value(number_t s) { return s; }
#else
typedef int32_t number_t;
static number_t to_state(double v) { return (int32_t)lrint(ldexp(v, 24)); }
static double value(number_t s) { return ldexp(s, -24); }
#endif
static number_t states[2][C], *prev = states[0], *cur = states[1];  // the last two
static void swap_states(void) { number_t *s = prev; prev = cur; cur = s; }

// ---- the force F(p) = W2^T tanh(W1 p), and its adjoint
typedef struct { double p[C], u[H], f[C]; } Internals;  // of one evaluation: p, u = tanh(W1 p), F(p)
static Internals force(int k, const number_t s[C]) {
    Internals in = {0};
    for (int c = 0; c < C; c++) in.p[c] = value(s[c]);
    for (int i = 0; i < H; i++) {
        double sum = 0;
        for (int c = 0; c < C; c++) sum += params.W1[k][i][c] * in.p[c];
        in.u[i] = tanh(sum);
        for (int c = 0; c < C; c++) in.f[c] += params.W2[k][i][c] * in.u[i];
    }
    return in;
}

// From df = dloss/dF: adds J^T df to dp, J being dF/dp, and to both matrices' gradients what is theirs.
static void force_adjoint(double dp[C], const double df[C], const Internals *in, int k) {
    for (int i = 0; i < H; i++) {
        double du = 0;
        for (int c = 0; c < C; c++) du += params.W2[k][i][c] * df[c];
        double dsum = du * (1 - in->u[i] * in->u[i]);  // tanh' = 1 - tanh^2
        for (int c = 0; c < C; c++) {
            grads.W2[k][i][c] += df[c] * in->u[i];
            grads.W1[k][i][c] += dsum * in->p[c];
            dp[c] += params.W1[k][i][c] * dsum;
        }
    }
}

// ---- forward and back
static Internals kept[L];  // what ordinary back-propagation lives on; reversing does not look at it
// What a step adds to alpha p_{k-1}: one number, which depends on p_k alone
static number_t increment(number_t s, double f) { return net->beta * s + to_state(net->gamma * f); }

static void step(int k) {
    kept[k] = force(k, cur);
    for (int c = 0; c < C; c++) prev[c] = net->alpha * prev[c] + increment(cur[c], kept[k].f[c]);
    swap_states();
}

static Internals step_back(int k) {
    swap_states();
    Internals in = force(k, cur);  // at the state where it was evaluated going forward: the same, to the bit
    for (int c = 0; c < C; c++) prev[c] = net->alpha * (prev[c] - increment(cur[c], in.f[c]));
    return in;
}

static double forward(void) {  // returns the loss
    double loss = 0;
    for (int c = 0; c < C; c++) prev[c] = cur[c] = to_state(params.x[c]);
    for (int k = 0; k < L; k++) step(k);
    for (int c = 0; c < C; c++) loss += value(cur[c]) * value(cur[c]) / 2;
    return loss;
}

static void gradients(int reverse) {  // by stepping back, or with what was kept
    double df[C], d[2][C] = {{0}}, *dnext = d[0], *dp = d[1];  // dloss/dp_{k+1}; dloss/dp_k, so far
    memset(&grads, 0, sizeof grads);
    forward();
    for (int c = 0; c < C; c++) dnext[c] = value(cur[c]);
    for (int k = L - 1; k >= 0; k--) {
        Internals in = reverse ? step_back(k) : kept[k];
        for (int c = 0; c < C; c++) df[c] = net->gamma * dnext[c];
        for (int c = 0; c < C; c++) dp[c] += net->beta * dnext[c];
        force_adjoint(dp, df, &in, k);                       // completes dp
        for (int c = 0; c < C; c++) dnext[c] *= net->alpha;  // dloss/dp_{k-1}, as far as p_{k+1} tells
        double *done = dnext; dnext = dp; dp = done;
    }
    for (int c = 0; c < C; c++) grads.x[c] = dnext[c] + dp[c];  // both first states are x
}

// ---- is it so?
static double there_and_back(int flip) {  // how far from x it ends; flips a bit half way, or prints states
    double off = 0;
    forward();
    for (int k = L - 1; k >= 0; k--) {
        if (flip && k == L / 2) *(unsigned char *)cur ^= 1;
        Internals in = step_back(k), was = kept[k];
        if (!flip && k % 4 == 0)
            printf("p_%-2d%12.8f%12.8f%15.8f%12.8f\n", k, was.p[0], was.p[1], in.p[0], in.p[1]);
    }
    for (int c = 0; c < C; c++) off += fabs(value(prev[c]) - kept[0].p[c]) + fabs(value(cur[c]) - kept[0].p[c]);
    return off;
}

static double finite_differences(void) {  // how far the gradients are from them, as a part of their length
    double apart = 0, length = 0, eps = 0x1p-7;
    for (int i = 0; i < COUNT; i++) {
        params.all[i] += eps;
        double up = forward();
        params.all[i] -= 2 * eps;
        double difference = (up - forward()) / (2 * eps);
        params.all[i] += eps;
        apart += pow(difference - grads.all[i], 2);
        length += pow(grads.all[i], 2);
    }
    return sqrt(apart / length);
}

int main(void) {
    for (uint32_t i = 0, n = 1; i < COUNT; i++) params.all[i] = (int32_t)(n = 1664525 * n + 12345) * 0x1p-32;
    for (net = networks; net < networks + sizeof networks / sizeof *networks; net++) {
        printf("\n%-11s going forward          coming back\n", net->name);
        printf("drift %.2g,", there_and_back(0));
        printf(" and %.2g if one bit flips on the way\n", there_and_back(1));
        gradients(0);
        stored = grads;
        gradients(1);
        const char *same = memcmp(&stored, &grads, sizeof grads) ? "not the bits" : "the bits";
        printf("gradients: %s of those with stored states; %.1e off finite differences\n", same, finite_differences());
    }
}
