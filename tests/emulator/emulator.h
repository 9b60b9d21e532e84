// CUDA C++ on a CPU, for tests: what cuda_primitives.cuh and the compiler give a kernel, done by fibers. Every thread of a block (of a cluster: of all its
// blocks) is a fiber; what needs others (a barrier, a shuffle, a product of the tensor cores) waits until all of these have come. Slow, and exact enough to be
// compared with the references. Not emulated: any overlap. Copies are done when they are asked for, so a missing wait is not found here.

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <ucontext.h>

#include <algorithm>
#include <memory>
#include <vector>

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
using std::max;
using std::min;

#define __device__
#define __forceinline__ inline
#define KERNEL(...) static void
#define CLUSTER(ranks)
#define SHARED_MEMORY(name) u8* name = emulator::now->block->shared.data()
#define MINUS_INFINITY (-INFINITY)

struct uint4 { u32 x, y, z, w; };
struct float2 { float x, y; };
struct float4 { float x, y, z, w; };
inline uint4 make_uint4(u32 x, u32 y, u32 z, u32 w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
struct Place { int x, y; };

namespace emulator {

constexpr int STACK = 64 * 1024;

struct Block {
    std::vector<u8> shared;
    Place place;
    int arrived = 0, passed = 0;
};
struct Warp {
    u32 words[32][8];
    u32 answers[32][8];
    int arrived = 0, passed = 0;
};
struct Cluster;
struct Thread {
    ucontext_t context;
    std::unique_ptr<u8[]> stack;
    Block* block;
    Warp* warp;
    Cluster* cluster;
    int index, lane;
    bool done = false;
};
struct Cluster {
    std::vector<std::unique_ptr<Block>> blocks;
    std::vector<std::unique_ptr<Warp>> warps;
    std::vector<std::unique_ptr<Thread>> threads;
    int arrived = 0, passed = 0;
};

inline Thread* now = nullptr;
inline ucontext_t scheduler;
inline Place grid, size;
inline void (*entry)(const void*) = nullptr;
inline const void* argument = nullptr;

inline void rest() { swapcontext(&now->context, &scheduler); }
// Waits until `all` have called it on this group; the last one does `work` first.
template <typename Group, typename Work>
inline void gather(Group& group, int all, Work work) {
    const int turn = group.passed;
    if (++group.arrived == all) {
        work();
        group.arrived = 0;
        ++group.passed;
    }
    while (group.passed == turn) rest();
}
inline void begin() {
    entry(argument);
    now->done = true;
    rest();
}

// Runs a kernel: `ranks` blocks of each row of the grid side by side, one cluster after the other.
inline void run(void (*kernel)(const void*), const void* parameters, int blocks_x, int blocks_y, int threads, int shared_bytes, int ranks) {
    entry = kernel, argument = parameters, grid = {blocks_x, blocks_y}, size = {threads, 1};
    for (int y = 0; y < blocks_y; ++y)
        for (int x = 0; x < blocks_x; x += ranks) {
            Cluster cluster;
            for (int rank = 0; rank < ranks; ++rank) {
                cluster.blocks.emplace_back(new Block);
                Block* block = cluster.blocks.back().get();
                block->shared.assign(shared_bytes + 128, 0xa5);  // what nobody wrote is no zero
                block->place = {x + rank, y};
                for (int index = 0; index < threads; ++index) {
                    if (index % 32 == 0) cluster.warps.emplace_back(new Warp);
                    cluster.threads.emplace_back(new Thread);
                    Thread* thread = cluster.threads.back().get();
                    thread->stack.reset(new u8[STACK]);
                    thread->block = block, thread->warp = cluster.warps.back().get(), thread->cluster = &cluster;
                    thread->index = index, thread->lane = index % 32;
                    getcontext(&thread->context);
                    thread->context.uc_stack.ss_sp = thread->stack.get();
                    thread->context.uc_stack.ss_size = STACK;
                    thread->context.uc_link = nullptr;
                    makecontext(&thread->context, begin, 0);
                }
            }
            for (bool some = true; some;) {
                some = false;
                for (auto& thread : cluster.threads)
                    if (!thread->done) {
                        some = true, now = thread.get();
                        swapcontext(&scheduler, &now->context);
                    }
            }
        }
}

template <typename To, typename From>
inline To bits(From x) {
    To y;
    static_assert(sizeof(To) == sizeof(From), "as many bytes");
    memcpy(&y, &x, sizeof(y));
    return y;
}

}  // namespace emulator

#define threadIdx (Place{emulator::now->index, 0})
#define blockIdx (emulator::now->block->place)
#define gridDim (emulator::grid)

inline float __uint_as_float(u32 x) { return emulator::bits<float>(x); }
inline u32 __float_as_uint(float x) { return emulator::bits<u32>(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __expf(float x) { return expf(x); }
inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
inline float __ldcg(const float* place) { return *place; }
inline int atomicAdd(int* place, int more) { const int before = *place; *place += more; return before; }
inline void __threadfence() {}
inline u32 __byte_perm(u32 a, u32 b, u32 choice) {
    const u64 all = a | (u64)b << 32;
    u32 found = 0;
    for (int i = 0; i < 4; ++i) found |= (u32)(all >> 8 * (choice >> 4 * i & 7) & 255) << 8 * i;
    return found;
}

inline void __syncthreads() { emulator::gather(*emulator::now->block, emulator::size.x, [] {}); }
inline void __syncwarp() { emulator::gather(*emulator::now->warp, 32, [] {}); }
template <typename T, typename Work>
inline T exchange(T x, Work work) {
    emulator::Warp& warp = *emulator::now->warp;
    const int lane = emulator::now->lane;
    warp.words[lane][0] = emulator::bits<u32>(x);
    emulator::gather(warp, 32, [&] {
        for (int i = 0; i < 32; ++i) warp.answers[i][0] = warp.words[work(i)][0];
    });
    return emulator::bits<T>(warp.answers[lane][0]);
}
template <typename T>
inline T __shfl_xor_sync(u32, T x, int step) { return exchange(x, [=](int lane) { return lane ^ step; }); }
template <typename T>
inline T __shfl_sync(u32, T x, int from) { return exchange(x, [=](int) { return from; }); }
template <typename T>
inline T __shfl_down_sync(u32, T x, int step) { return exchange(x, [=](int lane) { return lane + step < 32 ? lane + step : lane; }); }

// ---------------------------------------------------------------------------------------------------- cuda_primitives.cuh

inline u32 shared_address(const void* pointer) { return (u32)((const u8*)pointer - emulator::now->block->shared.data()); }
inline u8* at_shared(u32 address) { return emulator::now->block->shared.data() + address; }

inline float from_bf16(u32 bits) { return __uint_as_float(bits << 16); }
inline float low_bf16(u32 pair) { return __uint_as_float(pair << 16); }
inline float high_bf16(u32 pair) { return __uint_as_float(pair & 0xffff0000); }
inline u16 to_bf16(float x) {
    const u32 word = __float_as_uint(x);
    return isnan(x) ? (u16)0x7fff : (u16)((word + 0x7fff + (word >> 16 & 1)) >> 16);
}
inline u32 two_bf16(float low, float high) { return to_bf16(low) | (u32)to_bf16(high) << 16; }
inline float from_half(u32 bits) {
    _Float16 x;
    const u16 word = (u16)bits;
    memcpy(&x, &word, 2);
    return (float)x;
}
inline float exp2_of(float x) { return exp2f(x); }
inline u32 merge(u32 word, u32 mask, u32 more) { return (word & mask) | more; }
inline u32 times_two_bf16(u32 a, u32 b) { return two_bf16(low_bf16(a) * low_bf16(b), high_bf16(a) * high_bf16(b)); }
inline u32 larger_two_u16(u32 a, u32 b) { return max(a & 0xffff, b & 0xffff) | max(a >> 16, b >> 16) << 16; }

// a: rows g and g + 8 of lanes 4 g + t, as many numbers in a row of a register as fit; b: column g of lanes 4 g + t
template <typename T, int EACH, typename A, typename B>
inline void multiply_warp(T (&c)[4], const u32 (&held)[6], A of_a, B of_b) {
    emulator::Warp& warp = *emulator::now->warp;
    const int lane = emulator::now->lane;
    for (int i = 0; i < 6; ++i) warp.words[lane][i] = held[i];
    emulator::gather(warp, 32, [&] {
        for (int to = 0; to < 32; ++to)
            for (int i = 0; i < 4; ++i) {
                const int row = to / 4 + i / 2 * 8, column = to % 4 * 2 + i % 2;
                T sum = 0;
                for (int half = 0; half < 2; ++half)
                    for (int t = 0; t < 4; ++t)
                        for (int j = 0; j < EACH; ++j)
                            sum += of_a(warp.words[row % 8 * 4 + t][row / 8 + 2 * half], j) * of_b(warp.words[column * 4 + t][4 + half], j);
                warp.answers[to][i] = emulator::bits<u32>(sum);
            }
    });
    for (int i = 0; i < 4; ++i) c[i] += emulator::bits<T>(warp.answers[lane][i]);
}
inline void multiply_bf16(float (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    const auto number = [](u32 word, int j) { return from_bf16(word >> 16 * j & 0xffff); };
    multiply_warp<float, 2>(c, {a0, a1, a2, a3, b0, b1}, number, number);
}
template <bool SIGNED>
inline void multiply_bytes(int (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    const auto number = [](u32 word, int j) { return (int)(int8_t)(word >> 8 * j & 255); };
    const auto other = [](u32 word, int j) { return SIGNED ? (int)(int8_t)(word >> 8 * j & 255) : (int)(word >> 8 * j & 255); };
    multiply_warp<int, 4>(c, {a0, a1, a2, a3, b0, b1}, other, number);
}

inline u64 read_once() { return 0; }
inline void copy16(u32 to, const void* from, u64) { memcpy(at_shared(to), from, 16); }
inline void copy4(u32 to, const void* from) { memcpy(at_shared(to), from, 4); }
inline void close_copies() {}
template <int LEFT>
inline void wait_copies() {}
inline void ask_l2(const void*) {}
inline void make_barrier(u32 barrier) { memset(at_shared(barrier), 0, 8); }
inline void copy_all(u32 to, const void* from, u32 bytes, u32 barrier) {
    memcpy(at_shared(to), from, bytes);
    *(u64*)at_shared(barrier) = 1;
}
inline void wait_barrier(u32 barrier) {
    while (*(volatile u64*)at_shared(barrier) != 1) emulator::rest();
}
inline void let_next_begin() {}
inline void wait_for_last() {}
inline void meet_cluster() {
    emulator::Cluster& cluster = *emulator::now->cluster;
    emulator::gather(cluster, (int)cluster.threads.size(), [] {});
}
inline float of_rank(const float* place, int rank) {
    return *(const float*)(emulator::now->cluster->blocks[rank]->shared.data() + shared_address(place));
}
