/*
rotary.c: in each head of queries and keys, channels c and c + HS/2 are a pair that turns by the angle of its
place t, t base^(-2c/HS). Rows of x are those of qkv: values, behind the heads that turn, stay as they are.

    turn     x turned by its angles, forward or back
    table    the cosines and sines of all places, each made once a pass
*/
#define REV_GPT2_BLOCK "dev/llama/block.h"
#include "common.h"

static const double base = 10000;
static int n, T, heads, HS, width, direction, first;
static real_t *x, *table;

// ---- the reference, in double precision

static double angle(int t, int c) { return t * pow(base, -2.0 * c / HS); }

static void check_turn(int version) {
    (void)version;
    for (int i = 0; i < n; i++)
        for (int column = 0; column < width; column++) {
            int c = column % HS % (HS / 2), second = column % HS >= HS / 2;
            size_t at = (size_t)i * width + column;
            double should = random_at(1, at), other = random_at(1, second ? at - HS / 2 : at + HS / 2);
            double turn = direction * angle(i % T, c);
            if (column < heads * HS) should = should * cos(turn) + (second ? 1 : -1) * other * sin(turn);
            compare("x", at, x[at], should, 1);
        }
}
static void check_table(int version) {
    (void)version;
    for (int t = 0; t < n; t++)
        for (int c = 0; c < HS / 2; c++) {
            size_t at = (size_t)t * HS + c;
            compare("cosine", at, table[at], cos(angle(first + t, c)), 1);
            compare("sine", at + HS / 2, table[at + HS / 2], sin(angle(first + t, c)), 1);
        }
}

// ---- turn 1, 2: angles as they are needed

INLINE void turn_pair(real_t *a, real_t cosine, real_t sine) {
    real_t u = a[0], v = a[HS / 2];
    a[0] = u * cosine - v * sine;
    a[HS / 2] = v * cosine + u * sine;
}
static void turn_each(void) {
    #pragma omp parallel for
    for (int i = 0; i < n; i++)
        for (int h = 0; h < heads; h++)
            for (int c = 0; c < HS / 2; c++) {
                double turn = direction * angle(i % T, c);
                turn_pair(x + (size_t)i * width + h * HS + c, (real_t)cos(turn), (real_t)sin(turn));
            }
}
static void turn_token(void) {  // a pair after the other, through all heads
    #pragma omp parallel for
    for (int i = 0; i < n; i++)
        for (int c = 0; c < HS / 2; c++) {
            double turn = direction * angle(i % T, c);
            real_t cosine = (real_t)cos(turn), sine = (real_t)sin(turn);
            for (int h = 0; h < heads; h++) turn_pair(x + (size_t)i * width + h * HS + c, cosine, sine);
        }
}

// ---- table 1, 2: a number after the other

static void table_doubles(void) {
    for (int t = 0; t < n; t++)
        for (int c = 0; c < HS / 2; c++) {
            table[(size_t)t * HS + c] = (real_t)cos(angle(first + t, c));
            table[(size_t)t * HS + HS / 2 + c] = (real_t)sin(angle(first + t, c));
        }
}
static void table_floats(void) {  // of a place's 17 bits and an angle's 24, the last ones are lost
    #pragma omp parallel for
    for (int t = 0; t < n; t++)
        for (int c = 0; c < HS / 2; c++) {
            real_t turn = (real_t)(first + t) * powf((real_t)base, -2.0f * (real_t)c / (real_t)HS);
            table[(size_t)t * HS + c] = cosf(turn);
            table[(size_t)t * HS + HS / 2 + c] = sinf(turn);
        }
}

// ---- the experiments

static void set_up_turn(const int *d) {
    n = d[0], T = d[1], heads = d[2], HS = d[3], width = d[2] * d[3] + 3 * d[3];
    direction = d[4];
    x = make((size_t)n * width, 1), table = make((size_t)T * HS, 0);
    rotary_table(table, 0, T, HS, base);
    work_bytes = 2.0 * n * heads * HS * sizeof(real_t);
}
static void set_up_table(const int *d) {
    n = d[0], HS = d[1], first = d[2];
    table = make((size_t)n * HS, 0);
    work_bytes = (double)n * HS * sizeof(real_t);
}
static void reset_turn(void) { fill(x, (size_t)n * width, 1); }
static void reset_table(void) { fill_nan(table, (size_t)n * HS); }

static void run_turn(int version) {
    if (version == 1) turn_each();
    else if (version == 2) turn_token();
    else rotary_turn(x, table, n, T, heads, HS, width, direction);
}
static void run_table(int version) {
    if (version == 1) table_doubles();
    else if (version == 2) table_floats();
    else rotary_table(table, first, n, HS, base);
}

static const Version turns[] = {
    {1, "cos and sin for each pair", 1e-6, 0}, {2, "for each pair of a token, once for its heads", 1e-6, 0},
    {3, "the block's: a table of all places", 1e-6, 0}, {0, NULL, 0, 0}};
static const Version tables[] = {
    {1, "a number after the other", 1e-6, 0}, {2, "in float, threads: wrong far from the beginning", 2e-3, 0},
    {3, "the block's: a power a pair, threads", 1e-6, 0}, {0, NULL, 0, 0}};
// n, T, heads that turn, HS, direction
static const Shape odd[] = {{"14 of 7, forward", {14, 7, 3, 10, 1}},
                            {"130 of 65, back", {130, 65, 5, 14, -1}},
                            {NULL, {0, 0, 0, 0}}};
static const Shape shapes[] = {{"12 heads, forward", {1024, 512, 12, 64, 1}},
                               {"back", {1024, 512, 12, 64, -1}},
                               {"36 heads", {1024, 512, 36, 64, 1}},
                               {NULL, {0, 0, 0, 0}}};
static const Shape odd_tables[] = {{"70 x 10 from 100000", {70, 10, 100000, 0}}, {NULL, {0, 0, 0, 0}}};
static const Shape table_shapes[] = {{"2048 x 64", {2048, 64, 0, 0}}, {NULL, {0, 0, 0, 0}}};
static const Experiment experiments[] = {
    {"rotary, turn", turns, odd, shapes, set_up_turn, reset_turn, run_turn, check_turn},
    {"rotary, table", tables, odd_tables, table_shapes, set_up_table, reset_table, run_table, check_table}};

int main(int argc, char **argv) { return run_experiments(argc, argv, experiments, 2); }
