// Packed codes back to numbers: one section of a panel for the exact products, one row for an embedding's look-up.
#pragma once
#include "weights.h"

namespace ts {

template <int KIND>
static void decode_section_of(const uint8_t* panel, int group, int64_t s, float* tile) {
  constexpr KindInfo INFO = KINDS[KIND];
  const uint8_t* at = panel + section_start(INFO, group, s);
  const uint8_t* head = panel + head_start(INFO, group, s);
  const uint8_t* codes = at + section_head_bytes(INFO.meta);
  vf scale = INFO.meta == META_ROW ? load((const float*)panel) : load_half((const uint16_t*)head), minimum{}, half_scale[2];
  vi zero = splat(INFO.offset);
  if constexpr (INFO.meta == META_MIN) minimum = load_half((const uint16_t*)(head + 32));
  if constexpr (INFO.meta == META_ZERO) zero = widen(head + 32);
  if constexpr (INFO.meta == META_K) {
    minimum = load_half((const uint16_t*)(head + 32)) * to_float(widen(at + 16));
    scale = scale * to_float(widen(at));
  }
  if constexpr (INFO.meta == META_K6)
    for (int half = 0; half < 2; half++) half_scale[half] = scale * to_float(widen((const int8_t*)at + 16 * half));
  for (int k = 0; k < 8; k++) {
    vu bytes = as<vu>(Chunk<vb, INFO.bits>::codes(codes, k, 0));
    for (int j = 0; j < 4; j++) {
      vf code = to_float(as<vi>((bytes >> (8 * j)) & 255u) - zero);
      vf value = code * (INFO.meta == META_K6 ? half_scale[k / 4] : scale);
      if constexpr (INFO.meta == META_MIN) value = value + minimum;
      if constexpr (INFO.meta == META_K) value = value - minimum;
      store(tile + (4 * k + j) * LANES, value);
    }
  }
}

// 32 columns × 16 rows of panel `index` as fp32
static inline void decode_section(const Matrix& m, int64_t index, int64_t s, float* tile) {
  const uint8_t* panel = m.panel(index);
  switch (m.kind) {
#define CASE(KIND) case KIND: return decode_section_of<KIND>(panel, m.group, s, tile);
    CASE(I8_ROW) CASE(Q8) CASE(Q4) CASE(Q4_MIN) CASE(Q5) CASE(Q5_MIN) CASE(Q4_ZERO) CASE(Q3) CASE(Q3_ZERO) CASE(Q2) CASE(Q2_ZERO) CASE(Q4_K) CASE(Q5_K) CASE(Q6_K)
#undef CASE
  }
  for (int c = 0; c < SECTION; c++) {
    int64_t column = s * SECTION + c;
    if (m.kind == F32) store(tile + c * LANES, load((const float*)panel + column * LANES));
    else if (m.kind == F16) store(tile + c * LANES, load_half((const uint16_t*)panel + column * LANES));
    else {
      const uint16_t* pairs = (const uint16_t*)panel + column / 2 * 2 * LANES + column % 2;
      for (int lane = 0; lane < LANES; lane++) tile[c * LANES + lane] = bf16_to_float(pairs[2 * lane]);
    }
  }
}

// row `row` into out, which has room for the columns rounded up to 32
static inline void decode_row(const Matrix& m, int64_t row, float* out) {
  const int64_t index = row / LANES, lane = row % LANES;
  const uint8_t* panel = m.panel(index);
  if (is_integer(m.kind)) {
    alignas(64) float tile[SECTION * LANES];
    for (int64_t s = 0; s < m.sections(); s++) {
      decode_section(m, index, s, tile);
      for (int c = 0; c < SECTION; c++) out[s * SECTION + c] = tile[c * LANES + lane];
    }
    return;
  }
  for (int64_t c = 0; c < m.sections() * SECTION; c++) {
    if (m.kind == F32) out[c] = ((const float*)panel)[c * LANES + lane];
    else if (m.kind == F16) out[c] = half_to_float(((const uint16_t*)panel)[c * LANES + lane]);
    else out[c] = bf16_to_float(((const uint16_t*)panel)[c / 2 * 2 * LANES + 2 * lane + c % 2]);
  }
}

}  // namespace ts
