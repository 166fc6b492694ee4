/*
nccl_emulated.h: the few functions of NCCL that nccl.cuh calls, for the emulated twin: processes of one machine, whose messages
are files in a folder of its memory.

It is meant to be unkind. Nothing moves before the host asks how things are, then one message in a turn, what is sent as late
as the rest allows; but what the host has not waited for yet may be there at once. A group is taken only when that has been
asked for. One that does not wait for the kernels before it, an event before its group is taken, or waiting for all of the card while
one is on its way ends the program.
EMULATED_NCCL="WHAT RANK GROUP" makes something go wrong on a rank from some group on: abort, refused, card, hang, silence.
*/
#include <dirent.h>
#include <fcntl.h>
#include <sys/stat.h>

enum ncclResult_t { ncclSuccess, ncclUnhandledCudaError, ncclSystemError, ncclInternalError, ncclInvalidArgument, ncclInvalidUsage,
                    ncclRemoteError, ncclInProgress };
enum ncclDataType_t { ncclUint8 = 1, ncclFloat64 = 8 };
enum ncclRedOp_t { ncclSum };
struct ncclUniqueId { char internal[128]; };
struct ncclConfig_t { int blocking; };
#define NCCL_CONFIG_INITIALIZER {1}
typedef struct emulated_communicator *ncclComm_t;

enum { cudaStreamNonBlocking = 1, cudaEventDisableTiming = 2 };
struct emulated_stream { int groups; unsigned long after; };  // groups so far; which work on the card they wait for
struct emulated_event { emulated_stream *stream; int groups; unsigned long work; };
typedef emulated_event *cudaEvent_t;

namespace emulate {

struct Message {
    int from, to;
    long number;      // of those from one to the other
    char *at;         // in device memory, or of host memory for a sum
    size_t bytes;
    bool done;
};
struct Sum { double *to, *from; size_t count; };  // from: a copy of each rank's
struct Batch { int first, end; bool done; };      // messages
enum { MOST_MESSAGES = 1 << 16, MOST_GROUPS = 1 << 16, MOST_SUMS = 8, MOST_RANKS = 64 };
struct Communicator {
    int rank, ranks, asked;  // asked: turns since it was asked for something last
    bool all_here, grouped, gone;  // gone: what another rank has aborted
    char folder[128];
    long sent[MOST_RANKS], received[MOST_RANKS];
};
static Communicator nccl;
static Message messages[MOST_MESSAGES];
static Sum sums[MOST_SUMS];
static Batch groups[MOST_GROUPS];
static int message_count, sum_count, group_count, groups_done, all_groups;
static emulated_stream *group_stream;

// Whether something is to go wrong now
static bool goes_wrong(const char *what) {
    const char *fault = getenv("EMULATED_NCCL");
    char kind[16];
    int rank, group;
    return fault && sscanf(fault, "%15s %d %d", kind, &rank, &group) == 3 && strcmp(kind, what) == 0 &&
           rank == nccl.rank && all_groups >= group;
}

static void path_of(char *path, size_t room, const Message &m, const char *end) {
    snprintf(path, room, "%s/%d_%d_%ld%s", nccl.folder, m.from, m.to, m.number, end);
}

static bool is_here(int rank) {
    char path[256];
    snprintf(path, sizeof path, "%s/here_%d", nccl.folder, rank);
    return access(path, F_OK) == 0;
}

static void put(const Message &m) {
    char aside[256], path[256], *copy = (char *)malloc(m.bytes + 1);
    path_of(aside, sizeof aside, m, ".tmp");
    path_of(path, sizeof path, m, "");
    open_memory(1);
    memcpy(copy, m.at, m.bytes);  // the system's functions cannot open it
    open_memory(-1);
    FILE *f = fopen(aside, "wb");
    if (!f || fwrite(copy, 1, m.bytes, f) != m.bytes || fclose(f) != 0 || rename(aside, path) != 0) {
        if (is_here(nccl.rank)) fail("cannot write %s", path);
        nccl.gone = true;
    }
    free(copy);
}

static bool get(const Message &m) {
    char path[256], more;
    path_of(path, sizeof path, m, "");
    FILE *f = fopen(path, "rb");
    if (!f) return false;
    char *room = (char *)malloc(m.bytes + 1);
    if (fread(room, 1, m.bytes, f) != m.bytes || fread(&more, 1, 1, f) != 0)
        fail("a message of other than %zu bytes from rank %d to %d", m.bytes, m.from, m.to);
    fclose(f);
    unlink(path);
    open_memory(1);
    memcpy(m.at, room, m.bytes);
    open_memory(-1);
    free(room);
    return true;
}

// Adds up what has come for sums, in the order of ranks.
static void add_sums(void) {
    open_memory(1);
    for (int s = 0; s < sum_count; s++) {
        for (size_t i = 0; i < sums[s].count; i++) {
            double sum = 0;
            for (int r = 0; r < nccl.ranks; r++) sum += sums[s].from[(size_t)r * sums[s].count + i];
            sums[s].to[i] = sum;
        }
        free(sums[s].from);
    }
    open_memory(-1);
    sum_count = 0;
}

// A turn: one message of the oldest group that is not done. What is sent goes first, or two ranks might wait for each other.
static void turn(void) {
    if (groups_done == group_count || nccl.gone || goes_wrong("hang")) return;
    Batch &g = groups[groups_done];
    for (int sending = 1; sending >= 0; sending--)
        for (int i = g.first; i < g.end; i++) {
            Message &m = messages[i];
            if (m.done || (m.from == nccl.rank) != (sending == 1)) continue;
            if (sending) put(m);
            else if (!get(m)) continue;
            m.done = true;
            return;
        }
    for (int i = g.first; i < g.end; i++)
        if (!messages[i].done) return;
    g.done = true;
    if (++groups_done < group_count) return;
    add_sums();
    groups_done = group_count = message_count = 0;
}

static ncclResult_t add_message(int from, int to, void *at, size_t bytes, cudaStream_t stream) {
    if (!nccl.grouped || message_count == MOST_MESSAGES || nccl.asked == 0) return ncclInvalidUsage;
    group_stream = stream;
    messages[message_count++] = {from, to, from == nccl.rank ? nccl.sent[to]++ : nccl.received[from]++, (char *)at, bytes, false};
    return ncclSuccess;
}

static void clear_folder(bool messages_too) {
    DIR *d = opendir(nccl.folder);
    char path[512];
    int here = 0, left = 0;
    for (struct dirent *e; d && (e = readdir(d));) {
        if (e->d_name[0] == '.') continue;
        here += strncmp(e->d_name, "here_", 5) == 0;
        left += strncmp(e->d_name, "here_", 5) != 0;
        snprintf(path, sizeof path, "%s/%s", nccl.folder, e->d_name);
        if (messages_too) unlink(path);
    }
    if (d) closedir(d);
    if (!messages_too && here == 0 && left > 0) fail("%d messages that nobody has received", left);
    rmdir(nccl.folder);  // by the last one
}

}  // namespace emulate

static inline const char *ncclGetErrorString(ncclResult_t e) {
    static const char *const names[] = {"no error", "unhandled cuda error", "unhandled system error", "internal error", "invalid argument",
                                        "invalid usage", "remote process exited or there was a network error", "in progress"};
    return names[e];
}
static inline const char *ncclGetLastError(ncclComm_t) { return "this NCCL is emulated"; }
static inline ncclResult_t ncclGetVersion(int *version) { return *version = 0, ncclSuccess; }
static inline ncclResult_t ncclGetUniqueId(ncclUniqueId *id) {
    const char *folder = getenv("EMULATED_FOLDER"), *shared = access("/dev/shm", W_OK) == 0 ? "/dev/shm" : "/tmp";
    if (folder) shared = folder;
    snprintf(id->internal, sizeof id->internal, "%s/nccl_emulated_XXXXXX", shared);
    // only a name, so that nothing is left of ranks that never come
    return mkdtemp(id->internal) && rmdir(id->internal) == 0 ? ncclSuccess : ncclSystemError;
}
static inline ncclResult_t ncclCommInitRankConfig(ncclComm_t *c, int ranks, ncclUniqueId id, int rank, ncclConfig_t *config) {
    using namespace emulate;
    char path[256];
    if (config->blocking || ranks > MOST_RANKS || rank >= ranks) return ncclInvalidArgument;
    nccl.rank = rank, nccl.ranks = ranks;
    travels = [] { return groups_done < group_count; };
    snprintf(nccl.folder, sizeof nccl.folder, "%s", id.internal);
    snprintf(path, sizeof path, "%s/here_%d", nccl.folder, rank);
    *c = (ncclComm_t)&nccl;
    if (goes_wrong("silence")) return ncclInProgress;
    mkdir(nccl.folder, 0700);
    int fd = open(path, O_CREAT | O_EXCL | O_WRONLY, 0600);
    if (fd < 0) return ncclInvalidUsage;
    close(fd);
    return ncclInProgress;
}
static inline ncclResult_t ncclCommGetAsyncError(ncclComm_t, ncclResult_t *state) {
    using namespace emulate;
    *state = ncclInProgress;
    if (!nccl.all_here) {
        for (int r = 0; r < nccl.ranks; r++)
            if (!is_here(r)) return ncclSuccess;
        nccl.all_here = true;
    }
    if (nccl.asked++ == 0) return ncclSuccess;
    turn();
    *state = nccl.gone || goes_wrong("abort") ? ncclRemoteError : ncclSuccess;
    return ncclSuccess;
}
static inline ncclResult_t ncclCommFinalize(ncclComm_t) {
    emulate::nccl.asked = 0;
    return ncclInProgress;
}
static inline ncclResult_t ncclCommDestroy(ncclComm_t) {
    using namespace emulate;
    char path[256];
    if (groups_done < group_count) fail("a communicator is destroyed with messages under way");
    snprintf(path, sizeof path, "%s/here_%d", nccl.folder, nccl.rank);
    unlink(path);
    clear_folder(false);
    return ncclSuccess;
}
static inline ncclResult_t ncclCommAbort(ncclComm_t) {
    emulate::clear_folder(true);
    return ncclSuccess;
}
static inline ncclResult_t ncclGroupStart(void) {
    if (emulate::nccl.grouped) return ncclInvalidUsage;
    emulate::nccl.grouped = true;
    emulate::groups[emulate::group_count].first = emulate::message_count;
    return ncclSuccess;
}
static inline ncclResult_t ncclGroupEnd(void) {
    using namespace emulate;
    if (!nccl.grouped || group_count == MOST_GROUPS) return ncclInvalidUsage;
    nccl.grouped = false;
    all_groups++;
    if (goes_wrong("refused")) return ncclSystemError;
    Batch &g = groups[group_count++];
    g.end = message_count, g.done = false;
    if (group_stream && group_stream->after < works) fail("what ranks exchange does not wait for the kernels before it");
    if (group_stream) group_stream->groups++;
    nccl.asked = 0;
    return ncclInProgress;
}
static inline ncclResult_t ncclSend(const void *from, size_t count, ncclDataType_t, int to, ncclComm_t, cudaStream_t stream) {
    return emulate::add_message(emulate::nccl.rank, to, (char *)from, count, stream);
}
static inline ncclResult_t ncclRecv(void *to, size_t count, ncclDataType_t, int from, ncclComm_t, cudaStream_t stream) {
    return emulate::add_message(from, emulate::nccl.rank, to, count, stream);
}
static inline ncclResult_t ncclBroadcast(const void *from, void *to, size_t count, ncclDataType_t, int root, ncclComm_t, cudaStream_t stream) {
    using namespace emulate;
    ncclResult_t e = ncclSuccess;
    if (nccl.rank != root) return add_message(root, nccl.rank, to, count, stream);
    for (int r = 0; r < nccl.ranks && e == ncclSuccess; r++)
        if (r != root) e = add_message(root, r, (char *)from, count, stream);
    return e;
}
static inline ncclResult_t ncclAllReduce(const void *from, void *to, size_t count, ncclDataType_t type, ncclRedOp_t, ncclComm_t, cudaStream_t stream) {
    using namespace emulate;
    const size_t bytes = count * sizeof(double);
    ncclResult_t e = ncclSuccess;
    if (type != ncclFloat64 || sum_count == MOST_SUMS) return ncclInvalidArgument;
    Sum &s = sums[sum_count++];
    s = {(double *)to, (double *)malloc(bytes * (size_t)nccl.ranks), count};
    open_memory(1);
    memcpy(s.from + (size_t)nccl.rank * count, from, bytes);
    open_memory(-1);
    for (int r = 0; r < nccl.ranks && e == ncclSuccess; r++) {
        if (r == nccl.rank) continue;
        e = add_message(nccl.rank, r, (char *)from, bytes, stream);
        if (e == ncclSuccess) e = add_message(r, nccl.rank, s.from + (size_t)r * count, bytes, stream);
    }
    return e;
}

// ---- streams and events beside the first, which has always done what it was asked for

static inline cudaError_t cudaGetDeviceCount(int *count) {
    const char *cards = getenv("EMULATED_CARDS");
    *count = cards ? atoi(cards) : 64;
    return *count > 0 ? cudaSuccess : cudaErrorNoDevice;
}
static inline cudaError_t cudaStreamCreateWithFlags(cudaStream_t *stream, unsigned) {
    *stream = new emulated_stream{0, 0};
    return cudaSuccess;
}
static inline cudaError_t cudaEventCreateWithFlags(cudaEvent_t *event, unsigned) {
    *event = new emulated_event{NULL, 0, 0};
    return cudaSuccess;
}
static inline cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
    using namespace emulate;
    if (stream && nccl.asked == 0) fail("an event is recorded before its group is taken");
    event->stream = stream;
    event->groups = stream ? stream->groups : 0;
    event->work = works;
    return cudaSuccess;
}
static inline cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned) {
    if (!event->stream) stream->after = event->work;
    return cudaSuccess;
}
static inline cudaError_t cudaEventQuery(cudaEvent_t event) {
    using namespace emulate;
    if (goes_wrong("card")) return cudaErrorUnknown;
    turn();
    // groups are counted anew whenever all are done
    if (event->stream && event->stream->groups - (group_count - groups_done) < event->groups) return cudaErrorNotReady;
    for (int i = 0; event->stream && groups_done < group_count && i < 100; i++) {  // the next ones arrive as early as they may
        turn();
        usleep(100);
    }
    return cudaSuccess;
}
