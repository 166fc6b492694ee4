/*
emulate.h: lets an ordinary C++ compiler build train_rev_gpt2.cu and run its kernels on the CPU, for tests where there is no GPU.

    g++ -x c++ -DEMULATE -include dev/cuda/emulate.h train_rev_gpt2.cu

A CUDA thread is a fiber; the fibers of a block run in turn, and the blocks of a grid one after the other. A fiber runs until it
meets __syncthreads or a warp operation, where it waits for the others. What a warp does together (shuffles, votes, ldmatrix,
mma) is an exchange: every lane says what it has, and sees what all lanes had.

It is meant to be unkind. Device memory cannot be touched outside kernels and copies, is full of NaN when fresh, and ends at a
page that nobody may touch; shared memory is full of NaN when a block begins; cp.async copies as late as it may; a warp goes as far
as it can before the next one moves, the first ahead in one stretch and the last in the next, so that a missing barrier shows; a warp operation that part of a warp
comes to, or a barrier that not all threads come to, ends the program. Every complaint names kernel, block and thread.
*/
#ifndef EMULATE_H
#define EMULATE_H
#include <csignal>
#include <cmath>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define LIBRARY_BYTES 256  // the library below needs none, and opening and closing memory takes time by the page

struct uint3 { unsigned x, y, z; };
struct dim3 {
    unsigned x, y, z;
    dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(8) float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
static uint3 threadIdx, blockIdx;
static dim3 blockDim, gridDim;

namespace emulate {

// ---- fibers

// Stacks are no power of two apart, or they would all want the same few lines of the cache.
enum { MOST_THREADS = 1024, WARP = 32, STACK = (1 << 16) + 576, SLOT = 64, MOST_COPIES = 128 };
enum { SHARED_LIMIT = 99 << 10 };  // the least that a card of compute capability 8.0 or newer gives a block
// A place is a point in a fiber, for GCC's own setjmp, which takes a fraction of the library's time. It restores no
// registers, so a function that calls it may tell its callers nothing of those it leaves alone: noipa.
typedef void *Place[5];
struct Meeting { int expected, arrived; unsigned phase; };
struct Copy { void *to; const void *from; int bytes, whole, group; };
struct Fiber {
    Place at;
    uint3 thread;
    bool started, done;
    int copy_count, group;
};
struct Warp {
    Meeting meeting;
    const char *what;            // the operation under way
    char slot[2][WARP][SLOT];    // by turns, so that the next exchange does not disturb the last
};
static Fiber fibers[MOST_THREADS], *current;
static Copy copies[MOST_THREADS][MOST_COPIES];  // under way, of each fiber
static Warp warps[MOST_THREADS / WARP];
static Meeting block_meeting;
static Place scheduler;
static char *stacks, *shared_memory;
static const char *kernel_name;
static void (*kernel_body)(const void *);
static const void *kernel_arguments;
static bool moved;  // has any fiber come further since this was false?
static unsigned long works;  // kernels and copies so far, of which each has ended before the next begins

[[noreturn]] __attribute__((format(printf, 1, 2))) static void fail(const char *format, ...) {
    char line[512];
    va_list args;
    va_start(args, format);
    int n = 0;
    if (kernel_name && current)
        n = snprintf(line, sizeof line, "emulate: %s, block (%u, %u, %u), thread (%u, %u, %u): ", kernel_name, blockIdx.x, blockIdx.y, blockIdx.z,
                     threadIdx.x, threadIdx.y, threadIdx.z);
    else n = snprintf(line, sizeof line, "emulate: ");
    n += vsnprintf(line + n, sizeof line - (size_t)n - 1, format, args);
    line[n++] = '\n';
    if (write(2, line, (size_t)n) < 0) _exit(98);
    _exit(99);
}

[[gnu::noipa, noreturn]] static void go_to(Place place) { __builtin_longjmp(place, 1); }
static void go_on_as(int i) {
    current = &fibers[i];
    threadIdx = current->thread;
}
// In a round of a warp every fiber that is not done has one turn: take_turn gives the next of them, or -1 after the last.
static int next_turn, turns_left, turn_step;
static int take_turn(void) {
    while (turns_left-- > 0) {
        int i = next_turn;
        next_turn += turn_step;
        if (!fibers[i].done) return i;
    }
    return -1;
}
// Goes on in the next fiber of the round. The scheduler makes a fiber that has not started, and begins the next round.
[[gnu::noipa]] static void yield(void) {
    if (__builtin_setjmp(current->at)) return;
    int i = take_turn();
    if (i >= 0 && fibers[i].started) go_on_as(i), go_to(current->at);
    if (i >= 0) next_turn = i, turns_left++;
    go_to(scheduler);
}
static void release(Meeting &m) {
    if (m.arrived == 0 || m.arrived < m.expected) return;
    m.arrived = 0;
    m.phase++;
}
__forceinline__ void meet(Meeting &m) {
    unsigned phase = m.phase;
    m.arrived++;
    release(m);
    while (m.phase == phase) yield();
    moved = true;
}

static int thread_index(void) { return (int)(current - fibers); }
static int lane(void) { return thread_index() % WARP; }
static Warp &warp(void) { return warps[thread_index() / WARP]; }

static void entry(void) {
    for (;; yield()) {  // once for every block: making a fiber takes longer than most of them run
        kernel_body(kernel_arguments);
        if (current->copy_count) fail("ends with copies under way");
        current->done = moved = true;
        block_meeting.expected--;
        warp().meeting.expected--;
        release(block_meeting);
        if (warp().meeting.arrived) fail("ends while other threads of its warp wait in %s", warp().what);
    }
}
[[gnu::noipa]] static void resume(int i) {
    go_on_as(i);
    if (__builtin_setjmp(scheduler)) return;
    if (current->started) go_to(current->at);
    current->started = true;
    ucontext_t context;
    getcontext(&context);
    context.uc_stack.ss_sp = stacks + (size_t)i * STACK;
    context.uc_stack.ss_size = STACK;
    context.uc_link = NULL;
    makecontext(&context, entry, 0);
    setcontext(&context);
}

static void run_block(int threads, size_t shared) {
    memset(shared_memory, 0xFF, shared);
    for (int w = 0; w < threads / WARP; w++) warps[w].meeting = {};
    memset(&block_meeting, 0, sizeof block_meeting);
    block_meeting.expected = threads;
    for (int i = 0; i < threads; i++) {
        Fiber &f = fibers[i];
        f.thread = {(unsigned)i % blockDim.x, (unsigned)i / blockDim.x % blockDim.y, (unsigned)i / (blockDim.x * blockDim.y)};
        f.done = false;
        f.copy_count = f.group = 0;
        warps[i / WARP].meeting.expected++;
    }
    for (int round = 0, left = threads; left > 0; round++) {
        bool any = false;
        left = 0;
        for (int w = 0; w < threads / WARP; w++) {  // a warp goes as far as it can without the others
            int first = (round % 2 ? threads / WARP - 1 - w : w) * WARP, waiting;
            do {
                moved = false;
                waiting = 0;
                next_turn = first + (round % 2 ? WARP - 1 : 0), turn_step = round % 2 ? -1 : 1, turns_left = WARP;
                for (int i; (i = take_turn()) >= 0;) resume(i);
                for (int i = first; i < first + WARP; i++) waiting += !fibers[i].done;
                any |= moved;
            } while (moved && waiting);
            left += waiting;
        }
        if (left && !any) fail("waits for threads that wait elsewhere");
    }
    current = NULL;
}

// ---- device memory

struct Allocation { char *pages, *at; size_t page_bytes, bytes; bool open; };
enum { MOST_ALLOCATIONS = 4096 };
static Allocation allocations[MOST_ALLOCATIONS];
static int allocation_count, opened;
static char *arena, *arena_end, *arena_next;
static size_t device_bytes = (size_t)8 << 30, device_used;  // a small card

// Between open_memory(1) and (-1) an allocation opens where it is touched first, since opening takes time.
static void protect(Allocation &a, bool open) {
    if (mprotect(a.pages, a.page_bytes, open ? PROT_READ | PROT_WRITE : PROT_NONE)) fail("mprotect failed");
    a.open = open;
}
static void open_memory(int open) {
    opened += open;
    __asm__ volatile("" ::: "memory");  // an access may fault, and its handler reads and writes what is here
    if (opened > 0) return;
    for (int i = 0; i < allocation_count; i++)
        if (allocations[i].open) protect(allocations[i], false);
}

static void on_fault(int, siginfo_t *info, void *) {
    char *p = (char *)info->si_addr;
    if (p < arena || p >= arena_end) {
        if (current && p >= stacks - STACK && p < stacks + (size_t)MOST_THREADS * STACK) fail("its stack is too small");
        fail("access to %p, which is not device memory", (void *)p);
    }
    for (int i = 0; i < allocation_count; i++) {
        Allocation &a = allocations[i];
        if (p < a.pages || p >= a.pages + a.page_bytes + 4096) continue;
        if (opened && !a.open && p < a.pages + a.page_bytes) return protect(a, true);
        if (!opened && p < a.at + a.bytes) fail("the host touches device memory, byte %zu of a buffer of %zu", (size_t)(p - a.at), a.bytes);
        fail("access to byte %td of a buffer of %zu", p - a.at, a.bytes);
    }
    fail("access to device memory that is not allocated");
}

static void begin(void) {
    if (arena) return;
    size_t reserved = (size_t)1 << 38;
    arena = (char *)mmap(NULL, reserved, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    arena_end = arena + reserved, arena_next = arena + 4096;
    stacks = (char *)mmap(NULL, (size_t)MOST_THREADS * STACK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    shared_memory = (char *)aligned_alloc(1024, SHARED_LIMIT + 1024);
    static char alternate[1 << 16];
    stack_t stack = {};
    stack.ss_sp = alternate, stack.ss_size = sizeof alternate;
    sigaltstack(&stack, NULL);
    struct sigaction action = {};
    action.sa_sigaction = on_fault;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK;
    sigaction(SIGSEGV, &action, NULL);
    sigaction(SIGBUS, &action, NULL);
}

template <class F> static void launch(const char *name, dim3 grid, dim3 block, size_t shared, const F &kernel) {
    begin();
    size_t threads = (size_t)block.x * block.y * block.z;
    kernel_name = name;
    works++;
    if (threads == 0 || threads > MOST_THREADS || threads % WARP) fail("a block of %zu threads", threads);
    if (grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.y > 65535 || grid.z > 65535) fail("a grid of (%u, %u, %u) blocks", grid.x, grid.y, grid.z);
    if (shared > SHARED_LIMIT) fail("%zu bytes of shared memory", shared);
    gridDim = grid, blockDim = block;
    kernel_arguments = &kernel;
    kernel_body = [](const void *f) { (*(const F *)f)(); };
    open_memory(1);
    for (unsigned z = 0; z < grid.z; z++)
        for (unsigned y = 0; y < grid.y; y++)
            for (unsigned x = 0; x < grid.x; x++) {
                blockIdx = {x, y, z};
                run_block((int)threads, shared);
            }
    open_memory(-1);
    kernel_name = NULL;
}

// ---- what a warp does together

template <class T> struct Lanes {
    const char *slots;
    const T &operator[](int lane) const { return *(const T *)(slots + (size_t)(lane & (WARP - 1)) * SLOT); }
};
template <class T> __forceinline__ Lanes<T> exchange(const char *what, const T &mine) {
    static_assert(sizeof(T) <= SLOT, "a slot is too small");
    Warp &w = warp();
    char *slots = w.slot[w.meeting.phase % 2][0];
    if (w.meeting.expected != WARP) fail("%s without %d threads of its warp", what, WARP - w.meeting.expected);
    if (w.meeting.arrived && w.what != what) fail("%s, while other threads of its warp are in %s", what, w.what);
    w.what = what;
    memcpy(slots + lane() * SLOT, &mine, sizeof mine);
    meet(w.meeting);
    return {slots};
}
static void whole(const char *what, unsigned mask) {
    if (mask != 0xFFFFFFFFu) fail("%s with mask %x", what, mask);
}

}  // namespace emulate

// Names that nvcc gives to the device alone: the host's code cannot have functions of them.
bool any(bool) = delete;
bool all(bool) = delete;

static inline void __syncthreads(void) { emulate::meet(emulate::block_meeting); }
static inline void __syncwarp(unsigned mask = 0xFFFFFFFFu) { emulate::whole("__syncwarp", mask), emulate::exchange("__syncwarp", 0); }
template <class T> __forceinline__ T __shfl_sync(unsigned mask, T x, int from) {
    emulate::whole("__shfl_sync", mask);
    return emulate::exchange("__shfl_sync", x)[from];
}
template <class T> __forceinline__ T __shfl_xor_sync(unsigned mask, T x, int with) {
    emulate::whole("__shfl_xor_sync", mask);
    return emulate::exchange("__shfl_xor_sync", x)[emulate::lane() ^ with];
}
__forceinline__ unsigned __ballot_sync(unsigned mask, int x) {
    emulate::whole("__ballot_sync", mask);
    emulate::Lanes<int> all = emulate::exchange("__ballot_sync", x);
    unsigned votes = 0;
    for (int i = 0; i < emulate::WARP; i++) votes |= (unsigned)(all[i] != 0) << i;
    return votes;
}
static inline int __any_sync(unsigned mask, int x) { return __ballot_sync(mask, x) != 0; }

// What a card computes by a short cut comes out as far off as it may: by one part in 2^bits, up or down as a bit
// of y has it.
static inline float about(float y, int bits) {
    uint32_t u;
    memcpy(&u, &y, 4);
    float part = 1.0f / (float)(1 << bits);
    return y * (u & 8 ? 1 + part : 1 - part);
}
static inline float exp2_fast(float x) { return about(exp2f(x), 22); }
static inline float exp_fast(float x) { return exp2_fast(x * 1.4426950f); }
#define __expf exp_fast
static inline float tanh_fast(float x) {  // it reaches 1
    float t = tanhf(x);
    return fabsf(t) > 1 - 1 / 2048.0f ? copysignf(1, t) : about(t, 11);
}
static inline float atomicAdd(float *p, float x) {
    float before = *p;
    *p += x;
    return before;
}
static inline unsigned long long atomicAdd(unsigned long long *p, unsigned long long x) {
    unsigned long long before = *p;
    *p += x;
    return before;
}
static inline int atomicOr(int *p, int x) {
    int before = *p;
    *p |= x;
    return before;
}

// ---- bf16

struct __nv_bfloat16 {
    uint16_t bits;
    __nv_bfloat16() = default;
    __nv_bfloat16(float f) {  // to the nearest, ties to even
        uint32_t u;
        memcpy(&u, &f, 4);
        bits = f != f ? (uint16_t)0x7FFF : (uint16_t)((u + 0x7FFF + (u >> 16 & 1)) >> 16);
    }
    operator float() const {
        uint32_t u = (uint32_t)bits << 16;
        float f;
        memcpy(&f, &u, 4);
        return f;
    }
};
struct alignas(4) __nv_bfloat162 { __nv_bfloat16 x, y; };
static inline float __bfloat162float(__nv_bfloat16 x) { return x; }
static inline __nv_bfloat16 __float2bfloat16(float f) { return f; }
static inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) { return {__float2bfloat16(x), __float2bfloat16(y)}; }

// ---- the wrappers of instructions that train_rev_gpt2.cu has, under the same names

struct Fragments { uint32_t r[6]; };
static inline float half_of(uint32_t pair, int high) {
    uint32_t bits = high ? pair & 0xFFFF0000u : pair << 16;
    float x;
    memcpy(&x, &bits, 4);
    return x;
}

typedef float four __attribute__((vector_size(16)));

// mma.sync.m16n8k16: d (16, 8) += a (16, 16) b (16, 8). Lane 4g + t holds of a (g, 2t), (g + 8, 2t), (g, 2t + 8), (g + 8, 2t + 8) and what
// is right of each; of b (2t, g), (2t + 8, g) and what is below; of d (g, 2t), (g, 2t + 1), (g + 8, 2t), (g + 8, 2t + 1).
static inline void mma_bf16(float d[4], const uint32_t a[4], const uint32_t b[2]) {
    Fragments mine = {{a[0], a[1], a[2], a[3], b[0], b[1]}};
    emulate::Lanes<Fragments> all = emulate::exchange("mma", mine);
    int g = emulate::lane() / 4, t = emulate::lane() % 4;
    four sum = {};  // of rows g and g + 8 of a with columns 2t and 2t + 1 of b, each as d has it; pair i is k = 2i and 2i + 1
    for (int i = 0; i < 8; i++) {
        const Fragments &row = all[4*g + i % 4], &even = all[8*t + i % 4], &odd = all[8*t + 4 + i % 4];
        uint32_t x0 = row.r[i / 4 * 2], x1 = row.r[i / 4 * 2 + 1], y0 = even.r[4 + i / 4], y1 = odd.r[4 + i / 4];
        for (int high = 0; high < 2; high++) {
            four x = {half_of(x0, high), half_of(x0, high), half_of(x1, high), half_of(x1, high)};
            four y = {half_of(y0, high), half_of(y1, high), half_of(y0, high), half_of(y1, high)};
            sum += x * y;
        }
    }
    for (int i = 0; i < 4; i++) d[i] += sum[i];
}

// Addresses in shared memory are 32 bits, from its beginning.
static inline uint32_t shared_address(const void *p) { return (uint32_t)((const char *)p - emulate::shared_memory); }
static inline char *in_shared(uint32_t at, uint32_t bytes) {
    if (at % bytes) emulate::fail("address %u in shared memory is no multiple of %u", at, bytes);
    if (at + bytes > emulate::SHARED_LIMIT) emulate::fail("address %u is outside shared memory", at);
    return emulate::shared_memory + at;
}
static inline void store_shared(uint32_t to, float x) { *(__nv_bfloat16 *)in_shared(to, 2) = x; }
static inline float4 load_shared(uint32_t from) { return *(float4 *)in_shared(from, 16); }

// ldmatrix.x4: four 8 x 8 matrices of 16 bits; lane i says where row i % 8 of matrix i / 8 begins, and gets of each matrix elements
// 2t and 2t + 1 of row g, or, transposed, of column g.
static inline void load_matrices(uint32_t r[4], uint32_t row, bool transposed) {
    emulate::Lanes<const char *> all = emulate::exchange("ldmatrix", (const char *)in_shared(row, 16));
    int g = emulate::lane() / 4, t = emulate::lane() % 4;
    for (int m = 0; m < 4; m++) {
        uint16_t low, high;
        memcpy(&low, (const uint16_t *)(const void *)all[8*m + (transposed ? 2*t : g)] + (transposed ? g : 2*t), 2);
        memcpy(&high, (const uint16_t *)(const void *)all[8*m + (transposed ? 2*t + 1 : g)] + (transposed ? g : 2*t + 1), 2);
        r[m] = low | (uint32_t)high << 16;
    }
    __syncwarp();  // what was read may be overwritten only now
}
static inline void ldmatrix(uint32_t r[4], uint32_t row) { load_matrices(r, row, false); }
static inline void ldmatrix_transposed(uint32_t r[4], uint32_t row) { load_matrices(r, row, true); }

// cp.async of 16 or 8 bytes, of which the first `bytes` are copied and the rest become 0; the copy is made when it is waited for
template <int BYTES> static void copy_async(uint32_t to, const void *from, int bytes) {
    emulate::Fiber &f = *emulate::current;
    if ((uintptr_t)from % BYTES) emulate::fail("cp.async from an address that is no multiple of %d", BYTES);
    if (f.copy_count == emulate::MOST_COPIES) emulate::fail("more than %d copies under way", emulate::MOST_COPIES);
    memset(in_shared(to, BYTES), 0xFF, BYTES);
    emulate::Copy *copies = emulate::copies[&f - emulate::fibers];
    copies[f.copy_count++] = {in_shared(to, BYTES), from, bytes, BYTES, f.group};
}
static inline void copy_async_commit(void) { emulate::current->group++; }
template <int N> static void copy_async_wait(void) {  // until at most N groups are under way
    emulate::Fiber &f = *emulate::current;
    emulate::Copy *copies = emulate::copies[&f - emulate::fibers];
    int left = 0;
    for (int i = 0; i < f.copy_count; i++) {
        emulate::Copy c = copies[i];
        if (c.group >= f.group - N) {
            copies[left++] = c;
            continue;
        }
        memset(c.to, 0, (size_t)c.whole);
        memcpy(c.to, c.from, (size_t)c.bytes);
    }
    f.copy_count = left;
}

// ---- the runtime

enum cudaError_t { cudaSuccess, cudaErrorMemoryAllocation = 2, cudaErrorInvalidValue = 1, cudaErrorNoDevice = 100, cudaErrorNotReady = 600, cudaErrorUnknown = 999 };
enum cudaMemcpyKind { cudaMemcpyHostToDevice = 1, cudaMemcpyDeviceToHost = 2, cudaMemcpyDeviceToDevice = 3 };
typedef struct emulated_stream *cudaStream_t;
struct cudaDeviceProp {
    char name[256];
    size_t totalGlobalMem;
    int multiProcessorCount, major, minor;
};
static inline const char *cudaGetErrorString(cudaError_t e) {
    switch (e) {
    case cudaSuccess: return "no error";
    case cudaErrorMemoryAllocation: return "out of memory";
    case cudaErrorNoDevice: return "no CUDA-capable device is detected";
    case cudaErrorUnknown: return "unknown error";
    default: return "invalid value";
    }
}
static inline const char *cudaGetErrorName(cudaError_t e) { return cudaGetErrorString(e); }
static inline cudaError_t cudaGetLastError(void) { return cudaSuccess; }
static inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }
namespace emulate { static bool (*travels)(void); }  // whether something is on its way from another rank
static inline cudaError_t cudaDeviceSynchronize(void) {
    if (emulate::travels && emulate::travels()) emulate::fail("waits for all of the card while ranks exchange, and would not hear one of them die");
    return cudaSuccess;
}
static inline cudaError_t cudaGetDeviceProperties(cudaDeviceProp *p, int) {
    const char *name = getenv("EMULATED_CARD");
    *p = {"", emulate::device_bytes, 4, 9, 0};
    snprintf(p->name, sizeof p->name, "%s", name ? name : "an emulated device");
    return cudaSuccess;
}
static inline cudaError_t cudaMemGetInfo(size_t *free, size_t *total) {
    *free = emulate::device_bytes - emulate::device_used;
    *total = emulate::device_bytes;
    return cudaSuccess;
}
static inline cudaError_t cudaMalloc(void **p, size_t bytes) {
    using namespace emulate;
    begin();
    size_t whole = (bytes + 255) / 256 * 256, page_bytes = (whole + 4095) / 4096 * 4096;
    if (device_used + page_bytes > device_bytes || allocation_count == MOST_ALLOCATIONS || arena_next + page_bytes + 4096 > arena_end) return cudaErrorMemoryAllocation;
    Allocation a = {arena_next, arena_next + page_bytes - whole, page_bytes, bytes, opened > 0};
    arena_next += page_bytes + 4096;
    device_used += page_bytes;
    if (mprotect(a.pages, page_bytes, PROT_READ | PROT_WRITE)) return cudaErrorMemoryAllocation;
    memset(a.pages, 0xFF, page_bytes);
    if (!opened && mprotect(a.pages, page_bytes, PROT_NONE)) return cudaErrorMemoryAllocation;
    allocations[allocation_count++] = a;
    *p = a.at;
    return cudaSuccess;
}
static inline cudaError_t cudaFree(void *p) {
    using namespace emulate;
    for (int i = 0; p && i < allocation_count; i++) {
        if (allocations[i].at != p) continue;
        Allocation a = allocations[i];
        open_memory(1);
        for (char *c = a.pages; c < a.pages + a.page_bytes; c++)
            if ((c < a.at || c >= a.at + a.bytes) && *c != (char)0xFF) fail("byte %td of a buffer of %zu has been written", c - a.at, a.bytes);
        open_memory(-1);
        madvise(a.pages, a.page_bytes, MADV_DONTNEED);
        mprotect(a.pages, a.page_bytes, PROT_NONE);
        device_used -= a.page_bytes;
        allocations[i] = allocations[--allocation_count];
        return cudaSuccess;
    }
    return p ? cudaErrorInvalidValue : cudaSuccess;
}
static inline cudaError_t cudaMemset(void *p, int value, size_t bytes) {
    emulate::works++;
    emulate::open_memory(1);
    memset(p, value, bytes);
    emulate::open_memory(-1);
    return cudaSuccess;
}
static inline cudaError_t cudaMemcpy(void *to, const void *from, size_t bytes, cudaMemcpyKind kind) {
    bool to_arena = (char *)to >= emulate::arena && (char *)to < emulate::arena_end, from_arena = (char *)from >= emulate::arena && (char *)from < emulate::arena_end;
    if (to_arena != (kind != cudaMemcpyDeviceToHost) || from_arena != (kind != cudaMemcpyHostToDevice)) return cudaErrorInvalidValue;
    emulate::works++;
    emulate::open_memory(1);
    memmove(to, from, bytes);
    emulate::open_memory(-1);
    return cudaSuccess;
}

// ---- the part of cuBLASLt that train_rev_gpt2.cu calls, by plain loops. Matrices are stored by columns.

enum cublasStatus_t { CUBLAS_STATUS_SUCCESS = 0, CUBLAS_STATUS_INVALID_VALUE = 7, CUBLAS_STATUS_NOT_SUPPORTED = 15 };
enum cublasOperation_t { CUBLAS_OP_N, CUBLAS_OP_T };
enum cublasComputeType_t { CUBLAS_COMPUTE_32F = 68 };
enum cudaDataType_t { CUDA_R_32F = 0, CUDA_R_16BF = 14 };
enum cublasLtEpilogue_t { CUBLASLT_EPILOGUE_DEFAULT = 1, CUBLASLT_EPILOGUE_BIAS = 4, CUBLASLT_EPILOGUE_GELU_AUX_BIAS = 164, CUBLASLT_EPILOGUE_DGELU = 192 };
enum cublasLtMatmulDescAttributes_t { CUBLASLT_MATMUL_DESC_TRANSA, CUBLASLT_MATMUL_DESC_TRANSB, CUBLASLT_MATMUL_DESC_EPILOGUE, CUBLASLT_MATMUL_DESC_BIAS_POINTER,
                                      CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE, CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_POINTER, CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_LD };
enum cublasLtMatmulPreferenceAttributes_t { CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK,
                                            CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES,
                                            CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES };
enum { CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE = 2 };
struct emulated_desc { cublasOperation_t a, b; cublasLtEpilogue_t epilogue; cudaDataType_t bias_type; const void *bias; void *aux; int64_t aux_ld; };
struct emulated_layout { cudaDataType_t type; uint64_t rows, cols; int64_t ld; };
typedef emulated_desc *cublasLtMatmulDesc_t;
typedef emulated_layout *cublasLtMatrixLayout_t;
typedef struct emulated_handle *cublasLtHandle_t;
typedef struct emulated_preference *cublasLtMatmulPreference_t;
struct cublasLtMatmulAlgo_t { int chosen; };
struct cublasLtMatmulHeuristicResult_t { cublasLtMatmulAlgo_t algo; size_t workspaceSize; cublasStatus_t state; float wavesCount; };

static inline size_t cublasLtGetVersion(void) { return 0; }
static inline cublasStatus_t cublasLtCreate(cublasLtHandle_t *h) { *h = (cublasLtHandle_t)h; return CUBLAS_STATUS_SUCCESS; }
static inline const char *cublasLtGetStatusString(cublasStatus_t s) { return s == CUBLAS_STATUS_SUCCESS ? "success" : "invalid value"; }
static inline cublasStatus_t cublasLtMatmulDescCreate(cublasLtMatmulDesc_t *d, cublasComputeType_t, cudaDataType_t) {
    *d = new emulated_desc{CUBLAS_OP_N, CUBLAS_OP_N, CUBLASLT_EPILOGUE_DEFAULT, CUDA_R_32F, NULL, NULL, 0};
    return CUBLAS_STATUS_SUCCESS;
}
static inline cublasStatus_t cublasLtMatmulDescSetAttribute(cublasLtMatmulDesc_t d, cublasLtMatmulDescAttributes_t what, const void *value, size_t bytes) {
    void *to[] = {&d->a, &d->b, &d->epilogue, &d->bias, &d->bias_type, &d->aux, &d->aux_ld};
    size_t sizes[] = {sizeof d->a, sizeof d->b, sizeof d->epilogue, sizeof d->bias, sizeof d->bias_type, sizeof d->aux, sizeof d->aux_ld};
    if (bytes != sizes[what]) return CUBLAS_STATUS_INVALID_VALUE;
    memcpy(to[what], value, bytes);
    return CUBLAS_STATUS_SUCCESS;
}
static inline cublasStatus_t cublasLtMatrixLayoutCreate(cublasLtMatrixLayout_t *l, cudaDataType_t type, uint64_t rows, uint64_t cols, int64_t ld) {
    *l = new emulated_layout{type, rows, cols, ld};
    return CUBLAS_STATUS_SUCCESS;
}
static inline cublasStatus_t cublasLtMatmulDescDestroy(cublasLtMatmulDesc_t d) { return delete d, CUBLAS_STATUS_SUCCESS; }
static inline cublasStatus_t cublasLtMatrixLayoutDestroy(cublasLtMatrixLayout_t l) { return delete l, CUBLAS_STATUS_SUCCESS; }
static inline cublasStatus_t cublasLtMatmulPreferenceCreate(cublasLtMatmulPreference_t *p) { *p = NULL; return CUBLAS_STATUS_SUCCESS; }
static inline cublasStatus_t cublasLtMatmulPreferenceDestroy(cublasLtMatmulPreference_t) { return CUBLAS_STATUS_SUCCESS; }
static inline cublasStatus_t cublasLtMatmulPreferenceSetAttribute(cublasLtMatmulPreference_t, cublasLtMatmulPreferenceAttributes_t, const void *, size_t) { return CUBLAS_STATUS_SUCCESS; }
// It refuses some endings, as a real one may, and for more than one reason.
static inline cublasStatus_t cublasLtMatmulAlgoGetHeuristic(cublasLtHandle_t, cublasLtMatmulDesc_t o, cublasLtMatrixLayout_t, cublasLtMatrixLayout_t, cublasLtMatrixLayout_t,
                                                            cublasLtMatrixLayout_t d, cublasLtMatmulPreference_t, int most, cublasLtMatmulHeuristicResult_t *r, int *count) {
    int ways = most < 3 || !getenv("EMULATED_WAYS") ? 1 : 3;
    for (int i = 0; i < ways; i++) r[i] = {{i + 1}, 0, CUBLAS_STATUS_SUCCESS, 1};
    *count = o->aux == NULL || d->rows % 64 != 32 ? ways : 0;
    if (*count) return CUBLAS_STATUS_SUCCESS;
    return d->rows % 128 == 32 ? CUBLAS_STATUS_NOT_SUPPORTED : CUBLAS_STATUS_INVALID_VALUE;
}
static inline float element(const void *at, cudaDataType_t type, size_t i) {
    return type == CUDA_R_32F ? ((const float *)at)[i] : __bfloat162float(((const __nv_bfloat16 *)at)[i]);
}
static inline void put_element(void *at, cudaDataType_t type, size_t i, float x) {
    if (type == CUDA_R_32F) ((float *)at)[i] = x;
    else ((__nv_bfloat16 *)at)[i] = __float2bfloat16(x);
}
static inline int64_t bytes_of(cudaDataType_t type) { return type == CUDA_R_32F ? 4 : 2; }
// d (m, n) = epilogue(alpha op(a) op(b) + beta c). A sum begins where its shape says: a real library chooses another
// order for another shape. And tanh is what tanh.approx may make of it. With EMULATED_WAYS in the environment there are
// three ways: the second is the fastest and sums in another order, the third the next and adds to c from the beginning.
static inline cublasStatus_t cublasLtMatmul(cublasLtHandle_t, cublasLtMatmulDesc_t o, const void *alpha, const void *a, cublasLtMatrixLayout_t la, const void *b,
                                            cublasLtMatrixLayout_t lb, const void *beta, const void *c, cublasLtMatrixLayout_t lc, void *d, cublasLtMatrixLayout_t ld,
                                            const cublasLtMatmulAlgo_t *algo, void *, size_t, cudaStream_t) {
    uint64_t m = o->a ? la->cols : la->rows, k = o->a ? la->rows : la->cols, n = o->b ? lb->rows : lb->cols;
    int wide = o->epilogue == CUBLASLT_EPILOGUE_GELU_AUX_BIAS || o->epilogue == CUBLASLT_EPILOGUE_DGELU;
    if (!algo || algo->chosen < 1 || algo->chosen > 3 || (o->b ? lb->cols : lb->rows) != k || ld->rows != m || ld->cols != n || lc->rows != m || lc->cols != n ||
        wide != (o->aux != NULL) || (wide && o->aux_ld < (int64_t)m) || !(o->epilogue & CUBLASLT_EPILOGUE_BIAS) != !o->bias) return CUBLAS_STATUS_INVALID_VALUE;
    if ((uintptr_t)a % 16 || (uintptr_t)b % 16 || (uintptr_t)d % 16 || (uintptr_t)o->bias % 16 || (uintptr_t)o->aux % 16 || la->ld * bytes_of(la->type) % 16 ||
        lb->ld * bytes_of(lb->type) % 16 || ld->ld * bytes_of(ld->type) % 16) return CUBLAS_STATUS_NOT_SUPPORTED;
    emulate::works++;
    if (algo->chosen != 2 && getenv("EMULATED_WAYS")) usleep(algo->chosen == 1 ? 10000 : 5000);
    emulate::open_memory(1);
    float *rows = (float *)malloc((m * k + m) * sizeof(float)), *sums = rows + m * k;  // a (k, m) as float, and a column of d
    for (uint64_t l = 0; l < k; l++)
        for (uint64_t i = 0; i < m; i++) rows[l * m + i] = element(a, la->type, o->a ? i * (uint64_t)la->ld + l : l * (uint64_t)la->ld + i);
    for (uint64_t j = 0; j < n; j++) {
        const int begins = algo->chosen == 3 && *(const float *)beta != 0;
        for (uint64_t i = 0; i < m; i++) sums[i] = begins ? *(const float *)beta * element(c, lc->type, j * (uint64_t)lc->ld + i) : 0;
        for (uint64_t i = 0, l = (m + 3 * n + (algo->chosen == 2)) % k; i < k; i++, l = l + 1 == k ? 0 : l + 1) {
            float x = element(b, lb->type, o->b ? l * (uint64_t)lb->ld + j : j * (uint64_t)lb->ld + l);
            for (uint64_t r = 0; r < m; r++) sums[r] += rows[l * m + r] * x;
        }
        for (uint64_t i = 0; i < m; i++) {
            float sum = sums[i];
            sum *= *(const float *)alpha;
            if (*(const float *)beta != 0 && !begins) sum += *(const float *)beta * element(c, lc->type, j * (uint64_t)lc->ld + i);
            if (o->epilogue & CUBLASLT_EPILOGUE_BIAS) sum += element(o->bias, o->bias_type, i);
            size_t at = j * (uint64_t)o->aux_ld + i;
            float x = sum, t, cube = 0.044715f;
            if (o->epilogue == CUBLASLT_EPILOGUE_GELU_AUX_BIAS) put_element(o->aux, ld->type, at, x);
            if (o->epilogue == CUBLASLT_EPILOGUE_DGELU) x = element(o->aux, ld->type, at);
            t = wide ? tanh_fast(0.79788456f * (x + cube * x * x * x)) : 0;
            if (o->epilogue == CUBLASLT_EPILOGUE_GELU_AUX_BIAS) sum = 0.5f * x * (1 + t);
            if (o->epilogue == CUBLASLT_EPILOGUE_DGELU) sum *= 0.5f * (1 + t) + 0.5f * x * (1 - t * t) * 0.79788456f * (1 + 3 * cube * x * x);
            put_element(d, ld->type, j * (uint64_t)ld->ld + i, sum);
        }
    }
    free(rows);
    emulate::open_memory(-1);
    return CUBLAS_STATUS_SUCCESS;
}
#endif
