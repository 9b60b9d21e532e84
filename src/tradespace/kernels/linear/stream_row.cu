// One row of activations times a packed matrix, as a stream of weights: y = W x, and what surrounds it in a layer.
//
// A block of threads per multiprocessor; each takes an equal part of the matrix's units (2 KiB of codes: 16 rows of 128 or 256 columns), row by row. Every warp
// brings its own units into its own ring of shared memory, every lane what it reads itself, so nothing in the loop waits for another lane. Weights depend on
// nothing: the ring is filled before the kernel before this one has ended, and the next kernel fills its own while this one runs: with two blocks' rings to a
// multiprocessor the memory hardly rests between kernels. That filling keeps PACE units of a warp under way and no more: what the kernel before still reads would
// otherwise queue behind it. A third block must never be what a multiprocessor has no room for: attention's is small (BESIDE_BYTES), else blocks lie unevenly.
//
// Parts are whole rows where that is nearly even; else rows whose units lie in several blocks are summed by the last of these to finish, in the order of their
// columns. Either way results are the same bits every time.
//
// The weights are the left operand of the tensor cores' product, the activations one or two columns of the right one. Which columns of the chunk a lane holds is
// free as long as both sides agree: a lane takes what lies in 16 bytes.
// Integer codes meet integers: activations of each 128 columns become 16-bit ones of one scale (the largest is 32,512 of them), as two 8-bit digits, a column of
// the right operand each. int8 then needs no decoding at all and int4 three instructions for eight weights; sums are exact, and what rounding the activations
// loses, 2^-17 of the largest of 128, is far below what rounding the result to bf16 does. fp8 is decoded to bf16 and meets the activations as they are.
//
// Needs compute capability 9.0 (programmatic dependent launch, bulk copies). Layouts: kernels/linear/packed.py.

struct Product {
    const u8* codes;          // (blocks of 32 rows, chunks, 32, bytes of a chunk's row)
    const u32* scale;         // fp32 a row; int4: words of two fp16, (words, rows)
    const u16* x;             // bf16 (columns)
    const float* squares;     // sums of squares of x's columns; 0: x needs no norm
    const u16* bias;          // bf16 (rows), 0: none
    const u16* residual;      // bf16 (rows), 0: none
    const float* next_weight; // fp32 (rows), the weight of the norm that follows; 0: none
    void* out;                // bf16 (rows), or fp32 where `wide`
    u16* next_x;              // bf16 (rows)
    float* next_squares;      // (2, rows / 32 rounded up): of each block of 32 rows the first 16, then of each the others
    float* partial;           // 2 · 32 numbers a block
    int* counters;            // one a group of rows, zero between kernels
    u64 block_bytes;          // from one block of rows to the next
    u64 scale_words;          // from one word of a row's scales to the next
    int columns;
    int num_squares;
    int groups;               // of 16 rows of the result
    int whole;                // whether parts are whole rows
    int gated;                // 0: no; 1 …: the activation of the first half, which meets the second
    int wide;
    int window;               // groups whose sums are held at once
    float eps;
};

constexpr int WARPS = 8, UNIT = 2048, ROWS = 16, PACE = 2;
enum { INT8, FP8, INT4 };

template <int KIND>
struct Shape {
    static constexpr int columns = KIND == INT4 ? 256 : 128;            // of a unit
    static constexpr int slot = UNIT + (KIND == INT4 ? 256 : 0);        // bytes: int4 brings its scales along
};

// Two e4m3 of each 16 bits → two pairs of bf16: the low ones, the high ones. The trick is that of triton_decode.py.
__device__ __forceinline__ void two(u32 word, u32& low, u32& high) {
    const u32 up = word << 8;
    low = times_two_bf16(merge(up, 0x80008000, (up >> 4) & 0x07f007f0), 0x7b807b80);
    high = times_two_bf16(merge(word, 0x80008000, (word >> 4) & 0x07f007f0), 0x7b807b80);
}

// eight columns in a row of lanes: two steps of the tensor cores
__device__ __forceinline__ void multiply_run(float (&c)[4], const u32 (&p)[4], const u32 (&q)[4], uint4 x) {
    multiply_bf16(c, p[0], q[0], p[1], q[1], x.x, x.y);
    multiply_bf16(c, p[2], q[2], p[3], q[3], x.z, x.w);
}

// Activations in place, 128 of them by eight lanes: bf16 in order → two digits of 16-bit integers, each as the lanes of a product read it: (digit, t, half, j),
// words of the columns c, c + 64, c + 1, c + 65 with c = 32 half + 8 t + 2 j. Their scale and their sum. `x`: where the 128 begin, of each eight lanes.
__device__ __forceinline__ void to_integers(u32* x, float* scale, int* sum, int lane) {
    const int half = lane & 1, t = lane >> 1 & 3, place = 16 * half + 4 * t;  // in words: 32 half + 8 t columns
    const uint4 near = *(const uint4*)(x + place), far = *(const uint4*)(x + place + 32);
    const u32 a[4] = {near.x, near.y, near.z, near.w}, b[4] = {far.x, far.y, far.z, far.w};
    u32 most = 0;
#pragma unroll
    for (int j = 0; j < 4; ++j) most = larger_two_u16(larger_two_u16(most, a[j] & 0x7fff7fff), b[j] & 0x7fff7fff);
#pragma unroll
    for (int step = 1; step < 8; step <<= 1) most = larger_two_u16(most, __shfl_xor_sync(0xffffffff, most, step));
    const float largest = from_bf16(max(most & 0xffff, most >> 16));
    const float inverse = largest > 1e-30f ? __fdividef(32512.0f, largest) : largest == largest ? 0.0f : largest;
    u32 above[4], below[4];
    int total = 0;
#pragma unroll
    for (int j = 0; j < 4; ++j) {  // rounded by adding 1.5 · 2^23: the integer is then what the low bits hold
        const float magic = 12582912.0f;
        const u32 v[4] = {__float_as_uint(fmaf(from_bf16(a[j] & 0xffff), inverse, magic)), __float_as_uint(fmaf(from_bf16(b[j] & 0xffff), inverse, magic)),
                          __float_as_uint(fmaf(__uint_as_float(a[j] & 0xffff0000), inverse, magic)),
                          __float_as_uint(fmaf(__uint_as_float(b[j] & 0xffff0000), inverse, magic))};
        below[j] = __byte_perm(__byte_perm(v[0], v[1], 0x40), __byte_perm(v[2], v[3], 0x40), 0x5410);
        above[j] = __byte_perm(__byte_perm(v[0] + 128, v[1] + 128, 0x51), __byte_perm(v[2] + 128, v[3] + 128, 0x51), 0x5410);
        total += (int)(v[0] + v[1] + v[2] + v[3] - 4 * 0x4b400000u);
    }
#pragma unroll
    for (int step = 1; step < 8; step <<= 1) total += __shfl_xor_sync(0xffffffff, total, step);
    *(uint4*)(x + t * 8 + half * 4) = make_uint4(above[0], above[1], above[2], above[3]);
    *(uint4*)(x + 32 + t * 8 + half * 4) = make_uint4(below[0], below[1], below[2], below[3]);
    if ((lane & 7) == 0) *scale = largest * (1.0f / 32512.0f), *sum = total;
}

__device__ __forceinline__ float sigmoid(float x) { return 1.0f / (1.0f + __expf(-x)); }
__device__ __forceinline__ float activated(float x, int name) {
    if (name == 1) return x * sigmoid(x);                                                                           // silu
    if (name == 2) return 0.5f * x * (1.0f + erff(x * 0.7071067811865476f));                                        // gelu
    if (name == 3) return 0.5f * x * (2.0f * sigmoid(2.0f * 0.7978845608028654f * (x + 0.044715f * x * x * x)));    // gelu_tanh
    float y = fmaxf(x, 0.0f);
    return name == 4 ? y : y * y;                                                                                   // relu, relu2
}

// One unit of bytes of bf16's kind: acc += 16 rows of weights times x's columns, chains of sums side by side
__device__ __forceinline__ void meet_floats(float (&acc)[4][4], const u8* slot, const u16* x, int lane) {
    const int t = lane & 3;
    const bool first = lane < 4;  // the lanes that hold the right operand's first column
    const uint4 none = make_uint4(0, 0, 0, 0);
    const uint4* own = (const uint4*)slot + lane;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const uint4 low = first ? *(const uint4*)(x + half * 32 + t * 8) : none, high = first ? *(const uint4*)(x + 64 + half * 32 + t * 8) : none;
        const uint4 above = own[half * 64], below = own[half * 64 + 32];
        const u32 w[4] = {above.x, above.y, above.z, above.w}, v[4] = {below.x, below.y, below.z, below.w};
        u32 p[4], q[4], r[4], s[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            two(w[i], p[i], r[i]);
            two(v[i], q[i], s[i]);
        }
        multiply_run(acc[half * 2], p, q, low);
        multiply_run(acc[half * 2 + 1], r, s, high);
    }
}

// One chunk of 128 columns of integers: rows g and g + 8 of it times the digits of x
template <int KIND>
__device__ __forceinline__ void meet_chunk(float (&acc)[4], const uint4* above, const uint4* below, const u32* x, float x_scale, int x_sum, float scale, float scale_below,
                                           int lane) {
    const uint4 none = make_uint4(0, 0, 0, 0);
    const uint4* digits = (const uint4*)(x + (lane >> 2) * 32 + (lane & 3) * 8);
    const bool holds = lane < 8;  // the first column: the upper digits, the second: the lower ones
    const uint4 near = holds ? digits[0] : none, far = holds ? digits[1] : none;
    int c[2][4] = {};
    if (KIND == INT4) {
        const uint4 w = above[0], v = below[0];
        constexpr u32 mask = 0x0f0f0f0f;
        multiply_bytes<KIND == INT8>(c[0], w.x & mask, v.x & mask, w.x >> 4 & mask, v.x >> 4 & mask, near.x, far.x);
        multiply_bytes<KIND == INT8>(c[1], w.y & mask, v.y & mask, w.y >> 4 & mask, v.y >> 4 & mask, near.y, far.y);
        multiply_bytes<KIND == INT8>(c[0], w.z & mask, v.z & mask, w.z >> 4 & mask, v.z >> 4 & mask, near.z, far.z);
        multiply_bytes<KIND == INT8>(c[1], w.w & mask, v.w & mask, w.w >> 4 & mask, v.w >> 4 & mask, near.w, far.w);
    } else {
        const uint4 w = above[0], v = below[0], u = above[64], s = below[64];
        multiply_bytes<KIND == INT8>(c[0], w.x, v.x, u.x, s.x, near.x, far.x);
        multiply_bytes<KIND == INT8>(c[1], w.y, v.y, u.y, s.y, near.y, far.y);
        multiply_bytes<KIND == INT8>(c[0], w.z, v.z, u.z, s.z, near.z, far.z);
        multiply_bytes<KIND == INT8>(c[1], w.w, v.w, u.w, s.w, near.w, far.w);
    }
    const int shift = KIND == INT4 ? 8 * x_sum : 0;
    acc[0] += (float)((c[0][0] + c[1][0]) * 256 + (c[0][1] + c[1][1]) - shift) * (x_scale * scale);
    acc[2] += (float)((c[0][2] + c[1][2]) * 256 + (c[0][3] + c[1][3]) - shift) * (x_scale * scale_below);
}

template <int KIND, int SLOTS>
__device__ __forceinline__ void stream_row(const Product& a) {
    SHARED_MEMORY(shared);
    const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, pieces = a.gated ? 2 : 1;
    const int units_of_tile = (a.columns + Shape<KIND>::columns - 1) / Shape<KIND>::columns;
    const int units_of_group = units_of_tile * pieces, grain = a.whole ? units_of_group : 1;  // units that stay together
    const long long grains = (long long)units_of_group / grain * a.groups, count = gridDim.x, own = blockIdx.x;
    const int begin = (int)(own * grains / count) * grain, end = (int)((own + 1) * grains / count) * grain;
    const int first_tile = begin / units_of_tile, held_tiles = end > begin ? (end - 1) / units_of_tile - first_tile + 1 : 0;
    const int first_group = begin / units_of_group, held_groups = end > begin ? (end - 1) / units_of_group - first_group + 1 : 0;
    const int padded = units_of_tile * Shape<KIND>::columns;  // columns of x with those that pad
    const int half_rows = a.groups * ROWS;                    // gated: the first row of the second piece
    const auto row_of = [&](int tile) { return a.gated ? (tile >> 1) * ROWS + (tile & 1) * half_rows : tile * ROWS; };

    const u32 x_here = shared_address(shared);  // a barrier
    float* root = (float*)(shared + 8);
    u8* at = shared + 128;
    u8* ring = at + warp * SLOTS * Shape<KIND>::slot;
    at += WARPS * SLOTS * Shape<KIND>::slot;
    u16* x = (u16*)at;
    at += padded * 2;
    float* sums = (float*)at;  // (tiles of a window, WARPS, ROWS)
    at += a.window * pieces * WARPS * ROWS * 4;
    float* factors = (float*)at;  // (held_tiles, ROWS)
    at += held_tiles * ROWS * 4;
    float* added = (float*)at;  // (held_groups, ROWS)
    at += held_groups * ROWS * 4;
    float* weights = (float*)at;  // likewise
    at += held_groups * ROWS * 4;
    float* x_scales = (float*)at;  // (padded / 128) of integers
    int* x_sums = (int*)(at + padded / 128 * 4);

    let_next_begin();

    // ------------------------------------------------------------------------------------ weights: before the kernel before this one has ended
    const u64 policy = read_once();
    int coming = begin + warp, coming_tile = coming / units_of_tile, coming_unit = coming % units_of_tile;  // the next unit to ask for
    const u8* source = 0;
    const u32* source_scale = 0;
    const u32 target = shared_address(ring) + lane * 16, target_scale = shared_address(ring) + UNIT + lane * 4;
    const auto find = [&] {  // this lane's 16 bytes of the unit's first eight rows, and the first of its scales
        const int row = row_of(coming_tile), g = lane >> 2, t = lane & 3;
        source = a.codes + (u64)(row >> 5) * a.block_bytes + (u64)coming_unit * (2 * UNIT) + (row >> 4 & 1) * (KIND == INT4 ? 1024 : UNIT) +
                 g * (KIND == INT4 ? 64 : 128) + t * 16;
        if (KIND == INT4) source_scale = a.scale + (u64)coming_unit * a.scale_words + row + g;
    };
    find();
    const auto ask = [&](int slot) {
        if (coming < end) {
            const u32 to = target + slot * Shape<KIND>::slot;
            if (KIND == INT4) {
                copy16(to, source, policy);
                copy16(to + 512, source + 512, policy);
                if (coming_unit * 256 + 128 < a.columns) {
                    copy16(to + 1024, source + 2048, policy);
                    copy16(to + 1536, source + 2560, policy);
                }
                copy4(target_scale + slot * Shape<KIND>::slot, source_scale);
                copy4(target_scale + slot * Shape<KIND>::slot + 128, source_scale + 8);
            } else {
                copy16(to, source, policy);
                copy16(to + 512, source + 1024, policy);
                copy16(to + 1024, source + 64, policy);
                copy16(to + 1536, source + 1088, policy);
            }
        }
        close_copies();
        coming += WARPS;
        coming_unit += WARPS;
        if (coming_unit < units_of_tile) {
            source += WARPS * 2 * UNIT;
            if (KIND == INT4) source_scale += WARPS * a.scale_words;
        } else {
            while (coming_unit >= units_of_tile) coming_unit -= units_of_tile, ++coming_tile;
            find();
        }
    };
    if (threadIdx.x == 0) make_barrier(x_here);
#pragma unroll
    for (int slot = 0; slot < SLOTS; ++slot) {
        if (slot >= PACE) wait_copies<PACE - 1>();
        ask(slot);
    }
    for (int i = threadIdx.x; i < a.window * pieces * WARPS * ROWS; i += WARPS * 32) sums[i] = 0.0f;
    for (int i = threadIdx.x; i < held_tiles * ROWS; i += WARPS * 32)
        factors[i] = KIND == INT4 ? 1.0f : __uint_as_float(a.scale[row_of(first_tile + i / ROWS) + i % ROWS]);
    if (a.next_weight)
        for (int i = threadIdx.x; i < held_groups * ROWS; i += WARPS * 32) weights[i] = a.next_weight[first_group * ROWS + i];
    for (int i = a.columns + threadIdx.x; i < padded; i += WARPS * 32) x[i] = 0;
    __syncthreads();

    // ------------------------------------------------------------------------------------ activations: after it
    wait_for_last();
    if (threadIdx.x == 0) copy_all(shared_address(x), a.x, a.columns * 2, x_here);
    if (a.residual)
        for (int i = threadIdx.x; i < held_groups * ROWS; i += WARPS * 32) added[i] = from_bf16(a.residual[first_group * ROWS + i]);
    if (a.squares && warp == WARPS - 1) {
        float total = 0.0f;
        for (int i = lane; i < a.num_squares; i += 32) total += a.squares[i];
        for (int step = 16; step > 0; step >>= 1) total += __shfl_xor_sync(0xffffffff, total, step);
        if (lane == 0) *root = rsqrtf(total / a.columns + a.eps);
    }
    wait_barrier(x_here);
    if (KIND != FP8) {
        const int chunks = padded / 128;
#pragma unroll 1
        for (int some = warp * 4; some < chunks; some += WARPS * 4) {
            const int chunk = min(some + (lane >> 3), chunks - 1);  // the last one by several: they write the same after all have read
            to_integers((u32*)x + chunk * 64, x_scales + chunk, x_sums + chunk, lane);
        }
        __syncthreads();
    }

    // ------------------------------------------------------------------------------------ the products
    float acc[4][4] = {};
    const auto put = [&](int tile) {
        if ((lane & 3) == 0) {
            float* to = sums + (tile * WARPS + warp) * ROWS + (lane >> 2);
            to[0] = (acc[0][0] + acc[1][0]) + (acc[2][0] + acc[3][0]);
            to[8] = (acc[0][2] + acc[1][2]) + (acc[2][2] + acc[3][2]);
        }
#pragma unroll
        for (int m = 0; m < 4; ++m)
#pragma unroll
            for (int i = 0; i < 4; ++i) acc[m][i] = 0.0f;
    };
    int slot = 0, tile = (begin + warp) / units_of_tile, unit = (begin + warp) % units_of_tile, index = begin + warp;
    for (int done = 0; done < held_groups; done += a.window) {
        const int opening = first_group + done, closing = opening + a.window < first_group + held_groups ? opening + a.window : first_group + held_groups;
        const int first = opening * pieces, until = closing * units_of_group < end ? closing * units_of_group : end;  // the window's first tile, and its end
        int last = tile;
        const bool any = index < until;
        for (; index < until; index += WARPS) {
            if (tile != last) put(last - first), last = tile;
            wait_copies<SLOTS - 1>();
            const u8* held = ring + slot * Shape<KIND>::slot;
            const uint4* own = (const uint4*)held + lane;
            if (KIND == FP8) {
                meet_floats(acc, held, x + unit * Shape<KIND>::columns, lane);
            } else if (KIND == INT8) {
                meet_chunk<KIND>(acc[0], own, own + 32, (const u32*)x + unit * 64, x_scales[unit], 0, 1.0f, 1.0f, lane);
            } else {
                const u32 scale = *((const u32*)(held + UNIT) + lane), below = *((const u32*)(held + UNIT) + 32 + lane);
#pragma unroll
                for (int half = 0; half < 2; ++half)
                    if (unit * 256 + half * 128 < a.columns)
                        meet_chunk<KIND>(acc[half], own + half * 64, own + half * 64 + 32, (const u32*)x + (unit * 2 + half) * 64, x_scales[unit * 2 + half],
                                         x_sums[unit * 2 + half], from_half(scale >> (half * 16)), from_half(below >> (half * 16)), lane);
            }
            ask(slot);
            if (++slot == SLOTS) slot = 0;
            unit += WARPS;
            while (unit >= units_of_tile) unit -= units_of_tile, ++tile;
        }
        if (any) put(last - first);
        __syncthreads();

        // -------------------------------------------------------------------------------- sums of a group's rows, and what surrounds the product
        const int piece = lane >> 4, row = lane & 15;  // of a product that is not gated the upper lanes idle
        for (int i = done + warp; i < closing - first_group; i += WARPS) {
            const int group = first_group + i, from = group * units_of_group, to = from + units_of_group, local = group * pieces + piece - first_tile;
            const int held = group * pieces + piece - first;  // in the window
            const bool here = piece < pieces && local >= 0 && local < held_tiles;
            float value = 0.0f;
            if (here)
#pragma unroll
                for (int w = 0; w < WARPS; ++w) {
                    float* found = sums + (held * WARPS + w) * ROWS + row;
                    value += *found;
                    *found = 0.0f;
                }
            if (from < begin || to > end) {  // other blocks have the rest
                const int low = (int)(((from + 1) * count - 1) / grains), high = (int)((to * count - 1) / grains);
                a.partial[((size_t)own * 2 + (i > 0)) * 32 + lane] = value;
                __threadfence();
                __syncwarp();
                int before = 0;
                if (lane == 0) before = atomicAdd(a.counters + group, 1);
                if (__shfl_sync(0xffffffff, before, 0) != high - low) continue;
                __threadfence();
                value = 0.0f;
                for (int other = low; other <= high; ++other) {
                    const int other_first = (int)(other * grains / count) / units_of_group;
                    value += __ldcg(a.partial + ((size_t)other * 2 + (group > other_first)) * 32 + lane);
                }
                if (lane == 0) a.counters[group] = 0;
            }
            if (piece < pieces) {
                const int place = group * ROWS + row + piece * half_rows;
                if (KIND != INT4) value *= here ? factors[local * ROWS + row] : __uint_as_float(a.scale[place]);
                if (a.squares) value *= *root;
                if (a.bias) value += from_bf16(a.bias[place]);
            }
            const float second = __shfl_down_sync(0xffffffff, value, 16);
            float y = a.gated ? activated(value, a.gated) * second : value;
            if (piece > 0) y = 0.0f;
            else {
                if (a.residual) y += added[i * ROWS + row];
                if (a.wide) {
                    ((float*)a.out)[group * ROWS + row] = y;
                } else {
                    const u16 rounded = to_bf16(y);
                    ((u16*)a.out)[group * ROWS + row] = rounded;
                    y = from_bf16(rounded);
                }
                if (a.next_weight) a.next_x[group * ROWS + row] = to_bf16(y * weights[i * ROWS + row]);
            }
            if (a.next_weight) {
                float total = y * y;
                for (int step = 8; step > 0; step >>= 1) total += __shfl_xor_sync(0xffffffff, total, step);
                if (lane == 0) a.next_squares[(group >> 1) + (group & 1) * ((a.groups + 1) >> 1)] = total;
                if (lane == 0 && group == a.groups - 1 && !(group & 1)) a.next_squares[group + 1] = 0.0f;  // half a block at the end
            }
        }
        if (closing < first_group + held_groups) __syncthreads();
    }
}

#define ROW(kind, slots) \
    KERNEL(WARPS * 32, 2) row_##kind##_##slots(const Product a) { stream_row<kind, slots>(a); }
