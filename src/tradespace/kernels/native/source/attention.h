// Paged attention over keys and values as the cache holds them, for decode and prefill alike.
#pragma once
#include "pool.h"
#include "stores.h"
#include "weights.h"

namespace ts {

// A step's sequences. Its tokens lie one after the other; sequence b has those from starts[b] to starts[b + 1], at the end of its `lengths[b]` tokens.
struct Step {
  const int64_t* tokens;
  const int64_t* positions;
  const int32_t* starts;
  const int32_t* lengths;
  const int32_t* tables;
  const int64_t* rows;  // tokens whose logits are wanted
  int64_t num_tokens, num_sequences, table_width, num_rows;
};

// One layer's planes. A block of `block_size` tokens holds keys as [head][tile of 16 tokens][H][16] and values as [head][token][Hv]; scales, which int8 alone has,
// as [head][token] of fp16, so that those of a tile lie beside each other. bf16 lies in the pairs that a product of pairs reads: keys as
// [head][tile][H / 2][16][2], values as [head][token / 2][Hv][2].
struct Cache {
  void* keys;
  void* values;
  int64_t block_size;
  int32_t store, heads;
  int32_t key_width, value_width;
  uint16_t* key_scales;    // or null
  uint16_t* value_scales;
};

constexpr int CHUNK = 128;      // keys whose scores are held at once: a partial result
constexpr int ROWS = 12;        // query rows that share a pass over the keys

struct Attention {
  Cache cache;
  const float* q;     // token · q_stride, N heads of H, already scaled
  int64_t q_stride;
  bool pairs;         // a head of q holds bf16 in the first half of its place, and products are those of pairs of bf16: `pairs_of` says whether they can be
  float* out;         // token · out_stride, N heads of Hv
  int64_t out_stride;
  const float* sinks; // a logit per query head, or null
  int32_t query_heads;
  int64_t window;     // 0: none
  int32_t chunked;    // the window is the query's own chunk
  float softcap;      // 0: none
  float* partials;    // `slots` partial results of partial_floats(value width) each
  int64_t slots;
};

// whether this machine multiplies pairs of bf16 in one instruction and the cache holds such
inline bool pairs_of(const Cache& cache) {
#if defined(__AVX512BF16__)
  return cache.store == STORE_BF16;
#else
  return false;
#endif
}

int64_t partial_floats(int64_t value_width);
void attend(Worker& worker, const Attention& a, const Step& step);
void expect_attention(const Worker& worker, const Attention& a, const Step& step);  // `attend` comes next: asks for what this thread reads first
void expect_key(const Cache& cache, const Step& step, int64_t sequence, int64_t position, int head);  // write_key will come for it
void write_key(const Cache& cache, const Step& step, int64_t sequence, int64_t position, int head, const float* k);
void write_value(const Cache& cache, const Step& step, int64_t sequence, int64_t position, int head, const float* v);

}  // namespace ts
