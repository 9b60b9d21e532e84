// Online softmax in chunks of 128 keys at fixed positions: every query merges the same partial results in the same order, whether it decodes alone, shares a
// step with others, or comes with its whole prompt. So what a request answers does not depend on its neighbours, bit for bit. arXiv:2112.05682, arXiv:2311.01282
#include "attention.h"

#include <algorithm>

#include "elementwise.h"

namespace ts {

// slot of a token and head: where its value and its scales lie; its tile of keys begins at that of the tile's first token
TS_INLINE int64_t slot_in(const Cache& c, const int32_t* table, int64_t block, int64_t inside, int head) {
  return (table[block] * (int64_t)c.heads + head) * c.block_size + inside;
}
TS_INLINE int64_t slot_of(const Cache& c, const int32_t* table, int64_t position, int head) {
  return slot_in(c, table, position / c.block_size, position % c.block_size, head);
}

// where the tiles of a chunk lie: found once for all rows, as a division takes as long as many products
struct Tiles {
  int count;
  int64_t slots[CHUNK / LANES], keys[CHUNK / LANES], values[CHUNK / LANES];
};

static Tiles tiles_of(const Cache& c, const int32_t* table, int64_t start, int64_t end, int head) {
  Tiles found;
  found.count = (int)((end - start + LANES - 1) / LANES);
  int64_t block = start / c.block_size, inside = start % c.block_size;  // whole tiles, as are blocks
  for (int t = 0; t < found.count; t++, inside += LANES) {
    if (inside == c.block_size) block++, inside = 0;
    const int64_t slot = slot_in(c, table, block, inside, head);
    found.slots[t] = slot;
    found.keys[t] = slot * c.key_width;
    found.values[t] = slot * c.value_width;
  }
  return found;
}

void expect_key(const Cache& c, const Step& step, int64_t sequence, int64_t position, int head) {
  const int64_t width = width_bytes(c.store);
  const char* tile = (const char*)c.keys + slot_of(c, step.tables + sequence * step.table_width, position / LANES * LANES, head) * c.key_width * width;
  for (int64_t byte = 0; byte < c.key_width * LANES * width; byte += 64) __builtin_prefetch(tile + byte, 1, 3);
}

void write_key(const Cache& c, const Step& step, int64_t sequence, int64_t position, int head, const float* k) {
  const int64_t lane = position % LANES, tile = slot_of(c, step.tables + sequence * step.table_width, position - lane, head);
  if (c.store == STORE_BF16) return store_pairs((uint16_t*)c.keys + tile * c.key_width + 2 * lane, 2 * LANES, k, c.key_width);
  store_vector(c.store, c.keys, tile * c.key_width + lane, LANES, c.key_scales ? c.key_scales + tile + lane : nullptr, k, c.key_width);
}

void write_value(const Cache& c, const Step& step, int64_t sequence, int64_t position, int head, const float* v) {
  const int64_t slot = slot_of(c, step.tables + sequence * step.table_width, position, head), odd = slot % 2;
  if (c.store == STORE_BF16) return store_half_pairs((uint16_t*)c.values + (slot - odd) * c.value_width, odd, v, c.value_width);
  store_vector(c.store, c.values, slot * c.value_width, 1, c.value_scales ? c.value_scales + slot : nullptr, v, c.value_width);
}

int64_t partial_floats(int64_t value_width) { return ROWS * round_up(value_width, LANES) + 2 * LANES; }

constexpr int MOST_SPLIT = 32;  // blocks whose chunks are shared out among the threads
constexpr int FEW_ROWS = 4;     // rows of a block that waits for memory more than it computes

// Up to ROWS query rows that share a key head, and the keys that each may see: positions [low, high).
struct Block {
  int count;
  int head;
  const int32_t* table;
  const float* q[ROWS];
  float* out[ROWS];
  const float* sink[ROWS];
  int64_t low[ROWS], high[ROWS];
  int64_t lowest, highest;  // of all rows
  int64_t first, last;      // chunks with something to see
};

struct Partial {  // of a chunk, or of all chunks so far
  alignas(64) float largest[LANES];  // ROWS, and what fills the register
  alignas(64) float total[LANES];
  float* values;  // ROWS · padded value width
};

static void clear(Partial& p) {
  store(p.largest, splat(-INFINITY));
  store(p.total, vf{});
}

// With 16 registers, what multiplies a vector is read again for the next one: kept for it, it would crowd out one of the sums, and a sum that waits in memory
// takes three times as long as one in a register.
TS_INLINE void read_again(int vector) {
  if (TS_REGISTER == 32 && vector) asm("" ::: "memory");
}

// The next chunk's tiles of a plane: a block of few rows asks for them line by line while it computes this one, since pages are too short a run in memory for
// the hardware to see them coming. Many rows keep a core so busy that asking costs more than it saves.
struct Ahead {
  int count;      // tiles; 0: nothing
  int64_t bytes;  // of each
  const char* tiles[CHUNK / LANES];
};

TS_INLINE void ask(const Ahead& ahead, int64_t tile, int64_t byte) {
  if (tile < ahead.count && byte < ahead.bytes) __builtin_prefetch(ahead.tiles[tile] + byte, 0, 2);
}

static Ahead ahead_of(const Cache& c, const Tiles& chunk, bool keys) {
  const int64_t width = width_bytes(c.store);
  Ahead ahead{chunk.count, LANES * (keys ? c.key_width : c.value_width) * width, {}};
  for (int t = 0; t < chunk.count; t++) ahead.tiles[t] = keys ? (const char*)c.keys + chunk.keys[t] * width : (const char*)c.values + chunk.values[t] * width;
  return ahead;
}

template <int STORE, int NQ, int TILES>
TS_INLINE void score_tiles(const Attention& a, const Block& b, int first_row, const Tiles& chunk, int first_tile, float* scores, const Ahead& ahead) {
  constexpr int WIDTH = width_bytes(STORE);
  const int64_t* tiles = chunk.keys + first_tile;
  const bool asks = first_tile < ahead.count;
  vf acc[NQ][TILES];
  for (int i = 0; i < NQ; i++)
    for (int t = 0; t < TILES; t++) acc[i][t] = vf{};
  constexpr bool PAIRED = STORE == STORE_BF16 || STORE == STORE_PAIRS;
  for (int64_t d = 0; d < a.cache.key_width; d += PAIRED ? 2 : 1) {
    if (asks && d * LANES * WIDTH % 64 == 0)
      for (int t = 0; t < TILES; t++) ask(ahead, first_tile + t, d * LANES * WIDTH);
    for (int t = 0; t < TILES; t++) {
      read_again(t);
      if constexpr (STORE == STORE_PAIRS) {
        const vb k = load_bytes((const uint16_t*)a.cache.keys + tiles[t] + d * LANES);
TS_UNROLL(12)
        for (int i = 0; i < NQ; i++) acc[i][t] = dot2_bf16(acc[i][t], k, two_of((const uint16_t*)b.q[first_row + i] + d));
      } else if constexpr (STORE == STORE_BF16) {
        const vu both = as<vu>(load_bytes((const uint16_t*)a.cache.keys + tiles[t] + d * LANES));
        const vf even = as<vf>(both << 16), odd = as<vf>(both & 0xffff0000u);
TS_UNROLL(12)
        for (int i = 0; i < NQ; i++) acc[i][t] = fma(odd, splat(b.q[first_row + i][d + 1]), fma(even, splat(b.q[first_row + i][d]), acc[i][t]));
      } else {
        const vf k = load_stored<STORE>(a.cache.keys, tiles[t] + d * LANES);
TS_UNROLL(12)
        for (int i = 0; i < NQ; i++) acc[i][t] = fma(k, splat(b.q[first_row + i][d]), acc[i][t]);
      }
    }
  }
  scores += first_tile * LANES;
  for (int t = 0; t < TILES; t++) {
    if constexpr (is_scaled(STORE)) {
      const vf scales = token_scales<STORE>(a.cache.key_scales, chunk.slots[first_tile + t]);
      for (int i = 0; i < NQ; i++) acc[i][t] = acc[i][t] * scales;
    }
    for (int i = 0; i < NQ; i++) store(scores + (first_row + i) * CHUNK + t * LANES, acc[i][t]);
  }
}

template <int STORE, int NQ>
TS_INLINE void score_rows(const Attention& a, const Block& b, int first_row, const Tiles& chunk, float* scores, const Ahead& ahead) {
  const int num_tiles = chunk.count;
  int t = 0;
  if constexpr (4 * NQ <= MOST_SUMS)
    for (; t + 4 <= num_tiles; t += 4) score_tiles<STORE, NQ, 4>(a, b, first_row, chunk, t, scores, ahead);
  if constexpr (2 * NQ <= MOST_SUMS)
    for (; t + 2 <= num_tiles; t += 2) score_tiles<STORE, NQ, 2>(a, b, first_row, chunk, t, scores, ahead);
  for (; t < num_tiles; t++) score_tiles<STORE, NQ, 1>(a, b, first_row, chunk, t, scores, ahead);
}

// Where weighted values go: into the partial result of a chunk, or, with factors, to what the chunks before came to.
struct Sums {
  float* values;
  int64_t padded;
  const float *keep, *add;  // of each row, or null
};

template <int VECTORS>
TS_INLINE void put(const Sums& sums, int row, int64_t c, const vf (&values)[VECTORS]) {
  float* x = sums.values + row * sums.padded + c;
  if (!sums.keep) {
    for (int v = 0; v < VECTORS; v++) store(x + v * LANES, values[v]);
    return;
  }
  const float add = sums.add[row], keep = sums.keep[row];
  if (add == 0.f) return;
  if (keep == 0.f)
    for (int v = 0; v < VECTORS; v++) store(x + v * LANES, values[v] * add);
  else
    for (int v = 0; v < VECTORS; v++) store(x + v * LANES, fma(values[v], splat(add), load(x + v * LANES) * keep));
}

template <int STORE, int NQ>
TS_INLINE void weigh_rows(const Attention& a, int first_row, const Tiles& chunk, int64_t from, int64_t to, const float* scores, const Sums& sums, const Ahead& ahead) {
  const int64_t width = a.cache.value_width;
  int64_t rows[CHUNK];
  for (int64_t j = from; j < to; j++) rows[j] = chunk.values[j / LANES] + j % LANES * width;
  constexpr int VECTORS = 4 * NQ <= MOST_SUMS ? 4 : 2 * NQ <= MOST_SUMS ? 2 : 1;
  int64_t c = 0;
  for (; c + VECTORS * LANES <= width; c += VECTORS * LANES) {
    vf acc[NQ][VECTORS];
    for (int i = 0; i < NQ; i++)
      for (int v = 0; v < VECTORS; v++) acc[i][v] = vf{};
    for (int64_t j = from; j < to; j++) {
      if (ahead.count)
        for (int64_t byte = 0; byte < VECTORS * LANES * width_bytes(STORE); byte += 64)
          ask(ahead, j / LANES, (j % LANES * width + c) * width_bytes(STORE) + byte);
      for (int v = 0; v < VECTORS; v++) {
        read_again(v);
        const vf x = load_stored<STORE>(a.cache.values, rows[j] + c + v * LANES);
TS_UNROLL(6)
        for (int i = 0; i < NQ; i++) acc[i][v] = fma(splat(scores[(first_row + i) * CHUNK + j]), x, acc[i][v]);
      }
    }
    for (int i = 0; i < NQ; i++) put(sums, first_row + i, c, acc[i]);
  }
  for (; c < width; c += LANES) {  // what is left of a head that is no multiple of 64
    const int64_t lanes = std::min<int64_t>(LANES, width - c);
    vf acc[NQ][1];
    for (int i = 0; i < NQ; i++) acc[i][0] = vf{};
    for (int64_t j = from; j < to; j++) {
      vf x{};
      if (lanes == LANES) x = load_stored<STORE>(a.cache.values, rows[j] + c);
      else {
        alignas(64) uint8_t part[64] = {0};
        std::memcpy(part, (const uint8_t*)a.cache.values + (rows[j] + c) * width_bytes(STORE), (size_t)(lanes * width_bytes(STORE)));
        x = load_stored<STORE>(part, 0);
      }
      for (int i = 0; i < NQ; i++) acc[i][0] = fma(splat(scores[(first_row + i) * CHUNK + j]), x, acc[i][0]);
    }
    for (int i = 0; i < NQ; i++) put(sums, first_row + i, c, acc[i]);
  }
}

// The same where values lie in pairs of tokens: VECTORS · 16 columns from `column` on, of which `columns` exist. A pair that is cut by `from` or `to` is copied
// without its other half, which may hold anything.
template <int STORE, int NQ, int VECTORS, class Weight>
TS_INLINE void weigh_columns(const Attention& a, int first_row, const Tiles& chunk, int64_t from, int64_t to, const Weight* weights, int64_t column, int64_t columns,
                             const Sums& sums, const Ahead& ahead) {
  const int64_t width = a.cache.value_width, first = from / 2, last = (to + 1) / 2;
  auto pair = [&](int64_t j) { return (const uint16_t*)a.cache.values + chunk.values[2 * j / LANES] + 2 * (j % (LANES / 2) * width + column); };
  const int64_t cut_first = from % 2 ? first : -1, cut_last = to % 2 ? last - 1 : -1;
  alignas(64) uint16_t copies[2][2 * VECTORS * LANES];
  auto copy = [&](int64_t j, uint16_t* to, int64_t half) {
    const uint16_t* x = pair(j);
    std::memset(to, 0, sizeof copies[0]);
    for (int64_t c = 0; c < columns; c++) to[2 * c + half] = x[2 * c + half];
  };
  if (cut_first >= 0) copy(cut_first, copies[0], 1);
  if (cut_last >= 0) copy(cut_last, copies[1], 0);
  vf acc[NQ][VECTORS];
  for (int i = 0; i < NQ; i++)
    for (int v = 0; v < VECTORS; v++) acc[i][v] = vf{};
  for (int64_t j = first; j < last;) {
    const int64_t tile = 2 * j / LANES, end = std::min<int64_t>(last, (tile + 1) * LANES / 2);
    int64_t byte = 4 * (j % (LANES / 2) * width + column);
    const Weight* w = weights + first_row * CHUNK + 2 * j;
    for (const uint16_t* at = pair(j); j < end; j++, at += 2 * width, byte += 4 * width, w += 2) {
      if (tile < ahead.count)
        for (int v = 0; v < VECTORS; v++) ask(ahead, tile, byte + 4 * v * LANES);
      const uint16_t* const x = j == cut_first ? copies[0] : j == cut_last ? copies[1] : at;
      asm("" : "+r"(w));  // one address for all rows: with one for each there are too few registers
      for (int v = 0; v < VECTORS; v++) {
        read_again(v);
        vu both;
        if (columns == VECTORS * LANES) both = as<vu>(load_bytes(x + 2 * v * LANES));
        else {
          alignas(64) uint16_t part[2 * LANES] = {0};
          std::memcpy(part, x, (size_t)(4 * columns));
          both = as<vu>(load_bytes(part));
        }
TS_UNROLL(6)
        for (int i = 0; i < NQ; i++) {
          if constexpr (STORE == STORE_PAIRS) acc[i][v] = dot2_bf16(acc[i][v], as<vb>(both), two_of(w + i * CHUNK));
          else acc[i][v] = fma(as<vf>(both & 0xffff0000u), splat(w[i * CHUNK + 1]), fma(as<vf>(both << 16), splat(w[i * CHUNK]), acc[i][v]));
        }
      }
    }
  }
  for (int i = 0; i < NQ; i++) put(sums, first_row + i, column, acc[i]);
}

template <int STORE, int NQ, class Weight>
TS_INLINE void weigh_pairs(const Attention& a, int first_row, const Tiles& chunk, int64_t from, int64_t to, const Weight* weights, const Sums& sums, const Ahead& ahead) {
  constexpr int VECTORS = 4 * NQ <= MOST_SUMS ? 4 : 2 * NQ <= MOST_SUMS ? 2 : 1;
  const int64_t width = a.cache.value_width;
  int64_t c = 0;
  for (; c + VECTORS * LANES <= width; c += VECTORS * LANES)
    weigh_columns<STORE, NQ, VECTORS>(a, first_row, chunk, from, to, weights, c, VECTORS * LANES, sums, ahead);
  for (; c < width; c += LANES)  // what is left of a head that is no multiple of 64
    weigh_columns<STORE, NQ, 1>(a, first_row, chunk, from, to, weights, c, std::min<int64_t>(LANES, width - c), sums, ahead);
}

template <int STORE, int NQ, class Weight>
TS_INLINE void weigh(const Attention& a, int first_row, const Tiles& chunk, int64_t from, int64_t to, const Weight* weights, const Sums& sums, const Ahead& ahead) {
  if constexpr (STORE == STORE_BF16 || STORE == STORE_PAIRS) weigh_pairs<STORE, NQ>(a, first_row, chunk, from, to, weights, sums, ahead);
  else weigh_rows<STORE, NQ>(a, first_row, chunk, from, to, weights, sums, ahead);
}

#if defined(__AVX512BF16__)
// A row's scores → its weights in bf16, which are rounded before they are summed; its greatest score and their sum. `see` hides what the row may not see.
template <int TILES, class See>
TS_INLINE void weights_of(const Attention& a, const float* scores, See see, uint16_t* words, float* greatest, float* total) {
  constexpr float LOG2_E = 1.44269504088896341f;
  vf s[TILES], largest = splat(-INFINITY), sums{};
  for (int t = 0; t < TILES; t++) {
    s[t] = load(scores + t * LANES);
    if (a.softcap > 0.f) s[t] = a.softcap * tanh(s[t] / a.softcap);
    s[t] = see(t, s[t]);
    largest = max(largest, s[t]);
  }
  const float m = maximum(largest), offset = m == -INFINITY ? 0.f : m * -LOG2_E;
  for (int t = 0; t < TILES; t++) s[t] = exp2_short(fma(s[t], splat(LOG2_E), splat(offset)));
  for (int t = 0; t < TILES; t += 2) {
    const vb two = to_bf16(s[t], s[t + 1]);
    sums = dot2_bf16(sums, two, 0x3f803f80u);
    std::memcpy(words + t * LANES, &two, sizeof two);
  }
  *greatest = m;
  *total = sum(sums);
}
#endif

// Adds a part's greatest scores and totals to those of `into`: by what the rows of values are multiplied in both.
static void factors_of(Partial& into, const float* largest, const float* total, float* keep, float* add) {
  const vf before = load(into.largest), now = load(largest), m = max(before, now);
  const vf kept = select(before == m, splat(1.f), exp(before - m)), added = select(now == m, splat(1.f), exp(now - m));
  const vf none = splat(-INFINITY);
  store(keep, select(before == none, vf{}, kept));
  store(add, select(now == none, vf{}, added));
  store(into.largest, m);
  store(into.total, fma(load(total), load(add), load(into.total) * load(keep)));
}

// Partial results that lie `apart` in memory, one after the other, into rows [first_row, last_row) of `into`: what `put` does, with the sums kept in registers.
static void merge(const Attention& a, int first_row, int last_row, Partial& into, const float* parts, int64_t count, int64_t apart) {
  constexpr int RUN = 16, VECTORS = 4;
  const int64_t padded = round_up(a.cache.value_width, LANES);
  alignas(64) float keep[RUN][LANES], add[RUN][LANES];
  for (int64_t done = 0; done < count; done += RUN, parts += RUN * apart) {
    const int run = (int)std::min<int64_t>(RUN, count - done);
    for (int p = 0; p < run; p++) factors_of(into, parts + p * apart, parts + p * apart + LANES, keep[p], add[p]);
    for (int i = first_row; i < last_row; i++)
      for (int64_t c = 0; c < padded; c += VECTORS * LANES) {
        const int vectors = (int)std::min<int64_t>(VECTORS, (padded - c) / LANES);
        float* x = into.values + i * padded + c;
        vf acc[VECTORS];
        for (int v = 0; v < vectors; v++) acc[v] = load(x + v * LANES);
        for (int p = 0; p < run; p++) {
          const float* values = parts + p * apart + 2 * LANES + i * padded + c;
          const float kept = keep[p][i], added = add[p][i];
          if (added == 0.f) continue;
          if (kept == 0.f)
            for (int v = 0; v < vectors; v++) acc[v] = load(values + v * LANES) * added;
          else
            for (int v = 0; v < vectors; v++) acc[v] = fma(load(values + v * LANES), splat(added), acc[v] * kept);
        }
        for (int v = 0; v < vectors; v++) store(x + v * LANES, acc[v]);
      }
  }
}

// Calls f(rows, first row) for passes of six rows, then for those that are left: in one pass, but for five of them, which are three and two.
template <class F>
TS_INLINE void by_passes(int count, F f) {
  int row = 0;
  for (; row + 6 <= count; row += 6) f(std::integral_constant<int, 6>(), row);
  switch (count - row) {
    case 5: f(std::integral_constant<int, 3>(), row); f(std::integral_constant<int, 2>(), row + 3); break;
    case 4: f(std::integral_constant<int, 4>(), row); break;
    case 3: f(std::integral_constant<int, 3>(), row); break;
    case 2: f(std::integral_constant<int, 2>(), row); break;
    case 1: f(std::integral_constant<int, 1>(), row); break;
  }
}

// Scores, exponentials and weighted values of one chunk: a partial result in `p`, or merged into `all`, which is then not null. `next`: tiles of the chunk that
// this thread computes after it, or null.
template <int STORE>
static void chunk_partial(const Attention& a, const Block& b, int64_t chunk, Partial& p, Partial* all, const Tiles* next) {
  alignas(64) float scores[ROWS * CHUNK];
  clear(p);
  const int64_t start = chunk * CHUNK, from = std::max<int64_t>(0, b.lowest - start), to = std::min<int64_t>(CHUNK, b.highest - start);
  const Tiles tiles = tiles_of(a.cache, b.table, start, start + to, b.head);
  const int num_tiles = tiles.count;
  Ahead none{}, next_keys{}, next_values{};
  if (next) {
    next_keys = ahead_of(a.cache, *next, true);
    next_values = ahead_of(a.cache, *next, false);
    for (int t = 0; STORE == STORE_I8 && t < next->count; t++) {
      __builtin_prefetch(a.cache.key_scales + next->slots[t], 0, 2);
      __builtin_prefetch(a.cache.value_scales + next->slots[t], 0, 2);
    }
  }
  by_passes(b.count, [&](auto rows, int row) { score_rows<STORE, rows.value>(a, b, row, tiles, scores, row ? none : next_keys); });

  constexpr int32_t PLACES[LANES] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  const vi lane = load(PLACES);
  alignas(64) uint16_t words[STORE == STORE_PAIRS ? ROWS * CHUNK : 1];
  for (int i = 0; i < b.count; i++) {
    float* s = scores + i * CHUNK;
    const int32_t first = (int32_t)std::clamp<int64_t>(b.low[i] - start, 0, CHUNK), end = (int32_t)std::clamp<int64_t>(b.high[i] - start, 0, CHUNK);
#if defined(__AVX512BF16__)
    if constexpr (STORE == STORE_PAIRS) {
      auto all = [](int, vf v) { return v; };
      auto some = [&](int t, vf v) {
        const vi at = lane + t * LANES;
        return select((at >= first) & (at < end), v, splat(-INFINITY));  // and tiles behind the last, which hold no scores
      };
      if (first == 0 && end == CHUNK) weights_of<CHUNK / LANES>(a, s, all, words + i * CHUNK, &p.largest[i], &p.total[i]);
      else weights_of<CHUNK / LANES>(a, s, some, words + i * CHUNK, &p.largest[i], &p.total[i]);
      continue;
    }
#endif
    vf largest = splat(-INFINITY);
    if (first == 0 && end == CHUNK && !(a.softcap > 0.f)) {  // nothing to hide
      for (int t = 0; t < CHUNK / LANES; t++) largest = max(largest, load(s + t * LANES));
      const float m = maximum(largest);
      p.largest[i] = m;
      vf total{};
      for (int t = 0; t < CHUNK / LANES; t++) {
        vf e = m == -INFINITY ? vf{} : exp(load(s + t * LANES) - m);
        total = total + e;
        store(s + t * LANES, e);
      }
      p.total[i] = sum(total);
      continue;
    }
    for (int t = 0; t < num_tiles; t++) {
      vf v = load(s + t * LANES);
      if (a.softcap > 0.f) v = a.softcap * tanh(v / a.softcap);
      vi at = lane + t * LANES;
      v = select((at >= first) & (at < end), v, splat(-INFINITY));
      largest = max(largest, v);
      store(s + t * LANES, v);
    }
    const float m = maximum(largest);
    p.largest[i] = m;
    vf total{};
    for (int t = 0; t < num_tiles; t++) {
      vi at = lane + t * LANES;
      vf e = m == -INFINITY ? vf{} : exp(load(s + t * LANES) - m);
      e = select((at >= first) & (at < end), e, vf{});  // exp(-inf) is not quite nothing in our approximation
      total = total + e;
      store(s + t * LANES, e);
    }
    p.total[i] = sum(total);
  }
  if constexpr (is_scaled(STORE))  // once a token and row, not once an element
    for (int t = 0; t < num_tiles; t++) {
      const vf scales = token_scales<STORE>(a.cache.value_scales, tiles.slots[t]);
      for (int i = 0; i < b.count; i++) store(scores + i * CHUNK + t * LANES, load(scores + i * CHUNK + t * LANES) * scales);
    }
  alignas(64) float keep[LANES], add[LANES];
  if (all) factors_of(*all, p.largest, p.total, keep, add);
  const Sums sums{all ? all->values : p.values, round_up(a.cache.value_width, LANES), all ? keep : nullptr, add};
  auto rows_of = [&](const auto* weights) {
    by_passes(b.count, [&](auto rows, int row) { weigh<STORE, rows.value>(a, row, tiles, from, to, weights, sums, row ? none : next_values); });
  };
  if constexpr (STORE == STORE_PAIRS) rows_of(words);
  else rows_of(scores);
}

TS_INLINE float exp_one(float x) { return first_lane(exp(splat(x))); }

static void finish(const Attention& a, const Block& b, const Partial& p, int first_row, int last_row) {
  const int64_t width = a.cache.value_width, padded = round_up(width, LANES);
  for (int i = first_row; i < last_row; i++) {
    float total = p.total[i], scale = 1.f;
    if (b.sink[i]) {  // a learned logit that takes its share and carries no value (gpt-oss)
      const float m = std::max(p.largest[i], *b.sink[i]);
      scale = exp_one(p.largest[i] - m);
      total = total * scale + exp_one(*b.sink[i] - m);
    }
    const float by = scale / total;
    for (int64_t c = 0; c < width; c++) b.out[i][c] = p.values[i * padded + c] * by;
  }
}

// blocks of rows that sequence `s` has per key head, and the `index`-th of them
static int64_t blocks_of(const Attention& a, const Step& step, int64_t s) {
  const int64_t group = a.query_heads / a.cache.heads, queries = step.starts[s + 1] - step.starts[s];
  return (queries * group + ROWS - 1) / ROWS;
}

static Block make_block(const Attention& a, const Step& step, int64_t s, int head, int64_t index) {
  const int64_t group = a.query_heads / a.cache.heads, start = step.starts[s], queries = step.starts[s + 1] - start;
  const int64_t row0 = index * ROWS, count = std::min<int64_t>(ROWS, queries * group - row0);
  Block b;
  b.count = (int)count;
  b.head = head;
  b.table = step.tables + s * step.table_width;
  b.lowest = INT64_MAX;
  b.highest = 0;
  for (int64_t i = 0; i < count; i++) {
    const int64_t query = (row0 + i) / group, n = head * group + (row0 + i) % group;
    const int64_t position = step.lengths[s] - queries + query;
    b.q[i] = a.q + (start + query) * a.q_stride + n * a.cache.key_width;
    b.out[i] = a.out + (start + query) * a.out_stride + n * a.cache.value_width;
    b.sink[i] = a.sinks ? a.sinks + n : nullptr;
    b.high[i] = position + 1;
    b.low[i] = a.window == 0 ? 0 : a.chunked ? position / a.window * a.window : std::max<int64_t>(0, position - a.window + 1);
    b.lowest = std::min(b.lowest, b.low[i]);
    b.highest = std::max(b.highest, b.high[i]);
  }
  b.first = b.lowest / CHUNK;
  b.last = (b.highest + CHUNK - 1) / CHUNK;
  return b;
}

// The tiles of `chunk` of a block with few rows; nothing for one with many, which finds in the cache what its rows share.
static const Tiles* ask_for(const Attention& a, const Block& b, int64_t chunk, Tiles* tiles) {
  if (b.count > FEW_ROWS) return nullptr;
  *tiles = tiles_of(a.cache, b.table, chunk * CHUNK, std::min(b.highest, (chunk + 1) * CHUNK), b.head);
  return tiles;
}

constexpr int TOGETHER = 8;  // blocks at most that take turns at a chunk

// Blocks that one thread computes, chunk by chunk: one, or those of a sequence's heads, whose part of a chunk lies side by side in memory.
struct Blocks {
  int count = 0;
  Block of[TOGETHER];
};

// `after`: what this thread computes next, or null
template <int STORE>
static void whole_blocks(const Attention& a, const Blocks& blocks, float* scratch, const Blocks* after) {
  Partial all[TOGETHER], part;
  for (int i = 0; i < blocks.count; i++) {
    all[i].values = scratch + i * ROWS * round_up(a.cache.value_width, LANES);
    clear(all[i]);
  }
  const int64_t first = blocks.of[0].first, last = blocks.of[0].last;
  for (int64_t chunk = first; chunk < last; chunk++)
    for (int i = 0; i < blocks.count; i++) {
      Tiles tiles;
      const Tiles* next = i + 1 < blocks.count ? ask_for(a, blocks.of[i + 1], chunk, &tiles)
                          : chunk + 1 < last   ? ask_for(a, blocks.of[0], chunk + 1, &tiles)
                          : after              ? ask_for(a, after->of[0], after->of[0].first, &tiles)
                                               : nullptr;
      chunk_partial<STORE>(a, blocks.of[i], chunk, part, &all[i], next);
    }
  for (int i = 0; i < blocks.count; i++) finish(a, blocks.of[i], all[i], 0, blocks.of[i].count);
}

// chunks of a block that have room for their partial results at once, beside a result for each block
static int64_t wave_of(const Attention& a, int64_t num_blocks) { return std::max<int64_t>(1, (a.slots - num_blocks) / num_blocks); }

// The chunks of a wave, `done` and those behind it, as units of work. Units without a chunk behind them are left out, so that all threads get as many. Neighbouring
// blocks that see the same chunks, such as those of a sequence's heads, take turns: what they read of one chunk lies side by side in memory.
struct Units {
  struct Run {
    int64_t end, first, count;  // of units, of blocks
  } runs[MOST_SPLIT];
  int64_t total = 0, piece;

  Units(const Block* blocks, int64_t num_blocks, int64_t done, int64_t wave, const Worker& worker) {
    int64_t num_runs = 0;
    for (int64_t i = 0; i < num_blocks; i++) {
      const bool alike = i && blocks[i].first == blocks[i - 1].first && blocks[i].last == blocks[i - 1].last;
      if (!alike) runs[num_runs++] = {0, i, 0};
      total += std::clamp<int64_t>(blocks[i].last - blocks[i].first - done, 0, wave);
      runs[num_runs - 1].count++;
      runs[num_runs - 1].end = total;
    }
    piece = std::max<int64_t>(1, total / (8 * worker.count));
  }

  // the block of a unit, and its chunk's place in the wave
  int64_t find(int64_t unit, int64_t* chunk) const {
    int64_t r = 0;
    while (unit >= runs[r].end) r++;
    unit -= r ? runs[r - 1].end : 0;
    *chunk = unit / runs[r].count;
    return runs[r].first + unit % runs[r].count;
  }
};

// few blocks and long contexts: the chunks themselves are shared out, a wave of partial results at a time
template <int STORE>
static void split_blocks(Worker& worker, const Attention& a, const Step& step, int64_t num_blocks, const Block* blocks) {
  const int64_t floats = partial_floats(a.cache.value_width);
  const int64_t kept = num_blocks, wave = wave_of(a, num_blocks);
  auto at = [&](int64_t slot) {
    float* base = a.partials + slot * floats;
    Partial p;
    p.values = base + 2 * LANES;
    return p;
  };
  auto save = [&](int64_t slot, const Partial& p) {
    std::memcpy(a.partials + slot * floats, p.largest, sizeof p.largest);
    std::memcpy(a.partials + slot * floats + LANES, p.total, sizeof p.total);
  };
  auto fetch = [&](int64_t slot) {
    Partial p = at(slot);
    std::memcpy(p.largest, a.partials + slot * floats, sizeof p.largest);
    std::memcpy(p.total, a.partials + slot * floats + LANES, sizeof p.total);
    return p;
  };
  int64_t waves = 0;
  for (int64_t i = 0; i < num_blocks; i++) waves = std::max(waves, (blocks[i].last - blocks[i].first + wave - 1) / wave);
  for (int64_t w = 0; w < waves; w++) {
    int64_t first, last;
    const Units units(blocks, num_blocks, w * wave, wave, worker);
    while (worker.take(units.total, units.piece, &first, &last))
      for (int64_t unit = first; unit < last; unit++) {
        int64_t chunk, chunk_after;
        const int64_t i = units.find(unit, &chunk);
        Tiles tiles;
        const Tiles* next = nullptr;
        if (unit + 1 < units.total) {
          const Block& after = blocks[units.find(unit + 1, &chunk_after)];
          next = ask_for(a, after, after.first + w * wave + chunk_after, &tiles);
        }
        Partial p = at(kept + i * wave + chunk);
        chunk_partial<STORE>(a, blocks[i], blocks[i].first + w * wave + chunk, p, nullptr, next);
        save(kept + i * wave + chunk, p);
      }
    worker.barrier();
    // rows are shared out, or, where results wait for another wave, blocks
    int64_t rows = 0, row = 0;
    for (int64_t i = 0; i < num_blocks; i++) rows += blocks[i].count;
    const int64_t first_row = rows * worker.index / worker.count, last_row = rows * (worker.index + 1) / worker.count;
    for (int64_t i = 0; i < num_blocks; row += blocks[i++].count) {
      const Block& b = blocks[i];
      int from = 0, to = b.count;
      if (waves == 1) {
        from = (int)std::clamp<int64_t>(first_row - row, 0, b.count);
        to = (int)std::clamp<int64_t>(last_row - row, 0, b.count);
      } else if (i % worker.count != worker.index) continue;
      if (from == to) continue;
      Partial all = w ? fetch(i) : at(i);
      if (w == 0) clear(all);
      merge(a, from, to, all, a.partials + (kept + i * wave) * floats, std::clamp<int64_t>(b.last - b.first - w * wave, 0, wave), floats);
      if (w + 1 == waves) finish(a, b, all, from, to);
      else save(i, all);
    }
    if (w + 1 < waves) worker.barrier();
  }
}

// The blocks of a step that has so few that their chunks are shared out; 0 where it has more.
static int64_t few_blocks(const Worker& worker, const Attention& a, const Step& step, Block* blocks) {
  int64_t total = 0;
  for (int64_t s = 0; s < step.num_sequences && total <= MOST_SPLIT; s++) total += blocks_of(a, step, s) * a.cache.heads;
  if (worker.count == 1 || total >= 4 * worker.count || total > MOST_SPLIT || 2 * total > a.slots) return 0;
  int64_t made = 0;
  for (int64_t s = 0; s < step.num_sequences; s++)
    for (int head = 0; head < a.cache.heads; head++)
      for (int64_t i = 0; i < blocks_of(a, step, s); i++) blocks[made++] = make_block(a, step, s, head, i);
  return made;
}

constexpr int64_t EXPECTED_UNITS = 2;

void expect_attention(const Worker& worker, const Attention& a, const Step& step) {
  Block blocks[MOST_SPLIT];
  const int64_t count = few_blocks(worker, a, step, blocks), width = width_bytes(a.cache.store);
  if (count == 0) return;
  const Units units(blocks, count, 0, wave_of(a, count), worker);
  const int64_t first = units.total * worker.index / worker.count / units.piece * units.piece;
  for (int64_t unit = first; unit < std::min(first + EXPECTED_UNITS, units.total); unit++) {
    int64_t chunk;
    const Block& b = blocks[units.find(unit, &chunk)];
    Tiles tiles;
    if (!ask_for(a, b, b.first + chunk, &tiles)) return;
    for (int t = 0; t < tiles.count; t++) {
      const char *keys = (const char*)a.cache.keys + tiles.keys[t] * width, *values = (const char*)a.cache.values + tiles.values[t] * width;
      for (int64_t byte = 0; byte < a.cache.key_width * LANES * width; byte += 64) __builtin_prefetch(keys + byte, 0, 2);
      for (int64_t byte = 0; byte < a.cache.value_width * LANES * width; byte += 64) __builtin_prefetch(values + byte, 0, 2);
    }
  }
}

template <int STORE>
static void attend_with(Worker& worker, const Attention& a, const Step& step) {
  Block few[MOST_SPLIT];
  if (const int64_t made = few_blocks(worker, a, step, few)) return split_blocks<STORE>(worker, a, step, made, few);
  // heads of a sequence that decodes are computed together where there are enough sequences for all threads; any other block is a unit of its own
  const bool many = step.num_sequences >= 4 * worker.count && a.cache.heads <= TOGETHER;
  auto together = [&](int64_t s) { return many && (step.starts[s + 1] - step.starts[s]) * a.query_heads <= FEW_ROWS * a.cache.heads; };
  auto units_of = [&](int64_t s) { return together(s) ? 1 : blocks_of(a, step, s) * a.cache.heads; };
  int64_t total = 0;
  for (int64_t s = 0; s < step.num_sequences; s++) total += units_of(s);
  float* scratch = a.partials + worker.index * (a.slots / worker.count) * partial_floats(a.cache.value_width);
  const int64_t size = std::max<int64_t>(1, std::min<int64_t>(8, total / (8 * worker.count)));
  int64_t first, last, s = 0, before = 0;
  auto make = [&](int64_t unit, Blocks& blocks) {  // units mostly come in rising order, so the sequence that holds one is found by walking on
    if (unit < before) s = before = 0;
    while (unit >= before + units_of(s)) before += units_of(s++);
    const int64_t inside = unit - before, each = blocks_of(a, step, s);
    blocks.count = together(s) ? a.cache.heads : 1;
    if (blocks.count == 1) blocks.of[0] = make_block(a, step, s, (int)(inside / each), inside % each);
    else
      for (int head = 0; head < blocks.count; head++) blocks.of[head] = make_block(a, step, s, head, 0);
  };
  Blocks two[2], *now = &two[0], *after = &two[1];
  while (worker.take(total, size, &first, &last)) {
    make(first, *now);
    for (int64_t unit = first; unit < last; unit++) {
      const bool more = unit + 1 < total;
      if (more) make(unit + 1, *after);
      whole_blocks<STORE>(a, *now, scratch, more ? after : nullptr);
      std::swap(now, after);
    }
  }
}

void attend(Worker& worker, const Attention& a, const Step& step) {
  if (a.cache.store == STORE_F32) attend_with<STORE_F32>(worker, a, step);
  else if (a.cache.store == STORE_F16) attend_with<STORE_F16>(worker, a, step);
#if defined(__AVX512BF16__)
  else if (a.pairs) attend_with<STORE_PAIRS>(worker, a, step);
#endif
  else if (a.cache.store == STORE_BF16) attend_with<STORE_BF16>(worker, a, step);
  else if (a.cache.store == STORE_I8) attend_with<STORE_I8>(worker, a, step);
  else attend_with<STORE_F8>(worker, a, step);
}

}  // namespace ts
