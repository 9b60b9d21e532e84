// The other side of a product: rows of activations in the form that the kernel multiplies by.
#pragma once
#include <algorithm>

#include "weights.h"

namespace ts {

enum Form : int32_t { FORM_F32 = 0, FORM_BF16 = 1, FORM_INT8 = 2 };

// Of a section's codes: the sum of each half, and what the offsets 8 and 128 of a weight's codes come to: as many times the whole sum, to be added.
constexpr int SUMS = 4;

// T rows of C columns (padded to 32 with zeros), each in one form. int8: a scale per section of 32, and what zero points and minima need: sums of the codes.
struct Operand {
  float* f32;       // T · stride
  uint16_t* bf16;   // T · stride
  int8_t* codes;    // T · stride
  float* scales;    // T · sections
  float* weighted;  // scale · sum of the section's codes
  int32_t* sums;    // SUMS for each section: T · SUMS · sections
  int64_t stride, sections;
};

// the same rows from `row` on
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

// Row `t` of `operand` from `columns` numbers at x, which must be readable up to a multiple of 32 and zero there.
TS_INLINE void put_row(const Operand& operand, int64_t t, const float* x, int64_t columns, int form, int64_t first_section = 0) {
  int64_t sections = (columns + SECTION - 1) / SECTION;
  for (int64_t s = 0; s < sections; s++) {
    int64_t g = first_section + s;
    vf a = load(x + s * SECTION), b = load(x + s * SECTION + LANES);
    if (form == FORM_INT8) {
      int64_t at = t * operand.sections + g;
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
