// One token of one sequence: queries and its key rotated, its key and value into the paged cache, and attention over all that the cache holds.
//
// A cluster of eight blocks of threads for each key-value head: each takes every eighth tile of 16 keys, and what they found is put together through each
// other's shared memory. All that is older than the kernel before this one (lengths, tables, the rotation's table, keys and values but the newest) is read or
// asked for before that has ended, so what remains is one trip for the token's own numbers, the products and two barriers.
//
// Needs compute capability 9.0 (clusters, programmatic dependent launch). Reference: kernels/attention/reference.py.

struct Query {
    const u16* qkv;          // bf16: G · K query heads, K key heads, K value heads
    const float* table;      // (positions, H / 2, 2): cosine and sine; 0: nothing rotates
    const u64* position;     // of the token
    const long long* slot;   // where its key and value go; -1: nowhere
    const int* length;       // of the sequence with the token
    const int* blocks;       // its table of blocks
    u16* keys;               // bf16 (slots, K, H) by these strides
    u16* values;
    u16* out;                // bf16 (G · K · H)
    u64 key_slot, key_head, value_slot, value_head;
    float scale, cap;        // cap 0: none
    int window;              // 0: none
    int block_size;
    int num_kv;
    int most;                // keys of a block of threads that there is room for
    int early;               // whether the next kernel has use for the time in which this one runs
};

constexpr int RANKS = 8, THREADS = 128, TILE = 16, HELD = 2;  // HELD: tiles that a block reads at once

template <int G, int H>
__device__ __forceinline__ void one_query(const Query& a) {
    constexpr int LANES = H / 16, AT_ONCE = THREADS / LANES;  // lanes that share a key, keys that the block meets at once
    constexpr int PAIRS = H / 2, PARTS = THREADS / PAIRS;     // of the values: threads side by side, and keys at once
    constexpr int EACH = TILE / PARTS;
    constexpr int WORDS = G == 1 ? 1 : G == 2 ? 2 : 4, W = (G + WORDS - 1) / WORDS * WORDS;  // a key's scores of all heads, as they are read
    static_assert(AT_ONCE >= TILE && PARTS >= 1, "a tile is met at once");
    SHARED_MEMORY(shared);
    float* queries = (float*)shared;           // (G, H)
    u32* fresh_key = (u32*)(queries + G * H);  // (H / 2), as the cache holds it
    u32* fresh_value = fresh_key + PAIRS;      // (H / 2)
    float* found = (float*)(fresh_value + PAIRS);  // (G, H)
    float* peaks = found + G * H;             // (G)
    float* totals = peaks + G;                // (G)
    int* slots = (int*)(totals + G + 2 * G % 4);  // (most): where this block's keys lie
    float* scores = (float*)(slots + a.most);     // (most, W)
    const int rank = blockIdx.x, head = blockIdx.y, thread = threadIdx.x, warp = thread >> 5, lane = thread & 31;
    if (a.early) let_next_begin();

    // ---------------------------------------------------------------- before the kernel before this one has ended
    const int length = *a.length, newest = length - 1;
    const int low_key = a.window > 0 && length > a.window ? length - a.window : 0;
    const int first_tile = low_key / TILE, tiles = (length + TILE - 1) / TILE - first_tile;
    const int own_tiles = tiles > rank ? (tiles - rank + RANKS - 1) / RANKS : 0;
    const auto tile_start = [&](int index) { return (first_tile + rank + RANKS * index) * TILE; };
    const int key_lane = thread % LANES, key_of = thread / LANES;  // keys: 16 channels a lane
    const int pair = thread % PAIRS, part = thread / PAIRS;        // values: two channels a thread
    for (int i = thread; i < own_tiles * TILE; i += THREADS) {
        const int position = min(tile_start(i / TILE) + i % TILE, newest);
        const int slot = position < 0 ? 0 : a.blocks[position / a.block_size] * a.block_size + position % a.block_size;
        slots[i] = slot;
        if (i >= HELD * TILE) {
            const u16 *key = a.keys + (u64)slot * a.key_slot + head * a.key_head, *value = a.values + (u64)slot * a.value_slot + head * a.value_head;
#pragma unroll
            for (int line = 0; line < H; line += 64) ask_l2(key + line), ask_l2(value + line);
        }
    }
    __syncthreads();
    uint4 k[HELD][2];
    u32 v[HELD][EACH];
    const auto load_keys = [&](int from) {  // of HELD tiles; what there is not is not read, and what is newest lies elsewhere
#pragma unroll
        for (int h = 0; h < HELD; ++h) {
            const int local = (from + h) * TILE + key_of;
            k[h][0] = k[h][1] = make_uint4(0, 0, 0, 0);
            if (from + h < own_tiles && key_of < TILE && tile_start(from + h) + key_of < newest) {
                const uint4* key = (const uint4*)(a.keys + (u64)slots[local] * a.key_slot + head * a.key_head + key_lane * 16);
                k[h][0] = key[0], k[h][1] = key[1];
            }
        }
    };
    const auto load_values = [&](int from) {
#pragma unroll
        for (int h = 0; h < HELD; ++h)
#pragma unroll
            for (int i = 0; i < EACH; ++i) {
                const int local = (from + h) * TILE + i * PARTS + part;
                v[h][i] = 0;
                if (from + h < own_tiles && tile_start(from + h) + i * PARTS + part < newest)
                    v[h][i] = *(const u32*)(a.values + (u64)slots[local] * a.value_slot + head * a.value_head + pair * 2);
            }
    };
    load_keys(0);
    load_values(0);
    const u64 place = *a.position;
    const long long slot = *a.slot;
    constexpr int QUADS = H / 4;  // of a head: channels d, d + 1 and d + H / 2, d + H / 2 + 1, which turn together
    float4 turn = make_float4(1.0f, 0.0f, 1.0f, 0.0f);
    const int quad = thread % QUADS;
    if (a.table) turn = *(const float4*)(a.table + (place * PAIRS + quad * 2) * 2);

    // ---------------------------------------------------------------- after it: the token's own numbers
    wait_for_last();
    const u16* own_key = a.qkv + (u64)a.num_kv * G * H + (u64)head * H;
    const u16* own_value = a.qkv + (u64)a.num_kv * (G + 1) * H + (u64)head * H;
#pragma unroll 1
    for (int g = thread / QUADS; g < G + 2; g += THREADS / QUADS) {
        const u16* from = g < G ? a.qkv + (u64)(head * G + g) * H : g == G ? own_key : own_value;
        const u32 x = *(const u32*)(from + quad * 2), y = *(const u32*)(from + PAIRS + quad * 2);
        u32 first = x, second = y;
        if (g <= G && a.table) {
            first = two_bf16(low_bf16(x) * turn.x - low_bf16(y) * turn.y, high_bf16(x) * turn.z - high_bf16(y) * turn.w);
            second = two_bf16(low_bf16(y) * turn.x + low_bf16(x) * turn.y, high_bf16(y) * turn.z + high_bf16(x) * turn.w);
        }
        if (g < G) {
            *(float2*)(queries + g * H + quad * 2) = make_float2(low_bf16(first), high_bf16(first));
            *(float2*)(queries + g * H + PAIRS + quad * 2) = make_float2(low_bf16(second), high_bf16(second));
        } else {
            u32* to = g == G ? fresh_key : fresh_value;
            to[quad] = first, to[QUADS + quad] = second;
            if (rank == 0 && slot >= 0) {
                u16* kept = g == G ? a.keys + slot * a.key_slot + head * a.key_head : a.values + slot * a.value_slot + head * a.value_head;
                *(u32*)(kept + quad * 2) = first;
                *(u32*)(kept + PAIRS + quad * 2) = second;
            }
        }
    }
    __syncthreads();

    // ---------------------------------------------------------------- scores, in units of log 2
#pragma unroll 1
    for (int from = 0; from < own_tiles; from += HELD) {
        if (from > 0) load_keys(from);
#pragma unroll
        for (int h = 0; h < HELD; ++h) {
            if (from + h >= own_tiles) break;
            const int position = tile_start(from + h) + key_of;
            const bool there = key_of < TILE && position < length && position >= low_key;
            if (position == newest) k[h][0] = ((const uint4*)fresh_key)[key_lane * 2], k[h][1] = ((const uint4*)fresh_key)[key_lane * 2 + 1];
            const u32 words[8] = {k[h][0].x, k[h][0].y, k[h][0].z, k[h][0].w, k[h][1].x, k[h][1].y, k[h][1].z, k[h][1].w};
            float sums[G];
#pragma unroll
            for (int g = 0; g < G; ++g) {
                const float4* q = (const float4*)(queries + g * H + key_lane * 16);
                sums[g] = 0.0f;
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const float4 some = q[i];
                    sums[g] += some.x * low_bf16(words[2 * i]) + some.y * high_bf16(words[2 * i]) + some.z * low_bf16(words[2 * i + 1]) + some.w * high_bf16(words[2 * i + 1]);
                }
            }
#pragma unroll
            for (int step = LANES / 2; step > 0; step >>= 1)
#pragma unroll
                for (int g = 0; g < G; ++g) sums[g] += __shfl_xor_sync(0xffffffff, sums[g], step);
#pragma unroll
            for (int g = 0; g < G; ++g) {
                float sum = sums[g] * a.scale;
                if (a.cap > 0.0f) sum = a.cap * (1.0f - 2.0f / (1.0f + __expf(2.0f * sum / a.cap)));
                if (key_lane == 0 && key_of < TILE) scores[((from + h) * TILE + key_of) * W + g] = there ? sum * 1.4426950408889634f : MINUS_INFINITY;
            }
        }
    }
    __syncthreads();
    const int keys = own_tiles * TILE;
#pragma unroll 1
    for (int g = warp; g < G; g += THREADS / 32) {
        float peak = MINUS_INFINITY, total = 0.0f;
#pragma unroll 1
        for (int i = lane; i < keys; i += 32) peak = fmaxf(peak, scores[i * W + g]);
#pragma unroll
        for (int step = 16; step > 0; step >>= 1) peak = fmaxf(peak, __shfl_xor_sync(0xffffffff, peak, step));
        const float ground = peak == MINUS_INFINITY ? 0.0f : peak;
#pragma unroll 1
        for (int i = lane; i < keys; i += 32) {
            const float share = exp2_of(scores[i * W + g] - ground);
            scores[i * W + g] = share;
            total += share;
        }
#pragma unroll
        for (int step = 16; step > 0; step >>= 1) total += __shfl_xor_sync(0xffffffff, total, step);
        if (lane == 0) peaks[g] = peak, totals[g] = total;
    }
    __syncthreads();

    // ---------------------------------------------------------------- values
    float acc[G][2] = {};
#pragma unroll 1
    for (int from = 0; from < own_tiles; from += HELD) {
        if (from > 0) load_values(from);
#pragma unroll
        for (int h = 0; h < HELD; ++h) {
            if (from + h >= own_tiles) break;
#pragma unroll
            for (int i = 0; i < EACH; ++i) {
                const int local = i * PARTS + part;
                if (tile_start(from + h) + local == newest) v[h][i] = fresh_value[pair];
                const float x = low_bf16(v[h][i]), y = high_bf16(v[h][i]);
                float share[W];
#pragma unroll
                for (int g = 0; g < W; g += WORDS)
                    if (WORDS == 4) *(float4*)(share + g) = *(const float4*)(scores + ((from + h) * TILE + local) * W + g);
                    else if (WORDS == 2) *(float2*)(share + g) = *(const float2*)(scores + ((from + h) * TILE + local) * W + g);
                    else share[g] = scores[((from + h) * TILE + local) * W + g];
#pragma unroll
                for (int g = 0; g < G; ++g) acc[g][0] += share[g] * x, acc[g][1] += share[g] * y;
            }
        }
    }
#pragma unroll 1
    for (int turns = 0; turns < PARTS; ++turns) {
        if (part == turns)
#pragma unroll
            for (int g = 0; g < G; ++g) {
                float2* to = (float2*)(found + g * H + pair * 2);
                const float2 before = turns ? *to : make_float2(0.0f, 0.0f);
                *to = make_float2(before.x + acc[g][0], before.y + acc[g][1]);
            }
        __syncthreads();
    }

    // ---------------------------------------------------------------- the softmax over all eight
    meet_cluster();
    for (int i = thread; i < G * H / RANKS; i += THREADS) {
        const int index = rank * (G * H / RANKS) + i, g = index / H;
        float peak[RANKS], top = MINUS_INFINITY, sum = 0.0f, total = 0.0f;
#pragma unroll
        for (int r = 0; r < RANKS; ++r) peak[r] = of_rank(peaks + g, r), top = fmaxf(top, peak[r]);
        const float ground = top == MINUS_INFINITY ? 0.0f : top;
#pragma unroll
        for (int r = 0; r < RANKS; ++r) {
            const float share = exp2_of(peak[r] - ground);
            sum += share * of_rank(found + index, r);
            total += share * of_rank(totals + g, r);
        }
        const float y = total > 0.0f ? sum / total : 0.0f;
        a.out[(u64)head * G * H + index] = to_bf16(y);
    }
    meet_cluster();
}

#define ONE(G, H) \
    KERNEL(THREADS) CLUSTER(RANKS) one_query_##G##_##H(const Query a) { one_query<G, H>(a); }
