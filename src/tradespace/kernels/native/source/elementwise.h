// What happens to a row between products: norms, activations, rotation. All in fp32; a row's result depends on nothing but the row.
#pragma once
#include "activations.h"

namespace ts {

enum NormKind : int32_t { NORM_NONE = 0, NORM_RMS = 1, NORM_LAYER = 2 };
enum Activation : int32_t { ACT_SILU = 0, ACT_GELU = 1, ACT_GELU_TANH = 2, ACT_RELU = 3, ACT_RELU2 = 4, ACT_IDENTITY = 5 };

// sum of f over a row of any width: whole vectors, then the rest padded with zeros
template <class F>
TS_INLINE float sum_row(const float* x, int64_t width, F f) {
  vf total{};
  int64_t c = 0;
  for (; c + LANES <= width; c += LANES) total = total + f(load(x + c));
  if (c < width) {
    float rest[LANES] = {0};
    std::memcpy(rest, x + c, (size_t)(width - c) * 4);
    store(rest, f(load(rest)));
    for (int64_t i = width - c; i < LANES; i++) rest[i] = 0.f;
    total = total + load(rest);
  }
  return sum(total);
}

// out = norm(x) · weight (+ bias); weight and bias are padded to 16 with zeros, so is out
TS_INLINE void norm_row(const float* x, float* out, int64_t width, int kind, const float* weight, const float* bias, float eps) {
  const int64_t padded = round_up(width, LANES);
  if (kind == NORM_NONE) {
    if (out != x) std::memcpy(out, x, (size_t)padded * 4);
    return;
  }
  float mean = 0.f, scale;
  if (kind == NORM_RMS) {
    scale = 1.f / std::sqrt(sum_row(x, width, [](vf v) { return v * v; }) / (float)width + eps);
  } else {
    mean = sum_row(x, width, [](vf v) { return v; }) / (float)width;
    scale = 1.f / std::sqrt(sum_row(x, width, [mean](vf v) { vf d = v - mean; return d * d; }) / (float)width + eps);
  }
  for (int64_t c = 0; c < padded; c += LANES) {
    vf y = (load(x + c) - mean) * scale * load(weight + c);
    if (bias) y = y + load(bias + c);
    store(out + c, y);
  }
}

// error function, absolute error below 1.5e-7 (Abramowitz and Stegun, 7.1.26)
TS_INLINE vf erf(vf x) {
  vf a = absolute(x), t = 1.f / (1.f + 0.3275911f * a);
  vf p = splat(1.061405429f);
  p = fma(p, t, splat(-1.453152027f));
  p = fma(p, t, splat(1.421413741f));
  p = fma(p, t, splat(-0.284496736f));
  p = fma(p, t, splat(0.254829592f));
  vf y = 1.f - p * t * exp(-(a * a));
  return select(x < 0.f, -y, y);
}

TS_INLINE vf activate(vf x, int kind) {
  switch (kind) {
    case ACT_SILU: return over(x, 1.f + exp(-x));
    case ACT_GELU: return 0.5f * x * (1.f + erf(x * 0.70710678118654752f));
    // x · (1 + tanh u) / 2 = x / (1 + e^-2u): nothing cancels where tanh u is near -1
    case ACT_GELU_TANH: return over(x, 1.f + exp(-1.59576912160573072f * (x + 0.044715f * x * x * x)));
    case ACT_RELU: return max(x, vf{});
    case ACT_RELU2: { vf y = max(x, vf{}); return y * y; }
  }
  return x;
}

// pairs (i, i + dims/2), or (2i, 2i + 1), of one head; angles: dims/2 times (cos, sin)
TS_INLINE void rotate(float* head, const float* __restrict angles, int64_t dims, bool interleaved) {
  const int64_t half = dims / 2;
  float *__restrict first = head, *__restrict second = head + half;
#if TS_REGISTER == 64
  if (!interleaved && half % LANES == 0) {  // whole registers: what is read next was then written by the register, too, and need not wait for memory
    const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30), odd = _mm512_add_epi32(even, _mm512_set1_epi32(1));
    for (int64_t i = 0; i < half; i += LANES) {
      const __m512 some = (__m512)load(angles + 2 * i), more = (__m512)load(angles + 2 * i + LANES);
      const vf c = (vf)_mm512_permutex2var_ps(some, even, more), s = (vf)_mm512_permutex2var_ps(some, odd, more), a = load(first + i), b = load(second + i);
      store(first + i, a * c - b * s);
      store(second + i, b * c + a * s);
    }
    return;
  }
#endif
  if (interleaved)
    for (int64_t i = 0; i < half; i++) {
      const float c = angles[2 * i], s = angles[2 * i + 1], a = head[2 * i], b = head[2 * i + 1];
      head[2 * i] = a * c - b * s;
      head[2 * i + 1] = b * c + a * s;
    }
  else
    for (int64_t i = 0; i < half; i++) {
      const float c = angles[2 * i], s = angles[2 * i + 1], a = first[i], b = second[i];
      first[i] = a * c - b * s;
      second[i] = b * c + a * s;
    }
}

}  // namespace ts
