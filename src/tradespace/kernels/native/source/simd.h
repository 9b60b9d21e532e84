// Vectors of 16 lanes: one AVX-512 register, or halves of halves down to what a register of the machine holds (AVX2: two, SSE2 and NEON: four). Intrinsics where
// one instruction matters, else the compiler's own vector types. What is computed, and in which order, is the same for every instruction set, but for `over`
// and products of bf16.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace ts {

constexpr int LANES = 16;  // rows of a panel, positions of a key tile

#if defined(__AVX512F__)
#define TS_REGISTER 64
#elif defined(__AVX2__)
#define TS_REGISTER 32
#else
#define TS_REGISTER 16
#endif

#if defined(__AVX2__)
#define TS_INLINE static inline __attribute__((always_inline))
#define TS_APART static __attribute__((noinline))
#define TS_PRAGMA(text) _Pragma(#text)
#define TS_UNROLL(n) TS_PRAGMA(GCC unroll n)
#else
#define TS_INLINE static inline
#define TS_APART static
#define TS_UNROLL(n)
#endif

// what one register holds
constexpr int REGISTER_LANES = TS_REGISTER / 4;
typedef float rf __attribute__((vector_size(TS_REGISTER)));
typedef int32_t ri __attribute__((vector_size(TS_REGISTER)));
typedef uint32_t ru __attribute__((vector_size(TS_REGISTER)));
typedef uint8_t rb __attribute__((vector_size(TS_REGISTER)));
typedef uint16_t rh __attribute__((vector_size(TS_REGISTER / 2)));  // as many lanes of 16 bits
typedef int16_t rs __attribute__((vector_size(TS_REGISTER / 2)));
typedef int8_t rc __attribute__((vector_size(TS_REGISTER / 4)));

// Two halves. A vector wider than a register would do, but compilers keep those in memory.
template <class H>
struct Pair {
  H a, b;
};

#if TS_REGISTER == 64
typedef rf vf;
typedef ri vi;
typedef ru vu;
typedef rb vb;
constexpr int MOST_TOKENS = 8, MOST_SUMS = 24;  // tokens that share a pass over codes; sums that stay in registers
#elif TS_REGISTER == 32
typedef Pair<rf> vf;
typedef Pair<ri> vi;
typedef Pair<ru> vu;
typedef Pair<rb> vb;
constexpr int MOST_TOKENS = 8, MOST_SUMS = 6;
#else
typedef Pair<Pair<rf>> vf;
typedef Pair<Pair<ri>> vi;
typedef Pair<Pair<ru>> vu;
typedef Pair<Pair<rb>> vb;
constexpr int MOST_TOKENS = 2, MOST_SUMS = 3;
#endif

// ---------------------------------------------------------------- halves: each operation is that of both

template <class V>
struct Lane {
  typedef std::decay_t<decltype(V{}[0])> type;
};
template <class H>
struct Lane<Pair<H>> : Lane<H> {};

#define TS_BOTH(op)                                                                                    \
  template <class H>                                                                                   \
  TS_INLINE Pair<H> operator op(Pair<H> x, Pair<H> y) {                                                \
    return {x.a op y.a, x.b op y.b};                                                                   \
  }                                                                                                    \
  template <class H, class S, std::enable_if_t<std::is_arithmetic<S>::value, int> = 0>                 \
  TS_INLINE Pair<H> operator op(Pair<H> x, S y) {                                                      \
    const auto lane = (typename Lane<H>::type)y;                                                       \
    return {x.a op lane, x.b op lane};                                                                 \
  }                                                                                                    \
  template <class H, class S, std::enable_if_t<std::is_arithmetic<S>::value, int> = 0>                 \
  TS_INLINE Pair<H> operator op(S x, Pair<H> y) {                                                      \
    const auto lane = (typename Lane<H>::type)x;                                                       \
    return {lane op y.a, lane op y.b};                                                                 \
  }
TS_BOTH(+) TS_BOTH(-) TS_BOTH(*) TS_BOTH(/) TS_BOTH(&) TS_BOTH(|) TS_BOTH(>>) TS_BOTH(<<)
#undef TS_BOTH

#define TS_COMPARE(op)                                                                                 \
  template <class H>                                                                                   \
  TS_INLINE auto operator op(Pair<H> x, Pair<H> y)->Pair<decltype(x.a op y.a)> {                       \
    return {x.a op y.a, x.b op y.b};                                                                   \
  }                                                                                                    \
  template <class H, class S, std::enable_if_t<std::is_arithmetic<S>::value, int> = 0>                 \
  TS_INLINE auto operator op(Pair<H> x, S y)->Pair<decltype(x.a op x.a)> {                             \
    const auto lane = (typename Lane<H>::type)y;                                                       \
    return {x.a op lane, x.b op lane};                                                                 \
  }
TS_COMPARE(<) TS_COMPARE(>=) TS_COMPARE(==)
#undef TS_COMPARE

template <class H>
TS_INLINE Pair<H> operator-(Pair<H> x) {
  return {-x.a, -x.b};
}

// the lanes of `x` where the mask is set, else those of `y`
template <class M, class V>
TS_INLINE V select(M mask, V x, V y) {
  return mask ? x : y;
}
template <class M, class H>
TS_INLINE Pair<H> select(Pair<M> mask, Pair<H> x, Pair<H> y) {
  return {select(mask.a, x.a, y.a), select(mask.b, x.b, y.b)};
}

template <class To>
struct To_ {
  template <class V>
  TS_INLINE To bits(V v) { return (To)v; }
  template <class V>
  TS_INLINE To lanes(V v) { return __builtin_convertvector(v, To); }
  TS_INLINE To load(const uint8_t* p) { To v; std::memcpy(&v, p, sizeof v); return v; }
  TS_INLINE void store(uint8_t* p, To v) { std::memcpy(p, &v, sizeof v); }
};
template <class H>
struct To_<Pair<H>> {
  template <class V>
  TS_INLINE Pair<H> bits(Pair<V> v) { return {To_<H>::bits(v.a), To_<H>::bits(v.b)}; }
  template <class V>
  TS_INLINE Pair<H> lanes(Pair<V> v) { return {To_<H>::lanes(v.a), To_<H>::lanes(v.b)}; }
  TS_INLINE Pair<H> load(const uint8_t* p) { return {To_<H>::load(p), To_<H>::load(p + sizeof(H))}; }
  TS_INLINE void store(uint8_t* p, Pair<H> v) { To_<H>::store(p, v.a), To_<H>::store(p + sizeof(H), v.b); }
};

// the same bits as another type
template <class To, class V>
TS_INLINE To as(V v) {
  return To_<To>::bits(v);
}
TS_INLINE vf to_float(vi v) { return To_<vf>::lanes(v); }
TS_INLINE vi to_int(vf v) { return To_<vi>::lanes(v); }  // towards zero

TS_INLINE vf load(const float* p) { return To_<vf>::load((const uint8_t*)p); }
TS_INLINE void store(float* p, vf v) { To_<vf>::store((uint8_t*)p, v); }
TS_INLINE void store(int32_t* p, vi v) { To_<vi>::store((uint8_t*)p, v); }
TS_INLINE vi load(const int32_t* p) { return To_<vi>::load((const uint8_t*)p); }
TS_INLINE vb load_bytes(const void* p) { return To_<vb>::load((const uint8_t*)p); }

TS_INLINE float first_lane(rf v) { return v[0]; }
template <class H>
TS_INLINE float first_lane(Pair<H> v) {
  return first_lane(v.a);
}

// a list, not a sum with zero: floats keep the addition
#if TS_REGISTER == 64
#define TS_LIST(x) {x, x, x, x, x, x, x, x, x, x, x, x, x, x, x, x}
#elif TS_REGISTER == 32
#define TS_LIST(x) {x, x, x, x, x, x, x, x}
#else
#define TS_LIST(x) {x, x, x, x}
#endif
template <class V>
struct Splat {
  template <class S>
  TS_INLINE V of(S x) { return V TS_LIST(x); }
};
template <class H>
struct Splat<Pair<H>> {
  template <class S>
  TS_INLINE Pair<H> of(S x) { return {Splat<H>::of(x), Splat<H>::of(x)}; }
};
TS_INLINE vf splat(float x) { return Splat<vf>::of(x); }
TS_INLINE vi splat(int32_t x) { return Splat<vi>::of(x); }

// ---------------------------------------------------------------- sums, extremes

TS_INLINE rf fma(rf a, rf b, rf c) {
#if TS_REGISTER == 64
  return (rf)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#else
  return a * b + c;  // one rounding where the machine has it: -ffp-contract=fast
#endif
}

TS_INLINE rf max(rf a, rf b) {
#if TS_REGISTER == 64
  return (rf)_mm512_max_ps((__m512)a, (__m512)b);
#elif TS_REGISTER == 32
  return (rf)_mm256_max_ps((__m256)a, (__m256)b);
#else
  return a > b ? a : b;
#endif
}

TS_INLINE rf min(rf a, rf b) {
#if TS_REGISTER == 64
  return (rf)_mm512_min_ps((__m512)a, (__m512)b);
#elif TS_REGISTER == 32
  return (rf)_mm256_min_ps((__m256)a, (__m256)b);
#else
  return a < b ? a : b;
#endif
}

template <class H>
TS_INLINE Pair<H> fma(Pair<H> x, Pair<H> y, Pair<H> z) {
  return {fma(x.a, y.a, z.a), fma(x.b, y.b, z.b)};
}
template <class H>
TS_INLINE Pair<H> max(Pair<H> x, Pair<H> y) {
  return {max(x.a, y.a), max(x.b, y.b)};
}
template <class H>
TS_INLINE Pair<H> min(Pair<H> x, Pair<H> y) {
  return {min(x.a, y.a), min(x.b, y.b)};
}

// pairwise in a fixed tree, so that every instruction set gives the same bits
TS_INLINE float sum(rf v) {
#if TS_REGISTER == 64
  return _mm512_reduce_add_ps((__m512)v);
#else
  float a[REGISTER_LANES];
  std::memcpy(a, &v, sizeof v);
  for (int half = REGISTER_LANES / 2; half; half /= 2)
    for (int i = 0; i < half; i++) a[i] += a[i + half];
  return a[0];
#endif
}
template <class H>
TS_INLINE float sum(Pair<H> v) {
  return sum(v.a + v.b);
}

TS_INLINE int32_t sum(ri v) {
#if TS_REGISTER == 64
  return _mm512_reduce_add_epi32((__m512i)v);
#else
  int32_t a[REGISTER_LANES], total = 0;
  std::memcpy(a, &v, sizeof v);
  for (int i = 0; i < REGISTER_LANES; i++) total += a[i];
  return total;
#endif
}
TS_INLINE int32_t sum(Pair<ri> v) { return sum(v.a + v.b); }
TS_INLINE int32_t sum(Pair<Pair<ri>> v) { return sum(v.a + v.b); }

TS_INLINE float maximum(rf v) {
#if TS_REGISTER == 64
  return _mm512_reduce_max_ps((__m512)v);
#elif TS_REGISTER == 32
  __m128 four = _mm_max_ps(_mm256_castps256_ps128((__m256)v), _mm256_extractf128_ps((__m256)v, 1));
  four = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(four, _mm_movehdup_ps(four)));
#else
  float a[REGISTER_LANES];
  std::memcpy(a, &v, sizeof v);
  for (int half = REGISTER_LANES / 2; half; half /= 2)
    for (int i = 0; i < half; i++) a[i] = a[i] > a[i + half] ? a[i] : a[i + half];
  return a[0];
#endif
}
template <class H>
TS_INLINE float maximum(Pair<H> v) {
  return maximum(max(v.a, v.b));
}

// to whole numbers, halves to even
TS_INLINE ri round_to_int(rf v) {
#if TS_REGISTER == 64
  return (ri)_mm512_cvtps_epi32((__m512)v);
#elif TS_REGISTER == 32
  return (ri)_mm256_cvtps_epi32((__m256)v);
#else
  const rf magic = rf TS_LIST(12582912.f);  // 1.5 · 2^23: adding it rounds to a whole number
  return __builtin_convertvector((v + magic) - magic, ri);
#endif
}
template <class H>
TS_INLINE auto round_to_int(Pair<H> v) -> Pair<decltype(round_to_int(v.a))> {
  return {round_to_int(v.a), round_to_int(v.b)};
}

TS_INLINE vf absolute(vf v) { return as<vf>(as<vu>(v) & 0x7fffffffu); }

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

// Reading lanes of other widths: for each type of vector how many it takes from `p` on.
template <class V>
struct Read;
template <>
struct Read<rf> {
  TS_INLINE rf half(const uint16_t* p) {
#if TS_REGISTER == 64
    return (rf)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
#elif defined(__F16C__) && TS_REGISTER == 32
    return (rf)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
#else
    rf v;
    for (int i = 0; i < REGISTER_LANES; i++) v[i] = half_to_float(p[i]);
    return v;
#endif
  }
  TS_INLINE rf bf16(const uint16_t* p) {
    rh bits;
    std::memcpy(&bits, p, sizeof bits);
    return (rf)(__builtin_convertvector(bits, ru) << 16);
  }
  // An e4m3 code's bits, moved to where fp16 has them, are 2^-8 of its value, subnormal ones included: the exponents' biases are 7 and 15.
  TS_INLINE rf e4m3(const int8_t* p) {
    rc codes;
    std::memcpy(&codes, p, sizeof codes);
    const rs halves = (__builtin_convertvector(codes, rs) << 7) & (int16_t)0xbfff;  // the sign is kept by the widening
    uint16_t bits[REGISTER_LANES];
    std::memcpy(bits, &halves, sizeof bits);
    return half(bits);
  }
};
template <>
struct Read<ri> {
  TS_INLINE ri bytes(const uint8_t* p) {
#if TS_REGISTER == 64
    return (ri)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p));
#elif TS_REGISTER == 32
    return (ri)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p));
#else
    ri v;
    for (int i = 0; i < REGISTER_LANES; i++) v[i] = p[i];
    return v;
#endif
  }
  TS_INLINE ri bytes(const int8_t* p) {
#if TS_REGISTER == 64
    return (ri)_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p));
#elif TS_REGISTER == 32
    return (ri)_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p));
#else
    ri v;
    for (int i = 0; i < REGISTER_LANES; i++) v[i] = p[i];
    return v;
#endif
  }
};
template <class H>
struct Read<Pair<H>> {
  static constexpr int HALF = sizeof(H) / 4;
  TS_INLINE Pair<H> half(const uint16_t* p) { return {Read<H>::half(p), Read<H>::half(p + HALF)}; }
  TS_INLINE Pair<H> bf16(const uint16_t* p) { return {Read<H>::bf16(p), Read<H>::bf16(p + HALF)}; }
  TS_INLINE Pair<H> e4m3(const int8_t* p) { return {Read<H>::e4m3(p), Read<H>::e4m3(p + HALF)}; }
  template <class B>
  TS_INLINE Pair<H> bytes(const B* p) { return {Read<H>::bytes(p), Read<H>::bytes(p + HALF)}; }
};

TS_INLINE vf load_half(const uint16_t* p) { return Read<vf>::half(p); }
TS_INLINE vf load_bf16(const uint16_t* p) { return Read<vf>::bf16(p); }
TS_INLINE vf load_e4m3(const int8_t* p) { return Read<vf>::e4m3(p); }
TS_INLINE vi widen(const uint8_t* p) { return Read<vi>::bytes(p); }  // 16 unsigned bytes
TS_INLINE vi widen(const int8_t* p) { return Read<vi>::bytes(p); }   // 16 signed bytes

// Writing them; whole numbers must fit, and what is no number stays none.
TS_INLINE void write_half(uint16_t* p, rf v) {
#if TS_REGISTER == 64
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph((__m512)min(rf TS_LIST(65504.f), max(rf TS_LIST(-65504.f), v)), 0));
#elif defined(__F16C__) && TS_REGISTER == 32
  _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph((__m256)min(rf TS_LIST(65504.f), max(rf TS_LIST(-65504.f), v)), 0));
#else
  for (int i = 0; i < REGISTER_LANES; i++) p[i] = float_to_half(v[i]);
#endif
}
TS_INLINE ru bf16_bits(rf v) {
  const ru bits = (ru)v, rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16, quiet = (bits >> 16) | 0x40u;
  return v == v ? rounded : quiet;
}
TS_INLINE void write_bf16(uint16_t* p, rf v) {
  const rh narrow = __builtin_convertvector(bf16_bits(v), rh);
  std::memcpy(p, &narrow, sizeof narrow);
}
TS_INLINE void write_int8(int8_t* p, ri v) {
#if TS_REGISTER == 64
  _mm_storeu_si128((__m128i*)p, _mm512_cvtepi32_epi8((__m512i)v));
#elif TS_REGISTER == 32
  const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128((__m256i)v), _mm256_extracti128_si256((__m256i)v, 1));
  _mm_storel_epi64((__m128i*)p, _mm_packs_epi16(words, words));
#else
  for (int i = 0; i < REGISTER_LANES; i++) p[i] = (int8_t)v[i];
#endif
}
#define TS_WRITE(name, pointer)                                                                        \
  template <class H>                                                                                   \
  TS_INLINE void name(pointer p, Pair<H> v) {                                                          \
    name(p, v.a);                                                                                      \
    name(p + sizeof(H) / 4, v.b);                                                                      \
  }
TS_WRITE(write_half, uint16_t*) TS_WRITE(write_bf16, uint16_t*) TS_WRITE(write_int8, int8_t*)
#undef TS_WRITE

// `value` in the bytes whose bits are set, 0 in the others
TS_INLINE rb spread_bits(const uint8_t* bits, uint8_t value) {
#if TS_REGISTER == 64
  uint64_t mask;
  std::memcpy(&mask, bits, sizeof mask);
  return (rb)_mm512_maskz_mov_epi8(mask, _mm512_set1_epi8((char)value));
#elif TS_REGISTER == 32
  const __m256i bit = _mm256_set1_epi64x((long long)0x8040201008040201), byte = _mm256_set_epi64x(0x0303030303030303, 0x0202020202020202, 0x0101010101010101, 0);
  int32_t mask;
  std::memcpy(&mask, bits, sizeof mask);
  const __m256i mine = _mm256_and_si256(_mm256_shuffle_epi8(_mm256_set1_epi32(mask), byte), bit);
  return (rb)_mm256_and_si256(_mm256_cmpeq_epi8(mine, bit), _mm256_set1_epi8((char)value));
#else
  uint8_t bytes[TS_REGISTER];
  for (int i = 0; i < TS_REGISTER; i++) bytes[i] = (uint8_t)((bits[i / 8] >> (i % 8) & 1) * value);
  return To_<rb>::load(bytes);
#endif
}

// ---------------------------------------------------------------- products of small whole numbers

// acc[lane] += Σ_{j<4} w[4·lane + j] · x[j]; w unsigned bytes, x four signed bytes in one word
#if TS_REGISTER == 64
TS_INLINE ri dot4(ri acc, rb w, int32_t x) { return (ri)_mm512_dpbusd_epi32((__m512i)acc, (__m512i)w, _mm512_set1_epi32(x)); }
#elif defined(__AVXVNNI__)
TS_INLINE ri dot4(ri acc, rb w, int32_t x) { return (ri)_mm256_dpbusd_avx_epi32((__m256i)acc, (__m256i)w, _mm256_set1_epi32(x)); }
#elif TS_REGISTER == 16
TS_INLINE vi dot4(vi acc, vb w, int32_t x) {
  // plain arrays: compilers turn these loops into their machine's vectors, and take long over extracted lanes
  int8_t b[4];
  uint8_t a[64];
  int32_t out[LANES];
  std::memcpy(b, &x, 4);
  To_<vb>::store(a, w);
  store(out, acc);
  for (int lane = 0; lane < LANES; lane++)
    for (int j = 0; j < 4; j++) out[lane] += a[4 * lane + j] * b[j];
  return load(out);
}
#endif

#if TS_REGISTER == 32 && !defined(__AVXVNNI__)
// Without an instruction for dot4: products are summed by pairs in 16 bits as long as they fit, and in 32 bits after that.
#define TS_SHORT_SUMS 1
typedef int16_t rw __attribute__((vector_size(TS_REGISTER)));  // two sums a lane

TS_INLINE rw dot2(rw acc, rb w, int32_t x) {
  acc = acc + (rw)_mm256_maddubs_epi16((__m256i)w, _mm256_set1_epi32(x));
  asm("" : "+x"(acc));  // a sum at once: gcc would make all products first, keep them in memory, and add them up as a tree
  return acc;
}
TS_INLINE ri add_pairs(ri acc, rw sums) { return acc + (ri)_mm256_madd_epi16((__m256i)sums, _mm256_set1_epi16(1)); }
// the same with codes less 128, of which magnitude and sign fit: 128 · 127 · 2
TS_INLINE ri dot4_signed(ri acc, rb codes, rb magnitude, int32_t x) {
  const __m256i by = _mm256_sign_epi8(_mm256_set1_epi32(x), (__m256i)codes);
  acc = add_pairs(acc, (rw)_mm256_maddubs_epi16((__m256i)magnitude, by));
  asm("" : "+x"(acc));
  return acc;
}
TS_INLINE rb magnitude_of(rb codes) { return (rb)_mm256_abs_epi8((__m256i)codes); }
#else
#define TS_SHORT_SUMS 0
#endif

// a pair of bf16 in one word
TS_INLINE uint32_t two_of(const uint16_t* p) {
  uint32_t two;
  std::memcpy(&two, p, 4);
  return two;
}

// acc[lane] += a[2·lane]·b[0] + a[2·lane + 1]·b[1] over pairs of bf16; b in one word
TS_INLINE rf dot2_bf16(rf acc, rb pairs, uint32_t x) {
#if defined(__AVX512BF16__)
  return (rf)_mm512_dpbf16_ps((__m512)acc, (__m512bh)(__m512i)pairs, (__m512bh)_mm512_set1_epi32((int)x));
#else
  ru both = (ru)pairs;
  rf even = (rf)(both << 16), odd = (rf)(both & 0xffff0000u);
  uint32_t low = x << 16, high = x & 0xffff0000u;
  float x0, x1;
  std::memcpy(&x0, &low, 4);
  std::memcpy(&x1, &high, 4);
  return fma(odd, rf TS_LIST(x1), fma(even, rf TS_LIST(x0), acc));
#endif
}
template <class F, class B>
TS_INLINE Pair<F> dot2_bf16(Pair<F> acc, Pair<B> pairs, uint32_t x) {
  return {dot2_bf16(acc.a, pairs.a, x), dot2_bf16(acc.b, pairs.b, x)};
}

// ---------------------------------------------------------------- exponentials

// e^x, relative error below 2e-7; below -87 it is taken as e^-87, about 1e-38
TS_INLINE vf exp(vf x) {
  x = max(x, splat(-87.f));
  x = min(x, splat(88.f));
  vf t = x * 1.44269504088896341f;
#if TS_REGISTER == 64
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
#if TS_REGISTER == 64
  return (vf)_mm512_scalef_ps((__m512)p, (__m512)n);
#else
  vi power = (to_int(n) + 127) << 23;
  return p * as<vf>(power);
#endif
}

#if defined(__AVX512BF16__)
// 2^x for what is rounded to bf16 next: relative error below 8e-5, a twenty-fifth of that rounding. Of -inf it is 0: so scaling by 2^-inf is defined, whatever the
// polynomial made of the difference of two infinities.
TS_INLINE vf exp2_short(vf x) {
  const vf n = (vf)_mm512_roundscale_ps((__m512)x, 8), f = x - n;
  vf p = fma(f, splat(5.5171669058e-2f), splat(2.4261112219e-1f));
  p = fma(p, f, splat(6.9326098546e-1f));
  p = fma(p, f, splat(9.9992807354e-1f));
  return (vf)_mm512_scalef_ps((__m512)p, (__m512)n);
}

// two vectors as bf16, as a product of pairs reads them: what is too small for a normal number is nothing
TS_INLINE vb to_bf16(vf first, vf second) { return (vb)(__m512i)_mm512_cvtne2ps_pbh((__m512)second, (__m512)first); }
#endif

// x / d for d from 1 on, to the last bit or two: a division takes as long as ten products
TS_INLINE vf over(vf x, vf d) {
#if TS_REGISTER == 64
  const vf r = (vf)_mm512_rcp14_ps((__m512)d);
  return x * (r * fma(-d, r, splat(2.f)));
#else
  return x / d;
#endif
}

TS_INLINE vf tanh(vf x) {  // 1 - 2 / (e^2x + 1)
  vf e = exp(x * 2.f);
  return 1.f - 2.f / (e + 1.f);
}

TS_INLINE int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

}  // namespace ts
