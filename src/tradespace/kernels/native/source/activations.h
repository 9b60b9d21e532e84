// The other side of a product: rows of activations in the form that the kernel multiplies by.
#pragma once
#include <algorithm>

#include "weights.h"

namespace ts {

enum Form : int32_t { FORM_F32 = 0, FORM_BF16 = 1, FORM_INT8 = 2 };

// Of a section's codes: the sum of each half, and what the offsets 8 and 128 of a weight's codes come to: as many times the whole sum, to be added.
constexpr int SUMS = 4;

constexpr int64_t ROW_BLOCK = 8;  // rows whose scales and sums of a section lie side by side: as many as a product reads at once, from one address

// T rows of C columns (padded to 32 with zeros), each in one form. int8: a scale per section of 32, and what zero points and minima need: sums of the codes.
struct Operand {
  float* f32;       // T · stride
  uint16_t* bf16;   // T · stride
  int8_t* codes;    // T · stride
  float* scales;    // [T / ROW_BLOCK][sections][ROW_BLOCK], as are all below
  float* weighted;  // scale · sum of the section's codes
  int32_t* sums;    // SUMS for each
  int64_t stride, sections;

  // where scale and sums of a row's section are
  int64_t place(int64_t row, int64_t section) const { return (row / ROW_BLOCK * sections + section) * ROW_BLOCK + row % ROW_BLOCK; }
};

// the same rows from `row` on, a multiple of ROW_BLOCK
TS_INLINE Operand from_row(Operand x, int64_t row) {
  if (x.f32) x.f32 += row * x.stride;
  if (x.bf16) x.bf16 += row * x.stride;
  if (x.codes) {
    x.codes += row * x.stride;
    x.scales += row * x.sections;
    x.weighted += row * x.sections;
    x.sums += SUMS * row * x.sections;
  }
  return x;
}

// One section of 32 numbers in two registers → codes, scale, sums.
TS_INLINE void quantize_section(vf a, vf b, int8_t* codes, float* scale, float* weighted, int32_t* sums) {
  float largest = maximum(max(absolute(a), absolute(b)));
  float inverse = largest > 0 ? 127.f / largest : 0.f;
  vi qa = round_to_int(a * inverse), qb = round_to_int(b * inverse);
  write_int8(codes, qa);
  write_int8(codes + LANES, qb);
  *scale = largest / 127.f;
  sums[0] = sum(qa);
  sums[1] = sum(qb);
  const int32_t total = sums[0] + sums[1];
  sums[2] = -8 * total;
  sums[3] = -128 * total;
  *weighted = *scale * (float)total;
}

#if defined(__AVX512VNNI__)
// The same for four sections, 128 numbers, whose scales and sums lie ROW_BLOCK apart: what needs sums or the largest across a register is found for all at once.
TS_INLINE void quantize_four(const float* x, int8_t* codes, float* scale, float* weighted, int32_t* sums) {
  __m512 v[8], m[4];
  for (int i = 0; i < 8; i++) v[i] = _mm512_loadu_ps(x + i * LANES);
  for (int i = 0; i < 4; i++) m[i] = _mm512_max_ps(_mm512_abs_ps(v[2 * i]), _mm512_abs_ps(v[2 * i + 1]));
  auto larger_of = [](__m512 a, __m512 b) { return _mm512_max_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b)); };
  const __m512d first = _mm512_castps_pd(larger_of(m[0], m[1])), second = _mm512_castps_pd(larger_of(m[2], m[3]));
  const __m512 by_lanes = _mm512_max_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(first, second)), _mm512_castpd_ps(_mm512_unpackhi_pd(first, second)));
  const __m256 halves = _mm256_max_ps(_mm512_castps512_ps256(by_lanes), _mm512_extractf32x8_ps(by_lanes, 1));
  const __m128 largest = _mm_max_ps(_mm256_castps256_ps128(halves), _mm256_extractf128_ps(halves, 1));
  const __m128 inverse = _mm_maskz_div_ps(_mm_cmp_ps_mask(largest, _mm_setzero_ps(), _CMP_GT_OQ), _mm_set1_ps(127.f), largest);
  const __m128 scales = _mm_div_ps(largest, _mm_set1_ps(127.f));
  __m512i found[2];
  const __m512i in_order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  for (int pair = 0; pair < 2; pair++) {
    __m512i words[2];
    for (int half = 0; half < 2; half++) {
      const int i = 2 * pair + half;
      const __m512 by = _mm512_permutexvar_ps(_mm512_set1_epi32(i), _mm512_castps128_ps512(inverse));
      words[half] = _mm512_packs_epi32(_mm512_cvtps_epi32(_mm512_mul_ps(v[2 * i], by)), _mm512_cvtps_epi32(_mm512_mul_ps(v[2 * i + 1], by)));
    }
    const __m512i bytes = _mm512_packs_epi16(words[0], words[1]);  // by fours of codes: of each half of both sections, four times
    _mm512_storeu_si512(codes + pair * 2 * SECTION, _mm512_permutexvar_epi32(in_order, bytes));
    found[pair] = _mm512_dpbusd_epi32(_mm512_setzero_si512(), _mm512_set1_epi8(1), bytes);
  }
  __m512i s = _mm512_add_epi32(_mm512_shuffle_i32x4(found[0], found[1], 0x44), _mm512_shuffle_i32x4(found[0], found[1], 0xee));
  s = _mm512_add_epi32(s, _mm512_shuffle_i32x4(s, s, 0xb1));  // both halves' sums of sections 0 and 1, twice, and of 2 and 3
  s = _mm512_permutexvar_epi32(_mm512_setr_epi32(0, 1, 0, 1, 6, 7, 6, 7, 8, 9, 8, 9, 14, 15, 14, 15), s);
  const __m512i total = _mm512_add_epi32(s, _mm512_shuffle_epi32(s, _MM_PERM_CDAB));
  const __m512i times = _mm512_sllv_epi32(total, _mm512_setr_epi32(0, 0, 3, 7, 0, 0, 3, 7, 0, 0, 3, 7, 0, 0, 3, 7));
  s = _mm512_mask_sub_epi32(s, 0xcccc, _mm512_setzero_si512(), times);
  const __m128i totals = _mm512_castsi512_si128(_mm512_permutexvar_epi32(_mm512_setr_epi32(0, 4, 8, 12, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0), total));
  const __m128 products = _mm_mul_ps(scales, _mm_cvtepi32_ps(totals));
  auto put = [&](int64_t at, __m128i four, int one, int other) {
    _mm_store_si128((__m128i*)(sums + SUMS * at), four);
    std::memcpy(scale + at, &one, sizeof one);
    std::memcpy(weighted + at, &other, sizeof other);
  };
  put(0, _mm512_castsi512_si128(s), _mm_extract_ps(scales, 0), _mm_extract_ps(products, 0));
  put(ROW_BLOCK, _mm512_extracti32x4_epi32(s, 1), _mm_extract_ps(scales, 1), _mm_extract_ps(products, 1));
  put(2 * ROW_BLOCK, _mm512_extracti32x4_epi32(s, 2), _mm_extract_ps(scales, 2), _mm_extract_ps(products, 2));
  put(3 * ROW_BLOCK, _mm512_extracti32x4_epi32(s, 3), _mm_extract_ps(scales, 3), _mm_extract_ps(products, 3));
}
#endif

// Row `t` of `operand` from `columns` numbers at x, which must be readable up to a multiple of 32 and zero there.
TS_INLINE void put_row(const Operand& operand, int64_t t, const float* x, int64_t columns, int form, int64_t first_section = 0) {
  int64_t sections = (columns + SECTION - 1) / SECTION, s = 0;
#if defined(__AVX512VNNI__)
  for (; form == FORM_INT8 && s + 4 <= sections; s += 4) {
    const int64_t g = first_section + s, at = operand.place(t, g);
    quantize_four(x + s * SECTION, operand.codes + t * operand.stride + g * SECTION, operand.scales + at, operand.weighted + at, operand.sums + SUMS * at);
  }
#endif
  for (; s < sections; s++) {
    int64_t g = first_section + s;
    vf a = load(x + s * SECTION), b = load(x + s * SECTION + LANES);
    if (form == FORM_INT8) {
      const int64_t at = operand.place(t, g);
      quantize_section(a, b, operand.codes + t * operand.stride + g * SECTION, operand.scales + at, operand.weighted + at, operand.sums + SUMS * at);
    } else if (form == FORM_BF16) {
      write_bf16(operand.bf16 + t * operand.stride + g * SECTION, a);
      write_bf16(operand.bf16 + t * operand.stride + g * SECTION + LANES, b);
    } else {
      store(operand.f32 + t * operand.stride + g * SECTION, a);
      store(operand.f32 + t * operand.stride + g * SECTION + LANES, b);
    }
  }
}

}  // namespace ts
