// A token from each row of logits: the best, or a draw from what top-k, top-p and min-p leave. kernels/sample/reference.py is the specification; what decides
// (tempered logits, which tokens stay, noise) is computed as it says, and the result depends neither on threads nor on how columns are shared.
//
// Nothing sorts the vocabulary. Top-k: the k-th largest of the maxima of many small groups is at most the k-th largest of all, so few tokens reach it. Top-p: a
// histogram of masses in double says in which bin the nucleus ends, and only that bin is looked at closer. The draw is a race (Gumbel-max): with
// u uniform, -log u / weight is smallest for the token drawn, and -log u >= 1 - u. So a token can win only where 1 - u is below its weight times the best time
// so far, which 16 lanes test from the hash alone; the few that pass are evaluated exactly.
#include <algorithm>
#include <functional>
#include <vector>

#include "pool.h"
#include "simd.h"

namespace ts {

typedef double vd __attribute__((vector_size(64)));
typedef uint64_t vq __attribute__((vector_size(64)));
typedef float vf8h __attribute__((vector_size(32)));
typedef int32_t vi8h __attribute__((vector_size(32)));

constexpr float NEVER = -INFINITY;
constexpr int BINS = 256;
constexpr int64_t BLOCK = 1024;          // columns whose largest is looked for at once
constexpr int64_t CHUNK_COLUMNS = 8192;  // fewer are not worth another thread
constexpr int64_t ALONE_COLUMNS = 1 << 18;  // of best tokens, done in the time that a sleeping thread takes to wake; drawing costs four times as much
constexpr uint64_t GOLDEN = 0x9E3779B97F4A7C15, FIRST = 0xBF58476D1CE4E5B9, SECOND = 0x94D049BB133111EB;

struct Choice {
  const float* logits;
  uint64_t key;
  int64_t top_k;      // below 1, or at least V: all
  int64_t token;      // the result; -1: the largest logit is no finite number
  double top_p;       // 1: all
  float temperature;  // 0: the best token
  float min_logit;    // log of min-p; -inf: none
};

struct Largest { float value; int64_t index; bool strange; };
struct Drawn { double score; int64_t token; };

struct Sample {
  Choice* rows;
  int64_t count, V, chunks;
  float* scratch;  // two rows of padded floats for each thread, or for each row where there are fewer
  std::vector<Largest> largest;
  std::vector<Drawn> drawn;

  float* scratch_at(int64_t place) const { return scratch + place * 2 * round_up(V, LANES); }
};

// ---------------------------------------------------------------- vectors

// which lanes of a are >= those of b, > those of b, or NaN: lane i is bit i
#if defined(__AVX512F__)
TS_INLINE uint32_t reaches(vf a, vf b) { return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_GE_OQ); }
TS_INLINE uint32_t exceeds(vf a, vf b) { return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_GT_OQ); }
TS_INLINE uint32_t strange(vf a, vf b) { return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_UNORD_Q); }
TS_INLINE vf keep(vf v, uint32_t wanted) { return (vf)_mm512_mask_mov_ps(_mm512_set1_ps(NEVER), (__mmask16)wanted, (__m512)v); }
#else
#if defined(__AVX2__)
template <int HOW>
TS_INLINE uint32_t compare(vf a, vf b) {
  uint32_t low = _mm256_movemask_ps(_mm256_cmp_ps((__m256)a.a, (__m256)b.a, HOW)), high = _mm256_movemask_ps(_mm256_cmp_ps((__m256)a.b, (__m256)b.b, HOW));
  return low | high << 8;
}
TS_INLINE uint32_t reaches(vf a, vf b) { return compare<_CMP_GE_OQ>(a, b); }
TS_INLINE uint32_t exceeds(vf a, vf b) { return compare<_CMP_GT_OQ>(a, b); }
TS_INLINE uint32_t strange(vf a, vf b) { return compare<_CMP_UNORD_Q>(a, b); }
#else
// plain arrays, and first whether there is any: compilers turn that loop into their machine's vectors
template <class F>
TS_INLINE uint32_t compare(vf a, vf b, F is) {
  float x[LANES], y[LANES];
  store(x, a);
  store(y, b);
  int32_t any = 0;
  uint32_t found = 0;
  for (int i = 0; i < LANES; i++) any |= is(x[i], y[i]);
  for (int i = 0; any && i < LANES; i++) found |= (uint32_t)is(x[i], y[i]) << i;
  return found;
}
TS_INLINE uint32_t reaches(vf a, vf b) { return compare(a, b, [](float x, float y) { return (int32_t)(x >= y); }); }
TS_INLINE uint32_t exceeds(vf a, vf b) { return compare(a, b, [](float x, float y) { return (int32_t)(x > y); }); }
TS_INLINE uint32_t strange(vf a, vf b) { return compare(a, b, [](float x, float y) { return (int32_t)(x != x) | (int32_t)(y != y); }); }
#endif
TS_INLINE vf keep(vf v, uint32_t wanted) {  // -inf in the other lanes
  if (wanted == 0xffff) return v;
  float lanes[LANES];
  store(lanes, v);
  for (int i = 0; i < LANES; i++) lanes[i] = wanted >> i & 1 ? lanes[i] : NEVER;
  return load(lanes);
}
#endif

TS_INLINE uint32_t first_lanes(int64_t count) { return count < LANES ? (1u << count) - 1 : 0xffff; }

// up to 16 floats; what is missing is -inf
TS_INLINE vf load_some(const float* p, int64_t count) {
  if (count >= LANES) return load(p);
  float lanes[LANES];
  for (int i = 0; i < LANES; i++) lanes[i] = i < count ? p[i] : NEVER;
  return load(lanes);
}

// e^x in double for x <= 0: Taylor to the 13th power on |r| <= ln 2 / 2, relative error below 4e-16; below -700 it is taken as e^-700
TS_INLINE vd exp_double(vd x) {
  x = x < -700.0 ? vd{} - 700.0 : x;
  vd shifted = x * 1.4426950408889634 + 6755399441055744.0;  // 1.5 · 2^52: adding it rounds to a whole number
  vd n = shifted - 6755399441055744.0;
  vd r = x - n * 6.93147180369123816490e-01;
  r = r - n * 1.90821492927058770002e-10;
  vd p = vd{} + 1.0 / 6227020800;
  p = p * r + 1.0 / 479001600;
  p = p * r + 1.0 / 39916800;
  p = p * r + 1.0 / 3628800;
  p = p * r + 1.0 / 362880;
  p = p * r + 1.0 / 40320;
  p = p * r + 1.0 / 5040;
  p = p * r + 1.0 / 720;
  p = p * r + 1.0 / 120;
  p = p * r + 1.0 / 24;
  p = p * r + 1.0 / 6;
  p = p * r + 0.5;
  p = p * r + 1.0;
  p = p * r + 1.0;
  return p * (vd)(((vq)shifted + 1023) << 52);
}

TS_INLINE vd half(vf v, int which) {
  vf8h part;
  std::memcpy(&part, (const char*)&v + 32 * which, sizeof part);
  return __builtin_convertvector(part, vd);
}

// ---------------------------------------------------------------- the best

// the first index of the largest of x[first, last); strange where one is NaN
static Largest find_largest(const float* x, int64_t first, int64_t last) {
  Largest found{NEVER, first, false};
  int64_t block = first;
  for (int64_t start = first; start < last; start += BLOCK) {
    const int64_t end = std::min(last, start + BLOCK);
    vf a = splat(NEVER), b = a;
    uint32_t odd = 0;
    int64_t c = start;
    for (; c + 2 * LANES <= end; c += 2 * LANES) {
      vf v = load(x + c), w = load(x + c + LANES);
      odd |= strange(v, w);
      a = max(a, v);
      b = max(b, w);
    }
    for (; c < end; c += LANES) {
      vf v = load_some(x + c, end - c);
      odd |= strange(v, v);
      a = max(a, v);
    }
    if (odd) return {NEVER, first, true};
    const float most = maximum(max(a, b));
    if (most > found.value) found.value = most, block = start;
  }
  if (found.value > NEVER)
    for (found.index = block; x[found.index] != found.value;) found.index++;
  return found;
}

// ---------------------------------------------------------------- what stays

// t = (x - most) / temperature, padded with -inf to whole vectors. Returns the smallest.
static float temper(const float* x, int64_t V, float most, float temperature, float* t) {
  vf least{};
  int64_t c = 0;
  for (; c + LANES <= V; c += LANES) {
    vf v = (load(x + c) - most) / temperature;
    store(t + c, v);
    least = min(least, v);
  }
  float found = -maximum(-least);
  for (const int64_t end = round_up(V, LANES); c < end; c++) {
    t[c] = c < V ? (x[c] - most) / temperature : NEVER;
    if (c < V) found = std::min(found, t[c]);
  }
  return found;
}

// Appends the wanted lanes to `to`, which has room for a whole vector. Returns the new count.
TS_INLINE int64_t append(float* to, int64_t count, vf v, uint32_t wanted) {
#if defined(__AVX512F__)
  store(to + count, (vf)_mm512_maskz_compress_ps((__mmask16)wanted, (__m512)v));
  return count + __builtin_popcount(wanted);
#else
  float lanes[LANES];
  store(lanes, v);
  for (; wanted; wanted &= wanted - 1) to[count++] = lanes[__builtin_ctz(wanted)];
  return count;
#endif
}

// `to` gets the lanes of from[0, n) whose bits `which` sets, in their order; it may be `from`. Both have room for whole vectors.
template <class F>
TS_INLINE int64_t collect(const float* from, int64_t n, float* to, F which) {
  int64_t count = 0;
  for (int64_t c = 0; c < n; c += LANES) {
    vf v = load(from + c);
    const uint32_t wanted = which(v) & first_lanes(n - c);
    if (wanted) count = append(to, count, v, wanted);
  }
  return count;
}

// The k-th largest of t[0, V), k < V. `list` gets all that are at least as large, among others; `count` says how many it has.
static float find_kth(const float* t, int64_t V, int64_t k, float* list, int64_t* count) {
  const int64_t padded = round_up(V, LANES);
  // four groups for each wanted token make a bound that is seldom far too low
  const int64_t group = std::min<int64_t>(64, std::max<int64_t>(1, padded / (4 * k))) * LANES;
  int64_t groups = 0;
  for (int64_t start = 0; start < padded; start += group, groups += LANES) {
    vf most = load(t + start);
    for (int64_t c = start + LANES; c < std::min(padded, start + group); c += LANES) most = max(most, load(t + c));
    store(list + groups, most);
  }
  std::nth_element(list, list + k - 1, list + groups, std::greater<float>());
  const float bound = list[k - 1];
  *count = collect(t, V, list, [bound](vf v) { return reaches(v, splat(bound)); });
  std::nth_element(list, list + k - 1, list + *count, std::greater<float>());
  return list[k - 1];
}

TS_INLINE vf bin_of(vf v, float top, float scale) { return min((top - v) * scale, splat(BINS - 0.5f)); }  // its whole part is the bin

// Adds the masses of from[0, n) to their bins.
static void fill_bins(const float* from, int64_t n, float top, float scale, double* mass_BINS) {
  alignas(64) double lanes[BINS][8] = {};  // a column for each lane: no addition waits for its neighbour's
  for (int64_t c = 0; c < n; c += LANES) {
    vf v = load_some(from + c, n - c);
    alignas(64) double weights[LANES];
    alignas(64) int32_t bins[LANES];
    vd low = exp_double(half(v, 0)), high = exp_double(half(v, 1));
    std::memcpy(weights, &low, sizeof low);
    std::memcpy(weights + 8, &high, sizeof high);
    store(bins, to_int(bin_of(v, top, scale)));
    for (int i = 0; i < LANES; i++) lanes[bins[i]][i & 7] += weights[i];
  }
  for (int bin = 0; bin < BINS; bin++) {
    mass_BINS[bin] = 0;
    for (int i = 0; i < 8; i++) mass_BINS[bin] += lanes[bin][i];
  }
}

// Moves those of from[0, n) that are at least `edge` and above `least` to `list`; returns the mass of the others above `least`, in fp32: they are few.
static double part(const float* from, int64_t n, float edge, float least, float* list, int64_t* count) {
  vd mass{};
  *count = 0;
  for (int64_t c = 0; c < n; c += LANES) {
    vf v = load(from + c);
    const uint32_t counted = exceeds(v, splat(least)) & first_lanes(n - c), wanted = counted & reaches(v, splat(edge));
    if (wanted) *count = append(list, *count, v, wanted);
    vf weight = exp(keep(v, counted & ~wanted));
    mass += half(weight, 0) + half(weight, 1);
  }
  double total = 0;
  for (int i = 0; i < 8; i++) total += mass[i];
  return total;
}

// The smallest logit that top-p keeps among from[0, n), of which those above `least` count, and `copies` of `least` itself. None is below `smallest`.
// `list` has room for n, and may be `from`.
static float find_nucleus(const float* from, int64_t n, float smallest, float least, int64_t copies, double top_p, float* list) {
  // what lies below -reach holds less than 1 - top_p of the mass altogether: the nucleus ends above
  float reach = (float)(std::log((double)(n + copies)) - std::log1p(-top_p) + 0.1);
  reach = std::min(reach, -smallest);
  double total = part(from, n, -reach, least, list, &n) + (double)copies * std::exp((double)least), before = 0, share = -1;
  bool tail = copies > 0 && least >= -reach;  // whether the copies of `least` are in the range that is left
  float top = 0;
  double mass_BINS[BINS];
  for (int round = 0; round < 5; round++) {
    const float scale = std::min((float)BINS / std::max(reach, 1e-36f), 1e38f);
    fill_bins(list, n, top, scale, mass_BINS);
    if (round == 0) {
      for (double mass : mass_BINS) total += mass;
      share = top_p * total;
    }
    const int last = tail ? (int)first_lane(bin_of(splat(least), top, scale)) : -1;
    if (tail) mass_BINS[last] += (double)copies * std::exp((double)least);
    int bin = 0;
    while (bin < BINS - 1 && before + mass_BINS[bin] < share) before += mass_BINS[bin++];
    tail = tail && last == bin;
    const vf low = splat((float)bin), high = splat((float)(bin + 1));
    n = collect(list, n, list, [=](vf v) {
      vf at = bin_of(v, top, scale);
      return reaches(at, low) & ~reaches(at, high);
    });
    if (n < 2) break;
    const auto [least_left, most_left] = std::minmax_element(list, list + n);
    top = *most_left;
    reach = top - (tail ? least : *least_left);
    if (n <= 128 || *least_left == *most_left) break;
  }
  std::sort(list, list + n, std::greater<float>());
  float limit = n ? list[0] : least;
  for (int64_t i = 0; i < n && before < share; i++) {
    limit = list[i];
    before += std::exp((double)limit);
  }
  return tail && before < share ? least : limit;
}

// ---------------------------------------------------------------- the draw

TS_INLINE uint64_t mix(uint64_t state) {
  state = (state ^ state >> 30) * FIRST;
  state = (state ^ state >> 27) * SECOND;
  return state ^ state >> 31;
}

TS_INLINE vq mix(vq state) {
  state = (state ^ state >> 30) * FIRST;
  state = (state ^ state >> 27) * SECOND;
  return state ^ state >> 31;
}

static double gumbel(uint64_t key, int64_t token) {
  const uint64_t state = mix((uint64_t)(token + 1) * GOLDEN + key);
  return -std::log(-std::log(((double)(state >> 12) + 0.5) * 0x1p-52));
}

TS_INLINE void compete(Drawn& best, double score, int64_t token) {
  if (score > best.score || (score == best.score && token < best.token)) best = {score, token};
}

// The winner of x[first, last) among those whose (x - most) / temperature reaches `limit`, or `best` if none is better.
static Drawn draw(const float* x, int64_t first, int64_t last, float most, float temperature, float limit, uint64_t key, Drawn best) {
  const float rate = 1.44269504f / temperature;
  const bool cut = limit > NEVER;
  // rounding of logits, weights and u together stays below the two thousandths of a power of two that are added here
  float shift = (float)(-1.4426950408889634 * best.score) + 0.002f;
  vq counter;
  for (int i = 0; i < 8; i++) counter[i] = (uint64_t)(first + i + 1) * GOLDEN + key;
  for (int64_t c = first; c < last; c += LANES, counter += LANES * GOLDEN) {
    vf v = load_some(x + c, last - c);
    if (cut && !reaches(v, splat(limit))) continue;  // cut rows come tempered
    // 1 - u in 31 bits, rounded down
    vi8h low = __builtin_convertvector(~mix(counter) >> 33, vi8h), high = __builtin_convertvector(~mix(counter + 8 * GOLDEN) >> 33, vi8h);
    int32_t missing[LANES];
    std::memcpy(missing, &low, sizeof low);
    std::memcpy(missing + 8, &high, sizeof high);
    // 2^power from above: a power of two's fraction read as a line lies over the curve
    vf power = max((v - most) * rate + shift, splat(-100.f));
    vf bound = as<vf>(to_int((power + 127.f) * 8388608.f));
    uint32_t able = reaches(bound, to_float(load(missing)) * 0x1p-31f) & first_lanes(last - c);
    if (!able) continue;
    for (; able; able &= able - 1) {
      const int64_t token = c + __builtin_ctz(able);
      const float t = (x[token] - most) / temperature;
      if (t >= limit) compete(best, gumbel(key, token) + (double)t, token);
    }
    shift = (float)(-1.4426950408889634 * best.score) + 0.002f;
  }
  return best;
}

static bool is_cut(const Choice& row, int64_t V) { return (row.top_k > 0 && row.top_k < V) || row.top_p < 1 || row.min_logit > NEVER; }

static int64_t draw_cut(const Choice& row, int64_t V, const Largest& best, float* t) {
  float* list = t + round_up(V, LANES);
  const float smallest = temper(row.logits, V, best.value, row.temperature, t);
  float limit = NEVER;
  if (row.top_k > 0 && row.top_k < V) {
    int64_t count;
    limit = find_kth(t, V, row.top_k, list, &count);
    if (row.top_p < 1) {
      const int64_t above = collect(list, count, list, [limit](vf v) { return exceeds(v, splat(limit)); });
      limit = find_nucleus(list, above, limit, limit, row.top_k - above, row.top_p, list);
    }
  } else if (row.top_p < 1) {
    limit = find_nucleus(t, V, smallest, NEVER, 0, row.top_p, list);
  }
  limit = std::max(limit, row.min_logit);
  return draw(t, 0, V, 0.f, 1.f, limit, row.key, {gumbel(row.key, best.index), best.index}).token;
}

// ---------------------------------------------------------------- sharing

// a whole row, by one thread
static void choose(Choice& row, int64_t V, float* scratch) {
  const Largest best = find_largest(row.logits, 0, V);
  if (best.strange || !std::isfinite(best.value)) row.token = -1;
  else if (row.temperature == 0) row.token = best.index;
  else if (is_cut(row, V)) row.token = draw_cut(row, V, best, scratch);
  else row.token = draw(row.logits, 0, V, best.value, row.temperature, NEVER, row.key, {gumbel(row.key, best.index), best.index}).token;
}

// few rows: the largest, and draws from all tokens, are shared by columns
static void choose_in_chunks(Sample& work, Worker& worker) {
  const int64_t units = work.count * work.chunks, V = work.V, width = round_up((V + work.chunks - 1) / work.chunks, LANES);
  auto columns = [=](int64_t unit) { return std::min(V, unit % work.chunks * width); };
  int64_t first, last;
  while (worker.take(units, 1, &first, &last))
    for (int64_t unit = first; unit < last; unit++)
      work.largest[unit] = find_largest(work.rows[unit / work.chunks].logits, columns(unit), std::min(V, columns(unit) + width));
  worker.barrier();
  while (worker.take(units, 1, &first, &last))
    for (int64_t unit = first; unit < last; unit++) {
      Choice& row = work.rows[unit / work.chunks];
      Largest best{NEVER, 0, false};
      for (int64_t chunk = 0; chunk < work.chunks; chunk++) {
        const Largest& other = work.largest[unit / work.chunks * work.chunks + chunk];
        best.strange |= other.strange;
        if (other.value > best.value) best.value = other.value, best.index = other.index;
      }
      work.drawn[unit] = {-INFINITY, -1};
      if (best.strange || !std::isfinite(best.value)) continue;
      Drawn start{gumbel(row.key, best.index), best.index};
      if (row.temperature == 0) work.drawn[unit] = start;
      else if (!is_cut(row, V)) work.drawn[unit] = draw(row.logits, columns(unit), std::min(V, columns(unit) + width), best.value, row.temperature, NEVER, row.key, start);
      else if (unit % work.chunks == 0) work.drawn[unit] = {0, draw_cut(row, V, best, work.scratch_at(unit / work.chunks))};
    }
}

static void job(Worker& worker, void* argument) {
  Sample& work = *(Sample*)argument;
  if (work.chunks > 1) return choose_in_chunks(work, worker);
  int64_t first, last;
  while (worker.take(work.count, 1, &first, &last))
    for (int64_t row = first; row < last; row++) choose(work.rows[row], work.V, work.scratch_at(work.count < worker.count ? row : worker.index));
}

}  // namespace ts

using namespace ts;

extern "C" int64_t ts_choice_bytes() { return sizeof(Choice); }

// scratch: two rows of floats, each rounded up to 16, for each thread, or for each row where there are fewer
extern "C" void ts_sample(Choice* rows, int64_t count, int64_t V, float* scratch, int32_t threads) {
  int64_t work_columns = 0;
  for (int64_t row = 0; row < count; row++) work_columns += rows[row].temperature == 0 ? V : 4 * V;
  if (work_columns < ALONE_COLUMNS) threads = 1;
  Sample work{rows, count, V, 1, scratch, {}, {}};
  if (count < threads) work.chunks = std::min<int64_t>((2 * threads + count - 1) / count, (V + CHUNK_COLUMNS - 1) / CHUNK_COLUMNS);
  if (work.chunks > 1) {
    work.largest.resize(count * work.chunks);
    work.drawn.resize(count * work.chunks);
  }
  pool_run(threads, job, &work);
  for (int64_t row = 0; work.chunks > 1 && row < count; row++) {
    Drawn best{-INFINITY, -1};
    for (int64_t chunk = 0; chunk < work.chunks; chunk++) {
      const Drawn& other = work.drawn[row * work.chunks + chunk];
      if (best.token < 0) best = other;
      else if (other.token >= 0) compete(best, other.score, other.token);
    }
    rows[row].token = best.token;
  }
}
