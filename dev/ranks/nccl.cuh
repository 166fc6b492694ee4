/*
nccl.cuh: the ranks of `make train_rev_gpt2cu NCCL=1`: a process for each card, gradients and parameters by NCCL from card
to card. README.md beside it says how to start them, and what they exchange when.

Small things go by way of the host: with sockets.h between processes that `--ranks` forks or `--rank-file` brings together, or
with MPI=1 by mpi.h. NCCL adds no gradient: its sums would depend on the number of ranks. It brings every rank the others'
lanes of its shard, which add_lanes adds in their order. The doubles that it does add up are 0 on all ranks but one, or
whole numbers, for which no order matters.

Nobody waits inside NCCL: the communicator does not block, and the host asks in turns whether something has arrived,
whether the communicator has failed and whether the other ranks live. The emulated twin has nccl_emulated.h for NCCL.
*/
#define REV_GPT2_NCCL
#ifdef EMULATE
#include "nccl_emulated.h"
#else
#include <nccl.h>
#endif
#ifdef REV_GPT2_MPI
#include "mpi.h"
#else
#include "sockets.h"
#endif
#define ENGINE_OPTION {"--overlap", SWITCH, &overlap.wanted, "0", 0, 0, \
    "a lane's gradients travel while the next is computed; takes 8 bytes a parameter of the card's memory"},

static int card;
#define CARD card  // the twin's

static ncclComm_t communicator;  // NULL: one process that nobody asked to be a rank
static cudaStream_t moving;      // where NCCL works, beside the kernels
static cudaEvent_t computed, arrived[2];
static double *on_card;          // numbers to be added up
enum { ON_CARD = 1 << 17, FEW = 16 };  // numbers: room for them there; so many go by way of the host

// ---- errors

static void cuda_ok(cudaError_t e, const char *call) {
    if (e != cudaSuccess) die(STATUS_NUMBERS, "CUDA: %s (%s) in %s", cudaGetErrorString(e), cudaGetErrorName(e), call);
}

// A communicator fails where another rank has died as well: who knows more has two seconds to say so.
static void nccl_ok(ncclResult_t e, const char *call) {
    static int failed;
    if (e == ncclSuccess || e == ncclInProgress || failed) return;
    failed = 1;
    waiting_begins();
    for (double until = seconds() + 2; ranks > 1 && seconds() < until;) attend(20);
    die(STATUS_NUMBERS, "NCCL: %s in %s; %s", ncclGetErrorString(e), call,
        communicator ? ncclGetLastError(communicator) : "NCCL_DEBUG=INFO says more");
}

static ncclResult_t state_of_engine(void) {
    ncclResult_t state = ncclSuccess;
    if (!communicator) return state;
    nccl_ok(ncclCommGetAsyncError(communicator, &state), "ncclCommGetAsyncError");
    nccl_ok(state, "what ranks exchange");
    return state;
}
static void check_engine(void) { state_of_engine(); }
#ifndef REV_GPT2_MPI
static void abort_engine(void) {  // MPI kills instead
    if (communicator) ncclCommAbort(communicator);
}
#endif

// ---- waiting

static void nccl_taken(ncclResult_t e, const char *call) {  // until it has done so
    nccl_ok(e, call);
    waiting_begins();
    while (state_of_engine() == ncclInProgress) attend(0);
}

static void wait_for_event(cudaEvent_t event) {
    waiting_begins();
    for (int idle = 0;; idle++) {
        const cudaError_t e = cudaEventQuery(event);
        if (e == cudaSuccess) return;
        if (e != cudaErrorNotReady) cuda_ok(e, "what ranks exchange");
        if (idle % 16 != 0) continue;  // an exchange may take no longer than some questions
        attend(0);
        if (idle > 20000) usleep(50);
    }
}

// What follows in the stream of NCCL waits for all kernels so far.
static void group_begins(void) {
    cuda_ok(cudaEventRecord(computed, 0), "cudaEventRecord");
    cuda_ok(cudaStreamWaitEvent(moving, computed, 0), "cudaStreamWaitEvent");
    nccl_ok(ncclGroupStart(), "ncclGroupStart");
}
static void group_ends(cudaEvent_t when_arrived) {
    nccl_taken(ncclGroupEnd(), "ncclGroupEnd");
    cuda_ok(cudaEventRecord(when_arrived, moving), "cudaEventRecord");
}

// ---- all shards to all ranks; what rank 0 has to all

static void gather_shards(void *x, size_t size, const Config *net) {
    if (!communicator) return;
    group_begins();
    for (int r = 0; r < ranks; r++) {
        const size_t begin = shard_begin(net, r), end = shard_begin(net, r + 1);
        char *shard = (char *)x + begin * size;
        if (end > begin) nccl_ok(ncclBroadcast(shard, shard, (end - begin) * size, ncclUint8, r, communicator,
                                               moving), "ncclBroadcast");
    }
    group_ends(arrived[0]);
    wait_for_event(arrived[0]);
}
static void spread_all(void *x, size_t bytes) {
    if (!communicator) return;
    group_begins();
    nccl_ok(ncclBroadcast(x, x, bytes, ncclUint8, 0, communicator, moving), "ncclBroadcast");
    group_ends(arrived[0]);
    wait_for_event(arrived[0]);
}

static void ranks_gather(param_t *params, const Config *net) {
    measure_begin(0);
    gather_shards(params, sizeof(param_t), net);
    measure_parameters();
}
static void ranks_spread(param_t *params, const Config *net) {
    spread_all(params, parameter_count(net) * sizeof(param_t));
}

// Moments of all shards are where gradients are in a step; of one rank they are all.
static real_t *all_moments(const Model *m, real_t *own) { return ranks > 1 ? m->grads : own; }
static void gather_moments(const Model *m, const real_t *own) {
    if (ranks == 1) return;
    device_copy(m->grads + shard_begin(&m->net, rank), own, shard_size(&m->net) * sizeof(real_t));
    gather_shards(m->grads, sizeof(real_t), &m->net);
}
static void scatter_moments(const Model *m, real_t *own) {
    if (ranks == 1) return;
    spread_all(m->grads, parameter_count(&m->net) * sizeof(real_t));
    device_copy(own, m->grads + shard_begin(&m->net, rank), shard_size(&m->net) * sizeof(real_t));
}

// ---- numbers in host memory: many are added up from card to card

#ifndef REV_GPT2_MPI
static void ranks_combine(double *x, size_t count) {
    if (ranks == 1) return;
    if (count <= FEW || !communicator) {
        combine_few(x, count);
        return;
    }
    for (size_t i = 0, n; i < count; i += n) {
        n = count - i < ON_CARD ? count - i : (size_t)ON_CARD;
        cuda_ok(cudaMemcpy(on_card, x + i, n * sizeof *x, cudaMemcpyHostToDevice), "cudaMemcpy");
        group_begins();
        nccl_ok(ncclAllReduce(on_card, on_card, n, ncclFloat64, ncclSum, communicator, moving), "ncclAllReduce");
        group_ends(arrived[0]);
        wait_for_event(arrived[0]);
        cuda_ok(cudaMemcpy(x + i, on_card, n * sizeof *x, cudaMemcpyDeviceToHost), "cudaMemcpy");
    }
}
static int any_rank(int here) {
    double x = here;
    ranks_combine(&x, 1);
    return x > 0;
}
#endif

// ---- a round of lanes

// The first `lanes` ranks send every rank what they have of its shard, piece after piece. It goes to slots, one for
// a rank; twice, since the next piece is on its way while one is added.
typedef struct {
    int lanes;
    real_t *grads, *slots;
    size_t piece;   // elements
    size_t *begin;  // where each rank's shard begins, and the last one ends
} Round;

static size_t in_piece(const Round *t, int r, size_t k) {
    size_t all = t->begin[r + 1] - t->begin[r], at = k * t->piece;
    if (at >= all) return 0;
    return all - at < t->piece ? all - at : t->piece;
}
static real_t *slot(const Round *t, int r, size_t k) {
    return t->slots + (k % 2 * (size_t)ranks + (size_t)r) * t->piece;
}

static void ask_for_pieces(const Round *t, size_t k) {
    const size_t in = in_piece(t, rank, k);
    group_begins();
    for (int i = 1; i < ranks; i++) {
        const int to = (rank + i) % ranks, from = (rank + ranks - i) % ranks;
        const size_t out = in_piece(t, to, k);
        if (rank < t->lanes && out > 0) nccl_ok(ncclSend(t->grads + t->begin[to] + k * t->piece,
            out * sizeof(real_t), ncclUint8, to, communicator, moving), "ncclSend");
        if (from < t->lanes && in > 0)
            nccl_ok(ncclRecv(slot(t, from, k), in * sizeof(real_t), ncclUint8, from, communicator, moving), "ncclRecv");
    }
    group_ends(arrived[k % 2]);
}

// Adds the k-th pieces that have come to the sum.
static void add_pieces(const Round *t, const Model *m, size_t k, int begin) {
    const size_t n = in_piece(t, rank, k);
    real_t **lanes = (real_t **)calloc((size_t)t->lanes, sizeof *lanes);
    if (!lanes) die(STATUS_NUMBERS, "out of memory for %d lanes", t->lanes);
    for (int r = 0; r < t->lanes; r++) lanes[r] = slot(t, r, k);
    if (rank < t->lanes) lanes[rank] = t->grads + t->begin[rank] + k * t->piece;
    if (n > 0) add_lanes(m, lanes, t->lanes, k * t->piece, n, begin);
    free(lanes);
}

// Of a round that begins with a lane; its slots and pieces are the caller's to choose.
static Round *new_round(const Model *m, int lane) {
    Round *t = (Round *)calloc(1, sizeof *t + ((size_t)ranks + 1) * sizeof(size_t));
    if (!t) die(STATUS_NUMBERS, "out of memory for what %d ranks exchange", ranks);
    t->begin = (size_t *)(void *)(t + 1);
    t->lanes = smaller_of(ranks, m->lanes - lane);
    t->grads = m->grads;
    for (int r = 0; r <= ranks; r++) t->begin[r] = shard_begin(&m->net, r);
    return t;
}
static size_t largest_shard(const Round *t) {
    size_t most = 0;
    for (int r = 0; r < ranks; r++) most = larger_of(most, t->begin[r + 1] - t->begin[r]);
    return most;
}

static real_t *room_for(size_t count) {
    real_t *p = (real_t *)device_alloc(count * sizeof(real_t));
    if (!p) die(STATUS_NUMBERS, "out of memory for %zu bytes that ranks exchange", count * sizeof(real_t));
    return p;
}

// The slots are where logits are at other times, or if these are few, in memory of their own.
enum { MOST_BYTES = 32 << 20 };  // of a piece
static void exchange_round(Model *m, int lane) {
    static real_t *own;
    const size_t n = 2 * (size_t)ranks, logits = (size_t)m->head_chunk * (size_t)m->net.Vp * sizeof(act_t);
    const size_t bytes = logits / n < MOST_BYTES ? logits / n : (size_t)MOST_BYTES;
    Round *t = new_round(m, lane);
    t->slots = (real_t *)(void *)m->logits;
    t->piece = bytes / sizeof(real_t) / 64 * 64;  // places that are multiples of 256 bytes
    if (t->piece < PIECE) {
        t->piece = PIECE;
        if (!own) own = room_for(n * PIECE);
        t->slots = own;
    }
    const size_t pieces = (largest_shard(t) + t->piece - 1) / t->piece;
    ask_for_pieces(t, 0);
    for (size_t k = 0; k < pieces; k++) {
        if (k + 1 < pieces) ask_for_pieces(t, k + 1);
        wait_for_event(arrived[k % 2]);
        add_pieces(t, m, k, lane == 0);
    }
    free(t);
}

// ---- --overlap: while a round is on its way, the next one is computed into other gradients

static struct {
    int wanted, lane;
    Round *round;           // that is on its way, or NULL
    real_t *other, *slots;
} overlap;

static void end_overlapped(const Model *m) {
    if (!overlap.round) return;
    wait_for_event(arrived[0]);
    add_pieces(overlap.round, m, 0, overlap.lane == 0);
    free(overlap.round);
    overlap.round = NULL;
}

static void exchange_overlapped(Model *m, int lane) {
    static real_t *first;  // the model's own gradients, which it has back after a step
    end_overlapped(m);     // its lanes come first
    Round *t = new_round(m, lane);
    t->piece = largest_shard(t);
    if (!overlap.other) {
        first = m->grads;
        overlap.other = room_for(parameter_count(&m->net));
        overlap.slots = room_for((size_t)ranks * t->piece);
    }
    t->slots = overlap.slots;
    ask_for_pieces(t, 0);
    overlap.round = t;
    overlap.lane = lane;
    m->grads = m->grads == first ? overlap.other : first;
    if (lane + ranks < m->lanes) return;
    end_overlapped(m);
    m->grads = first;
}

// Who waits for all of the card hears nobody meanwhile: not while something is on its way from ranks that may be dying.
static void hear_first(void) {
    if (overlap.round) wait_for_event(arrived[0]);
}

static void ranks_exchange(Model *m, int lane) {
    if (measures()) hear_first();
    measure_begin(1);
    if (!communicator) add_lanes(m, &m->grads, 1, 0, parameter_count(&m->net), lane == 0);
    else if (overlap.wanted && m->sum) exchange_overlapped(m, lane);
    else exchange_round(m, lane);
    if (measures()) hear_first();
    measure_round();
}

// ---- the beginning and the end

// Everyone's number goes to all in each of the three ways that are used: connections are made now, and take
// their memory before anybody asks how much is left.
static void try_engine(void) {
    const size_t n = (size_t)ranks, bytes = n * sizeof(double);
    double *x = doubles(3 * n), wrong = 0;
    for (int r = 0; r < ranks; r++) x[r] = x[2 * ranks + r] = rank + 1;
    cuda_ok(cudaMemcpy(on_card, x, 3 * bytes, cudaMemcpyHostToDevice), "cudaMemcpy");
    group_begins();
    for (int r = 0; r < ranks; r++) {
        if (r == rank) continue;
        nccl_ok(ncclSend(on_card + r, sizeof *x, ncclUint8, r, communicator, moving), "ncclSend");
        nccl_ok(ncclRecv(on_card + ranks + r, sizeof *x, ncclUint8, r, communicator, moving), "ncclRecv");
    }
    group_ends(arrived[0]);
    wait_for_event(arrived[0]);
    group_begins();
    for (int r = 0; r < ranks; r++)
        nccl_ok(ncclBroadcast(on_card + r, on_card + r, sizeof *x, ncclUint8, r, communicator, moving), "ncclBroadcast");
    nccl_ok(ncclAllReduce(on_card + 2 * ranks, on_card + 2 * ranks, n, ncclFloat64, ncclSum, communicator, moving),
            "ncclAllReduce");
    group_ends(arrived[0]);
    wait_for_event(arrived[0]);
    cuda_ok(cudaMemcpy(x, on_card, 3 * bytes, cudaMemcpyDeviceToHost), "cudaMemcpy");
    cuda_ok(cudaMemset(on_card, 0, ON_CARD * sizeof *on_card), "cudaMemset");
    group_begins();  // many numbers may go another way, which has memory of its own
    nccl_ok(ncclAllReduce(on_card, on_card, ON_CARD, ncclFloat64, ncclSum, communicator, moving), "ncclAllReduce");
    group_ends(arrived[0]);
    wait_for_event(arrived[0]);
    for (int r = 0; r < ranks; r++) {
        wrong += x[r] != r + 1 || x[2 * ranks + r] != ranks * (ranks + 1) / 2;
        wrong += r != rank && x[ranks + r] != r + 1;
    }
    if (wrong > 0) die(STATUS_NUMBERS, "NCCL has brought other numbers than were sent");
    free(x);
}

// The ranks of a machine take its cards in turn. Slurm may show each task its own alone.
static void choose_card(int forked) {
    int cards = 0, place = 0;
    for (int r = 0; r < rank; r++) place += strcmp(hosts[r], hosts[rank]) == 0;
#ifndef REV_GPT2_MPI
    if (!forked && given_rank < 0) place = number_in("SLURM_LOCALID", place);
#endif
    cuda_ok(cudaGetDeviceCount(&cards), "cudaGetDeviceCount");
    if (place >= cards && (forked || cards > 1))
        die(STATUS_USAGE, "%d ranks on %s, which shows %d card%s: one for each is meant",
            place < ranks_here ? ranks_here : place + 1, hosts[rank], cards, cards == 1 ? "" : "s");
    card = cards > 1 ? place : 0;
    cuda_ok(cudaSetDevice(card), "cudaSetDevice");
    ranks_here = 1;  // that share the memory of a card
}

static void begin_engine(int forked) {
    int version = 0;
    ncclUniqueId id;
    ncclConfig_t config = NCCL_CONFIG_INITIALIZER;
    config.blocking = 0;
    choose_card(forked);
    before_waiting = hear_first;
    cuda_ok(cudaStreamCreateWithFlags(&moving, cudaStreamNonBlocking), "cudaStreamCreateWithFlags");
    cudaEvent_t *events[] = {&computed, &arrived[0], &arrived[1]};
    for (int i = 0; i < 3; i++) cuda_ok(cudaEventCreateWithFlags(events[i], cudaEventDisableTiming), "cudaEventCreateWithFlags");
    cuda_ok(cudaMalloc((void **)&on_card, ON_CARD * sizeof *on_card), "cudaMalloc");
    nccl_ok(ncclGetVersion(&version), "ncclGetVersion");
    memset(&id, 0, sizeof id);
    if (rank == 0) nccl_ok(ncclGetUniqueId(&id), "ncclGetUniqueId");
    ranks_broadcast(&id, sizeof id);
    nccl_taken(ncclCommInitRankConfig(&communicator, ranks, id, rank, &config), "ncclCommInitRankConfig");
    try_engine();
    printf("NCCL %d.%d.%d\n", version / 10000, version / 100 % 100, version % 100);
}

static void ranks_end(void) {
    if (communicator) {
        nccl_taken(ncclCommFinalize(communicator), "ncclCommFinalize");
        nccl_ok(ncclCommDestroy(communicator), "ncclCommDestroy");
        communicator = NULL;
    }
    end_lines();
}

static void begin_together(int argc, char **argv, int *wanted, int plan) {
    int several = ranks > 1, forked = 0;
#ifndef REV_GPT2_MPI
    if (plan) return;
    several = join(*wanted);
    forked = several && !rank_file[0];
    *wanted = 0;  // these are here now
#else
    (void)wanted;
#endif
    if (ranks > 1) compare_all(argc, argv);
    if (plan) ranks_here = 1;  // as choose_card has it
#ifdef PROFILE_WAITS
    if (several && profile_wanted) die(STATUS_USAGE, "--profile waits for all of the card at each layer function, and "
        "would not hear a rank die: it is for one process");
#endif
    if (several && !plan) begin_engine(forked);
}
#undef ranks_compare
#define ranks_compare(argc, argv) begin_together(argc, argv, &opt.ranks, opt.plan)
