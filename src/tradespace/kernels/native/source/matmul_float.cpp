// Products with floating activations: dense weights, and, where exactness is asked for, integer weights decoded section by section.
#include "decode.h"
#include "matmul.h"

namespace ts {

// Adds a section's products to `total`, summed by themselves first: a sum of C terms in one go is off by about √(C/2) roundings (28 for C = 1536), in pieces of
// 32 by √(16 + C/64) (6). A tile of decoded weights is 16 rows × 32 columns of fp32, 2 KiB.
template <int PANELS, int TOKENS>
TS_INLINE void tile_f32(const float* const* tiles, const Operand& x, int64_t token, int64_t column, vf total[PANELS][TOKENS]) {
  vf acc[PANELS][TOKENS];
  for (int q = 0; q < PANELS; q++)
    for (int i = 0; i < TOKENS; i++) acc[q][i] = vf{};
TS_UNROLL(4)
  for (int c = 0; c < SECTION; c++) {
    vf w[PANELS];
    for (int q = 0; q < PANELS; q++) w[q] = load(tiles[q] + c * LANES);
TS_UNROLL(16)
    for (int i = 0; i < TOKENS; i++) {
      vf value = splat(x.f32[(token + i) * x.stride + column + c]);
      for (int q = 0; q < PANELS; q++) acc[q][i] = fma(w[q], value, acc[q][i]);
    }
  }
  for (int q = 0; q < PANELS; q++)
    for (int i = 0; i < TOKENS; i++) total[q][i] = total[q][i] + acc[q][i];
}

// exact: every panel's sections are decoded to fp32 once and serve all tokens, whose sums wait in y's place
template <int TOKENS>
static void decoded(const Product& p, int64_t index, int64_t token) {
  const int64_t sections = p.weight.sections();
  alignas(64) float tile[SECTION * LANES];
  vf acc[1][TOKENS];
  for (int i = 0; i < TOKENS; i++) acc[0][i] = vf{};
  for (int64_t s = 0; s < sections; s++) {
    decode_section(p.weight, index, s, tile);
    const float* tiles[1] = {tile};
    tile_f32<1, TOKENS>(tiles, p.x, token, s * SECTION, acc);
  }
  for (int i = 0; i < TOKENS; i++) put_result(p, token + i, index * LANES, acc[0][i]);
}

template <int PANELS, int TOKENS>
static void plain_f32(const Product& p, int64_t index, int64_t token) {
  vf acc[PANELS][TOKENS];
  for (int q = 0; q < PANELS; q++)
    for (int i = 0; i < TOKENS; i++) acc[q][i] = vf{};
  for (int64_t s = 0; s < p.weight.sections(); s++) {
    const float* tiles[PANELS];
    for (int q = 0; q < PANELS; q++) tiles[q] = (const float*)p.weight.panel(index + q) + s * SECTION * LANES;
    tile_f32<PANELS, TOKENS>(tiles, p.x, token, s * SECTION, acc);
  }
  for (int q = 0; q < PANELS; q++)
    for (int i = 0; i < TOKENS; i++) put_result(p, token + i, (index + q) * LANES, acc[q][i]);
}

// 16-bit weights, fp32 activations: widened in registers, summed section by section
template <int KIND, int PANELS, int TOKENS>
static void widened(const Product& p, int64_t index, int64_t token) {
  vf total[PANELS][TOKENS];
  for (int q = 0; q < PANELS; q++)
    for (int i = 0; i < TOKENS; i++) total[q][i] = vf{};
  const int64_t pairs = p.weight.sections() * SECTION / 2;
  for (int64_t start = 0; start < pairs; start += SECTION / 2) {
    vf acc[PANELS][TOKENS];
    for (int q = 0; q < PANELS; q++)
      for (int i = 0; i < TOKENS; i++) acc[q][i] = vf{};
    for (int64_t k = start; k < start + SECTION / 2; k++) {
      vf even[PANELS], odd[PANELS];
      for (int q = 0; q < PANELS; q++) {
        const uint16_t* w = (const uint16_t*)p.weight.panel(index + q) + k * 2 * LANES;
        if constexpr (KIND == BF16) {
          vu both = as<vu>(load_bytes(w));
          even[q] = as<vf>(both << 16);
          odd[q] = as<vf>(both & 0xffff0000u);
        } else {
          even[q] = load_half(w);
          odd[q] = load_half(w + LANES);
        }
      }
TS_UNROLL(16)
      for (int i = 0; i < TOKENS; i++) {
        const float* x = p.x.f32 + (token + i) * p.x.stride + 2 * k;
        for (int q = 0; q < PANELS; q++) acc[q][i] = fma(odd[q], splat(x[1]), fma(even[q], splat(x[0]), acc[q][i]));
      }
    }
    for (int q = 0; q < PANELS; q++)
      for (int i = 0; i < TOKENS; i++) total[q][i] = total[q][i] + acc[q][i];
  }
  for (int q = 0; q < PANELS; q++)
    for (int i = 0; i < TOKENS; i++) put_result(p, token + i, (index + q) * LANES, total[q][i]);
}

template <int PANELS, int TOKENS>
static void pairs_bf16(const Product& p, int64_t index, int64_t token) {
  vf acc[PANELS][TOKENS];
  for (int q = 0; q < PANELS; q++)
    for (int i = 0; i < TOKENS; i++) acc[q][i] = vf{};
  const int64_t pairs = p.weight.sections() * SECTION / 2;
TS_UNROLL(2)
  for (int64_t k = 0; k < pairs; k++) {
    vb w[PANELS];
    for (int q = 0; q < PANELS; q++) {
      const uint8_t* at = p.weight.panel(index + q) + k * 64;
      w[q] = load_bytes(at);
      if (token == 0) ask_for_weights<TOKENS>(at + 1024);  // from memory once, in the pass of the first tokens
    }
TS_UNROLL(16)
    for (int i = 0; i < TOKENS; i++) {
      const uint32_t two = two_of(p.x.bf16 + (token + i) * p.x.stride + 2 * k);
      for (int q = 0; q < PANELS; q++) acc[q][i] = dot2_bf16(acc[q][i], w[q], two);
    }
  }
  for (int q = 0; q < PANELS; q++)
    for (int i = 0; i < TOKENS; i++) put_result(p, token + i, (index + q) * LANES, acc[q][i]);
}

// how a kind and form is computed for a block of panels and tokens
struct DecodedBlock {
  template <int PANELS, int TOKENS>
  static void run(const Product& p, int64_t index, int64_t token) {
    for (int q = 0; q < PANELS; q++) decoded<TOKENS>(p, index + q, token);
  }
};
struct PlainBlock {
  template <int PANELS, int TOKENS>
  static void run(const Product& p, int64_t index, int64_t token) { plain_f32<PANELS, TOKENS>(p, index, token); }
};
template <int KIND>
struct WidenedBlock {
  template <int PANELS, int TOKENS>
  static void run(const Product& p, int64_t index, int64_t token) { widened<KIND, PANELS, TOKENS>(p, index, token); }
};
struct PairsBlock {
  template <int PANELS, int TOKENS>
  static void run(const Product& p, int64_t index, int64_t token) { pairs_bf16<PANELS, TOKENS>(p, index, token); }
};

// panels and tokens whose sums stay in registers, two panels to many tokens where that many fit
constexpr int MANY_PANELS = MOST_SUMS >= 24 ? 2 : 1, MANY = MOST_SUMS / MANY_PANELS;
constexpr int FOUR_PANELS = MOST_SUMS >= 16 ? 4 : 1;  // few tokens: four panels side by side hide the latency of a single chain of sums

template <class Block, int PANELS, int TOKENS>
static void tokens_over(const Product& p, int64_t start, int64_t end, int64_t token) {
  int64_t index = start;
  for (; index + PANELS <= end; index += PANELS) Block::template run<PANELS, TOKENS>(p, index, token);
  if constexpr (PANELS > 1)
    for (; index < end; index++) Block::template run<1, TOKENS>(p, index, token);
}

template <class Block>
static void sweep(const Product& p, int64_t first, int64_t last) {
  const int64_t tile = std::max<int64_t>(4, 32768 / p.weight.panel_bytes / 4 * 4);
  for (int64_t start = first; start < last; start += tile) {
    const int64_t end = std::min(start + tile, last);
    int64_t token = 0;
    for (; token + MANY <= p.tokens; token += MANY) tokens_over<Block, MANY_PANELS, MANY>(p, start, end, token);
    if constexpr (MANY > 4)
      for (; token + 4 <= p.tokens; token += 4) tokens_over<Block, FOUR_PANELS, 4>(p, start, end, token);
    for (; token < p.tokens; token++) tokens_over<Block, 4, 1>(p, start, end, token);
  }
}

void multiply_floats(const Product& p, int64_t first, int64_t last) {
  if (is_integer(p.weight.kind)) return sweep<DecodedBlock>(p, first, last);
  if (p.weight.kind == F32) return sweep<PlainBlock>(p, first, last);
  if (p.weight.kind == F16) return sweep<WidenedBlock<F16>>(p, first, last);
  if (p.form == FORM_BF16) return sweep<PairsBlock>(p, first, last);
  return sweep<WidenedBlock<BF16>>(p, first, last);
}

void multiply_panels(const Product& p, int64_t first, int64_t last) {
  if (is_integer(p.weight.kind) && p.form == FORM_INT8) multiply_integers(p, first, last);
  else multiply_floats(p, first, last);
}

// the same product for tokens [first, last) alone
static Product of_tokens(const Product& p, int64_t first, int64_t last) {
  Product part = p;
  part.tokens = last - first;
  part.y += first * p.y_stride;
  part.x = from_row(p.x, first);
  return part;
}

void multiply_tokens(const Product& p, int64_t first, int64_t last) { multiply_panels(of_tokens(p, first, last), 0, p.weight.panels()); }

constexpr int64_t EXPECTED_BYTES = 1024;

void expect_weights(const Worker& worker, const Product& p) {
  if (!by_streams(p)) return;
  const int64_t panels = p.weight.panels(), begin = panels * worker.index / worker.count, end = panels * (worker.index + 1) / worker.count;
  for (int64_t index = begin; index < end; index += std::max<int64_t>(1, stream_panels(begin, end)))
    for (int64_t byte = 0; byte < std::min(EXPECTED_BYTES, p.weight.panel_bytes); byte += 64) ask_for_weights<1>(p.weight.panel(index) + byte);
}

void multiply(Worker& worker, const Product& p) {
  const int64_t panels = p.weight.panels();
  // several pieces a thread, so that one which loses its core for a while leaves the rest to the others; whole blocks of four panels
  int64_t piece = std::max<int64_t>(4, round_up((panels + 8 * worker.count - 1) / (8 * worker.count), 4)), first, last;
  if (by_streams(p)) {
    int64_t begin, end;
    while (worker.take_of_run(panels, STREAMS, piece / STREAMS, &begin, &end, &first, &last)) multiply_streams(p, begin, end, first, last);
    return;
  }
  if (p.tokens >= 8) piece = std::max<int64_t>(piece / 2, std::max<int64_t>(1, 16384 / p.weight.panel_bytes));
  while (worker.take(panels, piece, &first, &last)) multiply_panels(p, first, last);
}

}  // namespace ts
