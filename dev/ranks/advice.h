/*
advice.h: what ranks say after some steps: how long they exchange for, beside the computing of a lane, and what fewer
--lanes would gain. It is only said: the bits of a run depend on its lanes.
*/
enum { MEASURED = 5 };  // steps after the first, in which memory and connections are new
static struct {
    int steps, rounds;
    double since, lane;         // seconds: when the last exchange ended; the least that a lane took to compute
    double round, parameters;   // of all that were measured
} measured;

static void ranks_combine(double *x, size_t count);
static double *doubles(size_t count);

static int measures(void) { return ranks > 1 && measured.steps <= MEASURED; }

// An exchange begins, of a lane that has been computed since the last one, or of something else.
static void measure_begin(int of_lane) {
    if (!measures()) return;
    device_finish();
    const double now = seconds(), took = now - measured.since;
    if (of_lane && (measured.lane == 0 || took < measured.lane)) measured.lane = took;
    measured.since = now;
}

static double measure_end(void) {
    device_finish();
    const double now = seconds(), took = now - measured.since;
    measured.since = now;
    return took;
}

static void measure_round(void) {
    if (!measures()) return;
    measured.round += measure_end();
    measured.rounds++;
}

// Who comes last to an exchange waits for nobody: the least that a rank has measured
static double least_of_ranks(double mine) {
    double *all = doubles((size_t)ranks), least = mine;
    all[rank] = mine;
    ranks_combine(all, (size_t)ranks);
    for (int r = 0; r < ranks; r++) least = fmin(least, all[r]);
    free(all);
    return least;
}

static void say_measured(void) {
    const int rounds = measured.rounds / MEASURED;
    const double round = least_of_ranks(measured.round) / measured.rounds, lane = measured.lane;
    const double parameters = least_of_ranks(measured.parameters) / MEASURED;
    const double step = rounds * (lane + round) + parameters, fewer = step - (rounds - 1) * round;
    printf("exchange: %.3g ms a round, %d of them a step, and %.3g ms for the parameters, %.1f%% of it; computing a "
           "lane takes %.3g ms", 1e3 * round, rounds, 1e3 * parameters, 100 * (rounds * round + parameters) / step, 1e3 * lane);
    if (rounds > 1) printf("; --lanes %d would make it one round: %.1f%% more tokens/s, and other bits",
                           ranks, 100 * (step / fewer - 1));
    printf("\n");
}

// The parameters have been exchanged, and a step ends.
static void measure_parameters(void) {
    if (!measures()) return;
    measured.parameters += measure_end();
    if (measured.steps++ == 0) {
        measured.rounds = 0;
        measured.round = measured.parameters = measured.lane = 0;
    }
    if (!measures()) say_measured();
}
