// Products of integer codes with activations quantized to 8 bits per section of 32: sums of whole numbers are exact, so their order is free.
#include "matmul.h"

namespace ts {

// A panel's 16 rows by pieces: with AVX2 eight at a time, whose sums for eight tokens then stay in registers.
#if TS_REGISTER == 32
typedef rf pf;
typedef ri pi;
typedef rb pb;
#else
typedef vf pf;
typedef vi pi;
typedef vb pb;
#endif
constexpr int PIECE = sizeof(pf) / 4, PIECES = LANES / PIECE;

template <int KIND>
struct GroupHead {  // what a scale group, or a super-block, says about its codes: code · scale + minimum
  pf scale[PIECES], minimum[PIECES];
};

template <int KIND>
TS_INLINE GroupHead<KIND> read_head(const uint8_t* p) {
  constexpr Meta META = KINDS[KIND].meta;
  GroupHead<KIND> head{};
  for (int piece = 0; piece < PIECES; piece++) {
    pf scale = Read<pf>::half((const uint16_t*)p + piece * PIECE), minimum{};
    if constexpr (META == META_MIN || META == META_K) minimum = Read<pf>::half((const uint16_t*)(p + 32) + piece * PIECE);
    if constexpr (META == META_ZERO) minimum = -scale * To_<pf>::lanes(Read<pi>::bytes(p + 32 + piece * PIECE));
    if constexpr (META == META_SCALE) minimum = scale * (float)-KINDS[KIND].offset;
    head.scale[piece] = scale;
    head.minimum[piece] = minimum;
  }
  return head;
}

// Which weights are asked for while section s is multiplied: those of the section that lies `ahead` bytes behind it, if bit s % 8 of `sections` is set. They come
// from memory once and arrive while earlier ones are multiplied. Most kinds ask in the pass of the first tokens. Wide codes take as long to come as eight tokens
// take to multiply: where those sweep a tile of panels several times, each pass asks for its part of the next tile.
struct Ask {
  int64_t ahead;
  uint32_t sections;
};
template <int KIND, int TOKENS>
constexpr bool ASKS_IN_EVERY_PASS = TOKENS >= 8 && KINDS[KIND].bits >= 6;

template <int KIND, int TOKENS>
TS_INLINE Ask ask_of(const Product& p, int64_t token, int64_t tile_bytes) {
  if (!ASKS_IN_EVERY_PASS<KIND, TOKENS>) return {TOKENS == 1 ? ONE_TOKEN_AHEAD : 3072, token ? 0u : 0xffu};
  Ask ask{tile_bytes, 0};
  for (int64_t s = 0; s < 8; s++) ask.sections |= (uint32_t)(s * (p.tokens / 8) / 8 == token / 8) << s;
  return ask;
}

// Sums by section are kept in parts: by 16 columns where those have scales of their own, else by turns where few tokens leave the multiplier waiting for itself.
template <int KIND, int TOKENS>
constexpr int PARTS = KINDS[KIND].meta == META_K6 || (!TS_SHORT_SUMS && TOKENS <= 4) ? 2 : 1;

// Where `sums` of a section have what the kind's offset comes to, so that the sum of products begins with it; 0: nowhere, and it is subtracted after scaling. Codes
// of 8 bits are signed without it where products take signed ones.
constexpr int offset_sum(const KindInfo& info) {
  return info.meta != META_SCALE && info.meta != META_ROW ? 0 : info.offset == 8 ? 2 : info.offset == 128 ? 3 : 0;
}
constexpr bool begins_with_sum(const KindInfo& info) { return offset_sum(info) > 0 && !(TS_SHORT_SUMS && info.bits == 8); }

// TOKENS rows of the operand from a multiple of TOKENS on: few addresses, which all move by as much from one section to the next.
template <int TOKENS>
struct Rows {
  const int8_t* codes[TOKENS];
  const float *scales, *weighted;  // of section s and row i at s · ROW_BLOCK + i
  const int32_t* sums;

  Rows(const Operand& x, int64_t token) {
    static_assert(ROW_BLOCK % TOKENS == 0, "rows that are read at once lie in one block");
    for (int i = 0; i < TOKENS; i++) codes[i] = x.codes + (token + i) * x.stride;
    scales = x.scales + x.place(token, 0);
    weighted = x.weighted + x.place(token, 0);
    sums = x.sums + SUMS * x.place(token, 0);
  }
  inline __attribute__((always_inline)) int32_t four(int i, int64_t column) const {
    int32_t four;
    std::memcpy(&four, codes[i] + column, 4);
    return four;
  }
  inline __attribute__((always_inline)) void settle() {  // compilers would rather compute the addresses of each section anew than keep eight of them
#if TS_REGISTER == 64
    if constexpr (TOKENS == 8)
      for (int i = 0; i < TOKENS; i++) asm("" : "+r"(codes[i]));
#endif
  }
};

// whole[token][part] += the section's codes of one piece · the tokens' codes
#if TS_SHORT_SUMS
// chunks whose products may be summed by pairs in 16 bits, each at most the largest code · 127
template <int BITS>
constexpr int SHORT_CHUNKS = BITS == 6 ? 2 : BITS == 5 ? 4 : 8;

template <int KIND, int TOKENS>
TS_INLINE void add_products(const uint8_t* codes, int piece, const Rows<TOKENS>& x, int64_t s, pi (*whole)[PARTS<KIND, TOKENS>]) {
  constexpr KindInfo INFO = KINDS[KIND];
  if constexpr (INFO.bits == 8) {
TS_UNROLL(8)
    for (int k = 0; k < 8; k++) {
      const pb w = Chunk<pb, 8>::codes(codes, k, piece) ^ 0x80, magnitude = magnitude_of(w);
TS_UNROLL(16)
      for (int i = 0; i < TOKENS; i++) whole[i][0] = dot4_signed(whole[i][0], w, magnitude, x.four(i, s * SECTION + 4 * k));
    }
  } else {
    constexpr int RUN = SHORT_CHUNKS<INFO.bits>;
TS_UNROLL(8)
    for (int start = 0; start < 8; start += RUN) {
      rw sums[TOKENS];
TS_UNROLL(16)
      for (int i = 0; i < TOKENS; i++) sums[i] = rw{};
TS_UNROLL(8)
      for (int k = start; k < start + RUN; k++) {
        const pb w = Chunk<pb, INFO.bits>::codes(codes, k, piece);
TS_UNROLL(16)
        for (int i = 0; i < TOKENS; i++) sums[i] = dot2(sums[i], w, x.four(i, s * SECTION + 4 * k));
      }
TS_UNROLL(16)
      for (int i = 0; i < TOKENS; i++) {
        pi& to = whole[i][INFO.meta == META_K6 ? start / 4 : 0];
        to = add_pairs(to, sums[i]);
      }
    }
  }
}
#else
template <int KIND, int TOKENS>
TS_INLINE void add_products(const uint8_t* codes, int piece, const Rows<TOKENS>& x, int64_t s, pi (*whole)[PARTS<KIND, TOKENS>]) {
  constexpr KindInfo INFO = KINDS[KIND];
TS_UNROLL(8)
  for (int k = 0; k < 8; k++) {
    const pb w = Chunk<pb, INFO.bits>::codes(codes, k, piece);
    const int part = INFO.meta == META_K6 ? k / 4 : k % PARTS<KIND, TOKENS>;
TS_UNROLL(16)
    for (int i = 0; i < TOKENS; i++) whole[i][part] = dot4(whole[i][part], w, x.four(i, s * SECTION + 4 * k));
  }
}
#endif

// `sum` and a section's total of one token, scaled; `at`: where the token's scale is
template <int KIND, int TOKENS>
TS_INLINE pf scaled(pf sum, pi total, pf scale, pf minimum, const Rows<TOKENS>& x, int64_t at) {
  constexpr KindInfo INFO = KINDS[KIND];
  const pf value = To_<pf>::lanes(total);
  if constexpr (INFO.meta == META_ROW) sum = fma(value, Splat<pf>::of(x.scales[at]), sum);
  else sum = fma(scale * x.scales[at], value, sum);
  // what is subtracted from every code, or added, comes to as much as the activations sum up to
  if constexpr (offset_sum(INFO) == 0 && INFO.meta != META_K6) sum = fma(minimum, Splat<pf>::of(x.weighted[at]), sum);
  return sum;
}

// one section of one panel for `TOKENS` tokens: adds into acc
template <int KIND, int TOKENS>
TS_INLINE void section(const uint8_t* p, const GroupHead<KIND>& head, Rows<TOKENS>& x, int64_t s, pf (*acc)[TOKENS], Ask ask) {
  constexpr KindInfo INFO = KINDS[KIND];
  const uint8_t* codes = p + section_head_bytes(INFO.meta);
  x.settle();
  if (ASKS_IN_EVERY_PASS<KIND, TOKENS> ? ask.sections >> s % 8 & 1 : ask.sections)
    for (int line = 0; line < section_bytes(INFO.bits) + group_bytes(INFO.meta); line += 64) ask_for_weights<TOKENS, ASKS_IN_EVERY_PASS<KIND, TOKENS>>(codes + ask.ahead + line);
TS_UNROLL(2)
  for (int piece = 0; piece < PIECES; piece++) {
    if (PIECES > 1 && TOKENS > 1) asm("" ::: "memory");  // activations are read again: kept for the next piece they would crowd out the sums
    pi whole[TOKENS][PARTS<KIND, TOKENS>];
TS_UNROLL(16)
    for (int i = 0; i < TOKENS; i++) {
      for (int part = 0; part < PARTS<KIND, TOKENS>; part++) whole[i][part] = pi{};
      const int32_t* sums = x.sums + SUMS * (s * ROW_BLOCK + i);
      if constexpr (begins_with_sum(INFO)) whole[i][0] = Splat<pi>::of(sums[offset_sum(INFO)]);
      if constexpr (INFO.meta == META_K6) {
        whole[i][0] = Splat<pi>::of(-INFO.offset * sums[0]);
        whole[i][1] = Splat<pi>::of(-INFO.offset * sums[1]);
      }
    }
    add_products<KIND, TOKENS>(codes, piece, x, s, whole);
    pf scale = head.scale[piece], minimum = head.minimum[piece];
    pi first{}, second{};
    if constexpr (INFO.meta == META_K) {
      scale = scale * To_<pf>::lanes(Read<pi>::bytes(p + piece * PIECE));
      minimum = -minimum * To_<pf>::lanes(Read<pi>::bytes(p + 16 + piece * PIECE));
    }
    if constexpr (INFO.meta == META_K6) {
      first = Read<pi>::bytes((const int8_t*)p + piece * PIECE);
      second = Read<pi>::bytes((const int8_t*)p + 16 + piece * PIECE);
    }
TS_UNROLL(16)
    for (int i = 0; i < TOKENS; i++) {
      pi total;
      if constexpr (INFO.meta == META_K6) total = whole[i][0] * first + whole[i][1] * second;
      else if constexpr (PARTS<KIND, TOKENS> == 2) total = whole[i][0] + whole[i][1];
      else total = whole[i][0];
      acc[piece][i] = scaled<KIND>(acc[piece][i], total, scale, minimum, x, s * ROW_BLOCK + i);
    }
  }
}

// no part of its callers: one function of all numbers of tokens takes gcc minutes for AVX2
template <int KIND, int TOKENS>
TS_APART void panel(const Product& p, int64_t index, int64_t token, int64_t tile_bytes) {
  constexpr KindInfo INFO = KINDS[KIND];
  const uint8_t* at = p.weight.panel(index);
  const int64_t sections = p.weight.sections();
  pf acc[PIECES][TOKENS], row_scale[PIECES];
  for (int piece = 0; piece < PIECES; piece++) {
    for (int i = 0; i < TOKENS; i++) acc[piece][i] = pf{};
    if constexpr (INFO.meta == META_ROW) row_scale[piece] = To_<pf>::load(at + piece * sizeof(pf));
  }
  at += panel_head_bytes(INFO.meta);
  const Ask ask = ask_of<KIND, TOKENS>(p, token, tile_bytes);
  Rows<TOKENS> x(p.x, token);
  constexpr int STEP = section_bytes(INFO.bits) + section_head_bytes(INFO.meta);
  constexpr int HEAD = group_bytes(INFO.meta) + super_head_bytes(INFO.meta);
  if constexpr (HEAD == 0) {
    GroupHead<KIND> none{};
    for (int64_t s = 0; s < sections; s++, at += STEP) section<KIND, TOKENS>(at, none, x, s, acc, ask);
  } else if (TS_REGISTER == 64 && super_head_bytes(INFO.meta) == 0 && p.weight.group == 1) {  // elsewhere it takes compilers longer than it saves
    for (int64_t s = 0; s < sections; s++, at += STEP + HEAD) section<KIND, TOKENS>(at + HEAD, read_head<KIND>(at), x, s, acc, ask);
  } else {
    const int64_t group = super_head_bytes(INFO.meta) ? SUPER_SECTIONS : p.weight.group;
    for (int64_t s = 0; s < sections;) {
      GroupHead<KIND> head = read_head<KIND>(at);
      at += HEAD;
      int64_t end = std::min(s + group, sections);
      for (; s < end; s++, at += STEP) section<KIND, TOKENS>(at, head, x, s, acc, ask);
    }
  }
  for (int piece = 0; piece < PIECES; piece++)
    for (int i = 0; i < TOKENS; i++) {
      pf value = acc[piece][i];
      if constexpr (INFO.meta == META_ROW) value = value * row_scale[piece];
      put_result(p, token + i, index * LANES + piece * PIECE, value);
    }
}

template <int KIND, int TOKENS>
TS_INLINE void tokens_over(const Product& p, int64_t start, int64_t end, int64_t token, int64_t tile_bytes) {
  for (int64_t index = start; index < end; index++) panel<KIND, TOKENS>(p, index, token, tile_bytes);
}

template <int KIND>
static void panels(const Product& p, int64_t first, int64_t last) {
  // panels of a tile stay in the first-level cache while all tokens sweep them
  const int64_t tile = std::max<int64_t>(1, 16384 / p.weight.panel_bytes), bytes = tile * p.weight.panel_bytes;
  for (int64_t start = first; start < last; start += tile) {
    const int64_t end = std::min(start + tile, last);
    int64_t token = 0;
    if constexpr (MOST_TOKENS >= 8)
      for (; token + 8 <= p.tokens; token += 8) tokens_over<KIND, 8>(p, start, end, token, bytes);
    if constexpr (MOST_TOKENS >= 4)
      for (; token + 4 <= p.tokens; token += 4) tokens_over<KIND, 4>(p, start, end, token, bytes);
    for (; token + 2 <= p.tokens; token += 2) tokens_over<KIND, 2>(p, start, end, token, bytes);
    for (; token < p.tokens; token++) tokens_over<KIND, 1>(p, start, end, token, bytes);
  }
}

// Panels `index[0]`, `index[1]` … side by side, for one token.
template <int KIND>
TS_APART void side_by_side(const Product& p, const int64_t* index) {
  constexpr KindInfo INFO = KINDS[KIND];
  constexpr int STEP = section_bytes(INFO.bits) + section_head_bytes(INFO.meta), HEAD = group_bytes(INFO.meta) + super_head_bytes(INFO.meta);
  const int64_t sections = p.weight.sections(), group = HEAD == 0 ? sections : super_head_bytes(INFO.meta) ? SUPER_SECTIONS : p.weight.group;
  const Ask ask = ask_of<KIND, 1>(p, 0, 0);
  Rows<1> x(p.x, 0);
  const uint8_t* at[STREAMS];
  pf acc[STREAMS][PIECES][1];
  for (int q = 0; q < STREAMS; q++) {
    at[q] = p.weight.panel(index[q]) + panel_head_bytes(INFO.meta);
    for (int piece = 0; piece < PIECES; piece++) acc[q][piece][0] = pf{};
  }
  if (HEAD > 0 && super_head_bytes(INFO.meta) == 0 && group == 1) {  // most often: then a scale is read where it is needed
    for (int64_t s = 0; s < sections; s++)
      for (int q = 0; q < STREAMS; q++) {
        section<KIND, 1>(at[q] + HEAD, read_head<KIND>(at[q]), x, s, acc[q], ask);
        at[q] += STEP + HEAD;
      }
  } else {
    for (int64_t s = 0; s < sections;) {
      GroupHead<KIND> head[STREAMS] = {};
      for (int q = 0; q < STREAMS; q++) {
        if constexpr (HEAD > 0) head[q] = read_head<KIND>(at[q]);
        at[q] += HEAD;
      }
      const int64_t end = std::min(s + group, sections);
      for (; s < end; s++)
        for (int q = 0; q < STREAMS; q++) {
          section<KIND, 1>(at[q], head[q], x, s, acc[q], ask);
          at[q] += STEP;
        }
    }
  }
  for (int q = 0; q < STREAMS; q++)
    for (int piece = 0; piece < PIECES; piece++) {
      pf value = acc[q][piece][0];
      if constexpr (INFO.meta == META_ROW) value = value * To_<pf>::load(p.weight.panel(index[q]) + piece * sizeof(pf));
      put_result(p, 0, index[q] * LANES + piece * PIECE, value);
    }
}

template <int KIND>
static void streams(const Product& p, int64_t begin, int64_t end, int64_t first, int64_t last) {
  const int64_t apart = stream_panels(begin, end);
  for (int64_t unit = first; unit < last; unit++) {
    const int64_t index[STREAMS] = {begin + unit, begin + unit + apart};
    if (index[1] < end) side_by_side<KIND>(p, index);
    else panel<KIND, 1>(p, index[0], 0, 0);
  }
}

#define TS_INTEGER_KINDS(CASE) \
  CASE(I8_ROW) CASE(Q8) CASE(Q4) CASE(Q4_MIN) CASE(Q5) CASE(Q5_MIN) CASE(Q4_ZERO) CASE(Q3) CASE(Q3_ZERO) CASE(Q2) CASE(Q2_ZERO) CASE(Q4_K) CASE(Q5_K) CASE(Q6_K)

void multiply_streams(const Product& p, int64_t begin, int64_t end, int64_t first, int64_t last) {
  switch (p.weight.kind) {
#define CASE(KIND) case KIND: return streams<KIND>(p, begin, end, first, last);
    TS_INTEGER_KINDS(CASE)
#undef CASE
  }
}

void multiply_integers(const Product& p, int64_t first, int64_t last) {
  switch (p.weight.kind) {
#define CASE(KIND) case KIND: return panels<KIND>(p, first, last);
    TS_INTEGER_KINDS(CASE)
#undef CASE
  }
}

}  // namespace ts
