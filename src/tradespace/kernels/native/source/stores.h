// How keys and values lie in the cache, store by store: bytes an element, reading sixteen of them, writing a vector. `tradespace/kv/store/` is the
// specification; a vector that it codes has the same codes here.
#pragma once
#include <algorithm>

#include "simd.h"

namespace ts {

// Mirrored in program.py. int8: codes -127 … 127 and an fp16 scale per token and head. fp8: e4m3 without a scale.
enum Store : int32_t { STORE_F32 = 0, STORE_F16 = 1, STORE_BF16 = 2, STORE_I8 = 3, STORE_F8 = 4 };
constexpr int STORE_PAIRS = 5;  // a bf16 cache whose queries and weights are rounded to bf16, too: what a kernel is compiled for, not what a cache is

constexpr int64_t width_bytes(int store) { return store == STORE_F32 ? 4 : store == STORE_I8 || store == STORE_F8 ? 1 : 2; }
// whether what load_stored gives is to be multiplied by token_scales still
constexpr bool is_scaled(int store) { return store == STORE_I8 || store == STORE_F8; }

template <int STORE>
TS_INLINE vf load_stored(const void* base, int64_t element) {
  if constexpr (STORE == STORE_F32) return load((const float*)base + element);
  else if constexpr (STORE == STORE_F16) return load_half((const uint16_t*)base + element);
  else if constexpr (STORE == STORE_BF16) return load_bf16((const uint16_t*)base + element);
  else if constexpr (STORE == STORE_I8) return to_float(widen((const int8_t*)base + element));
  else return load_e4m3((const int8_t*)base + element);
}

// what the elements of the 16 tokens from `slot` on are multiplied by
template <int STORE>
TS_INLINE vf token_scales(const uint16_t* scales, int64_t slot) {
  if constexpr (STORE == STORE_I8) return load_half(scales + slot);
  else return splat(256.f);
}

// round to nearest even, saturating; e4m3 has no infinity
TS_INLINE uint8_t float_to_e4m3(float f) {
  f = f > 448.f ? 448.f : f < -448.f ? -448.f : f;
  uint32_t bits;
  std::memcpy(&bits, &f, 4);
  const uint32_t sign = bits >> 24 & 0x80, a = bits & 0x7fffffff;
  if (a > 0x7f800000) return (uint8_t)(sign | 0x7f);
  if (a < 0x3c800000) {  // below 2^-6, the least normal number: let the adder round to whole 2^-9
    float magnitude;
    std::memcpy(&magnitude, &a, 4);
    magnitude += 16384.f;
    uint32_t rounded;
    std::memcpy(&rounded, &magnitude, 4);
    return (uint8_t)(sign | (rounded - 0x46800000));
  }
  return (uint8_t)(sign | (a - 0x3c000000 + 0x7ffff + (a >> 20 & 1)) >> 20);
}

// Codes of x, `put(index, code)` for each, and its scale as fp16 holds it: the codes belong to that, not to the scale as it was computed.
template <typename Put>
static inline uint16_t encode_int8(const float* x, int64_t width, Put put) {
  constexpr float TINY = 6e-8f;  // int8.py
  auto part = [&](int64_t c) {
    if (c + LANES <= width) return load(x + c);
    alignas(64) float rest[LANES] = {0};
    std::memcpy(rest, x + c, (size_t)(width - c) * 4);
    return load(rest);
  };
  vf largest{};
  for (int64_t c = 0; c < width; c += LANES) {
    const vf v = part(c);
    largest = max(largest, max(v, -v));
  }
  const uint16_t scale = float_to_half(maximum(largest) / 127.f);
  const vf by = splat(std::max(half_to_float(scale), TINY));
  for (int64_t c = 0; c < width; c += LANES) {
    int8_t codes[LANES];
    write_int8(codes, round_to_int(max(splat(-127.f), min(splat(127.f), part(c) / by))));
    for (int64_t lane = 0; lane < std::min<int64_t>(LANES, width - c); lane++) put(c + lane, codes[lane]);
  }
  return scale;
}

// 16 bits each by `write`, sixteen at a time
template <typename Write>
static inline void store_words(uint16_t* to, int64_t stride, const float* x, int64_t width, Write write) {
  for (int64_t c = 0; c < width; c += LANES) {
    const int64_t count = std::min<int64_t>(LANES, width - c);
    alignas(64) float part[LANES] = {0};
    uint16_t words[LANES];
    if (count == LANES) write(words, load(x + c));
    else {
      std::memcpy(part, x + c, (size_t)count * 4);
      write(words, load(part));
    }
    if (stride == 1) std::memcpy(to + c, words, (size_t)count * 2);
    else
      for (int64_t i = 0; i < count; i++) to[(c + i) * stride] = words[i];
  }
}

// bf16 by pairs: elements 2 i and 2 i + 1 beside each other at i · stride
static inline void store_pairs(uint16_t* to, int64_t stride, const float* x, int64_t width) {
  uint16_t words[LANES];
  for (int64_t c = 0; c < width; c += LANES) {
    const int64_t count = std::min<int64_t>(LANES, width - c);
    store_words(words, 1, x + c, count, [](uint16_t* out, vf v) { write_bf16(out, v); });
    for (int64_t i = 0; i < count; i += 2) std::memcpy(to + (c + i) / 2 * stride, words + i, 4);
  }
}

// x · scale as bf16, in place: each sixteen are read before they are written over. As the products take numbers below the normal ones, they become nothing.
static inline void round_query(float* x, int64_t width, float scale) {
  uint16_t* words = (uint16_t*)x;
#if defined(__AVX512BF16__)
  int64_t c = 0;
  for (; c + LANES <= width; c += LANES) _mm256_storeu_si256((__m256i*)(words + c), (__m256i)_mm512_cvtneps_pbh((__m512)(load(x + c) * scale)));
  if (const uint32_t rest = (1u << (width - c)) - 1)
    _mm256_mask_storeu_epi16(words + c, rest, (__m256i)_mm512_cvtneps_pbh(_mm512_mul_ps(_mm512_maskz_loadu_ps(rest, x + c), _mm512_set1_ps(scale))));
#else
  for (int64_t c = 0; c < width; c++) x[c] *= scale;
  store_words(words, 1, x, width, [](uint16_t* out, vf v) { write_bf16(out, v); });
#endif
}

// x as bf16 into one half, the first or the second, of each of `width` pairs
static inline void store_half_pairs(uint16_t* pairs, int64_t second, const float* x, int64_t width) {
#if TS_REGISTER == 64
  const uint32_t halves = second ? 0xaaaaaaaau : 0x55555555u;
  auto put = [&](int64_t c, vf v, uint32_t mask) {
    const vu bits = bf16_bits(v);
    _mm512_mask_storeu_epi16(pairs + 2 * c, halves & mask, (__m512i)(second ? bits << 16 : bits));
  };
  int64_t c = 0;
  for (; c + LANES <= width; c += LANES) put(c, load(x + c), ~0u);
  if (const uint32_t rest = (1u << (width - c)) - 1) put(c, (vf)_mm512_maskz_loadu_ps(rest, x + c), (1u << 2 * (width - c)) - 1);
#else
  store_words(pairs + second, 2, x, width, [](uint16_t* out, vf v) { write_bf16(out, v); });
#endif
}

// x into elements base, base + stride, …; its scale, where the store has one, into `scale`
static inline void store_vector(int kind, void* plane, int64_t base, int64_t stride, uint16_t* scale, const float* x, int64_t width) {
  switch (kind) {
    case STORE_F32:
      for (int64_t d = 0; d < width; d++) ((float*)plane)[base + d * stride] = x[d];
      return;
    case STORE_F16:
      return store_words((uint16_t*)plane + base, stride, x, width, [](uint16_t* words, vf v) { write_half(words, v); });
    case STORE_BF16:
      return store_words((uint16_t*)plane + base, stride, x, width, [](uint16_t* words, vf v) { write_bf16(words, v); });
    case STORE_F8:
      for (int64_t d = 0; d < width; d++) ((uint8_t*)plane)[base + d * stride] = float_to_e4m3(x[d]);
      return;
    case STORE_I8:
      int8_t* codes = (int8_t*)plane + base;
      *scale = encode_int8(x, width, [&](int64_t d, int8_t code) { codes[d * stride] = code; });
  }
}

}  // namespace ts
