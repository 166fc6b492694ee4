/*
mpi.h: the ranks of a trainer built with `make MPI=1`: processes that mpirun starts, in one machine or several.

The trainer includes this file where it has empty macros otherwise; README.md beside it says how to start ranks, and what
they exchange when. Nothing here adds a number: pieces of gradients arrive, and the trainer's add_lanes adds them. Where
doubles are added up, all but one are 0, or all are whole numbers.

Nobody waits inside MPI, which would wait for ever, and busily: all is asked for, then tested for between short
sleeps. After --patience seconds without progress every rank is asked whether it waits as well; one that does not
answer is named, and all end. Device memory goes through host memory, unless that is what it is.
*/
#define OMPI_SKIP_MPICXX 1
#define MPICH_SKIP_MPICXX 1
#include <mpi.h>
#include <sched.h>

static int patience;
#define RANKS_OPTION {"--patience", INTEGER, &patience, "600", 1, 1e9, \
    "seconds without progress after which ranks are asked, and end if one does not answer"}, \
    ENGINE_OPTION
#ifndef REV_GPT2_NCCL
#define ENGINE_OPTION
#endif

#include "advice.h"
#include "alike.h"

static const MPI_Comm everyone = MPI_COMM_WORLD;

static void on_interrupt(int signal_number);
#ifdef REV_GPT2_NCCL
static void check_engine(void);  // lets NCCL go on, and ends where it has failed
#else
static void check_engine(void) {}
#endif

// ---- questions: who waits answers

enum { PIECE_TAG = 1, QUESTION_TAG, ANSWER_TAG };

// Takes an empty message, if there is one. Returns whose, or -1.
static int message_from(int tag) {
    MPI_Status from;
    int there;
    MPI_Iprobe(MPI_ANY_SOURCE, tag, everyone, &there, &from);
    if (!there) return -1;
    MPI_Recv(NULL, 0, MPI_BYTE, from.MPI_SOURCE, tag, everyone, MPI_STATUS_IGNORE);
    return from.MPI_SOURCE;
}

static void send_message(int to, int tag) {  // an empty one is away at once
    MPI_Request sent;
    MPI_Isend(NULL, 0, MPI_BYTE, to, tag, everyone, &sent);
    MPI_Request_free(&sent);
}

static void answer(void) {
    for (int from; (from = message_from(QUESTION_TAG)) >= 0;) send_message(from, ANSWER_TAG);
}

// ---- the end of all

static void wait_until(double then) {
    while (seconds() < then) usleep(1000);  // a signal would end a longer sleep
}

// Whether rank 0 answers before some time: it waits for this rank, and has nothing to say itself.
static int first_is_well(double until) {
    send_message(0, QUESTION_TAG);
    for (int from = -1; seconds() < until; usleep(1000)) {
        from = message_from(ANSWER_TAG);
        if (from == 0) return 1;
    }
    return 0;
}

// What all have found out, rank 0 says alone, and is heard no more. Others say what it has not found out, a second
// later, the lower ones first.
static void end_all(const char *line, int status) {
    const double until = seconds() + 10;
    if (rank > 0) {
        if (first_is_well(until)) {
            wait_until(seconds() + 1);
            first_is_well(until);
        }
        wait_until(seconds() + smaller_of(2 * (rank - 1), 8));
    }
    fflush(stdout);
    fprintf(stderr, "%.*s: rank %d: %s\n", (int)strcspn(program, " "), program, rank, line);
    usleep(100000);  // until mpirun has read it
    MPI_Abort(everyone, status);
}

// ---- waiting

// Asks all, and ends them if one does not answer within some seconds: one that computes, or has stopped.
static void ask_all(void) {
    const double until = seconds() + 5;
    char *answered = (char *)calloc((size_t)ranks, 1);
    int left = ranks - 1;
    if (!answered) return;
    for (int r = 0; r < ranks; r++)
        if (r != rank) send_message(r, QUESTION_TAG);
    while (left > 0 && seconds() < until) {
        answer();
        int from = message_from(ANSWER_TAG);
        if (from < 0) usleep(1000);
        else if (!answered[from]++) left--;
    }
    answered[rank] = 1;
    for (int r = 0; r < ranks; r++)
        if (!answered[r]) die(STATUS_NUMBERS, "no progress for --patience %d seconds: rank %d, on %s, does not "
                              "answer", patience, r, hosts[r]);
    free(answered);
}

static void wait_for(MPI_Request *requests, int count) {
    static int *which, room;
    static MPI_Status *statuses;  // MPICH declares that it wants them
    double last = seconds();
    if (count > room) {
        room = count;
        which = (int *)realloc(which, sizeof(int) * (size_t)room);
        statuses = (MPI_Status *)realloc(statuses, sizeof(MPI_Status) * (size_t)room);
    }
    if (room && (!which || !statuses)) die(STATUS_NUMBERS, "out of memory for %d requests", count);
    for (int idle = 0;; idle++) {
        int done;
        MPI_Testsome(count, requests, &done, which, statuses);
        if (done == MPI_UNDEFINED) return;  // none is left
        if (done > 0) {
            idle = 0;
            last = seconds();
            continue;
        }
        if (idle < 200) {
            sched_yield();
            continue;
        }
        usleep(idle < 2000 ? 20 : 500);
        answer();
        check_engine();
        if (seconds() - last < patience) continue;
        ask_all();
        last = seconds();
    }
}

#ifdef REV_GPT2_NCCL
// Whoever waits for NCCL instead does so in turns.
static double quiet_since;
static void waiting_begins(void) { quiet_since = seconds(); }
static void attend(int ms) {
    if (ms) usleep(1000 * (unsigned)ms);
    answer();
    check_engine();
    if (seconds() - quiet_since < patience) return;
    ask_all();
    waiting_begins();
}
#endif

// ---- small things in host memory

static void ranks_combine(double *x, size_t count) {
    const size_t most = 1 << 20;
    for (size_t i = 0; i < count; i += most) {
        MPI_Request request;
        int n = (int)(count - i < most ? count - i : most);
        MPI_Iallreduce(MPI_IN_PLACE, x + i, n, MPI_DOUBLE, MPI_SUM, everyone, &request);
        wait_for(&request, 1);
    }
}

static int any_rank(int here) {
    double x = here;
    ranks_combine(&x, 1);
    return x > 0;
}

static void ranks_broadcast(void *x, size_t bytes) {
    MPI_Request request;
    MPI_Ibcast(x, (int)bytes, MPI_BYTE, 0, everyone, &request);
    wait_for(&request, 1);
}

#define ranks_compare(argc, argv) compare_all(argc, argv)

// ---- the beginning and the end

// The cores that a rank may use are shared among those that may use them as well.
static void share_cores(MPI_Comm here) {
#ifdef _OPENMP
    int sharing = ranks_here;
#ifdef __linux__
    cpu_set_t own, *of = (cpu_set_t *)calloc((size_t)ranks_here, sizeof(cpu_set_t));
    if (!of || sched_getaffinity(0, sizeof own, &own) != 0) return;
    MPI_Allgather(&own, sizeof own, MPI_BYTE, of, sizeof own, MPI_BYTE, here);
    sharing = overlapping(&own, of, ranks_here);
    free(of);
#endif
    choose_threads(sharing);
#endif
    (void)here;
}

static void ranks_begin(void) {
    int provided, nowhere;
    struct utsname system;
    MPI_Comm here;
    MPI_Init_thread(NULL, NULL, MPI_THREAD_FUNNELED, &provided);
    MPI_Comm_rank(everyone, &rank);
    MPI_Comm_size(everyone, &ranks);
    if (ranks > 1) last_words = end_all;
    else end_if_alone("who started them is not of the MPI that this program is built with");
    hosts = (char (*)[HOST])calloc((size_t)ranks, HOST);
    if (!hosts) die(STATUS_NUMBERS, "out of memory for the names of %d machines", ranks);
    uname(&system);
    snprintf(hosts[rank], HOST, "%.*s", HOST - 1, system.nodename);
    MPI_Allgather(MPI_IN_PLACE, HOST, MPI_BYTE, hosts, HOST, MPI_BYTE, everyone);
    MPI_Comm_split_type(everyone, MPI_COMM_TYPE_SHARED, 0, MPI_INFO_NULL, &here);
    MPI_Comm_size(here, &ranks_here);
    share_cores(here);
    MPI_Comm_free(&here);
    patience = 600;                  // until flags say something else
    signal(SIGUSR1, on_interrupt);   // mpirun hands it on, while a second after Ctrl-C it may kill
    if (rank > 0 && (nowhere = open("/dev/null", O_WRONLY)) >= 0) dup2(nowhere, 1);  // rank 0 prints
}

static void end_lines(void) {
    double done = 0;
    ranks_combine(&done, 1);
    last_words = NULL;
    free(hosts);
    MPI_Finalize();
}

#ifndef REV_GPT2_NCCL
static void ranks_end(void) { end_lines(); }

// ---- shards in device memory, all ranks with all, a piece of each shard at a time

#ifdef REV_GPT2_OTHER_LAYERS
enum { STAGED = 1 };  // MPI cannot read device memory
#else
enum { STAGED = 0 };
#endif

// GATHER: each rank sends its shard to all. SCATTER: rank 0 sends each its own. EXCHANGE: the first `lanes` ranks
// send each what they have of its shard, which goes to slots, one for a rank; twice, since the next piece is on
// its way while one is added.
enum Way { GATHER, SCATTER, EXCHANGE };
typedef struct {
    enum Way way;
    int lanes;
    char *x;                          // all shards
    size_t size, piece;               // bytes of an element; elements of a piece
    size_t *begin;                    // where each rank's shard begins
    char *slots, *host_in, *host_out;
    MPI_Request *requests[2];
    int count[2];
} Transfer;

// How many elements the k-th piece of a rank's shard has
static size_t in_piece(const Transfer *t, int r, size_t k) {
    size_t all = t->begin[r + 1] - t->begin[r], at = k * t->piece;
    if (at >= all) return 0;
    return all - at < t->piece ? all - at : t->piece;
}
static char *piece_at(const Transfer *t, int r, size_t k) {
    return t->x + (t->begin[r] + k * t->piece) * t->size;
}
// Where rank r's have their place, of two pieces in turn
static size_t slot(const Transfer *t, int r, size_t k) {
    return (k % 2 * (size_t)ranks + (size_t)r) * t->piece * t->size;
}

static int sends(const Transfer *t, int r) { return t->way == GATHER || r < (t->way == SCATTER ? 1 : t->lanes); }

// Asks for the k-th pieces that go to and come from rank r.
static void ask_for(Transfer *t, size_t k, int r) {
    const int out = t->way == GATHER ? rank : r, in = t->way == GATHER ? r : rank;
    const size_t bytes_out = in_piece(t, out, k) * t->size, bytes_in = in_piece(t, in, k) * t->size;
    MPI_Request *next = t->requests[k % 2];
    if (sends(t, r) && bytes_in > 0) {
        char *to = t->way == EXCHANGE ? t->slots + slot(t, r, k) : piece_at(t, in, k);
        if (STAGED) to = t->host_in + slot(t, r, k);
        MPI_Irecv(to, (int)bytes_in, MPI_BYTE, r, PIECE_TAG, everyone, &next[t->count[k % 2]++]);
    }
    if (sends(t, rank) && bytes_out > 0) {
        char *from = piece_at(t, out, k);
        if (STAGED) {
            from = t->host_out + slot(t, r, k);
            to_host(from, piece_at(t, out, k), bytes_out);
        }
        MPI_Isend(from, (int)bytes_out, MPI_BYTE, r, PIECE_TAG, everyone, &next[t->count[k % 2]++]);
    }
}

static void ask_for_pieces(Transfer *t, size_t k) {
    t->count[k % 2] = 0;
    for (int i = 1; i < ranks; i++) ask_for(t, k, (rank + i) % ranks);
}

static void wait_for_pieces(Transfer *t, size_t k) {
    profile("(exchange)", 0, 0);
    wait_for(t->requests[k % 2], t->count[k % 2]);
    for (int r = 0; STAGED && r < ranks; r++) {
        const int in = t->way == GATHER ? r : rank;
        char *to = t->way == EXCHANGE ? t->slots + slot(t, r, k) : piece_at(t, in, k);
        if (r != rank && sends(t, r)) to_device(to, t->host_in + slot(t, r, k), in_piece(t, in, k) * t->size);
    }
}

// Adds the k-th pieces that have come to the sum.
static void add_pieces(const Transfer *t, const Model *m, real_t **lanes, size_t k, int begin) {
    for (int r = 0; r < t->lanes; r++) lanes[r] = (real_t *)(t->slots + slot(t, r, k));
    if (rank < t->lanes) lanes[rank] = (real_t *)piece_at(t, rank, k);
    size_t n = in_piece(t, rank, k);
    if (n > 0) add_lanes(m, lanes, t->lanes, k * t->piece, n, begin);
}

static char *host_room(size_t bytes) {
    char *p = (char *)malloc(bytes + 1);
    if (!p) die(STATUS_NUMBERS, "out of memory for %zu bytes that ranks exchange", bytes);
    return p;
}

// Moves all pieces; m: whose sum they are added to, and whether that begins
static void move(Transfer *t, const Config *net, const Model *m, int begin) {
    const size_t n = (size_t)ranks, staged = STAGED ? 2 * n * t->piece * t->size : 0;
    size_t most = 0, pieces;
    t->begin = (size_t *)(void *)host_room((n + 1) * sizeof(size_t));
    t->requests[0] = (MPI_Request *)(void *)host_room(4 * n * sizeof(MPI_Request));
    t->requests[1] = t->requests[0] + 2 * n;
    t->host_in = host_room(staged);
    t->host_out = host_room(staged);
    real_t **lanes = (real_t **)(void *)host_room(n * sizeof(real_t *));
    for (int r = 0; r <= ranks; r++) t->begin[r] = shard_begin(net, r);
    for (int r = 0; r < ranks; r++) most = larger_of(most, t->begin[r + 1] - t->begin[r]);
    pieces = (most + t->piece - 1) / t->piece;
    ask_for_pieces(t, 0);
    for (size_t k = 0; k < pieces; k++) {
        if (k + 1 < pieces) ask_for_pieces(t, k + 1);
        wait_for_pieces(t, k);
        if (m) add_pieces(t, m, lanes, k, begin);
    }
    free(t->begin);
    free(t->requests[0]);
    free(t->host_in);
    free(t->host_out);
    free(lanes);
}

enum { MOST_BYTES = 4 << 20 };  // of a piece
static size_t piece_of_bytes(size_t bytes, size_t size) {
    return (bytes < MOST_BYTES ? bytes : (size_t)MOST_BYTES) / size / 64 * 64;  // places that are multiples of 256
}

static void move_shards(enum Way way, void *x, size_t size, const Config *net) {
    Transfer t;
    memset(&t, 0, sizeof t);
    t.way = way;
    t.x = (char *)x;
    t.size = size;
    t.piece = piece_of_bytes(larger_of(((size_t)64 << 20) / (size_t)ranks, 4096), size);
    move(&t, net, NULL, 0);
}
static void ranks_gather(param_t *params, const Config *net) {
    measure_begin(0);
    move_shards(GATHER, params, sizeof(param_t), net);
    measure_parameters();
}
static void ranks_spread(param_t *params, const Config *net) {
    move_shards(SCATTER, params, sizeof(param_t), net);
    move_shards(GATHER, params, sizeof(param_t), net);
}

// Moments of all shards are where gradients are in a step.
static real_t *all_moments(const Model *m, const real_t *own) { return (void)own, m->grads; }
static void gather_moments(const Model *m, const real_t *own) {
    device_copy(m->grads + shard_begin(&m->net, rank), own, shard_size(&m->net) * sizeof(real_t));
    move_shards(GATHER, m->grads, sizeof(real_t), &m->net);
}
static void scatter_moments(const Model *m, real_t *own) {
    move_shards(SCATTER, m->grads, sizeof(real_t), &m->net);
    device_copy(own, m->grads + shard_begin(&m->net, rank), shard_size(&m->net) * sizeof(real_t));
}

// The slots are where logits are at other times, or if these are few, in memory of their own.
static void ranks_exchange(Model *m, int lane) {
    static char *own;
    const size_t logits = (size_t)m->head_chunk * (size_t)m->net.Vp * sizeof(act_t), n = 2 * (size_t)ranks;
    Transfer t;
    memset(&t, 0, sizeof t);
    t.way = EXCHANGE;
    t.lanes = smaller_of(ranks, m->lanes - lane);
    t.x = (char *)m->grads;
    t.size = sizeof(real_t);
    t.slots = (char *)m->logits;
    t.piece = piece_of_bytes(logits / n, sizeof(real_t));
    if (t.piece < PIECE) {
        t.piece = PIECE;
        if (!own) own = (char *)device_alloc(n * PIECE * sizeof(real_t));
        if (!own) die(STATUS_NUMBERS, "out of memory for what %d ranks exchange", ranks);
        t.slots = own;
    }
    measure_begin(1);
    move(&t, &m->net, m, lane == 0);
    measure_round();
}
#endif
