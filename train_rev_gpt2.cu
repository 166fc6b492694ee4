/*
train_rev_gpt2.cu: the CUDA twin of train_rev_gpt2.c. That file is included whole, with its recurrence, memory
policies, files and command line; here is what its layer functions become on a GPU. cuBLASLt multiplies
matrices; everything else is a kernel below.

Activations are bf16, streams int32, gradients, weights and moments float32; matrix products take a bf16 copy
of the weights, made when a forward pass begins. -DPRECISION_FP32 makes all of it float32.

No sum depends on what finishes first: nothing is added by atomics, sums over tokens are cut into slices by
their number alone, and a shape of matrix product uses one algorithm for the whole run. So what is evaluated
again gives the same bits, and streams step back exactly.
*/
#ifndef EMULATE  // dev/cuda/emulate.h brings all of these for a machine without a GPU
#include <cublasLt.h>
#include <cuda_bf16.h>
#include <cuda_runtime.h>
#endif

#ifdef PRECISION_FP32
#define ACT float
#else
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
// -arch=native builds for 7.5 where no card is in sight.
#error "bf16 needs compute capability 8.0: name the card (make CUDA_ARCH=sm_90), or PRECISION=FP32 for 7.5"
#endif
#define ACT __nv_bfloat16
#define DEFAULT_PRECISION "bf16"
#endif
#define REV_GPT2_OTHER_LAYERS
#define DEVICE __host__ __device__
static void (*before_waiting)(void);  // for all of the card, while ranks exchange (dev/ranks/nccl.cuh); or NULL
#include "train_rev_gpt2.c"

// ---- errors, launches

static void check_cuda(cudaError_t e, const char *call, int line) {
    if (e == cudaSuccess) return;
    die(STATUS_NUMBERS, "CUDA: %s (%s) in %s, %s:%d", cudaGetErrorString(e), cudaGetErrorName(e), call,
        __FILE__, line);
}
#define CUDA(call) check_cuda(call, #call, __LINE__)
static void check_cublas(cublasStatus_t e, const char *call, int line) {
    if (e != CUBLAS_STATUS_SUCCESS)
        die(STATUS_NUMBERS, "cuBLASLt: %s in %s, %s:%d", cublasLtGetStatusString(e), call, __FILE__, line);
}
#define CUBLAS(call) check_cublas(call, #call, __LINE__)

// LAUNCH(kernel, grid, block, bytes of shared memory, arguments...); SHARED(type, name) is that memory
#ifdef EMULATE
#define LAUNCH(kernel, grid, block, shared, ...) \
    emulate::launch(#kernel, grid, block, shared, [&] { kernel(__VA_ARGS__); })
#define SHARED(type, name) type *name = (type *)emulate::shared_memory
#else
#define LAUNCH(kernel, grid, block, shared, ...) \
    do { \
        if ((shared) > (size_t)48 << 10) \
            CUDA(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)(shared))); \
        kernel<<<grid, block, shared>>>(__VA_ARGS__); \
        check_cuda(cudaGetLastError(), #kernel, __LINE__); \
    } while (0)
#define SHARED(type, name) \
    extern __shared__ __align__(256) char shared_memory[]; \
    type *name = (type *)shared_memory
#endif

#ifndef LIBRARY_BYTES
#define LIBRARY_BYTES (32 << 20)  // for cuBLASLt's own use
#endif
#ifndef CARD
#define CARD 0  // of those in sight; ranks have one each
#endif
enum { WARP = 32, THREADS = 256, SLICES = 1024 };
const int chunk_tokens = 32768, head_chunk_tokens = 8192, slice_tokens = 16384;
static unsigned blocks_for(size_t count, size_t each) { return (unsigned)((count + each - 1) / each); }

// ---- the device and its memory

static cudaDeviceProp device;
static cublasLtHandle_t library;
static size_t free_at_start, most_used;
static int *reached;  // on the device: the bits of what went into streams

static void device_begin(void) {  // before anything else here
    size_t total;
    const int needed = sizeof(act_t) == 2 ? 80 : 75;
    if (library) return;
    CUDA(cudaSetDevice(CARD));
    CUDA(cudaGetDeviceProperties(&device, CARD));
    if (10 * device.major + device.minor < needed)
        die(STATUS_NUMBERS, "%s has compute capability %d.%d: %d.%d or newer is meant here", device.name,
            device.major, device.minor, needed / 10, needed % 10);
    CUBLAS(cublasLtCreate(&library));
    CUDA(cudaMalloc((void **)&reached, sizeof *reached));
    CUDA(cudaMemset(reached, 0, sizeof *reached));
    CUDA(cudaMemGetInfo(&free_at_start, &total));
}
void device_finish(void) { CUDA(cudaDeviceSynchronize()); }
size_t device_memory_bytes(void) {  // but for what the driver takes later, for kernels and libraries
    const size_t reserve = (size_t)512 << 20;
    device_begin();
    return free_at_start > reserve ? free_at_start - reserve : 0;
}
size_t device_peak_bytes(void) { return most_used; }
void *device_alloc(size_t bytes) {
    void *p = NULL;
    size_t now, total;
    device_begin();
    cudaError_t e = cudaMalloc(&p, round256(bytes));
    if (e == cudaErrorMemoryAllocation) {
        cudaGetLastError();  // forgets it
        return NULL;
    }
    CUDA(e);
    CUDA(cudaMemset(p, 0, round256(bytes)));
    CUDA(cudaMemGetInfo(&now, &total));
    if (now < free_at_start && free_at_start - now > most_used) most_used = free_at_start - now;
    return p;
}
void device_free(void *p) { CUDA(cudaFree(p)); }
void device_zero(void *p, size_t bytes) {
    profile("device_zero", 0, (double)bytes);
    CUDA(cudaMemset(p, 0, bytes));
}
void device_copy(void *dst, const void *src, size_t bytes) {
    profile("device_copy", 0, 2.0 * (double)bytes);
    CUDA(cudaMemcpy(dst, src, bytes, cudaMemcpyDeviceToDevice));
}
void to_device(void *dst, const void *src, size_t bytes) {
    CUDA(cudaMemcpy(dst, src, bytes, cudaMemcpyHostToDevice));
}
void to_host(void *dst, const void *src, size_t bytes) {
    CUDA(cudaMemcpy(dst, src, bytes, cudaMemcpyDeviceToHost));
}
int layers_bf16(int on) { return (sizeof(act_t) == 2) == on; }

// ---- elements: E may be float, bf16 or an element of a stream; kernels compute in float, N at a time

static __host__ __device__ __forceinline__ float to_float(act_t x) { return (float)x; }
static __device__ __forceinline__ void set(act_t *p, float x) { *p = (act_t)x; }
template <class E, int N> struct alignas(sizeof(E) * N) Few { E e[N]; };
template <int N, class E> static __device__ __forceinline__ Few<E, N> load(const E *p) {
    return *(const Few<E, N> *)p;
}
template <int N, class E> static __device__ __forceinline__ void store(E *p, const Few<E, N> &x) {
    *(Few<E, N> *)p = x;
}

static int aligned(const void *p, size_t to = 16) { return (uintptr_t)p % to == 0; }  // NULL too

// ---- sums: within a warp by a butterfly, within a block by its first warp: the same tree for all values

static __device__ __forceinline__ float warp_sum(float x) {
    for (int o = WARP / 2; o > 0; o /= 2) x += __shfl_xor_sync(0xFFFFFFFF, x, o);
    return x;
}
static __device__ __forceinline__ float warp_max(float x) {
    for (int o = WARP / 2; o > 0; o /= 2) x = fmaxf(x, __shfl_xor_sync(0xFFFFFFFF, x, o));
    return x;
}
// sums of x and y over the block, for every thread; room: 2 * 32 floats of shared memory
static __device__ float2 block_sum(float x, float y, float *room) {
    int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, warps = blockDim.x / WARP;
    x = warp_sum(x), y = warp_sum(y);
    __syncthreads();  // what was there has been read
    if (lane == 0) room[warp] = x, room[WARP + warp] = y;
    __syncthreads();
    float2 sum = {warp_sum(lane < warps ? room[lane] : 0), warp_sum(lane < warps ? room[WARP + lane] : 0)};
    return sum;
}
// likewise the largest
static __device__ float2 block_max(float x, float y, float *room) {
    int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, warps = blockDim.x / WARP;
    x = warp_max(x), y = warp_max(y);
    __syncthreads();
    if (lane == 0) room[warp] = x, room[WARP + warp] = y;
    __syncthreads();
    float2 most = {warp_max(room[lane < warps ? lane : 0]), warp_max(room[WARP + (lane < warps ? lane : 0)])};
    return most;
}

// Adds the sums over rows of partial (rows, all) to out (columns) and, if there are more, to other: a block
// for 32 of them, a warp for every 32nd row
static __global__ void __launch_bounds__(WARP * WARP)
add_rows(float *out, float *other, const float *partial, int rows, int columns, int all) {
    SHARED(float, room);
    int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, c = (int)blockIdx.x * WARP + lane;
    float sum = 0;
#pragma unroll 8
    for (int r = warp; r < rows && c < all; r += WARP) sum += partial[(size_t)r * (size_t)all + (size_t)c];
    room[warp * WARP + lane] = sum;
    __syncthreads();
    if (warp > 0 || c >= all) return;
    for (int w = 1; w < WARP; w++) sum += room[w * WARP + lane];
    if (c < columns) out[c] += sum;
    else other[c - columns] += sum;
}
static void sum_of_rows(float *out, float *other, const float *partial, int rows, int columns) {
    int all = other ? 2 * columns : columns;
    LAUNCH(add_rows, blocks_for((size_t)all, WARP), WARP * WARP, WARP * WARP * sizeof(float), out, other,
        partial, rows, columns, all);
}

// n things are cut into slices, about `each` of them in one: at the same places on every card
static int slices_of(size_t n, size_t each) {
    return n < each ? 1 : n / each < SLICES ? (int)(n / each) : SLICES;
}
static __device__ __forceinline__ size_t slice_begin(size_t n, size_t slice) {
    return n / gridDim.x * slice + n % gridDim.x * slice / gridDim.x;
}

// ---- scratch: first what the library may use, then partial sums

static char *scratch;
static float *partial_sums;
size_t layers_scratch_bytes(int n, int C, int OC, int NH) {
    size_t rows = (size_t)SLICES * 2 * (size_t)C, columns = (size_t)OC, deltas = 2 * (size_t)n * (size_t)NH,
           most = rows > columns ? rows : columns;
    return LIBRARY_BYTES + round256((most > deltas ? most : deltas) * sizeof(float));
}
void layers_begin(void *memory) {
    scratch = (char *)memory;
    partial_sums = (float *)(scratch + LIBRARY_BYTES);
}

// ---- streams

// Few threads have a bit that no other had before; volatile: what others wrote is to be seen.
static __device__ __forceinline__ void report(int reach, int *to) {
    if (reach & ~*(volatile int *)to) atomicOr(to, reach);
}
int stream_take_reach(void) {
    int reach;
    to_host(&reach, reached, sizeof reach);
    if (reach) CUDA(cudaMemset(reached, 0, sizeof reach));
    return bits_of(reach);
}

template <int N> static __global__ void embed_kernel(stream_t *prev, stream_t *cur, const int *tokens,
                                                     const param_t *wte, const param_t *wpe, size_t count,
                                                     int T, int C, float per_unit, int *to) {
    int reach = 0;
    size_t i = (blockIdx.x * (size_t)blockDim.x + threadIdx.x) * N;
    if (i < count) {
        size_t token = i / (size_t)C, c = i % (size_t)C;
        Few<param_t, N> word = load<N>(wte + (size_t)tokens[token] * (size_t)C + c), place = {};
        if (wpe) place = load<N>(wpe + token % (size_t)T * (size_t)C + c);
        Few<stream_t, N> x;
        for (int j = 0; j < N; j++) x.e[j] = embed_element(word.e[j] + place.e[j], per_unit, &reach);
        store<N>(prev + i, x);
        store<N>(cur + i, x);
    }
    report(reach, to);
}
void stream_embed(stream_t *prev, stream_t *cur, const int *tokens, const param_t *wte, const param_t *wpe,
                  int n, int T, int C, int grid) {
    profile("stream_embed", 0, (double)n * C * (sizeof(param_t) + 2 * sizeof(stream_t)));
    size_t count = (size_t)n * (size_t)C;
    float per_unit = grid ? ldexpf(1, grid) : 0;
    if (C % 4 == 0 && aligned(prev) && aligned(cur) && aligned(wte) && aligned(wpe))
        LAUNCH(embed_kernel<4>, blocks_for(count, 4 * THREADS), THREADS, 0, prev, cur, tokens, wte, wpe,
               count, T, C, per_unit, reached);
    else
        LAUNCH(embed_kernel<1>, blocks_for(count, THREADS), THREADS, 0, prev, cur, tokens, wte, wpe, count, T,
               C, per_unit, reached);
}

// One kernel serves three ways to multiply by alpha: it waits for memory, so asking at each element which
// one is meant costs nothing. The fourth keeps low bits: its kernel is another, where a warp works as one.
struct Step { Coefficients k; float scale, with, beta, gamma; int factor, add_factor, fixed, direction; };

// in floating point
static __device__ __forceinline__ float step_float(float s, float cur, float force, const Step &k) {
    return k.scale * s + k.with * (k.beta * cur + k.gamma * force);
}
// alpha = 1, 0 or -1: nothing is lost
static __device__ __forceinline__ int64_t step_unit(int64_t s, int64_t add, const Step &k) {
    return k.factor * s + k.add_factor * add;
}
// midpoint-a: remainders go on the stack *r, and come back from it
static __device__ __forceinline__ int64_t step_remainder(int64_t s, int64_t add, uint16_t *r, const Step &k) {
    const int sign = k.k.alpha < 0 ? -1 : 1, n = sign * k.k.alpha;
    if (k.direction > 0) return sign * multiply_sixteenths(s, n, r) + add;
    return unmultiply_sixteenths(sign * (s - add), n, r);
}
template <int N> static __global__ void step_kernel(stream_t *to, const stream_t *s, const stream_t *cur,
                                                    const act_t *f, const act_t *f2, uint16_t *r,
                                                    size_t count, Step k, int *reached) {
    int reach = 0;
    size_t i = (blockIdx.x * (size_t)blockDim.x + threadIdx.x) * N;
    if (i < count) {
        Few<stream_t, N> y = load<N>(cur + i), x = k.k.alpha || k.direction < 0 ? load<N>(s + i) : y;
        Few<act_t, N> a = load<N>(f + i), b = f2 ? load<N>(f2 + i) : a;
        for (int j = 0; j < N; j++) {
            float force = to_float(a.e[j]) + (f2 ? to_float(b.e[j]) : 0);
            if (!k.fixed) {
                x.e[j].real = step_float(x.e[j].real, y.e[j].real, force, k);
                continue;
            }
            int64_t add = increment(y.e[j].fixed, force, k.k, k.gamma, &reach), t;
            if (r) t = step_remainder(x.e[j].fixed, add, r + i + j, k);
            else t = step_unit(x.e[j].fixed, add, k);
            x.e[j].fixed = narrowed(t, &reach);
        }
        store<N>(to + i, x);
    }
    report(reach, reached);
}
// Where alpha is a fraction, a warp takes 32 elements; word b in low holds bit b of each. low: NULL if
// nothing will step back
static __global__ void step_low_kernel(stream_t *to, const stream_t *s, const stream_t *cur, const act_t *f,
                                       const act_t *f2, uint32_t *low, size_t count, Step k, int *reached) {
    size_t i = blockIdx.x * (size_t)blockDim.x + threadIdx.x;
    int reach = 0, lane = threadIdx.x % WARP;
    uint32_t *words = low ? low + i / WARP * (size_t)k.k.shift : NULL, bits = 0;
    int64_t t = i < count ? s[i].fixed : 0;
    for (int b = 0; b < k.k.shift && low; b++) {
        uint32_t word = i < count && k.direction < 0 ? words[b] : 0;
        if (k.direction > 0) word = __ballot_sync(0xFFFFFFFF, (int)(t >> b & 1));
        if (k.direction > 0 && lane == b && i - lane < count) words[b] = word;
        bits |= (word >> lane & 1) << b;
    }
    if (i < count) {
        int64_t add =
            increment(cur[i].fixed, to_float(f[i]) + (f2 ? to_float(f2[i]) : 0), k.k, k.gamma, &reach);
        t = k.direction > 0 ? multiply(t, k.k.alpha, k.k.shift) + add
                            : unmultiply(t - add, k.k.alpha, k.k.shift, bits);
        to[i].fixed = narrowed(t, &reach);
    }
    report(reach, reached);
}
void stream_step(stream_t *to, const stream_t *from, const stream_t *cur, const act_t *f, const act_t *f2,
                 uint16_t *r, uint32_t *low, size_t count, Coefficients k, int grid, int direction) {
    double kept = low ? k.shift / 8.0 : 0;
    if (r) kept = 4;
    profile("stream_step", 0,
            (double)count * (3 * sizeof(stream_t) + (f2 ? 2 : 1) * sizeof(act_t) + kept));
    float alpha = (float)ldexp(k.alpha, -k.shift), scale = direction > 0 ? alpha : alpha == 0 ? 1 : 1 / alpha;
    int factor = direction < 0 && k.alpha == 0 ? 1 : k.alpha, onward = direction > 0;
    Step step = {k, scale, onward ? 1 : -scale, (float)ldexp(k.beta, -k.shift), (float)ldexp(k.gamma, grid),
                 factor, onward ? 1 : -factor, grid != 0, direction};
    if (grid && k.shift && !r)
        LAUNCH(step_low_kernel, blocks_for(count, THREADS), THREADS, 0, to, from, cur, f, f2, low, count,
               step, reached);
    else if (count % 4 == 0 && aligned(to) && aligned(from) && aligned(cur) && aligned(f) && aligned(f2))
        LAUNCH(step_kernel<4>, blocks_for(count, 4 * THREADS), THREADS, 0, to, from, cur, f, f2, r, count,
               step, reached);
    else
        LAUNCH(step_kernel<1>, blocks_for(count, THREADS), THREADS, 0, to, from, cur, f, f2, r, count, step,
               reached);
}

// partial (slices): of a slice of elements, the squared norm of x - y
static __global__ void distance_kernel(float *partial, const stream_t *x, const stream_t *y,
                                       const uint16_t *r, size_t count, int fixed) {
    SHARED(float, room);
    float sum = 0;
    for (size_t i = slice_begin(count, blockIdx.x) + threadIdx.x; i < slice_begin(count, blockIdx.x + 1);
         i += blockDim.x) {
        double d =
            fixed ? (double)x[i].fixed - (y ? y[i].fixed : 0) : (double)x[i].real - (y ? y[i].real : 0);
        sum += (float)(d * d) + (r ? r[i] : 0);
    }
    sum = block_sum(sum, 0, room).x;
    if (threadIdx.x == 0) partial[blockIdx.x] = sum;
}
double stream_distance(const stream_t *x, const stream_t *y, const uint16_t *r, size_t count, int grid) {
    profile("stream_distance", 0, (double)count * (y ? 2 : 1) * sizeof(stream_t));
    float partial[SLICES];
    double total = 0;
    int slices = slices_of(count, 1 << 14);
    LAUNCH(distance_kernel, (unsigned)slices, THREADS, 2 * WARP * sizeof(float), partial_sums, x, y, r, count,
           grid);
    to_host(partial, partial_sums, sizeof(float) * (size_t)slices);
    for (int p = 0; p < slices; p++) total += partial[p];
    return sqrt(total);
}

// Tokens in order of their words: words, how many there are; first (words + 1), where those of each begin;
// n + 2 places from the start, order (n), the tokens' numbers, those of one word side by side, as they come
size_t layers_order_bytes(int n) { return (2 * (size_t)n + 2) * sizeof(int); }
void layers_order(void *to, const int *tokens, int n) {
    static int *words;  // kept: new pages at each step would take longer than the sorting
    static size_t room;
    int most = 0;
    for (int i = 0; i < n; i++) most = tokens[i] > most ? tokens[i] : most;
    const size_t all = layers_order_bytes(n) + ((size_t)most + 2) * sizeof(int);
    if (all > room) free(words), words = (int *)malloc(room = all);
    if (!words) die(STATUS_NUMBERS, "out of memory for sorting tokens");
    int *first = words + 1, *order = first + n + 1;
    int *next = order + n;  // where the next token of a word goes
    memset(words, 0, all);
    for (int i = 0; i < n; i++) next[tokens[i] + 1]++;
    for (int v = 0; v <= most; v++) {
        if (next[v + 1]) first[(*words)++] = next[v];
        next[v + 1] += next[v];
    }
    first[*words] = n;
    for (int i = 0; i < n; i++) order[next[tokens[i]]++] = i;
    to_device(to, words, layers_order_bytes(n));
}
// A block has some of the words and a stretch of columns, so that no two blocks meet in a row.
static __global__ void embed_words_kernel(float *dwte, const float *d1, const float *d2, const int *tokens,
    const int *words, int n, int C) {
    const int *first = words + 1, *order = words + 2 + n, c = (int)(blockIdx.y * blockDim.x + threadIdx.x);
    for (int word = (int)blockIdx.x; word < *words && c < C; word += (int)gridDim.x) {
        int begin = first[word], end = first[word + 1];
        float sum = 0;
#pragma unroll 8
        for (int i = begin; i < end; i++) {
            size_t at = (size_t)order[i] * (size_t)C + (size_t)c;
            sum += d1[at] + (d2 ? d2[at] : 0);
        }
        dwte[(size_t)tokens[order[begin]] * (size_t)C + (size_t)c] += sum;
    }
}
static __global__ void embed_places_kernel(float *dwpe, const float *d1, const float *d2, int n, int T,
                                           int C) {
    size_t i = blockIdx.x * (size_t)blockDim.x + threadIdx.x;
    if (i >= (size_t)T * (size_t)C) return;
    float sum = 0;
    for (size_t at = i; at < (size_t)n * (size_t)C; at += (size_t)T * (size_t)C)
        sum += d1[at] + (d2 ? d2[at] : 0);
    dwpe[i] += sum;
}
void embed_backward(real_t *dwte, real_t *dwpe, const real_t *d1, const real_t *d2, const int *tokens,
    const void *order, int n, int T, int C) {
    profile("embed_backward", 0, (double)n * C * ((d2 ? 2 : 1) + 4) * sizeof(real_t));
    dim3 blocks((unsigned)smaller_of(n, 1 << 14), blocks_for((size_t)C, THREADS));
    LAUNCH(embed_words_kernel, blocks, THREADS, 0, dwte, d1, d2, tokens, (const int *)order, n, C);
    if (dwpe)
        LAUNCH(embed_places_kernel, blocks_for((size_t)smaller_of(n, T) * (size_t)C, THREADS), THREADS, 0,
               dwpe, d1, d2, n, T, C);
}

// ---- matrix products: cuBLASLt, which stores by columns, so a row-major (n, C) is its (C, n)

const size_t weight_copy_bytes = sizeof(act_t) == sizeof(param_t) ? 0 : sizeof(act_t);
typedef struct { const param_t *weights; act_t *copy; size_t count; } WeightCopy;
static WeightCopy copies[2];  // the latest first: a network's, and its teacher's
static const act_t *copy_of(const param_t *w) {
    if (!w || !weight_copy_bytes) return (const act_t *)(const void *)w;
    int i = !(w >= copies[0].weights && w < copies[0].weights + copies[0].count);
    return copies[i].copy + (w - copies[i].weights);
}
static __global__ void copy_kernel(act_t *copy, const param_t *p, size_t count) {
    enum { N = 8 };
    size_t i = (blockIdx.x * (size_t)blockDim.x + threadIdx.x) * N;
    Few<act_t, N> to;
    if (i + N > count) {  // what is left over
#pragma unroll 1
        for (; i < count; i++) set(copy + i, p[i]);
        return;
    }
    Few<param_t, N> from = load<N>(p + i);
    for (int j = 0; j < N; j++) set(to.e + j, from.e[j]);
    store<N>(copy + i, to);
}
void layers_weights(const param_t *params, void *copy, size_t count) {
    profile("layers_weights", 0, (double)count * (sizeof(param_t) + sizeof(act_t)));
    if (params != copies[0].weights) copies[1] = copies[0];
    copies[0].weights = params, copies[0].copy = (act_t *)copy, copies[0].count = count;
    act_t *to = copies[0].copy;
    if (weight_copy_bytes) LAUNCH(copy_kernel, blocks_for(count, 8 * THREADS), THREADS, 0, to, params, count);
}

static __device__ __forceinline__ float gelu(float x) {  // 0.5 x (1 + tanh u) = x / (1 + exp(-2u))
    return x / (1 + __expf(-1.5957691f * (x + 0.044715f * x * x * x)));
}
static __device__ __forceinline__ float gelu_slope(float x) {
    float y = 1 / (1 + __expf(-1.5957691f * (x + 0.044715f * x * x * x)));
    return y + x * y * (1 - y) * 1.5957691f * (1 + 0.134145f * x * x);
}

// x (count) = GELU(pre), or with BACK times GELU'(pre)
template <int N, int BACK> static __global__ void gelu_kernel(act_t *x, const act_t *pre, size_t count) {
    size_t i = (blockIdx.x * (size_t)blockDim.x + threadIdx.x) * N;
    if (i >= count) return;
    Few<act_t, N> p = load<N>(pre + i), y = p;
    if (BACK) y = load<N>(x + i);
    for (int j = 0; j < N; j++) {
        float z = to_float(p.e[j]);
        set(y.e + j, BACK ? to_float(y.e[j]) * gelu_slope(z) : gelu(z));
    }
    store<N>(x + i, y);
}
template <int BACK> static void gelu_pass(act_t *x, const act_t *pre, size_t count) {
    enum { N = 16 / sizeof(act_t) };
    if (count % N == 0 && aligned(x) && aligned(pre))
        LAUNCH((gelu_kernel<N, BACK>), blocks_for(count, N * THREADS), THREADS, 0, x, pre, count);
    else LAUNCH((gelu_kernel<1, BACK>), blocks_for(count, THREADS), THREADS, 0, x, pre, count);
}

// d (m, n) = op(a) op(b), over k; d is float32 and added to, or of type act_t with an epilogue. Columns of b
// as it is stored are ld_b apart, those of d ld_d.
typedef struct {
    int m, n, k, transpose_a, transpose_b, accumulate;
    cublasLtEpilogue_t epilogue;
    int ld_b, ld_d;
} Product;

// for shapes, places and types that the library does not take: a thread an element
static __global__ void product_kernel(Product s, void *d, const act_t *a, const act_t *b, const act_t *bias) {
    size_t at = blockIdx.x * (size_t)blockDim.x + threadIdx.x, m = (size_t)s.m, n = (size_t)s.n,
           k = (size_t)s.k, i = at % m, j = at / m, ld_b = (size_t)s.ld_b, ld_d = (size_t)s.ld_d;
    float sum = 0;
    if (j >= n) return;
    for (size_t l = 0; l < k; l++)
        sum += to_float(a[s.transpose_a ? i*k + l : l*m + i]) *
               to_float(b[s.transpose_b ? l*ld_b + j : j*ld_b + l]);
    if (bias) sum += to_float(bias[i]);
    if (s.accumulate) ((float *)d)[j*ld_d + i] += sum;
    else set((act_t *)d + j*ld_d + i, sum);
}

// A product as the library computes it: the first way that it proposes for a shape, so that what is computed
// again gives the same bits; for a shape that is met often, the fastest of those that give the bits of the first.
enum { WAYS = 8, OFTEN = 16 };
typedef struct {
    Product product;
    cublasLtMatmulDesc_t op;
    cublasLtMatrixLayout_t a, b, d;
    cublasLtMatmulAlgo_t algo;
    cublasLtMatmulHeuristicResult_t found[WAYS];
    int ways, met;  // how many were found, and how often the product was asked for
} Known;
static void set_operands(Known *p, const act_t *bias, const void *aux) {
    if (bias)
        CUBLAS(cublasLtMatmulDescSetAttribute(p->op, CUBLASLT_MATMUL_DESC_BIAS_POINTER, &bias, sizeof bias));
    if (aux)
        CUBLAS(cublasLtMatmulDescSetAttribute(p->op, CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_POINTER, &aux,
                                              sizeof aux));
}
static void choose(Known *p, Product s, const act_t *bias, const void *aux) {
    static int said;
    const cudaDataType_t type = sizeof(act_t) == 2 ? CUDA_R_16BF : CUDA_R_32F;
    cublasOperation_t ta = s.transpose_a ? CUBLAS_OP_T : CUBLAS_OP_N,
                      tb = s.transpose_b ? CUBLAS_OP_T : CUBLAS_OP_N;
    cublasLtMatmulPreference_t preference;
    int64_t ld = s.m;
    size_t room = LIBRARY_BYTES;
    // sums of split k go through the workspace, in one order
    uint32_t unit = 16, schemes = CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE;
    memset(p, 0, sizeof *p);
    p->product = s;
    CUBLAS(cublasLtMatmulDescCreate(&p->op, CUBLAS_COMPUTE_32F, CUDA_R_32F));
    CUBLAS(cublasLtMatmulDescSetAttribute(p->op, CUBLASLT_MATMUL_DESC_TRANSA, &ta, sizeof ta));
    CUBLAS(cublasLtMatmulDescSetAttribute(p->op, CUBLASLT_MATMUL_DESC_TRANSB, &tb, sizeof tb));
    CUBLAS(
        cublasLtMatmulDescSetAttribute(p->op, CUBLASLT_MATMUL_DESC_EPILOGUE, &s.epilogue, sizeof s.epilogue));
    if (bias)
        CUBLAS(
            cublasLtMatmulDescSetAttribute(p->op, CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE, &type, sizeof type));
    if (aux)
        CUBLAS(cublasLtMatmulDescSetAttribute(p->op, CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_LD, &ld, sizeof ld));
    set_operands(p, bias, aux);
    CUBLAS(cublasLtMatrixLayoutCreate(&p->a, type, (uint64_t)(ta ? s.k : s.m), (uint64_t)(ta ? s.m : s.k),
                                      ta ? s.k : s.m));
    CUBLAS(cublasLtMatrixLayoutCreate(&p->b, type, (uint64_t)(tb ? s.n : s.k), (uint64_t)(tb ? s.k : s.n),
                                      s.ld_b));
    CUBLAS(cublasLtMatrixLayoutCreate(&p->d, s.accumulate ? CUDA_R_32F : type, (uint64_t)s.m, (uint64_t)s.n,
                                      s.ld_d));
    CUBLAS(cublasLtMatmulPreferenceCreate(&preference));
    CUBLAS(cublasLtMatmulPreferenceSetAttribute(preference, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &room,
                                                sizeof room));
    CUBLAS(cublasLtMatmulPreferenceSetAttribute(preference, CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK,
                                                &schemes, sizeof schemes));
    CUBLAS(cublasLtMatmulPreferenceSetAttribute(preference, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, &unit,
                                                sizeof unit));
    CUBLAS(cublasLtMatmulPreferenceSetAttribute(preference, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, &unit,
                                                sizeof unit));
    CUBLAS(cublasLtMatmulPreferenceSetAttribute(preference, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, &unit,
                                                sizeof unit));
    CUBLAS(cublasLtMatmulPreferenceSetAttribute(preference, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, &unit,
                                                sizeof unit));
    cublasStatus_t e = cublasLtMatmulAlgoGetHeuristic(library, p->op, p->a, p->b, p->d, p->d, preference,
                                                      WAYS, p->found, &p->ways);
    if (e != CUBLAS_STATUS_SUCCESS || p->found[0].state != CUBLAS_STATUS_SUCCESS) p->ways = 0;
    p->algo = p->found[0].algo;
    // what ends with GELU has another way; the slow loops, if there is none, are worth a line in a run
    if (!p->ways && !aux && !said++)
        fprintf(stderr,
                "train_rev_gpt2: cuBLASLt has no way to multiply (%d, %d) by (%d, %d): slow loops do it\n",
                s.m, s.k, s.k, s.n);
    CUBLAS(cublasLtMatmulPreferenceDestroy(preference));
}
static cublasStatus_t try_way(Known *p, void *d, const act_t *a, const act_t *b, const act_t *bias,
    const void *aux) {
    float one = 1, beta = p->product.accumulate ? 1 : 0;
    set_operands(p, bias, aux);
    return cublasLtMatmul(library, p->op, &one, a, p->a, b, p->b, &beta, d, p->d, d, p->d, &p->algo, scratch,
                          LIBRARY_BYTES, 0);
}
static void multiply_by(Known *p, void *d, const act_t *a, const act_t *b, const act_t *bias,
    const void *aux) {
    CUBLAS(try_way(p, d, a, b, bias, aux));
}
// Numbers without order, for multiplying zeros takes less power
template <class E> static __global__ void spread_kernel(E *x, size_t count) {
    size_t i = blockIdx.x * (size_t)blockDim.x + threadIdx.x;
    if (i < count) x[i] = (E)((float)((uint32_t)i * 2654435761u >> 16) / 32768.0f - 1);
}
template <class E> static void spread(E *x, size_t count) {
    LAUNCH(spread_kernel<E>, blocks_for(count, THREADS), THREADS, 0, x, count);
}
// Adds to digest each 32 bits of x, times a number of their place: integers, in any order the same sum
static __global__ void digest_kernel(unsigned long long *digest, const uint32_t *x, size_t count) {
    unsigned long long sum = 0;
    for (size_t i = slice_begin(count, blockIdx.x) + threadIdx.x; i < slice_begin(count, blockIdx.x + 1);
         i += blockDim.x)
        sum += x[i] * (i * 0x9E3779B97F4A7C15 | 1);
    atomicAdd(digest, sum);
}
// Of the ways found, p's becomes the fastest of those that give the bits of the first, on operands of their
// own: a run's may be zeros, which show nothing. What is added to is one of them: ways may differ in when they
// add it. Few elements show too little, and where there is no room, nothing is tried: then the first it is,
// with the same bits.
static void choose_fastest(Known *p, const act_t *bias, const void *aux) {
    enum { ROUNDS = 2, TIMES = 6, LEAST = 1 << 20 };
    const Product s = p->product;
    const size_t m = (size_t)s.m, n = (size_t)s.n, k = (size_t)s.k, line = s.transpose_b ? k : n;
    const size_t of_a = m * k, of_b = line * (size_t)s.ld_b, all = of_a + of_b + (aux ? m * n : 0);
    const size_t of_d = n * (size_t)s.ld_d * (s.accumulate ? sizeof(float) : sizeof(act_t));
    const size_t bytes = 256 + of_d + all * sizeof(act_t), spare = (size_t)128 << 20;  // for kernels' code
    unsigned long long *digest, first = 0, same;
    size_t now, total;
    double best = INFINITY;
    int fastest = 0;
    if (p->ways < 2 || m * n < LEAST) return;
    CUDA(cudaMemGetInfo(&now, &total));
    if (now < bytes + spare) return;
    if (before_waiting) before_waiting();
    if (cudaMalloc((void **)&digest, bytes) != cudaSuccess) {
        cudaGetLastError();  // forgets it
        return;
    }
    char *d = (char *)digest + 256;
    act_t *a = (act_t *)(void *)(d + of_d), *b = a + of_a;
    if (bias) bias = a;
    if (aux) aux = b + of_b;
    spread(a, all);
    for (int i = 0; i < p->ways; i++) {
        if (p->found[i].state != CUBLAS_STATUS_SUCCESS) continue;
        p->algo = p->found[i].algo;
        CUDA(cudaMemset(digest, 0, 256 + of_d));
        if (s.accumulate) spread((float *)(void *)d, of_d / sizeof(float));
        if (try_way(p, d, a, b, bias, aux) != CUBLAS_STATUS_SUCCESS) continue;
        LAUNCH(digest_kernel, SLICES, THREADS, 0, digest, (uint32_t *)(void *)d, of_d / sizeof(uint32_t));
        to_host(&same, digest, sizeof same);
        if (i == 0) first = same;
        for (int round = 0; round < ROUNDS && same == first; round++) {
            const double start = seconds();
            for (int j = 0; j < TIMES; j++) multiply_by(p, d, a, b, bias, aux);
            device_finish();
            const double took = seconds() - start;
            if (took < best) best = took, fastest = i;
        }
    }
    CUDA(cudaFree(digest));
    p->algo = p->found[fastest].algo;
}
static void forget(Known *p) {
    CUBLAS(cublasLtMatmulDescDestroy(p->op));
    CUBLAS(cublasLtMatrixLayoutDestroy(p->a));
    CUBLAS(cublasLtMatrixLayoutDestroy(p->b));
    CUBLAS(cublasLtMatrixLayoutDestroy(p->d));
}
// The library's way for this product; NULL: it has none, or operands do not begin where it wants them. It is
// good until the next call.
static Known *way_of(Product s, const void *d, const act_t *a, const act_t *b, const act_t *bias,
    const void *aux) {
    // a run has some thirty shapes; questions have new ones all the time: then the oldest are forgotten
    enum { MOST = 1024, UNIT = 16 / sizeof(act_t) };
    static Known known[MOST];
    static int met;
    Known *p = known, *end = known + smaller_of(met, MOST);
    if (s.m % UNIT || (s.transpose_a && s.k % UNIT) || s.ld_b % UNIT || s.ld_d % UNIT) return NULL;
    if (!aligned(a) || !aligned(b) || !aligned(d) || !aligned(bias) || !aligned(aux)) return NULL;
    while (p < end && memcmp(&p->product, &s, sizeof s) != 0) p++;
    if (p == end) {
        p = known + met % MOST;
        if (met++ >= MOST) forget(p);
        choose(p, s, bias, aux);
    }
    if (++p->met == OFTEN) choose_fastest(p, bias, aux);
    return p->ways ? p : NULL;
}
// A product without GELU
static void gemm(Product s, void *d, const act_t *a, const act_t *b, const act_t *bias) {
    Known *way = way_of(s, d, a, b, bias, NULL);
    if (way) multiply_by(way, d, a, b, bias, NULL);
    else LAUNCH(product_kernel, blocks_for((size_t)s.m * (size_t)s.n, THREADS), THREADS, 0, s, d, a, b, bias);
}
// Whether GELU goes into the library's ending: where that is fast. In float32 it never does: the library may
// take the hardware's tanh, which is good for bf16 alone.
static int fuses_gelu(void) { return sizeof(act_t) == 2 && (device.major == 9 || device.major == 10); }

void matmul_forward(act_t *out, const act_t *inp, const param_t *weight, const param_t *bias, int n, int C,
                    int OC, int width) {
    profile("matmul_forward", 2.0 * n * C * OC, ((double)n * (C + OC) + (double)C * OC) * sizeof(act_t));
    Product s = {OC, n, C, 1, 0, 0, bias ? CUBLASLT_EPILOGUE_BIAS : CUBLASLT_EPILOGUE_DEFAULT, C, width};
    gemm(s, out, copy_of(weight), inp, copy_of(bias));
}
void matmul_gelu_forward(act_t *out, act_t *pre, const act_t *inp, const param_t *weight, const param_t *bias,
                         int n, int C, int OC) {
    profile("matmul_gelu_forward", 2.0 * n * C * OC,
            ((double)n * (C + 2 * OC) + (double)C * OC) * sizeof(act_t));
    const act_t *w = copy_of(weight), *b = copy_of(bias);
    Product plain = {OC, n, C, 1, 0, 0, CUBLASLT_EPILOGUE_BIAS, C, OC}, fused = plain;
    fused.epilogue = CUBLASLT_EPILOGUE_GELU_AUX_BIAS;
    Known *way = fuses_gelu() ? way_of(fused, out, w, inp, b, pre) : NULL;
    if (way) {
        multiply_by(way, out, w, inp, b, pre);
        return;
    }
    gemm(plain, pre, w, inp, b);
    gelu_pass<0>(out, pre, (size_t)n * (size_t)OC);
}

// partial (slices, columns): sums over slices of the rows of x (n, columns). A warp has 32 N columns and
// every 8th row, so that a lane reads 16 bytes at a time
template <int N> static __global__ void __launch_bounds__(THREADS)
column_sums(float *partial, const act_t *x, int n, int columns, int width) {
    // (warps, N, 33): sums of a warp's rows; a place more a line, so that neighbours lie in other banks
    SHARED(float, room);
    enum { LINE = WARP + 1, WIDTH = N * WARP };
    const size_t slice = blockIdx.x, begin = blockIdx.y * (size_t)WIDTH, K = (size_t)columns;
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, warps = blockDim.x / WARP;
    const int row = (int)slice_begin((size_t)n, slice) + warp, end = (int)slice_begin((size_t)n, slice + 1);
    const size_t c = begin + (size_t)lane * N;
    float sum[N] = {};
    if (c < K) {
#pragma unroll 4
        for (int i = row; i < end; i += warps) {
            Few<act_t, N> y = load<N>(x + (size_t)i * (size_t)width + c);
            for (int j = 0; j < N; j++) sum[j] += to_float(y.e[j]);
        }
    }
    for (int j = 0; j < N; j++) room[(warp * N + j) * LINE + lane] = sum[j];
    __syncthreads();
    for (int k = (int)threadIdx.x; k < WIDTH && begin + (size_t)k < K; k += (int)blockDim.x) {
        float total = 0;
        for (int w = 0; w < warps; w++) total += room[(w * N + k % N) * LINE + k / N];
        partial[slice * K + begin + (size_t)k] = total;
    }
}
template <int N> static void column_sums_of(real_t *out, const act_t *x, int n, int columns, int width,
                                            int slices) {
    dim3 blocks((unsigned)slices, blocks_for((size_t)columns, N * WARP));
    LAUNCH(column_sums<N>, blocks, THREADS, THREADS / WARP * N * (WARP + 1) * sizeof(float), partial_sums, x,
        n, columns, width);
    sum_of_rows(out, NULL, partial_sums, slices, columns);
}
void matmul_backward(act_t *dinp, real_t *dweight, real_t *dbias, const act_t *dout, const act_t *inp,
                     const param_t *weight, const act_t *pre, int n, int C, int OC, int width) {
    profile("matmul_backward", 4.0 * n * C * OC,
            ((double)n * (2 * C + OC) + (double)C * OC) * sizeof(act_t) + 2.0 * C * OC * sizeof(real_t));
    enum { N = 16 / sizeof(act_t) };
    const act_t *copy = copy_of(weight);
    Product w = {C, OC, n, 0, 1, 1, CUBLASLT_EPILOGUE_DEFAULT, width, C};
    Product plain = {C, n, OC, 0, 0, 0, CUBLASLT_EPILOGUE_DEFAULT, width, C}, fused = plain;
    fused.epilogue = CUBLASLT_EPILOGUE_DGELU;
    gemm(w, dweight, inp, dout, NULL);
    if (dbias) {
        int room = (int)((int64_t)SLICES * 2 * smaller_of(C, OC) / OC);
        int slices = smaller_of(slices_of((size_t)n, 64), room > 1 ? room : 1);
        if (OC % N == 0 && width % N == 0 && aligned(dout)) column_sums_of<N>(dbias, dout, n, OC, width, slices);
        else column_sums_of<1>(dbias, dout, n, OC, width, slices);
    }
    Known *way = pre && fuses_gelu() ? way_of(fused, dinp, copy, dout, NULL, pre) : NULL;
    if (way) {
        multiply_by(way, dinp, copy, dout, NULL, pre);
        return;
    }
    gemm(plain, dinp, copy, dout, NULL);
    if (pre) gelu_pass<1>(dinp, pre, (size_t)n * (size_t)C);
}

// ---- layernorm: a warp a token, whose lanes have RUNS runs of N neighbouring columns at most; so a token is
// read once, and with N = 8 16 bytes at a time

template <int N> static __device__ __forceinline__ int column_of(int run) {
    return (run * WARP + (int)threadIdx.x % WARP) * N;
}
// this lane's columns of the token that begins at x, 0 beyond C: all on their way before the first is used
template <int N, int RUNS, class E> static __device__ __forceinline__ void
load_token(Few<E, N> to[RUNS], const E *x, int C) {
#pragma unroll
    for (int r = 0; r < RUNS; r++) {
        to[r] = {};
        if (column_of<N>(r) < C) to[r] = load<N>(x + column_of<N>(r));
    }
}
// x = s + add of this lane's columns, where add is zeros if there is none; returns the mean and 1 / standard
// deviation
template <int N, int RUNS> static __device__ __forceinline__ float2
layernorm_token(float x[RUNS][N], const Few<stream_t, N> s[RUNS], const Few<act_t, N> add[RUNS], int C,
                float unit) {
    float sum = 0, squares = 0;
#pragma unroll
    for (int r = 0; r < RUNS; r++)
        for (int j = 0; j < N; j++) {
            x[r][j] = stream_value(s[r].e[j], unit) + to_float(add[r].e[j]);
            sum += x[r][j];
        }
    const float mean = warp_sum(sum) / (float)C;
#pragma unroll
    for (int r = 0; r < RUNS; r++)
        for (int j = 0; j < N && column_of<N>(r) < C; j++) squares += (x[r][j] - mean) * (x[r][j] - mean);
    float2 statistics = {mean, 1 / sqrtf(warp_sum(squares) / (float)C + 1e-5f)};
    return statistics;
}
template <int N, int RUNS> static __global__ void __launch_bounds__(THREADS)
layernorm_kernel(act_t *out, const stream_t *s, const act_t *add, const param_t *weight, const param_t *bias,
                 int n, int C, float unit) {
    const size_t i = blockIdx.x * (size_t)(blockDim.x / WARP) + threadIdx.x / WARP, at = i * (size_t)C;
    float x[RUNS][N];
    Few<stream_t, N> of_stream[RUNS];
    Few<act_t, N> of_add[RUNS] = {};
    if (i >= (size_t)n) return;  // the whole warp
    load_token<N, RUNS>(of_stream, s + at, C);
    if (add) load_token<N, RUNS>(of_add, add + at, C);
    const float2 y = layernorm_token<N, RUNS>(x, of_stream, of_add, C, unit);
#pragma unroll
    for (int r = 0; r < RUNS; r++) {
        const int c = column_of<N>(r);
        if (c >= C) continue;
        Few<param_t, N> w = load<N>(weight + c), b = load<N>(bias + c);
        Few<act_t, N> to;
        for (int j = 0; j < N; j++) set(to.e + j, (x[r][j] - y.x) * y.y * w.e[j] + b.e[j]);
        store<N>(out + at + c, to);
    }
}
// A block for a slice of tokens; partial (slices, 2C): of dweight, then of dbias
enum { BACK_THREADS = 128 };
template <int N, int RUNS> static __global__ void __launch_bounds__(BACK_THREADS, RUNS <= 4 ? 3 : 2)
layernorm_backward_kernel(float *ds, act_t *dadd, float *partial, const act_t *dout, const stream_t *s,
                          const act_t *add, const param_t *weight, int n, int C, float unit) {
    // (2, N, RUNS, 32), of dweight and dbias: the first of all runs, then the second ones
    SHARED(float, room);
    enum { LINE = RUNS * WARP, EARLY = RUNS <= 4 };  // where there are registers for what is on its way
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, warps = blockDim.x / WARP;
    float x[RUNS][N], dw[RUNS][N] = {}, db[RUNS][N] = {};
    for (size_t i = slice_begin((size_t)n, blockIdx.x) + (size_t)warp;
         i < slice_begin((size_t)n, blockIdx.x + 1); i += (size_t)warps) {
        const size_t at = i * (size_t)C;
        Few<stream_t, N> of_stream[RUNS];
        Few<act_t, N> of_add[RUNS] = {}, d[RUNS];
        load_token<N, RUNS>(of_stream, s + at, C);
        if (EARLY) load_token<N, RUNS>(d, dout + at, C);
        if (add) load_token<N, RUNS>(of_add, add + at, C);
        const float2 y = layernorm_token<N, RUNS>(x, of_stream, of_add, C, unit);
        float sum = 0, sum_x = 0;
#pragma unroll
        for (int r = 0; r < RUNS; r++) {
            const int c = column_of<N>(r);
            if (c >= C) continue;
            Few<param_t, N> w = load<N>(weight + c);
            if (!EARLY) d[r] = load<N>(dout + at + c);
            for (int j = 0; j < N; j++) {
                float g = to_float(d[r].e[j]);
                x[r][j] = (x[r][j] - y.x) * y.y;
                dw[r][j] += g * x[r][j];
                db[r][j] += g;
                sum += g * w.e[j];
                sum_x += g * w.e[j] * x[r][j];
            }
        }
        Few<float, N> dx[RUNS];
        if (EARLY) load_token<N, RUNS>(dx, ds + at, C);
        if (EARLY && dadd) load_token<N, RUNS>(of_add, dadd + at, C);
        sum = warp_sum(sum) / (float)C, sum_x = warp_sum(sum_x) / (float)C;
#pragma unroll
        for (int r = 0; r < RUNS; r++) {
            const int c = column_of<N>(r);
            if (c >= C) continue;
            Few<param_t, N> w = load<N>(weight + c);
            if (!EARLY) d[r] = load<N>(dout + at + c), dx[r] = load<N>(ds + at + c);
            if (!EARLY && dadd) of_add[r] = load<N>(dadd + at + c);
            for (int j = 0; j < N; j++) {
                float part = (to_float(d[r].e[j]) * w.e[j] - sum - x[r][j] * sum_x) * y.y;
                dx[r].e[j] += part;
                set(of_add[r].e + j, to_float(of_add[r].e[j]) + part);
            }
            store<N>(ds + at + c, dx[r]);
            if (dadd) store<N>(dadd + at + c, of_add[r]);
        }
    }
    for (int w = 0; w < warps; w++) {  // one warp after the other
        if (w == warp)
#pragma unroll
            for (int k = 0; k < N * RUNS; k++) {
                float *to = room + k * WARP + lane;
                to[0] = dw[k % RUNS][k / RUNS] + (w ? to[0] : 0);
                to[N * LINE] = db[k % RUNS][k / RUNS] + (w ? to[N * LINE] : 0);
            }
        __syncthreads();
    }
    for (int k = (int)threadIdx.x; k < 2*C; k += (int)blockDim.x) {
        int c = k % C;
        partial[blockIdx.x * 2 * (size_t)C + (size_t)k] = room[(k / C * N + c % N) * LINE + c / N];
    }
}
template <int N, int RUNS> static void
layernorm_forward_of(act_t *out, const stream_t *s, const act_t *add, const param_t *weight,
    const param_t *bias, int n, int C, float unit) {
    LAUNCH((layernorm_kernel<N, RUNS>), blocks_for((size_t)n, THREADS / WARP), THREADS, 0, out, s, add,
        weight, bias, n, C, unit);
}
template <int N, int RUNS> static void
layernorm_backward_of(real_t *ds, act_t *dadd, real_t *dweight, real_t *dbias, const act_t *dout,
                      const stream_t *s, const act_t *add, const param_t *weight, int n, int C, float unit) {
    int slices = slices_of((size_t)n, RUNS <= 4 ? 42 : 63);  // of 16,384 tokens as many as 132 processors hold
    size_t room = 2 * N * RUNS * WARP * sizeof(float);
    LAUNCH((layernorm_backward_kernel<N, RUNS>), (unsigned)slices, BACK_THREADS, room, ds, dadd, partial_sums,
           dout, s, add, weight, n, C, unit);
    sum_of_rows(dweight, dbias, partial_sums, slices, C);
}
// f<N, RUNS> for C columns, of which GPT-2 has 768, 1024, 1280 or 1600; by_eight: may they be read by eights?
#define OF_WIDTH(f, by_eight, ...) do { \
        if (!(by_eight) && C > 24*WARP) f<1, 128>(__VA_ARGS__); \
        else if (!(by_eight)) f<1, 24>(__VA_ARGS__); \
        else if (C <= 256) f<8, 1>(__VA_ARGS__); \
        else if (C <= 768) f<8, 3>(__VA_ARGS__); \
        else if (C <= 1024) f<8, 4>(__VA_ARGS__); \
        else if (C <= 1280) f<8, 5>(__VA_ARGS__); \
        else if (C <= 1792) f<8, 7>(__VA_ARGS__); \
        else f<8, 16>(__VA_ARGS__); \
    } while (0)
template <class E> static int in_eights(const E *x, int C) { return C % 8 == 0 && aligned(x, 8 * sizeof(E)); }
void layernorm_forward(act_t *out, const stream_t *s, const act_t *add, const param_t *weight,
                       const param_t *bias, int n, int C, int grid) {
    profile("layernorm_forward", 0, (double)n * C * (sizeof(stream_t) + (add ? 2 : 1) * sizeof(act_t)));
    int by_eight = in_eights(out, C) && in_eights(s, C) && in_eights(add, C) && in_eights(weight, C) &&
        in_eights(bias, C);
    OF_WIDTH(layernorm_forward_of, by_eight, out, s, add, weight, bias, n, C, grid_unit(grid));
}
void layernorm_backward(real_t *ds, act_t *dadd, real_t *dweight, real_t *dbias, const act_t *dout,
                        const stream_t *s, const act_t *add, const param_t *weight, int n, int C, int grid) {
    profile("layernorm_backward", 0,
            (double)n * C *
                (sizeof(stream_t) + 2 * sizeof(real_t) + ((add ? 2 : 1) + (dadd ? 2 : 0)) * sizeof(act_t)));
    int by_eight = in_eights(ds, C) && in_eights(dadd, C) && in_eights(dout, C) && in_eights(s, C) &&
        in_eights(add, C) && in_eights(weight, C);
    OF_WIDTH(layernorm_backward_of, by_eight, ds, dadd, dweight, dbias, dout, s, add, weight, n, C,
        grid_unit(grid));
}

// ---- attention in tiles, the softmax carried along from tile to tile. Grids are (tiles, heads, sequences):
// blocks that run at the same time share a few heads' keys and values, which stay in the cache.

// A row of qkv is `stride` wide: heads of hs channels, Q of queries, then KV each of keys and values. A group
// of heads of queries reads the same keys. Rows of out are C wide, with room for NH heads.
struct Heads { int NH, C, Q, KV, stride, hs, group; };
static Heads heads_of(int C, int NH, int NKV, int heads) {
    const int hs = C / NH, group = NH / NKV, Q = heads * hs, KV = Q / group;
    return {NH, C, Q, KV, Q + 2*KV, hs, group};
}
// where head h of the block's sequence begins in x, whose T rows a sequence are `stride` apart
template <class E> static __device__ __forceinline__ E *of_head(E *x, int h, int T, int stride, int hs) {
    return x + (size_t)blockIdx.z * (size_t)T * (size_t)stride + (size_t)h * (size_t)hs;
}
// where it begins in what has one value a query, (B, NH, T)
static __device__ __forceinline__ size_t queries_of_head(int h, int T, int NH) {
    return ((size_t)blockIdx.z * (size_t)NH + (size_t)h) * (size_t)T;
}
// how far behind the queries of head h lie the keys that they read
static __device__ __forceinline__ int to_keys(int h, const Heads &x) {
    return x.Q + (h / x.group - h) * x.hs;
}

// rows (B, NH, T): lse in bits, and delta = sum_c out dout, which is sum_j p_j dp_j. Eight lanes
// share a query.
static __global__ void delta_kernel(float2 *rows, const float *lse, const act_t *out, const act_t *dout,
                                    int n, int T, Heads heads, int whole) {
    const size_t at = (blockIdx.x * (size_t)blockDim.x + threadIdx.x) / 8;
    const int C = heads.C, NH = heads.NH, hs = heads.hs;
    const size_t there = (size_t)(heads.Q / hs), token = at / there, h = at % there;
    float sum = 0;
    if (token < (size_t)n) {
        out += token * (size_t)C + h * (size_t)hs, dout += token * (size_t)C + h * (size_t)hs;
        for (int c = (int)threadIdx.x % 8 * 8; c < hs; c += 64) {
            Few<act_t, 8> x = {}, y = {};
            if (whole) x = load<8>(out + c), y = load<8>(dout + c);
            else
                for (int j = 0; j < 8 && c + j < hs; j++) x.e[j] = out[c + j], y.e[j] = dout[c + j];
#pragma unroll
            for (int j = 0; j < 8; j++) sum += to_float(x.e[j]) * to_float(y.e[j]);
        }
    }
    for (int o = 4; o > 0; o /= 2) sum += __shfl_xor_sync(0xFFFFFFFF, sum, o);
    if (token >= (size_t)n || threadIdx.x % 8) return;
    const size_t row = (token / (size_t)T * (size_t)NH + h) * (size_t)T + token % (size_t)T;
    rows[row] = {lse[row] * 1.44269504f, sum};
}

#ifndef PRECISION_FP32
#ifndef EMULATE
// d (16, 8) += a (16, 16) b (16, 8); which lane holds what is said at the fragments below
static __device__ __forceinline__ void mma_bf16(float d[4], const uint32_t a[4], const uint32_t b[2]) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
static __device__ __forceinline__ float exp2_fast(float x) {  // without the digits of numbers below 2^-126
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
// Addresses in shared memory are 32 bits.
static __device__ __forceinline__ uint32_t shared_address(const void *p) {
    return (uint32_t)__cvta_generic_to_shared(p);
}
static __device__ __forceinline__ void store_shared(uint32_t to, float x) {  // as bf16
    asm volatile("{.reg .b16 h; cvt.rn.bf16.f32 h, %1; st.shared.b16 [%0], h;}"
                 :: "r"(to), "f"(x) : "memory");
}
static __device__ __forceinline__ float4 load_shared(uint32_t from) {
    float4 x;
    asm volatile("ld.shared.v4.f32 {%0,%1,%2,%3}, [%4];"
                 : "=f"(x.x), "=f"(x.y), "=f"(x.z), "=f"(x.w) : "r"(from) : "memory");
    return x;
}
// four 8 x 8 matrices; lane i says where row i % 8 of matrix i / 8 lies
static __device__ __forceinline__ void ldmatrix(uint32_t r[4], uint32_t row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(row) : "memory");
}
static __device__ __forceinline__ void ldmatrix_transposed(uint32_t r[4], uint32_t row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(row) : "memory");
}
// BYTES (16 or 8) to shared memory while the thread goes on; those after the first `bytes` become 0
template <int BYTES>
static __device__ __forceinline__ void copy_async(uint32_t to, const void *from, int bytes) {
    if (BYTES == 16)
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
                     :: "r"(to), "l"(from), "r"(bytes) : "memory");
    else
        asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;"
                     :: "r"(to), "l"(from), "r"(bytes) : "memory");
}
static __device__ __forceinline__ void copy_async_commit(void) {
    asm volatile("cp.async.commit_group;" ::: "memory");
}
template <int N> static __device__ __forceinline__ void copy_async_wait(void) {
    asm volatile("cp.async.wait_group %0;" :: "n"(N) : "memory");
}
#endif

enum { TILE = 64, HALF = TILE / 2, WARPS = 4 };
static __device__ __forceinline__ uint32_t two(float low, float high) {
    __nv_bfloat162 x = __floats2bfloat162_rn(low, high);
    uint32_t both;
    memcpy(&both, &x, sizeof both);
    return both;
}

// A tile in shared memory has rows of HS elements in pieces of 8 (16 bytes), whose order depends on the row,
// so that eight rows of one column of pieces lie in different banks. This is where, in bytes from its
// beginning, piece p of a row lies. The order is an exclusive or: from p to p ^ j leads one with 16j, in
// every row; it is the same every 8 rows.
template <int HS> static __device__ __forceinline__ uint32_t piece(int row, int p) {
    const int pieces = HS / 8, spread = pieces < 8 ? pieces : 8;
    return (uint32_t)(2*HS * row + 16 * (p ^ (row / (8 / spread) % spread)));
}
// A thread's part in copying tiles is a column of pieces, of every TOGETHER'th row: its addresses advance by
// constants.
template <int HS> struct Part {
    enum { PIECES = HS / 8, TOGETHER = WARPS * WARP / PIECES };
    int row, column;
    uint32_t at;
};
template <int HS> static __device__ __forceinline__ Part<HS> part_of_thread(void) {
    const int row = (int)threadIdx.x / Part<HS>::PIECES, p = (int)threadIdx.x % Part<HS>::PIECES;
    return {row, 8*p, piece<HS>(row, p)};
}
// where it begins in rows that are `stride` apart
template <int HS>
static __device__ __forceinline__ const act_t *in_part(Part<HS> part, const act_t *x, int stride) {
    return x + (int64_t)part.row * stride + part.column;
}
// tile (ROWS, HS) from rows of hs <= HS elements, `stride` apart, of which `rows` exist; the rest is zeros.
// from: where the thread's part of them begins. WHOLE: they lie in pieces of 16 bytes, which are on their way
// until waited for.
template <int ROWS, int WHOLE, int HS>
static __device__ __forceinline__ void load_tile(Part<HS> part, uint32_t tile, const act_t *from, int stride,
                                                 int rows, int hs) {
    const int end = part.row + ROWS;
    tile += part.at;
    if (WHOLE && part.column >= hs) rows = 0;
#pragma unroll
    for (int i = part.row; i < end; i += part.TOGETHER) {
        if (WHOLE) copy_async<16>(tile, from, i < rows ? 16 : 0);
        for (int j = 0; j < 8 && !WHOLE; j++)
            store_shared(tile + 2*j, i < rows && part.column + j < hs ? to_float(from[j]) : 0);
        tile += 2*HS * part.TOGETHER;
        from += part.TOGETHER * stride;
    }
}

// Fragments. Lane 4g + t holds of a (16, 16): (g, 2t), (g + 8, 2t), (g, 2t + 8), (g + 8, 2t + 8), each with
// its right neighbour; of b (16, 8): (2t, g), (2t + 8, g), each with the one below; of d (16, 8): (g, 2t),
// (g, 2t + 1), (g + 8, 2t), (g + 8, 2t + 1). So a pair of d's side by side, rounded, is an a. This is where a
// lane reads of a, and of two b's side by side whose rows are the tile's:
template <int HS> static __device__ __forceinline__ uint32_t lane_of_a(void) {
    return piece<HS>(threadIdx.x % 16, threadIdx.x / 16 % 2);
}
// and this of two b's whose columns are the tile's rows:
template <int HS> static __device__ __forceinline__ uint32_t lane_of_b(void) {
    return piece<HS>(threadIdx.x / 16 % 2 * 8 + threadIdx.x % 8, threadIdx.x / 8 % 2);
}

// A warp has M times 16 rows: what it reads of the other tile it multiplies M times, for shared memory is
// slower than the products. scores (M 16, N 8) = rows of one tile (M 16, HS) times rows of the other (N 8,
// HS), transposed; a and b are where the lane reads them.
template <int HS, int M, int N>
static __device__ __forceinline__ void multiply_rows(float scores[M][N][4], uint32_t a, uint32_t b) {
#pragma unroll
    for (int i = 0; i < M * N * 4; i++) scores[i / 4 / N][i / 4 % N][i % 4] = 0;
#pragma unroll
    for (int k = 0; k < HS; k += 16) {
        uint32_t x[M][4], y[4];
#pragma unroll
        for (int m = 0; m < M; m++) ldmatrix(x[m], (a ^ 2*k) + 2*HS * 16*m);
#pragma unroll
        for (int n = 0; n < N; n += 2) {
            ldmatrix(y, (b ^ 2*k) + 2*HS * 8*n);
#pragma unroll
            for (int m = 0; m < M; m++) {
                mma_bf16(scores[m][n], x[m], y);
                mma_bf16(scores[m][n + 1], x[m], y + 2);
            }
        }
    }
}
// sum (M 16, HS) += p (M 16, N 8) times rows of a tile (N 8, HS); b is where the lane reads them
template <int HS, int M, int N>
static __device__ __forceinline__ void add_product(float sum[M][HS / 8][4], const float p[M][N][4],
                                                   uint32_t b) {
#pragma unroll
    for (int k = 0; k < N; k += 2) {
        uint32_t x[M][4], y[4];
#pragma unroll
        for (int i = 0; i < 4 * M; i++) {
            const float *pair = p[i / 4][k + i / 2 % 2] + i % 2 * 2;
            x[i / 4][i % 4] = two(pair[0], pair[1]);
        }
#pragma unroll
        for (int n = 0; n < HS / 8; n += 2) {
            ldmatrix_transposed(y, (b ^ 16*n) + 2*HS * 8*k);
#pragma unroll
            for (int m = 0; m < M; m++) {
                mma_bf16(sum[m][n], x[m], y);
                mma_bf16(sum[m][n + 1], x[m], y + 2);
            }
        }
    }
}
// Causality: of scores between own rows from `row` and others from `column` on, those that must not be seen
// vanish. KEYS: the own rows are the keys
template <int M, int N, int KEYS>
static __device__ __forceinline__ void mask_scores(float scores[M][N][4], int row, int column) {
    row += threadIdx.x % WARP / 4, column += threadIdx.x % 4 * 2;
#pragma unroll
    for (int i = 0; i < M * N * 4; i++) {
        int own = row + i / 4 / N * 16 + i / 2 % 2 * 8, other = column + i / 4 % N * 8 + i % 2;
        if (KEYS ? own > other : other > own) scores[i / 4 / N][i / 4 % N][i % 4] = -1e30f;
    }
}
// rows (16, hs) of out, `stride` apart, of which `rows` exist, from sum times scale[row half]
template <int HS, int WHOLE>
static __device__ __forceinline__ void store_rows(act_t *out, int stride, int rows, int hs,
                                                  const float sum[HS / 8][4], const float scale[2]) {
    const int g = threadIdx.x % WARP / 4, t = threadIdx.x % 4;
#pragma unroll
    for (int i = 0; i < HS / 4; i++) {
        const int row = g + i % 2 * 8, c = i / 2 * 8 + 2*t;
        const float *pair = sum[i / 2] + i % 2 * 2, factor = scale[i % 2];
        act_t *to = out + (int64_t)row * stride + c;
        if (row >= rows || c >= hs) continue;
        if (WHOLE) *(uint32_t *)(void *)to = two(pair[0] * factor, pair[1] * factor);
        if (!WHOLE) set(to, pair[0] * factor);
        if (!WHOLE && c + 1 < hs) set(to + 1, pair[1] * factor);
    }
}

// One step of the softmax over M times 16 rows: scores (M 16, N 8) become exponentials, in units of the
// highest score of a row so far; its sum and its output so far are brought to that unit. scale is in bits:
// divided by ln 2.
template <int HS, int M, int N>
static __device__ __forceinline__ void softmax_step(float s[M][N][4], float o[M][HS / 8][4],
                                                    float highest[M][2], float sum[M][2], float scale) {
#pragma unroll
    for (int j = 0; j < 2 * M; j++) {
        const int m = j / 2, half = j % 2, i = half * 2;
        float higher = highest[m][half];
#pragma unroll
        for (int n = 0; n < N; n++) higher = fmaxf(higher, fmaxf(s[m][n][i], s[m][n][i + 1]));
        higher = fmaxf(higher, __shfl_xor_sync(0xFFFFFFFF, higher, 1));  // four neighbours share a row
        higher = fmaxf(higher, __shfl_xor_sync(0xFFFFFFFF, higher, 2));
        const float most = higher * scale, shrink = exp2_fast(highest[m][half] * scale - most);
        highest[m][half] = higher;
        sum[m][half] *= shrink;
#pragma unroll
        for (int n = 0; n < 2 * N; n++) {
            float *p = &s[m][n / 2][i + n % 2];
            sum[m][half] += *p = exp2_fast(*p * scale - most);
        }
#pragma unroll
        for (int n = 0; n < HS / 4; n++) o[m][n / 2][i + n % 2] *= shrink;
    }
}

// A block has WARPS times M times 16 queries of a head; the keys and values they see come by, TILE at a time,
// the next ones on their way meanwhile.
template <int HS, int WHOLE, int M> static __global__ void __launch_bounds__(WARPS * WARP, 2)
attention_forward_kernel(act_t *out, float *lse, const act_t *qkv, int T, Heads heads, float scale) {
    enum { ROWS = 16 * M, OWN = WARPS * ROWS, BYTES = 2*HS * TILE, SPAN = HS <= 64 ? TILE : HALF };
    SHARED(act_t, tiles);  // the queries, then twice: keys, values
    const int own = (int)(gridDim.x - 1 - blockIdx.x) * OWN;  // the longest rows begin first
    const int first = own + ROWS * (int)(threadIdx.x / WARP), h = (int)blockIdx.y;
    const int C = heads.C, KV = heads.KV, hs = heads.hs;
    const int stride = heads.Q + 2*KV;  // not heads.stride: for that nvcc needs a tenth more to make addresses
    const int keys = T < own + OWN ? T : own + OWN;
    const Part<HS> part = part_of_thread<HS>();
    const act_t *q = in_part(part, of_head(qkv, h, T, stride, hs), stride), *k = q + to_keys(h, heads);
    const uint32_t base = shared_address(tiles), both = 2 * (base + 2*HS * OWN) + 2*BYTES;
    const uint32_t of_a = lane_of_a<HS>(), of_b = lane_of_b<HS>(), mine = base + 2*HS * (first - own) + of_a;
    float o[M][HS / 8][4] = {}, s[M][SPAN / 8][4], highest[M][2], sum[M][2] = {};
    uint32_t now = base + 2*HS * OWN;  // where this turn's tiles lie; the next turn's at both - now
#pragma unroll
    for (int j = 0; j < 2 * M; j++) highest[j / 2][j % 2] = -1e30f;
    load_tile<OWN, WHOLE>(part, base, q + (int64_t)own * stride, stride, T - own, hs);
    load_tile<TILE, WHOLE>(part, now, k, stride, T, hs);
    load_tile<TILE, WHOLE>(part, now + BYTES, k + KV, stride, T, hs);
    copy_async_commit();
    for (int key = 0; key < keys; key += TILE, now = both - now) {
        copy_async_wait<0>();
        __syncthreads();  // this tile has come, and what lay where the next one goes has been read
        if (key + TILE < keys) {
            k += TILE * stride;
            load_tile<TILE, WHOLE>(part, both - now, k, stride, T - key - TILE, hs);
            load_tile<TILE, WHOLE>(part, both - now + BYTES, k + KV, stride, T - key - TILE, hs);
            copy_async_commit();
        }
#pragma unroll
        for (int c = 0; c < TILE; c += SPAN) {
            if (key + c >= first + ROWS) continue;  // none of the warp's queries sees these
            multiply_rows<HS, M, SPAN / 8>(s, mine, now + of_b + 2*HS*c);
            if (key + c + SPAN > first + 1) mask_scores<M, SPAN / 8, 0>(s, first, key + c);
            softmax_step<HS, M, SPAN / 8>(s, o, highest, sum, scale);
            add_product<HS, M, SPAN / 8>(o, s, now + BYTES + of_a + 2*HS*c);
        }
    }
#pragma unroll
    for (int m = 0; m < M; m++) {
        const int row = first + 16*m, g = threadIdx.x % WARP / 4;
        float inverse[2];
#pragma unroll
        for (int i = 0; i < 2; i++) {
            float all = sum[m][i];
            all += __shfl_xor_sync(0xFFFFFFFF, all, 1);
            all += __shfl_xor_sync(0xFFFFFFFF, all, 2);
            inverse[i] = 1 / all;
            const float bits = highest[m][i] * scale + log2f(all);
            if (threadIdx.x % 4 == 0 && row + g + 8*i < T)
                lse[queries_of_head(h, T, heads.NH) + row + g + 8*i] = bits * 0.69314718f;
        }
        store_rows<HS, WHOLE>(of_head(out, h, T, C, hs) + (int64_t)row * C, C, T - row, hs, o[m], inverse);
    }
}

// p (M 16, N 8) from scores, and ds from dp = what it holds: p = exp(scale score - lse), ds = p (dp - delta).
// lse in bits and delta are those of own rows, in rows, or with KEYS those of the columns, whose first lie at
// `columns`.
template <int M, int N, int KEYS>
static __device__ __forceinline__ void softmax_back(float p[M][N][4], float ds[M][N][4],
                                                    const float2 rows[M][2], uint32_t columns, float scale) {
#pragma unroll
    for (int n = 0; n < N; n++) {
        float4 pair = {};
        if (KEYS) pair = load_shared(columns + sizeof(float2) * (8*n + threadIdx.x % 4 * 2));
#pragma unroll
        for (int j = 0; j < 4 * M; j++) {
            const int m = j / 4, i = j % 4;
            float2 row = rows[m][i / 2];
            if (KEYS && i % 2 == 0) row = {pair.x, pair.y};
            if (KEYS && i % 2 == 1) row = {pair.z, pair.w};
            p[m][n][i] = exp2_fast(p[m][n][i] * scale - row.x);
            ds[m][n][i] = p[m][n][i] * (ds[m][n][i] - row.y);
        }
    }
}

// Gradients of the block's queries (KEYS 0), or of its keys and values (KEYS 1), which the group's heads of
// queries go by in turn: two passes, so that no two blocks meet in a sum. Both see the same products, one
// transposed: with own rows x1, x2 = q, dout, or k, v; and y1, y2 = k, v, or q, dout, tile by tile,
//     p = exp(scale x1 y1^T - lse);  dp = x2 y2^T;  ds = p (dp - delta)
//     dx1 = scale sum ds y1;  dv = sum p dout
// Rows that do not exist are zeros, with lse and delta 0 as well, so they add nothing.
template <int HS, int WHOLE, int M, int KEYS> static __global__ void __launch_bounds__(WARPS * WARP, 2)
attention_backward_kernel(act_t *dqkv, const act_t *dout, const act_t *qkv, const float2 *rows, int T,
                          Heads heads, float scale) {
    enum { ROWS = 16 * M, OWN = WARPS * ROWS, OWN_BYTES = 2*HS * OWN, BYTES = 2*HS * TILE, N = HALF / 8 };
    enum { SPAN = 2*BYTES + KEYS * TILE * sizeof(float2) };
    SHARED(act_t, tiles);  // x1, x2, then twice: y1, y2, and lse and delta of the queries that go by
    const int own = (int)(KEYS ? blockIdx.x : gridDim.x - 1 - blockIdx.x) * OWN;  // the longest begin first
    const int first = own + ROWS * (int)(threadIdx.x / WARP), g = threadIdx.x % WARP / 4;
    const int begin = KEYS ? own : 0, end = KEYS || T < own + OWN ? T : own + OWN;
    const int C = heads.C, KV = heads.KV, stride = heads.stride, hs = heads.hs;
    const int stride_x2 = KEYS ? stride : C, stride_y2 = KEYS ? C : stride;
    const int group = KEYS ? heads.group : 1, h = (int)blockIdx.y * group;  // the first head of queries
    const Part<HS> part = part_of_thread<HS>();
    const act_t *q = in_part(part, of_head(qkv, h, T, stride, hs), stride), *k = q + to_keys(h, heads);
    const act_t *d = in_part(part, of_head(dout, h, T, C, hs), C);
    const act_t *x1 = (KEYS ? k : q) + (int64_t)own * stride;
    const act_t *x2 = (KEYS ? k + KV : d) + (int64_t)own * stride_x2;
    const act_t *y1 = (KEYS ? q : k) + (int64_t)begin * stride, *y2 = d + (int64_t)begin * stride_y2;
    const uint32_t base = shared_address(tiles), both = 2 * (base + 2*OWN_BYTES) + SPAN;
    const uint32_t of_a = lane_of_a<HS>(), of_b = lane_of_b<HS>(), mine = base + 2*HS * (first - own) + of_a;
    const float bits = scale * 1.44269504f;
    float dx1[M][HS / 8][4] = {}, dx2[M][HS / 8][4] = {};
    float2 of_row[M][2] = {};
    uint32_t now = base + 2*OWN_BYTES + SPAN;  // where this turn's tiles lie; the next turn's at both - now
    rows += queries_of_head(h, T, heads.NH);
#pragma unroll
    for (int j = 0; j < 2 * M && !KEYS; j++)
        if (first + g + 8*j < T) of_row[j / 2][j % 2] = rows[first + g + 8*j];
    load_tile<OWN, WHOLE>(part, base, x1, stride, T - own, hs);
    load_tile<OWN, WHOLE>(part, base + OWN_BYTES, x2, stride_x2, T - own, hs);
    for (int turn = group; turn > 0; turn--) {
        int at = begin - TILE;
        for (; at < end; at += TILE, now = both - now) {  // the first turn only loads
            copy_async_wait<0>();
            __syncthreads();
            if (at + TILE < end) {
                const int left = end - at - TILE, i = (int)threadIdx.x;
                load_tile<TILE, WHOLE>(part, both - now, y1, stride, left, hs);
                load_tile<TILE, WHOLE>(part, both - now + BYTES, KEYS ? y2 : y1 + KV, stride_y2, left, hs);
                if (KEYS && i < TILE)
                    copy_async<8>(both - now + 2*BYTES + 8*i, rows + at + TILE + i, i < left ? 8 : 0);
                copy_async_commit();
                y1 += TILE * stride, y2 += TILE * stride_y2;
            }
#pragma unroll
            for (int c = 0; c < TILE && at >= begin; c += HALF) {
                const int other = at + c;
                const uint32_t y = now + 2*HS*c;
                float p[M][N][4], ds[M][N][4];
                if (KEYS ? other + HALF <= first : other >= first + ROWS) continue;  // the warp meets none
                multiply_rows<HS, M, N>(p, mine, y + of_b);
                multiply_rows<HS, M, N>(ds, mine + OWN_BYTES, y + BYTES + of_b);
                if (KEYS ? other < first + ROWS - 1 : other + HALF > first + 1)
                    mask_scores<M, N, KEYS>(p, first, other);
                softmax_back<M, N, KEYS>(p, ds, of_row, now + 2*BYTES + 8*c, bits);
                add_product<HS, M, N>(dx1, ds, y + of_a);
                if (KEYS) add_product<HS, M, N>(dx2, p, y + BYTES + of_a);
            }
        }
        y1 += hs - (int64_t)(at - begin) * stride;  // to the first tile of the next head
        y2 += hs - (int64_t)(at - begin) * stride_y2;
        rows += T;
    }
    const float scales[2] = {scale, scale}, ones[2] = {1, 1};
#pragma unroll
    for (int m = 0; m < M; m++) {
        const int row = first + 16*m;
        act_t *to = of_head(dqkv, h, T, stride, hs) + (int64_t)row * stride + (KEYS ? to_keys(h, heads) : 0);
        store_rows<HS, WHOLE>(to, stride, T - row, hs, dx1[m], scales);
        if (KEYS) store_rows<HS, WHOLE>(to + KV, stride, T - row, hs, dx2[m], ones);
    }
}

template <int HS, int WHOLE, int M = 2>
static void attention_forward_of(act_t *out, real_t *lse, const act_t *qkv, int B, int T, int C, int NH,
                                 int NKV, int heads) {
    enum { OWN = WARPS * 16 * M };
    const dim3 grid(blocks_for((size_t)T, OWN), (unsigned)heads, (unsigned)B);
    const size_t shared = (OWN + 4 * TILE) * HS * sizeof(act_t);
    const float bits = (float)(1.44269504 / sqrt((double)(C / NH)));
    LAUNCH((attention_forward_kernel<HS, WHOLE, M>), grid, WARPS * WARP, shared, out, lse, qkv, T,
           heads_of(C, NH, NKV, heads), bits);
}
template <int HS, int WHOLE, int M, int KEYS>
static void attention_backward_pass(act_t *dqkv, const act_t *dout, const act_t *qkv, const float2 *rows,
                                    int B, int T, int C, int NH, int NKV, int heads) {
    enum { OWN = WARPS * 16 * M };
    const unsigned y = (unsigned)(KEYS ? heads / (NH / NKV) : heads);
    const dim3 grid(blocks_for((size_t)T, OWN), y, (unsigned)B);
    const size_t shared = (2 * OWN + 4 * TILE) * HS * sizeof(act_t) + KEYS * 2 * TILE * sizeof(float2);
    const float scale = (float)(1 / sqrt((double)(C / NH)));
    LAUNCH((attention_backward_kernel<HS, WHOLE, M, KEYS>), grid, WARPS * WARP, shared, dqkv, dout, qkv, rows,
           T, heads_of(C, NH, NKV, heads), scale);
}
template <int HS, int WHOLE, int M = HS <= 64 ? 2 : 1>  // what registers can hold of dx1 and dx2
static void attention_backward_of(act_t *dqkv, const act_t *dout, const act_t *qkv, const float2 *rows, int B,
                                  int T, int C, int NH, int NKV, int heads) {
    attention_backward_pass<HS, WHOLE, M, 1>(dqkv, dout, qkv, rows, B, T, C, NH, NKV, heads);
    attention_backward_pass<HS, WHOLE, M, 0>(dqkv, dout, qkv, rows, B, T, C, NH, NKV, heads);
}
#define OF_SIZE(f, ...) do { \
        if (!whole && hs <= 32) f<32, 0>(__VA_ARGS__); \
        else if (!whole) f<128, 0>(__VA_ARGS__); \
        else if (hs <= 16) f<16, 1>(__VA_ARGS__); \
        else if (hs <= 32) f<32, 1>(__VA_ARGS__); \
        else if (hs <= 64) f<64, 1>(__VA_ARGS__); \
        else f<128, 1>(__VA_ARGS__); \
    } while (0)
#else
// In float32: a warp for each query, or each key; a lane has every 32nd channel of the head.
enum { LANE_CHANNELS = 128 / WARP };
static __device__ __forceinline__ float dot(const float *x, const float *y, int hs) {
    float sum = 0;
    for (int c = threadIdx.x % WARP; c < hs; c += WARP) sum += x[c] * y[c];
    return warp_sum(sum);
}
static __global__ void attention_forward_kernel(act_t *out, float *lse, const act_t *qkv, int T, Heads heads,
                                                float scale) {
    const int t = (int)(blockIdx.x * (blockDim.x / WARP) + threadIdx.x / WARP), lane = threadIdx.x % WARP;
    const int stride = heads.stride, hs = heads.hs, h = (int)blockIdx.y;
    const act_t *q = of_head(qkv, h, T, stride, hs), *k = q + to_keys(h, heads);
    float o[LANE_CHANNELS] = {}, highest = -1e30f, sum = 0;
    if (t >= T) return;  // the whole warp
    q += (size_t)t * stride;
    for (int j = 0; j <= t; j++, k += stride) {
        float s = dot(q, k, hs) * scale, higher = fmaxf(highest, s), shrink = expf(highest - higher);
        float p = expf(s - higher);
        sum = sum * shrink + p;
        for (int i = 0, c = lane; i < LANE_CHANNELS && c < hs; i++, c += WARP)
            o[i] = o[i] * shrink + p * k[heads.KV + c];
        highest = higher;
    }
    out = of_head(out, h, T, heads.C, hs) + (size_t)t * heads.C;
    for (int i = 0, c = lane; i < LANE_CHANNELS && c < hs; i++, c += WARP) out[c] = o[i] / sum;
    if (lane == 0) lse[queries_of_head(h, T, heads.NH) + t] = highest + logf(sum);
}
// gradients of query t (KEYS 0), or of key and value t (KEYS 1), which the group's heads of queries go by
template <int KEYS> static __global__ void
attention_backward_kernel(act_t *dqkv, const act_t *dout, const act_t *qkv, const float2 *rows, int T,
                          Heads heads, float scale) {
    const int t = (int)(blockIdx.x * (blockDim.x / WARP) + threadIdx.x / WARP), lane = threadIdx.x % WARP;
    const int C = heads.C, KV = heads.KV, stride = heads.stride, hs = heads.hs;
    const int group = KEYS ? heads.group : 1, h = (int)blockIdx.y * group;  // the first head of queries
    const act_t *q = of_head(qkv, h, T, stride, hs), *k = q + to_keys(h, heads);
    const act_t *d = of_head(dout, h, T, C, hs);
    float dx[LANE_CHANNELS] = {}, dv[LANE_CHANNELS] = {};
    rows += queries_of_head(h, T, heads.NH);
    if (t >= T) return;  // the whole warp
    for (int g = 0; g < group; g++, q += hs, d += hs, rows += T)
        for (int j = KEYS ? t : 0; j < (KEYS ? T : t + 1); j++) {
            int query = KEYS ? j : t, key = KEYS ? t : j;
            const act_t *x = q + (size_t)query * stride, *y = k + (size_t)key * stride;
            const act_t *dy = d + (size_t)query * C;
            float p = exp2f(dot(x, y, hs) * scale * 1.44269504f - rows[query].x);
            float ds = p * (dot(dy, y + KV, hs) - rows[query].y) * scale;
            for (int i = 0, c = lane; i < LANE_CHANNELS && c < hs; i++, c += WARP) {
                dx[i] += ds * (KEYS ? x[c] : y[c]);
                dv[i] += p * dy[c];
            }
        }
    act_t *to = of_head(dqkv, h, T, stride, hs) + (size_t)t * stride + (KEYS ? to_keys(h, heads) : 0);
    for (int i = 0, c = lane; i < LANE_CHANNELS && c < hs; i++, c += WARP) {
        to[c] = dx[i];
        if (KEYS) to[KV + c] = dv[i];
    }
}
static void attention_forward_of(act_t *out, real_t *lse, const act_t *qkv, int B, int T, int C, int NH,
                                 int NKV, int heads) {
    const dim3 grid(blocks_for((size_t)T, THREADS / WARP), (unsigned)heads, (unsigned)B);
    const float scale = (float)(1 / sqrt((double)(C / NH)));
    LAUNCH(attention_forward_kernel, grid, THREADS, 0, out, lse, qkv, T, heads_of(C, NH, NKV, heads), scale);
}
static void attention_backward_of(act_t *dqkv, const act_t *dout, const act_t *qkv, const float2 *rows, int B,
                                  int T, int C, int NH, int NKV, int heads) {
    const unsigned tiles = blocks_for((size_t)T, THREADS / WARP);
    const Heads x = heads_of(C, NH, NKV, heads);
    const dim3 of_keys(tiles, (unsigned)(heads / x.group), (unsigned)B);
    const dim3 of_queries(tiles, (unsigned)heads, (unsigned)B);
    const float scale = (float)(1 / sqrt((double)(C / NH)));
    LAUNCH(attention_backward_kernel<1>, of_keys, THREADS, 0, dqkv, dout, qkv, rows, T, x, scale);
    LAUNCH(attention_backward_kernel<0>, of_queries, THREADS, 0, dqkv, dout, qkv, rows, T, x, scale);
}
#define OF_SIZE(f, ...) f(__VA_ARGS__)
#endif

void attention_forward(act_t *out, real_t *lse, const act_t *qkv, int B, int T, int C, int NH, int NKV,
                       int heads) {
    const Heads x = heads_of(C, NH, NKV, heads);
    const int hs = x.hs, whole = hs % 8 == 0 && aligned(qkv) && aligned(out);
    const double wide = x.stride + x.Q;
    profile("attention_forward", 2.0 * B * T * T * x.Q, wide * B * T * sizeof(act_t));
    (void)whole;  // float32 has one way
    OF_SIZE(attention_forward_of, out, lse, qkv, B, T, C, NH, NKV, heads);
}
void attention_backward(act_t *dqkv, const act_t *dout, const act_t *qkv, const act_t *out, const real_t *lse,
                        int B, int T, int C, int NH, int NKV, int heads) {
    const Heads x = heads_of(C, NH, NKV, heads);
    const int hs = x.hs;
    const int whole = hs % 8 == 0 && aligned(qkv) && aligned(out) && aligned(dout) && aligned(dqkv);
    const double wide = x.stride + x.Q;
    profile("attention_backward", 5.0 * B * T * T * x.Q, 2 * wide * B * T * sizeof(act_t));
    float2 *rows = (float2 *)(void *)partial_sums;
    LAUNCH(delta_kernel, blocks_for((size_t)B * (size_t)T * (size_t)heads, THREADS / 8), THREADS, 0, rows, lse,
           out, dout, B * T, T, x, whole);
    OF_SIZE(attention_backward_of, dqkv, dout, qkv, rows, B, T, C, NH, NKV, heads);
}

// A block a head: the scores of a query and some keys at a time are in shared memory, then their exponentials;
// a thread sums up a channel.
enum { QUERY_KEYS = 8192 };
static __global__ void attention_query_kernel(act_t *out, const act_t *qkv, int t, Heads heads, float scale) {
    SHARED(float, room);  // 2 * 32 floats for sums, then the scores
    float *score = room + 2 * WARP, highest = -1e30f, sum = 0, x = 0;
    const int h = (int)blockIdx.x, lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, me = (int)threadIdx.x;
    const int hs = heads.hs, stride = heads.stride, warps = (int)blockDim.x / WARP, threads = (int)blockDim.x;
    const act_t *q = qkv + (size_t)t * stride + h*hs, *k = qkv + h*hs + to_keys(h, heads);
    for (int first = 0; first <= t; first += QUERY_KEYS, k += (size_t)QUERY_KEYS * stride) {
        const int left = t + 1 - first, keys = left < QUERY_KEYS ? left : QUERY_KEYS;
        float top = highest, some = 0;
        __syncthreads();  // the scores before have been read
        for (int j = warp; j < keys; j += warps) {
            float dot = 0;
            for (int c = lane; c < hs; c += WARP) dot += to_float(q[c]) * to_float(k[(size_t)j * stride + c]);
            dot = warp_sum(dot) * scale;
            if (lane == 0) score[j] = dot;
        }
        __syncthreads();
        for (int j = me; j < keys; j += threads) top = fmaxf(top, score[j]);
        top = block_max(top, top, room).x;
        for (int j = me; j < keys; j += threads) some += score[j] = exp2f((score[j] - top) * 1.44269504f);
        const float shrink = exp2f((highest - top) * 1.44269504f);
        sum = sum * shrink + block_sum(some, 0, room).x;
        highest = top;
        x *= shrink;
        for (int j = 0; j < keys && me < hs; j++)
            x += score[j] * to_float(k[(size_t)j * stride + heads.KV + me]);
    }
    if (me < hs) set(out + h*hs + me, x / sum);
}
void attention_query(act_t *out, const act_t *qkv, int t, int C, int NH, int NKV) {
    const Heads heads = heads_of(C, NH, NKV, NH);
    const size_t shared = (2 * WARP + (size_t)smaller_of(QUERY_KEYS, t + 1)) * sizeof(float);
    profile("attention_query", 4.0 * t * C, 2.0 * t * heads.KV * sizeof(act_t));
    LAUNCH(attention_query_kernel, (unsigned)NH, THREADS, shared, out, qkv, t, heads,
        (float)(1 / sqrt((double)heads.hs)));
}

// ---- adjoint, head, optimizer

template <int N> static __global__ void scale_kernel(act_t *out, const float *x, float scale, size_t count) {
    size_t i = (blockIdx.x * (size_t)blockDim.x + threadIdx.x) * N;
    if (i >= count) return;
    Few<float, N> from = load<N>(x + i);
    Few<act_t, N> to;
    for (int j = 0; j < N; j++) set(to.e + j, scale * from.e[j]);
    store<N>(out + i, to);
}
void scale_cast(act_t *out, const real_t *x, double scale, size_t count) {
    profile("scale_cast", 0, (double)count * (sizeof(act_t) + sizeof(real_t)));
    if (count % 4 == 0 && aligned(out) && aligned(x))
        LAUNCH(scale_kernel<4>, blocks_for(count, 4 * THREADS), THREADS, 0, out, x, (float)scale, count);
    else LAUNCH(scale_kernel<1>, blocks_for(count, THREADS), THREADS, 0, out, x, (float)scale, count);
}

template <int N> static __global__ void
adjoint_kernel(float *dp, float *dnext, float alpha, float beta, size_t count) {
    size_t i = (blockIdx.x * (size_t)blockDim.x + threadIdx.x) * N;
    if (i >= count) return;
    Few<float, N> a = load<N>(dp + i), b = load<N>(dnext + i);
    for (int j = 0; j < N; j++) a.e[j] += beta * b.e[j], b.e[j] *= alpha;
    store<N>(dp + i, a);
    store<N>(dnext + i, b);
}
void adjoint_update(real_t *dp, real_t *dnext, double alpha, double beta, size_t count) {
    float a = (float)alpha, b = (float)beta;
    if (alpha == 1 && beta == 0) return;
    profile("adjoint_update", 0, (double)count * 4 * sizeof(real_t));
    if (count % 4 == 0 && aligned(dp) && aligned(dnext))
        LAUNCH(adjoint_kernel<4>, blocks_for(count, 4 * THREADS), THREADS, 0, dp, dnext, a, b, count);
    else LAUNCH(adjoint_kernel<1>, blocks_for(count, THREADS), THREADS, 0, dp, dnext, a, b, count);
}

// Where a target does not count: no gradient in a token's logits (Vp)
static __device__ void no_gradient(act_t *x, int Vp, float scale) {
    for (int v = (int)threadIdx.x; v < Vp && scale != 0; v += (int)blockDim.x) set(x + v, 0);
}

// A block a token: the highest logit and the sum of exponentials in one pass, the gradient in a second. Whole
// pieces of N logits need no questions; what is left of V, and the padding to Vp, come one by one.
template <int N> static __global__ void __launch_bounds__(1024)
classifier_kernel(float *losses, act_t *logits, const int *targets, int V, int Vp, float scale) {
    SHARED(float, room);
    act_t *x = logits + blockIdx.x * (size_t)Vp;
    const int target = targets[blockIdx.x], lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    const int begin = (int)threadIdx.x * N, onward = (int)blockDim.x * N, whole = V / N * N;
    if (target < 0) {
        if (threadIdx.x == 0) losses[blockIdx.x] = 0;
        return no_gradient(x, Vp, scale);
    }
    float top = -1e30f, sum = 0;
    for (int v = begin; v < whole; v += onward) {
        Few<act_t, N> y = load<N>(x + v);
        float higher = top;
        for (int j = 0; j < N; j++) higher = fmaxf(higher, to_float(y.e[j]));
        sum *= __expf(top - higher);
        for (int j = 0; j < N; j++) sum += __expf(to_float(y.e[j]) - higher);
        top = higher;
    }
    for (int v = whole + (int)threadIdx.x; v < V; v += (int)blockDim.x) {
        const float y = to_float(x[v]), higher = fmaxf(top, y);
        sum = sum * __expf(top - higher) + __expf(y - higher);
        top = higher;
    }
    float highest = warp_max(top);
    if (lane == 0) room[warp] = highest;
    __syncthreads();
    highest = warp_max(lane < (int)blockDim.x / WARP ? room[lane] : -1e30f);
    const float of_target = to_float(x[target]);
    sum = block_sum(sum * __expf(top - highest), 0, room).x;  // now every thread has read the target's logit
    if (threadIdx.x == 0) losses[blockIdx.x] = highest + logf(sum) - of_target;
    if (scale == 0) return;
    const float factor = scale / sum, to_target = fmaf(__expf(of_target - highest), factor, -scale);
    for (int v = begin; v < whole; v += onward) {
        Few<act_t, N> y = load<N>(x + v);
        for (int j = 0; j < N; j++) set(y.e + j, __expf(to_float(y.e[j]) - highest) * factor);
        store<N>(x + v, y);
        if (v <= target && target < v + N) set(x + target, to_target);
    }
    for (int v = whole + (int)threadIdx.x; v < Vp; v += (int)blockDim.x) {
        const float y = v < V ? __expf(to_float(x[v]) - highest) * factor : 0;
        set(x + v, v == target ? to_target : y);
    }
}
void classifier(real_t *losses, act_t *logits, const int *targets, int n, int V, int Vp, double scale) {
    profile("classifier", 0, 2.0 * n * V * sizeof(act_t));
    enum { N = 16 / sizeof(act_t) };
    unsigned threads = (unsigned)smaller_of(1024, (V + N*WARP - 1) / (N*WARP) * WARP);
    if (Vp % N == 0 && aligned(logits))
        LAUNCH(classifier_kernel<N>, (unsigned)n, threads, 2 * WARP * sizeof(float), losses, logits, targets,
               V, Vp, (float)scale);
    else
        LAUNCH(classifier_kernel<1>, (unsigned)n, 1024, 2 * WARP * sizeof(float), losses, logits, targets, V,
               Vp, (float)scale);
}

// A block a token: the highest logits, the sums of exponentials with the divergence, the gradient
static __global__ void __launch_bounds__(1024)
distillation_kernel(float *out, size_t stride, act_t *logits, const act_t *teacher, const int *targets,
                    int V, int Vp, int objective, float scale) {
    SHARED(float, room);
    act_t *x = logits + blockIdx.x * (size_t)Vp;
    const act_t *y = teacher + blockIdx.x * (size_t)Vp;
    if (targets[blockIdx.x] < 0) {
        if (threadIdx.x < METRICS) out[stride * threadIdx.x + blockIdx.x] = 0;
        return no_gradient(x, Vp, scale);
    }
    const float of_target = to_float(x[targets[blockIdx.x]]), of_target_y = to_float(y[targets[blockIdx.x]]);
    float top = -1e30f, top_y = -1e30f, sum = 0, sum_y = 0, cross = 0, first = -1e30f;
    for (int v = (int)threadIdx.x; v < V; v += (int)blockDim.x)
        top = fmaxf(top, to_float(x[v])), top_y = fmaxf(top_y, to_float(y[v]));
    const float2 tops = block_max(top, top_y, room);
    const float apart = tops.x - tops.y;
    const bool of_teacher = objective == KL_TEACHER;
    for (int v = (int)threadIdx.x; v < V; v += (int)blockDim.x) {
        float a = to_float(x[v]), b = to_float(y[v]), p = __expf(a - tops.x), q = __expf(b - tops.y),
              d = a - b - apart;
        sum += p, sum_y += q;
        cross += of_teacher ? -q * d : p * d;
        if (a == tops.x) first = fmaxf(first, -(float)v);
    }
    const float2 sums = block_sum(sum, sum_y, room);
    cross = block_sum(cross, 0, room).x;
    first = -block_max(first, 0, room).x;
    const float mean = cross / (of_teacher ? sums.y : sums.x), ratio = logf(sums.x / sums.y);
    if (threadIdx.x == 0) {
        out[blockIdx.x] = tops.x - of_target + logf(sums.x);
        out[stride * TEACHER_LOSS + blockIdx.x] = tops.y - of_target_y + logf(sums.y);
        out[stride * DIVERGENCE + blockIdx.x] = of_teacher ? mean + ratio : mean - ratio;
        out[stride * AGREEMENT + blockIdx.x] = first < (float)V && to_float(y[(int)first]) == tops.y;
    }
    for (int v = (int)threadIdx.x; v < Vp && scale != 0; v += (int)blockDim.x) {
        float a = to_float(x[v]), b = to_float(y[v]), p = __expf(a - tops.x) / sums.x;
        set(x + v,
            v >= V ? 0 : scale * (of_teacher ? p - __expf(b - tops.y) / sums.y : p * (a - b - apart - mean)));
    }
}
void distillation(real_t *out, size_t stride, act_t *logits, const act_t *teacher, const int *targets, int n,
                  int V, int Vp, int objective, double scale) {
    profile("distillation", 0, 3.0 * n * V * sizeof(act_t));
    LAUNCH(distillation_kernel, (unsigned)n, (unsigned)smaller_of(1024, (V + WARP - 1) / WARP * WARP),
           2 * WARP * sizeof(float), out, stride, logits, teacher, targets, V, Vp, objective, (float)scale);
}

// A piece's squares are summed up as if by fours, whether x can be read by fours or not: the same bits.
template <int N> static __global__ void __launch_bounds__(THREADS)
squares_kernel(float *partial, const float *x, size_t count) {
    enum { FOUR = 4, TURNS = PIECE / FOUR / THREADS };
    SHARED(float, room);
    const size_t begin = blockIdx.x * (size_t)PIECE, end = begin + PIECE < count ? begin + PIECE : count;
    Few<float, FOUR> y[TURNS] = {};
    float sum = 0;
#pragma unroll
    for (int r = 0; r < TURNS; r++) {
        const size_t i = begin + (r * THREADS + threadIdx.x) * (size_t)FOUR;
        if (N == FOUR && i + FOUR <= end) y[r] = load<FOUR>(x + i);
        else
            for (size_t j = 0; j < FOUR && i + j < end; j++) y[r].e[j] = x[i + j];
    }
    for (int r = 0; r < TURNS; r++)
        for (int j = 0; j < FOUR; j++) sum = fmaf(y[r].e[j], y[r].e[j], sum);
    sum = block_sum(sum, 0, room).x;
    if (threadIdx.x == 0) partial[blockIdx.x] = sum;
}
void squares(double *sums, const real_t *x, size_t count) {
    profile("squares", 0, (double)count * sizeof(real_t));
    const size_t most = 2 * SLICES;  // pieces that partial_sums has room for, however few channels there are
    const size_t room = 2 * WARP * sizeof(float);
    float partial[2 * SLICES];
    for (size_t i = 0; i < count; i += most * PIECE) {
        size_t left = pieces_in(count - i), n = left < most ? left : most;
        if (aligned(x)) LAUNCH(squares_kernel<4>, (unsigned)n, THREADS, room, partial_sums, x + i, count - i);
        else LAUNCH(squares_kernel<1>, (unsigned)n, THREADS, room, partial_sums, x + i, count - i);
        to_host(partial, partial_sums, sizeof(float) * n);
        for (size_t p = 0; p < n; p++) sums[i / PIECE + p] = partial[p];
    }
}

struct AdamW { float beta1, beta2, keep, step, unbias, clip; };
template <int N> static __global__ void adamw_kernel(float *p, const float *g, float *m, float *v,
    size_t count, AdamW k) {
    size_t i = (blockIdx.x * (size_t)blockDim.x + threadIdx.x) * N;
    if (i >= count) return;
    Few<float, N> w = load<N>(p + i), grad = load<N>(g + i), m1 = load<N>(m + i), v1 = load<N>(v + i);
    for (int j = 0; j < N; j++) {
        // Which products become multiply-adds is said here: left to the compiler, N would decide.
        float d = k.clip * grad.e[j];
        m1.e[j] = fmaf(k.beta1, m1.e[j], (1 - k.beta1) * d);
        v1.e[j] = fmaf(k.beta2, v1.e[j], (1 - k.beta2) * d * d);
        w.e[j] = fmaf(k.keep, w.e[j], -(k.step * m1.e[j] / fmaf(sqrtf(v1.e[j]), k.unbias, 1e-8f)));
    }
    store<N>(m + i, m1);
    store<N>(v + i, v1);
    store<N>(p + i, w);
}
void adamw(param_t *p, const real_t *g, real_t *m, real_t *v, size_t count, double rate, double beta1,
           double beta2, double decay, double scale, int t) {
    profile("adamw", 0, (double)count * (2 * sizeof(param_t) + 5 * sizeof(real_t)));
    AdamW k = {(float)beta1, (float)beta2, (float)(1 - rate * decay), (float)(rate / (1 - pow(beta1, t))),
        (float)(1 / sqrt(1 - pow(beta2, t))), (float)scale};
    if (count % 4 == 0 && aligned(p) && aligned(g) && aligned(m) && aligned(v))
        LAUNCH(adamw_kernel<4>, blocks_for(count, 4 * THREADS), THREADS, 0, p, g, m, v, count, k);
    else LAUNCH(adamw_kernel<1>, blocks_for(count, THREADS), THREADS, 0, p, g, m, v, count, k);
}

template <int N> static __global__ void add_kernel(float *sum, const float *g, size_t count) {
    size_t i = (blockIdx.x * (size_t)blockDim.x + threadIdx.x) * N;
    if (i >= count) return;
    Few<float, N> a = load<N>(sum + i), b = load<N>(g + i);
    for (int j = 0; j < N; j++) a.e[j] += b.e[j];
    store<N>(sum + i, a);
}
void add_gradients(real_t *sum, const real_t *g, size_t count) {
    profile("add_gradients", 0, (double)count * 3 * sizeof(real_t));
    if (count % 4 == 0 && aligned(sum) && aligned(g))
        LAUNCH(add_kernel<4>, blocks_for(count, 4 * THREADS), THREADS, 0, sum, g, count);
    else LAUNCH(add_kernel<1>, blocks_for(count, THREADS), THREADS, 0, sum, g, count);
}

// ---- the device's limits

void layers_check(int sequences, int C, int NH) {
    if (C > 128*WARP) die(STATUS_USAGE, "%d channels: at most %d are meant on a GPU", C, 128*WARP);
    if (C / NH > 128) die(STATUS_USAGE, "heads of %d channels: at most 128 are meant on a GPU", C / NH);
    if (sequences > 65535)
        die(STATUS_USAGE, "--chunk %d: on a GPU at most 65535 sequences at a time are meant", sequences);
}

// A square product of the library's, some waves of tiles and less where memory is short: the best of some
double device_flops(void) {
    double best = 0;
    void *x[3], *room = scratch;
    int n = 64 * device.multiProcessorCount;
    size_t bytes = (size_t)n * (size_t)n * sizeof(act_t);
    for (; cudaMalloc(&x[0], 3 * bytes + LIBRARY_BYTES) != cudaSuccess; n /= 2, bytes /= 4)
        if ((void)cudaGetLastError(), n < 1024) return NAN;
    for (int i = 1; i < 3; i++) x[i] = (char *)x[0] + (size_t)i * bytes;
    scratch = (char *)x[0] + 3 * bytes;
    spread((act_t *)x[0], 2 * bytes / sizeof(act_t));
    for (int attempt = 0; attempt < 8; attempt++) {
        Product s = {n, n, n, 1, 0, 0, CUBLASLT_EPILOGUE_DEFAULT, n, n};
        device_finish();
        double start = seconds();
        gemm(s, x[2], (act_t *)x[0], (act_t *)x[1], NULL);
        device_finish();
        best = fmax(best, 2.0 * n * n * n / (seconds() - start));
    }
    scratch = (char *)room;
    CUDA(cudaFree(x[0]));
    return best;
}

double device_fastest(void) { return 0; }  // products end after their functions
const char *device_products(void) {
    static char text[320];
    device_begin();
    snprintf(text, sizeof text, "%s, cuBLASLt %zu", device.name, cublasLtGetVersion());
    return text;
}

#ifdef REV_GPT2_BLOCK
#define REV_GPT2_BLOCK_LAYERS  // the block's own layers, which may use those above
#include REV_GPT2_BLOCK
#endif
