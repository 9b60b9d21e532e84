// Online softmax in chunks of 64 keys at fixed positions: every query merges the same partial results in the same order, whether it decodes alone, shares a
// step with others, or comes with its whole prompt. So what a request answers does not depend on its neighbours, bit for bit. arXiv:2112.05682, arXiv:2311.01282
#include "attention.h"

#include <algorithm>

#include "elementwise.h"

namespace ts {

// slot of a token and head: where its value and its scales lie; its tile of keys begins at that of the tile's first token
TS_INLINE int64_t slot_of(const Cache& c, const int32_t* table, int64_t position, int head) {
  const int64_t block = table[position / c.block_size], inside = position % c.block_size;
  return (block * c.heads + head) * c.block_size + inside;
}

// where the tiles of a chunk lie: found once for all rows, as a division takes as long as many products
struct Tiles {
  int count;
  int64_t slots[CHUNK / LANES], keys[CHUNK / LANES], values[CHUNK / LANES];
};

static Tiles tiles_of(const Cache& c, const int32_t* table, int64_t start, int64_t end, int head) {
  Tiles found;
  found.count = (int)((end - start + LANES - 1) / LANES);
  for (int t = 0; t < found.count; t++) {
    const int64_t slot = slot_of(c, table, start + t * LANES, head);
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
  store_vector(c.store, c.keys, tile * c.key_width + lane, LANES, c.key_scales ? c.key_scales + tile + lane : nullptr, k, c.key_width);
}

void write_value(const Cache& c, const Step& step, int64_t sequence, int64_t position, int head, const float* v) {
  const int64_t slot = slot_of(c, step.tables + sequence * step.table_width, position, head);
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
  int64_t first, last;  // chunks with something to see
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

// `ahead`, where it is not null, are the tiles of the chunk that this thread computes next: they are asked for one line at a time, while this one is computed,
// since pages are too short a run in memory for the hardware to see them coming.
template <int STORE, int NQ, int TILES>
TS_INLINE void score_tiles(const Attention& a, const Block& b, int first_row, const Tiles& chunk, int first_tile, float* scores, const Tiles* ahead) {
  constexpr int WIDTH = width_bytes(STORE);
  const int64_t* tiles = chunk.keys + first_tile;
  const int64_t* next = ahead && first_tile + TILES <= ahead->count ? ahead->keys + first_tile : nullptr;
  if (STORE == STORE_I8 && next)
    for (int t = first_tile; t < first_tile + TILES; t++) {
      __builtin_prefetch(a.cache.key_scales + ahead->slots[t], 0, 2);
      __builtin_prefetch(a.cache.value_scales + ahead->slots[t], 0, 2);
    }
  vf acc[NQ][TILES];
  for (int i = 0; i < NQ; i++)
    for (int t = 0; t < TILES; t++) acc[i][t] = vf{};
  for (int64_t d = 0; d < a.cache.key_width; d++) {
    if (next && d * LANES * WIDTH % 64 == 0)
      for (int t = 0; t < TILES; t++) __builtin_prefetch((const char*)a.cache.keys + (next[t] + d * LANES) * WIDTH, 0, 2);
    for (int t = 0; t < TILES; t++) {
      read_again(t);
      const vf k = load_stored<STORE>(a.cache.keys, tiles[t] + d * LANES);
TS_UNROLL(12)
      for (int i = 0; i < NQ; i++) acc[i][t] = fma(k, splat(b.q[first_row + i][d]), acc[i][t]);
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
TS_INLINE void score_rows(const Attention& a, const Block& b, int first_row, const Tiles& chunk, float* scores, const Tiles* next) {
  const int num_tiles = chunk.count;
  int t = 0;
  if constexpr (4 * NQ <= MOST_SUMS)
    for (; t + 4 <= num_tiles; t += 4) score_tiles<STORE, NQ, 4>(a, b, first_row, chunk, t, scores, next);
  if constexpr (2 * NQ <= MOST_SUMS)
    for (; t + 2 <= num_tiles; t += 2) score_tiles<STORE, NQ, 2>(a, b, first_row, chunk, t, scores, next);
  for (; t < num_tiles; t++) score_tiles<STORE, NQ, 1>(a, b, first_row, chunk, t, scores, next);
}

template <int STORE, int NQ>
TS_INLINE void weigh_rows(const Attention& a, int first_row, const Tiles& chunk, int64_t from, int64_t to, const float* scores, float* values, const Tiles* next) {
  const int64_t width = a.cache.value_width, padded = round_up(width, LANES);
  int64_t rows[CHUNK];
  for (int64_t j = from; j < to; j++) rows[j] = chunk.values[j / LANES] + j % LANES * width;
  constexpr int VECTORS = 4 * NQ <= MOST_SUMS ? 4 : 2 * NQ <= MOST_SUMS ? 2 : 1;
  int64_t c = 0;
  for (; c + VECTORS * LANES <= width; c += VECTORS * LANES) {
    vf acc[NQ][VECTORS];
    for (int i = 0; i < NQ; i++)
      for (int v = 0; v < VECTORS; v++) acc[i][v] = vf{};
    for (int64_t j = from; j < to; j++) {
      if (next && j < next->count * LANES) {
        const char* row = (const char*)a.cache.values + (next->values[j / LANES] + j % LANES * width + c) * width_bytes(STORE);
        for (int64_t byte = 0; byte < VECTORS * LANES * width_bytes(STORE); byte += 64) __builtin_prefetch(row + byte, 0, 2);
      }
      for (int v = 0; v < VECTORS; v++) {
        read_again(v);
        const vf x = load_stored<STORE>(a.cache.values, rows[j] + c + v * LANES);
TS_UNROLL(6)
        for (int i = 0; i < NQ; i++) acc[i][v] = fma(splat(scores[(first_row + i) * CHUNK + j]), x, acc[i][v]);
      }
    }
    for (int i = 0; i < NQ; i++)
      for (int v = 0; v < VECTORS; v++) store(values + (first_row + i) * padded + c + v * LANES, acc[i][v]);
  }
  for (; c < width; c += LANES) {  // what is left of a head that is no multiple of 64
    const int64_t lanes = std::min<int64_t>(LANES, width - c);
    vf acc[NQ];
    for (int i = 0; i < NQ; i++) acc[i] = vf{};
    for (int64_t j = from; j < to; j++) {
      vf x{};
      if (lanes == LANES) x = load_stored<STORE>(a.cache.values, rows[j] + c);
      else {
        alignas(64) uint8_t part[64] = {0};
        std::memcpy(part, (const uint8_t*)a.cache.values + (rows[j] + c) * width_bytes(STORE), (size_t)(lanes * width_bytes(STORE)));
        x = load_stored<STORE>(part, 0);
      }
      for (int i = 0; i < NQ; i++) acc[i] = fma(splat(scores[(first_row + i) * CHUNK + j]), x, acc[i]);
    }
    for (int i = 0; i < NQ; i++) store(values + (first_row + i) * padded + c, acc[i]);
  }
}

// scores, exponentials and weighted values of one chunk
template <int STORE>
static void chunk_partial(const Attention& a, const Block& b, int64_t chunk, Partial& p, const Tiles* next) {
  alignas(64) float scores[ROWS * CHUNK];
  clear(p);
  const int64_t start = chunk * CHUNK;
  int64_t low = INT64_MAX, high = 0;
  for (int i = 0; i < b.count; i++) {
    low = std::min(low, b.low[i]);
    high = std::max(high, b.high[i]);
  }
  const int64_t from = std::max<int64_t>(0, low - start), to = std::min<int64_t>(CHUNK, high - start);
  const Tiles tiles = tiles_of(a.cache, b.table, start, start + to, b.head);
  const int num_tiles = tiles.count;
  int row = 0;
  for (; row + 6 <= b.count; row += 6) score_rows<STORE, 6>(a, b, row, tiles, scores, row ? nullptr : next);
  for (; row + 3 <= b.count; row += 3) score_rows<STORE, 3>(a, b, row, tiles, scores, row ? nullptr : next);
  for (; row < b.count; row++) score_rows<STORE, 1>(a, b, row, tiles, scores, row ? nullptr : next);

  constexpr int32_t PLACES[LANES] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  const vi lane = load(PLACES);
  for (int i = 0; i < b.count; i++) {
    float* s = scores + i * CHUNK;
    const int32_t first = (int32_t)std::clamp<int64_t>(b.low[i] - start, 0, CHUNK), end = (int32_t)std::clamp<int64_t>(b.high[i] - start, 0, CHUNK);
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
  row = 0;
  for (; row + 6 <= b.count; row += 6) weigh_rows<STORE, 6>(a, row, tiles, from, to, scores, p.values, row ? nullptr : next);
  for (; row + 3 <= b.count; row += 3) weigh_rows<STORE, 3>(a, row, tiles, from, to, scores, p.values, row ? nullptr : next);
  for (; row < b.count; row++) weigh_rows<STORE, 1>(a, row, tiles, from, to, scores, p.values, row ? nullptr : next);
}

TS_INLINE float exp_one(float x) { return first_lane(exp(splat(x))); }

static void merge(const Attention& a, int count, Partial& into, const Partial& part) {
  const int64_t padded = round_up(a.cache.value_width, LANES);
  alignas(64) float keep[LANES], add[LANES];
  {  // all rows at once
    const vf before = load(into.largest), now = load(part.largest), m = max(before, now);
    const vf kept = select(before == m, splat(1.f), exp(before - m)), added = select(now == m, splat(1.f), exp(now - m));
    const vf none = splat(-INFINITY);
    store(keep, select(before == none, vf{}, kept));
    store(add, select(now == none, vf{}, added));
    store(into.largest, m);
    store(into.total, fma(load(part.total), load(add), load(into.total) * load(keep)));
  }
  for (int i = 0; i < count; i++) {
    if (add[i] == 0.f) continue;
    float* x = into.values + i * padded;
    const float* y = part.values + i * padded;
    if (keep[i] == 0.f)
      for (int64_t c = 0; c < padded; c += LANES) store(x + c, load(y + c) * add[i]);
    else
      for (int64_t c = 0; c < padded; c += LANES) store(x + c, fma(load(y + c), splat(add[i]), load(x + c) * keep[i]));
  }
}

static void finish(const Attention& a, const Block& b, const Partial& p) {
  const int64_t width = a.cache.value_width, padded = round_up(width, LANES);
  for (int i = 0; i < b.count; i++) {
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
  int64_t low = INT64_MAX, high = 0;
  for (int64_t i = 0; i < count; i++) {
    const int64_t query = (row0 + i) / group, n = head * group + (row0 + i) % group;
    const int64_t position = step.lengths[s] - queries + query;
    b.q[i] = a.q + (start + query) * a.q_stride + n * a.cache.key_width;
    b.out[i] = a.out + (start + query) * a.out_stride + n * a.cache.value_width;
    b.sink[i] = a.sinks ? a.sinks + n : nullptr;
    b.high[i] = position + 1;
    b.low[i] = a.window == 0 ? 0 : a.chunked ? position / a.window * a.window : std::max<int64_t>(0, position - a.window + 1);
    low = std::min(low, b.low[i]);
    high = std::max(high, b.high[i]);
  }
  b.first = low / CHUNK;
  b.last = (high + CHUNK - 1) / CHUNK;
  return b;
}

// The tiles of `chunk` of a block with few rows; nothing for one with many, which finds in the cache what its rows share.
static const Tiles* ask_for(const Attention& a, const Block& b, int64_t chunk, Tiles* tiles) {
  if (b.count > FEW_ROWS) return nullptr;
  int64_t high = 0;
  for (int i = 0; i < b.count; i++) high = std::max(high, b.high[i]);
  *tiles = tiles_of(a.cache, b.table, chunk * CHUNK, std::min(high, (chunk + 1) * CHUNK), b.head);
  return tiles;
}

// `after`: the block that this thread computes next, or null
template <int STORE>
static void whole_block(const Attention& a, const Block& b, float* scratch, const Block* after) {
  const int64_t padded = round_up(a.cache.value_width, LANES);
  Partial all, part;
  all.values = scratch;
  part.values = scratch + ROWS * padded;
  clear(all);
  for (int64_t chunk = b.first; chunk < b.last; chunk++) {
    Tiles tiles;
    const Tiles* next = chunk + 1 < b.last ? ask_for(a, b, chunk + 1, &tiles) : after ? ask_for(a, *after, after->first, &tiles) : nullptr;
    chunk_partial<STORE>(a, b, chunk, part, next);
    merge(a, b.count, all, part);
  }
  finish(a, b, all);
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
        chunk_partial<STORE>(a, blocks[i], blocks[i].first + w * wave + chunk, p, next);
        save(kept + i * wave + chunk, p);
      }
    worker.barrier();
    for (int64_t i = worker.index; i < num_blocks; i += worker.count) {
      const Block& b = blocks[i];
      Partial all = w ? fetch(i) : at(i);
      if (w == 0) clear(all);
      for (int64_t c = 0; c < wave && b.first + w * wave + c < b.last; c++) merge(a, b.count, all, fetch(kept + i * wave + c));
      if (w + 1 == waves) finish(a, b, all);
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
  int64_t total = 0;
  for (int64_t s = 0; s < step.num_sequences; s++) total += blocks_of(a, step, s) * a.cache.heads;
  float* scratch = a.partials + 2 * worker.index * partial_floats(a.cache.value_width);
  const int64_t size = std::max<int64_t>(1, std::min<int64_t>(8, total / (8 * worker.count)));
  int64_t first, last, s = 0, before = 0;
  auto block_of = [&](int64_t unit) {  // units mostly come in rising order, so the sequence that holds one is found by walking on
    if (unit < before) s = before = 0;
    while (unit >= before + blocks_of(a, step, s) * a.cache.heads) before += blocks_of(a, step, s++) * a.cache.heads;
    const int64_t inside = unit - before, count = blocks_of(a, step, s);
    return make_block(a, step, s, (int)(inside / count), inside % count);
  };
  while (worker.take(total, size, &first, &last)) {
    Block block = block_of(first);
    for (int64_t unit = first; unit < last; unit++) {
      const bool more = unit + 1 < total;
      Block after;
      if (more) after = block_of(unit + 1);
      whole_block<STORE>(a, block, scratch, more ? &after : nullptr);
      block = after;
    }
  }
}

void attend(Worker& worker, const Attention& a, const Step& step) {
  if (a.cache.store == STORE_F32) attend_with<STORE_F32>(worker, a, step);
  else if (a.cache.store == STORE_F16) attend_with<STORE_F16>(worker, a, step);
  else if (a.cache.store == STORE_BF16) attend_with<STORE_BF16>(worker, a, step);
  else if (a.cache.store == STORE_I8) attend_with<STORE_I8>(worker, a, step);
  else attend_with<STORE_F8>(worker, a, step);
}

}  // namespace ts
