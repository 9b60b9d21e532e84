// How a packed matrix lies in memory. Rows of the output are gathered in panels of 16, so that one register holds the same columns of 16 rows and a product needs
// no sums across lanes. Within a panel, columns come in sections of 32. `spec/native.py` has the same arithmetic of bytes.
//
//   dense kinds     f32: a column of 16 numbers after the other. f16: the same. bf16: columns in pairs, (row, column 2k), (row, column 2k + 1).
//   integer kinds   per panel [head], then per scale group [scales], then its sections of codes; K-quants have a super-block head every 8 sections.
//
// Codes of a section: byte planes in which chunk k holds columns 4k … 4k + 3 of the 16 rows, 64 bytes.
//   8 bits: 8 chunks. 4 bits: 4 × 64 bytes, low nibble chunk 2c, high nibble chunk 2c + 1. 2 bits: 2 × 64 bytes, four chunks in each.
//   3 = 2 + 1, 5 = 4 + 1, 6 = 4 + 2; a plane of single bits is eight 64-bit masks, one per chunk.
#pragma once
#include <cstdint>

#include "simd.h"

namespace ts {

enum Kind : int32_t {
  F32 = 0,
  F16 = 1,
  BF16 = 2,
  I8_ROW = 3,  // one fp32 scale per row
  Q8 = 4,      // code - 128, fp16 scale per group
  Q4 = 5,      // code - 8
  Q4_MIN = 6,  // code · scale + minimum, both fp16
  Q5 = 7,      // code - 16
  Q5_MIN = 8,
  Q4_ZERO = 9,  // (code - zero) · scale
  Q3 = 10,      // code - 4
  Q3_ZERO = 11,
  Q2 = 12,  // code - 2
  Q2_ZERO = 13,
  Q4_K = 14,  // d · sc · code - dmin · mn: 6-bit scales and minima per section
  Q5_K = 15,
  Q6_K = 16,  // d · sc · (code - 32): 8-bit scales per 16 columns
  NUM_KINDS = 17,
};

enum Meta { META_NONE, META_ROW, META_SCALE, META_MIN, META_ZERO, META_K, META_K6 };

struct KindInfo {
  int bits;
  Meta meta;
  int offset;  // subtracted from a code
};

constexpr KindInfo KINDS[NUM_KINDS] = {
    {32, META_NONE, 0}, {16, META_NONE, 0}, {16, META_NONE, 0}, {8, META_ROW, 128}, {8, META_SCALE, 128}, {4, META_SCALE, 8}, {4, META_MIN, 0},  {5, META_SCALE, 16}, {5, META_MIN, 0},
    {4, META_ZERO, 0},  {3, META_SCALE, 4}, {3, META_ZERO, 0},  {2, META_SCALE, 2}, {2, META_ZERO, 0},   {4, META_K, 0},     {5, META_K, 0},    {6, META_K6, 32},
};

constexpr int SECTION = 32;         // columns that share the activations' scale
constexpr int SUPER_SECTIONS = 8;   // sections of a K-quant's super-block

constexpr int section_bytes(int bits) { return LANES * SECTION * bits / 8; }

// bytes before the sections of one scale group
constexpr int group_bytes(Meta meta) {
  return meta == META_SCALE ? 32 : meta == META_MIN ? 64 : meta == META_ZERO ? 48 : 0;
}
constexpr int panel_head_bytes(Meta meta) { return meta == META_ROW ? 64 : 0; }
constexpr int super_head_bytes(Meta meta) { return meta == META_K ? 64 : meta == META_K6 ? 32 : 0; }
// bytes before each section
constexpr int section_head_bytes(Meta meta) { return meta == META_K || meta == META_K6 ? 32 : 0; }

inline bool is_integer(int kind) { return kind >= I8_ROW; }

// A packed matrix. `group` counts sections that share a scale; 0 where the kind has no groups.
struct Matrix {
  const uint8_t* data;
  int64_t rows, columns;
  int32_t kind, group;
  int64_t panel_bytes;

  int64_t panels() const { return (rows + LANES - 1) / LANES; }
  int64_t sections() const { return (columns + SECTION - 1) / SECTION; }
  const uint8_t* panel(int64_t index) const { return data + index * panel_bytes; }
};

inline int64_t panel_bytes(int kind, int64_t columns, int group) {
  int64_t sections = (columns + SECTION - 1) / SECTION;
  const KindInfo& info = KINDS[kind];
  if (!is_integer(kind)) return sections * SECTION * LANES * info.bits / 8;
  int64_t bytes = panel_head_bytes(info.meta) + sections * (section_bytes(info.bits) + section_head_bytes(info.meta));
  if (group_bytes(info.meta)) bytes += (sections + group - 1) / group * group_bytes(info.meta);
  if (super_head_bytes(info.meta)) bytes += (sections + SUPER_SECTIONS - 1) / SUPER_SECTIONS * super_head_bytes(info.meta);
  return bytes;
}

// where section `s` of an integer panel begins (its own head included), and the head of its group or super-block
TS_INLINE int64_t section_start(const KindInfo& info, int group, int64_t s) {
  int64_t at = panel_head_bytes(info.meta) + s * (section_bytes(info.bits) + section_head_bytes(info.meta));
  if (group_bytes(info.meta)) at += (s / group + 1) * group_bytes(info.meta);
  if (super_head_bytes(info.meta)) at += (s / SUPER_SECTIONS + 1) * super_head_bytes(info.meta);
  return at;
}
TS_INLINE int64_t head_start(const KindInfo& info, int group, int64_t s) {
  if (group_bytes(info.meta)) {
    int64_t first = s / group * group;
    return section_start(info, group, first) - group_bytes(info.meta);
  }
  if (super_head_bytes(info.meta)) {
    int64_t first = s / SUPER_SECTIONS * SUPER_SECTIONS;
    return section_start(info, group, first) - super_head_bytes(info.meta);
  }
  return 0;
}

// the 64 codes of chunk `k` (0 … 7) of a section as unsigned bytes; `codes` may point to the place of a register within its first chunk
template <int BITS>
TS_INLINE rb register_codes(const uint8_t* codes, const uint8_t* bits, int k) {
  if constexpr (BITS == 8) return To_<rb>::load(codes + 64 * k);
  if constexpr (BITS == 2) return (To_<rb>::load(codes + 64 * (k / 4)) >> (2 * (k % 4))) & 3;
  if constexpr (BITS == 4 || BITS == 5 || BITS == 6) {
    rb both = To_<rb>::load(codes + 64 * (k / 2));
#if defined(__AVX512BW__)
    rb nibble = (rb)_mm512_and_si512(k % 2 ? _mm512_srli_epi16((__m512i)both, 4) : (__m512i)both, _mm512_set1_epi8(15));
#else
    rb nibble = k % 2 ? both >> 4 : both & 15;
#endif
    if constexpr (BITS == 4) return nibble;
    if constexpr (BITS == 5) return nibble | spread_bits(bits + 8 * k, 16);
    rb high = To_<rb>::load(codes + 256 + 64 * (k / 4));
    // two bits of each byte to places 4 and 5: words are shifted so that they land there, and the rest is masked
    const int by = 4 - 2 * (k % 4);
#if TS_REGISTER == 64
    __m512i moved = by >= 0 ? _mm512_slli_epi16((__m512i)high, by) : _mm512_srli_epi16((__m512i)high, -by);
    return (rb)_mm512_or_si512((__m512i)nibble, _mm512_and_si512(moved, _mm512_set1_epi8(0x30)));
#else
    typedef uint16_t words __attribute__((vector_size(TS_REGISTER)));
    return nibble | ((rb)(by >= 0 ? (words)high << by : (words)high >> -by) & 0x30);
#endif
  }
  if constexpr (BITS == 3) return ((To_<rb>::load(codes + 64 * (k / 4)) >> (2 * (k % 4))) & 3) | spread_bits(bits + 8 * k, 4);
  __builtin_unreachable();
}

// The same for as many registers as V has, the first of which is the `place`-th of a chunk.
template <class V, int BITS>
struct Chunk {
  TS_INLINE V codes(const uint8_t* section, int k, int place) {
    return register_codes<BITS>(section + place * TS_REGISTER, section + (BITS == 3 ? 128 : 256) + place * TS_REGISTER / 8, k);
  }
};
template <class H, int BITS>
struct Chunk<Pair<H>, BITS> {
  TS_INLINE Pair<H> codes(const uint8_t* section, int k, int place) {
    return {Chunk<H, BITS>::codes(section, k, place), Chunk<H, BITS>::codes(section, k, place + (int)sizeof(H) / TS_REGISTER)};
  }
};

}  // namespace ts
