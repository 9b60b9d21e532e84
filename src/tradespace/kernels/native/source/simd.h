// Vectors of 16 lanes: AVX-512 by intrinsics where one instruction matters, else the compiler's own vector types, which it lowers to AVX2, NEON or scalars.
// What is computed, and in which order, is the same for every instruction set.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace ts {

typedef float vf __attribute__((vector_size(64)));
typedef int32_t vi __attribute__((vector_size(64)));
typedef uint32_t vu __attribute__((vector_size(64)));
typedef uint8_t vb __attribute__((vector_size(64)));
typedef uint16_t vh __attribute__((vector_size(32)));
#if defined(__AVX2__)
typedef float vf8 __attribute__((vector_size(32)));
union vf_parts { vf whole; __m256 part[2]; };
#endif

constexpr int LANES = 16;  // rows of a panel, positions of a key tile

#if defined(__AVX2__)
#define TS_INLINE static inline __attribute__((always_inline))
#define TS_APART static __attribute__((noinline))
#define TS_PRAGMA(text) _Pragma(#text)
#define TS_UNROLL(n) TS_PRAGMA(GCC unroll n)
constexpr int MOST_TOKENS = 8;  // that share a pass over the codes: what the registers hold
#else
#define TS_INLINE static inline
#define TS_APART static
#define TS_UNROLL(n)
constexpr int MOST_TOKENS = 2;
#endif

// a list, not a sum with zero: floats keep the addition
TS_INLINE vf splat(float x) { return vf{x, x, x, x, x, x, x, x, x, x, x, x, x, x, x, x}; }
TS_INLINE vi splat(int32_t x) { return vi{x, x, x, x, x, x, x, x, x, x, x, x, x, x, x, x}; }
TS_INLINE vf load(const float* p) { vf v; std::memcpy(&v, p, sizeof v); return v; }
TS_INLINE void store(float* p, vf v) { std::memcpy(p, &v, sizeof v); }
TS_INLINE vb load_bytes(const void* p) { vb v; std::memcpy(&v, p, sizeof v); return v; }

TS_INLINE vf fma(vf a, vf b, vf c) {
#if defined(__AVX512F__)
  return (vf)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#else
  return a * b + c;  // one rounding where the machine has it: -ffp-contract=fast
#endif
}

TS_INLINE vf max(vf a, vf b) {
#if defined(__AVX512F__)
  return (vf)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
  vf_parts x{a}, y{b};  // compilers compare wider vectors than the machine's lane by lane
  for (int i = 0; i < 2; i++) x.part[i] = _mm256_max_ps(x.part[i], y.part[i]);
  return x.whole;
#else
  return a > b ? a : b;
#endif
}

TS_INLINE vf min(vf a, vf b) {
#if defined(__AVX512F__)
  return (vf)_mm512_min_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
  vf_parts x{a}, y{b};  // compilers compare wider vectors than the machine's lane by lane
  for (int i = 0; i < 2; i++) x.part[i] = _mm256_min_ps(x.part[i], y.part[i]);
  return x.whole;
#else
  return a < b ? a : b;
#endif
}

TS_INLINE vf to_float(vi v) {
#if defined(__AVX512F__)
  return (vf)_mm512_cvtepi32_ps((__m512i)v);
#else
  return __builtin_convertvector(v, vf);
#endif
}

// pairwise in a fixed tree, so that every instruction set gives the same bits
TS_INLINE float sum(vf v) {
  float a[LANES];
  std::memcpy(a, &v, sizeof v);
  for (int half = LANES / 2; half; half /= 2)
    for (int i = 0; i < half; i++) a[i] += a[i + half];
  return a[0];
}

TS_INLINE float maximum(vf v) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_ps((__m512)v);
#else
  float a[LANES];
  std::memcpy(a, &v, sizeof v);
  for (int half = LANES / 2; half; half /= 2)
    for (int i = 0; i < half; i++) a[i] = a[i] > a[i + half] ? a[i] : a[i + half];
  return a[0];
#endif
}

// ---------------------------------------------------------------- 16-bit floats

TS_INLINE float half_to_float(uint16_t h) {
#if defined(__F16C__)
  return _cvtsh_ss(h);
#else
  uint32_t sign = (uint32_t)(h & 0x8000) << 16, magnitude = h & 0x7fff, bits;
  if (magnitude >= 0x7c00) bits = 0x7f800000 | (magnitude & 0x3ff) << 13;
  else if (magnitude >= 0x400) bits = (magnitude << 13) + 0x38000000;
  else { float f = (float)magnitude * 5.9604644775390625e-8f; std::memcpy(&bits, &f, 4); }
  bits |= sign;
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
#endif
}

// round to nearest even; what fp16 cannot hold becomes its largest number, so that a cache never holds an infinity
TS_INLINE uint16_t float_to_half(float f) {
  f = f > 65504.f ? 65504.f : f < -65504.f ? -65504.f : f;
#if defined(__F16C__)
  return (uint16_t)_cvtss_sh(f, 0);
#else
  uint32_t bits;
  std::memcpy(&bits, &f, 4);
  uint32_t sign = bits >> 16 & 0x8000, a = bits & 0x7fffffff;
  if (a > 0x7f800000) return (uint16_t)(sign | 0x7e00);
  if (a < 0x38800000) {  // a subnormal half: let the adder round
    float magnitude;
    std::memcpy(&magnitude, &a, 4);
    magnitude += 0.5f;
    uint32_t rounded;
    std::memcpy(&rounded, &magnitude, 4);
    return (uint16_t)(sign | (rounded - 0x3f000000));
  }
  return (uint16_t)(sign | (a - 0x38000000 + 0xfff + (a >> 13 & 1)) >> 13);
#endif
}

TS_INLINE float bf16_to_float(uint16_t b) {
  uint32_t bits = (uint32_t)b << 16;
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}

TS_INLINE uint16_t float_to_bf16(float f) {
  uint32_t bits;
  std::memcpy(&bits, &f, 4);
  if ((bits & 0x7fffffff) > 0x7f800000) return (uint16_t)(bits >> 16 | 0x40);
  return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

TS_INLINE vf load_half(const uint16_t* p) {
#if defined(__AVX512F__)
  return (vf)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
#elif defined(__F16C__) && defined(__AVX2__)
  union { vf whole; __m256 part[2]; } u;
  u.part[0] = _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
  u.part[1] = _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(p + 8)));
  return u.whole;
#else
  vf v;
  for (int i = 0; i < LANES; i++) v[i] = half_to_float(p[i]);
  return v;
#endif
}

TS_INLINE vf load_bf16(const uint16_t* p) {
  vh h;
  std::memcpy(&h, p, sizeof h);
  return (vf)(__builtin_convertvector(h, vu) << 16);
}

TS_INLINE void store_half(uint16_t* p, vf v) {
#if defined(__AVX512F__)
  __m512 clamped = _mm512_min_ps(_mm512_max_ps((__m512)v, _mm512_set1_ps(-65504.f)), _mm512_set1_ps(65504.f));
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph(clamped, 0));
#else
  for (int i = 0; i < LANES; i++) p[i] = float_to_half(v[i]);
#endif
}

TS_INLINE void store_bf16(uint16_t* p, vf v) {
  for (int i = 0; i < LANES; i++) p[i] = float_to_bf16(v[i]);
}

// ---------------------------------------------------------------- products of small whole numbers

// acc[lane] += Σ_{j<4} w[4·lane + j] · x[j]; w unsigned bytes, x four signed bytes in one word
TS_INLINE vi dot4(vi acc, vb w, int32_t x) {
#if defined(__AVX512VNNI__)
  return (vi)_mm512_dpbusd_epi32((__m512i)acc, (__m512i)w, _mm512_set1_epi32(x));
#elif defined(__AVX2__)
  union { vb whole; __m256i part[2]; } uw;
  union { vi whole; __m256i part[2]; } ua;
  uw.whole = w;
  ua.whole = acc;
  const __m256i bx = _mm256_set1_epi32(x);
  for (int i = 0; i < 2; i++) {
#if defined(__AVXVNNI__)
    ua.part[i] = _mm256_dpbusd_avx_epi32(ua.part[i], uw.part[i], bx);
#else
    // vpmaddubsw saturates at 16 bits: 127·127·2 and 128·127·2 both fit, so the byte's top bit goes by itself
    const __m256i ones = _mm256_set1_epi16(1), low = _mm256_and_si256(uw.part[i], _mm256_set1_epi8(0x7f));
    const __m256i top = _mm256_andnot_si256(_mm256_set1_epi8(0x7f), uw.part[i]);
    ua.part[i] = _mm256_add_epi32(ua.part[i], _mm256_madd_epi16(_mm256_maddubs_epi16(low, bx), ones));
    ua.part[i] = _mm256_add_epi32(ua.part[i], _mm256_madd_epi16(_mm256_maddubs_epi16(top, bx), ones));
#endif
  }
  return ua.whole;
#else
  // plain arrays: compilers turn these loops into their machine's vectors, and take long over extracted lanes
  int8_t b[4];
  uint8_t a[64];
  int32_t out[LANES];
  std::memcpy(b, &x, 4);
  std::memcpy(a, &w, 64);
  std::memcpy(out, &acc, 64);
  for (int lane = 0; lane < LANES; lane++)
    for (int j = 0; j < 4; j++) out[lane] += a[4 * lane + j] * b[j];
  std::memcpy(&acc, out, 64);
  return acc;
#endif
}

// acc[lane] += a[2·lane]·b[0] + a[2·lane + 1]·b[1] over pairs of bf16; b in one word
TS_INLINE vf dot2_bf16(vf acc, vb pairs, uint32_t x) {
#if defined(__AVX512BF16__)
  return (vf)_mm512_dpbf16_ps((__m512)acc, (__m512bh)(__m512i)pairs, (__m512bh)_mm512_set1_epi32((int)x));
#else
  vu both = (vu)pairs;
  vf even = (vf)(both << 16), odd = (vf)(both & 0xffff0000u);
  uint32_t low = x << 16, high = x & 0xffff0000u;
  float x0, x1;
  std::memcpy(&x0, &low, 4);
  std::memcpy(&x1, &high, 4);
  return fma(odd, splat(x1), fma(even, splat(x0), acc));
#endif
}

TS_INLINE vi widen(const uint8_t* p) {  // 16 unsigned bytes
#if defined(__AVX512F__)
  return (vi)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p));
#else
  vi v;
  for (int i = 0; i < LANES; i++) v[i] = p[i];
  return v;
#endif
}

TS_INLINE vi widen(const int8_t* p) {  // 16 signed bytes
#if defined(__AVX512F__)
  return (vi)_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p));
#elif defined(__AVX2__)
  union { vi whole; __m256i part[2]; } u;
  u.part[0] = _mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p));
  u.part[1] = _mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)(p + 8)));
  return u.whole;
#else
  vi v;
  for (int i = 0; i < LANES; i++) v[i] = p[i];
  return v;
#endif
}

// ---------------------------------------------------------------- exponentials

// e^x, relative error below 2e-7; below -87 it is taken as e^-87, about 1e-38
TS_INLINE vf exp(vf x) {
  x = max(x, splat(-87.f));
  x = min(x, splat(88.f));
  vf t = x * 1.44269504088896341f;
#if defined(__AVX512F__)
  vf n = (vf)_mm512_roundscale_ps((__m512)t, 8);
#else
  vf magic = splat(12582912.f);  // 1.5 · 2^23: adding it rounds to a whole number
  vf n = (t + magic) - magic;
#endif
  // x - n·ln 2 in two parts keeps the bits that one product would lose
  vf r = fma(n, splat(-0.693359375f), x);
  r = fma(n, splat(2.12194440e-4f), r);
  vf p = splat(1.9875691500e-4f);
  p = fma(p, r, splat(1.3981999507e-3f));
  p = fma(p, r, splat(8.3334519073e-3f));
  p = fma(p, r, splat(4.1665795894e-2f));
  p = fma(p, r, splat(1.6666665459e-1f));
  p = fma(p, r, splat(5.0000001201e-1f));
  p = fma(p, r * r, r + 1.0f);
#if defined(__AVX512F__)
  return (vf)_mm512_scalef_ps((__m512)p, (__m512)n);
#else
  vi power = (__builtin_convertvector(n, vi) + 127) << 23;
  return p * (vf)power;
#endif
}

TS_INLINE vf tanh(vf x) {  // 1 - 2 / (e^2x + 1)
  vf e = exp(x * 2.f);
  return 1.f - 2.f / (e + 1.f);
}

TS_INLINE int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

}  // namespace ts
