// Rows as they are stored → their lanes in a packed matrix. Every row owns its bytes (and bits) of a panel, so rows may arrive in any order and in any chunks.
#include <algorithm>

#include "decode.h"

namespace ts {

// four codes of a chunk as the word that holds them
TS_INLINE uint32_t word_of(const uint8_t* code) {
  uint32_t word;
  std::memcpy(&word, code, 4);
  return word;
}

// Codes of one row's section. A row's bytes are whole words of each plane of bytes; of planes of bits it has four bits, half a byte.
template <int BITS>
static void put_codes(uint8_t* section, int lane, const uint8_t* code) {
  auto put = [&](int64_t chunk, uint32_t word) { std::memcpy(section + 64 * chunk + 4 * lane, &word, 4); };
  if constexpr (BITS == 8)
    for (int k = 0; k < 8; k++) put(k, word_of(code + 4 * k));
  if constexpr (BITS == 4 || BITS == 5 || BITS == 6)
    for (int k = 0; k < 8; k += 2) put(k / 2, (word_of(code + 4 * k) & 0x0f0f0f0fu) | (word_of(code + 4 * k + 4) & 0x0f0f0f0fu) << 4);
  if constexpr (BITS == 6 || BITS == 2 || BITS == 3)
    for (int k = 0; k < 8; k += 4) {
      uint32_t four = 0;
      for (int i = 0; i < 4; i++) four |= (word_of(code + 4 * (k + i)) >> (BITS == 6 ? 4 : 0) & 0x03030303u) << 2 * i;
      put((BITS == 6 ? 4 : 0) + k / 4, four);
    }
  if constexpr (BITS == 3 || BITS == 5)
    for (int k = 0; k < 8; k++) {
      uint8_t bits = 0;
      for (int i = 0; i < 4; i++) bits |= (uint8_t)((code[4 * k + i] >> (BITS - 1) & 1) << i);
      uint8_t& both = section[(BITS == 3 ? 128 : 256) + 8 * k + lane / 2];
      both = lane % 2 ? (uint8_t)((both & 15) | bits << 4) : (uint8_t)((both & 0xf0) | bits);
    }
}

static void put_section(int bits, uint8_t* section, int lane, const uint8_t* code) {
  switch (bits) {
    case 2: return put_codes<2>(section, lane, code);
    case 3: return put_codes<3>(section, lane, code);
    case 4: return put_codes<4>(section, lane, code);
    case 5: return put_codes<5>(section, lane, code);
    case 6: return put_codes<6>(section, lane, code);
    case 8: return put_codes<8>(section, lane, code);
  }
}

// one stored block of GGUF (32 or 256 columns) into `row`
struct Target {
  uint8_t* panel;
  const KindInfo* info;
  int lane;
  void section(int64_t s, const uint8_t* code) const { put_section(info->bits, panel + section_start(*info, 1, s) + section_head_bytes(info->meta), lane, code); }
  uint8_t* head(int64_t s) const { return panel + head_start(*info, 1, s); }
  uint8_t* section_head(int64_t s) const { return panel + section_start(*info, 1, s); }
  void half(uint8_t* at, const uint8_t* bits) const { std::memcpy(at + 2 * lane, bits, 2); }
};

static void put_q8_0(const Target& to, int64_t s, const uint8_t* b) {
  uint8_t code[SECTION];
  for (int c = 0; c < SECTION; c++) code[c] = (uint8_t)((int8_t)b[2 + c] + 128);
  to.half(to.head(s), b);
  to.section(s, code);
}

static void put_nibbles(const Target& to, int64_t s, const uint8_t* b, bool minimum, bool fifth) {
  uint8_t code[SECTION];
  const uint8_t* at = b + (minimum ? 4 : 2);
  uint32_t high = 0;
  if (fifth) {
    std::memcpy(&high, at, 4);
    at += 4;
  }
  for (int c = 0; c < 16; c++) {
    code[c] = (uint8_t)((at[c] & 15) | (high >> c & 1) << 4);
    code[c + 16] = (uint8_t)(at[c] >> 4 | (high >> (c + 16) & 1) << 4);
  }
  to.half(to.head(s), b);
  if (minimum) to.half(to.head(s) + 32, b + 2);
  to.section(s, code);
}

static void put_q45_k(const Target& to, int64_t block, const uint8_t* b, bool fifth) {
  const uint8_t *packed = b + 4, *high = b + 16, *low = b + (fifth ? 48 : 16);
  to.half(to.head(block * 8), b);
  to.half(to.head(block * 8) + 32, b + 2);
  for (int j = 0; j < 8; j++) {
    uint8_t scale = j < 4 ? packed[j] & 63 : (uint8_t)((packed[j + 4] & 15) | packed[j - 4] >> 6 << 4);
    uint8_t minimum = j < 4 ? packed[j + 4] & 63 : (uint8_t)(packed[j + 4] >> 4 | packed[j] >> 6 << 4);
    uint8_t* head = to.section_head(block * 8 + j);
    head[to.lane] = scale;
    head[16 + to.lane] = minimum;
    uint8_t code[SECTION];
    for (int c = 0; c < SECTION; c++) {
      uint8_t byte = low[j / 2 * 32 + c];
      code[c] = j % 2 ? byte >> 4 : byte & 15;
      if (fifth) code[c] |= (uint8_t)((high[c] >> j & 1) << 4);
    }
    to.section(block * 8 + j, code);
  }
}

static void put_q6_k(const Target& to, int64_t block, const uint8_t* b) {
  const uint8_t *low = b, *high = b + 128, *scales = b + 192;
  to.half(to.head(block * 8), b + 208);
  for (int j = 0; j < 8; j++) {
    const int half = j / 4, quarter = j % 4;  // 128 columns each; 32 columns each
    uint8_t* head = to.section_head(block * 8 + j);
    head[to.lane] = scales[2 * j];
    head[16 + to.lane] = scales[2 * j + 1];
    uint8_t code[SECTION];
    for (int c = 0; c < SECTION; c++) {
      uint8_t byte = low[half * 64 + (quarter % 2) * 32 + c];
      uint8_t top = high[half * 32 + c] >> (2 * quarter) & 3;
      code[c] = (uint8_t)((quarter / 2 ? byte >> 4 : byte & 15) | top << 4);
    }
    to.section(block * 8 + j, code);
  }
}

}  // namespace ts

using namespace ts;

extern "C" {

int64_t ts_panel_bytes(int32_t kind, int64_t columns, int32_t group) { return panel_bytes(kind, columns, group); }

// Rows of GGUF blocks as stored, `row_bytes` apart, into the rows that `ids` names. The kind says which block type: Q8, Q4, Q4_MIN, Q5, Q5_MIN, Q4_K, Q5_K, Q6_K.
void ts_pack_gguf(const Matrix* m, const int64_t* ids, int64_t count, const uint8_t* raw, int64_t row_bytes) {
  const KindInfo& info = KINDS[m->kind];
  const bool super = super_head_bytes(info.meta) != 0;
  const int64_t blocks = m->columns / (super ? 256 : 32), block_bytes = row_bytes / std::max<int64_t>(1, blocks);
  for (int64_t r = 0; r < count; r++) {
    Target to{(uint8_t*)m->panel(ids[r] / LANES), &info, (int)(ids[r] % LANES)};
    for (int64_t block = 0; block < blocks; block++) {
      const uint8_t* b = raw + r * row_bytes + block * block_bytes;
      switch (m->kind) {
        case Q8: put_q8_0(to, block, b); break;
        case Q4: put_nibbles(to, block, b, false, false); break;
        case Q4_MIN: put_nibbles(to, block, b, true, false); break;
        case Q5: put_nibbles(to, block, b, false, true); break;
        case Q5_MIN: put_nibbles(to, block, b, true, true); break;
        case Q4_K: put_q45_k(to, block, b, false); break;
        case Q5_K: put_q45_k(to, block, b, true); break;
        case Q6_K: put_q6_k(to, block, b); break;
      }
    }
  }
}

// Rows of whole-number codes (unsigned, the kind's offset included; `columns` bytes a row), with fp32 scales (`groups` a row), and zero points where the kind has them.
void ts_pack_codes(const Matrix* m, const int64_t* ids, int64_t count, const uint8_t* codes, const float* scales, const uint8_t* zeros, int64_t groups) {
  const KindInfo& info = KINDS[m->kind];
  const int64_t sections = m->sections();
  for (int64_t r = 0; r < count; r++) {
    const int lane = (int)(ids[r] % LANES);
    uint8_t* panel = (uint8_t*)m->panel(ids[r] / LANES);
    if (info.meta == META_ROW) ((float*)panel)[lane] = scales[r * groups];
    for (int64_t s = 0; s < sections; s++) {
      uint8_t padded[SECTION] = {0};
      const int64_t width = std::min<int64_t>(SECTION, m->columns - s * SECTION);
      std::memcpy(padded, codes + r * m->columns + s * SECTION, (size_t)width);
      put_section(info.bits, panel + section_start(info, m->group, s), lane, padded);
      if (info.meta == META_ROW || s % m->group) continue;
      uint8_t* head = panel + head_start(info, m->group, s);
      const int64_t g = r * groups + s / m->group;
      const uint16_t scale = float_to_half(scales[g]);
      std::memcpy(head + 2 * lane, &scale, 2);
      if (info.meta == META_ZERO) head[32 + lane] = zeros[g];
    }
  }
}

// Rows of numbers in the kind's own type (fp32, fp16, bf16).
void ts_pack_dense(const Matrix* m, const int64_t* ids, int64_t count, const void* values) {
  for (int64_t r = 0; r < count; r++) {
    const int64_t lane = ids[r] % LANES;
    uint8_t* panel = (uint8_t*)m->panel(ids[r] / LANES);
    for (int64_t c = 0; c < m->columns; c++) {
      const int64_t from = r * m->columns + c;
      if (m->kind == F32) ((float*)panel)[c * LANES + lane] = ((const float*)values)[from];
      else if (m->kind == F16) ((uint16_t*)panel)[c * LANES + lane] = ((const uint16_t*)values)[from];
      else ((uint16_t*)panel)[c / 2 * 2 * LANES + 2 * lane + c % 2] = ((const uint16_t*)values)[from];
    }
  }
}

// The rows that `ids` names as fp32, `columns` apart.
void ts_unpack_rows(const Matrix* m, const int64_t* ids, int64_t count, float* out) {
  float* row = new float[m->sections() * SECTION];
  for (int64_t r = 0; r < count; r++) {
    decode_row(*m, ids[r], row);
    std::memcpy(out + r * m->columns, row, (size_t)m->columns * 4);
  }
  delete[] row;
}

}  // extern "C"
