// y (T, R) = or += scale · (x (T, C) @ W.T + bias): W packed, x an Operand. Work is handed out by panels; a row's result does not depend on T.
#pragma once
#include "activations.h"
#include "pool.h"

namespace ts {

struct Product {
  Matrix weight;
  Operand x;
  int64_t tokens;
  int32_t form;
  float* y;
  int64_t y_stride;   // at least the rows rounded up to 16: stores are whole
  const float* bias;  // padded to 16, or null
  bool accumulate;    // add to what is in y
  float scale;
};

constexpr int64_t MANY_TOKENS = 32;  // for each thread: from here on it takes tokens of its own through all operations, and reads all weights for them

void multiply(Worker& worker, const Product& product);                            // all tokens; threads share the panels
void multiply_tokens(const Product& product, int64_t first_token, int64_t last_token);  // by this thread alone
void multiply_panels(const Product& product, int64_t first_panel, int64_t last_panel);
void multiply_integers(const Product& product, int64_t first_panel, int64_t last_panel);
void multiply_floats(const Product& product, int64_t first_panel, int64_t last_panel);

// One token's weights come from memory, which gives more of them when a thread reads in several places at once: of its run of panels [begin, end) the first of
// each half, the second of each half, and so on. A unit is one such pair, of which a run has `stream_panels`.
constexpr int STREAMS = 2;
TS_INLINE int64_t stream_panels(int64_t begin, int64_t end) { return (end - begin + STREAMS - 1) / STREAMS; }
TS_INLINE bool by_streams(const Product& p) { return p.tokens == 1 && is_integer(p.weight.kind) && p.form == FORM_INT8; }
void expect_weights(const Worker& worker, const Product& product);  // `multiply` comes next: asks for what this thread reads first
void multiply_streams(const Product& product, int64_t begin, int64_t end, int64_t first_unit, int64_t last_unit);

// writes results of one token from `column` on
template <class V>
TS_INLINE void put_result(const Product& p, int64_t token, int64_t column, V value) {
  uint8_t* y = (uint8_t*)(p.y + token * p.y_stride + column);
  if (p.bias) value = value + To_<V>::load((const uint8_t*)(p.bias + column));
  if (p.accumulate) value = fma(value, Splat<V>::of(p.scale), To_<V>::load(y));
  To_<V>::store(y, value);
}

// A hint for a line of weights on its way from memory. A step of one token reads each line once. On Zen 3, which has AVX2, it is best asked for past the larger
// caches, which then keep what the engine and the next layers need; on Zen 4, which has AVX-512, that is slower than not to ask, and a line is asked for into the
// second-level cache, a little ahead, as is what is wanted only a whole tile later.
constexpr int ONE_TOKEN_AHEAD = TS_REGISTER == 64 ? 512 : 1024;  // bytes
template <int TOKENS, bool FAR = false>
TS_INLINE void ask_for_weights(const void* line) {
  __builtin_prefetch(line, 0, FAR || (TOKENS == 1 && TS_REGISTER == 64) ? 2 : TOKENS == 1 ? 0 : 3);
}

}  // namespace ts
