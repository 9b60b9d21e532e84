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
// the right operand each. int8 then needs no decoding at all and int4 two instructions for eight weights: the upper four bits stay where they are, and their sums
// are 16 times too large. An int4 unit has two scales a row, so its second 128 columns meet columns of the right operand of their own: every sum is then in the
// lane that knows its scale. Sums are exact, and what rounding the activations loses, 2^-17 of the largest of 128, is far below what rounding the result to bf16
// does. fp8 is decoded to bf16 and meets the activations as they are.
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
    u32 block_bytes;          // from one block of rows to the next; all codes are fewer than 2^32
    u32 scale_words;          // from one word of a row's scales to the next
    int columns;
    int num_squares;
    int groups;               // of 16 rows of the result
    int whole;                // whether parts are whole rows
    int gated;                // 0: no; 1 …: the activation of the first half, which meets the second
    int wide;
    int window;               // groups whose sums are held at once
    float eps;
};

constexpr int WARPS = 8, UNIT = 2048, ROWS = 16, PACE = 1;
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
// words of the columns c, c + 64, c + 1, c + 65 with c = 32 half + 8 t + 2 j. `mark`: their scale, and what codes without a sign add to the sums of the products
// (as bits); both for sums of 16 times the products in int4. `x`: where the 128 begin, of each eight lanes.
template <int KIND>
__device__ __forceinline__ void to_integers(u32* x, float2* mark, int lane) {
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
    if ((lane & 7) == 0) *mark = make_float2(largest * (KIND == INT4 ? 1.0f / 32512.0f / 16.0f : 1.0f / 32512.0f), __uint_as_float(total * (8 * 16)));
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
__device__ __forceinline__ void meet_floats(float (&acc)[4][4], const uint4* own, const u16* x, int lane) {
    const int t = lane & 3;
    const bool first = lane < 4;  // the lanes that hold the right operand's first column
    const uint4 none = make_uint4(0, 0, 0, 0);
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

// One unit of integers: acc += rows g and g + 8 of it times x, of the columns whose scale this lane knows. `first`, `second`: what this lane holds of the right
// operand's columns for the first and the second chunk (int4 alone has one): digits, or zeros.
template <int KIND>
__device__ __forceinline__ void meet_integers(float (&acc)[2], const uint4* codes, const uint4* first, const uint4* second, float2 mark, float scale, float scale_below) {
    int low[4] = {}, high[4] = {};
    if (KIND == INT4) {
        constexpr u32 lower = 0x0f0f0f0f, upper = 0xf0f0f0f0;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const uint4 w = codes[half * 64], v = codes[half * 64 + 32], near = (half ? second : first)[0], far = (half ? second : first)[1];
            multiply_bytes<false>(low, w.x & lower, v.x & lower, w.y & lower, v.y & lower, near.x, near.y);
            multiply_bytes<false>(high, w.x & upper, v.x & upper, w.y & upper, v.y & upper, far.x, far.y);
            multiply_bytes<false>(low, w.z & lower, v.z & lower, w.w & lower, v.w & lower, near.z, near.w);
            multiply_bytes<false>(high, w.z & upper, v.z & upper, w.w & upper, v.w & upper, far.z, far.w);
        }
    } else {
        const uint4 w = codes[0], v = codes[32], u = codes[64], s = codes[96], near = first[0], far = first[1];
        multiply_bytes<true>(low, w.x, v.x, w.y, v.y, near.x, near.y);
        multiply_bytes<true>(high, u.x, s.x, u.y, s.y, far.x, far.y);
        multiply_bytes<true>(low, w.z, v.z, w.w, v.w, near.z, near.w);
        multiply_bytes<true>(high, u.z, s.z, u.w, s.w, far.z, far.w);
    }
    const int many = KIND == INT4 ? 16 : 1, shift = KIND == INT4 ? (int)__float_as_uint(mark.y) : 0;
    acc[0] += (float)((low[0] * 256 + low[1]) * many + (high[0] * 256 + high[1]) - shift) * (mark.x * scale);
    acc[1] += (float)((low[2] * 256 + low[3]) * many + (high[2] * 256 + high[3]) - shift) * (mark.x * scale_below);
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
    float2* marks = (float2*)at;  // (padded / 128) of integers
    uint4* zeros = (uint4*)(shared + 32);  // two of them

    let_next_begin();

    // ------------------------------------------------------------------------------------ weights: before the kernel before this one has ended
    const u64 policy = read_once();
    const int g = lane >> 2, t = lane & 3;
    int coming = begin + warp, coming_tile = coming / units_of_tile, coming_unit = coming % units_of_tile;  // the next unit to ask for
    u32 source = 0, source_scale = 0;  // this lane's 16 bytes of the unit's first eight rows, and the first of its scales
    const u32 target = shared_address(ring) + lane * 16;
    const auto find = [&] {
        const int row = row_of(coming_tile);
        source = (u32)(row >> 5) * a.block_bytes + coming_unit * (2 * UNIT) + (row >> 4 & 1) * (KIND == INT4 ? 1024 : UNIT) + g * (KIND == INT4 ? 64 : 128) + t * 16;
        if (KIND == INT4) source_scale = coming_unit * a.scale_words + row + g;
    };
    find();
    const auto ask = [&](u32 to) {  // into the slot where this lane's 16 bytes begin at `to`
        if (coming < end) {
            const u8* from = a.codes + source;
            if (KIND == INT4) {
                copy16(to, from, policy);
                copy16(to + 512, from + 512, policy);
                if (coming_unit * 256 + 128 < a.columns) {
                    copy16(to + 1024, from + 2048, policy);
                    copy16(to + 1536, from + 2560, policy);
                }
                copy4(to + UNIT - lane * 12, a.scale + source_scale);
                copy4(to + UNIT - lane * 12 + 128, a.scale + source_scale + 8);
            } else {
                copy16(to, from, policy);
                copy16(to + 512, from + 1024, policy);
                copy16(to + 1024, from + 64, policy);
                copy16(to + 1536, from + 1088, policy);
            }
        }
        close_copies();
        coming += WARPS;
        coming_unit += WARPS;
        source += WARPS * 2 * UNIT;
        if (KIND == INT4) source_scale += WARPS * a.scale_words;
        if (coming_unit >= units_of_tile) {
            while (coming_unit >= units_of_tile) coming_unit -= units_of_tile, ++coming_tile;
            find();
        }
    };
    if (threadIdx.x == 0) make_barrier(x_here);
#pragma unroll
    for (int slot = 0; slot < SLOTS; ++slot) {
        if (slot >= PACE) wait_copies<PACE - 1>();
        ask(target + slot * Shape<KIND>::slot);
    }
    if (threadIdx.x < 8) ((u32*)zeros)[threadIdx.x] = 0;
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
            to_integers<KIND>((u32*)x + chunk * 64, marks + chunk, lane);
        }
        __syncthreads();
    }

    // ------------------------------------------------------------------------------------ the products
    float acc[4][4] = {}, two_rows[2] = {};  // of floats, of integers
    const auto put = [&](int tile) {
        float* to = sums + (tile * WARPS + warp) * ROWS + g;
        float above = two_rows[0], below = two_rows[1];
        if (KIND == FP8) above = (acc[0][0] + acc[1][0]) + (acc[2][0] + acc[3][0]), below = (acc[0][2] + acc[1][2]) + (acc[2][2] + acc[3][2]);
        if (KIND == INT4) above += __shfl_xor_sync(0xffffffff, above, 1), below += __shfl_xor_sync(0xffffffff, below, 1);
        if (t == 0) to[0] = above, to[8] = below;
#pragma unroll
        for (int m = 0; m < 4; ++m)
#pragma unroll
            for (int i = 0; i < 4; ++i) acc[m][i] = 0.0f;
        two_rows[0] = two_rows[1] = 0.0f;
    };
    // of integers: where this lane finds its part of the right operand, (chunk, digit, t), and how far that moves with a unit: lanes that hold none see zeros
    constexpr int DIGITS = 256;  // bytes of a chunk's
    const u8 *own_digits = (const u8*)x + (lane >> 3) * DIGITS + (g & 1) * (DIGITS / 2) + t * 32, *none = (const u8*)zeros;
    const u8 *first_digits = lane < 8 ? own_digits : none, *second_digits = lane >> 3 == 1 ? own_digits : none;
    const int first_step = lane < 8 ? Shape<KIND>::columns * 2 : 0, second_step = lane >> 3 == 1 ? Shape<KIND>::columns * 2 : 0;
    int tile = (begin + warp) / units_of_tile, unit = (begin + warp) % units_of_tile, index = begin + warp;
    // The slot in turn, as two addresses that differ from lane to lane: of a copy to an address that it finds to be the same offset for a whole warp, the
    // compiler of CUDA 13.0 makes an illegal instruction.
    const uint4* mine = (const uint4*)ring + lane;
    u32 to = target;
    for (int done = 0; done < held_groups; done += a.window) {
        const int opening = first_group + done, closing = opening + a.window < first_group + held_groups ? opening + a.window : first_group + held_groups;
        const int first = opening * pieces, until = closing * units_of_group < end ? closing * units_of_group : end;  // the window's first tile, and its end
        bool some = false;  // whether there are sums that are not put away
        for (; index < until; index += WARPS) {
            wait_copies<SLOTS - 1>();
            if (KIND == FP8) {
                meet_floats(acc, mine, x + unit * Shape<KIND>::columns, lane);
            } else if (KIND == INT8) {
                meet_integers<KIND>(two_rows, mine, (const uint4*)(first_digits + unit * first_step), mine, marks[unit], 1.0f, 1.0f);
            } else {  // of a chunk that only pads, activations and scales are zero
                const u32 *scales = (const u32*)(mine - lane) + UNIT / 4 + lane, scale = scales[0], below = scales[32], half = (t & 1) * 16;
                meet_integers<KIND>(two_rows, mine, (const uint4*)(first_digits + unit * first_step), (const uint4*)(second_digits + unit * second_step),
                                    marks[unit * 2 + (t & 1)], from_half(scale >> half), from_half(below >> half));
            }
            ask(to);
            const bool around = to == target + (SLOTS - 1) * Shape<KIND>::slot;
            to = around ? target : to + Shape<KIND>::slot;
            mine = around ? (const uint4*)ring + lane : mine + Shape<KIND>::slot / 16;
            unit += WARPS;
            some = true;
            if (unit >= units_of_tile) {
                put(tile - first), some = false;
                while (unit >= units_of_tile) unit -= units_of_tile, ++tile;
            }
        }
        if (some) put(tile - first);
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
